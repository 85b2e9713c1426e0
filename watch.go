package etcdutil

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/maphash"
	"math/rand/v2"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/metadata"
)

// Watcher is a watch. It is a context.Context: Done closes when the watcher has ended, and context.Cause says why.
//
// All methods are safe for concurrent use.
type Watcher[T any] struct {
	lifetime
	feed     *feed
	codec    Codec
	events   chan Event[T]
	revision chan Revision // offered whenever it may have changed
	pumping  sync.WaitGroup
	stopped  chan struct{} // closed after last is set
	last     Revision
}

// EventType says what an [Event] is.
type EventType int

// The zero EventType is none of these.
const (
	// EventPut says that the key was created or changed.
	EventPut EventType = iota + 1
	// EventDelete says that the key was deleted, by hand or with its lease.
	EventDelete
	// EventSynced says, to a watcher with a snapshot, that what it was told is all there was at Event.Revision.
	EventSynced
	// EventInvalid says that the key was created or changed, to a value that does not decode.
	EventInvalid
)

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
	Type EventType
	// Key is empty in EventSynced.
	Key string
	// Value is the new value, in EventPut alone.
	Value T
	// Prev is the value before this event, if [WithPrev] asked for it; nil if there was none, if it did not decode, or if
	// etcd no longer had it.
	Prev *T
	// Version is 1 when the key was created and grows by one with each change; 0 in EventDelete and EventSynced.
	Version int64
	// Revision is the store's when the change was made, and all changes of one transaction have the same. A deletion that
	// was found out by listing has the list's.
	Revision Revision
	// Raw is the bytes that did not decode, in EventInvalid alone, and Err says why.
	Raw []byte
	Err error
}

// A Codec turns values into bytes and back. Both methods must be safe for concurrent use, and must not keep data.
type Codec interface {
	Marshal(v any) ([]byte, error)
	// Unmarshal decodes data into v, a pointer to a zero value.
	Unmarshal(data []byte, v any) error
}

var (
	// JSON is encoding/json. It is the default.
	JSON Codec = jsonCodec{}
	// Raw takes string and []byte, and leaves them as they are.
	Raw Codec = rawCodec{}
)

type jsonCodec struct{}

func (jsonCodec) Marshal(v any) ([]byte, error)      { return json.Marshal(v) }
func (jsonCodec) Unmarshal(data []byte, v any) error { return json.Unmarshal(data, v) }

type rawCodec struct{}

func (rawCodec) Marshal(v any) ([]byte, error) {
	switch v := v.(type) {
	case string:
		return []byte(v), nil
	case []byte:
		return v, nil
	}
	return nil, fmt.Errorf("etcdutil: Raw takes string and []byte, not %T", v)
}

func (rawCodec) Unmarshal(data []byte, v any) error {
	switch v := v.(type) {
	case *string:
		*v = string(data)
	case *[]byte:
		*v = append([]byte{}, data...)
	default:
		return fmt.Errorf("etcdutil: Raw gives *string and *[]byte, not %T", v)
	}
	return nil
}

// A WatchOption shapes a [Watcher].
type WatchOption interface{ applyWatch(*watchConfig) }

// A CodecOption is for what reads or writes values.
type CodecOption interface {
	WatchOption
	LogOption
}

type watchConfig struct {
	config
	codec    Codec
	prefix   bool
	prev     bool
	snapshot bool
	from     Revision // 0: from now on
}

type watchOption func(*watchConfig)

func (o watchOption) applyWatch(c *watchConfig) { o(c) }

// WithPrefix watches all keys that begin with the key.
func WithPrefix() WatchOption {
	return watchOption(func(c *watchConfig) { c.prefix = true })
}

// WithPrev fills in Event.Prev. With a snapshot that keeps all followed values in memory, and Prev is what the watcher told
// last; without, etcd is asked for it, and no longer has what was compacted.
func WithPrev() WatchOption {
	return watchOption(func(c *watchConfig) { c.prev = true })
}

// WithRevision watches from this revision on, inclusive, which may be in the past or in the future. Default, and 0: from now
// on. A negative one is refused, and so is one beside WithSnapshot. A revision that etcd has compacted is ErrGap.
func WithRevision(r Revision) WatchOption {
	return watchOption(func(c *watchConfig) { c.from = r })
}

// WithSnapshot follows the state: first comes every key there is as an EventPut, in order of keys, then EventSynced, then each
// change. Where changes were missed (to compaction, because the reader was slow, or because etcd was restored from an older
// backup) the watcher lists again, and sends what differs from what it told before as EventPut and EventDelete, then
// EventSynced. Such a list is of one revision, but its events are not in the order of theirs.
func WithSnapshot() WatchOption {
	return watchOption(func(c *watchConfig) { c.snapshot = true })
}

type codecOption struct{ codec Codec }

func (o codecOption) applyWatch(c *watchConfig) { c.codec = o.codec }

// WithCodec sets how values are decoded and encoded; default [JSON]. nil is refused.
func WithCodec(c Codec) CodecOption { return codecOption{c} }

func (c *watchConfig) validate(key string) error {
	switch {
	case key == "":
		return errors.New("etcdutil: key is empty")
	case c.codec == nil:
		return errors.New("etcdutil: WithCodec: the codec is nil")
	case c.from < 0:
		return fmt.Errorf("etcdutil: WithRevision is negative: %d", c.from)
	case c.from > 0 && c.snapshot:
		return errors.New("etcdutil: WithRevision beside WithSnapshot, which begins with what there is")
	}
	return c.retry.validate()
}

// Watch watches a key, or with [WithPrefix] all keys that begin with it. It returns once the watch stands: no later change is
// missed. ctx is the watcher's parent; the caller reads [Watcher.Events], and closes the watcher if ctx is not to end it.
//
// The watcher resumes after faults, for as long as they last. Without [WithSnapshot] every change comes once and in order,
// changes of one transaction together; where compaction, or a restore from an older backup, makes that impossible, the
// watcher ends with ErrGap after the last change before the gap. With it the state is followed through both.
//
// A reader may be slow: a few megabytes are read ahead. Then the watch is put off until the reader has read them, so that it
// can be overtaken by compaction. Where the client's Watcher is wrapped (client/v3/namespace), a watch that is behind reads at once
// what up to a thousand revisions have changed, and one that was reset may leave a stream open until the client is closed.
//
// Errors: what etcd answered, when [RetryPolicy] has given up, which counts for this call alone; ErrGap if WithRevision was
// compacted; rpctypes.ErrPermissionDenied, which also ends a watcher that resumes. A watcher notices that its connection
// is dead, though nobody closed it, by DialKeepAliveTime in clientv3.Config: set it. Each watcher has a stream to etcd of
// its own (etcd's --max-concurrent-streams bounds them for each client) and asks for progress about once a second.
func Watch[T any](ctx context.Context, client *clientv3.Client, key string, opts ...WatchOption) (*Watcher[T], error) {
	if err := requireClient(ctx, client); err != nil {
		return nil, err
	}
	c := watchConfig{config: config{logger: discard, client: client}, codec: JSON}
	for _, o := range opts {
		o.applyWatch(&c)
	}
	if err := c.validate(key); err != nil {
		return nil, err
	}
	w, err := newWatcher[T](ctx, key, &c)
	if err != nil {
		return nil, fmt.Errorf("etcdutil: watch %q: %w", key, err)
	}
	return w, nil
}

func newWatcher[T any](ctx context.Context, key string, c *watchConfig) (*Watcher[T], error) {
	w := &Watcher[T]{
		codec:    c.codec,
		events:   make(chan Event[T]),
		revision: make(chan Revision),
		stopped:  make(chan struct{}),
	}
	w.begin(ctx)
	w.feed = newFeed(w.ctx, key, c)
	err := w.feed.begin(&c.config)
	if err == nil {
		w.pumping.Go(w.feed.run) // until the context ends, or the feed for good
		err = w.feed.awaitStanding(&c.config)
	}
	if err != nil {
		w.finish(err)
		w.pumping.Wait()
		return nil, err
	}
	go w.deliver(w.feed.start) // until the context ends, or the feed's end is delivered
	return w, nil
}

// Events is where the events come from. It is closed when the watcher has ended, at once if it was closed or its parent
// ended, else after the last event: context.Cause(w) then says why, and is never nil.
func (w *Watcher[T]) Events() <-chan Event[T] { return w.events }

// Revision is such that everything up to it has been received from Events. [WithRevision] of the next one goes on from there, and
// tells again what was received of a transaction that had not been received to its end. It moves on though nothing changes.
// With a snapshot it is 0 before the first EventSynced.
func (w *Watcher[T]) Revision() Revision {
	select {
	case rev := <-w.revision:
		return rev
	case <-w.stopped:
		return w.last
	}
}

// Close ends the watcher with ErrClosed. It returns nil, or the cause if the watcher had ended before by itself; so do
// further calls.
func (w *Watcher[T]) Close() error {
	w.finish(ErrClosed)
	<-w.stopped
	w.pumping.Wait()
	if cause := context.Cause(w.held); cause != ErrClosed {
		return cause
	}
	return nil
}

// deliver hands over what the feed has queued. Nothing but Events' reader keeps it waiting, so that it always knows what has
// been received.
func (w *Watcher[T]) deliver(rev Revision) {
	defer func() {
		w.last = rev
		close(w.stopped)
		close(w.events)
	}()
	for {
		batch := w.feed.queue.take()
		for i, c := range batch {
			batch[i] = change{} // received values are not kept
			if c.end != nil {
				w.finish(c.end)
				return
			}
			if c.kind != 0 && !w.hand(w.event(c), rev) {
				return
			}
			if c.upTo != 0 {
				rev = c.upTo
			}
		}
		select {
		case <-w.feed.queue.filled:
		case w.revision <- rev:
		case <-w.ctx.Done():
			return
		}
	}
}

// hand hands over an event. It reports whether it was received.
func (w *Watcher[T]) hand(e Event[T], rev Revision) bool {
	for {
		select {
		case w.events <- e:
			return true
		case w.revision <- rev:
		case <-w.ctx.Done():
			return false
		}
	}
}

func (w *Watcher[T]) event(c change) Event[T] {
	e := Event[T]{Type: c.kind, Revision: c.upTo}
	if c.kind == EventSynced {
		return e
	}
	e.Key, e.Version, e.Revision = string(c.kv.Key), c.kv.Version, c.kv.ModRevision
	if c.prev != nil {
		if prev, err := decode[T](w.codec, c.prev.Value); err == nil {
			e.Prev = &prev
		}
	}
	if c.kind == EventPut {
		if e.Value, e.Err = decode[T](w.codec, c.kv.Value); e.Err != nil {
			e.Type, e.Raw = EventInvalid, bytes.Clone(c.kv.Value)
		}
	}
	return e
}

// decode returns the zero value with an error: half a value is none.
func decode[T any](codec Codec, data []byte) (T, error) {
	var v, zero T
	if err := codec.Unmarshal(data, &v); err != nil {
		return zero, err
	}
	return v, nil
}

// change is what a feed has for its watcher: an event, how far the feed has come, or its end.
type change struct {
	kind EventType // 0: no event
	kv   *mvccpb.KeyValue
	prev *mvccpb.KeyValue
	upTo Revision // when this has been received, everything up to here has; 0: no news
	end  error
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

// maxAhead is after how many bytes a feed no longer reads ahead of its watcher, who may hold as many again.
const maxAhead = 4 << 20

// queue is what is read ahead.
type queue struct {
	filled chan struct{} // after a push
	taken  chan struct{} // after a take

	mu      sync.Mutex
	changes []change
	bytes   int
}

func newQueue() *queue {
	return &queue{filled: make(chan struct{}, 1), taken: make(chan struct{}, 1)}
}

// push reports whether there is room for more.
func (q *queue) push(changes ...change) (room bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, c := range changes {
		q.add(c)
	}
	wake(q.filled)
	return q.bytes < maxAhead
}

// add joins the news that nothing happened up to a revision to what is queued before it.
func (q *queue) add(c change) {
	if last := len(q.changes) - 1; c.kind == 0 && c.end == nil && last >= 0 {
		q.changes[last].upTo = c.upTo
		return
	}
	q.changes = append(q.changes, c)
	q.bytes += c.size()
}

func (q *queue) take() []change {
	q.mu.Lock()
	defer q.mu.Unlock()
	changes := q.changes
	q.changes, q.bytes = nil, 0
	wake(q.taken)
	return changes
}

// awaitRoom waits until nothing is queued. It reports whether that is so.
func (q *queue) awaitRoom(ctx context.Context) bool {
	for !q.empty() && ctx.Err() == nil {
		select {
		case <-q.taken:
		case <-ctx.Done():
		}
	}
	return ctx.Err() == nil
}

func (q *queue) empty() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return len(q.changes) == 0
}

func wake(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// feed keeps a watch on etcd going, and queues what it sends.
type feed struct {
	watchConfig
	ctx   context.Context
	key   string
	queue *queue
	view  *view // nil without a snapshot

	start   Revision         // the last that was before the watch; set before it stands
	next    Revision         // the first that has not been queued; 0 before a watch from now on stands
	seen    Revision         // the newest that etcd is known to have had
	cluster uint64           // which etcd that was
	last    *mvccpb.KeyValue // the newest change that was queued, by which its history can be told from another; nil if none
	listing bool             // what there is has to be listed before it can be followed

	patience time.Duration // with a watch that is silent
	standing chan error    // how it began, once
}

func newFeed(ctx context.Context, key string, c *watchConfig) *feed {
	f := &feed{watchConfig: *c, ctx: ctx, key: key, queue: newQueue(), patience: silence, standing: make(chan error, 1)}
	f.retry.Elapsed, f.retry.Attempts = -1, 0
	if c.snapshot {
		f.view, f.listing = newView(c.prev), true
	}
	return f
}

// begin finds out where to begin, and whether that is possible.
func (f *feed) begin(c *config) error {
	rev, err := f.look(c, f.from)
	switch {
	case errors.Is(err, rpctypes.ErrCompacted):
		return fmt.Errorf("%w: from revision %d", ErrGap, f.from)
	case errors.Is(err, rpctypes.ErrFutureRev):
		rev, err = f.look(c, 0)
	}
	switch {
	case err != nil:
		return err
	case f.snapshot:
		f.stands() // where it begins cannot be compacted under it
	case f.from == 0:
		f.start, f.from = rev, rev+1
	default:
		f.next = min(f.from, rev+1)
		f.start = f.next - 1
	}
	return nil
}

// stands says that no later change is missed: a watch from now on is there, or one from a revision.
func (f *feed) stands() { f.began(nil) }

func (f *feed) began(err error) {
	select {
	case f.standing <- err:
	default: // it had
	}
}

// awaitStanding waits until the watch stands, for as long as the call may take.
func (f *feed) awaitStanding(c *config) error {
	limit := f.ctx
	if elapsed := c.retry.withDefaults().Elapsed; elapsed > 0 {
		var cancel context.CancelFunc
		limit, cancel = context.WithTimeout(f.ctx, elapsed)
		defer cancel()
	}
	select {
	case err := <-f.standing:
		return err
	case <-limit.Done():
		return ended(limit)
	}
}

// look returns etcd's revision, if it has what is watched as of the revision at, where 0 is now.
func (f *feed) look(c *config, at Revision) (Revision, error) {
	resp, err := f.get(c, f.key, clientv3.WithRev(at), clientv3.WithLimit(1), clientv3.WithKeysOnly())
	if err != nil {
		return 0, err
	}
	return resp.Header.Revision, f.recognise(resp.Header)
}

// note keeps the newest change that was queued.
func (f *feed) note(kv *mvccpb.KeyValue) {
	if kv.ModRevision > f.last.GetModRevision() {
		f.last = kv
	}
}

// lookAround finds out whether etcd is what it was, before it is watched again. An etcd that was restored, and has been written
// so much since that its revision says nothing, has another history at the newest change, if one was told.
//
// It is one request, because gRPC takes its connections in turn: between two the watch would get the same of three members
// every time.
func (f *feed) lookAround() error {
	if f.last == nil {
		_, err := f.look(&f.config, 0)
		return err
	}
	resp, err := query(clientv3.WithRequireLeader(f.ctx), &f.config, func(ctx context.Context) (*clientv3.TxnResponse, error) {
		return f.client.Txn(ctx).Then(
			f.watched(f.key, clientv3.WithLimit(1), clientv3.WithKeysOnly()),
			clientv3.OpGet(string(f.last.Key), clientv3.WithRev(f.last.ModRevision)),
		).Commit()
	})
	switch {
	case errors.Is(err, rpctypes.ErrCompacted): // it cannot be told
		f.last = nil
		return f.lookAround()
	case errors.Is(err, rpctypes.ErrFutureRev):
		return errRestored
	case err != nil:
		return err
	}
	if err := f.recognise(resp.Header); err != nil {
		return err
	}
	now := first(resp.Responses[1].GetResponseRange().Kvs)
	if deleted := f.last.Version == 0; deleted && now != nil || !deleted && !sameChange(now, f.last) {
		return errRestored
	}
	return nil
}

// sameChange reports whether a is there and what b is.
func sameChange(a, b *mvccpb.KeyValue) bool {
	return a != nil && a.ModRevision == b.ModRevision && a.Version == b.Version && bytes.Equal(a.Value, b.Value)
}

// isTooLarge reports whether a watch failed for good, because the client takes no message of that size.
func isTooLarge(err error) bool {
	f := failureOf(err)
	return f.code == codes.ResourceExhausted && strings.HasPrefix(f.message, "grpc: received message larger than max")
}

// get reads what is watched, from a key on. It needs a leader, so that a member which is cut off from the quorum is left.
func (f *feed) get(c *config, from string, opts ...clientv3.OpOption) (*clientv3.GetResponse, error) {
	return query(clientv3.WithRequireLeader(f.ctx), c, func(ctx context.Context) (*clientv3.GetResponse, error) {
		resp, err := f.client.Do(ctx, f.watched(from, opts...))
		return resp.Get(), err
	})
}

// watched reads what is watched, from a key on.
func (f *feed) watched(from string, opts ...clientv3.OpOption) clientv3.Op {
	if f.prefix {
		opts = append(opts, clientv3.WithRange(clientv3.GetPrefixRangeEnd(f.key)))
	}
	return clientv3.OpGet(from, opts...)
}

// errRestored says that etcd has gone back to an older state, and may have been written since.
var errRestored = errors.New("etcdutil: etcd has another history: it was restored")

// recognise notes what etcd answered, and finds out whether it is what it was.
func (f *feed) recognise(header *etcdserverpb.ResponseHeader) error {
	seen, cluster := f.seen, f.cluster
	f.seen, f.cluster = header.Revision, header.ClusterId
	if f.seen < seen || cluster != 0 && f.cluster != cluster {
		return errRestored
	}
	return nil
}

func (f *feed) run() {
	if err := f.pump(); f.ctx.Err() == nil {
		f.began(err)
		f.queue.push(change{end: fmt.Errorf("etcdutil: watch %q: %w", f.key, err)})
	}
}

// pump follows etcd for as long as that is possible, and returns why it no longer is.
func (f *feed) pump() error {
	for failed, looked := 0, true; ; {
		if f.listing {
			if err := f.list(); err != nil {
				return err
			}
		}
		f.patience = silence << min(max(failed-1, 0), 4) // etcd may take long to read what has happened since
		heard, err := f.watch()
		if failed++; heard || errors.Is(err, errBroken) {
			failed = 1
		}
		switch {
		case f.ctx.Err() != nil:
			return ended(f.ctx)
		case errors.Is(err, errAhead):
			f.queue.awaitRoom(f.ctx)
			f.listing = f.snapshot
		case isTooLarge(err):
			return err
		case errors.Is(err, errSilent) && !heard && looked:
			// The connection is dead, and gRPC takes its connections in turn: one between two looks would get it every time.
			looked = false
			continue
		}
		looked = true
		if failed == 2 {
			f.logger.Warn("etcdutil: watch cannot be resumed yet", "key", f.key, "cause", err)
		}
		sleep(f.ctx, f.retry.withDefaults().backoff(failed))
		if !errors.Is(err, rpctypes.ErrCompacted) {
			err = f.lookAround()
		}
		if err := f.resumable(err); err != nil {
			return err
		}
	}
}

// resumable is what to do about an error in front of the next watch.
func (f *feed) resumable(err error) error {
	switch {
	case !errors.Is(err, rpctypes.ErrCompacted) && !errors.Is(err, errRestored):
		return err
	case !f.snapshot:
		return fmt.Errorf("%w: after revision %d: %w", ErrGap, f.next-1, err)
	}
	f.logger.Warn("etcdutil: watch resyncs", "key", f.key, "cause", err)
	f.listing = true
	return nil
}

const (
	// quiet is how long nothing need be heard of a watch until it asks for progress: what happens to other keys moves it on,
	// or compaction would overtake it. A random part is added.
	quiet = 500 * time.Millisecond
	// silence is how long nothing need be heard of it, although it asks, until it is opened anew.
	silence = 4 * time.Second
	// indulgence is how long a watch is kept while its reader is behind. Until the reader goes on etcd keeps in memory what it is
	// about to send; but if the watch is opened anew it has to read all of that again.
	indulgence = 4 * time.Second
)

var (
	errAhead  = errors.New("etcdutil: the reader is behind")
	errSilent = errors.New("etcdutil: the watch is silent")
	errBroken = errors.New("etcdutil: the connection is broken")
	errForgot = errors.New("etcdutil: the member does not know how far the watch has come")
)

// watch queues what comes of a watch from next on, until that ends, and returns why, and whether anything came.
//
// clientv3 would resume it by itself, behind our back. But whether etcd is still what it was has to be known before.
func (f *feed) watch() (heard bool, err error) {
	ctx, cancel := context.WithCancelCause(streamOfItsOwn(f.ctx))
	var broken sync.WaitGroup
	defer broken.Wait()
	broken.Go(func() { f.awaitBroken(ctx, cancel) }) // until the context ends

	silent := time.AfterFunc(f.patience, func() { cancel(errSilent) })
	defer silent.Stop()
	remote := piecemeal{etcdserverpb.NewWatchClient(f.client.ActiveConnection()), make(chan struct{}, 1)}
	watcher, done := f.watcher(remote)
	defer done()
	defer cancel(nil)
	ask := f.progress(ctx, watcher)
	defer ask.Stop()
	for resp := range watcher.Watch(ctx, f.key, f.options()...) {
		silent.Stop()
		ask.Reset(quiet + rand.N(quiet))
		err := f.receive(resp)
		heard = heard || err == nil && !resp.Created || err == errAhead
		if err != nil && !(err == errAhead && f.indulge(ctx)) {
			return heard, err
		}
		if len(resp.Events) > 0 {
			wake(remote.taken)
		}
		silent.Reset(f.patience)
	}
	return heard, context.Cause(ctx)
}

// indulge waits for a reader that is behind. It reports whether the reader has come on.
func (f *feed) indulge(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, indulgence)
	defer cancel()
	return f.queue.awaitRoom(ctx)
}

// streams counts the streams for watches.
var streams atomic.Int64

// streamOfItsOwn is a context for one watch, which has clientv3 open a stream for it. On a stream that watches share, an answer
// about progress goes to all, and may overtake the creation of a watch that it knows nothing of: that would skip what it
// has yet to send. Nor does a new watch inherit a stream that is stuck, or that was opened with a token which has expired
// (etcd-io/etcd#12385). The watch needs a leader, so that a member which is cut off from the quorum is left.
func streamOfItsOwn(ctx context.Context) context.Context {
	stream := "watch-" + strconv.FormatInt(streams.Add(1), 10)
	return metadata.AppendToOutgoingContext(clientv3.WithRequireLeader(ctx), "etcdutil-stream", stream)
}

// watcher is for one watch, and closed after it: of a watch that ends while it is created or resumed clientv3 keeps the
// stream, with nothing on it, until its watcher is closed. A watcher that is not clientv3's own, as that of a namespace, is
// used as it is.
func (f *feed) watcher(remote piecemeal) (w clientv3.Watcher, done func()) {
	own := clientv3.NewWatchFromWatchClient(remote, f.client)
	if reflect.TypeOf(own) != reflect.TypeOf(f.client.Watcher) {
		return f.client.Watcher, func() {}
	}
	return own, func() { _ = own.Close() }
}

// piecemeal stands between clientv3 and etcd. What a thousand revisions have changed etcd sends at once, in fragments. clientv3
// would join them, and read on whether they are wanted or not: here each is passed on by itself, in whole revisions, and the
// next one after it was taken.
type piecemeal struct {
	etcdserverpb.WatchClient
	taken chan struct{}
}

func (p piecemeal) Watch(ctx context.Context, opts ...grpc.CallOption) (etcdserverpb.Watch_WatchClient, error) {
	stream, err := p.WatchClient.Watch(ctx, opts...)
	return &pieces{Watch_WatchClient: stream, taken: p.taken}, err
}

// pieces is a stream. Only Recv uses its fields, which clientv3 calls from one goroutine.
type pieces struct {
	etcdserverpb.Watch_WatchClient
	taken <-chan struct{}
	given bool            // changes that have not been taken yet
	rest  []*mvccpb.Event // of a revision that goes on in the next fragment
}

func (p *pieces) Recv() (*etcdserverpb.WatchResponse, error) {
	for {
		p.awaitTaken()
		resp, err := p.Watch_WatchClient.Recv()
		if err != nil {
			return nil, err
		}
		more := resp.Fragment
		resp.Events, p.rest = append(p.rest, resp.Events...), nil
		if more {
			resp.Events, p.rest = wholeRevisions(resp.Events)
			resp.Fragment = false
		}
		if p.given = len(resp.Events) > 0; p.given || !more {
			return resp, nil
		}
	}
}

func (p *pieces) awaitTaken() {
	if !p.given {
		return
	}
	select {
	case <-p.taken:
	case <-p.Context().Done(): // Recv tells
	}
}

// wholeRevisions splits off the events of the last revision, which may not be all.
func wholeRevisions(events []*mvccpb.Event) (whole, rest []*mvccpb.Event) {
	n := len(events)
	for n > 0 && events[n-1].Kv.ModRevision == events[len(events)-1].Kv.ModRevision {
		n--
	}
	return events[:n:n], slices.Clone(events[n:])
}

// options has etcd send in fragments. In one piece, what a thousand revisions have changed would be in memory several times.
func (f *feed) options() []clientv3.OpOption {
	opts := []clientv3.OpOption{clientv3.WithRev(f.next), clientv3.WithFragment(), clientv3.WithCreatedNotify()}
	if f.prefix {
		opts = append(opts, clientv3.WithPrefix())
	}
	if f.prev && !f.snapshot {
		opts = append(opts, clientv3.WithPrevKV())
	}
	return opts
}

// awaitBroken ends a watch when all connections of its client are, as they are before etcd can be restored.
func (f *feed) awaitBroken(ctx context.Context, cancel context.CancelCauseFunc) {
	conn := f.client.ActiveConnection()
	if conn.GetState() != connectivity.Ready || conn.WaitForStateChange(ctx, connectivity.Ready) {
		cancel(errBroken)
	}
}

// progress is a timer that asks how far a watch has come, again and again until ctx ends.
func (f *feed) progress(ctx context.Context, watcher clientv3.Watcher) *time.Timer {
	var ask *time.Timer
	ask = time.AfterFunc(time.Hour, func() {
		if ctx.Err() == nil { // else clientv3 might open another stream for it
			_ = watcher.RequestProgress(ctx)
			ask.Reset(quiet + rand.N(quiet))
		}
	})
	ask.Reset(quiet + rand.N(quiet))
	return ask
}

// receive queues what a watch has sent. The changes of one revision come together.
func (f *feed) receive(resp clientv3.WatchResponse) error {
	switch err := resp.Err(); {
	case errors.Is(err, rpctypes.ErrCompacted) && resp.CompactRevision <= f.next:
		return errForgot // progress is nothing to it: a member that lags takes its leader's snapshot, and looks back to the last event
	case err != nil:
		return err
	}
	if resp.Created {
		f.created(resp.Header.Revision)
		return nil
	}
	upTo := f.next - 1
	switch {
	case len(resp.Events) > 0:
		upTo = resp.Events[len(resp.Events)-1].Kv.ModRevision
	case resp.IsProgressNotify():
		upTo = resp.Header.Revision
	}
	if upTo < f.next {
		return nil // sent twice, or no news
	}
	room := upTo <= f.start || f.queue.push(f.changes(resp.Events, upTo)...)
	f.next, f.seen = upTo+1, max(f.seen, upTo)
	if !room {
		return errAhead
	}
	return nil
}

// created notes that a watch stands, on a member of this revision. One from now on begins there, or, if the member lags, where
// etcd was when that was asked for.
func (f *feed) created(rev Revision) {
	if f.next == 0 {
		f.next = rev + 1
		f.start = max(f.start, rev)
		f.from = f.start + 1
	}
	f.stands()
}

// changes are those that were not queued before, and how far they go.
func (f *feed) changes(events []*clientv3.Event, upTo Revision) []change {
	changes := make([]change, 0, len(events)+1)
	for _, e := range events {
		rev := e.Kv.ModRevision
		if n := len(changes); n > 0 && changes[n-1].kv.ModRevision < rev {
			changes[n-1].upTo = rev - 1
		}
		if rev >= max(f.next, f.from) {
			changes = append(changes, f.changeOf(e))
			f.note(e.Kv)
		}
	}
	if n := len(changes); n > 0 {
		changes[n-1].upTo = upTo
		return changes
	}
	return append(changes, change{upTo: upTo})
}

func (f *feed) changeOf(e *clientv3.Event) change {
	kind := EventPut
	if e.Type == mvccpb.DELETE {
		kind = EventDelete
	}
	if f.view == nil {
		return change{kind: kind, kv: e.Kv, prev: e.PrevKv}
	}
	return f.view.change(kind, e.Kv)
}

// list queues the difference between what was told and what there is.
func (f *feed) list() error {
	for broken := 0; ; {
		err := f.listOnce(broken < maxRelists)
		switch {
		case err == nil:
			f.listing = false
			return nil
		case errors.Is(err, errBroken):
			broken++
		case errors.Is(err, errRestored), errors.Is(err, rpctypes.ErrCompacted), errors.Is(err, rpctypes.ErrFutureRev): // by a restore
			sleep(f.ctx, f.retry.withDefaults().backoff(1))
		default:
			return err
		}
	}
}

// maxRelists is how often a list is made anew because the connection broke. It may break faster than a list is made.
const maxRelists = 3

// listOnce lists page by page, all at the revision of the first, and waits for the reader between them.
//
// If strict, it ends with errBroken if the connection broke between the first page and the last: etcd may have been restored, and
// been written past the list's revision, so that the pages are of two histories.
func (f *feed) listOnce(strict bool) error {
	f.view.begin()
	f.last = nil
	unbroken, cancel := context.WithCancelCause(f.ctx)
	defer cancel(nil)
	var rev Revision
	for from, limit := f.key, int64(minPage); from != ""; {
		resp, err := f.page(from, rev, limit)
		if err != nil {
			return err
		}
		err = f.recognise(resp.Header)
		switch {
		case rev == 0: // it begins with whatever etcd this is
			rev = resp.Header.Revision
			go f.awaitBroken(unbroken, cancel) // until the list is made
		case err != nil:
			return err
		}
		for _, kv := range resp.Kvs {
			f.note(kv)
		}
		if changes := f.view.page(resp.Kvs); !f.queue.push(changes...) {
			f.queue.awaitRoom(f.ctx)
		}
		limit = pageAfter(resp.Kvs, limit)
		from = ""
		if resp.More {
			from = string(resp.Kvs[len(resp.Kvs)-1].Key) + "\x00"
		}
	}
	if strict && context.Cause(unbroken) == errBroken {
		return errBroken
	}
	f.queue.push(append(f.view.gone(rev), change{kind: EventSynced, upTo: rev})...)
	f.next = rev + 1
	return nil
}

// page reads a page, or a smaller one if the client takes none so large.
func (f *feed) page(from string, rev Revision, limit int64) (*clientv3.GetResponse, error) {
	resp, err := f.get(&f.config, from, clientv3.WithRev(rev), clientv3.WithLimit(limit))
	if isTooLarge(err) && limit > 1 {
		return f.page(from, rev, max(limit/8, 1))
	}
	return resp, err
}

const (
	minPage   = 2 // keys, which may have a megabyte and a half each
	maxPage   = 1000
	pageBytes = 1 << 20
)

// pageAfter is how many keys to list next: so many that they have about pageBytes, if they are like those before, but
// only so many more than before.
func pageAfter(kvs []*mvccpb.KeyValue, limit int64) int64 {
	size := 1
	for _, kv := range kvs {
		size += change{kv: kv}.size()
	}
	return min(max(int64(len(kvs))*pageBytes/int64(size), minPage), 8*limit, maxPage)
}

// view is what the reader of a snapshot was told.
type view struct {
	keys   map[string]told
	values bool // are kept
	pass   uint32
	seed   maphash.Seed
}

// told is what was told of a key. In a restored etcd another value may have the same revision, hence the hash.
type told struct {
	rev  Revision
	hash uint64
	kv   *mvccpb.KeyValue // nil unless values are kept
	pass uint32           // the last list that had it
}

func newView(values bool) *view {
	return &view{keys: make(map[string]told), values: values, seed: maphash.MakeSeed()}
}

// change tells a change that etcd has sent.
func (v *view) change(kind EventType, kv *mvccpb.KeyValue) change {
	key := string(kv.Key)
	c := change{kind: kind, kv: kv, prev: v.keys[key].kv}
	if kind == EventDelete {
		delete(v.keys, key)
	} else {
		v.keys[key] = v.tell(kv)
	}
	return c
}

func (v *view) tell(kv *mvccpb.KeyValue) told {
	t := told{rev: kv.ModRevision, hash: maphash.Bytes(v.seed, kv.Value), pass: v.pass}
	if v.values {
		t.kv = kv
	}
	return t
}

// begin begins a list: pages of what there is, in the order of keys, then gone.
func (v *view) begin() { v.pass++ }

// page tells what is new in a page.
func (v *view) page(kvs []*mvccpb.KeyValue) []change {
	var changes []change
	for _, kv := range kvs {
		key, now := string(kv.Key), v.tell(kv)
		before, known := v.keys[key]
		if !known || before.rev != now.rev || before.hash != now.hash {
			changes = append(changes, change{kind: EventPut, kv: kv, prev: before.kv})
		}
		v.keys[key] = now
	}
	return changes
}

// gone tells what was in no page of the list, which is of revision rev.
func (v *view) gone(rev Revision) []change {
	var changes []change
	for key, t := range v.keys {
		if t.pass != v.pass {
			delete(v.keys, key)
			changes = append(changes, change{kind: EventDelete, kv: &mvccpb.KeyValue{Key: []byte(key), ModRevision: rev}, prev: t.kv})
		}
	}
	return changes
}
