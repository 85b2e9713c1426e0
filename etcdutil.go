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
	"errors"
	"fmt"
	"strings"
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
	// ErrGap says that a watch without a snapshot lost events to compaction, or to a restore from a
	// backup.
	ErrGap = errors.New("etcdutil: events lost")
	// ErrConditionFailed says that a condition of CommitIf did not hold: nothing was applied, and the
	// lock is held.
	ErrConditionFailed = errors.New("etcdutil: condition failed")
	// ErrNoHolder says that nobody holds the lock.
	ErrNoHolder = errors.New("etcdutil: nobody holds the lock")
	// ErrReplaced says that somebody else has written the key of a registration, under a lease of
	// theirs.
	ErrReplaced = errors.New("etcdutil: registration replaced by another")
	// ErrInvalidValue says that a value does not decode. It wraps the codec's error.
	ErrInvalidValue = errors.New("etcdutil: invalid value")
	// ErrInvalidName says that a name is empty, over 512 bytes, not valid UTF-8, or holds a NUL.
	ErrInvalidName = errors.New("etcdutil: invalid name")
)

const errPrefix = "etcdutil: "

// errorf is fmt.Errorf for the errors of exported functions: the text has the package's prefix once,
// at its beginning, whatever it wraps.
func errorf(format string, args ...any) error {
	err := fmt.Errorf(format, args...)
	text := strings.TrimPrefix(err.Error(), errPrefix)
	return &prefixedError{errPrefix + strings.ReplaceAll(text, ": "+errPrefix, ": "), err}
}

type prefixedError struct {
	text string
	err  error
}

func (e *prefixedError) Error() string { return e.text }
func (e *prefixedError) Unwrap() error { return e.err }
