package cache_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/guard/cache"
)

var (
	search = &call.Capability{Kind: call.Tool, Name: "search_orders", Effect: call.Read, Depends: call.OnArguments}
	update = &call.Capability{Kind: call.Tool, Name: "update_order", Effect: call.Write}
	page   = &call.Capability{Kind: call.Resource, URI: "kb://page/one", Depends: call.OnArguments}
)

// answering is a caller who says yes.
type answering struct{}

// Ask implements call.Asker.
func (answering) Ask(_ context.Context, q ...call.Question) (map[string]jsontext.Value, error) {
	return map[string]jsontext.Value{q[0].Key: jsontext.Value(`{"action":"accept"}`)}, nil
}

// world is a cache in front of a handler that counts.
type world struct {
	t     *testing.T
	h     call.Handler
	asked int
	next  func(c *call.Call) (*call.Result, error)
}

func newWorld(t *testing.T, o cache.Options) *world {
	t.Helper()
	c, err := cache.New(o)
	if err != nil {
		t.Fatal(err)
	}
	w := &world{t: t}
	w.h = c.Guard("/mcp")(func(_ context.Context, c *call.Call) (*call.Result, error) {
		w.asked++
		c.Event.Tokens = 7
		if w.next != nil {
			return w.next(c)
		}
		return call.Text(fmt.Sprint(w.asked)), nil
	})
	return w
}

func by(who, tenant string, target *call.Capability, args string) *call.Call {
	name := target.Name
	if target.URI != "" {
		name = target.URI
	}
	return &call.Call{Kind: target.Kind, Name: name, Target: target, Args: jsontext.Value(args), Asker: answering{}, Principal: &call.Principal{ID: who, Tenant: tenant}}
}

// send makes a call and reports whether it was answered from the cache.
func (w *world) send(c *call.Call) (text string, cached bool) {
	w.t.Helper()
	before := w.asked
	r, err := w.h(w.t.Context(), c)
	if err != nil {
		w.t.Fatal(err)
	}
	if c.Event.Cached != (w.asked == before) || c.Event.Tokens != 7 && c.Target.Effect == call.Read {
		w.t.Errorf("the record says %+v, asked %d times", c.Event, w.asked-before)
	}
	return string(r.Content), c.Event.Cached
}

func TestForWhom(t *testing.T) {
	all := []string{cache.Caller, cache.Tenant, cache.Everybody}
	for i, who := range all {
		w := newWorld(t, cache.Options{Rules: []cache.Rule{{Names: []string{"search_*", "kb://*"}, TTL: time.Minute, For: who}}})
		for _, target := range []*call.Capability{search, page} {
			w.send(by("ada", "acme", target, `{"a":1,"b":2}`))
			for j, other := range []*call.Call{by("ada", "acme", target, `{"b":2, "a":1}`), by("bob", "acme", target, `{"a":1,"b":2}`), by("ada", "other", target, `{"a":1,"b":2}`)} {
				if _, cached := w.send(other); cached != (i >= j) {
					t.Errorf("kept for the %s, %s, caller %d: cached %v", who, target.Name, j, cached)
				}
			}
			if _, cached := w.send(by("ada", "acme", target, `{"a":1,"b":3}`)); cached {
				t.Error("other arguments")
			}
		}
	}
}

func TestWhatIsNotKept(t *testing.T) {
	w := newWorld(t, cache.Options{MaxEntry: 100, Rules: []cache.Rule{{Names: []string{"*"}, TTL: time.Minute, For: cache.Tenant}}})
	for name, next := range map[string]func(c *call.Call) (*call.Result, error){
		"an error of the tool": func(*call.Call) (*call.Result, error) {
			return &call.Result{IsError: true, Content: call.TextContent("no")}, nil
		},
		"too large": func(*call.Call) (*call.Result, error) { return call.Text(strings.Repeat("x", 200)), nil },
		"good for this moment": func(*call.Call) (*call.Result, error) {
			return &call.Result{Content: call.TextContent("now"), TTL: -1}, nil
		},
		"made of what the caller answered": func(c *call.Call) (*call.Result, error) {
			_, err := c.Asker.Ask(t.Context(), call.Question{Key: "k", Method: call.MethodElicit})
			return call.Text("yes"), err
		},
	} {
		w.next = next
		for range 2 {
			if _, cached := w.send(by("ada", "acme", search, fmt.Sprintf(`{"case":%q}`, name))); cached {
				t.Errorf("%s is kept", name)
			}
		}
	}
	w.next = nil
	for range 2 {
		if _, cached := w.send(by("ada", "acme", update, `{}`)); cached {
			t.Error("a write is answered from before")
		}
	}
	for _, err := range []error{errors.New("x"), call.Errorf(call.NotFound, "x")} {
		w.next = func(*call.Call) (*call.Result, error) { return nil, err }
		before := w.asked
		for range 2 {
			if _, got := w.h(t.Context(), by("ada", "acme", search, `{"err":1}`)); got == nil {
				t.Error("no error")
			}
		}
		if w.asked != before+2 {
			t.Error("an error is kept")
		}
	}
}

func TestTimes(t *testing.T) {
	now := time.Date(2026, 11, 20, 12, 0, 0, 0, time.UTC)
	w := newWorld(t, cache.Options{Now: func() time.Time { return now }, Rules: []cache.Rule{{Names: []string{"search_*"}, TTL: time.Minute, RefreshOn: []string{"update_*"}}}})
	w.next = func(*call.Call) (*call.Result, error) {
		return &call.Result{Content: call.TextContent("x"), TTL: 10 * time.Second}, nil
	}
	c := func() *call.Call { return by("ada", "acme", search, `{}`) }
	w.send(c())
	now = now.Add(4 * time.Second)
	if r, err := w.h(t.Context(), c()); err != nil || r.TTL != 6*time.Second {
		t.Errorf("what is left of its time: %v, %v", r, err)
	}
	now = now.Add(6 * time.Second)
	if _, cached := w.send(c()); cached {
		t.Error("the result said that it is good for less")
	}
	w.send(by("bob", "acme", update, `{}`))
	if _, cached := w.send(c()); cached {
		t.Error("something was written, and the result of before is given")
	}
}

// What is read while something is written may be of before: it is not kept.
func TestWrittenMeanwhile(t *testing.T) {
	w := newWorld(t, cache.Options{Rules: []cache.Rule{{Names: []string{"search_*"}, TTL: time.Minute, RefreshOn: []string{"update_*"}}}})
	w.next = func(c *call.Call) (*call.Result, error) {
		if c.Target == search {
			if _, err := w.h(t.Context(), by("bob", "acme", update, `{}`)); err != nil {
				t.Error(err)
			}
		}
		return call.Text("x"), nil
	}
	for range 2 {
		if _, err := w.h(t.Context(), by("ada", "acme", search, `{}`)); err != nil {
			t.Fatal(err)
		}
	}
	if w.asked != 4 {
		t.Errorf("asked %d times, want 4", w.asked)
	}
}

func TestBounded(t *testing.T) {
	c, err := cache.New(cache.Options{MaxBytes: 10_000, Rules: []cache.Rule{{Names: []string{"*"}, TTL: time.Minute}}})
	if err != nil {
		t.Fatal(err)
	}
	h := c.Guard("/mcp")(func(context.Context, *call.Call) (*call.Result, error) {
		return call.Text(strings.Repeat("x", 500)), nil
	})
	for i := range 100 {
		if _, err := h(t.Context(), by("ada", "acme", search, fmt.Sprintf(`{"i":%d}`, i))); err != nil {
			t.Fatal(err)
		}
		if _, err := h(t.Context(), by("ada", "acme", search, `{"i":0}`)); err != nil { // used all the time
			t.Fatal(err)
		}
	}
	if c.Size() > 10_000 || c.Size() < 5000 {
		t.Errorf("%d bytes are kept", c.Size())
	}
	last := by("ada", "acme", search, `{"i":0}`)
	if _, err := h(t.Context(), last); err != nil || !last.Event.Cached {
		t.Error("the most used went first")
	}
}

// Callers who ask the same at the same time wait for one answer; if who is first goes away, the others
// ask themselves.
func TestTogether(t *testing.T) {
	for _, leaves := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			var mu sync.Mutex
			asked := 0
			c, err := cache.New(cache.Options{Rules: []cache.Rule{{Names: []string{"*"}, TTL: time.Minute}}})
			if err != nil {
				t.Fatal(err)
			}
			h := c.Guard("/mcp")(func(ctx context.Context, _ *call.Call) (*call.Result, error) {
				mu.Lock()
				asked++
				first := asked == 1
				mu.Unlock()
				if first {
					select {
					case <-time.After(time.Second):
					case <-ctx.Done():
						return nil, ctx.Err()
					}
				}
				return call.Text("x"), nil
			})
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			var all sync.WaitGroup
			all.Go(func() {
				if _, err := h(ctx, by("ada", "acme", search, `{}`)); (err != nil) != leaves {
					t.Error(err)
				}
			})
			synctest.Wait()
			for range 9 {
				all.Go(func() {
					if r, err := h(t.Context(), by("ada", "acme", search, `{}`)); err != nil || r == nil {
						t.Error(err)
					}
				})
			}
			synctest.Wait()
			if leaves {
				cancel()
			}
			all.Wait()
			if !leaves && asked != 1 || asked > 10 {
				t.Errorf("asked %d times", asked)
			}
		})
	}
}

func TestRulesThatMakeNoSense(t *testing.T) {
	for want, r := range map[string]cache.Rule{
		"names nothing": {TTL: 1}, "above zero": {Names: []string{"x"}}, `not "world"`: {Names: []string{"x"}, TTL: 1, For: "world"}, "not a pattern": {Names: []string{"["}, TTL: 1},
	} {
		if _, err := cache.New(cache.Options{Rules: []cache.Rule{r}}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: %v", r, err)
		}
	}
}
