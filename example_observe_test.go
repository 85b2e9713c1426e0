package etcdutil_test

import (
	"context"
	"fmt"
	"sync/atomic"
	"time"

	"example.com/etcdutil"
)

// An Observer that counts. The program in examples/metrics has one for Prometheus.
func ExampleWithObserver() {
	ctx, client := context.Background(), exampleClient()

	var held, released, lost atomic.Int64
	observer := etcdutil.WithObserver(etcdutil.Observer{
		Acquired: func(etcdutil.LockEvent) { held.Add(1) },
		Released: func(etcdutil.LockEvent) { held.Add(-1); released.Add(1) },
		Lost:     func(etcdutil.LockEvent) { held.Add(-1); lost.Add(1) },
	})
	for range 3 {
		err := etcdutil.Do(ctx, client, "jobs/observed", func(context.Context) error { return nil }, observer)
		if err != nil {
			fmt.Println(err)
			return
		}
	}
	fmt.Println(held.Load(), "held,", released.Load(), "released,", lost.Load(), "lost")
	// Output: 0 held, 3 released, 0 lost
}

// A readiness probe asks nobody: it reads two clocks. It fails before the lease is lost, and when
// the mirror is out of date, also if the network swallows everything and closes no connection.
func Example_readiness() {
	ctx, client := context.Background(), exampleClient()

	lease, err := etcdutil.NewLease(ctx, client, 10*time.Second)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer lease.Close()
	mirror, err := etcdutil.NewMirror[string](ctx, client, "settings/", etcdutil.WithPrefix())
	if err != nil {
		fmt.Println(err)
		return
	}
	defer mirror.Close()

	ready := time.Until(lease.Expiry()) > lease.TTL()/4 && time.Since(mirror.AsOf()) < 5*time.Second && lease.Err() == nil
	fmt.Println(ready)
	// Output: true
}
