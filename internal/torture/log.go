package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"example.com/etcdutil"
)

const (
	logLock = "log"
	logName = observedPrefix + "log"
	// disturbedLogName and disturbedKey are written under the lock that is taken away at any time.
	disturbedLogName = observedPrefix + "disturbed-log"
	disturbedKey     = observedPrefix + "disturbed"
)

// appended is an entry that somebody tried to write, and what became of it.
type appended struct {
	value      string
	outcome    outcome
	place      int64 // that was acknowledged: of a log's entry the version, of a commit the revision
	err        error // that said so
	call, back time.Duration
}

// A journal is a log, and what was done to write it.
type journal struct {
	key     string
	appends appends
}

// appends records writes.
type appends struct {
	mu  sync.Mutex
	all []appended
}

func (a *appends) add(one appended) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.all = append(a.all, one)
}

// startLog has a client write the log under its lock, and two read it: every entry, and the latest.
func (t *torture) startLog(h *host) {
	t.work(h, logLock, true, (*worker).writeLog)
	for _, every := range []bool{true, false} {
		r := &logFollower{host: h.id, every: every, from: 1}
		r.reached.name = fmt.Sprintf("the log's reader on host %d (every entry: %t)", h.id, every)
		t.logReaders = append(t.logReaders, r)
		t.followers = append(t.followers, &r.reached)
		t.work(h, "", false, func(w *worker) { w.readLog(r) })
	}
}

// writeLog writes a few entries, at times after the parent's end.
func (w *worker) writeLog() {
	parent, cancel := context.WithCancel(w.ctx)
	defer cancel()
	lock, h := w.acquire(parent, logLock, w.options()...)
	if lock == nil {
		return
	}
	defer w.release(lock, h)
	opened := func() {}
	if w.chance(10) {
		opened = cancel
	}
	open, stop := context.WithTimeout(context.Background(), 5*time.Second)
	defer stop()
	w.writeEntries(open, lock, w.log, w.upToTimes(6), opened)
}

// writeEntries opens a writer, calls opened, and writes entries, up to the first that fails.
func (w *worker) writeEntries(ctx context.Context, lock *etcdutil.Lock, log *journal, entries int, opened func()) {
	writer, err := etcdutil.NewLogWriter[string](ctx, lock, log.key)
	if err != nil {
		w.operations.add("log writer: "+outcomeOf(err), 1)
		return
	}
	defer writer.Close()
	opened()
	for range entries {
		if !w.append(lock, writer, log) {
			return
		}
		w.hold(w.ctx, w.upTo(60*time.Millisecond))
	}
}

// append reports whether the writer may go on. After an unknown outcome it does, now and then: the
// next write must not come before, or twice.
func (w *worker) append(lock *etcdutil.Lock, writer *etcdutil.LogWriter[string], log *journal) bool {
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond+w.upTo(5*time.Second))
	defer cancel()
	one := appended{value: w.uniqueValue(), call: w.now()}
	var err error
	one.place, err = writer.Write(ctx, one.value)
	one.outcome, one.err, one.back = outcomeOfCommit(err), err, w.now()
	log.appends.add(one)
	w.operations.add("log write: "+string(one.outcome), 1)
	if errors.Is(err, etcdutil.ErrLogConflict) {
		if held, askErr := lock.Alive(ctx); askErr == nil && held {
			w.violate("log: host %d holds the lock, but got ErrLogConflict: %v", w.host.id, err)
		}
	}
	return err == nil || one.outcome == unknown && w.chance(50)
}

// A logFollower reads the log with one reader after the other.
type logFollower struct {
	host    int
	every   bool
	from    int64 // where the next reader begins, if it reads every entry
	reached progress
	parts   []logPart
	gap     bool // nothing has been read since a gap
}

// A logPart is what one reader read.
type logPart struct {
	after   int64 // the version before it, if it goes on where another reader ended, else -1
	entries []etcdutil.Entry[string]
}

func (w *worker) readLog(r *logFollower) {
	var opts []etcdutil.LogOption
	if r.every {
		opts = append(opts, etcdutil.WithEveryEntry(r.from))
	}
	reader, err := etcdutil.NewLogReader[string](w.caller(w.ctx), w.host.client, logName, opts...)
	if err == nil {
		part := logPart{after: r.last()}
		err = w.readEntries(reader, r, &part)
		_ = reader.Close()
		r.parts = append(r.parts, part)
		r.gap = r.gap && len(part.entries) == 0
	}
	w.operations.add("log reader: "+watchEnd(err), 1)
	if errors.Is(err, etcdutil.ErrGap) {
		compacted := w.compacted.Load()
		if compacted < r.from {
			w.violate("log: the reader on host %d ended with a gap before revision %d, although only %d was compacted", r.host, r.from, compacted)
		}
		r.gap, r.from = true, max(r.from, compacted+1)
	}
	sleep(w.ctx, w.upTo(20*time.Millisecond))
}

// last is the version of the last entry that was read, or -1 where the next reader need not go on
// behind it.
func (r *logFollower) last() int64 {
	if !r.every || r.gap {
		return -1
	}
	for _, p := range slices.Backward(r.parts) {
		if n := len(p.entries); n > 0 {
			return p.entries[n-1].Version
		}
	}
	return -1
}

// readEntries reads for a while, and to the end once the faults have stopped.
func (w *worker) readEntries(reader *etcdutil.LogReader[string], r *logFollower, part *logPart) error {
	until := time.Now().Add(500*time.Millisecond + w.upTo(8*time.Second))
	for w.ctx.Err() == nil && (w.settling.Load() || time.Now().Before(until)) {
		ctx, cancel := context.WithTimeout(w.ctx, 500*time.Millisecond)
		entry, err := reader.Read(ctx)
		cancel()
		switch {
		case err == nil:
			part.entries = append(part.entries, entry)
			r.reached.set(entry.Revision)
			r.from = max(r.from, entry.Revision+1)
			w.operations.add("log read", 1)
		case ctx.Err() == nil || !errors.Is(err, context.DeadlineExceeded):
			return err
		}
	}
	return nil
}

// checkLog compares what was reported to writers and what readers read with what the oracle saw.
func (t *torture) checkLog(changes []change) {
	for _, log := range []*journal{t.log, t.disturbedLog} {
		for _, v := range checkLogged(log.appends.all, changesOf(log.key, changes)) {
			t.violate("log: %s: %s", log.key, v)
		}
	}
	revision := func(c change) int64 { return c.revision }
	for _, v := range checkAppends(t.commits.all, changesOf(disturbedKey, changes), revision) {
		t.violate("commit: %s: %s", disturbedKey, v)
	}
	entries := changesOf(t.log.key, changes)
	for _, r := range t.logReaders {
		for _, p := range r.parts {
			for _, v := range checkLogPart(p, entries, r.every) {
				t.violate("log: reader on host %d (every entry: %t): %s", r.host, r.every, v)
			}
		}
	}
}

func changesOf(key string, changes []change) (of []change) {
	for _, c := range changes {
		if c.key == key {
			of = append(of, c)
		}
	}
	return of
}

// checkLogged checks that versions have no gap, and what checkAppends does.
func checkLogged(all []appended, entries []change) (violations []string) {
	for i, e := range entries {
		if e.deleted || e.version != int64(i+1) {
			violations = append(violations, fmt.Sprintf("entry %d is of version %d, at revision %d", i+1, e.version, e.revision))
		}
	}
	version := func(c change) int64 { return c.version }
	return append(violations, checkAppends(all, entries, version)...)
}

// checkAppends checks that every acknowledged write was applied once, at its place, and in order,
// that no other was applied twice, and that none was applied that was refused.
func checkAppends(all []appended, applied []change, place func(change) int64) (violations []string) {
	bad := func(format string, args ...any) { violations = append(violations, fmt.Sprintf(format, args...)) }
	places := make(map[string][]int64)
	for _, c := range applied {
		value, _ := decode(c.value)
		places[value] = append(places[value], place(c))
	}
	for _, a := range all {
		at := places[a.value]
		delete(places, a.value)
		switch {
		case len(at) > 1:
			bad("%s write %s was applied %d times, at %d", a.outcome, a.value, len(at), at)
		case a.outcome == acknowledged && len(at) == 0:
			bad("acknowledged write %s, at %d, is lost", a.value, a.place)
		case a.outcome == acknowledged && at[0] != a.place:
			bad("write %s was acknowledged at %d, but was applied at %d", a.value, a.place, at[0])
		case a.outcome == refused && len(at) > 0:
			bad("write %s was refused (%v), but was applied at %d", a.value, a.err, at[0])
		}
	}
	for value := range places {
		bad("%s was never written", value)
	}
	return append(violations, checkOrder(all)...)
}

// checkOrder checks that what was acknowledged before another write began has the smaller place.
func checkOrder(all []appended) (violations []string) {
	sorted := slices.DeleteFunc(slices.Clone(all), func(a appended) bool { return a.outcome != acknowledged })
	slices.SortFunc(sorted, func(a, b appended) int { return cmp.Compare(a.place, b.place) })
	var latest appended // of those with smaller places, the one that was begun last
	for _, a := range sorted {
		if latest.call > a.back {
			violations = append(violations, fmt.Sprintf("write %s, at %d, was acknowledged at %v, before write %s, at %d, was begun at %v",
				a.value, a.place, ms(a.back), latest.value, latest.place, ms(latest.call)))
		}
		if a.call > latest.call {
			latest = a
		}
	}
	return violations
}

// checkLogPart checks that a reader read entries as they are, in order and without a gap, or the
// latest ones.
func checkLogPart(p logPart, entries []change, every bool) (violations []string) {
	last := p.after
	for _, e := range p.entries {
		if e.Version < 1 || e.Version > int64(len(entries)) {
			return append(violations, fmt.Sprintf("read version %d, of %d", e.Version, len(entries)))
		}
		is := entries[e.Version-1]
		if value, _ := decode(is.value); value != e.Value || is.revision != e.Revision {
			violations = append(violations, fmt.Sprintf("read %q at revision %d as version %d, which is %q at revision %d", e.Value, e.Revision, e.Version, value, is.revision))
		}
		if last >= 0 && (e.Version <= last || every && e.Version != last+1) {
			violations = append(violations, fmt.Sprintf("read version %d after version %d", e.Version, last))
		}
		last = e.Version
	}
	return violations
}
