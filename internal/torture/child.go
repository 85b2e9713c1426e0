package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"sync"
	"time"

	"example.com/etcdutil"
)

// childEnv has a child's orders: the program runs itself again, also when it is a test.
const childEnv = "ETCDUTIL_TORTURE_CHILD"

// orders are what a child is to do.
type orders struct {
	Set       lockset
	Endpoints []string
}

// A childReport is a line from a child to its parent.
type childReport struct {
	Event   childEvent
	Element string  `json:",omitempty"`
	Outcome outcome `json:",omitempty"`
}

type childEvent string

const (
	childReady   childEvent = "ready"
	childHolds   childEvent = "holds"
	childFailed  childEvent = "failed"  // to acquire
	childWriting childEvent = "writing" // it waits for the answer
	childWrote   childEvent = "wrote"
)

// A goAhead is the answer to "writing".
type goAhead struct {
	Brief bool // do not wait from now on
}

func isChild() bool { return os.Getenv(childEnv) != "" }

// childMain is a client of a lock-set. It says what it does, one line each, and ends when its input
// does.
func childMain() int {
	var o orders
	if err := json.Unmarshal([]byte(os.Getenv(childEnv)), &o); err != nil {
		fmt.Fprintln(os.Stderr, "torture: child:", err)
		return 2
	}
	client, err := newClient(o.Endpoints)
	if err != nil {
		fmt.Fprintln(os.Stderr, "torture: child:", err)
		return 2
	}
	defer client.Close()
	ctx, cancel := context.WithCancel(context.Background())
	answers := make(chan goAhead)
	go func() { // until the input ends
		defer cancel()
		for in := json.NewDecoder(os.Stdin); ; {
			var a goAhead
			if in.Decode(&a) != nil {
				return
			}
			select {
			case answers <- a:
			case <-ctx.Done():
			}
		}
	}()
	out := json.NewEncoder(os.Stdout)
	say := func(r childReport) { _ = out.Encode(r) }
	say(childReport{Event: childReady})
	brief := false
	for n := 1; ctx.Err() == nil; n++ {
		lock, err := etcdutil.Acquire(ctx, client, o.Set.Name, etcdutil.WithTTL(leaseTTL))
		if err != nil {
			say(childReport{Event: childFailed})
			sleep(ctx, 20*time.Millisecond)
			continue
		}
		say(childReport{Event: childHolds})
		element := fmt.Sprintf("child-%d", n)
		wait := func() {
			if !brief {
				sleep(ctx, rand.N(o.Set.Wait))
			}
		}
		written := o.Set.add(client, lock, element, wait, func() {
			say(childReport{Event: childWriting})
			select {
			case a := <-answers:
				brief = a.Brief
			case <-ctx.Done():
			}
		})
		say(childReport{Event: childWrote, Element: element, Outcome: written})
		_ = lock.Close()
	}
	return 0
}

// child is the parent's side.
type child struct {
	t       *torture
	set     lockset
	host    *host // its links; its client is in the child
	command *exec.Cmd
	input   io.WriteCloser
	waiting *waiter
	pauses  chan pause
	ready   chan struct{}
	ended   chan struct{}
	once    sync.Once
}

// A pause is to last for length. If it is late the child writes first, and what it wrote arrives
// only while it is stopped, when its lease has run out.
type pause struct {
	length time.Duration
	late   bool
	done   chan struct{}
}

func (t *torture) startChild(h *host, s lockset) (*child, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	env, err := json.Marshal(orders{s, h.endpoints()})
	if err != nil {
		return nil, err
	}
	c := &child{
		t: t, set: s, host: h, waiting: t.waiters.add(s.Name+" (child)", h.id),
		pauses: make(chan pause), ready: make(chan struct{}), ended: make(chan struct{}),
	}
	c.command = exec.Command(self)
	c.command.Env = append(os.Environ(), childEnv+"="+string(env))
	c.command.Stderr = os.Stderr
	if c.input, err = c.command.StdinPipe(); err != nil {
		return nil, err
	}
	output, err := c.command.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := c.command.Start(); err != nil {
		return nil, err
	}
	go c.listen(output) // until the child ends
	return c, nil
}

func (c *child) listen(output io.Reader) {
	defer close(c.ended)
	for lines := bufio.NewScanner(output); lines.Scan(); {
		var r childReport
		if json.Unmarshal(lines.Bytes(), &r) != nil {
			continue // a test binary may print lines of its own
		}
		c.heard(r)
	}
}

func (c *child) heard(r childReport) {
	switch r.Event {
	case childReady:
		close(c.ready)
	case childHolds:
		c.waiting.had(c.t.now())
		c.t.holders.add(c.set.Name, 1)
	case childFailed:
		c.t.operations.add("acquire: failed in a child", 1)
	case childWriting:
		select {
		case p := <-c.pauses:
			c.carryOut(p)
		default:
			c.answer()
		}
	case childWrote:
		c.t.recordElement(c.set, r.Element, r.Outcome)
	}
}

// answer lets the child write.
func (c *child) answer() {
	line, _ := json.Marshal(goAhead{Brief: c.t.settling.Load()})
	_, _ = c.input.Write(append(line, '\n'))
}

// pause pauses the child when it is next about to write. It reports false if ctx ended before.
func (c *child) pause(ctx context.Context, p pause) bool {
	p.done = make(chan struct{})
	select {
	case c.pauses <- p:
		<-p.done
		return true
	case <-ctx.Done():
	case <-c.ended:
	}
	return false
}

// handOver is how long a child needs to hand a request to the network.
const handOver = 100 * time.Millisecond

func (c *child) carryOut(p pause) {
	defer close(p.done)
	if p.late {
		for _, l := range c.host.links {
			l.Delay(p.length - time.Second/2)
		}
		defer c.host.heal()
		c.answer()
		time.Sleep(handOver)
	}
	if err := suspend(c.command.Process); err != nil {
		c.t.fail(fmt.Errorf("pause a child: %w", err))
		return
	}
	sleep(context.Background(), p.length)
	if err := resume(c.command.Process); err != nil {
		c.t.fail(fmt.Errorf("resume a child: %w", err))
	}
	if !p.late {
		c.answer()
	}
}

// stop has the child end. It is an error if it does not, or not well.
func (c *child) stop() (err error) {
	c.once.Do(func() {
		_ = c.input.Close()
		select {
		case <-c.ended:
		case <-time.After(time.Minute): // by then it is not slow, but stuck
			_ = c.command.Process.Kill()
		}
		if waitErr := c.command.Wait(); waitErr != nil {
			err = fmt.Errorf("child of %s: %w", c.set.Name, waitErr)
		}
	})
	return err
}
