package etcdutil

import (
	"context"
	"errors"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
	"weak"

	"github.com/stretchr/testify/require"
)

// mustRecv requires that r returns want at once.
func mustRecv[T any](t testing.TB, r *Receiver[T], want T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	v, err := r.Recv(ctx)
	require.NoError(t, err)
	require.Equal(t, want, v)
}

// mustRecvEnd requires that r returns no value any more, and an error that Is each of causes.
func mustRecvEnd(t testing.TB, r *Receiver[int], causes ...error) {
	t.Helper()
	for range 2 {
		v, err := r.Recv(context.Background())
		for _, cause := range causes {
			require.ErrorIs(t, err, cause)
		}
		require.Zero(t, v)
	}
}

// mustNotRecv requires that r waits. Call it only in a bubble: outside it takes an hour.
func mustNotRecv(t testing.TB, r *Receiver[int]) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Hour)
	defer cancel()
	_, err := r.Recv(ctx)
	require.ErrorIs(t, err, context.DeadlineExceeded)
}

func TestNotifyGivesEachReceiverTheLatestValueOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := NewNotify[int](context.Background())
		receivers := make([]*Receiver[int], 100)
		for i := range receivers {
			receivers[i] = n.Receiver()
		}
		for round := range 3 {
			var waiting []*async[int]
			for _, r := range receivers {
				waiting = append(waiting, start(func() (int, error) { return r.Recv(context.Background()) }))
			}
			synctest.Wait() // until all of them are in Recv
			require.NoError(t, n.Send(round))
			for _, w := range waiting {
				<-w.done
				require.NoError(t, w.err)
				require.Equal(t, round, w.v)
			}
		}

		require.NoError(t, n.Send(7))
		require.NoError(t, n.Send(8))
		for _, r := range receivers {
			mustRecv(t, r, 8)
		}
		mustNotRecv(t, receivers[0])
		// Without Close: the bubble would not end if a goroutine were left.
	})
}

func TestNotifyReceiverSeesTheValueCurrentAtItsCreation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := NewNotify[int](context.Background())
		early := n.Receiver()
		mustNotRecv(t, early)
		require.NoError(t, n.Send(0)) // the zero value is a value
		require.NoError(t, n.Send(0)) // the same value, sent again, is a new one
		mustRecv(t, n.Receiver(), 0)
		mustRecv(t, early, 0)
		mustNotRecv(t, early)
		require.NoError(t, n.Send(0))
		mustRecv(t, early, 0)
	})
}

func TestNotifyGivesTheLastValueBeforeCloseToEveryReceiver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := NewNotify[int](context.Background())
		unread, read, twice, waits := n.Receiver(), n.Receiver(), n.Receiver(), n.Receiver()
		require.NoError(t, n.Send(1))
		mustRecv(t, twice, 1)
		require.NoError(t, n.Send(2))
		mustRecv(t, read, 2)
		mustRecv(t, waits, 2)
		waiting := start(func() (int, error) { return waits.Recv(context.Background()) })
		synctest.Wait()
		require.NoError(t, n.Close())

		<-waiting.done
		require.ErrorIs(t, waiting.err, ErrClosed)
		for _, r := range []*Receiver[int]{unread, twice, n.Receiver()} {
			mustRecv(t, r, 2)
			mustRecvEnd(t, r, ErrClosed)
		}
		mustRecvEnd(t, read, ErrClosed)
		mustRecvEnd(t, waits, ErrClosed)
	})
}

func TestNotifyClosedWithoutAValueIsOver(t *testing.T) {
	n := NewNotify[int](context.Background())
	before := n.Receiver()
	require.NoError(t, n.Close())
	mustRecvEnd(t, before, ErrClosed)
	mustRecvEnd(t, n.Receiver(), ErrClosed)
}

func TestNotifyCloseIsIdempotentFromAnyGoroutine(t *testing.T) {
	n := NewNotify[int](context.WithValue(context.Background(), scopeKey{}, "inherited"))
	require.Equal(t, "inherited", n.Value(scopeKey{}))
	child, cancel := context.WithCancel(n)
	defer cancel()
	require.NoError(t, n.Err())

	var closers []*async[struct{}]
	for range 8 {
		closers = append(closers, start(func() (struct{}, error) {
			err := n.Close()
			if n.Err() == nil {
				return struct{}{}, errors.New("open after Close")
			}
			return struct{}{}, err
		}))
	}
	for _, c := range closers {
		within(t, 15*time.Second, c.done, "Close")
		require.NoError(t, c.err)
	}
	require.NoError(t, n.Close())
	require.Equal(t, context.Canceled, n.Err())
	require.ErrorIs(t, context.Cause(n), ErrClosed)
	require.ErrorIs(t, context.Cause(child), ErrClosed)

	err := n.Send(1)
	require.ErrorIs(t, err, ErrClosed)
	require.NotErrorIs(t, err, context.Canceled, "that would be a caller's own context")
	_, err = n.Receiver().Recv(context.Background())
	require.ErrorIs(t, err, ErrClosed)
	require.NotErrorIs(t, err, context.Canceled)
}

func TestNotifyEndsWithItsParentAndGivesTheLastValueOnce(t *testing.T) {
	reason := errors.New("the parent's reason")
	for name, c := range map[string]struct {
		parent func() (context.Context, context.CancelFunc)
		end    error
		cause  error
	}{
		"canceled": {func() (context.Context, context.CancelFunc) {
			return context.WithCancel(context.Background())
		}, context.Canceled, context.Canceled},
		"canceled with a cause": {func() (context.Context, context.CancelFunc) {
			ctx, cancel := context.WithCancelCause(context.Background())
			return ctx, func() { cancel(reason) }
		}, context.Canceled, reason},
		"timed out": {func() (context.Context, context.CancelFunc) {
			ctx, cancel := context.WithTimeoutCause(context.Background(), time.Hour, reason)
			return ctx, func() { time.Sleep(time.Hour); synctest.Wait(); cancel() }
		}, context.DeadlineExceeded, reason},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				parent, end := c.parent()
				n := NewNotify[int](parent)
				unread, waits := n.Receiver(), n.Receiver()
				require.NoError(t, n.Send(1))
				mustRecv(t, waits, 1)
				waiting := start(func() (int, error) { return waits.Recv(context.Background()) })
				synctest.Wait()
				end()

				<-waiting.done
				require.ErrorIs(t, waiting.err, c.end)
				require.ErrorIs(t, waiting.err, c.cause)
				err := n.Send(2)
				require.ErrorIs(t, err, c.end)
				require.ErrorIs(t, err, c.cause)
				require.NotErrorIs(t, err, ErrClosed)
				for _, r := range []*Receiver[int]{unread, n.Receiver()} {
					mustRecv(t, r, 1)
					mustRecvEnd(t, r, c.end, c.cause)
				}

				require.NoError(t, n.Close(), "a parent's end is no fault")
				require.ErrorIs(t, context.Cause(n), c.cause, "the first cause counts")
				mustRecvEnd(t, unread, c.end, c.cause)
				require.ErrorIs(t, n.Send(3), c.cause)

				late := NewNotify[int](parent)
				require.ErrorIs(t, late.Send(1), c.cause)
				mustRecvEnd(t, late.Receiver(), c.end, c.cause)
			})
		})
	}
}

func TestNotifyRecvReturnsWhenItsContextEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := NewNotify[int](context.Background())
		r := n.Receiver()
		reason := errors.New("the reader's reason")

		ctx, cancel := context.WithCancelCause(context.Background())
		waiting := start(func() (int, error) { return r.Recv(ctx) })
		synctest.Wait()
		before := time.Now()
		cancel(reason)
		<-waiting.done
		require.ErrorIs(t, waiting.err, context.Canceled)
		require.ErrorIs(t, waiting.err, reason)
		require.Zero(t, waiting.at.Sub(before))

		ctx, stop := context.WithTimeoutCause(context.Background(), time.Second, reason)
		defer stop()
		_, err := r.Recv(ctx)
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.ErrorIs(t, err, reason)
		require.Equal(t, time.Second, time.Since(before))

		require.NoError(t, n.Err(), "ctx bounds only that call")
		require.NoError(t, n.Send(1))
		mustRecv(t, r, 1)
	})
}

func TestNotifyRecvUnderAnEndedContextLeavesTheValueUnread(t *testing.T) {
	n := NewNotify[int](context.Background())
	r := n.Receiver()
	reason := errors.New("the reader's reason")
	ctx, cancel := context.WithCancelCause(context.Background())
	cancel(reason)

	for range 50 { // often, because a wrong choice between two ready channels is random
		require.NoError(t, n.Send(1))
		v, err := r.Recv(ctx)
		require.ErrorIs(t, err, context.Canceled)
		require.ErrorIs(t, err, reason)
		require.Zero(t, v)
	}
	mustRecv(t, r, 1)

	require.NoError(t, n.Send(2))
	require.NoError(t, n.Close())
	_, err := r.Recv(ctx)
	require.ErrorIs(t, err, reason)
	_, err = r.Recv(n) // the Notify is its own ctx
	require.ErrorIs(t, err, ErrClosed)
	mustRecv(t, r, 2)
	_, err = r.Recv(ctx)
	require.ErrorIs(t, err, reason, "also when there is nothing to read")
	mustRecvEnd(t, r, ErrClosed)
}

func TestNotifySendNeverBlocksAndAllocatesNothingWhileNobodyWaits(t *testing.T) {
	n := NewNotify[int](context.Background())
	for range 1000 {
		r := n.Receiver() // reads once
		_ = n.Send(0)
		mustRecv(t, r, 0)
	}
	i := 0
	require.Zero(t, testing.AllocsPerRun(20_000, func() {
		i++
		if err := n.Send(i); err != nil {
			panic(err)
		}
	}))
	mustRecv(t, n.Receiver(), i)
}

func TestNotifyLosesNoWakeUp(t *testing.T) {
	const rounds, readers = 2000, 3
	n := NewNotify[int](context.Background())
	var acks sync.WaitGroup
	var readersDone []*async[int]
	for range readers {
		r := n.Receiver()
		readersDone = append(readersDone, start(func() (last int, err error) {
			for {
				v, err := r.Recv(context.Background())
				if err != nil {
					return last, err
				}
				if v != last+1 {
					return v, errors.New("out of step")
				}
				last = v
				acks.Done()
			}
		}))
	}
	lockstep := start(func() (struct{}, error) {
		for i := 1; i <= rounds; i++ {
			acks.Add(readers)
			if err := n.Send(i); err != nil {
				return struct{}{}, err
			}
			acks.Wait() // until all have read i and are about to call Recv again
		}
		return struct{}{}, n.Close()
	})
	within(t, 30*time.Second, lockstep.done, "a receiver was not woken")
	require.NoError(t, lockstep.err)
	for _, r := range readersDone {
		within(t, 15*time.Second, r.done, "a receiver does not return at the end")
		require.ErrorIs(t, r.err, ErrClosed)
		require.Equal(t, rounds, r.v)
	}
}

// Each receiver reads what a Send has accepted before it reports the end, even if both happen at
// once.
func TestNotifyEveryReceiverSeesTheLastAcceptedValueWhenTheEndRacesWithSend(t *testing.T) {
	for name, end := range map[string]func(n *Notify[int], cancel context.CancelFunc){
		"Close":            func(n *Notify[int], _ context.CancelFunc) { _ = n.Close() },
		"the parent's end": func(_ *Notify[int], cancel context.CancelFunc) { cancel() },
	} {
		t.Run(name, func(t *testing.T) {
			for round := range 300 {
				parent, cancel := context.WithCancel(context.Background())
				n := NewNotify[int](parent)
				read := func() (last int, err error) {
					for r := n.Receiver(); ; {
						v, err := r.Recv(context.Background())
						if err != nil {
							return last, nil
						}
						if v <= last {
							return v, errors.New("an old value")
						}
						last = v
					}
				}
				readers := []*async[int]{start(read), start(read), start(read)}
				var begun atomic.Int64
				sender := start(func() (accepted int, err error) {
					for n.Send(accepted+1) == nil {
						accepted++
						begun.Store(int64(accepted))
						if accepted%32 == 0 {
							runtime.Gosched() // otherwise it may keep the only processor
						}
					}
					return accepted, nil
				})
				for begun.Load() < int64(round%20) {
					runtime.Gosched()
				}
				end(n, cancel)
				within(t, 15*time.Second, sender.done, "Send")
				for _, r := range append(readers, start(read)) {
					within(t, 15*time.Second, r.done, "Recv")
					require.NoError(t, r.err)
					require.Equal(t, sender.v, r.v)
				}
				cancel()
			}
		})
	}
}

func TestNotifyManySendersAndReceiversAtOnce(t *testing.T) {
	const senders, sends, readers = 4, 1000, 6
	type value struct{ sender, i int }
	final := value{sender: -1}
	n := NewNotify[value](context.Background())

	// Each reader notes the last value of each sender. Every second reader often gives up.
	read := func(patient bool) func() (value, error) {
		return func() (last value, err error) {
			seen := map[int]int{}
			for r := n.Receiver(); ; {
				ctx, cancel := context.Background(), context.CancelFunc(func() {})
				if !patient {
					ctx, cancel = context.WithTimeout(context.Background(), 20*time.Microsecond)
				}
				v, err := r.Recv(ctx)
				cancel()
				switch {
				case errors.Is(err, ErrClosed):
					return last, nil
				case errors.Is(err, context.DeadlineExceeded):
					continue
				case err != nil:
					return last, err
				case v != final && v.i <= seen[v.sender], last == final:
					return last, errors.New("an old value")
				}
				seen[v.sender] = v.i
				last = v
			}
		}
	}
	var reading []*async[value]
	for i := range readers {
		reading = append(reading, start(read(i%2 == 0)))
	}
	var sending []*async[struct{}]
	for s := range senders {
		sending = append(sending, start(func() (struct{}, error) {
			for i := 1; i <= sends; i++ {
				if err := n.Send(value{s, i}); err != nil {
					return struct{}{}, err
				}
			}
			return struct{}{}, nil
		}))
	}
	for _, s := range sending {
		within(t, 30*time.Second, s.done, "Send")
		require.NoError(t, s.err)
	}
	require.NoError(t, n.Send(final))
	require.NoError(t, n.Close())
	for _, r := range reading {
		within(t, 30*time.Second, r.done, "Recv")
		require.NoError(t, r.err)
		require.Equal(t, final, r.v)
	}
}

func TestNotifyReceiverHasAnUnreadValueUntilItIsReturned(t *testing.T) {
	n := NewNotify[int](t.Context())
	r, other := n.Receiver(), n.Receiver()
	require.False(t, r.unread(), "nothing was sent")
	for v := range 3 {
		require.NoError(t, n.Send(v))
		require.NoError(t, n.Send(v))
		require.True(t, r.unread())
		_, err := r.Recv(t.Context())
		require.NoError(t, err)
		require.False(t, r.unread(), "the earlier value is skipped")
		require.True(t, other.unread(), "which has read nothing")
	}
	require.NoError(t, n.Close())
	require.False(t, r.unread())
	require.True(t, other.unread(), "it can read the last value")
}

func TestNotifyReceiverSharedByGoroutinesGivesEachValueToOneOfThem(t *testing.T) {
	const sends, readers = 2000, 4
	n := NewNotify[int](context.Background())
	shared := n.Receiver()
	var reading []*async[[]int]
	for range readers {
		reading = append(reading, start(func() (got []int, err error) {
			for {
				v, err := shared.Recv(context.Background())
				if err != nil {
					return got, err
				}
				got = append(got, v)
			}
		}))
	}
	for i := 1; i <= sends; i++ {
		require.NoError(t, n.Send(i))
		if i%10 == 0 {
			runtime.Gosched()
		}
	}
	require.NoError(t, n.Close())
	given := map[int]int{}
	for _, r := range reading {
		within(t, 15*time.Second, r.done, "Recv")
		require.ErrorIs(t, r.err, ErrClosed, "the end is for all")
		for i, v := range r.v {
			require.True(t, i == 0 || r.v[i-1] < v, "an old value")
			given[v]++
		}
	}
	for v, times := range given {
		require.Equal(t, 1, times, v)
	}
	require.Equal(t, 1, given[sends], "the last one is given to one of them")
}

func TestNotifyAndItsReceiversStartNoGoroutine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		parent, cancel := context.WithCancel(context.Background())
		for range 10 {
			n := NewNotify[int](parent)
			for range 10 {
				require.NoError(t, n.Send(1))
				r := n.Receiver()
				mustRecv(t, r, 1)
				mustNotRecv(t, r)
			}
		}
		runtime.KeepAlive(cancel) // not called: the bubble would wait for a goroutine
	})
}

func TestNotifyKeepsOneValueAndNoReceiver(t *testing.T) {
	type value [1 << 10]byte
	n := NewNotify[*value](context.Background())
	r := n.Receiver()
	old, dropped := func() (weak.Pointer[value], weak.Pointer[Receiver[*value]]) {
		v, gone := &value{}, n.Receiver()
		require.NoError(t, n.Send(v))
		mustRecv(t, r, v)
		mustRecv(t, gone, v)
		short, stop := context.WithTimeout(context.Background(), time.Millisecond)
		defer stop()
		_, err := gone.Recv(short) // this receiver has waited as well
		require.ErrorIs(t, err, context.DeadlineExceeded)
		return weak.Make(v), weak.Make(gone)
	}()
	require.NoError(t, n.Send(&value{}))
	eventually(t, func() bool { runtime.GC(); return old.Value() == nil }, "the replaced value is freed")
	eventually(t, func() bool { runtime.GC(); return dropped.Value() == nil }, "the dropped receiver is freed")
	runtime.KeepAlive(n)
	runtime.KeepAlive(r)
}

func TestNotifyThatIsDroppedWithoutCloseIsFreed(t *testing.T) {
	dropped := func() weak.Pointer[Notify[int]] {
		n := NewNotify[int](context.Background())
		require.NoError(t, n.Send(1))
		mustRecv(t, n.Receiver(), 1)
		return weak.Make(n)
	}()
	eventually(t, func() bool { runtime.GC(); return dropped.Value() == nil }, "the Notify is freed")
}

func TestNotifyCloseDetachesFromTheParent(t *testing.T) {
	parent := &countingContext{Context: context.Background(), done: make(chan struct{})}
	n := NewNotify[int](parent)
	require.EqualValues(t, 1, parent.children.Load())
	require.NoError(t, n.Close())
	require.Zero(t, parent.children.Load())
}

// countingContext counts the contexts that follow its end.
type countingContext struct {
	context.Context
	done     chan struct{}
	children atomic.Int64
}

func (c *countingContext) Done() <-chan struct{} { return c.done }

// AfterFunc is called by package context to follow the end.
func (c *countingContext) AfterFunc(func()) (stop func() bool) {
	c.children.Add(1)
	return func() bool { c.children.Add(-1); return true }
}

func TestNotifyPanicsOnANilContext(t *testing.T) {
	var none context.Context
	require.PanicsWithValue(t, "etcdutil: nil ctx", func() { NewNotify[int](none) })
	n := NewNotify[int](context.Background())
	require.NoError(t, n.Send(1))
	require.PanicsWithValue(t, "etcdutil: nil ctx", func() { _, _ = n.Receiver().Recv(none) })
}
