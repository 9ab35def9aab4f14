package resilience

import (
	"context"
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"newel.dev/newel/call"
)

// bench is the step before a backend that does what run says.
type bench struct {
	*Resilience
	t    *testing.T
	step call.Handler
	runs atomic.Int64
}

func newBench(t *testing.T, b Bounds, run call.Handler) *bench {
	t.Helper()
	r, err := New(Options{Backends: []Backend{{Name: "db", Bounds: b}}, Safe: func(c *call.Capability) bool { return c.Recovery == call.RecoverSafe }}, nil)
	if err != nil {
		t.Fatal(err)
	}
	n := &bench{Resilience: r, t: t}
	n.step = r.Guard(func(ctx context.Context, c *call.Call) (*call.Result, error) {
		n.runs.Add(1)
		return run(ctx, c)
	})
	return n
}

func (b *bench) ran(want int64) {
	b.t.Helper()
	if got := b.runs.Load(); got != want {
		b.t.Errorf("the backend was asked %d times, want %d", got, want)
	}
}

func (b *bench) state(want string) {
	b.t.Helper()
	if got := b.Status()[0].Breaker; got != want {
		b.t.Errorf("the breaker is %s, want %s", got, want)
	}
}

func tool(e call.Effect) *call.Call {
	return &call.Call{Kind: call.Tool, Name: "x", Target: &call.Capability{Kind: call.Tool, Name: "x", Backend: "db", Effect: e}, Sink: call.Discard, Asker: call.NoAsker}
}

func away() error { return call.Errorf(call.Unavailable, "away") }

func want(t *testing.T, err error, code call.Code, text string) *call.Error {
	t.Helper()
	var e *call.Error
	if !errors.As(err, &e) || e.Code != code || !strings.Contains(e.Message, text) {
		t.Fatalf("got %v, want %v with %q", err, code, text)
	}
	return e
}

// The breaker opens after failures in a row, lets one call try after its delay, and closes when that
// goes well.
func TestBreaker(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var fails atomic.Bool
		fails.Store(true)
		hold := make(chan struct{})
		b := newBench(t, Bounds{Attempts: 1, Failures: 3, Delay: 10 * time.Second}, func(_ context.Context, c *call.Call) (*call.Result, error) {
			if c.Name == "hold" {
				<-hold
			}
			if fails.Load() {
				return nil, away()
			}
			return &call.Result{}, nil
		})
		do := func() error { _, err := b.step(t.Context(), tool(call.Read)); return err }
		for range 3 {
			want(t, do(), call.Unavailable, "away")
		}
		b.state("open")
		e := want(t, do(), call.Unavailable, "failing")
		if !e.Retryable || e.RetryAfter != 10*time.Second {
			t.Errorf("advice %v, %v", e.Retryable, e.RetryAfter)
		}
		if err := b.Ready(tool(call.Write)); err == nil {
			t.Error("ready while it is open")
		}
		b.ran(3)

		time.Sleep(10 * time.Second)
		if err := b.Ready(tool(call.Write)); err != nil {
			t.Errorf("not ready when somebody may try: %v", err)
		}
		want(t, do(), call.Unavailable, "away") // the one that tries: it opens again
		b.state("open")
		b.ran(4)

		time.Sleep(10 * time.Second)
		fails.Store(false)
		probe := make(chan error)
		go func() {
			c := tool(call.Read)
			c.Name = "hold"
			_, err := b.step(context.Background(), c)
			probe <- err
		}()
		synctest.Wait()
		want(t, do(), call.Unavailable, "failing") // one tries at a time
		close(hold)
		if err := <-probe; err != nil {
			t.Error(err)
		}
		b.state("closed")
		if err := do(); err != nil {
			t.Error(err)
		}
		b.ran(6)
		if s := b.Status()[0]; s.Open != 3 || s.Running != 0 || s.Queued != 0 {
			t.Errorf("status %+v", s)
		}
	})
}

// What is the fault of the backend opens the breaker, what it or the caller decides does not.
func TestVerdicts(t *testing.T) {
	permanent := call.Errorf(call.Unavailable, "wrong credentials")
	permanent.Retryable = false
	for name, tt := range map[string]struct {
		err   error
		opens bool
	}{
		"away":                    {away(), true},
		"no answer in time":       {context.DeadlineExceeded, true},
		"broken off":              {call.Errorf(call.OutcomeUnknown, "lost"), true},
		"it gave up by itself":    {call.Errorf(call.Timeout, "ask for less"), false},
		"permanent":               {permanent, false},
		"the caller went away":    {context.Canceled, false},
		"its limit":               {call.Errorf(call.Exhausted, "429"), false},
		"no":                      {call.Errorf(call.Denied, "no"), false},
		"bad arguments":           {call.Errorf(call.Invalid, "no"), false},
		"the tool could not":      {call.Errorf(call.Failed, "no"), false},
		"a bug of ours":           {errors.New("nil map"), false},
		"it asks":                 {&call.InputRequired{}, false},
		"a result that says so":   {nil, false},
		"an answer that is large": {call.Errorf(call.TooLarge, "no"), false},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t, Bounds{Attempts: 1, Failures: 2}, func(context.Context, *call.Call) (*call.Result, error) { return &call.Result{IsError: true}, tt.err })
			for range 2 {
				_, _ = b.step(t.Context(), tool(call.Write))
			}
			b.state(map[bool]string{true: "open", false: "closed"}[tt.opens])
		})
	}
}

// A success in between makes the failures none in a row, and a call that says nothing does not.
func TestFailuresInARow(t *testing.T) {
	for between, state := range map[string]string{"good": "closed", "cancelled": "open"} {
		b := newBench(t, Bounds{Attempts: 1, Failures: 2}, func(_ context.Context, c *call.Call) (*call.Result, error) {
			switch c.Name {
			case "good":
				return &call.Result{}, nil
			case "cancelled":
				return nil, context.Canceled
			}
			return nil, away()
		})
		for _, name := range []string{"bad", between, "bad"} {
			c := tool(call.Read)
			c.Name = name
			_, _ = b.step(t.Context(), c)
		}
		b.state(state)
	}
}

// A call that tries and panics, or is cancelled, does not close the breaker, nor keep it half-open.
func TestProbeThatSaysNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, Bounds{Attempts: 1, Failures: 1, Delay: time.Second}, func(_ context.Context, c *call.Call) (*call.Result, error) {
			switch c.Name {
			case "panic":
				panic("bug")
			case "cancel":
				return nil, context.Canceled
			}
			return nil, away()
		})
		for _, name := range []string{"fail", "panic", "cancel"} {
			time.Sleep(time.Second)
			func() {
				defer func() { _ = recover() }()
				c := tool(call.Read)
				c.Name = name
				_, _ = b.step(t.Context(), c)
			}()
			b.state("open")
		}
		b.ran(3)
		if s := b.Status()[0]; s.Running != 0 {
			t.Errorf("%d places are not given back", s.Running)
		}
	})
}

// What may be made again, and what never is.
func TestRetries(t *testing.T) {
	later := call.Errorf(call.Exhausted, "429")
	later.RetryAfter = time.Second
	muchLater := call.Errorf(call.Unavailable, "503")
	muchLater.RetryAfter = 30 * time.Second
	permanent := call.Errorf(call.Unavailable, "no login")
	permanent.Retryable = false
	unknown := call.Errorf(call.OutcomeUnknown, "lost")
	safe := tool(call.Write)
	safe.Target.Recovery = call.RecoverSafe
	resumed := tool(call.Read)
	resumed.Resume = "state"
	progress := tool(call.Read)
	progress.Progress = true
	asks := tool(call.Read)
	asks.Client.ElicitForm = true
	quiet := tool(call.Read)
	quiet.Progress, quiet.Client.Sampling = true, true
	for name, tt := range map[string]struct {
		c    *call.Call
		err  error
		does func(ctx context.Context, c *call.Call)
		runs int64
	}{
		"nothing was done":                 {tool(call.Destructive), away(), nil, 3},
		"its limit, with a time":           {tool(call.Write), later, nil, 3},
		"its limit, for too long":          {tool(call.Read), muchLater, nil, 1},
		"permanent":                        {tool(call.Read), permanent, nil, 1},
		"unknown, of what reads":           {tool(call.Read), unknown, nil, 3},
		"unknown, of what is safe":         {safe, unknown, nil, 3},
		"unknown, of an effect":            {tool(call.Write), unknown, nil, 1},
		"unknown, of no class":             {tool(call.Unknown), unknown, nil, 1},
		"a time-out of an effect":          {tool(call.Write), context.DeadlineExceeded, nil, 1},
		"a time-out of what reads":         {tool(call.Read), context.DeadlineExceeded, nil, 1},
		"no":                               {tool(call.Read), call.Errorf(call.Failed, "no"), nil, 1},
		"a question":                       {tool(call.Read), &call.InputRequired{}, nil, 1},
		"it goes on":                       {resumed, away(), nil, 1},
		"progress went out":                {progress, away(), func(ctx context.Context, c *call.Call) { _ = c.Sink.Progress(ctx, call.Progress{}) }, 1},
		"a log message went out":           {progress, away(), func(ctx context.Context, c *call.Call) { _ = c.Sink.Log(ctx, call.LogMessage{}) }, 1},
		"the caller was asked":             {asks, away(), func(ctx context.Context, c *call.Call) { _, _ = c.Asker.Ask(ctx) }, 1},
		"it could speak, and said nothing": {quiet, away(), nil, 3},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBench(t, Bounds{Failures: 100}, func(ctx context.Context, c *call.Call) (*call.Result, error) {
					if tt.does != nil {
						tt.does(ctx, c)
					}
					return nil, tt.err
				})
				c := *tt.c
				ctx, stop := context.WithTimeout(t.Context(), time.Minute)
				defer stop()
				if _, err := b.step(ctx, &c); !errors.Is(err, tt.err) {
					t.Errorf("got %v", err)
				}
				b.ran(tt.runs)
				if n := c.Event.Attempts; tt.runs > 1 && int64(n) != tt.runs || tt.runs == 1 && n != 0 {
					t.Errorf("%d attempts are recorded", n)
				}
				if got := b.Status()[0].Retries; got != tt.runs-1 {
					t.Errorf("%d retries are counted", got)
				}
			})
		})
	}
}

// The pauses are random below a bound that doubles, and never before what the backend asks for.
func TestPauses(t *testing.T) {
	for n, most := range map[int]time.Duration{1: 100 * time.Millisecond, 2: 200 * time.Millisecond, 5: 1600 * time.Millisecond, 6: 2 * time.Second, 1 << 30: 2 * time.Second} {
		if low, high := backoff(n, 0), backoff(n, 0.999999); low != 0 || high >= most || high < most-time.Millisecond {
			t.Errorf("after attempt %d: from %v to %v, want below %v", n, low, high, most)
		}
	}
	synctest.Test(t, func(t *testing.T) {
		busy := call.Errorf(call.Unavailable, "503")
		busy.RetryAfter = 1500 * time.Millisecond
		var at []time.Time
		b := newBench(t, Bounds{Failures: 100}, func(context.Context, *call.Call) (*call.Result, error) {
			at = append(at, time.Now())
			return nil, busy
		})
		_, _ = b.step(t.Context(), tool(call.Read))
		for i := 1; i < len(at); i++ {
			if pause := at[i].Sub(at[i-1]); pause < busy.RetryAfter || pause > busy.RetryAfter+200*time.Millisecond {
				t.Errorf("a pause of %v", pause)
			}
		}
		b.ran(3)
	})
}

// A call is not made again when its time does not suffice for another attempt like the last one.
func TestDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, Bounds{Failures: 100, Attempts: 10}, func(context.Context, *call.Call) (*call.Result, error) {
			time.Sleep(4 * time.Second)
			return nil, away()
		})
		ctx, stop := context.WithTimeout(t.Context(), 10*time.Second)
		defer stop()
		start := time.Now()
		_, err := b.step(ctx, tool(call.Read))
		want(t, err, call.Unavailable, "away")
		if took := time.Since(start); took >= 10*time.Second {
			t.Errorf("it took %v", took)
		}
		b.ran(2)
	})
}

// When every call fails, few attempts come on top; what goes well fills the budget again.
func TestBudget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var good atomic.Bool
		b := newBench(t, Bounds{Failures: 1 << 20, Budget: 0.2, Attempts: 2}, func(context.Context, *call.Call) (*call.Result, error) {
			if good.Load() {
				return &call.Result{}, nil
			}
			return nil, away()
		})
		do := func(n int) {
			for range n {
				_, _ = b.step(t.Context(), tool(call.Read))
			}
		}
		do(1000)
		if retries := b.Status()[0].Retries; retries < 200 || retries > 212 {
			t.Errorf("%d retries of 1,000 calls", retries)
		}
		good.Store(true)
		do(50)
		good.Store(false)
		before := b.Status()[0].Retries
		do(10)
		if retries := b.Status()[0].Retries - before; retries != 10 {
			t.Errorf("%d retries of 10 calls with a full budget", retries)
		}
	})
}

// A backend that hangs has its places and its queue, and no more.
func TestBulkhead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		free := make(chan struct{})
		b := newBench(t, Bounds{Concurrent: 2, Queued: 1, QueueTimeout: 3 * time.Second}, func(context.Context, *call.Call) (*call.Result, error) {
			<-free
			return &call.Result{}, nil
		})
		results := make(chan error, 3)
		do := func() { _, err := b.step(context.Background(), tool(call.Read)); results <- err }
		go do()
		go do()
		synctest.Wait()
		start := time.Now()
		go do()
		synctest.Wait()
		if s := b.Status()[0]; s.Running != 2 || s.Queued != 1 {
			t.Errorf("status %+v", s)
		}
		_, err := b.step(t.Context(), tool(call.Read))
		e := want(t, err, call.Exhausted, "running and waiting")
		if !e.Retryable || e.RetryAfter <= 0 || time.Since(start) != 0 {
			t.Errorf("advice %v, %v after %v", e.Retryable, e.RetryAfter, time.Since(start))
		}
		want(t, <-results, call.Exhausted, "none ended in time")
		if took := time.Since(start); took != 3*time.Second {
			t.Errorf("it waited for %v", took)
		}
		c := tool(call.Read)
		next := make(chan error)
		go func() { _, err := b.step(context.Background(), c); next <- err }()
		synctest.Wait()
		time.Sleep(time.Second)
		free <- struct{}{} // whoever waits has the place at once
		synctest.Wait()
		b.ran(3)
		close(free)
		if err := <-next; err != nil || c.Event.QueueTime != time.Second {
			t.Errorf("%v after %v in the queue", err, c.Event.QueueTime)
		}
		<-results
		<-results
		if s := b.Status()[0]; s.Running != 0 || s.Queued != 0 || s.Full != 2 {
			t.Errorf("status %+v", s)
		}
		b.state("closed")
	})
}

// Tools that are not critical leave half of a queue to the others.
func TestPriority(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		free := make(chan struct{})
		r, err := New(Options{Backends: []Backend{{Name: "db", Bounds: Bounds{Concurrent: 1, Queued: 4, QueueTimeout: time.Minute}}}, NotCritical: []string{"nice_*"}}, nil)
		if err != nil {
			t.Fatal(err)
		}
		step := r.Guard(func(context.Context, *call.Call) (*call.Result, error) { <-free; return &call.Result{}, nil })
		var refused []string
		var all sync.WaitGroup
		for _, name := range []string{"x", "nice_1", "x", "nice_2", "x", "x", "x"} {
			all.Go(func() {
				c := tool(call.Read)
				c.Target.Name = name
				if _, err := step(context.Background(), c); err != nil {
					want(t, err, call.Exhausted, "")
					refused = append(refused, name)
				}
			})
			synctest.Wait()
		}
		if got := strings.Join(refused, " "); got != "nice_2 x" { // one runs, four wait
			t.Errorf("refused: %s", got)
		}
		close(free)
		all.Wait()
	})
}

// A call that goes away while it waits is cancelled, and takes no place.
func TestCancelledInTheQueue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		free := make(chan struct{})
		b := newBench(t, Bounds{Concurrent: 1}, func(context.Context, *call.Call) (*call.Result, error) { <-free; return &call.Result{}, nil })
		done := make(chan struct{})
		go func() { _, _ = b.step(context.Background(), tool(call.Read)); close(done) }()
		synctest.Wait()
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		_, err := b.step(ctx, tool(call.Read))
		want(t, err, call.Timeout, "")
		close(free)
		<-done
		if _, err := b.step(t.Context(), tool(call.Read)); err != nil {
			t.Error(err)
		}
	})
}

// The time-out of a backend ends an attempt, whatever its driver makes of that.
func TestTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, Bounds{Timeout: time.Second, Failures: 2}, func(ctx context.Context, c *call.Call) (*call.Result, error) {
			<-ctx.Done()
			if c.Name == "driver" {
				return nil, errors.New("interrupted")
			}
			return nil, ctx.Err()
		})
		for _, name := range []string{"plain", "driver"} {
			c := tool(call.Read)
			c.Name = name
			_, err := b.step(t.Context(), c)
			if call.AsError(err).Code != call.Timeout {
				t.Errorf("%s: %v", name, err)
			}
		}
		b.state("open")
	})
}

// A person who does not answer is not a backend that hangs.
func TestWaitingForThePerson(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, Bounds{Failures: 1}, func(ctx context.Context, c *call.Call) (*call.Result, error) {
			_, _ = c.Asker.Ask(ctx)
			<-ctx.Done()
			return nil, ctx.Err()
		})
		ctx, stop := context.WithTimeout(t.Context(), time.Second)
		defer stop()
		c := tool(call.Read)
		c.Client.ElicitForm = true
		_, err := b.step(ctx, c)
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
		b.state("closed")
	})
}

// Calls that go to no backend, and what is asked of tasks that run elsewhere, take no part.
func TestOthers(t *testing.T) {
	b := newBench(t, Bounds{Attempts: 1, Failures: 1}, func(context.Context, *call.Call) (*call.Result, error) { return nil, away() })
	_, _ = b.step(t.Context(), tool(call.Read))
	b.state("open")
	elsewhere, built, waiting := tool(call.Read), tool(call.Read), tool(call.Read)
	elsewhere.Elsewhere = "task-1"
	built.Target.Backend = "built in"
	waiting.Kind = call.TaskResult
	for _, c := range []*call.Call{{Kind: call.ListTools}, elsewhere, built, waiting} {
		_, err := b.step(t.Context(), c)
		want(t, err, call.Unavailable, "away")
	}
	b.ran(5)
}

// Functions that have nothing in common have a breaker each, and share their places.
func TestApart(t *testing.T) {
	r, err := New(Options{Backends: []Backend{{Name: "db", Apart: true, Bounds: Bounds{Failures: 1, Attempts: 1}}}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	step := r.Guard(func(_ context.Context, c *call.Call) (*call.Result, error) {
		if c.Target.Name == "bad" {
			return nil, away()
		}
		return &call.Result{}, nil
	})
	bad := tool(call.Read)
	bad.Target.Name = "bad"
	_, err = step(t.Context(), bad)
	want(t, err, call.Unavailable, "away")
	_, err = step(t.Context(), bad)
	want(t, err, call.Unavailable, "failing")
	if _, err := step(t.Context(), tool(call.Read)); err != nil {
		t.Errorf("the other function: %v", err)
	}
	if s := r.Status()[0]; s.Breaker != "open" {
		t.Errorf("status %+v", s)
	}
}

// What is known of a backend stays known while it is the same, as far as its bounds are.
func TestNextConfiguration(t *testing.T) {
	b := newBench(t, Bounds{Attempts: 1, Failures: 1}, func(context.Context, *call.Call) (*call.Result, error) { return nil, away() })
	_, _ = b.step(t.Context(), tool(call.Read))
	for name, tt := range map[string]struct {
		next Backend
		want string
	}{
		"the same":             {Backend{Name: "db", Same: true, Bounds: Bounds{Attempts: 1, Failures: 1}}, "open"},
		"another budget":       {Backend{Name: "db", Same: true, Bounds: Bounds{Attempts: 2, Failures: 1, Budget: 0.5, Concurrent: 3}}, "open"},
		"another breaker":      {Backend{Name: "db", Same: true, Bounds: Bounds{Attempts: 1, Failures: 2}}, "closed"},
		"another of this name": {Backend{Name: "db", Bounds: Bounds{Attempts: 1, Failures: 1}}, "closed"},
	} {
		r, err := New(Options{Backends: []Backend{tt.next}}, b.Resilience)
		if err != nil {
			t.Fatal(err)
		}
		if got := r.Status()[0].Breaker; got != tt.want {
			t.Errorf("%s: the breaker is %s", name, got)
		}
	}
}

// Bounds that make no sense are refused by name.
func TestBadBounds(t *testing.T) {
	for name, b := range map[string]Bounds{
		"Concurrent": {Concurrent: -1}, "Queued": {Queued: -1}, "QueueTimeout": {QueueTimeout: -1}, "Timeout": {Timeout: -1}, "Failures": {Failures: -1},
		"Delay": {Delay: -1}, "Attempts": {Attempts: -1}, "Budget": {Budget: 1.5},
	} {
		if _, err := New(Options{Backends: []Backend{{Name: "db", Bounds: b}}}, nil); err == nil || !strings.Contains(err.Error(), name) || !strings.Contains(err.Error(), `"db"`) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// While there is room and the breaker is closed, a call costs no memory.
func TestCostsNoMemory(t *testing.T) {
	b := newBench(t, Bounds{}, func(context.Context, *call.Call) (*call.Result, error) { return nil, nil })
	c, ctx := tool(call.Read), t.Context()
	if n := testing.AllocsPerRun(1000, func() { _, _ = b.step(ctx, c) }); n != 0 {
		t.Errorf("%v allocations a call", n)
	}
}

// BenchmarkGuard is what a call pays while there is room and the breaker is closed.
func BenchmarkGuard(b *testing.B) {
	r, err := New(Options{Backends: []Backend{{Name: "db"}}}, nil)
	if err != nil {
		b.Fatal(err)
	}
	result := &call.Result{}
	step := r.Guard(func(context.Context, *call.Call) (*call.Result, error) { return result, nil })
	c, ctx := tool(call.Read), b.Context()
	b.ReportAllocs()
	for b.Loop() {
		if _, err := step(ctx, c); err != nil {
			b.Fatal(err)
		}
	}
}
