package main

import (
	"context"
	"fmt"
	"strconv"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

const (
	// crowdWatchers is how many watchers one client has, each of one of few keys.
	crowdWatchers = 100
	crowdKeys     = 250
	// stuckWatchers of them are read by nobody until the faults have stopped.
	stuckWatchers = 20
	// crowdPace is how long a watcher of the crowd lasts before the next one goes on behind it.
	crowdPace = 40 * time.Second
)

func crowdKey(i int) string { return observedPrefix + "crowd/" + strconv.Itoa(i%crowdKeys) }

// startCrowd has one client watch with very many watchers, and changes what they watch.
func (t *torture) startCrowd(h *host) {
	for i := range crowdWatchers {
		o := &observer{host: h.id, key: crowdKey(i), reading: reading{crowdPace, i < stuckWatchers}}
		o.reached.name = fmt.Sprintf("watcher %d of the crowd, of %s", i, o.key)
		t.observers = append(t.observers, o)
		t.followers = append(t.followers, &o.reached)
		t.work(h, "", false, func(w *worker) { w.observe(o) })
	}
	t.work(h, "", false, (*worker).changeCrowd)
}

// changeCrowd changes a key, or many in one transaction.
func (w *worker) changeCrowd() {
	ctx, cancel := context.WithTimeout(w.ctx, 2*time.Second)
	defer cancel()
	many := 1
	if w.chance(2) {
		many = 20
	}
	var ops []clientv3.Op
	for first := w.rand.IntN(crowdKeys); len(ops) < many; {
		ops = append(ops, w.change(crowdKey(first+len(ops)), w.uniqueValue()))
	}
	_, err := w.admin.Txn(ctx).Then(ops...).Commit()
	w.operations.add("crowd: change: "+outcomeOf(err), 1)
	sleep(w.ctx, w.upTo(60*time.Millisecond))
}
