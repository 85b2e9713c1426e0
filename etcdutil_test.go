package etcdutil

import (
	"context"
	"flag"
	"fmt"
	"os"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"example.com/etcdutil/etcdtest"
	"example.com/etcdutil/internal/testclock"
	"github.com/stretchr/testify/require"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/goleak"
	"go.uber.org/zap"
	"google.golang.org/grpc"
)

// testCluster is one member, for every test that does not harm it.
var testCluster *etcdtest.Cluster

func TestMain(m *testing.M) {
	for name, child := range map[string]func() error{slowReader: readSlowly, mirrorReader: measureMirror} {
		if os.Getenv(name) == "" {
			continue
		}
		if err := child(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	debug.SetGCPercent(300) // the servers allocate much, and the tests need the processors
	// The tests that run in parallel wait for leases to expire, not for a processor.
	flag.Parse()
	parallel := "40"
	if underRace {
		parallel = "12"
	}
	err := flag.Set("test.parallel", parallel)
	if err != nil {
		panic(err)
	}
	if testCluster, err = etcdtest.New(1); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	code := m.Run()
	closeExamples()
	_ = testCluster.Close()
	if code == 0 {
		if err := leaked(ofLockService...); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}

// leaked is goleak's find, where what is about to end has longer for it than the half second that
// goleak allows.
func leaked(opts ...goleak.Option) (err error) {
	for range 10 {
		if err = goleak.Find(opts...); err == nil {
			break
		}
	}
	return err
}

// ofLockService is what the lock service of an in-process etcd leaves running when the server is
// closed: it keeps alive the leases of its sessions through a client of its own, which nobody
// closes. Ours uses none of these functions.
var ofLockService = []goleak.Option{
	goleak.IgnoreAnyFunction("go.etcd.io/etcd/client/v3.(*lessor).recvKeepAliveLoop"),
	goleak.IgnoreAnyFunction("go.etcd.io/etcd/client/v3.(*lessor).sendKeepAliveLoop"),
	goleak.IgnoreAnyFunction("go.etcd.io/etcd/client/v3.(*lessor).deadlineLoop"),
	goleak.IgnoreAnyFunction("go.etcd.io/etcd/server/v3/etcdserver/api/v3rpc.(*LeaseServer).LeaseKeepAlive"),
	goleak.IgnoreAnyFunction("go.etcd.io/etcd/server/v3/etcdserver/api/v3rpc.(*LeaseServer).leaseKeepAlive"),
}

// noContext is nil, which staticcheck does not see.
var noContext context.Context

func newClient(t testing.TB, endpoints ...string) *clientv3.Client {
	t.Helper()
	client, err := clientv3.New(clientv3.Config{Endpoints: endpoints, DialTimeout: 5 * time.Second, Logger: zap.NewNop()})
	require.NoError(t, err)
	t.Cleanup(func() { _ = client.Close() })
	return client
}

// linkedClient is a client of testCluster behind a link of its own.
func linkedClient(t testing.TB) (*clientv3.Client, *etcdtest.Link) {
	t.Helper()
	link := etcdtest.StartLink(t, testCluster.Endpoints()[0])
	return newClient(t, link.Endpoint()), link
}

// nameOf is a lock name that no other test uses, nor the same one when it runs again.
func nameOf(t testing.TB) string {
	name, known := names.Load(t)
	if !known {
		name, _ = names.LoadOrStore(t, fmt.Sprintf("%s-%d", strings.ReplaceAll(t.Name(), "/", "-"), runs.Add(1)))
	}
	return name.(string)
}

var (
	names sync.Map
	runs  atomic.Int64
)

// patience is how long a test waits for what is to happen, however slow the machine is; no test
// passes by waiting so long.
const patience = time.Minute

// within fails t if done does not close in time. Time that this process did not get is not counted.
func within(t testing.TB, d time.Duration, done <-chan struct{}, what string) {
	t.Helper()
	require.True(t, testclock.Within(d, done), "not within %v: %s", d, what)
}

// eventually waits for a condition that does not depend on speed.
func eventually(t testing.TB, cond func() bool, what string) {
	t.Helper()
	require.Eventually(t, cond, patience, 2*time.Millisecond, what)
}

// onceInTime repeats what a busy machine may make late, until it was in time once.
func onceInTime(t testing.TB, inTime func() bool, what string) {
	t.Helper()
	for begin := time.Now(); !inTime(); {
		require.Less(t, time.Since(begin), patience, what)
	}
}

// keys are the keys under a lock's name.
func keys(t testing.TB, client *clientv3.Client, name string) []string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	resp, err := client.Get(ctx, name+"/", clientv3.WithPrefix(), clientv3.WithKeysOnly(),
		clientv3.WithSort(clientv3.SortByCreateRevision, clientv3.SortAscend))
	require.NoError(t, err)
	list := []string{}
	for _, kv := range resp.Kvs {
		list = append(list, string(kv.Key))
	}
	return list
}

// waiters waits until n contenders are queued under a name, the holder among them.
func waiters(t testing.TB, client *clientv3.Client, name string, n int) {
	t.Helper()
	eventually(t, func() bool { return len(keys(t, client, name)) == n }, fmt.Sprintf("%d contenders for %s", n, name))
}

// knows reports whether the server has a lease.
func knows(t testing.TB, client *clientv3.Client, id clientv3.LeaseID) bool {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	resp, err := client.TimeToLive(ctx, id)
	require.NoError(t, err)
	return resp.TTL >= 0
}

// leases are all leases that the server knows.
func leases(t testing.TB, client *clientv3.Client) []clientv3.LeaseStatus {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	resp, err := client.Leases(ctx)
	require.NoError(t, err)
	return resp.Leases
}

// authCluster is a cluster with authentication, whose user may read and write keys under
// "allowed/". Its simple tokens live for so many seconds after their last use; its passwords are
// hashed cheaply, which else takes seconds while other tests run under the race detector.
func authCluster(t *testing.T, tokenTTL uint) (cluster *etcdtest.Cluster, root *clientv3.Client) {
	t.Helper()
	cluster, admin := passwordCluster(t, tokenTTL)
	_, err := admin.AuthEnable(t.Context())
	require.NoError(t, err)
	return cluster, userClient(t, "root", nil, cluster.Endpoints()...)
}

func userClient(t *testing.T, name string, dial []grpc.DialOption, endpoints ...string) *clientv3.Client {
	t.Helper()
	client, err := clientv3.New(clientv3.Config{
		Endpoints: endpoints, DialTimeout: 5 * time.Second, Logger: zap.NewNop(), Username: name, Password: "secret", DialOptions: dial,
	})
	require.NoError(t, err)
	t.Cleanup(func() { _ = client.Close() })
	return client
}

func mustAcquire(t testing.TB, client *clientv3.Client, name string, opts ...LockOption) *Lock {
	t.Helper()
	lock, err := Acquire(context.Background(), client, name, opts...)
	require.NoError(t, err)
	t.Cleanup(func() { _ = lock.Close() })
	return lock
}

// doNotWatch keeps a lock from watching its key. It reports whether it is in time for that.
func doNotWatch(lock *Lock) bool {
	lock.mu.Lock()
	defer lock.mu.Unlock()
	return lock.watchTimer != nil && lock.watchTimer.Stop()
}

func mustLease(t testing.TB, client *clientv3.Client, ttl time.Duration, opts ...LeaseOption) *Lease {
	t.Helper()
	lease, err := NewLease(context.Background(), client, ttl, opts...)
	require.NoError(t, err)
	t.Cleanup(func() { _ = lease.Close() })
	return lease
}

// async runs f, whose result can be awaited.
type async[T any] struct {
	done chan struct{}
	v    T
	err  error
	at   time.Time // of its return
}

func start[T any](f func() (T, error)) *async[T] {
	a := &async[T]{done: make(chan struct{})}
	go func() {
		defer close(a.done)
		a.v, a.err = f()
		a.at = time.Now()
	}()
	return a
}
