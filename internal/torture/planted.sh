#!/usr/bin/env bash
# Breaks the library on purpose, one way at a time, and shows that the torture sees it: a test that
# cannot fail proves nothing. The repository is left alone, the breakages are made in copies of it.
# Needs bash, perl and Go.
#
#   internal/torture/planted.sh [NAME...]    the breakages to plant; default: all
#   SEED=7 FOR=60s                           the schedule: all are seen within a minute of faults,
#                                            and the check behind
#
# Exits with 1 if a breakage no longer applies, does not compile, is not seen, or is seen as
# something else.
set -euo pipefail
exec </dev/null
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
seed=${SEED:-7} length=${FOR:-60s}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# The breakages: what is changed, in which file, and which violation is to be seen.
names=(late-expiry unfenced-commit release-on-parent-end unguarded-try no-create-revision resume-at-last
	two-leaders waiter-as-holder torn-read not-registered-again
	repetition-not-counted ghost-key final-refusal logger-in-the-way
	stale-progress late-move id-used-twice waits-for-reader deaf-to-silence)

plant() { # NAME: breaks the library in the current directory, and sets $expected
	case $1 in
	late-expiry) # as client/v3 does it: from when the answer came, looked at every second
		expected='exclusion: .* two held it'
		replace lease.go 'expiry := sentAt.Add(ttl - l.margin)' 'expiry := time.Now().Add(ttl + time.Second)'
		;;
	unfenced-commit) # compares nothing
		expected='lock-set: .* are lost|register: '
		replace lock_commit.go 'guards: append([]clientv3.Cmp{f.unchanged()}, conditions...),' 'guards: conditions,'
		replace lock_commit.go 'clientv3.OpPut(f.queue.key, "", clientv3.WithIgnoreValue(), clientv3.WithIgnoreLease()))' 'clientv3.OpGet(f.queue.key))'
		;;
	release-on-parent-end) # while the work still winds down
		expected='exclusion: .* two held it'
		replace lock.go 'l.markHeld(time.Since(start))' \
			'context.AfterFunc(ctx, func() { _ = l.Close() }); l.markHeld(time.Since(start))'
		;;
	resume-at-last) # and not after it
		expected='watch: .* (it came twice|ended with a gap)'
		replace watch_stream.go 'sub.next = upTo + 1' 'sub.next = upTo'
		;;
	unguarded-try) # writes although somebody has acquired it since the look
		expected='exclusion: .* two held it'
		replace lock_queue.go 'clientv3.Compare(clientv3.CreateRevision(prefix(c.name)), "<", seen+1).WithPrefix()' \
			'clientv3.Compare(clientv3.CreateRevision(c.key), "=", 0)'
		;;
	no-create-revision) # takes a key that is used again for the one that it waits for
		expected='liveness: .* exclusion/reused'
		replace lock_queue.go 'clientv3.Compare(clientv3.CreateRevision(key), "=", kv.CreateRevision),' ''
		;;
	two-leaders) # gives the leader a context that does not end with the lock
		expected='exclusion: observed/leader: two held it'
		replace lead.go 'err = lock.Do(ctx, fn)' 'err = fn(context.WithoutCancel(lock))'
		;;
	waiter-as-holder) # takes whoever comes next for the holder
		expected='watch holder: .* the holder was reported to be'
		replace lead.go 'key, next := prefix(f.name), f.whileVacant' 'key, next, vacant := prefix(f.name), f.whileVacant, true'
		replace lead.go 'if c.prefix = f.holder == nil; !c.prefix {' 'if c.prefix = vacant; !c.prefix {'
		;;
	torn-read) # shows each change as it comes, though its transaction goes on
		expected='mirror: torn read'
		replace mirror.go 'upTo := f.w.Revision(); upTo >= e.Revision {' 'upTo := e.Revision; true {'
		;;
	not-registered-again) # does not look when its key has been disturbed
		expected='register: .* without its value'
		replace register.go 'return struct{}{}, k.check(ctx)' '<-k.owner.ctx.Done(); return struct{}{}, nil'
		;;
	repetition-not-counted) # takes the last answer for the only one, though clientv3 has sent it twice
		expected='(commit|log): .* was refused .* but was applied'
		replace lock_txn.go 's.result.mayBeApplied || others > 0' 's.result.mayBeApplied'
		replace lock_commit.go 'return verdictOverwritten' 'return verdictNotApplied'
		;;
	ghost-key) # leaves keys on a shared lease that arrived late, or that a restore has brought back
		expected='liveness: .* (exclusion/reused|exclusion/private|island/)'
		replace lease.go 'for _, raw := range attached {' 'for _, raw := range attached[:0] {'
		;;
	final-refusal) # does not renew a lease again that etcd has once refused to renew
		expected='island: a lease was lost'
		replace lease.go 'l.renewAfter(pause)' '_ = pause; l.renew.Stop()'
		;;
	logger-in-the-way) # logs where others wait
		expected='lease: one of a calm host|release: .* Close took|exclusion: .* two held it'
		replace observe.go 'func (r *reporter) submit(report func()) {' 'func (r *reporter) submit(report func()) { runRecovered(report); return'
		;;
	stale-progress) # takes progress from before the watch was created for the watch's own
		expected='watch: .* (instead of|are missing)'
		replace watch_stream.go 'fresh := rev > r.createdAt || r.stale == 0' 'fresh := true'
		;;
	late-move) # goes on one revision late on the stream for watches that are up to date
		expected='watch: .* (instead of|are missing)'
		replace watch_stream.go 'StartRevision: r.sub.next,' \
			'StartRevision: r.sub.next + map[bool]Revision{true: 1}[r.sub.moving == r],'
		;;
	id-used-twice) # gives a watch the ID of another one on its stream
		expected='liveness: .* of the crowd'
		replace watch_stream.go $'s.lastID++\n' $'s.lastID = s.lastID%100 + 1\n'
		;;
	waits-for-reader) # holds up a shared stream for a reader that is stuck
		expected='liveness: .* of the crowd'
		replace watch_stream.go $'case s.kind == ownStream:\n\t\treturn true' $'case true:\n\t\treturn true'
		replace watch_stream.go 'time.NewTimer(slowReaderGrace)' 'time.NewTimer(time.Hour)'
		;;
	deaf-to-silence) # stays on a stream whose member does not answer
		expected='black hole: .* the holder was not told|liveness: '
		replace watch_stream.go 'case len(s.creating) > 0 && s.quiet >=' 'case false && s.quiet >='
		;;
	*) fail "$1: no such breakage" ;;
	esac
}

replace() { # FILE OLD NEW
	OLD=$2 NEW=$3 perl -0pi -e 's/\Q$ENV{OLD}\E/$ENV{NEW}/ == 1 or exit 1' "$1" || fail "no longer applies to $1: $2"
}

fail() {
	printf 'FAILED: %s\n' "$*" >&2
	exit 1
}

see() { # NAME
	local copy=$work/$1 status=0 begin expected
	mkdir "$copy"
	(cd "$repository" && git ls-files -z --cached --others --exclude-standard | xargs -0 tar cf -) | tar xf - -C "$copy"
	cd "$copy"
	plant "$1"
	go build -o torture ./internal/torture || fail "$1: does not compile"
	begin=$SECONDS
	timeout 130 ./torture -seed "$seed" -for "$length" -pictures "$work" >report 2>&1 || status=$?
	[[ $status == 1 ]] || { cat report >&2 && fail "$1: not seen (exit status $status)"; }
	grep -Eq "VIOLATION ($expected)" report || { cat report >&2 && fail "$1: seen as something else"; }
	printf '%-24s seen after %d s: %s\n' "$1" $((SECONDS - begin)) "$(grep -E "VIOLATION ($expected)" report | head -n 1 | cut -c 1-160)"
	cd "$repository"
	rm -rf "$copy"
}

[[ $# -gt 0 ]] && names=("$@")
for name in "${names[@]}"; do see "$name"; done
