package etcdutil_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"example.com/etcdutil"
	"example.com/etcdutil/etcdtest"
	"github.com/stretchr/testify/require"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
)

const (
	// password is every user's here; no error may show it, nor the value.
	password    = "correct-horse"
	secretValue = "battery-staple"
	// patience is how long a test waits for what should happen.
	patience = time.Minute
)

// grant is one line `etcdctl role grant-permission ROLE …` of the documentation.
type grant struct {
	kind   string // read, write or readwrite
	key    string // with the placeholders NAME, LOG and KEY
	prefix bool
}

func (g grant) permission(name string) etcdtest.Permission {
	kinds := map[string]etcdtest.Permission{
		"read":      {Type: clientv3.PermRead},
		"write":     {Type: clientv3.PermWrite},
		"readwrite": {Type: clientv3.PermReadWrite},
	}
	p := kinds[g.kind]
	p.Key, p.Prefix = place(name, g.key), g.prefix
	return p
}

// place puts names in the place of NAME, LOG and KEY.
func place(name, text string) string {
	return strings.NewReplacer("NAME", name+"-lock", "LOG", name+"-log", "KEY", name+"-key").Replace(text)
}

// A use is what a row of the documentation's table of permissions is about.
type use struct {
	title string
	run   func(ctx context.Context, client *clientv3.Client, name string) error
}

var uses = []use{
	{"`NewLease`", useLease},
	{"`Acquire`, `TryAcquire`, `Do`, `Lead`", useLock},
	{"`Holder`, `WatchHolder`", useHolder},
	{"`Commit` of puts and deletes", useCommit},
	{"`NewLogWriter`", useLogWriter},
	{"`NewLogReader`", useLogReader},
	{"`Watch` of a key", useWatch},
	{"`Watch` with `WithPrefix`", useWatchPrefix},
	{"`NewMirror` of a key", useMirror},
	{"`NewMirror` with `WithPrefix`", useMirrorPrefix},
	{"`Register`", useRegister},
}

func useLease(ctx context.Context, client *clientv3.Client, _ string) error {
	lease, err := etcdutil.NewLease(ctx, client, 5*time.Second, etcdutil.WithKeepAliveInterval(20*time.Millisecond))
	if err != nil {
		return err
	}
	defer func() { _ = lease.Close() }()
	for granted := lease.Expiry(); lease.Expiry().Equal(granted); {
		select {
		case <-lease.Done():
			return context.Cause(lease)
		case <-time.After(time.Millisecond):
		}
	}
	if alive, err := lease.Alive(ctx); !alive || err != nil {
		return fmt.Errorf("alive: %v, %w", alive, err)
	}
	return lease.Close()
}

func useLock(ctx context.Context, client *clientv3.Client, name string) error {
	name = place(name, "NAME")
	first, err := etcdutil.Acquire(ctx, client, name, etcdutil.WithValue(secretValue))
	if err != nil {
		return err
	}
	defer func() { _ = first.Close() }()
	if _, err := etcdutil.TryAcquire(ctx, client, name); !errors.Is(err, etcdutil.ErrLockHeld) {
		return fmt.Errorf("try while it is held: %w", err)
	}
	waited := make(chan error, 1)
	go func() { // until its turn
		waited <- etcdutil.Do(ctx, client, name, func(context.Context) error { return nil })
	}()
	if alive, err := first.Alive(ctx); !alive || err != nil {
		return fmt.Errorf("alive: %v, %w", alive, err)
	}
	if _, err := first.Commit(ctx); err != nil {
		return err
	}
	time.Sleep(200 * time.Millisecond) // so that the waiter waits, and the holder's key is watched
	if err := errors.Join(first.Close(), <-waited); err != nil {
		return err
	}
	second, err := etcdutil.TryAcquire(ctx, client, name)
	if err != nil {
		return err
	}
	if err := second.Close(); err != nil {
		return err
	}
	return etcdutil.Lead(ctx, client, name, func(context.Context) error { return nil })
}

func useHolder(ctx context.Context, client *clientv3.Client, name string) error {
	_, err := etcdutil.Holder(ctx, client, place(name, "NAME"))
	if err != nil && !errors.Is(err, etcdutil.ErrNoHolder) {
		return err
	}
	holders, err := etcdutil.WatchHolder(ctx, client, place(name, "NAME"))
	if err != nil {
		return err
	}
	if _, ok := <-holders.Events(); !ok {
		return context.Cause(holders)
	}
	return holders.Close()
}

func useCommit(ctx context.Context, client *clientv3.Client, name string) error {
	lock, err := etcdutil.Acquire(ctx, client, place(name, "NAME"))
	if err != nil {
		return err
	}
	defer func() { _ = lock.Close() }()
	if _, err := lock.Commit(ctx, clientv3.OpPut(place(name, "KEY"), secretValue)); err != nil {
		return err
	}
	_, err = lock.Commit(ctx, clientv3.OpDelete(place(name, "KEY")))
	return errors.Join(err, lock.Close())
}

func useLogWriter(ctx context.Context, client *clientv3.Client, name string) error {
	lock, err := etcdutil.Acquire(ctx, client, place(name, "NAME"))
	if err != nil {
		return err
	}
	defer func() { _ = lock.Close() }()
	writer, err := etcdutil.NewLogWriter[string](ctx, lock, place(name, "LOG"))
	if err != nil {
		return err
	}
	for range 2 {
		if _, err := writer.Write(ctx, secretValue); err != nil {
			return err
		}
	}
	return errors.Join(writer.Close(), lock.Close())
}

func useLogReader(ctx context.Context, client *clientv3.Client, name string) error {
	for _, options := range [][]etcdutil.LogOption{nil, {etcdutil.WithEveryEntry(1)}} {
		reader, err := etcdutil.NewLogReader[string](ctx, client, place(name, "LOG"), options...)
		if err != nil {
			return err
		}
		_, err = reader.Read(ctx)
		if err := errors.Join(err, reader.Close()); err != nil {
			return err
		}
	}
	return nil
}

func useWatch(ctx context.Context, client *clientv3.Client, name string) error {
	return watchOnce(ctx, client, place(name, "KEY"))
}

func useWatchPrefix(ctx context.Context, client *clientv3.Client, name string) error {
	return watchOnce(ctx, client, place(name, "KEY"), etcdutil.WithPrefix())
}

// watchOnce reads the first event of a watch from the start, and of one with a snapshot.
func watchOnce(ctx context.Context, client *clientv3.Client, key string, options ...etcdutil.WatchOption) error {
	for _, start := range []etcdutil.WatchOption{etcdutil.WithRevision(1), etcdutil.WithSnapshot()} {
		watcher, err := etcdutil.Watch[string](ctx, client, key, append(options, start, etcdutil.WithPrev())...)
		if err != nil {
			return err
		}
		if _, ok := <-watcher.Events(); !ok {
			return context.Cause(watcher)
		}
		if err := watcher.Close(); err != nil {
			return err
		}
	}
	return nil
}

func useMirror(ctx context.Context, client *clientv3.Client, name string) error {
	return mirrorOnce(ctx, client, place(name, "KEY"))
}

func useMirrorPrefix(ctx context.Context, client *clientv3.Client, name string) error {
	return mirrorOnce(ctx, client, place(name, "KEY"), etcdutil.WithPrefix())
}

func mirrorOnce(ctx context.Context, client *clientv3.Client, key string, options ...etcdutil.WatchOption) error {
	mirror, err := etcdutil.NewMirror[string](ctx, client, key, options...)
	if err != nil {
		return err
	}
	return errors.Join(mirror.Wait(ctx, mirror.Revision()), mirror.Close())
}

func useRegister(ctx context.Context, client *clientv3.Client, name string) error {
	registration, err := etcdutil.Register(ctx, client, place(name, "KEY"), secretValue)
	if err != nil {
		return err
	}
	return errors.Join(registration.Set(ctx, secretValue+" again"), registration.Close())
}

// documented returns the rows of the table of permissions.
func documented(t *testing.T) map[string][]grant {
	t.Helper()
	page, err := os.ReadFile("docs/behavior.md")
	require.NoError(t, err)
	_, section, found := strings.Cut(string(page), "\n## Permissions\n")
	require.True(t, found, "no section on permissions")
	section, _, _ = strings.Cut(section, "\n## ")
	line := regexp.MustCompile("`etcdctl role grant-permission ROLE (\\w+) (--prefix )?(\\S+)`")
	rows := make(map[string][]grant)
	for row := range strings.Lines(section) {
		cells := strings.Split(row, "|")
		if len(cells) != 4 || strings.HasPrefix(cells[1], "-") || strings.TrimSpace(cells[1]) == "Use" {
			continue
		}
		grants := []grant{}
		if strings.Contains(cells[2], "that of the lock") {
			grants = append(grants, grant{"readwrite", "NAME/", true})
		}
		for _, m := range line.FindAllStringSubmatch(cells[2], -1) {
			grants = append(grants, grant{m[1], m[3], m[2] != ""})
		}
		rows[strings.TrimSpace(cells[1])] = grants
	}
	return rows
}

func TestPermissionsAreTheLeastThatEachUseNeeds(t *testing.T) {
	t.Parallel()
	rows := documented(t)
	require.Len(t, rows, len(uses), "a row of the documentation is not tested")
	var users []etcdtest.User
	type attempt struct {
		use
		user   string
		denied bool
	}
	var attempts []attempt
	add := func(u use, denied bool, grants ...grant) {
		name := fmt.Sprintf("user%d", len(users))
		user := etcdtest.User{Name: name, Password: password}
		for _, g := range grants {
			user.Permissions = append(user.Permissions, g.permission(name))
		}
		users = append(users, user)
		attempts = append(attempts, attempt{u, name, denied})
	}
	for _, u := range uses {
		grants, known := rows[u.title]
		require.True(t, known, "%s is not documented", u.title)
		add(u, false, grants...)
		for i, g := range grants { // without it, and with half of it
			others := append(append([]grant{}, grants[:i]...), grants[i+1:]...)
			add(u, true, others...)
			if g.kind == "readwrite" {
				add(u, true, append(others, grant{"read", g.key, g.prefix})...)
				add(u, true, append(others, grant{"write", g.key, g.prefix})...)
			}
			if g.prefix {
				add(u, true, append(others, grant{g.kind, g.key, false})...)
			}
		}
	}
	cluster := etcdtest.StartSecure(t, 1, etcdtest.Security{Users: users})
	root := cluster.Client(t)
	for _, a := range attempts {
		putLogs(t, root, a.user)
	}
	for _, a := range attempts {
		t.Run(a.title+" "+a.user, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			err := a.run(ctx, newClientOf(t, cluster, a.user), a.user)
			if !a.denied {
				require.NoError(t, err)
				return
			}
			requireNamed(t, err, rpctypes.ErrPermissionDenied, a.user+"-")
		})
	}
}

// requireNamed requires an error that is target, names the operation and then a key that begins
// with prefix, and shows no secret.
func requireNamed(t *testing.T, err, target error, prefix string) {
	t.Helper()
	require.ErrorIs(t, err, target)
	require.Regexp(t, `^etcdutil: [a-z]+( [a-z]+)* "`+prefix, err.Error())
	require.Equal(t, 1, strings.Count(err.Error(), "etcdutil:"), err.Error())
	require.NotContains(t, err.Error(), password)
	require.NotContains(t, err.Error(), secretValue)
}

func newClientOf(t *testing.T, cluster *etcdtest.Cluster, user string) *clientv3.Client {
	t.Helper()
	config, err := cluster.ClientConfig(user)
	require.NoError(t, err)
	return newClientWith(t, config)
}

func newClientWith(t *testing.T, config clientv3.Config) *clientv3.Client {
	t.Helper()
	client, err := clientv3.New(config)
	require.NoError(t, err)
	t.Cleanup(func() { _ = client.Close() })
	return client
}

// open is what one client has open while its credentials change.
type open struct {
	client *clientv3.Client
	name   string
	lease  *etcdutil.Lease
	lock   *etcdutil.Lock
	writer *etcdutil.LogWriter[string]
	reader *etcdutil.LogReader[string]
	watch  *etcdutil.Watcher[string]
}

// lockedBuffer is a bytes.Buffer for concurrent use.
type lockedBuffer struct {
	mu     sync.Mutex
	buffer bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buffer.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buffer.String()
}

// openAll opens one of each. Its user needs every permission.
func openAll(t *testing.T, client *clientv3.Client, name string) *open {
	t.Helper()
	o := &open{client: client, name: name}
	var logged lockedBuffer
	logger := etcdutil.WithLogger(slog.New(slog.NewTextHandler(&logged, &slog.HandlerOptions{Level: slog.LevelDebug})))
	var err error
	t.Cleanup(func() { // after the others, which close what logs
		require.NotContains(t, logged.String(), password)
		require.NotContains(t, logged.String(), secretValue)
	})
	o.lease, err = etcdutil.NewLease(t.Context(), client, 10*time.Second, etcdutil.WithKeepAliveInterval(time.Second), logger)
	require.NoError(t, err)
	t.Cleanup(func() { _ = o.lease.Close() })
	o.lock, err = etcdutil.Acquire(t.Context(), client, place(name, "NAME"), logger)
	require.NoError(t, err)
	t.Cleanup(func() { _ = o.lock.Close() })
	o.writer, err = etcdutil.NewLogWriter[string](t.Context(), o.lock, place(name, "LOG"), logger)
	require.NoError(t, err)
	o.reader, err = etcdutil.NewLogReader[string](t.Context(), client, place(name, "LOG"), logger)
	require.NoError(t, err)
	t.Cleanup(func() { _ = o.reader.Close() })
	o.watch, err = etcdutil.Watch[string](t.Context(), client, place(name, "KEY"), etcdutil.WithCodec(etcdutil.Raw), logger)
	require.NoError(t, err)
	t.Cleanup(func() { _ = o.watch.Close() })
	return o
}

// requireGoesOn requires that everything that is open works, and that the same can be opened anew.
func (o *open) requireGoesOn(t *testing.T, value string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	renewed := o.lease.Expiry()
	_, err := o.lock.Commit(ctx, clientv3.OpPut(place(o.name, "KEY"), value))
	require.NoError(t, err)
	select {
	case event := <-o.watch.Events():
		require.Equal(t, value, event.Value)
	case <-ctx.Done():
		require.Fail(t, "the watch sent nothing", "%v", context.Cause(o.watch))
	}
	_, err = o.writer.Write(ctx, value)
	require.NoError(t, err)
	entry, err := o.reader.Read(ctx)
	require.NoError(t, err)
	require.Equal(t, value, entry.Value)

	for lease := o.lease; lease.Expiry().Equal(renewed); time.Sleep(time.Millisecond) {
		require.NoError(t, ctx.Err(), "the lease is not renewed")
	}
	require.NoError(t, o.lock.Err(), "%v", context.Cause(o.lock))
	require.NoError(t, o.lease.Err(), "%v", context.Cause(o.lease))
	for _, u := range uses {
		require.NoError(t, u.run(ctx, o.client, o.name+"-anew"), u.title)
	}
}

func TestCredentialsCertificatesRotateUnderAHeldLock(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.StartSecure(t, 1, etcdtest.Security{TLS: true})
	const validity = 3 * time.Second
	var current atomic.Pointer[tls.Certificate]
	rotate := func(validity time.Duration) {
		certificate, err := cluster.Certificate("client", validity)
		require.NoError(t, err)
		current.Store(&certificate)
	}
	rotate(validity)
	expired := time.Now().Add(validity)
	link := etcdtest.StartLink(t, cluster.Endpoints()[0])
	config, err := cluster.ClientConfig("client")
	require.NoError(t, err)
	config.Endpoints = []string{link.Endpoint()}
	config.TLS.Certificates = nil
	config.TLS.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
		return current.Load(), nil
	}
	client := newClientWith(t, config)
	putLogs(t, client, "rotation-anew")
	o := openAll(t, client, "rotation")

	time.Sleep(time.Until(expired))
	o.requireGoesOn(t, secretValue+" on the connection that stands")
	link.Reset()
	_, err = etcdutil.NewLease(t.Context(), client, time.Minute,
		etcdutil.WithRetryPolicy(etcdutil.RetryPolicy{Elapsed: 500 * time.Millisecond}))
	require.ErrorContains(t, err, "tls", "an expired certificate is refused, and the error says so")
	require.NoError(t, cluster.RotateCertificates())
	rotate(time.Hour)
	o.requireGoesOn(t, secretValue+" with a new certificate")
	require.NoError(t, o.lock.Close())
}

// putLogs writes what the uses read.
func putLogs(t *testing.T, client *clientv3.Client, name string) {
	t.Helper()
	for _, key := range []string{"LOG", "KEY"} {
		_, err := client.Put(t.Context(), place(name, key), `"`+secretValue+`"`)
		require.NoError(t, err)
	}
}

func TestCredentialsCertificateNamesItsUser(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.StartSecure(t, 1, etcdtest.Security{
		TLS: true,
		Users: []etcdtest.User{
			{Name: "user", Permissions: []etcdtest.Permission{{Type: clientv3.PermReadWrite, Key: "tokens-", Prefix: true}}},
			{Name: "stranger"},
		},
	})
	putLogs(t, cluster.Client(t), "tokens")
	user, stranger := newClientOf(t, cluster, "user"), newClientOf(t, cluster, "stranger")
	for _, u := range uses[1:] {
		require.NoError(t, u.run(t.Context(), user, "tokens"), u.title)
		requireNamed(t, u.run(t.Context(), stranger, "tokens"), rpctypes.ErrPermissionDenied, "tokens-")
	}
}

func TestCredentialsTokensExpireUnderAHeldLock(t *testing.T) {
	t.Parallel()
	for name, jwt := range map[string]bool{"simple": false, "JWT": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			const life = 2 * time.Second
			cluster := etcdtest.StartSecure(t, 1, etcdtest.Security{
				JWT: jwt, TokenTTL: life,
				Users: []etcdtest.User{{Name: "user", Password: password, Permissions: []etcdtest.Permission{
					{Type: clientv3.PermReadWrite, Key: "tokens-", Prefix: true},
				}}},
			})
			putLogs(t, cluster.Client(t), "tokens-anew")
			link := etcdtest.StartLink(t, cluster.Endpoints()[0])
			config, err := cluster.ClientConfig("user")
			require.NoError(t, err)
			config.Endpoints = []string{link.Endpoint()}
			o := openAll(t, newClientWith(t, config), "tokens")

			time.Sleep(life + 1500*time.Millisecond) // etcd looks for expired tokens once a second
			o.requireGoesOn(t, secretValue+" on the streams that stand")
			time.Sleep(life + 1500*time.Millisecond)
			link.Reset()
			o.requireGoesOn(t, secretValue+" on new streams")
			require.NoError(t, o.lock.Close())
		})
	}
}

func TestCredentialsThatExpiredOrChangedNameOperationAndKey(t *testing.T) {
	t.Parallel()
	const life = time.Second
	cluster := etcdtest.StartSecure(t, 1, etcdtest.Security{
		JWT: true, TokenTTL: life,
		Users: []etcdtest.User{{Name: "user", Password: password}},
	})
	client := newClientOf(t, cluster, "user")
	response, err := client.Authenticate(t.Context(), "user", password)
	require.NoError(t, err)
	time.Sleep(life + time.Second)
	fixed := newClientWith(t, clientv3.Config{
		Endpoints: cluster.Endpoints(), Token: response.Token, Logger: zap.NewNop(),
	})
	for _, u := range uses[1:] {
		err := u.run(t.Context(), fixed, "expired")
		requireNamed(t, err, rpctypes.ErrInvalidAuthToken, "expired-")
		require.NotContains(t, err.Error(), response.Token)
	}
	require.ErrorIs(t, useLease(t.Context(), fixed, ""), rpctypes.ErrInvalidAuthToken)

	_, err = cluster.Client(t).UserChangePassword(t.Context(), "user", "another-"+password)
	require.NoError(t, err)
	for _, u := range uses[1:] {
		err := u.run(t.Context(), client, "changed")
		requireNamed(t, err, rpctypes.ErrAuthFailed, "changed-")
	}
}

func TestCredentialsThatAreRevokedNameOperationAndKey(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.StartSecure(t, 1, etcdtest.Security{
		Users: []etcdtest.User{{Name: "user", Password: password, Permissions: []etcdtest.Permission{
			{Type: clientv3.PermReadWrite, Key: "revoked-", Prefix: true},
		}}},
	})
	link := etcdtest.StartLink(t, cluster.Endpoints()[0])
	config, err := cluster.ClientConfig("user")
	require.NoError(t, err)
	config.Endpoints = []string{link.Endpoint()}
	o := openAll(t, newClientWith(t, config), "revoked")

	root := cluster.Client(t)
	_, err = root.UserRevokeRole(t.Context(), "user", "user")
	require.NoError(t, err)
	_, err = o.lock.Commit(t.Context(), clientv3.OpPut(place("revoked", "KEY"), secretValue))
	requireNamed(t, err, rpctypes.ErrPermissionDenied, "revoked-lock")
	_, err = o.writer.Write(t.Context(), secretValue)
	requireNamed(t, err, rpctypes.ErrPermissionDenied, "revoked-log")
	link.Reset()
	requireEnds(t, o.watch)
	requireNamed(t, context.Cause(o.watch), rpctypes.ErrPermissionDenied, "revoked-key")
	_, err = o.reader.Read(t.Context())
	requireNamed(t, err, rpctypes.ErrPermissionDenied, "revoked-log")

	_, err = root.UserGrantRole(t.Context(), "user", "user")
	require.NoError(t, err)
	_, err = o.lock.Commit(t.Context(), clientv3.OpPut(place("revoked", "KEY"), secretValue))
	require.NoError(t, err, "the role was given back in time")
	require.NoError(t, o.lock.Close())
}

func requireEnds(t *testing.T, resource context.Context) {
	t.Helper()
	select {
	case <-resource.Done():
	case <-time.After(patience):
		require.Fail(t, "the resource has not ended")
	}
}
