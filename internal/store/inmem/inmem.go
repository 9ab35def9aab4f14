// Package inmem keeps operations and the audit log in memory: the engine of a library that was
// given no other. Start reading at [New].
//
// It promises what the other engines do, but for one thing: nothing outlives the process. So a
// call is not run twice while the process runs; after that nobody knows of it. It keeps the newest
// MaxRecords audit records. Operations are kept for their retention; new ones are refused while
// there are MaxOperations.
package inmem

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"newel.dev/newel/internal/audit"
	"newel.dev/newel/internal/durable"
	"newel.dev/newel/internal/guard/approve"
	"newel.dev/newel/internal/guard/effect"
	"newel.dev/newel/internal/task"
)

// Bounds of what is kept.
const (
	MaxRecords    = 65_536
	MaxOperations = 65_536
	MaxTasks      = 65_536
	MaxApprovals  = 16_384
)

// A DB is a store in memory. It is safe for concurrent use.
type DB struct {
	*durable.Writer
	start time.Time // its monotonic part counts

	mu        sync.Mutex
	edge      audit.Edge
	rows      []audit.Row // the newest, in order
	byID      map[string]*effect.Operation
	byScope   map[string]*effect.Operation
	ended     []string // ids
	nextPrune int64
	approvals map[string]*approve.Approval

	tasks  map[string]*task.Record
	taskOf map[string]string   // by scope, the id
	open   map[string]struct{} // tasks that have not ended
}

var (
	_ effect.Store  = (*DB)(nil)
	_ audit.Eraser  = (*DB)(nil)
	_ approve.Store = (*DB)(nil)
	_ task.Store    = (*DB)(nil)
)

// New returns an empty store.
func New() *DB {
	db := &DB{
		start: time.Now(), byID: map[string]*effect.Operation{}, byScope: map[string]*effect.Operation{}, approvals: map[string]*approve.Approval{},
		tasks: map[string]*task.Record{}, taskOf: map[string]string{}, open: map[string]struct{}{},
	}
	db.Writer = durable.NewWriter(db.commit)
	return db
}

func (db *DB) now() int64 { return time.Since(db.start).Microseconds() }

// commit implements durable.Commit.
func (db *DB) commit(_ context.Context, work []*durable.Work) error {
	db.mu.Lock()
	defer db.mu.Unlock()
	now := db.now()
	db.prune(now)
	var loaded []effect.Operation
	seen := map[string]bool{}
	for _, u := range work {
		op := db.byID[u.ID()]
		if s := u.Scope(); s != nil {
			op = db.byScope[string(s)]
		}
		if op != nil && !seen[op.ID] {
			seen[op.ID] = true
			loaded = append(loaded, *op)
		}
	}
	b := durable.NewBatch(now, db.edge.Clone(), loaded, db.loadedApprovals(work))
	b.LoadTasks(db.loadTasks(work))
	for i, u := range work {
		if u.Task != nil && u.Task.Version == 0 && len(db.tasks)+i >= MaxTasks {
			u.Err = fmt.Errorf("%w: it holds %d tasks in memory", effect.ErrAway, MaxTasks)
			continue
		}
		if u.Ask != nil && len(db.approvals)+i >= MaxApprovals {
			u.Err = fmt.Errorf("%w: it holds %d approvals in memory", effect.ErrAway, MaxApprovals)
			continue
		}
		if (u.Reserve != nil || u.Dispatch != nil) && len(db.byID)+i >= MaxOperations {
			u.Err = fmt.Errorf("%w: it holds %d operations in memory", effect.ErrAway, MaxOperations)
			continue
		}
		b.Apply(u)
	}
	for _, id := range b.Removed {
		db.remove(id)
	}
	for _, op := range b.Changed() {
		kept := *op
		db.byID[op.ID] = &kept
		if op.Scope != nil {
			db.byScope[string(op.Scope)] = &kept
		}
		if op.State.Ended() {
			db.ended = append(db.ended, op.ID)
		}
	}
	for _, a := range b.Approvals() {
		kept := *a
		db.approvals[a.ID] = &kept
	}
	db.storeTasks(b)
	db.edge = b.Edge
	db.rows = append(db.rows, b.Rows...)
	for _, e := range b.Erased {
		for _, i := range e.Records {
			at, ok := slices.BinarySearchFunc(db.rows, i, func(r audit.Row, at int64) int { return cmp.Compare(r.Index, at) })
			if ok && len(db.rows[at].Private) > len(e.Mark) {
				db.rows[at].Private = e.Mark
			}
		}
	}
	if over := len(db.rows) - MaxRecords; over > 0 {
		db.rows = slices.Clone(db.rows[over+MaxRecords/8:]) // some at once: this copies
	}
	return nil
}

func (db *DB) remove(id string) {
	if op := db.byID[id]; op != nil {
		delete(db.byID, id)
		if op.Scope != nil && db.byScope[string(op.Scope)] == op {
			delete(db.byScope, string(op.Scope))
		}
	}
}

// prune forgets operations past their retention, once a second: it looks at all that ended.
func (db *DB) prune(now int64) {
	if now < db.nextPrune {
		return
	}
	db.nextPrune = now + time.Second.Microseconds()
	db.forget(now)
	db.forgetTasks(now)
}

func (db *DB) forget(now int64) {
	maps.DeleteFunc(db.approvals, func(_ string, a *approve.Approval) bool {
		return a.Ended > 0 && a.Ended < now-approve.Retention.Microseconds()
	})
	db.ended = slices.DeleteFunc(db.ended, func(id string) bool {
		op := db.byID[id]
		if op == nil || !op.State.Ended() {
			return true // it ends once more, if it does
		}
		if op.Expired(now, false) {
			db.remove(id)
			return true
		}
		return false
	})
}

// Prune forgets operations and tasks past their time now, and returns how many there were.
func (db *DB) Prune(context.Context) (int, error) {
	db.mu.Lock()
	defer db.mu.Unlock()
	before := len(db.byID) + len(db.tasks)
	db.forget(db.now())
	db.forgetTasks(db.now())
	return before - len(db.byID) - len(db.tasks), nil
}

// Find implements effect.Store.
func (db *DB) Find(_ context.Context, scope []byte) (effect.Operation, error) {
	db.mu.Lock()
	defer db.mu.Unlock()
	op := db.byScope[string(scope)]
	if op == nil {
		return effect.Operation{}, nil
	}
	return op.At(db.now()), nil
}

// Operation implements effect.Store.
func (db *DB) Operation(_ context.Context, id string) (effect.Operation, error) {
	db.mu.Lock()
	defer db.mu.Unlock()
	op := db.byID[id]
	if op == nil {
		return effect.Operation{}, nil
	}
	return op.At(db.now()), nil
}

// Abandoned implements effect.Store.
func (db *DB) Abandoned(_ context.Context, limit int) ([]effect.Operation, error) {
	db.mu.Lock()
	defer db.mu.Unlock()
	now := db.now()
	var out []effect.Operation
	for _, op := range db.byID {
		if len(out) < limit && !op.State.Ended() && op.Until <= now {
			out = append(out, op.At(now))
		}
	}
	return out, nil
}

// Head returns the right edge of the tree.
func (db *DB) Head(context.Context) (audit.Edge, error) {
	db.mu.Lock()
	defer db.mu.Unlock()
	return db.edge.Clone(), nil
}

// Read returns at most limit records from index from on.
func (db *DB) Read(_ context.Context, from int64, limit int) ([]audit.Row, error) {
	db.mu.Lock()
	defer db.mu.Unlock()
	i, _ := slices.BinarySearchFunc(db.rows, from, func(r audit.Row, at int64) int { return cmp.Compare(r.Index, at) })
	return slices.Clone(db.rows[i:min(i+limit, len(db.rows))]), nil
}
