package postgres

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgtype"
	"github.com/jackc/pgx/v5/pgxpool"

	"newel.dev/newel/internal/audit"
	"newel.dev/newel/internal/durable"
	"newel.dev/newel/internal/guard/effect"
)

// The statements that write on what a node remembers; a connection prepares them once.
const (
	stBegin, stHead, stAdd, stEnd, stRows, stGrow, stHere, stCommit = "newel_begin", "newel_head", "newel_add", "newel_end", "newel_rows", "newel_grow", "newel_here", "newel_commit"

	prepared = "newel" // what a connection is marked with that has them
)

var statements = map[string]string{
	stBegin: "BEGIN ISOLATION LEVEL READ COMMITTED",
	// It locks the head of the tree like begin. It fails if the head is not the one that this node wrote
	// last, or the clock is not about what this node takes it for: division by zero.
	stHead: "SELECT 1 / count(*) FROM (SELECT FROM newel_head WHERE id = 1 AND size = $1 AND edge = $2 AND abs(" + clock + " - $3) < 1000000 FOR UPDATE) AS head",
	stAdd: `COPY newel_operations (id, scope, fingerprint, state, fence, holder, node, until, round, ended, retain, idx, answer, tenant, principal, server, tool, undo, sent)
	FROM STDIN (FORMAT binary)`,
	// It fails, too, if one of them does not stand as this node left it. It sets all that an outcome changes.
	stEnd: fmt.Sprintf(`WITH changed AS (
	UPDATE newel_operations o SET state = u.state, until = u.until, round = u.round, ended = u.ended, idx = u.idx, answer = u.answer, undo = u.undo
	FROM unnest($1::text[], $2::bigint[], $3::smallint[], $4::bigint[], $5::bytea[], $6::bigint[], $7::bigint[], $8::bytea[], $9::bytea[])
	AS u(id, fence, state, until, round, ended, idx, answer, undo) WHERE o.id = u.id AND o.state = %d AND o.fence = u.fence RETURNING 1)
	SELECT 1 / (count(*) = cardinality($1::text[]))::int FROM changed`, effect.Dispatched),
	stRows:   "COPY newel_audit (idx, record, hashes, private) FROM STDIN (FORMAT binary)",
	stGrow:   grow,
	stHere:   here,
	stCommit: "COMMIT",
}

// errOtherwise says that something is not as this node remembers, or that it does not remember it.
var errOtherwise = errors.New("something stands otherwise")

// otherwise reports whether work has to be done again, by asking the server first.
func otherwise(err error) bool {
	var pg *pgconn.PgError
	return errors.Is(err, errOtherwise) || errors.As(err, &pg) && (pg.Code == divisionByZero || pg.Code[:2] == "23")
}

// A transaction is what is written on what this node remembers, without waiting for any answer but the
// last: the server is at work on the first part of it while callers bring the next.
type transaction struct {
	db      *DB
	conn    *pgconn.PgConn
	batch   *durable.Batch
	begun   bool
	changed []*effect.Operation
}

// commitKnown does the work, which changes ops, and what more adds to it. If something stands otherwise
// (see otherwise), nothing of it was done.
func (db *DB) commitKnown(ctx context.Context, conn *pgxpool.Conn, work *[]*durable.Work, ops []effect.Operation, more func() []*durable.Work) error {
	t := transaction{db: db, conn: conn.Conn().PgConn(), batch: db.batch}
	t.batch.Reset(db.known.edge.Clone())
	t.batch.Now = db.known.now()
	t.batch.Load(ops, nil)
	if err := t.prepare(ctx); err != nil {
		return classify(err)
	}
	db.wire.clear()
	defer db.wire.giveUp(t.conn) // nothing is owed, unless something here panics
	for stage := *work; len(stage) > 0; {
		for _, u := range stage {
			t.batch.Apply(u)
		}
		if len(stage) >= durable.Stage { // more are about to come
			t.write()
			if err := db.wire.flush(ctx, t.conn); err != nil {
				return db.ended(ctx, conn, t.batch, nil, "", false, err)
			}
		}
		if stage = more(); len(stage) == 0 {
			break
		}
		*work = append(*work, stage...)
		named, ok := db.known.recall(stage)
		if !ok {
			err := db.wire.finish(t.conn)
			return db.ended(ctx, conn, t.batch, nil, "", false, errors.Join(errOtherwise, err))
		}
		t.batch.Load(named, nil)
	}
	t.write()
	if !t.begun {
		return nil
	}
	token := rand.Text()
	t.end(token)
	durable.Committing(*work)
	err := db.wire.flush(ctx, t.conn)
	return db.ended(ctx, conn, t.batch, t.changed, token, true, errors.Join(err, db.wire.finish(t.conn)))
}

// prepare has the connection know the statements, and be ready for what is sent past the driver.
func (t *transaction) prepare(ctx context.Context) error {
	if t.conn.CustomData()[prepared] != nil {
		return t.conn.SyncConn(ctx)
	}
	for name, text := range statements {
		if _, err := t.conn.Prepare(ctx, name, text, nil); err != nil {
			return errors.Join(err, t.conn.Close(ctx)) // it has some of them, and could not get them again
		}
	}
	t.conn.CustomData()[prepared] = true
	return t.conn.SyncConn(ctx)
}

// write puts what the batch has to write into the buffer.
func (t *transaction) write() {
	b, w := t.batch, &t.db.wire
	if b.Empty() {
		return
	}
	if !t.begun {
		t.begun = true
		w.run(stBegin)
		w.run(stHead, number(t.db.known.edge.Size), edgeOf(&t.db.known.edge), number(b.Now))
	}
	var fresh, known []*effect.Operation
	for _, op := range b.Changed() {
		t.changed = append(t.changed, op)
		if b.IsNew(op) {
			fresh = append(fresh, op)
		} else {
			known = append(known, op)
		}
	}
	if len(fresh) > 0 {
		r := w.rows()
		for _, op := range fresh {
			r = r.operation(op, t.db.node)
		}
		w.copy(stAdd, r)
	}
	if len(known) > 0 {
		w.outcomes(known)
	}
	if len(b.Rows) > 0 {
		r := w.rows()
		for i := range b.Rows {
			one := &b.Rows[i]
			r = r.int16(4).bigint(one.Index).bytea(one.Record).bytea(one.Hashes).bytea(one.Private)
		}
		w.copy(stRows, r)
	}
	b.Written()
}

// end puts the rest into the buffer.
func (t *transaction) end(token string) {
	w, edge := &t.db.wire, &t.batch.Edge
	w.run(stGrow, number(edge.Size), edgeOf(edge))
	w.run(stHere, []byte(t.db.node), []byte(token))
	w.run(stCommit)
}

func edgeOf(e *audit.Edge) []byte {
	b, _ := e.MarshalBinary() // it never fails
	return b
}

// operation is a row of stAdd.
func (r rows) operation(op *effect.Operation, node string) rows {
	r = r.int16(19).text(op.ID).bytea(op.Scope).bytea(op.Fingerprint).smallint(int(op.State)).bigint(op.Fence).text(op.Holder).text(node)
	r = r.bigint(op.Until).bytea(op.Round).bigint(op.Ended).bigint(op.Retain).bigint(op.Index).bytea(op.Answer)
	return r.text(op.Tenant).text(op.Principal).text(op.Server).text(op.Tool).bytea(op.Undo).bigint(op.Sent)
}

// outcomes has stEnd run.
func (w *wire) outcomes(ops []*effect.Operation) {
	n := len(ops)
	w.run(stEnd,
		array(pgtype.TextOID, n, func(r rows, i int) rows { return r.text(ops[i].ID) }),
		array(pgtype.Int8OID, n, func(r rows, i int) rows { return r.bigint(ops[i].Fence) }),
		array(pgtype.Int2OID, n, func(r rows, i int) rows { return r.smallint(int(ops[i].State)) }),
		array(pgtype.Int8OID, n, func(r rows, i int) rows { return r.bigint(ops[i].Until) }),
		array(pgtype.ByteaOID, n, func(r rows, i int) rows { return r.bytea(ops[i].Round) }),
		array(pgtype.Int8OID, n, func(r rows, i int) rows { return r.bigint(ops[i].Ended) }),
		array(pgtype.Int8OID, n, func(r rows, i int) rows { return r.bigint(ops[i].Index) }),
		array(pgtype.ByteaOID, n, func(r rows, i int) rows { return r.bytea(ops[i].Answer) }),
		array(pgtype.ByteaOID, n, func(r rows, i int) rows { return r.bytea(ops[i].Undo) }))
}
