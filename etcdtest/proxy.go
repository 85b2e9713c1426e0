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
// a cluster. It serves keys, watches, leases and authentication, without TLS of its own.
type Proxy struct {
	endpoint string
	upstream *clientv3.Client
	server   *grpc.Server
	stop     context.CancelFunc
	stopped  []<-chan struct{}
	serving  sync.WaitGroup
}

// NewProxy runs a proxy in front of a cluster, on a free loopback port. With Security.TLS the proxy
// has the certificate of this user. etcd's proxy renews all leases as that user, whoever they
// belong to: with users but without TLS, leases that have keys are not renewed. The caller closes
// the proxy, before the cluster.
func NewProxy(cluster *Cluster, user string) (*Proxy, error) {
	p, err := newProxy(cluster, user)
	if err != nil {
		return nil, fmt.Errorf("etcdtest: proxy: %w", err)
	}
	return p, nil
}

// StartProxy is [NewProxy] with root's client for a test: it fails tb on an error, and closes the
// proxy when tb ends.
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

// Close stops the proxy: its clients lose their connections. Closing again does nothing.
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
