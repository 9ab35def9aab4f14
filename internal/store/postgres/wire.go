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

// A wire collects messages to the server in one buffer that is used again for the next commit: what many
// calls write is encoded once, and the driver keeps no copy of it. The zero value is empty. It is used by
// one goroutine at a time.
type wire struct {
	buf   []byte // messages
	spare rows   // memory for the rows of the next COPY
	err   error  // one of them could not be encoded: nothing of buf may be sent

	owed int // answers to what was flushed
}

// maxWire bounds the buffer that is kept, in bytes.
const maxWire = 4 << 20

func (w *wire) clear() {
	if cap(w.buf) > maxWire {
		w.buf, w.spare = nil, nil
	}
	w.buf, w.err = w.buf[:0], nil
}

func (w *wire) add(m pgproto3.FrontendMessage) {
	if w.err != nil {
		return
	}
	if b, err := m.Encode(w.buf); err != nil {
		w.err = err
	} else {
		w.buf = b
	}
}

// run has a prepared statement run, with arguments in the binary format.
func (w *wire) run(statement string, args ...[]byte) {
	w.add(&pgproto3.Bind{PreparedStatement: statement, ParameterFormatCodes: []int16{pgtype.BinaryFormatCode}, Parameters: args})
	w.add(&pgproto3.Execute{})
}

// copy has a prepared COPY of rows run, which are begun with w.rows.
func (w *wire) copy(statement string, r rows) {
	w.run(statement)
	r = r.int16(-1)
	w.add(&pgproto3.CopyData{Data: r})
	w.add(&pgproto3.CopyDone{})
	w.spare = r
}

// rows is what COPY takes in the binary format: of each row the number of fields, and the fields.
type rows []byte

// rows begins rows in memory that is not used any more.
func (w *wire) rows() rows {
	return append(w.spare[:0], "PGCOPY\n\xff\r\n\x00"+ // what it is
		"\x00\x00\x00\x00"+ // no flags
		"\x00\x00\x00\x00"...) // no more header
}

func (r rows) int16(v int) rows { return binary.BigEndian.AppendUint16(r, uint16(v)) } //nolint:gosec // small numbers, or -1
func (r rows) int32(v int) rows { return binary.BigEndian.AppendUint32(r, uint32(v)) } //nolint:gosec // lengths of what is in memory, or -1

// Fields.

func (r rows) bigint(v int64) rows {
	return binary.BigEndian.AppendUint64(r.int32(8), uint64(v)) //nolint:gosec // the same bits
}

func (r rows) smallint(v int) rows { return r.int32(2).int16(v) }

func (r rows) text(s string) rows { return append(r.int32(len(s)), s...) }

// bytea writes NULL for nil.
func (r rows) bytea(b []byte) rows {
	if b == nil {
		return r.int32(-1)
	}
	return append(r.int32(len(b)), b...)
}

// array returns an argument of n elements of a type, at least one: they are like fields.
func array(oid, n int, element func(r rows, i int) rows) []byte {
	r := rows(make([]byte, 0, 20+n*16)).int32(1).int32(1).int32(oid).int32(n).int32(1) // dimensions, with NULLs, the first index is 1
	for i := range n {
		r = element(r, i)
	}
	return r
}

// number is a bigint as an argument.
func number(v int64) []byte {
	return binary.BigEndian.AppendUint64(nil, uint64(v)) //nolint:gosec // the same bits
}

// flush sends what is in the buffer, on a connection that was synced before the first time, and waits for
// no answer. It ends with a Sync: from there on the server counts how long it hears nothing, and a node
// that stands still does not hold its transaction for ever. If it goes wrong, the connection is closed.
func (w *wire) flush(ctx context.Context, conn *pgconn.PgConn) error {
	if len(w.buf) == 0 && w.err == nil {
		return nil
	}
	w.add(&pgproto3.Sync{})
	way := conn.Conn()
	deadline, _ := ctx.Deadline()
	err := w.err
	if err == nil {
		err = way.SetDeadline(deadline)
	}
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
