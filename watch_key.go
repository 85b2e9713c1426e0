package etcdutil

import (
	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// watchDeleted calls gone, in a goroutine, with nil when the key that was created at revision
// created is no longer there. guards compare whether it is. It may call gone more than once.
//
// The watch is from now on. When it stands the guards are checked once, and so they are after each
// reconnection, because etcd may have been restored. No watch reads anything while nothing happens.
//
// If etcd refuses the watch or the read, gone is called with the error, and with how often that was
// so since the watch last stood. The watch is tried again all the same, until stop is called. A
// call to gone may still be under way then.
func watchDeleted(c *config, key string, created Revision, guards func() []clientv3.Cmp, gone func(refusals int, err error)) (stop func()) {
	k := &keyWatch{source: sourceOf(c), createdRev: created, gone: gone}
	k.sub = watchSub{user: k, key: key, onlyDeletes: true, forLock: true, guards: guards}
	k.source.start(&k.sub)
	return k.stop
}

// keyWatch watches a lock's key.
type keyWatch struct {
	source     watchSource
	sub        watchSub
	createdRev Revision
	gone       func(refusals int, err error)
	refusals   int // in a row
}

func (k *keyWatch) stop() { k.source.stop(&k.sub) }

func (k *keyWatch) history(Revision) stateRead { return stateRead{} }

func (k *keyWatch) checked(_ stateRead, resp *clientv3.TxnResponse, err error) historyVerdict {
	switch {
	case err != nil:
		k.refused(err)
		return checkAgain
	case !resp.Succeeded:
		go k.gone(0, nil)
	}
	k.refusals = 0 // the watch stood before it was checked
	return resumeWatch
}

func (k *keyWatch) present() stateRead { return stateRead{} }

func (k *keyWatch) unchanged(stateRead, *clientv3.TxnResponse) bool { return false }

func (k *keyWatch) created(Revision) {}

func (k *keyWatch) deliver(events []*mvccpb.Event, _ Revision) (room bool) {
	for _, e := range events {
		if e.Kv.ModRevision > k.createdRev { // a member that lags may send the end of an earlier one
			go k.gone(0, nil)
		}
	}
	return true
}

func (k *keyWatch) missed(error) {}

func (k *keyWatch) failed(error) {}

func (k *keyWatch) refused(err error) {
	k.refusals++
	go k.gone(k.refusals, err)
}
