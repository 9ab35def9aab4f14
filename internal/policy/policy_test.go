package policy

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
)

func compiled(t testing.TB, s Set) *Policy {
	t.Helper()
	p, problems := Compile(s)
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	return p
}

func tool(name string, effect call.Effect, scopes ...string) *call.Capability {
	return &call.Capability{Kind: call.Tool, Name: name, Effect: effect, Scopes: scopes}
}

var ada = &call.Principal{ID: "ada", Tenant: "acme", Scopes: []string{"orders:read"}, Roles: []string{"ops"}}

func TestDecide(t *testing.T) {
	rules := []Rule{
		{Name: "all reads", Then: "allow", Effects: []string{"read"}},
		{Name: "ops refund", Then: "allow", Tools: []string{"refund*"}, Roles: []string{"ops"}, When: "args.amount <= 1000"},
		{Name: "large refunds", Then: "require_approval", Tools: []string{"refund*"}, When: "args.amount > 100"},
		{Name: "never on Sunday", Then: "deny", Tools: []string{"refund*"}, When: "now.getDayOfWeek() == 0", Reason: "not on Sunday"},
		{Name: "other tenants", Then: "deny", Tools: []string{"secret_*", "kb://secret/*"}, When: "principal.tenant != 'acme'"},
	}
	p := compiled(t, Set{Rules: rules})
	monday, sunday := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC), time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)
	eve := &call.Principal{ID: "eve", Tenant: "other"}
	for _, tt := range []struct {
		who  *call.Principal
		c    *call.Capability
		args string
		now  time.Time
		want Verdict
		rule string
	}{
		{ada, tool("list", call.Read), `{}`, monday, Allow, "all reads"},
		{ada, tool("list", call.Read, "orders:read"), `{}`, monday, Allow, "all reads"},
		{ada, tool("list", call.Read, "orders:write"), `{}`, monday, Deny, ByScopes},
		{&call.Principal{ID: "x"}, tool("list", call.Read, "orders:read"), `{}`, monday, Deny, ByScopes},
		{nil, tool("refund_payment", call.Write), `{"amount":5}`, monday, Deny, ByDefault}, // nobody has no role
		{ada, tool("drop", call.Destructive), `{}`, monday, Deny, ByDefault},
		{ada, tool("drop", call.Unknown), `{}`, monday, Deny, ByDefault},
		{ada, tool("refund_payment", call.Write), `{"amount":50}`, monday, Allow, "ops refund"},
		{ada, tool("refund_payment", call.Write), `{"amount":500}`, monday, Approve, "large refunds"},
		{ada, tool("refund_payment", call.Write), `{"amount":50}`, sunday, Deny, "never on Sunday"},
		{ada, tool("refund_payment", call.Write), `{}`, monday, Deny, "large refunds"},             // no such key: an error denies
		{ada, tool("refund_payment", call.Write), `{"amount":"x"}`, monday, Deny, "large refunds"}, // nor can text be compared
		{ada, tool("refund_payment", call.Write), `{"amount":99.5}`, monday, Allow, "ops refund"},  // fractions
		{eve, tool("refund_payment", call.Write), `{"amount":5}`, monday, Deny, ByDefault},         // not of the role
		{eve, tool("secret_plan", call.Read), `{}`, monday, Deny, "other tenants"},
		{ada, tool("secret_plan", call.Read), `{}`, monday, Allow, "all reads"},
		{eve, &call.Capability{Kind: call.Resource, URI: "kb://secret/a/b"}, `{}`, monday, Deny, "other tenants"},
		{eve, &call.Capability{Kind: call.Resource, URI: "kb://open/a"}, `{}`, monday, Allow, "all reads"},
	} {
		d := p.Decide(t.Context(), &Input{Principal: tt.who, Capability: tt.c, Args: jsontext.Value(tt.args), Now: tt.now})
		if d.Verdict != tt.want || d.Rule != tt.rule {
			t.Errorf("%s %s: got %v by %q (%v), want %v by %q", NameOf(tt.c), tt.args, d.Verdict, d.Rule, d.Cause(), tt.want, tt.rule)
		}
	}
	d, looks := p.Explain(t.Context(), &Input{Principal: ada, Capability: tool("refund_payment", call.Write), Args: jsontext.Value(`{"amount":50}`), Now: monday})
	if d.Verdict != Allow || len(looks) != 5 || looks[0].Matched != "no" || looks[0].Why == "" || looks[len(looks)-1].Matched != "yes" {
		t.Errorf("explained: %+v %+v", d, looks)
	}
}

// wants is a decider of another language that wants an approval of everything.
type wants struct{ Decider }

func (wants) Decide(context.Context, *Input) Decision {
	return Decision{Verdict: Approve, Rule: "elsewhere"}
}

// A rule says who approves; what it says makes sense, or it is not compiled; and approvals are bound
// to everything that decides.
func TestTerms(t *testing.T) {
	pay := &Input{Capability: tool("pay", call.Write)}
	rule := Rule{Name: "pay", Then: "require_approval", Approvers: []string{"boss"}}
	p := compiled(t, Set{Rules: []Rule{rule}, Also: []Decider{wants{}}})
	if d := p.Decide(t.Context(), pay); d.Rule != "pay" || d.Terms.Count != 1 || d.Terms.Expires != DefaultExpires || d.Terms.Self || len(d.Terms.Approvers) != 1 {
		t.Errorf("got %+v", d)
	}
	p = compiled(t, Set{Rules: []Rule{{Name: "all", Then: "allow"}}, Also: []Decider{wants{}}})
	if d := p.Decide(t.Context(), pay); d.Verdict != Approve || d.Rule != "elsewhere" || d.Terms.Approvers != nil {
		t.Errorf("got %+v", d)
	}
	for what, change := range map[string]func(r *Rule){
		"count below":    func(r *Rule) { r.Count = -1 },
		"count above":    func(r *Rule) { r.Count = MaxCount + 1 },
		"expires below":  func(r *Rule) { r.Expires = -1 },
		"expires above":  func(r *Rule) { r.Expires = MaxExpires + 1 },
		"an empty role":  func(r *Rule) { r.Approvers = []string{""} },
		"of another":     func(r *Rule) { r.Then = "allow" },
		"self of a deny": func(r *Rule) { *r = Rule{Name: "pay", Then: "deny", Self: true} },
	} {
		bad := rule
		change(&bad)
		if _, problems := Compile(Set{Rules: []Rule{bad}}); len(problems) != 1 {
			t.Errorf("%s: %v", what, problems)
		}
	}
	seen := map[string]bool{}
	for _, s := range []Set{
		{}, {ReadOnly: true}, {Environment: "x"}, {Rules: []Rule{rule}}, {Rules: []Rule{rule, {Name: "b", Then: "allow"}}},
		{Rules: []Rule{{Name: "pay", Then: "require_approval", Approvers: []string{"boss"}, Count: 2}}}, {Rules: []Rule{rule}, Also: []Decider{wants{}}},
	} {
		v := compiled(t, s).Version()
		if seen[v] || v != compiled(t, s).Version() {
			t.Errorf("%+v has the version %s", s, v)
		}
		seen[v] = true
	}
}

func TestModes(t *testing.T) {
	everything := []Rule{{Name: "all", Then: "allow"}}
	named := []Rule{{Name: "wipe", Then: "allow", Tools: []string{"wipe_*"}}}
	for name, tt := range map[string]struct {
		set  Set
		c    *call.Capability
		want Verdict
		rule string
	}{
		"no rules":                      {Set{}, tool("x", call.Destructive), Allow, ByDefault},
		"read-only, a read":             {Set{ReadOnly: true}, tool("x", call.Read), Allow, ByDefault},
		"read-only, a write":            {Set{ReadOnly: true}, tool("x", call.Write), Deny, ByReadOnly},
		"read-only, nobody said":        {Set{ReadOnly: true}, tool("x", call.Unknown), Deny, ByReadOnly},
		"read-only, a resource":         {Set{ReadOnly: true}, &call.Capability{Kind: call.Resource, URI: "x:y"}, Allow, ByDefault},
		"destructive":                   {Set{Rules: everything}, tool("wipe_disk", call.Destructive), Allow, "all"},
		"destructive in production":     {Set{Rules: everything, Environment: Production}, tool("wipe_disk", call.Destructive), Deny, ByDefault},
		"named in production":           {Set{Rules: named, Environment: Production}, tool("wipe_disk", call.Destructive), Allow, "wipe"},
		"* names nothing in production": {Set{Rules: []Rule{{Name: "a", Then: "allow", Tools: []string{"*"}}}, Environment: Production}, tool("wipe_disk", call.Unknown), Deny, ByDefault},
		"write in production":           {Set{Rules: everything, Environment: Production}, tool("save", call.Write), Allow, "all"},
	} {
		if d := compiled(t, tt.set).Decide(t.Context(), &Input{Principal: ada, Capability: tt.c}); d.Verdict != tt.want || d.Rule != tt.rule {
			t.Errorf("%s: got %v by %q, want %v by %q", name, d.Verdict, d.Rule, tt.want, tt.rule)
		}
	}
}

func TestBadRules(t *testing.T) {
	for want, r := range map[string]Rule{
		"then must be":         {Then: "perhaps"},
		"line 1, column 10":    {Then: "deny", When: "principal.nme == 'x'"},
		"undeclared reference": {Then: "deny", When: "principle.id == 'x'"},
		"Syntax error":         {Then: "deny", When: "principal.id =="},
		"true or false":        {Then: "deny", When: "principal.id"},
		"is not a pattern":     {Then: "deny", Tools: []string{"["}},
		"kinds are":            {Then: "deny", Kinds: []string{"x"}},
		"effects are":          {Then: "deny", Effects: []string{"x"}},
		"no matching overload": {Then: "deny", When: "principal.id > 7"},
		"the name is taken":    {Name: ByDefault, Then: "deny"},
		"expression code point size exceeds limit": {Then: "deny", When: strings.Repeat("true || ", 1000) + "true"},
	} {
		_, problems := Compile(Set{Rules: []Rule{r}})
		if len(problems) != 1 || !strings.Contains(problems[0].Error(), want) {
			t.Errorf("%+v: got %v, want %q", r, problems, want)
		}
	}
}

// A condition that would run for ever is stopped, and denies.
func TestCostIsBounded(t *testing.T) {
	bomb := "[1,2,3,4,5,6,7,8,9,10].all(a, [1,2,3,4,5,6,7,8,9,10].all(b, [1,2,3,4,5,6,7,8,9,10].all(c, [1,2,3,4,5,6,7,8,9,10].all(d, [1,2,3,4,5,6,7,8,9,10].all(e, [1,2,3,4,5,6,7,8,9,10].all(f, a+b+c+d+e+f+size(args) > 0))))))"
	p := compiled(t, Set{Rules: []Rule{{Name: "bomb", Then: "allow", When: bomb}}})
	began := time.Now()
	d := p.Decide(t.Context(), &Input{Principal: ada, Capability: tool("x", call.Read), Args: jsontext.Value(`{}`)})
	if d.Verdict != Deny || d.Cause() == nil || !strings.Contains(d.Cause().Error(), "cost") {
		t.Errorf("got %v, %v", d.Verdict, d.Cause())
	}
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("it took %v", took)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if d := p.Decide(ctx, &Input{Principal: ada, Capability: tool("x", call.Read), Args: jsontext.Value(`{}`)}); d.Verdict != Deny {
		t.Errorf("after its caller went away: %v", d.Verdict)
	}
}

// What takes as long as its arguments are large can be stopped; the rest is too short for that.
func TestShortConditions(t *testing.T) {
	for when, short := range map[string]bool{
		"args.text.size() > 1000":                              true,
		"principal.tenant == 'acme' && 'admin' in ['a', 'b']":  true,
		"args.a == 1 || args.b == 2":                           true,
		"args.items.all(i, i > 0)":                             false,
		"args.items.exists(i, args.others.exists(o, o == i))":  false,
		"[1, 2, 3].all(a, [1, 2, 3, 4].exists(b, a + b == 3))": true,
	} {
		if r := compiled(t, Set{Rules: []Rule{{Name: "r", Then: "allow", When: when}}}).rules[0]; r.short != short {
			t.Errorf("%s: short is %v", when, r.short)
		}
	}
}

// What a list hides, no arguments can make callable; what a list shows may be refused.
func TestListsNeverHideWhatIsCallable(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2)) //nolint:gosec // a test that repeats
	conditions := []string{"", "args.n > 5", "args.n <= 5", "has(args.n) && args.n == 3", "principal.tenant == 'acme'", "principal.tenant == 'acme' && args.n > 2", "principal.tenant != 'acme' || args.n > 7", "args.s.startsWith('a')", "'admin' in principal.roles"}
	hidden := 0
	for i := range 400 {
		var s Set
		for j := range 1 + random.IntN(4) {
			s.Rules = append(s.Rules, Rule{Name: fmt.Sprint(j), Then: verdictNames[random.IntN(3)], When: conditions[random.IntN(len(conditions))]})
		}
		p := compiled(t, s)
		who := &call.Principal{Tenant: []string{"acme", "other"}[random.IntN(2)], Roles: []string{[]string{"admin", "ops"}[random.IntN(2)]}}
		c := tool("x", call.Read)
		if p.Visible(t.Context(), who, c, time.Now()) {
			continue
		}
		hidden++
		for n := range 12 {
			d := p.Decide(t.Context(), &Input{Principal: who, Capability: c, Args: jsontext.Value(fmt.Sprintf(`{"n":%d,"s":"a%d"}`, n, n))})
			if d.Verdict != Deny {
				t.Fatalf("set %d: hidden, but a call with n=%d is %v by %q: %+v", i, n, d.Verdict, d.Rule, s.Rules)
			}
		}
	}
	if hidden < 20 {
		t.Errorf("only %d sets hid anything: the test shows nothing", hidden)
	}
}

func TestRun(t *testing.T) {
	p := compiled(t, Set{Rules: []Rule{{Name: "small", Then: "allow", Tools: []string{"pay"}, When: "args.amount < 10"}}})
	for _, tt := range []struct {
		test Test
		want string
	}{
		{Test{Tool: "pay", Kind: "tool", Effect: "write", Args: `{"amount":5}`, Want: "allow"}, ""},
		{Test{Tool: "pay", Kind: "tool", Effect: "write", Args: `{"amount":50}`, Want: "deny", Rule: ByDefault}, ""},
		{Test{Tool: "pay", Kind: "tool", Effect: "write", Args: `{"amount":50}`, Want: "allow"}, "want allow, got deny"},
		{Test{Tool: "pay", Kind: "tool", Effect: "write", Args: `{"amount":5}`, Want: "allow", Rule: "other"}, `got "small"`},
		{Test{Tool: "pay", Kind: "tool", Effect: "write", Args: `[`, Want: "deny"}, "not a JSON object"},
		{Test{Tool: "pay", Kind: "tool", Effect: "write", Args: `{}`, Want: "allow"}, "no such key"},
	} {
		err := p.Run(t.Context(), &tt.test, time.Now())
		if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%+v: got %v, want %q", tt.test, err, tt.want)
		}
	}
}

func FuzzCondition(f *testing.F) {
	for _, s := range []string{"true", "args.a.b.c == 1", "principal.scopes.exists(s, s == 'x')", "args['x'][0] > now", "1/0 == 1", "capability.name.matches('(a+)+$')", "size(args) > 0 && args.all(k, args[k] == k)"} {
		f.Add(s, `{"a":1}`)
	}
	f.Fuzz(func(t *testing.T, when, args string) {
		p, problems := Compile(Set{Rules: []Rule{{Name: "r", Then: "allow", When: when}}})
		if len(problems) > 0 {
			return
		}
		in := &Input{Principal: ada, Capability: tool("x", call.Read), Args: jsontext.Value(args)}
		if !in.Args.IsValid() || in.Args.Kind() != '{' {
			return
		}
		if d := p.Decide(t.Context(), in); d.Cause() != nil && d.Verdict != Deny {
			t.Fatalf("%q: an error does not deny", when)
		}
		p.Visible(t.Context(), ada, in.Capability, time.Now())
	})
}

func BenchmarkDecide(b *testing.B) {
	rules := []Rule{{Name: "all reads", Then: "allow", Effects: []string{"read"}}}
	for i := range 49 {
		rules = append(rules, Rule{Name: fmt.Sprint(i), Then: "deny", Tools: []string{fmt.Sprintf("tool_%d_*", i)}})
	}
	plain := compiled(b, Set{Rules: rules})
	withCEL := compiled(b, Set{Rules: append(rules, Rule{Name: "cel", Then: "deny", When: "args.amount > 100"})})
	in := &Input{Principal: ada, Capability: tool("list", call.Read, "orders:read"), Args: jsontext.Value(`{"amount":5,"customer":"x"}`), Now: time.Now()}
	for name, p := range map[string]*Policy{"50 rules": plain, "50 rules and a condition": withCEL} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				p.Decide(b.Context(), in)
			}
		})
	}
}
