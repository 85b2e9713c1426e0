package etcdutil_test

import (
	"context"
	"errors"
	"fmt"

	"example.com/etcdutil"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
)

func ExampleLead() {
	ctx, client := context.Background(), exampleClient()

	err := etcdutil.Lead(ctx, client, "scheduler/leader", func(ctx context.Context) error {
		// ctx ends when this process no longer surely leads. LockFrom fences what it writes.
		lock, _ := etcdutil.LockFrom(ctx)
		_, err := lock.Commit(ctx)
		fmt.Println("leads, and may write:", err == nil)
		return err // resigns
	}, etcdutil.WithValue("node-7"))
	fmt.Println(err)
	// Output:
	// leads, and may write: true
	// <nil>
}

// Lead ends when there is no sense in trying again. Such an error is for an operator.
func ExampleLead_permanent() {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	err := etcdutil.Lead(ctx, exampleClient(), "scheduler/leader", func(context.Context) error { return nil })
	switch {
	case errors.Is(err, rpctypes.ErrPermissionDenied):
		fmt.Println("grant it readwrite on scheduler/leader/")
	case errors.Is(err, context.Canceled):
		fmt.Println("shutting down")
	}
	// Output: shutting down
}

func ExampleHolder() {
	ctx, client := context.Background(), exampleClient()

	_, err := etcdutil.Holder(ctx, client, "jobs/holder")
	fmt.Println(errors.Is(err, etcdutil.ErrNoHolder))

	lock, err := etcdutil.Acquire(ctx, client, "jobs/holder", etcdutil.WithValue("node-7"))
	if err != nil {
		fmt.Println(err)
		return
	}
	defer lock.Close()
	holder, err := etcdutil.Holder(ctx, client, "jobs/holder")
	fmt.Println(holder.Value, holder.Token == lock.Token(), err)
	// Output:
	// true
	// node-7 true <nil>
}

func ExampleWatchHolder() {
	ctx, client := context.Background(), exampleClient()

	holders, err := etcdutil.WatchHolder(ctx, client, "jobs/watched")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer holders.Close()
	go func() {
		_ = etcdutil.Do(ctx, client, "jobs/watched", func(context.Context) error { return nil }, etcdutil.WithValue("node-7"))
	}()
	for e := range holders.Events() {
		switch e.Type {
		case etcdutil.EventPut:
			fmt.Println(e.Value.Value, "holds it")
		case etcdutil.EventDelete:
			fmt.Println("nobody holds it")
			return
		}
	}
	// Output:
	// node-7 holds it
	// nobody holds it
}
