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

// portion is how much work is sent while more is about to come: less, and what each statement costs by
// itself counts; more, and the server waits for callers that could be at work meanwhile.
const portion = 32

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
	for stage, waits := *work, 0; len(stage) > 0; {
		for _, u := range stage {
			t.batch.Apply(u)
		}
		if waits += len(stage); waits >= portion {
			waits = 0
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
		w.bind(stHead, 3)
		w.bigint(t.db.known.edge.Size)
		w.bytea(edgeOf(&t.db.known.edge))
		w.bigint(b.Now)
		w.execute()
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
		w.beginCopy(stAdd)
		for _, op := range fresh {
			w.operation(op, t.db.node)
		}
		w.endCopy()
	}
	if len(known) > 0 {
		w.outcomes(known)
	}
	if len(b.Rows) > 0 {
		w.beginCopy(stRows)
		for i := range b.Rows {
			r := &b.Rows[i]
			w.int16(4)
			w.bigint(r.Index)
			w.bytea(r.Record)
			w.bytea(r.Hashes)
			w.bytea(r.Private)
		}
		w.endCopy()
	}
	b.Written()
}

// end puts the rest into the buffer.
func (t *transaction) end(token string) {
	w, edge := &t.db.wire, &t.batch.Edge
	w.bind(stGrow, 2)
	w.bigint(edge.Size)
	w.bytea(edgeOf(edge))
	w.execute()
	w.bind(stHere, 2)
	w.text(t.db.node)
	w.text(token)
	w.execute()
	w.run(stCommit)
}

func edgeOf(e *audit.Edge) []byte {
	b, _ := e.MarshalBinary() // it never fails
	return b
}

// operation writes a row of stAdd.
func (w *wire) operation(op *effect.Operation, node string) {
	w.int16(19)
	w.text(op.ID)
	w.bytea(op.Scope)
	w.bytea(op.Fingerprint)
	w.smallint(int(op.State))
	w.bigint(op.Fence)
	w.text(op.Holder)
	w.text(node)
	w.bigint(op.Until)
	w.bytea(op.Round)
	w.bigint(op.Ended)
	w.bigint(op.Retain)
	w.bigint(op.Index)
	w.bytea(op.Answer)
	w.text(op.Tenant)
	w.text(op.Principal)
	w.text(op.Server)
	w.text(op.Tool)
	w.bytea(op.Undo)
	w.bigint(op.Sent)
}

// outcomes writes stEnd.
func (w *wire) outcomes(ops []*effect.Operation) {
	w.bind(stEnd, 9)
	w.array(pgtype.TextOID, len(ops), func(i int) { w.text(ops[i].ID) })
	w.array(pgtype.Int8OID, len(ops), func(i int) { w.bigint(ops[i].Fence) })
	w.array(pgtype.Int2OID, len(ops), func(i int) { w.smallint(int(ops[i].State)) })
	w.array(pgtype.Int8OID, len(ops), func(i int) { w.bigint(ops[i].Until) })
	w.array(pgtype.ByteaOID, len(ops), func(i int) { w.bytea(ops[i].Round) })
	w.array(pgtype.Int8OID, len(ops), func(i int) { w.bigint(ops[i].Ended) })
	w.array(pgtype.Int8OID, len(ops), func(i int) { w.bigint(ops[i].Index) })
	w.array(pgtype.ByteaOID, len(ops), func(i int) { w.bytea(ops[i].Answer) })
	w.array(pgtype.ByteaOID, len(ops), func(i int) { w.bytea(ops[i].Undo) })
	w.execute()
}
