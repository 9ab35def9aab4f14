package postgres

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"newel.dev/newel/internal/audit"
	"newel.dev/newel/internal/durable"
	"newel.dev/newel/internal/guard/approve"
	"newel.dev/newel/internal/guard/effect"
	"newel.dev/newel/internal/secret"
	"newel.dev/newel/internal/task"
)

// classify says what an error means: of one unit, or of the way to the database.
func classify(err error) error {
	var pg *pgconn.PgError
	if errors.As(err, &pg) && (strings.HasPrefix(pg.Code, "22") || strings.HasPrefix(pg.Code, "23")) {
		return err
	}
	return fmt.Errorf("%w: %w", effect.ErrAway, err)
}

// commit implements durable.Staged, in two round trips: lock and read, then write and commit. Where the
// work is of a kind that depends on nothing but what this node wrote last, it is one: the server
// checks that this still stands, and if not, everything is done again.
func (db *DB) commit(ctx context.Context, work []*durable.Work, more func() []*durable.Work) error {
	ctx, cancel := context.WithTimeout(ctx, commitTimeout)
	defer cancel()
	conn, err := db.pool.Acquire(ctx)
	if err != nil {
		return classify(err)
	}
	defer conn.Release() // one that is not idle any more is closed by the pool
	if db.known.usable() {
		if ops, ok := db.known.recall(work); ok {
			err := db.commitKnown(ctx, conn, &work, ops, more)
			if !otherwise(err) {
				return err
			}
			db.known.doubt()
			durable.Again(work)
		}
	}
	for next := more(); len(next) > 0; next = more() {
		work = append(work, next...)
	}
	b, err := db.begin(ctx, conn, work)
	if err != nil {
		return classify(errors.Join(err, rollback(conn)))
	}
	for _, u := range work {
		b.Apply(u)
	}
	changed := b.Changed()
	if b.Empty() {
		if err := rollback(conn); err != nil {
			return classify(err)
		}
		return nil
	}
	token := rand.Text()
	durable.Committing(work)
	sent, err := db.store(ctx, conn, b, changed, token)
	return db.ended(ctx, conn, b, changed, token, sent, err)
}

// ended takes over what became of a commit with a token; sent says whether it may have reached the server.
func (db *DB) ended(ctx context.Context, conn *pgxpool.Conn, b *durable.Batch, changed []*effect.Operation, token string, sent bool, err error) error {
	if err == nil {
		db.known.learn(b, changed)
		return nil
	}
	db.known.forget()
	_ = rollback(conn) // if it cannot be rolled back, the server does it
	var pg *pgconn.PgError
	if !sent || errors.As(err, &pg) && pg.Code[:2] != "57" {
		return classify(err) // the server said no
	}
	// Nothing was heard of the commit: ask what became of it.
	if done, asked := db.committed(ctx, token); asked == nil && done {
		return nil
	}
	return classify(err)
}

// rollback ends a transaction whatever became of it; the caller's time may be over.
func rollback(conn *pgxpool.Conn) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	_, err := conn.Exec(ctx, "ROLLBACK")
	return err
}

// committed reports whether the commit with the token took place. It keeps asking until ctx ends: a
// transaction that is still being committed holds the lock of this node's row, and is waited for.
func (db *DB) committed(ctx context.Context, token string) (bool, error) {
	for {
		var last string
		err := db.pool.QueryRow(ctx, "SELECT last FROM newel_nodes WHERE id = $1 FOR UPDATE", db.node).Scan(&last)
		if err == nil || errors.Is(err, pgx.ErrNoRows) {
			return last == token, nil
		}
		t := time.NewTimer(100 * time.Millisecond)
		select {
		case <-ctx.Done():
			t.Stop()
			return false, err
		case <-t.C:
		}
	}
}

// selectOps reads operations; those of a node that is gone are held by nobody.
var selectOps = fmt.Sprintf(`SELECT o.id, o.scope, o.fingerprint, o.state, o.fence, o.holder,
	CASE WHEN o.state IN (%d, %d) AND (n.seen IS NULL OR n.seen < clock_timestamp() - interval '%d seconds') THEN 0 ELSE o.until END,
	o.round, o.ended, o.retain, o.idx, o.answer, o.undo, o.tenant, o.principal, o.server, o.tool, o.sent
	FROM newel_operations o LEFT JOIN newel_nodes n ON n.id = o.node `, effect.Reserved, effect.Dispatched, int(silent.Seconds()))

// begin locks the head of the tree and reads what the work names. Whoever has the lock writes alone,
// among all nodes: so nobody waits for anything else.
func (db *DB) begin(ctx context.Context, conn *pgxpool.Conn, work []*durable.Work) (*durable.Batch, error) {
	scopes, ids, peek := [][]byte{}, []string{}, false
	bindings, approvalIDs := [][]byte{}, []string{}
	taskIDs, taskScopes := []string{}, [][]byte{}
	for _, u := range work {
		if b := u.Binding(); b != nil {
			bindings = append(bindings, b)
		}
		if id := u.ApprovalID(); id != "" {
			approvalIDs = append(approvalIDs, id)
		}
		if s := u.Scope(); s != nil {
			scopes = append(scopes, s)
		} else if u.Complete != nil {
			ids = append(ids, u.Complete.ID)
		} else if id := u.ID(); id != "" {
			ids = append(ids, id) // our own, if this is done again
		} else if u.Task != nil {
			taskIDs, taskScopes = append(taskIDs, u.Task.ID), append(taskScopes, u.Task.Scope)
		}
		peek = peek || u.Peek != nil
	}
	var now, size int64
	var edge []byte
	var ops []effect.Operation
	collect := func(rows pgx.Rows) (err error) {
		more, err := pgx.CollectRows(rows, scan)
		ops = append(ops, more...)
		return err
	}
	var tasks []task.Record
	q := &pgx.Batch{}
	q.Queue("BEGIN ISOLATION LEVEL READ COMMITTED")
	q.Queue("SELECT size, edge, " + clock + " FROM newel_head WHERE id = 1 FOR UPDATE").QueryRow(func(row pgx.Row) error { return row.Scan(&size, &edge, &now) })
	if len(scopes) > 0 {
		q.Queue(selectOps+"WHERE o.scope = ANY($1)", scopes).Query(collect)
	}
	if len(ids) > 0 {
		q.Queue(selectOps+"WHERE o.id = ANY($1)", ids).Query(collect)
	}
	if len(taskIDs) > 0 {
		q.Queue(selectTasks+"WHERE t.id = ANY($1) OR t.scope = ANY($2)", taskIDs, taskScopes).Query(func(rows pgx.Rows) (err error) {
			tasks, err = pgx.CollectRows(rows, scanTask)
			return err
		})
	}
	var approvals []approve.Approval
	if len(bindings) > 0 || len(approvalIDs) > 0 {
		q.Queue(selectApprovals+"WHERE binding = ANY($1) OR id = ANY($2)", bindings, approvalIDs).Query(func(rows pgx.Rows) (err error) {
			approvals, err = pgx.CollectRows(rows, scanApproval)
			return err
		})
	}
	if err := conn.SendBatch(ctx, q).Close(); err != nil {
		return nil, err
	}
	e, err := audit.ParseEdge(size, edge)
	if err != nil {
		return nil, err
	}
	db.known.setClock(now)
	seen := map[string]bool{}
	loaded := ops[:0:0]
	for _, op := range ops {
		if !seen[op.ID] {
			seen[op.ID] = true
			loaded = append(loaded, op)
		}
	}
	b := durable.NewBatch(now, e, loaded, approvals)
	b.LoadTasks(tasks)
	return b, nil
}

const (
	addOps = `INSERT INTO newel_operations (id, scope, fingerprint, state, fence, holder, node, until, round, ended, retain, idx, answer, tenant, principal, server, tool, undo, sent)
	SELECT id, scope, fingerprint, state, fence, holder, $19, until, round, ended, retain, idx, answer, tenant, principal, server, tool, undo, sent FROM
	unnest($1::text[], $2::bytea[], $3::bytea[], $4::smallint[], $5::bigint[], $6::text[], $7::bigint[], $8::bytea[], $9::bigint[], $10::bigint[], $11::bigint[], $12::bytea[], $13::text[], $14::text[], $15::text[], $16::text[], $17::bytea[], $18::bigint[])
	AS u(id, scope, fingerprint, state, fence, holder, until, round, ended, retain, idx, answer, tenant, principal, server, tool, undo, sent)`
	// changeOps fails, and the transaction with it, if not all of them are there: division by zero.
	changeOps = `WITH changed AS (
	UPDATE newel_operations o SET state = u.state, fence = u.fence, holder = u.holder, node = $13, until = u.until, round = u.round, ended = u.ended, retain = u.retain, idx = u.idx, answer = u.answer, undo = u.undo, sent = u.sent
	FROM unnest($1::text[], $2::smallint[], $3::bigint[], $4::text[], $5::bigint[], $6::bytea[], $7::bigint[], $8::bigint[], $9::bigint[], $10::bytea[], $11::bytea[], $12::bigint[])
	AS u(id, state, fence, holder, until, round, ended, retain, idx, answer, undo, sent) WHERE o.id = u.id RETURNING 1)
	SELECT 1 / (count(*) = cardinality($1::text[]))::int FROM changed`
	divisionByZero = "22012"

	grow    = "UPDATE newel_head SET size = $1, edge = $2 WHERE id = 1"
	here    = "INSERT INTO newel_nodes VALUES ($1, clock_timestamp(), $2) ON CONFLICT (id) DO UPDATE SET seen = excluded.seen, last = excluded.last"
	putRows = `INSERT INTO newel_audit (idx, record, hashes, private) SELECT * FROM unnest($1::bigint[], $2::bytea[], $3::bytea[], $4::bytea[])`
)

// store writes a batch and commits. sent says whether the commit may have reached the server.
func (db *DB) store(ctx context.Context, conn *pgxpool.Conn, b *durable.Batch, changed []*effect.Operation, token string) (sent bool, err error) {
	q := &pgx.Batch{}
	edge, err := b.Edge.MarshalBinary()
	if err != nil {
		return false, err
	}
	if len(b.Removed) > 0 {
		q.Queue("DELETE FROM newel_operations WHERE id = ANY($1)", b.Removed)
	}
	var fresh, known []*effect.Operation
	for _, op := range changed {
		if b.IsNew(op) {
			fresh = append(fresh, op)
		} else {
			known = append(known, op)
		}
	}
	if len(fresh) > 0 {
		q.Queue(addOps, append(roomFor(sizeOf(fresh), columnsOf(fresh)), db.node)...)
	}
	if len(known) > 0 {
		q.Queue(changeOps, append(roomFor(sizeOf(known), stateOf(known)), db.node)...)
	}
	if len(b.Pruned) > 0 {
		q.Queue("DELETE FROM newel_operations WHERE "+pastRetention+" AND id = ANY($2)", int16(effect.Unknown), b.Pruned)
	}
	db.queueTasks(q, b)
	for _, a := range b.Approvals() {
		facts, err := json.Marshal(&a.Facts)
		if err != nil {
			return false, err
		}
		q.Queue(putApproval, a.ID, a.Binding, a.Tenant, a.Principal, int16(a.State), a.Until, a.Deadline, a.Ended, a.Operation, a.Round, a.Index, a.Args, facts)
	}
	if n := len(b.Rows); n > 0 {
		idx, record, hashes, private := make([]int64, n), make([][]byte, n), make([][]byte, n), make([][]byte, n)
		bytes := 0
		for i := range b.Rows {
			r := &b.Rows[i]
			bytes += len(r.Record) + len(r.Hashes) + len(r.Private) + perRow
			idx[i], record[i], hashes[i], private[i] = r.Index, r.Record, r.Hashes, r.Private
		}
		q.Queue(putRows, roomFor(bytes, []any{idx, record, hashes, private})...)
		q.Queue(grow, b.Edge.Size, edge)
	}
	for _, e := range b.Erased {
		q.Queue("UPDATE newel_audit SET private = $1 WHERE idx = ANY($2) AND length(private) > $3", e.Mark, e.Records, len(e.Mark))
	}
	q.Queue(here, db.node, token)
	q.Queue("COMMIT")
	return true, conn.SendBatch(ctx, q).Close()
}

// columnsOf turns operations into one array per column.
func columnsOf(ops []*effect.Operation) []any {
	n := len(ops)
	id, holder, tenant, principal, server, tool := make([]string, n), make([]string, n), make([]string, n), make([]string, n), make([]string, n), make([]string, n)
	scope, fingerprint, round, answer, undo := make([][]byte, n), make([][]byte, n), make([][]byte, n), make([][]byte, n), make([][]byte, n)
	state := make([]int16, n)
	fence, until, sent, ended, retain, idx := make([]int64, n), make([]int64, n), make([]int64, n), make([]int64, n), make([]int64, n), make([]int64, n)
	for i, op := range ops {
		id[i], scope[i], fingerprint[i], state[i], fence[i], holder[i] = op.ID, op.Scope, op.Fingerprint, int16(op.State), op.Fence, op.Holder
		until[i], round[i], ended[i], retain[i], idx[i], answer[i] = op.Until, op.Round, op.Ended, op.Retain, op.Index, op.Answer
		tenant[i], principal[i], server[i], tool[i], undo[i], sent[i] = op.Tenant, op.Principal, op.Server, op.Tool, op.Undo, op.Sent
	}
	return []any{id, scope, fingerprint, state, fence, holder, until, round, ended, retain, idx, answer, tenant, principal, server, tool, undo, sent}
}

// perRow is about what an encoded row takes beside its texts and bytes.
const perRow = 200

// sizeOf is about what operations take when they are encoded.
func sizeOf(ops []*effect.Operation) int {
	n := 0
	for _, op := range ops {
		n += len(op.ID) + len(op.Scope) + len(op.Fingerprint) + len(op.Holder) + len(op.Round) + len(op.Answer) + len(op.Undo) +
			len(op.Tenant) + len(op.Principal) + len(op.Server) + len(op.Tool) + perRow
	}
	return n
}

// stateOf turns what changes in operations into one array per column.
func stateOf(ops []*effect.Operation) []any {
	n := len(ops)
	id, holder := make([]string, n), make([]string, n)
	round, answer, undo := make([][]byte, n), make([][]byte, n), make([][]byte, n)
	state := make([]int16, n)
	fence, until, sent, ended, retain, idx := make([]int64, n), make([]int64, n), make([]int64, n), make([]int64, n), make([]int64, n), make([]int64, n)
	for i, op := range ops {
		id[i], state[i], fence[i], holder[i], until[i], round[i] = op.ID, int16(op.State), op.Fence, op.Holder, op.Until, op.Round
		ended[i], retain[i], idx[i], answer[i], undo[i], sent[i] = op.Ended, op.Retain, op.Index, op.Answer, op.Undo, op.Sent
	}
	return []any{id, state, fence, holder, until, round, ended, retain, idx, answer, undo, sent}
}

func scan(row pgx.CollectableRow) (op effect.Operation, err error) {
	var state int16
	err = row.Scan(&op.ID, &op.Scope, &op.Fingerprint, &state, &op.Fence, &op.Holder, &op.Until, &op.Round, &op.Ended, &op.Retain, &op.Index, &op.Answer, &op.Undo, &op.Tenant, &op.Principal, &op.Server, &op.Tool, &op.Sent)
	op.State = effect.State(state)
	return op, err
}

// find returns operations as they stand now.
func (db *DB) find(ctx context.Context, condition string, args ...any) ([]effect.Operation, error) {
	ctx, cancel := context.WithTimeout(ctx, commitTimeout) // a connection that says nothing does not end by itself
	defer cancel()
	var now int64
	var ops []effect.Operation
	q := &pgx.Batch{}
	q.Queue("SELECT " + clock).QueryRow(func(row pgx.Row) error { return row.Scan(&now) })
	q.Queue(selectOps+condition, args...).Query(func(rows pgx.Rows) (err error) {
		ops, err = pgx.CollectRows(rows, scan)
		return err
	})
	if err := db.pool.SendBatch(ctx, q).Close(); err != nil {
		return nil, err
	}
	for i := range ops {
		ops[i] = ops[i].At(now)
	}
	return ops, nil
}

// Find implements effect.Store.
func (db *DB) Find(ctx context.Context, scope []byte) (effect.Operation, error) {
	ops, err := db.find(ctx, "WHERE o.scope = $1", scope)
	if err != nil || len(ops) == 0 {
		return effect.Operation{}, err
	}
	return ops[0], nil
}

// Operation implements effect.Store.
func (db *DB) Operation(ctx context.Context, id string) (effect.Operation, error) {
	ops, err := db.find(ctx, "WHERE o.id = $1", id)
	if err != nil || len(ops) == 0 {
		return effect.Operation{}, err
	}
	return ops[0], nil
}

// Abandoned implements effect.Store.
func (db *DB) Abandoned(ctx context.Context, limit int) ([]effect.Operation, error) {
	ops, err := db.find(ctx, "WHERE o.ended = 0 ORDER BY o.until LIMIT $1", limit)
	if err != nil {
		return nil, err
	}
	out := ops[:0:0]
	for _, op := range ops {
		if op.Lease == 0 {
			out = append(out, op)
		}
	}
	return out, nil
}

// Head implements audit.Source.
func (db *DB) Head(ctx context.Context) (audit.Edge, error) { return (&Log{db.pool}).Head(ctx) }

// Read implements audit.Source.
func (db *DB) Read(ctx context.Context, from int64, limit int) ([]audit.Row, error) {
	return (&Log{db.pool}).Read(ctx, from, limit)
}

// A Log is the audit log of a database. It only reads.
type Log struct{ pool *pgxpool.Pool }

var _ audit.Source = (*Log)(nil)

// OpenLog connects to the audit log of a database.
func OpenLog(ctx context.Context, dsn secret.String) (*Log, error) {
	cfg, err := pgxpool.ParseConfig(dsn.Reveal())
	if err != nil {
		return nil, errBadDSN
	}
	cfg.ConnConfig.RuntimeParams["default_transaction_read_only"] = "on"
	cfg.ConnConfig.ConnectTimeout = openTimeout / 2
	pool, err := pgxpool.NewWithConfig(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("the state cannot be opened: %w", err)
	}
	return &Log{pool}, nil
}

// Close closes the connections.
func (l *Log) Close() error {
	l.pool.Close()
	return nil
}

// Head implements audit.Source.
func (l *Log) Head(ctx context.Context) (audit.Edge, error) {
	ctx, cancel := context.WithTimeout(ctx, logTimeout) // a connection that says nothing does not end by itself
	defer cancel()
	var size int64
	var edge []byte
	if err := l.pool.QueryRow(ctx, "SELECT size, edge FROM newel_head WHERE id = 1").Scan(&size, &edge); err != nil {
		return audit.Edge{}, err
	}
	return audit.ParseEdge(size, edge)
}

// Read implements audit.Source.
func (l *Log) Read(ctx context.Context, from int64, limit int) ([]audit.Row, error) {
	ctx, cancel := context.WithTimeout(ctx, logTimeout) // a connection that says nothing does not end by itself
	defer cancel()
	rows, err := l.pool.Query(ctx, "SELECT idx, record, hashes, private FROM newel_audit WHERE idx >= $1 ORDER BY idx LIMIT $2", from, limit)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, func(row pgx.CollectableRow) (r audit.Row, err error) {
		err = row.Scan(&r.Index, &r.Record, &r.Hashes, &r.Private)
		return r, err
	})
}
