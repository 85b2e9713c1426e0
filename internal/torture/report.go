package main

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"
)

// tally counts by name.
type tally struct {
	mu sync.Mutex
	of map[string]int
}

func (t *tally) add(name string, n int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.of == nil {
		t.of = make(map[string]int)
	}
	t.of[name] += n
}

func (t *tally) get(name string) int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.of[name]
}

func (t *tally) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	var parts []string
	for _, name := range slices.Sorted(maps.Keys(t.of)) {
		parts = append(parts, fmt.Sprintf("%s %d", name, t.of[name]))
	}
	return strings.Join(parts, ", ")
}

// A report is what a run did and found.
type report struct {
	seed                uint64
	length              time.Duration
	operations          *tally
	faults              *tally
	holders             *tally
	margins             int
	margin              time.Duration
	tightest            string
	excused             int
	told                int
	stalls              int
	longestStall        time.Duration
	fenced, control     lostElements
	linearizable        string
	everybodyHadTheLock time.Duration
	watchersCaughtUp    time.Duration
	goroutines, leases  int
	violations          []string
}

type lostElements struct{ lost, acknowledged int }

func (l lostElements) String() string { return fmt.Sprintf("%d of %d", l.lost, l.acknowledged) }

func (r *report) String() string {
	var b strings.Builder
	line := func(what, format string, args ...any) {
		fmt.Fprintf(&b, "%-14s %s\n", what+":", fmt.Sprintf(format, args...))
	}
	line("seed", "%d, to replay: go run ./internal/torture -seed %d -for %v", r.seed, r.seed, r.length)
	line("operations", "%s", r.operations)
	line("faults", "%s", r.faults)
	line("holders", "%s", r.holders)
	if r.margins > 0 {
		line("worst margin", "%v between told and next, of %d losses (%s)", ms(r.margin), r.margins, r.tightest)
	}
	line("told", "%d deletions checked", r.told)
	line("stalls", "%d of this process, the longest %v; %d overlaps excused", r.stalls, ms(r.longestStall), r.excused)
	line("lost elements", "fenced %v, control %v", r.fenced, r.control)
	line("register", "porcupine: %s", r.linearizable)
	line("liveness", "every waiter had the lock after %v, every watcher had caught up after %v", ms(r.everybodyHadTheLock), ms(r.watchersCaughtUp))
	line("leaks", "%d goroutines, %d leases", r.goroutines, r.leases)
	line("violations", "%d", len(r.violations))
	for _, v := range r.violations {
		fmt.Fprintf(&b, "  VIOLATION %s\n", v)
	}
	return b.String()
}
