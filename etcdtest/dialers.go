package etcdtest

import (
	"net"
	"sync"
)

// dialers are the processes of a cluster's members, of which some are cut off from their peers. The
// links between members drop what these send and what is sent to them, though the peers' own links
// are sound. A nil *dialers has none.
type dialers struct {
	mu        sync.Mutex
	processes map[int]bool // whether it is cut off, by process ID
}

func newDialers() *dialers {
	return &dialers{processes: make(map[int]bool)}
}

func (d *dialers) add(pid int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.processes[pid] = false
}

func (d *dialers) remove(pid int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.processes, pid)
}

// cut cuts a process off. It is an error that this system does not show who has dialed a
// connection.
func (d *dialers) cut(pid int) error {
	if err := canFindOwner(); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.processes[pid] = true
	return nil
}

func (d *dialers) mend(pid int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.processes[pid] = false
}

func (d *dialers) isCut(pid int) bool {
	if d == nil || pid == 0 {
		return false
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.processes[pid]
}

// identify returns which of the processes has dialed this connection, 0 if none.
func (d *dialers) identify(conn *net.TCPConn) int {
	if d == nil {
		return 0
	}
	d.mu.Lock()
	var pids []int
	for pid := range d.processes {
		pids = append(pids, pid)
	}
	d.mu.Unlock()
	if len(pids) == 0 {
		return 0
	}
	return owner(conn, pids)
}
