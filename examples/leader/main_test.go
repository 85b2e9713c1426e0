package main

import (
	"bytes"
	"flag"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestLeaderIsOneAtATime(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	err := run(t.Context(), nil, &out)
	t.Logf("timeline:\n%s", &out)
	require.NoError(t, err)
	for _, line := range []string{
		`(anna|bert|cleo) +leads, token \d+`,
		`is cut off from etcd`,
		`must stop: etcdutil: lock lost: .*lease expired`,
		`resigns`,
		`is paused`,
		`gets from Commit: .*: lock lost`,
		`observer  sees that (anna|bert|cleo) leads`,
		`at no time did two lead, counter \d+: all held`,
	} {
		require.Regexp(t, line, out.String())
	}
}

func TestLeaderHelpPlaysNothing(t *testing.T) {
	var out bytes.Buffer
	require.ErrorIs(t, run(t.Context(), []string{"-h"}, &out), flag.ErrHelp)
	require.Contains(t, out.String(), "-endpoints")
	require.NotContains(t, out.String(), "token")
}

func TestLeaderReportsAnUnreachableEtcd(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	require.ErrorContains(t, run(t.Context(), []string{"-endpoints", "127.0.0.1:1"}, &out), "127.0.0.1:1")
}
