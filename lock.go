package etcdutil

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// DefaultTTL is the TTL of a lock's own lease unless WithTTL says otherwise.
const DefaultTTL = 10 * time.Second

// Lock is a lock that is held. It is a context.Context: Done closes when the lock is no longer surely held, which is
// before anybody else can hold it, save where its key was deleted or its lease revoked by somebody else. Nobody but the lock
// may write its key: an overwritten one may have lost its lease, and with it its place, which only Commit and Alive notice.
//
// All methods are safe for concurrent use.
type Lock struct {
	lifetime
	config  config
	waiting RetryPolicy // gives up no earlier than the lease does, unless told to
	name    string
	key     string
	value   string
	lease   *Lease
	shared  bool        // the lease is not the lock's own
	token   Revision    // 0 until the key is known to be written
	doubt   bool        // the key may have been written, or may yet be, without our being told
	logged  atomic.Bool // that it was lost

	closing  sync.Once
	closeErr error
	unhook   func() bool    // from the lease
	watch    *time.Timer    // starts watchKey
	watching sync.WaitGroup // for watchKey

	committing chan struct{} // held by the Commit that is under way; guards the fields below
	version    int64         // of the key
	revision   Revision      // of the key's last change
	unsettled  bool          // an earlier Commit may still be applied
}

// keyWatchDelay keeps a lock that is released at once from paying for the watch on its key.
const keyWatchDelay = 5 * time.Millisecond

// relook is how often a waiter looks again although its watch is silent: a watch on a connection that is dead, but was
// never closed, stays silent for ever. A random part of it is added.
const relook = 4 * time.Second

// A LockOption shapes a lock.
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

// WithTTL sets the TTL of the lock's own lease; default [DefaultTTL]. It must be positive, and is rounded up to seconds.
// It is refused beside WithLease.
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

// WithLease has the lock held by this lease, which any number of locks may share: two locks of one name on one lease
// exclude each other like any others. Closing the lock leaves the lease alive; closing or losing the lease loses the
// lock. A lock that is not closed, though its parent has ended, blocks others for as long as the lease lives. A lease that is
// nil or has ended is refused, and so is any option about the lock's own lease.
func WithLease(lease *Lease) LockOption {
	return lockOption(func(c *lockConfig) { c.lease, c.shared = lease, true })
}

// WithValue sets what is stored in the lock's key, to tell others who holds it; default "". It is what
// concurrency.Election.Leader reads.
func WithValue(v string) LockOption {
	return lockOption(func(c *lockConfig) { c.value = v })
}

// WithAcquireTimeout bounds the time until the lock is held, and nothing after that: when it has passed, Acquire gives up
// with context.DeadlineExceeded. It must be positive; the default is no bound but ctx.
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
	return c, c.validate()
}

func validateName(name string) error {
	switch {
	case name == "":
		return fmt.Errorf("%w: name is empty", ErrInvalidName)
	case len(name) > 512:
		return fmt.Errorf("%w: name has %d bytes, over 512", ErrInvalidName, len(name))
	case !utf8.ValidString(name):
		return fmt.Errorf("%w: name is not valid UTF-8: %q", ErrInvalidName, name)
	case strings.ContainsRune(name, 0):
		return fmt.Errorf("%w: name holds a NUL: %q", ErrInvalidName, name)
	}
	return nil
}

func (c *lockConfig) validate() error {
	if c.timeout != nil && *c.timeout <= 0 {
		return fmt.Errorf("etcdutil: WithAcquireTimeout must be positive: %v", *c.timeout)
	}
	if c.shared {
		return c.validateShared()
	}
	if ttl := or(c.ttl, DefaultTTL); ttl <= 0 || ttl > maxLeaseTTL {
		return fmt.Errorf("etcdutil: WithTTL must be positive and at most %v: %v", maxLeaseTTL, ttl)
	}
	return c.leaseConfig.validate(or(c.ttl, DefaultTTL))
}

func (c *lockConfig) validateShared() error {
	if c.ttl != nil {
		return errors.New("etcdutil: WithTTL beside WithLease, whose lease has its own")
	}
	if given := c.given(); given != "" {
		return fmt.Errorf("etcdutil: %s beside WithLease, whose lease has its own", given)
	}
	if c.lease == nil {
		return errors.New("etcdutil: WithLease: the lease is nil")
	}
	if cause := c.lease.stopCause(); cause != nil {
		return fmt.Errorf("etcdutil: WithLease: the lease has ended: %w", cause)
	}
	if c.lease.Err() != nil {
		return fmt.Errorf("etcdutil: WithLease: the lease has ended: %w", contextError(c.lease))
	}
	return c.retry.validate()
}

// bound is ctx with the acquire timeout, counted from start.
func (c *lockConfig) bound(ctx context.Context, start time.Time) (context.Context, context.CancelFunc) {
	if c.timeout == nil {
		return ctx, func() {}
	}
	return context.WithDeadline(ctx, start.Add(*c.timeout))
}

// Acquire waits its turn (first come, first served) and returns a lock that is held.
//
// ctx is the lock's parent, as in sql.DB.BeginTx: when it ends before the lock is held, Acquire returns within 100 ms,
// even if etcd cannot be reached; when it ends later, so does the lock's context, but nothing is released until Close.
// To bound the wait alone use [WithAcquireTimeout]. Retries end with the lock's lease, which can be renewed no more
// than the request can be repeated; the grant of that lease is retried as [RetryPolicy] says.
//
// Errors: ErrInvalidName; ErrLockLost, wrapping why, if the lease or the key was lost while waiting; ctx's end; what etcd
// answered. An Acquire that fails removes its key and its lease, behind itself if etcd cannot be reached, and at the
// latest by the lease's TTL.
func Acquire(ctx context.Context, client *clientv3.Client, name string, opts ...LockOption) (*Lock, error) {
	c, err := newLockConfig(ctx, client, name, opts)
	if err != nil {
		return nil, err
	}
	return acquire(ctx, c, name, time.Now(), (*Lock).awaitTurn)
}

// TryAcquire returns a lock that is held, or ErrLockHeld at once, if somebody holds or waits for it: then nothing was
// written and nobody was made to wait. Else it is as [Acquire].
func TryAcquire(ctx context.Context, client *clientv3.Client, name string, opts ...LockOption) (*Lock, error) {
	c, err := newLockConfig(ctx, client, name, opts)
	if err != nil {
		return nil, err
	}
	start := time.Now()
	bound, cancel := c.bound(ctx, start)
	defer cancel()
	seen, err := lookBefore(bound, &c.config, name)
	if err != nil {
		return nil, fmt.Errorf("etcdutil: acquire %q: %w", name, err)
	}
	return acquire(ctx, c, name, start, func(l *Lock, ctx context.Context) error { return l.claim(ctx, seen) })
}

// Do acquires the lock, runs fn under its context, waits for fn, and releases, also if fn panics. See [Acquire] and
// [Lock.Do] for the errors.
//
// If fn returned nil and the release could not be confirmed, the error is ErrUnknownOutcome: what fn did was done under
// the lock, which the next holder may get only when the lease has run out.
func Do(ctx context.Context, client *clientv3.Client, name string, fn func(ctx context.Context) error, opts ...LockOption) (err error) {
	if fn == nil {
		panic("etcdutil: nil fn")
	}
	lock, err := Acquire(ctx, client, name, opts...)
	if err != nil {
		return err
	}
	defer func() {
		if closeErr := lock.Close(); closeErr != nil && !errors.Is(err, ErrLockLost) {
			err = errors.Join(err, closeErr)
		}
	}()
	return lock.Do(ctx, fn)
}

type lockKey struct{}

// LockFrom returns the lock that ctx runs under, for code deep inside that must fence its writes: the innermost, where
// locks are nested. It still returns it when the lock has been lost or closed.
func LockFrom(ctx context.Context) (*Lock, bool) {
	l, ok := ctx.Value(lockKey{}).(*Lock)
	return l, ok
}

// acquire makes a lock, whose parent is ctx, and has get get it.
func acquire(ctx context.Context, c *lockConfig, name string, start time.Time, get func(l *Lock, ctx context.Context) error) (*Lock, error) {
	lease, err := leaseFor(ctx, c, start)
	if err != nil {
		return nil, fmt.Errorf("etcdutil: acquire %q: %w", name, err)
	}
	l := newLock(ctx, c, name, lease)
	if err := l.take(c, start, get); err != nil {
		l.abandon()
		return nil, fmt.Errorf("etcdutil: acquire %q: %w", name, err)
	}
	l.config.reporter.lockAcquired(LockEvent{Name: name, Token: l.token, Took: time.Since(start)})
	return l, nil
}

// leaseFor is the lease to hold the lock by: the shared one, or one of its own.
func leaseFor(ctx context.Context, c *lockConfig, start time.Time) (*Lease, error) {
	if c.shared {
		return c.lease, nil
	}
	bound, cancel := c.bound(ctx, start)
	defer cancel()
	return newLease(ctx, bound, or(c.ttl, DefaultTTL), &c.leaseConfig)
}

// newLock makes a lock that is not yet in the queue.
func newLock(parent context.Context, c *lockConfig, name string, lease *Lease) *Lock {
	l := &Lock{
		config:     c.config,
		waiting:    c.retry,
		name:       name,
		value:      c.value,
		lease:      lease,
		shared:     c.shared,
		committing: make(chan struct{}, 1),
	}
	if l.waiting.Elapsed == 0 {
		l.waiting.Elapsed = -1
	}
	l.init(context.WithValue(parent, lockKey{}, l))
	l.key = lease.reserveKey(name)
	lease.addLock(l)
	l.unhook = context.AfterFunc(lease.ctx, l.leaseEnded)
	return l
}

// take gets the lock, under a context that ends with the lock's own, when its lease or key is gone as well.
func (l *Lock) take(c *lockConfig, start time.Time, get func(l *Lock, ctx context.Context) error) error {
	ctx, cancel := c.bound(l.ctx, start)
	defer cancel()
	err := get(l, ctx)
	switch lost := l.lost(); {
	case lost != nil:
		return lost
	case err == nil && l.Err() != nil: // its parent ended meanwhile
		return contextError(l)
	}
	return err
}

// leaseEnded ends the lock's context with its lease's, whose parent has ended: it is still held until the lease runs out. One
// that is lost or closed has taken its locks with it, unless they were only being made, but has not logged that.
func (l *Lock) leaseEnded() {
	if cause := context.Cause(l.lease.stopCtx); cause != nil {
		l.markLost(cause)
		return
	}
	l.cancel(context.Cause(l.lease.ctx))
}

// markLost ends the lock, because of its lease if cause is not nil, else because its key is gone, and logs that. A logger may block:
// whoever ends several locks ends them all before.
func (l *Lock) markLost(cause error) {
	l.markLostNoLog(cause)
	if lost := context.Cause(l.stopCtx); errors.Is(lost, ErrLockLost) && l.logged.CompareAndSwap(false, true) {
		l.config.reporter.lockLost(LockEvent{Name: l.name, Token: l.token, Err: lost})
	}
}

func (l *Lock) markLostNoLog(cause error) {
	if cause == nil {
		l.shutdown(fmt.Errorf("%w: the key of %q was deleted", ErrLockLost, l.name))
		return
	}
	l.shutdown(fmt.Errorf("%w: %q: %w", ErrLockLost, l.name, cause))
}

// lost is why the lock is no longer surely held: lost or closed, even if what is to say so is late. It is nil while the
// work may wind down after the parent's end.
func (l *Lock) lost() error {
	if cause := l.lease.stopCause(); cause != nil {
		l.markLost(cause)
	}
	return context.Cause(l.stopCtx)
}

// abandon gives up a lock that was never held. With the lock's own lease its key goes, and can never be written late.
func (l *Lock) abandon() {
	l.shutdown(ErrClosed)
	inBackground(func() {
		l.stop()
		switch {
		case !l.shared:
			if err := l.lease.Close(); errors.Is(err, ErrUnknownOutcome) {
				revokeInBackground(l.ctx, &l.config, l.lease.id, l.lease.ttl, min(l.lease.ttl, lateWindow))
			}
		case l.token == 0 && !l.doubt: // nothing was written
			l.lease.freeKey(l.key)
		default:
			l.sweepKey()
		}
	})
}

// watchKey ends the lock when its key is deleted. It runs, as the timer's goroutine, until the lock's context ends.
func (l *Lock) watchKey() {
	defer l.watching.Done()
	for from, failed := l.token+1, 0; ; {
		began := time.Now()
		if l.deletedFrom(from, failed) {
			break
		}
		if failed++; time.Since(began) > relook { // it stood
			failed = 0
		}
		resp, err := retryRead(l.ctx, &l.config, untilDone, "read the key of lock", func(ctx context.Context) (*clientv3.GetResponse, error) {
			return l.config.client.Get(ctx, l.key)
		})
		if l.Err() != nil {
			return
		}
		if err != nil {
			l.config.reporter.lockWatchFailing(l.name, err)
			return
		}
		if l.mine(resp.Kvs) == nil {
			break
		}
		from = resp.Header.Revision + 1
		sleep(l.ctx, untilDone.withDefaults().backoff(failed))
	}
	if l.Err() == nil {
		_ = l.keyGone()
	}
}

// deletedFrom watches the key from a revision on. It returns false if the watch ends without a deletion.
func (l *Lock) deletedFrom(from Revision, failed int) bool {
	ctx, cancel := context.WithCancel(watchContext(l.ctx, failed))
	defer cancel()
	for resp := range l.config.client.Watch(ctx, l.key, clientv3.WithRev(from), clientv3.WithFilterPut()) {
		if len(resp.Events) > 0 {
			return true
		}
	}
	return false
}

// keyGone ends the lock, whose key is gone, and returns why: it went with its lease, or alone. The lease is asked about,
// but not for long.
func (l *Lock) keyGone() error {
	ctx, cancel := context.WithTimeout(l.stopCtx, 200*time.Millisecond)
	defer cancel()
	if resp, err := l.lease.config.client.TimeToLive(ctx, l.lease.id); err == nil && resp.TTL < 0 {
		l.lease.markLost(ErrLeaseRevoked)
	}
	if lost := l.lost(); lost != nil {
		return lost
	}
	l.markLost(nil)
	return l.lost()
}

// Name is the name that the lock was acquired by.
func (l *Lock) Name() string { return l.name }

// Key is the lock's key in etcd: name, a slash, the lease's ID in hexadecimal, and a nonce by which two locks on one lease
// differ. A later lock on the same lease may have the same key; it has another token.
func (l *Lock) Key() string { return l.key }

// Token is the lock's fencing token, the revision at which its key was created. Each holder's is greater than all
// earlier holders'.
func (l *Lock) Token() Revision { return l.token }

// Lease is the lease that the lock is held by: its own, which ends with it, or that of WithLease.
func (l *Lock) Lease() *Lease { return l.lease }

// Do runs fn under a context with ctx's values that ends when ctx or the lock does, and waits for fn to return. That
// context's cause is the lock's, if it was the lock that ended.
//
// If the lock was lost before fn returned, the error Is ErrLockLost, whatever fn said; it also wraps fn's error. Else
// it is fn's. fn is not run if ctx or the lock's context has already ended: the error says why.
func (l *Lock) Do(ctx context.Context, fn func(ctx context.Context) error) error {
	if ctx == nil {
		panic("etcdutil: nil ctx")
	}
	if fn == nil {
		panic("etcdutil: nil fn")
	}
	if lost := l.lost(); lost != nil {
		return lost
	}
	for _, c := range []context.Context{l, ctx} {
		if c.Err() != nil {
			return contextError(c)
		}
	}
	under, cancel := context.WithCancelCause(context.WithValue(ctx, lockKey{}, l))
	defer cancel(nil)
	defer context.AfterFunc(l, func() { cancel(context.Cause(l)) })()
	err := fn(under)
	if lost := l.lost(); errors.Is(lost, ErrLockLost) && err != lost {
		return joinLoss(lost, err)
	}
	return err
}

func joinLoss(lost, err error) error {
	if err == nil {
		return lost
	}
	return fmt.Errorf("%w: %w", lost, err)
}

// IsOwner compares, in a transaction of the caller's own, whether the lock is still held: it fails once the lock's key
// is gone. Unlike Commit such a transaction may be applied twice, if clientv3 repeats it.
func (l *Lock) IsOwner() clientv3.Cmp {
	return clientv3.Compare(clientv3.CreateRevision(l.key), "=", l.token)
}

// Alive asks the server whether the lock's key is there. It answers whatever the state of the context, and changes
// nothing.
func (l *Lock) Alive(ctx context.Context) (bool, error) {
	kv, err := l.read(ctx, l.config.retry)
	if err != nil {
		return false, fmt.Errorf("etcdutil: ask for lock %q: %w", l.name, err)
	}
	return kv != nil, nil
}

// read returns the lock's key, nil if it is gone.
func (l *Lock) read(ctx context.Context, policy RetryPolicy) (*mvccpb.KeyValue, error) {
	resp, err := retryRead(ctx, &l.config, policy, "read the key of lock", func(ctx context.Context) (*clientv3.GetResponse, error) {
		return l.config.client.Get(ctx, l.key)
	})
	if err != nil {
		return nil, err
	}
	return l.mine(resp.Kvs), nil
}

// Close ends the context with ErrClosed, so that the work stops, and then gives the lock back: nobody has to wait for it
// when Close returns nil, which says that it is not known to have been lost before (a parent's end is no loss).
//
// It takes no longer than the lock's lease has left, and 5 s at most; the lock's parent may have ended. A lock that was
// lost before gives the cause, ErrLockLost. If the server did not confirm, the error is ErrUnknownOutcome and says by
// when the lock will be free. Further calls return what the first did.
//
// Close does not wait for what runs under the lock: [Do] and [Lock.Do] do.
func (l *Lock) Close() error {
	l.closing.Do(func() {
		l.closeErr = l.release()
		l.config.reporter.flush()
	})
	return l.closeErr
}

func (l *Lock) release() error {
	lost := l.lost()
	l.shutdown(ErrClosed)
	l.stop()
	var err error
	switch {
	case !l.shared:
		err = l.lease.Close()
	case lost == nil:
		err = l.deleteKey()
	default: // its key may be written late, or by somebody else; unless the lease has taken it along
		inBackground(l.sweepKey)
	}
	switch {
	case lost != nil:
		return lost
	case errors.Is(err, ErrLeaseExpired) || errors.Is(err, ErrLeaseRevoked): // at the last moment
		return fmt.Errorf("%w: %q: %w", ErrLockLost, l.name, err)
	}
	return err
}

// stop ends what the lock has started. Its context has ended.
func (l *Lock) stop() {
	l.unhook()
	l.lease.removeLock(l)
	if l.watch != nil && l.watch.Stop() {
		l.watching.Done()
	}
	l.watching.Wait()
}

// deleteKey gives back a lock on a shared lease.
func (l *Lock) deleteKey() error {
	policy := releasePolicy(time.Until(l.lease.Expiry()))
	_, err := retry(context.WithoutCancel(l.ctx), &l.config, policy, "release lock", l.deleteOwn)
	if err != nil || l.doubt {
		go l.sweepKey() // until the lease ends, at the latest
	} else {
		l.lease.freeKey(l.key)
	}
	if err != nil {
		return fmt.Errorf("%w: lock %q is not confirmed released; its key is deleted when etcd can be reached, or is gone by %s with its lease: %w",
			ErrUnknownOutcome, l.name, l.lease.serverExpiry(), err)
	}
	return nil
}

// deleteOwn deletes the key if it is this lock's, so that a delete that lands late can hit no successor. That it was gone
// before says nothing: clientv3 may have repeated the request.
func (l *Lock) deleteOwn(ctx context.Context) (*clientv3.TxnResponse, error) {
	return l.config.client.Txn(ctx).If(l.IsOwner()).Then(clientv3.OpDelete(l.key)).Commit()
}

// sweepKey deletes the key until that is confirmed, and where the request that wrote it may still be under way, also when
// it has arrived. Such a key is not used again. The lease's end ends it: that takes the key along.
func (l *Lock) sweepKey() {
	ctx, cancel := context.WithCancel(context.WithoutCancel(l.ctx))
	defer cancel()
	defer context.AfterFunc(l.lease.stopCtx, cancel)()
	if l.doubt {
		removeRepeatedly(ctx, &l.config, "release lock", lateWindow, func(ctx context.Context) error {
			_, err := l.config.client.Delete(ctx, l.key)
			return err
		})
		return
	}
	removeRepeatedly(ctx, &l.config, "release lock", 0, func(ctx context.Context) error {
		_, err := l.deleteOwn(ctx)
		if err == nil {
			l.lease.freeKey(l.key)
		}
		return err
	})
}
