package etcdtest

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/authpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"
)

const (
	// securityName is the directory of certificates and keys, among those of the members.
	securityName = "security"
	// setupTimeout bounds how long NewSecure takes to add the users.
	setupTimeout = 30 * time.Second
	// certificateLife is the validity of the certificates that the cluster uses itself.
	certificateLife = 24 * time.Hour
	// lowestBcryptCost is the cheapest hash that bcrypt makes.
	lowestBcryptCost = 4
	// root is the user that etcd demands before it turns authentication on.
	root = "root"
)

// Security says how a cluster of [NewSecure] authenticates. The zero value is the cluster of [New].
type Security struct {
	// TLS makes the members serve clients and peers over TLS, and demand a certificate of the
	// cluster's own authority from both. [Cluster.Certificate] issues them.
	TLS bool
	// Users turns etcd's authentication on, unless it is empty. A user named root is added if none
	// is listed. Passwords are hashed at bcrypt's lowest cost.
	Users []User
	// JWT makes tokens JSON Web Tokens, which expire TokenTTL after they were issued. Without it
	// they are etcd's simple tokens, which expire TokenTTL after their last use, or up to 1 s
	// later.
	JWT bool
	// TokenTTL is rounded up to seconds. 0 means etcd's default of 5 minutes.
	TokenTTL time.Duration
	// Configure is called with each member's configuration before each start, as that of [NewWith].
	// It may be nil.
	Configure func(*embed.Config)
}

// User is a user of etcd, with a role of the same name. Without Permissions it may read and write
// nothing, unless it is root.
type User struct {
	Name string
	// Password may be empty: then the user has none, and is authenticated by the common name of its
	// certificate only, which needs Security.TLS.
	Password    string
	Permissions []Permission
}

// Permission is one permission of a user's role.
type Permission struct {
	Type   authpb.Permission_Type // clientv3.PermRead, PermWrite or PermReadWrite
	Key    string
	Prefix bool // every key that begins with Key; with an empty Key, every key
}

// NewSecure is [New] for a cluster with TLS, with users, or with both. [Cluster.ClientConfig]
// returns what a user's client needs.
//
// Its errors are those of New, and why a user, a role or a certificate could not be made.
func NewSecure(members int, security Security) (*Cluster, error) {
	return newCluster(members, security)
}

// StartSecure is [NewSecure] for a test: it fails tb if NewSecure returns an error, and closes the
// cluster when tb ends. A nil tb panics.
func StartSecure(tb testing.TB, members int, security Security) *Cluster {
	tb.Helper()
	c, err := NewSecure(members, security)
	return c.closedAfter(tb, err)
}

// ClientConfig returns the configuration of a client of this user: all endpoints, and the user's
// name and password. With TLS it has a certificate in the user's name, valid for a day. The client
// logs nothing, and its DialTimeout is 5 s. Change what you need to, and pass it to clientv3.New.
//
// A user that is not among Security.Users has no password. On a cluster without TLS and without
// users the user is ignored. ClientConfig returns an error if the certificate could not be issued.
func (c *Cluster) ClientConfig(user string) (clientv3.Config, error) {
	config := clientv3.Config{Endpoints: c.Endpoints(), DialTimeout: 5 * time.Second, Logger: zap.NewNop()}
	if password := c.passwordOf(user); password != "" {
		config.Username, config.Password = user, password
	}
	if c.authority == nil {
		return config, nil
	}
	certificate, err := c.Certificate(user, certificateLife)
	if err != nil {
		return clientv3.Config{}, err
	}
	config.TLS = &tls.Config{
		MinVersion:   tls.VersionTLS12,
		RootCAs:      c.authority.pool(),
		Certificates: []tls.Certificate{certificate},
	}
	return config, nil
}

// passwordOf returns a user's password, "" if it has none.
func (c *Cluster) passwordOf(user string) string {
	if i := slices.IndexFunc(c.users, func(u User) bool { return u.Name == user }); i >= 0 {
		return c.users[i].Password
	}
	return ""
}

// Certificate issues a client certificate with this common name. It is valid from now on, for
// validity. With 0 or less it has expired already. etcd takes the common name for the name of a
// user without a password. To rotate a client's certificate, return it from the
// GetClientCertificate of the client's tls.Config. Certificate returns an error if the cluster has
// no TLS.
func (c *Cluster) Certificate(name string, validity time.Duration) (tls.Certificate, error) {
	if c.authority == nil {
		return tls.Certificate{}, errors.New("etcdtest: the cluster has no TLS")
	}
	certificate, err := c.authority.clientCertificate(name, validity)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("etcdtest: certificate of %q: %w", name, err)
	}
	return certificate, nil
}

// RotateCertificates gives all members new certificates of the same authority, as an operator does
// by replacing their files. Open connections stay, and new ones are served with the new
// certificates.
//
// Errors:
//   - An error if the cluster has no TLS, or is closed.
//   - Why a file could not be written.
func (c *Cluster) RotateCertificates() error {
	return c.takeTurn(func() error {
		if c.authority == nil {
			return errors.New("the cluster has no TLS")
		}
		return c.authority.issueMemberCertificate()
	})
}

// prepare makes the files that the members are configured with, before they start.
func (c *Cluster) prepare(security Security) error {
	c.users = security.Users
	if len(c.users) > 0 && !slices.ContainsFunc(c.users, func(u User) bool { return u.Name == root }) {
		c.users = append(slices.Clone(c.users), User{Name: root, Password: rand.Text()})
	}
	dir := filepath.Join(c.dir, securityName)
	if !security.TLS && !security.JWT {
		return nil
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	if security.JWT {
		if err := os.WriteFile(jwtKey(c.dir), []byte(rand.Text()), 0o600); err != nil {
			return err
		}
	}
	if !security.TLS {
		return nil
	}
	authority, err := newAuthority(dir)
	c.authority = authority
	return err
}

// configure returns what NewSecure changes in each member's configuration.
func (c *Cluster) configure(security Security) func(*embed.Config) {
	ttl := (security.TokenTTL + time.Second - 1).Truncate(time.Second)
	return func(config *embed.Config) {
		if len(security.Users) > 0 {
			config.BcryptCost = lowestBcryptCost
		}
		if ttl > 0 {
			config.AuthTokenTTL = uint(ttl / time.Second)
		}
		if security.JWT {
			config.AuthToken = "jwt,sign-method=HS256,priv-key=" + jwtKey(c.dir)
			if ttl > 0 {
				config.AuthToken += ",ttl=" + ttl.String()
			}
		}
		if c.authority != nil {
			config.ClientTLSInfo = c.authority.tlsInfo()
			config.PeerTLSInfo = c.authority.tlsInfo()
		}
		if security.Configure != nil {
			security.Configure(config)
		}
	}
}

func jwtKey(dir string) string {
	return filepath.Join(dir, securityName, "jwt.key")
}

// addUsers adds the users and turns authentication on, if there are any.
func (c *Cluster) addUsers() error {
	if len(c.users) == 0 {
		return nil
	}
	config, err := c.ClientConfig(root)
	if err != nil {
		return err
	}
	config.Username, config.Password = "", "" // authentication is still off
	client, err := clientv3.New(config)
	if err != nil {
		return err
	}
	defer func() { _ = client.Close() }()
	ctx, cancel := context.WithTimeout(context.Background(), setupTimeout)
	defer cancel()
	for _, user := range c.users {
		if err := addUser(ctx, client, user); err != nil {
			return fmt.Errorf("add user %q: %w", user.Name, err)
		}
	}
	if _, err := client.AuthEnable(ctx); err != nil {
		return fmt.Errorf("enable authentication: %w", err)
	}
	return nil
}

func addUser(ctx context.Context, client *clientv3.Client, user User) error {
	options := clientv3.UserAddOptions{NoPassword: user.Password == ""}
	if _, err := client.UserAddWithOptions(ctx, user.Name, user.Password, &options); err != nil {
		return err
	}
	if _, err := client.RoleAdd(ctx, user.Name); err != nil {
		return err
	}
	for _, p := range user.Permissions {
		key, end := p.Key, ""
		if p.Prefix {
			key, end = prefixRange(key)
		}
		if _, err := client.RoleGrantPermission(ctx, user.Name, key, end, clientv3.PermissionType(p.Type)); err != nil {
			return err
		}
	}
	_, err := client.UserGrantRole(ctx, user.Name, user.Name)
	return err
}

// prefixRange returns the range of all keys with this prefix, as etcdctl does.
func prefixRange(prefix string) (key, end string) {
	if prefix == "" {
		return "\x00", "\x00"
	}
	return prefix, clientv3.GetPrefixRangeEnd(prefix)
}
