// Package testclock measures what a test must not take on a machine that may be busy: it does not count the time for which
// this process was kept from running.
//
// It counts by short sleeps, each for no more than it should have taken at the most. Where other processes or other tests take
// the processors, a sleeper is woken late, just as what is measured is, and the clock goes as slowly as both. On a machine that
// has time for the test, it goes like any other: a bound that is broken there is not excused.
package testclock

import "time"

const (
	tick = time.Millisecond
	most = 2 * tick // what a sleep counts for, however late it is over
)

// Within waits until done is closed, and reports false if it is not within d.
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

// Time is how long f takes.
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
	return // what has been counted by then
}

// sleep sleeps for a tick, or until done is closed, and returns how long that was to count.
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
