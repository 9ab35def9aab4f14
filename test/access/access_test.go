// Package access holds tests of who may call what, over real HTTP with real tokens.
package access

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"testing"

	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/assembly"
	"newel.dev/newel/internal/identity/devserver"
	"newel.dev/newel/internal/identity/exchange"
	"newel.dev/newel/internal/identity/verify"
	"newel.dev/newel/internal/policy"
	"newel.dev/newel/test/program"
)

// world is a server with the authorization server for development beside it.
type world struct {
	t    *testing.T
	base string

	process *program.Process // of a server in a process of its own
}

type tools []*call.Capability

// Name implements call.Backend.
func (tools) Name() string { return "tools" }

// Capabilities implements call.Backend.
func (b tools) Capabilities(context.Context) ([]*call.Capability, error) { return b, nil }

func tool(name string, effect call.Effect, scopes ...string) *call.Capability {
	return &call.Capability{
		Kind: call.Tool, Name: name, Description: "D.", Effect: effect, Scopes: scopes, Origin: name,
		Input: jsontext.Value(`{"type":"object","properties":{"n":{"type":"integer"}},"additionalProperties":false}`),
		Run: func(_ context.Context, c *call.Call) (*call.Result, error) {
			who := "nobody"
			if c.Principal != nil {
				who = c.Principal.ID[strings.LastIndex(c.Principal.ID, "#")+1:] + "@" + c.Principal.Tenant
			}
			return call.Text(name + " for " + who), nil
		},
	}
}

func start(t *testing.T, rules ...policy.Rule) *world {
	t.Helper()
	return startWith(t, nil, rules...)
}

// startWith starts a server that takes tokens of further issuers too.
func startWith(t *testing.T, further []verify.Issuer, rules ...policy.Rule) *world {
	t.Helper()
	return startSet(t, further, policy.Set{Rules: rules})
}

// startSet starts a server with a whole policy.
func startSet(t *testing.T, further []verify.Issuer, set policy.Set, servers ...assembly.Server) *world {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	base := "http://" + l.Addr().String()
	dev, err := devserver.New(devserver.Options{
		Issuer: base, Resources: []string{base + "/mcp"}, Scopes: []string{"a:read", "a:admin"},
		Users: []devserver.User{
			{Name: "alice", Tenant: "acme", Scopes: []string{"*"}, Roles: []string{"admin"}},
			{Name: "bob", Tenant: "acme", Scopes: []string{"a:read"}, Roles: []string{"reader"}},
			{Name: "eve", Tenant: "other", Scopes: []string{"*"}, Roles: []string{"reader"}},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	resources, tenants := []string{base + "/mcp"}, map[string]string{}
	for _, s := range servers {
		resources = append(resources, s.Resource(base))
		tenants[s.Resource(base)] = s.Tenant
	}
	tokens, err := verify.New(verify.Options{Resource: base + "/mcp", Tenants: tenants, Issuers: append(further, verify.Issuer{URL: base, TenantClaim: "tenant", Audiences: resources})})
	if err != nil {
		t.Fatal(err)
	}
	p := compiled(t, set)
	h, err := assembly.Build(t.Context(), &assembly.Options{
		Name: "access", Logger: slog.New(slog.DiscardHandler), Identity: &assembly.Identities{Tokens: tokens}, Login: dev.Handler(), Policy: p, Servers: servers,
		Access:   &assembly.Access{Resource: base + "/mcp", Issuers: []string{base}, Scopes: []string{"a:read"}, Nonce: tokens.Nonce},
		Backends: []call.Backend{tools{tool("open", call.Read), tool("read", call.Read, "a:read"), tool("admin", call.Write, "a:read", "a:admin")}},
	})
	if err != nil {
		t.Fatal(err)
	}
	serve(t, l, h)
	return &world{t: t, base: base}
}

// compiled is a policy without mistakes.
func compiled(t *testing.T, set policy.Set) *policy.Policy {
	t.Helper()
	p, problems := policy.Compile(set)
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	return p
}

// serve serves h at l until the test ends or stop is called.
func serve(t *testing.T, l net.Listener, h *assembly.House) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- h.Serve(ctx, l) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil && !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
	t.Cleanup(stop)
	return stop
}

// still does not follow redirects.
var still = &http.Client{CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}

// login goes the way of a login at the authorization server for development.
func login(t *testing.T, c *exchange.Client, user string) *exchange.Token {
	t.Helper()
	f, err := c.Begin(t.Context(), "http://127.0.0.1:1/callback")
	if err != nil {
		t.Fatal(err)
	}
	resp, err := still.PostForm(f.URL, url.Values{"user": {user}})
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	to, err := resp.Location()
	if err != nil {
		t.Fatal(err)
	}
	tok, err := f.Finish(t.Context(), to.Query())
	if err != nil {
		t.Fatal(err)
	}
	return tok
}

// token logs a user in, the whole way.
func (w *world) token(user string, scopes ...string) string {
	w.t.Helper()
	c, err := exchange.New(exchange.Options{Server: w.base + "/mcp", Scopes: scopes, HTTP: http.DefaultClient})
	if err != nil {
		w.t.Fatal(err)
	}
	return login(w.t, c, user).Access.Reveal()
}

type response struct {
	status    int
	challenge string
	session   string
	body      string
	nonce     string // for the next proof
	retry     string // Retry-After
}

// send posts a message; more are headers.
func (w *world) send(token, body string, more ...string) response {
	w.t.Helper()
	r, err := http.NewRequestWithContext(w.t.Context(), http.MethodPost, w.base+"/mcp", strings.NewReader(body))
	if err != nil {
		w.t.Fatal(err)
	}
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set("Accept", "application/json, text/event-stream")
	if token != "" {
		r.Header.Set("Authorization", "Bearer "+token)
	}
	for i := 0; i < len(more); i += 2 {
		if more[i] == "Host" {
			r.Host = more[i+1]
		}
		r.Header.Set(more[i], more[i+1])
	}
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		w.t.Fatal(err)
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(resp.Body)
	if err != nil {
		w.t.Fatal(err)
	}
	return response{resp.StatusCode, resp.Header.Get("WWW-Authenticate"), resp.Header.Get("Mcp-Session-Id"), string(raw), resp.Header.Get("DPoP-Nonce"), resp.Header.Get("Retry-After")}
}

const meta = `"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28","io.modelcontextprotocol/clientCapabilities":{}}`

func (w *world) stateless(token, method, name, args string) response {
	params := meta
	if name != "" {
		params = fmt.Sprintf(`"name":%q,"arguments":%s,%s`, name, args, meta)
	}
	headers := []string{"Mcp-Protocol-Version", "2026-07-28", "Mcp-Method", method}
	if name != "" {
		headers = append(headers, "Mcp-Name", name)
	}
	return w.send(token, fmt.Sprintf(`{"jsonrpc":"2.0","id":1,"method":%q,"params":{%s}}`, method, params), headers...)
}

// session opens a session and returns how to call tools in it.
func (w *world) session(token string) (string, func(token, name string) response) {
	w.t.Helper()
	r := w.send(token, `{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":"2025-11-25","capabilities":{},"clientInfo":{"name":"t","version":"1"}}}`)
	if r.status != http.StatusOK || r.session == "" {
		w.t.Fatalf("initialize: %+v", r)
	}
	in := []string{"Mcp-Session-Id", r.session, "Mcp-Protocol-Version", "2025-11-25"}
	w.send(token, `{"jsonrpc":"2.0","method":"notifications/initialized"}`, in...)
	id := 1
	return r.session, func(token, name string) response {
		id++
		return w.send(token, fmt.Sprintf(`{"jsonrpc":"2.0","id":%d,"method":"tools/call","params":{"name":%q,"arguments":{}}}`, id, name), in...)
	}
}

// Every route but those of health and login asks who is calling.
func TestNothingWithoutToken(t *testing.T) {
	w := start(t)
	for name, r := range map[string]response{
		"stateless call":     w.stateless("", "tools/call", "open", "{}"),
		"stateless list":     w.stateless("", "tools/list", "", ""),
		"stateless discover": w.stateless("", "server/discover", "", ""),
		"initialize":         w.send("", `{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":"2025-11-25","capabilities":{},"clientInfo":{"name":"t","version":"1"}}}`),
		"garbage token":      w.stateless("garbage", "tools/call", "open", "{}"),
		"session call":       w.send("garbage", `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"open"}}`, "Mcp-Session-Id", "x"),
	} {
		if r.status != http.StatusUnauthorized || !strings.Contains(r.challenge, `resource_metadata="`+w.base+`/.well-known/oauth-protected-resource/mcp"`) || !strings.Contains(r.challenge, `scope="a:read"`) {
			t.Errorf("%s: %+v", name, r)
		}
		if strings.Contains(name, "garbage") != strings.Contains(r.challenge, `error="invalid_token"`) && name != "session call" {
			t.Errorf("%s: the challenge is %s", name, r.challenge)
		}
		if strings.Contains(r.body, "JWT") || strings.Contains(r.body, "signature") {
			t.Errorf("%s: it says why: %s", name, r.body)
		}
	}
	for _, method := range []string{http.MethodGet, http.MethodDelete} {
		r, err := http.NewRequestWithContext(t.Context(), method, w.base+"/mcp", nil)
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("Mcp-Session-Id", "x")
		r.Header.Set("X-Newel-User", "somebody") // what only the house says of itself
		resp, err := http.DefaultClient.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusUnauthorized {
			t.Errorf("%s: %d", method, resp.StatusCode)
		}
	}
}

// A missing scope is answered with 403 and its name, in both eras, before anything runs; with a
// token that has it the call goes through.
func TestStepUp(t *testing.T) {
	w := start(t)
	weak := w.token("alice", "a:read")
	_, callTool := w.session(weak)
	for era, r := range map[string]response{"stateless": w.stateless(weak, "tools/call", "admin", "{}"), "sessions": callTool(weak, "admin")} {
		if r.status != http.StatusForbidden || !strings.Contains(r.challenge, `error="insufficient_scope"`) || !strings.Contains(r.challenge, `scope="a:read a:admin"`) || !strings.Contains(r.challenge, "resource_metadata=") {
			t.Errorf("%s: %+v", era, r)
		}
	}
	strong := w.token("alice", "a:read", "a:admin")
	if r := w.stateless(strong, "tools/call", "admin", "{}"); r.status != http.StatusOK || !strings.Contains(r.body, "admin for alice@acme") {
		t.Errorf("%+v", r)
	}
	if r := callTool(strong, "admin"); r.status != http.StatusOK || !strings.Contains(r.body, "admin for alice@acme") {
		t.Errorf("in the session: %+v", r) // the same user, a better token
	}
}

// Lists show what their caller may use, and no more.
func TestListsShowWhatMayBeUsed(t *testing.T) {
	w := start(t)
	for user, want := range map[string]string{"alice": "admin open read", "bob": "open read"} {
		var list struct {
			Result struct{ Tools []struct{ Name string } }
		}
		r := w.stateless(w.token(user, "a:read", "a:admin"), "tools/list", "", "")
		if err := json.Unmarshal([]byte(r.body), &list); err != nil {
			t.Fatal(err)
		}
		var names []string
		for _, tool := range list.Result.Tools {
			names = append(names, tool.Name)
		}
		if got := strings.Join(names, " "); got != want {
			t.Errorf("%s sees %s, want %s", user, got, want)
		}
		if !strings.Contains(r.body, `"cacheScope":"private"`) {
			t.Errorf("a list of one caller may be shared: %s", r.body)
		}
	}
}

// A session is its user's alone.
func TestSessionsBelongToTheirUser(t *testing.T) {
	w := start(t)
	alice := w.token("alice")
	_, callTool := w.session(alice)
	if r := callTool(alice, "open"); r.status != http.StatusOK || !strings.Contains(r.body, "open for alice@acme") {
		t.Fatalf("%+v", r)
	}
	for _, other := range []string{"bob", "eve"} {
		if r := callTool(w.token(other), "open"); r.status != http.StatusForbidden || strings.Contains(r.body, "open for") {
			t.Errorf("%s in alice's session: %+v", other, r)
		}
	}
}

// What the policy hides looks in every way as if it were not there.
func TestHiddenLooksAbsent(t *testing.T) {
	w := start(t, policy.Rule{Name: "reads", Then: "allow", Effects: []string{"read"}},
		policy.Rule{Name: "admins", Then: "allow", Tools: []string{"admin"}, Roles: []string{"admin"}},
		policy.Rule{Name: "acme only", Then: "deny", Tools: []string{"open"}, When: "principal.tenant != 'acme'"},
		policy.Rule{Name: "small numbers", Then: "deny", Tools: []string{"read"}, When: "has(args.n) && args.n > 10", Reason: "n is too large"})
	eve := w.token("eve", "a:read", "a:admin")
	for _, tool := range []string{"open", "admin"} {
		for _, args := range []string{"{}", `{"n":"of the wrong type"}`} {
			hidden, absent := w.stateless(eve, "tools/call", tool, args), w.stateless(eve, "tools/call", strings.Repeat("x", len(tool)), args)
			if got := strings.ReplaceAll(hidden.body, tool, strings.Repeat("x", len(tool))); hidden.status != absent.status || got != absent.body {
				t.Errorf("%s %s: %d %s\nabsent: %d %s", tool, args, hidden.status, hidden.body, absent.status, absent.body)
			}
		}
	}
	alice := w.token("alice", "a:read", "a:admin")
	if r := w.stateless(alice, "tools/call", "read", `{"n":5}`); !strings.Contains(r.body, "read for alice") {
		t.Errorf("%+v", r)
	}
	r := w.stateless(alice, "tools/call", "read", `{"n":50}`)
	if r.status != http.StatusOK || !strings.Contains(r.body, `"code":-31403`) || !strings.Contains(r.body, "n is too large") || !strings.Contains(r.body, `"decision":"`) {
		t.Errorf("a denial: %+v", r)
	}
}

// Tokens of another audience, from another server or changed, open nothing.
func TestForeignTokens(t *testing.T) {
	a, b := start(t), start(t)
	token := a.token("alice")
	if r := b.stateless(token, "tools/call", "open", "{}"); r.status != http.StatusUnauthorized {
		t.Errorf("another server's token: %+v", r)
	}
	changed := []byte(token)
	if at := len(changed) - 10; changed[at] == 'A' { // in the signature, and certainly another one
		changed[at] = 'B'
	} else {
		changed[at] = 'A'
	}
	if r := a.stateless(string(changed), "tools/call", "open", "{}"); r.status != http.StatusUnauthorized {
		t.Errorf("a changed token: %+v", r)
	}
}

// While an issuer cannot be asked, nobody is told that their token is bad: they are to come back.
func TestIssuerAway(t *testing.T) {
	is := newBoundIssuer(t)
	w := startWith(t, []verify.Issuer{{URL: is.url, JWKS: is.url + "/jwks-is-not-here"}})
	h := is.hold(w)
	for name, r := range map[string]response{
		"stateless": w.stateless(h.token, "tools/call", "open", "{}"),
		"list":      w.stateless(h.token, "tools/list", "", ""),
		"session":   w.send(h.token, `{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":"2025-11-25","capabilities":{},"clientInfo":{"name":"t","version":"1"}}}`),
	} {
		if r.status != http.StatusServiceUnavailable || r.retry == "" || r.challenge != "" || !strings.Contains(r.body, `"retryable":true`) {
			t.Errorf("%s: %+v", name, r)
		}
	}
}
