package etcdutil

import (
	"context"
	"errors"
	"fmt"
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
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

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

func TestAcquireRefusesNamesThatAreNone(t *testing.T) {
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

func TestAcquireRefusesOptionsByName(t *testing.T) {
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

func TestAcquireTimeoutBoundsOnlyTheWait(t *testing.T) {
	t.Parallel()
	client := testCluster.Client(t)
	holder := mustAcquire(t, client, nameOf(t))
	_, err := Acquire(t.Context(), client, nameOf(t), WithAcquireTimeout(200*time.Millisecond))
	require.ErrorIs(t, err, context.DeadlineExceeded)
	require.NoError(t, holder.Close())
	// This is enough for the requests of a lock that need not wait, on a slow machine too.
	const wait = 3 * time.Second
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

func TestAcquireThatFailsLeavesNoKeyAndNoLease(t *testing.T) {
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

// This fault leaves a ghost in the queue of concurrency.Mutex: the key is written, but the answer
// is lost.
func TestAcquireAfterALostReply(t *testing.T) {
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
			if isWriteTxn(req) && lost.CompareAndSwap(false, true) {
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

// A write that was given up may still be on its way, and land when nobody expects it.
func TestAcquireThatFailedRemovesAKeyThatIsWrittenLate(t *testing.T) {
	late := make(chan struct{})
	landed := make(chan error, 1)
	ctx, giveUp := context.WithCancel(context.Background())
	var held atomic.Bool
	client := interceptedClient(t, func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		if isWriteTxn(req) && held.CompareAndSwap(false, true) {
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

// Without the range compare somebody who has acquired it between the look and the write holds it
// too.
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
			stray := func(x txn) error {
				mustPut(t, direct, nameOf(t)+"/stray", "")
				return x.send()
			}
			if when == "before the first write" {
				faults.inTurn(acquire)
			} else {
				faults.inTurn(stray, acquire)
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
	require.LessOrEqual(t, n.Load(), int32(2*claimRounds+2), "after a few rounds")
	faults.each(nil)
	require.NoError(t, lock.Close())

	n.Store(0)
	var holder *Lock
	faults.each(func(x txn) error {
		if mustPut(t, direct, fmt.Sprintf("%s/more/%d", nameOf(t), n.Load()), ""); n.Add(1) == claimRounds+1 {
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
	client, requests := countingClient(t, isKeyCheck)
	other := testCluster.Client(t)
	lock := mustAcquire(t, client, nameOf(t))
	inner, err := Acquire(lock, client, nameOf(t)+"-inner")
	require.NoError(t, err)
	// t.Context() runs under neither lock.
	require.NoError(t, inner.Do(t.Context(), func(ctx context.Context) error {
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

func TestAcquireNamesTheEndOfItsContextOnce(t *testing.T) {
	t.Parallel()
	client, link := linkedClient(t)
	mustLease(t, client, time.Minute) // there is a connection
	ctx, cancel := context.WithCancelCause(t.Context())
	link.Cut()
	acquiring := start(func() (*Lock, error) { return Acquire(ctx, client, nameOf(t)) })
	time.AfterFunc(100*time.Millisecond, func() { cancel(errors.New("boom")) })
	within(t, patience, acquiring.done, "Acquire returns")
	require.ErrorIs(t, acquiring.err, context.Canceled)
	for _, once := range []string{"boom", "etcdutil: "} {
		require.Equal(t, 1, strings.Count(acquiring.err.Error(), once), acquiring.err.Error())
	}
	require.NotContains(t, acquiring.err.Error(), "context canceled: context canceled")
}

// The key is there, but nothing has shown that the request was sent twice.
func TestTryAcquireIsNotRefusedForItsOwnKey(t *testing.T) {
	t.Parallel()
	var writes atomic.Int64
	client := newClientWith(t, grpc.WithChainUnaryInterceptor(func(
		ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption,
	) error {
		if isWriteTxn(req) && writes.Add(1) == 1 {
			_ = invoke(ctx, method, req, reply, cc)
			return status.Error(codes.Canceled, "the answer is lost")
		}
		return invoke(ctx, method, req, reply, cc, opts...)
	}))
	lock, err := TryAcquire(t.Context(), client, nameOf(t))
	require.NoError(t, err)
	require.NoError(t, lock.Close())
}
