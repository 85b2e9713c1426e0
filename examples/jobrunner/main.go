// Jobrunner is a service built on etcdutil. Start any number of replicas. One leads and queues
// jobs. The workers of all do each job exactly once. Settings are live. Every replica reads the
// leader's audit log, and serves metrics and a readiness probe. It stops within 1 s of SIGTERM
// while etcd is well, and within 6 s while it is not.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"example.com/etcdutil"
	"example.com/etcdutil/examples/metrics/etcdmetrics"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
)

// The keys and names in etcd.
const (
	settingsKey = "jobrunner/settings"
	leaderName  = "jobrunner/leader"
	auditName   = "jobrunner/audit"
	queued      = "jobrunner/queued/"  // a key for each job to do
	done        = "jobrunner/done/"    // and for each job that was done: by whom
	working     = "jobrunner/working/" // a lock for each job
)

// Settings are read anew for each job: JSON under settingsKey, with times in milliseconds.
type Settings struct {
	Every int // a job is queued
	Takes int // a job to do
}

// Audited is an entry of the audit log.
type Audited struct{ Who, What string }

// config is what the flags say.
type config struct {
	endpoints []string
	name      string
	listen    string
	position  string // the file that keeps how far the audit log was read; none if empty
	workers   int
	ttl       time.Duration
}

func main() {
	c := config{ttl: etcdutil.DefaultTTL}
	endpoints := flag.String("endpoints", "127.0.0.1:2379", "the etcd, as `host:port,...`")
	flag.StringVar(&c.name, "name", "", "the replica's `name`; default: replica- and the process ID")
	flag.StringVar(&c.listen, "listen", "127.0.0.1:8080", "serve /metrics and /ready at `host:port`")
	flag.StringVar(&c.position, "position", "", "keep in this `file` how far the audit log was read")
	flag.IntVar(&c.workers, "workers", 4, "the number of workers")
	flag.Parse()
	c.endpoints = strings.Split(*endpoints, ",")
	if c.name == "" {
		c.name = fmt.Sprintf("replica-%d", os.Getpid())
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, c, slog.New(slog.NewTextHandler(os.Stderr, nil))); err != nil {
		fmt.Fprintf(os.Stderr, "jobrunner: %v\n", err)
		os.Exit(1)
	}
}

// runner is a replica.
type runner struct {
	config
	log      *slog.Logger
	client   *clientv3.Client
	settings *etcdutil.Mirror[Settings]
	lease    atomic.Pointer[etcdutil.Lease] // of the workers
	metrics  *etcdmetrics.Metrics
	logger   etcdutil.Option
	version  int64             // of the last entry of the audit log that was read
	revision etcdutil.Revision // when that was written
}

// run is a replica's life. It returns nil when ctx has ended.
func run(ctx context.Context, c config, log *slog.Logger) error {
	client, err := clientv3.New(clientv3.Config{
		Endpoints: c.endpoints, DialTimeout: 5 * time.Second, Logger: zap.NewNop(),
		DialKeepAliveTime: 10 * time.Second, DialKeepAliveTimeout: 5 * time.Second,
	})
	if err != nil {
		return err
	}
	defer client.Close()
	registry := prometheus.NewRegistry()
	r := &runner{config: c, log: log, client: client, metrics: etcdmetrics.New(registry, label), logger: etcdutil.WithLogger(log)}
	if r.settings, err = etcdutil.NewMirror[Settings](ctx, client, settingsKey, r.logger, r.metrics.Observer()); err != nil {
		return err
	}
	defer r.settings.Close()
	r.metrics.Mirror("settings", r.settings.AsOf)
	server, err := r.serve(registry)
	if err != nil {
		return err
	}
	defer server.Close()

	data, _ := os.ReadFile(c.position) // none: from the first entry
	_, _ = fmt.Sscan(string(data), &r.version, &r.revision)

	var all sync.WaitGroup
	defer all.Wait() // each of these ends with ctx
	all.Go(func() { r.forever(ctx, "lead", r.lead) })
	all.Go(func() { r.forever(ctx, "work", r.work) })
	all.Go(func() { r.forever(ctx, "audit", r.audit) })
	<-ctx.Done()
	return nil
}

// label keeps the metrics of all jobs' locks together.
func label(lockName string) string {
	if strings.HasPrefix(lockName, working) {
		return working
	}
	return lockName
}

// serve serves the metrics, and whether this replica is ready.
func (r *runner) serve(registry *prometheus.Registry) (*http.Server, error) {
	listener, err := net.Listen("tcp", r.listen)
	if err != nil {
		return nil, err
	}
	mux := http.NewServeMux()
	mux.Handle("/metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{}))
	mux.HandleFunc("/ready", func(w http.ResponseWriter, _ *http.Request) {
		if lease := r.lease.Load(); lease == nil || time.Until(lease.Expiry()) < r.ttl/4 || time.Since(r.settings.AsOf()) > 5*time.Second {
			http.Error(w, "etcd cannot be reached", http.StatusServiceUnavailable)
		}
	})
	server := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	go func() { _ = server.Serve(listener) }() // until it is closed
	return server, nil
}

// forever calls f until ctx ends, with a pause after each failure.
func (r *runner) forever(ctx context.Context, what string, f func(ctx context.Context) error) {
	for ctx.Err() == nil {
		if err := f(ctx); err != nil && ctx.Err() == nil {
			r.log.Warn("will be tried again", "what", what, "error", err)
			sleep(ctx, 1000)
		}
	}
}

func sleep(ctx context.Context, milliseconds int) {
	select {
	case <-time.After(time.Duration(milliseconds) * time.Millisecond):
	case <-ctx.Done():
	}
}

func (r *runner) current() Settings {
	if settings, ok := r.settings.Get(settingsKey); ok {
		return settings
	}
	return Settings{Every: 1000, Takes: 100}
}

// lead queues jobs whenever this replica leads.
func (r *runner) lead(ctx context.Context) error {
	defer r.metrics.Wait(leaderName)()
	return etcdutil.Lead(ctx, r.client, leaderName, r.schedule,
		etcdutil.WithValue(r.name), etcdutil.WithTTL(r.ttl), r.logger, r.metrics.Observer())
}

// schedule is a term of the leader. What it writes is refused when it no longer leads.
func (r *runner) schedule(ctx context.Context) error {
	lock, _ := etcdutil.LockFrom(ctx)
	audit, err := etcdutil.NewLogWriter[Audited](ctx, lock, auditName)
	if err != nil {
		return err
	}
	defer audit.Close()
	if _, err := audit.Write(ctx, Audited{r.name, "leads"}); err != nil {
		return err
	}
	for n := 1; ; n++ {
		if sleep(ctx, r.current().Every); ctx.Err() != nil {
			return context.Cause(ctx)
		}
		id := fmt.Sprintf("%d-%d", lock.Token(), n)
		if _, err := lock.Commit(ctx, clientv3.OpPut(queued+id, "")); err != nil {
			return err
		}
		if _, err := audit.Write(ctx, Audited{r.name, "queued " + id}); err != nil {
			return err
		}
	}
}

// work runs the workers for as long as their lease lasts.
func (r *runner) work(ctx context.Context) error {
	lease, err := etcdutil.NewLease(ctx, r.client, r.ttl, r.logger, r.metrics.Observer())
	if err != nil {
		return err
	}
	r.lease.Store(lease)
	var all sync.WaitGroup
	defer all.Wait()
	defer lease.Close() // gives all jobs back by one request
	for range r.workers {
		all.Go(func() { // until the lease ends, or ctx
			r.forever(lease, "take jobs", func(ctx context.Context) error { return r.takeJobs(ctx, lease) })
		})
	}
	<-lease.Done()
	return context.Cause(lease)
}

// takeJobs tries the oldest jobs, in random order.
func (r *runner) takeJobs(ctx context.Context, lease *etcdutil.Lease) error {
	jobs, err := etcdutil.Retry(ctx, func(ctx context.Context) (*clientv3.GetResponse, error) {
		return r.client.Get(ctx, queued, clientv3.WithPrefix(), clientv3.WithKeysOnly(), clientv3.WithLimit(64))
	})
	if err != nil {
		return err
	}
	for _, i := range rand.Perm(len(jobs.Kvs)) {
		if err := r.takeJob(ctx, lease, strings.TrimPrefix(string(jobs.Kvs[i].Key), queued)); err != nil {
			return err
		}
	}
	sleep(ctx, 50)
	return nil
}

// takeJob does a job that nobody else does. It is done when etcd has applied that, exactly once.
func (r *runner) takeJob(ctx context.Context, lease *etcdutil.Lease, id string) error {
	lock, err := etcdutil.TryAcquire(ctx, r.client, working+id, etcdutil.WithLease(lease), r.metrics.Observer())
	if errors.Is(err, etcdutil.ErrLockHeld) {
		return nil
	}
	if err != nil {
		return err
	}
	defer lock.Close()
	still := []clientv3.Cmp{clientv3.Compare(clientv3.CreateRevision(queued+id), ">", 0)}
	_, err = lock.CommitIf(ctx, still) // or somebody has done it since it was listed
	if err == nil {
		sleep(lock, r.current().Takes) // the job
		_, err = lock.CommitIf(ctx, still, clientv3.OpDelete(queued+id), clientv3.OpPut(done+id, r.name))
	}
	if errors.Is(err, etcdutil.ErrConditionFailed) {
		return nil
	}
	return err
}

// audit reads the audit log from where this replica stopped reading it.
func (r *runner) audit(ctx context.Context) error {
	reader, err := etcdutil.NewLogReader[Audited](ctx, r.client, auditName, etcdutil.WithEntriesAfter(r.version, r.revision),
		r.logger, r.metrics.Observer())
	if err != nil {
		return r.skipGap(ctx, err)
	}
	defer reader.Close()
	for entry, err := range reader.All() {
		if err != nil {
			return r.skipGap(ctx, err)
		}
		r.log.Info("audit", "version", entry.Version, "who", entry.Value.Who, "what", entry.Value.What)
		r.moveTo(entry.Version, entry.Revision)
	}
	return nil
}

// skipGap goes on after entries that were compacted before they were read.
func (r *runner) skipGap(ctx context.Context, err error) error {
	if errors.Is(err, etcdutil.ErrGap) {
		if resp, _ := r.client.Get(ctx, auditName, clientv3.WithKeysOnly()); resp != nil && len(resp.Kvs) > 0 {
			r.moveTo(resp.Kvs[0].Version, resp.Header.Revision)
		}
	}
	return err
}

func (r *runner) moveTo(version int64, revision etcdutil.Revision) {
	r.version, r.revision = version, revision
	_ = os.WriteFile(r.position, fmt.Appendln(nil, version, revision), 0o600) // fails without a name
}
