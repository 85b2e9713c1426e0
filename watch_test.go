package etcdutil

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"regexp"
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
	"go.etcd.io/etcd/client/v3/namespace"
	"go.uber.org/goleak"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
)

// next is the watcher's next event.
func next[T any](t testing.TB, w *Watcher[T]) Event[T] {
	t.Helper()
	select {
	case e, ok := <-w.Events():
		require.True(t, ok, "the watcher has ended: %v", context.Cause(w))
		return e
	case <-time.After(patience):
		require.FailNow(t, "no event")
		panic("unreachable")
	}
}

func mustWatch[T any](t testing.TB, client *clientv3.Client, key string, opts ...WatchOption) *Watcher[T] {
	t.Helper()
	w, err := Watch[T](context.Background(), client, key, opts...)
	require.NoError(t, err)
	t.Cleanup(func() { _ = w.Close() })
	return w
}

func mustPut(t testing.TB, client *clientv3.Client, key, value string) Revision {
	t.Helper()
	resp, err := client.Put(context.Background(), key, value)
	require.NoError(t, err)
	return resp.Header.Revision
}

func TestWatchSendsEachChange(t *testing.T) {
	t.Parallel()
	client, key := newClient(t, testCluster.Endpoints()...), nameOf(t)
	created := mustPut(t, client, key, `"before"`)
	w := mustWatch[string](t, client, key, WithPrev())
	rev := mustPut(t, client, key, `"a"`)
	e := next(t, w)
	prev := "before"
	require.Equal(t, Event[string]{Type: EventPut, Key: key, Value: "a", Prev: &prev, Version: 2, CreateRevision: created, Revision: rev}, e)
	require.GreaterOrEqual(t, w.Revision(), rev) // others write to the cluster
	rev = mustPut(t, client, key, `{`)
	e = next(t, w)
	require.Equal(t, EventInvalid, e.Type)
	require.Equal(t, "{", string(e.Raw))
	require.Error(t, e.Err)
	require.GreaterOrEqual(t, w.Revision(), rev) // others write to the cluster
	resp, err := client.Delete(context.Background(), key)
	require.NoError(t, err)
	e = next(t, w)
	require.Equal(t, Event[string]{Type: EventDelete, Key: key, Revision: resp.Header.Revision}, e)
	rev = mustPut(t, client, key+"other", "")
	eventually(t, func() bool { return w.Revision() >= rev }, "progress")
	require.NoError(t, w.Close())
	_, ok := <-w.Events()
	require.False(t, ok)
	require.ErrorIs(t, context.Cause(w), ErrClosed)
	require.GreaterOrEqual(t, w.Revision(), rev)
}

// toldEvent is an event as a test writes it down.
type toldEvent struct {
	Type     EventType
	Key      string
	Value    string
	Revision Revision
}

func toldOf(e Event[string]) toldEvent { return toldEvent{e.Type, e.Key, e.Value, e.Revision} }

// untilSynced are the watcher's next events up to EventSynced, which is left out.
func untilSynced(t testing.TB, w *Watcher[string]) (events []Event[string], rev Revision) {
	t.Helper()
	for {
		e := next(t, w)
		if e.Type == EventSynced {
			return events, e.Revision
		}
		events = append(events, e)
	}
}

// state is what a reader of a snapshot knows.
type state map[string]string

func (s state) apply(events ...Event[string]) {
	for _, e := range events {
		switch e.Type {
		case EventPut:
			s[e.Key] = e.Value
		case EventDelete:
			delete(s, e.Key)
		}
	}
}

// stateOf is what etcd has under a prefix.
func stateOf(t testing.TB, client *clientv3.Client, prefix string, opts ...clientv3.OpOption) state {
	t.Helper()
	s := state{}
	for _, kv := range mustGet(t, client, prefix, append(opts, clientv3.WithPrefix())...).Kvs {
		s[string(kv.Key)] = string(kv.Value)
	}
	return s
}

// ends waits until a watcher's Events are closed, and returns the cause and the events before.
func ends[T any](t testing.TB, w *Watcher[T]) (events []Event[T], cause error) {
	t.Helper()
	timeout := time.After(patience)
	for {
		select {
		case e, ok := <-w.Events():
			if ok {
				events = append(events, e)
				continue
			}
			cause = context.Cause(w)
			require.Error(t, cause)
			require.Error(t, w.Err())
			return events, cause
		case <-timeout:
			require.FailNow(t, "the watcher does not end")
		}
	}
}

func mustDelete(t testing.TB, client *clientv3.Client, key string) Revision {
	t.Helper()
	resp, err := client.Delete(context.Background(), key)
	require.NoError(t, err)
	require.EqualValues(t, 1, resp.Deleted)
	return resp.Header.Revision
}

func mustTxn(t testing.TB, client *clientv3.Client, ops ...clientv3.Op) Revision {
	t.Helper()
	resp, err := client.Txn(context.Background()).Then(ops...).Commit()
	require.NoError(t, err)
	return resp.Header.Revision
}

func mustCompact(t testing.TB, client *clientv3.Client, rev Revision) {
	t.Helper()
	_, err := client.Compact(context.Background(), rev)
	require.NoError(t, err)
}

// resetEvery resets the link's connections again and again until the returned function is called.
// It counts.
func resetEvery(t testing.TB, link *etcdtest.Link, interval time.Duration) (count *atomic.Int64, stop func()) {
	t.Helper()
	count, done := new(atomic.Int64), make(chan struct{})
	var resetting sync.WaitGroup
	resetting.Go(func() {
		for {
			select {
			case <-time.After(interval):
				link.Reset()
				count.Add(1)
			case <-done:
				return
			}
		}
	})
	stop = sync.OnceFunc(func() { close(done); resetting.Wait() })
	t.Cleanup(stop)
	return count, stop
}

// linkedTo is a client of a cluster's only member behind a link of its own.
func linkedTo(t testing.TB, cluster *etcdtest.Cluster) (*clientv3.Client, *etcdtest.Link) {
	t.Helper()
	link := etcdtest.StartLink(t, cluster.Endpoints()[0])
	return newClient(t, link.Endpoint()), link
}

// readUntil reads events up to that of a key, and fails if nothing comes.
func readUntil(w *Watcher[string], key string) ([]toldEvent, error) {
	var events []toldEvent
	for {
		select {
		case e, ok := <-w.Events():
			if !ok {
				return events, fmt.Errorf("the watcher has ended: %w", context.Cause(w))
			}
			events = append(events, toldOf(e))
			if e.Key == key {
				return events, nil
			}
		case <-time.After(patience):
			return events, fmt.Errorf("no event of %s after %d events", key, len(events))
		}
	}
}

func TestWatchDeliversEveryRevisionOnceThroughResets(t *testing.T) {
	t.Parallel()
	writer, prefix := newClient(t, testCluster.Endpoints()...), nameOf(t)+"/"
	client, link := linkedClient(t)
	mustPut(t, writer, prefix+"k0", "before")
	w := mustWatch[string](t, client, prefix, WithPrefix(), WithCodec(Raw))
	followed := mustWatch[string](t, client, prefix, WithPrefix(), WithCodec(Raw), WithSnapshot())
	snapshot, _ := untilSynced(t, followed)
	require.Len(t, snapshot, 1)
	link.Reset() // before the first event: clientv3's own resumption would replay the past here

	got := start(func() ([]toldEvent, error) { return readUntil(w, prefix+"end") })
	gotFollowed := start(func() ([]toldEvent, error) { return readUntil(followed, prefix+"end") })
	writes, perReset := 3000, 300
	if underRace {
		writes, perReset = 500, 50
	}
	resets, stop := resetEvery(t, link, 250*time.Millisecond)
	var wrote []toldEvent
	put := func(key, value string) {
		wrote = append(wrote, toldEvent{EventPut, key, value, mustPut(t, writer, key, value)})
	}
	for i := range writes {
		eventually(t, func() bool { return int(resets.Load()) >= i/perReset }, "a reset")
		key, value := fmt.Sprintf("%sk%d", prefix, i%7), strconv.Itoa(i)
		if i%3 != 0 {
			put(key, value)
			continue
		}
		put(prefix+"gone", value)
		rev := mustTxn(t, writer, clientv3.OpPut(key, value), clientv3.OpDelete(prefix+"gone"), clientv3.OpPut(prefix+"with", value))
		wrote = append(wrote, toldEvent{EventPut, key, value, rev}, toldEvent{EventDelete, prefix + "gone", "", rev},
			toldEvent{EventPut, prefix + "with", value, rev})
	}
	put(prefix+"end", "")
	within(t, time.Minute, got.done, "every event")
	within(t, time.Minute, gotFollowed.done, "every event")
	stop()
	require.NoError(t, got.err)
	require.True(t, slices.Equal(wrote, got.v), "%d events, not %d", len(got.v), len(wrote))
	require.NoError(t, gotFollowed.err)
	require.True(t, slices.Equal(wrote, gotFollowed.v), "%d events, not %d", len(gotFollowed.v), len(wrote))
}

// cutOff cuts a link, and meanwhile changes what is watched under prefix and compacts it. It
// returns when the link is healed.
func cutOff(t testing.TB, writer *clientv3.Client, link *etcdtest.Link, prefix string) {
	t.Helper()
	link.Cut()
	mustDelete(t, writer, prefix+"a")
	mustPut(t, writer, prefix+"b", "2")
	mustPut(t, writer, prefix+"passing", "")
	mustDelete(t, writer, prefix+"passing")
	mustPut(t, writer, prefix+"d", "2")
	mustCompact(t, writer, mustPut(t, writer, prefix+"d", "3"))
	// The server may not have sent it yet. Then nothing was lost, and Heal spares the connection.
	link.Reset()
	link.Heal()
}

func TestWatchWithSnapshotSendsTheDifferenceWhenCompactionOvertookIt(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 1)
	writer, prefix := cluster.Client(t), nameOf(t)+"/"
	client, link := linkedTo(t, cluster)
	for _, key := range []string{"a", "b", "c"} {
		mustPut(t, writer, prefix+key, "1")
	}
	w := mustWatch[string](t, client, prefix, WithPrefix(), WithCodec(Raw), WithSnapshot(), WithPrev())
	require.Zero(t, w.Revision())
	first, rev := untilSynced(t, w)
	require.Len(t, first, 3)
	require.Equal(t, rev, w.Revision())
	told := state{}
	told.apply(first...)

	cutOff(t, writer, link, prefix)
	difference, rev := untilSynced(t, w)
	prev := "1"
	require.Equal(t, []Event[string]{
		{Type: EventPut, Key: prefix + "b", Value: "2", Prev: &prev, Version: 2, CreateRevision: first[1].CreateRevision, Revision: difference[0].Revision},
		{Type: EventPut, Key: prefix + "d", Value: "3", Version: 2, CreateRevision: difference[1].Revision - 1, Revision: difference[1].Revision},
		{Type: EventDelete, Key: prefix + "a", Prev: &prev, Revision: rev},
	}, difference)
	told.apply(difference...)
	require.Equal(t, stateOf(t, writer, prefix, clientv3.WithRev(rev)), told)

	rev = mustPut(t, writer, prefix+"live", "")
	require.Equal(t, toldEvent{EventPut, prefix + "live", "", rev}, toldOf(next(t, w)))
	require.Equal(t, rev, w.Revision())
}

func TestWatchWithoutSnapshotEndsWithErrGapWhenCompactionOvertookIt(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 1)
	writer, prefix := cluster.Client(t), nameOf(t)+"/"
	client, link := linkedTo(t, cluster)
	w := mustWatch[string](t, client, prefix, WithPrefix(), WithCodec(Raw))
	rev := mustPut(t, writer, prefix+"a", "1")
	require.Equal(t, rev, next(t, w).Revision)
	cutOff(t, writer, link, prefix)
	events, cause := ends(t, w)
	require.Empty(t, events)
	require.ErrorIs(t, cause, ErrGap)
	require.GreaterOrEqual(t, w.Revision(), rev)
	require.ErrorIs(t, w.Close(), ErrGap)
	require.ErrorIs(t, w.Close(), ErrGap)
}

func TestWatchSendsItsUnreadEventsBeforeItsError(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 1)
	writer, prefix := cluster.Client(t), nameOf(t)+"/"
	client, link := linkedTo(t, cluster)
	w := mustWatch[string](t, client, prefix, WithPrefix(), WithCodec(Raw))
	var unread []Revision
	for i := range 5 {
		unread = append(unread, mustPut(t, writer, prefix+"a", strconv.Itoa(i)))
	}
	_ = next(t, w)
	last := mustPut(t, writer, prefix+"a", "read ahead")
	unread = append(unread, last)
	eventually(t, func() (ahead bool) {
		w.reflector.source.locked(func() { ahead = w.reflector.sub.next > last })
		return ahead
	}, "read ahead")
	cutOff(t, writer, link, prefix)
	eventually(t, w.queue.ending, "the end")
	require.NoError(t, w.Err(), "it has events left")
	events, cause := ends(t, w)
	var got []Revision
	for _, e := range events {
		got = append(got, e.Revision)
	}
	require.Equal(t, unread[1:], got)
	require.ErrorIs(t, cause, ErrGap)
}

// ending reports whether the feed's end is queued.
func (q *queue) ending() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return len(q.changes) > 0 && q.changes[len(q.changes)-1].end != nil
}

func TestWatchThatIsQuietIsNotOvertakenByCompaction(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 1)
	writer, key := cluster.Client(t), nameOf(t)
	client, link := linkedTo(t, cluster)
	mustPut(t, writer, key, "before")
	plain := mustWatch[string](t, client, key, WithCodec(Raw))
	follower := mustWatch[string](t, client, key, WithCodec(Raw), WithSnapshot())
	_, _ = untilSynced(t, follower)
	for range 3 {
		var last Revision
		for i := range 300 {
			last = mustPut(t, writer, key+"-other", strconv.Itoa(i))
		}
		eventually(t, func() bool { return plain.Revision() >= last && follower.Revision() >= last }, "progress")
		mustCompact(t, writer, last)
		link.Reset()
	}
	rev := mustPut(t, writer, key, "after")
	want := toldEvent{EventPut, key, "after", rev}
	require.Equal(t, want, toldOf(next(t, plain)))
	require.Equal(t, want, toldOf(next(t, follower)), "it need not resync")
}

func TestWatchListsManyKeysInPagesOfOneRevision(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 1)
	writer, prefix := cluster.Client(t), nameOf(t)+"/"
	const perTxn = 125
	count := 50_000
	if underRace {
		count = 5_000
	}
	for i := 0; i < count; i += perTxn {
		ops := make([]clientv3.Op, perTxn)
		for j := range ops {
			ops[j] = clientv3.OpPut(fmt.Sprintf("%s%05d", prefix, i+j), "1")
		}
		mustTxn(t, writer, ops...)
	}
	mustPut(t, writer, prefix[:len(prefix)-1], "before the prefix")
	mustPut(t, writer, prefix[:len(prefix)-1]+"0", "behind the prefix")

	type page struct {
		at       Revision
		limit    int64
		keys     int
		revision Revision
	}
	var pages []page
	meanwhile := []toldEvent{}
	client, err := clientv3.New(clientv3.Config{
		Endpoints: cluster.Endpoints(), Logger: zap.NewNop(),
		DialOptions: []grpc.DialOption{grpc.WithChainUnaryInterceptor(func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
			err := invoker(ctx, method, req, reply, cc, opts...)
			r, ok := req.(*etcdserverpb.RangeRequest)
			if !ok || r.KeysOnly || err != nil {
				return err
			}
			resp := reply.(*etcdserverpb.RangeResponse)
			pages = append(pages, page{r.Revision, r.Limit, len(resp.Kvs), resp.Header.Revision})
			if len(pages) <= 4 { // changes in what was listed, and in what was not yet
				for _, key := range []string{"00000", fmt.Sprintf("%05d", count-1), "new"} {
					key = fmt.Sprint(prefix, key)
					meanwhile = append(meanwhile, toldEvent{EventPut, key, "2", mustPut(t, writer, key, "2")})
				}
				for _, i := range []int{len(pages), count - 1 - len(pages)} {
					key := fmt.Sprintf("%s%05d", prefix, i)
					meanwhile = append(meanwhile, toldEvent{EventDelete, key, "", mustDelete(t, writer, key)})
				}
			}
			return nil
		})},
	})
	require.NoError(t, err)
	t.Cleanup(func() { _ = client.Close() })
	w := mustWatch[string](t, client, prefix, WithPrefix(), WithCodec(Raw), WithSnapshot())
	for i := range count {
		e := next(t, w)
		if want := (toldEvent{EventPut, fmt.Sprintf("%s%05d", prefix, i), "1", e.Revision}); toldOf(e) != want {
			require.Equal(t, want, toldOf(e)) // which is slow
		}
	}
	synced := next(t, w)
	require.Equal(t, EventSynced, synced.Type)
	for _, e := range meanwhile {
		require.Equal(t, e, toldOf(next(t, w)))
	}
	require.Greater(t, len(pages), 4)
	require.Zero(t, pages[0].at)
	listed := 0
	for i, p := range pages {
		listed += p.keys
		require.LessOrEqual(t, p.limit, int64(10_000))
		if i > 0 {
			require.Equal(t, pages[0].revision, p.at)
		}
	}
	require.Equal(t, count, listed)
	require.Equal(t, pages[0].revision, synced.Revision)
}

func TestWatchGoesOnAfterValuesThatDoNotDecode(t *testing.T) {
	t.Parallel()
	client := newClient(t, testCluster.Endpoints()...)
	big := strings.Repeat("x", 1_200_000)
	jsonRecord := func(t *testing.T) {
		key := nameOf(t)
		w := mustWatch[record](t, client, key)
		for _, value := range []string{"", "{", `{"A":"text"}`, `{"A":1}x`, big, "\xff\x00"} {
			rev := mustPut(t, client, key, value)
			e := next(t, w)
			require.Equal(t, EventInvalid, e.Type, "%.20q", value)
			require.Equal(t, value, string(e.Raw))
			require.Error(t, e.Err)
			require.Zero(t, e.Value)
			require.Equal(t, rev, e.Revision)
			require.Equal(t, key, e.Key)
		}
		mustPut(t, client, key, `{"A":1}`)
		e := next(t, w)
		require.Equal(t, EventPut, e.Type)
		require.Equal(t, record{A: 1}, e.Value)
		require.EqualValues(t, 7, e.Version)
		require.NoError(t, e.Err)
		require.Nil(t, e.Raw)
	}
	t.Run("JSON", jsonRecord)
	t.Run("JSON over a megabyte", func(t *testing.T) {
		w := mustWatch[string](t, client, nameOf(t))
		mustPut(t, client, nameOf(t), strconv.Quote(big))
		e := next(t, w)
		require.Equal(t, EventPut, e.Type)
		require.True(t, e.Value == big)
	})
	t.Run("Raw", func(t *testing.T) {
		text := mustWatch[string](t, client, nameOf(t), WithCodec(Raw))
		data := mustWatch[[]byte](t, client, nameOf(t), WithCodec(Raw))
		number := mustWatch[int](t, client, nameOf(t), WithCodec(Raw))
		for _, value := range []string{"", "{", big, "\xff\x00"} {
			mustPut(t, client, nameOf(t), value)
			e := next(t, text)
			require.Equal(t, EventPut, e.Type)
			require.True(t, e.Value == value)
			d := next(t, data)
			require.Equal(t, EventPut, d.Type)
			require.NotNil(t, d.Value)
			require.True(t, string(d.Value) == value)
			n := next(t, number)
			require.Equal(t, EventInvalid, n.Type)
			require.ErrorContains(t, n.Err, "*int")
			require.True(t, string(n.Raw) == value)
		}
	})
	t.Run("in a snapshot", func(t *testing.T) {
		prefix := nameOf(t) + "/"
		mustPut(t, client, prefix+"a", "{")
		mustPut(t, client, prefix+"b", "1")
		w := mustWatch[int](t, client, prefix, WithPrefix(), WithSnapshot(), WithPrev())
		require.Equal(t, EventInvalid, next(t, w).Type)
		require.Equal(t, 1, next(t, w).Value)
		require.Equal(t, EventSynced, next(t, w).Type)
		mustPut(t, client, prefix+"a", "2")
		e := next(t, w)
		require.Equal(t, 2, e.Value)
		require.Nil(t, e.Prev, "it did not decode")
		mustDelete(t, client, prefix+"a")
		require.Equal(t, 2, *next(t, w).Prev)
	})
}

// addEndpoints lets a client use other members too; what it has opened stays where it is.
func addEndpoints(client *clientv3.Client, endpoints ...string) {
	client.SetEndpoints(append(client.Endpoints(), endpoints...)...)
}

// awaitConnections waits until the client is connected to each of its endpoints.
func awaitConnections(t *testing.T, client *clientv3.Client) {
	t.Helper()
	connected := make(map[string]bool)
	eventually(t, func() bool {
		var answering peer.Peer
		_, err := etcdserverpb.NewMaintenanceClient(client.ActiveConnection()).
			Status(t.Context(), &etcdserverpb.StatusRequest{}, grpc.Peer(&answering))
		if err == nil {
			connected[answering.Addr.String()] = true
		}
		return len(connected) == len(client.Endpoints())
	}, "a connection to each endpoint")
}

func TestWatchLeavesAMemberThatIsIsolated(t *testing.T) {
	t.Parallel()
	onceInTime(t, func() bool { return leavesIsolated(t) }, "within three elections and one second")
}

// leavesIsolated isolates a member under a watch, and reports whether the watch was moved in time.
func leavesIsolated(t *testing.T) bool {
	cluster := etcdtest.Start(t, 3)
	leader := cluster.Leader()
	isolated := (leader + 1) % 3
	writer, prefix := newClient(t, cluster.Endpoints()[leader]), nameOf(t)+"/"
	client := newClient(t, cluster.Endpoints()[isolated])
	w := mustWatch[string](t, client, prefix, WithPrefix(), WithCodec(Raw))
	var wrote []toldEvent
	put := func(key string) {
		wrote = append(wrote, toldEvent{EventPut, key, "", mustPut(t, writer, key, "")})
	}
	put(prefix + "before")
	got, err := readUntil(w, prefix+"before")
	require.NoError(t, err)
	addEndpoints(client, cluster.Endpoints()[leader], cluster.Endpoints()[(leader+2)%3])

	// The member notifies its watches after three elections without a leader. On a busy machine
	// that is late.
	stuck := newClient(t, cluster.Endpoints()[isolated])
	watch := stuck.Watch(clientv3.WithRequireLeader(t.Context()), prefix, clientv3.WithCreatedNotify())
	require.True(t, (<-watch).Created)
	require.NoError(t, cluster.Isolate(isolated))
	begin := time.Now()
	told := start(func() (time.Time, error) {
		resp := <-watch
		return time.Now(), resp.Err()
	})
	for i := range 50 {
		put(prefix + strconv.Itoa(i))
	}
	put(prefix + "during")
	written := time.Since(begin)
	moved, err := readUntil(w, prefix+"during")
	took := time.Since(begin)
	require.NoError(t, err)
	within(t, 15*time.Second, told.done, "the member notices")
	require.ErrorIs(t, told.err, rpctypes.ErrNoLeader)
	t.Logf("the member noticed after %v, all was written after %v, and received after %v", told.v.Sub(begin), written, took)
	inTime := took < max(3*time.Second, told.v.Sub(begin), written)+time.Second
	got = append(got, moved...)

	require.NoError(t, cluster.Rejoin(isolated))
	put(prefix + "after")
	after, err := readUntil(w, prefix+"after")
	require.NoError(t, err)
	require.Equal(t, wrote, append(got, after...))
	return inTime
}

func TestWatchLeavesAConnectionThatIsHalfOpen(t *testing.T) {
	t.Parallel()
	link := etcdtest.StartLink(t, testCluster.Endpoints()[0])
	client, err := clientv3.New(clientv3.Config{
		Endpoints: []string{link.Endpoint()}, DialTimeout: 5 * time.Second, Logger: zap.NewNop(),
		DialKeepAliveTime: 10 * time.Second, DialKeepAliveTimeout: 2 * time.Second,
	})
	require.NoError(t, err)
	t.Cleanup(func() { _ = client.Close() })
	writer, prefix := newClient(t, testCluster.Endpoints()...), nameOf(t)+"/"
	w := mustWatch[string](t, client, prefix, WithPrefix(), WithCodec(Raw))
	wrote := []toldEvent{{EventPut, prefix + "before", "", mustPut(t, writer, prefix+"before", "")}}
	got, err := readUntil(w, prefix+"before")
	require.NoError(t, err)
	addEndpoints(client, testCluster.Endpoints()[0])

	link.Cut()
	for i := range 50 {
		key := prefix + strconv.Itoa(i)
		wrote = append(wrote, toldEvent{EventPut, key, "", mustPut(t, writer, key, "")})
	}
	resumed := start(func() ([]toldEvent, error) { return readUntil(w, prefix+"49") })
	within(t, 15*time.Second, resumed.done, "every event")
	require.NoError(t, resumed.err)
	require.Equal(t, wrote, append(got, resumed.v...))
}

// Without DialKeepAliveTime nobody ever closes the dead connection, and gRPC goes on giving it
// every second request.
func TestWatchMovesToAnotherConnectionFromOneThatIsSilent(t *testing.T) {
	t.Parallel()
	link := etcdtest.StartLink(t, testCluster.Endpoints()[0])
	client, key := newClient(t, link.Endpoint()), nameOf(t)
	w := mustWatch[string](t, client, key, WithCodec(Raw))
	rev := mustPut(t, testCluster.Client(t), key, "before")
	require.Equal(t, rev, next(t, w).Revision)
	addEndpoints(client, testCluster.Endpoints()[0])
	link.Cut()
	for range 3 {
		rev = mustPut(t, testCluster.Client(t), key, "after")
		select {
		case e := <-w.Events():
			require.Equal(t, rev, e.Revision)
		case <-time.After(30 * time.Second):
			require.FailNow(t, "no event")
		}
	}
}

func TestWatchNoticesARestoredCluster(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 1)
	writer, prefix := cluster.Client(t), nameOf(t)+"/"
	mustPut(t, writer, prefix+"a", "1")
	mustPut(t, writer, prefix+"b", "1")
	mustPut(t, writer, prefix+"c", "1")
	require.NoError(t, cluster.Backup())

	follower := mustWatch[string](t, cluster.Client(t), prefix, WithPrefix(), WithCodec(Raw), WithSnapshot(), WithPrev())
	plain := mustWatch[string](t, cluster.Client(t), prefix, WithPrefix(), WithCodec(Raw))
	other := mustWatch[string](t, cluster.Client(t), nameOf(t)+"-quiet", WithCodec(Raw))
	told := state{}
	first, _ := untilSynced(t, follower)
	told.apply(first...)
	mustPut(t, writer, prefix+"a", "2")
	mustDelete(t, writer, prefix+"b")
	lost := mustPut(t, writer, prefix+"d", "2")
	for range 3 {
		told.apply(next(t, follower))
		_ = next(t, plain)
	}
	require.Equal(t, state{prefix + "a": "2", prefix + "c": "1", prefix + "d": "2"}, told)
	eventually(t, func() bool { return other.Revision() >= lost }, "progress")

	require.NoError(t, cluster.Restore())
	for _, w := range []*Watcher[string]{plain, other} {
		events, cause := ends(t, w)
		require.Empty(t, events)
		require.ErrorIs(t, cause, ErrGap)
		require.GreaterOrEqual(t, w.Revision(), lost)
	}
	difference, rev := untilSynced(t, follower)
	require.Less(t, rev, lost)
	require.Equal(t, rev, follower.Revision())
	require.Len(t, difference, 3)
	for i, prev := range []string{"2", "", "2"} {
		if prev == "" {
			require.Nil(t, difference[i].Prev)
		} else {
			require.Equal(t, prev, *difference[i].Prev)
		}
	}
	told.apply(difference...)
	require.Equal(t, stateOf(t, writer, prefix), told)
	rev = mustPut(t, writer, prefix+"a", "live")
	require.LessOrEqual(t, rev, lost)
	require.Equal(t, toldEvent{EventPut, prefix + "a", "live", rev}, toldOf(next(t, follower)))
}

// The same value at the same revision is no change, and another at the same revision is one.
func TestWatchSendsWhatChangedInARestoredClusterAtTheSameRevision(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 1)
	writer, prefix := cluster.Client(t), nameOf(t)+"/"
	require.NoError(t, cluster.Backup())
	link := etcdtest.StartLink(t, cluster.Endpoints()[0])
	w := mustWatch[string](t, newClient(t, link.Endpoint()), prefix, WithPrefix(), WithCodec(Raw), WithSnapshot())
	_, _ = untilSynced(t, w)
	rev := mustPut(t, writer, prefix+"a", "same")
	mustPut(t, writer, prefix+"b", "old")
	mustPut(t, writer, prefix+"c", "lost")
	for range 3 {
		_ = next(t, w)
	}
	link.Cut()
	require.NoError(t, cluster.Restore())
	require.Equal(t, rev, mustPut(t, writer, prefix+"a", "same"))
	require.Equal(t, rev+1, mustPut(t, writer, prefix+"b", "new"))
	link.Heal()
	difference, _ := untilSynced(t, w)
	require.Len(t, difference, 2)
	require.Equal(t, toldEvent{EventPut, prefix + "b", "new", rev + 1}, toldOf(difference[0]))
	require.Equal(t, toldEvent{EventDelete, prefix + "c", "", rev + 1}, toldOf(difference[1]))
}

func TestWatchNoticesAnotherClusterWhoseRevisionIsPastItsOwn(t *testing.T) {
	t.Parallel()
	before, after := etcdtest.Start(t, 1), etcdtest.Start(t, 1)
	d, prefix := openDoor(t, before.Endpoints()[0]), nameOf(t)+"/"
	mustPut(t, before.Client(t), prefix+"a", "1")
	mustPut(t, before.Client(t), prefix+"b", "1")
	follower := mustWatch[string](t, newClient(t, d.addr), prefix, WithPrefix(), WithCodec(Raw), WithSnapshot())
	plain := mustWatch[string](t, newClient(t, d.addr), prefix, WithPrefix(), WithCodec(Raw))
	_, rev := untilSynced(t, follower)
	writer := after.Client(t)
	for range rev {
		mustPut(t, writer, prefix+"b", "2")
	}
	mustPut(t, writer, prefix+"c", "2")

	d.shut()
	d.to = after.Endpoints()[0]
	d.open()
	difference, rev := untilSynced(t, follower)
	require.Len(t, difference, 3)
	require.Equal(t, "2", difference[0].Value)
	require.Equal(t, "2", difference[1].Value)
	require.Equal(t, toldEvent{EventDelete, prefix + "a", "", rev}, toldOf(difference[2]))
	events, cause := ends(t, plain)
	require.Empty(t, events)
	require.ErrorIs(t, cause, ErrGap)
	rev = mustPut(t, writer, prefix+"a", "live")
	require.Equal(t, toldEvent{EventPut, prefix + "a", "live", rev}, toldOf(next(t, follower)))
}

// A list that begins in one etcd and ends in another would be of neither, and nothing would ever
// set it right.
func TestWatchListsAgainWhenEtcdIsAnotherBetweenTwoPages(t *testing.T) {
	t.Parallel()
	before, after := etcdtest.Start(t, 1), etcdtest.Start(t, 1)
	d, prefix := openDoor(t, before.Endpoints()[0]), nameOf(t)+"/"
	for i := range 40 {
		mustPut(t, before.Client(t), fmt.Sprintf("%s%02d", prefix, i), "before")
	}
	for range 2 {
		for i := range 40 {
			mustPut(t, after.Client(t), fmt.Sprintf("%s%02d", prefix, i+20), "after")
		}
	}
	pages := 0
	client, err := clientv3.New(clientv3.Config{
		Endpoints: []string{d.addr}, Logger: zap.NewNop(),
		DialOptions: []grpc.DialOption{grpc.WithChainUnaryInterceptor(func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
			err := invoker(ctx, method, req, reply, cc, opts...)
			if r, ok := req.(*etcdserverpb.RangeRequest); ok && !r.KeysOnly && err == nil {
				if pages++; pages == 1 {
					d.shut()
					d.to = after.Endpoints()[0]
					d.open()
				}
			}
			return err
		})},
	})
	require.NoError(t, err)
	t.Cleanup(func() { _ = client.Close() })
	w := mustWatch[string](t, client, prefix, WithPrefix(), WithCodec(Raw), WithSnapshot())
	told := state{}
	events, _ := untilSynced(t, w)
	told.apply(events...)
	require.Equal(t, stateOf(t, after.Client(t), prefix), told)
}

func TestWatchIsKeptForAReaderWhoIsOnlySlow(t *testing.T) {
	t.Parallel()
	client, streams := countingStreams(t)
	const puts = 30
	first := mustPut(t, client, nameOf(t), "")
	for range puts - 1 {
		mustPut(t, client, nameOf(t), strings.Repeat("x", 1_000_000))
	}
	w := mustWatch[string](t, client, nameOf(t), WithCodec(Raw), WithRevision(first))
	for version := range puts {
		time.Sleep(20 * time.Millisecond) // so that the whole is not there before it is read
		require.EqualValues(t, version+1, next(t, w).Version)
	}
	require.LessOrEqual(t, streams.all.Load(), int64(4), "or etcd would have read all of it again and again")
}

func TestWatchWithoutPermissionFailsAtOnce(t *testing.T) {
	t.Parallel()
	cluster, _ := authCluster(t, 300) // or a read might be repeated for its token's sake
	var reads atomic.Int64
	client := userClient(t, "user", []grpc.DialOption{grpc.WithChainUnaryInterceptor(
		func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
			if strings.HasSuffix(method, "/Range") {
				reads.Add(1)
			}
			return invoker(ctx, method, req, reply, cc, opts...)
		})}, cluster.Endpoints()...)
	// The prefix "allowed" covers more keys than are allowed.
	for _, key := range []string{"forbidden", "allowed", "allowed/key"} {
		for _, opts := range [][]WatchOption{{WithPrefix()}, {WithPrefix(), WithSnapshot()}, {WithPrefix(), WithRevision(1)}} {
			reads.Store(0)
			w, err := Watch[string](context.Background(), client, key, opts...)
			if key == "allowed/key" {
				require.NoError(t, err)
				require.NoError(t, w.Close())
				continue
			}
			require.Nil(t, w)
			require.ErrorIs(t, err, rpctypes.ErrPermissionDenied)
			require.ErrorContains(t, err, strconv.Quote(key))
			require.EqualValues(t, 1, reads.Load())
		}
	}
}

func TestWatchEndsWhenItsPermissionWasRevoked(t *testing.T) {
	t.Parallel()
	cluster, root := authCluster(t, 1)
	link := etcdtest.StartLink(t, cluster.Endpoints()[0])
	client := userClient(t, "user", nil, link.Endpoint())
	plain := mustWatch[string](t, client, "allowed/a", WithCodec(Raw))
	follower := mustWatch[string](t, client, "allowed/", WithCodec(Raw), WithPrefix(), WithSnapshot())
	_, _ = untilSynced(t, follower)
	mustPut(t, root, "allowed/a", "1")
	_, _ = next(t, plain), next(t, follower)
	link.Cut()
	_, err := root.RoleRevokePermission(context.Background(), "user", "allowed/", "allowed0")
	require.NoError(t, err)
	mustPut(t, root, "allowed/a", "secret")
	// Without Reset, Heal would spare a connection on which nothing was sent while it was cut.
	link.Reset()
	link.Heal()
	for _, w := range []*Watcher[string]{plain, follower} {
		events, cause := ends(t, w)
		require.Empty(t, events)
		require.ErrorIs(t, cause, rpctypes.ErrPermissionDenied)
		require.ErrorIs(t, w.Close(), rpctypes.ErrPermissionDenied)
	}
}

func TestWatchOutlivesItsTokens(t *testing.T) {
	t.Parallel()
	cluster, root := authCluster(t, 1)
	link := etcdtest.StartLink(t, cluster.Endpoints()[0])
	client := userClient(t, "user", nil, link.Endpoint())
	w := mustWatch[string](t, client, "allowed/", WithCodec(Raw), WithPrefix())
	follower := mustWatch[string](t, client, "allowed/", WithCodec(Raw), WithPrefix(), WithSnapshot())
	_, _ = untilSynced(t, follower)
	// By then nobody has used a token for longer than it lives.
	resets, stop := resetEvery(t, link, 2500*time.Millisecond)
	var wrote []toldEvent
	put := func(key string) {
		wrote = append(wrote, toldEvent{EventPut, key, "", mustPut(t, root, key, "")})
	}
	got := start(func() ([]toldEvent, error) { return readUntil(w, "allowed/end") })
	gotFollowed := start(func() ([]toldEvent, error) { return readUntil(follower, "allowed/end") })
	for i := 0; resets.Load() < 3; i++ {
		put(fmt.Sprint("allowed/", i))
		time.Sleep(20 * time.Millisecond)
	}
	stop()
	put("allowed/end")
	within(t, 15*time.Second, got.done, "every event")
	within(t, 15*time.Second, gotFollowed.done, "every event")
	require.NoError(t, got.err)
	require.NoError(t, gotFollowed.err)
	require.Equal(t, wrote, got.v)
	require.Equal(t, wrote, gotFollowed.v)
}

// etcd refuses a new watch on a stream that was opened with a token which has expired since
// (etcd-io/etcd#12385), and clientv3 puts a client's watches on one stream.
func TestWatchStandsBesideOneWhoseTokenHasExpired(t *testing.T) {
	t.Parallel()
	cluster, root := authCluster(t, 1)
	client := userClient(t, "user", nil, cluster.Endpoints()...)
	first := mustWatch[string](t, client, "allowed/", WithCodec(Raw), WithPrefix())
	rev := mustPut(t, root, "allowed/a", "")
	require.Equal(t, rev, next(t, first).Revision)
	// A token lives for a second after its last use, and etcd checks once a second.
	time.Sleep(3 * time.Second)
	second := mustWatch[string](t, client, "allowed/", WithCodec(Raw), WithPrefix())
	rev = mustPut(t, root, "allowed/a", "")
	require.Equal(t, rev, next(t, first).Revision)
	require.Equal(t, rev, next(t, second).Revision)
}

func TestWatchRefusesBadArguments(t *testing.T) {
	t.Parallel()
	client, requests := countingClient(t)
	for _, test := range []struct {
		key  string
		opts []WatchOption
		want string
	}{
		{"", nil, "key is empty"},
		{"key", []WatchOption{WithRevision(-1)}, "WithRevision is negative"},
		{"key", []WatchOption{WithCodec(nil)}, "WithCodec"},
		{"key", []WatchOption{WithRevision(5), WithSnapshot()}, "WithRevision cannot be combined with WithSnapshot"},
		{"key", []WatchOption{WithSnapshot(), WithRevision(5)}, "WithRevision cannot be combined with WithSnapshot"},
		{"key", []WatchOption{WithRetryPolicy(RetryPolicy{Initial: -1})}, "RetryPolicy.Initial"},
		{"key", []WatchOption{WithRetryPolicy(RetryPolicy{Max: -1})}, "RetryPolicy.Max"},
		{"key", []WatchOption{WithRetryPolicy(RetryPolicy{Attempts: -1})}, "RetryPolicy.Attempts"},
		{"key", []WatchOption{WithRetryPolicy(RetryPolicy{AttemptTimeout: -1})}, "RetryPolicy.AttemptTimeout"},
	} {
		w, err := Watch[string](context.Background(), client, test.key, test.opts...)
		require.ErrorContains(t, err, test.want)
		require.Nil(t, w)
	}
	require.Zero(t, requests.Load())
	var noContext context.Context
	require.PanicsWithValue(t, "etcdutil: nil ctx", func() { _, _ = Watch[string](noContext, client, "key") })
	require.PanicsWithValue(t, "etcdutil: nil client", func() { _, _ = Watch[string](context.Background(), nil, "key") })
	_, err := Watch[string](context.Background(), clientv3.NewCtxClient(context.Background()), "key")
	require.ErrorContains(t, err, "no connection")
	ctx, cancel := context.WithCancelCause(context.Background())
	cause := errors.New("the parent's cause")
	cancel(cause)
	_, err = Watch[string](ctx, client, "key")
	require.ErrorIs(t, err, cause)
	require.ErrorIs(t, err, context.Canceled)
	require.Zero(t, requests.Load())
}

func TestWatchGivesUpAsItsPolicySaysWhenEtcdIsGone(t *testing.T) {
	t.Parallel()
	client, link := linkedClient(t)
	link.Cut()
	watching := start(func() (*Watcher[string], error) {
		return Watch[string](context.Background(), client, "key", WithRetryPolicy(RetryPolicy{Elapsed: 300 * time.Millisecond}))
	})
	within(t, 2*time.Second, watching.done, "it gives up")
	require.ErrorContains(t, watching.err, "gave up")
	// Once it stands it does not give up.
	link.Heal()
	mustGet(t, client, "any") // over a new connection
	w := mustWatch[string](t, client, nameOf(t), WithCodec(Raw), WithRetryPolicy(RetryPolicy{Elapsed: 2 * time.Second, Attempts: 1}))
	link.Cut()
	time.Sleep(3 * time.Second)
	rev := mustPut(t, newClient(t, testCluster.Endpoints()...), nameOf(t), "")
	require.NoError(t, w.Err())
	link.Heal()
	require.Equal(t, rev, next(t, w).Revision)
}

// serverWatches is how many watches the members in this process have, of all clusters.
func serverWatches(t testing.TB, endpoint string) int {
	t.Helper()
	resp, err := http.Get("http://" + endpoint + "/metrics")
	require.NoError(t, err)
	defer resp.Body.Close()
	metrics, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	match := regexp.MustCompile(`(?m)^etcd_debugging_mvcc_watcher_total (\S+)$`).FindSubmatch(metrics)
	require.NotNil(t, match)
	n, err := strconv.ParseFloat(string(match[1]), 64)
	require.NoError(t, err)
	return int(n)
}

// It is not parallel: it counts goroutines, and the server's watches.
func TestWatchLeavesNothingBehind(t *testing.T) {
	http.DefaultClient.CloseIdleConnections()
	client, endpoint := newClient(t, testCluster.Endpoints()...), testCluster.Endpoints()[0]
	mustPut(t, client, nameOf(t), "1")
	eventually(t, func() bool { return serverWatches(t, endpoint) == 0 }, "no watches of earlier tests")
	http.DefaultClient.CloseIdleConnections()
	running := goleak.IgnoreCurrent()
	ctx, cancel := context.WithCancel(context.Background())
	var watchers []*Watcher[string]
	for i := range 30 {
		opts := [][]WatchOption{{WithCodec(Raw)}, {WithSnapshot()}, {WithPrefix(), WithPrev()}}[i%3]
		w, err := Watch[string](ctx, client, nameOf(t), opts...)
		require.NoError(t, err)
		watchers = append(watchers, w)
	}
	eventually(t, func() bool { return serverWatches(t, endpoint) == 30 }, "the server's watches")
	mustPut(t, client, nameOf(t), "2") // which nobody reads
	for _, w := range watchers[:15] {
		require.NoError(t, w.Close())
	}
	cancel()
	eventually(t, func() bool { return serverWatches(t, endpoint) == 0 }, "no watches on the server")
	http.DefaultClient.CloseIdleConnections()
	require.NoError(t, leaked(running))
	for _, w := range watchers {
		require.NoError(t, w.Close())
	}
}

func TestWatcherClosesWhileEtcdIsGone(t *testing.T) {
	t.Parallel()
	for name, fault := range map[string]func(*etcdtest.Cluster, *etcdtest.Link){
		"stopped":   func(c *etcdtest.Cluster, _ *etcdtest.Link) { _ = c.Stop(0) },
		"cut":       func(_ *etcdtest.Cluster, l *etcdtest.Link) { l.Cut() },
		"there":     func(*etcdtest.Cluster, *etcdtest.Link) {},
		"long gone": func(_ *etcdtest.Cluster, l *etcdtest.Link) { l.Cut(); time.Sleep(idleTimeout + time.Second) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			cluster := etcdtest.Start(t, 1)
			client, link := linkedTo(t, cluster)
			w := mustWatch[string](t, client, nameOf(t), WithCodec(Raw), WithSnapshot())
			mustPut(t, cluster.Client(t), nameOf(t), "never read")
			fault(cluster, link)
			took := testclock.Time(func() {
				var closing sync.WaitGroup
				for range 10 {
					closing.Go(func() {
						if err := w.Close(); err != nil {
							t.Error(err)
						}
					})
				}
				closing.Wait()
			})
			require.Less(t, took, time.Second)
			_, cause := ends(t, w)
			require.Equal(t, ErrClosed, cause)
			require.NoError(t, w.Close())
			require.Zero(t, w.Revision())
		})
	}
}

func TestWatcherEndsWithItsParent(t *testing.T) {
	t.Parallel()
	type key struct{}
	cause := errors.New("the parent's cause")
	ctx, cancel := context.WithCancelCause(context.WithValue(context.Background(), key{}, "value"))
	w, err := Watch[string](ctx, newClient(t, testCluster.Endpoints()...), nameOf(t))
	require.NoError(t, err)
	require.Equal(t, "value", w.Value(key{}))
	cancel(cause)
	within(t, time.Second, w.Done(), "the end")
	_, got := ends(t, w)
	require.Equal(t, cause, got)
	require.NoError(t, w.Close(), "a parent's end is no loss")
	require.Equal(t, cause, context.Cause(w))
}

func TestWatcherEndsWhenItsClientIsClosed(t *testing.T) {
	t.Parallel()
	client := newClient(t, testCluster.Endpoints()...)
	plain := mustWatch[string](t, client, nameOf(t))
	follower := mustWatch[string](t, client, nameOf(t), WithSnapshot())
	_, _ = untilSynced(t, follower)
	require.NoError(t, client.Close())
	for _, w := range []*Watcher[string]{plain, follower} {
		_, cause := ends(t, w)
		require.ErrorContains(t, cause, "client")
		require.Error(t, w.Close())
	}
	_, err := Watch[string](context.Background(), client, nameOf(t))
	require.ErrorContains(t, err, "client")
}

func TestWatcherRevisionIsExactAfterEachEvent(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 1)
	client, prefix := cluster.Client(t), nameOf(t)+"/"
	w := mustWatch[string](t, client, prefix, WithPrefix(), WithCodec(Raw))
	require.Equal(t, stateRevision(t, client), w.Revision())
	var wrote []toldEvent
	for i := range 20 {
		value := strconv.Itoa(i)
		rev := mustTxn(t, client, clientv3.OpPut(prefix+"a", value), clientv3.OpPut("other", value), clientv3.OpPut(prefix+"b", value))
		wrote = append(wrote, toldEvent{EventPut, prefix + "a", value, rev}, toldEvent{EventPut, prefix + "b", value, rev})
		rev = mustPut(t, client, prefix+"c", value)
		wrote = append(wrote, toldEvent{EventPut, prefix + "c", value, rev})
		mustPut(t, client, "other", value)
	}
	last := stateRevision(t, client)
	for i, want := range wrote {
		require.Equal(t, want, toldOf(next(t, w)))
		rev := w.Revision()
		inMidst := i+1 < len(wrote) && wrote[i+1].Revision == want.Revision
		require.Equal(t, !inMidst, rev >= want.Revision)
		left := slices.IndexFunc(wrote, func(e toldEvent) bool { return e.Revision > rev }) // -1: none
		if inMidst {
			require.Equal(t, i, left, "the transaction is left, and no more")
		} else if i+1 < len(wrote) {
			require.Equal(t, i+1, left)
		}
		if i%10 > 2 || left < 0 {
			continue
		}
		again, err := Watch[string](context.Background(), client, prefix, WithPrefix(), WithCodec(Raw), WithRevision(rev+1))
		require.NoError(t, err)
		require.Equal(t, rev, again.Revision())
		for _, want := range wrote[left:] {
			require.Equal(t, want, toldOf(next(t, again)))
		}
		require.NoError(t, again.Close())
	}
	eventually(t, func() bool { return w.Revision() == last }, "progress")
	require.NoError(t, w.Close())
	require.Equal(t, last, w.Revision())
}

func mustGet(t testing.TB, client *clientv3.Client, key string, opts ...clientv3.OpOption) *clientv3.GetResponse {
	t.Helper()
	resp, err := client.Get(context.Background(), key, opts...)
	require.NoError(t, err)
	return resp
}

// stateRevision is etcd's revision.
func stateRevision(t testing.TB, client *clientv3.Client) Revision {
	t.Helper()
	return mustGet(t, client, "any").Header.Revision
}

func TestWatchFromARevision(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 1)
	client, link := linkedTo(t, cluster)
	writer, key := cluster.Client(t), nameOf(t)
	first := mustPut(t, writer, key, "0")
	for i := 1; i < 10; i++ {
		require.Equal(t, first+Revision(i), mustPut(t, writer, key, strconv.Itoa(i)))
	}
	values := func(w *Watcher[string], from, to int) {
		t.Helper()
		for i := from; i < to; i++ {
			require.Equal(t, toldEvent{EventPut, key, strconv.Itoa(i), first + Revision(i)}, toldOf(next(t, w)))
		}
	}
	_, err := Watch[string](context.Background(), client, key, WithCodec(Raw), WithRevision(first+11))
	require.ErrorIs(t, err, ErrGap, "more than one past etcd's")
	values(mustWatch[string](t, client, key, WithCodec(Raw), WithRevision(1)), 0, 10)
	values(mustWatch[string](t, client, key, WithCodec(Raw), WithRevision(first+5)), 5, 10)
	now := mustWatch[string](t, client, key, WithCodec(Raw), WithRevision(first+10))
	require.Equal(t, first+9, now.Revision())
	zero := mustWatch[string](t, client, key, WithCodec(Raw), WithRevision(0))
	for i := 10; i < 20; i++ {
		mustPut(t, writer, key, strconv.Itoa(i))
		if i == 12 {
			values(now, 10, 13)
			values(zero, 10, 13)
			eventually(t, func() bool { return now.Revision() == first+12 }, "progress")
			mustCompact(t, writer, first+12)
			link.Reset()
		}
	}
	values(now, 13, 20)
	values(zero, 13, 20)

	for _, rev := range []Revision{1, first, first + 11} {
		_, err := Watch[string](context.Background(), client, key, WithCodec(Raw), WithRevision(rev))
		require.ErrorIs(t, err, ErrGap, rev)
	}
	values(mustWatch[string](t, client, key, WithCodec(Raw), WithRevision(first+13)), 13, 20)
}

func TestWatchSendsThePreviousValue(t *testing.T) {
	t.Parallel()
	client, prefix := newClient(t, testCluster.Endpoints()...), nameOf(t)+"/"
	mustPut(t, client, prefix+"a", "1")
	plain := mustWatch[string](t, client, prefix, WithPrefix(), WithCodec(Raw), WithPrev())
	without := mustWatch[string](t, client, prefix, WithPrefix(), WithCodec(Raw))
	follower := mustWatch[string](t, client, prefix, WithPrefix(), WithCodec(Raw), WithPrev(), WithSnapshot())
	first, _ := untilSynced(t, follower)
	require.Len(t, first, 1)
	require.Nil(t, first[0].Prev)
	mustPut(t, client, prefix+"a", "2")
	mustPut(t, client, prefix+"b", "")
	mustTxn(t, client, clientv3.OpDelete(prefix+"a"), clientv3.OpPut(prefix+"b", "2"))
	mustPut(t, client, prefix+"a", "3")
	one, two, empty := "1", "2", ""
	for _, prev := range []*string{&one, nil, &two, &empty, nil} {
		require.Equal(t, prev, next(t, plain).Prev)
		require.Equal(t, prev, next(t, follower).Prev)
		require.Nil(t, next(t, without).Prev)
	}
}

func TestWatchSeesNoOtherKeys(t *testing.T) {
	t.Parallel()
	client, name := newClient(t, testCluster.Endpoints()...), nameOf(t)
	for _, opts := range [][]WatchOption{nil, {WithSnapshot()}} {
		opts = append(opts, WithCodec(Raw))
		key := mustWatch[string](t, client, name+"/b", opts...)
		prefix := mustWatch[string](t, client, name+"/b", append(opts, WithPrefix())...)
		if len(opts) > 1 {
			_, _ = untilSynced(t, key)
			_, _ = untilSynced(t, prefix)
		}
		for _, other := range []string{"", "/", "/a", "/a\xff", "/c", "/B", "0"} {
			mustPut(t, client, name+other, "")
		}
		mustPut(t, client, name+"/b\xff", "")
		mustPut(t, client, name+"/b", "")
		require.Equal(t, name+"/b\xff", next(t, prefix).Key)
		require.Equal(t, name+"/b", next(t, prefix).Key)
		require.Equal(t, name+"/b", next(t, key).Key)
		mustDelete(t, client, name+"/b\xff")
		mustDelete(t, client, name+"/b")
		require.Equal(t, name+"/b\xff", next(t, prefix).Key)
		require.Equal(t, EventDelete, next(t, prefix).Type)
		require.Equal(t, EventDelete, next(t, key).Type)
	}
	// No key is greater: the range of this prefix has no end.
	all := mustWatch[string](t, client, "\xff", WithPrefix(), WithCodec(Raw))
	mustPut(t, client, name, "")
	mustPut(t, client, "\xff"+name, "")
	require.Equal(t, "\xff"+name, next(t, all).Key)
}

func TestWatchWorksInANamespace(t *testing.T) {
	t.Parallel()
	direct, space := newClient(t, testCluster.Endpoints()...), nameOf(t)+":"
	client, link := linkedClient(t)
	client.KV = namespace.NewKV(client.KV, space)
	client.Watcher = namespace.NewWatcher(client.Watcher, space)
	for i := range 40 {
		mustPut(t, direct, fmt.Sprintf("%sp/%02d", space, i), "1")
	}
	mustPut(t, direct, "p/00", "another's")
	w := mustWatch[string](t, client, "p/", WithPrefix(), WithCodec(Raw), WithSnapshot())
	plain := mustWatch[string](t, client, "p/", WithPrefix(), WithCodec(Raw), WithPrev())
	first, _ := untilSynced(t, w)
	require.Len(t, first, 40)
	for i, e := range first {
		require.Equal(t, fmt.Sprintf("p/%02d", i), e.Key)
	}
	for _, value := range []string{"2", "3"} {
		rev := mustPut(t, direct, space+"p/00", value)
		want := toldEvent{EventPut, "p/00", value, rev}
		require.Equal(t, want, toldOf(next(t, w)))
		e := next(t, plain)
		require.Equal(t, want, toldOf(e))
		require.NotNil(t, e.Prev)
		link.Reset()
	}
}

// streamCounter counts the watch streams that a client has open, and all that it ever had.
type streamCounter struct{ open, all atomic.Int64 }

func (c *streamCounter) intercept(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, streamer grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	stream, err := streamer(ctx, desc, cc, method, opts...)
	if err == nil && strings.HasSuffix(method, "Watch/Watch") {
		c.open.Add(1)
		c.all.Add(1)
		context.AfterFunc(stream.Context(), func() { c.open.Add(-1) })
	}
	return stream, err
}

// countingStreams is a client of testCluster, and the counter of its watch streams.
func countingStreams(t *testing.T) (*clientv3.Client, *streamCounter) {
	t.Helper()
	var streams streamCounter
	client, err := clientv3.New(clientv3.Config{
		Endpoints: testCluster.Endpoints(), Logger: zap.NewNop(),
		DialOptions: []grpc.DialOption{grpc.WithChainStreamInterceptor(streams.intercept)},
	})
	require.NoError(t, err)
	t.Cleanup(func() { _ = client.Close() })
	return client, &streams
}

func TestWatchesOfAClientShareAStream(t *testing.T) {
	t.Parallel()
	client, streams := countingStreams(t)
	watchers := make([]*Watcher[string], 20)
	for i := range watchers {
		ctx := metadata.AppendToOutgoingContext(t.Context(), "request-id", strconv.Itoa(i))
		w, err := Watch[string](ctx, client, nameOf(t), WithCodec(Raw))
		require.NoError(t, err)
		watchers[i] = w
	}
	rev := mustPut(t, client, nameOf(t), "")
	for _, w := range watchers {
		require.Equal(t, rev, next(t, w).Revision)
	}
	require.EqualValues(t, 1, streams.all.Load())
	for _, w := range watchers {
		require.NoError(t, w.Close())
	}
	eventually(t, func() bool { return streams.open.Load() == 0 }, "the stream is closed")
}

// clientv3 opens a stream for a watch and keeps it, with nothing on it, if the watch's context ends
// before it stands.
func TestWatcherThatIsClosedBeforeItsWatchStandsLeavesNoStream(t *testing.T) {
	t.Parallel()
	client, streams := countingStreams(t)
	for i := range 200 {
		w, err := Watch[string](t.Context(), client, nameOf(t))
		require.NoError(t, err)
		sleep(t.Context(), time.Duration(i%8)*100*time.Microsecond)
		require.NoError(t, w.Close())
	}
	eventually(t, func() bool { return streams.open.Load() == 0 }, "no stream is left")
	require.Positive(t, streams.all.Load())
}

// What was written between the first look and the watch could be compacted before the watch stood.
func TestWatchIsNotOvertakenByACompactionRightAfterIt(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 1)
	client, writer := cluster.Client(t), cluster.Client(t)
	for range 100 {
		w := mustWatch[string](t, client, nameOf(t), WithCodec(Raw))
		first := mustPut(t, writer, nameOf(t), "first")
		last := mustPut(t, writer, nameOf(t), "last")
		mustCompact(t, writer, last)
		require.Equal(t, first, next(t, w).Revision)
		require.Equal(t, last, next(t, w).Revision)
		require.NoError(t, w.Close())
	}
}

// clientv3 keeps the stream of a watch that ends while it is resumed.
func TestWatcherLeavesNoStreamThroughResets(t *testing.T) {
	t.Parallel()
	client, streams := countingStreams(t)
	link := etcdtest.StartLink(t, testCluster.Endpoints()[0])
	client.SetEndpoints(link.Endpoint())
	w := mustWatch[string](t, client, nameOf(t), WithCodec(Raw))
	for range 20 {
		link.Reset()
		rev := mustPut(t, testCluster.Client(t), nameOf(t), "")
		require.Equal(t, rev, next(t, w).Revision)
	}
	eventually(t, func() bool { return streams.open.Load() == 1 }, "one stream is open")
	require.NoError(t, w.Close())
	eventually(t, func() bool { return streams.open.Load() == 0 }, "none is left")
}

func TestWatchNoticesARestoreThatHasBeenOvertaken(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 1)
	d, prefix := openDoor(t, cluster.Endpoints()[0]), nameOf(t)+"/"
	writer, client := cluster.Client(t), newClient(t, d.addr)
	require.NoError(t, cluster.Backup())
	plain := mustWatch[string](t, client, prefix, WithPrefix(), WithCodec(Raw))
	follower := mustWatch[string](t, client, prefix, WithPrefix(), WithCodec(Raw), WithSnapshot())
	_, _ = untilSynced(t, follower)
	for i := range 5 {
		mustPut(t, writer, fmt.Sprint(prefix, "before-", i), "")
		_, _ = next(t, plain), next(t, follower)
	}
	d.shut()
	require.NoError(t, cluster.Restore())
	direct := cluster.Client(t)
	for i := range 20 {
		mustPut(t, direct, fmt.Sprint(prefix, "after-", i), "")
	}
	d.open()
	told := state{}
	for i := range 5 {
		told[fmt.Sprint(prefix, "before-", i)] = ""
	}
	events, _ := untilSynced(t, follower)
	told.apply(events...)
	require.Equal(t, stateOf(t, direct, prefix), told)
	_, cause := ends(t, plain)
	require.ErrorIs(t, cause, ErrGap)
}

func TestWatchNoticesARestoreWhileItsReaderIsBehind(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 1)
	writer, key := cluster.Client(t), nameOf(t)
	require.NoError(t, cluster.Backup())
	client, streams := countingStreams(t)
	client.SetEndpoints(cluster.Endpoints()...)
	w := mustWatch[string](t, client, key, WithCodec(Raw))
	const puts = 20
	for range puts {
		mustPut(t, writer, key, strings.Repeat("x", 1_000_000))
	}
	eventually(t, func() bool { return streams.open.Load() == 0 }, "the watch is put off")
	require.NoError(t, cluster.Restore())
	direct := cluster.Client(t)
	for range 2 * puts {
		mustPut(t, direct, key, "of another history")
	}
	events, cause := ends(t, w)
	require.ErrorIs(t, cause, ErrGap)
	require.Less(t, len(events), puts)
	for _, e := range events {
		require.Len(t, e.Value, 1_000_000)
	}
}

// While a connection is dead that nobody has closed, a watch ends because it is silent, and not
// because the connection broke.
func TestWatchNoticesARestoreBehindAConnectionThatWasSilent(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 1)
	writer, prefix := cluster.Client(t), nameOf(t)+"/"
	require.NoError(t, cluster.Backup())
	link := etcdtest.StartLink(t, cluster.Endpoints()[0])
	client := newClient(t, link.Endpoint())
	follower := mustWatch[string](t, client, prefix, WithPrefix(), WithCodec(Raw), WithSnapshot())
	plain := mustWatch[string](t, client, prefix, WithPrefix(), WithCodec(Raw))
	told := state{}
	first, _ := untilSynced(t, follower)
	told.apply(first...)
	for i := range 5 {
		mustPut(t, writer, fmt.Sprint(prefix, "before-", i), "")
		told.apply(next(t, follower))
		_ = next(t, plain)
	}
	link.Cut()
	sleep(t.Context(), 2*idleTimeout+2*time.Second)
	require.NoError(t, cluster.Restore())
	direct := cluster.Client(t)
	for i := range 20 {
		mustPut(t, direct, fmt.Sprint(prefix, "after-", i), "")
	}
	link.Heal()
	difference, _ := untilSynced(t, follower)
	told.apply(difference...)
	require.Equal(t, stateOf(t, direct, prefix), told)
	events, cause := ends(t, plain)
	require.Empty(t, events)
	require.ErrorIs(t, cause, ErrGap)
}

func TestWatchNoticesARestoreWhileAListWaitsForItsReader(t *testing.T) {
	t.Parallel()
	const keys = 60
	cluster := etcdtest.Start(t, 1)
	prefix := nameOf(t) + "/"
	key := func(i int) string { return fmt.Sprintf("%s%02d", prefix, i) }
	for i := range keys {
		mustPut(t, cluster.Client(t), key(i), strings.Repeat("x", 300_000))
	}
	require.NoError(t, cluster.Backup())
	writer := cluster.Client(t)
	for i := range 5 {
		mustPut(t, writer, key(i), "lost")
	}
	w := mustWatch[string](t, cluster.Client(t), prefix, WithPrefix(), WithCodec(Raw), WithSnapshot())
	told := state{}
	told.apply(next(t, w)) // it is being made, and has more than is read ahead
	require.NoError(t, cluster.Restore())
	direct := cluster.Client(t)
	var last Revision
	for i := range 10 {
		last = mustPut(t, direct, key(keys-1-i), "new")
	}
	for synced := false; !synced || w.Revision() < last; { // the list may be of a revision in between
		select {
		case e := <-w.Events():
			told.apply(e)
			synced = synced || e.Type == EventSynced
		case <-time.After(10 * time.Millisecond):
		}
	}
	require.True(t, maps.Equal(stateOf(t, direct, prefix), told))
}

func TestWatchListsSmallerPagesWhereTheClientTakesNoMessageOfThatSize(t *testing.T) {
	t.Parallel()
	client, err := clientv3.New(clientv3.Config{Endpoints: testCluster.Endpoints(), Logger: zap.NewNop(), MaxCallRecvMsgSize: 2_000_000})
	require.NoError(t, err)
	t.Cleanup(func() { _ = client.Close() })
	prefix := nameOf(t) + "/"
	for i := range 200 {
		mustPut(t, client, fmt.Sprintf("%s%04d", prefix, i), "")
	}
	for i := range 3 { // each fits
		mustPut(t, client, fmt.Sprint(prefix, "big-", i), strings.Repeat("x", 1_400_000))
	}
	w := mustWatch[string](t, client, prefix, WithPrefix(), WithCodec(Raw), WithSnapshot())
	events, _ := untilSynced(t, w)
	require.Len(t, events, 203)
}

func TestWatchOutlivesAnOutageThoughItsPolicyIsDefiniteOnly(t *testing.T) {
	t.Parallel()
	d := openDoor(t, testCluster.Endpoints()[0])
	w := mustWatch[string](t, newClient(t, d.addr), nameOf(t), WithCodec(Raw),
		// The first attempt succeeds within this timeout, on a slow machine too.
		WithRetryPolicy(RetryPolicy{DefiniteOnly: true, AttemptTimeout: 2 * time.Second}))
	d.shut()
	sleep(t.Context(), 6*time.Second) // in which attempts time out
	rev := mustPut(t, testCluster.Client(t), nameOf(t), "")
	d.open()
	require.Equal(t, rev, next(t, w).Revision)
}

// The watch streams have a limit of their own.
func TestWatchTakesEventsThatAreLargerThanTheClientsLimit(t *testing.T) {
	t.Parallel()
	client, err := clientv3.New(clientv3.Config{Endpoints: testCluster.Endpoints(), Logger: zap.NewNop(), MaxCallRecvMsgSize: 500_000})
	require.NoError(t, err)
	t.Cleanup(func() { _ = client.Close() })
	w := mustWatch[string](t, client, nameOf(t), WithCodec(Raw))
	mustPut(t, testCluster.Client(t), nameOf(t), strings.Repeat("x", 1_000_000))
	require.Len(t, next(t, w).Value, 1_000_000)
}

// A wrapped client checks the history and opens a stream, in turn, and gRPC takes the members in
// turn as well.
func TestWatchThroughAWrappedClientLeavesTheIsolatedOneOfTwoEndpoints(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 3)
	good := cluster.Leader()
	bad := (good + 1) % 3
	writer, client := newClient(t, cluster.Endpoints()[good]), newClient(t, cluster.Endpoints()[bad])
	w := mustWatch[string](t, namespaced(t, client), "k", WithCodec(Raw))
	addEndpoints(client, cluster.Endpoints()[good])
	require.NoError(t, cluster.Isolate(bad))
	rev := mustPut(t, writer, nameOf(t)+":k", "v")
	require.Equal(t, rev, next(t, w).Revision)
}

func TestWatchThroughAWrappedClientWithASmallReceiveLimit(t *testing.T) {
	t.Parallel()
	for name, limit := range map[string]int{"more than a fragment": 3 << 20, "less than a fragment": 512 << 10} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			cluster := etcdtest.Start(t, 1)
			writer, link := cluster.Client(t), etcdtest.StartLink(t, cluster.Endpoints()[0])
			client, err := clientv3.New(clientv3.Config{Endpoints: []string{link.Endpoint()}, Logger: zap.NewNop(), MaxCallRecvMsgSize: limit})
			require.NoError(t, err)
			t.Cleanup(func() { _ = client.Close() })
			client = namespaced(t, client)
			live := mustWatch[string](t, client, "p/", WithPrefix(), WithCodec(Raw))
			state := mustWatch[string](t, client, "p/", WithPrefix(), WithCodec(Raw), WithSnapshot())
			require.Equal(t, EventSynced, next(t, state).Type)
			link.Cut()
			for i := range 500 {
				mustPut(t, writer, fmt.Sprintf("%s:p/%03d", nameOf(t), i), strings.Repeat("x", 10_000))
			}
			link.Reset()
			link.Heal()
			for range 500 {
				require.Equal(t, EventPut, next(t, state).Type)
			}
			if limit < 1<<20 {
				_, cause := ends(t, live)
				require.ErrorIs(t, cause, ErrGap)
				require.ErrorContains(t, cause, "larger than max")
				return
			}
			for range 500 {
				require.Equal(t, EventPut, next(t, live).Type)
			}
		})
	}
}

type exitingCodec struct{ Codec }

func (exitingCodec) Unmarshal([]byte, any) error {
	runtime.Goexit()
	return nil
}

func TestWatchWhoseCodecEndsTheGoroutineSaysSo(t *testing.T) {
	t.Parallel()
	client := testCluster.Client(t)
	w, err := Watch[string](t.Context(), client, nameOf(t), WithCodec(exitingCodec{Raw}))
	require.NoError(t, err)
	mustPut(t, client, nameOf(t), "")
	_, cause := ends(t, w)
	require.ErrorIs(t, cause, errCodecExited)
	require.ErrorIs(t, w.Close(), errCodecExited)
	for i := range 12 { // more than is read ahead
		mustPut(t, client, fmt.Sprint(nameOf(t), i), strings.Repeat("x", 1<<20))
	}
	w = mustWatch[string](t, client, nameOf(t), WithPrefix(), WithSnapshot(), WithCodec(exitingCodec{Raw}))
	_, cause = ends(t, w)
	require.ErrorIs(t, cause, errCodecExited)
}

// The codec may take a mutex that a caller of Watcher.Revision holds.
func TestWatchRevisionIsSettledWhileTheCodecIsAtWork(t *testing.T) {
	t.Parallel()
	q := newQueue(func() {})
	q.begin(4)
	q.push(change{kind: EventPut, upTo: 6})
	q.take(4)
	_, unsettled := q.settled()
	require.NotNil(t, unsettled)
	q.decoding(5)
	<-unsettled
	rev, unsettled := q.settled()
	require.Nil(t, unsettled)
	require.EqualValues(t, 5, rev)
}

func TestWatchThroughAWrapperEndsWithItsClientWhileEtcdIsGone(t *testing.T) {
	t.Parallel()
	client, link := linkedClient(t)
	client.KV = namespace.NewKV(client.KV, nameOf(t)+":")
	client.Watcher = namespace.NewWatcher(client.Watcher, nameOf(t)+":")
	w := mustWatch[string](t, client, "k", WithCodec(Raw))
	link.Cut()
	time.Sleep(idleTimeout + time.Second) // until it asks whether it may be resumed
	require.NoError(t, client.Close())
	within(t, 5*time.Second, w.Done(), "the watcher ends")
	require.ErrorContains(t, context.Cause(w), "client")
}

func TestWatchOfAKeyThatDidNotChangeOutlivesCompaction(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 1)
	writer, key := cluster.Client(t), nameOf(t)
	for name, change := range map[string]func(){
		"":         func() {},
		"changed":  func() { mustPut(t, writer, key, "missed") },
		"replaced": func() { mustDelete(t, writer, key); mustPut(t, writer, key, "1") },
	} {
		client, link := linkedTo(t, cluster)
		mustPut(t, writer, key, "0")
		w := mustWatch[string](t, client, key, WithCodec(Raw))
		mustPut(t, writer, key, "1")
		require.Equal(t, "1", next(t, w).Value)
		rev := cutAndCompact(t, writer, link, func() { change(); mustPut(t, writer, "other", "") })
		if name != "" {
			_, cause := ends(t, w)
			require.ErrorIs(t, cause, ErrGap, name)
			continue
		}
		eventually(t, func() bool { return w.Revision() >= rev }, "it goes on")
		mustPut(t, writer, key, "2")
		require.Equal(t, "2", next(t, w).Value)
		require.NoError(t, w.Close())
	}
}

// What the watch stream delivered may be larger than the client's requests accept.
func TestWatchOfALargeValueThatDidNotChangeOutlivesCompaction(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 1)
	writer, key := cluster.Client(t), nameOf(t)
	link := etcdtest.StartLink(t, cluster.Endpoints()[0])
	client, err := clientv3.New(clientv3.Config{Endpoints: []string{link.Endpoint()}, MaxCallRecvMsgSize: 256 << 10, Logger: zap.NewNop()})
	require.NoError(t, err)
	defer client.Close()
	w := mustWatch[string](t, client, key, WithCodec(Raw))
	mustPut(t, writer, key, strings.Repeat("x", 900_000))
	_ = next(t, w)
	rev := cutAndCompact(t, writer, link, func() { mustPut(t, writer, "other", "") })
	eventually(t, func() bool { return w.Revision() >= rev }, "it goes on")
	mustPut(t, writer, key, "2")
	require.Equal(t, "2", next(t, w).Value)
}
