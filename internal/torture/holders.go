package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"example.com/etcdutil"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// A holderSeen is what a WatchHolder reported: the token of who held it, or 0 for nobody.
type holderSeen struct {
	token    int64
	revision int64
}

// holderFollower follows who leads.
type holderFollower struct {
	host    int
	reached progress
	seen    []holderSeen
}

func (t *torture) startWatchHolder(h *host) {
	f := &holderFollower{host: h.id}
	f.reached.name = fmt.Sprintf("the watcher of the leader on host %d", h.id)
	t.holderFollowers = append(t.holderFollowers, f)
	t.followers = append(t.followers, &f.reached)
	t.work(h, "", false, func(w *worker) { w.watchHolder(f) })
	t.work(h, "", false, (*worker).stray)
}

// stray makes and deletes keys below the leader's name that are no contenders: one without a lease,
// and one of another lock.
func (w *worker) stray() {
	ctx, cancel := context.WithTimeout(w.ctx, 2*time.Second)
	defer cancel()
	key := fmt.Sprintf("%s/stray-%d", leaderName, w.host.id)
	if w.chance(50) {
		key = fmt.Sprintf("%s/sub/%d", leaderName, w.host.id)
	}
	op := clientv3.OpPut(key, "")
	if w.chance(50) {
		op = clientv3.OpDelete(key)
	}
	_, _ = w.host.client.Do(ctx, op)
	sleep(w.ctx, w.upTo(500*time.Millisecond))
}

func (w *worker) watchHolder(f *holderFollower) {
	watcher, err := etcdutil.WatchHolder(w.caller(w.ctx), w.host.client, leaderName)
	if err != nil {
		w.operations.add("watch holder: "+watchEnd(err), 1)
		sleep(w.ctx, w.upTo(20*time.Millisecond))
		return
	}
	readFrom(w, watcher, usual, &f.reached, func(e etcdutil.Event[etcdutil.Contender]) {
		switch e.Type {
		case etcdutil.EventPut:
			f.seen = append(f.seen, holderSeen{e.Value.Token, e.Revision})
		case etcdutil.EventDelete:
			f.seen = append(f.seen, holderSeen{0, e.Revision})
		}
	})
	err = watcher.Close()
	w.operations.add("watch holder: "+watchEnd(err), 1)
	if errors.Is(err, etcdutil.ErrGap) {
		w.violate("watch holder: on host %d it ended with a gap: %v", f.host, err)
	}
}

// checkHolders checks that whoever was reported as the holder was it at that revision.
func (t *torture) checkHolders(changes []change) {
	held := holdersOf(leaderName, changes)
	for _, f := range t.holderFollowers {
		for _, s := range f.seen {
			if v := checkHolder(s, held); v != "" {
				t.violate("watch holder: on host %d: %s", f.host, v)
			}
		}
		t.operations.add("watch holder: checked", len(f.seen))
	}
}

func checkHolder(s holderSeen, held []holderSeen) string {
	n, _ := slices.BinarySearchFunc(held, s.revision+1, func(h holderSeen, r int64) int { return int(h.revision - r) })
	var is holderSeen
	if n > 0 {
		is = held[n-1]
	}
	if is.token == s.token {
		return ""
	}
	return fmt.Sprintf("at revision %d the holder was reported to be %d, but it was %d", s.revision, s.token, is.token)
}

// directlyBelow reports whether a key is of the form NAME/REST, with no further slash.
func directlyBelow(name, key string) bool {
	rest, below := strings.CutPrefix(key, name+"/")
	return below && !strings.Contains(rest, "/")
}

// holdersOf returns who held a lock from which revision on: the oldest of the contenders, which are
// the keys directly below the name that have a lease.
func holdersOf(name string, changes []change) (held []holderSeen) {
	contenders := make(map[string]int64)
	for _, c := range changes {
		if !directlyBelow(name, c.key) {
			continue
		}
		delete(contenders, c.key)
		if !c.deleted && c.lease != 0 {
			contenders[c.key] = c.create
		}
		var oldest int64
		for _, create := range contenders {
			if oldest == 0 || create < oldest {
				oldest = create
			}
		}
		if n := len(held); n > 0 && held[n-1].revision == c.revision {
			held = held[:n-1] // there was more in this transaction
		}
		held = append(held, holderSeen{oldest, c.revision})
	}
	return held
}
