package main

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"
)

// kind is what a fault does.
type kind string

const (
	killLeader    kind = "kill leader"
	stopMember    kind = "stop member"
	stopTwo       kind = "stop two members"
	isolateLeader kind = "isolate leader"
	isolateMember kind = "isolate member"
	cutHolder     kind = "cut off holder"
	cutLeader     kind = "cut off leader"
	cutLink       kind = "cut link"
	dropReplies   kind = "drop replies"
	delayLink     kind = "delay link"
	holdBack      kind = "hold back holder's writes"
	resetLink     kind = "reset link"
	deleteKey     kind = "delete lock key"
	revokeLease   kind = "revoke lease"
	compact       kind = "compact"
	pauseHolders  kind = "pause holders"
	lateHolders   kind = "pause holders, deliver late"
	cancelUnsent  kind = "answer canceled, not sent"
	cancelApplied kind = "answer canceled, applied"
	cancelLate    kind = "answer canceled, sent late"
	addMetadata   kind = "callers' metadata"
	blockLogs     kind = "loggers block"
	panicLogs     kind = "loggers panic"
	blackHole     kind = "a member is a black hole"

	deleteRegistered kind = "delete registered key"
	cutCrowd         kind = "cut off the crowd"
	resetCrowd       kind = "reset the crowd's link"

	restoreIsland kind = "island: restore from a backup"
	denyIsland    kind = "island: take the permission away"
	takeIsland    kind = "island: delete lock key"
)

// A fault is one entry of the schedule.
type fault struct {
	At     time.Duration
	Kind   kind
	For    time.Duration // until it is healed
	Host   int           // whose link
	Aimed  bool          // at a holder instead, if there is one
	Member int           // which member; of a link, to which member, or all if it is negative
	Delay  time.Duration // of a link
	Behind int64         // how many revisions a compaction leaves
}

func (f fault) String() string {
	return fmt.Sprintf("%8v %-28s for %8v host %d aimed %-5t member %2d delay %v behind %d",
		f.At.Round(time.Millisecond), f.Kind, f.For.Round(time.Millisecond), f.Host, f.Aimed, f.Member, f.Delay.Round(time.Millisecond), f.Behind)
}

const (
	members = 3
	hosts   = 5
	// calmHosts are further ones, whose links are slow at times, and no more.
	calmHosts = 2
	// holedHosts are further ones, for which one member at a time is a black hole.
	holedHosts = 6
	// crowdHost is a further one, the client of which has very many watchers.
	crowdHost = hosts + calmHosts + holedHosts
	// firstIslander is the number of the first host on the island.
	firstIslander = 100
)

// plan makes the schedule of a seed. A shorter one is the beginning of a longer one, without what
// would not be healed in time.
func plan(seed uint64, length time.Duration) []fault {
	var all []fault
	for i, lane := range []lane{planMembers, planLinks, planHolders, planHeldBack, planCalm, planKeys, planPauses, planAnswers,
		planMetadata, planIsland, planIslandKeys, planLogs, planHole, planRegistered, planCrowd,
		planLeaders} {
		r := rand.New(rand.NewPCG(seed, uint64(i)))
		for at := time.Duration(0); at < length; {
			f, next := lane(r, at)
			if at = next; f.At+f.For <= length {
				all = append(all, f)
			}
		}
	}
	slices.SortStableFunc(all, func(a, b fault) int { return cmp.Compare(a.At, b.At) })
	return all
}

// A lane plans the next fault of its sort, after the last one's time, and when it can plan again.
// Lanes are independent of each other: their faults coincide.
type lane func(r *rand.Rand, after time.Duration) (f fault, next time.Duration)

// planMembers has one fault of the members at a time, so that they lose their quorum when it is
// said and for as long.
func planMembers(r *rand.Rand, after time.Duration) (fault, time.Duration) {
	f := fault{
		At:     after + between(r, 3*time.Second, 9*time.Second),
		Kind:   pick(r, killLeader, killLeader, stopMember, stopMember, isolateLeader, isolateLeader, isolateMember, stopTwo),
		For:    between(r, 800*time.Millisecond, 3*time.Second),
		Member: r.IntN(members),
	}
	if f.Kind == stopTwo {
		f.For /= 2
	}
	return f, f.At + f.For
}

// planLinks has faults of several clients' links at a time.
func planLinks(r *rand.Rand, after time.Duration) (fault, time.Duration) {
	f := fault{
		At:     after + between(r, 700*time.Millisecond, 2500*time.Millisecond),
		Kind:   pick(r, cutLink, cutLink, dropReplies, dropReplies, delayLink, delayLink, resetLink, resetLink),
		Host:   r.IntN(hosts),
		Aimed:  r.IntN(3) > 0,
		Member: max(r.IntN(2*members)-members, -1), // all of them, in four of six
		Delay:  between(r, 5*time.Millisecond, 500*time.Millisecond),
		For:    between(r, 300*time.Millisecond, 3*time.Second),
	}
	switch f.Kind {
	case resetLink:
		f.For = 0
	case dropReplies:
		f.For /= 2 // mostly less than a lease's time: then what was done unbeknown is tried again
	}
	return f, f.At
}

// planHolders cuts the holder of the strict lock off, for longer than its lease lives.
func planHolders(r *rand.Rand, after time.Duration) (fault, time.Duration) {
	f := fault{
		At:     after + between(r, 500*time.Millisecond, 2*time.Second),
		Kind:   cutHolder,
		Host:   r.IntN(hosts),
		Aimed:  true,
		Member: -1,
		For:    between(r, 3*time.Second, 4500*time.Millisecond),
	}
	return f, f.At + f.For
}

// planLeaders cuts the leader off, like planHolders.
func planLeaders(r *rand.Rand, after time.Duration) (fault, time.Duration) {
	f, next := planHolders(r, after)
	f.Kind = cutLeader
	return f, next
}

// planHeldBack delays what a holder writes for longer than its lease lives.
func planHeldBack(r *rand.Rand, after time.Duration) (fault, time.Duration) {
	f := fault{
		At:     after + between(r, 2*time.Second, 6*time.Second),
		Kind:   holdBack,
		Host:   r.IntN(hosts),
		Aimed:  true,
		Member: -1,
		For:    between(r, 3500*time.Millisecond, 4500*time.Millisecond),
	}
	f.Delay = f.For - 100*time.Millisecond
	return f, f.At + f.For
}

func planCalm(r *rand.Rand, after time.Duration) (fault, time.Duration) {
	f := fault{
		At:     after + between(r, 100*time.Millisecond, time.Second),
		Kind:   delayLink,
		Host:   hosts + r.IntN(calmHosts),
		Member: -1,
		Delay:  between(r, 15*time.Millisecond, 80*time.Millisecond),
		For:    between(r, 500*time.Millisecond, 2*time.Second),
	}
	return f, f.At + f.For
}

func planKeys(r *rand.Rand, after time.Duration) (fault, time.Duration) {
	f := fault{
		At:     after + between(r, 200*time.Millisecond, 1500*time.Millisecond),
		Kind:   pick(r, deleteKey, revokeLease, compact),
		Behind: r.Int64N(300),
	}
	return f, f.At
}

// planPauses stops both holders that are processes of their own, for longer than a lease lives
// without renewal: 2 s, up to 0.5 s until the server looks, and a while for somebody else to take
// over and write. The first is the surest to bite.
func planPauses(r *rand.Rand, after time.Duration) (fault, time.Duration) {
	f := fault{
		At:   after + between(r, 50*time.Millisecond, 500*time.Millisecond),
		Kind: pick(r, pauseHolders, lateHolders, lateHolders),
		For:  between(r, 4500*time.Millisecond, 6*time.Second),
	}
	if after == 0 {
		f.Kind = pauseHolders
	}
	return f, f.At + f.For + between(r, 100*time.Millisecond, time.Second)
}

// planAnswers spoils the answers to a host's writes, also those of calm hosts: a lease that lives
// on is where a write that comes late does harm.
func planAnswers(r *rand.Rand, after time.Duration) (fault, time.Duration) {
	f := fault{
		At:   after + between(r, 200*time.Millisecond, 1200*time.Millisecond),
		Kind: pick(r, cancelUnsent, cancelApplied, cancelApplied, cancelLate),
		Host: r.IntN(hosts + calmHosts),
		For:  between(r, 300*time.Millisecond, 2*time.Second),
	}
	f.Aimed = f.Kind == cancelApplied
	return f, f.At
}

func planMetadata(r *rand.Rand, after time.Duration) (fault, time.Duration) {
	f := fault{
		At:   after + between(r, 200*time.Millisecond, 1200*time.Millisecond),
		Kind: addMetadata,
		Host: r.IntN(hosts + calmHosts),
		For:  between(r, 500*time.Millisecond, 2*time.Second),
	}
	return f, f.At
}

// planIsland has one fault of the island at a time. After a restore there is time in which wrong
// holders would be seen, and after a denial time in which detectors that have switched themselves
// off would be.
func planIsland(r *rand.Rand, after time.Duration) (fault, time.Duration) {
	f := fault{
		At:   after + between(r, 500*time.Millisecond, 3*time.Second),
		Kind: pick(r, restoreIsland, denyIsland),
		For:  between(r, 500*time.Millisecond, 3*time.Second),
	}
	if f.Kind == denyIsland {
		f.For = between(r, 300*time.Millisecond, 1500*time.Millisecond)
		return f, f.At + f.For + between(r, 4*time.Second, 6*time.Second)
	}
	return f, f.At + f.For + between(r, 3*time.Second, 9*time.Second)
}

func planIslandKeys(r *rand.Rand, after time.Duration) (fault, time.Duration) {
	f := fault{At: after + between(r, time.Second, 3*time.Second), Kind: takeIsland}
	return f, f.At
}

// planLogs has loggers block for longer than a calm host's lease lives.
func planLogs(r *rand.Rand, after time.Duration) (fault, time.Duration) {
	f := fault{
		At:   after + between(r, time.Second, 4*time.Second),
		Kind: pick(r, blockLogs, blockLogs, panicLogs),
		For:  between(r, 11*time.Second, 14*time.Second),
	}
	if f.Kind == panicLogs {
		f.For /= 4
	}
	return f, f.At + f.For
}

func planHole(r *rand.Rand, after time.Duration) (fault, time.Duration) {
	f := fault{
		At:     after + between(r, time.Second, 3*time.Second),
		Kind:   blackHole,
		Host:   hosts + calmHosts + r.IntN(holedHosts),
		Member: r.IntN(members),
		For:    between(r, holedToldAtLast+2*time.Second, 2*holedToldAtLast),
	}
	return f, f.At
}

func planRegistered(r *rand.Rand, after time.Duration) (fault, time.Duration) {
	f := fault{
		At:   after + between(r, 500*time.Millisecond, 2*time.Second),
		Kind: deleteRegistered,
		Host: r.IntN(hosts + calmHosts),
	}
	return f, f.At
}

func planCrowd(r *rand.Rand, after time.Duration) (fault, time.Duration) {
	f := fault{
		At:     after + between(r, 2*time.Second, 6*time.Second),
		Kind:   pick(r, cutCrowd, resetCrowd),
		Host:   crowdHost,
		Member: -1,
		For:    between(r, 500*time.Millisecond, 4*time.Second),
	}
	return f, f.At + f.For
}

func between(r *rand.Rand, low, high time.Duration) time.Duration {
	return low + time.Duration(r.Int64N(int64(high-low)))
}

func pick[T any](r *rand.Rand, from ...T) T { return from[r.IntN(len(from))] }
