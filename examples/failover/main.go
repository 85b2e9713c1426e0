// Failover plays what happens to a lock whose holder is cut off from etcd, and checks etcdutil's
// promises.
//
// Three workers contend for one lock. The holder increments a counter in etcd. After a few turns
// the holder loses its network. Then this must hold:
//   - The holder's context ends before another worker gets the lock.
//   - What the holder tries to write after its return is refused.
//   - The counter is right in the end.
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
	ttl      = 2 * time.Second        // TTL of the lock's lease: the least that etcd grants
	steps    = 3                      // steps of work in a turn
	effort   = 100 * time.Millisecond // time that a step takes
	cutTurn  = 5                      // number of the turn whose holder is cut off
	patience = time.Minute            // bound of the whole run, which usually takes a few seconds
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

// run plays the failover once. It returns nil if everything held.
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
	flags := flag.NewFlagSet("failover", flag.ContinueOnError)
	flags.SetOutput(stdout)
	flags.Usage = func() {
		fmt.Fprint(stdout, `usage: failover [-endpoints host:port,...]

Three workers contend for a lock in etcd. Its holder is cut off from etcd for a
while. The timeline shows, in seconds since the start, that the holder's context
ends before another worker gets the lock, and that the holder can write nothing
afterwards. Exits with 0 if that holds, with 1 if not. Takes a few seconds.

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

// stage holds what the workers share, and the record of what they did.
type stage struct {
	lockName string
	counter  string // the key that is counted up
	last     string // the key that names the last worker
	etcd     *clientv3.Client
	start    time.Time
	tookOver chan time.Time // from the holder after the one that is cut off

	printing sync.Mutex
	stdout   io.Writer

	mu        sync.Mutex
	tokens    []etcdutil.Revision // tokens of the holders, in their order
	committed int                 // steps that Commit reported as applied
	fall      *fall
	over      bool
}

// fall is how a worker lost the lock.
type fall struct {
	ended, tookOver time.Time
	cause           error // of the lock's end
	commit          error // result of the late Commit
	guarded         bool  // whether etcd applied the late transaction that compares IsOwner
	closed          error // result of Close
}

// newStage chooses keys that no other run uses, and sets the counter to 0.
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

// close removes the keys.
func (s *stage) close() {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if _, err := s.etcd.Txn(ctx).Then(clientv3.OpDelete(s.counter), clientv3.OpDelete(s.last)).Commit(); err != nil {
		s.say("", "%s and %s were not removed: %v", s.counter, s.last, err)
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

// play runs the workers until the one that was cut off has had another turn.
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
		working.Go(func() { // until the last turn ends, or a worker fails
			defer w.close()
			if err := w.run(ctx); err != nil {
				fail(fmt.Errorf("%s: %w", name, err))
			}
		})
	}
	working.Wait()
	return context.Cause(ctx)
}

// worker is one contender, with its own link to etcd.
type worker struct {
	*stage
	name   string
	link   *etcdtest.Link
	client *clientv3.Client
	fell   bool // it has lost a lock and returned
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

// enter notes the new holder. It returns the number of the turn, from 1, or 0 after the last turn.
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

// takeTurn works for some steps, and releases the lock.
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

// end makes this turn the last. Only the holder of the lock calls it.
func (s *stage) end() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.over = true
}

// step increments the counter. The lock keeps others from writing it between the read and the
// write. If the lock was lost meanwhile, Commit refuses to write.
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

// count returns the counter, and how often it was written since it was set to 0.
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

// loseTurn is a turn in which the worker is cut off from etcd. After another worker has taken
// over, the network is restored, and the worker tries to write as if nothing had happened.
func (w *worker) loseTurn(ctx context.Context, lock *etcdutil.Lock) error {
	defer lock.Close() // in case of an error

	var f fall
	ended := make(chan time.Time, 1)
	context.AfterFunc(lock, func() { ended <- time.Now() })

	count, cut, err := w.workUntilLost(ctx, lock)
	if err != nil {
		return err
	}
	f.ended, f.cause = <-ended, context.Cause(lock)
	w.sayAt(f.ended, w.name, "stops, %s later: %v", seconds(f.ended.Sub(cut)), f.cause)

	select {
	case f.tookOver = <-w.tookOver:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	w.link.Heal()
	w.say(w.name, "has its network back, and tries to write as if nothing had happened")
	if err := w.writeLate(ctx, lock, count+1, &f); err != nil {
		return err
	}
	f.closed = lock.Close()
	w.mu.Lock()
	defer w.mu.Unlock()
	w.fell, w.fall = true, &f
	return nil
}

// workUntilLost cuts the network, and works until the lock's context ends. It returns the last
// count that it has read, and the time of the cut.
func (w *worker) workUntilLost(ctx context.Context, lock *etcdutil.Lock) (count int, cut time.Time, err error) {
	err = lock.Do(ctx, func(ctx context.Context) error {
		if err := w.step(ctx, lock); err != nil {
			return err
		}
		if count, _, err = w.count(ctx, w.client); err != nil {
			return err
		}
		w.link.Cut()
		cut = time.Now()
		w.sayAt(cut, w.name, "is cut off from etcd, and continues to work")
		return w.step(ctx, lock) // gets no answer, and is canceled when ctx ends
	})
	if errors.Is(err, etcdutil.ErrLockLost) {
		return count, cut, nil
	}
	if err == nil {
		err = errors.New("was cut off, but its lock was not lost")
	}
	return 0, cut, err
}

// writeLate tries to write under a lock that was lost. Commit refuses without asking etcd. etcd
// itself refuses a transaction that compares IsOwner.
func (w *worker) writeLate(ctx context.Context, lock *etcdutil.Lock, count int, f *fall) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	_, f.commit = lock.Commit(ctx, w.puts(count)...)
	w.say(w.name, "gets from Commit: %v", f.commit)
	resp, err := etcdutil.Retry(ctx, func(ctx context.Context) (*clientv3.TxnResponse, error) {
		return w.client.Txn(ctx).If(lock.IsOwner()).Then(w.puts(count)...).Commit()
	})
	if err != nil {
		return err
	}
	f.guarded = resp.Succeeded
	w.say(w.name, "gets from a transaction that compares IsOwner: written=%t", f.guarded)
	return nil
}

// verdict returns an error for each promise that did not hold.
func (s *stage) verdict(ctx context.Context) error {
	count, writes, err := s.count(ctx, s.etcd)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	f, margin := s.fall, s.fall.tookOver.Sub(s.fall.ended)
	var failures []error
	check := func(held bool, format string, args ...any) {
		if !held {
			failures = append(failures, fmt.Errorf(format, args...))
		}
	}
	check(margin > 0, "the holder's context ended %s after the next one took over", seconds(-margin))
	check(errors.Is(f.cause, etcdutil.ErrLockLost) && errors.Is(f.cause, etcdutil.ErrLeaseExpired),
		"the holder's context ended with a wrong cause: %v", f.cause)
	check(growing(s.tokens), "tokens do not grow: %v", s.tokens)
	check(errors.Is(f.commit, etcdutil.ErrLockLost), "the late Commit was not refused: %v", f.commit)
	check(!f.guarded, "the late transaction was not refused")
	check(errors.Is(f.closed, etcdutil.ErrLockLost), "Close did not report that the lock was lost: %v", f.closed)
	check(count == s.committed && writes == s.committed,
		"the counter is %d after %d writes, of which %d were committed under the lock", count, writes, s.committed)
	if len(failures) > 0 {
		return errors.Join(failures...)
	}
	s.say("", "the context ended %s before the next one took over; %d tokens, each greater;", seconds(margin), len(s.tokens))
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
