package etcdutil

import (
	"context"
	"slices"
	"sync"
	"time"
)

// keySweeper removes the keys of locks on a shared lease that have ended, where removing them failed,
// or where they may still be written. One goroutine serves all of them, for as long as there are any.
type keySweeper struct {
	lease *Lease

	mu      sync.Mutex
	keys    []*sweptKey
	running bool
}

type sweptKey struct {
	ctx     context.Context // for its values
	queue   *contender
	settles time.Time // when the key can no longer be written; zero until it was removed once
}

// maxSweptKeys bounds what an outage may leave. The oldest are given up first: what is written of them
// later, a renewal of the lease finds.
const maxSweptKeys = 1000

// sweepAttempt bounds one attempt to remove a key.
const sweepAttempt = time.Second

// removeOnce makes one attempt to remove the key. It reports whether the key is gone for good.
func (k *sweptKey) removeOnce() (gone bool, err error) {
	ctx, cancel := context.WithTimeout(k.ctx, sweepAttempt)
	defer cancel()
	if err := k.queue.remove(ctx); err != nil {
		return false, err
	}
	if !k.queue.writes.mayStillApply {
		return true, nil
	}
	if k.settles.IsZero() {
		k.settles = time.Now().Add(lateWindow)
	}
	return !time.Now().Before(k.settles), nil
}

// remove removes the key of a lock that has ended, later if it cannot be removed now.
func (s *keySweeper) remove(lock *Lock) {
	k := &sweptKey{ctx: context.WithoutCancel(lock.ctx), queue: &lock.queue}
	if gone, _ := k.removeOnce(); gone {
		s.lease.freeKey(k.queue.key)
		return
	}
	s.add(k)
}

func (s *keySweeper) add(k *sweptKey) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.keys) == maxSweptKeys {
		s.lease.freeKey(s.keys[0].queue.key)
		s.keys = s.keys[1:]
	}
	s.keys = append(s.keys, k)
	if !s.running {
		s.running = true
		go s.run() // until no key is left, or the lease has ended
	}
}

func (s *keySweeper) run() {
	ctx := s.lease.stopCtx
	for pause := defaultInitial; s.round(); pause = min(2*pause, lateWindow/10) {
		sleep(ctx, pause)
	}
}

// round tries to remove each key once. It reports whether any is left.
func (s *keySweeper) round() bool {
	for _, k := range s.all() {
		if s.over() {
			return false
		}
		gone, err := k.removeOnce()
		if gone {
			s.lease.freeKey(k.queue.key)
			s.drop(k)
		}
		if err != nil {
			s.postpone(k)
			if isContextError(err) || IsTransient(err) { // the others would fare no better
				break
			}
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.running = len(s.keys) > 0
	return s.running
}

// over reports whether the lease or the client has ended. Then the keys go with the lease.
func (s *keySweeper) over() bool {
	if s.lease.stopCtx.Err() == nil && s.lease.config.client.Ctx().Err() == nil {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.keys, s.running = nil, false
	return true
}

func (s *keySweeper) all() []*sweptKey {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.keys)
}

func (s *keySweeper) drop(k *sweptKey) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.keys = slices.DeleteFunc(s.keys, func(other *sweptKey) bool { return other == k })
}

// postpone has the others tried first the next time.
func (s *keySweeper) postpone(k *sweptKey) {
	s.drop(k)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.keys = append(s.keys, k)
}
