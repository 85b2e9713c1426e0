package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"example.com/etcdutil"
	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
	"google.golang.org/grpc"
)

const manyLocksHeld, holdFor = 3000, 5 * time.Second

// holdMany acquires locks of different names by a few goroutines, and returns a function that
// releases them.
func holdMany(ctx context.Context, n int, acquire func(ctx context.Context, name string) (release func() error, err error)) (func() error, error) {
	releases := make([]func() error, n)
	if err := byMany(n, func(i int) (err error) {
		releases[i], err = acquire(ctx, "held/"+strconv.Itoa(i))
		return err
	}); err != nil {
		return nil, err
	}
	return func() error { return byMany(n, func(i int) error { return releases[i]() }) }, nil
}

// byMany calls f for 0 to n-1 on several goroutines.
func byMany(n int, f func(i int) error) error {
	const workers = 64
	errs := make([]error, workers)
	var done sync.WaitGroup
	for w := range workers {
		done.Go(func() {
			for i := w; i < n && errs[w] == nil; i += workers {
				errs[w] = f(i)
			}
		})
	}
	done.Wait()
	return errors.Join(errs...)
}

func acquireOn(client *clientv3.Client, lease *etcdutil.Lease) func(context.Context, string) (func() error, error) {
	return func(ctx context.Context, name string) (func() error, error) {
		lock, err := etcdutil.Acquire(ctx, client, name, etcdutil.WithLease(lease))
		if err != nil {
			return nil, err
		}
		return lock.Close, nil
	}
}

func lockOn(session *concurrency.Session) func(context.Context, string) (func() error, error) {
	return func(ctx context.Context, name string) (func() error, error) {
		m := concurrency.NewMutex(session, name)
		if err := m.Lock(ctx); err != nil {
			return nil, err
		}
		return func() error { return m.Unlock(context.WithoutCancel(ctx)) }, nil
	}
}

func heldLocks(ctx context.Context, r *run) error {
	client, lease, err := r.leased(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = client.Close() }()
	// What the client's first locks cost, and the runtime's spare goroutines, is not counted.
	release, err := holdMany(ctx, 200, acquireOn(client, lease))
	if err != nil {
		return err
	}
	if err := release(); err != nil {
		return err
	}
	before, beforeServer, err := r.used()
	if err != nil {
		return err
	}
	release, err = holdMany(ctx, manyLocksHeld, acquireOn(client, lease))
	if err != nil {
		return err
	}
	time.Sleep(holdFor)
	now, nowServer, err := r.used()
	if err != nil {
		return err
	}
	held, heldServer := now.since(before), nowServer.since(beforeServer)
	r.printf("a held lock on a shared lease (%d held for %v): client %.2f KB and %.3f goroutines, server %.2f KB", manyLocksHeld, holdFor,
		float64(held.Memory)/manyLocksHeld/1024, float64(held.Goroutines)/manyLocksHeld, float64(heldServer.Memory)/manyLocksHeld/1024)
	return release()
}

// leased returns a client and a lease on it, which ends with the client.
func (r *run) leased(ctx context.Context) (*clientv3.Client, *etcdutil.Lease, error) {
	client, err := r.client()
	if err != nil {
		return nil, nil, err
	}
	lease, err := etcdutil.NewLease(ctx, client, time.Minute)
	return client, lease, err
}

// manyLocks compares how long it takes to acquire and release locks that are held together.
func manyLocks(ctx context.Context, r *run) error {
	const rounds = 5
	client, lease, err := r.leased(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = client.Close() }()
	session, err := concurrency.NewSession(client, concurrency.WithTTL(60))
	if err != nil {
		return err
	}
	var ours, theirs []float64
	for range rounds {
		for times, acquire := range map[*[]float64]func(context.Context, string) (func() error, error){
			&ours: acquireOn(client, lease), &theirs: lockOn(session),
		} {
			start := time.Now()
			release, err := holdMany(ctx, manyLocksHeld, acquire)
			if err != nil {
				return err
			}
			time.Sleep(holdFor)
			if err := release(); err != nil {
				return err
			}
			*times = append(*times, (time.Since(start) - holdFor).Seconds())
		}
	}
	r.printf("%d locks acquired, held together for %v, released: etcdutil %.2f s, concurrency %.2f s: %.2f times", manyLocksHeld, holdFor,
		median(ours), median(theirs), median(ours)/median(theirs))
	return nil
}

func idleWaiters(ctx context.Context, r *run) error {
	const waiters, watched = 1000, 15 * time.Second
	var calls atomic.Int64
	client, err := r.client(func(c *clientv3.Config) {
		c.DialOptions = append(c.DialOptions, grpc.WithChainUnaryInterceptor(
			func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
				calls.Add(1)
				return invoke(ctx, method, req, reply, cc, opts...)
			}))
	})
	if err != nil {
		return err
	}
	defer func() { _ = client.Close() }()
	lease, err := etcdutil.NewLease(ctx, client, time.Minute)
	if err != nil {
		return err
	}
	lock, err := etcdutil.Acquire(ctx, client, "waited", etcdutil.WithLease(lease))
	if err != nil {
		return err
	}
	waiting, cancel := context.WithCancel(ctx)
	var done sync.WaitGroup
	for range waiters {
		done.Go(func() { _, _ = etcdutil.Acquire(waiting, client, "waited", etcdutil.WithLease(lease)) })
	}
	if err := until(ctx, func() bool {
		n, err := client.Get(ctx, "waited/", clientv3.WithPrefix(), clientv3.WithCountOnly())
		time.Sleep(100 * time.Millisecond)
		return err != nil || n.Count == waiters+1
	}); err != nil {
		cancel()
		return err
	}
	time.Sleep(3 * time.Second)
	before := calls.Load()
	time.Sleep(watched)
	r.printf("%d waiters for %v while nothing happens: %d requests", waiters, watched, calls.Load()-before)
	cancel()
	done.Wait()
	return lock.Close()
}

func deletedKey(ctx context.Context, r *run) error {
	const locks = 200
	client, lease, err := r.leased(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = client.Close() }()
	admin, err := r.client()
	if err != nil {
		return err
	}
	defer func() { _ = admin.Close() }()
	held := make([]*etcdutil.Lock, locks)
	for i := range held {
		if held[i], err = etcdutil.Acquire(ctx, client, "deleted/"+strconv.Itoa(i), etcdutil.WithLease(lease)); err != nil {
			return err
		}
	}
	time.Sleep(time.Second)
	var times []float64
	for _, lock := range held {
		deleted := make(chan time.Time, 1)
		go func() {
			_, _ = admin.Delete(ctx, lock.Key())
			deleted <- time.Now()
		}()
		select {
		case <-lock.Done():
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		now := time.Now()
		times = append(times, max(now.Sub(<-deleted), 0).Seconds()*1000)
	}
	r.printf("a lock's key is deleted, held for 1 s: told after the answer to the delete: median %.2f ms", median(times))
	return nil
}

// A contestant takes a lock and gives it back.
type contestant func(ctx context.Context) error

// handOver compares how fast a contended lock changes hands with the least that a client can do.
func handOver(ctx context.Context, r *run) error {
	for _, clients := range []int{2, 8} {
		if err := r.handOverBetween(ctx, clients); err != nil {
			return err
		}
	}
	return nil
}

func (r *run) handOverBetween(ctx context.Context, n int) error {
	const rounds, turns = 7, 2000
	var ours, theirs []contestant
	for i := range n {
		client, lease, err := r.leased(ctx)
		if err != nil {
			return err
		}
		defer func() { _ = client.Close() }()
		ours = append(ours, func(ctx context.Context) error {
			lock, err := etcdutil.Acquire(ctx, client, fmt.Sprint("ours/", n), etcdutil.WithLease(lease))
			if err != nil {
				return err
			}
			return lock.Close()
		})
		key := fmt.Sprint("floor/", n, "/", i)
		theirs = append(theirs, func(ctx context.Context) error {
			return lockByHand(ctx, client, lease.ID(), fmt.Sprint("floor/", n, "/"), key)
		})
	}
	var a, b []float64
	for range rounds {
		for times, contestants := range map[*[]float64][]contestant{&a: ours, &b: theirs} {
			d, err := takeTurns(ctx, contestants, turns/n)
			if err != nil {
				return err
			}
			*times = append(*times, float64(d.Microseconds())/turns)
		}
	}
	r.printf("a lock changes hands between %d clients: etcdutil %.0f µs, the floor by hand %.0f µs: %.2f times", n, median(a), median(b),
		median(a)/median(b))
	return nil
}

func takeTurns(ctx context.Context, contestants []contestant, each int) (time.Duration, error) {
	errs := make([]error, len(contestants))
	start := time.Now()
	var done sync.WaitGroup
	for i, c := range contestants {
		done.Go(func() {
			for turn := 0; turn < each && errs[i] == nil; turn++ {
				errs[i] = c(ctx)
			}
		})
	}
	done.Wait()
	return time.Since(start), errors.Join(errs...)
}

// lockByHand is a queue with nothing but its purpose: a key for each client, a watch of the one
// before, and no check of anything.
func lockByHand(ctx context.Context, client *clientv3.Client, lease clientv3.LeaseID, prefix, key string) error {
	put, err := client.Put(ctx, key, "", clientv3.WithLease(lease))
	if err != nil {
		return err
	}
	rev := put.Header.Revision
	for {
		before, err := client.Get(ctx, prefix, append(clientv3.WithLastCreate(), clientv3.WithMaxCreateRev(rev-1))...)
		if err != nil {
			return err
		}
		if len(before.Kvs) == 0 {
			break
		}
		if err := waitDeleted(ctx, client, string(before.Kvs[0].Key), before.Kvs[0].CreateRevision); err != nil {
			return err
		}
	}
	_, err = client.Delete(ctx, key)
	return err
}

// waitDeleted watches from now on, and reads once, because etcd serves a watch that begins in the
// past only every 100 ms.
func waitDeleted(ctx context.Context, client *clientv3.Client, key string, created int64) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	watch := client.Watch(ctx, key, clientv3.WithCreatedNotify(), clientv3.WithFilterPut())
	if _, ok := <-watch; !ok {
		return context.Cause(ctx)
	}
	now, err := client.Get(ctx, key)
	if err != nil {
		return err
	}
	if len(now.Kvs) == 0 || now.Kvs[0].CreateRevision != created {
		return nil
	}
	for resp := range watch {
		for _, e := range resp.Events {
			if e.Type == mvccpb.DELETE {
				return nil
			}
		}
	}
	return context.Cause(ctx)
}
