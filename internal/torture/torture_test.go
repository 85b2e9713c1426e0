package main

import (
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"example.com/etcdutil"
	"github.com/anishathalye/porcupine"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestMain(m *testing.M) {
	if isChild() {
		os.Exit(childMain())
	}
	os.Exit(m.Run())
}

const testLength = 10 * time.Second

func TestPromisesHoldUnderTheFaultsOfAFixedSeed(t *testing.T) { mustHold(t, 7) }

func TestPromisesHoldUnderTheFaultsOfAFreshSeed(t *testing.T) { mustHold(t, freshSeed()) }

// alone is the environment variable of a process that runs one of these tests only: what leaks is
// searched for in the whole process.
const alone = "ETCDUTIL_TORTURE_ALONE"

func mustHold(t *testing.T, seed uint64) {
	t.Helper()
	if testing.Short() {
		t.Skip("takes longer than 10 s")
	}
	if rest == 0 && os.Getenv(alone) == "" { // under the race detector one keeps the machine busy
		t.Parallel()
		command := exec.CommandContext(t.Context(), os.Args[0], "-test.run", "^"+t.Name()+"$", "-test.v")
		command.Env = append(os.Environ(), alone+"=1")
		out, err := command.CombinedOutput()
		t.Logf("%s", out)
		require.NoError(t, err)
		return
	}
	t.Logf("seed %d", seed)
	r, err := run(seed, testLength, os.TempDir(), 50)
	require.NoError(t, err, "seed %d", seed)
	t.Log("\n" + r.String())
	assert.Empty(t, r.violations, "seed %d", seed)
}

func TestTheSeedMakesTheSchedule(t *testing.T) {
	assert.Equal(t, plan(1, time.Minute), plan(1, time.Minute))
	assert.NotEqual(t, plan(1, time.Minute), plan(2, time.Minute))
}

func TestALongerScheduleBeginsLikeAShorterOne(t *testing.T) {
	long := plan(3, time.Minute)
	for _, f := range plan(3, 20*time.Second) {
		assert.Contains(t, long, f)
	}
}

func TestEveryKindOfFaultIsPlannedAndHealed(t *testing.T) {
	kinds := make(map[kind]int)
	for seed := range uint64(10) {
		for _, f := range plan(seed, time.Minute) {
			kinds[f.Kind]++
			assert.LessOrEqual(t, f.At+f.For, time.Minute)
		}
	}
	for _, k := range []kind{killLeader, stopMember, stopTwo, isolateLeader, isolateMember, cutHolder, cutLeader, holdBack, cutLink, dropReplies, delayLink,
		resetLink, deleteKey, revokeLease, compact, pauseHolders, lateHolders, cancelUnsent, cancelApplied, cancelLate, addMetadata,
		blockLogs, panicLogs, blackHole, restoreIsland, denyIsland, takeIsland, deleteRegistered, cutCrowd, resetCrowd} {
		assert.NotZero(t, kinds[k], k)
	}
}

func TestMembersFailOneFaultAtATimeAndTheQuorumIsLostForSecondsOnly(t *testing.T) {
	memberFaults := map[kind]bool{killLeader: true, stopMember: true, stopTwo: true, isolateLeader: true, isolateMember: true}
	for seed := range uint64(20) {
		var busy time.Duration
		for _, f := range plan(seed, time.Minute) {
			if !memberFaults[f.Kind] {
				continue
			}
			assert.GreaterOrEqual(t, f.At, busy)
			busy = f.At + f.For
			if f.Kind == stopTwo {
				assert.LessOrEqual(t, f.For, 2*time.Second)
			}
		}
	}
}

const sec = time.Second

func held(token int64, from, to time.Duration) *holding {
	return &holding{name: "n", token: token, acquired: from, end: to, ended: true}
}

func TestExclusionSeesAnOverlap(t *testing.T) {
	x := checkExclusion("n", []*holding{held(1, 0, 2*sec), held(2, 1900*time.Millisecond, 3*sec)}, nil)
	require.Len(t, x.violations, 1)
	assert.Contains(t, x.violations[0], "two held it for 100ms")
}

func TestExclusionSeesAnOverlapBehindAShorterHolding(t *testing.T) {
	x := checkExclusion("n", []*holding{held(1, 0, 5*sec), held(2, 6*sec, 7*sec), held(3, 1*sec, 2*sec), held(4, 3*sec, 4*sec)}, nil)
	assert.Len(t, x.violations, 3) // both, and a token that did not grow
}

func TestExclusionSeesATokenThatDidNotGrow(t *testing.T) {
	for _, second := range []int64{4, 5} {
		x := checkExclusion("n", []*holding{held(5, 0, sec), held(second, 2*sec, 3*sec)}, nil)
		require.Len(t, x.violations, 1)
		assert.Contains(t, x.violations[0], "did not grow")
	}
}

func TestExclusionPassesHoldersInTurnAndMeasuresTheMargin(t *testing.T) {
	first, second := held(1, 0, sec), held(2, 1500*time.Millisecond, 2*sec)
	first.told = true
	x := checkExclusion("n", []*holding{second, first, held(3, 2*sec, 3*sec)}, nil)
	assert.Empty(t, x.violations)
	assert.Equal(t, 1, x.margins)
	assert.Equal(t, 500*time.Millisecond, x.margin)
}

func TestExclusionLeavesOutWhomTheTortureDisturbed(t *testing.T) {
	first := held(1, 0, 2*sec)
	first.disturbed = true
	assert.Empty(t, checkExclusion("n", []*holding{first, held(2, sec, 3*sec)}, nil).violations)
}

func TestExclusionExcusesNoMoreThanTheProcessWasStalled(t *testing.T) {
	holdings := []*holding{held(1, 0, 2*sec), held(2, 1900*time.Millisecond, 3*sec)}
	x := checkExclusion("n", holdings, []stall{{1800 * time.Millisecond, 1990 * time.Millisecond}})
	assert.Empty(t, x.violations)
	assert.Equal(t, 1, x.excused)
	assert.Len(t, checkExclusion("n", holdings, []stall{{1900 * time.Millisecond, 1990 * time.Millisecond}}).violations, 1)
}

func TestToldSeesAHolderWhoseContextEndedLateOrNever(t *testing.T) {
	never := func(int, time.Duration, time.Duration) bool { return false }
	late, unaware, inTime, gone := held(1, 0, 4*sec), held(2, 0, 9*sec), held(3, 0, 2*sec), held(4, 0, 2*sec)
	late.told, inTime.told = true, true
	for _, h := range []*holding{late, unaware, inTime, gone} {
		h.deleted = 1500 * time.Millisecond
	}
	checked, violations := checkTold([]*holding{late, unaware, inTime, gone, held(5, 0, 9*sec)}, never)
	assert.Equal(t, 3, checked)
	assert.Len(t, violations, 2)
	checked, violations = checkTold([]*holding{late}, func(int, time.Duration, time.Duration) bool { return true })
	assert.Zero(t, checked)
	assert.Empty(t, violations)
}

func TestLocksetSeesWhatIsLostAndWhatIsThereButShouldNotBe(t *testing.T) {
	e := &elements{}
	e.record("kept", acknowledged)
	e.record("lost", acknowledged)
	e.record("perhaps", unknown)
	e.record("refused", refused)
	e.record("ghost", refused)
	e.record("twice", acknowledged)
	lost, wrong := e.check([]string{"kept", "ghost", "twice", "twice", "stranger"})
	assert.Equal(t, []string{"lost"}, lost)
	assert.Equal(t, []string{"ghost is there, but was refused", "stranger was never added", "twice is there 2 times"}, wrong)
}

func linearizable(h *history) bool { return porcupine.CheckOperations(registerModel, h.operations()) }

func TestRegisterSeesAStaleRead(t *testing.T) {
	h := &history{}
	h.wrote(0, 1, "a", acknowledged, 0, 1)
	h.wrote(0, 1, "b", acknowledged, 2, 3)
	h.read(1, 1, "b", 4, 5)
	require.True(t, linearizable(h))
	h.read(1, 1, "a", 6, 7)
	assert.False(t, linearizable(h))
}

func TestRegisterSeesALostWrite(t *testing.T) {
	h := &history{}
	h.wrote(0, 0, "a", acknowledged, 0, 1)
	h.read(1, 0, "", 2, 3)
	assert.False(t, linearizable(h))
}

func TestRegisterSeesAWriteThatWasRefusedButApplied(t *testing.T) {
	h := &history{}
	h.wrote(0, 0, "a", refused, 0, 1)
	h.read(1, 0, "a", 2, 3)
	assert.False(t, linearizable(h))
}

func TestRegisterLetsAWriteOfUnknownOutcomeComeLateOrNeverButOnce(t *testing.T) {
	h := &history{}
	h.wrote(0, 0, "never", unknown, 0, 1)
	h.wrote(0, 0, "late", unknown, 2, 3)
	h.wrote(1, 0, "b", acknowledged, 4, 5)
	h.read(1, 0, "b", 6, 7)
	h.read(1, 0, "late", 8, 9)
	require.True(t, linearizable(h))
	h.wrote(1, 0, "c", acknowledged, 10, 11)
	h.read(1, 0, "c", 12, 13)
	h.read(1, 0, "late", 14, 15)
	assert.False(t, linearizable(h))
}

func TestRegisterSeesAWriteThatWasAppliedTwice(t *testing.T) {
	h := &history{}
	h.wrote(0, 2, "a", acknowledged, 0, 1)
	h.wrote(0, 2, "b", unknown, 2, 3)
	assert.NotEmpty(t, h.checkVersion(2, 0))
	assert.Empty(t, h.checkVersion(2, 1))
	assert.Empty(t, h.checkVersion(2, 2))
	assert.NotEmpty(t, h.checkVersion(2, 3))
}

func TestLivenessFindsWhoHasNotHadTheLock(t *testing.T) {
	ws := &waiters{}
	early, late, never := ws.add("n", 0), ws.add("n", 1), ws.add("n", 2)
	early.had(sec)
	late.had(3 * sec)
	assert.Equal(t, []*waiter{early, never}, ws.since(2*sec))
}

func TestLeaksSeesAGoroutineOfTheLibraryAndNotOurs(t *testing.T) {
	for stack, leaked := range map[string]bool{
		"goroutine 1 [select]:\nexample.com/etcdutil.(*renewStream).run(0xc0)\n\t/lease_stream.go:1":   true,
		"goroutine 1 [select]:\nsync.runtime()\ncreated by example.com/etcdutil.behind in goroutine 7": true,
		"goroutine 1 [select]:\ngo.etcd.io/etcd/client/v3.(*watchGrpcStream).run(0xc0)\n\t/watch.go:1": true,
		"goroutine 1 [select]:\nexample.com/etcdutil/etcdtest.(*Link).accept(0xc0)\n\t/link.go:1":      false,
		"goroutine 1 [select]:\nmain.run()\n\t/example.com/etcdutil.x/internal/torture/torture.go:1":   false,
	} {
		assert.Equal(t, leaked, ofTheLibrary.MatchString(stack), stack)
	}
}

func TestTheReportBeginsWithTheSeedAndNamesEachViolation(t *testing.T) {
	r := &report{seed: 5, length: testLength, operations: &tally{}, faults: &tally{}, holders: &tally{}, violations: []string{"one", "two"}}
	assert.True(t, strings.HasPrefix(r.String(), "seed:          5,"), r.String())
	assert.Contains(t, r.String(), "VIOLATION one\n")
	assert.Contains(t, r.String(), "VIOLATION two\n")
}

const watched = watchedPrefix + "k"

// changesAt are puts of one key, each at its revision.
func changesAt(revisions ...int64) (changes []change) {
	for i, rev := range revisions {
		changes = append(changes, change{key: watched, value: `"v"`, create: revisions[0], version: int64(i + 1), revision: rev})
	}
	return changes
}

func eventsOf(changes []change) (events []etcdutil.Event[string]) {
	for _, c := range changes {
		events = append(events, etcdutil.Event[string]{Type: etcdutil.EventPut, Key: c.key, Value: "v", Version: c.version, Revision: c.revision})
	}
	return events
}

func segmentSeen(changes []change, s *segment) []string {
	return checkSegment(s, (&observer{key: watchedPrefix, prefix: true}).of(changes))
}

func TestWatchPassesWhatEtcdHas(t *testing.T) {
	all := changesAt(3, 5, 7, 9)
	assert.Empty(t, segmentSeen(all, &segment{from: 4, upTo: 8, events: eventsOf(all[1:3])}))
}

func TestWatchSeesEachBrokenGuarantee(t *testing.T) {
	all := changesAt(3, 5, 7, 9)
	three, five, seven, nine := eventsOf(all)[0], eventsOf(all)[1], eventsOf(all)[2], eventsOf(all)[3]
	other, value, prev := five, five, five
	other.Key = watched + "2"
	value.Value = "other"
	wrong := "never"
	prev.Prev = &wrong
	for name, events := range map[string][]etcdutil.Event[string]{
		"missing":        {three, five, nine},
		"missing last":   {three, five, seven},
		"twice":          {three, five, five, seven, nine},
		"twice at last":  {three, five, seven, nine, nine},
		"disordered":     {three, seven, five, nine},
		"another key":    {three, other, seven, nine},
		"another value":  {three, value, seven, nine},
		"never previous": {three, prev, seven, nine},
	} {
		assert.NotEmpty(t, segmentSeen(all, &segment{from: 1, upTo: 9, events: events}), name)
	}
}

func TestWatchSaysThatAnEventCameTwice(t *testing.T) {
	all := changesAt(3, 5)
	events := eventsOf([]change{all[0], all[0], all[1]})
	assert.Contains(t, segmentSeen(all, &segment{from: 1, upTo: 5, events: events})[0], "came twice")
}

func TestWatchSeesAGapWithoutACompaction(t *testing.T) {
	all := changesAt(3, 5)
	assert.Empty(t, segmentSeen(all, &segment{from: 1, upTo: 5, events: eventsOf(all), gap: true, compacted: 7}))
	assert.NotEmpty(t, segmentSeen(all, &segment{from: 1, upTo: 5, events: eventsOf(all), gap: true, compacted: 5}))
}

func TestWatchPassesWhatDoesNotDecodeAndWhatIsDeleted(t *testing.T) {
	changes := []change{
		{key: watched, value: `"a"`, version: 1, revision: 3},
		{key: watched, value: "?", version: 2, revision: 4},
		{key: watched, deleted: true, revision: 5},
	}
	a := "a"
	events := []etcdutil.Event[string]{
		{Type: etcdutil.EventPut, Key: watched, Value: "a", Version: 1, Revision: 3},
		{Type: etcdutil.EventInvalid, Key: watched, Raw: []byte("?"), Version: 2, Revision: 4, Prev: &a},
		{Type: etcdutil.EventDelete, Key: watched, Revision: 5},
	}
	assert.Empty(t, segmentSeen(changes, &segment{from: 1, upTo: 5, events: events}))
	events[1].Type = etcdutil.EventPut
	assert.NotEmpty(t, segmentSeen(changes, &segment{from: 1, upTo: 5, events: events}))
}

func TestSnapshotsSeeAStateThatEtcdNeverHad(t *testing.T) {
	changes := []change{
		{key: watched, value: `"a"`, revision: 3},
		{key: watched + "2", value: `"b"`, revision: 4},
		{key: watched, deleted: true, revision: 5},
		{key: observedPrefix + "elsewhere", value: `"c"`, revision: 6},
	}
	assert.Empty(t, checkState(state{revision: 4, keys: map[string]string{watched: `"a"`, watched + "2": `"b"`}}, watchedPrefix, changes))
	assert.Empty(t, checkState(state{revision: 6, keys: map[string]string{watched + "2": `"b"`}}, watchedPrefix, changes))
	assert.NotEmpty(t, checkState(state{revision: 5, keys: map[string]string{watched: `"a"`, watched + "2": `"b"`}}, watchedPrefix, changes))
	assert.NotEmpty(t, checkState(state{revision: 5, keys: map[string]string{}}, watchedPrefix, changes))
	assert.NotEmpty(t, checkState(state{revision: 5, keys: map[string]string{watched + "2": `"other"`}}, watchedPrefix, changes))
}

func logEntries(values ...string) (entries []change) {
	for i, v := range values {
		entries = append(entries, change{key: logName, value: `"` + v + `"`, version: int64(i + 1), revision: int64(10 * (i + 1))})
	}
	return entries
}

func ack(value string, version int64, call, back time.Duration) appended {
	return appended{value: value, outcome: acknowledged, place: version, call: call, back: back}
}

func TestLogPassesWhatWasReportedTruly(t *testing.T) {
	all := []appended{ack("a", 1, 0, 1), {value: "b", outcome: unknown, call: 2, back: 3}, {value: "r", outcome: refused}, {value: "u", outcome: unknown}, ack("c", 3, 4, 5)}
	assert.Empty(t, checkLogged(all, logEntries("a", "b", "c")))
}

func TestLogSeesEachBrokenPromise(t *testing.T) {
	a, b := ack("a", 1, 0, 1), ack("b", 2, 2, 3)
	gap := logEntries("a", "b")
	gap[1].version = 3
	for name, c := range map[string]struct {
		all     []appended
		entries []change
	}{
		"lost":               {[]appended{a, b}, logEntries("a")},
		"twice":              {[]appended{a, b}, logEntries("a", "b", "a")},
		"unknown twice":      {[]appended{a, {value: "u", outcome: unknown}}, logEntries("a", "u", "u")},
		"refused, but there": {[]appended{a, {value: "r", outcome: refused}}, logEntries("a", "r")},
		"another version":    {[]appended{a, b}, logEntries("b", "a")},
		"never written":      {[]appended{a}, logEntries("a", "stranger")},
		"gap":                {[]appended{a, b}, gap},
		"disordered":         {[]appended{ack("a", 1, 5, 6), ack("b", 2, 2, 3)}, logEntries("a", "b")},
	} {
		assert.NotEmpty(t, checkLogged(c.all, c.entries), name)
	}
}

func entriesRead(versions ...int64) (read []etcdutil.Entry[string]) {
	for _, v := range versions {
		read = append(read, etcdutil.Entry[string]{Value: string(rune('a' + v - 1)), Version: v, Revision: 10 * v})
	}
	return read
}

func TestLogSeesWhatAReaderMissedOrReadTwiceOrWrong(t *testing.T) {
	entries := logEntries("a", "b", "c", "d")
	wrong := entriesRead(1, 2, 3)
	wrong[1].Value = "x"
	assert.Empty(t, checkLogPart(logPart{after: -1, entries: entriesRead(2, 3, 4)}, entries, true))
	assert.Empty(t, checkLogPart(logPart{after: 1, entries: entriesRead(2, 3)}, entries, true))
	assert.Empty(t, checkLogPart(logPart{after: -1, entries: entriesRead(1, 4)}, entries, false))
	for _, part := range []logPart{
		{after: -1, entries: entriesRead(1, 3)}, {after: 1, entries: entriesRead(3)}, {after: 2, entries: entriesRead(2, 3)},
		{after: -1, entries: entriesRead(1, 1, 2)}, {after: -1, entries: entriesRead(5)}, {after: -1, entries: wrong},
	} {
		assert.NotEmpty(t, checkLogPart(part, entries, true), part)
	}
	assert.NotEmpty(t, checkLogPart(logPart{after: -1, entries: entriesRead(2, 1)}, entries, false))
}
