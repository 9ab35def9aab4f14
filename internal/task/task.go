// Package task is calls that go on after their caller was answered: made durably before the handle is
// returned, run by workers of any node, told to their own caller alone.
//
// Start reading at [Tasks.Guard], the step that makes a task of a call; task.go is the record and
// what an engine promises, serve.go what callers ask about tasks, run.go the workers.
//
// Refuses: calls of tools that have to be tasks from callers that cannot take one, and the other way
// round; new tasks while too many wait (Exhausted, with advice when to try again); tasks of others,
// which look as if they did not exist. Needs: a Store. Fails: closed. Records: the making and the end
// of every task in the audit log, in the transaction of the change. Costs: one grouped commit to make
// a task, and one for each of its changes.
//
// A task is run through the same path as any call, with a key of its own: so what is promised of
// calls with effects holds for tasks, whichever node dies.
package task

import (
	"context"
	"time"

	"newel.dev/newel/internal/audit"
)

// State is where a task stands in the store.
type State uint8

// The states. The last three are final.
const (
	Queued    State = iota + 1 // a worker may take it
	Running                    // a worker has it
	Waiting                    // it asked its caller
	Completed                  // the answer is stored, be it a result or an error
	Failed                     // there is no answer: its time was over
	Cancelled
)

// Ended reports whether the state is final.
func (s State) Ended() bool { return s >= Completed }

// A Record is the durable form of a task. Until and Expires are times of the engine's clock, in
// microseconds: the database's, or one that only runs while the engine does. Created and Updated are
// of a node's clock, for people.
type Record struct {
	ID      string // unguessable; begins with the time
	Scope   []byte // who, where and which idempotency key, 32 bytes; nil without a key
	Print   []byte // what was asked, 32 bytes
	Owner   []byte // who and where, 32 bytes
	State   State
	Version int64  // counts its changes: who has an older number may not write
	Holder  string // of the last change: unguessable
	Until   int64  // nobody may take it before
	Created int64  // Unix time, microseconds
	Updated int64
	Expires int64  // it may be gone after that
	Request []byte // what is to be done, sealed
	Notes   []byte // how far it has come, what it asked and what was answered, sealed
	Answer  []byte // Completed: sealed

	Tenant, Principal, Server, Tool string

	Over bool // it should have ended by now; set by the engine on reading
}

// A Write makes a task or changes one: the Record is how it is to be. Version is that of the one it
// replaces, 0 for a new one. Until and Expires are set by the engine.
type Write struct {
	Record
	Lease time.Duration // sets Until
	Keep  time.Duration // sets Expires; 0: it stays
	// Take is for workers: only what nobody else holds is taken.
	Take  bool
	Entry *audit.Entry // written in the same transaction; nil: none
}

// Apply is what a Write does to the task as it stands (nil: there is none) at time now. ok is false
// if it stands otherwise; again says that the same write was made before. It is pure, so that
// every engine has the same states.
func (w *Write) Apply(now int64, old *Record) (next Record, ok, again bool) {
	switch {
	case old == nil && w.Version != 0:
		return Record{}, false, false
	case old != nil && old.Holder == w.Holder:
		return *old, true, true
	case old != nil && (old.Version != w.Version || old.ID != w.ID || old.State.Ended()):
		return *old, false, false
	case old != nil && w.Take && (old.Until > now || old.State == Waiting && old.Expires > now):
		return *old, false, false
	}
	next = w.Record
	next.Version++
	next.Until = now + w.Lease.Microseconds()
	switch {
	case w.Keep > 0:
		next.Expires = now + w.Keep.Microseconds()
	case old != nil:
		next.Expires = old.Expires
	}
	return next, true, false
}

// Gone reports whether a task is past its time at time now: nobody is told of it any more.
func (r *Record) Gone(now int64) bool { return r.State.Ended() && r.Expires <= now }

// Due reports whether a worker has something to do with it at time now: run it, or end it because its
// time is over.
func (r *Record) Due(now int64) bool {
	return !r.State.Ended() && (r.State != Waiting && r.Until <= now || r.Expires <= now && (r.State != Running || r.Until <= now))
}

// At sets Over for a reader at time now.
func (r *Record) At(now int64) Record {
	out := *r
	out.Over = !r.State.Ended() && r.Expires <= now
	return out
}

// Counts are of all nodes.
type Counts struct {
	Queued, Running, Waiting int64
	Oldest                   time.Duration // how long the first of those that wait for a worker has waited; 0: none does
}

// A Store keeps tasks. Its methods are safe for concurrent use. A write is durable when it returns
// without an error; after an error it may or may not have happened, and the same one made again does
// not happen twice.
type Store interface {
	// PutTask makes or changes a task. ok is false if it stands otherwise: then nothing is written and
	// r is how it stands, with an empty ID if there is none. A new one with the Scope of another that
	// is not gone stands otherwise.
	PutTask(ctx context.Context, w *Write) (r Record, ok bool, err error)
	// Task returns a task; an empty ID says there is none, or that it is gone.
	Task(ctx context.Context, id string) (Record, error)
	// TasksOf returns at most limit tasks of an owner, newest first, from before an id on; "" is the
	// first page.
	TasksOf(ctx context.Context, owner []byte, before string, limit int) ([]Record, error)
	// TaskVersions returns the versions of those tasks that are there.
	TaskVersions(ctx context.Context, ids []string) (map[string]int64, error)
	// DueTasks returns at most limit tasks that a worker has something to do with, oldest first.
	DueTasks(ctx context.Context, limit int) ([]Record, error)
	// CountTasks counts those that have not ended.
	CountTasks(ctx context.Context) (Counts, error)
	// OpenTasks returns how many tasks of an owner have not ended, at most limit.
	OpenTasks(ctx context.Context, owner []byte, limit int) (int, error)
}
