package assembly

import (
	"context"
	"fmt"
	"net/http"
	"sync/atomic"
	"testing"

	"github.com/modelcontextprotocol/go-sdk/mcp"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/policy"
)

// byToken knows callers by their tokens, which are roles.
type byToken struct{}

// Verify implements authenticate.Verifier.
func (byToken) Verify(_ context.Context, c call.Credential) (*call.Principal, error) {
	if c.Known != nil {
		return c.Known, nil
	}
	if c.Bearer == "" {
		return nil, call.Errorf(call.Unauthenticated, "no token")
	}
	return &call.Principal{ID: c.Bearer, Roles: []string{c.Bearer}, Scopes: []string{"*"}}, nil
}

// bearing adds a token to requests.
type bearing string

// RoundTrip implements http.RoundTripper.
func (b bearing) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Header.Set("Authorization", "Bearer "+string(b))
	return http.DefaultTransport.RoundTrip(r)
}

// A policy that shows a caller another list is told to that caller, in every revision, and to nobody
// who is shown the same as before.
func TestListsChangedForWhomTheyDid(t *testing.T) {
	// To the witness every policy shows another list: when it has heard, all have been told what there is
	// to tell. Without it the SDK would make one announcement of two.
	steps := 0
	ruled := func(rules ...policy.Rule) *policy.Policy {
		t.Helper()
		if steps++; steps%2 == 0 {
			rules = append(rules, policy.Rule{Then: "deny", Tools: []string{"which"}, Roles: []string{"witness"}})
		}
		for i := range rules {
			rules[i].Name = fmt.Sprint(i)
		}
		p, problems := policy.Compile(policy.Set{Rules: rules})
		if problems != nil {
			t.Fatal(problems)
		}
		return p
	}
	everything := policy.Rule{Then: "allow"}
	b := &versioned{}
	with := func(p *policy.Policy, more ...call.Backend) *Options {
		return &Options{Backends: append([]call.Backend{b}, more...), Policy: p, Identity: byToken{}}
	}
	extra := renamed{&versioned{}}
	l := newLive(t, with(ruled(everything), extra))
	url := serveLive(t, l) + "/mcp"

	type listening struct{ session, stream atomic.Int64 }
	heard := map[string]*listening{"admin": {}, "user": {}, "witness": {}}
	for role, n := range heard {
		client := &http.Client{Transport: bearing(role)}
		s, err := mcp.NewClient(&mcp.Implementation{Name: "t", Version: "1"}, &mcp.ClientOptions{
			ToolListChangedHandler: func(context.Context, *mcp.ToolListChangedRequest) { n.session.Add(1) },
		}).Connect(t.Context(), &mcp.StreamableClientTransport{Endpoint: url, HTTPClient: client}, &mcp.ClientSessionOptions{ProtocolVersion: "2025-11-25"})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = s.Close() })
		if _, err := s.ListTools(t.Context(), nil); err != nil {
			t.Fatal(err)
		}
		messages := subscribedBy(t, client, url)
		if m := <-messages; m != call.Acknowledged {
			t.Fatal(m)
		}
		go func() {
			for m := range messages {
				if m == "notifications/tools/list_changed" {
					n.stream.Add(1)
				}
			}
		}()
	}
	until(t, "nobody listens", func() bool { return l.House().main().place.hub.Listeners() > 3 })
	admin, user, witness := int64(0), int64(0), int64(0)
	step := func(what string, o *Options, toAdmin, toUser bool) {
		t.Helper()
		if err := l.Replace(t.Context(), o, nil); err != nil {
			t.Fatal(err)
		}
		if toAdmin {
			admin++
		}
		if toUser {
			user++
		}
		witness++
		until(t, what+": who was shown another list does not hear of it", func() bool {
			return heard["admin"].session.Load() >= admin && heard["admin"].stream.Load() >= admin && heard["user"].session.Load() >= user && heard["user"].stream.Load() >= user &&
				heard["witness"].session.Load() >= witness && heard["witness"].stream.Load() >= witness
		})
	}
	hidden := policy.Rule{Then: "deny", Tools: []string{"another"}, Roles: []string{"admin"}}
	step("hidden from one", with(ruled(hidden, everything), extra), true, false)
	step("the same in other words", with(ruled(policy.Rule{Then: "deny", Tools: []string{"another"}, When: "'admin' in principal.roles"}, everything), extra), false, false)
	step("a rule about no one", with(ruled(hidden, everything, policy.Rule{Then: "deny", Tools: []string{"nothing"}}), extra), false, false)
	step("a tool that one does not see goes", with(ruled(hidden, everything)), false, true)
	step("and comes", with(ruled(hidden, everything), extra), false, true)
	step("shown again", with(ruled(everything), extra), true, false)
	step("it goes", with(ruled(everything)), true, true) // what was sent before has arrived by then
	for role, want := range map[string]int64{"admin": admin, "user": user, "witness": witness} {
		if s, m := heard[role].session.Load(), heard[role].stream.Load(); s != want || m != want {
			t.Errorf("%s heard %d times in the session and %d in the stream, want %d", role, s, m, want)
		}
	}
}
