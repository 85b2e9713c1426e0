package main

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"sync"
	"time"

	"example.com/etcdutil"
	"example.com/etcdutil/etcdtest"
	clientv3 "go.etcd.io/etcd/client/v3"
)

const manyWatchers = 3000

func watchedKey(i int) string { return "watched/" + strconv.Itoa(i) }

// A crowd is watchers of one key each, and their readers.
type crowd struct {
	ctx    context.Context
	cancel context.CancelFunc
	events chan etcdutil.Revision // what the readers got
	done   sync.WaitGroup
}

// watchMany starts watchers, each with a reader. It returns when all watches stand on the server.
func watchMany(ctx context.Context, client *clientv3.Client, n int) (*crowd, error) {
	c := &crowd{events: make(chan etcdutil.Revision, n)}
	c.ctx, c.cancel = context.WithCancel(ctx)
	watchers := make([]*etcdutil.Watcher[string], n)
	err := byMany(n, func(i int) (err error) {
		watchers[i], err = etcdutil.Watch[string](c.ctx, client, watchedKey(i), etcdutil.WithCodec(etcdutil.Raw))
		return err
	})
	if err != nil {
		return nil, err
	}
	for _, w := range watchers {
		c.done.Go(func() {
			for e := range w.Events() {
				if e.Type == etcdutil.EventPut {
					c.events <- e.Revision
				}
			}
		})
	}
	return c, nil
}

func (c *crowd) close() {
	c.cancel()
	c.done.Wait()
}

// until waits for a condition.
func until(ctx context.Context, cond func() bool) error {
	for !cond() {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(time.Millisecond):
		}
	}
	return nil
}

// watchManyByHand is watchMany by clientv3, all on one stream.
func watchManyByHand(ctx context.Context, client *clientv3.Client, n int) (*crowd, error) {
	c := &crowd{events: make(chan etcdutil.Revision, n)}
	c.ctx, c.cancel = context.WithCancel(ctx)
	created := make(chan struct{}, n)
	for i := range n {
		watch := client.Watch(c.ctx, watchedKey(i), clientv3.WithCreatedNotify())
		c.done.Go(func() {
			for resp := range watch {
				if resp.Created {
					created <- struct{}{}
				}
				for _, e := range resp.Events {
					c.events <- e.Kv.ModRevision
				}
			}
		})
	}
	for range n {
		select {
		case <-created:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
	return c, nil
}

func idleWatchers(ctx context.Context, r *run) error {
	client, err := r.client()
	if err != nil {
		return err
	}
	defer func() { _ = client.Close() }()
	if _, err := client.Get(ctx, "x"); err != nil {
		return err
	}
	before, beforeServer, err := r.used()
	if err != nil {
		return err
	}
	c, err := watchMany(ctx, client, manyWatchers)
	if err != nil {
		return err
	}
	defer c.close()
	time.Sleep(6 * time.Second)
	start := time.Now()
	begin, beginServer, err := r.used()
	if err != nil {
		return err
	}
	time.Sleep(10 * time.Second)
	cpu, err := cpuTime()
	if err != nil {
		return err
	}
	d := time.Since(start)
	_, endServer, err := r.used()
	if err != nil {
		return err
	}
	held, heldServer := begin.since(before), beginServer.since(beforeServer)
	r.printf("%d watchers with readers: %.2f goroutines each", manyWatchers, float64(held.Goroutines)/manyWatchers)
	r.printf("memory: client %.1f MB, server %.1f MB, together %.1f MB", megabytes(held.Memory), megabytes(heldServer.Memory),
		megabytes(held.Memory+heldServer.Memory))
	r.printf("CPU while idle: client %.1f ms/s, server %.1f ms/s", perSecond(cpu-begin.CPU, d), perSecond(endServer.CPU-beginServer.CPU, d))
	return nil
}

// used returns what this process and the server use.
func (r *run) used() (client, server usage, err error) {
	if server, err = r.server.used(); err != nil {
		return usage{}, usage{}, err
	}
	client, err = used()
	return client, server, err
}

func megabytes(bytes uint64) float64 { return float64(bytes) / (1 << 20) }

// perSecond is a CPU time as milliseconds a second.
func perSecond(cpu, d time.Duration) float64 { return float64(cpu.Milliseconds()) / d.Seconds() }

// busyWatchers compares the CPU time of both libraries while keys change.
func busyWatchers(ctx context.Context, r *run) error {
	const changesPerSecond, rounds = 500, 3
	totals := map[string][]float64{}
	for range rounds {
		for name, watch := range contestants {
			total, err := busy(ctx, r, watch, changesPerSecond)
			if err != nil {
				return err
			}
			totals[name] = append(totals[name], total)
		}
	}
	ours, theirs := median(totals["etcdutil"]), median(totals["clientv3"])
	r.printf("%d watchers, %d changes/s: CPU of client and server: etcdutil %.0f ms/s, clientv3 %.0f ms/s: %.2f times",
		manyWatchers, changesPerSecond, ours, theirs, ours/theirs)
	return nil
}

var contestants = map[string]func(context.Context, *clientv3.Client, int) (*crowd, error){
	"etcdutil": watchMany,
	"clientv3": watchManyByHand,
}

func busy(ctx context.Context, r *run, watch func(context.Context, *clientv3.Client, int) (*crowd, error), rate int) (msPerSecond float64, err error) {
	client, err := r.client()
	if err != nil {
		return 0, err
	}
	defer func() { _ = client.Close() }()
	c, err := watch(ctx, client, manyWatchers)
	if err != nil {
		return 0, err
	}
	defer c.close()
	time.Sleep(time.Second)
	begin, beginServer, err := r.used()
	if err != nil {
		return 0, err
	}
	start := time.Now()
	changes := 10 * rate
	for i := range changes {
		if wait := time.Duration(i)*time.Second/time.Duration(rate) - time.Since(start); wait > 0 {
			time.Sleep(wait)
		}
		if _, err := client.Put(ctx, watchedKey(i%manyWatchers), "x"); err != nil {
			return 0, err
		}
	}
	for range changes {
		if err := c.next(ctx); err != nil {
			return 0, err
		}
	}
	d := time.Since(start)
	cpu, err := cpuTime()
	if err != nil {
		return 0, err
	}
	_, endServer, err := r.used()
	if err != nil {
		return 0, err
	}
	return perSecond(cpu-begin.CPU+endServer.CPU-beginServer.CPU, d), nil
}

// next waits for an event.
func (c *crowd) next(ctx context.Context) error {
	select {
	case <-c.events:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func openWatchers(ctx context.Context, r *run) error {
	for name, watch := range contestants {
		client, err := r.client()
		if err != nil {
			return err
		}
		d, err := open(ctx, client, watch, manyWatchers)
		_ = client.Close()
		if err != nil {
			return err
		}
		r.printf("%d watchers are opened: %s %.2f s", manyWatchers, name, d.Seconds())
	}
	return nil
}

func open(ctx context.Context, client *clientv3.Client, watch func(context.Context, *clientv3.Client, int) (*crowd, error), n int) (time.Duration, error) {
	if _, err := client.Get(ctx, "x"); err != nil {
		return 0, err
	}
	start := time.Now()
	c, err := watch(ctx, client, n)
	if err != nil {
		return 0, err
	}
	defer c.close()
	return time.Since(start), nil
}

func openWithPassword(ctx context.Context, r *run) error {
	const watchers = 400
	admin, err := r.client()
	if err != nil {
		return err
	}
	defer func() { _ = admin.Close() }()
	if err := enableAuth(ctx, admin, "secret"); err != nil {
		return err
	}
	client, err := r.client(func(c *clientv3.Config) { c.Username, c.Password = "root", "secret" })
	if err != nil {
		return err
	}
	defer func() { _ = client.Close() }()
	d, err := open(ctx, client, watchMany, watchers)
	if err != nil {
		return err
	}
	r.printf("%d watchers are opened by a user with a password: %.2f s", watchers, d.Seconds())
	return nil
}

// resetWatchers resets the connection under watchers, changes what they watch, and waits for the
// last event.
func resetWatchers(ctx context.Context, r *run) error {
	link, err := etcdtest.NewLink(r.server.endpoint)
	if err != nil {
		return err
	}
	defer func() { _ = link.Close() }()
	writer, err := r.client()
	if err != nil {
		return err
	}
	defer func() { _ = writer.Close() }()
	client, err := r.client(func(c *clientv3.Config) { c.Endpoints = []string{link.Endpoint()} })
	if err != nil {
		return err
	}
	defer func() { _ = client.Close() }()
	c, err := watchMany(ctx, client, manyWatchers)
	if err != nil {
		return err
	}
	defer c.close()
	for i := range manyWatchers {
		if _, err := writer.Put(ctx, watchedKey(i), "x"); err != nil {
			return err
		}
		if err := c.next(ctx); err != nil {
			return err
		}
	}
	link.Reset()
	start := time.Now()
	if err := putAll(ctx, writer); err != nil {
		return err
	}
	written := time.Since(start)
	for range manyWatchers {
		if err := c.next(ctx); err != nil {
			return err
		}
	}
	r.printf("%d watchers, a reset, a change for each: the last event after %.2f s (written after %.2f s)", manyWatchers,
		time.Since(start).Seconds(), written.Seconds())
	return nil
}

// putAll changes every watched key, in transactions of 100.
func putAll(ctx context.Context, client *clientv3.Client) error {
	for i := 0; i < manyWatchers; i += 100 {
		var ops []clientv3.Op
		for j := i; j < i+100; j++ {
			ops = append(ops, clientv3.OpPut(watchedKey(j), "y"))
		}
		if _, err := client.Txn(ctx).Then(ops...).Commit(); err != nil {
			return err
		}
	}
	return nil
}

type setting struct {
	Name    string   `json:"name"`
	Hosts   []string `json:"hosts"`
	Retries int      `json:"retries"`
}

// jsonEvents compares how many live events a second are decoded.
func jsonEvents(ctx context.Context, r *run) error {
	const rounds, events = 5, 20_000
	client, err := r.client()
	if err != nil {
		return err
	}
	defer func() { _ = client.Close() }()
	value, err := json.Marshal(setting{Name: "name", Hosts: []string{"a.example.com", "b.example.com"}, Retries: 3})
	if err != nil {
		return err
	}
	var ours, theirs []float64
	for i := range 2 * rounds {
		read, times := readTyped, &ours
		if i%2 == 1 {
			read, times = readByHand, &theirs
		}
		d, err := timeEvents(ctx, client, string(value), events, read)
		if err != nil {
			return err
		}
		*times = append(*times, events/d.Seconds())
	}
	r.printf("live JSON events: etcdutil %.0f/s, a loop over clientv3.Watch %.0f/s: %.2f times", median(ours), median(theirs),
		median(ours)/median(theirs))
	return nil
}

// timeEvents writes events while they are read.
func timeEvents(ctx context.Context, client *clientv3.Client, value string, n int, read func(context.Context, *clientv3.Client, int, chan<- struct{}) error) (time.Duration, error) {
	ready, done := make(chan struct{}), make(chan error, 1)
	go func() { done <- read(ctx, client, n, ready) }()
	<-ready
	start := time.Now()
	for written := 0; written < n; written += 100 {
		var ops []clientv3.Op
		for i := range 100 {
			ops = append(ops, clientv3.OpPut("json/"+strconv.Itoa(i), value))
		}
		if _, err := client.Txn(ctx).Then(ops...).Commit(); err != nil {
			return 0, err
		}
	}
	err := <-done
	return time.Since(start), err
}

func readTyped(ctx context.Context, client *clientv3.Client, n int, ready chan<- struct{}) error {
	w, err := etcdutil.Watch[setting](ctx, client, "json/", etcdutil.WithPrefix())
	if err != nil {
		return err
	}
	defer func() { _ = w.Close() }()
	if err := until(ctx, func() bool { return w.Revision() > 0 }); err != nil {
		return err
	}
	close(ready)
	for e := range w.Events() {
		if e.Type != etcdutil.EventPut {
			continue
		}
		if n--; n == 0 {
			return nil
		}
	}
	return context.Cause(w)
}

func readByHand(ctx context.Context, client *clientv3.Client, n int, ready chan<- struct{}) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	for resp := range client.Watch(ctx, "json/", clientv3.WithPrefix(), clientv3.WithCreatedNotify()) {
		if resp.Created {
			close(ready)
		}
		for _, e := range resp.Events {
			var v setting
			if err := json.Unmarshal(e.Kv.Value, &v); err != nil {
				return err
			}
			if n--; n == 0 {
				return nil
			}
		}
	}
	return fmt.Errorf("the watch ended: %w", context.Cause(ctx))
}

// catchUp compares how long watches from the past take.
func catchUp(ctx context.Context, r *run) error {
	const rounds, events = 3, 100_000
	client, err := r.client()
	if err != nil {
		return err
	}
	defer func() { _ = client.Close() }()
	first, err := writeMany(ctx, client, events)
	if err != nil {
		return err
	}
	var ours, theirs []float64
	for range rounds {
		start := time.Now()
		if err := catchUpTyped(ctx, client, first, events); err != nil {
			return err
		}
		ours = append(ours, time.Since(start).Seconds())
		start = time.Now()
		if err := catchUpByHand(ctx, client, first, events); err != nil {
			return err
		}
		theirs = append(theirs, time.Since(start).Seconds())
	}
	r.printf("%d small events are caught up with: etcdutil %.2f s, clientv3 %.2f s: %.2f times", events, median(ours), median(theirs),
		median(ours)/median(theirs))
	return nil
}

// writeMany writes keys, a revision each, and returns the first revision.
func writeMany(ctx context.Context, client *clientv3.Client, n int) (etcdutil.Revision, error) {
	resp, err := client.Put(ctx, "past/first", "")
	if err != nil {
		return 0, err
	}
	const writers = 32
	errs := make(chan error, writers)
	for w := range writers {
		go func() {
			for i := w; i < n-1; i += writers {
				if _, err := client.Put(ctx, "past/"+strconv.Itoa(i%1000), "small"); err != nil {
					errs <- err
					return
				}
			}
			errs <- nil
		}()
	}
	for range writers {
		if e := <-errs; e != nil {
			err = e
		}
	}
	return resp.Header.Revision, err
}

func catchUpTyped(ctx context.Context, client *clientv3.Client, from etcdutil.Revision, n int) error {
	w, err := etcdutil.Watch[string](ctx, client, "past/", etcdutil.WithPrefix(), etcdutil.WithRevision(from), etcdutil.WithCodec(etcdutil.Raw))
	if err != nil {
		return err
	}
	defer func() { _ = w.Close() }()
	for e := range w.Events() {
		if e.Type != etcdutil.EventPut {
			continue
		}
		if n--; n == 0 {
			return nil
		}
	}
	return context.Cause(w)
}

func catchUpByHand(ctx context.Context, client *clientv3.Client, from etcdutil.Revision, n int) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	for resp := range client.Watch(ctx, "past/", clientv3.WithPrefix(), clientv3.WithRev(from)) {
		if n -= len(resp.Events); n <= 0 {
			return nil
		}
	}
	return fmt.Errorf("the watch ended: %w", context.Cause(ctx))
}

func median(v []float64) float64 {
	v = slices.Sorted(slices.Values(v))
	return v[len(v)/2]
}
