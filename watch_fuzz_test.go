package etcdutil

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
	"go.etcd.io/etcd/api/v3/mvccpb"
)

// FuzzDecode makes a watcher decode arbitrary bytes: it sends an EventPut, or an EventInvalid with
// the bytes and the reason.
func FuzzDecode(f *testing.F) {
	for _, seed := range []string{
		"", "null", "1", `"text"`, "{", `{"A":1}`, `{"A":"text"}`, `{"a":1,"A":2}`, `{"A":1e999}`, "[]", "\xff\x00", `{"M":{"k":[1,2]}}`,
		`{"A":1} x`, string(bytes.Repeat([]byte("["), 20_000)), `"\ud800"`, "-0", " ",
	} {
		f.Add([]byte(seed), []byte(`{"A":1}`))
		f.Add([]byte(`{"A":1}`), []byte(seed))
	}
	f.Fuzz(func(t *testing.T, value, prev []byte) {
		decodes[record](t, JSON, value, prev)
		decodes[any](t, JSON, value, prev)
		decodes[*record](t, JSON, value, prev)
		decodes[json.RawMessage](t, JSON, value, prev)
		decodes[int](t, Raw, value, prev)
		require.Equal(t, string(value), decodes[string](t, Raw, value, prev).Value)
		data := decodes[[]byte](t, Raw, value, prev).Value
		require.NotNil(t, data)
		require.True(t, bytes.Equal(value, data))
	})
}

type record struct {
	A int
	B string
	M map[string]any
}

func decodes[T any](t *testing.T, codec Codec, value, prev []byte) Event[T] {
	t.Helper()
	w := &Watcher[T]{codec: codec, queue: newQueue(nil), last: 6}
	value, given := bytes.Clone(value), bytes.Clone(value)
	kv := &mvccpb.KeyValue{Key: []byte("key"), Value: value, ModRevision: 7, Version: 3}
	e := w.event(change{kind: EventPut, kv: kv, prev: &mvccpb.KeyValue{Key: []byte("key"), Value: prev}, upTo: 9})
	require.Equal(t, "key", e.Key)
	require.EqualValues(t, 7, e.Revision)
	require.EqualValues(t, 3, e.Version)
	var want, wantPrev, zero T
	wantErr, prevErr := codec.Unmarshal(given, &want), codec.Unmarshal(prev, &wantPrev)
	if prevErr == nil {
		require.Equal(t, &wantPrev, e.Prev)
	} else {
		require.Nil(t, e.Prev)
	}
	if wantErr == nil {
		require.Equal(t, EventPut, e.Type)
		require.Equal(t, want, e.Value)
		require.NoError(t, e.Err)
		require.Nil(t, e.Raw)
	} else {
		require.Equal(t, EventInvalid, e.Type)
		require.Equal(t, zero, e.Value)
		require.Error(t, e.Err)
		require.True(t, bytes.Equal(given, e.Raw))
	}
	clear(value) // an event is the reader's own
	if wantErr != nil {
		require.True(t, bytes.Equal(given, e.Raw))
	}
	return e
}

// FuzzResync drives a snapshot through a random history of an etcd: it is followed, lost and found
// again by lists in pages, of which some are given up midway, and it is restored from backups. The
// reader gets each change and no other.
func FuzzResync(f *testing.F) {
	f.Add(uint64(1), []byte("pppdlpppcplrpplddplbprpl"))
	f.Add(uint64(2), []byte{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15})
	f.Add(uint64(3), bytes.Repeat([]byte{0, 0, 3, 0, 6, 7, 0, 4, 5, 8, 9}, 20))
	for seed := range uint64(20) {
		random := rand.New(rand.NewPCG(seed, 0))
		steps := make([]byte, 300)
		for i := range steps {
			steps[i] = byte(random.Uint32())
		}
		f.Add(seed, steps)
	}
	f.Fuzz(func(t *testing.T, seed uint64, steps []byte) {
		for _, values := range []bool{false, true} {
			h := &history{
				t: t, random: rand.New(rand.NewPCG(seed, 1)), snapshot: newSnapshot(values, true), values: values,
				revision: 1, kvs: map[string]*mvccpb.KeyValue{}, reader: map[string]known{},
			}
			h.list()
			for _, step := range steps[:min(len(steps), 1000)] {
				h.step(step)
			}
			h.list()
			h.check()
		}
	})
}

// known is what the reader has received of a key.
type known struct {
	value string
	rev   Revision
}

// history is an etcd, and a reader of what a snapshot sends of it.
type history struct {
	t        *testing.T
	random   *rand.Rand
	snapshot *snapshot
	values   bool
	revision Revision
	kvs      map[string]*mvccpb.KeyValue
	backup   map[string]*mvccpb.KeyValue
	backupAt Revision
	lost     bool // the reader is not told what happens
	reader   map[string]known
}

func (h *history) step(step byte) {
	switch step % 16 {
	case 0, 1, 2, 3, 4, 5:
		h.put()
	case 6, 7, 8:
		h.delete()
	case 9, 10: // compaction, a slow reader: it is lost until the next list
		h.lost = true
	case 11:
		h.backup, h.backupAt = maps.Clone(h.kvs), h.revision
	case 12:
		if h.backup != nil { // restored
			h.kvs, h.revision, h.lost = maps.Clone(h.backup), h.backupAt, true
		}
	case 13: // a list that is given up
		h.listPages(h.random.IntN(4))
		h.lost = true
	case 14, 15:
		h.list()
		h.check()
	}
}

func (h *history) put() {
	h.revision++
	key := fmt.Sprint("k", h.random.IntN(9))
	kv := &mvccpb.KeyValue{Key: []byte(key), Value: []byte(fmt.Sprint(h.random.IntN(3))), ModRevision: h.revision, Version: 1}
	if before := h.kvs[key]; before != nil {
		kv.Version = before.Version + 1
	}
	h.kvs[key] = kv
	if !h.lost {
		h.tell(h.snapshot.change(EventPut, kv))
	}
}

func (h *history) delete() {
	key := fmt.Sprint("k", h.random.IntN(9))
	if h.kvs[key] == nil {
		return // etcd makes no revision of it
	}
	h.revision++
	delete(h.kvs, key)
	if !h.lost {
		h.tell(h.snapshot.change(EventDelete, &mvccpb.KeyValue{Key: []byte(key), ModRevision: h.revision}))
	}
}

// list lists, while etcd goes on, and follows what it did meanwhile.
func (h *history) list() {
	kvs, rev := h.listPages(-1)
	for _, c := range h.snapshot.deletions(rev) {
		require.Equal(h.t, EventDelete, c.kind)
		require.Equal(h.t, rev, c.kv.ModRevision)
		h.tell(c)
	}
	want := map[string]known{}
	for _, kv := range kvs {
		want[string(kv.Key)] = known{string(kv.Value), kv.ModRevision}
	}
	require.Equal(h.t, want, h.reader)
	h.lost = false
}

// listPages lists pages of random sizes at one revision, all or so many of them.
func (h *history) listPages(pages int) ([]*mvccpb.KeyValue, Revision) {
	h.snapshot.begin()
	var kvs []*mvccpb.KeyValue
	for _, key := range slices.Sorted(maps.Keys(h.kvs)) {
		kvs = append(kvs, h.kvs[key])
	}
	for from := 0; pages != 0 && (from == 0 || from < len(kvs)); pages-- {
		to := min(from+1+h.random.IntN(4), len(kvs))
		for _, c := range h.snapshot.page(kvs[from:to]) {
			require.Equal(h.t, EventPut, c.kind)
			h.tell(c)
		}
		if from = to; from == 0 {
			break
		}
	}
	return kvs, h.revision
}

// check is called when the reader has received everything.
func (h *history) check() {
	require.Len(h.t, h.reader, len(h.kvs))
	for key, kv := range h.kvs {
		require.Equal(h.t, known{string(kv.Value), kv.ModRevision}, h.reader[key])
	}
	require.Len(h.t, h.snapshot.keys, len(h.kvs))
}

// tell sends the reader a change.
func (h *history) tell(c change) {
	key := string(c.kv.Key)
	before, told := h.reader[key]
	if h.values && told {
		require.NotNil(h.t, c.prev)
		require.Equal(h.t, before.value, string(c.prev.Value))
	} else {
		require.Nil(h.t, c.prev)
	}
	switch c.kind {
	case EventPut:
		now := known{string(c.kv.Value), c.kv.ModRevision}
		require.False(h.t, told && now == before, "%s was told before", key)
		h.reader[key] = now
	case EventDelete:
		require.True(h.t, told, "%s was not told", key)
		delete(h.reader, key)
	default:
		require.Fail(h.t, "neither")
	}
}
