//go:build !race

package etcdutil

const underRace = false
