package etcdtest

import (
	"errors"
	"os"
	"path/filepath"
)

// backupName is the directory of the backup, among those of the members.
const backupName = "backup"

// Backup copies the data of all members for [Cluster.Restore], in place of an earlier backup. It
// stops the running members meanwhile, as [Cluster.Stop] does, so clients lose their connections.
// It starts them again on the same ports, and returns when they serve, like [Cluster.Restart].
// Stopped and isolated members stay so. The copy takes about 64 MB of disk for each member, because
// etcd allocates its log in advance.
//
// Errors:
//   - An error if the cluster is closed.
//   - Why the data could not be copied. Then there is no backup, not even the earlier one.
//   - Why etcd did not start. Members may be left stopped.
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

// Restore returns the cluster to its last [Cluster.Backup], on the same endpoints, as operators do
// after a disaster. What was written since is gone. The revision is smaller than clients may have
// seen. Restore stops and starts the members as Backup does. Stopped members get their old data
// too. It may be called again.
//
// Errors:
//   - An error if there is no backup, or if the cluster is closed.
//   - Why the data could not be copied. Members may have no data until another Restore succeeds.
//   - Why etcd did not start. Members may be left stopped.
func (c *Cluster) Restore() error {
	return c.takeTurn(func() error {
		if c.backup == nil {
			return errors.New("there is no backup to restore")
		}
		return c.whileStopped(c.backup.leader, c.copyFromBackup)
	})
}

// backup describes a backup, whose files are in the cluster's directory.
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
