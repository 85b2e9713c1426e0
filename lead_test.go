package etcdutil

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"example.com/etcdutil/etcdtest"
	"github.com/stretchr/testify/require"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
	"google.golang.org/grpc"
)

// A term is one run of a leader's fn.
type term struct {
	ctx  context.Context
	done chan error // what fn is to return
}

// A candidate leads when it can, and passes each term to its test.
type candidate struct {
	terms  chan *term
	result *async[struct{}]
	cancel context.CancelFunc
}

func campaign(t testing.TB, client *clientv3.Client, name string, opts ...LockOption) *candidate {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	c := &candidate{terms: make(chan *term), cancel: cancel}
	over := make(chan struct{})
	c.result = start(func() (struct{}, error) {
		return struct{}{}, Lead(ctx, client, name, func(ctx context.Context) error {
			now := &term{ctx, make(chan error, 1)}
			select {
			case c.terms <- now:
			case <-ctx.Done():
				return ctx.Err()
			}
			select {
			case err := <-now.done:
				return err
			case <-over:
				return nil
			}
		}, opts...)
	})
	t.Cleanup(func() {
		cancel()
		close(over)
		<-c.result.done
	})
	return c
}

func (c *candidate) leads(t testing.TB) *term {
	t.Helper()
	select {
	case now := <-c.terms:
		return now
	case <-c.result.done:
		require.Fail(t, "Lead has returned", c.result.err)
	case <-time.After(patience):
		require.Fail(t, "does not lead")
	}
	return nil
}

func (c *candidate) returns(t testing.TB) error {
	t.Helper()
	within(t, patience, c.result.done, "Lead returns")
	return c.result.err
}

func (now *term) lock(t testing.TB) *Lock {
	t.Helper()
	lock, ok := LockFrom(now.ctx)
	require.True(t, ok)
	return lock
}

func TestLeadReturnsWhatFnReturnsAndReleases(t *testing.T) {
	t.Parallel()
	client := testCluster.Client(t)
	for _, result := range []error{nil, errors.New("tired"), fmt.Errorf("of another lock: %w", ErrLockLost)} {
		c := campaign(t, client, nameOf(t))
		c.leads(t).done <- result
		require.Equal(t, result, c.returns(t))
		require.Empty(t, keys(t, client, nameOf(t)))
	}
}

func TestLeadCampaignsAgainAfterEachLossWhateverFnReturns(t *testing.T) {
	t.Parallel()
	client := testCluster.Client(t)
	c := campaign(t, client, nameOf(t))
	for _, result := range []error{nil, errors.New("failed"), context.Canceled} {
		now := c.leads(t)
		lock := now.lock(t)
		if result == nil {
			mustDelete(t, client, lock.Key())
		} else {
			_, err := client.Revoke(t.Context(), lock.Lease().ID())
			require.NoError(t, err)
		}
		within(t, 5*time.Second, now.ctx.Done(), "the leader is notified")
		require.ErrorIs(t, context.Cause(now.ctx), ErrLockLost)
		now.done <- result
	}
	c.leads(t).done <- nil
	require.NoError(t, c.returns(t))
}

func TestLeadPausesWhereItsKeyIsDeletedAgainAndAgain(t *testing.T) {
	t.Parallel()
	client := testCluster.Client(t)
	policy := RetryPolicy{Initial: 400 * time.Millisecond, Max: 400 * time.Millisecond}
	c := campaign(t, client, nameOf(t), WithRetryPolicy(policy))
	began := time.Now()
	const losses = 12
	for range losses {
		now := c.leads(t)
		mustDelete(t, client, now.lock(t).Key())
		within(t, 5*time.Second, now.ctx.Done(), "the leader is notified")
		now.done <- nil
	}
	c.leads(t).done <- nil
	require.NoError(t, c.returns(t))
	require.Greater(t, time.Since(began), losses*policy.Max/8, "full jitter: half of it on average")
}

func TestLeadsNeverOverlap(t *testing.T) {
	t.Parallel()
	name := nameOf(t)
	link := etcdtest.StartLink(t, testCluster.Endpoints()[0])
	cut := campaign(t, newClient(t, link.Endpoint()), name, WithTTL(2*time.Second))
	first := cut.leads(t)
	second := campaign(t, testCluster.Client(t), name)
	waiters(t, testCluster.Client(t), name, 2)
	link.Cut()
	next := second.leads(t)
	require.Error(t, first.ctx.Err(), "its context ended before another led")
	require.ErrorIs(t, context.Cause(first.ctx), ErrLeaseExpired)
	first.done <- nil
	time.Sleep(time.Second) // of the campaign against a black hole
	link.Heal()
	next.done <- nil
	require.NoError(t, second.returns(t))
	cut.leads(t).done <- nil
	require.NoError(t, cut.returns(t))
}

func TestLeaderThatResignsIsFollowedAtOnce(t *testing.T) {
	t.Parallel()
	client := testCluster.Client(t)
	first := campaign(t, client, nameOf(t))
	now := first.leads(t)
	second := campaign(t, testCluster.Client(t), nameOf(t))
	waiters(t, client, nameOf(t), 2)
	next := start(func() (*term, error) { return second.leads(t), nil })
	now.done <- nil
	within(t, time.Second, next.done, "the next one leads")
	require.NoError(t, first.returns(t))
	next.v.done <- nil
}

func TestLeaderThatCrashesIsFollowedWhenItsLeaseHasExpired(t *testing.T) {
	t.Parallel()
	client := testCluster.Client(t)
	link := etcdtest.StartLink(t, testCluster.Endpoints()[0])
	crashed := mustAcquire(t, newClient(t, link.Endpoint()), nameOf(t), WithTTL(2*time.Second))
	c := campaign(t, client, nameOf(t))
	waiters(t, client, nameOf(t), 2)
	link.Cut()
	began := time.Now()
	next := c.leads(t)
	require.Less(t, time.Since(began), crashed.Lease().TTL()+3*time.Second, "etcd looks for expired leases twice a second")
	next.done <- nil
}

func TestLeadOutlivesAnEtcdThatIsGone(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 1)
	client := cluster.Client(t)
	c := campaign(t, client, nameOf(t), WithTTL(2*time.Second))
	now := c.leads(t)
	waiting := campaign(t, client, nameOf(t), WithTTL(2*time.Second))
	waiters(t, client, nameOf(t), 2)
	require.NoError(t, cluster.Stop(0))
	within(t, 5*time.Second, now.ctx.Done(), "the leader is notified")
	now.done <- nil
	time.Sleep(3 * time.Second) // longer than the waiter's lease
	require.NoError(t, cluster.Restart(0))
	for range 2 {
		select {
		case now := <-c.terms:
			now.done <- nil
		case now := <-waiting.terms:
			now.done <- nil
		case <-time.After(patience):
			require.Fail(t, "nobody leads")
		}
	}
	require.NoError(t, c.returns(t))
	require.NoError(t, waiting.returns(t))
}

func TestLeadOutlivesARestore(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 1)
	client := cluster.Client(t)
	require.NoError(t, cluster.Backup())
	c := campaign(t, client, nameOf(t), WithTTL(2*time.Second))
	now := c.leads(t)
	require.NoError(t, cluster.Restore())
	within(t, 10*time.Second, now.ctx.Done(), "the leader is notified")
	now.done <- errors.New("lost")
	c.leads(t).done <- nil
	require.NoError(t, c.returns(t))
}

func TestLeadOutlivesAnEtcdWithoutSpace(t *testing.T) {
	t.Parallel()
	var refused sync.Once
	full := make(chan struct{})
	client := interceptedClient(t, func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		err := invoker(ctx, method, req, reply, cc, opts...)
		if strings.HasSuffix(method, "/LeaseGrant") {
			refused.Do(func() {
				err = rpctypes.ErrGRPCNoSpace
				close(full)
			})
		}
		return err
	})
	c := campaign(t, client, nameOf(t))
	c.leads(t).done <- nil
	require.NoError(t, c.returns(t))
	within(t, 0, full, "a request was refused")
}

func TestLeadReturnsWhatCannotBeRetried(t *testing.T) {
	t.Parallel()
	client := testCluster.Client(t)
	never := func(context.Context) error { panic("leads") }

	t.Run("a bad argument", func(t *testing.T) {
		t.Parallel()
		require.ErrorIs(t, Lead(t.Context(), client, "", never), ErrInvalidName)
		require.ErrorContains(t, Lead(t.Context(), client, "l", never, WithTTL(-1)), "WithTTL")
		require.ErrorContains(t, Lead(t.Context(), client, "l", never, WithRetryPolicy(RetryPolicy{Max: -1})), "RetryPolicy.Max")
		require.PanicsWithValue(t, "etcdutil: nil fn", func() { _ = Lead(t.Context(), client, "l", nil) })
		require.PanicsWithValue(t, "etcdutil: nil client", func() { _ = Lead(t.Context(), nil, "l", never) })
	})
	t.Run("a refused permission", func(t *testing.T) {
		t.Parallel()
		cluster, _ := authCluster(t, 300)
		err := Lead(t.Context(), userClient(t, "user", nil, cluster.Endpoints()...), "denied", never)
		require.ErrorIs(t, err, rpctypes.ErrPermissionDenied)
	})
	t.Run("a lock of the same name", func(t *testing.T) {
		t.Parallel()
		lock := mustAcquire(t, client, nameOf(t))
		ctx, cancel := context.WithTimeout(lock, time.Second)
		defer cancel()
		require.Error(t, Lead(ctx, client, nameOf(t), never))
	})
	t.Run("the end of its lease while it leads", func(t *testing.T) {
		t.Parallel()
		lease := mustLease(t, client, 10*time.Second)
		c := campaign(t, client, nameOf(t), WithLease(lease))
		now := c.leads(t)
		require.NoError(t, lease.Close())
		now.done <- nil
		require.ErrorIs(t, c.returns(t), ErrClosed)
	})
	t.Run("the end of its lease while it waits", func(t *testing.T) {
		t.Parallel()
		mustAcquire(t, client, nameOf(t))
		lease := mustLease(t, client, 10*time.Second)
		c := campaign(t, client, nameOf(t), WithLease(lease))
		waiters(t, client, nameOf(t), 2)
		require.NoError(t, lease.Close())
		require.ErrorIs(t, c.returns(t), ErrClosed)
	})
	t.Run("a closed client", func(t *testing.T) {
		t.Parallel()
		closed := newClient(t, testCluster.Endpoints()...)
		require.NoError(t, closed.Close())
		require.Error(t, Lead(t.Context(), closed, nameOf(t), never))
	})
}

func TestLeadWithALeaseCampaignsAgainWhereOnlyItsKeyIsGone(t *testing.T) {
	t.Parallel()
	client := testCluster.Client(t)
	lease := mustLease(t, client, 10*time.Second)
	c := campaign(t, client, nameOf(t), WithLease(lease))
	now := c.leads(t)
	mustDelete(t, client, now.lock(t).Key())
	within(t, 5*time.Second, now.ctx.Done(), "the leader is notified")
	now.done <- nil
	c.leads(t).done <- nil
	require.NoError(t, c.returns(t))
	require.NoError(t, lease.Err())
}

func TestLeadEndsWithItsContext(t *testing.T) {
	t.Parallel()
	client := testCluster.Client(t)
	t.Run("while it leads", func(t *testing.T) {
		t.Parallel()
		c := campaign(t, client, nameOf(t))
		now := c.leads(t)
		c.cancel()
		within(t, time.Second, now.ctx.Done(), "fn's context ends")
		now.done <- now.ctx.Err()
		require.ErrorIs(t, c.returns(t), context.Canceled)
		require.Empty(t, keys(t, client, nameOf(t)))
	})
	t.Run("while it waits", func(t *testing.T) {
		t.Parallel()
		mustAcquire(t, client, nameOf(t))
		c := campaign(t, client, nameOf(t))
		waiters(t, client, nameOf(t), 2)
		c.cancel()
		within(t, 100*time.Millisecond, c.result.done, "Lead returns")
		require.ErrorIs(t, c.result.err, context.Canceled)
	})
	t.Run("while etcd is unreachable", func(t *testing.T) {
		t.Parallel()
		client, link := linkedClient(t)
		link.Cut()
		c := campaign(t, client, nameOf(t))
		time.Sleep(50 * time.Millisecond)
		c.cancel()
		within(t, 100*time.Millisecond, c.result.done, "Lead returns")
		require.ErrorIs(t, c.result.err, context.Canceled)
	})
}

func TestLeadMindsItsAcquireTimeoutThroughAnOutage(t *testing.T) {
	t.Parallel()
	client, link := linkedClient(t)
	link.Cut()
	c := campaign(t, client, nameOf(t), WithAcquireTimeout(700*time.Millisecond), WithRetryPolicy(RetryPolicy{AttemptTimeout: 100 * time.Millisecond}))
	began := time.Now()
	require.ErrorIs(t, c.returns(t), context.DeadlineExceeded)
	require.GreaterOrEqual(t, time.Since(began), 700*time.Millisecond)
	require.Less(t, time.Since(began), 1700*time.Millisecond)
}

func TestLeadGivesUpOnlyAsItsOwnPolicySays(t *testing.T) {
	t.Parallel()
	client, link := linkedClient(t)
	link.Cut()
	c := campaign(t, client, nameOf(t), WithRetryPolicy(RetryPolicy{Elapsed: 300 * time.Millisecond}))
	require.Error(t, c.returns(t))

	gaveUp := fmt.Errorf("gave up: %w", context.DeadlineExceeded)
	for _, test := range []struct {
		policy RetryPolicy
		again  bool
	}{
		{RetryPolicy{}, true},
		{RetryPolicy{Initial: time.Second}, true},
		{RetryPolicy{Elapsed: time.Minute}, false},
		{RetryPolicy{Attempts: 3}, false},
	} {
		config, err := newLockConfig(t.Context(), client, "l", []LockOption{WithRetryPolicy(test.policy)})
		require.NoError(t, err)
		require.Equal(t, test.again, config.canCampaign(t.Context(), time.Now(), gaveUp), test.policy)
	}

	// A request that gave up is not the end of a longer wait.
	config, err := newLockConfig(t.Context(), client, "l", []LockOption{WithAcquireTimeout(time.Minute)})
	require.NoError(t, err)
	require.True(t, config.canCampaign(t.Context(), time.Now().Add(-31*time.Second), gaveUp))
	require.False(t, config.canCampaign(t.Context(), time.Now().Add(-time.Minute), gaveUp))
}

func TestLeadReleasesAfterAPanic(t *testing.T) {
	t.Parallel()
	client := testCluster.Client(t)
	require.PanicsWithValue(t, "fn", func() {
		_ = Lead(t.Context(), client, nameOf(t), func(context.Context) error { panic("fn") })
	})
	require.Empty(t, keys(t, client, nameOf(t)))
}

// stray writes keys below a name, count of them, of a size.
func writeStrays(t testing.TB, client *clientv3.Client, format string, count, size int) {
	t.Helper()
	value := strings.Repeat("x", size)
	for from := 0; from < count; from += 50 {
		var ops []clientv3.Op
		for i := from; i < min(from+50, count); i++ {
			ops = append(ops, clientv3.OpPut(fmt.Sprintf(format, i), value))
		}
		mustTxn(t, client, ops...)
	}
}

func TestHolderIsTheOldestContender(t *testing.T) {
	t.Parallel()
	client, name := testCluster.Client(t), nameOf(t)
	requireNone := func() {
		t.Helper()
		_, err := Holder(t.Context(), client, name)
		require.ErrorIs(t, err, ErrNoHolder)
		require.ErrorContains(t, err, name)
	}
	requireNone()
	mustPut(t, client, name+"/stray", "no lease")
	other := mustAcquire(t, client, name+"/sub", WithValue("of another lock"))
	requireNone()

	lock := mustAcquire(t, client, name, WithValue("node-7"))
	waiting := start(func() (*Lock, error) { return Acquire(context.Background(), client, name, WithValue("waits")) })
	eventually(t, func() bool { return len(keys(t, client, name)) == 4 }, "a waiter")
	holder, err := Holder(t.Context(), client, name)
	require.NoError(t, err)
	require.Equal(t, Contender{Name: name, Key: lock.Key(), Value: "node-7", Token: lock.Token(), Lease: lock.Lease().ID()}, holder)

	require.NoError(t, lock.Close())
	within(t, patience, waiting.done, "the waiter holds")
	holder, err = Holder(t.Context(), client, name)
	require.NoError(t, err)
	require.Equal(t, "waits", holder.Value)
	require.NoError(t, waiting.v.Close())
	requireNone()
	require.NoError(t, other.Err())
}

func TestHolderIsFoundBehindManyLargeStraysThatAreNotRead(t *testing.T) {
	t.Parallel()
	name := nameOf(t)
	writeStrays(t, testCluster.Client(t), name+"/%d", 250, 20_000)
	writeStrays(t, testCluster.Client(t), name+"/sub/%d", 250, 20_000)
	client := newClientWith(t, grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(100_000)))
	_, err := Holder(t.Context(), client, name)
	require.ErrorIs(t, err, ErrNoHolder)
	lock := mustAcquire(t, testCluster.Client(t), name, WithValue("held"))
	holder, err := Holder(t.Context(), client, name)
	require.NoError(t, err)
	require.Equal(t, "held", holder.Value)
	require.Equal(t, lock.Token(), holder.Token)
}

func TestHolderOfAThousandCandidatesCostsTwoRequests(t *testing.T) {
	t.Parallel()
	name := nameOf(t)
	writer := testCluster.Client(t)
	lease := mustLease(t, writer, time.Minute)
	for from := range 10 {
		var ops []clientv3.Op
		for i := range 100 {
			ops = append(ops, clientv3.OpPut(fmt.Sprintf("%s/%d-%d", name, from, i), fmt.Sprint(from), clientv3.WithLease(lease.ID())))
		}
		mustTxn(t, writer, ops...)
	}
	client, requests := countingClient(t)
	holder, err := Holder(t.Context(), client, name)
	require.NoError(t, err)
	require.Equal(t, "0", holder.Value)
	require.EqualValues(t, 2, requests.Load())
}

func TestHolderIsTheLeaderOfAnElection(t *testing.T) {
	t.Parallel()
	client, name := testCluster.Client(t), nameOf(t)
	session, err := concurrency.NewSession(client)
	require.NoError(t, err)
	t.Cleanup(func() { _ = session.Close() })
	election := concurrency.NewElection(session, name)
	require.NoError(t, election.Campaign(t.Context(), "theirs"))
	holder, err := Holder(t.Context(), client, name)
	require.NoError(t, err)
	require.Equal(t, Contender{Name: name, Key: election.Key(), Value: "theirs", Token: election.Rev(), Lease: session.Lease()}, holder)

	c := campaign(t, client, name, WithValue("ours"))
	waiters(t, client, name, 2)
	observed := election.Observe(t.Context())
	require.Equal(t, "theirs", string((<-observed).Kvs[0].Value))
	require.NoError(t, election.Resign(t.Context()))
	now := c.leads(t)
	require.Equal(t, "ours", string((<-observed).Kvs[0].Value), "Observe sees ours")
	leader, err := election.Leader(t.Context())
	require.NoError(t, err)
	require.Equal(t, now.lock(t).Key(), string(leader.Kvs[0].Key))

	campaigning := start(func() (struct{}, error) { return struct{}{}, election.Campaign(context.Background(), "again") })
	waiters(t, client, name, 2)
	now.done <- nil
	within(t, 5*time.Second, campaigning.done, "they lead again")
	require.NoError(t, campaigning.err)
}

func TestHolderRefusesBadArguments(t *testing.T) {
	t.Parallel()
	client, requests := countingClient(t)
	_, err := Holder(t.Context(), client, "")
	require.ErrorIs(t, err, ErrInvalidName)
	_, err = Holder(t.Context(), client, "l", WithRetryPolicy(RetryPolicy{Attempts: -1}))
	require.ErrorContains(t, err, "RetryPolicy.Attempts")
	require.PanicsWithValue(t, "etcdutil: nil ctx", func() { _, _ = Holder(noContext, client, "l") })
	require.Zero(t, requests.Load())
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = Holder(ctx, client, "l")
	require.ErrorIs(t, err, context.Canceled)
}

func TestHolderIsNoneOnlyIfNobodyHeldItMeanwhile(t *testing.T) {
	t.Parallel()
	name, writer := nameOf(t), testCluster.Client(t)
	lock := mustAcquire(t, writer, name)
	var once sync.Once
	client := interceptedClient(t, func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		if strings.HasSuffix(method, "/Txn") {
			once.Do(func() { // between the read of the keys and that of the oldest one
				next := start(func() (*Lock, error) { return Acquire(context.Background(), writer, name, WithValue("next")) })
				waiters(t, writer, name, 2)
				require.NoError(t, lock.Close())
				<-next.done
				t.Cleanup(func() { _ = next.v.Close() })
			})
		}
		return invoker(ctx, method, req, reply, cc, opts...)
	})
	holder, err := Holder(t.Context(), client, name)
	require.NoError(t, err)
	require.Equal(t, "next", holder.Value)
}

func TestHolderIsFoundWhereHoldersFollowFasterThanItReads(t *testing.T) {
	t.Parallel()
	name, writer := nameOf(t), testCluster.Client(t)
	lease := mustLease(t, writer, time.Minute)
	writeStrays(t, writer, name+"/stray-%d", 20, 1)
	key := func(i int64) string { return fmt.Sprintf("%s/%d", name, i) }
	mustPutLeased(t, writer, key(0), lease)
	var terms int64
	var turn sync.Mutex
	client := interceptedClient(t, func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		if strings.HasSuffix(method, "/Txn") { // there is another holder before each of them
			turn.Lock()
			defer turn.Unlock()
			if ctx.Err() != nil { // a busy machine was too late, and asks again
				return ctx.Err()
			}
			terms++
			mustPutLeased(t, writer, key(terms), lease)
			mustDelete(t, writer, key(terms-1))
		}
		return invoker(ctx, method, req, reply, cc, opts...)
	})
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	holder, err := Holder(ctx, client, name)
	require.NoError(t, err)
	turn.Lock()
	require.Equal(t, key(terms), holder.Key)
	turn.Unlock()
	w, err := WatchHolder(ctx, client, name)
	require.NoError(t, err)
	require.Equal(t, EventPut, (<-w.Events()).Type)
	cancel()
	require.ErrorIs(t, w.Close(), nil)
}
