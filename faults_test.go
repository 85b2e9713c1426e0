package etcdutil

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"example.com/etcdutil/etcdtest"
	"github.com/stretchr/testify/require"
	"go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
)

// A door passes connections on to an endpoint, or refuses them: etcdtest.Link can do everything but
// that. While it refuses, nothing holds its port, so the port is none that the system gives to
// outgoing connections or to those who ask for any.
type door struct {
	t        *testing.T
	addr, to string
	listener net.Listener
	mu       sync.Mutex
	conns    []net.Conn
}

// doors counts the ports, from a random one on: the port of a door that is shut is none that
// another door finds free.
var doors atomic.Int64

func init() { doors.Store(rand.Int64N(10_000)) }

func openDoor(t *testing.T, to string) *door {
	d := &door{t: t, to: to}
	eventually(t, func() bool {
		d.addr = fmt.Sprintf("127.0.0.1:%d", 20_000+doors.Add(1)%10_000)
		return d.listen() == nil
	}, "a free port")
	t.Cleanup(d.shut)
	return d
}

func (d *door) open() { require.NoError(d.t, d.listen()) }

func (d *door) listen() error {
	listener, err := net.Listen("tcp", d.addr)
	if err != nil {
		return err
	}
	d.mu.Lock()
	d.listener = listener
	d.mu.Unlock()
	endpoint := d.to
	go func() { // until shut
		for {
			from, err := listener.Accept()
			if err != nil {
				return
			}
			d.pass(listener, from, endpoint)
		}
	}()
	return nil
}

// pass passes a connection on that has come from listener, unless the door was shut meanwhile.
func (d *door) pass(listener net.Listener, from net.Conn, endpoint string) {
	to, err := net.Dial("tcp", endpoint)
	if err != nil {
		_ = from.Close()
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.listener != listener {
		_, _ = from.Close(), to.Close()
		return
	}
	d.conns = append(d.conns, from, to)
	go func() { _, _ = io.Copy(to, from) }()
	go func() { _, _ = io.Copy(from, to) }()
}

// slowLink passes connections on to an endpoint, and no more than so many bytes a second back. It
// returns its own endpoint.
func slowLink(t *testing.T, endpoint string, bytesPerSecond int) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	t.Cleanup(func() { _ = listener.Close() })
	go func() { // until the test ends
		for {
			from, err := listener.Accept()
			if err != nil {
				return
			}
			go passSlowly(from, endpoint, bytesPerSecond)
		}
	}()
	return listener.Addr().String()
}

func passSlowly(from net.Conn, endpoint string, bytesPerSecond int) {
	defer func() { _ = from.Close() }()
	to, err := net.Dial("tcp", endpoint)
	if err != nil {
		return
	}
	defer func() { _ = to.Close() }()
	go func() {
		_, _ = io.Copy(to, from)
		_ = to.Close()
	}()
	const perSecond = 20
	for {
		n, err := io.CopyN(from, to, int64(bytesPerSecond/perSecond))
		if err != nil {
			return
		}
		time.Sleep(time.Duration(n) * time.Second / time.Duration(bytesPerSecond))
	}
}

func (d *door) connected() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.conns) > 0
}

func (d *door) shut() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.listener != nil {
		_ = d.listener.Close()
	}
	d.listener = nil
	for _, c := range d.conns {
		_ = c.Close()
	}
	d.conns = nil
}

// twoWays is a client with two connections: what it opens first goes over the link, and after
// second has been called what it opens next goes over either.
func twoWays(t *testing.T) (client *clientv3.Client, link *etcdtest.Link, second func()) {
	t.Helper()
	return twoWaysTo(t, testCluster.Endpoints()[0])
}

func twoWaysTo(t *testing.T, endpoint string) (client *clientv3.Client, link *etcdtest.Link, second func()) {
	t.Helper()
	link = etcdtest.StartLink(t, endpoint)
	d := openDoor(t, endpoint)
	d.shut()
	client = newClient(t, link.Endpoint(), d.addr)
	return client, link, func() {
		d.open()
		eventually(t, func() bool { client.ActiveConnection().ResetConnectBackoff(); return d.connected() }, "the second connection")
	}
}

// countingClient counts what its client sends, except requests of these kinds.
func countingClient(t *testing.T, except ...func(req any) bool) (*clientv3.Client, *atomic.Int64) {
	t.Helper()
	var requests atomic.Int64
	client := interceptedClient(t, func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		if !slices.ContainsFunc(except, func(is func(any) bool) bool { return is(req) }) {
			requests.Add(1)
		}
		return invoker(ctx, method, req, reply, cc, opts...)
	})
	return client, &requests
}

// isWrite reports whether a request writes a key. Reads, for example of a lock's own key, come at
// any time.
func isWrite(req any) bool {
	switch req := req.(type) {
	case *etcdserverpb.PutRequest, *etcdserverpb.DeleteRangeRequest:
		return true
	case *etcdserverpb.TxnRequest:
		return slices.ContainsFunc(req.Success, func(op *etcdserverpb.RequestOp) bool {
			return op.GetRequestPut() != nil || op.GetRequestDeleteRange() != nil
		})
	}
	return false
}

// isWriteTxn reports whether a request is a transaction that writes a key. Faults that are for a
// certain transaction ask this: the read of a held lock's own key comes between any others.
func isWriteTxn(req any) bool {
	_, txn := req.(*etcdserverpb.TxnRequest)
	return txn && isWrite(req)
}

// isKeyCheck reports whether a request is the read of a held lock's own key, or another read of the
// watch streams. It reads the same whether its guards hold or not.
func isKeyCheck(req any) bool {
	r, txn := req.(*etcdserverpb.TxnRequest)
	return txn && !isWrite(req) && len(r.Success) > 0 && len(r.Success) == len(r.Failure)
}

// interceptedClient is a real client of testCluster, with a fault between it and its connection.
func interceptedClient(t *testing.T, fault grpc.UnaryClientInterceptor) *clientv3.Client {
	t.Helper()
	return newClientWith(t, grpc.WithChainUnaryInterceptor(fault))
}

// clientOf is a real client of a cluster, with a fault between it and its connection.
func clientOf(t *testing.T, cluster *etcdtest.Cluster, fault grpc.UnaryClientInterceptor) *clientv3.Client {
	t.Helper()
	return clientAt(t, cluster.Endpoints(), fault)
}

func clientAt(t *testing.T, endpoints []string, fault grpc.UnaryClientInterceptor) *clientv3.Client {
	t.Helper()
	client, err := clientv3.New(clientv3.Config{
		Endpoints: endpoints, Logger: zap.NewNop(), DialOptions: []grpc.DialOption{grpc.WithChainUnaryInterceptor(fault)},
	})
	require.NoError(t, err)
	t.Cleanup(func() { _ = client.Close() })
	return client
}

// newClientWith is a client of testCluster with options for its connection.
func newClientWith(t *testing.T, opts ...grpc.DialOption) *clientv3.Client {
	t.Helper()
	client, err := clientv3.New(clientv3.Config{Endpoints: testCluster.Endpoints(), Logger: zap.NewNop(), DialOptions: opts})
	require.NoError(t, err)
	t.Cleanup(func() { _ = client.Close() })
	return client
}

// leaseServer is a lease server on a connection in memory, for fake time. What leases mean is not
// for it to say: the tests on real etcd do.
type leaseServer struct {
	etcdserverpb.UnimplementedLeaseServer
	ttl     int64
	delay   time.Duration
	mu      sync.Mutex
	silent  atomic.Bool
	streams atomic.Int64
	grants  atomic.Int64 // asked for
	refused int64        // the first so many grants are answered by an ambiguous error

	reversed bool // five renewals are answered at a time, the last one first
}

func (s *leaseServer) setDelay(d time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.delay = d
}

func (s *leaseServer) wait() {
	s.mu.Lock()
	d := s.delay
	s.mu.Unlock()
	time.Sleep(d)
}

// start returns a client of the server. Both end with the test's bubble.
func (s *leaseServer) start(t *testing.T) *clientv3.Client {
	t.Helper()
	listener := bufconn.Listen(1 << 16)
	server := grpc.NewServer(grpc.WaitForHandlers(true))
	etcdserverpb.RegisterLeaseServer(server, s)
	go func() { _ = server.Serve(listener) }()
	client, err := clientv3.New(clientv3.Config{
		Endpoints: []string{"passthrough:///memory"},
		Logger:    zap.NewNop(),
		DialOptions: []grpc.DialOption{
			grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return listener.DialContext(ctx) }),
		},
	})
	require.NoError(t, err)
	t.Cleanup(func() {
		_ = client.Close()
		server.Stop()
	})
	return client
}

func (s *leaseServer) LeaseGrant(_ context.Context, r *etcdserverpb.LeaseGrantRequest) (*etcdserverpb.LeaseGrantResponse, error) {
	s.wait()
	if s.grants.Add(1) <= s.refused {
		return nil, status.Error(codes.Unavailable, "away")
	}
	return &etcdserverpb.LeaseGrantResponse{ID: r.ID, TTL: s.ttl}, nil
}

func (s *leaseServer) LeaseRevoke(context.Context, *etcdserverpb.LeaseRevokeRequest) (*etcdserverpb.LeaseRevokeResponse, error) {
	return &etcdserverpb.LeaseRevokeResponse{}, nil
}

func (s *leaseServer) LeaseKeepAlive(stream etcdserverpb.Lease_LeaseKeepAliveServer) error {
	s.streams.Add(1)
	var unanswered []int64
	for {
		r, err := stream.Recv()
		if err != nil {
			return err
		}
		s.wait()
		if s.silent.Load() {
			<-stream.Context().Done()
			return nil
		}
		unanswered = append(unanswered, r.ID)
		if s.reversed && len(unanswered) < 5 {
			continue
		}
		for _, id := range slices.Backward(unanswered) {
			if err := stream.Send(&etcdserverpb.LeaseKeepAliveResponse{ID: id, TTL: s.ttl}); err != nil {
				return err
			}
		}
		unanswered = nil
	}
}
