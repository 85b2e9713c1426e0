package etcdutil

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"example.com/etcdutil/etcdtest"
	"github.com/stretchr/testify/require"
	"go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func TestCloseAfterALostReply(t *testing.T) {
	for name, shared := range map[string]bool{"own lease": false, "shared lease": true} {
		t.Run(name, func(t *testing.T) {
			client, link, opts := linkedLocker(t, shared)
			lock := mustAcquire(t, client, nameOf(t), opts...)
			link.DropReplies()
			closing := start(func() (struct{}, error) { return struct{}{}, lock.Close() })
			waiters(t, testCluster.Client(t), nameOf(t), 0)
			link.Heal()
			within(t, 5*time.Second, closing.done, "Close returns")
			require.NoError(t, closing.err, "no false failure")
		})
	}
}

// The key of a lock on a shared lease is used again, so a delete that is still under way must not
// find it.
func TestCloseThatLandsLateHitsNoSuccessor(t *testing.T) {
	for name, answer := range map[string]error{
		"after we repeated it":           status.Error(codes.Unavailable, "transport is closing"),
		"after clientv3 had repeated it": status.Error(codes.Canceled, "a proxy's"),
	} {
		t.Run(name, func(t *testing.T) {
			var hold atomic.Bool
			var land func() error
			client := interceptedClient(t, func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
				if !isWriteTxn(req) || !hold.CompareAndSwap(true, false) {
					return invoker(ctx, method, req, reply, cc, opts...)
				}
				land = func() error {
					return invoker(context.WithoutCancel(ctx), method, req, new(etcdserverpb.TxnResponse), cc)
				}
				return answer
			})
			lease := mustLease(t, client, 10*time.Second)
			first := mustAcquire(t, client, nameOf(t), WithLease(lease))
			hold.Store(true)
			require.NoError(t, first.Close())
			second := mustAcquire(t, client, nameOf(t), WithLease(lease))
			for second.Key() != first.Key() {
				require.NoError(t, second.Close())
				second = mustAcquire(t, client, nameOf(t), WithLease(lease))
			}
			require.NoError(t, land())
			alive, err := second.Alive(t.Context())
			require.NoError(t, err)
			require.True(t, alive)
			require.NoError(t, second.Err())
			require.NoError(t, second.Close())
		})
	}
}

// The key of a lost lock is gone, but a request that was to write it may be under way, and the
// lease lives on.
func TestLostLockWhoseKeyIsWrittenLateLeavesNoGhost(t *testing.T) {
	var held atomic.Bool
	var land func() error
	client := interceptedClient(t, func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		if !isWriteTxn(req) || !held.CompareAndSwap(false, true) {
			return invoker(ctx, method, req, reply, cc, opts...)
		}
		land = func() error {
			return invoker(context.WithoutCancel(ctx), method, req, new(etcdserverpb.TxnResponse), cc)
		}
		return status.Error(codes.Unavailable, "transport is closing")
	})
	lock := mustAcquire(t, client, nameOf(t), WithLease(mustLease(t, client, 10*time.Second)))
	_, err := client.Delete(t.Context(), lock.Key())
	require.NoError(t, err)
	within(t, 500*time.Millisecond, lock.Done(), "told")
	require.ErrorIs(t, lock.Close(), ErrLockLost)
	require.NoError(t, land())
	waiters(t, client, nameOf(t), 0)
}

func TestCloseThatCouldNotBeConfirmedHappensLater(t *testing.T) {
	t.Parallel()
	client, link, opts := linkedLocker(t, true)
	direct := testCluster.Client(t)
	lock := mustAcquire(t, client, nameOf(t), opts...)
	link.Cut()
	closing := start(func() (struct{}, error) { return struct{}{}, lock.Close() })
	within(t, 5500*time.Millisecond, closing.done, "Close returns")
	require.ErrorIs(t, closing.err, ErrUnknownOutcome)
	require.Len(t, keys(t, direct, nameOf(t)), 1)
	link.Heal()
	waiters(t, direct, nameOf(t), 0) // although the lease lives on
	require.NoError(t, lock.lease.Err())
}

// endingContext calls end right after it has said for the first time that it goes on.
type endingContext struct {
	context.Context
	end func()
}

func (c *endingContext) Err() error {
	err := c.Context.Err()
	if end := c.end; end != nil {
		c.end = nil
		end()
	}
	return err
}

// Close looks whether it was lost, and then ends it. The loss comes in between.
func TestCloseOfWhatIsLostAtThatMomentReportsTheLoss(t *testing.T) {
	t.Parallel()
	client := testCluster.Client(t)
	shared := mustLease(t, client, time.Minute)
	for name, opts := range map[string][]LockOption{"own lease": nil, "shared lease": {WithLease(shared)}} {
		logger, lines := recordingLogger()
		lock := mustAcquire(t, client, nameOf(t)+name, append(opts, WithLogger(logger))...)
		lock.cancelWatch()
		mustDelete(t, client, lock.Key())
		lock.mu.Lock()
		lock.stopCtx = &endingContext{lock.stopCtx, func() { _ = lock.keyDeleted() }}
		lock.mu.Unlock()
		err := lock.Close()
		require.ErrorIs(t, context.Cause(lock), ErrLockLost, name)
		require.Equal(t, context.Cause(lock), err, name)
		eventually(t, func() bool { return len(lines()) == 2 }, "both are logged")
		require.Equal(t, []string{"etcdutil: lock acquired", "etcdutil: lock lost"}, lines(), name)
	}
	lease := mustLease(t, client, time.Minute)
	lease.stopCtx = &endingContext{lease.stopCtx, func() { lease.markLost(ErrLeaseRevoked) }}
	err := lease.Close()
	require.Equal(t, ErrLeaseRevoked, context.Cause(lease))
	require.Equal(t, ErrLeaseRevoked, err)
	_, err = client.Revoke(t.Context(), lease.ID())
	require.NoError(t, err)
}

func TestSharedLeaseThatIsClosedLosesItsLocks(t *testing.T) {
	client := testCluster.Client(t)
	lease := mustLease(t, client, 10*time.Second)
	lock := mustAcquire(t, client, nameOf(t), WithLease(lease))
	require.NoError(t, lease.Close())
	within(t, time.Second, lock.Done(), "told")
	require.ErrorIs(t, context.Cause(lock), ErrLockLost)
	require.ErrorIs(t, context.Cause(lock), ErrClosed)
	require.ErrorIs(t, lock.Close(), ErrLockLost)
}

func TestLockWindsDownAfterItsParentsEnd(t *testing.T) {
	client := testCluster.Client(t)
	parent, cancel := context.WithCancelCause(context.Background())
	lock, err := Acquire(parent, client, nameOf(t))
	require.NoError(t, err)
	shutdown := errors.New("shutting down")
	cancel(shutdown)
	<-lock.Done()
	require.ErrorIs(t, context.Cause(lock), shutdown)
	require.NotErrorIs(t, context.Cause(lock), ErrLockLost)
	require.Equal(t, []string{lock.Key()}, keys(t, client, nameOf(t)))
	_, err = lock.Commit(t.Context(), clientv3.OpPut(nameOf(t)+"-state", "saved"))
	require.NoError(t, err)
	alive, err := lock.Alive(t.Context())
	require.NoError(t, err)
	require.True(t, alive)
	require.ErrorIs(t, lock.Do(t.Context(), func(context.Context) error { return nil }), shutdown)
	require.NoError(t, lock.Close(), "a parent's end is no loss")
	require.Empty(t, keys(t, client, nameOf(t)))
	require.False(t, knows(t, client, lock.Lease().ID()))
}

func TestLockOfAnEndedParentRunsOutWithItsLease(t *testing.T) {
	t.Parallel()
	client := testCluster.Client(t)
	parent, cancel := context.WithCancel(context.Background())
	lock, err := Acquire(parent, client, nameOf(t), WithTTL(2*time.Second))
	require.NoError(t, err)
	cancel()
	waiters(t, client, nameOf(t), 0)
	_, err = lock.Commit(t.Context(), clientv3.OpPut(nameOf(t)+"-state", "too late"))
	require.ErrorIs(t, err, ErrLockLost)
	require.ErrorIs(t, err, ErrLeaseExpired)
	require.ErrorIs(t, lock.Close(), ErrLockLost)
}

func TestSharedLeaseWhoseParentEndsIsNoLossOfItsLocks(t *testing.T) {
	client := testCluster.Client(t)
	parent, cancel := context.WithCancel(context.Background())
	lease, err := NewLease(parent, client, 10*time.Second)
	require.NoError(t, err)
	lock := mustAcquire(t, client, nameOf(t), WithLease(lease))
	cancel()
	within(t, time.Second, lock.Done(), "it is renewed no longer")
	require.NotErrorIs(t, context.Cause(lock), ErrLockLost)
	_, err = lock.Commit(t.Context(), clientv3.OpPut(nameOf(t)+"-state", "saved"))
	require.NoError(t, err)
	require.NoError(t, lock.Close())
	require.NoError(t, lease.Close())
}

func TestCloseOfALockHasOneResultAndIsBoundedWhileEtcdIsGone(t *testing.T) {
	t.Parallel()
	client, link := linkedClient(t)
	const ttl = 5 * time.Second // enough to begin to close it in, however slow
	lock := mustAcquire(t, client, nameOf(t), WithTTL(ttl))
	link.Cut()
	closing := make([]*async[struct{}], 10)
	for i := range closing {
		closing[i] = start(func() (struct{}, error) { return struct{}{}, lock.Close() })
	}
	for _, c := range closing {
		within(t, ttl, c.done, "Close returns within what the lease has left")
		require.ErrorIs(t, c.err, ErrUnknownOutcome)
		require.Equal(t, closing[0].err, c.err)
	}
	require.ErrorIs(t, context.Cause(lock), ErrClosed)
	waiters(t, testCluster.Client(t), nameOf(t), 0) // its lease runs out
}

func TestCloseLeavesNoGoroutineNoWatchAndNoLease(t *testing.T) {
	cluster := etcdtest.Start(t, 1)
	client := cluster.Client(t)
	_, err := client.Get(t.Context(), "connect")
	require.NoError(t, err)
	shared := mustLease(t, client, 10*time.Second, WithKeepAliveInterval(20*time.Millisecond))
	locks := []*Lock{}
	for i := range 20 {
		locks = append(locks, mustAcquire(t, client, fmt.Sprint(nameOf(t), i)), mustAcquire(t, client, fmt.Sprint(nameOf(t), "-", i), WithLease(shared)))
	}
	first := shared.Expiry()
	eventually(t, func() bool { return shared.Expiry().After(first) }, "the keepalive stream stands")
	eventually(t, func() bool { return watchesOf(client) == 40 }, "the watches stand")
	require.Zero(t, goroutinesIn("etcdutil.(*Lock)"), "a held lock has no goroutine")
	require.Positive(t, goroutinesIn("etcdutil.(*renewStream).run"))
	for _, lock := range locks {
		require.NoError(t, lock.Close())
	}
	gone(t, "etcdutil.(*Lock)", "Close joins what the lock has started")
	require.NoError(t, shared.Close())
	gone(t, "etcdutil.(*renewStream)", "and the last lease what it shares")
	eventually(t, func() bool { return watchesOf(client) == 0 }, "no watch is left")
	require.Empty(t, leases(t, client))
	require.Empty(t, renewStreamsOf(client))
	resp, err := client.Get(t.Context(), "", clientv3.WithPrefix())
	require.NoError(t, err)
	require.Empty(t, resp.Kvs)
}

func TestLostLockGivesItsKeyBackToItsLease(t *testing.T) {
	t.Parallel()
	client := testCluster.Client(t)
	lease := mustLease(t, client, 10*time.Second)
	inUse := func() int {
		return lease.slots.len()
	}
	for range 10 {
		lock := mustAcquire(t, client, nameOf(t), WithLease(lease))
		_, err := client.Delete(t.Context(), lock.Key())
		require.NoError(t, err)
		<-lock.Done()
		require.ErrorIs(t, lock.Close(), ErrLockLost)
	}
	eventually(t, func() bool { return inUse() == 0 }, "every key is given back")

	lock := mustAcquire(t, client, nameOf(t), WithLease(lease))
	_, err := client.Put(t.Context(), lock.Key(), "of somebody who has taken the lease from it")
	require.NoError(t, err)
	_, err = lock.Commit(t.Context())
	require.ErrorIs(t, err, ErrLockLost)
	require.ErrorIs(t, lock.Close(), ErrLockLost)
	eventually(t, func() bool { return len(keys(t, client, nameOf(t))) == 0 }, "it is not left behind")
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
	require.Contains(t, lines(), "etcdutil: lock released")
	require.NotContains(t, lines(), "etcdutil: lock lost")

	// What fn returns is the outer one's loss, and no reason to leave out what became of the inner
	// one.
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
	lease := mustLease(t, client, 15*time.Second) // enough for a restore, however slow
	lock := mustAcquire(t, client, nameOf(t), WithLease(lease))
	held := mustAcquire(t, client, nameOf(t)+"-held", WithLease(lease))
	require.NoError(t, cluster.Backup())
	require.NoError(t, lock.Close())
	require.NoError(t, cluster.Restore())
	next := start(func() (*Lock, error) { return Acquire(context.Background(), others, nameOf(t)) })
	within(t, 30*time.Second, next.done, "it blocks nobody")
	require.NoError(t, next.err)
	require.NoError(t, next.v.Close())
	require.NoError(t, lease.Err())
	alive, err := held.Alive(t.Context())
	require.NoError(t, err)
	require.True(t, alive, "a lock that is held keeps its key")
}

// What fn returns is the loss of the outer lock, and no reason to leave out that the release of the
// inner one is unknown.
func TestDoReportsAnUnknownReleaseBesideALossOfAnotherLock(t *testing.T) {
	t.Parallel()
	client := testCluster.Client(t)
	far, link := linkedClient(t)
	outer := mustAcquire(t, client, nameOf(t)+"-outer")
	err := Do(outer, far, nameOf(t), func(ctx context.Context) error {
		mustDelete(t, client, outer.Key())
		<-ctx.Done()
		link.Cut()
		return context.Cause(ctx)
	}, WithTTL(4*time.Second))
	require.ErrorIs(t, err, ErrLockLost)
	require.ErrorIs(t, err, ErrUnknownOutcome)
}

// lingeringWatcher ends its watches a while after their contexts.
type lingeringWatcher struct{ clientv3.Watcher }

const lingering = 300 * time.Millisecond

func (w lingeringWatcher) Watch(ctx context.Context, key string, opts ...clientv3.OpOption) clientv3.WatchChan {
	responses := make(chan clientv3.WatchResponse)
	go func() {
		defer close(responses)
		for resp := range w.Watcher.Watch(ctx, key, opts...) {
			select {
			case responses <- resp:
			case <-ctx.Done():
			}
		}
		time.Sleep(lingering)
	}()
	return responses
}

func TestLocksOfALeaseEndThoughAWatchLingers(t *testing.T) {
	t.Parallel()
	client := newClient(t, testCluster.Endpoints()...)
	client.Watcher = lingeringWatcher{client.Watcher}
	lease := mustLease(t, client, time.Minute)
	locks := make([]*Lock, 20)
	for i := range locks {
		lock := mustAcquire(t, client, fmt.Sprintf("%s-%d", nameOf(t), i), WithLease(lease))
		locks[i] = lock
		eventually(t, func() bool {
			lock.mu.Lock()
			defer lock.mu.Unlock()
			return lock.unwatch != nil
		}, "the key is watched")
	}
	ended := time.Now()
	closed := start(func() (struct{}, error) { return struct{}{}, lease.Close() })
	for _, lock := range locks {
		<-lock.Done()
	}
	require.Less(t, time.Since(ended), 5*lingering)
	<-closed.done
	require.NoError(t, closed.err)
}
