package testclock_test

import (
	"testing"
	"testing/synctest"
	"time"

	"example.com/etcdutil/internal/testclock"
	"github.com/stretchr/testify/require"
)

func TestWithinBoundsTheWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for took, held := range map[time.Duration]bool{0: true, 99 * time.Millisecond: true, 101 * time.Millisecond: false} {
			done, begin := make(chan struct{}), time.Now()
			time.AfterFunc(took, func() { close(done) })
			require.Equal(t, held, testclock.Within(100*time.Millisecond, done), took)
			require.Equal(t, min(took, 100*time.Millisecond), time.Since(begin))
			<-done
		}
		took := testclock.Time(func() { time.Sleep(1234567 * time.Microsecond) })
		require.Equal(t, 1234567*time.Microsecond, took)
	})
}

// The test uses real time, because no sleep ends late in a bubble.
func TestTimeCountsNoMoreThanHasPassed(t *testing.T) {
	begin := time.Now()
	require.False(t, testclock.Within(20*time.Millisecond, nil))
	took := testclock.Time(func() { time.Sleep(20 * time.Millisecond) })
	require.Positive(t, took)
	require.GreaterOrEqual(t, time.Since(begin), 20*time.Millisecond+took)
}
