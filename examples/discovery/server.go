package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"example.com/etcdutil"
)

// Address is what a server registers, in JSON.
type Address struct {
	ID  string `json:"id"`
	URL string `json:"url"`
}

// server answers every request with its ID, a letter and the number of its instance. The letter is
// its key.
type server struct {
	*stage
	id           string
	http         *http.Server
	crash        func()
	registration *etcdutil.Registration[Address]
	running      sync.WaitGroup
}

// openServer serves first, and then registers.
func openServer(ctx context.Context, s *stage, id string) (*server, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	ctx, stop := context.WithCancelCause(ctx)
	srv := &server{stage: s, id: id}
	srv.http = &http.Server{
		Handler:           http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, id) }),
		ReadHeaderTimeout: time.Second,
	}
	srv.crash = func() {
		s.say("%s crashes: its lease is no longer renewed, but it has not run out yet", id)
		_ = srv.http.Close()
		stop(errors.New("it crashed"))
	}
	srv.running.Go(func() { _ = srv.http.Serve(listener) }) // until http is closed
	letter, _, _ := strings.Cut(id, "-")
	address := Address{ID: id, URL: "http://" + listener.Addr().String()}
	srv.registration, err = etcdutil.Register(ctx, s.client, s.prefix+letter, address, etcdutil.WithTTL(ttl))
	if err != nil {
		_ = srv.http.Close()
		stop(err)
		return nil, err
	}
	s.say("%s is registered", id)
	return srv, nil
}

// drain removes the address first. Then it serves for as long as callers may not have learned that.
func (s *server) drain() {
	s.say("%s drains", s.id)
	if err := s.registration.Close(); err != nil && !errors.Is(err, etcdutil.ErrReplaced) {
		s.say("%s is not confirmed removed: %v", s.id, err)
	}
	s.running.Go(func() {
		time.Sleep(2 * grace)
		_ = s.http.Shutdown(context.Background())
	})
}

// close ends a server, and waits for the end of one that drains.
func (s *server) close() {
	if s.registration.Err() == nil {
		_ = s.http.Close()
	}
	_ = s.registration.Close()
	s.running.Wait()
}
