package etcdutil

import (
	"bytes"
	"hash/maphash"
	"slices"

	"go.etcd.io/etcd/api/v3/mvccpb"
)

// snapshot is what was sent to the reader of a watcher with a snapshot.
type snapshot struct {
	keys       map[string]sentState
	values     bool // are kept
	keeps      bool // what was sent; else the reader finds out what a list changes
	generation uint32
}

// sentState is what was sent of a key. In a restored etcd another value may have the same revision,
// hence the hash.
type sentState struct {
	rev        Revision
	hash       uint64
	kv         *mvccpb.KeyValue // nil unless values are kept
	generation uint32           // the last list that had the key
}

// hashSeed makes hashes of values comparable.
var hashSeed = maphash.MakeSeed()

func hashOf(value []byte) uint64 { return maphash.Bytes(hashSeed, value) }

func newSnapshot(values, keeps bool) *snapshot {
	return &snapshot{keys: make(map[string]sentState), values: values, keeps: keeps}
}

// change records a change that etcd has sent.
func (s *snapshot) change(kind EventType, kv *mvccpb.KeyValue) change {
	if !s.keeps {
		return change{kind: kind, kv: kv}
	}
	key := string(kv.Key)
	c := change{kind: kind, kv: kv, prev: s.keys[key].kv}
	if kind == EventDelete {
		delete(s.keys, key)
	} else {
		s.keys[key] = s.record(kv)
	}
	return c
}

func (s *snapshot) record(kv *mvccpb.KeyValue) sentState {
	sent := sentState{rev: kv.ModRevision, hash: hashOf(kv.Value), generation: s.generation}
	if s.values {
		sent.kv = kv
	}
	return sent
}

// begin begins a list: pages in the order of keys, then deletions.
func (s *snapshot) begin() []change {
	s.generation++
	if s.keeps {
		return nil
	}
	return []change{{kind: eventListing}}
}

// page returns what is new in a page.
func (s *snapshot) page(kvs []*mvccpb.KeyValue) []change {
	var changes []change
	for _, kv := range kvs {
		if !s.keeps {
			changes = append(changes, change{kind: EventPut, kv: kv})
			continue
		}
		key, now := string(kv.Key), s.record(kv)
		before, known := s.keys[key]
		if !known || before.rev != now.rev || before.hash != now.hash {
			changes = append(changes, change{kind: EventPut, kv: kv, prev: before.kv})
		}
		s.keys[key] = now
	}
	return changes
}

// deletions returns what was in no page of the list, which is of revision rev.
func (s *snapshot) deletions(rev Revision) []change {
	var changes []change
	for key, sent := range s.keys {
		if sent.generation != s.generation {
			delete(s.keys, key)
			changes = append(changes, change{kind: EventDelete, kv: &mvccpb.KeyValue{Key: []byte(key), ModRevision: rev}, prev: sent.kv})
		}
	}
	slices.SortFunc(changes, func(x, y change) int { return bytes.Compare(x.kv.Key, y.kv.Key) })
	return changes
}
