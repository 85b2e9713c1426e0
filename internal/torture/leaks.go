package main

import (
	"context"
	"regexp"
	"runtime"
	"strings"
	"time"
)

// leaking is how long what was closed may take to be gone: a lease that could not be revoked lives
// for its TTL, and so does what cares for it.
const leaking = leaseTTL + 6*time.Second

// checkLeaks checks that everything that was closed is gone: goroutines of the library, watches
// that it made, and leases.
func (t *torture) checkLeaks(r *report) {
	deadline := time.Now().Add(leaking)
	for {
		goroutines, leases := leakedGoroutines(), t.leakedLeases()
		if r.goroutines, r.leases = len(goroutines), leases; r.goroutines == 0 && r.leases == 0 {
			return
		}
		if time.Now().After(deadline) {
			if len(goroutines) > 0 {
				t.violate("leaks: %d goroutines, one of them:\n%s", len(goroutines), goroutines[0])
			}
			if leases != 0 {
				t.violate("leaks: %d leases", leases)
			}
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// leakedLeases returns -1 if etcd does not say.
func (t *torture) leakedLeases() int {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	resp, err := t.admin.Leases(ctx)
	if err != nil {
		return -1
	}
	return len(resp.Leases)
}

// ofTheLibrary are the frames of a goroutine that the library runs, or that clientv3 runs for a
// watch of its.
var ofTheLibrary = regexp.MustCompile(`(?m)^(created by )?(example\.com/etcdutil\.|go\.etcd\.io/etcd/client/v3\.\(\*watchGrpcStream\))`)

// leakedGoroutines are the stacks of the goroutines that nobody should be running any more.
func leakedGoroutines() []string {
	buffer := make([]byte, 1<<20)
	for {
		n := runtime.Stack(buffer, true)
		if n < len(buffer) {
			buffer = buffer[:n]
			break
		}
		buffer = make([]byte, 2*len(buffer))
	}
	var leaked []string
	for stack := range strings.SplitSeq(string(buffer), "\n\n") {
		if ofTheLibrary.MatchString(stack) {
			leaked = append(leaked, stack)
		}
	}
	return leaked
}
