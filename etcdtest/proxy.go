package etcdtest

import (
	"context"
	"fmt"
	"net"
	"sync"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/proxy/grpcproxy"
	"go.uber.org/zap"
	"google.golang.org/grpc"
)

// Proxy is etcd's gRPC proxy (`etcd grpc-proxy start`) in this process, in front of all members of
// a cluster. [StartProxy] or [NewProxy] makes it; Close ends it. The zero Proxy is not usable. It
// serves keys, watches, leases and authentication, without TLS of its own. Its methods are safe for
// concurrent use.
type Proxy struct {
	endpoint string
	upstream *clientv3.Client
	server   *grpc.Server
	stop     context.CancelFunc
	stopped  []<-chan struct{}
	serving  sync.WaitGroup
}

// NewProxy runs a proxy in front of a cluster, on a free loopback port. With Security.TLS the proxy
// has the certificate of this user, and otherwise ignores it. etcd's proxy renews all leases as
// that user, whoever owns them. With users but without TLS, leases that have keys are not renewed.
// Close the proxy before the cluster. A nil cluster panics.
//
// It returns an error if clientv3 cannot make a client, or if no port is free.
func NewProxy(cluster *Cluster, user string) (*Proxy, error) {
	p, err := newProxy(cluster, user)
	if err != nil {
		return nil, fmt.Errorf("etcdtest: proxy: %w", err)
	}
	return p, nil
}

// StartProxy is [NewProxy] with root's certificate for a test: it fails tb if NewProxy returns an
// error, and closes the proxy when tb ends. A nil tb or cluster panics.
func StartProxy(tb testing.TB, cluster *Cluster) *Proxy {
	tb.Helper()
	p, err := NewProxy(cluster, root)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = p.Close() })
	return p
}

func newProxy(cluster *Cluster, user string) (*Proxy, error) {
	config, err := cluster.ClientConfig(user)
	if err != nil {
		return nil, err
	}
	config.Username, config.Password = "", "" // requests carry their callers' tokens
	config.DialOptions = []grpc.DialOption{
		grpc.WithUnaryInterceptor(grpcproxy.AuthUnaryClientInterceptor),
		grpc.WithStreamInterceptor(grpcproxy.AuthStreamClientInterceptor),
	}
	upstream, err := clientv3.New(config)
	if err != nil {
		return nil, err
	}
	listener, err := net.Listen("tcp", loopback(0))
	if err != nil {
		_ = upstream.Close()
		return nil, err
	}
	p := &Proxy{endpoint: listener.Addr().String(), upstream: upstream, server: grpc.NewServer()}
	p.register()
	p.serving.Go(func() { _ = p.server.Serve(listener) }) // until Close
	return p, nil
}

func (p *Proxy) register() {
	ctx, cancel := context.WithCancel(context.Background())
	p.stop = cancel
	kv, kvStopped := grpcproxy.NewKvProxy(p.upstream)
	watch, watchStopped := grpcproxy.NewWatchProxy(ctx, zap.NewNop(), p.upstream)
	lease, leaseStopped := grpcproxy.NewLeaseProxy(ctx, p.upstream)
	p.stopped = []<-chan struct{}{kvStopped, watchStopped, leaseStopped}
	pb.RegisterKVServer(p.server, kv)
	pb.RegisterWatchServer(p.server, watch)
	pb.RegisterLeaseServer(p.server, lease)
	pb.RegisterAuthServer(p.server, grpcproxy.NewAuthProxy(p.upstream))
}

// Endpoint returns the proxy's endpoint for clients, "127.0.0.1:port".
func (p *Proxy) Endpoint() string {
	return p.endpoint
}

// Close stops the proxy, and its clients lose their connections. Closing again does nothing. The
// error is always nil.
func (p *Proxy) Close() error {
	p.stop()
	p.server.Stop()
	for _, stopped := range p.stopped {
		<-stopped
	}
	p.serving.Wait()
	_ = p.upstream.Close()
	return nil
}
