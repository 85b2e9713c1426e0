package etcdutil

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// An Observer is called as things happen, for metrics, alerts and tests. Pass it to a constructor
// by [WithObserver]. Each func may be nil.
//
// The funcs of one resource are called one at a time, in the order of the resource's events, from a
// goroutine that only Close waits for, and for no longer than 25 ms. They may block, panic or call
// back. While one blocks, later events of that resource wait: the first 1,000 are kept, later ones
// are dropped. A lock and its own lease are one resource. So are all terms of one [Lead].
//
// Several resources can share an Observer. Their events come from several goroutines at once.
type Observer struct {
	// Acquired is called when a lock is held. Took is how long the caller waited for it.
	Acquired func(LockEvent)
	// Released is called when a lock is closed that was not lost. Took is how long it was held.
	// That the server has confirmed the release is in Close's result only.
	Released func(LockEvent)
	// Lost is called when a lock that was held is lost. Took is how long it was held. Err is the
	// cause: it Is ErrLockLost.
	Lost func(LockEvent)
	// Renewed is called when a lease was renewed. Took is the round trip. Left is what the lease
	// had left when the answer came: the smaller it is, the nearer was the loss.
	Renewed func(LeaseEvent)
	// Retrying is called for each attempt that failed and is repeated, and for a renewal whose
	// answer is late. A watch that loses its stream and resumes at once does not call it.
	Retrying func(RetryEvent)
	// Resynced is called when a watch lists again because it may have missed changes.
	Resynced func(WatchEvent)
}

// LockEvent describes what happened to the lock of this Name and Token. Took is the wait in
// Acquired, and otherwise how long the lock was held. Err is nil except in Lost.
type LockEvent struct {
	Name  string
	Token Revision
	Took  time.Duration
	Err   error
}

// LeaseEvent describes a renewal. Lease is the lease's ID. Took is the round trip, and Left is the
// time that the lease still had when the answer came.
type LeaseEvent struct {
	Lease      clientv3.LeaseID
	Took, Left time.Duration
}

// RetryEvent describes an attempt that failed with Err. Attempt is its number, from 1. Op is the
// operation. It is one of a few strings without names or IDs, so that it can be a metric's label.
// The set of operations may change with a version.
type RetryEvent struct {
	Op      string
	Attempt int
	Err     error
}

// WatchEvent reports that a watch of Key lists again, because of Err.
type WatchEvent struct {
	Key string
	Err error
}

// WithObserver sets the [Observer] that is called as things happen. The default is none, and costs
// nothing.
func WithObserver(o Observer) Option {
	return option(func(c *config) { c.observer = &o })
}

// maxPendingReports bounds what a reporter keeps while user code blocks.
const maxPendingReports = 1000

// reporter writes the log lines of one resource and calls its Observer. All user code that reports
// runs here: it may block, panic or call back.
//
// A nil reporter reports nothing.
type reporter struct {
	logger   *slog.Logger
	observer Observer

	mu      sync.Mutex
	pending []func()
	idle    chan struct{} // closed when everything is reported; nil if no goroutine runs
}

// newReporter returns nil if nobody listens.
func newReporter(logger *slog.Logger, observer *Observer) *reporter {
	if logger == discard && observer == nil {
		return nil
	}
	r := &reporter{logger: logger}
	if observer != nil {
		r.observer = *observer
	}
	return r
}

// submit has report run after what was submitted before it.
func (r *reporter) submit(report func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.pending) >= maxPendingReports {
		return
	}
	r.pending = append(r.pending, report)
	if r.idle == nil {
		r.idle = make(chan struct{})
		go r.run() // until nothing is pending
	}
}

func (r *reporter) run() {
	reported := false
	defer func() {
		if !reported { // user code has ended this goroutine, by runtime.Goexit
			go r.run()
		}
	}()
	for {
		report := r.next()
		if report == nil {
			reported = true
			return
		}
		runRecovered(report)
	}
}

// next removes the oldest report, or returns nil and ends the run.
func (r *reporter) next() func() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.pending) == 0 {
		close(r.idle)
		r.idle, r.pending = nil, nil
		return nil
	}
	report := r.pending[0]
	r.pending = r.pending[1:]
	return report
}

// runRecovered runs f. A panic of the user's logger or observer must not end the process.
func runRecovered(f func()) {
	defer func() { _ = recover() }()
	f()
}

// flushTime is how long Close waits for the last log line, so that a program which exits after
// Close has written it.
const flushTime = 25 * time.Millisecond

// flush waits until everything is reported, but not for long: user code may block.
func (r *reporter) flush() {
	if r == nil {
		return
	}
	r.mu.Lock()
	idle := r.idle
	r.mu.Unlock()
	if idle == nil {
		return
	}
	select {
	case <-idle:
	case <-time.After(flushTime):
	}
}

func (r *reporter) log(level slog.Level, msg string, args ...any) {
	r.logger.Log(context.Background(), level, "etcdutil: "+msg, args...)
}

func call[E any](f func(E), e E) {
	if f != nil {
		f(e)
	}
}

func (r *reporter) lockAcquired(e LockEvent) {
	if r == nil {
		return
	}
	r.submit(func() {
		r.log(slog.LevelInfo, "lock acquired", "name", e.Name, "token", e.Token, "waited", e.Took)
		call(r.observer.Acquired, e)
	})
}

func (r *reporter) lockReleased(e LockEvent) {
	if r == nil {
		return
	}
	r.submit(func() {
		r.log(slog.LevelInfo, "lock released", "name", e.Name, "token", e.Token, "held", e.Took)
		call(r.observer.Released, e)
	})
}

func (r *reporter) lockLost(e LockEvent) {
	if r == nil {
		return
	}
	r.submit(func() {
		r.log(slog.LevelWarn, "lock lost", "name", e.Name, "token", e.Token, "held", e.Took, "cause", e.Err)
		call(r.observer.Lost, e)
	})
}

// lockWatchFailing reports that a lock's own key cannot be watched for now. It logs the first
// attempt.
func (r *reporter) lockWatchFailing(name string, attempt int, err error) {
	if r == nil {
		return
	}
	r.submit(func() {
		if attempt == 1 {
			r.log(slog.LevelWarn, "lock's key cannot be watched", "name", name, "error", err)
		}
		call(r.observer.Retrying, RetryEvent{Op: "watch the lock's key", Attempt: attempt, Err: err})
	})
}

func (r *reporter) leaseRenewed(e LeaseEvent) {
	if r == nil || r.observer.Renewed == nil {
		return
	}
	r.submit(func() { r.observer.Renewed(e) })
}

var errRenewalLate = errors.New("the answer to a renewal is late")

func (r *reporter) renewalLate(id clientv3.LeaseID, expiry time.Time) {
	if r == nil {
		return
	}
	r.submit(func() {
		r.log(slog.LevelWarn, "lease renewal is late", "lease", hexID(id), "expiry", expiry)
		call(r.observer.Retrying, RetryEvent{Op: "renew the lease", Attempt: 1, Err: errRenewalLate})
	})
}

func (r *reporter) renewalDenied(id clientv3.LeaseID, expiry time.Time, err error) {
	if r == nil {
		return
	}
	r.submit(func() {
		r.log(slog.LevelWarn, "lease renewal is refused", "lease", hexID(id), "expiry", expiry, "error", err)
		call(r.observer.Retrying, RetryEvent{Op: "renew the lease", Attempt: 1, Err: err})
	})
}

func (r *reporter) leaseLost(id clientv3.LeaseID, cause error) {
	if r == nil {
		return
	}
	r.submit(func() { r.log(slog.LevelWarn, "lease lost", "lease", hexID(id), "cause", cause) })
}

// retrying logs the first failure of an outage, and calls the Observer for each.
func (r *reporter) retrying(e RetryEvent) {
	if r == nil {
		return
	}
	r.submit(func() {
		if e.Attempt == 1 {
			r.log(slog.LevelWarn, "retrying", "operation", e.Op, "error", e.Err)
		}
		call(r.observer.Retrying, RetryEvent{Op: withoutID(e.Op), Attempt: e.Attempt, Err: e.Err})
	})
}

// withoutID returns the name of an operation without the lease ID that log lines have. The rest is
// fit for a metric's label.
func withoutID(op string) string {
	if before, _, ok := strings.Cut(op, "lease "); ok {
		return before + "lease"
	}
	return op
}

// watchStalled reports that a watch cannot be resumed for now. It logs the second attempt: the
// first may fail because a connection broke.
func (r *reporter) watchStalled(key string, attempt int, err error) {
	if r == nil {
		return
	}
	r.submit(func() {
		if attempt == 2 {
			r.log(slog.LevelWarn, "watch cannot be resumed yet", "key", key, "cause", err)
		}
		call(r.observer.Retrying, RetryEvent{Op: "watch", Attempt: attempt, Err: err})
	})
}

func (r *reporter) watchResynced(e WatchEvent) {
	if r == nil {
		return
	}
	r.submit(func() {
		r.log(slog.LevelWarn, "watch resyncs", "key", e.Key, "cause", e.Err)
		call(r.observer.Resynced, e)
	})
}

// hexID is a lease ID as etcdctl prints it.
func hexID(id clientv3.LeaseID) string { return fmt.Sprintf("%x", int64(id)) }
