package etcdtest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/transport"
)

// clockSkew is how far in the past a certificate's validity begins.
const clockSkew = time.Minute

// authority is a certificate authority, with the files that etcd reads in dir.
type authority struct {
	dir         string
	certificate *x509.Certificate
	key         *ecdsa.PrivateKey
	// All members use memberKey. It stays the same, so that it fits each certificate.
	memberKey *ecdsa.PrivateKey
}

// newAuthority makes an authority and the first certificate of the members.
func newAuthority(dir string) (*authority, error) {
	a := &authority{dir: dir}
	var err error
	if a.key, err = newKey(); err != nil {
		return nil, err
	}
	if a.memberKey, err = newKey(); err != nil {
		return nil, err
	}
	template := newTemplate("etcdtest", certificateLife)
	template.IsCA = true
	template.KeyUsage = x509.KeyUsageCertSign
	der, err := x509.CreateCertificate(rand.Reader, template, template, &a.key.PublicKey, a.key)
	if err != nil {
		return nil, err
	}
	if a.certificate, err = x509.ParseCertificate(der); err != nil {
		return nil, err
	}
	if err := writePEM(a.file("ca.pem"), "CERTIFICATE", der); err != nil {
		return nil, err
	}
	der, err = x509.MarshalPKCS8PrivateKey(a.memberKey)
	if err != nil {
		return nil, err
	}
	if err := writePEM(a.file("member.key"), "PRIVATE KEY", der); err != nil {
		return nil, err
	}
	return a, a.issueMemberCertificate()
}

// issueMemberCertificate replaces the members' certificate. etcd reads it for each new connection.
func (a *authority) issueMemberCertificate() error {
	template := newTemplate("", certificateLife)
	template.IPAddresses = []net.IP{net.IPv4(127, 0, 0, 1)}
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	der, err := a.issue(template, a.memberKey)
	if err != nil {
		return err
	}
	return writePEM(a.file("member.pem"), "CERTIFICATE", der)
}

func (a *authority) clientCertificate(name string, validity time.Duration) (tls.Certificate, error) {
	key, err := newKey()
	if err != nil {
		return tls.Certificate{}, err
	}
	template := newTemplate(name, validity)
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	der, err := a.issue(template, key)
	if err != nil {
		return tls.Certificate{}, err
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, nil
}

func (a *authority) issue(template *x509.Certificate, key *ecdsa.PrivateKey) ([]byte, error) {
	template.KeyUsage = x509.KeyUsageDigitalSignature
	return x509.CreateCertificate(rand.Reader, template, a.certificate, &key.PublicKey, a.key)
}

func (a *authority) pool() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(a.certificate)
	return pool
}

// tlsInfo returns how a member uses the authority's files, towards clients and towards peers.
func (a *authority) tlsInfo() transport.TLSInfo {
	return transport.TLSInfo{
		CertFile:       a.file("member.pem"),
		KeyFile:        a.file("member.key"),
		TrustedCAFile:  a.file("ca.pem"),
		ClientCertAuth: true,
	}
}

func (a *authority) file(name string) string {
	return filepath.Join(a.dir, name)
}

func newKey() (*ecdsa.PrivateKey, error) {
	return ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
}

func newTemplate(name string, validity time.Duration) *x509.Certificate {
	serial, _ := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127)) // never fails
	now := time.Now()
	return &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{CommonName: name},
		NotBefore:             now.Add(-clockSkew),
		NotAfter:              now.Add(validity),
		BasicConstraintsValid: true,
	}
}

// writePEM replaces a file at once, so that nobody reads half of it.
func writePEM(path, kind string, der []byte) error {
	half := path + ".new"
	if err := os.WriteFile(half, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		return err
	}
	return os.Rename(half, path)
}
