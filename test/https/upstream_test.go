package https

import (
	"bytes"
	"crypto/tls"
	"encoding/pem"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	"newel.dev/newel/internal/assembly"
	"newel.dev/newel/internal/backend/mcpupstream"
	"newel.dev/newel/internal/certs"
	"newel.dev/newel/internal/module"
)

// lists asks an upstream for what it publishes and returns why that failed, or "".
func lists(t *testing.T, c mcpupstream.Config) string {
	t.Helper()
	u, err := mcpupstream.New("up", c, module.Env{Dir: t.TempDir(), Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	caps, err := u.Capabilities(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	problem := u.Status().Problem
	if (len(caps) > 0) != (problem == "") {
		t.Errorf("%d capabilities, problem %q", len(caps), problem)
	}
	return problem
}

// What is expected of an upstream, and what is said when it is something else.
func TestUpstream(t *testing.T) {
	ca, foreign := newAuthority(t), newAuthority(t)
	leaf := ca.issue(long, "127.0.0.1", "mcp.example.com")
	s := serve(t, certs.ServerOptions{Pairs: []certs.Pair{pairIn(t, leaf)}}, assembly.Options{})
	stale := serve(t, certs.ServerOptions{Pairs: []certs.Pair{pairIn(t, ca.issue(-time.Hour, "127.0.0.1"))}}, assembly.Options{})
	old := serve(t, certs.ServerOptions{Pairs: []certs.Pair{pairIn(t, leaf)}}, assembly.Options{})
	trusted, spare := ca.file(), certs.Pin(foreign.cert)
	for name, c := range map[string]struct {
		addr string
		tls  mcpupstream.TLS
		want string // part of the problem; "" works
	}{
		"its authority":         {s.addr, mcpupstream.TLS{CA: trusted}, ""},
		"the system's":          {s.addr, mcpupstream.TLS{}, "certificate signed by unknown authority"},
		"another authority":     {s.addr, mcpupstream.TLS{CA: foreign.file()}, "certificate signed by unknown authority"},
		"expired":               {stale.addr, mcpupstream.TLS{CA: trusted}, "certificate has expired"},
		"name":                  {s.addr, mcpupstream.TLS{CA: trusted, ServerName: "mcp.example.com"}, ""},
		"another name":          {s.addr, mcpupstream.TLS{CA: trusted, ServerName: "other.example.com"}, "not other.example.com"},
		"pin":                   {s.addr, mcpupstream.TLS{CA: trusted, Pins: []string{certs.Pin(leaf.Leaf)}}, ""},
		"pin of its authority":  {s.addr, mcpupstream.TLS{CA: trusted, Pins: []string{certs.Pin(ca.cert)}}, ""},
		"pins, one of them its": {old.addr, mcpupstream.TLS{CA: trusted, Pins: []string{spare, certs.Pin(leaf.Leaf)}}, ""},
		"another pin":           {s.addr, mcpupstream.TLS{CA: trusted, Pins: []string{spare}}, "has the pin " + certs.Pin(leaf.Leaf) + ", which is not among the pins configured"},
		"a pin is no authority": {s.addr, mcpupstream.TLS{Pins: []string{certs.Pin(leaf.Leaf)}}, "certificate signed by unknown authority"},
	} {
		t.Run(name, func(t *testing.T) {
			got := lists(t, mcpupstream.Config{URL: "https://" + c.addr + "/mcp", TLS: c.tls})
			if c.want == "" && got != "" || !strings.Contains(got, c.want) {
				t.Errorf("got %q, want %q", got, c.want)
			}
		})
	}
}

// An upstream that asks for a certificate gets the one configured.
func TestUpstreamClientCertificate(t *testing.T) {
	ca, foreign := newAuthority(t), newAuthority(t)
	s := serve(t, certs.ServerOptions{Pairs: []certs.Pair{pairIn(t, ca.issue(long, "127.0.0.1"))}, Clients: tls.RequireAndVerifyClientCert, ClientCAs: ca.file()}, assembly.Options{})
	ours, theirs := pairIn(t, ca.issue(long, "gateway")), pairIn(t, foreign.issue(long, "gateway"))
	trusted := ca.file()
	for name, c := range map[string]struct {
		pair certs.Pair
		ok   bool
	}{"ours": {ours, true}, "foreign": {theirs, false}, "none": {certs.Pair{}, false}} {
		got := lists(t, mcpupstream.Config{URL: "https://" + s.addr + "/mcp", TLS: mcpupstream.TLS{CA: trusted, Certificate: c.pair.Certificate, Key: c.pair.Key}})
		if (got == "") != c.ok { // whether the refusal or the end of the connection is read first is chance
			t.Errorf("%s: %q", name, got)
		}
	}
}

// What cannot work is refused before anything is dialled, with its place.
func TestUpstreamSettings(t *testing.T) {
	ca := newAuthority(t)
	files := pairIn(t, ca.issue(long, "gateway"))
	for want, c := range map[string]mcpupstream.Config{
		"tls.client_certificate: a certificate and its key belong together": {URL: "https://x.example/mcp", TLS: mcpupstream.TLS{Certificate: files.Certificate}},
		"tls.client_certificate: the file cannot be read":                   {URL: "https://x.example/mcp", TLS: mcpupstream.TLS{Certificate: "/nowhere", Key: files.Key}},
		"tls.ca: " + files.Key + " holds no certificate":                    {URL: "https://x.example/mcp", TLS: mcpupstream.TLS{CA: files.Key}},
		`tls.pins[0]: "sha256/x" is not a pin`:                              {URL: "https://x.example/mcp", TLS: mcpupstream.TLS{Pins: []string{"sha256/x"}}},
		"tls: the address is http, where nothing is shown or expected":      {URL: "http://x.example/mcp", TLS: mcpupstream.TLS{Pins: []string{"sha256/x"}}},
		"tls: tls and private_ranges are for servers with a url":            {Command: "x", Private: []string{"10.0.0.0/8"}},
		`private_ranges[0]: "10.0.0.0" is not a range of addresses`:         {URL: "https://x.example/mcp", Private: []string{"10.0.0.0"}},
	} {
		_, err := mcpupstream.New("up", c, module.Env{Position: func(setting string) string { return setting }})
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %s", err, want)
		}
	}
}

// An upstream is reached where its operator wrote, and not where somebody else leads.
func TestUpstreamAddresses(t *testing.T) {
	reached := false
	inner := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { reached = true }))
	t.Cleanup(inner.Close)
	leads := httptest.NewServer(http.RedirectHandler(inner.URL+"/mcp", http.StatusTemporaryRedirect))
	t.Cleanup(leads.Close)
	if got := lists(t, mcpupstream.Config{URL: leads.URL + "/mcp"}); !strings.Contains(got, "redirect") || reached {
		t.Errorf("got %q, reached: %v", got, reached)
	}
	for _, u := range []string{"http://169.254.169.254/mcp", "http://100.100.100.200/mcp", "http://168.63.129.16/mcp", "http://0.0.0.0:1/mcp", "http://[::ffff:169.254.169.254]/mcp", "http://[64:ff9b::7f00:1]/mcp"} {
		if got := lists(t, mcpupstream.Config{URL: u}); !strings.Contains(got, "may not be reached from here") {
			t.Errorf("%s: %q", u, got)
		}
	}
	to, err := url.Parse(inner.URL)
	if err != nil {
		t.Fatal(err)
	}
	if got := lists(t, mcpupstream.Config{URL: "http://localhost:" + to.Port() + "/mcp"}); strings.Contains(got, "may not be reached") || !reached {
		t.Errorf("localhost: %q", got)
	}
}

// A certificate written as one file with its authority is shown as a chain.
func TestChain(t *testing.T) {
	root := newAuthority(t)
	middle := &authority{t: t}
	between := *root.cert
	between.Subject.CommonName, between.SubjectKeyId = "Between", nil
	middle.cert, middle.key = middle.sign(&between, root)
	leaf := middle.issue(long, "127.0.0.1")
	files := pairIn(t, leaf)
	var chain bytes.Buffer
	for _, der := range [][]byte{leaf.Certificate[0], middle.cert.Raw} {
		if err := pem.Encode(&chain, &pem.Block{Type: "CERTIFICATE", Bytes: der}); err != nil {
			t.Fatal(err)
		}
	}
	write(t, files.Certificate, chain.Bytes())
	s := serve(t, certs.ServerOptions{Pairs: []certs.Pair{files}}, assembly.Options{})
	if got := lists(t, mcpupstream.Config{URL: "https://" + s.addr + "/mcp", TLS: mcpupstream.TLS{CA: root.file(), Pins: []string{certs.Pin(middle.cert)}}}); got != "" {
		t.Error(got)
	}
}
