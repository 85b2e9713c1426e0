package main

import (
	"context"
	"time"

	"example.com/etcdutil"
	clientv3 "go.etcd.io/etcd/client/v3"
)

const (
	// holedName is a lock of the host for which one member at a time is a black hole. Its client has no
	// keepalive for connections, and so clientv3 does not notice.
	holedName = "exclusion/holed"
	// holedTTL is longer than what is measured: the lease's end is not what tells the holder.
	holedTTL = 20 * time.Second
	// acquiredWithin bounds an Acquire of a free lock though one of three members is a black hole, with a
	// second for a busy machine.
	acquiredWithin = 2500*time.Millisecond + time.Second
	// holedToldWithin bounds how late the holder is told that its key was deleted though the member that
	// it heard from is a black hole, with time for a busy machine.
	holedToldWithin = 5*time.Second + 1500*time.Millisecond
)

// startHoled has the client acquire a lock, hold it, and wait until it is told that its key was deleted.
func (t *torture) startHoled(h *host) { t.work(h, holedName, true, (*worker).holdHoled) }

func (w *worker) holdHoled() {
	begun := w.now()
	lock, h := w.acquire(w.ctx, holedName, etcdutil.WithTTL(holedTTL))
	if lock == nil {
		return
	}
	w.operations.add("holed: acquired", 1)
	if took := w.quiet(begun, w.now()); took > acquiredWithin {
		w.violate("black hole: Acquire took %v, from %v on, of which %v were quiet", ms(w.now()-begun), ms(begun), ms(took))
	}
	w.hold(lock, w.upTo(3*time.Second))
	if !w.settling.Load() {
		w.awaitTold(lock, h)
	}
	w.release(lock, h)
}

// awaitTold deletes the lock's key and waits for the lock's end.
func (w *worker) awaitTold(lock *etcdutil.Lock, h *holding) {
	ctx, cancel := context.WithTimeout(w.ctx, 3*time.Second)
	defer cancel()
	if !deleteLockKey(ctx, w.admin, w.ledger, h) {
		return
	}
	deleted := w.now()
	for lock.Err() == nil && w.ctx.Err() == nil && w.quiet(deleted, w.now()) < holedToldWithin {
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
