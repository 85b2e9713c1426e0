package etcdutil

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// maxCommitOps is etcd's limit of 128 operations in a transaction, less the one by which a Commit recognises itself.
const maxCommitOps = 127

// Commit applies ops in one transaction if and only if the lock is held, exactly once, and returns the revision.
//
// ErrLockLost and ErrClosed say that they were not applied; ErrUnknownOutcome, that they may have been: no answer came before
// ctx or the lock ended or [RetryPolicy] gave up, or the key was gone when it did. Any other error, also one from ctx, is the
// reason why they were not applied.
//
// Commits of one lock are serialised. ops are 127 at most, possibly none, and must not write the lock's own key. After
// the parent's end Commit still works, until Close or until the lease runs out: winding down may need to save its state.
// Give it then a context of its own, since ctx bounds the call.
//
// After ErrUnknownOutcome the write may still be applied, until the next Commit: before reading what that is to depend on,
// settle it by a Commit of nothing.
func (l *Lock) Commit(ctx context.Context, ops ...clientv3.Op) (Revision, error) {
	if ctx == nil {
		panic("etcdutil: nil ctx")
	}
	if err := l.checkOps(ops); err != nil {
		return 0, err
	}
	rev, err := l.exclusively(ctx, l.config.retry, func(ctx context.Context) (Revision, error) { return l.bump(ctx, l.config.retry, ops) })
	if err != nil {
		return 0, fmt.Errorf("etcdutil: commit under %q: %w", l.name, withContextError(ctx, err))
	}
	return rev, nil
}

func (l *Lock) checkOps(ops []clientv3.Op) error {
	if len(ops) > maxCommitOps {
		return fmt.Errorf("etcdutil: ops: %d operations, at most %d", len(ops), maxCommitOps)
	}
	for i, op := range ops {
		if !op.IsGet() && !op.IsPut() && !op.IsDelete() && !op.IsTxn() {
			return fmt.Errorf("etcdutil: ops[%d] is not an operation", i)
		}
		if writes(op, []byte(l.key)) {
			return fmt.Errorf("etcdutil: ops[%d] writes the lock's own key %q", i, l.key)
		}
	}
	return nil
}

// writes reports whether op may write key.
func writes(op clientv3.Op, key []byte) bool {
	switch {
	case op.IsTxn():
		_, then, otherwise := op.Txn()
		for _, nested := range append(append([]clientv3.Op{}, then...), otherwise...) {
			if writes(nested, key) {
				return true
			}
		}
		return false
	case op.IsGet():
		return false
	}
	begin, end := op.KeyBytes(), op.RangeBytes()
	switch {
	case len(end) == 0:
		return bytes.Equal(begin, key)
	case bytes.Equal(end, []byte{0}): // to the end of the keyspace
		return bytes.Compare(begin, key) <= 0
	}
	return bytes.Compare(begin, key) <= 0 && bytes.Compare(key, end) < 0
}

// lastAnswer is how long the answer to a transaction is waited for that was under way when the lock was lost. It is most
// often about to come, and says what became of it.
const lastAnswer = 200 * time.Millisecond

// exclusively runs a transaction under the lock: alone, with nothing left that an earlier one has sent and that may yet be
// applied, and in a context that ends soon after the lock is lost.
func (l *Lock) exclusively(ctx context.Context, policy RetryPolicy, f func(ctx context.Context) (Revision, error)) (Revision, error) {
	if elapsed := policy.withDefaults().Elapsed; elapsed > 0 { // all of this is one call
		var stop context.CancelFunc
		ctx, stop = context.WithTimeoutCause(ctx, elapsed, fmt.Errorf("etcdutil: gave up after %v", elapsed))
		defer stop()
	}
	select {
	case l.committing <- struct{}{}:
		defer func() { <-l.committing }()
	case <-ctx.Done():
		return 0, contextError(ctx)
	}
	if lost := l.lost(); lost != nil {
		return 0, lost
	}
	held, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(l.stopCtx, func() {
		sleep(held, lastAnswer)
		cancel(context.Cause(l.stopCtx))
	})()
	if l.unsettled {
		// What was sent before compares the version, so it can no longer be applied once that is bumped.
		if _, err := l.bump(held, policy, nil); err != nil {
			return 0, l.definite(fmt.Errorf("nothing sent, because an earlier outcome is still open: %w", notUnknown(err)))
		}
	}
	return f(held)
}

// notUnknown is err without ErrUnknownOutcome, which is not said of what was not sent.
func notUnknown(err error) error {
	if errors.Is(err, ErrUnknownOutcome) {
		return errors.New(err.Error())
	}
	return err
}

// isCurrent compares whether the lock is held, and nothing was committed since what is known of it: a key that was deleted and
// created again has another revision as well.
func (l *Lock) isCurrent() clientv3.Cmp {
	return clientv3.Compare(clientv3.ModRevision(l.key), "=", l.revision)
}

// bump applies ops and raises the version of the lock's key in one transaction, if that is current. By the version, one read
// tells after a lost answer whether it was applied: nobody else raises it.
func (l *Lock) bump(ctx context.Context, policy RetryPolicy, ops []clientv3.Op) (Revision, error) {
	then := append(append([]clientv3.Op{}, ops...),
		clientv3.OpPut(l.key, "", clientv3.WithIgnoreValue(), clientv3.WithIgnoreLease()))
	resp, d, err := l.transact(ctx, policy, []clientv3.Cmp{l.isCurrent()}, then)
	switch {
	case err != nil && !d.applied:
		l.unsettled = true // clientv3 may have sent it twice by itself, and tells only how the second one fared
		return 0, l.definite(err)
	case err == nil && resp.Succeeded:
		return l.settled(resp.Header.Revision), nil
	}
	return l.readBack(ctx, policy, err, d)
}

// doubt is what the attempts at a transaction leave open that were not answered.
type doubt struct {
	applied   bool // one of them may have been applied
	straggler bool // one may yet be
}

// transact repeats a guarded transaction until it is answered.
func (l *Lock) transact(ctx context.Context, policy RetryPolicy, guards []clientv3.Cmp, then []clientv3.Op) (*clientv3.TxnResponse, doubt, error) {
	var d doubt
	resp, err := retry(ctx, &l.config, policy, "commit", func(ctx context.Context) (*clientv3.TxnResponse, error) {
		resp, err := l.config.client.Txn(ctx).If(guards...).Then(then...).Commit()
		if IsAmbiguous(err) {
			d.applied = true
			// Without space left etcd may have applied it, but will not do so later.
			d.straggler = d.straggler || !errors.Is(err, rpctypes.ErrNoSpace)
		}
		return resp, err
	})
	return resp, d, err
}

func (l *Lock) settled(rev Revision) Revision {
	l.version++
	l.revision = rev
	l.unsettled = false
	return rev
}

// definite is the error for what was not applied.
func (l *Lock) definite(err error) error {
	if lost := l.lost(); lost != nil {
		return lost
	}
	return err
}

// unknown is the error for what may have been applied. It must not wrap what ended the lock: ErrLockLost would say that
// it was not.
func (l *Lock) unknown(why any) error {
	l.unsettled = true
	return fmt.Errorf("%w: %v", ErrUnknownOutcome, why)
}

// errRefused says that guards did not hold.
var errRefused = errors.New("refused, although nothing has changed")

// readBack tells whether a transaction was applied that was refused by its guard, or else failed with err.
func (l *Lock) readBack(ctx context.Context, policy RetryPolicy, err error, d doubt) (Revision, error) {
	kv, readErr := l.read(ctx, policy)
	switch {
	case readErr != nil: // a refusal may be that of clientv3's own repetition
		return 0, l.unknown(cmp.Or(err, readErr))
	case kv == nil && !d.applied:
		return 0, l.keyGone()
	case kv == nil:
		_ = l.keyGone()
		return 0, l.unknown("the lock's key is gone")
	case kv.Version == l.version+1 && string(kv.Value) == l.value:
		return l.settled(kv.ModRevision), nil
	case kv.ModRevision != l.revision:
		l.version, l.revision = kv.Version, kv.ModRevision
		return 0, l.unknown("the lock's key was written by somebody else")
	case d.straggler || err == nil:
		return 0, l.unknown(cmp.Or(err, errRefused))
	}
	return 0, err
}
