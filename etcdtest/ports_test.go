package etcdtest

import (
	"net"
	"strconv"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestMembersPortsAreNoneOfAnOutgoingConnection(t *testing.T) {
	cluster := Start(t, 3)
	seen := make(map[string]bool)
	for _, n := range cluster.nodes {
		for _, address := range []string{n.clientAddress, n.peerAddress, n.linkAddress} {
			port := portOf(t, address)
			require.GreaterOrEqual(t, port, firstPort)
			require.LessOrEqual(t, port, lastPort)
			require.False(t, seen[address], "%s is taken twice", address)
			seen[address] = true
		}
	}
}

func TestPortsStayReservedWhileTheMemberIsStopped(t *testing.T) {
	cluster := Start(t, 1)
	require.NoError(t, cluster.Stop(0))
	guard := cluster.nodes[0].ports.guard.Addr().String()
	_, err := reserveAt(portOf(t, guard))
	require.ErrorIs(t, err, syscall.EADDRINUSE)

	require.NoError(t, cluster.Close())
	r, err := reserveAt(portOf(t, guard))
	require.NoError(t, err)
	r.release()
}

func TestPortsAreNotReservedIfOneOfThemIsTaken(t *testing.T) {
	r, err := reserve()
	require.NoError(t, err)
	guard := portOf(t, r.guard.Addr().String())
	taken, err := net.Listen("tcp", r.addresses[2])
	require.NoError(t, err)
	r.release()

	_, err = reserveAt(guard)
	require.ErrorIs(t, err, syscall.EADDRINUSE)
	require.NoError(t, taken.Close())
	r, err = reserveAt(guard)
	require.NoError(t, err, "a failed reservation leaves nothing behind")
	r.release()
}

func portOf(t *testing.T, address string) int {
	t.Helper()
	_, text, err := net.SplitHostPort(address)
	require.NoError(t, err)
	port, err := strconv.Atoi(text)
	require.NoError(t, err)
	return port
}
