package etcdutil

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"example.com/etcdutil/etcdtest"
	"github.com/stretchr/testify/require"
	"go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// measuringClient counts the bytes that its client is answered.
func measuringClient(t *testing.T) (*clientv3.Client, *atomic.Int64) {
	t.Helper()
	var bytes atomic.Int64
	client := interceptedClient(t, func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		err := invoker(ctx, method, req, reply, cc, opts...)
		if m, ok := reply.(interface{ Size() int }); ok {
			bytes.Add(int64(m.Size()))
		} else if m, ok := reply.(proto.Message); ok {
			bytes.Add(int64(proto.Size(m)))
		}
		return err
	})
	return client, &bytes
}

func TestAcquireReadsNoValuesOfStrays(t *testing.T) {
	t.Parallel()
	direct := testCluster.Client(t)
	client, bytes := measuringClient(t)
	const strays = 600
	value := strings.Repeat("x", 16<<10)
	lease := mustLease(t, direct, time.Minute)
	for i := range strays / 3 {
		_, err := direct.Txn(t.Context()).Then(
			clientv3.OpPut(fmt.Sprintf("%s/stray-%d", nameOf(t), i), value),
			clientv3.OpPut(fmt.Sprintf("%s/abc-%d", nameOf(t), i), value), // it looks like a contender's
			clientv3.OpPut(fmt.Sprintf("%s/sub/%d", nameOf(t), i), value, clientv3.WithLease(lease.ID())),
		).Commit()
		require.NoError(t, err)
	}
	bytes.Store(0)
	lock := mustAcquire(t, client, nameOf(t), WithAcquireTimeout(patience))
	_, err := TryAcquire(t.Context(), client, nameOf(t))
	require.ErrorIs(t, err, ErrLockHeld)
	next := start(func() (*Lock, error) { return Acquire(context.Background(), client, nameOf(t)) })
	waiters(t, direct, nameOf(t), strays+2)
	require.NoError(t, lock.Close())
	within(t, patience, next.done, "the waiter holds")
	require.NoError(t, next.err)
	require.NoError(t, next.v.Close())
	lock, err = TryAcquire(t.Context(), client, nameOf(t))
	require.NoError(t, err)
	require.NoError(t, lock.Close())
	require.Less(t, bytes.Load(), int64(1<<20), "of %d MiB below the name", strays*len(value)>>20)
}

// Without the range compare somebody who has acquired it between the look and the write holds it too.
func TestTryAcquireIsRefusedIfSomebodyAcquiresItAfterItsLook(t *testing.T) {
	t.Parallel()
	direct := testCluster.Client(t)
	for _, when := range []string{"before the first write", "before the second"} {
		t.Run(when, func(t *testing.T) {
			t.Parallel()
			client, faults := faultyClient(t)
			lease := mustLease(t, client, time.Minute)
			var holder *Lock
			acquire := func(x txn) error {
				holder = mustAcquire(t, direct, nameOf(t))
				return x.send()
			}
			look := func(x txn) error { return x.send() }
			stray := func(x txn) error {
				mustPut(t, direct, nameOf(t)+"/stray", "")
				return x.send()
			}
			if when == "before the first write" {
				faults.inTurn(look, acquire)
			} else {
				faults.inTurn(look, stray, acquire)
			}
			_, err := TryAcquire(t.Context(), client, nameOf(t), WithLease(lease))
			require.ErrorIs(t, err, ErrLockHeld)
			require.NotNil(t, holder)
			alive, err := holder.Alive(t.Context())
			require.NoError(t, err)
			require.True(t, alive)
			require.NoError(t, holder.Close())
		})
	}
}

// Keys below the name are created before each of its writes: it queues up, looks once, and leaves.
func TestTryAcquireQueuesUpWhereItCannotGetAheadOfNewKeys(t *testing.T) {
	t.Parallel()
	direct := testCluster.Client(t)
	client, faults := faultyClient(t)
	lease := mustLease(t, client, time.Minute)
	var n atomic.Int32
	faults.each(func(x txn) error {
		mustPut(t, direct, fmt.Sprintf("%s/items/%d", nameOf(t), n.Add(1)), "")
		return x.send()
	})
	lock, err := TryAcquire(t.Context(), client, nameOf(t), WithLease(lease))
	require.NoError(t, err)
	require.LessOrEqual(t, n.Load(), int32(2*claimRounds+4), "after a few rounds")
	faults.each(nil)
	require.NoError(t, lock.Close())

	n.Store(0)
	var holder *Lock
	faults.each(func(x txn) error {
		if mustPut(t, direct, fmt.Sprintf("%s/more/%d", nameOf(t), n.Load()), ""); n.Add(1) == claimRounds+2 {
			holder = mustAcquire(t, direct, nameOf(t))
		}
		return x.send()
	})
	_, err = TryAcquire(t.Context(), client, nameOf(t), WithLease(lease))
	require.ErrorIs(t, err, ErrLockHeld)
	require.NotNil(t, holder)
	faults.each(nil)
	require.NoError(t, holder.Close())
	lock, err = TryAcquire(t.Context(), client, nameOf(t), WithLease(lease))
	require.NoError(t, err, "it has left the queue")
	require.NoError(t, lock.Close())
}

func TestAcquireUnderItsOwnLockIsHeldAtOnce(t *testing.T) {
	t.Parallel()
	client, requests := countingClient(t)
	other := testCluster.Client(t)
	lock := mustAcquire(t, client, nameOf(t))
	inner, err := Acquire(lock, client, nameOf(t)+"-inner")
	require.NoError(t, err)
	require.NoError(t, inner.Do(t.Context(), func(ctx context.Context) error { // whose own context is under neither
		requests.Store(0)
		for _, name := range []string{nameOf(t), nameOf(t) + "-inner"} {
			_, err := Acquire(ctx, client, name)
			require.ErrorIs(t, err, ErrLockHeld)
			_, err = TryAcquire(ctx, client, name)
			require.ErrorIs(t, err, ErrLockHeld)
			require.ErrorIs(t, Do(ctx, client, name, func(context.Context) error { return nil }), ErrLockHeld)
		}
		require.Zero(t, requests.Load(), "nothing was sent")
		_, err := Acquire(ctx, other, nameOf(t), WithAcquireTimeout(50*time.Millisecond))
		require.ErrorIs(t, err, context.DeadlineExceeded, "through another client it waits")
		return nil
	}))
	require.NoError(t, inner.Close())
	again, err := Acquire(context.WithoutCancel(inner), client, nameOf(t)+"-inner")
	require.NoError(t, err, "what was closed is not waited for")
	require.NoError(t, again.Close())
}

func TestInnerLockIsNotLostWithTheOuterOne(t *testing.T) {
	t.Parallel()
	client := testCluster.Client(t)
	logger, lines := recordingLogger()
	outer := mustAcquire(t, client, nameOf(t)+"-outer")
	inner, err := Acquire(outer, client, nameOf(t)+"-inner", WithLogger(logger))
	require.NoError(t, err)
	mustDelete(t, client, outer.Key())
	within(t, 15*time.Second, inner.Done(), "it ends with its parent")
	_, err = inner.Commit(t.Context())
	require.NoError(t, err, "it is still held")
	require.NoError(t, inner.Close())
	require.Equal(t, []string{"etcdutil: lock acquired", "etcdutil: lock released"}, lines())

	// What fn returns is the outer one's loss, and no reason to leave out what became of the inner one.
	outer = mustAcquire(t, client, nameOf(t)+"-outer")
	err = Do(outer, client, nameOf(t)+"-inner", func(ctx context.Context) error {
		lock, _ := LockFrom(ctx)
		mustDelete(t, client, outer.Key())
		<-ctx.Done()
		mustDelete(t, client, lock.Key())
		_, err := lock.Commit(context.Background())
		require.ErrorIs(t, err, ErrLockLost)
		return context.Cause(ctx)
	})
	require.ErrorContains(t, err, nameOf(t)+"-inner", "both losses are reported")
	require.ErrorContains(t, err, nameOf(t)+"-outer")
}

// recordingLogger returns the messages that were logged.
func recordingLogger() (*slog.Logger, func() []string) {
	h := &recordingHandler{}
	return slog.New(h), h.all
}

type recordingHandler struct {
	mu    sync.Mutex
	lines []string
}

func (h *recordingHandler) Enabled(context.Context, slog.Level) bool { return true }
func (h *recordingHandler) WithAttrs([]slog.Attr) slog.Handler       { return h }
func (h *recordingHandler) WithGroup(string) slog.Handler            { return h }
func (h *recordingHandler) Handle(_ context.Context, r slog.Record) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.lines = append(h.lines, r.Message)
	return nil
}

func (h *recordingHandler) all() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return append([]string{}, h.lines...)
}

func TestWaiterThatNeverHeldLogsNoLoss(t *testing.T) {
	t.Parallel()
	client := testCluster.Client(t)
	logger, lines := recordingLogger()
	holder := mustAcquire(t, client, nameOf(t))
	for range 2 {
		lease := mustLease(t, client, time.Minute)
		waiting := start(func() (*Lock, error) {
			return Acquire(context.Background(), client, nameOf(t), WithLease(lease), WithLogger(logger))
		})
		waiters(t, client, nameOf(t), 2)
		mustDelete(t, client, keys(t, client, nameOf(t))[1])
		within(t, 15*time.Second, waiting.done, "the waiter returns")
		require.ErrorIs(t, waiting.err, ErrLockLost)
		require.NoError(t, lease.Close())
	}
	require.NoError(t, holder.Close())
	require.Empty(t, lines())
}

func TestClosedLeaseLogsItsLocksAsReleased(t *testing.T) {
	t.Parallel()
	client := testCluster.Client(t)
	logger, lines := recordingLogger()
	lease := mustLease(t, client, time.Minute)
	locks := make([]*Lock, 3)
	for i := range locks {
		locks[i] = mustAcquire(t, client, fmt.Sprint(nameOf(t), i), WithLease(lease), WithLogger(logger))
	}
	require.NoError(t, lease.Close())
	for _, lock := range locks {
		require.ErrorIs(t, context.Cause(lock), ErrLockLost)
		require.ErrorIs(t, context.Cause(lock), ErrClosed)
		require.ErrorIs(t, lock.Close(), ErrLockLost)
	}
	count := map[string]int{}
	for _, line := range lines() {
		count[line]++
	}
	require.Equal(t, map[string]int{"etcdutil: lock acquired": 3, "etcdutil: lock released": 3}, count)
}

// Nothing is asked before a loss is reported: here etcd does not answer.
func TestLossIsReportedThoughEtcdDoesNotAnswerWhy(t *testing.T) {
	t.Parallel()
	hold := make(chan struct{})
	defer close(hold)
	var armed atomic.Bool
	client := interceptedClient(t, func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		if armed.Load() {
			select {
			case <-ctx.Done():
				return status.FromContextError(ctx.Err()).Err()
			case <-hold:
			}
		}
		return invoker(ctx, method, req, reply, cc, opts...)
	})
	direct := testCluster.Client(t)
	lock := mustAcquire(t, client, nameOf(t), WithTTL(time.Minute))
	time.Sleep(6 * keyWatchDelay) // its key is watched, and etcd has caught up with that
	armed.Store(true)
	_, err := direct.Revoke(t.Context(), lock.Lease().ID())
	require.NoError(t, err)
	within(t, 150*time.Millisecond, lock.Done(), "at once")
	require.ErrorIs(t, context.Cause(lock), ErrLockLost)
	require.NotErrorIs(t, context.Cause(lock), ErrLeaseRevoked, "that is not known yet")
	armed.Store(false)
	within(t, 15*time.Second, lock.Lease().Done(), "the lease is asked about afterwards")
	require.ErrorIs(t, context.Cause(lock.Lease()), ErrLeaseRevoked)
}

// A refusal is no reason to watch a held lock's key no more.
func TestHeldLockIsWatchedAgainAfterARefusal(t *testing.T) {
	t.Parallel()
	direct := testCluster.Client(t)
	var refusals atomic.Int32
	link := etcdtest.StartLink(t, testCluster.Endpoints()[0])
	client := interceptedClient(t, func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		if strings.HasSuffix(method, "/Range") && refusals.Add(-1) >= 0 {
			return status.Error(codes.PermissionDenied, "RBAC: access denied")
		}
		return invoker(ctx, method, req, reply, cc, opts...)
	})
	client.SetEndpoints(link.Endpoint())
	lock := mustAcquire(t, client, nameOf(t), WithTTL(time.Minute))
	time.Sleep(2 * keyWatchDelay)
	refusals.Store(3)
	link.Cut()
	rev := mustPut(t, direct, nameOf(t)+"-any", "")
	mustPut(t, direct, nameOf(t)+"-any", "")
	mustCompact(t, direct, rev)
	link.Heal()
	link.Reset()
	eventually(t, func() bool { return refusals.Load() < 0 }, "the key was looked at in vain, and then again")
	mustDelete(t, direct, lock.Key())
	within(t, 10*time.Second, lock.Done(), "it is notified")
	require.ErrorIs(t, context.Cause(lock), ErrLockLost)
}

// The write of a key that a proxy passes on late, long after its lock was closed.
func TestKeyThatLandsAfterItsLockWasClosedIsRemoved(t *testing.T) {
	t.Parallel()
	direct := testCluster.Client(t)
	for how, acquire := range map[string]func(context.Context, *clientv3.Client, string, ...LockOption) (*Lock, error){
		"Acquire": Acquire, "TryAcquire": TryAcquire,
	} {
		for seen, dropped := range map[string]bool{"seen by grpc": false, "not seen": true} {
			t.Run(how+", "+seen, func(t *testing.T) {
				t.Parallel()
				var hold atomic.Bool
				var land func() error
				client := interceptedClient(t, func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
					r, ok := req.(*etcdserverpb.TxnRequest)
					if !ok || len(r.Success) == 0 || r.Success[0].GetRequestPut() == nil || !hold.CompareAndSwap(true, false) {
						return invoker(ctx, method, req, reply, cc, opts...)
					}
					land = func() error {
						return invoker(context.WithoutCancel(ctx), method, req, new(etcdserverpb.TxnResponse), cc)
					}
					if !dropped { // gRPC's own view of what the proxy answers
						for _, o := range opts {
							if f, ok := o.(grpc.OnFinishCallOption); ok {
								f.OnFinish(errByProxy)
							}
						}
					}
					return errByProxy
				})
				lease := mustLease(t, client, 2*time.Second)
				hold.Store(true)
				lock, err := acquire(t.Context(), client, nameOf(t), WithLease(lease))
				require.NoError(t, err)
				require.NoError(t, lock.Close())
				time.Sleep(3 * time.Second) // long after
				require.NoError(t, land())
				next := start(func() (*Lock, error) { return Acquire(context.Background(), direct, nameOf(t)) })
				within(t, 5*time.Second, next.done, "the next few renewals find it")
				require.NoError(t, next.err)
				require.NoError(t, next.v.Close())
				require.NoError(t, lease.Err())
			})
		}
	}
}

func TestKeyOfAClosedLockThatARestoreBringsBackIsRemoved(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 1)
	client, others := cluster.Client(t), cluster.Client(t)
	lease := mustLease(t, client, 4*time.Second)
	lock := mustAcquire(t, client, nameOf(t), WithLease(lease))
	held := mustAcquire(t, client, nameOf(t)+"-held", WithLease(lease))
	require.NoError(t, cluster.Backup())
	require.NoError(t, lock.Close())
	require.NoError(t, cluster.Restore())
	next := start(func() (*Lock, error) { return Acquire(context.Background(), others, nameOf(t)) })
	within(t, 30*time.Second, next.done, "it blocks nobody")
	require.NoError(t, next.err)
	require.NoError(t, lease.Err())
	alive, err := held.Alive(t.Context())
	require.NoError(t, err)
	require.True(t, alive, "a lock that is held keeps its key")
}

func TestLocksUnderOutgoingMetadataLeaveNoWatchStream(t *testing.T) {
	cluster := etcdtest.Start(t, 1)
	client := cluster.Client(t)
	lease := mustLease(t, client, time.Minute)
	var all sync.WaitGroup
	for i := range 60 {
		all.Go(func() {
			ctx := metadata.AppendToOutgoingContext(t.Context(), "request-id", fmt.Sprint(i))
			lock, err := Acquire(ctx, client, fmt.Sprint(nameOf(t), i%20), WithLease(lease))
			if err != nil {
				t.Error(err)
				return
			}
			time.Sleep(time.Duration(i%3) * keyWatchDelay)
			if err := lock.Close(); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	eventually(t, func() bool { return goroutinesIn("client/v3.(*watchGRPCStream).run") <= 1 }, "no streams are left")
}
