package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"example.com/etcdutil"
	"example.com/etcdutil/etcdtest"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// Setting is what a key under the prefix has, in JSON.
type Setting struct {
	On    bool `json:"on"`
	Limit int  `json:"limit"`
}

// play is an operator and a follower.
type play struct {
	prefix   string // that no other run uses
	stdout   io.Writer
	start    time.Time
	operator *clientv3.Client
	settings *etcdutil.Mirror[Setting] // the follower's
}

func newPlay(operator *clientv3.Client, stdout io.Writer) *play {
	return &play{prefix: fmt.Sprintf("config-%08x/", rand.Uint32()), stdout: stdout, start: time.Now(), operator: operator}
}

// run plays it. The follower is behind the link. The etcd is compacted if ours.
func (p *play) run(ctx context.Context, link *etcdtest.Link, client *clientv3.Client, ours bool) error {
	defer p.remove()
	_, err := p.write(ctx, "search", `{"on":true,"limit":10}`, "upload", `{"on":true,"limit":5}`, "mail", `{}`)
	if err != nil {
		return err
	}
	resyncs := make(chan error, 10)
	p.settings, err = etcdutil.NewMirror[Setting](ctx, client, p.prefix, etcdutil.WithPrefix(),
		etcdutil.WithObserver(etcdutil.Observer{Resynced: func(e etcdutil.WatchEvent) { resyncs <- e.Err }}))
	if err != nil {
		return err
	}
	defer p.settings.Close()

	rev, err := p.write(ctx, "search", `{"on":true,"limit":20}`, "mail", "")
	if err := p.check(ctx, rev, err, map[string]Setting{"search": {true, 20}, "upload": {true, 5}}); err != nil {
		return err
	}
	rev, err = p.write(ctx, "search", `{"on":true,"limit":"many"}`, "export", `{"on":true,"limit":1}`)
	if err := p.check(ctx, rev, err, map[string]Setting{"search": {true, 20}, "upload": {true, 5}, "export": {true, 1}}, "search"); err != nil {
		return err
	}
	p.say("", "the follower is cut off from etcd")
	link.Cut()
	if _, err := p.write(ctx, "upload", ""); err != nil {
		return err
	}
	rev, err = p.write(ctx, "export", `{"on":false,"limit":7}`, "import", `{"on":true,"limit":3}`)
	if err == nil && ours {
		p.say("operator", "compacts etcd")
		_, err = p.operator.Compact(ctx, rev)
	}
	if _, ok := p.settings.Get(p.prefix + "upload"); !ok {
		return errors.New("the copy cannot be read during the outage")
	}
	p.say("", "the follower has its network back; its copy is of %v ago", time.Since(p.settings.AsOf()).Round(time.Millisecond))
	link.Reset() // what was still on its way is lost too
	link.Heal()
	if err := p.check(ctx, rev, err, map[string]Setting{"search": {true, 20}, "export": {false, 7}, "import": {true, 3}}, "search"); err != nil {
		return err
	}
	if ours {
		select {
		case err := <-resyncs:
			p.say("follower", "listed again: %v", err)
		case <-ctx.Done():
			return errors.New("the follower did not list again")
		}
	}
	rev, err = p.write(ctx, "search", `{"on":true,"limit":30}`)
	return p.check(ctx, rev, err, map[string]Setting{"search": {true, 30}, "export": {false, 7}, "import": {true, 3}})
}

// write writes keys and values in turn, in one transaction. The value "" deletes a key.
func (p *play) write(ctx context.Context, keysAndValues ...string) (etcdutil.Revision, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	var ops []clientv3.Op
	for change := range slices.Chunk(keysAndValues, 2) {
		p.say("operator", "sets %s to %q", change[0], change[1])
		op := clientv3.OpPut(p.prefix+change[0], change[1])
		if change[1] == "" {
			op = clientv3.OpDelete(p.prefix + change[0])
		}
		ops = append(ops, op)
	}
	resp, err := p.operator.Txn(ctx).Then(ops...).Commit()
	if err != nil {
		return 0, err
	}
	return resp.Header.Revision, nil
}

// check checks that the follower has, at a revision that was written unless err, what it should.
func (p *play) check(ctx context.Context, rev etcdutil.Revision, err error, want map[string]Setting, bad ...string) error {
	if err != nil {
		return err
	}
	if err := p.settings.Wait(ctx, rev); err != nil {
		return err
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
		return fmt.Errorf("the follower has %+v, and %v are bad; it should have %+v and %v", has, invalid, want, bad)
	}
	return nil
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
