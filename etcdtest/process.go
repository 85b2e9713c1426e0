package etcdtest

import (
	"bytes"
	"context"
	"crypto/tls"
	"flag"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strconv"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"go.etcd.io/etcd/client/pkg/v3/transport"
	"go.etcd.io/etcd/client/pkg/v3/types"
	"go.etcd.io/etcd/server/v3/embed"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

const (
	// statusTimeout bounds how long a process may take to say how it is.
	statusTimeout = 500 * time.Millisecond
	// redialDelay is how long gRPC waits before it dials a process again that does not serve yet.
	redialDelay = 10 * time.Millisecond
	// outputLimit is how much of a process's output is kept for the error at its end.
	outputLimit = 4096
)

// process is a program of etcd, of whatever version.
type process struct {
	node    *node
	command *exec.Cmd
	output  *tail
	conn    *grpc.ClientConn
	token   string // root's, if the cluster has users; used under node.mu

	mu     sync.Mutex
	ended  chan struct{} // closed when the program has ended
	killed bool
}

// startProcess starts program as the member n.
func startProcess(program string, n *node) (*process, error) {
	if err := requireFree(n.clientAddress, n.peerAddress); err != nil {
		return nil, err
	}
	_, statErr := os.Stat(n.dir)
	config := n.config()
	// Nothing to apply yet: see awaitApplied.
	config.InitialElectionTickAdvance = os.IsNotExist(statErr)
	conn, err := n.dial()
	if err != nil {
		return nil, err
	}
	p := &process{node: n, output: &tail{}, conn: conn, ended: make(chan struct{})}
	p.command = exec.Command(program, arguments(config)...)
	p.command.Stdout, p.command.Stderr = p.output, p.output
	p.command.Env = []string{} // or etcd takes ETCD_ variables for flags
	p.command.SysProcAttr = endWithParent()
	if err := p.command.Start(); err != nil {
		_ = conn.Close()
		return nil, err
	}
	n.cluster.dialers.add(p.pid())
	go p.wait() // until the program ends
	return p, nil
}

// requireFree returns an error if somebody listens on one of the addresses, as a program of etcd
// that has just begun cannot.
func requireFree(addresses ...string) error {
	for _, address := range addresses {
		listener, err := net.Listen("tcp", address)
		if err != nil {
			return err
		}
		_ = listener.Close()
	}
	return nil
}

// arguments are the flags of a program that make it what config says. Flags that etcd has given
// another name since are not known to older programs, which then end at once.
func arguments(config *embed.Config) []string {
	list := []string{
		"--listen-client-urls=" + config.ListenClientUrls[0].String(),
		"--advertise-client-urls=" + config.AdvertiseClientUrls[0].String(),
		"--listen-peer-urls=" + config.ListenPeerUrls[0].String(),
		"--initial-advertise-peer-urls=" + config.AdvertisePeerUrls[0].String(),
		"--log-level=panic",
		"--log-outputs=stderr",
	}
	list = append(list, tlsArguments("", config.ClientTLSInfo)...)
	list = append(list, tlsArguments("peer-", config.PeerTLSInfo)...)
	defaults := flagsOf(embed.NewConfig())
	flagsOf(config).VisitAll(func(f *flag.Flag) {
		if value := f.Value.String(); value != defaults.Lookup(f.Name).Value.String() {
			list = append(list, "--"+f.Name+"="+value)
		}
	})
	return list
}

// tlsArguments are the flags for what flagsOf resets.
func tlsArguments(prefix string, info transport.TLSInfo) []string {
	if info.Empty() {
		return nil
	}
	return []string{
		"--" + prefix + "cert-file=" + info.CertFile,
		"--" + prefix + "key-file=" + info.KeyFile,
		"--" + prefix + "trusted-ca-file=" + info.TrustedCAFile,
		"--" + prefix + "client-cert-auth=" + strconv.FormatBool(info.ClientCertAuth),
	}
}

// flagsOf returns etcd's flags with the values of config, but those of TLS without any.
func flagsOf(config *embed.Config) *flag.FlagSet {
	flags := flag.NewFlagSet("etcd", flag.ContinueOnError)
	config.AddFlags(flags)
	return flags
}

// dial returns a connection to the member, which need not serve yet.
func (n *node) dial() (*grpc.ClientConn, error) {
	config, err := n.cluster.ClientConfig(root)
	if err != nil {
		return nil, err
	}
	return grpc.NewClient(n.clientAddress,
		grpc.WithTransportCredentials(transportCredentials(config.TLS)),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: redialDelay, Multiplier: 1, MaxDelay: redialDelay},
			MinConnectTimeout: statusTimeout,
		}))
}

func transportCredentials(config *tls.Config) credentials.TransportCredentials {
	if config == nil {
		return insecure.NewCredentials()
	}
	return credentials.NewTLS(config)
}

func (p *process) pid() int { return p.command.Process.Pid }

// wait reports on standard error what the program said, if it ended by itself.
func (p *process) wait() {
	_ = p.command.Wait()
	p.mu.Lock()
	defer p.mu.Unlock()
	close(p.ended)
	if !p.killed {
		fmt.Fprintf(os.Stderr, "etcdtest: %s has ended: %v\n%s\n", p.command.Path, p.command.ProcessState, p.output)
	}
}

func (p *process) failure() error {
	select {
	case <-p.ended:
		return fmt.Errorf("%s has ended: %v: %s", p.command.Path, p.command.ProcessState, p.output)
	default:
		return nil
	}
}

func (p *process) serving() bool {
	_, err := p.status()
	return err == nil
}

func (p *process) leader() (leader types.ID, leads bool) {
	response, err := p.status()
	if err != nil {
		return none, false
	}
	return types.ID(response.Leader), response.Leader == response.Header.MemberId
}

// status asks the program for its status, as root if the cluster has users.
func (p *process) status() (*pb.StatusResponse, error) {
	ctx, cancel := context.WithTimeout(context.Background(), statusTimeout)
	defer cancel()
	maintenance := pb.NewMaintenanceClient(p.conn)
	ask := func() (*pb.StatusResponse, error) {
		return maintenance.Status(metadata.AppendToOutgoingContext(ctx, rpctypes.TokenFieldNameGRPC, p.token), &pb.StatusRequest{})
	}
	response, err := ask()
	if code := status.Code(err); code != codes.Unauthenticated && code != codes.InvalidArgument {
		return response, err
	}
	password := p.node.cluster.passwordOf(root)
	authenticated, err := pb.NewAuthClient(p.conn).Authenticate(ctx, &pb.AuthenticateRequest{Name: root, Password: password})
	if err != nil {
		return nil, err
	}
	p.token = authenticated.Token
	return ask()
}

// campaign does nothing: a program stands for election in its own time.
func (p *process) campaign() {}

// applied has nobody wait, since campaign does nothing.
func (p *process) applied() (index uint64, all bool) { return 0, true }

// cut drops what comes through the connections that the program has dialed to its peers.
func (p *process) cut() error { return p.node.cluster.dialers.cut(p.pid()) }

func (p *process) mend() {
	p.node.cluster.dialers.mend(p.pid())
	for _, n := range p.node.cluster.nodes {
		if n == p.node {
			continue
		}
		n.mu.Lock()
		if n.link != nil {
			n.link.resetDamaged(p.pid())
		}
		n.mu.Unlock()
	}
}

// stop kills the program.
func (p *process) stop() {
	p.mu.Lock()
	p.killed = true
	p.mu.Unlock()
	_ = p.command.Process.Kill()
	<-p.ended
	_ = p.conn.Close()
	p.node.cluster.dialers.remove(p.pid())
}

// tail keeps the last of what is written to it.
type tail struct {
	mu   sync.Mutex
	last []byte
}

func (t *tail) Write(data []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.last = append(t.last, data...)
	t.last = t.last[max(0, len(t.last)-outputLimit):]
	return len(data), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return string(bytes.TrimSpace(t.last))
}
