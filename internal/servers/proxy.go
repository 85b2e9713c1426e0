package main

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"time"

	"example.com/etcdutil/etcdtest"
)

// proxied is for how long a load runs through a proxy.
const proxied = 8 * time.Second

// throughProxy runs a load through `etcd grpc-proxy`, before one member, all of the same version.
func throughProxy(ctx context.Context, program string) error {
	if err := os.Setenv(serverVariable, program); err != nil {
		return err
	}
	cluster, err := etcdtest.New(1)
	if err != nil {
		return err
	}
	defer func() { _ = cluster.Close() }()
	endpoint, stop, err := startProxy(ctx, program, cluster.Endpoints())
	if err != nil {
		return err
	}
	defer stop()
	return underLoad(ctx, []string{endpoint}, func(ctx context.Context) error {
		wait(ctx, proxied)
		return nil
	})
}

func startProxy(ctx context.Context, program string, endpoints []string) (endpoint string, stop func(), err error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", nil, err
	}
	endpoint = listener.Addr().String()
	_ = listener.Close() // for the proxy
	dir, err := os.MkdirTemp("", "etcdutil-proxy-")
	if err != nil {
		return "", nil, err
	}
	var output bytes.Buffer
	command := exec.CommandContext(ctx, program, "grpc-proxy", "start",
		"--endpoints="+strings.Join(endpoints, ","), "--listen-addr="+endpoint,
		"--advertise-client-url="+endpoint, "--data-dir="+dir)
	command.Stdout, command.Stderr = &output, &output
	if err := command.Start(); err != nil {
		return "", nil, err
	}
	stop = func() {
		_ = command.Process.Kill()
		_ = command.Wait()
		_ = os.RemoveAll(dir)
	}
	for deadline := time.Now().Add(10 * time.Second); ; wait(ctx, 10*time.Millisecond) {
		conn, err := net.Dial("tcp", endpoint)
		if err == nil {
			return endpoint, stop, conn.Close()
		}
		if ctx.Err() != nil || time.Now().After(deadline) {
			stop()
			return "", nil, fmt.Errorf("the proxy does not listen: %w\n%s", err, output.String())
		}
	}
}
