// Package etcdutil is what a Go service needs above go.etcd.io/etcd/client/v3: leases that renew themselves, locks
// that cancel your work when they are lost, a log that only the lock's holder can write, watches that never go silently
// wrong, and retries that know what is safe to retry.
//
// # Contexts
//
// Every resource is a [context.Context] with a Close. To hold a lock is to run under its context:
//
//	err := etcdutil.Do(ctx, client, "jobs/nightly", func(ctx context.Context) error {
//		return work(ctx) // ctx ends when the lock is no longer surely held
//	})
//
// A constructor's ctx is the resource's parent, as in database/sql's BeginTx: its values and its end are inherited. It
// is not a timeout for the call; [WithAcquireTimeout] is. To every other method ctx bounds that call alone.
//
// When a parent ends, the context ends and the resource's own lease is renewed no longer, but nothing is released: the work may
// still be winding down. Close releases; without it the server does, when the lease's TTL has passed. [context.Cause] says
// why a resource's context ended: [ErrClosed], [ErrLeaseExpired], [ErrLeaseRevoked], [ErrLockLost], or the parent's
// cause. Err and Deadline are the plain ones of a context; what moves is [Lease.Expiry].
//
// # Leases
//
// A [Lease] ends before the server may give its keys away: its time runs from the moment at which the last answered
// renewal was sent, less a margin, on a timer of its own. All leases of one client share one stream.
//
// # Locks and fencing
//
// A [Lock] is etcd's own recipe, so it shares one queue with etcdctl lock, concurrency.Mutex and concurrency.Election
// on the same name. The order is first come, first served.
//
// A process that is paused, swapped or stopped in a debugger may act after it has lost its lock and before it looks.
// No lock service can prevent that; fencing can. [Lock.Commit] writes to etcd if and only if the lock is held, exactly
// once. [Lock.IsOwner] guards a transaction of your own. [Lock.Token] grows with every holder: hand it to other stores
// and let them refuse a smaller one than they have seen.
//
// # Logs
//
// A log is one key, and its entries are the key's versions. A [LogWriter] writes it under a lock, each entry exactly once,
// and tells a lock that was lost from a log that somebody else wrote. A [LogReader] reads the latest entry, or every one.
//
// # Watches
//
// A [Watcher] resumes after faults. Without a snapshot it tells every change once and in order, and ends with [ErrGap] where
// compaction makes that impossible. With [WithSnapshot] it follows the state: where it has missed changes it lists what
// there is, and tells the difference. A value that does not decode is an event like others.
//
// A [Notify] passes the latest value on to any number of readers.
//
// # Errors
//
// The errors below are sentinels: test for them with [errors.Is], on returned errors and on context.Cause(resource).
// Bad arguments are refused with an error that names the argument before anything is sent; a nil ctx, client or
// function panics. A write that may or may not have been applied is never called failed: it is [ErrUnknownOutcome].
//
// # What it cannot promise
//
// That nobody acts after a loss (fence), that clocks of client and server run at one speed (the margin, a tenth of the
// TTL, is what they may differ by during one TTL; the clock of a machine that is suspended stands still), and that a
// broken connection which nobody closes is noticed by a watch: set DialKeepAliveTime in clientv3.Config, or a deleted lock
// key may be noticed late. That a lease was not renewed is noticed in time without.
package etcdutil

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/metadata"
)

// Revision is an etcd store revision.
type Revision = int64

// Test for these with errors.Is, on returned errors and on context.Cause(resource).
var (
	// ErrClosed says that the owner closed it.
	ErrClosed = errors.New("etcdutil: closed")
	// ErrLeaseExpired says that the lease was not renewed in time: the server may have given its keys away, or is
	// about to.
	ErrLeaseExpired = errors.New("etcdutil: lease expired")
	// ErrLeaseRevoked says that the server no longer knows the lease.
	ErrLeaseRevoked = errors.New("etcdutil: lease revoked")
	// ErrLockLost says that the lock is no longer held. It wraps ErrLeaseExpired, ErrLeaseRevoked or (a shared lease
	// closed under its lock) ErrClosed where that is why; else the lock's key was deleted.
	ErrLockLost = errors.New("etcdutil: lock lost")
	// ErrLockHeld says that somebody else holds the lock or waits for it.
	ErrLockHeld = errors.New("etcdutil: lock held by another")
	// ErrLogConflict says that the log was written by somebody else: who does not hold this lock, or by another writer
	// under it.
	ErrLogConflict = errors.New("etcdutil: log written by another")
	// ErrUnknownOutcome says that a write may or may not have been applied, and that reading back could not tell.
	ErrUnknownOutcome = errors.New("etcdutil: outcome unknown")
	// ErrGap says that a watch without a snapshot lost events to compaction.
	ErrGap = errors.New("etcdutil: events lost to compaction")
	// ErrInvalidName says that a name is empty, over 512 bytes, not valid UTF-8, or holds a NUL.
	ErrInvalidName = errors.New("etcdutil: invalid name")
)

// An Option is understood by every constructor and by [Retry].
type Option interface {
	LeaseOption
	RetryOption
	WatchOption
	LogOption
}

// WithLogger sets where a constructor's resource logs: one line when a lock is acquired or lost, when a renewal is
// late, when a retry starts (once per outage), when a watch lists again. Never a value or a credential. The default, and nil,
// discards.
func WithLogger(l *slog.Logger) Option {
	if l == nil {
		l = discard
	}
	return option(func(c *config) { c.logger = l })
}

// WithRetryPolicy sets how requests to etcd are retried. The default is the zero [RetryPolicy]. A policy with a
// negative Initial, Max, Attempts or AttemptTimeout, or a Max below its Initial, is refused.
func WithRetryPolicy(p RetryPolicy) Option {
	return option(func(c *config) { c.retry = p })
}

var discard = slog.New(slog.DiscardHandler)

// config is what every constructor takes.
type config struct {
	logger *slog.Logger
	retry  RetryPolicy
	client *clientv3.Client // nil in Retry, which knows none
}

type option func(*config)

func (o option) applyRetry(c *config)      { o(c) }
func (o option) applyLease(c *leaseConfig) { o(&c.config) }
func (o option) applyLock(c *lockConfig)   { o(&c.config) }
func (o option) applyWatch(c *watchConfig) { o(&c.config) }
func (o option) applyLog(c *logConfig)     { o(&c.config) }

// requireClient panics on what only a programming error passes, and refuses a client that has no connection.
func requireClient(ctx context.Context, client *clientv3.Client) error {
	if ctx == nil {
		panic("etcdutil: nil ctx")
	}
	if client == nil {
		panic("etcdutil: nil client")
	}
	if client.ActiveConnection() == nil {
		return errors.New("etcdutil: client has no connection (clientv3.NewCtxClient makes such a one)")
	}
	return nil
}

// lifetime is embedded by every resource and makes it a context.
//
// It is two contexts: ctx is what the user runs under, and ends with its parent too; held outlives the parent and ends
// when the resource is lost or closed, whichever is first. Between the two the work winds down.
type lifetime struct {
	ctx  context.Context
	end  context.CancelCauseFunc
	held context.Context
	drop context.CancelCauseFunc
	once sync.Once

	// ending, unless nil, is called before ctx ends: what runs under it may have to be told another cause.
	ending func(cause error)
}

func (l *lifetime) begin(parent context.Context) {
	l.ctx, l.end = context.WithCancelCause(parent)
	l.held, l.drop = context.WithCancelCause(context.WithoutCancel(parent))
}

// finish ends both contexts. It reports whether this call did it: the first cause is the one that counts.
func (l *lifetime) finish(cause error) (first bool) {
	l.once.Do(func() {
		l.drop(cause)
		if l.ending != nil {
			l.ending(cause)
		}
		l.end(cause)
		first = true
	})
	return first
}

// Deadline is the parent's.
func (l *lifetime) Deadline() (time.Time, bool) { return l.ctx.Deadline() }

// Done is closed when the resource is lost or closed, or its parent ends. context.Cause tells which.
func (l *lifetime) Done() <-chan struct{} { return l.ctx.Done() }

// Err is nil, context.Canceled or context.DeadlineExceeded, as of any context.
func (l *lifetime) Err() error { return l.ctx.Err() }

// Value is the parent's.
func (l *lifetime) Value(key any) any { return l.ctx.Value(key) }

// maxClosing bounds how long Close may take.
const maxClosing = 5 * time.Second

// closing is how a resource is given back: on a context that has ctx's values but not its end, within bound, and with
// time for a second attempt, which may reach another member.
func (c *config) closing(ctx context.Context, bound time.Duration) (context.Context, *config) {
	bound = max(min(bound, maxClosing), time.Millisecond)
	hasty := *c
	hasty.retry = RetryPolicy{Elapsed: bound, AttemptTimeout: bound / 2}
	return context.WithoutCancel(ctx), &hasty
}

// stragglers is for how long a request that was given up is feared to arrive late.
const stragglers = 30 * time.Second

// sweep calls remove until it has succeeded, and then again for as long as fear: what it is to remove may arrive late. It
// ends when ctx or the client does, or when remove fails for good.
func sweep(ctx context.Context, c *config, fear time.Duration, remove func(ctx context.Context) error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(c.client.Ctx(), cancel)()
	patient := *c
	patient.retry = RetryPolicy{Elapsed: -1}
	var until time.Time
	for pause := defaultInitial; ; pause = min(2*pause, stragglers/10) {
		_, err := retry(ctx, &patient, func(ctx context.Context) (struct{}, error) { return struct{}{}, remove(ctx) })
		if until.IsZero() {
			until = time.Now().Add(fear)
		}
		if err != nil || !time.Now().Before(until) {
			return
		}
		sleep(ctx, pause)
	}
}

// behind runs f behind the caller's back: it waits only as long as f takes when etcd is there. What a failed call may
// have left is removed so, since the caller's context may have ended long before etcd is back.
func behind(f func()) {
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

// watchContext is for a watch on which failed ones have gone before. A watch needs a leader, so that a member which is cut
// off from the quorum is left. One that failed gets another stream, which clientv3 chooses by the metadata: after a token
// has expired, all new watches on the stream that was opened with it are refused (etcd-io/etcd#12385).
func watchContext(ctx context.Context, failed int) context.Context {
	ctx = clientv3.WithRequireLeader(ctx)
	if failed == 0 {
		return ctx
	}
	return metadata.AppendToOutgoingContext(ctx, "etcdutil-stream", strconv.Itoa(failed))
}

// ended is the error for a ctx that has ended: it Is both ctx.Err() and context.Cause(ctx).
func ended(ctx context.Context) error {
	err, cause := ctx.Err(), context.Cause(ctx)
	if errors.Is(cause, err) {
		return cause
	}
	return fmt.Errorf("%w: %w", err, cause)
}

// sleep waits for d, or until ctx ends.
func sleep(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}
