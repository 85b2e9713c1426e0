package etcdutil

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"example.com/etcdutil/etcdtest"
	"github.com/stretchr/testify/require"
	clientv3 "go.etcd.io/etcd/client/v3"
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

func TestLockIsLostWithin500msOfADeletionOrRevocation(t *testing.T) {
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
					eventually(t, func() bool { return knows(t, client, lock.Lease().ID()) == (!c.revoked && shared) }, "the lease goes, if it is its own")
				})
			}
		}
	}
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

func TestDoReturnsTheErrorOfFnItself(t *testing.T) {
	t.Parallel()
	want := errors.New("fn's")
	got := Do(t.Context(), testCluster.Client(t), nameOf(t), func(context.Context) error { return want })
	require.Same(t, want, got)
}

func TestLocksNestToAnyDepth(t *testing.T) {
	t.Parallel()
	client := testCluster.Client(t)
	lease := mustLease(t, client, time.Minute)
	ctx := t.Context()
	for i := range 40 {
		lock, err := Acquire(ctx, client, fmt.Sprint(nameOf(t), i), WithLease(lease), WithAcquireTimeout(patience))
		require.NoError(t, err)
		ctx = lock
		if i%2 == 0 {
			continue
		}
		entered := make(chan context.Context, 1)
		require.NoError(t, lock.Do(ctx, func(under context.Context) error { entered <- context.WithoutCancel(under); return nil }))
		ctx = <-entered
	}
	_, err := Acquire(ctx, client, nameOf(t)+"0", WithLease(lease))
	require.ErrorIs(t, err, ErrLockHeld)
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

// A lease is a context, and so may be its lock's parent.
func TestLockWhoseParentIsItsLeaseIsLostWithIt(t *testing.T) {
	t.Parallel()
	client := testCluster.Client(t)
	for want, end := range map[error]func(*Lease){
		ErrClosed:       func(l *Lease) { _ = l.Close() },
		ErrLeaseExpired: func(*Lease) {}, // it is never renewed
		ErrLeaseRevoked: func(l *Lease) { _, _ = client.Revoke(t.Context(), l.ID()) },
	} {
		lease := mustLease(t, client, 5*time.Second, WithMaxKeepAlives(0))
		lock, err := Acquire(lease, client, nameOf(t)+want.Error(), WithLease(lease))
		require.NoError(t, err)
		writer, err := NewLogWriter[string](t.Context(), lock, nameOf(t)+"/log")
		require.NoError(t, err)
		end(lease)
		for _, ctx := range []context.Context{lock, writer} {
			within(t, 15*time.Second, ctx.Done(), "it ends")
			require.ErrorIs(t, context.Cause(ctx), ErrLockLost)
			if want != ErrLeaseRevoked { // the key's deletion is reported at once, and not why
				require.ErrorIs(t, context.Cause(ctx), want)
			}
		}
		require.Equal(t, context.Cause(lock), lock.Close())
	}
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
	cluster := etcdtest.Start(t, 1) // which it compacts
	direct := cluster.Client(t)
	var refusals atomic.Int32
	link := etcdtest.StartLink(t, cluster.Endpoints()[0])
	client := interceptedClient(t, func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		if strings.HasSuffix(method, "/Txn") && refusals.Add(-1) >= 0 {
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

func TestLockLogsOncePerOutageThatItsKeyCannotBeWatched(t *testing.T) {
	t.Parallel()
	cluster, root := authCluster(t, 300)
	link := etcdtest.StartLink(t, cluster.Endpoints()[0])
	client, ctx := userClient(t, "user", nil, link.Endpoint()), t.Context()
	logger, lines := recordingLogger()
	var r recorder
	lock := mustAcquire(t, client, "allowed/l", WithTTL(time.Minute), WithLogger(logger), WithObserver(r.observer()))
	attempts := func() (all, firsts int) {
		for _, e := range r.all("retrying") {
			switch e := e.event.(RetryEvent); {
			case e.Op != "watch the lock's key":
				continue
			case e.Attempt == 1:
				firsts++
			}
			all++
		}
		return all, firsts
	}
	for outage := range 2 {
		eventually(t, func() bool { return watchStands(client) }, "its key is watched")
		before, _ := attempts()
		_, err := root.RoleRevokePermission(ctx, "user", "allowed/", "allowed0")
		require.NoError(t, err)
		link.Reset()
		eventually(t, func() bool { all, _ := attempts(); return all >= before+3 }, "it is tried again and again")
		_, firsts := attempts()
		require.Equal(t, outage+1, firsts)
		logged := slices.DeleteFunc(lines(), func(line string) bool { return line != "etcdutil: lock's key cannot be watched" })
		require.Len(t, logged, outage+1)
		_, err = root.RoleGrantPermission(ctx, "user", "allowed/", "allowed0", clientv3.PermissionType(clientv3.PermReadWrite))
		require.NoError(t, err)
	}
	eventually(t, func() bool { return watchStands(client) }, "its key is watched again")
	require.NoError(t, lock.Err())
}

// watchStands reports whether the only watch of a client, that of a lock's key, stands and was not
// refused since.
func watchStands(client *clientv3.Client) bool {
	h := hubRef{client}.lock()
	defer h.mu.Unlock()
	for sub := range h.subs {
		return sub.current != nil && sub.current.created && sub.user.(*keyWatch).refusals == 0
	}
	return false
}
