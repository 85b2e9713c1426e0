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
	"example.com/etcdutil/internal/testclock"
	"github.com/stretchr/testify/require"
	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/namespace"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func TestCommitAfterALostReplyIsNoFailureAndNoSecondWrite(t *testing.T) {
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

// clientv3 itself repeats what is answered Canceled, so one Commit can be sent twice without our
// doing.
func TestCommitThatClientv3RepeatsIsAppliedOnce(t *testing.T) {
	var faults atomic.Int32
	client := interceptedClient(t, func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		err := invoker(ctx, method, req, reply, cc, opts...)
		if isWriteTxn(req) && faults.Add(-1) >= 0 {
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

// A Commit's request is held back until after the Commit was given up. It lands before the next
// Commit, under it, or after it.
func TestCommitThatLandsUnderTheNextOneIsReportedWronglyByNeither(t *testing.T) {
	type held struct{ land func() error }
	var hold atomic.Bool
	var giveUp atomic.Pointer[context.CancelFunc]
	var straggler atomic.Pointer[held]
	client := interceptedClient(t, func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		if !isWriteTxn(req) || !hold.CompareAndSwap(true, false) {
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
		if !isWriteTxn(req) || !hold.CompareAndSwap(true, false) {
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
			doNotWatch(lock) // as if its watch were on a dead connection
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

func TestCommitOfAStaleHolderIsRefused(t *testing.T) {
	t.Parallel()
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
	// The Commit begins within this TTL, on a slow machine too.
	lock := mustAcquire(t, client, nameOf(t), WithTTL(5*time.Second))
	link.Cut()
	_, err := lock.Commit(context.Background(), clientv3.OpPut(nameOf(t)+"-data", "v"))
	require.ErrorIs(t, err, ErrUnknownOutcome)
	require.NotErrorIs(t, err, ErrLockLost, "that would say that it was not applied")
	require.ErrorIs(t, context.Cause(lock), ErrLockLost)
	_, err = lock.Commit(context.Background(), clientv3.OpPut(nameOf(t)+"-data", "v"))
	require.ErrorIs(t, err, ErrLockLost, "of this one nothing was sent")
	require.NotErrorIs(t, err, ErrUnknownOutcome)
}

// The context of a call is most often that of the lock, which ends with it.
func TestCommitOfUnknownOutcomeIsNotDeniedByTheEndOfItsContext(t *testing.T) {
	t.Parallel()
	for name, end := range map[string]func(lock *Lock){
		"lost":   func(lock *Lock) { lock.markLost(ErrLeaseExpired) },
		"closed": func(lock *Lock) { lock.shutdown(ErrClosed) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			client, faults := faultyClient(t)
			for what, call := range map[string]func(lock *Lock, w *LogWriter[string]) error{
				"commit": func(lock *Lock, _ *LogWriter[string]) error {
					_, err := lock.Commit(lock, clientv3.OpPut(nameOf(t)+"-data", ""))
					return err
				},
				"write": func(_ *Lock, w *LogWriter[string]) error { _, err := w.Write(w, ""); return err },
			} {
				lock := mustAcquire(t, client, nameOf(t)+"-"+what)
				w := mustWriter[string](t, lock, nameOf(t)+"-log")
				faults.each(func(x txn) error {
					err := x.land()
					end(lock)
					<-x.ctx.Done()
					return errors.Join(err, x.ctx.Err())
				})
				err := call(lock, w)
				faults.each(nil)
				require.ErrorIs(t, err, ErrUnknownOutcome)
				require.ErrorIs(t, err, context.Canceled)
				require.NotErrorIs(t, err, ErrLockLost)
				require.NotErrorIs(t, err, ErrClosed)
				_ = lock.Close()
			}
		})
	}
}

// ctx may end with what another call has returned, as that of an errgroup does.
func TestCommitOfUnknownOutcomeIsNotDeniedByTheCauseOfItsContext(t *testing.T) {
	t.Parallel()
	for _, cause := range []error{ErrConditionFailed, ErrLogConflict, ErrReplaced, ErrLockHeld, ErrLockLost, ErrClosed} {
		t.Run(cause.Error(), func(t *testing.T) {
			t.Parallel()
			client, faults := faultyClient(t)
			for what, call := range map[string]func(ctx context.Context, lock *Lock, w *LogWriter[string]) error{
				"commit": func(ctx context.Context, lock *Lock, _ *LogWriter[string]) error {
					_, err := lock.Commit(ctx, clientv3.OpPut(nameOf(t)+"-data", ""))
					return err
				},
				"write": func(ctx context.Context, _ *Lock, w *LogWriter[string]) error { _, err := w.Write(ctx, ""); return err },
			} {
				lock := mustAcquire(t, client, nameOf(t)+"-"+what)
				lock.cancelWatch() // it sends a transaction, too
				w := mustWriter[string](t, lock, nameOf(t)+"-log")
				ctx, end := context.WithCancelCause(context.Background())
				faults.each(func(x txn) error {
					err := x.land()
					end(fmt.Errorf("another's: %w", cause))
					<-x.ctx.Done()
					return errors.Join(err, x.ctx.Err())
				})
				err := call(ctx, lock, w)
				faults.each(nil)
				require.ErrorIs(t, err, ErrUnknownOutcome, what)
				require.ErrorIs(t, err, context.Canceled, what)
				require.NotErrorIs(t, err, cause, what)
				require.ErrorContains(t, err, "another's", what)
				require.NoError(t, lock.Close())
			}
		})
	}
}

func TestCommitsAreSerializedAndHold127Operations(t *testing.T) {
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
func TestCommitWithoutSpaceLeftReportsWhetherItWasApplied(t *testing.T) {
	var before, after atomic.Bool
	noSpace := rpctypes.ErrGRPCNoSpace
	client := interceptedClient(t, func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		if isWriteTxn(req) && before.CompareAndSwap(true, false) {
			return noSpace
		}
		err := invoker(ctx, method, req, reply, cc, opts...)
		if isWriteTxn(req) && after.CompareAndSwap(true, false) {
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
		if !isWriteTxn(req) {
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

func TestCommitIsNotMistakenForAWriteBySomebodyElse(t *testing.T) {
	client := testCluster.Client(t)
	lock := mustAcquire(t, client, nameOf(t))
	_, err := client.Put(t.Context(), lock.Key(), "somebody else's", clientv3.WithIgnoreLease())
	require.NoError(t, err)
	_, err = lock.Commit(t.Context(), clientv3.OpPut(nameOf(t)+"-data", ""))
	require.ErrorIs(t, err, ErrUnknownOutcome)
	require.Zero(t, versionOf(t, client, nameOf(t)+"-data"))
	require.NoError(t, lock.Close())
}

func TestCommitDoesNotTakeAnotherWriteOfItsKeyForItsOwn(t *testing.T) {
	t.Parallel()
	client, data := testCluster.Client(t), nameOf(t)+"-data"
	lock := mustAcquire(t, client, nameOf(t), WithValue("v"))
	_, err := client.Put(t.Context(), lock.Key(), "v", clientv3.WithLease(lock.Lease().ID()))
	require.NoError(t, err)
	_, err = lock.Commit(t.Context(), clientv3.OpPut(data, "1"))
	require.ErrorIs(t, err, ErrUnknownOutcome)
	require.Zero(t, versionOf(t, client, data))
	rev, err := lock.Commit(t.Context(), clientv3.OpPut(data, "2"))
	require.NoError(t, err)
	resp, err := client.Get(t.Context(), data)
	require.NoError(t, err)
	require.Equal(t, rev, resp.Kvs[0].ModRevision)
}

// A key that was overwritten without its lease holds nothing, and must not be taken over by a later
// lock on the lease.
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
	client, requests := countingClient(t, isKeyCheck)
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
		"none nested":       clientv3.OpTxn(nil, nil, []clientv3.Op{{}}),
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

func TestCommitAndLogWriteAreBoundedByElapsedInAllThatTheyDo(t *testing.T) {
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
		// Write finds out the outcome of the last Commit first.
		func() error { _, err := log.Write(t.Context(), ""); return err },
	} {
		took := testclock.Time(func() { err = call() })
		require.Error(t, err)
		require.Less(t, took, elapsed+elapsed/2)
	}
	link.Heal()
}

// errByProxy is what a proxy answers that has reset a stream: clientv3 repeats such a call by
// itself.
var errByProxy = status.Error(codes.Canceled, "stream terminated by RST_STREAM")

// applyThenReset carries a transaction out, calls then, and answers as a proxy that resets it.
func applyThenReset(then func()) func(txn) error {
	return func(x txn) error {
		if err := x.send(); err != nil {
			return err
		}
		then()
		return errByProxy
	}
}

func TestCommitFenceResolvesByTheKey(t *testing.T) {
	t.Parallel()
	f := fence{queue: &contender{value: "v"}, version: 3, revision: 30}
	open := txnResult{mayBeApplied: true, mayStillApply: true}
	answered := txnResult{mayBeApplied: true}
	kv := func(version int64, rev Revision, value string) *mvccpb.KeyValue {
		return &mvccpb.KeyValue{Version: version, ModRevision: rev, Value: []byte(value)}
	}
	for name, c := range map[string]struct {
		kv   *mvccpb.KeyValue
		want map[txnResult]verdict
	}{
		"gone":                       {nil, map[txnResult]verdict{{}: verdictLost, answered: verdictGone, open: verdictGone}},
		"unchanged":                  {kv(3, 30, "v"), map[txnResult]verdict{{}: verdictNotApplied, answered: verdictNotApplied, open: verdictUnknown}},
		"incremented":                {kv(4, 40, "v"), map[txnResult]verdict{{}: verdictOverwritten, answered: verdictApplied, open: verdictApplied}},
		"incremented, another value": {kv(4, 40, "x"), map[txnResult]verdict{{}: verdictOverwritten, answered: verdictOverwritten, open: verdictOverwritten}},
		"incremented twice":          {kv(5, 50, "v"), map[txnResult]verdict{{}: verdictOverwritten, answered: verdictOverwritten, open: verdictOverwritten}},
		"created again":              {kv(1, 50, "v"), map[txnResult]verdict{{}: verdictOverwritten, answered: verdictOverwritten, open: verdictOverwritten}},
	} {
		for r, want := range c.want {
			require.Equal(t, want, f.resolve(r, c.kv), "%s, %+v", name, r)
		}
	}
}

func TestCommitAccountsForEverySending(t *testing.T) {
	t.Parallel()
	unavailable := status.Error(codes.Unavailable, "transport is closing")
	denied := rpctypes.ErrGRPCPermissionDenied
	for name, c := range map[string]struct {
		finished []error // as seen below clientv3
		returned error
		want     txnResult
		seen     bool
	}{
		"one answer":                  {[]error{nil}, nil, txnResult{}, true},
		"refused":                     {[]error{denied}, denied, txnResult{}, true},
		"never sent":                  {nil, denied, txnResult{}, true},
		"reset, then an answer":       {[]error{errByProxy, nil}, nil, txnResult{true, true, false}, true},
		"two answers":                 {[]error{nil, nil}, nil, txnResult{true, false, true}, true},
		"an answer, then refused":     {[]error{nil, denied}, denied, txnResult{true, false, true}, true},
		"an old token, then answered": {[]error{rpctypes.ErrGRPCInvalidAuthToken, nil}, nil, txnResult{}, true},
		"lost":                        {[]error{unavailable}, unavailable, txnResult{true, true, false}, true},
		"no space":                    {[]error{rpctypes.ErrGRPCNoSpace}, rpctypes.ErrNoSpace, txnResult{true, false, false}, true},
		"reset, then no space":        {[]error{errByProxy, rpctypes.ErrGRPCNoSpace}, rpctypes.ErrNoSpace, txnResult{true, true, false}, true},
		"answered by an interceptor":  {nil, nil, txnResult{}, false},
	} {
		s := &sendings{}
		for _, err := range c.finished {
			s.finished(err)
		}
		var r txnResult
		if IsAmbiguous(c.returned) {
			r.addAmbiguous(c.returned)
		}
		require.Equal(t, c.seen, r.addOthers(s, c.returned == nil), name)
		require.Equal(t, c.want, r, name)
	}
}

// A transaction is carried out, clientv3 sends it again by itself, and meanwhile the key is gone.
func TestCommitIsNotDeniedWhereClientv3HasRepeatedIt(t *testing.T) {
	t.Parallel()
	direct := testCluster.Client(t)
	for name, second := range map[string]func(x txn) error{
		"refused by the guard": func(x txn) error { return x.send() },
		"permission denied":    func(txn) error { return rpctypes.ErrGRPCPermissionDenied },
		"too many requests":    func(txn) error { return rpctypes.ErrGRPCRequestTooLarge },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			client, faults := faultyClient(t)
			lock := mustAcquire(t, client, nameOf(t))
			log := mustWriter[string](t, lock, nameOf(t)+"-log")
			other := mustAcquire(t, client, nameOf(t)+"-other")
			faults.inTurn(applyThenReset(func() { mustDelete(t, direct, lock.Key()) }), second)
			_, err := lock.Commit(t.Context(), clientv3.OpPut(nameOf(t)+"-data", ""))
			require.EqualValues(t, 1, versionOf(t, direct, nameOf(t)+"-data"), "it was applied")
			require.ErrorIs(t, err, ErrUnknownOutcome)
			require.NotErrorIs(t, err, ErrLockLost)
			require.ErrorIs(t, context.Cause(lock), ErrLockLost)
			_, err = log.Write(t.Context(), "a")
			require.ErrorIs(t, err, ErrLockLost)

			otherLog := mustWriter[string](t, other, nameOf(t)+"-log")
			faults.inTurn(applyThenReset(func() { mustPut(t, direct, nameOf(t)+"-log", "foreign") }), second)
			_, err = otherLog.Write(t.Context(), "mine")
			require.EqualValues(t, 2, versionOf(t, direct, nameOf(t)+"-log"), "it was applied")
			require.ErrorIs(t, err, ErrUnknownOutcome)
			require.NotErrorIs(t, err, ErrLogConflict)
		})
	}
}

func TestCommitThatWasOnlyRefusedIsNotUnknown(t *testing.T) {
	t.Parallel()
	client, direct := testCluster.Client(t), testCluster.Client(t)
	lock, err := Acquire(t.Context(), client, nameOf(t),
		WithRetryPolicy(RetryPolicy{AttemptTimeout: patience})) // a slow answer is no lost one
	require.NoError(t, err)
	mustDelete(t, direct, lock.Key())
	_, err = lock.Commit(t.Context(), clientv3.OpPut(nameOf(t)+"-data", ""))
	require.ErrorIs(t, err, ErrLockLost)
	require.NotErrorIs(t, err, ErrUnknownOutcome)
	require.Zero(t, versionOf(t, direct, nameOf(t)+"-data"))
	require.ErrorIs(t, lock.Close(), ErrLockLost)
}

// namespaced is a client whose KV is not clientv3's own, so that nothing shows what clientv3 sends.
func namespaced(t *testing.T, client *clientv3.Client) *clientv3.Client {
	t.Helper()
	ns := nameOf(t) + ":"
	client.KV = namespace.NewKV(client.KV, ns)
	client.Watcher = namespace.NewWatcher(client.Watcher, ns)
	client.Lease = namespace.NewLease(client.Lease, ns)
	t.Cleanup(func() { _ = client.Watcher.Close() })
	return client
}

func TestCommitThroughAWrappedClientIsNeverDeniedUnseen(t *testing.T) {
	t.Parallel()
	direct := testCluster.Client(t)
	client, faults := faultyClient(t)
	lock := mustAcquire(t, namespaced(t, client), "a")
	data, key := nameOf(t)+":data", nameOf(t)+":"+lock.Key()
	absent := []clientv3.Cmp{clientv3.Compare(clientv3.CreateRevision("data"), "=", 0)}

	// A condition, and an error of etcd's, are said for certain: an empty transaction rules out the
	// rest.
	_, err := lock.CommitIf(t.Context(), absent, clientv3.OpPut("data", "1"))
	require.NoError(t, err)
	_, err = lock.CommitIf(t.Context(), absent, clientv3.OpPut("data", "2"))
	require.ErrorIs(t, err, ErrConditionFailed)
	_, err = lock.Commit(t.Context(), clientv3.OpPut("data", "3"), clientv3.OpPut("data", "4"))
	require.ErrorContains(t, err, "duplicate key")
	require.NotErrorIs(t, err, ErrUnknownOutcome)
	require.EqualValues(t, 1, versionOf(t, direct, data))

	faults.inTurn(applyThenReset(func() { mustDelete(t, direct, key) }))
	_, err = lock.Commit(t.Context(), clientv3.OpPut("data", "5"))
	require.EqualValues(t, 2, versionOf(t, direct, data), "it was applied")
	require.ErrorIs(t, err, ErrUnknownOutcome)
	require.NotErrorIs(t, err, ErrLockLost)
}

func TestCommitIfAppliesOnlyUnderItsConditions(t *testing.T) {
	t.Parallel()
	client := testCluster.Client(t)
	lock := mustAcquire(t, client, nameOf(t))
	key := func(i int) string { return fmt.Sprintf("%s-%d", nameOf(t), i) }
	is := func(i int, value string) clientv3.Cmp { return clientv3.Compare(clientv3.Value(key(i)), "=", value) }
	mustPut(t, client, key(1), "a")
	mustPut(t, client, key(2), "b")

	rev, err := lock.CommitIf(t.Context(), []clientv3.Cmp{is(1, "a"), is(2, "b")}, clientv3.OpPut(key(3), "c"))
	require.NoError(t, err)
	_, _, written := last(t, client, key(3))
	require.Equal(t, written, rev)

	_, err = lock.CommitIf(t.Context(), []clientv3.Cmp{is(1, "a"), is(2, "x")}, clientv3.OpPut(key(3), "d"))
	require.ErrorIs(t, err, ErrConditionFailed)
	require.ErrorContains(t, err, "conditions[1]")
	require.NotErrorIs(t, err, ErrLockLost)
	require.NotErrorIs(t, err, ErrUnknownOutcome)
	require.EqualValues(t, 1, versionOf(t, client, key(3)))
	require.NoError(t, lock.Err(), "the lock is held")
	_, err = lock.CommitIf(t.Context(), nil, clientv3.OpPut(key(3), "d"))
	require.NoError(t, err)

	conditions := make([]clientv3.Cmp, 127)
	for i := range conditions {
		conditions[i] = is(1, "a")
	}
	_, err = lock.CommitIf(t.Context(), conditions)
	require.NoError(t, err)
	_, err = lock.CommitIf(t.Context(), append(conditions, is(1, "a")))
	require.ErrorContains(t, err, "conditions: 128, at most 127")
	_, err = lock.CommitIf(t.Context(), []clientv3.Cmp{is(1, "a"), {}})
	require.ErrorContains(t, err, "conditions[1] is not a comparison")
	require.Panics(t, func() { var none context.Context; _, _ = lock.CommitIf(none, nil) })

	mustDelete(t, client, lock.Key())
	_, err = lock.CommitIf(t.Context(), []clientv3.Cmp{is(1, "x")}, clientv3.OpPut(key(3), "e"))
	require.ErrorIs(t, err, ErrLockLost, "which goes before a condition")
	require.NotErrorIs(t, err, ErrConditionFailed)
}

// The condition held at the first sending, whose effect is that it holds no more at the second.
func TestCommitIfThatChangesItsOwnConditionIsAppliedOnce(t *testing.T) {
	t.Parallel()
	client, faults := faultyClient(t)
	for name, lose := range map[string]func(x txn) error{
		"by clientv3": applyThenReset(func() {}),
		"by us":       func(x txn) error { return errors.Join(x.send(), errLost) },
	} {
		lock := mustAcquire(t, client, nameOf(t)+name)
		data := nameOf(t) + name + "-data"
		absent := []clientv3.Cmp{clientv3.Compare(clientv3.CreateRevision(data), "=", 0)}
		faults.inTurn(lose)
		_, err := lock.CommitIf(t.Context(), absent, clientv3.OpPut(data, "1"))
		require.NoError(t, err, name)
		_, err = lock.CommitIf(t.Context(), absent, clientv3.OpPut(data, "2"))
		require.ErrorIs(t, err, ErrConditionFailed, name)
		require.EqualValues(t, 1, versionOf(t, client, data), name)
	}
}

// The first sending is held back, and a condition refuses the second. Were that all, the first
// could be applied later, when the condition holds.
func TestCommitIfThatFailedCanNoLongerArrive(t *testing.T) {
	t.Parallel()
	client, faults := faultyClient(t)
	direct := testCluster.Client(t)
	lock := mustAcquire(t, client, nameOf(t))
	data, gate := nameOf(t)+"-data", nameOf(t)+"-gate"
	open := []clientv3.Cmp{clientv3.Compare(clientv3.CreateRevision(gate), "!=", 0)}
	var land func() error
	faults.inTurn(func(x txn) error { land = x.land; return errLost })
	_, err := lock.CommitIf(t.Context(), open, clientv3.OpPut(data, "late"))
	require.ErrorIs(t, err, ErrConditionFailed)
	mustPut(t, direct, gate, "")
	require.NoError(t, land())
	require.Zero(t, versionOf(t, direct, data))
	_, err = lock.CommitIf(t.Context(), open, clientv3.OpPut(data, "1"))
	require.NoError(t, err)
}

// An interceptor may answer in place of etcd, and then with nothing.
func TestCommitIfTakesAnEmptyAnswer(t *testing.T) {
	t.Parallel()
	var empty atomic.Bool
	client := interceptedClient(t, func(ctx context.Context, method string, req, reply any, conn *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		if empty.Load() && isWriteTxn(req) {
			return nil
		}
		return invoke(ctx, method, req, reply, conn, opts...)
	})
	lock := mustAcquire(t, client, nameOf(t))
	absent := []clientv3.Cmp{clientv3.Compare(clientv3.CreateRevision(nameOf(t)+"-data"), "=", 0)}
	empty.Store(true)
	_, err := lock.CommitIf(t.Context(), absent, clientv3.OpPut(nameOf(t)+"-data", ""))
	empty.Store(false)
	require.ErrorIs(t, err, ErrUnknownOutcome)
	_, err = lock.CommitIf(t.Context(), absent, clientv3.OpPut(nameOf(t)+"-data", ""))
	require.NoError(t, err)
}

// What rules a CommitIf out increments the key's version as well, and its own answer may be lost.
func TestCommitIfIsNotTakenForWhatRulesItOut(t *testing.T) {
	t.Parallel()
	client, faults := faultyClient(t)
	lock := mustAcquire(t, client, nameOf(t))
	exists := []clientv3.Cmp{clientv3.Compare(clientv3.CreateRevision(nameOf(t)+"-data"), ">", 0)}
	faults.inTurn(
		func(txn) error { return errLost },
		func(x txn) error { return x.send() }, // refused
		applyThenReset(func() {}),
	)
	_, err := lock.CommitIf(t.Context(), exists, clientv3.OpPut(nameOf(t)+"-data", "1"))
	require.Zero(t, versionOf(t, client, nameOf(t)+"-data"))
	require.ErrorIs(t, err, ErrUnknownOutcome)
	_, err = lock.CommitIf(t.Context(), exists, clientv3.OpPut(nameOf(t)+"-data", "2"))
	require.ErrorIs(t, err, ErrConditionFailed)
	_, err = lock.Commit(t.Context(), clientv3.OpPut(nameOf(t)+"-data", "3"))
	require.NoError(t, err)
	require.EqualValues(t, 1, versionOf(t, client, nameOf(t)+"-data"))
}

// An interceptor answers in etcd's stead, so that nothing is known of what was sent.
func TestCommitWhoseAnswerIsNobodysIsUnknown(t *testing.T) {
	t.Parallel()
	client, faults := faultyClient(t)
	direct := testCluster.Client(t)
	lock := mustAcquire(t, client, nameOf(t))
	faults.inTurn(func(x txn) error { mustDelete(t, direct, lock.Key()); return x.land() })
	_, err := lock.Commit(t.Context(), clientv3.OpPut(nameOf(t)+"-data", ""))
	require.ErrorIs(t, err, ErrUnknownOutcome)
	require.NotErrorIs(t, err, ErrLockLost)
}

// Somebody may have deleted the log since.
func TestLogWriterDoesNotDenyAFirstEntryThatWasAnswered(t *testing.T) {
	t.Parallel()
	answered := txnResult{mayBeApplied: true, answered: true}
	for _, held := range []bool{true, false} {
		for _, failure := range []error{nil, errors.New("failed")} {
			require.Equal(t, verdictUnknown, position{}.resolve(answered, "b", failure, nil, held))
		}
	}
	require.Equal(t, verdictLost, position{}.resolve(txnResult{mayBeApplied: true}, "b", nil, nil, false))
}

func TestLogWriterResolvesByTheLog(t *testing.T) {
	t.Parallel()
	failure := errors.New("failed")
	p := position{version: 2, revision: 20, created: 10}
	entry := func(version int64, rev, created Revision, value string) *mvccpb.KeyValue {
		return &mvccpb.KeyValue{Version: version, ModRevision: rev, CreateRevision: created, Value: []byte(value)}
	}
	unchanged, next := entry(2, 20, 10, "a"), entry(3, 30, 10, "b")
	sent := txnResult{mayBeApplied: true}
	for name, c := range map[string]struct {
		r       txnResult
		failure error
		entry   *mvccpb.KeyValue
		held    bool
		want    verdict
	}{
		"the entry is there":                    {sent, failure, next, true, verdictApplied},
		"the entry is there, the lock is gone":  {sent, failure, next, false, verdictGone},
		"unchanged":                             {sent, failure, unchanged, true, verdictNotApplied},
		"unchanged, the lock is gone":           {sent, failure, unchanged, false, verdictLost},
		"refused, the lock's key is another":    {txnResult{}, nil, unchanged, true, verdictRetry},
		"refused by another's entry":            {txnResult{}, nil, entry(3, 30, 10, "x"), true, verdictConflict},
		"another's entry in place of ours":      {sent, nil, entry(3, 30, 10, "x"), true, verdictConflict},
		"another's entry, perhaps after ours":   {sent, nil, entry(4, 40, 10, "x"), true, verdictUnknown},
		"refused, the log was deleted":          {txnResult{}, nil, nil, true, verdictRetry},
		"deleted, perhaps after ours":           {sent, nil, nil, true, verdictUnknown},
		"begun again, perhaps after ours":       {sent, nil, entry(3, 50, 40, "x"), true, verdictUnknown},
		"refused, written on, the lock is gone": {txnResult{}, nil, entry(4, 40, 10, "x"), false, verdictLost},
	} {
		require.Equal(t, c.want, p.resolve(c.r, "b", c.failure, c.entry, c.held), name)
	}
}

type panickingCodec struct{ Codec }

func (panickingCodec) Marshal(any) ([]byte, error) { panic("the codec's") }

func TestLogWriteReturnsAnErrorWhereTheCodecPanics(t *testing.T) {
	t.Parallel()
	client := testCluster.Client(t)
	w := mustWriter[string](t, mustAcquire(t, client, nameOf(t)), nameOf(t), WithCodec(panickingCodec{JSON}))
	for range 2 { // and it leaves nothing locked
		_, err := w.Write(t.Context(), "a")
		require.ErrorContains(t, err, "the codec panicked: the codec's")
	}
	require.Zero(t, versionOf(t, client, nameOf(t)))
}

func TestLogWriterAndDoEndWithARestore(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 1)
	client, others := cluster.Client(t), cluster.Client(t)
	lease := mustLease(t, client, 5*time.Second)
	require.NoError(t, cluster.Backup())
	lock := mustAcquire(t, client, nameOf(t), WithLease(lease))
	w := mustWriter[string](t, lock, nameOf(t)+"-log")
	doing := start(func() (struct{}, error) {
		return struct{}{}, lock.Do(context.Background(), func(ctx context.Context) error { <-ctx.Done(); return nil })
	})
	require.NoError(t, cluster.Restore())
	mustAcquire(t, others, nameOf(t))
	for _, ended := range []<-chan struct{}{lock.Done(), w.Done(), doing.done} {
		within(t, 15*time.Second, ended, "the holder is notified within seconds")
	}
	require.ErrorIs(t, context.Cause(w), ErrLockLost)
	require.ErrorIs(t, doing.err, ErrLockLost)
}
