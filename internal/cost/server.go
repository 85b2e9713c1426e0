package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"syscall"
	"time"

	"example.com/etcdutil/etcdtest"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// serverEnv makes the program an etcd. It reports its usage for each line of input, and ends with
// its input.
const serverEnv = "ETCDUTIL_COST_SERVER"

// A usage is what a process uses.
type usage struct {
	Memory     uint64 // heap and stacks after a collection, in bytes
	CPU        time.Duration
	Goroutines int
}

func (u usage) since(before usage) usage {
	return usage{Memory: u.Memory - before.Memory, CPU: u.CPU - before.CPU, Goroutines: u.Goroutines - before.Goroutines}
}

// used returns what this process uses.
func used() (usage, error) {
	cpu, err := cpuTime()
	if err != nil {
		return usage{}, err
	}
	debug.FreeOSMemory()
	runtime.GC() // what lies in a sync.Pool outlives the first
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return usage{Memory: m.HeapAlloc + m.StackInuse, CPU: cpu, Goroutines: runtime.NumGoroutine()}, nil
}

func cpuTime() (time.Duration, error) {
	var r syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &r); err != nil {
		return 0, err
	}
	return time.Duration(r.Utime.Nano() + r.Stime.Nano()), nil
}

func serve() error {
	cluster, err := etcdtest.New(1)
	if err != nil {
		return err
	}
	defer func() { _ = cluster.Close() }()
	out := json.NewEncoder(os.Stdout)
	if err := out.Encode(cluster.Endpoints()[0]); err != nil {
		return err
	}
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		u, err := used()
		if err != nil {
			return err
		}
		if err := out.Encode(u); err != nil {
			return err
		}
	}
	return nil
}

// A server is an etcd in a process of its own.
type server struct {
	endpoint string
	command  *exec.Cmd
	in       io.WriteCloser
	out      *json.Decoder
}

func startServer() (*server, error) {
	program, err := os.Executable()
	if err != nil {
		return nil, err
	}
	s := &server{command: exec.Command(program)}
	s.command.Env = append(os.Environ(), serverEnv+"=1")
	s.command.Stderr = os.Stderr
	if s.in, err = s.command.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := s.command.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := s.command.Start(); err != nil {
		return nil, err
	}
	s.out = json.NewDecoder(out)
	return s, s.out.Decode(&s.endpoint)
}

func (s *server) used() (u usage, err error) {
	if _, err := fmt.Fprintln(s.in); err != nil {
		return usage{}, err
	}
	return u, s.out.Decode(&u)
}

func (s *server) stop() {
	_ = s.in.Close()
	_ = s.command.Wait()
}

// enableAuth makes a user root with a password.
func enableAuth(ctx context.Context, client *clientv3.Client, password string) error {
	if _, err := client.UserAdd(ctx, "root", password); err != nil {
		return err
	}
	if _, err := client.UserGrantRole(ctx, "root", "root"); err != nil {
		return err
	}
	_, err := client.AuthEnable(ctx)
	return err
}
