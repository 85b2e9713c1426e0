//go:build race

package etcdutil

// underRace reports that the race detector is on. It makes everything many times slower, so tests
// of quantities and times use smaller ones.
const underRace = true
