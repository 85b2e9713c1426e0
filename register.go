package etcdutil

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// Registration keeps a key in etcd: a service's address, or a worker's presence. [Register] makes
// it. Close ends it and removes the key. The zero Registration is not usable.
//
// It is a context.Context: Done is closed when the key is no longer kept in etcd. Err returns only
// context.Canceled or context.DeadlineExceeded. context.Cause returns why it ended: [ErrClosed],
// [ErrReplaced] if somebody else has registered the key, the parent's cause, or an error that says
// so if the client was closed. A lost lease does not end it.
//
// All methods are safe for concurrent use.
type Registration[T any] struct {
	lifetime
	codec    Codec
	keeper   keeper
	closing  sync.Once
	closeErr error
}

const (
	// registerMaxBackoff is the longest delay between two attempts to write the key again, unless
	// the policy says otherwise. It leaves time to do so within 1 s of etcd being back.
	registerMaxBackoff = 250 * time.Millisecond
	// refusedMaxBackoff is the longest delay after an attempt that etcd has refused for good.
	refusedMaxBackoff = time.Second
)

// Register writes v to a key, under a lease of its own that is kept alive. It keeps the key in etcd
// until Close, until ctx ends, or until somebody else registers the key. It returns when the key is
// written. ctx is the registration's parent, and not a timeout of the call. A nil ctx or client
// panics.
//
// Register writes the key again, if necessary under a new lease, after the lease was lost, after
// somebody deleted the key or wrote it without a lease, and after etcd was restored from a backup
// without the key. That happens within 1 s of etcd's return, however long it was gone, unless
// [WithRetryPolicy] sets a Max above 250 ms, which is the default here.
//
// An older registration of the key is taken over at once, even if its owner is alive. It ends with
// [ErrReplaced] and does not write the key again. Only if the newer registration is gone before the
// older one notices it does the older one write the key again. So of several processes that
// register one key, the last stays. To let the first one stay, register under a [Lock].
//
// When the parent ends, the key is no longer kept. Close removes it, or etcd does when the lease's
// TTL has passed.
//
// The options are [WithTTL] (default [DefaultTTL]), [WithKeepAliveInterval], [WithExpiryMargin],
// [WithCodec], and every [Option]. A registration runs one goroutine.
//
// Errors:
//   - An error that names the argument if key is empty, v cannot be encoded, or an option is
//     refused.
//   - rpctypes.ErrPermissionDenied if the key may not be read and written.
//   - [ErrUnknownOutcome] if etcd did not confirm the write. The key may have been written; its
//     lease is revoked in the background, or expires.
//   - What etcd answered last, if [RetryPolicy] gave up. The policy bounds this call and Set.
//   - ctx's end.
func Register[T any](ctx context.Context, client *clientv3.Client, key string, v T, opts ...RegisterOption) (*Registration[T], error) {
	if err := requireClient(ctx, client); err != nil {
		return nil, err
	}
	c := registerConfig{leaseConfig: leaseConfig{config: newConfig(client)}, codec: JSON}
	for _, o := range opts {
		o.applyRegister(&c)
	}
	c.finish()
	if err := c.validate(key); err != nil {
		return nil, err
	}
	value, err := encode(c.codec, v)
	if err != nil {
		return nil, errorf("register %q: v cannot be encoded: %w", key, err)
	}
	r := &Registration[T]{codec: c.codec}
	r.init(ctx)
	r.keeper.init(&r.lifetime, key, bytes.Clone(value), c)
	if err := r.keeper.begin(); err != nil {
		return nil, errorf("register %q: %w", key, err)
	}
	return r, nil
}

func (c *registerConfig) validate(key string) error {
	ttl := or(c.ttl, DefaultTTL)
	switch {
	case key == "":
		return errorf("key is empty")
	case c.codec == nil:
		return errorf("WithCodec: the codec is nil")
	case ttl <= 0 || ttl > maxLeaseTTL:
		return errorf("WithTTL must be positive and at most %v: %v", maxLeaseTTL, ttl)
	}
	return c.leaseConfig.validate(ttl)
}

// Key returns the key.
func (r *Registration[T]) Key() string { return r.keeper.key }

// Set changes the value of the key, exactly once. The key gets this value also when it is written
// again. Calls take turns. ctx and RetryPolicy.Elapsed bound this call. A nil ctx panics.
//
// Errors:
//   - [ErrUnknownOutcome] if etcd did not confirm the write. The value is written when etcd can be
//     reached, unless it was already, it is too large for etcd, another Set comes first, or the
//     registration ends.
//   - [ErrReplaced], [ErrClosed] or the parent's end if the registration has ended. The value is
//     not written.
//   - Any other error, for example that v cannot be encoded or is too large, or ctx's end. The
//     value is not written, and the earlier one is kept.
func (r *Registration[T]) Set(ctx context.Context, v T) error {
	if ctx == nil {
		panic("etcdutil: nil ctx")
	}
	value, err := encode(r.codec, v)
	if err != nil {
		return errorf("set %q: v cannot be encoded: %w", r.Key(), err)
	}
	if err := r.keeper.set(ctx, bytes.Clone(value)); err != nil {
		return errorf("set %q: %w", r.Key(), withEndOf(ctx, err))
	}
	return nil
}

// Close ends the registration with ErrClosed and removes the key, if it is still the registration's
// own. Close waits for what the registration has started. It takes no longer than the lease has
// left and a second, and 5 s at most. The parent may have ended. Further calls return what the
// first did.
//
// It returns nil when the key is removed, and else:
//   - [ErrReplaced] if the registration had ended with it. The key is left as it is.
//   - An error that says so if the client was closed before. The key goes with its lease.
//   - [ErrUnknownOutcome] if etcd did not confirm the removal. The error says by when the key will
//     be gone, because its lease is no longer renewed.
func (r *Registration[T]) Close() error {
	r.closing.Do(func() {
		r.closeErr = r.keeper.release()
		r.keeper.config.reporter.flush()
	})
	return r.closeErr
}

// keeper keeps one key of one value in etcd.
//
// It recognizes its key by the lease, because each keeper has leases of its own. Another's lease on
// the key means that the key was taken over, if the key was written after the keeper's last write:
// an earlier one was brought back by a restore.
type keeper struct {
	owner  *lifetime
	key    string
	ttl    time.Duration
	config registerConfig
	policy RetryPolicy // for writing the key again

	running sync.WaitGroup
	watcher *Watcher[[]byte] // for the goroutine
	shown   Revision         // of the last change that the watch has shown, for the goroutine
	changed chan struct{}    // the value is another than was written
	written chan struct{}    // a write was confirmed

	turn     chan struct{} // held by who writes; guards what follows
	value    []byte
	accepted []byte                // the last value that etcd is known to have taken; nil at first
	lease    atomic.Pointer[Lease] // under which the key was last written, or is to be; nil at first
	former   []*Lease              // under which writes of unknown outcome were tried since revision
	revision atomic.Int64          // of the last write that was confirmed; 0 at first
}

func (k *keeper) init(owner *lifetime, key string, value []byte, c registerConfig) {
	k.owner, k.key, k.value, k.config, k.ttl = owner, key, value, c, or(c.ttl, DefaultTTL)
	k.changed, k.written, k.turn = make(chan struct{}, 1), make(chan struct{}, 1), make(chan struct{}, 1)
	k.policy = c.retry
	k.policy.Elapsed, k.policy.Attempts = -1, 0
	if k.policy.Max == 0 {
		k.policy.Max = max(registerMaxBackoff, k.policy.Initial)
	}
}

// begin writes the key and starts what keeps it there.
func (k *keeper) begin() error {
	err := k.set(k.owner.ctx, k.value)
	if err == nil {
		k.watcher, err = k.watch(k.config.retry)
	}
	if err != nil {
		err = withContextError(k.owner.ctx, err)
		k.owner.shutdown(err)
		k.revokeInBackground()
		return err
	}
	k.running.Go(k.run) // until the context ends
	return nil
}

// watch watches the key. p bounds the call.
func (k *keeper) watch(p RetryPolicy) (*Watcher[[]byte], error) {
	c := watchConfig{config: k.config.config, codec: Raw, snapshot: true}
	c.retry = p
	c.retry.Max = k.policy.Max
	return newWatcher[[]byte](k.owner.ctx, k.key, &c)
}

// run writes the key again when it is gone, when it is another's, and when its lease has ended.
func (k *keeper) run() {
	defer k.end()
	for failed := 0; k.owner.Err() == nil; {
		if failed == 0 {
			k.waitDisturbed()
		}
		_, err := retry(k.owner.ctx, &k.config.config, k.policy, "register", func(ctx context.Context) (struct{}, error) {
			return struct{}{}, k.check(ctx)
		})
		switch {
		case err == nil:
			failed = 0
		case k.owner.Err() != nil: // with its parent, whose cause err may wrap, or replaced
		case errors.Is(err, errClientClosed):
			k.owner.shutdown(err)
		default: // refused, for example because a permission was taken away
			failed++
			k.config.reporter.retrying(RetryEvent{Op: "register", Attempt: failed, Err: err})
			p := k.policy
			p.Max = max(p.Max, refusedMaxBackoff)
			sleep(k.owner.ctx, p.withDefaults().backoff(failed))
		}
	}
}

// end ends the watch, and gives up the leases of a registration that was taken over.
func (k *keeper) end() {
	_ = k.watcher.Close()
	if cause := context.Cause(k.owner.stopCtx); errors.Is(cause, ErrReplaced) {
		k.config.reporter.registrationReplaced(k.key, cause)
		k.turn <- struct{}{} // for good
		k.revokeInBackground()
	}
}

// waitDisturbed waits until the key may have to be written. A write that the watch does not show
// soon may be gone: of an etcd that was restored to before the write the watch has nothing to
// report.
func (k *keeper) waitDisturbed() {
	overdue := time.NewTimer(k.policy.Max)
	defer overdue.Stop()
	for {
		select {
		case <-k.written:
			overdue.Reset(k.policy.Max)
		case <-overdue.C:
			if k.shown != k.revision.Load() {
				return
			}
		case <-k.owner.Done():
			return
		case <-k.lease.Load().Done():
			return
		case <-k.changed:
			return
		case e, ok := <-k.watcher.Events():
			if !ok {
				k.watchAgain()
				return
			}
			if e.Type == EventSynced {
				continue
			}
			if k.shown = e.Revision; k.shown != k.revision.Load() {
				return
			}
		}
	}
}

// watchAgain opens another watch in place of one that has ended, because its permission was taken
// away. It does not wait until that is possible: the lease may end meanwhile.
func (k *keeper) watchAgain() {
	_ = k.watcher.Close()
	sleep(k.owner.ctx, k.policy.Max)
	once := k.policy
	once.Attempts = 1
	if w, err := k.watch(once); err == nil {
		k.watcher = w
	}
}

// takeTurn waits for the turn to write. It returns an error if ctx or the registration ends before.
func (k *keeper) takeTurn(ctx context.Context) error {
	select {
	case k.turn <- struct{}{}:
	case <-ctx.Done():
		return k.endedOr(contextError(ctx))
	}
	if err := k.endedOr(nil); err != nil {
		k.passTurn()
		return err
	}
	return nil
}

func (k *keeper) passTurn() { <-k.turn }

// endedOr is why the registration has ended, or else err.
func (k *keeper) endedOr(err error) error {
	switch cause := context.Cause(k.owner.stopCtx); {
	case cause != nil:
		return cause
	case k.owner.Err() != nil:
		return contextError(k.owner.ctx)
	}
	return err
}

// set makes value the key's value.
func (k *keeper) set(ctx context.Context, value []byte) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(k.owner.ctx, func() { cancel(context.Cause(k.owner.ctx)) })()
	if err := k.takeTurn(ctx); err != nil {
		return err
	}
	defer k.passTurn()
	var result txnResult
	_, err := retry(ctx, &k.config.config, k.config.retry, "register", func(ctx context.Context) (struct{}, error) {
		return struct{}{}, k.write(ctx, k.revision.Load(), value, &result)
	})
	switch {
	case err == nil:
		return nil
	case result.mayBeApplied && !isUnsendable(err):
		k.value = value
		wake(k.changed)
		// An end that err wraps would say that it was not applied.
		return fmt.Errorf("%w: %v", ErrUnknownOutcome, err)
	}
	return k.endedOr(err)
}

// check reads the key, and writes it unless it is as it should be.
func (k *keeper) check(ctx context.Context) error {
	if err := k.takeTurn(ctx); err != nil {
		return err
	}
	defer k.passTurn()
	resp, err := k.config.client.Get(ctx, k.key)
	if err != nil {
		return err
	}
	kv := first(resp.Kvs)
	if k.stands(kv, k.value) {
		k.confirm(kv.ModRevision, k.value)
		return nil
	}
	if err := k.mayOverwrite(kv); err != nil {
		return err
	}
	if err := k.write(ctx, kv.GetModRevision(), k.value, new(txnResult)); err != nil {
		if isRequestTooLarge(err) {
			k.value = k.accepted // in place of that of a Set of unknown outcome
		}
		return err
	}
	k.config.reporter.registrationRestored(k.key, k.lease.Load().id)
	return nil
}

// write puts value under a live lease, in place of what was written at the expected revision, or of
// what else may be overwritten.
func (k *keeper) write(ctx context.Context, expected Revision, value []byte, result *txnResult) error {
	for failed := 0; ; {
		lease, err := k.liveLease(ctx)
		if err != nil {
			return err
		}
		resp, seen, err := result.send(ctx, k.config.client, txnRequest{
			guards:    []clientv3.Cmp{clientv3.Compare(clientv3.ModRevision(k.key), "=", expected)},
			then:      []clientv3.Op{clientv3.OpPut(k.key, string(value), clientv3.WithLease(lease.id))},
			otherwise: []clientv3.Op{clientv3.OpGet(k.key)},
		})
		// What the first write leaves goes with its lease: there a refusal is answer enough.
		if !seen && (expected != 0 || err == nil || IsAmbiguous(err)) {
			*result = txnResult{mayBeApplied: true, mayStillApply: true}
		}
		switch {
		case errors.Is(err, rpctypes.ErrLeaseNotFound):
			lease.markLost(ErrLeaseRevoked)
			failed++
			if sleep(ctx, k.policy.withDefaults().backoff(failed)); ctx.Err() != nil {
				return contextError(ctx)
			}
			continue
		case err != nil:
			return err
		case resp.Succeeded:
			k.confirm(resp.Header.Revision, value)
			return nil
		}
		kv := first(rangeIn(resp, 0).Kvs)
		if k.stands(kv, value) { // an earlier attempt has written it
			k.confirm(kv.ModRevision, value)
			return nil
		}
		if err := k.mayOverwrite(kv); err != nil {
			return err
		}
		expected = kv.GetModRevision()
	}
}

// stands reports whether the key has value, under the lease that is kept alive.
func (k *keeper) stands(kv *mvccpb.KeyValue, value []byte) bool {
	lease := k.lease.Load()
	return kv != nil && lease != nil && lease.stopCause() == nil &&
		clientv3.LeaseID(kv.Lease) == lease.id && bytes.Equal(kv.Value, value)
}

// mayOverwrite ends the registration if the key was taken over, and returns why.
func (k *keeper) mayOverwrite(kv *mvccpb.KeyValue) error {
	last := k.revision.Load()
	switch {
	case kv == nil || kv.Lease == 0 || k.isOwn(clientv3.LeaseID(kv.Lease)):
		return nil
	case last == 0: // another's, which is to be taken over
		return nil
	case kv.ModRevision <= last: // brought back by a restore
		return nil
	}
	err := fmt.Errorf("%w: under lease %x, at revision %d", ErrReplaced, kv.Lease, kv.ModRevision)
	k.owner.shutdown(err)
	return err
}

func (k *keeper) isOwn(id clientv3.LeaseID) bool {
	return slices.ContainsFunc(k.leases(), func(l *Lease) bool { return l.id == id })
}

// leases returns the leases that the key may be under.
func (k *keeper) leases() []*Lease {
	if lease := k.lease.Load(); lease != nil {
		return append(slices.Clone(k.former), lease)
	}
	return nil
}

// confirm notes that the key has value, written at a revision.
func (k *keeper) confirm(rev Revision, value []byte) {
	k.value, k.accepted, k.former = value, value, nil
	k.revision.Store(rev)
	wake(k.written)
}

// liveLease returns the lease, a new one if it was lost. It makes one attempt.
func (k *keeper) liveLease(ctx context.Context) (*Lease, error) {
	last := k.lease.Load()
	if last != nil && last.stopCause() == nil {
		return last, nil
	}
	c := k.config.leaseConfig
	c.retry = RetryPolicy{Attempts: 1, Elapsed: -1, AttemptTimeout: time.Hour} // ctx bounds it
	lease, err := newLease(k.owner.ctx, ctx, k.ttl, &c)
	if err != nil {
		return nil, err
	}
	if last != nil {
		k.former = append(k.former, last)
	}
	k.lease.Store(lease)
	return lease, nil
}

// release removes the key, if it is the keeper's own, and returns what Close does.
func (k *keeper) release() error {
	first := k.owner.shutdown(ErrClosed)
	k.running.Wait()
	if !first {
		return context.Cause(k.owner.stopCtx)
	}
	k.turn <- struct{}{} // for good; a Set that was under way has ended with the context
	leases := k.leases()
	results := make([]error, len(leases))
	var revoking sync.WaitGroup
	for i, lease := range leases {
		revoking.Go(func() { results[i] = k.revoke(lease) })
	}
	revoking.Wait()
	for i, err := range results {
		if err != nil {
			return errorf("%w: key %q is not confirmed removed; it will be gone by %s: %w",
				ErrUnknownOutcome, k.key, leases[i].serverExpiry(), err)
		}
	}
	return nil
}

// revoke revokes a lease, and with it the key, if that is still under the lease.
func (k *keeper) revoke(lease *Lease) error {
	switch err := lease.Close(); {
	case errors.Is(err, ErrLeaseRevoked):
		return nil
	case !errors.Is(err, ErrLeaseExpired):
		return err
	}
	// The server may not have expired it yet.
	_, err := retry(context.WithoutCancel(k.owner.ctx), &k.config.config, releasePolicy(time.Second), "revoke lease "+hexID(lease.id),
		func(ctx context.Context) (struct{}, error) {
			return struct{}{}, revokeLease(ctx, &k.config.config, lease.id)
		})
	return err
}

// revokeInBackground revokes the leases of a registration that has ended by itself, or never began.
func (k *keeper) revokeInBackground() {
	for _, lease := range k.leases() {
		inBackground(func() { // until Close's bound
			if err := lease.Close(); errors.Is(err, ErrUnknownOutcome) {
				revokeInBackground(lease.ctx, &k.config.config, lease.id, lease.ttl, 0)
			}
		})
	}
}

func (r *reporter) registrationRestored(key string, lease clientv3.LeaseID) {
	if r == nil {
		return
	}
	r.submit(func() { r.log(slog.LevelInfo, "registration written again", "key", key, "lease", hexID(lease)) })
}

func (r *reporter) registrationReplaced(key string, cause error) {
	if r == nil {
		return
	}
	r.submit(func() { r.log(slog.LevelWarn, "registration replaced", "key", key, "cause", cause) })
}
