package main

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"example.com/etcdutil"
	clientv3 "go.etcd.io/etcd/client/v3"
)

const (
	// mirroredPrefix is where the keys are that each transaction changes all at once.
	mirroredPrefix = observedPrefix + "mirror/"
	mirroredKeys   = 4
)

func mirroredKey(i int) string { return mirroredPrefix + strconv.Itoa(i) }

// A mirrorRead is what one reading of a mirror showed: the value of all keys, or "" if there was
// none.
type mirrorRead struct {
	value    string
	from, to int64         // the copy was of a revision between them
	asOf     time.Duration // when the copy was up to date at the latest
}

// mirrorFollower keeps a mirror and reads it.
type mirrorFollower struct {
	host    int
	reached progress
	mirror  *etcdutil.Mirror[string] // nil while it is made
	mu      sync.Mutex
	reads   []mirrorRead
}

// A mirrorWrite is a transaction that was acknowledged.
type mirrorWrite struct {
	at       time.Duration
	revision int64
}

type mirrorWrites struct {
	mu  sync.Mutex
	all []mirrorWrite
}

func (m *mirrorWrites) add(w mirrorWrite) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.all = append(m.all, w)
}

// startMirror has a client keep a mirror for the whole run, read it, and write what it mirrors.
func (t *torture) startMirror(h *host) {
	f := &mirrorFollower{host: h.id}
	f.reached.name = fmt.Sprintf("the mirror on host %d", h.id)
	t.mirrors = append(t.mirrors, f)
	t.followers = append(t.followers, &f.reached)
	t.work(h, "", false, func(w *worker) { w.keepMirror(f) })
	t.work(h, "", false, func(w *worker) { w.writeMirrored(f) })
}

// keepMirror makes a mirror and reads it until the run ends.
func (w *worker) keepMirror(f *mirrorFollower) {
	m, err := etcdutil.NewMirror[string](w.caller(w.ctx), w.host.client, mirroredPrefix, etcdutil.WithPrefix())
	if err != nil {
		w.operations.add("mirror: "+outcomeOf(err), 1)
		sleep(w.ctx, w.upTo(20*time.Millisecond))
		return
	}
	defer m.Close()
	f.setMirror(m)
	defer f.setMirror(nil)
	for m.Err() == nil {
		w.readMirror(f, m, 0)
		f.reached.set(m.Revision())
		sleep(m, w.upTo(20*time.Millisecond))
	}
	if w.ctx.Err() == nil {
		w.violate("mirror: on host %d it ended: %v", f.host, context.Cause(m))
	}
}

func (f *mirrorFollower) setMirror(m *etcdutil.Mirror[string]) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.mirror = m
}

func (f *mirrorFollower) current() *etcdutil.Mirror[string] {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.mirror
}

// readMirror reads all keys at once. After a Wait the copy is of the revision waited for, or later.
func (w *worker) readMirror(f *mirrorFollower, m *etcdutil.Mirror[string], waited int64) {
	r := mirrorRead{from: max(m.Revision(), waited), asOf: m.AsOf().Sub(w.start)}
	keys := maps.Collect(m.All())
	r.to = m.Revision()
	if torn := r.take(keys); torn != "" {
		w.violate("mirror: torn read on host %d, between revisions %d and %d: %s", f.host, r.from, r.to, torn)
	}
	w.operations.add("mirror: read", 1)
	f.mu.Lock()
	defer f.mu.Unlock()
	if n := len(f.reads); waited == 0 && n > 0 && f.reads[n-1].value == r.value && f.reads[n-1].from == r.from {
		f.reads[n-1].asOf = max(f.reads[n-1].asOf, r.asOf)
		f.reads[n-1].to = min(f.reads[n-1].to, r.to)
		return
	}
	f.reads = append(f.reads, r)
}

// take notes the one value of all keys, or returns how they differ.
func (r *mirrorRead) take(keys map[string]string) (torn string) {
	if len(keys) == 0 {
		return ""
	}
	r.value = keys[mirroredKey(0)]
	for i := range mirroredKeys {
		if value, ok := keys[mirroredKey(i)]; !ok || value != r.value {
			return fmt.Sprint(keys)
		}
	}
	return ""
}

// writeMirrored changes or deletes all keys in one transaction, and reads that back from the
// mirror.
func (w *worker) writeMirrored(f *mirrorFollower) {
	ctx, cancel := context.WithTimeout(w.ctx, 2*time.Second)
	defer cancel()
	op := func(key string) clientv3.Op { return clientv3.OpDelete(key) }
	if !w.chance(20) {
		value := strconv.Quote(w.uniqueValue())
		op = func(key string) clientv3.Op { return clientv3.OpPut(key, value) }
	}
	var ops []clientv3.Op
	for i := range mirroredKeys {
		ops = append(ops, op(mirroredKey(i)))
	}
	resp, err := w.host.client.Txn(ctx).Then(ops...).Commit()
	w.operations.add("mirror: change: "+outcomeOf(err), 1)
	if err == nil {
		w.mirrorWrites.add(mirrorWrite{w.now(), resp.Header.Revision})
		w.readBack(f, resp.Header.Revision)
	}
	sleep(w.ctx, w.upTo(200*time.Millisecond))
}

func (w *worker) readBack(f *mirrorFollower, revision int64) {
	m := f.current()
	if m == nil {
		return
	}
	ctx, cancel := context.WithTimeout(w.ctx, 3*time.Second)
	defer cancel()
	err := m.Wait(ctx, revision)
	w.operations.add("mirror: wait: "+outcomeOf(err), 1)
	if err == nil {
		w.readMirror(f, m, revision)
	}
}

// checkMirrors compares what mirrors showed with what the oracle saw.
func (t *torture) checkMirrors(changes []change) {
	states := mirroredStates(changes)
	writes := t.mirrorWrites.all
	slices.SortFunc(writes, func(a, b mirrorWrite) int { return cmp.Compare(a.at, b.at) })
	for n := range writes[min(1, len(writes)):] {
		writes[n+1].revision = max(writes[n+1].revision, writes[n].revision)
	}
	for _, f := range t.mirrors {
		for _, r := range f.reads {
			if v := checkMirrorRead(r, states, writes); v != "" {
				t.violate("mirror: on host %d: %s", f.host, v)
			}
		}
		t.operations.add("mirror: reads checked", len(f.reads))
	}
}

// A mirroredState is the value of all keys from a revision on.
type mirroredState struct {
	revision int64
	value    string
}

func mirroredStates(changes []change) []mirroredState {
	states := []mirroredState{{}}
	for _, c := range changes {
		if !strings.HasPrefix(c.key, mirroredPrefix) || states[len(states)-1].revision == c.revision {
			continue
		}
		value := ""
		if !c.deleted {
			value, _ = decode(c.value)
		}
		states = append(states, mirroredState{c.revision, value})
	}
	return states
}

// checkMirrorRead checks that a read is of one of the revisions that it may be of: not older than
// what was acknowledged before the time as of which the copy was up to date.
func checkMirrorRead(r mirrorRead, states []mirroredState, writes []mirrorWrite) string {
	from := r.from
	n, _ := slices.BinarySearchFunc(writes, r.asOf, func(w mirrorWrite, at time.Duration) int { return cmp.Compare(w.at, at) })
	if n > 0 {
		from = max(from, writes[n-1].revision)
	}
	to := max(from, r.to)
	n, exact := slices.BinarySearchFunc(states, from, func(s mirroredState, r int64) int { return cmp.Compare(s.revision, r) })
	if !exact {
		n-- // the state of revision from is that of the change before it
	}
	first := n
	for ; n < len(states) && states[n].revision <= to; n++ {
		if states[n].value == r.value {
			return ""
		}
	}
	return fmt.Sprintf("read %q, which etcd had at none of the revisions from %d to %d, where it had %q at first; as of %v",
		r.value, from, to, states[first].value, ms(r.asOf))
}
