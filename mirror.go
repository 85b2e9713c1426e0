package etcdutil

import (
	"context"
	"fmt"
	"hash/maphash"
	"iter"
	"log/slog"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// Mirror is a live typed copy of a key, or of all keys with a prefix. [NewMirror] makes it. Read it
// by [Mirror.Get] and [Mirror.All]. Close ends it, and so does its parent. The zero Mirror is not
// usable.
//
// It is a context.Context: Done is closed when the mirror is no longer kept up to date. The copy
// can still be read then. Err returns only context.Canceled or context.DeadlineExceeded.
// context.Cause returns why it ended: [ErrClosed], the parent's cause, or an error that says so if
// the client was closed.
//
// All methods are safe for concurrent use.
type Mirror[T any] struct {
	lifetime
	config watchConfig
	key    string

	current atomic.Pointer[mirrorCopy[T]]
	asOf    atomic.Pointer[time.Time]
	watcher atomic.Pointer[Watcher[decoded[T]]] // nil before the first
	reports *Notify[mirrorReport]
	asked   atomic.Int64 // how many reports of the watcher were asked for
	changes *Notify[Revision]
	running sync.WaitGroup
}

// A mirrorReport says how far the copy has come.
type mirrorReport struct {
	upTo  Revision
	asked int64 // the watch stood after a report of this number was asked for
}

const (
	// mirrorMaxBackoff is the longest delay between two attempts to reach etcd, unless the policy
	// says otherwise. It leaves time to be right again within 2 s of etcd being back.
	mirrorMaxBackoff = 500 * time.Millisecond
	// verifyInterval is the longest time between two checks that the copy is up to date.
	verifyInterval = time.Second
	// verifyTimeout bounds one check.
	verifyTimeout = 2 * time.Second
)

// NewMirror copies a key, or with [WithPrefix] all keys that begin with it, into memory, and keeps
// the copy up to date. It returns when the copy is complete. ctx is the mirror's parent, and not a
// timeout of the call. A nil ctx or client panics.
//
// The mirror outlives outages of any length, compaction, a restore from a backup, and a permission
// that is taken away and given back. After missing changes it lists the keys again. It is right
// again within 2 s of etcd's return, unless the list takes longer, or [WithRetryPolicy] sets a Max
// above 500 ms, which is the default here.
//
// The keys need about the memory of a Go map of the decoded values. A mirror runs two goroutines,
// whatever the number of keys. It sends one small read a second, by which [Mirror.AsOf] moves, and
// while other keys are written one request for progress.
//
// Values are decoded by the codec of [WithCodec]. [WithRevision] and [WithPrev] are refused.
// [WithSnapshot] has no effect.
//
// Errors:
//   - An error that names the argument if key is empty without WithPrefix, or an option is refused.
//   - rpctypes.ErrPermissionDenied if the keys may not be read. Later that does not end the mirror.
//   - What etcd answered last, if [RetryPolicy] gave up. That bounds the time without an answer
//     during this call. Later there is no bound.
//   - ctx's end.
func NewMirror[T any](ctx context.Context, client *clientv3.Client, key string, opts ...WatchOption) (*Mirror[T], error) {
	if err := requireClient(ctx, client); err != nil {
		return nil, err
	}
	c := watchConfig{config: newConfig(client), codec: JSON}
	for _, o := range opts {
		o.applyWatch(&c)
	}
	c.finish()
	if err := c.validateMirror(key); err != nil {
		return nil, err
	}
	m, err := newMirror[T](ctx, key, c)
	if err != nil {
		return nil, errorf("mirror %q: %w", key, err)
	}
	return m, nil
}

func (c *watchConfig) validateMirror(key string) error {
	switch {
	case c.from != 0:
		return errorf("WithRevision cannot be used with NewMirror, which begins with the current keys")
	case c.prev:
		return errorf("WithPrev cannot be used with NewMirror, which has no events")
	}
	return c.validate(key)
}

func newMirror[T any](ctx context.Context, key string, c watchConfig) (*Mirror[T], error) {
	c.snapshot, c.relists, c.reports = true, true, true
	c.codec = decodedCodec{c.codec}
	if c.retry.Max == 0 {
		c.retry.Max = max(mirrorMaxBackoff, c.retry.Initial)
	}
	m := &Mirror[T]{config: c, key: key}
	m.init(ctx)
	m.reports, m.changes = NewNotify[mirrorReport](m.ctx), NewNotify[Revision](m.ctx)
	began := time.Now()
	w, err := m.load()
	if err != nil {
		m.shutdown(err)
		return nil, err
	}
	m.asOf.Store(&began)
	m.config.retry.Elapsed, m.config.retry.Attempts = -1, 0
	m.running.Go(func() { m.run(w) }) // both until the context ends
	m.running.Go(m.keepVerifying)
	return m, nil
}

// load makes the first copy. It returns the watcher that has made it.
func (m *Mirror[T]) load() (*Watcher[decoded[T]], error) {
	w, err := m.open()
	if err != nil {
		return nil, err
	}
	elapsed := m.config.retry.withDefaults().Elapsed
	quiet := time.NewTimer(max(elapsed, 0))
	if elapsed < 0 {
		quiet.Stop()
	}
	defer quiet.Stop()
	f := &mirrorFollower[T]{m: m, w: w}
	for m.current.Load() == nil {
		select {
		case e, ok := <-w.Events():
			if !ok {
				return nil, m.loadError(w)
			}
			f.take(e)
			if elapsed > 0 {
				quiet.Reset(elapsed)
			}
		case <-m.Done():
			return nil, m.loadError(w)
		case <-quiet.C:
			inBackground(func() { _ = w.Close() })
			return nil, fmt.Errorf("no answer within %v: %w", elapsed, withFailure(context.DeadlineExceeded, w.lastFailure()))
		}
	}
	return w, nil
}

func withFailure(err, failure error) error {
	if failure == nil {
		return err
	}
	return fmt.Errorf("%w: %w", err, failure)
}

// loadError returns why the first copy cannot be made. The codec may block the watcher.
func (m *Mirror[T]) loadError(w *Watcher[decoded[T]]) error {
	inBackground(func() { _ = w.Close() })
	if m.Err() != nil {
		return contextError(m)
	}
	return context.Cause(w)
}

func (m *Mirror[T]) open() (*Watcher[decoded[T]], error) {
	w, err := newWatcher[decoded[T]](m.ctx, m.key, &m.config)
	if err == nil {
		m.watcher.Store(w)
	}
	return w, err
}

// run follows etcd. A watcher that ends although the mirror's context has not, because its
// permission was taken away, is followed by another.
func (m *Mirror[T]) run(w *Watcher[decoded[T]]) {
	for failed := 0; ; {
		if w != nil && m.follow(w) {
			failed = 0
		}
		if m.Err() != nil {
			return
		}
		if m.config.client.Ctx().Err() != nil {
			m.shutdown(errClientClosed)
			return
		}
		failed++
		sleep(m.ctx, m.config.retry.withDefaults().backoff(failed))
		var err error
		if w, err = m.open(); err != nil && m.Err() == nil {
			m.config.reporter.mirrorFailing(m.key, failed, err)
		}
	}
}

// mirrorFailing reports that a mirror cannot be kept up to date for now. It logs the first attempt.
func (r *reporter) mirrorFailing(key string, attempt int, err error) {
	if r == nil {
		return
	}
	r.submit(func() {
		if attempt == 1 {
			r.log(slog.LevelWarn, "mirror cannot be kept up to date", "key", key, "error", err)
		}
		call(r.observer.Retrying, RetryEvent{Op: "mirror", Attempt: attempt, Err: err})
	})
}

// follow applies what comes from w until it ends. It reports whether the copy was right meanwhile.
func (m *Mirror[T]) follow(w *Watcher[decoded[T]]) (synced bool) {
	defer func() { _ = w.Close() }() // which waits no longer than 5 s for a codec that blocks
	f := &mirrorFollower[T]{m: m, w: w}
	for {
		select {
		case e, ok := <-w.Events():
			if !ok {
				return synced
			}
			f.take(e)
			synced = synced || f.draft == nil
		case <-m.Done():
			return synced
		}
	}
}

// Get returns the value of key, which is the whole key even if the mirror has a prefix. If the
// value in etcd does not decode, Get returns the last one that did; see [Mirror.Invalid]. ok is
// false if there is none.
//
// Get never blocks. Each call reads the newest copy: for two values of one revision use
// [Mirror.All]. All readers share the values: do not change what they point to.
func (m *Mirror[T]) Get(key string) (v T, ok bool) {
	have, ok := m.current.Load().values.get(key)
	return have.value, ok
}

// All iterates over the keys and values, as Get returns them, in the order of keys. All of them are
// of one revision, the newest when the iteration begins. The first iteration after keys were added
// or removed sorts them.
func (m *Mirror[T]) All() iter.Seq2[string, T] {
	return func(yield func(string, T) bool) {
		for key, have := range m.current.Load().values.sorted() {
			if !yield(key, have.value) {
				return
			}
		}
	}
}

// Len returns the number of keys that All iterates over.
func (m *Mirror[T]) Len() int { return m.current.Load().values.len }

// Invalid iterates over the keys whose value in etcd does not decode, in the order of keys. Each
// error Is [ErrInvalidValue] and wraps the codec's. Get still returns the last value that decoded,
// if there was one since the mirror was made.
func (m *Mirror[T]) Invalid() iter.Seq2[string, error] {
	return func(yield func(string, error) bool) {
		for key, bad := range m.current.Load().invalid.sorted() {
			if !yield(key, bad.err) {
				return
			}
		}
	}
}

// Revision returns the revision of etcd that the copy is of. It grows even if no mirrored key
// changes. It goes back only if etcd is restored from a backup.
func (m *Mirror[T]) Revision() Revision { return m.current.Load().revision }

// AsOf returns a time at which the copy was equal to etcd. Everything written before that time has
// been copied.
//
// While etcd can be reached, that time is rarely more than 1 s ago; through etcd's gRPC proxy up to
// 15 s. It stands still while etcd cannot be reached, and while the member that serves the watch is
// cut off from the others. For a readiness probe compare time.Since(m.AsOf()) with how stale a copy
// may be.
func (m *Mirror[T]) AsOf() time.Time { return *m.asOf.Load() }

// Changes returns a receiver of the latest revision at which the copy changed: a value, whether it
// exists, or whether it decodes. Several changes may be received as one. The first copy is no
// change, and neither is a list that finds nothing new. After the mirror's end Recv returns the
// cause, as [Receiver.Recv] says.
func (m *Mirror[T]) Changes() *Receiver[Revision] { return m.changes.Receiver() }

// Wait waits until the copy is of revision r or later. To read your own write, pass the revision in
// the header of its response, whichever key was written. Wait asks etcd how far the watch has come,
// and takes a round trip or two. A revision from before a restore may never come. Until the mirror
// has noticed a restore and listed the keys again, a revision that the old copy had reached counts
// as reached. A nil ctx panics.
//
// Errors:
//   - An error that Is both ctx.Err() and context.Cause(ctx) if ctx ended. ctx bounds this call.
//   - The mirror's cause if it ended before the copy was of r.
func (m *Mirror[T]) Wait(ctx context.Context, r Revision) error {
	if ctx == nil {
		panic("etcdutil: nil ctx")
	}
	if m.Revision() >= r {
		return nil
	}
	if err := m.await(ctx, mirrorReport{upTo: r}, true); err != nil {
		return errorf("wait for revision %d of mirror %q: %w", r, m.key, err)
	}
	return nil
}

// await waits for a report that is at least the wanted one. It asks etcd how far the watch has
// come, after a while also if ask is false: then no change is expected.
func (m *Mirror[T]) await(ctx context.Context, wanted mirrorReport, ask bool) error {
	reports, number := m.reports.Receiver(), max(wanted.asked, m.asked.Load())
	for pause := 10 * time.Millisecond; ; pause, ask = min(2*pause, mirrorMaxBackoff), true {
		w := m.watcher.Load()
		w.report(number)
		if ask {
			w.askProgress()
		}
		attempt, cancel := context.WithTimeout(ctx, pause)
		err := receiveReport(attempt, reports, wanted)
		cancel()
		switch {
		case err == nil:
			return nil
		case ctx.Err() != nil:
			return contextError(ctx)
		case m.Err() != nil:
			return m.endError()
		}
	}
}

func receiveReport(ctx context.Context, reports *Receiver[mirrorReport], wanted mirrorReport) error {
	for {
		if r, err := reports.Recv(ctx); err != nil || r.upTo >= wanted.upTo && r.asked >= wanted.asked {
			return err
		}
	}
}

func (m *Mirror[T]) endError() error {
	if cause := context.Cause(m.stopCtx); cause != nil {
		return cause
	}
	return contextError(m)
}

// A mirrorCheck is a state of etcd that the copy has to reach.
type mirrorCheck struct {
	mirrorReport
	sent time.Time // before it was read
}

// keepVerifying moves AsOf until the context ends.
func (m *Mirror[T]) keepVerifying() {
	var open mirrorCheck
	for m.Err() == nil {
		open = m.verify(open)
		sleep(m.ctx, verifyInterval/2+rand.N(verifyInterval/2))
	}
}

// verify reads the state of etcd and moves AsOf to now, if the copy reaches it. If not, it returns
// what is to be reached first the next time: behind etcd's gRPC proxy a quiet watch takes seconds
// to show how far it has come, and the store goes on meanwhile. open is what it returned the last
// time, zero if there is none.
func (m *Mirror[T]) verify(open mirrorCheck) mirrorCheck {
	ctx, cancel := context.WithTimeout(m.ctx, verifyTimeout)
	defer cancel()
	now, err := m.readState(ctx)
	if err != nil {
		return open
	}
	checks := []mirrorCheck{open, now}
	if open.upTo == 0 || now.upTo < open.upTo { // none, or etcd was restored
		checks = checks[1:]
	}
	for _, c := range checks {
		if m.await(ctx, c.mirrorReport, m.Revision() < c.upTo) != nil {
			return c
		}
		m.asOf.Store(&c.sent)
	}
	return mirrorCheck{}
}

// readState reads the store's revision, from the quorum, which the watch has to report that it has
// reached. A report that was asked for before the read would prove nothing, nor would a copy of the
// same revision: etcd may have been restored since. If the store has gone back, the watch has yet
// to notice.
func (m *Mirror[T]) readState(ctx context.Context) (mirrorCheck, error) {
	before, sent := m.watcher.Load().received(), time.Now()
	key := m.key
	if key == "" {
		key = "\x00" // etcd reads no empty key
	}
	once := RetryPolicy{Attempts: 1, AttemptTimeout: verifyTimeout}
	resp, err := retry(ctx, &m.config.config, once, "verify mirror", func(ctx context.Context) (*clientv3.GetResponse, error) {
		return m.config.client.Get(ctx, key, clientv3.WithKeysOnly())
	})
	switch {
	case err != nil:
		return mirrorCheck{}, err
	case resp.Header.Revision < before:
		return mirrorCheck{}, errRestored
	}
	return mirrorCheck{mirrorReport{resp.Header.Revision, m.asked.Add(1)}, sent}, nil
}

// Close ends the mirror with ErrClosed and waits for what it has started, for at most 5 s if the
// codec blocks. It returns nil, or the cause if the mirror had ended before by itself, because its
// client was closed. So do further calls. The copy can still be read.
func (m *Mirror[T]) Close() error {
	m.shutdown(ErrClosed)
	m.running.Wait()
	m.config.reporter.flush()
	if cause := context.Cause(m.stopCtx); cause != ErrClosed {
		return cause
	}
	return nil
}

// mirrorCopy is the copy as of one revision. It never changes.
type mirrorCopy[T any] struct {
	values   *table[decoded[T]]
	invalid  *table[invalidValue] // in etcd; there may be an earlier one in values
	revision Revision
}

// invalidValue is a value that does not decode.
type invalidValue struct {
	err error
	sum uint64
}

// sum returns the checksum of the value that etcd has for key.
func (c *mirrorCopy[T]) sum(key string) (sum uint64, ok bool) {
	if bad, ok := c.invalid.get(key); ok {
		return bad.sum, true
	}
	have, ok := c.values.get(key)
	return have.sum, ok
}

// keys returns how many keys etcd has.
func (c *mirrorCopy[T]) keys() int {
	n := c.values.len
	for key := range c.invalid.all() {
		if _, ok := c.values.get(key); !ok {
			n++
		}
	}
	return n
}

// mirrorFollower applies what comes from one watcher.
type mirrorFollower[T any] struct {
	m     *Mirror[T]
	w     *Watcher[decoded[T]]
	draft *mirrorDraft[T] // nil between two transactions
	asked int64           // the number of the last eventReport
}

// take applies an event. The copy changes after the last event of a transaction or of a list.
func (f *mirrorFollower[T]) take(e Event[decoded[T]]) {
	switch e.Type {
	case eventListing:
		f.draft = newMirrorList(f.m.current.Load())
	case eventProgress:
		f.moveTo(e.Revision)
	case eventReport:
		f.asked = max(f.asked, e.Version)
		f.moveTo(e.Revision)
	case EventSynced:
		f.publish(e.Revision, e.Revision)
	default:
		f.change(e)
	}
}

func (f *mirrorFollower[T]) change(e Event[decoded[T]]) {
	if f.draft == nil {
		f.draft = newMirrorDraft(f.m.current.Load())
	}
	f.draft.apply(e)
	if f.draft.list {
		return
	}
	if upTo := f.w.Revision(); upTo >= e.Revision { // else more of the transaction is to come
		f.publish(upTo, e.Revision)
	}
}

func (f *mirrorFollower[T]) publish(upTo, changed Revision) {
	next, differs := f.draft.done(upTo)
	f.draft = nil
	first := f.m.current.Swap(next) == nil
	_ = f.m.reports.Send(mirrorReport{upTo, f.asked})
	if differs && !first {
		_ = f.m.changes.Send(changed)
	}
}

// moveTo takes the report that nothing has changed up to a revision.
func (f *mirrorFollower[T]) moveTo(upTo Revision) {
	if f.draft != nil {
		return // more is to come
	}
	next := *f.m.current.Load()
	next.revision = upTo
	f.m.current.Store(&next)
	_ = f.m.reports.Send(mirrorReport{upTo, f.asked})
}

// mirrorDraft is the next copy in the making: what old becomes by changes, or what a list says.
type mirrorDraft[T any] struct {
	old     *mirrorCopy[T] // nil before the first list
	values  *tableEdit[decoded[T]]
	invalid *tableEdit[invalidValue]

	list   bool
	listed int // keys of the list
	same   int // of them that old has with the same value
}

func newMirrorDraft[T any](old *mirrorCopy[T]) *mirrorDraft[T] {
	return &mirrorDraft[T]{old: old, values: old.values.edit(), invalid: old.invalid.edit()}
}

func newMirrorList[T any](old *mirrorCopy[T]) *mirrorDraft[T] {
	return &mirrorDraft[T]{old: old, values: newTableEdit[decoded[T]](), invalid: newTableEdit[invalidValue](), list: true}
}

func (d *mirrorDraft[T]) apply(e Event[decoded[T]]) {
	switch e.Type {
	case EventPut:
		d.put(e.Key, e.Value)
	case EventInvalid:
		d.putInvalid(e.Key, invalidValue{e.Err, valueSum(e.Raw)})
	case EventDelete:
		d.values.delete(e.Key)
		d.invalid.delete(e.Key)
	}
}

func (d *mirrorDraft[T]) put(key string, v decoded[T]) {
	if d.isSame(key, v.sum) {
		if have, ok := d.old.values.get(key); ok && have.sum == v.sum {
			v = have // one value in memory is enough while both copies are
		}
	}
	d.values.set(key, v)
	d.invalid.delete(key)
}

func (d *mirrorDraft[T]) putInvalid(key string, bad invalidValue) {
	d.isSame(key, bad.sum)
	if d.list && d.old != nil {
		if good, ok := d.old.values.get(key); ok {
			d.values.set(key, good)
		}
	}
	d.invalid.set(key, bad)
}

// isSame counts a key of a list, and reports whether old has it with the same value.
func (d *mirrorDraft[T]) isSame(key string, sum uint64) bool {
	if !d.list {
		return false
	}
	d.listed++
	if d.old == nil {
		return false
	}
	before, ok := d.old.sum(key)
	if !ok || before != sum {
		return false
	}
	d.same++
	return true
}

// done returns the copy, and whether it differs from the old one.
func (d *mirrorDraft[T]) done(rev Revision) (next *mirrorCopy[T], differs bool) {
	differs = !d.list || d.old == nil || d.same != d.listed || d.listed != d.old.keys()
	return &mirrorCopy[T]{d.values.done(), d.invalid.done(), rev}, differs
}

// decoded is a value, and a checksum of its bytes, by which a list recognizes what is the same.
type decoded[T any] struct {
	value T
	sum   uint64
}

// decode is of the pointer, so that a codec without type parameters can call it.
func (d *decoded[T]) decode(codec Codec, data []byte) error {
	d.sum = valueSum(data)
	return codec.Unmarshal(data, &d.value)
}

func valueSum(data []byte) uint64 { return maphash.Bytes(tableSeed, data) }

// decodedCodec decodes values by another codec.
type decodedCodec struct{ Codec }

func (c decodedCodec) Unmarshal(data []byte, v any) error {
	return v.(interface {
		decode(codec Codec, data []byte) error
	}).decode(c.Codec, data)
}
