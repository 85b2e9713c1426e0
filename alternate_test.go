package etcdutil

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"example.com/etcdutil/etcdtest"
	"github.com/stretchr/testify/require"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// stamp is what a process writes: under which lock, and which of all its writes this is.
type stamp struct {
	Token   Revision
	Process int
	Count   int
}

// A turnTaker takes the lock again and again and writes the log under it, over a bad network.
type turnTaker struct {
	number  int
	client  *clientv3.Client
	link    *etcdtest.Link
	name    string
	over    context.Context
	count   int
	written map[stamp]int64 // versions
	unknown map[stamp]bool
	failed  map[stamp]bool
	held    int // how often
}

func (p *turnTaker) run(t *testing.T) {
	for p.over.Err() == nil {
		lock, err := Acquire(context.Background(), p.client, p.name, WithTTL(2*time.Second), WithAcquireTimeout(4*time.Second))
		if err != nil {
			continue // cut off
		}
		p.held++
		p.hold(t, lock)
		_ = lock.Close()
	}
}

// hold writes until it is the other's turn, or the lock is lost.
func (p *turnTaker) hold(t *testing.T, lock *Lock) {
	w, err := NewLogWriter[stamp](lock, lock, p.name)
	if err != nil {
		if errors.Is(err, ErrLogConflict) {
			t.Error(err)
		}
		return
	}
	defer func() { _ = w.Close() }()
	for turn := time.Now().Add(rand.N(500 * time.Millisecond)); time.Now().Before(turn) && p.over.Err() == nil; {
		p.count++
		s := stamp{lock.Token(), p.number, p.count}
		patience := 10 * time.Second
		if rand.N(10) == 0 {
			patience = rand.N(3 * time.Millisecond)
		}
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		version, err := w.Write(ctx, s)
		cancel()
		switch {
		case err == nil:
			p.written[s] = version
		case errors.Is(err, ErrUnknownOutcome):
			p.unknown[s] = true
		default:
			p.failed[s] = true
		}
		switch {
		case errors.Is(err, ErrLogConflict):
			t.Error("nobody else writes:", err)
			return
		case errors.Is(err, ErrLockLost), errors.Is(err, ErrClosed):
			return
		}
		sleep(p.over, 10*time.Millisecond)
	}
}

// harm harms the process's network until it is over.
func (p *turnTaker) harm() {
	for p.over.Err() == nil {
		sleep(p.over, rand.N(2*time.Second))
		switch rand.N(4) {
		case 0:
			p.link.Reset()
			continue
		case 1:
			p.link.DropReplies()
		default:
			p.link.Cut()
		}
		// The lock may survive this, or not.
		sleep(p.over, rand.N(time.Duration(rand.N(2)+1)*1500*time.Millisecond))
		p.link.Heal()
	}
}

func TestLogOfProcessesThatTakeTurnsIsOneSequence(t *testing.T) {
	t.Parallel()
	duration := 30 * time.Second
	if testing.Short() {
		duration = 10 * time.Second
	}
	direct := testCluster.Client(t)
	from := revision(t, direct)
	over, cancel := context.WithTimeout(context.Background(), duration)
	defer cancel()
	reading := start(func() (entries []Entry[stamp], _ error) {
		r, err := NewLogReader[stamp](context.Background(), newClient(t, testCluster.Endpoints()...), nameOf(t), WithEveryEntry(from))
		if err != nil {
			return nil, err
		}
		defer func() { _ = r.Close() }()
		for e, err := range r.All() {
			if err != nil {
				return entries, err
			}
			if e.Value == (stamp{}) { // the end
				return entries, nil
			}
			entries = append(entries, e)
		}
		return entries, context.Cause(r)
	})

	var processes [2]*turnTaker
	var all sync.WaitGroup
	for i := range processes {
		client, link := linkedClient(t)
		p := &turnTaker{
			number: i, client: client, link: link, name: nameOf(t), over: over,
			written: map[stamp]int64{}, unknown: map[stamp]bool{}, failed: map[stamp]bool{},
		}
		processes[i] = p
		all.Go(func() { p.run(t) }) // until over
		all.Go(p.harm)
	}
	all.Wait()
	end := mustAcquire(t, direct, nameOf(t))
	_, err := mustWriter[stamp](t, end, nameOf(t)).Write(t.Context(), stamp{})
	require.NoError(t, err)
	within(t, 30*time.Second, reading.done, "the reader gets to the end")
	require.NoError(t, reading.err)

	turns, token, seen := 0, Revision(0), map[stamp]bool{}
	for i, e := range reading.v {
		require.EqualValues(t, i+1, e.Version, "without gap or duplicate")
		require.GreaterOrEqual(t, e.Value.Token, token, "no entry of an older holder after one of a newer")
		if e.Value.Token > token {
			turns++
		}
		token = e.Value.Token
		require.False(t, seen[e.Value], "%+v is there twice", e.Value)
		seen[e.Value] = true
		p := processes[e.Value.Process]
		if version, ok := p.written[e.Value]; ok {
			require.Equal(t, version, e.Version)
		} else {
			require.True(t, p.unknown[e.Value], "%+v was reported as not written", e.Value)
		}
	}
	for i, p := range processes {
		for s := range p.written {
			require.True(t, seen[s], "%+v was reported as written", s)
		}
		for s := range p.failed {
			require.False(t, seen[s], "%+v was reported as not written", s)
		}
		require.NotEmpty(t, p.written)
		t.Logf("process %d: held %d times, %d written, %d unknown, %d failed", i, p.held, len(p.written), len(p.unknown), len(p.failed))
	}
	require.Greater(t, turns, 2)
	t.Logf("%d entries in %d turns", len(reading.v), turns)
}
