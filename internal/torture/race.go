//go:build race

package main

import "time"

// rest is for up to how long a worker rests between two steps. The race detector makes everything
// many times slower: with no rest two cores would be so busy that leases expire, whose holders then
// try again.
const rest = 200 * time.Millisecond
