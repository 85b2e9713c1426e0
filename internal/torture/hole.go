package main

import (
	"context"
	"fmt"
	"time"

	"example.com/etcdutil"
	clientv3 "go.etcd.io/etcd/client/v3"
)

const (
	// holedName begins the names of the locks of hosts for which one member at a time is a black
	// hole. Their clients have no keepalive for connections, and so clientv3 does not notice.
	holedName = "exclusion/holed"
	// holedTTL is longer than what is measured: the lease's end does not notify the holder.
	holedTTL = 20 * time.Second
	// acquiredWithin bounds an Acquire of a free lock though one of three members is a black hole,
	// with time for a busy machine: 2.5 s is asserted by a test that has the machine to itself.
	acquiredWithin = 2500*time.Millisecond + 4*time.Second
	// longAttempt is how long a request may wait for the black hole, once several have timed out
	// because all members had a fault.
	longAttempt = 5 * time.Second
	// holedToldWithin bounds how late the holder is notified that its key was deleted though the
	// member that it heard from is a black hole, with time for a busy machine.
	holedToldWithin = 5*time.Second + 5*time.Second
	// holedToldAtLast bounds the same, whatever else has a fault meanwhile.
	holedToldAtLast = 20 * time.Second
)

// startHoled has the client hold a lock when its host loses a member, and acquire locks meanwhile.
func (t *torture) startHoled(h *host) {
	name := fmt.Sprintf("%s-%d", holedName, h.id)
	t.work(h, name, true, func(w *worker) { w.holdHoled(name) })
}

// holdHoled holds a lock from before a member is a black hole, and expects to be notified when its
// key is deleted, although its watch may be on that member. Then it acquires the lock while that
// lasts.
func (w *worker) holdHoled(name string) {
	lock, h := w.acquireQuickly(name)
	if lock == nil {
		return
	}
	for !w.host.faulted.Load() && !w.settling.Load() && lock.Err() == nil {
		sleep(lock, 10*time.Millisecond)
	}
	if !w.settling.Load() {
		sleep(lock, w.upTo(300*time.Millisecond))
		w.awaitTold(lock, h)
	}
	w.release(lock, h)
	for w.host.faulted.Load() && w.ctx.Err() == nil {
		if lock, h := w.acquireQuickly(name); lock != nil {
			w.release(lock, h)
		}
		sleep(w.ctx, 50*time.Millisecond+w.upTo(200*time.Millisecond))
	}
	sleep(w.ctx, 20*time.Millisecond)
}

// acquireQuickly acquires a free lock, and checks how long that takes.
func (w *worker) acquireQuickly(name string) (*etcdutil.Lock, *holding) {
	begun := w.now()
	lock, h := w.acquire(w.ctx, name, etcdutil.WithTTL(holedTTL))
	if lock == nil {
		return nil, nil
	}
	w.operations.add("holed: acquired", 1)
	within := acquiredWithin
	if w.troubles.between(everyHost, begun, w.now()) {
		within += longAttempt
	}
	if took := w.quiet(begun, w.now()); took > within {
		w.violate("black hole: Acquire of %s took %v, from %v on, of which %v were quiet", name, ms(w.now()-begun), ms(begun), ms(took))
	}
	return lock, h
}

// awaitTold deletes the lock's key and waits for the lock's end.
func (w *worker) awaitTold(lock *etcdutil.Lock, h *holding) {
	ctx, cancel := context.WithTimeout(w.ctx, 3*time.Second)
	defer cancel()
	if !deleteLockKey(ctx, w.admin, w.ledger, h) {
		return
	}
	deleted := w.now()
	for lock.Err() == nil && w.ctx.Err() == nil && w.quiet(deleted, w.now()) < holedToldWithin && w.now()-deleted < holedToldAtLast {
		sleep(lock, 10*time.Millisecond)
	}
	if w.ctx.Err() == nil && lock.Err() == nil {
		w.violate("black hole: %s: the key was deleted at %v, and the holder was not told by %v", lock.Name(), ms(deleted), ms(w.now()))
		return
	}
	w.operations.add("holed: told", 1)
}

// quiet is for how long within a time neither the members had a fault nor this process was stalled.
func (t *torture) quiet(from, to time.Duration) time.Duration {
	return to - from - t.troubles.within(everyHost, from, to) - slowness*within(t.pulse.all(), from, to)
}

func newHoledHost(id int, members []string) (*host, error) {
	h, err := newHost(id, members)
	if err != nil {
		return nil, err
	}
	config := clientConfig(h.endpoints())
	config.DialKeepAliveTime = 0
	h.client, err = clientv3.New(config)
	return h, err
}
