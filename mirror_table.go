package etcdutil

import (
	"bytes"
	"hash/maphash"
	"iter"
	"slices"
	"sync/atomic"
)

// table is a map that never changes: a [tableEdit] makes another one, which shares with it what is
// the same. So a reader needs no lock, and what it has read stays of one revision.
//
// It is an array of shards, in pages: an edit copies the shards and pages that it changes, and no
// more.
type table[V any] struct {
	pages [][]shard[V]
	mask  uint64 // one less than the number of shards, a power of two
	len   int
	order *keyOrder
}

// shard has the keys of one part of the hashes. A key's tag, a byte of its hash, is found faster
// than the key.
type shard[V any] struct {
	tags  []byte
	items []item[V]
}

type item[V any] struct {
	key string
	v   V
}

const (
	shardSize = 64 // keys, on average, at which the number of shards doubles
	pageSize  = 64 // shards
)

var tableSeed = maphash.MakeSeed()

func newTable[V any]() *table[V] {
	return &table[V]{pages: [][]shard[V]{make([]shard[V], 1)}, order: &keyOrder{}}
}

// shard returns the shard that has key, if the table has it.
func (t *table[V]) shard(hash uint64) *shard[V] {
	i := hash & t.mask
	return &t.pages[i/pageSize][i%pageSize]
}

func tagOf(hash uint64) byte { return byte(hash >> 56) }

func (t *table[V]) get(key string) (v V, ok bool) {
	hash := maphash.String(tableSeed, key)
	s := t.shard(hash)
	if i := s.find(key, tagOf(hash)); i >= 0 {
		return s.items[i].v, true
	}
	return v, false
}

// find returns the index of key, or -1.
func (s *shard[V]) find(key string, tag byte) int {
	for from := 0; ; from++ {
		n := bytes.IndexByte(s.tags[from:], tag)
		if n < 0 {
			return -1
		}
		if from += n; s.items[from].key == key {
			return from
		}
	}
}

// all iterates over the table in no order.
func (t *table[V]) all() iter.Seq2[string, V] {
	return func(yield func(string, V) bool) {
		for _, page := range t.pages {
			for _, s := range page {
				for _, item := range s.items {
					if !yield(item.key, item.v) {
						return
					}
				}
			}
		}
	}
}

// sorted iterates over the table in the order of keys.
func (t *table[V]) sorted() iter.Seq2[string, V] {
	return func(yield func(string, V) bool) {
		for _, key := range t.keys() {
			v, _ := t.get(key)
			if !yield(key, v) {
				return
			}
		}
	}
}

// keyOrder is the order of a table's keys. It is shared by the tables that have the same keys, and
// made when it is first needed: from an earlier order, if few keys came and went since, or else by
// sorting.
type keyOrder struct {
	keys    atomic.Pointer[[]string] // nil until made
	base    []string                 // an earlier order; nil if there is none
	changed []string                 // keys that came or went since base
}

// keys returns the keys in order. Nobody may change them.
func (t *table[V]) keys() []string {
	if made := t.order.keys.Load(); made != nil {
		return *made
	}
	var keys []string
	if t.order.base == nil {
		keys = make([]string, 0, t.len)
		for key := range t.all() {
			keys = append(keys, key)
		}
		slices.Sort(keys)
	} else {
		keys = t.mergeOrder(t.order.base, t.order.changed)
	}
	t.order.keys.Store(&keys)
	return keys
}

// mergeOrder returns the keys in order: those of base, which is in order, less or plus those that
// changed.
func (t *table[V]) mergeOrder(base, changed []string) []string {
	changed = slices.Compact(slices.Sorted(slices.Values(changed)))
	keys := make([]string, 0, t.len)
	for _, key := range changed {
		n, was := slices.BinarySearch(base, key)
		keys = append(keys, base[:n]...)
		if was {
			n++
		}
		base = base[n:]
		if _, is := t.get(key); is {
			keys = append(keys, key)
		}
	}
	return append(keys, base...)
}

// next returns the order after keys came or went.
func (o *keyOrder) next(changed []string) *keyOrder {
	base, since := o.base, o.changed
	if made := o.keys.Load(); made != nil {
		base, since = *made, nil
	}
	if base == nil || len(since)+len(changed) > len(base)/8 {
		return &keyOrder{} // sorting is no slower
	}
	return &keyOrder{base: base, changed: append(slices.Clip(since), changed...)}
}

// tableEdit makes a table from another. It is for one goroutine.
type tableEdit[V any] struct {
	table[V]
	ownPages  map[uint64]bool // that this edit has made
	ownShards map[uint64]bool // nil: all are its own
	changed   []string        // keys that came or went
	fresh     bool            // nothing is shared with another table
}

func (t *table[V]) edit() *tableEdit[V] {
	return &tableEdit[V]{table: *t, ownPages: map[uint64]bool{}, ownShards: map[uint64]bool{}}
}

// newTableEdit edits an empty table.
func newTableEdit[V any]() *tableEdit[V] {
	return &tableEdit[V]{table: *newTable[V](), fresh: true}
}

func (e *tableEdit[V]) set(key string, v V) {
	hash := maphash.String(tableSeed, key)
	s := e.own(hash)
	if i := s.find(key, tagOf(hash)); i >= 0 {
		s.items[i].v = v
		return
	}
	s.add(hash, item[V]{key, v})
	e.count(key, 1)
	if e.len > shardSize*int(e.mask+1) {
		e.grow()
	}
}

func (s *shard[V]) add(hash uint64, i item[V]) {
	s.tags, s.items = append(s.tags, tagOf(hash)), append(s.items, i)
}

func (e *tableEdit[V]) delete(key string) {
	hash := maphash.String(tableSeed, key)
	if e.shard(hash).find(key, tagOf(hash)) < 0 {
		return
	}
	s := e.own(hash)
	i := s.find(key, tagOf(hash))
	s.tags, s.items = slices.Delete(s.tags, i, i+1), slices.Delete(s.items, i, i+1)
	e.count(key, -1)
}

func (e *tableEdit[V]) count(key string, change int) {
	e.len += change
	if !e.fresh {
		e.changed = append(e.changed, key)
	}
}

// own returns a shard, as a copy of the edit's own.
func (e *tableEdit[V]) own(hash uint64) *shard[V] {
	i := hash & e.mask
	if !e.fresh && !e.ownShards[i] {
		e.copyShard(i)
	}
	return &e.pages[i/pageSize][i%pageSize]
}

func (e *tableEdit[V]) copyShard(i uint64) {
	page := i / pageSize
	if !e.ownPages[page] {
		if len(e.ownPages) == 0 {
			e.pages = slices.Clone(e.pages)
		}
		e.pages[page] = slices.Clone(e.pages[page])
		e.ownPages[page] = true
	}
	s := &e.pages[page][i%pageSize]
	s.tags, s.items = slices.Clone(s.tags), slices.Clone(s.items)
	e.ownShards[i] = true
}

// grow doubles the number of shards.
func (e *tableEdit[V]) grow() {
	old, shards := e.table, 2*(e.mask+1)
	e.mask, e.fresh = shards-1, true
	e.pages = make([][]shard[V], (shards+pageSize-1)/pageSize)
	for i := range e.pages {
		e.pages[i] = make([]shard[V], min(shards, pageSize))
	}
	for key, v := range old.all() {
		hash := maphash.String(tableSeed, key)
		e.shard(hash).add(hash, item[V]{key, v})
	}
}

// done returns the table. The edit must not be used any more.
func (e *tableEdit[V]) done() *table[V] {
	t := e.table
	switch {
	case e.fresh:
		t.order = &keyOrder{}
	case len(e.changed) > 0:
		t.order = t.order.next(e.changed)
	}
	return &t
}
