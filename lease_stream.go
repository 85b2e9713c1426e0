package etcdutil

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
)

// renewStream renews the leases of one client over one stream. clientv3's own stream does not
// report when it sent a renewal, and its KeepAliveOnce spins while the server is unavailable.
//
// The first renewal that is due starts the stream, and the last lease to detach ends it.
type renewStream struct {
	client *clientv3.Client
	refs   int // guarded by renewStreams
	ctx    context.Context
	cancel context.CancelFunc
	done   chan struct{}
	wake   chan struct{} // due has grown

	// mu is never held while sending or receiving.
	mu           sync.Mutex
	due          []*renewal // to be sent: those that were refused come last
	pending      []*renewal // sent and unanswered, at most one of each lease, the oldest first
	lastAnswerAt time.Time  // or when the stream was opened
	member       string     // at the other end of the stream
	stuckMember  string     // the member that last owed an answer for too long; "" after an answer
	reopen       context.CancelFunc
	reopens      int   // since the last answer
	failure      error // why the last stream failed; nil after an answer
}

// renewal is a lease's place in the stream of its client.
type renewal struct {
	lease *Lease

	// Guarded by renewStreams.
	stream   *renewStream // nil until the first renewal is due
	detached bool

	// Guarded by the stream's mutex.
	state    renewalState
	sentAt   time.Time
	refusals int // since the last answer
}

type renewalState int

const (
	renewalIdle    renewalState = iota
	renewalDue                  // in renewStream.due
	renewalPending              // in renewStream.pending
)

// renewStreams has the stream of each client that has leases to renew. Its mutex guards which
// leases are attached to which stream.
var renewStreams = struct {
	sync.Mutex
	byClient map[*clientv3.Client]*renewStream
}{byClient: make(map[*clientv3.Client]*renewStream)}

// schedule has the lease renewed. It reports whether an earlier renewal has been unanswered for as
// long as timeout: then it sends no second one, but reopens the stream if its member seems stuck.
func (r *renewal) schedule(timeout time.Duration) (late bool) {
	s := r.attach()
	if s == nil {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if r.state != renewalIdle {
		s.reopenIfStuck(timeout)
		return true
	}
	r.state = renewalDue
	s.due = append(s.due, r)
	s.signalDue()
	return false
}

func (s *renewStream) signalDue() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// failure returns why the lease has not been renewed, if the stream has failed.
func (r *renewal) failure() error {
	renewStreams.Lock()
	s, detached := r.stream, r.detached
	renewStreams.Unlock()
	if s == nil || detached {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.failure
}

// attach returns the client's stream, or nil if the lease is not to be renewed any more.
func (r *renewal) attach() *renewStream {
	renewStreams.Lock()
	defer renewStreams.Unlock()
	if r.detached || r.lease.Err() != nil {
		return nil
	}
	if r.stream == nil {
		r.stream = streamOf(r.lease.config.client)
		r.stream.refs++
	}
	return r.stream
}

func streamOf(client *clientv3.Client) *renewStream {
	s := renewStreams.byClient[client]
	if s == nil {
		s = &renewStream{client: client, done: make(chan struct{}), wake: make(chan struct{}, 1)}
		s.ctx, s.cancel = context.WithCancel(clientv3.WithRequireLeader(context.Background()))
		renewStreams.byClient[client] = s
		go s.run() // until the last lease detaches
	}
	return s
}

// detach ends the renewals of a lease. The last lease to detach ends the stream.
func (r *renewal) detach() {
	renewStreams.Lock()
	defer renewStreams.Unlock()
	if s := r.stream; s != nil && !r.detached {
		if s.refs--; s.refs == 0 {
			delete(renewStreams.byClient, s.client)
			s.cancel()
		}
	}
	r.detached = true
}

// awaitStream waits for the stream to end, if the last lease has detached from it.
func (r *renewal) awaitStream() {
	renewStreams.Lock()
	s := r.stream
	renewStreams.Unlock()
	if s != nil && s.ctx.Err() != nil {
		<-s.done
	}
}

// reopenIfStuck reopens the stream if its member has owed an answer for as long as patience.
// Patience doubles with each time without an answer: a short lease must not keep the others from
// answers that are slow to come.
func (s *renewStream) reopenIfStuck(patience time.Duration) {
	patience <<= min(s.reopens, 10)
	if len(s.pending) == 0 || time.Since(s.lastAnswerAt) < patience || time.Since(s.pending[0].sentAt) < patience {
		return
	}
	s.reopens++
	s.stuckMember = s.member
	s.failure = fmt.Errorf("no answer from %s", s.member)
	s.reopen()
}

// run opens streams one after the other. A stream that breaks while nothing is due is not missed.
func (s *renewStream) run() {
	defer close(s.done)
	var delay backoff
	for s.waitDue() {
		sleep(s.ctx, s.reopenDelay(delay.next()))
		switch end := s.runStream(s.openTimeout(delay.failed)); {
		case end.answered:
			delay = backoff{}
		case end.denied:
			delay = backoff{policy: deniedPolicy, failed: delay.failed + 1}
		default:
			delay = backoff{policy: reopenPolicy, failed: delay.failed + 1}
		}
	}
}

// A backoff is the delay after so many failures in a row.
type backoff struct {
	policy RetryPolicy
	failed int
}

func (b backoff) next() time.Duration {
	if b.failed == 0 {
		return 0
	}
	return b.policy.backoff(b.failed)
}

var (
	reopenPolicy = RetryPolicy{}.withDefaults()
	// deniedPolicy is short: the stream reopens once for each lease that may not be renewed, and
	// the others wait for that.
	deniedPolicy = RetryPolicy{Initial: 5 * time.Millisecond, Max: 100 * time.Millisecond}
)

// waitDue waits until there is a lease to renew. It returns false when the last one has detached.
func (s *renewStream) waitDue() bool {
	for s.ctx.Err() == nil {
		if s.requeue() {
			return true
		}
		select {
		case <-s.wake:
		case <-s.ctx.Done():
		}
	}
	return false
}

// requeue makes due again what the last stream left unanswered, and drops what has expired. The
// lease that expires first comes first, but those that were refused come last. It reports whether
// anything is due.
func (s *renewStream) requeue() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range s.pending {
		r.state = renewalDue
	}
	s.due = append(s.due, s.pending...)
	s.pending = nil
	s.due = slices.DeleteFunc(s.due, (*renewal).dropIfExpired)
	expiry := make(map[*renewal]time.Time, len(s.due))
	for _, r := range s.due {
		expiry[r] = r.lease.Expiry()
	}
	slices.SortFunc(s.due, func(a, b *renewal) int {
		return cmp.Or(cmp.Compare(min(a.refusals, 1), min(b.refusals, 1)), expiry[a].Compare(expiry[b]))
	})
	return len(s.due) > 0
}

// dropIfExpired reports whether the lease is not to be renewed any more. The server would block the
// whole stream for one lease that it is about to revoke.
func (r *renewal) dropIfExpired() bool {
	if r.lease.Err() == nil && time.Now().Before(r.lease.Expiry()) {
		return false
	}
	r.state = renewalIdle
	return true
}

// untilExpiry returns how long the first lease in due has left: after requeue, the least of those
// that were not refused.
func (s *renewStream) untilExpiry() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.due) == 0 {
		return 0
	}
	return time.Until(s.due[0].lease.Expiry())
}

// reopenDelay bounds how long the stream waits before it reopens: it tries several times within the
// time that is left, so that a fault which ends just before a lease does costs nothing.
func (s *renewStream) reopenDelay(backoff time.Duration) time.Duration {
	return max(min(backoff, s.untilExpiry()/8), 0)
}

// openTimeout returns how long the stream may take to open. clientv3 fetches a new token for every
// stream, which takes long by design, and the member that it asks may be stuck. So the timeout
// grows, and leaves time for another attempt.
func (s *renewStream) openTimeout(failed int) time.Duration {
	return max(min(s.untilExpiry()/2, 2*time.Second<<min(failed, 10)), minOpenTimeout)
}

const minOpenTimeout = 200 * time.Millisecond

// A streamEnd says how a stream has ended.
type streamEnd struct {
	answered bool // it answered a renewal
	denied   bool // the server refused to renew one lease
}

// runStream opens a stream and runs it until it fails.
func (s *renewStream) runStream(openTimeout time.Duration) streamEnd {
	ctx, cancel := context.WithCancel(s.ctx)
	defer cancel()
	stream, err := s.open(ctx, openTimeout, cancel)
	if err != nil {
		s.setFailure(withConnectionError(s.client, err))
		return streamEnd{}
	}
	sending := make(chan struct{})
	go func() { // until ctx ends
		defer close(sending)
		s.send(ctx, stream)
	}()
	end := s.receive(ctx, stream)
	cancel()
	<-sending
	return end
}

type keepAliveStream = etcdserverpb.Lease_LeaseKeepAliveClient

// open opens a stream within timeout.
func (s *renewStream) open(ctx context.Context, timeout time.Duration, cancel context.CancelFunc) (keepAliveStream, error) {
	defer keepDialing(s.client)()
	timer := time.AfterFunc(timeout, cancel)
	stream, err := s.openElsewhere(ctx)
	switch {
	case !timer.Stop():
		return nil, cmp.Or(err, context.DeadlineExceeded)
	case err != nil:
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lastAnswerAt, s.member, s.reopen = time.Now(), memberOf(stream), cancel
	return stream, nil
}

// openElsewhere opens a stream to another member than the stuck one, if it can: gRPC takes them in
// turn. The streams that it does not use stay open until ctx ends.
func (s *renewStream) openElsewhere(ctx context.Context) (keepAliveStream, error) {
	remote, stuck := clientv3.RetryLeaseClient(s.client), s.stuck()
	stream, err := remote.LeaseKeepAlive(ctx)
	for others := 2 * len(s.client.Endpoints()); others > 0 && err == nil && stuck != "" && memberOf(stream) == stuck; others-- {
		stop := skipMembers(ctx, s.client)
		stream, err = remote.LeaseKeepAlive(ctx)
		stop()
	}
	return stream, err
}

// memberOf returns the address at the other end of a stream.
func memberOf(stream keepAliveStream) string {
	p, ok := peer.FromContext(stream.Context())
	if !ok {
		return ""
	}
	return p.Addr.String()
}

func (s *renewStream) stuck() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stuckMember
}

// leaveMember has the next stream reach another member, if there is one: this one may be cut off
// from the others.
func (s *renewStream) leaveMember() {
	if len(s.client.Endpoints()) == 1 {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stuckMember = s.member
}

func (s *renewStream) setFailure(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.failure = err
}

// send has a goroutine of its own, because flow control can block it.
func (s *renewStream) send(ctx context.Context, stream keepAliveStream) {
	for ctx.Err() == nil {
		if r := s.next(); r == nil {
			select {
			case <-s.wake:
			case <-ctx.Done():
			}
		} else if stream.Send(&etcdserverpb.LeaseKeepAliveRequest{ID: int64(r.lease.id)}) != nil {
			return // receive gets the reason
		}
	}
}

// next takes the next renewal to send, and notes the time: its answer will count from it.
func (s *renewStream) next() *renewal {
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(s.due) > 0 {
		i := max(0, slices.IndexFunc(s.due, func(r *renewal) bool { return r.refusals == 0 }))
		r := s.due[i]
		s.due = slices.Delete(s.due, i, i+1)
		if !r.dropIfExpired() {
			r.state, r.sentAt = renewalPending, time.Now()
			s.pending = append(s.pending, r)
			return r
		}
	}
	return nil
}

// receive takes answers until the stream fails.
func (s *renewStream) receive(ctx context.Context, stream keepAliveStream) (end streamEnd) {
	for {
		resp, err := stream.Recv()
		switch {
		case err == nil:
			end.answered = s.takeAnswer(resp) || end.answered
		case ctx.Err() != nil: // it is to reopen, or no lease is left
			return end
		default:
			s.setFailure(rpctypes.Error(err))
			if end.denied = s.chargeDenial(err); !end.denied {
				s.leaveMember()
			}
			return end
		}
	}
}

// takeAnswer passes an answer to its lease, which has one unanswered renewal at most. etcd answers
// in order, its gRPC proxy does not. takeAnswer reports whether a renewal waited for the answer.
func (s *renewStream) takeAnswer(resp *etcdserverpb.LeaseKeepAliveResponse) bool {
	s.mu.Lock()
	i := slices.IndexFunc(s.pending, func(r *renewal) bool { return int64(r.lease.id) == resp.ID })
	if i < 0 {
		s.mu.Unlock()
		return false
	}
	r := s.takePending(i)
	sentAt := r.sentAt
	r.refusals = 0
	s.lastAnswerAt, s.stuckMember, s.reopens, s.failure = time.Now(), "", 0, nil
	s.mu.Unlock()
	r.lease.handleRenewal(sentAt, time.Duration(resp.TTL)*time.Second)
	return true
}

func (s *renewStream) takePending(i int) *renewal {
	r := s.pending[i]
	s.pending = slices.Delete(s.pending, i, i+1)
	r.state = renewalIdle
	return r
}

// chargeDenial charges a refusal, which ends the stream, to the oldest unanswered renewal, because
// etcd answers in order. It reports whether err was one.
func (s *renewStream) chargeDenial(err error) bool {
	if statusOf(err).code != codes.PermissionDenied {
		return false
	}
	s.mu.Lock()
	if len(s.pending) == 0 {
		s.mu.Unlock()
		return false
	}
	r := s.takePending(0)
	r.refusals++
	refusals := r.refusals
	s.mu.Unlock()
	r.lease.handleDenied(rpctypes.Error(err), refusals)
	return true
}
