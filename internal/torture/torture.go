package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"example.com/etcdutil/etcdtest"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// torture is one run.
type torture struct {
	seed     uint64
	length   time.Duration
	pictures string
	crowd    int // how many watchers the client has that has the most
	clock
	begun time.Duration // when the schedule was

	ctx      context.Context // ends when the workloads are to end
	end      context.CancelFunc
	settling atomic.Bool // the faults have stopped
	working  sync.WaitGroup
	atEnds   []func()

	cluster  *etcdtest.Cluster
	admin    *clientv3.Client // straight to the members
	hosts    []*host
	children []*child
	apart    []*host // the children's
	island   *island

	ledger     *ledger
	pulse      *pulse
	troubles   *troubles
	oracle     *oracle
	history    *history
	elements   map[lockset]*elements
	waiters    *waiters
	operations *tally
	faults     *tally
	holders    *tally
	observers  []*observer
	snapshots  []*snapshotFollower
	followers  []*progress
	workers    atomic.Int64
	log        *journal
	logs       logs
	calmLosses leaseLosses
	logReaders []*logFollower

	counted         tally // by leaders, by outcome
	holderFollowers []*holderFollower
	registry        *registry
	registered      registeredAt
	mirrors         []*mirrorFollower
	mirrorWrites    mirrorWrites
	disturbedLog    *journal
	commits         appends      // of disturbedKey
	compacted       atomic.Int64 // the last revision that may be

	mu         sync.Mutex
	rand       *rand.Rand
	violations []string
	err        error // why the run itself is worth nothing
}

// run tortures the library. The error is for what kept it from that; broken promises are in the
// report.
func run(seed uint64, length time.Duration, pictures string, crowd int) (*report, error) {
	c := clock{time.Now()}
	t := &torture{
		seed: seed, length: length, pictures: pictures, crowd: crowd, clock: c,
		ledger: newLedger(c), pulse: &pulse{clock: c}, troubles: &troubles{clock: c}, oracle: &oracle{clock: c}, history: &history{},
		elements: map[lockset]*elements{fencedSet: {}, controlSet: {}, quickSet: {}},
		log:      &journal{key: logName}, disturbedLog: &journal{key: disturbedLogName},
		waiters: &waiters{}, operations: &tally{}, faults: &tally{}, holders: &tally{},
		rand: rand.New(rand.NewPCG(seed, 1<<32)),
	}
	t.ctx, t.end = context.WithCancel(context.Background())
	defer t.tearDown()
	if err := t.setUp(); err != nil {
		return nil, err
	}
	r := &report{seed: seed, length: length, operations: t.operations, faults: t.faults, holders: t.holders}
	background, stop := context.WithCancel(context.Background())
	var following sync.WaitGroup
	following.Go(func() { t.oracle.run(background, t.admin) })
	following.Go(func() { t.pulse.run(background) })
	defer following.Wait()
	defer stop()

	t.startWorkloads()
	following.Go(func() { t.registry.run(background) })
	following.Go(func() { t.island.registry.run(background) })
	t.begun = t.now()
	t.inject(plan(seed, length))
	sleep(t.ctx, t.begun+length-t.now())
	if err := t.healAll(); err != nil {
		return nil, err
	}
	if err := t.settle(r); err != nil {
		return nil, err
	}
	if err := t.bite(); err != nil {
		return nil, err
	}
	t.stopWorkloads()
	if err := t.check(r); err != nil {
		return nil, err
	}
	stop()
	following.Wait()
	t.checkLeaks(r)
	r.violations = t.violations
	return r, t.err
}

func (t *torture) setUp() (err error) {
	if t.cluster, err = etcdtest.New(members); err != nil {
		return err
	}
	if t.admin, err = newClient(t.cluster.Endpoints()); err != nil {
		return err
	}
	t.registry = &registry{torture: t, client: t.admin, prefix: registeredPrefix, quietFor: t.quietFor}
	for id := range hosts + calmHosts {
		h, err := newHost(id, t.cluster.Endpoints())
		if err != nil {
			return err
		}
		t.hosts = append(t.hosts, h)
		if err := h.connect(); err != nil {
			return err
		}
	}
	for range holedHosts {
		h, err := newHoledHost(len(t.hosts), t.cluster.Endpoints())
		if err != nil {
			return err
		}
		t.hosts = append(t.hosts, h)
	}
	crowd, err := newHost(crowdHost, t.cluster.Endpoints())
	if err != nil {
		return err
	}
	t.hosts = append(t.hosts, crowd)
	if err := crowd.connect(); err != nil {
		return err
	}
	if t.island, err = newIsland(t); err != nil {
		return err
	}
	for i, s := range []lockset{fencedSet, controlSet} {
		h, err := newHost(len(t.hosts)+i, t.cluster.Endpoints())
		if err != nil {
			return err
		}
		t.apart = append(t.apart, h)
		c, err := t.startChild(h, s)
		if err != nil {
			return err
		}
		t.children = append(t.children, c)
	}
	for _, c := range t.children {
		select {
		case <-c.ready:
		case <-c.ended:
			return errors.New("a child ended before it was ready")
		}
	}
	return nil
}

// startWorkloads starts five clients of each, or more. Of the lock-sets one is a child, which
// already queues.
func (t *torture) startWorkloads() {
	for _, h := range t.hosts[hosts+calmHosts : crowdHost] {
		t.startHoled(h)
	}
	t.startCrowd(t.hosts[crowdHost])
	for _, h := range t.hosts[hosts : hosts+calmHosts] {
		t.startSharing(h, reusedName, calmTTL, t.calmLosses.add)
		t.work(h, disturbedName, true, (*worker).holdDisturbed)
	}
	for _, h := range t.hosts[:hosts] {
		if h.id > 0 {
			t.startLockset(h, fencedSet)
			t.startLockset(h, controlSet)
		}
		t.startLockset(h, quickSet)
		t.startExclusion(h)
		t.startRegister(h)
		t.startWatch(h)
		t.startLog(h)
		t.startLead(h)
		t.startWatchHolder(h)
	}
	for _, h := range t.hosts[:crowdHost] {
		t.startMirror(h)
		t.startRegistered(h)
	}
	t.island.start()
}

// liveness is how long after the faults everybody may take to be served. It counts the time in
// which this process got to run.
const liveness = 45 * time.Second

const (
	slowness = 3               // how often stalls count
	overdue  = 2 * time.Minute // no slowness explains that
)

// settle waits until every waiter has had the lock once more, and every watcher has caught up.
func (t *torture) settle(r *report) error {
	t.settling.Store(true)
	healed := t.now()
	var settling sync.WaitGroup
	defer settling.Wait()
	settling.Go(func() {
		if err := t.island.settle(); err != nil {
			t.fail(err)
		}
	})
	target, err := t.revision(t.ctx)
	if err != nil {
		return fmt.Errorf("after the faults: %w", err)
	}
	for waiting, behind := 1, 1; waiting+behind > 0 && t.ran(healed) < liveness; sleep(t.ctx, 10*time.Millisecond) {
		if waiting = len(t.waiters.since(healed)); waiting > 0 {
			r.everybodyHadTheLock = t.now() - healed
		}
		if behind = len(t.followersBehind(target)); behind > 0 {
			r.watchersCaughtUp = t.now() - healed
		}
	}
	for _, w := range t.waiters.since(healed) {
		t.violate("liveness: %v after the faults had stopped, the client of %s on host %d has not had the lock; last at %v; the queue is %s",
			liveness, w.name, w.host, ms(w.last), t.queueOf(w.name))
	}
	for _, f := range t.followersBehind(target) {
		t.violate("liveness: %v after the faults had stopped, %v, and etcd was at %d", liveness, f, target)
	}
	return nil
}

// queueOf describes the keys of a lock's contenders, the oldest first.
func (t *torture) queueOf(name string) string {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	resp, err := t.admin.Get(ctx, name+"/", clientv3.WithPrefix(), clientv3.WithSort(clientv3.SortByCreateRevision, clientv3.SortAscend))
	if err != nil {
		return err.Error()
	}
	var queue []string
	for _, kv := range resp.Kvs {
		queue = append(queue, fmt.Sprintf("%s created at %d, version %d", kv.Key, kv.CreateRevision, kv.Version))
	}
	return fmt.Sprintf("%q, at revision %d", queue, resp.Header.Revision)
}

// ran is for how long this process has got to run since then. A process that is stalled is slow
// between its stalls as well, which the pulse does not see, so that they count more than once; when
// it is overdue, they are no excuse any more.
func (t *torture) ran(since time.Duration) time.Duration {
	now := t.now()
	if now-since > overdue {
		return now - since
	}
	return now - since - slowness*within(t.pulse.all(), since, now)
}

// revision is etcd's current one.
func (t *torture) revision(ctx context.Context) (int64, error) {
	resp, err := t.admin.Get(ctx, observedPrefix)
	if err != nil {
		return 0, err
	}
	return resp.Header.Revision, nil
}

// followersBehind are those that have not come to a revision.
func (t *torture) followersBehind(target int64) (behind []*progress) {
	for _, f := range t.followers {
		if f.get() < target {
			behind = append(behind, f)
		}
	}
	return behind
}

// bite pauses the control's child a few times more if the control has lost nothing yet: a short run
// has room for a pause or two, and what was written after one may have met another fault.
func (t *torture) bite() error {
	for range 3 {
		if lost, err := t.awaitLoss(0); err != nil || lost {
			return err
		}
		ctx, cancel := context.WithTimeout(t.ctx, liveness)
		if t.children[1].pause(ctx, pause{length: 5 * time.Second}) {
			t.faults.add("pause the control once more", 1)
		}
		cancel()
		if lost, err := t.awaitLoss(3 * time.Second); err != nil || lost {
			return err
		}
	}
	return nil
}

// awaitLoss reports whether the control has lost an element, or does so soon.
func (t *torture) awaitLoss(soon time.Duration) (bool, error) {
	for end := time.Now().Add(soon); ; sleep(t.ctx, 100*time.Millisecond) {
		lost, err := t.checkLockset(t.ctx, controlSet)
		if err != nil || lost > 0 || time.Now().After(end) {
			return lost > 0, err
		}
	}
}

// stopWorkloads waits until all clients have given back what they had.
func (t *torture) stopWorkloads() {
	t.end()
	for _, c := range t.children {
		if err := c.stop(); err != nil {
			t.fail(err)
		}
	}
	t.working.Wait()
	for _, f := range t.atEnds {
		f()
	}
}

// atEnd has f called when all workers have ended.
func (t *torture) atEnd(f func()) { t.atEnds = append(t.atEnds, f) }

func (t *torture) check(r *report) (err error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	t.checkHoldings(r)
	if r.fenced, err = t.checkElements(ctx, fencedSet); err != nil {
		return err
	}
	quick, err := t.checkElements(ctx, quickSet)
	if err != nil {
		return err
	}
	r.fenced.lost += quick.lost
	r.fenced.acknowledged += quick.acknowledged
	if r.control, err = t.checkElements(ctx, controlSet); err != nil {
		return err
	}
	if r.control.lost == 0 {
		t.violate("lock-set: the unfenced control lost nothing: the faults do not bite")
	}
	changes, err := t.observed(ctx)
	if err != nil {
		return err
	}
	t.checkWatch(changes)
	t.checkLog(changes)
	t.checkMirrors(changes)
	t.checkRegistered(changes)
	t.checkHolders(changes)
	if err := t.checkLead(ctx); err != nil {
		return err
	}
	if err := t.island.check(); err != nil {
		return err
	}
	r.linearizable, err = t.checkRegisters(ctx)
	return err
}

func (t *torture) checkElements(ctx context.Context, s lockset) (lostElements, error) {
	lost, err := t.checkLockset(ctx, s)
	return lostElements{lost, t.elements[s].count(acknowledged)}, err
}

func (t *torture) checkHoldings(r *report) {
	stalls := t.pulse.all()
	r.stalls = len(stalls)
	for _, s := range stalls {
		r.longestStall = max(r.longestStall, s.to-s.from)
	}
	for name, holdings := range t.ledger.byName() {
		x := checkExclusion(name, holdings, stalls)
		for _, v := range x.violations {
			t.violate("%s", v)
		}
		r.excused += x.excused
		if x.margins > 0 && (r.margins == 0 || x.margin < r.margin) {
			r.margin, r.tightest = x.margin, x.tightest
		}
		r.margins += x.margins
		told, violations := checkTold(holdings, t.toldLate(stalls))
		for _, v := range violations {
			t.violate("%s", v)
		}
		r.told += told
	}
	for _, l := range t.calmLosses.all() {
		if within(stalls, l.at-calmTTL, l.at) < calmTTL/10 {
			t.violate("lease: one of a calm host was lost at %v: %v", ms(l.at), l.err)
		}
	}
}

// toldLate returns what excuses a holder that is notified late.
func (t *torture) toldLate(stalls []stall) func(host int, from, to time.Duration) bool {
	return func(host int, from, to time.Duration) bool {
		return t.troubles.between(host, from, to) || within(stalls, from, to) > (to-from)/4
	}
}

// tearDown ends everything, also when setting up has failed.
func (t *torture) tearDown() {
	t.stopWorkloads()
	for _, h := range append(t.hosts, t.apart...) {
		h.close()
	}
	if t.island != nil {
		t.island.close()
	}
	if t.admin != nil {
		_ = t.admin.Close()
	}
	if t.cluster != nil {
		_ = t.cluster.Close()
	}
}

// newRand is for one worker. Only the schedule is replayed exactly; this is as near as goroutines
// let it be.
func (t *torture) newRand() *rand.Rand {
	t.mu.Lock()
	defer t.mu.Unlock()
	return rand.New(rand.NewPCG(t.rand.Uint64(), t.rand.Uint64()))
}

// maxViolations keeps one broken promise from filling the screen.
const maxViolations = 50

func (t *torture) violate(format string, args ...any) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.violations) < maxViolations {
		t.violations = append(t.violations, fmt.Sprintf(format, args...))
	}
}

// fail notes an error of the torture itself.
func (t *torture) fail(err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.err = errors.Join(t.err, err)
}
