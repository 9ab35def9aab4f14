package verify

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/base64"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-json-experiment/json"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/secret"
)

const resource = "https://mcp.example.com/mcp"

// world is a real issuer over HTTP whose keys and moods the test decides.
type world struct {
	t         *testing.T
	url       string
	fetches   atomic.Int64
	asked     atomic.Int64
	described atomic.Int64

	mu     sync.Mutex
	extra  []string // further raw keys
	keys   []jose.JSONWebKey
	status int
	body   string
	now    time.Time
	active map[string]string // opaque tokens
	away   bool              // the metadata cannot be read
}

func newWorld(t *testing.T) *world {
	w := &world{t: t, now: time.Unix(1_800_000_000, 0), active: map[string]string{}}
	mux := http.NewServeMux()
	mux.HandleFunc("/.well-known/oauth-authorization-server", func(rw http.ResponseWriter, _ *http.Request) {
		w.described.Add(1)
		w.mu.Lock()
		defer w.mu.Unlock()
		if w.away {
			rw.WriteHeader(http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintf(rw, `{"issuer":%q,"jwks_uri":%q}`, w.url, w.url+"/jwks")
	})
	mux.HandleFunc("/.well-known/openid-configuration", func(rw http.ResponseWriter, _ *http.Request) {
		w.described.Add(1)
		rw.WriteHeader(http.StatusNotFound)
	})
	mux.HandleFunc("/jwks", func(rw http.ResponseWriter, _ *http.Request) {
		w.fetches.Add(1)
		w.mu.Lock()
		defer w.mu.Unlock()
		if w.status != 0 {
			rw.WriteHeader(w.status)
			return
		}
		if w.body != "" {
			fmt.Fprint(rw, w.body)
			return
		}
		var all []string
		for _, k := range w.keys {
			pub := k.Public()
			raw, err := pub.MarshalJSON()
			if err != nil {
				t.Error(err)
			}
			all = append(all, string(raw))
		}
		fmt.Fprintf(rw, `{"keys":[%s]}`, strings.Join(append(w.extra, all...), ","))
	})
	mux.HandleFunc("/introspect", func(rw http.ResponseWriter, r *http.Request) {
		w.asked.Add(1)
		if id, pass, _ := r.BasicAuth(); id != "rs" || pass != "hush" {
			rw.WriteHeader(401)
			return
		}
		w.mu.Lock()
		defer w.mu.Unlock()
		if said := w.active[r.FormValue("token")]; said != "" {
			fmt.Fprint(rw, said)
			return
		}
		fmt.Fprint(rw, `{"active":false}`)
	})
	s := httptest.NewServer(mux)
	t.Cleanup(s.Close)
	w.url = s.URL
	return w
}

func (w *world) set(f func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	f()
}

func (w *world) clock() time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.now
}

func (w *world) pass(d time.Duration) { w.set(func() { w.now = w.now.Add(d) }) }

func (w *world) verifier(change func(*Issuer)) *Verifier {
	w.t.Helper()
	is := Issuer{URL: w.url}
	if change != nil {
		change(&is)
	}
	v, err := New(Options{Resource: resource, Issuers: []Issuer{is}, Now: w.clock})
	if err != nil {
		w.t.Fatal(err)
	}
	return v
}

// addKey makes a signing key and publishes it.
func (w *world) addKey(id, algorithm string) jose.JSONWebKey {
	k := newKey(w.t, id, algorithm)
	w.set(func() { w.keys = append(w.keys, k) })
	return k
}

func newKey(t *testing.T, id, algorithm string) jose.JSONWebKey {
	t.Helper()
	var key crypto.Signer
	var err error
	switch algorithm[:2] {
	case "RS", "PS":
		key, err = rsa.GenerateKey(rand.Reader, 2048)
	case "Ed":
		_, key, err = ed25519.GenerateKey(rand.Reader)
	default:
		key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	}
	if err != nil {
		t.Fatal(err)
	}
	return jose.JSONWebKey{Key: key, KeyID: id, Algorithm: algorithm, Use: "sig"}
}

// claimsOf returns valid claims with changes; a nil value takes one away.
func (w *world) claimsOf(changes map[string]any) map[string]any {
	now := w.clock().Unix()
	c := map[string]any{"iss": w.url, "sub": "ada", "aud": resource, "exp": now + 300, "iat": now, "jti": "1", "client_id": "cli", "scope": "orders:read kb:read", "roles": []string{"ops"}}
	for k, v := range changes {
		if c[k] = v; v == nil {
			delete(c, k)
		}
	}
	return c
}

func sign(t *testing.T, k jose.JSONWebKey, typ string, claims map[string]any) string {
	t.Helper()
	payload, err := json.Marshal(claims)
	if err != nil {
		t.Fatal(err)
	}
	opts := (&jose.SignerOptions{}).WithHeader("kid", k.KeyID)
	if typ != "" {
		opts = opts.WithType(jose.ContentType(typ))
	}
	algorithm := jose.SignatureAlgorithm(k.Algorithm)
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: algorithm, Key: k.Key}, opts)
	if err != nil {
		t.Fatal(err)
	}
	jws, err := signer.Sign(payload)
	if err != nil {
		t.Fatal(err)
	}
	token, err := jws.CompactSerialize()
	if err != nil {
		t.Fatal(err)
	}
	return token
}

func code(err error) call.Code {
	if err == nil {
		return call.OK
	}
	return call.AsError(err).Code
}

func TestGoodTokens(t *testing.T) {
	w := newWorld(t)
	v := w.verifier(nil)
	for _, algorithm := range []string{"RS256", "PS256", "ES256", "EdDSA"} {
		k := w.addKey("k-"+algorithm, algorithm)
		w.pass(time.Minute)
		id, err := v.Verify(t.Context(), sign(t, k, "at+jwt", w.claimsOf(nil)))
		if err != nil {
			t.Errorf("%s: %v", algorithm, err)
			continue
		}
		if id.Subject != "ada" || id.Client != "cli" || strings.Join(id.Scopes, " ") != "orders:read kb:read" || strings.Join(id.Roles, " ") != "ops" || id.Issuer != w.url {
			t.Errorf("%s: %+v", algorithm, id)
		}
	}
}

// Whatever is wrong, the caller learns only that the token is not valid.
func TestBadTokens(t *testing.T) {
	w := newWorld(t)
	k := w.addKey("k", "ES256")
	now := w.clock().Unix()
	good := sign(t, k, "at+jwt", w.claimsOf(nil))
	parts := strings.Split(good, ".")
	enc := func(s string) string { return base64.RawURLEncoding.EncodeToString([]byte(s)) }
	stranger := newKey(t, "k", "ES256")
	tokens := map[string]string{
		"garbage":             "garbage",
		"two parts":           parts[0] + "." + parts[1],
		"no signature":        parts[0] + "." + parts[1] + ".",
		"alg none":            enc(`{"alg":"none","typ":"at+jwt"}`) + "." + parts[1] + ".",
		"alg HS256":           enc(`{"alg":"HS256","typ":"at+jwt","kid":"k"}`) + "." + parts[1] + "." + parts[2],
		"another algorithm":   enc(`{"alg":"RS256","typ":"at+jwt","kid":"k"}`) + "." + parts[1] + "." + parts[2],
		"a stranger's key":    sign(t, stranger, "at+jwt", w.claimsOf(nil)),
		"changed claims":      parts[0] + "." + enc(`{"iss":"`+w.url+`","sub":"eve"}`) + "." + parts[2],
		"twice a claim":       parts[0] + "." + enc(`{"iss":"`+w.url+`","iss":"x"}`) + "." + parts[2],
		"critical extensions": enc(`{"alg":"ES256","typ":"at+jwt","kid":"k","crit":["x"]}`) + "." + parts[1] + "." + parts[2],
		"too long":            strings.Repeat("a", 1<<20),
		"padding":             parts[0] + "=." + parts[1] + "." + parts[2],
	}
	for name, changes := range map[string]map[string]any{
		"another issuer":     {"iss": "https://evil.example"},
		"a trailing slash":   {"iss": w.url + "/"},
		"another audience":   {"aud": "https://other.example/mcp"},
		"no audience":        {"aud": nil},
		"audience by prefix": {"aud": resource + "/x"},
		"expired":            {"exp": now - 31},
		"no expiry":          {"exp": nil},
		"expiry as text":     {"exp": "tomorrow"},
		"expiry beyond time": {"exp": 1e300},
		"not yet":            {"nbf": now + 31},
		"from the future":    {"iat": now + 3600},
		"no subject":         {"sub": nil},
		"no client":          {"client_id": nil},
		"no id":              {"jti": nil},
		"bound to a key":     {"cnf": map[string]any{"jkt": "x"}},
	} {
		tokens[name] = sign(t, k, "at+jwt", w.claimsOf(changes))
	}
	tokens["an ID token"] = sign(t, k, "JWT", w.claimsOf(map[string]any{"nonce": "n"}))
	tokens["no type"] = sign(t, k, "", w.claimsOf(nil))
	v := w.verifier(nil)
	if _, err := v.Verify(t.Context(), good); err != nil {
		t.Fatal(err)
	}
	for name, token := range tokens {
		_, err := v.Verify(t.Context(), token)
		e := call.AsError(err)
		if e == nil || e.Code != call.Unauthenticated || e.Message != "the access token is not valid" {
			t.Errorf("%s: got %v", name, err)
		}
	}
	if n := w.fetches.Load(); n != 1 {
		t.Errorf("%d fetches within ten seconds", n)
	}
}

// An issuer may put another key under an id that it had before. Its tokens count from then on; the old
// one's do not, and bad signatures do not make it be asked more often than anything else.
func TestAnotherKeyUnderTheSameID(t *testing.T) {
	for _, id := range []string{"k", ""} {
		w := newWorld(t)
		old := w.addKey(id, "ES256")
		v := w.verifier(nil)
		before := sign(t, old, "at+jwt", w.claimsOf(nil))
		if _, err := v.Verify(t.Context(), before); err != nil {
			t.Fatal(err)
		}
		forged := newKey(t, id, "ES256")
		w.pass(10 * time.Second)
		for range 50 {
			if c := code(second(v.Verify(t.Context(), sign(t, forged, "at+jwt", w.claimsOf(nil))))); c != call.Unauthenticated {
				t.Fatalf("id %q, a forged token: %v", id, c)
			}
		}
		if n := w.fetches.Load(); n != 2 {
			t.Errorf("id %q: %d fetches for 50 bad signatures", id, n)
		}
		w.set(func() { w.keys = nil })
		next := w.addKey(id, "ES256")
		w.pass(10 * time.Second)
		if _, err := v.Verify(t.Context(), sign(t, next, "at+jwt", w.claimsOf(nil))); err != nil {
			t.Errorf("id %q, a token of the new key: %v", id, err)
		}
		if c := code(second(v.Verify(t.Context(), before))); c != call.Unauthenticated {
			t.Errorf("id %q, a token of the old key: %v", id, c)
		}
	}
}

func TestSkewAndMemory(t *testing.T) {
	w := newWorld(t)
	k := w.addKey("k", "ES256")
	v := w.verifier(nil)
	token := sign(t, k, "at+jwt", w.claimsOf(map[string]any{"exp": w.clock().Unix() + 10, "nbf": w.clock().Unix() + 20}))
	if _, err := v.Verify(t.Context(), token); err != nil {
		t.Fatalf("within the skew: %v", err)
	}
	w.pass(39 * time.Second)
	if _, err := v.Verify(t.Context(), token); err != nil {
		t.Fatalf("still within: %v", err)
	}
	w.pass(time.Second)
	if _, err := v.Verify(t.Context(), token); code(err) != call.Unauthenticated {
		t.Errorf("a remembered token outlived its time: %v", err)
	}
}

// However many forged key ids come, the issuer is asked once in ten seconds, and a genuine new key
// is never called invalid.
func TestUnknownKeys(t *testing.T) {
	w := newWorld(t)
	w.addKey("old", "ES256")
	v := w.verifier(nil)
	forger := newKey(t, "", "ES256")
	for i := range 200 {
		forger.KeyID = fmt.Sprint("forged", i)
		if c := code(second(v.Verify(t.Context(), sign(t, forger, "at+jwt", w.claimsOf(nil))))); c != call.Unauthenticated && c != call.Unavailable {
			t.Fatalf("a forged token: %v", c)
		}
	}
	if n := w.fetches.Load(); n != 1 {
		t.Errorf("%d fetches for 200 forged keys", n)
	}
	rotated := w.addKey("new", "ES256")
	token := sign(t, rotated, "at+jwt", w.claimsOf(nil))
	_, err := v.Verify(t.Context(), token)
	if e := call.AsError(err); e.Code != call.Unavailable || e.RetryAfter <= 0 || e.RetryAfter > 10*time.Second {
		t.Errorf("a good token of a new key: %v, retry after %v", e, e.RetryAfter)
	}
	w.pass(10 * time.Second)
	if _, err := v.Verify(t.Context(), token); err != nil {
		t.Errorf("after its time: %v", err)
	}
}

func second[A any](_ A, err error) error { return err }

// What an issuer's key set may hold without harm.
func TestOddKeySets(t *testing.T) {
	weak, err := rsa.GenerateKey(rand.Reader, 1024) //nolint:gosec // that it is refused is what is tested
	if err == nil {
		w := newWorld(t)
		w.set(func() { w.keys = append(w.keys, jose.JSONWebKey{Key: weak, KeyID: "weak", Algorithm: "RS256"}) })
		w.addKey("strong", "ES256")
		token := sign(t, jose.JSONWebKey{Key: weak, KeyID: "weak", Algorithm: "RS256"}, "at+jwt", w.claimsOf(nil))
		if _, err := w.verifier(nil).Verify(t.Context(), token); code(err) != call.Unauthenticated {
			t.Errorf("a weak key: %v", err)
		}
	}
	w := newWorld(t)
	w.set(func() {
		w.extra = []string{`{"kty":"EC","crv":"P-256","x":"AA","y":"AA","kid":"bad"}`, `{"kty":"EC","crv":"secp256k1","x":"AA","y":"AA"}`,
			`{"kty":"AKP","alg":"ML-DSA-65","pub":"AA"}`, `{"kty":"oct","k":"AAAA","kid":"secret"}`, `{"use":"enc","kty":"OKP","crv":"Ed25519","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}`, `7`}
	})
	k := w.addKey("good", "ES256")
	if _, err := w.verifier(nil).Verify(t.Context(), sign(t, k, "at+jwt", w.claimsOf(nil))); err != nil {
		t.Errorf("good key among odd ones: %v", err)
	}
	for name, body := range map[string]string{"huge": strings.Repeat(" ", maxDocument+1), "no set": `{}`, "not JSON": `<html>`, "too many": `{"keys":[` + strings.Repeat(`{},`, maxKeys) + `{}]}`} {
		w := newWorld(t)
		k := newKey(t, "k", "ES256")
		w.set(func() { w.body = body })
		if _, err := w.verifier(nil).Verify(t.Context(), sign(t, k, "at+jwt", w.claimsOf(nil))); code(err) != call.Unavailable {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// An issuer that is down: nothing is accepted that was not known, its known keys hold for a day.
func TestIssuerDown(t *testing.T) {
	w := newWorld(t)
	k := w.addKey("k", "ES256")
	w.set(func() { w.status = 503 })
	v := w.verifier(nil)
	if _, err := v.Verify(t.Context(), sign(t, k, "at+jwt", w.claimsOf(nil))); code(err) != call.Unavailable {
		t.Errorf("at the start: %v", err)
	}
	w.set(func() { w.status = 0 })
	w.pass(retryFirst)
	if _, err := v.Verify(t.Context(), sign(t, k, "at+jwt", w.claimsOf(nil))); err != nil {
		t.Fatalf("when it is back: %v", err)
	}
	w.set(func() { w.status = 503 })
	w.pass(staleAfter - time.Minute)
	if _, err := v.Verify(t.Context(), sign(t, k, "at+jwt", w.claimsOf(nil))); err != nil {
		t.Errorf("within a day: %v", err)
	}
	w.pass(2 * time.Minute)
	if _, err := v.Verify(t.Context(), sign(t, k, "at+jwt", w.claimsOf(nil))); code(err) != call.Unavailable {
		t.Errorf("after a day: %v", err)
	}
}

// A key that is taken away stops counting, remembered tokens included.
func TestKeyTakenAway(t *testing.T) {
	w := newWorld(t)
	k := w.addKey("k", "ES256")
	v := w.verifier(nil)
	token := sign(t, k, "at+jwt", w.claimsOf(nil))
	if _, err := v.Verify(t.Context(), token); err != nil {
		t.Fatal(err)
	}
	w.set(func() { w.keys = nil })
	w.addKey("other", "ES256")
	w.pass(refreshEvery)
	v.issuers[w.url].keys.refresh(t.Context())
	if _, err := v.Verify(t.Context(), sign(t, k, "at+jwt", w.claimsOf(nil))); err == nil {
		t.Error("a key that was taken away still counts")
	}
}

func TestProfiles(t *testing.T) {
	w := newWorld(t)
	k := w.addKey("k", "ES256")
	bare := map[string]any{"client_id": nil, "jti": nil, "scope": nil}
	for _, tt := range []struct {
		profile, typ string
		changes      map[string]any
		client       string
		scopes       string
	}{
		{"entra", "JWT", map[string]any{"azp": "app", "scp": "a b", "nonce": "n"}, "app", "a b"},
		{"okta", "", map[string]any{"cid": "app", "scp": []string{"a", "b"}}, "app", "a b"},
		{"keycloak", "JWT", map[string]any{"azp": "app", "scope": "a b"}, "app", "a b"},
		{"dex", "", map[string]any{"aud": "app"}, "app", "fallback"},
	} {
		changes := map[string]any{}
		for _, m := range []map[string]any{bare, tt.changes} {
			for key, v := range m {
				changes[key] = v
			}
		}
		token := sign(t, k, tt.typ, w.claimsOf(changes))
		id, err := w.verifier(func(is *Issuer) {
			is.Profile, is.Audiences, is.Scopes = tt.profile, []string{resource, "app"}, []string{"fallback"}
		}).Verify(t.Context(), token)
		if err != nil || id.Client != tt.client || strings.Join(id.Scopes, " ") != tt.scopes {
			t.Errorf("%s: %+v, %v", tt.profile, id, err)
		}
		if _, err := w.verifier(nil).Verify(t.Context(), token); code(err) != call.Unauthenticated {
			t.Errorf("%s: the strict profile took it: %v", tt.profile, err)
		}
	}
	token := sign(t, k, "JWT", w.claimsOf(map[string]any{"nonce": "n", "azp": "x"}))
	if _, err := w.verifier(func(is *Issuer) { is.Profile = "keycloak" }).Verify(t.Context(), token); code(err) != call.Unauthenticated {
		t.Errorf("an ID token: %v", err)
	}
}

func TestTenant(t *testing.T) {
	w := newWorld(t)
	k := w.addKey("k", "ES256")
	v := w.verifier(func(is *Issuer) { is.TenantClaim = "org.id"; is.RolesClaim = "realm_access.roles" })
	id, err := v.Verify(t.Context(), sign(t, k, "at+jwt", w.claimsOf(map[string]any{"org": map[string]any{"id": "acme"}, "realm_access": map[string]any{"roles": []string{"a"}}})))
	if err != nil || id.Tenant != "acme" || len(id.Roles) != 1 {
		t.Errorf("%+v, %v", id, err)
	}
	for _, bad := range []any{nil, "x", map[string]any{"id": ""}, map[string]any{"id": []string{"a", "b"}}, map[string]any{"id": 7}} {
		if _, err := v.Verify(t.Context(), sign(t, k, "at+jwt", w.claimsOf(map[string]any{"org": bad}))); code(err) != call.Unauthenticated {
			t.Errorf("org %v: %v", bad, err)
		}
	}
}

func TestOpaqueTokens(t *testing.T) {
	w := newWorld(t)
	w.set(func() {
		w.active["good"] = fmt.Sprintf(`{"active":true,"sub":"ada","aud":%q,"exp":%d,"client_id":"c","scope":"a b","token_type":"Bearer"}`, resource, w.now.Unix()+100)
		w.active["other"] = fmt.Sprintf(`{"active":true,"sub":"ada","aud":"x","exp":%d}`, w.now.Unix()+100)
		w.active["dpop"] = fmt.Sprintf(`{"active":true,"sub":"ada","aud":%q,"exp":%d,"token_type":"DPoP"}`, resource, w.now.Unix()+100)
	})
	v := w.verifier(func(is *Issuer) {
		is.Introspect, is.ClientID, is.ClientSecret = w.url+"/introspect", "rs", secret.New("hush")
	})
	for range 3 {
		if id, err := v.Verify(t.Context(), "good"); err != nil || id.Subject != "ada" || len(id.Scopes) != 2 {
			t.Fatalf("%+v, %v", id, err)
		}
	}
	if n := w.asked.Load(); n != 1 {
		t.Errorf("asked %d times", n)
	}
	for _, bad := range []string{"unknown", "other", "dpop"} {
		if _, err := v.Verify(t.Context(), bad); code(err) != call.Unauthenticated {
			t.Errorf("%s: %v", bad, err)
		}
	}
	w.pass(101*time.Second + 30*time.Second)
	if _, err := v.Verify(t.Context(), "good"); err == nil {
		t.Error("it outlived its time")
	}
}

func TestConfiguration(t *testing.T) {
	for name, is := range map[string]Issuer{
		"http": {URL: "http://idp.example.com"}, "password": {URL: "https://a:b@idp.example.com"}, "alg": {URL: "https://x", Algorithms: []string{"HS256"}},
		"none": {URL: "https://x", Algorithms: []string{"none"}}, "profile": {URL: "https://x", Profile: "other"}, "skew": {URL: "https://x", Skew: time.Hour},
		"jwks": {URL: "https://x", JWKS: "http://x/jwks"},
	} {
		if _, err := New(Options{Resource: resource, Issuers: []Issuer{is}}); err == nil {
			t.Errorf("%s is accepted", name)
		}
	}
	if _, err := New(Options{Resource: resource}); err == nil {
		t.Error("no issuer is accepted")
	}
}

// A signature alone can be asked for: of a token that is no access token.
func TestSignatureAlone(t *testing.T) {
	w := newWorld(t)
	key := w.addKey("1", "ES256")
	v := w.verifier(nil)
	token := sign(t, key, "oauth-id-jag+jwt", w.claimsOf(map[string]any{"aud": "https://other.example", "exp": nil}))
	if typ, payload, err := v.VerifySignature(t.Context(), token); err != nil || typ != "oauth-id-jag+jwt" || !strings.Contains(string(payload), `"ada"`) {
		t.Errorf("%s %s, %v", typ, payload, err)
	}
	for name, bad := range map[string]string{
		"forged": sign(t, newKey(t, "1", "ES256"), "", w.claimsOf(nil)), "of another issuer": sign(t, key, "", w.claimsOf(map[string]any{"iss": "https://other.example"})),
		"no JWT": "opaque", "empty": "", "long": strings.Repeat("a.", maxToken), "unsigned": token[:strings.LastIndex(token, ".")+1],
	} {
		if _, payload, err := v.VerifySignature(t.Context(), bad); err == nil {
			t.Errorf("%s: %s", name, payload)
		}
	}
}

// The keys of an issuer in this process are not fetched.
func TestKeysInMemory(t *testing.T) {
	w := newWorld(t)
	key := newKey(t, "1", "ES256")
	v := w.verifier(func(is *Issuer) {
		is.Keys = func() ([]byte, error) {
			public := key.Public()
			raw, err := public.MarshalJSON()
			return fmt.Appendf(nil, `{"keys":[%s]}`, raw), err
		}
	})
	if _, err := v.Verify(t.Context(), sign(t, key, "at+jwt", w.claimsOf(nil))); err != nil {
		t.Error(err)
	}
	if n := w.fetches.Load(); n != 0 {
		t.Errorf("%d fetches", n)
	}
}

func FuzzVerify(f *testing.F) {
	f.Add("a.b.c")
	f.Add(base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"none"}`)) + ".e30.")
	f.Add(base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"ES256","kid":"x"}`)) + "." + base64.RawURLEncoding.EncodeToString([]byte(`{"iss":"https://127.0.0.1:1"}`)) + ".AAAA")
	v, err := New(Options{Resource: resource, Issuers: []Issuer{{URL: "https://127.0.0.1:1"}}})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, token string) {
		if id, err := v.Verify(t.Context(), token); err == nil || id != nil {
			t.Fatalf("%q was accepted", token)
		}
	})
}

func BenchmarkVerify(b *testing.B) {
	t := &testing.T{}
	w := newWorld(t)
	k := w.addKey("k", "ES256")
	v := w.verifier(nil)
	token := sign(t, k, "at+jwt", w.claimsOf(nil))
	b.Run("remembered", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := v.Verify(b.Context(), token); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("checked", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			v.forget()
			if _, err := v.Verify(b.Context(), token); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// What an issuer says of itself is passed on as it is, and whoever asks, it is seldom asked.
func TestDescription(t *testing.T) {
	w := newWorld(t)
	v := w.verifier(nil)
	d, err := v.Describe(w.url)
	if err != nil {
		t.Fatal(err)
	}
	w.set(func() { w.away = true })
	for range 3 {
		if doc, err := d.Document(t.Context()); err == nil {
			t.Errorf("an issuer that is away says %s", doc)
		}
	}
	if n := w.described.Load(); n != 2 { // by both of its names
		t.Errorf("asked %d times while it was away", n)
	}
	w.set(func() { w.away = false })
	w.pass(notDescribedFor)
	for range 3 {
		if doc, err := d.Document(t.Context()); err != nil || !strings.Contains(string(doc), `"jwks_uri"`) {
			t.Errorf("%s, %v", doc, err)
		}
	}
	if n := w.described.Load(); n != 3 {
		t.Errorf("asked %d times", n)
	}
	if _, err := v.Describe("https://other.example.com"); err == nil {
		t.Error("somebody else is described")
	}
}
