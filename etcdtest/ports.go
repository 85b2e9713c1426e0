package etcdtest

import (
	"fmt"
	"math/rand/v2"
	"net"
)

const (
	// firstPort and lastPort bound the members' ports. Linux takes the ports of outgoing
	// connections, and of listeners that name none, from 32768 on, macOS and Windows from 49152:
	// one of them in the place of a stopped member, which may stay for hours, would keep it from
	// restarting.
	firstPort = 10000
	lastPort  = 19999
	// portsPerMember is what one member needs: for clients, for its peers, for the link between,
	// and the guard.
	portsPerMember = 4
	// reserveAttempts is how many places are tried before there is no port to be had.
	reserveAttempts = 100
)

// reservation is a row of ports for one member, for as long as it may be restarted. The first port
// is the guard. A listener holds it all the time, so that other clusters do not take the row while
// the member is stopped. They may be in this process or in another.
type reservation struct {
	guard     net.Listener
	addresses [portsPerMember - 1]string
}

// reserve finds a row of ports at random that nobody listens on. A program that does not
// look at guards may still take one before the member does.
func reserve() (*reservation, error) {
	var last error
	for range reserveAttempts {
		row := rand.IntN((lastPort + 1 - firstPort) / portsPerMember)
		r, err := reserveAt(firstPort + row*portsPerMember)
		if err == nil {
			return r, nil
		}
		last = err
	}
	return nil, fmt.Errorf("no free ports in %d-%d: %w", firstPort, lastPort, last)
}

// reserveAt reserves the row that begins with port, or fails if someone listens on any of it.
func reserveAt(port int) (*reservation, error) {
	guard, err := net.Listen("tcp", loopback(port))
	if err != nil {
		return nil, err
	}
	r := &reservation{guard: guard}
	for i := range r.addresses {
		r.addresses[i] = loopback(port + 1 + i)
		listener, err := net.Listen("tcp", r.addresses[i])
		if err != nil {
			r.release()
			return nil, err
		}
		_ = listener.Close()
	}
	return r, nil
}

// release gives the ports up. Releasing again does nothing.
func (r *reservation) release() {
	_ = r.guard.Close()
}

func loopback(port int) string {
	return fmt.Sprintf("127.0.0.1:%d", port)
}
