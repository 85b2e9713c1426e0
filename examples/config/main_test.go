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

func TestFollowerHasWhatEtcdHasAfterBadValuesAnOutageAndACompaction(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	err := run(t.Context(), nil, &out)
	t.Logf("timeline:\n%s", &out)
	require.NoError(t, err)
	for _, line := range []string{
		`follower  has map\[search:{On:true Limit:20} upload:{On:true Limit:5}\]`,
		`follower  keeps the last good value of search: .*: json: `,
		`operator  compacts etcd`,
		`follower  has map\[export:{On:false Limit:7} import:{On:true Limit:3} search:{On:true Limit:20}\]`,
		`follower  listed again: .*compacted`,
		`all held`,
	} {
		require.Regexp(t, line, out.String())
	}
}

func TestEtcdThatIsNotOursIsNotCompactedAndIsLeftClean(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 1)
	var out bytes.Buffer
	require.NoError(t, run(t.Context(), []string{"-endpoints", cluster.Endpoints()[0]}, &out))
	require.NotContains(t, out.String(), "compact")
	require.Contains(t, out.String(), "all held")

	client := cluster.Client(t)
	_, err := client.Get(t.Context(), "config", clientv3.WithRev(1))
	require.NoError(t, err, "it was compacted")
	left, err := client.Get(t.Context(), "", clientv3.WithFromKey())
	require.NoError(t, err)
	require.Empty(t, left.Kvs)
}

func TestHelpExplainsAndPlaysNothing(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	require.ErrorIs(t, run(t.Context(), []string{"-h"}, &out), flag.ErrHelp)
	require.Contains(t, out.String(), "-endpoints")
	require.NotContains(t, out.String(), "has map")
}

func TestEtcdThatCannotBeReachedIsReported(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	var out bytes.Buffer
	require.ErrorContains(t, run(ctx, []string{"-endpoints", "127.0.0.1:1"}, &out), "127.0.0.1:1")
}
