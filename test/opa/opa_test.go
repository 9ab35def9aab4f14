// Package opa holds tests against a real Open Policy Agent, which is built from its source. It is
// a module of its own, so that the agent's dependencies are not Newel's.
package opa

import (
	"net/http"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/egress"
	"newel.dev/newel/internal/policy"
	"newel.dev/newel/internal/policy/opa"
	"newel.dev/newel/test/program"
)

// start builds and runs an agent with testdata/newel.rego, and returns its address.
func start(t *testing.T) (address string, stop func()) {
	t.Helper()
	bin := filepath.Join(t.TempDir(), "opa")
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", bin, "github.com/open-policy-agent/opa").CombinedOutput(); err != nil {
		t.Fatalf("building the agent: %v\n%s", err, out)
	}
	addr := program.Address(t)
	p := program.Serve(t, exec.Command(bin, "run", "--server", "--addr", addr, "--disable-telemetry", "testdata/newel.rego"), program.Ready("http://"+addr+"/health"))
	t.Cleanup(p.Kill)
	return "http://" + addr, p.Kill
}

func agent(t *testing.T, o opa.Options) *opa.Agent {
	t.Helper()
	o.Environment, o.HTTP, o.Timeout = "test", egress.Client(egress.Options{Loopback: true}), 5*time.Second
	a, err := opa.New(o)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

var (
	ada = &call.Principal{ID: "ada", Tenant: "acme", Roles: []string{"ops"}}
	eve = &call.Principal{ID: "eve", Tenant: "other"}
	now = time.Now()

	refund = &call.Capability{Kind: call.Tool, Name: "refund", Effect: call.Write}
	list   = &call.Capability{Kind: call.Tool, Name: "list", Effect: call.Read}
)

func TestAgent(t *testing.T) {
	address, stop := start(t)
	a := agent(t, opa.Options{URL: address, Document: "newel/decision", ListDocument: "newel.visible"})
	decide := func(a *opa.Agent, who *call.Principal, c *call.Capability, args string) policy.Decision {
		return a.Decide(t.Context(), &policy.Input{Principal: who, Capability: c, Args: jsontext.Value(args), Now: now})
	}
	for _, tt := range []struct {
		who    *call.Principal
		c      *call.Capability
		args   string
		want   policy.Verdict
		rule   string
		reason string
	}{
		{eve, list, `{}`, policy.Allow, "opa: reads", ""},
		{nil, list, ``, policy.Allow, "opa: reads", ""},
		{ada, refund, `{"amount":100}`, policy.Allow, "opa: ops refund", ""},
		{ada, refund, `{"amount":101}`, policy.Approve, "opa: large refunds", ""},
		{eve, refund, `{"amount":1}`, policy.Deny, "opa: default", "no rule allows this"},
	} {
		args := tt.args
		if args == "" {
			args = "{}"
		}
		if d := decide(a, tt.who, tt.c, args); d.Verdict != tt.want || d.Rule != tt.rule || d.Reason != tt.reason || d.Cause() != nil {
			t.Errorf("%v %s %s: got %v by %q, %q (%v)", tt.who, tt.c.Name, tt.args, d.Verdict, d.Rule, d.Reason, d.Cause())
		}
	}
	for document, want := range map[string]policy.Verdict{"newel/yes": policy.Allow, "newel/no": policy.Deny} {
		if d := decide(agent(t, opa.Options{URL: address, Document: document}), eve, list, "{}"); d.Verdict != want || d.Cause() != nil {
			t.Errorf("%s: %v (%v)", document, d.Verdict, d.Cause())
		}
	}
	for _, document := range []string{"newel/nothing", "newel/number", "newel/other"} { // nothing, or something else, denies
		if d := decide(agent(t, opa.Options{URL: address, Document: document}), eve, list, "{}"); d.Verdict != policy.Deny || d.Cause() == nil {
			t.Errorf("%s: %v (%v)", document, d.Verdict, d.Cause())
		}
	}
	seen, err := a.Visible(t.Context(), eve, []*call.Capability{refund, list}, now)
	if err != nil || seen[refund] || !seen[list] {
		t.Errorf("eve sees %v, %v", seen, err)
	}
	if seen, err := a.Visible(t.Context(), ada, []*call.Capability{refund, list}, now); err != nil || !seen[refund] || !seen[list] {
		t.Errorf("ada sees %v, %v", seen, err)
	}
	if seen, err := agent(t, opa.Options{URL: address, Document: "newel/decision"}).Visible(t.Context(), eve, []*call.Capability{refund}, now); err != nil || !seen[refund] {
		t.Errorf("without a document for lists: %v, %v", seen, err)
	}
	if _, err := agent(t, opa.Options{URL: address, Document: "newel/decision", ListDocument: "newel/yes"}).Visible(t.Context(), eve, []*call.Capability{refund}, now); err == nil {
		t.Error("a list that is none is taken")
	}
	stop()
	if d := decide(a, ada, list, "{}"); d.Verdict != policy.Deny || d.Cause() == nil {
		t.Errorf("the agent is away: %v (%v)", d.Verdict, d.Cause())
	}
	if _, err := a.Visible(t.Context(), ada, []*call.Capability{list}, now); err == nil {
		t.Error("the agent is away, and lists are as before")
	}
}

func TestOptions(t *testing.T) {
	for _, address := range []string{"", "127.0.0.1:8181", "ftp://x", "http://user:pass@x", "http://x?y", "http://"} {
		if _, err := opa.New(opa.Options{URL: address, Document: "d", HTTP: http.DefaultClient}); err == nil {
			t.Errorf("%q is taken for an address", address)
		}
	}
}
