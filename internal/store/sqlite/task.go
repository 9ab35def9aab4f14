package sqlite

import (
	"context"
	"database/sql"
	"errors"
	"strings"
	"time"

	"newel.dev/newel/internal/durable"
	"newel.dev/newel/internal/task"
)

const (
	taskColumns = "SELECT id, scope, print, owner, state, version, holder, until, created, updated, expires, request, notes, answer, tenant, principal, server, tool FROM tasks "
	putTask     = `INSERT INTO tasks (id, scope, print, owner, state, version, holder, until, created, updated, expires, request, notes, answer, tenant, principal, server, tool)
		VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?) ON CONFLICT (id) DO UPDATE SET state = excluded.state, version = excluded.version, holder = excluded.holder,
		until = excluded.until, updated = excluded.updated, expires = excluded.expires, notes = excluded.notes, answer = excluded.answer`
	maxNames = 500 // parameters of one statement
)

// loadedTasks returns the tasks that the work names, by id or scope.
func (db *DB) loadedTasks(ctx context.Context, work []*durable.Work) ([]task.Record, error) {
	seen := map[string]bool{}
	var out []task.Record
	for _, u := range work {
		if u.Task == nil {
			continue
		}
		s, err := db.prepare(ctx, taskColumns+"WHERE id = ? OR scope = ?")
		if err != nil {
			return nil, err
		}
		rows, err := s.QueryContext(ctx, u.Task.ID, u.Task.Scope)
		if err != nil {
			return nil, err
		}
		found, err := scanTasks(rows)
		if err != nil {
			return nil, err
		}
		for i := range found {
			if !seen[found[i].ID] {
				seen[found[i].ID] = true
				out = append(out, found[i])
			}
		}
	}
	return out, nil
}

// storeTasks writes what a batch made of tasks.
func (db *DB) storeTasks(ctx context.Context, b *durable.Batch) error {
	for _, id := range b.TasksGone {
		if err := db.exec(ctx, "DELETE FROM tasks WHERE id = ?", id); err != nil {
			return err
		}
	}
	for _, r := range b.TasksPut() {
		err := db.exec(ctx, putTask, r.ID, r.Scope, r.Print, r.Owner, int64(r.State), r.Version, r.Holder, r.Until, r.Created, r.Updated, r.Expires, r.Request, r.Notes, r.Answer, r.Tenant, r.Principal, r.Server, r.Tool)
		if err != nil {
			return err
		}
	}
	for _, id := range b.Forgotten {
		if err := db.exec(ctx, "DELETE FROM tasks WHERE id = ? AND state >= 4 AND expires <= ?", id, b.Now); err != nil {
			return err
		}
	}
	return nil
}

func scanTasks(rows *sql.Rows) (out []task.Record, err error) {
	defer func() { err = errors.Join(err, rows.Close()) }()
	for rows.Next() {
		var r task.Record
		err := rows.Scan(&r.ID, &r.Scope, &r.Print, &r.Owner, &r.State, &r.Version, &r.Holder, &r.Until, &r.Created, &r.Updated, &r.Expires, &r.Request, &r.Notes, &r.Answer, &r.Tenant, &r.Principal, &r.Server, &r.Tool)
		if err != nil {
			return nil, err
		}
		out = append(out, r)
	}
	return out, rows.Err()
}

// tasks returns the tasks that a condition chooses, as they stand now.
func (db *DB) tasks(ctx context.Context, condition string, args ...any) ([]task.Record, error) {
	if err := db.Fatal(); err != nil {
		return nil, err
	}
	rows, err := db.read.QueryContext(ctx, taskColumns+condition, args...)
	if err != nil {
		return nil, err
	}
	out, err := scanTasks(rows)
	for i := range out {
		out[i] = out[i].At(db.now())
	}
	return out, err
}

// Task implements task.Store.
func (db *DB) Task(ctx context.Context, id string) (task.Record, error) {
	rs, err := db.tasks(ctx, "WHERE id = ?", id)
	if err != nil || len(rs) == 0 || rs[0].Gone(db.now()) {
		return task.Record{}, err
	}
	return rs[0], nil
}

// TasksOf implements task.Store.
func (db *DB) TasksOf(ctx context.Context, owner []byte, before string, limit int) ([]task.Record, error) {
	if before == "" {
		before = "~" // after every id
	}
	return db.tasks(ctx, "WHERE owner = ? AND id < ? AND (state < 4 OR expires > ?) ORDER BY id DESC LIMIT ?", owner, before, db.now(), limit)
}

// TaskVersions implements task.Store.
func (db *DB) TaskVersions(ctx context.Context, ids []string) (map[string]int64, error) {
	out := map[string]int64{}
	for len(ids) > 0 {
		n := min(len(ids), maxNames)
		args := make([]any, n)
		for i, id := range ids[:n] {
			args[i] = id
		}
		if err := db.versions(ctx, out, args); err != nil {
			return nil, err
		}
		ids = ids[n:]
	}
	return out, nil
}

func (db *DB) versions(ctx context.Context, out map[string]int64, ids []any) (err error) {
	rows, err := db.read.QueryContext(ctx, "SELECT id, version FROM tasks WHERE id IN (?"+strings.Repeat(",?", len(ids)-1)+")", ids...)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, rows.Close()) }()
	for rows.Next() {
		var id string
		var version int64
		if err := rows.Scan(&id, &version); err != nil {
			return err
		}
		out[id] = version
	}
	return rows.Err()
}

// DueTasks implements task.Store.
func (db *DB) DueTasks(ctx context.Context, limit int) ([]task.Record, error) {
	now := db.now()
	return db.tasks(ctx, "WHERE state < 4 AND (state <> 3 AND until <= ? OR expires <= ? AND (state <> 2 OR until <= ?)) ORDER BY id LIMIT ?", now, now, now, limit)
}

// CountTasks implements task.Store.
func (db *DB) CountTasks(ctx context.Context) (task.Counts, error) {
	var n task.Counts
	var oldest sql.NullInt64
	err := db.read.QueryRowContext(ctx, "SELECT count(*) FILTER (WHERE state = 1), count(*) FILTER (WHERE state = 2), count(*) FILTER (WHERE state = 3), min(created) FILTER (WHERE state = 1) FROM tasks WHERE state < 4").
		Scan(&n.Queued, &n.Running, &n.Waiting, &oldest)
	if oldest.Valid {
		n.Oldest = max(0, time.Since(time.UnixMicro(oldest.Int64)))
	}
	return n, err
}

// OpenTasks implements task.Store.
func (db *DB) OpenTasks(ctx context.Context, owner []byte, limit int) (n int, err error) {
	err = db.read.QueryRowContext(ctx, "SELECT count(*) FROM (SELECT 1 FROM tasks WHERE owner = ? AND state < 4 LIMIT ?)", owner, limit).Scan(&n)
	return n, err
}

// pruneTasks deletes tasks past their time.
func (db *DB) pruneTasks(ctx context.Context) (int, error) {
	total := 0
	for {
		gone, err := db.tasks(ctx, "WHERE state >= 4 AND expires <= ? LIMIT ?", db.now(), pruneMost)
		if err != nil || len(gone) == 0 {
			return total, err
		}
		ids := make([]string, len(gone))
		for i := range gone {
			ids[i] = gone[i].ID
		}
		if err := db.Do(ctx, &durable.Work{Forget: ids}); err != nil {
			return total, err
		}
		total += len(gone)
	}
}
