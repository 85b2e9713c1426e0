// Package etcdmetrics counts what etcdutil's resources do, for Prometheus. Copy it, and change what
// your alerts need.
//
// The lock's name is a label. Where locks have thousands of names, map them to a few in New's
// label.
package etcdmetrics

import (
	"context"
	"errors"
	"sync"
	"time"

	"example.com/etcdutil"
	"github.com/prometheus/client_golang/prometheus"
)

// Metrics are the metrics of one process. All methods are safe for concurrent use.
type Metrics struct {
	registry prometheus.Registerer
	label    func(lockName string) string

	mu    sync.Mutex
	locks map[string]*counts // by label

	held, waiting         *prometheus.GaugeVec
	acquireTime, heldTime *prometheus.HistogramVec
	losses, released      *prometheus.CounterVec
	renewalTime, timeLeft prometheus.Histogram
	retries, resyncs      *prometheus.CounterVec
}

// counts are how many calls want a lock, and how many locks are held.
type counts struct{ candidates, held int }

// New registers the metrics. label maps a lock's name to a label; nil means the name itself.
func New(registry prometheus.Registerer, label func(lockName string) string) *Metrics {
	if label == nil {
		label = func(name string) string { return name }
	}
	m := &Metrics{
		registry: registry, label: label, locks: make(map[string]*counts),
		held: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "etcdutil_locks_held", Help: "Locks that this process holds.",
		}, []string{"name"}),
		waiting: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "etcdutil_locks_waiting", Help: "Calls that wait for a lock, by Metrics.Wait.",
		}, []string{"name"}),
		acquireTime: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "etcdutil_lock_acquire_seconds", Help: "Time from the call until the lock is held.",
			Buckets: prometheus.ExponentialBuckets(0.001, 4, 9),
		}, []string{"name"}),
		heldTime: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "etcdutil_lock_held_seconds", Help: "Time that a lock was held, until it was released or lost.",
			Buckets: prometheus.ExponentialBuckets(0.001, 8, 9),
		}, []string{"name"}),
		losses: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "etcdutil_lock_losses_total", Help: "Locks that were lost, by cause: expired, revoked, deleted.",
		}, []string{"name", "cause"}),
		released: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "etcdutil_lock_releases_total", Help: "Locks that were released.",
		}, []string{"name"}),
		renewalTime: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "etcdutil_lease_renewal_seconds", Help: "Round trip of a lease's renewal.",
			Buckets: prometheus.ExponentialBuckets(0.001, 3, 9),
		}),
		timeLeft: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "etcdutil_lease_left_seconds", Help: "Time that a lease had left when its renewal was answered.",
			Buckets: []float64{0.1, 0.25, 0.5, 1, 2, 4, 6, 10, 20, 40},
		}),
		retries: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "etcdutil_retries_total", Help: "Attempts that failed and were repeated.",
		}, []string{"op"}),
		resyncs: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "etcdutil_watch_resyncs_total", Help: "Times that a watch listed again.",
		}, []string{"key"}),
	}
	registry.MustRegister(m.held, m.waiting, m.acquireTime, m.heldTime, m.losses, m.released,
		m.renewalTime, m.timeLeft, m.retries, m.resyncs)
	return m
}

// Observer returns the option that feeds the metrics. Pass it to every constructor.
func (m *Metrics) Observer() etcdutil.Option {
	return etcdutil.WithObserver(etcdutil.Observer{
		Acquired: func(e etcdutil.LockEvent) {
			m.count(e.Name, 0, 1)
			m.acquireTime.WithLabelValues(m.label(e.Name)).Observe(e.Took.Seconds())
		},
		Released: func(e etcdutil.LockEvent) {
			m.count(e.Name, 0, -1)
			m.released.WithLabelValues(m.label(e.Name)).Inc()
			m.heldTime.WithLabelValues(m.label(e.Name)).Observe(e.Took.Seconds())
		},
		Lost: func(e etcdutil.LockEvent) {
			m.count(e.Name, 0, -1)
			m.losses.WithLabelValues(m.label(e.Name), cause(e.Err)).Inc()
			m.heldTime.WithLabelValues(m.label(e.Name)).Observe(e.Took.Seconds())
		},
		Renewed: func(e etcdutil.LeaseEvent) {
			m.renewalTime.Observe(e.Took.Seconds())
			m.timeLeft.Observe(e.Left.Seconds())
		},
		Retrying: func(e etcdutil.RetryEvent) { m.retries.WithLabelValues(e.Op).Inc() },
		Resynced: func(e etcdutil.WatchEvent) { m.resyncs.WithLabelValues(e.Key).Inc() },
	})
}

func cause(err error) string {
	switch {
	case errors.Is(err, etcdutil.ErrLeaseExpired):
		return "expired"
	case errors.Is(err, etcdutil.ErrLeaseRevoked):
		return "revoked"
	}
	return "deleted"
}

// Wait counts a call that waits for the lock of this name, or holds it, until done is called:
//
//	defer m.Wait("scheduler/leader")()
//	return etcdutil.Lead(ctx, client, "scheduler/leader", fn, m.Observer())
func (m *Metrics) Wait(lockName string) (done func()) {
	m.count(lockName, 1, 0)
	return func() { m.count(lockName, -1, 0) }
}

func (m *Metrics) count(lockName string, candidates, held int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	label := m.label(lockName)
	c := m.locks[label]
	if c == nil {
		c = &counts{}
		m.locks[label] = c
	}
	c.candidates += candidates
	c.held += held
	m.held.WithLabelValues(label).Set(float64(c.held))
	m.waiting.WithLabelValues(label).Set(float64(max(c.candidates-c.held, 0)))
}

// Mirror exports how old the copy of a mirror is: pass its AsOf.
func (m *Metrics) Mirror(name string, asOf func() time.Time) {
	m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "etcdutil_mirror_age_seconds", Help: "Time since the copy was known to be up to date.",
		ConstLabels: prometheus.Labels{"mirror": name},
	}, func() float64 { return time.Since(asOf()).Seconds() }))
}

// Lease exports how long a lease has left unless it is renewed, and 0 when it has ended.
func (m *Metrics) Lease(name string, lease *etcdutil.Lease) {
	m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "etcdutil_lease_expiry_seconds", Help: "Time until the lease expires unless it is renewed.",
		ConstLabels: prometheus.Labels{"lease": name},
	}, func() float64 {
		if context.Cause(lease) != nil {
			return 0
		}
		return time.Until(lease.Expiry()).Seconds()
	}))
}
