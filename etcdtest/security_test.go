package etcdtest_test

import (
	"crypto/tls"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"

	"example.com/etcdutil/etcdtest"
)

func TestSecureClusterServesItsClientsOverTLSOnly(t *testing.T) {
	t.Parallel()
	for _, members := range []int{1, 3} {
		t.Run(fmt.Sprint(members), func(t *testing.T) {
			t.Parallel()
			cluster := etcdtest.StartSecure(t, members, etcdtest.Security{TLS: true})
			put(t, cluster.Client(t), "over TLS")
			require.Error(t, tryPut(t, clientTo(t, cluster.Endpoints()[0]), "in plain text"))

			stranger := configOf(t, cluster, "root")
			stranger.TLS.Certificates = nil
			require.Error(t, tryPut(t, clientWith(t, stranger), "without a certificate"))

			other := etcdtest.StartSecure(t, 1, etcdtest.Security{TLS: true})
			foreign := configOf(t, other, "root")
			foreign.TLS.RootCAs = configOf(t, cluster, "root").TLS.RootCAs
			foreign.Endpoints = cluster.Endpoints()
			require.Error(t, tryPut(t, clientWith(t, foreign), "by another authority"))
			require.Equal(t, "over TLS", get(t, cluster.Client(t)))
		})
	}
}

func TestSecureClusterIsIsolatedAndRestoredLikeAnyOther(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.StartSecure(t, 3, etcdtest.Security{TLS: true, Users: []etcdtest.User{{Name: "user", Password: "secret"}}})
	client := cluster.Client(t)
	put(t, client, "old")
	require.NoError(t, cluster.Backup())
	put(t, client, "new")
	isolated := cluster.Leader()
	require.NoError(t, cluster.Isolate(isolated))
	require.Eventually(t, func() bool {
		leader := cluster.Leader()
		return leader >= 0 && leader != isolated
	}, patience, time.Millisecond)
	put(t, client, "newer")
	require.NoError(t, cluster.Rejoin(isolated))
	require.NoError(t, cluster.Restore())
	// With client's token etcd would wait until its log is as long as when it gave that.
	require.Equal(t, "old", get(t, cluster.Client(t)))
}

func TestCertificatesRotateWithoutARestart(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.StartSecure(t, 1, etcdtest.Security{TLS: true})
	const validity = 4 * time.Second // enough to use it once, however slow the machine
	first, err := cluster.Certificate("client", validity)
	require.NoError(t, err)
	expired := time.Now().Add(validity)
	var current atomic.Pointer[tls.Certificate]
	current.Store(&first)
	var served atomic.Pointer[string] // the serial number of the member's certificate
	config := configOf(t, cluster, "client")
	config.TLS.Certificates = nil
	config.TLS.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return current.Load(), nil }
	config.TLS.VerifyConnection = func(state tls.ConnectionState) error {
		served.Store(new(state.PeerCertificates[0].SerialNumber.String()))
		return nil
	}
	link := etcdtest.StartLink(t, cluster.Endpoints()[0])
	config.Endpoints = []string{link.Endpoint()}
	client := clientWith(t, config)
	put(t, client, "first")
	before := *served.Load()

	time.Sleep(time.Until(expired) + 10*time.Millisecond)
	put(t, client, "on the connection that stands")
	link.Reset()
	require.Error(t, tryPut(t, client, "with an expired certificate"))
	require.NoError(t, cluster.RotateCertificates())
	second, err := cluster.Certificate("client", time.Hour)
	require.NoError(t, err)
	current.Store(&second)
	link.Reset() // a connection may have begun before
	require.Eventually(t, func() bool { return tryPut(t, client, "with a new one") == nil }, patience, time.Millisecond)
	require.NotEqual(t, before, *served.Load())
}

func TestUsersHaveTheirPermissionsOnly(t *testing.T) {
	for _, overTLS := range []bool{false, true} {
		t.Run(fmt.Sprintf("TLS=%v", overTLS), func(t *testing.T) {
			users := []etcdtest.User{
				{Name: "writer", Password: "secret", Permissions: []etcdtest.Permission{{Type: clientv3.PermReadWrite, Key: "key"}}},
				{Name: "all", Password: "secret", Permissions: []etcdtest.Permission{{Type: clientv3.PermRead, Prefix: true}}},
			}
			if overTLS {
				users = append(users, etcdtest.User{Name: "certified", Permissions: []etcdtest.Permission{
					{Type: clientv3.PermReadWrite, Key: "k", Prefix: true},
				}})
			}
			cluster := etcdtest.StartSecure(t, 1, etcdtest.Security{TLS: overTLS, Users: users})
			writer := clientWith(t, configOf(t, cluster, "writer"))
			put(t, writer, "written")
			require.ErrorIs(t, tryPutTo(t, writer, "kez", "denied"), rpctypes.ErrPermissionDenied)
			all := clientWith(t, configOf(t, cluster, "all"))
			require.Equal(t, "written", get(t, all))
			require.ErrorIs(t, tryPut(t, all, "denied"), rpctypes.ErrPermissionDenied)
			put(t, cluster.Client(t), "by root")
			if !overTLS {
				require.Error(t, tryPut(t, clientTo(t, cluster.Endpoints()[0]), "by nobody"))
				return
			}
			certified := clientWith(t, configOf(t, cluster, "certified"))
			require.NoError(t, tryPutTo(t, certified, "kez", "written"))
			require.ErrorIs(t, tryPutTo(t, certified, "l", "denied"), rpctypes.ErrPermissionDenied)
			require.Error(t, tryPut(t, clientWith(t, configOf(t, cluster, "nobody")), "by nobody"))
		})
	}
}

func TestTokensExpireAsConfigured(t *testing.T) {
	t.Parallel()
	for _, jwt := range []bool{false, true} {
		t.Run(fmt.Sprintf("JWT=%v", jwt), func(t *testing.T) {
			t.Parallel()
			const lifetime = 3 * time.Second // enough to use it once, however slow the machine
			cluster := etcdtest.StartSecure(t, 1, etcdtest.Security{
				Users: []etcdtest.User{{Name: "root", Password: "secret"}}, JWT: jwt, TokenTTL: lifetime,
			})
			admin := cluster.Client(t)
			response, err := admin.Authenticate(t.Context(), "root", "secret")
			require.NoError(t, err)
			client := clientWith(t, clientv3.Config{
				Endpoints: cluster.Endpoints(),
				Token:     response.Token, // no password, with which clientv3 would get another
				Logger:    zap.NewNop(),
			})
			put(t, client, "with a token")

			require.Eventually(t, func() bool {
				time.Sleep(lifetime + 1500*time.Millisecond) // to ask meanwhile would renew a simple token
				return errors.Is(tryPut(t, client, "without"), rpctypes.ErrInvalidAuthToken)
			}, patience, time.Millisecond)
			put(t, admin, "with a password")
		})
	}
}

func TestSecureClusterIsConfiguredToo(t *testing.T) {
	cluster := etcdtest.StartSecure(t, 1, etcdtest.Security{
		TLS: true, Configure: func(config *embed.Config) { config.MaxTxnOps = 1 },
	})
	requireOneOperation(t, cluster.Client(t))
}

func TestNewSecureFailsOnAUserThatEtcdRefuses(t *testing.T) {
	_, err := etcdtest.NewSecure(1, etcdtest.Security{Users: []etcdtest.User{{Name: "", Password: "secret"}}})
	require.ErrorContains(t, err, `etcdtest: add user ""`)
	require.NotContains(t, err.Error(), "secret")
}

func TestClusterWithoutTLSHasNoCertificates(t *testing.T) {
	cluster := etcdtest.Start(t, 1)
	_, err := cluster.Certificate("client", time.Hour)
	require.ErrorContains(t, err, "no TLS")
	require.ErrorContains(t, cluster.RotateCertificates(), "no TLS")
}

func TestProxyServesKeysWatchesLeasesAndUsers(t *testing.T) {
	t.Parallel()
	for name, security := range map[string]etcdtest.Security{
		"open": {},
		"TLS and users": {TLS: true, Users: []etcdtest.User{{
			Name: "user", Password: "secret", Permissions: []etcdtest.Permission{{Type: clientv3.PermReadWrite, Key: "key"}},
		}}},
	} {
		t.Run(name, func(t *testing.T) {
			cluster := etcdtest.StartSecure(t, 1, security)
			proxy := etcdtest.StartProxy(t, cluster)
			config := configOf(t, cluster, "user")
			config.Endpoints, config.TLS = []string{proxy.Endpoint()}, nil
			client := clientWith(t, config)
			changes := client.Watch(t.Context(), "key", clientv3.WithCreatedNotify())
			require.True(t, (<-changes).Created)
			lease, err := client.Grant(t.Context(), 60)
			require.NoError(t, err)
			_, err = client.Put(t.Context(), "key", "leased", clientv3.WithLease(lease.ID))
			require.NoError(t, err)
			require.Equal(t, "leased", string((<-changes).Events[0].Kv.Value))
			renewals, err := client.KeepAlive(t.Context(), lease.ID)
			require.NoError(t, err)
			require.EqualValues(t, 60, (<-renewals).TTL)
			if security.TLS {
				require.ErrorIs(t, tryPutTo(t, client, "other", "denied"), rpctypes.ErrPermissionDenied)
			}

			require.NoError(t, proxy.Close())
			require.NoError(t, proxy.Close())
			require.Error(t, tryPut(t, client, "closed"))
		})
	}
}

func configOf(t *testing.T, cluster *etcdtest.Cluster, user string) clientv3.Config {
	t.Helper()
	config, err := cluster.ClientConfig(user)
	require.NoError(t, err)
	return config
}

func clientWith(t *testing.T, config clientv3.Config) *clientv3.Client {
	t.Helper()
	client, err := clientv3.New(config)
	require.NoError(t, err)
	t.Cleanup(func() { _ = client.Close() })
	return client
}
