package access

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-json-experiment/json/jsontext"
	"github.com/modelcontextprotocol/go-sdk/mcp"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/assembly"
	"newel.dev/newel/internal/audit"
	"newel.dev/newel/internal/door/approvals"
	"newel.dev/newel/internal/guard/approve"
	"newel.dev/newel/internal/guard/effect"
	"newel.dev/newel/internal/identity/devserver"
	"newel.dev/newel/internal/identity/verify"
	"newel.dev/newel/internal/policy"
	"newel.dev/newel/internal/secret"
	"newel.dev/newel/internal/store/postgres"
	"newel.dev/newel/internal/store/sqlite"
	"newel.dev/newel/test/engines"
)

// desk is a server whose tool pay needs approval, with people of two tenants.
type desk struct {
	*world
	key   secret.Key
	log   audit.Source
	paid  *atomic.Int32
	agent string // alice's token
}

// deskOptions are what tests change. Zero is a state of its own in a file.
type deskOptions struct {
	rule    policy.Rule
	store   assembly.Store
	key     secret.Key
	paid    *atomic.Int32 // shared by nodes
	issuer  string        // of another node
	webhook *approve.Webhook
	effects assembly.Effects
}

const payInput = `{"type":"object","properties":{"amount":{"type":"integer"},"to":{"type":"string"}},"additionalProperties":false}`

func openDesk(t *testing.T, o deskOptions) *desk {
	t.Helper()
	d := &desk{world: &world{t: t}, key: o.key, paid: o.paid}
	if d.paid == nil {
		d.paid = new(atomic.Int32)
	}
	if o.store == nil {
		d.key = secret.RandomKey()
		db, err := sqlite.Open(t.Context(), filepath.Join(t.TempDir(), "state.db"), d.key, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = db.Close() })
		o.store = db
	}
	d.log, _ = o.store.(audit.Source)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	d.base = "http://" + l.Addr().String()
	dev, err := devserver.New(devserver.Options{
		Issuer: d.base, Resources: []string{d.base + "/mcp"},
		Users: []devserver.User{
			{Name: "alice", Tenant: "acme", Scopes: []string{"*"}, Roles: []string{"agent", "boss"}},
			{Name: "bob", Tenant: "acme", Scopes: []string{"*"}, Roles: []string{"boss"}},
			{Name: "carol", Tenant: "acme", Scopes: []string{"*"}, Roles: []string{"boss"}},
			{Name: "dave", Tenant: "acme", Scopes: []string{"*"}, Roles: []string{"agent"}},
			{Name: "eve", Tenant: "other", Scopes: []string{"*"}, Roles: []string{"boss"}},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	issuer := verify.Issuer{URL: d.base, TenantClaim: "tenant", Audiences: []string{d.base + "/mcp"}}
	if o.issuer != "" {
		issuer = verify.Issuer{URL: o.issuer, TenantClaim: "tenant", Audiences: []string{o.issuer + "/mcp"}}
	}
	tokens, err := verify.New(verify.Options{Resource: d.base + "/mcp", Issuers: []verify.Issuer{issuer}})
	if err != nil {
		t.Fatal(err)
	}
	if o.rule.Name == "" {
		o.rule = policy.Rule{Name: "payments", Then: "require_approval", Tools: []string{"pay"}, Approvers: []string{"boss"}}
	}
	p := compiled(t, policy.Set{Rules: []policy.Rule{o.rule, {Name: "no secrets", Then: "deny", Tools: []string{"secret"}}, {Name: "rest", Then: "allow"}}})
	if o.webhook != nil {
		o.webhook.Callback = d.base
	}
	pay := &call.Capability{Kind: call.Tool, Name: "pay", Description: "D.", Effect: call.Write, Input: jsontext.Value(payInput), Origin: "pay",
		Run: func(_ context.Context, c *call.Call) (*call.Result, error) {
			return call.Text(fmt.Sprintf("paid %s, %d", c.Args, d.paid.Add(1))), nil
		}}
	wipe := &call.Capability{Kind: call.Tool, Name: "wipe", Description: "D.", Effect: call.Destructive, Input: jsontext.Value(payInput), Origin: "wipe",
		Undo: &call.Undo{Tool: "refund", Args: map[string]string{"amount": "args.amount", "to": "result.receipt.number"}},
		Run: func(_ context.Context, c *call.Call) (*call.Result, error) {
			return &call.Result{Content: call.TextContent("wiped"), Structured: jsontext.Value(fmt.Sprintf(`{"receipt":{"number":"r%d"}}`, d.paid.Add(1)))}, nil
		}}
	file := &call.Capability{Kind: call.Resource, Name: "a", URI: "file://a", Origin: "a",
		Run: func(context.Context, *call.Call) (*call.Result, error) {
			return &call.Result{Content: jsontext.Value(`[{"uri":"file://a","text":"content of a"}]`)}, nil
		}}
	refund := &call.Capability{Kind: call.Tool, Name: "refund", Description: "D.", Effect: call.Write, Input: jsontext.Value(payInput), Origin: "refund",
		Run: func(_ context.Context, c *call.Call) (*call.Result, error) {
			return call.Text(fmt.Sprintf("refunded %s for %s, %d", c.Args, c.Principal.ID, d.paid.Add(100))), nil
		}}
	h, err := assembly.Build(t.Context(), &assembly.Options{
		Name: "desk", Logger: slog.New(slog.DiscardHandler), Identity: &assembly.Identities{Tokens: tokens}, Login: dev.Handler(), Policy: p,
		Access: &assembly.Access{Resource: d.base + "/mcp", Issuers: []string{d.base}, Nonce: tokens.Nonce}, State: o.store, Key: d.key, Webhook: o.webhook, Effects: o.effects,
		Backends: []call.Backend{tools{pay, wipe, refund, file, tool("open", call.Read), tool("secret", call.Read)}},
	})
	if err != nil {
		t.Fatal(err)
	}
	serve(t, l, h)
	if o.issuer == "" {
		d.agent = d.token("alice")
	}
	return d
}

// said is what a caller is told of an approval.
type said struct {
	Error struct {
		Code    int
		Message string
		Data    struct {
			Code              string
			Retryable         bool
			RetryAfterSeconds int
			Verdict           string
			Approval          struct{ ID, State, Rule, Expires string }
		}
	}
}

// waits calls pay and expects that a person has to approve it.
func (d *desk) waits(r response, state string) string {
	d.t.Helper()
	var s said
	raw := r.body
	if i := strings.Index(raw, "data: {"); i >= 0 {
		raw, _, _ = strings.Cut(raw[i+len("data: "):], "\n")
	}
	if err := json.Unmarshal([]byte(raw), &s); err != nil {
		d.t.Fatalf("%v: %s", err, r.body)
	}
	a := s.Error.Data
	if s.Error.Code != -31403 || a.Approval.State != state || a.Approval.ID == "" || a.Verdict != "require_approval" || a.Retryable != (state == "pending") || (a.RetryAfterSeconds > 0) != a.Retryable || a.Approval.Rule != "payments" {
		d.t.Fatalf("want %s, got %+v", state, r)
	}
	return a.Approval.ID
}

// api asks /approvals with an Authorization header.
func (d *desk) api(authorization, method, path, body string) response {
	d.t.Helper()
	r, err := http.NewRequestWithContext(d.t.Context(), method, d.base+path, strings.NewReader(body))
	if err != nil {
		d.t.Fatal(err)
	}
	r.Header.Set("Authorization", authorization)
	return d.do(r)
}

func (d *desk) do(r *http.Request) response {
	d.t.Helper()
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		d.t.Fatal(err)
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(resp.Body)
	if err != nil {
		d.t.Fatal(err)
	}
	return response{status: resp.StatusCode, challenge: resp.Header.Get("WWW-Authenticate"), body: string(raw), nonce: resp.Header.Get("DPoP-Nonce")}
}

// decides has a user decide, and returns the status.
func (d *desk) decides(user, id, decision string) int {
	d.t.Helper()
	return d.api("Bearer "+d.token(user), http.MethodPost, "/approvals/"+id, fmt.Sprintf(`{"decision":%q,"reason":"as asked"}`, decision)).status
}

func (d *desk) pays(r response, times int32) {
	d.t.Helper()
	if !strings.Contains(r.body, "paid {") || d.paid.Load() != times {
		d.t.Fatalf("want it paid %d times, it is %d: %s", times, d.paid.Load(), r.body)
	}
}

// eras are the ways to call pay with arguments.
func (d *desk) eras() map[string]func(args string) response {
	session, _ := d.session(d.agent)
	id := 100
	return map[string]func(string) response{
		"stateless": func(args string) response { return d.stateless(d.agent, "tools/call", "pay", args) },
		"sessions": func(args string) response {
			id++
			return d.send(d.agent, fmt.Sprintf(`{"jsonrpc":"2.0","id":%d,"method":"tools/call","params":{"name":"pay","arguments":%s}}`, id, args),
				"Mcp-Session-Id", session, "Mcp-Protocol-Version", "2025-11-25")
		},
	}
}

// acts are the records of the audit log, as "act outcome by".
func (d *desk) acts() string {
	d.t.Helper()
	rows, err := d.log.Read(d.t.Context(), 0, 1000)
	if err != nil {
		d.t.Fatal(err)
	}
	var out []string
	for _, r := range rows {
		rec, err := audit.Decode(r.Record)
		if err != nil {
			d.t.Fatal(err)
		}
		line := rec.Act + " " + rec.Outcome
		if rec.By != "" {
			line += " by " + rec.By[strings.LastIndex(rec.By, "#")+1:]
		}
		if rec.Approval != "" {
			line += " !"
		}
		out = append(out, strings.Join(strings.Fields(line), " "))
	}
	return strings.Join(out, ", ")
}

// A call waits, is approved by somebody else, runs once with what was approved, and asks anew after.
func TestApproval(t *testing.T) {
	for _, era := range []string{"stateless", "sessions"} {
		t.Run(era, func(t *testing.T) {
			d := openDesk(t, deskOptions{})
			pay := d.eras()[era]
			id := d.waits(pay(`{"amount":5,"to":"x"}`), "pending")
			if again := d.waits(pay(`{ "to":"x", "amount":5}`), "pending"); again != id {
				t.Errorf("the same call asks about %s and %s", id, again)
			}
			other := d.waits(pay(`{"amount":6,"to":"x"}`), "pending")
			if other == id {
				t.Error("another call asks about the same approval")
			}
			r := d.api("Bearer "+d.token("bob"), http.MethodGet, "/approvals/"+id, "")
			if r.status != 200 || !strings.Contains(r.body, `"arguments":{"amount":5,"to":"x"}`) || !strings.Contains(r.body, `"state":"pending"`) {
				t.Errorf("what bob sees: %+v", r)
			}
			if list := d.api("Bearer "+d.token("bob"), http.MethodGet, "/approvals?state=pending", ""); strings.Count(list.body, `"state":"pending"`) != 2 {
				t.Errorf("what bob is asked: %+v", list)
			}
			if status := d.decides("bob", id, "approve"); status != 200 {
				t.Fatal(status)
			}
			d.waits(pay(`{"amount":50,"to":"x"}`), "pending") // other arguments
			if d.paid.Load() != 0 {
				t.Error("it ran before its call came back")
			}
			d.pays(pay(`{"amount":5,"to":"x"}`), 1)
			if next := d.waits(pay(`{"amount":5,"to":"x"}`), "pending"); next == id { // replayed
				t.Error("one approval is good for two runs")
			}
			if status := d.decides("bob", other, "deny"); status != 200 {
				t.Fatal(status)
			}
			r = pay(`{"amount":6,"to":"x"}`)
			if denied := d.waits(r, "denied"); denied != other || !strings.Contains(r.body, "as asked") {
				t.Errorf("denied: %s", r.body)
			}
			if d.paid.Load() != 1 {
				t.Errorf("it was paid %d times", d.paid.Load())
			}
			want := "approval requested !, approval requested !, approval approved by bob !, approval requested !, intent !, outcome completed !, approval requested !, approval denied by bob !"
			if got := d.acts(); got != want {
				t.Errorf("the audit log has\n%s\nwant\n%s", got, want)
			}
		})
	}
}

// Who may not decide does not, and most are not even told that there is something.
func TestWhoApproves(t *testing.T) {
	d := openDesk(t, deskOptions{})
	id := d.waits(d.stateless(d.agent, "tools/call", "pay", `{"amount":1}`), "pending")
	for user, want := range map[string]int{"alice": 403, "dave": 403, "eve": 404} { // her own, without the role, of another tenant
		if status := d.decides(user, id, "approve"); status != want {
			t.Errorf("%s decides: %d", user, status)
		}
	}
	for user, want := range map[string]int{"alice": 200, "dave": 404, "eve": 404, "bob": 200} {
		if r := d.api("Bearer "+d.token(user), http.MethodGet, "/approvals/"+id, ""); r.status != want {
			t.Errorf("%s looks: %+v", user, r)
		}
	}
	for _, user := range []string{"dave", "eve"} {
		if r := d.api("Bearer "+d.token(user), http.MethodGet, "/approvals", ""); strings.TrimSpace(r.body) != `{"approvals":[]}` {
			t.Errorf("%s lists: %+v", user, r)
		}
	}
	eve, absent := d.api("Bearer "+d.token("eve"), http.MethodPost, "/approvals/"+id, `{"decision":"approve"}`), d.api("Bearer "+d.token("eve"), http.MethodPost, "/approvals/x"+id[1:], `{"decision":"approve"}`)
	if eve != absent {
		t.Errorf("eve can tell that it is there: %+v, %+v", eve, absent)
	}
	for name, authorization := range map[string]string{"nobody": "", "garbage": "Bearer x", "an operator without key": approvals.Proof(make([]byte, 32), "root", "POST", "/approvals/"+id, []byte(`{"decision":"approve"}`), time.Now())} {
		if r := d.api(authorization, http.MethodPost, "/approvals/"+id, `{"decision":"approve"}`); r.status != 401 || r.challenge == "" {
			t.Errorf("%s decides: %+v", name, r)
		}
	}
	// The audit log is for operators alone: whoever has a token only learns that.
	for path, body := range map[string]string{"/audit/erase": `{"principal":"alice","reason":"r"}`, "/audit/reads": `{"first":0,"last":0,"count":1}`} {
		if r := d.api("", http.MethodPost, path, body); r.status != 401 {
			t.Errorf("nobody is let in to %s: %+v", path, r)
		}
		if r := d.api("Bearer "+d.token("bob"), http.MethodPost, path, body); r.status != 403 {
			t.Errorf("bob is let in to %s: %+v", path, r)
		}
	}
	if r := d.api("Bearer "+d.token("bob"), http.MethodPost, "/approvals/"+id, `{"decision":"perhaps"}`); r.status != 400 {
		t.Errorf("nonsense: %+v", r)
	}
	if status := d.decides("bob", id, "approve"); status != 200 {
		t.Error(status)
	}
	for _, again := range []string{"approve", "deny"} { // decided twice
		if status := d.decides("carol", id, again); status != 409 {
			t.Errorf("decided again: %d", status)
		}
	}
	if r := d.stateless(d.token("dave"), "tools/call", "pay", `{"amount":1}`); d.waits(r, "pending") == id {
		t.Error("dave gets alice's approval")
	}
	d.pays(d.stateless(d.agent, "tools/call", "pay", `{"amount":1}`), 1)
}

// A bound token is worth nothing at /approvals without a proof for that.
func TestApprovalsWithBoundTokens(t *testing.T) {
	is := newBoundIssuer(t)
	w := startWith(t, []verify.Issuer{{URL: is.url, JWKS: is.url + "/jwks"}})
	h := is.hold(w)
	d := &desk{world: w}
	nonce := ""
	ask := func(headers []string) (int, string) {
		r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, w.base+"/approvals", nil)
		if err != nil {
			t.Fatal(err)
		}
		for i := 0; i < len(headers); i += 2 {
			r.Header.Set(headers[i], headers[i+1])
		}
		resp := d.do(r)
		nonce = resp.nonce
		return resp.status, resp.body
	}
	ask(h.headersAt(http.MethodGet, "/approvals"))
	if h.nonce = nonce; nonce == "" {
		t.Fatal("no nonce")
	}
	if status, body := ask([]string{"Authorization", "Bearer " + h.token}); status != 401 {
		t.Errorf("without a proof: %d %s", status, body)
	}
	if status, body := ask(h.headersAt(http.MethodGet, "/mcp")); status != 401 {
		t.Errorf("with a proof for something else: %d %s", status, body)
	}
	proof := h.headersAt(http.MethodGet, "/approvals")
	if status, body := ask(proof); status != 200 {
		t.Errorf("with its proof: %d %s", status, body)
	}
	if status, body := ask(proof); status != 401 {
		t.Errorf("with a proof that was shown before: %d %s", status, body)
	}
}

// An operator proves to have the key. The proof is of one request, and of now.
func TestOperatorApproves(t *testing.T) {
	d := openDesk(t, deskOptions{rule: policy.Rule{Name: "payments", Then: "require_approval", Tools: []string{"pay"}}})
	key, err := d.key.Derive(assembly.OperatorKey)
	if err != nil {
		t.Fatal(err)
	}
	id := d.waits(d.stateless(d.agent, "tools/call", "pay", `{"amount":1}`), "pending")
	if status := d.decides("bob", id, "approve"); status != 403 {
		t.Errorf("without approvers somebody else approves: %d", status)
	}
	body, path := `{"decision":"approve"}`, "/approvals/"+id
	good := approvals.Proof(key, "root", "POST", path, []byte(body), time.Now())
	for name, try := range map[string]struct{ proof, method, path, body string }{
		"another body": {good, "POST", path, `{"decision":"deny"}`},
		"another path": {good, "POST", path + "?x=1", body},
		"another name": {strings.Replace(good, "cm9vdA", "cm9vdB", 1), "POST", path, body},
		"too old":      {approvals.Proof(key, "root", "POST", path, []byte(body), time.Now().Add(-10*time.Minute)), "POST", path, body},
		"in advance":   {approvals.Proof(key, "root", "POST", path, []byte(body), time.Now().Add(10*time.Minute)), "POST", path, body},
	} {
		if r := d.api(try.proof, try.method, try.path, try.body); r.status != 401 {
			t.Errorf("%s: %+v", name, r)
		}
	}
	if r := d.api(good, "POST", path, body); r.status != 200 || !strings.Contains(r.body, `"by":"root","how":"operator"`) {
		t.Errorf("%+v", r)
	}
	d.pays(d.stateless(d.agent, "tools/call", "pay", `{"amount":1}`), 1)
}

// Four eyes are not enough where the rule wants six.
func TestSeveralApprovers(t *testing.T) {
	d := openDesk(t, deskOptions{rule: policy.Rule{Name: "payments", Then: "require_approval", Tools: []string{"pay"}, Approvers: []string{"boss"}, Count: 2}})
	pay := func() response { return d.stateless(d.agent, "tools/call", "pay", `{"amount":1}`) }
	id := d.waits(pay(), "pending")
	for _, step := range []struct {
		user string
		want int
	}{{"bob", 200}, {"bob", 409}, {"alice", 403}} {
		if status := d.decides(step.user, id, "approve"); status != step.want {
			t.Errorf("%s: %d", step.user, status)
		}
		d.waits(pay(), "pending")
	}
	if status := d.decides("carol", id, "approve"); status != 200 {
		t.Error(status)
	}
	d.pays(pay(), 1)
}

// What only reads can need an approval too, resources as well; and one caller has only so many calls
// waiting.
func TestReadsAndBounds(t *testing.T) {
	d := openDesk(t, deskOptions{rule: policy.Rule{Name: "payments", Then: "require_approval", Tools: []string{"open", "pay", "file://*"}, Approvers: []string{"boss"}}})
	read := func() response {
		return d.send(d.agent, `{"jsonrpc":"2.0","id":1,"method":"resources/read","params":{"uri":"file://a",`+meta+`}}`,
			"Mcp-Protocol-Version", "2026-07-28", "Mcp-Method", "resources/read", "Mcp-Name", "file://a")
	}
	for want, do := range map[string]func() response{
		"open for alice": func() response { return d.stateless(d.agent, "tools/call", "open", `{"n":1}`) },
		"content of a":   read,
	} {
		id := d.waits(do(), "pending")
		if status := d.decides("bob", id, "approve"); status != 200 {
			t.Fatal(status)
		}
		if r := do(); !strings.Contains(r.body, want) {
			t.Errorf("approved: %+v", r)
		}
		if next := d.waits(do(), "pending"); next == id {
			t.Errorf("%s: one approval for two", want)
		}
	}
	if got := d.acts(); strings.Count(got, "intent !, outcome completed !") != 2 {
		t.Errorf("the audit log has %s", got)
	}
	long := fmt.Sprintf(`{"to":%q}`, strings.Repeat("x", 300<<10))
	if r := d.stateless(d.agent, "tools/call", "pay", long); !strings.Contains(r.body, "longer than anybody reads") {
		t.Errorf("long arguments: %.200s", r.body)
	}
	for i := range 98 {
		d.waits(d.stateless(d.agent, "tools/call", "pay", fmt.Sprintf(`{"amount":%d}`, i)), "pending")
	}
	if r := d.stateless(d.agent, "tools/call", "pay", `{"amount":1000}`); !strings.Contains(r.body, "100 calls of yours wait") {
		t.Errorf("one more: %+v", r)
	}
	d.waits(d.stateless(d.agent, "tools/call", "pay", `{"amount":5}`), "pending") // one of those
	d.waits(d.stateless(d.token("dave"), "tools/call", "pay", `{"amount":1000}`), "pending")
}

// Time that is over is a no, told once; a call after that asks anew.
func TestApprovalExpires(t *testing.T) {
	d := openDesk(t, deskOptions{rule: policy.Rule{Name: "payments", Then: "require_approval", Tools: []string{"pay"}, Approvers: []string{"boss"}, Expires: 50 * time.Millisecond}})
	pay := func() response { return d.stateless(d.agent, "tools/call", "pay", `{"amount":1}`) }
	id := d.waits(pay(), "pending")
	bob := "Bearer " + d.token("bob")
	for deadline := time.Now().Add(10 * time.Second); ; {
		if r := d.api(bob, http.MethodGet, "/approvals/"+id, ""); strings.Contains(r.body, `"state":"expired"`) {
			break
		} else if time.Now().After(deadline) {
			t.Fatalf("it does not end: %+v", r)
		}
	}
	if status := d.decides("bob", id, "approve"); status != 409 {
		t.Errorf("decided too late: %d", status)
	}
	if told := d.waits(pay(), "expired"); told != id {
		t.Errorf("told of %s, want %s", told, id)
	}
	if next := d.waits(pay(), "pending"); next == id {
		t.Error("it does not ask anew")
	}
	if d.paid.Load() != 0 {
		t.Error("it ran")
	}
	if got := d.acts(); !strings.HasPrefix(got, "approval requested !, approval expired !, approval requested !") {
		t.Errorf("the audit log has %s", got)
	}
}

// A caller may approve itself where the rule says so and its client can ask; elsewhere it may not.
func TestCallerIsAsked(t *testing.T) {
	for _, era := range []string{"2026-07-28", "2025-11-25"} {
		t.Run(era, func(t *testing.T) {
			d := openDesk(t, deskOptions{rule: policy.Rule{Name: "payments", Then: "require_approval", Tools: []string{"pay"}, Approvers: []string{"boss"}, Self: true}})
			action, shown, callTool := d.person(era)
			pay := func(amount int) (string, error) { return callTool("pay", amount) }
			action.Store("accept")
			if text, err := pay(1); err != nil || !strings.Contains(text, "paid") {
				t.Errorf("accepted: %s, %v", text, err)
			}
			if text, _ := shown.Load().(string); !strings.Contains(text, `pay`) || !strings.Contains(text, `{"amount":1}`) {
				t.Errorf("the person is shown %q", text)
			}
			action.Store("decline")
			if text, err := pay(2); err == nil || !strings.Contains(err.Error(), "denied this call") {
				t.Errorf("declined: %s, %v", text, err)
			}
			action.Store("cancel")
			if text, err := pay(3); err == nil || !strings.Contains(err.Error(), "waits for a person") {
				t.Errorf("cancelled: %s, %v", text, err)
			}
			d.waits(d.stateless(d.agent, "tools/call", "pay", `{"amount":4}`), "pending") // this one declares no elicitation
			if d.paid.Load() != 1 {
				t.Errorf("it was paid %d times", d.paid.Load())
			}
			if got := d.acts(); !strings.HasPrefix(got, "approval requested !, approval approved by alice !, intent !, outcome completed !, approval requested !, approval denied by alice !") {
				t.Errorf("the audit log has %s", got)
			}
		})
	}
}

// person is a client of one era with a person, who answers every question with an action.
func (d *desk) person(era string) (action, shown *atomic.Value, callTool func(name string, amount int) (string, error)) {
	d.t.Helper()
	action, shown = new(atomic.Value), new(atomic.Value)
	shown.Store("")
	c := mcp.NewClient(&mcp.Implementation{Name: "test", Version: "1"}, &mcp.ClientOptions{
		ElicitationHandler: func(_ context.Context, r *mcp.ElicitRequest) (*mcp.ElicitResult, error) {
			shown.Store(r.Params.Message)
			return &mcp.ElicitResult{Action: action.Load().(string), Content: map[string]any{"approve": true, "confirm": true}}, nil
		},
	})
	s, err := c.Connect(d.t.Context(), &mcp.StreamableClientTransport{Endpoint: d.base + "/mcp", HTTPClient: &http.Client{Transport: bearer(d.agent)}}, &mcp.ClientSessionOptions{ProtocolVersion: era})
	if err != nil {
		d.t.Fatal(err)
	}
	d.t.Cleanup(func() { _ = s.Close() })
	return action, shown, func(name string, amount int) (string, error) {
		r, err := s.CallTool(d.t.Context(), &mcp.CallToolParams{Name: name, Arguments: map[string]any{"amount": amount}})
		if err != nil {
			return "", err
		}
		return r.Content[0].(*mcp.TextContent).Text, nil
	}
}

// A call that cannot be taken back runs when the person at the client says so, and not where nobody
// can be asked.
func TestConfirmation(t *testing.T) {
	confirm := assembly.Effects{Confirm: []call.Effect{call.Destructive}}
	for _, era := range []string{"2026-07-28", "2025-11-25"} {
		t.Run(era, func(t *testing.T) {
			d := openDesk(t, deskOptions{effects: confirm})
			action, shown, callTool := d.person(era)
			action.Store("decline")
			if text, err := callTool("wipe", 1); err == nil || !strings.Contains(err.Error(), "did not confirm") {
				t.Errorf("declined: %s, %v", text, err)
			}
			if text := shown.Load().(string); !strings.Contains(text, `wipe {"amount":1}`) || !strings.Contains(text, "destructive") {
				t.Errorf("the person is shown %q", text)
			}
			action.Store("accept")
			if text, err := callTool("wipe", 1); err != nil || text != "wiped" || d.paid.Load() != 1 {
				t.Errorf("accepted: %s, %v", text, err)
			}
			shown.Store("")
			if text, err := callTool("refund", 1); err != nil || shown.Load() != "" {
				t.Errorf("of another class: %s, %v, asked %q", text, err, shown.Load())
			}
			for name, r := range map[string]response{"stateless": d.stateless(d.agent, "tools/call", "wipe", `{"amount":2}`)} {
				if !strings.Contains(r.body, `{"elicitation":{"form":{}}}`) || d.paid.Load() != 101 {
					t.Errorf("%s, that cannot be asked: %+v", name, r)
				}
			}
		})
	}
	safe := confirm
	safe.Rules = []effect.Rule{{Tool: "wipe", Recovery: call.RecoverSafe}}
	d := openDesk(t, deskOptions{effects: safe})
	if r := d.stateless(d.agent, "tools/call", "wipe", `{"amount":2}`); !strings.Contains(r.body, "wiped") {
		t.Errorf("what does no harm twice: %+v", r)
	}
	d = openDesk(t, deskOptions{effects: confirm, rule: policy.Rule{Name: "payments", Then: "require_approval", Tools: []string{"wipe"}, Approvers: []string{"boss"}}})
	id := d.waits(d.stateless(d.agent, "tools/call", "wipe", `{"amount":2}`), "pending")
	if status := d.decides("bob", id, "approve"); status != 200 {
		t.Fatal(status)
	}
	if r := d.stateless(d.agent, "tools/call", "wipe", `{"amount":2}`); !strings.Contains(r.body, "wiped") {
		t.Errorf("what somebody approved: %+v", r)
	}
}

// What was done is undone once, by operators, with what its call and its result say.
func TestUndo(t *testing.T) {
	d := openDesk(t, deskOptions{})
	key, err := d.key.Derive(assembly.OperatorKey)
	if err != nil {
		t.Fatal(err)
	}
	undo := func(by, operation string) response {
		path := "/operations/" + operation + "/undo"
		return d.api(approvals.Proof(key, by, http.MethodPost, path, nil, time.Now()), http.MethodPost, path, "")
	}
	if r := d.stateless(d.agent, "tools/call", "wipe", `{"amount":7}`); !strings.Contains(r.body, "wiped") {
		t.Fatal(r)
	}
	if r := d.stateless(d.agent, "tools/call", "refund", `{"amount":7}`); !strings.Contains(r.body, "refunded") {
		t.Fatal(r)
	}
	rows, err := d.log.Read(t.Context(), 0, 10)
	if err != nil || len(rows) != 4 {
		t.Fatal(len(rows), err)
	}
	operation := func(i int) string {
		rec, err := audit.Decode(rows[i].Record)
		if err != nil {
			t.Fatal(err)
		}
		return rec.Operation
	}
	if r := d.api("Bearer "+d.token("bob"), http.MethodPost, "/operations/"+operation(1)+"/undo", ""); r.status != 403 {
		t.Errorf("somebody with a token: %+v", r)
	}
	if r := undo("root", operation(3)); r.status != 409 || !strings.Contains(r.body, "no undo is declared") {
		t.Errorf("what nothing undoes: %+v", r)
	}
	if r := undo("root", "x"); r.status != 404 {
		t.Errorf("what is not there: %+v", r)
	}
	var all sync.WaitGroup
	for i := range 8 {
		all.Go(func() {
			if r := undo(fmt.Sprintf("root%d", i), operation(1)); r.status != 200 || !strings.Contains(r.body, `refunded {\"amount\":7,\"to\":\"r1\"} for operator, 201`) {
				t.Errorf("undo: %+v", r)
			}
		})
	}
	all.Wait()
	if d.paid.Load() != 201 { // one of wipe, a hundred of each refund
		t.Errorf("it ran %d times", d.paid.Load())
	}
	if got := d.acts(); strings.Count(got, "undo by root") != 8 || strings.Count(got, "intent") != 3 {
		t.Errorf("the audit log has %s", got)
	}
}

// Calls that the policy refuses are in the audit log, counted together, hidden names too.
func TestDenialsAreWrittenDown(t *testing.T) {
	d := openDesk(t, deskOptions{})
	for range 3 {
		if r := d.stateless(d.agent, "tools/call", "secret", `{}`); !strings.Contains(r.body, "unknown tool") {
			t.Fatalf("%+v", r)
		}
	}
	for deadline := time.Now().Add(10 * time.Second); ; {
		rows, err := d.log.Read(t.Context(), 0, 100)
		if err != nil {
			t.Fatal(err)
		}
		count := int64(0)
		for _, row := range rows {
			rec, err := audit.Decode(row.Record)
			if err != nil {
				t.Fatal(err)
			}
			if rec.Act == audit.Denied && rec.Capability == "secret" && rec.Rule == "no secrets" && strings.HasSuffix(rec.Principal, "#alice") && rec.Code == "not_found" {
				count += rec.Count
			}
		}
		if count == 3 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d denials are written down: %s", count, d.acts())
		}
	}
}

// bearer sends a token.
type bearer string

// RoundTrip implements http.RoundTripper.
func (b bearer) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Header.Set("Authorization", "Bearer "+string(b))
	return http.DefaultTransport.RoundTrip(r)
}

// A key is for one call: its answer comes again without another approval, and another key needs one.
func TestApprovalAndKeys(t *testing.T) {
	d := openDesk(t, deskOptions{})
	pay := func(key string) response {
		return d.send(d.agent, `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"pay","arguments":{"amount":1},`+meta+`}}`,
			"Mcp-Protocol-Version", "2026-07-28", "Mcp-Method", "tools/call", "Mcp-Name", "pay", "Idempotency-Key", key)
	}
	id := d.waits(pay("one"), "pending")
	if again := d.waits(pay("two"), "pending"); again != id {
		t.Errorf("%s and %s", id, again)
	}
	if status := d.decides("bob", id, "approve"); status != 200 {
		t.Fatal(status)
	}
	d.pays(pay("one"), 1)
	if r := pay("one"); !strings.Contains(r.body, `"replayed":true`) {
		t.Errorf("%+v", r)
	}
	d.waits(pay("two"), "pending")
	if r := pay("one"); !strings.Contains(r.body, `"replayed":true`) || d.paid.Load() != 1 {
		t.Errorf("while another waits: %+v", r)
	}
}

// Two nodes race to use one approval, and an approval of one policy is worth nothing under another.
func TestApprovalsOfNodes(t *testing.T) {
	dsn, key := engines.Postgres(t), secret.RandomKey()
	open := func() *postgres.DB {
		db, err := postgres.Open(t.Context(), secret.New(dsn), key)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = db.Close() })
		return db
	}
	a := openDesk(t, deskOptions{store: open(), key: key})
	b := openDesk(t, deskOptions{store: open(), key: key, issuer: a.base, paid: a.paid})
	changed := openDesk(t, deskOptions{store: open(), key: key, issuer: a.base, paid: a.paid,
		rule: policy.Rule{Name: "payments", Then: "require_approval", Tools: []string{"pay"}, Approvers: []string{"boss"}, Count: 2}})
	b.agent, changed.agent = a.agent, a.agent
	id := a.waits(a.stateless(a.agent, "tools/call", "pay", `{"amount":1}`), "pending")
	if seen := b.waits(b.stateless(b.agent, "tools/call", "pay", `{"amount":1}`), "pending"); seen != id {
		t.Errorf("the other node asks about %s, not %s", seen, id)
	}
	if status := a.decides("bob", id, "approve"); status != 200 {
		t.Fatal(status)
	}
	if seen := changed.waits(changed.stateless(a.agent, "tools/call", "pay", `{"amount":1}`), "pending"); seen == id {
		t.Error("an approval outlives the policy that it was given under")
	}
	var all sync.WaitGroup
	for i := range 12 {
		all.Go(func() { []*desk{a, b}[i%2].stateless(a.agent, "tools/call", "pay", `{"amount":1}`) })
	}
	all.Wait()
	if a.paid.Load() != 1 {
		t.Errorf("one approval, and it was paid %d times", a.paid.Load())
	}
}

// Another system hears of an approval and decides: at the callback, or in its answer. What is not
// signed, or signed for something else, decides nothing.
func TestWebhook(t *testing.T) {
	shared := strings.Repeat("s", 32)
	type told struct {
		Approval struct{ ID, Principal string }
		Callback string
	}
	heard := make(chan told, 16)
	var answer atomic.Value // of the other system: func(id) (body, signature)
	answer.Store(func(string) (string, string) { return "", "" })
	system := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil || approve.CheckSignature([]byte(shared), r.Header.Get(approve.SignatureHeader), body, time.Now()) != nil {
			t.Errorf("what it hears is not signed: %v", err)
		}
		var m told
		if err := json.Unmarshal(body, &m); err != nil {
			t.Error(err)
		}
		b, sig := answer.Load().(func(string) (string, string))(m.Approval.ID)
		w.Header().Set(approve.SignatureHeader, sig)
		_, _ = io.WriteString(w, b)
		heard <- m
	}))
	defer system.Close()
	d := openDesk(t, deskOptions{webhook: &approve.Webhook{URL: system.URL, Secret: secret.New(shared), HTTP: system.Client()}})
	sign := func(key, body string, at time.Time) string { return approve.Sign([]byte(key), at, []byte(body)) }
	pay := func(amount int) response {
		return d.stateless(d.agent, "tools/call", "pay", fmt.Sprintf(`{"amount":%d}`, amount))
	}
	id := d.waits(pay(1), "pending")
	m := <-heard
	if m.Approval.ID != id || m.Callback != d.base+"/approvals/"+id+"/callback" {
		t.Fatalf("heard %+v", m)
	}
	second := d.waits(pay(2), "pending")
	<-heard
	back := func(id, body, signature string) int {
		r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, d.base+"/approvals/"+id+"/callback", bytes.NewReader([]byte(body)))
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set(approve.SignatureHeader, signature)
		return d.do(r).status
	}
	yes := fmt.Sprintf(`{"approval":%q,"decision":"approve","by":"grace"}`, id)
	good, now := sign(shared, yes, time.Now()), time.Now()
	flipped := good[:len(good)-1] + string("0123456789abcdef"[(strings.IndexByte("0123456789abcdef", good[len(good)-1])+1)%16])
	byAlice := fmt.Sprintf(`{"approval":%q,"decision":"approve","by":%q}`, id, m.Approval.Principal)
	for name, try := range map[string]struct {
		id, body, signature string
		want                int
	}{
		"not signed":            {id, yes, "", 401},
		"one digit changed":     {id, yes, flipped, 401},
		"another body":          {id, strings.Replace(yes, "approve\"", "deny\"", 1), good, 401},
		"another secret":        {id, yes, sign(strings.Repeat("t", 32), yes, now), 401},
		"too old":               {id, yes, sign(shared, yes, now.Add(-time.Hour)), 401},
		"another time":          {id, yes, strings.Replace(good, "t=", "t=1", 1), 401},
		"another approval":      {second, yes, good, 400},
		"nobody decided":        {id, fmt.Sprintf(`{"approval":%q,"decision":"approve"}`, id), sign(shared, fmt.Sprintf(`{"approval":%q,"decision":"approve"}`, id), now), 400},
		"the caller decided":    {id, byAlice, sign(shared, byAlice, now), 403},
		"one that is not there": {"x" + id, strings.Replace(yes, id, "x"+id, 1), sign(shared, strings.Replace(yes, id, "x"+id, 1), now), 404},
	} {
		if status := back(try.id, try.body, try.signature); status != try.want {
			t.Errorf("%s: %d, want %d", name, status, try.want)
		}
	}
	d.waits(pay(1), "pending")
	if status := back(id, yes, good); status != 200 {
		t.Fatal(status)
	}
	if status := back(id, yes, good); status != 409 { // replayed
		t.Errorf("replayed: %d", status)
	}
	d.pays(pay(1), 1)

	answer.Store(func(id string) (string, string) { // in the answer
		b := fmt.Sprintf(`{"approval":%q,"decision":"deny","by":"grace","reason":"not today"}`, id)
		return b, sign(shared, b, time.Now())
	})
	third := d.waits(pay(3), "pending")
	for deadline := time.Now().Add(10 * time.Second); ; {
		if r := pay(3); strings.Contains(r.body, "not today") {
			d.waits(r, "denied")
			break
		} else if time.Now().After(deadline) {
			t.Fatalf("%s is not decided: %+v", third, r)
		}
	}
}
