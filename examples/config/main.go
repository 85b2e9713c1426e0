// Config follows the JSON settings under a prefix in etcd by a Mirror, as a service follows its
// configuration, and checks that the copy is what etcd has, whatever happened on the way.
//
// An operator changes, breaks and deletes settings. Some of it happens while the follower is cut
// off from etcd. Then the operator compacts etcd, so that etcd no longer has what the follower
// missed, and it has to list the settings again. A value that does not decode leaves the last good
// one in force.
//
// It exits with 0 if all of that held. Otherwise it says what did not, and exits with 1.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"time"

	"example.com/etcdutil/etcdtest"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
)

const patience = time.Minute // for all of it; a second or two are usual

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	err := run(ctx, os.Args[1:], os.Stdout)
	if errors.Is(err, flag.ErrHelp) {
		return
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "config: %v\n", err)
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
	ours := endpoint == ""
	if ours {
		cluster, err := etcdtest.New(1)
		if err != nil {
			return err
		}
		defer cluster.Close()
		endpoint = cluster.Endpoints()[0]
	}
	link, err := etcdtest.NewLink(endpoint)
	if err != nil {
		return err
	}
	defer link.Close()
	operator, err := newClient(endpoint)
	if err != nil {
		return err
	}
	defer operator.Close()
	follower, err := newClient(link.Endpoint())
	if err != nil {
		return err
	}
	defer follower.Close()
	if err := newPlay(operator, stdout).run(ctx, link, follower, ours); err != nil {
		return fmt.Errorf("etcd at %s: %w", endpoint, err)
	}
	fmt.Fprintln(stdout, "all held: the copy was what etcd has")
	return nil
}

// parse returns the endpoint to use, or "" for an etcd in this process.
func parse(args []string, stdout io.Writer) (endpoint string, err error) {
	flags := flag.NewFlagSet("config", flag.ContinueOnError)
	flags.SetOutput(stdout)
	flags.Usage = func() {
		fmt.Fprint(stdout, `usage: config [-endpoints host:port,...]

A follower keeps a copy of the JSON settings under a prefix in etcd. An operator
changes, breaks and deletes settings, some while the follower is cut off, and
compacts etcd meanwhile. The timeline shows, in seconds since the start, what the
operator does and what the follower has then.
Exits with 0 if that is always what etcd has, with 1 if not. Takes a second or two.

`)
		flags.PrintDefaults()
	}
	list := flags.String("endpoints", "", "use the etcd at `host:port,...`, which needs neither TLS nor a user, instead of\n"+
		"one in this process. Of several endpoints the first is used. What is written is\nremoved in the end. "+
		"This etcd is not compacted: the follower need not list again")
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
