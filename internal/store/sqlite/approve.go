package sqlite

import (
	"context"
	"database/sql"
	"errors"
	"strings"

	"github.com/go-json-experiment/json"

	"newel.dev/newel/internal/durable"
	"newel.dev/newel/internal/guard/approve"
)

const (
	approvalColumns = "SELECT id, binding, state, until, deadline, ended, operation, round, idx, args, facts FROM approvals "
	putApproval     = `INSERT INTO approvals (id, binding, tenant, principal, state, until, deadline, ended, operation, round, idx, args, facts) VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?)
	ON CONFLICT (id) DO UPDATE SET binding = excluded.binding, state = excluded.state, until = excluded.until, ended = excluded.ended,
	operation = excluded.operation, round = excluded.round, idx = excluded.idx, facts = excluded.facts`
)

// loadedApprovals returns the approvals that the work names.
func (db *DB) loadedApprovals(ctx context.Context, work []*durable.Work) (out []approve.Approval, err error) {
	seen := map[string]bool{}
	for _, u := range work {
		condition, key := "WHERE id = ?", any(u.ApprovalID())
		if binding := u.Binding(); binding != nil {
			condition, key = "WHERE binding = ?", binding
		} else if key == "" {
			continue
		}
		s, err := db.prepare(ctx, approvalColumns+condition)
		if err != nil {
			return nil, err
		}
		rows, err := s.QueryContext(ctx, key)
		if err != nil {
			return nil, err
		}
		found, err := scanApprovals(rows)
		if err != nil {
			return nil, err
		}
		for _, a := range found {
			if !seen[a.ID] {
				seen[a.ID] = true
				out = append(out, a)
			}
		}
	}
	return out, nil
}

// storeApprovals writes approvals in their order: a binding is free before it is taken.
func (db *DB) storeApprovals(ctx context.Context, list []*approve.Approval) error {
	for _, a := range list {
		facts, err := json.Marshal(&a.Facts)
		if err != nil {
			return err
		}
		err = db.exec(ctx, putApproval, a.ID, a.Binding, a.Tenant, a.Principal, int64(a.State), a.Until, a.Deadline, a.Ended, a.Operation, a.Round, a.Index, a.Args, facts)
		if err != nil {
			return err
		}
	}
	return nil
}

func scanApprovals(rows *sql.Rows) (out []approve.Approval, err error) {
	defer func() { err = errors.Join(err, rows.Close()) }()
	for rows.Next() {
		var a approve.Approval
		var facts []byte
		if err := rows.Scan(&a.ID, &a.Binding, &a.State, &a.Until, &a.Deadline, &a.Ended, &a.Operation, &a.Round, &a.Index, &a.Args, &facts); err != nil {
			return nil, err
		}
		if err := json.Unmarshal(facts, &a.Facts); err != nil {
			return nil, err
		}
		out = append(out, a)
	}
	return out, rows.Err()
}

func (db *DB) approvals(ctx context.Context, condition string, args ...any) ([]approve.Approval, error) {
	if err := db.Fatal(); err != nil {
		return nil, err
	}
	rows, err := db.read.QueryContext(ctx, approvalColumns+condition, args...)
	if err != nil {
		return nil, err
	}
	return scanApprovals(rows)
}

// Bound implements approve.Store.
func (db *DB) Bound(ctx context.Context, binding []byte) (approve.Approval, error) {
	list, err := db.approvals(ctx, "WHERE binding = ?", binding)
	if err != nil || len(list) == 0 {
		return approve.Approval{}, err
	}
	return db.ran(list)[0], nil
}

// Approval implements approve.Store.
func (db *DB) Approval(ctx context.Context, id string) (approve.Approval, error) {
	list, err := db.approvals(ctx, "WHERE id = ?", id)
	if err == nil && len(list) == 0 {
		err = approve.ErrNone
	}
	if err != nil {
		return approve.Approval{}, err
	}
	return db.ran(list)[0], nil
}

// Approvals implements approve.Store.
func (db *DB) Approvals(ctx context.Context, q approve.Query) ([]approve.Approval, error) {
	var fits []string
	var args []any
	if q.State != 0 {
		fits, args = append(fits, "state = ?"), append(args, int64(q.State))
	}
	if q.Tenant != nil {
		fits, args = append(fits, "tenant = ?"), append(args, *q.Tenant)
	}
	if q.Principal != nil {
		fits, args = append(fits, "principal = ?"), append(args, *q.Principal)
	}
	condition := ""
	if len(fits) > 0 {
		condition = "WHERE " + strings.Join(fits, " AND ")
	}
	order := " ORDER BY id DESC LIMIT ?"
	if q.Oldest {
		order = " ORDER BY id LIMIT ?"
	}
	list, err := db.approvals(ctx, condition+order, append(args, q.Limit)...)
	return db.ran(list), err
}

// ran notes for a reader whose time is over by the engine's clock.
func (db *DB) ran(list []approve.Approval) []approve.Approval {
	now := db.now()
	for i := range list {
		list[i].Late(now)
	}
	return list
}
