// Package etcdutil provides locks, leases, watches and fenced writes for etcd, as Go contexts. It
// builds on go.etcd.io/etcd/client/v3.
//
//	lock, err := etcdutil.Acquire(ctx, client, "jobs/nightly")
//	if err != nil {
//		return err
//	}
//	defer lock.Close()
//	return run(lock) // canceled when the lock is no longer surely held
//
// # Contexts
//
// Every resource is a [context.Context] with a Close. Its context ends when the resource is lost
// or closed, or when its parent ends. [context.Cause] reports why. Each type lists its causes:
// [ErrClosed], the parent's cause, and what it is lost by, such as [ErrLockLost]. Err reports only
// that it ended, as for any context: context.Canceled or context.DeadlineExceeded. Children of a
// resource cost no goroutine.
//
// A constructor's ctx is the parent of the resource, as in [context.WithCancel]. The resource
// inherits the values and the end of its parent. ctx is not a timeout of the call. This helper
// returns a lock whose context has ended. The lock keeps others out until it is closed or its TTL
// has passed:
//
//	func acquireSoon(ctx context.Context) (*etcdutil.Lock, error) {
//		ctx, cancel := context.WithTimeout(ctx, 5*time.Second) // wrong
//		defer cancel()
//		return etcdutil.Acquire(ctx, client, "jobs/nightly")
//	}
//
// This one bounds the wait, and returns a lock that lives on:
//
//	func acquireSoon(ctx context.Context) (*etcdutil.Lock, error) {
//		return etcdutil.Acquire(ctx, client, "jobs/nightly",
//			etcdutil.WithAcquireTimeout(5*time.Second)) // right
//	}
//
// The ctx of every other method bounds that call, and so does that of [NewLogWriter], whose
// parent is the lock.
//
// When the parent of a lock or lease ends, the resource's context ends too. A lease whose parent
// has ended is no longer renewed. Nothing is released, so that work can wind down. Call Close, or
// wait for the TTL. A lock on a shared lease lasts until Close, or for as long as that lease.
//
// # Leases
//
// A [Lease] is kept alive until it is closed or lost. Its context ends before the server can
// expire the lease: at the send time of the last answered renewal, plus the TTL, minus a margin.
// A timer ends it, whatever the network does. All leases of a client are renewed on one stream.
//
// # Locks and fencing
//
// A [Lock] is held when [Acquire] or [TryAcquire] returns it. [Do] runs a function under one.
// Locks are etcd's own recipe: they share a queue with etcdctl lock, concurrency.Mutex and
// concurrency.Election of the same name. The order is first come, first served.
//
// A process that was paused can act after it has lost its lock, before it looks at the context.
// No lock service can prevent that. Fencing can:
//   - [Lock.Commit] writes to etcd if and only if the lock is held, exactly once.
//   - [Lock.IsOwner] guards a transaction of your own.
//   - [Lock.Token] grows with every holder. Give it to other stores, so that they can refuse a
//     smaller one than they have seen.
//
// # Leaders
//
// [Lead] runs a function whenever this process holds the lock of a name. After a loss it waits its
// turn again. [Holder] reports who holds a lock, and so who leads. [WatchHolder] follows that.
//
// # Logs
//
// A log is one key, and its entries are the key's versions. A [LogWriter] writes each entry
// exactly once, under a lock. A [LogReader] reads the latest entry, or every one. Compaction
// removes old entries, so a log is no archive: write a key for each entry that must be kept.
//
// # Registrations
//
// A [Registration] keeps a key in etcd, such as the address of a service, until it is closed. It
// writes the key again after every loss. A newer registration of the same key takes it over.
//
// # Watches
//
// A [Watcher] resumes after faults, for as long as they last. Without a snapshot it sends every
// change, once and in order, and ends with [ErrGap] if compaction or a restore makes that
// impossible. With [WithSnapshot] it follows the state: after missing changes it lists the keys
// again and sends the differences. All watches of a client share streams.
//
// A [Mirror] is a live typed copy of a key or a prefix, from which reads never block.
//
// A [Notify] passes the latest value on to any number of readers in this process.
//
// # Options
//
// An option in the wrong place does not compile, or is refused with an error that names it. Only
// WithSnapshot is accepted by NewMirror and WatchHolder without effect, because they always follow
// the state. The columns of the table are named for what the constructors make. Lock stands for
// Acquire, TryAcquire, Do and Lead, Writer and Reader for those of logs, Holder for WatchHolder,
// and Retry for Retry and the function Holder.
//
//	                      Lease  Lock  Writer  Reader  Watch  Holder  Mirror  Register  Retry
//	WithLogger              x     x      x       x       x      x       x        x        x
//	WithObserver            x     x      x       x       x      x       x        x        x
//	WithRetryPolicy         x     x      x       x       x      x       x        x        x
//	WithKeepAliveInterval   x     x                                              x
//	WithExpiryMargin        x     x                                              x
//	WithMaxKeepAlives       x     x
//	WithTTL                       x                                              x
//	WithLease                     x
//	WithValue                     x
//	WithAcquireTimeout            x
//	WithCodec                            x       x       x              x        x
//	WithEveryEntry                               x
//	WithEntriesAfter                             x
//	WithPrefix                                           x              x
//	WithPrev                                             x      x
//	WithRevision                                         x
//	WithSnapshot                                         x
//
// The options of a lease and WithTTL shape a lock's own lease. They cannot be combined with
// WithLease, whose lease has its own. WithRevision cannot be combined with WithSnapshot, nor
// WithEveryEntry with WithEntriesAfter.
//
// # Shutting down
//
// End the context that the work runs under, wait for the work, then close what it used, and the
// client last. Close works although the parent has ended. It waits for what the resource started,
// for at most 5 s. Many locks on one lease are released by closing the lease: one request
// releases them all.
//
// If Close returns [ErrUnknownOutcome], etcd did not confirm. The error says by when the lease
// will have expired. Nobody has to wait for that: nothing renews it any more.
//
// # Connections
//
// Set DialKeepAliveTime to 10 s and DialKeepAliveTimeout to 5 s in clientv3.Config. Then gRPC
// closes half-open connections, so that requests need not time out on them. gRPC raises a smaller
// time to 10 s. Leases and locks expire in time without it.
//
// A client to several members moves to another one if its own is stuck, isolated or removed. A
// client whose KV, Watcher and Lease are wrapped, as by client/v3/namespace, works. One without a
// connection (clientv3.NewCtxClient) is refused.
//
// # Errors
//
// The errors of this package are sentinels: test for them with [errors.Is], on returned errors
// and on context.Cause(resource). [Lock.Commit], [LogWriter.Write] and [Registration.Set] return
// [ErrUnknownOutcome], and no other error, if the write may have been applied. Bad arguments are
// refused before anything is sent, with an error that names the argument. A nil ctx, client,
// function or option panics. Errors and log lines never contain values, passwords or tokens,
// except that [ErrInvalidValue] wraps the codec's own error, which may quote a value.
//
// # What it cannot promise
//
//   - A paused process can act after losing its lock: use fencing.
//   - The margin must cover the drift between the clocks of client and server during one TTL.
//     What time they show does not matter. The clock of a suspended machine stands still.
//   - A holder cannot foresee that somebody deletes its key or revokes its lease. It is notified
//     when etcd's watch reports it.
//   - After a restore from a backup, revisions may be smaller than before, and so may tokens.
//   - Servers of version 3.5.0 to 3.5.7 report progress that a watch has not reached. Watches
//     need 3.5.8 or later.
package etcdutil

import (
	"errors"
	"fmt"
	"strings"
)

// Revision is a revision of etcd's store. It grows by one with each transaction that changes
// something. 0 is no revision.
type Revision = int64

// These are the errors of this package. Test for them with errors.Is, on returned errors and on
// context.Cause(resource).
var (
	// ErrClosed says that the owner has closed the resource.
	ErrClosed = errors.New("etcdutil: closed")
	// ErrLeaseExpired says that the lease was not renewed in time. The server has deleted its keys,
	// or is about to.
	ErrLeaseExpired = errors.New("etcdutil: lease expired")
	// ErrLeaseRevoked says that the server no longer has the lease.
	ErrLeaseRevoked = errors.New("etcdutil: lease revoked")
	// ErrLockLost says that the lock is no longer held. It wraps the cause if that is known when
	// the loss is noticed: ErrLeaseExpired, ErrLeaseRevoked, or ErrClosed if a shared lease was
	// closed under the lock. Otherwise the lock's key was deleted.
	ErrLockLost = errors.New("etcdutil: lock lost")
	// ErrLockHeld says that somebody else holds the lock or waits for it, or that the caller's
	// context already runs under it.
	ErrLockHeld = errors.New("etcdutil: lock held by another")
	// ErrLogConflict says that somebody else has written the log: without the lock, or by another
	// writer under it.
	ErrLogConflict = errors.New("etcdutil: log written by another")
	// ErrUnknownOutcome says that a write may or may not have been applied, and that reading back
	// could not show which.
	ErrUnknownOutcome = errors.New("etcdutil: outcome unknown")
	// ErrGap says that a watch without a snapshot, or a log's reader, lost events to compaction or
	// to a restore from a backup.
	ErrGap = errors.New("etcdutil: events lost")
	// ErrConditionFailed says that a condition of CommitIf did not hold: nothing was applied, and
	// the lock is held.
	ErrConditionFailed = errors.New("etcdutil: condition failed")
	// ErrNoHolder says that nobody holds the lock.
	ErrNoHolder = errors.New("etcdutil: nobody holds the lock")
	// ErrReplaced says that somebody else has written the key of a registration, under another
	// lease.
	ErrReplaced = errors.New("etcdutil: registration replaced by another")
	// ErrInvalidValue says that a value does not decode. It wraps the codec's error.
	ErrInvalidValue = errors.New("etcdutil: invalid value")
	// ErrInvalidName says that a name is empty, over 512 bytes, not valid UTF-8, or holds a NUL.
	ErrInvalidName = errors.New("etcdutil: invalid name")
)

const errPrefix = "etcdutil: "

// errorf is fmt.Errorf for the errors of exported functions: the text has the package's prefix
// once, at its beginning, whatever it wraps.
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
