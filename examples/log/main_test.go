package main

import (
	"bytes"
	"context"
	"flag"
	"testing"
	"time"

	"example.com/etcdutil/etcdtest"
	"github.com/stretchr/testify/require"
	clientv3 "go.etcd.io/etcd/client/v3"
)

func TestLogStopsWritersWhoseLockIsTakenAway(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	err := run(t.Context(), nil, &out)
	t.Logf("timeline:\n%s", &out)
	require.NoError(t, err)
	for _, line := range []string{
		`(anna|bert|cleo) +stops: etcdutil: lock lost`,
		`gets from its late Write: .*: lock lost`,
		`gets from Write: .*: log written by another`,
		`reader    has read version 10: by hand, by operator`,
		`13 entries written, and read once each, in order and without a gap: all held`,
	} {
		require.Regexp(t, line, out.String())
	}
	require.NotContains(t, out.String(), "fails")
}

func TestLogLeavesACompactedEtcdClean(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 1)
	client := cluster.Client(t)
	for range 2 {
		_, err := client.Put(t.Context(), "another's", "")
		require.NoError(t, err)
	}
	resp, err := client.Delete(t.Context(), "another's")
	require.NoError(t, err)
	_, err = client.Compact(t.Context(), resp.Header.Revision)
	require.NoError(t, err)

	require.NoError(t, run(t.Context(), []string{"-endpoints", cluster.Endpoints()[0]}, &bytes.Buffer{}))
	left, err := client.Get(t.Context(), "", clientv3.WithFromKey())
	require.NoError(t, err)
	require.Empty(t, left.Kvs)
	leases, err := client.Leases(t.Context())
	require.NoError(t, err)
	require.Empty(t, leases.Leases)
}

func TestLogHelpPlaysNothing(t *testing.T) {
	var out bytes.Buffer
	require.ErrorIs(t, run(t.Context(), []string{"-h"}, &out), flag.ErrHelp)
	require.Contains(t, out.String(), "-endpoints")
	require.NotContains(t, out.String(), "token")
}

func TestLogReportsAnUnreachableEtcd(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	var out bytes.Buffer
	require.ErrorContains(t, run(ctx, []string{"-endpoints", "127.0.0.1:1"}, &out), "127.0.0.1:1")
}
