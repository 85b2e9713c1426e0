package etcdutil

import (
	"testing"

	"example.com/etcdutil/etcdtest"
	"github.com/stretchr/testify/require"
)

func TestWatchOfTheEmptyPrefixWatchesEverything(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 1)
	client := cluster.Client(t)
	mustPut(t, client, "\x00first", "1")
	mustPut(t, client, "z", "1")
	plain := mustWatch[string](t, client, "", WithPrefix(), WithCodec(Raw))
	follower := mustWatch[string](t, client, "", WithPrefix(), WithCodec(Raw), WithSnapshot())
	listed, _ := untilSynced(t, follower)
	require.Len(t, listed, 2)
	for _, key := range []string{"\x00", "a", "\xff\xff"} {
		rev := mustPut(t, client, key, "2")
		require.Equal(t, toldEvent{EventPut, key, "2", rev}, toldOf(next(t, plain)))
		require.Equal(t, toldEvent{EventPut, key, "2", rev}, toldOf(next(t, follower)))
	}
}

// panicsOnValue panics instead of decoding "panic".
type panicsOnValue struct{ Codec }

func (c panicsOnValue) Unmarshal(data []byte, v any) error {
	if string(data) == "panic" {
		panic("of the codec")
	}
	return c.Codec.Unmarshal(data, v)
}

func TestWatchSendsAnInvalidEventWhereItsCodecPanics(t *testing.T) {
	t.Parallel()
	client := testCluster.Client(t)
	w := mustWatch[string](t, client, nameOf(t), WithCodec(panicsOnValue{Raw}))
	mustPut(t, client, nameOf(t), "panic")
	mustPut(t, client, nameOf(t), "after")
	e := next(t, w)
	require.Equal(t, EventInvalid, e.Type)
	require.Equal(t, "panic", string(e.Raw))
	require.ErrorIs(t, e.Err, ErrInvalidValue)
	require.ErrorContains(t, e.Err, "of the codec")
	require.Equal(t, "after", next(t, w).Value)
}

func TestWatchesOfOneClientAreNotDelayedByAReaderThatIsStuck(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 1)
	client := cluster.Client(t)
	stuck := mustWatch[string](t, client, "big", WithCodec(Raw))
	other := mustWatch[string](t, client, "small", WithCodec(Raw))
	value := string(make([]byte, 1_000_000))
	for range 12 { // more than is read ahead
		mustPut(t, client, "big", value)
	}
	for range 3 {
		rev := mustPut(t, client, "small", "")
		require.Equal(t, rev, next(t, other).Revision)
	}
	for version := range 12 {
		require.EqualValues(t, version+1, next(t, stuck).Version)
	}
}

func TestWatchErrorOfRawNamesThePackageOnce(t *testing.T) {
	t.Parallel()
	client := testCluster.Client(t)
	w := mustWatch[int](t, client, nameOf(t), WithCodec(Raw))
	mustPut(t, client, nameOf(t), "v")
	require.EqualError(t, next(t, w).Err, "etcdutil: invalid value: the Raw codec decodes into string and []byte, not *int")
	_, err := Register(t.Context(), client, nameOf(t), 1, WithCodec(Raw))
	require.ErrorContains(t, err, "v cannot be encoded: the Raw codec takes string and []byte, not int")
}
