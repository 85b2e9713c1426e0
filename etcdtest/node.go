package etcdtest

import (
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/transport"
	"go.etcd.io/etcd/client/pkg/v3/types"
	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/raft/v3"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

const (
	// portTimeout bounds how long a restart waits for its ports.
	portTimeout = 5 * time.Second
	// serverVariable is the environment variable that names the program of etcd to run, as in the
	// package's documentation.
	serverVariable = "ETCDTEST_SERVER"
	// none is the leader of a member that follows nobody.
	none = types.ID(raft.None)
)

// node is one member of a cluster.
type node struct {
	name          string
	dir           string
	cluster       *Cluster
	configure     func(*embed.Config)
	ports         *reservation
	clientAddress string
	peerAddress   string // where etcd listens to its peers
	linkAddress   string // where its peers find it; the same as peerAddress if there are none

	mu     sync.Mutex // held for as long as etcd takes to answer
	member member     // nil while stopped
	// link is how the peers reach the member. It is nil while stopped, or if there are no peers.
	link     *Link
	isolated bool
}

// member is one run of a node's etcd, from start to stop.
type member interface {
	// failure returns why etcd ended by itself, and nil if it runs.
	failure() error
	// serving returns whether etcd answers clients.
	serving() bool
	// leader returns whom it follows, itself if it leads; none if nobody.
	leader() (leader types.ID, leads bool)
	// campaign has it stand for election at once, if it can be made to.
	campaign()
	// applied returns the last entry that was applied, and whether no other is known to be
	// committed.
	applied() (index uint64, all bool)
	// cut takes it off the network of its peers, whom the link does not let through any more.
	cut() error
	// mend undoes cut.
	mend()
	// stop ends it at once.
	stop()
}

// newNodes returns the nodes of a new cluster, to be started, with their data in its directory. The
// caller releases the ports of those that it returns, also with an error.
func newNodes(count int, c *Cluster, configure func(*embed.Config)) ([]*node, error) {
	var nodes []*node
	for i := range count {
		ports, err := reserve()
		if err != nil {
			return nodes, err
		}
		n := &node{
			name:          fmt.Sprintf("member%d", i),
			configure:     configure,
			cluster:       c,
			ports:         ports,
			clientAddress: ports.addresses[0],
			peerAddress:   ports.addresses[1],
			linkAddress:   ports.addresses[2],
		}
		if count == 1 {
			n.linkAddress = n.peerAddress
		}
		n.dir = filepath.Join(c.dir, n.name)
		nodes = append(nodes, n)
	}
	return nodes, nil
}

// start starts etcd and the link in front of it. It does not wait until etcd serves.
func (n *node) start() error {
	link, err := n.startPeerLink()
	if err != nil {
		return err
	}
	m, err := n.startMember()
	if err == nil {
		err = n.keep(m, link)
	}
	if err != nil && link != nil {
		_ = link.Close()
	}
	return err
}

// startMember starts etcd in this process, or the program that the environment names.
func (n *node) startMember() (member, error) {
	if program := os.Getenv(serverVariable); program != "" {
		return startProcess(program, n)
	}
	return startEmbedded(n)
}

// keep makes m the run of n. It stops m if it cannot be isolated although n is.
func (n *node) keep(m member, link *Link) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.isolated {
		link.Cut()
		if err := m.cut(); err != nil {
			m.stop()
			return err
		}
	}
	n.member, n.link = m, link
	return nil
}

// startPeerLink returns nil if there are no peers.
func (n *node) startPeerLink() (*Link, error) {
	if n.linkAddress == n.peerAddress {
		return nil, nil
	}
	return newLink(n.linkAddress, n.peerAddress, n.cluster.dialers)
}

// restart starts a stopped node. Its ports were free to be taken meanwhile, if only by who tries
// out which are free.
func (n *node) restart() error {
	deadline := time.Now().Add(portTimeout)
	for {
		err := n.start()
		if !errors.Is(err, syscall.EADDRINUSE) || time.Now().After(deadline) {
			return err
		}
		time.Sleep(pollInterval)
	}
}

func (n *node) stop() {
	n.mu.Lock()
	m, link := n.member, n.link
	n.member, n.link = nil, nil
	n.mu.Unlock()
	if link != nil {
		_ = link.Close()
	}
	if m != nil {
		m.stop()
	}
}

func (n *node) isolate() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.member != nil && !n.isolated {
		n.link.Cut()
		if err := n.member.cut(); err != nil {
			n.link.Heal()
			return err
		}
	}
	n.isolated = true
	return nil
}

// rejoin undoes isolate. The connections that lost bytes are reset, and etcd dials them again.
func (n *node) rejoin() {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.member != nil && n.isolated {
		n.member.mend()
		n.link.Heal()
	}
	n.isolated = false
}

func (n *node) running() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.member != nil
}

// connected reports whether n runs and is not isolated.
func (n *node) connected() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.member != nil && !n.isolated
}

// serving reports whether n answers clients.
func (n *node) serving() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.member != nil && n.member.serving()
}

// failure returns why n's etcd ended by itself, and nil if it runs or is stopped.
func (n *node) failure() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.member == nil {
		return nil
	}
	return n.member.failure()
}

// leader returns whom n follows, itself if it leads; none if nobody, or if n is not connected.
func (n *node) leader() (leader types.ID, leads bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.member == nil || n.isolated {
		return none, false
	}
	return n.member.leader()
}

// campaign has n stand for election at once, unless it has a leader.
func (n *node) campaign() {
	if leader, _ := n.leader(); leader != none {
		return
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.member != nil {
		n.member.campaign()
	}
}

// awaitApplied waits until what the member had committed when it started has been applied. etcd 3.7
// panics in an election that comes earlier, if that is over a hundred entries: it then drops the
// first one from memory. raft still looks for that one, because it learns a little later that they
// are applied.
func (n *node) awaitApplied(deadline time.Time) {
	const harmless, untilToldOf = 100, 100 * time.Millisecond
	for time.Now().Before(deadline) {
		switch applied, all := n.applied(); {
		case all && applied > harmless:
			time.Sleep(untilToldOf)
			return
		case all:
			return
		}
		time.Sleep(pollInterval)
	}
}

// applied returns the last entry that was applied, and whether no other is known to be committed.
func (n *node) applied() (index uint64, all bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.member == nil {
		return 0, false
	}
	return n.member.applied()
}

// config is etcd's own default configuration but for the disk, elections, what configure changes,
// and then, so that it cannot, what makes n a member of its cluster.
func (n *node) config() *embed.Config {
	config := embed.NewConfig()
	config.UnsafeNoFsync = true
	config.InitialElectionTickAdvance = false // see awaitApplied
	config.ZapLoggerBuilder = embed.NewZapLoggerBuilder(lastWords())
	n.configure(config)
	client, peer := schemeOf(config.ClientTLSInfo), schemeOf(config.PeerTLSInfo)
	config.Name = n.name
	config.Dir = n.dir
	config.WalDir = "" // in Dir
	config.InitialCluster = n.initialCluster(peer)
	config.ListenClientUrls = urls(client, n.clientAddress)
	config.AdvertiseClientUrls = urls(client, n.clientAddress)
	config.ListenPeerUrls = urls(peer, n.peerAddress)
	config.AdvertisePeerUrls = urls(peer, n.linkAddress)
	config.ServiceRegister = nil
	return config
}

// lastWords is a logger for what etcd says before it panics, or exits, and takes the test's process
// with it.
func lastWords() *zap.Logger {
	encoder := zapcore.NewConsoleEncoder(zap.NewDevelopmentEncoderConfig())
	return zap.New(zapcore.NewCore(encoder, zapcore.Lock(os.Stderr), zap.PanicLevel))
}

func (n *node) initialCluster(scheme string) string {
	var members []string
	for _, m := range n.cluster.nodes {
		members = append(members, m.name+"="+scheme+"://"+m.linkAddress)
	}
	return strings.Join(members, ",")
}

func schemeOf(info transport.TLSInfo) string {
	if info.Empty() {
		return "http"
	}
	return "https"
}

func urls(scheme, address string) []url.URL {
	return []url.URL{{Scheme: scheme, Host: address}}
}
