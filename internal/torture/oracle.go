package main

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// observedPrefix is where the keys are that are watched and logged.
const observedPrefix = "observed/"

// A change is one event as etcd has it.
type change struct {
	key      string
	value    string
	deleted  bool
	create   int64
	version  int64
	revision int64
	lease    int64
	at       time.Duration // when the oracle saw it
}

// oracle is what etcd itself says happened: all changes under the observed prefix, in order. It
// watches with a plain client, which has no links in front of it, and nothing is compacted that it
// has not seen.
type oracle struct {
	clock
	mu      sync.Mutex
	changes []change
	seen    int64 // everything up to this revision is in changes
	err     error
}

// run follows etcd until ctx ends.
func (o *oracle) run(ctx context.Context, client *clientv3.Client) {
	ctx = clientv3.WithRequireLeader(ctx)
	go func() { // until ctx ends
		for ctx.Err() == nil {
			_ = client.RequestProgress(ctx)
			sleep(ctx, 200*time.Millisecond)
		}
	}()
	for ctx.Err() == nil && o.err == nil {
		watch, cancel := context.WithCancel(ctx)
		for resp := range client.Watch(watch, observedPrefix, clientv3.WithPrefix(), clientv3.WithRev(o.revision()+1)) {
			o.take(resp)
		}
		cancel()
		sleep(ctx, 50*time.Millisecond)
	}
}

func (o *oracle) take(resp clientv3.WatchResponse) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if resp.CompactRevision > o.seen+1 {
		o.err = fmt.Errorf("the oracle has seen revision %d only, when %d was compacted: %w", o.seen, resp.CompactRevision, rpctypes.ErrCompacted)
		return
	}
	for _, e := range resp.Events {
		o.changes = append(o.changes, change{
			key: string(e.Kv.Key), value: string(e.Kv.Value), deleted: e.Type == clientv3.EventTypeDelete,
			create: e.Kv.CreateRevision, version: e.Kv.Version, revision: e.Kv.ModRevision,
			lease: e.Kv.Lease, at: o.now(),
		})
		o.seen = e.Kv.ModRevision
	}
	if resp.IsProgressNotify() {
		o.seen = max(o.seen, resp.Header.Revision)
	}
}

func (o *oracle) revision() int64 {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.seen
}

// all are the changes so far.
func (o *oracle) all() ([]change, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return slices.Clone(o.changes), o.err
}

// await waits until the oracle has seen a revision.
func (o *oracle) await(ctx context.Context, revision int64) error {
	for o.revision() < revision {
		if ctx.Err() != nil {
			return fmt.Errorf("the oracle has seen revision %d only, not %d: %w", o.revision(), revision, ctx.Err())
		}
		sleep(ctx, 10*time.Millisecond)
	}
	return nil
}
