package etcdutil

import (
	"context"
	"errors"
	"reflect"
	"slices"
	"sync"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
)

// txnRequest is a transaction: then if every guard holds, else otherwise.
type txnRequest struct {
	guards          []clientv3.Cmp
	then, otherwise []clientv3.Op
}

// linearized returns an operation for a transaction that only compares. etcd answers a transaction
// without operations from the member's own state, which may lag.
func linearized(guards []clientv3.Cmp) []clientv3.Op {
	return []clientv3.Op{clientv3.OpGet(string(guards[0].KeyBytes()), clientv3.WithCountOnly())}
}

// txnResult says what the sendings of a transaction may have done, except the one whose answer was
// returned. clientv3 may send one call several times by itself, and returns only the last answer.
type txnResult struct {
	mayBeApplied  bool // one of the sendings may have been applied
	mayStillApply bool // one of them may yet be
	answered      bool // one of them was answered without an error
}

// send makes one attempt at a transaction and adds to r what it leaves open. seen is false if not
// every sending could be observed.
func (r *txnResult) send(ctx context.Context, client *clientv3.Client, q txnRequest) (resp *clientv3.TxnResponse, seen bool, err error) {
	kv, s := observe(client)
	resp, err = kv.Txn(ctx).If(q.guards...).Then(q.then...).Else(q.otherwise...).Commit()
	if IsAmbiguous(err) {
		r.addAmbiguous(err)
	}
	return resp, s != nil && r.addOthers(s, err == nil), err
}

// addOthers adds the sendings of an attempt, except the last one if that was answered. It reports
// whether the last one was among them.
func (r *txnResult) addOthers(s *sendings, answered bool) (seen bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	others := s.answered
	if answered {
		others--
	}
	r.answered = r.answered || others > 0
	r.mayBeApplied = r.mayBeApplied || s.result.mayBeApplied || others > 0
	r.mayStillApply = r.mayStillApply || s.result.mayStillApply
	return others >= 0
}

// addAmbiguous adds a sending that failed with an ambiguous error.
func (r *txnResult) addAmbiguous(err error) {
	r.mayBeApplied = true
	// Without space left etcd may have applied it, but will not do so later.
	r.mayStillApply = r.mayStillApply || !errors.Is(rpctypes.Error(err), rpctypes.ErrNoSpace)
}

// sendings are the sendings of one call, as seen below clientv3.
type sendings struct {
	mu       sync.Mutex
	answered int       // by etcd, without an error
	result   txnResult // of those that failed
}

func (s *sendings) finished(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case err == nil:
		s.answered++
	case IsAmbiguous(err):
		s.result.addAmbiguous(err)
	}
}

// observe returns a KV whose sendings are observed. They cannot be, and the sendings are nil, where
// the client's KV is not clientv3's own, for example wrapped by a namespace.
func observe(client *clientv3.Client) (clientv3.KV, *sendings) {
	if !hasOwnKV(client) {
		return client.KV, nil
	}
	s := &sendings{}
	remote := observedKV{clientv3.RetryKVClient(client), grpc.OnFinish(s.finished)}
	return clientv3.NewKVFromKVClient(remote, client), s
}

// hasOwnKV reports whether the client's KV is clientv3's own.
func hasOwnKV(client *clientv3.Client) bool { return reflect.TypeOf(client.KV) == ownKV }

var ownKV = reflect.TypeOf(clientv3.NewKVFromKVClient(nil, nil))

type observedKV struct {
	etcdserverpb.KVClient
	onFinish grpc.CallOption
}

func (o observedKV) Txn(ctx context.Context, r *etcdserverpb.TxnRequest, opts ...grpc.CallOption) (*etcdserverpb.TxnResponse, error) {
	return o.KVClient.Txn(ctx, r, append(slices.Clip(opts), o.onFinish)...)
}
