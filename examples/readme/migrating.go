package main

// The code of docs/migrating.md, as it stands there.

import (
	"context"
	"time"

	"example.com/etcdutil"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
)

func runNightly(ctx context.Context) error { return ctx.Err() }

func oldNightly(ctx context.Context, client *clientv3.Client) error {
	session, err := concurrency.NewSession(client, concurrency.WithTTL(60))
	if err != nil {
		return err
	}
	defer session.Close()
	mutex := concurrency.NewMutex(session, "jobs/nightly")
	if err := mutex.Lock(ctx); err != nil {
		return err
	}
	defer mutex.Unlock(context.WithoutCancel(ctx))

	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() { // late: a session notices its loss up to seconds after etcd has given the lock away
		select {
		case <-session.Done():
			cancel()
		case <-ctx.Done():
		}
	}()
	return runNightly(ctx)
}

func newNightly(ctx context.Context, client *clientv3.Client) error {
	return etcdutil.Do(ctx, client, "jobs/nightly", runNightly, etcdutil.WithTTL(time.Minute))
}

func boundsTheLock(ctx context.Context, client *clientv3.Client) (*etcdutil.Lock, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second) // wrong: the lock ends after 5 s
	defer cancel()
	lock, err := etcdutil.Acquire(ctx, client, "jobs/nightly")
	return lock, err
}

func boundsTheWait(ctx context.Context, client *clientv3.Client) (*etcdutil.Lock, error) {
	lock, err := etcdutil.Acquire(ctx, client, "jobs/nightly",
		etcdutil.WithAcquireTimeout(5*time.Second))
	return lock, err
}
