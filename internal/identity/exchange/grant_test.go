package exchange

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"newel.dev/newel/internal/secret"
)

func keyOf(t *testing.T, kind string) crypto.Signer {
	t.Helper()
	var key crypto.Signer
	var err error
	switch kind {
	case "P-256":
		key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	case "P-224":
		key, err = ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	case "Ed25519":
		_, key, err = ed25519.GenerateKey(rand.Reader)
	case "RSA":
		key, err = rsa.GenerateKey(rand.Reader, 2048)
	}
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func TestParseKey(t *testing.T) {
	for kind, want := range map[string]string{"P-256": "", "Ed25519": "", "RSA": "", "P-224": "cannot sign here"} {
		der, err := x509.MarshalPKCS8PrivateKey(keyOf(t, kind))
		if err != nil {
			t.Fatal(err)
		}
		_, err = ParseKey(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", kind, err)
		}
	}
	for text, want := range map[string]string{
		"":      "not PEM",
		"hello": "not PEM",
		string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte("x")})): "not a private key",
		string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: []byte("x")})): "asn1",
	} {
		if _, err := ParseKey([]byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.20q: %v", text, err)
		}
	}
}

// A client proves who it is as the server takes it, never weaker than it can.
func TestProve(t *testing.T) {
	for name, tt := range map[string]struct {
		k    credentials
		m    metadata
		want string
	}{
		"public":             {credentials{id: "a"}, metadata{}, "none"},
		"secret by default":  {credentials{id: "a", secret: secret.New("s")}, metadata{}, "basic"},
		"secret":             {credentials{id: "a", secret: secret.New("s")}, metadata{Methods: []string{"client_secret_post", "client_secret_basic"}}, "basic"},
		"secret in the form": {credentials{id: "a", secret: secret.New("s")}, metadata{Methods: []string{"client_secret_post", "none"}}, "post"},
		"secret not taken":   {credentials{id: "a", secret: secret.New("s")}, metadata{Methods: []string{"none"}}, "takes none of the client's credentials"},
		"key first":          {credentials{id: "a", secret: secret.New("s"), key: keyOf(t, "P-256")}, metadata{}, "ES256"},
		"RSA":                {credentials{id: "a", key: keyOf(t, "RSA")}, metadata{Algorithms: []string{"RS256"}}, "RS256"},
		"RSA, better":        {credentials{id: "a", key: keyOf(t, "RSA")}, metadata{Algorithms: []string{"RS256", "PS256"}}, "PS256"},
		"Ed25519":            {credentials{id: "a", key: keyOf(t, "Ed25519")}, metadata{}, "EdDSA"},
		"no signature":       {credentials{id: "a", key: keyOf(t, "P-256")}, metadata{Algorithms: []string{"RS256", "none", "HS256"}}, "takes no signature"},
		"as registered":      {credentials{id: "a", secret: secret.New("s"), method: "none"}, metadata{}, "none"},
		"registered oddly":   {credentials{id: "a", method: "tls_client_auth"}, metadata{}, "not supported"},
	} {
		t.Run(name, func(t *testing.T) {
			tt.m.Issuer = "https://as.example"
			form, h := url.Values{}, http.Header{}
			err := tt.k.prove(&tt.m, form, h)
			got := "none"
			switch {
			case err != nil:
				got = err.Error()
			case h.Get("Authorization") == "Basic "+base64.StdEncoding.EncodeToString([]byte("a:s")):
				got = "basic"
			case form.Get("client_secret") == "s":
				got = "post"
			case form.Has("client_assertion"):
				got = assertionOf(t, form, &tt.k)
			case form.Get("client_id") != "a":
				got = form.Encode()
			}
			if got != tt.want && (err == nil || !strings.Contains(got, tt.want)) {
				t.Errorf("got %s, want %s", got, tt.want)
			}
		})
	}
	h := http.Header{}
	if err := (&credentials{id: "a:b", secret: secret.New("s %+")}).prove(&metadata{}, url.Values{}, h); err != nil || h.Get("Authorization") != "Basic "+base64.StdEncoding.EncodeToString([]byte("a%3Ab:s+%25%2B")) {
		t.Errorf("%v %v", h, err) // RFC 6749, section 2.3.1
	}
}

// assertionOf checks an assertion and returns its algorithm.
func assertionOf(t *testing.T, form url.Values, k *credentials) string {
	t.Helper()
	algorithms := algorithmsOf(k.key)
	signed, err := jose.ParseSignedCompact(form.Get("client_assertion"), algorithms)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := signed.Verify(k.key.Public())
	if err != nil {
		t.Fatal(err)
	}
	var claims struct {
		Iss, Sub, Aud, Jti string
		Exp                int64
	}
	if err := json.Unmarshal(raw, &claims); err != nil {
		t.Fatal(err)
	}
	if claims.Iss != "a" || claims.Sub != "a" || claims.Aud != "https://as.example" || claims.Jti == "" || claims.Exp > time.Now().Add(2*time.Minute).Unix() || form.Get("client_assertion_type") != assertionJWT {
		t.Errorf("%s", raw)
	}
	return string(signed.Signatures[0].Header.Algorithm)
}

// The identity token goes to the identity provider, and what that says to the authorization server.
func TestEnterprise(t *testing.T) {
	w, idp := start(t), start(t)
	reads := 0
	kind := typeIDJAG
	idp.answers = func(url.Values) map[string]any {
		return map[string]any{"access_token": "id-jag", "issued_token_type": kind, "token_type": "N_A"}
	}
	c := w.client(Options{
		Grant: Enterprise, Issuer: w.as.URL, ClientID: "gw", ClientSecret: secret.New("s"), Provider: Provider{Issuer: idp.as.URL, ClientID: "gw-at-idp"},
		Assertion: func() (secret.String, error) { reads++; return secret.New("id-token"), nil },
	})
	w.wants = "a"
	if status, err := w.call(c); status != http.StatusOK {
		t.Fatal(status, err)
	}
	at, then := idp.requests[0], w.requests[0]
	for name, want := range map[string]string{
		"grant_type": grantExchange, "requested_token_type": typeIDJAG, "subject_token": "id-token", "subject_token_type": typeIDToken,
		"audience": w.as.URL, "resource": w.rs.URL + "/mcp", "scope": "a", "client_id": "gw-at-idp",
	} {
		if at.Get(name) != want {
			t.Errorf("the identity provider gets %s=%q, want %q", name, at.Get(name), want)
		}
	}
	for name, want := range map[string]string{"grant_type": grantJWT, "assertion": "id-jag", "resource": w.rs.URL + "/mcp", "scope": "a", "subject_token": ""} {
		if then.Get(name) != want {
			t.Errorf("the authorization server gets %s=%q, want %q", name, then.Get(name), want)
		}
	}
	kind = "urn:ietf:params:oauth:token-type:access_token"
	fresh := w.client(c.o)
	w.current = ""
	if _, err := w.call(fresh); err == nil || !strings.Contains(err.Error(), "not an identity assertion") || len(w.requests) != 1 {
		t.Error(err)
	}
	if reads != 2 {
		t.Errorf("the identity token was read %d times", reads)
	}
}

// A workload whose token is refused is not tried again, nor in another way.
func TestWorkload(t *testing.T) {
	w := start(t)
	o := Options{Grant: Workload, Issuer: w.as.URL, ClientID: "gw", Assertion: func() (secret.String, error) { return secret.New("jwt"), nil }}
	if status, err := w.call(w.client(o)); status != http.StatusOK || w.requests[0].Get("assertion") != "jwt" || w.requests[0].Get("client_id") != "gw" {
		t.Fatal(status, err, w.requests)
	}
	w.current = ""
	w.answers = func(url.Values) map[string]any { return map[string]any{"error": "invalid_grant"} }
	c := w.client(o)
	for range 5 {
		if _, err := w.call(c); err == nil {
			t.Fatal("it was let in")
		}
	}
	if len(w.requests) != 2 {
		t.Errorf("%d requests", len(w.requests)-1)
	}
}

// Every request has a proof of its own, for its method, address and token, with the newest nonce.
func TestBoundTokens(t *testing.T) {
	w := start(t)
	w.resource["dpop_bound_access_tokens_required"] = true
	w.metadata["dpop_signing_alg_values_supported"] = []string{"ES256"}
	var key *jose.JSONWebKey
	seen := map[string]bool{}
	check := func(r *http.Request, address, token string) (nonce string) {
		signed, err := jose.ParseSignedCompact(r.Header.Get("DPoP"), []jose.SignatureAlgorithm{jose.ES256})
		if err != nil {
			t.Error(err)
			return ""
		}
		h := signed.Signatures[0].Header
		raw, err := signed.Verify(h.JSONWebKey)
		if err != nil || !h.JSONWebKey.IsPublic() || h.ExtraHeaders["typ"] != "dpop+jwt" {
			t.Error(err, h)
		}
		if key == nil {
			key = h.JSONWebKey
		}
		mine, _ := key.Thumbprint(crypto.SHA256) // of a key that was just used
		its, _ := h.JSONWebKey.Thumbprint(crypto.SHA256)
		var c struct{ Jti, Htm, Htu, Ath, Nonce string }
		if err := json.Unmarshal(raw, &c); err != nil {
			t.Error(err)
		}
		ath := ""
		if token != "" {
			sum := sha256.Sum256([]byte(token))
			ath = base64.RawURLEncoding.EncodeToString(sum[:])
		}
		if c.Htm != r.Method || c.Htu != address || c.Ath != ath || seen[c.Jti] || string(mine) != string(its) {
			t.Errorf("the proof is %s, for %s %s", raw, r.Method, address)
		}
		seen[c.Jti] = true
		return c.Nonce
	}
	w.answers = func(url.Values) map[string]any {
		return map[string]any{"access_token": w.current, "token_type": "dpop", "expires_in": 3600}
	}
	inner := w.as.Config.Handler
	w.as.Config.Handler = http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/token" && check(r, w.as.URL+"/token", "") != "as-nonce" {
			rw.Header().Set("DPoP-Nonce", "as-nonce")
			reply(rw, false, map[string]any{"error": "use_dpop_nonce"})
			return
		}
		inner.ServeHTTP(rw, r)
	})
	nonce := "n1"
	w.rs.Config.Handler = http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		token, ok := strings.CutPrefix(r.Header.Get("Authorization"), "DPoP ")
		switch {
		case r.URL.Path != "/mcp":
			w.serve(rw, r)
		case !ok:
			rw.Header().Set("WWW-Authenticate", `DPoP algs="ES256"`)
			rw.WriteHeader(http.StatusUnauthorized)
		case check(r, w.rs.URL+"/mcp", token) != nonce:
			rw.Header().Set("DPoP-Nonce", nonce)
			rw.Header().Set("WWW-Authenticate", `DPoP error="use_dpop_nonce"`)
			rw.WriteHeader(http.StatusUnauthorized)
		}
	})
	c := w.machine()
	for _, nonce = range []string{"n1", "n1", "n2"} {
		if status, err := w.call(c); status != http.StatusOK {
			t.Fatal(nonce, status, err)
		}
	}
	if len(w.requests) != 1 {
		t.Errorf("%d tokens", len(w.requests))
	}
}
