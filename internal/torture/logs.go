package main

import (
	"context"
	"log/slog"
	"sync"
)

// logs is where locks log at times. While a fault lasts it blocks, or panics: only the lock that
// logs may suffer from that.
type logs struct {
	mu      sync.Mutex
	blocked chan struct{} // nil unless it blocks; closed when it no longer does
	panics  bool
}

func (l *logs) start(k kind) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.panics = k == panicLogs
	if k == blockLogs {
		l.blocked = make(chan struct{})
	}
}

func (l *logs) stop() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.blocked != nil {
		close(l.blocked)
	}
	l.blocked, l.panics = nil, false
}

// Handle is slog.Handler's.
func (l *logs) Handle(context.Context, slog.Record) error {
	l.mu.Lock()
	blocked, panics := l.blocked, l.panics
	l.mu.Unlock()
	if panics {
		panic("torture: a logger panics")
	}
	if blocked != nil {
		<-blocked
	}
	return nil
}

// Enabled is slog.Handler's.
func (l *logs) Enabled(context.Context, slog.Level) bool { return true }

// WithAttrs is slog.Handler's.
func (l *logs) WithAttrs([]slog.Attr) slog.Handler { return l }

// WithGroup is slog.Handler's.
func (l *logs) WithGroup(string) slog.Handler { return l }
