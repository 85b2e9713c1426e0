package etcdutil

import (
	"context"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
)

// Under the race detector this shows a read of gRPC's map of connections while gRPC fills it.
// Without the detector that is a fatal error of the runtime.
func TestRedialerLeavesGRPCAloneWhileItBeginsToConnect(t *testing.T) {
	var leases sync.WaitGroup
	for range 100 {
		client := newClient(t, testCluster.Endpoints()[0], "127.0.0.1:1", "127.0.0.1:2")
		leases.Go(func() {
			lease, err := NewLease(context.Background(), client, 10*time.Second)
			if err == nil {
				err = lease.Close()
			}
			assert.NoError(t, err)
		})
	}
	leases.Wait()
}
