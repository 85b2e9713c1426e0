package main

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"example.com/etcdutil"
	clientv3 "go.etcd.io/etcd/client/v3"
)

const (
	registeredPrefix = observedPrefix + "registered/"
	// foughtOverKey is registered by every host.
	foughtOverKey = registeredPrefix + "fought-over"
	// registeredWithin bounds how long a registered key may be missing while its host and etcd are
	// well, with time for a busy machine.
	registeredWithin = time.Second + 2*time.Second
	// registeredBehindHole bounds the same for a host for which a member is a black hole: the two
	// requests that register the key again may each meet it.
	registeredBehindHole = 2 * acquiredWithin
)

// A registrant keeps a key registered.
type registrant struct {
	host *host
	key  string
	mu   sync.Mutex
	// value is what the key has to have, and absent since when it has been seen without; "" and 0
	// if nothing is to be there, or it is.
	value string
	since time.Duration
}

// registry is all registrants of one etcd, and looks after them.
type registry struct {
	*torture
	client   *clientv3.Client
	prefix   string
	quietFor func(host int, from, to time.Duration) time.Duration
	all      []*registrant
}

func (r *registry) add(h *host) *registrant {
	one := &registrant{host: h, key: fmt.Sprintf("%s%d", r.prefix, h.id)}
	r.all = append(r.all, one)
	return one
}

func (t *torture) startRegistered(h *host) {
	r := t.registry.add(h)
	t.work(h, "", false, func(w *worker) { w.keepRegistered(r) })
	t.work(h, "", false, (*worker).fightOver)
}

// keepRegistered registers the key, changes its value at times, and closes it after a while.
func (w *worker) keepRegistered(r *registrant) {
	value := w.uniqueValue()
	reg, err := etcdutil.Register(w.caller(w.ctx), w.host.client, r.key, value, etcdutil.WithTTL(leaseTTL))
	w.operations.add("register key: "+outcomeOf(err), 1)
	if err != nil {
		sleep(w.ctx, w.upTo(20*time.Millisecond))
		return
	}
	r.expect(value)
	for end := w.now() + w.upTo(20*time.Second); reg.Err() == nil && (w.now() < end || w.settling.Load()); {
		sleep(reg, w.upTo(2*time.Second))
		if w.chance(30) && !w.settling.Load() {
			r.expect("") // until it is known which value is there
			value = w.uniqueValue()
			if err := w.set(reg, value); err == nil {
				r.expect(value)
			}
		}
	}
	if w.ctx.Err() == nil && reg.Err() != nil {
		w.violate("register: %s ended: %v", r.key, context.Cause(reg))
	}
	r.expect("")
	w.unregister(reg)
}

func (w *worker) set(reg *etcdutil.Registration[string], value string) error {
	ctx, cancel := context.WithTimeout(w.ctx, 5*time.Second)
	defer cancel()
	err := reg.Set(ctx, value)
	w.operations.add("register set: "+outcomeOf(err), 1)
	return err
}

func (w *worker) unregister(reg *etcdutil.Registration[string]) {
	err := reg.Close()
	w.operations.add("unregister: "+outcomeOf(err), 1)
}

// fightOver registers the key that all hosts want. Who is replaced gives up for a while.
func (w *worker) fightOver() {
	value := w.uniqueValue()
	reg, err := etcdutil.Register(w.caller(w.ctx), w.host.client, foughtOverKey, value, etcdutil.WithTTL(leaseTTL))
	w.operations.add("register, fought over: "+outcomeOf(err), 1)
	if err == nil {
		w.registered.add(value, w.now())
		sleep(reg, w.upTo(3*time.Second))
		if reg.Err() != nil && w.ctx.Err() == nil && !errors.Is(context.Cause(reg), etcdutil.ErrReplaced) {
			w.violate("register: %s ended on host %d, but was not replaced: %v", foughtOverKey, w.host.id, context.Cause(reg))
		}
		w.unregister(reg)
	}
	sleep(w.ctx, w.upTo(3*time.Second))
}

// registeredAt is when Register returned, by value.
type registeredAt struct {
	mu  sync.Mutex
	all map[string]time.Duration
}

func (r *registeredAt) add(value string, at time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.all == nil {
		r.all = make(map[string]time.Duration)
	}
	r.all[value] = at
}

func (r *registrant) expect(value string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.value, r.since = value, 0
}

// look notes what the key has, and reports since when it has been missing.
func (r *registrant) look(has string, now time.Duration) (since time.Duration, missing bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.value == "" || r.value == has {
		r.since = 0
		return 0, false
	}
	if r.since == 0 {
		r.since = now
	}
	return r.since, true
}

// within bounds how long the key may be missing.
func (r *registrant) within() time.Duration {
	if hosts+calmHosts <= r.host.id && r.host.id < crowdHost {
		return registeredBehindHole
	}
	return registeredWithin
}

// run looks again and again whether the registered keys are there.
func (r *registry) run(ctx context.Context) {
	for ctx.Err() == nil {
		r.look(ctx)
		sleep(ctx, 100*time.Millisecond)
	}
}

func (r *registry) look(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	asked := r.now()
	resp, err := r.client.Get(ctx, r.prefix, clientv3.WithPrefix())
	if err != nil {
		return
	}
	values := make(map[string]string)
	for _, kv := range resp.Kvs {
		values[string(kv.Key)], _ = decode(string(kv.Value))
	}
	for _, one := range r.all {
		since, missing := one.look(values[one.key], asked)
		if quiet := r.quietFor(one.host.id, since, asked); missing && quiet > one.within() {
			r.violate("register: %s has been without its value from %v to %v, and all was quiet for %v", one.key, ms(since), ms(asked), ms(quiet))
			one.expect("")
		}
	}
}

// deleteRegistered deletes a registered key behind its owner's back.
func (t *torture) deleteRegistered(f fault) bool {
	ctx, cancel := context.WithTimeout(t.ctx, time.Second)
	defer cancel()
	_, err := t.admin.Delete(ctx, fmt.Sprintf("%s%d", registeredPrefix, f.Host))
	return err == nil
}

// checkRegistered checks that nobody wrote the key that all want after having been replaced.
func (t *torture) checkRegistered(changes []change) {
	for _, v := range checkFlapping(changesOf(foughtOverKey, changes), t.registered.all) {
		t.violate("register: %s: %s", foughtOverKey, v)
	}
}

// oracleDelay is by how much the oracle may see a change late.
const oracleDelay = 2 * time.Second

// checkFlapping finds who wrote over another after having been replaced. Before its Register
// returned a registration may do that: its first write may have been applied and replaced without
// its knowledge.
func checkFlapping(changes []change, returned map[string]time.Duration) (violations []string) {
	last := make(map[string]int64) // by value, which is of one registration
	current := ""
	for _, c := range changes {
		value, _ := decode(c.value)
		if c.deleted {
			current = "" // whoever has not seen who replaced it may come back
			clear(last)
		}
		if c.deleted || value == current {
			continue
		}
		at, again := last[value]
		if done, known := returned[value]; again && known && c.at > done+oracleDelay {
			violations = append(violations, fmt.Sprintf("%s, registered at %v, wrote it at revision %d, was replaced, and wrote it again at revision %d, at %v",
				value, ms(done), at, c.revision, ms(c.at)))
		}
		current = value
		last[value] = c.revision
	}
	return violations
}
