package etcdutil

import (
	"context"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	clientv3 "go.etcd.io/etcd/client/v3"
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
