package etcdutil

import (
	"context"
	"errors"
	"log/slog"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"example.com/etcdutil/etcdtest"
	"github.com/stretchr/testify/require"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

func revision(t *testing.T, client *clientv3.Client) Revision {
	t.Helper()
	resp, err := client.Get(t.Context(), "any")
	require.NoError(t, err)
	return resp.Header.Revision
}

// linkedLocker is a connected client behind a link, with the options for a lock on a lease of a
// long TTL.
func linkedLocker(t *testing.T, shared bool) (*clientv3.Client, *etcdtest.Link, []LockOption) {
	t.Helper()
	client, link := linkedClient(t)
	_, err := client.Get(t.Context(), "connect")
	require.NoError(t, err)
	if !shared {
		return client, link, []LockOption{WithTTL(time.Minute)}
	}
	return client, link, []LockOption{WithLease(mustLease(t, client, time.Minute))}
}

// removeMember removes a member from its cluster. Its process still answers.
func removeMember(t *testing.T, cluster *etcdtest.Cluster, member int) {
	t.Helper()
	client := newClient(t, cluster.Endpoints()[cluster.Leader()])
	status, err := client.Status(t.Context(), cluster.Endpoints()[member])
	require.NoError(t, err)
	eventually(t, func() bool { // etcd refuses until its members have been connected for some seconds
		_, err := client.MemberRemove(t.Context(), status.Header.MemberId)
		return err == nil || errors.Is(err, rpctypes.ErrMemberNotFound)
	}, "a member is removed")
}

func versionOf(t *testing.T, client *clientv3.Client, key string) int64 {
	t.Helper()
	resp, err := client.Get(context.Background(), key)
	require.NoError(t, err)
	if len(resp.Kvs) == 0 {
		return 0
	}
	return resp.Kvs[0].Version
}

// watchesOf counts the watches that a client has on streams they share.
func watchesOf(client *clientv3.Client) int {
	h := hubRef{client}.lock()
	defer h.mu.Unlock()
	return len(h.subs)
}

// goroutinesIn counts the goroutines that are in a function of that name.
func goroutinesIn(function string) (n int) {
	buf := make([]byte, 4<<20)
	for _, stack := range strings.Split(string(buf[:runtime.Stack(buf, true)]), "\n\n") {
		if strings.Contains(stack, function) {
			n++
		}
	}
	return n
}

// gone fails t if there are goroutines in a function of that name, though something has waited for
// them: who has said that it is done is still there for its last instructions, which a busy machine
// may make it wait for.
func gone(t *testing.T, function, what string) {
	t.Helper()
	done := make(chan struct{})
	go func() { // until there are none, or the test is over
		for goroutinesIn(function) > 0 && t.Context().Err() == nil {
			time.Sleep(5 * time.Millisecond)
		}
		close(done)
	}()
	within(t, 100*time.Millisecond, done, what)
}

// blockingHandler is a logger that blocks, as one does that writes to a full pipe.
type blockingHandler struct {
	slog.Handler
	until <-chan struct{}
}

func (h blockingHandler) Enabled(_ context.Context, level slog.Level) bool {
	return level >= slog.LevelWarn
}

func (h blockingHandler) Handle(context.Context, slog.Record) error {
	<-h.until
	return nil
}

// recordingLogger returns the messages that were logged.
func recordingLogger() (*slog.Logger, func() []string) {
	h := &recordingHandler{}
	return slog.New(h), h.all
}

type recordingHandler struct {
	mu    sync.Mutex
	lines []string
}

func (h *recordingHandler) Enabled(context.Context, slog.Level) bool { return true }

func (h *recordingHandler) WithAttrs([]slog.Attr) slog.Handler { return h }

func (h *recordingHandler) WithGroup(string) slog.Handler { return h }

func (h *recordingHandler) Handle(_ context.Context, r slog.Record) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.lines = append(h.lines, r.Message)
	return nil
}

func (h *recordingHandler) all() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return append([]string{}, h.lines...)
}
