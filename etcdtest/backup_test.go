package etcdtest_test

import (
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"
	clientv3 "go.etcd.io/etcd/client/v3"

	"example.com/etcdutil/etcdtest"
)

func TestRestoreTakesTheClusterBackToItsBackup(t *testing.T) {
	t.Parallel()
	for _, members := range []int{1, 3} {
		t.Run(fmt.Sprint(members), func(t *testing.T) {
			t.Parallel()
			cluster := etcdtest.Start(t, members)
			endpoints := cluster.Endpoints()
			client := cluster.Client(t)
			put(t, client, "old")
			require.NoError(t, cluster.Backup())
			require.Equal(t, "old", get(t, client))

			for range 2 { // a backup serves more than once
				put(t, client, "new")
				_, err := client.Put(t.Context(), "late", "new")
				require.NoError(t, err)
				before := revision(t, client)
				require.NoError(t, cluster.Restore())
				require.Contains(t, indexes(members), cluster.Leader())
				require.Equal(t, endpoints, cluster.Endpoints())
				for _, endpoint := range endpoints {
					one := clientTo(t, endpoint)
					require.Equal(t, "old", get(t, one))
					require.Less(t, revision(t, one), before)
					late, err := one.Get(t.Context(), "late")
					require.NoError(t, err)
					require.Empty(t, late.Kvs)
				}
				put(t, client, "again")
				requireAgreement(t, cluster, "again")
			}
		})
	}
}

func TestRestoreTakesTheLastBackup(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 1)
	client := cluster.Client(t)
	for _, value := range []string{"first", "second"} {
		put(t, client, value)
		require.NoError(t, cluster.Backup())
	}
	put(t, client, "third")
	require.NoError(t, cluster.Restore())
	require.Equal(t, "second", get(t, client))
}

func TestRestoreNeedsABackup(t *testing.T) {
	cluster := etcdtest.Start(t, 1)
	require.ErrorContains(t, cluster.Restore(), "there is no backup")
	put(t, cluster.Client(t), "served")
}

func TestRestoreLeavesAStoppedMemberStoppedButWithItsOldData(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 3)
	put(t, cluster.Client(t), "old")
	require.NoError(t, cluster.Backup())
	put(t, cluster.Client(t), "new")
	stopped := (cluster.Leader() + 1) % 3
	require.NoError(t, cluster.Stop(stopped))

	require.NoError(t, cluster.Restore())
	require.Error(t, tryPut(t, clientTo(t, cluster.Endpoints()[stopped]), "refused"))
	require.NoError(t, cluster.Restart(stopped))
	requireAgreement(t, cluster, "old")
}

func TestBackupAndRestoreOfAStoppedCluster(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 1)
	client := cluster.Client(t)
	put(t, client, "old")
	require.NoError(t, cluster.Stop(0))
	require.NoError(t, cluster.Backup())
	require.NoError(t, cluster.Restart(0))
	put(t, client, "new")
	require.NoError(t, cluster.Stop(0))
	require.NoError(t, cluster.Restore())
	require.Equal(t, -1, cluster.Leader())
	require.NoError(t, cluster.Restart(0))
	require.Equal(t, "old", get(t, client))
}

func revision(t *testing.T, client *clientv3.Client) int64 {
	t.Helper()
	response, err := client.Get(t.Context(), "key")
	require.NoError(t, err)
	return response.Header.Revision
}
