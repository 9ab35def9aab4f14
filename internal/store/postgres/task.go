package postgres

import (
	"context"
	"database/sql"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"newel.dev/newel/internal/durable"
	"newel.dev/newel/internal/task"
)

// selectTasks reads tasks; those that a node runs which is gone are held by nobody.
var selectTasks = fmt.Sprintf(`SELECT t.id, t.scope, t.print, t.owner, t.state, t.version, t.holder,
	CASE WHEN t.state = %d AND (n.seen IS NULL OR n.seen < clock_timestamp() - interval '%d seconds') THEN 0 ELSE t.until END,
	t.created, t.updated, t.expires, t.request, t.notes, t.answer, t.tenant, t.principal, t.server, t.tool
	FROM newel_tasks t LEFT JOIN newel_nodes n ON n.id = t.node `, task.Running, int(silent.Seconds()))

const putTask = `INSERT INTO newel_tasks (id, scope, print, owner, state, version, holder, node, until, created, updated, expires, request, notes, answer, tenant, principal, server, tool)
	VALUES ($1,$2,$3,$4,$5,$6,$7,$8,$9,$10,$11,$12,$13,$14,$15,$16,$17,$18,$19) ON CONFLICT (id) DO UPDATE SET state = excluded.state, version = excluded.version, holder = excluded.holder,
	node = excluded.node, until = excluded.until, updated = excluded.updated, expires = excluded.expires, notes = excluded.notes, answer = excluded.answer`

// queueTasks adds what a batch made of tasks.
func (db *DB) queueTasks(q *pgx.Batch, b *durable.Batch) {
	if len(b.TasksGone) > 0 {
		q.Queue("DELETE FROM newel_tasks WHERE id = ANY($1)", b.TasksGone)
	}
	for _, r := range b.TasksPut() {
		q.Queue(putTask, r.ID, r.Scope, r.Print, r.Owner, int16(r.State), r.Version, r.Holder, db.node, r.Until, r.Created, r.Updated, r.Expires, r.Request, r.Notes, r.Answer, r.Tenant, r.Principal, r.Server, r.Tool)
	}
	if len(b.Forgotten) > 0 {
		q.Queue("DELETE FROM newel_tasks WHERE id = ANY($1) AND state >= 4 AND expires <= $2", b.Forgotten, b.Now)
	}
}

func scanTask(row pgx.CollectableRow) (r task.Record, err error) {
	var state int16
	err = row.Scan(&r.ID, &r.Scope, &r.Print, &r.Owner, &state, &r.Version, &r.Holder, &r.Until, &r.Created, &r.Updated, &r.Expires, &r.Request, &r.Notes, &r.Answer, &r.Tenant, &r.Principal, &r.Server, &r.Tool)
	r.State = task.State(state)
	return r, err
}

// tasks returns the tasks that a condition chooses, as they stand now, without those that are gone.
func (db *DB) tasks(ctx context.Context, condition string, args ...any) ([]task.Record, error) {
	ctx, cancel := context.WithTimeout(ctx, commitTimeout) // a connection that says nothing does not end by itself
	defer cancel()
	var now int64
	var found []task.Record
	q := &pgx.Batch{}
	q.Queue("SELECT " + clock).QueryRow(func(row pgx.Row) error { return row.Scan(&now) })
	q.Queue(selectTasks+condition, args...).Query(func(rows pgx.Rows) (err error) {
		found, err = pgx.CollectRows(rows, scanTask)
		return err
	})
	if err := db.pool.SendBatch(ctx, q).Close(); err != nil {
		return nil, err
	}
	out := found[:0]
	for i := range found {
		if !found[i].Gone(now) {
			out = append(out, found[i].At(now))
		}
	}
	return out, nil
}

// Task implements task.Store.
func (db *DB) Task(ctx context.Context, id string) (task.Record, error) {
	rs, err := db.tasks(ctx, "WHERE t.id = $1", id)
	if err != nil || len(rs) == 0 {
		return task.Record{}, err
	}
	return rs[0], nil
}

// TasksOf implements task.Store.
func (db *DB) TasksOf(ctx context.Context, owner []byte, before string, limit int) ([]task.Record, error) {
	if before == "" {
		before = "~" // after every id
	}
	return db.tasks(ctx, "WHERE t.owner = $1 AND t.id < $2 AND (t.state < 4 OR t.expires > "+clock+") ORDER BY t.id DESC LIMIT $3", owner, before, limit)
}

// TaskVersions implements task.Store.
func (db *DB) TaskVersions(ctx context.Context, ids []string) (map[string]int64, error) {
	ctx, cancel := context.WithTimeout(ctx, commitTimeout) // a connection that says nothing does not end by itself
	defer cancel()
	rows, err := db.pool.Query(ctx, "SELECT id, version FROM newel_tasks WHERE id = ANY($1)", ids)
	if err != nil {
		return nil, err
	}
	out := map[string]int64{}
	var id string
	var version int64
	_, err = pgx.ForEachRow(rows, []any{&id, &version}, func() error {
		out[id] = version
		return nil
	})
	return out, err
}

// DueTasks implements task.Store.
func (db *DB) DueTasks(ctx context.Context, limit int) ([]task.Record, error) {
	free := fmt.Sprintf("(t.until <= "+clock+" OR t.state = %d AND (n.seen IS NULL OR n.seen < clock_timestamp() - interval '%d seconds'))", task.Running, int(silent.Seconds()))
	return db.tasks(ctx, fmt.Sprintf("WHERE t.state < 4 AND (t.state <> %d AND %s OR t.expires <= "+clock+" AND (t.state <> %d OR %s)) ORDER BY t.id LIMIT $1", task.Waiting, free, task.Running, free), limit)
}

// CountTasks implements task.Store.
func (db *DB) CountTasks(ctx context.Context) (task.Counts, error) {
	ctx, cancel := context.WithTimeout(ctx, commitTimeout) // a connection that says nothing does not end by itself
	defer cancel()
	var n task.Counts
	var oldest sql.NullInt64
	err := db.pool.QueryRow(ctx, "SELECT count(*) FILTER (WHERE state = 1), count(*) FILTER (WHERE state = 2), count(*) FILTER (WHERE state = 3), min(created) FILTER (WHERE state = 1) FROM newel_tasks WHERE state < 4").
		Scan(&n.Queued, &n.Running, &n.Waiting, &oldest)
	if oldest.Valid {
		n.Oldest = max(0, time.Since(time.UnixMicro(oldest.Int64)))
	}
	return n, err
}

// OpenTasks implements task.Store.
func (db *DB) OpenTasks(ctx context.Context, owner []byte, limit int) (n int, err error) {
	ctx, cancel := context.WithTimeout(ctx, commitTimeout) // a connection that says nothing does not end by itself
	defer cancel()
	err = db.pool.QueryRow(ctx, "SELECT count(*) FROM (SELECT 1 FROM newel_tasks WHERE owner = $1 AND state < 4 LIMIT $2) AS mine", owner, limit).Scan(&n)
	return n, err
}

// pruneTasks deletes tasks past their time.
func (db *DB) pruneTasks(ctx context.Context) (int, error) {
	total := 0
	for {
		rows, err := db.pool.Query(ctx, "SELECT id FROM newel_tasks WHERE state >= 4 AND expires <= "+clock+" ORDER BY expires LIMIT $1", pruneMost)
		if err != nil {
			return total, err
		}
		ids, err := pgx.CollectRows(rows, pgx.RowTo[string])
		if err != nil || len(ids) == 0 {
			return total, err
		}
		if err := db.Do(ctx, &durable.Work{Forget: ids}); err != nil {
			return total, err
		}
		total += len(ids)
	}
}
