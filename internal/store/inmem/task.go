package inmem

import (
	"bytes"
	"context"
	"slices"
	"strings"
	"time"

	"newel.dev/newel/internal/durable"
	"newel.dev/newel/internal/task"
)

// loadTasks returns the tasks that the work names.
func (db *DB) loadTasks(work []*durable.Work) []task.Record {
	seen := map[string]bool{}
	var out []task.Record
	for _, u := range work {
		if u.Task == nil {
			continue
		}
		for _, id := range []string{u.Task.ID, db.taskOf[string(u.Task.Scope)]} {
			if r := db.tasks[id]; r != nil && !seen[id] {
				seen[id] = true
				out = append(out, *r)
			}
		}
	}
	return out
}

// storeTasks takes over what a batch made of tasks.
func (db *DB) storeTasks(b *durable.Batch) {
	for _, id := range b.TasksGone {
		db.removeTask(id)
	}
	for _, r := range b.TasksPut() {
		kept := *r
		db.tasks[r.ID] = &kept
		if r.Scope != nil {
			db.taskOf[string(r.Scope)] = r.ID
		}
		if r.State.Ended() {
			delete(db.open, r.ID)
		} else {
			db.open[r.ID] = struct{}{}
		}
	}
}

func (db *DB) removeTask(id string) {
	if r := db.tasks[id]; r != nil {
		delete(db.tasks, id)
		delete(db.open, id)
		if r.Scope != nil && db.taskOf[string(r.Scope)] == id {
			delete(db.taskOf, string(r.Scope))
		}
	}
}

func (db *DB) forgetTasks(now int64) {
	for id, r := range db.tasks {
		if r.Gone(now) {
			db.removeTask(id)
		}
	}
}

// Task implements task.Store.
func (db *DB) Task(_ context.Context, id string) (task.Record, error) {
	db.mu.Lock()
	defer db.mu.Unlock()
	now := db.now()
	r := db.tasks[id]
	if r == nil || r.Gone(now) {
		return task.Record{}, nil
	}
	return r.At(now), nil
}

// TasksOf implements task.Store.
func (db *DB) TasksOf(_ context.Context, owner []byte, before string, limit int) ([]task.Record, error) {
	db.mu.Lock()
	defer db.mu.Unlock()
	now := db.now()
	var out []task.Record
	for _, r := range db.tasks {
		if bytes.Equal(r.Owner, owner) && !r.Gone(now) && (before == "" || r.ID < before) {
			out = append(out, r.At(now))
		}
	}
	slices.SortFunc(out, func(a, b task.Record) int { return strings.Compare(b.ID, a.ID) })
	return out[:min(limit, len(out))], nil
}

// TaskVersions implements task.Store.
func (db *DB) TaskVersions(_ context.Context, ids []string) (map[string]int64, error) {
	db.mu.Lock()
	defer db.mu.Unlock()
	out := map[string]int64{}
	for _, id := range ids {
		if r := db.tasks[id]; r != nil {
			out[id] = r.Version
		}
	}
	return out, nil
}

// DueTasks implements task.Store.
func (db *DB) DueTasks(_ context.Context, limit int) ([]task.Record, error) {
	db.mu.Lock()
	defer db.mu.Unlock()
	now := db.now()
	var ids []string
	for id := range db.open {
		if db.tasks[id].Due(now) {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	var out []task.Record
	for _, id := range ids[:min(limit, len(ids))] {
		out = append(out, db.tasks[id].At(now))
	}
	return out, nil
}

// CountTasks implements task.Store.
func (db *DB) CountTasks(context.Context) (task.Counts, error) {
	db.mu.Lock()
	defer db.mu.Unlock()
	var n task.Counts
	oldest := ""
	for id := range db.open {
		switch db.tasks[id].State {
		case task.Running:
			n.Running++
		case task.Waiting:
			n.Waiting++
		default:
			n.Queued++
			if oldest == "" || id < oldest {
				oldest = id
			}
		}
	}
	if oldest != "" {
		n.Oldest = max(0, time.Since(time.UnixMicro(db.tasks[oldest].Created)))
	}
	return n, nil
}

// OpenTasks implements task.Store.
func (db *DB) OpenTasks(_ context.Context, owner []byte, limit int) (int, error) {
	db.mu.Lock()
	defer db.mu.Unlock()
	n := 0
	for id := range db.open {
		if bytes.Equal(db.tasks[id].Owner, owner) {
			if n++; n == limit {
				break
			}
		}
	}
	return n, nil
}
