// Log plays what happens to a log when the lock of its writer is taken away, and checks etcdutil's
// promises.
//
// Three writers contend for one lock. The holder appends entries to a log, and a reader follows
// it. An operator deletes the first writer's key, revokes the second writer's lease, and writes
// into the third writer's log by hand. Then this must hold:
//   - The context of the first and of the second writer ends, and their late writes are refused.
//   - The third writer gets ErrLogConflict.
//   - The reader reads every entry once, in order and without a gap.
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
	"sync"
	"time"

	"example.com/etcdutil"
	"example.com/etcdutil/etcdtest"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
)

const (
	entries  = 3                     // entries that a writer writes before the operator intervenes
	effort   = 50 * time.Millisecond // time that an entry takes
	patience = time.Minute           // bound of the whole run, which usually takes a second
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	err := run(ctx, os.Args[1:], os.Stdout)
	if errors.Is(err, flag.ErrHelp) {
		return
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "log: %v\n", err)
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
	r, err := newReader(ctx, s, endpoint)
	if err != nil {
		return err
	}
	err = s.play(ctx, endpoint, r)
	if err = errors.Join(err, r.close()); err != nil {
		return err
	}
	return s.verdict(ctx, r.entries)
}

// parse returns the endpoint to use, or "" for an etcd in this process.
func parse(args []string, stdout io.Writer) (endpoint string, err error) {
	flags := flag.NewFlagSet("log", flag.ContinueOnError)
	flags.SetOutput(stdout)
	flags.Usage = func() {
		fmt.Fprint(stdout, `usage: log [-endpoints host:port,...]

Three writers contend for a lock in etcd. The holder appends to a log that a reader
follows. An operator takes the lock away from the first two writers, and writes
into the log of the third. The timeline shows, in seconds since the start, that
each writer gets an error, that it cannot write any more, and what the reader reads.
Nobody can foresee that a lock is taken away by hand, so the next writer may hold
the lock a moment before the context of the last one ends.
Exits with 0 if that holds and the reader has read every entry once and in order,
with 1 if not. Takes a second.

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

// Record is the value of an entry of the log.
type Record struct {
	By   string
	Text string
}

// stage holds what the writers and the reader share, and the record of what they did.
type stage struct {
	lockName string
	logName  string
	first    etcdutil.Revision // the log begins at this revision or later
	operator *clientv3.Client
	start    time.Time

	printing sync.Mutex
	stdout   io.Writer

	mu       sync.Mutex
	turns    int      // acquisitions of the lock
	written  []Record // in the order of their versions
	losses   []loss
	conflict error // result of the third writer's Write
}

// loss is how a writer lost the lock.
type loss struct {
	cause  error // of the end of its context
	write  error // result of the late Write
	closed error // result of the lock's Close
}

// newStage chooses names that no other run uses.
func newStage(ctx context.Context, endpoint string, stdout io.Writer) (*stage, error) {
	etcd, err := newClient(endpoint)
	if err != nil {
		return nil, err
	}
	name := fmt.Sprintf("log-%08x", rand.Uint32())
	s := &stage{
		lockName: name + "/lock",
		logName:  name + "/log",
		operator: etcd,
		start:    time.Now(),
		stdout:   stdout,
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	resp, err := etcd.Get(ctx, s.logName)
	if err != nil {
		_ = etcd.Close()
		return nil, fmt.Errorf("etcd at %s: %w", endpoint, err)
	}
	s.first = resp.Header.Revision + 1
	return s, nil
}

// close removes the log.
func (s *stage) close() {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if _, err := s.operator.Delete(ctx, s.logName); err != nil {
		s.say("", "%s was not removed: %v", s.logName, err)
	}
	_ = s.operator.Close()
}

func newClient(endpoint string) (*clientv3.Client, error) {
	return clientv3.New(clientv3.Config{
		Endpoints:   []string{endpoint},
		DialTimeout: 5 * time.Second,
		Logger:      zap.NewNop(),
	})
}

// play gives each writer its turn, and waits until the reader has read what they wrote.
func (s *stage) play(ctx context.Context, endpoint string, r *reader) error {
	ctx, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	var writing sync.WaitGroup
	for _, name := range []string{"anna", "bert", "cleo"} {
		w, err := newWriter(s, name, endpoint, r)
		if err != nil {
			fail(err)
			break
		}
		writing.Go(func() { // until its turn ends, or a writer fails
			defer w.etcd.Close()
			if err := w.run(ctx); err != nil {
				fail(fmt.Errorf("%s: %w", name, err))
			}
		})
	}
	writing.Wait()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return r.await(ctx, int64(len(s.written)))
}

// verdict returns an error for each promise that did not hold. All writers and the reader have
// finished.
func (s *stage) verdict(ctx context.Context, read []etcdutil.Entry[Record]) error {
	resp, err := s.operator.Get(ctx, s.logName)
	if err != nil {
		return err
	}
	var failures []error
	check := func(held bool, format string, args ...any) {
		if !held {
			failures = append(failures, fmt.Errorf(format, args...))
		}
	}
	for i, l := range s.losses {
		check(errors.Is(l.cause, etcdutil.ErrLockLost), "the context of writer %d ended with a wrong cause: %v", i+1, l.cause)
		check(errors.Is(l.write, etcdutil.ErrLockLost), "the late Write of writer %d was not refused: %v", i+1, l.write)
		check(errors.Is(l.closed, etcdutil.ErrLockLost), "Close did not report to writer %d that the lock was lost: %v", i+1, l.closed)
	}
	check(len(s.losses) == 2, "the lock was lost %d times, not twice", len(s.losses))
	check(errors.Is(s.conflict, etcdutil.ErrLogConflict), "Write did not report the operator's entry: %v", s.conflict)
	check(len(resp.Kvs) == 1 && resp.Kvs[0].Version == int64(len(s.written)), "etcd has another version than %d: %v", len(s.written), resp.Kvs)
	check(len(read) == len(s.written), "%d entries were read, %d written", len(read), len(s.written))
	for i, e := range read {
		check(e.Version == int64(i+1), "version %d was read instead of %d", e.Version, i+1)
		check(i >= len(s.written) || e.Value == s.written[i], "version %d was read as %v, but was written with another value", e.Version, e.Value)
	}
	if len(failures) > 0 {
		return errors.Join(failures...)
	}
	s.say("", "the lock was lost %d times, and the late writes were refused;", len(s.losses))
	s.say("", "%d entries written, and read once each, in order and without a gap: all held", len(read))
	return nil
}

func (s *stage) say(who, format string, args ...any) {
	s.printing.Lock()
	defer s.printing.Unlock()
	fmt.Fprintf(s.stdout, "%7.3f  %-8s  %s\n", time.Since(s.start).Seconds(), who, fmt.Sprintf(format, args...))
}
