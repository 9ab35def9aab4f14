package issuer

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"newel.dev/newel/internal/secret"
)

const (
	redirect = "http://127.0.0.1:4711/callback"
	verifier = "a-verifier-that-is-long-enough-for-pkce-1234567890"
)

// world is a server in which everybody who comes is ada, over real HTTP.
type world struct {
	t   *testing.T
	url string
	s   *Server
	now time.Time
}

func newWorld(t *testing.T, change func(*Options)) *world {
	t.Helper()
	w := &world{t: t, now: time.Now()}
	var handler http.Handler
	web := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) { handler.ServeHTTP(rw, r) }))
	t.Cleanup(web.Close)
	w.url = web.URL
	keys, err := NewKeys()
	if err != nil {
		t.Fatal(err)
	}
	o := Options{
		URL: w.url, Resources: []string{w.url + "/mcp"}, Scopes: []string{"read", "write"}, Keys: keys, Now: func() time.Time { return w.now },
		Clients: []Client{{ID: "app", Redirects: []string{redirect}}, {ID: "service", Secret: secret.New("s3cret"), Redirects: []string{redirect}}},
	}
	if change != nil {
		change(&o)
	}
	if w.s, err = New(o); err != nil {
		t.Fatal(err)
	}
	handler = w.s.Handler(map[string]http.HandlerFunc{"GET /oauth/authorize": func(rw http.ResponseWriter, r *http.Request) {
		a, refusal, err := w.s.Read(r.Context(), r.URL.Query())
		switch {
		case err != nil:
			http.Error(rw, err.Error(), http.StatusBadRequest)
		case refusal != nil:
			w.s.Back(rw, r, a, refusal)
		default:
			w.s.Grant(rw, r, a, &Person{Subject: "ada", Scopes: []string{"*"}})
		}
	}})
	return w
}

var still = &http.Client{CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}

// authorize returns where the browser is sent, or nil.
func (w *world) authorize(client string, changes map[string]string) *url.URL {
	w.t.Helper()
	q := url.Values{
		"response_type": {"code"}, "client_id": {client}, "redirect_uri": {redirect}, "state": {"xyz"},
		"code_challenge": {digest(verifier)}, "code_challenge_method": {"S256"}, "resource": {w.url + "/mcp"},
	}
	for k, v := range changes {
		q.Set(k, v)
	}
	resp, err := still.Get(w.url + "/oauth/authorize?" + q.Encode())
	if err != nil {
		w.t.Fatal(err)
	}
	defer resp.Body.Close()
	to, err := resp.Location()
	if err != nil {
		return nil
	}
	return to
}

type answer struct {
	status      int
	nonce       string
	retry       string
	Access      string `json:"access_token"`
	Type        string `json:"token_type"`
	Refresh     string `json:"refresh_token"`
	Scope       string `json:"scope"`
	Error       string `json:"error"`
	Description string `json:"error_description"`
}

func (w *world) token(form url.Values, proofs ...string) *answer {
	w.t.Helper()
	r, err := http.NewRequestWithContext(w.t.Context(), http.MethodPost, w.url+"/oauth/token", strings.NewReader(form.Encode()))
	if err != nil {
		w.t.Fatal(err)
	}
	r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	for _, p := range proofs {
		r.Header.Add("DPoP", p)
	}
	resp, err := still.Do(r)
	if err != nil {
		w.t.Fatal(err)
	}
	defer resp.Body.Close()
	out := &answer{status: resp.StatusCode, nonce: resp.Header.Get("DPoP-Nonce"), retry: resp.Header.Get("Retry-After")}
	raw, _ := io.ReadAll(resp.Body)
	if err := json.Unmarshal(raw, out); err != nil {
		w.t.Fatalf("%s: %v", raw, err)
	}
	return out
}

// form redeems a new code of a client.
func (w *world) form(client string, changes map[string]string) url.Values {
	w.t.Helper()
	to := w.authorize(client, changes)
	if to == nil || to.Query().Get("code") == "" {
		w.t.Fatalf("sent to %v", to)
	}
	return url.Values{"grant_type": {"authorization_code"}, "code": {to.Query().Get("code")}, "client_id": {client}, "code_verifier": {verifier}}
}

func refreshForm(client, token string) url.Values {
	return url.Values{"grant_type": {"refresh_token"}, "refresh_token": {token}, "client_id": {client}}
}

// said is what an access token says.
func said(t *testing.T, token string) map[string]any {
	t.Helper()
	parts := strings.Split(token, ".")
	raw, err := base64.RawURLEncoding.DecodeString(parts[min(1, len(parts)-1)])
	var out map[string]any
	if err := errors.Join(err, json.Unmarshal(raw, &out)); err != nil {
		t.Fatalf("%q: %v", token, err)
	}
	return out
}

// prover is a client with a key.
type prover struct {
	t   *testing.T
	w   *world
	key *ecdsa.PrivateKey
}

func newProver(w *world) *prover {
	w.t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		w.t.Fatal(err)
	}
	return &prover{w.t, w, k}
}

func (p *prover) thumbprint() string {
	sum, err := (&jose.JSONWebKey{Key: p.key.Public()}).Thumbprint(crypto.SHA256)
	if err != nil {
		p.t.Fatal(err)
	}
	return base64.RawURLEncoding.EncodeToString(sum)
}

func (p *prover) proof(nonce, path string) string {
	p.t.Helper()
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: p.key}, (&jose.SignerOptions{EmbedJWK: true}).WithType("dpop+jwt"))
	if err != nil {
		p.t.Fatal(err)
	}
	payload, _ := json.Marshal(map[string]any{"jti": rand.Text(), "htm": "POST", "htu": p.w.url + path, "iat": p.w.now.Unix(), "nonce": nonce})
	jws, err := signer.Sign(payload)
	if err != nil {
		p.t.Fatal(err)
	}
	out, err := jws.CompactSerialize()
	if err != nil {
		p.t.Fatal(err)
	}
	return out
}

const tokenPath = "/oauth/token"

func TestTokensBoundToAKey(t *testing.T) {
	w := newWorld(t, nil)
	p, other := newProver(w), newProver(w)
	form := w.form("app", nil)
	first := w.token(form, p.proof("", tokenPath))
	if first.status != http.StatusBadRequest || first.Error != "use_dpop_nonce" || first.nonce == "" {
		t.Fatalf("a proof without nonce: %+v", first)
	}
	out := w.token(form, p.proof(first.nonce, tokenPath)) // the code is not used up by that
	if out.status != http.StatusOK || out.Type != "DPoP" || out.nonce == "" {
		t.Fatalf("%+v", out)
	}
	if cnf, _ := said(t, out.Access)["cnf"].(map[string]any); cnf["jkt"] != p.thumbprint() {
		t.Errorf("bound to %v", cnf)
	}
	for name, proofs := range map[string][]string{
		"no proof": nil, "another key": {other.proof(first.nonce, tokenPath)}, "two proofs": {p.proof(first.nonce, tokenPath), p.proof(first.nonce, tokenPath)},
		"for another address": {p.proof(first.nonce, "/mcp")}, "garbage": {"x"},
	} {
		if a := w.token(refreshForm("app", out.Refresh), proofs...); a.status != http.StatusBadRequest || a.Access != "" {
			t.Errorf("refreshed with %s: %+v", name, a)
		}
	}
	proof := p.proof(first.nonce, tokenPath)
	again := w.token(refreshForm("app", out.Refresh), proof)
	if again.status != http.StatusOK || again.Type != "DPoP" {
		t.Fatalf("those tries ended the login: %+v", again)
	}
	if a := w.token(refreshForm("app", again.Refresh), proof); a.Error != "invalid_dpop_proof" || a.Access != "" {
		t.Errorf("a proof that was shown before: %+v", a)
	}
	proof = p.proof(first.nonce, tokenPath)
	if a := w.token(refreshForm("app", "x.y"), proof); a.Error != "invalid_grant" {
		t.Errorf("%+v", a)
	}
	if a := w.token(w.form("app", nil), proof); a.status != http.StatusOK {
		t.Errorf("a stranger's proof was remembered: %+v", a)
	}

	// A client with a secret may change its key.
	form = w.form("service", nil)
	form.Set("client_secret", "s3cret")
	out = w.token(form, p.proof(first.nonce, tokenPath))
	r := refreshForm("service", out.Refresh)
	r.Set("client_secret", "s3cret")
	if a := w.token(r, other.proof(first.nonce, tokenPath)); a.status != http.StatusOK || said(t, a.Access)["cnf"].(map[string]any)["jkt"] != other.thumbprint() {
		t.Errorf("%+v", a)
	}

	// A code is for the key that the request named.
	form = w.form("app", map[string]string{"dpop_jkt": p.thumbprint()})
	if a := w.token(form, other.proof(first.nonce, tokenPath)); a.Error != "invalid_grant" {
		t.Errorf("another key than dpop_jkt: %+v", a)
	}
	if a := w.token(w.form("app", map[string]string{"dpop_jkt": p.thumbprint()})); a.Error != "invalid_grant" {
		t.Errorf("no key, and dpop_jkt: %+v", a)
	}
	if a := w.token(w.form("app", nil)); a.status != http.StatusOK || a.Type != "Bearer" || said(t, a.Access)["cnf"] != nil {
		t.Errorf("without proof: %+v", a)
	}
	w = newWorld(t, func(o *Options) { o.DPoPRequired = true })
	if a := w.token(w.form("app", nil)); a.Error != "invalid_dpop_proof" {
		t.Errorf("no proof where one is required: %+v", a)
	}
}

func TestClients(t *testing.T) {
	w := newWorld(t, nil)
	for name, change := range map[string]func(url.Values){
		"no secret": func(url.Values) {}, "wrong secret": func(f url.Values) { f.Set("client_secret", "x") },
		"of another": func(f url.Values) { f.Set("client_id", "app"); f.Set("client_secret", "s3cret") },
	} {
		form := w.form("service", nil)
		change(form)
		if a := w.token(form); a.status != http.StatusUnauthorized || a.Error != "invalid_client" {
			t.Errorf("%s: %+v", name, a)
		}
	}
	r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, w.url+tokenPath, strings.NewReader(url.Values{"grant_type": {"authorization_code"}, "code": w.form("service", nil)["code"], "code_verifier": {verifier}}.Encode()))
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	r.SetBasicAuth("service", "s3cret")
	resp, err := still.Do(r)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Errorf("HTTP Basic: %v, %v", resp, err)
	}
	resp.Body.Close()
	form := w.form("service", nil)
	form.Set("client_id", "app")
	if a := w.token(form); a.Error != "invalid_grant" {
		t.Errorf("another client's code: %+v", a)
	}
	if resp, err := http.Post(w.url+"/oauth/register", "application/json", strings.NewReader(`{"redirect_uris":["`+redirect+`"]}`)); err != nil || resp.StatusCode != http.StatusNotFound {
		t.Errorf("registered where nobody may: %v, %v", resp, err)
	} else {
		resp.Body.Close()
	}
	for name, c := range map[string][]Client{
		"twice": {{ID: "a"}, {ID: "a"}}, "no id": {{}}, "bad redirect": {{ID: "a", Redirects: []string{"javascript:x"}}},
	} {
		if _, err := New(Options{URL: "https://x.example", Keys: w.s.o.Keys, Clients: c}); err == nil {
			t.Errorf("clients, %s: no error", name)
		}
	}
}

func TestRequestsThatDoNotFit(t *testing.T) {
	w := newWorld(t, nil)
	long := strings.Repeat("s", maxParam+1)
	for name, tt := range map[string]struct {
		changes map[string]string
		want    string
	}{
		"plain": {map[string]string{"code_challenge_method": "plain"}, "invalid_request"}, "long state": {map[string]string{"state": long}, "invalid_request"},
		"thumbprint": {map[string]string{"dpop_jkt": "x"}, "invalid_request"}, "resource": {map[string]string{"resource": "https://other.example"}, "invalid_target"},
	} {
		if to := w.authorize("app", tt.changes); to == nil || to.Query().Get("error") != tt.want || to.Query().Get("iss") != w.url {
			t.Errorf("%s: %v", name, to)
		}
	}
	for name, changes := range map[string]map[string]string{"client": {"client_id": "x"}, "redirect": {"redirect_uri": "https://evil.example/"}, "long": {"redirect_uri": "http://127.0.0.1/" + long}} {
		if to := w.authorize("app", changes); to != nil {
			t.Errorf("%s: sent to %v", name, to)
		}
	}
	resp, err := still.Get(w.url + "/oauth/authorize?client_id=app&client_id=service")
	if err != nil || resp.StatusCode != http.StatusBadRequest {
		t.Errorf("two clients: %v, %v", resp, err)
	}
	resp.Body.Close()
	form := w.form("app", nil)
	form.Add("code", "x")
	if a := w.token(form); a.Error != "invalid_request" {
		t.Errorf("two codes: %+v", a)
	}
	if a := w.token(url.Values{"grant_type": {grantAssertion}, "client_id": {"app"}}); a.Error != "unsupported_grant_type" {
		t.Errorf("an assertion where none is taken: %+v", a)
	}
}

func TestLoginsEnd(t *testing.T) {
	w := newWorld(t, func(o *Options) { o.LoginLife = time.Hour })
	out := w.token(w.form("app", nil))
	first := out.Refresh
	w.now = w.now.Add(40 * time.Minute)
	less := refreshForm("app", out.Refresh)
	less.Set("scope", "read other")
	if out = w.token(less); out.Scope != "read" {
		t.Fatalf("less scope: %+v", out)
	}
	if a := w.token(refreshForm("service", out.Refresh)); a.status == http.StatusOK {
		t.Errorf("another client refreshed: %+v", a)
	}
	w.now = w.now.Add(30 * time.Minute) // refreshing makes no login longer
	if a := w.token(refreshForm("app", out.Refresh)); a.Error != "invalid_grant" {
		t.Errorf("after its time: %+v", a)
	}
	out = w.token(w.form("app", nil))
	if a := w.token(refreshForm("app", first)); a.Error != "invalid_grant" {
		t.Errorf("%+v", a)
	}
	next := w.token(refreshForm("app", out.Refresh))
	if a := w.token(refreshForm("app", out.Refresh)); a.Error != "invalid_grant" {
		t.Errorf("a second use: %+v", a)
	}
	if a := w.token(refreshForm("app", next.Refresh)); a.Error != "invalid_grant" {
		t.Errorf("the login lives on: %+v", a)
	}
}

// What one person and all people together may leave here is bounded.
func TestLoginsAreBounded(t *testing.T) {
	w := newWorld(t, nil)
	first := w.token(w.form("app", nil))
	for range logins.OfOne {
		w.token(w.form("app", nil))
	}
	if a := w.token(refreshForm("app", first.Refresh)); a.Error != "invalid_grant" {
		t.Errorf("the oldest login of one person lives on: %+v", a)
	}
	kept := w.s.o.Store.(*Memory)
	if n := len(kept.kinds[logins]); n != logins.OfOne {
		t.Errorf("%d logins", n)
	}
	w.now = w.now.Add(25 * time.Hour)
	w.token(w.form("app", nil))
	if len(kept.kinds[logins]) != 1 || len(kept.owners) != 1 || len(kept.kinds[codes]) != 1 {
		t.Errorf("what has expired stays: %d, %d, %d", len(kept.kinds[logins]), len(kept.owners), len(kept.kinds[codes]))
	}
}

// between is a store in which something happens before a login begins.
type between struct {
	Store
	happens func()
}

func (b *between) Add(ctx context.Context, at Place, value []byte, ttl time.Duration) (bool, error) {
	if do := b.happens; at.Kind == logins && do != nil {
		b.happens = nil
		do()
	}
	return b.Store.Add(ctx, at, value, ttl)
}

// A code that comes again while its login begins ends that login all the same.
func TestCodeUsedMeanwhile(t *testing.T) {
	store := &between{Store: NewMemory(nil)}
	w := newWorld(t, func(o *Options) { o.Store = store })
	form := w.form("app", nil)
	var second *answer
	store.happens = func() { second = w.token(form) }
	first := w.token(form)
	if second == nil || second.Error != "invalid_grant" || first.Error != "invalid_grant" || first.Access != "" {
		t.Errorf("%+v, %+v", first, second)
	}
	if again := w.token(w.form("app", nil)); again.status != http.StatusOK {
		t.Errorf("another code: %+v", again)
	}
}

// away is a store that does not answer while it is.
type away struct {
	Store
	is bool
}

var errTold = errors.New("the store is away")

func (a *away) Add(ctx context.Context, at Place, value []byte, ttl time.Duration) (bool, error) {
	if a.is {
		return false, errTold
	}
	return a.Store.Add(ctx, at, value, ttl)
}

func (a *away) Change(ctx context.Context, at Place, change func([]byte) ([]byte, time.Duration, error)) error {
	if a.is {
		return errTold
	}
	return a.Store.Change(ctx, at, change)
}

func (a *away) End(ctx context.Context, at Place, ttl time.Duration) error {
	if a.is {
		return errTold
	}
	return a.Store.End(ctx, at, ttl)
}

// While the store is away clients are told to try again, and what they brought is not used up by that.
func TestStoreIsAway(t *testing.T) {
	store := &away{Store: NewMemory(nil)}
	w := newWorld(t, func(o *Options) { o.Store, o.Register = store, true })
	login, code := w.token(w.form("app", nil)), w.form("app", nil)
	later := func(what string, a *answer) {
		t.Helper()
		if a.status != http.StatusServiceUnavailable || a.Error != "temporarily_unavailable" || a.retry == "" || strings.Contains(a.Description, errTold.Error()) {
			t.Errorf("%s: %+v", what, a)
		}
	}
	store.is = true
	later("a code", w.token(code))
	later("a refresh token", w.token(refreshForm("app", login.Refresh)))
	if to := w.authorize("app", nil); to == nil || to.Query().Get("error") != "temporarily_unavailable" || to.Query().Has("code") {
		t.Errorf("a known client: sent to %v", to)
	}
	if to := w.authorize("dyn-x", nil); to != nil {
		t.Errorf("a client that nobody can tell: sent to %v", to)
	}
	resp, err := http.Post(w.url+"/oauth/register", "application/json", strings.NewReader(`{"redirect_uris":["`+redirect+`"]}`))
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusServiceUnavailable || resp.Header.Get("Retry-After") == "" {
		t.Errorf("registered: %s", resp.Status)
	}
	store.is = false
	for what, form := range map[string]url.Values{"a code": code, "a refresh token": refreshForm("app", login.Refresh)} {
		if a := w.token(form); a.status != http.StatusOK {
			t.Errorf("%s, later: %+v", what, a)
		}
	}
}

func TestAssertions(t *testing.T) {
	var w *world
	var thumbprint string
	w = newWorld(t, func(o *Options) {
		o.Assertion = func(_ context.Context, client, assertion string) (*Assertion, error) {
			switch {
			case client != "service":
				return nil, errors.New("the client cannot be this one")
			case assertion == "told":
				return nil, &Refusal{"invalid_scope", "told"}
			case assertion == "elsewhere":
				return &Assertion{Person: &Person{Subject: "ada"}, Resource: "https://other.example"}, nil
			case assertion != "good":
				return nil, errors.New("for the log")
			}
			return &Assertion{Person: &Person{Subject: "ada", Scopes: []string{"read"}}, Resource: o.Resources[0] + "/", Scope: "read write other", Thumbprint: thumbprint}, nil
		}
	})
	form := func(assertion, password string) url.Values {
		return url.Values{"grant_type": {grantAssertion}, "client_id": {"service"}, "client_secret": {password}, "assertion": {assertion}}
	}
	if a := w.token(form("good", "s3cret")); a.status != http.StatusOK || a.Scope != "read" || a.Refresh != "" {
		t.Errorf("%+v", a)
	}
	for assertion, want := range map[string]string{"told": "invalid_scope", "elsewhere": "invalid_target", "bad": "invalid_grant"} {
		if a := w.token(form(assertion, "s3cret")); a.Error != want || strings.Contains(a.Description, "log") {
			t.Errorf("%s: %+v", assertion, a)
		}
	}
	if a := w.token(form("good", "x")); a.Error != "invalid_client" {
		t.Errorf("a wrong secret: %+v", a)
	}
	if a := w.token(url.Values{"grant_type": {grantAssertion}, "client_id": {"app"}, "assertion": {"good"}}); a.Error != "unauthorized_client" {
		t.Errorf("a client without secret: %+v", a)
	}
	p := newProver(w)
	thumbprint = p.thumbprint()
	if a := w.token(form("good", "s3cret")); a.Error != "invalid_grant" {
		t.Errorf("bound to a key that was not shown: %+v", a)
	}
	if a := w.token(form("good", "s3cret"), p.proof(w.s.proofs.Nonce(w.now), tokenPath)); a.status != http.StatusOK || a.Type != "DPoP" {
		t.Errorf("with its key: %+v", a)
	}
}

func TestNamesOfStrangers(t *testing.T) {
	if got := shown("Good\u202eapp\x00\n" + strings.Repeat("x", 200)); strings.ContainsAny(got, "\u202e\x00\n") || len([]rune(got)) > maxName {
		t.Errorf("%q", got)
	}
}
