package postgres

import (
	"context"
	"crypto/rand"
	"errors"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"newel.dev/newel/internal/audit"
	"newel.dev/newel/internal/durable"
	"newel.dev/newel/internal/guard/effect"
	"newel.dev/newel/internal/secret"
	"newel.dev/newel/internal/store/storetest"
	"newel.dev/newel/test/engines"
)

func open(t *testing.T, dsn string, key secret.Key) *DB {
	t.Helper()
	db, err := Open(t.Context(), secret.New(dsn), key)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = db.Close() }) // some tests stop the server
	return db
}

func TestEngine(t *testing.T) {
	server := engines.Start(t)
	storetest.Run(t, func(t *testing.T) (storetest.Engine, storetest.Engine) {
		dsn, key := server.Database(t), secret.RandomKey()
		return open(t, dsn, key), open(t, dsn, key)
	})
}

func dispatch(ctx context.Context, db *DB, r *effect.Reservation) (effect.Operation, bool, error) {
	return db.Dispatch(ctx, &effect.Intent{Reservation: *r, Entry: storetest.Entry("intent", r.ID)})
}

// TestDeadNode is a node that is not heard of any more: what it holds is free before its leases end.
// When it wakes up, it is fenced.
func TestDeadNode(t *testing.T) {
	dsn, key := engines.Postgres(t), secret.RandomKey()
	a, b := open(t, dsn, key), open(t, dsn, key)
	r := storetest.Reservation("k")
	if _, held, err := dispatch(t.Context(), a, &r); err != nil || !held {
		t.Fatal(held, err)
	}
	if ops, err := b.Abandoned(t.Context(), 10); err != nil || len(ops) != 0 {
		t.Fatalf("abandoned: %v, %v", ops, err)
	}
	if _, err := b.pool.Exec(t.Context(), "UPDATE newel_nodes SET seen = seen - interval '16 seconds' WHERE id = $1", a.node); err != nil {
		t.Fatal(err)
	}
	ops, err := b.Abandoned(t.Context(), 10)
	if err != nil || len(ops) != 1 {
		t.Fatalf("abandoned: %v, %v", ops, err)
	}
	take := storetest.Reservation("k")
	take.ID, take.Expect, take.Recover = r.ID, 1, true
	if op, held, err := dispatch(t.Context(), b, &take); err != nil || !held || op.Fence != 2 {
		t.Fatalf("taken over: %+v, %v, %v", op, held, err)
	}
	_, err = a.Complete(t.Context(), &effect.Outcome{ID: r.ID, Fence: 1, State: effect.Completed, Entry: storetest.Entry("outcome", r.ID)})
	if !errors.Is(err, effect.ErrFenced) {
		t.Errorf("a node that woke up wrote: %v", err)
	}
	storetest.Check(t, a)
}

// TestClockSetBack is a node that died before the database's clock was set back by a day: it does not
// hold its calls until the day is over, and a node that lives loses none of its own.
func TestClockSetBack(t *testing.T) {
	dsn, key := engines.Postgres(t), secret.RandomKey()
	dead, alive := open(t, dsn, key), open(t, dsn, key)
	for name, db := range map[string]*DB{"dead": dead, "alive": alive} {
		r := storetest.Reservation(name)
		if _, held, err := dispatch(t.Context(), db, &r); err != nil || !held {
			t.Fatal(held, err)
		}
	}
	exec := func(statement string, args ...any) {
		t.Helper()
		if _, err := alive.pool.Exec(t.Context(), statement, args...); err != nil {
			t.Fatal(err)
		}
	}
	exec("UPDATE newel_nodes SET seen = seen + interval '1 day'") // as it looks after that
	if err := alive.beat(t.Context()); err != nil {
		t.Fatal(err)
	}
	exec("UPDATE newel_nodes SET seen = seen - interval '16 seconds' WHERE id = $1", dead.node)
	ops, err := alive.Abandoned(t.Context(), 10)
	if err != nil || len(ops) != 1 {
		t.Errorf("abandoned: %v, %v; want the call of the dead node", ops, err)
	}
}

// TestServerGone is a database that stops and comes back.
func TestServerGone(t *testing.T) {
	server := engines.Start(t)
	db := open(t, server.Database(t), secret.RandomKey())
	before := storetest.Reservation("before")
	if _, held, err := dispatch(t.Context(), db, &before); err != nil || !held {
		t.Fatal(held, err)
	}
	server.Stop()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	r := storetest.Reservation("during")
	if _, held, err := dispatch(ctx, db, &r); !errors.Is(err, effect.ErrAway) || held {
		t.Errorf("without a server: %v, %v", held, err)
	}
	server.Restart(t)
	after := storetest.Reservation("after")
	if _, held, err := dispatch(ctx, db, &after); err != nil || !held {
		t.Errorf("it does not come back: %v, %v", held, err)
	}
	if _, err := db.Complete(ctx, &effect.Outcome{ID: before.ID, Fence: 1, State: effect.Completed, Entry: storetest.Entry("outcome", before.ID)}); err != nil {
		t.Error(err)
	}
	storetest.Check(t, db)
}

// TestUnheardCommit is a commit that takes place, and whose answer is lost.
func TestUnheardCommit(t *testing.T) {
	db := open(t, engines.Postgres(t), secret.RandomKey())
	r := storetest.Reservation("k")
	if _, held, err := dispatch(t.Context(), db, &r); err != nil || !held {
		t.Fatal(held, err)
	}
	var last string
	if err := db.pool.QueryRow(t.Context(), "SELECT last FROM newel_nodes WHERE id = $1", db.node).Scan(&last); err != nil {
		t.Fatal(err)
	}
	for token, want := range map[string]bool{last: true, "another": false} {
		if got, err := db.committed(t.Context(), token); err != nil || got != want {
			t.Errorf("commit %q took place: %v, %v", token, got, err)
		}
	}
}

// TestChangedRowGone is an operation that somebody deleted between the look at it and the change:
// its outcome is not acknowledged, and nothing else of the transaction is there.
func TestChangedRowGone(t *testing.T) {
	db := open(t, engines.Postgres(t), secret.RandomKey())
	r := storetest.Reservation("k")
	op, held, err := dispatch(t.Context(), db, &r)
	if err != nil || !held {
		t.Fatal(held, err)
	}
	before, err := db.Head(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	conn, err := db.pool.Acquire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Release()
	work := []*durable.Work{{Complete: &effect.Outcome{ID: op.ID, Fence: op.Fence, State: effect.Completed, Entry: audit.Entry{Record: []byte("{}")}}}}
	b, err := db.begin(t.Context(), conn, work)
	if err != nil {
		t.Fatal(err)
	}
	b.Apply(work[0])
	if err := work[0].Err; err != nil {
		t.Fatal(err)
	}
	if _, err := db.pool.Exec(t.Context(), "DELETE FROM newel_operations"); err != nil {
		t.Fatal(err)
	}
	if _, err := db.store(t.Context(), conn, b, b.Changed(), "token"); err == nil {
		t.Error("an operation that is gone was changed")
	}
	if err := rollback(conn); err != nil {
		t.Fatal(err)
	}
	if after, err := db.Head(t.Context()); err != nil || after.Size != before.Size {
		t.Errorf("the log has %d records, %v; want %d", after.Size, err, before.Size)
	}
}

// TestMigration is a database of the version before: what it holds is there, and what is new works.
func TestMigration(t *testing.T) {
	dsn, key := engines.Postgres(t), secret.RandomKey()
	db := open(t, dsn, key)
	r := storetest.Reservation("k")
	if _, held, err := dispatch(t.Context(), db, &r); err != nil || !held {
		t.Fatal(held, err)
	}
	if _, err := db.pool.Exec(t.Context(), "DROP TABLE newel_tasks; DROP TABLE newel_approvals; ALTER TABLE newel_operations DROP COLUMN undo; ALTER TABLE newel_operations DROP COLUMN sent; UPDATE newel_meta SET value = '1' WHERE key = 'schema'"); err != nil {
		t.Fatal(err)
	}
	db = open(t, dsn, key)
	if op, err := db.Operation(t.Context(), r.ID); err != nil || op.State != effect.Dispatched || op.Undo != nil {
		t.Errorf("found %+v, %v", op, err)
	}
	if a, made, err := db.Ask(t.Context(), storetest.Request("k")); err != nil || !made || a.ID == "" {
		t.Errorf("%+v, %v, %v", a, made, err)
	}
}

func TestSchema(t *testing.T) {
	dsn, key := engines.Postgres(t), secret.RandomKey()
	db := open(t, dsn, key)
	before := storetest.Reservation("before")
	if _, held, err := dispatch(t.Context(), db, &before); err != nil || !held {
		t.Fatal(held, err)
	}
	if _, err := db.pool.Exec(t.Context(), "ALTER TABLE newel_operations DROP COLUMN sent; UPDATE newel_meta SET value = '3' WHERE key = 'schema'"); err != nil {
		t.Fatal(err)
	}
	db = open(t, dsn, key)
	if op, err := db.Operation(t.Context(), before.ID); err != nil || op.State != effect.Dispatched || op.Sent != 0 {
		t.Errorf("one version on: %+v, %v", op, err)
	}
	if _, err := db.pool.Exec(t.Context(), "UPDATE newel_meta SET value = '5' WHERE key = 'schema'; ALTER TABLE newel_operations ADD COLUMN later text; ALTER TABLE newel_audit ADD COLUMN later text"); err != nil {
		t.Fatal(err)
	}
	db = open(t, dsn, key)
	r := storetest.Reservation("k")
	if _, held, err := dispatch(t.Context(), db, &r); err != nil || !held {
		t.Errorf("one version back: %v, %v", held, err)
	}
	if _, err := db.pool.Exec(t.Context(), "UPDATE newel_meta SET value = '6' WHERE key = 'schema'"); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(t.Context(), secret.New(dsn), key); err == nil || !strings.Contains(err.Error(), "newer program") {
		t.Errorf("two versions back: %v", err)
	}
	if _, err := Open(t.Context(), secret.New(dsn), secret.RandomKey()); err == nil {
		t.Error("another key is accepted")
	}
	if _, err := Open(t.Context(), secret.New("postgres://user:hunter2@127.0.0.1:1/x"), key); err == nil || strings.Contains(err.Error(), "hunter2") {
		t.Errorf("no server: %v", err)
	}
}

func TestRestored(t *testing.T) {
	db := open(t, engines.Postgres(t), secret.RandomKey())
	storetest.Restored(t, db, func(index int64, private []byte) {
		if _, err := db.pool.Exec(t.Context(), "UPDATE newel_audit SET private = $1 WHERE idx = $2", private, index); err != nil {
			t.Fatal(err)
		}
	})
}

// TestRemembered is work that is written on what the node remembers: where something stands otherwise,
// it comes out as if nothing had been remembered.
func TestRemembered(t *testing.T) {
	dsn, key := engines.Postgres(t), secret.RandomKey()
	a, b := open(t, dsn, key), open(t, dsn, key)
	begin := func(key string) effect.Reservation {
		t.Helper()
		r := storetest.Reservation(key)
		if _, held, err := dispatch(t.Context(), a, &r); err != nil || !held {
			t.Fatal(held, err)
		}
		return r
	}
	end := func(r effect.Reservation) error {
		_, err := a.Complete(t.Context(), &effect.Outcome{ID: r.ID, Fence: 1, State: effect.Completed, Entry: storetest.Entry("outcome", r.ID)})
		return err
	}
	exec := func(text string, args ...any) {
		t.Helper()
		if _, err := a.pool.Exec(t.Context(), text, args...); err != nil {
			t.Fatal(err)
		}
	}
	// relied makes a rely on its memory for what comes next, and reports whether it did for what came.
	relied := func() bool {
		t.Helper()
		before := a.known.doubts
		begin("whatever comes next " + rand.Text()) // what went wrong, it does not remember
		a.known.doubts = 0
		if !a.known.fresh {
			t.Fatal("it remembers nothing")
		}
		return before == 0
	}
	begin("first")
	same := begin("same")
	if err := end(same); err != nil || !relied() {
		t.Errorf("nothing changed: %v", err)
	}
	taken := begin("taken")
	exec("UPDATE newel_operations SET fence = 2 WHERE id = $1", taken.ID)
	if err := end(taken); !errors.Is(err, effect.ErrFenced) || relied() {
		t.Errorf("an operation that was taken over: %v", err)
	}
	settled := begin("settled")
	exec("UPDATE newel_operations SET state = $1, ended = 1, until = 0 WHERE id = $2", int16(effect.Unknown), settled.ID)
	if err := end(settled); !errors.Is(err, effect.ErrFenced) || relied() {
		t.Errorf("an operation that was settled: %v", err)
	}
	begin("before")
	if _, err := b.Append(t.Context(), []audit.Entry{storetest.Entry("started", "")}); err != nil {
		t.Fatal(err)
	}
	if r := begin("after another node"); relied() {
		t.Errorf("%s was written to a head that was not there", r.ID)
	}
	again := storetest.Reservation("same")
	if op, held, err := dispatch(t.Context(), a, &again); err != nil || held || op.ID != same.ID || op.State != effect.Completed || relied() {
		t.Errorf("a key that is not new: %+v, %v, %v", op, held, err)
	}
	begin("clock")
	a.known.clock -= time.Hour.Microseconds()
	if r := begin("another clock"); relied() {
		t.Errorf("%s was written with a clock that was wrong", r.ID)
	} else if op, err := a.Operation(t.Context(), r.ID); err != nil || op.Lease < 50*time.Minute {
		t.Errorf("found %+v, %v", op, err)
	}
	storetest.Check(t, b)
}

// TestStages is work that comes while the first of it is being written: all of it is one transaction, also
// where the last of it shows that something stands otherwise, and nothing of it where the connection ends.
func TestStages(t *testing.T) {
	dsn, key := engines.Postgres(t), secret.RandomKey()
	a, b := open(t, dsn, key), open(t, dsn, key)
	intent := func(key string) *durable.Work {
		r := storetest.Reservation(key)
		return &durable.Work{Dispatch: &effect.Intent{Reservation: r, Entry: storetest.Entry("intent", r.ID)}}
	}
	// run has a commit the first of some work, and the rest of it when it asks for more.
	run := func(between func(), last ...*durable.Work) (all []*durable.Work, err error) {
		t.Helper()
		begin := storetest.Reservation("begin " + rand.Text())
		a.known.doubts = 0
		if _, held, err := dispatch(t.Context(), a, &begin); err != nil || !held || !a.known.fresh {
			t.Fatal(held, err)
		}
		var stages [][]*durable.Work
		for range 3 {
			var stage []*durable.Work
			for range durable.Stage {
				stage = append(stage, intent(rand.Text()))
			}
			stages = append(stages, stage)
		}
		outcome := effect.Outcome{ID: begin.ID, Fence: 1, State: effect.Completed, Answer: []byte("answer"), Entry: storetest.Entry("outcome", begin.ID)}
		stages = append(stages, append(last, &durable.Work{Complete: &outcome}))
		all = slices.Concat(stages[:3]...)
		a.known.doubts = 0
		return all, a.commit(t.Context(), stages[0], func() (next []*durable.Work) {
			if len(stages) == 2 {
				between()
			}
			if stages = stages[min(1, len(stages)):]; len(stages) > 0 {
				next = stages[0]
			}
			return next
		})
	}
	held := func(work []*durable.Work) {
		t.Helper()
		for _, u := range work {
			op, err := b.Operation(t.Context(), u.ID())
			if u.ID() == "" {
				op, err = b.Find(t.Context(), u.Scope())
			}
			if u.Err != nil || !u.Held || err != nil || op.State != effect.Dispatched || op.Index != u.Index {
				t.Fatalf("%v, %v; found %+v, %v", u.Held, u.Err, op, err)
			}
		}
	}
	nothing := func() {}
	idle := func() { // or a node that stands still would hold the head for ever
		deadline := time.Now().Add(10 * time.Second)
		for waiting := false; !waiting; {
			err := b.pool.QueryRow(t.Context(), "SELECT count(*) > 0 FROM pg_stat_activity WHERE datname = current_database() AND state = 'idle in transaction'").Scan(&waiting)
			if err != nil || time.Now().After(deadline) {
				t.Fatalf("the server does not count how long it waits: %v", err)
			}
		}
	}
	work, err := run(idle)
	if err != nil || a.known.doubts > 0 {
		t.Fatalf("as it is remembered: %v, %d doubts", err, a.known.doubts)
	}
	held(work)

	taken := intent("taken")
	if work, err = run(nothing, taken); err != nil {
		t.Fatal(err)
	}
	held(append(work, taken))
	again := intent("taken")
	if work, err = run(nothing, again); err != nil || again.Held || again.Op.ID != taken.Dispatch.ID || a.known.doubts == 0 {
		t.Errorf("a key that is not new: %+v, %v, %v", again.Op, again.Held, err)
	}
	held(work)

	ask := &durable.Work{Ask: storetest.Request("approval")}
	if work, err = run(nothing, ask); err != nil || ask.Approval == nil || !ask.Held || a.known.doubts == 0 {
		t.Errorf("work of another kind: %+v, %v", ask.Approval, err)
	}
	held(work)

	before, err := b.Head(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	kill := func() {
		if _, err := b.pool.Exec(t.Context(), "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"); err != nil {
			t.Error(err)
		}
	}
	if _, err = run(kill); !errors.Is(err, effect.ErrAway) {
		t.Errorf("the connection ended: %v", err)
	}
	if after, err := b.Head(t.Context()); err != nil || after.Size != before.Size+1 {
		t.Errorf("the log has %d records, %v; want one more than %d", after.Size, err, before.Size)
	}
	if work, err = run(nothing); err != nil {
		t.Errorf("after that: %v", err)
	}
	held(work)
	storetest.Check(t, a)
}

// TestOutcomeColumns is that an outcome changes nothing of an operation but what stEnd writes.
func TestOutcomeColumns(t *testing.T) {
	op := effect.Operation{
		ID: "id", Scope: []byte("scope"), Fingerprint: []byte("print"), State: effect.Dispatched, Fence: 3, Holder: "holder", Until: 5, Round: []byte("round"), Ended: 6,
		Retain: 7, Index: 8, Answer: []byte("answer"), Undo: []byte("undo"), Tenant: "tenant", Principal: "principal", Server: "server", Tool: "tool", Sent: 9,
	}
	for _, state := range []effect.State{effect.Waiting, effect.Completed, effect.NotExecuted, effect.Unknown} {
		o := effect.Outcome{ID: op.ID, Fence: op.Fence, State: state, Answer: []byte("another"), Undo: []byte("another"), Round: []byte("another"), Lease: time.Hour}
		next, _, err := o.Apply(100, &op)
		if err != nil {
			t.Fatal(err)
		}
		next.State, next.Until, next.Round, next.Ended, next.Index, next.Answer, next.Undo = op.State, op.Until, op.Round, op.Ended, op.Index, op.Answer, op.Undo
		if !reflect.DeepEqual(next, op) {
			t.Errorf("%v: %+v, want %+v", state, next, op)
		}
	}
}
