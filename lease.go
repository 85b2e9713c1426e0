package etcdutil

import (
	"context"
	"errors"
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

	renewal renewal  // its place in the renewal stream
	slots   keySlots // the keys that its locks use
	locks   lockSet  // to be stopped before its own context is canceled
	sweeper keySweeper

	mu       sync.Mutex // guards what follows
	expiry   time.Time
	renewals int
	late     bool  // a renewal is late, and that has been logged
	denial   error // why the server will not renew the lease
	renew    *time.Timer
	expire   *time.Timer
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
		return errorf("ttl must be positive: %v", ttl)
	case ttl > maxLeaseTTL:
		return errorf("ttl must be at most %v: %v", maxLeaseTTL, ttl)
	}
	whole := time.Duration(wholeSeconds(ttl)) * time.Second
	switch {
	case c.interval != nil && (*c.interval <= 0 || *c.interval >= whole):
		return errorf("WithKeepAliveInterval must be positive and less than the TTL of %v: %v", whole, *c.interval)
	case c.margin != nil && (*c.margin < 0 || *c.margin >= whole):
		return errorf("WithExpiryMargin must not be negative and be less than the TTL of %v: %v", whole, *c.margin)
	case c.max != nil && *c.max < 0:
		return errorf("WithMaxKeepAlives must not be negative: %d", *c.max)
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
		return nil, errorf("grant lease: %w", err)
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
	l.renewal.lease, l.sweeper.lease = l, l
	l.init(parent)
	l.onStop = l.locks.markLost
	l.startTimers(g.since)
	if lost := l.stopCause(); lost != nil {
		l.stopTimers()
		revokeInBackground(ctx, &c.config, g.id, g.ttl, 0)
		return nil, errorf("grant lease: the answer came too late: %w", lost)
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
		return false, errorf("ask for lease: %w", err)
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
	lost := l.stopCause()
	l.shutdown(ErrClosed)
	l.stopTimers()
	l.renewal.awaitStream()
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
	return errorf("%w: lease %x is not confirmed revoked; it will have run out by %s: %w",
		ErrUnknownOutcome, int64(l.id), l.serverExpiry(), err)
}

// serverExpiry returns when a lease that is renewed no longer will have expired on the server.
func (l *Lease) serverExpiry() string { return time.Now().Add(l.ttl).Format(time.RFC3339) }

// reserveKey returns a key for a lock of this name that no other lock on this lease has.
func (l *Lease) reserveKey(name string) string { return l.slots.reserve(name, l.id) }

// freeKey allows a key that is gone and cannot come back to be reserved again.
func (l *Lease) freeKey(key string) { l.slots.free(key) }

// addLock has the lock stopped before the lease's own context is canceled, until removeLock.
func (l *Lease) addLock(lock *Lock) { l.locks.add(lock) }

func (l *Lease) removeLock(lock *Lock) { l.locks.remove(lock) }

// startTimers starts the lease's two timers, which are all that it needs: it has no goroutine.
func (l *Lease) startTimers(since time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.expiry = since.Add(l.ttl - l.margin)
	l.expire = time.AfterFunc(time.Until(l.expiry), l.handleExpiry)
	if l.max != 0 {
		l.renew = time.AfterFunc(time.Until(since.Add(l.interval)), l.scheduleRenewal)
		context.AfterFunc(l.ctx, l.stopRenewing)
	}
}

func (l *Lease) stopTimers() {
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
	l.renewal.detach()
}

// scheduleRenewal runs when it is time to renew, and again while no answer has come.
func (l *Lease) scheduleRenewal() {
	timeout := l.answerTimeout()
	l.mu.Lock()
	l.renew.Reset(timeout)
	l.mu.Unlock()
	// The request has waited a little less than its lease.
	if late := l.renewal.schedule(timeout * 3 / 4); late {
		l.markLate()
	}
}

// answerTimeout returns when an answer is late. It does not follow a short interval: one lease could
// have everybody's stream reopened faster than it is answered.
func (l *Lease) answerTimeout() time.Duration { return l.ttl / 3 }

// markLate logs the first of the times that a renewal is found late.
func (l *Lease) markLate() {
	l.mu.Lock()
	first := !l.late
	l.late = true
	l.mu.Unlock()
	if first {
		l.config.reporter.renewalLate(l.id, l.Expiry())
	}
}

// handleRenewal takes the answer to the renewal that was sent at sentAt.
func (l *Lease) handleRenewal(sentAt time.Time, ttl time.Duration) {
	if ttl <= 0 {
		l.markLost(ErrLeaseRevoked)
		return
	}
	if !l.extend(sentAt, ttl) {
		l.stopRenewing()
	}
}

// extend reports whether the lease is to be renewed again.
func (l *Lease) extend(sentAt time.Time, ttl time.Duration) (again bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.stopCtx.Err() != nil || l.renewals == l.max { // nor if one more was under way
		return false
	}
	l.late = false
	l.renewals++
	if expiry := sentAt.Add(ttl - l.margin); expiry.After(l.expiry) {
		l.expiry = expiry
		l.expire.Reset(time.Until(expiry))
	}
	if l.renewals == l.max || l.ctx.Err() != nil {
		return false
	}
	l.renew.Reset(time.Until(sentAt.Add(l.interval)))
	return true
}

// handleDenied takes the server's refusal to renew the lease. The lease expires.
func (l *Lease) handleDenied(err error) {
	l.config.reporter.renewalDenied(l.id, l.Expiry(), err)
	l.mu.Lock()
	l.denial = err
	l.mu.Unlock()
	l.stopRenewing()
}

func (l *Lease) handleExpiry() {
	l.mu.Lock()
	left, denial := time.Until(l.expiry), l.denial
	if left > 0 { // renewed while this timer fired
		l.expire.Reset(left)
	}
	l.mu.Unlock()
	switch {
	case left > 0:
	case denial != nil:
		l.markLost(errorf("%w: %w", ErrLeaseExpired, denial))
	default:
		l.markLost(ErrLeaseExpired)
	}
}

func (l *Lease) markLost(cause error) {
	if !l.shutdown(cause) {
		return
	}
	l.mu.Lock()
	l.expire.Stop()
	l.mu.Unlock()
	l.config.reporter.leaseLost(l.id, cause)
}

// stopCause returns why the lease no longer surely has its keys: it was lost or closed, or its time
// is over although the timer is late. It returns nil while work winds down after the parent's end.
func (l *Lease) stopCause() error {
	if !time.Now().Before(l.Expiry()) {
		l.handleExpiry()
	}
	return context.Cause(l.stopCtx)
}

// keysPerName limits the distinct keys that a lease uses for the locks of one name, unless more are
// held at once. Deleted keys slow range reads until compaction, so keys are reused.
const keysPerName = 4

// keySlots hands out the keys of a lease's locks.
type keySlots struct {
	mu       sync.Mutex
	reserved map[string]bool
	count    int64 // of all reservations
}

// reserve returns a key that is not reserved.
func (s *keySlots) reserve(name string, id clientv3.LeaseID) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.reserved == nil {
		s.reserved = make(map[string]bool)
	}
	s.count++
	key := slotKey(name, id, s.count%keysPerName)
	if s.reserved[key] {
		key = slotKey(name, id, s.count+keysPerName) // which was never used before
	}
	s.reserved[key] = true
	return key
}

func (s *keySlots) free(key string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.reserved, key)
}

func (s *keySlots) len() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.reserved)
}

// slotKey returns the key of a lock: the nonce makes it unique among the locks of a lease.
func slotKey(name string, id clientv3.LeaseID, nonce int64) string {
	return prefix(name) + hexID(id) + "-" + strconv.FormatInt(nonce, 16)
}

// lockSet has the locks that stop before their lease: the context of one may be a child of the
// lease's.
type lockSet struct {
	mu    sync.Mutex
	locks map[*Lock]struct{}
}

func (s *lockSet) add(lock *Lock) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.locks == nil {
		s.locks = make(map[*Lock]struct{})
	}
	s.locks[lock] = struct{}{}
}

func (s *lockSet) remove(lock *Lock) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.locks, lock)
}

func (s *lockSet) all() []*Lock {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Collect(maps.Keys(s.locks))
}

// markLost stops all locks.
func (s *lockSet) markLost(cause error) {
	for _, lock := range s.all() {
		lock.markLost(cause)
	}
}
