// Package storetest is what every engine must do: states, leases, fencing, retention, one tree
// without gaps, and a call that is never done twice whichever operation of the store fails.
//
// Start reading at [Run].
package storetest

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"newel.dev/newel/internal/audit"
	"newel.dev/newel/internal/guard/approve"
	"newel.dev/newel/internal/guard/effect"
	"newel.dev/newel/internal/task"
)

// An Engine is a store with its log.
type Engine interface {
	effect.Store
	approve.Store
	task.Store
	audit.Eraser
	Prune(ctx context.Context) (int, error)
}

// Run runs the suite. open returns an empty engine that is closed at the end of the test; each
// returns another node of the same state as well, or nil if there can only be one.
func Run(t *testing.T, open func(t *testing.T) (engine, other Engine)) {
	for name, test := range map[string]func(*testing.T, Engine, Engine){
		"states": states, "claims": claims, "again": again, "sent": sent, "waiting": waits, "abandoned": abandoned, "prune": prunes, "forget": forgets, "erase": erases, "erased by age": erasedByAge,
		"unkeyed": unkeyed, "concurrent writers": concurrent, "one of many": oneOfMany, "approvals": approvals, "approvals run out": approvalsRunOut, "approvals are used once": approvalsOnce, "approvals are given back": approvalsBack, "approvals, every failure": approvalsEveryFailure, "every failure": everyFailure, "canceled": canceled,
		"tasks": tasks, "task scopes": taskScopes, "task claims": taskClaims, "due tasks": dueTasks, "task pages": taskPages, "task expiry": taskExpiry,
	} {
		t.Run(name, func(t *testing.T) {
			e, other := open(t)
			if other == nil {
				other = e
			}
			test(t, e, other)
			Check(t, e)
		})
	}
}

// Check computes the whole tree of the log anew.
func Check(t *testing.T, e audit.Source) {
	t.Helper()
	tree, err := audit.Check(context.WithoutCancel(t.Context()), e)
	if err != nil {
		t.Errorf("the log: %v", err)
		return
	}
	if tree.N > 1 {
		if _, err := audit.Prove(tree.N, tree.N/2, audit.RowsOf(context.WithoutCancel(t.Context()), e)); err != nil {
			t.Errorf("the log: %v", err)
		}
	}
}

var serial = struct {
	sync.Mutex
	n int
}{}

// private is longer than a mark, as sealed values are.
const private = "what is sealed, and longer than a mark"

// Entry returns an audit record like no other.
func Entry(act, operation string) audit.Entry {
	serial.Lock()
	serial.n++
	n := serial.n
	serial.Unlock()
	b, err := (&audit.Record{Act: act, Operation: operation, Count: int64(n), Time: audit.Time(time.Now())}).Encode()
	if err != nil {
		panic(err)
	}
	return audit.Entry{Record: b, Private: []byte(private)}
}

func sum(s string) []byte {
	h := sha256.Sum256([]byte(s))
	return h[:]
}

// Reservation claims key anew, for an hour.
func Reservation(key string) effect.Reservation {
	r := effect.Reservation{ID: rand.Text(), Holder: rand.Text(), Fingerprint: sum("asked"), Lease: time.Hour, Retain: time.Hour, Tenant: "acme", Principal: "alice", Server: "/mcp", Tool: "pay"}
	if key != "" {
		r.Scope = sum(key)
	}
	return r
}

func dispatch(t *testing.T, e Engine, r effect.Reservation) (effect.Operation, bool) {
	t.Helper()
	op, held, err := e.Dispatch(t.Context(), &effect.Intent{Reservation: r, Entry: Entry(audit.Intent, r.ID)})
	if err != nil {
		t.Fatal(err)
	}
	return op, held
}

func complete(t *testing.T, e Engine, o effect.Outcome) error {
	t.Helper()
	o.Entry = Entry(audit.Outcome, o.ID)
	_, err := e.Complete(t.Context(), &o)
	return err
}

func find(t *testing.T, e Engine, key string) effect.Operation {
	t.Helper()
	op, err := e.Find(t.Context(), sum(key))
	if err != nil {
		t.Fatal(err)
	}
	return op
}

// eventually polls a condition of the engine's own clock.
func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); <-tick.C {
		if is() {
			return
		}
	}
	t.Fatalf("it never happened: %s", what)
}

func states(t *testing.T, e, other Engine) {
	r := Reservation("k")
	if op := find(t, e, "k"); op.ID != "" {
		t.Errorf("an empty store has %+v", op)
	}
	op, held, err := e.Reserve(t.Context(), &r)
	if err != nil || !held || op.State != effect.Reserved || op.Fence != 1 || op.ID != r.ID {
		t.Fatalf("reserve: %+v, %v, %v", op, held, err)
	}
	if head, err := e.Head(t.Context()); err != nil || head.Size != 0 {
		t.Errorf("a reservation is in the log: %v, %v", head.Size, err)
	}
	op, held = dispatch(t, e, r)
	if !held || op.State != effect.Dispatched || op.Fence != 1 || op.Index != 0 || op.Lease < 50*time.Minute {
		t.Fatalf("dispatch: %+v, %v", op, held)
	}
	if seen := find(t, other, "k"); seen.State != effect.Dispatched || seen.ID != r.ID || seen.Tool != "pay" || seen.Principal != "alice" || seen.Tenant != "acme" || seen.Server != "/mcp" || seen.Lease == 0 {
		t.Errorf("found %+v", seen)
	}
	if err := complete(t, e, effect.Outcome{ID: r.ID, Fence: 1, State: effect.Completed, Answer: []byte("answer"), Undo: []byte("undo")}); err != nil {
		t.Fatal(err)
	}
	if seen, err := other.Operation(t.Context(), r.ID); err != nil || seen.State != effect.Completed || string(seen.Undo) != "undo" {
		t.Errorf("by its name: %+v, %v", seen, err)
	}
	if seen, err := other.Operation(t.Context(), "nobody"); err != nil || seen.ID != "" {
		t.Errorf("one that is not there: %+v, %v", seen, err)
	}
	seen := find(t, other, "k")
	if seen.State != effect.Completed || string(seen.Answer) != "answer" || seen.Index != 1 || seen.Lease != 0 {
		t.Errorf("found %+v", seen)
	}
	rows, err := other.Read(t.Context(), 0, 10)
	if err != nil || len(rows) != 2 || string(rows[0].Private) != private {
		t.Errorf("the log has %v, %v", rows, err)
	}
}

// claims are what a second caller may and may not take.
func claims(t *testing.T, e, other Engine) {
	first := Reservation("k")
	dispatch(t, e, first)
	second := Reservation("k")
	op, held := dispatch(t, other, second)
	if held || op.ID != first.ID || op.State != effect.Dispatched {
		t.Fatalf("a second caller got %+v, %v", op, held)
	}
	try := func(what string, want bool, change func(r *effect.Reservation)) effect.Operation {
		t.Helper()
		now := find(t, e, "k")
		r := Reservation("k")
		r.ID, r.Expect = now.ID, now.Fence
		change(&r)
		op, held := dispatch(t, other, r)
		if held != want {
			t.Fatalf("%s: %v, %+v", what, held, op)
		}
		return op
	}
	nothing := func(*effect.Reservation) {}
	recover := func(r *effect.Reservation) { r.Recover = true }
	try("held", false, recover)
	if err := complete(t, e, effect.Outcome{ID: first.ID, Fence: 1, State: effect.NotExecuted}); err != nil {
		t.Fatal(err)
	}
	try("another number", false, func(r *effect.Reservation) { r.Expect = 7 })
	try("another question", false, func(r *effect.Reservation) { r.Fingerprint = sum("other") })
	op = try("not executed", true, nothing)
	if op.Fence != 2 {
		t.Errorf("its number is %d", op.Fence)
	}
	if err := complete(t, e, effect.Outcome{ID: first.ID, Fence: 1, State: effect.Completed}); !errors.Is(err, effect.ErrFenced) {
		t.Errorf("an old holder wrote: %v", err)
	}
	if err := complete(t, e, effect.Outcome{ID: first.ID, Fence: 2, State: effect.Unknown, Abandoned: true}); !errors.Is(err, effect.ErrFenced) {
		t.Errorf("a held operation was settled: %v", err)
	}
	if err := complete(t, e, effect.Outcome{ID: first.ID, Fence: 2, State: effect.Unknown}); err != nil {
		t.Fatal(err)
	}
	try("unknown", false, nothing)
	op = try("unknown, to recover", true, func(r *effect.Reservation) { recover(r); r.Lease = time.Millisecond })
	eventually(t, "the lease ends", func() bool { return find(t, e, "k").Lease == 0 })
	try("its lease ended", false, nothing)
	look := Reservation("k") // somebody begins to find out, and dies
	look.ID, look.Expect, look.Recover, look.Lease = first.ID, 3, true, time.Millisecond
	op, held, err := other.Reserve(t.Context(), &look)
	if err != nil || !held || op.State != effect.Dispatched || op.Fence != 4 {
		t.Fatalf("held to find out: %+v, %v, %v", op, held, err)
	}
	eventually(t, "the lease ends", func() bool { return find(t, e, "k").Lease == 0 })
	try("held to find out, as if it had not run", false, nothing)
	look.Holder, look.Expect, look.Lease = look.Holder+" again", 4, time.Hour
	if op, held, err = other.Reserve(t.Context(), &look); err != nil || !held || op.Fence != 5 {
		t.Fatalf("held to find out again: %+v, %v, %v", op, held, err)
	}
	try("somebody else finds out", false, recover)
	before, err := e.Head(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	op = try("whoever found out goes on", true, func(r *effect.Reservation) { recover(r); r.From = look.Holder })
	if head, err := e.Head(t.Context()); err != nil || head.Size != before.Size+1 || op.Fence != 6 || op.Index != before.Size {
		t.Errorf("what runs again has no intent of its own: %d records, %+v, %v", head.Size-before.Size, op, err)
	}
	if op.Fence != 6 || op.ID != first.ID {
		t.Errorf("got %+v", op)
	}
	if err := complete(t, e, effect.Outcome{ID: first.ID, Fence: 3, State: effect.Completed}); !errors.Is(err, effect.ErrFenced) {
		t.Errorf("a holder that woke up wrote: %v", err)
	}
	if err := complete(t, e, effect.Outcome{ID: first.ID, Fence: 6, State: effect.Completed, Answer: []byte("x")}); err != nil {
		t.Fatal(err)
	}
	try("completed", false, recover)
	if err := complete(t, e, effect.Outcome{ID: first.ID, Fence: 6, State: effect.Unknown}); !errors.Is(err, effect.ErrFenced) {
		t.Errorf("an ended operation was changed: %v", err)
	}
	if err := complete(t, e, effect.Outcome{ID: "nobody", Fence: 1, State: effect.Completed}); !errors.Is(err, effect.ErrFenced) {
		t.Errorf("an operation that is not there was completed: %v", err)
	}
}

// again is every write made twice, as after an error that nobody can interpret.
func again(t *testing.T, e, other Engine) {
	r := Reservation("k")
	i := &effect.Intent{Reservation: r, Entry: Entry(audit.Intent, r.ID)}
	for _, node := range []Engine{e, e, other} {
		op, held, err := node.Dispatch(t.Context(), i)
		if err != nil || !held || op.Fence != 1 || op.Index != 0 {
			t.Fatalf("dispatch: %+v, %v, %v", op, held, err)
		}
	}
	for _, node := range []Engine{e, e, other} {
		if err := complete(t, node, effect.Outcome{ID: r.ID, Fence: 1, State: effect.Completed, Answer: []byte("x")}); err != nil {
			t.Fatal(err)
		}
	}
	if head, err := other.Head(t.Context()); err != nil || head.Size != 2 {
		t.Errorf("the log has %d records, want 2 (%v)", head.Size, err)
	}
}

// waits is a call whose backend asked its caller.
// sent is when an intent was committed: neither how it ended nor a look at what became of it changes that.
func sent(t *testing.T, e, other Engine) {
	r := Reservation("sent")
	reserved, _, err := e.Reserve(t.Context(), &r)
	if err != nil || reserved.Sent != 0 || reserved.Since != 0 {
		t.Fatalf("reserved, it was sent at %d (%v), %v", reserved.Sent, reserved.Since, err)
	}
	op, _ := dispatch(t, e, func() effect.Reservation {
		next := r
		next.From, next.Holder, next.Expect = r.Holder, rand.Text(), reserved.Fence
		return next
	}())
	at := op.Sent
	if at == 0 {
		t.Fatal("dispatched, it was never sent")
	}
	passes := func(what string) {
		t.Helper()
		before := find(t, other, "sent")
		eventually(t, what, func() bool { return find(t, other, "sent").Since > before.Since })
		if found := find(t, other, "sent"); found.Sent != at {
			t.Errorf("%s: it was sent at %d, not %d", what, found.Sent, at)
		}
	}
	passes("dispatched")
	if err := complete(t, e, effect.Outcome{ID: op.ID, Fence: op.Fence, State: effect.Unknown}); err != nil {
		t.Fatal(err)
	}
	passes("unknown")
	look := r
	look.Holder, look.Expect, look.Recover = rand.Text(), op.Fence, true
	mine, held, err := other.Reserve(t.Context(), &look)
	if err != nil || !held || mine.Sent != at || mine.Since <= 0 {
		t.Fatalf("looked for, it was sent at %d, %v ago (held %v), %v", mine.Sent, mine.Since, held, err)
	}
	passes("looked for")
	look.From, look.Holder, look.Expect = look.Holder, rand.Text(), mine.Fence
	if op, held = dispatch(t, other, look); !held || op.Sent <= at || op.Since != 0 {
		t.Errorf("sent again, it was sent at %d, %v ago (held %v)", op.Sent, op.Since, held)
	}
}

func waits(t *testing.T, e, other Engine) {
	unkeyed := Reservation("")
	dispatch(t, e, unkeyed)
	if err := complete(t, e, effect.Outcome{ID: unkeyed.ID, Fence: 1, State: effect.Waiting, Round: sum("state"), Lease: time.Hour}); err != nil {
		t.Fatal(err)
	}
	on := Reservation("")
	on.ID, on.Expect, on.Resume = unkeyed.ID, 1, sum("state")
	if op, held := dispatch(t, other, on); !held || op.ID != unkeyed.ID || op.Fence != 2 || op.State != effect.Dispatched {
		t.Errorf("a call without a key did not go on: %+v, %v", op, held)
	}
	on.Holder = rand.Text()
	if _, held := dispatch(t, other, on); held {
		t.Error("a call without a key went on twice")
	}
	r := Reservation("k")
	dispatch(t, e, r)
	if err := complete(t, e, effect.Outcome{ID: r.ID, Fence: 1, State: effect.Waiting, Round: sum("state"), Lease: time.Hour}); err != nil {
		t.Fatal(err)
	}
	if op := find(t, e, "k"); op.State != effect.Waiting || op.Lease == 0 || string(op.Round) != string(sum("state")) {
		t.Errorf("it stands as %+v", op)
	}
	next := Reservation("k")
	next.ID, next.Expect = r.ID, 1
	if _, held := dispatch(t, e, next); held {
		t.Error("it went on without its state")
	}
	next.Resume = sum("another state")
	if _, held := dispatch(t, e, next); held {
		t.Error("it went on with another state")
	}
	next.Resume = sum("state")
	if op, held := dispatch(t, e, next); !held || op.Fence != 2 {
		t.Errorf("it did not go on: %+v", op)
	}
	late := next
	late.Holder = rand.Text()
	if _, held := dispatch(t, e, late); held {
		t.Error("the state was used twice")
	}
}

func abandoned(t *testing.T, e, other Engine) {
	held, dead, reserved := Reservation("held"), Reservation("dead"), Reservation("reserved")
	dead.Lease, reserved.Lease = time.Millisecond, time.Millisecond
	dispatch(t, e, held)
	dispatch(t, e, dead)
	if _, ok, err := e.Reserve(t.Context(), &reserved); err != nil || !ok {
		t.Fatal(ok, err)
	}
	var ops []effect.Operation
	eventually(t, "two operations are abandoned", func() bool {
		var err error
		if ops, err = other.Abandoned(t.Context(), 10); err != nil {
			t.Fatal(err)
		}
		return len(ops) == 2
	})
	for _, op := range ops {
		if op.ID == held.ID {
			t.Error("a held operation counts as abandoned")
		}
		if err := complete(t, other, effect.Outcome{ID: op.ID, Fence: op.Fence, State: effect.Unknown, Abandoned: true}); err != nil {
			t.Error(err)
		}
	}
	if err := complete(t, e, effect.Outcome{ID: dead.ID, Fence: 1, State: effect.Completed}); !errors.Is(err, effect.ErrFenced) {
		t.Errorf("who was given up wrote: %v", err)
	}
	if ops, err := e.Abandoned(t.Context(), 10); err != nil || len(ops) != 0 {
		t.Errorf("left: %v, %v", ops, err)
	}
}

func prunes(t *testing.T, e, _ Engine) {
	for key, state := range map[string]effect.State{"done": effect.Completed, "not done": effect.NotExecuted, "unknown": effect.Unknown, "kept": effect.Completed, "running": 0} {
		r := Reservation(key)
		if key != "kept" {
			r.Retain = time.Millisecond
		}
		dispatch(t, e, r)
		if state != 0 {
			if err := complete(t, e, effect.Outcome{ID: r.ID, Fence: 1, State: state}); err != nil {
				t.Fatal(err)
			}
		}
	}
	n := 0
	eventually(t, "two operations are past their retention", func() bool {
		pruned, err := e.Prune(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		n += pruned
		return find(t, e, "done").ID == "" && find(t, e, "not done").ID == ""
	})
	for _, key := range []string{"unknown", "kept", "running"} {
		if find(t, e, key).ID == "" {
			t.Errorf("%s is gone", key)
		}
	}
	if n > 2 {
		t.Errorf("%d operations were pruned", n)
	}
}

// forgets is a key used again after its retention, before anybody pruned.
func forgets(t *testing.T, e, _ Engine) {
	old := Reservation("k")
	old.Retain = time.Millisecond
	dispatch(t, e, old)
	if err := complete(t, e, effect.Outcome{ID: old.ID, Fence: 1, State: effect.Completed}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the key is free", func() bool {
		op, held := dispatch(t, e, Reservation("k"))
		return held && op.ID != old.ID && op.Fence == 1
	})
	if _, held := dispatch(t, e, Reservation("k")); held {
		t.Error("the key is free for two")
	}
	if err := complete(t, e, effect.Outcome{ID: old.ID, Fence: 1, State: effect.Completed}); !errors.Is(err, effect.ErrFenced) {
		t.Errorf("the old operation is still there: %v", err)
	}
}

func unkeyed(t *testing.T, e, _ Engine) {
	for range 3 {
		r := Reservation("")
		if _, held := dispatch(t, e, r); !held {
			t.Fatal("calls without a key are taken for one")
		}
		if err := complete(t, e, effect.Outcome{ID: r.ID, Fence: 1, State: effect.Completed}); err != nil {
			t.Fatal(err)
		}
	}
	if i, err := e.Append(t.Context(), []audit.Entry{Entry(audit.Reads, ""), Entry(audit.Reads, "")}); err != nil || i != 6 {
		t.Errorf("the records are at %d, %v", i, err)
	}
}

// concurrent is many writers on all nodes, with one tree.
func concurrent(t *testing.T, e, other Engine) {
	const writers, each = 16, 8
	var all sync.WaitGroup
	for w := range writers {
		node := e
		if w%2 == 1 {
			node = other
		}
		all.Go(func() {
			for i := range each {
				r := Reservation(fmt.Sprint(w, "-", i))
				if _, held := dispatch(t, node, r); !held {
					t.Errorf("writer %d does not hold its own", w)
				}
				if err := complete(t, node, effect.Outcome{ID: r.ID, Fence: 1, State: effect.Completed, Answer: []byte("a")}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
	if head, err := other.Head(t.Context()); err != nil || head.Size != 2*writers*each {
		t.Errorf("the log has %d records, want %d (%v)", head.Size, 2*writers*each, err)
	}
}

// oneOfMany is one key that many want at once, on all nodes.
func oneOfMany(t *testing.T, e, other Engine) {
	for round := range 5 {
		var all sync.WaitGroup
		var mu sync.Mutex
		won := 0
		for w := range 16 {
			node := e
			if w%2 == 1 {
				node = other
			}
			all.Go(func() {
				if _, held := dispatch(t, node, Reservation(fmt.Sprint("k", round))); held {
					mu.Lock()
					won++
					mu.Unlock()
				}
			})
		}
		all.Wait()
		if won != 1 {
			t.Errorf("%d callers hold one operation", won)
		}
	}
}

func canceled(t *testing.T, e, _ Engine) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	r := Reservation("k")
	if _, _, err := e.Dispatch(ctx, &effect.Intent{Reservation: r, Entry: Entry(audit.Intent, r.ID)}); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	if find(t, e, "k").ID != "" {
		t.Error("work that was cancelled before it began was done")
	}
}
