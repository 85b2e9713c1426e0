package etcdtest

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"strings"
	"syscall"
)

// endWithParent has a program end when this process does, however it ends.
func endWithParent() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
}

func canFindOwner() error { return nil }

// owner returns which of the processes has the other end of a loopback connection, 0 if none has.
func owner(conn *net.TCPConn, pids []int) int {
	inode := inodeOf(conn)
	if inode == "" {
		return 0
	}
	for _, pid := range pids {
		dir := fmt.Sprintf("/proc/%d/fd", pid)
		files, err := os.ReadDir(dir)
		if err != nil {
			continue // it has just ended
		}
		for _, file := range files {
			if target, err := os.Readlink(dir + "/" + file.Name()); err == nil && target == "socket:["+inode+"]" {
				return pid
			}
		}
	}
	return 0
}

// inodeOf returns the inode of the socket at the other end of a loopback connection, "" if there is
// none.
func inodeOf(conn *net.TCPConn) string {
	table, err := os.Open("/proc/net/tcp")
	if err != nil {
		return ""
	}
	defer func() { _ = table.Close() }()
	local, remote := hexAddress(conn.RemoteAddr()), hexAddress(conn.LocalAddr())
	for lines := bufio.NewScanner(table); lines.Scan(); {
		// The columns are number, local address, remote address, …, and in the tenth place the
		// inode.
		fields := strings.Fields(lines.Text())
		if len(fields) > 9 && fields[1] == local && fields[2] == remote {
			return fields[9]
		}
	}
	return ""
}

// hexAddress returns an address as in /proc/net/tcp.
func hexAddress(address net.Addr) string {
	tcp, isTCP := address.(*net.TCPAddr)
	if !isTCP {
		return ""
	}
	ip := tcp.IP.To4()
	if ip == nil {
		return ""
	}
	return fmt.Sprintf("%02X%02X%02X%02X:%04X", ip[3], ip[2], ip[1], ip[0], tcp.Port)
}
