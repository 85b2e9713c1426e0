package etcdutil

import (
	"context"
	"encoding/json"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"example.com/etcdutil/etcdtest"
	"github.com/stretchr/testify/require"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
)

// Each benchmark runs etcdutil and client/v3/concurrency on the same server. Most run the two in
// turn, in blocks, so that both see the same noise. They report the median of each over the
// blocks, and the ratio of the medians. The others are sub-benchmarks: compare them by benchstat
// -col /lib.

// A locker acquires and releases a lock once, for one client.
type locker func(ctx context.Context) error

type library struct {
	name string
	// onSession returns lockers that share a lease. alone returns one that grants a lease for each
	// lock.
	onSession func(b *testing.B, client *clientv3.Client) func(name string) locker
	alone     func(client *clientv3.Client, name string) locker
}

var libraries = []library{
	{
		name: "etcdutil",
		onSession: func(b *testing.B, client *clientv3.Client) func(name string) locker {
			lease, err := NewLease(context.Background(), client, time.Minute)
			require.NoError(b, err)
			b.Cleanup(func() { _ = lease.Close() })
			return func(name string) locker {
				return func(ctx context.Context) error {
					lock, err := Acquire(ctx, client, name, WithLease(lease))
					if err != nil {
						return err
					}
					return lock.Close()
				}
			}
		},
		alone: func(client *clientv3.Client, name string) locker {
			return func(ctx context.Context) error {
				lock, err := Acquire(ctx, client, name, WithTTL(time.Minute))
				if err != nil {
					return err
				}
				return lock.Close()
			}
		},
	},
	{
		name: "concurrency",
		onSession: func(b *testing.B, client *clientv3.Client) func(name string) locker {
			session, err := concurrency.NewSession(client, concurrency.WithTTL(60))
			require.NoError(b, err)
			b.Cleanup(func() { _ = session.Close() })
			return func(name string) locker { return mutexLocker(session, name) }
		},
		alone: func(client *clientv3.Client, name string) locker {
			return func(ctx context.Context) error {
				session, err := concurrency.NewSession(client, concurrency.WithTTL(60))
				if err != nil {
					return err
				}
				if err := mutexLocker(session, name)(ctx); err != nil {
					return err
				}
				return session.Close()
			}
		},
	},
}

func mutexLocker(session *concurrency.Session, name string) locker {
	return func(ctx context.Context) error {
		mutex := concurrency.NewMutex(session, name)
		if err := mutex.Lock(ctx); err != nil {
			return err
		}
		return mutex.Unlock(ctx)
	}
}

// BenchmarkHandOver measures how long a contended lock takes to change hands. Holders release it
// at once.
func BenchmarkHandOver(b *testing.B) {
	cluster := etcdtest.Start(b, 1)
	for _, clients := range []int{2, 8} {
		for _, lib := range libraries {
			b.Run(fmt.Sprintf("clients=%d/lib=%s", clients, lib.name), func(b *testing.B) {
				name := fmt.Sprintf("%s-%d-%d", lib.name, clients, b.N)
				lockers := make([]locker, clients)
				for i := range lockers {
					lockers[i] = lib.onSession(b, cluster.Client(b))(name)
				}
				b.ResetTimer()
				shareOut(b, lockers, b.N)
			})
		}
	}
}

// shareOut runs the lockers concurrently until they have taken n turns in all.
func shareOut(b *testing.B, lockers []locker, n int) {
	turns := make(chan struct{}, n)
	for range n {
		turns <- struct{}{}
	}
	close(turns)
	var all sync.WaitGroup
	for _, l := range lockers {
		all.Go(func() {
			for range turns {
				if err := l(b.Context()); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	all.Wait()
}

// BenchmarkUncontendedSharedLease acquires and releases a lock on a shared lease.
func BenchmarkUncontendedSharedLease(b *testing.B) {
	client := etcdtest.Start(b, 1).Client(b)
	takeTurns(b, 25, func(lib library) func(n int) {
		return repeat(b, lib.onSession(b, client)(lib.name))
	})
}

// BenchmarkUncontendedOwnLease acquires and releases a lock with its own lease.
func BenchmarkUncontendedOwnLease(b *testing.B) {
	client := etcdtest.Start(b, 1).Client(b)
	takeTurns(b, 25, func(lib library) func(n int) {
		return repeat(b, lib.alone(client, lib.name))
	})
}

// BenchmarkParallel acquires and releases uncontended locks on 64 goroutines that share a client
// and a lease.
func BenchmarkParallel(b *testing.B) {
	client := etcdtest.Start(b, 1).Client(b)
	takeTurns(b, 1280, func(lib library) func(n int) {
		named := lib.onSession(b, client)
		lockers := make([]locker, 64)
		for i := range lockers {
			lockers[i] = named(fmt.Sprintf("%s-%d", lib.name, i))
		}
		return func(n int) { shareOut(b, lockers, n) }
	})
}

func repeat(b *testing.B, l locker) func(n int) {
	return func(n int) {
		for range n {
			require.NoError(b, l(b.Context()))
		}
	}
}

// takeTurns compares the two libraries in blocks of n operations.
func takeTurns(b *testing.B, n int, run func(lib library) func(n int)) {
	names, runs := make([]string, len(libraries)), make([]func(n int), len(libraries))
	for i, lib := range libraries {
		names[i], runs[i] = lib.name, run(lib)
	}
	compare(b, n, names, runs)
}

// compare runs two contestants in turn in blocks of n operations. It reports the median of each,
// and their ratio.
func compare(b *testing.B, n int, names []string, runs []func(n int)) {
	times := make([][]time.Duration, len(runs))
	b.ResetTimer()
	for done := 0; done < b.N; done += n {
		for i, run := range runs {
			start := time.Now()
			run(n)
			times[i] = append(times[i], time.Since(start)/time.Duration(n))
		}
	}
	b.ReportMetric(0, "ns/op") // hidden: it would be the sum of both contestants
	for i, name := range names {
		b.ReportMetric(float64(median(times[i]).Nanoseconds())/1000, name+"-µs/op")
	}
	b.ReportMetric(float64(median(times[0]))/float64(median(times[1])), "ratio")
}

func median(times []time.Duration) time.Duration {
	slices.Sort(times)
	return times[len(times)/2]
}

// BenchmarkWatch measures live events: puts by another client, received as structs decoded from
// JSON. It compares a Watcher with a loop over clientv3.Watch and json.Unmarshal. A block is a
// burst of puts, and ends when the last event is received.
func BenchmarkWatch(b *testing.B) {
	const burst = 500
	cluster := etcdtest.Start(b, 1)
	watched, writer := cluster.Client(b), cluster.Client(b)
	type setting struct {
		Name string
		Size int
		Tags []string
	}
	value, err := json.Marshal(setting{"a name of some length", 12345, []string{"one", "two", "three"}})
	require.NoError(b, err)

	typed, err := Watch[setting](b.Context(), watched, "typed/", WithPrefix())
	require.NoError(b, err)
	bare := make(chan setting)
	go func() { // until the benchmark ends
		for resp := range watched.Watch(b.Context(), "bare/", clientv3.WithPrefix()) {
			for _, e := range resp.Events {
				var s setting
				if err := json.Unmarshal(e.Kv.Value, &s); err != nil {
					panic(err)
				}
				bare <- s
			}
		}
	}()
	round := func(prefix string, receive func()) func(n int) {
		return func(n int) {
			var writing sync.WaitGroup
			writing.Go(func() { write(b, writer, prefix, string(value), n) })
			for range n {
				receive()
			}
			writing.Wait()
		}
	}
	compare(b, burst, []string{"etcdutil", "clientv3"}, []func(n int){
		round("typed/", func() { <-typed.Events() }),
		round("bare/", func() { <-bare }),
	})
	require.NoError(b, typed.Close())
}

// write puts n keys in transactions of 100.
func write(b *testing.B, client *clientv3.Client, prefix, value string, n int) {
	for done := 0; done < n; {
		var ops []clientv3.Op
		for ; done < n && len(ops) < 100; done++ {
			ops = append(ops, clientv3.OpPut(fmt.Sprint(prefix, done), value))
		}
		if _, err := client.Txn(b.Context()).Then(ops...).Commit(); err != nil {
			b.Error(err)
		}
	}
}

// BenchmarkFollowedKey measures the memory of a watcher with a snapshot, per key of 100 bytes,
// without the server's.
func BenchmarkFollowedKey(b *testing.B) {
	const keys = 20_000
	cluster := etcdtest.Start(b, 1)
	client := cluster.Client(b)
	write(b, client, "followed/", fmt.Sprintf("%q", strings.Repeat("x", 98)), keys)
	for _, opts := range [][]WatchOption{{WithPrefix(), WithSnapshot()}, {WithPrefix(), WithSnapshot(), WithPrev()}} {
		b.Run(fmt.Sprintf("prev=%t", len(opts) == 3), func(b *testing.B) {
			var w *Watcher[string]
			reportCost(b, keys, func() {
				var err error
				w, err = Watch[string](b.Context(), client, "followed/", opts...)
				require.NoError(b, err)
				for e := range w.Events() {
					if e.Type == EventSynced {
						return
					}
				}
			})
			require.NoError(b, w.Close())
		})
	}
}

// BenchmarkLogWrite compares a fenced log entry with a bare put in a transaction that compares
// nothing.
func BenchmarkLogWrite(b *testing.B) {
	client := etcdtest.Start(b, 1).Client(b)
	lock, err := Acquire(b.Context(), client, "log", WithTTL(time.Minute))
	require.NoError(b, err)
	log, err := NewLogWriter[string](b.Context(), lock, "entries", WithCodec(Raw))
	require.NoError(b, err)
	value := strings.Repeat("x", 100)
	compare(b, 50, []string{"etcdutil", "clientv3"}, []func(n int){
		func(n int) {
			for range n {
				_, err := log.Write(b.Context(), value)
				require.NoError(b, err)
			}
		},
		func(n int) {
			for range n {
				_, err := client.Txn(b.Context()).Then(clientv3.OpPut("bare", value)).Commit()
				require.NoError(b, err)
			}
		},
	})
	require.NoError(b, lock.Close())
}

// BenchmarkHeldLock measures the memory and goroutines of a held lock on a shared lease, once its
// key is watched.
func BenchmarkHeldLock(b *testing.B) {
	const locks = 1000
	client := etcdtest.Start(b, 1).Client(b)
	lease, err := NewLease(b.Context(), client, time.Minute)
	require.NoError(b, err)
	held := make([]*Lock, locks)
	reportCost(b, locks, func() {
		for i := range held {
			held[i], err = Acquire(b.Context(), client, fmt.Sprint("held-", i), WithLease(lease))
			require.NoError(b, err)
		}
		time.Sleep(time.Second) // until the watches stand
	})
	for _, l := range held {
		require.NoError(b, l.Close())
	}
	require.NoError(b, lease.Close())
}

// BenchmarkKeptLease measures the memory and goroutines of a lease that is kept alive, one of
// 1,000 on a client.
func BenchmarkKeptLease(b *testing.B) {
	const leases = 1000
	cluster := etcdtest.Start(b, 1)
	b.Run("lib=etcdutil", func(b *testing.B) {
		client := cluster.Client(b)
		kept := make([]*Lease, leases)
		reportCost(b, leases, func() {
			var err error
			for i := range kept {
				kept[i], err = NewLease(b.Context(), client, 10*time.Second, WithKeepAliveInterval(time.Second))
				require.NoError(b, err)
			}
			time.Sleep(2 * time.Second) // until each has been renewed
		})
		for _, l := range kept {
			require.NoError(b, l.Close())
		}
	})
	b.Run("lib=clientv3", func(b *testing.B) {
		client := cluster.Client(b)
		kept := make([]<-chan *clientv3.LeaseKeepAliveResponse, leases)
		ctx, cancel := context.WithCancel(b.Context())
		defer cancel()
		reportCost(b, leases, func() {
			for i := range kept {
				lease, err := client.Grant(ctx, 10)
				require.NoError(b, err)
				kept[i], err = client.KeepAlive(ctx, lease.ID)
				require.NoError(b, err)
			}
			for _, answers := range kept {
				<-answers
			}
		})
		runtime.KeepAlive(kept)
	})
}

// reportCost calls hold, which makes n resources, and reports the heap, stacks and goroutines
// that each adds to the process. The in-process server's part is included.
func reportCost(b *testing.B, n int, hold func()) {
	before, goroutines := inUse()
	hold()
	after, goroutinesAfter := inUse()
	each := func(before, after uint64) float64 { return (float64(after) - float64(before)) / float64(n) }
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(each(before.HeapAlloc, after.HeapAlloc), "heap-B/each")
	b.ReportMetric(each(before.StackInuse, after.StackInuse), "stack-B/each")
	b.ReportMetric(float64(goroutinesAfter-goroutines)/float64(n), "goroutines/each")
}

func inUse() (m runtime.MemStats, goroutines int) {
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&m)
	return m, runtime.NumGoroutine()
}
