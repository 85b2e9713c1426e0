package etcdutil

import (
	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// watchDeleted calls gone when the key that was created at revision created is no longer there. It calls it in a goroutine,
// at least once, and with nil. alive decides whether what is read under the key is that key: kv is nil if nothing is. It must
// not block.
//
// The watch is from now on. When it stands the key is read once. So it is after each reconnection, because etcd may have been
// restored, and after compaction. Nothing is read while nothing happens.
//
// If etcd refuses the watch or the read, gone is called with the error. The watch goes on all the same until stop is called.
// After stop returns no call to gone begins.
func watchDeleted(c *config, key string, created Revision, alive func(kv *mvccpb.KeyValue) bool, gone func(err error)) (stop func()) {
	k := &keyWatch{source: sourceOf(c), createdRev: created, alive: alive, gone: gone}
	k.sub = watchSub{user: k, key: key, onlyDeletes: true, forLock: true}
	k.source.start(&k.sub)
	return k.stop
}

// keyWatch watches a lock's key.
type keyWatch struct {
	source     watchSource
	sub        watchSub
	createdRev Revision
	alive      func(kv *mvccpb.KeyValue) bool
	gone       func(err error)
}

func (k *keyWatch) stop() { k.source.stop(&k.sub) }

func (k *keyWatch) history(Revision) []clientv3.Op { return []clientv3.Op{clientv3.OpGet(k.sub.key)} }

func (k *keyWatch) checked(resp *clientv3.TxnResponse, err error) historyVerdict {
	switch {
	case err != nil:
		go k.gone(err)
		return checkAgain
	case !k.alive(first(resp.Responses[0].GetResponseRange().Kvs)):
		go k.gone(nil)
	}
	return resumeWatch
}

func (k *keyWatch) present() []clientv3.Op { return nil }

func (k *keyWatch) unchanged(*clientv3.TxnResponse) bool { return false }

func (k *keyWatch) created(Revision) {}

func (k *keyWatch) deliver(events []*mvccpb.Event, _ Revision) (room bool) {
	for _, e := range events {
		if e.Kv.ModRevision > k.createdRev { // a member that lags may send the end of an earlier one
			go k.gone(nil)
		}
	}
	return true
}

func (k *keyWatch) compacted(Revision) {}

func (k *keyWatch) failed(error) {}

func (k *keyWatch) refused(err error) { go k.gone(err) }
