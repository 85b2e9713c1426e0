package etcdutil

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// maxCommitOps is etcd's limit of 128 operations in a transaction, less the one by which a Commit
// recognizes itself.
const maxCommitOps = 127

// Commit applies ops in one transaction if and only if the lock is held, exactly once, and returns
// the transaction's revision. It is [Lock.CommitIf] without conditions. A Get among ops is carried
// out, and its result is discarded. A nil ctx panics.
//
// Errors:
//   - [ErrLockLost] or [ErrClosed] if the lock is not held. Nothing was applied.
//   - [ErrUnknownOutcome] if the transaction may have been applied, or may still be. The next
//     Commit, even an empty one, rules out that it is applied later.
//   - Any other error, also ctx's, says why nothing was applied.
func (l *Lock) Commit(ctx context.Context, ops ...clientv3.Op) (Revision, error) {
	return l.CommitIf(ctx, nil, ops...)
}

// CommitIf applies ops in one transaction if and only if the lock is held and every condition
// holds, exactly once, and returns the revision.
//
// There may be 127 ops and 127 conditions at most, and none at least. ops must not write the lock's
// own key. A Get among them is carried out, and its result is discarded. Commits of one lock take
// turns. A nil ctx panics.
//
// ctx bounds this call. After the end of the lock's parent CommitIf still works, until Close or
// until the lease expires, because winding down may need to save state: give it a context of its
// own then.
//
// Errors:
//   - [ErrConditionFailed] if a condition did not hold. Nothing was applied, and the lock is held.
//   - [ErrLockLost] or [ErrClosed] if the lock is not held. Nothing was applied.
//   - [ErrUnknownOutcome] if the transaction may have been applied: no answer came before ctx or
//     the lock ended or [RetryPolicy] gave up, or the key was gone afterwards and a sending of the
//     transaction is not accounted for. The transaction may still be applied later. The next
//     Commit, even an empty one, rules that out.
//   - Any other error, also ctx's, says why nothing was applied.
//
// Through a client whose KV is wrapped, for example by client/v3/namespace, CommitIf cannot observe
// what clientv3 sends: there a lock whose key is gone is ErrUnknownOutcome.
func (l *Lock) CommitIf(ctx context.Context, conditions []clientv3.Cmp, ops ...clientv3.Op) (Revision, error) {
	if ctx == nil {
		panic("etcdutil: nil ctx")
	}
	if err := checkCommit(l.queue.key, conditions, ops); err != nil {
		return 0, err
	}
	var rev Revision
	err := l.fence.do(ctx, &l.config, func(ctx context.Context) (err error) {
		rev, err = l.fence.commit(ctx, &l.config, conditions, ops)
		return err
	})
	if err != nil {
		return 0, errorf("commit under %q: %w", l.queue.name, withEndOf(ctx, err))
	}
	return rev, nil
}

func checkCommit(key string, conditions []clientv3.Cmp, ops []clientv3.Op) error {
	if len(conditions) > maxCommitOps {
		return errorf("conditions: %d, at most %d", len(conditions), maxCommitOps)
	}
	if len(ops) > maxCommitOps {
		return errorf("ops: %d operations, at most %d", len(ops), maxCommitOps)
	}
	for i, c := range conditions {
		if len(c.KeyBytes()) == 0 {
			return errorf("conditions[%d] is not a comparison", i)
		}
	}
	for i, op := range ops {
		if !isOp(op) {
			return errorf("ops[%d] is not an operation", i)
		}
		if writes(op, []byte(key)) {
			return errorf("ops[%d] writes the lock's own key %q", i, key)
		}
	}
	return nil
}

// isOp reports whether op is an operation. clientv3 panics at the zero Op, nested ones included.
func isOp(op clientv3.Op) bool {
	if op.IsTxn() {
		_, then, otherwise := op.Txn()
		return !slices.ContainsFunc(slices.Concat(then, otherwise), func(nested clientv3.Op) bool { return !isOp(nested) })
	}
	return op.IsGet() || op.IsPut() || op.IsDelete()
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

// fence makes transactions that etcd applies if and only if a lock's key is unchanged. It
// recognizes its own by the key's version, which nobody else increments.
type fence struct {
	queue   *contender
	owner   fenceOwner
	stopCtx context.Context // ends when the lock is no longer held

	makeTurn sync.Once     // by the first transaction: few locks have any
	turn     chan struct{} // held by the transaction that is under way; guards the fields below
	version  int64         // of the key
	revision Revision      // of the key's last change
	pending  bool          // an earlier transaction may still be applied
}

// fenceOwner is the lock of a fence.
type fenceOwner interface {
	// stopCause says why the lock is no longer held, nil if it is.
	stopCause() error
	// keyDeleted ends the lock, whose key is gone, and returns its stopCause.
	keyDeleted() error
}

// answerGrace is how long the answer to a transaction is waited for that was under way when the
// lock was lost. Most often it is about to come, and says what became of the transaction.
const answerGrace = 200 * time.Millisecond

// do runs run when it is its turn, with no earlier transaction left that may still be applied. All
// of it is one call to the policy. The context of run ends soon after the lock is lost.
func (f *fence) do(ctx context.Context, c *config, run func(ctx context.Context) error) error {
	ctx, cancel := withinElapsed(ctx, c.retry)
	defer cancel()
	f.makeTurn.Do(func() { f.turn = make(chan struct{}, 1) })
	select {
	case f.turn <- struct{}{}:
		defer func() { <-f.turn }()
	case <-ctx.Done():
		return contextError(ctx)
	}
	if stopped := f.owner.stopCause(); stopped != nil {
		return stopped
	}
	held, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	defer context.AfterFunc(f.stopCtx, func() {
		sleep(held, answerGrace)
		stop(context.Cause(f.stopCtx))
	})()
	if f.pending {
		// What was sent before compares the version, so it cannot be applied once that is
		// incremented.
		if _, err := f.commit(held, c, nil, nil); err != nil {
			return f.lostOr(fmt.Errorf("nothing sent, because an earlier outcome is still open: %w", opaque(err)))
		}
	}
	return run(held)
}

// withinElapsed bounds ctx by the policy.
func withinElapsed(ctx context.Context, p RetryPolicy) (context.Context, context.CancelFunc) {
	elapsed := p.withDefaults().Elapsed
	if elapsed <= 0 {
		return ctx, func() {}
	}
	return context.WithTimeoutCause(ctx, elapsed, fmt.Errorf("gave up after %v", elapsed))
}

// opaque is err without ErrUnknownOutcome, which is not said of what was not sent.
func opaque(err error) error {
	if errors.Is(err, ErrUnknownOutcome) {
		return errors.New(err.Error())
	}
	return err
}

// unchanged compares whether the lock is held and its key as it was last. A key that was deleted
// and created again has another revision as well.
func (f *fence) unchanged() clientv3.Cmp {
	return clientv3.Compare(clientv3.ModRevision(f.queue.key), "=", f.revision)
}

// txn repeats a guarded transaction until it is answered.
func (f *fence) txn(ctx context.Context, c *config, q txnRequest) (*clientv3.TxnResponse, txnResult, error) {
	var r txnResult
	resp, err := retry(ctx, c, c.retry, "commit", func(ctx context.Context) (*clientv3.TxnResponse, error) {
		resp, seen, err := r.send(ctx, f.queue.config.client, q)
		if !seen {
			r = txnResult{mayBeApplied: true, mayStillApply: true}
		}
		return resp, err
	})
	return resp, r, err
}

// commit applies ops and increments the key's version in one transaction, if the key is unchanged
// and the conditions hold.
func (f *fence) commit(ctx context.Context, c *config, conditions []clientv3.Cmp, ops []clientv3.Op) (Revision, error) {
	resp, r, err := f.txn(ctx, c, f.request(conditions, ops))
	switch {
	case err == nil && resp.Succeeded:
		return f.advance(resp.Header.Revision), nil
	case err != nil && !r.mayBeApplied:
		return 0, f.lostOr(err)
	}
	notApplied := err
	if err == nil {
		notApplied = refusal(resp, conditions)
	}
	kv, v, failed := f.verdictAfter(ctx, c, resp, r)
	if v == verdictUnknown && failed == nil && !IsAmbiguous(err) && len(conditions)+len(ops) > 0 {
		kv, v, failed = f.ruleOut(ctx, c, r)
	}
	if failed != nil {
		return 0, f.unknownOutcome(cmp.Or(notApplied, failed))
	}
	switch v {
	case verdictApplied:
		return f.advance(kv.ModRevision), nil
	case verdictNotApplied:
		return 0, notApplied
	case verdictLost:
		return 0, f.owner.keyDeleted()
	case verdictGone:
		_ = f.owner.keyDeleted()
		return 0, f.unknownOutcome("the lock's key is gone")
	case verdictOverwritten:
		f.adopt(kv)
		return 0, f.unknownOutcome("the lock's key was written by somebody else")
	}
	return 0, f.unknownOutcome(notApplied)
}

// request is a transaction that increments the key's version. Where it is refused its answer holds
// the key, and for each condition whether that held, if there are not too many.
func (f *fence) request(conditions []clientv3.Cmp, ops []clientv3.Op) txnRequest {
	q := txnRequest{
		guards: append([]clientv3.Cmp{f.unchanged()}, conditions...),
		then: append(append([]clientv3.Op{}, ops...),
			clientv3.OpPut(f.queue.key, "", clientv3.WithIgnoreValue(), clientv3.WithIgnoreLease())),
		otherwise: []clientv3.Op{clientv3.OpGet(f.queue.key)},
	}
	if max(len(conditions), len(ops)) >= maxCommitOps {
		return q // etcd's limit leaves nothing for nested transactions
	}
	for _, c := range conditions {
		q.otherwise = append(q.otherwise, clientv3.OpTxn([]clientv3.Cmp{c}, nil, nil))
	}
	return q
}

// refusal is the error for a transaction that was refused although the key is unchanged.
func refusal(resp *clientv3.TxnResponse, conditions []clientv3.Cmp) error {
	if len(conditions) == 0 {
		return errRefused
	}
	for i := 1; i < len(resp.Responses); i++ { // the first is the key
		if !resp.Responses[i].GetResponseTxn().Succeeded {
			return fmt.Errorf("%w: conditions[%d]", ErrConditionFailed, i-1)
		}
	}
	return ErrConditionFailed
}

// errRefused says that a transaction was refused although all its guards hold.
var errRefused = errors.New("refused, although nothing has changed")

// ruleOut makes sure that no sending of the last transaction, which may still be applied, ever is.
// It increments the version of a key that was found unchanged.
func (f *fence) ruleOut(ctx context.Context, c *config, r txnResult) (*mvccpb.KeyValue, verdict, error) {
	resp, own, err := f.txn(ctx, c, f.request(nil, nil))
	if err == nil && resp.Succeeded {
		f.advance(resp.Header.Revision)
		return nil, verdictNotApplied, nil
	}
	kv, v, err := f.verdictAfter(ctx, c, resp, r)
	if v == verdictApplied && own.mayBeApplied { // the increment may be that of ruleOut
		v = verdictUnknown
	}
	return kv, v, err
}

// verdictAfter decides what became of a transaction, and returns the key that shows it, nil if it
// is gone. refused is an answer that came after all sendings that r counts, nil if there is none.
// That of an interceptor has no key.
func (f *fence) verdictAfter(ctx context.Context, c *config, refused *clientv3.TxnResponse, r txnResult) (*mvccpb.KeyValue, verdict, error) {
	if refused != nil && len(refused.Responses) > 0 {
		kv := f.queue.ownIn(rangeIn(refused, 0).Kvs)
		return kv, f.resolve(r, kv), nil
	}
	kv, err := f.read(ctx, c)
	if err != nil {
		return nil, verdictUnknown, err
	}
	return kv, f.resolve(r, kv), nil
}

// read returns the lock's key, nil if it is gone.
func (f *fence) read(ctx context.Context, c *config) (*mvccpb.KeyValue, error) {
	resp, err := retry(ctx, c, c.retry, "read the lock's key", func(ctx context.Context) (*clientv3.GetResponse, error) {
		return f.queue.config.client.Get(ctx, f.queue.key)
	})
	if err != nil {
		return nil, err
	}
	return f.queue.ownIn(resp.Kvs), nil
}

// verdict is what became of a transaction that did not simply succeed.
type verdict int

const (
	verdictUnknown     verdict = iota // it may have been applied, or may yet be
	verdictApplied                    // the key has its mark
	verdictNotApplied                 // and never will be: the key is unchanged
	verdictLost                       // not applied, because the key was gone
	verdictGone                       // the key is gone, and with it the mark
	verdictOverwritten                // somebody else has written the key, over any mark
)

// resolve decides by the key as it is now, nil if it is gone.
func (f *fence) resolve(r txnResult, kv *mvccpb.KeyValue) verdict {
	switch {
	case kv == nil && r.mayBeApplied:
		return verdictGone
	case kv == nil:
		return verdictLost
	case (r.mayBeApplied || f.pending) && kv.Version == f.version+1 && string(kv.Value) == f.queue.value:
		return verdictApplied
	case kv.ModRevision != f.revision:
		return verdictOverwritten
	case r.mayStillApply:
		return verdictUnknown
	}
	return verdictNotApplied
}

// advance notes a change of the key by the fence.
func (f *fence) advance(rev Revision) Revision {
	f.version++
	f.revision, f.pending = rev, false
	return rev
}

// adopt notes a change of the key by somebody else.
func (f *fence) adopt(kv *mvccpb.KeyValue) { f.version, f.revision = kv.Version, kv.ModRevision }

// lostOr is the error for what was not applied: why the lock is no longer held, or else err.
func (f *fence) lostOr(err error) error {
	if stopped := f.owner.stopCause(); stopped != nil {
		return stopped
	}
	return err
}

// unknownOutcome is the error for what may have been applied. It does not wrap what ended the lock:
// ErrLockLost would say that it was not.
func (f *fence) unknownOutcome(why any) error {
	f.pending = true
	return fmt.Errorf("%w: %v", ErrUnknownOutcome, why)
}
