package certs

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// put writes a certificate that is valid for an hour, with its key.
func put(t *testing.T, p Pair, serial int64) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: "c"}, NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	for path, block := range map[string]*pem.Block{p.Certificate: {Type: "CERTIFICATE", Bytes: der}, p.Key: {Type: "PRIVATE KEY", Bytes: secret}} {
		if err := os.WriteFile(path, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// What is shown to a server is looked at again when a connection needs it, at most every 5 seconds.
func TestClientPairIsFollowed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		files := Pair{filepath.Join(dir, "c"), filepath.Join(dir, "k")}
		put(t, files, 1)
		c, err := Client(ClientOptions{Pair: files})
		if err != nil {
			t.Fatal(err)
		}
		shown := func() int64 {
			got, err := c.GetClientCertificate(&tls.CertificateRequestInfo{})
			if err != nil {
				t.Fatal(err)
			}
			return got.Leaf.SerialNumber.Int64()
		}
		put(t, files, 2)
		if n := shown(); n != 1 {
			t.Errorf("certificate %d: looked at for every connection", n)
		}
		time.Sleep(clientEvery)
		if n := shown(); n != 2 {
			t.Errorf("certificate %d after a change", n)
		}
		if err := os.Remove(files.Key); err != nil {
			t.Fatal(err)
		}
		time.Sleep(clientEvery)
		if n := shown(); n != 2 {
			t.Errorf("certificate %d while the key is gone", n)
		}
	})
}

// A pair that is half written for a moment is no error.
func TestHalfWritten(t *testing.T) {
	dir := t.TempDir()
	files, next := Pair{filepath.Join(dir, "c"), filepath.Join(dir, "k")}, Pair{filepath.Join(dir, "c2"), filepath.Join(dir, "k2")}
	put(t, files, 1)
	put(t, next, 2)
	f := followPair(files.Certificate, files.Key)
	if err := f.load(); err != nil {
		t.Fatal(err)
	}
	step := func(what string, wantChanged, wantErr bool) {
		t.Helper()
		if changed, err := f.refresh(); changed != wantChanged || (err != nil) != wantErr {
			t.Errorf("%s: changed %v, error %v", what, changed, err)
		}
	}
	step("nothing new", false, false)
	if err := os.Rename(next.Certificate, files.Certificate); err != nil {
		t.Fatal(err)
	}
	step("the certificate alone", false, false)
	if err := os.Rename(next.Key, files.Key); err != nil {
		t.Fatal(err)
	}
	step("its key too", true, false)
	if err := os.WriteFile(files.Key, []byte("nonsense"), 0o600); err != nil {
		t.Fatal(err)
	}
	step("nonsense", false, false)
	step("still nonsense", false, true)
	step("that was said", false, false)
	if f.value.Leaf.SerialNumber.Int64() != 2 {
		t.Error("the old pair is gone")
	}
}

func TestServerOptions(t *testing.T) {
	dir := t.TempDir()
	files := Pair{filepath.Join(dir, "c"), filepath.Join(dir, "k")}
	put(t, files, 1)
	pairs := []Pair{files}
	good := func(change func(*ACME)) *ACME {
		a := &ACME{Directory: "https://ca.example/dir", Domains: []string{"mcp.example.com"}, Cache: filepath.Join(dir, "cache"), Terms: true, HTTP: &http.Client{}}
		change(a)
		return a
	}
	for want, o := range map[string]ServerOptions{
		"there is no certificate":                          {},
		"certificates[1]: the file cannot be read":         {Pairs: []Pair{files, {"/nowhere", "/nowhere"}}},
		"are not a certificate and its key":                {Pairs: []Pair{{files.Key, files.Certificate}}},
		"client_ca: it is not said whose":                  {Pairs: pairs, Clients: tls.RequireAndVerifyClientCert},
		"client_ca: certificates of clients are not":       {Pairs: pairs, Clients: tls.RequestClientCert, ClientCAs: files.Certificate},
		"client_ca: the file cannot be read":               {Pairs: pairs, Clients: tls.VerifyClientCertIfGiven, ClientCAs: "/nowhere"},
		dir + " is not a file":                             {Pairs: []Pair{{dir, files.Key}}},
		"acme: name the domains":                           {ACME: good(func(a *ACME) { a.Domains = nil })},
		"acme: the authority issues certificates to those": {ACME: good(func(a *ACME) { a.Terms = false })},
		"acme: name a folder (cache)":                      {ACME: good(func(a *ACME) { a.Cache = "" })},
		"is not an https address":                          {ACME: good(func(a *ACME) { a.Directory = "http://ca.example/dir" })},
		`"*.example.com" is not a domain`:                  {ACME: good(func(a *ACME) { a.Domains = []string{"*.example.com"} })},
		`"localhost" is not a domain`:                      {ACME: good(func(a *ACME) { a.Domains = []string{"localhost"} })},
	} {
		if _, err := NewServer(o); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %s", err, want)
		}
	}
	if _, err := NewServer(ServerOptions{Pairs: pairs, ACME: good(func(*ACME) {})}); err != nil {
		t.Error(err)
	}
}
