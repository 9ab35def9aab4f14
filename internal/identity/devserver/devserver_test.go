package devserver

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	"newel.dev/newel/internal/identity/verify"
)

type flow struct {
	t      *testing.T
	issuer string
	client string
	now    *time.Time
}

const redirect = "http://127.0.0.1:4711/callback"

func start(t *testing.T) *flow {
	t.Helper()
	now := time.Now()
	var s *Server
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { s.Handler().ServeHTTP(w, r) }))
	t.Cleanup(web.Close)
	var err error
	s, err = New(Options{
		Issuer: web.URL, Resources: []string{web.URL + "/mcp"}, Scopes: []string{"a:read", "a:write"}, Now: func() time.Time { return now },
		Users: []User{{Name: "alice", Scopes: []string{"*"}, Roles: []string{"admin"}}, {Name: "bob", Scopes: []string{"a:read"}, Tenant: "acme"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	f := &flow{t: t, issuer: web.URL, now: &now}
	resp, err := http.Post(web.URL+"/oauth/register", "application/json", strings.NewReader(`{"client_name":"Test","redirect_uris":["`+redirect+`"],"scope":"a:read"}`))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var out struct {
		ClientID string `json:"client_id"`
	}
	if err := json.NewDecoder(resp.Body).Decode(&out); err != nil || resp.StatusCode != http.StatusCreated || out.ClientID == "" {
		t.Fatalf("%d, %v", resp.StatusCode, err)
	}
	f.client = out.ClientID
	return f
}

const verifier = "a-verifier-that-is-long-enough-for-pkce-1234567890"

func (f *flow) query(changes map[string]string) string {
	sum := sha256.Sum256([]byte(verifier))
	q := url.Values{
		"response_type": {"code"}, "client_id": {f.client}, "redirect_uri": {redirect}, "state": {"xyz"}, "scope": {"a:read a:write other"},
		"code_challenge": {base64.RawURLEncoding.EncodeToString(sum[:])}, "code_challenge_method": {"S256"}, "resource": {f.issuer + "/mcp"},
	}
	for k, v := range changes {
		if v == "" {
			q.Del(k)
		} else {
			q.Set(k, v)
		}
	}
	return f.issuer + "/oauth/authorize?" + q.Encode()
}

var still = &http.Client{CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}

// login chooses a user and returns where the browser is sent, or the status.
func (f *flow) login(user string, changes map[string]string) (*url.URL, int) {
	f.t.Helper()
	resp, err := still.PostForm(f.query(changes), url.Values{"user": {user}})
	if err != nil {
		f.t.Fatal(err)
	}
	defer resp.Body.Close()
	to, err := resp.Location()
	if err != nil {
		return nil, resp.StatusCode
	}
	return to, resp.StatusCode
}

func (f *flow) token(form url.Values) (map[string]any, int) {
	f.t.Helper()
	resp, err := http.PostForm(f.issuer+"/oauth/token", form)
	if err != nil {
		f.t.Fatal(err)
	}
	defer resp.Body.Close()
	raw, _ := io.ReadAll(resp.Body)
	var out map[string]any
	if err := json.Unmarshal(raw, &out); err != nil {
		f.t.Fatalf("%s: %v", raw, err)
	}
	return out, resp.StatusCode
}

func (f *flow) form(code string) url.Values {
	return url.Values{"grant_type": {"authorization_code"}, "code": {code}, "client_id": {f.client}, "redirect_uri": {redirect}, "code_verifier": {verifier}, "resource": {f.issuer + "/mcp"}}
}

func TestFlow(t *testing.T) {
	f := start(t)
	resp, err := http.Get(f.query(nil))
	if err != nil {
		t.Fatal(err)
	}
	raw, _ := io.ReadAll(resp.Body)
	resp.Body.Close()
	if !strings.Contains(string(raw), "alice") || !strings.Contains(string(raw), "127.0.0.1:4711") || !strings.Contains(resp.Header.Get("Content-Security-Policy"), "frame-ancestors 'none'") {
		t.Errorf("the page: %s", raw)
	}
	to, _ := f.login("bob", nil)
	if to == nil || to.Query().Get("state") != "xyz" || to.Query().Get("iss") != f.issuer || to.Query().Get("code") == "" {
		t.Fatalf("sent to %v", to)
	}
	out, status := f.token(f.form(to.Query().Get("code")))
	if status != http.StatusOK || out["scope"] != "a:read" { // bob may not give more
		t.Fatalf("%d %v", status, out)
	}
	v, err := verify.New(verify.Options{Resource: f.issuer + "/mcp", Issuers: []verify.Issuer{{URL: f.issuer, TenantClaim: "tenant"}}})
	if err != nil {
		t.Fatal(err)
	}
	id, err := v.Verify(t.Context(), out["access_token"].(string))
	if err != nil || id.Subject != "bob" || id.Tenant != "acme" || id.Client != f.client || strings.Join(id.Scopes, " ") != "a:read" {
		t.Errorf("%+v, %v", id, err)
	}

	// Refresh tokens rotate; the second use of one ends the family.
	refresh := func(token any) (map[string]any, int) {
		return f.token(url.Values{"grant_type": {"refresh_token"}, "refresh_token": {token.(string)}, "client_id": {f.client}})
	}
	second, status := refresh(out["refresh_token"])
	if status != http.StatusOK || second["refresh_token"] == out["refresh_token"] {
		t.Fatalf("%d %v", status, second)
	}
	if _, status := refresh(out["refresh_token"]); status != http.StatusBadRequest {
		t.Errorf("a used refresh token: %d", status)
	}
	if _, status := refresh(second["refresh_token"]); status != http.StatusBadRequest {
		t.Errorf("the family lives on: %d", status)
	}
}

func TestCodesAreForOnce(t *testing.T) {
	f := start(t)
	to, _ := f.login("alice", nil)
	code := to.Query().Get("code")
	first, status := f.token(f.form(code))
	if status != http.StatusOK {
		t.Fatal(first)
	}
	if _, status := f.token(f.form(code)); status != http.StatusBadRequest {
		t.Errorf("a used code: %d", status)
	}
	if _, status := f.token(url.Values{"grant_type": {"refresh_token"}, "refresh_token": {first["refresh_token"].(string)}, "client_id": {f.client}}); status != http.StatusBadRequest {
		t.Errorf("what came of a code that was used twice lives on: %d", status)
	}
	for name, change := range map[string]func(url.Values){
		"verifier": func(v url.Values) { v.Set("code_verifier", "another") }, "no verifier": func(v url.Values) { v.Del("code_verifier") },
		"client": func(v url.Values) { v.Set("client_id", "x") }, "redirect": func(v url.Values) { v.Set("redirect_uri", "http://127.0.0.1:1/x") },
		"resource": func(v url.Values) { v.Set("resource", "https://other") }, "code": func(v url.Values) { v.Set("code", "x") },
	} {
		to, _ := f.login("alice", nil)
		form := f.form(to.Query().Get("code"))
		change(form)
		if out, status := f.token(form); status != http.StatusBadRequest || out["error"] != "invalid_grant" {
			t.Errorf("%s: %d %v", name, status, out)
		}
	}
	to, _ = f.login("alice", nil)
	*f.now = f.now.Add(time.Minute + time.Second)
	if _, status := f.token(f.form(to.Query().Get("code"))); status != http.StatusBadRequest {
		t.Errorf("an old code: %d", status)
	}
}

func TestBadRequests(t *testing.T) {
	f := start(t)
	for name, tt := range map[string]struct {
		changes map[string]string
		want    string // error at the client, or "" if it must not be sent there
	}{
		"no challenge":    {map[string]string{"code_challenge": ""}, "invalid_request"},
		"plain PKCE":      {map[string]string{"code_challenge_method": "plain"}, "invalid_request"},
		"token":           {map[string]string{"response_type": "token"}, "unsupported_response_type"},
		"resource":        {map[string]string{"resource": "https://other.example/mcp"}, "invalid_target"},
		"unknown client":  {map[string]string{"client_id": "x"}, ""},
		"redirect":        {map[string]string{"redirect_uri": "https://evil.example/callback"}, ""},
		"redirect prefix": {map[string]string{"redirect_uri": redirect + "/more"}, ""},
		"redirect host":   {map[string]string{"redirect_uri": "http://127.0.0.1.evil.example:4711/callback"}, ""},
	} {
		to, status := f.login("alice", tt.changes)
		switch {
		case tt.want == "" && (to != nil || status != http.StatusBadRequest):
			t.Errorf("%s: sent to %v, %d", name, to, status)
		case tt.want != "" && (to == nil || to.Query().Get("error") != tt.want || to.Query().Get("iss") != f.issuer):
			t.Errorf("%s: sent to %v, want %s", name, to, tt.want)
		}
	}
	if to, _ := f.login("alice", map[string]string{"redirect_uri": "http://127.0.0.1:9/callback"}); to == nil || to.Port() != "9" {
		t.Errorf("another port on loopback (RFC 8252): %v", to)
	}
	if to, status := f.login("mallory", nil); to != nil || status != http.StatusBadRequest {
		t.Errorf("an unknown user: %v", to)
	}
	for name, header := range map[string][2]string{"another origin": {"Origin", "https://evil.example"}, "another site": {"Sec-Fetch-Site", "cross-site"}} {
		r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, f.query(nil), strings.NewReader("user=alice"))
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		r.Header.Set(header[0], header[1])
		resp, err := still.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusForbidden {
			t.Errorf("%s: %d", name, resp.StatusCode)
		}
	}
	for _, uri := range []string{"javascript:alert(1)", "http://example.com/cb", "https://x/#f", "data:x", ""} {
		resp, err := http.Post(f.issuer+"/oauth/register", "application/json", strings.NewReader(`{"redirect_uris":["`+uri+`"]}`))
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusBadRequest {
			t.Errorf("%q was registered", uri)
		}
	}
	r, _ := http.NewRequestWithContext(t.Context(), http.MethodGet, f.issuer+"/.well-known/oauth-authorization-server", nil)
	r.Host = "evil.example"
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusForbidden {
		t.Errorf("another host: %d", resp.StatusCode)
	}
}

// A client that is described at its id needs no registration; addresses that only we can reach are
// not asked.
func TestClientMetadataDocuments(t *testing.T) {
	var id string
	document := ""
	web := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, document) }))
	t.Cleanup(web.Close)
	id = web.URL + "/client.json"
	open := func(fetch *http.Client) int {
		s, err := New(Options{Issuer: "http://127.0.0.1:7", Users: []User{{Name: "alice", Scopes: []string{"*"}}}, Resources: []string{"http://127.0.0.1:7/mcp"}, Fetch: fetch})
		if err != nil {
			t.Fatal(err)
		}
		f := &flow{t: t, issuer: "http://127.0.0.1:7", client: id}
		rec := httptest.NewRecorder()
		s.Handler().ServeHTTP(rec, httptest.NewRequest(http.MethodGet, f.query(nil), nil))
		return rec.Code
	}
	good := `{"client_id":"` + id + `","client_name":"App","redirect_uris":["` + redirect + `"]}`
	document = good
	if code := open(web.Client()); code != http.StatusOK {
		t.Errorf("a good document: %d", code)
	}
	if code := open(nil); code != http.StatusBadRequest {
		t.Errorf("a loopback address was asked: %d", code)
	}
	for _, bad := range []string{"", "{", strings.Replace(good, "/client.json", "/other.json", 1), strings.Replace(good, "App", "", 1), strings.Replace(good, redirect, "javascript:x", 1), good + strings.Repeat(" ", 64<<10)} {
		document = bad
		if code := open(web.Client()); code != http.StatusBadRequest {
			t.Errorf("%.80q: %d", bad, code)
		}
	}
}
