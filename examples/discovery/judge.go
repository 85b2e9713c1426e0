package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"example.com/etcdutil"
)

// judge watches which addresses etcd has, and when.
type judge struct {
	watcher  *etcdutil.Watcher[Address]
	watching sync.WaitGroup

	mu      sync.Mutex
	now     map[string]string // the server that each key has
	changes map[string][]change
}

// change says when an address came or went.
type change struct {
	at   time.Time
	came bool
}

func newJudge(ctx context.Context, s *stage) (*judge, error) {
	watcher, err := etcdutil.Watch[Address](ctx, s.client, s.prefix, etcdutil.WithPrefix())
	if err != nil {
		return nil, err
	}
	j := &judge{watcher: watcher, now: map[string]string{}, changes: map[string][]change{}}
	j.watching.Go(j.run) // until the watcher ends
	return j, nil
}

func (j *judge) run() {
	for e := range j.watcher.Events() {
		j.take(e)
	}
}

func (j *judge) take(e etcdutil.Event[Address]) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if id, ok := j.now[e.Key]; ok {
		j.changes[id] = append(j.changes[id], change{time.Now(), false})
	}
	delete(j.now, e.Key)
	if e.Type == etcdutil.EventPut {
		j.now[e.Key] = e.Value.ID
		j.changes[e.Value.ID] = append(j.changes[e.Value.ID], change{time.Now(), true})
	}
}

// waitGone waits until a server's address is gone.
func (j *judge) waitGone(ctx context.Context, id string) error { return j.waitChanged(ctx, id, 2) }

// waitBack waits until a server's address is gone and has come back.
func (j *judge) waitBack(ctx context.Context, id string) error { return j.waitChanged(ctx, id, 3) }

func (j *judge) waitChanged(ctx context.Context, id string, times int) error {
	return poll(ctx, fmt.Sprintf("waiting for the address of %s", id), func() bool {
		j.mu.Lock()
		defer j.mu.Unlock()
		return len(j.changes[id]) >= times
	})
}

// goneFor returns for how long a server's address had been gone at a time; 0 if it was there.
func (j *judge) goneFor(id string, at time.Time) time.Duration {
	var gone time.Duration
	for _, c := range j.changes[id] {
		if c.at.After(at) {
			break
		}
		gone = 0
		if !c.came {
			gone = at.Sub(c.at)
		}
	}
	return gone
}

// verdict returns what did not hold.
func (j *judge) verdict(calls []call) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	var failures []error
	for _, c := range calls {
		gone := j.goneFor(c.id, c.at)
		crashed := strings.HasPrefix(c.id, "c-1")
		switch {
		case gone > grace:
			failures = append(failures, fmt.Errorf("%s was called %v after its address was gone", c.id, gone))
		case c.err != nil && !crashed && !errors.Is(c.err, context.Canceled):
			failures = append(failures, fmt.Errorf("a call of %s failed: %w", c.id, c.err))
		}
	}
	return errors.Join(failures...)
}

func (j *judge) close() {
	_ = j.watcher.Close()
	j.watching.Wait()
}
