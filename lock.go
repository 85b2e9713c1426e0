package etcdutil

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
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
	waiting config // gives up no earlier than the lease does, unless told to
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
func WithTTL(ttl time.Duration) LockOption {
	return lockOption(func(c *lockConfig) { c.ttl = &ttl })
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
	c := &lockConfig{leaseConfig: leaseConfig{config: config{logger: discard, client: client}}}
	for _, o := range opts {
		o.applyLock(c)
	}
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
	if cause := c.lease.lost(); cause != nil {
		return fmt.Errorf("etcdutil: WithLease: the lease has ended: %w", cause)
	}
	if c.lease.Err() != nil {
		return fmt.Errorf("etcdutil: WithLease: the lease has ended: %w", ended(c.lease))
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
	l.config.logger.Info("etcdutil: lock acquired", "name", name, "token", l.token, "waited", time.Since(start))
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
		waiting:    c.config,
		name:       name,
		value:      c.value,
		lease:      lease,
		shared:     c.shared,
		committing: make(chan struct{}, 1),
	}
	if l.waiting.retry.Elapsed == 0 {
		l.waiting.retry.Elapsed = -1
	}
	l.begin(context.WithValue(parent, lockKey{}, l))
	lease.takeKey(l)
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
		return ended(l)
	}
	return err
}

// leaseEnded ends the lock's context with its lease's, whose parent has ended: it is still held until the lease runs out. One
// that is lost or closed has taken its locks with it, unless they were only being made, but has not logged that.
func (l *Lock) leaseEnded() {
	if cause := context.Cause(l.lease.held); cause != nil {
		l.lose(cause)
		return
	}
	l.end(context.Cause(l.lease.ctx))
}

// lose ends the lock, because of its lease if cause is not nil, else because its key is gone, and logs that. A logger may block:
// whoever ends several locks ends them all before.
func (l *Lock) lose(cause error) {
	l.loseQuietly(cause)
	if lost := context.Cause(l.held); errors.Is(lost, ErrLockLost) && l.logged.CompareAndSwap(false, true) {
		l.config.logger.Warn("etcdutil: lock lost", "name", l.name, "cause", lost)
	}
}

func (l *Lock) loseQuietly(cause error) {
	if cause == nil {
		l.finish(fmt.Errorf("%w: the key of %q was deleted", ErrLockLost, l.name))
		return
	}
	l.finish(fmt.Errorf("%w: %q: %w", ErrLockLost, l.name, cause))
}

// lost is why the lock is no longer surely held: lost or closed, even if what is to say so is late. It is nil while the
// work may wind down after the parent's end.
func (l *Lock) lost() error {
	if cause := l.lease.lost(); cause != nil {
		l.lose(cause)
	}
	return context.Cause(l.held)
}

// abandon gives up a lock that was never held. With the lock's own lease its key goes, and can never be written late.
func (l *Lock) abandon() {
	l.finish(ErrClosed)
	behind(func() {
		l.stop()
		switch {
		case !l.shared:
			if err := l.lease.Close(); errors.Is(err, ErrUnknownOutcome) {
				forsakeLease(l.ctx, &l.config, l.lease.id, l.lease.ttl, min(l.lease.ttl, stragglers))
			}
		case l.token == 0 && !l.doubt: // nothing was written
			l.lease.giveKey(l.key)
		default:
			l.sweepKey()
		}
	})
}

// awaitTurn queues up and waits until no contender is older.
func (l *Lock) awaitTurn(ctx context.Context) error {
	older, err := l.enqueue(ctx)
	for err == nil && older != nil {
		if err = l.awaitGone(ctx, older); err == nil {
			older, err = l.look(ctx)
		}
	}
	return err
}

// enqueue writes the key, once however often it is sent, and returns the nearest older contender, if any.
func (l *Lock) enqueue(ctx context.Context) (*mvccpb.KeyValue, error) {
	resp, err := l.write(ctx, clientv3.Compare(clientv3.CreateRevision(l.key), "=", 0), newest(l.name))
	if err != nil {
		return nil, err
	}
	if !resp.Succeeded { // an earlier attempt has written it
		written, contenders, err := l.found(ctx)
		switch {
		case err != nil:
			return nil, err
		case !written: // and somebody has deleted it
			return nil, l.keyGone()
		}
		return nearest(ctx, &l.waiting, l.name, contenders, l.token)
	}
	l.entered(resp.Header.Revision)
	return nearest(ctx, &l.waiting, l.name, resp.Responses[1].GetResponseRange(), l.token)
}

// write repeats a transaction that creates the key until it is answered.
func (l *Lock) write(ctx context.Context, guard clientv3.Cmp, more ...clientv3.Op) (*clientv3.TxnResponse, error) {
	then := append([]clientv3.Op{clientv3.OpPut(l.key, l.value, clientv3.WithLease(l.lease.id))}, more...)
	resp, err := retry(ctx, &l.waiting, func(ctx context.Context) (*clientv3.TxnResponse, error) {
		resp, err := l.config.client.Txn(ctx).If(guard).Then(then...).Commit()
		l.doubt = l.doubt || IsAmbiguous(err)
		return resp, err
	})
	// Of a lease that another client granted it may only be the wrong etcd that is asked.
	if errors.Is(err, rpctypes.ErrLeaseNotFound) && l.lease.config.client == l.config.client {
		l.lease.lose(ErrLeaseRevoked)
	}
	return resp, err
}

// found reads the key, which an earlier attempt may have written, and the youngest contenders. It reports whether it was
// written.
func (l *Lock) found(ctx context.Context) (written bool, contenders *etcdserverpb.RangeResponse, err error) {
	resp, err := query(ctx, &l.waiting, func(ctx context.Context) (*clientv3.TxnResponse, error) {
		return l.config.client.Txn(ctx).Then(clientv3.OpGet(l.key), newest(l.name)).Commit()
	})
	if err != nil {
		return false, nil, err
	}
	contenders = resp.Responses[1].GetResponseRange()
	contenders.Header = resp.Header
	for _, kv := range resp.Responses[0].GetResponseRange().Kvs {
		if clientv3.LeaseID(kv.Lease) == l.lease.id { // else somebody else wrote it, and it holds nothing
			l.entered(kv.CreateRevision)
			return true, contenders, nil
		}
	}
	return false, contenders, nil
}

// entered notes the token.
func (l *Lock) entered(token Revision) {
	l.token, l.version, l.revision = token, 1, token
	l.watching.Add(1)
	l.watch = time.AfterFunc(keyWatchDelay, l.watchKey)
}

// prefix is where the contenders for a name are.
func prefix(name string) string { return name + "/" }

// isContender tells a contender for name from what else may be under its prefix: the keys of another lock, whose name
// goes on after the slash, and keys without a lease. This is how etcd's own recipes name theirs.
func isContender(name string, kv *mvccpb.KeyValue) bool {
	rest, ok := bytes.CutPrefix(kv.Key, []byte(prefix(name)))
	return ok && kv.Lease != 0 && !bytes.Contains(rest, []byte("/"))
}

// newest reads the youngest few keys under a name, which is enough to find the nearest older contender unless there are
// many strays. Not WithKeysOnly: etcd 3.7 then says that no key has a lease.
func newest(name string, opts ...clientv3.OpOption) clientv3.Op {
	begin := prefix(name)
	return clientv3.OpGet(begin, append(opts, clientv3.WithRange(clientv3.GetPrefixRangeEnd(begin)), clientv3.WithLimit(8),
		clientv3.WithSort(clientv3.SortByCreateRevision, clientv3.SortDescend))...)
}

// nearest finds the youngest contender that is older than token in what newest read; nil if there is none.
func nearest(ctx context.Context, c *config, name string, page *etcdserverpb.RangeResponse, token Revision) (*mvccpb.KeyValue, error) {
	for _, kv := range page.Kvs {
		if kv.CreateRevision < token && isContender(name, kv) {
			return kv, nil
		}
	}
	if !page.More {
		return nil, nil
	}
	// All of the young ones are strays. How many there are is not known: read on, but not everything at once.
	all, err := query(ctx, c, func(ctx context.Context) (*clientv3.GetResponse, error) {
		return c.client.Get(ctx, prefix(name), clientv3.WithPrefix(), clientv3.WithMaxCreateRev(token-1),
			clientv3.WithLimit(16*int64(len(page.Kvs))), clientv3.WithSort(clientv3.SortByCreateRevision, clientv3.SortDescend))
	})
	if err != nil {
		return nil, err
	}
	return nearest(ctx, c, name, (*etcdserverpb.RangeResponse)(all), token)
}

// awaitGone waits until older, or the lock's own key, is gone. Where its watch is silent or fails it reads these two, and no
// more than these: a long queue would keep etcd busy by waiting.
func (l *Lock) awaitGone(ctx context.Context, older *mvccpb.KeyValue) error {
	for failed := 0; ; {
		gone, refused := l.watchOlder(ctx, older, failed)
		switch {
		case gone:
			return nil
		case ctx.Err() != nil:
			return ended(ctx)
		}
		if there, err := l.stillThere(ctx, older); err != nil || !there {
			return err
		}
		if !refused {
			failed = 0
			continue
		}
		failed++
		sleep(ctx, l.config.retry.withDefaults().backoff(failed))
	}
}

// watchOlder watches for older's end, for a while. refused says that the watch failed, as failed others did before it.
//
// The watch starts from now on, and then the key is read: a watch from a past revision is served only every 100 ms.
func (l *Lock) watchOlder(ctx context.Context, older *mvccpb.KeyValue, failed int) (gone, refused bool) {
	watching, cancel := context.WithTimeout(watchContext(ctx, failed), relook+rand.N(relook/2))
	defer cancel()
	watch := l.config.client.Watch(watching, string(older.Key), clientv3.WithCreatedNotify(), clientv3.WithFilterPut())
	for resp := range watch {
		if len(resp.Events) > 0 { // a deletion; perhaps an old one, which a watch that reconnects may replay
			return true, false
		}
		if !resp.Created {
			continue
		}
		if there, err := l.stillThere(watching, older); err != nil || !there {
			return err == nil, false
		}
	}
	return false, watching.Err() == nil
}

// stillThere reports whether both older and the lock's own key are there.
func (l *Lock) stillThere(ctx context.Context, older *mvccpb.KeyValue) (bool, error) {
	resp, err := query(ctx, &l.waiting, func(ctx context.Context) (*clientv3.TxnResponse, error) {
		return l.config.client.Txn(ctx).Then(clientv3.OpGet(l.key), clientv3.OpGet(string(older.Key))).Commit()
	})
	if err != nil {
		return false, err
	}
	now := resp.Responses[1].GetResponseRange().Kvs
	return l.mine(resp.Responses[0].GetResponseRange().Kvs) != nil &&
		len(now) > 0 && now[0].CreateRevision == older.CreateRevision && isContender(l.name, now[0]), nil
}

// look reads, at one revision, whether the lock's key is still there and which contender is the nearest older one.
func (l *Lock) look(ctx context.Context) (*mvccpb.KeyValue, error) {
	resp, err := query(ctx, &l.waiting, func(ctx context.Context) (*clientv3.TxnResponse, error) {
		return l.config.client.Txn(ctx).
			Then(clientv3.OpGet(l.key), newest(l.name, clientv3.WithMaxCreateRev(l.token-1))).
			Commit()
	})
	if err != nil {
		return nil, err
	}
	if l.mine(resp.Responses[0].GetResponseRange().Kvs) == nil {
		return nil, l.keyGone()
	}
	return nearest(ctx, &l.waiting, l.name, resp.Responses[1].GetResponseRange(), l.token)
}

// lookBefore returns the revision at which nobody held the lock or waited for it, else ErrLockHeld.
func lookBefore(ctx context.Context, c *config, name string) (Revision, error) {
	resp, err := query(ctx, c, func(ctx context.Context) (clientv3.OpResponse, error) {
		return c.client.Do(ctx, newest(name))
	})
	if err != nil {
		return 0, err
	}
	page := (*etcdserverpb.RangeResponse)(resp.Get())
	return page.Header.Revision, unheld(ctx, c, name, page)
}

func unheld(ctx context.Context, c *config, name string, page *etcdserverpb.RangeResponse) error {
	contender, err := nearest(ctx, c, name, page, math.MaxInt64)
	if err == nil && contender != nil {
		return ErrLockHeld
	}
	return err
}

// claim writes the key if nobody has queued up since nobody was seen to. What came since may be a stray: look again.
func (l *Lock) claim(ctx context.Context, seen Revision) error {
	for {
		resp, err := l.write(ctx, clientv3.Compare(clientv3.CreateRevision(prefix(l.name)), "<", seen+1).WithPrefix())
		if err != nil {
			return err
		}
		if resp.Succeeded {
			l.entered(resp.Header.Revision)
			return nil
		}
		written, contenders, err := l.found(ctx)
		if err != nil || written {
			return err
		}
		if err := unheld(ctx, &l.config, l.name, contenders); err != nil {
			return err
		}
		seen = contenders.Header.Revision
	}
}

// mine is the lock's own key in kvs; nil if it is gone, or was overwritten by somebody without the lease.
func (l *Lock) mine(kvs []*mvccpb.KeyValue) *mvccpb.KeyValue {
	for _, kv := range kvs {
		if kv.CreateRevision == l.token && clientv3.LeaseID(kv.Lease) == l.lease.id {
			return kv
		}
	}
	return nil
}

// watchKey ends the lock when its key is deleted. It runs, as the timer's goroutine, until the lock's context ends.
func (l *Lock) watchKey() {
	defer l.watching.Done()
	patient := l.config
	patient.retry = RetryPolicy{Elapsed: -1}
	for from, failed := l.token+1, 0; ; {
		began := time.Now()
		if l.deletedFrom(from, failed) {
			break
		}
		if failed++; time.Since(began) > relook { // it stood
			failed = 0
		}
		resp, err := query(l.ctx, &patient, func(ctx context.Context) (*clientv3.GetResponse, error) {
			return l.config.client.Get(ctx, l.key)
		})
		if l.Err() != nil {
			return
		}
		if err != nil {
			l.config.logger.Warn("etcdutil: lock's key can no longer be watched", "name", l.name, "error", err)
			return
		}
		if l.mine(resp.Kvs) == nil {
			break
		}
		from = resp.Header.Revision + 1
		sleep(l.ctx, patient.retry.withDefaults().backoff(failed))
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
	ctx, cancel := context.WithTimeout(l.held, 200*time.Millisecond)
	defer cancel()
	if resp, err := l.lease.config.client.TimeToLive(ctx, l.lease.id); err == nil && resp.TTL < 0 {
		l.lease.lose(ErrLeaseRevoked)
	}
	if lost := l.lost(); lost != nil {
		return lost
	}
	l.lose(nil)
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
			return ended(c)
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
	kv, err := l.read(ctx, &l.config)
	if err != nil {
		return false, fmt.Errorf("etcdutil: ask for lock %q: %w", l.name, err)
	}
	return kv != nil, nil
}

// read returns the lock's key, nil if it is gone.
func (l *Lock) read(ctx context.Context, c *config) (*mvccpb.KeyValue, error) {
	resp, err := query(ctx, c, func(ctx context.Context) (*clientv3.GetResponse, error) {
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
	l.closing.Do(func() { l.closeErr = l.release() })
	return l.closeErr
}

func (l *Lock) release() error {
	lost := l.lost()
	l.finish(ErrClosed)
	l.stop()
	var err error
	switch {
	case !l.shared:
		err = l.lease.Close()
	case lost == nil:
		err = l.deleteKey()
	default: // its key may be written late, or by somebody else; unless the lease has taken it along
		behind(l.sweepKey)
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
	l.lease.letGo(l)
	if l.watch != nil && l.watch.Stop() {
		l.watching.Done()
	}
	l.watching.Wait()
}

// deleteKey gives back a lock on a shared lease.
func (l *Lock) deleteKey() error {
	ctx, c := l.config.closing(l.ctx, time.Until(l.lease.Expiry()))
	_, err := retry(ctx, c, l.deleteOwn)
	if err != nil || l.doubt {
		go l.sweepKey() // until the lease ends, at the latest
	} else {
		l.lease.giveKey(l.key)
	}
	if err != nil {
		return fmt.Errorf("%w: lock %q is not confirmed released; its key is deleted when etcd can be reached, or is gone by %s with its lease: %w",
			ErrUnknownOutcome, l.name, l.lease.outlived(), err)
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
	defer context.AfterFunc(l.lease.held, cancel)()
	if l.doubt {
		sweep(ctx, &l.config, stragglers, func(ctx context.Context) error {
			_, err := l.config.client.Delete(ctx, l.key)
			return err
		})
		return
	}
	sweep(ctx, &l.config, 0, func(ctx context.Context) error {
		_, err := l.deleteOwn(ctx)
		if err == nil {
			l.lease.giveKey(l.key)
		}
		return err
	})
}

// maxCommitOps is etcd's limit of 128 operations in a transaction, less the one by which a Commit recognises itself.
const maxCommitOps = 127

// Commit applies ops in one transaction if and only if the lock is held, exactly once, and returns the revision.
//
// ErrLockLost and ErrClosed say that they were not applied; ErrUnknownOutcome, that they may have been: no answer came before
// ctx or the lock ended or [RetryPolicy] gave up, or the key was gone when it did. Any other error, also one from ctx, is the
// reason why they were not applied.
//
// Commits of one lock are serialised. ops are 127 at most, possibly none, and must not write the lock's own key. After
// the parent's end Commit still works, until Close or until the lease runs out: winding down may need to save its state.
// Give it then a context of its own, since ctx bounds the call.
//
// After ErrUnknownOutcome the write may still be applied, until the next Commit: before reading what that is to depend on,
// settle it by a Commit of nothing.
func (l *Lock) Commit(ctx context.Context, ops ...clientv3.Op) (Revision, error) {
	if ctx == nil {
		panic("etcdutil: nil ctx")
	}
	if err := l.checkOps(ops); err != nil {
		return 0, err
	}
	rev, err := l.exclusively(ctx, &l.config, func(ctx context.Context) (Revision, error) { return l.bump(ctx, &l.config, ops) })
	if err != nil {
		return 0, fmt.Errorf("etcdutil: commit under %q: %w", l.name, orEnded(ctx, err))
	}
	return rev, nil
}

// orEnded adds to err that ctx has ended, if it has.
func orEnded(ctx context.Context, err error) error {
	if ctx.Err() != nil && !isContextEnd(err) {
		return fmt.Errorf("%w: %w", err, ctx.Err())
	}
	return err
}

func (l *Lock) checkOps(ops []clientv3.Op) error {
	if len(ops) > maxCommitOps {
		return fmt.Errorf("etcdutil: ops: %d operations, at most %d", len(ops), maxCommitOps)
	}
	for i, op := range ops {
		if !op.IsGet() && !op.IsPut() && !op.IsDelete() && !op.IsTxn() {
			return fmt.Errorf("etcdutil: ops[%d] is not an operation", i)
		}
		if writes(op, []byte(l.key)) {
			return fmt.Errorf("etcdutil: ops[%d] writes the lock's own key %q", i, l.key)
		}
	}
	return nil
}

// writes reports whether op may write key.
func writes(op clientv3.Op, key []byte) bool {
	switch {
	case op.IsTxn():
		_, then, otherwise := op.Txn()
		for _, nested := range append(append([]clientv3.Op{}, then...), otherwise...) {
			if writes(nested, key) {
				return true
			}
		}
		return false
	case op.IsGet():
		return false
	}
	begin, end := op.KeyBytes(), op.RangeBytes()
	switch {
	case len(end) == 0:
		return bytes.Equal(begin, key)
	case bytes.Equal(end, []byte{0}): // to the end of the keyspace
		return bytes.Compare(begin, key) <= 0
	}
	return bytes.Compare(begin, key) <= 0 && bytes.Compare(key, end) < 0
}

// lastAnswer is how long the answer to a transaction is waited for that was under way when the lock was lost. It is most
// often about to come, and says what became of it.
const lastAnswer = 200 * time.Millisecond

// exclusively runs a transaction under the lock: alone, with nothing left that an earlier one has sent and that may yet be
// applied, and in a context that ends soon after the lock is lost.
func (l *Lock) exclusively(ctx context.Context, c *config, f func(ctx context.Context) (Revision, error)) (Revision, error) {
	if elapsed := c.retry.withDefaults().Elapsed; elapsed > 0 { // all of this is one call
		var stop context.CancelFunc
		ctx, stop = context.WithTimeoutCause(ctx, elapsed, fmt.Errorf("etcdutil: gave up after %v", elapsed))
		defer stop()
	}
	select {
	case l.committing <- struct{}{}:
		defer func() { <-l.committing }()
	case <-ctx.Done():
		return 0, ended(ctx)
	}
	if lost := l.lost(); lost != nil {
		return 0, lost
	}
	held, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(l.held, func() {
		sleep(held, lastAnswer)
		cancel(context.Cause(l.held))
	})()
	if l.unsettled {
		// What was sent before compares the version, so it can no longer be applied once that is bumped.
		if _, err := l.bump(held, c, nil); err != nil {
			return 0, l.definite(fmt.Errorf("nothing sent, because an earlier outcome is still open: %w", notUnknown(err)))
		}
	}
	return f(held)
}

// notUnknown is err without ErrUnknownOutcome, which is not said of what was not sent.
func notUnknown(err error) error {
	if errors.Is(err, ErrUnknownOutcome) {
		return errors.New(err.Error())
	}
	return err
}

// isCurrent compares whether the lock is held, and nothing was committed since what is known of it: a key that was deleted and
// created again has another revision as well.
func (l *Lock) isCurrent() clientv3.Cmp {
	return clientv3.Compare(clientv3.ModRevision(l.key), "=", l.revision)
}

// bump applies ops and raises the version of the lock's key in one transaction, if that is current. By the version, one read
// tells after a lost answer whether it was applied: nobody else raises it.
func (l *Lock) bump(ctx context.Context, c *config, ops []clientv3.Op) (Revision, error) {
	then := append(append([]clientv3.Op{}, ops...),
		clientv3.OpPut(l.key, "", clientv3.WithIgnoreValue(), clientv3.WithIgnoreLease()))
	resp, d, err := l.transact(ctx, c, []clientv3.Cmp{l.isCurrent()}, then)
	switch {
	case err != nil && !d.applied:
		l.unsettled = true // clientv3 may have sent it twice by itself, and tells only how the second one fared
		return 0, l.definite(err)
	case err == nil && resp.Succeeded:
		return l.settled(resp.Header.Revision), nil
	}
	return l.readBack(ctx, c, err, d)
}

// doubt is what the attempts at a transaction leave open that were not answered.
type doubt struct {
	applied   bool // one of them may have been applied
	straggler bool // one may yet be
}

// transact repeats a guarded transaction until it is answered.
func (l *Lock) transact(ctx context.Context, c *config, guards []clientv3.Cmp, then []clientv3.Op) (*clientv3.TxnResponse, doubt, error) {
	var d doubt
	resp, err := retry(ctx, c, func(ctx context.Context) (*clientv3.TxnResponse, error) {
		resp, err := l.config.client.Txn(ctx).If(guards...).Then(then...).Commit()
		if IsAmbiguous(err) {
			d.applied = true
			// Without space left etcd may have applied it, but will not do so later.
			d.straggler = d.straggler || !errors.Is(err, rpctypes.ErrNoSpace)
		}
		return resp, err
	})
	return resp, d, err
}

func (l *Lock) settled(rev Revision) Revision {
	l.version++
	l.revision = rev
	l.unsettled = false
	return rev
}

// definite is the error for what was not applied.
func (l *Lock) definite(err error) error {
	if lost := l.lost(); lost != nil {
		return lost
	}
	return err
}

// unknown is the error for what may have been applied. It must not wrap what ended the lock: ErrLockLost would say that
// it was not.
func (l *Lock) unknown(why any) error {
	l.unsettled = true
	return fmt.Errorf("%w: %v", ErrUnknownOutcome, why)
}

// errRefused says that guards did not hold.
var errRefused = errors.New("refused, although nothing has changed")

// readBack tells whether a transaction was applied that was refused by its guard, or else failed with err.
func (l *Lock) readBack(ctx context.Context, c *config, err error, d doubt) (Revision, error) {
	kv, readErr := l.read(ctx, c)
	switch {
	case readErr != nil: // a refusal may be that of clientv3's own repetition
		return 0, l.unknown(cmp.Or(err, readErr))
	case kv == nil && !d.applied:
		return 0, l.keyGone()
	case kv == nil:
		_ = l.keyGone()
		return 0, l.unknown("the lock's key is gone")
	case kv.Version == l.version+1 && string(kv.Value) == l.value:
		return l.settled(kv.ModRevision), nil
	case kv.ModRevision != l.revision:
		l.version, l.revision = kv.Version, kv.ModRevision
		return 0, l.unknown("the lock's key was written by somebody else")
	case d.straggler || err == nil:
		return 0, l.unknown(cmp.Or(err, errRefused))
	}
	return 0, err
}
