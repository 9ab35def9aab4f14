package exchange

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/egress"
	"newel.dev/newel/internal/secret"
)

// world is a server that asks for tokens, with its authorization server on another port.
type world struct {
	t        *testing.T
	rs, as   *httptest.Server
	mu       sync.Mutex
	resource map[string]any // metadata of the resource; nil: none
	metadata map[string]any // of the authorization server
	wants    string         // scopes the server asks for
	accepts  func(r *http.Request) bool
	answers  func(form url.Values) map[string]any // of the token endpoint; nil: a token
	requests []url.Values                         // to the token endpoint
	calls    int                                  // that the server let in
	heard    []string                             // Authorization headers
	current  string                               // the token that is accepted
	lives    int                                  // seconds a token lives
}

func start(t *testing.T) *world {
	w := &world{t: t, lives: 3600}
	w.accepts = func(r *http.Request) bool {
		return w.current != "" && r.Header.Get("Authorization") == "Bearer "+w.current
	}
	w.rs = httptest.NewServer(http.HandlerFunc(w.serve))
	w.as = httptest.NewServer(http.HandlerFunc(w.authorize))
	t.Cleanup(w.rs.Close)
	t.Cleanup(w.as.Close)
	w.resource = map[string]any{"resource": w.rs.URL + "/mcp", "authorization_servers": []string{w.as.URL}}
	w.metadata = map[string]any{
		"issuer": w.as.URL, "authorization_endpoint": w.as.URL + "/authorize", "token_endpoint": w.as.URL + "/token", "registration_endpoint": w.as.URL + "/register",
		"code_challenge_methods_supported": []string{"S256"},
	}
	return w
}

func (w *world) serve(rw http.ResponseWriter, r *http.Request) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if r.URL.Path != "/mcp" {
		reply(rw, r.URL.Path == "/.well-known/oauth-protected-resource/mcp" && w.resource != nil, w.resource)
		return
	}
	w.heard = append(w.heard, r.Header.Get("Authorization"))
	if w.accepts(r) {
		w.calls++
		return
	}
	scope, status := "", http.StatusUnauthorized
	if w.wants != "" {
		scope = fmt.Sprintf(`, scope=%q`, w.wants)
	}
	if w.wants != "" && w.current != "" && r.Header.Get("Authorization") == "Bearer "+w.current {
		scope, status = scope+`, error="insufficient_scope"`, http.StatusForbidden
	}
	rw.Header().Set("WWW-Authenticate", `Bearer realm="x"`+scope)
	rw.WriteHeader(status)
}

func (w *world) authorize(rw http.ResponseWriter, r *http.Request) {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch r.URL.Path {
	case "/.well-known/oauth-authorization-server":
		reply(rw, w.metadata != nil, w.metadata)
	case "/register":
		reply(rw, true, map[string]any{"client_id": "made at " + w.as.URL})
	case "/token":
		if err := r.ParseForm(); err != nil {
			w.t.Error(err)
		}
		w.requests = append(w.requests, r.PostForm)
		w.current = fmt.Sprintf("token-%d", len(w.requests))
		out := map[string]any{"access_token": w.current, "token_type": "Bearer", "expires_in": w.lives, "scope": r.PostForm.Get("scope")}
		if r.PostForm.Get("grant_type") != "client_credentials" {
			out["refresh_token"] = fmt.Sprintf("refresh-%d", len(w.requests))
		}
		if w.answers != nil {
			out = w.answers(r.PostForm)
		}
		reply(rw, out["error"] == nil, out)
	default:
		http.NotFound(rw, r)
	}
}

func reply(rw http.ResponseWriter, ok bool, v map[string]any) {
	rw.Header().Set("Content-Type", "application/json")
	if !ok {
		rw.WriteHeader(http.StatusBadRequest)
	}
	_ = json.NewEncoder(rw).Encode(v)
}

// loopback is the way out that a gateway has to a server on its own machine.
var loopback = egress.Client(egress.Options{Loopback: true, Timeout: 5 * time.Second})

// machine has access of its own.
func (w *world) machine() *Client {
	w.t.Helper()
	return w.client(Options{Grant: ClientCredentials, ClientID: "gateway", ClientSecret: secret.New("s"), Issuer: w.as.URL})
}

func (w *world) client(o Options) *Client {
	w.t.Helper()
	o.Name, o.Server, o.HTTP, o.Login = "the server", w.rs.URL+"/mcp", loopback, "newel login"
	c, err := New(o)
	if err != nil {
		w.t.Fatal(err)
	}
	return c
}

// call sends one request through a client and returns the status, or the error.
func (w *world) call(c *Client) (int, error) {
	r, err := http.NewRequestWithContext(w.t.Context(), http.MethodPost, w.rs.URL+"/mcp", strings.NewReader("{}"))
	if err != nil {
		w.t.Fatal(err)
	}
	r.Header.Set("Authorization", "Bearer of-the-caller")
	resp, err := c.Transport(http.DefaultTransport).RoundTrip(r)
	if err != nil {
		return 0, err
	}
	if got := r.Header.Get("Authorization"); got != "Bearer of-the-caller" {
		w.t.Errorf("the request was changed: %s", got)
	}
	return resp.StatusCode, resp.Body.Close()
}

// login logs in through a client.
func (w *world) login(c *Client) error {
	w.t.Helper()
	f, err := c.Begin(w.t.Context(), "http://127.0.0.1:1/callback")
	if err != nil {
		return err
	}
	at, err := url.Parse(f.URL)
	if err != nil {
		w.t.Fatal(err)
	}
	_, err = f.Finish(w.t.Context(), url.Values{"code": {"c"}, "state": {at.Query().Get("state")}})
	return err
}

func TestMachine(t *testing.T) {
	w := start(t)
	c := w.machine()
	for range 3 {
		if status, err := w.call(c); status != http.StatusOK {
			t.Fatal(status, err)
		}
	}
	if len(w.requests) != 1 || w.requests[0].Get("resource") != w.rs.URL+"/mcp" || w.requests[0].Get("grant_type") != "client_credentials" {
		t.Errorf("the token endpoint was asked %v", w.requests)
	}
	if !slices.Equal(w.heard, []string{"", "Bearer token-1", "Bearer token-1", "Bearer token-1"}) {
		t.Errorf("the server heard %q", w.heard)
	}
}

// A server that takes no token is told so for a while, and its authorization server is left alone.
func TestRefusedTokensAreBounded(t *testing.T) {
	w := start(t)
	w.accepts = func(*http.Request) bool { return false }
	c := w.machine()
	for range 50 {
		if status, err := w.call(c); status == http.StatusOK {
			t.Fatal(status, err)
		}
	}
	if len(w.requests) > 2 {
		t.Errorf("%d tokens were asked for", len(w.requests))
	}
}

func TestRefusalIsRemembered(t *testing.T) {
	w := start(t)
	w.answers = func(url.Values) map[string]any {
		return map[string]any{"error": "invalid_client", "error_description": "a\nb\x1b[31m"}
	}
	c := w.machine()
	for range 20 {
		_, err := w.call(c)
		said, ok := errors.AsType[*call.Error](err)
		if !ok || said.Code != call.Unavailable || strings.Contains(said.Message, "invalid_client") || !strings.Contains(said.Error(), "invalid_client ab[31m") {
			t.Fatalf("%v", err)
		}
	}
	if len(w.requests) != 1 {
		t.Errorf("%d times it was asked", len(w.requests))
	}
}

func TestStepUp(t *testing.T) {
	w := start(t)
	w.wants = "a"
	granted := func() string { return w.requests[len(w.requests)-1].Get("scope") }
	w.accepts = func(r *http.Request) bool {
		return w.current != "" && r.Header.Get("Authorization") == "Bearer "+w.current && slices.Contains(strings.Fields(granted()), w.wants)
	}
	c := w.machine()
	for _, want := range []string{"a", "b", "b"} {
		w.wants = want
		if status, err := w.call(c); status != http.StatusOK {
			t.Fatal(want, status, err)
		}
	}
	if got := []string{w.requests[0].Get("scope"), w.requests[1].Get("scope")}; len(w.requests) != 2 || !slices.Equal(got, []string{"a", "a b"}) {
		t.Errorf("the scopes asked for are %q", got)
	}
	w.accepts = func(*http.Request) bool { return false }
	for range 5 {
		if _, err := w.call(c); err == nil || !strings.Contains(err.Error(), "needs the scopes b") {
			t.Errorf("what will not be given: %v", err)
		}
	}
	if len(w.requests) != 2 {
		t.Errorf("it was asked for again: %d requests", len(w.requests))
	}
	for i := range 100 { // a server that never has enough
		w.wants = fmt.Sprintf("s%d", i)
		_, _ = w.call(c) // refused in any case
	}
	if len(w.requests) > maxScopes+2 {
		t.Errorf("%d tokens for a server that always wants more", len(w.requests))
	}
}

func TestConfiguredScopesAreTheMost(t *testing.T) {
	w := start(t)
	w.wants = "admin"
	w.accepts = func(*http.Request) bool { return false }
	c := w.client(Options{Grant: ClientCredentials, ClientID: "g", ClientSecret: secret.New("s"), Issuer: w.as.URL, Scopes: []string{"read"}})
	if _, err := w.call(c); err == nil || !strings.Contains(err.Error(), "needs the scopes admin, and its configuration") {
		t.Error(err)
	}
	if len(w.requests) != 1 || w.requests[0].Get("scope") != "read" {
		t.Errorf("asked for %v", w.requests)
	}
}

// A refresh token works once: many calls at once renew an expired login once.
func TestRenewedOnce(t *testing.T) {
	w := start(t)
	w.lives = 1 // expired as soon as it is there
	c := w.client(Options{})
	if err := w.login(c); err != nil {
		t.Fatal(err)
	}
	w.lives = 3600
	var all sync.WaitGroup
	for range 30 {
		all.Go(func() {
			if status, err := w.call(c); status != http.StatusOK {
				t.Error(status, err)
			}
		})
	}
	all.Wait()
	if len(w.requests) != 2 || w.requests[1].Get("refresh_token") != "refresh-1" || w.requests[1].Get("resource") == "" || w.requests[1].Get("client_id") != "made at "+w.as.URL {
		t.Errorf("the token endpoint was asked %v", w.requests)
	}
}

// A caller who goes away takes no refresh token with him.
func TestRenewalSurvivesItsCaller(t *testing.T) {
	w := start(t)
	w.lives = 1
	c := w.client(Options{})
	if err := w.login(c); err != nil {
		t.Fatal(err)
	}
	ctx, leave := context.WithCancel(t.Context())
	w.lives = 3600
	w.answers = func(url.Values) map[string]any {
		leave()
		return map[string]any{"access_token": w.current, "token_type": "bearer", "expires_in": 3600, "refresh_token": "next"}
	}
	if got, err := c.Token(ctx); err != nil || got.Refresh.Reveal() != "next" {
		t.Fatal(got, err)
	}
	if status, err := w.call(c); status != http.StatusOK || len(w.requests) != 2 {
		t.Error(status, err, len(w.requests))
	}
}

func TestLoginIsAskedFor(t *testing.T) {
	w := start(t)
	file := filepath.Join(t.TempDir(), "logins", "x.json")
	gateway := w.client(Options{File: file})
	_, err := w.call(gateway)
	said, ok := errors.AsType[*call.Error](err)
	if !ok || said.Message != "the server needs a login: newel login" || said.Retryable {
		t.Fatalf("%+v", err)
	}
	if err := w.login(w.client(Options{File: file})); err != nil { // in another process
		t.Fatal(err)
	}
	if status, err := w.call(gateway); status != http.StatusOK {
		t.Error("the login is not noticed:", status, err)
	}
	info, err := os.Stat(file)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Error(info.Mode(), err)
	}
	if status, err := w.call(w.client(Options{File: file})); status != http.StatusOK {
		t.Error("after a restart:", status, err)
	}
	w.answers = func(url.Values) map[string]any { return map[string]any{"error": "invalid_grant"} }
	w.current = "another"
	old := w.client(Options{File: file})
	old.state.Since = time.Now().Add(-time.Hour)
	for range 3 {
		if _, err := w.call(old); err == nil || !strings.Contains(err.Error(), "newel login") {
			t.Error("a login that was taken back:", err)
		}
	}
	if len(w.requests) != 2 {
		t.Errorf("its refresh token was used %d times", len(w.requests)-1)
	}
}

func TestFileOfLogin(t *testing.T) {
	w := start(t)
	for name, f := range map[string]struct {
		content string
		mode    os.FileMode
		want    string
	}{
		"readable":       {`{}`, 0o644, "others may read it"},
		"damaged":        {`{`, 0o600, "is damaged"},
		"another server": {`{"server":"https://other.example"}`, 0o600, "is of the server"},
		"no key":         {`{"server":"` + w.rs.URL + `/mcp","key":"AAAA"}`, 0o600, "is damaged"},
	} {
		file := filepath.Join(t.TempDir(), "x.json")
		if err := os.WriteFile(file, []byte(f.content), f.mode); err != nil {
			t.Fatal(err)
		}
		_, err := New(Options{Server: w.rs.URL + "/mcp", File: file, HTTP: loopback})
		if err == nil || !strings.Contains(err.Error(), f.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// What metadata says is held against where it comes from. Nothing is sent on to what is refused.
func TestMetadataIsChecked(t *testing.T) {
	for name, tt := range map[string]struct {
		change func(w *world)
		want   string
	}{
		"another resource":  {func(w *world) { w.resource["resource"] = "https://evil.example/mcp" }, "is the metadata of"},
		"path below":        {func(w *world) { w.resource["resource"] = w.rs.URL + "/mcp/other" }, "is the metadata of"},
		"half a segment":    {func(w *world) { w.resource["resource"] = w.rs.URL + "/m" }, "is the metadata of"},
		"user in resource":  {func(w *world) { w.resource["resource"] = strings.Replace(w.rs.URL, "//", "//a:b@", 1) + "/mcp" }, "is the metadata of"},
		"no server":         {func(w *world) { w.resource["authorization_servers"] = []string{} }, "names 0 authorization servers"},
		"plain http":        {func(w *world) { w.resource["authorization_servers"] = []string{"http://as.example"} }, "not https"},
		"metadata service":  {func(w *world) { w.resource["authorization_servers"] = []string{"https://169.254.169.254"} }, "may not be reached"},
		"private":           {func(w *world) { w.resource["authorization_servers"] = []string{"https://10.0.0.1"} }, "may not be reached"},
		"query":             {func(w *world) { w.resource["authorization_servers"] = []string{w.as.URL + "?a=b"} }, "no valid address"},
		"another issuer":    {func(w *world) { w.metadata["issuer"] = "https://evil.example" }, "is of the issuer"},
		"issuer with slash": {func(w *world) { w.metadata["issuer"] = w.as.URL + "/" }, "is of the issuer"},
		"token over http":   {func(w *world) { w.metadata["token_endpoint"] = "http://as.example/token" }, "no token endpoint over https"},
		"script":            {func(w *world) { w.metadata["authorization_endpoint"] = "javascript:alert(1)" }, "not https"},
		"no PKCE":           {func(w *world) { delete(w.metadata, "code_challenge_methods_supported") }, "PKCE"},
		"plain PKCE":        {func(w *world) { w.metadata["code_challenge_methods_supported"] = []string{"plain"} }, "PKCE"},
		"nobody logs in":    {func(w *world) { delete(w.metadata, "authorization_endpoint") }, "logs nobody in"},
		"no registration":   {func(w *world) { delete(w.metadata, "registration_endpoint") }, "registers no clients"},
		"no metadata":       {func(w *world) { w.metadata = nil }, "has no metadata"},
		"no resource":       {func(w *world) { w.resource = nil }, "does not say who gives access"},
		"large":             {func(w *world) { w.metadata["x"] = strings.Repeat("x", maxDocument) }, "more than"},
		"no token": {func(w *world) {
			w.answers = func(url.Values) map[string]any { return map[string]any{"token_type": "Bearer"} }
		}, "no token that can be sent"},
		"header in a token": {func(w *world) {
			w.answers = func(url.Values) map[string]any {
				return map[string]any{"access_token": "a\r\nX: y", "token_type": "Bearer"}
			}
		}, "no token that can be sent"},
		"another type": {func(w *world) {
			w.answers = func(url.Values) map[string]any { return map[string]any{"access_token": "a", "token_type": "mac"} }
		}, "of type \"mac\""},
		"unknown method": {func(w *world) { w.metadata["token_endpoint_auth_methods_supported"] = []string{"tls_client_auth"} }, ""},
	} {
		t.Run(name, func(t *testing.T) {
			w := start(t)
			tt.change(w)
			err := w.login(w.client(Options{}))
			if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
			if err != nil && w.calls > 0 {
				t.Error("the server was called")
			}
		})
	}
}

// A secret goes to the authorization server it is of, whatever the server behind says.
func TestSecretStaysWithItsIssuer(t *testing.T) {
	w, evil := start(t), start(t)
	c := w.machine()
	w.resource["authorization_servers"] = []string{evil.as.URL}
	if _, err := w.call(c); err == nil || !strings.Contains(err.Error(), "the configured client is of") {
		t.Error(err)
	}
	if len(evil.requests) != 0 {
		t.Error("the secret was sent to a stranger")
	}
}

// What was registered at one authorization server is not used at the next.
func TestMigration(t *testing.T) {
	w, next := start(t), start(t)
	file := filepath.Join(t.TempDir(), "x.json")
	if err := w.login(w.client(Options{File: file})); err != nil {
		t.Fatal(err)
	}
	w.resource["authorization_servers"] = []string{next.as.URL}
	w.accepts = func(r *http.Request) bool { return r.Header.Get("Authorization") == "Bearer "+next.current }
	c := w.client(Options{File: file})
	c.state.Since = time.Now().Add(-time.Hour)
	if _, err := w.call(c); err == nil || !strings.Contains(err.Error(), "has another authorization server now") {
		t.Error(err)
	}
	if len(w.requests) != 1 || len(next.requests) != 0 {
		t.Error("a refresh token went somewhere")
	}
	if err := w.login(w.client(Options{File: file})); err != nil || next.requests[0].Get("code") == "" || next.requests[0].Get("client_id") != "made at "+next.as.URL {
		t.Fatal(err, next.requests)
	}
	if status, err := w.call(c); status != http.StatusOK {
		t.Error(status, err)
	}
}

func TestTokenStaysAtItsOrigin(t *testing.T) {
	w, other := start(t), start(t)
	c := w.machine()
	if status, err := w.call(c); status != http.StatusOK {
		t.Fatal(status, err)
	}
	r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, other.rs.URL+"/mcp", nil)
	if err != nil {
		t.Fatal(err)
	}
	if resp, err := c.Transport(http.DefaultTransport).RoundTrip(r); err == nil {
		resp.Body.Close()
		t.Error("it went to another origin")
	}
	if len(other.heard) != 0 {
		t.Errorf("it heard %q", other.heard)
	}
}

func TestAnswersOfALogin(t *testing.T) {
	for name, tt := range map[string]struct {
		says bool // metadata: iss is always there
		q    url.Values
		want string
	}{
		"good":               {true, url.Values{"code": {"c"}, "iss": {"ISSUER"}}, ""},
		"iss missing":        {true, url.Values{"code": {"c"}}, "is of the issuer"},
		"iss empty":          {false, url.Values{"code": {"c"}, "iss": {""}}, "is of the issuer"},
		"iss of another":     {false, url.Values{"code": {"c"}, "iss": {"https://evil.example"}}, "is of the issuer"},
		"iss slash":          {true, url.Values{"code": {"c"}, "iss": {"ISSUER/"}}, "is of the issuer"},
		"error of another":   {true, url.Values{"error": {"x"}, "iss": {"https://evil.example"}}, "is of the issuer"},
		"error":              {true, url.Values{"error": {"access_denied"}, "iss": {"ISSUER"}}, "access_denied"},
		"state of another":   {false, url.Values{"code": {"c"}, "state": {"other"}}, "does not belong"},
		"nothing that helps": {false, url.Values{}, "no code"},
	} {
		t.Run(name, func(t *testing.T) {
			w := start(t)
			w.metadata["authorization_response_iss_parameter_supported"] = tt.says
			f, err := w.client(Options{}).Begin(t.Context(), "http://127.0.0.1:1/callback")
			if err != nil {
				t.Fatal(err)
			}
			if !tt.q.Has("state") {
				tt.q.Set("state", f.state)
			}
			if strings.HasPrefix(tt.q.Get("iss"), "ISSUER") {
				tt.q.Set("iss", strings.Replace(tt.q.Get("iss"), "ISSUER", w.as.URL, 1))
			}
			_, err = f.Finish(t.Context(), tt.q)
			if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
			if err != nil && len(w.requests) > 0 {
				t.Error("the code was used")
			}
		})
	}
}

// A server that wants bound tokens gets no other.
func TestNoDowngrade(t *testing.T) {
	w := start(t)
	w.resource["dpop_bound_access_tokens_required"] = true
	if err := w.login(w.client(Options{})); err == nil || !strings.Contains(err.Error(), "bound to a key") {
		t.Error(err)
	}
	w.metadata["dpop_signing_alg_values_supported"] = []string{"ES256"}
	if err := w.login(w.client(Options{})); err == nil || !strings.Contains(err.Error(), "not DPoP") {
		t.Error(err)
	}
}

func TestOptions(t *testing.T) {
	for name, tt := range map[string]struct {
		o    Options
		want string
	}{
		"plain http":          {Options{Server: "http://mcp.example/mcp"}, "not an https address"},
		"password":            {Options{Server: "https://a:b@mcp.example/mcp"}, "not an https address"},
		"secret for nobody":   {Options{Server: "https://mcp.example", ClientID: "a", ClientSecret: secret.New("s")}, "write its issuer"},
		"no id":               {Options{Server: "https://mcp.example", Grant: ClientCredentials}, "id of the client"},
		"no credential":       {Options{Server: "https://mcp.example", Grant: ClientCredentials, ClientID: "a"}, "a secret or a private key"},
		"no assertion":        {Options{Server: "https://mcp.example", Grant: Workload, ClientID: "a", Issuer: "https://as.example"}, "says who asks"},
		"document over http":  {Options{Server: "https://mcp.example", Document: "http://a.example/x"}, "https address of a document"},
		"document of nothing": {Options{Server: "https://mcp.example", Document: "https://a.example/"}, "https address of a document"},
		"two scopes in one":   {Options{Server: "https://mcp.example", Scopes: []string{"a b"}}, "a scope must not"},
		"no provider": {Options{Server: "https://mcp.example", Grant: Enterprise, ClientID: "a", Issuer: "https://as.example",
			Assertion: func() (secret.String, error) { return secret.String{}, nil }}, "identity provider"},
	} {
		if _, err := New(tt.o); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestChallenges(t *testing.T) {
	for _, tt := range []struct {
		header []string
		want   challenge
	}{
		{nil, challenge{}},
		{[]string{`Bearer`}, challenge{}},
		{[]string{`bearer scope="a b", error="insufficient_scope", resource_metadata="https://x/y"`}, challenge{metadata: "https://x/y", scopes: []string{"a", "b"}, problem: "insufficient_scope"}},
		{[]string{`Basic realm="scope=\"no\"", Bearer scope=a`}, challenge{scopes: []string{"a"}}},
		{[]string{`Negotiate abc==, Bearer error=invalid_token`}, challenge{problem: "invalid_token"}},
		{[]string{`DPoP algs="ES256", error="use_dpop_nonce"`}, challenge{dpop: true, problem: "use_dpop_nonce"}},
		{[]string{`DPoP algs="ES256"`, `Bearer scope="a"`}, challenge{scopes: []string{"a"}}},
		{[]string{`Bearer scope="a \"b c\\d e"`}, challenge{scopes: []string{"a", "e"}}},
		{[]string{`Bearer scope="a`, `=x`, `"`, `,,,`}, challenge{scopes: []string{"a"}}},
		{[]string{`Bearer scope="` + strings.Repeat("x", maxScope+1) + ` y"`}, challenge{scopes: []string{"y"}}},
		{[]string{`Bearer scope="` + strings.Repeat("x", maxHeader) + `"`}, challenge{}},
	} {
		got := challengeOf(http.Header{"Www-Authenticate": tt.header})
		if got.dpop != tt.want.dpop || got.metadata != tt.want.metadata || got.problem != tt.want.problem || !slices.Equal(got.scopes, tt.want.scopes) {
			t.Errorf("%.100q: got %+v, want %+v", tt.header, got, tt.want)
		}
	}
}

func FuzzChallenge(f *testing.F) {
	f.Add(`Bearer scope="a b", error="insufficient_scope"`)
	f.Add(`DPoP algs="ES256", Basic abc==,=`)
	f.Fuzz(func(t *testing.T, s string) {
		c := challengeOf(http.Header{"Www-Authenticate": {s, s}})
		if len(c.scopes) > maxScopes || len(c.metadata) > maxHeader {
			t.Errorf("%+v", c)
		}
		for _, scope := range c.scopes {
			if len(valid([]string{scope})) == 0 {
				t.Errorf("%q is no scope", scope)
			}
		}
	})
}

// Redirects of an authorization server are not followed: they would take secrets along.
func TestNoRedirects(t *testing.T) {
	w := start(t)
	var hits int
	trap := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { hits++ }))
	defer trap.Close()
	w.metadata["token_endpoint"] = w.as.URL + "/moved"
	inner := w.as.Config.Handler
	w.as.Config.Handler = http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/moved" {
			http.Redirect(rw, r, trap.URL, http.StatusTemporaryRedirect)
			return
		}
		inner.ServeHTTP(rw, r)
	})
	if _, err := w.call(w.machine()); err == nil || hits != 0 {
		t.Error(err, hits)
	}
}
