package etcdutil

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
)

// redialInterval is how often gRPC dials while a request waits for a connection. gRPC's own backoff
// after refused connections reaches minutes, and clientv3 cannot configure it.
const redialInterval = 250 * time.Millisecond

// redialers has the redialer of each client that has requests waiting for a connection.
var redialers = struct {
	sync.Mutex
	byClient map[*clientv3.Client]*redialer
}{byClient: make(map[*clientv3.Client]*redialer)}

// redialer has gRPC dial, however many requests wait.
type redialer struct {
	client *clientv3.Client
	refs   int // guarded by redialers
	timer  *time.Timer
}

// keepDialing has gRPC dial now and then until stop is called, if there is no connection.
func keepDialing(client *clientv3.Client) (stop func()) {
	if client.ActiveConnection().GetState() == connectivity.Ready {
		return func() {}
	}
	redialers.Lock()
	defer redialers.Unlock()
	r := redialers.byClient[client]
	if r == nil {
		r = &redialer{client: client}
		r.timer = time.AfterFunc(0, r.dial)
		redialers.byClient[client] = r
	}
	r.refs++
	return r.detach
}

// dial ends gRPC's backoff. It runs as the timer's goroutine.
func (r *redialer) dial() {
	redialers.Lock()
	defer redialers.Unlock()
	if r.refs == 0 {
		return
	}
	redial(r.client)
	r.timer.Reset(redialInterval)
}

// redial ends gRPC's backoff. It waits until every endpoint has failed: ResetConnectBackoff reads
// gRPC's map of connections without a lock, while gRPC fills that map when it begins to connect,
// which crashes the process.
func redial(client *clientv3.Client) {
	if conn := client.ActiveConnection(); conn.GetState() == connectivity.TransientFailure {
		conn.ResetConnectBackoff()
	}
}

func (r *redialer) detach() {
	redialers.Lock()
	defer redialers.Unlock()
	if r.refs--; r.refs == 0 {
		r.timer.Stop()
		delete(redialers.byClient, r.client)
	}
}

// withConnectionError adds to err why there is no connection. clientv3 returns only ctx's error
// when a request has waited for a connection until its timeout.
func withConnectionError(client *clientv3.Client, err error) error {
	if client == nil || !isContextError(err) {
		return err
	}
	if why := connectionError(client); why != nil {
		return fmt.Errorf("%w: %w", err, why)
	}
	return err
}

// connectionError returns why there is no connection: refused, a failed handshake, a name that does
// not resolve. It returns nil if there is one, or if none has failed yet. gRPC reports it only to
// requests that do not wait.
func connectionError(client *clientv3.Client) error {
	conn := client.ActiveConnection()
	if conn.GetState() != connectivity.TransientFailure {
		return nil
	}
	ctx, cancel := context.WithTimeout(client.Ctx(), 25*time.Millisecond)
	defer cancel()
	_, err := etcdserverpb.NewMaintenanceClient(conn).Status(ctx, &etcdserverpb.StatusRequest{})
	if statusOf(err).code != codes.Unavailable {
		return nil
	}
	return err
}

// skipTime is after how long skipMembers sends its requests. clientv3 has sent its own by then, and
// etcd takes longer to answer that.
const skipTime = 500 * time.Microsecond

// skipMembers has the stream that is opened next reach another member than the last one, where
// clientv3 fetches a token for each stream. gRPC takes the members in turn: of two of them one
// would always get the request for the token, and the other one the stream. So requests are sent in
// between. stop ends them.
func skipMembers(ctx context.Context, client *clientv3.Client) (stop func()) {
	members := len(client.Endpoints())
	if client.Username == "" || members < 2 {
		return func() {}
	}
	ctx, cancel := context.WithCancel(ctx)
	skip := time.AfterFunc(skipTime, func() {
		for range 1 + rand.N(members-1) {
			go func() { // until it is answered or ctx ends
				_, _ = etcdserverpb.NewMaintenanceClient(client.ActiveConnection()).Status(ctx, &etcdserverpb.StatusRequest{})
			}()
		}
	})
	return func() {
		skip.Stop()
		cancel()
	}
}
