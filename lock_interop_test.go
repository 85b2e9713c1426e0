package etcdutil

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
	"go.etcd.io/etcd/client/v3/namespace"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3lock/v3lockpb"
)

func TestClientWrappedByNamespaceWorks(t *testing.T) {
	direct := testCluster.Client(t)
	client := newClient(t, testCluster.Endpoints()...)
	ns := nameOf(t) + ":"
	client.KV = namespace.NewKV(client.KV, ns)
	client.Watcher = namespace.NewWatcher(client.Watcher, ns)
	client.Lease = namespace.NewLease(client.Lease, ns)
	t.Cleanup(func() { _ = client.Watcher.Close() })

	lock := mustAcquire(t, client, "a")
	require.Equal(t, []string{ns + lock.Key()}, keys(t, direct, ns+"a"))
	_, err := TryAcquire(t.Context(), client, "a")
	require.ErrorIs(t, err, ErrLockHeld)
	outside := mustAcquire(t, direct, "a")
	require.NoError(t, outside.Close())
	_, err = lock.Commit(t.Context(), clientv3.OpPut("data", "v"))
	require.NoError(t, err)
	require.EqualValues(t, 1, versionOf(t, direct, ns+"data"))
	next := start(func() (*Lock, error) { return Acquire(context.Background(), client, "a") })
	waiters(t, direct, ns+"a", 2)
	require.NoError(t, lock.Close())
	within(t, 5*time.Second, next.done, "the waiter holds")
	require.NoError(t, next.err)
	_, err = direct.Delete(t.Context(), ns+next.v.Key())
	require.NoError(t, err)
	within(t, 500*time.Millisecond, next.v.Done(), "told")
	require.ErrorIs(t, next.v.Close(), ErrLockLost)
}

func TestMutexWaitsForOursAndOursForMutex(t *testing.T) {
	client := testCluster.Client(t)
	session, err := concurrency.NewSession(client)
	require.NoError(t, err)
	defer session.Close()
	mutex := concurrency.NewMutex(session, nameOf(t))

	ours := mustAcquire(t, client, nameOf(t))
	require.ErrorIs(t, mutex.TryLock(t.Context()), concurrency.ErrLocked)
	theirs := start(func() (struct{}, error) { return struct{}{}, mutex.Lock(context.Background()) })
	waiters(t, client, nameOf(t), 2)
	next := start(func() (*Lock, error) { return Acquire(context.Background(), client, nameOf(t)) })
	waiters(t, client, nameOf(t), 3)
	require.NoError(t, ours.Close())
	within(t, 5*time.Second, theirs.done, "the mutex holds")
	require.NoError(t, theirs.err)
	_, err = TryAcquire(t.Context(), client, nameOf(t))
	require.ErrorIs(t, err, ErrLockHeld)
	select {
	case <-next.done:
		require.Fail(t, "ours holds while the mutex does")
	default:
	}
	require.NoError(t, mutex.Unlock(t.Context()))
	within(t, 5*time.Second, next.done, "ours holds")
	require.NoError(t, next.err)
	require.NoError(t, next.v.Close())
}

func TestElectionReadsTheValueAndSharesTheQueue(t *testing.T) {
	client := testCluster.Client(t)
	session, err := concurrency.NewSession(client)
	require.NoError(t, err)
	defer session.Close()
	election := concurrency.NewElection(session, nameOf(t))
	ours := mustAcquire(t, client, nameOf(t), WithValue("node-7"))
	leader, err := election.Leader(t.Context())
	require.NoError(t, err)
	require.Equal(t, "node-7", string(leader.Kvs[0].Value))
	campaign := start(func() (struct{}, error) { return struct{}{}, election.Campaign(context.Background(), "theirs") })
	waiters(t, client, nameOf(t), 2)
	require.NoError(t, ours.Close())
	within(t, 5*time.Second, campaign.done, "they lead")
	require.NoError(t, campaign.err)
	_, err = TryAcquire(t.Context(), client, nameOf(t))
	require.ErrorIs(t, err, ErrLockHeld)
	require.NoError(t, election.Resign(t.Context()))
}

func TestLockServiceOfTheServerSharesTheQueue(t *testing.T) {
	client := testCluster.Client(t)
	service := v3lockpb.NewLockClient(client.ActiveConnection())
	ours := mustAcquire(t, client, nameOf(t))
	theirs := start(func() (*v3lockpb.LockResponse, error) {
		return service.Lock(context.Background(), &v3lockpb.LockRequest{Name: []byte(nameOf(t))})
	})
	waiters(t, client, nameOf(t), 2)
	next := start(func() (*Lock, error) { return Acquire(context.Background(), client, nameOf(t)) })
	waiters(t, client, nameOf(t), 3)
	require.NoError(t, ours.Close())
	within(t, 5*time.Second, theirs.done, "they hold")
	require.NoError(t, theirs.err)
	_, err := service.Unlock(t.Context(), &v3lockpb.UnlockRequest{Key: theirs.v.Key})
	require.NoError(t, err)
	within(t, 5*time.Second, next.done, "ours holds")
	require.NoError(t, next.err)
	require.NoError(t, next.v.Close())
}

func TestEtcdctlWaitsForOursAndOursForEtcdctl(t *testing.T) {
	t.Parallel()
	etcdctl := installedEtcdctl(t)
	client := testCluster.Client(t)
	lockFor := func(script string) *exec.Cmd {
		cmd := exec.Command(etcdctl, "--endpoints", testCluster.Endpoints()[0], "lock", nameOf(t), "--", "sh", "-c", script)
		cmd.Env = append(os.Environ(), "ETCDCTL_API=3")
		return cmd
	}
	ours := mustAcquire(t, client, nameOf(t))
	ran := filepath.Join(t.TempDir(), "ran")
	theirs := start(func() ([]byte, error) { return lockFor("touch '" + ran + "'").CombinedOutput() })
	waiters(t, client, nameOf(t), 2)
	require.NoFileExists(t, ran, "it waits for ours")
	require.NoError(t, ours.Close())
	within(t, patience, theirs.done, "etcdctl had its turn")
	require.NoError(t, theirs.err, string(theirs.v))
	require.FileExists(t, ran)

	// Now it holds until the file stop exists.
	stop := filepath.Join(t.TempDir(), "stop")
	theirs = start(func() ([]byte, error) {
		return lockFor("while [ ! -e '" + stop + "' ]; do sleep 0.02; done").CombinedOutput()
	})
	waiters(t, client, nameOf(t), 1)
	_, err := TryAcquire(t.Context(), client, nameOf(t))
	require.ErrorIs(t, err, ErrLockHeld)
	next := start(func() (*Lock, error) { return Acquire(context.Background(), client, nameOf(t)) })
	waiters(t, client, nameOf(t), 2)
	select {
	case <-next.done:
		require.Fail(t, "ours holds while etcdctl does")
	default:
	}
	require.NoError(t, os.WriteFile(stop, nil, 0o600))
	within(t, patience, next.done, "ours holds")
	require.NoError(t, next.err)
	<-theirs.done
	require.NoError(t, theirs.err, string(theirs.v))
	require.NoError(t, next.v.Close())
}

// installedEtcdctl is the real binary: from PATH, else installed by the go command.
func installedEtcdctl(t *testing.T) string {
	t.Helper()
	if path, err := exec.LookPath("etcdctl"); err == nil {
		return path
	}
	// Not by go install: etcdctl's go.mod holds replace directives, which that refuses.
	dir := t.TempDir()
	for _, args := range [][]string{
		{"mod", "init", "etcdctl"},
		{"get", "go.etcd.io/etcd/etcdctl/v3@v3.7.3"},
		{"build", "-o", "etcdctl", "go.etcd.io/etcd/etcdctl/v3"},
	} {
		cmd := exec.Command("go", args...)
		cmd.Dir = dir
		out, err := cmd.CombinedOutput()
		require.NoError(t, err, string(out))
	}
	return filepath.Join(dir, "etcdctl")
}

// etcdctl elect and Lead share a queue, and Holder reports either.
func TestEtcdctlElectTakesTurnsWithLead(t *testing.T) {
	t.Parallel()
	etcdctl := installedEtcdctl(t)
	client := testCluster.Client(t)
	theirs := exec.Command(etcdctl, "--endpoints", testCluster.Endpoints()[0], "elect", nameOf(t), "theirs")
	theirs.Env = append(os.Environ(), "ETCDCTL_API=3")
	require.NoError(t, theirs.Start())
	waiters(t, client, nameOf(t), 1)
	holder, err := Holder(t.Context(), client, nameOf(t))
	require.NoError(t, err)
	require.Equal(t, "theirs", holder.Value)

	led := make(chan struct{})
	leading := start(func() (struct{}, error) {
		return struct{}{}, Lead(t.Context(), client, nameOf(t), func(context.Context) error {
			close(led)
			return nil
		}, WithValue("ours"))
	})
	waiters(t, client, nameOf(t), 2)
	select {
	case <-led:
		require.Fail(t, "two lead")
	case <-time.After(100 * time.Millisecond):
	}
	require.NoError(t, theirs.Process.Signal(os.Interrupt)) // it resigns
	_ = theirs.Wait()
	within(t, patience, led, "ours leads")
	within(t, patience, leading.done, "and ends with its function")
	require.NoError(t, leading.err)
}
