package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"strings"
	"sync"
	"time"

	"example.com/etcdutil"
	clientv3 "go.etcd.io/etcd/client/v3"
)

const (
	watchedPrefix = observedPrefix + "watch/"
	watchedKeys   = 8
)

func watchedKey(i int) string { return fmt.Sprintf("%sk%d", watchedPrefix, i) }

// startWatch has a client change keys, and three watch: all keys, one key, and the state.
func (t *torture) startWatch(h *host) {
	n := 0
	t.work(h, "", false, func(w *worker) { w.changeKeys(&n) })
	for _, o := range []*observer{
		{host: h.id, key: watchedPrefix, prefix: true, reading: usual},
		{host: h.id, key: watchedKey(h.id % watchedKeys), reading: usual},
	} {
		t.observers = append(t.observers, o)
		t.followers = append(t.followers, &o.reached)
		o.reached.name = fmt.Sprintf("the watcher of %s on host %d", o.key, h.id)
		t.work(h, "", false, func(w *worker) { w.observe(o) })
	}
	s := &snapshotFollower{host: h.id}
	t.snapshots = append(t.snapshots, s)
	t.followers = append(t.followers, &s.reached)
	s.reached.name = fmt.Sprintf("the snapshot follower on host %d", h.id)
	t.work(h, "", false, func(w *worker) { w.followSnapshot(s) })
}

// changeKeys makes one transaction of one to three changes. It does not matter whether it is
// applied: the oracle sees that.
func (w *worker) changeKeys(n *int) {
	ctx, cancel := context.WithTimeout(w.ctx, 2*time.Second)
	defer cancel()
	var ops []clientv3.Op
	for i, count := w.rand.IntN(watchedKeys), 1+max(0, w.rand.IntN(5)-2); len(ops) < count; i++ {
		*n++
		ops = append(ops, w.change(watchedKey(i%watchedKeys), fmt.Sprintf("%d-%d", w.host.id, *n)))
	}
	_, err := w.host.client.Txn(ctx).Then(ops...).Commit()
	w.operations.add("change: "+outcomeOf(err), 1)
	sleep(w.ctx, 10*time.Millisecond+w.upTo(100*time.Millisecond))
}

func (w *worker) change(key, value string) clientv3.Op {
	switch {
	case w.chance(20):
		return clientv3.OpDelete(key)
	case w.chance(10):
		return clientv3.OpPut(key, "undecodable "+value)
	}
	return clientv3.OpPut(key, `"`+value+`"`)
}

// progress is how far a follower has come.
type progress struct {
	name     string
	mu       sync.Mutex
	revision int64
	doing    string // what the follower does now
}

func (p *progress) begin(doing string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.doing = doing
}

func (p *progress) String() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return fmt.Sprintf("%s has come to revision %d (%s)", p.name, p.revision, p.doing)
}

func (p *progress) set(revision int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.revision = max(p.revision, revision)
}

func (p *progress) get() int64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.revision
}

// An observer watches every change of a key or of a prefix.
type observer struct {
	host     int
	key      string
	prefix   bool
	reading  reading
	reached  progress
	segments []*segment // the last one goes on
}

// A segment is what an observer received between two gaps. It goes on from one watcher to the next.
type segment struct {
	key, name  string
	from, upTo int64 // all changes from here up to there were to be received
	events     []etcdutil.Event[string]
	gap        bool // it ended with ErrGap
	compacted  int64
}

// observe opens a watcher where the last one ended, reads from it for a while, at times slowly, and
// closes it.
func (w *worker) observe(o *observer) {
	s := w.segmentOf(o)
	if s == nil {
		return
	}
	opts := []etcdutil.WatchOption{etcdutil.WithRevision(s.upTo + 1), etcdutil.WithPrev()}
	if o.prefix {
		opts = append(opts, etcdutil.WithPrefix())
	}
	o.reached.begin(fmt.Sprintf("opens a watcher at %d since %v", s.upTo+1, ms(w.now())))
	watcher, err := etcdutil.Watch[string](w.caller(w.ctx), w.host.client, o.key, opts...)
	if err == nil {
		o.reached.begin(fmt.Sprintf("reads a watcher from %d since %v", s.upTo+1, ms(w.now())))
		readFrom(w, watcher, o.reading, &o.reached, func(e etcdutil.Event[string]) { s.events = append(s.events, e) })
		err = watcher.Close()
		w.leave(o, s, watcher.Revision())
		for until := time.Now().Add(w.upTo(o.reading.pause)); time.Now().Before(until) && !w.settling.Load() && w.ctx.Err() == nil; {
			sleep(w.ctx, 10*time.Millisecond)
		}
	}
	w.operations.add("watch: "+watchEnd(err), 1)
	switch {
	case errors.Is(err, etcdutil.ErrGap):
		s.gap, s.compacted = true, w.compacted.Load()
		o.segments = append(o.segments, nil)
	case err != nil:
		sleep(w.ctx, w.upTo(20*time.Millisecond))
	}
}

// leave ends a watcher's part of a segment. Of a transaction that was not read to its end
// everything will come again.
func (w *worker) leave(o *observer, s *segment, upTo int64) {
	s.upTo = upTo
	read := len(s.events)
	for read > 0 && s.events[read-1].Revision > upTo {
		read--
	}
	if again := s.events[read:]; len(again) > 0 && again[0].Revision != again[len(again)-1].Revision {
		w.violate("watch: %s on host %d: Revision is %d, but more than one later was received: %s, %s",
			o.key, o.host, upTo, describe(again[0]), describe(again[len(again)-1]))
	}
	s.events = s.events[:read]
}

func watchEnd(err error) string {
	if errors.Is(err, etcdutil.ErrGap) {
		return "gap"
	}
	return outcomeOf(err)
}

// segmentOf returns the segment that goes on, or begins one now; nil if etcd cannot be asked.
func (w *worker) segmentOf(o *observer) *segment {
	last := len(o.segments) - 1
	if last >= 0 && o.segments[last] != nil {
		return o.segments[last]
	}
	ctx, cancel := context.WithTimeout(w.ctx, 2*time.Second)
	defer cancel()
	resp, err := w.host.client.Get(ctx, o.key)
	if err != nil {
		return nil
	}
	s := &segment{from: resp.Header.Revision + 1, upTo: resp.Header.Revision}
	if last >= 0 {
		o.segments[last] = s
	} else {
		o.segments = append(o.segments, s)
	}
	return s
}

// reading is how a watcher is read.
type reading struct {
	upTo  time.Duration // before the next watcher goes on behind it
	pause time.Duration // between the two, at most
	stuck stuckness
}

// stuckness is for how long nothing is read from a watcher.
type stuckness int

const (
	notStuck stuckness = iota
	untilSettling
	untilTheEnd
)

var usual = reading{upTo: 8 * time.Second}

// readFrom reads from a watcher for a while, and to the end once the faults have stopped.
func readFrom[T any](w *worker, watcher *etcdutil.Watcher[T], how reading, reached *progress, take func(etcdutil.Event[T])) {
	until := time.Now().Add(500*time.Millisecond + w.upTo(how.upTo))
	tick := time.NewTicker(how.upTo / 40)
	defer tick.Stop()
	if how.stuck == untilTheEnd { // or for a while: compaction ends what is stuck for long
		for again := time.Now().Add(2*time.Second + w.upTo(8*time.Second)); w.settling.Load() || time.Now().Before(again); {
			if sleep(w.ctx, 100*time.Millisecond); w.ctx.Err() != nil {
				return
			}
		}
		return
	}
	for how.stuck == untilSettling && !w.settling.Load() && w.ctx.Err() == nil {
		sleep(w.ctx, 100*time.Millisecond)
	}
	for w.settling.Load() || time.Now().Before(until) {
		select {
		case e, open := <-watcher.Events():
			if !open {
				return
			}
			take(e)
			w.operations.add("event: "+e.Type.String(), 1)
			if !w.settling.Load() && w.rand.IntN(1000) < 5 {
				sleep(w.ctx, w.upTo(time.Second))
			}
		case <-tick.C:
			reached.set(watcher.Revision())
		}
	}
}

// A snapshotFollower keeps the state of the watched keys.
type snapshotFollower struct {
	host    int
	reached progress
	synced  []state
}

// A state is what a follower took for the state at a revision.
type state struct {
	revision int64
	final    bool // it was not an EventSynced, but the end
	keys     map[string]string
}

func (w *worker) followSnapshot(s *snapshotFollower) {
	watcher, err := etcdutil.Watch[string](w.caller(w.ctx), w.host.client, watchedPrefix, etcdutil.WithPrefix(), etcdutil.WithSnapshot())
	if err != nil {
		w.operations.add("snapshot: "+watchEnd(err), 1)
		sleep(w.ctx, w.upTo(20*time.Millisecond))
		return
	}
	keys := make(map[string]string)
	var last []etcdutil.Event[string] // of one revision
	readFrom(w, watcher, usual, &s.reached, func(e etcdutil.Event[string]) {
		if len(last) > 0 && last[0].Revision != e.Revision {
			follow(keys, last)
			last = last[:0]
		}
		last = append(last, e)
		if e.Type == etcdutil.EventSynced {
			follow(keys, last)
			last = last[:0]
			s.synced = append(s.synced, state{revision: e.Revision, keys: maps.Clone(keys)})
		}
	})
	err = watcher.Close()
	w.operations.add("snapshot: "+watchEnd(err), 1)
	if upTo := watcher.Revision(); w.ctx.Err() != nil && w.settling.Load() && upTo > 0 {
		if len(last) > 0 && last[0].Revision <= upTo { // else the transaction was not read to its end
			follow(keys, last)
		}
		s.synced = append(s.synced, state{revision: upTo, final: true, keys: keys})
	}
	if errors.Is(err, etcdutil.ErrGap) {
		w.violate("watch: the snapshot follower on host %d ended with a gap: %v", s.host, err)
	}
}

// follow applies events to what a follower has.
func follow(keys map[string]string, events []etcdutil.Event[string]) {
	for _, e := range events {
		switch e.Type {
		case etcdutil.EventPut:
			keys[e.Key] = `"` + e.Value + `"`
		case etcdutil.EventInvalid:
			keys[e.Key] = string(e.Raw)
		case etcdutil.EventDelete:
			delete(keys, e.Key)
		}
	}
}

// checkWatch compares what was received with what the oracle saw.
func (t *torture) checkWatch(changes []change) {
	byKey := make(map[string][]change)
	for _, c := range changes {
		byKey[c.key] = append(byKey[c.key], c)
	}
	for _, o := range t.observers {
		seen := byKey[o.key]
		if o.prefix {
			seen = changes
		}
		due := o.of(seen)
		for _, s := range o.segments {
			if s == nil {
				continue
			}
			for _, v := range checkSegment(s, due) {
				t.violate("watch: %s on host %d: %s", o.key, o.host, v)
			}
		}
	}
	for _, f := range t.snapshots {
		for _, s := range f.synced {
			if v := checkState(s, watchedPrefix, changes); v != "" {
				t.violate("watch: snapshot follower on host %d: %s", f.host, v)
			}
		}
		t.operations.add("snapshot states checked", len(f.synced))
	}
}

// observed are all changes up to now, as etcd has them.
func (t *torture) observed(ctx context.Context) ([]change, error) {
	revision, err := t.revision(ctx)
	if err != nil {
		return nil, err
	}
	if err := t.oracle.await(ctx, revision); err != nil {
		return nil, err
	}
	return t.oracle.all()
}

// of are the changes that the observer is to receive, each with the value before.
func (o *observer) of(changes []change) []expected {
	var all []expected
	before := make(map[string]*string)
	for _, c := range changes {
		if c.key != o.key && !(o.prefix && strings.HasPrefix(c.key, o.key)) {
			continue
		}
		all = append(all, expected{c, before[c.key]})
		before[c.key] = &c.value
		if c.deleted {
			before[c.key] = nil
		}
	}
	return all
}

type expected struct {
	change
	before *string
}

func (e expected) String() string {
	if e.deleted {
		return fmt.Sprintf("delete of %s at %d", e.key, e.revision)
	}
	return fmt.Sprintf("put of %s at %d: %q, version %d", e.key, e.revision, e.value, e.version)
}

// checkSegment checks etcd's guarantees, of which each is broken if what came is not what is to
// come: events are ordered, come once, none is missing, those of one transaction come together, and
// a watcher that goes on where another ended receives what follows.
func checkSegment(s *segment, all []expected) (violations []string) {
	if s.gap && s.compacted <= s.upTo {
		violations = append(violations, fmt.Sprintf("ended with a gap after revision %d, although only %d was compacted", s.upTo, s.compacted))
	}
	var due []expected
	for _, e := range all {
		if e.revision >= s.from && e.revision <= s.upTo {
			due = append(due, e)
		}
	}
	for i, e := range s.events {
		if i >= len(due) {
			return append(violations, fmt.Sprintf("received %s, which is too much up to revision %d%s", describe(e), s.upTo, twice(s.events[:i], e)))
		}
		if problem := due[i].differs(e); problem != "" {
			return append(violations, fmt.Sprintf("received %s instead of %s (%s)%s", describe(e), due[i], problem, twice(s.events[:i], e)))
		}
	}
	if len(s.events) < len(due) {
		violations = append(violations, fmt.Sprintf("up to revision %d, %d events are missing, the first is the %s", s.upTo, len(due)-len(s.events), due[len(s.events)]))
	}
	return violations
}

func twice(before []etcdutil.Event[string], e etcdutil.Event[string]) string {
	for _, b := range before {
		if b.Key == e.Key && b.Revision == e.Revision {
			return "; it came twice"
		}
	}
	return ""
}

func describe(e etcdutil.Event[string]) string {
	return fmt.Sprintf("%s of %s at %d: %q%s, version %d", e.Type, e.Key, e.Revision, e.Value, e.Raw, e.Version)
}

// differs says in what an event is not the one that is due. Prev may be missing: etcd may have
// compacted it.
func (d expected) differs(e etcdutil.Event[string]) string {
	kind, value, decodes := etcdutil.EventPut, "", false
	switch {
	case d.deleted:
		kind = etcdutil.EventDelete
	default:
		if value, decodes = decode(d.value); !decodes {
			kind = etcdutil.EventInvalid
		}
	}
	switch {
	case e.Key != d.key:
		return "key"
	case e.Revision != d.revision:
		return "revision"
	case e.Type != kind:
		return "type"
	case e.Value != value || kind == etcdutil.EventInvalid && string(e.Raw) != d.value:
		return "value"
	case !d.deleted && e.Version != d.version || d.deleted && e.Version != 0:
		return "version"
	case e.Prev != nil && d.before == nil:
		return "previous value"
	case e.Prev != nil:
		if before, decodes := decode(*d.before); !decodes || *e.Prev != before {
			return "previous value"
		}
	}
	return ""
}

func decode(value string) (decoded string, ok bool) {
	err := json.Unmarshal([]byte(value), &decoded)
	return decoded, err == nil
}

// checkState compares what a follower had with what etcd had at that revision.
func checkState(s state, prefix string, changes []change) string {
	keys := make(map[string]string)
	for _, c := range changes {
		switch {
		case c.revision > s.revision || !strings.HasPrefix(c.key, prefix):
		case c.deleted:
			delete(keys, c.key)
		default:
			keys[c.key] = c.value
		}
	}
	if maps.Equal(keys, s.keys) {
		return ""
	}
	when := "when it was synced"
	if s.final {
		when = "at the end"
	}
	return fmt.Sprintf("%s, at revision %d, it had %v, but etcd %v", when, s.revision, s.keys, keys)
}
