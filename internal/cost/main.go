// Cost measures what watches, held locks and waiters cost, beside the same by clientv3 and its
// package concurrency.
//
//	go run ./internal/cost [-only PATTERN]
//
// etcd runs in a process of its own, so that the costs of client and server are measured apart.
// Each figure is measured with a new server, and both contestants of a ratio use the same one in
// turn. Memory is heap and stacks after a garbage collection; CPU is the time of a process, user
// and system, in milliseconds a second. The figures are in docs/performance.md.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"regexp"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
)

// A figure is something to measure.
type figure struct {
	name    string
	measure func(ctx context.Context, r *run) error
}

var figures = []figure{
	{"idle-watchers", idleWatchers},
	{"busy-watchers", busyWatchers},
	{"open-watchers", openWatchers},
	{"open-watchers-with-password", openWithPassword},
	{"reset", resetWatchers},
	{"held-locks", heldLocks},
	{"many-locks", manyLocks},
	{"waiters", idleWaiters},
	{"hand-over", handOver},
	{"deleted-key", deletedKey},
	{"json-events", jsonEvents},
	{"catch-up", catchUp},
}

func main() {
	if os.Getenv(serverEnv) != "" {
		exit(serve())
	}
	only := flag.String("only", "", "measure the figures whose names match this regular expression")
	flag.Parse()
	pattern, err := regexp.Compile(*only)
	if err != nil {
		exit(fmt.Errorf("-only: %w", err))
	}
	for _, f := range figures {
		if pattern.MatchString(f.name) {
			if err := measure(f); err != nil {
				exit(fmt.Errorf("%s: %w", f.name, err))
			}
		}
	}
}

func exit(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "cost:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// A run is the measurement of one figure.
type run struct {
	figure string
	server *server
}

func measure(f figure) error {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	server, err := startServer()
	if err != nil {
		return err
	}
	defer server.stop()
	return f.measure(ctx, &run{figure: f.name, server: server})
}

func (r *run) printf(format string, args ...any) {
	fmt.Printf("%-28s %s\n", r.figure, fmt.Sprintf(format, args...))
}

// client returns a new client, which the caller closes.
func (r *run) client(opts ...func(*clientv3.Config)) (*clientv3.Client, error) {
	config := clientv3.Config{Endpoints: []string{r.server.endpoint}, Logger: zap.NewNop()}
	for _, opt := range opts {
		opt(&config)
	}
	return clientv3.New(config)
}
