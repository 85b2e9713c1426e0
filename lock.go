package etcdutil

import (
	"context"
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// DefaultTTL is the TTL of the own lease of a lock or registration without [WithTTL].
const DefaultTTL = 10 * time.Second

// Lock is a lock that is held. [Acquire] and [TryAcquire] make it. End it with Close, also after it
// is lost. The zero Lock is not usable.
//
// It is a context.Context: Done is closed when the lock is no longer surely held. That is before
// anybody else can hold it, unless somebody deletes or overwrites the lock's key or revokes its
// lease, etcd is restored from a backup, or the clocks drift by more than the margin. An
// overwritten key need not end the context. [Lock.Commit] notices it. Err returns only
// context.Canceled or context.DeadlineExceeded. context.Cause returns why the lock ended:
//   - [ErrLockLost] if it was lost. It wraps the cause if that is known: [ErrLeaseExpired],
//     [ErrLeaseRevoked] or, if a shared lease was closed, [ErrClosed].
//   - [ErrClosed] after Close.
//   - The parent's cause. The lock is not released then.
//
// The method Deadline returns that of the parent: [Lease.Expiry] is when the lock's context ends
// unless its lease is renewed. The method Value is the context's, and does not return what
// [WithValue] has set.
//
// Nobody but the lock may write its key: a key that was overwritten may have lost its lease, and
// with it its place in the queue. All methods are safe for concurrent use.
type Lock struct {
	lifetime
	config config
	lease  *Lease
	shared bool // the lease is not the lock's own
	queue  contender
	fence  fence
	outer  *scope // the locks that its parent runs under

	heldSince atomic.Pointer[time.Time] // nil while it was never held
	endLogged atomic.Bool

	closing  sync.Once
	closeErr error

	mu         sync.Mutex              // guards what follows
	acquiring  context.CancelCauseFunc // ends the acquisition; nil when it is over
	watchTimer *time.Timer             // starts watchKey; nil once it has
	unwatch    func()                  // ends the watch on the key; nil if there is none
}

// A LockOption shapes a lock. See the table of options in the package's documentation.
type LockOption interface{ applyLock(*lockConfig) }

type lockConfig struct {
	leaseConfig
	ttl     *time.Duration
	lease   *Lease
	shared  bool
	value   string
	timeout *time.Duration
}

type lockOption func(*lockConfig)

func (o lockOption) applyLock(c *lockConfig) { o(c) }

// WithTTL sets the TTL of the own lease of a lock or registration. The default is [DefaultTTL]. It
// must be positive, and at most etcd's own limit of 9,000,000,000 s. It is rounded up to seconds.
// It cannot be combined with [WithLease].
func WithTTL(ttl time.Duration) TTLOption { return ttlOption(ttl) }

// A TTLOption shapes a lock or a registration.
type TTLOption interface {
	LockOption
	RegisterOption
}

type ttlOption time.Duration

func (o ttlOption) applyLock(c *lockConfig) { c.ttl = (*time.Duration)(&o) }
func (o ttlOption) applyRegister(c *registerConfig) {
	c.ttl = (*time.Duration)(&o)
}

// WithLease makes the lock use this lease, which any number of locks may share. Two locks of one
// name on one lease exclude each other like any others.
//
// Closing the lock leaves the lease alive. Losing the lease loses the lock, and so does closing it:
// then the cause is ErrLockLost wrapping ErrClosed. A lock that is not closed blocks others for as
// long as the lease lives, also after the lock's parent has ended.
//
// WithLease refuses a lease that is nil or has ended. It cannot be combined with an option about
// the lock's own lease.
func WithLease(lease *Lease) LockOption {
	return lockOption(func(c *lockConfig) { c.lease, c.shared = lease, true })
}

// WithValue sets the value of the lock's key, for example who holds it. The default is "". [Holder]
// and concurrency.Election.Leader read it. The method Value of [Lock] does not return it: that is
// the context's.
func WithValue(v string) LockOption {
	return lockOption(func(c *lockConfig) { c.value = v })
}

// WithAcquireTimeout bounds the time until the lock is held, and nothing after that. When it has
// passed, Acquire gives up with context.DeadlineExceeded. d must be positive. By default only ctx
// bounds the wait.
func WithAcquireTimeout(d time.Duration) LockOption {
	return lockOption(func(c *lockConfig) { c.timeout = &d })
}

func newLockConfig(ctx context.Context, client *clientv3.Client, name string, opts []LockOption) (*lockConfig, error) {
	if err := requireClient(ctx, client); err != nil {
		return nil, err
	}
	c := &lockConfig{leaseConfig: leaseConfig{config: newConfig(client)}}
	for _, o := range opts {
		o.applyLock(c)
	}
	c.finish()
	if err := validateName(name); err != nil {
		return nil, err
	}
	if err := c.validate(); err != nil {
		return nil, err
	}
	return c, c.checkNesting(ctx, name)
}

func validateName(name string) error {
	switch {
	case name == "":
		return errorf("%w: name is empty", ErrInvalidName)
	case len(name) > 512:
		return errorf("%w: name has %d bytes, over 512", ErrInvalidName, len(name))
	case !utf8.ValidString(name):
		return errorf("%w: name is not valid UTF-8: %q", ErrInvalidName, name)
	case strings.ContainsRune(name, 0):
		return errorf("%w: name holds a NUL: %q", ErrInvalidName, name)
	}
	return nil
}

func (c *lockConfig) validate() error {
	if c.timeout != nil && *c.timeout <= 0 {
		return errorf("WithAcquireTimeout must be positive: %v", *c.timeout)
	}
	if c.shared {
		return c.validateShared()
	}
	if ttl := or(c.ttl, DefaultTTL); ttl <= 0 || ttl > maxLeaseTTL {
		return errorf("WithTTL must be positive and at most %v: %v", maxLeaseTTL, ttl)
	}
	return c.leaseConfig.validate(or(c.ttl, DefaultTTL))
}

func (c *lockConfig) validateShared() error {
	if c.ttl != nil {
		return errorf("WithTTL cannot be combined with WithLease")
	}
	if given := c.given(); given != "" {
		return errorf("%s cannot be combined with WithLease", given)
	}
	if c.lease == nil {
		return errorf("WithLease: the lease is nil")
	}
	if stopped := c.lease.stopCause(); stopped != nil {
		return errorf("WithLease: the lease has ended: %w", stopped)
	}
	if c.lease.Err() != nil {
		return errorf("WithLease: the lease has ended: %w", contextError(c.lease))
	}
	return c.retry.validate()
}

// checkNesting refuses to wait for a lock that ctx runs under.
func (c *lockConfig) checkNesting(ctx context.Context, name string) error {
	if scopeOf(ctx).holds(c.client, name) {
		return errorf("acquire %q: %w: ctx runs under it", name, ErrLockHeld)
	}
	return nil
}

// bound returns ctx with the acquire timeout, counted from start.
func (c *lockConfig) bound(ctx context.Context, start time.Time) (context.Context, context.CancelFunc) {
	if c.timeout == nil {
		return ctx, func() {}
	}
	return context.WithDeadline(ctx, start.Add(*c.timeout))
}

// Acquire waits its turn (first come, first served) and returns a lock that is held.
//
// ctx is the lock's parent, not a timeout for the call. A lock whose parent has ended is over, but
// blocks others until Close, or until its lease expires:
//
//	ctx, cancel := context.WithTimeout(ctx, time.Second)
//	defer cancel()
//	lock, err := etcdutil.Acquire(ctx, client, name) // wrong: cancel ends the lock
//
//	bound := etcdutil.WithAcquireTimeout(time.Second)
//	lock, err := etcdutil.Acquire(ctx, client, name, bound) // right
//
// If ctx ends before the lock is held, Acquire returns within 100 ms, even if etcd cannot be
// reached. The requests that queue up and wait are retried until the lock's lease expires, the
// grant of that lease as [RetryPolicy] says. On failure Acquire removes its key and its lease, in
// the background if etcd cannot be reached. In any case they end with the lease.
//
// A nil ctx or client panics.
//
// Errors:
//   - [ErrInvalidName] if name is not allowed, or an error that names the option that is refused.
//   - [ErrLockHeld] if ctx runs under a lock of this name and client: Acquire would wait for
//     itself.
//   - [ErrLockLost] if the key or the lease was lost while waiting. It wraps the cause if that is
//     known.
//   - [ErrLeaseExpired] if the lock's lease was granted too late to be used.
//   - ctx's end, or context.DeadlineExceeded after [WithAcquireTimeout].
//   - What etcd answered.
func Acquire(ctx context.Context, client *clientv3.Client, name string, opts ...LockOption) (*Lock, error) {
	c, err := newLockConfig(ctx, client, name, opts)
	if err != nil {
		return nil, err
	}
	return acquire(ctx, c, name, time.Now(), (*contender).waitTurn)
}

// TryAcquire returns a lock that is held, or [ErrLockHeld] at once if somebody holds it or waits
// for it. Then nothing was written, and nobody was made to wait. The rest is as for [Acquire]: ctx
// is the lock's parent. A nil ctx or client panics.
//
// TryAcquire queues up for a moment if keys below name/ are created faster than it can look and
// write.
//
// Errors:
//   - [ErrLockHeld] if somebody holds the lock or waits for it, or if ctx runs under it.
//   - Otherwise those of Acquire.
func TryAcquire(ctx context.Context, client *clientv3.Client, name string, opts ...LockOption) (*Lock, error) {
	c, err := newLockConfig(ctx, client, name, opts)
	if err != nil {
		return nil, err
	}
	start := time.Now()
	bound, cancel := c.bound(ctx, start)
	defer cancel()
	seen, err := checkFree(bound, &c.config, c.retry, name)
	if err != nil {
		return nil, errorf("acquire %q: %w", name, err)
	}
	return acquire(ctx, c, name, start, func(q *contender, ctx context.Context) error { return q.tryClaim(ctx, seen) })
}

// Do acquires the lock, runs fn under its context, waits for fn, and releases, also if fn panics. A
// nil ctx, client or fn panics.
//
// Errors:
//   - Those of [Acquire]; then fn was not run.
//   - [ErrLockLost] if the lock was lost before fn returned. It also wraps fn's error.
//   - fn's error.
//   - [ErrUnknownOutcome] if the release could not be confirmed. What fn did was done under the
//     lock, and the next holder may have to wait until the lease expires. It also wraps fn's error.
func Do(ctx context.Context, client *clientv3.Client, name string, fn func(ctx context.Context) error, opts ...LockOption) (err error) {
	if fn == nil {
		panic("etcdutil: nil fn")
	}
	lock, err := Acquire(ctx, client, name, opts...)
	if err != nil {
		return err
	}
	defer func() {
		if closeErr := lock.Close(); closeErr != nil && !errors.Is(err, closeErr) {
			err = errors.Join(err, closeErr)
		}
	}()
	return lock.Do(ctx, fn)
}

// scope is the locks that a context runs under, the innermost first.
type scope struct {
	lock  *Lock
	outer *scope
}

type scopeKey struct{}

func scopeOf(ctx context.Context) *scope {
	s, _ := ctx.Value(scopeKey{}).(*scope)
	return s
}

// enter returns a context that runs under the lock.
func (l *Lock) enter(ctx context.Context) context.Context {
	return context.WithValue(ctx, scopeKey{}, &scope{l, scopeOf(ctx)})
}

// holds reports whether one of the locks has this name and is still held. It looks at each scope
// once: the scope around a lock's is most often the one that its parent has as well.
func (s *scope) holds(client *clientv3.Client, name string) bool {
	if s == nil {
		return false
	}
	seen := map[*scope]bool{nil: true}
	for todo := []*scope{s}; len(todo) > 0; {
		s, todo = todo[len(todo)-1], todo[:len(todo)-1]
		if seen[s] {
			continue
		}
		seen[s] = true
		l := s.lock
		if l.queue.name == name && l.config.client == client && l.stopCause() == nil {
			return true
		}
		todo = append(todo, l.outer, s.outer)
	}
	return false
}

// LockFrom returns the lock that ctx runs under, for code that must fence its writes but does not
// get the lock passed. If locks are nested, it returns the innermost one. That lock may have been
// lost or closed. LockFrom returns nil and false if ctx runs under no lock.
func LockFrom(ctx context.Context) (*Lock, bool) {
	s := scopeOf(ctx)
	if s == nil {
		return nil, false
	}
	return s.lock, true
}

// acquire makes a lock, whose parent is ctx, and has join bring it to the head of the queue.
func acquire(ctx context.Context, c *lockConfig, name string, start time.Time, join func(q *contender, ctx context.Context) error) (*Lock, error) {
	lease, err := leaseFor(ctx, c, start)
	if err != nil {
		return nil, errorf("acquire %q: %w", name, err)
	}
	l := newLock(ctx, c, name, lease)
	if err := l.acquireUnder(ctx, c, start, join); err != nil {
		l.discard()
		return nil, errorf("acquire %q: %w", name, err)
	}
	l.markHeld(time.Since(start))
	return l, nil
}

// leaseFor returns the lease to hold the lock by: the shared one, or one of its own.
func leaseFor(ctx context.Context, c *lockConfig, start time.Time) (*Lease, error) {
	if c.shared {
		return c.lease, nil
	}
	bound, cancel := c.bound(ctx, start)
	defer cancel()
	return newLease(ctx, bound, or(c.ttl, DefaultTTL), &c.leaseConfig)
}

// newLock makes a lock that is not in the queue yet.
func newLock(parent context.Context, c *lockConfig, name string, lease *Lease) *Lock {
	l := &Lock{config: c.config, lease: lease, shared: c.shared, outer: scopeOf(parent)}
	l.queue = contender{
		config:  &l.config,
		policy:  c.retry,
		name:    name,
		key:     lease.reserveKey(name, c.client),
		value:   c.value,
		leaseID: lease.id,
	}
	if l.queue.policy.Elapsed == 0 {
		l.queue.policy.Elapsed = -1 // until the lease ends
	}
	l.init(l.enter(parent))
	l.fence = fence{queue: &l.queue, owner: l, stopCtx: l.stopCtx}
	lease.addLock(l)
	return l
}

// acquireUnder runs join under a context that ends with the lock's own and after the acquire
// timeout. It is no child of the lock's: a context keeps what it has had for children.
func (l *Lock) acquireUnder(parent context.Context, c *lockConfig, start time.Time, join func(q *contender, ctx context.Context) error) error {
	ctx, end := context.WithCancelCause(parent)
	defer end(nil)
	l.setAcquiring(end)
	defer l.setAcquiring(nil)
	ctx, cancel := c.bound(ctx, start)
	defer cancel()
	err := join(&l.queue, ctx)
	switch {
	case errors.Is(err, errKeyGone):
		return l.keyDeleted()
	case errors.Is(err, rpctypes.ErrLeaseNotFound) && l.lease.config.client == l.config.client:
		// Of a lease that another client granted it may only be the wrong etcd that was asked.
		l.lease.markLost(ErrLeaseRevoked)
	}
	if stopped := l.stopCause(); stopped != nil {
		return stopped
	}
	if err == nil && l.Err() != nil { // its parent ended meanwhile
		return contextError(l)
	}
	return err
}

// markHeld begins to hold the lock.
func (l *Lock) markHeld(waited time.Duration) {
	now := time.Now()
	l.fence.version, l.fence.revision = 1, l.queue.token
	l.config.reporter.lockAcquired(LockEvent{Name: l.queue.name, Token: l.queue.token, Took: waited})
	l.heldSince.Store(&now)
	if stopped := context.Cause(l.stopCtx); stopped != nil { // before it was to be logged
		l.logEnd(stopped)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.watchTimer = time.AfterFunc(keyWatchDelay, l.watchKey)
}

// setAcquiring records how to end the acquisition, which ends at once if the lock has.
func (l *Lock) setAcquiring(end context.CancelCauseFunc) {
	l.mu.Lock()
	l.acquiring = end
	l.mu.Unlock()
	if l.Err() != nil {
		l.endAcquiring()
	}
}

// endAcquiring ends the acquisition, if it goes on. The lock's context has ended.
func (l *Lock) endAcquiring() {
	l.mu.Lock()
	end := l.acquiring
	l.mu.Unlock()
	if end != nil {
		end(context.Cause(l))
	}
}

// watchKey starts the watch that ends the lock when its key is deleted. The watch ends when the
// lock is lost or closed.
func (l *Lock) watchKey() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.watchTimer = nil
	if l.stopCtx.Err() != nil {
		return
	}
	l.unwatch = l.queue.watchOwnKey(func(refusals int, err error) {
		switch {
		case l.stopCtx.Err() != nil:
		case err != nil: // a permission may come back
			l.config.reporter.lockWatchFailing(l.Name(), refusals, err)
		default:
			_ = l.keyDeleted()
		}
	})
}

// cancelWatch ends the watch on the key. The lock was lost or closed.
func (l *Lock) cancelWatch() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.watchTimer != nil {
		l.watchTimer.Stop()
	}
	if l.unwatch != nil {
		l.unwatch()
	}
	l.watchTimer, l.unwatch = nil, nil
}

// handleLeaseEnd cancels the lock's context with its lease's. A lock whose lease's parent has ended
// is still held until the lease expires.
func (l *Lock) handleLeaseEnd() {
	if stopped := context.Cause(l.lease.stopCtx); stopped != nil {
		l.markLost(stopped)
		return
	}
	l.cancel(context.Cause(l.lease.ctx))
	l.endAcquiring()
}

// keyDeleted ends the lock, whose key is gone, and returns its stopCause. Why it is gone is asked
// only afterwards, for the lease's sake: the loss must be reported at once.
func (l *Lock) keyDeleted() error {
	if stopped := l.stopCause(); stopped != nil {
		return stopped
	}
	l.stopWith(errorf("%w: the key of %q was deleted", ErrLockLost, l.queue.name))
	l.lease.check()
	return context.Cause(l.stopCtx)
}

// markLost ends the lock, whose lease has ended with this cause.
func (l *Lock) markLost(cause error) {
	l.stopWith(errorf("%w: %q: %w", ErrLockLost, l.queue.name, cause))
}

func (l *Lock) stopWith(cause error) {
	if l.shutdown(cause) {
		l.endAcquiring()
		l.cancelWatch()
		l.logEnd(cause)
	}
}

// logEnd logs once how the lock ended, if it was held.
func (l *Lock) logEnd(cause error) {
	since := l.heldSince.Load()
	if since == nil || !l.endLogged.CompareAndSwap(false, true) {
		return
	}
	e := LockEvent{Name: l.queue.name, Token: l.queue.token, Took: time.Since(*since)}
	if errors.Is(cause, ErrClosed) { // with its lease, too
		l.config.reporter.lockReleased(e)
		return
	}
	e.Err = cause
	l.config.reporter.lockLost(e)
}

// stopCause returns why the lock is no longer surely held: it was lost or closed, even if a timer
// is late. It returns nil while work winds down after the parent's end.
func (l *Lock) stopCause() error {
	if stopped := l.lease.stopCause(); stopped != nil {
		l.markLost(stopped)
	}
	return context.Cause(l.stopCtx)
}

// Name returns the name that the lock was acquired by.
func (l *Lock) Name() string { return l.queue.name }

// Key returns the lock's key in etcd: the name, a slash, the lease's ID in hexadecimal, and a
// nonce. A later lock on the same lease may have the same key; it has another token.
func (l *Lock) Key() string { return l.queue.key }

// Token returns the lock's fencing token, the revision at which its key was created. It is greater
// than those of all earlier holders, unless etcd was restored from a backup.
func (l *Lock) Token() Revision { return l.queue.token }

// Lease returns the lease that holds the lock: that of [WithLease], or the lock's own. The lock's
// Close also closes its own lease.
func (l *Lock) Lease() *Lease { return l.lease }

// Do runs fn under a context with ctx's values that ends when ctx or the lock does, and waits for
// fn to return. If the lock ended, that context's cause is the lock's. Do does not release the
// lock. A nil ctx or fn panics.
//
// Errors:
//   - [ErrLockLost] if the lock was lost before fn returned. It also wraps fn's error.
//   - The lock's cause, or ctx's end, if either had ended before. Then fn was not run.
//   - fn's error.
func (l *Lock) Do(ctx context.Context, fn func(ctx context.Context) error) error {
	if ctx == nil {
		panic("etcdutil: nil ctx")
	}
	if fn == nil {
		panic("etcdutil: nil fn")
	}
	if stopped := l.stopCause(); stopped != nil {
		return stopped
	}
	for _, c := range []context.Context{l, ctx} {
		if c.Err() != nil {
			return contextError(c)
		}
	}
	under, cancel := context.WithCancelCause(l.enter(ctx))
	defer cancel(nil)
	defer context.AfterFunc(l, func() { cancel(context.Cause(l)) })()
	err := fn(under)
	if stopped := l.stopCause(); errors.Is(stopped, ErrLockLost) && err != stopped {
		return joinLoss(stopped, err)
	}
	return err
}

func joinLoss(lost, err error) error {
	if err == nil {
		return lost
	}
	return errorf("%w: %w", lost, err)
}

// IsOwner returns a comparison for a transaction of your own. It fails once the lock's key is gone.
// It does not notice a key that somebody has overwritten: use [Lock.Commit] for that. Unlike
// Commit, such a transaction may be applied twice if clientv3 repeats it.
func (l *Lock) IsOwner() clientv3.Cmp {
	return clientv3.Compare(clientv3.CreateRevision(l.queue.key), "=", l.queue.token)
}

// Alive asks etcd whether the lock's key exists. It is a request, which ctx and [RetryPolicy]
// bound. It changes nothing, and works also when the lock's context has ended. It returns false
// without an error only if the key is gone or has lost its lease. Its errors are ctx's end, and
// what etcd answered last.
func (l *Lock) Alive(ctx context.Context) (bool, error) {
	kv, err := l.fence.read(ctx, &l.config)
	if err != nil {
		return false, errorf("ask for lock %q: %w", l.queue.name, err)
	}
	return kv != nil, nil
}

// Close cancels the context with ErrClosed and releases the lock. nil means released, and not known
// to have been lost before. A parent's end is no loss.
//
// Close takes no longer than the lock's lease has left, and 5 s at most. It does not wait for what
// runs under the lock: [Do] and [Lock.Do] do. Further calls return what the first did.
//
// Errors:
//   - [ErrLockLost] if the lock was lost before. The error names the lock and wraps the cause.
//   - [ErrUnknownOutcome] if etcd did not confirm the release. The error names the lock or its
//     lease, the time at which the lock will be free at the latest, and what etcd answered last.
func (l *Lock) Close() error {
	l.closing.Do(func() {
		l.closeErr = l.release()
		if errors.Is(l.closeErr, ErrLockLost) {
			l.logEnd(l.closeErr)
		} else {
			l.logEnd(ErrClosed) // also if etcd did not confirm it
		}
		l.config.reporter.flush()
	})
	return l.closeErr
}

func (l *Lock) release() error {
	lost := l.stopCause()
	if !l.shutdown(ErrClosed) {
		lost = context.Cause(l.stopCtx) // it may have been lost just now
	}
	l.detach()
	if lost != nil {
		l.removeLeft()
		return lost
	}
	var err error
	if l.shared {
		err = l.removeKey()
	} else {
		err = l.lease.Close()
	}
	if errors.Is(err, ErrLeaseExpired) || errors.Is(err, ErrLeaseRevoked) { // at the last moment
		return errorf("%w: %q: %w", ErrLockLost, l.queue.name, err)
	}
	return err
}

// detach ends the watch on the key, and no longer follows the lease. The lock's context has ended.
func (l *Lock) detach() {
	l.lease.removeLock(l)
	l.cancelWatch()
}

// removeKey releases a lock on a shared lease.
func (l *Lock) removeKey() error {
	policy := releasePolicy(time.Until(l.lease.Expiry()))
	_, err := retry(context.WithoutCancel(l.ctx), &l.config, policy, "release lock", func(ctx context.Context) (struct{}, error) {
		return struct{}{}, l.queue.remove(ctx)
	})
	if err == nil && !l.queue.writes.mayStillApply {
		l.lease.freeKey(l.queue.key)
		return nil
	}
	l.lease.discardKey(l.queue.key, l.queue.writes.mayStillApply, l.queue.remove)
	if err == nil {
		return nil
	}
	return errorf("%w: lock %q is not confirmed released; its key is deleted when etcd can be reached, or is gone by %s with its lease: %w",
		ErrUnknownOutcome, l.queue.name, l.lease.serverExpiry(), err)
}

// discard gives up a lock that was never held.
func (l *Lock) discard() {
	l.shutdown(ErrClosed)
	inBackground(func() {
		l.detach()
		l.removeLeft()
	})
}

// removeLeft removes what may be left of a lock that is not held: its own lease, with which its key
// goes and can never be written late, or else its key.
func (l *Lock) removeLeft() {
	switch {
	case !l.shared:
		l.lease.discard()
	case l.queue.unwritten():
		l.lease.freeKey(l.queue.key)
	default:
		l.lease.discardKey(l.queue.key, l.queue.writes.mayStillApply, l.queue.remove)
	}
}
