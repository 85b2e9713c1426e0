package etcdutil

import (
	"context"
	"errors"
	"math/rand/v2"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/metadata"
)

// wrappedSource keeps one watch through client.Watcher, for a client whose Watcher is wrapped
// (client/v3/namespace). Each watch has a stream and a few goroutines. What etcd sends at once is
// in memory at once, and a stream whose watch was reset may stay open until the client is closed.
type wrappedSource struct {
	client *clientv3.Client

	mu      sync.Mutex
	cancel  context.CancelFunc // nil while the watch is parked
	more    chan struct{}      // the reader has come on
	running sync.WaitGroup
	ask     *time.Timer // for progress
}

func (w *wrappedSource) streams() int64 { return 0 }

func (w *wrappedSource) locked(f func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	f()
}

func (w *wrappedSource) start(sub *watchSub) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if sub.stopped || w.cancel != nil {
		return
	}
	w.more = make(chan struct{}, 1)
	var ctx context.Context
	ctx, w.cancel = context.WithCancel(clientv3.WithRequireLeader(context.Background()))
	w.running.Go(func() { w.run(ctx, sub) }) // until the watch is parked or stopped
}

func (w *wrappedSource) restart(sub *watchSub, next Revision, _ int64) {
	w.locked(func() { sub.next, sub.from = next, next })
	w.start(sub)
}

func (w *wrappedSource) drained(sub *watchSub) (resume bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.cancel != nil {
		wake(w.more)
	}
	resume, sub.paused = sub.paused, false
	return resume
}

func (w *wrappedSource) askProgress(*watchSub) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.ask != nil {
		w.ask.Reset(0) // it does nothing after the watch's end
	}
}

// standing cannot exclude that clientv3 is about to resume the watch.
func (w *wrappedSource) standing(sub *watchSub, f func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.cancel != nil && sub.next != 0 {
		f()
	}
}

// stop waits for the watch to end, but not for that of a lock's key: the other locks of its lease
// have yet to be canceled.
func (w *wrappedSource) stop(sub *watchSub) {
	w.mu.Lock()
	sub.stopped = true
	w.park()
	w.mu.Unlock()
	if !sub.forLock {
		w.running.Wait()
	}
}

func (w *wrappedSource) park() {
	if w.cancel != nil {
		w.cancel()
		w.cancel = nil
	}
}

func (w *wrappedSource) run(ctx context.Context, sub *watchSub) {
	for failed := 0; ctx.Err() == nil; {
		if sub.next != 0 && !w.check(ctx, sub) {
			if w.client.Ctx().Err() != nil { // so nothing was decided
				w.locked(func() { w.failed(ctx, sub, errClientClosed) })
			}
			return
		}
		if failed > 0 {
			w.spendTurns(ctx)
		}
		heard, err := w.follow(ctx, sub)
		if failed++; heard {
			failed = 1
		}
		w.locked(func() { w.failed(ctx, sub, err) })
		sleep(ctx, RetryPolicy{}.withDefaults().backoff(failed))
		redial(w.client)
	}
}

// failed decides whether the watch goes on after err.
func (w *wrappedSource) failed(ctx context.Context, sub *watchSub, err error) {
	switch {
	case ctx.Err() != nil:
	case w.client.Ctx().Err() != nil:
		w.park()
		sub.user.refused(errClientClosed)
	case isTooLarge(err) && sub.large && !sub.forLock: // in fragments too
		w.park()
		sub.user.missed(err)
	default:
		sub.large = sub.large || isTooLarge(err)
		sub.user.failed(err)
	}
}

// spendTurns has the next stream reach any member. gRPC takes the members in turn, and the check
// has just been answered by a good one: of two members the bad one would always get the stream.
func (w *wrappedSource) spendTurns(ctx context.Context) {
	for range rand.N(len(w.client.Endpoints()) + 1) {
		ctx, cancel := context.WithTimeout(ctx, turnTimeout)
		_, _ = pb.NewMaintenanceClient(w.client.ActiveConnection()).Status(ctx, &pb.StatusRequest{})
		cancel()
	}
}

// turnTimeout bounds a request that is sent only for its turn.
const turnTimeout = 250 * time.Millisecond

// check checks the history. It reports whether the watch may be resumed.
func (w *wrappedSource) check(ctx context.Context, sub *watchSub) bool {
	reads := &batchReader{ctx: ctx, client: w.client}
	var guards []clientv3.Cmp
	if sub.guards != nil {
		guards = sub.guards()
	}
	for {
		var read stateRead
		w.locked(func() { read = sub.user.history(sub.next) })
		if len(read.ops)+len(guards) == 0 {
			return true
		}
		result := parkWatch // where ctx ended
		reads.read([]readRequest{{
			ops:    read.ops,
			cost:   read.cost,
			guards: guards,
			failed: func(err error) { w.locked(func() { sub.user.failed(err) }) },
			done: func(resp *clientv3.TxnResponse, err error) {
				w.locked(func() {
					if ctx.Err() != nil {
						return
					}
					if result = sub.user.checked(read, resp, err); result == parkWatch {
						w.park()
					}
				})
			},
		}})
		if result != checkAgain {
			return result == resumeWatch
		}
		sleep(ctx, RetryPolicy{}.withDefaults().backoff(1))
	}
}

// wrappedStreams counts the streams for watches of wrapped clients.
var wrappedStreams atomic.Int64

// ownStreamContext makes clientv3 open a stream for one watch. On a stream that watches share,
// clientv3 takes an answer about progress for all, and it may have overtaken the creation of a
// watch.
func ownStreamContext(ctx context.Context) context.Context {
	return metadata.AppendToOutgoingContext(ctx, "etcdutil-stream", "watch-"+strconv.FormatInt(wrappedStreams.Add(1), 10))
}

// follow watches until that ends. It returns why, and whether anything came.
func (w *wrappedSource) follow(ctx context.Context, sub *watchSub) (heard bool, err error) {
	ctx, cancel := context.WithCancelCause(ownStreamContext(ctx))
	defer cancel(nil)
	silent := time.AfterFunc(idleTimeout, func() { cancel(errIdle) })
	defer silent.Stop()
	ask := w.startAsking(ctx)
	defer ask.Stop()
	opts := []clientv3.OpOption{clientv3.WithCreatedNotify()}
	if !sub.forLock {
		opts = append(opts, clientv3.WithRev(sub.next))
	}
	if sub.end != "" {
		opts = append(opts, clientv3.WithRange(sub.end))
	}
	if sub.prevKV {
		opts = append(opts, clientv3.WithPrevKV())
	}
	if sub.onlyDeletes {
		opts = append(opts, clientv3.WithFilterPut())
	}
	if sub.large {
		opts = append(opts, clientv3.WithFragment())
	}
	for resp := range w.client.Watcher.Watch(ctx, sub.key, opts...) {
		silent.Stop()
		room, err := w.handle(sub, &resp)
		if err != nil {
			return heard, err
		}
		heard = true
		if resp.Created && sub.forLock && !w.check(ctx, sub) {
			return heard, context.Cause(ctx)
		}
		if !room && !w.waitForReader(ctx, cancel, sub) {
			return heard, errReaderBehind
		}
		silent.Reset(idleTimeout)
	}
	return heard, context.Cause(ctx)
}

// startAsking asks for progress again and again until ctx ends.
func (w *wrappedSource) startAsking(ctx context.Context) *time.Timer {
	var ask *time.Timer
	interval := func() time.Duration { return progressInterval/2 + rand.N(progressInterval/2) }
	ask = time.AfterFunc(time.Hour, func() {
		if ctx.Err() == nil { // else clientv3 might open another stream for it
			_ = w.client.Watcher.RequestProgress(ctx)
			ask.Reset(interval())
		}
	})
	ask.Reset(interval())
	w.locked(func() { w.ask = ask })
	return ask
}

// waitForReader waits until the reader has come on. After a while the watch ends, so that etcd
// keeps nothing for it.
func (w *wrappedSource) waitForReader(ctx context.Context, cancel context.CancelCauseFunc, sub *watchSub) bool {
	timeout := time.NewTimer(slowReaderGrace)
	defer timeout.Stop()
	select {
	case <-w.more:
		return true
	case <-ctx.Done():
		return false
	case <-timeout.C:
	}
	cancel(errReaderBehind)
	w.mu.Lock()
	defer w.mu.Unlock()
	select {
	case <-w.more:
	default:
		w.park()
		sub.paused = true
	}
	return false
}

// handle takes a response. It reports whether the reader has room for more.
func (w *wrappedSource) handle(sub *watchSub, resp *clientv3.WatchResponse) (room bool, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.cancel == nil {
		return true, errReaderBehind
	}
	err = resp.Err()
	switch {
	case errors.Is(err, rpctypes.ErrCompacted) && !sub.forLock && resp.CompactRevision > sub.next:
		if resp.CompactRevision <= sub.from {
			sub.next = resp.CompactRevision // nothing was lost
			return true, err
		}
		w.park()
		sub.user.missed(rpctypes.ErrCompacted)
		return true, err
	case err != nil:
		if refused := watchRefusal(err.Error()); errors.Is(refused, rpctypes.ErrPermissionDenied) {
			if !sub.forLock {
				w.park()
			}
			sub.user.refused(refused)
		}
		return true, err
	case resp.Created:
		if sub.next == 0 && !sub.forLock && !sub.beginAfter(resp.Header.Revision) {
			return true, errMemberBehind
		}
		sub.user.created(resp.Header.Revision)
		return true, nil
	}
	return w.deliver(sub, resp), nil
}

func (w *wrappedSource) deliver(sub *watchSub, resp *clientv3.WatchResponse) (room bool) {
	events := resp.Events
	upTo := resp.Header.Revision
	if len(events) > 0 {
		upTo = events[len(events)-1].Kv.ModRevision
	} else if !resp.IsProgressNotify() {
		return true
	}
	if sub.forLock {
		return sub.user.deliver(events, upTo)
	}
	if upTo < sub.next {
		return true
	}
	for len(events) > 0 && events[0].Kv.ModRevision < sub.next {
		events = events[1:]
	}
	sub.next = upTo + 1
	return sub.user.deliver(events, upTo)
}
