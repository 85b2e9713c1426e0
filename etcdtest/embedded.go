package etcdtest

import (
	"context"
	"sync/atomic"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/types"
	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/grpc"
)

// stepTimeout bounds how long etcd's raft may take to take a message.
const stepTimeout = time.Second

// embedded is etcd in this process.
type embedded struct {
	etcd   *embed.Etcd
	server atomic.Pointer[grpc.Server] // etcd's, once it serves clients
}

func startEmbedded(n *node) (*embedded, error) {
	e := &embedded{}
	config := n.config()
	config.ServiceRegister = e.server.Store
	var err error
	e.etcd, err = embed.StartEtcd(config)
	return e, err
}

// failure returns nil: if etcd in this process ends by itself, the process does.
func (e *embedded) failure() error { return nil }

func (e *embedded) serving() bool { return e.server.Load() != nil }

func (e *embedded) leader() (leader types.ID, leads bool) {
	leader = e.etcd.Server.Leader()
	return leader, leader == e.etcd.Server.MemberID()
}

func (e *embedded) campaign() { e.step(raftpb.MsgTimeoutNow) }

func (e *embedded) applied() (index uint64, all bool) {
	index = e.etcd.Server.AppliedIndex()
	return index, index > 0 && index >= e.etcd.Server.CommittedIndex()
}

// cut drops the raft messages, of both ways, in the connections that e has dialed. That leaves two
// requests that it may send. A leader sends a snapshot, unless the follower has been silent for an
// election timeout. A follower passes lease renewals on to its leader: MsgForgetLeader prevents it.
func (e *embedded) cut() error {
	for _, peer := range e.peers() {
		e.etcd.Server.CutPeer(peer)
	}
	// etcd takes a moment to act on it, and may get it before what the leader had sent.
	for deadline := time.Now().Add(stepTimeout); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		e.step(raftpb.MsgForgetLeader)
		if leader := e.etcd.Server.Leader(); leader == 0 || leader == e.etcd.Server.MemberID() {
			break
		}
	}
	return nil
}

func (e *embedded) mend() {
	for _, peer := range e.peers() {
		e.etcd.Server.MendPeer(peer)
	}
}

func (e *embedded) peers() []types.ID {
	var peers []types.ID
	for _, m := range e.etcd.Server.Cluster().Members() {
		if m.ID != e.etcd.Server.MemberID() {
			peers = append(peers, m.ID)
		}
	}
	return peers
}

// step gives e's raft a message from itself.
func (e *embedded) step(kind raftpb.MessageType) {
	ctx, cancel := context.WithTimeout(context.Background(), stepTimeout)
	defer cancel()
	id := uint64(e.etcd.Server.MemberID())
	// An error means that etcd is stopping, or too busy; then nothing comes of it, as of any raft
	// message.
	_ = e.etcd.Server.Process(ctx, &raftpb.Message{Type: kind.Enum(), From: new(id), To: new(id)})
}

// stop stops etcd at once. etcd's own Close waits 7 s for clients to end their watches and for a
// leader to hand over, and 1 s for peers to hang up.
func (e *embedded) stop() {
	if server := e.server.Load(); server != nil {
		server.Stop()
		server.GracefulStop() // waits for the handlers, which need etcd's backend
	}
	e.etcd.Server.HardStop()
	e.etcd.Close()
}
