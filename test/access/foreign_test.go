package access

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"
	"unicode"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/assembly"
	"newel.dev/newel/internal/catalog"
	"newel.dev/newel/internal/identity/verify"
	"newel.dev/newel/internal/policy"
)

// askName asks who is there, and says what it was told.
func askName() *call.Capability {
	c := tool("ask", call.Read)
	c.Run = func(ctx context.Context, c *call.Call) (*call.Result, error) {
		a, err := c.Asker.Ask(ctx, call.Question{Key: "name", Method: call.MethodElicit, Params: jsontext.Value(`{"mode":"form","message":"name?"}`)})
		if err != nil {
			return nil, err
		}
		return call.Text("told " + string(a["name"])), nil
	}
	return c
}

// big has a result that is kept as an artifact of its caller.
func big() *call.Capability {
	c := tool("big", call.Read)
	c.Run = func(_ context.Context, c *call.Call) (*call.Result, error) {
		return call.Text("of " + fmt.Sprintf("%q %q", c.Principal.Tenant, c.Principal.ID) + strings.Repeat(" and more", 1000)), nil
	}
	return c
}

// startShared starts a server for the tenants that an issuer names.
func startShared(t *testing.T, is *boundIssuer, set policy.Set, caps ...*call.Capability) *world {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	base := "http://" + l.Addr().String()
	tokens, err := verify.New(verify.Options{Resource: base + "/mcp", Issuers: []verify.Issuer{{URL: is.url, JWKS: is.url + "/jwks", TenantClaim: "tenant"}}})
	if err != nil {
		t.Fatal(err)
	}
	p := compiled(t, set)
	h, err := assembly.Build(t.Context(), &assembly.Options{
		Name: "shared", Logger: slog.New(slog.DiscardHandler), Identity: &assembly.Identities{Tokens: tokens}, Policy: p,
		Access: &assembly.Access{Resource: base + "/mcp", Issuers: []string{is.url}}, Backends: []call.Backend{tools(caps)},
		Servers: []assembly.Server{{Path: "/mcp/found/mcp", Search: "on"}}, Limits: assembly.Limits{ResultBytes: 1 << 10},
	})
	if err != nil {
		t.Fatal(err)
	}
	serve(t, l, h)
	return &world{t: t, base: base}
}

// person is somebody of a tenant.
type person struct{ tenant, subject string }

func (is *boundIssuer) tokenOf(w *world, p person) string {
	is.t.Helper()
	now := time.Now().Unix()
	return sign(is.t, is.key, (&jose.SignerOptions{}).WithType("at+jwt"), map[string]any{
		"iss": is.url, "sub": p.subject, "tenant": p.tenant, "aud": w.base + "/mcp", "exp": now + 300, "iat": now, "jti": "t", "client_id": "c",
	})
}

// asking calls the tool that asks, with what its caller brings of an earlier round.
func (w *world) asking(token, more string) response {
	w.t.Helper()
	able := strings.Replace(meta, `Capabilities":{}`, `Capabilities":{"elicitation":{"form":{}}}`, 1)
	return w.send(token, `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"ask","arguments":{},`+more+able+`}}`,
		"Mcp-Protocol-Version", "2026-07-28", "Mcp-Method", "tools/call", "Mcp-Name", "ask")
}

// resource reads a resource.
func (w *world) resource(token, uri string) response {
	w.t.Helper()
	return w.send(token, fmt.Sprintf(`{"jsonrpc":"2.0","id":1,"method":"resources/read","params":{"uri":%q,%s}}`, uri, meta),
		"Mcp-Protocol-Version", "2026-07-28", "Mcp-Method", "resources/read", "Mcp-Name", uri)
}

// Names are put together from what could move the border between a tenant and a subject.
func (is *boundIssuer) name(random *rand.Rand) string {
	parts := []string{"a", "b", " ", `"`, `\`, "#", ":", "1:", "\x00", "\n", "é", `""`, is.url + "#"}
	name := ""
	for range 1 + random.IntN(3) {
		name += parts[random.IntN(len(parts))]
	}
	return name
}

// people returns somebody, and somebody of another tenant who resembles them.
func (is *boundIssuer) people(random *rand.Rand) (person, person) {
	owner := person{is.name(random), is.name(random)}
	other := person{is.name(random), is.name(random)}
	switch random.IntN(3) {
	case 0: // the same name at the same issuer
		other.subject = owner.subject
	case 1: // written in one line they are the same
		between := []string{" ", "", `""`, "\x00", "/"}[random.IntN(5)]
		owner.subject = "x" + between + is.url + "#" + other.subject
		other.tenant = owner.tenant + between + is.url + "#x"
	}
	if other.tenant == owner.tenant {
		other.tenant += "x"
	}
	return owner, other
}

// Nothing that a caller was given is of any use to somebody of another tenant: sessions, states of
// calls that ask, artifacts.
func TestIDsOfAnotherTenant(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	is := newBoundIssuer(t)
	w := startShared(t, is, policy.Set{}, tool("open", call.Read), askName(), big())
	for range 60 {
		one, two := is.people(random)
		owner, other := is.tokenOf(w, one), is.tokenOf(w, two)
		fail := func(what string, r response) {
			t.Helper()
			t.Errorf("%s: %+v\nof %q, by %q", what, r, one, two)
		}

		session, callTool := w.session(owner)
		if r := callTool(other, "open"); r.status != http.StatusForbidden && r.status != http.StatusNotFound || strings.Contains(r.body, "open for") {
			fail("a call in the session", r)
		}
		for _, method := range []string{http.MethodGet, http.MethodDelete} {
			if r := w.bare(method, other, session); r.status != http.StatusForbidden && r.status != http.StatusNotFound {
				fail(method+" of the session", r)
			}
		}
		if r := callTool(owner, "open"); r.status != http.StatusOK || !strings.Contains(r.body, "open for") {
			fail("the owner, afterwards, in the session", r)
		}

		var asked struct {
			Result struct {
				State string `json:"requestState"`
			}
		}
		r := w.asking(owner, "")
		if err := json.Unmarshal([]byte(r.body), &asked); err != nil || asked.Result.State == "" {
			t.Fatalf("%v: %+v", err, r)
		}
		state := asked.Result.State
		back := func(state string) string {
			return fmt.Sprintf(`"requestState":%q,"inputResponses":{"name":{"action":"accept","content":{"name":"Ada"}}},`, state)
		}
		if r := w.asking(other, back(state)); !strings.Contains(r.body, `"code":-32602`) || strings.Contains(r.body, "told") {
			fail("the state of a call", r)
		}
		i := random.IntN(len(state))
		changed := state[:i] + string("AB"[(strings.IndexByte("A", state[i])+2)%2]) + state[i+1:]
		if r := w.asking(owner, back(changed)); changed != state && !strings.Contains(r.body, `"code":-32602`) {
			fail("a changed state", r)
		}
		if r := w.asking(owner, back(state)); !strings.Contains(r.body, "Ada") {
			fail("the owner's answer", r)
		}

		r = w.stateless(owner, "tools/call", "big", "{}")
		_, rest, _ := strings.Cut(r.body, "artifact://")
		id := rest[:max(0, strings.IndexFunc(rest, func(c rune) bool { return !unicode.IsUpper(c) && !unicode.IsDigit(c) }))]
		if id == "" {
			t.Fatalf("there is no artifact: %+v", r)
		}
		if r := w.resource(owner, "artifact://"+id); !strings.Contains(r.body, "and more") {
			fail("the owner's artifact", r)
		}
		invented := strings.Repeat("A", len(id))
		for _, form := range []string{"artifact://%s", "artifact://%s?offset=0", "artifact://%s?offset=0&length=10", "artifact://%s?offset=99999999"} {
			got, absent := w.resource(other, fmt.Sprintf(form, id)), w.resource(other, fmt.Sprintf(form, invented))
			if got.status != absent.status || strings.ReplaceAll(got.body, id, invented) != absent.body || strings.Contains(got.body, "and more") {
				fail(fmt.Sprintf(form, "the artifact"), got)
			}
		}
		if t.Failed() {
			return // one is enough
		}
	}
}

// A call that asks goes on where callers find tools by search, too: there another call runs in place
// of the one that came.
func TestAskingThroughSearch(t *testing.T) {
	is := newBoundIssuer(t)
	w := startShared(t, is, policy.Set{}, askName())
	ada, eve := is.tokenOf(w, person{"acme", "ada"}), is.tokenOf(w, person{"other", "ada"})
	w.base += "/mcp/found"
	able := strings.Replace(meta, `Capabilities":{}`, `Capabilities":{"elicitation":{"form":{}}}`, 1)
	ask := func(token, more string) response {
		return w.send(token, `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"call_tool","arguments":{"name":"ask","arguments":{}},`+more+able+`}}`,
			"Mcp-Protocol-Version", "2026-07-28", "Mcp-Method", "tools/call", "Mcp-Name", "call_tool")
	}
	r := ask(ada, "")
	_, rest, _ := strings.Cut(r.body, `"requestState":"`)
	state, _, ok := strings.Cut(rest, `"`)
	if !ok {
		t.Fatalf("%+v", r)
	}
	back := fmt.Sprintf(`"requestState":%q,"inputResponses":{"name":{"action":"accept","content":{"name":"Ada"}}},`, state)
	if r := ask(eve, back); !strings.Contains(r.body, `"code":-32602`) {
		t.Errorf("another tenant's: %+v", r)
	}
	if r := ask(ada, back); !strings.Contains(r.body, "Ada") {
		t.Errorf("%+v", r)
	}
}

// bare sends a request without a body in a session.
func (w *world) bare(method, token, session string) response {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), 5*time.Second)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, method, w.base+"/mcp", nil)
	if err != nil {
		w.t.Fatal(err)
	}
	r.Header.Set("Authorization", "Bearer "+token)
	r.Header.Set("Accept", "text/event-stream")
	r.Header.Set("Mcp-Session-Id", session)
	r.Header.Set("Mcp-Protocol-Version", "2025-11-25")
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		w.t.Fatal(err)
	}
	resp.Body.Close()
	return response{status: resp.StatusCode}
}

// A cursor of one tenant leads another through its own list, and tells it nothing.
func TestCursorsOfAnotherTenant(t *testing.T) {
	is := newBoundIssuer(t)
	var caps []*call.Capability
	for i := range catalog.PageSize + 50 {
		caps = append(caps, tool(fmt.Sprintf("acme_%04d", i), call.Read), tool(fmt.Sprintf("other_%04d", i), call.Read))
	}
	w := startShared(t, is, policy.Set{Rules: []policy.Rule{
		{Name: "acme", Then: "allow", Tenants: []string{"acme"}, Tools: []string{"acme_*"}},
		{Name: "other", Then: "allow", Tenants: []string{"other"}, Tools: []string{"other_*"}},
	}}, caps...)
	page := func(tenant, cursor string) (string, int, string) {
		params := meta
		if cursor != "" {
			params = fmt.Sprintf(`"cursor":%q,%s`, cursor, meta)
		}
		r := w.send(is.tokenOf(w, person{tenant, "ada"}), `{"jsonrpc":"2.0","id":1,"method":"tools/list","params":{`+params+`}}`, "Mcp-Protocol-Version", "2026-07-28", "Mcp-Method", "tools/list")
		var list struct {
			Result struct {
				Next  string `json:"nextCursor"`
				Tools []struct{ Name string }
			}
		}
		if err := json.Unmarshal([]byte(r.body), &list); err != nil || r.status != http.StatusOK {
			t.Fatalf("%v: %+v", err, r)
		}
		return list.Result.Next, len(list.Result.Tools), r.body
	}
	next := map[string]string{}
	for _, tenant := range []string{"acme", "other"} {
		cursor, n, body := page(tenant, "")
		if cursor == "" || n != catalog.PageSize {
			t.Fatalf("%s: %d tools, next %q", tenant, n, cursor)
		}
		if _, n, _ := page(tenant, cursor); n != 50 {
			t.Errorf("%s: %d tools on the second page", tenant, n)
		}
		next[tenant] = cursor
		if other := map[string]string{"acme": "other_", "other": "acme_"}[tenant]; strings.Contains(body, other) {
			t.Errorf("%s sees tools of another tenant", tenant)
		}
	}
	for tenant, other := range map[string]string{"acme": "other", "other": "acme"} {
		if cursor, _, body := page(tenant, next[other]); strings.Contains(body, `"`+other+"_") {
			t.Errorf("%s sees tools of %s by its cursor, next %q", tenant, other, cursor)
		}
	}
}
