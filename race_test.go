//go:build race

package etcdutil

// underRace: the race detector makes everything many times slower, so that tests of quantities and times do with less.
const underRace = true
