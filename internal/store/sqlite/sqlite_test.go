package sqlite

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"newel.dev/newel/internal/audit"
	"newel.dev/newel/internal/durable"
	"newel.dev/newel/internal/guard/effect"
	"newel.dev/newel/internal/secret"
	"newel.dev/newel/internal/store/storetest"
	"newel.dev/newel/internal/task"
)

func open(t *testing.T, file string, key secret.Key) *DB {
	t.Helper()
	db, err := Open(t.Context(), file, key, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := db.Close(); err != nil {
			t.Error(err)
		}
	})
	return db
}

func TestEngine(t *testing.T) {
	storetest.Run(t, func(t *testing.T) (storetest.Engine, storetest.Engine) {
		return open(t, filepath.Join(t.TempDir(), "state.db"), secret.RandomKey()), nil
	})
}

func write(t *testing.T, db *DB, key string, end effect.State) effect.Operation {
	t.Helper()
	r := effect.Reservation{ID: rand.Text(), Holder: rand.Text(), Fingerprint: make([]byte, 32), Lease: time.Hour, Retain: time.Hour, Tool: "pay"}
	scope := sha256.Sum256([]byte(key))
	r.Scope = scope[:]
	op, held, err := db.Dispatch(t.Context(), &effect.Intent{Reservation: r, Entry: record(t)})
	if err != nil || !held {
		t.Fatal(held, err)
	}
	if end != 0 {
		if op, err = db.Complete(t.Context(), &effect.Outcome{ID: r.ID, Fence: 1, State: end, Answer: []byte("answer"), Entry: record(t)}); err != nil {
			t.Fatal(err)
		}
	}
	return op
}

func record(t *testing.T) audit.Entry {
	t.Helper()
	b, err := (&audit.Record{Act: audit.Intent, Operation: rand.Text(), Time: audit.Time(time.Now())}).Encode()
	if err != nil {
		t.Fatal(err)
	}
	return audit.Entry{Record: b}
}

func closed(t *testing.T, db *DB) {
	t.Helper()
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestReopen is a process that ends without a word: what it held is free at once, what it was told
// is there.
func TestReopen(t *testing.T) {
	file, key := filepath.Join(t.TempDir(), "state", "state.db"), secret.RandomKey()
	db, err := Open(t.Context(), file, key, 0)
	if err != nil {
		t.Fatal(err)
	}
	write(t, db, "done", effect.Completed)
	if files, err := filepath.Glob(file + "*"); err != nil || len(files) < 3 {
		t.Errorf("the files are %v, %v", files, err)
	} else {
		for _, f := range files {
			if info, err := os.Stat(f); err != nil || info.Mode().Perm()&0o077 != 0 && runtime.GOOS != "windows" {
				t.Errorf("%s can be read by others: %v, %v", f, info.Mode(), err)
			}
		}
	}
	running := write(t, db, "running", 0)
	job := &task.Write{Record: task.Record{ID: "job", Print: []byte("p"), Owner: []byte("o"), State: task.Running, Holder: "h", Request: []byte("r")}, Lease: time.Hour, Keep: time.Hour}
	if _, made, err := db.PutTask(t.Context(), job); err != nil || !made {
		t.Fatal(made, err)
	}
	if _, err := Open(t.Context(), file, key, 0); err == nil || !strings.Contains(err.Error(), "another process") {
		t.Errorf("two processes have one file: %v", err)
	}
	before := db.now()
	closed(t, db)
	if _, err := Open(t.Context(), file, secret.RandomKey(), 0); err == nil || !strings.Contains(err.Error(), "another key") {
		t.Errorf("another key: %v", err)
	}
	db = open(t, file, key)
	if now := db.now(); now > before+time.Minute.Microseconds() {
		t.Errorf("time went on while the engine did not run: %d", now-before)
	}
	ops, err := db.Abandoned(t.Context(), 10)
	if err != nil || len(ops) != 1 || ops[0].ID != running.ID {
		t.Errorf("abandoned: %v, %v", ops, err)
	}
	scope := sha256.Sum256([]byte("done"))
	if op, err := db.Find(t.Context(), scope[:]); err != nil || string(op.Answer) != "answer" {
		t.Errorf("found %+v, %v", op, err)
	}
	write(t, db, "more", effect.Completed)
	if due, err := db.DueTasks(t.Context(), 10); err != nil || len(due) != 1 || due[0].ID != "job" || due[0].State != task.Running {
		t.Errorf("a task that ran: %+v, %v", due, err)
	}
	storetest.Check(t, db)
}

// TestMigration is a file of the version before: what it holds is there, and what is new works.
func TestMigration(t *testing.T) {
	file, key := filepath.Join(t.TempDir(), "state.db"), secret.RandomKey()
	db, err := Open(t.Context(), file, key, 0)
	if err != nil {
		t.Fatal(err)
	}
	write(t, db, "done", effect.Completed)
	for _, text := range []string{"DROP TABLE tasks", "DROP TABLE approvals", "ALTER TABLE operations DROP COLUMN undo", "ALTER TABLE operations DROP COLUMN sent", "UPDATE meta SET value = '1' WHERE key = 'schema'"} {
		if _, err := db.conn.ExecContext(t.Context(), text); err != nil {
			t.Fatal(err)
		}
	}
	closed(t, db)
	db = open(t, file, key)
	scope := sha256.Sum256([]byte("done"))
	if op, err := db.Find(t.Context(), scope[:]); err != nil || op.State != effect.Completed || string(op.Answer) != "answer" || op.Undo != nil {
		t.Errorf("found %+v, %v", op, err)
	}
	if a, made, err := db.Ask(t.Context(), storetest.Request("k")); err != nil || !made || a.ID == "" {
		t.Errorf("%+v, %v, %v", a, made, err)
	}
}

// TestSchema is a file of a program of the next version, which only adds, and of one after that.
func TestSchema(t *testing.T) {
	file, key := filepath.Join(t.TempDir(), "state.db"), secret.RandomKey()
	with := func(do func(db *DB)) {
		t.Helper()
		db := open(t, file, key)
		do(db)
		closed(t, db)
		db.stmts, db.execs, db.conn, db.read, db.write, db.held, db.owner = nil, nil, nil, nil, nil, nil, nil
	}
	change := func(text string) {
		t.Helper()
		with(func(db *DB) {
			if _, err := db.conn.ExecContext(t.Context(), text); err != nil {
				t.Fatal(err)
			}
		})
	}
	with(func(db *DB) { write(t, db, "before", effect.Completed) })
	change("ALTER TABLE operations DROP COLUMN sent; UPDATE meta SET value = '3' WHERE key = 'schema'") // of the version before
	newer, err := Open(t.Context(), file, key, 0)
	if err != nil {
		t.Fatalf("one version on: %v", err)
	}
	scope := sha256.Sum256([]byte("before"))
	if op, err := newer.Find(t.Context(), scope[:]); err != nil || op.State != effect.Completed || op.Sent != 0 {
		t.Errorf("one version on: %+v, %v", op, err)
	}
	closed(t, newer)
	change("UPDATE meta SET value = '5' WHERE key = 'schema'; ALTER TABLE operations ADD COLUMN later TEXT; ALTER TABLE audit ADD COLUMN later TEXT")
	db, err := Open(t.Context(), file, key, 0)
	if err != nil {
		t.Fatalf("one version back: %v", err)
	}
	write(t, db, "k", effect.Completed)
	storetest.Check(t, db)
	closed(t, db)
	change("UPDATE meta SET value = '6' WHERE key = 'schema'")
	if _, err := Open(t.Context(), file, key, 0); err == nil || !strings.Contains(err.Error(), "newer program") {
		t.Errorf("two versions back: %v", err)
	}
}

// TestTampering changes one row of each kind behind the engine's back.
func TestTampering(t *testing.T) {
	for _, text := range []string{
		"UPDATE audit SET record = (SELECT record FROM audit WHERE idx = 3) WHERE idx = 2",
		"DELETE FROM audit WHERE idx = 2",
		"UPDATE audit SET hashes = zeroblob(length(hashes)) WHERE idx = 1",
		"UPDATE head SET edge = zeroblob(length(edge))",
		"DELETE FROM audit WHERE idx = (SELECT max(idx) FROM audit)",
	} {
		db := open(t, filepath.Join(t.TempDir(), "state.db"), secret.RandomKey())
		for i := range 3 {
			write(t, db, fmt.Sprint(i), effect.Completed)
		}
		storetest.Check(t, db)
		if _, err := db.conn.ExecContext(t.Context(), text); err != nil {
			t.Fatal(err)
		}
		if _, err := audit.Check(t.Context(), db); !errors.Is(err, audit.ErrTampered) {
			t.Errorf("%s: %v", text, err)
		}
	}
}

// TestDiskError is an error of the disk: nothing is written after it, and Run returns it.
func TestDiskError(t *testing.T) {
	db := open(t, filepath.Join(t.TempDir(), "state.db"), secret.RandomKey())
	write(t, db, "before", effect.Completed)
	real := db.Writer
	broken := fmt.Errorf("%w: fsync", durable.ErrFatal)
	db.Writer = durable.NewWriter(func(context.Context, []*durable.Work) error { return broken })
	ended := make(chan error, 1)
	go func() { ended <- db.Run(t.Context()) }()
	_, _, err := db.Dispatch(t.Context(), &effect.Intent{Reservation: effect.Reservation{ID: "x", Holder: "x"}, Entry: record(t)})
	if !errors.Is(err, durable.ErrFatal) {
		t.Errorf("got %v", err)
	}
	if err := <-ended; !errors.Is(err, durable.ErrFatal) {
		t.Errorf("Run returned %v", err)
	}
	if _, err := db.Find(t.Context(), make([]byte, 32)); !errors.Is(err, durable.ErrFatal) {
		t.Errorf("what may not be on disk is read: %v", err)
	}
	db.Writer = real
}

// TestFullDisk is a full disk: new work is refused, what was written stays, and it goes on after.
func TestFullDisk(t *testing.T) {
	db := open(t, filepath.Join(t.TempDir(), "state.db"), secret.RandomKey())
	write(t, db, "before", effect.Completed)
	if _, err := db.conn.ExecContext(t.Context(), "PRAGMA max_page_count = 1"); err != nil { // the smallest it can still be
		t.Fatal(err)
	}
	refused := false
	for i := 0; i < 1000 && !refused; i++ {
		r := effect.Reservation{ID: rand.Text(), Holder: rand.Text(), Fingerprint: make([]byte, 4096), Lease: time.Hour}
		_, _, err := db.Dispatch(t.Context(), &effect.Intent{Reservation: r, Entry: record(t)})
		if refused = errors.Is(err, effect.ErrAway); !refused && err != nil {
			t.Fatal(err)
		}
	}
	if !refused {
		t.Fatal("a full disk was written to")
	}
	storetest.Check(t, db)
	if _, err := db.conn.ExecContext(t.Context(), "PRAGMA max_page_count = 100000"); err != nil {
		t.Fatal(err)
	}
	write(t, db, "after", effect.Completed)
	storetest.Check(t, db)
}

func TestRestored(t *testing.T) {
	db := open(t, filepath.Join(t.TempDir(), "state.db"), secret.RandomKey())
	storetest.Restored(t, db, func(index int64, private []byte) {
		if _, err := db.conn.ExecContext(t.Context(), "UPDATE audit SET private = ? WHERE idx = ?", private, index); err != nil {
			t.Fatal(err)
		}
	})
}

// What is erased is nowhere in the files any more.
func TestErasedFromFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "state.db")
	db := open(t, file, secret.RandomKey())
	private := bytes.Repeat([]byte("to be erased; "), 2000) // over several pages
	e := record(t)
	e.Private = private
	if _, err := db.Append(t.Context(), []audit.Entry{e}); err != nil {
		t.Fatal(err)
	}
	there := func() bool {
		for _, name := range []string{file, file + "-wal"} {
			b, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			if bytes.Contains(b, private[:14]) {
				return true
			}
		}
		return false
	}
	if !there() {
		t.Fatal("it is not there to begin with")
	}
	if _, err := db.Erase(t.Context(), []int64{0}, record(t)); err != nil {
		t.Fatal(err)
	}
	if there() {
		t.Error("it can still be read in the files")
	}
}

// TestStages is one transaction in stages: the later ones see what the earlier ones wrote, and a key that
// was not new after all has everything done again, once.
func TestStages(t *testing.T) {
	db := open(t, filepath.Join(t.TempDir(), "state.db"), secret.RandomKey())
	failed := write(t, db, "failed", effect.NotExecuted)
	write(t, db, "done", effect.Completed)
	dispatch := func(key string, seen effect.Operation) *durable.Work {
		scope := sha256.Sum256([]byte(key))
		r := effect.Reservation{ID: rand.Text(), Holder: rand.Text(), Scope: scope[:], Fingerprint: make([]byte, 32), Lease: time.Hour, Retain: time.Hour, Tool: "pay"}
		if seen.ID != "" {
			r.ID, r.Expect = seen.ID, seen.Fence
		}
		return &durable.Work{Dispatch: &effect.Intent{Reservation: r, Entry: record(t)}}
	}
	commit := func(stages ...[]*durable.Work) {
		t.Helper()
		next := 0
		err := db.commit(t.Context(), stages[0], func() []*durable.Work {
			if next++; next < len(stages) {
				return stages[next]
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		storetest.Check(t, db)
	}
	complete := func(w *durable.Work) *durable.Work {
		return &durable.Work{Complete: &effect.Outcome{ID: w.Op.ID, Fence: w.Op.Fence, State: effect.Completed, Answer: []byte("answer"), Entry: record(t)}}
	}

	first, second, third := dispatch("new", effect.Operation{}), dispatch("new", effect.Operation{}), dispatch("failed", failed)
	fourth := dispatch("failed", failed) // it comes too late
	commit([]*durable.Work{first, third}, []*durable.Work{second, fourth})
	if !first.Held || second.Held || second.Op.ID != first.Op.ID || !third.Held || third.Op.Fence != 2 || fourth.Held || fourth.Op.Fence != 2 {
		t.Errorf("claimed: %v, %v, %v, %v", first.Held, second.Held, third.Held, fourth.Held)
	}
	one, two := complete(first), complete(third)
	before := db.edge.Size
	fresh, old := dispatch("another", effect.Operation{}), dispatch("done", effect.Operation{})
	commit([]*durable.Work{one, fresh}, []*durable.Work{two, old})
	if !fresh.Held || old.Held || old.Op.State != effect.Completed || one.Err != nil || two.Err != nil {
		t.Errorf("after a key that was not new: %v, %v, %v, %v", fresh.Held, old.Held, one.Err, two.Err)
	}
	if db.edge.Size != before+3 || len(db.live) != 1 || db.doubts == 0 {
		t.Errorf("%d records more, want 3; %d operations have not ended, want 1; doubts %d", db.edge.Size-before, len(db.live), db.doubts)
	}
	for key, state := range map[string]effect.State{"new": effect.Completed, "failed": effect.Completed, "another": effect.Dispatched, "done": effect.Completed} {
		scope := sha256.Sum256([]byte(key))
		if op, err := db.Find(t.Context(), scope[:]); err != nil || op.State != state {
			t.Errorf("%s: %v, %v", key, op.State, err)
		}
	}
}
