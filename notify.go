package etcdutil

import (
	"context"
	"sync"
)

// NewNotify returns a Notify without a value. ctx is its parent, as in [context.WithCancel]: the
// Notify inherits its values and its end. A nil ctx panics.
//
// A Notify starts no goroutine, and neither does a receiver. Close it, or end ctx, to detach it
// from ctx.
func NewNotify[T any](ctx context.Context) *Notify[T] {
	if ctx == nil {
		panic("etcdutil: nil ctx")
	}
	n := &Notify[T]{}
	n.init(ctx)
	return n
}

// Notify passes the latest value on to any number of receivers. Make one by [NewNotify], send
// values by Send, and read them by a [Receiver]; Close ends it. A receiver that is slower than
// the sender skips values. The zero Notify is not usable.
//
// A Notify is a context. It ends when it is closed or when its parent ends. Err returns only
// context.Canceled or context.DeadlineExceeded. [context.Cause] reports which it was: [ErrClosed],
// or the parent's cause. All methods are safe for concurrent use.
type Notify[T any] struct {
	// lifetime is read under mu, so that no value is accepted or returned after a receiver has
	// reported the end.
	lifetime

	mu    sync.Mutex
	value T
	seq   uint64        // number of the value; 0 while there is none
	wake  chan struct{} // closed by the next Send; nil if no receiver waits
}

// Send makes v the latest value. It replaces a value that some receivers may not have read yet, and
// never blocks. After it returns nil, each receiver can read v or a newer value, even if the Notify
// ends at once. All receivers get the same v: do not change what it points to.
//
// Errors:
//   - [ErrClosed] if the Notify was closed.
//   - An error that Is both the parent's Err and its [context.Cause] if the parent ended before. If
//     that cause is ErrClosed, the error is ErrClosed.
func (n *Notify[T]) Send(v T) error {
	if !n.put(v) {
		return n.over()
	}
	return nil
}

// put checks the context under mu, so that a receiver reports the end only after the last value.
func (n *Notify[T]) put(v T) (accepted bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.Err() != nil {
		return false
	}
	n.value = v
	n.seq++
	if n.wake != nil {
		close(n.wake)
		n.wake = nil
	}
	return true
}

// Receiver returns a receiver that has read nothing yet. It reads the current value first, if there
// is one, and then newer ones. It also reads the last value after the Notify has ended. It need not
// be closed.
func (n *Notify[T]) Receiver() *Receiver[T] { return &Receiver[T]{n: n} }

// Close ends the Notify's context, with the cause [ErrClosed] unless its parent has ended before.
// Receivers can still read the last value. Close always returns nil, may be called again, and does
// not wait for receivers.
func (n *Notify[T]) Close() error {
	n.shutdown(ErrClosed)
	return nil
}

// over returns why n has ended. After Close it is not context.Canceled as well: a caller that tests
// for that means its own context.
func (n *Notify[T]) over() error {
	if cause := context.Cause(n); cause == ErrClosed {
		return cause
	}
	return contextError(n)
}

// Receiver reads the latest value of a [Notify]: each value at most once, and never an older one
// after a newer one. Get one from [Notify.Receiver] and call Recv until it fails; there is nothing
// to close. The zero Receiver is not usable.
//
// Recv is safe for concurrent use. Goroutines that share a Receiver share its values: each value is
// returned to one of them, and the end to all. Give each goroutine a Receiver of its own if each is
// to read every latest value.
type Receiver[T any] struct {
	n    *Notify[T]
	seen uint64 // number of the last value that was returned; guarded by n.mu
}

// Recv returns the latest value that this Receiver has not returned yet. It waits if there is none,
// and skips values that were replaced meanwhile. After the Notify has ended it returns the last
// value, if that is unread, and then errors.
//
// ctx bounds this call. If ctx has ended, Recv returns no value, so that a loop over Recv ends
// however fast the values come. The unread value stays for the next call. To read the last value of
// a Notify, do not pass the Notify as ctx, nor a context that ends with it. A nil ctx panics.
//
// Errors:
//   - An error that Is both ctx.Err() and [context.Cause] of ctx if ctx ended.
//   - [ErrClosed] if the Notify was closed.
//   - An error that Is both the parent's Err and its context.Cause if the parent ended.
func (r *Receiver[T]) Recv(ctx context.Context) (T, error) {
	var none T
	if ctx == nil {
		panic("etcdutil: nil ctx")
	}
	for {
		if ctx.Err() != nil {
			return none, contextError(ctx)
		}
		v, ok, wake := r.take()
		switch {
		case ok:
			return v, nil
		case wake == nil:
			return none, r.n.over()
		}
		select {
		case <-wake:
		case <-r.n.Done():
		case <-ctx.Done():
		}
	}
}

// take returns the unread value, if there is one. Otherwise the next Send closes wake; wake is nil
// if the Notify has ended. take makes wake under the same lock under which it found no value, so
// that no Send comes between.
func (r *Receiver[T]) take() (v T, ok bool, wake <-chan struct{}) {
	n := r.n
	n.mu.Lock()
	defer n.mu.Unlock()
	if r.seen != n.seq {
		r.seen = n.seq
		return n.value, true, nil
	}
	if n.Err() != nil {
		return v, false, nil
	}
	if n.wake == nil {
		n.wake = make(chan struct{})
	}
	return v, false, n.wake
}

// unread reports whether there is a value that Recv has not returned yet.
func (r *Receiver[T]) unread() bool {
	r.n.mu.Lock()
	defer r.n.mu.Unlock()
	return r.seen != r.n.seq
}
