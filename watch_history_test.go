package etcdutil

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"example.com/etcdutil/etcdtest"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
)

// What Watch still learns about the keys comes while the answer to a history check is under way.
func TestWatchLearnsMoreWhileItsHistoryIsChecked(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 1)
	link := etcdtest.StartLink(t, cluster.Endpoints()[0])
	direct := cluster.Client(t)
	mustPut(t, direct, "p/a", "")
	var ranges atomic.Int64
	checking, learned := make(chan struct{}), make(chan struct{})
	var once sync.Once
	client := clientAt(t, []string{link.Endpoint()}, func(
		ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption,
	) error {
		switch req.(type) {
		case *etcdserverpb.RangeRequest:
			n := ranges.Add(1)
			err := invoke(ctx, method, req, reply, cc, opts...)
			switch n {
			case 1: // where to begin is known
				mustPut(t, direct, "unrelated", "")
			case 2: // what was there before is read
				link.Reset()
				<-checking
				time.AfterFunc(100*time.Millisecond, func() { close(learned) })
			}
			return err
		case *etcdserverpb.TxnRequest:
			once.Do(func() { close(checking) })
			err := invoke(ctx, method, req, reply, cc, opts...)
			<-learned
			return err
		}
		return invoke(ctx, method, req, reply, cc, opts...)
	})
	w := mustWatch[string](t, client, "p/", WithPrefix(), WithCodec(Raw))
	rev := mustPut(t, direct, "p/b", "")
	require.Equal(t, rev, next(t, w).Revision)
}

// The keys of a quiet watch behind etcd's gRPC proxy are read again and again.
func TestWatchBehindAProxyGetsAnEventWhileItsKeysAreRead(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 1)
	direct := cluster.Client(t)
	mustPut(t, direct, "unrelated", "")
	told := make(chan struct{})
	var once sync.Once
	client := clientAt(t, []string{etcdtest.StartProxy(t, cluster).Endpoint()}, func(
		ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption,
	) error {
		if _, ok := req.(*etcdserverpb.TxnRequest); !ok {
			return invoke(ctx, method, req, reply, cc, opts...)
		}
		once.Do(func() { mustPut(t, direct, "p/a", "") })
		err := invoke(ctx, method, req, reply, cc, opts...)
		<-told
		return err
	})
	w := mustWatch[string](t, client, "p/", WithPrefix(), WithCodec(Raw))
	require.Equal(t, "p/a", next(t, w).Key)
	close(told)
	mustPut(t, direct, "p/b", "")
	require.Equal(t, "p/b", next(t, w).Key)
}

func TestWatchThatOpenedWhileTheLastOneOfItsClientEndedNoticesARestore(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 1)
	link := etcdtest.StartLink(t, cluster.Endpoints()[0])
	client := newClient(t, link.Endpoint())
	require.NoError(t, cluster.Backup())
	first := mustWatch[string](t, client, "other", WithCodec(Raw))
	for range 5 {
		opened := hubRef{client}.streams()
		link.Reset()
		eventually(t, func() bool { return hubRef{client}.streams() > opened }, "another stream")
	}
	require.NoError(t, first.Close())
	link.Cut()
	old := watchHubOf(client)
	opening := start(func() (*Watcher[string], error) { return Watch[string](t.Context(), client, "k", WithCodec(Raw)) })
	eventually(t, func() bool {
		old.mu.Lock()
		defer old.mu.Unlock()
		return old.ended
	}, "the client's watches have ended")
	link.Heal()
	<-opening.done
	require.NoError(t, opening.err)
	w := opening.v
	defer func() { _ = w.Close() }()
	for range 5 {
		mustPut(t, cluster.Client(t), "k", "before")
		_ = next(t, w)
	}
	link.Cut()
	require.NoError(t, cluster.Restore())
	for range 20 {
		mustPut(t, cluster.Client(t), "k", "after")
	}
	link.Heal()
	events, cause := ends(t, w)
	require.Empty(t, events)
	require.ErrorIs(t, cause, ErrGap)
}

func TestWatchFromNowOnMindsARestoreWhileItOpens(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 1)
	require.NoError(t, cluster.Backup())
	for range 20 {
		mustPut(t, cluster.Client(t), "k", "lost")
	}
	var restored sync.Once
	client := clientOf(t, cluster, func(
		ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption,
	) error {
		err := invoke(ctx, method, req, reply, cc, opts...)
		if _, ok := req.(*etcdserverpb.RangeRequest); ok {
			restored.Do(func() { assert.NoError(t, cluster.Restore()) })
		}
		return err
	})
	w, err := Watch[string](t.Context(), client, "k", WithCodec(Raw))
	if err == nil {
		_, err = ends(t, w)
	}
	require.ErrorIs(t, err, ErrGap)
}

// The proxy's own watch goes on by itself, and so does the stream of its clients.
func TestWatchBehindAProxyNoticesARestore(t *testing.T) {
	t.Parallel()
	for name, written := range map[string]int{"at an earlier revision": 1, "that was overtaken": 30} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			cluster := etcdtest.Start(t, 1)
			writer := cluster.Client(t)
			mustPut(t, writer, "p/kept", "")
			require.NoError(t, cluster.Backup())
			client := newClient(t, etcdtest.StartProxy(t, cluster).Endpoint())
			m := mustMirror[string](t, client, "p/", WithPrefix(), WithCodec(Raw))
			w := mustWatch[string](t, client, "p/", WithPrefix(), WithCodec(Raw))
			for i := range 10 {
				mustPut(t, writer, fmt.Sprint("p/before-", i), "")
				_ = next(t, w)
			}
			eventually(t, func() bool { return m.Len() == 11 }, "the mirror has them")
			require.NoError(t, cluster.Restore())
			for range written {
				mustPut(t, cluster.Client(t), "p/after", "")
			}
			_, cause := ends(t, w)
			require.ErrorIs(t, cause, ErrGap)
			eventually(t, func() bool {
				_, before := m.Get("p/before-0")
				_, after := m.Get("p/after")
				return m.Len() == 2 && !before && after
			}, "the mirror is right again")
		})
	}
}

// At the end the key is what it was at the beginning. What happened in between takes seconds.
func TestWatchBehindAProxyAndASlowLinkSkipsNothing(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 1)
	writer := cluster.Client(t)
	from := revision(t, writer) + 1
	const puts = 500
	for range puts {
		mustPut(t, writer, "k", strings.Repeat("x", 10_000))
	}
	mustDelete(t, writer, "k")
	client := newClient(t, slowLink(t, etcdtest.StartProxy(t, cluster).Endpoint(), 1_000_000))
	w := mustWatch[string](t, client, "k", WithCodec(Raw), WithRevision(from))
	for i := range puts {
		require.Equal(t, from+Revision(i), next(t, w).Revision)
	}
	require.Equal(t, EventDelete, next(t, w).Type)
}

// A thousand revisions come in one message, which takes longer than a stream may be silent.
func TestWatchCatchesUpOverASlowLink(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 1)
	writer := cluster.Client(t)
	from := revision(t, writer) + 1
	const puts = 800
	for range puts {
		mustPut(t, writer, "k", strings.Repeat("x", 10_000))
	}
	client := newClient(t, slowLink(t, cluster.Endpoints()[0], 1_000_000))
	w := mustWatch[string](t, client, "k", WithCodec(Raw), WithRevision(from))
	for i := range puts {
		require.Equal(t, from+Revision(i), next(t, w).Revision)
	}
}

// No progress moves it to the live stream, on which a quiet watch comes on.
func TestWatchBehindAProxyThatBeganInThePastComesOn(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 1)
	direct := cluster.Client(t)
	from := mustPut(t, direct, "k", "")
	mustPut(t, direct, "other", "")
	w := mustWatch[string](t, newClient(t, etcdtest.StartProxy(t, cluster).Endpoint()), "k", WithRevision(from), WithCodec(Raw))
	require.Equal(t, from, next(t, w).Revision)
	rev := mustPut(t, direct, "other", "")
	eventually(t, func() bool { return w.Revision() >= rev }, "the watch comes on")
	rev = mustPut(t, direct, "k", "")
	require.Equal(t, rev, next(t, w).Revision)
}

// etcd takes long to make fragments of many small events, so they must not be asked for again and
// again.
func TestWatchAsksForFragmentsEveryOtherTimeOverASlowLink(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 1)
	writer := cluster.Client(t)
	from := revision(t, writer) + 1
	for range 40 {
		mustPut(t, writer, "k", strings.Repeat("x", 100_000))
	}
	client := newClient(t, slowLink(t, cluster.Endpoints()[0], 50_000))
	w := mustWatch[string](t, client, "k", WithCodec(Raw), WithRevision(from))
	asked := []bool{false}
	eventually(t, func() bool {
		w.reflector.source.locked(func() {
			s := w.reflector.sub.home
			if s != nil && s.catchesUp() && s.fragment != asked[len(asked)-1] {
				asked = append(asked, s.fragment)
			}
		})
		return len(asked) == 3
	}, "fragments are asked for, and then not")
}

// The keys of a list are read once more, to see that its pages are of one history. Where that takes
// too long the list does without.
func TestWatchListsOverALinkTooSlowForAllItsKeysAtOnce(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 1)
	writer := cluster.Client(t)
	name := strings.Repeat("k", 400)
	for from := 0; from < 600; from += 100 {
		var ops []clientv3.Op
		for i := range 100 {
			ops = append(ops, clientv3.OpPut(fmt.Sprintf("%s/%03d", name, from+i), ""))
		}
		mustTxn(t, writer, ops...)
	}
	client := newClient(t, slowLink(t, cluster.Endpoints()[0], 40_000))
	w := mustWatch[string](t, client, name, WithPrefix(), WithSnapshot(), WithCodec(Raw))
	first, _ := untilSynced(t, w)
	require.Len(t, first, 600)
}

// The last change was a deletion, which the restored etcd has as well.
func TestWatchNoticesARestoreAfterADeletion(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 1)
	writer := cluster.Client(t)
	client, link := linkedTo(t, cluster)
	mustPut(t, writer, "p/a", "1")
	mustPut(t, writer, "p/c", "1")
	require.NoError(t, cluster.Backup())
	w := mustWatch[string](t, client, "p/", WithPrefix(), WithCodec(Raw))
	state := mustWatch[string](t, client, "p/", WithPrefix(), WithCodec(Raw), WithSnapshot())
	_, _ = untilSynced(t, state)
	for range 10 {
		mustPut(t, writer, "other", "")
	}
	mustDelete(t, writer, "p/c")
	require.Equal(t, EventDelete, next(t, w).Type)
	require.Equal(t, EventDelete, next(t, state).Type)
	last := stateRevision(t, writer)
	eventually(t, func() bool { return w.Revision() >= last && state.Revision() >= last }, "progress")
	link.Cut()
	require.NoError(t, cluster.Restore())
	writer = cluster.Client(t)
	mustPut(t, writer, "p/a", "new")
	mustDelete(t, writer, "p/c")
	for range 30 {
		mustPut(t, writer, "other", "")
	}
	link.Reset()
	link.Heal()
	_, cause := ends(t, w)
	require.ErrorIs(t, cause, ErrGap)
	difference, _ := untilSynced(t, state)
	require.Len(t, difference, 1)
	require.Equal(t, "new", difference[0].Value)
}

func TestWatchGoesOnWhereTheTimeBeforeADeletionIsCompacted(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 1)
	writer := cluster.Client(t)
	client, link := linkedTo(t, cluster)
	for _, key := range []string{"p/a", "p/b", "k"} {
		mustPut(t, writer, key, "")
	}
	watchers := []*Watcher[string]{
		mustWatch[string](t, client, "p/", WithPrefix(), WithCodec(Raw)), mustWatch[string](t, client, "k", WithCodec(Raw)),
	}
	mustDelete(t, writer, "p/b")
	mustDelete(t, writer, "k")
	last := mustPut(t, writer, "other", "")
	for _, w := range watchers {
		require.Equal(t, EventDelete, next(t, w).Type)
		eventually(t, func() bool { return w.Revision() >= last }, "progress")
	}
	link.Cut()
	mustCompact(t, writer, last)
	link.Reset()
	link.Heal()
	mustPut(t, writer, "p/b", "")
	mustPut(t, writer, "k", "")
	for _, w := range watchers {
		require.Equal(t, EventPut, next(t, w).Type)
	}
}
