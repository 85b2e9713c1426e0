package etcdutil

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"example.com/etcdutil/etcdtest"
	"github.com/stretchr/testify/require"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/namespace"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// errByProxy is what a proxy answers that has reset a stream: clientv3 repeats such a call by itself.
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
		"incremented":                {kv(4, 40, "v"), map[txnResult]verdict{{}: verdictApplied, answered: verdictApplied, open: verdictApplied}},
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
		"reset, then an answer":       {[]error{errByProxy, nil}, nil, txnResult{true, true}, true},
		"two answers":                 {[]error{nil, nil}, nil, txnResult{true, false}, true},
		"an answer, then refused":     {[]error{nil, denied}, denied, txnResult{true, false}, true},
		"an old token, then answered": {[]error{rpctypes.ErrGRPCInvalidAuthToken, nil}, nil, txnResult{}, true},
		"lost":                        {[]error{unavailable}, unavailable, txnResult{true, true}, true},
		"no space":                    {[]error{rpctypes.ErrGRPCNoSpace}, rpctypes.ErrNoSpace, txnResult{true, false}, true},
		"reset, then no space":        {[]error{errByProxy, rpctypes.ErrGRPCNoSpace}, rpctypes.ErrNoSpace, txnResult{true, true}, true},
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
	lock, err := Acquire(t.Context(), client, nameOf(t))
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

	// A condition, and an error of etcd's, are said for certain: an empty transaction rules out the rest.
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

// The first sending is held back, and a condition refuses the second. Were that all, the first could be
// applied later, when the condition holds.
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

func TestWriteReturnsAnErrorWhereTheCodecPanics(t *testing.T) {
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
