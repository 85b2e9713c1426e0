package etcdutil

import (
	"context"
	"sync"
)

// NewNotify makes a Notify, which hands the latest value to any number of receivers. ctx is its parent, as in
// context.WithCancel: its values and its end are inherited. A nil ctx panics.
//
// It costs no goroutine, nor does a receiver. Close it, or end ctx, as you would any context made from ctx.
func NewNotify[T any](ctx context.Context) *Notify[T] {
	if ctx == nil {
		panic("etcdutil: nil ctx")
	}
	n := &Notify[T]{}
	n.init(ctx)
	return n
}

// A Notify keeps one value, the latest, for receivers that want to know how things stand and not how they came to.
// It is a context, which ends when it is closed or its parent ends; context.Cause says which. NewNotify makes it: the
// zero Notify is of no use. All its methods, and those of its receivers, are safe for concurrent use.
type Notify[T any] struct {
	lifetime // alone says whether it has ended; read under mu where a value may be given or taken

	mu    sync.Mutex
	value T
	seq   uint64        // value's number; 0 while there is none
	wake  chan struct{} // closed by the next Send; nil if nobody has waited since the last
}

// Send makes v the latest value, in place of one that some receivers may not have read yet. It never blocks, whatever
// the receivers do, and when it returns nil each of them can read v, or a newer value, even if the Notify ends at once.
// All receivers get the same v: nobody should change what it points to.
//
// It is refused once the Notify has ended: after Close with ErrClosed; after the parent's end with an error that Is both
// the parent's Err and its context.Cause, or ErrClosed alone if that is the cause. The first of the two counts.
func (n *Notify[T]) Send(v T) error {
	if !n.put(v) {
		return n.over()
	}
	return nil
}

// put looks at the context under the lock: whoever is told the end under it is told after the last value.
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

// Receiver makes a receiver that has read nothing yet: it sees the value current now, if any, then newer ones. After the
// end it still sees the last one. It is not registered anywhere: drop it when it is no longer needed.
func (n *Notify[T]) Receiver() *Receiver[T] { return &Receiver[T]{n: n} }

// Close ends the Notify's context, with the cause ErrClosed unless its parent ended before. Receivers still get the last
// value that they have not read. It always returns nil, may be called again, and does not wait for receivers.
func (n *Notify[T]) Close() error {
	n.shutdown(ErrClosed)
	return nil
}

// over is why n has ended. After Close that is ErrClosed alone: a caller that also looks for context.Canceled means its
// own context.
func (n *Notify[T]) over() error {
	if cause := context.Cause(n); cause == ErrClosed {
		return cause
	}
	return contextError(n)
}

// A Receiver reads the latest value of a Notify, each at most once, and never an older one after a newer one.
// Notify.Receiver makes it: the zero Receiver is of no use. Goroutines that share one share its values: each value is
// given to one of them, and the end to all. Where each is to see every latest value, each needs a Receiver.
type Receiver[T any] struct {
	n    *Notify[T]
	seen uint64 // number of the last value that was given out; guarded by n.mu
}

// Recv returns the latest value that this Receiver has not returned yet, and waits for one if there is none. Values that
// were replaced meanwhile are skipped.
//
// Once the Notify has ended, it returns the last value if that is unread, and from then on the error that Send gives:
// after Close ErrClosed, after the parent's end one that Is both the parent's Err and its context.Cause.
//
// ctx bounds this call alone. Its end goes before everything else, so that a loop over Recv ends however fast the
// values come: the error Is both ctx.Err() and context.Cause(ctx), and a value that is unread stays so, for the next
// call. To get the last value of a Notify, therefore, do not wait under the Notify itself, nor under what ends with it.
// A nil ctx panics.
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

// take takes the unread value, if there is one. If not, wake is closed by the next Send, and nil if there will be none.
// It is got under the lock that found nothing, so that no Send comes between.
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
