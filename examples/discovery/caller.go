package main

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"sync"
	"time"

	"example.com/etcdutil"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// call is a call of a server.
type call struct {
	id  string
	at  time.Time
	err error
}

// caller calls all servers in turn.
type caller struct {
	*stage
	client    *clientv3.Client
	addresses *etcdutil.Mirror[Address]
	http      http.Client
	stop      context.CancelFunc
	calling   sync.WaitGroup

	mu    sync.Mutex
	calls []call
	fails map[string]bool // whether the last call of a server failed
}

func newCaller(ctx context.Context, s *stage, endpoint string) (*caller, error) {
	client, err := newClient(endpoint)
	if err != nil {
		return nil, err
	}
	ctx, stop := context.WithCancel(ctx)
	c := &caller{stage: s, client: client, stop: stop, fails: map[string]bool{}}
	c.http = http.Client{Transport: &http.Transport{}, Timeout: 10 * time.Second}
	c.addresses, err = etcdutil.NewMirror[Address](ctx, client, s.prefix, etcdutil.WithPrefix())
	if err != nil {
		stop()
		_ = client.Close()
		return nil, err
	}
	c.calling.Go(func() { c.run(ctx) }) // until ctx ends
	return c, nil
}

func (c *caller) run(ctx context.Context) {
	for ctx.Err() == nil {
		for key := range c.addresses.All() {
			if address, ok := c.addresses.Get(key); ok { // now, and not when the iteration began
				at := time.Now()
				err := c.call(ctx, address)
				if ctx.Err() != nil {
					return
				}
				c.note(call{address.ID, at, err})
			}
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func (c *caller) call(ctx context.Context, address Address) error {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, address.URL, nil)
	if err != nil {
		return err
	}
	response, err := c.http.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err == nil && string(body) != address.ID {
		err = fmt.Errorf("%s answered for %s", body, address.ID)
	}
	return err
}

// note keeps a call. It prints the first of each outcome in a row.
func (c *caller) note(now call) {
	c.mu.Lock()
	defer c.mu.Unlock()
	failed, called := c.fails[now.id]
	switch {
	case now.err == nil && (failed || !called):
		c.say("%s is called", now.id)
	case now.err != nil && (!failed || !called):
		c.say("%s cannot be called: %v", now.id, now.err)
	}
	c.calls, c.fails[now.id] = append(c.calls, now), now.err != nil
}

// waitCalled waits for a call from now on that succeeds.
func (c *caller) waitCalled(ctx context.Context, id string) error {
	from := time.Now()
	return poll(ctx, id+" is not called", func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		for i := len(c.calls) - 1; i >= 0 && c.calls[i].at.After(from); i-- {
			if c.calls[i].id == id && c.calls[i].err == nil {
				return true
			}
		}
		return false
	})
}

func (c *caller) close() {
	c.stop()
	c.calling.Wait()
	_ = c.addresses.Close()
	_ = c.client.Close()
	c.http.CloseIdleConnections()
}
