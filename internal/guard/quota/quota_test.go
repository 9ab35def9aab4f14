package quota_test

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/guard/quota"
)

func limiter(t *testing.T, o quota.Options) func(c *call.Call) error {
	t.Helper()
	if o.Store == nil {
		o.Store = quota.NewMemory()
	}
	l, err := quota.New(o)
	if err != nil {
		t.Fatal(err)
	}
	h := l.Guard(func(_ call.Kind, name string) bool { return !strings.HasPrefix(name, "unknown") })(func(_ context.Context, c *call.Call) (*call.Result, error) {
		c.Event.Tokens = 100
		return call.Text("ok"), nil
	})
	return func(c *call.Call) error {
		_, err := h(t.Context(), c)
		return err
	}
}

func by(tenant, id, tool string) *call.Call {
	return &call.Call{Kind: call.Tool, Name: tool, Principal: &call.Principal{ID: id, Tenant: tenant, Client: "c"}}
}

func over(t *testing.T, err error, name string, most time.Duration) time.Duration {
	t.Helper()
	e := call.AsError(err)
	if err == nil || e.Code != call.Exhausted || !e.Retryable || !strings.Contains(e.Message, name) || e.RetryAfter <= 0 || e.RetryAfter > most {
		t.Fatalf("got %v (%+v), want %q to be over for at most %v", err, e, name, most)
	}
	return e.RetryAfter
}

func TestRateOfEach(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		send := limiter(t, quota.Options{Rules: []quota.Rule{{Name: "each", Per: []string{"principal"}, Rate: quota.Rate{Calls: 2, In: time.Second}}}})
		for range 2 {
			if err := send(by("acme", "ada", "x")); err != nil {
				t.Fatal(err)
			}
		}
		wait := over(t, send(by("acme", "ada", "y")), "each", 500*time.Millisecond)
		for _, other := range []*call.Call{by("acme", "bob", "x"), by("other", "ada", "x")} { // an id is unique in its tenant only
			if err := send(other); err != nil {
				t.Errorf("%+v: %v", other.Principal, err)
			}
		}
		time.Sleep(wait) // of the bubble's clock
		if err := send(by("acme", "ada", "x")); err != nil {
			t.Errorf("after the time that was said: %v", err)
		}
	})
}

func TestWhatARuleIsAbout(t *testing.T) {
	send := limiter(t, quota.Options{Rules: []quota.Rule{
		{Name: "searches of acme", Tools: []string{"search_*", "kb://a/*"}, Tenants: []string{"acme"}, Rate: quota.Rate{Calls: 1, In: time.Hour}},
	}})
	for _, c := range []*call.Call{by("acme", "ada", "other"), by("other", "ada", "search_x"), by("acme", "ada", "search_x")} {
		if err := send(c); err != nil {
			t.Errorf("%s: %v", c.Name, err)
		}
	}
	over(t, send(by("acme", "bob", "kb://a/b/c")), "searches of acme", time.Hour)
	if err := send(&call.Call{Kind: call.Tool, Name: "search_x"}); err != nil {
		t.Errorf("nobody is of no tenant: %v", err)
	}
}

// Names that are nothing's share one count: nobody can make counts grow by inventing them.
func TestUnknownNamesShareACount(t *testing.T) {
	send := limiter(t, quota.Options{Rules: []quota.Rule{{Name: "each tool", Per: []string{"tool"}, Rate: quota.Rate{Calls: 1, In: time.Hour}}}})
	for _, name := range []string{"a", "b", "unknown 1"} {
		if err := send(by("acme", "ada", name)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	over(t, send(by("acme", "ada", "unknown 2")), "each tool", time.Hour)
}

func TestConcurrent(t *testing.T) {
	l, err := quota.New(quota.Options{Store: quota.NewMemory(), Rules: []quota.Rule{{Name: "two", Per: []string{"client"}, Concurrent: 2}}})
	if err != nil {
		t.Fatal(err)
	}
	var inside func() error
	depth := 0
	h := l.Guard(func(call.Kind, string) bool { return true })(func(context.Context, *call.Call) (*call.Result, error) {
		if depth++; depth == 3 {
			return nil, errors.New("a third runs")
		}
		return nil, inside()
	})
	inside = func() error {
		_, err := h(t.Context(), by("acme", "ada", "x"))
		return err
	}
	over(t, inside(), "two", time.Second)
	depth = 0
	inside = func() error { return nil }
	for range 5 { // all gave back what they held
		if _, err := h(t.Context(), by("acme", "ada", "x")); err != nil {
			t.Fatal(err)
		}
		depth = 0
	}
}

func TestBudgets(t *testing.T) {
	now := time.Date(2026, 11, 30, 23, 0, 0, 0, time.UTC)
	var alerts []quota.Alert
	send := limiter(t, quota.Options{
		Now: func() time.Time { return now }, NotCritical: []string{"nice_*"}, Costs: []quota.Cost{{Tools: []string{"dear"}, Units: 40}, {Tools: []string{"free"}}},
		Alert: func(_ context.Context, a quota.Alert) { alerts = append(alerts, a) },
		Rules: []quota.Rule{
			{Name: "tokens", Per: []string{"tenant"}, Budget: quota.Budget{Tokens: 1000, Every: quota.Day}, AlertAt: 0.5, DegradeAt: 0.7},
			{Name: "cost", Tools: []string{"dear", "free"}, Budget: quota.Budget{Cost: 100, Every: quota.Month}},
		},
	})
	for i := range 10 { // 100 tokens each
		if i == 7 {
			over(t, send(by("acme", "ada", "nice_to_have")), "tokens", time.Hour)
		}
		if err := send(by("acme", "ada", "x")); err != nil {
			t.Fatalf("%d: %v", i, err)
		}
	}
	if len(alerts) != 1 || alerts[0].Rule != "tokens" || alerts[0].Of != `"acme"` || alerts[0].Used != 500 || alerts[0].Limit != 1000 || alerts[0].What != "tokens" {
		t.Errorf("alerts: %+v", alerts)
	}
	if wait := over(t, send(by("acme", "ada", "x")), "tokens", time.Hour); wait != time.Hour {
		t.Errorf("the day ends in an hour, not in %v", wait)
	}
	for range 2 {
		if err := send(by("other", "ada", "dear")); err != nil {
			t.Fatal(err)
		}
	}
	over(t, send(by("other", "ada", "dear")), "cost", time.Hour)
	if err := send(by("other", "ada", "free")); err != nil {
		t.Errorf("free: %v", err)
	}
	now = now.Add(time.Hour)
	for _, c := range []*call.Call{by("acme", "ada", "x"), by("other", "ada", "dear")} {
		if err := send(c); err != nil {
			t.Errorf("in the next window: %v", err)
		}
	}
}

// broken is a store that fails while it is away.
type broken struct {
	quota.Store
	away  bool
	asked int
}

func (b *broken) Take(ctx context.Context, now time.Time, claims []quota.Claim) (quota.Outcome, error) {
	b.asked++
	if b.away {
		return quota.Outcome{}, errors.New("connection refused")
	}
	return b.Store.Take(ctx, now, claims)
}

// While the store is away a node grants a share of each limit, and never more.
func TestStoreAway(t *testing.T) {
	now := time.Date(2026, 11, 20, 12, 0, 0, 0, time.UTC)
	s := &broken{Store: quota.NewMemory(), away: true}
	alerts := 0
	send := limiter(t, quota.Options{
		Store: s, Share: 0.25, Now: func() time.Time { return now }, Alert: func(_ context.Context, a quota.Alert) {
			if a.What != "store" || a.Err == nil {
				t.Errorf("%+v", a)
			}
			alerts++
		},
		Rules: []quota.Rule{{Name: "rate", Rate: quota.Rate{Calls: 8, In: time.Hour}, Burst: 8}, {Name: "calls", Budget: quota.Budget{Calls: 1}}},
	})
	if err := send(by("acme", "ada", "x")); err != nil { // a share of one call is one call
		t.Fatal(err)
	}
	over(t, send(by("acme", "ada", "x")), "calls", 12*time.Hour)
	if s.asked != 1 || alerts != 1 {
		t.Errorf("asked %d times, %d alerts: a store that is away is left alone for a second", s.asked, alerts)
	}
	s.away = false
	now = now.Add(time.Second)
	over(t, send(by("acme", "ada", "x")), "calls", 12*time.Hour) // it is told what was used without it
	only := limiter(t, quota.Options{Store: &broken{away: true}, Share: 0.25, Rules: []quota.Rule{{Name: "rate", Rate: quota.Rate{Calls: 8, In: time.Hour}, Burst: 8}}})
	for range 2 {
		if err := only(by("acme", "ada", "x")); err != nil {
			t.Fatal(err)
		}
	}
	over(t, only(by("acme", "ada", "x")), "rate", time.Hour)
}

// What two nodes grant while the store is away is shares of what was left, not of the whole, and the
// store is told of it when it is back.
func TestBudgetOutlivesTheStore(t *testing.T) {
	now := time.Date(2026, 11, 20, 12, 0, 0, 0, time.UTC)
	memory := quota.NewMemory()
	a, b := &broken{Store: memory}, &broken{Store: memory}
	rules := []quota.Rule{{Name: "calls", Budget: quota.Budget{Calls: 10}}, {Name: "tokens", Budget: quota.Budget{Tokens: 1000}}}
	node := func(s *broken) func(*call.Call) error {
		return limiter(t, quota.Options{Store: s, Share: 0.5, Now: func() time.Time { return now }, Rules: rules})
	}
	sendA, sendB := node(a), node(b)
	granted := 0
	try := func(send func(*call.Call) error, times int) {
		for range times {
			if send(by("acme", "ada", "x")) == nil {
				granted++
			}
		}
	}
	try(sendB, 1)
	try(sendA, 5)
	try(sendB, 1)
	if granted != 7 {
		t.Fatalf("%d granted", granted)
	}
	a.away, b.away = true, true
	try(sendA, 10)
	before := granted
	try(sendB, 10)
	if granted < 8 || granted > 10 {
		t.Errorf("%d of 10 granted while the store was away", granted)
	}
	// A does not know what B used until B is asked again, and has told.
	most := 10 + granted - before
	a.away, b.away = false, false
	now = now.Add(2 * time.Second)
	try(sendA, 10)
	try(sendB, 10)
	if granted > most {
		t.Errorf("%d of 10 granted in the end, and B used %d alone", granted, most-10)
	}
	before = granted
	try(sendA, 10)
	try(sendB, 10)
	if granted != before {
		t.Errorf("%d granted when nothing was left", granted-before)
	}
}

// Calls that run when the store goes away count where they run.
func TestRunningCallsOutliveTheStore(t *testing.T) {
	s := &broken{Store: quota.NewMemory()}
	l, err := quota.New(quota.Options{Store: s, Share: 0.5, Rules: []quota.Rule{{Name: "at once", Concurrent: 4}}})
	if err != nil {
		t.Fatal(err)
	}
	running, end := make(chan struct{}), make(chan struct{})
	h := l.Guard(func(call.Kind, string) bool { return true })(func(context.Context, *call.Call) (*call.Result, error) {
		running <- struct{}{}
		<-end
		return call.Text("ok"), nil
	})
	var all sync.WaitGroup
	for range 2 {
		all.Go(func() {
			if _, err := h(t.Context(), by("acme", "ada", "x")); err != nil {
				t.Error(err)
			}
		})
		<-running
	}
	s.away = true
	if _, err := h(t.Context(), by("acme", "ada", "x")); err == nil {
		t.Error("two run, and the share of four is two: a third one was let in")
	}
	close(end)
	all.Wait()
}

func TestRulesThatMakeNoSense(t *testing.T) {
	rate := quota.Rate{Calls: 1, In: time.Second}
	for want, r := range map[string]quota.Rule{
		"needs a name":         {Rate: rate},
		"limits nothing":       {Name: "x"},
		"below zero":           {Name: "x", Rate: rate, Concurrent: -1},
		"shares":               {Name: "x", Budget: quota.Budget{Calls: 1}, AlertAt: 80},
		"there is none":        {Name: "x", Rate: rate, AlertAt: 0.8},
		`not "user"`:           {Name: "x", Rate: rate, Per: []string{"user"}},
		`not "week"`:           {Name: "x", Budget: quota.Budget{Calls: 1, Every: "week"}},
		"cannot be below zero": {Name: "x", Budget: quota.Budget{Tokens: -5}},
	} {
		if err := r.Check(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: got %v, want %q", r, err, want)
		}
	}
	for _, s := range []string{"", "5", "5/d", "-1/s", "0/s", "x/s", "9999999/s"} {
		if r, err := quota.ParseRate(s); err == nil {
			t.Errorf("%q: %+v", s, r)
		}
	}
	if _, err := quota.New(quota.Options{Store: quota.NewMemory(), Rules: []quota.Rule{{Name: "x", Rate: rate}, {Name: "x", Rate: rate}}}); err == nil {
		t.Error("a name is there twice")
	}
}

func BenchmarkGuard(b *testing.B) {
	l, err := quota.New(quota.Options{Store: quota.NewMemory(), Rules: []quota.Rule{
		{Name: "each", Per: []string{"principal"}, Rate: quota.Rate{Calls: 1_000_000, In: time.Second}, Concurrent: 100},
		{Name: "tenant", Per: []string{"tenant"}, Budget: quota.Budget{Calls: 1 << 60}},
	}})
	if err != nil {
		b.Fatal(err)
	}
	h := l.Guard(func(call.Kind, string) bool { return true })(func(context.Context, *call.Call) (*call.Result, error) { return nil, nil })
	c := by("acme", "ada", "x")
	c.Event.Correlation = "abc"
	b.ReportAllocs()
	for b.Loop() {
		if _, err := h(b.Context(), c); err != nil {
			b.Fatal(err)
		}
	}
}
