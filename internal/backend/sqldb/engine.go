package sqldb

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/stdlib"
	"modernc.org/sqlite" // also registers the driver "sqlite"

	"newel.dev/newel/call"
)

// An engine is one kind of database.
type engine struct {
	postgres bool
	read     *sql.DB // every transaction on it is read-only
	write    *sql.DB
}

// description is what the database says of a statement.
type description struct {
	columns []string
	types   []string // of the columns, as the database names them; nil: unknown
	params  []string // types of the parameters; nil: unknown
	writes  bool
}

const pingTimeout = 5 * time.Second

// openSQLite opens a database file. Readers cannot write, even if a statement tried to; there is
// one writer, and what it commits is synced.
func openSQLite(ctx context.Context, file string, connections int) (*engine, error) {
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		return nil, fmt.Errorf("the folder of the database cannot be made: %w", err)
	}
	write, err := sqlitePool(file, false, 1)
	if err != nil {
		return nil, err
	}
	read, err := sqlitePool(file, true, connections)
	if err != nil {
		return nil, errors.Join(err, write.Close())
	}
	e := &engine{read: read, write: write}
	// The writer first: it makes the file and its journal mode.
	for _, db := range []*sql.DB{write, read} {
		if err := db.PingContext(ctx); err != nil {
			return nil, errors.Join(fmt.Errorf("the database %s cannot be opened: %w", file, err), e.close())
		}
	}
	return e, nil
}

func sqlitePool(file string, queryOnly bool, connections int) (*sql.DB, error) {
	q := url.Values{
		"_pragma":      {"busy_timeout(5000)", "foreign_keys(1)", "journal_mode(WAL)", "synchronous(FULL)"},
		"_time_format": {"sqlite"},
		"_txlock":      {"immediate"},
		"_dqs":         {"0"}, // an unknown name in double quotes is an error, not a string
		"_defensive":   {"1"},
	}
	if queryOnly {
		q.Set("_query_only", "1")
		q.Set("_txlock", "deferred")
	}
	c, err := sqlite.NewConnector((&url.URL{Scheme: "file", Opaque: (&url.URL{Path: file}).EscapedPath(), RawQuery: q.Encode()}).String())
	if err != nil {
		return nil, err
	}
	db := sql.OpenDB(verified{c, queryOnly})
	db.SetMaxOpenConns(connections)
	db.SetMaxIdleConns(connections)
	return db, nil
}

// verified opens connections and makes sure that the settings of each took effect: SQLite ignores
// some that it cannot follow.
type verified struct {
	driver.Connector
	queryOnly bool
}

const settings = "SELECT journal_mode, foreign_keys, synchronous, query_only FROM pragma_journal_mode, pragma_foreign_keys, pragma_synchronous, pragma_query_only"

// Connect implements driver.Connector.
func (v verified) Connect(ctx context.Context) (driver.Conn, error) {
	c, err := v.Connector.Connect(ctx)
	if err != nil {
		return nil, err
	}
	if err := v.verify(ctx, c); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return c, nil
}

func (v verified) verify(ctx context.Context, c driver.Conn) error {
	q, ok := c.(driver.QueryerContext)
	if !ok {
		return fmt.Errorf("an unexpected driver %T", c)
	}
	rows, err := q.QueryContext(ctx, settings, nil)
	if err != nil {
		return err
	}
	got := make([]driver.Value, 4)
	if err := errors.Join(rows.Next(got), rows.Close()); err != nil {
		return err
	}
	want := []driver.Value{"wal", int64(1), int64(2), int64(0)}
	if v.queryOnly {
		want[3] = int64(1)
	}
	if !slices.Equal(got, want) {
		return fmt.Errorf("its settings (journal mode, foreign keys, synchronous, query only) are %v and should be %v", got, want)
	}
	return nil
}

// openPostgres opens a pool of connections. timeout also bounds statements on the server's side.
func openPostgres(ctx context.Context, dsn string, connections int, timeout time.Duration) (*engine, error) {
	cfg, err := pgx.ParseConfig(dsn)
	if err != nil {
		return nil, errors.New("the dsn is not one of PostgreSQL; write postgres://user:password@host:5432/database") // the parser's text may hold the password
	}
	cfg.RuntimeParams["application_name"] = "newel"
	cfg.RuntimeParams["statement_timeout"] = fmt.Sprint((timeout + time.Second).Milliseconds())
	cfg.RuntimeParams["TimeZone"] = "UTC"
	if cfg.ConnectTimeout == 0 {
		cfg.ConnectTimeout = pingTimeout
	}
	db := stdlib.OpenDB(*cfg)
	db.SetMaxOpenConns(connections)
	db.SetMaxIdleConns(connections)
	db.SetConnMaxLifetime(30 * time.Minute)
	ctx, cancel := context.WithTimeout(ctx, pingTimeout)
	defer cancel()
	if err := db.PingContext(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("the database at %s:%d cannot be reached: %w", cfg.Host, cfg.Port, err), db.Close())
	}
	return &engine{postgres: true, read: db, write: db}, nil
}

func (e *engine) close() error {
	if e.read == e.write {
		return e.read.Close()
	}
	return errors.Join(e.read.Close(), e.write.Close())
}

// describe has the database check a statement: its syntax, its names and, where it can tell, its types.
func (e *engine) describe(ctx context.Context, text string, params int) (description, error) {
	if e.postgres {
		return e.describePostgres(ctx, text, params)
	}
	return e.describeSQLite(ctx, text, params)
}

func (e *engine) describePostgres(ctx context.Context, text string, params int) (d description, err error) {
	c, err := e.read.Conn(ctx)
	if err != nil {
		return d, err
	}
	defer func() { err = errors.Join(err, c.Close()) }()
	err = c.Raw(func(driver any) (err error) {
		conn, ok := driver.(*stdlib.Conn)
		if !ok {
			return fmt.Errorf("an unexpected driver %T", driver)
		}
		sd, err := conn.Conn().Prepare(ctx, "newel_check", text)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, conn.Conn().Deallocate(ctx, "newel_check")) }()
		types := conn.Conn().TypeMap()
		nameOf := func(oid uint32) string {
			if t, ok := types.TypeForOID(oid); ok {
				return t.Name
			}
			return ""
		}
		for _, f := range sd.Fields {
			d.columns = append(d.columns, f.Name)
			d.types = append(d.types, nameOf(f.DataTypeOID))
		}
		for _, oid := range sd.ParamOIDs {
			d.params = append(d.params, nameOf(oid))
		}
		nulls := ""
		if params > 0 {
			nulls = "(" + strings.TrimSuffix(strings.Repeat("NULL,", params), ",") + ")"
		}
		// The plan tells whether it writes; asking for it runs nothing.
		var plan string
		if err := conn.Conn().QueryRow(ctx, "EXPLAIN (FORMAT JSON) EXECUTE newel_check"+nulls, pgx.QueryExecModeSimpleProtocol).Scan(&plan); err != nil {
			return err
		}
		d.writes = strings.Contains(plan, `"ModifyTable"`) || strings.Contains(plan, `"LockRows"`)
		return nil
	})
	return d, err
}

func (e *engine) describeSQLite(ctx context.Context, text string, params int) (d description, err error) {
	zeros := make([]any, params)
	for i := range zeros {
		zeros[i] = int64(0) // fits everywhere, LIMIT included
	}
	rows, err := e.read.QueryContext(ctx, "EXPLAIN "+text, zeros...)
	if err != nil {
		return d, err
	}
	for rows.Next() {
		var addr, p1, p2, p3, p5 sql.NullInt64
		var opcode string
		var p4, comment sql.NullString
		if err := rows.Scan(&addr, &opcode, &p1, &p2, &p3, &p4, &p5, &comment); err != nil {
			return d, errors.Join(err, rows.Close())
		}
		d.writes = d.writes || opcode == "OpenWrite" || opcode == "Transaction" && p2.Int64 > 0
	}
	if err := errors.Join(rows.Err(), rows.Close()); err != nil {
		return d, err
	}
	return d, e.columnsSQLite(ctx, text, &d)
}

// columnsSQLite adds the columns of a query, without running it. Only columns of STRICT tables
// have types: elsewhere SQLite stores any value anywhere.
func (e *engine) columnsSQLite(ctx context.Context, text string, d *description) (err error) {
	c, err := e.read.Conn(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.Close()) }()
	var infos []sqlite.ColumnInfo
	if err := c.Raw(func(driver any) (err error) {
		conn, ok := driver.(interface {
			ColumnInfo(query string) ([]sqlite.ColumnInfo, error)
		})
		if !ok {
			return fmt.Errorf("an unexpected driver %T", driver)
		}
		infos, err = conn.ColumnInfo(text)
		return err
	}); err != nil {
		return err
	}
	for _, i := range infos {
		var strict bool
		row := c.QueryRowContext(ctx, "SELECT coalesce(max(strict), 0) FROM pragma_table_list WHERE schema = ? AND name = ?", i.DatabaseName, i.TableName)
		if err := row.Scan(&strict); err != nil {
			return err
		}
		typ := strings.ToUpper(i.DeclType)
		if !strict && !isSQLiteTime(typ) {
			typ = ""
		}
		d.columns = append(d.columns, i.Name)
		d.types = append(d.types, typ)
	}
	return nil
}

// isSQLiteTime reports whether the driver reads the column's text as a time.
func isSQLiteTime(typ string) bool { return typ == "DATE" || typ == "DATETIME" || typ == "TIMESTAMP" }

// run runs a statement in a transaction of its own: a read-only one unless write is set. each
// gets every row; with an error from it nothing is committed.
func (e *engine) run(ctx context.Context, write bool, text string, args []any, each func(columns []*sql.ColumnType, values []any) error) (affected int64, err error) {
	affected, err = e.once(ctx, write, text, args, each)
	// A table was changed since the statement was prepared: it did not run, and the driver has
	// forgotten it, so that it is prepared anew.
	var pg *pgconn.PgError
	if errors.As(err, &pg) && pg.Code == "0A000" && pg.Routine == "RevalidateCachedQuery" {
		return e.once(ctx, write, text, args, each)
	}
	return affected, err
}

func (e *engine) once(ctx context.Context, write bool, text string, args []any, each func(columns []*sql.ColumnType, values []any) error) (affected int64, err error) {
	db := e.read
	if write {
		db = e.write
	}
	tx, err := db.BeginTx(ctx, &sql.TxOptions{ReadOnly: !write && e.postgres}) // SQLite's readers are read-only by their connection
	if err != nil {
		return 0, err
	}
	defer func() {
		if rb := tx.Rollback(); rb != nil && !errors.Is(rb, sql.ErrTxDone) && err == nil {
			err = rb
		}
	}()
	if each == nil {
		res, err := tx.ExecContext(ctx, text, args...)
		if err != nil {
			return 0, err
		}
		if affected, err = res.RowsAffected(); err != nil {
			return 0, err
		}
		return affected, tx.Commit()
	}
	rows, err := tx.QueryContext(ctx, text, args...)
	if err != nil {
		return 0, err
	}
	if err := errors.Join(scan(rows, each), rows.Close()); err != nil {
		return 0, err
	}
	return 0, tx.Commit()
}

// errEnough ends the reading of rows early, without failing.
var errEnough = errors.New("enough rows")

func scan(rows *sql.Rows, each func([]*sql.ColumnType, []any) error) error {
	columns, err := rows.ColumnTypes()
	if err != nil {
		return err
	}
	values := make([]any, len(columns))
	into := make([]any, len(columns))
	for i := range values {
		into[i] = &values[i]
	}
	for rows.Next() {
		if err := rows.Scan(into...); err != nil {
			return err
		}
		if err := each(columns, values); err != nil {
			if errors.Is(err, errEnough) {
				return nil
			}
			return err
		}
	}
	return rows.Err()
}

// translate turns a database's error into one for the caller: what to do, and nothing of the
// statement or the schema.
func translate(ctx context.Context, err error, write bool) error {
	var public *call.Error
	if err == nil || errors.As(err, &public) {
		return err
	}
	if ctx.Err() != nil {
		return call.AsError(ctx.Err())
	}
	constraint := call.Errorf(call.Failed, "the database refused the change: it would break one of its rules (a reference, a unique value, an allowed value); check the arguments").Because(err)
	away := call.Errorf(call.Unavailable, "the database cannot be used right now; nothing was changed; try again in a moment").Because(err)
	var pg *pgconn.PgError
	if errors.As(err, &pg) {
		switch {
		case strings.HasPrefix(pg.Code, "23"), pg.Code == "P0001":
			return constraint
		case strings.HasPrefix(pg.Code, "22"):
			return call.Errorf(call.Invalid, "an argument does not fit what the database expects: out of range or of the wrong form").Because(err)
		case pg.Code == "57014":
			return call.Errorf(call.Timeout, "the query took too long; ask for less, for example a shorter period").Because(err)
		case strings.HasPrefix(pg.Code, "08"), strings.HasPrefix(pg.Code, "53"), strings.HasPrefix(pg.Code, "57"), strings.HasPrefix(pg.Code, "40"):
			return away
		}
		return call.Errorf(call.Internal, "internal error").Because(err)
	}
	var lite *sqlite.Error
	if errors.As(err, &lite) {
		switch lite.Code() & 0xff { // primary result code
		case 19: // SQLITE_CONSTRAINT
			return constraint
		case 5, 6, 10, 13, 14: // BUSY, LOCKED, IOERR, FULL, CANTOPEN
			return away
		}
		return call.Errorf(call.Internal, "internal error").Because(err)
	}
	var connect *pgconn.ConnectError
	if errors.As(err, &connect) || errors.Is(err, driver.ErrBadConn) || pgconn.SafeToRetry(err) {
		return away
	}
	if write {
		return call.Errorf(call.OutcomeUnknown, "the connection to the database broke while it worked: the change may or may not have been made; look before trying again").Because(err)
	}
	var network net.Error
	if errors.As(err, &network) || errors.Is(err, io.ErrUnexpectedEOF) {
		return away
	}
	return call.Errorf(call.Internal, "internal error").Because(err)
}
