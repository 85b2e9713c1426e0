package etcdutil

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"example.com/etcdutil/etcdtest"
	"example.com/etcdutil/internal/testclock"
	"github.com/stretchr/testify/require"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

func TestErrorsAreClassifiedByWhatEtcdMeansByThem(t *testing.T) {
	for _, c := range []struct {
		err                  error
		transient, ambiguous bool
	}{
		{nil, false, false},
		{errors.New("not etcd's"), false, false},
		{context.Canceled, false, true},
		{context.DeadlineExceeded, false, true},
		{ErrUnknownOutcome, false, true},
		{ErrLockLost, false, false},
		{ErrLockHeld, false, false},

		{rpctypes.ErrNoLeader, true, false},
		{rpctypes.ErrLeaderChanged, true, true},
		{rpctypes.ErrTimeout, true, true},
		{rpctypes.ErrTimeoutDueToLeaderFail, true, true},
		{rpctypes.ErrTimeoutDueToConnectionLost, true, true},
		{rpctypes.ErrGRPCTimeoutWaitAppliedIndex, true, true},
		{rpctypes.ErrStopped, true, true},
		{rpctypes.ErrUnhealthy, true, true},
		{status.Error(codes.Unavailable, "transport is closing"), true, true},
		{status.Error(codes.Unavailable, "error reading from server: EOF"), true, true},
		{status.Error(codes.Canceled, "a proxy's"), true, true},
		{status.Error(codes.DeadlineExceeded, "the server's"), true, true},
		{status.Error(codes.Canceled, "grpc: the client connection is closing"), false, true},
		{status.Error(codes.Internal, "stream terminated by RST_STREAM"), true, true},
		{rpctypes.ErrTooManyRequests, true, false},
		{status.Error(codes.Unknown, "etcdserver: too many requests"), true, false},
		{status.Error(codes.Unknown, "raft proposal dropped"), true, false},
		{status.Error(codes.Unknown, "not a primary lessor"), true, false},
		{status.Error(codes.Unknown, "raft: stopped"), true, true},
		{status.Error(codes.Unknown, "what etcd did not foresee"), false, true},
		{rpctypes.ErrNoSpace, false, true},
		{rpctypes.ErrCorrupt, false, false},
		{rpctypes.ErrInvalidAuthToken, true, false},
		{rpctypes.ErrAuthOldRevision, true, false},
		{rpctypes.ErrUserEmpty, false, false},
		{rpctypes.ErrAuthFailed, false, false},
		{rpctypes.ErrPermissionDenied, false, false},
		{rpctypes.ErrLeaseNotFound, false, false},
		{rpctypes.ErrLeaseExist, false, false},
		{rpctypes.ErrCompacted, false, false},
		{rpctypes.ErrFutureRev, false, false},
		{rpctypes.ErrRequestTooLarge, false, false},
		{rpctypes.ErrTooManyOps, false, false},
		{rpctypes.ErrDuplicateKey, false, false},
		{status.Error(codes.ResourceExhausted, "trying to send message larger than max (3 vs. 2)"), false, false},
		{status.Error(codes.ResourceExhausted, "grpc: received message larger than max (3 vs. 2)"), false, true},
		{rpctypes.ErrNotCapable, true, false},
		{rpctypes.ErrGRPCNotSupportedForLearner, true, false},
	} {
		t.Run(fmt.Sprint(c.err), func(t *testing.T) {
			forms := []error{c.err}
			if c.err != nil {
				forms = append(forms, fmt.Errorf("wrapped: %w", c.err), rpctypes.Error(c.err))
			}
			for _, err := range forms {
				require.Equal(t, c.transient, IsTransient(err), "transient")
				require.Equal(t, c.ambiguous, IsAmbiguous(err), "ambiguous")
			}
		})
	}
}

// What the table is made of must be what a real etcd and a real client return.
func TestRealErrorsAreClassified(t *testing.T) {
	t.Parallel()
	client := testCluster.Client(t)
	ctx := t.Context()
	_, tooLarge := client.Put(ctx, nameOf(t), strings.Repeat("x", 1700<<10))
	require.ErrorIs(t, tooLarge, rpctypes.ErrRequestTooLarge)
	_, larger := client.Put(ctx, nameOf(t), strings.Repeat("x", 3<<20))
	_, notFound := client.Revoke(ctx, 12345)
	_, future := client.Get(ctx, nameOf(t), clientv3.WithRev(1<<40))
	for _, err := range []error{tooLarge, larger, notFound, future} {
		require.Error(t, err)
		require.False(t, IsTransient(err), err)
		require.False(t, IsAmbiguous(err), err)
	}

	door := openDoor(t, testCluster.Endpoints()[0])
	away := newClient(t, door.addr)
	_, err := away.Get(ctx, nameOf(t))
	require.NoError(t, err)
	door.shut()
	short, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
	defer cancel()
	_, err = away.Put(short, nameOf(t), "")
	require.Error(t, err)
	require.True(t, IsAmbiguous(err), err)

	require.NoError(t, away.Close())
	_, err = away.Put(ctx, nameOf(t), "")
	require.Error(t, err)
	require.False(t, IsTransient(err), "of a closed client nothing more comes: %v", err)
}

// What has failed the renewals of a lost lock says nothing about what is refused because of that.
func TestErrorsOfALostLockAreNotThoseOfItsRenewals(t *testing.T) {
	t.Parallel()
	door := openDoor(t, testCluster.Endpoints()[0])
	lock := mustAcquire(t, newClient(t, door.addr), nameOf(t), WithTTL(2*time.Second))
	doing := start(func() (struct{}, error) {
		return struct{}{}, lock.Do(context.Background(), func(ctx context.Context) error { <-ctx.Done(); return errAway })
	})
	door.shut()
	<-lock.Done()
	calls := 0
	_, err := Retry(context.Background(), func(ctx context.Context) (Revision, error) {
		calls++
		return lock.Commit(ctx, clientv3.OpPut(nameOf(t)+"-data", ""))
	})
	require.ErrorIs(t, err, ErrLockLost)
	require.ErrorIs(t, err, ErrLeaseExpired)
	require.ErrorContains(t, err, "connection refused")
	require.False(t, IsTransient(err), err)
	require.False(t, IsAmbiguous(err), "nothing was applied: %v", err)
	require.Equal(t, 1, calls)

	<-doing.done
	require.ErrorIs(t, doing.err, ErrLockLost)
	require.True(t, IsAmbiguous(doing.err), "what fn did may have been applied: %v", doing.err)

	expired := errorf("%w: %w", ErrLeaseExpired, renewalError{fmt.Errorf("%w: %w", context.Canceled, rpctypes.ErrTimeout)})
	require.ErrorIs(t, expired, rpctypes.ErrTimeout)
	require.False(t, IsTransient(expired))
	require.False(t, IsAmbiguous(expired))
}

var errAway = status.Error(codes.Unavailable, "away")

func failing(times int, with error) func(context.Context) (int, error) {
	calls := 0
	return func(context.Context) (int, error) {
		if calls++; calls <= times {
			return 0, with
		}
		return calls, nil
	}
}

func TestRetryRepeatsWhatIsTransientUntilItSucceeds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		calls, err := Retry(t.Context(), failing(5, errAway))
		require.NoError(t, err)
		require.Equal(t, 6, calls)
	})
}

func TestRetryReturnsWhatIsNotTransientAtOnce(t *testing.T) {
	permanent := errors.New("permanent")
	for _, err := range []error{permanent, rpctypes.ErrPermissionDenied, context.Canceled} {
		calls := 0
		_, got := Retry(t.Context(), func(context.Context) (int, error) { calls++; return 0, err })
		require.ErrorIs(t, got, err)
		require.Equal(t, 1, calls)
	}
}

func TestRetryGivesUpAfterItsAttemptsOrItsTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		calls := 0
		op := func(context.Context) (int, error) { calls++; return 0, errAway }
		_, err := Retry(t.Context(), op, WithRetryPolicy(RetryPolicy{Attempts: 3}))
		require.ErrorIs(t, err, errAway)
		require.Equal(t, 3, calls)

		began := time.Now()
		_, err = Retry(t.Context(), op)
		require.ErrorIs(t, err, errAway)
		require.LessOrEqual(t, time.Since(began), 30*time.Second)
		require.Greater(t, time.Since(began), 25*time.Second)

		began = time.Now()
		_, err = Retry(t.Context(), func(ctx context.Context) (int, error) { <-ctx.Done(); return 0, ctx.Err() },
			WithRetryPolicy(RetryPolicy{Elapsed: 12 * time.Second}))
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.LessOrEqual(t, time.Since(began), 12*time.Second, "the last attempt is cut short")

		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		_, err = Retry(ctx, op, WithRetryPolicy(RetryPolicy{Elapsed: -1}))
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.ErrorIs(t, err, errAway)
	})
}

func TestRetryBoundsEachAttemptAndTriesAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var took []time.Duration
		_, err := Retry(t.Context(), func(ctx context.Context) (int, error) {
			if len(took) == 2 {
				return 1, nil
			}
			began := time.Now()
			<-ctx.Done()
			took = append(took, time.Since(began))
			return 0, ctx.Err()
		}, WithRetryPolicy(RetryPolicy{AttemptTimeout: 3 * time.Second}))
		require.NoError(t, err)
		require.Equal(t, []time.Duration{3 * time.Second, 3 * time.Second}, took)
	})
}

func TestRetryDelaysAreDoubledWithFullJitterUpToTheMaximum(t *testing.T) {
	p := RetryPolicy{}.withDefaults()
	for failed, limit := range map[int]time.Duration{1: 25 * time.Millisecond, 2: 50 * time.Millisecond, 4: 200 * time.Millisecond, 30: 2 * time.Second} {
		var least, most time.Duration = time.Hour, 0
		for range 1000 {
			d := p.backoff(failed)
			least, most = min(least, d), max(most, d)
		}
		require.LessOrEqual(t, most, limit)
		require.Greater(t, most, limit*9/10)
		require.Less(t, least, limit/10)
	}
}

func TestRetryEndsWithItsContextAndWrapsBothErrors(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cause := errors.New("the caller's cause")
		ctx, cancel := context.WithCancelCause(t.Context())
		time.AfterFunc(time.Second, func() { cancel(cause) })
		began := time.Now()
		_, err := Retry(ctx, func(context.Context) (int, error) { return 0, errAway })
		require.Equal(t, time.Second, time.Since(began))
		require.ErrorIs(t, err, errAway)
		require.ErrorIs(t, err, cause)
		require.ErrorIs(t, err, context.Canceled)

		_, err = Retry(ctx, func(context.Context) (int, error) { t.Error("called"); return 0, nil })
		require.ErrorIs(t, err, cause)
	})
}

func TestRetryThatIsDefiniteOnlyRepeatsNothingThatMayHaveBeenApplied(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		definite := WithRetryPolicy(RetryPolicy{DefiniteOnly: true, AttemptTimeout: time.Second})
		calls, err := Retry(t.Context(), failing(2, rpctypes.ErrNoLeader), definite)
		require.NoError(t, err)
		require.Equal(t, 3, calls)
		_, err = Retry(t.Context(), failing(1, rpctypes.ErrTimeout), definite)
		require.ErrorIs(t, err, rpctypes.ErrTimeout)
		attempts := 0
		_, err = Retry(t.Context(), func(ctx context.Context) (int, error) {
			attempts++
			<-ctx.Done()
			return 0, ctx.Err()
		}, definite)
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.Equal(t, 1, attempts)
	})
}

func TestRetryPoliciesThatMakeNoSenseAreRefusedByName(t *testing.T) {
	for field, p := range map[string]RetryPolicy{
		"Initial":        {Initial: -1},
		"Max":            {Max: -1},
		"below Initial":  {Initial: 2, Max: 1},
		"Attempts":       {Attempts: -1},
		"AttemptTimeout": {AttemptTimeout: -1},
	} {
		_, err := Retry(t.Context(), func(context.Context) (int, error) { t.Error("called"); return 0, nil }, WithRetryPolicy(p))
		require.ErrorContains(t, err, field)
	}
	require.Panics(t, func() { _, _ = Retry[int](t.Context(), nil) })
}

func TestRetryDefaultsFitEachOther(t *testing.T) {
	require.Equal(t, 10*time.Millisecond, RetryPolicy{Max: 10 * time.Millisecond}.withDefaults().Initial)
	require.Equal(t, time.Minute, RetryPolicy{Initial: time.Minute}.withDefaults().Max)
}

func TestRetryLogsOncePerOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var lines bytes.Buffer
		logger := WithLogger(slog.New(slog.NewTextHandler(&lines, nil)))
		_, err := Retry(t.Context(), failing(0, nil), logger)
		require.NoError(t, err)
		require.Zero(t, lines.Len())
		_, err = Retry(t.Context(), failing(9, errAway), logger, WithLogger(nil), logger)
		require.NoError(t, err)
		require.Equal(t, 1, strings.Count(lines.String(), "\n"), lines.String())
	})
}

func TestRetryDoesNotRepeatWhatFailedForGoodAfterTheTimeout(t *testing.T) {
	permanent := errors.New("permanent")
	calls := 0
	_, err := Retry(t.Context(), func(ctx context.Context) (int, error) {
		calls++
		<-ctx.Done()
		return 0, permanent
	}, WithRetryPolicy(RetryPolicy{AttemptTimeout: 10 * time.Millisecond}))
	require.Equal(t, permanent, err)
	require.Equal(t, 1, calls)
}

func TestRetryGivesAttemptsOneSecondAndMoreAfterEachThatTimedOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var took []time.Duration
		_, err := Retry(t.Context(), func(ctx context.Context) (int, error) {
			if len(took) == 2 { // an attempt that fails by itself says nothing about slowness
				took = append(took, 0)
				return 0, errAway
			}
			began := time.Now()
			<-ctx.Done()
			took = append(took, time.Since(began).Round(time.Second))
			return 0, ctx.Err()
		}, WithRetryPolicy(RetryPolicy{Attempts: 6, Elapsed: -1}))
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.Equal(t, []time.Duration{time.Second, 2 * time.Second, 0, 4 * time.Second, 5 * time.Second, 5 * time.Second}, took)
	})
}

func TestRetryAcceptsTheLongestDelays(t *testing.T) {
	t.Parallel()
	for _, p := range []RetryPolicy{
		{Initial: math.MaxInt64},
		{Max: math.MaxInt64, Elapsed: 5 * time.Second},
		{Initial: math.MaxInt64, Max: math.MaxInt64, Elapsed: -1, Attempts: 1},
		{Initial: 1, Max: 1, Elapsed: time.Millisecond},
		{Elapsed: math.MaxInt64, AttemptTimeout: math.MaxInt64, Attempts: 1},
	} {
		_, err := Retry(t.Context(), func(context.Context) (int, error) { return 0, errAway }, WithRetryPolicy(p))
		require.ErrorIs(t, err, errAway)
		for failed := range 70 {
			require.GreaterOrEqual(t, p.withDefaults().backoff(failed), time.Duration(0))
		}
	}
}

// Nothing else has gRPC dial again in time: its backoff is 1 s after the first refused connection,
// and grows.
func TestRetryDialsAgainWhileItWaitsForAConnection(t *testing.T) {
	t.Parallel()
	var dials atomic.Int64
	client, err := clientv3.New(clientv3.Config{
		Endpoints: testCluster.Endpoints(), Logger: zap.NewNop(),
		DialOptions: []grpc.DialOption{grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) {
			dials.Add(1)
			return nil, errors.New("refused")
		})},
	})
	require.NoError(t, err)
	_, err = NewLease(t.Context(), client, time.Minute, WithRetryPolicy(RetryPolicy{Elapsed: 5 * time.Second}))
	require.ErrorContains(t, err, "refused")
	require.Greater(t, dials.Load(), int64(8), "gRPC by itself dials four times in 5 s")
	require.NoError(t, client.Close())
	eventually(t, func() bool {
		redialers.Lock()
		defer redialers.Unlock()
		return redialers.byClient[client] == nil
	}, "nobody waits any more")
}

func TestRetryRequiresALeaderOfEveryRequest(t *testing.T) {
	var requests atomic.Int64
	client := interceptedClient(t, func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		requests.Add(1)
		md, _ := metadata.FromOutgoingContext(ctx)
		if len(md.Get(rpctypes.MetadataRequireLeaderKey)) == 0 {
			t.Errorf("%s does not require a leader", method)
		}
		if ctx.Value(scopeKey{}) != nil && len(md.Get("request-id")) == 0 {
			t.Errorf("%s lacks its caller's metadata", method)
		}
		return invoker(ctx, method, req, reply, cc, opts...)
	})
	ctx := metadata.AppendToOutgoingContext(t.Context(), "request-id", "1")
	lock, err := Acquire(ctx, client, nameOf(t))
	require.NoError(t, err)
	_, err = lock.Commit(ctx)
	require.NoError(t, err)
	_, err = lock.Alive(ctx)
	require.NoError(t, err)
	_, err = lock.Lease().Alive(ctx)
	require.NoError(t, err)
	require.NoError(t, lock.Close())
	require.GreaterOrEqual(t, requests.Load(), int64(6))
}

func TestErrorsSayWhyThereIsNoConnection(t *testing.T) {
	t.Parallel()
	for says, config := range map[string]clientv3.Config{
		"refused":   {Endpoints: []string{"127.0.0.1:1"}}, // a free port may be another test's soon
		"lookup":    {Endpoints: []string{"no-such-host.invalid:2379"}},
		"handshake": {Endpoints: []string{"https://" + testCluster.Endpoints()[0]}, TLS: &tls.Config{}},
	} {
		t.Run(says, func(t *testing.T) {
			t.Parallel()
			config.Logger = zap.NewNop()
			client, err := clientv3.New(config)
			require.NoError(t, err)
			t.Cleanup(func() { _ = client.Close() })
			policy := WithRetryPolicy(RetryPolicy{Elapsed: 1500 * time.Millisecond})
			for name, f := range map[string]func() error{
				"NewLease": func() error { _, err := NewLease(t.Context(), client, time.Minute, policy); return err },
				"short NewLease": func() error {
					ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
					defer cancel()
					_, err := NewLease(ctx, client, time.Minute)
					return err
				},
				"Acquire":    func() error { _, err := Acquire(t.Context(), client, nameOf(t), policy); return err },
				"TryAcquire": func() error { _, err := TryAcquire(t.Context(), client, nameOf(t), policy); return err },
			} {
				err := f()
				require.ErrorContains(t, err, says, name)
				require.ErrorIs(t, err, context.DeadlineExceeded, name)
				require.Equal(t, 1, strings.Count(err.Error(), "etcdutil: "), "%s: %v", name, err)
			}
		})
	}
}

// This test is not parallel, because its bounds are short.
func TestRetryIsQuickThoughAMemberOfThreeFails(t *testing.T) {
	for name, c := range map[string]struct {
		fault func(t *testing.T, cluster *etcdtest.Cluster, link *etcdtest.Link)
		bound time.Duration // of Acquire and of Commit
	}{
		"one is isolated": {func(t *testing.T, cluster *etcdtest.Cluster, _ *etcdtest.Link) {
			require.NoError(t, cluster.Isolate((cluster.Leader()+1)%3))
			time.Sleep(3 * time.Second) // it notices
		}, time.Second},
		"one is a black hole": {func(_ *testing.T, _ *etcdtest.Cluster, link *etcdtest.Link) {
			link.Cut()
		}, 2500 * time.Millisecond},
		"the leader dies": {func(t *testing.T, cluster *etcdtest.Cluster, _ *etcdtest.Link) {
			require.NoError(t, cluster.Stop(cluster.Leader()))
		}, 3 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel() // beside the others of this table only
			cluster := etcdtest.Start(t, 3)
			follower := (cluster.Leader() + 1) % 3
			link := etcdtest.StartLink(t, cluster.Endpoints()[follower])
			endpoints := cluster.Endpoints()
			endpoints[follower] = link.Endpoint()
			client := newClient(t, endpoints...)
			awaitConnections(t, client)
			c.fault(t, cluster, link)
			for range 4 {
				var lock *Lock
				took := testclock.Time(func() { lock = mustAcquire(t, client, nameOf(t)) })
				require.Less(t, took, c.bound)
				took = testclock.Time(func() {
					_, err := lock.Commit(t.Context(), clientv3.OpPut(nameOf(t)+"-data", ""))
					require.NoError(t, err)
				})
				require.Less(t, took, c.bound)
				require.NoError(t, lock.Close())
			}
		})
	}
}

func TestRetryAsksAnotherMemberWhereOneWasRemoved(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 3)
	client := cluster.Client(t)
	removeMember(t, cluster, (cluster.Leader()+1)%3)
	for range 6 {
		_, err := Retry(t.Context(), func(ctx context.Context) (*clientv3.PutResponse, error) {
			return client.Put(ctx, nameOf(t)+"-data", "")
		})
		require.NoError(t, err)
		lock := mustAcquire(t, client, nameOf(t))
		_, err = lock.Commit(t.Context())
		require.NoError(t, err)
		require.NoError(t, lock.Close())
	}
}
