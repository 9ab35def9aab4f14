package exchange

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"

	"newel.dev/newel/internal/secret"
)

// Types of grants and tokens (RFC 7523, RFC 8693, and the identity assertion grant of
// draft-ietf-oauth-identity-assertion-authz-grant).
const (
	grantJWT      = "urn:ietf:params:oauth:grant-type:jwt-bearer"
	grantExchange = "urn:ietf:params:oauth:grant-type:token-exchange"
	typeIDToken   = "urn:ietf:params:oauth:token-type:id_token"
	typeIDJAG     = "urn:ietf:params:oauth:token-type:id-jag"
	assertionJWT  = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
)

// credentials are what a client has at one authorization server.
type credentials struct {
	id     string
	secret secret.String
	key    crypto.Signer
	method string // how it proves who it is; "": what the server supports
}

// ParseKey reads a private key: PEM of PKCS #8, or of the older forms for EC and RSA.
func ParseKey(text []byte) (crypto.Signer, error) {
	block, _ := pem.Decode(text)
	if block == nil {
		return nil, errors.New("it is not PEM")
	}
	var key any
	var err error
	switch block.Type {
	case "PRIVATE KEY":
		key, err = x509.ParsePKCS8PrivateKey(block.Bytes)
	case "EC PRIVATE KEY":
		key, err = x509.ParseECPrivateKey(block.Bytes)
	case "RSA PRIVATE KEY":
		key, err = x509.ParsePKCS1PrivateKey(block.Bytes)
	default:
		return nil, fmt.Errorf("it holds a %q, not a private key", block.Type)
	}
	if err != nil {
		return nil, err
	}
	signer, ok := key.(crypto.Signer)
	if !ok || len(algorithmsOf(signer)) == 0 {
		return nil, fmt.Errorf("a key of type %T cannot sign here; use EC P-256 or P-384, Ed25519, or RSA from 2048 bits on", key)
	}
	return signer, nil
}

// algorithmsOf returns what a key signs with, best first.
func algorithmsOf(key crypto.Signer) []jose.SignatureAlgorithm {
	switch k := key.(type) {
	case *ecdsa.PrivateKey:
		switch k.Curve {
		case elliptic.P256():
			return []jose.SignatureAlgorithm{jose.ES256}
		case elliptic.P384():
			return []jose.SignatureAlgorithm{jose.ES384}
		}
	case ed25519.PrivateKey:
		return []jose.SignatureAlgorithm{jose.EdDSA}
	case *rsa.PrivateKey:
		if k.N.BitLen() >= 2048 {
			return []jose.SignatureAlgorithm{jose.PS256, jose.RS256}
		}
	}
	return nil
}

// prove adds who the client is to a token request, in the strongest way it can and the server
// takes (RFC 6749, section 2.3; RFC 7523, section 2.2).
func (k *credentials) prove(m *metadata, form url.Values, h http.Header) error {
	method := k.method
	takes := func(name string) bool { return len(m.Methods) == 0 || slices.Contains(m.Methods, name) }
	switch {
	case method != "":
	case k.key != nil && takes("private_key_jwt"):
		method = "private_key_jwt"
	case k.secret.IsZero():
		method = "none"
	case takes("client_secret_basic"):
		method = "client_secret_basic"
	case takes("client_secret_post"):
		method = "client_secret_post"
	default:
		return fmt.Errorf("the authorization server %s takes none of the client's credentials, but %.200q", m.Issuer, strings.Join(m.Methods, ", "))
	}
	switch method {
	case "none":
		form.Set("client_id", k.id)
	case "client_secret_basic":
		r := http.Request{Header: h}
		r.SetBasicAuth(url.QueryEscape(k.id), url.QueryEscape(k.secret.Reveal()))
	case "client_secret_post":
		form.Set("client_id", k.id)
		form.Set("client_secret", k.secret.Reveal())
	case "private_key_jwt":
		assertion, err := k.assertion(m)
		if err != nil {
			return err
		}
		form.Set("client_id", k.id)
		form.Set("client_assertion_type", assertionJWT)
		form.Set("client_assertion", assertion)
	default:
		return fmt.Errorf("the authorization server %s registered the client for %.64q, which is not supported", m.Issuer, method)
	}
	return nil
}

// assertion says who the client is to one authorization server, for a minute. Its audience is the
// issuer and nothing else: no other server can use it.
func (k *credentials) assertion(m *metadata) (string, error) {
	algorithms := algorithmsOf(k.key)
	at := slices.IndexFunc(algorithms, func(a jose.SignatureAlgorithm) bool {
		return len(m.Algorithms) == 0 || slices.Contains(m.Algorithms, string(a))
	})
	if at < 0 {
		return "", fmt.Errorf("the authorization server %s takes no signature that the client's key can make, but %.200q", m.Issuer, strings.Join(m.Algorithms, ", "))
	}
	now := time.Now()
	return sign(jose.SigningKey{Algorithm: algorithms[at], Key: k.key}, (&jose.SignerOptions{}).WithType("JWT"), map[string]any{
		"iss": k.id, "sub": k.id, "aud": m.Issuer, "jti": rand.Text(), "iat": now.Unix(), "exp": now.Add(time.Minute).Unix(),
	})
}

// issued is the answer of a token endpoint (RFC 6749, section 5.1; RFC 8693, section 2.2.1).
type issued struct {
	Access  string `json:"access_token"`
	Type    string `json:"token_type"`
	Kind    string `json:"issued_token_type"`
	Expires int64  `json:"expires_in"`
	Refresh string `json:"refresh_token"`
	Scope   string `json:"scope"`
}

// request asks a token endpoint once, and again if all it misses is its nonce. key binds the token;
// nil asks for a bearer token.
func (c *Client) request(ctx context.Context, m *metadata, k *credentials, form url.Values, key *ecdsa.PrivateKey) (*issued, error) {
	to, err := url.Parse(m.Token)
	if err != nil {
		return nil, err
	}
	nonce := ""
	for again := false; ; again = true {
		h := http.Header{"Content-Type": {"application/x-www-form-urlencoded"}}
		if err := k.prove(m, form, h); err != nil {
			return nil, err
		}
		if key != nil {
			p, err := proof(key, http.MethodPost, to, "", nonce)
			if err != nil {
				return nil, err
			}
			h.Set("DPoP", p)
		}
		r, err := http.NewRequestWithContext(ctx, http.MethodPost, m.Token, strings.NewReader(form.Encode()))
		if err != nil {
			return nil, err
		}
		r.Header = h
		out := &issued{}
		err = c.do(r, out)
		var said *statusError
		if key != nil && !again && errors.As(err, &said) && said.code == "use_dpop_nonce" && said.nonce != "" {
			nonce = said.nonce
			continue
		}
		if err != nil {
			return nil, err
		}
		if out.Access == "" || len(out.Access) > maxToken || len(out.Refresh) > maxToken || strings.ContainsFunc(out.Access, func(r rune) bool { return r <= ' ' || r > '~' }) {
			return nil, fmt.Errorf("the authorization server %s gave no token that can be sent", m.Issuer)
		}
		return out, nil
	}
}

const maxToken = 32 << 10 // bytes

// ask gets a token for the resource.
func (c *Client) ask(ctx context.Context, p *place, k *credentials, form url.Values, key *ecdsa.PrivateKey) (*Token, error) {
	form.Set("resource", p.resource)
	out, err := c.request(ctx, p.as, k, form, key)
	if err != nil {
		return nil, err
	}
	want := "Bearer"
	if key != nil {
		want = "DPoP"
	}
	if !strings.EqualFold(out.Type, want) {
		return nil, fmt.Errorf("the authorization server %s gave a token of type %.40q, not %s", p.as.Issuer, out.Type, want)
	}
	t := &Token{Access: secret.New(out.Access), Refresh: secret.New(out.Refresh), Scope: strings.Join(scopesIn(out.Scope), " "), Bound: key != nil, Since: time.Now()}
	if out.Expires > 0 {
		t.Expires = time.Now().Add(time.Duration(min(out.Expires, 10*365*24*3600)) * time.Second)
	}
	return t, nil
}

// machine gets a token without a person.
func (c *Client) machine(ctx context.Context, p *place, scopes []string, key *ecdsa.PrivateKey) (*Token, error) {
	k := c.configured()
	form := url.Values{}
	if len(scopes) > 0 {
		form.Set("scope", strings.Join(scopes, " "))
	}
	switch c.o.Grant {
	case ClientCredentials:
		form.Set("grant_type", "client_credentials")
	case Workload: // the assertion is the credential: nothing else is tried when it is refused
		assertion, err := c.o.Assertion()
		if err != nil {
			return nil, err
		}
		form.Set("grant_type", grantJWT)
		form.Set("assertion", assertion.Reveal())
	case Enterprise:
		assertion, err := c.identity(ctx, p, scopes)
		if err != nil {
			return nil, err
		}
		form.Set("grant_type", grantJWT)
		form.Set("assertion", assertion)
	}
	return c.ask(ctx, p, k, form, key)
}

// identity has the company's identity provider say who asks: an identity token becomes an assertion
// for one authorization server and one resource (RFC 8693).
func (c *Client) identity(ctx context.Context, p *place, scopes []string) (string, error) {
	token, err := c.o.Assertion()
	if err != nil {
		return "", err
	}
	m, err := c.server(ctx, c.o.Provider.Issuer)
	if err != nil {
		return "", err
	}
	form := url.Values{
		"grant_type": {grantExchange}, "requested_token_type": {typeIDJAG}, "subject_token": {token.Reveal()}, "subject_token_type": {typeIDToken},
		"audience": {p.as.Issuer}, "resource": {p.resource},
	}
	if len(scopes) > 0 {
		form.Set("scope", strings.Join(scopes, " "))
	}
	out, err := c.request(ctx, m, &credentials{id: c.o.Provider.ClientID, secret: c.o.Provider.ClientSecret}, form, nil)
	if err != nil {
		return "", err
	}
	if out.Kind != typeIDJAG {
		return "", fmt.Errorf("the identity provider %s gave a token of type %.100q, not an identity assertion", m.Issuer, out.Kind)
	}
	return out.Access, nil
}

// configured are the credentials that the operator gave.
func (c *Client) configured() *credentials {
	return &credentials{id: c.o.ClientID, secret: c.o.ClientSecret, key: c.o.Key}
}
