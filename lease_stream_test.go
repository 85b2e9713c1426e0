package etcdutil

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"example.com/etcdutil/etcdtest"
	"github.com/stretchr/testify/require"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func TestRenewalsAreCountedFromOneToTheLast(t *testing.T) {
	t.Parallel()
	var renewals answeredRenewals
	client := newClientWith(t, grpc.WithChainStreamInterceptor(renewals.intercept))
	lease := mustLease(t, client, 4*time.Second, WithMaxKeepAlives(2), WithKeepAliveInterval(100*time.Millisecond))
	first := lease.Expiry()
	within(t, 5*time.Second, lease.Done(), "the lease runs out")
	require.ErrorIs(t, context.Cause(lease), ErrLeaseExpired)
	require.EqualValues(t, 2, renewals.n.Load())
	require.Greater(t, lease.Expiry().Sub(first), 190*time.Millisecond, "two renewals, 100 ms apart")
}

// answeredRenewals counts the renewals of a client that are answered: one that is answered late is
// sent again.
type answeredRenewals struct{ n atomic.Int64 }

func (r *answeredRenewals) intercept(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, streamer grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	stream, err := streamer(ctx, desc, cc, method, opts...)
	if err != nil || !strings.HasSuffix(method, "/LeaseKeepAlive") {
		return stream, err
	}
	return countedStream{stream, &r.n}, nil
}

type countedStream struct {
	grpc.ClientStream
	answers *atomic.Int64
}

func (s countedStream) RecvMsg(m any) error {
	err := s.ClientStream.RecvMsg(m)
	if err == nil {
		s.answers.Add(1)
	}
	return err
}

func TestRenewalMovesToAnotherMemberWhenItsOwnIsIsolated(t *testing.T) {
	t.Parallel()
	// The next renewal is due after a third, and late after another. A slow machine has the rest, less
	// the margin.
	const ttl = 12 * time.Second
	cluster := etcdtest.Start(t, 3)
	client := cluster.Client(t)
	// Some renewals go to each member: whichever is isolated, it is one of theirs.
	held := make([]*Lease, 3)
	for i := range held {
		held[i] = mustLease(t, client, ttl)
	}
	leader := cluster.Leader()
	require.NoError(t, cluster.Isolate(leader))
	isolated := time.Now()
	for _, lease := range held {
		eventually(t, func() bool { return lease.Err() != nil || lease.Expiry().After(isolated.Add(ttl-ttl/10)) }, "renewed by another")
		require.NoError(t, lease.Err(), context.Cause(lease))
	}
	require.NoError(t, cluster.Rejoin(leader))
}

func TestRenewalMovesToAnotherMemberWhenItsOwnIsStuck(t *testing.T) {
	t.Parallel()
	const ttl = 12 * time.Second // as above
	client, link, second := twoWays(t)
	lease := mustLease(t, client, ttl)
	first := lease.Expiry()
	eventually(t, func() bool { return lease.Expiry().After(first) }, "renewed over the link")
	second()
	link.Cut() // and nobody closes the connection
	stuck := time.Now()
	eventually(t, func() bool { return lease.Err() != nil || lease.Expiry().After(stuck.Add(ttl-ttl/10)) }, "renewed over the other")
	require.NoError(t, lease.Err(), context.Cause(lease))
	link.Heal()
}

func TestRenewalOfThreeThousandLeasesOutlivesFourResets(t *testing.T) {
	const n, ttl = 3000, 6 * time.Second
	client, link := linkedClient(t)
	held := make([]*Lease, n)
	var granting sync.WaitGroup
	for worker := range 16 {
		granting.Go(func() {
			for i := worker; i < n; i += 16 {
				lease, err := NewLease(context.Background(), client, ttl, WithKeepAliveInterval(time.Second))
				if err != nil {
					t.Error(err)
					return
				}
				held[i] = lease
			}
		})
	}
	granting.Wait()
	if t.Failed() {
		return
	}
	for range 4 {
		link.Reset()
		reset := time.Now()
		eventually(t, func() bool {
			for _, lease := range held {
				if lease.Err() == nil && lease.Expiry().Before(reset.Add(ttl-ttl/10)) {
					return false
				}
			}
			return true
		}, "every lease is lost, or renewed after the reset")
	}
	for _, lease := range held {
		require.NoError(t, lease.Err(), context.Cause(lease))
	}
	var closing sync.WaitGroup
	for worker := range 16 {
		closing.Go(func() {
			for i := worker; i < n; i += 16 {
				if err := held[i].Close(); err != nil {
					t.Error(err)
				}
			}
		})
	}
	closing.Wait()
	require.Empty(t, renewStreamsOf(client), "the last lease to leave ends the stream")
}

func renewStreamsOf(client *clientv3.Client) []*renewStream {
	renewStreams.Lock()
	defer renewStreams.Unlock()
	if s := renewStreams.byClient[client]; s != nil {
		return []*renewStream{s}
	}
	return nil
}

func TestRenewalRefusedForGoodDoesNotStarveTheOthers(t *testing.T) {
	t.Parallel()
	const ttl = 9 * time.Second // more than a slow machine stands still
	cluster, root := authCluster(t, 300)
	client := userClient(t, "user", nil, cluster.Endpoints()...)
	good := make([]*Lease, 20)
	for i := range good {
		good[i] = mustLease(t, client, ttl)
		_, err := client.Put(t.Context(), fmt.Sprint("allowed/", i), "", clientv3.WithLease(good[i].ID()))
		require.NoError(t, err)
	}
	bad := mustLease(t, client, ttl)
	_, err := root.Put(t.Context(), "forbidden", "", clientv3.WithLease(bad.ID()))
	require.NoError(t, err)

	within(t, 2*ttl, bad.Done(), "the one runs out")
	require.ErrorIs(t, context.Cause(bad), ErrLeaseExpired)
	require.ErrorIs(t, context.Cause(bad), rpctypes.ErrPermissionDenied)
	ranOut := time.Now()
	for _, lease := range good {
		eventually(t, func() bool { return lease.Err() != nil || lease.Expiry().After(ranOut.Add(ttl-ttl/10)) }, "renewed")
		require.NoError(t, lease.Err(), context.Cause(lease))
	}
}

func TestRenewalWaitsForAnEtcdThatTakesLongToAuthenticate(t *testing.T) {
	t.Parallel()
	cluster, _ := authCluster(t, 300)
	var slow atomic.Bool
	client := userClient(t, "user", []grpc.DialOption{grpc.WithChainUnaryInterceptor(
		func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
			if slow.Load() && strings.HasSuffix(method, "/Authenticate") {
				sleep(ctx, 3*time.Second)
			}
			return invoker(ctx, method, req, reply, cc, opts...)
		})}, cluster.Endpoints()...)
	lease := mustLease(t, client, 15*time.Second, WithKeepAliveInterval(time.Second))
	first := lease.Expiry()
	slow.Store(true)
	eventually(t, func() bool { return lease.Err() != nil || lease.Expiry().After(first) }, "renewed")
	require.NoError(t, lease.Err(), context.Cause(lease))
}

func TestRenewalWithALargeMarginIsInTime(t *testing.T) {
	t.Parallel()
	lease := mustLease(t, testCluster.Client(t), 6*time.Second, WithExpiryMargin(4500*time.Millisecond))
	first := lease.Expiry()
	eventually(t, func() bool { return lease.Err() != nil || lease.Expiry().After(first) }, "renewed")
	require.NoError(t, lease.Err(), context.Cause(lease))
}

func TestRenewalStreamOpensWhenTheFirstRenewalIsDue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server := &leaseServer{ttl: 10}
		client := server.start(t)
		lease, err := NewLease(context.Background(), client, 10*time.Second)
		require.NoError(t, err)
		time.Sleep(3 * time.Second)
		synctest.Wait()
		require.Zero(t, server.streams.Load())
		time.Sleep(time.Second)
		synctest.Wait()
		require.EqualValues(t, 1, server.streams.Load())
		require.NoError(t, lease.Close())
	})
}

func TestRenewalOutlivesAnEtcdThatRefusesConnectionsForMostOfAShortTTL(t *testing.T) {
	t.Parallel()
	onceInTime(t, func() bool { return outlivesRefusals(t, 2*time.Second) }, "renewed in the time that was left")
}

func TestRenewalOutlivesAnEtcdThatRefusesConnectionsForMostOfALongTTL(t *testing.T) {
	t.Parallel()
	onceInTime(t, func() bool { return outlivesRefusals(t, 6*time.Second) }, "renewed in the time that was left")
}

// outlivesRefusals refuses connections to a lease until little of its time is left, and reports
// whether it got to use that.
func outlivesRefusals(t *testing.T, ttl time.Duration) bool {
	door := openDoor(t, testCluster.Endpoints()[0])
	lease := mustLease(t, newClient(t, door.addr), ttl)
	left := max(ttl/6, 600*time.Millisecond)
	for range 2 {
		// Just after a renewal, so that the whole of TTL - margin is left.
		before := lease.Expiry()
		eventually(t, func() bool { return lease.Err() != nil || lease.Expiry().After(before) }, "a renewal")
		door.shut()
		time.Sleep(time.Until(lease.Expiry()) - left)
		door.open()
		shut := lease.Expiry()
		eventually(t, func() bool { return lease.Err() != nil || lease.Expiry().After(shut) }, "renewed")
		if lease.Err() != nil {
			t.Log(context.Cause(lease))
			return false
		}
	}
	return true
}

// etcd answers renewals in order, its gRPC proxy does not.
func TestRenewalAnswersPairWithTheirLeasesInAnyOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server := &leaseServer{ttl: 10, reversed: true}
		client := server.start(t)
		var leases []*Lease
		for range 5 {
			leases = append(leases, mustLease(t, client, 10*time.Second))
		}
		began := time.Now()
		time.Sleep(time.Minute)
		for _, lease := range leases {
			require.NoError(t, lease.Err(), context.Cause(lease))
			require.True(t, lease.Expiry().After(began.Add(time.Minute)))
		}
		require.EqualValues(t, 1, server.streams.Load(), "and none is late")
		for _, lease := range leases {
			require.NoError(t, lease.Close())
		}
	})
}

func TestRenewalWorksThroughTheGRPCProxy(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 1)
	client := newClient(t, etcdtest.StartProxy(t, cluster).Endpoint())
	var held []*Lease
	for range 5 {
		held = append(held, mustLease(t, client, 4*time.Second))
	}
	began := time.Now()
	for _, lease := range held {
		eventually(t, func() bool { return lease.Err() != nil || lease.Expiry().After(began.Add(3*lease.TTL())) }, "renewed")
		require.NoError(t, lease.Err(), context.Cause(lease))
	}
}

// refusingStreams is an interceptor that refuses what the renewal streams of a client ask for.
type refusingStreams struct{ refuses atomic.Bool }

func (r *refusingStreams) intercept(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, streamer grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	stream, err := streamer(ctx, desc, cc, method, opts...)
	if err != nil || !strings.HasSuffix(method, "/LeaseKeepAlive") {
		return stream, err
	}
	return refusedStream{stream, r}, nil
}

type refusedStream struct {
	grpc.ClientStream
	by *refusingStreams
}

func (s refusedStream) RecvMsg(m any) error {
	err := s.ClientStream.RecvMsg(m)
	if s.by.refuses.Load() {
		return status.Error(codes.PermissionDenied, "etcdserver: permission denied")
	}
	return err
}

func TestRenewalRefusedForAMomentCostsNoLease(t *testing.T) {
	t.Parallel()
	const ttl = 9 * time.Second
	var refusing refusingStreams
	client := newClientWith(t, grpc.WithChainStreamInterceptor(refusing.intercept))
	held := make([]*Lease, 50)
	for i := range held {
		held[i] = mustLease(t, client, ttl)
	}
	refusing.refuses.Store(true)
	// By then all renewals are due.
	time.Sleep(time.Until(held[0].Expiry().Add(ttl/10 - 2*ttl/3).Add(100 * time.Millisecond)))
	refusing.refuses.Store(false)
	back := time.Now()
	for _, lease := range held {
		eventually(t, func() bool { return lease.Err() != nil || lease.Expiry().After(back.Add(ttl-ttl/10)) }, "renewed")
		require.NoError(t, lease.Err(), context.Cause(lease))
	}
}

func TestRenewalIsTriedAgainWhenAPermissionComesBack(t *testing.T) {
	t.Parallel()
	const ttl = 9 * time.Second
	cluster, root := authCluster(t, 300)
	client := userClient(t, "user", nil, cluster.Endpoints()...)
	lease := mustLease(t, client, ttl, WithKeepAliveInterval(time.Second))
	_, err := client.Put(t.Context(), "allowed/key", "", clientv3.WithLease(lease.ID()))
	require.NoError(t, err)
	_, err = root.RoleRevokePermission(t.Context(), "user", "allowed/", "allowed0")
	require.NoError(t, err)
	eventually(t, func() bool { return lease.isDenied() }, "a renewal is refused")
	_, err = root.RoleGrantPermission(t.Context(), "user", "allowed/", "allowed0", clientv3.PermissionType(clientv3.PermReadWrite))
	require.NoError(t, err)
	back := time.Now()
	eventually(t, func() bool { return lease.Err() != nil || lease.Expiry().After(back.Add(ttl-ttl/10)) }, "renewed")
	require.NoError(t, lease.Err(), context.Cause(lease))
}

func (l *Lease) isDenied() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.denial != nil
}

func TestRenewalHasTimeForASecondAttemptWhateverTheMargin(t *testing.T) {
	t.Parallel()
	const ttl = 8 * time.Second
	for _, margin := range []time.Duration{ttl / 10, ttl * 42 / 100, ttl / 2, ttl * 7 / 10} {
		t.Run(fmt.Sprint(margin), func(t *testing.T) {
			t.Parallel()
			client, link, second := twoWays(t)
			lease := mustLease(t, client, ttl, WithExpiryMargin(margin))
			first := lease.Expiry()
			eventually(t, func() bool { return lease.Expiry().After(first) }, "renewed over the link")
			second()
			link.Cut() // and nobody closes the connection
			stuck := time.Now()
			eventually(t, func() bool { return lease.Err() != nil || lease.Expiry().After(stuck.Add(ttl-margin)) }, "renewed over the other")
			require.NoError(t, lease.Err(), context.Cause(lease))
			link.Heal()
		})
	}
}

func TestRenewalFailureIsInTheCauseOfTheExpiry(t *testing.T) {
	t.Parallel()
	t.Run("refused connections", func(t *testing.T) {
		t.Parallel()
		door := openDoor(t, testCluster.Endpoints()[0])
		lease := mustLease(t, newClient(t, door.addr), 2*time.Second)
		door.shut()
		<-lease.Done()
		require.ErrorIs(t, context.Cause(lease), ErrLeaseExpired)
		require.ErrorContains(t, context.Cause(lease), "connection refused")
		require.Equal(t, 1, strings.Count(context.Cause(lease).Error(), "etcdutil: "))
	})
	t.Run("black hole", func(t *testing.T) {
		t.Parallel()
		client, link := linkedClient(t)
		lease := mustLease(t, client, 2*time.Second)
		link.Cut()
		<-lease.Done()
		require.ErrorIs(t, context.Cause(lease), ErrLeaseExpired)
	})
	t.Run("wrong password", func(t *testing.T) {
		t.Parallel()
		cluster, root := authCluster(t, 300)
		client := userClient(t, "user", nil, cluster.Endpoints()...)
		lease := mustLease(t, client, 4*time.Second)
		_, err := root.UserChangePassword(t.Context(), "user", "another")
		require.NoError(t, err)
		<-lease.Done()
		require.ErrorIs(t, context.Cause(lease), ErrLeaseExpired)
		require.ErrorIs(t, context.Cause(lease), rpctypes.ErrAuthFailed)
	})
	t.Run("none", func(t *testing.T) {
		t.Parallel()
		client, link := linkedClient(t)
		lease := mustLease(t, client, 2*time.Second, WithMaxKeepAlives(1))
		first := lease.Expiry()
		eventually(t, func() bool { return lease.Expiry().After(first) }, "renewed once, and that is all")
		link.Reset()
		<-lease.Done()
		require.Equal(t, ErrLeaseExpired, context.Cause(lease))
	})
}

func TestRenewalIsObserved(t *testing.T) {
	t.Parallel()
	events := make(chan LeaseEvent, 100)
	lease := mustLease(t, testCluster.Client(t), 3*time.Second, WithObserver(Observer{Renewed: func(e LeaseEvent) { events <- e }}))
	for range 2 {
		e := <-events
		require.Equal(t, lease.ID(), e.Lease)
		require.Positive(t, e.Took)
		require.Positive(t, e.Left)
		require.Less(t, e.Left, lease.TTL())
	}
}

func TestRenewalOfOthersGoesOnWhileALoggerBlocksOrPanics(t *testing.T) {
	t.Parallel()
	const ttl = 3 * time.Second
	client := testCluster.Client(t)
	release := make(chan struct{})
	defer close(release)
	block := Observer{Renewed: func(LeaseEvent) { <-release }}
	panics := Observer{Renewed: func(LeaseEvent) { panic("user code") }}
	noisy := mustLease(t, client, ttl, WithObserver(block))
	panicking := mustLease(t, client, ttl, WithObserver(panics))
	quiet := mustLease(t, client, ttl)
	began := time.Now()
	for _, lease := range []*Lease{noisy, panicking, quiet} {
		eventually(t, func() bool { return lease.Err() != nil || lease.Expiry().After(began.Add(2*ttl)) }, "renewed")
		require.NoError(t, lease.Err(), context.Cause(lease))
	}
	closing := start(func() (struct{}, error) { return struct{}{}, noisy.Close() })
	within(t, time.Second, closing.done, "Close does not wait for the logger")
	require.NoError(t, closing.err)
}

func TestCloseFromTheObserverOfALostLease(t *testing.T) {
	t.Parallel()
	client := testCluster.Client(t)
	var lease *Lease
	ready, closed := make(chan struct{}), make(chan error, 1)
	lease = mustLease(t, client, 2*time.Second, WithObserver(Observer{Renewed: func(LeaseEvent) {
		<-ready
		select {
		case closed <- lease.Close():
		default:
		}
	}}))
	close(ready)
	require.NoError(t, <-closed)
}

// clientv3 fetches a token before each stream, and gRPC takes the members in turn.
func TestRenewalWithAPasswordLeavesTheIsolatedOneOfTwoEndpoints(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.StartSecure(t, 3, etcdtest.Security{Users: []etcdtest.User{{Name: "user", Password: "secret"}}})
	good := cluster.Leader()
	bad := (good + 1) % 3
	config, err := cluster.ClientConfig("user")
	require.NoError(t, err)
	config.Endpoints = []string{cluster.Endpoints()[bad], cluster.Endpoints()[good]}
	client, err := clientv3.New(config)
	require.NoError(t, err)
	t.Cleanup(func() { _ = client.Close() })
	const ttl = 6 * time.Second
	var leases []*Lease
	for range 3 {
		leases = append(leases, mustLease(t, client, ttl))
	}
	require.NoError(t, cluster.Isolate(bad))
	sleep(t.Context(), 2*ttl)
	for _, lease := range leases {
		require.NoError(t, context.Cause(lease))
	}
}
