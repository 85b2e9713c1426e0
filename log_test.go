package etcdutil

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"example.com/etcdutil/etcdtest"
	"example.com/etcdutil/internal/testclock"
	"github.com/stretchr/testify/require"
	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func mustWriter[T any](t testing.TB, lock *Lock, name string, opts ...LogOption) *LogWriter[T] {
	t.Helper()
	w, err := NewLogWriter[T](context.Background(), lock, name, opts...)
	require.NoError(t, err)
	t.Cleanup(func() { _ = w.Close() })
	return w
}

func mustReader[T any](t testing.TB, client *clientv3.Client, name string, opts ...LogOption) *LogReader[T] {
	t.Helper()
	r, err := NewLogReader[T](context.Background(), client, name, opts...)
	require.NoError(t, err)
	t.Cleanup(func() { _ = r.Close() })
	return r
}

// mustWrite writes entries, the first of which is to have this version.
func mustWrite[T any](t testing.TB, w *LogWriter[T], first int64, values ...T) {
	t.Helper()
	for i, v := range values {
		version, err := w.Write(context.Background(), v)
		require.NoError(t, err)
		require.Equal(t, first+int64(i), version)
	}
}

// read waits for an entry, or an error, for as long as that may take.
func read[T any](t testing.TB, r *LogReader[T]) (Entry[T], error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	e, err := r.Read(ctx)
	require.NoError(t, ctx.Err(), "nothing to read")
	return e, err
}

// mustRead reads an entry.
func mustRead[T any](t testing.TB, r *LogReader[T]) Entry[T] {
	t.Helper()
	e, err := read(t, r)
	require.NoError(t, err)
	return e
}

// mustReadValues reads entries in order, the first of which is to have this version.
func mustReadValues[T any](t testing.TB, r *LogReader[T], first int64, values ...T) {
	t.Helper()
	for i, v := range values {
		e := mustRead(t, r)
		require.Equal(t, v, e.Value)
		require.Equal(t, first+int64(i), e.Version)
	}
}

// nothingToRead fails t if r, which every put before has reached, has anything to read.
func nothingToRead[T any](t testing.TB, r *LogReader[T]) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Millisecond)
	defer cancel()
	e, err := r.Read(ctx)
	require.ErrorIs(t, err, context.DeadlineExceeded, "read %v", e)
}

// hasHeard waits until a reader of the latest entry has received a revision.
func hasHeard[T any](t testing.TB, r *LogReader[T], rev Revision) {
	t.Helper()
	eventually(t, func() bool {
		r.latest.notify.mu.Lock()
		defer r.latest.notify.mu.Unlock()
		return r.latest.notify.value.Revision >= rev
	}, "the reader hears of it")
}

// last is the last entry of a log as etcd has it: value, version, revision.
func last(t testing.TB, client *clientv3.Client, name string) (string, int64, Revision) {
	t.Helper()
	resp, err := client.Get(context.Background(), name)
	require.NoError(t, err)
	if len(resp.Kvs) == 0 {
		return "", 0, 0
	}
	return string(resp.Kvs[0].Value), resp.Kvs[0].Version, resp.Kvs[0].ModRevision
}

// A txn is a transaction that a client under test is about to send, and that writes.
type txn struct {
	ctx  context.Context
	send func() error // as if nothing had happened
	land func() error // to etcd, without the client's being told
}

// errLost is what a client gets when its connection breaks.
var errLost = status.Error(codes.Unavailable, "transport is closing")

// txnFaults does to a client's transactions that write what a test likes.
type txnFaults struct {
	fault atomic.Pointer[func(txn) error]
}

// each does this to each, nothing if it is nil.
func (f *txnFaults) each(fault func(txn) error) {
	if fault == nil {
		f.fault.Store(nil)
		return
	}
	f.fault.Store(&fault)
}

// inTurn does these to the next ones.
func (f *txnFaults) inTurn(faults ...func(txn) error) {
	var n atomic.Int32
	f.each(func(x txn) error {
		if i := int(n.Add(1)) - 1; i < len(faults) {
			return faults[i](x)
		}
		return x.send()
	})
}

func faultyClient(t *testing.T) (*clientv3.Client, *txnFaults) {
	t.Helper()
	faults := &txnFaults{}
	client := interceptedClient(t, func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		fault := faults.fault.Load()
		if fault == nil || !isWriteTxn(req) {
			return invoker(ctx, method, req, reply, cc, opts...)
		}
		return (*fault)(txn{
			ctx:  ctx,
			send: func() error { return invoker(ctx, method, req, reply, cc, opts...) },
			land: func() error {
				return invoker(context.WithoutCancel(ctx), method, req, new(etcdserverpb.TxnResponse), cc)
			},
		})
	})
	return client, faults
}

// writeUnknown writes v so that the outcome is unknown; applied says whether etcd has got it. land
// lets it arrive, late or once more.
func writeUnknown[T any](t *testing.T, w *LogWriter[T], faults *txnFaults, v T, applied bool) (land func() error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	faults.each(func(x txn) error {
		land = x.land
		if applied {
			if err := x.land(); err != nil {
				return err
			}
		}
		cancel()
		<-x.ctx.Done()
		return status.FromContextError(x.ctx.Err()).Err()
	})
	_, err := w.Write(ctx, v)
	require.ErrorIs(t, err, ErrUnknownOutcome)
	require.ErrorIs(t, err, context.Canceled)
	require.NotErrorIs(t, err, ErrLockLost)
	faults.each(nil)
	return land
}

func TestLogIsWrittenAndRead(t *testing.T) {
	t.Parallel()
	client, name := newClient(t, testCluster.Endpoints()...), nameOf(t)
	lock := mustAcquire(t, client, name)
	w := mustWriter[string](t, lock, name)
	mustWrite(t, w, 1, "a", "b", "c")
	r := mustReader[string](t, client, name)
	_, _, rev := last(t, client, name)
	require.Equal(t, Entry[string]{"c", 3, rev}, mustRead(t, r), "the current entry first")
	nothingToRead(t, r)
	mustWrite(t, w, 4, "d")
	mustReadValues(t, r, 4, "d")
	nothingToRead(t, r)
	require.NoError(t, r.Close())
	require.NoError(t, w.Close())
	require.NoError(t, lock.Close())
}

func TestLogThatIsDeletedStartsAgainAtVersionOneAndItsReadersGoOn(t *testing.T) {
	t.Parallel()
	client, name := newClient(t, testCluster.Endpoints()...), nameOf(t)
	lock := mustAcquire(t, client, name)
	w := mustWriter[string](t, lock, name)
	latest := mustReader[string](t, client, name)
	every := mustReader[string](t, client, name, WithEveryEntry(lock.Token()))
	mustWrite(t, w, 1, "a", "b", "c")
	hasHeard(t, latest, w.last.revision)
	mustReadValues(t, latest, 3, "c")
	mustDelete(t, client, name)
	nothingToRead(t, latest)
	mustWrite(t, w, 1, "d")
	mustReadValues(t, latest, 1, "d")
	mustDelete(t, client, name)
	mustWrite(t, mustWriter[string](t, lock, name), 1, "e")
	mustReadValues(t, latest, 1, "e")
	mustReadValues(t, every, 1, "a", "b", "c")
	mustReadValues(t, every, 1, "d")
	mustReadValues(t, every, 1, "e")
	nothingToRead(t, every)
}

func TestLogWriteUnderALostLockWritesNothing(t *testing.T) {
	t.Parallel()
	direct := testCluster.Client(t)
	for name, lose := range map[string]func(t *testing.T, lock *Lock, link *etcdtest.Link){
		"lease revoked": func(t *testing.T, lock *Lock, _ *etcdtest.Link) {
			_, err := direct.Revoke(t.Context(), lock.Lease().ID())
			require.NoError(t, err)
			within(t, 15*time.Second, lock.Done(), "told")
		},
		"key deleted": func(t *testing.T, lock *Lock, _ *etcdtest.Link) {
			time.Sleep(2 * keyWatchDelay)
			mustDelete(t, direct, lock.Key())
			within(t, 15*time.Second, lock.Done(), "told")
		},
		"key deleted, not yet told": func(t *testing.T, lock *Lock, _ *etcdtest.Link) {
			told := !doNotWatch(lock) // else it is as if its watch were on a dead connection
			mustDelete(t, direct, lock.Key())
			if told { // this machine is too slow for what is to be tested
				within(t, 15*time.Second, lock.Done(), "told")
			}
		},
		"cut off and expired": func(t *testing.T, lock *Lock, link *etcdtest.Link) {
			link.Cut()
			within(t, 10*time.Second, lock.Done(), "the lease expires")
			link.Heal()
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			client, link := linkedClient(t)
			// The lock is not lost before its time, on a slow machine too.
			lock := mustAcquire(t, client, nameOf(t), WithTTL(6*time.Second))
			w := mustWriter[string](t, lock, nameOf(t))
			mustWrite(t, w, 1, "a")
			lose(t, lock, link)
			for range 2 {
				_, err := w.Write(context.Background(), "b")
				require.ErrorIs(t, err, ErrLockLost)
				require.NotErrorIs(t, err, ErrUnknownOutcome)
			}
			require.EqualValues(t, 1, versionOf(t, direct, nameOf(t)))
			within(t, time.Second, w.Done(), "the writer ends with the lock")
			require.ErrorIs(t, context.Cause(w), ErrLockLost)
			require.ErrorIs(t, w.Close(), ErrLockLost)
			require.ErrorIs(t, w.Close(), ErrLockLost, "a second Close says the same")
		})
	}
}

func TestLogConflictIsNoLossOfTheLock(t *testing.T) {
	t.Parallel()
	direct := testCluster.Client(t)
	for name, c := range map[string]struct {
		before  []string
		meddle  func(t *testing.T, lock *Lock, log string)
		version int64 // that is there afterwards
	}{
		"put":                            {[]string{"a", "b"}, func(t *testing.T, _ *Lock, log string) { mustPut(t, direct, log, `"x"`) }, 3},
		"put of a log that is not there": {nil, func(t *testing.T, _ *Lock, log string) { mustPut(t, direct, log, `"x"`) }, 1},
		"delete and put, so that the version is the same": {[]string{"a"}, func(t *testing.T, _ *Lock, log string) {
			mustDelete(t, direct, log)
			mustPut(t, direct, log, `"a"`)
		}, 1},
		"another writer on the lock": {[]string{"a", "b"}, func(t *testing.T, lock *Lock, log string) {
			mustWrite(t, mustWriter[string](t, lock, log), 3, "other")
		}, 3},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			lock := mustAcquire(t, direct, nameOf(t))
			log := nameOf(t)
			w := mustWriter[string](t, lock, log)
			mustWrite(t, w, 1, c.before...)
			c.meddle(t, lock, log)
			value, version, rev := last(t, direct, log)
			require.Equal(t, c.version, version)

			for range 2 {
				_, err := w.Write(t.Context(), "mine")
				require.ErrorIs(t, err, ErrLogConflict)
				require.NotErrorIs(t, err, ErrLockLost)
				require.NotErrorIs(t, err, ErrUnknownOutcome)
				require.ErrorContains(t, err, fmt.Sprintf("version %d, revision %d", version, rev))
			}
			mustDelete(t, direct, log)
			_, err := w.Write(t.Context(), "mine")
			require.ErrorIs(t, err, ErrLogConflict, "a writer stays so, whatever becomes of the log")
			require.Zero(t, versionOf(t, direct, log))
			mustPut(t, direct, log, value)

			require.NoError(t, w.Err())
			require.NoError(t, lock.Err())
			alive, err := lock.Alive(t.Context())
			require.NoError(t, err)
			require.True(t, alive)
			_, err = lock.Commit(t.Context(), clientv3.OpPut(log+"-data", ""))
			require.NoError(t, err)
			mustWrite(t, mustWriter[string](t, lock, log), 2, "c", "d")
			_, err = w.Write(t.Context(), "mine")
			require.ErrorIs(t, err, ErrLogConflict)
			require.EqualValues(t, 3, versionOf(t, direct, log))
		})
	}
}

func TestLogWriteAfterALostReplyIsNoFailureAndNoSecondEntry(t *testing.T) {
	t.Parallel()
	client, link, opts := linkedLocker(t, false)
	direct := testCluster.Client(t)
	lock := mustAcquire(t, client, nameOf(t), opts...)
	w := mustWriter[string](t, lock, nameOf(t))
	every := mustReader[string](t, direct, nameOf(t), WithEveryEntry(lock.Token()))
	link.DropReplies()
	writing := start(func() (int64, error) { return w.Write(context.Background(), "a") })
	eventually(t, func() bool { return versionOf(t, direct, nameOf(t)) == 1 }, "the server has applied it")
	link.Heal()
	within(t, 15*time.Second, writing.done, "Write returns")
	require.NoError(t, writing.err)
	require.EqualValues(t, 1, writing.v)
	mustWrite(t, w, 2, "b")
	mustReadValues(t, every, 1, "a", "b")
}

func TestLogWriteIsAppliedOnceHoweverItsRepliesAreLost(t *testing.T) {
	t.Parallel()
	client, faults := faultyClient(t)
	lock := mustAcquire(t, client, nameOf(t))
	w := mustWriter[string](t, lock, nameOf(t))
	lose := func(err error) func(x txn) error {
		return func(x txn) error {
			if err := x.send(); err != nil {
				return err
			}
			return err
		}
	}
	version := int64(0)
	for _, err := range []error{
		errLost, status.Error(codes.Canceled, "a proxy's"), status.Error(codes.Internal, "stream terminated"), rpctypes.ErrGRPCNoSpace,
	} {
		faults.inTurn(lose(err), lose(err))
		version++
		mustWrite(t, w, version, err.Error())
		require.Equal(t, version, versionOf(t, client, nameOf(t)))
	}
}

// A Write's request is held back until after the Write has timed out. It lands before the next
// Write, under it, or after it.
func TestLogWriteThatLandsUnderTheNextOneIsReportedWronglyByNeither(t *testing.T) {
	t.Parallel()
	client, faults := faultyClient(t)
	lock := mustAcquire(t, client, nameOf(t))
	every := mustReader[string](t, client, nameOf(t), WithEveryEntry(lock.Token()))
	w := mustWriter[string](t, lock, nameOf(t))
	written := map[string]int64{}
	for round := range 30 {
		first, second := fmt.Sprint("first ", round), fmt.Sprint("second ", round)
		land := writeUnknown(t, w, faults, first, false)
		landing := start(func() (struct{}, error) {
			time.Sleep(time.Duration(round%10) * 50 * time.Microsecond)
			return struct{}{}, land()
		})
		version, err := w.Write(context.Background(), second)
		require.NoError(t, err)
		<-landing.done
		require.NoError(t, landing.err)
		written[second] = version
	}
	mustWrite(t, w, w.last.version+1, "end")
	for version, seen := int64(1), map[string]bool{}; ; version++ {
		e := mustRead(t, every)
		require.Equal(t, version, e.Version)
		require.False(t, seen[e.Value], "%q is there twice", e.Value)
		seen[e.Value] = true
		if e.Value == "end" {
			break
		}
		if reported, ok := written[e.Value]; ok {
			require.Equal(t, reported, e.Version)
			delete(written, e.Value)
		}
	}
	require.Empty(t, written, "what was reported as written is there")
}

func TestLogWriteAfterAnUnknownOutcomeFindsOutFirst(t *testing.T) {
	t.Parallel()
	direct := testCluster.Client(t)
	for name, c := range map[string]struct {
		applied bool
		then    func(t *testing.T, log string, land func() error)
		version int64 // of the next entry; 0: a conflict
	}{
		"applied":                   {true, nil, 4},
		"not applied":               {false, nil, 3},
		"applied late":              {false, func(t *testing.T, _ string, land func() error) { require.NoError(t, land()) }, 4},
		"applied, deleted":          {true, func(t *testing.T, log string, _ func() error) { mustDelete(t, direct, log) }, 1},
		"not applied, deleted":      {false, func(t *testing.T, log string, _ func() error) { mustDelete(t, direct, log) }, 1},
		"applied, written over":     {true, func(t *testing.T, log string, _ func() error) { mustPut(t, direct, log, "x") }, 0},
		"not applied, written over": {false, func(t *testing.T, log string, _ func() error) { mustPut(t, direct, log, "x") }, 0},
		"written over, arrives late": {false, func(t *testing.T, log string, land func() error) {
			mustPut(t, direct, log, "x")
			require.NoError(t, land())
		}, 0},
		"applied, deleted, written by another": {true, func(t *testing.T, log string, _ func() error) {
			mustDelete(t, direct, log)
			mustPut(t, direct, log, `"c"`)
		}, 0},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			client, faults := faultyClient(t)
			lock := mustAcquire(t, client, nameOf(t))
			w := mustWriter[string](t, lock, nameOf(t))
			mustWrite(t, w, 1, "a", "b")
			land := writeUnknown(t, w, faults, "c", c.applied)
			if c.then != nil {
				c.then(t, nameOf(t), land)
			}
			if c.version == 0 {
				for range 2 {
					_, err := w.Write(t.Context(), "d")
					require.ErrorIs(t, err, ErrLogConflict)
				}
				return
			}
			mustWrite(t, w, c.version, "d")
			require.NoError(t, land(), "once more")
			mustWrite(t, w, c.version+1, "e")
			value, version, _ := last(t, client, nameOf(t))
			require.Equal(t, `"e"`, value)
			require.Equal(t, c.version+1, version)
		})
	}
}

func TestLogWriteOfUnknownOutcomeThatLandsBetweenLookingAndWritingIsNoConflict(t *testing.T) {
	t.Parallel()
	client, faults := faultyClient(t)
	lock := mustAcquire(t, client, nameOf(t))
	w := mustWriter[string](t, lock, nameOf(t))
	land := writeUnknown(t, w, faults, "a", false)
	faults.inTurn(func(x txn) error {
		if err := land(); err != nil {
			return err
		}
		return x.send()
	})
	mustWrite(t, w, 2, "b")
}

func TestLogWriteOfUnknownOutcomeIsRecognizedThoughItsBufferIsUsedAgain(t *testing.T) {
	t.Parallel()
	client, faults := faultyClient(t)
	w := mustWriter[[]byte](t, mustAcquire(t, client, nameOf(t)), nameOf(t), WithCodec(Raw))
	buffer := []byte("first")
	writeUnknown(t, w, faults, buffer, true)
	copy(buffer, "again")
	mustWrite(t, w, 2, buffer)
}

func TestLogWriterIsNotSurprisedByWhatAnEarlierOneLeftOpen(t *testing.T) {
	t.Parallel()
	client, faults := faultyClient(t)
	lock := mustAcquire(t, client, nameOf(t))
	first := mustWriter[string](t, lock, nameOf(t))
	land := writeUnknown(t, first, faults, "a", false)
	require.NoError(t, first.Close())
	second := mustWriter[string](t, lock, nameOf(t))
	require.NoError(t, land())
	mustWrite(t, second, 1, "b")
}

// The first attempt is held back, and somebody writes the log before the second. Were that all, the
// first could still be applied when it arrives, for the log may be deleted by then. In a log that
// was not there it may have been applied and deleted before the other one wrote.
func TestLogWriteInConflictCanNoLongerArrive(t *testing.T) {
	t.Parallel()
	direct := testCluster.Client(t)
	for name, before := range map[string][]string{"a log that is there": {"0"}, "a log that is not": nil} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			client, faults := faultyClient(t)
			w := mustWriter[string](t, mustAcquire(t, client, nameOf(t)), nameOf(t))
			mustWrite(t, w, 1, before...)
			var land func() error
			faults.inTurn(
				func(x txn) error { land = x.land; return errLost },
				func(x txn) error { mustPut(t, direct, nameOf(t), `"x"`); return x.send() },
			)
			_, err := w.Write(t.Context(), "a")
			if before == nil {
				require.ErrorIs(t, err, ErrUnknownOutcome)
				_, err = w.Write(t.Context(), "a")
			}
			require.ErrorIs(t, err, ErrLogConflict)
			mustDelete(t, direct, nameOf(t))
			require.NoError(t, land())
			require.Zero(t, versionOf(t, direct, nameOf(t)))
		})
	}
}

// clientv3 repeats by itself what was answered Canceled, and returns only the second result.
func TestLogWriteThatClientv3HasSentTwiceIsNotTakenForAnothers(t *testing.T) {
	t.Parallel()
	client, faults := faultyClient(t)
	lock := mustAcquire(t, client, nameOf(t))
	w := mustWriter[string](t, lock, nameOf(t))
	twice := func() {
		faults.inTurn(
			func(x txn) error { return errors.Join(x.send(), status.Error(codes.Canceled, "a proxy's")) },
			func(x txn) error { return rpctypes.ErrGRPCPermissionDenied },
		)
	}
	twice()
	mustWrite(t, w, 1, "a")
	mustWrite(t, w, 2, "b")

	twice()
	key := nameOf(t) + "-committed"
	_, err := lock.Commit(t.Context(), clientv3.OpPut(key, "a"))
	require.NoError(t, err)
	_, err = lock.Commit(t.Context(), clientv3.OpPut(key, "b"))
	require.NoError(t, err)
	value, _, _ := last(t, client, key)
	require.Equal(t, "b", value)
}

func TestLogWriterThatLostItsLockDoesNotTakeTheNextOnesEntryForItsOwn(t *testing.T) {
	t.Parallel()
	client := testCluster.Client(t)
	lost := mustAcquire(t, client, nameOf(t))
	late := mustWriter[string](t, lost, nameOf(t))
	mustDelete(t, client, lost.Key())
	mustWrite(t, mustWriter[string](t, mustAcquire(t, client, nameOf(t)), nameOf(t)), 1, "tick")
	_, err := late.Write(t.Context(), "tick")
	require.Error(t, err)
	require.NotErrorIs(t, err, ErrLogConflict)
}

// As above, but the log is deleted and the first attempt arrives before that has been prevented.
func TestLogWriteThatArrivesAfterAllWhileItsConflictIsSettledIsNotDenied(t *testing.T) {
	t.Parallel()
	direct := testCluster.Client(t)
	client, faults := faultyClient(t)
	w := mustWriter[string](t, mustAcquire(t, client, nameOf(t)), nameOf(t))
	var land func() error
	faults.inTurn(
		func(x txn) error { land = x.land; return errLost },
		func(x txn) error {
			mustPut(t, direct, nameOf(t), `"x"`)
			err := x.send()
			mustDelete(t, direct, nameOf(t))
			return errors.Join(err, land())
		},
	)
	_, err := w.Write(t.Context(), "a")
	value, version, _ := last(t, direct, nameOf(t))
	require.Equal(t, `"a"`, value, "it was applied")
	require.EqualValues(t, 1, version)
	require.NoError(t, err)
	mustWrite(t, w, 2, "b")
}

// A lock ends before its key is gone, and until then etcd still applies what was sent.
func TestLogWriteThatArrivesAfterItsLockHasEndedIsNotDenied(t *testing.T) {
	t.Parallel()
	client, faults := faultyClient(t)
	once := WithRetryPolicy(RetryPolicy{Attempts: 1})
	for name, refuse := range map[string]func(txn) error{
		"refused": func(txn) error { return rpctypes.ErrGRPCRequestTooManyRequests },
		"lost":    func(txn) error { return errLost },
	} {
		key := nameOf(t) + name
		lock := mustAcquire(t, client, key, WithTTL(time.Minute), once)
		w := mustWriter[string](t, lock, key)
		var land func() error
		faults.inTurn(func(x txn) error {
			land = x.land
			lock.markLost(ErrLeaseExpired)
			return errLost
		}, refuse)
		_, err := w.Write(t.Context(), "a")
		require.ErrorIs(t, err, ErrUnknownOutcome, name)
		require.NotErrorIs(t, err, ErrLockLost, name)
		require.NoError(t, land(), name)
		require.EqualValues(t, 1, versionOf(t, client, key), name)
	}
}

// Without its lock's key a Write that is still under way can no longer arrive, and the log shows
// that it has not.
func TestLogWriteWhoseLocksKeyIsGoneIsDenied(t *testing.T) {
	t.Parallel()
	client, faults := faultyClient(t)
	direct := testCluster.Client(t)
	var rounds int
	eventually(t, func() bool {
		rounds++
		key := fmt.Sprint(nameOf(t), rounds)
		lock := mustAcquire(t, client, key, WithRetryPolicy(RetryPolicy{Attempts: 1}))
		w := mustWriter[string](t, lock, key)
		var land func() error
		faults.inTurn(func(x txn) error { land = x.land; mustDelete(t, direct, lock.Key()); return errLost })
		_, err := w.Write(t.Context(), "a")
		require.NoError(t, land())
		require.Zero(t, versionOf(t, client, key))
		return errors.Is(err, ErrLockLost) // unless there was no time to read that
	}, "it is denied")
}

func TestLogWriteOfTooMuchIsRefusedAndChangesNothing(t *testing.T) {
	t.Parallel()
	client := testCluster.Client(t)
	w := mustWriter[string](t, mustAcquire(t, client, nameOf(t)), nameOf(t), WithCodec(Raw))
	mustWrite(t, w, 1, "a")
	for size, says := range map[int]string{1600 << 10: "too large", 3 << 20: "larger than max"} {
		var err error
		took := testclock.Time(func() { _, err = w.Write(t.Context(), strings.Repeat("x", size)) })
		require.ErrorContains(t, err, says)
		require.ErrorContains(t, err, fmt.Sprint(size, " bytes"))
		require.NotErrorIs(t, err, ErrUnknownOutcome)
		require.NotErrorIs(t, err, ErrLogConflict)
		require.Less(t, took, 5*time.Second, "and not tried again")
		require.EqualValues(t, 1, versionOf(t, client, nameOf(t)))
	}
	mustWrite(t, w, 2, "b", strings.Repeat("x", 1500_000))
}

func TestLogValueThatCannotBeEncodedIsNotSent(t *testing.T) {
	t.Parallel()
	client, requests := countingClient(t, isKeyCheck)
	lock := mustAcquire(t, client, nameOf(t))
	encoded := mustWriter[any](t, lock, nameOf(t))
	raw := mustWriter[any](t, lock, nameOf(t), WithCodec(Raw))
	requests.Store(0)
	for _, v := range []any{make(chan int), func() {}, map[string]any{"f": func() {}}} {
		_, err := encoded.Write(t.Context(), v)
		require.ErrorContains(t, err, "v cannot be encoded")
	}
	_, err := raw.Write(t.Context(), 1)
	require.ErrorContains(t, err, "v cannot be encoded")
	require.ErrorContains(t, err, "not int")
	require.Zero(t, requests.Load())
	mustWrite(t, encoded, 1, any("a"))
}

func TestLogWriterWindsDownUntilItOrItsLockIsClosed(t *testing.T) {
	t.Parallel()
	client, requests := countingClient(t, isKeyCheck)
	parent, cancel := context.WithCancelCause(context.Background())
	lock, err := Acquire(parent, client, nameOf(t))
	require.NoError(t, err)
	defer func() { _ = lock.Close() }()
	closed := mustWriter[string](t, lock, nameOf(t))
	w := mustWriter[string](t, lock, nameOf(t))
	mustWrite(t, w, 1, "a")
	shutdown := errors.New("shutting down")
	cancel(shutdown)
	within(t, time.Second, w.Done(), "the writer ends with the lock's parent")
	require.ErrorIs(t, context.Cause(w), shutdown)
	mustWrite(t, w, 2, "b")
	later := mustWriter[string](t, lock, nameOf(t))
	mustWrite(t, later, 3, "c")
	require.NoError(t, later.Close(), "a parent's end is no loss")

	requests.Store(0)
	require.NoError(t, closed.Close())
	require.NoError(t, closed.Close())
	for _, closed := range []*LogWriter[string]{closed, later} {
		_, err = closed.Write(t.Context(), "late")
		require.ErrorIs(t, err, ErrClosed)
	}
	require.Zero(t, requests.Load())
	require.NoError(t, lock.Close())
	_, err = w.Write(t.Context(), "late")
	require.ErrorIs(t, err, ErrClosed)
	require.NotErrorIs(t, err, ErrUnknownOutcome)
	require.EqualValues(t, 3, versionOf(t, client, nameOf(t)))
	require.NoError(t, w.Close())
}

func TestLogWriterEndsWithItsLockOrOnClose(t *testing.T) {
	t.Parallel()
	client := testCluster.Client(t)
	lock := mustAcquire(t, client, nameOf(t))
	first, second := mustWriter[string](t, lock, nameOf(t)), mustWriter[string](t, lock, nameOf(t))
	require.NoError(t, first.Close())
	require.ErrorIs(t, context.Cause(first), ErrClosed)
	require.NoError(t, lock.Err(), "the lock is not touched")
	require.NoError(t, second.Err())
	found, ok := LockFrom(second)
	require.True(t, ok)
	require.Same(t, lock, found)
	require.NoError(t, lock.Close())
	require.ErrorIs(t, context.Cause(second), ErrClosed)
	require.NoError(t, second.Close())
}

func TestLogWritesTakeTurns(t *testing.T) {
	t.Parallel()
	client := testCluster.Client(t)
	lock := mustAcquire(t, client, nameOf(t))
	w := mustWriter[int](t, lock, nameOf(t))
	every := mustReader[int](t, client, nameOf(t), WithEveryEntry(lock.Token()))
	const writers, each = 20, 5
	var written [writers * each]atomic.Int64 // versions by value
	var all sync.WaitGroup
	for i := range writers {
		all.Go(func() {
			for j := range each {
				version, err := w.Write(context.Background(), i*each+j)
				if err != nil {
					t.Error(err)
				}
				written[i*each+j].Store(version)
			}
		})
	}
	all.Wait()
	for version := int64(1); version <= writers*each; version++ {
		e := mustRead(t, every)
		require.Equal(t, version, e.Version)
		require.Equal(t, version, written[e.Value].Load())
	}
}

func TestLogWriteEndsWithItsContextWhileItWaitsForItsTurn(t *testing.T) {
	t.Parallel()
	client, faults := faultyClient(t)
	w := mustWriter[string](t, mustAcquire(t, client, nameOf(t)), nameOf(t))
	held, goOn := make(chan struct{}), make(chan struct{})
	faults.inTurn(func(x txn) error { close(held); <-goOn; return x.send() })
	writing := start(func() (int64, error) { return w.Write(context.Background(), "a") })
	<-held
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	_, err := w.Write(ctx, "b")
	require.ErrorIs(t, err, context.DeadlineExceeded)
	require.NotErrorIs(t, err, ErrUnknownOutcome, "nothing was sent")
	closing := start(func() (int64, error) { return 0, w.Close() })
	within(t, time.Second, closing.done, "Close does not wait for a Write")
	close(goOn)
	within(t, 5*time.Second, writing.done, "a Write that is under way goes on")
	require.NoError(t, writing.err)
	require.EqualValues(t, 1, versionOf(t, client, nameOf(t)))
}

func TestLogWriterHasTheRetryPolicyOfItsLockUnlessGivenItsOwn(t *testing.T) {
	t.Parallel()
	hasty := WithRetryPolicy(RetryPolicy{Elapsed: 2 * time.Second})
	for name, c := range map[string]struct {
		lock []LockOption
		log  []LogOption
	}{"the lock's": {lock: []LockOption{hasty}}, "its own": {log: []LogOption{hasty}}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			client, link := linkedClient(t)
			lock := mustAcquire(t, client, nameOf(t), append(c.lock, WithTTL(time.Minute))...)
			w := mustWriter[string](t, lock, nameOf(t), c.log...)
			link.Cut()
			writing := start(func() (int64, error) { return w.Write(context.Background(), "a") })
			within(t, 10*time.Second, writing.done, "it gives up")
			require.ErrorIs(t, writing.err, ErrUnknownOutcome)
			link.Heal()
			eventually(t, func() bool { _, err := w.Write(context.Background(), "b"); return err == nil }, "the next Write")
		})
	}
}

func TestLogArgumentsThatMakeNoSenseAreRefusedByName(t *testing.T) {
	t.Parallel()
	client, requests := countingClient(t, isKeyCheck)
	lock, name := mustAcquire(t, client, nameOf(t)), nameOf(t)
	closed := mustAcquire(t, client, name+"-closed")
	require.NoError(t, closed.Close())
	lost := mustAcquire(t, client, name+"-lost")
	mustDelete(t, client, lost.Key())
	within(t, 5*time.Second, lost.Done(), "told")
	_ = lost.Close()
	requests.Store(0)
	write := func(lock *Lock, name string, opts ...LogOption) error {
		w, err := NewLogWriter[string](t.Context(), lock, name, opts...)
		require.Nil(t, w)
		return err
	}
	readOf := func(name string, opts ...LogOption) error {
		r, err := NewLogReader[string](t.Context(), client, name, opts...)
		require.Nil(t, r)
		return err
	}
	require.ErrorContains(t, write(nil, name), "lock is nil")
	require.ErrorIs(t, write(lost, name), ErrLockLost)
	require.ErrorIs(t, write(closed, name), ErrClosed)
	require.NotErrorIs(t, write(closed, name), ErrLockLost)
	require.ErrorContains(t, write(lock, lock.Key()), "name is the lock's own key")
	require.ErrorContains(t, write(lock, name, WithEveryEntry(0)), "WithEveryEntry")
	require.ErrorContains(t, readOf(name, WithEveryEntry(-1)), "WithEveryEntry is negative: -1")
	for what, of := range map[string]func(name string, opts ...LogOption) error{
		"writer": func(name string, opts ...LogOption) error { return write(lock, name, opts...) },
		"reader": readOf,
	} {
		for _, bad := range []string{"", "a\x00b", "a\xff", strings.Repeat("x", 513)} {
			err := of(bad)
			require.ErrorIs(t, err, ErrInvalidName, what)
			require.ErrorContains(t, err, "name", what)
		}
		require.ErrorContains(t, of(name, WithCodec(nil)), "WithCodec: the codec is nil", what)
		require.ErrorContains(t, of(name, WithRetryPolicy(RetryPolicy{Attempts: -1})), "RetryPolicy.Attempts", what)
		require.ErrorContains(t, of(name, WithEveryEntry(-1)), "WithEveryEntry", what)
	}
	_, err := NewLogReader[string](t.Context(), clientv3.NewCtxClient(t.Context()), name)
	require.ErrorContains(t, err, "client has no connection")
	require.Zero(t, requests.Load(), "nothing was sent")

	w, r := mustWriter[string](t, lock, name), mustReader[string](t, client, name)
	var none context.Context
	for what, f := range map[string]func(){
		"NewLogWriter, nil ctx":    func() { _, _ = NewLogWriter[string](none, lock, name) },
		"NewLogReader, nil ctx":    func() { _, _ = NewLogReader[string](none, client, name) },
		"NewLogReader, nil client": func() { _, _ = NewLogReader[string](t.Context(), nil, name) },
		"Write, nil ctx":           func() { _, _ = w.Write(none, "") },
		"Read, nil ctx":            func() { _, _ = r.Read(none) },
	} {
		require.Panics(t, f, what)
	}
	mustWriter[string](t, lock, (nameOf(t) + strings.Repeat("x", 512))[:512]) // is allowed
}

// newLog is a log on an etcd of its own, which a test may compact.
func newLog(t *testing.T) (cluster *etcdtest.Cluster, w *LogWriter[string], client *clientv3.Client) {
	t.Helper()
	cluster = etcdtest.Start(t, 1)
	client = cluster.Client(t)
	lock := mustAcquire(t, client, nameOf(t), WithTTL(time.Minute))
	return cluster, mustWriter[string](t, lock, nameOf(t)), client
}

func TestLogReaderThatIsSlowerThanTheWriterSkipsToTheLatest(t *testing.T) {
	t.Parallel()
	client := testCluster.Client(t)
	w := mustWriter[int](t, mustAcquire(t, client, nameOf(t)), nameOf(t))
	r := mustReader[int](t, client, nameOf(t))
	for from := int64(1); from < 30; from += 10 {
		for i := range int64(10) {
			mustWrite(t, w, from+i, int(from+i))
		}
		hasHeard(t, r, w.last.revision)
		mustReadValues(t, r, from+9, int(from+9))
	}
	nothingToRead(t, r)
}

// bothWays runs a test of a log for readers of the latest entry, and for readers of every entry
// since lock was acquired.
func bothWays(t *testing.T, test func(t *testing.T, client *clientv3.Client, lock *Lock, opts ...LogOption)) {
	t.Helper()
	for _, every := range []bool{false, true} {
		t.Run(map[bool]string{false: "latest", true: "every"}[every], func(t *testing.T) {
			t.Parallel()
			client := testCluster.Client(t)
			lock := mustAcquire(t, client, nameOf(t))
			if every {
				test(t, client, lock, WithEveryEntry(lock.Token()))
			} else {
				test(t, client, lock)
			}
		})
	}
}

func TestLogReaderOfALogThatIsNotThereWaitsForIt(t *testing.T) {
	t.Parallel()
	bothWays(t, func(t *testing.T, client *clientv3.Client, lock *Lock, opts ...LogOption) {
		r := mustReader[string](t, client, nameOf(t), opts...)
		nothingToRead(t, r)
		reading := start(func() (Entry[string], error) { return r.Read(context.Background()) })
		w := mustWriter[string](t, lock, nameOf(t))
		mustWrite(t, w, 1, "a")
		within(t, 15*time.Second, reading.done, "Read returns")
		require.NoError(t, reading.err)
		require.Equal(t, Entry[string]{"a", 1, w.last.revision}, reading.v)
	})
}

func TestLogReaderReadsEveryEntryInOrderFromARevisionOn(t *testing.T) {
	t.Parallel()
	_, w, client := newLog(t)
	var entries []Entry[string]
	write := func(n int) {
		for range n {
			value, version := fmt.Sprint(len(entries)+1), int64(len(entries)+1)
			mustWrite(t, w, version, value)
			entries = append(entries, Entry[string]{value, version, w.last.revision})
			mustPut(t, client, "other", "")
		}
	}
	write(10)
	end := w.last.revision
	readers := map[Revision]*LogReader[string]{}
	for _, from := range []Revision{0, 1, entries[0].Revision, entries[0].Revision + 1, entries[4].Revision, end, end + 1} {
		readers[from] = mustReader[string](t, client, nameOf(t), WithEveryEntry(from))
		for _, e := range entries {
			if e.Revision >= from {
				require.Equal(t, e, mustRead(t, readers[from]), "from %d", from)
			}
		}
	}
	nothingToRead(t, readers[0])
	write(5)
	for from, r := range readers {
		for _, e := range entries[10:] {
			if e.Revision >= from {
				require.Equal(t, e, mustRead(t, r), "from %d", from)
			}
		}
		nothingToRead(t, r)
	}
}

func TestLogReaderFromACompactedRevisionIsAGapAtOnce(t *testing.T) {
	t.Parallel()
	_, w, client := newLog(t)
	mustWrite(t, w, 1, "a", "b", "c", "d")
	mustCompact(t, client, w.last.revision)
	for _, from := range []Revision{0, 1, 2, w.last.revision - 2} {
		_, err := NewLogReader[string](t.Context(), client, nameOf(t), WithEveryEntry(from))
		require.ErrorIs(t, err, ErrGap, "from %d", from)
	}
	mustReadValues(t, mustReader[string](t, client, nameOf(t)), 4, "d")
	r := mustReader[string](t, client, nameOf(t), WithEveryEntry(w.last.revision+1))
	mustWrite(t, w, 5, "e")
	mustReadValues(t, r, 5, "e")
}

// gap cuts a reader off, and has entries compacted that it has not heard of. It has heard of all
// that were there when it was made, if it has read one of them: they come together.
func gap(t *testing.T, link *etcdtest.Link, w *LogWriter[string], client *clientv3.Client) {
	t.Helper()
	link.Cut()
	next := w.last.version + 1
	mustWrite(t, w, next, "missed", "missed", "latest")
	mustCompact(t, client, w.last.revision)
	// The server may not have sent it yet. Then nothing was lost, and Heal spares the connection.
	link.Reset()
	link.Heal()
}

func linked(t *testing.T, cluster *etcdtest.Cluster) (*clientv3.Client, *etcdtest.Link) {
	t.Helper()
	link := etcdtest.StartLink(t, cluster.Endpoints()[0])
	return newClient(t, link.Endpoint()), link
}

// Where it is compacted again between two reads, the reader looks again.
func TestLogReaderOutlivesACompactionWhileItBegins(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 1)
	direct := cluster.Client(t)
	w := mustWriter[string](t, mustAcquire(t, direct, "lock"), "log")
	var revs []Revision
	for range 3 {
		_, err := w.Write(t.Context(), "entry")
		require.NoError(t, err)
		revs = append(revs, revision(t, direct))
	}
	_, err := direct.Compact(t.Context(), revs[1])
	require.NoError(t, err)
	client := clientOf(t, cluster, func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		if r, ok := req.(*etcdserverpb.RangeRequest); ok && r.Revision == revs[1] {
			_, err := direct.Compact(ctx, revs[2])
			require.NoError(t, err)
		}
		return invoke(ctx, method, req, reply, cc, opts...)
	})
	_, err = NewLogReader[string](t.Context(), client, "log", WithEntriesAfter(1, revs[0]))
	require.ErrorIs(t, err, ErrGap)
}

func TestLogReaderReadsTheEntriesBeforeAGapAndThenReturnsErrGap(t *testing.T) {
	t.Parallel()
	cluster, w, client := newLog(t)
	far, link := linked(t, cluster)
	mustWrite(t, w, 1, "a", "b", "c")
	every := mustReader[string](t, far, nameOf(t), WithEveryEntry(0))
	all := mustReader[string](t, far, nameOf(t), WithEveryEntry(0))
	latest := mustReader[string](t, far, nameOf(t))
	mustReadValues(t, every, 1, "a")
	mustReadValues(t, all, 1, "a")
	mustReadValues(t, latest, 3, "c")
	gap(t, link, w, client)

	mustReadValues(t, latest, 6, "latest")
	nothingToRead(t, latest)
	mustReadValues(t, every, 2, "b", "c")
	for range 2 {
		_, err := read(t, every)
		require.ErrorIs(t, err, ErrGap)
	}
	require.ErrorIs(t, context.Cause(every), ErrGap)
	require.ErrorIs(t, every.Close(), ErrGap)
	require.ErrorIs(t, every.Close(), ErrGap, "a second Close says the same")

	var told []error
	var values []string
	for e, err := range all.All() {
		if err != nil {
			told = append(told, err)
			continue
		}
		values = append(values, e.Value)
	}
	require.Equal(t, []string{"b", "c"}, values)
	require.Len(t, told, 1, "once")
	require.ErrorIs(t, told[0], ErrGap)
}

// slowError takes its time to say what is wrong.
type slowError struct{}

func (slowError) Error() string {
	time.Sleep(20 * time.Millisecond)
	return "slow"
}

type refusingCodec struct{ Codec }

func (c refusingCodec) Unmarshal(data []byte, v any) error {
	if string(data) == "{" {
		return slowError{}
	}
	return c.Codec.Unmarshal(data, v)
}

func TestLogReaderReturnsErrGapThoughTheEntryBeforeItDoesNotDecode(t *testing.T) {
	t.Parallel()
	cluster, w, client := newLog(t)
	far, link := linked(t, cluster)
	mustWrite(t, w, 1, "a")
	mustPut(t, client, nameOf(t), "{")
	r := mustReader[string](t, far, nameOf(t), WithEveryEntry(0), WithCodec(refusingCodec{JSON}))
	mustReadValues(t, r, 1, "a")
	gap(t, link, mustWriter[string](t, w.lock, nameOf(t)), client)
	eventually(t, r.watcher.queue.ending, "only our reading keeps it from ending")
	var told []error
	for _, err := range r.All() { // it ends while the first error is made
		told = append(told, err)
	}
	require.Len(t, told, 2)
	require.ErrorContains(t, told[0], "version 2 does not decode: invalid value: slow")
	require.ErrorIs(t, told[0], ErrInvalidValue)
	require.ErrorIs(t, told[1], ErrGap)
}

func TestLogReaderAllEndsWhenTheLoopIsLeftAndGoesOnInTheNext(t *testing.T) {
	t.Parallel()
	client := testCluster.Client(t)
	lock := mustAcquire(t, client, nameOf(t))
	mustWrite(t, mustWriter[string](t, lock, nameOf(t)), 1, "a", "b", "c")
	r := mustReader[string](t, client, nameOf(t), WithEveryEntry(lock.Token()))
	for version := int64(1); version <= 3; version++ {
		for e, err := range r.All() {
			require.NoError(t, err)
			require.Equal(t, version, e.Version)
			break
		}
	}
	require.NoError(t, r.Err(), "it is the reader that goes on")
}

func TestLogReaderAllEndsWithoutAnErrorOnCloseAndWithTheParent(t *testing.T) {
	t.Parallel()
	shutdown := errors.New("shutting down")
	bothWays(t, func(t *testing.T, client *clientv3.Client, lock *Lock, opts ...LogOption) {
		mustWrite(t, mustWriter[string](t, lock, nameOf(t)), 1, "a")
		for how, c := range map[string]struct {
			end func(r *LogReader[string], cancel context.CancelCauseFunc)
			is  []error
		}{
			"Close":  {func(r *LogReader[string], _ context.CancelCauseFunc) { _ = r.Close() }, []error{ErrClosed}},
			"parent": {func(_ *LogReader[string], cancel context.CancelCauseFunc) { cancel(shutdown) }, []error{shutdown, context.Canceled}},
		} {
			parent, cancel := context.WithCancelCause(context.Background())
			r, err := NewLogReader[string](parent, client, nameOf(t), opts...)
			require.NoError(t, err)
			got := make(chan struct{})
			looping := start(func() (n int, _ error) {
				for _, err := range r.All() {
					if err != nil {
						return n, err
					}
					if n++; n == 1 {
						close(got)
					}
				}
				return n, nil
			})
			within(t, 15*time.Second, got, "an entry")
			c.end(r, cancel)
			within(t, 5*time.Second, looping.done, how)
			require.NoError(t, looping.err, how)
			require.Equal(t, 1, looping.v)
			_, err = r.Read(context.Background())
			for _, is := range c.is {
				require.ErrorIs(t, err, is, how)
			}
			for range r.All() {
				require.FailNow(t, "nothing more", how)
			}
			require.NoError(t, r.Close(), how)
			cancel(nil)
		}
	})
}

func TestLogEntryThatDoesNotDecodeIsAnErrorAndTheReaderGoesOn(t *testing.T) {
	t.Parallel()
	bothWays(t, func(t *testing.T, client *clientv3.Client, lock *Lock, opts ...LogOption) {
		r := mustReader[string](t, client, nameOf(t), opts...)
		mustWrite(t, mustWriter[string](t, lock, nameOf(t)), 1, "a")
		mustReadValues(t, r, 1, "a")
		rev := mustPut(t, client, nameOf(t), "{")
		e, err := read(t, r)
		require.ErrorContains(t, err, "version 2 does not decode")
		require.ErrorContains(t, err, nameOf(t))
		require.Equal(t, Entry[string]{"", 2, rev}, e)
		require.NoError(t, r.Err())
		mustPut(t, client, nameOf(t), "{")
		version := int64(3)
		for e, err := range r.All() {
			require.Equal(t, version, e.Version)
			if version++; version > 4 {
				require.NoError(t, err)
				require.Equal(t, "b", e.Value)
				break
			}
			require.ErrorContains(t, err, "version 3 does not decode")
			mustWrite(t, mustWriter[string](t, lock, nameOf(t)), 4, "b")
		}
	})
}

func TestLogReaderGoesOnAfterResets(t *testing.T) {
	t.Parallel()
	client, link := linkedClient(t)
	direct := testCluster.Client(t)
	lock := mustAcquire(t, direct, nameOf(t))
	w := mustWriter[int](t, lock, nameOf(t))
	every := mustReader[int](t, client, nameOf(t), WithEveryEntry(lock.Token()))
	latest := mustReader[int](t, client, nameOf(t))
	const entries = 100
	writing := start(func() (int64, error) {
		for i := range entries {
			if i%20 == 10 {
				link.Reset()
			}
			if _, err := w.Write(context.Background(), i+1); err != nil {
				return 0, err
			}
		}
		return 0, nil
	})
	for i := range entries {
		mustReadValues(t, every, int64(i+1), i+1)
	}
	for before := int64(0); before < entries; {
		e := mustRead(t, latest)
		require.Greater(t, e.Version, before)
		require.EqualValues(t, e.Version, e.Value)
		before = e.Version
	}
	<-writing.done
	require.NoError(t, writing.err)
	nothingToRead(t, every)
	nothingToRead(t, latest)
}

// countingCodec counts what it has decoded.
type countingCodec struct {
	Codec
	decoded atomic.Int64
}

func (c *countingCodec) Unmarshal(data []byte, v any) error {
	defer c.decoded.Add(1)
	return c.Codec.Unmarshal(data, v)
}

func TestLogReadEndsPromptlyWithItsContext(t *testing.T) {
	t.Parallel()
	bothWays(t, func(t *testing.T, client *clientv3.Client, _ *Lock, opts ...LogOption) {
		codec := &countingCodec{Codec: JSON}
		r := mustReader[string](t, client, nameOf(t), append(opts, WithCodec(codec))...)
		ctx, cancel := context.WithCancelCause(context.Background())
		reading := start(func() (Entry[string], error) { return r.Read(ctx) })
		enough := errors.New("enough")
		cancel(enough)
		within(t, time.Second, reading.done, "Read returns")
		require.ErrorIs(t, reading.err, context.Canceled)
		require.ErrorIs(t, reading.err, enough)
		require.NoError(t, r.Err(), "the reader goes on")

		rev := mustPut(t, client, nameOf(t), `"a"`)
		eventually(t, func() bool { return codec.decoded.Load() > 0 }, "there is something to read")
		for range 20 {
			_, err := r.Read(ctx)
			require.ErrorIs(t, err, enough, "which is not read after ctx has ended")
			time.Sleep(time.Millisecond)
		}
		require.Equal(t, Entry[string]{"a", 1, rev}, mustRead(t, r))
	})
}

func TestLogReaderSharedByGoroutinesReadsEachEntryOnce(t *testing.T) {
	t.Parallel()
	bothWays(t, func(t *testing.T, client *clientv3.Client, lock *Lock, opts ...LogOption) {
		const entries = 100
		r := mustReader[int](t, client, nameOf(t), opts...)
		read := [2][]int64{}
		var all sync.WaitGroup
		for i := range read {
			all.Go(func() {
				for {
					e, err := r.Read(context.Background())
					if errors.Is(err, ErrClosed) {
						return
					}
					if err != nil {
						t.Error(err)
						return
					}
					if read[i] = append(read[i], e.Version); e.Version == entries {
						_ = r.Close() // and the other gets the end
					}
				}
			})
		}
		w := mustWriter[int](t, lock, nameOf(t))
		for i := range entries {
			mustWrite(t, w, int64(i+1), i)
		}
		all.Wait()
		require.True(t, slices.IsSorted(read[0]))
		require.True(t, slices.IsSorted(read[1]))
		both := append(read[0], read[1]...)
		slices.Sort(both)
		require.Len(t, slices.Compact(slices.Clone(both)), len(both), "each once")
		require.EqualValues(t, entries, both[len(both)-1])
		if len(opts) > 0 {
			require.Len(t, both, entries)
		}
	})
}

func TestLogOfRawHoldsStringsAndBytesAsTheyAre(t *testing.T) {
	t.Parallel()
	client := testCluster.Client(t)
	lock := mustAcquire(t, client, nameOf(t))
	texts, bytes := mustWriter[string](t, lock, nameOf(t)+"-s", WithCodec(Raw)), mustWriter[[]byte](t, lock, nameOf(t)+"-b", WithCodec(Raw))
	from := WithEveryEntry(lock.Token())
	textsRead := mustReader[string](t, client, nameOf(t)+"-s", WithCodec(Raw), from)
	bytesRead := mustReader[[]byte](t, client, nameOf(t)+"-b", WithCodec(Raw), from)
	numbers := mustReader[int](t, client, nameOf(t)+"-b", WithCodec(Raw), from)
	for i, v := range []string{"{", "", "\x00\xff"} {
		mustWrite(t, texts, int64(i+1), v)
		value, _, _ := last(t, client, nameOf(t)+"-s")
		require.Equal(t, v, value)
		mustReadValues(t, textsRead, int64(i+1), v)
		mustWrite(t, bytes, int64(i+1), []byte(v))
		value, _, _ = last(t, client, nameOf(t)+"-b")
		require.Equal(t, v, value)
		mustReadValues(t, bytesRead, int64(i+1), []byte(v))
		_, err := read(t, numbers)
		require.ErrorContains(t, err, "not *int")
	}
	mustWrite(t, bytes, 4, nil)
	mustReadValues(t, bytesRead, 4, []byte{})
}

func TestLogReadersAndWritersThatAreClosedLeaveNothing(t *testing.T) {
	cluster := etcdtest.Start(t, 1)
	client := cluster.Client(t)
	lock, err := Acquire(t.Context(), client, nameOf(t))
	require.NoError(t, err)
	resources := []interface{ Close() error }{}
	for range 10 {
		w := mustWriter[string](t, lock, nameOf(t))
		_, err := w.Write(t.Context(), "a")
		require.NoError(t, err)
		latest, every := mustReader[string](t, client, nameOf(t)), mustReader[string](t, client, nameOf(t), WithEveryEntry(0))
		mustRead(t, latest)
		mustReadValues(t, every, 1, "a")
		unread := mustReader[string](t, client, nameOf(t), WithEveryEntry(0))
		resources = append(resources, w, latest, every, unread)
	}
	endpoint := cluster.Endpoints()[0]
	require.Positive(t, serverWatches(t, endpoint))
	for _, r := range resources {
		require.NoError(t, r.Close())
	}
	for _, function := range []string{"etcdutil.(*Watcher", "etcdutil.(*reflector)", "etcdutil.(*latestEntry"} {
		gone(t, function, "Close joins what a reader has started")
	}
	require.NoError(t, lock.Close())
	eventually(t, func() bool { return serverWatches(t, endpoint) == 0 }, "no watch is left")
}

func TestLogReaderOfVersion0ReadsEveryEntryOfALogThatIsNotCompacted(t *testing.T) {
	t.Parallel()
	_, w, client := newLog(t)
	early := mustReader[string](t, client, nameOf(t), WithEntriesAfter(0, 0))
	mustWrite(t, w, 1, "a", "b")
	late := mustReader[string](t, client, nameOf(t), WithEntriesAfter(0, 0))
	for _, r := range []*LogReader[string]{early, late} {
		mustReadValues(t, r, 1, "a", "b")
	}
	again := mustReader[string](t, client, nameOf(t), WithEntriesAfter(2, late.Revision()))
	mustWrite(t, w, 3, "c")
	mustReadValues(t, again, 3, "c")
	_, err := NewLogReader[string](t.Context(), client, nameOf(t), WithEntriesAfter(2, 0))
	require.ErrorIs(t, err, ErrGap)
}

// After a restore revisions begin again below those that were read.
func TestLogReaderRevisionIsNotBehindTheFirstEntry(t *testing.T) {
	t.Parallel()
	client := testCluster.Client(t)
	rev := mustPut(t, client, nameOf(t), `"a"`)
	for range 500 {
		r := mustReader[string](t, client, nameOf(t))
		e := mustRead(t, r)
		require.GreaterOrEqual(t, r.Revision(), rev)
		require.Equal(t, rev, e.Revision)
		require.NoError(t, r.Close())
	}
}

func TestLogReaderRevisionCountsNoUnreadEntryAfterARestore(t *testing.T) {
	t.Parallel()
	for name, unread := range map[string]bool{"the last entry was read": false, "the last entry is unread": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			cluster := etcdtest.Start(t, 1)
			require.NoError(t, cluster.Backup())
			client := cluster.Client(t)
			for range 10 {
				mustPut(t, client, "other", "")
			}
			lost := mustPut(t, client, "log", `"lost"`)
			r := mustReader[string](t, client, "log")
			hasHeard(t, r, lost)
			eventually(t, func() bool { return r.watcher.Revision() == lost }, "it has the list")
			require.Equal(t, lost-1, r.Revision())
			if !unread {
				mustReadValues(t, r, 1, "lost")
				require.Equal(t, lost, r.Revision())
			}
			require.NoError(t, cluster.Restore())
			eventually(t, func() bool { return r.watcher.Revision() < lost }, "it has noticed")
			direct := cluster.Client(t)
			require.LessOrEqual(t, r.Revision(), revision(t, direct))
			rev := mustPut(t, direct, "log", `"new"`)
			require.Less(t, rev, lost)
			eventually(t, func() bool { return r.watcher.Revision() == rev }, "it has the new entry")
			require.Less(t, r.Revision(), rev, "which is not read yet")
			mustReadValues(t, r, 1, "new")
			require.Equal(t, rev, r.Revision())
			again := mustReader[string](t, direct, "log", WithEntriesAfter(1, r.Revision()))
			mustPut(t, direct, "log", `"newer"`)
			mustReadValues(t, again, 2, "newer")
		})
	}
}

func TestLogReaderBeginsAtAnEntryLargerThanItsReceiveLimit(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 1)
	direct, name := cluster.Client(t), nameOf(t)
	client, err := clientv3.New(clientv3.Config{Endpoints: cluster.Endpoints(), MaxCallRecvMsgSize: 256 << 10, Logger: zap.NewNop()})
	require.NoError(t, err)
	defer client.Close()
	first := mustPut(t, direct, name, "a")
	large := strings.Repeat("x", 900_000)
	rev := mustPut(t, direct, name, large)
	mustReadValues(t, mustReader[string](t, client, name, WithCodec(Raw), WithEveryEntry(0)), 1, "a", large)
	mustReadValues(t, mustReader[string](t, client, name, WithCodec(Raw), WithEntriesAfter(1, first)), 2, large)
	mustCompact(t, direct, rev)
	mustReadValues(t, mustReader[string](t, client, name, WithCodec(Raw), WithEntriesAfter(1, first)), 2, large)
	after := mustReader[string](t, client, name, WithCodec(Raw), WithEntriesAfter(2, rev))
	mustPut(t, direct, name, "c")
	mustReadValues(t, after, 3, "c")
}

func TestLogReaderOfAQuietLogOutlivesCompaction(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 1)
	writer, name := cluster.Client(t), nameOf(t)
	client, link := linkedTo(t, cluster)
	mustPut(t, writer, name, "a")
	r := mustReader[string](t, client, name, WithCodec(Raw), WithEntriesAfter(0, 0))
	mustReadValues(t, r, 1, "a")
	rev := cutAndCompact(t, writer, link, func() { mustPut(t, writer, "other", "") })
	eventually(t, func() bool { return r.Revision() >= rev }, "it goes on")
	mustPut(t, writer, name, "b")
	mustReadValues(t, r, 2, "b")
}
