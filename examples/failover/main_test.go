package main

import (
	"bytes"
	"flag"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestFailoverEndsTheHoldersContextBeforeTheNextOneTakesOver(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	err := run(t.Context(), nil, &out)
	t.Logf("timeline:\n%s", &out)
	require.NoError(t, err)
	for _, line := range []string{
		`holds the lock, token \d+`,
		`is cut off from etcd`,
		`stops, \d+\.\d+ s later: etcdutil: lock lost: .*: lease expired`,
		`gets from Commit: .*: lock lost`,
		`compares IsOwner: written=false`,
		`the context ended \d+\.\d+ s before the next one took over`,
		`all held`,
	} {
		require.Regexp(t, line, out.String())
	}
}

func TestFailoverHelpPlaysNothing(t *testing.T) {
	var out bytes.Buffer
	require.ErrorIs(t, run(t.Context(), []string{"-h"}, &out), flag.ErrHelp)
	require.Contains(t, out.String(), "-endpoints")
	require.NotContains(t, out.String(), "token")
}

func TestFailoverReportsAnUnreachableEtcd(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	require.ErrorContains(t, run(t.Context(), []string{"-endpoints", "127.0.0.1:1"}, &out), "127.0.0.1:1")
}
