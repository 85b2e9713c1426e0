// Torture shows that etcdutil's promises hold under faults that nobody scripted: random ones, at
// workloads whose histories are recorded and then checked.
//
//	go run ./internal/torture -seed 7 -for 60s
//
// Three etcd members run inside this process. Clients, each behind links of its own, and two that
// are processes of their own, contend for locks, lead, write logs, watch, mirror and register keys.
// Meanwhile members crash, networks break, processes pause, a proxy loses or delays answers,
// loggers block, and keys, leases and history disappear. A second etcd, the island, is restored
// from backups, and takes its users' permission away for seconds.
//
// The seed makes the schedule of the faults. What happens then differs from run to run. The models
// are Jepsen's lock tests of etcd, and etcd's own robustness tests.
//
// It prints what it did and found. It exits with 1 if a promise was broken, and with 2 if it could
// not find out. The script planted.sh breaks the library on purpose, and shows that the torture
// sees it.
package main

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"time"
)

func main() {
	if isChild() {
		os.Exit(childMain())
	}
	seed := flag.Uint64("seed", 0, "makes the schedule of faults; 0: a fresh one, which is printed")
	length := flag.Duration("for", time.Minute, "how long there are faults")
	pictures := flag.String("pictures", os.TempDir(), "where the picture of a history that is not linearizable goes")
	crowd := flag.Int("crowd", usualCrowd, "how many watchers the client has that has the most")
	list := flag.Bool("schedule", false, "print the schedule of faults, and do nothing else")
	flag.Parse()
	if *seed == 0 {
		*seed = freshSeed()
	}
	if *list {
		for _, f := range plan(*seed, *length) {
			fmt.Println(f)
		}
		return
	}
	fmt.Printf("torture: seed %d, faults for %v\n", *seed, *length)
	report, err := run(*seed, *length, *pictures, *crowd)
	if err != nil {
		fmt.Fprintln(os.Stderr, "torture:", err)
		os.Exit(2)
	}
	fmt.Print(report)
	if len(report.violations) > 0 {
		os.Exit(1)
	}
}

// freshSeed is short enough to be typed.
func freshSeed() uint64 { return 1 + rand.Uint64N(1_000_000) }
