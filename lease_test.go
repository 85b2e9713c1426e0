package etcdutil

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"example.com/etcdutil/etcdtest"
	"example.com/etcdutil/internal/testclock"
	"github.com/stretchr/testify/require"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
)

func TestLeaseIsRenewedUntilClosedAndThenItsKeysAreGone(t *testing.T) {
	t.Parallel()
	client := testCluster.Client(t)
	began := time.Now()
	const ttl = 6 * time.Second // more than a slow machine stands still
	lease := mustLease(t, client, ttl, WithKeepAliveInterval(200*time.Millisecond))
	key := nameOf(t)
	_, err := client.Put(t.Context(), key, "", clientv3.WithLease(lease.ID()))
	require.NoError(t, err)

	first := lease.Expiry()
	require.Equal(t, ttl, lease.TTL())
	require.False(t, first.Before(began.Add(ttl-ttl/10)))
	require.False(t, first.After(time.Now().Add(ttl-ttl/10)))
	eventually(t, func() bool { return lease.Err() != nil || lease.Expiry().After(first.Add(ttl)) }, "expiry moves")
	require.NoError(t, lease.Err())
	alive, err := lease.Alive(t.Context())
	require.NoError(t, err)
	require.True(t, alive)
	_, hasDeadline := lease.Deadline()
	require.False(t, hasDeadline, "expiry moves, a Deadline must not")

	require.NoError(t, lease.Close())
	require.ErrorIs(t, context.Cause(lease), ErrClosed)
	resp, err := client.Get(t.Context(), key)
	require.NoError(t, err)
	require.Empty(t, resp.Kvs)
	alive, err = lease.Alive(t.Context())
	require.NoError(t, err)
	require.False(t, alive)
}

func TestLeaseTTLIsRoundedUpToSeconds(t *testing.T) {
	require.Equal(t, 3*time.Second, mustLease(t, testCluster.Client(t), 2001*time.Millisecond).TTL())
}

func TestLeaseMayBeGrantedForLongerThanAsked(t *testing.T) {
	lease := mustLease(t, testCluster.Client(t), time.Millisecond)
	require.Equal(t, 2*time.Second, lease.TTL(), "etcd's minimum")
}

func TestLeaseHasACauseOfItsOwnForEachEnd(t *testing.T) {
	t.Parallel()
	client := testCluster.Client(t)
	parentEnded := errors.New("parent's own cause")
	all := []error{ErrClosed, ErrLeaseExpired, ErrLeaseRevoked, ErrLockLost, parentEnded}
	for name, end := range map[string]struct {
		cause error
		by    func(t *testing.T, parent context.CancelCauseFunc, lease *Lease)
		ttl   time.Duration // long where the lease must not run out before, however slow the machine
		opts  []LeaseOption
		close error // what Close returns afterwards
	}{
		"closed": {ErrClosed, func(t *testing.T, _ context.CancelCauseFunc, lease *Lease) {
			require.NoError(t, lease.Close())
		}, 10 * time.Second, nil, nil},
		"parent ended": {parentEnded, func(_ *testing.T, parent context.CancelCauseFunc, _ *Lease) {
			parent(parentEnded)
		}, 10 * time.Second, nil, nil},
		"revoked": {ErrLeaseRevoked, func(t *testing.T, _ context.CancelCauseFunc, lease *Lease) {
			_, err := client.Revoke(t.Context(), lease.ID())
			require.NoError(t, err)
		}, 10 * time.Second, []LeaseOption{WithKeepAliveInterval(time.Second)}, ErrLeaseRevoked},
		"renewals used up": {ErrLeaseExpired, func(*testing.T, context.CancelCauseFunc, *Lease) {}, 2 * time.Second,
			[]LeaseOption{WithMaxKeepAlives(1)}, ErrLeaseExpired},
		"never renewed": {ErrLeaseExpired, func(*testing.T, context.CancelCauseFunc, *Lease) {}, 2 * time.Second,
			[]LeaseOption{WithMaxKeepAlives(0)}, ErrLeaseExpired},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			parent, cancel := context.WithCancelCause(context.Background())
			defer cancel(nil)
			lease, err := NewLease(parent, client, end.ttl, end.opts...)
			require.NoError(t, err)
			end.by(t, cancel, lease)
			within(t, 4*time.Second, lease.Done(), "the lease's context ends")
			for _, sentinel := range all {
				require.Equal(t, sentinel == end.cause, errors.Is(context.Cause(lease), sentinel), sentinel)
			}
			require.ErrorIs(t, lease.Err(), context.Canceled)
			require.ErrorIs(t, lease.Close(), end.close)
			require.ErrorIs(t, lease.Close(), end.close, "a second Close says the same")
		})
	}
}

func TestLeaseOptionsOutOfBoundsAreRefusedByName(t *testing.T) {
	client, requests := countingClient(t)
	for name, c := range map[string]struct {
		ttl  time.Duration
		opts []LeaseOption
		says string
	}{
		"no TTL":            {0, nil, "ttl"},
		"negative TTL":      {-time.Second, nil, "ttl"},
		"TTL too long":      {maxLeaseTTL + 1, nil, "ttl"},
		"interval is TTL":   {2 * time.Second, []LeaseOption{WithKeepAliveInterval(2 * time.Second)}, "WithKeepAliveInterval"},
		"no interval":       {2 * time.Second, []LeaseOption{WithKeepAliveInterval(0)}, "WithKeepAliveInterval"},
		"margin is TTL":     {2 * time.Second, []LeaseOption{WithExpiryMargin(2 * time.Second)}, "WithExpiryMargin"},
		"negative margin":   {2 * time.Second, []LeaseOption{WithExpiryMargin(-1)}, "WithExpiryMargin"},
		"negative renewals": {2 * time.Second, []LeaseOption{WithMaxKeepAlives(-1)}, "WithMaxKeepAlives"},
		"bad policy":        {2 * time.Second, []LeaseOption{WithRetryPolicy(RetryPolicy{Attempts: -1})}, "Attempts"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := NewLease(t.Context(), client, c.ttl, c.opts...)
			require.ErrorContains(t, err, c.says)
		})
	}
	require.Zero(t, requests.Load(), "nothing was sent")
}

func TestClientWithoutConnectionIsRefused(t *testing.T) {
	client := clientv3.NewCtxClient(t.Context())
	_, err := NewLease(t.Context(), client, time.Second)
	require.ErrorContains(t, err, "NewCtxClient")
	_, err = Acquire(t.Context(), client, "a")
	require.ErrorContains(t, err, "NewCtxClient")
	_, err = TryAcquire(t.Context(), client, "a")
	require.ErrorContains(t, err, "NewCtxClient")
}

func TestNilArgumentsPanic(t *testing.T) {
	client := testCluster.Client(t)
	//lint:ignore SA1012 that is the point
	require.Panics(t, func() { _, _ = NewLease(nil, client, time.Second) })
	require.Panics(t, func() { _, _ = NewLease(t.Context(), nil, time.Second) })
	require.Panics(t, func() { _, _ = Acquire(t.Context(), nil, "a") })
	require.Panics(t, func() { _, _ = TryAcquire(t.Context(), nil, "a") })
	require.Panics(t, func() { _ = Do(t.Context(), client, "a", nil) })
}

func TestLeaseGrantAfterALostReplyLeavesOneLease(t *testing.T) {
	cluster := etcdtest.Start(t, 1)
	direct := cluster.Client(t)
	link := etcdtest.StartLink(t, cluster.Endpoints()[0])
	client := newClient(t, link.Endpoint())
	_, err := client.Get(t.Context(), "connect")
	require.NoError(t, err)

	link.DropReplies()
	granting := start(func() (*Lease, error) { return NewLease(context.Background(), client, 10*time.Second) })
	eventually(t, func() bool { return len(leases(t, direct)) == 1 }, "the server has granted it")
	link.Heal()
	within(t, 10*time.Second, granting.done, "NewLease returns")
	require.NoError(t, granting.err)
	require.Equal(t, []clientv3.LeaseStatus{{ID: granting.v.ID()}}, leases(t, direct))
	require.NoError(t, granting.v.Close())
	require.Empty(t, leases(t, direct))
}

func TestLeaseGrantThatIsGivenUpIsRevokedInTheBackground(t *testing.T) {
	cluster := etcdtest.Start(t, 1)
	direct := cluster.Client(t)
	link := etcdtest.StartLink(t, cluster.Endpoints()[0])
	client := newClient(t, link.Endpoint())
	_, err := client.Get(t.Context(), "connect")
	require.NoError(t, err)

	link.DropReplies()
	ctx, cancel := context.WithCancel(context.Background())
	granting := start(func() (*Lease, error) { return NewLease(ctx, client, time.Hour) })
	eventually(t, func() bool { return len(leases(t, direct)) == 1 }, "the server has granted it")
	cancel()
	within(t, 100*time.Millisecond, granting.done, "NewLease returns")
	require.ErrorIs(t, granting.err, context.Canceled)
	eventually(t, func() bool { return len(leases(t, direct)) == 0 }, "it is revoked")
}

// A lease's context must end before the server can give its keys away, whenever in the cycle of
// renewals the fault comes.
func TestLockEndsBeforeAnotherHoldsItWheneverItsHolderIsCutOff(t *testing.T) {
	t.Parallel()
	direct := testCluster.Client(t)
	const phases = 8
	for _, ttl := range []time.Duration{2 * time.Second, 3 * time.Second, 5 * time.Second} {
		for phase := range phases {
			t.Run(fmt.Sprintf("TTL %v, phase %d of %d", ttl, phase, phases), func(t *testing.T) {
				t.Parallel()
				client, link := linkedClient(t)
				began := time.Now()
				holder := mustAcquire(t, client, nameOf(t), WithTTL(ttl))
				var before atomic.Bool
				next := start(func() (*Lock, error) {
					lock, err := Acquire(context.Background(), direct, nameOf(t), WithTTL(ttl))
					// Read this at once: this goroutine may be late, but not because of the holder.
					before.Store(holder.Err() == nil)
					return lock, err
				})
				waiters(t, direct, nameOf(t), 2)
				// The phase is counted from the grant; half of the phases are in the first cycle,
				// half in the second.
				time.Sleep(2 * ttl / 3 * time.Duration(phase) / phases)
				if holder.Err() != nil { // the machine is too slow for this phase
					require.Greater(t, time.Since(began), ttl-ttl/10, "lost before it could have run out")
				}
				link.Cut()

				within(t, ttl, holder.Done(), "the context ends within the TTL")
				require.ErrorIs(t, context.Cause(holder), ErrLockLost)
				require.ErrorIs(t, context.Cause(holder), ErrLeaseExpired)
				within(t, ttl+5*time.Second, next.done, "the next one holds")
				require.NoError(t, next.err)
				require.False(t, before.Load(), "another held the lock before the context ended")
				require.Greater(t, next.v.Token(), holder.Token())
				require.NoError(t, next.v.Close())
				require.ErrorIs(t, holder.Close(), ErrLockLost)
			})
		}
	}
}

func TestLeaseThatIsCutOffRightAfterTheGrantEndsWithinItsTTLOfTheCall(t *testing.T) {
	t.Parallel()
	link := etcdtest.StartLink(t, testCluster.Endpoints()[0])
	client, err := clientv3.New(clientv3.Config{
		Endpoints: []string{link.Endpoint()}, DialTimeout: 10 * time.Second, Logger: zap.NewNop(),
	})
	require.NoError(t, err)
	t.Cleanup(func() { _ = client.Close() })
	var lease *Lease
	took := testclock.Time(func() {
		lease, err = NewLease(context.Background(), client, 2*time.Second)
		require.NoError(t, err)
		link.Cut()
		<-lease.Done()
	})
	require.Less(t, took, 2*time.Second)
	require.ErrorIs(t, context.Cause(lease), ErrLeaseExpired)
	require.ErrorIs(t, lease.Close(), ErrLeaseExpired)
}

func TestLeaseOutlivesFaultsShorterThanItsTTL(t *testing.T) {
	t.Parallel()
	// From the last renewal until the context ends there are TTL - margin = 5.4 s; a fault of 3 s
	// leaves time to spare even if it begins just before a renewal: 1.4 s, for a machine that is
	// slow.
	const ttl, interval, length = 6 * time.Second, time.Second, 3 * time.Second
	faults := map[string]func(*etcdtest.Link){
		"cut":             func(l *etcdtest.Link) { l.Cut() },
		"replies dropped": func(l *etcdtest.Link) { l.DropReplies() },
		"delayed":         func(l *etcdtest.Link) { l.Delay(100 * time.Millisecond) },
		"reset":           func(l *etcdtest.Link) { l.Reset() },
	}
	for name, fault := range faults {
		for phase := range 4 {
			t.Run(fmt.Sprintf("%s, phase %d", name, phase), func(t *testing.T) {
				t.Parallel()
				client, link := linkedClient(t)
				lock := mustAcquire(t, client, nameOf(t), WithTTL(ttl), WithKeepAliveInterval(interval))
				time.Sleep(interval * time.Duration(phase) / 4)
				for range 2 {
					fault(link)
					time.Sleep(length)
					link.Heal()
					healed := time.Now()
					eventually(t, func() bool { return lock.Err() != nil || lock.Lease().Expiry().After(healed.Add(ttl-ttl/10)) },
						"a renewal that was sent after the fault")
				}
				require.NoError(t, lock.Err(), context.Cause(lock))
				require.NoError(t, lock.Close())
			})
		}
	}
}

func TestLeaseSurvivesARestartOfEtcd(t *testing.T) {
	t.Parallel()
	const ttl = 20 * time.Second // more than a restart takes on a slow machine
	cluster := etcdtest.Start(t, 1)
	lock := mustAcquire(t, cluster.Client(t), nameOf(t), WithTTL(ttl), WithKeepAliveInterval(2*time.Second))
	require.NoError(t, cluster.Stop(0))
	require.NoError(t, cluster.Restart(0))
	restarted := time.Now()
	eventually(t, func() bool { return lock.Err() != nil || lock.Lease().Expiry().After(restarted.Add(ttl-ttl/10)) }, "renewed")
	require.NoError(t, lock.Err(), context.Cause(lock))
	alive, err := lock.Alive(t.Context())
	require.NoError(t, err)
	require.True(t, alive)
	require.NoError(t, lock.Close())
}

func TestLeaseCloseHasOneResultAndIsBoundedWhileEtcdIsGone(t *testing.T) {
	t.Parallel()
	client, link := linkedClient(t)
	const ttl = 5 * time.Second // enough to begin to close it in, however slow
	lease := mustLease(t, client, ttl)
	link.Cut()
	closing := make([]*async[struct{}], 10)
	for i := range closing {
		closing[i] = start(func() (struct{}, error) { return struct{}{}, lease.Close() })
	}
	for _, c := range closing {
		within(t, ttl, c.done, "Close returns within what the lease has left")
		require.ErrorIs(t, c.err, ErrUnknownOutcome)
		require.Equal(t, closing[0].err, c.err)
	}
	require.ErrorIs(t, context.Cause(lease), ErrClosed)
	require.Equal(t, closing[0].err, lease.Close())
	direct := testCluster.Client(t)
	eventually(t, func() bool { return !knows(t, direct, lease.ID()) }, "it is renewed no longer, so it runs out")
}

func TestLeaseOfAClosedClientRunsOutQuietly(t *testing.T) {
	t.Parallel()
	client := newClient(t, testCluster.Endpoints()...)
	lease, err := NewLease(context.Background(), client, 2*time.Second)
	require.NoError(t, err)
	require.NoError(t, client.Close())
	within(t, 2*time.Second, lease.Done(), "it runs out")
	require.ErrorIs(t, context.Cause(lease), ErrLeaseExpired)
	_, err = NewLease(context.Background(), client, 2*time.Second)
	require.Error(t, err, "at once, and not when the retries are used up")
}

func TestLeaseIsNeitherRenewedNorReleasedAfterItsParentsEnd(t *testing.T) {
	t.Parallel()
	client := testCluster.Client(t)
	parent, cancel := context.WithCancel(context.Background())
	const ttl = 4 * time.Second // enough to ask for it, however slow
	lease, err := NewLease(parent, client, ttl, WithKeepAliveInterval(50*time.Millisecond))
	require.NoError(t, err)
	first := lease.Expiry()
	eventually(t, func() bool { return lease.Expiry().After(first) }, "renewed")
	cancel()
	<-lease.Done()
	ended := time.Now()
	require.True(t, knows(t, client, lease.ID()))
	eventually(t, func() bool { return !knows(t, client, lease.ID()) }, "it runs out")
	require.False(t, lease.Expiry().After(ended.Add(ttl-ttl/10)), "no renewal was sent after the end")
	require.ErrorIs(t, context.Cause(lease), context.Canceled)
	require.ErrorIs(t, lease.Close(), ErrLeaseExpired, "by now it is lost")
}

// The timer may fire while it is stopped, and then it must not fire on and on.
func TestLeaseThatIsRenewedNoLongerHasNoTimer(t *testing.T) {
	t.Parallel()
	lease := mustLease(t, testCluster.Client(t), time.Minute)
	renew := lease.renew
	lease.stopRenewing()
	lease.scheduleRenewal()
	require.False(t, renew.Stop(), "it is not set again")
}

// The rest of the clock is exact, which only fake time can show.
func TestLeaseEndsOneMarginBeforeTheTTLOfTheLastAnsweredRenewal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server := &leaseServer{ttl: 10, delay: 300 * time.Millisecond}
		client := server.start(t)
		began := time.Now()
		lease, err := NewLease(context.Background(), client, 10*time.Second)
		require.NoError(t, err)
		require.Equal(t, began.Add(9*time.Second), lease.Expiry(), "from before the request was sent")
		require.Equal(t, began.Add(300*time.Millisecond), time.Now())

		time.Sleep(time.Until(began.Add(3*time.Second + 640*time.Millisecond)))
		synctest.Wait()
		require.Equal(t, began.Add(10*time.Second/3+9*time.Second), lease.Expiry(), "renewed at a third, answered 300 ms later")

		server.silent.Store(true)
		<-lease.Done()
		require.Equal(t, began.Add(10*time.Second/3+9*time.Second), time.Now())
		require.ErrorIs(t, context.Cause(lease), ErrLeaseExpired)
	})
}

func TestLeaseIsNotExtendedByAnAnswerThatComesTooLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server := &leaseServer{ttl: 10}
		client := server.start(t)
		began := time.Now()
		lease, err := NewLease(context.Background(), client, 10*time.Second, WithExpiryMargin(5*time.Second), WithKeepAliveInterval(4*time.Second))
		require.NoError(t, err)
		server.setDelay(2 * time.Second) // sent at 4 s, answered at 6 s, over at 5 s
		<-lease.Done()
		require.Equal(t, began.Add(5*time.Second), time.Now())
		time.Sleep(3 * time.Second)
		require.ErrorIs(t, context.Cause(lease), ErrLeaseExpired)
	})
}

func TestLeaseWhoseTimeIsOverWhenItIsGrantedIsAnError(t *testing.T) {
	t.Parallel()
	client := interceptedClient(t, func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		err := invoker(ctx, method, req, reply, cc, opts...)
		if strings.HasSuffix(method, "/LeaseGrant") {
			time.Sleep(2 * time.Second)
		}
		return err
	})
	lease, err := NewLease(t.Context(), client, 2*time.Second)
	require.Nil(t, lease)
	require.ErrorIs(t, err, ErrLeaseExpired)
}

func TestLeaseCountsFromTheFirstAttemptToGrantIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server := &leaseServer{ttl: 10, delay: 300 * time.Millisecond, refused: 3}
		client := server.start(t)
		began := time.Now()
		lease := mustLease(t, client, 10*time.Second)
		require.GreaterOrEqual(t, time.Since(began), 1200*time.Millisecond)
		require.Equal(t, began.Add(9*time.Second), lease.Expiry())
		require.NoError(t, lease.Close())
	})
}

func TestLeaseThatTookLongToGrantIsGrantedAnew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server := &leaseServer{ttl: 4, delay: 300 * time.Millisecond, refused: 12}
		client := server.start(t)
		began := time.Now()
		lease := mustLease(t, client, 4*time.Second)
		require.GreaterOrEqual(t, time.Since(began), 3600*time.Millisecond)
		require.Greater(t, time.Until(lease.Expiry()), 2*time.Second)
		require.NoError(t, lease.Close())
	})
}

func TestLeaseCloseSaysWhenAnUnconfirmedLeaseHasExpired(t *testing.T) {
	t.Parallel()
	client, link := linkedClient(t)
	const ttl = 2 * time.Second
	lease := mustLease(t, client, ttl)
	link.Cut()
	err := lease.Close()
	require.ErrorIs(t, err, ErrUnknownOutcome)
	require.Contains(t, err.Error(), fmt.Sprintf("lease %x ", int64(lease.ID())))
	by := regexp.MustCompile(`expired by (\S+):`).FindStringSubmatch(err.Error())
	require.NotNil(t, by, err)
	expired, err := time.Parse(time.RFC3339, by[1])
	require.NoError(t, err)
	require.WithinRange(t, expired, time.Now().Add(ttl-maxClosing), time.Now().Add(ttl+3*time.Second))
	require.False(t, expired.Before(lease.Expiry().Add(ttl/10+electionTimeout).Truncate(time.Second)), "a new leader grants an election timeout more")
}

func TestLeaseCloseReleasesAllItsLocksInOneRequest(t *testing.T) {
	var revokes, others atomic.Int64
	var lines syncBuffer
	client := interceptedClient(t, func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		if strings.HasSuffix(method, "/LeaseRevoke") {
			revokes.Add(1)
		} else if isWrite(req) {
			others.Add(1)
		}
		return invoker(ctx, method, req, reply, cc, opts...)
	})
	const n = 20
	logger := WithLogger(slog.New(slog.NewTextHandler(&lines, nil)))
	lease := mustLease(t, client, 10*time.Second, logger)
	var locks []*Lock
	for i := range n {
		locks = append(locks, mustAcquire(t, client, fmt.Sprint(nameOf(t), i), WithLease(lease), logger))
	}
	others.Store(0)
	require.NoError(t, lease.Close())
	for i, lock := range locks {
		require.ErrorIs(t, context.Cause(lock), ErrLockLost)
		require.ErrorIs(t, context.Cause(lock), ErrClosed)
		require.Empty(t, keys(t, testCluster.Client(t), fmt.Sprint(nameOf(t), i)))
	}
	require.EqualValues(t, 1, revokes.Load())
	require.Zero(t, others.Load())
	eventually(t, func() bool { return strings.Count(lines.String(), "lock released") == n }, "each is logged as released")
	require.NotContains(t, lines.String(), "lost")
}

// syncBuffer is a buffer for loggers, which write from their own goroutines.
type syncBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}
