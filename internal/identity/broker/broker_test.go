package broker

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"encoding/json"
	"errors"
	"io"
	"maps"
	"net/http"
	"net/http/cookiejar"
	"net/http/httptest"
	"net/url"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"newel.dev/newel/internal/identity/issuer"
	"newel.dev/newel/internal/identity/verify"
	"newel.dev/newel/internal/secret"
)

// company is an OpenID provider with keys of its own, over real HTTP. Whoever comes is logged in.
type company struct {
	t   *testing.T
	url string
	key *ecdsa.PrivateKey
	now func() time.Time

	mu      sync.Mutex
	codes   map[string]url.Values // requests
	name    bool                  // announces and sends iss (RFC 9207)
	iss     string                // that it sends instead of its own
	down    bool
	refuses string         // error that it answers with
	says    map[string]any // claims of its ID tokens that are not as they should be
	typ     string
	forged  bool
	asked   int
}

func newCompany(t *testing.T, now func() time.Time) *company {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &company{t: t, key: key, now: now, codes: map[string]url.Values{}, typ: "JWT", name: true}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /.well-known/openid-configuration", func(w http.ResponseWriter, _ *http.Request) {
		c.asked++
		c.write(w, map[string]any{
			"issuer": c.url, "authorization_endpoint": c.url + "/authorize", "token_endpoint": c.url + "/token", "jwks_uri": c.url + "/jwks",
			"authorization_response_iss_parameter_supported": c.name,
		})
	})
	mux.HandleFunc("GET /jwks", func(w http.ResponseWriter, _ *http.Request) {
		c.write(w, jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: key.Public(), KeyID: "1", Use: "sig", Algorithm: "ES256"}}})
	})
	mux.HandleFunc("GET /authorize", func(w http.ResponseWriter, r *http.Request) {
		q := r.URL.Query()
		if q.Get("client_id") != "newel" || q.Get("code_challenge_method") != "S256" || len(q.Get("nonce")) < 20 || !strings.Contains(q.Get("scope"), "openid") {
			http.Error(w, "bad request", http.StatusBadRequest)
			return
		}
		out := url.Values{"state": {q.Get("state")}}
		if c.refuses != "" {
			out.Set("error", c.refuses)
		} else {
			code := rand.Text()
			c.codes[code] = q
			out.Set("code", code)
		}
		if c.name {
			out.Set("iss", c.url)
		}
		if c.iss != "" {
			out.Set("iss", c.iss)
		}
		http.Redirect(w, r, q.Get("redirect_uri")+"?"+out.Encode(), http.StatusFound)
	})
	mux.HandleFunc("POST /token", func(w http.ResponseWriter, r *http.Request) {
		id, password, _ := r.BasicAuth()
		q := c.codes[r.PostFormValue("code")]
		delete(c.codes, r.PostFormValue("code"))
		if id != "newel" || password != "s3cret" || q == nil || hash(r.PostFormValue("code_verifier")) != q.Get("code_challenge") || r.PostFormValue("redirect_uri") != q.Get("redirect_uri") {
			w.WriteHeader(http.StatusBadRequest)
			c.write(w, map[string]string{"error": "invalid_grant"})
			return
		}
		claims := map[string]any{
			"iss": c.url, "sub": "ada", "aud": "newel", "nonce": q.Get("nonce"), "iat": c.now().Unix(), "exp": c.now().Add(time.Minute).Unix(),
			"name": "Ada <Lovelace>", "groups": []string{"staff", "finance"}, "org": "acme",
		}
		maps.Copy(claims, c.says)
		c.write(w, map[string]any{"access_token": "not ours", "token_type": "Bearer", "id_token": c.sign(c.typ, claims)})
	})
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.down {
			w.WriteHeader(http.StatusBadGateway)
			return
		}
		mux.ServeHTTP(w, r)
	}))
	t.Cleanup(web.Close)
	c.url = web.URL
	return c
}

// set changes how it behaves.
func (c *company) set(change func(*company)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	change(c)
}

func (c *company) write(w http.ResponseWriter, v any) {
	if err := json.NewEncoder(w).Encode(v); err != nil {
		c.t.Error(err)
	}
}

// sign signs what it says of somebody; nil values are left away.
func (c *company) sign(typ string, claims map[string]any) string {
	maps.DeleteFunc(claims, func(_ string, v any) bool { return v == nil })
	key := c.key
	if c.forged {
		var err error
		if key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
			c.t.Fatal(err)
		}
	}
	o := (&jose.SignerOptions{}).WithHeader("kid", "1")
	if typ != "" {
		o = o.WithType(jose.ContentType(typ))
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: key}, o)
	if err != nil {
		c.t.Fatal(err)
	}
	payload, err := json.Marshal(claims)
	if err != nil {
		c.t.Fatal(err)
	}
	jws, err := signer.Sign(payload)
	if err != nil {
		c.t.Fatal(err)
	}
	out, err := jws.CompactSerialize()
	if err != nil {
		c.t.Fatal(err)
	}
	return out
}

// world is a broker over TLS, its company, and clients.
type world struct {
	t       *testing.T
	url     string
	b       *Broker
	keys    *issuer.Keys
	company *company
	other   *company // whose assertions are accepted too

	mu    sync.Mutex
	clock time.Time
}

const (
	redirect = "https://app.example/callback"
	local    = "http://127.0.0.1:4711/callback"
	verifier = "a-verifier-that-is-long-enough-for-pkce-1234567890"
)

func (w *world) now() time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.clock
}

func (w *world) pass(d time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.clock = w.clock.Add(d)
}

func newWorld(t *testing.T, change func(*Options)) *world {
	t.Helper()
	w := &world{t: t, clock: time.Now()}
	w.company, w.other = newCompany(t, w.now), newCompany(t, w.now)
	var handler http.Handler
	web := httptest.NewTLSServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) { handler.ServeHTTP(rw, r) }))
	t.Cleanup(web.Close)
	w.url = web.URL
	var err error
	if w.keys, err = issuer.NewKeys(); err != nil {
		t.Fatal(err)
	}
	signatures, err := verify.New(verify.Options{Now: w.now, Issuers: []verify.Issuer{{URL: w.company.url, Audiences: []string{"newel"}}, {URL: w.other.url, Audiences: []string{w.url}}}})
	if err != nil {
		t.Fatal(err)
	}
	o := Options{
		Issuer: issuer.Options{
			URL: w.url, Resources: []string{w.url + "/mcp"}, Scopes: []string{"read", "write", "admin"}, Keys: w.keys, Register: true, Now: w.now,
			Clients: []issuer.Client{
				{ID: "app", Name: "The App", Redirects: []string{redirect}}, {ID: "desk", Redirects: []string{local}}, {ID: "agent", Secret: secret.New("hush")}, {ID: "other", Secret: secret.New("hush")},
			},
		},
		Provider:    Provider{URL: w.company.url, ClientID: "newel", Secret: secret.New("s3cret"), Scopes: []string{"openid", "groups"}},
		Rules:       []Rule{{Group: "staff", Scopes: []string{"read"}}, {Group: "finance", Scopes: []string{"write"}, Roles: []string{"finance"}}, {Group: "root", Scopes: []string{"*"}}},
		TenantClaim: "org", Assertions: []string{w.other.url}, Signatures: signatures, HTTP: &http.Client{Timeout: 10 * time.Second},
	}
	if change != nil {
		change(&o)
	}
	if w.b, err = New(o); err != nil {
		t.Fatal(err)
	}
	handler = w.b.Handler()
	return w
}

// browser is one person's.
type browser struct {
	w *world
	c *http.Client
}

func (w *world) browser() *browser {
	w.t.Helper()
	jar, err := cookiejar.New(nil)
	if err != nil {
		w.t.Fatal(err)
	}
	transport := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}} //nolint:gosec // the test's own server
	w.t.Cleanup(transport.CloseIdleConnections)
	return &browser{w, &http.Client{Jar: jar, Transport: transport, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}}
}

// page is what a browser got.
type page struct {
	status int
	header http.Header
	body   string
	to     *url.URL // where it is sent, or nil
}

func (b *browser) do(r *http.Request) *page {
	b.w.t.Helper()
	resp, err := b.c.Do(r)
	if err != nil {
		b.w.t.Fatal(err)
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(resp.Body)
	if err != nil {
		b.w.t.Fatal(err)
	}
	to, _ := resp.Location()
	return &page{resp.StatusCode, resp.Header, string(raw), to}
}

func (b *browser) get(address string) *page {
	b.w.t.Helper()
	r, err := http.NewRequestWithContext(b.w.t.Context(), http.MethodGet, address, nil)
	if err != nil {
		b.w.t.Fatal(err)
	}
	return b.do(r)
}

func (b *browser) post(address string, form url.Values, header ...string) *page {
	b.w.t.Helper()
	r, err := http.NewRequestWithContext(b.w.t.Context(), http.MethodPost, address, strings.NewReader(form.Encode()))
	if err != nil {
		b.w.t.Fatal(err)
	}
	r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	for i := 0; i+1 < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	return b.do(r)
}

func (w *world) request(client, redirect string, changes map[string]string) string {
	q := url.Values{
		"response_type": {"code"}, "client_id": {client}, "redirect_uri": {redirect}, "state": {"xyz"}, "scope": {"read write admin"},
		"code_challenge": {hash(verifier)}, "code_challenge_method": {"S256"}, "resource": {w.url + "/mcp"},
	}
	for k, v := range changes {
		q.Set(k, v)
	}
	return w.url + "/oauth/authorize?" + q.Encode()
}

// toProvider begins a login and lets the company answer; it returns where that sends the browser.
func (b *browser) toProvider(client, redirect string) string {
	b.w.t.Helper()
	p := b.get(b.w.request(client, redirect, nil))
	if p.to == nil || !strings.HasPrefix(p.to.String(), b.w.company.url+"/authorize?") {
		b.w.t.Fatalf("sent to %v, %d %s", p.to, p.status, p.body)
	}
	if p = b.get(p.to.String()); p.to == nil {
		b.w.t.Fatalf("the company: %d %s", p.status, p.body)
	}
	return p.to.String()
}

var tokenField = regexp.MustCompile(`name="token" value="([A-Z0-9]+)"`)

// toConsent logs in and returns the page that asks, and its token.
func (b *browser) toConsent(client, redirect string) (*page, string) {
	b.w.t.Helper()
	p := b.get(b.toProvider(client, redirect))
	found := tokenField.FindStringSubmatch(p.body)
	if found == nil {
		b.w.t.Fatalf("no page that asks: %d %v %s", p.status, p.to, p.body)
	}
	return p, found[1]
}

// allow says yes, and returns the code.
func (b *browser) allow(token string) string {
	b.w.t.Helper()
	p := b.post(b.w.url+"/oauth/consent", url.Values{"token": {token}, "answer": {"allow"}}, "Sec-Fetch-Site", "same-origin", "Origin", b.w.url)
	if p.to == nil || p.to.Query().Get("code") == "" || p.to.Query().Get("state") != "xyz" || p.to.Query().Get("iss") != b.w.url {
		b.w.t.Fatalf("sent to %v, %d %s", p.to, p.status, p.body)
	}
	return p.to.Query().Get("code")
}

// token asks for one.
func (b *browser) token(form url.Values) (map[string]any, int) {
	b.w.t.Helper()
	p := b.post(b.w.url+"/oauth/token", form)
	var out map[string]any
	if err := json.Unmarshal([]byte(p.body), &out); err != nil {
		b.w.t.Fatalf("%s: %v", p.body, err)
	}
	return out, p.status
}

func (b *browser) redeem(client, code string) (map[string]any, int) {
	b.w.t.Helper()
	return b.token(url.Values{"grant_type": {"authorization_code"}, "code": {code}, "client_id": {client}, "code_verifier": {verifier}})
}

// whom returns who an access token speaks for, as the resource server sees it.
func (w *world) whom(token any) *verify.Identity {
	w.t.Helper()
	v, err := verify.New(verify.Options{Now: w.now, Resource: w.url + "/mcp", Issuers: []verify.Issuer{{URL: w.url, Keys: w.keys.JWKS, TenantClaim: "tenant"}}})
	if err != nil {
		w.t.Fatal(err)
	}
	text, _ := token.(string)
	id, err := v.Verify(w.t.Context(), text)
	if err != nil {
		w.t.Fatal(err)
	}
	return id
}

func TestLogin(t *testing.T) {
	w := newWorld(t, nil)
	b := w.browser()
	p, token := b.toConsent("app", redirect)
	for _, want := range []string{"The App", "app.example", "<code>read</code>", "<code>write</code>", "Ada &lt;Lovelace&gt;"} {
		if !strings.Contains(p.body, want) {
			t.Errorf("the page lacks %q: %s", want, p.body)
		}
	}
	if strings.Contains(p.body, "admin") {
		t.Error("the page names a scope that this person cannot give")
	}
	if !strings.Contains(p.header.Get("Content-Security-Policy"), "frame-ancestors 'none'") || p.header.Get("X-Frame-Options") != "DENY" {
		t.Errorf("others may frame the page: %v", p.header)
	}
	cookie := p.header.Get("Set-Cookie")
	for _, want := range []string{"__Host-newel-login=", "Secure", "HttpOnly", "SameSite=Lax", "Path=/"} {
		if !strings.Contains(cookie, want) {
			t.Errorf("the cookie lacks %s: %s", want, cookie)
		}
	}
	out, status := b.redeem("app", b.allow(token))
	if status != http.StatusOK || out["scope"] != "read write" {
		t.Fatalf("%d %v", status, out)
	}
	id := w.whom(out["access_token"])
	if id.Subject != w.company.url+"#ada" || id.Tenant != "acme" || id.Client != "app" || strings.Join(id.Roles, " ") != "finance" || strings.Join(id.Scopes, " ") != "read write" {
		t.Errorf("%+v", id)
	}
	if strings.Contains(out["access_token"].(string), "not ours") {
		t.Error("the provider's token was handed on")
	}
}

// What somebody allowed once is not asked again: for that client, host, resource and those scopes.
func TestConsentIsRemembered(t *testing.T) {
	w := newWorld(t, nil)
	b := w.browser()
	_, token := b.toConsent("app", redirect)
	b.allow(token)
	direct := func(b *browser, client, redirect string) bool {
		t.Helper()
		p := b.get(b.toProvider(client, redirect))
		return p.to != nil && p.to.Query().Get("code") != ""
	}
	if !direct(w.browser(), "app", redirect) { // of the person, not of the browser
		t.Error("the same person is asked again")
	}
	w.company.set(func(c *company) { c.says = map[string]any{"groups": []string{"root"}} })
	if direct(b, "app", redirect) {
		t.Error("more scopes than were allowed")
	}
	w.company.set(func(c *company) { c.says = map[string]any{"sub": "bob"} })
	if direct(b, "app", redirect) {
		t.Error("somebody else was not asked")
	}
	w.company.set(func(c *company) { c.says = nil })
	w.pass(consentLife + time.Second)
	if direct(b, "app", redirect) {
		t.Error("it is remembered for ever")
	}
	p, token := b.toConsent("desk", local)
	if !strings.Contains(p.body, "on your own computer") {
		t.Error("the page does not say that a local program asks")
	}
	b.allow(token)
	if direct(b, "desk", local) {
		t.Error("another local program could come in the name of this one")
	}

	// A stranger who registers is asked about like anybody.
	r := b.post(w.url+"/oauth/register", nil)
	if r.status != http.StatusBadRequest {
		t.Errorf("%d", r.status)
	}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, w.url+"/oauth/register", strings.NewReader(`{"client_name":"The App","redirect_uris":["https://evil.example/cb"]}`))
	if err != nil {
		t.Fatal(err)
	}
	var out struct {
		ID string `json:"client_id"`
	}
	if err := json.Unmarshal([]byte(b.do(req).body), &out); err != nil || out.ID == "" {
		t.Fatal(err)
	}
	if p := b.get(w.request(out.ID, "https://evil.example/cb", map[string]string{"response_type": "token"})); p.to != nil || p.status != http.StatusBadRequest {
		t.Errorf("a link to this server leads to a stranger's: %d, sent to %v", p.status, p.to)
	}
	if p, _ := b.toConsent(out.ID, "https://evil.example/cb"); !strings.Contains(p.body, "evil.example") {
		t.Errorf("the page hides where the person is sent: %s", p.body)
	}
}

func TestHostileCallbacks(t *testing.T) {
	w := newWorld(t, nil)
	refused := func(name string, p *page) {
		t.Helper()
		if p.to != nil || p.status != http.StatusBadRequest || tokenField.MatchString(p.body) {
			t.Errorf("%s: %d, sent to %v", name, p.status, p.to)
		}
	}
	b := w.browser()
	at := b.toProvider("app", redirect)
	refused("another browser", w.browser().get(at))
	refused("another state", b.get(strings.Replace(at, "state=", "state=A", 1)))
	refused("no state", b.get(regexp.MustCompile(`state=[^&]*`).ReplaceAllString(at, "")))
	refused("two states", b.get(at+"&state=x"))

	stranger := w.browser()
	theirs := stranger.toProvider("app", redirect)
	refused("a stranger's answer in this browser", b.get(theirs))
	_, token := b.toConsent("app", redirect)
	refused("the answer again, before the person answers", b.get(at))
	b.allow(token)
	refused("the answer again, after", b.get(at))

	w.company.set(func(c *company) { c.iss = "https://other.example" })
	b = w.browser()
	refused("another provider's answer", b.get(b.toProvider("app", redirect)))
	w.company.set(func(c *company) { c.iss = "" })
	b = w.browser()
	at = b.toProvider("app", redirect)
	refused("an answer without the provider's name", b.get(regexp.MustCompile(`iss=[^&]*&?`).ReplaceAllString(at, "")))

	b = w.browser()
	at = b.toProvider("app", redirect)
	w.pass(loginLife + time.Second)
	refused("too late", b.get(at))

	// Its cookie cannot be made, changed, or used in another place.
	b = w.browser()
	at = b.toProvider("app", redirect)
	home, _ := url.Parse(w.url)
	cookies := b.c.Jar.Cookies(home)
	if len(cookies) != 1 {
		t.Fatal(cookies)
	}
	value := []byte(cookies[0].Value)
	value[len(value)/2] ^= 1
	changed := w.browser()
	changed.c.Jar.SetCookies(home, []*http.Cookie{{Name: cookies[0].Name, Value: string(value), Secure: true, Path: "/"}})
	refused("a changed cookie", changed.get(at))
	sum := newWorld(t, nil).browser() // of another server, with another key
	sum.toProvider("app", redirect)
	other, _ := url.Parse(sum.w.url)
	foreign := w.browser()
	foreign.c.Jar.SetCookies(home, []*http.Cookie{{Name: cookies[0].Name, Value: sum.c.Jar.Cookies(other)[0].Value, Secure: true, Path: "/"}})
	refused("another server's cookie", foreign.get(at))
}

func TestBadIDTokens(t *testing.T) {
	now := time.Now()
	for name, tt := range map[string]struct {
		says   map[string]any
		change func(*company)
	}{
		"wrong nonce": {says: map[string]any{"nonce": "x"}}, "no nonce": {says: map[string]any{"nonce": nil}},
		"for another": {says: map[string]any{"aud": "another"}}, "for several": {says: map[string]any{"aud": []string{"newel", "x"}}},
		"of another party": {says: map[string]any{"azp": "x"}}, "of another issuer": {says: map[string]any{"iss": "https://other.example"}},
		"expired": {says: map[string]any{"exp": now.Add(-time.Minute).Unix()}}, "without expiry": {says: map[string]any{"exp": nil}},
		"old": {says: map[string]any{"iat": now.Add(-time.Hour).Unix()}}, "of the future": {says: map[string]any{"iat": now.Add(time.Hour).Unix()}},
		"without time": {says: map[string]any{"iat": nil}}, "not yet": {says: map[string]any{"nbf": now.Add(time.Hour).Unix()}},
		"forged": {change: func(c *company) { c.forged = true }}, "an access token": {change: func(c *company) { c.typ = "at+jwt" }},
		"an ID-JAG": {change: func(c *company) { c.typ = "oauth-id-jag+jwt" }},
	} {
		w := newWorld(t, nil)
		w.company.set(func(c *company) {
			c.says = tt.says
			if tt.change != nil {
				tt.change(c)
			}
		})
		b := w.browser()
		if p := b.get(b.toProvider("app", redirect)); p.status != http.StatusBadRequest || p.to != nil {
			t.Errorf("%s: %d, sent to %v, %s", name, p.status, p.to, p.body)
		}
	}
	// Of another issuer whose assertions are accepted: it logs nobody in.
	w := newWorld(t, nil)
	w.company.set(func(c *company) { c.key = w.other.key; c.says = map[string]any{"iss": w.other.url} })
	b := w.browser()
	if p := b.get(b.toProvider("app", redirect)); p.status != http.StatusBadRequest || p.to != nil {
		t.Errorf("an ID token of another issuer: %d, sent to %v", p.status, p.to)
	}
}

func TestWhoMayNotLogIn(t *testing.T) {
	for name, says := range map[string]map[string]any{
		"in no group": {"groups": []string{"guests"}}, "no groups": {"groups": nil}, "groups of another kind": {"groups": 7},
		"no tenant": {"org": nil}, "two tenants": {"org": []string{"acme", "umbrella"}}, "nobody": {"sub": nil}, "a long name": {"sub": strings.Repeat("x", maxSubject+1)},
	} {
		w := newWorld(t, nil)
		w.company.set(func(c *company) { c.says = says })
		b := w.browser()
		if p := b.get(b.toProvider("app", redirect)); p.to == nil || p.to.Query().Get("error") != "access_denied" || p.to.Query().Get("code") != "" {
			t.Errorf("%s: %d, sent to %v", name, p.status, p.to)
		}
	}
	w := newWorld(t, func(o *Options) { o.Rules = append(o.Rules, Rule{Tenant: "umbrella"}) })
	b := w.browser()
	if p := b.get(b.toProvider("app", redirect)); p.to == nil || p.to.Query().Get("error") != "access_denied" {
		t.Errorf("of two tenants: sent to %v", p.to)
	}
	w = newWorld(t, func(o *Options) {
		o.TenantClaim, o.Rules = "", []Rule{{Group: "umbrella", Tenant: "umbrella"}, {Group: "staff", Scopes: []string{"read"}}}
	})
	b = w.browser()
	if p := b.get(b.toProvider("app", redirect)); p.to == nil || p.to.Query().Get("error") != "access_denied" {
		t.Errorf("of no tenant, where others are of one: sent to %v", p.to)
	}
	w.company.set(func(c *company) { c.says = map[string]any{"groups": []string{"umbrella", "staff"}} })
	_, token := b.toConsent("app", redirect)
	if out, _ := b.redeem("app", b.allow(token)); w.whom(out["access_token"]).Tenant != "umbrella" {
		t.Errorf("%v", out)
	}
	w = newWorld(t, nil)
	w.company.set(func(c *company) { c.refuses = "access_denied" })
	b = w.browser()
	if p := b.get(b.toProvider("app", redirect)); p.to == nil || p.to.Query().Get("error") != "access_denied" || p.to.Query().Get("state") != "xyz" {
		t.Errorf("who says no at the provider: sent to %v", p.to)
	}
}

func TestHostileConsent(t *testing.T) {
	w := newWorld(t, nil)
	b := w.browser()
	_, token := b.toConsent("app", redirect)
	yes := url.Values{"token": {token}, "answer": {"allow"}}
	for name, tt := range map[string]struct {
		b      *browser
		form   url.Values
		header []string
	}{
		"another site":     {b, yes, []string{"Sec-Fetch-Site", "cross-site"}},
		"another origin":   {b, yes, []string{"Origin", "https://evil.example"}},
		"a wrong token":    {b, url.Values{"token": {"x"}, "answer": {"allow"}}, nil},
		"no token":         {b, url.Values{"answer": {"allow"}}, nil},
		"another browser":  {w.browser(), yes, nil},
		"another's cookie": {func() *browser { o := w.browser(); o.toConsent("app", redirect); return o }(), yes, nil},
		"before the login": {func() *browser { o := w.browser(); o.toProvider("app", redirect); return o }(), yes, nil},
	} {
		p := tt.b.post(w.url+"/oauth/consent", tt.form, tt.header...)
		if p.to != nil || p.status != http.StatusForbidden && p.status != http.StatusBadRequest {
			t.Errorf("%s: %d, sent to %v", name, p.status, p.to)
		}
	}
	// The state of the login is no token of the page.
	early := w.browser()
	at, err := url.Parse(early.toProvider("app", redirect))
	if err != nil {
		t.Fatal(err)
	}
	if p := early.post(w.url+"/oauth/consent", url.Values{"token": {at.Query().Get("state")}, "answer": {"allow"}}); p.to != nil || p.status != http.StatusBadRequest {
		t.Errorf("without the provider: %d, sent to %v", p.status, p.to)
	}
	// The page answers once, however often its cookie is shown.
	home, _ := url.Parse(w.url)
	kept := b.c.Jar.Cookies(home)
	b.allow(token)
	b.c.Jar.SetCookies(home, []*http.Cookie{{Name: kept[0].Name, Value: kept[0].Value, Secure: true, Path: "/"}})
	if p := b.post(w.url+"/oauth/consent", yes); p.to != nil || p.status != http.StatusBadRequest {
		t.Errorf("a second time: %d, sent to %v", p.status, p.to)
	}
	b = w.browser()
	_, token = b.toConsent("desk", local)
	for _, answer := range []string{"deny", ""} { // only yes is yes
		p := b.post(w.url+"/oauth/consent", url.Values{"token": {token}, "answer": {answer}})
		if answer == "deny" && (p.to == nil || p.to.Query().Get("error") != "access_denied") {
			t.Errorf("no: sent to %v", p.to)
		}
		if answer == "" && p.to != nil {
			t.Errorf("after no: sent to %v", p.to)
		}
	}
	b = w.browser()
	_, token = b.toConsent("desk", local)
	w.pass(loginLife + time.Second)
	if p := b.post(w.url+"/oauth/consent", url.Values{"token": {token}, "answer": {"allow"}}); p.to != nil || p.status != http.StatusBadRequest {
		t.Errorf("too late: %d, sent to %v", p.status, p.to)
	}
}

func TestBadRequests(t *testing.T) {
	w := newWorld(t, nil)
	b := w.browser()
	for name, changes := range map[string]map[string]string{
		"redirect": {"redirect_uri": "https://evil.example/callback"}, "redirect of another": {"redirect_uri": local}, "client": {"client_id": "x"}, "a machine": {"client_id": "agent"},
	} {
		if p := b.get(w.request("app", redirect, changes)); p.to != nil || p.status != http.StatusBadRequest {
			t.Errorf("%s: %d, sent to %v", name, p.status, p.to)
		}
	}
	if p := b.get(w.request("app", redirect, map[string]string{"resource": "https://other.example"})); p.to == nil || p.to.Query().Get("error") != "invalid_target" {
		t.Errorf("resource: sent to %v", p.to)
	}
	if p := b.get(w.request("app", redirect, map[string]string{"state": strings.Repeat("s", 1500)})); p.to == nil || p.to.Query().Get("error") != "" {
		t.Errorf("a long state: sent to %v", p.to)
	}
	many := "https://app.example/" + strings.Repeat("x", 1900)
	w = newWorld(t, func(o *Options) { o.Issuer.Clients = []issuer.Client{{ID: "app", Redirects: []string{many}}} })
	if p := w.browser().get(w.request("app", many, map[string]string{"state": strings.Repeat("s", 1999)})); p.to == nil || p.to.Query().Get("error") != "invalid_request" || p.header.Get("Set-Cookie") != "" {
		t.Errorf("a request that no cookie holds: %d, sent to %v", p.status, p.to)
	}
	out, status := b.redeem("desk", func() string { _, token := b.toConsent("app", redirect); return b.allow(token) }())
	if status != http.StatusBadRequest || out["error"] != "invalid_grant" {
		t.Errorf("another client's code: %d %v", status, out)
	}
}

// While the provider is down nobody logs in, and it is not asked all the time.
func TestProviderDown(t *testing.T) {
	w := newWorld(t, nil)
	w.company.set(func(c *company) { c.down = true })
	for range 20 {
		if p := w.browser().get(w.request("app", redirect, nil)); p.to == nil || p.to.Query().Get("error") != "temporarily_unavailable" {
			t.Fatalf("%d, sent to %v", p.status, p.to)
		}
	}
	w.company.set(func(c *company) { c.down = false })
	w.pass(metadataRetry + time.Second)
	b := w.browser()
	_, token := b.toConsent("app", redirect)
	out, _ := b.redeem("app", b.allow(token))
	second := w.browser()
	at := second.toProvider("desk", local)
	w.company.set(func(c *company) {
		c.down = true
		if c.asked != 2 { // by the broker, and for its keys
			t.Errorf("the provider was asked %d times what it is", c.asked)
		}
	})
	if p := second.get(at); p.to == nil || p.to.Query().Get("error") != "temporarily_unavailable" {
		t.Errorf("down in the middle: %d, sent to %v", p.status, p.to)
	}
	if out, status := b.token(url.Values{"grant_type": {"refresh_token"}, "refresh_token": {out["refresh_token"].(string)}, "client_id": {"app"}}); status != http.StatusOK {
		t.Errorf("who has logged in: %d %v", status, out)
	}
}

func TestAssertions(t *testing.T) {
	w := newWorld(t, nil)
	b := w.browser()
	claims := func(changes map[string]any) map[string]any {
		all := map[string]any{
			"iss": w.other.url, "sub": "ada", "aud": w.url, "client_id": "agent", "jti": rand.Text(), "iat": w.now().Unix(), "exp": w.now().Add(5 * time.Minute).Unix(),
			"resource": w.url + "/mcp", "scope": "read write admin", "groups": []string{"staff"}, "org": "acme",
		}
		maps.Copy(all, changes)
		return all
	}
	ask := func(client, assertion string) (map[string]any, int) {
		return b.token(url.Values{"grant_type": {"urn:ietf:params:oauth:grant-type:jwt-bearer"}, "client_id": {client}, "client_secret": {"hush"}, "assertion": {assertion}})
	}
	const typ = "oauth-id-jag+jwt"
	good := w.other.sign(typ, claims(nil))
	if out, status := ask("other", good); status != http.StatusBadRequest || out["error"] != "invalid_grant" {
		t.Errorf("another client presents it: %d %v", status, out)
	}
	out, status := ask("agent", good)
	if status != http.StatusOK || out["scope"] != "read" || out["refresh_token"] != nil {
		t.Fatalf("%d %v", status, out)
	}
	if id := w.whom(out["access_token"]); id.Subject != w.other.url+"#ada" || id.Client != "agent" || id.Tenant != "acme" {
		t.Errorf("%+v", id)
	}
	if out, status := ask("agent", good); status != http.StatusBadRequest || out["error"] != "invalid_grant" {
		t.Errorf("a second time: %d %v", status, out)
	}
	now := w.now()
	for name, one := range map[string]string{
		"another audience":  w.other.sign(typ, claims(map[string]any{"aud": "https://other.example"})),
		"two audiences":     w.other.sign(typ, claims(map[string]any{"aud": []string{w.url, "https://other.example"}})),
		"our resource only": w.other.sign(typ, claims(map[string]any{"aud": w.url + "/mcp"})),
		"another client":    w.other.sign(typ, claims(map[string]any{"client_id": "other"})),
		"no client":         w.other.sign(typ, claims(map[string]any{"client_id": nil})),
		"another type":      w.other.sign("JWT", claims(nil)),
		"no type":           w.other.sign("", claims(nil)),
		"no id":             w.other.sign(typ, claims(map[string]any{"jti": nil})),
		"a long id":         w.other.sign(typ, claims(map[string]any{"jti": strings.Repeat("j", maxID+1)})),
		"expired":           w.other.sign(typ, claims(map[string]any{"exp": now.Add(-time.Minute).Unix()})),
		"no expiry":         w.other.sign(typ, claims(map[string]any{"exp": nil})),
		"long-lived":        w.other.sign(typ, claims(map[string]any{"exp": now.Add(time.Hour).Unix()})),
		"of the future":     w.other.sign(typ, claims(map[string]any{"iat": now.Add(time.Minute).Unix()})),
		"not yet":           w.other.sign(typ, claims(map[string]any{"nbf": now.Add(time.Minute).Unix()})),
		"nobody":            w.other.sign(typ, claims(map[string]any{"sub": nil})),
		"of no group":       w.other.sign(typ, claims(map[string]any{"groups": []string{"guests"}})),
		"of no tenant":      w.other.sign(typ, claims(map[string]any{"org": nil})),
		"another issuer":    w.company.sign(typ, claims(map[string]any{"iss": w.company.url})), // it logs people in, and asserts nothing
		"in another's name": w.company.sign(typ, claims(nil)),
		"garbage":           "a.b.c",
		"nothing":           "",
	} {
		if out, status := ask("agent", one); status != http.StatusBadRequest || out["error"] != "invalid_grant" {
			t.Errorf("%s: %d %v", name, status, out)
		}
	}
	for name, one := range map[string]string{
		"another resource": w.other.sign(typ, claims(map[string]any{"resource": "https://other.example/mcp"})),
		"no resource":      w.other.sign(typ, claims(map[string]any{"resource": nil})),
	} {
		if out, status := ask("agent", one); status != http.StatusBadRequest || out["error"] != "invalid_target" {
			t.Errorf("%s: %d %v", name, status, out)
		}
	}
	if out, status := b.token(url.Values{"grant_type": {"urn:ietf:params:oauth:grant-type:jwt-bearer"}, "client_id": {"app"}, "assertion": {w.other.sign(typ, claims(map[string]any{"client_id": "app"}))}}); status != http.StatusBadRequest || out["error"] != "unauthorized_client" {
		t.Errorf("a client that proves nothing: %d %v", status, out)
	}
	var doc struct {
		Profiles []string `json:"authorization_grant_profiles_supported"`
	}
	if err := json.Unmarshal([]byte(b.get(w.url+"/.well-known/oauth-authorization-server").body), &doc); err != nil || len(doc.Profiles) != 1 {
		t.Errorf("%+v, %v", doc, err)
	}

	down := newWorld(t, nil)
	down.other.set(func(c *company) { c.down = true })
	w, b = down, down.browser()
	if out, status := ask("agent", w.other.sign(typ, claims(nil))); status != http.StatusServiceUnavailable || out["error"] != "temporarily_unavailable" {
		t.Errorf("its issuer is down: %d %v", status, out)
	}
}

// What is done with is remembered in bounded room; when there is none nothing passes.
func TestBounds(t *testing.T) {
	w := newWorld(t, nil)
	for range spent.Most {
		if ok, err := w.b.spend(t.Context(), rand.Text(), w.now().Add(time.Minute)); !ok || err != nil {
			t.Fatalf("no room: %v", err)
		}
	}
	if _, err := w.b.spend(t.Context(), "one more", w.now().Add(time.Minute)); !errors.Is(err, issuer.ErrFull) {
		t.Errorf("there is no bound: %v", err)
	}
	b := w.browser()
	_, token := b.toConsent("app", redirect)
	p := b.post(w.url+"/oauth/consent", url.Values{"token": {token}, "answer": {"allow"}}, "Sec-Fetch-Site", "same-origin", "Origin", w.url)
	if p.to == nil || p.to.Query().Get("error") != "temporarily_unavailable" || p.to.Query().Has("code") {
		t.Errorf("a login when there is no room: sent to %v", p.to)
	}
	w.pass(2 * time.Minute)
	if ok, err := w.b.spend(t.Context(), "one more", w.now().Add(time.Minute)); !ok || err != nil {
		t.Errorf("what has expired stays: %v", err)
	}
}

func TestConfiguration(t *testing.T) {
	good := newWorld(t, nil).b.o
	for name, change := range map[string]func(*Options){
		"plain HTTP": func(o *Options) { o.Issuer.URL = "http://mcp.example.com" }, "no provider": func(o *Options) { o.Provider.URL = "" }, "no client id": func(o *Options) { o.Provider.ClientID = "" },
		"no rules": func(o *Options) { o.Rules = nil }, "no signatures": func(o *Options) { o.Signatures = nil }, "no keys": func(o *Options) { o.Issuer.Keys = nil },
	} {
		o := good
		change(&o)
		if _, err := New(o); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}
