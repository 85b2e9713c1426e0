package etcdutil

import (
	"bytes"
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

// LogWriter writes a log under a lock. It is a context.Context, derived from the lock: it ends when the lock does, or on
// Close.
//
// All methods are safe for concurrent use; writes take turns.
type LogWriter[T any] struct {
	lifetime
	config  config
	codec   Codec
	lock    *Lock
	name    string
	closing sync.Once
	lost    error // of the lock, before Close

	writing  chan struct{} // held by the Write that is under way; guards the fields below
	last     position
	open     []byte // the value of a write whose outcome is unknown
	isOpen   bool
	conflict error
}

// position is where a log ends: its last entry's version and revision, and the revision of the first entry; 0 if there is
// none.
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

// NewLogWriter makes a writer of the log of this name, a key, which only the holder of lock is to write. The writer's parent
// is the lock; ctx bounds this call alone, which reads where the log ends. Retries are the lock's unless [WithRetryPolicy]
// says otherwise.
//
// Errors: ErrInvalidName; a nil lock is refused; a lock that is lost or closed gives its cause; what etcd answered.
func NewLogWriter[T any](ctx context.Context, lock *Lock, name string, opts ...LogOption) (*LogWriter[T], error) {
	if ctx == nil {
		panic("etcdutil: nil ctx")
	}
	if lock == nil {
		return nil, errors.New("etcdutil: lock is nil")
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
		return nil, errors.New("etcdutil: WithEveryEntry is for readers")
	case name == lock.key:
		return nil, fmt.Errorf("etcdutil: name is the lock's own key %q", name)
	}
	w := &LogWriter[T]{config: c.config, codec: c.codec, lock: lock, name: name, writing: make(chan struct{}, 1)}
	// What an earlier writer under this lock has left open must not be applied after that.
	_, err := lock.exclusively(ctx, w.config.retry, func(ctx context.Context) (Revision, error) {
		entry, err := w.read(ctx)
		w.last = positionOf(entry)
		return w.last.revision, lock.definite(err)
	})
	if err != nil {
		return nil, fmt.Errorf("etcdutil: write log %q: %w", name, withContextError(ctx, err))
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

// Write appends v, exactly once, and returns its version. It is a [Lock.Commit] that also compares the log, and works as long
// as that does: after the end of the lock's parent too, but not after Close.
//
// ErrLockLost says that nothing was written, and so do ErrClosed and ErrLogConflict: somebody wrote the log who is not this
// writer, and the lock may still be held. A writer stays so; NewLogWriter goes on from what is there. A log that was
// deleted is no conflict, it starts again at version 1; nor is the very entry, byte for byte, that was to be written.
// ErrUnknownOutcome says that v may have been written: the next Write finds out first. Any other error is the reason why
// nothing was written: that v cannot be encoded, or is too large for etcd (1.5 MB unless configured).
func (w *LogWriter[T]) Write(ctx context.Context, v T) (version int64, err error) {
	if ctx == nil {
		panic("etcdutil: nil ctx")
	}
	data, err := w.codec.Marshal(v)
	if err != nil {
		return 0, fmt.Errorf("etcdutil: write log %q: v cannot be encoded: %w", w.name, err)
	}
	select {
	case w.writing <- struct{}{}:
		defer func() { <-w.writing }()
	case <-ctx.Done():
		return 0, fmt.Errorf("etcdutil: write log %q: %w", w.name, contextError(ctx))
	}
	if err := w.write(ctx, data); err != nil {
		return 0, fmt.Errorf("etcdutil: write log %q (%d bytes): %w", w.name, len(data), withContextError(ctx, err))
	}
	return w.last.version, nil
}

func (w *LogWriter[T]) write(ctx context.Context, data []byte) error {
	if closed := context.Cause(w.stopCtx); closed != nil {
		return closed
	}
	_, err := w.lock.exclusively(ctx, w.config.retry, func(ctx context.Context) (Revision, error) {
		err := w.settle(ctx)
		if err == nil {
			err = w.append(ctx, data)
		}
		return w.last.revision, err
	})
	return err
}

// settle finds out what became of a write of unknown outcome, which can no longer be applied late.
func (w *LogWriter[T]) settle(ctx context.Context) error {
	if !w.isOpen {
		return w.conflict
	}
	entry, err := w.read(ctx)
	if err != nil {
		return w.lock.definite(err)
	}
	if entry != nil && positionOf(entry) != w.last && !w.isNext(entry, w.open) {
		w.conflict = conflictAt(entry)
	}
	w.last, w.open, w.isOpen = positionOf(entry), nil, false
	return w.conflict
}

// isNext tells whether an entry, nil if there is none, is the next one, and of this value.
func (w *LogWriter[T]) isNext(entry *mvccpb.KeyValue, data []byte) bool {
	return entry != nil && entry.Version == w.last.version+1 && bytes.Equal(entry.Value, data)
}

func conflictAt(entry *mvccpb.KeyValue) error {
	return fmt.Errorf("%w: it is at version %d, revision %d", ErrLogConflict, entry.Version, entry.ModRevision)
}

// errAgain says that nothing was written, and that it is worth another try.
var errAgain = errors.New("etcdutil: again")

// append writes the next entry, if the lock is held and the log ends where it is known to. It is done like a Commit, but after
// a lost answer it is the log that tells whether it was applied: one put is enough.
func (w *LogWriter[T]) append(ctx context.Context, data []byte) error {
	for {
		guards := []clientv3.Cmp{w.lock.isCurrent(), clientv3.Compare(clientv3.ModRevision(w.name), "=", w.last.revision)}
		resp, d, err := w.lock.transact(ctx, w.config.retry, guards, []clientv3.Op{clientv3.OpPut(w.name, string(data))})
		switch {
		case err != nil && !d.applied:
			_ = w.unknown(data, err) // clientv3 may have sent it twice by itself: the next write finds out
			return w.lock.definite(err)
		case err == nil && resp.Succeeded:
			rev := resp.Header.Revision
			w.last = position{w.last.version + 1, rev, cmp.Or(w.last.created, rev)}
			return nil
		}
		if err := w.readBack(ctx, data, err, d); err != errAgain {
			return err
		}
	}
}

// readBack tells whether a transaction was applied that was refused by its guards, or else failed with err.
func (w *LogWriter[T]) readBack(ctx context.Context, data []byte, err error, d doubt) error {
	entry, key, readErr := w.readSettled(ctx, d)
	if readErr != nil { // a refusal may be that of clientv3's own repetition
		return w.unknown(data, cmp.Or(err, readErr))
	}
	now := positionOf(entry)
	switch {
	case w.isNext(entry, data) && key == nil: // the next holder may have written the same
		_ = w.lock.keyGone()
		return w.unknown(data, "the lock's key is gone")
	case w.isNext(entry, data): // clientv3 may have repeated it by itself, and been refused
		w.last = now
		return nil
	case d.applied && now != w.last && (now.version != w.last.version+1 || now.created != w.last.created):
		return w.unknown(data, "the log was deleted, or went on, meanwhile")
	case key == nil:
		return w.lock.keyGone()
	case now == w.last && err != nil:
		return err
	case now != w.last && entry != nil:
		w.conflict = conflictAt(entry)
		return w.conflict
	}
	// The log was deleted, or somebody else wrote the lock's key, though only the lock should.
	w.last, w.lock.version, w.lock.revision = now, key.Version, key.ModRevision
	return errAgain
}

// readSettled reads what the guards compare, when no attempt can be applied any more: the log first, so that a lock that is
// still held then was held when the log was read.
func (w *LogWriter[T]) readSettled(ctx context.Context, d doubt) (entry, key *mvccpb.KeyValue, err error) {
	if d.straggler {
		if _, err := w.lock.bump(ctx, w.config.retry, nil); err != nil && !errors.Is(err, ErrLockLost) {
			return nil, nil, err
		}
	}
	if entry, err = w.read(ctx); err == nil {
		key, err = w.lock.read(ctx, w.config.retry)
	}
	return entry, key, err
}

func first(kvs []*mvccpb.KeyValue) *mvccpb.KeyValue {
	if len(kvs) == 0 {
		return nil
	}
	return kvs[0]
}

func (w *LogWriter[T]) unknown(data []byte, why any) error {
	w.open, w.isOpen = bytes.Clone(data), true // data may be the caller's own
	return w.lock.unknown(why)
}

// Close ends the writer with ErrClosed; the lock is not touched. A Write that is under way goes on. It returns nil, or
// ErrLockLost if the lock was lost before; so do further calls.
func (w *LogWriter[T]) Close() error {
	w.closing.Do(func() {
		if lost := w.lock.lost(); errors.Is(lost, ErrLockLost) {
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
		return nil, fmt.Errorf("etcdutil: read log %q: %w", name, err)
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
		err = fmt.Errorf("etcdutil: log %q: version %d does not decode: %w", e.Key, e.Version, e.Err)
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
