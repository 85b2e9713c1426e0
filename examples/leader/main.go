// Leader plays what happens to a leader that is cut off from etcd, that resigns, and that is
// paused, and checks etcdutil's promises.
//
// Three candidates campaign. A leader increments a counter in etcd. A fourth program observes who
// leads. Then this must hold:
//   - At no time do two lead: the context of one has ended before the next one leads.
//   - What a paused leader tries to write after its pause is refused, so that the counter is right.
//   - The observer sees each leader, in order.
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
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"example.com/etcdutil"
	"example.com/etcdutil/etcdtest"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
)

const (
	ttl      = 2 * time.Second        // TTL of a leader's lease: the least that etcd grants
	effort   = 100 * time.Millisecond // time that a step of work takes
	steps    = 5                      // steps of work in a term
	patience = time.Minute            // bound of the whole run, which usually takes 10 s
)

// What happens in each term. After the last one all is over.
const (
	cutOff = iota + 1
	resigns
	paused
	last
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	err := run(ctx, os.Args[1:], os.Stdout)
	if errors.Is(err, flag.ErrHelp) {
		return
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "leader: %v\n", err)
		stop()
		os.Exit(1)
	}
}

// run plays it once. It returns nil if everything held.
func run(ctx context.Context, args []string, stdout io.Writer) error {
	endpoint, err := parse(args, stdout)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, patience, fmt.Errorf("not finished after %v", patience))
	defer cancel()
	if endpoint == "" {
		cluster, err := etcdtest.New(1)
		if err != nil {
			return err
		}
		defer cluster.Close()
		endpoint = cluster.Endpoints()[0]
	}
	s, err := newStage(ctx, endpoint, stdout)
	if err != nil {
		return err
	}
	defer s.close()
	if err := s.play(ctx, endpoint); err != nil {
		return err
	}
	return s.verdict(ctx)
}

// parse returns the endpoint to use, or "" for an etcd in this process.
func parse(args []string, stdout io.Writer) (endpoint string, err error) {
	flags := flag.NewFlagSet("leader", flag.ContinueOnError)
	flags.SetOutput(stdout)
	flags.Usage = func() {
		fmt.Fprint(stdout, `usage: leader [-endpoints host:port,...]

Three candidates campaign in etcd. One leader is cut off, one resigns, one is
paused. A fourth program observes who leads. The timeline shows, in seconds since
the start, that at no time two lead. Exits with 0 if that holds, with 1 if not.
Takes about 10 seconds.

`)
		flags.PrintDefaults()
	}
	list := flags.String("endpoints", "", "use the etcd at `host:port,...` without TLS or a user, instead of one in this\n"+
		"process. Of several endpoints the first is used. The program removes in the end\nwhat it has written")
	if err := flags.Parse(args); err != nil {
		return "", err
	}
	if flags.NArg() > 0 {
		return "", fmt.Errorf("unexpected argument %q", flags.Arg(0))
	}
	endpoint, _, _ = strings.Cut(*list, ",")
	return endpoint, nil
}

// stage holds what the candidates share, and the record of what they did.
type stage struct {
	office  string // the name that they campaign for
	counter string // the key that leaders increment
	etcd    *clientv3.Client
	start   time.Time

	printing sync.Mutex
	stdout   io.Writer

	mu        sync.Mutex
	terms     []*term
	changed   chan struct{}       // closed when the next term begins
	observed  []etcdutil.Revision // tokens that the observer saw
	committed int                 // increments whose Commit succeeded
	lateWrite error               // what the paused leader got from Commit
}

// term is one leader's. It ends when its context does, or when the leader returns.
type term struct {
	number   int
	token    etcdutil.Revision
	from, to time.Time
}

func newStage(ctx context.Context, endpoint string, stdout io.Writer) (*stage, error) {
	etcd, err := newClient(endpoint)
	if err != nil {
		return nil, err
	}
	name := fmt.Sprintf("leader-%08x", rand.Uint32())
	s := &stage{
		office: name + "/office", counter: name + "/counter",
		etcd: etcd, start: time.Now(), stdout: stdout, changed: make(chan struct{}),
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if _, err := etcd.Put(ctx, s.counter, "0"); err != nil {
		_ = etcd.Close()
		return nil, fmt.Errorf("etcd at %s: %w", endpoint, err)
	}
	return s, nil
}

// close removes what was written.
func (s *stage) close() {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if _, err := s.etcd.Delete(ctx, s.counter); err != nil {
		s.say("", "%s is not removed: %v", s.counter, err)
	}
	_ = s.etcd.Close()
}

func newClient(endpoint string) (*clientv3.Client, error) {
	return clientv3.New(clientv3.Config{Endpoints: []string{endpoint}, DialTimeout: 5 * time.Second, Logger: zap.NewNop()})
}

// play has the candidates campaign, and the observer observe, until the last term is over.
func (s *stage) play(ctx context.Context, endpoint string) error {
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	holders, err := etcdutil.WatchHolder(ctx, s.etcd, s.office)
	if err != nil {
		return err
	}
	var all sync.WaitGroup
	defer all.Wait()
	all.Go(func() { s.observe(holders) }) // until the watcher is closed
	defer holders.Close()
	errOver := errors.New("over")
	var campaigns sync.WaitGroup
	for _, name := range []string{"anna", "bert", "cleo"} {
		c, err := newCandidate(s, name, endpoint)
		if err != nil {
			stop(err)
			break
		}
		campaigns.Go(func() { // until it is over, or somebody fails
			defer c.close()
			for ctx.Err() == nil {
				err := etcdutil.Lead(ctx, c.client, s.office, c.lead, etcdutil.WithTTL(ttl), etcdutil.WithValue(c.name))
				switch {
				case s.isOver():
					stop(errOver)
				case err != nil && ctx.Err() == nil:
					stop(fmt.Errorf("%s: %w", c.name, err))
				}
			}
		})
	}
	campaigns.Wait()
	if cause := context.Cause(ctx); cause != errOver {
		return cause
	}
	return nil
}

// observe records who leads, as somebody sees it who does not campaign.
func (s *stage) observe(holders *etcdutil.Watcher[etcdutil.Contender]) {
	for e := range holders.Events() {
		switch e.Type {
		case etcdutil.EventPut:
			s.say("observer", "sees that %s leads, token %d", e.Value.Value, e.Value.Token)
			s.mu.Lock()
			s.observed = append(s.observed, e.Value.Token)
			s.mu.Unlock()
		case etcdutil.EventDelete:
			s.say("observer", "sees that nobody leads")
		}
	}
}

// candidate campaigns over its own link to etcd.
type candidate struct {
	*stage
	name   string
	link   *etcdtest.Link
	client *clientv3.Client
}

func newCandidate(s *stage, name, endpoint string) (*candidate, error) {
	link, err := etcdtest.NewLink(endpoint)
	if err != nil {
		return nil, err
	}
	client, err := newClient(link.Endpoint())
	if err != nil {
		_ = link.Close()
		return nil, err
	}
	return &candidate{stage: s, name: name, link: link, client: client}, nil
}

func (c *candidate) close() {
	_ = c.client.Close()
	_ = c.link.Close()
}

// lead is a term. ctx ends when the candidate no longer surely leads.
func (c *candidate) lead(ctx context.Context) error {
	if c.isOver() {
		return nil
	}
	lock, _ := etcdutil.LockFrom(ctx)
	t, next := c.begin(lock.Token())
	c.say(c.name, "leads, token %d", t.token)
	stop := context.AfterFunc(ctx, func() {
		c.end(t)
		c.say(c.name, "must stop: %v", context.Cause(ctx))
	})
	defer stop()
	defer c.end(t)
	for range steps {
		if err := c.work(ctx, lock); err != nil {
			return err
		}
	}
	switch t.number {
	case cutOff:
		c.link.Cut()
		c.say(c.name, "is cut off from etcd, and works on")
		go c.healAfter(next) // until the next term begins, or the run's bound
		return c.work(ctx, lock)
	case resigns:
		c.say(c.name, "resigns")
	case paused:
		return c.pause(lock, next)
	}
	return nil
}

// work increments the counter, if this candidate still leads when etcd applies that.
func (c *candidate) work(ctx context.Context, lock *etcdutil.Lock) error {
	count, err := c.count(ctx, c.client)
	if err != nil {
		return err
	}
	time.Sleep(effort)
	if _, err := lock.Commit(ctx, clientv3.OpPut(c.counter, strconv.Itoa(count+1))); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.committed++
	return nil
}

// pause is what a suspended machine or a long stop of a debugger looks like: nothing is sent, and
// nobody looks at the context. Afterwards the leader goes on as if no time had passed.
func (c *candidate) pause(lock *etcdutil.Lock, next <-chan struct{}) error {
	c.say(c.name, "is paused, and looks at nothing")
	c.link.Cut()
	c.healAfter(next)
	c.say(c.name, "goes on, and writes as if it still led")
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	_, err := lock.Commit(ctx, clientv3.OpPut(c.counter, "wrong"))
	c.say(c.name, "gets from Commit: %v", err)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.lateWrite = err
	return err
}

// healAfter restores the candidate's link when the next term has begun.
func (c *candidate) healAfter(next <-chan struct{}) {
	select {
	case <-next:
	case <-time.After(patience):
	}
	c.link.Heal()
}

// begin records a new term. next is closed when the term after it begins.
func (s *stage) begin(token etcdutil.Revision) (t *term, next <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	t = &term{number: len(s.terms) + 1, token: token, from: time.Now()}
	s.terms = append(s.terms, t)
	close(s.changed)
	s.changed = make(chan struct{})
	return t, s.changed
}

// end records when a term ended. The first time counts.
func (s *stage) end(t *term) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if t.to.IsZero() {
		t.to = time.Now()
	}
}

func (s *stage) isOver() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.terms) >= last && !s.terms[last-1].to.IsZero()
}

func (s *stage) count(ctx context.Context, etcd *clientv3.Client) (int, error) {
	resp, err := etcd.Get(ctx, s.counter)
	if err != nil {
		return 0, err
	}
	if len(resp.Kvs) == 0 {
		return 0, fmt.Errorf("%s is gone", s.counter)
	}
	return strconv.Atoi(string(resp.Kvs[0].Value))
}

// verdict returns what did not hold.
func (s *stage) verdict(ctx context.Context) error {
	count, err := s.count(ctx, s.etcd)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	var failures []error
	check := func(held bool, format string, args ...any) {
		if !held {
			failures = append(failures, fmt.Errorf(format, args...))
		}
	}
	var tokens []etcdutil.Revision
	for i, t := range s.terms {
		tokens = append(tokens, t.token)
		if i > 0 {
			check(!t.from.Before(s.terms[i-1].to), "two led for %v: term %d began too soon", s.terms[i-1].to.Sub(t.from), t.number)
			check(t.token > tokens[i-1], "token %d after %d", t.token, tokens[i-1])
		}
	}
	check(len(s.terms) >= last, "%d terms instead of %d", len(s.terms), last)
	check(errors.Is(s.lateWrite, etcdutil.ErrLockLost), "the paused leader's write was not refused: %v", s.lateWrite)
	check(count == s.committed, "the counter is %d after %d increments", count, s.committed)
	seen := s.observed[:min(len(s.observed), len(tokens))] // somebody may have been elected since
	check(slices.Equal(seen, tokens), "the observer saw %v of the leaders %v", seen, tokens)
	if len(failures) == 0 {
		s.say("", "%d terms, at no time did two lead, counter %d: all held", len(s.terms), count)
	}
	return errors.Join(failures...)
}

// say prints a line of the timeline.
func (s *stage) say(who, format string, args ...any) {
	s.printing.Lock()
	defer s.printing.Unlock()
	fmt.Fprintf(s.stdout, "%6.2f  %-8s  %s\n", time.Since(s.start).Seconds(), who, fmt.Sprintf(format, args...))
}
