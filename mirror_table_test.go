package etcdutil

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestTableIsWhatItsEditsMadeItAndNeverChanges(t *testing.T) {
	t.Parallel()
	type kept struct {
		table *table[int]
		want  map[string]int
	}
	var versions []kept
	now, want := newTable[int](), map[string]int{}
	for round := range 120 {
		e := now.edit()
		if round == 60 { // as after a list
			e, want = newTableEdit[int](), map[string]int{}
		}
		for range rand.IntN(1 + round*3) {
			key := fmt.Sprint("key-", rand.IntN(3000))
			if rand.IntN(3) == 0 {
				e.delete(key)
				delete(want, key)
			} else {
				e.set(key, round)
				want[key] = round
			}
		}
		now = e.done()
		if round%7 == 0 {
			now.keys()
		}
		versions = append(versions, kept{now, maps.Clone(want)})
	}
	for _, v := range versions {
		require.Equal(t, len(v.want), v.table.len)
		require.Equal(t, v.want, maps.Collect(v.table.all()))
		require.Equal(t, slices.Sorted(maps.Keys(v.want)), append([]string(nil), v.table.keys()...))
		for key, value := range v.table.sorted() {
			require.Equal(t, v.want[key], value)
		}
	}
}
