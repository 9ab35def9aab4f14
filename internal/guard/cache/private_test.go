package cache_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/guard/cache"
)

func everybody(names ...string) cache.Options {
	return cache.Options{Rules: []cache.Rule{{Names: names, TTL: time.Minute, For: cache.Everybody}}}
}

// A rule cannot make a result good for others: what depends on who is calling, and what turns out to
// be one caller's alone, is that caller's.
func TestNeverWiderThanItIsGood(t *testing.T) {
	mine := &call.Capability{Kind: call.Tool, Name: "search_mine", Effect: call.Read}
	for name, tt := range map[string]struct {
		target *call.Capability
		next   func(*call.Call) (*call.Result, error)
	}{
		"it depends on the caller": {mine, nil},
		"the server says private": {search, func(*call.Call) (*call.Result, error) {
			return &call.Result{Content: call.TextContent("x"), Private: true}, nil
		}},
		"it links to what is the caller's": {search, func(c *call.Call) (*call.Result, error) {
			c.Event.Paged = true
			return call.Text("see"), nil
		}},
	} {
		for _, who := range []string{cache.Tenant, cache.Everybody} {
			w := newWorld(t, cache.Options{Rules: []cache.Rule{{Names: []string{"*"}, TTL: time.Minute, For: who}}})
			w.next = tt.next
			for i, c := range []struct {
				id   string
				want bool
			}{{"ada", false}, {"bob", false}, {"ada", true}, {"bob", true}, {"eve", false}} {
				if _, cached := w.send(by(c.id, "acme", tt.target, `{}`)); cached != c.want {
					t.Errorf("%s, kept for the %s, call %d of %s: cached %v", name, who, i, c.id, cached)
				}
			}
		}
	}
}

// The same person with fewer rights is somebody else to what looks at rights.
func TestRightsAreOfTheCaller(t *testing.T) {
	mine := &call.Capability{Kind: call.Tool, Name: "search_mine", Effect: call.Read}
	w := newWorld(t, cache.Options{Rules: []cache.Rule{{Names: []string{"*"}, TTL: time.Minute}}})
	for i, p := range []call.Principal{
		{ID: "ada", Scopes: []string{"a", "b"}}, {ID: "ada", Scopes: []string{"a b"}}, {ID: "ada", Scopes: []string{"a"}},
		{ID: "ada", Scopes: []string{"a"}, Roles: []string{"admin"}}, {ID: "ada", Client: "x", Scopes: []string{"a"}},
	} {
		c := by("", "", mine, `{}`)
		c.Principal = &p
		if _, cached := w.send(c); cached {
			t.Errorf("caller %d is given what another one got", i)
		}
	}
}

// What goes on to another server beside the arguments tells calls apart there, and only there.
func TestWhatGoesOnIsPartOfTheQuestion(t *testing.T) {
	beyond := &call.Capability{Kind: call.Tool, Name: "search_beyond", Effect: call.Read, Depends: call.OnRequest}
	changes := map[string]func(*call.Call){
		"meta":         func(c *call.Call) { c.Meta = jsontext.Value(`{"com.example/locale":"de"}`) },
		"unknown":      func(c *call.Call) { c.Unknown = jsontext.Value(`{"locale":"de"}`) },
		"capabilities": func(c *call.Call) { c.Client.ElicitForm = true },
		"extensions":   func(c *call.Call) { c.Client.Raw = jsontext.Value(`{"extensions":{"ui":{}}}`) },
	}
	for name, change := range changes {
		for target, want := range map[*call.Capability]bool{beyond: false, search: true} {
			w := newWorld(t, everybody("*"))
			w.send(by("ada", "acme", target, `{}`))
			c := by("bob", "acme", target, `{}`)
			change(c)
			if _, cached := w.send(c); cached != want {
				t.Errorf("%s of %s: cached %v", name, target.Name, cached)
			}
		}
	}
}

// Random callers ask a handler that answers by whatever its capability says it may: nobody ever gets
// an answer that it would not have got itself.
func TestNobodyGetsAnothersAnswer(t *testing.T) {
	random := rand.New(rand.NewPCG(7, 11)) //nolint:gosec // a test that repeats
	pick := func(of ...string) string { return of[random.IntN(len(of))] }
	hits := 0
	for round := range 60 {
		target := &call.Capability{Kind: call.Tool, Name: "t", Effect: call.Read, Depends: call.Dependence(random.IntN(3))} //nolint:gosec // below 3
		truth := func(c *call.Call) string {
			s := string(c.Args)
			if target.Depends != call.OnArguments {
				s += string(c.Meta)
			}
			if target.Depends == call.OnCaller {
				s += fmt.Sprintf("%+v", *c.Principal)
			}
			return s
		}
		w := newWorld(t, cache.Options{Rules: []cache.Rule{{Names: []string{"*"}, TTL: time.Minute, For: pick(cache.Caller, cache.Tenant, cache.Everybody)}}})
		w.next = func(c *call.Call) (*call.Result, error) { return call.Text(truth(c)), nil }
		for range 80 {
			c := by(pick("a", "b"), pick("x", "y"), target, pick(`{"n":1}`, `{"n":2}`))
			c.Principal.Scopes = []string{pick("r", "w")}
			if random.IntN(2) == 0 {
				c.Meta = jsontext.Value(pick(`{"l":"de"}`, `{"l":"fr"}`))
			}
			got, cached := w.send(c)
			if want := string(call.TextContent(truth(c))); got != want {
				t.Fatalf("round %d, %v: got %s, want %s", round, target.Depends, got, want)
			}
			if cached {
				hits++
			}
		}
	}
	if hits < 500 {
		t.Errorf("only %d answers were kept ones: the test shows nothing", hits)
	}
}

// An update of a resource drops what is kept of it at once, and answers that are made of it; nothing else.
func TestUpdated(t *testing.T) {
	kb := &call.Capability{Kind: call.Tool, Name: "search_kb", Effect: call.Read, Depends: call.OnArguments, Reads: "kb://"}
	report := &call.Capability{Kind: call.Tool, Name: "report", Effect: call.Read, Depends: call.OnArguments}
	c, err := cache.New(cache.Options{Rules: []cache.Rule{
		{Names: []string{"report"}, TTL: time.Minute, RefreshOn: []string{"kb://page/*"}},
		{Names: []string{"*"}, TTL: time.Minute, For: cache.Everybody},
	}})
	if err != nil {
		t.Fatal(err)
	}
	h := c.Guard("/mcp")(func(context.Context, *call.Call) (*call.Result, error) { return call.Text("x"), nil })
	cached := func(target *call.Capability) bool {
		t.Helper()
		cl := by("ada", "acme", target, `{}`)
		if _, err := h(t.Context(), cl); err != nil {
			t.Fatal(err)
		}
		return cl.Event.Cached
	}
	other := &call.Capability{Kind: call.Resource, URI: "kb://page/two", Depends: call.OnArguments}
	all := []*call.Capability{search, page, other, kb, report}
	for uri, dropped := range map[string][]*call.Capability{
		page.URI:        {page, kb, report},
		"kb://other":    {kb},
		"file:///a/kb:": nil,
	} {
		for _, target := range all {
			cached(target)
		}
		c.Updated(t.Context(), uri)
		for _, target := range all {
			was := false
			for _, d := range dropped {
				was = was || d == target
			}
			if got := cached(target); got == was {
				t.Errorf("after an update of %s: %s%s kept: %v", uri, target.Name, target.URI, got)
			}
		}
	}
}

// What is updated while it is read is not kept, and who comes after the update does not wait for it.
func TestUpdatedMeanwhile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, err := cache.New(everybody("*"))
		if err != nil {
			t.Fatal(err)
		}
		old, asked := make(chan struct{}), 0
		h := c.Guard("/mcp")(func(context.Context, *call.Call) (*call.Result, error) {
			if asked++; asked == 1 {
				<-old
				return call.Text("old"), nil
			}
			return call.Text("new"), nil
		})
		var first sync.WaitGroup
		first.Go(func() {
			if r, err := h(t.Context(), by("ada", "acme", page, `{}`)); err != nil || !strings.Contains(string(r.Content), "old") {
				t.Error(r, err)
			}
		})
		synctest.Wait()
		c.Updated(t.Context(), page.URI)
		for range 2 {
			if r, err := h(t.Context(), by("bob", "acme", page, `{}`)); err != nil || !strings.Contains(string(r.Content), "new") {
				t.Error(r, err)
			}
		}
		close(old)
		first.Wait()
		cl := by("eve", "acme", page, `{}`)
		if r, err := h(t.Context(), cl); err != nil || !cl.Event.Cached || !strings.Contains(string(r.Content), "new") {
			t.Error(r, err, cl.Event.Cached)
		}
	})
}

// Numbers say what happened.
func TestStats(t *testing.T) {
	s := &cache.Stats{}
	o := cache.Options{MaxBytes: 2000, Stats: s, Rules: []cache.Rule{{Names: []string{"search_*"}, TTL: time.Minute, RefreshOn: []string{"update_*"}}}}
	w := newWorld(t, o)
	for range 3 {
		w.send(by("ada", "acme", search, `{}`))
	}
	for i := range 4 {
		w.send(by("ada", "acme", search, fmt.Sprintf(`{"i":%d}`, i)))
	}
	w.send(by("ada", "acme", update, `{}`))
	if s.Hits.Load() != 2 || s.Misses.Load() != 5 || s.Evictions.Load() == 0 || s.Refreshes.Load() != 1 {
		t.Errorf("hits %d, misses %d, evictions %d, refreshes %d", s.Hits.Load(), s.Misses.Load(), s.Evictions.Load(), s.Refreshes.Load())
	}
}
