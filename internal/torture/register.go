package main

import (
	"cmp"
	"context"
	"fmt"
	"math"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"time"

	"example.com/etcdutil"
	"github.com/anishathalye/porcupine"
	clientv3 "go.etcd.io/etcd/client/v3"
)

const (
	registerName = "register"
	registers    = 3
)

func registerKey(register int) string { return fmt.Sprintf("register-%d", register) }

// registerOp reads a register, or writes it.
type registerOp struct {
	register int
	write    bool
	value    string // that is written
}

// registerModel is a register whose writes have unknown outcomes: such a write has not returned by
// the end of the history.
var registerModel = porcupine.Model{
	Partition: func(history []porcupine.Operation) [][]porcupine.Operation {
		parts := make([][]porcupine.Operation, registers)
		for _, op := range history {
			register := op.Input.(registerOp).register
			parts[register] = append(parts[register], op)
		}
		return parts
	},
	Init: func() any { return "" },
	Step: func(state, input, output any) (bool, any) {
		if op := input.(registerOp); op.write {
			return true, op.value
		}
		return output == state, state
	},
	DescribeOperation: func(input, output any) string {
		if op := input.(registerOp); op.write {
			return fmt.Sprintf("%s = %q", registerKey(op.register), op.value)
		}
		return fmt.Sprintf("%s: %q", registerKey(input.(registerOp).register), output)
	},
}

// history is what was done to the registers, and what became of it.
type history struct {
	mu       sync.Mutex
	ops      []porcupine.Operation
	outcomes [registers]map[outcome]int64 // of the writes
}

const open = math.MaxInt64 // the return of a write whose outcome is unknown

func (h *history) read(client int, register int, value string, call, back time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ops = append(h.ops, porcupine.Operation{
		ClientId: client, Input: registerOp{register: register}, Output: value, Call: int64(call), Return: int64(back),
	})
}

// wrote leaves a refused write out: if somebody reads its value, nothing explains that.
func (h *history) wrote(client int, register int, value string, o outcome, call, back time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.outcomes[register] == nil {
		h.outcomes[register] = make(map[outcome]int64)
	}
	h.outcomes[register][o]++
	if o == refused {
		return
	}
	returned := int64(back)
	if o == unknown {
		returned = open
	}
	h.ops = append(h.ops, porcupine.Operation{
		ClientId: client, Input: registerOp{register, true, value}, Output: "", Call: int64(call), Return: returned,
	})
}

// operations leaves out the writes of unknown outcome that nobody has read: each of them may be put
// at the end of the history, and would only make it long to check.
func (h *history) operations() []porcupine.Operation {
	h.mu.Lock()
	defer h.mu.Unlock()
	seen := make(map[string]bool)
	for _, op := range h.ops {
		if !op.Input.(registerOp).write {
			seen[op.Output.(string)] = true
		}
	}
	ops := slices.DeleteFunc(slices.Clone(h.ops), func(op porcupine.Operation) bool {
		return op.Return == open && !seen[op.Input.(registerOp).value]
	})
	slices.SortStableFunc(ops, func(a, b porcupine.Operation) int { return cmp.Compare(a.Call, b.Call) })
	return ops
}

// checkVersion checks that each write was applied once: etcd counts them.
func (h *history) checkVersion(register int, version int64) (violations []string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	done, maybe := h.outcomes[register][acknowledged], h.outcomes[register][unknown]
	if version < done || version > done+maybe {
		violations = append(violations, fmt.Sprintf("register: %s was written %d times, but %d writes were acknowledged and %d are unknown",
			registerKey(register), version, done, maybe))
	}
	return violations
}

func (t *torture) startRegister(h *host) {
	n := 0
	t.work(h, registerName, true, func(w *worker) { w.useRegister(&n) })
	t.work(h, "", false, (*worker).lookAtRegister)
}

// useRegister reads and writes under the lock, at times after the parent's end.
func (w *worker) useRegister(n *int) {
	parent, cancel := context.WithCancel(w.ctx)
	defer cancel()
	lock, h := w.acquire(parent, registerName, w.options()...)
	if lock == nil {
		return
	}
	defer w.release(lock, h)
	if w.chance(20) {
		cancel()
	}
	for range w.upToTimes(4) {
		if register := w.rand.IntN(registers); w.chance(60) {
			*n++
			w.writeRegister(lock, register, strconv.Itoa(w.host.id)+"-"+strconv.Itoa(*n))
		} else {
			w.readRegister(register)
		}
		w.hold(w.ctx, w.upTo(60*time.Millisecond))
	}
}

func (w *worker) writeRegister(lock *etcdutil.Lock, register int, value string) {
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond+w.upTo(10*time.Second))
	defer cancel()
	call := w.now()
	_, err := lock.Commit(ctx, clientv3.OpPut(registerKey(register), value))
	o := outcomeOfCommit(err)
	w.history.wrote(w.host.id, register, value, o, call, w.now())
	w.operations.add("register write: "+string(o), 1)
}

func (w *worker) lookAtRegister() {
	w.readRegister(w.rand.IntN(registers))
	sleep(w.ctx, w.upTo(200*time.Millisecond))
}

func (w *worker) readRegister(register int) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	call := w.now()
	resp, err := w.host.client.Get(ctx, registerKey(register))
	if err != nil {
		return
	}
	value := ""
	if len(resp.Kvs) > 0 {
		value = string(resp.Kvs[0].Value)
	}
	w.history.read(w.host.id, register, value, call, w.now())
	w.operations.add("register read", 1)
}

// checkRegisters returns what porcupine says of the history.
func (t *torture) checkRegisters(ctx context.Context) (string, error) {
	for register := range registers {
		resp, err := t.admin.Get(ctx, registerKey(register))
		if err != nil {
			return "", fmt.Errorf("read %s: %w", registerKey(register), err)
		}
		version := int64(0)
		if len(resp.Kvs) > 0 {
			version = resp.Kvs[0].Version
		}
		for _, v := range t.history.checkVersion(register, version) {
			t.violate("%s", v)
		}
	}
	ops := t.history.operations()
	result, info := porcupine.CheckOperationsVerbose(registerModel, ops, 20*time.Second)
	if result != porcupine.Illegal {
		return fmt.Sprintf("%s, %d operations", result, len(ops)), nil
	}
	picture := filepath.Join(t.pictures, fmt.Sprintf("torture-%d.html", t.seed))
	if err := porcupine.VisualizePath(registerModel, info, picture); err != nil {
		picture = err.Error()
	}
	t.violate("register: the history is not linearizable; picture: %s", picture)
	return fmt.Sprintf("%s, %d operations", result, len(ops)), nil
}
