package etcdtest

import (
	"errors"
	"os"
	"path/filepath"
)

// backupName is the directory of the backup, among those of the members.
const backupName = "backup"

// Backup keeps a copy of all members' data for [Cluster.Restore], in place of an earlier one. The
// members that run are stopped for it, as by [Cluster.Stop], so that clients lose their
// connections, and started again on the same ports; it returns when they serve, like
// [Cluster.Restart]. Stopped members stay so, and isolated ones too. It is an error that the
// cluster is closed, the data could not be copied, or that etcd does not start: members may then be
// left stopped. A copy that fails leaves no backup, not even the earlier one. The copy takes some
// 64 MB of disk for each member, since etcd allocates its log in advance.
func (c *Cluster) Backup() error {
	return c.takeTurn(func() error {
		leader := c.Leader()
		return c.whileStopped(leader, func() error {
			c.backup = nil
			if err := c.copyToBackup(); err != nil {
				return err
			}
			c.backup = &backup{leader: leader}
			return nil
		})
	})
}

// Restore makes the cluster what it was at the last [Cluster.Backup], on the same endpoints, as
// operators do after a disaster: what was written since is gone, and the revision has gone
// backwards, behind what clients may have seen. It stops and starts the members as Backup does;
// members that are stopped get their old data too. It may be repeated. It is an error that there is
// no backup, the cluster is closed, the data could not be copied, or that etcd does not start:
// members may then be left stopped, and if the copy failed, without their data until another
// Restore succeeds.
func (c *Cluster) Restore() error {
	return c.takeTurn(func() error {
		if c.backup == nil {
			return errors.New("there is no backup to restore")
		}
		return c.whileStopped(c.backup.leader, c.copyFromBackup)
	})
}

// backup is what there is to know of one beside its files.
type backup struct {
	leader int // its log is as new as any; -1 if there was none
}

func (c *Cluster) copyToBackup() error {
	if err := os.RemoveAll(filepath.Join(c.dir, backupName)); err != nil {
		return err
	}
	for _, n := range c.nodes {
		if err := os.CopyFS(c.backupOf(n), os.DirFS(n.dir)); err != nil {
			return err
		}
	}
	return nil
}

func (c *Cluster) copyFromBackup() error {
	for _, n := range c.nodes {
		if err := os.RemoveAll(n.dir); err != nil {
			return err
		}
		if err := os.CopyFS(n.dir, os.DirFS(c.backupOf(n))); err != nil {
			return err
		}
	}
	return nil
}

func (c *Cluster) backupOf(n *node) string {
	return filepath.Join(c.dir, backupName, n.name)
}

// whileStopped stops what runs, calls f and, unless that fails, starts again what ran. The leader
// is the index of the member with the newest log, or -1: it leads then as soon as it runs.
func (c *Cluster) whileStopped(leader int, f func() error) error {
	var ran []*node
	for _, n := range c.nodes {
		if n.running() {
			ran = append(ran, n)
		}
	}
	c.stopAll()
	if err := f(); err != nil {
		return err
	}
	for _, n := range ran {
		if err := n.restart(); err != nil {
			return err
		}
	}
	if c.connected() < c.quorum() {
		return nil
	}
	if leader >= 0 && c.nodes[leader].connected() {
		c.elect(c.nodes[leader])
	}
	return c.waitServing()
}
