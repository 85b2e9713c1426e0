package main

// The quick starts of the README for what is built on locks and watches, as they stand there.

import (
	"context"
	"errors"
	"log"
	"time"

	"example.com/etcdutil"
	clientv3 "go.etcd.io/etcd/client/v3"
)

func serve(ctx context.Context, client *clientv3.Client) error {
	return etcdutil.Lead(ctx, client, "api/leader", func(ctx context.Context) error {
		log.Print("this process leads")
		<-ctx.Done() // your work, until this process no longer surely leads
		return ctx.Err()
	}, etcdutil.WithValue("10.0.0.7:8080"))
}

func find(ctx context.Context, client *clientv3.Client) (address string, err error) {
	leader, err := etcdutil.Holder(ctx, client, "api/leader")
	if errors.Is(err, etcdutil.ErrNoHolder) {
		return "", nil // nobody leads now
	}
	return leader.Value, err
}

func limit(ctx context.Context, client *clientv3.Client) error {
	settings, err := etcdutil.NewMirror[Setting](ctx, client, "settings/", etcdutil.WithPrefix())
	if err != nil {
		return err
	}
	defer settings.Close()

	search, ok := settings.Get("settings/search") // from memory
	log.Printf("%d settings; search: %v, %t", settings.Len(), search, ok)

	resp, err := client.Put(ctx, "settings/search", `{"Limit": 10}`)
	if err != nil {
		return err
	}
	if err := settings.Wait(ctx, resp.Header.Revision); err != nil { // read your own write
		return err
	}
	search, _ = settings.Get("settings/search")
	log.Printf("search: %v", search)
	return nil
}

func announce(ctx context.Context, client *clientv3.Client) error {
	r, err := etcdutil.Register(ctx, client, "services/api/host-1", "10.0.0.7:8080")
	if err != nil {
		return err
	}
	defer r.Close()         // removes the key
	<-r.Done()              // serve here: the key is written again after every loss
	return context.Cause(r) // ErrReplaced if another process has taken the key over
}

// ready is the probe of docs/behavior.md.
func ready(lease *etcdutil.Lease, settings *etcdutil.Mirror[Setting]) bool {
	return lease.Err() == nil && time.Until(lease.Expiry()) > lease.TTL()/3 &&
		time.Since(settings.AsOf()) < 3*time.Second
}
