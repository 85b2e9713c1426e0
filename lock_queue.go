package etcdutil

import (
	"bytes"
	"context"
	"errors"
	"math"
	"math/rand/v2"
	"strconv"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/metadata"
)

// awaitTurn queues up and waits until no contender is older.
func (l *Lock) awaitTurn(ctx context.Context) error {
	older, err := l.enqueue(ctx)
	for err == nil && older != nil {
		if err = l.awaitGone(ctx, older); err == nil {
			older, err = l.look(ctx)
		}
	}
	return err
}

// enqueue writes the key, once however often it is sent, and returns the nearest older contender, if any.
func (l *Lock) enqueue(ctx context.Context) (*mvccpb.KeyValue, error) {
	resp, err := l.write(ctx, clientv3.Compare(clientv3.CreateRevision(l.key), "=", 0), newest(l.name))
	if err != nil {
		return nil, err
	}
	if !resp.Succeeded { // an earlier attempt has written it
		written, contenders, err := l.found(ctx)
		switch {
		case err != nil:
			return nil, err
		case !written: // and somebody has deleted it
			return nil, l.keyGone()
		}
		return nearest(ctx, &l.config, l.waiting, l.name, contenders, l.token)
	}
	l.entered(resp.Header.Revision)
	return nearest(ctx, &l.config, l.waiting, l.name, resp.Responses[1].GetResponseRange(), l.token)
}

// write repeats a transaction that creates the key until it is answered.
func (l *Lock) write(ctx context.Context, guard clientv3.Cmp, more ...clientv3.Op) (*clientv3.TxnResponse, error) {
	then := append([]clientv3.Op{clientv3.OpPut(l.key, l.value, clientv3.WithLease(l.lease.id))}, more...)
	resp, err := retry(ctx, &l.config, l.waiting, "queue up", func(ctx context.Context) (*clientv3.TxnResponse, error) {
		resp, err := l.config.client.Txn(ctx).If(guard).Then(then...).Commit()
		l.doubt = l.doubt || IsAmbiguous(err)
		return resp, err
	})
	// Of a lease that another client granted it may only be the wrong etcd that is asked.
	if errors.Is(err, rpctypes.ErrLeaseNotFound) && l.lease.config.client == l.config.client {
		l.lease.markLost(ErrLeaseRevoked)
	}
	return resp, err
}

// found reads the key, which an earlier attempt may have written, and the youngest contenders. It reports whether it was
// written.
func (l *Lock) found(ctx context.Context) (written bool, contenders *etcdserverpb.RangeResponse, err error) {
	resp, err := retryRead(ctx, &l.config, l.waiting, "read the queue", func(ctx context.Context) (*clientv3.TxnResponse, error) {
		return l.config.client.Txn(ctx).Then(clientv3.OpGet(l.key), newest(l.name)).Commit()
	})
	if err != nil {
		return false, nil, err
	}
	contenders = resp.Responses[1].GetResponseRange()
	contenders.Header = resp.Header
	for _, kv := range resp.Responses[0].GetResponseRange().Kvs {
		if clientv3.LeaseID(kv.Lease) == l.lease.id { // else somebody else wrote it, and it holds nothing
			l.entered(kv.CreateRevision)
			return true, contenders, nil
		}
	}
	return false, contenders, nil
}

// entered notes the token.
func (l *Lock) entered(token Revision) {
	l.token, l.version, l.revision = token, 1, token
	l.watching.Add(1)
	l.watch = time.AfterFunc(keyWatchDelay, l.watchKey)
}

// prefix is where the contenders for a name are.
func prefix(name string) string { return name + "/" }

// isContender tells a contender for name from what else may be under its prefix: the keys of another lock, whose name
// goes on after the slash, and keys without a lease. This is how etcd's own recipes name theirs.
func isContender(name string, kv *mvccpb.KeyValue) bool {
	rest, ok := bytes.CutPrefix(kv.Key, []byte(prefix(name)))
	return ok && kv.Lease != 0 && !bytes.Contains(rest, []byte("/"))
}

// newest reads the youngest few keys under a name, which is enough to find the nearest older contender unless there are
// many strays. Not WithKeysOnly: etcd 3.7 then says that no key has a lease.
func newest(name string, opts ...clientv3.OpOption) clientv3.Op {
	begin := prefix(name)
	return clientv3.OpGet(begin, append(opts, clientv3.WithRange(clientv3.GetPrefixRangeEnd(begin)), clientv3.WithLimit(8),
		clientv3.WithSort(clientv3.SortByCreateRevision, clientv3.SortDescend))...)
}

// nearest finds the youngest contender that is older than token in what newest read; nil if there is none.
func nearest(ctx context.Context, c *config, policy RetryPolicy, name string, page *etcdserverpb.RangeResponse, token Revision) (*mvccpb.KeyValue, error) {
	for _, kv := range page.Kvs {
		if kv.CreateRevision < token && isContender(name, kv) {
			return kv, nil
		}
	}
	if !page.More {
		return nil, nil
	}
	// All of the young ones are strays. How many there are is not known: read on, but not everything at once.
	all, err := retryRead(ctx, c, policy, "read the queue", func(ctx context.Context) (*clientv3.GetResponse, error) {
		return c.client.Get(ctx, prefix(name), clientv3.WithPrefix(), clientv3.WithMaxCreateRev(token-1),
			clientv3.WithLimit(16*int64(len(page.Kvs))), clientv3.WithSort(clientv3.SortByCreateRevision, clientv3.SortDescend))
	})
	if err != nil {
		return nil, err
	}
	return nearest(ctx, c, policy, name, (*etcdserverpb.RangeResponse)(all), token)
}

// awaitGone waits until older, or the lock's own key, is gone. Where its watch is silent or fails it reads these two, and no
// more than these: a long queue would keep etcd busy by waiting.
func (l *Lock) awaitGone(ctx context.Context, older *mvccpb.KeyValue) error {
	for failed := 0; ; {
		gone, refused := l.watchOlder(ctx, older, failed)
		switch {
		case gone:
			return nil
		case ctx.Err() != nil:
			return contextError(ctx)
		}
		if there, err := l.stillThere(ctx, older); err != nil || !there {
			return err
		}
		if !refused {
			failed = 0
			continue
		}
		failed++
		sleep(ctx, l.config.retry.withDefaults().backoff(failed))
	}
}

// watchOlder watches for older's end, for a while. refused says that the watch failed, as failed others did before it.
//
// The watch starts from now on, and then the key is read: a watch from a past revision is served only every 100 ms.
func (l *Lock) watchOlder(ctx context.Context, older *mvccpb.KeyValue, failed int) (gone, refused bool) {
	watching, cancel := context.WithTimeout(watchContext(ctx, failed), relook+rand.N(relook/2))
	defer cancel()
	watch := l.config.client.Watch(watching, string(older.Key), clientv3.WithCreatedNotify(), clientv3.WithFilterPut())
	for resp := range watch {
		if len(resp.Events) > 0 { // a deletion; perhaps an old one, which a watch that reconnects may replay
			return true, false
		}
		if !resp.Created {
			continue
		}
		if there, err := l.stillThere(watching, older); err != nil || !there {
			return err == nil, false
		}
	}
	return false, watching.Err() == nil
}

// stillThere reports whether both older and the lock's own key are there.
func (l *Lock) stillThere(ctx context.Context, older *mvccpb.KeyValue) (bool, error) {
	resp, err := retryRead(ctx, &l.config, l.waiting, "read the queue", func(ctx context.Context) (*clientv3.TxnResponse, error) {
		return l.config.client.Txn(ctx).Then(clientv3.OpGet(l.key), clientv3.OpGet(string(older.Key))).Commit()
	})
	if err != nil {
		return false, err
	}
	now := resp.Responses[1].GetResponseRange().Kvs
	return l.mine(resp.Responses[0].GetResponseRange().Kvs) != nil &&
		len(now) > 0 && now[0].CreateRevision == older.CreateRevision && isContender(l.name, now[0]), nil
}

// look reads, at one revision, whether the lock's key is still there and which contender is the nearest older one.
func (l *Lock) look(ctx context.Context) (*mvccpb.KeyValue, error) {
	resp, err := retryRead(ctx, &l.config, l.waiting, "read the queue", func(ctx context.Context) (*clientv3.TxnResponse, error) {
		return l.config.client.Txn(ctx).
			Then(clientv3.OpGet(l.key), newest(l.name, clientv3.WithMaxCreateRev(l.token-1))).
			Commit()
	})
	if err != nil {
		return nil, err
	}
	if l.mine(resp.Responses[0].GetResponseRange().Kvs) == nil {
		return nil, l.keyGone()
	}
	return nearest(ctx, &l.config, l.waiting, l.name, resp.Responses[1].GetResponseRange(), l.token)
}

// lookBefore returns the revision at which nobody held the lock or waited for it, else ErrLockHeld.
func lookBefore(ctx context.Context, c *config, name string) (Revision, error) {
	resp, err := retryRead(ctx, c, c.retry, "read the queue", func(ctx context.Context) (clientv3.OpResponse, error) {
		return c.client.Do(ctx, newest(name))
	})
	if err != nil {
		return 0, err
	}
	page := (*etcdserverpb.RangeResponse)(resp.Get())
	return page.Header.Revision, unheld(ctx, c, name, page)
}

func unheld(ctx context.Context, c *config, name string, page *etcdserverpb.RangeResponse) error {
	contender, err := nearest(ctx, c, c.retry, name, page, math.MaxInt64)
	if err == nil && contender != nil {
		return ErrLockHeld
	}
	return err
}

// claim writes the key if nobody has queued up since nobody was seen to. What came since may be a stray: look again.
func (l *Lock) claim(ctx context.Context, seen Revision) error {
	for {
		resp, err := l.write(ctx, clientv3.Compare(clientv3.CreateRevision(prefix(l.name)), "<", seen+1).WithPrefix())
		if err != nil {
			return err
		}
		if resp.Succeeded {
			l.entered(resp.Header.Revision)
			return nil
		}
		written, contenders, err := l.found(ctx)
		if err != nil || written {
			return err
		}
		if err := unheld(ctx, &l.config, l.name, contenders); err != nil {
			return err
		}
		seen = contenders.Header.Revision
	}
}

// mine is the lock's own key in kvs; nil if it is gone, or was overwritten by somebody without the lease.
func (l *Lock) mine(kvs []*mvccpb.KeyValue) *mvccpb.KeyValue {
	for _, kv := range kvs {
		if kv.CreateRevision == l.token && clientv3.LeaseID(kv.Lease) == l.lease.id {
			return kv
		}
	}
	return nil
}

// watchContext is for a watch on which failed ones have gone before. A watch needs a leader, so that a member which is cut
// off from the quorum is left. One that failed gets another stream, which clientv3 chooses by the metadata: after a token
// has expired, all new watches on the stream that was opened with it are refused (etcd-io/etcd#12385).
func watchContext(ctx context.Context, failed int) context.Context {
	ctx = clientv3.WithRequireLeader(ctx)
	if failed == 0 {
		return ctx
	}
	return metadata.AppendToOutgoingContext(ctx, "etcdutil-stream", strconv.Itoa(failed))
}
