package durable

import (
	"newel.dev/newel/internal/audit"
	"newel.dev/newel/internal/faultpoint"
	"newel.dev/newel/internal/guard/approve"
	"newel.dev/newel/internal/guard/effect"
	"newel.dev/newel/internal/task"
)

// Work is one unit of work; exactly one of those before Seen is set. The rest is how it went.
type Work struct {
	Reserve  *effect.Reservation
	Dispatch *effect.Intent
	Complete *effect.Outcome
	Append   []audit.Entry
	Erase    *Erasure
	Ask      *approve.Request
	Decide   *approve.Decision
	Prune    []string                  // ids of operations past their retention
	Peek     func() []effect.Operation // looks at what only the writer may look at
	Task     *task.Write
	Forget   []string // ids of tasks past their time

	Seen []effect.Operation // by Peek
	Op   effect.Operation
	Kept *task.Record // the task as it stands; nil: see Err
	Held bool         // the operation or task is as the work wants it; or, of Ask, made

	Approval *approve.Approval // of Ask and Decide; nil: see Err

	Index int64 // of the first record appended
	Err   error // of this unit; the others are committed all the same

	wake  chan bool // with room for one: true says that its caller leads, false that it is done
	done  bool      // of who leads
	tried bool
}

// Scope is the scope to load, or nil.
func (w *Work) Scope() []byte {
	if r := w.reservation(); r != nil {
		return r.Scope
	}
	return nil
}

// Fresh returns the id of the operation that the work makes if, as its caller has it, nothing has the
// scope; or "". Then it may be done on a Batch that lacks what has the scope: if something has it, the
// operation is among those to be inserted, and cannot be. That is not so where an approval is used up.
func (w *Work) Fresh() string {
	r := w.reservation()
	if r == nil || r.Expect != 0 || w.Dispatch != nil && w.Dispatch.Approval != nil {
		return ""
	}
	return r.ID
}

// ID is the operation to load if there is no scope, or "".
func (w *Work) ID() string {
	switch {
	case w.Complete != nil:
		return w.Complete.ID
	case w.reservation() != nil && w.Scope() == nil:
		return w.reservation().ID
	}
	return ""
}

// ApprovalID is the approval to load, or "".
func (w *Work) ApprovalID() string {
	switch {
	case w.Dispatch != nil && w.Dispatch.Approval != nil:
		return w.Dispatch.Approval.ID
	case w.Complete != nil:
		return w.Complete.Approval
	case w.Decide != nil:
		return w.Decide.ID
	}
	return ""
}

// Binding is that of the approval to load, or nil.
func (w *Work) Binding() []byte {
	if w.Ask != nil {
		return w.Ask.Binding
	}
	return nil
}

func (w *Work) reservation() *effect.Reservation {
	if w.Dispatch != nil {
		return &w.Dispatch.Reservation
	}
	return w.Reserve
}

// point is the moment before the commit of the work, or "".
func (w *Work) point() faultpoint.Point {
	switch {
	case w.Dispatch != nil:
		return faultpoint.IntentCommit
	case w.Complete != nil && !w.Complete.Abandoned: // a settled one is somebody else's
		return faultpoint.OutcomeCommit
	case w.Prune != nil:
		return faultpoint.Pruning
	case w.Ask != nil:
		return faultpoint.ApprovalAsk
	case w.Decide != nil && w.Decide.Vote == nil:
		return faultpoint.ApprovalOver
	case w.Decide != nil:
		return faultpoint.ApprovalDecide
	case w.Task == nil:
		return ""
	}
	switch t := w.Task; t.State {
	case task.Queued:
		if t.Version == 0 {
			return faultpoint.TaskMake
		}
		return faultpoint.TaskAnswer
	case task.Running:
		if t.Take {
			return faultpoint.TaskTake
		}
	case task.Waiting:
		return faultpoint.TaskAsk
	case task.Completed, task.Failed:
		return faultpoint.TaskEnd
	case task.Cancelled:
		return faultpoint.TaskCancel
	}
	return ""
}
