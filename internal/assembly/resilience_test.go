package assembly

import (
	"context"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"newel.dev/newel/call"
)

// An open breaker stays open over a reload that leaves its backend as it is, refuses before anything is
// written, and is seen; another backend of the name starts anew.
func TestBreakerOverReloads(t *testing.T) {
	var asked atomic.Int64
	tool := func(name string, effect call.Effect) *call.Capability {
		return &call.Capability{Kind: call.Tool, Name: name, Description: "Fails.", Effect: effect, Input: []byte(`{"type":"object"}`), Run: func(context.Context, *call.Call) (*call.Result, error) {
			asked.Add(1)
			return nil, call.Errorf(call.Unavailable, "away")
		}}
	}
	o, b := configuration(t, 1, tool("read", call.Read), tool("write", call.Write))
	o.Resilience = Resilience{Bounds: Bounds{Attempts: 1, Delay: time.Hour}, Backends: map[string]Bounds{"versioned": {Failures: 2}}}
	h, err := Build(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	l := NewLive(h)
	defer l.stop()
	do := func(name string) error {
		_, err := l.House().Do(t.Context(), &call.Call{Kind: call.Tool, Name: name, Key: "k " + name})
		return err
	}
	breaker := func() string {
		for _, s := range l.House().Backends() {
			if s.Name == "versioned" {
				return s.Breaker
			}
		}
		return "there is none"
	}
	for range 2 {
		if err := do("read"); err == nil || !strings.Contains(err.Error(), "away") {
			t.Fatal(err)
		}
	}
	next := *o
	next.Resilience.Budget = 0.5
	if err := l.Replace(t.Context(), &next, nil); err != nil {
		t.Fatal(err)
	}
	c := &call.Call{Kind: call.Tool, Name: "write", Key: "k"}
	if _, err := l.House().Do(t.Context(), c); err == nil || !strings.Contains(err.Error(), "failing") || c.Event.Step != "effect" {
		t.Errorf("a call with an effect: %v, refused by %s", err, c.Event.Step)
	}
	if err := do("read"); err == nil || !strings.Contains(err.Error(), "failing") || breaker() != "open" {
		t.Errorf("%v, the breaker is %s", err, breaker())
	}
	if n := asked.Load(); n != 2 {
		t.Errorf("the backend was asked %d times", n)
	}
	another, _ := configuration(t, 2, b.more...)
	another.Resilience = o.Resilience
	if err := l.Replace(t.Context(), another, nil); err != nil {
		t.Fatal(err)
	}
	if breaker() != "closed" {
		t.Errorf("of another backend: %s", breaker())
	}
}

// Bounds of a backend that is not there are refused: nobody would notice.
func TestBoundsOfNobody(t *testing.T) {
	o, _ := configuration(t, 1)
	o.Resilience.Backends = map[string]Bounds{"orders": {Concurrent: 1}}
	if _, err := Build(t.Context(), o); err == nil || !strings.Contains(err.Error(), `no backend "orders"`) {
		t.Error(err)
	}
	o.Resilience.Backends = map[string]Bounds{"versioned": {Attempts: -1}}
	if _, err := Build(t.Context(), o); err == nil || !strings.Contains(err.Error(), "Attempts") {
		t.Error(err)
	}
}
