package etcdutil

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"example.com/etcdutil/etcdtest"
	"github.com/stretchr/testify/require"
	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/namespace"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/goleak"
	"go.uber.org/zap"
	"google.golang.org/grpc"
)

// next is the watcher's next event.
func next[T any](t testing.TB, w *Watcher[T]) Event[T] {
	t.Helper()
	select {
	case e, ok := <-w.Events():
		require.True(t, ok, "the watcher has ended: %v", context.Cause(w))
		return e
	case <-time.After(15 * time.Second):
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

func TestWatchTellsEachChange(t *testing.T) {
	t.Parallel()
	client, key := newClient(t, testCluster.Endpoints()...), nameOf(t)
	mustPut(t, client, key, `"before"`)
	w := mustWatch[string](t, client, key, WithPrev())
	rev := mustPut(t, client, key, `"a"`)
	e := next(t, w)
	prev := "before"
	require.Equal(t, Event[string]{Type: EventPut, Key: key, Value: "a", Prev: &prev, Version: 2, Revision: rev}, e)
	require.Equal(t, rev, w.Revision())
	rev = mustPut(t, client, key, `{`)
	e = next(t, w)
	require.Equal(t, EventInvalid, e.Type)
	require.Equal(t, "{", string(e.Raw))
	require.Error(t, e.Err)
	require.Equal(t, rev, w.Revision())
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
	resp, err := client.Get(context.Background(), prefix, append(opts, clientv3.WithPrefix())...)
	require.NoError(t, err)
	s := state{}
	for _, kv := range resp.Kvs {
		s[string(kv.Key)] = string(kv.Value)
	}
	return s
}

// ends waits until a watcher's Events are closed, and returns the cause and the events before.
func ends[T any](t testing.TB, w *Watcher[T]) (events []Event[T], cause error) {
	t.Helper()
	timeout := time.After(15 * time.Second)
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

// resetEvery resets the link's connections again and again until the returned function is called. It counts.
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

// readUntil reads what a watcher tells up to the event of a key, and fails after a minute.
func readUntil(w *Watcher[string], key string) ([]toldEvent, error) {
	var events []toldEvent
	for timeout := time.After(time.Minute); ; {
		select {
		case e, ok := <-w.Events():
			if !ok {
				return events, fmt.Errorf("the watcher has ended: %w", context.Cause(w))
			}
			events = append(events, toldOf(e))
			if e.Key == key {
				return events, nil
			}
		case <-timeout:
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
	const writes, perReset = 3000, 300
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

// cutOff cuts a link, and meanwhile changes what is watched under prefix and compacts it. It returns when the link is
// healed.
func cutOff(t testing.TB, writer *clientv3.Client, link *etcdtest.Link, prefix string) {
	t.Helper()
	link.Cut()
	mustDelete(t, writer, prefix+"a")
	mustPut(t, writer, prefix+"b", "2")
	mustPut(t, writer, prefix+"passing", "")
	mustDelete(t, writer, prefix+"passing")
	mustPut(t, writer, prefix+"d", "2")
	mustCompact(t, writer, mustPut(t, writer, prefix+"d", "3"))
	link.Heal()
}

func TestWatchWithSnapshotTellsTheDifferenceWhenCompactionOvertookIt(t *testing.T) {
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
		{Type: EventPut, Key: prefix + "b", Value: "2", Prev: &prev, Version: 2, Revision: difference[0].Revision},
		{Type: EventPut, Key: prefix + "d", Value: "3", Version: 2, Revision: difference[1].Revision},
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

func TestWatchTellsItsUnreadEventsBeforeItsError(t *testing.T) {
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
	eventually(t, func() bool { return w.feed.queue.lastRevision() >= last }, "read ahead")
	cutOff(t, writer, link, prefix)
	eventually(t, func() bool { return w.feed.queue.ending() }, "the end")
	require.NoError(t, w.Err(), "it has events left")
	events, cause := ends(t, w)
	var got []Revision
	for _, e := range events {
		got = append(got, e.Revision)
	}
	require.Equal(t, unread[1:], got)
	require.ErrorIs(t, cause, ErrGap)
}

// lastRevision is that of the last event which is queued, 0 if none is.
func (q *queue) lastRevision() Revision {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, c := range slices.Backward(q.changes) {
		if c.kv != nil {
			return c.kv.ModRevision
		}
	}
	return 0
}

// ending tells whether the feed's end is queued.
func (q *queue) ending() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return len(q.changes) > 0 && q.changes[len(q.changes)-1].end != nil
}

func TestQuietWatchIsNotOvertakenByCompaction(t *testing.T) {
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
	const count, perTxn = 50_000, 125
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
				for _, key := range []string{"00000", "49999", "new"} {
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
		require.Equal(t, toldEvent{EventPut, fmt.Sprintf("%s%05d", prefix, i), "1", e.Revision}, toldOf(e))
	}
	synced := next(t, w)
	require.Equal(t, EventSynced, synced.Type)
	for _, e := range meanwhile {
		require.Equal(t, e, toldOf(next(t, w)))
	}
	require.Greater(t, len(pages), 5)
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
	type record struct{ A int }
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
		require.Equal(t, record{1}, e.Value)
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

var (
	_ = errors.New
	_ = io.EOF
	_ = http.Get
	_ = regexp.MustCompile
	_ = rpctypes.ErrCompacted
	_ = namespace.NewKV
	_ = embed.NewConfig
	_ = goleak.Find
)
