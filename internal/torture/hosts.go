package main

import (
	"sync/atomic"
	"time"

	"example.com/etcdutil/etcdtest"
	"example.com/etcdutil/internal/reorder"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
)

// A host is what one machine would be: one client, behind one link to each member. Each workload
// has a client on it, so that they share the client's connections and its keepalive stream, as in a
// real process.
type host struct {
	id       int
	links    []*etcdtest.Link
	client   *clientv3.Client // nil for a host whose client is in another process
	faulted  atomic.Bool      // its links have a fault
	answers  *answers
	progress reorder.Progress // etcd's answers about it come late
	spoiled  atomic.Bool      // its answers have a fault
	metadata atomic.Bool      // its callers' contexts carry metadata
}

func newHost(id int, members []string) (*host, error) {
	h := &host{id: id, answers: newAnswers(id)}
	for _, endpoint := range members {
		link, err := etcdtest.NewLink(endpoint)
		if err != nil {
			h.close()
			return nil, err
		}
		h.links = append(h.links, link)
	}
	return h, nil
}

func (h *host) connect() (err error) {
	h.client, err = newClient(h.endpoints(), grpc.WithChainUnaryInterceptor(h.answers.intercept),
		grpc.WithChainStreamInterceptor(h.progress.Intercept))
	return err
}

func (h *host) endpoints() []string {
	var endpoints []string
	for _, l := range h.links {
		endpoints = append(endpoints, l.Endpoint())
	}
	return endpoints
}

// to are the links to one member, or to all if it is negative.
func (h *host) to(member int) []*etcdtest.Link {
	if member < 0 {
		return h.links
	}
	return h.links[member : member+1]
}

func (h *host) heal() {
	for _, l := range h.links {
		l.Heal()
	}
}

func (h *host) close() {
	if h.client != nil {
		closeClient(h.client)
	}
	for _, l := range h.links {
		_ = l.Close()
	}
}

// closeClient does not wait for long: closing a clientv3.Client can block for ever where it has
// just opened a watch stream again (clientv3's serveSubstream then sends to nobody).
func closeClient(client *clientv3.Client) {
	closed := make(chan struct{})
	go func() { // until the client is closed
		_ = client.Close()
		close(closed)
	}()
	select {
	case <-closed:
	case <-time.After(5 * time.Second):
	}
}

func newClient(endpoints []string, opts ...grpc.DialOption) (*clientv3.Client, error) {
	return clientv3.New(clientConfig(endpoints, opts...))
}

func clientConfig(endpoints []string, opts ...grpc.DialOption) clientv3.Config {
	return clientv3.Config{
		Endpoints:            endpoints,
		DialTimeout:          5 * time.Second,
		DialKeepAliveTime:    10 * time.Second,
		DialKeepAliveTimeout: 3 * time.Second,
		Logger:               zap.NewNop(),
		DialOptions:          opts,
	}
}
