package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"example.com/etcdutil"
)

// A clock gives the time since the run began, by the process's monotonic clock: all histories of a
// run are on one.
type clock struct{ start time.Time }

func (c clock) now() time.Duration { return time.Since(c.start) }

// A holding is the time in which one client might take a lock for its own: from when Acquire
// returned until it was notified of the loss, or was about to release it.
type holding struct {
	name          string
	host          int
	token         etcdutil.Revision
	acquired, end time.Duration
	told          bool          // it ended because the lock was lost
	disturbed     bool          // the torture deleted the lock's key, or revoked its lease
	deleted       time.Duration // when that was surely done, 0 if it was not
	lock          *etcdutil.Lock
	until         context.Context // what the holder runs under: the lock, or a context derived from it
	stopListening func() bool
	ended         bool
}

func (h *holding) String() string {
	how := "until released at"
	if h.told {
		how = "until told at"
	}
	return fmt.Sprintf("token %d on host %d from %v %s %v", h.token, h.host, ms(h.acquired), how, ms(h.end))
}

func ms(d time.Duration) time.Duration { return d.Round(100 * time.Microsecond) }

// ledger records who held what, when.
type ledger struct {
	clock
	mu      sync.Mutex
	all     []*holding
	current map[string]*holding
}

func newLedger(c clock) *ledger { return &ledger{clock: c, current: make(map[string]*holding)} }

// begin is called when Acquire has returned.
func (l *ledger) begin(host int, lock *etcdutil.Lock) *holding { return l.beginUnder(lock, host, lock) }

// beginUnder is begin for a holder that runs under a context of its own.
func (l *ledger) beginUnder(until context.Context, host int, lock *etcdutil.Lock) *holding {
	h := &holding{name: lock.Name(), host: host, token: lock.Token(), acquired: l.now(), lock: lock, until: until}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.all = append(l.all, h)
	l.current[h.name] = h
	h.stopListening = context.AfterFunc(until, func() { l.contextEnded(h) })
	return h
}

// contextEnded notes that the holder was notified. The parent's end is no loss: then the lock is
// still held.
func (l *ledger) contextEnded(h *holding) {
	now := l.now()
	l.mu.Lock()
	defer l.mu.Unlock()
	if lost := errors.Is(context.Cause(h.until), etcdutil.ErrLockLost); lost {
		l.finish(h, now, true)
	}
}

// release is called before Close. After the parent's end nothing reports the lease's end: what
// counts is its expiry.
func (l *ledger) release(h *holding) {
	now := l.now()
	l.mu.Lock()
	defer l.mu.Unlock()
	h.stopListening()
	if expiry := h.lock.Lease().Expiry().Sub(l.start); h.until.Err() != nil && expiry < now {
		l.finish(h, expiry, false)
		return
	}
	l.finish(h, now, errors.Is(context.Cause(h.until), etcdutil.ErrLockLost))
}

func (l *ledger) finish(h *holding, at time.Duration, told bool) {
	if h.ended {
		return
	}
	h.ended, h.end, h.told = true, at, told
	if l.current[h.name] == h {
		delete(l.current, h.name)
	}
}

// holder is who holds a name now, nil if nobody does.
func (l *ledger) holder(name string) *holding {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.current[name]
}

// disturb notes that the torture is about to take a holder's lock away, and when it has.
func (l *ledger) disturb(h *holding, deleted time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	h.disturbed, h.deleted = true, deleted
}

// byName are the holdings that have ended, by the lock's name.
func (l *ledger) byName() map[string][]*holding {
	l.mu.Lock()
	defer l.mu.Unlock()
	names := make(map[string][]*holding)
	for _, h := range l.all {
		if h.ended {
			names[h.name] = append(names[h.name], h)
		}
	}
	return names
}

// A stall is a time in which this process did not get to run.
type stall struct{ from, to time.Duration }

// pulse notices stalls, which excuse a holder that was notified too late: in a paused process
// nobody can be notified.
type pulse struct {
	clock
	mu     sync.Mutex
	stalls []stall
}

const (
	beat = 5 * time.Millisecond
	// stalled is how late a beat must be to be a stall, and not the scheduler's habit.
	stalled = 20 * time.Millisecond
)

func (p *pulse) run(ctx context.Context) {
	for last := p.now(); ctx.Err() == nil; last = p.now() {
		time.Sleep(beat)
		if now := p.now(); now-last > stalled+beat {
			p.mu.Lock()
			p.stalls = append(p.stalls, stall{last, now})
			p.mu.Unlock()
		}
	}
}

func (p *pulse) all() []stall {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.stalls)
}

// within is for how long the process was stalled between two times.
func within(stalls []stall, from, to time.Duration) time.Duration {
	var sum time.Duration
	for _, s := range stalls {
		sum += max(0, min(s.to, to)-max(s.from, from))
	}
	return sum
}

// exclusion is what the holdings of one name show.
type exclusion struct {
	violations []string
	excused    int // overlaps of no more than this process was stalled
	margins    int // how often a loss was followed by a holder
	margin     time.Duration
	tightest   string
}

// checkExclusion checks that the holdings of one name never overlap and that tokens grow. Those
// that the torture disturbed are left out, for they may overlap the next.
func checkExclusion(name string, holdings []*holding, stalls []stall) exclusion {
	var x exclusion
	sorted := slices.DeleteFunc(slices.Clone(holdings), func(h *holding) bool { return h.disturbed })
	slices.SortStableFunc(sorted, func(a, b *holding) int { return cmp.Compare(a.acquired, b.acquired) })
	var last *holding // of those that have begun, the one that ended last
	for i, next := range sorted {
		if i > 0 && next.token <= sorted[i-1].token {
			x.violations = append(x.violations, fmt.Sprintf("exclusion: %s: the token did not grow: %v, then %v", name, sorted[i-1], next))
		}
		if last != nil {
			x.compare(name, last, next, stalls)
		}
		if last == nil || next.end > last.end {
			last = next
		}
	}
	return x
}

func (x *exclusion) compare(name string, last, next *holding, stalls []stall) {
	margin := next.acquired - last.end
	switch {
	case margin < 0 && within(stalls, next.acquired-time.Second, last.end) >= -margin:
		x.excused++
		return
	case margin < 0:
		x.violations = append(x.violations, fmt.Sprintf("exclusion: %s: two held it for %v: %v, and %v", name, ms(-margin), last, next))
	}
	if last.told && (x.margins == 0 || margin < x.margin) {
		x.margin, x.tightest = margin, fmt.Sprintf("%s: %v, then %v", name, last, next)
	}
	if last.told {
		x.margins++
	}
}

// toldWithin bounds how late a holder is notified when its key is deleted, with a second for a busy
// machine.
const toldWithin = 500*time.Millisecond + time.Second

// checkTold checks that those whose key was deleted were notified in time. troubled reports whether
// a fault may have kept a host from being notified. Holders beside a black hole have a check of
// their own.
func checkTold(holdings []*holding, troubled func(host int, from, to time.Duration) bool) (checked int, violations []string) {
	for _, h := range holdings {
		due := h.deleted + toldWithin
		if h.deleted == 0 || strings.HasPrefix(h.name, holedName) || h.end < due && !h.told || troubled(h.host, h.deleted, due) {
			continue
		}
		checked++
		if h.end > due {
			violations = append(violations, fmt.Sprintf("told: %s: the key was deleted at %v: %v", h.name, ms(h.deleted), h))
		}
	}
	return checked, violations
}
