package etcdutil

import (
	"hash/maphash"

	"go.etcd.io/etcd/api/v3/mvccpb"
)

// view is what the reader of a snapshot was told.
type view struct {
	keys   map[string]told
	values bool // are kept
	keeps  bool // what was told; else the reader finds out what a list changes
	pass   uint32
	seed   maphash.Seed
}

// told is what was told of a key. In a restored etcd another value may have the same revision, hence the hash.
type told struct {
	rev  Revision
	hash uint64
	kv   *mvccpb.KeyValue // nil unless values are kept
	pass uint32           // the last list that had it
}

func newView(values, keeps bool) *view {
	return &view{keys: make(map[string]told), values: values, keeps: keeps, seed: maphash.MakeSeed()}
}

// change tells a change that etcd has sent.
func (v *view) change(kind EventType, kv *mvccpb.KeyValue) change {
	if !v.keeps {
		return change{kind: kind, kv: kv}
	}
	key := string(kv.Key)
	c := change{kind: kind, kv: kv, prev: v.keys[key].kv}
	if kind == EventDelete {
		delete(v.keys, key)
	} else {
		v.keys[key] = v.tell(kv)
	}
	return c
}

func (v *view) tell(kv *mvccpb.KeyValue) told {
	t := told{rev: kv.ModRevision, hash: maphash.Bytes(v.seed, kv.Value), pass: v.pass}
	if v.values {
		t.kv = kv
	}
	return t
}

// begin begins a list: pages of what there is, in the order of keys, then gone.
func (v *view) begin() []change {
	v.pass++
	if v.keeps {
		return nil
	}
	return []change{{kind: eventListing}}
}

// page tells what is new in a page.
func (v *view) page(kvs []*mvccpb.KeyValue) []change {
	var changes []change
	for _, kv := range kvs {
		if !v.keeps {
			changes = append(changes, change{kind: EventPut, kv: kv})
			continue
		}
		key, now := string(kv.Key), v.tell(kv)
		before, known := v.keys[key]
		if !known || before.rev != now.rev || before.hash != now.hash {
			changes = append(changes, change{kind: EventPut, kv: kv, prev: before.kv})
		}
		v.keys[key] = now
	}
	return changes
}

// gone tells what was in no page of the list, which is of revision rev.
func (v *view) gone(rev Revision) []change {
	var changes []change
	for key, t := range v.keys {
		if t.pass != v.pass {
			delete(v.keys, key)
			changes = append(changes, change{kind: EventDelete, kv: &mvccpb.KeyValue{Key: []byte(key), ModRevision: rev}, prev: t.kv})
		}
	}
	return changes
}
