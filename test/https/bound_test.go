package https

import (
	"crypto/sha256"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"newel.dev/newel/internal/assembly"
	"newel.dev/newel/internal/certs"
	"newel.dev/newel/internal/identity/verify"
)

const resource = "https://mcp.example.com/mcp"

// issuer issues tokens that are bound to certificates (RFC 8705, section 3.1).
type issuer struct {
	t   *testing.T
	url string
	key jose.JSONWebKey
}

func newIssuer(t *testing.T) *issuer {
	t.Helper()
	key := newAuthority(t).key
	is := &issuer{t: t, key: jose.JSONWebKey{Key: key, KeyID: "k", Algorithm: "ES256", Use: "sig"}}
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if err := json.NewEncoder(w).Encode(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{is.key.Public()}}); err != nil {
			t.Error(err)
		}
	}))
	t.Cleanup(s.Close)
	is.url = s.URL
	return is
}

// token is bound to a certificate, or to nothing.
func (is *issuer) token(to *tls.Certificate) string {
	is.t.Helper()
	now := time.Now().Unix()
	claims := map[string]any{"iss": is.url, "sub": "ada", "aud": resource, "exp": now + 300, "iat": now, "jti": "t", "client_id": "c"}
	if to != nil {
		sum := sha256.Sum256(to.Certificate[0])
		claims["cnf"] = map[string]any{"x5t#S256": base64.RawURLEncoding.EncodeToString(sum[:])}
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: is.key}, (&jose.SignerOptions{}).WithType("at+jwt"))
	if err != nil {
		is.t.Fatal(err)
	}
	payload, err := json.Marshal(claims)
	if err != nil {
		is.t.Fatal(err)
	}
	jws, err := signer.Sign(payload)
	if err != nil {
		is.t.Fatal(err)
	}
	out, err := jws.CompactSerialize()
	if err != nil {
		is.t.Fatal(err)
	}
	return out
}

// A token bound to a certificate of any authority is of use to who holds that certificate alone.
func TestBoundTokens(t *testing.T) {
	ca, foreign := newAuthority(t), newAuthority(t)
	is := newIssuer(t)
	tokens, err := verify.New(verify.Options{Resource: resource, Issuers: []verify.Issuer{{URL: is.url, JWKS: is.url + "/jwks"}}})
	if err != nil {
		t.Fatal(err)
	}
	s := serve(t, certs.ServerOptions{Pairs: []certs.Pair{pairIn(t, ca.issue(long, "127.0.0.1"))}, Clients: tls.RequestClientCert},
		assembly.Options{Identity: &assembly.Identities{Tokens: tokens}, Access: &assembly.Access{Resource: resource, Issuers: []string{is.url}}})
	mine, thief := foreign.issue(long, "client"), foreign.issue(long, "client")
	for name, c := range map[string]struct {
		shown *tls.Certificate
		token string
		want  int
	}{
		"bound, with its certificate":  {&mine, is.token(&mine), http.StatusOK},
		"bound, with another":          {&thief, is.token(&mine), http.StatusUnauthorized},
		"bound, without a certificate": {nil, is.token(&mine), http.StatusUnauthorized},
		"not bound":                    {nil, is.token(nil), http.StatusOK},
	} {
		conf := &tls.Config{RootCAs: ca.pool()}
		if c.shown != nil {
			conf.Certificates = []tls.Certificate{*c.shown}
		}
		resp, err := s.call(client(t, conf), "echo", "Authorization", "Bearer "+c.token)
		if resp == nil || resp.StatusCode != c.want {
			t.Errorf("%s: %v, want status %d", name, err, c.want)
		}
	}
}
