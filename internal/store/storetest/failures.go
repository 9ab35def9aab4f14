package storetest

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/audit"
	"newel.dev/newel/internal/guard/effect"
	"newel.dev/newel/internal/secret"
)

// errInjected is what a failing operation says.
var errInjected = errors.New("injected")

// faulty fails one operation of a store: before it happened, or although it did.
type faulty struct {
	effect.Store
	at        int // counted from 1; 0 never
	persisted bool
	n         int
}

// fail counts an operation; do is called unless it fails before.
func (f *faulty) fail(do func() error) error {
	f.n++
	if f.n != f.at {
		return do()
	}
	if f.persisted {
		if err := do(); err != nil {
			return err
		}
	}
	return errInjected
}

func (f *faulty) Reserve(ctx context.Context, r *effect.Reservation) (op effect.Operation, held bool, err error) {
	err = f.fail(func() (err error) { op, held, err = f.Store.Reserve(ctx, r); return err })
	if err != nil {
		return effect.Operation{}, false, err
	}
	return op, held, nil
}

func (f *faulty) Dispatch(ctx context.Context, i *effect.Intent) (op effect.Operation, held bool, err error) {
	err = f.fail(func() (err error) { op, held, err = f.Store.Dispatch(ctx, i); return err })
	if err != nil {
		return effect.Operation{}, false, err
	}
	return op, held, nil
}

func (f *faulty) Complete(ctx context.Context, o *effect.Outcome) (op effect.Operation, err error) {
	err = f.fail(func() (err error) { op, err = f.Store.Complete(ctx, o); return err })
	return op, err
}

func (f *faulty) Find(ctx context.Context, scope []byte) (op effect.Operation, err error) {
	err = f.fail(func() (err error) { op, err = f.Store.Find(ctx, scope); return err })
	return op, err
}

func (f *faulty) Append(ctx context.Context, entries []audit.Entry) (i int64, err error) {
	err = f.fail(func() (err error) { i, err = f.Store.Append(ctx, entries); return err })
	return i, err
}

// everyFailure fails the Nth operation of the store, for every N, in both ways, while a caller tries
// with one key until it is told how its call ended. What is held: the call is not done twice, a
// success was done, what was not executed was not done, and nothing is done without its intent in
// the log.
func everyFailure(t *testing.T, e, _ Engine) {
	for _, recovery := range []call.Recovery{call.RecoverNone, call.RecoverResend, call.RecoverLookup} {
		for _, persisted := range []bool{false, true} {
			for at := 0; ; at++ {
				f := &faulty{Store: e, at: at, persisted: persisted}
				name := fmt.Sprintf("%s, operation %d fails (persisted %v)", recovery, at, persisted)
				one(t, e, f, name, recovery)
				if f.n < at {
					break // there are no more operations
				}
			}
		}
	}
}

// one runs one call to its end.
func one(t *testing.T, e Engine, f *faulty, name string, recovery call.Recovery) {
	t.Helper()
	ledger := map[string]int{} // operation: how often
	done := 0
	pay := &call.Capability{Kind: call.Tool, Name: "pay", Effect: call.Write, Recovery: recovery}
	pay.Run = func(_ context.Context, c *call.Call) (*call.Result, error) {
		if !hasIntent(t, e, c.Event.Operation) {
			t.Errorf("%s: it was done without an intent", name)
		}
		if done++; recovery == call.RecoverNone || ledger[c.Once] == 0 {
			ledger[c.Once]++ // with a recovery, what runs it knows it again
		}
		return call.Text("paid " + c.Once), nil
	}
	look := &call.Capability{Kind: call.Tool, Name: "look", Effect: call.Read}
	look.Run = func(context.Context, *call.Call) (*call.Result, error) {
		r := call.Text("paid, says the ledger")
		r.Structured = fmt.Appendf(nil, `{"found":%v}`, done > 0)
		return r, nil
	}
	if recovery == call.RecoverLookup {
		pay.Lookup, pay.Settle = look.Name, time.Microsecond
	}
	effects, err := effect.New(effect.Options{Store: f, Key: secret.RandomKey(), Wait: 10 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	step := effects.Guard("/mcp", func(string) *call.Capability { return look })(func(ctx context.Context, c *call.Call) (*call.Result, error) { return c.Target.Run(ctx, c) })
	try := func() (*call.Result, error) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		return step(ctx, &call.Call{Kind: call.Tool, Name: "pay", Args: []byte(`{"amount":1}`), Key: name, Target: pay, Principal: &call.Principal{ID: "alice"}, Sink: call.Discard, Asker: call.NoAsker})
	}
	var first string
	for attempt := 1; ; attempt++ {
		r, err := try()
		if err == nil {
			if done == 0 {
				t.Errorf("%s: success, and nothing was done", name)
			}
			if first == "" {
				first = string(r.Content)
				continue // once more: the same answer
			}
			if string(r.Content) != first {
				t.Errorf("%s: two answers: %s and %s", name, first, r.Content)
			}
			break
		}
		c := call.AsError(err).Code
		if c == call.OutcomeUnknown && recovery == call.RecoverNone && attempt > 1 {
			break // it stays so
		}
		if c == call.Conflict {
			// Its first attempt failed so that it still holds the operation: as if that caller had died.
			expire(t, e, name)
		}
		if first != "" && c != call.Unavailable {
			t.Errorf("%s: an answer, and then %v", name, err)
			break
		}
		if attempt > 10 {
			t.Fatalf("%s: it does not come to an end: %v", name, err)
		}
	}
	for op, n := range ledger {
		if n > 1 {
			t.Errorf("%s: %s was done %d times", name, op, n)
		}
	}
	if len(ledger) > 1 {
		t.Errorf("%s: one key, %d operations", name, len(ledger))
	}
	if recovery == call.RecoverLookup && done > 1 {
		t.Errorf("%s: it was done %d times although a lookup finds it", name, done)
	}
}

// expire ends the lease of what a failed attempt still holds: its holder settles it as a dead one's
// would be, but at once.
func expire(t *testing.T, e Engine, name string) {
	t.Helper()
	head, err := e.Head(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	rows, err := e.Read(t.Context(), max(0, head.Size-8), 8)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range rows {
		rec, err := audit.Decode(r.Record)
		if err != nil {
			t.Fatal(err)
		}
		if rec.Act == audit.Intent {
			err := complete(t, e, effect.Outcome{ID: rec.Operation, Fence: rec.Fence, State: effect.Unknown})
			if err != nil && !errors.Is(err, effect.ErrFenced) {
				t.Fatalf("%s: %v", name, err)
			}
		}
	}
}

// hasIntent reports whether the log has the intent of an operation.
func hasIntent(t *testing.T, e Engine, operation string) bool {
	head, err := e.Head(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	rows, err := e.Read(t.Context(), max(0, head.Size-16), 16)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range rows {
		rec, err := audit.Decode(r.Record)
		if err != nil {
			t.Fatal(err)
		}
		if rec.Act == audit.Intent && rec.Operation == operation {
			return true
		}
	}
	return false
}
