package etcdutil

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"math"
	"slices"
	"strings"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
)

// reflector keeps a watch on etcd going, and queues what it sends. With a snapshot it lists the
// keys first, and again when changes were missed. It has a goroutine only while it lists.
type reflector struct {
	watchConfig
	ctx     context.Context
	key     string
	queue   *queue
	source  watchSource
	sub     watchSub
	ready   chan error     // how the watch began, once
	listing sync.WaitGroup // for the goroutine that lists
	began   time.Time

	// The source calls one at a time what uses the rest. While the watch is parked a list uses it.
	start    Revision  // the last revision before the watch
	sent     *snapshot // nil without a snapshot
	standing bool
	listed   bool // once
	past     past
	atNext   bool // the past can only be checked at the next revision
	attempts int  // failed in a row
	lastErr  error
}

func newReflector(ctx context.Context, key string, c *watchConfig, q *queue) *reflector {
	r := &reflector{
		watchConfig: *c,
		ctx:         ctx,
		key:         key,
		queue:       q,
		source:      sourceOf(&c.config),
		ready:       make(chan error, 1),
		began:       time.Now(),
	}
	r.sub = watchSub{user: r, key: key, end: r.end(), prevKV: c.prev && !c.snapshot}
	if r.key == "" {
		r.sub.key = "\x00"
	}
	if c.snapshot {
		r.sent = newSnapshot(c.prev, !c.relists)
	}
	return r
}

// end is the end of the watched range, empty for a single key.
func (r *reflector) end() string {
	if !r.prefix {
		return ""
	}
	return clientv3.GetPrefixRangeEnd(r.key)
}

// begin starts the watch and waits until it stands, or until the policy gives up. ctx is the
// watcher's parent: as a parent of requests the watcher's own context would grow for good.
func (r *reflector) begin(ctx context.Context) error {
	streams := r.source.streams()
	if err := r.resolveStart(ctx); err != nil {
		return err
	}
	if r.sent != nil {
		r.start = 0
		r.stands(nil) // where it begins cannot be compacted under it
		r.list()
		return r.waitReady(ctx)
	}
	if r.head != nil {
		r.queue.push(change{kind: EventPut, kv: r.head, upTo: r.start})
	}
	r.sub.checkAt = streams
	seen := r.start
	r.source.start(&r.sub)
	if err := r.waitReady(ctx); err != nil || r.start == seen {
		return err
	}
	return r.learn(ctx)
}

// learn finds out what the watched keys were when the watch began, after etcd was read and before
// the watch stood.
func (r *reflector) learn(ctx context.Context) error {
	resp, err := r.look(ctx, r.start)
	if errors.Is(err, rpctypes.ErrCompacted) {
		return nil // it cannot be known
	}
	var then past
	if err == nil {
		err = then.begin(ctx, r, resp, r.start)
	}
	if err == nil {
		r.source.locked(func() { r.past.prepend(then) })
	}
	return err
}

// resolveStart finds out where to begin, whether that is possible, and what the watched keys were
// before.
func (r *reflector) resolveStart(ctx context.Context) error {
	at := max(r.from-1, 0)
	resp, err := r.look(ctx, at)
	switch {
	case errors.Is(err, rpctypes.ErrCompacted):
		if resp, err = r.look(ctx, r.from); err != nil {
			return r.gapAt(err)
		}
		r.start = r.from - 1 // what was before is not known
	case errors.Is(err, rpctypes.ErrFutureRev):
		return fmt.Errorf("%w: from revision %d, which is more than one past etcd's", ErrGap, r.from)
	case err != nil:
		return err
	case r.from == 1:
		if _, err := r.look(ctx, 1); err != nil {
			return r.gapAt(err)
		}
		r.past.cluster, r.past.counted = resp.Header.ClusterId, true
	default:
		r.start = at
		if at == 0 {
			r.start = resp.Header.Revision
		}
		if err := r.past.begin(ctx, r, resp, r.start); err != nil {
			return err
		}
	}
	r.sub.known = resp.Header.GetRevision()
	r.sub.next, r.sub.from = r.from, r.start+1
	return nil
}

func (r *reflector) gapAt(err error) error {
	if errors.Is(err, rpctypes.ErrCompacted) {
		return fmt.Errorf("%w: from revision %d: %w", ErrGap, r.from, err)
	}
	return err
}

// look reads the first watched key and the number of keys, as of a revision, where 0 is now.
func (r *reflector) look(ctx context.Context, at Revision) (*clientv3.GetResponse, error) {
	return r.get(ctx, r.watched(r.key, clientv3.WithRev(at), clientv3.WithLimit(1), clientv3.WithKeysOnly()))
}

func (r *reflector) get(ctx context.Context, op clientv3.Op) (*clientv3.GetResponse, error) {
	return retry(ctx, &r.config, r.retry, "watch", func(ctx context.Context) (*clientv3.GetResponse, error) {
		resp, err := r.client.Do(ctx, op)
		return resp.Get(), err
	})
}

// watched reads what is watched, from a key on.
func (r *reflector) watched(from string, opts ...clientv3.OpOption) clientv3.Op {
	switch {
	case from == "":
		from = "\x00" // the first key
		fallthrough
	case r.prefix:
		opts = append(opts, clientv3.WithRange(r.end()))
	}
	return clientv3.OpGet(from, opts...)
}

// waitReady waits until the watch stands, for as long as the policy allows.
func (r *reflector) waitReady(ctx context.Context) error {
	limit := ctx
	if elapsed := r.retry.withDefaults().Elapsed; elapsed > 0 {
		var cancel context.CancelFunc
		limit, cancel = context.WithDeadline(ctx, r.began.Add(elapsed))
		defer cancel()
	}
	select {
	case err := <-r.ready:
		return err
	case <-limit.Done():
	}
	r.source.stop(&r.sub)
	switch {
	case ctx.Err() != nil:
		return contextError(ctx)
	case r.lastErr != nil:
		return attemptsExhausted(r.attempts, r.began, r.lastErr)
	}
	return attemptsExhausted(1, r.began, context.DeadlineExceeded)
}

// stands reports how the watch began: nil if no later change is missed.
func (r *reflector) stands(err error) {
	select {
	case r.ready <- err:
	default: // it had
	}
}

// drained resumes a watch that was parked because its reader was behind.
func (r *reflector) drained() {
	if !r.source.drained(&r.sub) {
		return
	}
	if r.sent != nil {
		r.reporter.watchResynced(WatchEvent{Key: r.key, Err: errReaderBehind})
		r.list()
		return
	}
	r.source.start(&r.sub)
}

// close stops the watch. Its context has ended, or its end was delivered.
func (r *reflector) close() {
	r.source.stop(&r.sub)
	r.listing.Wait()
}

// fail ends the watch.
func (r *reflector) fail(err error) {
	r.stands(err)
	r.queue.push(change{end: errorf("watch %q: %w", r.key, err)})
}

// resyncOrGap lists again, if there is a snapshot, or ends the watch with ErrGap.
func (r *reflector) resyncOrGap(err error) {
	if r.sent == nil {
		r.fail(fmt.Errorf("%w: after revision %d: %w", ErrGap, r.sub.next-1, err))
		return
	}
	r.reporter.watchResynced(WatchEvent{Key: r.key, Err: err})
	r.list()
}

func (r *reflector) created(Revision) {
	if !r.standing && r.sent == nil && r.start < r.sub.from-1 {
		r.start = r.sub.from - 1
		r.past = past{cluster: r.past.cluster, seen: r.past.seen} // as of then it is not known
	}
	r.standing = true
	r.attempts, r.lastErr = 0, nil
	r.stands(nil)
}

func (r *reflector) failed(err error) {
	r.attempts++
	r.lastErr = err
	if r.attempts > 1 { // it lost its stream, and cannot be resumed at once
		r.reporter.watchStalled(r.key, r.attempts, err)
	}
	if r.retry.Attempts > 0 && r.attempts >= r.retry.Attempts {
		r.stands(attemptsExhausted(r.attempts, r.began, err)) // counts before the watch stands
	}
}

func (r *reflector) refused(err error) { r.fail(err) }

func (r *reflector) missed(err error) {
	if r.mayBeUnchanged(err) {
		r.listing.Go(func() { r.resumeUnchanged(err) }) // until etcd has answered, or the context ends
		return
	}
	r.resyncOrGap(err)
}

// mayBeUnchanged reports whether one read can show that nothing was missed although etcd has
// compacted what came next: whether a single key is as it was after its last change.
func (r *reflector) mayBeUnchanged(err error) bool {
	return errors.Is(err, rpctypes.ErrCompacted) && r.sent == nil && !r.prefix && r.past.newest.mod > 0 && !r.past.newest.deleted
}

// resumeUnchanged resumes the parked watch if its key has not changed.
func (r *reflector) resumeUnchanged(missed error) {
	streams := r.source.streams()
	rev, same, err := r.compareNow()
	switch {
	case r.ctx.Err() != nil:
	case err != nil:
		r.fail(err)
	case !same:
		r.resyncOrGap(missed)
	default:
		r.queue.pass(rev)
		r.source.restart(&r.sub, rev+1, streams)
	}
}

// compareNow reports whether the key is as it was, as of the revision that it returns.
func (r *reflector) compareNow() (rev Revision, same bool, err error) {
	reads := &batchReader{ctx: r.ctx, client: r.client}
	for {
		var read stateRead
		r.source.locked(func() { read = r.past.read(r, 0) })
		err = errClientClosed // nobody else ends the read
		reads.read([]readRequest{{
			ops:    read.ops,
			cost:   read.cost,
			failed: func(error) {},
			done: func(resp *clientv3.TxnResponse, failed error) {
				r.source.locked(func() {
					if err = failed; err == nil {
						rev, same = resp.Header.Revision, r.past.same(r, resp)
					} else if isTooLarge(err) {
						r.past.newest.hashed = false
					}
				})
			},
		}})
		if !isTooLarge(err) || !read.known.hashed {
			return rev, same, err
		}
	}
}

func (r *reflector) deliver(events []*mvccpb.Event, upTo Revision) (room bool) {
	if len(events) == 0 {
		if upTo >= r.sub.from || r.reports && upTo == r.sub.from-1 {
			r.queue.pass(upTo)
		}
		return true
	}
	return r.queue.push(r.changes(events, upTo)...)
}

// changes returns what is wanted of events, and up to where it goes.
func (r *reflector) changes(events []*mvccpb.Event, upTo Revision) []change {
	changes := make([]change, 0, len(events))
	for _, e := range events {
		rev := e.Kv.ModRevision
		if n := len(changes); n > 0 && changes[n-1].kv.ModRevision < rev {
			changes[n-1].upTo = rev - 1
		}
		if rev >= r.sub.from {
			changes = append(changes, r.changeOf(e))
			r.past.event(e)
		}
	}
	if n := len(changes); n > 0 {
		changes[n-1].upTo = upTo
		r.past.hash(events[len(events)-1])
		return changes
	}
	if upTo < r.sub.from {
		return nil
	}
	return append(changes, change{upTo: upTo})
}

func (r *reflector) changeOf(e *mvccpb.Event) change {
	kind := EventPut
	if e.Type == mvccpb.DELETE {
		kind = EventDelete
	}
	if r.sent == nil {
		return change{kind: kind, kv: e.Kv, prev: e.PrevKv}
	}
	return r.sent.change(kind, e.Kv)
}

// errRestored says that etcd has gone back to an older state, and may have been written since.
var errRestored = errors.New("etcd has another history: it was restored")

func (r *reflector) history(next Revision) stateRead {
	at := next - 1
	if r.atNext {
		at = next
	}
	if at <= 0 {
		return stateRead{}
	}
	return r.past.read(r, at)
}

func (r *reflector) checked(read stateRead, resp *clientv3.TxnResponse, err error) historyVerdict {
	switch {
	case read.known != r.past.newest || read.seen != r.past.seen: // learn has found out more
		return checkAgain
	case errors.Is(err, rpctypes.ErrCompacted) && r.past.newest.probed:
		r.past.newest.probed = false
		return checkAgain
	case errors.Is(err, rpctypes.ErrCompacted) && !r.atNext:
		r.atNext = true
		return checkAgain
	case errors.Is(err, rpctypes.ErrCompacted): // the watch reports by how much
		r.atNext = false
		return resumeWatch
	case errors.Is(err, rpctypes.ErrFutureRev):
		err = errRestored
	case isTooLarge(err) && r.past.newest.hashed:
		r.past.newest.hashed = false
		return checkAgain
	case err == nil && !r.past.same(r, resp):
		err = errRestored
	}
	r.atNext = false
	switch {
	case err == nil:
		return resumeWatch
	case err == errRestored:
		r.resyncOrGap(err)
	default:
		r.fail(err)
	}
	return parkWatch
}

func (r *reflector) present() stateRead {
	if !r.past.counted {
		return stateRead{}
	}
	return r.past.read(r, 0)
}

func (r *reflector) unchanged(read stateRead, resp *clientv3.TxnResponse) bool {
	return read.known == r.past.newest && r.past.same(r, resp)
}

// past is what is known of the watched keys at the last revision that was passed. It distinguishes
// one history from another: a restored etcd may have been written so much since that its revision
// does not show the restore.
type past struct {
	cluster uint64   // which etcd it was
	seen    Revision // the newest that etcd is known to have had
	count   int64    // of the keys, if counted; else what it has grown by
	counted bool
	newest  keyState // the newest change; zero if none is known
}

// maxSorted is the most keys among which newest looks. etcd reads them all to sort them.
const maxSorted = 10_000

// keyState is the state of a key after a change.
type keyState struct {
	key     string
	mod     Revision
	create  Revision
	version int64
	value   uint64 // its hash
	size    int    // of the value
	hashed  bool
	deleted bool
	probed  bool // deleted, and what it was before is compared: that it was there
}

// begin takes what was read at the start: the first key and the number of keys.
func (p *past) begin(ctx context.Context, r *reflector, resp *clientv3.GetResponse, at Revision) error {
	p.cluster, p.seen, p.count, p.counted = resp.Header.ClusterId, resp.Header.Revision, resp.Count, true
	if len(resp.Kvs) == 0 {
		return nil
	}
	newest := resp.Kvs[0]
	if resp.Count > 1 && resp.Count <= maxSorted && r.sent == nil {
		sorted, err := r.get(ctx, r.newest(at))
		switch {
		case errors.Is(err, rpctypes.ErrCompacted), errors.Is(err, rpctypes.ErrFutureRev), err == nil && len(sorted.Kvs) == 0:
			return nil
		case err != nil:
			return err
		}
		newest = sorted.Kvs[0]
	} else if resp.Count > 1 {
		return nil
	}
	p.newest = stateOfKey(newest)
	return nil
}

func stateOfKey(kv *mvccpb.KeyValue) keyState {
	return keyState{key: string(kv.Key), mod: kv.ModRevision, create: kv.CreateRevision, version: kv.Version}
}

// event takes a change.
func (p *past) event(e *mvccpb.Event) {
	p.newest = stateOfKey(e.Kv)
	p.seen = max(p.seen, e.Kv.ModRevision)
	switch {
	case e.Type == mvccpb.DELETE:
		p.newest.deleted, p.newest.probed = true, true
		p.count--
	case e.Kv.Version == 1:
		p.count++
	}
}

// prepend adds what was known before the changes of p.
func (p *past) prepend(before past) {
	p.cluster, p.seen = before.cluster, max(p.seen, before.seen)
	p.count += before.count
	p.counted = before.counted
	if p.newest.mod == 0 {
		p.newest = before.newest
	}
}

// hash keeps the value of the newest change.
func (p *past) hash(e *mvccpb.Event) {
	if e.Type != mvccpb.DELETE && string(e.Kv.Key) == p.newest.key {
		p.newest.hash(e.Kv.Value)
	}
}

func (k *keyState) hash(value []byte) {
	k.value, k.size, k.hashed = hashOf(value), len(value), true
}

// listed takes a key of a list.
func (p *past) listed(kv *mvccpb.KeyValue) {
	p.count++
	if kv.ModRevision > p.newest.mod {
		p.newest = stateOfKey(kv)
		p.newest.hash(kv.Value)
	}
}

// newest reads the key that was changed last.
func (r *reflector) newest(at Revision) clientv3.Op {
	return r.watched(r.key, clientv3.WithRev(at), clientv3.WithLimit(1), clientv3.WithKeysOnly(),
		clientv3.WithSort(clientv3.SortByModRevision, clientv3.SortDescend))
}

// read returns how to read what same compares, as of a revision, where 0 is now.
func (p *past) read(r *reflector, at Revision) stateRead {
	return stateRead{ops: p.reads(r, at), cost: p.cost(r), known: p.newest, seen: p.seen}
}

// reads reads the newest change, then for a prefix what there is.
func (p *past) reads(r *reflector, at Revision) []clientv3.Op {
	var ops []clientv3.Op
	switch {
	case p.newest.mod > 0:
		opts := []clientv3.OpOption{clientv3.WithRev(at)}
		if !p.newest.hashed {
			opts = append(opts, clientv3.WithKeysOnly())
		}
		ops = append(ops, clientv3.OpGet(p.newest.key, opts...))
		if p.probes(at) {
			ops = append(ops, clientv3.OpGet(p.newest.key, clientv3.WithRev(p.newest.mod-1), clientv3.WithKeysOnly()))
		}
	case !r.prefix:
		ops = append(ops, clientv3.OpGet(r.key, clientv3.WithRev(at), clientv3.WithKeysOnly()))
	}
	if r.prefix {
		if p.count <= maxSorted {
			return append(ops, r.newest(at))
		}
		return append(ops, r.watched(r.key, clientv3.WithRev(at), clientv3.WithCountOnly()))
	}
	return ops
}

// probes reports whether a read as of a revision, where 0 is now, looks at a deleted key before its
// deletion.
func (p *past) probes(at Revision) bool { return p.newest.probed && at > 0 }

// keyCost is about what etcd does for a key that it reads to sort it, as a number of bytes.
const keyCost = 200

// cost is about what etcd does for what reads returns.
func (p *past) cost(r *reflector) (cost int) {
	if p.newest.hashed {
		cost += p.newest.size
	}
	keys := int(max(p.count, 0))
	if !p.counted { // there may be as many
		keys = max(keys, maxSorted)
	}
	switch {
	case !r.prefix:
	case keys <= maxSorted:
		cost += keys * keyCost
	default:
		cost += keys // they are only counted
	}
	return cost
}

// same reports whether etcd's history is what it was.
func (p *past) same(r *reflector, resp *clientv3.TxnResponse) bool {
	header := resp.Header
	if header.Revision < p.seen || p.cluster != 0 && header.ClusterId != p.cluster {
		return false
	}
	p.seen, p.cluster = header.Revision, header.ClusterId
	next := Revision(math.MaxInt64) // changes from here on are still to come
	if r.atNext {
		next = r.sub.next
	}
	responses := resp.Responses
	if p.newest.mod > 0 || !r.prefix {
		if !p.sameKey(first(responses[0].GetResponseRange().Kvs), next) {
			return false
		}
		responses = responses[1:]
	}
	if probed := len(responses) > 1 || !r.prefix && len(responses) > 0; probed {
		if len(responses[0].GetResponseRange().Kvs) == 0 {
			return false
		}
		responses = responses[1:]
	}
	if !r.prefix {
		return true
	}
	there := responses[0].GetResponseRange()
	newest := first(there.Kvs)
	switch {
	case newest.GetModRevision() >= next:
		return true // what was before cannot be seen any more
	case p.counted && there.Count != p.count:
		return false
	}
	return newest == nil || p.newest.mod == 0 || newest.ModRevision <= p.newest.mod
}

// sameKey compares the key that was changed last.
func (p *past) sameKey(now *mvccpb.KeyValue, next Revision) bool {
	was := p.newest
	switch {
	case now.GetModRevision() >= next:
		return true
	case was.mod == 0: // of a single key
		return !p.counted || (now != nil) == (p.count > 0)
	case now == nil || was.deleted:
		return now == nil && was.deleted
	case was.hashed && hashOf(now.Value) != was.value:
		return false
	}
	return now.ModRevision == was.mod && now.CreateRevision == was.create && now.Version == was.version
}

// isTooLarge reports whether an answer was larger than the client accepts.
func isTooLarge(err error) bool {
	f := statusOf(err)
	return f.code == codes.ResourceExhausted && strings.HasPrefix(f.message, "grpc: received message larger than max")
}

// list has a goroutine list the keys, and then resume the watch, which is parked.
func (r *reflector) list() {
	r.listing.Go(func() { // until the list is made, or the context ends
		next, streams, err := r.listUntilDone()
		switch {
		case r.ctx.Err() != nil:
		case err != nil:
			r.fail(err)
		default:
			r.source.restart(&r.sub, next, streams)
		}
	})
}

// errBroken says that the connection broke while a list was made.
var errBroken = errors.New("the connection is broken")

// maxRelists is how often a list is made anew because the connection broke. It may break faster
// than a list is made.
const maxRelists = 3

// listUntilDone queues the difference between what was sent and what there is.
func (r *reflector) listUntilDone() (next Revision, streams int64, err error) {
	for broken := 0; ; {
		streams = r.source.streams()
		next, err = r.listOnce(broken < maxRelists)
		switch {
		case err == nil:
			return next, streams, nil
		case errors.Is(err, errBroken):
			broken++
		case errors.Is(err, errRestored), errors.Is(err, rpctypes.ErrCompacted), errors.Is(err, rpctypes.ErrFutureRev):
			// A restore makes a revision a future one.
			sleep(r.ctx, RetryPolicy{}.withDefaults().backoff(1))
		default:
			return 0, 0, err
		}
		if r.ctx.Err() != nil {
			return 0, 0, contextError(r.ctx)
		}
	}
}

// listOnce lists page by page, all at the revision of the first, and waits for the reader between
// them.
//
// If strict, it ends with errBroken if the connection broke between the first page and the last:
// etcd may have been restored, and been written past the list's revision, so that the pages are of
// two histories.
func (r *reflector) listOnce(strict bool) (next Revision, err error) {
	r.queue.push(r.sent.begin()...)
	r.past = past{counted: true}
	r.atNext = false
	unbroken, cancel := context.WithCancelCause(r.ctx)
	defer cancel(nil)
	var rev Revision
	var listed keyHash
	limit := int64(minPage)
	for from, more := r.key, true; more; {
		resp, err := r.page(from, rev, &limit)
		if err != nil {
			return 0, err
		}
		if rev == 0 { // it begins with whatever etcd this is
			rev = resp.Header.Revision
			go r.cancelOnDisconnect(unbroken, cancel) // until the list is made
		} else if resp.Header.Revision < rev || resp.Header.ClusterId != r.past.cluster {
			return 0, errRestored
		}
		r.past.seen, r.past.cluster = resp.Header.Revision, resp.Header.ClusterId
		for _, kv := range resp.Kvs {
			r.past.listed(kv)
			listed.add(kv)
		}
		if changes := r.sent.page(resp.Kvs); !r.queue.push(changes...) {
			r.queue.awaitRoom(r.ctx)
		}
		limit = pageAfter(resp.Kvs, limit)
		if more = resp.More; more {
			from = string(resp.Kvs[len(resp.Kvs)-1].Key) + "\x00"
		}
	}
	if strict && context.Cause(unbroken) == errBroken {
		return 0, errBroken
	}
	if err := r.verifyListed(rev, &listed); err != nil {
		return 0, err
	}
	r.queue.push(append(r.sent.deletions(rev), change{kind: EventSynced, upTo: rev})...)
	r.listed = true
	return rev + 1, nil
}

// listAttempts limits the attempts at a page of the list that NewMirror waits for. 0 means no
// limit.
func (r *reflector) listAttempts() int {
	if r.relists && !r.listed {
		return r.retry.Attempts
	}
	return 0
}

// maxVerified is up to how many keys the pages of a list are verified: the keys come in one answer,
// which must be short enough for a slow link.
const maxVerified = 1000

// verifyListed makes sure that the pages of a list are of one history, where the connection does
// not show it. It reads at once which keys there are, unless those are very many.
func (r *reflector) verifyListed(rev Revision, listed *keyHash) error {
	if listed.keys <= minPage || listed.keys > maxVerified {
		return nil
	}
	limit := int64(maxVerified)
	resp, err := r.page(r.key, rev, &limit, clientv3.WithKeysOnly())
	switch {
	case err != nil:
		return err
	case limit < maxVerified: // too much at once, for the client or its link
		return nil
	}
	var now keyHash
	for _, kv := range resp.Kvs {
		now.add(kv)
	}
	if resp.More || now.sum() != listed.sum() {
		return errRestored
	}
	return nil
}

// keyHash is a hash of keys and of when they were written.
type keyHash struct {
	keys int
	hash maphash.Hash
}

func (h *keyHash) add(kv *mvccpb.KeyValue) {
	if h.keys++; h.keys == 1 {
		h.hash.SetSeed(hashSeed)
	}
	maphash.WriteComparable(&h.hash, keyState{key: string(kv.Key), mod: kv.ModRevision, create: kv.CreateRevision, version: kv.Version})
}

func (h *keyHash) sum() uint64 { return h.hash.Sum64() }

// cancelOnDisconnect cancels when all connections of the client are broken, as they are before etcd
// can be restored.
func (r *reflector) cancelOnDisconnect(ctx context.Context, cancel context.CancelCauseFunc) {
	conn := r.client.ActiveConnection()
	if conn.GetState() != connectivity.Ready || conn.WaitForStateChange(ctx, connectivity.Ready) {
		cancel(errBroken)
	}
}

const (
	minPage   = 2 // keys, which may have a megabyte and a half each
	maxPage   = 5000
	pageBytes = 1 << 20
	// maxPageBytes is the largest page that is taken. Of a larger one fewer keys are read.
	maxPageBytes = 4 << 20
	// pageTimeout is how long the first attempt at a page may take, and maxPageTimeout a later one.
	pageTimeout, maxPageTimeout = 2 * time.Second, time.Minute
)

// page reads a page, until that succeeds. A page that is too large, or too slow to come, is made
// smaller.
func (r *reflector) page(from string, at Revision, limit *int64, opts ...clientv3.OpOption) (*pb.RangeResponse, error) {
	timeout := pageTimeout
	for failed := 1; ; failed++ {
		resp, timedOut, err := attemptOnce(r.ctx, r.client, timeout, func(ctx context.Context) (*pb.RangeResponse, error) {
			opts := append(slices.Clip(opts), clientv3.WithRev(at), clientv3.WithLimit(*limit))
			return readPage(ctx, r.client, r.watched(from, opts...), *limit)
		})
		switch {
		case err == nil:
			return resp, nil
		case r.ctx.Err() != nil:
			return nil, contextError(r.ctx)
		case r.client.Ctx().Err() != nil:
			return nil, errClientClosed
		case isTooLarge(err) && *limit > 1:
			*limit = max(*limit/4, 1)
			failed--
			continue
		case timedOut:
			*limit = max(*limit/4, 1)
			timeout = min(2*timeout, maxPageTimeout)
		case !r.shouldRetry(RetryPolicy{}, err, timedOut):
			return nil, err
		}
		err = withConnectionError(r.client, err)
		if failed == r.listAttempts() {
			return nil, attemptsExhausted(failed, r.began, err)
		}
		r.source.locked(func() { r.lastErr = err })
		r.reporter.watchStalled(r.key, failed, err)
		sleep(r.ctx, RetryPolicy{}.withDefaults().backoff(failed))
	}
}

// readPage bounds the answer, which would be as large as a thousand values can be. A wrapped client
// offers no way to.
func readPage(ctx context.Context, client *clientv3.Client, op clientv3.Op, limit int64) (*pb.RangeResponse, error) {
	if !hasOwnKV(client) {
		resp, err := client.Do(ctx, op)
		return (*pb.RangeResponse)(resp.Get()), err
	}
	size := maxPageBytes
	if limit == 1 {
		size = math.MaxInt32
	}
	resp, err := clientv3.RetryKVClient(client).Range(ctx,
		&pb.RangeRequest{Key: op.KeyBytes(), RangeEnd: op.RangeBytes(), Revision: op.Rev(), Limit: limit, KeysOnly: op.IsKeysOnly()},
		grpc.WaitForReady(true), grpc.MaxCallRecvMsgSize(size))
	return resp, rpctypes.Error(err)
}

// pageAfter is how many keys to list next: so many that they have about pageBytes, if they are like
// those before, but only so many more than before.
func pageAfter(kvs []*mvccpb.KeyValue, limit int64) int64 {
	size := 1
	for _, kv := range kvs {
		size += change{kv: kv}.size()
	}
	return min(max(int64(len(kvs))*pageBytes/int64(size), minPage), 8*limit, maxPage)
}
