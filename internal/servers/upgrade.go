package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"example.com/etcdutil/etcdtest"
	"go.etcd.io/etcd/server/v3/embed"
)

// dwell is for how long the load runs between two changes of the cluster.
const dwell = 2 * time.Second

// upgrade runs a load against three members while each is replaced by one of the next version,
// version after version, as etcd's documentation says to.
func upgrade(ctx context.Context, programs []string) error {
	const members = 3
	if err := os.Setenv(serverVariable, programs[0]); err != nil {
		return err
	}
	// etcd 3.7 does not start on entries that 3.5 wrote, as a member's log has until 3.6 takes a
	// snapshot: after 10,000 entries by default.
	cluster, err := etcdtest.NewWith(members, func(config *embed.Config) { config.SnapshotCount = 100 })
	if err != nil {
		return err
	}
	defer func() { _ = cluster.Close() }()
	return underLoad(ctx, cluster.Endpoints(), func(ctx context.Context) error {
		for _, program := range programs[1:] {
			if err := os.Setenv(serverVariable, program); err != nil {
				return err
			}
			for member := range members {
				wait(ctx, dwell)
				if err := errors.Join(cluster.Stop(member), cluster.Restart(member)); err != nil {
					return fmt.Errorf("upgrade member %d to %s: %w", member, program, err)
				}
			}
		}
		wait(ctx, dwell)
		return nil
	})
}

// wait waits for d, or until ctx ends.
func wait(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}
