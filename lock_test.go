package etcdutil

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"example.com/etcdutil/etcdtest"
	"example.com/etcdutil/internal/testclock"
	"github.com/stretchr/testify/require"
	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
	"go.etcd.io/etcd/client/v3/namespace"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3lock/v3lockpb"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func TestLockIsHeldUntilClosed(t *testing.T) {
	client := testCluster.Client(t)
	lock := mustAcquire(t, client, nameOf(t), WithValue("me"))
	require.NoError(t, lock.Err())
	require.Equal(t, nameOf(t), lock.Name())
	require.Equal(t, []string{lock.Key()}, keys(t, client, nameOf(t)))
	require.True(t, strings.HasPrefix(lock.Key(), fmt.Sprintf("%s/%x-", nameOf(t), int64(lock.Lease().ID()))))
	resp, err := client.Get(t.Context(), lock.Key())
	require.NoError(t, err)
	require.Equal(t, "me", string(resp.Kvs[0].Value))
	require.Equal(t, resp.Kvs[0].CreateRevision, lock.Token())
	require.Equal(t, DefaultTTL, lock.Lease().TTL())
	alive, err := lock.Alive(t.Context())
	require.NoError(t, err)
	require.True(t, alive)

	require.NoError(t, lock.Close())
	require.ErrorIs(t, context.Cause(lock), ErrClosed)
	require.NotErrorIs(t, context.Cause(lock), ErrLockLost)
	require.Empty(t, keys(t, client, nameOf(t)))
	require.False(t, knows(t, client, lock.Lease().ID()), "its own lease goes with it")
	alive, err = lock.Alive(t.Context())
	require.NoError(t, err)
	require.False(t, alive)
	require.NoError(t, lock.Close(), "a second Close says the same")
}

func TestTokensGrowAndTheOrderIsThatOfArrival(t *testing.T) {
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

func TestMiddleWaiterThatGivesUpBreaksNoOrder(t *testing.T) {
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

// The key of a predecessor that releases and queues up again may be the same: it is another contender, and younger.
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
	within(t, recheckInterval/2, waiting.done, "it holds, and not for having looked again after a while")
	require.NoError(t, waiting.err)
	require.NoError(t, waiting.v.Close())
	<-again.done
	require.NoError(t, again.err)
}

func TestTwoHundredGoroutinesOnOneLeaseTakeTurnsInOrderOfArrival(t *testing.T) {
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

func TestTryAcquireOfAHeldLockCostsOneReadAndWritesNothing(t *testing.T) {
	direct := testCluster.Client(t)
	client, requests := countingClient(t)
	holder := mustAcquire(t, direct, nameOf(t))
	before := revision(t, direct)
	_, err := TryAcquire(t.Context(), client, nameOf(t))
	require.ErrorIs(t, err, ErrLockHeld)
	require.EqualValues(t, 1, requests.Load())
	require.Equal(t, before, revision(t, direct))
	require.NoError(t, holder.Close())

	lock, err := TryAcquire(t.Context(), client, nameOf(t))
	require.NoError(t, err)
	require.NoError(t, lock.Close())
}

func revision(t *testing.T, client *clientv3.Client) Revision {
	t.Helper()
	resp, err := client.Get(t.Context(), "any")
	require.NoError(t, err)
	return resp.Header.Revision
}

func TestTryAcquireNeverQueues(t *testing.T) {
	client := testCluster.Client(t)
	lease := mustLease(t, client, 10*time.Second)
	var won atomic.Int32
	var all sync.WaitGroup
	for range 50 {
		all.Go(func() {
			switch lock, err := TryAcquire(context.Background(), client, nameOf(t), WithLease(lease)); {
			case err == nil:
				won.Add(1)
				time.Sleep(50 * time.Millisecond) // so that the others find it held
				if err := lock.Close(); err != nil {
					t.Error(err)
				}
			case !errors.Is(err, ErrLockHeld):
				t.Error(err)
			}
		})
	}
	all.Wait()
	require.Positive(t, won.Load())
	require.Empty(t, keys(t, client, nameOf(t)))
}

func TestNamesThatAreNotNamesAreRefused(t *testing.T) {
	client, requests := countingClient(t)
	for what, name := range map[string]string{
		"empty": "", "a NUL": "a\x00b", "invalid UTF-8": "a\xff", "513 bytes": strings.Repeat("a", 513),
	} {
		_, err := Acquire(t.Context(), client, name)
		require.ErrorIs(t, err, ErrInvalidName, what)
		_, err = TryAcquire(t.Context(), client, name)
		require.ErrorIs(t, err, ErrInvalidName, what)
		err = Do(t.Context(), client, name, func(context.Context) error { return nil })
		require.ErrorIs(t, err, ErrInvalidName, what)
	}
	require.Zero(t, requests.Load(), "nothing was sent")
	require.NoError(t, mustAcquire(t, client, strings.Repeat("é", 256)).Close(), "512 bytes")
}

func TestLockOptionsThatMakeNoSenseAreRefusedByName(t *testing.T) {
	direct := testCluster.Client(t)
	live := mustLease(t, direct, 10*time.Second)
	closed := mustLease(t, direct, 10*time.Second)
	require.NoError(t, closed.Close())
	lost := mustLease(t, direct, 2*time.Second, WithMaxKeepAlives(0), WithExpiryMargin(1900*time.Millisecond))
	<-lost.Done()
	parent, cancel := context.WithCancel(context.Background())
	orphan, err := NewLease(parent, direct, 10*time.Second)
	require.NoError(t, err)
	cancel()
	defer orphan.Close()

	client, requests := countingClient(t)
	for name, c := range map[string]struct {
		opts []LockOption
		says string
		is   error
	}{
		"no TTL":               {[]LockOption{WithTTL(0)}, "WithTTL", nil},
		"negative TTL":         {[]LockOption{WithTTL(-1)}, "WithTTL", nil},
		"interval is TTL":      {[]LockOption{WithTTL(2 * time.Second), WithKeepAliveInterval(2 * time.Second)}, "WithKeepAliveInterval", nil},
		"margin is TTL":        {[]LockOption{WithTTL(2 * time.Second), WithExpiryMargin(2 * time.Second)}, "WithExpiryMargin", nil},
		"no timeout":           {[]LockOption{WithAcquireTimeout(0)}, "WithAcquireTimeout", nil},
		"nil lease":            {[]LockOption{WithLease(nil)}, "WithLease", nil},
		"closed lease":         {[]LockOption{WithLease(closed)}, "WithLease", ErrClosed},
		"lost lease":           {[]LockOption{WithLease(lost)}, "WithLease", ErrLeaseExpired},
		"orphaned lease":       {[]LockOption{WithLease(orphan)}, "WithLease", context.Canceled},
		"lease and TTL":        {[]LockOption{WithLease(live), WithTTL(time.Second)}, "WithTTL", nil},
		"lease and interval":   {[]LockOption{WithKeepAliveInterval(time.Second), WithLease(live)}, "WithKeepAliveInterval", nil},
		"lease and margin":     {[]LockOption{WithLease(live), WithExpiryMargin(time.Second)}, "WithExpiryMargin", nil},
		"lease and renewals":   {[]LockOption{WithLease(live), WithMaxKeepAlives(1)}, "WithMaxKeepAlives", nil},
		"bad policy":           {[]LockOption{WithRetryPolicy(RetryPolicy{Max: -1})}, "RetryPolicy.Max", nil},
		"lease and bad policy": {[]LockOption{WithLease(live), WithRetryPolicy(RetryPolicy{Max: -1})}, "RetryPolicy.Max", nil},
	} {
		t.Run(name, func(t *testing.T) {
			for _, acquire := range []func(context.Context, *clientv3.Client, string, ...LockOption) (*Lock, error){Acquire, TryAcquire} {
				_, err := acquire(t.Context(), client, "a", c.opts...)
				require.ErrorContains(t, err, c.says)
				if c.is != nil {
					require.ErrorIs(t, err, c.is)
				}
			}
		})
	}
	require.Zero(t, requests.Load(), "nothing was sent")
}

func TestNameAndItsSubnameNeverMeet(t *testing.T) {
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

func TestStrayKeysBlockNobodyHoweverMany(t *testing.T) {
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

func TestAcquireTimeoutBoundsTheWaitAlone(t *testing.T) {
	t.Parallel()
	client := testCluster.Client(t)
	holder := mustAcquire(t, client, nameOf(t))
	_, err := Acquire(t.Context(), client, nameOf(t), WithAcquireTimeout(200*time.Millisecond))
	require.ErrorIs(t, err, context.DeadlineExceeded)
	require.NoError(t, holder.Close())
	const wait = 3 * time.Second // which is enough for the requests of one that need not wait, however slow
	lock := mustAcquire(t, client, nameOf(t), WithAcquireTimeout(wait))
	time.Sleep(wait + 200*time.Millisecond)
	require.NoError(t, lock.Err())
	require.NoError(t, lock.Close())
}

func TestAcquireReturnsWithin100msOfItsContextWhenEtcdIsUnreachable(t *testing.T) {
	for name, acquire := range map[string]func(context.Context, *clientv3.Client, string, *Lease) (*Lock, error){
		"own lease": func(ctx context.Context, client *clientv3.Client, name string, _ *Lease) (*Lock, error) {
			return Acquire(ctx, client, name)
		},
		"shared lease": func(ctx context.Context, client *clientv3.Client, name string, lease *Lease) (*Lock, error) {
			return Acquire(ctx, client, name, WithLease(lease))
		},
		"try": func(ctx context.Context, client *clientv3.Client, name string, _ *Lease) (*Lock, error) {
			return TryAcquire(ctx, client, name)
		},
	} {
		t.Run(name, func(t *testing.T) {
			client, link := linkedClient(t)
			lease := mustLease(t, client, 10*time.Second)
			_, err := client.Get(t.Context(), "connect")
			require.NoError(t, err)
			link.Cut()
			cause := errors.New("a cause of its own")
			ctx, cancel := context.WithCancelCause(context.Background())
			acquiring := start(func() (*Lock, error) { return acquire(ctx, client, nameOf(t), lease) })
			time.Sleep(200 * time.Millisecond) // into the request, which nothing shows from outside
			cancel(cause)
			within(t, 100*time.Millisecond, acquiring.done, "it returns")
			require.ErrorIs(t, acquiring.err, context.Canceled)
			require.ErrorIs(t, acquiring.err, cause)
			link.Heal()
			require.Empty(t, keys(t, testCluster.Client(t), nameOf(t)))
		})
	}
}

func TestWaiterReturnsWithin100msOfItsContextWhenEtcdIsUnreachable(t *testing.T) {
	direct := testCluster.Client(t)
	holder := mustAcquire(t, direct, nameOf(t))
	client, link := linkedClient(t)
	ctx, cancel := context.WithCancel(context.Background())
	waiting := start(func() (*Lock, error) { return Acquire(ctx, client, nameOf(t), WithTTL(2*time.Second)) })
	waiters(t, direct, nameOf(t), 2)
	link.Cut()
	cancel()
	within(t, 100*time.Millisecond, waiting.done, "it returns")
	require.ErrorIs(t, waiting.err, context.Canceled)
	waiters(t, direct, nameOf(t), 1) // its lease runs out
	require.NoError(t, holder.Close())
}

func TestFailedAcquireLeavesNoKeyAndNoLease(t *testing.T) {
	cluster := etcdtest.Start(t, 1)
	client := cluster.Client(t)
	holder := mustAcquire(t, client, nameOf(t))
	shared := mustLease(t, client, time.Minute)
	require.Len(t, leases(t, client), 2)
	for name, opts := range map[string][]LockOption{"own lease": nil, "shared lease": {WithLease(shared)}} {
		t.Run(name, func(t *testing.T) {
			for range 10 {
				_, err := Acquire(t.Context(), client, holder.Name(), append(opts, WithAcquireTimeout(30*time.Millisecond))...)
				require.ErrorIs(t, err, context.DeadlineExceeded)
			}
			waiters(t, client, holder.Name(), 1)
			eventually(t, func() bool { return len(leases(t, client)) == 2 }, "no lease is left")
		})
	}
	require.NoError(t, holder.Close())
}

// The fault that leaves a ghost in the queue of concurrency.Mutex: the key is written, and nobody is told.
func TestLostReplyToTheWriteOfTheKey(t *testing.T) {
	for name, shared := range map[string]bool{"own lease": false, "shared lease": true} {
		t.Run("then healed: acquired once, "+name, func(t *testing.T) {
			client, link, opts := linkedLocker(t, shared)
			link.DropReplies()
			acquiring := start(func() (*Lock, error) { return Acquire(context.Background(), client, nameOf(t), opts...) })
			if shared {
				waiters(t, testCluster.Client(t), nameOf(t), 1)
			} else {
				time.Sleep(100 * time.Millisecond) // the grant comes first, and its reply is lost as well
			}
			link.Heal()
			within(t, 10*time.Second, acquiring.done, "Acquire returns")
			require.NoError(t, acquiring.err)
			require.Equal(t, []string{acquiring.v.Key()}, keys(t, client, nameOf(t)))
			require.NoError(t, acquiring.v.Close())
			require.Empty(t, keys(t, client, nameOf(t)))
		})
	}
	t.Run("then given up: no ghost is left", func(t *testing.T) {
		client, link, opts := linkedLocker(t, true)
		direct := testCluster.Client(t)
		link.DropReplies()
		acquiring := start(func() (*Lock, error) {
			return Acquire(context.Background(), client, nameOf(t), append(opts, WithAcquireTimeout(2*time.Second))...)
		})
		waiters(t, direct, nameOf(t), 1)
		within(t, 2200*time.Millisecond, acquiring.done, "Acquire returns")
		require.ErrorIs(t, acquiring.err, context.DeadlineExceeded)
		waiters(t, direct, nameOf(t), 0)
		link.Heal()
	})
	t.Run("in TryAcquire: it is held all the same", func(t *testing.T) {
		client, link, opts := linkedLocker(t, true)
		// Only the reply to the transaction is lost: the read before it is answered.
		var lost atomic.Bool
		faulty := interceptedClient(t, func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
			err := invoker(ctx, method, req, reply, cc, opts...)
			if strings.HasSuffix(method, "/Txn") && lost.CompareAndSwap(false, true) {
				return status.Error(codes.Unavailable, "transport is closing")
			}
			return err
		})
		lock, err := TryAcquire(t.Context(), faulty, nameOf(t), opts...)
		require.NoError(t, err)
		require.True(t, lost.Load())
		require.Equal(t, []string{lock.Key()}, keys(t, client, nameOf(t)))
		require.NoError(t, lock.Close())
		link.Heal()
	})
}

// linkedLocker is a connected client behind a link, with the options for a lock on a lease of a long TTL.
func linkedLocker(t *testing.T, shared bool) (*clientv3.Client, *etcdtest.Link, []LockOption) {
	t.Helper()
	client, link := linkedClient(t)
	_, err := client.Get(t.Context(), "connect")
	require.NoError(t, err)
	if !shared {
		return client, link, []LockOption{WithTTL(time.Minute)}
	}
	return client, link, []LockOption{WithLease(mustLease(t, client, time.Minute))}
}

// A write that was given up may still be on its way, and land when nobody expects it.
func TestKeyThatIsWrittenLateIsRemovedAgain(t *testing.T) {
	late := make(chan struct{})
	landed := make(chan error, 1)
	ctx, giveUp := context.WithCancel(context.Background())
	var held atomic.Bool
	client := interceptedClient(t, func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		if strings.HasSuffix(method, "/Txn") && held.CompareAndSwap(false, true) {
			go func() {
				<-late
				landed <- invoker(context.WithoutCancel(ctx), method, req, new(etcdserverpb.TxnResponse), cc)
			}()
			giveUp()
			<-ctx.Done()
			return status.FromContextError(ctx.Err()).Err()
		}
		return invoker(ctx, method, req, reply, cc, opts...)
	})
	lease := mustLease(t, client, 10*time.Second)
	_, err := Acquire(ctx, client, nameOf(t), WithLease(lease))
	require.ErrorIs(t, err, context.Canceled)
	require.Empty(t, keys(t, client, nameOf(t)))
	created := client.Watch(t.Context(), nameOf(t)+"/", clientv3.WithPrefix())
	close(late)
	require.NoError(t, <-landed)
	require.Equal(t, clientv3.EventTypePut, (<-created).Events[0].Type, "it landed")
	waiters(t, client, nameOf(t), 0)
}

func TestLostReplyToARelease(t *testing.T) {
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

// The key of a lock on a shared lease is used again, so a delete that is still under way must not find it.
func TestDeleteThatLandsLateHitsNoSuccessor(t *testing.T) {
	for name, answer := range map[string]error{
		"after we repeated it":           status.Error(codes.Unavailable, "transport is closing"),
		"after clientv3 had repeated it": status.Error(codes.Canceled, "a proxy's"),
	} {
		t.Run(name, func(t *testing.T) {
			var hold atomic.Bool
			var land func() error
			client := interceptedClient(t, func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
				if !strings.HasSuffix(method, "/Txn") || !hold.CompareAndSwap(true, false) {
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

func TestLeaseUsesFewKeysForTheLocksOfOneName(t *testing.T) {
	var queued atomic.Pointer[context.CancelFunc] // what to call when a key has been written, and its writer been told
	client := interceptedClient(t, func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		err := invoker(ctx, method, req, reply, cc, opts...)
		if f := queued.Load(); f != nil && err == nil && strings.HasSuffix(method, "/Txn") {
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
		// To give up before the write is answered would leave it in doubt, and such a key is not used again.
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

// The key of a lost lock is gone, but a request that was to write it may be under way, and the lease lives on.
func TestLostLockWhoseKeyIsWrittenLateLeavesNoGhost(t *testing.T) {
	var held atomic.Bool
	var land func() error
	client := interceptedClient(t, func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		if !strings.HasSuffix(method, "/Txn") || !held.CompareAndSwap(false, true) {
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

func TestReleaseThatCouldNotBeConfirmedHappensLater(t *testing.T) {
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

func TestLostReplyToACommitIsNoFailureAndNoSecondWrite(t *testing.T) {
	client, link, opts := linkedLocker(t, false)
	direct := testCluster.Client(t)
	lock := mustAcquire(t, client, nameOf(t), opts...)
	data := nameOf(t) + "-data"
	link.DropReplies()
	committing := start(func() (Revision, error) { return lock.Commit(context.Background(), clientv3.OpPut(data, "v")) })
	eventually(t, func() bool { return versionOf(t, direct, data) == 1 }, "the server has applied it")
	link.Heal()
	within(t, 10*time.Second, committing.done, "Commit returns")
	require.NoError(t, committing.err)
	resp, err := direct.Get(t.Context(), data)
	require.NoError(t, err)
	require.Equal(t, resp.Kvs[0].ModRevision, committing.v)
	require.EqualValues(t, 1, resp.Kvs[0].Version, "once")
	_, err = lock.Commit(t.Context(), clientv3.OpPut(data, "w"))
	require.NoError(t, err)
	require.EqualValues(t, 2, versionOf(t, direct, data))
	require.NoError(t, lock.Close())
}

func versionOf(t *testing.T, client *clientv3.Client, key string) int64 {
	t.Helper()
	resp, err := client.Get(context.Background(), key)
	require.NoError(t, err)
	if len(resp.Kvs) == 0 {
		return 0
	}
	return resp.Kvs[0].Version
}

// clientv3 itself repeats what is answered Canceled, so one Commit can be sent twice without our doing.
func TestCommitThatClientv3RepeatsIsAppliedOnce(t *testing.T) {
	var faults atomic.Int32
	client := interceptedClient(t, func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		err := invoker(ctx, method, req, reply, cc, opts...)
		if strings.HasSuffix(method, "/Txn") && faults.Add(-1) >= 0 {
			return status.Error(codes.Canceled, "a proxy's")
		}
		return err
	})
	lock := mustAcquire(t, client, nameOf(t))
	faults.Store(3)
	_, err := lock.Commit(t.Context(), clientv3.OpPut(nameOf(t)+"-data", "v"))
	require.NoError(t, err)
	require.EqualValues(t, 1, versionOf(t, client, nameOf(t)+"-data"))
	require.NoError(t, lock.Close())
}

// A Commit's request is held back until after the Commit was given up. It lands before the next Commit, under it, or
// after it.
func TestCommitThatLandsUnderTheNextOneIsReportedWronglyByNeither(t *testing.T) {
	type held struct{ land func() error }
	var hold atomic.Bool
	var giveUp atomic.Pointer[context.CancelFunc]
	var straggler atomic.Pointer[held]
	client := interceptedClient(t, func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		if !strings.HasSuffix(method, "/Txn") || !hold.CompareAndSwap(true, false) {
			return invoker(ctx, method, req, reply, cc, opts...)
		}
		straggler.Store(&held{land: func() error {
			return invoker(context.WithoutCancel(ctx), method, req, new(etcdserverpb.TxnResponse), cc)
		}})
		(*giveUp.Load())()
		<-ctx.Done()
		return status.FromContextError(ctx.Err()).Err()
	})
	lock := mustAcquire(t, client, nameOf(t))
	for round := range 40 {
		first, second := fmt.Sprint(nameOf(t), "-first-", round), fmt.Sprint(nameOf(t), "-second-", round)
		ctx, cancel := context.WithCancel(t.Context())
		giveUp.Store(&cancel)
		hold.Store(true)
		_, err := lock.Commit(ctx, clientv3.OpPut(first, ""))
		cancel()
		require.ErrorIs(t, err, ErrUnknownOutcome)
		require.NotErrorIs(t, err, ErrLockLost)
		require.ErrorIs(t, err, context.Canceled)

		landing := start(func() (struct{}, error) {
			time.Sleep(time.Duration(round%10) * 50 * time.Microsecond)
			return struct{}{}, straggler.Load().land()
		})
		rev, err := lock.Commit(t.Context(), clientv3.OpPut(second, ""))
		require.NoError(t, err)
		<-landing.done
		require.NoError(t, landing.err)
		resp, err := client.Get(t.Context(), second)
		require.NoError(t, err)
		require.Len(t, resp.Kvs, 1, "what was reported as applied is there")
		require.Equal(t, rev, resp.Kvs[0].ModRevision)
		require.EqualValues(t, 1, resp.Kvs[0].Version)
		require.LessOrEqual(t, versionOf(t, client, first), int64(1))
	}
	require.NoError(t, lock.Close())
}

func TestCommitThatLandsUnderALaterLockWithTheSameKeyWritesNothing(t *testing.T) {
	var hold atomic.Bool
	var land func() error
	ctx, giveUp := context.WithCancel(t.Context())
	client := interceptedClient(t, func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		if !strings.HasSuffix(method, "/Txn") || !hold.CompareAndSwap(true, false) {
			return invoker(ctx, method, req, reply, cc, opts...)
		}
		land = func() error {
			return invoker(context.WithoutCancel(ctx), method, req, new(etcdserverpb.TxnResponse), cc)
		}
		giveUp()
		<-ctx.Done()
		return status.FromContextError(ctx.Err()).Err()
	})
	lease := mustLease(t, client, 10*time.Second)
	first := mustAcquire(t, client, nameOf(t), WithLease(lease))
	hold.Store(true)
	_, err := first.Commit(ctx, clientv3.OpPut(nameOf(t)+"-data", "late"))
	require.ErrorIs(t, err, ErrUnknownOutcome)
	require.NoError(t, first.Close())
	later := mustAcquire(t, client, nameOf(t), WithLease(lease))
	for later.Key() != first.Key() {
		require.NoError(t, later.Close())
		later = mustAcquire(t, client, nameOf(t), WithLease(lease))
	}
	require.NoError(t, land())
	require.Zero(t, versionOf(t, client, nameOf(t)+"-data"))
	require.NoError(t, later.Close())
}

func TestCommitUnderALockThatIsNotHeldWritesNothing(t *testing.T) {
	direct := testCluster.Client(t)
	for name, c := range map[string]struct {
		end func(t *testing.T, lock *Lock)
		is  error
	}{
		"key deleted, not yet told": {func(t *testing.T, lock *Lock) {
			if lock.watchTimer.Stop() { // as if its watch were on a dead connection
				lock.watching.Done()
			}
			_, err := direct.Delete(t.Context(), lock.Key())
			require.NoError(t, err)
		}, ErrLockLost},
		"lease revoked": {func(t *testing.T, lock *Lock) {
			_, err := direct.Revoke(t.Context(), lock.Lease().ID())
			require.NoError(t, err)
		}, ErrLockLost},
		"closed": {func(t *testing.T, lock *Lock) { require.NoError(t, lock.Close()) }, ErrClosed},
	} {
		t.Run(name, func(t *testing.T) {
			client := testCluster.Client(t)
			lock, err := Acquire(context.Background(), client, nameOf(t))
			require.NoError(t, err)
			c.end(t, lock)
			_, err = lock.Commit(t.Context(), clientv3.OpPut(nameOf(t)+"-data", "v"))
			require.ErrorIs(t, err, c.is)
			require.NotErrorIs(t, err, ErrUnknownOutcome)
			require.Zero(t, versionOf(t, direct, nameOf(t)+"-data"))
			if c.is == ErrLockLost {
				require.ErrorIs(t, context.Cause(lock), ErrLockLost, "and the lock knows")
			}
			_ = lock.Close()
		})
	}
}

func TestStaleHolderCannotCommitAfterAnotherHasTakenOver(t *testing.T) {
	direct := testCluster.Client(t)
	client, link := linkedClient(t)
	stale := mustAcquire(t, client, nameOf(t), WithTTL(2*time.Second))
	link.Cut()
	next := mustAcquire(t, direct, nameOf(t))
	link.Heal()
	_, err := stale.Commit(t.Context(), clientv3.OpPut(nameOf(t)+"-data", "stale"))
	require.ErrorIs(t, err, ErrLockLost)
	resp, err := direct.Txn(t.Context()).If(stale.IsOwner()).Then(clientv3.OpPut(nameOf(t)+"-data", "stale")).Commit()
	require.NoError(t, err)
	require.False(t, resp.Succeeded)
	resp, err = direct.Txn(t.Context()).If(next.IsOwner()).Then(clientv3.OpPut(nameOf(t)+"-data", "next")).Commit()
	require.NoError(t, err)
	require.True(t, resp.Succeeded)
	require.EqualValues(t, 1, versionOf(t, direct, nameOf(t)+"-data"))
	require.NoError(t, next.Close())
}

func TestCommitOfAnOutageEndsWithTheLockAndIsUnknown(t *testing.T) {
	t.Parallel()
	client, link := linkedClient(t)
	lock := mustAcquire(t, client, nameOf(t), WithTTL(5*time.Second)) // enough to begin the Commit in, however slow
	link.Cut()
	_, err := lock.Commit(context.Background(), clientv3.OpPut(nameOf(t)+"-data", "v"))
	require.ErrorIs(t, err, ErrUnknownOutcome)
	require.NotErrorIs(t, err, ErrLockLost, "that would say that it was not applied")
	require.ErrorIs(t, context.Cause(lock), ErrLockLost)
	_, err = lock.Commit(context.Background(), clientv3.OpPut(nameOf(t)+"-data", "v"))
	require.ErrorIs(t, err, ErrLockLost, "of this one nothing was sent")
	require.NotErrorIs(t, err, ErrUnknownOutcome)
}

func TestCommitsAreSerialisedAndHold127Operations(t *testing.T) {
	client := testCluster.Client(t)
	lock := mustAcquire(t, client, nameOf(t))
	op := func(i int) clientv3.Op { return clientv3.OpPut(fmt.Sprintf("%s-%d", nameOf(t), i), "") }
	var ops []clientv3.Op
	for i := range 127 {
		ops = append(ops, op(i))
	}
	rev, err := lock.Commit(t.Context(), ops...)
	require.NoError(t, err)
	require.Equal(t, revision(t, client), rev)
	_, err = lock.Commit(t.Context(), append(ops, op(127))...)
	require.ErrorContains(t, err, "127")

	var all sync.WaitGroup
	for range 50 {
		all.Go(func() {
			if _, err := lock.Commit(context.Background(), op(0)); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	require.EqualValues(t, 51, versionOf(t, client, nameOf(t)+"-0"))
	_, err = lock.Commit(t.Context())
	require.NoError(t, err, "none is allowed: it proves that the lock is held")
	require.NoError(t, lock.Close())
}

// Without space left etcd says of a write that it failed, whether it has applied it or not.
func TestCommitWithoutSpaceLeftTellsWhetherItWasApplied(t *testing.T) {
	var before, after atomic.Bool
	noSpace := rpctypes.ErrGRPCNoSpace
	client := interceptedClient(t, func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		if strings.HasSuffix(method, "/Txn") && before.CompareAndSwap(true, false) {
			return noSpace
		}
		err := invoker(ctx, method, req, reply, cc, opts...)
		if strings.HasSuffix(method, "/Txn") && after.CompareAndSwap(true, false) {
			return noSpace
		}
		return err
	})
	lock := mustAcquire(t, client, nameOf(t))
	before.Store(true)
	_, err := lock.Commit(t.Context(), clientv3.OpPut(nameOf(t)+"-data", "v"))
	require.ErrorIs(t, err, rpctypes.ErrNoSpace)
	require.NotErrorIs(t, err, ErrUnknownOutcome)
	require.Zero(t, versionOf(t, client, nameOf(t)+"-data"))
	after.Store(true)
	_, err = lock.Commit(t.Context(), clientv3.OpPut(nameOf(t)+"-data", "v"))
	require.NoError(t, err)
	require.EqualValues(t, 1, versionOf(t, client, nameOf(t)+"-data"))
	require.NoError(t, lock.Close())
}

func TestCommitThatMayStillArriveIsUnknownAlthoughThereIsNoSpace(t *testing.T) {
	var faults atomic.Int32
	var land func() error
	client := interceptedClient(t, func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		if !strings.HasSuffix(method, "/Txn") {
			return invoker(ctx, method, req, reply, cc, opts...)
		}
		switch faults.Add(-1) {
		case 1:
			land = func() error {
				return invoker(context.WithoutCancel(ctx), method, req, new(etcdserverpb.TxnResponse), cc)
			}
			return status.Error(codes.Unavailable, "transport is closing")
		case 0:
			return rpctypes.ErrGRPCNoSpace
		}
		return invoker(ctx, method, req, reply, cc, opts...)
	})
	lock := mustAcquire(t, client, nameOf(t))
	faults.Store(2)
	_, err := lock.Commit(t.Context(), clientv3.OpPut(nameOf(t)+"-first", ""))
	require.ErrorIs(t, err, ErrUnknownOutcome)
	require.NoError(t, land())
	_, err = lock.Commit(t.Context(), clientv3.OpPut(nameOf(t)+"-second", ""))
	require.NoError(t, err)
	require.EqualValues(t, 1, versionOf(t, client, nameOf(t)+"-second"), "what was reported as applied is there")
	require.NoError(t, lock.Close())
}

func TestWriteOfTheKeyBySomebodyElseIsNotTakenForACommit(t *testing.T) {
	client := testCluster.Client(t)
	lock := mustAcquire(t, client, nameOf(t))
	_, err := client.Put(t.Context(), lock.Key(), "somebody else's", clientv3.WithIgnoreLease())
	require.NoError(t, err)
	_, err = lock.Commit(t.Context(), clientv3.OpPut(nameOf(t)+"-data", ""))
	require.ErrorIs(t, err, ErrUnknownOutcome)
	require.Zero(t, versionOf(t, client, nameOf(t)+"-data"))
	require.NoError(t, lock.Close())
}

// A key that was overwritten without its lease holds nothing, and must not be taken over by a later lock on the lease.
func TestKeyThatSomebodyHasTakenTheLeaseFromIsNoLock(t *testing.T) {
	client := testCluster.Client(t)
	lease := mustLease(t, client, 10*time.Second)
	lock := mustAcquire(t, client, nameOf(t), WithLease(lease))
	_, err := client.Put(t.Context(), lock.Key(), "")
	require.NoError(t, err)
	_, err = lock.Commit(t.Context())
	require.ErrorIs(t, err, ErrLockLost)
	require.ErrorIs(t, lock.Close(), ErrLockLost)
	for range 2 * keysPerName {
		next := mustAcquire(t, client, nameOf(t), WithLease(lease))
		alive, err := next.Alive(t.Context())
		require.NoError(t, err)
		require.True(t, alive)
		require.NoError(t, next.Close())
	}
}

func TestCommitRefusesWhatWritesItsOwnKey(t *testing.T) {
	client, requests := countingClient(t)
	lock := mustAcquire(t, client, nameOf(t))
	requests.Store(0)
	for name, op := range map[string]clientv3.Op{
		"put":               clientv3.OpPut(lock.Key(), ""),
		"delete":            clientv3.OpDelete(lock.Key()),
		"delete the prefix": clientv3.OpDelete(nameOf(t), clientv3.WithPrefix()),
		"delete everything": clientv3.OpDelete("", clientv3.WithFromKey()),
		"delete a range":    clientv3.OpDelete(nameOf(t), clientv3.WithRange(lock.Key()+"\x00")),
		"nested":            clientv3.OpTxn(nil, nil, []clientv3.Op{clientv3.OpTxn(nil, []clientv3.Op{clientv3.OpDelete(lock.Key())}, nil)}),
		"no operation":      {},
	} {
		_, err := lock.Commit(t.Context(), op)
		require.ErrorContains(t, err, "ops[0]", name)
	}
	require.Zero(t, requests.Load())
	for _, op := range []clientv3.Op{
		clientv3.OpGet(lock.Key()), clientv3.OpDelete(nameOf(t), clientv3.WithRange(lock.Key())), clientv3.OpDelete(lock.Key() + "x"),
		clientv3.OpTxn([]clientv3.Cmp{lock.IsOwner()}, []clientv3.Op{clientv3.OpPut(nameOf(t)+"-data", "")}, nil),
	} {
		_, err := lock.Commit(t.Context(), op)
		require.NoError(t, err)
	}
	require.NoError(t, lock.Close())
}

func TestCommitThatEtcdRefusesIsNotApplied(t *testing.T) {
	client := testCluster.Client(t)
	lock := mustAcquire(t, client, nameOf(t))
	_, err := lock.Commit(t.Context(), clientv3.OpPut(nameOf(t), "1"), clientv3.OpPut(nameOf(t), "2"))
	require.ErrorContains(t, err, "duplicate key")
	require.NotErrorIs(t, err, ErrUnknownOutcome)
	_, err = lock.Commit(t.Context(), clientv3.OpPut(nameOf(t), strings.Repeat("x", 1600<<10)))
	require.ErrorContains(t, err, "too large")
	require.Zero(t, versionOf(t, client, nameOf(t)))
	_, err = lock.Commit(t.Context(), clientv3.OpPut(nameOf(t), "3"))
	require.NoError(t, err)
	require.NoError(t, lock.Close())
}

func TestHolderIsToldOfADeletionOrRevocationWithin500ms(t *testing.T) {
	direct := testCluster.Client(t)
	for name, c := range map[string]struct {
		end     func(lock *Lock) error
		revoked bool
	}{
		"key deleted": {func(lock *Lock) error {
			_, err := direct.Delete(context.Background(), lock.Key())
			return err
		}, false},
		"lease revoked": {func(lock *Lock) error {
			_, err := direct.Revoke(context.Background(), lock.Lease().ID())
			return err
		}, true},
	} {
		for when, wait := range map[string]time.Duration{"at once": 0, "later": 200 * time.Millisecond} {
			for whose, shared := range map[string]bool{"own": false, "shared": true} {
				t.Run(fmt.Sprintf("%s %s on %s lease", name, when, whose), func(t *testing.T) {
					client := testCluster.Client(t)
					opts := []LockOption{}
					if shared {
						opts = append(opts, WithLease(mustLease(t, client, time.Minute)))
					}
					lock, err := Acquire(context.Background(), client, nameOf(t), opts...)
					require.NoError(t, err)
					time.Sleep(wait)
					require.NoError(t, c.end(lock))
					within(t, 500*time.Millisecond, lock.Done(), "told")
					require.ErrorIs(t, context.Cause(lock), ErrLockLost)
					require.NotErrorIs(t, context.Cause(lock), ErrLeaseExpired)
					require.NotErrorIs(t, context.Cause(lock), ErrClosed)
					require.ErrorIs(t, lock.Close(), ErrLockLost)
					require.Equal(t, !c.revoked && shared, knows(t, client, lock.Lease().ID()))
				})
			}
		}
	}
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

// A watch on a connection that is dead but never closed is silent; the waiter must not depend on it.
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

func TestParentsEndReleasesNothingAndLetsTheWorkWindDown(t *testing.T) {
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

func TestDoRunsUnderTheLockAndWaitsForFn(t *testing.T) {
	client := testCluster.Client(t)
	type key struct{}
	failed := errors.New("fn failed")
	parent := context.WithValue(t.Context(), key{}, "parent's")
	err := Do(parent, client, nameOf(t), func(ctx context.Context) error {
		lock, ok := LockFrom(ctx)
		require.True(t, ok)
		require.Equal(t, nameOf(t), lock.Name())
		require.Equal(t, "parent's", ctx.Value(key{}))
		inner := Do(ctx, client, nameOf(t)+"-inner", func(ctx context.Context) error {
			innermost, _ := LockFrom(ctx)
			require.Equal(t, nameOf(t)+"-inner", innermost.Name())
			return nil
		})
		require.NoError(t, inner)
		return failed
	})
	require.ErrorIs(t, err, failed)
	require.NotErrorIs(t, err, ErrLockLost)
	require.Empty(t, keys(t, client, nameOf(t)))
	_, ok := LockFrom(t.Context())
	require.False(t, ok)
}

func TestDoReleasesAfterAPanic(t *testing.T) {
	client := testCluster.Client(t)
	require.PanicsWithValue(t, "fn's", func() {
		_ = Do(t.Context(), client, nameOf(t), func(context.Context) error { panic("fn's") })
	})
	require.Empty(t, keys(t, client, nameOf(t)))
}

func TestDoReportsALossAlthoughFnReturnsNil(t *testing.T) {
	client := testCluster.Client(t)
	failed := errors.New("fn failed")
	for name, result := range map[string]error{"nil": nil, "an error": failed} {
		t.Run(name, func(t *testing.T) {
			var returned atomic.Bool
			err := Do(t.Context(), client, nameOf(t), func(ctx context.Context) error {
				lock, _ := LockFrom(ctx)
				_, err := client.Delete(t.Context(), lock.Key())
				require.NoError(t, err)
				<-ctx.Done()
				require.ErrorIs(t, context.Cause(ctx), ErrLockLost)
				time.Sleep(100 * time.Millisecond) // Do waits
				returned.Store(true)
				return result
			})
			require.True(t, returned.Load())
			require.ErrorIs(t, err, ErrLockLost)
			if result != nil {
				require.ErrorIs(t, err, result)
			}
		})
	}
}

func TestLockDoHasTheValuesOfItsContextAndTheEndOfBoth(t *testing.T) {
	client := testCluster.Client(t)
	lock := mustAcquire(t, client, nameOf(t))
	type key struct{}
	ctx, cancel := context.WithCancelCause(context.WithValue(context.Background(), key{}, "caller's"))
	stopped := errors.New("caller's own cause")
	err := lock.Do(ctx, func(ctx context.Context) error {
		require.Equal(t, "caller's", ctx.Value(key{}))
		found, _ := LockFrom(ctx)
		require.Same(t, lock, found)
		cancel(stopped)
		<-ctx.Done()
		return context.Cause(ctx)
	})
	require.ErrorIs(t, err, stopped)
	require.NotErrorIs(t, err, ErrLockLost)

	ran := false
	require.ErrorIs(t, lock.Do(ctx, func(context.Context) error { ran = true; return nil }), stopped)
	err = lock.Do(t.Context(), func(ctx context.Context) error {
		require.NoError(t, lock.Close())
		<-ctx.Done()
		require.ErrorIs(t, context.Cause(ctx), ErrClosed)
		return nil
	})
	require.NoError(t, err, "to close is not to lose")
	require.ErrorIs(t, lock.Do(t.Context(), func(context.Context) error { ran = true; return nil }), ErrClosed)
	require.False(t, ran)
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

func TestClosedLockLeavesNoGoroutineNoWatchAndNoLease(t *testing.T) {
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
	eventually(t, func() bool { return goroutinesIn("etcdutil.(*Lock).watchKey") == 40 }, "the watches stand")
	require.Positive(t, goroutinesIn("etcdutil.(*renewStream).run"))
	require.Positive(t, goroutinesIn("client/v3.(*watchGRPCStream)"))
	for _, lock := range locks {
		require.NoError(t, lock.Close())
	}
	gone(t, "etcdutil.(*Lock)", "Close joins what the lock has started")
	require.NoError(t, shared.Close())
	gone(t, "etcdutil.(*renewStream)", "and the last lease what it shares")
	eventually(t, func() bool { return goroutinesIn("client/v3.(*watchGRPCStream)") == 0 }, "no watch is left")
	require.Empty(t, leases(t, client))
	require.Empty(t, renewStreamsOf(client))
	resp, err := client.Get(t.Context(), "", clientv3.WithPrefix())
	require.NoError(t, err)
	require.Empty(t, resp.Kvs)
}

// goroutinesIn counts the goroutines that are in a function of that name.
func goroutinesIn(function string) (n int) {
	buf := make([]byte, 4<<20)
	for _, stack := range strings.Split(string(buf[:runtime.Stack(buf, true)]), "\n\n") {
		if strings.Contains(stack, function) {
			n++
		}
	}
	return n
}

// gone fails t if there are goroutines in a function of that name, though something has waited for them: who has said that it
// is done is still there for its last instructions, which a busy machine may make it wait for.
func gone(t *testing.T, function, what string) {
	t.Helper()
	done := make(chan struct{})
	go func() { // until there are none, or the test is over
		for goroutinesIn(function) > 0 && t.Context().Err() == nil {
			time.Sleep(5 * time.Millisecond)
		}
		close(done)
	}()
	within(t, 100*time.Millisecond, done, what)
}

func TestChildrenOfALockCostNoGoroutine(t *testing.T) {
	client := testCluster.Client(t)
	lock := mustAcquire(t, client, nameOf(t))
	before := runtime.NumGoroutine()
	children := make([]context.Context, 1000)
	for i := range children {
		var cancel context.CancelFunc
		children[i], cancel = context.WithCancel(lock)
		defer cancel()
	}
	require.Less(t, runtime.NumGoroutine(), before+500, "children cost no goroutine")
	require.NoError(t, lock.Close())
	for _, child := range children {
		require.ErrorIs(t, context.Cause(child), ErrClosed)
	}
}

func TestClientWrappedByNamespaceWorks(t *testing.T) {
	direct := testCluster.Client(t)
	client := newClient(t, testCluster.Endpoints()...)
	ns := nameOf(t) + ":"
	client.KV = namespace.NewKV(client.KV, ns)
	client.Watcher = namespace.NewWatcher(client.Watcher, ns)
	client.Lease = namespace.NewLease(client.Lease, ns)
	t.Cleanup(func() { _ = client.Watcher.Close() })

	lock := mustAcquire(t, client, "a")
	require.Equal(t, []string{ns + lock.Key()}, keys(t, direct, ns+"a"))
	_, err := TryAcquire(t.Context(), client, "a")
	require.ErrorIs(t, err, ErrLockHeld)
	outside := mustAcquire(t, direct, "a")
	require.NoError(t, outside.Close())
	_, err = lock.Commit(t.Context(), clientv3.OpPut("data", "v"))
	require.NoError(t, err)
	require.EqualValues(t, 1, versionOf(t, direct, ns+"data"))
	next := start(func() (*Lock, error) { return Acquire(context.Background(), client, "a") })
	waiters(t, direct, ns+"a", 2)
	require.NoError(t, lock.Close())
	within(t, 5*time.Second, next.done, "the waiter holds")
	require.NoError(t, next.err)
	_, err = direct.Delete(t.Context(), ns+next.v.Key())
	require.NoError(t, err)
	within(t, 500*time.Millisecond, next.v.Done(), "told")
	require.ErrorIs(t, next.v.Close(), ErrLockLost)
}

// The peers that share the queue.

func TestMutexWaitsForOursAndOursForMutex(t *testing.T) {
	client := testCluster.Client(t)
	session, err := concurrency.NewSession(client)
	require.NoError(t, err)
	defer session.Close()
	mutex := concurrency.NewMutex(session, nameOf(t))

	ours := mustAcquire(t, client, nameOf(t))
	require.ErrorIs(t, mutex.TryLock(t.Context()), concurrency.ErrLocked)
	theirs := start(func() (struct{}, error) { return struct{}{}, mutex.Lock(context.Background()) })
	waiters(t, client, nameOf(t), 2)
	next := start(func() (*Lock, error) { return Acquire(context.Background(), client, nameOf(t)) })
	waiters(t, client, nameOf(t), 3)
	require.NoError(t, ours.Close())
	within(t, 5*time.Second, theirs.done, "the mutex holds")
	require.NoError(t, theirs.err)
	_, err = TryAcquire(t.Context(), client, nameOf(t))
	require.ErrorIs(t, err, ErrLockHeld)
	select {
	case <-next.done:
		require.Fail(t, "ours holds while the mutex does")
	default:
	}
	require.NoError(t, mutex.Unlock(t.Context()))
	within(t, 5*time.Second, next.done, "ours holds")
	require.NoError(t, next.err)
	require.NoError(t, next.v.Close())
}

func TestElectionReadsTheValueAndSharesTheQueue(t *testing.T) {
	client := testCluster.Client(t)
	session, err := concurrency.NewSession(client)
	require.NoError(t, err)
	defer session.Close()
	election := concurrency.NewElection(session, nameOf(t))
	ours := mustAcquire(t, client, nameOf(t), WithValue("node-7"))
	leader, err := election.Leader(t.Context())
	require.NoError(t, err)
	require.Equal(t, "node-7", string(leader.Kvs[0].Value))
	campaign := start(func() (struct{}, error) { return struct{}{}, election.Campaign(context.Background(), "theirs") })
	waiters(t, client, nameOf(t), 2)
	require.NoError(t, ours.Close())
	within(t, 5*time.Second, campaign.done, "they lead")
	require.NoError(t, campaign.err)
	_, err = TryAcquire(t.Context(), client, nameOf(t))
	require.ErrorIs(t, err, ErrLockHeld)
	require.NoError(t, election.Resign(t.Context()))
}

func TestLockServiceOfTheServerSharesTheQueue(t *testing.T) {
	client := testCluster.Client(t)
	service := v3lockpb.NewLockClient(client.ActiveConnection())
	ours := mustAcquire(t, client, nameOf(t))
	theirs := start(func() (*v3lockpb.LockResponse, error) {
		return service.Lock(context.Background(), &v3lockpb.LockRequest{Name: []byte(nameOf(t))})
	})
	waiters(t, client, nameOf(t), 2)
	next := start(func() (*Lock, error) { return Acquire(context.Background(), client, nameOf(t)) })
	waiters(t, client, nameOf(t), 3)
	require.NoError(t, ours.Close())
	within(t, 5*time.Second, theirs.done, "they hold")
	require.NoError(t, theirs.err)
	_, err := service.Unlock(t.Context(), &v3lockpb.UnlockRequest{Key: theirs.v.Key})
	require.NoError(t, err)
	within(t, 5*time.Second, next.done, "ours holds")
	require.NoError(t, next.err)
	require.NoError(t, next.v.Close())
}

func TestEtcdctlWaitsForOursAndOursForEtcdctl(t *testing.T) {
	etcdctl := installedEtcdctl(t)
	client := testCluster.Client(t)
	lockFor := func(script string) *exec.Cmd {
		cmd := exec.Command(etcdctl, "--endpoints", testCluster.Endpoints()[0], "lock", nameOf(t), "--", "sh", "-c", script)
		cmd.Env = append(os.Environ(), "ETCDCTL_API=3")
		return cmd
	}
	ours := mustAcquire(t, client, nameOf(t))
	ran := filepath.Join(t.TempDir(), "ran")
	theirs := start(func() ([]byte, error) { return lockFor("touch '" + ran + "'").CombinedOutput() })
	waiters(t, client, nameOf(t), 2)
	require.NoFileExists(t, ran, "it waits for ours")
	require.NoError(t, ours.Close())
	within(t, patience, theirs.done, "etcdctl had its turn")
	require.NoError(t, theirs.err, string(theirs.v))
	require.FileExists(t, ran)

	// And now it holds until it is told to stop.
	stop := filepath.Join(t.TempDir(), "stop")
	theirs = start(func() ([]byte, error) {
		return lockFor("while [ ! -e '" + stop + "' ]; do sleep 0.02; done").CombinedOutput()
	})
	waiters(t, client, nameOf(t), 1)
	_, err := TryAcquire(t.Context(), client, nameOf(t))
	require.ErrorIs(t, err, ErrLockHeld)
	next := start(func() (*Lock, error) { return Acquire(context.Background(), client, nameOf(t)) })
	waiters(t, client, nameOf(t), 2)
	select {
	case <-next.done:
		require.Fail(t, "ours holds while etcdctl does")
	default:
	}
	require.NoError(t, os.WriteFile(stop, nil, 0o600))
	within(t, patience, next.done, "ours holds")
	require.NoError(t, next.err)
	<-theirs.done
	require.NoError(t, theirs.err, string(theirs.v))
	require.NoError(t, next.v.Close())
}

// installedEtcdctl is the real binary: from PATH, else installed by the go command.
func installedEtcdctl(t *testing.T) string {
	t.Helper()
	if path, err := exec.LookPath("etcdctl"); err == nil {
		return path
	}
	// Not by go install: etcdctl's go.mod holds replace directives, which that refuses.
	dir := t.TempDir()
	for _, args := range [][]string{
		{"mod", "init", "etcdctl"},
		{"get", "go.etcd.io/etcd/etcdctl/v3@v3.7.3"},
		{"build", "-o", "etcdctl", "go.etcd.io/etcd/etcdctl/v3"},
	} {
		cmd := exec.Command("go", args...)
		cmd.Dir = dir
		out, err := cmd.CombinedOutput()
		require.NoError(t, err, string(out))
	}
	return filepath.Join(dir, "etcdctl")
}

// A lease is a context, and so may be its lock's parent.
func TestLockWhoseParentIsItsLeaseIsLostWithIt(t *testing.T) {
	t.Parallel()
	client := testCluster.Client(t)
	for want, end := range map[error]func(*Lease){
		ErrClosed:       func(l *Lease) { _ = l.Close() },
		ErrLeaseExpired: func(*Lease) {}, // it is never renewed
		ErrLeaseRevoked: func(l *Lease) { _, _ = client.Revoke(t.Context(), l.ID()) },
	} {
		lease := mustLease(t, client, 2*time.Second, WithMaxKeepAlives(0))
		lock, err := Acquire(lease, client, nameOf(t)+want.Error(), WithLease(lease))
		require.NoError(t, err)
		writer, err := NewLogWriter[string](t.Context(), lock, nameOf(t)+"/log")
		require.NoError(t, err)
		end(lease)
		for _, ctx := range []context.Context{lock, writer} {
			within(t, 5*time.Second, ctx.Done(), "it ends")
			require.ErrorIs(t, context.Cause(ctx), ErrLockLost)
			if want != ErrLeaseRevoked { // the key's deletion is reported at once, and not why
				require.ErrorIs(t, context.Cause(ctx), want)
			}
		}
		require.Equal(t, context.Cause(lock), lock.Close())
	}
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
	sleep(t.Context(), recheckInterval+recheckInterval/2+attempt+time.Second) // in which it looks again, and a read times out
	link.Heal()
	require.NoError(t, holder.Close())
	within(t, patience, waiter.done, "its turn comes")
	require.NoError(t, waiter.err)
	require.NoError(t, waiter.v.Close())
}

func TestCommitThatIsNotRepeatedIsStillReadBack(t *testing.T) {
	t.Parallel()
	const attempt = 3 * time.Second // enough to acquire in, however slow the machine
	client, link := linkedClient(t)
	lock := mustAcquire(t, client, nameOf(t), WithTTL(time.Minute),
		WithRetryPolicy(RetryPolicy{DefiniteOnly: true, AttemptTimeout: attempt}))
	link.DropReplies()
	committing := start(func() (Revision, error) { return lock.Commit(t.Context(), clientv3.OpPut(nameOf(t), "")) })
	sleep(t.Context(), 2*attempt+time.Second) // in which it times out, and so does a read
	link.Heal()
	within(t, patience, committing.done, "it returns")
	require.NoError(t, committing.err)
}

func TestElapsedBoundsAllThatACommitOrWriteDoes(t *testing.T) {
	t.Parallel()
	const elapsed = 4 * time.Second
	client, link := linkedClient(t)
	lease := mustLease(t, client, time.Minute)
	lock := mustAcquire(t, client, nameOf(t), WithLease(lease),
		WithRetryPolicy(RetryPolicy{Elapsed: elapsed, AttemptTimeout: elapsed / 4}))
	log, err := NewLogWriter[string](t.Context(), lock, nameOf(t)+"/log")
	require.NoError(t, err)
	link.Cut()
	for _, call := range []func() error{
		func() error { _, err := lock.Commit(t.Context(), clientv3.OpPut(nameOf(t), "")); return err },
		func() error { _, err := log.Write(t.Context(), ""); return err }, // which has that outcome to find out first
	} {
		took := testclock.Time(func() { err = call() })
		require.Error(t, err)
		require.Less(t, took, elapsed+elapsed/2)
	}
	link.Heal()
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

// blockingHandler is a logger that blocks, as one does that writes to a full pipe.
type blockingHandler struct {
	slog.Handler
	until <-chan struct{}
}

func (h blockingHandler) Enabled(_ context.Context, level slog.Level) bool {
	return level >= slog.LevelWarn
}

func (h blockingHandler) Handle(context.Context, slog.Record) error {
	<-h.until
	return nil
}

func TestLoggerThatBlocksKeepsNoLockAlive(t *testing.T) {
	t.Parallel()
	client := testCluster.Client(t)
	until := make(chan struct{})
	defer close(until)
	logger := WithLogger(slog.New(blockingHandler{slog.DiscardHandler, until}))
	lease := mustLease(t, client, 2*time.Second, WithMaxKeepAlives(0))
	locks := make([]*Lock, 3)
	for i := range locks {
		locks[i] = mustAcquire(t, client, fmt.Sprint(nameOf(t), i), WithLease(lease), logger)
	}
	within(t, 2*time.Second, lease.Done(), "the lease runs out")
	for _, lock := range locks {
		require.Error(t, lock.Err(), "ended before its lease")
		require.ErrorIs(t, context.Cause(lock), ErrLeaseExpired)
	}
}
