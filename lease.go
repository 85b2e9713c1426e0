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
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
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
	keys     map[string]*Lock // the keys in use, and by which lock; nil if that has ended
	locks    int64            // that it has held

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

// WithKeepAliveInterval sets the time from one renewal to the next; default a third of the granted TTL, or half of what a
// large margin leaves of it. It must be positive and less than the TTL. If it is longer than TTL less margin, the lease runs
// out before it is renewed.
func WithKeepAliveInterval(d time.Duration) LeaseOption {
	return leaseOption(func(c *leaseConfig) { c.interval = &d })
}

// WithMaxKeepAlives has the lease renewed n times at most, and then run out (ErrLeaseExpired). 0 means never renewed;
// without this option there is no limit. n must not be negative.
func WithMaxKeepAlives(n int) LeaseOption {
	return leaseOption(func(c *leaseConfig) { c.max = &n })
}

// WithExpiryMargin sets how long before the server may give the lease's keys away its context ends; default a tenth of
// the granted TTL. It must not be negative and be less than the TTL. It is the time that work has to stop in, and
// covers the drift between the clocks of client and server during one TTL.
func WithExpiryMargin(d time.Duration) LeaseOption {
	return leaseOption(func(c *leaseConfig) { c.margin = &d })
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
	c := leaseConfig{config: config{logger: discard, client: client}}
	for _, o := range opts {
		o.applyLease(&c)
	}
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
	l.begin(parent)
	l.ending = l.loseLocks
	l.keep(g.since)
	if lost := l.lost(); lost != nil {
		l.stop()
		forsakeLease(ctx, &c.config, g.id, g.ttl, 0)
		return nil, fmt.Errorf("etcdutil: grant lease: the answer came too late: %w", lost)
	}
	return l, nil
}

func or[T any](given *T, otherwise T) T {
	if given != nil {
		return *given
	}
	return otherwise
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
	g, err := retry(ctx, c, func(ctx context.Context) (grant, error) {
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
				forsakeLease(ctx, c, id, ttl, 0)
			}
			id, doubt = newLeaseID(), false
		}
	})
	if err != nil && doubt {
		forsakeLease(ctx, c, id, ttl, min(ttl, stragglers))
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

// forsaking bounds how many leases are being revoked behind their callers: an outage may leave any number.
var forsaking = make(chan struct{}, 64)

// forsakeLease revokes a lease behind the caller, and for as long as fear again, if the lost request that grants it may arrive
// late. It ends after the TTL: then the lease, which nobody renews, is as good as gone. So it is if there are too many.
func forsakeLease(ctx context.Context, c *config, id clientv3.LeaseID, ttl, fear time.Duration) {
	select {
	case forsaking <- struct{}{}:
	default:
		return
	}
	behind(func() {
		defer func() { <-forsaking }()
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), ttl)
		defer cancel()
		sweep(ctx, c, fear, func(ctx context.Context) error { return revokeLease(ctx, c, id) })
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
	resp, err := query(ctx, &l.config, func(ctx context.Context) (*clientv3.LeaseTimeToLiveResponse, error) {
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
	l.closing.Do(func() { l.closeErr = l.release() })
	return l.closeErr
}

func (l *Lease) release() error {
	lost := l.lost()
	l.finish(ErrClosed)
	l.stop()
	l.awaitStream()
	if lost != nil {
		return lost
	}
	ctx, c := l.config.closing(l.ctx, time.Until(l.Expiry()))
	_, err := retry(ctx, c, func(ctx context.Context) (struct{}, error) {
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

// nonces is how many keys a lease uses in turn for the locks of one name, unless more are held at once. Every key that
// was ever under a lock's name slows its queue down until etcd is compacted, which is why keys are used again at all.
const nonces = 4

// takeKey gives the lock a key that no other lock on this lease has.
func (l *Lease) takeKey(lock *Lock) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.keys == nil {
		l.keys = make(map[string]*Lock)
	}
	l.locks++
	lock.key = l.keyOf(lock.name, l.locks%nonces)
	if _, used := l.keys[lock.key]; used {
		lock.key = l.keyOf(lock.name, l.locks+nonces) // which was never used before
	}
	l.keys[lock.key] = lock
}

// loseLocks ends the lease's locks before it ends: the context of one may be a child of the lease's.
func (l *Lease) loseLocks(cause error) {
	l.mu.Lock()
	locks := slices.Collect(maps.Values(l.keys))
	l.mu.Unlock()
	for _, lock := range locks {
		if lock != nil {
			lock.loseQuietly(cause)
		}
	}
}

func (l *Lease) keyOf(name string, nonce int64) string {
	return prefix(name) + strconv.FormatInt(int64(l.id), 16) + "-" + strconv.FormatInt(nonce, 16)
}

// letGo forgets a lock that has ended, but not its key, which may still be there.
func (l *Lease) letGo(lock *Lock) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.keys[lock.key] = nil
}

// giveKey returns a key that is gone and cannot come back.
func (l *Lease) giveKey(key string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.keys, key)
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
		l.config.logger.Warn("etcdutil: lease renewal is late", "lease", int64(l.id), "expiry", l.Expiry())
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
	if l.held.Err() != nil || l.renewals == l.max { // nor if one more was under way
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
	l.config.logger.Warn("etcdutil: lease renewal is refused", "lease", int64(l.id), "expiry", l.Expiry(), "error", err)
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
	if !l.finish(cause) {
		return
	}
	l.mu.Lock()
	l.expire.Stop()
	l.mu.Unlock()
	l.config.logger.Warn("etcdutil: lease lost", "lease", int64(l.id), "cause", cause)
}

// lost is why the lease no longer surely has its keys: it was lost or closed, or its time is over, even if the timer
// that is to say so is late. It is nil while the work may wind down after the parent's end.
func (l *Lease) lost() error {
	if !time.Now().Before(l.Expiry()) {
		l.expired()
	}
	return context.Cause(l.held)
}

// keepAlive renews the leases of one client over one stream. clientv3 has such a stream, but does not tell when a renewal
// was sent; its KeepAliveOnce spins while the server is unavailable.
//
// Its goroutine is started by the first renewal that is due and ended by the last lease to leave.
type keepAlive struct {
	client  *clientv3.Client
	members int // guarded by keepAlives
	ctx     context.Context
	end     context.CancelFunc
	done    chan struct{}
	wake    chan struct{} // due has grown

	// mu is never held while sending or receiving.
	mu      sync.Mutex
	due     []*Lease  // to be sent
	pending []renewal // sent and unanswered, in the order of their answers
	heard   time.Time // when the stream was opened or last gave an answer
	member  string    // at the other end of it
	stuck   string    // the member that last owed an answer for too long, until there is one
	reopen  context.CancelFunc

	fruitless int // times that the stream was reopened since the last answer
}

// A renewal is one request to renew.
type renewal struct {
	lease *Lease
	sent  time.Time
}

// keepAlives has the stream of each client that has leases to renew. It guards who is a member of which.
var keepAlives = struct {
	sync.Mutex
	of map[*clientv3.Client]*keepAlive
}{of: make(map[*clientv3.Client]*keepAlive)}

// join makes the lease a member of its client's stream; nil if its context has ended.
func (l *Lease) join() *keepAlive {
	keepAlives.Lock()
	defer keepAlives.Unlock()
	if l.left || l.Err() != nil {
		return nil
	}
	if l.stream == nil {
		l.stream = streamOf(l.config.client)
		l.stream.members++
	}
	return l.stream
}

func streamOf(client *clientv3.Client) *keepAlive {
	k := keepAlives.of[client]
	if k == nil {
		k = &keepAlive{client: client, done: make(chan struct{}), wake: make(chan struct{}, 1)}
		k.ctx, k.end = context.WithCancel(clientv3.WithRequireLeader(context.Background()))
		keepAlives.of[client] = k
		go k.run() // until the last member leaves
	}
	return k
}

// leave ends the membership. The last to leave ends the stream.
func (l *Lease) leave() {
	keepAlives.Lock()
	defer keepAlives.Unlock()
	if k := l.stream; k != nil && !l.left {
		if k.members--; k.members == 0 {
			delete(keepAlives.of, k.client)
			k.end()
		}
	}
	l.left = true
}

// awaitStream waits for the stream to end, if the last member has left it.
func (l *Lease) awaitStream() {
	keepAlives.Lock()
	k := l.stream
	keepAlives.Unlock()
	if k != nil && k.ctx.Err() != nil {
		<-k.done
	}
}

// request has the lease renewed. It reports whether an earlier renewal is unanswered: then this is no second one, but
// the stream is reopened if the member behind it seems stuck, to reach another.
func (k *keepAlive) request(l *Lease) (late bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if l.renewing {
		k.leaveIfStuck(l.patience() * 3 / 4) // the request has waited a little less than its lease
		return true
	}
	l.renewing = true
	k.due = append(k.due, l)
	select {
	case k.wake <- struct{}{}:
	default:
	}
	return false
}

// leaveIfStuck reopens the stream if its member has owed an answer for as long as patience. That is doubled each time
// without an answer, or a short lease could keep the others from answers that are slow to come.
func (k *keepAlive) leaveIfStuck(patience time.Duration) {
	patience <<= min(k.fruitless, 10)
	if len(k.pending) == 0 || time.Since(k.heard) < patience || time.Since(k.pending[0].sent) < patience {
		return
	}
	k.fruitless++
	k.stuck = k.member
	k.reopen()
}

func (k *keepAlive) run() {
	defer close(k.done)
	for failed := 0; k.awaitDue(); {
		if failed > 0 {
			sleep(k.ctx, k.pause(failed))
			k.client.ActiveConnection().ResetConnectBackoff()
		}
		if answered := k.serve(k.openingPatience(failed)); answered {
			failed = 0
		} else {
			failed++
		}
	}
}

// awaitDue waits until there is something to renew: a stream that breaks while idle is not missed. It reports false when
// the last member has left.
func (k *keepAlive) awaitDue() bool {
	for k.ctx.Err() == nil {
		if k.gather() {
			return true
		}
		select {
		case <-k.wake:
		case <-k.ctx.Done():
		}
	}
	return false
}

// gather readies what a stream that has ended leaves to the next: what it owed is due again, the most urgent first, and
// what has expired meanwhile is forgotten. It reports whether anything is due.
func (k *keepAlive) gather() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, r := range k.pending {
		k.due = append(k.due, r.lease)
	}
	k.pending = nil
	k.due = slices.DeleteFunc(k.due, (*Lease).forgoRenewal)
	expiry := make(map[*Lease]time.Time, len(k.due))
	for _, l := range k.due {
		expiry[l] = l.Expiry()
	}
	slices.SortFunc(k.due, func(a, b *Lease) int { return expiry[a].Compare(expiry[b]) })
	return len(k.due) > 0
}

// forgoRenewal reports whether the lease is not to be renewed any more. The server would let a whole stream wait for one
// lease that it is about to revoke.
func (l *Lease) forgoRenewal() bool {
	if l.Err() == nil && time.Now().Before(l.Expiry()) {
		return false
	}
	l.renewing = false
	return true
}

// pause is how long to wait before the stream is reopened. It backs off, but not so far that a fault which ends just
// before a lease does goes unnoticed: the next attempts come within a quarter of the time that is left.
func (k *keepAlive) pause(failed int) time.Duration {
	backoff := RetryPolicy{}.withDefaults().backoff(failed)
	return max(min(backoff, k.left()/8), time.Millisecond)
}

// left is the time until the first of the leases that are due expires. gather has sorted them.
func (k *keepAlive) left() time.Duration {
	k.mu.Lock()
	defer k.mu.Unlock()
	return time.Until(k.due[0].Expiry())
}

// openingPatience is how long to wait for a stream to open. That can block on a token, which clientv3 fetches anew for every
// stream: the member that is asked may be stuck, or just slow, for making tokens is meant to be. So the patience grows, as
// far as the time that is left allows another attempt.
func (k *keepAlive) openingPatience(failed int) time.Duration {
	return max(min(k.left()/2, 2*time.Second<<min(failed, 10)), time.Second)
}

// serve opens a stream and runs it until it fails. It reports whether the failure is no reason to back off.
func (k *keepAlive) serve(patience time.Duration) (answered bool) {
	ctx, cancel := context.WithCancel(k.ctx)
	defer cancel()
	opening := time.AfterFunc(patience, cancel)
	stream, err := k.open(ctx)
	opening.Stop()
	if err != nil {
		return false
	}
	k.opened(stream, cancel)
	sending := make(chan struct{})
	go func() { // until ctx ends
		defer close(sending)
		k.send(ctx, stream)
	}()
	answered = k.receive(stream)
	cancel()
	<-sending
	return answered
}

type keepAliveStream = etcdserverpb.Lease_LeaseKeepAliveClient

// open opens a stream to another member than the one that is stuck, if it can: gRPC takes them in turn. A stream that it
// does not take stays open, unused, until ctx ends.
func (k *keepAlive) open(ctx context.Context) (keepAliveStream, error) {
	remote, stuck := clientv3.RetryLeaseClient(k.client), k.stuckMember()
	stream, err := remote.LeaseKeepAlive(ctx)
	for others := 2 * len(k.client.Endpoints()); others > 0 && err == nil && stuck != "" && memberOf(stream) == stuck; others-- {
		stream, err = remote.LeaseKeepAlive(ctx)
	}
	return stream, err
}

// memberOf is the address at the other end of a stream.
func memberOf(stream keepAliveStream) string {
	p, ok := peer.FromContext(stream.Context())
	if !ok {
		return ""
	}
	return p.Addr.String()
}

func (k *keepAlive) stuckMember() string {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.stuck
}

func (k *keepAlive) opened(stream keepAliveStream, reopen context.CancelFunc) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.heard = time.Now()
	k.member = memberOf(stream)
	k.reopen = reopen
}

// send has a goroutine of its own, because flow control can block it.
func (k *keepAlive) send(ctx context.Context, stream keepAliveStream) {
	for ctx.Err() == nil {
		if l := k.next(); l == nil {
			select {
			case <-k.wake:
			case <-ctx.Done():
			}
		} else if stream.Send(&etcdserverpb.LeaseKeepAliveRequest{ID: int64(l.id)}) != nil {
			return // receive is told why
		}
	}
}

// next takes the next lease to renew, and notes the time: the answer will count from it.
func (k *keepAlive) next() *Lease {
	k.mu.Lock()
	defer k.mu.Unlock()
	for len(k.due) > 0 {
		l := k.due[0]
		k.due = k.due[1:]
		if !l.forgoRenewal() {
			k.pending = append(k.pending, renewal{l, time.Now()})
			return l
		}
	}
	return nil
}

// receive takes answers until the stream fails.
func (k *keepAlive) receive(stream keepAliveStream) (answered bool) {
	for {
		resp, err := stream.Recv()
		if err != nil {
			return k.refused(err) || answered
		}
		r, ok := k.answer(clientv3.LeaseID(resp.ID))
		if !ok {
			return false // out of order: no answer can be trusted to belong to its request
		}
		r.lease.renewed(r.sent, time.Duration(resp.TTL)*time.Second)
		answered = true
	}
}

// answer takes the renewal that an answer for id belongs to: the oldest, for the server answers in order.
func (k *keepAlive) answer(id clientv3.LeaseID) (renewal, bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if len(k.pending) == 0 || k.pending[0].lease.id != id {
		return renewal{}, false
	}
	k.heard, k.stuck, k.fruitless = time.Now(), "", 0
	return k.takeOldest(), true
}

func (k *keepAlive) takeOldest() renewal {
	r := k.pending[0]
	k.pending = k.pending[1:]
	r.lease.renewing = false
	return r
}

// refused charges a permanent refusal, which ends the stream, to the lease whose turn it was. It reports whether err was
// one.
func (k *keepAlive) refused(err error) bool {
	if failureOf(err).code != codes.PermissionDenied {
		return false
	}
	k.mu.Lock()
	if len(k.pending) == 0 {
		k.mu.Unlock()
		return false
	}
	r := k.takeOldest()
	k.mu.Unlock()
	r.lease.refused(rpctypes.Error(err))
	return true
}
