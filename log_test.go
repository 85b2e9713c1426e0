package etcdutil

import (
	"context"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestLogIsWrittenAndRead(t *testing.T) {
	t.Parallel()
	client, name := newClient(t, testCluster.Endpoints()...), nameOf(t)
	lock := mustAcquire(t, client, name)
	w, err := NewLogWriter[string](context.Background(), lock, name)
	require.NoError(t, err)
	for i := range 3 {
		version, err := w.Write(context.Background(), "entry")
		require.NoError(t, err)
		require.Equal(t, int64(i+1), version)
	}
	r, err := NewLogReader[string](context.Background(), client, name)
	require.NoError(t, err)
	e, err := r.Read(context.Background())
	require.NoError(t, err)
	require.Equal(t, Entry[string]{"entry", 3, e.Revision}, e)
	require.NoError(t, r.Close())
}
