package etcdutil

import (
	"bytes"
	"context"
	"errors"
	"fmt"
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
	ask      atomic.Pointer[time.Timer]
}

func newFeed(ctx context.Context, key string, c *watchConfig) *feed {
	f := &feed{watchConfig: *c, ctx: ctx, key: key, queue: newQueue(), patience: silence, standing: make(chan error, 1)}
	f.retry.Elapsed, f.retry.Attempts = -1, 0
	if c.snapshot {
		f.view, f.listing = newView(c.prev, !c.relists), true
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
		return contextError(limit)
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
	resp, err := retryRead(clientv3.WithRequireLeader(f.ctx), &f.config, f.retry, "watch", func(ctx context.Context) (*clientv3.TxnResponse, error) {
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
	f := statusOf(err)
	return f.code == codes.ResourceExhausted && strings.HasPrefix(f.message, "grpc: received message larger than max")
}

// get reads what is watched, from a key on. It needs a leader, so that a member which is cut off from the quorum is left.
func (f *feed) get(c *config, from string, opts ...clientv3.OpOption) (*clientv3.GetResponse, error) {
	return retryRead(clientv3.WithRequireLeader(f.ctx), c, c.retry, "watch", func(ctx context.Context) (*clientv3.GetResponse, error) {
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
		f.queue.push(change{end: errorf("watch %q: %w", f.key, err)})
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
			return contextError(f.ctx)
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
			f.reporter.watchStalled(WatchEvent{Key: f.key, Err: err})
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
	f.reporter.watchResynced(WatchEvent{Key: f.key, Err: err})
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
	f.ask.Store(ask)
	return ask
}

func (f *feed) askProgress() {
	if ask := f.ask.Load(); ask != nil {
		ask.Reset(0) // it does nothing after the watch's end
	}
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
	f.queue.push(f.view.begin()...)
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
