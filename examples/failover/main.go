// Failover shows what becomes of a lock whose holder is cut off from etcd, and checks that it is what etcdutil promises.
//
// Three workers contend for one lock, and whoever holds it counts up a counter in etcd. After a few turns the worker
// that holds the lock loses its network. Its context must end before another worker gets the lock; what it still tries
// to write when it is back must be refused; and the counter must be right in the end.
//
// It exits with 0 if all of that held, else it says what did not and exits with 1.
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
	ttl      = 2 * time.Second        // of the lock's lease: the least that etcd grants
	steps    = 3                      // of work in a turn
	effort   = 100 * time.Millisecond // of a step
	cutTurn  = 5                      // the turn whose holder is cut off
	patience = time.Minute            // for all of it; a few seconds are usual
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	err := run(ctx, os.Args[1:], os.Stdout)
	if errors.Is(err, flag.ErrHelp) {
		return
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "failover: %v\n", err)
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

// parse returns the endpoint to use, or "" for an etcd of our own.
func parse(args []string, stdout io.Writer) (endpoint string, err error) {
	flags := flag.NewFlagSet("failover", flag.ContinueOnError)
	flags.SetOutput(stdout)
	flags.Usage = func() {
		fmt.Fprint(stdout, `usage: failover [-endpoints host:port,...]

Three workers contend for a lock in etcd. The one that holds it is cut off from
etcd for a while. The timeline shows, in seconds since the start, that it is told
before another worker gets the lock, and that it can write nothing afterwards.
Exits with 0 if that is so, with 1 if not. Takes a few seconds.

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

// stage is what the workers share, and the record of what they did.
type stage struct {
	lockName string
	counter  string // the key that is counted up
	last     string // the key that says who did
	etcd     *clientv3.Client
	start    time.Time
	tookOver chan time.Time // from the holder after the one that is cut off

	printing sync.Mutex
	stdout   io.Writer

	mu        sync.Mutex
	tokens    []etcdutil.Revision // of the holders, in their order
	committed int                 // steps of which a worker knows that they were committed
	fall      *fall
	over      bool
}

// fall is how a worker lost the lock.
type fall struct {
	told, tookOver time.Time
	cause          error // of the lock's end
	commit         error // what Commit said when the worker was back
	guarded        bool  // whether etcd let it write where it compared IsOwner
	closed         error // what Close said
}

// newStage sets the counter to 0, under keys that no other run uses.
func newStage(ctx context.Context, endpoint string, stdout io.Writer) (*stage, error) {
	etcd, err := newClient(endpoint)
	if err != nil {
		return nil, err
	}
	name := fmt.Sprintf("failover-%08x", rand.Uint32())
	s := &stage{
		lockName: name + "/lock",
		counter:  name + "/counter",
		last:     name + "/last",
		etcd:     etcd,
		start:    time.Now(),
		stdout:   stdout,
		tookOver: make(chan time.Time, 1),
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
	if _, err := s.etcd.Txn(ctx).Then(clientv3.OpDelete(s.counter), clientv3.OpDelete(s.last)).Commit(); err != nil {
		s.say("", "%s and %s are not removed: %v", s.counter, s.last, err)
	}
	_ = s.etcd.Close()
}

func newClient(endpoint string) (*clientv3.Client, error) {
	return clientv3.New(clientv3.Config{
		Endpoints:   []string{endpoint},
		DialTimeout: 5 * time.Second,
		Logger:      zap.NewNop(),
	})
}

// play has the workers work until the one that was cut off has had another turn.
func (s *stage) play(ctx context.Context, endpoint string) error {
	ctx, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	var working sync.WaitGroup
	for _, name := range []string{"anna", "bert", "cleo"} {
		w, err := newWorker(s, name, endpoint)
		if err != nil {
			fail(err)
			break
		}
		working.Go(func() { // until it is over, or somebody fails
			defer w.close()
			if err := w.run(ctx); err != nil {
				fail(fmt.Errorf("%s: %w", name, err))
			}
		})
	}
	working.Wait()
	return context.Cause(ctx)
}

// worker is one contender, with its own way to etcd.
type worker struct {
	*stage
	name   string
	link   *etcdtest.Link
	client *clientv3.Client
	fell   bool // it is back from its fall
}

func newWorker(s *stage, name, endpoint string) (*worker, error) {
	link, err := etcdtest.NewLink(endpoint)
	if err != nil {
		return nil, err
	}
	client, err := newClient(link.Endpoint())
	if err != nil {
		_ = link.Close()
		return nil, err
	}
	return &worker{stage: s, name: name, link: link, client: client}, nil
}

func (w *worker) close() {
	_ = w.client.Close()
	_ = w.link.Close()
}

func (w *worker) run(ctx context.Context) error {
	for {
		lock, err := etcdutil.Acquire(ctx, w.client, w.lockName, etcdutil.WithTTL(ttl), etcdutil.WithValue(w.name))
		if err != nil {
			return err
		}
		turn := w.enter(lock)
		switch {
		case turn == 0:
			return lock.Close()
		case turn == cutTurn:
			err = w.loseTurn(ctx, lock)
		default:
			err = w.takeTurn(ctx, lock)
		}
		if err != nil {
			return err
		}
	}
}

// enter notes who holds the lock now. It returns the number of the turn, from 1, or 0 when it is over.
func (w *worker) enter(lock *etcdutil.Lock) (turn int) {
	now := time.Now()
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.over {
		return 0
	}
	w.tokens = append(w.tokens, lock.Token())
	turn = len(w.tokens)
	w.sayAt(now, w.name, "holds the lock, token %d", lock.Token())
	if turn == cutTurn+1 {
		w.tookOver <- now
	}
	return turn
}

// takeTurn works a while, and gives the lock back.
func (w *worker) takeTurn(ctx context.Context, lock *etcdutil.Lock) error {
	err := lock.Do(ctx, func(ctx context.Context) error {
		for range steps {
			if err := w.step(ctx, lock); err != nil {
				return err
			}
		}
		if w.fell {
			w.end()
		}
		return nil
	})
	return errors.Join(err, lock.Close())
}

// end is called by the holder of the lock: nobody else is at work.
func (s *stage) end() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.over = true
}

// step counts one up. The lock keeps others from doing so between the read and the write; if it cannot, because it was
// lost meanwhile, Commit refuses.
func (w *worker) step(ctx context.Context, lock *etcdutil.Lock) error {
	count, _, err := w.count(ctx, w.client)
	if err != nil {
		return err
	}
	time.Sleep(effort)
	if _, err := lock.Commit(ctx, w.puts(count+1)...); err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.committed++
	return nil
}

func (w *worker) puts(count int) []clientv3.Op {
	return []clientv3.Op{
		clientv3.OpPut(w.counter, strconv.Itoa(count)),
		clientv3.OpPut(w.last, w.name),
	}
}

// count reads the counter, and how often it has been written since it was set to 0.
func (s *stage) count(ctx context.Context, etcd *clientv3.Client) (count, writes int, err error) {
	resp, err := etcd.Get(ctx, s.counter)
	if err != nil {
		return 0, 0, err
	}
	if len(resp.Kvs) == 0 {
		return 0, 0, fmt.Errorf("%s is gone", s.counter)
	}
	count, err = strconv.Atoi(string(resp.Kvs[0].Value))
	return count, int(resp.Kvs[0].Version) - 1, err
}

// loseTurn is cut off from etcd while it works. When another has taken over, it is back, and knows no better than to
// write what it was about to.
func (w *worker) loseTurn(ctx context.Context, lock *etcdutil.Lock) error {
	defer lock.Close() // also where this fails

	var f fall
	told := make(chan time.Time, 1)
	context.AfterFunc(lock, func() { told <- time.Now() })

	count, cut, err := w.workUntilTold(ctx, lock)
	if err != nil {
		return err
	}
	f.told, f.cause = <-told, context.Cause(lock)
	w.sayAt(f.told, w.name, "is told, %s later: %v", seconds(f.told.Sub(cut)), f.cause)

	select {
	case f.tookOver = <-w.tookOver:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	w.link.Heal()
	w.say(w.name, "is back, and tries to write as if nothing had happened")
	if err := w.writeLate(ctx, lock, count+1, &f); err != nil {
		return err
	}
	f.closed = lock.Close()
	w.mu.Lock()
	defer w.mu.Unlock()
	w.fell, w.fall = true, &f
	return nil
}

// workUntilTold works with the network gone until the lock's context ends. It returns the last count that it has read,
// and when it was cut off.
func (w *worker) workUntilTold(ctx context.Context, lock *etcdutil.Lock) (count int, cut time.Time, err error) {
	err = lock.Do(ctx, func(ctx context.Context) error {
		if err := w.step(ctx, lock); err != nil {
			return err
		}
		if count, _, err = w.count(ctx, w.client); err != nil {
			return err
		}
		w.link.Cut()
		cut = time.Now()
		w.sayAt(cut, w.name, "is cut off from etcd, and works on")
		return w.step(ctx, lock) // gets no answer, and is called off when ctx ends
	})
	if errors.Is(err, etcdutil.ErrLockLost) {
		return count, cut, nil
	}
	if err == nil {
		err = errors.New("was cut off, and nobody said so")
	}
	return 0, cut, err
}

// writeLate tries to write under a lock that was lost. Commit refuses without asking etcd; a transaction that compares
// IsOwner is refused by etcd itself.
func (w *worker) writeLate(ctx context.Context, lock *etcdutil.Lock, count int, f *fall) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	_, f.commit = lock.Commit(ctx, w.puts(count)...)
	w.say(w.name, "is answered by Commit: %v", f.commit)
	resp, err := etcdutil.Retry(ctx, func(ctx context.Context) (*clientv3.TxnResponse, error) {
		return w.client.Txn(ctx).If(lock.IsOwner()).Then(w.puts(count)...).Commit()
	})
	if err != nil {
		return err
	}
	f.guarded = resp.Succeeded
	w.say(w.name, "is answered by etcd, where it compares IsOwner: written=%t", f.guarded)
	return nil
}

// verdict returns what did not hold.
func (s *stage) verdict(ctx context.Context) error {
	count, writes, err := s.count(ctx, s.etcd)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	f, margin := s.fall, s.fall.tookOver.Sub(s.fall.told)
	var failures []error
	check := func(held bool, format string, args ...any) {
		if !held {
			failures = append(failures, fmt.Errorf(format, args...))
		}
	}
	check(margin > 0, "the holder was told %s after the next one took over", seconds(-margin))
	check(errors.Is(f.cause, etcdutil.ErrLockLost) && errors.Is(f.cause, etcdutil.ErrLeaseExpired),
		"the holder was told a wrong cause: %v", f.cause)
	check(growing(s.tokens), "tokens do not grow: %v", s.tokens)
	check(errors.Is(f.commit, etcdutil.ErrLockLost), "the late Commit was not refused: %v", f.commit)
	check(!f.guarded, "the late transaction was not refused")
	check(errors.Is(f.closed, etcdutil.ErrLockLost), "Close did not say that the lock was lost: %v", f.closed)
	check(count == s.committed && writes == s.committed,
		"the counter is %d after %d writes, of which %d were committed under the lock", count, writes, s.committed)
	if len(failures) > 0 {
		return errors.Join(failures...)
	}
	s.say("", "told %s before the next one took over; %d tokens, each greater than the one before;", seconds(margin), len(s.tokens))
	s.say("", "counter %d, written %d times, by %d commits under the lock: all held", count, writes, s.committed)
	return nil
}

func growing(tokens []etcdutil.Revision) bool {
	for i := 1; i < len(tokens); i++ {
		if tokens[i] <= tokens[i-1] {
			return false
		}
	}
	return true
}

func (s *stage) say(who, format string, args ...any) { s.sayAt(time.Now(), who, format, args...) }

func (s *stage) sayAt(at time.Time, who, format string, args ...any) {
	s.printing.Lock()
	defer s.printing.Unlock()
	fmt.Fprintf(s.stdout, "%7.3f  %-4s  %s\n", at.Sub(s.start).Seconds(), who, fmt.Sprintf(format, args...))
}

func seconds(d time.Duration) string { return fmt.Sprintf("%.3f s", d.Seconds()) }
