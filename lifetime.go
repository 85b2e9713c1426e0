package etcdutil

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"
)

// lifetime makes the resource that embeds it a context.
//
// ctx is canceled with its parent. stopCtx is canceled only on loss or Close, so that cleanup can
// run in between.
type lifetime struct {
	ctx     context.Context
	cancel  context.CancelCauseFunc
	stopCtx context.Context
	stop    context.CancelCauseFunc
	once    sync.Once

	// onStop, unless nil, is called after stopCtx is canceled and before ctx is: resources whose
	// contexts are children of ctx stop first, with a cause of their own.
	onStop func(cause error)
}

func (l *lifetime) init(parent context.Context) {
	l.ctx, l.cancel = context.WithCancelCause(parent)
	l.stopCtx, l.stop = context.WithCancelCause(context.WithoutCancel(parent))
}

// shutdown cancels both contexts and reports whether this call did it. The first cause counts.
func (l *lifetime) shutdown(cause error) (first bool) {
	l.once.Do(func() {
		l.stop(cause)
		if l.onStop != nil {
			l.onStop(cause)
		}
		l.cancel(cause)
		first = true
	})
	return first
}

// Deadline returns the parent's deadline, as for any context.
func (l *lifetime) Deadline() (time.Time, bool) { return l.ctx.Deadline() }

// Done returns a channel that is closed when the resource is lost or closed, or when its parent
// ends. context.Cause reports which.
func (l *lifetime) Done() <-chan struct{} { return l.ctx.Done() }

// Err returns nil until Done is closed, and then context.Canceled or context.DeadlineExceeded, as
// for any context. It does not say why the resource ended: context.Cause does.
func (l *lifetime) Err() error { return l.ctx.Err() }

// Value returns the parent's value for key, as for any context. It does not read etcd.
func (l *lifetime) Value(key any) any { return l.ctx.Value(key) }

// contextError is the error for a ctx that has ended. It Is both ctx.Err() and context.Cause(ctx).
func contextError(ctx context.Context) error {
	err, cause := ctx.Err(), context.Cause(ctx)
	if errors.Is(cause, err) {
		return cause
	}
	return fmt.Errorf("%w: %w", err, cause)
}

// withContextError adds ctx's end to err, if ctx has ended and err does not wrap it yet.
func withContextError(ctx context.Context, err error) error {
	ended, cause := ctx.Err(), context.Cause(ctx)
	switch {
	case ended == nil, errors.Is(err, ended) && errors.Is(err, cause):
		return err
	case errors.Is(err, ended):
		return fmt.Errorf("%w: %w", err, cause)
	}
	return fmt.Errorf("%w: %w", err, contextError(ctx))
}

// withEndOf adds the end of a write's ctx to err as withContextError does. But an unknown outcome
// does not wrap ctx's cause: that may be an error, such as ErrLockLost or ErrConditionFailed, which
// says that nothing was applied.
func withEndOf(ctx context.Context, err error) error {
	if !errors.Is(err, ErrUnknownOutcome) {
		return withContextError(ctx, err)
	}
	switch ended, cause := ctx.Err(), context.Cause(ctx); ended {
	case nil:
		return err
	case cause:
		return fmt.Errorf("%w: %w", err, ended)
	default:
		return fmt.Errorf("%w: %w: %v", err, ended, cause)
	}
}

func isContextError(err error) bool {
	return errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)
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
