package etcdutil

import (
	"context"
	"fmt"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"example.com/etcdutil/etcdtest"
	"github.com/stretchr/testify/require"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
)

// A recorder is an Observer that keeps what it was called with.
type recorder struct {
	mu     sync.Mutex
	events []observed
}

// observed is an event, with the name of the Observer's func.
type observed struct {
	what  string
	event any
}

func (r *recorder) record(what string, event any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.events = append(r.events, observed{what, event})
}

func (r *recorder) observer() Observer {
	return Observer{
		Acquired: func(e LockEvent) { r.record("acquired", e) },
		Released: func(e LockEvent) { r.record("released", e) },
		Lost:     func(e LockEvent) { r.record("lost", e) },
		Renewed:  func(e LeaseEvent) { r.record("renewed", e) },
		Retrying: func(e RetryEvent) { r.record("retrying", e) },
		Resynced: func(e WatchEvent) { r.record("resynced", e) },
	}
}

// all returns the events so far of one kind, or of all if what is empty.
func (r *recorder) all(what string) (events []observed) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, e := range r.events {
		if what == "" || e.what == what {
			events = append(events, e)
		}
	}
	return events
}

// waitFor waits for the first event of a kind.
func waitFor[E any](t testing.TB, r *recorder, what string) E {
	t.Helper()
	eventually(t, func() bool { return len(r.all(what)) > 0 }, what)
	return r.all(what)[0].event.(E)
}

func TestObserverSeesALocksLife(t *testing.T) {
	t.Parallel()
	client, name := testCluster.Client(t), nameOf(t)
	first := mustAcquire(t, client, name)
	var r recorder
	waiting := start(func() (*Lock, error) { return Acquire(context.Background(), client, name, WithObserver(r.observer())) })
	waiters(t, client, name, 2)
	time.Sleep(50 * time.Millisecond)
	require.Empty(t, r.all(""))
	require.NoError(t, first.Close())
	within(t, patience, waiting.done, "the waiter holds")
	require.NoError(t, waiting.err)
	lock := waiting.v
	time.Sleep(50 * time.Millisecond)
	require.NoError(t, lock.Close())
	require.NoError(t, lock.Close())

	released := waitFor[LockEvent](t, &r, "released")
	acquired := waitFor[LockEvent](t, &r, "acquired")
	require.Equal(t, LockEvent{Name: name, Token: lock.Token(), Took: acquired.Took}, acquired)
	require.Equal(t, LockEvent{Name: name, Token: lock.Token(), Took: released.Took}, released)
	require.GreaterOrEqual(t, acquired.Took, 50*time.Millisecond)
	require.GreaterOrEqual(t, released.Took, 50*time.Millisecond)
	require.Equal(t, []observed{{"acquired", acquired}, {"released", released}}, r.all(""), "each once, in order")
}

func TestObserverSeesALossWithItsCauseAndNoRelease(t *testing.T) {
	t.Parallel()
	client := testCluster.Client(t)
	for name, lose := range map[string]func(lock *Lock){
		"deleted": func(lock *Lock) { mustDelete(t, client, lock.Key()) },
		"revoked": func(lock *Lock) { _, _ = client.Revoke(context.Background(), lock.Lease().ID()) },
	} {
		var r recorder
		lock := mustAcquire(t, client, nameOf(t)+name, WithObserver(r.observer()), WithTTL(2*time.Second))
		lose(lock)
		lost := waitFor[LockEvent](t, &r, "lost")
		require.ErrorIs(t, lost.Err, ErrLockLost)
		require.Equal(t, lock.Token(), lost.Token)
		require.NotZero(t, lost.Took)
		require.ErrorIs(t, lock.Close(), ErrLockLost)
		require.Len(t, r.all("lost"), 1)
		require.Empty(t, r.all("released"))
	}
}

func TestObserverSeesAReleaseThatIsNotConfirmed(t *testing.T) {
	t.Parallel()
	for _, shared := range []bool{false, true} {
		client, link := linkedClient(t)
		var r recorder
		opts := []LockOption{WithObserver(r.observer()), WithTTL(2 * time.Second)}
		if shared {
			opts = []LockOption{WithObserver(r.observer()), WithLease(mustLease(t, client, 2*time.Second))}
		}
		lock := mustAcquire(t, client, nameOf(t)+strconv.FormatBool(shared), opts...)
		link.Cut()
		require.ErrorIs(t, lock.Close(), ErrUnknownOutcome)
		require.Equal(t, lock.Token(), waitFor[LockEvent](t, &r, "released").Token)
		require.Len(t, r.all("released"), 1)
		require.Empty(t, r.all("lost"))
	}
}

func TestObserverSeesNoWaiterThatGivesUp(t *testing.T) {
	t.Parallel()
	client := testCluster.Client(t)
	mustAcquire(t, client, nameOf(t))
	var r recorder
	_, err := Acquire(t.Context(), client, nameOf(t), WithObserver(r.observer()), WithAcquireTimeout(50*time.Millisecond))
	require.ErrorIs(t, err, context.DeadlineExceeded)
	_, err = TryAcquire(t.Context(), client, nameOf(t), WithObserver(r.observer()))
	require.ErrorIs(t, err, ErrLockHeld)
	require.Empty(t, r.all(""))
}

func TestObserverSeesTheReleaseOfALeasesLocks(t *testing.T) {
	t.Parallel()
	client := testCluster.Client(t)
	var r recorder
	lease := mustLease(t, client, 10*time.Second)
	for i := range 3 {
		mustAcquire(t, client, fmt.Sprint(nameOf(t), i), WithLease(lease), WithObserver(r.observer()))
	}
	require.NoError(t, lease.Close())
	eventually(t, func() bool { return len(r.all("released")) == 3 }, "the releases")
	require.Empty(t, r.all("lost"))
}

func TestObserverSeesRenewals(t *testing.T) {
	t.Parallel()
	var r recorder
	lease := mustLease(t, testCluster.Client(t), 2*time.Second, WithObserver(r.observer()))
	e := waitFor[LeaseEvent](t, &r, "renewed")
	require.Equal(t, lease.ID(), e.Lease)
	require.Positive(t, e.Took)
	require.Positive(t, e.Left)
	require.Less(t, e.Left, lease.TTL())
}

func TestObserverSeesRetriesOfAnOutage(t *testing.T) {
	t.Parallel()
	client, link := linkedClient(t)
	var r recorder
	lease := mustLease(t, client, 2*time.Second, WithObserver(r.observer()))
	waitFor[LeaseEvent](t, &r, "renewed")
	link.Cut()
	eventually(t, func() bool {
		return slices.ContainsFunc(r.all("retrying"), func(e observed) bool { return e.event.(RetryEvent).Op == "renew the lease" })
	}, "a late renewal")
	require.NoError(t, lease.Err(), "before it is lost")

	var acquiring recorder
	_, err := Acquire(t.Context(), client, nameOf(t), WithObserver(acquiring.observer()),
		WithRetryPolicy(RetryPolicy{AttemptTimeout: 50 * time.Millisecond, Initial: time.Millisecond, Attempts: 3}))
	require.Error(t, err)
	eventually(t, func() bool { return len(acquiring.all("retrying")) >= 2 }, "both repetitions")
	for i, e := range acquiring.all("retrying")[:2] {
		require.Equal(t, i+1, e.event.(RetryEvent).Attempt)
		require.NotEmpty(t, e.event.(RetryEvent).Op)
		require.Error(t, e.event.(RetryEvent).Err)
	}
}

func TestObserverOfRetrySeesEachAttemptThatIsRepeated(t *testing.T) {
	t.Parallel()
	var r recorder
	_, err := Retry(t.Context(), failing(3, rpctypes.ErrNoLeader), WithObserver(r.observer()), WithRetryPolicy(RetryPolicy{Initial: 1, Max: 1}))
	require.NoError(t, err)
	eventually(t, func() bool { return len(r.all("retrying")) == 3 }, "the repetitions")
	require.Equal(t, 3, r.all("retrying")[2].event.(RetryEvent).Attempt)
	require.ErrorIs(t, r.all("retrying")[2].event.(RetryEvent).Err, rpctypes.ErrNoLeader)
}

func TestObserverSeesOperationsWithoutIDs(t *testing.T) {
	t.Parallel()
	client, link := linkedClient(t)
	var r recorder
	lease := mustLease(t, client, 10*time.Second, WithObserver(r.observer()), WithRetryPolicy(RetryPolicy{Initial: 1, Max: 1}))
	link.Cut()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	_, err := lease.Alive(ctx)
	require.Error(t, err)
	require.Equal(t, "ask for lease", waitFor[RetryEvent](t, &r, "retrying").Op)
}

func TestObserverSeesResyncs(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 1)
	writer := cluster.Client(t)
	client, link := linkedTo(t, cluster)
	var r recorder
	w := mustWatch[string](t, client, "k", WithSnapshot(), WithCodec(Raw), WithObserver(r.observer()))
	require.Equal(t, EventSynced, next(t, w).Type)
	require.Empty(t, r.all("resynced"), "the first list is none")
	link.Cut()
	mustPut(t, writer, "k", "1")
	mustCompact(t, writer, mustPut(t, writer, "k", "2"))
	link.Reset()
	link.Heal()
	require.Equal(t, "2", next(t, w).Value)
	e := waitFor[WatchEvent](t, &r, "resynced")
	require.Equal(t, "k", e.Key)
	require.Error(t, e.Err)
}

func TestObserverSeesTheTermsOfALeaderInOrder(t *testing.T) {
	t.Parallel()
	client := testCluster.Client(t)
	var r recorder
	c := campaign(t, client, nameOf(t), WithObserver(r.observer()))
	for range 10 {
		now := c.leads(t)
		mustDelete(t, client, now.lock(t).Key())
		within(t, 5*time.Second, now.ctx.Done(), "the leader is notified")
		now.done <- nil
	}
	c.leads(t).done <- nil
	require.NoError(t, c.returns(t))
	eventually(t, func() bool { return len(r.all("released")) == 1 }, "the release")
	i := 0
	for _, e := range r.all("") {
		if e.what == "retrying" || e.what == "renewed" {
			continue
		}
		want := []string{"acquired", "lost"}[i%2]
		if i == 21 {
			want = "released"
		}
		require.Equal(t, want, e.what, i)
		i++
	}
}

func TestObserverMayBlockPanicExitOrCallBack(t *testing.T) {
	t.Parallel()
	client := testCluster.Client(t)

	t.Run("block", func(t *testing.T) {
		t.Parallel()
		unblock := make(chan struct{})
		defer close(unblock)
		blocking := Observer{Acquired: func(LockEvent) { <-unblock }, Renewed: func(LeaseEvent) { <-unblock }}
		lock := mustAcquire(t, client, nameOf(t), WithObserver(blocking), WithTTL(2*time.Second))
		var r recorder
		other := mustAcquire(t, client, nameOf(t)+"2", WithObserver(r.observer()))
		require.NoError(t, other.Close())
		waitFor[LockEvent](t, &r, "released")
		time.Sleep(3 * time.Second)
		_, err := lock.Commit(t.Context())
		require.NoError(t, err, "its lease is renewed")
		closed := start(func() (struct{}, error) { return struct{}{}, lock.Close() })
		within(t, time.Second, closed.done, "Close")
		require.NoError(t, closed.err)
	})
	t.Run("panic and exit", func(t *testing.T) {
		t.Parallel()
		var calls atomic.Int64
		lock := mustAcquire(t, client, nameOf(t), WithObserver(Observer{
			Acquired: func(LockEvent) { calls.Add(1); panic("observer") },
			Released: func(LockEvent) { calls.Add(1); runtime.Goexit() },
		}))
		require.NoError(t, lock.Close())
		eventually(t, func() bool { return calls.Load() == 2 }, "both calls")
	})
	t.Run("exit", func(t *testing.T) {
		t.Parallel()
		var calls atomic.Int64
		lock := mustAcquire(t, client, nameOf(t), WithObserver(Observer{
			Acquired: func(LockEvent) { runtime.Goexit() },
			Released: func(LockEvent) { calls.Add(1) },
		}))
		require.NoError(t, lock.Close())
		eventually(t, func() bool { return calls.Load() == 1 }, "the next call")
	})
	t.Run("call back", func(t *testing.T) {
		t.Parallel()
		var lock atomic.Pointer[Lock]
		closed := make(chan error, 1)
		lock.Store(mustAcquire(t, client, nameOf(t), WithObserver(Observer{
			Lost: func(LockEvent) { closed <- lock.Load().Close() },
		})))
		mustDelete(t, client, lock.Load().Key())
		select {
		case err := <-closed:
			require.ErrorIs(t, err, ErrLockLost)
		case <-time.After(patience):
			require.Fail(t, "Close does not return")
		}
	})
}

func TestObserverThatBlocksKeepsABoundedNumberOfEvents(t *testing.T) {
	t.Parallel()
	unblock := make(chan struct{})
	var calls atomic.Int64
	r := newReporter(discard, &Observer{Retrying: func(RetryEvent) { <-unblock; calls.Add(1) }})
	for i := range 3 * maxPendingReports {
		r.retrying(RetryEvent{Attempt: i})
	}
	close(unblock)
	r.flush()
	eventually(t, func() bool { return calls.Load() >= maxPendingReports }, "what was kept")
	require.LessOrEqual(t, calls.Load(), int64(maxPendingReports+1))
}

func TestNobodyObservingCostsNothing(t *testing.T) {
	c := newConfig(nil)
	c.finish()
	require.Nil(t, c.reporter)
	require.Zero(t, testing.AllocsPerRun(10_000, func() { // others allocate, too
		c.reporter.lockAcquired(LockEvent{})
		c.reporter.leaseRenewed(LeaseEvent{})
		c.reporter.retrying(RetryEvent{})
		c.reporter.flush()
	}))
}

// BenchmarkObserved acquires and releases a lock on a shared lease, with an Observer that counts
// and without one.
func BenchmarkObserved(b *testing.B) {
	client := etcdtest.Start(b, 1).Client(b)
	lease := mustLease(b, client, time.Minute)
	var acquired, released, lost atomic.Int64
	counting := WithObserver(Observer{
		Acquired: func(LockEvent) { acquired.Add(1) },
		Released: func(LockEvent) { released.Add(1) },
		Lost:     func(LockEvent) { lost.Add(1) },
	})
	turns := func(name string, opts ...LockOption) func(n int) {
		return repeat(b, func(ctx context.Context) error {
			return Do(ctx, client, name, func(context.Context) error { return nil }, append(opts, WithLease(lease))...)
		})
	}
	compare(b, 25, []string{"observed", "unobserved"}, []func(n int){turns("observed", counting), turns("unobserved")})
}

func TestObserverSeesThatASlowReaderMakesAWatchListAgain(t *testing.T) {
	t.Parallel()
	client := testCluster.Client(t)
	resynced := make(chan WatchEvent, 10)
	w := mustWatch[string](t, client, nameOf(t), WithPrefix(), WithCodec(Raw), WithSnapshot(),
		WithObserver(Observer{Resynced: func(e WatchEvent) { resynced <- e }}))
	require.Equal(t, EventSynced, next(t, w).Type)
	for i := range 20 {
		mustPut(t, client, fmt.Sprint(nameOf(t), i%2), strings.Repeat("x", 1<<20))
	}
	sleep(t.Context(), slowReaderGrace+2*time.Second)
	for next(t, w).Type != EventSynced {
	}
	eventually(t, func() bool { return len(resynced) > 0 }, "the Observer is called")
	require.Equal(t, nameOf(t), (<-resynced).Key)
}

func TestObserverOfAWriterIsCalledRatherThanThatOfItsLock(t *testing.T) {
	t.Parallel()
	client, faults := faultyClient(t)
	var ofLock, ofWriter atomic.Int64
	count := func(n *atomic.Int64) Option {
		return WithObserver(Observer{Retrying: func(RetryEvent) { n.Add(1) }})
	}
	lock := mustAcquire(t, client, nameOf(t), count(&ofLock))
	w := mustWriter[string](t, lock, nameOf(t), count(&ofWriter))
	faults.inTurn(func(txn) error { return errLost })
	mustWrite(t, w, 1, "a")
	eventually(t, func() bool { return ofWriter.Load() > 0 }, "the writer's is called")
	require.Zero(t, ofLock.Load())
	sharing := mustWriter[string](t, lock, nameOf(t))
	faults.inTurn(func(txn) error { return errLost })
	mustWrite(t, sharing, 2, "b")
	eventually(t, func() bool { return ofLock.Load() > 0 }, "the lock's is called for a writer without one")
}
