package etcdutil

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// RetryPolicy says how often and for how long to retry. Pass it by [WithRetryPolicy]. The zero
// value means the defaults.
type RetryPolicy struct {
	// Initial is the first delay. 0 means 25 ms, or Max if that is shorter. Max is the longest
	// delay. 0 means 2 s, or Initial if that is longer. The delay doubles each time. A random part
	// of it is slept (full jitter).
	Initial, Max time.Duration
	// Attempts limits how often the operation is tried; 0 means no limit.
	Attempts int
	// Elapsed is when to give up, counted from the call. 0 means 30 s. Negative means not before
	// ctx ends.
	Elapsed time.Duration
	// AttemptTimeout bounds one attempt. 0 means 1 s, doubled with each attempt that timed out, and
	// 5 s at most. The package's own requests have two attempts of 1 s: when etcd's leader dies,
	// the others need up to 2 s to elect another, and lose what is sent meanwhile.
	AttemptTimeout time.Duration
	// DefiniteOnly stops [Retry] after an error that leaves open whether op was applied
	// ([IsAmbiguous]). It changes nothing elsewhere: this package guards what it writes.
	DefiniteOnly bool
}

const (
	defaultInitial      = 25 * time.Millisecond
	defaultMax          = 2 * time.Second
	defaultElapsed      = 30 * time.Second
	firstAttemptTimeout = time.Second
	maxAttemptTimeout   = 5 * time.Second
)

func (p RetryPolicy) validate() error {
	switch {
	case p.Initial < 0:
		return errorf("RetryPolicy.Initial is negative: %v", p.Initial)
	case p.Max < 0:
		return errorf("RetryPolicy.Max is negative: %v", p.Max)
	case p.Max > 0 && p.Max < p.Initial:
		return errorf("RetryPolicy.Max %v is below Initial %v", p.Max, p.Initial)
	case p.Attempts < 0:
		return errorf("RetryPolicy.Attempts is negative: %d", p.Attempts)
	case p.AttemptTimeout < 0:
		return errorf("RetryPolicy.AttemptTimeout is negative: %v", p.AttemptTimeout)
	}
	return nil
}

func (p RetryPolicy) withDefaults() RetryPolicy {
	if p.Initial == 0 {
		p.Initial = min(defaultInitial, cmp.Or(p.Max, defaultMax))
	}
	if p.Max == 0 {
		p.Max = max(defaultMax, p.Initial)
	}
	p.Elapsed = cmp.Or(p.Elapsed, defaultElapsed)
	return p
}

// backoff returns how long to sleep after the given number of failed attempts.
func (p RetryPolicy) backoff(failed int) time.Duration {
	delay := p.Initial
	for ; failed > 1 && delay < p.Max; failed-- {
		delay = min(delay, p.Max/2+1) * 2 // which does not overflow
	}
	return rand.N(max(min(delay, p.Max), 1))
}

// attemptTimeout returns the bound of an attempt after so many timed out.
func (p RetryPolicy) attemptTimeout(timeouts int) time.Duration {
	if p.AttemptTimeout > 0 {
		return p.AttemptTimeout
	}
	return min(firstAttemptTimeout<<min(timeouts, 10), maxAttemptTimeout)
}

// A RetryOption shapes [Retry] and [Holder].
type RetryOption interface{ applyRetry(*config) }

// Retry calls op until it succeeds, or fails with an error that is not [IsTransient], or until the
// policy or ctx ends it. Each call has a context of its own, which ends with ctx and after
// RetryPolicy.AttemptTimeout. A call that failed by that timeout is tried again. Retry waits for
// op, so it returns in time only if op heeds its context. If ctx has ended before, op is not
// called. A nil ctx or op panics.
//
// op may be repeated after an error that leaves open whether it was applied. So it must be
// idempotent or guarded (a transaction that compares what it changes), or the policy must be
// DefiniteOnly.
//
// Errors:
//   - op's last error, also if the policy gave up.
//   - ctx's end, which wraps op's last error.
//   - An error that names what [WithRetryPolicy] refuses.
func Retry[T any](ctx context.Context, op func(ctx context.Context) (T, error), opts ...RetryOption) (T, error) {
	if ctx == nil {
		panic("etcdutil: nil ctx")
	}
	if op == nil {
		panic("etcdutil: nil op")
	}
	c := newConfig(nil)
	for _, o := range opts {
		o.applyRetry(&c)
	}
	c.finish()
	if err := c.retry.validate(); err != nil {
		var zero T
		return zero, err
	}
	return retry(ctx, &c, c.retry, "operation", op)
}

// retry repeats op as p says. what names op in logs and events.
func retry[T any](ctx context.Context, c *config, p RetryPolicy, what string, op func(ctx context.Context) (T, error)) (T, error) {
	var zero T
	if ctx.Err() != nil {
		return zero, contextError(ctx)
	}
	p, start := p.withDefaults(), time.Now()
	var last error
	for attempt, timeouts := 1, 0; ; attempt++ {
		if c.client != nil && c.client.Ctx().Err() != nil {
			return zero, errClientClosed // clientv3 would take that for a fault, and try 100 times
		}
		timeout := c.attemptTimeout(p, timeouts)
		if p.Elapsed > 0 {
			timeout = min(timeout, p.Elapsed-time.Since(start))
		}
		if timeout <= 0 { // overslept
			return zero, attemptsExhausted(attempt-1, start, last)
		}
		v, timedOut, err := attemptOnce(ctx, c.client, timeout, op)
		if err == nil {
			return v, nil
		}
		err = withConnectionError(c.client, err)
		if ctx.Err() != nil {
			return zero, withContextError(ctx, err)
		}
		if !c.shouldRetry(p, err, timedOut) {
			return zero, err
		}
		if timedOut {
			timeouts++
		}
		delay := p.backoff(attempt)
		if attempt == p.Attempts || p.Elapsed > 0 && delay >= p.Elapsed-time.Since(start) {
			return zero, attemptsExhausted(attempt, start, err)
		}
		last = err
		c.reporter.retrying(RetryEvent{Op: what, Attempt: attempt, Err: err})
		if sleep(ctx, delay); ctx.Err() != nil {
			return zero, withContextError(ctx, err)
		}
	}
}

func attemptsExhausted(attempts int, start time.Time, err error) error {
	if err == nil { // no attempt was made
		err = context.DeadlineExceeded
	}
	return errorf("gave up after %d attempts in %v: %w", attempts, time.Since(start).Round(time.Millisecond), err)
}

var errClientClosed = errors.New("etcdutil: the client is closed")

// attemptOnce makes one attempt, and reports whether the attempt's own timeout ended it. A request
// of the package's own, which has a client, requires a leader: a member without one refuses it at
// once, and the next attempt asks another member.
func attemptOnce[T any](ctx context.Context, client *clientv3.Client, timeout time.Duration, op func(ctx context.Context) (T, error)) (v T, timedOut bool, err error) {
	attempt, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	if client != nil {
		attempt = clientv3.WithRequireLeader(attempt)
		defer keepDialing(client)()
	}
	v, err = op(attempt)
	if attempt.Err() == nil || err == nil {
		return v, false, err
	}
	if code := statusOf(err).code; !isContextError(err) && (code == codes.DeadlineExceeded || code == codes.Canceled) {
		err = fmt.Errorf("%w: %w", attempt.Err(), err) // gRPC's own error, where clientv3 was not asked
	}
	return v, isContextError(err), err
}

// attemptTimeout returns the bound of an attempt after so many timed out. The package's own
// requests have a second attempt that is as short as the first; see RetryPolicy.
func (c *config) attemptTimeout(p RetryPolicy, timeouts int) time.Duration {
	if c.client != nil {
		timeouts = max(timeouts-1, 0)
	}
	return p.attemptTimeout(timeouts)
}

func (c *config) shouldRetry(p RetryPolicy, err error, timedOut bool) bool {
	switch {
	case c.client == nil && p.DefiniteOnly && (timedOut || IsAmbiguous(err)):
		return false
	case c.client != nil && c.client.Token != "" && statusOf(err).code == codes.Unauthenticated:
		return false // the client cannot renew its token
	}
	return timedOut || IsTransient(err)
}

// IsTransient reports whether an idempotent operation that failed with err is worth another try:
// the server or the way to it was at fault, and may have recovered. The caller's own end
// (context.Canceled, context.DeadlineExceeded) is not transient. Nor is nil.
func IsTransient(err error) bool {
	if err == nil || isContextError(err) {
		return false
	}
	f := statusOf(err)
	switch {
	case f.message == clientClosing:
		return false
	case transientMessages[f.message]:
		return true
	}
	switch f.code {
	case codes.Unavailable, codes.Canceled, codes.DeadlineExceeded, codes.Internal, codes.Unauthenticated:
		return true
	}
	return false
}

// IsAmbiguous reports whether a write that failed with err may have been applied. In doubt it
// returns true for what etcd, gRPC or a context returned. It returns true for [ErrUnknownOutcome],
// and false for nil and for any other error.
func IsAmbiguous(err error) bool {
	if err == nil {
		return false
	}
	if isContextError(err) || errors.Is(err, ErrUnknownOutcome) {
		return true
	}
	f := statusOf(err)
	if definiteMessages[f.message] {
		return false
	}
	switch f.code {
	case codes.Unavailable, codes.Canceled, codes.DeadlineExceeded, codes.Internal, codes.Unknown, codes.Aborted:
		return true
	case codes.ResourceExhausted:
		// Without space left etcd sometimes applies a write and then reports that it failed. An
		// answer that is too large for the client belongs to a request that was carried out.
		return !isUnsendable(err)
	}
	return false
}

// isRequestTooLarge reports whether a member, or the client, refused a request for its size.
// Another member may have another limit.
func isRequestTooLarge(err error) bool {
	return errors.Is(rpctypes.Error(err), rpctypes.ErrRequestTooLarge) || isUnsendable(err)
}

// isUnsendable reports whether the client's own limit refused a request: no sending of it can have
// reached etcd.
func isUnsendable(err error) bool { return strings.HasPrefix(statusOf(err).message, sendTooLarge) }

const (
	clientClosing = "grpc: the client connection is closing"
	sendTooLarge  = "trying to send message larger than max"
)

// The code does not distinguish these errors: etcd's server sends an error without a code of its
// own as codes.Unknown.
var (
	transientMessages = messages(
		"raft proposal dropped",
		"raft: stopped", // of a member that was removed
		"not a primary lessor",
		rpctypes.ErrorDesc(rpctypes.ErrGRPCRequestTooManyRequests),
		rpctypes.ErrorDesc(rpctypes.ErrGRPCAuthOldRevision),
		// Another member may be capable of it.
		rpctypes.ErrorDesc(rpctypes.ErrGRPCNotCapable),
		rpctypes.ErrorDesc(rpctypes.ErrGRPCNotSupportedForLearner),
	)
	definiteMessages = messages(
		"raft proposal dropped",
		"not a primary lessor",
		rpctypes.ErrorDesc(rpctypes.ErrGRPCRequestTooManyRequests),
		rpctypes.ErrorDesc(rpctypes.ErrGRPCNoLeader),
	)
)

func messages(list ...string) map[string]bool {
	set := make(map[string]bool, len(list))
	for _, m := range list {
		set[m] = true
	}
	return set
}

// failure is the gRPC code and message that an error carries, codes.OK if it carries none.
type failure struct {
	code    codes.Code
	message string
}

// statusOf returns the code and message of what clientv3 returns. Its EtcdError has a code but no
// gRPC status. Other errors of the server have the status that clientv3 got.
func statusOf(err error) failure {
	if e, ok := errors.AsType[rpctypes.EtcdError](err); ok {
		return failure{e.Code(), e.Error()}
	}
	if e, ok := errors.AsType[interface {
		error
		GRPCStatus() *status.Status
	}](err); ok {
		return failure{e.GRPCStatus().Code(), e.GRPCStatus().Message()}
	}
	return failure{}
}
