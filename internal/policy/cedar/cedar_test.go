package cedar

import (
	"strings"
	"testing"
	"time"

	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/policy"
)

const policies = `
@id("reads")
permit (principal, action, resource) when { resource.effect == "read" };

@id("ops refund")
permit (principal in Role::"ops", action == Action::"call", resource == Tool::"refund")
when { context.args.amount <= 100 };

@id("large refunds") @approval("")
permit (principal in Role::"ops", action == Action::"call", resource == Tool::"refund")
when { context.args.amount > 100 };

@id("other tenants") @reason("it is acme's")
forbid (principal, action, resource) when { resource.tags.contains("acme") }
unless { principal in Tenant::"acme" };

@id("frozen")
forbid (principal, action, resource == Tool::"refund") when { context.environment == "frozen" };

@id("weekly")
permit (principal, action, resource == Tool::"report") when { context.now > datetime("2027-01-01") };
`

var (
	ada = &call.Principal{ID: "ada", Tenant: "acme", Roles: []string{"ops"}}
	eve = &call.Principal{ID: "eve", Tenant: "other"}
	now = time.Date(2026, 11, 20, 12, 0, 0, 0, time.UTC)

	refund = &call.Capability{Kind: call.Tool, Name: "refund", Effect: call.Write}
	list   = &call.Capability{Kind: call.Tool, Name: "list", Effect: call.Read}
	secret = &call.Capability{Kind: call.Tool, Name: "secret", Effect: call.Read, Tags: []string{"acme"}}
	report = &call.Capability{Kind: call.Tool, Name: "report", Effect: call.Write}
	page   = &call.Capability{Kind: call.Resource, URI: "kb://page/one"}
)

func parse(t *testing.T, environment string) *Policies {
	t.Helper()
	p, err := Parse(environment, File{"rules.cedar", []byte(policies)})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestDecide(t *testing.T) {
	p := parse(t, "test")
	for _, tt := range []struct {
		who  *call.Principal
		c    *call.Capability
		args string
		now  time.Time
		want policy.Verdict
		rule string
	}{
		{eve, list, `{}`, now, policy.Allow, "reads"},
		{nil, page, `{}`, now, policy.Allow, "reads"},
		{eve, secret, `{}`, now, policy.Deny, "other tenants"},
		{ada, secret, `{}`, now, policy.Allow, "reads"},
		{ada, refund, `{"amount":100}`, now, policy.Allow, "ops refund"},
		{ada, refund, `{"amount":101,"note":null,"lines":[{"price":1.25}]}`, now, policy.Approve, "large refunds"},
		{eve, refund, `{"amount":1}`, now, policy.Deny, policy.ByDefault},
		{ada, refund, `{}`, now, policy.Deny, "large refunds"}, // no such attribute: Cedar would skip the policy
		{ada, refund, `{"amount":"1"}`, now, policy.Deny, "large refunds"},
		{ada, refund, `{"amount":1.5}`, now, policy.Deny, "large refunds"}, // a decimal is not compared with a whole number
		{ada, refund, `[`, now, policy.Deny, "cedar"},
		{ada, report, `{}`, now, policy.Deny, policy.ByDefault},
		{ada, report, `{}`, now.AddDate(1, 0, 0), policy.Allow, "weekly"},
	} {
		d := p.Decide(t.Context(), &policy.Input{Principal: tt.who, Capability: tt.c, Args: jsontext.Value(tt.args), Now: tt.now})
		failed := d.Cause() != nil && d.Verdict == policy.Deny && (tt.rule == "large refunds" || tt.rule == "cedar") // which of two failed first is not said
		if d.Verdict != tt.want || d.Rule != tt.rule && !failed {
			t.Errorf("%s %s: got %v by %q (%v), want %v by %q", policy.NameOf(tt.c), tt.args, d.Verdict, d.Rule, d.Cause(), tt.want, tt.rule)
		}
	}
	if d := p.Decide(t.Context(), &policy.Input{Principal: eve, Capability: secret, Now: now}); d.Reason != "it is acme's" {
		t.Errorf("the reason is %q", d.Reason)
	}
}

// Lists show what may be allowed, whatever the arguments will be, and nothing else.
func TestVisible(t *testing.T) {
	all := []*call.Capability{refund, list, secret, report, page}
	names := func(p *Policies, who *call.Principal) string {
		seen, err := p.Visible(t.Context(), who, all, now)
		if err != nil {
			t.Fatal(err)
		}
		var out []string
		for _, c := range all {
			if seen[c] {
				out = append(out, policy.NameOf(c))
			}
		}
		return strings.Join(out, " ")
	}
	for _, tt := range []struct {
		p    *Policies
		who  *call.Principal
		want string
	}{
		{parse(t, "test"), ada, "refund list secret kb://page/one"},
		{parse(t, "test"), eve, "list kb://page/one"},
		{parse(t, "frozen"), ada, "list secret kb://page/one"},
		{parse(t, "test"), nil, "list kb://page/one"},
	} {
		if got := names(tt.p, tt.who); got != tt.want {
			t.Errorf("%v sees %q, want %q", tt.who, got, tt.want)
		}
	}
}

func TestParse(t *testing.T) {
	for text, want := range map[string]string{
		"permit (principal, action);":                         "rules.cedar",
		"permit (principal, action, resource)\nwhen { 1 + };": "2",
		"@id(\"x\") permit (principal, action, resource);\n@id(\"x\") forbid (principal, action, resource);": "rules.cedar:2: the name \"x\" is taken",
	} {
		if _, err := Parse("", File{"rules.cedar", []byte(text)}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", text, err)
		}
	}
}

func FuzzDecide(f *testing.F) {
	f.Add(`permit (principal, action, resource) when { context.args.a.b like "*x*" };`, `{"a":{"b":"x"}}`)
	f.Add(`forbid (principal, action, resource) unless { context.args has a };`, `{"a":[1,2.5,1e999,null,true]}`)
	f.Fuzz(func(t *testing.T, text, args string) {
		p, err := Parse("", File{"f", []byte(text)})
		if err != nil {
			return
		}
		d := p.Decide(t.Context(), &policy.Input{Principal: ada, Capability: refund, Args: jsontext.Value(args), Now: now})
		if d.Cause() != nil && d.Verdict != policy.Deny {
			t.Fatalf("%q: what failed does not deny", text)
		}
		if _, err := p.Visible(t.Context(), ada, []*call.Capability{refund, page}, now); err != nil {
			t.Skip(err)
		}
	})
}
