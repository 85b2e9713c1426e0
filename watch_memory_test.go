package etcdutil

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"example.com/etcdutil/etcdtest"
	"github.com/stretchr/testify/require"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
)

// slowReader is the environment variable that makes the test's binary a slow reader, a process of
// its own, since etcd in the test's process would be measured with it. Its value is the endpoint,
// the prefix and whether it wants a snapshot.
const slowReader = "ETCDUTIL_TEST_SLOW_READER"

// footprint is what a slow reader reports, in bytes.
type footprint struct {
	Heap uint64 // what is left of it after a collection
	Sys  uint64 // the most that the process has had from the system so far, but for its code
	RSS  uint64 // the most that was resident; 0 if that is not known
}

func measure() footprint {
	runtime.GC()
	runtime.GC() // what lies in a sync.Pool outlives the first
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	f := footprint{Heap: m.HeapAlloc, Sys: m.Sys}
	status, _ := os.ReadFile("/proc/self/status") // Linux has it
	for line := range strings.Lines(string(status)) {
		if fields := strings.Fields(line); fields[0] == "VmHWM:" {
			kilobytes, _ := strconv.ParseUint(fields[1], 10, 64)
			f.RSS = kilobytes << 10
		}
	}
	return f
}

// readSlowly is the process. It watches, reports, sleeps until it reads the last
// revision, reports, reads up to that revision, and reports, at last with what it has read.
func readSlowly() error {
	var endpoint, prefix string
	var snapshot bool
	if _, err := fmt.Sscan(os.Getenv(slowReader), &endpoint, &prefix, &snapshot); err != nil {
		return err
	}
	client, err := clientv3.New(clientv3.Config{Endpoints: []string{endpoint}, Logger: zap.NewNop()})
	if err != nil {
		return err
	}
	defer client.Close()
	opts := []WatchOption{WithPrefix(), WithCodec(Raw)}
	if snapshot {
		opts = append(opts, WithSnapshot())
	}
	w, err := Watch[string](context.Background(), client, prefix, opts...)
	if err != nil {
		return err
	}
	defer w.Close()
	if snapshot {
		<-w.Events() // EventSynced
	}
	out := json.NewEncoder(os.Stdout)
	if err := out.Encode(measure()); err != nil {
		return err
	}
	var last Revision
	if _, err := fmt.Scan(&last); err != nil {
		return err
	}
	if err := out.Encode(measure()); err != nil {
		return err
	}
	read := make(map[string]int) // the lengths of the values
	var events, unordered int
	var before Revision
	for w.Revision() < last {
		select {
		case e, ok := <-w.Events():
			switch {
			case !ok:
				return context.Cause(w)
			case e.Type == EventPut:
				events++
				read[e.Key] = len(e.Value)
			}
			if e.Revision < before {
				unordered++
			}
			before = e.Revision
		case <-time.After(10 * time.Millisecond):
		}
	}
	if err := out.Encode(measure()); err != nil {
		return err
	}
	return out.Encode(drained{Events: events, Unordered: unordered, Read: read})
}

type drained struct {
	Events, Unordered int
	Read              map[string]int
}

func TestWatchKeepsItsMemoryBoundedWhileItsReaderSleeps(t *testing.T) {
	if underRace {
		t.Skip("the race detector takes memory itself")
	}
	t.Parallel()
	for _, test := range []struct {
		values, size, perTxn int
	}{
		{120, 1_000_000, 1},
		{60_000, 2_000, 40},
	} {
		t.Run(fmt.Sprintf("%d values of %d bytes", test.values, test.size), func(t *testing.T) {
			t.Parallel()
			cluster := etcdtest.Start(t, 1)
			writer, prefix := cluster.Client(t), nameOf(t)[:4]+"/"
			plain := startSlowReader(t, cluster.Endpoints()[0], prefix, false)
			follower := startSlowReader(t, cluster.Endpoints()[0], prefix, true)
			begin := map[*process]footprint{plain: report[footprint](t, plain), follower: report[footprint](t, follower)}

			value := string(bytes.Repeat([]byte("x"), test.size))
			want := map[string]int{}
			var last Revision
			for i := 0; i < test.values; i += test.perTxn {
				ops := make([]clientv3.Op, test.perTxn)
				for j := range ops {
					key := fmt.Sprint(prefix, i+j)
					ops[j] = clientv3.OpPut(key, value)
					want[key] = test.size
				}
				last = mustTxn(t, writer, ops...)
			}
			for p, name := range map[*process]string{plain: "plain", follower: "with snapshot"} {
				_, err := fmt.Fprintln(p.in, last)
				require.NoError(t, err)
				asleep, awake := report[footprint](t, p), report[footprint](t, p)
				got := report[drained](t, p)
				require.Equal(t, want, got.Read)
				require.Equal(t, test.values, got.Events, "each once, since none was overwritten")
				if p == plain {
					require.Zero(t, got.Unordered)
				}
				const limit = 32 << 20
				require.Less(t, asleep.Heap, begin[p].Heap+limit)
				require.Less(t, asleep.Sys, begin[p].Sys+limit)
				if asleep.RSS > 0 {
					require.Less(t, asleep.RSS, begin[p].RSS+limit)
				}
				require.Less(t, awake.Sys, begin[p].Sys+2*limit, "nor is what etcd sends at once, up to a thousand revisions, taken at once")
				mb := func(after, before uint64) float64 { return (float64(after) - float64(before)) / (1 << 20) }
				t.Logf("%s: asleep: heap +%.1f MB, sys +%.1f MB, resident +%.1f MB; awake: heap +%.1f MB, sys +%.1f MB, resident +%.1f MB", name,
					mb(asleep.Heap, begin[p].Heap), mb(asleep.Sys, begin[p].Sys), mb(asleep.RSS, begin[p].RSS),
					mb(awake.Heap, begin[p].Heap), mb(awake.Sys, begin[p].Sys), mb(awake.RSS, begin[p].RSS))
			}
		})
	}
}

// process is a slow reader.
type process struct {
	in  io.Writer
	out *bufio.Reader
}

func startSlowReader(t *testing.T, endpoint, prefix string, snapshot bool) *process {
	t.Helper()
	command := exec.CommandContext(t.Context(), os.Args[0])
	command.Env = append(os.Environ(), fmt.Sprint(slowReader, "=", endpoint, " ", prefix, " ", snapshot))
	command.Stderr = os.Stderr
	in, err := command.StdinPipe()
	require.NoError(t, err)
	out, err := command.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, command.Start())
	t.Cleanup(func() { _ = command.Wait() }) // the test's context has ended, and the process with it
	return &process{in, bufio.NewReader(out)}
}

// report is a process's next.
func report[T any](t *testing.T, p *process) (v T) {
	t.Helper()
	line, err := p.out.ReadBytes('\n')
	require.NoError(t, err)
	require.NoError(t, json.Unmarshal(line, &v))
	return v
}
