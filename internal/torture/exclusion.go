package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"sync"
	"time"

	"example.com/etcdutil"
	clientv3 "go.etcd.io/etcd/client/v3"
)

const (
	// strictName is a lock that nobody takes away: to it the rule applies in full. Faults are aimed
	// at its holder.
	strictName = "exclusion/strict"
	// disturbedName is a lock whose keys the torture deletes and whose leases it revokes.
	disturbedName = "exclusion/disturbed"
	// sharedName is a lock that clients hold by leases which they share, several clients to a
	// lease.
	sharedName = "exclusion/shared"
	// reusedName is such a lock, for hosts whose leases are never lost: their links are slow at
	// times, and no more. So keys are used again and again while somebody looks at them, and who
	// waits for the wrong one waits for ever.
	reusedName = "exclusion/reused"
	// contestedName is a lock for which clients try, slowly: others take it between a client's look
	// and its write.
	contestedName = "exclusion/contested"
)

// calmTTL is of the leases of calm hosts. No fault keeps a calm host from renewing for as long.
const calmTTL = 5 * leaseTTL

func (t *torture) startExclusion(h *host) {
	t.work(h, strictName, true, (*worker).holdStrict)
	t.work(h, disturbedName, true, (*worker).holdDisturbed)
	t.work(h, contestedName, true, (*worker).holdContested)
	t.startSharing(h, sharedName, leaseTTL, nil)
}

// startSharing has three clients share a lease. It calls lost, unless nil, when that is lost.
func (t *torture) startSharing(h *host, name string, ttl time.Duration, lost func(time.Duration, error)) {
	lease := &sharedLease{host: h, ttl: ttl, lost: lost}
	for range 2 {
		t.work(h, name, true, func(w *worker) { w.holdShared(name, lease) })
	}
	private := fmt.Sprintf("exclusion/private-%d", h.id)
	t.work(h, private, true, func(w *worker) { w.holdPrivate(lease, private) })
	t.atEnd(lease.close)
}

// holdStrict holds the lock for a moment, or for so long that a fault is likely to hit, or beyond
// its parent's end.
func (w *worker) holdStrict() {
	parent, cancel := context.WithCancel(w.ctx)
	defer cancel()
	lock, h := w.acquire(parent, strictName, w.options()...)
	if lock == nil {
		return
	}
	switch w.rand.IntN(4) {
	case 0, 1:
		w.hold(lock, w.upTo(100*time.Millisecond))
		w.awaitNetwork(lock)
	case 2:
		w.hold(lock, time.Second+w.upTo(2*time.Second))
		w.awaitNetwork(lock)
	case 3:
		w.hold(lock, w.upTo(300*time.Millisecond))
		cancel()
		w.hold(w.ctx, w.upTo(2500*time.Millisecond)) // it winds down: nothing is released before Close
	}
	w.release(lock, h)
	sleep(w.ctx, w.upTo(50*time.Millisecond))
}

// awaitNetwork holds a lock for longer: without its network the work does not get done.
func (w *worker) awaitNetwork(held context.Context) {
	for end := time.Now().Add(6 * time.Second); w.host.faulted.Load() && held.Err() == nil && time.Now().Before(end); {
		sleep(held, 20*time.Millisecond)
	}
}

// options are those of a lease of its own, and at times a bound on the wait.
func (w *worker) options() []etcdutil.LockOption {
	opts := []etcdutil.LockOption{etcdutil.WithTTL(leaseTTL)}
	if w.chance(30) {
		opts = append(opts, etcdutil.WithLogger(slog.New(&w.logs)))
	}
	if !w.settling.Load() && w.chance(20) {
		opts = append(opts, etcdutil.WithAcquireTimeout(time.Millisecond+w.upTo(4*time.Second)))
	}
	return opts
}

func (w *worker) holdDisturbed() {
	opts := w.options()
	if w.host.id >= hosts { // where leases live on for others to see what a logger does
		opts = append(opts, etcdutil.WithLogger(slog.New(&w.logs)))
	}
	lock, h := w.acquire(w.ctx, disturbedName, opts...)
	if lock == nil {
		return
	}
	for end := w.now() + w.upTo(4*time.Second); lock.Err() == nil && w.ctx.Err() == nil && w.now() < end; {
		w.commitDisturbed(lock)
		w.hold(lock, w.upTo(200*time.Millisecond))
		if w.settling.Load() {
			break
		}
	}
	w.release(lock, h)
	sleep(w.ctx, w.upTo(50*time.Millisecond))
}

// commitDisturbed writes under a lock that is taken away at any time, by Commit or by a LogWriter.
func (w *worker) commitDisturbed(lock *etcdutil.Lock) {
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond+w.upTo(5*time.Second))
	defer cancel()
	if w.chance(50) {
		ctx = context.WithValue(ctx, disturbedWrite{}, true)
	}
	if w.chance(50) {
		w.writeEntries(ctx, lock, w.disturbedLog, 1, func() {})
		return
	}
	one := appended{value: w.uniqueValue(), call: w.now()}
	var err error
	one.place, err = lock.Commit(ctx, clientv3.OpPut(disturbedKey, strconv.Quote(one.value)))
	one.outcome, one.err, one.back = outcomeOfCommit(err), err, w.now()
	w.commits.add(one)
	w.operations.add("disturbed commit: "+string(one.outcome), 1)
}

// holdContested tries for the lock, and is slow to write after it has looked, or acquires it.
func (w *worker) holdContested() {
	var lock *etcdutil.Lock
	var h *holding
	if w.settling.Load() || w.chance(40) {
		lock, h = w.acquire(w.ctx, contestedName, w.options()...)
	} else {
		slow := withHesitation(w.ctx, w.upTo(100*time.Millisecond))
		lock, h = w.tryAcquire(slow, contestedName, etcdutil.WithTTL(leaseTTL))
	}
	if lock == nil {
		return
	}
	w.hold(lock, w.upTo(100*time.Millisecond))
	w.release(lock, h)
	sleep(w.ctx, w.upTo(200*time.Millisecond))
}

// holdShared is in a hurry, and often gives up, but not where that would free those who wait for
// the wrong key.
func (w *worker) holdShared(name string, shared *sharedLease) {
	lease := shared.get(w)
	if lease == nil {
		return
	}
	var lock *etcdutil.Lock
	var h *holding
	switch {
	case w.settling.Load() || name == reusedName || w.chance(60):
		lock, h = w.acquire(w.ctx, name, etcdutil.WithLease(lease))
	case w.chance(50):
		lock, h = w.acquire(w.ctx, name, etcdutil.WithLease(lease), etcdutil.WithAcquireTimeout(time.Millisecond+w.upTo(30*time.Millisecond)))
	default:
		lock, h = w.tryAcquire(w.ctx, name, etcdutil.WithLease(lease))
	}
	if lock == nil {
		return
	}
	w.hold(lock, w.upTo(5*time.Millisecond))
	w.release(lock, h)
	sleep(w.ctx, w.upTo(10*time.Millisecond))
}

// holdPrivate uses the shared lease for a name of its own: a lease's locks take their keys in turn,
// and so the others come to use theirs again.
func (w *worker) holdPrivate(shared *sharedLease, name string) {
	lease := shared.get(w)
	if lease == nil {
		return
	}
	if lock, h := w.acquire(w.ctx, name, etcdutil.WithLease(lease)); lock != nil {
		w.release(lock, h)
	}
	sleep(w.ctx, 5*time.Millisecond+w.upTo(20*time.Millisecond))
}

// sharedLease is a host's lease for many locks, granted anew when it is lost.
type sharedLease struct {
	host  *host
	ttl   time.Duration
	lost  func(at time.Duration, cause error) // may be nil
	mu    sync.Mutex
	lease *etcdutil.Lease
}

// get returns nil, after a while, if there is no lease to be had.
func (s *sharedLease) get(w *worker) *etcdutil.Lease {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.lease != nil && s.lease.Err() == nil {
		return s.lease
	}
	if s.lease != nil {
		_ = s.lease.Close()
		s.lease = nil
	}
	lease, err := etcdutil.NewLease(w.caller(w.ctx), s.host.client, s.ttl)
	if err != nil {
		w.operations.add("grant: "+outcomeOf(err), 1)
		sleep(w.ctx, w.upTo(20*time.Millisecond))
		return nil
	}
	s.lease = lease
	if s.lost != nil {
		context.AfterFunc(lease, func() { s.noteLoss(w.now(), context.Cause(lease)) })
	}
	return lease
}

func (s *sharedLease) noteLoss(at time.Duration, cause error) {
	if errors.Is(cause, etcdutil.ErrLeaseExpired) || errors.Is(cause, etcdutil.ErrLeaseRevoked) {
		s.lost(at, cause)
	}
}

func (s *sharedLease) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.lease != nil {
		_ = s.lease.Close()
	}
}
