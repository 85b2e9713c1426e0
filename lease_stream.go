package etcdutil

import (
	"context"
	"slices"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
)

// keepAlive renews the leases of one client over one stream. clientv3 has such a stream, but does not tell when a renewal
// was sent; its KeepAliveOnce spins while the server is unavailable.
//
// Its goroutine is started by the first renewal that is due and ended by the last lease to leave.
type keepAlive struct {
	client  *clientv3.Client
	members int // guarded by keepAlives
	ctx     context.Context
	end     context.CancelFunc
	done    chan struct{}
	wake    chan struct{} // due has grown

	// mu is never held while sending or receiving.
	mu      sync.Mutex
	due     []*Lease  // to be sent
	pending []renewal // sent and unanswered, in the order of their answers
	heard   time.Time // when the stream was opened or last gave an answer
	member  string    // at the other end of it
	stuck   string    // the member that last owed an answer for too long, until there is one
	reopen  context.CancelFunc

	fruitless int // times that the stream was reopened since the last answer
}

// A renewal is one request to renew.
type renewal struct {
	lease *Lease
	sent  time.Time
}

// keepAlives has the stream of each client that has leases to renew. It guards who is a member of which.
var keepAlives = struct {
	sync.Mutex
	of map[*clientv3.Client]*keepAlive
}{of: make(map[*clientv3.Client]*keepAlive)}

// join makes the lease a member of its client's stream; nil if its context has ended.
func (l *Lease) join() *keepAlive {
	keepAlives.Lock()
	defer keepAlives.Unlock()
	if l.left || l.Err() != nil {
		return nil
	}
	if l.stream == nil {
		l.stream = streamOf(l.config.client)
		l.stream.members++
	}
	return l.stream
}

func streamOf(client *clientv3.Client) *keepAlive {
	k := keepAlives.of[client]
	if k == nil {
		k = &keepAlive{client: client, done: make(chan struct{}), wake: make(chan struct{}, 1)}
		k.ctx, k.end = context.WithCancel(clientv3.WithRequireLeader(context.Background()))
		keepAlives.of[client] = k
		go k.run() // until the last member leaves
	}
	return k
}

// leave ends the membership. The last to leave ends the stream.
func (l *Lease) leave() {
	keepAlives.Lock()
	defer keepAlives.Unlock()
	if k := l.stream; k != nil && !l.left {
		if k.members--; k.members == 0 {
			delete(keepAlives.of, k.client)
			k.end()
		}
	}
	l.left = true
}

// awaitStream waits for the stream to end, if the last member has left it.
func (l *Lease) awaitStream() {
	keepAlives.Lock()
	k := l.stream
	keepAlives.Unlock()
	if k != nil && k.ctx.Err() != nil {
		<-k.done
	}
}

// request has the lease renewed. It reports whether an earlier renewal is unanswered: then this is no second one, but
// the stream is reopened if the member behind it seems stuck, to reach another.
func (k *keepAlive) request(l *Lease) (late bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if l.renewing {
		k.leaveIfStuck(l.patience() * 3 / 4) // the request has waited a little less than its lease
		return true
	}
	l.renewing = true
	k.due = append(k.due, l)
	select {
	case k.wake <- struct{}{}:
	default:
	}
	return false
}

// leaveIfStuck reopens the stream if its member has owed an answer for as long as patience. That is doubled each time
// without an answer, or a short lease could keep the others from answers that are slow to come.
func (k *keepAlive) leaveIfStuck(patience time.Duration) {
	patience <<= min(k.fruitless, 10)
	if len(k.pending) == 0 || time.Since(k.heard) < patience || time.Since(k.pending[0].sent) < patience {
		return
	}
	k.fruitless++
	k.stuck = k.member
	k.reopen()
}

func (k *keepAlive) run() {
	defer close(k.done)
	for failed := 0; k.awaitDue(); {
		if failed > 0 {
			sleep(k.ctx, k.pause(failed))
			k.client.ActiveConnection().ResetConnectBackoff()
		}
		if answered := k.serve(k.openingPatience(failed)); answered {
			failed = 0
		} else {
			failed++
		}
	}
}

// awaitDue waits until there is something to renew: a stream that breaks while idle is not missed. It reports false when
// the last member has left.
func (k *keepAlive) awaitDue() bool {
	for k.ctx.Err() == nil {
		if k.gather() {
			return true
		}
		select {
		case <-k.wake:
		case <-k.ctx.Done():
		}
	}
	return false
}

// gather readies what a stream that has ended leaves to the next: what it owed is due again, the most urgent first, and
// what has expired meanwhile is forgotten. It reports whether anything is due.
func (k *keepAlive) gather() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, r := range k.pending {
		k.due = append(k.due, r.lease)
	}
	k.pending = nil
	k.due = slices.DeleteFunc(k.due, (*Lease).forgoRenewal)
	expiry := make(map[*Lease]time.Time, len(k.due))
	for _, l := range k.due {
		expiry[l] = l.Expiry()
	}
	slices.SortFunc(k.due, func(a, b *Lease) int { return expiry[a].Compare(expiry[b]) })
	return len(k.due) > 0
}

// forgoRenewal reports whether the lease is not to be renewed any more. The server would let a whole stream wait for one
// lease that it is about to revoke.
func (l *Lease) forgoRenewal() bool {
	if l.Err() == nil && time.Now().Before(l.Expiry()) {
		return false
	}
	l.renewing = false
	return true
}

// pause is how long to wait before the stream is reopened. It backs off, but not so far that a fault which ends just
// before a lease does goes unnoticed: the next attempts come within a quarter of the time that is left.
func (k *keepAlive) pause(failed int) time.Duration {
	backoff := RetryPolicy{}.withDefaults().backoff(failed)
	return max(min(backoff, k.left()/8), time.Millisecond)
}

// left is the time until the first of the leases that are due expires. gather has sorted them.
func (k *keepAlive) left() time.Duration {
	k.mu.Lock()
	defer k.mu.Unlock()
	return time.Until(k.due[0].Expiry())
}

// openingPatience is how long to wait for a stream to open. That can block on a token, which clientv3 fetches anew for every
// stream: the member that is asked may be stuck, or just slow, for making tokens is meant to be. So the patience grows, as
// far as the time that is left allows another attempt.
func (k *keepAlive) openingPatience(failed int) time.Duration {
	return max(min(k.left()/2, 2*time.Second<<min(failed, 10)), time.Second)
}

// serve opens a stream and runs it until it fails. It reports whether the failure is no reason to back off.
func (k *keepAlive) serve(patience time.Duration) (answered bool) {
	ctx, cancel := context.WithCancel(k.ctx)
	defer cancel()
	opening := time.AfterFunc(patience, cancel)
	stream, err := k.open(ctx)
	opening.Stop()
	if err != nil {
		return false
	}
	k.opened(stream, cancel)
	sending := make(chan struct{})
	go func() { // until ctx ends
		defer close(sending)
		k.send(ctx, stream)
	}()
	answered = k.receive(stream)
	cancel()
	<-sending
	return answered
}

type keepAliveStream = etcdserverpb.Lease_LeaseKeepAliveClient

// open opens a stream to another member than the one that is stuck, if it can: gRPC takes them in turn. A stream that it
// does not take stays open, unused, until ctx ends.
func (k *keepAlive) open(ctx context.Context) (keepAliveStream, error) {
	remote, stuck := clientv3.RetryLeaseClient(k.client), k.stuckMember()
	stream, err := remote.LeaseKeepAlive(ctx)
	for others := 2 * len(k.client.Endpoints()); others > 0 && err == nil && stuck != "" && memberOf(stream) == stuck; others-- {
		stream, err = remote.LeaseKeepAlive(ctx)
	}
	return stream, err
}

// memberOf is the address at the other end of a stream.
func memberOf(stream keepAliveStream) string {
	p, ok := peer.FromContext(stream.Context())
	if !ok {
		return ""
	}
	return p.Addr.String()
}

func (k *keepAlive) stuckMember() string {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.stuck
}

func (k *keepAlive) opened(stream keepAliveStream, reopen context.CancelFunc) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.heard = time.Now()
	k.member = memberOf(stream)
	k.reopen = reopen
}

// send has a goroutine of its own, because flow control can block it.
func (k *keepAlive) send(ctx context.Context, stream keepAliveStream) {
	for ctx.Err() == nil {
		if l := k.next(); l == nil {
			select {
			case <-k.wake:
			case <-ctx.Done():
			}
		} else if stream.Send(&etcdserverpb.LeaseKeepAliveRequest{ID: int64(l.id)}) != nil {
			return // receive is told why
		}
	}
}

// next takes the next lease to renew, and notes the time: the answer will count from it.
func (k *keepAlive) next() *Lease {
	k.mu.Lock()
	defer k.mu.Unlock()
	for len(k.due) > 0 {
		l := k.due[0]
		k.due = k.due[1:]
		if !l.forgoRenewal() {
			k.pending = append(k.pending, renewal{l, time.Now()})
			return l
		}
	}
	return nil
}

// receive takes answers until the stream fails.
func (k *keepAlive) receive(stream keepAliveStream) (answered bool) {
	for {
		resp, err := stream.Recv()
		if err != nil {
			return k.refused(err) || answered
		}
		r, ok := k.answer(clientv3.LeaseID(resp.ID))
		if !ok {
			return false // out of order: no answer can be trusted to belong to its request
		}
		r.lease.renewed(r.sent, time.Duration(resp.TTL)*time.Second)
		answered = true
	}
}

// answer takes the renewal that an answer for id belongs to: the oldest, for the server answers in order.
func (k *keepAlive) answer(id clientv3.LeaseID) (renewal, bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if len(k.pending) == 0 || k.pending[0].lease.id != id {
		return renewal{}, false
	}
	k.heard, k.stuck, k.fruitless = time.Now(), "", 0
	return k.takeOldest(), true
}

func (k *keepAlive) takeOldest() renewal {
	r := k.pending[0]
	k.pending = k.pending[1:]
	r.lease.renewing = false
	return r
}

// refused charges a permanent refusal, which ends the stream, to the lease whose turn it was. It reports whether err was
// one.
func (k *keepAlive) refused(err error) bool {
	if statusOf(err).code != codes.PermissionDenied {
		return false
	}
	k.mu.Lock()
	if len(k.pending) == 0 {
		k.mu.Unlock()
		return false
	}
	r := k.takeOldest()
	k.mu.Unlock()
	r.lease.refused(rpctypes.Error(err))
	return true
}
