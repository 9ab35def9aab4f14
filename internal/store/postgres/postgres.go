// Package postgres keeps operations and the audit log in a database: the engine of many nodes.
//
// Start reading at [Open], then [DB.Run]. commit.go is where many callers' work becomes one
// transaction; assumed.go is the short way of it, which wire.go sends past the driver.
//
// It promises: what was acknowledged was committed by the server, with synchronous_commit; the
// nodes of one database write one tree without gaps, because each transaction begins with the
// lock of the tree's head; a commit of which nothing was heard is looked up before anybody is
// told. Time is that of the database, or counted on from there and within a second of it; the
// database checks that. What a node remembers (known.go) saves questions, and decides nothing: each
// commit checks that it still stands. A lease ends at its time, or when its node has not been
// heard of for 15 seconds. A database that does not answer refuses new work.
package postgres

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"newel.dev/newel/internal/audit"
	"newel.dev/newel/internal/durable"
	"newel.dev/newel/internal/faultpoint"
	"newel.dev/newel/internal/guard/approve"
	"newel.dev/newel/internal/guard/effect"
	"newel.dev/newel/internal/secret"
	"newel.dev/newel/internal/task"
)

// A DB is one node's way to the store. It is safe for concurrent use.
type DB struct {
	*durable.Writer
	pool  *pgxpool.Pool
	node  string
	known known          // of the one writer
	wire  wire           // of the one writer
	batch *durable.Batch // of the one writer, for what is written on what is remembered
}

var (
	_ effect.Store  = (*DB)(nil)
	_ approve.Store = (*DB)(nil)
	_ task.Store    = (*DB)(nil)
	_ audit.Eraser  = (*DB)(nil)
)

const (
	openTimeout   = 10 * time.Second
	commitTimeout = 10 * time.Second // and of reading
	logTimeout    = time.Minute      // of a piece of the audit log
	pruneTimeout  = time.Minute
	beatEvery     = 3 * time.Second
	silent        = 15 * time.Second // a node that says nothing for so long is gone
	pruneEvery    = 10 * time.Minute
	pruneMost     = 500 // operations in one transaction
	connections   = 8
)

// errBadDSN stands for the parser's own text, which may hold the password.
var errBadDSN = errors.New("the dsn is not one of PostgreSQL; write postgres://user:password@host:5432/database")

// Open connects to a database and brings its schema up to date. key has to be the one that the
// first node used. The tables are in the first schema of the search path and begin with newel_.
func Open(ctx context.Context, dsn secret.String, key secret.Key) (_ *DB, err error) {
	cfg, err := pgxpool.ParseConfig(dsn.Reveal())
	if err != nil {
		return nil, errBadDSN
	}
	params := cfg.ConnConfig.RuntimeParams
	params["application_name"] = "newel"
	params["TimeZone"] = "UTC"
	params["synchronous_commit"] = "on"
	params["jit"] = "off"
	for _, way := range []string{"enable_seqscan", "enable_hashjoin", "enable_mergejoin"} {
		params[way] = "off" // statements are planned while tables are small, and stay so: every one of ours has an index
	}
	params["statement_timeout"] = strconv.FormatInt(commitTimeout.Milliseconds(), 10)
	params["idle_in_transaction_session_timeout"] = strconv.FormatInt(silent.Milliseconds(), 10) // a paused node does not hold the head for ever
	cfg.ConnConfig.ConnectTimeout = openTimeout / 2
	cfg.AfterConnect = encodeSized
	cfg.MaxConns = max(cfg.MaxConns, connections)
	ctx, cancel := context.WithTimeout(ctx, openTimeout)
	defer cancel()
	where := fmt.Sprintf("%s:%d", cfg.ConnConfig.Host, cfg.ConnConfig.Port)
	db := &DB{node: rand.Text(), batch: durable.NewBatch(0, audit.Edge{}, nil, nil)}
	if db.pool, err = pgxpool.NewWithConfig(ctx, cfg); err != nil {
		return nil, fmt.Errorf("the state at %s cannot be opened: %w", where, err)
	}
	if err = db.prepare(ctx, key); err != nil {
		db.pool.Close()
		return nil, fmt.Errorf("the state at %s cannot be opened: %w", where, err)
	}
	db.Writer = durable.NewStaged(db.commit)
	return db, nil
}

// migrations bring the schema from their index to the next.
var migrations = []string{`
CREATE TABLE newel_head (id int PRIMARY KEY CHECK (id = 1), size bigint NOT NULL, edge bytea NOT NULL);
INSERT INTO newel_head VALUES (1, 0, '');
CREATE TABLE newel_audit (idx bigint PRIMARY KEY, record bytea NOT NULL, hashes bytea NOT NULL, private bytea);
CREATE TABLE newel_nodes (id text PRIMARY KEY, seen timestamptz NOT NULL, last text NOT NULL);
CREATE TABLE newel_operations (
	id text PRIMARY KEY, scope bytea UNIQUE, fingerprint bytea NOT NULL, state smallint NOT NULL, fence bigint NOT NULL, holder text NOT NULL, node text NOT NULL,
	until bigint NOT NULL, round bytea, ended bigint NOT NULL, retain bigint NOT NULL, idx bigint NOT NULL, answer bytea,
	tenant text NOT NULL, principal text NOT NULL, server text NOT NULL, tool text NOT NULL);
CREATE INDEX newel_operations_live ON newel_operations (until) WHERE ended = 0;
CREATE INDEX newel_operations_ended ON newel_operations (ended) WHERE ended > 0;
`, `
ALTER TABLE newel_operations ADD COLUMN undo bytea;
CREATE TABLE newel_approvals (
	id text PRIMARY KEY, binding bytea UNIQUE, tenant text NOT NULL, principal text NOT NULL, state smallint NOT NULL, until bigint NOT NULL,
	deadline bigint NOT NULL, ended bigint NOT NULL, operation text NOT NULL, round bytea, idx bigint NOT NULL, args bytea, facts bytea NOT NULL);
CREATE INDEX newel_approvals_state ON newel_approvals (state, tenant, principal);
CREATE INDEX newel_approvals_ended ON newel_approvals (ended) WHERE ended > 0;
`, `
CREATE TABLE newel_tasks (
	id text COLLATE "C" PRIMARY KEY, scope bytea UNIQUE, print bytea NOT NULL, owner bytea NOT NULL, state smallint NOT NULL, version bigint NOT NULL, holder text NOT NULL,
	node text NOT NULL, until bigint NOT NULL, created bigint NOT NULL, updated bigint NOT NULL, expires bigint NOT NULL, request bytea NOT NULL, notes bytea, answer bytea,
	tenant text NOT NULL, principal text NOT NULL, server text NOT NULL, tool text NOT NULL);
CREATE INDEX newel_tasks_open ON newel_tasks (id) WHERE state < 4;
CREATE INDEX newel_tasks_mine ON newel_tasks (owner, id);
CREATE INDEX newel_tasks_busy ON newel_tasks (owner) WHERE state < 4;
CREATE INDEX newel_tasks_ended ON newel_tasks (expires) WHERE state >= 4;
`, `
ALTER TABLE newel_operations ADD COLUMN sent bigint NOT NULL DEFAULT 0;
`}

// migrationLock keeps nodes that start together from migrating together.
const migrationLock = 0x6e6577656c // "newel"

// prepare migrates, one version a transaction, checks the key and enters this node.
func (db *DB) prepare(ctx context.Context, key secret.Key) error {
	check, err := key.Derive("newel key check")
	if err != nil {
		return err
	}
	mine := hex.EncodeToString(check[:8])
	for done := false; !done; {
		err := pgx.BeginFunc(ctx, db.pool, func(tx pgx.Tx) error {
			if _, err := tx.Exec(ctx, "SELECT pg_advisory_xact_lock($1)", int64(migrationLock)); err != nil {
				return err
			}
			if _, err := tx.Exec(ctx, "CREATE TABLE IF NOT EXISTS newel_meta (key text PRIMARY KEY, value text NOT NULL)"); err != nil {
				return err
			}
			found, err := schemaOf(ctx, tx)
			if err != nil {
				return err
			}
			if found >= durable.Schema {
				done = true
				return nil
			}
			if _, err := tx.Exec(ctx, migrations[found]); err != nil {
				return fmt.Errorf("schema %d: %w", found+1, err)
			}
			faultpoint.Reached(faultpoint.Migrating)
			_, err = tx.Exec(ctx, "INSERT INTO newel_meta VALUES ('schema', $1) ON CONFLICT (key) DO UPDATE SET value = excluded.value", strconv.Itoa(found+1))
			return err
		})
		if err != nil {
			return err
		}
	}
	if _, err := db.pool.Exec(ctx, "INSERT INTO newel_meta VALUES ('key', $1) ON CONFLICT DO NOTHING", mine); err != nil {
		return err
	}
	var found string
	if err := db.pool.QueryRow(ctx, "SELECT value FROM newel_meta WHERE key = 'key'").Scan(&found); err != nil {
		return err
	}
	if found != mine {
		return errors.New("it was made with another key; all nodes need the same key file")
	}
	_, err = db.pool.Exec(ctx, "INSERT INTO newel_nodes VALUES ($1, clock_timestamp(), '')", db.node)
	return err
}

func schemaOf(ctx context.Context, tx pgx.Tx) (int, error) {
	text := "0"
	err := tx.QueryRow(ctx, "SELECT value FROM newel_meta WHERE key = 'schema'").Scan(&text)
	if err != nil && !errors.Is(err, pgx.ErrNoRows) {
		return 0, err
	}
	found, err := strconv.Atoi(text)
	if err != nil {
		return 0, fmt.Errorf("its schema is %q", text)
	}
	return found, durable.CheckSchema(found)
}

// Close leaves: what this node holds is free at once.
func (db *DB) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), openTimeout)
	defer cancel()
	_, err := db.pool.Exec(ctx, "DELETE FROM newel_nodes WHERE id = $1", db.node)
	db.pool.Close()
	return err
}

// Run says that this node is there, and forgets operations past their retention, until ctx ends.
// The database going away is no reason to end.
func (db *DB) Run(ctx context.Context) error {
	beat := time.NewTicker(beatEvery)
	defer beat.Stop()
	pruning := make(chan struct{})
	defer func() { <-pruning }()
	go func() { // by itself: a node whose beat waits for it is taken for gone
		defer close(pruning)
		prune := time.NewTicker(pruneEvery)
		defer prune.Stop()
		for { // at once, too: nodes that live for less than the interval would never do it
			limited, cancel := context.WithTimeout(ctx, pruneTimeout)
			_, _ = db.Prune(limited) // the next one does what is left
			cancel()
			select {
			case <-ctx.Done():
				return
			case <-db.Failed():
				return
			case <-prune.C:
			}
		}
	}()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-db.Failed():
			return fmt.Errorf("the state in PostgreSQL: %w", db.Fatal())
		case <-beat.C:
			_ = db.beat(ctx) // what this means, others say: they take over
		}
	}
}

func (db *DB) beat(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, beatEvery)
	defer cancel()
	q := &pgx.Batch{}
	// Nobody was heard of in the future: the clock was set back. Who is gone would hold what it has
	// until the clock is there again.
	q.Queue("UPDATE newel_nodes SET seen = clock_timestamp() WHERE seen > clock_timestamp()")
	q.Queue("INSERT INTO newel_nodes VALUES ($1, clock_timestamp(), '') ON CONFLICT (id) DO UPDATE SET seen = clock_timestamp()", db.node)
	return db.pool.SendBatch(ctx, q).Close()
}

// Prune deletes operations and tasks past their time, and nodes that have long been gone, and returns
// how many operations and tasks there were.
func (db *DB) Prune(ctx context.Context) (int, error) {
	if _, err := db.pool.Exec(ctx, "DELETE FROM newel_nodes WHERE seen < clock_timestamp() - interval '1 day' AND id <> $1", db.node); err != nil {
		return 0, err
	}
	if _, err := db.pool.Exec(ctx, "DELETE FROM newel_approvals WHERE ended > 0 AND ended < "+clock+" - $1", approve.Retention.Microseconds()); err != nil {
		return 0, err
	}
	total, err := db.pruneTasks(ctx)
	if err != nil {
		return total, err
	}
	for {
		rows, err := db.pool.Query(ctx, "SELECT id FROM newel_operations WHERE "+pastRetention+" ORDER BY ended LIMIT $2", int16(effect.Unknown), pruneMost)
		if err != nil {
			return total, err
		}
		ids, err := pgx.CollectRows(rows, pgx.RowTo[string])
		if err != nil || len(ids) == 0 {
			return total, err
		}
		if err := db.Do(ctx, &durable.Work{Prune: ids}); err != nil {
			return total, err
		}
		total += len(ids)
	}
}

const (
	clock         = "(extract(epoch FROM clock_timestamp()) * 1000000)::bigint"
	pastRetention = "ended > 0 AND (state <> $1 OR scope IS NULL) AND ended + retain < " + clock
)
