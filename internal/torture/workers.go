package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"example.com/etcdutil"
)

// leaseTTL is the shortest that etcd grants: the faults are many, and the time is short.
const leaseTTL = 2 * time.Second

// A worker is one client of one workload, on one host.
type worker struct {
	*torture
	ledger  *ledger
	host    *host
	rand    *rand.Rand
	waiting *waiter
	id      int64
	values  int // made by uniqueValue
}

// work runs a workload's step, again and again, until the run ends.
func (t *torture) work(h *host, name string, contends bool, step func(w *worker)) {
	w := &worker{torture: t, ledger: t.ledger, host: h, rand: t.newRand(), id: t.workers.Add(1)}
	if contends {
		w.waiting = t.waiters.add(name, h.id)
	}
	t.working.Go(func() {
		for t.ctx.Err() == nil {
			step(w)
			sleep(t.ctx, w.upTo(rest))
		}
	})
}

// acquire takes a lock and notes it. After an error it waits a little, and returns nil.
func (w *worker) acquire(parent context.Context, name string, opts ...etcdutil.LockOption) (*etcdutil.Lock, *holding) {
	lock, err := etcdutil.Acquire(w.caller(parent), w.host.client, name, opts...)
	return w.acquired(name, lock, err)
}

func (w *worker) tryAcquire(parent context.Context, name string, opts ...etcdutil.LockOption) (*etcdutil.Lock, *holding) {
	lock, err := etcdutil.TryAcquire(w.caller(parent), w.host.client, name, opts...)
	return w.acquired(name, lock, err)
}

func (w *worker) acquired(name string, lock *etcdutil.Lock, err error) (*etcdutil.Lock, *holding) {
	if err != nil {
		w.operations.add("acquire: "+outcomeOf(err), 1)
		sleep(w.ctx, w.upTo(20*time.Millisecond))
		return nil, nil
	}
	h := w.ledger.begin(w.host.id, lock)
	w.holders.add(name, 1)
	w.waiting.had(w.now())
	return lock, h
}

// closedWithin bounds a Close, with a second for a busy machine.
const closedWithin = 5*time.Second + time.Second

// release gives a lock back, and checks that Close returns nothing but what it may, and returns in
// time.
func (w *worker) release(lock *etcdutil.Lock, h *holding) {
	w.ledger.release(h)
	begun := w.now()
	err := lock.Close()
	if took := w.ran(begun); took > closedWithin {
		w.violate("release: %s: Close took %v", lock.Name(), ms(took))
	}
	w.operations.add("release: "+outcomeOf(err), 1)
	if err != nil && !errors.Is(err, etcdutil.ErrLockLost) && !errors.Is(err, etcdutil.ErrUnknownOutcome) {
		w.violate("release: %s: Close returned neither loss nor doubt: %v", lock.Name(), err)
	}
}

func outcomeOf(err error) string {
	switch {
	case err == nil:
		return "done"
	case errors.Is(err, etcdutil.ErrUnknownOutcome):
		return "unknown outcome"
	case errors.Is(err, etcdutil.ErrLockLost):
		return "lock lost"
	case errors.Is(err, etcdutil.ErrLockHeld):
		return "held by another"
	case errors.Is(err, context.DeadlineExceeded):
		return "timed out"
	case errors.Is(err, context.Canceled):
		return "canceled"
	}
	return "failed"
}

// uniqueValue is of the form HOST-WORKER-NUMBER.
func (w *worker) uniqueValue() string {
	w.values++
	return fmt.Sprintf("%d-%d-%d", w.host.id, w.id, w.values)
}

func (w *worker) upTo(d time.Duration) time.Duration {
	return time.Duration(w.rand.Int64N(int64(d) + 1))
}

func (w *worker) chance(percent int) bool { return w.rand.IntN(100) < percent }

// hold stays for up to d, or until ctx ends; for a moment once the faults have stopped, for then
// everybody is to have a turn.
func (w *worker) hold(ctx context.Context, d time.Duration) {
	if w.settling.Load() {
		d = min(d, 20*time.Millisecond)
	}
	for end := time.Now().Add(d); ctx.Err() == nil && time.Now().Before(end) && w.ctx.Err() == nil; {
		sleep(ctx, min(50*time.Millisecond, time.Until(end)))
		if w.settling.Load() {
			return
		}
	}
}

// upToTimes is a number from 1 to n: 1 once the faults have stopped.
func (w *worker) upToTimes(n int) int {
	if w.settling.Load() {
		return 1
	}
	return 1 + w.rand.IntN(n)
}

// waiters records who contends for locks, to see whether all of them get their turn.
type waiters struct {
	mu  sync.Mutex
	all []*waiter
}

type waiter struct {
	name string
	host int
	mu   sync.Mutex
	last time.Duration // when it last had its lock
}

func (ws *waiters) add(name string, host int) *waiter {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	w := &waiter{name: name, host: host, last: -1}
	ws.all = append(ws.all, w)
	return w
}

func (w *waiter) had(at time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.last = at
}

// since are those that have not had their lock since then.
func (ws *waiters) since(then time.Duration) (without []*waiter) {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	for _, w := range ws.all {
		w.mu.Lock()
		if w.last <= then {
			without = append(without, w)
		}
		w.mu.Unlock()
	}
	return without
}
