package postgres

import (
	"context"
	"encoding/binary"
	"errors"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"
	"github.com/jackc/pgx/v5/pgtype"
)

// A wire collects messages to the server (PostgreSQL's protocol 3.0, extended query and COPY) in one
// buffer that is used again for the next commit: what many calls write is encoded once, and copied
// nowhere. The zero value is empty. It is used by one goroutine at a time.
type wire struct {
	buf []byte
	at  int // of the length of the message that is being written

	owed int // answers to what was flushed
}

// maxWire bounds the buffer that is kept, in bytes.
const maxWire = 4 << 20

func (w *wire) clear() {
	if cap(w.buf) > maxWire {
		w.buf = nil
	}
	w.buf = w.buf[:0]
}

func (w *wire) int16(v int)   { w.buf = binary.BigEndian.AppendUint16(w.buf, uint16(v)) } //nolint:gosec // small numbers, or -1
func (w *wire) int32(v int)   { w.buf = binary.BigEndian.AppendUint32(w.buf, uint32(v)) } //nolint:gosec // lengths of what is in memory, or -1
func (w *wire) int64(v int64) { w.buf = binary.BigEndian.AppendUint64(w.buf, uint64(v)) } //nolint:gosec // the same bits
func (w *wire) name(s string) { w.buf = append(append(w.buf, s...), 0) }

func (w *wire) message(kind byte) {
	w.buf = append(w.buf, kind)
	w.at = len(w.buf)
	w.int32(0)
}

func (w *wire) end() {
	binary.BigEndian.PutUint32(w.buf[w.at:], uint32(len(w.buf)-w.at)) //nolint:gosec // the server refuses more than a GiB
}

// bind begins the arguments of a prepared statement; so many fields follow.
func (w *wire) bind(statement string, fields int) {
	w.message('B')
	w.name("") // of the portal
	w.name(statement)
	w.int16(1)
	w.int16(pgtype.BinaryFormatCode) // of all of them
	w.int16(fields)
}

// execute ends the arguments and has the statement run.
func (w *wire) execute() {
	w.int16(0) // results as text
	w.end()
	w.message('E')
	w.name("")
	w.int32(0) // all rows
	w.end()
}

// run has a statement without arguments run.
func (w *wire) run(statement string) {
	w.bind(statement, 0)
	w.execute()
}

// beginCopy has a prepared COPY run; rows follow.
func (w *wire) beginCopy(statement string) {
	w.run(statement)
	w.message('d')
	w.buf = append(w.buf, "PGCOPY\n\xff\r\n\x00"...)
	w.int32(0) // no flags
	w.int32(0) // no more header
}

func (w *wire) endCopy() {
	w.int16(-1)
	w.end()
	w.message('c')
	w.end()
}

// The fields of statements and rows.

func (w *wire) bigint(v int64) {
	w.int32(8)
	w.int64(v)
}

func (w *wire) smallint(v int) {
	w.int32(2)
	w.int16(v)
}

func (w *wire) text(s string) {
	w.int32(len(s))
	w.buf = append(w.buf, s...)
}

// bytea writes NULL for nil.
func (w *wire) bytea(b []byte) {
	if b == nil {
		w.int32(-1)
		return
	}
	w.int32(len(b))
	w.buf = append(w.buf, b...)
}

// array writes n elements of a type, at least one.
func (w *wire) array(oid, n int, element func(i int)) {
	at := len(w.buf)
	w.int32(0) // its length
	w.int32(1) // one dimension
	w.int32(1) // with NULLs
	w.int32(oid)
	w.int32(n)
	w.int32(1) // its first index
	for i := range n {
		element(i)
	}
	binary.BigEndian.PutUint32(w.buf[at:], uint32(len(w.buf)-at-4)) //nolint:gosec // the server refuses more than a GiB
}

// flush sends what is in the buffer, on a connection that was synced before the first time, and waits for
// no answer. It ends with a Sync: from there on the server counts how long it hears nothing, and a node
// that stands still does not hold its transaction for ever. If it goes wrong, the connection is closed.
func (w *wire) flush(ctx context.Context, conn *pgconn.PgConn) error {
	if len(w.buf) == 0 {
		return nil
	}
	w.message('S')
	w.end()
	way := conn.Conn()
	deadline, _ := ctx.Deadline()
	err := way.SetDeadline(deadline)
	if err == nil {
		_, err = way.Write(w.buf)
	}
	w.clear()
	w.owed++
	if err != nil {
		w.giveUp(conn)
	}
	return err
}

// finish waits until the server has done all that was sent, and returns the first error that it says. If
// anything else goes wrong, the connection is closed.
func (w *wire) finish(conn *pgconn.PgConn) (first error) {
	for w.owed > 0 {
		m, err := conn.ReceiveMessage(context.Background()) // the connection has the deadline
		if err != nil {
			w.giveUp(conn)
			return errors.Join(first, err)
		}
		switch m := m.(type) {
		case *pgproto3.ErrorResponse:
			if first == nil {
				first = pgconn.ErrorResponseToPgError(m)
			}
		case *pgproto3.ReadyForQuery:
			w.owed--
		}
	}
	return errors.Join(first, conn.Conn().SetDeadline(time.Time{}))
}

// giveUp closes a connection whose answers nobody reads any more.
func (w *wire) giveUp(conn *pgconn.PgConn) {
	if w.owed > 0 {
		w.owed = 0
		_ = conn.Conn().Close() // the driver finds out when it is used next
	}
}
