// Package acme holds the test against a real ACME server, Pebble. It is a module of its own: nothing
// that serves links one.
package acme

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io"
	"log"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/letsencrypt/challtestsrv"
	"github.com/letsencrypt/pebble/v2/ca"
	"github.com/letsencrypt/pebble/v2/db"
	"github.com/letsencrypt/pebble/v2/va"
	"github.com/letsencrypt/pebble/v2/wfe"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/assembly"
	"newel.dev/newel/internal/certs"
	"newel.dev/newel/internal/egress"
	"newel.dev/newel/test/program"
)

// authority is Pebble, with a name server that knows every name at 127.0.0.1.
type authority struct {
	directory string
	file      string         // certificate of its own address
	roots     *x509.CertPool // of what it issues
	orders    atomic.Int64
}

// counter counts orders that were taken: some requests are sent back for a new nonce, on purpose.
type counter struct {
	http.ResponseWriter
	taken *atomic.Int64
}

// WriteHeader implements http.ResponseWriter.
func (c *counter) WriteHeader(status int) {
	if status == http.StatusCreated {
		c.taken.Add(1)
	}
	c.ResponseWriter.WriteHeader(status)
}

func startAuthority(t *testing.T, port int) *authority {
	t.Helper()
	t.Setenv("PEBBLE_VA_NOSLEEP", "1")
	said := log.New(io.Discard, "", 0)
	names := program.Address(t)
	dns, err := challtestsrv.New(challtestsrv.Config{Log: said, DNSAddrs: []string{names}})
	if err != nil {
		t.Fatal(err)
	}
	dns.SetDefaultDNSIPv6("")
	dns.Run()
	t.Cleanup(dns.Shutdown)

	store := db.NewMemoryStore()
	issuing := ca.New(said, store, "", "ecdsa", 0, 1, map[string]ca.Profile{"default": {Description: "d"}})
	validating := va.New(said, 1, port, true, names, store)
	front := wfe.New(said, store, validating, issuing, []string{"ca.example"}, true, false, 1, 1)
	a := &authority{roots: x509.NewCertPool()}
	handler := front.Handler()
	s := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasPrefix(r.URL.Path, "/order-plz") {
			w = &counter{w, &a.orders}
		}
		handler.ServeHTTP(w, r)
	}))
	t.Cleanup(s.Close)
	a.directory = s.URL + wfe.DirectoryPath
	a.roots.AddCert(issuing.GetRootCert(0).Cert)
	a.file = filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(a.file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	return a
}

type nothing struct{}

// Name implements call.Backend.
func (nothing) Name() string { return "nothing" }

// Capabilities implements call.Backend.
func (nothing) Capabilities(context.Context) ([]*call.Capability, error) { return nil, nil }

// serve starts a house on l whose certificates come from the authority; stop ends it.
func serve(t *testing.T, l net.Listener, a *authority, cache, clients string, said *program.Log) (stop func()) {
	t.Helper()
	trust, err := certs.Client(certs.ClientOptions{CA: a.file})
	if err != nil {
		t.Fatal(err)
	}
	o := certs.ServerOptions{
		Logger: slog.New(slog.NewTextHandler(said, nil)),
		ACME: &certs.ACME{
			Directory: a.directory, Domains: []string{"mcp.example.com"}, Email: "ops@example.com", Cache: cache, Terms: true,
			HTTP: egress.Client(egress.Options{Loopback: true, TLS: trust}),
		},
	}
	if clients != "" {
		o.Clients, o.ClientCAs = tls.RequireAndVerifyClientCert, clients
	}
	held, err := certs.NewServer(o)
	if err != nil {
		t.Fatal(err)
	}
	h, err := assembly.Build(t.Context(), &assembly.Options{Name: "acme", Logger: o.Logger, TLS: held, Backends: []call.Backend{nothing{}}})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- h.Serve(ctx, l) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil && !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
	t.Cleanup(stop)
	return stop
}

// leaf returns the certificate shown for a name.
func leaf(addr string, c *tls.Config) (*x509.Certificate, error) {
	conn, err := tls.Dial("tcp", addr, c)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	return conn.ConnectionState().PeerCertificates[0], nil
}

func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	deadline, again := time.After(30*time.Second), time.NewTicker(50*time.Millisecond)
	defer again.Stop()
	for !f() {
		select {
		case <-deadline:
			t.Fatal("did not happen: ", what)
		case <-again.C:
		}
	}
}

// A certificate is there without anybody asking for it, is good for HTTP/2 requests, and is kept
// over a restart. Names that are not configured make nobody ask the authority.
func TestACME(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	a := startAuthority(t, l.Addr().(*net.TCPAddr).Port)
	cache := filepath.Join(t.TempDir(), "cache")
	said := &program.Log{}
	stop := serve(t, l, a, cache, "", said)
	eventually(t, "a certificate is in the cache", func() bool { _, err := os.Stat(filepath.Join(cache, "mcp.example.com")); return err == nil })
	trust := &tls.Config{RootCAs: a.roots, ServerName: "mcp.example.com", NextProtos: []string{"h2"}}
	first, err := leaf(addr, trust)
	if err != nil {
		t.Fatalf("%v\n%s", err, said)
	}
	c := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: a.roots, ServerName: "mcp.example.com"}, ForceAttemptHTTP2: true}}
	resp, err := c.Get("https://" + addr + "/ready")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK || resp.ProtoMajor != 2 {
		t.Errorf("status %d over %s", resp.StatusCode, resp.Proto)
	}
	c.CloseIdleConnections()
	for _, name := range []string{"other.example.com", "127.0.0.1", "mcp.example.com.evil.example"} {
		if _, err := leaf(addr, &tls.Config{InsecureSkipVerify: true, ServerName: name}); err == nil { //nolint:gosec // any certificate would be wrong
			t.Errorf("a certificate for %s", name)
		}
	}
	if n := a.orders.Load(); n != 1 {
		t.Errorf("%d orders", n)
	}
	info, err := os.Stat(cache)
	if err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("the cache has mode %v, error %v", info.Mode(), err)
	}

	stop()
	if l, err = net.Listen("tcp", addr); err != nil {
		t.Fatal(err)
	}
	serve(t, l, a, cache, "", said)
	again, err := leaf(addr, trust)
	if err != nil {
		t.Fatal(err)
	}
	if !again.Equal(first) {
		t.Error("another certificate after a restart")
	}
	if n := a.orders.Load(); n != 1 {
		t.Errorf("%d orders after a restart", n)
	}
}

// The authority shows no certificate of a client, and gets its answer all the same; whoever pretends
// to be one gets no further.
func TestChallengeIsNoWayIn(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	a := startAuthority(t, l.Addr().(*net.TCPAddr).Port)
	clients := filepath.Join(t.TempDir(), "clients.pem")
	ours := selfSigned(t)
	if err := os.WriteFile(clients, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ours.Certificate[0]}), 0o600); err != nil {
		t.Fatal(err)
	}
	said := &program.Log{}
	serve(t, l, a, filepath.Join(t.TempDir(), "cache"), clients, said)
	with := &tls.Config{RootCAs: a.roots, ServerName: "mcp.example.com", Certificates: []tls.Certificate{ours}}
	eventually(t, "a certificate is shown", func() bool { _, err := leaf(addr, with); return err == nil })
	if status, err := get(addr, with); err != nil || status != http.StatusOK {
		t.Errorf("with our certificate: status %d, error %v", status, err)
	}
	for _, protocols := range [][]string{{"acme-tls/1"}, {"acme-tls/1", "http/1.1"}, {"http/1.1"}, nil} {
		status, err := get(addr, &tls.Config{InsecureSkipVerify: true, ServerName: "mcp.example.com", NextProtos: protocols}) //nolint:gosec // what it shows does not matter
		if err == nil {
			t.Errorf("protocols %q, without a certificate: status %d", protocols, status)
		}
	}
}

// get asks for /health over HTTP/1.1.
func get(addr string, c *tls.Config) (int, error) {
	conn, err := tls.Dial("tcp", addr, c)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		return 0, err
	}
	if _, err := io.WriteString(conn, "GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"); err != nil {
		return 0, err
	}
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return 0, err
	}
	return resp.StatusCode, resp.Body.Close()
}

func selfSigned(t *testing.T) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}
