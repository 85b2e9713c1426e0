package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"example.com/etcdutil"
	"example.com/etcdutil/etcdtest"
	"github.com/stretchr/testify/require"
	clientv3 "go.etcd.io/etcd/client/v3"
)

const patience = time.Minute

// replica is a job runner behind a link of its own.
type replica struct {
	config
	link *etcdtest.Link
	log  buffer
	stop context.CancelFunc
	done chan struct{}
	err  error
}

type buffer struct {
	mu    sync.Mutex
	bytes bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.bytes.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.bytes.String()
}

func startReplica(t *testing.T, cluster *etcdtest.Cluster, name string) *replica {
	t.Helper()
	link := etcdtest.StartLink(t, cluster.Endpoints()[0])
	r := &replica{link: link, config: config{
		endpoints: []string{link.Endpoint()}, name: name, listen: freeAddress(t), workers: 2, ttl: 2 * time.Second,
		position: filepath.Join(t.TempDir(), "position"),
	}}
	r.start(t)
	return r
}

func (r *replica) start(t *testing.T) {
	ctx, stop := context.WithCancel(context.Background())
	r.stop, r.done = stop, make(chan struct{})
	go func() {
		defer close(r.done)
		r.err = run(ctx, r.config, slog.New(slog.NewTextHandler(&r.log, nil)))
	}()
	t.Cleanup(func() {
		stop()
		<-r.done
		if t.Failed() {
			t.Logf("%s:\n%s", r.name, r.log.String())
		}
	})
}

// stops ends the replica as SIGTERM does, and requires that it ends in time.
func (r *replica) stops(t *testing.T, bound time.Duration) {
	t.Helper()
	began := time.Now()
	r.stop()
	select {
	case <-r.done:
	case <-time.After(patience):
		require.Fail(t, "does not stop")
	}
	require.Less(t, time.Since(began), bound)
	require.NoError(t, r.err)
}

func (r *replica) get(path string) (status int, body string) {
	client := http.Client{Timeout: 5 * time.Second}
	resp, err := client.Get("http://" + r.listen + path)
	if err != nil {
		return 0, ""
	}
	defer resp.Body.Close()
	data, _ := io.ReadAll(resp.Body)
	return resp.StatusCode, string(data)
}

func (r *replica) eventuallyReady(t *testing.T, want int) {
	t.Helper()
	eventually(t, func() bool { status, _ := r.get("/ready"); return status == want }, fmt.Sprintf("/ready is %d", want))
}

func freeAddress(t *testing.T) string {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer listener.Close()
	return listener.Addr().String()
}

func eventually(t *testing.T, cond func() bool, what string) {
	t.Helper()
	require.Eventually(t, cond, patience, 20*time.Millisecond, what)
}

func put(t *testing.T, client *clientv3.Client, settings Settings) {
	t.Helper()
	data, err := json.Marshal(settings)
	require.NoError(t, err)
	_, err = client.Put(t.Context(), settingsKey, string(data))
	require.NoError(t, err)
}

func count(t *testing.T, client *clientv3.Client, prefix string) int {
	t.Helper()
	resp, err := client.Get(t.Context(), prefix, clientv3.WithPrefix(), clientv3.WithCountOnly())
	require.NoError(t, err)
	return int(resp.Count)
}

// awaitJobs waits until n more jobs are done.
func awaitJobs(t *testing.T, client *clientv3.Client, n int) {
	t.Helper()
	before := count(t, client, done)
	eventually(t, func() bool { return count(t, client, done) >= before+n }, "jobs are done")
}

func leaderOf(t *testing.T, client *clientv3.Client, replicas []*replica) *replica {
	t.Helper()
	var leader *replica
	eventually(t, func() bool {
		holder, err := etcdutil.Holder(t.Context(), client, leaderName)
		for _, r := range replicas {
			if err == nil && r.name == holder.Value {
				leader = r
			}
		}
		return leader != nil
	}, "a leader")
	return leader
}

func TestThreeReplicasDoEachJobOnceThroughCutsAndKills(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 1)
	client := cluster.Client(t)
	put(t, client, Settings{Every: 20, Takes: 10})
	var replicas []*replica
	for _, name := range []string{"anna", "bert", "cleo"} {
		replicas = append(replicas, startReplica(t, cluster, name))
	}
	awaitJobs(t, client, 20)
	for range 2 {
		cut := leaderOf(t, client, replicas)
		cut.link.Cut()
		eventually(t, func() bool {
			holder, err := etcdutil.Holder(t.Context(), client, leaderName)
			return err == nil && holder.Value != cut.name
		}, "another leader")
		awaitJobs(t, client, 20)
		cut.link.Heal()
	}
	killed := leaderOf(t, client, replicas)
	killed.link.Cut() // nothing that it does when it stops reaches etcd
	killed.stops(t, 6*time.Second)
	awaitJobs(t, client, 20)
	killed.link.Heal()
	killed.start(t)
	awaitJobs(t, client, 20)

	put(t, client, Settings{Every: 3_600_000, Takes: 0}) // no more jobs
	eventually(t, func() bool { return count(t, client, queued) == 0 }, "all jobs are done")
	for _, r := range replicas {
		r.link.Heal()
	}
	resp, err := client.Get(t.Context(), done, clientv3.WithPrefix())
	require.NoError(t, err)
	workers := map[string]bool{}
	for _, kv := range resp.Kvs {
		require.EqualValues(t, 1, kv.Version, "%s was done once", kv.Key)
		workers[string(kv.Value)] = true
	}
	require.Len(t, workers, 3, "all replicas work")
	requireSameAudit(t, client, replicas)
	for _, r := range replicas {
		r.stops(t, time.Second)
	}
}

// requireSameAudit requires that each replica has read each entry of the audit log once, in order,
// also the one that was started twice.
func requireSameAudit(t *testing.T, client *clientv3.Client, replicas []*replica) {
	t.Helper()
	resp, err := client.Get(t.Context(), auditName)
	require.NoError(t, err)
	entries := resp.Kvs[0].Version
	for _, r := range replicas {
		eventually(t, func() bool { return strings.Contains(r.log.String(), fmt.Sprintf("msg=audit version=%d ", entries)) }, "the last entry")
		read := regexp.MustCompile(`msg=audit version=(\d+) `).FindAllStringSubmatch(r.log.String(), -1)
		// A leader may not have seen yet that there are no more jobs.
		require.GreaterOrEqual(t, len(read), int(entries))
		for i, match := range read {
			require.Equal(t, fmt.Sprint(i+1), match[1])
		}
	}
}

func TestReplicaIsReadyAndCountsWhileItsEtcdCanBeReached(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 1)
	put(t, cluster.Client(t), Settings{Every: 20, Takes: 10})
	r := startReplica(t, cluster, "anna")
	r.eventuallyReady(t, http.StatusOK)
	awaitJobs(t, cluster.Client(t), 5)
	_, metrics := r.get("/metrics")
	for _, line := range []string{
		`etcdutil_locks_held{name="jobrunner/leader"} 1`,
		`etcdutil_lock_releases_total{name="jobrunner/working/"} [1-9]`,
		`etcdutil_mirror_age_seconds{mirror="settings"} [0-9]`,
	} {
		require.Regexp(t, line, metrics)
	}
	r.link.Cut()
	r.eventuallyReady(t, http.StatusServiceUnavailable)
	r.stops(t, 6*time.Second)
}

func TestReplicaStopsWithin1s(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 1)
	client := cluster.Client(t)
	put(t, client, Settings{Every: 20, Takes: 60_000})
	r := startReplica(t, cluster, "anna")
	eventually(t, func() bool { return count(t, client, working) == 2 }, "both workers work")
	r.stops(t, time.Second)
	require.Zero(t, count(t, client, working), "its jobs are given back")
	_, err := etcdutil.Holder(t.Context(), client, leaderName)
	require.ErrorIs(t, err, etcdutil.ErrNoHolder)
}

func TestAuditGoesOnAfterEntriesThatWereCompacted(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 1)
	client := cluster.Client(t)
	put(t, client, Settings{Every: 20, Takes: 0})
	first, second := startReplica(t, cluster, "anna"), startReplica(t, cluster, "bert")
	awaitJobs(t, client, 5)
	second.stops(t, time.Second)
	awaitJobs(t, client, 10)
	resp, err := client.Get(t.Context(), auditName)
	require.NoError(t, err)
	_, err = client.Compact(t.Context(), resp.Header.Revision)
	require.NoError(t, err)
	second.start(t)
	awaitJobs(t, client, 5)
	eventually(t, func() bool {
		last := regexp.MustCompile(`msg=audit version=(\d+) `).FindAllStringSubmatch(second.log.String(), -1)
		return strings.Contains(second.log.String(), "events lost") && len(last) > 0 &&
			strings.Contains(first.log.String(), last[len(last)-1][0]) && len(last[len(last)-1][1]) >= len(fmt.Sprint(resp.Kvs[0].Version))
	}, "the second one reads on")
}
