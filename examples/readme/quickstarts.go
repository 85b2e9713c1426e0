package main

// The quick starts of the README, as they stand there.

import (
	"context"
	"errors"
	"log"

	"example.com/etcdutil"
	clientv3 "go.etcd.io/etcd/client/v3"
)

func idea(ctx context.Context, client *clientv3.Client, run func(ctx context.Context) error) error {
	lock, err := etcdutil.Acquire(ctx, client, "jobs/nightly")
	if err != nil {
		return err
	}
	defer lock.Close()
	return run(lock) // canceled when the lock is no longer surely held
}

func publish(ctx context.Context, client *clientv3.Client) error {
	lock, err := etcdutil.TryAcquire(ctx, client, "reports", etcdutil.WithValue("host-1"))
	if errors.Is(err, etcdutil.ErrLockHeld) {
		return nil // another process does it
	}
	if err != nil {
		return err
	}
	defer lock.Close()

	_, err = lock.Commit(ctx, clientv3.OpPut("reports/today", "done"))
	switch {
	case errors.Is(err, etcdutil.ErrLockLost):
		log.Print("not written: another process may hold the lock")
	case errors.Is(err, etcdutil.ErrUnknownOutcome):
		log.Print("may have been written: etcd did not answer")
	}
	return err
}

type Setting struct{ Limit int }

func follow(ctx context.Context, client *clientv3.Client) error {
	w, err := etcdutil.Watch[Setting](ctx, client, "settings/",
		etcdutil.WithPrefix(), etcdutil.WithSnapshot())
	if err != nil {
		return err
	}
	defer w.Close()

	settings := make(map[string]Setting)
	for e := range w.Events() {
		switch e.Type {
		case etcdutil.EventPut:
			settings[e.Key] = e.Value
		case etcdutil.EventDelete:
			delete(settings, e.Key)
		case etcdutil.EventInvalid:
			log.Printf("%s is not a setting: %v", e.Key, e.Err)
		case etcdutil.EventSynced:
			log.Printf("%d settings as of revision %d", len(settings), e.Revision)
		}
	}
	return context.Cause(w) // why it ended
}

func write(ctx context.Context, client *clientv3.Client) error {
	return etcdutil.Do(ctx, client, "audit/lock", func(ctx context.Context) error {
		lock, _ := etcdutil.LockFrom(ctx)
		w, err := etcdutil.NewLogWriter[string](ctx, lock, "audit")
		if err != nil {
			return err
		}
		defer w.Close()
		version, err := w.Write(ctx, "limit raised to 10")
		log.Printf("version %d: %v", version, err)
		return err
	})
}

func read(ctx context.Context, client *clientv3.Client) error {
	r, err := etcdutil.NewLogReader[string](ctx, client, "audit", etcdutil.WithEveryEntry(0))
	if err != nil {
		return err
	}
	defer r.Close()
	for entry, err := range r.All() {
		if err != nil {
			return err // ErrGap: compaction has removed entries that were not read yet
		}
		log.Printf("version %d: %s", entry.Version, entry.Value)
	}
	return context.Cause(r)
}
