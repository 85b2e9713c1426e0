package etcdutil_test

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"example.com/etcdutil"
	clientv3 "go.etcd.io/etcd/client/v3"
)

type setting struct {
	Limit int `json:"limit"`
}

// put writes a key for an example.
func put(key, value string) etcdutil.Revision {
	resp, err := exampleClient().Put(context.Background(), key, value)
	if err != nil {
		panic(err)
	}
	return resp.Header.Revision
}

func ExampleWatch() {
	ctx, client := context.Background(), exampleClient()

	w, err := etcdutil.Watch[setting](ctx, client, "quota/", etcdutil.WithPrefix())
	if err != nil {
		fmt.Println(err)
		return
	}
	defer w.Close()

	put("quota/a", `{"limit": 10}`)
	put("quota/b", `{"limit": ten}`)
	_, _ = client.Delete(ctx, "quota/a")

	for range 3 {
		switch e := <-w.Events(); e.Type {
		case etcdutil.EventPut:
			fmt.Println(e.Key, "is now", e.Value.Limit)
		case etcdutil.EventDelete:
			fmt.Println(e.Key, "is gone")
		case etcdutil.EventInvalid:
			fmt.Printf("%s is not a setting: %s\n", e.Key, e.Raw)
		}
	}
	// Output:
	// quota/a is now 10
	// quota/b is not a setting: {"limit": ten}
	// quota/a is gone
}

// Events is closed when the watcher has ended, and context.Cause reports why.
func ExampleWatcher_Events() {
	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	w, err := etcdutil.Watch[setting](ctx, exampleClient(), "unwatched")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer w.Close()

	cancel(errors.New("shutting down"))
	for e := range w.Events() {
		fmt.Println(e.Key)
	}
	fmt.Println(context.Cause(w))
	// Output: shutting down
}

// A second watcher continues where the first one stopped.
func ExampleWatcher_Revision() {
	ctx, client := context.Background(), exampleClient()

	first, err := etcdutil.Watch[string](ctx, client, "steps", etcdutil.WithCodec(etcdutil.Raw))
	if err != nil {
		fmt.Println(err)
		return
	}
	put("steps", "one")
	put("steps", "two")
	fmt.Println((<-first.Events()).Value)
	_ = first.Close()

	second, err := etcdutil.Watch[string](ctx, client, "steps", etcdutil.WithCodec(etcdutil.Raw),
		etcdutil.WithRevision(first.Revision()+1))
	if err != nil {
		fmt.Println(err)
		return
	}
	defer second.Close()
	fmt.Println((<-second.Events()).Value)
	// Output:
	// one
	// two
}

func ExampleWatcher_Close() {
	w, err := etcdutil.Watch[setting](context.Background(), exampleClient(), "closed")
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(w.Close())
	_, open := <-w.Events()
	fmt.Println(open, context.Cause(w))
	// Output:
	// <nil>
	// false etcdutil: closed
}

// With a snapshot, a map that follows the events equals etcd from EventSynced on.
func ExampleWithSnapshot() {
	put("flags/dark", "on")
	put("flags/beta", "off")

	w, err := etcdutil.Watch[string](context.Background(), exampleClient(), "flags/",
		etcdutil.WithPrefix(), etcdutil.WithSnapshot(), etcdutil.WithCodec(etcdutil.Raw))
	if err != nil {
		fmt.Println(err)
		return
	}
	defer w.Close()

	flags := map[string]string{}
	for e := range w.Events() {
		switch e.Type {
		case etcdutil.EventPut:
			flags[e.Key] = e.Value
		case etcdutil.EventDelete:
			delete(flags, e.Key)
		case etcdutil.EventSynced:
			fmt.Println(flags)
			return
		}
	}
	// Output: map[flags/beta:off flags/dark:on]
}

func ExampleWithPrefix() {
	client := exampleClient()

	w, err := etcdutil.Watch[string](context.Background(), client, "users/", etcdutil.WithPrefix(), etcdutil.WithCodec(etcdutil.Raw))
	if err != nil {
		fmt.Println(err)
		return
	}
	defer w.Close()

	put("userspace", "not below users/")
	put("users/ann", "admin")
	fmt.Println((<-w.Events()).Key)
	// Output: users/ann
}

func ExampleWithPrev() {
	put("level", "info")
	w, err := etcdutil.Watch[string](context.Background(), exampleClient(), "level", etcdutil.WithPrev(), etcdutil.WithCodec(etcdutil.Raw))
	if err != nil {
		fmt.Println(err)
		return
	}
	defer w.Close()

	put("level", "debug")
	e := <-w.Events()
	fmt.Println("from", *e.Prev, "to", e.Value)
	// Output: from info to debug
}

func ExampleWithRevision() {
	rev := put("history", "1")
	put("history", "2")

	w, err := etcdutil.Watch[int](context.Background(), exampleClient(), "history", etcdutil.WithRevision(rev))
	if err != nil {
		fmt.Println(err)
		return
	}
	defer w.Close()
	fmt.Println((<-w.Events()).Value, (<-w.Events()).Value)
	// Output: 1 2
}

// listCodec is an example of a codec.
type listCodec struct{}

func (listCodec) Marshal(v any) ([]byte, error) {
	list, ok := v.([]string)
	if !ok {
		return nil, fmt.Errorf("no list: %T", v)
	}
	return []byte(strings.Join(list, ",")), nil
}

func (listCodec) Unmarshal(data []byte, v any) error {
	list, ok := v.(*[]string)
	if !ok {
		return fmt.Errorf("no list: %T", v)
	}
	*list = strings.Split(string(data), ",")
	return nil
}

func ExampleWithCodec() {
	w, err := etcdutil.Watch[[]string](context.Background(), exampleClient(), "hosts", etcdutil.WithCodec(listCodec{}))
	if err != nil {
		fmt.Println(err)
		return
	}
	defer w.Close()

	put("hosts", "a,b,c")
	fmt.Println(len((<-w.Events()).Value), "hosts")
	// Output: 3 hosts
}

func ExampleEventType_String() {
	fmt.Println(etcdutil.EventPut, etcdutil.EventDelete, etcdutil.EventSynced, etcdutil.EventInvalid)
	// Output: put delete synced invalid
}

func ExampleNewLogWriter() {
	ctx, client := context.Background(), exampleClient()

	lock, err := etcdutil.Acquire(ctx, client, "leader")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer lock.Close()
	w, err := etcdutil.NewLogWriter[setting](ctx, lock, "decisions")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer w.Close()

	fmt.Println(w.Write(ctx, setting{Limit: 10}))
	fmt.Println(w.Write(ctx, setting{Limit: 20}))
	// Output:
	// 1 <nil>
	// 2 <nil>
}

// A writer that does not hold the lock cannot write.
func ExampleLogWriter_Write() {
	ctx, client := context.Background(), exampleClient()

	lock, err := etcdutil.Acquire(ctx, client, "writer")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer lock.Close()
	w, err := etcdutil.NewLogWriter[setting](ctx, lock, "journal")
	if err != nil {
		fmt.Println(err)
		return
	}
	_, _ = client.Delete(ctx, lock.Key()) // by hand

	_, err = w.Write(ctx, setting{Limit: 10})
	fmt.Println(errors.Is(err, etcdutil.ErrLockLost))
	resp, err := client.Get(ctx, "journal")
	fmt.Println(len(resp.Kvs), err)
	// Output:
	// true
	// 0 <nil>
}

func ExampleLogWriter_Close() {
	ctx := context.Background()

	lock, err := etcdutil.Acquire(ctx, exampleClient(), "closing")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer lock.Close()
	w, err := etcdutil.NewLogWriter[setting](ctx, lock, "closing-log")
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(w.Close())
	_, err = w.Write(ctx, setting{})
	fmt.Println(errors.Is(err, etcdutil.ErrClosed), lock.Err())
	// Output:
	// <nil>
	// true <nil>
}

// writeLog writes a log for an example.
func writeLog(name string, values ...int) {
	ctx := context.Background()
	err := etcdutil.Do(ctx, exampleClient(), name, func(ctx context.Context) error {
		lock, _ := etcdutil.LockFrom(ctx)
		w, err := etcdutil.NewLogWriter[int](ctx, lock, name)
		if err != nil {
			return err
		}
		for _, v := range values {
			if _, err := w.Write(ctx, v); err != nil {
				return err
			}
		}
		return w.Close()
	})
	if err != nil {
		panic(err)
	}
}

// A reader that is slower than the writer reads the latest entry.
func ExampleNewLogReader() {
	ctx, client := context.Background(), exampleClient()

	writeLog("progress", 10, 20, 30)
	r, err := etcdutil.NewLogReader[int](ctx, client, "progress")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer r.Close()

	e, err := r.Read(ctx)
	fmt.Println(e.Value, e.Version, err)
	// Output: 30 3 <nil>
}

func ExampleLogReader_Read() {
	ctx, client := context.Background(), exampleClient()

	r, err := etcdutil.NewLogReader[int](ctx, client, "not-yet-written")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer r.Close()

	canceled, cancel := context.WithCancel(ctx)
	cancel()
	_, err = r.Read(canceled) // ctx bounds only this call
	fmt.Println(err)

	writeLog("not-yet-written", 1)
	e, err := r.Read(ctx)
	fmt.Println(e.Value, err)
	// Output:
	// context canceled
	// 1 <nil>
}

func ExampleLogReader_All() {
	client := exampleClient()

	writeLog("all", 1, 2, 3)
	r, err := etcdutil.NewLogReader[int](context.Background(), client, "all", etcdutil.WithEveryEntry(0))
	if err != nil {
		fmt.Println(err)
		return
	}
	defer r.Close()
	for e, err := range r.All() {
		if err != nil {
			fmt.Println(err)
			return
		}
		fmt.Println(e.Version, e.Value)
		if e.Version == 3 {
			break
		}
	}
	// Output:
	// 1 1
	// 2 2
	// 3 3
}

func ExampleLogReader_Close() {
	ctx := context.Background()

	r, err := etcdutil.NewLogReader[int](ctx, exampleClient(), "unread")
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(r.Close())
	_, err = r.Read(ctx)
	fmt.Println(err)
	// Output:
	// <nil>
	// etcdutil: closed
}

// Entries that etcd has compacted cannot be read.
func ExampleWithEveryEntry() {
	ctx, client := context.Background(), exampleClient()

	writeLog("compacted", 1, 2, 3)
	resp, err := client.Get(ctx, "compacted")
	if err != nil {
		fmt.Println(err)
		return
	}
	last := resp.Kvs[0].ModRevision
	if _, err := client.Compact(ctx, last, clientv3.WithCompactPhysical()); err != nil {
		fmt.Println(err)
		return
	}

	_, err = etcdutil.NewLogReader[int](ctx, client, "compacted", etcdutil.WithEveryEntry(0))
	fmt.Println(errors.Is(err, etcdutil.ErrGap))
	r, err := etcdutil.NewLogReader[int](ctx, client, "compacted", etcdutil.WithEveryEntry(last))
	if err != nil {
		fmt.Println(err)
		return
	}
	defer r.Close()
	e, err := r.Read(ctx)
	fmt.Println(e.Value, err)
	// Output:
	// true
	// 3 <nil>
}

// A reader continues where an earlier one stopped.
func ExampleWithEntriesAfter() {
	ctx, client := context.Background(), exampleClient()

	writeLog("continued", 1, 2, 3)
	first, err := etcdutil.NewLogReader[int](ctx, client, "continued", etcdutil.WithEveryEntry(0))
	if err != nil {
		fmt.Println(err)
		return
	}
	defer first.Close()
	last, err := first.Read(ctx)
	fmt.Println(last.Value, err)

	second, err := etcdutil.NewLogReader[int](ctx, client, "continued",
		etcdutil.WithEntriesAfter(last.Version, last.Revision))
	if err != nil {
		fmt.Println(err)
		return
	}
	defer second.Close()
	next, err := second.Read(ctx)
	fmt.Println(next.Value, err)
	// Output:
	// 1 <nil>
	// 2 <nil>
}

// The version of the last entry and the reader's revision are what to store, for a reader that goes
// on later.
func ExampleLogReader_Revision() {
	ctx, client := context.Background(), exampleClient()

	writeLog("stored", 1, 2, 3)
	first, err := etcdutil.NewLogReader[int](ctx, client, "stored", etcdutil.WithEveryEntry(0))
	if err != nil {
		fmt.Println(err)
		return
	}
	last, err := first.Read(ctx)
	fmt.Println(last.Value, err)
	version, revision := last.Version, first.Revision()
	if err := first.Close(); err != nil {
		fmt.Println(err)
		return
	}

	second, err := etcdutil.NewLogReader[int](ctx, client, "stored",
		etcdutil.WithEntriesAfter(version, revision))
	if err != nil {
		fmt.Println(err)
		return
	}
	defer second.Close()
	next, err := second.Read(ctx)
	fmt.Println(next.Value, err)
	// Output:
	// 1 <nil>
	// 2 <nil>
}
