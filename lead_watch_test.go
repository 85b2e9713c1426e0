package etcdutil

import (
	"context"
	"fmt"
	"testing"
	"time"

	"example.com/etcdutil/etcdtest"
	"github.com/stretchr/testify/require"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
)

func mustWatchHolder(t testing.TB, client *clientv3.Client, name string, opts ...WatchOption) *Watcher[Contender] {
	t.Helper()
	w, err := WatchHolder(context.Background(), client, name, opts...)
	require.NoError(t, err)
	t.Cleanup(func() { _ = w.Close() })
	return w
}

func requireHolder(t testing.TB, w *Watcher[Contender], lock *Lock, value string) Event[Contender] {
	t.Helper()
	e := next(t, w)
	require.Equal(t, EventPut, e.Type, e)
	require.Equal(t, lock.Key(), e.Key)
	require.Equal(t, Contender{Name: lock.Name(), Key: lock.Key(), Value: value, Token: lock.Token(), Lease: lock.Lease().ID()}, e.Value)
	require.GreaterOrEqual(t, e.Revision, lock.Token())
	return e
}

func requireVacant(t testing.TB, w *Watcher[Contender], key string) Event[Contender] {
	t.Helper()
	e := next(t, w)
	require.Equal(t, EventDelete, e.Type, e)
	require.Equal(t, key, e.Key)
	return e
}

func requireSynced(t testing.TB, w *Watcher[Contender]) {
	t.Helper()
	e := next(t, w)
	require.Equal(t, EventSynced, e.Type, e)
	require.Equal(t, e.Revision, w.Revision())
}

func TestWatchHolderFollowsWhoHolds(t *testing.T) {
	t.Parallel()
	client, name := testCluster.Client(t), nameOf(t)
	w := mustWatchHolder(t, client, name, WithPrev())
	requireSynced(t, w)

	mustPut(t, client, name+"/stray", "no lease")
	other := mustAcquire(t, client, name+"/sub")
	first := mustAcquire(t, client, name, WithValue("first"))
	e := requireHolder(t, w, first, "first")
	require.Nil(t, e.Prev)
	require.Equal(t, e.Revision, w.Revision())

	waiting := start(func() (*Lock, error) { return Acquire(context.Background(), client, name, WithValue("second")) })
	waiters(t, client, name, 4)
	_, err := first.Commit(t.Context(), clientv3.OpPut(name+"/stray", "committed"))
	require.NoError(t, err)
	require.NoError(t, other.Close())
	require.NoError(t, first.Close())
	within(t, patience, waiting.done, "the waiter holds")
	e = requireHolder(t, w, waiting.v, "second")
	require.Equal(t, "first", e.Prev.Value)

	require.NoError(t, waiting.v.Close())
	e = requireVacant(t, w, waiting.v.Key())
	require.Equal(t, "second", e.Prev.Value)
	require.Zero(t, e.Value)

	late := mustWatchHolder(t, client, name)
	requireSynced(t, late)
	third := mustAcquire(t, client, name)
	requireHolder(t, w, third, "")
	requireHolder(t, late, third, "")
	later := mustWatchHolder(t, client, name)
	requireHolder(t, later, third, "")
	requireSynced(t, later)
}

func TestWatchHolderSendsAVacancyWithin1s(t *testing.T) {
	t.Parallel()
	client := testCluster.Client(t)
	w := mustWatchHolder(t, client, nameOf(t))
	requireSynced(t, w)
	for range 5 {
		lock := mustAcquire(t, client, nameOf(t))
		requireHolder(t, w, lock, "")
		vacant := start(func() (Event[Contender], error) { return <-w.Events(), nil })
		mustDelete(t, client, lock.Key())
		within(t, time.Second, vacant.done, "the vacancy")
		require.Equal(t, EventDelete, vacant.v.Type)
	}
}

func TestWatchHolderOfAKeyThatLostItsLeaseIsVacant(t *testing.T) {
	t.Parallel()
	client := testCluster.Client(t)
	w := mustWatchHolder(t, client, nameOf(t))
	requireSynced(t, w)
	lock := mustAcquire(t, client, nameOf(t))
	requireHolder(t, w, lock, "")
	mustPut(t, client, lock.Key(), "by somebody else")
	requireVacant(t, w, lock.Key())
	mustDelete(t, client, lock.Key())
	lock = mustAcquire(t, client, nameOf(t))
	requireHolder(t, w, lock, "")
}

func TestWatchHolderFollowsElections(t *testing.T) {
	t.Parallel()
	client, name := testCluster.Client(t), nameOf(t)
	session, err := concurrency.NewSession(client)
	require.NoError(t, err)
	t.Cleanup(func() { _ = session.Close() })
	election := concurrency.NewElection(session, name)
	w := mustWatchHolder(t, client, name)
	requireSynced(t, w)
	require.NoError(t, election.Campaign(t.Context(), "one"))
	e := next(t, w)
	require.Equal(t, Contender{Name: name, Key: election.Key(), Value: "one", Token: election.Rev(), Lease: session.Lease()}, e.Value)
	require.NoError(t, election.Proclaim(t.Context(), "two"))
	e = next(t, w)
	require.Equal(t, EventPut, e.Type)
	require.Equal(t, "two", e.Value.Value)
	require.Equal(t, election.Rev(), e.Value.Token)
	key := election.Key()
	require.NoError(t, election.Resign(t.Context()))
	requireVacant(t, w, key)
}

func TestWatchHolderIsBoundedWithAThousandCandidates(t *testing.T) {
	t.Parallel()
	name, writer := nameOf(t), testCluster.Client(t)
	lease := mustLease(t, writer, time.Minute)
	for i := range 1000 {
		mustPutLeased(t, writer, fmt.Sprintf("%s/%04d", name, i), lease)
	}
	writeStrays(t, writer, name+"/sub/%d", 100, 10_000)
	client, requests := countingClient(t)
	w := mustWatchHolder(t, client, name)
	require.Equal(t, name+"/0000", next(t, w).Key)
	requireSynced(t, w)
	before := requests.Load()
	const handOvers = 20
	for i := range handOvers {
		mustDelete(t, writer, fmt.Sprintf("%s/%04d", name, 999-i)) // a waiter gives up
		mustDelete(t, writer, fmt.Sprintf("%s/%04d", name, i))
		require.Equal(t, fmt.Sprintf("%s/%04d", name, i+1), next(t, w).Key)
	}
	require.LessOrEqual(t, requests.Load()-before, int64(5*handOvers), "requests")
}

func mustPutLeased(t testing.TB, client *clientv3.Client, key string, lease *Lease) {
	t.Helper()
	_, err := client.Put(context.Background(), key, "", clientv3.WithLease(lease.ID()))
	require.NoError(t, err)
}

func TestWatchHolderOutlivesCompactionWhileItIsCutOff(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 1)
	writer := cluster.Client(t)
	client, link := linkedTo(t, cluster)
	for _, vacantBefore := range []bool{false, true} {
		name := fmt.Sprintf("%s-%t", nameOf(t), vacantBefore)
		w := mustWatchHolder(t, client, name)
		requireSynced(t, w)
		var first *Lock
		if !vacantBefore {
			first = mustAcquire(t, writer, name)
			requireHolder(t, w, first, "")
		}
		link.Cut()
		if first != nil {
			require.NoError(t, first.Close())
		}
		second := mustAcquire(t, writer, name)
		mustCompact(t, writer, mustPut(t, writer, "other", ""))
		link.Reset()
		link.Heal()
		requireHolder(t, w, second, "")
		require.Equal(t, EventSynced, next(t, w).Type)
		require.NoError(t, second.Close())
		requireVacant(t, w, second.Key())
	}
}

func TestWatchHolderOutlivesARestore(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 1)
	client := cluster.Client(t)
	name := nameOf(t)
	w := mustWatchHolder(t, client, name)
	requireSynced(t, w)
	require.NoError(t, cluster.Backup())
	lock := mustAcquire(t, client, name, WithTTL(2*time.Second))
	requireHolder(t, w, lock, "")
	require.NoError(t, cluster.Restore())
	e := next(t, w)
	// The first look found the lock, since etcd was stopped for the backup.
	if e.Type == EventSynced {
		e = next(t, w)
	}
	require.Equal(t, EventDelete, e.Type)
	requireSynced(t, w)
	after := mustAcquire(t, client, name)
	requireHolder(t, w, after, "")
}

// The watch is opened anew only when the reader comes on. Then it stands at once, and its revision
// is one that the new history has too.
func TestWatchHolderOutlivesARestoreWhileItsReaderIsBehind(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 1)
	client := cluster.Client(t)
	lease := mustLease(t, client, time.Minute)
	mustPutLeased(t, client, "l/restored", lease)
	require.NoError(t, cluster.Backup())
	mustDelete(t, client, "l/restored")
	mustPutLeased(t, client, "l/a", lease)
	w := mustWatchHolder(t, client, "l")
	require.Equal(t, "l/a", next(t, w).Key)
	requireSynced(t, w)
	_, err := client.Put(t.Context(), "l/a", "in hand", clientv3.WithLease(lease.ID()))
	require.NoError(t, err)
	mustDelete(t, client, "l/a")
	eventually(t, func() bool { return w.queue.untilTaken() != nil }, "the feed waits for the reader")
	require.NoError(t, cluster.Restore())
	for range 30 {
		mustPut(t, cluster.Client(t), "other", "")
	}
	time.Sleep(restoreTime)
	require.Equal(t, "in hand", next(t, w).Value.Value)
	requireVacant(t, w, "l/a")
	e := next(t, w)
	for e.Type == EventSynced {
		e = next(t, w)
	}
	require.Equal(t, EventPut, e.Type)
	require.Equal(t, "l/restored", e.Key)
}

func TestWatchHolderOutlivesAnOutage(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 1)
	client := cluster.Client(t)
	lease := mustLease(t, client, time.Minute)
	mustPutLeased(t, client, "l/a", lease)
	w := mustWatchHolder(t, client, "l")
	require.Equal(t, "l/a", next(t, w).Key)
	requireSynced(t, w)
	require.NoError(t, cluster.Stop(0))
	time.Sleep(2 * time.Second)
	require.NoError(t, cluster.Restart(0))
	mustDelete(t, client, "l/a")
	requireVacant(t, w, "l/a")
}

func TestWatchHolderEndsWithoutPermission(t *testing.T) {
	t.Parallel()
	cluster, root := authCluster(t, 300)
	client := userClient(t, "user", nil, cluster.Endpoints()...)
	_, err := WatchHolder(t.Context(), client, "denied")
	require.ErrorIs(t, err, rpctypes.ErrPermissionDenied)
	require.ErrorContains(t, err, "denied")

	w := mustWatchHolder(t, client, "allowed/l")
	requireSynced(t, w)
	_, err = root.RoleRevokePermission(context.Background(), "user", "allowed/", "allowed0")
	require.NoError(t, err)
	lock := mustAcquire(t, root, "allowed/l") // a watch that stands goes on, but not the next one
	if e, open := <-w.Events(); open {
		require.Equal(t, lock.Key(), e.Key)
	}
	_, cause := ends(t, w)
	require.ErrorIs(t, cause, rpctypes.ErrPermissionDenied)
	require.ErrorIs(t, w.Close(), rpctypes.ErrPermissionDenied)
}

func TestWatchHolderRefusesWhatMakesNoSense(t *testing.T) {
	t.Parallel()
	client, requests := countingClient(t)
	for _, test := range []struct {
		option WatchOption
		want   string
	}{
		{WithPrefix(), "WithPrefix"},
		{WithRevision(7), "WithRevision"},
		{WithRevision(-7), "WithRevision"},
		{WithCodec(Raw), "WithCodec"},
		{WithRetryPolicy(RetryPolicy{Attempts: -1}), "RetryPolicy.Attempts"},
	} {
		_, err := WatchHolder(t.Context(), client, "l", test.option)
		require.ErrorContains(t, err, test.want)
	}
	_, err := WatchHolder(t.Context(), client, "")
	require.ErrorIs(t, err, ErrInvalidName)
	require.Zero(t, requests.Load())
	w := mustWatchHolder(t, client, nameOf(t), WithSnapshot())
	requireSynced(t, w)
}

func TestWatchHolderGivesUpAsItsPolicySaysAndClosesWhileEtcdIsGone(t *testing.T) {
	t.Parallel()
	client, link := linkedClient(t)
	w := mustWatchHolder(t, client, nameOf(t))
	requireSynced(t, w)
	link.Cut()
	_, err := WatchHolder(t.Context(), client, nameOf(t), WithRetryPolicy(RetryPolicy{Elapsed: 200 * time.Millisecond}))
	require.Error(t, err)
	closed := start(func() (struct{}, error) { return struct{}{}, w.Close() })
	within(t, 2*time.Second, closed.done, "Close")
	require.NoError(t, closed.err)
	require.ErrorIs(t, context.Cause(w), ErrClosed)
	_, open := <-w.Events()
	require.False(t, open)
}

func TestWatchHolderSendsNoWaiterWhileManyTakeTurns(t *testing.T) {
	t.Parallel()
	client, name := testCluster.Client(t), nameOf(t)
	w := mustWatchHolder(t, client, name)
	requireSynced(t, w)
	held := make(chan Revision, 1000)
	done := start(func() (struct{}, error) {
		results := make(chan error)
		for i := range 8 {
			go func() {
				for range 10 {
					err := Do(context.Background(), client, name, func(ctx context.Context) error {
						lock, _ := LockFrom(ctx)
						held <- lock.Token()
						return nil
					}, WithValue(fmt.Sprint(i)))
					if err != nil {
						results <- err
						return
					}
				}
				results <- nil
			}()
		}
		var failed error
		for range 8 {
			if err := <-results; err != nil {
				failed = err
			}
		}
		return struct{}{}, failed
	})
	within(t, patience, done.done, "all had their turns")
	require.NoError(t, done.err)
	close(held)
	holders := map[Revision]bool{}
	for token := range held {
		holders[token] = true
	}
	last := mustAcquire(t, client, name, WithValue("last"))
	for before := Revision(0); ; {
		e := next(t, w)
		require.GreaterOrEqual(t, e.Revision, before)
		before = e.Revision
		if e.Value.Token == last.Token() {
			break
		}
		require.True(t, e.Type == EventDelete || holders[e.Value.Token], "a waiter: %v", e)
	}
}
