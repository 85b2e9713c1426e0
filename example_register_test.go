package etcdutil_test

import (
	"context"
	"errors"
	"fmt"

	"example.com/etcdutil"
)

// An Address is where a service can be reached.
type Address struct{ Host string }

func ExampleRegister() {
	ctx, client := context.Background(), exampleClient()

	// The key is there for as long as this process is, whatever happens to its lease.
	r, err := etcdutil.Register(ctx, client, "services/search/1", Address{"10.0.0.1:8080"})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer r.Close()

	resp, err := client.Get(ctx, r.Key())
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(string(resp.Kvs[0].Value))
	// Output: {"Host":"10.0.0.1:8080"}
}

// A new instance takes over the key of its predecessor, which may still be running.
func ExampleRegister_takeOver() {
	ctx, client := context.Background(), exampleClient()

	old, err := etcdutil.Register(ctx, client, "services/search/2", Address{"10.0.0.1:8080"})
	if err != nil {
		fmt.Println(err)
		return
	}
	r, err := etcdutil.Register(ctx, client, "services/search/2", Address{"10.0.0.2:8080"})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer r.Close()

	<-old.Done()
	fmt.Println(errors.Is(context.Cause(old), etcdutil.ErrReplaced), r.Err())
	// Output: true <nil>
}

func ExampleRegistration_Set() {
	ctx, client := context.Background(), exampleClient()

	r, err := etcdutil.Register(ctx, client, "services/search/3", "starting")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer r.Close()

	if err := r.Set(ctx, "ready"); err != nil {
		fmt.Println(err)
		return
	}
	resp, err := client.Get(ctx, "services/search/3")
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(string(resp.Kvs[0].Value))
	// Output: "ready"
}

func ExampleRegistration_Key() {
	r, err := etcdutil.Register(context.Background(), exampleClient(), "services/search/4", "ready")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer r.Close()
	fmt.Println(r.Key())
	// Output: services/search/4
}

// Close removes the key, so that nobody has to wait for the lease's end.
func ExampleRegistration_Close() {
	ctx, client := context.Background(), exampleClient()

	r, err := etcdutil.Register(ctx, client, "services/search/5", "ready")
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(r.Close())
	resp, err := client.Get(ctx, "services/search/5")
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(len(resp.Kvs))
	// Output:
	// <nil>
	// 0
}
