package main

import (
	"context"
	"log/slog"
	"testing"
	"time"

	"example.com/etcdutil"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
)

func TestAnswersSpoilWritesOnlyAndClientv3LearnsNothing(t *testing.T) {
	put := &etcdserverpb.PutRequest{}
	read := &etcdserverpb.TxnRequest{Success: []*etcdserverpb.RequestOp{{Request: &etcdserverpb.RequestOp_RequestRange{}}}}
	for _, c := range []struct {
		fault   kind
		request any
		applied int // when the fault has ended
		err     error
	}{
		{cancelUnsent, put, 0, errCanceled},
		{cancelApplied, put, 1, errCanceled},
		{cancelLate, put, 1, errCanceled},
		{cancelUnsent, read, 1, nil},
		{"", put, 1, nil},
	} {
		a := newAnswers(1)
		a.start(c.fault, func() {})
		for spoiled := false; !spoiled; { // half of the writes are
			applied := 0
			invoke := func(context.Context, string, any, any, *grpc.ClientConn, ...grpc.CallOption) error {
				applied++
				return nil
			}
			err := a.intercept(t.Context(), "", c.request, &etcdserverpb.TxnResponse{}, nil, invoke)
			if spoiled = err == c.err; !spoiled {
				assert.NoError(t, err, c.fault)
				continue
			}
			a.stop()
			assert.Equal(t, c.applied, applied, c.fault)
		}
	}
}

func TestLogsBlockUntilTheFaultEnds(t *testing.T) {
	l := &logs{}
	l.start(blockLogs)
	returned := make(chan error)
	go func() { returned <- l.Handle(context.Background(), slog.Record{}) }()
	select {
	case <-returned:
		t.Fatal("does not block")
	case <-time.After(10 * time.Millisecond):
	}
	l.stop()
	require.NoError(t, <-returned)
	l.start(panicLogs)
	assert.Panics(t, func() { _ = l.Handle(context.Background(), slog.Record{}) })
}

func TestLeadersCountSeesALostCountAndOneTooMany(t *testing.T) {
	assert.Empty(t, checkCount(5, 4, 1))
	assert.NotEmpty(t, checkCount(3, 4, 1))
	assert.NotEmpty(t, checkCount(6, 4, 1))
}

func TestHolderWatchSeesAWaiterAStrayAndAVacancyThatIsNone(t *testing.T) {
	contender := func(name string, lease, create, revision int64) change {
		return change{key: leaderName + "/" + name, lease: lease, create: create, revision: revision}
	}
	gone := func(name string, revision int64) change {
		return change{key: leaderName + "/" + name, deleted: true, revision: revision}
	}
	held := holdersOf(leaderName, []change{
		contender("stray", 0, 2, 2), contender("sub/a", 1, 3, 3), contender("a", 1, 4, 4), contender("b", 2, 6, 6), gone("a", 8), gone("b", 10),
	})
	for _, right := range []holderSeen{{0, 1}, {0, 3}, {4, 4}, {4, 7}, {6, 8}, {6, 9}, {0, 10}, {0, 12}} {
		assert.Empty(t, checkHolder(right, held), right)
	}
	for _, wrong := range []holderSeen{{2, 2}, {3, 3}, {6, 6}, {4, 8}, {0, 5}, {6, 10}} {
		assert.NotEmpty(t, checkHolder(wrong, held), wrong)
	}
}

func TestMirrorSeesATornReadAndAnOldOne(t *testing.T) {
	r := mirrorRead{}
	keys := map[string]string{mirroredKey(0): "a", mirroredKey(1): "a", mirroredKey(2): "a", mirroredKey(3): "a"}
	assert.Empty(t, r.take(keys))
	assert.Equal(t, "a", r.value)
	keys[mirroredKey(2)] = "b"
	assert.NotEmpty(t, r.take(keys))
	delete(keys, mirroredKey(2))
	assert.NotEmpty(t, r.take(keys))

	states := mirroredStates([]change{
		{key: mirroredKey(0), value: `"a"`, revision: 3}, {key: mirroredKey(1), value: `"a"`, revision: 3},
		{key: mirroredKey(0), value: `"b"`, revision: 6}, {key: mirroredKey(0), deleted: true, revision: 9},
	})
	writes := []mirrorWrite{{sec, 3}, {2 * sec, 6}}
	for _, right := range []mirrorRead{
		{value: "", from: 1, to: 2}, {value: "a", from: 3, to: 3}, {value: "a", from: 5, to: 7}, {value: "b", from: 5, to: 7},
		{value: "", from: 9, to: 9}, {value: "b", from: 4, to: 4, asOf: 3 * sec}, {value: "a", from: 4, to: 4, asOf: 2 * sec},
	} {
		assert.Empty(t, checkMirrorRead(right, states, writes), right)
	}
	for _, wrong := range []mirrorRead{
		{value: "a", from: 6, to: 8}, {value: "b", from: 3, to: 5}, {value: "", from: 4, to: 8}, {value: "a", from: 4, to: 4, asOf: 3 * sec},
	} {
		assert.NotEmpty(t, checkMirrorRead(wrong, states, writes), wrong)
	}
}

func TestRegisteredSeesAKeyThatIsMissingForLongAndOneThatFlaps(t *testing.T) {
	r := &registrant{}
	r.expect("a")
	_, missing := r.look("a", sec)
	assert.False(t, missing)
	since, missing := r.look("", 2*sec)
	assert.True(t, missing)
	assert.Equal(t, 2*sec, since)
	since, _ = r.look("other", 3*sec)
	assert.Equal(t, 2*sec, since)
	r.expect("other")
	_, missing = r.look("other", 4*sec)
	assert.False(t, missing)

	flaps := func(values ...string) []string {
		var changes []change
		for n, v := range values {
			changes = append(changes, change{
				key: foughtOverKey, value: `"` + v + `"`, deleted: v == "", revision: int64(n), at: time.Duration(n) * time.Minute,
			})
		}
		return checkFlapping(changes, map[string]time.Duration{"a": 0, "b": 3 * time.Minute})
	}
	assert.Empty(t, flaps("a", "a", "b", "b", "c"))
	assert.Empty(t, flaps("a", "", "a", "b", "", "a"))
	assert.NotEmpty(t, flaps("a", "b", "a"))
	assert.Empty(t, flaps("b", "a", "b"), "before Register has returned")
}

func TestIslandSeesAWatcherThatMixesTwoHistories(t *testing.T) {
	key := islandKey(0)
	at := func(revisions ...int64) (changes []change) {
		for n, rev := range revisions {
			changes = append(changes, change{key: key, value: `"v"`, version: int64(n + 1), revision: rev})
		}
		return changes
	}
	first, second := at(3, 5, 7), at(3, 6, 9)
	watched := func(upTo int64, changes []change) string {
		return checkEpochs(&segment{key: key, from: 4, upTo: upTo, events: eventsOf(changes)}, [][]change{first, second})
	}
	assert.Empty(t, watched(8, first[1:]))
	assert.Empty(t, watched(9, second[1:]))
	assert.NotEmpty(t, watched(9, []change{first[1], second[2]}))
	assert.NotEmpty(t, watched(9, second[2:]))
}

func TestIslandExcusesAHolderOfBeforeARestoreForSecondsOnly(t *testing.T) {
	restores := []span{{10 * sec, 11 * sec}}
	holder := func(token int64, from, to time.Duration) *holding { return held(token, from, to) }
	overlap := func(first, second *holding) []string {
		return checkRestored("n", []*holding{first, second}, restores, nil)
	}
	assert.Empty(t, overlap(holder(9, 5*sec, 13*sec), holder(4, 12*sec, 14*sec)))
	assert.NotEmpty(t, overlap(holder(9, 5*sec, 20*sec), holder(4, 12*sec, 14*sec)), "told too late")
	assert.NotEmpty(t, overlap(holder(9, 12*sec, 14*sec), holder(10, 13*sec, 15*sec)), "both after the restore")
	assert.NotEmpty(t, overlap(holder(9, 5*sec, 7*sec), holder(10, 6*sec, 8*sec)), "both before it")
	assert.NotEmpty(t, overlap(holder(9, 30*sec, 31*sec), holder(4, 32*sec, 33*sec)), "a smaller token without a restore")
	assert.Empty(t, overlap(holder(9, 5*sec, 6*sec), holder(4, 12*sec, 14*sec)))
}

func TestIslandSeesALeaseThatOnlyADenialHasCost(t *testing.T) {
	loss := leaseLoss{at: 20 * sec, err: etcdutil.ErrLeaseExpired}
	denials := []span{{17 * sec, 18 * sec}}
	assert.NotEmpty(t, checkLoss(loss, nil, denials, nil))
	assert.Empty(t, checkLoss(loss, []span{{16 * sec, 17 * sec}}, denials, nil))
	assert.Empty(t, checkLoss(loss, nil, denials, []stall{{16 * sec, 18 * sec}}))
}
