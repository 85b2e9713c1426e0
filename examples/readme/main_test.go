package main

import (
	"context"
	"testing"
	"time"

	"example.com/etcdutil"
	"example.com/etcdutil/etcdtest"
	"github.com/stretchr/testify/require"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// patience is for what takes milliseconds on an idle machine.
const patience = 20 * time.Second

// until runs a quick start that follows something, waits until reached is true, and ends it.
func until(t *testing.T, client *clientv3.Client, f func(context.Context, *clientv3.Client) error, reached func() bool) error {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	ended := make(chan error, 1)
	go func() { ended <- f(ctx, client) }()
	require.Eventually(t, reached, patience, 10*time.Millisecond)
	cancel()
	select {
	case err := <-ended:
		return err
	case <-time.After(patience):
		t.Fatal("the quick start does not end with its context")
		return nil
	}
}

func valueOf(t *testing.T, client *clientv3.Client, key string) string {
	t.Helper()
	resp, err := client.Get(t.Context(), key)
	require.NoError(t, err)
	if len(resp.Kvs) == 0 {
		return ""
	}
	return string(resp.Kvs[0].Value)
}

func TestQuickStartOfLocksRunsUnderTheLock(t *testing.T) {
	client := etcdtest.Start(t, 1).Client(t)
	require.NoError(t, idea(t.Context(), client, func(ctx context.Context) error {
		_, err := etcdutil.TryAcquire(t.Context(), client, "jobs/nightly")
		require.ErrorIs(t, err, etcdutil.ErrLockHeld)
		return ctx.Err()
	}))
}

func TestQuickStartOfFencedWritesWrites(t *testing.T) {
	client := etcdtest.Start(t, 1).Client(t)
	require.NoError(t, publish(t.Context(), client))
	require.Equal(t, "done", valueOf(t, client, "reports/today"))

	lock, err := etcdutil.Acquire(t.Context(), client, "reports")
	require.NoError(t, err)
	require.NoError(t, publish(t.Context(), client), "another process does it")
	require.NoError(t, lock.Close())
}

func TestQuickStartOfWatchesEndsWithItsContext(t *testing.T) {
	client := etcdtest.Start(t, 1).Client(t)
	_, err := client.Put(t.Context(), "settings/search", `{"Limit": 5}`)
	require.NoError(t, err)
	out := capture(t)
	err = until(t, client, follow, func() bool { return out.contains("1 settings as of revision") })
	require.ErrorIs(t, err, context.Canceled)
}

func TestQuickStartOfLogsReadsWhatItWrites(t *testing.T) {
	client := etcdtest.Start(t, 1).Client(t)
	out := capture(t)
	require.NoError(t, write(t.Context(), client))
	require.NoError(t, write(t.Context(), client))
	err := until(t, client, read, func() bool { return out.contains("version 2: limit raised to 10") })
	require.ErrorIs(t, err, context.Canceled)
}

func TestMigratingOldAndNewProcessesExcludeEachOther(t *testing.T) {
	client := etcdtest.Start(t, 1).Client(t)
	require.NoError(t, oldNightly(t.Context(), client))
	require.NoError(t, newNightly(t.Context(), client))

	lock, err := boundsTheWait(t.Context(), client)
	require.NoError(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	require.ErrorIs(t, oldNightly(ctx, client), context.DeadlineExceeded)
	require.NoError(t, lock.Close())
	require.NoError(t, oldNightly(t.Context(), client))
}

func TestMigratingTimeoutOfTheParentEndsTheLock(t *testing.T) {
	client := etcdtest.Start(t, 1).Client(t)
	lock, err := boundsTheLock(t.Context(), client)
	require.NoError(t, err)
	require.Error(t, lock.Err())
	require.NoError(t, lock.Close())
}

func TestQuickStartOfLeadersCampaigns(t *testing.T) {
	client := etcdtest.Start(t, 1).Client(t)
	address, err := find(t.Context(), client)
	require.NoError(t, err)
	require.Empty(t, address)
	err = until(t, client, serve, func() bool {
		address, err := find(t.Context(), client)
		return err == nil && address == "10.0.0.7:8080"
	})
	require.ErrorIs(t, err, context.Canceled)
}

func TestQuickStartOfMirrorsReadsItsOwnWrite(t *testing.T) {
	client := etcdtest.Start(t, 1).Client(t)
	out := capture(t)
	require.NoError(t, limit(t.Context(), client))
	require.True(t, out.contains("0 settings; search: {0}, false"))
	require.True(t, out.contains("search: {10}"))
}

func TestQuickStartOfRegistrationsRemovesTheKey(t *testing.T) {
	client := etcdtest.Start(t, 1).Client(t)
	registered := func() string { return valueOf(t, client, "services/api/host-1") }
	err := until(t, client, announce, func() bool { return registered() == `"10.0.0.7:8080"` })
	require.ErrorIs(t, err, context.Canceled)
	require.Empty(t, registered())
}

func TestReadinessProbeFailsBehindABlackHole(t *testing.T) {
	t.Parallel()
	link := etcdtest.StartLink(t, etcdtest.Start(t, 1).Endpoints()[0])
	client, err := clientv3.New(clientv3.Config{Endpoints: []string{link.Endpoint()}})
	require.NoError(t, err)
	defer client.Close()
	lease, err := etcdutil.NewLease(t.Context(), client, 30*time.Second)
	require.NoError(t, err)
	settings, err := etcdutil.NewMirror[Setting](t.Context(), client, "settings/", etcdutil.WithPrefix())
	require.NoError(t, err)
	isReady := func() bool { return ready(lease, settings) }

	require.True(t, isReady())
	link.Cut()
	require.Eventually(t, func() bool { return !isReady() }, patience, 10*time.Millisecond)
	link.Heal()
	require.Eventually(t, isReady, patience, 10*time.Millisecond)
	require.NoError(t, lease.Close())
	require.False(t, isReady())
	require.NoError(t, settings.Close())
}

func TestReadinessProbeFailsWhenRenewalsAreLate(t *testing.T) {
	t.Parallel()
	link := etcdtest.StartLink(t, etcdtest.Start(t, 1).Endpoints()[0])
	client, err := clientv3.New(clientv3.Config{Endpoints: []string{link.Endpoint()}})
	require.NoError(t, err)
	defer client.Close()
	lease, err := etcdutil.NewLease(t.Context(), client, 4*time.Second)
	require.NoError(t, err)
	settings, err := etcdutil.NewMirror[Setting](t.Context(), client, "settings/", etcdutil.WithPrefix())
	require.NoError(t, err)
	defer settings.Close()

	link.Cut()
	require.Eventually(t, func() bool { return !ready(lease, settings) }, patience, 10*time.Millisecond)
	require.NoError(t, lease.Err(), "the probe fails before the lease is lost")
}
