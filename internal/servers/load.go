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
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
)

const (
	workers    = 4
	lockName   = "load/lock"
	counterKey = "load/counter"
	logName    = "load/log"
	// catchUp bounds how long watch and log reader may take to see the last write.
	catchUp = 20 * time.Second
)

// load is what uses the cluster: workers that increment a counter under a lock and log each
// increment, a lease, a watch of the counter and a reader of the log.
type load struct {
	clients []*clientv3.Client
	lease   *etcdutil.Lease
	counted atomic.Int64 // increments that were acknowledged
	lost    atomic.Int64 // locks that ended under their holder
}

// underLoad runs do while a load uses the endpoints, and returns what went wrong with either.
func underLoad(ctx context.Context, endpoints []string, do func(context.Context) error) (err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	l := &load{}
	defer l.close()
	if err := l.open(ctx, endpoints); err != nil {
		return err
	}
	var following, working sync.WaitGroup
	fail := func(err error) {
		if err != nil {
			cancel(err)
		}
	}
	following.Go(func() { fail(l.followCounter(ctx)) })
	following.Go(func() { fail(l.followLog(ctx)) })
	stopping := make(chan struct{})
	for i := range workers {
		working.Go(func() { fail(l.work(ctx, l.clients[i], stopping)) })
	}
	fail(do(ctx))
	close(stopping)
	working.Wait()
	if ctx.Err() == nil {
		fail(l.finish(ctx))
	}
	following.Wait()
	if err := context.Cause(ctx); err != nil {
		return err
	}
	fmt.Printf("   %d increments under the lock, %d locks lost\n", l.counted.Load(), l.lost.Load())
	return nil
}

// open makes the clients and what stays open: the last client's.
func (l *load) open(ctx context.Context, endpoints []string) error {
	for range workers + 1 {
		client, err := clientv3.New(clientv3.Config{
			Endpoints:            endpoints,
			DialTimeout:          5 * time.Second,
			DialKeepAliveTime:    10 * time.Second,
			DialKeepAliveTimeout: 5 * time.Second,
			Logger:               zap.NewNop(),
		})
		if err != nil {
			return err
		}
		l.clients = append(l.clients, client)
	}
	var err error
	l.lease, err = etcdutil.NewLease(ctx, l.last(), 10*time.Second)
	return err
}

func (l *load) last() *clientv3.Client { return l.clients[len(l.clients)-1] }

func (l *load) close() {
	if l.lease != nil {
		_ = l.lease.Close()
	}
	for _, client := range l.clients {
		_ = client.Close()
	}
}

// work increments the counter under the lock, again and again. A lock that is lost is no failure,
// but is counted.
func (l *load) work(ctx context.Context, client *clientv3.Client, stopping <-chan struct{}) error {
	for {
		select {
		case <-stopping:
			return nil
		case <-ctx.Done():
			return nil
		default:
		}
		lock, err := etcdutil.Acquire(ctx, client, lockName)
		if err != nil {
			return fmt.Errorf("a worker: %w", err)
		}
		err = l.increment(ctx, client, lock)
		err = errors.Join(err, lock.Close())
		switch {
		case errors.Is(err, etcdutil.ErrLockLost), errors.Is(err, etcdutil.ErrUnknownOutcome):
			l.lost.Add(1)
		case err != nil:
			return fmt.Errorf("a worker: %w", err)
		}
	}
}

// increment adds one to the counter, by a read and a fenced write, and writes the sum to the log.
func (l *load) increment(ctx context.Context, client *clientv3.Client, lock *etcdutil.Lock) error {
	writer, err := etcdutil.NewLogWriter[int64](lock, lock, logName)
	if err != nil {
		return err
	}
	counter, err := etcdutil.Retry(lock, func(ctx context.Context) (*clientv3.GetResponse, error) {
		return client.Get(ctx, counterKey)
	})
	if err != nil {
		return err
	}
	sum := int64(1)
	if len(counter.Kvs) > 0 {
		old, err := strconv.ParseInt(string(counter.Kvs[0].Value), 10, 64)
		if err != nil {
			return err
		}
		sum += old
	}
	if _, err := lock.Commit(ctx, clientv3.OpPut(counterKey, strconv.FormatInt(sum, 10))); err != nil {
		return err
	}
	if _, err := writer.Write(ctx, sum); err != nil {
		return err
	}
	l.counted.Add(1)
	return writer.Close()
}

// followCounter requires that a watch sends each increment once and in order, until it sees the
// end.
func (l *load) followCounter(ctx context.Context) error {
	watcher, err := etcdutil.Watch[int64](ctx, l.last(), counterKey, etcdutil.WithRevision(1))
	if err != nil {
		return fmt.Errorf("the watch: %w", err)
	}
	defer func() { _ = watcher.Close() }()
	for last := int64(0); ; last++ {
		event, open := <-watcher.Events()
		switch {
		case !open:
			return fmt.Errorf("the watch: %w", context.Cause(watcher))
		case event.Type == etcdutil.EventDelete:
			return nil
		case event.Value != last+1:
			return fmt.Errorf("the watch sent %d after %d", event.Value, last)
		}
	}
}

// followLog requires that a reader of every entry sees the sums grow, until it sees the end.
func (l *load) followLog(ctx context.Context) error {
	reader, err := etcdutil.NewLogReader[int64](ctx, l.last(), logName, etcdutil.WithEveryEntry(1))
	if err != nil {
		return fmt.Errorf("the log: %w", err)
	}
	defer func() { _ = reader.Close() }()
	for last, version := int64(0), int64(0); ; version++ {
		entry, err := reader.Read(ctx)
		switch {
		case err != nil:
			return fmt.Errorf("the log: %w", err)
		case entry.Value < 0:
			return nil
		case entry.Value <= last || entry.Version != version+1:
			return fmt.Errorf("the log has %d as version %d, after %d as %d", entry.Value, entry.Version, last, version)
		}
		last = entry.Value
	}
}

// finish checks the sum, and writes what the followers take for the end.
func (l *load) finish(ctx context.Context) error {
	if l.lease.Err() != nil {
		return fmt.Errorf("the lease: %w", context.Cause(l.lease))
	}
	return etcdutil.Do(ctx, l.last(), lockName, func(locked context.Context) error {
		lock, _ := etcdutil.LockFrom(locked)
		writer, err := etcdutil.NewLogWriter[int64](locked, lock, logName)
		if err != nil {
			return err
		}
		if _, err := writer.Write(locked, -1); err != nil {
			return err
		}
		counter, err := l.last().Get(locked, counterKey)
		if err != nil {
			return err
		}
		if len(counter.Kvs) == 0 || l.counted.Load() == 0 {
			return errors.New("the load did nothing")
		}
		sum, err := strconv.ParseInt(string(counter.Kvs[0].Value), 10, 64)
		if err != nil {
			return err
		}
		if counted := l.counted.Load(); sum < counted || sum > counted+l.lost.Load() {
			return fmt.Errorf("the counter is %d after %d increments and %d lost locks", sum, counted, l.lost.Load())
		}
		_, err = lock.Commit(locked, clientv3.OpDelete(counterKey))
		return err
	}, etcdutil.WithAcquireTimeout(catchUp))
}
