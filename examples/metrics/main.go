// Metrics serves what etcdutil does to Prometheus: locks that are held and waited for, losses by
// cause, renewals and the time that leases had left, retries, resyncs, and the age of a mirror.
//
// It runs a leader, workers that contend for a lock, a shared lease and a mirror, against an etcd
// in this process, and from time to time it deletes the leader's key or cuts the link to etcd. The
// metrics are at /metrics. dashboard.json, beside this file, is a Grafana dashboard of them.
// Package etcdmetrics, below this directory, has the Observer, to be copied.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"sync"
	"time"

	"example.com/etcdutil"
	"example.com/etcdutil/etcdtest"
	"example.com/etcdutil/examples/metrics/etcdmetrics"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	err := run(ctx, os.Args[1:], os.Stdout)
	if errors.Is(err, flag.ErrHelp) {
		return
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "metrics: %v\n", err)
		stop()
		os.Exit(1)
	}
}

// run serves the metrics until ctx ends.
func run(ctx context.Context, args []string, stdout io.Writer) error {
	flags := flag.NewFlagSet("metrics", flag.ContinueOnError)
	flags.SetOutput(stdout)
	listen := flags.String("listen", "127.0.0.1:0", "serve the metrics at `host:port`")
	period := flags.Duration("for", 0, "end after this `time`; 0: run until interrupted")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if *period > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, *period)
		defer cancel()
	}
	listener, err := net.Listen("tcp", *listen)
	if err != nil {
		return err
	}
	registry := prometheus.NewRegistry()
	mux := http.NewServeMux()
	mux.Handle("/metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{}))
	server := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	go func() { _ = server.Serve(listener) }() // until it is closed
	defer server.Close()
	fmt.Fprintf(stdout, "http://%s/metrics\n", listener.Addr())
	return work(ctx, etcdmetrics.New(registry, nil))
}

// work gives the metrics something to count, until ctx ends.
func work(ctx context.Context, m *etcdmetrics.Metrics) error {
	cluster, err := etcdtest.New(1)
	if err != nil {
		return err
	}
	defer cluster.Close()
	link, err := etcdtest.NewLink(cluster.Endpoints()[0])
	if err != nil {
		return err
	}
	defer link.Close()
	client, err := newClient(link.Endpoint())
	if err != nil {
		return err
	}
	defer client.Close()
	operator, err := newClient(cluster.Endpoints()[0])
	if err != nil {
		return err
	}
	defer operator.Close()

	mirror, err := etcdutil.NewMirror[string](ctx, client, "settings/", etcdutil.WithPrefix(), m.Observer())
	if err != nil {
		return err
	}
	defer mirror.Close()
	m.Mirror("settings", mirror.AsOf)

	lease, err := etcdutil.NewLease(ctx, client, 10*time.Second, m.Observer())
	if err != nil {
		return err
	}
	defer lease.Close()
	m.Lease("workers", lease)

	var all sync.WaitGroup
	defer all.Wait()
	for range 2 {
		all.Go(func() { // until ctx ends
			defer m.Wait("scheduler")()
			_ = etcdutil.Lead(ctx, client, "scheduler", until, etcdutil.WithTTL(2*time.Second), m.Observer())
		})
	}
	for range 4 {
		all.Go(func() { // until ctx ends
			for ctx.Err() == nil {
				contend(ctx, client, lease, m)
			}
		})
	}
	harm(ctx, operator, link)
	return nil
}

// newClient returns a client of one endpoint.
func newClient(endpoint string) (*clientv3.Client, error) {
	return clientv3.New(clientv3.Config{Endpoints: []string{endpoint}, DialTimeout: 5 * time.Second, Logger: zap.NewNop()})
}

// until is a leader's work: it leads for as long as it may.
func until(ctx context.Context) error {
	<-ctx.Done()
	return context.Cause(ctx)
}

// contend takes one turn at a lock that others want, too.
func contend(ctx context.Context, client *clientv3.Client, lease *etcdutil.Lease, m *etcdmetrics.Metrics) {
	defer m.Wait("job")()
	_ = etcdutil.Do(ctx, client, "job", func(ctx context.Context) error {
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
		}
		return nil
	}, etcdutil.WithLease(lease), m.Observer())
	select {
	case <-time.After(20 * time.Millisecond):
	case <-ctx.Done():
	}
}

// harm deletes the leader's key, and cuts the link to etcd for longer than a leader's lease, in
// turn.
func harm(ctx context.Context, operator *clientv3.Client, link *etcdtest.Link) {
	for turn := 0; ; turn++ {
		select {
		case <-ctx.Done():
			return
		case <-time.After(2 * time.Second):
		}
		if turn%2 == 0 {
			if leader, err := etcdutil.Holder(ctx, operator, "scheduler"); err == nil {
				_, _ = operator.Delete(ctx, leader.Key)
			}
			continue
		}
		link.Cut()
		select {
		case <-ctx.Done():
		case <-time.After(3 * time.Second):
		}
		link.Heal()
	}
}
