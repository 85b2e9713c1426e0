package main

import (
	"context"
	"fmt"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// inject carries out the schedule, and returns when its last fault is healed.
func (t *torture) inject(schedule []fault) {
	var faults sync.WaitGroup
	for _, f := range schedule {
		sleep(t.ctx, t.begun+f.At-t.now())
		faults.Go(func() { t.injectOne(f) })
	}
	faults.Wait()
}

func (t *torture) injectOne(f fault) {
	done, err := t.carryOut(f)
	switch {
	case err != nil:
		t.fail(fmt.Errorf("%s: %w", f.Kind, err))
	case done:
		t.faults.add(string(f.Kind), 1)
	}
}

// carryOut reports whether there was anything to do the fault to.
func (t *torture) carryOut(f fault) (done bool, err error) {
	switch f.Kind {
	case killLeader, stopMember, stopTwo, isolateLeader, isolateMember:
		return true, t.faultMembers(f)
	case cutHolder, cutLeader, holdBack, cutLink, dropReplies, delayLink, resetLink:
		return t.faultLinks(f), nil
	case cancelUnsent, cancelApplied, cancelLate:
		return t.faultAnswers(f), nil
	case addMetadata:
		return t.addMetadata(f), nil
	case blockLogs, panicLogs:
		t.logs.start(f.Kind)
		sleep(context.Background(), f.For)
		t.logs.stop()
		return true, nil
	case cutCrowd, resetCrowd:
		t.faultCrowd(f)
		return true, nil
	case deleteRegistered:
		return t.deleteRegistered(f), nil
	case blackHole:
		return t.blackHole(f), nil
	case restoreIsland:
		return true, t.island.restore(f)
	case denyIsland:
		return true, t.island.deny(f)
	case takeIsland:
		return t.island.deleteKey(), nil
	case deleteKey, revokeLease:
		return t.takeLock(f.Kind)
	case compact:
		return t.compact(f.Behind)
	case pauseHolders, lateHolders:
		return t.pauseHolders(f), nil
	}
	return false, fmt.Errorf("unknown fault")
}

func (t *torture) faultMembers(f fault) error {
	member, do, undo := f.Member, t.cluster.Stop, t.cluster.Restart
	if f.Kind == killLeader || f.Kind == isolateLeader {
		if leader := t.cluster.Leader(); leader >= 0 {
			member = leader
		}
	}
	if f.Kind == isolateLeader || f.Kind == isolateMember {
		do, undo = t.cluster.Isolate, t.cluster.Rejoin
	}
	targets := []int{member}
	if f.Kind == stopTwo {
		targets = append(targets, (member+1)%members)
	}
	defer t.troubles.begin(everyHost)()
	if err := each(targets, do); err != nil {
		return err
	}
	sleep(context.Background(), f.For)
	return each(targets, undo)
}

func each(members []int, do func(int) error) error {
	for _, m := range members {
		if err := do(m); err != nil {
			return err
		}
	}
	return nil
}

func (t *torture) faultLinks(f fault) bool {
	h := t.target(f)
	if h == nil {
		return false
	}
	defer h.faulted.Store(false)
	if f.Kind != delayLink || f.Delay > harmless {
		defer t.troubles.begin(h.id)()
	}
	if f.Kind == holdBack {
		sleep(t.ctx, 20*time.Millisecond) // until the holder has read, and is about to write
	}
	for _, l := range h.to(f.Member) {
		switch f.Kind {
		case cutHolder, cutLeader, cutLink:
			l.Cut()
		case dropReplies:
			l.DropReplies()
		case delayLink, holdBack:
			l.Delay(f.Delay)
		case resetLink:
			l.Reset()
		}
	}
	sleep(context.Background(), f.For)
	h.heal()
	return true
}

// harmless is a delay with which everybody is still notified in time.
const harmless = 100 * time.Millisecond

// aims are the locks at whose holders faults are aimed: where they are the likeliest to break
// something.
var aims = map[kind]string{
	cutHolder:     strictName,
	cutLeader:     leaderName,
	cutLink:       strictName,
	delayLink:     strictName,
	holdBack:      quickSet.Name,
	dropReplies:   registerName,
	resetLink:     registerName,
	cancelApplied: disturbedName,
}

// faultAnswers spoils the answers to one host's writes. While the answer to a write that is to be
// disturbed is lost, the lock of the disturbed name is taken away, so that a repetition of the
// write is refused.
func (t *torture) faultAnswers(f fault) bool {
	h := t.hosts[t.aimedAt(f)]
	if !h.spoiled.CompareAndSwap(false, true) {
		return false
	}
	defer h.spoiled.Store(false)
	h.answers.start(f.Kind, func() {
		if holder := t.ledger.holder(disturbedName); holder != nil && holder.host == h.id {
			_, _ = t.takeLock(deleteKey)
			sleep(t.ctx, othersTurn)
		}
	})
	sleep(context.Background(), f.For)
	h.answers.stop()
	return true
}

// othersTurn is how long the next holder has to write, before clientv3 repeats a write of the last
// one.
const othersTurn = 50 * time.Millisecond

// addMetadata has the contexts of one host's callers carry metadata.
func (t *torture) addMetadata(f fault) bool {
	h := t.hosts[f.Host]
	if !h.metadata.CompareAndSwap(false, true) {
		return false
	}
	sleep(context.Background(), f.For)
	h.metadata.Store(false)
	return true
}

// blackHole cuts one member off from a host that is there for it.
func (t *torture) blackHole(f fault) bool {
	h := t.hosts[f.Host]
	if !h.faulted.CompareAndSwap(false, true) {
		return false
	}
	for _, l := range h.to(f.Member) {
		l.Cut()
	}
	sleep(context.Background(), f.For)
	h.heal()
	h.faulted.Store(false)
	return true
}

func (t *torture) faultCrowd(f fault) {
	h := t.hosts[f.Host]
	for _, l := range h.to(f.Member) {
		if f.Kind == cutCrowd {
			l.Cut()
		} else {
			l.Reset()
		}
	}
	sleep(context.Background(), f.For)
	h.heal()
}

// target claims the host that a fault is for, or else the next whose links have no fault yet; nil
// if there is none.
func (t *torture) target(f fault) *host {
	if f.Host >= hosts {
		return t.hosts[f.Host]
	}
	id := t.aimedAt(f)
	for i := range hosts {
		if h := t.hosts[(id+i)%hosts]; h.faulted.CompareAndSwap(false, true) {
			return h
		}
	}
	return nil
}

// aimedAt is the host of the holder that the fault is aimed at, or else the one that it names.
func (t *torture) aimedAt(f fault) int {
	if f.Aimed {
		name := aims[f.Kind]
		t.awaitHolder(name, 2*time.Second)
		if holding := t.ledger.holder(name); holding != nil {
			return holding.host
		}
	}
	return f.Host
}

func (t *torture) awaitHolder(name string, atMost time.Duration) {
	for end := time.Now().Add(atMost); t.ledger.holder(name) == nil && time.Now().Before(end); {
		sleep(t.ctx, time.Millisecond)
	}
}

// takeLock takes the lock of the name that is there for it from its holder, by deleting its key or
// by revoking its lease.
func (t *torture) takeLock(by kind) (bool, error) {
	t.awaitHolder(disturbedName, time.Second)
	h := t.ledger.holder(disturbedName)
	if h == nil {
		return false, nil
	}
	t.ledger.disturb(h, 0)
	ctx, cancel := context.WithTimeout(t.ctx, 3*time.Second)
	defer cancel()
	if by == revokeLease {
		if _, err := t.admin.Revoke(ctx, h.lock.Lease().ID()); err != nil {
			return false, nil // there is no majority now, or the holder was quicker
		}
		t.ledger.disturb(h, t.now())
		return true, nil
	}
	return deleteLockKey(ctx, t.admin, t.ledger, h), nil
}

// deleteLockKey takes a lock from its holder, and notes that.
func deleteLockKey(ctx context.Context, client *clientv3.Client, ledger *ledger, h *holding) bool {
	ledger.disturb(h, 0)
	resp, err := client.Txn(ctx).If(h.lock.IsOwner()).Then(clientv3.OpDelete(h.lock.Key())).Commit()
	if err != nil || !resp.Succeeded {
		return false
	}
	ledger.disturb(h, ledger.now())
	return true
}

// compact compacts the history up to a little behind what the oracle has seen: it must see
// everything.
func (t *torture) compact(behind int64) (bool, error) {
	ctx, cancel := context.WithTimeout(t.ctx, 3*time.Second)
	defer cancel()
	revision := t.oracle.revision() - behind
	if revision < 1 {
		return false, nil
	}
	t.compacted.Store(max(t.compacted.Load(), revision)) // even if it fails: it may have been done
	_, err := t.admin.Compact(ctx, revision)
	return err == nil, nil
}

// pauseHolders stops both child processes, each at the worst moment: when it holds the lock, has
// read the set, has made sure that it still holds the lock, and is about to write.
func (t *torture) pauseHolders(f fault) bool {
	ctx, cancel := context.WithTimeout(t.ctx, 6*time.Second)
	defer cancel()
	var done [2]bool
	var pausing sync.WaitGroup
	for i, c := range t.children {
		pausing.Go(func() { done[i] = c.pause(ctx, pause{length: f.For, late: f.Kind == lateHolders}) })
	}
	pausing.Wait()
	return done[0] || done[1]
}

// healAll makes sure that no fault outlasts the schedule.
func (t *torture) healAll() error {
	for m := range members {
		if err := t.cluster.Restart(m); err != nil {
			return err
		}
		if err := t.cluster.Rejoin(m); err != nil {
			return err
		}
	}
	for _, h := range t.hosts {
		h.heal()
	}
	return nil
}

const (
	everyHost = -1
	// recovery is for how long after a fault it excuses a holder that is notified late: connections
	// are made anew, and a leader elected.
	recovery = 2500 * time.Millisecond
)

// troubles records when faults kept hosts from hearing what etcd had to say.
type troubles struct {
	clock
	mu  sync.Mutex
	all []*trouble
}

type trouble struct {
	host     int
	from, to time.Duration // to is 0 until it ends
}

func (t *troubles) begin(host int) (end func()) {
	t.mu.Lock()
	defer t.mu.Unlock()
	one := &trouble{host: host, from: t.now()}
	t.all = append(t.all, one)
	return func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		one.to = t.now() + recovery
	}
}

func (t *troubles) between(host int, from, to time.Duration) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, one := range t.all {
		if (one.host == host || one.host == everyHost) && one.from < to && (one.to == 0 || from < one.to) {
			return true
		}
	}
	return false
}

// within is for how long a host had troubles between two times. They may overlap.
func (t *troubles) within(host int, from, to time.Duration) (sum time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, one := range t.all {
		end := one.to
		if end == 0 {
			end = to
		}
		if one.host == host {
			sum += max(0, min(end, to)-max(one.from, from))
		}
	}
	return sum
}

// quietFor is for how long within a time a host had no troubles, and this process was not stalled.
func (t *torture) quietFor(host int, from, to time.Duration) time.Duration {
	return t.quiet(from, to) - t.troubles.within(host, from, to)
}

func sleep(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}
