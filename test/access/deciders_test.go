package access

import (
	"context"
	"errors"
	"net/http"
	"strings"
	"testing"
	"time"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/policy"
	"newel.dev/newel/internal/policy/cedar"
)

// Policies in another language hide, deny and ask for approval like rules do, in lists and calls.
func TestPoliciesInCedar(t *testing.T) {
	p, err := cedar.Parse("", cedar.File{Name: "access.cedar", Text: []byte(`
		permit (principal, action, resource) when { resource.effect == "read" };
		permit (principal in Role::"admin", action, resource == Tool::"admin");
		forbid (principal, action, resource == Tool::"read") when { context.args has n && context.args.n > 10 };
	`)})
	if err != nil {
		t.Fatal(err)
	}
	w := startSet(t, nil, policy.Set{Also: []policy.Decider{p}})
	alice, eve := w.token("alice", "a:read", "a:admin"), w.token("eve", "a:read", "a:admin")
	if r := w.stateless(eve, "tools/list", "", ""); strings.Contains(r.body, `"admin"`) || !strings.Contains(r.body, `"read"`) {
		t.Errorf("eve's list: %s", r.body)
	}
	if r := w.stateless(alice, "tools/list", "", ""); !strings.Contains(r.body, `"admin"`) {
		t.Errorf("alice's list: %s", r.body)
	}
	hidden, absent := w.stateless(eve, "tools/call", "admin", `{"n":"of the wrong type"}`), w.stateless(eve, "tools/call", "other", "{}")
	if strings.ReplaceAll(hidden.body, "admin", "other") != absent.body {
		t.Errorf("hidden: %s\nabsent: %s", hidden.body, absent.body)
	}
	if r := w.stateless(alice, "tools/call", "admin", "{}"); !strings.Contains(r.body, "admin for alice") {
		t.Errorf("%+v", r)
	}
	if r := w.stateless(alice, "tools/call", "read", `{"n":11}`); !strings.Contains(r.body, `"code":-31403`) {
		t.Errorf("forbidden arguments: %+v", r)
	}
	if r := w.stateless(alice, "tools/call", "read", `{"n":10}`); !strings.Contains(r.body, "read for alice") {
		t.Errorf("%+v", r)
	}
}

// away is a decider that cannot be asked.
type away struct{}

func (away) Decide(context.Context, *policy.Input) policy.Decision {
	return policy.Failed("away", errors.New("connection refused"))
}

func (away) Visible(context.Context, *call.Principal, []*call.Capability, time.Time) (map[*call.Capability]bool, error) {
	return nil, errors.New("connection refused")
}

// While a policy cannot be asked nothing passes, and a list says so instead of being empty.
func TestPolicyAway(t *testing.T) {
	w := startSet(t, nil, policy.Set{Also: []policy.Decider{away{}}})
	alice := w.token("alice", "a:read")
	for _, r := range []response{w.stateless(alice, "tools/list", "", ""), w.stateless(alice, "tools/call", "open", "{}")} {
		if strings.Contains(r.body, `"tools":[`) || strings.Contains(r.body, "open for") || strings.Contains(r.body, "connection refused") || !strings.Contains(r.body, "try again in a moment") {
			t.Errorf("%+v", r)
		}
	}
	if r := w.stateless(alice, "server/discover", "", ""); r.status != http.StatusOK {
		t.Errorf("%+v", r)
	}
}
