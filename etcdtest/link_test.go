package etcdtest_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	clientv3 "go.etcd.io/etcd/client/v3"

	"example.com/etcdutil/etcdtest"
	"example.com/etcdutil/internal/testclock"
)

// silence is how long a test listens to find that nothing comes, in which a link on a slow machine
// has taken what it is to lose.
const silence = 150 * time.Millisecond

func TestNewLinkRefusesAMalformedEndpointByName(t *testing.T) {
	for _, endpoint := range []string{
		"", "127.0.0.1", "127.0.0.1:", ":2379", "127.0.0.1:etcd", "127.0.0.1:0", "127.0.0.1:65536", "127.0.0.1:-1",
		"ftp://127.0.0.1:2379", "http://127.0.0.1:2379/path", "http://https://127.0.0.1:2379", "user@host:2379",
		"http://", "::1:2379", "a b:2379",
	} {
		_, err := etcdtest.NewLink(endpoint)
		require.ErrorContains(t, err, `"`+endpoint+`"`)
	}
}

func TestLinkLeadsToEachFormOfEndpoint(t *testing.T) {
	server := listen(t, "127.0.0.1:0")
	_, port, err := net.SplitHostPort(server.address())
	require.NoError(t, err)
	for _, endpoint := range []string{"127.0.0.1:" + port, "http://127.0.0.1:" + port, "https://127.0.0.1:" + port,
		"localhost:" + port} {
		link := etcdtest.StartLink(t, endpoint)
		require.True(t, strings.HasPrefix(link.Endpoint(), "127.0.0.1:"))
		client, served := server.connectThrough(t, link)
		requirePasses(t, client, served)
		requirePasses(t, served, client)
	}
}

func TestLinkCutStopsBytesBothWaysUntilHeal(t *testing.T) {
	server := listen(t, "127.0.0.1:0")
	link := etcdtest.StartLink(t, server.address())
	client, served := server.connectThrough(t, link)
	requirePasses(t, client, served)

	link.Cut()
	write(t, client, "lost")
	write(t, served, "lost")
	requireSilent(t, served)
	requireSilent(t, client)

	link.Heal()
	requireReset(t, client)
	requireReset(t, served)
	again, servedAgain := server.connectThrough(t, link)
	requirePasses(t, again, servedAgain)
}

// etcd takes what follows lost bytes for another message, and may panic.
func TestLinkBetweenMembersPassesNothingAfterLostBytes(t *testing.T) {
	server := listen(t, "127.0.0.1:0")
	link, cut, mend, err := etcdtest.LinkBetweenMembers(server.address())
	require.NoError(t, err)
	defer link.Close()
	client, served := server.connectThrough(t, link)
	requirePasses(t, client, served)
	if err := cut(); err != nil {
		t.Skip(err) // Linux only
	}
	write(t, client, "lost")
	requireSilent(t, served)
	mend()
	write(t, client, "lost as well")
	requireSilent(t, served)
}

func TestLinkHealSparesConnectionsThatLostNothing(t *testing.T) {
	server := listen(t, "127.0.0.1:0")
	link := etcdtest.StartLink(t, server.address())
	lucky, luckyServed := server.connectThrough(t, link)
	unlucky, unluckyServed := server.connectThrough(t, link)

	link.Cut()
	write(t, unluckyServed, "lost")
	requireSilent(t, unlucky)
	link.Heal()
	requireReset(t, unlucky)
	requirePasses(t, lucky, luckyServed)
	requirePasses(t, luckyServed, lucky)
}

func TestLinkCutHidesNewConnectionsFromTheServer(t *testing.T) {
	server := listen(t, "127.0.0.1:0")
	link := etcdtest.StartLink(t, server.address())

	link.Cut()
	client, err := net.Dial("tcp", link.Endpoint())
	require.NoError(t, err)
	defer client.Close()
	write(t, client, "lost")
	requireSilent(t, client)
	require.Empty(t, server.accepted)

	link.Heal()
	requireReset(t, client)
	_, _ = server.connectThrough(t, link)
}

func TestLinkCutHidesTheEndOfAConnection(t *testing.T) {
	server := listen(t, "127.0.0.1:0")
	link := etcdtest.StartLink(t, server.address())
	client, served := server.connectThrough(t, link)

	link.Cut()
	require.NoError(t, served.Close())
	requireSilent(t, client)
	link.Heal()
	requireReset(t, client)
}

func TestLinkDropRepliesStillPassesRequests(t *testing.T) {
	server := listen(t, "127.0.0.1:0")
	link := etcdtest.StartLink(t, server.address())
	client, served := server.connectThrough(t, link)

	link.DropReplies()
	requirePasses(t, client, served)
	write(t, served, "lost")
	requireSilent(t, client)
	requirePasses(t, client, served)
	newcomer, servedNewcomer := server.connectThrough(t, link)
	requirePasses(t, newcomer, servedNewcomer)

	link.Heal()
	requireReset(t, client)
	requireReset(t, served)
	requirePasses(t, newcomer, servedNewcomer)
}

func TestLinkDropRepliesHidesARefusal(t *testing.T) {
	server := listen(t, "127.0.0.1:0")
	link := etcdtest.StartLink(t, server.address())
	require.NoError(t, server.listener.Close())

	link.DropReplies()
	client, err := net.Dial("tcp", link.Endpoint())
	require.NoError(t, err)
	defer client.Close()
	requireSilent(t, client)
	link.Heal()
	requireReset(t, client)
}

func TestLinkDelaysEachWay(t *testing.T) {
	const delay = 100 * time.Millisecond
	server := listen(t, "127.0.0.1:0")
	link := etcdtest.StartLink(t, server.address())
	client, served := server.connectThrough(t, link)

	link.Delay(delay)
	for _, way := range [][2]net.Conn{{client, served}, {served, client}} {
		begin := time.Now()
		requirePasses(t, way[0], way[1])
		require.GreaterOrEqual(t, time.Since(begin), delay)
	}
	for _, none := range []time.Duration{0, -time.Hour} {
		link.Delay(time.Hour)
		link.Delay(none)
		requirePasses(t, client, served)
	}
}

func TestLinkDelayKeepsOrderAndDoesNotAddUp(t *testing.T) {
	const delay, count = 200 * time.Millisecond, 100
	server := listen(t, "127.0.0.1:0")
	link := etcdtest.StartLink(t, server.address())
	client, served := server.connectThrough(t, link)

	link.Delay(delay)
	sent := make([]byte, count)
	begin := time.Now()
	for i := range sent {
		sent[i] = byte(i)
		_, err := client.Write(sent[i : i+1])
		require.NoError(t, err)
		time.Sleep(time.Millisecond) // spread, so that a delay per read would show
	}
	received := make([]byte, count)
	took := testclock.Time(func() {
		_, err := io.ReadFull(served, received)
		require.NoError(t, err)
	})
	require.Equal(t, sent, received)
	require.GreaterOrEqual(t, time.Since(begin), delay)
	require.Less(t, took, delay+delay/2)
}

func TestLinkHealHastensBytesHeldBackByADelay(t *testing.T) {
	server := listen(t, "127.0.0.1:0")
	link := etcdtest.StartLink(t, server.address())
	client, served := server.connectThrough(t, link)

	link.Delay(time.Hour)
	write(t, client, "held back")
	requireSilent(t, served)
	link.Heal()
	requireReads(t, served, "held back")
	requirePasses(t, served, client)
}

func TestLinkCutLosesBytesHeldBackByADelay(t *testing.T) {
	const delay = time.Second // enough to cut it in, however slow the machine
	server := listen(t, "127.0.0.1:0")
	link := etcdtest.StartLink(t, server.address())
	client, served := server.connectThrough(t, link)

	link.Delay(delay)
	write(t, client, "lost")
	link.Cut()
	require.NoError(t, served.SetReadDeadline(time.Now().Add(delay+silence)))
	_, err := served.Read(make([]byte, 1))
	require.ErrorIs(t, err, os.ErrDeadlineExceeded)
	link.Heal()
	requireReset(t, client)
}

func TestLinkResetClosesConnectionsAndAcceptsNewOnesAtOnce(t *testing.T) {
	server := listen(t, "127.0.0.1:0")
	link := etcdtest.StartLink(t, server.address())
	client, served := server.connectThrough(t, link)

	link.Reset()
	requireReset(t, client)
	requireReset(t, served)
	again, servedAgain := server.connectThrough(t, link)
	requirePasses(t, again, servedAgain)
}

func TestLinkPassesOnThatOneSideHasFinished(t *testing.T) {
	server := listen(t, "127.0.0.1:0")
	link := etcdtest.StartLink(t, server.address())
	client, served := server.connectThrough(t, link)

	write(t, client, "request")
	require.NoError(t, client.CloseWrite())
	request, err := io.ReadAll(served)
	require.NoError(t, err)
	require.Equal(t, "request", string(request))
	write(t, served, "reply")
	require.NoError(t, served.Close())
	reply, err := io.ReadAll(client)
	require.NoError(t, err)
	require.Equal(t, "reply", string(reply))
}

func TestLinkPassesMegabytesUnharmedThroughADelay(t *testing.T) {
	server := listen(t, "127.0.0.1:0")
	link := etcdtest.StartLink(t, server.address())
	client, served := server.connectThrough(t, link)
	link.Delay(5 * time.Millisecond)

	sent := make([]byte, 32<<20)
	_, _ = rand.Read(sent)
	var sending sync.WaitGroup
	sending.Go(func() {
		_, _ = client.Write(sent)
		_ = client.Close()
	})
	received, err := io.ReadAll(served)
	sending.Wait()
	require.NoError(t, err)
	require.True(t, bytes.Equal(sent, received))
}

func TestLinkClosesConnectionsWhileItsEndpointRefuses(t *testing.T) {
	server := listen(t, etcdtest.ReserveAddress(t))
	link := etcdtest.StartLink(t, server.address())
	require.NoError(t, server.listener.Close())

	client, err := net.Dial("tcp", link.Endpoint())
	require.NoError(t, err)
	defer client.Close()
	require.NoError(t, client.SetReadDeadline(time.Now().Add(patience)))
	_, err = client.Read(make([]byte, 1))
	require.Error(t, err)
	require.NotErrorIs(t, err, os.ErrDeadlineExceeded)

	back := listen(t, server.address())
	again, served := back.connectThrough(t, link)
	requirePasses(t, again, served)
}

func TestClosedLinkRefusesAndClosesAgain(t *testing.T) {
	server := listen(t, "127.0.0.1:0")
	link := etcdtest.StartLink(t, server.address())
	client, served := server.connectThrough(t, link)
	link.Delay(time.Hour)
	write(t, client, "held back")

	require.NoError(t, link.Close())
	require.NoError(t, link.Close())
	requireReset(t, client)
	requireReset(t, served)
	_, err := net.Dial("tcp", link.Endpoint())
	require.Error(t, err)
	link.Cut()
	link.DropReplies()
	link.Reset()
	link.Heal()
}

func TestLinkMayBeUsedConcurrently(t *testing.T) {
	server := listen(t, "127.0.0.1:0")
	link := etcdtest.StartLink(t, server.address())
	var users sync.WaitGroup
	for _, use := range []func(){
		link.Cut, link.DropReplies, link.Heal, link.Reset, func() { link.Delay(time.Millisecond) },
		func() {
			if client, err := net.Dial("tcp", link.Endpoint()); err == nil {
				_, _ = client.Write([]byte("any"))
				_ = client.Close()
			}
		},
	} {
		users.Go(func() {
			for range 100 {
				use()
			}
		})
	}
	users.Wait()
	require.NoError(t, link.Close())
}

func TestClientRecoversAsSoonAsItsLinkHeals(t *testing.T) {
	cluster := etcdtest.Start(t, 1)
	link := etcdtest.StartLink(t, cluster.Endpoints()[0])
	client := clientTo(t, link.Endpoint())
	put(t, client, "before")
	before, err := client.Get(t.Context(), "key")
	require.NoError(t, err)
	// Given no revision, clientv3 would resume the watch with events that are older than it.
	watch := client.Watch(t.Context(), "key", clientv3.WithRev(before.Header.Revision+1), clientv3.WithCreatedNotify())
	require.True(t, (<-watch).Created)

	link.Cut()
	require.ErrorIs(t, tryPut(t, client, "lost"), context.DeadlineExceeded)
	link.Heal()
	took := testclock.Time(func() {
		// This is a read: clientv3 repeats it if its connection breaks.
		require.Equal(t, "before", get(t, client))
		put(t, client, "after")
	})
	require.Less(t, took, time.Second)
	require.Equal(t, "after", string((<-watch).Events[0].Kv.Value))
}

func TestWriteIsAppliedWhoseReplyIsDropped(t *testing.T) {
	cluster := etcdtest.Start(t, 1)
	link := etcdtest.StartLink(t, cluster.Endpoints()[0])
	client := clientTo(t, link.Endpoint())
	put(t, client, "before")

	link.DropReplies()
	ctx, giveUp := context.WithCancel(t.Context())
	answered := make(chan error, 1)
	go func() { // until given up
		_, err := client.Put(ctx, "key", "unknown")
		answered <- err
	}()
	direct := cluster.Client(t)
	require.Eventually(t, func() bool { return get(t, direct) == "unknown" }, patience, 10*time.Millisecond)
	giveUp()
	require.ErrorIs(t, <-answered, context.Canceled)
	link.Heal()
	require.Equal(t, "unknown", get(t, client))
}

func TestClientOutlivesARestartBehindItsLink(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 1)
	link := etcdtest.StartLink(t, cluster.Endpoints()[0])
	client := clientTo(t, link.Endpoint())
	put(t, client, "before")

	require.NoError(t, cluster.Stop(0))
	require.Error(t, tryPut(t, client, "lost"))
	require.NoError(t, cluster.Restart(0))
	require.Equal(t, "before", get(t, client))
}

func TestParallelRequestsThroughADelayTakeOneRoundTrip(t *testing.T) {
	const delay = 300 * time.Millisecond
	cluster := etcdtest.Start(t, 1)
	link := etcdtest.StartLink(t, cluster.Endpoints()[0])
	client := clientTo(t, link.Endpoint())
	put(t, client, "before")

	link.Delay(delay)
	begin := time.Now()
	took := testclock.Time(func() {
		var requests sync.WaitGroup
		for range 20 {
			requests.Go(func() {
				ctx, cancel := context.WithTimeout(t.Context(), patience)
				defer cancel()
				if _, err := client.Get(ctx, "key"); err != nil {
					t.Error(err)
				}
			})
		}
		requests.Wait()
	})
	require.GreaterOrEqual(t, time.Since(begin), 2*delay)
	require.Less(t, took, 4*delay)
}

// server accepts connections for a test to use.
type server struct {
	listener net.Listener
	accepted chan *net.TCPConn
}

func listen(t *testing.T, address string) *server {
	t.Helper()
	listener, err := net.Listen("tcp", address)
	require.NoError(t, err)
	s := &server{listener: listener, accepted: make(chan *net.TCPConn, 1000)}
	var accepting sync.WaitGroup
	accepting.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			s.accepted <- conn.(*net.TCPConn)
		}
	})
	t.Cleanup(func() {
		_ = listener.Close()
		accepting.Wait()
		for len(s.accepted) > 0 {
			_ = (<-s.accepted).Close()
		}
	})
	return s
}

func (s *server) address() string {
	return s.listener.Addr().String()
}

// connectThrough returns both ends of a new connection through the link.
func (s *server) connectThrough(t *testing.T, link *etcdtest.Link) (client, served *net.TCPConn) {
	t.Helper()
	conn, err := net.Dial("tcp", link.Endpoint())
	require.NoError(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	select {
	case served = <-s.accepted:
	case <-time.After(patience):
		require.Fail(t, "the server saw no connection")
	}
	t.Cleanup(func() { _ = served.Close() })
	requirePasses(t, conn, served) // before that, the link may not know yet that it is connected
	return conn.(*net.TCPConn), served
}

func write(t *testing.T, conn net.Conn, text string) {
	t.Helper()
	_, err := conn.Write([]byte(text))
	require.NoError(t, err)
}

func requirePasses(t *testing.T, from, to net.Conn) {
	t.Helper()
	write(t, from, "text")
	requireReads(t, to, "text")
}

func requireReads(t *testing.T, conn net.Conn, text string) {
	t.Helper()
	require.NoError(t, conn.SetReadDeadline(time.Now().Add(patience)))
	got := make([]byte, len(text))
	_, err := io.ReadFull(conn, got)
	require.NoError(t, err)
	require.Equal(t, text, string(got))
}

// requireSilent requires that nothing arrives, not even the connection's end.
func requireSilent(t *testing.T, conn net.Conn) {
	t.Helper()
	require.NoError(t, conn.SetReadDeadline(time.Now().Add(silence)))
	_, err := conn.Read(make([]byte, 1))
	require.ErrorIs(t, err, os.ErrDeadlineExceeded)
}

// requireReset requires that the connection ends, and not by an orderly end of file.
func requireReset(t *testing.T, conn net.Conn) {
	t.Helper()
	require.NoError(t, conn.SetReadDeadline(time.Now().Add(patience)))
	_, err := conn.Read(make([]byte, 1))
	require.Error(t, err)
	require.NotErrorIs(t, err, os.ErrDeadlineExceeded)
	require.False(t, errors.Is(err, io.EOF))
}
