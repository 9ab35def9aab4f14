// Package certs holds certificates while a program runs: those that its listener shows, those that
// it asks clients for, and those that it shows to other servers and expects of them.
//
// Start at [NewServer] and [Client]. Files are read again when they change, without a restart and
// without touching a connection: handshakes that come later see the new ones. New files that are no
// good keep the old ones, and the log says why. Authorities that speak ACME (RFC 8555) are asked
// with the challenge tls-alpn-01 (RFC 8737), on the port that is served.
package certs

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
)

// Pair names the files of a certificate, followed by those that lead to its authority, and of its
// key; both in PEM form.
type Pair struct{ Certificate, Key string }

// ServerOptions configure what a listener shows and asks for. Either Pairs or ACME is needed.
type ServerOptions struct {
	Pairs      []Pair             // the one that fits the name a client asks for is shown; the first if none does
	MinVersion uint16             // oldest version of TLS [1.2]
	Clients    tls.ClientAuthType // whether clients have to show a certificate [no]
	ClientCAs  string             // file of the authorities of their certificates; needed where they are verified
	ACME       *ACME              // nil: no certificates are asked for
	Interval   time.Duration      // how often files are read again [5 s]
	Logger     *slog.Logger       // nil discards
	Where      func(setting string) string
}

// A Server is the certificates of a listener. It is safe for concurrent use.
type Server struct {
	o       ServerOptions
	issuer  *issuer // nil: no ACME
	current atomic.Pointer[tls.Config]

	mu     sync.Mutex // guards what is below
	pairs  []*followed[*tls.Certificate]
	pool   *followed[*x509.CertPool] // nil: none
	warned map[string]time.Time      // when the log last warned of a certificate
}

// NewServer reads the files and checks the options; nothing is started or asked for.
func NewServer(o ServerOptions) (*Server, error) {
	o.MinVersion = cmp.Or(o.MinVersion, tls.VersionTLS12)
	o.Interval = cmp.Or(max(o.Interval, 0), 5*time.Second)
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Where == nil {
		o.Where = func(setting string) string { return setting }
	}
	s := &Server{o: o, warned: map[string]time.Time{}}
	var problems []error
	bad := func(setting string, err error) {
		problems = append(problems, fmt.Errorf("%s: %w", o.Where(setting), err))
	}
	if len(o.Pairs) == 0 && o.ACME == nil {
		bad("", errors.New("there is no certificate: write certificates with files, or acme"))
	}
	for i, p := range o.Pairs {
		f := followPair(p.Certificate, p.Key)
		if err := f.load(); err != nil {
			bad("certificates["+strconv.Itoa(i)+"]", err)
		}
		s.pairs = append(s.pairs, f)
	}
	verified := o.Clients == tls.VerifyClientCertIfGiven || o.Clients == tls.RequireAndVerifyClientCert
	switch {
	case verified && o.ClientCAs == "":
		bad("client_ca", errors.New("it is not said whose certificates clients may show: name the file of their authorities"))
	case !verified && o.ClientCAs != "":
		bad("client_ca", errors.New("certificates of clients are not verified: write client_certificates: required or optional, or leave client_ca out"))
	case verified:
		s.pool = followPool(o.ClientCAs)
		if err := s.pool.load(); err != nil {
			bad("client_ca", err)
		}
	}
	if o.ACME != nil {
		var err error
		if s.issuer, err = newIssuer(o.ACME, o.Logger); err != nil {
			bad("acme", err)
		}
	}
	if len(problems) > 0 {
		return nil, errors.Join(problems...)
	}
	s.show()
	return s, nil
}

// protocols are what is spoken in TLS, the preferred one first.
var protocols = []string{"h2", "http/1.1"}

// Config returns what a listener needs. It stays the same: what changes is looked up with every
// handshake.
func (s *Server) Config() *tls.Config {
	c := &tls.Config{
		MinVersion: s.o.MinVersion,
		NextProtos: protocols,
		GetConfigForClient: func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
			if s.issuer != nil && isChallenge(hello) {
				return s.issuer.challenge, nil
			}
			return s.current.Load(), nil
		},
	}
	return c
}

// show makes what was read last what handshakes see.
func (s *Server) show() {
	c := &tls.Config{MinVersion: s.o.MinVersion, NextProtos: protocols, ClientAuth: s.o.Clients}
	for _, p := range s.pairs {
		c.Certificates = append(c.Certificates, *p.value)
	}
	if s.pool != nil {
		c.ClientCAs = s.pool.value
	}
	if s.issuer != nil {
		c.GetCertificate = s.issuer.certificate
	}
	s.current.Store(c)
}

// Run follows the files and asks the authority for certificates until ctx ends. What was asked of an
// authority and is not answered yet may take five minutes longer.
func (s *Server) Run(ctx context.Context) error {
	var all sync.WaitGroup
	if s.issuer != nil {
		all.Go(func() { s.issuer.run(ctx) })
	}
	tick := time.NewTicker(s.o.Interval)
	defer tick.Stop()
	s.warn(ctx)
	for {
		select {
		case <-ctx.Done():
			all.Wait()
			return nil
		case <-tick.C:
			s.refresh(ctx)
			s.warn(ctx)
		}
	}
}

// refresh reads all files again.
func (s *Server) refresh(ctx context.Context) {
	s.mu.Lock()
	defer s.mu.Unlock()
	different := false
	note := func(changed bool, err error, what string) {
		different = different || changed
		switch {
		case err != nil:
			s.o.Logger.LogAttrs(ctx, slog.LevelError, "new TLS files are no good; the old ones stay", slog.String("error", err.Error()))
		case changed:
			s.o.Logger.LogAttrs(ctx, slog.LevelInfo, "TLS files were read again", slog.String("file", what))
		}
	}
	for _, p := range s.pairs {
		changed, err := p.refresh()
		note(changed, err, p.paths[0])
	}
	if s.pool != nil {
		changed, err := s.pool.refresh()
		note(changed, err, s.pool.paths[0])
	}
	if different {
		s.show()
	}
}

// Expiries returns when certificates end, by name; of several for one name the first to end.
func (s *Server) Expiries() map[string]time.Time {
	out := map[string]time.Time{}
	for _, c := range s.leaves() {
		name := nameOf(c)
		if t, ok := out[name]; !ok || c.NotAfter.Before(t) {
			out[name] = c.NotAfter
		}
	}
	return out
}

// leaves are the certificates shown.
func (s *Server) leaves() []*x509.Certificate {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []*x509.Certificate
	for _, p := range s.pairs {
		all = append(all, p.value.Leaf)
	}
	if s.issuer != nil {
		all = append(all, s.issuer.leaves()...)
	}
	return all
}

// nameOf is what people call a certificate.
func nameOf(c *x509.Certificate) string {
	if len(c.DNSNames) > 0 {
		return c.DNSNames[0]
	}
	if len(c.IPAddresses) > 0 {
		return c.IPAddresses[0].String()
	}
	return cmp.Or(c.Subject.CommonName, c.SerialNumber.String())
}

// Warnings says which certificates end soon: within 14 days, or the last quarter of a shorter life.
func (s *Server) Warnings() []string {
	var all []string
	now := time.Now()
	for _, c := range s.leaves() {
		left := c.NotAfter.Sub(now)
		switch {
		case left <= 0:
			all = append(all, fmt.Sprintf("the certificate of %s expired at %s", nameOf(c), c.NotAfter.UTC().Format(time.RFC3339)))
		case left < min(14*24*time.Hour, c.NotAfter.Sub(c.NotBefore)/4):
			all = append(all, fmt.Sprintf("the certificate of %s expires at %s", nameOf(c), c.NotAfter.UTC().Format(time.RFC3339)))
		}
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// warn logs the warnings, each once a day.
func (s *Server) warn(ctx context.Context) {
	for _, w := range s.Warnings() {
		s.mu.Lock()
		last := s.warned[w]
		due := time.Since(last) > 24*time.Hour
		if due {
			s.warned[w] = time.Now()
		}
		s.mu.Unlock()
		if due {
			s.o.Logger.LogAttrs(ctx, slog.LevelWarn, "a certificate has to be renewed", slog.String("warning", w))
		}
	}
}
