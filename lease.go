package etcdutil

import (
	"cmp"
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
	"google.golang.org/grpc/codes"
)

// Lease is a lease that is kept alive. [NewLease] makes it: attach keys to its [Lease.ID], run
// under it as a context, and call Close. The zero Lease is not usable. It has no goroutine of its
// own.
//
// Its context ends before the server can expire the lease: at the send time of the last
// acknowledged renewal, plus TTL, minus a margin. That time is [Lease.Expiry]: the method Deadline
// returns that of the parent. Err returns only context.Canceled or context.DeadlineExceeded.
// [context.Cause] returns why the lease ended:
//   - [ErrClosed] after Close.
//   - [ErrLeaseExpired] if it was not renewed in time. It wraps what the last renewal failed with.
//   - [ErrLeaseRevoked] if the server no longer has the lease. The next renewal notices that.
//   - The parent's cause.
//
// All methods are safe for concurrent use.
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

	lateUntil time.Time // until when a request may arrive that grants the lease again

	renewal renewal  // its place in the renewal stream
	slots   keySlots // the keys that its locks use
	locks   lockSet  // end with it
	sweep   *cleanup // removes keys that no lock uses

	mu       sync.Mutex // guards what follows
	expiry   time.Time
	renewals int
	late     bool        // a renewal is late, and that has been logged
	denial   error       // why the server refused to renew the lease, if it did the last time
	renew    *time.Timer // nil if it is renewed no longer
	expire   *time.Timer

	roundTrip time.Duration // of the last renewal
}

const unlimited = -1

// maxLeaseTTL is etcd's own bound.
const maxLeaseTTL = 9_000_000_000 * time.Second

// A LeaseOption shapes a lease. It is a LockOption too: it shapes the lock's own lease, and cannot
// be combined with WithLease.
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

// WithKeepAliveInterval sets the time from one renewal to the next. It must be positive and less
// than the requested TTL, rounded up to seconds. The default is a third of the granted TTL, or half
// of what a large margin leaves of it. A lease whose interval is longer than TTL minus margin
// expires before it is renewed.
func WithKeepAliveInterval(d time.Duration) RenewalOption {
	return renewalOption{func(c *leaseConfig) { c.interval = &d }}
}

// WithMaxKeepAlives limits how often the lease is renewed. After n renewals it expires, with
// [ErrLeaseExpired]. 0 means that it is never renewed. n must not be negative. The default is no
// limit.
func WithMaxKeepAlives(n int) LeaseOption {
	return leaseOption(func(c *leaseConfig) { c.max = &n })
}

// WithExpiryMargin sets how long before the server can expire the lease its context ends. It must
// be at least 0 and less than the requested TTL, rounded up to seconds. The default is a tenth of
// the granted TTL. The margin is the time that work has to stop in. It must cover the drift between
// the clocks of client and server during one TTL.
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
		return errorf("WithExpiryMargin must be at least 0 and less than the TTL of %v: %v", whole, *c.margin)
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
// ctx is the lease's parent, as in context.WithCancel. When it ends, the lease's context ends and
// the lease is no longer renewed, but the server keeps it until Close, or until its TTL has passed.
// ttl must be positive, and at most etcd's own limit of 9,000,000,000 s. It is rounded up to
// seconds, and the server may grant more: etcd grants 2 s at least by default.
//
// The request is retried as [RetryPolicy] says. On failure, any lease it created is revoked in the
// background, or expires. A client from clientv3.NewCtxClient has no connection and is refused. A
// nil ctx or client panics.
//
// Errors:
//   - An error that names the argument if ttl or an option is refused.
//   - What etcd answered, or why there was no connection.
//   - ctx's end.
//   - [ErrLeaseExpired] if the lease was granted, but its time was over when the answer came.
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
	if g.late {
		l.lateUntil = time.Now().Add(lateWindow)
	}
	l.renewal.lease = l
	l.init(parent)
	l.sweep = &cleanup{
		ctx: l.stopCtx, config: &l.config, what: "remove unused keys of lease " + hexID(l.id),
		remove: l.sweepKeys, over: func() bool { return l.stopCtx.Err() != nil },
	}
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
	late  bool // an earlier request for it may still arrive, and grant it again once it is revoked
}

// grantLease chooses the lease's ID itself, so that a repeated request leaves no second lease. It
// goes below clientv3.Lease, which cannot choose.
func grantLease(ctx context.Context, c *config, seconds int64) (grant, error) {
	r := grantRequest{config: c, seconds: seconds, remote: clientv3.RetryLeaseClient(c.client)}
	r.chooseID()
	g, err := retry(ctx, c, c.retry, "grant lease", r.send)
	if inDoubt, repeatFor := r.doubt(); err != nil && inDoubt {
		revokeInBackground(ctx, c, r.id, r.ttl(), repeatFor)
	}
	return g, err
}

// A grantRequest is sent until it is answered.
type grantRequest struct {
	config  *config
	remote  etcdserverpb.LeaseClient
	seconds int64

	id    clientv3.LeaseID
	since time.Time // just before it was first sent with this ID

	mu        sync.Mutex    // for gRPC, which calls observe
	inDoubt   bool          // the server may have granted a lease with this ID
	repeatFor time.Duration // how long the request may still arrive
}

func (r *grantRequest) chooseID() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.id, r.since = clientv3.LeaseID(rand.Int64N(math.MaxInt64)+1), time.Now()
	r.inDoubt, r.repeatFor = false, 0
}

func (r *grantRequest) ttl() time.Duration { return time.Duration(r.seconds) * time.Second }

// observe notes what a sending leaves open. clientv3 may send a request several times by itself.
func (r *grantRequest) observe(err error) {
	if err != nil && !IsAmbiguous(err) {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.inDoubt = true // also after a grant: what reads the answer may still fail, and ask again
	if err == nil {
		return
	}
	// After ErrNoSpace etcd may have applied the grant, but does not do so later.
	if !errors.Is(rpctypes.Error(err), rpctypes.ErrNoSpace) {
		r.repeatFor = min(r.ttl(), lateWindow)
	}
}

// doubt returns whether the server may have granted a lease with this ID, and how long it still
// may.
func (r *grantRequest) doubt() (inDoubt bool, repeatFor time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.inDoubt, r.repeatFor
}

func (r *grantRequest) send(ctx context.Context) (grant, error) {
	for {
		sent := time.Now()
		if inDoubt, _ := r.doubt(); !inDoubt {
			r.since = sent
		}
		resp, err := r.remote.LeaseGrant(ctx, &etcdserverpb.LeaseGrantRequest{TTL: r.seconds, ID: int64(r.id)},
			grpc.WaitForReady(true), grpc.OnFinish(r.observe))
		if err == nil {
			_, repeatFor := r.doubt()
			g := grant{r.id, time.Duration(resp.TTL) * time.Second, r.since, repeatFor > 0}
			if r.since == sent || time.Since(r.since) < g.ttl/2 {
				return g, nil
			}
			err = rpctypes.ErrLeaseExist // too much of its time has passed since an earlier attempt
		}
		err = rpctypes.Error(err)
		r.observe(err)
		if !errors.Is(err, rpctypes.ErrLeaseExist) {
			return grant{}, err
		}
		// The lease is ours, from an attempt that was not answered. Begin again, under another ID.
		if _, repeatFor := r.doubt(); revokeLease(ctx, r.config, r.id) != nil || repeatFor > 0 {
			revokeInBackground(ctx, r.config, r.id, r.ttl(), repeatFor)
		}
		r.chooseID()
	}
}

// revokeLease returns nil if the server has no such lease: another attempt may have revoked it.
func revokeLease(ctx context.Context, c *config, id clientv3.LeaseID) error {
	if _, err := c.client.Revoke(ctx, id); err != nil && !errors.Is(err, rpctypes.ErrLeaseNotFound) {
		return err
	}
	return nil
}

// ID returns the lease's ID, which NewLease has chosen at random.
func (l *Lease) ID() clientv3.LeaseID { return l.id }

// TTL returns the time to live that the server has granted, in whole seconds.
func (l *Lease) TTL() time.Duration { return l.ttl }

// Expiry returns when the context ends unless the lease is renewed before: the send time of the
// last acknowledged renewal, plus TTL, minus the margin. For a new lease it counts from just before
// the first attempt to grant it. It moves with every renewal, so it is not the context's Deadline.
func (l *Lease) Expiry() time.Time {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.expiry
}

// Alive asks the server whether it has the lease. It is a request, which ctx and [RetryPolicy]
// bound. It changes nothing, and works also when the lease's context has ended. It returns false
// without an error only if the server has no such lease. Its errors are ctx's end, and what etcd
// answered last.
func (l *Lease) Alive(ctx context.Context) (bool, error) {
	resp, err := retry(ctx, &l.config, l.config.retry, "ask for lease "+hexID(l.id), func(ctx context.Context) (*clientv3.LeaseTimeToLiveResponse, error) {
		return l.config.client.TimeToLive(ctx, l.id)
	})
	if err != nil {
		return false, errorf("ask for lease %x: %w", int64(l.id), err)
	}
	return resp.TTL >= 0, nil
}

// Close cancels the context with [ErrClosed] and revokes the lease: when it returns nil, the
// lease's keys are gone. One request releases all locks on the lease. Their contexts end with
// [ErrLockLost], which wraps ErrClosed.
//
// Close takes no longer than the lease has left, and 5 s at most. It works also after the parent's
// end. Further calls return what the first did.
//
// Errors:
//   - The cause, if the lease was lost before.
//   - [ErrUnknownOutcome] if etcd did not confirm. The error says by when the server will have
//     expired the lease, which is no longer renewed.
func (l *Lease) Close() error {
	l.closing.Do(func() {
		l.closeErr = l.release()
		l.config.reporter.flush()
	})
	return l.closeErr
}

func (l *Lease) release() error {
	lost := l.stopCause()
	if !l.shutdown(ErrClosed) {
		lost = context.Cause(l.stopCtx) // it may have been lost just now
	}
	l.stopTimers()
	l.renewal.awaitStream()
	if lost != nil {
		return lost
	}
	policy := releasePolicy(time.Until(l.Expiry()))
	_, err := retry(context.WithoutCancel(l.ctx), &l.config, policy, "revoke lease "+hexID(l.id), func(ctx context.Context) (struct{}, error) {
		return struct{}{}, revokeLease(ctx, &l.config, l.id)
	})
	if err != nil || l.revokeFor() > 0 {
		revokeInBackground(l.ctx, &l.config, l.id, l.ttl, l.revokeFor())
	}
	if err == nil {
		return nil
	}
	return errorf("%w: lease %x is not confirmed revoked; it will have expired by %s: %w",
		ErrUnknownOutcome, int64(l.id), l.serverExpiry(), err)
}

// discard closes a lease that no lock needs any more, and revokes it in the background.
func (l *Lease) discard() {
	l.shutdown(ErrClosed)
	l.stopTimers()
	l.renewal.awaitStream()
	revokeInBackground(l.ctx, &l.config, l.id, l.ttl, l.revokeFor())
}

// revokeFor returns how long a request may still arrive that grants the lease again.
func (l *Lease) revokeFor() time.Duration { return max(time.Until(l.lateUntil), 0) }

// serverExpiry returns when a lease that is renewed no longer will have expired on the server, in
// whole seconds. A new leader grants each lease its TTL anew, and an election timeout.
func (l *Lease) serverExpiry() string {
	return time.Now().Add(l.ttl + electionTimeout + time.Second).Format(time.RFC3339)
}

// electionTimeout is etcd's default.
const electionTimeout = time.Second

// reserveKey returns a key for a lock of this name that no other lock on this lease has. client is
// the lock's: if it is not the lease's, it may see other keys, in a namespace.
func (l *Lease) reserveKey(name string, client *clientv3.Client) string {
	return l.slots.reserve(name, l.id, client == l.config.client)
}

// freeKey allows a key that is gone and cannot come back to be reserved again.
func (l *Lease) freeKey(key string) { l.slots.free(key) }

// discardKey takes a key over from a lock that has ended. The key may be in etcd or, if late, may
// still be written. It is removed in the background, and then it is free. discardKey waits for that
// only as long as it takes when etcd can be reached.
func (l *Lease) discardKey(key string, late bool, remove func(ctx context.Context) error) {
	l.slots.discard(key, late, remove)
	l.sweep.runInBackground()
}

// sweepKeys removes the keys on the lease that no lock uses: those that were discarded, and those
// that a lost request or a restored backup has brought back. It returns when to do so again. A key
// that etcd refuses to delete does not keep the others.
func (l *Lease) sweepKeys(ctx context.Context) (again time.Duration, err error) {
	began := time.Now()
	refused := make(map[string]error)
	if err := l.slots.removeDiscarded(ctx, refused); err != nil {
		return 0, err
	}
	if l.slots.mustList() {
		resp, err := l.config.client.TimeToLive(ctx, l.id, clientv3.WithAttachedKeys())
		switch {
		case statusOf(err).code == codes.PermissionDenied: // for what others have attached
			l.slots.setDenied(true)
		case err != nil:
			return 0, err
		case resp.TTL < 0:
			l.markLost(ErrLeaseRevoked)
			return 0, nil
		default:
			l.slots.setDenied(false)
			if err := removeKeys(ctx, l.config.client, l.id, l.slots.claimUnused(resp.Keys, l.id), refused); err != nil {
				return 0, err
			}
		}
	}
	again = l.slots.settle(began, refused)
	for _, err := range refused {
		return 0, err
	}
	return again, nil
}

// check asks etcd in the background for the lease and its keys: a key of its locks is gone.
func (l *Lease) check() {
	l.slots.requestList()
	l.sweep.schedule()
}

// addLock has the lock end with the lease, until removeLock: it stops before the lease's own
// context is canceled, and its context ends with the lease's.
func (l *Lease) addLock(lock *Lock) {
	first, ended := l.locks.add(lock)
	if first {
		context.AfterFunc(l.ctx, l.endLocks)
	}
	if ended {
		lock.handleLeaseEnd()
	}
}

func (l *Lease) endLocks() {
	for _, lock := range l.locks.end() {
		lock.handleLeaseEnd()
	}
}

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
		l.renew = nil
	}
	l.mu.Unlock()
	l.renewal.detach()
}

// scheduleRenewal runs when it is time to renew, and again while no answer has come.
func (l *Lease) scheduleRenewal() {
	timeout := l.answerTimeout()
	l.mu.Lock()
	l.renewAfter(timeout)
	l.mu.Unlock()
	// The request has waited a little less than its lease.
	if late := l.renewal.schedule(timeout * 3 / 4); late {
		l.markLate()
	}
}

// answerTimeout returns when an answer is late. Then the stream may have to reopen on another
// member, and that more than once, before the lease expires. Where answers are always slow they are
// late after twice the usual time, if that leaves time for a second attempt.
func (l *Lease) answerTimeout() time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	left := time.Until(l.expiry)
	usual := max(2*l.roundTrip, minAnswerTimeout)
	return max(left/4, min(usual, left/2), minAnswerTimeout/10)
}

const minAnswerTimeout = 500 * time.Millisecond

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
	l.config.reporter.leaseRenewed(LeaseEvent{Lease: l.id, Took: time.Since(sentAt), Left: time.Until(l.Expiry())})
	if !l.extend(sentAt, ttl) {
		l.stopRenewing()
	}
	if l.slots.mayHaveUnused() {
		l.sweep.schedule()
	}
}

// extend reports whether the lease is to be renewed again.
func (l *Lease) extend(sentAt time.Time, ttl time.Duration) (again bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.stopCtx.Err() != nil || l.renewals == l.max { // nor if one more was under way
		return false
	}
	l.late, l.denial = false, nil
	l.roundTrip = time.Since(sentAt)
	l.renewals++
	if expiry := sentAt.Add(ttl - l.margin); expiry.After(l.expiry) {
		l.expiry = expiry
		l.expire.Reset(time.Until(expiry))
	}
	if l.renewals == l.max || l.ctx.Err() != nil {
		return false
	}
	l.renewAfter(time.Until(sentAt.Add(l.interval)))
	return true
}

// renewAfter has the lease renewed after d, unless it is renewed no longer: the timer may fire
// while it is stopped. l.mu is held.
func (l *Lease) renewAfter(d time.Duration) {
	if l.renew != nil {
		l.renew.Reset(d)
	}
}

// handleDenied takes the server's refusal to renew the lease, for the nth time in a row.
// Permissions come back: the lease is renewed again after a pause, until it expires.
func (l *Lease) handleDenied(err error, n int) {
	l.mu.Lock()
	l.denial = err
	expiry := l.expiry
	pause := max(min(firstDenialPause<<min(n-1, 20), time.Until(expiry)/4), firstDenialPause)
	l.renewAfter(pause)
	l.mu.Unlock()
	if n == 1 {
		l.config.reporter.renewalDenied(l.id, expiry, err)
	}
}

const firstDenialPause = 100 * time.Millisecond

func (l *Lease) handleExpiry() {
	l.mu.Lock()
	left, denial := time.Until(l.expiry), l.denial
	if left > 0 { // renewed while this timer fired
		l.expire.Reset(left)
	}
	l.mu.Unlock()
	if left > 0 {
		return
	}
	if why := cmp.Or(denial, l.renewal.failure()); why != nil {
		l.markLost(errorf("%w: %w", ErrLeaseExpired, renewalError{why}))
		return
	}
	l.markLost(ErrLeaseExpired)
}

// A renewalError is what a renewal failed with. errors.Is recognizes it, but not as the end of a
// context. Nothing unwraps it: an error that wraps a lost lease is about another request, and
// [IsTransient] and [IsAmbiguous] report on that one.
type renewalError struct{ error }

func (e renewalError) Is(target error) bool {
	return !isContextError(target) && errors.Is(e.error, target)
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

// keySlots hands out the keys of a lease's locks. A key is free, in use by a lock, or discarded:
// the lock has ended, but the key may be in etcd.
type keySlots struct {
	mu      sync.Mutex
	slots   map[string]*keySlot // those that are not free
	count   int64               // of all reservations
	foreign bool                // a lock of another client uses some, which a list may show otherwise
	denied  bool                // the keys on the lease could not be listed the last time
	list    bool                // the keys on the lease are to be listed
	pause   time.Duration       // until the next sweep
}

// A keySlot is in use by a lock if it has no remove.
type keySlot struct {
	remove  func(ctx context.Context) error // deletes the discarded key, if it is there
	removed bool                            // once
	late    bool                            // a request for the key may still arrive
	until   time.Time                       // by when that has arrived
}

// slotInUse is the slot of every key that is in use.
var slotInUse keySlot

// reserve returns a key that is free.
func (s *keySlots) reserve(name string, id clientv3.LeaseID, ownClient bool) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.slots == nil {
		s.slots = make(map[string]*keySlot)
	}
	s.foreign = s.foreign || !ownClient
	s.count++
	key := slotKey(name, id, s.count%keysPerName)
	if s.slots[key] != nil || s.foreign { // another client's namespace may make two keys one
		key = slotKey(name, id, s.count+keysPerName) // which was never used before
	}
	s.slots[key] = &slotInUse
	return key
}

func (s *keySlots) free(key string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.slots, key)
}

// discard marks a key that a lock no longer uses. It is free when it has been removed and, if it
// may be written late, lateWindow has passed.
func (s *keySlots) discard(key string, late bool, remove func(ctx context.Context) error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.slots[key] = &keySlot{remove: remove, late: late}
	s.pause = defaultInitial
	if late {
		s.list = true
	}
}

// removeDiscarded removes each discarded key once. Later a list shows whether it is back, if there
// can be one. It adds to refused the keys that etcd refuses to delete.
func (s *keySlots) removeDiscarded(ctx context.Context, refused map[string]error) error {
	for key, slot := range s.toRemove() {
		failed := slot.remove(ctx)
		if isContextError(failed) || IsTransient(failed) { // the others would fare no better
			s.setLate(slot)
			return failed
		}
		if failed != nil {
			if refused[key] = failed; len(refused) >= maxRefused {
				return failed
			}
			continue
		}
		s.setRemoved(key, slot)
	}
	return nil
}

func (s *keySlots) toRemove() map[string]*keySlot {
	s.mu.Lock()
	defer s.mu.Unlock()
	slots := make(map[string]*keySlot)
	for key, slot := range s.slots {
		if slot.remove != nil && (!slot.removed || s.foreign || s.denied) {
			slots[key] = slot
		}
	}
	return slots
}

func (s *keySlots) setLate(slot *keySlot) {
	s.mu.Lock()
	defer s.mu.Unlock()
	slot.late, s.list = true, true
}

// setRemoved frees a key that was removed, or waits for what may arrive late.
func (s *keySlots) setRemoved(key string, slot *keySlot) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case !slot.late:
		delete(s.slots, key)
	case slot.until.IsZero():
		slot.until = time.Now().Add(lateWindow)
	}
	slot.removed = true
}

// setDenied notes whether the keys could be listed. If not, each sweep removes the discarded ones.
func (s *keySlots) setDenied(denied bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.denied = denied
}

// mayHaveUnused reports, at a renewal, whether the lease may have keys that no lock uses. Once a
// lock has ended it may: a request that was sent twice may arrive at any time, and a backup may be
// restored.
func (s *keySlots) mayHaveUnused() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.list = s.list || s.count > int64(len(s.slots))
	return s.list
}

// requestList has the next sweep ask for the lease and its keys.
func (s *keySlots) requestList() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.list = true
}

func (s *keySlots) mustList() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.list && !s.foreign
}

// claimUnused returns those of the attached keys that no lock uses. None can reserve them before
// they are settled.
func (s *keySlots) claimUnused(attached [][]byte, id clientv3.LeaseID) []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var unused []string
	for _, raw := range attached {
		key := string(raw)
		slot := s.slots[key]
		switch {
		case slot != nil && slot.remove == nil:
			continue
		case slot == nil && !s.handedOut(key, id):
			continue
		case slot == nil:
			s.slots[key] = &keySlot{remove: nothingToRemove, removed: true}
		}
		unused = append(unused, key)
	}
	return unused
}

func nothingToRemove(context.Context) error { return nil }

// handedOut reports whether the lease may have handed out such a key.
func (s *keySlots) handedOut(key string, id clientv3.LeaseID) bool {
	suffix := "/" + hexID(id) + "-"
	i := strings.LastIndex(key, suffix)
	if i < 0 {
		return false
	}
	nonce, err := strconv.ParseInt(key[i+len(suffix):], 16, 64)
	return err == nil && nonce <= s.count+keysPerName && key == slotKey(key[:i], id, nonce)
}

// settle frees the discarded keys if the sweep began when everything had arrived that wrote them,
// except those that etcd refused to delete. It returns when to sweep again for the others.
func (s *keySlots) settle(began time.Time, refused map[string]error) (again time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for key, slot := range s.slots {
		switch {
		case slot.remove == nil:
		case slot.removed && slot.until.Before(began) && refused[key] == nil:
			delete(s.slots, key)
		default:
			again = s.pause
		}
	}
	s.list = again > 0
	s.pause = min(2*max(s.pause, defaultInitial), lateWindow/10)
	return again
}

func (s *keySlots) len() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.slots)
}

// slotKey returns the key of a lock: the nonce makes it unique among the locks of a lease.
func slotKey(name string, id clientv3.LeaseID, nonce int64) string {
	return prefix(name) + hexID(id) + "-" + strconv.FormatInt(nonce, 16)
}

// lockSet has the locks of a lease. They stop before it: the context of one may be a child of the
// lease's.
type lockSet struct {
	mu    sync.Mutex
	locks map[*Lock]struct{} // nil before the first
	ended bool
}

// add reports whether it is the first lock ever, and whether the lease has ended.
func (s *lockSet) add(lock *Lock) (first, ended bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if first = s.locks == nil; first {
		s.locks = make(map[*Lock]struct{})
	}
	s.locks[lock] = struct{}{}
	return first, s.ended
}

// end returns all locks. Those that are added later are added to a lease that has ended.
func (s *lockSet) end() []*Lock {
	s.mu.Lock()
	s.ended = true
	s.mu.Unlock()
	return s.all()
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
