package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"example.com/etcdutil"
	"example.com/etcdutil/etcdtest"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// The island is an etcd of one member with clients of its own. It asks for passwords, its operator
// takes a permission away and gives it back, and restores it from backups. Each restore begins an
// epoch, which has a history of its own: tokens may be smaller than before, and revisions come a
// second time. So what was seen is compared with the history of one epoch, and never with a mixture
// of two.
type island struct {
	*torture
	cluster *etcdtest.Cluster
	root    *clientv3.Client
	hosts   []*host
	ledger  *ledger
	losses  leaseLosses

	disturbances *troubles // restores and denials
	registry     *registry

	writing sync.RWMutex // held by a restore, and shared by who changes observed keys
	stop    func()       // ends the current oracle

	mu        sync.Mutex
	histories []*oracle // one of each epoch
	restoring bool      // the next epoch may have begun
	restores  []span
	denials   []span // when the permission was away
	observed  []*segment
	openedIn  map[*segment]int // the epoch
	states    []islandState
	followers []*islandFollower
}

// A span is a time on the run's clock.
type span struct{ from, to time.Duration }

func (s span) overlaps(from, to time.Duration) bool { return s.from < to && from < s.to }

const (
	islandHosts = 3
	// islandTTL is long enough that a lease outlives a denial, and short enough that a lost one is
	// gone soon.
	islandTTL = 5 * time.Second
	// islandRecovery bounds how late a holder is notified that a restore has taken its key away.
	islandRecovery = 7 * time.Second

	islandOwn    = "island/own"    // held by leases of their own
	islandShared = "island/shared" // held by shared leases, for a moment
	islandLong   = "island/long"   // held by shared leases, across restores
	islandTaken  = "island/taken"  // whose key is deleted
)

const (
	islandUser     = "user"
	islandPassword = "secret"
	islandKeys     = 4
)

const islandPrefix = observedPrefix + "island/"

func islandKey(i int) string { return fmt.Sprintf("%sk%d", islandPrefix, i) }

func newIsland(t *torture) (_ *island, err error) {
	i := &island{
		torture: t, ledger: newLedger(t.clock), openedIn: make(map[*segment]int), stop: func() {},
		disturbances: &troubles{clock: t.clock},
	}
	defer func() {
		if err != nil {
			i.close()
		}
	}()
	// The user's permission comes and goes.
	if i.cluster, err = etcdtest.NewSecure(1, etcdtest.Security{Users: []etcdtest.User{
		{Name: "root", Password: islandPassword},
		{Name: islandUser, Password: islandPassword, Permissions: []etcdtest.Permission{{Type: clientv3.PermReadWrite, Prefix: true}}},
	}}); err != nil {
		return nil, fmt.Errorf("island: %w", err)
	}
	if i.root, err = connect(clientConfig(i.cluster.Endpoints()), "root"); err != nil {
		return nil, err
	}
	for id := range islandHosts {
		h, err := newHost(firstIslander+id, i.cluster.Endpoints())
		if err != nil {
			return nil, err
		}
		i.hosts = append(i.hosts, h)
		if h.client, err = connect(clientConfig(h.endpoints()), islandUser); err != nil {
			return nil, err
		}
	}
	i.registry = &registry{torture: t, client: i.root, prefix: "island/registered/", quietFor: i.quietFor}
	i.beginHistory()
	return i, nil
}

func connect(c clientv3.Config, user string) (*clientv3.Client, error) {
	c.Username, c.Password = user, islandPassword
	return clientv3.New(c)
}

// everything is the range of all keys.
var everything = struct{ Key, End string }{"\x00", "\x00"}

// beginHistory has a new oracle follow etcd from its first revision on.
func (i *island) beginHistory() {
	ctx, cancel := context.WithCancel(context.Background())
	o := &oracle{clock: i.clock}
	done := make(chan struct{})
	go func() {
		defer close(done)
		o.run(ctx, i.root)
	}()
	i.stop = func() {
		cancel()
		<-done
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	i.histories, i.restoring = append(i.histories, o), false
}

// epoch is the number of the current history.
func (i *island) epoch() int {
	i.mu.Lock()
	defer i.mu.Unlock()
	return len(i.histories) - 1
}

// latestEpoch is the number of the newest history that a client may see.
func (i *island) latestEpoch() int {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.restoring {
		return len(i.histories)
	}
	return len(i.histories) - 1
}

// endHistory waits until the oracle has seen all changes, of which no more are made, and ends it.
func (i *island) endHistory() error {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	resp, err := i.root.Get(ctx, observedPrefix)
	if err == nil {
		err = i.histories[i.epoch()].await(ctx, resp.Header.Revision)
	}
	i.stop()
	return err
}

// restore makes a backup, waits, and restores etcd from it under the locks that are held then.
func (i *island) restore(f fault) error {
	if err := i.cluster.Backup(); err != nil {
		return err
	}
	sleep(context.Background(), f.For)
	i.writing.Lock()
	defer i.writing.Unlock()
	if err := i.endHistory(); err != nil {
		return err
	}
	defer i.disturbances.begin(everyHost)()
	i.mu.Lock()
	i.restoring = true
	i.mu.Unlock()
	from := i.now()
	if err := i.cluster.Restore(); err != nil {
		return err
	}
	if err := i.permit(context.Background()); err != nil { // the backup may be of a denial
		return err
	}
	i.mu.Lock()
	i.restores = append(i.restores, span{from, i.now()})
	i.mu.Unlock()
	i.beginHistory()
	return nil
}

// deny takes the user's permission away, breaks all connections, so that everything is asked for
// anew, and gives the permission back.
func (i *island) deny(f fault) error {
	ctx, cancel := context.WithTimeout(context.Background(), f.For+20*time.Second)
	defer cancel()
	defer i.disturbances.begin(everyHost)()
	from := i.now()
	if _, err := i.root.RoleRevokePermission(ctx, islandUser, everything.Key, everything.End); err != nil {
		return err
	}
	for _, h := range i.hosts {
		for _, l := range h.links {
			l.Reset()
		}
	}
	sleep(ctx, f.For)
	err := i.permit(ctx)
	i.mu.Lock()
	defer i.mu.Unlock()
	i.denials = append(i.denials, span{from, i.now()})
	return err
}

// permit gives the user its permission.
func (i *island) permit(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	for {
		_, err := i.root.RoleGrantPermission(ctx, islandUser, everything.Key, everything.End, clientv3.PermissionType(clientv3.PermReadWrite))
		if err == nil || ctx.Err() != nil {
			return err
		}
		sleep(ctx, 50*time.Millisecond) // etcd may just have been restored
	}
}

// deleteKey takes a lock from its holder.
func (i *island) deleteKey() bool {
	h := i.ledger.holder(islandTaken)
	if h == nil {
		return false
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	return deleteLockKey(ctx, i.root, i.ledger, h)
}

// islander is a worker on the island.
type islander struct {
	*worker
	island *island
}

// work runs a step again and again, like the torture's.
func (i *island) work(h *host, name string, contends bool, step func(w *islander)) {
	i.torture.work(h, name, contends, func(w *worker) {
		w.ledger = i.ledger
		step(&islander{w, i})
	})
}

func (i *island) start() {
	for _, h := range i.hosts {
		lease := &sharedLease{host: h, ttl: islandTTL, lost: i.losses.add}
		i.work(h, islandOwn, true, func(w *islander) { w.holdFor(islandOwn, 1500*time.Millisecond, etcdutil.WithTTL(islandTTL)) })
		i.work(h, islandTaken, true, func(w *islander) { w.holdFor(islandTaken, 8*time.Second, etcdutil.WithTTL(islandTTL)) })
		i.work(h, islandShared, true, func(w *islander) { w.holdBy(lease, islandShared, 200*time.Millisecond) })
		i.work(h, islandLong, true, func(w *islander) { w.holdBy(lease, islandLong, 8*time.Second) })
		i.atEnd(lease.close)
		i.work(h, "", false, (*islander).changeKeys)
		for key := range 2 {
			f := i.follower(fmt.Sprintf("the watcher of %s on host %d", islandKey(key), h.id))
			i.work(h, "", false, func(w *islander) { w.observe(f, islandKey(key)) })
		}
		f := i.follower(fmt.Sprintf("the snapshot follower on host %d", h.id))
		i.work(h, "", false, func(w *islander) { w.followSnapshot(f) })
		mirror := i.follower(fmt.Sprintf("the mirror on host %d", h.id))
		i.work(h, "", false, func(w *islander) { w.keepMirror(mirror) })
		registrant := i.registry.add(h)
		i.work(h, "", false, func(w *islander) { w.keepRegistered(registrant) })
	}
}

func (w *islander) holdFor(name string, atMost time.Duration, opts ...etcdutil.LockOption) {
	if lock, h := w.acquire(w.ctx, name, opts...); lock != nil {
		w.hold(lock, w.upTo(atMost))
		w.release(lock, h)
		sleep(w.ctx, w.upTo(50*time.Millisecond))
	}
}

func (w *islander) holdBy(shared *sharedLease, name string, atMost time.Duration) {
	if lease := shared.get(w.worker); lease != nil {
		w.holdFor(name, atMost, etcdutil.WithLease(lease))
	}
}

// changeKeys changes a key, but not while etcd is restored. Keys are quiet for longer than a
// restore takes.
func (w *islander) changeKeys() {
	w.changeKey()
	sleep(w.ctx, w.upTo(time.Second))
}

func (w *islander) changeKey() {
	w.island.writing.RLock()
	defer w.island.writing.RUnlock()
	if w.settling.Load() {
		return
	}
	ctx, cancel := context.WithTimeout(w.ctx, 2*time.Second)
	defer cancel()
	_, err := w.island.root.Do(ctx, w.change(islandKey(w.rand.IntN(islandKeys)), w.uniqueValue()))
	w.operations.add("island: change: "+outcomeOf(err), 1)
}

// An islandFollower follows keys, and is right after the faults when it has seen the last value.
type islandFollower struct {
	name string
	mu   sync.Mutex
	last string
}

func (i *island) follower(name string) *islandFollower {
	f := &islandFollower{name: name}
	i.followers = append(i.followers, f)
	return f
}

func (f *islandFollower) saw(e etcdutil.Event[string]) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if e.Type == etcdutil.EventPut {
		f.last = e.Value
	}
}

func (f *islandFollower) has(value string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.last == value
}

// observe takes the value of a key, and follows every later change until a gap or the end.
func (w *islander) observe(f *islandFollower, key string) {
	epoch := w.island.epoch()
	ctx, cancel := context.WithTimeout(w.ctx, 2*time.Second)
	resp, err := w.host.client.Get(ctx, key)
	cancel()
	if err != nil {
		sleep(w.ctx, w.upTo(20*time.Millisecond))
		return
	}
	for _, kv := range resp.Kvs {
		var value string
		if json.Unmarshal(kv.Value, &value) == nil {
			f.saw(etcdutil.Event[string]{Type: etcdutil.EventPut, Value: value})
		}
	}
	now := resp.Header.Revision
	watcher, err := etcdutil.Watch[string](w.ctx, w.host.client, key, etcdutil.WithRevision(now+1))
	if err != nil {
		w.operations.add("island: watch: "+watchEnd(err), 1)
		sleep(w.ctx, w.upTo(20*time.Millisecond))
		return
	}
	s := &segment{key: key, from: now + 1}
	for e := range watcher.Events() {
		s.events = append(s.events, e)
		f.saw(e)
	}
	s.upTo = max(watcher.Revision(), now)
	err = watcher.Close()
	w.operations.add("island: watch: "+watchEnd(err), 1)
	s.gap = errors.Is(err, etcdutil.ErrGap)
	w.island.observedBy(f, s, epoch)
}

func (i *island) observedBy(f *islandFollower, s *segment, epoch int) {
	i.mu.Lock()
	defer i.mu.Unlock()
	s.name = f.name
	i.observed = append(i.observed, s)
	i.openedIn[s] = epoch
}

// islandState is a state that a follower took for etcd's, in one of the epochs.
type islandState struct {
	state
	follower    string
	first, last int // epochs
}

func (w *islander) followSnapshot(f *islandFollower) {
	epoch := w.island.epoch()
	watcher, err := etcdutil.Watch[string](w.ctx, w.host.client, islandPrefix, etcdutil.WithPrefix(), etcdutil.WithSnapshot())
	if err != nil {
		w.operations.add("island: snapshot: "+watchEnd(err), 1)
		sleep(w.ctx, w.upTo(20*time.Millisecond))
		return
	}
	keys := make(map[string]string)
	for e := range watcher.Events() {
		follow(keys, []etcdutil.Event[string]{e})
		f.saw(e)
		if e.Type == etcdutil.EventSynced {
			s := islandState{state{revision: e.Revision, keys: maps.Clone(keys)}, f.name, epoch, w.island.latestEpoch()}
			w.island.mu.Lock()
			w.island.states = append(w.island.states, s)
			w.island.mu.Unlock()
		}
	}
	err = watcher.Close()
	w.operations.add("island: snapshot: "+watchEnd(err), 1)
	if errors.Is(err, etcdutil.ErrGap) {
		w.violate("island: %s ended with a gap: %v", f.name, err)
	}
}

// keepMirror keeps a mirror to the end, and reads one key of it.
func (w *islander) keepMirror(f *islandFollower) {
	m, err := etcdutil.NewMirror[string](w.ctx, w.host.client, islandPrefix, etcdutil.WithPrefix())
	if err != nil {
		w.operations.add("island: mirror: "+outcomeOf(err), 1)
		sleep(w.ctx, w.upTo(20*time.Millisecond))
		return
	}
	defer m.Close()
	for m.Err() == nil {
		value, _ := m.Get(islandKey(0))
		f.saw(etcdutil.Event[string]{Type: etcdutil.EventPut, Value: value})
		sleep(m, w.upTo(50*time.Millisecond))
	}
	if w.ctx.Err() == nil {
		w.violate("island: %s ended: %v", f.name, context.Cause(m))
	}
}

// quietFor is for how long within a time nothing disturbed the island, and this process was not
// stalled.
func (i *island) quietFor(_ int, from, to time.Duration) time.Duration {
	return to - from - i.disturbances.within(everyHost, from, to) - slowness*within(i.pulse.all(), from, to)
}

// settle writes a last value of every key, and waits until all have seen it.
func (i *island) settle() error {
	begun := i.now()
	last, err := i.writeLast()
	if err != nil {
		return fmt.Errorf("island: after the faults: %w", err)
	}
	behind := func() (all []*islandFollower) {
		for _, f := range i.followers {
			if !f.has(last) {
				all = append(all, f)
			}
		}
		return all
	}
	for len(behind()) > 0 && i.ran(begun) < liveness {
		sleep(i.ctx, 10*time.Millisecond)
	}
	for _, f := range behind() {
		i.violate("island: liveness: %v after the faults had stopped, %s has not seen the last change", liveness, f.name)
	}
	return nil
}

// writeLast writes all keys, when no other change is made any more.
func (i *island) writeLast() (last string, err error) {
	i.writing.Lock()
	defer i.writing.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	last = fmt.Sprintf("last-%d", i.now())
	for key := range islandKeys {
		_, putErr := i.root.Put(ctx, islandKey(key), `"`+last+`"`)
		err = errors.Join(err, putErr)
	}
	return last, err
}

// check compares what was seen with the histories.
func (i *island) check() error {
	if err := i.endHistory(); err != nil {
		return fmt.Errorf("island: %w", err)
	}
	var histories [][]change
	for _, o := range i.histories {
		changes, err := o.all()
		if err != nil {
			return fmt.Errorf("island: %w", err)
		}
		histories = append(histories, changes)
	}
	for _, s := range i.observed {
		if v := checkEpochs(s, histories[i.openedIn[s]:]); v != "" {
			i.violate("island: %s: %s", s.name, v)
		}
	}
	for _, s := range i.states {
		if v := checkStateEpochs(s.state, histories[s.first:s.last+1]); v != "" {
			i.violate("island: %s: %s", s.follower, v)
		}
	}
	i.operations.add("island: snapshot states checked", len(i.states))
	i.operations.add("island: watchers checked", len(i.observed))
	i.checkHoldings()
	return nil
}

// checkEpochs checks that what a watcher received is the history of one epoch.
func checkEpochs(s *segment, histories [][]change) string {
	o := &observer{key: s.key}
	var first string
	for _, h := range histories {
		violations := checkSegment(&segment{from: s.from, upTo: s.upTo, events: s.events}, o.of(h))
		if len(violations) == 0 {
			return ""
		}
		if first == "" {
			first = violations[0]
		}
	}
	return fmt.Sprintf("from %d up to %d, received what is in no epoch's history; in the first of %d: %s", s.from, s.upTo, len(histories), first)
}

func checkStateEpochs(s state, histories [][]change) (violation string) {
	for _, h := range histories {
		if violation = checkState(s, islandPrefix, h); violation == "" {
			return ""
		}
	}
	return violation
}

// checkHoldings checks that no two hold a lock at a time, and that tokens grow, but for what a
// restore explains: the holder from before it may be notified a little later.
func (i *island) checkHoldings() {
	stalls := i.pulse.all()
	for name, holdings := range i.ledger.byName() {
		for _, v := range checkRestored(name, holdings, i.restores, stalls) {
			i.violate("island: %s", v)
		}
		_, violations := checkTold(holdings, func(_ int, from, to time.Duration) bool {
			return disturbed(slices.Concat(i.restores, i.denials), from, to) || within(stalls, from, to) > (to-from)/4
		})
		for _, v := range violations {
			i.violate("island: %s", v)
		}
	}
	for _, l := range i.losses.all() {
		if v := checkLoss(l, i.restores, i.denials, stalls); v != "" {
			i.violate("island: %s", v)
		}
	}
}

// disturbed reports whether one of the spans, or the recovery after it, was within a time.
func disturbed(spans []span, from, to time.Duration) bool {
	return slices.ContainsFunc(spans, func(s span) bool { return span{s.from, s.to + recovery}.overlaps(from, to) })
}

func checkRestored(name string, holdings []*holding, restores []span, stalls []stall) (violations []string) {
	sorted := slices.DeleteFunc(slices.Clone(holdings), func(h *holding) bool { return h.disturbed })
	slices.SortStableFunc(sorted, func(a, b *holding) int { return int(a.acquired - b.acquired) })
	for n, next := range sorted {
		if n == 0 {
			continue
		}
		between := func(r span) bool { return r.overlaps(sorted[n-1].acquired-islandRecovery, next.acquired) }
		if next.token <= sorted[n-1].token && !slices.ContainsFunc(restores, between) {
			violations = append(violations, fmt.Sprintf("exclusion: %s: the token did not grow: %v, then %v", name, sorted[n-1], next))
		}
		for _, last := range sorted[:n] {
			late := last.end - next.acquired
			excused := func(r span) bool {
				told := r.to + islandRecovery
				told += slowness * within(stalls, r.from, told)
				return last.acquired <= r.to && next.acquired >= r.from && last.end <= told
			}
			if late > 0 && within(stalls, next.acquired-time.Second, last.end) < late && !slices.ContainsFunc(restores, excused) {
				violations = append(violations, fmt.Sprintf("exclusion: %s: two held it for %v: %v, and %v", name, ms(late), last, next))
			}
		}
	}
	return violations
}

// A leaseLoss is a shared lease that was lost.
type leaseLoss struct {
	at  time.Duration
	err error
}

type leaseLosses struct {
	mu   sync.Mutex
	list []leaseLoss
}

func (l *leaseLosses) add(at time.Duration, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.list = append(l.list, leaseLoss{at, err})
}

func (l *leaseLosses) all() []leaseLoss {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.list)
}

// checkLoss checks that a lease was lost for a reason: a restore, or a process that got to run too
// seldom. A permission that was away for less than the lease had left is none.
func checkLoss(l leaseLoss, restores, denials []span, stalls []stall) string {
	since := l.at - islandTTL - recovery
	if disturbed(restores, since, l.at) || within(stalls, since, l.at) > islandTTL/10 {
		return ""
	}
	return fmt.Sprintf("a lease was lost at %v, %v; the permission was away in %v", ms(l.at), l.err, denials)
}

func (i *island) close() {
	i.stop()
	for _, h := range i.hosts {
		h.close()
	}
	if i.root != nil {
		_ = i.root.Close()
	}
	if i.cluster != nil {
		_ = i.cluster.Close()
	}
}
