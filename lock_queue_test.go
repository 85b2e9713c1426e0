package etcdutil

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"example.com/etcdutil/etcdtest"
	"github.com/stretchr/testify/require"
	"go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

func TestQueueIsFirstComeFirstServed(t *testing.T) {
	client := testCluster.Client(t)
	holder := mustAcquire(t, client, nameOf(t))
	queue := make([]*async[*Lock], 5)
	for i := range queue {
		queue[i] = start(func() (*Lock, error) { return Acquire(context.Background(), client, nameOf(t)) })
		waiters(t, client, nameOf(t), i+2)
	}
	for _, next := range queue {
		require.NoError(t, holder.Close())
		within(t, 5*time.Second, next.done, "the next in order holds")
		require.NoError(t, next.err)
		require.Greater(t, next.v.Token(), holder.Token())
		holder = next.v
	}
	require.NoError(t, holder.Close())
}

func TestQueueOutlivesAMiddleWaiterThatGivesUp(t *testing.T) {
	client := testCluster.Client(t)
	holder := mustAcquire(t, client, nameOf(t))
	ctx, giveUp := context.WithCancel(context.Background())
	middle := start(func() (*Lock, error) { return Acquire(ctx, client, nameOf(t)) })
	waiters(t, client, nameOf(t), 2)
	last := start(func() (*Lock, error) { return Acquire(context.Background(), client, nameOf(t)) })
	waiters(t, client, nameOf(t), 3)

	giveUp()
	within(t, 100*time.Millisecond, middle.done, "who gives up returns")
	require.ErrorIs(t, middle.err, context.Canceled)
	waiters(t, client, nameOf(t), 2)
	select {
	case <-last.done:
		require.Fail(t, "the last one holds while the first one does")
	case <-time.After(300 * time.Millisecond): // far longer than a hand-over takes
	}
	require.NoError(t, holder.Close())
	within(t, 5*time.Second, last.done, "the last one holds")
	require.NoError(t, last.err)
	require.NoError(t, last.v.Close())
}

// The key of a predecessor that releases and queues up again may be the same: it is another
// contender, and younger.
func TestWaiterIsNotFooledByAPredecessorThatReleasesAndQueuesAgainUnderTheSameKey(t *testing.T) {
	direct := testCluster.Client(t)
	opening, open := make(chan struct{}), make(chan struct{})
	var once sync.Once
	client, err := clientv3.New(clientv3.Config{Endpoints: testCluster.Endpoints(), Logger: zap.NewNop(), DialOptions: []grpc.DialOption{
		grpc.WithChainStreamInterceptor(func(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, streamer grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
			if strings.HasSuffix(method, "/Watch") {
				once.Do(func() { close(opening) })
				<-open
			}
			return streamer(ctx, desc, cc, method, opts...)
		}),
	}})
	require.NoError(t, err)
	t.Cleanup(func() { _ = client.Close() })

	session, err := concurrency.NewSession(direct)
	require.NoError(t, err)
	defer session.Close()
	mutex := concurrency.NewMutex(session, nameOf(t)) // which has one key
	require.NoError(t, mutex.Lock(t.Context()))
	waiting := start(func() (*Lock, error) { return Acquire(context.Background(), client, nameOf(t)) })
	<-opening
	require.NoError(t, mutex.Unlock(t.Context()))
	again := start(func() (struct{}, error) { return struct{}{}, mutex.Lock(context.Background()) })
	waiters(t, direct, nameOf(t), 2)
	close(open)
	within(t, 2*time.Second, waiting.done, "it holds, and not for having looked again after a while")
	require.NoError(t, waiting.err)
	require.NoError(t, waiting.v.Close())
	<-again.done
	require.NoError(t, again.err)
}

func TestQueueOfTwoHundredOnOneLeaseTakesTurnsInOrderOfArrival(t *testing.T) {
	const n = 200
	client := testCluster.Client(t)
	lease := mustLease(t, client, 10*time.Second)
	first := mustAcquire(t, client, nameOf(t), WithLease(lease))
	var inside atomic.Int32
	var mu sync.Mutex
	tokens := []Revision{first.Token()}
	var all sync.WaitGroup
	for range n {
		all.Go(func() {
			err := Do(context.Background(), client, nameOf(t), func(ctx context.Context) error {
				if others := inside.Add(1); others != 1 {
					t.Errorf("%d at a time", others)
				}
				defer inside.Add(-1)
				lock, _ := LockFrom(ctx)
				mu.Lock()
				defer mu.Unlock()
				tokens = append(tokens, lock.Token())
				return nil
			}, WithLease(lease))
			if err != nil {
				t.Error(err)
			}
		})
	}
	waiters(t, client, nameOf(t), n+1)
	require.NoError(t, first.Close())
	all.Wait()
	require.Len(t, tokens, n+1)
	require.True(t, slices.IsSorted(tokens), "the order of holding is that of arrival, which the token is")
	require.Len(t, slices.Compact(slices.Clone(tokens)), n+1)
	require.Empty(t, keys(t, client, nameOf(t)))
	require.NoError(t, lease.Err())
}

func TestLocksOnOneLeaseExcludeEachOther(t *testing.T) {
	client := testCluster.Client(t)
	lease := mustLease(t, client, 10*time.Second)
	one := mustAcquire(t, client, nameOf(t), WithLease(lease))
	_, err := TryAcquire(t.Context(), client, nameOf(t), WithLease(lease))
	require.ErrorIs(t, err, ErrLockHeld)
	other := mustAcquire(t, client, nameOf(t)+"-other", WithLease(lease))
	require.NoError(t, one.Close())
	require.NoError(t, lease.Err(), "Close leaves the lease alive")
	again, err := TryAcquire(t.Context(), client, nameOf(t), WithLease(lease))
	require.NoError(t, err)
	require.Greater(t, again.Token(), one.Token())
	require.NoError(t, again.Close())
	require.NoError(t, other.Close())
}

func TestQueueOfANameIsNotThatOfItsSubname(t *testing.T) {
	client := testCluster.Client(t)
	sub := mustAcquire(t, client, nameOf(t)+"/b")
	lock, err := TryAcquire(t.Context(), client, nameOf(t))
	require.NoError(t, err)
	require.NoError(t, lock.Close())
	lock = mustAcquire(t, client, nameOf(t), WithAcquireTimeout(patience))
	_, err = TryAcquire(t.Context(), client, nameOf(t)+"/b")
	require.ErrorIs(t, err, ErrLockHeld)
	require.NoError(t, sub.Close())
	sub, err = TryAcquire(t.Context(), client, nameOf(t)+"/b")
	require.NoError(t, err)
	require.NoError(t, sub.Close())
	require.NoError(t, lock.Close())
}

func TestQueueIgnoresStrayKeysHoweverMany(t *testing.T) {
	client := testCluster.Client(t)
	lease := mustLease(t, client, 10*time.Second)
	for i := range 20 { // more than one page of the read, before and after
		_, err := client.Put(t.Context(), fmt.Sprintf("%s/stray-%d", nameOf(t), i), "no lease")
		require.NoError(t, err)
		_, err = client.Put(t.Context(), fmt.Sprintf("%s/sub/%d", nameOf(t), i), "deeper", clientv3.WithLease(lease.ID()))
		require.NoError(t, err)
	}
	lock := mustAcquire(t, client, nameOf(t), WithAcquireTimeout(patience))
	for i := range 20 {
		_, err := client.Put(t.Context(), fmt.Sprintf("%s/later-%d", nameOf(t), i), "no lease")
		require.NoError(t, err)
	}
	_, err := TryAcquire(t.Context(), client, nameOf(t))
	require.ErrorIs(t, err, ErrLockHeld, "the holder is seen behind the strays")
	next := start(func() (*Lock, error) { return Acquire(context.Background(), client, nameOf(t)) })
	waiters(t, client, nameOf(t), 62)
	require.NoError(t, lock.Close())
	within(t, 5*time.Second, next.done, "the waiter holds")
	require.NoError(t, next.err)
	require.NoError(t, next.v.Close())
	lock, err = TryAcquire(t.Context(), client, nameOf(t))
	require.NoError(t, err)
	require.NoError(t, lock.Close())
}

// A member that lags answers from its own state, unless it is asked what is current.
func TestLaggingMemberHidesNeitherAHolderNorADeletion(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 3)
	lagging := (cluster.Leader() + 1) % 3
	others := slices.Delete(slices.Clone(cluster.Endpoints()), lagging, lagging+1)
	direct, behind := newClient(t, others...), newClient(t, cluster.Endpoints()[lagging])
	var asked [2]atomic.Bool
	clients := make([]*clientv3.Client, len(asked))
	// The first transaction of each client that only reads goes to the lagging member.
	for i := range clients {
		var err error
		clients[i], err = clientv3.New(clientv3.Config{Endpoints: others, Logger: zap.NewNop(), DialOptions: []grpc.DialOption{
			grpc.WithChainUnaryInterceptor(func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
				if r, ok := req.(*etcdserverpb.TxnRequest); ok && onlyReads(r) && asked[i].CompareAndSwap(false, true) {
					// It does not know yet that it is cut off.
					ctx, cc = metadata.NewOutgoingContext(ctx, metadata.MD{}), behind.ActiveConnection()
				}
				return invoker(ctx, method, req, reply, cc, opts...)
			}),
		}})
		require.NoError(t, err)
		t.Cleanup(func() { _ = clients[i].Close() })
		_, err = clients[i].Get(t.Context(), "connect")
		require.NoError(t, err)
	}
	_, err := behind.Get(t.Context(), "connect")
	require.NoError(t, err)
	deleted := mustAcquire(t, clients[0], nameOf(t)+"-deleted", WithTTL(time.Minute))
	require.NoError(t, cluster.Isolate(lagging))
	mustDelete(t, direct, deleted.Key())
	mustAcquire(t, direct, nameOf(t), WithTTL(time.Minute))
	var strays []clientv3.Op
	for i := range 10 { // more than one page of the queue
		strays = append(strays, clientv3.OpPut(fmt.Sprint(nameOf(t), "/stray-", i), ""))
	}
	_, err = direct.Txn(t.Context()).Then(strays...).Commit()
	require.NoError(t, err)
	_, err = Acquire(t.Context(), clients[1], nameOf(t), WithAcquireTimeout(3*time.Second))
	require.ErrorIs(t, err, context.DeadlineExceeded, "somebody else holds it")
	within(t, 10*time.Second, deleted.Done(), "told of the deletion")
	require.True(t, asked[0].Load() && asked[1].Load(), "the lagging member was asked")
}

func onlyReads(r *etcdserverpb.TxnRequest) bool {
	return !slices.ContainsFunc(append(slices.Clone(r.Success), r.Failure...), func(op *etcdserverpb.RequestOp) bool {
		return op.GetRequestRange() == nil
	})
}

func TestLeaseUsesFewKeysForTheLocksOfOneName(t *testing.T) {
	// queued is called after a key was written and its writer has the answer.
	var queued atomic.Pointer[context.CancelFunc]
	client := interceptedClient(t, func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		err := invoker(ctx, method, req, reply, cc, opts...)
		if f := queued.Load(); f != nil && err == nil && isWriteTxn(req) {
			(*f)()
		}
		return err
	})
	lease := mustLease(t, client, 10*time.Second)
	used := map[string]bool{}
	for range 50 {
		lock := mustAcquire(t, client, nameOf(t), WithLease(lease))
		used[lock.Key()] = true
		require.NoError(t, lock.Close())
	}
	require.Len(t, used, keysPerName)
	holder := mustAcquire(t, client, nameOf(t), WithLease(lease))
	for range 10 {
		// To give up before the write is answered would leave it in doubt, and such a key is not
		// used again.
		ctx, cancel := context.WithCancel(t.Context())
		queued.Store(&cancel)
		_, err := Acquire(ctx, client, nameOf(t), WithLease(lease))
		queued.Store(nil)
		require.ErrorIs(t, err, context.Canceled)
	}
	require.NoError(t, holder.Close())
	eventually(t, func() bool {
		return lease.slots.len() == 0
	}, "nor does it remember those of waiters that gave up")
}

func TestWaiterWhoseLeaseOrKeyIsGoneReturnsAtOnce(t *testing.T) {
	client := testCluster.Client(t)
	for name, c := range map[string]struct {
		end func(lease *Lease, key string) error
		is  error
	}{
		"lease closed": {func(lease *Lease, _ string) error { return lease.Close() }, ErrClosed},
		"lease revoked": {func(lease *Lease, _ string) error {
			_, err := client.Revoke(context.Background(), lease.ID())
			return err
		}, ErrLockLost},
		"key deleted": {func(_ *Lease, key string) error { _, err := client.Delete(context.Background(), key); return err }, ErrLockLost},
	} {
		t.Run(name, func(t *testing.T) {
			holder := mustAcquire(t, client, nameOf(t))
			lease := mustLease(t, client, time.Minute)
			waiting := start(func() (*Lock, error) { return Acquire(context.Background(), client, nameOf(t), WithLease(lease)) })
			waiters(t, client, nameOf(t), 2)
			require.NoError(t, c.end(lease, keys(t, client, nameOf(t))[1]))
			within(t, 500*time.Millisecond, waiting.done, "the waiter returns")
			require.ErrorIs(t, waiting.err, c.is)
			require.NoError(t, holder.Err(), "while the holder still holds")
			require.NoError(t, holder.Close())
		})
	}
}

// A watch on a connection that is dead but never closed is silent; the waiter must not depend on
// it.
func TestWaiterWhoseWatchHasDiedSilentlyStillGetsItsTurn(t *testing.T) {
	t.Parallel()
	direct := testCluster.Client(t)
	holder := mustAcquire(t, direct, nameOf(t))
	client, link, second := twoWays(t)
	waiting := start(func() (*Lock, error) {
		return Acquire(context.Background(), client, nameOf(t), WithTTL(20*time.Second),
			WithRetryPolicy(RetryPolicy{AttemptTimeout: time.Second, Elapsed: -1}))
	})
	waiters(t, direct, nameOf(t), 2)
	second()
	link.Cut()
	require.NoError(t, holder.Close())
	within(t, 15*time.Second, waiting.done, "the waiter holds")
	require.NoError(t, waiting.err)
	link.Heal()
	require.NoError(t, waiting.v.Close())
}

// The more streams were silent, the longer the next one may be. Those that were refused do not
// count.
func TestWaiterLeavesASilentStreamSoonAfterOthersWereRefused(t *testing.T) {
	t.Parallel()
	holder := mustAcquire(t, testCluster.Client(t), nameOf(t))
	var streams atomic.Int32
	client := newClientWith(t, grpc.WithChainStreamInterceptor(func(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, streamer grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
		n := int32(0)
		if strings.HasSuffix(method, "/Watch") {
			n = streams.Add(1)
		}
		if 1 <= n && n <= 3 {
			return nil, errLost
		}
		stream, err := streamer(ctx, desc, cc, method, opts...)
		if n == 4 && err == nil {
			stream = silentStream{stream}
		}
		return stream, err
	}))
	waiting := start(func() (*Lock, error) {
		return Acquire(context.Background(), client, nameOf(t), WithTTL(time.Minute))
	})
	eventually(t, func() bool { return streams.Load() >= 4 }, "a stream is silent")
	require.NoError(t, holder.Close())
	within(t, 10*time.Second, waiting.done, "the waiter holds")
	require.NoError(t, waiting.err)
	require.NoError(t, waiting.v.Close())
}

// silentStream is a stream whose other end neither gets nor sends anything.
type silentStream struct{ grpc.ClientStream }

func (silentStream) SendMsg(any) error { return nil }

func (s silentStream) RecvMsg(any) error {
	<-s.Context().Done()
	return s.Context().Err()
}

func TestWaiterKeepsItsPlaceThoughItsPolicyIsDefiniteOnly(t *testing.T) {
	t.Parallel()
	const attempt = 3 * time.Second // enough to queue up in, however slow the machine
	client, streams := countingStreams(t)
	link := etcdtest.StartLink(t, testCluster.Endpoints()[0])
	client.SetEndpoints(link.Endpoint())
	holder := mustAcquire(t, testCluster.Client(t), nameOf(t))
	waiter := start(func() (*Lock, error) {
		return Acquire(t.Context(), client, nameOf(t), WithTTL(time.Minute),
			WithRetryPolicy(RetryPolicy{DefiniteOnly: true, AttemptTimeout: attempt}))
	})
	eventually(t, func() bool { return streams.open.Load() > 0 }, "the write of its key is answered, and it waits")
	link.Cut()
	// Meanwhile the waiter looks again, and a read times out.
	sleep(t.Context(), 2*idleTimeout+attempt+time.Second)
	link.Heal()
	require.NoError(t, holder.Close())
	within(t, patience, waiter.done, "its turn comes")
	require.NoError(t, waiter.err)
	require.NoError(t, waiter.v.Close())
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
	require.NotContains(t, lines(), "etcdutil: lock lost")
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

// A restore brings the keys of closed locks back, and with them a place in the queue before those
// who hold the lock by now.
func TestQueueGivesALockNoPlaceThatARestoreBroughtBack(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 1)
	client, others := cluster.Client(t), cluster.Client(t)
	type queue struct {
		name        string
		lease       *Lease
		first, next *Lock
	}
	queues := []*queue{{name: nameOf(t) + "-unchanged"}, {name: nameOf(t) + "-committed"}}
	for i, q := range queues {
		q.lease = mustLease(t, client, time.Minute)
		q.first = mustAcquire(t, client, q.name, WithLease(q.lease))
		for range i {
			_, err := q.first.Commit(t.Context())
			require.NoError(t, err)
		}
	}
	waiting := make([]*async[*Lock], len(queues))
	for i, q := range queues {
		waiting[i] = start(func() (*Lock, error) {
			return Acquire(context.Background(), others, q.name, WithTTL(time.Minute))
		})
		waiters(t, client, q.name, 2)
	}
	require.NoError(t, cluster.Backup())
	for i, q := range queues {
		require.NoError(t, q.first.Close())
		<-waiting[i].done
		require.NoError(t, waiting[i].err)
		q.next = waiting[i].v
		t.Cleanup(func() { _ = q.next.Close() })
		for n := range keysPerName - 1 { // then the first one's key is used again
			require.NoError(t, mustAcquire(t, client, fmt.Sprint(q.name, n), WithLease(q.lease)).Close())
		}
	}
	require.NoError(t, cluster.Restore())
	for _, q := range queues {
		acquiring := start(func() (*Lock, error) {
			return Acquire(context.Background(), client, q.name, WithLease(q.lease))
		})
		behind := []string{q.next.Key(), q.first.Key()}
		eventually(t, func() bool { return slices.Equal(keys(t, client, q.name), behind) }, "it waits behind the holder")
		require.NoError(t, q.next.Close())
		<-acquiring.done
		require.NoError(t, acquiring.err)
		rev, err := acquiring.v.Commit(t.Context(), clientv3.OpPut(q.name+"-data", ""))
		require.NoError(t, err)
		resp, err := client.Get(t.Context(), q.name+"-data")
		require.NoError(t, err)
		require.Len(t, resp.Kvs, 1, "what was reported as applied is there")
		require.Equal(t, rev, resp.Kvs[0].ModRevision)
		require.NoError(t, acquiring.v.Close())
	}
}

// The key of a lock is in etcd before the lock is acquired. It may be what the lock's own first
// attempt has written, or what an earlier lock on the lease has left.
func TestQueueTakesOverOnlyAKeyThatIsTheLocksOwn(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		values   []string // that are written to the key before
		lost     bool     // the first attempt
		takeOver bool
	}{
		"as an attempt leaves it": {[]string{"mine"}, true, true},
		"before any attempt":      {[]string{"mine"}, false, false},
		"with another value":      {[]string{"another's"}, true, false},
		"changed since":           {[]string{"mine", "mine"}, true, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var lost atomic.Bool
			client := interceptedClient(t, func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
				if c.lost && strings.HasSuffix(method, "/Txn") && lost.CompareAndSwap(false, true) {
					return errLost
				}
				return invoker(ctx, method, req, reply, cc, opts...)
			})
			lease := mustLease(t, client, time.Minute)
			var created Revision
			for _, value := range c.values {
				resp, err := client.Put(t.Context(), slotKey(nameOf(t), lease.ID(), 1), value, clientv3.WithLease(lease.ID()))
				require.NoError(t, err)
				created = cmp.Or(created, resp.Header.Revision)
			}
			lock := mustAcquire(t, client, nameOf(t), WithLease(lease), WithValue("mine"))
			require.Equal(t, c.takeOver, lock.Token() == created)
			resp, err := client.Get(t.Context(), slotKey(nameOf(t), lease.ID(), 1))
			require.NoError(t, err)
			require.Len(t, resp.Kvs, 1)
			require.Equal(t, lock.Key(), string(resp.Kvs[0].Key))
			require.Equal(t, lock.Token(), resp.Kvs[0].ModRevision)
			require.Equal(t, "mine", string(resp.Kvs[0].Value))
			require.NoError(t, lock.Close())
		})
	}
}

// clientv3 repeats by itself what a proxy answers so, which cannot be observed here: the key that
// the second sending meets is that of the first.
func TestQueueTakesOverAKeyThatAWrappedClientHasWrittenUnseen(t *testing.T) {
	t.Parallel()
	for how, acquire := range map[string]func(context.Context, *clientv3.Client, string, ...LockOption) (*Lock, error){
		"Acquire": Acquire, "TryAcquire": TryAcquire,
	} {
		t.Run(how, func(t *testing.T) {
			t.Parallel()
			var created atomic.Int64
			client := namespaced(t, interceptedClient(t, func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
				err := invoker(ctx, method, req, reply, cc, opts...)
				r, ok := req.(*etcdserverpb.TxnRequest)
				if err != nil || !ok || r.Success[0].GetRequestPut() == nil {
					return err
				}
				if created.CompareAndSwap(0, reply.(*etcdserverpb.TxnResponse).Header.Revision) {
					return errByProxy
				}
				return nil
			}))
			lock, err := acquire(t.Context(), client, "a")
			require.NoError(t, err)
			require.Equal(t, created.Load(), lock.Token(), "it has kept its place")
			require.NoError(t, lock.Close())
		})
	}
}

func TestQueueOfTwoNamespacesOnOneLeaseSharesNoKey(t *testing.T) {
	t.Parallel()
	client := testCluster.Client(t)
	lease := mustLease(t, client, time.Minute)
	inNamespace := namespaced(t, testCluster.Client(t))
	name := nameOf(t) + ":a" // as it is called outside
	held := mustAcquire(t, inNamespace, "a", WithLease(lease))
	for range keysPerName {
		_, err := Acquire(t.Context(), client, name, WithLease(lease), WithAcquireTimeout(100*time.Millisecond))
		require.ErrorIs(t, err, context.DeadlineExceeded)
	}
	require.NoError(t, held.Err())
	require.NoError(t, held.Close())
}

// A key of digits without a lease is nobody's, and need not be watched to find that out.
func TestAcquireDoesNotWatchAKeyThatOnlyLooksLikeAContender(t *testing.T) {
	t.Parallel()
	client := newClientWith(t, grpc.WithChainStreamInterceptor(func(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, streamer grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
		if strings.HasSuffix(method, "/Watch") {
			return nil, status.Error(codes.Unavailable, "no watch")
		}
		return streamer(ctx, desc, cc, method, opts...)
	}))
	for _, suffix := range []string{"", "7", "1234"} {
		mustPut(t, client, nameOf(t)+"/"+suffix, "")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	lock, err := Acquire(ctx, client, nameOf(t))
	require.NoError(t, err)
	require.NoError(t, lock.Close())
}

func TestAcquireThatWaitedSaysWhyThereIsNoConnection(t *testing.T) {
	t.Parallel()
	client, link := linkedClient(t)
	mustAcquire(t, testCluster.Client(t), nameOf(t))
	waiting := start(func() (*Lock, error) {
		return Acquire(context.Background(), client, nameOf(t), WithAcquireTimeout(2*time.Second))
	})
	waiters(t, testCluster.Client(t), nameOf(t), 2)
	require.NoError(t, link.Close())
	within(t, 3*time.Second, waiting.done, "the wait ends")
	require.ErrorIs(t, waiting.err, context.DeadlineExceeded)
	require.ErrorContains(t, waiting.err, "refused")
}
