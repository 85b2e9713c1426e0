package etcdutil

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"sync"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// A LogOption shapes a log's writer or reader. See the table of options in the package's
// documentation.
type LogOption interface{ applyLog(*logConfig) }

type logConfig struct {
	watchConfig
	every *Revision  // nil: only the latest entry
	after *entryMark // every entry after this one
}

// entryMark says where a reader stopped.
type entryMark struct {
	version  int64
	revision Revision
}

type logOption func(*logConfig)

func (o logOption) applyLog(c *logConfig) { o(c) }

func (o codecOption) applyLog(c *logConfig) { c.codec = o.codec }

// WithEveryEntry makes a reader read every entry from this revision on, inclusive and in order,
// instead of the latest one. 0 begins with the first entry, or the first one since the log was
// deleted. The reader ends with [ErrGap] where entries were compacted. If etcd has compacted the
// revision itself, NewLogReader returns ErrGap, even if the log has no entries there. A negative
// revision is refused. A writer refuses this option.
func WithEveryEntry(from Revision) LogOption {
	return logOption(func(c *logConfig) { c.every = &from })
}

// WithEntriesAfter makes a reader read every entry after the one of this version, in order. Pass
// the version of the last entry that an earlier reader has read, and that entry's revision or what
// [LogReader.Revision] returned after it. Version 0 is for a reader from the first entry on that
// has read none: at the revision the log must have had none. After another start that has read
// nothing, use [WithEveryEntry] with one more than LogReader.Revision.
//
// The reader ends with [ErrGap] if entries after that one are missing. It does not end because etcd
// has compacted the revision: a log that was quiet is read on across compaction. A negative version
// or revision is refused. A writer refuses this option, and a reader refuses it beside
// [WithEveryEntry].
func WithEntriesAfter(version int64, revision Revision) LogOption {
	return logOption(func(c *logConfig) { c.after = &entryMark{version, revision} })
}

func (c *logConfig) validate(name string) error {
	if err := validateName(name); err != nil {
		return err
	}
	switch {
	case c.every != nil && c.after != nil:
		return errors.New("etcdutil: WithEntriesAfter cannot be combined with WithEveryEntry")
	case c.every != nil && *c.every < 0:
		return fmt.Errorf("etcdutil: WithEveryEntry is negative: %d", *c.every)
	case c.every != nil:
		c.from = *c.every
	case c.after != nil && (c.after.version < 0 || c.after.revision < 0):
		return fmt.Errorf("etcdutil: WithEntriesAfter is negative: version %d, revision %d", c.after.version, c.after.revision)
	}
	c.snapshot = c.every == nil && c.after == nil
	return c.watchConfig.validate(name)
}

// Entry is an entry of a log.
type Entry[T any] struct {
	// Value is what was written.
	Value T
	// Version is 1 for the first entry, and grows by one with each. It begins again when the log's
	// key is deleted.
	Version int64
	// Revision is the store's revision when the entry was written.
	Revision Revision
}

// LogWriter writes a log under a lock. [NewLogWriter] makes it. It ends with the lock, or on Close.
// The zero LogWriter is not usable.
//
// It is a context.Context, derived from the lock. Err returns only context.Canceled or
// context.DeadlineExceeded. context.Cause returns why it ended: [ErrClosed] after Close, or else
// the lock's cause. All methods are safe for concurrent use. Writes take turns.
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

// position is where a log ends: its last entry's version and revision, and the revision of the
// first entry. It is zero if there is none.
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

// NewLogWriter returns a writer of the log of this name, a key that only the holder of lock may
// write. The writer's parent is the lock. ctx bounds only this call, which reads where the log
// ends. The writer retries and logs as the lock does, unless opts say otherwise. A nil ctx panics.
//
// A log is one key, and its history goes when etcd is compacted: it is no archive. Use
// [Lock.Commit] with keys of their own for what must be kept.
//
// Errors:
//   - [ErrInvalidName] if name is not allowed.
//   - An error that names the argument if lock is nil or an option is refused.
//   - [ErrLockLost] or [ErrClosed] if the lock is not held.
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
	if c.logger != lock.config.logger || c.observer != lock.config.observer {
		c.reporter = nil
	}
	c.finish()
	switch err := c.validate(name); {
	case err != nil:
		return nil, err
	case c.every != nil:
		return nil, errorf("WithEveryEntry is for readers")
	case c.after != nil:
		return nil, errorf("WithEntriesAfter is for readers")
	case name == lock.Key():
		return nil, errorf("name is the lock's own key %q", name)
	}
	w := &LogWriter[T]{config: c.config, codec: c.codec, lock: lock, name: name, turn: make(chan struct{}, 1)}
	// An earlier writer under this lock may have left a write pending, which do rules out.
	err := lock.fence.do(ctx, &w.config, func(ctx context.Context) error {
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
	resp, err := retry(ctx, &w.config, w.config.retry, "read log", func(ctx context.Context) (*clientv3.GetResponse, error) {
		return w.config.client.Get(ctx, w.name)
	})
	if err != nil {
		return nil, err
	}
	return first(resp.Kvs), nil
}

// Write appends v, exactly once, and returns its version. It is a [Lock.Commit] that also compares
// the log, and works as long as that does: also after the end of the lock's parent, but not after
// Close.
//
// A log that was deleted is no conflict: it starts again at version 1. An entry of the same bytes,
// which somebody else has written in place of this one, is taken for it. A nil ctx panics.
//
// Errors:
//   - [ErrLockLost] or [ErrClosed] if the lock or the writer has ended. Nothing was written.
//   - [ErrLogConflict] if the log was written by somebody else. Nothing was written, and the lock
//     may still be held. Every later Write returns it too: another NewLogWriter goes on from what
//     is there.
//   - [ErrUnknownOutcome] if v may have been written. The next Write finds that out first.
//   - Any other error says why nothing was written: ctx has ended, or v cannot be encoded or is too
//     large for etcd (1.5 MB unless configured).
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
		return 0, errorf("write log %q (%d bytes): %w", w.name, len(data), withEndOf(ctx, err))
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
	return w.lock.fence.do(ctx, &w.config, func(ctx context.Context) error {
		if err := w.resolvePending(ctx); err != nil {
			return err
		}
		return w.append(ctx, data)
	})
}

// resolvePending finds out what became of a write of unknown outcome. It can no longer be applied
// late.
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

// append writes the next entry, if the lock is held and the log ends where it did. It is done like
// a Commit, but after a lost answer it is the log that shows the outcome: one put is enough.
func (w *LogWriter[T]) append(ctx context.Context, data string) error {
	for {
		resp, r, err := w.lock.fence.txn(ctx, &w.config, txnRequest{
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
	case r.answered && entry == nil && now == p: // the first entry may have been deleted since
		return verdictUnknown
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

// readForResolve reads what the guards compare, when no sending can be applied any more. It reads
// the log first: a lock that is still held then was held when the log was read.
func (w *LogWriter[T]) readForResolve(ctx context.Context, r txnResult) (entry, key *mvccpb.KeyValue, err error) {
	if r.mayStillApply {
		if err := w.ruleOut(ctx); err != nil {
			return nil, nil, err
		}
	}
	if entry, err = w.read(ctx); err == nil {
		key, err = w.lock.fence.read(ctx, &w.config)
	}
	return entry, key, err
}

// ruleOut makes sure that no sending is applied any more. Each sending compares the lock's key. So
// either an empty Commit has changed that key since, or it is gone. That the lock has ended proves
// nothing: its key may still be there.
func (w *LogWriter[T]) ruleOut(ctx context.Context) error {
	_, err := w.lock.fence.commit(ctx, &w.config, nil, nil)
	if err == nil {
		return nil
	}
	if key, failed := w.lock.fence.read(ctx, &w.config); failed != nil || key != nil {
		return err
	}
	return nil
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

// Close ends the writer with [ErrClosed], and leaves the lock held. A Write that is under way
// continues. Close returns nil, or [ErrLockLost] if the lock was lost before. So do further calls.
func (w *LogWriter[T]) Close() error {
	w.closing.Do(func() {
		w.shutdown(ErrClosed)
		if lost := w.lock.stopCause(); errors.Is(lost, ErrLockLost) { // before, or just now
			w.lost = lost
		}
	})
	return w.lost
}

// LogReader reads a log. [NewLogReader] makes it. Call Read, or range over All, and Close it when
// it is no longer needed. It ends with its parent as well. The zero LogReader is not usable.
//
// It is a context.Context: Done is closed when the reader has ended. Err returns only
// context.Canceled or context.DeadlineExceeded. context.Cause returns why it ended:
//   - [ErrClosed] after Close.
//   - [ErrGap] if entries are lost. A reader of the latest entry does not end with it.
//   - rpctypes.ErrPermissionDenied, or whatever else etcd refuses for good when the reader resumes.
//   - An error that says so if the client was closed, or if the codec ended its goroutine.
//   - The parent's cause.
//
// All methods are safe for concurrent use: each entry is read once.
type LogReader[T any] struct {
	*lifetime // the watcher's
	watcher   *Watcher[T]
	latest    *latestEntry[T] // nil if every entry is read
	next      func(ctx context.Context) (Event[T], error)
}

// NewLogReader returns a reader of the log of this name, which may not exist yet. ctx is the
// reader's parent, and not a timeout of the call. The reader resumes after faults, for as long as
// they last.
//
// The reader reads the current entry first, if there is one, and then the latest unread entry. If
// it is slower than the writer, it skips entries. [WithEveryEntry] and [WithEntriesAfter] make it
// read every entry. A nil ctx or client panics.
//
// Errors:
//   - [ErrInvalidName] if name is not allowed, or an error that names the option that is refused.
//   - [ErrGap] if entries are missing, or if the revision is more than one past etcd's.
//   - rpctypes.ErrPermissionDenied if the log may not be read. It also ends a reader that resumes.
//   - ctx's end, or what etcd answered last if [RetryPolicy] gave up. The policy bounds only this
//     call.
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
	r.next = r.nextEvent
	if c.snapshot {
		r.latest = newLatestEntry(w)
		r.next = r.nextLatest
	}
	return r, nil
}

func watchLog[T any](ctx context.Context, name string, c *logConfig) (*Watcher[T], error) {
	var err error
	switch {
	case c.after != nil:
		err = c.resolveAfter(ctx, name)
	case c.every != nil && *c.every == 0:
		err = c.resolveFirst(ctx, name)
	}
	if err != nil {
		return nil, err
	}
	return newWatcher[T](ctx, name, &c.watchConfig)
}

// resolveFirst begins with the first entry of the log as it is.
func (c *logConfig) resolveFirst(ctx context.Context, name string) error {
	resp, err := c.readAt(ctx, name, 0)
	if err != nil {
		return err
	}
	c.from = resp.Header.Revision + 1
	if entry := first(resp.Kvs); entry != nil {
		c.from = entry.CreateRevision
	}
	return nil
}

// resolveAfter begins after an entry.
func (c *logConfig) resolveAfter(ctx context.Context, name string) error {
	resp, err := c.readAt(ctx, name, max(c.after.revision, 1)) // at revision 1 etcd is empty
	switch {
	case errors.Is(err, rpctypes.ErrCompacted):
		return c.resolveCompacted(ctx, name)
	case err == nil && c.after.revision == 0 && c.after.version == 0:
		return c.resolveFirst(ctx, name)
	case err == nil && c.after.revision == 0:
		return fmt.Errorf("%w: at revision 0 the log had no version %d", ErrGap, c.after.version)
	case errors.Is(err, rpctypes.ErrFutureRev):
		return fmt.Errorf("%w: after revision %d, which is past etcd's", ErrGap, c.after.revision)
	case err != nil:
		return err
	}
	if entry := first(resp.Kvs); entry != nil && entry.Version != c.after.version {
		return fmt.Errorf("%w: at revision %d the log was at version %d", ErrGap, c.after.revision, entry.Version)
	}
	c.from = c.after.revision + 1
	return nil
}

// resolveCompacted begins after an entry whose revision etcd has compacted.
func (c *logConfig) resolveCompacted(ctx context.Context, name string) error {
	now, err := c.readAt(ctx, name, 0)
	if err != nil {
		return err
	}
	if now.Header.Revision < c.after.revision {
		return fmt.Errorf("%w: after revision %d, which is past etcd's", ErrGap, c.after.revision)
	}
	entry := first(now.Kvs)
	if c.continues(entry, 0) {
		c.from = now.Header.Revision + 1
		return nil
	}
	if entry == nil {
		return fmt.Errorf("%w: the log was deleted after version %d", ErrGap, c.after.version)
	}
	at, err := c.compactRevision(ctx, name)
	if err != nil {
		return err
	}
	then, err := c.readAt(ctx, name, at)
	switch {
	case errors.Is(err, rpctypes.ErrCompacted): // once more
		return c.resolveCompacted(ctx, name)
	case err != nil:
		return err
	}
	switch entry := first(then.Kvs); {
	case c.continues(entry, 0):
	case c.continues(entry, 1): // etcd keeps it as of then
		c.head, err = c.readHead(ctx, name, at)
		if errors.Is(err, rpctypes.ErrCompacted) || err == nil && !c.continues(c.head, 1) {
			c.head = nil
			return c.resolveCompacted(ctx, name)
		}
		if err != nil {
			return err
		}
		c.headFrom = c.after.revision
	default:
		return fmt.Errorf("%w: entries after version %d were compacted", ErrGap, c.after.version)
	}
	c.from = at + 1
	return nil
}

// continues reports whether entry is so many entries after the one to read after. entry is nil if
// there is none.
func (c *logConfig) continues(entry *mvccpb.KeyValue, entries int64) bool {
	version := c.after.version + entries
	if entry == nil || version == 0 {
		return entry == nil && version == 0
	}
	created := entry.CreateRevision <= c.after.revision || c.after.version == 0
	return created && entry.Version == version && (entry.ModRevision <= c.after.revision) == (entries == 0)
}

// readAt reads the log as of a revision, 0 is now, but not its value.
func (c *logConfig) readAt(ctx context.Context, name string, at Revision) (*clientv3.GetResponse, error) {
	return retry(ctx, &c.config, c.retry, "read log", func(ctx context.Context) (*clientv3.GetResponse, error) {
		return c.client.Get(ctx, name, clientv3.WithRev(at), clientv3.WithKeysOnly())
	})
}

// readHead reads an entry, however large it is.
func (c *logConfig) readHead(ctx context.Context, name string, at Revision) (*mvccpb.KeyValue, error) {
	return retry(ctx, &c.config, c.retry, "read log", func(ctx context.Context) (*mvccpb.KeyValue, error) {
		resp, err := readPage(ctx, c.client, clientv3.OpGet(name, clientv3.WithRev(at), clientv3.WithLimit(1)), 1)
		if err != nil {
			return nil, err
		}
		return first(resp.Kvs), nil
	})
}

// compactRevision returns the revision that etcd was compacted at. Only a watch reports it.
func (c *logConfig) compactRevision(ctx context.Context, name string) (Revision, error) {
	return retry(ctx, &c.config, c.retry, "read log", func(ctx context.Context) (Revision, error) {
		ctx, cancel := context.WithCancel(ownStreamContext(clientv3.WithRequireLeader(ctx)))
		defer cancel()
		for resp := range c.client.Watcher.Watch(ctx, name, clientv3.WithRev(max(c.after.revision, 1)), clientv3.WithFilterPut()) {
			if resp.CompactRevision != 0 {
				return resp.CompactRevision, nil
			}
			if err := resp.Err(); err != nil {
				return 0, err
			}
		}
		return 0, contextError(ctx)
	})
}

// latestEntry keeps the latest entry that a watcher has sent.
type latestEntry[T any] struct {
	watcher  *Watcher[T]
	notify   *Notify[Event[T]]
	receiver *Receiver[Event[T]]
	asks     chan chan Revision
	done     chan struct{}
	sent     Revision // of the latest entry; for the goroutine, until done is closed
	synced   bool     // no list that it may have come in is incomplete
}

func newLatestEntry[T any](w *Watcher[T]) *latestEntry[T] {
	l := &latestEntry[T]{
		watcher: w,
		notify:  NewNotify[Event[T]](context.WithoutCancel(w.ctx)),
		asks:    make(chan chan Revision),
		done:    make(chan struct{}),
	}
	l.receiver = l.notify.Receiver()
	go l.run() // until the watcher ends
	return l
}

func (l *latestEntry[T]) run() {
	defer close(l.done)
	for {
		select {
		case e, ok := <-l.watcher.Events():
			if !ok {
				_ = l.notify.Close()
				return
			}
			switch e.Type {
			case EventPut, EventInvalid:
				l.sent, l.synced = e.Revision, false
				_ = l.notify.Send(e)
			case EventSynced:
				l.synced = true
			}
		case answer := <-l.asks: // no event is between the watcher and the Notify now
			answer <- l.upTo()
		}
	}
}

// upTo does not decide by revisions what is unread, because after a restore a later entry has a
// lower one. So may the watcher. Until a list is complete, the watcher is not as far as what the
// list has.
func (l *latestEntry[T]) upTo() Revision {
	upTo := l.watcher.Revision()
	switch {
	case l.receiver.unread():
		return min(l.sent-1, upTo)
	case !l.synced:
		return max(l.sent, upTo)
	}
	return upTo
}

func (l *latestEntry[T]) revision() Revision {
	answer := make(chan Revision, 1)
	select {
	case l.asks <- answer:
		return <-answer
	case <-l.done:
		return l.upTo()
	}
}

// Read waits for the next entry and returns it. It does not report that the log was deleted. ctx
// bounds this call: after its end nothing is read. A nil ctx panics.
//
// Errors:
//   - [ErrInvalidValue] if the entry does not decode. It wraps the codec's error. The Entry has its
//     version and revision, and the next Read continues after it.
//   - [ErrGap] after the last entry before a gap.
//   - [ErrClosed] after Close.
//   - An error that Is both Err and [context.Cause] of ctx, or of the reader's parent, if that
//     ended.
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

// entryOf returns the entry of an event, and an error if it does not decode.
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
	}
	return r.next(ctx)
}

func (r *LogReader[T]) nextLatest(ctx context.Context) (Event[T], error) {
	e, err := r.latest.receiver.Recv(ctx)
	switch {
	case err == nil:
	case ctx.Err() != nil:
		err = contextError(ctx)
	default:
		err = r.endCause()
	}
	return e, err
}

func (r *LogReader[T]) nextEvent(ctx context.Context) (Event[T], error) {
	for {
		select {
		case e, ok := <-r.watcher.Events():
			switch {
			case !ok:
				return e, r.endCause()
			case e.Type == EventPut, e.Type == EventInvalid:
				return e, nil
			}
		case <-ctx.Done():
			return Event[T]{}, contextError(ctx)
		}
	}
}

// endCause returns why the reader has ended.
func (r *LogReader[T]) endCause() error {
	if cause := context.Cause(r.stopCtx); cause != nil {
		return cause
	}
	return contextError(r)
}

// All iterates over the entries until Close, the parent's end, or an error, which it yields. An
// entry that does not decode is yielded as [ErrInvalidValue], and does not end the iteration. A
// later call continues with the next unread entry.
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

// Revision returns R such that every entry up to R was read, or skipped for a later one. It grows
// even if nothing is written. Resume with [WithEntriesAfter] and the version of the last entry
// read.
func (r *LogReader[T]) Revision() Revision {
	if r.latest != nil {
		return r.latest.revision()
	}
	return r.watcher.Revision()
}

// Close ends the reader with [ErrClosed], and waits for what it has started, for at most 5 s. It
// returns nil, or the cause if the reader had ended before by itself. So do further calls.
func (r *LogReader[T]) Close() error {
	err := r.watcher.Close()
	if r.latest != nil && r.watcher.hasStopped() {
		<-r.latest.done
	}
	return err
}
