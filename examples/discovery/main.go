// Discovery shows how the servers of a service are found by etcd, and checks etcdutil's promises.
//
// Each server registers its address, and a caller follows the addresses by a Mirror and calls the
// servers in turn, over HTTP. Meanwhile servers drain, crash, are upgraded, lose their lease, and
// come back. Then this must hold:
//   - No call goes to a server whose address has been gone from etcd for longer than a second.
//   - No call fails, except to a server that has crashed and whose lease has not run out yet.
//   - Every server that has come back is called.
//
// It exits with 0 if all of that held. Otherwise it prints what did not hold and exits with 1.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/signal"
	"strings"
	"time"

	"example.com/etcdutil/etcdtest"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
)

const (
	ttl      = 2 * time.Second // of the servers' leases: the least that etcd grants
	grace    = time.Second     // for which a gone address may still be called
	patience = time.Minute     // bound of the whole run, which usually takes 5 seconds
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	err := run(ctx, os.Args[1:], os.Stdout)
	if errors.Is(err, flag.ErrHelp) {
		return
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "discovery: %v\n", err)
		stop()
		os.Exit(1)
	}
}

// run plays it once, and returns nil if everything held.
func run(ctx context.Context, args []string, stdout io.Writer) error {
	endpoint, err := parse(args, stdout)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, patience, fmt.Errorf("not over after %v", patience))
	defer cancel()
	if endpoint == "" {
		cluster, err := etcdtest.New(1)
		if err != nil {
			return err
		}
		defer cluster.Close()
		endpoint = cluster.Endpoints()[0]
	}
	client, err := newClient(endpoint)
	if err != nil {
		return err
	}
	defer client.Close()
	s := &stage{
		client: client,
		prefix: fmt.Sprintf("discovery-%08x/", rand.Uint32()), // which no other run uses
		start:  time.Now(),
		stdout: stdout,
	}
	if err := s.play(ctx, endpoint); err != nil {
		return fmt.Errorf("etcd at %s: %w", endpoint, err)
	}
	return nil
}

// parse returns the endpoint to use, or "" for an etcd in this process.
func parse(args []string, stdout io.Writer) (endpoint string, err error) {
	flags := flag.NewFlagSet("discovery", flag.ContinueOnError)
	flags.SetOutput(stdout)
	flags.Usage = func() {
		fmt.Fprint(stdout, `usage: discovery [-endpoints host:port,...]

Servers register their addresses in etcd, and a caller follows these and calls each
server over HTTP. Servers drain, crash, are upgraded, lose their lease, and come
back. The timeline shows this, in seconds since the start, and when the caller first
calls a server and when a call fails.
Exits with 0 if no call went to a server whose address was gone for longer than a
second, none failed but to a crashed one, and each was called; with 1 if not. Takes
5 seconds.

`)
		flags.PrintDefaults()
	}
	list := flags.String("endpoints", "", "use the etcd at `host:port,...`, which needs neither TLS nor a user, instead of\n"+
		"one in this process. Of several endpoints the first is used. What is written is\nremoved in the end")
	if err := flags.Parse(args); err != nil {
		return "", err
	}
	if flags.NArg() > 0 {
		return "", fmt.Errorf("unexpected argument %q", flags.Arg(0))
	}
	endpoint, _, _ = strings.Cut(*list, ",")
	return endpoint, nil
}

func newClient(endpoint string) (*clientv3.Client, error) {
	return clientv3.New(clientv3.Config{
		Endpoints:   []string{endpoint},
		DialTimeout: 5 * time.Second,
		Logger:      zap.NewNop(),
	})
}
