package access

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"newel.dev/newel/internal/identity/verify"
)

// boundIssuer issues tokens that are bound to keys.
type boundIssuer struct {
	t   *testing.T
	url string
	key jose.JSONWebKey
}

func newBoundIssuer(t *testing.T) *boundIssuer {
	is := &boundIssuer{t: t, key: newKey(t)}
	is.key.KeyID = "k"
	mux := http.NewServeMux()
	mux.HandleFunc("/jwks", func(w http.ResponseWriter, _ *http.Request) {
		if err := json.NewEncoder(w).Encode(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{is.key.Public()}}); err != nil {
			t.Error(err)
		}
	})
	s := httptest.NewServer(mux)
	t.Cleanup(s.Close)
	is.url = s.URL
	return is
}

func newKey(t *testing.T) jose.JSONWebKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return jose.JSONWebKey{Key: key, Algorithm: "ES256", Use: "sig"}
}

func sign(t *testing.T, key jose.JSONWebKey, o *jose.SignerOptions, claims map[string]any) string {
	t.Helper()
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: key}, o)
	if err != nil {
		t.Fatal(err)
	}
	payload, err := json.Marshal(claims)
	if err != nil {
		t.Fatal(err)
	}
	jws, err := signer.Sign(payload)
	if err != nil {
		t.Fatal(err)
	}
	out, err := jws.CompactSerialize()
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// holder is a client with a key of its own and a token bound to that.
type holder struct {
	t     *testing.T
	w     *world
	key   jose.JSONWebKey
	token string
	nonce string
	n     int
}

func (is *boundIssuer) hold(w *world) *holder {
	is.t.Helper()
	h := &holder{t: is.t, w: w, key: newKey(is.t)}
	sum, err := h.key.Thumbprint(crypto.SHA256)
	if err != nil {
		is.t.Fatal(err)
	}
	now := time.Now().Unix()
	h.token = sign(is.t, is.key, (&jose.SignerOptions{}).WithType("at+jwt"), map[string]any{
		"iss": is.url, "sub": "ada", "aud": w.base + "/mcp", "exp": now + 300, "iat": now, "jti": "t", "client_id": "c", "scope": "a:read",
		"cnf": map[string]any{"jkt": base64.RawURLEncoding.EncodeToString(sum)},
	})
	return h
}

// token is one that is bound to nothing.
func (is *boundIssuer) token(subject, audience string) string {
	is.t.Helper()
	now := time.Now().Unix()
	return sign(is.t, is.key, (&jose.SignerOptions{}).WithType("at+jwt"), map[string]any{
		"iss": is.url, "sub": subject, "aud": audience, "exp": now + 300, "iat": now, "jti": "free", "client_id": "c", "scope": "a:read",
	})
}

// headers present the token with a fresh proof.
func (h *holder) headers(method string) []string { return h.headersAt(method, "/mcp") }

// headersAt are for another path.
func (h *holder) headersAt(method, path string) []string {
	h.t.Helper()
	h.n++
	hash := sha256.Sum256([]byte(h.token))
	key := h.key
	key.KeyID = ""
	proof := sign(h.t, key, (&jose.SignerOptions{EmbedJWK: true}).WithType("dpop+jwt"), map[string]any{
		"jti": fmt.Sprint(h.n), "htm": method, "htu": h.w.base + path, "iat": time.Now().Unix(), "nonce": h.nonce,
		"ath": base64.RawURLEncoding.EncodeToString(hash[:]),
	})
	return []string{"Authorization", "DPoP " + h.token, "DPoP", proof}
}

// A client with a bound token learns the nonce, and then calls in both eras, each time with a proof
// of its own; nobody who copied token and proof gets in.
func TestBoundTokens(t *testing.T) {
	is := newBoundIssuer(t)
	w := startWith(t, []verify.Issuer{{URL: is.url, JWKS: is.url + "/jwks"}})
	h := is.hold(w)
	stateless := append([]string{"Mcp-Protocol-Version", "2026-07-28", "Mcp-Method", "tools/call", "Mcp-Name", "read"}, h.headers("POST")...)
	message := `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"read","arguments":{},` + meta + `}}`
	r := w.send("", message, stateless...)
	if r.status != http.StatusUnauthorized || r.nonce == "" || !strings.HasPrefix(r.challenge, `DPoP algs="ES256`) || !strings.Contains(r.challenge, `error="use_dpop_nonce"`) || !strings.Contains(r.challenge, "resource_metadata=") {
		t.Fatalf("without a nonce: %+v", r)
	}
	h.nonce = r.nonce
	copied := append(stateless[:6:6], h.headers("POST")...)
	if r := w.send("", message, copied...); r.status != http.StatusOK || !strings.Contains(r.body, "read for ada") {
		t.Fatalf("%+v", r)
	}
	if r := w.send("", message, copied...); r.status != http.StatusUnauthorized || !strings.Contains(r.challenge, `error="invalid_token"`) {
		t.Errorf("replayed: %+v", r)
	}
	if r := w.send(h.token, message, stateless[:6]...); r.status != http.StatusUnauthorized || !strings.HasPrefix(r.challenge, "Bearer ") {
		t.Errorf("as Bearer: %+v", r)
	}
	if r := w.send("", message, append(stateless[:6:6], h.headers("GET")...)...); r.status != http.StatusUnauthorized {
		t.Errorf("a proof for another method: %+v", r)
	}
}

func TestBoundTokensInSessions(t *testing.T) {
	is := newBoundIssuer(t)
	w := startWith(t, []verify.Issuer{{URL: is.url, JWKS: is.url + "/jwks"}})
	h := is.hold(w)
	const initialize = `{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":"2025-11-25","capabilities":{},"clientInfo":{"name":"t","version":"1"}}}`
	h.nonce = w.send("", initialize, h.headers("POST")...).nonce
	r := w.send("", initialize, h.headers("POST")...)
	if r.status != http.StatusOK || r.session == "" {
		t.Fatalf("%+v", r)
	}
	in := []string{"Mcp-Session-Id", r.session, "Mcp-Protocol-Version", "2025-11-25"}
	w.send("", `{"jsonrpc":"2.0","method":"notifications/initialized"}`, append(in, h.headers("POST")...)...)
	copied := append(in[:4:4], h.headers("POST")...)
	if r := w.send("", `{"jsonrpc":"2.0","id":2,"method":"tools/call","params":{"name":"read","arguments":{}}}`, copied...); r.status != http.StatusOK || !strings.Contains(r.body, "read for ada") {
		t.Errorf("%+v", r)
	}
	if r := w.send("", `{"jsonrpc":"2.0","id":3,"method":"tools/call","params":{"name":"read","arguments":{}}}`, copied...); r.status != http.StatusUnauthorized || strings.Contains(r.body, "read for") {
		t.Errorf("replayed: %+v", r)
	}
	if r := w.send("", `{"jsonrpc":"2.0","id":4,"method":"tools/call","params":{"name":"read","arguments":{}}}`, append(in[:4:4], "Authorization", "Bearer known")...); r.status != http.StatusUnauthorized {
		t.Errorf("what only the house says of itself: %+v", r)
	}
}
