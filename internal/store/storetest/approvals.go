package storetest

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/audit"
	"newel.dev/newel/internal/guard/approve"
	"newel.dev/newel/internal/guard/effect"
	"newel.dev/newel/internal/secret"
)

// Request asks for an approval of key by alice of acme, for an hour.
func Request(key string) *approve.Request {
	r := &approve.Request{For: time.Hour, Entry: Entry(audit.Approval, "")}
	r.ID, r.Binding, r.Args = rand.Text(), sum(key), []byte("sealed")
	r.Facts = approve.Facts{Tenant: "acme", Principal: "alice", Name: "pay", Rule: "two people", Approvers: []string{"boss"}, Count: 1, Requested: time.Now().UTC()}
	return r
}

func ask(t *testing.T, e Engine, r *approve.Request) approve.Approval {
	t.Helper()
	a, made, err := e.Ask(t.Context(), r)
	if err != nil || !made || a.ID != r.ID || a.State != approve.Pending {
		t.Fatalf("ask: %+v, %v, %v", a, made, err)
	}
	return a
}

func vote(t *testing.T, e Engine, id string, v *approve.Vote) (approve.Approval, error) {
	t.Helper()
	return e.Decide(t.Context(), &approve.Decision{ID: id, Vote: v, Now: time.Now(), Entry: Entry(audit.Approval, "")})
}

func voter(name string, yes bool) *approve.Vote {
	return approve.Person{Name: name, Tenant: "acme", Roles: []string{"boss"}, How: approve.ByToken}.Votes(yes, "", time.Now())
}

// spend dispatches an operation of its own that uses an approval up.
func spend(t *testing.T, e Engine, use effect.Approval) (effect.Operation, error) {
	t.Helper()
	r := Reservation("")
	if use.Now.IsZero() {
		use.Now = time.Now()
	}
	op, held, err := e.Dispatch(t.Context(), &effect.Intent{Reservation: r, Approval: &use, Entry: Entry(audit.Intent, r.ID)})
	if err == nil && !held {
		t.Fatalf("an operation with a name of its own is not held")
	}
	return op, err
}

func approvals(t *testing.T, e, other Engine) {
	if a, err := e.Bound(t.Context(), sum("k")); err != nil || a.ID != "" {
		t.Fatalf("an empty store has %+v, %v", a, err)
	}
	first := Request("k")
	ask(t, e, first)
	if a, made, err := e.Ask(t.Context(), first); err != nil || made || a.ID != first.ID {
		t.Errorf("asked again after an error: %+v, %v, %v", a, made, err)
	}
	if a, made, err := other.Ask(t.Context(), Request("k")); err != nil || made || a.ID != first.ID {
		t.Errorf("a second request for the same: %+v, %v, %v", a, made, err)
	}
	if seen, err := other.Bound(t.Context(), sum("k")); err != nil || seen.ID != first.ID || seen.Principal != "alice" || string(seen.Args) != "sealed" || seen.Over(0, time.Now()) {
		t.Errorf("found %+v, %v", seen, err)
	}
	if _, err := spend(t, e, effect.Approval{ID: first.ID, Binding: sum("k")}); !errors.Is(err, call.ErrUnapproved) {
		t.Errorf("used while pending: %v", err)
	}
	for name, try := range map[string]struct {
		by   approve.Person
		want error
	}{
		"the caller":               {approve.Person{Name: "alice", Tenant: "acme", Roles: []string{"boss"}}, approve.ErrOwn},
		"the caller as operator":   {approve.Person{Name: "alice", Operator: true}, approve.ErrOwn},
		"another tenant":           {approve.Person{Name: "bob", Tenant: "other", Roles: []string{"boss"}}, approve.ErrNone},
		"alice of another tenant":  {approve.Person{Name: "alice", Tenant: "other", Roles: []string{"boss"}}, approve.ErrNone},
		"somebody without a role":  {approve.Person{Name: "bob", Tenant: "acme"}, approve.ErrNoVoter},
		"somebody of another role": {approve.Person{Name: "bob", Tenant: "acme", Roles: []string{"reader", ""}}, approve.ErrNoVoter},
	} {
		if _, err := vote(t, e, first.ID, try.by.Votes(true, "", time.Now())); !errors.Is(err, try.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := vote(t, e, "nobody", voter("bob", true)); !errors.Is(err, approve.ErrNone) {
		t.Errorf("one that is not there: %v", err)
	}
	yes := voter("bob", true)
	if a, err := vote(t, other, first.ID, yes); err != nil || a.State != approve.Approved || len(a.Votes) != 1 {
		t.Fatalf("approved: %+v, %v", a, err)
	}
	if a, err := vote(t, e, first.ID, yes); err != nil || len(a.Votes) != 1 {
		t.Errorf("the same vote after an error: %+v, %v", a, err)
	}
	if _, err := vote(t, e, first.ID, voter("carol", false)); !errors.Is(err, approve.ErrEnded) {
		t.Errorf("decided twice: %v", err)
	}
	if _, err := spend(t, e, effect.Approval{ID: first.ID, Binding: sum("other")}); !errors.Is(err, call.ErrUnapproved) {
		t.Errorf("used for something else: %v", err)
	}
	if _, err := spend(t, e, effect.Approval{Binding: sum("k")}); !errors.Is(err, call.ErrUnapproved) {
		t.Errorf("dispatched without one: %v", err)
	}
	if _, err := spend(t, e, effect.Approval{ID: first.ID, Binding: sum("k")}); err != nil {
		t.Fatal(err)
	}
	if a, err := other.Approval(t.Context(), first.ID); err != nil || a.State != approve.Used || a.Operation == "" || a.Votes[0].By != "bob" {
		t.Errorf("used: %+v, %v", a, err)
	}

	second := Request("k") // the first one is used up: a new one takes its place
	second.Count = 2
	ask(t, other, second)
	if a, err := vote(t, e, second.ID, voter("bob", true)); err != nil || a.State != approve.Pending {
		t.Errorf("one of two: %+v, %v", a, err)
	}
	if _, err := vote(t, e, second.ID, voter("bob", true)); !errors.Is(err, approve.ErrTwice) {
		t.Errorf("the same person twice: %v", err)
	}
	if a, err := vote(t, e, second.ID, voter("carol", false)); err != nil || a.State != approve.Denied {
		t.Errorf("a no among two: %+v, %v", a, err)
	}
	if _, err := spend(t, e, effect.Approval{ID: second.ID, Binding: sum("k")}); !errors.Is(err, call.ErrUnapproved) {
		t.Errorf("used although denied: %v", err)
	}

	mine := Request("mine")
	mine.Self = true
	ask(t, e, mine)
	if a, err := vote(t, e, mine.ID, voter("alice", true)); err != nil || a.State != approve.Approved {
		t.Errorf("one's own, where the rule lets: %+v, %v", a, err)
	}
	use := effect.Approval{ID: mine.ID, Binding: sum("mine")}
	done := Reservation("mine")
	if _, held, err := e.Dispatch(t.Context(), &effect.Intent{Reservation: done, Approval: &use, Entry: Entry(audit.Intent, done.ID)}); err != nil || !held {
		t.Fatalf("a call with a key and an approval: %v, %v", held, err)
	}
	if err := complete(t, e, effect.Outcome{ID: done.ID, Fence: 1, State: effect.Completed, Answer: []byte("answer"), Approval: mine.ID}); err != nil {
		t.Fatal(err)
	}
	again := Reservation("mine")
	if op, held, err := e.Dispatch(t.Context(), &effect.Intent{Reservation: again, Approval: &use, Entry: Entry(audit.Intent, again.ID)}); err != nil || held || op.ID != done.ID || string(op.Answer) != "answer" {
		t.Errorf("the call comes again when its approval is used up: %+v, %v, %v", op, held, err)
	}
	newest, err := e.Approvals(t.Context(), approve.Query{Limit: 10})
	oldest, err2 := e.Approvals(t.Context(), approve.Query{Limit: 2, Oldest: true})
	if errors.Join(err, err2) != nil || len(newest) != 3 || len(oldest) != 2 || oldest[0].ID != newest[2].ID || oldest[1].ID != newest[1].ID {
		t.Errorf("in order: %d, %d, %v", len(newest), len(oldest), errors.Join(err, err2))
	}
	acme, nobody := "acme", "nobody"
	for want, q := range map[int]approve.Query{3: {Tenant: &acme, Limit: 10}, 1: {State: approve.Denied, Limit: 10}, 0: {Principal: &nobody, Limit: 10}, 2: {Limit: 2}} {
		if list, err := other.Approvals(t.Context(), q); err != nil || len(list) != want {
			t.Errorf("%+v chooses %d, %v", q, len(list), err)
		}
	}
}

func approvalsRunOut(t *testing.T, e, other Engine) {
	r := Request("k")
	ask(t, e, r)
	if _, err := e.Decide(t.Context(), &approve.Decision{ID: r.ID, Now: time.Now(), Entry: Entry(audit.Approval, "")}); !errors.Is(err, approve.ErrEnded) {
		t.Errorf("ended before its time: %v", err)
	}
	later := time.Now().Add(2 * time.Hour) // by the clock of the machine
	late := &approve.Decision{ID: r.ID, Vote: voter("bob", true), Now: later, Entry: Entry(audit.Approval, "")}
	if _, err := e.Decide(t.Context(), late); !errors.Is(err, approve.ErrEnded) {
		t.Errorf("decided too late: %v", err)
	}
	if a, err := vote(t, e, r.ID, voter("bob", true)); err != nil || a.State != approve.Approved {
		t.Fatalf("%+v, %v", a, err)
	}
	if _, err := spend(t, e, effect.Approval{ID: r.ID, Binding: sum("k"), Now: later}); !errors.Is(err, call.ErrUnapproved) {
		t.Errorf("used too late: %v", err)
	}
	ended := &approve.Decision{ID: r.ID, Now: later, Entry: Entry(audit.Approval, "")}
	if a, err := other.Decide(t.Context(), ended); err != nil || a.State != approve.Expired {
		t.Errorf("expired: %+v, %v", a, err)
	}
	if a, err := e.Bound(t.Context(), sum("k")); err != nil || a.ID != r.ID {
		t.Errorf("the caller does not hear of it: %+v, %v", a, err)
	}
	if a, err := e.Decide(t.Context(), &approve.Decision{ID: r.ID, Told: true, Now: later}); err != nil || a.Binding != nil {
		t.Errorf("told: %+v, %v", a, err)
	}
	if a, err := e.Bound(t.Context(), sum("k")); err != nil || a.ID != "" {
		t.Errorf("it is told again: %+v, %v", a, err)
	}
	soon := Request("soon") // by the engine's clock
	soon.For, soon.Requested = 50*time.Millisecond, time.Now().Add(time.Hour)
	ask(t, e, soon)
	eventually(t, "the engine's clock ends it", func() bool {
		a, err := e.Approval(t.Context(), soon.ID)
		return err == nil && a.Over(0, time.Now())
	})
	if _, err := vote(t, e, soon.ID, voter("bob", true)); !errors.Is(err, approve.ErrEnded) {
		t.Errorf("decided too late: %v", err)
	}
}

// approvalsOnce is many nodes and callers that race for one approval, and people who race to decide.
func approvalsOnce(t *testing.T, e, other Engine) {
	r := Request("k")
	ask(t, e, r)
	var all sync.WaitGroup
	var decided, used atomic.Int32
	race := func(f func(e Engine, i int)) {
		for i := range 16 {
			all.Go(func() { f([]Engine{e, other}[i%2], i) })
		}
		all.Wait()
	}
	race(func(e Engine, i int) {
		switch _, err := vote(t, e, r.ID, voter(rand.Text(), i%4 < 2)); {
		case err == nil:
			decided.Add(1)
		case !errors.Is(err, approve.ErrEnded):
			t.Error(err)
		}
	})
	if decided.Load() != 1 {
		t.Errorf("it was decided %d times", decided.Load())
	}
	r = Request("second")
	ask(t, e, r)
	if _, err := vote(t, e, r.ID, voter("bob", true)); err != nil {
		t.Fatal(err)
	}
	race(func(e Engine, _ int) {
		switch _, err := spend(t, e, effect.Approval{ID: r.ID, Binding: sum("second")}); {
		case err == nil:
			used.Add(1)
		case !errors.Is(err, call.ErrUnapproved):
			t.Error(err)
		}
	})
	if used.Load() != 1 {
		t.Errorf("it was used %d times", used.Load())
	}
}

// approvalsBack is what becomes of an approval when its operation ends.
func approvalsBack(t *testing.T, e, other Engine) {
	r := Request("k")
	ask(t, e, r)
	if _, err := vote(t, e, r.ID, voter("bob", true)); err != nil {
		t.Fatal(err)
	}
	use := effect.Approval{ID: r.ID, Binding: sum("k")}
	end := func(op effect.Operation, state effect.State, round []byte) {
		t.Helper()
		if err := complete(t, other, effect.Outcome{ID: op.ID, Fence: op.Fence, State: state, Round: round, Lease: time.Hour, Approval: r.ID}); err != nil {
			t.Fatal(err)
		}
	}
	op, err := spend(t, e, use)
	if err != nil {
		t.Fatal(err)
	}
	end(op, effect.NotExecuted, nil)
	if op, err = spend(t, other, use); err != nil {
		t.Fatalf("nothing was done, and it is gone: %v", err)
	}
	end(op, effect.Waiting, sum("round"))
	if _, err := spend(t, e, use); !errors.Is(err, call.ErrUnapproved) {
		t.Errorf("used by another call while its own waits: %v", err)
	}
	wrong := use
	wrong.Resume = sum("another round")
	if _, err := spend(t, e, wrong); !errors.Is(err, call.ErrUnapproved) {
		t.Errorf("used by what goes on from elsewhere: %v", err)
	}
	on := use
	on.Resume = sum("round")
	if op, err = spend(t, e, on); err != nil {
		t.Fatalf("going on: %v", err)
	}
	if _, err := spend(t, e, on); !errors.Is(err, call.ErrUnapproved) {
		t.Errorf("going on twice: %v", err)
	}
	end(op, effect.Completed, nil)
	for _, u := range []effect.Approval{use, on} {
		if _, err := spend(t, e, u); !errors.Is(err, call.ErrUnapproved) {
			t.Errorf("used twice: %v", err)
		}
	}
	keyed := Reservation("key") // an operation that nobody knows the end of runs again under its own approval
	again := Request("again")
	ask(t, e, again)
	if _, err := vote(t, e, again.ID, voter("bob", true)); err != nil {
		t.Fatal(err)
	}
	use = effect.Approval{ID: again.ID, Binding: sum("again"), Now: time.Now()}
	if _, held, err := e.Dispatch(t.Context(), &effect.Intent{Reservation: keyed, Approval: &use, Entry: Entry(audit.Intent, keyed.ID)}); err != nil || !held {
		t.Fatal(held, err)
	}
	if _, held, err := e.Dispatch(t.Context(), &effect.Intent{Reservation: keyed, Approval: &use, Entry: Entry(audit.Intent, keyed.ID)}); err != nil || !held {
		t.Errorf("the same intent after an error: %v, %v", held, err)
	}
	if err := complete(t, e, effect.Outcome{ID: keyed.ID, Fence: 1, State: effect.Unknown, Approval: again.ID}); err != nil {
		t.Fatal(err)
	}
	recovered := Reservation("key")
	recovered.ID, recovered.Expect, recovered.Recover = keyed.ID, 1, true
	if _, held, err := other.Dispatch(t.Context(), &effect.Intent{Reservation: recovered, Approval: &use, Entry: Entry(audit.Intent, keyed.ID)}); err != nil || !held {
		t.Errorf("the same operation, recovered: %v, %v", held, err)
	}
}

// approvalsEveryFailure fails the Nth operation of the store, for every N, in both ways, while a
// caller calls until it is told how its call ended, and somebody approves whatever is asked. What is
// held: nothing runs that nobody approved, nothing runs twice under one approval, and it comes to an
// end.
func approvalsEveryFailure(t *testing.T, e, _ Engine) {
	key := secret.RandomKey()
	for _, keyed := range []bool{false, true} {
		for _, persisted := range []bool{false, true} {
			for at := 0; ; at++ {
				f := &faulty{Store: e, at: at, persisted: persisted}
				approvedOne(t, e, f, key, fmt.Sprintf("operation %d fails (persisted %v, with a key %v)", at, persisted, keyed), keyed)
				if f.n < at {
					break // there are no more operations
				}
			}
		}
	}
}

// faultyApprovals fails with the operations of a faulty store. Lists and decisions do not count: the
// caller makes neither.
type faultyApprovals struct {
	*faulty
	approve.Store
}

// Ask implements approve.Store.
func (f faultyApprovals) Ask(ctx context.Context, r *approve.Request) (a approve.Approval, made bool, err error) {
	err = f.fail(func() (err error) { a, made, err = f.Store.Ask(ctx, r); return err })
	return a, made, err
}

// Bound implements approve.Store.
func (f faultyApprovals) Bound(ctx context.Context, binding []byte) (a approve.Approval, err error) {
	err = f.fail(func() (err error) { a, err = f.Store.Bound(ctx, binding); return err })
	return a, err
}

// approvedOne runs one call to its end.
func approvedOne(t *testing.T, e Engine, f *faulty, key secret.Key, name string, keyed bool) {
	t.Helper()
	ran, approved := 0, 0
	pay := &call.Capability{Kind: call.Tool, Name: "pay " + name, Effect: call.Write}
	pay.Run = func(_ context.Context, c *call.Call) (*call.Result, error) {
		if ran++; ran > approved {
			t.Errorf("%s: it ran %d times, and %d were approved", name, ran, approved)
		}
		if a, err := e.Approval(t.Context(), c.Approval.ID); err != nil || a.State != approve.Used || a.Operation != c.Event.Operation {
			t.Errorf("%s: it runs under %+v, %v", name, a, err)
		}
		return call.Text("paid"), nil
	}
	effects, err := effect.New(effect.Options{Store: f, Key: key, Wait: 10 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	people, err := approve.New(approve.Options{Store: faultyApprovals{f, e}, Key: key})
	if err != nil {
		t.Fatal(err)
	}
	step := people.Guard("/mcp")(effects.Guard("/mcp", func(string) *call.Capability { return nil })(func(ctx context.Context, c *call.Call) (*call.Result, error) { return c.Target.Run(ctx, c) }))
	for attempt := 1; ; attempt++ {
		c := &call.Call{Kind: call.Tool, Name: pay.Name, Args: []byte(`{"amount":1}`), Target: pay, Principal: &call.Principal{ID: "alice", Tenant: "acme"}, Sink: call.Discard, Asker: call.NoAsker,
			Approval: &call.Approval{Rule: "two people", Policy: "1", Approvers: []string{"boss"}, Count: 1, Expires: time.Hour}}
		if keyed {
			c.Key = name
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		_, err := step(ctx, c)
		cancel()
		if err == nil {
			if ran == 0 {
				t.Errorf("%s: success, and nothing was done", name)
			}
			return
		}
		switch code := call.AsError(err).Code; {
		case code == call.OutcomeUnknown:
			return
		case code == call.Conflict && keyed:
			expire(t, e, name) // its first attempt holds it still: as if that caller had died
		case code == call.Denied:
			if a, err := e.Approval(t.Context(), c.Event.Approval); err == nil && a.State == approve.Pending {
				if _, err := vote(t, e, a.ID, voter("bob", true)); err != nil {
					t.Fatalf("%s: %v", name, err)
				}
				approved++
			}
		}
		if attempt > 10 {
			t.Fatalf("%s: it does not come to an end: %v", name, err)
		}
	}
}
