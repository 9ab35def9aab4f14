package sqlite

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"math/bits"
	"os"
	"strings"

	"modernc.org/sqlite"

	"newel.dev/newel/internal/audit"
	"newel.dev/newel/internal/durable"
	"newel.dev/newel/internal/guard/approve"
	"newel.dev/newel/internal/guard/effect"
)

// Result codes of SQLite.
const (
	codePerm     = 3
	codeBusy     = 5
	codeLocked   = 6
	codeNoMem    = 7
	codeReadOnly = 8
	codeFull     = 13

	codeConstraint = 19
)

// classify says what an error means for the store. Those that leave what is on disk as it was
// refuse the work; after any other nobody knows what is on disk.
func classify(err error) error {
	var lite *sqlite.Error
	if !errors.As(err, &lite) {
		return err
	}
	switch lite.Code() & 0xff {
	case codePerm, codeBusy, codeLocked, codeNoMem, codeReadOnly, codeFull:
		return fmt.Errorf("%w: %w", effect.ErrAway, err)
	case codeConstraint, 20, 25: // MISMATCH, RANGE: of the one unit
		return err
	}
	return fmt.Errorf("%w: %w", durable.ErrFatal, err)
}

// commit implements durable.Staged. What memory holds changes after the commit.
//
// Keys are new, as a rule. So it does not look for what has them already, unless that went wrong a
// short while ago: SQLite refuses a key that is not new, and then everything is done again.
func (db *DB) commit(ctx context.Context, work []*durable.Work, more func() []*durable.Work) error {
	if db.doubts > 0 {
		db.doubts--
		return db.attempt(ctx, &work, false, more)
	}
	err := db.attempt(ctx, &work, true, more)
	var lite *sqlite.Error
	if !errors.As(err, &lite) || lite.Code()&0xff != codeConstraint {
		return err
	}
	db.doubts = manyDoubts - 1
	durable.Again(work)
	return db.attempt(ctx, &work, false, func() []*durable.Work { return nil })
}

// manyDoubts is for how many commits keys are looked for after one was not new. More, and callers that
// come again once slow down those that do not; fewer, and those that come again often do everything twice.
const manyDoubts = 16

// attempt commits the work and what more adds to it, or changes nothing. trust says that keys are new
// whose callers say so.
func (db *DB) attempt(ctx context.Context, work *[]*durable.Work, trust bool, more func() []*durable.Work) error {
	t := transaction{db: db, ctx: ctx, batch: db.batch, changed: db.changed[:0]}
	t.batch.Reset(db.edge.Clone())
	defer t.end()
	for stage := *work; len(stage) > 0; {
		if err := t.stage(stage, trust); err != nil {
			return classify(err)
		}
		stage = more()
		*work = append(*work, stage...)
	}
	return classify(t.commit(*work))
}

// A transaction is what one commit writes, stage after stage.
type transaction struct {
	db      *DB
	ctx     context.Context // of one call of attempt
	batch   *durable.Batch
	begun   bool
	erases  bool // what is erased is overwritten in the file
	changed []*effect.Operation
}

// stage writes some of the work.
func (t *transaction) stage(work []*durable.Work, trust bool) error {
	db, b := t.db, t.batch
	loaded, err := db.loaded(t.ctx, work, trust)
	if err != nil {
		return err
	}
	approvals, err := db.loadedApprovals(t.ctx, work)
	if err != nil {
		return err
	}
	tasks, err := db.loadedTasks(t.ctx, work)
	if err != nil {
		return err
	}
	b.Now = db.now()
	b.Load(loaded, approvals)
	b.LoadTasks(tasks)
	for _, u := range work {
		b.Apply(u)
	}
	if b.Empty() {
		return nil
	}
	if len(b.Erased) > 0 && !t.erases {
		t.erases = true
		if _, err := db.conn.ExecContext(t.ctx, "PRAGMA secure_delete = ON"); err != nil {
			return err
		}
	}
	if !t.begun {
		t.begun = true
		if _, err := db.conn.ExecContext(t.ctx, "BEGIN IMMEDIATE"); err != nil {
			return err
		}
	}
	changed := b.Changed()
	if err := db.store(t.ctx, b, changed); err != nil {
		return err
	}
	t.changed = append(t.changed, changed...)
	b.Written()
	return nil
}

// commit ends the transaction, if there is one.
func (t *transaction) commit(work []*durable.Work) error {
	if !t.begun {
		return nil
	}
	db := t.db
	if err := db.storeHead(t.ctx, t.batch); err != nil {
		return err
	}
	durable.Committing(work)
	if _, err := db.conn.ExecContext(t.ctx, "COMMIT"); err != nil {
		return err
	}
	t.begun = false
	db.edge = t.batch.Edge
	for _, op := range t.changed {
		if op.State.Ended() {
			delete(db.live, op.ID)
		} else {
			kept := *op // alone: others that were loaded with it may go
			db.live[op.ID] = &kept
		}
	}
	return nil
}

// end takes back what was not committed.
func (t *transaction) end() {
	t.batch.Reset(audit.Edge{})
	clear(t.changed)
	t.db.changed = t.changed[:0]
	if t.begun {
		_, _ = t.db.conn.ExecContext(t.ctx, "ROLLBACK") // SQLite may have done so already
	}
	if t.erases {
		_, _ = t.db.conn.ExecContext(t.ctx, "PRAGMA secure_delete = OFF") // it only costs time
	}
}

// loaded returns the operations that the work names. What has not ended is in memory.
func (db *DB) loaded(ctx context.Context, work []*durable.Work, trust bool) ([]effect.Operation, error) {
	var out []effect.Operation
	take := func(op *effect.Operation) {
		if out == nil {
			out = make([]effect.Operation, 0, len(work)) // one that is there twice is only known once
		}
		out = append(out, *op)
	}
	var ids, scopes []any
	for _, u := range work {
		if s := u.Scope(); s != nil {
			if id := u.Fresh(); !trust || id == "" {
				scopes = append(scopes, s)
			} else if op, ok := db.live[id]; ok {
				take(op) // the caller made it a moment ago
			}
		} else if id := u.ID(); id != "" {
			if op, ok := db.live[id]; ok {
				take(op)
			} else if u.Complete != nil {
				ids = append(ids, id) // ended before: the guard will hear that it is fenced
			}
		}
	}
	for column, keys := range map[string][]any{"scope": scopes, "id": ids} {
		for len(keys) > 0 {
			// Missing keys are the last one again: one statement, not several smaller ones.
			n := min(1<<bits.Len(uint(len(keys)-1)), maxChunk)
			for len(keys) < n {
				keys = append(keys, keys[len(keys)-1])
			}
			s, err := db.prepare(ctx, columns+"WHERE "+column+" IN (?"+strings.Repeat(",?", n-1)+")")
			if err != nil {
				return nil, err
			}
			rows, err := s.QueryContext(ctx, keys[:n]...)
			if err != nil {
				return nil, err
			}
			ops, err := scan(rows)
			if err != nil {
				return nil, err
			}
			for i := range ops {
				take(&ops[i])
			}
			keys = keys[n:]
		}
	}
	return out, nil
}

// maxChunk bounds the rows of one statement; times the width of a row it is below SQLite's bound of
// parameters.
const maxChunk = 64

// chunk is how many of n rows the next statement takes: up to seven, or a multiple of eight, so that few
// statements stay prepared and two at most are needed.
func chunk(n int) int {
	if n < 8 {
		return n
	}
	return min(n&^7, maxChunk)
}

const (
	columns   = "SELECT id, scope, fingerprint, state, fence, holder, until, sent, round, ended, retain, idx, answer, undo, tenant, principal, server, tool FROM operations "
	insertOp  = "INSERT OR ROLLBACK INTO operations (id, scope, fingerprint, state, fence, holder, until, sent, round, ended, retain, idx, answer, undo, tenant, principal, server, tool) VALUES "
	opValues  = "(?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)"
	updateOp  = "UPDATE operations SET state = ?, fence = ?, holder = ?, until = ?, sent = ?, round = ?, ended = ?, retain = ?, idx = ?, answer = ?, undo = ? WHERE id = ?"
	insertRow = "INSERT OR ROLLBACK INTO audit (idx, record, hashes, private) VALUES "
	rowValues = "(?,?,?,?)"
)

// store writes a stage of a batch.
func (db *DB) store(ctx context.Context, b *durable.Batch, changed []*effect.Operation) error {
	defer func() { clear(db.args[:cap(db.args)]) }() // it holds what was written no longer than that
	for _, id := range b.Removed {
		if err := db.exec(ctx, "DELETE FROM operations WHERE id = ?", id); err != nil {
			return err
		}
	}
	for _, op := range changed {
		if b.IsNew(op) {
			continue
		}
		if err := db.update(ctx, op); err != nil {
			return err
		}
	}
	args := db.args[:0]
	for _, op := range changed {
		if b.IsNew(op) {
			args = append(args, op.ID, op.Scope, op.Fingerprint, int64(op.State), op.Fence, op.Holder, op.Until, op.Sent, op.Round, op.Ended, op.Retain, op.Index, op.Answer, op.Undo, op.Tenant, op.Principal, op.Server, op.Tool)
		}
	}
	db.args = args
	if err := db.insert(ctx, insertOp, opValues, 18, args); err != nil {
		return err
	}
	if err := db.storeApprovals(ctx, b.Approvals()); err != nil {
		return err
	}
	args = db.args[:0]
	for i := range b.Rows {
		r := &b.Rows[i]
		args = append(args, r.Index, r.Record, r.Hashes, r.Private)
	}
	db.args = args
	if err := db.insert(ctx, insertRow, rowValues, 4, args); err != nil {
		return err
	}
	for _, e := range b.Erased {
		for _, i := range e.Records {
			if err := db.exec(ctx, "UPDATE audit SET private = ? WHERE idx = ? AND length(private) > ?", e.Mark, i, len(e.Mark)); err != nil {
				return err
			}
		}
	}
	for _, id := range b.Pruned {
		if err := db.exec(ctx, "DELETE FROM operations WHERE id = ? AND ended > 0 AND (state <> ? OR scope IS NULL) AND ended + retain < ?", id, int64(effect.Unknown), b.Now); err != nil {
			return err
		}
	}
	if len(b.Pruned) > 0 {
		if err := db.exec(ctx, "DELETE FROM approvals WHERE ended > 0 AND ended < ?", b.Now-approve.Retention.Microseconds()); err != nil {
			return err
		}
	}
	return db.storeTasks(ctx, b)
}

// storeHead writes what belongs to all of a batch.
func (db *DB) storeHead(ctx context.Context, b *durable.Batch) error {
	edge, err := b.Edge.MarshalBinary()
	if err != nil {
		return err
	}
	return db.exec(ctx, "UPDATE head SET size = ?, edge = ?, clock = ?", b.Edge.Size, edge, b.Now)
}

// update writes an operation that is there. If it is not, memory and file differ.
func (db *DB) update(ctx context.Context, op *effect.Operation) error {
	args := append(db.args[:0], int64(op.State), op.Fence, op.Holder, op.Until, op.Sent, op.Round, op.Ended, op.Retain, op.Index, op.Answer, op.Undo, op.ID)
	db.args = args
	n, err := db.execute(ctx, updateOp, args)
	if err != nil {
		return err
	}
	if n != 1 {
		return fmt.Errorf("%w: operation %s is not where it was (no row)", durable.ErrFatal, op.ID)
	}
	return nil
}

// insert inserts rows of width values each, many with one statement.
func (db *DB) insert(ctx context.Context, into, values string, width int, args []any) error {
	for len(args) > 0 {
		n := chunk(len(args) / width)
		key := insertion{into, n}
		text, ok := db.inserts[key]
		if !ok {
			text = into + values + strings.Repeat(","+values, n-1)
			db.inserts[key] = text
		}
		if _, err := db.execute(ctx, text, args[:n*width]); err != nil {
			return err
		}
		args = args[n*width:]
	}
	return nil
}

// An insertion names the text that inserts so many rows.
type insertion struct {
	into string
	rows int
}

func (db *DB) prepare(ctx context.Context, text string) (*sql.Stmt, error) {
	s := db.stmts[text]
	if s == nil {
		var err error
		if s, err = db.conn.PrepareContext(ctx, text); err != nil {
			return nil, err
		}
		db.stmts[text] = s
	}
	return s, nil
}

func (db *DB) exec(ctx context.Context, text string, args ...any) error {
	_, err := db.execute(ctx, text, args)
	return err
}

// execute executes a statement that stays prepared, and returns how many rows it changed. It gives the
// arguments to the driver itself: database/sql makes a copy of them each time, for half of what a commit
// takes from memory.
func (db *DB) execute(ctx context.Context, text string, args []any) (changed int64, err error) {
	err = db.conn.Raw(func(c any) error {
		s := db.execs[text]
		if s == nil {
			if s, err = prepareRaw(ctx, c, text); err != nil {
				return err
			}
			db.execs[text] = s
		}
		defer func() { clear(db.bound) }() // it holds what was written no longer than that
		db.bound = db.bound[:0]
		for i, a := range args {
			v, err := driver.DefaultParameterConverter.ConvertValue(a)
			if err != nil {
				return err
			}
			db.bound = append(db.bound, driver.NamedValue{Ordinal: i + 1, Value: v})
		}
		r, err := s.ExecContext(ctx, db.bound)
		if err != nil {
			return err
		}
		changed, err = r.RowsAffected()
		return err
	})
	return changed, err
}

// A statement is one of the driver's.
type statement interface {
	driver.Stmt
	driver.StmtExecContext
}

func prepareRaw(ctx context.Context, c any, text string) (statement, error) {
	p, ok := c.(driver.ConnPrepareContext)
	if !ok {
		return nil, fmt.Errorf("an unexpected driver %T", c)
	}
	prepared, err := p.PrepareContext(ctx, text)
	if err != nil {
		return nil, err
	}
	s, ok := prepared.(statement)
	if !ok {
		return nil, errors.Join(fmt.Errorf("an unexpected statement %T", prepared), prepared.Close())
	}
	return s, nil
}

// A querier is a pool or one connection.
type querier interface {
	QueryContext(ctx context.Context, text string, args ...any) (*sql.Rows, error)
}

// query returns the operations that a condition chooses.
func query(ctx context.Context, q querier, condition string, args ...any) ([]effect.Operation, error) {
	rows, err := q.QueryContext(ctx, columns+condition, args...)
	if err != nil {
		return nil, err
	}
	return scan(rows)
}

func scan(rows *sql.Rows) (ops []effect.Operation, err error) {
	defer func() { err = errors.Join(err, rows.Close()) }()
	for rows.Next() {
		var op effect.Operation
		err := rows.Scan(&op.ID, &op.Scope, &op.Fingerprint, &op.State, &op.Fence, &op.Holder, &op.Until, &op.Sent, &op.Round, &op.Ended, &op.Retain, &op.Index, &op.Answer, &op.Undo, &op.Tenant, &op.Principal, &op.Server, &op.Tool)
		if err != nil {
			return nil, err
		}
		ops = append(ops, op)
	}
	return ops, rows.Err()
}

// Find implements effect.Store.
func (db *DB) Find(ctx context.Context, scope []byte) (effect.Operation, error) {
	if err := db.Fatal(); err != nil {
		return effect.Operation{}, err
	}
	ops, err := query(ctx, db.read, "WHERE scope = ?", scope)
	if err != nil || len(ops) == 0 {
		return effect.Operation{}, err
	}
	return ops[0].At(db.now()), nil
}

// Operation implements effect.Store.
func (db *DB) Operation(ctx context.Context, id string) (effect.Operation, error) {
	if err := db.Fatal(); err != nil {
		return effect.Operation{}, err
	}
	ops, err := query(ctx, db.read, "WHERE id = ?", id)
	if err != nil || len(ops) == 0 {
		return effect.Operation{}, err
	}
	return ops[0].At(db.now()), nil
}

// Abandoned implements effect.Store.
func (db *DB) Abandoned(ctx context.Context, limit int) ([]effect.Operation, error) {
	w := &durable.Work{Peek: func() []effect.Operation {
		now := db.now()
		var out []effect.Operation
		for _, op := range db.live {
			if len(out) < limit && op.Until <= now {
				out = append(out, op.At(now))
			}
		}
		return out
	}}
	err := db.Do(ctx, w)
	return w.Seen, err
}

// Erase implements audit.Eraser. What is erased goes from the log of the file too, as soon as nobody
// reads from it.
func (db *DB) Erase(ctx context.Context, records []int64, entry audit.Entry) (int64, error) {
	index, err := db.Writer.Erase(ctx, records, entry)
	if err != nil {
		return index, err
	}
	var busy, frames, moved int64
	if err := db.read.QueryRowContext(ctx, "PRAGMA wal_checkpoint(TRUNCATE)").Scan(&busy, &frames, &moved); err != nil {
		return index, fmt.Errorf("it is erased, but may still be read in %s-wal: %w", db.file, err)
	}
	return index, nil
}

// Head implements audit.Source.
func (db *DB) Head(ctx context.Context) (audit.Edge, error) { return (&Log{db.read}).Head(ctx) }

// Read implements audit.Source.
func (db *DB) Read(ctx context.Context, from int64, limit int) ([]audit.Row, error) {
	return (&Log{db.read}).Read(ctx, from, limit)
}

// A Log is the audit log of a file that another process may have. It only reads.
type Log struct{ read *sql.DB }

var _ audit.Source = (*Log)(nil)

// OpenLog opens the audit log of a file.
func OpenLog(file string) (*Log, error) {
	if _, err := os.Stat(file); err != nil {
		return nil, fmt.Errorf("there is no state at %s: %w", file, err)
	}
	db, err := pool(file, true, 2)
	if err != nil {
		return nil, fmt.Errorf("the state %s cannot be opened: %w", file, err)
	}
	return &Log{db}, nil
}

// Close closes the file.
func (l *Log) Close() error { return l.read.Close() }

// Head implements audit.Source.
func (l *Log) Head(ctx context.Context) (audit.Edge, error) {
	var size int64
	var edge []byte
	if err := l.read.QueryRowContext(ctx, "SELECT size, edge FROM head").Scan(&size, &edge); err != nil {
		return audit.Edge{}, err
	}
	return audit.ParseEdge(size, edge)
}

// Read implements audit.Source.
func (l *Log) Read(ctx context.Context, from int64, limit int) (out []audit.Row, err error) {
	rows, err := l.read.QueryContext(ctx, "SELECT idx, record, hashes, private FROM audit WHERE idx >= ? ORDER BY idx LIMIT ?", from, limit)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, rows.Close()) }()
	for rows.Next() {
		var r audit.Row
		if err := rows.Scan(&r.Index, &r.Record, &r.Hashes, &r.Private); err != nil {
			return nil, err
		}
		out = append(out, r)
	}
	return out, rows.Err()
}
