package main_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"example.com/etcdutil"
	"example.com/etcdutil/etcdtest"
	clientv3 "go.etcd.io/etcd/client/v3"
)

func TestWorkStopsWhenTheLockIsLost(t *testing.T) {
	cluster := etcdtest.Start(t, 1) // a real etcd, in this process
	link := etcdtest.StartLink(t, cluster.Endpoints()[0])
	client, err := clientv3.New(clientv3.Config{Endpoints: []string{link.Endpoint()}})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()

	err = etcdutil.Do(t.Context(), client, "jobs/nightly", func(ctx context.Context) error {
		link.Cut() // a black hole: nothing arrives, and no connection closes
		<-ctx.Done()
		return nil
	}, etcdutil.WithTTL(2*time.Second))
	if !errors.Is(err, etcdutil.ErrLockLost) {
		t.Fatalf("got %v", err)
	}
}
