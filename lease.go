package etcdutil

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
)

// Lease is a lease that is kept alive. It is a context.Context, which ends on Close, when its parent ends, and when the
// lease is lost: before the server can give its keys away (ErrLeaseExpired), or when the server no longer knows it
// (ErrLeaseRevoked; noticed at the next renewal).
type Lease struct {
	lifetime
	config   config
	id       clientv3.LeaseID
	ttl      time.Duration
	interval time.Duration
	margin   time.Duration
	max      int // renewals, or unlimited
	closing  sync.Once
	closeErr error

	mu       sync.Mutex
	expiry   time.Time
	renewals int
	late     bool  // a renewal is overdue, and that has been logged
	refusal  error // why the server will not renew it
	renew    *time.Timer
	expire   *time.Timer
	keys     map[string]bool // reserved by locks
	reserved int64           // keys so far
	locks    map[*Lock]struct{}

	// stream and left are guarded by keepAlives, renewing by stream.mu.
	stream   *keepAlive
	left     bool
	renewing bool
}

const unlimited = -1

// maxLeaseTTL is etcd's own bound.
const maxLeaseTTL = 9_000_000_000 * time.Second

// A LeaseOption shapes a lease. It is a LockOption too: there it shapes the lock's own lease, and is refused beside
// WithLease.
type LeaseOption interface {
	LockOption
	applyLease(*leaseConfig)
}

type leaseConfig struct {
	config
	interval, margin *time.Duration
	max              *int
}

type leaseOption func(*leaseConfig)

func (o leaseOption) applyLease(c *leaseConfig) { o(c) }
func (o leaseOption) applyLock(c *lockConfig)   { o(&c.leaseConfig) }

// A RenewalOption shapes how a lease is renewed: that of NewLease, of a lock, or of a registration.
type RenewalOption interface {
	LeaseOption
	RegisterOption
}

type renewalOption struct{ leaseOption }

func (o renewalOption) applyRegister(c *registerConfig) { o.applyLease(&c.leaseConfig) }

// WithKeepAliveInterval sets the time from one renewal to the next; default a third of the granted TTL, or half of what a
// large margin leaves of it. It must be positive and less than the TTL. If it is longer than TTL less margin, the lease runs
// out before it is renewed.
func WithKeepAliveInterval(d time.Duration) RenewalOption {
	return renewalOption{func(c *leaseConfig) { c.interval = &d }}
}

// WithMaxKeepAlives has the lease renewed n times at most, and then run out (ErrLeaseExpired). 0 means never renewed;
// without this option there is no limit. n must not be negative.
func WithMaxKeepAlives(n int) LeaseOption {
	return leaseOption(func(c *leaseConfig) { c.max = &n })
}

// WithExpiryMargin sets how long before the server may give the lease's keys away its context ends; default a tenth of
// the granted TTL. It must not be negative and be less than the TTL. It is the time that work has to stop in, and
// covers the drift between the clocks of client and server during one TTL.
func WithExpiryMargin(d time.Duration) RenewalOption {
	return renewalOption{func(c *leaseConfig) { c.margin = &d }}
}

func (c *leaseConfig) validate(ttl time.Duration) error {
	switch {
	case ttl <= 0:
		return fmt.Errorf("etcdutil: ttl must be positive: %v", ttl)
	case ttl > maxLeaseTTL:
		return fmt.Errorf("etcdutil: ttl must be at most %v: %v", maxLeaseTTL, ttl)
	}
	whole := time.Duration(wholeSeconds(ttl)) * time.Second
	switch {
	case c.interval != nil && (*c.interval <= 0 || *c.interval >= whole):
		return fmt.Errorf("etcdutil: WithKeepAliveInterval must be positive and less than the TTL of %v: %v", whole, *c.interval)
	case c.margin != nil && (*c.margin < 0 || *c.margin >= whole):
		return fmt.Errorf("etcdutil: WithExpiryMargin must not be negative and be less than the TTL of %v: %v", whole, *c.margin)
	case c.max != nil && *c.max < 0:
		return fmt.Errorf("etcdutil: WithMaxKeepAlives must not be negative: %d", *c.max)
	}
	return c.retry.validate()
}

// given names the lease options that were given.
func (c *leaseConfig) given() string {
	var names []string
	if c.interval != nil {
		names = append(names, "WithKeepAliveInterval")
	}
	if c.max != nil {
		names = append(names, "WithMaxKeepAlives")
	}
	if c.margin != nil {
		names = append(names, "WithExpiryMargin")
	}
	return strings.Join(names, ", ")
}

func wholeSeconds(d time.Duration) int64 {
	seconds := int64(d / time.Second)
	if d%time.Second > 0 {
		seconds++
	}
	return seconds
}

// NewLease grants a lease and keeps it alive until Close, until ctx ends, or until it is lost.
//
// ctx is the lease's parent, as in context.WithCancel: when it ends, the lease's context ends and renewal stops, but
// the server keeps the lease until Close, or until its TTL has passed. ttl must be positive; it is rounded up to
// seconds, and the server may grant more (etcd grants at least 2 s by default).
//
// The request is retried as [RetryPolicy] says. If NewLease fails, whatever it may have left on the server is revoked
// behind it, and runs out with the TTL at the latest. A lease whose time was over when the answer came is ErrLeaseExpired.
func NewLease(ctx context.Context, client *clientv3.Client, ttl time.Duration, opts ...LeaseOption) (*Lease, error) {
	if err := requireClient(ctx, client); err != nil {
		return nil, err
	}
	c := leaseConfig{config: newConfig(client)}
	for _, o := range opts {
		o.applyLease(&c)
	}
	c.finish()
	if err := c.validate(ttl); err != nil {
		return nil, err
	}
	return newLease(ctx, ctx, ttl, &c)
}

// newLease makes a lease whose parent is parent. ctx bounds the call.
func newLease(parent, ctx context.Context, ttl time.Duration, c *leaseConfig) (*Lease, error) {
	g, err := grantLease(ctx, &c.config, wholeSeconds(ttl))
	if err != nil {
		return nil, fmt.Errorf("etcdutil: grant lease: %w", err)
	}
	margin := or(c.margin, g.ttl/10)
	l := &Lease{
		config:   c.config,
		id:       g.id,
		ttl:      g.ttl,
		interval: or(c.interval, min(g.ttl/3, (g.ttl-margin)/2)),
		margin:   margin,
		max:      or(c.max, unlimited),
	}
	l.init(parent)
	l.onStop = l.stopLocks
	l.keep(g.since)
	if lost := l.lost(); lost != nil {
		l.stop()
		revokeInBackground(ctx, &c.config, g.id, g.ttl, 0)
		return nil, fmt.Errorf("etcdutil: grant lease: the answer came too late: %w", lost)
	}
	return l, nil
}

// A grant is what the server gave. It lasts at least from since for ttl.
type grant struct {
	id    clientv3.LeaseID
	ttl   time.Duration
	since time.Time
}

// grantLease chooses the lease's ID itself, so that a repeated request cannot leave a second lease behind. It goes below
// clientv3.Lease, which offers no way to choose.
func grantLease(ctx context.Context, c *config, seconds int64) (grant, error) {
	remote := clientv3.RetryLeaseClient(c.client)
	id, ttl := newLeaseID(), time.Duration(seconds)*time.Second
	doubt := false
	g, err := retry(ctx, c, c.retry, "grant lease", func(ctx context.Context) (grant, error) {
		for {
			sent := time.Now()
			resp, err := remote.LeaseGrant(ctx, &etcdserverpb.LeaseGrantRequest{TTL: seconds, ID: int64(id)}, grpc.WaitForReady(true))
			if err == nil {
				return grant{id, time.Duration(resp.TTL) * time.Second, sent}, nil
			}
			err = rpctypes.Error(err)
			doubt = doubt || IsAmbiguous(err)
			if !errors.Is(err, rpctypes.ErrLeaseExist) {
				return grant{}, err
			}
			// It is ours, from an attempt that was not answered, and of unknown age. Begin again, under another ID.
			if revokeLease(ctx, c, id) != nil {
				revokeInBackground(ctx, c, id, ttl, 0)
			}
			id, doubt = newLeaseID(), false
		}
	})
	if err != nil && doubt {
		revokeInBackground(ctx, c, id, ttl, min(ttl, lateWindow))
	}
	return g, err
}

func newLeaseID() clientv3.LeaseID { return clientv3.LeaseID(rand.Int64N(math.MaxInt64) + 1) }

// revokeLease returns nil if the server does not know the lease: another attempt may have revoked it.
func revokeLease(ctx context.Context, c *config, id clientv3.LeaseID) error {
	if _, err := c.client.Revoke(ctx, id); err != nil && !errors.Is(err, rpctypes.ErrLeaseNotFound) {
		return err
	}
	return nil
}

// revokeSlots bounds how many leases are being revoked behind their callers: an outage may leave any number.
var revokeSlots = make(chan struct{}, 64)

// revokeInBackground revokes a lease behind the caller, and for as long as fear again, if the lost request that grants it may arrive
// late. It ends after the TTL: then the lease, which nobody renews, is as good as gone. So it is if there are too many.
func revokeInBackground(ctx context.Context, c *config, id clientv3.LeaseID, ttl, fear time.Duration) {
	select {
	case revokeSlots <- struct{}{}:
	default:
		return
	}
	inBackground(func() {
		defer func() { <-revokeSlots }()
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), ttl)
		defer cancel()
		removeRepeatedly(ctx, c, "revoke lease "+hexID(id), fear, func(ctx context.Context) error { return revokeLease(ctx, c, id) })
	})
}

// ID is the lease's ID, chosen at random by this client.
func (l *Lease) ID() clientv3.LeaseID { return l.id }

// TTL is the lease's time to live as granted, in whole seconds.
func (l *Lease) TTL() time.Duration { return l.ttl }

// Expiry is when the context ends unless the lease is renewed before: the moment at which the last answered renewal was
// sent, plus the TTL, less the margin. It moves with every renewal, which is why it is not the context's Deadline.
func (l *Lease) Expiry() time.Time {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.expiry
}

// Alive asks the server whether it knows the lease. It answers whatever the state of the context, and changes nothing.
func (l *Lease) Alive(ctx context.Context) (bool, error) {
	resp, err := retryRead(ctx, &l.config, l.config.retry, "ask for lease "+hexID(l.id), func(ctx context.Context) (*clientv3.LeaseTimeToLiveResponse, error) {
		return l.config.client.TimeToLive(ctx, l.id)
	})
	if err != nil {
		return false, fmt.Errorf("etcdutil: ask for lease: %w", err)
	}
	return resp.TTL >= 0, nil
}

// Close ends the context with ErrClosed and revokes the lease: its keys are gone when it returns nil.
//
// It takes no longer than the lease has left, and 5 s at most; its parent may have ended. A lease that was lost before
// gives the cause. If the server did not confirm, the error is ErrUnknownOutcome and says by when the lease will have
// run out on the server: it is renewed no longer. Further calls return what the first did.
func (l *Lease) Close() error {
	l.closing.Do(func() {
		l.closeErr = l.release()
		l.config.reporter.flush()
	})
	return l.closeErr
}

func (l *Lease) release() error {
	lost := l.lost()
	l.shutdown(ErrClosed)
	l.stop()
	l.awaitStream()
	if lost != nil {
		return lost
	}
	policy := releasePolicy(time.Until(l.Expiry()))
	_, err := retry(context.WithoutCancel(l.ctx), &l.config, policy, "revoke lease "+hexID(l.id), func(ctx context.Context) (struct{}, error) {
		return struct{}{}, revokeLease(ctx, &l.config, l.id)
	})
	if err == nil {
		return nil
	}
	return fmt.Errorf("%w: lease %x is not confirmed revoked; it will have run out by %s: %w",
		ErrUnknownOutcome, int64(l.id), l.outlived(), err)
}

// outlived is when a lease that is renewed no longer will have run out on the server.
func (l *Lease) outlived() string { return time.Now().Add(l.ttl).Format(time.RFC3339) }

// keysPerName limits the distinct keys that a lease uses for the locks of one name, unless more are
// held at once. Deleted keys slow range reads until compaction, so keys are reused.
const keysPerName = 4

// reserveKey returns a key for a lock of this name that no other lock on this lease has.
func (l *Lease) reserveKey(name string) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.keys == nil {
		l.keys = make(map[string]bool)
	}
	l.reserved++
	key := l.lockKey(name, l.reserved%keysPerName)
	if l.keys[key] {
		key = l.lockKey(name, l.reserved+keysPerName) // which was never used before
	}
	l.keys[key] = true
	return key
}

// freeKey allows a key that is gone and cannot come back to be reserved again.
func (l *Lease) freeKey(key string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.keys, key)
}

func (l *Lease) lockKey(name string, nonce int64) string {
	return prefix(name) + strconv.FormatInt(int64(l.id), 16) + "-" + strconv.FormatInt(nonce, 16)
}

// addLock has the lock stopped before the lease's own context ends, until removeLock.
func (l *Lease) addLock(lock *Lock) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.locks == nil {
		l.locks = make(map[*Lock]struct{})
	}
	l.locks[lock] = struct{}{}
}

func (l *Lease) removeLock(lock *Lock) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.locks, lock)
}

// stopLocks stops the lease's locks before the lease ends: the context of one may be a child of the
// lease's.
func (l *Lease) stopLocks(cause error) {
	l.mu.Lock()
	locks := slices.Collect(maps.Keys(l.locks))
	l.mu.Unlock()
	for _, lock := range locks {
		lock.markLostNoLog(cause)
	}
}

// keep arms the lease's two timers. They are its only means: it needs no goroutine.
func (l *Lease) keep(since time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.expiry = since.Add(l.ttl - l.margin)
	l.expire = time.AfterFunc(time.Until(l.expiry), l.expired)
	if l.max != 0 {
		l.renew = time.AfterFunc(time.Until(since.Add(l.interval)), l.renewalDue)
		context.AfterFunc(l.ctx, l.stopRenewing)
	}
}

func (l *Lease) stop() {
	l.mu.Lock()
	l.expire.Stop()
	l.mu.Unlock()
	l.stopRenewing()
}

func (l *Lease) stopRenewing() {
	l.mu.Lock()
	if l.renew != nil {
		l.renew.Stop()
	}
	l.mu.Unlock()
	l.leave()
}

// renewalDue runs when it is time to renew, and again while no answer has come.
func (l *Lease) renewalDue() {
	stream := l.join()
	if stream == nil {
		return
	}
	l.mu.Lock()
	l.renew.Reset(l.patience())
	l.mu.Unlock()
	if late := stream.request(l); late && l.firstLate() {
		l.config.reporter.renewalLate(l.id, l.Expiry())
	}
}

// patience is how often to look whether an answer is late. It does not follow a short interval, or one lease could have
// everybody's stream reopened faster than it is answered.
func (l *Lease) patience() time.Duration { return l.ttl / 3 }

func (l *Lease) firstLate() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	first := !l.late
	l.late = true
	return first
}

// renewed takes the answer to a renewal that was sent at sent.
func (l *Lease) renewed(sent time.Time, ttl time.Duration) {
	if ttl <= 0 {
		l.lose(ErrLeaseRevoked)
		return
	}
	if !l.extend(sent, ttl) {
		l.stopRenewing()
	}
}

// extend reports whether the lease is to be renewed again.
func (l *Lease) extend(sent time.Time, ttl time.Duration) (again bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.stopCtx.Err() != nil || l.renewals == l.max { // nor if one more was under way
		return false
	}
	l.late = false
	l.renewals++
	if expiry := sent.Add(ttl - l.margin); expiry.After(l.expiry) {
		l.expiry = expiry
		l.expire.Reset(time.Until(expiry))
	}
	if l.renewals == l.max || l.ctx.Err() != nil {
		return false
	}
	l.renew.Reset(time.Until(sent.Add(l.interval)))
	return true
}

// refused is told that the server will not renew the lease: it runs out, without keeping the others from theirs.
func (l *Lease) refused(err error) {
	l.config.reporter.renewalDenied(l.id, l.Expiry(), err)
	l.mu.Lock()
	l.refusal = err
	l.mu.Unlock()
	l.stopRenewing()
}

func (l *Lease) expired() {
	l.mu.Lock()
	left, refusal := time.Until(l.expiry), l.refusal
	if left > 0 { // renewed while this timer fired
		l.expire.Reset(left)
	}
	l.mu.Unlock()
	switch {
	case left > 0:
	case refusal != nil:
		l.lose(fmt.Errorf("%w: %w", ErrLeaseExpired, refusal))
	default:
		l.lose(ErrLeaseExpired)
	}
}

func (l *Lease) lose(cause error) {
	if !l.shutdown(cause) {
		return
	}
	l.mu.Lock()
	l.expire.Stop()
	l.mu.Unlock()
	l.config.reporter.leaseLost(l.id, cause)
}

// lost is why the lease no longer surely has its keys: it was lost or closed, or its time is over, even if the timer
// that is to say so is late. It is nil while the work may wind down after the parent's end.
func (l *Lease) lost() error {
	if !time.Now().Before(l.Expiry()) {
		l.expired()
	}
	return context.Cause(l.stopCtx)
}
