package main

import (
	"context"
	"math/rand/v2"
	"reflect"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// errCanceled is how a proxy between client and etcd answers when it resets a stream. clientv3
// repeats a call that is answered so, whatever became of it.
var errCanceled = status.Error(codes.Canceled, "stream terminated by RST_STREAM with error code: CANCEL")

// answers spoils the answers to a host's writes while a fault lasts. It stands below clientv3,
// which takes its errors for etcd's.
type answers struct {
	mu      sync.Mutex
	rand    *rand.Rand
	spoil   kind   // which fault lasts; empty if none does
	between func() // runs after etcd has applied a disturbed write, whose answer is then lost
	late    sync.WaitGroup
}

func newAnswers(id int) *answers { return &answers{rand: rand.New(rand.NewPCG(uint64(id), 1))} }

// start begins a fault.
func (a *answers) start(k kind, between func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.spoil, a.between = k, between
}

// stop ends the fault. It returns when the writes that the fault held back have arrived.
func (a *answers) stop() {
	a.mu.Lock()
	a.spoil = ""
	a.mu.Unlock()
	a.late.Wait()
}

// spoiled picks half of the writes while a fault lasts, and all that are to be disturbed.
func (a *answers) spoiled(disturb bool) (k kind, between func(), lateBy time.Duration) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.spoil == "" || a.rand.IntN(2) == 0 && !disturb {
		return "", nil, 0
	}
	if a.spoil == cancelLate {
		a.late.Add(1)
	}
	between = func() {}
	if disturb {
		between = a.between
	}
	return a.spoil, between, time.Duration(a.rand.Int64N(int64(2 * time.Second)))
}

// intercept is a grpc.UnaryClientInterceptor.
func (a *answers) intercept(
	ctx context.Context, method string, request, reply any, conn *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption,
) error {
	if !isWrite(request) {
		return invoke(ctx, method, request, reply, conn, opts...)
	}
	sleep(ctx, hesitationOf(ctx))
	k, between, lateBy := a.spoiled(ctx.Value(disturbedWrite{}) != nil)
	switch k {
	case cancelUnsent:
		return errCanceled
	case cancelApplied:
		if err := invoke(ctx, method, request, reply, conn, opts...); err != nil {
			return err
		}
		between()
		return errCanceled
	case cancelLate:
		// clientv3 reads reply no more, but uses it for its next sending.
		own := reflect.New(reflect.TypeOf(reply).Elem()).Interface()
		go func() { // until the write has arrived or failed
			defer a.late.Done()
			late, cancel := context.WithTimeout(context.WithoutCancel(ctx), lateBy+2*time.Second)
			defer cancel()
			sleep(late, lateBy)
			_ = invoke(late, method, request, own, conn)
		}()
		finish(opts, errCanceled)
		return errCanceled
	}
	return invoke(ctx, method, request, reply, conn, opts...)
}

// finish reports a sending's end as gRPC would have, had the proxy reset the stream.
func finish(opts []grpc.CallOption, err error) {
	for _, o := range opts {
		if o, ok := o.(grpc.OnFinishCallOption); ok {
			o.OnFinish(err)
		}
	}
}

// isWrite reports whether a repetition of the request could do harm.
func isWrite(request any) bool {
	switch r := request.(type) {
	case *etcdserverpb.TxnRequest:
		for _, op := range r.Success {
			if op.GetRequestRange() == nil {
				return true
			}
		}
		return false
	case *etcdserverpb.PutRequest, *etcdserverpb.DeleteRangeRequest, *etcdserverpb.LeaseGrantRequest, *etcdserverpb.LeaseRevokeRequest:
		return true
	}
	return false
}

// disturbedWrite is the key of contexts whose writes are disturbed whenever answers are spoiled.
type disturbedWrite struct{}

// hesitationKey is for contexts whose writes are slow to be sent.
type hesitationKey struct{}

// withHesitation has the writes under a context wait before they are sent: others come between what
// the caller has read and what it writes.
func withHesitation(ctx context.Context, d time.Duration) context.Context {
	return context.WithValue(ctx, hesitationKey{}, d)
}

func hesitationOf(ctx context.Context) time.Duration {
	d, _ := ctx.Value(hesitationKey{}).(time.Duration)
	return d
}

// caller is the context of a call. While the fault lasts it carries metadata as a service's
// contexts do: a request ID, of each call its own.
func (w *worker) caller(ctx context.Context) context.Context {
	if !w.host.metadata.Load() {
		return ctx
	}
	return metadata.AppendToOutgoingContext(ctx, "request-id", time.Now().String())
}
