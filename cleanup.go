package etcdutil

import (
	"container/heap"
	"context"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// maxClosing bounds how long Close may take.
const maxClosing = 5 * time.Second

// releasePolicy is how a resource is released within bound: with time for a second attempt, which
// may reach another member.
func releasePolicy(bound time.Duration) RetryPolicy {
	bound = max(min(bound, maxClosing), time.Millisecond)
	p := RetryPolicy{Elapsed: bound}
	if bound < 2*firstAttemptTimeout {
		p.AttemptTimeout = bound / 2
	}
	return p
}

// untilDone is the policy of work that ends with its context, and not before.
var untilDone = RetryPolicy{Elapsed: -1}

// lateWindow is how long a request that was given up may still arrive.
const lateWindow = 30 * time.Second

// backgroundWait is how long a call that fails waits for the cleanup behind it: as long as that
// takes when etcd can be reached.
const backgroundWait = 25 * time.Millisecond

// maxCleaners bounds the goroutines that clean up for one client, and maxCleanups what waits for
// them. Leases beyond are left to their TTL.
const (
	maxCleaners = 16
	maxCleanups = 10_000
)

// A cleanup removes in the background what a call has left in etcd, or may have left. The caller's
// context may end long before etcd can be reached again.
type cleanup struct {
	ctx    context.Context // for its values; see over
	config *config
	what   string
	// remove is called again after the duration that it returns, unless that is 0, and after an
	// error.
	remove func(ctx context.Context) (again time.Duration, err error)
	// over reports that nothing is left to remove.
	over func() bool

	// Guarded by cleaners.
	state   cleanupState
	due     time.Time
	index   int // in cleaner.queue
	failed  int
	waiting []chan struct{} // to be closed after the next call of remove
	running []chan struct{} // to be closed after the call that runs
}

type cleanupState int

const (
	cleanupIdle cleanupState = iota
	cleanupQueued
	cleanupRunning
	cleanupRequested // running, and to run again at once
)

// cleaner runs the cleanups of one client. It has no goroutine while none is due.
type cleaner struct {
	client  *clientv3.Client
	queue   cleanupQueue
	workers int
	timer   *time.Timer
}

// cleaners has the cleaner of each client that has cleanups. Its mutex guards them all.
var cleaners = struct {
	sync.Mutex
	byClient map[*clientv3.Client]*cleaner
}{byClient: make(map[*clientv3.Client]*cleaner)}

// schedule has the cleanup run at once, or once more if it is running. The channel is closed when
// it has run.
func (job *cleanup) schedule() <-chan struct{} {
	cleaners.Lock()
	defer cleaners.Unlock()
	ran := make(chan struct{})
	c := cleaners.byClient[job.config.client]
	if c == nil {
		c = &cleaner{client: job.config.client}
		cleaners.byClient[c.client] = c
	}
	switch {
	case job.state == cleanupIdle && len(c.queue) >= maxCleanups:
		close(ran)
		return ran
	case job.state == cleanupIdle:
		c.push(job, time.Now())
	case job.state == cleanupQueued:
		job.due = time.Now()
		heap.Fix(&c.queue, job.index)
	default:
		job.state = cleanupRequested
	}
	job.waiting = append(job.waiting, ran)
	c.startWorkers()
	return ran
}

// runInBackground schedules the cleanup and waits for it only as long as it takes when etcd can be
// reached.
func (job *cleanup) runInBackground() {
	timer := time.NewTimer(backgroundWait)
	defer timer.Stop()
	select {
	case <-job.schedule():
	case <-timer.C:
	}
}

func (c *cleaner) push(job *cleanup, due time.Time) {
	job.state, job.due = cleanupQueued, due
	heap.Push(&c.queue, job)
}

// pop takes the first cleanup from the queue, and with it those that wait for its next run.
func (c *cleaner) pop(state cleanupState) *cleanup {
	job := heap.Pop(&c.queue).(*cleanup)
	job.state = state
	job.running, job.waiting = job.waiting, nil
	return job
}

func (c *cleaner) startWorkers() {
	for c.workers < min(maxCleaners, len(c.queue)) {
		c.workers++
		go c.work() // until nothing is due
	}
}

func (c *cleaner) work() {
	for {
		job := c.next()
		if job == nil {
			return
		}
		again, err := job.run()
		c.finish(job, again, err)
	}
}

// next takes the next cleanup that is due. Without one the worker is to end.
func (c *cleaner) next() *cleanup {
	cleaners.Lock()
	defer cleaners.Unlock()
	for len(c.queue) > 0 && (c.client.Ctx().Err() != nil || c.queue[0].over()) {
		job := c.pop(cleanupIdle)
		job.release()
	}
	if len(c.queue) > 0 && !c.queue[0].due.After(time.Now()) {
		return c.pop(cleanupRunning)
	}
	c.workers--
	switch {
	case len(c.queue) > 0:
		c.wakeAt(c.queue[0].due)
	case c.workers == 0:
		delete(cleaners.byClient, c.client)
	}
	return nil
}

// wakeAt starts workers when the next cleanup is due, or soon, if the client is closed meanwhile.
func (c *cleaner) wakeAt(due time.Time) {
	if c.timer != nil {
		c.timer.Stop()
	}
	c.timer = time.AfterFunc(min(time.Until(due), lateWindow/10), func() {
		cleaners.Lock()
		defer cleaners.Unlock()
		c.startWorkers()
	})
}

// run calls remove once. Each call may reach another member.
func (job *cleanup) run() (again time.Duration, err error) {
	ctx, stop := context.WithCancel(context.WithoutCancel(job.ctx))
	defer stop()
	defer context.AfterFunc(job.config.client.Ctx(), stop)()
	again, _, err = attemptOnce(ctx, job.config.client, untilDone.attemptTimeout(job.failed), job.remove)
	return again, withConnectionError(job.config.client, err)
}

// finish queues the cleanup again if it is not done.
func (c *cleaner) finish(job *cleanup, again time.Duration, err error) {
	if err != nil {
		job.config.reporter.retrying(RetryEvent{Op: job.what, Attempt: job.failed + 1, Err: err})
	}
	cleaners.Lock()
	defer cleaners.Unlock()
	requested := job.state == cleanupRequested
	job.release()
	switch {
	case err != nil:
		job.failed++
		again = reopenPolicy.backoff(job.failed)
		if !IsTransient(err) && !isContextError(err) {
			again = max(again, min(time.Second<<min(job.failed-1, 4), lateWindow/3)) // permissions come back
		}
	default:
		job.failed = 0
	}
	switch {
	case requested:
		c.push(job, time.Now())
	case again > 0:
		c.push(job, time.Now().Add(again))
	default:
		job.state = cleanupIdle
	}
}

// release lets those go on that wait for the run.
func (job *cleanup) release() {
	for _, w := range job.running {
		close(w)
	}
	job.running = nil
}

// cleanupQueue is a heap of cleanups: the next that is due comes first.
type cleanupQueue []*cleanup

func (q cleanupQueue) Len() int           { return len(q) }
func (q cleanupQueue) Less(i, j int) bool { return q[i].due.Before(q[j].due) }
func (q cleanupQueue) Swap(i, j int) {
	q[i], q[j] = q[j], q[i]
	q[i].index, q[j].index = i, j
}

func (q *cleanupQueue) Push(x any) {
	job := x.(*cleanup)
	job.index = len(*q)
	*q = append(*q, job)
}

func (q *cleanupQueue) Pop() any {
	last := len(*q) - 1
	job := (*q)[last]
	(*q)[last] = nil
	*q = (*q)[:last]
	return job
}

// revokeInBackground revokes a lease, and for repeatFor once more now and then, if the lost request
// that grants it may still arrive. It ends after ttl: then the lease has expired.
func revokeInBackground(ctx context.Context, c *config, id clientv3.LeaseID, ttl, repeatFor time.Duration) {
	expired := time.Now().Add(ttl)
	var until time.Time
	job := &cleanup{
		ctx: ctx, config: c, what: "revoke lease " + hexID(id),
		over: func() bool { return time.Now().After(expired) },
		remove: func(ctx context.Context) (time.Duration, error) {
			if err := revokeLease(ctx, c, id); err != nil {
				return 0, err
			}
			if until.IsZero() {
				until = time.Now().Add(repeatFor)
			}
			if time.Now().Before(until) {
				return lateWindow / 10, nil
			}
			return 0, nil
		},
	}
	job.runInBackground()
}

// maxRefused is after how many refusals a sweep gives up. It must end before its attempt does, or
// the next one comes too soon.
const maxRefused = 32

// removeKeys deletes the keys that are attached to the lease: many at once, and each by itself
// where that is refused. It adds to refused those that etcd refuses to delete, and leaves out those
// that are there. After too many it gives up.
func removeKeys(ctx context.Context, client *clientv3.Client, id clientv3.LeaseID, keys []string, refused map[string]error) error {
	keys = slices.DeleteFunc(keys, func(key string) bool { return refused[key] != nil })
	// Each has its turn, in one sweep or another.
	rand.Shuffle(len(keys), func(i, j int) { keys[i], keys[j] = keys[j], keys[i] })
	for batch := range slices.Chunk(keys, 64) {
		err := removeAtOnce(ctx, client, id, batch)
		switch {
		case err == nil:
		case isContextError(err) || IsTransient(err): // the others would fare no better
			return err
		case len(refused) >= maxRefused:
			return err
		case len(keys) == 1:
			refused[keys[0]] = err
		default:
			for one := range slices.Chunk(batch, 1) {
				if err := removeKeys(ctx, client, id, one, refused); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// removeAtOnce deletes keys that are attached to the lease. A delete is guarded by the key's create
// revision: if it arrives late it deletes no key that was created since.
func removeAtOnce(ctx context.Context, client *clientv3.Client, id clientv3.LeaseID, keys []string) error {
	var gets, deletes []clientv3.Op
	for _, key := range keys {
		gets = append(gets, clientv3.OpGet(key, clientv3.WithKeysOnly())) // no lease, in etcd 3.7
	}
	resp, err := client.Txn(ctx).Then(gets...).Commit()
	if err != nil {
		return err
	}
	for i, r := range resp.Responses {
		for _, kv := range r.GetResponseRange().Kvs {
			unchanged := []clientv3.Cmp{
				clientv3.Compare(clientv3.CreateRevision(keys[i]), "=", kv.CreateRevision),
				clientv3.Compare(clientv3.LeaseValue(keys[i]), "=", id), // else somebody else has written it
			}
			deletes = append(deletes, clientv3.OpTxn(unchanged, []clientv3.Op{clientv3.OpDelete(keys[i])}, nil))
		}
	}
	if len(deletes) == 0 {
		return nil
	}
	_, err = client.Txn(ctx).Then(deletes...).Commit()
	return err
}

// inBackground runs f and waits for it only as long as it takes when etcd can be reached. What a
// failed call may have left is removed so, since the caller's context may end long before etcd is
// back.
func inBackground(f func()) {
	done := make(chan struct{})
	go func() { // until f's own bound
		defer close(done)
		f()
	}()
	select {
	case <-done:
	case <-time.After(backgroundWait):
	}
}
