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
	"maps"
	"math/rand/v2"
	"os"
	"os/signal"
	"slices"
	"strings"
	"time"

	"example.com/etcdutil"
	"example.com/etcdutil/etcdtest"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
)

const patience = time.Minute // for all of it; a second or two are usual
const usage = `usage: config [-endpoints host:port,...]

A follower keeps a copy of the JSON settings under a prefix in etcd. An operator
changes, breaks and deletes settings, some while the follower is cut off, and
compacts etcd meanwhile. The timeline shows, in seconds since the start, what the
operator does and what the follower has then.
Exits with 0 if that is always what etcd has, with 1 if not.

`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdout); err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintf(os.Stderr, "config: %v\n", err)
		os.Exit(1)
	}
}

// run plays it once, and returns nil if everything held.
func run(ctx context.Context, args []string, stdout io.Writer) error {
	flags := flag.NewFlagSet("config", flag.ContinueOnError)
	flags.SetOutput(stdout)
	flags.Usage = func() { fmt.Fprint(stdout, usage); flags.PrintDefaults() }
	endpoints := flags.String("endpoints", "", "use the etcd at the first `host:port`, which needs neither TLS nor a user, instead of one\n"+
		"in this process. It is not compacted, and what is written is removed in the end")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q", flags.Arg(0))
	}
	ctx, cancel := context.WithTimeoutCause(ctx, patience, fmt.Errorf("not over after %v", patience))
	defer cancel()
	endpoint, _, _ := strings.Cut(*endpoints, ",")
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
	var clients [2]*clientv3.Client // the operator's and the follower's
	for i, to := range []string{endpoint, link.Endpoint()} {
		client, err := clientv3.New(clientv3.Config{Endpoints: []string{to}, DialTimeout: 5 * time.Second, Logger: zap.NewNop()})
		if err != nil {
			return err
		}
		defer client.Close()
		clients[i] = client
	}
	p := &play{prefix: fmt.Sprintf("config-%08x/", rand.Uint32()), stdout: stdout, start: time.Now(), operator: clients[0]}
	if err := p.run(ctx, link, clients[1], ours); err != nil {
		return fmt.Errorf("etcd at %s: %w", endpoint, err)
	}
	fmt.Fprintln(stdout, "all held: the copy was what etcd has")
	return nil
}

// Setting is what a key under the prefix has, in JSON.
type Setting struct {
	On    bool `json:"on"`
	Limit int  `json:"limit"`
}

// play is an operator and a follower. After the first error it does nothing more.
type play struct {
	prefix   string // that no other run uses
	stdout   io.Writer
	start    time.Time
	operator *clientv3.Client
	settings *etcdutil.Mirror[Setting] // the follower's
	written  etcdutil.Revision         // the last
	err      error                     // the first
}

// run plays it. The follower is behind the link. The etcd is compacted if ours.
func (p *play) run(ctx context.Context, link *etcdtest.Link, client *clientv3.Client, ours bool) error {
	defer p.remove()
	p.write(ctx, "search", `{"on":true,"limit":10}`, "upload", `{"on":true,"limit":5}`, "mail", `{}`)
	if p.err != nil {
		return p.err
	}
	resyncs := make(chan error, 10)
	p.settings, p.err = etcdutil.NewMirror[Setting](ctx, client, p.prefix, etcdutil.WithPrefix(),
		etcdutil.WithObserver(etcdutil.Observer{Resynced: func(e etcdutil.WatchEvent) { resyncs <- e.Err }}))
	if p.err != nil {
		return p.err
	}
	defer p.settings.Close()

	p.write(ctx, "search", `{"on":true,"limit":20}`, "mail", "")
	p.check(ctx, map[string]Setting{"search": {true, 20}, "upload": {true, 5}})
	p.write(ctx, "search", `{"on":true,"limit":"many"}`, "export", `{"on":true,"limit":1}`)
	p.check(ctx, map[string]Setting{"search": {true, 20}, "upload": {true, 5}, "export": {true, 1}}, "search")

	p.say("", "the follower is cut off from etcd")
	link.Cut()
	p.write(ctx, "upload", "")
	p.write(ctx, "export", `{"on":false,"limit":7}`, "import", `{"on":true,"limit":3}`)
	if ours && p.err == nil {
		p.say("operator", "compacts etcd")
		_, p.err = p.operator.Compact(ctx, p.written)
	}
	if _, ok := p.settings.Get(p.prefix + "upload"); !ok && p.err == nil {
		p.err = errors.New("the copy cannot be read during the outage")
	}
	p.say("", "the follower has its network back; its copy is of %v ago", time.Since(p.settings.AsOf()).Round(time.Millisecond))
	link.Reset() // what was still on its way is lost too
	link.Heal()
	p.check(ctx, map[string]Setting{"search": {true, 20}, "export": {false, 7}, "import": {true, 3}}, "search")
	if ours && p.err == nil {
		select {
		case err := <-resyncs:
			p.say("follower", "listed again: %v", err)
		case <-ctx.Done():
			return errors.New("the follower did not list again")
		}
	}
	p.write(ctx, "search", `{"on":true,"limit":30}`)
	p.check(ctx, map[string]Setting{"search": {true, 30}, "export": {false, 7}, "import": {true, 3}})
	return p.err
}

// write writes keys and values in turn, in one transaction. The value "" deletes a key.
func (p *play) write(ctx context.Context, keysAndValues ...string) {
	if p.err != nil {
		return
	}
	var ops []clientv3.Op
	for change := range slices.Chunk(keysAndValues, 2) {
		p.say("operator", "sets %s to %q", change[0], change[1])
		op := clientv3.OpPut(p.prefix+change[0], change[1])
		if change[1] == "" {
			op = clientv3.OpDelete(p.prefix + change[0])
		}
		ops = append(ops, op)
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	resp, err := p.operator.Txn(ctx).Then(ops...).Commit()
	if p.err = err; err == nil {
		p.written = resp.Header.Revision
	}
}

// check checks that the follower has what was written, and which values are bad.
func (p *play) check(ctx context.Context, want map[string]Setting, bad ...string) {
	if p.err == nil {
		p.err = p.settings.Wait(ctx, p.written)
	}
	if p.err != nil {
		return
	}
	has := map[string]Setting{}
	for key, s := range p.settings.All() {
		has[strings.TrimPrefix(key, p.prefix)] = s
	}
	p.say("follower", "has %+v", has)
	var invalid []string
	for key, err := range p.settings.Invalid() {
		invalid = append(invalid, strings.TrimPrefix(key, p.prefix))
		p.say("follower", "keeps the last good value of %s: %v", invalid[len(invalid)-1], err)
	}
	if !maps.Equal(has, want) || !slices.Equal(invalid, bad) {
		p.err = fmt.Errorf("the follower has %+v, and %v are bad; it should have %+v and %v", has, invalid, want, bad)
	}
}

// remove removes what was written.
func (p *play) remove() {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if _, err := p.operator.Delete(ctx, p.prefix, clientv3.WithPrefix()); err != nil {
		p.say("operator", "did not remove %s: %v", p.prefix, err)
	}
}

func (p *play) say(who, format string, args ...any) {
	fmt.Fprintf(p.stdout, "%7.3f  %-8s  %s\n", time.Since(p.start).Seconds(), who, fmt.Sprintf(format, args...))
}
