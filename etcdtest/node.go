package etcdtest

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/transport"
	"go.etcd.io/etcd/client/pkg/v3/types"
	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"google.golang.org/grpc"
)

const (
	// portTimeout bounds how long a restart waits for its ports.
	portTimeout = 5 * time.Second
	// stepTimeout bounds how long etcd's raft may take to take a message.
	stepTimeout = time.Second
	// none is what etcd calls a leader that is not.
	none = types.ID(raft.None)
)

// node is one member of a cluster.
type node struct {
	name          string
	dir           string
	all           []*node // itself among them
	configure     func(*embed.Config)
	ports         *reservation
	clientAddress string
	peerAddress   string // where etcd listens to its peers
	linkAddress   string // where its peers find it; the same as peerAddress if there are none

	mu       sync.Mutex // held for short
	run      *run       // nil while stopped
	isolated bool
}

// run is one run of a node's etcd, from start to stop.
type run struct {
	etcd   *embed.Etcd
	server atomic.Pointer[grpc.Server] // etcd's, once it serves clients
	link   *Link                       // through which the peers reach it; nil if there are none
}

// newNodes returns the nodes of a new cluster, to be started, with their data below dir. The caller releases the ports
// of those that it returns, also with an error.
func newNodes(count int, dir string, configure func(*embed.Config)) ([]*node, error) {
	var nodes []*node
	for i := range count {
		ports, err := reserve()
		if err != nil {
			return nodes, err
		}
		n := &node{
			name:          fmt.Sprintf("member%d", i),
			configure:     configure,
			ports:         ports,
			clientAddress: ports.addresses[0],
			peerAddress:   ports.addresses[1],
			linkAddress:   ports.addresses[2],
		}
		if count == 1 {
			n.linkAddress = n.peerAddress
		}
		n.dir = filepath.Join(dir, n.name)
		nodes = append(nodes, n)
	}
	for _, n := range nodes {
		n.all = nodes
	}
	return nodes, nil
}

// start starts etcd and the link in front of it. It does not wait until etcd serves.
func (n *node) start() (err error) {
	r := &run{}
	if r.link, err = n.startPeerLink(); err != nil {
		return err
	}
	if r.etcd, err = embed.StartEtcd(n.config(r)); err != nil {
		r.closeLink()
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.run = r
	if n.isolated {
		r.cut()
	}
	return nil
}

// startPeerLink returns nil if there are no peers.
func (n *node) startPeerLink() (*Link, error) {
	if n.linkAddress == n.peerAddress {
		return nil, nil
	}
	return newLink(n.linkAddress, n.peerAddress)
}

// restart starts a stopped node. Its ports were free to be taken meanwhile, if only by who tries out which are free.
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
	r := n.run
	n.run = nil
	n.mu.Unlock()
	if r != nil {
		r.stop()
	}
}

func (n *node) isolate() {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.run != nil && !n.isolated {
		n.run.cut()
	}
	n.isolated = true
}

func (n *node) rejoin() {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.run != nil && n.isolated {
		n.run.mend()
	}
	n.isolated = false
}

func (n *node) running() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.run != nil
}

// connected tells whether n runs and is not isolated.
func (n *node) connected() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.run != nil && !n.isolated
}

// serving tells whether n answers clients.
func (n *node) serving() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.run != nil && n.run.server.Load() != nil
}

// leader returns whom n follows, itself if it leads; none if nobody, or if n is not connected.
func (n *node) leader() (leader types.ID, leads bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.run == nil || n.isolated {
		return none, false
	}
	leader = n.run.etcd.Server.Leader()
	return leader, leader == n.run.etcd.Server.MemberID()
}

// campaign has n stand for election at once, unless it knows a leader.
func (n *node) campaign() {
	if leader, _ := n.leader(); leader != none {
		return
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.run != nil {
		n.run.step(raftpb.MsgTimeoutNow)
	}
}

// awaitApplied waits until what the member had committed when it started has been applied. etcd 3.7 panics in an election that
// comes earlier, if that is over a hundred entries: it then drops the first one from memory, while raft, which is told a little
// later that they are applied, still looks for it.
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
	if n.run == nil {
		return 0, false
	}
	index = n.run.etcd.Server.AppliedIndex()
	return index, index > 0 && index >= n.run.etcd.Server.CommittedIndex()
}

// config is etcd's own default configuration but for the disk, the log, elections, which a member that starts does not hasten by
// itself, what configure changes, and then, so that it cannot, what makes n a member of its cluster. r learns of the gRPC server.
func (n *node) config(r *run) *embed.Config {
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
	config.ServiceRegister = r.server.Store
	return config
}

// lastWords is a logger for what etcd says before it panics, or exits, and takes the test's process with it.
func lastWords() *zap.Logger {
	encoder := zapcore.NewConsoleEncoder(zap.NewDevelopmentEncoderConfig())
	return zap.New(zapcore.NewCore(encoder, zapcore.Lock(os.Stderr), zap.PanicLevel))
}

func (n *node) initialCluster(scheme string) string {
	var members []string
	for _, m := range n.all {
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

// cut takes r off the network of its peers. The link is a black hole for connections that the peers have dialled;
// CutPeer drops the raft messages, of both ways, in those that r has dialled. That leaves two requests which r may make:
// a leader sends a snapshot, unless the follower has been silent for an election timeout, and a follower passes lease
// renewals on to its leader, unless it has none: so it forgets it.
func (r *run) cut() {
	r.link.Cut()
	for _, peer := range r.peers() {
		r.etcd.Server.CutPeer(peer)
	}
	r.step(raftpb.MsgForgetLeader)
}

// mend undoes cut. The connections that lost bytes are reset, and etcd dials them again.
func (r *run) mend() {
	for _, peer := range r.peers() {
		r.etcd.Server.MendPeer(peer)
	}
	r.link.Heal()
}

func (r *run) peers() []types.ID {
	var peers []types.ID
	for _, m := range r.etcd.Server.Cluster().Members() {
		if m.ID != r.etcd.Server.MemberID() {
			peers = append(peers, m.ID)
		}
	}
	return peers
}

// step gives r's raft a message from itself.
func (r *run) step(kind raftpb.MessageType) {
	ctx, cancel := context.WithTimeout(context.Background(), stepTimeout)
	defer cancel()
	id := uint64(r.etcd.Server.MemberID())
	// An error means that etcd is stopping, or too busy; then nothing comes of it, as of any raft message.
	_ = r.etcd.Server.Process(ctx, &raftpb.Message{Type: kind.Enum(), From: new(id), To: new(id)})
}

// stop stops etcd at once, where its Close alone waits 7 s for clients to end their watches, and for a leader to hand
// over, and 1 s for peers to hang up.
func (r *run) stop() {
	r.closeLink()
	if server := r.server.Load(); server != nil {
		server.Stop()
		server.GracefulStop() // waits for the handlers, which need etcd's backend
	}
	r.etcd.Server.HardStop()
	r.etcd.Close()
}

func (r *run) closeLink() {
	if r.link != nil {
		_ = r.link.Close()
	}
}
