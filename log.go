package etcdutil

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"sync"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// A LogOption shapes a log's writer or reader.
type LogOption interface{ applyLog(*logConfig) }

type logConfig struct {
	watchConfig
	every *Revision // nil: the latest entry alone
}

type logOption func(*logConfig)

func (o logOption) applyLog(c *logConfig) { o(c) }

func (o codecOption) applyLog(c *logConfig) { c.codec = o.codec }

// WithEveryEntry has a reader read every entry from this revision on, inclusive, in order, instead of the latest: 0 is from the
// first entry of the log as it is, which may have been deleted before. A negative one is refused, and so is the option
// for a writer. Where entries were compacted, the reader ends with ErrGap; it is ErrGap as well if etcd has compacted the
// revision to begin with, be there entries or not.
func WithEveryEntry(from Revision) LogOption {
	return logOption(func(c *logConfig) { c.every = &from })
}

func (c *logConfig) validate(name string) error {
	if err := validateName(name); err != nil {
		return err
	}
	if c.every != nil {
		if *c.every < 0 {
			return fmt.Errorf("etcdutil: WithEveryEntry is negative: %d", *c.every)
		}
		c.from = *c.every
	}
	c.snapshot = c.every == nil
	return c.watchConfig.validate(name)
}

// Entry is an entry of a log.
type Entry[T any] struct {
	Value T
	// Version is 1 for the first entry, and grows by one with each. It begins again when the log, that is its key, is deleted.
	Version int64
	// Revision is the store's when the entry was written.
	Revision Revision
}

// LogWriter writes a log under a lock. [NewLogWriter] makes it; it ends with the lock, or on Close.
//
// It is a context.Context, derived from the lock; context.Cause returns why it ended. All methods are
// safe for concurrent use; writes take turns.
type LogWriter[T any] struct {
	lifetime
	config  config
	codec   Codec
	lock    *Lock
	name    string
	closing sync.Once
	lost    error // of the lock, before Close

	turn     chan struct{} // held by the Write that is under way; guards the fields below
	last     position
	pending  *string // the value of a write whose outcome is unknown, nil if there is none
	conflict error   // somebody else has written the log
}

// position is where a log ends: its last entry's version and revision, and the revision of the first
// entry. It is zero if there is none.
type position struct {
	version  int64
	revision Revision
	created  Revision
}

func positionOf(kv *mvccpb.KeyValue) position {
	if kv == nil {
		return position{}
	}
	return position{kv.Version, kv.ModRevision, kv.CreateRevision}
}

// NewLogWriter returns a writer of the log of this name, a key that only the holder of lock may write.
// The writer's parent is the lock. ctx bounds only this call, which reads where the log ends. The
// writer retries and logs as the lock does, unless opts say otherwise.
//
// A log is one key, and its history goes when etcd is compacted: it is no archive. Use [Lock.Commit]
// with keys of their own for what must be kept.
//
// Errors:
//   - [ErrInvalidName] if name is not allowed.
//   - [ErrLockLost] or [ErrClosed] if the lock is not held. A nil lock is refused.
//   - ctx's end, or what etcd answered.
func NewLogWriter[T any](ctx context.Context, lock *Lock, name string, opts ...LogOption) (*LogWriter[T], error) {
	if ctx == nil {
		panic("etcdutil: nil ctx")
	}
	if lock == nil {
		return nil, errorf("lock is nil")
	}
	c := logConfig{watchConfig: watchConfig{config: lock.config, codec: JSON}}
	for _, o := range opts {
		o.applyLog(&c)
	}
	c.finish()
	switch err := c.validate(name); {
	case err != nil:
		return nil, err
	case c.every != nil:
		return nil, errorf("WithEveryEntry is for readers")
	case name == lock.Key():
		return nil, errorf("name is the lock's own key %q", name)
	}
	w := &LogWriter[T]{config: c.config, codec: c.codec, lock: lock, name: name, turn: make(chan struct{}, 1)}
	// An earlier writer under this lock may have left a write pending, which do rules out.
	err := lock.fence.do(ctx, w.config.retry, func(ctx context.Context) error {
		entry, err := w.read(ctx)
		w.last = positionOf(entry)
		return lock.fence.lostOr(err)
	})
	if err != nil {
		return nil, errorf("write log %q: %w", name, withContextError(ctx, err))
	}
	w.init(lock)
	return w, nil
}

// read returns the last entry, nil if there is none.
func (w *LogWriter[T]) read(ctx context.Context) (*mvccpb.KeyValue, error) {
	resp, err := retryRead(ctx, &w.config, w.config.retry, "read log", func(ctx context.Context) (*clientv3.GetResponse, error) {
		return w.config.client.Get(ctx, w.name)
	})
	if err != nil {
		return nil, err
	}
	return first(resp.Kvs), nil
}

// Write appends v, exactly once, and returns its version. It is a [Lock.Commit] that also compares the
// log, and works as long as that does: also after the end of the lock's parent, but not after Close.
//
// A log that was deleted is no conflict: it starts again at version 1. An entry of the same bytes,
// which somebody else has written in place of this one, is taken for it.
//
// Errors:
//   - [ErrLockLost] or [ErrClosed] if the lock or the writer has ended. Nothing was written.
//   - [ErrLogConflict] if the log was written by somebody else. Nothing was written, and the lock may
//     still be held. Every later Write returns it too: another NewLogWriter goes on from what is there.
//   - [ErrUnknownOutcome] if v may have been written. The next Write finds that out first.
//   - Any other error says why nothing was written: v cannot be encoded, or is too large for etcd (1.5 MB
//     unless configured).
func (w *LogWriter[T]) Write(ctx context.Context, v T) (version int64, err error) {
	if ctx == nil {
		panic("etcdutil: nil ctx")
	}
	data, err := encode(w.codec, v)
	if err != nil {
		return 0, errorf("write log %q: v cannot be encoded: %w", w.name, err)
	}
	select {
	case w.turn <- struct{}{}:
		defer func() { <-w.turn }()
	case <-ctx.Done():
		return 0, errorf("write log %q: %w", w.name, contextError(ctx))
	}
	if err := w.write(ctx, string(data)); err != nil {
		return 0, errorf("write log %q (%d bytes): %w", w.name, len(data), withContextError(ctx, err))
	}
	return w.last.version, nil
}

// encode encodes v. A codec that panics returns an error, too.
func encode(codec Codec, v any) (data []byte, err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("the codec panicked: %v", r)
		}
	}()
	return codec.Marshal(v)
}

func (w *LogWriter[T]) write(ctx context.Context, data string) error {
	if closed := context.Cause(w.stopCtx); closed != nil {
		return closed
	}
	return w.lock.fence.do(ctx, w.config.retry, func(ctx context.Context) error {
		if err := w.resolvePending(ctx); err != nil {
			return err
		}
		return w.append(ctx, data)
	})
}

// resolvePending finds out what became of a write of unknown outcome. It can no longer be applied late.
func (w *LogWriter[T]) resolvePending(ctx context.Context) error {
	if w.pending == nil {
		return w.conflict
	}
	entry, err := w.read(ctx)
	if err != nil {
		return w.lock.fence.lostOr(err)
	}
	if entry != nil && positionOf(entry) != w.last && !w.last.precedes(entry, *w.pending) {
		w.conflict = conflictAt(entry)
	}
	w.last, w.pending = positionOf(entry), nil
	return w.conflict
}

// precedes reports whether an entry, nil if there is none, is the next one, and of this value.
func (p position) precedes(entry *mvccpb.KeyValue, data string) bool {
	return entry != nil && entry.Version == p.version+1 && string(entry.Value) == data
}

func conflictAt(entry *mvccpb.KeyValue) error {
	return errorf("%w: it is at version %d, revision %d", ErrLogConflict, entry.Version, entry.ModRevision)
}

// append writes the next entry, if the lock is held and the log ends where it did. It is done like a
// Commit, but after a lost answer it is the log that shows the outcome: one put is enough.
func (w *LogWriter[T]) append(ctx context.Context, data string) error {
	for {
		resp, r, err := w.lock.fence.txn(ctx, w.config.retry, txnRequest{
			guards: []clientv3.Cmp{w.lock.fence.unchanged(), clientv3.Compare(clientv3.ModRevision(w.name), "=", w.last.revision)},
			then:   []clientv3.Op{clientv3.OpPut(w.name, data)},
		})
		switch {
		case err != nil && !r.mayBeApplied:
			return w.lock.fence.lostOr(err)
		case err == nil && resp.Succeeded:
			rev := resp.Header.Revision
			w.last = position{w.last.version + 1, rev, cmp.Or(w.last.created, rev)}
			return nil
		}
		if again, err := w.settle(ctx, r, data, err); !again {
			return err
		}
	}
}

// settle finds out what became of a transaction that was refused, or else failed with failure. It
// reports whether to try it again.
func (w *LogWriter[T]) settle(ctx context.Context, r txnResult, data string, failure error) (again bool, err error) {
	entry, key, err := w.readForResolve(ctx, r)
	if err != nil {
		return false, w.unknownOutcome(data, cmp.Or(failure, err))
	}
	switch w.last.resolve(r, data, failure, entry, key != nil) {
	case verdictApplied:
		w.last = positionOf(entry)
		return false, nil
	case verdictNotApplied:
		return false, failure
	case verdictLost:
		return false, w.lock.keyDeleted()
	case verdictGone:
		_ = w.lock.keyDeleted()
		return false, w.unknownOutcome(data, "the lock's key is gone")
	case verdictConflict:
		w.conflict = conflictAt(entry)
		return false, w.conflict
	case verdictRetry:
		w.last = positionOf(entry)
		w.lock.fence.adopt(key)
		return true, nil
	}
	return false, w.unknownOutcome(data, "the log was deleted, or went on, meanwhile")
}

// Verdicts on the transactions of a log.
const (
	verdictConflict verdict = iota + 100 // not applied, because somebody else has written the log
	verdictRetry                         // not applied, because the log or the lock's key is another
)

// resolve decides what became of a transaction after which the log ends with entry, nil if it is
// empty, and the lock's key is there or not. No sending of it can be applied any more.
func (p position) resolve(r txnResult, data string, failure error, entry *mvccpb.KeyValue, held bool) verdict {
	now := positionOf(entry)
	switch {
	case p.precedes(entry, data) && !held:
		return verdictGone // the next holder may have written the same
	case p.precedes(entry, data):
		return verdictApplied
	case r.mayBeApplied && now != p && (now.version != p.version+1 || now.created != p.created):
		return verdictUnknown
	case !held:
		return verdictLost
	case now == p && failure != nil:
		return verdictNotApplied
	case now != p && entry != nil:
		return verdictConflict
	}
	return verdictRetry
}

// readForResolve reads what the guards compare, when no sending can be applied any more. It reads the
// log first: a lock that is still held then was held when the log was read.
func (w *LogWriter[T]) readForResolve(ctx context.Context, r txnResult) (entry, key *mvccpb.KeyValue, err error) {
	if r.mayStillApply {
		if _, err := w.lock.fence.commit(ctx, w.config.retry, nil, nil); err != nil && !errors.Is(err, ErrLockLost) {
			return nil, nil, err
		}
	}
	if entry, err = w.read(ctx); err == nil {
		key, err = w.lock.fence.read(ctx, w.config.retry)
	}
	return entry, key, err
}

func first(kvs []*mvccpb.KeyValue) *mvccpb.KeyValue {
	if len(kvs) == 0 {
		return nil
	}
	return kvs[0]
}

func (w *LogWriter[T]) unknownOutcome(data string, why any) error {
	w.pending = &data
	return w.lock.fence.unknownOutcome(why)
}

// Close ends the writer with ErrClosed; the lock is not touched. A Write that is under way goes on. It
// returns nil, or ErrLockLost if the lock was lost before; so do further calls.
func (w *LogWriter[T]) Close() error {
	w.closing.Do(func() {
		if lost := w.lock.stopCause(); errors.Is(lost, ErrLockLost) {
			w.lost = lost
		}
		w.shutdown(ErrClosed)
	})
	return w.lost
}

// LogReader reads a log. It is a context.Context: Done closes when the reader has ended, and context.Cause says why.
//
// All methods are safe for concurrent use: each entry is read once.
type LogReader[T any] struct {
	*lifetime // the watcher's
	watcher   *Watcher[T]
	latest    *Receiver[Event[T]] // nil if every entry is read
}

// NewLogReader makes a reader of the log of this name, which may not exist yet. ctx is the reader's parent. It reads the
// current entry first, if there is one, and then the latest unread, so that entries are skipped if it is slower than the
// writer; or every entry, see [WithEveryEntry].
//
// Errors: ErrInvalidName; what etcd answered, when [RetryPolicy] has given up, which counts for this call alone: later
// the reader resumes for as long as it takes. See [Watch], which it is made of, for what ends it.
func NewLogReader[T any](ctx context.Context, client *clientv3.Client, name string, opts ...LogOption) (*LogReader[T], error) {
	if err := requireClient(ctx, client); err != nil {
		return nil, err
	}
	c := logConfig{watchConfig: watchConfig{config: newConfig(client), codec: JSON}}
	for _, o := range opts {
		o.applyLog(&c)
	}
	c.finish()
	if err := c.validate(name); err != nil {
		return nil, err
	}
	w, err := watchLog[T](ctx, name, &c)
	if err != nil {
		return nil, errorf("read log %q: %w", name, err)
	}
	r := &LogReader[T]{lifetime: &w.lifetime, watcher: w}
	if c.every == nil {
		r.latest = latest(w)
	}
	return r, nil
}

func watchLog[T any](ctx context.Context, name string, c *logConfig) (*Watcher[T], error) {
	if c.every != nil && *c.every == 0 {
		resp, err := retryRead(ctx, &c.config, c.retry, "read log", func(ctx context.Context) (*clientv3.GetResponse, error) {
			return c.client.Get(ctx, name, clientv3.WithKeysOnly())
		})
		if err != nil {
			return nil, err
		}
		c.from = resp.Header.Revision + 1
		if entry := first(resp.Kvs); entry != nil {
			c.from = entry.CreateRevision
		}
	}
	return newWatcher[T](ctx, name, &c.watchConfig)
}

// latest keeps the latest entry that a watcher has told.
func latest[T any](w *Watcher[T]) *Receiver[Event[T]] {
	n := NewNotify[Event[T]](context.WithoutCancel(w.ctx))
	w.pumping.Go(func() { // until the watcher ends
		for e := range w.Events() {
			if e.Type == EventPut || e.Type == EventInvalid {
				_ = n.Send(e)
			}
		}
		_ = n.Close()
	})
	return n.Receiver()
}

// Read returns the next entry, and waits for it. That the log was deleted is not told.
//
// An entry that does not decode is an error, together with the entry's version and revision; the next Read goes on. Once
// the reader has ended the error is its cause: ErrGap after the last entry before the gap, ErrClosed, or the parent's end.
// ctx bounds this call alone: its end gives an error that Is ctx.Err() and context.Cause(ctx), and after it nothing is read.
func (r *LogReader[T]) Read(ctx context.Context) (Entry[T], error) {
	if ctx == nil {
		panic("etcdutil: nil ctx")
	}
	e, err := r.event(ctx)
	if err != nil {
		return Entry[T]{}, err
	}
	return entryOf(e)
}

// entryOf is the entry of an event, and an error if it does not decode.
func entryOf[T any](e Event[T]) (Entry[T], error) {
	var err error
	if e.Type == EventInvalid {
		err = errorf("log %q: version %d does not decode: %w", e.Key, e.Version, e.Err)
	}
	return Entry[T]{e.Value, e.Version, e.Revision}, err
}

// event returns the next event that is an entry.
func (r *LogReader[T]) event(ctx context.Context) (Event[T], error) {
	switch {
	case context.Cause(r.stopCtx) == ErrClosed:
		return Event[T]{}, ErrClosed
	case ctx.Err() != nil:
		return Event[T]{}, contextError(ctx)
	case r.latest != nil:
		e, err := r.latest.Recv(ctx)
		switch {
		case err != nil && ctx.Err() != nil:
			err = contextError(ctx)
		case err != nil:
			err = r.over()
		}
		return e, err
	}
	for {
		select {
		case e, ok := <-r.watcher.Events():
			switch {
			case !ok:
				return e, r.over()
			case e.Type == EventPut, e.Type == EventInvalid:
				return e, nil
			}
		case <-ctx.Done():
			return Event[T]{}, contextError(ctx)
		}
	}
}

// over is why the reader has ended.
func (r *LogReader[T]) over() error {
	if cause := context.Cause(r.stopCtx); cause != nil {
		return cause
	}
	return contextError(r)
}

// All reads on and on. It ends when the loop is left, on Close and with the reader's parent, and else after an error, which
// it yields; one entry that does not decode is yielded as an error and does not end it.
func (r *LogReader[T]) All() iter.Seq2[Entry[T], error] {
	return func(yield func(Entry[T], error) bool) {
		for {
			e, err := r.event(context.WithoutCancel(r))
			if err != nil { // r has ended
				if cause := context.Cause(r.stopCtx); cause != nil && cause != ErrClosed {
					yield(Entry[T]{}, err)
				}
				return
			}
			if !yield(entryOf(e)) {
				return
			}
		}
	}
}

// Close ends the reader with ErrClosed. It returns nil, or the cause if the reader had ended before by itself; so do further
// calls.
func (r *LogReader[T]) Close() error { return r.watcher.Close() }
