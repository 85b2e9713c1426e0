package etcdutil_test

import (
	"context"
	"fmt"
	"sync/atomic"

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
