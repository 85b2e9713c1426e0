package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	"example.com/etcdutil"
	clientv3 "go.etcd.io/etcd/client/v3"
)

const (
	// leaderName is what the hosts' leaders lead. The oracle sees all its contenders.
	leaderName    = observedPrefix + "leader"
	leaderCounter = "leader-counter"
)

// errResigned is with what a leader resigns at times.
var errResigned = errors.New("resigned with an error")

// startLead has a client campaign.
func (t *torture) startLead(h *host) {
	t.work(h, leaderName, true, (*worker).campaign)
}

// campaign leads until the leader resigns, and checks what Lead returns: nothing else may end it.
func (w *worker) campaign() {
	var resigned error
	returned := false
	err := etcdutil.Lead(w.caller(w.ctx), w.host.client, leaderName, func(ctx context.Context) error {
		resigned, returned = w.lead(ctx), true
		return resigned
	}, etcdutil.WithTTL(leaseTTL), etcdutil.WithValue(strconv.Itoa(w.host.id)))
	switch {
	case w.ctx.Err() != nil:
	case !returned:
		w.violate("lead: Lead on host %d returned although nobody had led: %v", w.host.id, err)
	case !errors.Is(err, resigned):
		w.violate("lead: Lead on host %d returned %v, but its leader %v", w.host.id, err, resigned)
	}
	w.operations.add("lead: "+outcomeOf(err), 1)
	sleep(w.ctx, w.upTo(50*time.Millisecond))
}

// lead counts, under the leader's lock, for a while.
func (w *worker) lead(ctx context.Context) error {
	lock, ok := etcdutil.LockFrom(ctx)
	if !ok {
		w.violate("lead: the leader's context on host %d has no lock", w.host.id)
		return errResigned
	}
	h := w.ledger.beginUnder(ctx, w.host.id, lock)
	defer w.ledger.release(h)
	w.holders.add(leaderName, 1)
	w.waiting.had(w.now())
	for range w.upToTimes(20) {
		if ctx.Err() != nil {
			break
		}
		w.countAsLeader(lock)
		w.hold(ctx, w.upTo(100*time.Millisecond))
	}
	w.awaitNetwork(ctx)
	if w.chance(20) {
		return errResigned
	}
	return nil
}

// countAsLeader reads the counter and writes the next number: two leaders would write the same.
func (w *worker) countAsLeader(lock *etcdutil.Lock) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(lock), 2*time.Second)
	defer cancel()
	n, err := readNumber(ctx, w.host.client, leaderCounter)
	if err != nil {
		return
	}
	_, err = lock.Commit(ctx, clientv3.OpPut(leaderCounter, strconv.Itoa(n+1)))
	o := outcomeOfCommit(err)
	w.counted.add(string(o), 1)
	w.operations.add("lead: count: "+string(o), 1)
}

func readNumber(ctx context.Context, client *clientv3.Client, key string) (int, error) {
	resp, err := client.Get(ctx, key)
	if err != nil || len(resp.Kvs) == 0 {
		return 0, err
	}
	return strconv.Atoi(string(resp.Kvs[0].Value))
}

// checkLead checks that no count of a leader's is lost.
func (t *torture) checkLead(ctx context.Context) error {
	n, err := readNumber(ctx, t.admin, leaderCounter)
	if err != nil {
		return fmt.Errorf("read %s: %w", leaderCounter, err)
	}
	for _, v := range checkCount(n, t.counted.get(string(acknowledged)), t.counted.get(string(unknown))) {
		t.violate("lead: %s", v)
	}
	return nil
}

func checkCount(n, done, maybe int) (violations []string) {
	if n < done || n > done+maybe {
		violations = append(violations, fmt.Sprintf("leaders have counted to %d, but %d counts were acknowledged and %d are unknown", n, done, maybe))
	}
	return violations
}
