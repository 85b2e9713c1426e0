package etcdutil

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"example.com/etcdutil/etcdtest"
	"github.com/stretchr/testify/require"
	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func TestCleanupsOfAnOutageAreBoundedAndAllDone(t *testing.T) {
	const n = 300
	cluster := etcdtest.Start(t, 1)
	direct := cluster.Client(t)
	link := etcdtest.StartLink(t, cluster.Endpoints()[0])
	client := newClient(t, link.Endpoint())
	_, err := client.Get(t.Context(), "connect")
	require.NoError(t, err)
	link.DropReplies()
	before := runtime.NumGoroutine()
	var all sync.WaitGroup
	for range n {
		all.Go(func() {
			ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
			defer cancel()
			_, err := NewLease(ctx, client, time.Hour)
			if !errors.Is(err, context.DeadlineExceeded) {
				t.Error(err)
			}
		})
	}
	all.Wait()
	require.LessOrEqual(t, goroutinesIn("etcdutil.(*cleaner).work"), maxCleaners)
	eventually(t, func() bool { return runtime.NumGoroutine() < before+4*maxCleaners }, "a worker has a few of gRPC's")
	eventually(t, func() bool { return len(leases(t, direct)) > 0 }, "the server has granted them")
	link.Heal()
	eventually(t, func() bool { return len(leases(t, direct)) == 0 }, "all are revoked")
	require.NoError(t, client.Close())
	eventually(t, func() bool { return cleanerOf(client) == nil }, "the client's end ends the cleanups")
}

func cleanerOf(client *clientv3.Client) *cleaner {
	cleaners.Lock()
	defer cleaners.Unlock()
	return cleaners.byClient[client]
}

func TestCleanupsOfManyCancelledAcquisitionsAreAllDoneAtOnce(t *testing.T) {
	const n = 300
	for _, shared := range []bool{false, true} {
		t.Run(fmt.Sprintf("shared lease: %v", shared), func(t *testing.T) {
			cluster := etcdtest.Start(t, 1)
			client := cluster.Client(t)
			var opts []LockOption
			want := 1 // the holder's lease
			if shared {
				opts, want = append(opts, WithLease(mustLease(t, client, time.Hour))), 2
			} else {
				opts = append(opts, WithTTL(time.Hour))
			}
			holder := mustAcquire(t, client, nameOf(t))
			ctx, cancel := context.WithCancel(t.Context())
			var all sync.WaitGroup
			for range n {
				all.Go(func() {
					_, err := Acquire(ctx, client, nameOf(t), opts...)
					if !errors.Is(err, context.Canceled) {
						t.Error(err)
					}
				})
			}
			waiters(t, client, nameOf(t), n+1)
			// A write that has no answer yet would be cleaned up after for as long as it may arrive.
			eventually(t, func() bool { return goroutinesIn("etcdutil.(*contender).waitDeleted(") == n }, "each has its answer")
			cancel()
			all.Wait()
			eventually(t, func() bool { return len(leases(t, client)) == want }, "their leases are revoked")
			waiters(t, client, nameOf(t), 1)
			eventually(t, func() bool { return cleanerOf(client) == nil }, "nothing is left to clean up")
			require.NoError(t, holder.Err())
		})
	}
}

func TestCleanupOfADiscardedKeyIsRepeatedUntilItCannotArriveAnyMore(t *testing.T) {
	client := testCluster.Client(t)
	lease := mustLease(t, client, 10*time.Second)
	key := lease.reserveKey(nameOf(t), client)
	lease.discardKey(key, true, func(ctx context.Context) error { _, err := client.Delete(ctx, key); return err })
	require.Equal(t, 1, lease.slots.len())
	for range 3 { // which arrives late
		_, err := client.Put(t.Context(), key, "", clientv3.WithLease(lease.ID()))
		require.NoError(t, err)
		waiters(t, client, nameOf(t), 0)
	}
	used := map[string]bool{}
	for range 2 * keysPerName {
		next := lease.reserveKey(nameOf(t), client)
		require.NotEqual(t, key, next, "it is not used again")
		require.False(t, used[next])
		used[next] = true
	}
	lease.slots.mu.Lock()
	lease.slots.slots[key].until = time.Now()
	lease.slots.mu.Unlock()
	eventually(t, func() bool { return lease.slots.len() == 2*keysPerName }, "it is free when it is settled")
}

// Others may have attached keys to the lease that its owner may not read.
func TestCleanupOfADiscardedKeyEndsThoughTheLeasesKeysCannotBeListed(t *testing.T) {
	t.Parallel()
	client := interceptedClient(t, func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		if r, ok := req.(*etcdserverpb.LeaseTimeToLiveRequest); ok && r.Keys {
			return rpctypes.ErrGRPCPermissionDenied
		}
		return invoker(ctx, method, req, reply, cc, opts...)
	})
	lease := mustLease(t, client, 10*time.Second)
	key := lease.reserveKey(nameOf(t), client)
	lease.discardKey(key, true, func(ctx context.Context) error { _, err := client.Delete(ctx, key); return err })
	for range 2 { // which arrives late
		_, err := client.Put(t.Context(), key, "", clientv3.WithLease(lease.ID()))
		require.NoError(t, err)
		waiters(t, client, nameOf(t), 0)
	}
	lease.slots.mu.Lock()
	lease.slots.slots[key].until = time.Now()
	lease.slots.mu.Unlock()
	eventually(t, func() bool { return lease.slots.len() == 0 }, "it is free when it is settled")
}

func TestCleanupOfADiscardedKeyEndsThoughAnotherMayNotBeDeleted(t *testing.T) {
	t.Parallel()
	cluster, root := authCluster(t, 300)
	_, err := root.RoleGrantPermission(t.Context(), "user", "read/", "read0", clientv3.PermissionType(clientv3.PermRead))
	require.NoError(t, err)
	client := userClient(t, "user", nil, cluster.Endpoints()...)
	remove := func(key string) func(ctx context.Context) error {
		return func(ctx context.Context) error { _, err := client.Delete(ctx, key); return err }
	}
	for name, discardOther := range map[string]func(lease *Lease){
		"discarded": func(lease *Lease) {
			key := lease.reserveKey("denied", client)
			lease.discardKey(key, false, remove(key))
		},
		"brought back": func(lease *Lease) {
			_, err := root.Put(t.Context(), slotKey("read/l", lease.ID(), 1), "", clientv3.WithLease(lease.ID()))
			require.NoError(t, err)
		},
	} {
		t.Run(name, func(t *testing.T) {
			lease := mustLease(t, client, time.Minute)
			key := lease.reserveKey("allowed/l", client)
			discardOther(lease)
			lease.discardKey(key, true, remove(key))
			for range 2 { // which arrives late
				_, err := root.Put(t.Context(), key, "", clientv3.WithLease(lease.ID()))
				require.NoError(t, err)
				waiters(t, root, "allowed/l", 0)
			}
			lease.slots.mu.Lock()
			lease.slots.slots[key].until = time.Now()
			lease.slots.mu.Unlock()
			eventually(t, func() bool { return lease.slots.len() == 1 }, "it is free when it is settled, and the other is not")
		})
	}
}

// A request may arrive at any time later, and a restored backup may have the key of a lock that was
// closed since.
func TestCleanupOfKeysThatNoLockUsesComesWithTheRenewals(t *testing.T) {
	t.Parallel()
	client := testCluster.Client(t)
	lease := mustLease(t, client, 6*time.Second, WithKeepAliveInterval(200*time.Millisecond))
	held := mustAcquire(t, client, nameOf(t)+"-held", WithLease(lease))
	closed := mustAcquire(t, client, nameOf(t), WithLease(lease))
	require.NoError(t, closed.Close())
	own := nameOf(t) + "-own/key"
	for _, key := range []string{closed.Key(), own} {
		_, err := client.Put(t.Context(), key, "", clientv3.WithLease(lease.ID()))
		require.NoError(t, err)
	}
	waiters(t, client, nameOf(t), 0)
	resp, err := client.Get(t.Context(), own)
	require.NoError(t, err)
	require.Len(t, resp.Kvs, 1, "other keys on the lease are the user's")
	require.NoError(t, held.Err())
	alive, err := held.Alive(t.Context())
	require.NoError(t, err)
	require.True(t, alive)
}

// The request that grants a lease may be sent twice, and arrive again when the lease was revoked.
func TestCleanupOfALeaseThatIsGrantedLate(t *testing.T) {
	t.Parallel()
	var land func() error
	client := interceptedClient(t, func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		if strings.HasSuffix(method, "/LeaseGrant") && land == nil {
			land = func() error {
				return invoker(context.WithoutCancel(ctx), method, req, new(etcdserverpb.LeaseGrantResponse), cc)
			}
			return status.Error(codes.Internal, "away") // which clientv3 does not repeat by itself
		}
		return invoker(ctx, method, req, reply, cc, opts...)
	})
	lease, err := NewLease(t.Context(), client, time.Hour)
	require.NoError(t, err)
	require.NoError(t, lease.Close())
	require.NoError(t, land()) // it is there, for a moment
	eventually(t, func() bool { return !knows(t, client, lease.ID()) }, "it is revoked again")
}
