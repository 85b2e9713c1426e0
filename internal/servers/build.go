package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

// build returns the program of a version of etcd. It is built once: `go install` refuses etcd's
// modules, whose go.mod files have replace directives, so a module of its own requires them.
func build(ctx context.Context, version string) (string, error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(cache, "etcdutil-servers")
	program := filepath.Join(dir, "etcd-"+version)
	if _, err := os.Stat(program); err == nil {
		return program, nil
	}
	return program, step("build etcd "+version, func() error {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		module, err := os.MkdirTemp(dir, "module-")
		if err != nil {
			return err
		}
		defer func() { _ = os.RemoveAll(module) }()
		return buildIn(ctx, module, version, program)
	})
}

func buildIn(ctx context.Context, module, version, program string) error {
	const server = "go.etcd.io/etcd/server/v3"
	half := filepath.Join(module, "etcd")
	for _, arguments := range [][]string{
		{"mod", "init", "servers"},
		{"get", server + "@v" + version},
		{"build", "-o", half, server},
	} {
		command := exec.CommandContext(ctx, "go", arguments...)
		command.Dir = module
		command.Env = append(os.Environ(), "GOFLAGS=-mod=mod", "GOWORK=off")
		if output, err := command.CombinedOutput(); err != nil {
			return fmt.Errorf("go %v: %w\n%s", arguments, err, output)
		}
	}
	return os.Rename(half, program) // at once, so that nobody runs half of it
}
