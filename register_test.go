package etcdutil

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"example.com/etcdutil/etcdtest"
	"example.com/etcdutil/internal/testclock"
	"github.com/stretchr/testify/require"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

func mustRegister(t testing.TB, client *clientv3.Client, key, v string, opts ...RegisterOption) *Registration[string] {
	t.Helper()
	r, err := Register(context.Background(), client, key, v, append(opts, WithCodec(Raw))...)
	require.NoError(t, err)
	t.Cleanup(func() { _ = r.Close() })
	return r
}

// keyNow returns a key as it is in etcd; nil if it is not.
func keyNow(t testing.TB, client *clientv3.Client, key string) *mvccpb.KeyValue {
	t.Helper()
	return first(mustGet(t, client, key).Kvs)
}

// requireRegisteredWithin requires that a key is there, with a value and under a live lease of the
// registration's, within the bound that the docs give.
func requireRegisteredWithin(t testing.TB, d time.Duration, client *clientv3.Client, r *Registration[string], want string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	requireWithin(t, d, func() bool {
		resp, err := client.Get(ctx, r.Key())
		if err != nil || len(resp.Kvs) == 0 {
			return false
		}
		kv, lease := resp.Kvs[0], r.keeper.lease.Load()
		return string(kv.Value) == want && clientv3.LeaseID(kv.Lease) == lease.ID() && lease.Err() == nil
	}, "the key is written")
}

const registerBackWithin = time.Second

func TestRegisterKeepsAKeyUntilClose(t *testing.T) {
	t.Parallel()
	client, key := newClient(t, testCluster.Endpoints()...), nameOf(t)
	type address struct{ Host string }
	r, err := Register(context.Background(), client, key, address{"a"}, WithTTL(5*time.Second))
	require.NoError(t, err)
	require.Equal(t, key, r.Key())
	kv := keyNow(t, client, key)
	require.JSONEq(t, `{"Host":"a"}`, string(kv.Value))
	require.True(t, knows(t, client, clientv3.LeaseID(kv.Lease)))
	require.NoError(t, r.Set(context.Background(), address{"b"}))
	now := keyNow(t, client, key)
	require.JSONEq(t, `{"Host":"b"}`, string(now.Value))
	require.Equal(t, kv.Lease, now.Lease)
	require.EqualValues(t, 2, now.Version)
	require.NoError(t, r.Err())
	require.NoError(t, r.Close())
	require.Nil(t, keyNow(t, client, key))
	require.False(t, knows(t, client, clientv3.LeaseID(kv.Lease)))
	require.Equal(t, ErrClosed, context.Cause(r))
	require.ErrorIs(t, r.Set(context.Background(), address{"c"}), ErrClosed)
	require.NoError(t, r.Close())
	require.Nil(t, keyNow(t, client, key))
}

func TestRegisterWritesAKeyAgainThatIsGone(t *testing.T) {
	t.Parallel()
	client, key := newClient(t, testCluster.Endpoints()...), nameOf(t)
	r := mustRegister(t, client, key, "1")
	require.NoError(t, r.Set(context.Background(), "2"))
	for name, harm := range map[string]func(){
		"deleted": func() { mustDelete(t, client, key) },
		"revoked": func() {
			_, err := client.Revoke(context.Background(), r.keeper.lease.Load().ID())
			require.NoError(t, err)
		},
		"overwritten by hand": func() { mustPut(t, client, key, "other") },
		"detached by hand":    func() { mustPut(t, client, key, "2") },
		"overwritten under the same lease": func() {
			mustTxn(t, client, clientv3.OpPut(key, "other", clientv3.WithLease(r.keeper.lease.Load().ID())))
		},
		"its lease is lost": func() { r.keeper.lease.Load().markLost(ErrLeaseExpired) },
	} {
		harm()
		requireRegisteredWithin(t, registerBackWithin, client, r, "2")
		require.NoError(t, r.Err(), name)
	}
	require.NoError(t, r.Close())
	require.Nil(t, keyNow(t, client, key))
}

func TestRegisterIsBackAfterTenTTLs(t *testing.T) {
	t.Parallel() // its cases are no subtests, which would begin after all other tests
	const ttl = 2 * time.Second
	type outage struct {
		cluster *etcdtest.Cluster
		r       *Registration[string]
		heal    func()
	}
	outages := map[string]outage{}
	for name, fault := range map[string]func(c *etcdtest.Cluster, l *etcdtest.Link) (heal func()){
		"black hole": func(_ *etcdtest.Cluster, l *etcdtest.Link) func() {
			l.Cut()
			return l.Heal
		},
		"etcd is stopped": func(c *etcdtest.Cluster, _ *etcdtest.Link) func() {
			_ = c.Stop(0)
			return func() { _ = c.Restart(0) }
		},
	} {
		cluster := etcdtest.Start(t, 1)
		client, link := linkedTo(t, cluster)
		r := mustRegister(t, client, nameOf(t), "1", WithTTL(ttl))
		require.Equal(t, ttl, r.keeper.lease.Load().TTL())
		outages[name] = outage{cluster, r, fault(cluster, link)}
	}
	time.Sleep(10 * ttl)
	for name, o := range outages {
		require.NoError(t, o.r.Err(), name)
		o.heal()
		requireRegisteredWithin(t, registerBackWithin, o.cluster.Client(t), o.r, "1")
	}
}

func TestRegisterIsBackAfterARestore(t *testing.T) {
	t.Parallel()
	var predecessor *Registration[string]
	for name, test := range map[string]struct {
		before, after func(t *testing.T, c *etcdtest.Cluster, key string) *Registration[string]
	}{
		"to before it": {
			func(*testing.T, *etcdtest.Cluster, string) *Registration[string] { return nil },
			func(t *testing.T, c *etcdtest.Cluster, key string) *Registration[string] {
				return mustRegister(t, c.Client(t), key, "1")
			},
		},
		"to an older value, perhaps before its watch has seen the last write": {
			func(t *testing.T, c *etcdtest.Cluster, key string) *Registration[string] {
				return mustRegister(t, c.Client(t), key, "0")
			},
			nil,
		},
		"to its predecessor": {
			func(t *testing.T, c *etcdtest.Cluster, key string) *Registration[string] {
				predecessor = mustRegister(t, c.Client(t), key, "0")
				return nil
			},
			func(t *testing.T, c *etcdtest.Cluster, key string) *Registration[string] {
				between := mustRegister(t, c.Client(t), key, "another one between")
				r := mustRegister(t, c.Client(t), key, "1")
				for _, old := range []*Registration[string]{predecessor, between} {
					within(t, patience, old.Done(), "it is told that it was replaced")
				}
				return r
			},
		},
		"to its own earlier lease": {
			func(t *testing.T, c *etcdtest.Cluster, key string) *Registration[string] {
				return mustRegister(t, c.Client(t), key, "0")
			},
			func(t *testing.T, c *etcdtest.Cluster, key string) *Registration[string] { return nil },
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			cluster, key := etcdtest.Start(t, 1), nameOf(t)
			r := test.before(t, cluster, key)
			require.NoError(t, cluster.Backup())
			if r != nil {
				requireRegisteredWithin(t, patience, cluster.Client(t), r, "0")
			}
			if test.after != nil {
				if later := test.after(t, cluster, key); later != nil {
					r = later
				} else {
					r.keeper.lease.Load().markLost(ErrLeaseExpired)
					requireRegisteredWithin(t, patience, cluster.Client(t), r, "0")
				}
			}
			require.NoError(t, r.Set(context.Background(), "1"))
			require.NoError(t, cluster.Restore())
			requireRegisteredWithin(t, registerBackWithin, cluster.Client(t), r, "1")
			require.NoError(t, r.Err())
			require.NoError(t, r.Close())
			require.Nil(t, keyNow(t, cluster.Client(t), key))
		})
	}
}

func TestRegisterTakesOverAtOnce(t *testing.T) {
	t.Parallel()
	client, key := newClient(t, testCluster.Endpoints()...), nameOf(t)
	old := mustRegister(t, newClient(t, testCluster.Endpoints()...), key, "old")
	lease := old.keeper.lease.Load().ID()
	r := mustRegister(t, client, key, "new")
	within(t, time.Second, old.Done(), "the older one is told")
	require.ErrorIs(t, context.Cause(old), ErrReplaced)
	require.ErrorIs(t, old.Set(context.Background(), "old again"), ErrReplaced)
	require.ErrorIs(t, old.Close(), ErrReplaced)
	requireRegisteredWithin(t, patience, client, r, "new")
	eventually(t, func() bool { return !knows(t, client, lease) }, "the older one's lease is revoked")

	// One that is not told, because it is cut off, takes nothing back.
	cut, link := linkedClient(t)
	r = mustRegister(t, cut, key, "cut off", WithTTL(2*time.Second))
	link.Cut()
	last := mustRegister(t, client, key, "last")
	time.Sleep(5 * time.Second) // it loses its lease
	link.Heal()
	within(t, patience, r.Done(), "it is told")
	require.ErrorIs(t, context.Cause(r), ErrReplaced)
	requireRegisteredWithin(t, patience, client, last, "last")
	require.NoError(t, last.Err())
}

func TestRegisterDoesNotFlapWhereManyFight(t *testing.T) {
	t.Parallel()
	client, key := newClient(t, testCluster.Endpoints()...), nameOf(t)
	const fighters = 10
	registrations := make([]*Registration[string], fighters)
	var starting sync.WaitGroup
	for i := range fighters {
		starting.Go(func() {
			r, err := Register(context.Background(), client, key, strconv.Itoa(i), WithCodec(Raw))
			if err != nil {
				t.Error(err)
				return
			}
			registrations[i] = r
		})
	}
	starting.Wait()
	var left []*Registration[string]
	eventually(t, func() bool {
		left = nil
		for _, r := range registrations {
			if r.Err() == nil {
				left = append(left, r)
			}
		}
		return len(left) == 1
	}, "one is left")
	version := keyNow(t, client, key).Version
	require.LessOrEqual(t, version, int64(fighters), "each has written once at most")
	time.Sleep(2 * time.Second)
	require.NoError(t, left[0].Err())
	require.Equal(t, version, keyNow(t, client, key).Version)
	for _, r := range registrations {
		if r != left[0] {
			require.ErrorIs(t, context.Cause(r), ErrReplaced)
			require.ErrorIs(t, r.Close(), ErrReplaced)
		}
	}
	require.NoError(t, left[0].Close())
	require.Nil(t, keyNow(t, client, key))
}

func TestRegistrationCloseLeavesAnothersKey(t *testing.T) {
	t.Parallel()
	client, link := linkedClient(t)
	other, key := newClient(t, testCluster.Endpoints()...), nameOf(t)
	r := mustRegister(t, client, key, "1")
	link.DropReplies() // it is not told
	mustPut(t, other, key, "another's")
	link.Heal()
	lease := mustLease(t, other, 10*time.Second)
	mustTxn(t, other, clientv3.OpPut(key, "another's", clientv3.WithLease(lease.ID())))
	_ = r.Close()
	require.Equal(t, "another's", string(keyNow(t, other, key).Value))
}

// It does not run beside others, of which the stacks would be counted.
func TestRegistrationCloseReturnsThoughItIsReplacedAtThatMoment(t *testing.T) {
	r, err := Register(context.Background(), newClient(t, testCluster.Endpoints()...), nameOf(t), "1")
	require.NoError(t, err)
	stop, stopping, goOn := r.stop, make(chan struct{}), make(chan struct{})
	r.stop = func(cause error) { close(stopping); <-goOn; stop(cause) }
	go r.shutdown(ErrReplaced) // as the keeper does
	<-stopping
	closing := start(func() (struct{}, error) { return struct{}{}, r.Close() })
	eventually(t, func() bool { return goroutinesIn("(*lifetime).shutdown") == 2 }, "Close comes second")
	close(goOn)
	within(t, patience, closing.done, "Close returns")
	require.ErrorIs(t, closing.err, ErrReplaced)
}

// Each Set that returned nil was applied once, in order, and nothing else, whatever the network
// did.
func TestRegistrationSetIsAppliedExactlyOnce(t *testing.T) {
	t.Parallel()
	client, link := linkedClient(t)
	other, key := newClient(t, testCluster.Endpoints()...), nameOf(t)
	r := mustRegister(t, client, key, "begin", WithTTL(time.Hour)) // or it is lost on a busy machine
	w := mustWatch[string](t, other, key, WithCodec(Raw))
	resets, stop := resetEvery(t, link, 50*time.Millisecond)
	var want []string
	unknown := map[string]bool{}
	for i := range 200 {
		value := strconv.Itoa(i)
		ctx, cancel := context.WithTimeout(context.Background(), time.Duration(10+2*(i%50))*time.Millisecond)
		err := r.Set(ctx, value)
		cancel()
		switch {
		case err == nil:
			want = append(want, value)
		case errors.Is(err, ErrUnknownOutcome):
			want, unknown[value] = append(want, value), true
		default:
			require.ErrorIs(t, err, context.DeadlineExceeded)
		}
	}
	stop()
	require.NoError(t, r.Set(context.Background(), "end"))
	t.Logf("%d resets, %d of %d unknown", resets.Load(), len(unknown), len(want))
	var got []string
	for {
		e := next(t, w)
		require.Equal(t, EventPut, e.Type)
		if e.Value == "end" {
			break
		}
		got = append(got, e.Value)
	}
	for _, value := range want {
		switch {
		case len(got) > 0 && got[0] == value:
			got = got[1:]
		default:
			require.True(t, unknown[value], "%s was not applied, or out of order: %v", value, got)
		}
	}
	require.Empty(t, got)
}

func TestRegistrationSetOfUnknownOutcomeIsWrittenWhenEtcdIsBack(t *testing.T) {
	t.Parallel()
	client, link := linkedClient(t)
	other, key := newClient(t, testCluster.Endpoints()...), nameOf(t)
	r := mustRegister(t, client, key, "1")
	link.Cut()
	ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
	defer cancel()
	err := r.Set(ctx, "2")
	require.ErrorIs(t, err, ErrUnknownOutcome)
	require.ErrorIs(t, err, context.DeadlineExceeded)
	require.Equal(t, "1", string(keyNow(t, other, key).Value))
	link.Heal()
	requireRegisteredWithin(t, registerBackWithin, other, r, "2")

	// What was not written for sure is not written later.
	err = r.Set(context.Background(), strings.Repeat("x", 2<<20))
	require.Error(t, err)
	require.NotErrorIs(t, err, ErrUnknownOutcome)
	mustDelete(t, other, key)
	requireRegisteredWithin(t, registerBackWithin, other, r, "2")
	cause := errors.New("cause")
	ended, end := context.WithCancelCause(context.Background())
	end(cause)
	require.ErrorIs(t, r.Set(ended, "3"), cause)
	require.Panics(t, func() { _ = r.Set(noContext, "3") })
	requireRegisteredWithin(t, registerBackWithin, other, r, "2")
}

// etcd never takes such a value, whether it is known at once or not.
func TestRegistrationKeepsItsValueAfterASetThatIsTooLarge(t *testing.T) {
	t.Parallel()
	other, large := newClient(t, testCluster.Endpoints()...), strings.Repeat("x", 1600<<10)
	t.Run("outcome unknown at first", func(t *testing.T) {
		t.Parallel()
		client, faults := faultyClient(t)
		r := mustRegister(t, client, nameOf(t), "1", WithRetryPolicy(RetryPolicy{Attempts: 1}))
		faults.inTurn(func(txn) error { return errLost })
		require.ErrorIs(t, r.Set(t.Context(), large), ErrUnknownOutcome)
		mustDelete(t, other, nameOf(t))
		requireRegisteredWithin(t, registerBackWithin, other, r, "1")
	})
	for name, value := range map[string]string{"for etcd": large, "for the client": large + large} {
		t.Run("through a wrapped client, "+name, func(t *testing.T) {
			t.Parallel()
			r := mustRegister(t, namespaced(t, newClient(t, testCluster.Endpoints()...)), "key", "1")
			err := r.Set(t.Context(), value)
			require.Error(t, err)
			// Nothing shows that the request was sent once only, and another member may allow more.
			require.Equal(t, name == "for etcd", errors.Is(err, ErrUnknownOutcome))
			key := nameOf(t) + ":key"
			mustDelete(t, other, key)
			requireWithin(t, registerBackWithin, func() bool {
				kv := keyNow(t, other, key)
				return kv != nil && string(kv.Value) == "1"
			}, "the key is written")
		})
	}
}

// What ends the context of a call says of itself that nothing was written, or that it was replaced.
func TestRegistrationSetOfUnknownOutcomeIsNotDeniedByTheEndOfItsContext(t *testing.T) {
	t.Parallel()
	other := newClient(t, testCluster.Endpoints()...)
	for name, begin := range map[string]func(t *testing.T) (ctx context.Context, end func()){
		"lock is closed": func(t *testing.T) (context.Context, func()) {
			lock := mustAcquire(t, other, nameOf(t)+"-lock")
			return lock, func() { require.NoError(t, lock.Close()) }
		},
		"registration is replaced": func(t *testing.T) (context.Context, func()) {
			r := mustRegister(t, other, nameOf(t)+"-other", "1")
			return r, func() { mustRegister(t, other, nameOf(t)+"-other", "2") }
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			client, link := linkedClient(t)
			r := mustRegister(t, client, nameOf(t), "1", WithTTL(time.Minute))
			ctx, end := begin(t)
			link.DropReplies()
			setting := start(func() (struct{}, error) { return struct{}{}, r.Set(ctx, "2") })
			eventually(t, func() bool { return versionOf(t, other, nameOf(t)) == 2 }, "it is applied")
			end()
			within(t, patience, setting.done, "Set returns")
			require.ErrorIs(t, setting.err, ErrUnknownOutcome)
			require.ErrorIs(t, setting.err, context.Canceled)
			require.NotErrorIs(t, setting.err, ErrClosed)
			require.NotErrorIs(t, setting.err, ErrReplaced)
			link.Heal()
			require.NoError(t, r.Set(context.Background(), "3"))
			require.NoError(t, r.Err(), "nobody has registered its key")
			require.NoError(t, r.Close())
		})
	}
}

func TestRegistrationSetThatWasAppliedIsNotDeniedByATakeover(t *testing.T) {
	t.Parallel()
	client, link := linkedClient(t)
	other, key := newClient(t, testCluster.Endpoints()...), nameOf(t)
	r := mustRegister(t, client, key, "1", WithTTL(time.Minute))
	link.DropReplies()
	setting := start(func() (struct{}, error) { return struct{}{}, r.Set(context.Background(), "2") })
	eventually(t, func() bool { return versionOf(t, other, key) == 2 }, "it is applied")
	mustRegister(t, other, key, "another's")
	link.Heal()
	within(t, patience, setting.done, "Set returns")
	require.ErrorIs(t, setting.err, ErrUnknownOutcome)
	require.NotErrorIs(t, setting.err, ErrReplaced)
	require.ErrorIs(t, context.Cause(r), ErrReplaced)
}

func TestRegistrationSetWorksWhileItsLeaseIsBeingReplaced(t *testing.T) {
	t.Parallel()
	client, key := newClient(t, testCluster.Endpoints()...), nameOf(t)
	r := mustRegister(t, client, key, "1")
	for i := range 20 {
		if i%2 == 0 {
			r.keeper.lease.Load().markLost(ErrLeaseExpired)
		} else {
			mustDelete(t, client, key)
		}
		value := strconv.Itoa(i)
		require.NoError(t, r.Set(context.Background(), value))
		requireRegisteredWithin(t, registerBackWithin, client, r, value)
	}
}

func TestRegistrationCloseIsBoundedWhileEtcdIsGone(t *testing.T) {
	t.Parallel()
	for name, outage := range map[string]time.Duration{"held": 0, "lost": 5 * time.Second} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			client, link := linkedClient(t)
			other, key := newClient(t, testCluster.Endpoints()...), nameOf(t)
			r := mustRegister(t, client, key, "1", WithTTL(2*time.Second))
			link.Cut()
			time.Sleep(outage)
			var err error
			took := testclock.Time(func() { err = r.Close() })
			require.Less(t, took, 3*time.Second)
			require.ErrorIs(t, err, ErrUnknownOutcome)
			require.ErrorContains(t, err, key)
			require.ErrorIs(t, r.Close(), ErrUnknownOutcome)
			eventually(t, func() bool { return keyNow(t, other, key) == nil }, "the key is gone")
			link.Heal()
			time.Sleep(time.Second)
			require.Nil(t, keyNow(t, other, key), "nothing is written again")
		})
	}
}

func TestRegistrationEndsWithItsParentAndWithItsClient(t *testing.T) {
	t.Parallel()
	client, key := newClient(t, testCluster.Endpoints()...), nameOf(t)
	type name struct{}
	cause := errors.New("cause")
	ctx, cancel := context.WithCancelCause(context.WithValue(context.Background(), name{}, 1))
	r, err := Register(ctx, client, key, "1")
	require.NoError(t, err)
	require.Equal(t, 1, r.Value(name{}))
	cancel(cause)
	within(t, patience, r.Done(), "the registration ends")
	require.Equal(t, cause, context.Cause(r))
	require.ErrorIs(t, r.Set(context.Background(), "2"), cause)
	require.NotNil(t, keyNow(t, client, key), "nothing is released yet")
	require.NoError(t, r.Close(), "a parent's end is no loss")
	require.Nil(t, keyNow(t, client, key))

	short := newClient(t, testCluster.Endpoints()...)
	other := mustRegister(t, short, key, "1", WithTTL(2*time.Second))
	require.NoError(t, short.Close())
	within(t, patience, other.Done(), "the registration ends")
	require.ErrorContains(t, context.Cause(other), "client")
	require.Error(t, other.Close())
}

// What ended a parent that is a registration itself is not said of its child.
func TestRegistrationIsNotReplacedWithItsParent(t *testing.T) {
	t.Parallel()
	client := newClient(t, testCluster.Endpoints()...)
	for name, end := range map[string]func(t *testing.T, client *clientv3.Client, key string){
		"replaced":             func(t *testing.T, _ *clientv3.Client, key string) { mustRegister(t, client, key, "2") },
		"its client is closed": func(t *testing.T, client *clientv3.Client, _ string) { require.NoError(t, client.Close()) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			parents := newClient(t, testCluster.Endpoints()...)
			parent := mustRegister(t, parents, nameOf(t)+"-parent", "1", WithTTL(2*time.Second))
			r, err := Register(parent, client, nameOf(t), "1")
			require.NoError(t, err)
			end(t, parents, parent.Key())
			within(t, patience, r.Done(), "it ends with its parent")
			r.keeper.running.Wait()
			require.NoError(t, context.Cause(r.stopCtx), "its own key is nobody else's")
			require.NotNil(t, keyNow(t, client, r.Key()), "nothing is released yet")
			require.NoError(t, r.Close(), "a parent's end is no loss")
			require.Nil(t, keyNow(t, client, r.Key()))
		})
	}
}

func TestRegisterOutlivesAPermissionThatIsTakenAwayAndGivenBack(t *testing.T) {
	t.Parallel()
	cluster, root := authCluster(t, 300)
	link := etcdtest.StartLink(t, cluster.Endpoints()[0])
	client, ctx := userClient(t, "user", nil, link.Endpoint()), context.Background()
	r := mustRegister(t, client, "allowed/a", "1", WithTTL(2*time.Second))
	_, err := root.RoleRevokePermission(ctx, "user", "allowed/", "allowed0")
	require.NoError(t, err)
	link.Reset()
	_, err = root.Delete(ctx, "allowed/a") // unless its lease has run out
	require.NoError(t, err)
	time.Sleep(6 * time.Second)
	require.NoError(t, r.Err())
	require.ErrorIs(t, r.Set(ctx, "2"), rpctypes.ErrPermissionDenied)
	_, err = root.RoleGrantPermission(ctx, "user", "allowed/", "allowed0", clientv3.PermissionType(clientv3.PermReadWrite))
	require.NoError(t, err)
	requireRegisteredWithin(t, 2*time.Second, root, r, "1")
	mustDelete(t, root, "allowed/a")
	requireRegisteredWithin(t, 2*time.Second, root, r, "1")
}

func TestRegisterFailsAndLeavesNothing(t *testing.T) {
	t.Parallel()
	cluster, root := authCluster(t, 300)
	client := userClient(t, "user", nil, cluster.Endpoints()...)
	_, err := Register(context.Background(), client, "forbidden", "1")
	require.ErrorIs(t, err, rpctypes.ErrPermissionDenied)
	require.ErrorContains(t, err, `"forbidden"`)
	require.Equal(t, 1, strings.Count(err.Error(), "etcdutil: "))
	eventually(t, func() bool { return len(leases(t, root)) == 0 }, "no lease is left")

	cut, link := linkedClient(t)
	link.Cut()
	took := testclock.Time(func() {
		_, err = Register(context.Background(), cut, nameOf(t), "1", WithRetryPolicy(RetryPolicy{Elapsed: time.Second}))
	})
	require.Error(t, err)
	require.Less(t, took, 3*time.Second)
	cause := errors.New("cause")
	ctx, cancel := context.WithTimeoutCause(context.Background(), 50*time.Millisecond, cause)
	defer cancel()
	_, err = Register(ctx, cut, nameOf(t), "1")
	require.ErrorIs(t, err, cause)
	require.ErrorIs(t, err, context.DeadlineExceeded)
}

// Nothing shows what clientv3 sends there.
func TestRegisterThroughAWrappedClientReturnsARefusal(t *testing.T) {
	t.Parallel()
	cluster, root := authCluster(t, 300)
	client := namespaced(t, userClient(t, "user", nil, cluster.Endpoints()...))
	_, err := Register(context.Background(), client, "key", "1")
	require.ErrorIs(t, err, rpctypes.ErrPermissionDenied)
	require.NotErrorIs(t, err, ErrUnknownOutcome)
	eventually(t, func() bool { return len(leases(t, root)) == 0 }, "no lease is left")

	lossy, faults := faultyClient(t)
	faults.inTurn(
		func(txn) error { return errLost },
		func(txn) error { return rpctypes.ErrGRPCPermissionDenied },
	)
	_, err = Register(context.Background(), namespaced(t, lossy), "key", "1")
	require.ErrorIs(t, err, ErrUnknownOutcome, "the first answer was lost")
	require.NotErrorIs(t, err, rpctypes.ErrPermissionDenied)
}

func TestRegisterRefusesBadArguments(t *testing.T) {
	t.Parallel()
	client, ctx := newClient(t, testCluster.Endpoints()...), context.Background()
	for name, opts := range map[string][]RegisterOption{
		"WithTTL":               {WithTTL(0)},
		"WithKeepAliveInterval": {WithKeepAliveInterval(time.Hour)},
		"WithExpiryMargin":      {WithExpiryMargin(-1)},
		"WithCodec":             {WithCodec(nil)},
		"RetryPolicy.Attempts":  {WithRetryPolicy(RetryPolicy{Attempts: -1})},
	} {
		_, err := Register(ctx, client, nameOf(t), "1", opts...)
		require.ErrorContains(t, err, name)
	}
	_, err := Register(ctx, client, "", "1")
	require.ErrorContains(t, err, "key")
	_, err = Register(ctx, client, nameOf(t), func() {})
	require.ErrorContains(t, err, "encoded")
	_, err = Register(ctx, client, nameOf(t), "1", WithCodec(panickingCodec{}))
	require.ErrorContains(t, err, "panicked")
	require.Panics(t, func() { _, _ = Register(noContext, client, "a", "1") })
	require.Panics(t, func() { _, _ = Register(ctx, nil, "a", "1") })
}

func TestRegistrationNeedsFewGoroutinesAndLeavesNone(t *testing.T) {
	client, key := newClient(t, testCluster.Endpoints()...), nameOf(t)
	first := mustRegister(t, client, key, "1", WithKeepAliveInterval(50*time.Millisecond))
	lease := first.keeper.lease.Load()
	granted := lease.Expiry()
	eventually(t, func() bool { return lease.Expiry().After(granted) }, "the client's streams are open")
	before := runtime.NumGoroutine()
	var registrations []*Registration[string]
	for i := range 20 {
		registrations = append(registrations, mustRegister(t, client, key+strconv.Itoa(i), "1"))
	}
	eventually(t, func() bool { return runtime.NumGoroutine() < before+len(registrations)+5 }, "one goroutine a registration, beside those of the condition")
	for _, r := range append(registrations, first) {
		require.NoError(t, r.Close())
	}
	eventually(t, func() bool { return runtime.NumGoroutine() < before+5 }, fmt.Sprint("no more goroutines than ", before))
}
