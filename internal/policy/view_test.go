package policy

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"newel.dev/newel/call"
)

// Callers of one key are shown the same and may call the same; every caller is shown what it may call.
func TestViewKey(t *testing.T) {
	random := rand.New(rand.NewPCG(3, 4)) //nolint:gosec // a test that repeats
	some := func(of ...string) (out []string) {
		for _, o := range of {
			if random.IntN(2) == 0 {
				out = append(out, o)
			}
		}
		return out
	}
	pick := func(of ...string) string { return of[random.IntN(len(of))] }
	conditions := []string{
		"", "principal.id == 'ada'", "principal.client == 'x'", "'admin' in principal.roles", "principal.scopes.exists(s, s == 'a b')", "principal.tenant.startsWith('ac')",
		"size(principal.roles) > 1 && capability.name != 'b'", "[principal].exists(p, p.id == 'eve')", "environment == ''", "has(principal.id) && principal.scopes[0] == 'a'",
	}
	all := []*call.Capability{tool("a", call.Read), tool("b", call.Write), tool("c", call.Read, "a"), tool("d", call.Read, "a", "b")}
	shared, differ := 0, 0
	for i := range 300 {
		var s Set
		for j := range random.IntN(4) {
			s.Rules = append(s.Rules, Rule{
				Name: fmt.Sprint(j), Then: verdictNames[random.IntN(3)], When: pick(conditions...),
				Tenants: some("acme"), Roles: some("admin"), Tools: some("a", "b", "c"),
			})
		}
		p := compiled(t, s)
		seen := map[string][]bool{}
		for range 40 {
			who := &call.Principal{ID: pick("ada", "eve"), Tenant: pick("acme", "other", "acme\x01"), Client: pick("x", "y"),
				Scopes: slices.Concat(some("a", "b"), some("a b", "*")), Roles: some("admin", "ops", "admin ops")}
			var shown []bool
			for _, c := range all {
				visible := p.Visible(t.Context(), who, c, time.Now())
				if callable := p.Decide(t.Context(), &Input{Principal: who, Capability: c, Now: time.Now()}).Verdict != Deny; callable != visible {
					t.Fatalf("set %d: %s is shown %v and callable %v to %+v: %+v", i, c.Name, visible, callable, who, s.Rules)
				}
				shown = append(shown, visible)
			}
			k := p.ViewKey(who)
			if k == "" {
				t.Fatalf("set %d: nobody shares %+v", i, s.Rules)
			}
			if before, ok := seen[k]; ok {
				shared++
				if !slices.Equal(before, shown) {
					t.Fatalf("set %d: two callers of one key are shown different lists: %+v, %+v", i, who, s.Rules)
				}
			}
			seen[k] = shown
		}
		differ += len(seen)
	}
	if shared < 1000 || differ < 1000 {
		t.Errorf("%d shared, %d different: the test shows nothing", shared, differ)
	}
}

// A key is made of what the rules read, and of no more.
func TestViewKeyIsNarrow(t *testing.T) {
	ada := &call.Principal{ID: "ada", Tenant: "acme", Client: "x", Scopes: []string{"a"}, Roles: []string{"admin"}}
	for _, tt := range []struct {
		rule  Rule
		other call.Principal
		same  bool
	}{
		{Rule{}, call.Principal{ID: "eve", Tenant: "other", Client: "y", Scopes: []string{"a"}}, true},
		{Rule{}, call.Principal{ID: "ada", Tenant: "acme", Client: "x", Scopes: []string{"b"}, Roles: []string{"admin"}}, false},
		{Rule{Tenants: []string{"acme"}}, call.Principal{ID: "eve", Tenant: "acme", Scopes: []string{"a"}}, true},
		{Rule{Tenants: []string{"acme"}}, call.Principal{ID: "ada", Tenant: "other", Client: "x", Scopes: []string{"a"}, Roles: []string{"admin"}}, false},
		{Rule{When: "principal.id == 'ada'"}, call.Principal{ID: "ada", Tenant: "other", Scopes: []string{"a"}}, true},
		{Rule{When: "principal.id == 'ada'"}, call.Principal{ID: "eve", Tenant: "acme", Client: "x", Scopes: []string{"a"}, Roles: []string{"admin"}}, false},
		{Rule{When: "[principal].all(p, true)"}, call.Principal{ID: "ada", Tenant: "acme", Client: "y", Scopes: []string{"a"}, Roles: []string{"admin"}}, false},
	} {
		tt.rule.Name, tt.rule.Then = "r", "allow"
		p := compiled(t, Set{Rules: []Rule{tt.rule}})
		if got := p.ViewKey(ada) == p.ViewKey(&tt.other); got != tt.same {
			t.Errorf("%+v, %+v: the same %v", tt.rule, tt.other, got)
		}
	}
	if k := compiled(t, Set{Rules: []Rule{{Name: "r", Then: "allow", When: "now > timestamp('2026-01-01T00:00:00Z')"}}}).ViewKey(ada); k != "" {
		t.Errorf("the time is no part of a key: %q", k)
	}
}
