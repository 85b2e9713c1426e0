package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"example.com/etcdutil"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// lockset is Jepsen's test of etcd's locks: read a set, wait, write it back with one element more,
// under a lock. Each element that is written and then missing was overwritten by somebody who did
// not hold the lock, or no longer did.
//
// Fenced writes by Commit. The other, the control, does what users do: it looks whether it still
// holds the lock, and writes.
type lockset struct {
	Name   string // of the lock
	Fenced bool
	Wait   time.Duration // between reading and writing, at most
}

var (
	fencedSet  = lockset{Name: "lockset-fenced", Fenced: true, Wait: 2 * time.Second}
	controlSet = lockset{Name: "lockset-control", Wait: 2 * time.Second}
	// quickSet is one whose holders take turns so fast that a write which arrives late, however
	// little, finds others.
	quickSet = lockset{Name: "lockset-quick", Fenced: true, Wait: 100 * time.Millisecond}
)

func (s lockset) key() string { return s.Name + "-elements" }

// outcome is what was reported to the writer of an element, or of a value.
type outcome string

const (
	acknowledged outcome = "acknowledged"
	refused      outcome = "refused" // not written, and never to be
	unknown      outcome = "unknown"
)

// read returns the set.
func (s lockset) read(ctx context.Context, client *clientv3.Client) ([]string, error) {
	resp, err := client.Get(ctx, s.key())
	if err != nil || len(resp.Kvs) == 0 {
		return nil, err
	}
	var elements []string
	return elements, json.Unmarshal(resp.Kvs[0].Value, &elements)
}

// add adds an element, under the lock. It calls wait between reading and writing, and then worst,
// at the worst moment: when it has made sure that the lock is held, and is about to write.
func (s lockset) add(client *clientv3.Client, lock *etcdutil.Lock, element string, wait, worst func()) outcome {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(lock), 10*time.Second)
	defer cancel()
	elements, err := s.read(ctx, client)
	if err != nil {
		return refused
	}
	value, err := json.Marshal(append(elements, element))
	if err != nil {
		return refused
	}
	put := clientv3.OpPut(s.key(), string(value))
	wait()
	if s.Fenced {
		worst()
		_, err = lock.Commit(ctx, put)
		return outcomeOfCommit(err)
	}
	if lock.Err() != nil {
		return refused
	}
	worst()
	// Not with the lock's context: it may save a process that is stopped here and then goes on, but
	// not what that process has already handed to the network.
	if _, err = client.Do(ctx, put); err != nil {
		return unknown
	}
	return acknowledged
}

func outcomeOfCommit(err error) outcome {
	switch {
	case err == nil:
		return acknowledged
	case errors.Is(err, etcdutil.ErrUnknownOutcome):
		return unknown
	}
	return refused
}

// elements records what became of each element.
type elements struct {
	mu  sync.Mutex
	all map[string]outcome
}

func (e *elements) record(element string, o outcome) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.all == nil {
		e.all = make(map[string]outcome)
	}
	e.all[element] = o
}

func (e *elements) count(o outcome) (n int) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, other := range e.all {
		if other == o {
			n++
		}
	}
	return n
}

// check compares the set with what was reported to its writers: the acknowledged elements that it
// lacks, and those that it has although they were refused, or has twice.
func (e *elements) check(set []string) (lost, wrong []string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	times := make(map[string]int)
	for _, element := range set {
		times[element]++
		if _, known := e.all[element]; !known {
			wrong = append(wrong, fmt.Sprintf("%s was never added", element))
		}
	}
	for element, o := range e.all {
		switch n := times[element]; {
		case n == 0 && o == acknowledged:
			lost = append(lost, element)
		case n > 0 && o == refused:
			wrong = append(wrong, fmt.Sprintf("%s is there, but was refused", element))
		case n > 1:
			wrong = append(wrong, fmt.Sprintf("%s is there %d times", element, n))
		}
	}
	slices.Sort(lost)
	slices.Sort(wrong)
	return lost, wrong
}

// startLockset has a client add elements. The host's child process, where it has one, is a further
// client.
func (t *torture) startLockset(h *host, s lockset) {
	n := 0
	t.work(h, s.Name, true, func(w *worker) {
		n++
		w.addElement(s, fmt.Sprintf("%d-%d", h.id, n))
		sleep(w.ctx, w.upTo(min(2*s.Wait, time.Second/2)))
	})
}

func (w *worker) addElement(s lockset, element string) {
	lock, h := w.acquire(w.ctx, s.Name, etcdutil.WithTTL(leaseTTL))
	if lock == nil {
		return
	}
	defer w.release(lock, h)
	wait := func() { w.hold(w.ctx, w.upTo(s.Wait)) }
	o := s.add(w.host.client, lock, element, wait, func() {})
	w.recordElement(s, element, o)
}

func (t *torture) recordElement(s lockset, element string, o outcome) {
	t.elements[s].record(element, o)
	t.operations.add(s.Name+": "+string(o), 1)
}

// checkLockset returns how many acknowledged elements are lost.
func (t *torture) checkLockset(ctx context.Context, s lockset) (lost int, err error) {
	set, err := s.read(ctx, t.admin)
	if err != nil {
		return 0, fmt.Errorf("read %s: %w", s.Name, err)
	}
	missing, wrong := t.elements[s].check(set)
	if s.Fenced && len(missing) > 0 {
		t.violate("lock-set: %s: %d acknowledged elements are lost: %q", s.Name, len(missing), missing)
	}
	if s.Fenced && len(wrong) > 0 {
		t.violate("lock-set: %s: %q", s.Name, wrong)
	}
	return len(missing), nil
}
