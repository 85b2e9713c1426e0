package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"net/http"
	"testing"
	"time"

	"example.com/etcdutil/etcdtest"
	"github.com/stretchr/testify/require"
	clientv3 "go.etcd.io/etcd/client/v3"
)

func TestCallsFollowTheServers(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	err := run(t.Context(), nil, &out)
	t.Logf("timeline:\n%s", &out)
	require.NoError(t, err)
	for _, line := range []string{
		`c-1 crashes(?s:.*)c-1 cannot be called(?s:.*)c-2 is called`,
		`b-1 drains(?s:.*)b-2 is called`,
		`a-1 has to go: etcdutil: registration replaced by another`,
		`all held in \d+ calls`,
	} {
		require.Regexp(t, line, out.String())
	}
	require.NotRegexp(t, `(a|b)-\d cannot be called`, out.String())
}

func TestWhatWasWrittenIsRemoved(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 1)
	var out bytes.Buffer
	require.NoError(t, run(t.Context(), []string{"-endpoints", cluster.Endpoints()[0]}, &out))
	left, err := cluster.Client(t).Get(t.Context(), "", clientv3.WithFromKey())
	require.NoError(t, err)
	require.Empty(t, left.Kvs)
	leases, err := cluster.Client(t).Leases(t.Context())
	require.NoError(t, err)
	require.Empty(t, leases.Leases)
}

func TestJudgeFindsCallsThatShouldNotHaveBeenMade(t *testing.T) {
	t.Parallel()
	begin := time.Now()
	j := &judge{changes: map[string][]change{
		"a-1": {{begin, true}, {begin.Add(time.Second), false}, {begin.Add(5 * time.Second), true}},
	}}
	require.NoError(t, j.verdict([]call{
		{"a-1", begin.Add(time.Second / 2), nil},
		{"a-1", begin.Add(3 * time.Second / 2), nil},
		{"a-1", begin.Add(6 * time.Second), nil},
		{"c-1", begin, http.ErrServerClosed}, // it has crashed
	}))
	require.ErrorContains(t, j.verdict([]call{{"a-1", begin.Add(3 * time.Second), nil}}), "a-1 was called 2s after")
	failed := errors.New("failed")
	require.ErrorIs(t, j.verdict([]call{{"a-1", begin, failed}}), failed)
}

func TestHelpExplainsAndPlaysNothing(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	require.ErrorIs(t, run(t.Context(), []string{"-h"}, &out), flag.ErrHelp)
	require.Contains(t, out.String(), "-endpoints")
	require.NotContains(t, out.String(), "registered")
}

func TestEtcdThatCannotBeReachedIsReported(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	var out bytes.Buffer
	require.ErrorContains(t, run(ctx, []string{"-endpoints", "127.0.0.1:1"}, &out), "127.0.0.1:1")
}
