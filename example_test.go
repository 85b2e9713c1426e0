package etcdutil_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

	"example.com/etcdutil"
	"example.com/etcdutil/etcdtest"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
)

// exampleClient returns the client of all examples. Its etcd runs in this process.
var exampleClient = sync.OnceValue(func() *clientv3.Client {
	cluster, err := etcdtest.New(1)
	if err != nil {
		panic(err)
	}
	client, err := clientv3.New(clientv3.Config{Endpoints: cluster.Endpoints(), Logger: zap.NewNop()})
	if err != nil {
		panic(err)
	}
	etcdutil.AtExit(func() {
		_ = client.Close()
		_ = cluster.Close()
	})
	return client
})

func ExampleNewLease() {
	ctx, client := context.Background(), exampleClient()

	lease, err := etcdutil.NewLease(ctx, client, 5*time.Second)
	if err != nil {
		fmt.Println(err)
		return
	}
	// The key exists for as long as this process keeps the lease.
	_, err = client.Put(lease, "members/a", "10.0.0.1:8080", clientv3.WithLease(lease.ID()))
	fmt.Println("registered:", err == nil, lease.TTL())

	fmt.Println("closed:", lease.Close() == nil, context.Cause(lease))
	resp, err := client.Get(ctx, "members/a")
	fmt.Println("keys left:", len(resp.Kvs), err)
	// Output:
	// registered: true 5s
	// closed: true etcdutil: closed
	// keys left: 0 <nil>
}

// The context ends before the server can delete the lease's keys.
func ExampleLease_Expiry() {
	client := exampleClient()

	before := time.Now()
	lease, err := etcdutil.NewLease(context.Background(), client, 10*time.Second)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer lease.Close()

	fmt.Println("a second of margin:", lease.Expiry().Sub(before).Truncate(time.Second) == 9*time.Second)
	// Output: a second of margin: true
}

// Alive asks the server. The context reports only what the client has noticed.
func ExampleLease_Alive() {
	ctx, client := context.Background(), exampleClient()

	lease, err := etcdutil.NewLease(ctx, client, 10*time.Second)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer lease.Close()
	fmt.Println(lease.Alive(ctx))

	_, err = client.Revoke(ctx, lease.ID()) // by an operator
	fmt.Println(err)
	fmt.Println(lease.Alive(ctx))
	// Output:
	// true <nil>
	// <nil>
	// false <nil>
}

func ExampleWithKeepAliveInterval() {
	client := exampleClient()

	_, err := etcdutil.NewLease(context.Background(), client, 10*time.Second, etcdutil.WithKeepAliveInterval(time.Minute))
	fmt.Println(err)
	// Output: etcdutil: WithKeepAliveInterval must be positive and less than the TTL of 10s: 1m0s
}

// A lease that is not renewed expires.
func ExampleWithMaxKeepAlives() {
	client := exampleClient()

	lease, err := etcdutil.NewLease(context.Background(), client, 2*time.Second,
		etcdutil.WithMaxKeepAlives(0),
		etcdutil.WithExpiryMargin(1900*time.Millisecond))
	if err != nil {
		fmt.Println(err)
		return
	}
	<-lease.Done()
	fmt.Println(context.Cause(lease))
	fmt.Println(lease.Close())
	// Output:
	// etcdutil: lease expired
	// etcdutil: lease expired
}

// Work must stop within the margin.
func ExampleWithExpiryMargin() {
	client := exampleClient()

	before := time.Now()
	lease, err := etcdutil.NewLease(context.Background(), client, 10*time.Second, etcdutil.WithExpiryMargin(4*time.Second))
	if err != nil {
		fmt.Println(err)
		return
	}
	defer lease.Close()

	fmt.Println("four seconds of margin:", lease.Expiry().Sub(before).Truncate(time.Second) == 6*time.Second)
	// Output: four seconds of margin: true
}

func ExampleAcquire() {
	ctx, client := context.Background(), exampleClient()

	lock, err := etcdutil.Acquire(ctx, client, "jobs/nightly")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer lock.Close()

	// The lock is a context: work under it is canceled when the lock is lost.
	_, err = client.Put(lock, "jobs/state", "running")
	fmt.Println(lock.Name(), err)
	// Output: jobs/nightly <nil>
}

func ExampleTryAcquire() {
	ctx, client := context.Background(), exampleClient()

	lock, err := etcdutil.TryAcquire(ctx, client, "jobs/hourly")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer lock.Close()

	_, err = etcdutil.TryAcquire(ctx, client, "jobs/hourly")
	fmt.Println("held:", errors.Is(err, etcdutil.ErrLockHeld))
	// Output: held: true
}

func ExampleDo() {
	ctx, client := context.Background(), exampleClient()

	err := etcdutil.Do(ctx, client, "jobs/weekly", func(ctx context.Context) error {
		_, err := client.Put(ctx, "jobs/weekly-state", "done") // ctx ends when the lock is lost
		return err
	})
	fmt.Println(err)
	// Output: <nil>
}

// Code that runs under a lock finds it in its context, and can fence its writes.
func ExampleLockFrom() {
	ctx, client := context.Background(), exampleClient()

	save := func(ctx context.Context, state string) error {
		lock, ok := etcdutil.LockFrom(ctx)
		if !ok {
			return errors.New("not under a lock")
		}
		_, err := lock.Commit(ctx, clientv3.OpPut("jobs/monthly-state", state))
		return err
	}

	fmt.Println(save(ctx, "done"))
	fmt.Println(etcdutil.Do(ctx, client, "jobs/monthly", func(ctx context.Context) error {
		return save(ctx, "done")
	}))
	// Output:
	// not under a lock
	// <nil>
}

// Do reports a loss, whatever the function returns.
func ExampleLock_Do() {
	ctx, client := context.Background(), exampleClient()

	lock, err := etcdutil.Acquire(ctx, client, "reports")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer lock.Close()

	err = lock.Do(ctx, func(ctx context.Context) error {
		if _, err := client.Delete(ctx, lock.Key()); err != nil { // by an operator
			return err
		}
		<-ctx.Done() // the work is canceled
		return nil
	})
	fmt.Println(errors.Is(err, etcdutil.ErrLockLost))
	// Output: true
}

func ExampleLock_Commit() {
	ctx, client := context.Background(), exampleClient()

	lock, err := etcdutil.Acquire(ctx, client, "balance/lock")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer lock.Close()

	_, err = lock.Commit(ctx, clientv3.OpPut("balance/alice", "90"), clientv3.OpPut("balance/bob", "110"))
	fmt.Println("both written:", err == nil)

	if _, err := client.Delete(ctx, lock.Key()); err != nil { // by an operator
		fmt.Println(err)
	}
	_, err = lock.Commit(ctx, clientv3.OpPut("balance/alice", "0"))
	fmt.Println("refused:", errors.Is(err, etcdutil.ErrLockLost))
	resp, err := client.Get(ctx, "balance/alice")
	fmt.Println(string(resp.Kvs[0].Value), err)
	// Output:
	// both written: true
	// refused: true
	// 90 <nil>
}

func ExampleLock_CommitIf() {
	ctx, client := context.Background(), exampleClient()

	lock, err := etcdutil.Acquire(ctx, client, "jobs/7/lock")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer lock.Close()

	isNew := []clientv3.Cmp{clientv3.Compare(clientv3.CreateRevision("jobs/7/state"), "=", 0)}
	for range 2 {
		_, err := lock.CommitIf(ctx, isNew, clientv3.OpPut("jobs/7/state", "begun"))
		fmt.Println("begun before:", errors.Is(err, etcdutil.ErrConditionFailed))
	}
	fmt.Println("still held:", lock.Err() == nil)
	// Output:
	// begun before: false
	// begun before: true
	// still held: true
}

// IsOwner guards a transaction that has conditions of its own.
func ExampleLock_IsOwner() {
	ctx, client := context.Background(), exampleClient()

	lock, err := etcdutil.Acquire(ctx, client, "config/lock")
	if err != nil {
		fmt.Println(err)
		return
	}
	write := func() {
		resp, err := client.Txn(ctx).
			If(lock.IsOwner(), clientv3.Compare(clientv3.Version("config/frozen"), "=", 0)).
			Then(clientv3.OpPut("config/limit", "10")).
			Commit()
		fmt.Println("written:", resp.Succeeded, err)
	}

	write()
	fmt.Println(lock.Close())
	write()
	// Output:
	// written: true <nil>
	// <nil>
	// written: false <nil>
}

// A store that is not etcd refuses a token smaller than one that it has seen.
func ExampleLock_Token() {
	ctx, client := context.Background(), exampleClient()

	var seen etcdutil.Revision
	for range 2 {
		err := etcdutil.Do(ctx, client, "blobs", func(ctx context.Context) error {
			lock, _ := etcdutil.LockFrom(ctx)
			fmt.Println("greater:", lock.Token() > seen)
			seen = lock.Token()
			return nil
		})
		if err != nil {
			fmt.Println(err)
		}
	}
	// Output:
	// greater: true
	// greater: true
}

// Alive asks the server. The context reports only what the client has noticed.
func ExampleLock_Alive() {
	ctx, client := context.Background(), exampleClient()

	lock, err := etcdutil.Acquire(ctx, client, "cache")
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(lock.Alive(ctx))
	fmt.Println(lock.Close())
	fmt.Println(lock.Alive(ctx))
	// Output:
	// true <nil>
	// <nil>
	// false <nil>
}

// Close reports whether the lock was held to the end.
func ExampleLock_Close() {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	lock, err := etcdutil.Acquire(ctx, exampleClient(), "uploads")
	if err != nil {
		fmt.Println(err)
		return
	}

	cancel() // the context ends, but the lock is held until Close, so that work can wind down
	fmt.Println(context.Cause(lock))
	fmt.Println(lock.Close())
	// Output:
	// context canceled
	// <nil>
}

func ExampleWithTTL() {
	lock, err := etcdutil.Acquire(context.Background(), exampleClient(), "slow-to-fail-over", etcdutil.WithTTL(30*time.Second))
	if err != nil {
		fmt.Println(err)
		return
	}
	defer lock.Close()
	fmt.Println(lock.Lease().TTL())
	// Output: 30s
}

// Many locks on one lease share its renewals.
func ExampleWithLease() {
	ctx, client := context.Background(), exampleClient()

	lease, err := etcdutil.NewLease(ctx, client, 10*time.Second)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer lease.Close()

	for _, shard := range []string{"shards/0", "shards/1"} {
		lock, err := etcdutil.Acquire(ctx, client, shard, etcdutil.WithLease(lease))
		if err != nil {
			fmt.Println(err)
			return
		}
		fmt.Println(lock.Name(), lock.Close()) // the lease lives on
	}
	fmt.Println(lease.Alive(ctx))
	// Output:
	// shards/0 <nil>
	// shards/1 <nil>
	// true <nil>
}

// The value shows other processes who holds the lock.
func ExampleWithValue() {
	ctx, client := context.Background(), exampleClient()

	lock, err := etcdutil.Acquire(ctx, client, "primary", etcdutil.WithValue("host-a"))
	if err != nil {
		fmt.Println(err)
		return
	}
	defer lock.Close()

	resp, err := client.Get(ctx, "primary/", clientv3.WithFirstCreate()...)
	fmt.Println(string(resp.Kvs[0].Value), err)
	// Output: host-a <nil>
}

// The timeout bounds only the wait. The end of ctx would end the lock as well.
func ExampleWithAcquireTimeout() {
	ctx, client := context.Background(), exampleClient()

	lock, err := etcdutil.Acquire(ctx, client, "printer")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer lock.Close()

	_, err = etcdutil.Acquire(ctx, client, "printer", etcdutil.WithAcquireTimeout(50*time.Millisecond))
	fmt.Println(errors.Is(err, context.DeadlineExceeded))
	// Output: true
}

func ExampleWithLogger() {
	// The example leaves out times and what else differs between runs.
	logger := slog.New(slog.NewTextHandler(os.Stdout, &slog.HandlerOptions{
		ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
			switch a.Key {
			case slog.TimeKey, "token", "waited", "held":
				return slog.Attr{}
			}
			return a
		},
	}))

	lock, err := etcdutil.Acquire(context.Background(), exampleClient(), "logged", etcdutil.WithLogger(logger))
	if err != nil {
		fmt.Println(err)
		return
	}
	_ = lock.Close()
	// Output:
	// level=INFO msg="etcdutil: lock acquired" name=logged
	// level=INFO msg="etcdutil: lock released" name=logged
}

func ExampleRetry() {
	ctx, client := context.Background(), exampleClient()

	if _, err := client.Put(ctx, "greeting", "hello"); err != nil {
		fmt.Println(err)
		return
	}
	resp, err := etcdutil.Retry(ctx, func(ctx context.Context) (*clientv3.GetResponse, error) {
		return client.Get(ctx, "greeting") // a read may be repeated
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(string(resp.Kvs[0].Value))
	// Output: hello
}

func ExampleWithRetryPolicy() {
	calls := 0
	_, err := etcdutil.Retry(context.Background(), func(ctx context.Context) (int, error) {
		calls++
		return 0, rpctypes.ErrTimeout
	}, etcdutil.WithRetryPolicy(etcdutil.RetryPolicy{Initial: time.Millisecond, Attempts: 3}))
	fmt.Println(calls, errors.Is(err, rpctypes.ErrTimeout))
	// Output: 3 true
}

// With DefiniteOnly, Retry repeats an operation only if it cannot have been applied.
func ExampleRetryPolicy_definiteOnly() {
	attempt := func(answers ...error) (calls int, err error) {
		_, err = etcdutil.Retry(context.Background(), func(ctx context.Context) (struct{}, error) {
			calls++
			return struct{}{}, answers[calls-1]
		}, etcdutil.WithRetryPolicy(etcdutil.RetryPolicy{DefiniteOnly: true}))
		return calls, err
	}

	fmt.Println(attempt(rpctypes.ErrTooManyRequests, nil))
	fmt.Println(attempt(rpctypes.ErrTimeout, nil))
	// Output:
	// 2 <nil>
	// 1 etcdserver: request timed out
}

func ExampleIsTransient() {
	fmt.Println(etcdutil.IsTransient(rpctypes.ErrLeaderChanged))
	fmt.Println(etcdutil.IsTransient(rpctypes.ErrPermissionDenied))
	fmt.Println(etcdutil.IsTransient(context.Canceled)) // the caller gave up
	// Output:
	// true
	// false
	// false
}

func ExampleIsAmbiguous() {
	fmt.Println(etcdutil.IsAmbiguous(rpctypes.ErrTimeout))  // it may still be applied
	fmt.Println(etcdutil.IsAmbiguous(rpctypes.ErrNoLeader)) // it was refused
	// Output:
	// true
	// false
}

// One goroutine sends the state of something, and any number of others read the latest.
func ExampleNewNotify() {
	ctx := context.Background()

	leader := etcdutil.NewNotify[string](ctx)
	defer leader.Close()

	var readers sync.WaitGroup
	for range 3 {
		receiver := leader.Receiver()
		readers.Go(func() {
			fmt.Println(receiver.Recv(ctx))
		})
	}
	if err := leader.Send("10.0.0.1:8080"); err != nil {
		fmt.Println(err)
	}
	readers.Wait()
	// Output:
	// 10.0.0.1:8080 <nil>
	// 10.0.0.1:8080 <nil>
	// 10.0.0.1:8080 <nil>
}

// Send does not wait for receivers: a slow one skips values.
func ExampleNotify_Send() {
	ctx := context.Background()

	progress := etcdutil.NewNotify[int](ctx)
	receiver := progress.Receiver()
	for percent := 0; percent <= 100; percent += 10 {
		if err := progress.Send(percent); err != nil {
			fmt.Println(err)
		}
	}
	fmt.Println(receiver.Recv(ctx))

	fmt.Println(progress.Close(), progress.Send(110))
	// Output:
	// 100 <nil>
	// <nil> etcdutil: closed
}

// A receiver that is made later reads the current value first.
func ExampleNotify_Receiver() {
	ctx := context.Background()

	config := etcdutil.NewNotify[string](ctx)
	defer config.Close()
	early := config.Receiver()
	if err := config.Send("v1"); err != nil {
		fmt.Println(err)
	}
	late := config.Receiver()

	fmt.Println(early.Recv(ctx))
	fmt.Println(late.Recv(ctx))
	// Output:
	// v1 <nil>
	// v1 <nil>
}

// Receivers can read the last value after Close.
func ExampleReceiver_Recv() {
	ctx := context.Background()

	state := etcdutil.NewNotify[string](ctx)
	receiver := state.Receiver()
	for _, s := range []string{"running", "done"} {
		if err := state.Send(s); err != nil {
			fmt.Println(err)
		}
	}
	state.Close()

	for {
		s, err := receiver.Recv(ctx)
		if errors.Is(err, etcdutil.ErrClosed) {
			fmt.Println("closed")
			return
		}
		if err != nil {
			fmt.Println(err)
			return
		}
		fmt.Println(s)
	}
	// Output:
	// done
	// closed
}
