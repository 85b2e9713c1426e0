// Servers tries the package against real servers of etcd: the newest releases of each minor version
// that it supports.
//
//	go run ./internal/servers          # everything, some 25 minutes
//	go run ./internal/servers -short   # what the gate runs, under 4 minutes
//
// It builds the servers from the Go module proxy, into the user's cache directory, and then
//   - runs the package's tests against each version, with -short those of the subjects in
//     shortTests, and not against the newest;
//   - runs the torture against three members of each version (not with -short);
//   - upgrades three members from the oldest version to the newest, one after the other, under
//     load: locks may be lost, and no increment that was acknowledged is;
//   - puts each version's gRPC proxy (`etcd grpc-proxy`) before a member of that version, under
//     load.
//
// It exits with 1 at the first failure.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"time"
)

// versions are the servers, the oldest first. Each may be upgraded to the next.
var versions = []string{"3.5.35", "3.6.16", "3.7.3"}

const (
	// serverVariable has package etcdtest run a program.
	serverVariable = "ETCDTEST_SERVER"
	// shortTests are those of the package's tests that -short runs: what the rest is built on.
	shortTests = "^Test(Acquire|TryAcquire|Commit|Lock|Log|Lease|Watch|Permissions)"
)

func main() {
	short := flag.Bool("short", false, "run a part, for the gate")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, *short); err != nil {
		fmt.Fprintln(os.Stderr, "servers:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, short bool) error {
	programs := make([]string, len(versions))
	for i, version := range versions {
		var err error
		if programs[i], err = build(ctx, version); err != nil {
			return fmt.Errorf("build etcd %s: %w", version, err)
		}
	}
	for i, program := range programs {
		if short && i == len(programs)-1 {
			continue // `go test` has run its tests, in its process
		}
		if err := test(ctx, program, short); err != nil {
			return err
		}
	}
	if err := step("upgrade "+versions[0]+" to "+versions[len(versions)-1]+" under load", func() error {
		return upgrade(ctx, programs)
	}); err != nil {
		return err
	}
	for i, program := range programs {
		if err := step("gRPC proxy of "+versions[i]+" under load", func() error {
			return throughProxy(ctx, program)
		}); err != nil {
			return err
		}
	}
	return nil
}

// test runs the package's tests and the torture against one version.
func test(ctx context.Context, program string, short bool) error {
	arguments := []string{"test", "-count=1", "-timeout=10m"}
	if short {
		arguments = append(arguments, "-run="+shortTests)
	}
	if err := goWith(ctx, program, append(arguments, ".")...); err != nil {
		return err
	}
	if short {
		return nil
	}
	return goWith(ctx, program, "run", "./internal/torture", "-for=60s")
}

// goWith runs the go command with members that run program.
func goWith(ctx context.Context, program string, arguments ...string) error {
	command := exec.CommandContext(ctx, "go", arguments...)
	command.Env = append(os.Environ(), serverVariable+"="+program)
	command.Stdout, command.Stderr = os.Stdout, os.Stderr
	return step(fmt.Sprintf("%s=%s %v", serverVariable, program, command.Args), command.Run)
}

// step prints what is done, and how long it took.
func step(what string, do func() error) error {
	fmt.Println("--", what)
	begun := time.Now()
	if err := do(); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	fmt.Printf("   %v\n", time.Since(begun).Round(100*time.Millisecond))
	return nil
}
