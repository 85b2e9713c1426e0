// Package testclock measures time for tests on a busy machine. It does not count time in which the
// process could not run.
//
// It adds up short sleeps, and counts each for at most twice its length. If other processes keep
// the processors busy, a sleep ends late, as the measured code does, and the clock is as slow as
// both. On an idle machine it runs like any other clock.
package testclock

import "time"

const (
	tick = time.Millisecond
	most = 2 * tick // the longest time that one sleep counts for
)

// Within waits for done to be closed, for at most d. It reports whether done was closed.
func Within(d time.Duration, done <-chan struct{}) bool {
	for left := d; left > 0; {
		slept, over := sleep(done)
		if over {
			return true
		}
		left -= slept
	}
	select {
	case <-done:
		return true
	default:
		return false
	}
}

// Time runs f and returns how long it took.
func Time(f func()) (took time.Duration) {
	done, counted := make(chan struct{}), make(chan struct{})
	go func() { // until f returns
		defer close(counted)
		for over := false; !over; {
			var slept time.Duration
			slept, over = sleep(done)
			took += slept
		}
	}()
	defer func() {
		close(done)
		<-counted
	}()
	f()
	return // took, which the deferred call completes
}

// sleep sleeps for a tick, or until done is closed. It returns how much of that counts.
func sleep(done <-chan struct{}) (slept time.Duration, over bool) {
	begin := time.Now()
	timer := time.NewTimer(tick)
	defer timer.Stop()
	select {
	case <-done:
		over = true
	case <-timer.C:
	}
	return min(time.Since(begin), most), over
}
