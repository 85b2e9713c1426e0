package main

import (
	"context"
	"errors"
	"sync"

	"example.com/etcdutil"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// reader reads every entry of the log.
type reader struct {
	*stage
	etcd     *clientv3.Client
	log      *etcdutil.LogReader[Record]
	progress *etcdutil.Notify[int64] // entries holds the log up to this version

	reading sync.WaitGroup // guards entries
	entries []etcdutil.Entry[Record]
}

func newReader(ctx context.Context, s *stage, endpoint string) (*reader, error) {
	etcd, err := newClient(endpoint)
	if err != nil {
		return nil, err
	}
	log, err := etcdutil.NewLogReader[Record](ctx, etcd, s.logName, etcdutil.WithEveryEntry(s.first))
	if err != nil {
		return nil, errors.Join(err, etcd.Close())
	}
	r := &reader{stage: s, etcd: etcd, log: log, progress: etcdutil.NewNotify[int64](ctx)}
	r.reading.Go(r.run) // until the log reader is closed
	return r, nil
}

func (r *reader) run() {
	defer r.progress.Close()
	for e, err := range r.log.All() {
		if err != nil {
			r.say("reader", "fails: %v", err)
			continue
		}
		r.say("reader", "has read version %d: %s, by %s", e.Version, e.Value.Text, e.Value.By)
		r.entries = append(r.entries, e)
		_ = r.progress.Send(e.Version)
	}
}

// await waits until the reader has read this version.
func (r *reader) await(ctx context.Context, version int64) error {
	for progress := r.progress.Receiver(); ; {
		at, err := progress.Recv(ctx)
		switch {
		case errors.Is(err, etcdutil.ErrClosed):
			return context.Cause(r.log)
		case err != nil || at >= version:
			return err
		}
	}
}

// close ends the reader. It returns an error if the reader had ended by itself.
func (r *reader) close() error {
	err := r.log.Close()
	r.reading.Wait()
	_ = r.etcd.Close()
	return err
}
