package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"time"

	"example.com/etcdutil"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// operator changes the settings, with a network that never fails.
type operator struct {
	*timeline
	etcd *clientv3.Client
	last etcdutil.Revision  // that it has written
	good map[string]Setting // the last good value of each key
}

// newOperator writes the first settings, under keys that no other run uses.
func newOperator(ctx context.Context, endpoint string, stdout io.Writer) (*operator, error) {
	etcd, err := newClient(endpoint)
	if err != nil {
		return nil, err
	}
	t := &timeline{prefix: fmt.Sprintf("config-%08x/", rand.Uint32()), start: time.Now(), stdout: stdout}
	o := &operator{timeline: t, etcd: etcd, good: map[string]Setting{}}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	err = o.change(ctx,
		change{"search", `{"on":true,"limit":10}`},
		change{"upload", `{"on":true,"limit":5}`},
		change{"login", `{"on":true,"limit":3}`},
		change{"mail", `{"on":false,"limit":0}`},
	)
	if err != nil {
		_ = etcd.Close()
		return nil, fmt.Errorf("etcd at %s: %w", endpoint, err)
	}
	return o, nil
}

// change is a key's new value, or "" to delete it.
type change struct{ key, value string }

func (o *operator) change(ctx context.Context, changes ...change) error {
	for _, c := range changes {
		op := clientv3.OpPut(o.prefix+c.key, c.value)
		if c.value == "" {
			op = clientv3.OpDelete(o.prefix + c.key)
		}
		resp, err := o.etcd.Txn(ctx).Then(op).Commit()
		if err != nil {
			return err
		}
		o.last = resp.Header.Revision
		o.note(c)
	}
	return nil
}

func (o *operator) note(c change) {
	if c.value == "" {
		delete(o.good, c.key)
		o.say("operator", "deletes %s, revision %d", c.key, o.last)
		return
	}
	if s, err := decode([]byte(c.value)); err == nil {
		o.good[c.key] = s
	}
	o.say("operator", "sets %s to %s, revision %d", c.key, c.value, o.last)
}

// want is what the follower should have: the settings in etcd, and the last good value of those that are bad there, which
// etcd does not have. That the follower has seen it is play's business: an outage would hide one that was broken in it.
func (o *operator) want(ctx context.Context) (settings map[string]Setting, bad map[string]etcdutil.Revision, err error) {
	resp, err := o.etcd.Get(ctx, o.prefix, clientv3.WithPrefix())
	if err != nil {
		return nil, nil, err
	}
	settings, bad = map[string]Setting{}, map[string]etcdutil.Revision{}
	for _, kv := range resp.Kvs {
		key := strings.TrimPrefix(string(kv.Key), o.prefix)
		if s, err := decode(kv.Value); err == nil {
			settings[key] = s
			continue
		}
		bad[key] = kv.ModRevision
		if s, ok := o.good[key]; ok {
			settings[key] = s
		}
	}
	return settings, bad, nil
}

func decode(value []byte) (s Setting, err error) {
	err = json.Unmarshal(value, &s)
	return s, err
}

// close removes what was written.
func (o *operator) close() {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if _, err := o.etcd.Delete(ctx, o.prefix, clientv3.WithPrefix()); err != nil {
		o.say("operator", "%s is not removed: %v", o.prefix, err)
	}
	_ = o.etcd.Close()
}
