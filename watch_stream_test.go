package etcdutil

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"example.com/etcdutil/etcdtest"
	"example.com/etcdutil/internal/reorder"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/namespace"
	"go.etcd.io/etcd/server/v3/embed"
	"google.golang.org/grpc"
)

// etcd takes minutes to make fragments of so many small events.
func TestWatchIsToldOfAHundredThousandDeletionsAtOnce(t *testing.T) {
	if underRace {
		t.Skip("etcd itself is too slow then")
	}
	t.Parallel()
	cluster := etcdtest.Start(t, 1)
	writer := cluster.Client(t)
	const txns, perTxn, keys = 1_000, 125, 125_000
	prefix := strings.Repeat("p", 130) + "/"
	var writing sync.WaitGroup
	for worker := range 8 {
		writing.Go(func() {
			for i := worker; i < txns; i += 8 {
				ops := make([]clientv3.Op, perTxn)
				for j := range ops {
					ops[j] = clientv3.OpPut(fmt.Sprintf("%s%06d", prefix, i*perTxn+j), "")
				}
				_, err := writer.Txn(t.Context()).Then(ops...).Commit()
				assert.NoError(t, err)
			}
		})
	}
	writing.Wait()
	client := cluster.Client(t)
	live, other := mustWatch[string](t, client, prefix, WithPrefix(), WithCodec(Raw)), mustWatch[string](t, client, "other", WithCodec(Raw))
	opened := hubRef{client}.streams()
	resp, err := writer.Delete(t.Context(), prefix, clientv3.WithPrefix())
	require.NoError(t, err)
	require.EqualValues(t, keys, resp.Deleted)
	rev := resp.Header.Revision
	told := func(w *Watcher[string]) {
		t.Helper()
		begin := time.Now()
		for i := range keys {
			e := next(t, w)
			if i%1000 == 0 { // require takes longer than what it checks
				require.Equal(t, Event[string]{Type: EventDelete, Key: fmt.Sprintf("%s%06d", prefix, i), Revision: rev}, e)
			}
		}
		require.Less(t, time.Since(begin), 30*time.Second)
		t.Log("told in", time.Since(begin))
	}
	told(live)
	otherRev := mustPut(t, writer, "other", "")
	require.Equal(t, otherRev, next(t, other).Revision)
	require.Equal(t, opened, hubRef{client}.streams(), "the live stream takes them")

	told(mustWatch[string](t, client, prefix, WithPrefix(), WithCodec(Raw), WithRevision(rev)))
}

// Each begins on a catch-up stream, which becomes its own when it turns out that nobody reads.
func TestWatchersInThePastThatNobodyReadsTakeFewStreams(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 1)
	writer := cluster.Client(t)
	from := revision(t, writer) + 1
	const puts = 1_500 // more than is read ahead
	for range puts {
		mustPut(t, writer, "k", strings.Repeat("x", 10_000))
	}
	client := cluster.Client(t)
	most := 0
	var watchers []*Watcher[string]
	for range 20 {
		w := mustWatch[string](t, client, "k", WithCodec(Raw), WithRevision(from))
		watchers = append(watchers, w)
		eventually(t, func() (behind bool) {
			h := hubRef{client}.lock()
			defer h.mu.Unlock()
			most = max(most, h.count(ownStream))
			return w.reflector.sub.behind
		}, "its reader is behind")
	}
	require.LessOrEqual(t, most, maxOwn)
	for _, w := range []*Watcher[string]{watchers[0], watchers[len(watchers)-1]} {
		for i := range puts {
			require.Equal(t, from+Revision(i), next(t, w).Revision)
		}
	}
}

// A list that is larger than what is read ahead fills the queue. What the reader then makes room
// for is the list, and not a watch that was parked for it.
func TestWatchListsOnceThoughItsReaderIsSlow(t *testing.T) { // not in parallel: it counts who lists
	cluster := etcdtest.Start(t, 1)
	const values = 12
	for i := range values {
		mustPut(t, cluster.Client(t), fmt.Sprintf("p/%02d", i), strings.Repeat("x", 1_000_000))
	}
	inNamespace := cluster.Client(t)
	inNamespace.KV = namespace.NewKV(inNamespace.KV, "p")
	inNamespace.Watcher = namespace.NewWatcher(inNamespace.Watcher, "p")
	for name, test := range map[string]struct {
		client *clientv3.Client
		prefix string
	}{
		"on a shared stream": {cluster.Client(t), "p/"},
		"in a namespace":     {inNamespace, "/"},
	} {
		t.Run(name, func(t *testing.T) {
			w := mustWatch[string](t, test.client, test.prefix, WithPrefix(), WithCodec(Raw), WithSnapshot())
			lists := 0
			for i := range values {
				require.Equal(t, fmt.Sprintf("%s%02d", test.prefix, i), next(t, w).Key)
				lists = max(lists, goroutinesIn("listUntilDone"))
				time.Sleep(50 * time.Millisecond)
			}
			require.Equal(t, EventSynced, next(t, w).Type)
			require.Equal(t, 1, lists)
			select {
			case e := <-w.Events():
				require.Fail(t, "another event", "%v", e.Type)
			case <-time.After(time.Second):
			}
		})
	}
}

// passwordCluster is a cluster of one member in which "root" may do everything and "user" what is
// below allowed/. Authentication is not enabled yet.
func passwordCluster(t *testing.T, tokenTTL uint) (cluster *etcdtest.Cluster, admin *clientv3.Client) {
	t.Helper()
	cluster, err := etcdtest.NewWith(1, func(c *embed.Config) { c.AuthTokenTTL, c.BcryptCost = tokenTTL, 4 })
	require.NoError(t, err)
	t.Cleanup(func() { _ = cluster.Close() })
	admin, ctx := cluster.Client(t), context.Background()
	for _, name := range []string{"root", "user"} {
		_, err := admin.UserAdd(ctx, name, "secret")
		require.NoError(t, err)
		_, err = admin.RoleAdd(ctx, name)
		require.NoError(t, err)
		_, err = admin.UserGrantRole(ctx, name, name)
		require.NoError(t, err)
	}
	_, err = admin.RoleGrantPermission(ctx, "user", "allowed/", "allowed0", clientv3.PermissionType(clientv3.PermReadWrite))
	require.NoError(t, err)
	return cluster, admin
}

// clientv3 fetches a token before each stream. Of two members one would always get that request,
// and the other one the stream.
func TestWatchStreamsWithAPasswordLeaveASilentConnectionOfTwo(t *testing.T) {
	t.Parallel()
	cluster, admin := passwordCluster(t, 300)
	_, err := admin.AuthEnable(t.Context())
	require.NoError(t, err)
	root := userClient(t, "root", nil, cluster.Endpoints()...)
	link := etcdtest.StartLink(t, cluster.Endpoints()[0])

	watching := userClient(t, "user", nil, link.Endpoint())
	w := mustWatch[string](t, watching, "allowed/", WithPrefix(), WithCodec(Raw))
	rev := mustPut(t, root, "allowed/a", "")
	require.Equal(t, rev, next(t, w).Revision)
	leasing := userClient(t, "user", nil, link.Endpoint())
	lease := mustLease(t, leasing, 20*time.Second, WithKeepAliveInterval(time.Second))
	expiry := lease.Expiry()
	eventually(t, func() bool { return lease.Expiry().After(expiry) }, "a renewal")

	addEndpoints(watching, cluster.Endpoints()...)
	addEndpoints(leasing, cluster.Endpoints()...)
	link.Cut()
	rev = mustPut(t, root, "allowed/a", "")
	select {
	case e := <-w.Events():
		require.Equal(t, rev, e.Revision)
	case <-time.After(30 * time.Second):
		require.Fail(t, "no event")
	}
	cut := lease.Expiry()
	eventually(t, func() bool { return lease.Err() != nil || lease.Expiry().After(cut) }, "a renewal or the end")
	require.NoError(t, context.Cause(lease))
}

// A client without a user has no better token for another stream.
func TestLockOpensFewStreamsWhileItsWatchIsRefused(t *testing.T) {
	t.Parallel()
	cluster, admin := passwordCluster(t, 300)
	link := etcdtest.StartLink(t, cluster.Endpoints()[0])
	client := newClient(t, link.Endpoint())
	mustAcquire(t, client, "allowed/lock", WithTTL(30*time.Second))
	eventually(t, func() bool { return watchesOf(client) == 1 }, "the watch of the lock's key")
	_, err := admin.AuthEnable(t.Context())
	require.NoError(t, err)
	link.Reset()
	before := hubRef{client}.streams()
	time.Sleep(3 * time.Second)
	require.Less(t, hubRef{client}.streams()-before, int64(30))
	_, err = userClient(t, "root", nil, cluster.Endpoints()...).AuthDisable(t.Context())
	require.NoError(t, err) // so that the lock can be released
}

// The second dead connection is left as soon as the first, because there is a third.
func TestWatchLeavesTwoSilentConnectionsOfThree(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 1)
	writer := cluster.Client(t)
	first, second := etcdtest.StartLink(t, cluster.Endpoints()[0]), etcdtest.StartLink(t, cluster.Endpoints()[0])
	client := newClient(t, first.Endpoint())
	w := mustWatch[string](t, client, "k", WithCodec(Raw))
	rev := mustPut(t, writer, "k", "")
	require.Equal(t, rev, next(t, w).Revision)
	addEndpoints(client, second.Endpoint())
	awaitConnections(t, client)
	first.Cut()
	second.Cut()
	eventually(t, func() bool { return watchesFrom(client, second.Endpoint()) }, "the watch moves to the second connection")
	addEndpoints(client, cluster.Endpoints()...)
	begin := time.Now()
	rev = mustPut(t, writer, "k", "")
	require.Equal(t, rev, next(t, w).Revision)
	require.Less(t, time.Since(begin), 2*idleTimeout)
}

// A stream to a silent member costs seconds. A member that only broke the connection may be back
// sooner.
func TestWatchWaitsForAnotherMemberRatherThanReturnToASilentOne(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 1)
	writer := cluster.Client(t)
	silent, other := etcdtest.StartLink(t, cluster.Endpoints()[0]), etcdtest.StartLink(t, cluster.Endpoints()[0])
	client := newClient(t, silent.Endpoint())
	w := mustWatch[string](t, client, "k", WithCodec(Raw))
	rev := mustPut(t, writer, "k", "")
	require.Equal(t, rev, next(t, w).Revision)
	addEndpoints(client, other.Endpoint())
	awaitConnections(t, client)
	silent.Cut()
	eventually(t, func() bool { return watchesFrom(client, other.Endpoint()) }, "the watch moves to the other member")
	for range 2 {
		other.Reset() // the second time while it is connected to: gRPC tries again after a second
		time.Sleep(10 * time.Millisecond)
	}
	begin := time.Now()
	rev = mustPut(t, writer, "k", "")
	for {
		select {
		case e := <-w.Events():
			require.Equal(t, rev, e.Revision)
			return
		case <-time.After(time.Millisecond):
			passed := time.Since(begin)
			require.Less(t, passed, patience)
			require.False(t, passed < idleTimeout-hubTick && watchesFrom(client, silent.Endpoint()), "it has a stream to the silent member")
		}
	}
}

func TestWatchTakesASilentMemberWhenTheOthersDoNotComeBack(t *testing.T) {
	t.Parallel()
	client := newClient(t, "a:1", "b:1", "c:1")
	synctest.Test(t, func(t *testing.T) {
		h := &watchHub{client: client, avoided: make(map[string]avoidance)}
		silent, refusing := &watchStream{member: "a:1", idle: true}, &watchStream{member: "b:1"}
		require.True(t, h.takes("a:1", 1))
		h.avoid(silent)
		require.False(t, h.takes("a:1", 3), "others are tried first")
		require.True(t, h.takes("a:1", 4), "no other is about to come back")
		h.avoid(refusing)
		require.False(t, h.takes("a:1", 1000))
		require.False(t, h.takes("b:1", 3))
		require.True(t, h.takes("b:1", 4))
		time.Sleep(idleTimeout / 2)
		h.avoid(refusing)
		require.False(t, h.takes("a:1", 1000))
		time.Sleep(idleTimeout / 2)
		require.True(t, h.takes("a:1", 4), "the other fails again and again")
		time.Sleep(avoidMember)
		require.True(t, h.takes("a:1", 1))
	})
}

// A member that was removed from the cluster answers pings and requests for progress for ever.
func TestStreamsLeaveAMemberThatWasRemoved(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 3)
	leader := cluster.Leader()
	removed := (leader + 1) % 3
	direct, client := newClient(t, cluster.Endpoints()[leader]), newClient(t, cluster.Endpoints()[removed])
	w := mustWatch[string](t, client, "k", WithCodec(Raw))
	lock := mustAcquire(t, client, "lock", WithTTL(time.Minute))
	eventually(t, func() bool { return watchesOf(client) == 2 }, "the watch of the lock's key")
	rev := mustPut(t, direct, "k", "before")
	require.Equal(t, rev, next(t, w).Revision)
	addEndpoints(client, cluster.Endpoints()[leader], cluster.Endpoints()[(leader+2)%3])
	awaitConnections(t, client)
	removeMember(t, cluster, removed)

	rev = mustPut(t, direct, "k", "after")
	mustDelete(t, direct, lock.Key())
	told := start(func() (Event[string], error) { return <-w.Events(), nil })
	within(t, 15*time.Second, told.done, "the watcher gets the change")
	require.Equal(t, rev, told.v.Revision)
	within(t, 5*time.Second, lock.Done(), "the holder is told of the deletion")
	require.ErrorIs(t, context.Cause(lock), ErrLockLost)
	require.NoError(t, lock.Lease().Err())
}

// What etcd has come to is read only by a client that can go to another member.
func TestQuietStreamsStayOnTheirMemberAndAClientWithOneEndpointReadsNothing(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 3)
	type quiet struct {
		*clientv3.Client
		lock    *Lock
		reads   atomic.Int64
		streams int64
	}
	open := func(endpoints ...string) *quiet {
		q := &quiet{}
		q.Client = clientAt(t, endpoints, func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
			err := invoke(ctx, method, req, reply, cc, opts...)
			if r, ok := req.(*etcdserverpb.TxnRequest); ok && err == nil && len(r.Compare) == 0 && onlyReads(r) {
				q.reads.Add(1)
			}
			return err
		})
		for i := range 3 {
			mustWatch[string](t, q.Client, fmt.Sprint(nameOf(t), i), WithCodec(Raw))
		}
		q.lock = mustAcquire(t, q.Client, nameOf(t)+endpoints[0]+fmt.Sprint(len(endpoints)), WithTTL(time.Minute))
		eventually(t, func() bool { return watchesOf(q.Client) == 4 && allStand(q.Client) }, "the watches stand")
		q.streams = hubRef{q.Client}.streams()
		return q
	}
	several, one := open(cluster.Endpoints()...), open(cluster.Endpoints()[0])
	begin := time.Now()
	eventually(t, func() bool { return several.reads.Load() == 4 }, "etcd's revision is read")
	require.GreaterOrEqual(t, time.Since(begin), 3*lagTimeout)
	require.Zero(t, one.reads.Load())
	for _, q := range []*quiet{several, one} {
		require.Equal(t, q.streams, hubRef{q.Client}.streams())
		require.NoError(t, q.lock.Err())
	}
}

// allStand reports whether all watches that a client has on shared streams stand.
func allStand(client *clientv3.Client) bool {
	h := hubRef{client}.lock()
	defer h.mu.Unlock()
	for sub := range h.subs {
		if sub.current == nil || !sub.current.created {
			return false
		}
	}
	return true
}

func TestStreamLeavesAMemberThatStandsStillButNoneThatIsSlow(t *testing.T) {
	t.Parallel()
	client := newClient(t, "a:1", "b:1")
	synctest.Test(t, func(t *testing.T) {
		h := &watchHub{client: client, avoided: make(map[string]avoidance)}
		open := func() *watchStream {
			s := &watchStream{
				hub: h, kind: lockStream, number: 1, member: "a:1", direct: true, cancel: func() {},
				subs: map[*watchSub]struct{}{{}: {}}, ready: make(chan struct{}, 1),
			}
			s.handle(&etcdserverpb.WatchResponse{Header: &etcdserverpb.ResponseHeader{Revision: 1}})
			return s
		}
		s := open()
		// lagsAfter reports whether the member is found to be behind while it shows what rev returns.
		lagsAfter := func(d time.Duration, rev func(passed time.Duration) Revision) bool {
			for begin := time.Now(); !s.lags && time.Since(begin) < d; {
				time.Sleep(hubTick)
				s.tick(time.Now(), hubTick)
				header := &etcdserverpb.ResponseHeader{Revision: rev(time.Since(begin))}
				if len(s.creating) > 0 {
					s.handle(&etcdserverpb.WatchResponse{Header: header, Created: true, Canceled: true, WatchId: -1})
				}
			}
			return s.lags
		}
		slow := func(passed time.Duration) Revision {
			if s.goal == 0 {
				s.goal, s.goalAt = 100, time.Now()
			}
			return 1 + Revision(passed/(lagTimeout-time.Second))
		}
		require.False(t, lagsAfter(time.Minute, slow))
		require.False(t, lagsAfter(time.Minute, func(time.Duration) Revision { return 100 }), "it has come on")
		s.goal, s.goalAt = 101, time.Now() // it was read that etcd has come so far
		still := func(time.Duration) Revision { return s.shown }
		require.False(t, lagsAfter(lagGrace-hubTick, still))
		require.True(t, lagsAfter(2*hubTick, still))

		h.avoid(s)
		other := open()
		require.False(t, h.takes("a:1", 1), "another stream to it answers")
		h.avoid(&watchStream{member: "b:1"})
		require.False(t, h.takes("a:1", 1000), "the other one may be about to come back")
		other.handle(&etcdserverpb.WatchResponse{Header: &etcdserverpb.ResponseHeader{Revision: 101}})
		require.True(t, h.takes("a:1", 1), "it has come on")
	})
}

// watchesFrom reports whether the client's live stream is open to a member.
func watchesFrom(client *clientv3.Client, member string) bool {
	h := hubRef{client}.lock()
	defer h.mu.Unlock()
	return h.live != nil && h.live.number > 0 && h.live.member == member
}

func TestWatchDoesNotJoinAStreamThatIsAboutToEnd(t *testing.T) {
	t.Parallel()
	client := testCluster.Client(t)
	w := mustWatch[string](t, client, nameOf(t))
	require.NoError(t, w.Close())
	h := hubRef{client}.lock()
	defer h.mu.Unlock()
	live := h.live
	live.tick(time.Now().Add(2*streamLinger), 0) // which closes it
	require.NotSame(t, live, h.shared(&h.live, liveStream))
}

// A process that was suspended finds its clock ahead of what it has received.
func TestWatchKeepsItsStreamAfterItsProcessWasSuspended(t *testing.T) {
	t.Parallel()
	client := testCluster.Client(t)
	mustWatch[string](t, client, nameOf(t))
	h := hubRef{client}.lock()
	before := h.opened
	h.live.pinged = true
	h.live.creating = append(h.live.creating, nil)
	h.live.push(pingRequest())
	time.Sleep(idleTimeout + time.Second) // nothing runs meanwhile
	h.mu.Unlock()
	time.Sleep(3 * hubTick)
	require.Equal(t, before, hubRef{client}.streams())
}

// Before a watch is resumed etcd sorts the keys of its prefix, to find the newest. It cannot do
// that for very many watches at once.
func TestWatchesOfALargePrefixAreResumedAfterAReset(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 1)
	writer := cluster.Client(t)
	for i := 0; i < 9000; i += 100 {
		var ops []clientv3.Op
		for j := range 100 {
			ops = append(ops, clientv3.OpPut(fmt.Sprintf("p/%04d", i+j), ""))
		}
		mustTxn(t, writer, ops...)
	}
	client, link := linkedTo(t, cluster)
	watchers := make([]*Watcher[string], 120)
	var opening sync.WaitGroup
	for worker := range 8 {
		opening.Go(func() {
			for i := worker; i < len(watchers); i += 8 {
				w, err := Watch[string](t.Context(), client, "p/", WithPrefix(), WithCodec(Raw))
				if !assert.NoError(t, err) {
					return
				}
				watchers[i] = w
			}
		})
	}
	opening.Wait()
	require.NotContains(t, watchers, (*Watcher[string])(nil))
	link.Reset()
	rev := mustPut(t, writer, "p/0000", "")
	for _, w := range watchers {
		require.Equal(t, rev, next(t, w).Revision)
	}
}

// etcd may send an answer about progress from before a watch was created after the creation.
func TestWatchIsNotMovedOnByProgressFromBeforeIt(t *testing.T) {
	t.Parallel()
	direct, name := testCluster.Client(t), nameOf(t)
	first, second := mustPut(t, direct, name+"/first", ""), mustPut(t, direct, name+"/second", "")
	var progress reorder.Progress
	client := newClientWith(t, grpc.WithChainStreamInterceptor(progress.Intercept))
	require.Equal(t, first, next(t, mustWatch[string](t, client, name+"/first", WithRevision(first), WithCodec(Raw))).Revision)
	eventually(t, func() bool { return progress.Held() > 0 }, "the first watch is up to date")
	require.Equal(t, second, next(t, mustWatch[string](t, client, name+"/second", WithRevision(second), WithCodec(Raw))).Revision)
}

// After a compaction most of what watches read to be resumed may be refused.
func TestWatchBatchFindsOutWithFewReadsWhatIsCompacted(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 1)
	var sent atomic.Int64
	client := clientOf(t, cluster, func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		sent.Add(1)
		return invoke(ctx, method, req, reply, cc, opts...)
	})
	const n = 90
	var revs []Revision
	for range n {
		revs = append(revs, mustPut(t, client, "k", ""))
	}
	first := revs[n*2/3] // that is not compacted
	_, err := client.Compact(t.Context(), first)
	require.NoError(t, err)
	sent.Store(0)
	var batch []readRequest
	for _, rev := range revs {
		batch = append(batch, readRequest{
			ops: []clientv3.Op{clientv3.OpGet("k", clientv3.WithRev(rev))},
			done: func(resp *clientv3.TxnResponse, err error) {
				if rev < first {
					require.ErrorIs(t, err, rpctypes.ErrCompacted)
					return
				}
				require.NoError(t, err)
				require.Equal(t, rev, rangeIn(resp, 0).Kvs[0].ModRevision)
				revs = slices.DeleteFunc(revs, func(r Revision) bool { return r == rev })
			},
		})
	}
	rand.Shuffle(n, func(i, j int) { batch[i], batch[j] = batch[j], batch[i] })
	(&batchReader{ctx: t.Context(), client: client}).read(batch)
	require.Len(t, revs, n*2/3)
	require.LessOrEqual(t, sent.Load(), int64(10))
}

// The pages of a list must be of one history. Behind etcd's gRPC proxy the client's connection
// outlives a restore.
func TestWatchListsOneHistoryThoughARestoreComesBetweenItsPages(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 1)
	proxy := etcdtest.StartProxy(t, cluster)
	direct := cluster.Client(t)
	keys := []string{"p/0", "p/1", "p/2", "p/3"}
	for _, key := range keys {
		mustPut(t, direct, key, "first")
	}
	require.NoError(t, cluster.Backup())
	for range 3 {
		mustPut(t, direct, "p/3", "lost")
	}
	var restored sync.Once
	client := clientAt(t, []string{proxy.Endpoint()}, func(
		ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption,
	) error {
		if r, ok := req.(*etcdserverpb.RangeRequest); ok && r.Revision > 0 {
			restored.Do(func() {
				assert.NoError(t, cluster.Restore())
				for range 4 {
					mustPut(t, cluster.Client(t), "p/0", "second")
				}
			})
		}
		return invoke(ctx, method, req, reply, cc, opts...)
	})
	w := mustWatch[string](t, client, "p/", WithPrefix(), WithCodec(Raw), WithSnapshot())
	have := map[string]string{}
	for e := next(t, w); e.Type != EventSynced; e = next(t, w) {
		have[e.Key] = e.Value
	}
	require.Equal(t, map[string]string{"p/0": "second", "p/1": "first", "p/2": "first", "p/3": "first"}, have)
}
