package etcdutil

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// Lead runs fn whenever this process holds the lock of this name: it waits its turn, runs fn under
// the lock's context, waits for fn, and releases. That context ends before another process leads,
// unless somebody deletes or overwrites the lock's key or revokes its lease, etcd is restored from
// a backup, or the clocks drift by more than the margin. An overwritten key need not end the
// context. [Lock.Commit] notices it.
//
//	err := etcdutil.Lead(ctx, client, "scheduler/leader", func(ctx context.Context) error {
//		return schedule(ctx) // canceled when this process no longer surely leads
//	}, etcdutil.WithValue(hostname))
//
// fn resigns by returning. For fenced writes it gets its lock by [LockFrom]. If fn panics, Lead
// releases the lock and the panic continues. A nil ctx, client or fn panics.
//
// If the lock is lost before fn has returned, Lead ignores fn's result, even nil, and waits its
// turn again. Lead outlives everything that can pass: outages of any length, a lost lease, a
// deleted key, a restored etcd, an etcd without space. It pauses between two attempts as
// [RetryPolicy] says: longer each time, with jitter. If a policy sets Attempts or Elapsed, it
// bounds each request of Lead, and Lead returns when one gives up. The defaults do not end it.
// [WithAcquireTimeout] bounds each wait for a turn, outages included.
//
// ctx is the parent of each lock. When it ends, so does fn's context. Lead returns when fn has and
// the lock is released, for which it waits as long as [Lock.Close] does. While it waits for its
// turn it returns within 100 ms, and removes its key in the background if necessary.
//
// Lead returns nil if fn returns nil while the lock is held, and else:
//   - fn's error if the lock was still held.
//   - ctx's end: an error that Is both ctx.Err() and context.Cause(ctx).
//   - context.DeadlineExceeded if WithAcquireTimeout has passed.
//   - [ErrInvalidName], or an error that names the argument.
//   - [ErrLockHeld] under the context of a lock of the same name.
//   - rpctypes.ErrPermissionDenied, and whatever else etcd refuses for good.
//   - An error if the client was closed.
//   - [ErrLeaseExpired], [ErrLeaseRevoked], [ErrClosed] or its parent's end if the lease of
//     [WithLease] has ended.
//
// If etcd does not confirm a release, Lead returns the same. The next leader then waits for the end
// of the lease.
func Lead(ctx context.Context, client *clientv3.Client, name string, fn func(ctx context.Context) error, opts ...LockOption) error {
	if fn == nil {
		panic("etcdutil: nil fn")
	}
	c, err := newLockConfig(ctx, client, name, opts)
	if err != nil {
		return err
	}
	policy := c.retry.withDefaults()
	waiting := time.Now()
	for failed := 1; ; failed++ {
		began := time.Now()
		lock, err := Acquire(ctx, client, name, append(opts[:len(opts):len(opts)], c.attempt(waiting))...)
		switch {
		case err == nil:
			lost, err := lead(ctx, lock, fn)
			if !lost {
				return err
			}
			waiting = time.Now()
		case !c.canCampaign(ctx, waiting, err):
			return errorf("%w", withContextError(ctx, err))
		default:
			c.reporter.retrying(RetryEvent{Op: "lead", Attempt: failed, Err: err})
		}
		if time.Since(began) > policy.Max {
			failed = 0 // it led or waited for a while: the next fault is another
		}
		sleep(ctx, policy.backoff(failed))
	}
}

// lead runs fn for as long as the lock is held. lost reports that the lock was lost before fn's
// result could count.
func lead(ctx context.Context, lock *Lock, fn func(ctx context.Context) error) (lost bool, err error) {
	defer lock.Close() // also if fn panics
	err = lock.Do(ctx, fn)
	return errors.Is(lock.stopCause(), ErrLockLost), err
}

// attempt returns the options of one of Lead's attempts, all of which report to one reporter.
// waiting is when this process began to wait.
func (c *lockConfig) attempt(waiting time.Time) LockOption {
	return lockOption(func(attempt *lockConfig) {
		attempt.reporter = c.reporter
		if c.timeout != nil {
			left := max(*c.timeout-time.Since(waiting), 1)
			attempt.timeout = &left
		}
	})
}

// canCampaign reports whether another Acquire can succeed after one that failed with err. waiting
// is when this process began to wait.
func (c *lockConfig) canCampaign(ctx context.Context, waiting time.Time, err error) bool {
	switch {
	case ctx.Err() != nil || c.client.Ctx().Err() != nil:
		return false
	case c.shared && (c.lease.stopCause() != nil || c.lease.Err() != nil):
		return false
	case errors.Is(err, ErrLockLost), errors.Is(err, ErrLeaseExpired), errors.Is(err, rpctypes.ErrNoSpace):
		return true
	case c.timeout != nil && errors.Is(err, context.DeadlineExceeded) && time.Since(waiting) >= *c.timeout:
		return false
	case c.retry.Attempts != 0 || c.retry.Elapsed != 0:
		return false
	}
	return IsTransient(err) || isContextError(err) // the default policy gave up
}

// A Contender is the holder of a lock, or a leader, as [Holder] and [WatchHolder] report it.
type Contender struct {
	// Name is the name of the lock.
	Name string
	// Key is the contender's key in etcd.
	Key string
	// Value is the value of that key: what [WithValue] or concurrency.Election's Campaign has set.
	Value string
	// Token is the contender's fencing token: its key's create revision.
	Token Revision
	// Lease is the lease that the key is attached to.
	Lease clientv3.LeaseID
}

func contenderOf(name string, kv *mvccpb.KeyValue) Contender {
	return Contender{
		Name:  name,
		Key:   string(kv.Key),
		Value: string(kv.Value),
		Token: kv.CreateRevision,
		Lease: clientv3.LeaseID(kv.Lease),
	}
}

// Holder returns who holds the lock of this name, or leads by it: the oldest contender. That may be
// one of concurrency.Mutex, concurrency.Election, etcdctl lock or etcdctl elect. Keys without a
// lease are not contenders, and neither are locks whose name begins with name and a slash.
//
// The result may be out of date when it arrives. Holder sends two small requests, however many
// contend, and does not read the values of other keys below the name. If the holder was gone before
// the second one, it reads up to 8 keys with their values. A nil ctx or client panics.
//
// Errors:
//   - [ErrNoHolder] if nobody holds it.
//   - [ErrInvalidName] if name is not allowed.
//   - rpctypes.ErrPermissionDenied if the keys below the name may not be read.
//   - ctx's end, or what etcd answered when [RetryPolicy] gave up.
func Holder(ctx context.Context, client *clientv3.Client, name string, opts ...RetryOption) (Contender, error) {
	if err := requireClient(ctx, client); err != nil {
		return Contender{}, err
	}
	c := newConfig(client)
	for _, o := range opts {
		o.applyRetry(&c)
	}
	c.finish()
	if err := validateName(name); err != nil {
		return Contender{}, err
	}
	if err := c.retry.validate(); err != nil {
		return Contender{}, err
	}
	kv, _, err := oldestContender(ctx, &c, name)
	switch {
	case err != nil:
		return Contender{}, errorf("read the holder of %q: %w", name, err)
	case kv == nil:
		return Contender{}, fmt.Errorf("%w %q", ErrNoHolder, name)
	}
	return contenderOf(name, kv), nil
}

const (
	firstKeys   = 8    // read at once; more only where there are so many strays
	maxKeys     = 1000 // read at once
	leaseChecks = 100  // in one transaction, of which etcd takes 128 operations
)

// oldestContender returns the oldest contender for name, or nil, and a revision up to which no
// later change is in it. Where holders follow each other faster than two requests, it reads values
// from the second scan on.
func oldestContender(ctx context.Context, c *config, name string) (*mvccpb.KeyValue, Revision, error) {
	var gone Revision
	for {
		s := holderScan{c: c, name: name}
		kv, rev, err := s.run(ctx, gone)
		if err != nil || kv != nil || s.gone == 0 {
			return kv, rev, err
		}
		gone = s.gone
	}
}

// A holderScan looks for the oldest contender once.
//
// It reads keys without values, because strays may be large and many. etcd 3.7 then returns no
// leases either, so it asks for these by comparisons.
type holderScan struct {
	c    *config
	name string

	// gone is the create revision of the first key that was seen and then gone: the scan may have
	// missed its successor. 0 if there was none.
	gone Revision
}

// run scans. gone is what an earlier scan has found, or 0: keys that are older are strays.
func (s *holderScan) run(ctx context.Context, gone Revision) (*mvccpb.KeyValue, Revision, error) {
	if gone != 0 {
		page, err := s.oldestKeys(ctx, gone, firstKeys)
		switch {
		case isTooLarge(err): // the values of strays
			return s.scan(ctx)
		case err != nil:
			return nil, 0, err
		}
		rev := page.Header.Revision
		for _, kv := range olderChildren(s.name, page.Kvs, math.MaxInt64) {
			if kv.Lease != 0 {
				return kv, rev, nil
			}
		}
		if rev >= gone && !page.More { // else etcd was restored, or there are strays
			return nil, rev, nil
		}
	}
	return s.scan(ctx)
}

// scan reads keys without values.
func (s *holderScan) scan(ctx context.Context) (*mvccpb.KeyValue, Revision, error) {
	var seen, from Revision
	for limit := int64(firstKeys); ; limit = min(8*limit, maxKeys) {
		page, err := s.oldestKeys(ctx, from, limit, clientv3.WithKeysOnly())
		if err != nil {
			return nil, 0, err
		}
		if seen == 0 {
			seen = page.Header.Revision
		}
		kv, rev, err := s.firstLeased(ctx, olderChildren(s.name, page.Kvs, math.MaxInt64))
		switch {
		case err != nil:
			return nil, 0, err
		case kv != nil:
			return kv, rev, nil
		case !page.More:
			return nil, seen, nil
		}
		// The next page begins at the same revision: one transaction can create several keys.
		first, last := page.Kvs[0].CreateRevision, page.Kvs[len(page.Kvs)-1].CreateRevision
		if from = last; first == last && limit == maxKeys {
			from++
		}
	}
}

// oldestKeys reads the oldest keys below the name, from a create revision on.
func (s *holderScan) oldestKeys(ctx context.Context, from Revision, limit int64, opts ...clientv3.OpOption) (*clientv3.GetResponse, error) {
	opts = append(opts, clientv3.WithPrefix(), clientv3.WithMinCreateRev(from), clientv3.WithLimit(limit),
		clientv3.WithSort(clientv3.SortByCreateRevision, clientv3.SortAscend))
	return retry(ctx, s.c, s.c.retry, "read the holder", func(ctx context.Context) (*clientv3.GetResponse, error) {
		return s.c.client.Get(ctx, prefix(s.name), opts...)
	})
}

// firstLeased returns the first of keys that has a lease, with its value, and the revision at which
// that was so; nil if none has one.
func (s *holderScan) firstLeased(ctx context.Context, keys []*mvccpb.KeyValue) (*mvccpb.KeyValue, Revision, error) {
	for len(keys) > 0 {
		kv, rev, err := s.getLeased(ctx, keys[0])
		if kv != nil || err != nil {
			return kv, rev, err
		}
		if keys, err = s.skipStrays(ctx, keys[1:]); err != nil {
			return nil, 0, err
		}
	}
	return nil, 0, nil
}

// getLeased reads a key if it has a lease and is still the one that was seen.
func (s *holderScan) getLeased(ctx context.Context, kv *mvccpb.KeyValue) (*mvccpb.KeyValue, Revision, error) {
	resp, err := retry(ctx, s.c, s.c.retry, "read the holder", func(ctx context.Context) (*clientv3.TxnResponse, error) {
		return s.c.client.Txn(ctx).If(stillLeased(kv)...).Then(clientv3.OpGet(string(kv.Key))).Else(getMeta(kv)).Commit()
	})
	if err != nil {
		return nil, 0, err
	}
	got := resp.Responses[0].GetResponseRange().Kvs
	if resp.Succeeded {
		return got[0], resp.Header.Revision, nil
	}
	s.noteStray(kv, got)
	return nil, 0, nil
}

// skipStrays returns keys from the first one with a lease on, as far as one transaction can look.
func (s *holderScan) skipStrays(ctx context.Context, keys []*mvccpb.KeyValue) ([]*mvccpb.KeyValue, error) {
	if len(keys) == 0 {
		return nil, nil
	}
	checks := make([]clientv3.Op, min(len(keys), leaseChecks))
	for i := range checks {
		checks[i] = clientv3.OpTxn(stillLeased(keys[i]), nil, []clientv3.Op{getMeta(keys[i])})
	}
	resp, err := retry(ctx, s.c, s.c.retry, "read the holder", func(ctx context.Context) (*clientv3.TxnResponse, error) {
		return s.c.client.Txn(ctx).Then(checks...).Commit()
	})
	if err != nil {
		return nil, err
	}
	for i, r := range resp.Responses {
		check := r.GetResponseTxn()
		if check.Succeeded {
			return keys[i:], nil
		}
		s.noteStray(keys[i], check.Responses[0].GetResponseRange().Kvs)
	}
	return keys[len(checks):], nil
}

// noteStray notes whether a key without a lease is the one that was seen.
func (s *holderScan) noteStray(seen *mvccpb.KeyValue, now []*mvccpb.KeyValue) {
	if s.gone == 0 && (len(now) == 0 || now[0].CreateRevision != seen.CreateRevision) {
		s.gone = seen.CreateRevision
	}
}

func getMeta(kv *mvccpb.KeyValue) clientv3.Op {
	return clientv3.OpGet(string(kv.Key), clientv3.WithKeysOnly())
}

// WatchHolder follows who holds the lock of this name, or leads by it. Read [Watcher.Events]; Close
// the watcher, or end ctx, when you are done. It sends:
//   - EventPut for each new holder, and when a holder changes its value. Value is the [Contender].
//   - EventDelete when the holder is gone and nobody follows. Key is that of the last holder.
//   - EventSynced after the first look, and after each look that follows missed changes. Before the
//     first one comes an EventPut if somebody holds the lock.
//
// A waiter is never sent as the holder, nor is the key of somebody else below the name: see
// [Holder]. If one holder follows another at once there is no EventDelete between them. A holder
// may be left out if the next one follows before it was read. A vacancy is sent within 1 s while
// etcd can be reached.
//
// Event.Revision and [Watcher.Revision] are revisions at which this was so. Event.Version is
// that of the holder's key. The watcher outlives outages, compaction and restores, like one with
// WithSnapshot. It costs one watch and, for each new holder, two small requests, however many
// contend. While nobody holds the lock it watches all keys below the name.
//
// [WithPrev] sets Event.Prev to the holder before. [WithSnapshot] has no effect. Every [Option]
// works as in [Watch]. A nil ctx or client panics.
//
// Errors:
//   - [ErrInvalidName], or an error that names the option: WithPrefix, WithRevision and WithCodec
//     are refused.
//   - rpctypes.ErrPermissionDenied, which also ends the watcher later.
//   - ctx's end, or what etcd answered when [RetryPolicy] gave up, which bounds this call only.
func WatchHolder(ctx context.Context, client *clientv3.Client, name string, opts ...WatchOption) (*Watcher[Contender], error) {
	if err := requireClient(ctx, client); err != nil {
		return nil, err
	}
	c := watchConfig{config: newConfig(client)}
	for _, o := range opts {
		o.applyWatch(&c)
	}
	c.finish()
	if err := c.validateHolder(name); err != nil {
		return nil, err
	}
	kv, rev, err := oldestContender(ctx, &c.config, name)
	if err != nil {
		return nil, errorf("watch the holder of %q: %w", name, err)
	}
	decode := func(kv *mvccpb.KeyValue) (Contender, error) { return contenderOf(name, kv), nil }
	return newFedWatcher(ctx, decode, func(ctx context.Context, q *queue) {
		f := &holderFeed{watchConfig: c, name: name, queue: q}
		f.retry = untilDone
		f.send(kv, rev, true)
		f.run(ctx)
	}), nil
}

func (c *watchConfig) validateHolder(name string) error {
	if err := validateName(name); err != nil {
		return err
	}
	for option, given := range map[string]bool{
		"WithPrefix":   c.prefix,
		"WithRevision": c.from != 0,
		"WithCodec":    c.codec != nil,
	} {
		if given {
			return fmt.Errorf("etcdutil: %s cannot be used with WatchHolder", option)
		}
	}
	return c.retry.validate()
}

// A holderFeed follows who holds a lock, and queues what has changed. It watches the holder's key,
// so that waiters cost nothing, or all keys below the name while there is no holder.
type holderFeed struct {
	watchConfig
	name  string
	queue *queue

	holder *mvccpb.KeyValue // as last sent; nil if there is none
	at     Revision         // when that was so
	paused bool             // meanwhile the reader had the feed wait, long enough for a restore
}

func (f *holderFeed) run(ctx context.Context) {
	for {
		err := f.follow(ctx)
		switch {
		case err == nil:
		case errors.Is(err, errHolderGone):
			err = f.look(ctx, false)
		case errors.Is(err, ErrGap):
			f.reporter.watchResynced(WatchEvent{Key: f.name, Err: err})
			sleep(ctx, f.retry.withDefaults().backoff(1))
			err = f.look(ctx, true)
		}
		if err != nil {
			f.end(ctx, err)
			return
		}
		f.awaitRoom(ctx)
	}
}

// awaitRoom waits for the reader.
func (f *holderFeed) awaitRoom(ctx context.Context) {
	began := time.Now()
	f.queue.awaitRoom(ctx)
	f.paused = f.paused || time.Since(began) > restoreTime
}

// look reads who holds the lock, and queues what is new.
func (f *holderFeed) look(ctx context.Context, synced bool) error {
	kv, rev, err := oldestContender(ctx, &f.config, f.name)
	if err == nil {
		f.send(kv, rev, synced)
	}
	return err
}

// end queues why the feed ended, unless its context did.
func (f *holderFeed) end(ctx context.Context, err error) {
	if ctx.Err() == nil {
		f.queue.push(change{end: errorf("watch the holder of %q: %w", f.name, err)})
	}
}

// send queues the difference between the holder that was sent last and kv, as of revision rev.
func (f *holderFeed) send(kv *mvccpb.KeyValue, rev Revision, synced bool) {
	var changes []change
	switch {
	case kv == nil && f.holder != nil:
		changes = append(changes, f.change(EventDelete, &mvccpb.KeyValue{Key: f.holder.Key, ModRevision: rev}))
	case kv != nil && !sameHolder(kv, f.holder):
		changes = append(changes, f.change(EventPut, &mvccpb.KeyValue{
			Key: kv.Key, Value: kv.Value, CreateRevision: kv.CreateRevision, ModRevision: rev, Version: kv.Version, Lease: kv.Lease,
		}))
	}
	if synced {
		changes = append(changes, change{kind: EventSynced})
	}
	if len(changes) == 0 {
		changes = append(changes, change{})
	}
	changes[len(changes)-1].upTo = rev
	f.queue.push(changes...)
	f.holder, f.at = kv, rev
}

func (f *holderFeed) change(kind EventType, kv *mvccpb.KeyValue) change {
	c := change{kind: kind, kv: kv}
	if f.prev {
		c.prev = f.holder
	}
	return c
}

// sameHolder reports whether a and b are one holder with one value. Its version may differ: each
// Commit raises it.
func sameHolder(a, b *mvccpb.KeyValue) bool {
	return b != nil && a.CreateRevision == b.CreateRevision && a.Lease == b.Lease &&
		bytes.Equal(a.Key, b.Key) && bytes.Equal(a.Value, b.Value)
}

// errHolderGone says that the holder's key was deleted, or has lost its lease.
var errHolderGone = errors.New("etcdutil: the holder is gone")

// follow watches from the last revision on, and queues what is new. It returns nil when another key
// is to be watched, and else why the watch ended.
func (f *holderFeed) follow(ctx context.Context) error {
	c := f.watchConfig
	c.snapshot, c.prev, c.from = false, false, f.at+1
	key, next := prefix(f.name), f.whileVacant
	if c.prefix = f.holder == nil; !c.prefix {
		key, next = string(f.holder.Key), f.whileHeld
	}
	began := time.Now()
	w, err := newWatcherOf(ctx, key, &c, func(kv *mvccpb.KeyValue) (*mvccpb.KeyValue, error) { return kv, nil })
	if err != nil {
		return err
	}
	defer w.Close()
	if f.paused || time.Since(began) > restoreTime {
		if err := f.recheck(ctx); err != nil {
			return err
		}
		f.paused = false
	}
	for e := range w.Events() {
		if done, err := next(e); done || err != nil {
			return err
		}
		f.awaitRoom(ctx)
	}
	return context.Cause(w)
}

// restoreTime is less than it takes to restore etcd. A watch that stands sooner continues the
// history that was looked at.
const restoreTime = time.Second

// recheck looks again. It returns ErrGap if etcd has gone back, and errHolderGone if the last look
// is out of date.
func (f *holderFeed) recheck(ctx context.Context) error {
	kv, rev, err := oldestContender(ctx, &f.config, f.name)
	switch {
	case err != nil:
		return err
	case rev < f.at:
		return fmt.Errorf("%w: etcd was restored", ErrGap)
	case (kv == nil) != (f.holder == nil), kv != nil && !sameHolder(kv, f.holder):
		return errHolderGone
	}
	return nil
}

// whileVacant takes a change of any key below the name. The first contender is the holder.
func (f *holderFeed) whileVacant(e Event[*mvccpb.KeyValue]) (done bool, err error) {
	if e.Type != EventPut || e.Value.Lease == 0 || len(olderChildren(f.name, []*mvccpb.KeyValue{e.Value}, math.MaxInt64)) == 0 {
		f.send(nil, e.Revision-1, false) // its transaction may go on
		return false, nil
	}
	f.send(e.Value, e.Revision, false)
	return true, nil
}

// whileHeld takes a change of the holder's key.
func (f *holderFeed) whileHeld(e Event[*mvccpb.KeyValue]) (done bool, err error) {
	if e.Type != EventPut || e.Value.Lease == 0 || e.Value.CreateRevision != f.holder.CreateRevision {
		return true, errHolderGone
	}
	f.send(e.Value, e.Revision, false)
	return false, nil
}
