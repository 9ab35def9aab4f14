package postgres

import (
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgtype"

	"newel.dev/newel/internal/durable"
	"newel.dev/newel/internal/guard/effect"
)

// The statements that write on what a node remembers; a connection prepares them once.
const (
	stBegin, stHead, stAdd, stEnd, stRows, stHere, stCommit = "newel_begin", "newel_head", "newel_add", "newel_end", "newel_rows", "newel_here", "newel_commit"

	prepared = "newel" // what a connection is marked with that has them
)

var statements = map[string]string{
	stBegin: "BEGIN ISOLATION LEVEL READ COMMITTED",
	// It locks the head of the tree like begin. It fails if the head is not the one that this node wrote
	// last, or the clock is not about what this node takes it for: division by zero.
	stHead: `WITH head AS (
	UPDATE newel_head SET size = $1, edge = $2 WHERE id = 1 AND size = $3 AND edge = $4 AND abs(` + clock + ` - $5) < 1000000 RETURNING 1)
	SELECT 1 / count(*) FROM head`,
	stAdd: `COPY newel_operations (id, scope, fingerprint, state, fence, holder, node, until, round, ended, retain, idx, answer, tenant, principal, server, tool, undo)
	FROM STDIN (FORMAT binary)`,
	// It fails, too, if one of them does not stand as this node left it. It sets all that an outcome changes.
	stEnd: fmt.Sprintf(`WITH changed AS (
	UPDATE newel_operations o SET state = u.state, until = u.until, round = u.round, ended = u.ended, idx = u.idx, answer = u.answer, undo = u.undo
	FROM unnest($1::text[], $2::bigint[], $3::smallint[], $4::bigint[], $5::bytea[], $6::bigint[], $7::bigint[], $8::bytea[], $9::bytea[])
	AS u(id, fence, state, until, round, ended, idx, answer, undo) WHERE o.id = u.id AND o.state = %d AND o.fence = u.fence RETURNING 1)
	SELECT 1 / (count(*) = cardinality($1::text[]))::int FROM changed`, effect.Dispatched),
	stRows:   "COPY newel_audit (idx, record, hashes, private) FROM STDIN (FORMAT binary)",
	stHere:   here,
	stCommit: "COMMIT",
}

// storeKnown writes a batch that is what this node remembers, and commits, in one round trip. sent says
// whether the commit may have reached the server.
func (db *DB) storeKnown(ctx context.Context, conn *pgconn.PgConn, b *durable.Batch, changed []*effect.Operation, token string) (sent bool, err error) {
	if conn.CustomData()[prepared] == nil {
		for name, text := range statements {
			if _, err := conn.Prepare(ctx, name, text, nil); err != nil {
				return false, errors.Join(err, conn.Close(ctx)) // it has some of them, and could not get them again
			}
		}
		conn.CustomData()[prepared] = true
	}
	if err := db.encode(b, changed, token); err != nil {
		return false, err
	}
	return true, db.wire.send(ctx, conn)
}

// encode puts all that storeKnown sends into the buffer.
func (db *DB) encode(b *durable.Batch, changed []*effect.Operation, token string) error {
	edge, err := b.Edge.MarshalBinary()
	if err != nil {
		return err
	}
	before, err := db.known.edge.MarshalBinary()
	if err != nil {
		return err
	}
	w := &db.wire
	w.reset()
	w.run(stBegin)
	w.bind(stHead, 5)
	w.bigint(b.Edge.Size)
	w.bytea(edge)
	w.bigint(db.known.edge.Size)
	w.bytea(before)
	w.bigint(b.Now)
	w.execute()
	var fresh, known []*effect.Operation
	for _, op := range changed {
		if b.IsNew(op) {
			fresh = append(fresh, op)
		} else {
			known = append(known, op)
		}
	}
	if len(fresh) > 0 {
		w.beginCopy(stAdd)
		for _, op := range fresh {
			w.operation(op, db.node)
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
	w.bind(stHere, 2)
	w.text(db.node)
	w.text(token)
	w.execute()
	w.run(stCommit)
	return nil
}

// operation writes a row of stAdd.
func (w *wire) operation(op *effect.Operation, node string) {
	w.int16(18)
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
