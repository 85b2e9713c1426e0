package etcdtest

import (
	"os"
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

// LinkBetweenMembers returns a link of which this process is the dialer, and functions that cut the
// process off and connect it, without a look at the link's connections.
func LinkBetweenMembers(target string) (l *Link, cut func() error, mend func(), err error) {
	d := newDialers()
	pid := os.Getpid()
	d.add(pid)
	l, err = newLink("127.0.0.1:0", target, d)
	return l, func() error { return d.cut(pid) }, func() { d.mend(pid) }, err
}
