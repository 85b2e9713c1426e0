package main

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

const (
	crowdPrefix = observedPrefix + "crowd/"
	// usualCrowd is how many watchers one client has, each of one of few keys. Two cores that also
	// run everything else are not enough for many more.
	usualCrowd = 300
	crowdKeys  = 250
	// crowdPace is how long a watcher of the crowd lasts before the next one goes on behind it.
	crowdPace = 40 * time.Second
	// hotKey is changed again and again. Latecomers watch it, each for up to latecomerPace, and
	// pause for as long: what they watch has happened before.
	hotKey        = crowdPrefix + "hot"
	latecomers    = 40
	latecomerPace = 4 * time.Second
	// largeKey gets large values, which watchers with slow readers cannot all hold.
	largeKey   = crowdPrefix + "large"
	largeValue = 256 << 10
	// slowReaders is how many readers of largeKey read nothing until the faults have stopped; as
	// many others never read.
	slowReaders = 3
)

func crowdKey(i int) string { return crowdPrefix + strconv.Itoa(i%crowdKeys) }

// startCrowd has one client watch with very many watchers, and changes what they watch. Readers
// that are stuck must hold up no other.
func (t *torture) startCrowd(h *host) {
	for i := range t.crowd {
		t.joinCrowd(h, crowdKey(i), reading{upTo: crowdPace})
	}
	for range latecomers {
		t.joinCrowd(h, hotKey, reading{upTo: latecomerPace, pause: latecomerPace})
	}
	for range slowReaders {
		t.joinCrowd(h, largeKey, reading{upTo: crowdPace, stuck: untilSettling})
		t.joinCrowd(h, largeKey, reading{upTo: crowdPace, stuck: untilTheEnd})
	}
	t.work(h, "", false, (*worker).changeCrowd)
	t.work(h, "", false, (*worker).changeLarge)
}

func (t *torture) joinCrowd(h *host, key string, how reading) {
	o := &observer{host: h.id, key: key, reading: how}
	o.reached.name = fmt.Sprintf("watcher %d of the crowd, of %s", len(t.observers), key)
	t.observers = append(t.observers, o)
	if how.stuck != untilTheEnd {
		t.followers = append(t.followers, &o.reached)
	}
	t.work(h, "", false, func(w *worker) { w.observe(o) })
}

func (w *worker) changeLarge() {
	ctx, cancel := context.WithTimeout(w.ctx, 2*time.Second)
	defer cancel()
	_, _ = w.admin.Put(ctx, largeKey, strconv.Quote(w.uniqueValue()+strings.Repeat(".", largeValue)))
	sleep(w.ctx, 200*time.Millisecond+10*rest)
}

// changeCrowd changes a key, or many in one transaction.
func (w *worker) changeCrowd() {
	ctx, cancel := context.WithTimeout(w.ctx, 2*time.Second)
	defer cancel()
	many := 1
	if w.chance(2) {
		many = 20
	}
	ops := []clientv3.Op{w.change(hotKey, w.uniqueValue())}
	for first := w.rand.IntN(crowdKeys); len(ops) <= many; {
		ops = append(ops, w.change(crowdKey(first+len(ops)), w.uniqueValue()))
	}
	_, err := w.admin.Txn(ctx).Then(ops...).Commit()
	w.operations.add("crowd: change: "+outcomeOf(err), 1)
	sleep(w.ctx, w.upTo(60*time.Millisecond))
}
