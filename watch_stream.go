package etcdutil

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
)

// A watchUser uses a watch. Its methods are called one at a time, under the mutex of whoever keeps
// the watch, so they must neither block nor call back.
type watchUser interface {
	// history returns what to read before the watch is resumed at next; nothing if there is nothing
	// to check.
	history(next Revision) stateRead
	// checked takes the answer to history, or why there is none.
	checked(read stateRead, resp *clientv3.TxnResponse, err error) historyVerdict
	// present returns what to read to find out whether the watched keys are what they were, nothing
	// if what they were is not known. unchanged takes the answer.
	present() stateRead
	unchanged(read stateRead, resp *clientv3.TxnResponse) bool
	// created reports that the watch stands, on a member of this revision.
	created(rev Revision)
	// deliver takes whole revisions, and all that happened up to a revision. It reports whether
	// there is room for more.
	deliver(events []*mvccpb.Event, upTo Revision) (room bool)
	// missed reports why what comes next cannot be had: etcd no longer has it, or it is too large. The
	// watch is parked.
	missed(err error)
	// failed reports that an attempt failed. It is repeated.
	failed(err error)
	// refused reports that the watch is impossible. The watch is parked.
	refused(err error)
}

// A stateRead reads the state of the watched keys, to compare it with what was known when it was
// made.
type stateRead struct {
	ops   []clientv3.Op
	cost  int      // about how many bytes etcd handles for ops
	known keyState // the newest change
	seen  Revision // the newest that etcd is known to have had
}

// A historyVerdict says what is to become of a watch whose history was checked.
type historyVerdict int

const (
	resumeWatch historyVerdict = iota
	checkAgain                 // with what history returns now
	parkWatch
)

// A watchSub is a watch, whichever stream it is on.
type watchSub struct {
	user        watchUser
	key, end    string
	guards      func() []clientv3.Cmp // of a lock's key: compare whether it is there
	forLock     bool                  // it is on the stream for locks' keys, and always from now on
	prevKV      bool
	onlyDeletes bool

	// The source's mutex guards the rest.
	next    Revision // the first revision that was not delivered; 0: from now on
	from    Revision // the first revision that is wanted
	known   Revision // etcd is known to have come so far
	checkAt int64    // how many streams had been opened when the history was last checked
	epoch   int      // counts changes of state: what was begun before is void
	settled bool     // it has been on the live stream
	stopped bool
	behind  bool // its reader was: it gets a stream of its own
	paused  bool // it is parked until its reader has room, and for no other reason
	large   bool // a message was too large: it asks for fragments
	whole   bool // those took too long to make: its messages may be larger
	retries int

	home    *watchStream  // where it is, or is about to be; nil while it is parked
	current *registration // at home
	moving  *registration // on the stream that it is to move to
}

// A watchSource keeps watches.
type watchSource interface {
	// streams returns a number that grows with each stream that is opened.
	streams() int64
	// start begins a watch, and resumes a parked one.
	start(sub *watchSub)
	// restart begins a parked watch anew, at a revision, with its history checked when so many
	// streams had been opened.
	restart(sub *watchSub, next Revision, streams int64)
	// drained reports that the reader of a watch has room again. It returns true once if the watch
	// was parked for that. It returns false if a list is what the reader has read.
	drained(sub *watchSub) (resume bool)
	// locked calls f as the methods of the watch's user are called.
	locked(f func())
	// askProgress asks now how far the watch has come.
	askProgress(sub *watchSub)
	// standing calls f as the methods of the watch's user are called, if the watch stands.
	standing(sub *watchSub, f func())
	// stop ends a watch: its user is not called any more.
	stop(sub *watchSub)
}

// A registration is a watch on one stream. IDs are never used twice on a stream, because etcd may
// still send events for an ID that was canceled.
type registration struct {
	sub       *watchSub
	stream    *watchStream
	id        int64
	created   bool
	canceled  bool
	createdAt Revision        // of the member, when it was created
	since     time.Time       // when it was created
	lastEvent time.Time       // when events last came
	begin     Revision        // where it was to begin
	rest      []*mvccpb.Event // of a revision that goes on in the next fragment
	asked     int             // requests for progress that were sent before this one
	stale     int             // answers about progress that may be older than the creation
	look      *proxyLook      // behind etcd's gRPC proxy
}

// A proxyLook is what was seen of a watch's keys behind etcd's gRPC proxy.
type proxyLook struct {
	at          time.Time // when the keys were last read
	unchangedAt Revision  // they were unchanged at this revision; 0 if they were not
	changed     bool      // they were not what they had been
}

type streamKind int

const (
	// liveStream has the watches that are up to date.
	liveStream streamKind = iota
	// catchUpStream has watches that begin in the past, until they are up to date.
	catchUpStream
	// ownStream has one watch whose reader was behind. It waits for the reader.
	ownStream
	// lockStream has the watches of locks' keys.
	lockStream
	streamKinds
)

const (
	// maxMessage is the largest message that a stream takes. After a larger one its watches ask for
	// fragments. Not before: the server's time for fragments is quadratic in the number of events.
	// maxLiveMessage is that of the live stream, where most messages are one transaction, which has
	// to be taken at once anyway.
	// maxWholeMessage is that of a stream whose messages cannot come in fragments.
	maxMessage, maxLiveMessage, maxWholeMessage = 16 << 20, 64 << 20, 256 << 20
	// maxBacklog is how many revisions a watch may be behind and still return to the live stream.
	maxBacklog = 1000
	// maxCatchUps and maxOwn limit streams, because a server may limit those of a client.
	maxCatchUps, maxOwn = 2, 8
	// catchUpJoins is how long watches may join a catch-up stream.
	catchUpJoins = time.Second
	// hubTick is how often a hub looks after its streams.
	hubTick = 500 * time.Millisecond
	// progressInterval is how often a stream asks for progress.
	progressInterval, minProgressInterval = time.Second, 5 * time.Millisecond
	// A stream without an answer is pinged after pingAfter, and given up after idleTimeout.
	pingAfter, idleTimeout = time.Second, 4 * time.Second
	// A member whose revision stands still for lagTimeout may be behind: etcd's revision is read.
	// Then it has lagGrace to come on.
	lagTimeout, lagGrace = 5 * time.Second, 3 * time.Second
	// openTimeout is how long a stream may take to open.
	openTimeout = 2 * time.Second
	// maxPatience bounds how often the timeouts grow after every endpoint has failed. While one
	// endpoint is good a dead connection is left after the shortest.
	maxPatience = 1
	// streamLinger is how long a stream without watches is kept for the next one.
	streamLinger = time.Second
	// avoidMember is how long a member that failed is avoided while there are others.
	avoidMember = 30 * time.Second
	// avoidPause is how long to wait for another member before the next try.
	avoidPause = 500 * time.Millisecond
	// maxBrokenBackoff bounds the backoff after a stream that was open, as a number of failures.
	maxBrokenBackoff = 3
	// proxyInterval is how often the keys of a quiet watch behind etcd's gRPC proxy are read.
	proxyInterval = 3 * time.Second
	// slowReaderGrace is how long a stream of its own waits for a slow reader. Meanwhile etcd keeps
	// in memory what it is about to send.
	slowReaderGrace = 4 * time.Second
)

// watchHub keeps the watches of one client on streams that they share. It has no goroutine of its
// own: a timer runs while it has streams, and each stream has one that receives and one that sends.
//
// A watch that is not up to date silences the progress of its whole stream, and may get a thousand
// revisions in one message. So it begins on a catch-up stream, and moves to the live stream when
// progress shows that it is up to date.
type watchHub struct {
	client *clientv3.Client
	ctx    context.Context
	cancel context.CancelFunc
	reads  *batchReader
	checks *batchReader // of locks' keys, which wait for no other reads

	mu       sync.Mutex
	ended    bool
	subs     map[*watchSub]struct{}
	all      map[*watchStream]struct{}
	live     *watchStream
	locks    *watchStream
	catchUps []*watchStream       // those that may still be joined
	opened   int64                // counts streams, those of the client's earlier hubs included
	known    Revision             // etcd has come at least so far
	failures [streamKinds]int     // in a row
	silences [streamKinds]int     // in a row: streams that were given up without an answer
	ticked   time.Time            // when tick last ran
	reading  bool                 // etcd's revision
	readAt   time.Time            // when that was last answered
	avoided  map[string]avoidance // members that failed
	timer    *time.Timer
	released func() // from the client's context
}

// watchHubs has the hub of each client that has watches.
var watchHubs = struct {
	sync.Mutex
	byClient map[*clientv3.Client]*watchHub
	opened   int64 // as many streams as a hub had opened when it ended
}{byClient: make(map[*clientv3.Client]*watchHub)}

// sourceOf returns what keeps a client's watches.
func sourceOf(c *config) watchSource {
	if isWrapped(c.client) {
		return &wrappedSource{client: c.client}
	}
	return hubRef{c.client}
}

// isWrapped reports whether the client's Watcher is not clientv3's own, as that of a namespace.
func isWrapped(client *clientv3.Client) bool {
	return reflect.TypeOf(client.Watcher) != watcherType
}

var watcherType = reflect.TypeOf(clientv3.NewWatchFromWatchClient(nil, nil))

// hubRef finds the hub of a client, which ends when it has no watches.
type hubRef struct{ client *clientv3.Client }

func (r hubRef) streams() int64 {
	h := r.lock()
	defer h.mu.Unlock()
	return h.opened
}

func (r hubRef) start(sub *watchSub) {
	h := r.lock()
	defer h.mu.Unlock()
	if sub.stopped {
		return
	}
	if err := h.client.Ctx().Err(); err != nil {
		sub.user.refused(errClientClosed)
		return
	}
	h.subs[sub] = struct{}{}
	h.known = max(h.known, sub.known)
	h.place(sub)
}

func (r hubRef) restart(sub *watchSub, next Revision, streams int64) {
	h := r.lock()
	sub.next, sub.from, sub.known, sub.checkAt = next, next, next-1, streams
	sub.behind, sub.large, sub.whole, sub.settled = false, false, false, true
	h.mu.Unlock()
	r.start(sub)
}

func (r hubRef) drained(sub *watchSub) (resume bool) {
	h := r.lock()
	defer h.mu.Unlock()
	if sub.home != nil {
		wake(sub.home.drained)
	}
	resume, sub.paused = sub.paused, false
	return resume
}

func (r hubRef) askProgress(sub *watchSub) {
	h := r.lock()
	defer h.mu.Unlock()
	if sub.current != nil && sub.current.created {
		sub.home.askProgress(time.Now())
	}
}

func (r hubRef) standing(sub *watchSub, f func()) {
	h := r.lock()
	defer h.mu.Unlock()
	if sub.current != nil && sub.current.created && !sub.home.ended {
		f()
	}
}

func (r hubRef) locked(f func()) {
	h := r.lock()
	defer h.mu.Unlock()
	f()
}

func (r hubRef) stop(sub *watchSub) {
	h := r.lock()
	defer h.mu.Unlock()
	sub.stopped = true
	h.park(sub)
	delete(h.subs, sub)
}

// lock returns the client's hub, locked.
func (r hubRef) lock() *watchHub {
	for {
		h := watchHubOf(r.client)
		h.mu.Lock()
		if !h.ended {
			return h
		}
		h.mu.Unlock()
	}
}

func watchHubOf(client *clientv3.Client) *watchHub {
	watchHubs.Lock()
	defer watchHubs.Unlock()
	h := watchHubs.byClient[client]
	if h == nil {
		h = newWatchHub(client)
		watchHubs.byClient[client] = h
	}
	return h
}

func newWatchHub(client *clientv3.Client) *watchHub {
	h := &watchHub{
		client:  client,
		subs:    make(map[*watchSub]struct{}),
		all:     make(map[*watchStream]struct{}),
		avoided: make(map[string]avoidance),
		opened:  watchHubs.opened,
	}
	// Every watch needs a leader, so that a member that is cut off from the quorum is left.
	h.ctx, h.cancel = context.WithCancel(clientv3.WithRequireLeader(context.Background()))
	h.reads = &batchReader{ctx: h.ctx, client: client}
	h.checks = &batchReader{ctx: h.ctx, client: client}
	stop := context.AfterFunc(client.Ctx(), h.clientClosed)
	h.released = func() { stop() }
	h.ticked = time.Now()
	h.timer = time.AfterFunc(hubTick, h.tick)
	return h
}

func (h *watchHub) clientClosed() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for sub := range h.subs {
		h.park(sub)
		sub.user.refused(errClientClosed)
	}
	for s := range h.all {
		s.cancel()
	}
}

// place finds a stream for a watch, and puts it there as soon as that is open.
func (h *watchHub) place(sub *watchSub) {
	sub.epoch++
	s := h.streamFor(sub)
	if sub.home != nil && sub.home != s {
		delete(sub.home.subs, sub)
	}
	sub.home = s
	s.subs[sub] = struct{}{}
	if s.number > 0 {
		h.advance(sub)
	}
}

// streamFor chooses the stream for a watch that is not on one yet.
func (h *watchHub) streamFor(sub *watchSub) *watchStream {
	switch {
	case sub.forLock:
		return h.shared(&h.locks, lockStream)
	case sub.next == 0 || sub.next > h.known || sub.upToDate(h.known):
		return h.shared(&h.live, liveStream)
	case sub.home != nil && sub.home.takes(sub):
		return sub.home
	case sub.behind && h.count(ownStream) < maxOwn:
		return h.newStream(ownStream, sub.large, sub.whole)
	}
	h.catchUps = slices.DeleteFunc(h.catchUps, func(s *watchStream) bool {
		return s.ended || time.Since(s.born) > catchUpJoins && h.count(catchUpStream) < maxCatchUps
	})
	for _, s := range h.catchUps {
		if s.takes(sub) {
			return s
		}
	}
	s := h.newStream(catchUpStream, sub.large, sub.whole)
	h.catchUps = append(h.catchUps, s)
	return s
}

// upToDate reports whether a watch that was on the live stream may return to it at once.
func (sub *watchSub) upToDate(known Revision) bool {
	return sub.settled && known-sub.next < maxBacklog && !sub.behind && !sub.large && !sub.whole
}

// takes reports whether a watch that is not up to date may be on s.
func (s *watchStream) takes(sub *watchSub) bool {
	switch {
	case s.ended || s.closed || s.fragment != sub.large || s.whole != sub.whole:
		return false
	case s.kind == ownStream:
		return sub.home == s && sub.behind
	}
	return s.kind == catchUpStream
}

func (h *watchHub) count(kind streamKind) (n int) {
	for s := range h.all {
		if s.kind == kind {
			n++
		}
	}
	return n
}

// catchingUp reports whether watches are to move to the live stream.
func (h *watchHub) catchingUp() bool { return h.count(catchUpStream)+h.count(ownStream) > 0 }

// shared returns the stream of a kind of which there is one.
func (h *watchHub) shared(s **watchStream, kind streamKind) *watchStream {
	if *s == nil || (*s).ended || (*s).closed {
		*s = h.newStream(kind, false, false)
	}
	return *s
}

func (h *watchHub) newStream(kind streamKind, fragment, whole bool) *watchStream {
	now := time.Now()
	s := &watchStream{
		hub:      h,
		kind:     kind,
		fragment: fragment,
		whole:    whole,
		born:     now,
		used:     now,
		subs:     make(map[*watchSub]struct{}),
		byID:     make(map[int64]*registration),
		ready:    make(chan struct{}, 1),
		drained:  make(chan struct{}, 1),
	}
	s.ctx, s.cancel = context.WithCancel(h.ctx)
	h.all[s] = struct{}{}
	var delay time.Duration
	if failed := h.failures[kind]; failed > 0 {
		delay = RetryPolicy{}.withDefaults().backoff(failed)
	}
	go s.run(delay, h.failures[kind]) // until it fails, or has no watches
	return s
}

// advance checks the history of a watch that is about to be created on an open stream, or creates
// it.
//
// The check comes after the stream was opened. If etcd is restored after that, the stream breaks.
func (h *watchHub) advance(sub *watchSub) {
	if sub.checkAt < sub.home.number && sub.next != 0 && !sub.forLock {
		if read := sub.user.history(sub.next); len(read.ops) > 0 {
			epoch, opened := sub.epoch, h.opened
			h.reads.add(readRequest{
				ops:    read.ops,
				cost:   read.cost,
				wanted: func() (is bool) { h.whileIn(sub, epoch, func() { is = true }); return is },
				failed: func(err error) { h.whileIn(sub, epoch, func() { sub.user.failed(err) }) },
				done: func(resp *clientv3.TxnResponse, err error) {
					h.whileIn(sub, epoch, func() { h.checked(sub, read, opened, resp, err) })
				},
			})
			return
		}
	}
	h.create(sub, sub.home)
}

// whileIn calls f unless the state of the watch has changed since epoch.
func (h *watchHub) whileIn(sub *watchSub, epoch int, f func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if sub.epoch == epoch && !sub.stopped {
		f()
	}
}

func (h *watchHub) checked(sub *watchSub, read stateRead, opened int64, resp *clientv3.TxnResponse, err error) {
	switch sub.user.checked(read, resp, err) {
	case parkWatch:
		h.park(sub)
		return
	case checkAgain:
		h.place(sub)
		return
	}
	sub.checkAt = opened
	if resp != nil {
		h.known = max(h.known, resp.Header.Revision)
	}
	h.place(sub)
}

// create has a watch created on an open stream: at home, or on the stream that it is to move to.
func (h *watchHub) create(sub *watchSub, s *watchStream) {
	s.lastID++
	r := &registration{sub: sub, stream: s, id: s.lastID, begin: sub.next}
	if sub.current == nil {
		sub.current = r
	} else {
		sub.moving = r
	}
	s.subs[sub] = struct{}{}
	s.toCreate = append(s.toCreate, r)
	s.sendCreates()
}

// park takes a watch off its streams.
func (h *watchHub) park(sub *watchSub) {
	sub.epoch++
	for _, r := range []*registration{sub.current, sub.moving} {
		if r != nil {
			r.drop()
			delete(r.stream.subs, sub)
		}
	}
	if sub.home != nil {
		delete(sub.home.subs, sub)
	}
	sub.home, sub.current, sub.moving = nil, nil, nil
	sub.paused = false
}

// pause parks a watch until its reader has room.
func (h *watchHub) pause(sub *watchSub) {
	h.park(sub)
	sub.paused = true
}

// again creates a watch anew after a while.
func (h *watchHub) again(sub *watchSub) {
	h.park(sub)
	sub.retries++
	epoch := sub.epoch
	time.AfterFunc(RetryPolicy{}.withDefaults().backoff(sub.retries), func() {
		h.whileIn(sub, epoch, func() { h.place(sub) })
	})
}

// move has a watch that is up to date created on the live stream. What both streams send is dropped
// the second time.
func (h *watchHub) move(sub *watchSub) {
	if sub.moving != nil {
		return
	}
	s := h.streamToMoveTo(sub)
	switch {
	case s.number == 0: // later
		s.used = time.Now()
	case s.number > sub.checkAt && !sub.forLock:
		// The live stream may have been opened after a restore that this one has yet to notice.
		h.park(sub)
		sub.behind, sub.large, sub.whole = false, false, false
		h.place(sub)
	default:
		h.create(sub, s)
	}
}

func (h *watchHub) streamToMoveTo(sub *watchSub) *watchStream {
	if sub.forLock {
		return h.shared(&h.locks, lockStream)
	}
	return h.shared(&h.live, liveStream)
}

// patience returns how often a timeout is to grow after so many failures: not before every
// endpoint has failed.
func (h *watchHub) patience(failed int) int {
	return min(failed/max(len(h.client.Endpoints()), 1), maxPatience)
}

// tick looks after the streams. It ends the hub when it has neither streams nor watches.
func (h *watchHub) tick() {
	h.mu.Lock()
	defer h.mu.Unlock()
	now := time.Now()
	// A process that was suspended, or had no time to run, has yet to receive what was answered.
	passed := min(now.Sub(h.ticked), 2*hubTick)
	h.ticked = now
	for s := range h.all {
		s.tick(now, passed)
	}
	h.lookForLag(now)
	if len(h.all) == 0 && len(h.subs) == 0 {
		h.ended = true
		h.cancel()
		h.released()
		watchHubs.Lock()
		defer watchHubs.Unlock()
		delete(watchHubs.byClient, h.client)
		watchHubs.opened = max(watchHubs.opened, h.opened)
		return
	}
	h.timer.Reset(hubTick)
}

// lookForLag reads etcd's revision if a member stands still. It may have been removed from the
// cluster, or be behind for another reason, and still answer. A client with one endpoint reads
// nothing: it has no other member to go to.
func (h *watchHub) lookForLag(now time.Time) {
	if h.reading || now.Sub(h.readAt) < lagTimeout || len(h.client.Endpoints()) < 2 {
		return
	}
	for s := range h.all {
		if !s.direct || s.goal != 0 || now.Sub(s.shownAt) < lagTimeout {
			continue
		}
		for _, r := range s.byID { // a key that may be read
			h.readRevision(r.sub.key)
			return
		}
	}
}

// readRevision reads etcd's revision, by any key, and has the members come to it.
func (h *watchHub) readRevision(key string) {
	h.reading = true
	opened := h.opened // a stream that is opened later may be to a restored etcd
	h.reads.add(readRequest{
		ops:    []clientv3.Op{clientv3.OpGet(key, clientv3.WithCountOnly())},
		failed: func(error) {},
		done: func(resp *clientv3.TxnResponse, err error) {
			h.mu.Lock()
			defer h.mu.Unlock()
			h.reading, h.readAt = false, time.Now()
			if err != nil {
				return
			}
			for s := range h.all {
				if rev := resp.Header.Revision; s.direct && s.number <= opened && s.goal == 0 && s.shown < rev {
					s.goal, s.goalAt = rev, h.readAt
				}
			}
		},
	})
}

// An avoidance says until when a member that failed is avoided.
type avoidance struct {
	since, until time.Time
	silent       bool     // it gave no answer, or old ones. That costs more time than an error
	goal         Revision // it was behind: its answers are no sign of health before this revision
}

// avoid has the member of a stream that failed avoided for a while.
func (h *watchHub) avoid(s *watchStream) {
	now := time.Now()
	maps.DeleteFunc(h.avoided, func(_ string, a avoidance) bool { return now.After(a.until) })
	if s.member == "" {
		return
	}
	a, again := h.avoided[s.member]
	if !again || a.silent {
		a.since = now
	}
	a.until, a.silent, a.goal = now.Add(avoidMember), s.idle || s.lags, 0
	if s.lags {
		a.goal = s.goal
	}
	h.avoided[s.member] = a
}

// takes reports whether a stream may be opened to a member after so many tries. Members that are
// avoided are taken when all have been tried. But one that was silent is not, while another that
// failed with an error may be about to come back.
func (h *watchHub) takes(member string, tries int) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	now, a := time.Now(), h.avoided[member]
	switch {
	case now.After(a.until):
		return true
	case a.silent && h.awaitsAnother(now):
		return false
	}
	return tries > len(h.client.Endpoints())
}

// awaitsAnother reports whether a member began to fail with errors a short time ago.
func (h *watchHub) awaitsAnother(now time.Time) bool {
	for _, a := range h.avoided {
		if !a.silent && now.Sub(a.since) < idleTimeout {
			return true
		}
	}
	return false
}

// streamEnded finds another stream for the watches of one that ended.
func (h *watchHub) streamEnded(s *watchStream, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.all, s)
	s.ended = true
	tooLarge := isTooLarge(err)
	switch {
	case s.answered:
		h.failures[s.kind] = 0
	case len(s.subs) == 0:
	case s.number > 0:
		// It may break again and again. Those that wait must not miss the time in between.
		h.failures[s.kind] = min(h.failures[s.kind]+1, maxBrokenBackoff)
	default:
		h.failures[s.kind]++
	}
	if s.idle && !s.heard {
		h.silences[s.kind]++
	}
	if len(s.subs) > 0 && !tooLarge && !s.stalledOut {
		h.avoid(s)
	}
	err = s.reason(err)
	for _, sub := range slices.Collect(maps.Keys(s.subs)) {
		h.streamLost(sub, s, err, tooLarge)
	}
}

// streamLost takes a watch off a stream that ended.
func (h *watchHub) streamLost(sub *watchSub, s *watchStream, err error, tooLarge bool) {
	delete(s.subs, sub)
	if sub.moving != nil && sub.moving.stream == s {
		sub.moving = nil
	}
	if sub.home != s {
		return
	}
	sub.large = sub.large || tooLarge
	if s.idle && s.served && sub.next <= h.known {
		sub.tooMuchAtOnce(s)
	}
	sub.current, sub.home = nil, nil
	if sub.moving != nil {
		sub.current, sub.home, sub.moving = sub.moving, sub.moving.stream, nil
		return
	}
	if h.client.Ctx().Err() != nil {
		return
	}
	if !tooLarge && !s.stalledOut {
		sub.user.failed(err)
	}
	h.place(sub)
}

// tooMuchAtOnce has a watch that is behind get less in a message than on a stream that did not
// answer: over a slow link a large message takes longer than the timeout. If the answers did not
// come in fragments, it is the other way round: etcd takes long to make those of small events. If
// it did not get a single revision in fragments, then it gets larger messages.
func (sub *watchSub) tooMuchAtOnce(s *watchStream) {
	if s.catchesUp() {
		sub.large = !s.fragment
		sub.whole = s.fragment && sub.current != nil && sub.current.begin == sub.next
	} else {
		sub.settled = false // what it missed comes by a catch-up stream
	}
}

// A watchStream is a gRPC stream for watches, from when it is opened until it fails.
type watchStream struct {
	hub      *watchHub
	kind     streamKind
	fragment bool
	whole    bool // it takes larger messages
	ctx      context.Context
	cancel   context.CancelFunc
	born     time.Time
	ready    chan struct{} // there is something to send
	drained  chan struct{} // the reader that an ownStream waits for has come on

	// hub.mu guards the rest.
	number   int64  // in the order of opening; 0 until it is open
	member   string // at the other end
	ended    bool
	closed   bool // takes no new watches, since its token expired
	served   bool // a watch was created on it
	direct   bool // etcd itself is at the other end: it answers in order, with our IDs
	proxied  bool // etcd's gRPC proxy is: it chooses the IDs, and answers no request for progress
	subs     map[*watchSub]struct{}
	byID     map[int64]*registration
	lastID   int64
	toCreate []*registration // not sent yet
	creating []*registration // sent and not answered, in order; nil is a ping
	out      []*pb.WatchRequest

	answered   bool
	heard      bool          // answered; where watches catch up, with more than creations
	quiet      time.Duration // since the last answer
	full       bool          // it waits for its reader, and takes no answers meanwhile
	pinged     bool          // and not answered
	shown      Revision      // the member's, in its answers
	shownAt    time.Time     // when shown last grew
	goal       Revision      // the member has yet to show it, as a read of etcd was answered; 0: none
	goalAt     time.Time     // when it was
	trial      bool          // the answer to the ping decides whether the member is behind
	lags       bool          // it was given up because its member is behind
	asked      int           // how many requests for progress were sent
	settled    int           // how many of them were answered or dropped
	askedAt    time.Time     // when the last was sent
	used       time.Time     // when it last had watches, or some were to move to it
	stalledOut bool          // it waited too long for its reader
	idle       bool          // it was given up because it did not answer
}

func (s *watchStream) run(delay time.Duration, failed int) {
	if delay > 0 {
		sleep(s.ctx, delay)
		redial(s.hub.client)
	}
	rpc, err := s.open(openTimeout << (2 * s.hub.patience(failed)))
	if err == nil {
		s.opened(rpc)
		var sending sync.WaitGroup
		sending.Go(func() { s.send(rpc) }) // until ctx ends
		err = s.receive(rpc)
		s.cancel()
		sending.Wait()
	}
	s.cancel()
	s.hub.streamEnded(s, err)
}

// open opens the stream to a member that is not avoided, if it can. gRPC takes the members in turn.
// A stream that it does not take is closed at once.
func (s *watchStream) open(timeout time.Duration) (pb.Watch_WatchClient, error) {
	inTurn := func() {}
	for tries := 1; ; tries++ {
		ctx, cancel := context.WithCancel(s.ctx)
		rpc, err := s.openToAny(ctx, timeout)
		inTurn()
		if err != nil {
			cancel()
			return nil, err
		}
		if member := peerOf(rpc.Context()); s.hub.takes(member, tries) {
			s.member = member
			context.AfterFunc(s.ctx, cancel)
			return rpc, nil
		}
		cancel()
		if tries > 2*len(s.hub.client.Endpoints()) {
			sleep(s.ctx, avoidPause)
		}
		if s.ctx.Err() != nil {
			return nil, s.ctx.Err()
		}
		inTurn = skipMembers(s.ctx, s.hub.client)
	}
}

// openToAny opens the stream to whichever member gRPC takes. It may wait for a token from a member
// that is stuck.
func (s *watchStream) openToAny(ctx context.Context, timeout time.Duration) (pb.Watch_WatchClient, error) {
	limit := maxMessage
	switch {
	case s.fragment:
		limit = math.MaxInt32 // a single event may be larger than fragments are
	case s.whole:
		limit = maxWholeMessage
	case s.kind == liveStream:
		limit = maxLiveMessage
	}
	defer time.AfterFunc(timeout, s.cancel).Stop()
	return pb.NewWatchClient(s.hub.client.ActiveConnection()).Watch(ctx, grpc.MaxCallRecvMsgSize(limit))
}

// peerOf returns the address at the other end of a stream.
func peerOf(ctx context.Context) string {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return ""
	}
	return p.Addr.String()
}

func (s *watchStream) opened(rpc pb.Watch_WatchClient) {
	h := s.hub
	h.mu.Lock()
	defer h.mu.Unlock()
	h.opened++
	s.number = h.opened
	s.quiet = 0
	for _, sub := range slices.Collect(maps.Keys(s.subs)) {
		if sub.home == s && sub.current == nil {
			h.advance(sub)
		}
	}
}

// send has a goroutine of its own, because flow control can block it.
func (s *watchStream) send(rpc pb.Watch_WatchClient) {
	for {
		for _, r := range s.takeOut() {
			if rpc.Send(r) != nil {
				return // receive gets the reason
			}
		}
		select {
		case <-s.ready:
		case <-s.ctx.Done():
			return
		}
	}
}

func (s *watchStream) takeOut() []*pb.WatchRequest {
	s.hub.mu.Lock()
	defer s.hub.mu.Unlock()
	out := s.out
	s.out = nil
	return out
}

func (s *watchStream) push(r *pb.WatchRequest) {
	s.out = append(s.out, r)
	wake(s.ready)
}

// sendCreates sends what is to be created: one at a time until etcd itself is known to be at the
// other end.
func (s *watchStream) sendCreates() {
	for len(s.toCreate) > 0 && (s.direct || len(s.creating) == 0) {
		r := s.toCreate[0]
		s.toCreate = s.toCreate[1:]
		if r.canceled {
			continue
		}
		r.asked = s.asked
		s.creating = append(s.creating, r)
		s.push(r.request())
	}
}

func (r *registration) request() *pb.WatchRequest {
	create := &pb.WatchCreateRequest{
		Key:           []byte(r.sub.key),
		RangeEnd:      []byte(r.sub.end),
		StartRevision: r.sub.next,
		PrevKv:        r.sub.prevKV,
		WatchId:       r.id,
		Fragment:      r.stream.fragment,
	}
	if r.sub.onlyDeletes {
		create.Filters = []pb.WatchCreateRequest_FilterType{pb.WatchCreateRequest_NOPUT}
	}
	return &pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: create}}
}

// pingRequest is refused at once, and so answered, whether the stream's watches are up to date or
// not: the range is empty and the revision is negative.
func pingRequest() *pb.WatchRequest {
	create := &pb.WatchCreateRequest{Key: []byte{1, 1}, RangeEnd: []byte{1}, StartRevision: -1}
	return &pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: create}}
}

func cancelRequest(id int64) *pb.WatchRequest {
	return &pb.WatchRequest{RequestUnion: &pb.WatchRequest_CancelRequest{CancelRequest: &pb.WatchCancelRequest{WatchId: id}}}
}

func progressRequest() *pb.WatchRequest {
	return &pb.WatchRequest{RequestUnion: &pb.WatchRequest_ProgressRequest{ProgressRequest: &pb.WatchProgressRequest{}}}
}

// drop cancels a registration: what still comes of it is dropped.
func (r *registration) drop() {
	if r.canceled {
		return
	}
	r.canceled = true
	r.rest = nil
	if r.created {
		delete(r.stream.byID, r.id)
		r.stream.push(cancelRequest(r.id))
	}
}

func (s *watchStream) tick(now time.Time, passed time.Duration) {
	if len(s.subs) > 0 || s == s.hub.live && !s.closed && s.hub.catchingUp() {
		s.used = now
	} else if s.catchesUp() || s.closed || now.Sub(s.used) >= streamLinger {
		s.ended = true // no watch joins it any more
		s.cancel()
		return
	}
	if s.number == 0 {
		return
	}
	if s.quiet += passed; s.full {
		s.quiet = 0
	}
	switch {
	case len(s.creating) > 0 && s.quiet >= idleTimeout<<s.hub.patience(s.hub.silences[s.kind]):
		s.idle = true
		s.cancel()
		return
	case !s.pinged && (s.quiet >= pingAfter || s.suspected(now)) && (s.direct || len(s.creating) == 0):
		s.pinged, s.trial = true, s.suspected(now)
		s.creating = append(s.creating, nil)
		s.push(pingRequest())
	}
	switch {
	case s.kind == lockStream || len(s.byID) == 0:
	case s.proxied:
		s.lookForProgress(now)
	case s.kind != liveStream || now.Sub(s.askedAt) >= progressInterval:
		s.askProgress(now)
	}
	if s.catchesUp() && s.answers() {
		s.moveQuiet(now)
	}
}

// suspected reports whether the member has had time to show what was read, and stands still.
func (s *watchStream) suspected(now time.Time) bool {
	return s.goal != 0 && now.Sub(s.goalAt) >= lagGrace && now.Sub(s.shownAt) >= lagTimeout
}

// catchesUp reports whether the stream is for watches that are behind.
func (s *watchStream) catchesUp() bool { return s.kind == catchUpStream || s.kind == ownStream }

// answers reports whether nothing large is under way, which would delay the answer to a ping.
func (s *watchStream) answers() bool { return s.quiet < 2*pingAfter }

func (s *watchStream) askProgress(now time.Time) {
	if s.proxied || now.Sub(s.askedAt) < minProgressInterval {
		return
	}
	s.askedAt = now
	s.asked++
	s.push(progressRequest())
}

// lookForProgress looks after watches that got nothing, where etcd's gRPC proxy is at the other
// end. It sends no progress, and outlives a restore. Where the watched keys are what they were, the
// watch is moved on. Where they are not, its history is checked.
//
// What is under way would refute both. So nothing may have come for a while after the keys were
// read, on a live stream that answers.
func (s *watchStream) lookForProgress(now time.Time) {
	for _, r := range slices.Collect(maps.Values(s.byID)) {
		last := or(r.look, proxyLook{})
		if now.Sub(last.at) < proxyInterval || r.sub.current != r {
			continue
		}
		quiet := r.lastEvent.Before(last.at) && s.answers() && s.kind == liveStream
		switch sub := r.sub; {
		case quiet && last.unchangedAt >= sub.next:
			sub.next = last.unchangedAt + 1
			sub.user.deliver(nil, last.unchangedAt)
		case quiet && last.changed:
			sub.checkAt = 0
			s.hub.park(sub)
			s.hub.place(sub)
			continue
		}
		r.look = &proxyLook{at: now}
		s.lookAt(r)
	}
}

func (s *watchStream) lookAt(r *registration) {
	epoch := r.sub.epoch
	read := r.sub.user.present()
	if len(read.ops) == 0 {
		return
	}
	s.hub.reads.add(readRequest{
		ops:    read.ops,
		cost:   read.cost,
		failed: func(error) {},
		done: func(resp *clientv3.TxnResponse, err error) {
			s.hub.whileIn(r.sub, epoch, func() {
				switch {
				case err != nil:
				case r.sub.user.unchanged(read, resp):
					r.look.unchangedAt = resp.Header.Revision
				default:
					r.look.changed = true
				}
			})
		},
	})
}

// moveQuiet moves watches that got nothing for a while. etcd brings those up to date first, but
// sends no progress while another one is not.
func (s *watchStream) moveQuiet(now time.Time) {
	for _, r := range slices.Collect(maps.Values(s.byID)) {
		if now.Sub(r.since) > 3*time.Second && now.Sub(r.lastEvent) > 2*time.Second && r.rest == nil && r.sub.current == r {
			s.hub.move(r.sub)
		}
	}
}

// receive takes answers until the stream fails.
func (s *watchStream) receive(rpc pb.Watch_WatchClient) error {
	for {
		resp, err := rpc.Recv()
		if err != nil {
			return err
		}
		if full := s.handle(resp); full && !s.waitForReader() {
			return errReaderBehind
		}
	}
}

var (
	errReaderBehind = errors.New("the reader is behind")
	errIdle         = errors.New("the watch stream does not answer")
	errMemberBehind = errors.New("the member is behind what was read, or etcd was restored")
	errMemberLags   = errors.New("the member stays behind the others")
)

// reason is why the stream ended.
func (s *watchStream) reason(err error) error {
	switch {
	case s.idle:
		return fmt.Errorf("%w (member %s)", errIdle, s.member)
	case s.lags:
		return fmt.Errorf("%w (member %s)", errMemberLags, s.member)
	case s.number == 0 && s.ctx.Err() != nil && s.hub.ctx.Err() == nil && isContextError(err):
		return fmt.Errorf("the watch stream is not opened in time: %w", err)
	}
	return rpctypes.Error(err)
}

// waitForReader waits for the reader of an ownStream. It reports whether the reader has come on.
func (s *watchStream) waitForReader() bool {
	timeout := time.NewTimer(slowReaderGrace)
	defer timeout.Stop()
	select {
	case <-s.drained:
		s.hub.mu.Lock()
		defer s.hub.mu.Unlock()
		s.full = false
		return true
	case <-s.ctx.Done():
		return false
	case <-timeout.C:
	}
	h := s.hub
	h.mu.Lock()
	defer h.mu.Unlock()
	select {
	case <-s.drained:
		s.full = false
		return true
	default:
	}
	s.stalledOut = true
	for _, sub := range slices.Collect(maps.Keys(s.subs)) {
		h.pause(sub)
	}
	return false
}

// handle takes an answer. It reports whether the reader of an ownStream has no room for more.
func (s *watchStream) handle(resp *pb.WatchResponse) (full bool) {
	s.hub.mu.Lock()
	defer s.hub.mu.Unlock()
	s.answered, s.quiet = true, 0
	s.hub.failures[s.kind] = 0
	if rev := resp.Header.GetRevision(); rev > s.shown {
		s.shown, s.shownAt, s.goal, s.trial = rev, time.Now(), 0, false
	}
	if s.heard = s.heard || !resp.Created || !s.catchesUp(); s.heard {
		s.hub.silences[s.kind] = 0
		if s.shown >= s.hub.avoided[s.member].goal {
			delete(s.hub.avoided, s.member)
		}
	}
	switch {
	case resp.Created:
		s.handleCreated(resp)
	case resp.Canceled || resp.CompactRevision != 0:
		s.handleCanceled(resp)
	case len(resp.Events) == 0:
		s.handleProgress(resp)
	default:
		s.full = s.handleEvents(resp)
	}
	return s.full
}

// handleCreated takes the answer to the oldest request.
func (s *watchStream) handleCreated(resp *pb.WatchResponse) {
	if len(s.creating) == 0 {
		return
	}
	r := s.creating[0]
	s.creating = s.creating[1:]
	defer s.sendCreates()
	switch {
	case r == nil:
		s.pinged = false
		if s.trial {
			s.lags = true
			s.cancel()
		}
		return
	case resp.Canceled:
		s.handleRefused(r, resp)
		return
	}
	if resp.WatchId != r.id {
		s.proxied = true
	}
	s.direct = !s.proxied
	r.id = resp.WatchId
	r.created, r.createdAt, r.since = true, resp.Header.GetRevision(), time.Now()
	r.stale = max(r.asked-s.settled, 0)
	if r.canceled {
		s.push(cancelRequest(r.id))
		return
	}
	s.byID[r.id], s.served = r, true
	sub := r.sub
	sub.retries = 0
	sub.settled = sub.settled || s.kind == liveStream
	if sub.moving == r {
		s.hub.arrived(sub)
		return
	}
	if sub.next == 0 && !sub.forLock && !sub.beginAfter(r.createdAt) {
		s.hub.park(sub)
		s.hub.place(sub)
		return
	}
	sub.user.created(r.createdAt)
	if sub.forLock {
		s.hub.readKey(sub)
	}
}

// beginAfter begins a watch from now on behind the revision at which it was created. It reports
// whether the watch is right so: etcd was read before, and must not have been at a later revision
// then. If it was, the member lags or etcd was restored meanwhile. Then the watch is created anew
// where it was wanted, so that its history is checked.
func (sub *watchSub) beginAfter(created Revision) bool {
	sub.next = max(created+1, sub.from)
	lags := sub.next > created+1
	sub.from = sub.next
	return !lags
}

// readKey reads the key of a watch that was created from now on: it may have been deleted before.
func (h *watchHub) readKey(sub *watchSub) {
	epoch := sub.epoch
	h.checks.add(readRequest{
		guards: sub.guards(),
		failed: func(err error) { h.whileIn(sub, epoch, func() { sub.user.failed(err) }) },
		done: func(resp *clientv3.TxnResponse, err error) {
			h.whileIn(sub, epoch, func() {
				if sub.user.checked(stateRead{}, resp, err) == checkAgain {
					h.again(sub)
				}
			})
		},
	})
}

// arrived ends a watch on the stream that it has moved from.
func (h *watchHub) arrived(sub *watchSub) {
	from := sub.home
	sub.current.drop()
	delete(from.subs, sub)
	sub.current, sub.home, sub.moving = sub.moving, sub.moving.stream, nil
	sub.behind, sub.large, sub.whole, sub.settled = false, false, false, true
	if sub.forLock {
		h.readKey(sub)
	}
}

// handleRefused takes a refusal. It harms no other watch.
func (s *watchStream) handleRefused(r *registration, resp *pb.WatchResponse) {
	h, sub := s.hub, r.sub
	err := watchRefusal(resp.CancelReason)
	expired := statusOf(err).code == codes.Unauthenticated || errors.Is(err, rpctypes.ErrAuthOldRevision)
	if expired {
		// The token that the stream was opened with has expired. Its watches go on. If it has
		// none, the next stream's may be no better.
		s.closed = true
		s.kind = catchUpStream
	}
	switch {
	case r.canceled:
	case sub.moving == r:
		sub.moving = nil
		if sub.home != s {
			delete(s.subs, sub)
		}
	case expired && s.served:
		h.park(sub)
		h.place(sub)
	case errors.Is(err, rpctypes.ErrPermissionDenied):
		if sub.forLock {
			sub.user.refused(err)
			h.again(sub)
			return
		}
		h.park(sub)
		sub.user.refused(err)
	default:
		sub.user.failed(err)
		h.again(sub)
	}
}

// watchRefusal is the error for etcd's reason, which it sends as text.
func watchRefusal(reason string) error {
	for _, err := range []error{rpctypes.ErrPermissionDenied, rpctypes.ErrInvalidAuthToken, rpctypes.ErrAuthOldRevision} {
		if strings.Contains(reason, err.Error()) {
			return err
		}
	}
	if strings.Contains(reason, rpctypes.ErrUserEmpty.Error()) {
		return rpctypes.ErrInvalidAuthToken // authentication was enabled after the stream was opened
	}
	return fmt.Errorf("the watch is refused: %s", reason)
}

func (s *watchStream) handleCanceled(resp *pb.WatchResponse) {
	r := s.byID[resp.WatchId]
	if r == nil {
		return // the answer to our own request
	}
	r.drop() // a compacted watch silences the progress of its stream until it is canceled
	h, sub := s.hub, r.sub
	if sub.moving == r {
		sub.moving = nil
		if sub.home != s {
			delete(s.subs, sub)
		}
		return
	}
	compacted := resp.CompactRevision
	switch {
	case compacted <= sub.next || sub.forLock:
		// Canceled for another reason, or by a member that lags: it took its leader's snapshot, in
		// which nothing is known of progress.
		h.again(sub)
	case compacted <= sub.from:
		sub.next = compacted // nothing was lost
		h.again(sub)
	default:
		h.park(sub)
		sub.user.missed(rpctypes.ErrCompacted)
	}
}

// handleProgress takes the revision that all watches of the stream have come to. It counts for a
// watch if the answer was made after the watch was created. That is certain if it is newer than the
// creation, or if all requests that were sent before are settled: etcd handles requests, and sends
// answers about progress, in order.
func (s *watchStream) handleProgress(resp *pb.WatchResponse) {
	rev := resp.Header.GetRevision()
	s.hub.known = max(s.hub.known, rev)
	s.settled = min(s.settled+1, s.asked)
	for _, r := range s.byID {
		if rev > r.createdAt {
			s.settled = min(max(s.settled, r.asked+1), s.asked)
		}
	}
	for _, r := range s.byID {
		fresh := rev > r.createdAt || r.stale == 0
		r.stale = max(r.stale-1, 0)
		if sub := r.sub; fresh && r.rest == nil && sub.current == r {
			s.progressed(sub, rev)
		}
	}
}

func (s *watchStream) progressed(sub *watchSub, rev Revision) {
	if rev >= sub.next && !sub.forLock {
		sub.next = rev + 1
		sub.user.deliver(nil, rev)
	}
	if s.catchesUp() {
		s.hub.move(sub)
	}
}

// handleEvents passes on whole revisions. It reports whether the reader of an ownStream has no room
// for more.
func (s *watchStream) handleEvents(resp *pb.WatchResponse) (full bool) {
	r := s.byID[resp.WatchId]
	if r == nil {
		return false
	}
	r.lastEvent = time.Now()
	events := resp.Events
	if r.rest != nil {
		events = append(r.rest, events...)
		r.rest = nil
	}
	if resp.Fragment {
		events, r.rest = splitLastRevision(events)
	}
	sub := r.sub
	if sub.current != r || len(events) == 0 {
		return false // it moves here, and the other stream goes on until then
	}
	upTo := events[len(events)-1].Kv.ModRevision
	if sub.forLock {
		sub.user.deliver(events, upTo)
		return false
	}
	if upTo < sub.next {
		return false // sent twice
	}
	first := 0
	for events[first].Kv.ModRevision < sub.next {
		first++
	}
	sub.next = upTo + 1
	s.hub.known = max(s.hub.known, upTo)
	room := sub.user.deliver(events[first:], upTo)
	switch {
	case room:
		return false
	case s.kind == catchUpStream && len(s.subs) == 1 && s.hub.count(ownStream) < maxOwn:
		s.kind = ownStream
		sub.behind = true
		fallthrough
	case s.kind == ownStream:
		return true
	}
	if resp.Fragment {
		sub.large = true
	}
	sub.behind = true
	s.hub.pause(sub)
	return false
}

// splitLastRevision splits off the events of the last revision, which may not be all.
func splitLastRevision(events []*mvccpb.Event) (whole, rest []*mvccpb.Event) {
	n := len(events)
	for n > 0 && events[n-1].Kv.ModRevision == events[len(events)-1].Kv.ModRevision {
		n--
	}
	return events[:n:n], slices.Clone(events[n:])
}

// A readRequest is for a batchReader.
type readRequest struct {
	ops    []clientv3.Op
	cost   int                                         // about how many bytes etcd handles for ops
	guards []clientv3.Cmp                              // compared as well
	wanted func() bool                                 // it has not become void meanwhile; nil: always
	failed func(err error)                             // an attempt failed, and is repeated
	done   func(resp *clientv3.TxnResponse, err error) // with as many responses as ops
}

// batchReader reads for many in few transactions. It has goroutines only while there is something
// to read.
type batchReader struct {
	ctx    context.Context
	client *clientv3.Client

	mu      sync.Mutex
	queue   []readRequest
	running int
}

const (
	maxReaders = 4
	// maxBatch is how many operations are read at once; etcd takes 128.
	maxBatch = 100
	// maxBatchCost is what a batch may cost, unless a single request costs more. A batch that etcd
	// cannot read in time would be repeated for ever.
	maxBatchCost = 2 << 20
	// maxReadTimeout bounds an attempt to read a batch that costs nothing. For each second more
	// leastReadRate bytes are read.
	maxReadTimeout, leastReadRate = 4 * time.Second, 100 << 10
)

func (b *batchReader) add(r readRequest) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.queue = append(b.queue, r)
	if b.running < maxReaders {
		b.running++
		go b.run() // until the queue is empty
	}
}

func (b *batchReader) run() {
	for {
		batch := b.take()
		if len(batch) == 0 {
			return
		}
		b.read(slices.DeleteFunc(batch, func(r readRequest) bool { return r.wanted != nil && !r.wanted() }))
	}
}

func (b *batchReader) take() []readRequest {
	b.mu.Lock()
	defer b.mu.Unlock()
	n, ops, cost := 0, 0, 0
	for ; n < len(b.queue); n++ {
		ops += b.queue[n].size()
		cost += b.queue[n].cost
		if n > 0 && (ops > maxBatch || cost > maxBatchCost) {
			break
		}
	}
	batch := b.queue[:n:n]
	b.queue = b.queue[n:]
	if n == 0 {
		b.queue = nil
		b.running--
	}
	return batch
}

func (r readRequest) size() int { return len(r.ops) + len(r.guards) }

// timeout bounds an attempt. It grows only after all endpoints have failed.
func (b *batchReader) timeout(failed, cost int) time.Duration {
	limit := maxReadTimeout + time.Duration(cost)*time.Second/leastReadRate
	return min(time.Second<<min(failed/max(len(b.client.Endpoints()), 1), 6), limit)
}

// read repeats a batch until it is answered. If it is refused, it finds out for which request.
func (b *batchReader) read(batch []readRequest) {
	if len(batch) == 0 {
		return
	}
	var ops []clientv3.Op
	var guards []clientv3.Cmp
	cost := 0
	for _, r := range batch {
		ops = append(ops, r.ops...)
		guards = append(guards, r.guards...)
		cost += r.cost
	}
	if len(ops) == 0 {
		ops = linearized(guards)
	}
	policy := RetryPolicy{}.withDefaults()
	for failed := 1; ; failed++ {
		resp, timedOut, err := attemptOnce(b.ctx, b.client, b.timeout(failed-1, cost), func(ctx context.Context) (*clientv3.TxnResponse, error) {
			return b.client.Txn(ctx).If(guards...).Then(ops...).Else(ops...).Commit()
		})
		switch {
		case err == nil:
			for i, r := range batch {
				n := len(r.ops)
				if len(r.guards) > 0 && !resp.Succeeded && len(batch) > 1 { // whose is it?
					b.read(batch[i : i+1])
					continue
				}
				part := &clientv3.TxnResponse{Header: resp.Header, Succeeded: resp.Succeeded, Responses: resp.Responses[:n]}
				resp.Responses = resp.Responses[n:]
				r.done(part, nil)
			}
			return
		case b.ctx.Err() != nil || b.client.Ctx().Err() != nil:
			return
		case timedOut || IsTransient(err):
			for _, r := range batch {
				r.failed(err)
			}
			sleep(b.ctx, policy.backoff(min(failed, maxBrokenBackoff)))
		case len(batch) == 1:
			batch[0].done(nil, err)
			return
		case errors.Is(err, rpctypes.ErrCompacted):
			b.read(b.withoutCompacted(batch))
			return
		default:
			for i := range batch {
				b.read(batch[i : i+1])
			}
			return
		}
	}
}

// withoutCompacted answers the requests whose revisions are compacted, and returns the others. It
// reads few of them: what is older than a revision that is compacted is as well.
func (b *batchReader) withoutCompacted(batch []readRequest) []readRequest {
	slices.SortFunc(batch, func(x, y readRequest) int { return cmp.Compare(x.revision(), y.revision()) })
	first, end := 0, len(batch) // the first that is not compacted is one of these, or end
	for first < end {
		middle, compacted := (first+end)/2, false
		probe := batch[middle]
		probe.done = func(_ *clientv3.TxnResponse, err error) { compacted = errors.Is(err, rpctypes.ErrCompacted) }
		if b.read([]readRequest{probe}); compacted {
			first = middle + 1
		} else {
			end = middle
		}
	}
	for _, r := range batch[:first] {
		r.done(nil, rpctypes.ErrCompacted)
	}
	return batch[first:]
}

// revision is as of when r reads, the oldest one; the largest if that is now.
func (r readRequest) revision() Revision {
	oldest := Revision(math.MaxInt64)
	for _, op := range r.ops {
		if rev := op.Rev(); rev != 0 {
			oldest = min(oldest, rev)
		}
	}
	return oldest
}
