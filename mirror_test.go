package etcdutil

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"runtime"
	"slices"
	"strconv"
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
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func mustMirror[T any](t testing.TB, client *clientv3.Client, key string, opts ...WatchOption) *Mirror[T] {
	t.Helper()
	m, err := NewMirror[T](context.Background(), client, key, opts...)
	require.NoError(t, err)
	t.Cleanup(func() { _ = m.Close() })
	return m
}

func mustWait[T any](t testing.TB, m *Mirror[T], rev Revision) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	require.NoError(t, m.Wait(ctx, rev))
}

// requireMirrors waits until a mirror has come to where etcd is, and requires that it has what etcd
// has.
func requireMirrors(t testing.TB, client *clientv3.Client, m *Mirror[string], prefix string) {
	t.Helper()
	mustWait(t, m, stateRevision(t, client))
	want := stateOf(t, client, prefix)
	require.Equal(t, want, state(maps.Collect(m.All())))
	require.Equal(t, len(want), m.Len())
	for key, value := range want {
		got, ok := m.Get(key)
		require.True(t, ok)
		require.Equal(t, value, got)
	}
}

// requireMirrorsWithin requires that a mirror has what etcd has within the bound that the docs
// give.
func requireMirrorsWithin(t testing.TB, d time.Duration, client *clientv3.Client, m *Mirror[string], prefix string) {
	t.Helper()
	want := stateOf(t, client, prefix)
	requireWithin(t, d, func() bool { return maps.Equal(want, state(maps.Collect(m.All()))) }, "the mirror is right")
}

// requireWithin requires that a condition, which must not use t, becomes true in time. Time that
// this process did not get is not counted.
func requireWithin(t testing.TB, d time.Duration, cond func() bool, what string) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	met := start(func() (struct{}, error) {
		for !cond() && ctx.Err() == nil {
			sleep(ctx, time.Millisecond)
		}
		return struct{}{}, ctx.Err()
	})
	within(t, d, met.done, what)
}

const mirrorBackWithin = 2 * time.Second

func TestMirrorFollowsItsKeysInOrder(t *testing.T) {
	t.Parallel()
	client, prefix := newClient(t, testCluster.Endpoints()...), nameOf(t)+"/"
	mustPut(t, client, prefix+"b", "1")
	before := mustPut(t, client, prefix+"a", "1")
	mustPut(t, client, nameOf(t)+"0", "not below the prefix")
	m := mustMirror[string](t, client, prefix, WithPrefix(), WithCodec(Raw), WithSnapshot())
	require.GreaterOrEqual(t, m.Revision(), before)
	requireMirrors(t, client, m, prefix)
	for i := range 300 {
		mustPut(t, client, prefix+strconv.Itoa(i%70), strconv.Itoa(i))
		if i%3 == 0 {
			mustDelete(t, client, prefix+strconv.Itoa(i%70))
		}
		if i%30 == 0 {
			requireMirrors(t, client, m, prefix)
		}
	}
	requireMirrors(t, client, m, prefix)
	var keys []string
	for key := range m.All() {
		keys = append(keys, key)
	}
	require.True(t, slices.IsSorted(keys))
	for range m.All() {
		break
	}
	_, ok := m.Get(nameOf(t) + "0")
	require.False(t, ok)
	require.NoError(t, m.Close())
	require.Equal(t, len(keys), m.Len(), "the copy can still be read")
}

func TestMirrorOfOneKey(t *testing.T) {
	t.Parallel()
	type settings struct{ Limit int }
	client, key := newClient(t, testCluster.Endpoints()...), nameOf(t)
	m := mustMirror[settings](t, client, key)
	_, ok := m.Get(key)
	require.False(t, ok)
	mustPut(t, client, key+"/below", `{"Limit":1}`)
	mustWait(t, m, mustPut(t, client, key, `{"Limit":2}`))
	require.Equal(t, map[string]settings{key: {2}}, maps.Collect(m.All()))
}

func TestMirrorOfAllKeys(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 1)
	client := cluster.Client(t)
	mustPut(t, client, "a", "1")
	m := mustMirror[string](t, client, "", WithPrefix(), WithCodec(Raw))
	mustPut(t, client, "z", "1")
	requireMirrors(t, client, m, "")
	now := time.Now()
	eventually(t, func() bool { return m.AsOf().After(now) }, "AsOf moves")
}

func TestMirrorNeverShowsHalfATransaction(t *testing.T) {
	t.Parallel()
	client, prefix := newClient(t, testCluster.Endpoints()...), nameOf(t)+"/"
	const keys = 20
	write := func(value int) Revision {
		ops := make([]clientv3.Op, keys)
		for i := range ops {
			ops[i] = clientv3.OpPut(prefix+strconv.Itoa(i), strconv.Itoa(value))
		}
		return mustTxn(t, client, ops...)
	}
	write(0)
	m := mustMirror[int](t, client, prefix, WithPrefix())
	ctx, cancel := context.WithCancel(context.Background())
	var readers sync.WaitGroup
	defer readers.Wait()
	defer cancel()
	var reads atomic.Int64
	for range 2 {
		readers.Go(func() {
			for ; ctx.Err() == nil; reads.Add(1) {
				time.Sleep(100 * time.Microsecond) // the machine has other tests to run
				first, _ := m.Get(prefix + "0")
				last, _ := m.Get(prefix + strconv.Itoa(keys-1))
				if last < first {
					t.Errorf("%d was read after %d of a later transaction", last, first)
				}
				values := slices.Compact(slices.Sorted(maps.Values(maps.Collect(m.All()))))
				if len(values) != 1 {
					t.Errorf("values of several revisions: %v", values)
				}
			}
		})
	}
	var last Revision
	for i := range 300 {
		last = write(i)
	}
	mustWait(t, m, last)
	eventually(t, func() bool { return reads.Load() > 1000 }, "reads")
}

func TestMirrorWaitReadsYourWrites(t *testing.T) {
	t.Parallel()
	client, prefix := newClient(t, testCluster.Endpoints()...), nameOf(t)+"/"
	m := mustMirror[int](t, newClient(t, testCluster.Endpoints()...), prefix, WithPrefix())
	for i := range 50 {
		mustWait(t, m, mustPut(t, client, prefix+"a", strconv.Itoa(i)))
		got, _ := m.Get(prefix + "a")
		require.Equal(t, i, got)
	}
	// A watch that is not asked reports about once a second that other keys were written.
	took := testclock.Time(func() {
		for range 50 {
			rev := mustPut(t, client, nameOf(t)+"-other", "")
			mustWait(t, m, rev)
			require.GreaterOrEqual(t, m.Revision(), rev)
		}
	})
	require.Less(t, took, 10*time.Second)
}

func TestMirrorWaitEndsWithItsContextAndWithTheMirror(t *testing.T) {
	t.Parallel()
	m := mustMirror[int](t, newClient(t, testCluster.Endpoints()...), nameOf(t))
	ctx, cancel := context.WithCancelCause(context.Background())
	cause := errors.New("cause")
	cancel(cause)
	require.NoError(t, m.Wait(ctx, m.Revision()))
	err := m.Wait(ctx, m.Revision()+1_000_000)
	require.ErrorIs(t, err, context.Canceled)
	require.ErrorIs(t, err, cause)
	waiting := start(func() (struct{}, error) { return struct{}{}, m.Wait(context.Background(), m.Revision()+1_000_000) })
	receiving := start(func() (Revision, error) { return m.Changes().Recv(context.Background()) })
	require.NoError(t, m.Close())
	within(t, patience, waiting.done, "Wait returns")
	require.ErrorIs(t, waiting.err, ErrClosed)
	within(t, patience, receiving.done, "Recv returns")
	require.ErrorIs(t, receiving.err, ErrClosed)
	require.Equal(t, ErrClosed, context.Cause(m))
	require.NoError(t, m.Close())
	require.Panics(t, func() { _ = m.Wait(noContext, 1) })
}

func TestMirrorKeepsTheLastValueThatDecoded(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 1)
	client, link := linkedTo(t, cluster)
	writer, prefix := cluster.Client(t), nameOf(t)+"/"
	mustPut(t, writer, prefix+"never", "bad")
	mustPut(t, writer, prefix+"a", "1")
	mustPut(t, writer, prefix+"b", "1")
	m := mustMirror[int](t, client, prefix, WithPrefix())
	invalid := func() []string {
		var keys []string
		for key, err := range m.Invalid() {
			require.ErrorIs(t, err, ErrInvalidValue)
			require.NotContains(t, err.Error(), "secret")
			keys = append(keys, strings.TrimPrefix(key, prefix))
		}
		return keys
	}
	require.Equal(t, []string{"never"}, invalid())
	mustPut(t, writer, prefix+"b", "secret")
	mustWait(t, m, mustPut(t, writer, prefix+"a", "bad"))
	require.Equal(t, []string{"a", "b", "never"}, invalid())
	require.Equal(t, map[string]int{prefix + "a": 1, prefix + "b": 1}, maps.Collect(m.All()))

	link.Reset() // what follows may be found by a watch or by a list
	link.Cut()
	mustPut(t, writer, prefix+"b", "worse")
	mustCompact(t, writer, mustPut(t, writer, prefix+"never", "3"))
	link.Heal()
	mustWait(t, m, stateRevision(t, writer))
	require.Equal(t, []string{"a", "b"}, invalid())
	require.Equal(t, map[string]int{prefix + "a": 1, prefix + "b": 1, prefix + "never": 3}, maps.Collect(m.All()))

	mustPut(t, writer, prefix+"a", "2")
	mustWait(t, m, mustDelete(t, writer, prefix+"b"))
	require.Empty(t, invalid())
	require.Equal(t, map[string]int{prefix + "a": 2, prefix + "never": 3}, maps.Collect(m.All()))
	mustWait(t, m, mustPut(t, writer, prefix+"b", "bad"))
	_, ok := m.Get(prefix + "b")
	require.False(t, ok, "the value from before the deletion")
}

func TestMirrorReportsTheLatestChange(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 1)
	client, link := linkedTo(t, cluster)
	writer, prefix := cluster.Client(t), nameOf(t)+"/"
	mustPut(t, writer, prefix+"a", "1")
	m := mustMirror[string](t, client, prefix, WithPrefix(), WithCodec(Raw))
	changes := m.Changes()
	recv := func() Revision {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		rev, err := changes.Recv(ctx)
		require.NoError(t, err)
		return rev
	}
	rev := mustPut(t, writer, prefix+"a", "2")
	require.Equal(t, rev, recv(), "the first copy is no change")
	mustPut(t, writer, prefix+"b", "1")
	rev = mustTxn(t, writer, clientv3.OpPut(prefix+"c", "1"), clientv3.OpDelete(prefix+"b"))
	mustWait(t, m, rev)
	require.Equal(t, rev, recv())

	// A list that finds nothing new is no change, though the keys were written.
	other := cutAndCompact(t, writer, link, func() { mustPut(t, writer, prefix+"a", "2") })
	mustWait(t, m, other)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	rev, err := m.Changes().Recv(context.Background())
	require.NoError(t, err, "a new receiver sees the latest change")
	require.Less(t, rev, other)
	for name, change := range map[string]func(){
		"put":     func() { mustPut(t, writer, prefix+"a", "3") },
		"deleted": func() { mustDelete(t, writer, prefix+"c") },
		"created": func() { mustPut(t, writer, prefix+"d", "1") },
	} {
		cutAndCompact(t, writer, link, change)
		require.Greater(t, recv(), rev, name)
		requireMirrors(t, writer, m, prefix)
	}
	_, err = changes.Recv(ctx)
	require.ErrorIs(t, err, context.Canceled)
}

// cutAndCompact makes a change, and compacts it, behind the back of a client.
func cutAndCompact(t testing.TB, writer *clientv3.Client, link *etcdtest.Link, change func()) Revision {
	t.Helper()
	link.Cut()
	change()
	rev := mustPut(t, writer, nameOf(t)+"-other", "")
	mustCompact(t, writer, rev)
	link.Reset()
	link.Heal()
	return rev
}

func TestMirrorIsRightAgainAfterAnOutage(t *testing.T) {
	t.Parallel()
	for name, fault := range map[string]mirrorFault{
		"connections are reset": func(_ *testing.T, _ *etcdtest.Cluster, l *etcdtest.Link, during func()) {
			l.Reset()
			during()
		},
		"black hole": func(_ *testing.T, _ *etcdtest.Cluster, l *etcdtest.Link, during func()) {
			l.Cut()
			during()
			time.Sleep(8 * time.Second) // all delays have grown
			l.Heal()
		},
		"compaction": func(t *testing.T, c *etcdtest.Cluster, l *etcdtest.Link, during func()) {
			l.Cut()
			during()
			mustCompact(t, c.Client(t), stateRevision(t, c.Client(t)))
			l.Reset()
			l.Heal()
		},
		"restore": func(t *testing.T, c *etcdtest.Cluster, _ *etcdtest.Link, during func()) {
			require.NoError(t, c.Backup())
			during()
			require.NoError(t, c.Restore())
		},
		"restore that was overtaken": func(t *testing.T, c *etcdtest.Cluster, l *etcdtest.Link, during func()) {
			require.NoError(t, c.Backup())
			during()
			l.Cut()
			require.NoError(t, c.Restore())
			writer := c.Client(t)
			for range 50 {
				mustPut(t, writer, "elsewhere", "")
			}
			l.Reset()
			l.Heal()
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			mustMirrorAfter(t, fault)
		})
	}
}

// It is no subtest, which would begin after all other tests.
func TestMirrorIsRightAgainAfterALongRefusal(t *testing.T) {
	t.Parallel()
	mustMirrorAfter(t, func(t *testing.T, c *etcdtest.Cluster, _ *etcdtest.Link, during func()) {
		during()
		require.NoError(t, c.Stop(0))
		time.Sleep(15 * time.Second) // all delays have grown
		require.NoError(t, c.Restart(0))
	})
}

// mirrorFault is a fault during which, or before which, keys change.
type mirrorFault func(t *testing.T, c *etcdtest.Cluster, l *etcdtest.Link, during func())

// mustMirrorAfter fails t if a mirror that meets the fault is not right in the end.
func mustMirrorAfter(t *testing.T, fault mirrorFault) {
	t.Helper()
	cluster := etcdtest.Start(t, 1)
	client, link := linkedTo(t, cluster)
	writer, prefix := cluster.Client(t), nameOf(t)+"/"
	for i := range 200 {
		mustPut(t, writer, prefix+strconv.Itoa(i), "1")
	}
	m := mustMirror[string](t, client, prefix, WithPrefix(), WithCodec(Raw))
	fault(t, cluster, link, func() {
		for i := range 100 {
			mustPut(t, writer, prefix+strconv.Itoa(i), "2")
		}
		for i := range 50 {
			mustDelete(t, writer, prefix+strconv.Itoa(2*i))
		}
	})
	requireMirrorsWithin(t, mirrorBackWithin, cluster.Client(t), m, prefix)
	requireMirrors(t, writer, m, prefix)
	rev := mustPut(t, writer, prefix+"after", "1")
	mustWait(t, m, rev)
	requireMirrors(t, writer, m, prefix)
}

func TestMirrorOutlivesAPermissionThatIsTakenAwayAndGivenBack(t *testing.T) {
	t.Parallel()
	cluster, root := authCluster(t, 300)
	link := etcdtest.StartLink(t, cluster.Endpoints()[0])
	client, ctx := userClient(t, "user", nil, link.Endpoint()), context.Background()
	mustPut(t, root, "allowed/a", "1")
	mustPut(t, root, "allowed/b", "1")
	m := mustMirror[string](t, client, "allowed/", WithPrefix(), WithCodec(Raw))
	_, err := root.RoleRevokePermission(ctx, "user", "allowed/", "allowed0")
	require.NoError(t, err)
	link.Reset() // permissions are checked when a watch begins
	mustPut(t, root, "allowed/a", "secret")
	mustDelete(t, root, "allowed/b")
	first := m.watcher.Load()
	eventually(t, func() bool { return first.Err() != nil }, "the watch is refused")
	require.ErrorIs(t, context.Cause(first), rpctypes.ErrPermissionDenied)
	revoked := time.Now()
	time.Sleep(3 * time.Second) // all delays have grown
	require.NoError(t, m.Err())
	require.Equal(t, state{"allowed/a": "1", "allowed/b": "1"}, state(maps.Collect(m.All())), "the copy is kept")
	require.Less(t, m.AsOf(), revoked)
	_, err = root.RoleGrantPermission(ctx, "user", "allowed/", "allowed0", clientv3.PermissionType(clientv3.PermRead))
	require.NoError(t, err)
	requireMirrorsWithin(t, mirrorBackWithin, root, m, "allowed/")
	eventually(t, func() bool { return m.AsOf().After(revoked) }, "AsOf")
}

func TestMirrorAsOfIsNeverLaterThanWhatItHas(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 3)
	isolated := (cluster.Leader() + 1) % 3
	client := newClient(t, cluster.Endpoints()[isolated])
	writer, prefix := newClient(t, cluster.Endpoints()[cluster.Leader()]), nameOf(t)+"/"
	m := mustMirror[string](t, client, prefix, WithPrefix(), WithCodec(Raw))
	begin := time.Now()
	eventually(t, func() bool { return m.AsOf().After(begin) }, "AsOf moves though nothing happens")
	// Reads may ask the leader, while the watch stays.
	addEndpoints(client, cluster.Endpoints()[cluster.Leader()])
	require.NoError(t, cluster.Isolate(isolated))
	mustPut(t, writer, prefix+"a", "1")
	written := time.Now()
	for time.Since(written) < 6*time.Second { // the member may answer for a while
		asOf := m.AsOf()
		if _, ok := m.Get(prefix + "a"); !ok {
			require.False(t, asOf.After(written), "AsOf is %v after a write that is missing", asOf.Sub(written))
		}
		time.Sleep(time.Millisecond)
	}
	require.NoError(t, cluster.Rejoin(isolated))
	back := time.Now()
	eventually(t, func() bool { return m.AsOf().After(back) }, "AsOf moves again")
	_, ok := m.Get(prefix + "a")
	require.True(t, ok)
}

// Through the proxy a quiet watch takes seconds to show how far it has come.
func TestMirrorAsOfMovesThroughTheGRPCProxyWhileOtherKeysAreWritten(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 1)
	writer := cluster.Client(t)
	m := mustMirror[string](t, newClient(t, etcdtest.StartProxy(t, cluster).Endpoint()), "p/", WithPrefix(), WithCodec(Raw))
	ctx, cancel := context.WithCancel(t.Context())
	var writing sync.WaitGroup
	writing.Go(func() {
		for ctx.Err() == nil {
			_, _ = writer.Put(ctx, "other", "")
			sleep(ctx, 50*time.Millisecond)
		}
	})
	defer writing.Wait()
	defer cancel()
	for range 2 {
		begin := time.Now()
		requireWithin(t, 15*time.Second, func() bool { return m.AsOf().After(begin) }, "AsOf moves")
	}
}

func TestMirrorAsOfMindsARestoreToTheSameRevision(t *testing.T) {
	t.Parallel()
	cluster, key := etcdtest.Start(t, 1), nameOf(t)
	mustPut(t, cluster.Client(t), key, "0")
	require.NoError(t, cluster.Backup())
	client, mirrors := cluster.Client(t), make([]*Mirror[string], 30) // they ask at different times
	for i := range mirrors {
		mirrors[i] = mustMirror[string](t, client, key, WithCodec(Raw))
	}
	for i := range 4 {
		value := strconv.Itoa(i + 1)
		rev := mustPut(t, cluster.Client(t), key, value)
		written := time.Now()
		for behind := 1; behind > 0; time.Sleep(time.Millisecond) {
			behind = 0
			for _, m := range mirrors {
				asOf := m.AsOf()
				if got, _ := m.Get(key); got != value {
					require.False(t, asOf.After(written), "AsOf is %v after a write that is missing", asOf.Sub(written))
					behind++
				}
			}
			require.Less(t, time.Since(written), patience)
		}
		for _, m := range mirrors {
			require.Equal(t, rev, m.Revision())
			eventually(t, func() bool { return m.AsOf().After(written) }, "AsOf moves")
		}
		require.NoError(t, cluster.Restore())
	}
}

// The stream of the watch takes seconds to find its connection dead. Reads that go over another one
// are answered by the restored etcd meanwhile.
func TestMirrorAsOfMindsARestoreBehindADeadConnection(t *testing.T) {
	t.Parallel()
	cluster, key := etcdtest.Start(t, 1), nameOf(t)
	mustPut(t, cluster.Client(t), key, "0")
	require.NoError(t, cluster.Backup())
	client, link, second := twoWaysTo(t, cluster.Endpoints()[0])
	mirrors := make([]*Mirror[string], 20) // which ask etcd at different times
	for i := range mirrors {
		mirrors[i] = mustMirror[string](t, client, key, WithCodec(Raw))
	}
	var rev Revision
	for range 20 {
		rev = mustPut(t, cluster.Client(t), key, "lost")
	}
	for _, m := range mirrors {
		require.NoError(t, m.Wait(t.Context(), rev))
	}
	link.Cut()
	require.NoError(t, cluster.Restore())
	second()
	require.Less(t, mustPut(t, cluster.Client(t), key, "new"), rev)
	for written := time.Now(); time.Since(written) < 3*time.Second; time.Sleep(time.Millisecond) {
		for _, m := range mirrors {
			asOf := m.AsOf()
			if got, _ := m.Get(key); got != "new" {
				require.False(t, asOf.After(written), "AsOf is %v after a write that is missing", asOf.Sub(written))
			}
		}
	}
}

// What the mirror has yet to decode is of the old history, and of later revisions.
func TestMirrorAsOfMindsARestoreBehindABacklog(t *testing.T) {
	t.Parallel()
	cluster, key := etcdtest.Start(t, 1), nameOf(t)
	mustPut(t, cluster.Client(t), key, "kept")
	require.NoError(t, cluster.Backup())
	codec := &slowCodec{Codec: Raw, release: make(chan struct{})}
	m := mustMirror[string](t, cluster.Client(t), key, WithCodec(codec))
	codec.slow.Store(true)
	for range 20 {
		mustPut(t, cluster.Client(t), key, "lost")
	}
	require.NoError(t, cluster.Restore())
	for range 10 {
		mustPut(t, cluster.Client(t), key, "new")
	}
	written := time.Now()
	eventually(t, func() bool { return m.asked.Load() > 3 }, "the mirror asks")
	close(codec.release)
	eventually(t, func() bool {
		asOf := m.AsOf()
		got, _ := m.Get(key)
		if got != "new" {
			require.False(t, asOf.After(written), "AsOf is %v after a write that is missing", asOf.Sub(written))
		}
		return got == "new" && asOf.After(written)
	}, "the mirror is right again")
}

// slowCodec blocks once it is slow until it is released, and is slow from then on.
type slowCodec struct {
	Codec
	slow    atomic.Bool
	release chan struct{}
}

func (c *slowCodec) Unmarshal(data []byte, v any) error {
	if c.slow.Load() {
		<-c.release
		time.Sleep(100 * time.Millisecond)
	}
	return c.Codec.Unmarshal(data, v)
}

func TestMirrorAsOfStandsStillBehindABlackHole(t *testing.T) {
	t.Parallel()
	client, link := linkedClient(t)
	other := newClient(t, testCluster.Endpoints()...)
	begin := time.Now()
	m := mustMirror[string](t, client, nameOf(t), WithCodec(Raw))
	require.False(t, m.AsOf().Before(begin))
	for range 3 {
		mustPut(t, other, nameOf(t)+"-other", "") // the copy has to come to that
		now := time.Now()
		eventually(t, func() bool { return m.AsOf().After(now) }, "AsOf moves")
	}
	link.Cut()
	cut := time.Now()
	time.Sleep(5 * time.Second)
	require.False(t, m.AsOf().After(cut))
	require.NoError(t, m.Err())
	link.Heal()
	back := time.Now()
	requireWithin(t, 3*time.Second, func() bool { return m.AsOf().After(back) }, "AsOf moves")
}

// blockingCodec blocks when it decodes "block".
type blockingCodec struct{ release chan struct{} }

func (blockingCodec) Marshal(v any) ([]byte, error) { return Raw.Marshal(v) }
func (c blockingCodec) Unmarshal(data []byte, v any) error {
	if string(data) == "block" {
		<-c.release
	}
	return Raw.Unmarshal(data, v)
}

func TestMirrorGetDoesNotWaitForUserCode(t *testing.T) {
	t.Parallel()
	client, prefix := newClient(t, testCluster.Endpoints()...), nameOf(t)+"/"
	mustPut(t, client, prefix+"a", "1")
	codec := blockingCodec{make(chan struct{})}
	m := mustMirror[string](t, client, prefix, WithPrefix(), WithCodec(codec))
	for range m.All() { // while it is read, the copy goes on
		mustWait(t, m, mustPut(t, client, prefix+"a", "2"))
		got, _ := m.Get(prefix + "a")
		require.Equal(t, "2", got)
	}
	rev := mustPut(t, client, prefix+"a", "block")
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	require.ErrorIs(t, m.Wait(ctx, rev), context.DeadlineExceeded)
	got, ok := m.Get(prefix + "a")
	require.True(t, ok)
	require.Equal(t, "2", got)
	close(codec.release)
	mustWait(t, m, rev)
}

func TestMirrorEndsThoughItsCodecBlocks(t *testing.T) {
	t.Parallel()
	client, prefix := newClient(t, testCluster.Endpoints()...), nameOf(t)+"/"
	codec := blockingCodec{make(chan struct{})}
	defer close(codec.release)
	m := mustMirror[string](t, client, prefix, WithPrefix(), WithCodec(codec))
	mustPut(t, client, prefix+"a", "block")
	queue := m.watcher.Load().queue
	eventually(t, func() bool {
		queue.mu.Lock()
		defer queue.mu.Unlock()
		return queue.held
	}, "the codec is at work")
	took := testclock.Time(func() { require.NoError(t, m.Close()) })
	require.Less(t, took, maxClosing+time.Second)

	cause := errors.New("cause")
	ctx, cancel := context.WithTimeoutCause(context.Background(), 100*time.Millisecond, cause)
	defer cancel()
	took = testclock.Time(func() {
		_, err := NewMirror[string](ctx, client, prefix, WithPrefix(), WithCodec(codec))
		require.ErrorIs(t, err, cause)
	})
	require.Less(t, took, time.Second)
}

func TestMirrorRefusesBadArguments(t *testing.T) {
	t.Parallel()
	client, ctx := newClient(t, testCluster.Endpoints()...), context.Background()
	for name, opts := range map[string][]WatchOption{
		"WithRevision":    {WithRevision(5)},
		"WithPrev":        {WithPrev()},
		"WithCodec":       {WithCodec(nil)},
		"RetryPolicy.Max": {WithRetryPolicy(RetryPolicy{Max: -1})},
	} {
		_, err := NewMirror[string](ctx, client, nameOf(t), opts...)
		require.ErrorContains(t, err, name)
	}
	_, err := NewMirror[string](ctx, client, "")
	require.ErrorContains(t, err, "key")
	require.Panics(t, func() { _, _ = NewMirror[string](noContext, client, "a") })
	require.Panics(t, func() { _, _ = NewMirror[string](ctx, nil, "a") })
}

func TestMirrorFailsAtOnceWhereItMayNotRead(t *testing.T) {
	t.Parallel()
	cluster, _ := authCluster(t, 300)
	client := userClient(t, "user", nil, cluster.Endpoints()...)
	_, err := NewMirror[string](context.Background(), client, "forbidden/", WithPrefix())
	require.ErrorIs(t, err, rpctypes.ErrPermissionDenied)
	require.ErrorContains(t, err, `"forbidden/"`)
	require.Equal(t, 1, strings.Count(err.Error(), "etcdutil: "))
}

func TestMirrorGivesUpAsItsPolicySaysUntilItIsComplete(t *testing.T) {
	t.Parallel()
	client, link := linkedClient(t)
	link.Cut()
	policy := RetryPolicy{Elapsed: time.Second, AttemptTimeout: 100 * time.Millisecond}
	took := testclock.Time(func() {
		_, err := NewMirror[string](context.Background(), client, nameOf(t), WithRetryPolicy(policy))
		require.Error(t, err)
	})
	require.Less(t, took, 3*time.Second)
	cause := errors.New("cause")
	ctx, cancel := context.WithTimeoutCause(context.Background(), 50*time.Millisecond, cause)
	defer cancel()
	_, err := NewMirror[string](ctx, client, nameOf(t))
	require.ErrorIs(t, err, cause)
	link.Heal()
	policy = RetryPolicy{Elapsed: 3 * time.Second}
	m := mustMirror[string](t, newClient(t, link.Endpoint()), nameOf(t), WithCodec(Raw), WithRetryPolicy(policy))
	link.Cut()
	time.Sleep(2 * policy.Elapsed)
	link.Heal()
	mustWait(t, m, mustPut(t, newClient(t, testCluster.Endpoints()...), nameOf(t), "1"))
}

// The first page has two keys.
func TestMirrorGivesUpAfterTheAttemptsOfItsPolicyThoughTheFirstPageWasAnswered(t *testing.T) {
	t.Parallel()
	var failures atomic.Int32
	client := interceptedClient(t, func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		if r, ok := req.(*etcdserverpb.RangeRequest); ok && r.Revision != 0 && failures.Add(-1) >= 0 {
			return status.Error(codes.Internal, "away") // which clientv3 does not repeat by itself
		}
		return invoker(ctx, method, req, reply, cc, opts...)
	})
	for i := range 3 {
		mustPut(t, client, fmt.Sprint(nameOf(t), i), "1")
	}
	policy := WithRetryPolicy(RetryPolicy{Attempts: 3, Elapsed: -1})
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	failures.Store(3)
	_, err := NewMirror[string](ctx, client, nameOf(t), WithPrefix(), WithCodec(Raw), policy)
	require.ErrorContains(t, err, "gave up after 3 attempts")
	require.ErrorContains(t, err, "away")
	require.Equal(t, 1, strings.Count(err.Error(), "etcdutil: "))

	failures.Store(2)
	m := mustMirror[string](t, client, nameOf(t), WithPrefix(), WithCodec(Raw), policy)
	require.Equal(t, 3, m.Len())
}

func TestMirrorEndsWithItsParentAndWithItsClient(t *testing.T) {
	t.Parallel()
	client := newClient(t, testCluster.Endpoints()...)
	type key struct{}
	cause := errors.New("cause")
	ctx, cancel := context.WithCancelCause(context.WithValue(context.Background(), key{}, 1))
	m, err := NewMirror[string](ctx, client, nameOf(t))
	require.NoError(t, err)
	require.Equal(t, 1, m.Value(key{}))
	cancel(cause)
	within(t, patience, m.Done(), "the mirror ends")
	require.Equal(t, cause, context.Cause(m))
	require.ErrorIs(t, m.Wait(context.Background(), m.Revision()+1), cause)
	require.NoError(t, m.Close())
	m = mustMirror[string](t, client, nameOf(t))
	require.NoError(t, client.Close())
	within(t, patience, m.Done(), "the mirror ends")
	require.ErrorContains(t, context.Cause(m), "client")
	require.Error(t, m.Close())
}

func TestMirrorNeedsFewGoroutinesAndLeavesNone(t *testing.T) {
	client, prefix := newClient(t, testCluster.Endpoints()...), nameOf(t)+"/"
	for i := range 500 {
		mustPut(t, client, prefix+strconv.Itoa(i), "1")
	}
	first := mustMirror[int](t, client, prefix, WithPrefix()) // the client's streams are there
	before := runtime.NumGoroutine()
	var mirrors []*Mirror[int]
	for range 20 {
		mirrors = append(mirrors, mustMirror[int](t, client, prefix, WithPrefix()))
	}
	eventually(t, func() bool { return runtime.NumGoroutine() < before+2*len(mirrors)+len(mirrors)-1 }, "two goroutines a mirror, beside those of the condition")
	for _, m := range append(mirrors, first) {
		require.NoError(t, m.Close())
	}
	eventually(t, func() bool { return runtime.NumGoroutine() < before+5 }, fmt.Sprint("no more goroutines than ", before))
}
