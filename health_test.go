package etcdutil

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// The one-liner of Example_readiness, with bounds that fit a test.
func TestReadinessProbeBehindABlackHole(t *testing.T) {
	t.Parallel()
	client, link := linkedClient(t)
	lease := mustLease(t, client, 6*time.Second)
	mirror, err := NewMirror[string](t.Context(), client, nameOf(t), WithPrefix(), WithCodec(Raw))
	require.NoError(t, err)
	defer mirror.Close()
	healthy := func() bool { return lease.Err() == nil && time.Until(lease.Expiry()) > lease.TTL()/4 }
	fresh := func() bool { return time.Since(mirror.AsOf()) < 3*time.Second }
	eventually(t, func() bool { return healthy() && fresh() }, "ready")

	link.Cut()
	cut := time.Now()
	for healthy() && time.Since(cut) < patience {
		time.Sleep(time.Millisecond)
	}
	require.NoError(t, lease.Err(), "the probe fails before the lease is lost")
	for fresh() && time.Since(cut) < patience {
		time.Sleep(time.Millisecond)
	}
	require.Less(t, time.Since(cut), 6*time.Second, "the age of the mirror shows, though no connection is closed")

	link.Heal()
	eventually(t, fresh, "the mirror is up to date again")
	lease = mustLease(t, client, 6*time.Second)
	require.True(t, healthy())
}
