package etcdtest

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

const (
	// linkDialTimeout bounds the dial of the endpoint behind a Link.
	linkDialTimeout = 5 * time.Second
	// linkChunk is the most bytes that a Link reads at once, and linkQueue the most chunks that one
	// direction of one connection holds back for a delay. Beyond that the sender is slowed down, as
	// a full network would.
	linkChunk = 16 << 10
	linkQueue = 1024
)

// Link is a TCP proxy in front of one endpoint, with the faults of a network: black holes, latency
// and resets. [StartLink] or [NewLink] makes it; Close ends it. The zero Link is not usable. It
// passes gRPC and TLS on unchanged. All methods are safe for concurrent use.
//
// etcd's own go.etcd.io/etcd/pkg/v3/proxy (v3.7.3) lacks what matters here:
//   - It cannot close connections. A stream that lost bytes in a black hole continues afterwards,
//     corrupt. Its Close waits for either end to hang up.
//   - It does not report which connections lost bytes.
//   - When the endpoint refuses, it drops the client's connection without closing it: the client
//     hangs.
//   - It sleeps for the delay after each read, so that bytes wait for up to twice the delay.
//   - It listens on all interfaces, and stops when 16 errors have not been read.
type Link struct {
	target   string
	listener net.Listener
	stopped  context.Context // done when Close begins
	stop     context.CancelFunc
	running  sync.WaitGroup
	dialers  *dialers // nil unless the link is between members

	mu      sync.Mutex
	faults  faults
	changed chan struct{} // closed and replaced when faults change
	conns   map[*linkConn]struct{}
}

// faults is what a Link does to the bytes that pass.
type faults struct {
	drop  [2]bool // indexed by direction
	delay time.Duration
}

type direction int

const (
	toServer direction = iota
	toClient
)

// NewLink starts a link in front of endpoint, on a free loopback port. The endpoint is "host:port",
// or that with "http://" or "https://" before it. Nothing need listen there yet: while the endpoint
// refuses connections, the link closes those of its clients. Close the link at the end.
//
// Errors:
//   - An error that names the endpoint if it has another form.
//   - Why the link could not listen.
func NewLink(endpoint string) (*Link, error) {
	target, err := parseEndpoint(endpoint)
	if err != nil {
		return nil, err
	}
	l, err := newLink("127.0.0.1:0", target, nil)
	if err != nil {
		return nil, fmt.Errorf("etcdtest: link to %s: %w", endpoint, err)
	}
	return l, nil
}

// newLink starts a link from one host:port to another.
// It cuts off what dialers says, unless it is nil.
func newLink(from, target string, dialers *dialers) (*Link, error) {
	listener, err := net.Listen("tcp", from)
	if err != nil {
		return nil, err
	}
	l := &Link{
		target:   target,
		listener: listener,
		dialers:  dialers,
		changed:  make(chan struct{}),
		conns:    make(map[*linkConn]struct{}),
	}
	l.stopped, l.stop = context.WithCancel(context.Background())
	l.running.Go(l.accept) // until Close closes the listener
	return l, nil
}

// StartLink is [NewLink] for a test: it fails tb if NewLink returns an error, and closes the link
// when tb ends. A nil tb panics.
func StartLink(tb testing.TB, endpoint string) *Link {
	tb.Helper()
	l, err := NewLink(endpoint)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = l.Close() })
	return l
}

// parseEndpoint returns the host:port of an endpoint.
func parseEndpoint(endpoint string) (string, error) {
	address, found := strings.CutPrefix(endpoint, "http://")
	if !found {
		address = strings.TrimPrefix(endpoint, "https://")
	}
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return "", fmt.Errorf("etcdtest: endpoint %q: %w", endpoint, err)
	}
	if host == "" || strings.ContainsAny(host, "/@ ") {
		return "", fmt.Errorf("etcdtest: endpoint %q: no valid host", endpoint)
	}
	if number, err := strconv.ParseUint(port, 10, 16); err != nil || number == 0 {
		return "", fmt.Errorf("etcdtest: endpoint %q: port %q is not in 1-65535", endpoint, port)
	}
	return address, nil
}

// Endpoint returns the link's own address, "127.0.0.1:port". Give it to the client under test.
func (l *Link) Endpoint() string {
	return l.listener.Addr().String()
}

// Cut turns the link into a black hole both ways, at once. No byte that is written after Cut has
// returned arrives before [Link.Heal], and neither does the end of a connection. Bytes that
// [Link.Delay] holds back are lost if they fall due in the cut. Connections stay open, and new ones
// are accepted but carry nothing.
func (l *Link) Cut() {
	l.change(func(f *faults) { f.drop = [2]bool{toServer: true, toClient: true} })
}

// DropReplies turns the link into a black hole from the server to the client, at once. What the
// client sends still arrives: requests are carried out, and their outcome stays unknown.
// DropReplies adds to a Cut, and ends with [Link.Heal].
func (l *Link) DropReplies() {
	l.change(func(f *faults) { f.drop[toClient] = true })
}

// Delay makes each byte arrive d later, in each direction, so that a round trip takes 2d longer. It
// replaces an earlier delay, also for the bytes on their way, and keeps their order. Zero or less
// is no delay. Connecting takes no longer.
func (l *Link) Delay(d time.Duration) {
	l.change(func(f *faults) { f.delay = max(d, 0) })
}

// Heal undoes Cut, DropReplies and Delay. It resets the connections that lost bytes, and those that
// were opened in a cut, because what follows a gap is corrupt. Other connections continue. A client
// dials again by itself. A request that it sends before it notices the reset may fail: clientv3
// repeats reads, and returns Unavailable for writes.
func (l *Link) Heal() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.faults = faults{}
	l.signalChange()
	for c := range l.conns {
		if c.damaged {
			c.reset()
		}
	}
}

// Reset closes all connections, of both sides, by a TCP reset. New ones are accepted at once.
// Faults stay as they are.
func (l *Link) Reset() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for c := range l.conns {
		c.reset()
	}
}

// Close closes the link and all its connections, and waits for its goroutines. Clients are then
// refused. Closing again does nothing. The error is always nil.
func (l *Link) Close() error {
	l.stop()
	_ = l.listener.Close()
	l.Reset()
	l.running.Wait()
	return nil
}

// resetDamaged resets the connections of one dialer that lost bytes.
func (l *Link) resetDamaged(dialer int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for c := range l.conns {
		if c.damaged && c.dialer == dialer {
			c.reset()
		}
	}
}

func (l *Link) change(edit func(*faults)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	edit(&l.faults)
	l.signalChange()
}

// signalChange wakes whoever waits for a delay or a heal. The caller holds l.mu.
func (l *Link) signalChange() {
	close(l.changed)
	l.changed = make(chan struct{})
}

// delay returns the current delay, and a channel that is closed when it may be another.
func (l *Link) delay() (time.Duration, <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.faults.delay, l.changed
}

func (l *Link) accept() {
	for {
		client, err := l.listener.Accept()
		if l.stopped.Err() != nil {
			if err == nil {
				_ = client.Close()
			}
			return
		}
		if err != nil { // out of file descriptors, or reset before it was accepted: the next may do
			time.Sleep(time.Millisecond)
			continue
		}
		c := &linkConn{link: l, gone: make(chan struct{}), client: client.(*net.TCPConn)}
		if l.add(c) {
			l.running.Go(c.serve) // until either side ends, or Heal, Reset or Close resets it
		}
	}
}

// add keeps c for Heal, Reset and Close to find; it refuses, and closes c, when Close has begun.
func (l *Link) add(c *linkConn) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.stopped.Err() != nil {
		c.reset()
		return false
	}
	l.conns[c] = struct{}{}
	return true
}

func (l *Link) remove(c *linkConn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	c.close()
	delete(l.conns, c)
}

// linkConn is one connection through a Link: the client's to us and ours to the server.
type linkConn struct {
	link   *Link
	client *net.TCPConn
	server *net.TCPConn  // nil until dial
	gone   chan struct{} // closed by reset

	damaged bool // it lost something, or was opened in a cut; guarded by link.mu
	dialer  int  // the process that dialed, 0 if that does not matter; guarded by link.mu
	cut     bool // it lost something because dialer was cut off; guarded by link.mu
}

// chunk is what one read returned, and when.
type chunk struct {
	data []byte
	err  error // why there is no more, or nil
	at   time.Time
}

// serve passes bytes on until both directions have ended.
func (c *linkConn) serve() {
	defer c.link.remove(c)
	c.identify()
	if !c.passes(toServer) { // opened in a cut: the server must not see it
		<-c.gone
		return
	}
	if err := c.dial(); err != nil {
		if !c.passes(toClient) { // a refusal is a reply too
			<-c.gone
		}
		return
	}
	var pumps sync.WaitGroup
	pumps.Go(func() { c.pump(toServer, c.server, c.client) })
	pumps.Go(func() { c.pump(toClient, c.client, c.server) })
	pumps.Wait()
}

// identify finds out which process dialed.
func (c *linkConn) identify() {
	dialer := c.link.dialers.identify(c.client)
	c.link.mu.Lock()
	defer c.link.mu.Unlock()
	c.dialer = dialer
}

// dial connects to the server. It fails when c was reset meanwhile.
func (c *linkConn) dial() error {
	dialer := net.Dialer{Timeout: linkDialTimeout}
	server, err := dialer.DialContext(c.link.stopped, "tcp", c.link.target)
	if err != nil {
		return err
	}
	c.link.mu.Lock()
	defer c.link.mu.Unlock()
	c.server = server.(*net.TCPConn)
	if c.isGone() {
		c.abort()
		return net.ErrClosed
	}
	return nil
}

// pump passes on what src sends, each chunk when it is due, until src ends or c is reset.
func (c *linkConn) pump(d direction, dst, src *net.TCPConn) {
	chunks := make(chan chunk, linkQueue)
	var reader sync.WaitGroup
	reader.Go(func() { c.read(src, chunks) }) // until src ends or c is reset
	defer reader.Wait()
	for ch := range chunks {
		if !c.waitUntilDue(ch) {
			return
		}
		// Asked as late as possible, so that a cut also takes what was held back. What passes here
		// was read, and therefore sent, before any later Cut.
		if c.passes(d) {
			c.forward(dst, ch)
		}
	}
}

// read queues what src sends, the error at its end last.
func (c *linkConn) read(src *net.TCPConn, chunks chan<- chunk) {
	defer close(chunks)
	buf := make([]byte, linkChunk)
	for {
		n, err := src.Read(buf)
		select {
		case chunks <- chunk{data: bytes.Clone(buf[:n]), err: err, at: time.Now()}:
		case <-c.gone:
			return
		}
		if err != nil {
			return
		}
	}
}

// waitUntilDue returns false when c was reset meanwhile.
func (c *linkConn) waitUntilDue(ch chunk) bool {
	for {
		delay, changed := c.link.delay()
		wait := time.Until(ch.at.Add(delay))
		if wait <= 0 {
			return !c.isGone()
		}
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-changed:
		case <-c.gone:
		}
		timer.Stop()
		if c.isGone() {
			return false
		}
	}
}

// passes reports whether something may pass now. If not, c is damaged from the same instant: a Heal
// either came before it and let it pass, or comes after and finds the damage. What lost bytes
// because its dialer was cut off passes none any more: it may not be reset before the dialer is
// connected.
func (c *linkConn) passes(d direction) bool {
	c.link.mu.Lock()
	defer c.link.mu.Unlock()
	c.cut = c.cut || c.link.dialers.isCut(c.dialer)
	if c.link.faults.drop[d] || c.cut {
		c.damaged = true
		return false
	}
	return true
}

// forward passes on a chunk and the way src ended: an end of file as one, for the other direction
// may go on, and anything else as a reset.
func (c *linkConn) forward(dst *net.TCPConn, ch chunk) {
	_, err := dst.Write(ch.data)
	if err == nil && ch.err == io.EOF {
		err = dst.CloseWrite()
	} else if err == nil {
		err = ch.err
	}
	if err != nil {
		c.link.mu.Lock()
		defer c.link.mu.Unlock()
		c.reset()
	}
}

func (c *linkConn) isGone() bool {
	select {
	case <-c.gone:
		return true
	default:
		return false
	}
}

// reset closes both sides at once, unless that was done before. The caller holds link.mu.
func (c *linkConn) reset() {
	if !c.isGone() {
		close(c.gone)
		c.abort()
	}
}

// abort closes both sides so that both ends see a reset, and lose what was on its way. The caller
// holds link.mu.
func (c *linkConn) abort() {
	_ = c.client.SetLinger(0)
	if c.server != nil {
		_ = c.server.SetLinger(0)
	}
	c.close()
}

// close closes both sides; what was passed on still arrives. The caller holds link.mu.
func (c *linkConn) close() {
	_ = c.client.Close()
	if c.server != nil {
		_ = c.server.Close()
	}
}
