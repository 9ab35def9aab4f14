package certs

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/crypto/acme"
	"golang.org/x/crypto/acme/autocert"
	"golang.org/x/net/idna"
)

// ACME is an authority that is asked for certificates (RFC 8555).
type ACME struct {
	Directory string       // its address
	Domains   []string     // exactly the names certificates are asked for; no wildcards
	Email     string       // where it may write to; "" nowhere
	Cache     string       // folder for the account, certificates and keys; made if it is not there
	Terms     bool         // the operator accepts its terms; needed
	HTTP      *http.Client // asks it; needed
}

// issuer gets certificates and keeps them fresh.
type issuer struct {
	manager   *autocert.Manager
	domains   []string
	challenge *tls.Config // of handshakes by the authority; no request comes over them
	log       *slog.Logger

	mu     sync.Mutex
	shown  map[string]*x509.Certificate // by domain
	failed map[string]string            // by domain: what was logged last
}

func newIssuer(o *ACME, log *slog.Logger) (*issuer, error) {
	u, err := url.Parse(o.Directory)
	switch {
	case err != nil || u.Scheme != "https" || u.Host == "":
		return nil, fmt.Errorf("the directory %q is not an https address", o.Directory)
	case len(o.Domains) == 0:
		return nil, errors.New("name the domains that certificates are for")
	case !o.Terms:
		return nil, errors.New("the authority issues certificates to those who accept its terms: read them, then write accept_terms: true")
	case o.Cache == "":
		return nil, errors.New("name a folder (cache) for the account and certificates: without one every start would ask for new ones, which authorities refuse after a few")
	case o.HTTP == nil:
		return nil, errors.New("there is no HTTP client")
	}
	i := &issuer{log: log, shown: map[string]*x509.Certificate{}, failed: map[string]string{}}
	for _, d := range o.Domains {
		ascii, err := idna.Lookup.ToASCII(d)
		if err != nil || !strings.Contains(strings.Trim(ascii, "."), ".") {
			return nil, fmt.Errorf("%q is not a domain that an authority gives certificates for", d)
		}
		i.domains = append(i.domains, ascii)
	}
	if err := os.MkdirAll(o.Cache, 0o700); err != nil {
		return nil, fmt.Errorf("the folder for certificates cannot be made: %w", err)
	}
	i.manager = &autocert.Manager{
		Prompt:     autocert.AcceptTOS, // the operator did
		Cache:      autocert.DirCache(o.Cache),
		HostPolicy: autocert.HostWhitelist(i.domains...),
		Client:     &acme.Client{DirectoryURL: o.Directory, HTTPClient: o.HTTP, UserAgent: "newel"},
		Email:      o.Email,
	}
	i.challenge = &tls.Config{MinVersion: tls.VersionTLS12, NextProtos: []string{acme.ALPNProto}, GetCertificate: i.manager.GetCertificate}
	return i, nil
}

// isChallenge reports whether the authority asks, or somebody who pretends to be one: they get the
// certificate of a challenge, or none, and the connection is closed after the handshake.
func isChallenge(hello *tls.ClientHelloInfo) bool {
	return len(hello.SupportedProtos) == 1 && hello.SupportedProtos[0] == acme.ALPNProto
}

// certificate implements tls.Config.GetCertificate for the domains; others are for the files.
func (i *issuer) certificate(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
	domain, err := idna.Lookup.ToASCII(strings.TrimSuffix(hello.ServerName, "."))
	if err != nil || !slices.Contains(i.domains, domain) {
		return nil, nil
	}
	c, err := i.manager.GetCertificate(hello)
	if err != nil {
		return nil, err
	}
	leaf := c.Leaf
	if leaf == nil {
		if leaf, err = x509.ParseCertificate(c.Certificate[0]); err != nil {
			return nil, err
		}
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	i.shown[domain] = leaf
	return c, nil
}

func (i *issuer) leaves() []*x509.Certificate {
	i.mu.Lock()
	defer i.mu.Unlock()
	var all []*x509.Certificate
	for _, c := range i.shown {
		all = append(all, c)
	}
	return all
}

// How often a domain is looked at: once it has a certificate that is renewed in time, and before.
const (
	lookEvery  = time.Hour
	retryFirst = 2 * time.Second
	retryMost  = 10 * time.Minute
)

// run gets the certificates before somebody asks for them.
func (i *issuer) run(ctx context.Context) {
	var all sync.WaitGroup
	for _, domain := range i.domains {
		all.Go(func() {
			pause := retryFirst
			for {
				next := lookEvery
				if err := i.obtain(ctx, domain); err != nil {
					next, pause = pause, min(2*pause, retryMost)
				} else {
					pause = retryFirst
				}
				t := time.NewTimer(next)
				select {
				case <-ctx.Done():
					t.Stop()
					return
				case <-t.C:
				}
			}
		})
	}
	all.Wait()
}

// obtain gets one certificate, from the cache or the authority. It does not wait for the authority
// when ctx ends.
func (i *issuer) obtain(ctx context.Context, domain string) error {
	hello := &tls.ClientHelloInfo{
		ServerName: domain, SupportedProtos: protocols, SupportedVersions: []uint16{tls.VersionTLS13},
		SignatureSchemes: []tls.SignatureScheme{tls.ECDSAWithP256AndSHA256}, SupportedCurves: []tls.CurveID{tls.CurveP256},
		CipherSuites: []uint16{tls.TLS_AES_128_GCM_SHA256, tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256},
	}
	done := make(chan error, 1)
	go func() {
		_, err := i.certificate(hello)
		done <- err
	}()
	var err error
	select {
	case <-ctx.Done():
		return ctx.Err()
	case err = <-done:
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	if err == nil {
		delete(i.failed, domain)
		return nil
	}
	if i.failed[domain] != err.Error() {
		i.failed[domain] = err.Error()
		i.log.LogAttrs(ctx, slog.LevelError, "there is no certificate of the ACME authority yet; it is asked again", slog.String("domain", domain), slog.String("error", err.Error()))
	}
	return err
}
