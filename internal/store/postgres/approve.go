package postgres

import (
	"context"
	"strconv"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/jackc/pgx/v5"

	"newel.dev/newel/internal/guard/approve"
)

const (
	selectApprovals = "SELECT id, binding, state, until, deadline, ended, operation, round, idx, args, facts FROM newel_approvals "
	putApproval     = `INSERT INTO newel_approvals (id, binding, tenant, principal, state, until, deadline, ended, operation, round, idx, args, facts)
	VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13)
	ON CONFLICT (id) DO UPDATE SET binding = excluded.binding, state = excluded.state, until = excluded.until, ended = excluded.ended,
	operation = excluded.operation, round = excluded.round, idx = excluded.idx, facts = excluded.facts`
)

func scanApproval(row pgx.CollectableRow) (a approve.Approval, err error) {
	var state int16
	var facts []byte
	if err := row.Scan(&a.ID, &a.Binding, &state, &a.Until, &a.Deadline, &a.Ended, &a.Operation, &a.Round, &a.Index, &a.Args, &facts); err != nil {
		return a, err
	}
	a.State = approve.State(state) //nolint:gosec // what was written from one
	return a, json.Unmarshal(facts, &a.Facts)
}

// approvals returns those of a condition, with what the database's clock says of their time.
func (db *DB) approvals(ctx context.Context, condition string, args ...any) (out []approve.Approval, err error) {
	ctx, cancel := context.WithTimeout(ctx, commitTimeout) // a connection that says nothing does not end by itself
	defer cancel()
	var now int64
	q := &pgx.Batch{}
	q.Queue("SELECT " + clock).QueryRow(func(row pgx.Row) error { return row.Scan(&now) })
	q.Queue(selectApprovals+condition, args...).Query(func(rows pgx.Rows) (err error) {
		out, err = pgx.CollectRows(rows, scanApproval)
		return err
	})
	if err := db.pool.SendBatch(ctx, q).Close(); err != nil {
		return nil, err
	}
	for i := range out {
		out[i].Late(now)
	}
	return out, nil
}

// Bound implements approve.Store.
func (db *DB) Bound(ctx context.Context, binding []byte) (approve.Approval, error) {
	list, err := db.approvals(ctx, "WHERE binding = $1", binding)
	if err != nil || len(list) == 0 {
		return approve.Approval{}, err
	}
	return list[0], nil
}

// Approval implements approve.Store.
func (db *DB) Approval(ctx context.Context, id string) (approve.Approval, error) {
	list, err := db.approvals(ctx, "WHERE id = $1", id)
	if err == nil && len(list) == 0 {
		err = approve.ErrNone
	}
	if err != nil {
		return approve.Approval{}, err
	}
	return list[0], nil
}

// Approvals implements approve.Store.
func (db *DB) Approvals(ctx context.Context, q approve.Query) ([]approve.Approval, error) {
	var fits []string
	var args []any
	fit := func(column string, v any) {
		args = append(args, v)
		fits = append(fits, column+" = $"+strconv.Itoa(len(args)))
	}
	if q.State != 0 {
		fit("state", int16(q.State))
	}
	if q.Tenant != nil {
		fit("tenant", *q.Tenant)
	}
	if q.Principal != nil {
		fit("principal", *q.Principal)
	}
	condition := ""
	if len(fits) > 0 {
		condition = "WHERE " + strings.Join(fits, " AND ")
	}
	args = append(args, q.Limit)
	order := " ORDER BY id DESC LIMIT $"
	if q.Oldest {
		order = " ORDER BY id LIMIT $"
	}
	return db.approvals(ctx, condition+order+strconv.Itoa(len(args)), args...)
}
