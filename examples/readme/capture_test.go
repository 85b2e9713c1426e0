package main

import (
	"bytes"
	"io"
	"log"
	"os"
	"strings"
	"sync"
	"testing"
)

// output is what the quick starts have logged.
type output struct {
	mu  sync.Mutex
	log bytes.Buffer
}

// capture sends the standard logger to the output it returns, until the test ends.
func capture(t *testing.T) *output {
	out := &output{}
	log.SetOutput(io.MultiWriter(os.Stderr, out))
	t.Cleanup(func() { log.SetOutput(os.Stderr) })
	return out
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.log.Write(p)
}

func (o *output) contains(s string) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return strings.Contains(o.log.String(), s)
}
