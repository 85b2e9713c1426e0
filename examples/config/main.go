// Config follows the JSON settings under a prefix in etcd, as a service follows its configuration, and checks that it ends
// up with what etcd has, whatever happened on the way.
//
// A follower keeps a map of the settings, from a watch with a snapshot, and is behind a network that fails. An operator
// changes, breaks and deletes settings; some of it while the follower is cut off, and then compacts etcd, so that nobody
// can tell the follower any more what happened: it has to list again. In the end the map must be what etcd has.
//
// What to do about a value that does not decode is for the program to decide: this one keeps the last good value, if it has
// seen one, and remembers that etcd has a bad one.
//
// It exits with 0 if all of that held, else it says what did not and exits with 1.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"os/signal"
	"strings"
	"sync"
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
	compact := endpoint == ""
	if compact {
		cluster, err := etcdtest.New(1)
		if err != nil {
			return err
		}
		defer cluster.Close()
		endpoint = cluster.Endpoints()[0]
	}
	o, err := newOperator(ctx, endpoint, stdout)
	if err != nil {
		return err
	}
	defer o.close()
	f, err := follow(ctx, endpoint, o.timeline)
	if err != nil {
		return err
	}
	err = play(ctx, o, f, compact)
	if err = errors.Join(err, f.close()); err != nil {
		return err
	}
	return verdict(ctx, o, f, compact)
}

// parse returns the endpoint to use, or "" for an etcd of our own.
func parse(args []string, stdout io.Writer) (endpoint string, err error) {
	flags := flag.NewFlagSet("config", flag.ContinueOnError)
	flags.SetOutput(stdout)
	flags.Usage = func() {
		fmt.Fprint(stdout, `usage: config [-endpoints host:port,...]

A follower keeps a map of the JSON settings under a prefix in etcd. An operator
changes, breaks and deletes settings, some while the follower is cut off, and
compacts etcd meanwhile. The timeline shows, in seconds since the start, what the
operator does and what the follower learns. A value that does not decode leaves
the last good one in force.
Exits with 0 if the map is what etcd has in the end, and a bad value and a resync
were seen; with 1 if not. Takes a second or two.

`)
		flags.PrintDefaults()
	}
	list := flags.String("endpoints", "", "use the etcd at `host:port,...`, which needs neither TLS nor a user, instead of\n"+
		"one in this process. Of several endpoints the first is used. What is written is\nremoved in the end. "+
		"It is not compacted, since that takes the history of all that\nis in it: the follower need not resync, then")
	if err := flags.Parse(args); err != nil {
		return "", err
	}
	if flags.NArg() > 0 {
		return "", fmt.Errorf("unexpected argument %q", flags.Arg(0))
	}
	endpoint, _, _ = strings.Cut(*list, ",")
	return endpoint, nil
}

// play has the operator do his worst.
func play(ctx context.Context, o *operator, f *follower, compact bool) error {
	if err := f.await(ctx, o.last); err != nil {
		return err
	}
	changeAndAwait := func(changes ...change) error {
		if err := o.change(ctx, changes...); err != nil {
			return err
		}
		return f.await(ctx, o.last)
	}
	err := changeAndAwait(
		change{"search", `{"on":true,"limit":20}`},
		change{"export", `{"on":true,"limit":1}`},
		change{"mail", ""},
		change{"search", `{"on":true,"limit":"many"}`},
		change{"upload", `{"on":true,`},
	)
	if err != nil {
		return err
	}
	if err := outage(ctx, o, f, compact); err != nil {
		return err
	}
	o.say("", "the follower's connections are reset")
	f.link.Reset()
	return changeAndAwait(
		change{"import", `{"on":true,"limit":3}`},
		change{"export", ""},
	)
}

// outage has the follower miss changes. If etcd is compacted meanwhile, it has no word of them any more.
func outage(ctx context.Context, o *operator, f *follower, compact bool) error {
	o.say("", "the follower is cut off from etcd")
	f.link.Cut()
	err := o.change(ctx,
		change{"upload", `{"on":true,"limit":7}`},
		change{"login", ""},
		change{"mail", `{"on":true,"limit":50}`},
		change{"import", `{"on":false,"limit":0}`},
	)
	if err != nil {
		return err
	}
	if compact {
		o.say("operator", "compacts etcd up to revision %d", o.last)
		if _, err := o.etcd.Compact(ctx, o.last); err != nil {
			return err
		}
	}
	o.say("", "the follower has its network back")
	f.link.Reset() // what still was on its way is lost too
	f.link.Heal()
	return f.await(ctx, o.last)
}

// verdict returns what did not hold. The follower has been closed.
func verdict(ctx context.Context, o *operator, f *follower, compact bool) error {
	settings, bad, err := o.want(ctx)
	if err != nil {
		return err
	}
	var failures []error
	check := func(held bool, format string, args ...any) {
		if !held {
			failures = append(failures, fmt.Errorf(format, args...))
		}
	}
	check(maps.Equal(f.settings, settings), "the follower has %+v, which should be %+v", f.settings, settings)
	check(maps.Equal(f.bad, bad), "the follower knows of bad values at %v, etcd has them at %v", f.bad, bad)
	check(f.invalid > 0, "no bad value was seen")
	check(f.syncs > 1 || !compact, "no resync was seen")
	if len(failures) > 0 {
		return errors.Join(failures...)
	}
	o.say("", "%d settings as in etcd, where %d is bad: its last good value is kept;", len(settings), len(bad))
	if !compact {
		o.say("", "no resync was due, since this etcd is not ours to compact;")
	}
	o.say("", "bad values seen: %d, resyncs: %d: all held", f.invalid, f.syncs-1)
	return nil
}

func newClient(endpoint string) (*clientv3.Client, error) {
	return clientv3.New(clientv3.Config{
		Endpoints:   []string{endpoint},
		DialTimeout: 5 * time.Second,
		Logger:      zap.NewNop(),
	})
}

// timeline is the record of who did what to the keys under a prefix.
type timeline struct {
	prefix string
	start  time.Time

	printing sync.Mutex
	stdout   io.Writer
}

func (t *timeline) say(who, format string, args ...any) {
	t.printing.Lock()
	defer t.printing.Unlock()
	fmt.Fprintf(t.stdout, "%7.3f  %-8s  %s\n", time.Since(t.start).Seconds(), who, fmt.Sprintf(format, args...))
}
