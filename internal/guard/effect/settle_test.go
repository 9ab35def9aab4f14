package effect_test

import (
	"context"
	"fmt"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/guard/effect"
	"newel.dev/newel/internal/store/inmem"
	"newel.dev/newel/internal/store/storetest"
)

// queue is a tool that takes calls, answers none in time and does them later, with a lookup beside it.
type queue struct {
	*bench
	hangs time.Duration // from a call until it is done; 0: it is never done
	done  atomic.Int64
}

func newQueue(t *testing.T, o effect.Options, hangs time.Duration) *queue {
	t.Helper()
	q := &queue{hangs: hangs}
	q.bench = newBench(t, o, func(context.Context, *call.Call) (*call.Result, error) {
		if q.hangs > 0 {
			time.AfterFunc(q.hangs, func() { q.done.Add(1) })
		}
		return nil, call.Errorf(call.Timeout, "no answer")
	})
	time.Sleep(time.Second) // the time at which a store is made is no time to it
	look := &call.Capability{Kind: call.Tool, Name: "find", Effect: call.Read, Run: func(context.Context, *call.Call) (*call.Result, error) {
		r := call.Text("says the tool")
		r.Structured = fmt.Appendf(nil, `{"found":%v}`, q.done.Load() > 0)
		return r, nil
	}}
	q.tool.Recovery, q.tool.Lookup = call.RecoverLookup, look.Name
	q.step = q.Guard("/mcp", func(string) *call.Capability { return look })(func(ctx context.Context, c *call.Call) (*call.Result, error) {
		q.runs.Add(1)
		return c.Target.Run(ctx, c)
	})
	return q
}

// early makes a call that may not be sent, and returns how long to wait.
func (q *queue) early(ctx context.Context) time.Duration {
	q.t.Helper()
	before := q.runs.Load()
	_, err := q.step(ctx, q.call("k", `{}`))
	e := call.AsError(err)
	if e == nil || e.Code != call.OutcomeUnknown || !e.Retryable || e.RetryAfter <= 0 {
		q.t.Fatalf("too early it is answered %v", err)
	}
	q.ran(before)
	return e.RetryAfter
}

// TestQueued is a call that waits in a tool while a lookup does not find it: it is done once.
func TestQueued(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := newQueue(t, effect.Options{Rules: []effect.Rule{{Tool: "pay", Recovery: call.RecoverLookup, Lookup: "find", Settle: 30 * time.Second}}}, 20*time.Second)
		sent := time.Now()
		if _, err := q.do(q.call("k", `{}`)); codeOf(err) != call.OutcomeUnknown {
			t.Fatal(err)
		}
		for range 10 {
			wait := q.early(t.Context())
			if left := 30*time.Second - time.Since(sent); wait != left {
				t.Fatalf("it says to wait %v, %v are left", wait, left)
			}
			time.Sleep(1900 * time.Millisecond) // looking does not begin the time anew
		}
		time.Sleep(time.Second) // the tool wakes up; what is found is believed before the time is over
		for range 2 {
			if r, err := q.do(q.call("k", `{}`)); err != nil || r == nil {
				t.Fatal(err)
			}
		}
		q.ran(1)
		if n := q.done.Load(); n != 1 {
			t.Errorf("it was done %d times", n)
		}
	})
}

// TestSettle is a call that is never done: it is sent again when the time is over, not before, and the
// time begins anew with it.
func TestSettle(t *testing.T) {
	const second = time.Second
	for name, c := range map[string]struct {
		o       effect.Options
		own     time.Duration // of the tool
		allowed time.Duration // for the call, by its context
		want    time.Duration
	}{
		"as a rule says":                      {o: effect.Options{Rules: []effect.Rule{{Tool: "p*", Recovery: call.RecoverLookup, Lookup: "find", Settle: 7 * second}}}, own: 5 * second, want: 7 * second},
		"as the tool says":                    {own: 5 * second, want: 5 * second},
		"a rule about something else":         {o: effect.Options{Rules: []effect.Rule{{Tool: "pay", Required: true}}}, own: 5 * second, want: 5 * second},
		"twice the longest call":              {want: 120 * second},
		"of calls that are longer":            {o: effect.Options{Deadline: 90 * second}, want: 180 * second},
		"of calls whose caller waits no more": {allowed: second, want: 120 * second},
		"of a run of a task":                  {allowed: time.Hour, want: 2 * time.Hour},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				q := newQueue(t, c.o, 0)
				q.tool.Settle = c.own
				try := func(do func(ctx context.Context)) {
					ctx := t.Context()
					if c.allowed > 0 {
						var cancel context.CancelFunc
						ctx, cancel = context.WithTimeout(ctx, c.allowed)
						defer cancel()
					}
					do(ctx)
				}
				for sent := int64(1); sent < 4; sent++ {
					try(func(ctx context.Context) {
						if _, err := q.step(ctx, q.call("k", `{}`)); codeOf(err) != call.OutcomeUnknown || call.AsError(err).RetryAfter != 0 {
							t.Fatal(err)
						}
					})
					q.ran(sent)
					try(func(ctx context.Context) {
						if wait := q.early(ctx); wait != c.want {
							t.Fatalf("it says to wait %v, want %v", wait, c.want)
						}
					})
					time.Sleep(c.want - time.Microsecond)
					try(func(ctx context.Context) { q.early(ctx) })
					time.Sleep(time.Microsecond)
				}
			})
		})
	}
}

// TestSettleClock holds that the time is not shortened by a clock that is set back, nor by a program
// that did not write it down, and that it comes to its end.
func TestSettleClock(t *testing.T) {
	const now, second = int64(1_000_000_000), int64(1_000_000)
	seen := effect.Operation{ID: "o", State: effect.Unknown, Fence: 3, Fingerprint: []byte("f")}
	look := effect.Reservation{ID: "o", Expect: 3, Fingerprint: []byte("f"), Holder: "looks", Recover: true, Lease: time.Second}
	for name, c := range map[string]struct {
		sent int64
		want time.Duration
	}{
		"a while ago": {now - 5*second, 5 * time.Second}, "in the future": {now + 86_400*second, 0}, "not known": {0, 0},
	} {
		op := seen
		op.Sent = c.sent
		held, ok, _ := look.Claim(now, &op)
		if got := held.At(now); !ok || got.Since != c.want {
			t.Errorf("%s: since %v, want %v (held %v)", name, got.Since, c.want, ok)
		}
		if got := held.At(now + 10*second); got.Since != c.want+10*time.Second {
			t.Errorf("%s: ten seconds later since %v", name, got.Since)
		}
	}
}

// An operation of a process that died before it could say anything is looked for like any other.
func TestSettleAfterCrash(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := newQueue(t, effect.Options{Rules: []effect.Rule{{Tool: "pay", Recovery: call.RecoverLookup, Lookup: "find", Settle: 3 * time.Minute}}}, 0)
		dies := &dying{q.store}
		died := newQueue(t, effect.Options{Store: dies}, 0)
		if _, err := died.do(died.call("k", `{}`)); codeOf(err) != call.OutcomeUnknown {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Minute) // its lease is over
		if wait := q.early(t.Context()); wait != time.Minute {
			t.Errorf("it says to wait %v", wait)
		}
		time.Sleep(time.Minute)
		_, _ = q.do(q.call("k", `{}`))
		q.ran(1)
		storetest.Check(t, q.store)
	})
}

// dying is the store of a process that dies before it can say how a call ended.
type dying struct{ *inmem.DB }

// Complete implements effect.Store.
func (*dying) Complete(context.Context, *effect.Outcome) (effect.Operation, error) {
	return effect.Operation{}, effect.ErrAway
}
