package main

import (
	"context"
	"log"
	"os/signal"
	"syscall"
	"time"

	"example.com/etcdutil"
	clientv3 "go.etcd.io/etcd/client/v3"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	client, err := clientv3.New(clientv3.Config{
		Endpoints:            []string{"localhost:2379"},
		DialKeepAliveTime:    10 * time.Second,
		DialKeepAliveTimeout: 5 * time.Second,
	})
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()

	err = etcdutil.Do(ctx, client, "jobs/nightly", func(ctx context.Context) error {
		log.Print("holding the lock")
		// Your work, under ctx: ctx ends when the lock is no longer surely held.
		return nil
	})
	if err != nil {
		log.Print(err)
	}
}
