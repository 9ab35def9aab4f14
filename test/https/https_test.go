// Package https holds tests of TLS: with real certificates, made at test time, over real listeners.
package https

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-json-experiment/json/jsontext"
	"go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/assembly"
	"newel.dev/newel/internal/certs"
	"newel.dev/newel/test/program"
)

// authority issues certificates.
type authority struct {
	t    *testing.T
	cert *x509.Certificate
	key  crypto.Signer
}

var serial atomic.Int64

func newAuthority(t *testing.T) *authority {
	t.Helper()
	a := &authority{t: t}
	self := &x509.Certificate{
		SerialNumber: big.NewInt(serial.Add(1)), Subject: pkix.Name{CommonName: fmt.Sprintf("Test Authority %d", serial.Load())},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(100 * 24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}
	a.cert, a.key = a.sign(self, nil)
	return a
}

// sign signs a certificate for a new key; without parent by that key itself.
func (a *authority) sign(c *x509.Certificate, parent *authority) (*x509.Certificate, crypto.Signer) {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	by, with := c, crypto.Signer(key)
	if parent != nil {
		by, with = parent.cert, parent.key
	}
	der, err := x509.CreateCertificate(rand.Reader, c, by, key.Public(), with)
	if err != nil {
		a.t.Fatal(err)
	}
	out, err := x509.ParseCertificate(der)
	if err != nil {
		a.t.Fatal(err)
	}
	return out, key
}

// issue issues a certificate for the names, which ends after life from now.
func (a *authority) issue(life time.Duration, names ...string) tls.Certificate {
	a.t.Helper()
	c := &x509.Certificate{
		SerialNumber: big.NewInt(serial.Add(1)), Subject: pkix.Name{CommonName: names[0]},
		NotBefore: time.Now().Add(-30 * 24 * time.Hour), NotAfter: time.Now().Add(life),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	for _, n := range names {
		if ip := net.ParseIP(n); ip != nil {
			c.IPAddresses = append(c.IPAddresses, ip)
		} else {
			c.DNSNames = append(c.DNSNames, n)
		}
	}
	leaf, key := a.sign(c, a)
	return tls.Certificate{Certificate: [][]byte{leaf.Raw}, PrivateKey: key, Leaf: leaf}
}

func (a *authority) pool() *x509.CertPool {
	p := x509.NewCertPool()
	p.AddCert(a.cert)
	return p
}

const long = 60 * 24 * time.Hour

func encode(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}

// write replaces a file as a whole.
func write(t *testing.T, path string, content []byte) {
	t.Helper()
	if err := os.WriteFile(path+".new", content, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}

// put writes a pair, certificate first.
func put(t *testing.T, p certs.Pair, c tls.Certificate) {
	t.Helper()
	write(t, p.Certificate, encode("CERTIFICATE", c.Certificate[0]))
	write(t, p.Key, keyPEM(t, c))
}

func keyPEM(t *testing.T, c tls.Certificate) []byte {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(c.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	return encode("PRIVATE KEY", der)
}

// pairIn names the files of a pair in a new folder and writes it.
func pairIn(t *testing.T, c tls.Certificate) certs.Pair {
	t.Helper()
	dir := t.TempDir()
	p := certs.Pair{Certificate: filepath.Join(dir, "tls.crt"), Key: filepath.Join(dir, "tls.key")}
	put(t, p, c)
	return p
}

func (a *authority) file() string {
	a.t.Helper()
	p := filepath.Join(a.t.TempDir(), "ca.pem")
	write(a.t, p, encode("CERTIFICATE", a.cert.Raw))
	return p
}

// site is a server that speaks TLS.
type site struct {
	t    *testing.T
	addr string
	log  *program.Log
}

type backend []*call.Capability

// Name implements call.Backend.
func (backend) Name() string { return "b" }

// Capabilities implements call.Backend.
func (b backend) Capabilities(context.Context) ([]*call.Capability, error) { return b, nil }

// tool is a tool that does f and says ok.
func tool(name string, f func(context.Context)) *call.Capability {
	return &call.Capability{
		Kind: call.Tool, Name: name, Description: "D.", Effect: call.Read, Origin: name, Input: jsontext.Value(`{"type":"object"}`),
		Run: func(ctx context.Context, _ *call.Call) (*call.Result, error) {
			f(ctx)
			return call.Text("ok"), nil
		},
	}
}

func echo() backend { return backend{tool("echo", func(context.Context) {})} }

// serve starts a house with certificates.
func serve(t *testing.T, o certs.ServerOptions, more assembly.Options) *site {
	t.Helper()
	s := &site{t: t, log: &program.Log{}}
	o.Logger = slog.New(slog.NewTextHandler(s.log, nil))
	if o.Interval == 0 {
		o.Interval = 5 * time.Millisecond
	}
	held, err := certs.NewServer(o)
	if err != nil {
		t.Fatal(err)
	}
	more.Name, more.Logger, more.TLS = "https", o.Logger, held
	if more.Backends == nil {
		more.Backends = []call.Backend{echo()}
	}
	h, err := assembly.Build(t.Context(), &more)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s.addr = l.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- h.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil && !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
	return s
}

// client is an HTTP client with one pool of connections.
func client(t *testing.T, c *tls.Config) *http.Client {
	t.Helper()
	trip := &http.Transport{TLSClientConfig: c.Clone(), ForceAttemptHTTP2: true}
	t.Cleanup(trip.CloseIdleConnections)
	return &http.Client{Transport: trip, Timeout: 10 * time.Second}
}

const message = `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":%q,"arguments":{},"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28","io.modelcontextprotocol/clientCapabilities":{}}}}`

// call calls a tool and returns the answer's state.
func (s *site) call(c *http.Client, name string, more ...string) (*http.Response, error) {
	r, err := http.NewRequest(http.MethodPost, "https://"+s.addr+"/mcp", strings.NewReader(fmt.Sprintf(message, name)))
	if err != nil {
		return nil, err
	}
	headers := append([]string{
		"Content-Type", "application/json", "Accept", "application/json, text/event-stream",
		"Mcp-Protocol-Version", "2026-07-28", "Mcp-Method", "tools/call", "Mcp-Name", name,
	}, more...)
	for i := 0; i < len(headers); i += 2 {
		r.Header.Set(headers[i], headers[i+1])
	}
	resp, err := c.Do(r)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK || !bytes.Contains(body, []byte(`"text":"ok"`)) {
		return resp, fmt.Errorf("status %d: %s", resp.StatusCode, body)
	}
	return resp, nil
}

// shown returns the serial number of the certificate that a new connection sees.
func (s *site) shown(c *tls.Config) (*big.Int, error) {
	conn, err := tls.Dial("tcp", s.addr, c)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	return conn.ConnectionState().PeerCertificates[0].SerialNumber, nil
}

// eventually waits until f says yes.
func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	deadline, again := time.After(10*time.Second), time.NewTicker(5*time.Millisecond)
	defer again.Stop()
	for !f() {
		select {
		case <-deadline:
			t.Fatal("did not happen: ", what)
		case <-again.C:
		}
	}
}

// While certificates are replaced no request fails and no connection ends.
func TestReload(t *testing.T) {
	ca := newAuthority(t)
	files := pairIn(t, ca.issue(long, "127.0.0.1"))
	begun, release := make(chan struct{}), make(chan struct{})
	s := serve(t, certs.ServerOptions{Pairs: []certs.Pair{files}}, assembly.Options{Backends: []call.Backend{backend{
		tool("echo", func(context.Context) {}), tool("slow", func(context.Context) { close(begun); <-release }),
	}}})
	trust := &tls.Config{RootCAs: ca.pool()}

	slow := make(chan error, 1)
	go func() {
		_, err := s.call(client(t, trust), "slow")
		slow <- err
	}()
	<-begun

	stop := make(chan struct{})
	var sent, failed atomic.Int64
	var all sync.WaitGroup
	for i := range 4 {
		c := client(t, trust)
		all.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if i%2 == 0 {
					c.CloseIdleConnections() // a handshake for every request
				}
				sent.Add(1)
				if _, err := s.call(c, "echo"); err != nil {
					failed.Add(1)
					t.Error(err)
					return
				}
			}
		})
	}
	for range 20 {
		next := ca.issue(long, "127.0.0.1")
		put(t, files, next)
		eventually(t, "the new certificate is shown", func() bool {
			n, err := s.shown(trust)
			if err != nil {
				t.Fatal(err)
			}
			return n.Cmp(next.Leaf.SerialNumber) == 0
		})
	}
	close(stop)
	all.Wait()
	close(release)
	if err := <-slow; err != nil {
		t.Errorf("a call that ran meanwhile: %v", err)
	}
	if sent.Load() < 20 || failed.Load() > 0 {
		t.Errorf("%d of %d requests failed", failed.Load(), sent.Load())
	}
	t.Logf("%d requests over 20 changes, %d failed", sent.Load(), failed.Load())
}

// A new pair that is no good keeps the old one, and the log says why, once.
func TestBrokenPair(t *testing.T) {
	ca := newAuthority(t)
	first := ca.issue(long, "127.0.0.1")
	other := ca.issue(long, "127.0.0.1")
	for name, c := range map[string]struct {
		certificate, key []byte
		want             string
	}{
		"garbage":        {[]byte("nonsense"), keyPEM(t, other), "failed to find any PEM data in certificate input"},
		"another key":    {encode("CERTIFICATE", other.Certificate[0]), keyPEM(t, first), "private key does not match public key"},
		"expired":        {encode("CERTIFICATE", ca.issue(-time.Hour, "127.0.0.1").Certificate[0]), nil, "private key does not match"},
		"too large":      {bytes.Repeat([]byte("x"), 2<<20), keyPEM(t, other), "more than 1048576 bytes"},
		"nothing at all": {[]byte{}, []byte{}, "failed to find any PEM data"},
	} {
		t.Run(name, func(t *testing.T) {
			files := pairIn(t, first)
			s := serve(t, certs.ServerOptions{Pairs: []certs.Pair{files}}, assembly.Options{})
			write(t, files.Certificate, c.certificate)
			if c.key == nil {
				c.key = keyPEM(t, first)
			}
			write(t, files.Key, c.key)
			s.keeps(t, ca, first, c.want)
			next := ca.issue(long, "127.0.0.1")
			put(t, files, next)
			s.becomes(ca, next)
		})
	}
	t.Run("expired, with its key", func(t *testing.T) {
		files := pairIn(t, first)
		s := serve(t, certs.ServerOptions{Pairs: []certs.Pair{files}}, assembly.Options{})
		put(t, files, ca.issue(-time.Hour, "127.0.0.1"))
		s.keeps(t, ca, first, "the certificate expired at")
	})
	t.Run("gone", func(t *testing.T) {
		files := pairIn(t, first)
		s := serve(t, certs.ServerOptions{Pairs: []certs.Pair{files}}, assembly.Options{})
		if err := os.Remove(files.Key); err != nil {
			t.Fatal(err)
		}
		s.keeps(t, ca, first, "the file cannot be read")
	})
}

const noGood = "new TLS files are no good; the old ones stay"

// keeps checks that the log says why, that it says so once, and that the old certificate is shown.
func (s *site) keeps(t *testing.T, ca *authority, old tls.Certificate, why string) {
	t.Helper()
	eventually(t, "the log says why: "+why, func() bool {
		log := s.log.String()
		return strings.Contains(log, noGood) && strings.Contains(log, why)
	})
	for range 20 {
		n, err := s.shown(&tls.Config{RootCAs: ca.pool()})
		if err != nil || n.Cmp(old.Leaf.SerialNumber) != 0 {
			t.Fatalf("certificate %v, error %v", n, err)
		}
	}
	if n := strings.Count(s.log.String(), noGood); n != 1 {
		t.Errorf("the log says so %d times", n)
	}
	if _, err := s.call(client(t, &tls.Config{RootCAs: ca.pool()}), "echo"); err != nil {
		t.Error(err)
	}
}

func (s *site) becomes(ca *authority, c tls.Certificate) {
	s.t.Helper()
	eventually(s.t, "the new certificate is shown", func() bool {
		n, err := s.shown(&tls.Config{RootCAs: ca.pool()})
		return err == nil && n.Cmp(c.Leaf.SerialNumber) == 0
	})
}

// The certificate fits the name that a client asks for.
func TestNames(t *testing.T) {
	ca := newAuthority(t)
	a, b, wild := ca.issue(long, "a.example.com", "127.0.0.1"), ca.issue(long, "b.example.com"), ca.issue(long, "*.c.example.com")
	s := serve(t, certs.ServerOptions{Pairs: []certs.Pair{pairIn(t, a), pairIn(t, b), pairIn(t, wild)}}, assembly.Options{})
	for name, want := range map[string]tls.Certificate{"a.example.com": a, "b.example.com": b, "x.c.example.com": wild, "127.0.0.1": a} {
		n, err := s.shown(&tls.Config{RootCAs: ca.pool(), ServerName: name})
		if err != nil || n.Cmp(want.Leaf.SerialNumber) != 0 {
			t.Errorf("%s: certificate %v, error %v", name, n, err)
		}
	}
	if _, err := s.shown(&tls.Config{RootCAs: ca.pool(), ServerName: "other.example.com"}); err == nil {
		t.Error("a certificate for a name that is not served")
	}
}

func TestVersions(t *testing.T) {
	ca := newAuthority(t)
	files := pairIn(t, ca.issue(long, "127.0.0.1"))
	for _, c := range []struct {
		oldest, spoken uint16
		ok             bool
	}{
		{0, tls.VersionTLS10, false}, {0, tls.VersionTLS11, false}, {0, tls.VersionTLS12, true}, {0, tls.VersionTLS13, true},
		{tls.VersionTLS13, tls.VersionTLS12, false}, {tls.VersionTLS13, tls.VersionTLS13, true},
	} {
		s := serve(t, certs.ServerOptions{Pairs: []certs.Pair{files}, MinVersion: c.oldest}, assembly.Options{})
		resp, err := s.call(client(t, &tls.Config{RootCAs: ca.pool(), MinVersion: c.spoken, MaxVersion: c.spoken}), "echo")
		switch {
		case (err == nil) != c.ok:
			t.Errorf("oldest %s, spoken %s: %v", tls.VersionName(c.oldest), tls.VersionName(c.spoken), err)
		case err != nil && !strings.Contains(err.Error(), "protocol version"):
			t.Errorf("refused for another reason: %v", err)
		case err == nil && resp.ProtoMajor != 2:
			t.Errorf("spoke %s, not HTTP/2", resp.Proto)
		}
	}
	s := serve(t, certs.ServerOptions{Pairs: []certs.Pair{files}}, assembly.Options{})
	resp, err := http.Get("http://" + s.addr + "/health")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusBadRequest {
		t.Errorf("plain HTTP: status %d", resp.StatusCode)
	}
}

// Which certificates of clients are taken, in every mode.
func TestClientCertificates(t *testing.T) {
	ca, foreign := newAuthority(t), newAuthority(t)
	files := pairIn(t, ca.issue(long, "127.0.0.1"))
	shown := map[string]*tls.Certificate{"none": nil}
	for name, c := range map[string]tls.Certificate{
		"ours": ca.issue(long, "client"), "foreign": foreign.issue(long, "client"), "expired": ca.issue(-time.Hour, "client"),
	} {
		shown[name] = &c
	}
	for _, c := range []struct {
		mode tls.ClientAuthType
		ok   map[string]bool
	}{
		{tls.NoClientCert, map[string]bool{"none": true, "ours": true, "foreign": true, "expired": true}}, // not asked for
		{tls.VerifyClientCertIfGiven, map[string]bool{"none": true, "ours": true}},
		{tls.RequireAndVerifyClientCert, map[string]bool{"ours": true}},
		{tls.RequestClientCert, map[string]bool{"none": true, "ours": true, "foreign": true, "expired": true}},
	} {
		o := certs.ServerOptions{Pairs: []certs.Pair{files}, Clients: c.mode}
		if c.mode == tls.VerifyClientCertIfGiven || c.mode == tls.RequireAndVerifyClientCert {
			o.ClientCAs = ca.file()
		}
		s := serve(t, o, assembly.Options{})
		for name, cert := range shown {
			for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
				conf := &tls.Config{RootCAs: ca.pool(), MaxVersion: version}
				if cert != nil {
					conf.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert, nil }
				}
				if _, err := s.call(client(t, conf), "echo"); (err == nil) != c.ok[name] {
					t.Errorf("mode %v, certificate %s, %s: %v", c.mode, name, tls.VersionName(version), err)
				}
			}
		}
	}
}

// When the authorities of clients change, a client of the old one gets no further: not with a new
// handshake, and not by taking an old session up again.
func TestClientAuthoritiesChange(t *testing.T) {
	old, next := newAuthority(t), newAuthority(t)
	files, cas := pairIn(t, old.issue(long, "127.0.0.1")), old.file()
	s := serve(t, certs.ServerOptions{Pairs: []certs.Pair{files}, Clients: tls.RequireAndVerifyClientCert, ClientCAs: cas}, assembly.Options{})
	with := func(a *authority) *tls.Config {
		return &tls.Config{RootCAs: old.pool(), Certificates: []tls.Certificate{a.issue(long, "client")}, ClientSessionCache: tls.NewLRUClientSessionCache(8)}
	}
	was, is := with(old), with(next)
	for i := range 2 {
		c := client(t, was)
		resp, err := s.call(c, "echo")
		if err != nil || resp.TLS.DidResume != (i > 0) {
			t.Fatalf("handshake %d: %v; the session has to be taken up", i, err)
		}
		c.CloseIdleConnections()
	}
	write(t, cas, encode("CERTIFICATE", next.cert.Raw))
	eventually(t, "clients of the new authority are let in", func() bool { _, err := s.call(client(t, is), "echo"); return err == nil })
	if _, err := s.call(client(t, was), "echo"); err == nil {
		t.Error("a client of the old authority got in")
	}
	write(t, cas, []byte("nonsense"))
	eventually(t, "the log says why", func() bool { return strings.Contains(s.log.String(), "holds no certificate in PEM form") })
	if _, err := s.call(client(t, is), "echo"); err != nil {
		t.Error(err)
	}
}

// Certificates that end soon show on /ready and in the metrics.
func TestExpiry(t *testing.T) {
	ca := newAuthority(t)
	soon, later := ca.issue(3*24*time.Hour, "soon.example.com", "127.0.0.1"), ca.issue(long, "later.example.com")
	reader := metric.NewManualReader()
	s := serve(t, certs.ServerOptions{Pairs: []certs.Pair{pairIn(t, soon), pairIn(t, later)}}, assembly.Options{Meter: metric.NewMeterProvider(metric.WithReader(reader))})
	var body string
	eventually(t, "ready", func() bool {
		resp, err := client(t, &tls.Config{RootCAs: ca.pool()}).Get("https://" + s.addr + "/ready")
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		raw, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		body = string(raw)
		return resp.StatusCode == http.StatusOK
	})
	if want := `{"status":"ready","warnings":["the certificate of soon.example.com expires at ` + soon.Leaf.NotAfter.Format(time.RFC3339) + "\"]}\n"; body != want {
		t.Errorf("got %s, want %s", body, want)
	}
	eventually(t, "the log warns", func() bool {
		return strings.Contains(s.log.String(), "a certificate has to be renewed") && !strings.Contains(s.log.String(), "later.example.com")
	})
	var all metricdata.ResourceMetrics
	if err := reader.Collect(t.Context(), &all); err != nil {
		t.Fatal(err)
	}
	got := map[string]float64{}
	for _, scope := range all.ScopeMetrics {
		for _, m := range scope.Metrics {
			if g, ok := m.Data.(metricdata.Gauge[float64]); ok && m.Name == "newel.tls.certificate.expiry.timestamp" {
				for _, p := range g.DataPoints {
					name, _ := p.Attributes.Value("name")
					got[name.AsString()] = p.Value
				}
			}
		}
	}
	if len(got) != 2 || got["soon.example.com"] != float64(soon.Leaf.NotAfter.Unix()) || got["later.example.com"] != float64(later.Leaf.NotAfter.Unix()) {
		t.Errorf("metrics: %v", got)
	}
}

// Behind a proxy that speaks TLS, plain HTTP of others is answered for probes alone.
func TestBehindProxy(t *testing.T) {
	h, err := assembly.Build(t.Context(), &assembly.Options{
		Name: "https", Backends: []call.Backend{echo()}, Proxies: []netip.Prefix{netip.MustParsePrefix("10.0.3.0/24"), netip.MustParsePrefix("fd00::7/128")},
	})
	if err != nil {
		t.Fatal(err)
	}
	served := h.Handler()
	for peer, trusted := range map[string]bool{
		"10.0.3.7:1": true, "[fd00::7]:1": true, "127.0.0.1:1": true, "[::ffff:10.0.3.7]:1": true,
		"10.0.4.7:1": false, "8.8.8.8:1": false, "[fd00::8]:1": false, "": false, "@": false,
	} {
		for path, probe := range map[string]bool{"/mcp": false, "/health": true, "/ready": true, "/metrics": true, "/.well-known/oauth-protected-resource": false, "/health/../mcp": false} {
			r := httptest.NewRequest(http.MethodGet, path, nil)
			r.RemoteAddr = peer
			r.Header.Set("X-Forwarded-For", "10.0.3.7") // what a peer says of itself is nothing
			w := httptest.NewRecorder()
			served.ServeHTTP(w, r)
			if refused := w.Code == http.StatusForbidden && strings.Contains(w.Body.String(), "tls.trusted_proxies"); refused != (!trusted && !probe) {
				t.Errorf("%s from %q: status %d", path, peer, w.Code)
			}
		}
	}
}
