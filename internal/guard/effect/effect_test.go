package effect_test

import (
	"context"
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/audit"
	"newel.dev/newel/internal/guard/effect"
	"newel.dev/newel/internal/secret"
	"newel.dev/newel/internal/store/inmem"
	"newel.dev/newel/internal/store/storetest"
)

// bench is a step over a store in memory, and a tool behind it.
type bench struct {
	t     *testing.T
	store *inmem.DB
	*effect.Effects
	key  secret.Key
	step call.Handler
	tool *call.Capability
	runs atomic.Int64
}

func newBench(t *testing.T, o effect.Options, run call.Handler) *bench {
	t.Helper()
	b := &bench{t: t, store: inmem.New()}
	if o.Store == nil {
		o.Store = b.store
	}
	b.key = secret.RandomKey()
	o.Key = b.key
	var err error
	if b.Effects, err = effect.New(o); err != nil {
		t.Fatal(err)
	}
	b.tool = &call.Capability{Kind: call.Tool, Name: "pay", Effect: call.Write, Run: run}
	b.step = b.Guard("/mcp", func(string) *call.Capability { return nil })(func(ctx context.Context, c *call.Call) (*call.Result, error) {
		b.runs.Add(1)
		return c.Target.Run(ctx, c)
	})
	return b
}

func (b *bench) call(key, args string) *call.Call {
	return &call.Call{Kind: call.Tool, Name: b.tool.Name, Args: jsontext.Value(args), Key: key, Target: b.tool, Principal: &call.Principal{Tenant: "acme", ID: "alice"}, Sink: call.Discard, Asker: call.NoAsker}
}

func (b *bench) do(c *call.Call) (*call.Result, error) { return b.step(b.t.Context(), c) }

func (b *bench) ran(want int64) {
	b.t.Helper()
	if got := b.runs.Load(); got != want {
		b.t.Errorf("the tool ran %d times, want %d", got, want)
	}
}

// log returns what the audit log says, in short.
func (b *bench) log() (lines []string) {
	b.t.Helper()
	rows, err := b.store.Read(b.t.Context(), 0, 1000)
	if err != nil {
		b.t.Fatal(err)
	}
	for _, r := range rows {
		rec, err := audit.Decode(r.Record)
		if err != nil {
			b.t.Fatal(err)
		}
		lines = append(lines, strings.TrimSpace(rec.Act+" "+rec.Outcome+" "+rec.Code))
	}
	storetest.Check(b.t, b.store)
	return lines
}

func (b *bench) wantLog(want ...string) {
	b.t.Helper()
	if got := b.log(); strings.Join(got, "; ") != strings.Join(want, "; ") {
		b.t.Errorf("the log says %q, want %q", got, want)
	}
}

func codeOf(err error) call.Code {
	if err == nil {
		return call.OK
	}
	return call.AsError(err).Code
}

// What needs an approval does not run without one, whatever stands before this step, reads included.
func TestNothingRunsUnapproved(t *testing.T) {
	b := newBench(t, effect.Options{}, func(context.Context, *call.Call) (*call.Result, error) { return call.Text("ran"), nil })
	for what, a := range map[string]*call.Approval{
		"no step before":        {},
		"an id without binding": {ID: "x"},
		"one that is not there": {ID: "x", Binding: make([]byte, 32)},
		"none yet":              {Binding: make([]byte, 32)},
	} {
		for _, class := range []call.Effect{call.Write, call.Read} {
			b.tool.Effect = class
			for _, key := range []string{"", "k"} {
				c := b.call(key, `{}`)
				c.Approval = a
				if _, err := b.do(c); codeOf(err) != call.Denied || errors.Is(err, call.ErrUnapproved) != (a.Binding != nil) {
					t.Errorf("%s, %v: %v", what, class, err)
				}
			}
		}
	}
	b.ran(0)
	b.wantLog()
}

// What is missing for an undo leaves the operation without one; it ran all the same.
func TestUndoWithoutValues(t *testing.T) {
	b := newBench(t, effect.Options{}, func(context.Context, *call.Call) (*call.Result, error) {
		r := call.Text("paid")
		r.Structured = jsontext.Value(`{"id":{"n":12345678901234567890}}`)
		return r, nil
	})
	for from, want := range map[string]string{
		"result.id.n": `{"x":12345678901234567890}`, "args.a": `{"x":1.50}`, "result.id": `{"x":{"n":12345678901234567890}}`,
		"result.none": "", "args.a.b": "", "result.id.n.m": "",
	} {
		b.tool.Undo = &call.Undo{Tool: "back", Args: map[string]string{"x": from}}
		c := b.call("", `{"a":1.50}`)
		if _, err := b.do(c); err != nil {
			t.Errorf("%s: %v", from, err)
		}
		_, undo, err := b.Compensation(t.Context(), c.Event.Operation, "root")
		switch {
		case want == "" && codeOf(err) != call.Unsupported:
			t.Errorf("%s: %v", from, err)
		case want != "" && (err != nil || string(undo.Args) != want || undo.Name != "back" || undo.Key == ""):
			t.Errorf("%s: %+v, %v", from, undo, err)
		}
	}
	for _, from := range []string{"", "args", "args.", "body.x", "args..x"} {
		_, err := effect.New(effect.Options{Store: b.store, Rules: []effect.Rule{{Tool: "pay", Undo: &call.Undo{Tool: "back", Args: map[string]string{"x": from}}}}})
		if err == nil {
			t.Errorf("an argument may come from %q", from)
		}
	}
}

func TestReplay(t *testing.T) {
	const odd = `[{"type":"text",  "text":"1.0e0 \u00e9"}]` // white space and numbers as they came
	b := newBench(t, effect.Options{}, func(context.Context, *call.Call) (*call.Result, error) {
		return &call.Result{Content: jsontext.Value(odd), Structured: jsontext.Value(`{"n":12345678901234567890, "x":1.0}`), Extra: jsontext.Value(`{"_meta":{"a":1},"b":2}`)}, nil
	})
	first, err := b.do(b.call("k", `{"a":1,"b":2}`))
	if err != nil || strings.Contains(string(first.Extra), "replayed") {
		t.Fatal(first, err)
	}
	c := b.call("k", `{"b":2, "a":1}`) // the same, written differently
	again, err := b.do(c)
	if err != nil || string(again.Content) != odd || string(again.Structured) != string(first.Structured) {
		t.Errorf("replayed %+v, %v", again, err)
	}
	if want := `{"b":2,"_meta":{"a":1,"dev.newel/idempotency":{"replayed":true,"auditIndex":1}}}`; string(again.Extra) != want || !c.Event.Replayed || c.Event.Operation == "" {
		t.Errorf("marked %s, %+v", again.Extra, c.Event)
	}
	b.ran(1)
	b.wantLog("intent", "outcome completed")
	for what, change := range map[string]func(c *call.Call){
		"principal": func(c *call.Call) { c.Principal = &call.Principal{Tenant: "acme", ID: "bob"} },
		"tenant":    func(c *call.Call) { c.Principal = &call.Principal{Tenant: "other", ID: "alice"} },
		"key":       func(c *call.Call) { c.Key = "other" },
		"none":      func(c *call.Call) { c.Key = "" },
	} {
		before := b.runs.Load()
		c := b.call("k", `{"a":1,"b":2}`)
		change(c)
		if _, err := b.do(c); err != nil || c.Event.Replayed || b.runs.Load() != before+1 {
			t.Errorf("another %s: %v, replayed %v", what, err, c.Event.Replayed)
		}
	}
}

func TestKeyMisuse(t *testing.T) {
	b := newBench(t, effect.Options{Rules: []effect.Rule{{Tool: "strict", Required: true}}}, func(context.Context, *call.Call) (*call.Result, error) { return call.Text("ok"), nil })
	if _, err := b.do(b.call("k", `{"a":9007199254740993}`)); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		change func(c *call.Call)
		want   call.Code
	}{
		"other arguments":    {func(c *call.Call) { c.Args = jsontext.Value(`{"a":2}`) }, call.Failed},
		"other great number": {func(c *call.Call) { c.Args = jsontext.Value(`{"a":9007199254740992}`) }, call.Failed},
		"other tool version": {func(c *call.Call) { tool := *c.Target; tool.Version = "2"; c.Target = &tool }, call.Failed},
		"too long":           {func(c *call.Call) { c.Key = strings.Repeat("k", effect.MaxKey+1) }, call.Malformed},
		"control characters": {func(c *call.Call) { c.Key = "a\nb" }, call.Malformed},
		"not UTF-8":          {func(c *call.Call) { c.Key = "\xff" }, call.Malformed},
		"required":           {func(c *call.Call) { c.Key = ""; tool := *c.Target; tool.Name = "strict"; c.Target = &tool }, call.Malformed},
	} {
		k := b.call("k", `{"a":9007199254740993}`)
		c.change(k)
		if _, err := b.do(k); codeOf(err) != c.want {
			t.Errorf("%s: %v, want %s", name, err, c.want)
		}
	}
	b.ran(1)
}

// TestSecondCaller waits for the first, and is told to come again if that takes too long.
func TestSecondCaller(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, effect.Options{}, func(context.Context, *call.Call) (*call.Result, error) {
			time.Sleep(8 * time.Second)
			return call.Text("done"), nil
		})
		var all sync.WaitGroup
		all.Go(func() {
			if _, err := b.do(b.call("k", "")); err != nil {
				t.Error(err)
			}
		})
		synctest.Wait()
		start := time.Now()
		_, err := b.do(b.call("k", ""))
		e := call.AsError(err)
		if e == nil || e.Code != call.Conflict || !e.Retryable || e.RetryAfter == 0 || time.Since(start) < 5*time.Second || time.Since(start) > 6*time.Second {
			t.Errorf("after %v: %v", time.Since(start), err)
		}
		c := b.call("k", "")
		if r, err := b.do(c); err != nil || !c.Event.Replayed || !strings.Contains(string(r.Content), "done") {
			t.Errorf("got %v, %v", r, err)
		}
		all.Wait()
		b.ran(1)
	})
}

// TestDisconnect is a caller that goes away: before the dispatch it is cancelled, after it what is
// done is stored. Without a key the tool is told to stop, and nobody knows how far it came.
func TestDisconnect(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, effect.Options{}, func(ctx context.Context, _ *call.Call) (*call.Result, error) {
			select {
			case <-time.After(time.Second):
				return call.Text("done"), nil
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		})
		for _, key := range []string{"k", ""} {
			ctx, cancel := context.WithCancel(t.Context())
			var err error
			var all sync.WaitGroup
			all.Go(func() { _, err = b.step(ctx, b.call(key, "")) })
			synctest.Wait()
			cancel()
			all.Wait()
			if key == "k" && err != nil || key == "" && codeOf(err) != call.OutcomeUnknown {
				t.Errorf("key %q: %v", key, err)
			}
			if _, err := b.step(ctx, b.call("gone"+key, "")); codeOf(err) != call.Canceled {
				t.Errorf("a caller that is gone: %v", err)
			}
		}
		c := b.call("k", "")
		if _, err := b.do(c); err != nil || !c.Event.Replayed {
			t.Error("what was done for a caller that went away is not replayed", err)
		}
		b.ran(2)
		b.wantLog("intent", "outcome completed", "intent", "outcome outcome_unknown canceled")
	})
}

// TestOutcomes is what becomes of each error of a tool.
func TestOutcomes(t *testing.T) {
	var fail error
	b := newBench(t, effect.Options{}, func(context.Context, *call.Call) (*call.Result, error) {
		if fail != nil {
			return nil, fail
		}
		return call.Text("ok"), nil
	})
	for _, c := range append(call.Codes(), call.OK) {
		key := c.String()
		fail = nil
		if c != call.OK {
			fail = call.Errorf(c, "because")
		}
		_, first := b.do(b.call(key, ""))
		fail = nil
		k := b.call(key, "")
		before := b.runs.Load()
		_, second := b.do(k)
		again := b.runs.Load() > before
		switch c {
		case call.Unavailable, call.Exhausted, call.Unauthenticated, call.Unsupported:
			if codeOf(first) != c || !again || second != nil {
				t.Errorf("%s: %v; then %v, ran again %v", c, first, second, again)
			}
		case call.Timeout, call.Canceled, call.OutcomeUnknown:
			if codeOf(first) != call.OutcomeUnknown || again || codeOf(second) != call.OutcomeUnknown {
				t.Errorf("%s: %v; then %v, ran again %v", c, first, second, again)
			}
		default:
			if codeOf(first) != c || again || codeOf(second) != c || !k.Event.Replayed {
				t.Errorf("%s: %v; then %v, ran again %v", c, first, second, again)
			}
		}
	}
}

func TestPanic(t *testing.T) {
	b := newBench(t, effect.Options{}, func(context.Context, *call.Call) (*call.Result, error) { panic("oh") })
	func() {
		defer func() {
			if recover() == nil {
				t.Error("the panic is gone")
			}
		}()
		_, _ = b.do(b.call("k", ""))
	}()
	if _, err := b.do(b.call("k", "")); codeOf(err) != call.OutcomeUnknown {
		t.Errorf("got %v", err)
	}
	b.ran(1)
	b.wantLog("intent", "outcome outcome_unknown panic")
}

// TestQuestions is a tool that asks: one that starts over with the answers, and one that goes on.
func TestQuestions(t *testing.T) {
	b := newBench(t, effect.Options{Wait: time.Millisecond}, func(_ context.Context, c *call.Call) (*call.Result, error) {
		switch {
		case c.Resume == "round 2":
			return call.Text("done"), nil
		case c.Resume == "round 1":
			return nil, &call.InputRequired{State: "round 2"}
		case c.Key == "over" && c.Trace.Correlation == "":
			return nil, &call.InputRequired{}
		case c.Key == "over":
			return call.Text("done"), nil
		}
		return nil, &call.InputRequired{State: "round 1", Questions: []call.Question{{Key: "sure", Method: call.MethodElicit, Params: []byte(`{"message":"sure?"}`)}}}
	})
	try := func(key, resume, answered string) error {
		c := b.call(key, "")
		c.Resume, c.Trace.Correlation = resume, answered
		_, err := b.do(c)
		return err
	}
	var ask *call.InputRequired
	if err := try("over", "", ""); !errors.As(err, &ask) {
		t.Fatal(err)
	}
	if err := try("over", "", "answered"); err != nil {
		t.Error(err)
	}
	if err := try("on", "", ""); !errors.As(err, &ask) || ask.State != "round 1" {
		t.Fatal(err)
	}
	asked := b.runs.Load()
	if err := try("on", "", ""); !errors.As(err, &ask) || ask.State != "round 1" || len(ask.Questions) != 1 || string(ask.Questions[0].Params) != `{"message":"sure?"}` || b.runs.Load() != asked {
		t.Errorf("a caller that did not hear the question gets %v", err)
	}
	if err := try("on", "round 1", ""); !errors.As(err, &ask) || ask.State != "round 2" {
		t.Fatal(err)
	}
	asked = b.runs.Load()
	if err := try("on", "round 1", ""); !errors.As(err, &ask) || ask.State != "round 2" || b.runs.Load() != asked {
		t.Errorf("an old state: %v", err)
	}
	if err := try("on", "round 2", ""); err != nil {
		t.Error(err)
	}
	before := b.runs.Load()
	if err := try("on", "round 2", ""); err != nil || b.runs.Load() != before {
		t.Errorf("a state used twice ran again, or: %v", err)
	}
}

// A call without a key that asks goes on as the operation that it was: it ends once, and nobody finds
// it waiting later.
func TestQuestionsWithoutKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var names []string
		b := newBench(t, effect.Options{}, func(_ context.Context, c *call.Call) (*call.Result, error) {
			names = append(names, c.Once)
			if c.Resume == "round 1" {
				return call.Text("done"), nil
			}
			return nil, &call.InputRequired{State: "round 1"}
		})
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- b.Run(ctx) }()
		defer func() {
			cancel()
			if err := <-ended; err != nil {
				t.Error(err)
			}
		}()
		ask := func(args string) string {
			var ask *call.InputRequired
			if _, err := b.do(b.call("", args)); !errors.As(err, &ask) {
				t.Fatal(err)
			}
			return ask.State
		}
		resume := func(state, args, principal string) error {
			c := b.call("", args)
			c.Resume, c.Principal.ID = state, principal
			_, err := b.do(c)
			return err
		}
		state := ask(`{"a":1}`)
		for what, err := range map[string]error{"another caller": resume(state, `{"a":1}`, "mallory"), "another call": resume(state, `{"a":2}`, "alice"), "another state": resume(state+"x", `{"a":1}`, "alice")} {
			if codeOf(err) != call.Conflict {
				t.Errorf("%s went on: %v", what, err)
			}
		}
		b.ran(1)
		time.Sleep(14 * time.Minute) // as long as the sealed state may still be opened
		if err := resume(state, `{"a":1}`, "alice"); err != nil {
			t.Fatal(err)
		}
		if err := resume(state, `{"a":1}`, "alice"); codeOf(err) != call.Conflict {
			t.Errorf("the answers came twice: %v", err)
		}
		b.ran(2)
		if names[0] != names[1] {
			t.Error("the tool was told two operations")
		}
		time.Sleep(time.Hour)
		b.wantLog("intent", "outcome input_required input_required", "intent", "outcome completed")
		late := ask(`{"a":3}`)
		time.Sleep(time.Hour)
		if err := resume(late, `{"a":3}`, "alice"); err == nil {
			t.Error("answers that came too late went on")
		}
		if log := b.log(); log[len(log)-1] != "outcome outcome_unknown outcome_unknown" {
			t.Errorf("a call that was never answered ended as %q", log[len(log)-1])
		}
	})
}

func TestOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, effect.Options{Rules: []effect.Rule{{Tool: "p*", Once: time.Minute}}}, func(context.Context, *call.Call) (*call.Result, error) { return call.Text("ok"), nil })
		for _, c := range []struct {
			args string
			wait time.Duration
			runs int64
		}{{`{"a":1}`, 0, 1}, {`{ "a": 1 }`, 59 * time.Second, 1}, {`{"a":2}`, 0, 2}, {`{"a":1}`, 2 * time.Second, 3}} {
			time.Sleep(c.wait)
			if _, err := b.do(b.call("", c.args)); err != nil {
				t.Fatal(err)
			}
			b.ran(c.runs)
		}
	})
}

func TestLargeAnswer(t *testing.T) {
	b := newBench(t, effect.Options{MaxAnswer: 100}, func(context.Context, *call.Call) (*call.Result, error) {
		return call.Text(strings.Repeat("x", 200)), nil
	})
	if _, err := b.do(b.call("k", "")); err != nil {
		t.Fatal(err)
	}
	if _, err := b.do(b.call("k", "")); codeOf(err) != call.TooLarge || !strings.Contains(string(call.AsError(err).Data), `"replayed":true`) {
		t.Errorf("got %v", err)
	}
	b.ran(1)
}

// down is a store that does not answer.
type down struct {
	effect.Store
	is atomic.Bool
}

func (d *down) Dispatch(ctx context.Context, i *effect.Intent) (effect.Operation, bool, error) {
	if d.is.Load() {
		return effect.Operation{}, false, effect.ErrAway
	}
	return d.Store.Dispatch(ctx, i)
}

func (d *down) Append(ctx context.Context, e []audit.Entry) (int64, error) {
	if d.is.Load() {
		return 0, effect.ErrAway
	}
	return d.Store.Append(ctx, e)
}

// TestStoreDown is a store that does not answer: what has an effect is refused at once, what reads
// after half a minute. When it answers again, nothing is missing.
func TestStoreDown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := &down{Store: inmem.New()}
		b := newBench(t, effect.Options{Store: d}, func(context.Context, *call.Call) (*call.Result, error) { return call.Text("ok"), nil })
		b.store = d.Store.(*inmem.DB) //nolint:forcetypeassert // set above
		ctx, stop := context.WithCancel(t.Context())
		var all sync.WaitGroup
		all.Go(func() { _ = b.Run(ctx) })
		d.is.Store(true)
		if _, err := b.do(b.call("k", "")); codeOf(err) != call.Unavailable || !call.AsError(err).Retryable {
			t.Errorf("an effect: %v", err)
		}
		b.ran(0)
		reader := *b.tool
		reader.Effect = call.Read
		read := func() error {
			c := b.call("", "")
			c.Target = &reader
			_, err := b.do(c)
			return err
		}
		for range 25 {
			if err := read(); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Second)
		}
		time.Sleep(10 * time.Second)
		if err := read(); codeOf(err) != call.Unavailable {
			t.Errorf("a read, long after: %v", err)
		}
		d.is.Store(false)
		time.Sleep(2 * time.Second)
		if err := read(); err != nil {
			t.Error(err)
		}
		stop()
		all.Wait()
		rows, err := b.store.Read(t.Context(), 0, 10)
		if err != nil || len(rows) != 2 || !strings.Contains(string(rows[0].Record), `"count":25`) || !strings.Contains(string(rows[1].Record), `"count":1,`) {
			t.Errorf("the log has %d records: %s, %v", len(rows), rows[0].Record, err)
		}
	})
}

// TestReadsWithoutRun are written by their callers.
func TestReadsWithoutRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, effect.Options{}, func(context.Context, *call.Call) (*call.Result, error) { return call.Text("ok"), nil })
		b.tool.Effect = call.Read
		for range 3 {
			if _, err := b.do(b.call("ignored", "")); err != nil {
				t.Fatal(err)
			}
			time.Sleep(600 * time.Millisecond)
		}
		b.wantLog("reads")
		b.ran(3)
	})
}

// TestSweep settles what nobody holds.
func TestSweep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, effect.Options{}, nil)
		lost, reserved := storetest.Reservation("lost"), storetest.Reservation("reserved")
		lost.Lease, reserved.Lease = time.Second, time.Second
		if _, _, err := b.store.Dispatch(t.Context(), &effect.Intent{Reservation: lost, Entry: storetest.Entry(audit.Intent, lost.ID)}); err != nil {
			t.Fatal(err)
		}
		if _, _, err := b.store.Reserve(t.Context(), &reserved); err != nil {
			t.Fatal(err)
		}
		ctx, stop := context.WithCancel(t.Context())
		var all sync.WaitGroup
		all.Go(func() { _ = b.Run(ctx) })
		time.Sleep(10 * time.Second)
		stop()
		all.Wait()
		log := strings.Join(b.log(), "; ")
		if !strings.Contains(log, "outcome outcome_unknown outcome_unknown") || !strings.Contains(log, "outcome failed_not_executed canceled") {
			t.Errorf("the log says %s", log)
		}
	})
}

func TestNewRefuses(t *testing.T) {
	for name, o := range map[string]effect.Options{
		"no store": {},
		"below":    {Store: inmem.New(), Wait: -1},
		"pattern":  {Store: inmem.New(), Rules: []effect.Rule{{Tool: "["}}},
		"lookup":   {Store: inmem.New(), Rules: []effect.Rule{{Tool: "a", Recovery: call.RecoverLookup}}},
		"once":     {Store: inmem.New(), Rules: []effect.Rule{{Tool: "a", Once: -1}}},
		"settle":   {Store: inmem.New(), Rules: []effect.Rule{{Tool: "a", Recovery: call.RecoverLookup, Lookup: "b", Settle: -1}}},
		"alone":    {Store: inmem.New(), Rules: []effect.Rule{{Tool: "a", Recovery: call.RecoverSafe, Settle: time.Second}}},
		"too long": {Store: inmem.New(), Retention: time.Hour, Rules: []effect.Rule{{Tool: "a", Recovery: call.RecoverLookup, Lookup: "b", Settle: 61 * time.Minute}}},
	} {
		if _, err := effect.New(o); err == nil {
			t.Errorf("%s is accepted", name)
		}
	}
}

// FuzzValues holds that what is sealed comes back, and that nothing else does.
func FuzzValues(f *testing.F) {
	f.Add("op", []byte("value"))
	key := secret.RandomKey()
	box, err := key.Box("newel stored values")
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, operation string, data []byte) {
		sealed, err := effect.SealValues(box, operation, []audit.Value{audit.NewValue("arguments", data)})
		if err != nil {
			t.Fatal(err)
		}
		values, err := effect.OpenValues(key, operation, sealed)
		if err != nil || len(values) != 1 || string(values[0].Data) != string(data) {
			t.Errorf("got %v, %v", values, err)
		}
		if _, err := effect.OpenValues(key, operation+"x", sealed); err == nil {
			t.Error("opened as those of another operation")
		}
		_, _ = effect.OpenValues(key, operation, data) // whatever it is: no panic
	})
}

// BenchmarkRead is what the step costs a call without an effect.
func BenchmarkRead(b *testing.B) {
	effects, err := effect.New(effect.Options{Store: inmem.New(), Key: secret.RandomKey()})
	if err != nil {
		b.Fatal(err)
	}
	answer := call.Text("ok")
	step := effects.Guard("/mcp", nil)(func(context.Context, *call.Call) (*call.Result, error) { return answer, nil })
	c := &call.Call{Kind: call.Tool, Target: &call.Capability{Kind: call.Tool, Name: "get_order", Effect: call.Read}, Principal: &call.Principal{Tenant: "acme", ID: "https://login.example.com#alice", Client: "agent"}, Door: "http"}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := step(b.Context(), c); err != nil {
			b.Fatal(err)
		}
	}
}

// away is a breaker that is open.
type away struct{ open atomic.Bool }

func (a *away) Ready(*call.Call) error {
	if a.open.Load() {
		return call.Errorf(call.Unavailable, "it is failing")
	}
	return nil
}

// While what a call goes to is away nothing is written of it, and what was answered before is
// answered again.
func TestOpenBreaker(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		breaker := &away{}
		b := newBench(t, effect.Options{Breaker: breaker}, func(_ context.Context, c *call.Call) (*call.Result, error) {
			if string(c.Args) == `{"lost":1}` {
				return nil, call.Errorf(call.OutcomeUnknown, "lost")
			}
			return call.Text("paid"), nil
		})
		if _, err := b.do(b.call("before", `{}`)); err != nil {
			t.Fatal(err)
		}
		if _, err := b.do(b.call("lost", `{"lost":1}`)); codeOf(err) != call.OutcomeUnknown {
			t.Fatal(err)
		}
		written := len(b.log())
		breaker.open.Store(true)
		for _, key := range []string{"", "new"} {
			if _, err := b.do(b.call(key, `{}`)); codeOf(err) != call.Unavailable || !strings.Contains(err.Error(), "failing") {
				t.Errorf("key %q: %v", key, err)
			}
		}
		c := b.call("before", `{}`)
		if r, err := b.do(c); err != nil || !c.Event.Replayed || !strings.Contains(string(r.Content), "paid") {
			t.Errorf("the replay: %v, %v", r, err)
		}
		if _, err := b.do(b.call("before", `{"other":1}`)); codeOf(err) != call.Failed {
			t.Errorf("the key with other arguments: %v", err)
		}
		if _, err := b.do(b.call("lost", `{"lost":1}`)); codeOf(err) != call.OutcomeUnknown {
			t.Errorf("what is not known: %v", err)
		}
		time.Sleep(25 * time.Hour) // the answer is not kept any more
		if _, err := b.do(b.call("before", `{}`)); codeOf(err) != call.Unavailable {
			t.Errorf("an old answer: %v", err)
		}
		b.ran(2)
		if got := len(b.log()); got != written {
			t.Errorf("%d records were written", got-written)
		}
		breaker.open.Store(false)
		if _, err := b.do(b.call("new", `{}`)); err != nil {
			t.Errorf("the refused one, again: %v", err)
		}
		b.ran(3)
	})
}

// TestAnswersOnce is a call without a key that asks: what its answers lead to is done once, however often
// they are sent, and for tools that read as often.
func TestAnswersOnce(t *testing.T) {
	var fail error
	gate, begun := make(chan struct{}), make(chan struct{}, 10)
	b := newBench(t, effect.Options{Wait: time.Millisecond, Retention: time.Millisecond}, func(ctx context.Context, c *call.Call) (*call.Result, error) {
		switch {
		case fail != nil:
			return nil, fail
		case c.Asked == "" || c.Trace.Correlation == "more":
			return nil, &call.InputRequired{Questions: []call.Question{{Key: "sure", Method: call.MethodElicit}}}
		case c.Trace.Correlation == "slow":
			begun <- struct{}{}
			select {
			case <-gate:
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		}
		return call.Text("done"), nil
	})
	try := func(ctx context.Context, asked, how string) error {
		c := b.call("", "{}")
		c.Asked, c.Trace.Correlation = asked, how
		_, err := b.step(ctx, c)
		return err
	}
	ctx := t.Context()
	var ask *call.InputRequired
	if err := try(ctx, "", ""); !errors.As(err, &ask) {
		t.Fatal(err)
	}
	fail = call.Errorf(call.Unavailable, "not now")
	if err := try(ctx, "a", ""); codeOf(err) != call.Unavailable {
		t.Fatal(err)
	}
	fail = nil
	for range 2 { // nothing was done: the answers are still good, also to be asked once more
		if err := try(ctx, "a", "more"); !errors.As(err, &ask) {
			t.Fatal(err)
		}
	}
	before := b.runs.Load()
	if err := try(ctx, "a", ""); err != nil {
		t.Fatal(err)
	}
	if err := try(ctx, "a", ""); codeOf(err) != call.Conflict || call.AsError(err).Retryable || !strings.Contains(string(call.AsError(err).Data), "state_used") {
		t.Errorf("answers sent again: %v", err)
	}
	b.ran(before + 1)
	if err := try(ctx, "b", ""); err != nil {
		t.Errorf("answers to another question: %v", err)
	}

	var all sync.WaitGroup
	short, cancel := context.WithCancel(ctx)
	all.Go(func() {
		if err := try(short, "c", "slow"); codeOf(err) != call.OutcomeUnknown {
			t.Errorf("its caller went away: %v", err)
		}
	})
	<-begun
	if err := try(ctx, "c", "slow"); codeOf(err) != call.Conflict || !call.AsError(err).Retryable {
		t.Errorf("the same answers at once: %v", err)
	}
	cancel() // without a key it is not finished for somebody who comes back
	all.Wait()
	before = b.runs.Load()
	if err := try(ctx, "c", ""); codeOf(err) != call.OutcomeUnknown {
		t.Errorf("answers of a call of which nobody knows: %v", err)
	}
	b.ran(before)

	b.tool.Effect = call.Read
	for range 2 {
		if err := try(ctx, "a", ""); err != nil {
			t.Errorf("a tool that reads: %v", err)
		}
	}
}

// slow is a store that takes long to say that an intent is durable.
type slow struct {
	*inmem.DB
	by time.Duration
}

func (s *slow) Dispatch(ctx context.Context, i *effect.Intent) (effect.Operation, bool, error) {
	op, held, err := s.DB.Dispatch(ctx, i)
	time.Sleep(s.by)
	return op, held, err
}

// TestAsleep is a process that sleeps between the intent and the first byte: nothing is sent any more, whether
// somebody took the call over or not.
func TestAsleep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &slow{DB: inmem.New()}
		b := newBench(t, effect.Options{Store: store, Wait: time.Millisecond}, func(context.Context, *call.Call) (*call.Result, error) { return call.Text("ok"), nil })
		b.store = store.DB
		for _, key := range []string{"", "k"} {
			store.by = 10 * time.Second
			if _, err := b.do(b.call(key, "{}")); codeOf(err) != call.Unavailable {
				t.Errorf("asleep with the key %q: %v", key, err)
			}
			before := b.runs.Load()
			store.by = 8 * time.Second
			if _, err := b.do(b.call(key, "{}")); err != nil {
				t.Errorf("awake with the key %q: %v", key, err)
			}
			b.ran(before + 1)
		}
		b.wantLog("intent", "outcome failed_not_executed unavailable", "intent", "outcome completed", "intent", "outcome failed_not_executed unavailable", "intent", "outcome completed")

		store.by = 2 * time.Minute // longer than the lease: somebody else settles it
		slept := make(chan error)
		go func() {
			_, err := b.do(b.call("l", "{}"))
			slept <- err
		}()
		time.Sleep(100 * time.Second)
		ctx, cancel := context.WithCancel(t.Context())
		var all sync.WaitGroup
		all.Go(func() { _ = b.Run(ctx) })
		synctest.Wait()
		if err := <-slept; codeOf(err) != call.Conflict || !call.AsError(err).Retryable {
			t.Errorf("taken over: %v", err)
		}
		cancel()
		all.Wait()
		b.ran(2)
	})
}

// TestUnknownAgain is that a call of which nobody knows may be sent again where that finds out what became of it.
func TestUnknownAgain(t *testing.T) {
	for _, c := range []struct {
		key      string
		recovery call.Recovery
		want     bool
	}{{"k", call.RecoverNone, false}, {"k", call.RecoverResend, true}, {"", call.RecoverResend, false}} {
		b := newBench(t, effect.Options{Rules: []effect.Rule{{Tool: "pay", Recovery: c.recovery}}}, func(context.Context, *call.Call) (*call.Result, error) {
			return nil, call.Errorf(call.Timeout, "too long")
		})
		_, err := b.do(b.call(c.key, "{}"))
		if e := call.AsError(err); codeOf(err) != call.OutcomeUnknown || e.Retryable != c.want || strings.Contains(e.Message, "again with the same key") != c.want {
			t.Errorf("with the key %q and the recovery %v: %v", c.key, c.recovery, err)
		}
	}
}

// values opens what the audit log keeps of its newest record of an act.
func (b *bench) values(act string) (rec *audit.Record, values []audit.Value) {
	b.t.Helper()
	rows, err := b.store.Read(b.t.Context(), 0, 1000)
	if err != nil {
		b.t.Fatal(err)
	}
	for i := len(rows) - 1; i >= 0; i-- {
		if rec, err = audit.Decode(rows[i].Record); err != nil {
			b.t.Fatal(err)
		}
		if rec.Act == act {
			if values, err = effect.OpenValues(b.key, rec.Operation, rows[i].Private); err != nil {
				b.t.Fatal(err)
			}
			return rec, values
		}
	}
	b.t.Fatalf("there is no record of act %q", act)
	return nil, nil
}

// What is secret does not come into the audit log, and nothing there is computed from it; the tool and
// the caller see it as it was.
func TestRedacted(t *testing.T) {
	args := `{"to":"bob","password":"hunter2","door":"1234","card":"4111 1111 1111 1111"}`
	var seen string
	b := newBench(t, effect.Options{}, func(_ context.Context, c *call.Call) (*call.Result, error) {
		seen = string(c.Args)
		return call.Text("for hunter2"), nil
	})
	b.tool.Input = jsontext.Value(`{"type":"object","properties":{"door":{"type":"string","writeOnly":true}}}`)
	for range 2 { // the second is a replay
		r, err := b.do(b.call("k", args))
		if err != nil || !strings.Contains(string(r.Content), "for hunter2") {
			t.Fatalf("the caller got %+v, %v", r, err)
		}
	}
	if b.ran(1); seen != args {
		t.Errorf("the tool got %s", seen)
	}
	rec, values := b.values(audit.Intent)
	want := `{"to":"bob","password":"[redacted:password]","door":"[redacted:schema]","card":"[redacted:payment-card]"}`
	if len(values) != 1 || string(values[0].Data) != want {
		t.Fatalf("the log keeps %q", values)
	}
	if !values[0].Matches(rec.Digests[0]) {
		t.Error("the digest is not that of what is kept")
	}
	real := values[0]
	if real.Data = []byte(args); real.Matches(rec.Digests[0]) {
		t.Error("with the salt one can try what the secret is")
	}
}
