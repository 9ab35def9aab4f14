// Package verify tells who presents an access token: the resource server's half of OAuth 2.1.
//
// Start reading at [Verifier.Verify]. keys.go keeps the keys of issuers, claims.go judges what a
// token says, introspect.go asks about opaque ones.
//
// Refuses: tokens that are not signed by a key of a configured issuer with an allowed algorithm,
// are for somebody else, have expired, are no access tokens, or are bound to a key that was not
// shown. The caller learns only that the token is not valid; why is the private cause. Needs: the
// issuers, now and then. When one is down its last keys hold for a day; a token of a key that was
// never seen then fails with Unavailable. A signature is checked once and remembered for at most a
// minute, claims are judged on every call.
package verify

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/go-json-experiment/json"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/egress"
	"newel.dev/newel/internal/faultpoint"
	"newel.dev/newel/internal/identity/dpop"
	"newel.dev/newel/internal/identity/jws"
	"newel.dev/newel/internal/secret"
)

// An Issuer is an authorization server whose tokens are accepted.
type Issuer struct {
	URL          string        // exactly as in the iss claim
	Audiences    []string      // what aud may name; default: the resource
	Algorithms   []string      // default: RS256, PS256, ES256, ES384, EdDSA, Ed25519
	Profile      string        // rfc9068 (default, strict), entra, okta, keycloak, dex: how its tokens look
	JWKS         string        // address of its keys; default: discovered
	Keys         KeySource     // its keys, when they are in this process: nothing is fetched
	TenantClaim  string        // claim that names the tenant; default: none
	Tenant       string        // of all its tokens
	RolesClaim   string        // claim that lists roles; default: roles
	Scopes       []string      // of tokens that name none (not with rfc9068)
	Skew         time.Duration // tolerated difference of clocks [30 s], at most two minutes
	Introspect   string        // RFC 7662 endpoint for opaque tokens, or ""
	ClientID     string        // for introspection
	ClientSecret secret.String
}

// A KeySource returns the JWK Set (RFC 7517) of an issuer in this process.
type KeySource func() ([]byte, error)

// Options configure a Verifier.
type Options struct {
	Resource string            // canonical address of this server: the audience (RFC 8707)
	Tenants  map[string]string // tenants that have an address of their own, by audience
	Issuers  []Issuer
	// DPoPRequired refuses tokens that are bound to no key of their client (RFC 9449).
	DPoPRequired bool
	Proofs       *dpop.Shared     // with other nodes that serve this address; nil: there are none
	Private      []netip.Prefix   // private ranges in which issuers may be
	HTTP         *http.Client     // default: one that reaches public addresses, those ranges, and loopback if an issuer is there
	Now          func() time.Time // default: time.Now
}

// An Identity is who a token speaks for. It is shared by all who present the token, and not changed.
type Identity struct {
	call.Principal
	Issuer, Subject string
	Expires         time.Time
}

// A Verifier checks tokens. It is safe for concurrent use.
type Verifier struct {
	issuers map[string]*issuer
	opaque  []*issuer // those that can be asked about a token
	proofs  *dpop.Checker

	dpopRequired bool
	now          func() time.Time
	http         *http.Client

	mu       sync.Mutex // guards what is below
	verified map[[32]byte]remembered
}

type issuer struct {
	Issuer
	keys    *keySet
	tenants map[string]string // by audience
}

// remembered is a token whose signature was checked, and what it says that does not change.
type remembered struct {
	issuer   *issuer
	claims   *claims
	identity *Identity
	refused  error // why it counts for nothing, whenever
	until    time.Time
}

// Bounds of what is remembered.
const (
	maxToken      = 16 << 10 // bytes
	maxRemembered = 10_000
	rememberFor   = time.Minute
)

var defaultAlgorithms = []string{"RS256", "PS256", "ES256", "ES384", "EdDSA", "Ed25519"}

// New checks the options; nothing is asked for yet.
func New(o Options) (*Verifier, error) {
	if o.HTTP == nil {
		o.HTTP = egress.Client(egress.Options{Timeout: fetchTimeout, Allow: o.Private, Loopback: slices.ContainsFunc(o.Issuers, onLoopback)})
	}
	if o.Now == nil {
		o.Now = faultpoint.Now
	}
	v := &Verifier{issuers: map[string]*issuer{}, now: o.Now, http: o.HTTP, proofs: dpop.New("resource", o.Proofs), dpopRequired: o.DPoPRequired, verified: map[[32]byte]remembered{}}
	var problems []error
	for _, given := range o.Issuers {
		is := &issuer{Issuer: given, tenants: o.Tenants}
		if err := is.check(o.Resource); err != nil {
			problems = append(problems, fmt.Errorf("issuer %q: %w", given.URL, err))
			continue
		}
		if v.issuers[is.URL] != nil {
			problems = append(problems, fmt.Errorf("issuer %q is there twice", is.URL))
		}
		is.keys = &keySet{issuer: is.URL, uri: is.JWKS, local: is.Keys, http: o.HTTP, now: o.Now, lost: v.forget}
		v.issuers[is.URL] = is
		if is.Introspect != "" {
			v.opaque = append(v.opaque, is)
		}
	}
	if len(o.Issuers) == 0 {
		problems = append(problems, errors.New("no issuer is configured"))
	}
	return v, errors.Join(problems...)
}

func (is *issuer) check(resource string) error {
	if !secure(is.URL) {
		return errors.New("its address must be https (http only on loopback)")
	}
	for _, u := range []string{is.JWKS, is.Introspect} {
		if u != "" && !secure(u) {
			return fmt.Errorf("%s must be https (http only on loopback)", u)
		}
	}
	if len(is.Audiences) == 0 {
		if resource == "" {
			return errors.New("it needs audiences, because the address of this server is not configured")
		}
		is.Audiences = []string{resource}
	}
	if len(is.Algorithms) == 0 {
		is.Algorithms = defaultAlgorithms
	}
	for _, a := range is.Algorithms {
		if !slices.Contains(append([]string{"RS384", "RS512", "PS384", "PS512", "ES512"}, defaultAlgorithms...), a) {
			return fmt.Errorf("the algorithm %q is not allowed", a)
		}
	}
	if is.Profile == "" {
		is.Profile = "rfc9068"
	}
	if _, known := profiles[is.Profile]; !known {
		return fmt.Errorf("there is no profile %q", is.Profile)
	}
	if is.RolesClaim == "" {
		is.RolesClaim = "roles"
	}
	if is.Skew == 0 {
		is.Skew = 30 * time.Second
	}
	if is.Skew < 0 || is.Skew > 2*time.Minute {
		return errors.New("skew must be at most two minutes")
	}
	return nil
}

// secure reports whether an address is https, or http on loopback.
func secure(address string) bool {
	u, err := url.Parse(address)
	if err != nil || u.Host == "" || u.User != nil || u.Fragment != "" {
		return false
	}
	if u.Scheme == "https" {
		return true
	}
	ip, err := netip.ParseAddr(u.Hostname())
	return u.Scheme == "http" && (u.Hostname() == "localhost" || err == nil && ip.IsLoopback())
}

func onLoopback(is Issuer) bool {
	u, err := url.Parse(is.URL)
	if err != nil {
		return false
	}
	ip, err := netip.ParseAddr(u.Hostname())
	return u.Hostname() == "localhost" || err == nil && ip.IsLoopback()
}

// Run keeps the keys of all issuers fresh until ctx ends.
func (v *Verifier) Run(ctx context.Context) error {
	var all sync.WaitGroup
	for _, is := range v.issuers {
		all.Go(func() {
			for ctx.Err() == nil {
				t := time.NewTimer(is.keys.refresh(ctx))
				select {
				case <-ctx.Done():
				case <-t.C:
				}
				t.Stop()
			}
		})
	}
	all.Wait()
	return nil
}

// forget makes every signature be checked again: a key is no longer its issuer's.
func (v *Verifier) forget() {
	v.mu.Lock()
	clear(v.verified)
	v.mu.Unlock()
}

// errInvalid is all that a caller learns.
func errInvalid(cause error) error {
	return call.Errorf(call.Unauthenticated, "the access token is not valid").Because(cause)
}

// Verify returns who a bearer token speaks for, presented by itself. See VerifyPresented.
func (v *Verifier) Verify(ctx context.Context, token string) (*Identity, error) {
	return v.VerifyPresented(ctx, &Presented{Token: token})
}

// VerifyPresented returns who a token speaks for. It fails with Unauthenticated, or with
// Unavailable while an issuer cannot be asked, or proofs cannot be remembered for all nodes. A proof is
// good for one time.
func (v *Verifier) VerifyPresented(ctx context.Context, p *Presented) (*Identity, error) {
	if p.Token == "" || len(p.Token) > maxToken {
		return nil, errInvalid(errors.New("no token, or one too long"))
	}
	id := sha256.Sum256([]byte(p.Token))
	v.mu.Lock()
	known, ok := v.verified[id]
	v.mu.Unlock()
	now := v.now()
	if !ok || !now.Before(known.until) {
		var err error
		if known, err = v.signed(ctx, p.Token); err != nil {
			return nil, v.refusal(err)
		}
		known = v.remember(id, known)
	}
	if known.refused != nil {
		return nil, errInvalid(known.refused)
	}
	if err := known.issuer.current(known.claims, now); err != nil {
		return nil, errInvalid(err)
	}
	if p.Proofs != nil || known.claims.Bound != nil || v.dpopRequired {
		if err := v.confirmed(ctx, known.claims, p, now); err != nil {
			return nil, v.refusal(err)
		}
	}
	return known.identity, nil
}

// refusal tells a bad token from an issuer that cannot be asked.
func (v *Verifier) refusal(err error) error {
	var unknown errUnknownKey
	var status *unavailableError
	var own *call.Error
	switch {
	case errors.As(err, &own):
		return err
	case errors.As(err, &unknown):
		e := call.Errorf(call.Unavailable, "the access token cannot be checked now; try again in a moment")
		e.RetryAfter = unknown.after
		return e.Because(err)
	case errors.As(err, &status):
		e := call.Errorf(call.Unavailable, "the access token cannot be checked now; try again in a moment")
		e.RetryAfter = retryFirst
		return e.Because(err)
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return err
	}
	return errInvalid(err)
}

// unavailableError is an issuer that cannot be asked.
type unavailableError struct{ error }

// Unwrap returns the cause.
func (e *unavailableError) Unwrap() error { return e.error }

// remember judges what of a token does not change, and keeps it.
func (v *Verifier) remember(id [32]byte, r remembered) remembered {
	r.identity, r.refused = r.issuer.identify(r.claims)
	v.mu.Lock()
	defer v.mu.Unlock()
	if len(v.verified) >= maxRemembered { // the map hands out any: good enough, and nobody can choose
		drop := maxRemembered / 10
		for old := range v.verified {
			if drop--; drop < 0 {
				break
			}
			delete(v.verified, old)
		}
	}
	v.verified[id] = r
	return r
}

// signed checks the signature of a token and decodes it.
func (v *Verifier) signed(ctx context.Context, token string) (remembered, error) {
	if strings.Count(token, ".") != 2 {
		return v.introspect(ctx, token)
	}
	is, payload, typ, err := v.open(ctx, token)
	if err != nil {
		return remembered{}, err
	}
	c := &claims{}
	if err := json.Unmarshal(payload, c); err != nil {
		return remembered{}, fmt.Errorf("the claims: %w", err)
	}
	c.typ = typ
	return remembered{issuer: is, claims: c, until: v.now().Add(rememberFor)}, nil
}

// VerifySignature returns the type and the payload of a JWT that one of the issuers signed, with an
// allowed algorithm. It judges neither, and remembers nothing: it is for tokens that are no access
// tokens. It fails as VerifyPresented does.
func (v *Verifier) VerifySignature(ctx context.Context, token string) (typ string, payload []byte, err error) {
	if len(token) > maxToken || strings.Count(token, ".") != 2 {
		return "", nil, errInvalid(errors.New("no JWT, or one too long"))
	}
	if _, payload, typ, err = v.open(ctx, token); err != nil {
		return "", nil, v.refusal(err)
	}
	return typ, payload, nil
}

// open finds the issuer of a token in compact form and checks its signature.
func (v *Verifier) open(ctx context.Context, token string) (is *issuer, payload []byte, typ string, err error) {
	parts := strings.Split(token, ".")
	var from struct {
		Issuer string `json:"iss"`
	}
	if err := decode(parts[1], &from); err != nil {
		return nil, nil, "", err
	}
	if is = v.issuers[from.Issuer]; is == nil {
		return nil, nil, "", fmt.Errorf("the issuer %.100q is not configured", from.Issuer)
	}
	payload, typ, err = is.open(ctx, token, parts)
	return is, payload, typ, err
}

// open checks the header and signature of a token in compact form, and returns its payload and type.
func (is *issuer) open(ctx context.Context, token string, parts []string) (payload []byte, typ string, err error) {
	var head struct {
		Algorithm string   `json:"alg"`
		KeyID     string   `json:"kid"`
		Type      string   `json:"typ"`
		Critical  []string `json:"crit"`
		Encoding  string   `json:"zip"`
	}
	if err := decode(parts[0], &head); err != nil {
		return nil, "", err
	}
	switch {
	case !slices.Contains(is.Algorithms, head.Algorithm):
		return nil, "", fmt.Errorf("the algorithm %.20q is not allowed", head.Algorithm)
	case len(head.Critical) > 0 || head.Encoding != "":
		return nil, "", errors.New("the token uses extensions")
	}
	keys, err := is.keys.find(ctx, head.KeyID)
	if err != nil {
		var unknown errUnknownKey
		if !errors.Is(err, errNoKey) && !errors.As(err, &unknown) && ctx.Err() == nil {
			err = &unavailableError{err}
		}
		return nil, "", err
	}
	if payload, err = jws.Check(token, head.Algorithm, keys); err != nil {
		if newer := is.keys.again(ctx, head.KeyID, keys); len(newer) > 0 {
			payload, err = jws.Check(token, head.Algorithm, newer)
		}
	}
	return payload, head.Type, err
}

// decode decodes one part of a token, strictly.
func decode(part string, into any) error {
	raw, err := base64.RawURLEncoding.Strict().DecodeString(part)
	if err != nil {
		return err
	}
	return json.Unmarshal(raw, into)
}
