package etcdutil

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"example.com/etcdutil/etcdtest"
	"github.com/stretchr/testify/require"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
)

// mirrorReader is the environment variable that makes the test's binary load keys, as a process of
// its own, because etcd in the test's process would be measured with it. Its value is the endpoint
// and the prefix.
const mirrorReader = "ETCDUTIL_TEST_MIRROR_READER"

// mirrorCost is what a mirror costs beside what a program would do by hand.
type mirrorCost struct {
	MapHeap, MirrorHeap uint64        // bytes
	Paged, Load         time.Duration // to read the keys page by page into a map, and to make a mirror
	MapGet, MirrorGet   time.Duration // of one key, by one goroutine and behind an RWMutex
	Keys                int
}

// measureMirror is the process. It reports a mirrorCost.
func measureMirror() error {
	var endpoint, prefix string
	if _, err := fmt.Sscan(os.Getenv(mirrorReader), &endpoint, &prefix); err != nil {
		return err
	}
	client, err := clientv3.New(clientv3.Config{Endpoints: []string{endpoint}, Logger: zap.NewNop()})
	if err != nil {
		return err
	}
	defer client.Close()
	var cost mirrorCost
	before := measure().Heap
	began := time.Now()
	byHand, err := readPages(client, prefix)
	if err != nil {
		return err
	}
	cost.Paged = time.Since(began)
	cost.MapHeap = measure().Heap - before
	keys := slices.Collect(maps.Keys(byHand))
	// The map finds its own keys faster, because they are the same in memory.
	for i, key := range keys {
		keys[i] = strings.Clone(key)
	}
	var mu sync.RWMutex
	cost.MapGet = timeGets(keys, func(key string) {
		mu.RLock()
		_ = byHand[key]
		mu.RUnlock()
	})
	runtime.KeepAlive(byHand)
	byHand = nil

	before = measure().Heap
	began = time.Now()
	m, err := NewMirror[string](context.Background(), client, prefix, WithPrefix(), WithCodec(Raw))
	if err != nil {
		return err
	}
	defer m.Close()
	cost.Load, cost.Keys = time.Since(began), m.Len()
	cost.MirrorHeap = measure().Heap - before
	cost.MirrorGet = timeGets(keys, func(key string) { _, _ = m.Get(key) })
	return json.NewEncoder(os.Stdout).Encode(cost)
}

// readPages reads all keys at one revision, a thousand at a time.
func readPages(client *clientv3.Client, prefix string) (map[string]string, error) {
	values := make(map[string]string)
	from, end := prefix, clientv3.GetPrefixRangeEnd(prefix)
	for rev := int64(0); ; {
		resp, err := client.Get(context.Background(), from, clientv3.WithRange(end), clientv3.WithLimit(1000), clientv3.WithRev(rev))
		if err != nil {
			return nil, err
		}
		rev = resp.Header.Revision
		for _, kv := range resp.Kvs {
			values[string(kv.Key)] = string(kv.Value)
		}
		if !resp.More {
			return values, nil
		}
		from = string(resp.Kvs[len(resp.Kvs)-1].Key) + "\x00"
	}
}

func timeGets(keys []string, get func(key string)) time.Duration {
	const gets = 2_000_000
	order := rand.Perm(len(keys))
	began := time.Now()
	for i := range gets {
		get(keys[order[i%len(order)]])
	}
	return time.Since(began) / gets
}

// mirrorCostOf measures in a process of its own, with so many keys of 100 bytes.
func mirrorCostOf(t testing.TB, keys int) mirrorCost {
	t.Helper()
	cluster := etcdtest.Start(t, 1)
	writer := cluster.Client(t)
	const perTxn = 100
	value := strings.Repeat("x", 100)
	for i := 0; i < keys; i += perTxn {
		ops := make([]clientv3.Op, perTxn)
		for j := range ops {
			ops[j] = clientv3.OpPut(fmt.Sprintf("mirror/%08d", i+j), value)
		}
		mustTxn(t, writer, ops...)
	}
	command := exec.CommandContext(t.Context(), os.Args[0])
	command.Env = append(os.Environ(), fmt.Sprint(mirrorReader, "=", cluster.Endpoints()[0], " mirror/"))
	command.Stderr = os.Stderr
	out, err := command.Output()
	require.NoError(t, err)
	var cost mirrorCost
	require.NoError(t, json.Unmarshal(out, &cost))
	require.Equal(t, keys, cost.Keys)
	return cost
}

func TestMirrorNeedsLittleMoreMemoryThanAMap(t *testing.T) {
	if underRace {
		return // the race detector takes memory itself
	}
	t.Parallel() // the process that is measured is another one
	cost := mirrorCostOf(t, 100_000)
	t.Logf("%+v", cost)
	require.Less(t, float64(cost.MirrorHeap), 1.5*float64(cost.MapHeap))
}

// BenchmarkMirror reports what a mirror of a million keys costs beside what a program would do by
// hand.
func BenchmarkMirror(b *testing.B) {
	cost := mirrorCostOf(b, 1_000_000)
	for b.Loop() {
		continue
	}
	b.ReportMetric(float64(cost.MirrorHeap)/float64(cost.MapHeap), "mirror/map-heap")
	b.ReportMetric(cost.Paged.Seconds()/cost.Load.Seconds(), "mirror/paged-rate")
	b.ReportMetric(cost.MirrorGet.Seconds()/cost.MapGet.Seconds(), "mirror/map-get")
	b.Logf("%+v", cost)
}
