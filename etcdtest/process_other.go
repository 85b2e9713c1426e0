//go:build !linux

package etcdtest

import (
	"errors"
	"net"
	"syscall"
)

func endWithParent() *syscall.SysProcAttr { return nil }

func canFindOwner() error {
	return errors.New("a program of etcd can be isolated on Linux only")
}

func owner(*net.TCPConn, []int) int { return 0 }
