package etcdutil

import (
	"bytes"
	"context"
	"errors"
	"math"
	"slices"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// contender is a place in the queue for a name: a key directly below it, attached to a lease. The
// contender whose key was created first holds the lock.
type contender struct {
	config  *config
	policy  RetryPolicy // of its requests
	name    string
	key     string
	value   string
	leaseID clientv3.LeaseID

	token  Revision  // the key's create revision; 0 until it is known
	writes txnResult // of the key, except the one that is known to be applied
}

// errKeyGone says that a contender's key is gone, or is no longer its own.
var errKeyGone = errors.New("the key was deleted")

// waitTurn queues up and waits until no contender is older.
func (c *contender) waitTurn(ctx context.Context) error {
	predecessor, err := c.enqueue(ctx)
	for err == nil && predecessor != nil {
		if err = c.waitDeleted(ctx, predecessor); err == nil {
			predecessor, err = c.checkTurn(ctx)
		}
	}
	return err
}

// enqueue writes the key, once however often it is sent. It returns the nearest older contender,
// nil if there is none.
func (c *contender) enqueue(ctx context.Context) (*mvccpb.KeyValue, error) {
	resp, err := c.write(ctx, clientv3.Compare(clientv3.CreateRevision(c.key), "=", 0),
		[]clientv3.Op{opNewest(c.name)}, []clientv3.Op{clientv3.OpGet(c.key), opNewest(c.name)})
	if err != nil {
		return nil, err
	}
	if !resp.Succeeded && !c.adopt(rangeIn(resp, 0).Kvs) {
		if err := c.removeGhost(ctx, rangeIn(resp, 0).Kvs); err != nil {
			return nil, err
		}
		return c.enqueue(ctx)
	}
	page := rangeIn(resp, 1)
	if kv := c.likelyPredecessor(page.Kvs); kv != nil {
		return kv, nil
	}
	return c.predecessorIn(ctx, page)
}

// write repeats a transaction that creates the key if guard holds, until it is answered.
func (c *contender) write(ctx context.Context, guard clientv3.Cmp, then, otherwise []clientv3.Op) (*clientv3.TxnResponse, error) {
	put := clientv3.OpPut(c.key, c.value, clientv3.WithLease(c.leaseID))
	q := txnRequest{[]clientv3.Cmp{guard}, append([]clientv3.Op{put}, then...), otherwise}
	resp, err := retry(ctx, c.config, c.policy, "queue up", func(ctx context.Context) (*clientv3.TxnResponse, error) {
		resp, seen, err := c.writes.send(ctx, c.config.client, q)
		c.writes.mayBeApplied = c.writes.mayBeApplied || !seen
		return resp, err
	})
	if err == nil && resp.Succeeded {
		c.token = resp.Header.Revision
	}
	return resp, err
}

// adopt takes the key over that an earlier attempt has written. It reports false if there is none:
// if no attempt can have been applied, or the key is not as an attempt leaves it.
func (c *contender) adopt(kvs []*mvccpb.KeyValue) bool {
	for _, kv := range kvs {
		if c.writes.mayBeApplied && c.isLeased(kv) && kv.Version == 1 && string(kv.Value) == c.value {
			c.token = kv.CreateRevision
			return true
		}
	}
	return false
}

// removeGhost removes the key of an earlier lock on the lease, which a restore has brought back.
// The place in the queue that it has is that lock's. It returns errKeyGone if there is none: a key
// without the lease was written by somebody else, and holds nothing.
func (c *contender) removeGhost(ctx context.Context, kvs []*mvccpb.KeyValue) error {
	for _, kv := range kvs {
		if !c.isLeased(kv) {
			continue
		}
		unchanged := clientv3.Compare(clientv3.ModRevision(c.key), "=", kv.ModRevision)
		_, err := retry(ctx, c.config, c.policy, "queue up", func(ctx context.Context) (*clientv3.TxnResponse, error) {
			return c.config.client.Txn(ctx).If(unchanged).Then(clientv3.OpDelete(c.key)).Commit()
		})
		return err
	}
	return errKeyGone
}

func (c *contender) isLeased(kv *mvccpb.KeyValue) bool {
	return clientv3.LeaseID(kv.Lease) == c.leaseID
}

// checkTurn returns the nearest older contender, nil if there is none, and errKeyGone if the own
// key is gone.
func (c *contender) checkTurn(ctx context.Context) (*mvccpb.KeyValue, error) {
	resp, err := c.read(ctx, txnRequest{
		guards: c.exists(),
		then:   []clientv3.Op{opNewest(c.name, clientv3.WithMaxCreateRev(c.token-1))},
	})
	switch {
	case err != nil:
		return nil, err
	case !resp.Succeeded:
		return nil, errKeyGone
	}
	return c.predecessorIn(ctx, rangeIn(resp, 0))
}

// checkTurnOnce returns ErrLockHeld if a contender is older.
func (c *contender) checkTurnOnce(ctx context.Context) error {
	predecessor, err := c.checkTurn(ctx)
	if err == nil && predecessor != nil {
		return ErrLockHeld
	}
	return err
}

// claimRounds limits how often tryClaim tries to get ahead of those who create keys below the name.
const claimRounds = 3

// tryClaim creates the key if none was created below the name since revision seen, when nobody held
// the lock. What was created may be no contender: it looks again. Where keys are created faster
// than it can look it queues up, looks once, and gives up unless it is first.
func (c *contender) tryClaim(ctx context.Context, seen Revision) error {
	for range claimRounds {
		unchanged := clientv3.Compare(clientv3.CreateRevision(prefix(c.name)), "<", seen+1).WithPrefix()
		resp, err := c.write(ctx, unchanged, nil, []clientv3.Op{clientv3.OpGet(c.key), opFree(c.name)})
		switch {
		case err != nil:
			return err
		case resp.Succeeded:
			return nil
		case c.adopt(rangeIn(resp, 0).Kvs):
			return c.checkTurnOnce(ctx)
		case len(rangeIn(resp, 0).Kvs) > 0:
			if err := c.removeGhost(ctx, rangeIn(resp, 0).Kvs); err != nil {
				return err
			}
			continue
		}
		free := resp.Responses[1].GetResponseTxn()
		if err := errIfHeld(ctx, c.config, c.policy, c.name, free); err != nil {
			return err
		}
		seen = resp.Header.Revision
	}
	if _, err := c.enqueue(ctx); err != nil {
		return err
	}
	return c.checkTurnOnce(ctx)
}

// remove deletes the key. It deletes that of no other contender, which may have the same name
// later, unless the own key may be written late: then that name is not used again.
func (c *contender) remove(ctx context.Context) error {
	guard := clientv3.Compare(clientv3.CreateRevision(c.key), "=", c.token)
	if c.token == 0 || c.writes.mayStillApply {
		guard = clientv3.Compare(clientv3.CreateRevision(c.key), ">", 0)
	}
	_, err := c.config.client.Txn(ctx).If(guard).Then(clientv3.OpDelete(c.key)).Commit()
	return err // a guard that does not hold proves nothing: clientv3 may have repeated the request
}

// unwritten reports whether the key was surely never written, nor will be.
func (c *contender) unwritten() bool { return c.token == 0 && c.writes == (txnResult{}) }

// exists compares whether the key is there and the contender's own.
func (c *contender) exists() []clientv3.Cmp {
	return []clientv3.Cmp{
		clientv3.Compare(clientv3.CreateRevision(c.key), "=", c.token),
		clientv3.Compare(clientv3.LeaseValue(c.key), "=", c.leaseID),
	}
}

// ownIn returns the contender's own key, nil if it is gone. One without the lease was overwritten
// by somebody else, and has lost its place.
func (c *contender) ownIn(kvs []*mvccpb.KeyValue) *mvccpb.KeyValue {
	for _, kv := range kvs {
		if kv.CreateRevision == c.token && c.isLeased(kv) {
			return kv
		}
	}
	return nil
}

// read repeats a transaction that only reads.
func (c *contender) read(ctx context.Context, q txnRequest) (*clientv3.TxnResponse, error) {
	return readTxn(ctx, c.config, c.policy, q)
}

func readTxn(ctx context.Context, c *config, p RetryPolicy, q txnRequest) (*clientv3.TxnResponse, error) {
	return retry(ctx, c, p, "read the queue", func(ctx context.Context) (*clientv3.TxnResponse, error) {
		return c.client.Txn(ctx).If(q.guards...).Then(q.then...).Else(q.otherwise...).Commit()
	})
}

func rangeIn(resp *clientv3.TxnResponse, i int) *etcdserverpb.RangeResponse {
	return resp.Responses[i].GetResponseRange()
}

// The queue of a name.

// prefix is what the keys of a name's contenders begin with.
func prefix(name string) string { return name + "/" }

// opNewest lists the newest keys below a name. It reads no values, which may be large and
// anybody's. Without them etcd 3.7 reports no leases either.
func opNewest(name string, opts ...clientv3.OpOption) clientv3.Op {
	begin := prefix(name)
	return clientv3.OpGet(begin, append([]clientv3.OpOption{
		clientv3.WithRange(clientv3.GetPrefixRangeEnd(begin)), clientv3.WithKeysOnly(), clientv3.WithLimit(8),
		clientv3.WithSort(clientv3.SortByCreateRevision, clientv3.SortDescend),
	}, opts...)...)
}

// opFree is a transaction that succeeds if no key below a name has a lease, and lists the newest
// otherwise.
func opFree(name string) clientv3.Op {
	begin := prefix(name)
	return clientv3.OpTxn([]clientv3.Cmp{unleased(begin, clientv3.GetPrefixRangeEnd(begin))}, nil,
		[]clientv3.Op{opNewest(name)})
}

// unleased compares whether no key from begin to end has a lease.
func unleased(begin, end string) clientv3.Cmp {
	return clientv3.Compare(clientv3.LeaseValue(begin).WithRange(end), "=", 0)
}

// checkFree returns a revision at which nobody held the lock or waited for it, or else ErrLockHeld.
func checkFree(ctx context.Context, c *config, p RetryPolicy, name string) (Revision, error) {
	resp, err := readTxn(ctx, c, p, txnRequest{then: []clientv3.Op{opFree(name)}})
	if err != nil {
		return 0, err
	}
	return resp.Header.Revision, errIfHeld(ctx, c, p, name, resp.Responses[0].GetResponseTxn())
}

// errIfHeld returns ErrLockHeld if opFree's answer shows a contender.
func errIfHeld(ctx context.Context, c *config, p RetryPolicy, name string, free *etcdserverpb.TxnResponse) error {
	if free.Succeeded {
		return nil
	}
	page := free.Responses[0].GetResponseRange()
	children := olderChildren(name, page.Kvs, math.MaxInt64)
	if !page.More && len(children) == len(page.Kvs) {
		return ErrLockHeld // one of them has a lease, and all are where contenders are
	}
	kv, err := newestContender(ctx, c, p, name, page, math.MaxInt64)
	if err == nil && kv != nil {
		return ErrLockHeld
	}
	return err
}

// leastLeaseDigits is how many digits a lease ID has at least, if etcd has chosen it.
const leastLeaseDigits = 8

// likelyPredecessor returns the newest older key that looks like a contender's. Whether it has a
// lease is not known yet.
func (c *contender) likelyPredecessor(kvs []*mvccpb.KeyValue) *mvccpb.KeyValue {
	for _, kv := range olderChildren(c.name, kvs, c.token) {
		id := string(kv.Key[len(prefix(c.name)):])
		if len(id) >= leastLeaseDigits && strings.Trim(id, "0123456789abcdef-") == "" {
			return kv
		}
	}
	return nil
}

// predecessorIn returns the nearest older contender, nil if there is none. page is what opNewest
// read.
func (c *contender) predecessorIn(ctx context.Context, page *etcdserverpb.RangeResponse) (*mvccpb.KeyValue, error) {
	kv, err := firstLeased(ctx, c.config, c.policy, olderChildren(c.name, page.Kvs, c.token))
	if kv != nil || err != nil || !page.More {
		return kv, err
	}
	// There may be thousands of strays, and no contender among them.
	end := clientv3.GetPrefixRangeEnd(prefix(c.name))
	others := []clientv3.Cmp{unleased(prefix(c.name), c.key), unleased(c.key+"\x00", end)}
	resp, err := c.read(ctx, txnRequest{guards: others, then: linearized(others)})
	if err != nil || resp.Succeeded {
		return nil, err
	}
	return newestContender(ctx, c.config, c.policy, c.name, page, c.token)
}

// maxQueuePage limits how many keys are listed at once.
const maxQueuePage = 4096

// newestContender returns the newest contender whose key was created before a revision, nil if
// there is none. page is what opNewest read; more is read where that is not enough.
func newestContender(ctx context.Context, c *config, p RetryPolicy, name string, page *etcdserverpb.RangeResponse, before Revision) (*mvccpb.KeyValue, error) {
	for {
		kv, err := firstLeased(ctx, c, p, olderChildren(name, page.Kvs, before))
		if kv != nil || err != nil || !page.More {
			return kv, err
		}
		limit, oldest := min(16*len(page.Kvs), maxQueuePage), page.Kvs[len(page.Kvs)-1].CreateRevision
		if page.Kvs[0].CreateRevision == oldest { // a page of one revision
			limit = 16 * len(page.Kvs)
		}
		resp, err := readTxn(ctx, c, p, txnRequest{then: []clientv3.Op{
			opNewest(name, clientv3.WithMaxCreateRev(oldest), clientv3.WithLimit(int64(limit))),
		}})
		if err != nil {
			return nil, err
		}
		page = rangeIn(resp, 0)
	}
}

// olderChildren returns the keys that are directly below the name and were created before a
// revision. Deeper ones belong to locks of longer names.
func olderChildren(name string, kvs []*mvccpb.KeyValue, before Revision) []*mvccpb.KeyValue {
	var children []*mvccpb.KeyValue
	for _, kv := range kvs {
		rest, below := bytes.CutPrefix(kv.Key, []byte(prefix(name)))
		if below && kv.CreateRevision < before && !bytes.Contains(rest, []byte("/")) {
			children = append(children, kv)
		}
	}
	return children
}

// maxLeaseChecks is how many nested transactions of two comparisons etcd allows in one, and fewer.
const maxLeaseChecks = 100

// firstLeased returns the first of these keys that has a lease, nil if none has. It reads no
// values.
func firstLeased(ctx context.Context, c *config, p RetryPolicy, kvs []*mvccpb.KeyValue) (*mvccpb.KeyValue, error) {
	for some := range slices.Chunk(kvs, maxLeaseChecks) {
		var ops []clientv3.Op
		for _, kv := range some {
			ops = append(ops, clientv3.OpTxn(stillLeased(kv), nil, nil))
		}
		resp, err := readTxn(ctx, c, p, txnRequest{then: ops})
		if err != nil {
			return nil, err
		}
		for i, r := range resp.Responses {
			if r.GetResponseTxn().Succeeded {
				return some[i], nil
			}
		}
	}
	return nil, nil
}

// stillLeased compares whether the key is still the one that was listed, and has a lease.
func stillLeased(kv *mvccpb.KeyValue) []clientv3.Cmp {
	key := string(kv.Key)
	return []clientv3.Cmp{
		clientv3.Compare(clientv3.CreateRevision(key), "=", kv.CreateRevision),
		clientv3.Compare(clientv3.LeaseValue(key), "!=", 0),
	}
}

// The watches of a contender. Nothing else in the package's locks watches.

// keyWatchDelay keeps a lock that is soon released from paying for a watch on its key.
const keyWatchDelay = 100 * time.Millisecond

// waitDeleted waits until the predecessor or the own key is gone, or may be: the caller looks
// again. The own key is watched only after a while, because most waits are short.
func (c *contender) waitDeleted(ctx context.Context, predecessor *mvccpb.KeyValue) error {
	gone := make(chan error, 1)
	report := func(_ int, err error) {
		select {
		case gone <- err:
		default: // it was reported before
		}
	}
	guards := func() []clientv3.Cmp { return stillLeased(predecessor) }
	defer watchDeleted(c.config, string(predecessor.Key), predecessor.CreateRevision, guards, report)()
	delay := time.NewTimer(keyWatchDelay)
	defer delay.Stop()
	for {
		select {
		case <-delay.C:
			defer c.watchOwnKey(func(refusals int, err error) {
				if err == nil {
					err = errKeyGone
				}
				report(refusals, err)
			})()
		case err := <-gone:
			return err
		case <-ctx.Done():
			return withConnectionError(c.config.client, contextError(ctx))
		}
	}
}

// watchOwnKey calls gone, in a goroutine, when the own key is gone, or with an error when etcd
// refuses to say; see watchDeleted. It goes on until stop is called.
func (c *contender) watchOwnKey(gone func(refusals int, err error)) (stop func()) {
	return watchDeleted(c.config, c.key, c.token, c.exists, gone)
}
