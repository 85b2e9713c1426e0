package main

import (
	"context"
	"errors"
	"strings"
	"sync"

	"example.com/etcdutil"
	"example.com/etcdutil/etcdtest"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// Setting is what a key under the prefix has, in JSON.
type Setting struct {
	On    bool `json:"on"`
	Limit int  `json:"limit"`
}

// follower keeps the settings.
type follower struct {
	*timeline
	link     *etcdtest.Link
	etcd     *clientv3.Client
	watcher  *etcdutil.Watcher[Setting]
	progress *etcdutil.Notify[etcdutil.Revision] // up to which all is in the fields below

	following sync.WaitGroup // guards the fields below
	settings  map[string]Setting
	bad       map[string]etcdutil.Revision // the keys whose value in etcd does not decode, since when
	invalid   int                          // bad values seen
	syncs     int                          // the snapshot's, and one for each resync
}

// follow starts a follower behind a link of its own.
func follow(ctx context.Context, endpoint string, t *timeline) (f *follower, err error) {
	f = &follower{
		timeline: t,
		progress: etcdutil.NewNotify[etcdutil.Revision](ctx),
		settings: map[string]Setting{},
		bad:      map[string]etcdutil.Revision{},
	}
	if f.link, err = etcdtest.NewLink(endpoint); err != nil {
		return nil, err
	}
	if f.etcd, err = newClient(f.link.Endpoint()); err != nil {
		return nil, errors.Join(err, f.link.Close())
	}
	f.watcher, err = etcdutil.Watch[Setting](ctx, f.etcd, t.prefix, etcdutil.WithPrefix(), etcdutil.WithSnapshot())
	if err != nil {
		return nil, errors.Join(err, f.etcd.Close(), f.link.Close())
	}
	f.following.Go(f.run) // until the watcher ends
	return f, nil
}

func (f *follower) run() {
	defer f.progress.Close()
	for e := range f.watcher.Events() {
		f.apply(e)
		_ = f.progress.Send(f.watcher.Revision())
	}
}

func (f *follower) apply(e etcdutil.Event[Setting]) {
	key := strings.TrimPrefix(e.Key, f.prefix)
	switch e.Type {
	case etcdutil.EventPut:
		f.settings[key] = e.Value
		delete(f.bad, key)
		f.say("follower", "%s is %+v, version %d, revision %d", key, e.Value, e.Version, e.Revision)
	case etcdutil.EventInvalid:
		f.bad[key] = e.Revision
		f.invalid++
		f.say("follower", "%s is bad, revision %d: %v", key, e.Revision, e.Err)
		if good, ok := f.settings[key]; ok {
			f.say("follower", "%s stays %+v", key, good)
		}
	case etcdutil.EventDelete:
		delete(f.settings, key)
		delete(f.bad, key)
		f.say("follower", "%s is deleted, revision %d", key, e.Revision)
	case etcdutil.EventSynced:
		f.syncs++
		f.say("follower", "is synced for time %d, revision %d", f.syncs, e.Revision)
	}
}

// await returns when the follower knows everything up to a revision.
func (f *follower) await(ctx context.Context, rev etcdutil.Revision) error {
	for progress := f.progress.Receiver(); ; {
		at, err := progress.Recv(ctx)
		switch {
		case errors.Is(err, etcdutil.ErrClosed):
			return context.Cause(f.watcher)
		case err != nil || at >= rev:
			return err
		}
	}
}

// close returns why the watcher ended, if it did so by itself.
func (f *follower) close() error {
	err := f.watcher.Close()
	f.following.Wait()
	_ = f.etcd.Close()
	_ = f.link.Close()
	return err
}
