package etcdtest_test

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/goleak"
	"go.uber.org/zap"

	"example.com/etcdutil/etcdtest"
	"example.com/etcdutil/internal/testclock"
)

// patience is how long a test waits for what should happen; no test passes by waiting so long.
const patience = time.Minute

func TestMain(m *testing.M) {
	flag.Parse()
	if err := flag.Set("test.parallel", "8"); err != nil { // they wait more than they compute
		panic(err)
	}
	code := m.Run()
	err := goleak.Find()
	for range 10 { // what is about to end has longer for it than the half second that goleak allows
		if err == nil {
			break
		}
		err = goleak.Find()
	}
	if code == 0 && err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

func TestNewRefusesFewerThanOneMember(t *testing.T) {
	for _, members := range []int{0, -1} {
		_, err := etcdtest.New(members)
		require.ErrorContains(t, err, fmt.Sprintf("members is %d", members))
	}
}

func TestEachMemberServesWhenNewReturns(t *testing.T) {
	for _, members := range []int{1, 3} {
		t.Run(fmt.Sprint(members), func(t *testing.T) {
			cluster := etcdtest.Start(t, members)
			require.Len(t, cluster.Endpoints(), members)
			require.Contains(t, indexes(members), cluster.Leader())
			for _, endpoint := range cluster.Endpoints() {
				client := clientTo(t, endpoint)
				put(t, client, endpoint)
				require.Equal(t, endpoint, get(t, client))
			}
			put(t, cluster.Client(t), "to all")
		})
	}
}

func TestShortestLeaseIsEtcdsDefault(t *testing.T) {
	client := etcdtest.Start(t, 1).Client(t)
	lease, err := client.Grant(t.Context(), 1)
	require.NoError(t, err)
	require.EqualValues(t, 2, lease.TTL)
}

func TestEachMemberIsConfiguredBeforeEachStart(t *testing.T) {
	cluster, err := etcdtest.NewWith(3, func(config *embed.Config) {
		config.MaxTxnOps = 1
		// What makes a member is not configure's to change.
		config.Name, config.InitialCluster = "another", "another=http://127.0.0.1:1"
		config.Dir, config.WalDir = "/dev/null", "/dev/null"
		config.ListenClientUrls, config.ListenPeerUrls = nil, nil
	})
	require.NoError(t, err)
	defer cluster.Close()
	follower := (cluster.Leader() + 1) % 3
	require.NoError(t, cluster.Stop(follower))
	require.NoError(t, cluster.Restart(follower))
	for _, endpoint := range cluster.Endpoints() {
		requireOneOperation(t, clientTo(t, endpoint))
	}
}

// requireOneOperation requires that the client's member was configured to take no more in one
// transaction.
func requireOneOperation(t *testing.T, client *clientv3.Client) {
	t.Helper()
	put(t, client, "one")
	_, err := client.Txn(t.Context()).Then(clientv3.OpGet("one"), clientv3.OpGet("two")).Commit()
	require.ErrorIs(t, err, rpctypes.ErrTooManyOps)
}

func TestAuthTokenExpiresAsConfigured(t *testing.T) {
	t.Parallel()
	const lifetime = 3 * time.Second // enough to use it once, however slow the machine
	cluster, err := etcdtest.NewWith(1, func(config *embed.Config) {
		config.AuthTokenTTL = uint(lifetime / time.Second)
	})
	require.NoError(t, err)
	defer cluster.Close()
	client, err := clientv3.New(clientv3.Config{
		Endpoints: cluster.Endpoints(),
		Token:     enableAuth(t, cluster.Client(t)), // no password, with which clientv3 would get another
		Logger:    zap.NewNop(),
	})
	require.NoError(t, err)
	defer client.Close()
	put(t, client, "with a token")

	require.Eventually(t, func() bool {
		// etcd checks tokens once a second. A request meanwhile would renew the token.
		time.Sleep(lifetime + 1500*time.Millisecond)
		return errors.Is(tryPut(t, client, "without"), rpctypes.ErrInvalidAuthToken)
	}, patience, time.Millisecond)
}

// enableAuth turns auth on and returns a token of root's.
func enableAuth(t *testing.T, client *clientv3.Client) string {
	t.Helper()
	_, err := client.UserAdd(t.Context(), "root", "secret")
	require.NoError(t, err)
	_, err = client.RoleAdd(t.Context(), "root")
	require.NoError(t, err)
	_, err = client.UserGrantRole(t.Context(), "root", "root")
	require.NoError(t, err)
	_, err = client.AuthEnable(t.Context())
	require.NoError(t, err)
	response, err := client.Authenticate(t.Context(), "root", "secret")
	require.NoError(t, err)
	return response.Token
}

func TestStoppedMemberRefusesAndKeepsItsDataForRestart(t *testing.T) {
	cluster := etcdtest.Start(t, 1)
	client := cluster.Client(t)
	put(t, client, "kept")
	endpoints := cluster.Endpoints()

	require.NoError(t, cluster.Stop(0))
	require.Equal(t, -1, cluster.Leader())
	_, err := net.Dial("tcp", endpoints[0])
	require.Error(t, err)

	require.NoError(t, cluster.Restart(0))
	require.Equal(t, 0, cluster.Leader())
	require.Equal(t, endpoints, cluster.Endpoints())
	require.Equal(t, "kept", get(t, client))
	require.Equal(t, "kept", get(t, cluster.Client(t)))
}

func TestStopDoesNotWaitForWatches(t *testing.T) {
	cluster := etcdtest.Start(t, 3)
	leader := cluster.Leader()
	watch := clientTo(t, cluster.Endpoints()[leader]).Watch(t.Context(), "key", clientv3.WithCreatedNotify())
	require.True(t, (<-watch).Created)

	took := testclock.Time(func() { require.NoError(t, cluster.Stop(leader)) })
	require.Less(t, took, 2*time.Second)
}

func TestOthersElectALeaderWhenTheirsStops(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 3)
	first := cluster.Leader()
	require.NoError(t, cluster.Stop(first))
	require.Eventually(t, func() bool { return cluster.Leader() >= 0 }, patience, 10*time.Millisecond)
	require.NotEqual(t, first, cluster.Leader())
	put(t, cluster.Client(t), "by two")

	require.NoError(t, cluster.Restart(first))
	require.Equal(t, "by two", get(t, clientTo(t, cluster.Endpoints()[first])))
}

func TestRestartReturnsWithoutQuorumAndTheNextOneServes(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 3)
	put(t, cluster.Client(t), "kept")
	for i := range 3 {
		require.NoError(t, cluster.Stop(i))
	}

	require.NoError(t, cluster.Restart(2))
	require.Equal(t, -1, cluster.Leader())
	require.NoError(t, cluster.Restart(0))
	for _, i := range []int{0, 2} {
		require.Equal(t, "kept", get(t, clientTo(t, cluster.Endpoints()[i])))
	}
}

func TestRestartWaitsForItsPort(t *testing.T) {
	cluster := etcdtest.Start(t, 1)
	require.NoError(t, cluster.Stop(0))
	taken, err := net.Listen("tcp", cluster.Endpoints()[0])
	require.NoError(t, err)
	time.AfterFunc(100*time.Millisecond, func() { _ = taken.Close() })
	require.NoError(t, cluster.Restart(0))
	put(t, cluster.Client(t), "served")
}

func TestIsolatedLeaderLosesLeadershipUntilItRejoins(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 3)
	first := cluster.Leader()
	isolated := clientTo(t, cluster.Endpoints()[first])
	put(t, isolated, "before")

	require.NoError(t, cluster.Isolate(first))
	require.NotEqual(t, first, cluster.Leader())
	require.Error(t, tryPut(t, isolated, "lost"))
	require.Eventually(t, func() bool { return cluster.Leader() >= 0 }, patience, 10*time.Millisecond)
	require.NotEqual(t, first, cluster.Leader())
	requireNoLeader(t, isolated)
	for i := range 3 {
		if i != first {
			put(t, clientTo(t, cluster.Endpoints()[i]), "after")
		}
	}
	require.Equal(t, "before", getLocal(t, isolated))

	require.NoError(t, cluster.Rejoin(first))
	require.Eventually(t, func() bool { return getLocal(t, isolated) == "after" }, patience, 10*time.Millisecond)
	put(t, isolated, "together")
	requireAgreement(t, cluster, "together")
}

func TestIsolatedFollowerLosesItsLeaderUntilItRejoins(t *testing.T) {
	t.Parallel()
	// A busy machine may make for an election, but not every time.
	for begin := time.Now(); !leaderStays(t); {
		require.Less(t, time.Since(begin), patience, "the return of a follower must not disturb the leader")
	}
}

// leaderStays isolates a follower for a while, and reports whether the others' leader stayed the
// same.
func leaderStays(t *testing.T) bool {
	cluster := etcdtest.Start(t, 3)
	leader := cluster.Leader()
	follower := (leader + 1) % 3
	isolated := clientTo(t, cluster.Endpoints()[follower])
	put(t, isolated, "before")

	require.NoError(t, cluster.Isolate(follower))
	require.Error(t, tryPut(t, isolated, "lost"))
	requireNoLeader(t, isolated)
	put(t, clientTo(t, cluster.Endpoints()[leader]), "after")
	stayed := cluster.Leader() == leader
	require.Equal(t, "before", getLocal(t, isolated))

	require.NoError(t, cluster.Rejoin(follower))
	put(t, isolated, "together")
	requireAgreement(t, cluster, "together")
	return stayed && cluster.Leader() == leader
}

func TestNoLeaseIsRenewedAcrossAnIsolation(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name     string
		isolated func(leader int) int
	}{
		{"by a follower that is isolated", func(leader int) int { return (leader + 1) % 3 }},
		{"by a leader that is isolated", func(leader int) int { return leader }},
	} {
		t.Run(test.name, func(t *testing.T) {
			cluster := etcdtest.Start(t, 3)
			leader := cluster.Leader()
			client := clientTo(t, cluster.Endpoints()[(leader+1)%3])
			lease, err := client.Grant(t.Context(), 60)
			require.NoError(t, err)
			_, err = client.KeepAliveOnce(t.Context(), lease.ID)
			require.NoError(t, err)

			require.NoError(t, cluster.Isolate(test.isolated(leader)))
			// Shorter than the election timeout in which etcd would not notice by itself.
			ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
			defer cancel()
			_, err = client.KeepAliveOnce(ctx, lease.ID)
			require.Error(t, err)
		})
	}
}

func TestIsolationLastsThroughARestart(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 3)
	member := (cluster.Leader() + 1) % 3
	require.NoError(t, cluster.Isolate(member))
	require.NoError(t, cluster.Stop(member))
	require.NoError(t, cluster.Restart(member))
	put(t, cluster.Client(t), "after")
	client := clientTo(t, cluster.Endpoints()[member])
	require.Error(t, tryPut(t, client, "lost"))

	require.NoError(t, cluster.Rejoin(member))
	put(t, client, "together")
	requireAgreement(t, cluster, "together")
}

func TestIsolatingAMajorityLeavesNoLeader(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 3)
	for i := range 2 {
		require.NoError(t, cluster.Isolate(i))
	}
	require.Equal(t, -1, cluster.Leader())
	// The write may be applied late: etcd may hold it back until there is a leader.
	require.Error(t, tryPutTo(t, cluster.Client(t), "late", "lost"))
	for i := range 2 {
		require.NoError(t, cluster.Rejoin(i))
	}
	require.Eventually(t, func() bool { return cluster.Leader() >= 0 }, patience, 10*time.Millisecond)
	put(t, cluster.Client(t), "together")
	requireAgreement(t, cluster, "together")
}

func TestIsolatingTheOnlyMemberDoesNothing(t *testing.T) {
	cluster := etcdtest.Start(t, 1)
	require.NoError(t, cluster.Isolate(0))
	require.Equal(t, 0, cluster.Leader())
	put(t, cluster.Client(t), "served")
	require.NoError(t, cluster.Rejoin(0))
}

func TestChangingAMemberTwiceIsChangingItOnce(t *testing.T) {
	cluster := etcdtest.Start(t, 3)
	for _, change := range []func(int) error{cluster.Rejoin, cluster.Isolate, cluster.Rejoin,
		cluster.Restart, cluster.Stop, cluster.Restart} {
		require.NoError(t, change(1))
		require.NoError(t, change(1))
	}
	put(t, clientTo(t, cluster.Endpoints()[1]), "served")
}

func TestChangingAMemberThatDoesNotExistIsAnError(t *testing.T) {
	cluster := etcdtest.Start(t, 1)
	for _, change := range []func(int) error{cluster.Stop, cluster.Restart, cluster.Isolate, cluster.Rejoin} {
		require.ErrorContains(t, change(-1), "member is -1")
		require.ErrorContains(t, change(1), "member is 1")
	}
}

func TestClosedClusterRefusesAndChangesNoMore(t *testing.T) {
	temporary := t.TempDir()
	t.Setenv("TMPDIR", temporary)
	cluster, err := etcdtest.New(3)
	require.NoError(t, err)
	require.NotEmpty(t, entries(t, temporary))

	took := testclock.Time(func() {
		require.NoError(t, cluster.Close())
		require.NoError(t, cluster.Close())
	})
	require.Less(t, took, 3*time.Second)
	require.Empty(t, entries(t, temporary))
	require.Equal(t, -1, cluster.Leader())
	for _, endpoint := range cluster.Endpoints() {
		_, err := net.Dial("tcp", endpoint)
		require.Error(t, err)
	}
	for _, change := range []func(int) error{cluster.Stop, cluster.Restart, cluster.Isolate, cluster.Rejoin} {
		require.ErrorContains(t, change(0), "closed")
	}
	require.ErrorContains(t, cluster.Backup(), "closed")
	require.ErrorContains(t, cluster.Restore(), "closed")
}

func TestClusterMayBeUsedConcurrently(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 3)
	var users sync.WaitGroup
	for i := range 3 {
		users.Go(func() {
			for _, change := range []func(int) error{cluster.Isolate, cluster.Stop, cluster.Rejoin, cluster.Restart} {
				if err := change(i); err != nil {
					t.Error(err)
				}
				cluster.Leader()
				cluster.Endpoints()
			}
		})
	}
	users.Wait()
	put(t, cluster.Client(t), "together")
}

func clientTo(t *testing.T, endpoint string) *clientv3.Client {
	t.Helper()
	client, err := clientv3.New(clientv3.Config{
		Endpoints:   []string{endpoint},
		DialTimeout: 5 * time.Second,
		Logger:      zap.NewNop(),
	})
	require.NoError(t, err)
	t.Cleanup(func() { _ = client.Close() })
	return client
}

// put writes the one key that these tests use.
// put repeats what is lost in an election, or on the way to a leader that has only just been found.
func put(t *testing.T, client *clientv3.Client, value string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	_, err := client.Put(ctx, "key", value)
	for errors.Is(err, rpctypes.ErrTimeout) || errors.Is(err, rpctypes.ErrTimeoutDueToLeaderFail) {
		_, err = client.Put(ctx, "key", value)
	}
	require.NoError(t, err)
}

// tryPut allows a write that should fail half a second.
func tryPut(t *testing.T, client *clientv3.Client, value string) error {
	t.Helper()
	return tryPutTo(t, client, "key", value)
}

func tryPutTo(t *testing.T, client *clientv3.Client, key, value string) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	_, err := client.Put(ctx, key, value)
	return err
}

func get(t *testing.T, client *clientv3.Client) string {
	t.Helper()
	return read(t, client)
}

// getLocal reads what the client's one member knows, without asking its peers.
func getLocal(t *testing.T, client *clientv3.Client) string {
	t.Helper()
	return read(t, client, clientv3.WithSerializable())
}

func read(t *testing.T, client *clientv3.Client, options ...clientv3.OpOption) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	response, err := client.Get(ctx, "key", options...)
	require.NoError(t, err)
	require.Len(t, response.Kvs, 1)
	return string(response.Kvs[0].Value)
}

// requireNoLeader waits until the client's one member knows no leader.
func requireNoLeader(t *testing.T, client *clientv3.Client) {
	t.Helper()
	require.Eventually(t, func() bool {
		status, err := client.Status(t.Context(), client.Endpoints()[0])
		return err == nil && status.Leader == 0
	}, patience, 10*time.Millisecond)
}

// requireAgreement waits until all members have the value and follow one leader.
func requireAgreement(t *testing.T, cluster *etcdtest.Cluster, value string) {
	t.Helper()
	var clients []*clientv3.Client
	for _, endpoint := range cluster.Endpoints() {
		client := clientTo(t, endpoint)
		require.Equal(t, value, get(t, client))
		clients = append(clients, client)
	}
	// A machine that is busy may make for an election at any time.
	require.Eventually(t, func() bool {
		leaders := make(map[uint64]bool)
		for _, client := range clients {
			status, err := client.Status(t.Context(), client.Endpoints()[0])
			if err != nil {
				return false
			}
			leaders[status.Leader] = true
		}
		return len(leaders) == 1 && !leaders[0]
	}, patience, 10*time.Millisecond)
}

func indexes(count int) []int {
	all := make([]int, count)
	for i := range all {
		all[i] = i
	}
	return all
}

func entries(t *testing.T, dir string) []string {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(dir, "*"))
	require.NoError(t, err)
	_, err = os.Stat(dir)
	require.NoError(t, err)
	return names
}

// etcd 3.7 panics in an election that comes before it has applied what it had committed, if that is
// over a hundred entries.
func TestMemberWithManyEntriesRestarts(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 1)
	client := cluster.Client(t)
	for range 2000 {
		put(t, client, strings.Repeat("x", 1000))
	}
	for range 3 {
		require.NoError(t, cluster.Stop(0))
		require.NoError(t, cluster.Restart(0))
	}
	put(t, client, "after")
}
