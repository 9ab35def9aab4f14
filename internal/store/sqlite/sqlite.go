// Package sqlite keeps operations and the audit log in a file: the engine of one node.
//
// Start reading at [Open], then [DB.Run]. commit.go is the one writer: many callers' work in one
// transaction, synced before anybody is told.
//
// It promises: what was acknowledged survives the process and the machine (WAL, synchronous=FULL);
// one process has the file at a time; after an error of the disk nothing is written any more, and
// Run returns it so that the process ends and reads what is really there. A full disk refuses
// new work and nothing else. Time is counted while the engine runs, whatever the clock says: so
// nothing is forgotten too early, and leases end with the process that held them.
package sqlite

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"encoding/hex"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"modernc.org/sqlite"

	"newel.dev/newel/internal/audit"
	"newel.dev/newel/internal/durable"
	"newel.dev/newel/internal/faultpoint"
	"newel.dev/newel/internal/guard/approve"
	"newel.dev/newel/internal/guard/effect"
	"newel.dev/newel/internal/secret"
	"newel.dev/newel/internal/task"
)

// A DB is a store in a file. It is safe for concurrent use.
type DB struct {
	*durable.Writer
	file  string
	owner *sql.DB // holds the lock on the file
	held  *sql.Conn
	write *sql.DB
	conn  *sql.Conn // the one writer
	read  *sql.DB
	base  int64     // clock at start, in microseconds
	start time.Time // its monotonic part counts

	// Of the one writer.
	edge    audit.Edge
	live    map[string]*effect.Operation // what has not ended
	stmts   map[string]*sql.Stmt         // that return rows
	execs   map[string]statement         // that do not
	inserts map[insertion]string         // their texts
	batch   *durable.Batch               // of one commit after the other
	changed []*effect.Operation          // the same
	args    []any                        // of one statement after the other
	bound   []driver.NamedValue          // the same, as the driver takes them

	doubts int // for how many commits it is looked whether keys are new
}

var (
	_ effect.Store  = (*DB)(nil)
	_ approve.Store = (*DB)(nil)
	_ task.Store    = (*DB)(nil)
	_ audit.Eraser  = (*DB)(nil)
)

// ErrInUse says that another process has the file.
var ErrInUse = errors.New("another process uses it; stop that one, or give this one a state of its own")

const openTimeout = 10 * time.Second

// Open opens a file, or makes it and its folder, and brings its schema up to date. key has to be
// the one that it was made with. Nothing else may use the file to write: Open waits as long as wait
// for another process to let go of it, then returns ErrInUse.
func Open(ctx context.Context, file string, key secret.Key, wait time.Duration) (_ *DB, err error) {
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		return nil, fmt.Errorf("the folder of the state cannot be made: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, openTimeout)
	defer cancel()
	db := &DB{file: file, start: time.Now(), live: map[string]*effect.Operation{}, batch: durable.NewBatch(0, audit.Edge{}, nil, nil), stmts: map[string]*sql.Stmt{}, execs: map[string]statement{}, inserts: map[insertion]string{}}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("the state %s cannot be opened: %w", file, err), db.Close())
		}
	}()
	for _, f := range []string{file, file + ".owner"} { // SQLite would let others read it, and gives its log the same mode
		if err := touch(f); err != nil {
			return nil, err
		}
	}
	if err := db.lock(ctx, wait); err != nil {
		return nil, err
	}
	if db.write, err = pool(file, false, 1); err != nil {
		return nil, err
	}
	if db.conn, err = db.write.Conn(ctx); err != nil {
		return nil, err
	}
	if db.read, err = pool(file, true, 4); err != nil {
		return nil, err
	}
	if err := db.migrate(ctx); err != nil {
		return nil, err
	}
	if err := db.load(ctx, key); err != nil {
		return nil, err
	}
	db.Writer = durable.NewStaged(db.commit)
	return db, nil
}

// touch makes a file that only we can read, unless it is there.
func touch(file string) error {
	f, err := os.OpenFile(file, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	return f.Close()
}

// lock takes the file for this process. SQLite's own locks do it everywhere, and end with us.
func (db *DB) lock(ctx context.Context, wait time.Duration) error {
	c, err := sqlite.NewConnector(address(db.file+".owner", url.Values{"_pragma": {fmt.Sprintf("busy_timeout(%d)", wait.Milliseconds())}, "_txlock": {"exclusive"}}))
	if err != nil {
		return err
	}
	db.owner = sql.OpenDB(c)
	if db.held, err = db.owner.Conn(ctx); err == nil {
		_, err = db.held.ExecContext(ctx, "BEGIN EXCLUSIVE")
	}
	var lite *sqlite.Error
	if errors.As(err, &lite) && lite.Code()&0xff == codeBusy {
		return ErrInUse
	}
	return err
}

func address(file string, q url.Values) string {
	return (&url.URL{Scheme: "file", Opaque: (&url.URL{Path: file}).EscapedPath(), RawQuery: q.Encode()}).String()
}

func pool(file string, queryOnly bool, connections int) (*sql.DB, error) {
	q := url.Values{
		"_pragma":    {"busy_timeout(5000)", "journal_mode(WAL)", "synchronous(FULL)", "wal_autocheckpoint(8000)", "cache_size(-32768)"},
		"_dqs":       {"0"},
		"_defensive": {"1"},
	}
	if queryOnly {
		q.Set("_query_only", "1")
	}
	throughFaults(q)
	c, err := sqlite.NewConnector(address(file, q))
	if err != nil {
		return nil, err
	}
	db := sql.OpenDB(verified{c})
	db.SetMaxOpenConns(connections)
	db.SetMaxIdleConns(connections)
	return db, nil
}

// verified makes sure on each connection that what is promised took effect: SQLite ignores settings
// that it cannot follow.
type verified struct{ driver.Connector }

// Connect implements driver.Connector.
func (v verified) Connect(ctx context.Context) (driver.Conn, error) {
	c, err := v.Connector.Connect(ctx)
	if err != nil {
		return nil, err
	}
	q, ok := c.(driver.QueryerContext)
	if !ok {
		return nil, errors.Join(fmt.Errorf("an unexpected driver %T", c), c.Close())
	}
	got := make([]driver.Value, 2)
	rows, err := q.QueryContext(ctx, "SELECT journal_mode, synchronous FROM pragma_journal_mode, pragma_synchronous", nil)
	if err == nil {
		err = errors.Join(rows.Next(got), rows.Close())
	}
	if err == nil && !slices.Equal(got, []driver.Value{"wal", int64(2)}) {
		err = fmt.Errorf("its settings (journal mode, synchronous) are %v and should be wal and 2", got)
	}
	if err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return c, nil
}

// migrations bring the schema from their index to the next.
var migrations = []string{`
CREATE TABLE head (id INTEGER PRIMARY KEY CHECK (id = 1), size INTEGER NOT NULL, edge BLOB NOT NULL, clock INTEGER NOT NULL) STRICT;
INSERT INTO head VALUES (1, 0, x'', 0);
CREATE TABLE audit (idx INTEGER PRIMARY KEY, record BLOB NOT NULL, hashes BLOB NOT NULL, private BLOB) STRICT;
CREATE TABLE operations (
	id TEXT NOT NULL UNIQUE, scope BLOB UNIQUE, fingerprint BLOB NOT NULL, state INTEGER NOT NULL, fence INTEGER NOT NULL, holder TEXT NOT NULL,
	until INTEGER NOT NULL, round BLOB, ended INTEGER NOT NULL, retain INTEGER NOT NULL, idx INTEGER NOT NULL, answer BLOB,
	tenant TEXT NOT NULL, principal TEXT NOT NULL, server TEXT NOT NULL, tool TEXT NOT NULL) STRICT;
`, `
ALTER TABLE operations ADD COLUMN undo BLOB;
CREATE TABLE approvals (
	id TEXT NOT NULL UNIQUE, binding BLOB UNIQUE, tenant TEXT NOT NULL, principal TEXT NOT NULL, state INTEGER NOT NULL, until INTEGER NOT NULL,
	deadline INTEGER NOT NULL, ended INTEGER NOT NULL, operation TEXT NOT NULL, round BLOB, idx INTEGER NOT NULL, args BLOB, facts BLOB NOT NULL) STRICT;
CREATE INDEX approvals_state ON approvals (state, tenant, principal);
`, `
CREATE TABLE tasks (
	id TEXT NOT NULL UNIQUE, scope BLOB UNIQUE, print BLOB NOT NULL, owner BLOB NOT NULL, state INTEGER NOT NULL, version INTEGER NOT NULL, holder TEXT NOT NULL,
	until INTEGER NOT NULL, created INTEGER NOT NULL, updated INTEGER NOT NULL, expires INTEGER NOT NULL, request BLOB NOT NULL, notes BLOB, answer BLOB,
	tenant TEXT NOT NULL, principal TEXT NOT NULL, server TEXT NOT NULL, tool TEXT NOT NULL) STRICT;
CREATE INDEX tasks_open ON tasks (id, state, until, expires, created) WHERE state < 4;
CREATE INDEX tasks_mine ON tasks (owner, id);
CREATE INDEX tasks_busy ON tasks (owner) WHERE state < 4;
CREATE INDEX tasks_ended ON tasks (expires) WHERE state >= 4;
`, `
ALTER TABLE operations ADD COLUMN sent INTEGER NOT NULL DEFAULT 0;
`}

// migrate brings the schema up to date, one version a transaction: a crash between two leaves the
// version that is reached.
func (db *DB) migrate(ctx context.Context) error {
	if _, err := db.conn.ExecContext(ctx, "CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT"); err != nil {
		return err
	}
	text, err := db.meta(ctx, "schema", "0")
	if err != nil {
		return err
	}
	found, err := strconv.Atoi(text)
	if err != nil {
		return fmt.Errorf("its schema is %q", text)
	}
	if err := durable.CheckSchema(found); err != nil {
		return err
	}
	for v := found; v < durable.Schema; v++ {
		err := db.within(ctx, func() error {
			if _, err := db.conn.ExecContext(ctx, migrations[v]); err != nil {
				return err
			}
			faultpoint.Reached(faultpoint.Migrating)
			_, err := db.conn.ExecContext(ctx, "INSERT INTO meta VALUES ('schema', ?) ON CONFLICT DO UPDATE SET value = excluded.value", strconv.Itoa(v+1))
			return err
		})
		if err != nil {
			return fmt.Errorf("schema %d: %w", v+1, err)
		}
	}
	return nil
}

// meta returns a setting of the file, or otherwise.
func (db *DB) meta(ctx context.Context, key, otherwise string) (string, error) {
	v := otherwise
	err := db.conn.QueryRowContext(ctx, "SELECT value FROM meta WHERE key = ?", key).Scan(&v)
	if errors.Is(err, sql.ErrNoRows) {
		err = nil
	}
	return v, err
}

// within runs f in a transaction.
func (db *DB) within(ctx context.Context, f func() error) error {
	if _, err := db.conn.ExecContext(ctx, "BEGIN IMMEDIATE"); err != nil {
		return err
	}
	err := f()
	if err == nil {
		_, err = db.conn.ExecContext(ctx, "COMMIT")
	}
	if err != nil {
		_, _ = db.conn.ExecContext(ctx, "ROLLBACK") // SQLite may have done so already
	}
	return err
}

// load reads what the writer keeps in memory. Whoever held an operation is gone: we have the file.
func (db *DB) load(ctx context.Context, key secret.Key) error {
	check, err := key.Derive("newel key check")
	if err != nil {
		return err
	}
	mine := hex.EncodeToString(check[:8])
	found, err := db.meta(ctx, "key", mine)
	if err != nil {
		return err
	}
	if found != mine {
		return errors.New("it was made with another key; name the key file that belongs to it")
	}
	if _, err := db.conn.ExecContext(ctx, "INSERT INTO meta VALUES ('key', ?) ON CONFLICT DO NOTHING", mine); err != nil {
		return err
	}
	var size int64
	var edge []byte
	if err := db.conn.QueryRowContext(ctx, "SELECT size, edge, clock FROM head").Scan(&size, &edge, &db.base); err != nil {
		return err
	}
	if db.edge, err = audit.ParseEdge(size, edge); err != nil {
		return err
	}
	if _, err := db.conn.ExecContext(ctx, "UPDATE operations SET until = min(until, ?) WHERE state IN (?, ?)", db.base, effect.Reserved, effect.Dispatched); err != nil {
		return err
	}
	if _, err := db.conn.ExecContext(ctx, "UPDATE tasks SET until = min(until, ?) WHERE state < 4 AND state = ?", db.base, int64(task.Running)); err != nil {
		return err
	}
	ops, err := query(ctx, db.conn, "WHERE ended = 0")
	for i := range ops {
		db.live[ops[i].ID] = &ops[i]
	}
	return err
}

// now is the engine's clock: it runs while the engine does.
func (db *DB) now() int64 { return db.base + time.Since(db.start).Microseconds() }

// Close closes the file. Work that is being committed is waited for.
func (db *DB) Close() error {
	var errs []error
	for _, s := range db.stmts {
		errs = append(errs, s.Close())
	}
	if db.conn != nil {
		errs = append(errs, db.conn.Raw(func(any) error {
			var errs []error
			for _, s := range db.execs {
				errs = append(errs, s.Close())
			}
			return errors.Join(errs...)
		}), db.conn.Close())
	}
	for _, p := range []*sql.DB{db.read, db.write} {
		if p != nil {
			errs = append(errs, p.Close())
		}
	}
	if db.held != nil {
		errs = append(errs, db.held.Close())
	}
	if db.owner != nil {
		errs = append(errs, db.owner.Close())
	}
	return errors.Join(errs...)
}

const (
	pruneEvery = 10 * time.Minute
	pruneMost  = 500 // operations in one transaction
)

// Run forgets operations past their retention until ctx ends. It returns an error when the store
// can no longer be trusted: then the process has to end.
func (db *DB) Run(ctx context.Context) error {
	tick := time.NewTicker(pruneEvery)
	defer tick.Stop()
	for {
		if _, err := db.Prune(ctx); err != nil && ctx.Err() == nil && db.Fatal() == nil {
			return fmt.Errorf("the state %s: %w", db.file, err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-db.Failed():
			return fmt.Errorf("the state %s: %w", db.file, db.Fatal())
		case <-tick.C:
		}
	}
}

// Prune deletes operations and tasks past their time, and returns how many there were.
func (db *DB) Prune(ctx context.Context) (int, error) {
	var old bool
	err := db.read.QueryRowContext(ctx, "SELECT EXISTS (SELECT 1 FROM approvals WHERE ended > 0 AND ended < ?)", db.now()-approve.Retention.Microseconds()).Scan(&old)
	if err == nil && old {
		err = db.Do(ctx, &durable.Work{Prune: []string{""}}) // no operation: approvals go with any
	}
	if err != nil {
		return 0, err
	}
	total, err := db.pruneTasks(ctx)
	if err != nil {
		return total, err
	}
	for {
		ids, err := db.expired(ctx)
		if err != nil || len(ids) == 0 {
			return total, err
		}
		if err := db.Do(ctx, &durable.Work{Prune: ids}); err != nil {
			return total, err
		}
		total += len(ids)
	}
}

func (db *DB) expired(ctx context.Context) (ids []string, err error) {
	rows, err := db.read.QueryContext(ctx, "SELECT id FROM operations WHERE ended > 0 AND (state <> ? OR scope IS NULL) AND ended + retain < ? LIMIT ?", effect.Unknown, db.now(), pruneMost)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, rows.Close()) }()
	for rows.Next() {
		var id string
		if err := rows.Scan(&id); err != nil {
			return nil, err
		}
		ids = append(ids, id)
	}
	return ids, rows.Err()
}
