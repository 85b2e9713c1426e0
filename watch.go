package etcdutil

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// Watcher is a watch. [Watch] makes it. Read Events until the channel is closed; Close ends it, and
// so does its parent. The zero Watcher is not usable.
//
// It is a context.Context: Done is closed when the watcher has ended. Err returns only
// context.Canceled or context.DeadlineExceeded. context.Cause returns why it ended:
//   - [ErrClosed] after Close.
//   - [ErrGap] if events are lost. A watcher with a snapshot does not end with it.
//   - rpctypes.ErrPermissionDenied, or whatever else etcd refuses for good when the watch resumes.
//   - An error that says so if the client was closed, or if the codec ended its goroutine.
//   - The parent's cause.
//
// All methods are safe for concurrent use.
type Watcher[T any] struct {
	lifetime
	queue     *queue
	reflector *reflector // nil if something else fills the queue
	feeding   sync.WaitGroup
	codec     Codec
	decode    func(kv *mvccpb.KeyValue) (T, error) // nil: by the codec
	events    chan Event[T]
	revision  chan Revision // offered whenever it may have changed
	stopped   chan struct{} // closed after last is set
	last      Revision
}

// EventType says what an [Event] is.
type EventType int

// The zero EventType is none of these.
const (
	// EventPut says that the key was created or changed.
	EventPut EventType = iota + 1
	// EventDelete says that the key was deleted, by hand or with its lease.
	EventDelete
	// EventSynced marks the end of a snapshot: the events so far describe all keys at
	// Event.Revision.
	EventSynced
	// EventInvalid says that the key was created or changed, to a value that does not decode.
	EventInvalid
)

// A Mirror gets these events as well.
const (
	// eventListing says that a list begins: all keys, then EventSynced. An earlier list that was
	// not finished is void.
	eventListing EventType = -1 - iota
	// eventProgress says that no more changes up to Event.Revision will come.
	eventProgress
	// eventReport says so as well, in answer to Watcher.report. Event.Version is the number that it
	// was asked for by.
	eventReport
)

// String returns "put", "delete", "synced" or "invalid", and EventType(N) for any other.
func (t EventType) String() string {
	switch t {
	case EventPut:
		return "put"
	case EventDelete:
		return "delete"
	case EventSynced:
		return "synced"
	case EventInvalid:
		return "invalid"
	}
	return fmt.Sprintf("EventType(%d)", int(t))
}

// Event is a change of a key, or EventSynced.
type Event[T any] struct {
	// Type says what the event is.
	Type EventType
	// Key is the key that changed. It is empty in EventSynced.
	Key string
	// Value is the new value in EventPut, and otherwise zero.
	Value T
	// Prev is the value before this event, if the watcher has [WithPrev]. It is nil if there was
	// none, if it did not decode, or if etcd no longer had it.
	Prev *T
	// Version is 1 when the key was created, and grows by one with each change. It is 0 in
	// EventDelete and EventSynced.
	Version int64
	// CreateRevision is the store's revision when the key was created. It is 0 in EventDelete and
	// EventSynced.
	CreateRevision Revision
	// Revision is the store's revision when the change was made. All changes of one transaction
	// have the same. A deletion that a list has brought to light has the list's.
	Revision Revision
	// Raw holds the bytes that did not decode in EventInvalid, and is otherwise nil.
	Raw []byte
	// Err Is [ErrInvalidValue] and wraps the codec's error in EventInvalid. It is otherwise nil.
	Err error
}

// A WatchOption shapes a [Watcher] or a [Mirror]. See the table of options in the package's
// documentation.
type WatchOption interface{ applyWatch(*watchConfig) }

// A CodecOption shapes what reads or writes values: watches, mirrors, logs and registrations.
type CodecOption interface {
	WatchOption
	LogOption
	RegisterOption
}

type watchConfig struct {
	config
	codec    Codec
	prefix   bool
	prev     bool
	snapshot bool
	from     Revision // 0: from now on

	head     *mvccpb.KeyValue // sent before the events from revision from on
	headFrom Revision         // everything up to this revision was received before head

	relists bool // every list is sent whole, after eventListing, and nothing is kept of it
	reports bool // eventProgress is sent
}

type watchOption func(*watchConfig)

func (o watchOption) applyWatch(c *watchConfig) { o(c) }

// WithPrefix watches all keys that begin with the key. With the key "" it watches every key in
// etcd.
func WithPrefix() WatchOption {
	return watchOption(func(c *watchConfig) { c.prefix = true })
}

// WithPrev makes the watcher set Event.Prev. With a snapshot the watcher keeps the followed values
// in memory, and Prev is the value that it sent last. Without one etcd sends Prev, unless it has
// compacted that value.
func WithPrev() WatchOption {
	return watchOption(func(c *watchConfig) { c.prev = true })
}

// WithRevision watches from this revision on, inclusive. The default, and 0, is from now on. The
// revision may be in the past. If etcd has compacted it, or if it is more than one past etcd's
// revision, because etcd was restored from a backup, Watch returns [ErrGap]. A negative revision is
// refused. The option cannot be combined with [WithSnapshot].
func WithRevision(r Revision) WatchOption {
	return watchOption(func(c *watchConfig) { c.from = r })
}

// WithSnapshot makes the watcher follow the state. It sends every current key as an EventPut, in
// the order of keys, then EventSynced, then each change. If etcd compacts the list's revision, or
// is restored, while the list is made, the list begins anew: before EventSynced a key may then be
// sent again, or as an EventDelete.
//
// After missing changes the watcher lists the keys again. It sends the differences from what it
// sent before as EventPut and EventDelete, and then EventSynced. It misses changes if etcd compacts
// them, if its reader is slow, or if etcd is restored from a backup. A list is of one revision, but
// its events are in the order of keys and not of their revisions.
func WithSnapshot() WatchOption {
	return watchOption(func(c *watchConfig) { c.snapshot = true })
}

func (c *watchConfig) validate(key string) error {
	switch {
	case key == "" && !c.prefix:
		return errors.New("etcdutil: key is empty")
	case c.codec == nil:
		return errors.New("etcdutil: WithCodec: the codec is nil")
	case c.from < 0:
		return fmt.Errorf("etcdutil: WithRevision is negative: %d", c.from)
	case c.from > 0 && c.snapshot:
		return errors.New("etcdutil: WithRevision cannot be combined with WithSnapshot")
	}
	return c.retry.validate()
}

// Watch watches a key, or with [WithPrefix] all keys that begin with it. It returns once the watch
// stands: no later change is missed. ctx is the watcher's parent, and not a timeout of the call.
// Read [Watcher.Events] until the channel is closed, and Close the watcher if ctx lives on.
//
// The watcher resumes after faults, for as long as they last. It leaves a member that is cut off
// from the others, and after about 10 s a member that was removed. It leaves a connection that is
// dead within 5 s, or 10 s if every endpoint has failed before.
//   - Without [WithSnapshot] it sends every change, once and in order, and the changes of a
//     transaction together. If compaction or a restore from a backup makes that impossible, it ends
//     with [ErrGap] after the last change before the gap.
//   - With WithSnapshot it follows the state through both.
//
// A slow reader delays only its own watcher. The watcher buffers a few megabytes, or one
// transaction if that is larger. Then it stops watching until the reader has read them, and
// compaction can overtake it.
//
// All watches of a client share streams to etcd, and idle watches send no requests of their own. A
// client with several endpoints sends one small read every 5 s while etcd's revision stands still.
// If the client's Watcher is wrapped, as by client/v3/namespace, watches go through the wrapper:
// then only DialKeepAliveTime in clientv3.Config makes them leave a dead connection, and they stay
// on a member that was removed while that answers.
//
// Servers of version 3.5.0 to 3.5.7 report progress that a watch has not reached. Watches need
// 3.5.8 or later.
//
// A nil ctx or client panics.
//
// Errors:
//   - [ErrGap] if WithRevision is compacted, or more than one past etcd's revision.
//   - rpctypes.ErrPermissionDenied if the keys may not be read. It also ends a watcher that
//     resumes.
//   - An error that names the argument if key is empty without WithPrefix, or an option is refused.
//   - ctx's end, or what etcd answered last if [RetryPolicy] gave up. The policy bounds only this
//     call.
func Watch[T any](ctx context.Context, client *clientv3.Client, key string, opts ...WatchOption) (*Watcher[T], error) {
	if err := requireClient(ctx, client); err != nil {
		return nil, err
	}
	c := watchConfig{config: newConfig(client), codec: JSON}
	for _, o := range opts {
		o.applyWatch(&c)
	}
	c.finish()
	if err := c.validate(key); err != nil {
		return nil, err
	}
	w, err := newWatcher[T](ctx, key, &c)
	if err != nil {
		return nil, errorf("watch %q: %w", key, err)
	}
	return w, nil
}

func newWatcher[T any](ctx context.Context, key string, c *watchConfig) (*Watcher[T], error) {
	return newWatcherOf[T](ctx, key, c, nil)
}

// newWatcherOf is newWatcher with a function that decodes whole keys. If it is nil, the codec
// decodes.
func newWatcherOf[T any](ctx context.Context, key string, c *watchConfig, decode func(kv *mvccpb.KeyValue) (T, error)) (*Watcher[T], error) {
	w := makeWatcher(ctx, decode)
	w.codec = c.codec
	w.queue.reports = c.reports
	w.reflector = newReflector(w.ctx, key, c, w.queue)
	if err := w.reflector.begin(ctx); err != nil {
		w.shutdown(err)
		w.reflector.close()
		return nil, err
	}
	from := w.reflector.start
	if c.head != nil {
		from = c.headFrom
	}
	w.start(from)
	return w, nil
}

// newFedWatcher returns a Watcher that delivers what run pushes to its queue. ctx is its parent.
// run returns when its context ends, or after it has pushed an end.
func newFedWatcher[T any](ctx context.Context, decode func(kv *mvccpb.KeyValue) (T, error), run func(ctx context.Context, q *queue)) *Watcher[T] {
	w := makeWatcher(ctx, decode)
	w.start(0)
	w.feeding.Go(func() { run(w.ctx, w.queue) })
	return w
}

func makeWatcher[T any](ctx context.Context, decode func(kv *mvccpb.KeyValue) (T, error)) *Watcher[T] {
	w := &Watcher[T]{
		decode:   decode,
		events:   make(chan Event[T]),
		revision: make(chan Revision),
		stopped:  make(chan struct{}),
	}
	w.queue = newQueue(w.deliver)
	w.init(ctx)
	return w
}

// start begins to deliver. Everything up to from counts as received.
func (w *Watcher[T]) start(from Revision) {
	w.last = from
	w.queue.begin(from)
	context.AfterFunc(w.ctx, w.queue.finish)
}

// Events returns the channel of the events. It is closed when the watcher has ended: at once if the
// watcher was closed or its parent has ended, otherwise after the last event. Then context.Cause(w)
// returns why, and is never nil. Each event is received once, even if several goroutines receive.
func (w *Watcher[T]) Events() <-chan Event[T] { return w.events }

// Revision returns R such that every event up to R was received. Resume with WithRevision(R+1),
// which repeats the events of a transaction that was not received to its end. R grows even if
// nothing changes. With a snapshot it is 0 before the first EventSynced.
func (w *Watcher[T]) Revision() Revision {
	for {
		rev, unsettled := w.queue.settled()
		if unsettled == nil {
			return rev
		}
		select {
		case rev := <-w.revision:
			return rev
		case <-unsettled:
		case <-w.stopped:
			return w.last
		}
	}
}

// Close ends the watcher with ErrClosed, and waits for what it has started, for at most 5 s. It
// returns nil, or the cause if the watcher had ended before by itself. So do further calls.
func (w *Watcher[T]) Close() error {
	w.shutdown(ErrClosed)
	timeout := time.NewTimer(maxClosing)
	defer timeout.Stop()
	select {
	case <-w.stopped:
		w.feeding.Wait()
	case <-timeout.C:
	}
	if cause := context.Cause(w.stopCtx); cause != ErrClosed {
		return cause
	}
	return nil
}

func (w *Watcher[T]) hasStopped() bool {
	select {
	case <-w.stopped:
		return true
	default:
		return false
	}
}

// deliver sends to Events what is queued, from revision w.last on. It runs only while something is:
// the stack of its goroutine would be most of what an idle watcher costs.
func (w *Watcher[T]) deliver() {
	idle := false
	defer func() {
		if !idle {
			w.end()
		}
	}()
	idle = w.deliverQueued()
}

// errCodecExited is the cause of a watcher whose codec has called runtime.Goexit, as t.FailNow
// does.
var errCodecExited = errors.New("etcdutil: the codec ended its goroutine")

func (w *Watcher[T]) end() {
	if w.ctx.Err() == nil {
		w.shutdown(errCodecExited)
	}
	if w.reflector != nil {
		w.reflector.close()
	}
	w.last = w.queue.end(w.last)
	close(w.stopped)
	close(w.events)
}

// deliverQueued delivers until nothing is queued, and returns true then. It waits only for the
// reader and for the codec, so that it always has the exact revision. It returns false when the
// watcher has ended.
func (w *Watcher[T]) deliverQueued() (idle bool) {
	for {
		batch, upTo, wasFull := w.queue.take(w.last)
		if len(batch) == 0 {
			return true // w.last may be another goroutine's now
		}
		w.last = upTo
		if wasFull && w.reflector != nil {
			w.reflector.drained()
		}
		if !w.deliverBatch(batch) {
			return false
		}
	}
}

func (w *Watcher[T]) deliverBatch(batch []change) bool {
	for i, c := range batch {
		batch[i] = change{} // received values are not kept
		if c.end != nil {
			if w.ctx.Err() == nil {
				w.shutdown(c.end)
			}
			return false
		}
		if c.kind == 0 && w.queue.reports {
			c.kind = eventProgress
		}
		if c.kind != 0 && !w.send(w.event(c)) {
			return false
		}
		if c.upTo != 0 {
			w.last = c.upTo
		}
	}
	return true
}

// send hands over an event. It reports whether the event was received.
func (w *Watcher[T]) send(e Event[T]) bool {
	for {
		select {
		case w.events <- e:
			return true
		case w.revision <- w.last:
		case <-w.ctx.Done():
			return false
		}
	}
}

func (w *Watcher[T]) event(c change) Event[T] {
	e := Event[T]{Type: c.kind, Revision: c.upTo}
	if c.kv == nil {
		e.Version = c.asked
		return e
	}
	e.Key, e.Version, e.Revision, e.CreateRevision = string(c.kv.Key), c.kv.Version, c.kv.ModRevision, c.kv.CreateRevision
	w.queue.decoding(w.last) // the codec is the user's: it may block, or ask for the revision
	defer w.queue.decoded()
	if c.prev != nil {
		if prev, err := w.valueOf(c.prev); err == nil {
			e.Prev = &prev
		}
	}
	if c.kind == EventPut {
		if e.Value, e.Err = w.valueOf(c.kv); e.Err != nil {
			e.Type, e.Raw = EventInvalid, bytes.Clone(c.kv.Value)
		}
	}
	return e
}

func (w *Watcher[T]) valueOf(kv *mvccpb.KeyValue) (T, error) {
	if w.decode != nil {
		return w.decode(kv)
	}
	return decode[T](w.codec, kv.Value)
}

// askProgress asks etcd now how far the watch has come. It never blocks, and the answer may fail to
// come.
func (w *Watcher[T]) askProgress() { w.reflector.source.askProgress(&w.reflector.sub) }

// report has the watcher send an eventReport of this number, after all that it has received so far,
// if its watch stands. It never blocks.
func (w *Watcher[T]) report(number int64) {
	w.reflector.source.standing(&w.reflector.sub, func() { w.queue.report(number, w.reflector.sub.next-1) })
}

// lastFailure returns why the last attempt failed, nil if none has since the watch stood.
func (w *Watcher[T]) lastFailure() (err error) {
	w.reflector.source.locked(func() { err = w.reflector.lastErr })
	return err
}

// received returns up to where etcd has sent everything, delivered or not.
func (w *Watcher[T]) received() (upTo Revision) {
	w.reflector.source.locked(func() { upTo = w.reflector.sub.next - 1 })
	return upTo
}

// change is what a reflector has for its watcher: an event, how far the reflector has come, or its
// end.
type change struct {
	kind  EventType // 0: no event
	kv    *mvccpb.KeyValue
	prev  *mvccpb.KeyValue
	upTo  Revision // when this has been received, everything up to here has; 0: no news
	asked int64    // of an eventReport: the number that it was asked for by
	end   error
}

// size is about what c takes in memory.
func (c change) size() int {
	const overhead = 200
	size := overhead
	for _, kv := range []*mvccpb.KeyValue{c.kv, c.prev} {
		if kv != nil {
			size += len(kv.Key) + len(kv.Value)
		}
	}
	return size
}

// maxBuffered is after how many bytes a reflector no longer reads ahead of its watcher, who may
// hold as many again.
const maxBuffered = 4 << 20

// queue is what is read ahead.
type queue struct {
	deliver func() // takes until nothing is queued
	reports bool   // the watcher wants to get how far the watch has come

	mu         sync.Mutex
	delivering bool          // deliver runs, or it may not begin yet, or it has ended for good
	taken      chan struct{} // closed by the next take; nil if nobody waits for it
	news       chan struct{} // closed when settled may say more; nil if nobody waits for it
	changes    []change
	bytes      int
	full       bool
	upTo       Revision // all up to here was received, if nothing is queued and inHand is false
	inHand     bool     // what was taken may not have been received yet
	held       bool     // the codec is at work, so that nothing is being received; upTo is exact
}

// newQueue returns a queue that delivers nothing before begin.
func newQueue(deliver func()) *queue {
	return &queue{deliver: deliver, delivering: true}
}

// begin records where the watch begins, and begins to deliver.
func (q *queue) begin(upTo Revision) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.upTo, q.delivering = upTo, false
	if len(q.changes) > 0 {
		q.run()
	}
}

// finish queues the end: the watcher's context has ended.
func (q *queue) finish() { q.push(change{end: context.Canceled}) }

// run has what is queued delivered. The caller holds the mutex.
func (q *queue) run() {
	if !q.delivering {
		q.delivering = true
		go q.deliver() // until nothing is queued, or the watcher has ended
	}
}

// push reports whether there is room for more.
func (q *queue) push(changes ...change) (room bool) {
	if len(changes) == 0 {
		return true
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, c := range changes {
		if last := len(q.changes) - 1; c.kind == 0 && c.end == nil && last >= 0 {
			q.changes[last].upTo = c.upTo
			continue
		}
		q.changes = append(q.changes, c)
		q.bytes += c.size()
	}
	q.run()
	q.full = q.full || q.bytes >= maxBuffered
	return !q.full
}

// pass records that nothing happened up to a revision. Nobody is woken for that, unless the watcher
// wants reports.
func (q *queue) pass(upTo Revision) {
	q.mu.Lock()
	defer q.mu.Unlock()
	switch last := len(q.changes) - 1; {
	case last >= 0:
		q.changes[last].upTo = max(q.changes[last].upTo, upTo)
	case q.inHand || q.reports:
		q.changes = append(q.changes, change{upTo: upTo})
		q.run()
	default:
		q.upTo = max(q.upTo, upTo)
	}
}

// report queues an eventReport behind everything else. One is enough.
func (q *queue) report(number int64, upTo Revision) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if last := len(q.changes) - 1; last >= 0 && q.changes[last].kind == eventReport {
		q.changes[last].upTo, q.changes[last].asked = upTo, max(q.changes[last].asked, number)
		return
	}
	q.changes = append(q.changes, change{kind: eventReport, upTo: upTo, asked: number})
	q.run()
}

// take takes what is queued, after everything up to rev was received. It returns up to where
// everything was, and whether the queue was full. If nothing is queued, deliver has to return.
func (q *queue) take(rev Revision) (changes []change, upTo Revision, wasFull bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.inHand {
		q.upTo = rev
	}
	changes, wasFull = q.changes, q.full
	q.changes, q.bytes, q.full = nil, 0, false
	q.inHand = len(changes) > 0
	q.delivering = q.inHand
	wakeAll(&q.taken)
	wakeAll(&q.news)
	return changes, q.upTo, wasFull
}

// settled returns up to where everything was received, if that is certain. If not, it returns what
// is closed when it may be.
func (q *queue) settled() (upTo Revision, unsettled <-chan struct{}) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.held || !q.inHand && len(q.changes) == 0 {
		return q.upTo, nil
	}
	return 0, waitOn(&q.news)
}

func (q *queue) decoding(rev Revision) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.upTo, q.held = rev, true
	wakeAll(&q.news)
}

func (q *queue) decoded() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.held = false
}

// end returns up to where everything was received, rev or more. Then it holds for good.
func (q *queue) end(rev Revision) Revision {
	q.mu.Lock()
	defer q.mu.Unlock()
	if !q.inHand {
		rev = q.upTo
	}
	q.inHand, q.held = true, false
	return rev
}

// awaitRoom waits until nothing is queued, or ctx ends.
func (q *queue) awaitRoom(ctx context.Context) {
	for taken := q.untilTaken(); taken != nil; taken = q.untilTaken() {
		select {
		case <-taken:
		case <-ctx.Done():
			return
		}
	}
}

// untilTaken returns what is closed when what is queued is taken; nil if nothing is queued.
func (q *queue) untilTaken() <-chan struct{} {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.changes) == 0 {
		return nil
	}
	return waitOn(&q.taken)
}

// waitOn returns a channel that is closed by the next wakeAll.
func waitOn(c *chan struct{}) <-chan struct{} {
	if *c == nil {
		*c = make(chan struct{})
	}
	return *c
}

func wakeAll(c *chan struct{}) {
	if *c != nil {
		close(*c)
		*c = nil
	}
}

func wake(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
