package main

import (
	"bytes"
	"flag"
	"testing"

	"example.com/etcdutil/etcdtest"
	"github.com/stretchr/testify/require"
	clientv3 "go.etcd.io/etcd/client/v3"
)

func TestTheFollowerHasWhatEtcdHasAfterBadValuesAnOutageAndACompaction(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	err := run(t.Context(), nil, &out)
	t.Logf("timeline:\n%s", &out)
	require.NoError(t, err)
	for _, line := range []string{
		`follower  is synced for time 1, revision \d+`,
		`follower  mail is deleted`,
		`follower  search is bad, revision \d+: json: `,
		`follower  search stays {On:true Limit:20}`,
		`operator  compacts etcd`,
		`follower  login is deleted, revision (\d+)\n.*follower  is synced for time 2, revision \d+\n`,
		`follower  upload is {On:true Limit:7}`,
		`(?s)connections are reset.*follower  export is deleted`,
		`4 settings as in etcd, where 1 is bad`,
		`bad values seen: 2, resyncs: 1: all held`,
	} {
		require.Regexp(t, line, out.String())
	}
}

func TestAnEtcdThatIsNotOursIsNotCompactedAndIsLeftClean(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 1)
	var out bytes.Buffer
	require.NoError(t, run(t.Context(), []string{"-endpoints", cluster.Endpoints()[0]}, &out))
	require.Regexp(t, `no resync was due(?s).*resyncs: 0: all held`, out.String())

	client := cluster.Client(t)
	_, err := client.Get(t.Context(), "config", clientv3.WithRev(1))
	require.NoError(t, err, "it was compacted")
	left, err := client.Get(t.Context(), "", clientv3.WithFromKey())
	require.NoError(t, err)
	require.Empty(t, left.Kvs)
}

func TestHelpExplainsAndPlaysNothing(t *testing.T) {
	var out bytes.Buffer
	require.ErrorIs(t, run(t.Context(), []string{"-h"}, &out), flag.ErrHelp)
	require.Contains(t, out.String(), "-endpoints")
	require.NotContains(t, out.String(), "revision")
}

func TestAnEtcdThatIsNotThereIsReported(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	require.ErrorContains(t, run(t.Context(), []string{"-endpoints", "127.0.0.1:1"}, &out), "127.0.0.1:1")
}
