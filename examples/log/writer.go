package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"example.com/etcdutil"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// writer contends for the lock, and has one turn.
type writer struct {
	*stage
	name   string
	etcd   *clientv3.Client
	reader *reader // to wait for other writers' entries
}

func newWriter(s *stage, name, endpoint string, r *reader) (*writer, error) {
	etcd, err := newClient(endpoint)
	if err != nil {
		return nil, err
	}
	return &writer{stage: s, name: name, etcd: etcd, reader: r}, nil
}

// run writes under the lock until the operator intervenes, and then once more.
func (w *writer) run(ctx context.Context) error {
	lock, err := etcdutil.Acquire(ctx, w.etcd, w.lockName, etcdutil.WithValue(w.name))
	if err != nil {
		return err
	}
	defer lock.Close() // in case of an error
	turn := w.enter(lock)
	log, version, err := w.write(ctx, lock)
	if err != nil {
		return err
	}
	switch turn {
	case 1:
		w.say("operator", "deletes the lock's key")
		_, err = w.operator.Delete(ctx, lock.Key())
	case 2:
		w.say("operator", "revokes the lock's lease")
		_, err = w.operator.Revoke(ctx, lock.Lease().ID())
	default:
		return errors.Join(w.continueAfterConflict(ctx, lock, log), lock.Close())
	}
	if err != nil {
		return err
	}
	return w.writeLate(ctx, lock, log, version)
}

func (w *writer) enter(lock *etcdutil.Lock) (turn int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.turns++
	w.say(w.name, "holds the lock, token %d", lock.Token())
	return w.turns
}

// write writes some entries. It returns the version of the last one.
func (w *writer) write(ctx context.Context, lock *etcdutil.Lock) (log *etcdutil.LogWriter[Record], version int64, err error) {
	log, err = etcdutil.NewLogWriter[Record](ctx, lock, w.logName)
	if err != nil {
		return nil, 0, err
	}
	for i := range entries {
		time.Sleep(effort)
		r := Record{w.name, fmt.Sprintf("entry %d of %d", i+1, entries)}
		if version, err = log.Write(ctx, r); err != nil {
			return nil, 0, err
		}
		w.note(r)
		w.say(w.name, "has written version %d", version)
	}
	return log, version, nil
}

// note records an entry that was written. Only the holder of the lock calls it.
func (s *stage) note(r Record) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.written = append(s.written, r)
}

// writeLate waits until the log's context ends and the next writer has written. Then it tries to
// write as if nothing had happened.
func (w *writer) writeLate(ctx context.Context, lock *etcdutil.Lock, log *etcdutil.LogWriter[Record], version int64) error {
	select {
	case <-log.Done():
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	l := loss{cause: context.Cause(log)}
	w.say(w.name, "stops: %v", l.cause)
	if err := w.reader.await(ctx, version+1); err != nil {
		return err
	}
	_, l.write = log.Write(ctx, Record{w.name, "too late"})
	w.say(w.name, "gets from its late Write: %v", l.write)
	l.closed = lock.Close()
	w.mu.Lock()
	defer w.mu.Unlock()
	w.losses = append(w.losses, l)
	return nil
}

// continueAfterConflict lets the operator write without the lock. The writer still holds the
// lock, and continues with a new LogWriter.
func (w *writer) continueAfterConflict(ctx context.Context, lock *etcdutil.Lock, log *etcdutil.LogWriter[Record]) error {
	r := Record{"operator", "by hand"}
	data, err := json.Marshal(r)
	if err != nil {
		return err
	}
	w.say("operator", "writes into the log by hand, without the lock")
	if _, err := w.operator.Put(ctx, w.logName, string(data)); err != nil {
		return err
	}
	w.note(r)
	_, conflict := log.Write(ctx, Record{w.name, "unaware"})
	w.say(w.name, "gets from Write: %v", conflict)
	w.mu.Lock()
	w.conflict = conflict
	w.mu.Unlock()
	_, _, err = w.write(ctx, lock)
	return err
}
