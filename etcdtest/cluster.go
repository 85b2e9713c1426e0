// Package etcdtest runs real etcd in the process of a test, and breaks it.
//
// # Clusters
//
// [Start] runs a cluster of members on free loopback ports, and stops it when the test ends:
//
//	func TestMine(t *testing.T) {
//		cluster := etcdtest.Start(t, 3)
//		client := cluster.Client(t)
//		…
//		cluster.Isolate(cluster.Leader())
//	}
//
// [New] does the same without a test, and [NewWith] with settings of etcd's own. [NewSecure]
// makes clusters with TLS and users. A cluster can fail:
//   - [Cluster.Stop] crashes a member, and [Cluster.Restart] starts it again.
//   - [Cluster.Isolate] cuts a member from its peers, but not from clients. [Cluster.Rejoin]
//     undoes it.
//   - [Cluster.Backup] and [Cluster.Restore] take all members back in time.
//
// Members use etcd's default times: a tick of 100 ms and an election timeout of 1 s, so that a
// lease lives for at least 2 s. They do not sync to disk and write no logs. A cluster starts in
// about 20 ms.
//
// # Other versions of etcd
//
// If the environment variable ETCDTEST_SERVER names a program of etcd, each member that starts is a
// process of that program, instead of etcd v3.7 in this process. All else is the same, but:
//   - New and Restart take a second or two, since members elect a leader in their own time.
//   - A setting of [NewWith] is passed on as a flag, if etcd has one for it. A program
//     without that flag ends at once, and New returns an error.
//   - Isolate works on Linux only.
//   - Leader, Restart and Restore need a cluster of [NewSecure] where authentication is on.
//
// # Links
//
// [StartLink] puts a TCP proxy in front of one endpoint. It is the network between etcd and the
// client under test, and can fail:
//
//	link := etcdtest.StartLink(t, cluster.Endpoints()[0])
//	client, err := clientv3.New(clientv3.Config{Endpoints: []string{link.Endpoint()}})
//	…
//	link.DropReplies() // etcd carries out the request, but the client gets no answer
//	link.Heal()
//
// A client to several members needs a link for each. Do not call Sync or set AutoSyncInterval on
// it: the client would learn the members' own endpoints, and bypass the links. [StartProxy] puts
// etcd's own gRPC proxy in front of a cluster.
//
// # What it cannot do
//
// Everything shares one process, one clock and the machine's cores. A pause of the process stops
// client and server alike, and their clocks do not drift apart.
package etcdtest

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/types"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
)

const (
	// startAttempts is how often New starts over because another process has taken a port.
	startAttempts = 5
	// readyTimeout bounds how long New and Restart wait until the members serve.
	readyTimeout = 30 * time.Second
	// electTimeout bounds how long a first leader is hurried: others do not stand for election
	// before.
	electTimeout = 200 * time.Millisecond
	// pollInterval is how often all these look.
	pollInterval = 5 * time.Millisecond
)

// Cluster is a number of etcd members in this process. [Start] or [New] makes it; Close ends it.
// The zero Cluster is not usable. Members are numbered from 0, in the order of [Cluster.Endpoints].
//
// All methods are safe for concurrent use. Stop, Restart, Isolate, Rejoin, Backup, Restore and
// Close take turns. The others do not wait for them.
type Cluster struct {
	dir       string
	nodes     []*node
	users     []User     // with passwords; empty without authentication
	authority *authority // nil without TLS
	dialers   *dialers   // the members that are processes

	turn   sync.Mutex // held by the methods that change members
	closed bool       // guarded by turn
	backup *backup    // guarded by turn; nil if there is none
}

// New runs a cluster of in-process members on free loopback ports, without fsync, in a temporary
// directory. It returns when each member serves clients and one leads. Close the cluster at the
// end.
//
// Errors:
//   - An error that names the argument if members is not positive.
//   - Why etcd did not start, or did not serve within 30 s. Then nothing is left running.
func New(members int) (*Cluster, error) {
	return NewWith(members, nil)
}

// NewWith is [New] with settings of etcd's own. configure gets a member's configuration before each
// start of the member, also before those of Restart, Backup and Restore. It may be nil. The
// configuration is a new one each time: etcd's default, without fsync and logs. configure is called
// for one member of the cluster at a time.
//
// NewWith sets afterwards what makes the member one of this cluster: the name, the directories, the
// initial cluster, the addresses, and ServiceRegister. The addresses are without TLS: use
// [NewSecure] for that. configure must not ask for another initial state of the cluster. If it
// changes ticks or elections, the times in this package's documentation change as well.
//
// The errors are those of New.
func NewWith(members int, configure func(*embed.Config)) (*Cluster, error) {
	return newCluster(members, Security{Configure: configure})
}

// Start is [New] for a test: it fails tb if New returns an error, and closes the cluster when tb
// ends. A nil tb panics.
func Start(tb testing.TB, members int) *Cluster {
	tb.Helper()
	c, err := New(members)
	return c.closedAfter(tb, err)
}

// closedAfter returns c, to be closed when tb ends, or fails tb if err is not nil.
func (c *Cluster) closedAfter(tb testing.TB, err error) *Cluster {
	tb.Helper()
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := c.Close(); err != nil {
			tb.Error(err)
		}
	})
	return c
}

func newCluster(members int, security Security) (*Cluster, error) {
	if members < 1 {
		return nil, fmt.Errorf("etcdtest: members is %d, not 1 or more", members)
	}
	for attempt := 1; ; attempt++ {
		c, err := start(members, security)
		if err == nil {
			return c, nil
		}
		if attempt == startAttempts || !errors.Is(err, syscall.EADDRINUSE) {
			return nil, fmt.Errorf("etcdtest: %w", err)
		}
	}
}

// start makes one attempt at a cluster, and leaves nothing behind when that fails.
func start(members int, security Security) (*Cluster, error) {
	dir, err := os.MkdirTemp("", "etcdtest-")
	if err != nil {
		return nil, err
	}
	c := &Cluster{dir: dir, dialers: newDialers()}
	if err := c.startNodes(members, security); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return c, nil
}

func (c *Cluster) startNodes(members int, security Security) error {
	if err := c.prepare(security); err != nil {
		return err
	}
	nodes, err := newNodes(members, c, c.configure(security))
	c.nodes = nodes // for Close
	if err != nil {
		return err
	}
	for _, n := range nodes {
		if err := n.start(); err != nil {
			return err
		}
	}
	c.elect(nodes[0])
	if err := c.waitServing(); err != nil {
		return err
	}
	return c.addUsers()
}

// Endpoints returns the members' client endpoints, each "127.0.0.1:port". They do not change.
func (c *Cluster) Endpoints() []string {
	endpoints := make([]string, len(c.nodes))
	for i, n := range c.nodes {
		endpoints[i] = n.clientAddress
	}
	return endpoints
}

// Client returns a new client to all members, which is closed when tb ends. If the cluster has
// users, it is root's. It logs nothing, and its DialTimeout is 5 s. Client fails tb if clientv3
// cannot make the client. A nil tb panics.
func (c *Cluster) Client(tb testing.TB) *clientv3.Client {
	tb.Helper()
	config, err := c.ClientConfig(root)
	if err != nil {
		tb.Fatal(err)
	}
	client, err := clientv3.New(config)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = client.Close() })
	return client
}

// Leader returns the index of the member that leads, or -1 if none does. A leader is followed by a
// majority of all members, itself among them. Stopped and isolated members neither lead nor follow.
func (c *Cluster) Leader() int {
	followers := make(map[types.ID]int)
	self := make(map[types.ID]int)
	for i, n := range c.nodes {
		leader, leads := n.leader()
		followers[leader]++
		if leads {
			self[leader] = i
		}
	}
	for leader, i := range self {
		if followers[leader] >= c.quorum() {
			return i
		}
	}
	return -1
}

// elect makes n the leader now. Left alone, members wait for a random time of up to two election
// timeouts. Others must neither have a newer log nor stand themselves: a new cluster, or the only
// member. It may fail, when etcd is slow to start; then they elect one later.
func (c *Cluster) elect(n *node) {
	deadline := time.Now().Add(electTimeout)
	n.awaitApplied(deadline)
	for c.Leader() < 0 && time.Now().Before(deadline) {
		n.campaign()
		time.Sleep(pollInterval)
	}
}

// waitServing waits until the members that are connected serve clients, and one leads.
func (c *Cluster) waitServing() error {
	for deadline := time.Now().Add(readyTimeout); !c.serving(); time.Sleep(pollInterval) {
		if time.Now().After(deadline) {
			return fmt.Errorf("the cluster does not serve after %v", readyTimeout)
		}
		for _, n := range c.nodes {
			if err := n.failure(); err != nil {
				return err
			}
		}
	}
	return nil
}

func (c *Cluster) serving() bool {
	for _, n := range c.nodes {
		if n.connected() && !n.serving() {
			return false
		}
	}
	return c.Leader() >= 0
}

// connected counts the members that run and are not isolated.
func (c *Cluster) connected() int {
	count := 0
	for _, n := range c.nodes {
		if n.connected() {
			count++
		}
	}
	return count
}

// quorum is how many members decide.
func (c *Cluster) quorum() int {
	return len(c.nodes)/2 + 1
}

// Stop stops a member as a crash does. Clients and peers lose their connections at once, and new
// ones are refused. A leader does not hand over. [Cluster.Restart] finds what the member had
// acknowledged. Stopping a stopped member does nothing.
//
// Errors:
//   - An error that names the argument if no member has this index.
//   - An error if the cluster is closed.
func (c *Cluster) Stop(member int) error {
	return c.change(member, func(n *node) error {
		n.stop()
		return nil
	})
}

// Restart starts a stopped member on the same ports and data. It returns when the member serves
// clients. If the member is isolated, or the cluster has no quorum even with it, Restart returns
// when the member listens. Restarting a running member does nothing.
//
// Errors:
//   - An error that names the argument if no member has this index.
//   - An error if the cluster is closed.
//   - Why etcd did not start, or did not serve within 30 s.
func (c *Cluster) Restart(member int) error {
	return c.change(member, func(n *node) error {
		if n.running() {
			return nil
		}
		if err := n.restart(); err != nil {
			return err
		}
		if len(c.nodes) == 1 {
			c.elect(n)
		}
		if !n.connected() || c.connected() < c.quorum() {
			return nil
		}
		return c.waitServing()
	})
}

// Isolate cuts a member from its peers at once, and leaves its client port open. An isolated leader
// stops leading within two election timeouts (2 s). The other members elect one of theirs if they
// are a majority. Isolation lasts until [Cluster.Rejoin], through Stop and Restart. Isolating an
// isolated member, or the only member, does nothing.
//
// Errors:
//   - An error that names the argument if no member has this index.
//   - An error if the cluster is closed.
//   - An error if the member is a process (ETCDTEST_SERVER) and the system is not Linux.
func (c *Cluster) Isolate(member int) error {
	return c.change(member, func(n *node) error {
		if len(c.nodes) == 1 {
			return nil
		}
		return n.isolate()
	})
}

// Rejoin undoes [Cluster.Isolate]. It does not wait for the member to catch up. Rejoining a member
// that is not isolated does nothing.
//
// Errors:
//   - An error that names the argument if no member has this index.
//   - An error if the cluster is closed.
func (c *Cluster) Rejoin(member int) error {
	return c.change(member, func(n *node) error {
		n.rejoin()
		return nil
	})
}

// Close stops all members and removes their data. It returns an error if the data could not be
// removed. Closing again does nothing.
func (c *Cluster) Close() error {
	c.turn.Lock()
	defer c.turn.Unlock()
	c.closed = true
	c.stopAll()
	for _, n := range c.nodes {
		n.ports.release()
	}
	if err := os.RemoveAll(c.dir); err != nil {
		return fmt.Errorf("etcdtest: %w", err)
	}
	return nil
}

// stopAll stops the members all at once, for each takes its time.
func (c *Cluster) stopAll() {
	var stopping sync.WaitGroup
	for _, n := range c.nodes {
		stopping.Go(n.stop)
	}
	stopping.Wait()
}

// change has f change a member, when it is the caller's turn.
func (c *Cluster) change(member int, f func(*node) error) error {
	if member < 0 || member >= len(c.nodes) {
		return fmt.Errorf("etcdtest: member is %d, not in 0-%d", member, len(c.nodes)-1)
	}
	return c.takeTurn(func() error {
		if err := f(c.nodes[member]); err != nil {
			return fmt.Errorf("member %d: %w", member, err)
		}
		return nil
	})
}

// takeTurn calls f when it is the caller's turn to change members.
func (c *Cluster) takeTurn(f func() error) error {
	c.turn.Lock()
	defer c.turn.Unlock()
	if c.closed {
		return errors.New("etcdtest: the cluster is closed")
	}
	if err := f(); err != nil {
		return fmt.Errorf("etcdtest: %w", err)
	}
	return nil
}
