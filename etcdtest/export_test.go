package etcdtest

import (
	"testing"

	"github.com/stretchr/testify/require"
)

// ReserveAddress returns an address on which a test may listen again and again, as members do.
func ReserveAddress(t *testing.T) string {
	t.Helper()
	r, err := reserve()
	require.NoError(t, err)
	t.Cleanup(r.release)
	return r.addresses[0]
}
