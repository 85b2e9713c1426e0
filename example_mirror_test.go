package etcdutil_test

import (
	"context"
	"errors"
	"fmt"
	"time"

	"example.com/etcdutil"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// A Limit is a setting, which etcd has as JSON.
type Limit struct{ PerSecond int }

func ExampleNewMirror() {
	ctx, client := context.Background(), exampleClient()
	if _, err := client.Put(ctx, "limits/search", `{"PerSecond":10}`); err != nil {
		fmt.Println(err)
		return
	}

	limits, err := etcdutil.NewMirror[Limit](ctx, client, "limits/", etcdutil.WithPrefix())
	if err != nil {
		fmt.Println(err)
		return
	}
	defer limits.Close()

	// From now on this reads memory, which follows etcd.
	limit, ok := limits.Get("limits/search")
	fmt.Println(limit.PerSecond, ok)
	// Output: 10 true
}

func ExampleMirror_Get() {
	ctx, client := context.Background(), exampleClient()

	limits, err := etcdutil.NewMirror[Limit](ctx, client, "limits-get/", etcdutil.WithPrefix())
	if err != nil {
		fmt.Println(err)
		return
	}
	defer limits.Close()

	limit, ok := limits.Get("limits-get/unset")
	if !ok {
		limit = Limit{PerSecond: 5} // the default
	}
	fmt.Println(limit.PerSecond)
	// Output: 5
}

// All keys are of one revision: of a transaction one sees all or nothing.
func ExampleMirror_All() {
	ctx, client := context.Background(), exampleClient()

	weights, err := etcdutil.NewMirror[int](ctx, client, "weights/", etcdutil.WithPrefix())
	if err != nil {
		fmt.Println(err)
		return
	}
	defer weights.Close()
	resp, err := client.Txn(ctx).Then(
		clientv3.OpPut("weights/b", "30"),
		clientv3.OpPut("weights/a", "70"),
	).Commit()
	if err != nil || weights.Wait(ctx, resp.Header.Revision) != nil {
		fmt.Println(err)
		return
	}

	for key, weight := range weights.All() {
		fmt.Println(key, weight)
	}
	// Output:
	// weights/a 70
	// weights/b 30
}

func ExampleMirror_Len() {
	ctx, client := context.Background(), exampleClient()
	if _, err := client.Put(ctx, "workers/a", `"idle"`); err != nil {
		fmt.Println(err)
		return
	}

	workers, err := etcdutil.NewMirror[string](ctx, client, "workers/", etcdutil.WithPrefix())
	if err != nil {
		fmt.Println(err)
		return
	}
	defer workers.Close()
	fmt.Println(workers.Len())
	// Output: 1
}

// A value that does not decode changes nothing that Get returns, but it is listed.
func ExampleMirror_Invalid() {
	ctx, client := context.Background(), exampleClient()
	if _, err := client.Put(ctx, "limits-invalid/search", `{"PerSecond":10}`); err != nil {
		fmt.Println(err)
		return
	}

	limits, err := etcdutil.NewMirror[Limit](ctx, client, "limits-invalid/", etcdutil.WithPrefix())
	if err != nil {
		fmt.Println(err)
		return
	}
	defer limits.Close()
	resp, err := client.Put(ctx, "limits-invalid/search", `{"PerSecond":"many"}`)
	if err != nil || limits.Wait(ctx, resp.Header.Revision) != nil {
		fmt.Println(err)
		return
	}

	for key, err := range limits.Invalid() {
		limit, _ := limits.Get(key)
		fmt.Println(key, errors.Is(err, etcdutil.ErrInvalidValue), limit.PerSecond)
	}
	// Output: limits-invalid/search true 10
}

// To read your own writes, wait for their revision, whatever key it was.
func ExampleMirror_Wait() {
	ctx, client := context.Background(), exampleClient()

	limits, err := etcdutil.NewMirror[Limit](ctx, client, "limits-wait/", etcdutil.WithPrefix())
	if err != nil {
		fmt.Println(err)
		return
	}
	defer limits.Close()

	resp, err := client.Put(ctx, "limits-wait/search", `{"PerSecond":20}`)
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(limits.Wait(ctx, resp.Header.Revision))
	limit, _ := limits.Get("limits-wait/search")
	fmt.Println(limit.PerSecond)
	// Output:
	// <nil>
	// 20
}

func ExampleMirror_Revision() {
	ctx, client := context.Background(), exampleClient()

	limits, err := etcdutil.NewMirror[Limit](ctx, client, "limits-revision/", etcdutil.WithPrefix())
	if err != nil {
		fmt.Println(err)
		return
	}
	defer limits.Close()

	resp, err := client.Put(ctx, "elsewhere", "")
	if err != nil || limits.Wait(ctx, resp.Header.Revision) != nil {
		fmt.Println(err)
		return
	}
	fmt.Println("it moves on though nothing changes:", limits.Revision() >= resp.Header.Revision)
	// Output: it moves on though nothing changes: true
}

// A readiness probe: is the copy fresh enough?
func ExampleMirror_AsOf() {
	limits, err := etcdutil.NewMirror[Limit](context.Background(), exampleClient(), "limits-as-of/", etcdutil.WithPrefix())
	if err != nil {
		fmt.Println(err)
		return
	}
	defer limits.Close()

	ready := func() bool { return time.Since(limits.AsOf()) < 10*time.Second }
	fmt.Println(ready())
	// Output: true
}

// Recv returns after each change, or after several at once.
func ExampleMirror_Changes() {
	ctx, client := context.Background(), exampleClient()

	limits, err := etcdutil.NewMirror[Limit](ctx, client, "limits-changes/", etcdutil.WithPrefix())
	if err != nil {
		fmt.Println(err)
		return
	}
	defer limits.Close()
	changes := limits.Changes()

	resp, err := client.Put(ctx, "limits-changes/search", `{"PerSecond":30}`)
	if err != nil {
		fmt.Println(err)
		return
	}
	revision, err := changes.Recv(ctx)
	limit, _ := limits.Get("limits-changes/search")
	fmt.Println(limit.PerSecond, revision == resp.Header.Revision, err)
	// Output: 30 true <nil>
}

// The copy can be read after Close, but it no longer follows etcd.
func ExampleMirror_Close() {
	ctx, client := context.Background(), exampleClient()
	if _, err := client.Put(ctx, "limits-close/search", `{"PerSecond":10}`); err != nil {
		fmt.Println(err)
		return
	}
	limits, err := etcdutil.NewMirror[Limit](ctx, client, "limits-close/", etcdutil.WithPrefix())
	if err != nil {
		fmt.Println(err)
		return
	}

	fmt.Println(limits.Close(), context.Cause(limits))
	limit, _ := limits.Get("limits-close/search")
	fmt.Println(limit.PerSecond)
	// Output:
	// <nil> etcdutil: closed
	// 10
}
