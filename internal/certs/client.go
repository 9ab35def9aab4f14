package certs

import (
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"
)

// ClientOptions say what is shown to a server and expected of it. The zero value shows nothing and
// trusts the authorities of the system.
type ClientOptions struct {
	Pair       Pair         // shown if the server asks; read again when it changes; zero: none
	CA         string       // file of the authorities that are trusted instead of the system's; read at start
	ServerName string       // name in the server's certificate; "": that of the address
	Pins       []string     // see Pin: one of them has to be in the server's chain; empty: not asked for
	Logger     *slog.Logger // nil discards
	Where      func(setting string) string
}

// Client returns the TLS side of connections to a server, of TLS 1.2 or later. Nothing is dialled.
// The error joins all problems.
func Client(o ClientOptions) (*tls.Config, error) {
	where := o.Where
	if where == nil {
		where = func(setting string) string { return setting }
	}
	c := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: o.ServerName}
	var problems []error
	bad := func(setting string, err error) {
		problems = append(problems, fmt.Errorf("%s: %w", where(setting), err))
	}
	switch {
	case (o.Pair.Certificate == "") != (o.Pair.Key == ""):
		bad("client_certificate", errors.New("a certificate and its key belong together: write both client_certificate and client_key"))
	case o.Pair.Certificate != "":
		f := followPair(o.Pair.Certificate, o.Pair.Key)
		if err := f.load(); err != nil {
			bad("client_certificate", err)
		}
		c.GetClientCertificate = shown(f, o.Logger)
	}
	if o.CA != "" {
		f := followPool(o.CA)
		if err := f.load(); err != nil {
			bad("ca", err)
		}
		c.RootCAs = f.value
	}
	pins := make([]string, len(o.Pins))
	for i, p := range o.Pins {
		raw, err := base64.StdEncoding.DecodeString(strings.TrimPrefix(p, pinPrefix))
		if err != nil || len(raw) != sha256.Size || !strings.HasPrefix(p, pinPrefix) {
			bad(fmt.Sprintf("pins[%d]", i), fmt.Errorf("%q is not a pin: write %s and the SHA-256 of the public key (SPKI) in base64", p, pinPrefix))
		}
		pins[i] = p
	}
	if len(pins) > 0 {
		c.VerifyConnection = func(s tls.ConnectionState) error { return checkPins(s, pins) }
	}
	return c, errors.Join(problems...)
}

// clientEvery is how often the files of a client's certificate are looked at, at most.
const clientEvery = 5 * time.Second

// shown returns the pair that is shown to servers: looked at again when a connection needs it.
func shown(f *followed[*tls.Certificate], log *slog.Logger) func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	var mu sync.Mutex
	last := time.Now()
	return func(r *tls.CertificateRequestInfo) (*tls.Certificate, error) {
		mu.Lock()
		defer mu.Unlock()
		if now := time.Now(); now.Sub(last) >= clientEvery {
			last = now
			if _, err := f.refresh(); err != nil {
				log.LogAttrs(r.Context(), slog.LevelError, "new TLS files are no good; the old ones stay", slog.String("error", err.Error()))
			}
		}
		return f.value, nil
	}
}

const pinPrefix = "sha256/"

// Pin returns the pin of a certificate: sha256/ and the base64 of the SHA-256 of its public key with
// its algorithm (SubjectPublicKeyInfo), as in RFC 7469.
func Pin(c *x509.Certificate) string {
	sum := sha256.Sum256(c.RawSubjectPublicKeyInfo)
	return pinPrefix + base64.StdEncoding.EncodeToString(sum[:])
}

// A PinError is a server with another key than those expected, though its certificate is good.
type PinError struct {
	Server string // as it was asked for
	Seen   string // pin of its certificate
}

// Error says what was seen, and what to do if that is right.
func (e *PinError) Error() string {
	return fmt.Sprintf("the certificate of %s has the pin %s, which is not among the pins configured, nor is that of its authority; if its key was changed on purpose, add this pin", e.Server, e.Seen)
}

// checkPins looks for a pin in the chains that were verified: of the server itself or of an
// authority above it.
func checkPins(s tls.ConnectionState, pins []string) error {
	for _, chain := range s.VerifiedChains {
		if slices.ContainsFunc(chain, func(c *x509.Certificate) bool { return slices.Contains(pins, Pin(c)) }) {
			return nil
		}
	}
	return &PinError{Server: s.ServerName, Seen: Pin(s.PeerCertificates[0])}
}
