package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"example.com/etcdutil/etcdtest"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// stage is what servers, caller and judge share.
type stage struct {
	client *clientv3.Client // all use it but the caller
	prefix string           // of the addresses
	start  time.Time

	printing sync.Mutex
	stdout   io.Writer
}

func (s *stage) say(format string, args ...any) {
	s.printing.Lock()
	defer s.printing.Unlock()
	fmt.Fprintf(s.stdout, "%7.3f  %s\n", time.Since(s.start).Seconds(), fmt.Sprintf(format, args...))
}

// play has servers come and go while they are called, and returns what did not hold.
func (s *stage) play(ctx context.Context, endpoint string) error {
	j, err := newJudge(ctx, s)
	if err != nil {
		return err
	}
	defer j.close()
	link, err := etcdtest.NewLink(endpoint)
	if err != nil {
		return err
	}
	defer link.Close()
	c, err := newCaller(ctx, s, link.Endpoint())
	if err != nil {
		return err
	}
	servers := map[string]*server{}
	err = s.playServers(ctx, servers, link, c, j)
	c.close() // before the servers
	for _, server := range servers {
		server.close()
	}
	if err != nil {
		return err
	}
	if err := j.verdict(c.calls); err != nil {
		return err
	}
	s.say("all held in %d calls", len(c.calls))
	return nil
}

func (s *stage) playServers(ctx context.Context, servers map[string]*server, link *etcdtest.Link, c *caller, j *judge) error {
	open := func(ids ...string) error {
		for _, id := range ids {
			server, err := openServer(ctx, s, id)
			if err != nil {
				return err
			}
			servers[id] = server
			if err := c.waitCalled(ctx, id); err != nil {
				return err
			}
		}
		return nil
	}
	if err := open("a-1", "b-1", "c-1"); err != nil {
		return err
	}

	servers["b-1"].drain()
	link.Reset()
	servers["c-1"].crash()
	if err := errors.Join(open("b-2"), j.waitGone(ctx, "c-1"), open("c-2")); err != nil {
		return err
	}

	s.say("a-1 is upgraded to a-2")
	if err := open("a-2"); err != nil {
		return err
	}
	<-servers["a-1"].registration.Done() // or with ctx
	s.say("a-1 has to go: %v", context.Cause(servers["a-1"].registration))
	servers["a-1"].drain()

	s.say("an operator deletes the address of c-2")
	if _, err := s.client.Delete(ctx, s.prefix+"c"); err != nil {
		return err
	}
	return errors.Join(j.waitBack(ctx, "c-2"), c.waitCalled(ctx, "c-2"))
}

// poll waits for a condition.
func poll(ctx context.Context, what string, condition func() bool) error {
	for !condition() {
		select {
		case <-time.After(5 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("%s: %w", what, context.Cause(ctx))
		}
	}
	return nil
}
