package main

import (
	"context"
	"log"

	"example.com/etcdutil"
	clientv3 "go.etcd.io/etcd/client/v3"
)

func main() {
	client, err := clientv3.New(clientv3.Config{Endpoints: []string{"localhost:2379"}})
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()

	err = etcdutil.Do(context.Background(), client, "jobs/nightly", func(ctx context.Context) error {
		// ctx ends when the lock is no longer surely held. Commit writes only if it is held, and exactly once.
		lock, _ := etcdutil.LockFrom(ctx)
		_, err := lock.Commit(ctx, clientv3.OpPut("reports/nightly", "done"))
		return err
	})
	if err != nil {
		log.Print(err)
	}
}
