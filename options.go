package etcdutil

import (
	"context"
	"errors"
	"log/slog"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// An Option is accepted by every constructor that takes options, and by [Retry] and [Holder].
type Option interface {
	LeaseOption
	RetryOption
	WatchOption
	LogOption
	RegisterOption
}

// A RegisterOption shapes a registration: WithTTL, WithKeepAliveInterval, WithExpiryMargin,
// WithCodec, and every [Option].
type RegisterOption interface{ applyRegister(*registerConfig) }

// WithLogger sets where a resource logs. It never writes a value or a credential. The default, and
// nil, discards. It writes one line
//   - at level Info when a lock is acquired or released, or a registration is written again;
//   - at level Warn when a lock or lease is lost, a renewal is late or refused, a registration is
//     replaced, a retry starts (once per outage), a watch lists again or cannot be resumed, a
//     mirror cannot be kept up to date, or a lock's key cannot be watched.
//
// The handler runs on a goroutine that nothing waits for, except that Close waits for its last line
// for up to 25 ms.
func WithLogger(l *slog.Logger) Option {
	if l == nil {
		l = discard
	}
	return option(func(c *config) { c.logger = l })
}

// WithRetryPolicy sets how requests to etcd are retried. The default is the zero [RetryPolicy]. A
// policy with a negative Initial, Max, Attempts or AttemptTimeout, or a Max below its Initial, is
// refused.
func WithRetryPolicy(p RetryPolicy) Option {
	return option(func(c *config) { c.retry = p })
}

var discard = slog.New(slog.DiscardHandler)

// config is what every constructor takes.
type config struct {
	client   *clientv3.Client // nil in Retry
	logger   *slog.Logger
	observer *Observer
	retry    RetryPolicy
	reporter *reporter // set by finish, unless it is given
}

func newConfig(client *clientv3.Client) config { return config{client: client, logger: discard} }

// finish is called when all options have been applied.
func (c *config) finish() {
	if c.reporter == nil { // else several resources share one
		c.reporter = newReporter(c.logger, c.observer)
	}
}

type option func(*config)

func (o option) applyRetry(c *config)            { o(c) }
func (o option) applyLease(c *leaseConfig)       { o(&c.config) }
func (o option) applyLock(c *lockConfig)         { o(&c.config) }
func (o option) applyWatch(c *watchConfig)       { o(&c.config) }
func (o option) applyLog(c *logConfig)           { o(&c.config) }
func (o option) applyRegister(c *registerConfig) { o(&c.config) }

// registerConfig is what Register takes.
type registerConfig struct {
	leaseConfig
	ttl   *time.Duration
	codec Codec
}

// requireClient panics on what only a programming error passes, and refuses a client that has no
// connection.
func requireClient(ctx context.Context, client *clientv3.Client) error {
	if ctx == nil {
		panic("etcdutil: nil ctx")
	}
	if client == nil {
		panic("etcdutil: nil client")
	}
	if client.ActiveConnection() == nil {
		return errors.New("etcdutil: client has no connection: clientv3.NewCtxClient makes none")
	}
	return nil
}

// or returns *given, or otherwise if given is nil.
func or[T any](given *T, otherwise T) T {
	if given != nil {
		return *given
	}
	return otherwise
}
