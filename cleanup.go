package etcdutil

import (
	"context"
	"time"
)

// maxClosing bounds how long Close may take.
const maxClosing = 5 * time.Second

// releasePolicy is how a resource is released within bound: with time for a second attempt, which
// may reach another member.
func releasePolicy(bound time.Duration) RetryPolicy {
	bound = max(min(bound, maxClosing), time.Millisecond)
	p := RetryPolicy{Elapsed: bound}
	if bound < 2*firstAttemptTimeout {
		p.AttemptTimeout = bound / 2
	}
	return p
}

// untilDone is the policy of work that ends with its context, and not before.
var untilDone = RetryPolicy{Elapsed: -1}

// lateWindow is how long a request that was given up may still arrive.
const lateWindow = 30 * time.Second

// removeRepeatedly calls remove until it succeeds, and then for repeatFor, because the write that it
// undoes may still arrive. It ends when ctx or the client does, or when remove fails for good.
func removeRepeatedly(ctx context.Context, c *config, what string, repeatFor time.Duration, remove func(ctx context.Context) error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(c.client.Ctx(), cancel)()
	var until time.Time
	for pause := defaultInitial; ; pause = min(2*pause, lateWindow/10) {
		_, err := retry(ctx, c, untilDone, what, func(ctx context.Context) (struct{}, error) { return struct{}{}, remove(ctx) })
		if until.IsZero() {
			until = time.Now().Add(repeatFor)
		}
		if err != nil || !time.Now().Before(until) {
			return
		}
		sleep(ctx, pause)
	}
}

// inBackground runs f and waits for it only as long as it takes when etcd can be reached. What a
// failed call may have left is removed so, since the caller's context may end long before etcd is
// back.
func inBackground(f func()) {
	done := make(chan struct{})
	go func() { // until f's own bound
		defer close(done)
		f()
	}()
	select {
	case <-done:
	case <-time.After(25 * time.Millisecond):
	}
}
