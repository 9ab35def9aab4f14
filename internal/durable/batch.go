package durable

import (
	"errors"
	"fmt"
	"slices"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/audit"
	"newel.dev/newel/internal/guard/approve"
	"newel.dev/newel/internal/guard/effect"
	"newel.dev/newel/internal/task"
)

// An Erasure is values that are erased, and the record that says so. Mark is what stands in their place.
type Erasure struct {
	Records []int64
	Entry   audit.Entry
	Mark    []byte
}

// A Batch computes what a transaction writes. The engine loads the operations that the work names
// and the edge of the tree, applies every unit, and writes what changed.
type Batch struct {
	Now  int64 // of the engine's clock, in microseconds
	Edge audit.Edge

	byID    map[string]*effect.Operation
	byScope map[string]*effect.Operation

	Rows    []audit.Row // to be added
	Erased  []*Erasure  // of rows that are there, or were added before
	changed []*effect.Operation
	fresh   map[*effect.Operation]bool // of each that changed, whether it is to be inserted
	Removed []string                   // ids to be deleted first
	Pruned  []string                   // ids to be deleted last, if they are still past their retention

	approvals map[string]*approve.Approval
	bound     map[string]*approve.Approval // by binding
	decided   []*approve.Approval
	tasks     map[string]*task.Record
	taskOf    map[string]*task.Record // by scope
	tasksPut  []*task.Record
	TasksGone []string // ids to be deleted first
	Forgotten []string // ids to be deleted last, if they are still past their time
}

// NewBatch begins a batch on what the engine loaded.
func NewBatch(now int64, edge audit.Edge, loaded []effect.Operation, approvals []approve.Approval) *Batch {
	b := &Batch{approvals: map[string]*approve.Approval{}, bound: map[string]*approve.Approval{}, Now: now, Edge: edge, byID: map[string]*effect.Operation{}, byScope: map[string]*effect.Operation{}, fresh: map[*effect.Operation]bool{}}
	b.Load(loaded, approvals)
	return b
}

// Reset makes a batch that is done with one that begins, in the same memory. It lets go of all that it
// held.
func (b *Batch) Reset(edge audit.Edge) {
	for _, m := range []map[string]*effect.Operation{b.byID, b.byScope} {
		clear(m)
	}
	clear(b.approvals)
	clear(b.bound)
	clear(b.tasks)
	clear(b.taskOf)
	b.Written()
	clear(b.changed[:cap(b.changed)])
	b.Edge = edge
}

// Load adds what the next stage names. What the batch knows already, it knows better.
func (b *Batch) Load(loaded []effect.Operation, approvals []approve.Approval) {
	for i := range loaded {
		if b.byID[loaded[i].ID] == nil {
			b.know(&loaded[i])
		}
	}
	for i := range approvals {
		if b.approvals[approvals[i].ID] == nil {
			b.hold(&approvals[i])
		}
	}
}

// LoadTasks adds the tasks that the work names, by id or scope.
func (b *Batch) LoadTasks(loaded []task.Record) {
	for i := range loaded {
		if b.tasks[loaded[i].ID] == nil {
			b.knowTask(&loaded[i])
		}
	}
}

// Written says that the engine has written, but not committed, what is to be written. The next stage
// builds on it.
func (b *Batch) Written() {
	clear(b.Rows)
	b.Rows, b.changed = b.Rows[:0], b.changed[:0]
	b.Erased, b.Removed, b.Pruned, b.decided, b.tasksPut, b.TasksGone, b.Forgotten = nil, nil, nil, nil, nil, nil, nil
	clear(b.fresh)
}

func (b *Batch) knowTask(r *task.Record) {
	if b.tasks == nil {
		b.tasks, b.taskOf = map[string]*task.Record{}, map[string]*task.Record{}
	}
	b.tasks[r.ID] = r
	if r.Scope != nil {
		b.taskOf[string(r.Scope)] = r
	}
}

// TasksPut returns the tasks to be inserted or updated.
func (b *Batch) TasksPut() []*task.Record { return b.tasksPut }

// task does what a task.Write says.
func (b *Batch) task(u *Work) {
	w := u.Task
	old := b.tasks[w.ID]
	if w.Version == 0 && w.Scope != nil && old == nil {
		if old = b.taskOf[string(w.Scope)]; old != nil && old.Gone(b.Now) {
			b.TasksGone = append(b.TasksGone, old.ID)
			delete(b.tasks, old.ID)
			old = nil
		}
	}
	next, ok, again := w.Apply(b.Now, old)
	now := next.At(b.Now)
	u.Held, u.Kept = ok, &now
	if !ok || again {
		return
	}
	if w.Entry != nil {
		u.Index = b.append(*w.Entry)
	}
	if old == nil {
		old = &task.Record{}
	}
	*old = next
	b.knowTask(old)
	if !slices.Contains(b.tasksPut, old) {
		b.tasksPut = append(b.tasksPut, old)
	}
}

func (b *Batch) hold(a *approve.Approval) {
	b.approvals[a.ID] = a
	if a.Binding != nil {
		b.bound[string(a.Binding)] = a
	}
}

// Approvals returns the approvals to be inserted or updated, in this order: a binding is free before
// it is taken.
func (b *Batch) Approvals() []*approve.Approval { return b.decided }

// keep takes over a new form of an approval.
func (b *Batch) keep(next approve.Approval) *approve.Approval {
	a := b.approvals[next.ID]
	if a == nil {
		a = &approve.Approval{}
	}
	if a.Binding != nil && b.bound[string(a.Binding)] == a {
		delete(b.bound, string(a.Binding))
	}
	*a = next
	b.hold(a)
	if i := slices.Index(b.decided, a); i >= 0 {
		b.decided = slices.Delete(b.decided, i, i+1)
	}
	b.decided = append(b.decided, a)
	return a
}

// Empty reports whether there is nothing to be written.
func (b *Batch) Empty() bool {
	return len(b.changed) == 0 && len(b.Rows) == 0 && len(b.Removed) == 0 && len(b.Pruned) == 0 && len(b.decided) == 0 &&
		len(b.tasksPut) == 0 && len(b.TasksGone) == 0 && len(b.Forgotten) == 0
}

func (b *Batch) know(op *effect.Operation) {
	b.byID[op.ID] = op
	if op.Scope != nil {
		b.byScope[string(op.Scope)] = op
	}
}

// Changed returns the operations to be inserted or updated.
func (b *Batch) Changed() []*effect.Operation {
	out := make([]*effect.Operation, 0, len(b.changed))
	for _, op := range b.changed {
		if b.byID[op.ID] == op { // not removed again
			out = append(out, op)
		}
	}
	return out
}

// IsNew reports whether a changed operation is to be inserted.
func (b *Batch) IsNew(op *effect.Operation) bool { return b.fresh[op] }

// Apply does one unit of work.
func (b *Batch) Apply(u *Work) {
	switch {
	case u.Complete != nil:
		b.complete(u)
	case u.Append != nil:
		u.Index = b.Edge.Size
		for _, e := range u.Append {
			b.Rows = append(b.Rows, b.Edge.Append(e))
		}
	case u.Erase != nil:
		u.Index = b.append(u.Erase.Entry)
		u.Erase.Mark = audit.Mark(u.Index)
		b.Erased = append(b.Erased, u.Erase)
	case u.reservation() != nil:
		b.claim(u)
	case u.Ask != nil:
		b.ask(u)
	case u.Decide != nil:
		b.decide(u)
	case u.Prune != nil:
		b.Pruned = append(b.Pruned, u.Prune...)
	case u.Peek != nil:
		u.Seen = u.Peek()
	case u.Task != nil:
		b.task(u)
	case u.Forget != nil:
		b.Forgotten = append(b.Forgotten, u.Forget...)
	default:
		u.Err = errors.New("durable: empty work")
	}
}

func (b *Batch) claim(u *Work) {
	r := u.reservation()
	op := b.byID[r.ID]
	if r.Scope != nil {
		op = b.byScope[string(r.Scope)]
	}
	again := op != nil && op.State == effect.Dispatched && op.Holder == r.Holder // by an earlier call of the same
	next, held, replace := r.Claim(b.Now, op)
	if !held {
		u.Op = next.At(b.Now)
		return
	}
	if u.Dispatch != nil && !again && u.Dispatch.Approval != nil {
		need := u.Dispatch.Approval
		spent, ok := b.approvals[need.ID].Spend(b.Now, need.Now, need.Binding, next.ID, need.Resume)
		if !ok {
			u.Err = call.ErrUnapproved
			return
		}
		spent.Index = b.Edge.Size
		b.keep(spent)
	}
	if u.Dispatch != nil && !again {
		next.State = effect.Dispatched
		next.Sent = b.Now
		next.Index = b.append(u.Dispatch.Entry)
	}
	if replace {
		b.remove(op)
		op = nil
	}
	b.put(op, next)
	u.Op, u.Held, u.Index = next.At(b.Now), true, next.Index
}

func (b *Batch) complete(u *Work) {
	op := b.byID[u.Complete.ID]
	next, again, err := u.Complete.Apply(b.Now, op)
	if err != nil {
		u.Err = err
		return
	}
	if !again {
		next.Index = b.append(u.Complete.Entry)
		b.put(op, next)
		if a, changed := b.approvals[u.Complete.Approval].Release(next.ID, next.State == effect.NotExecuted, next.Round); changed {
			b.keep(a)
		}
	}
	u.Op, u.Index = next.At(b.Now), next.Index
}

func (b *Batch) ask(u *Work) {
	old := b.bound[string(u.Ask.Binding)]
	next, made := u.Ask.Make(b.Now, old)
	if made {
		if old != nil {
			freed := *old
			freed.Binding = nil
			b.keep(freed)
		}
		next.Index = b.append(u.Ask.Entry)
		b.keep(next)
	}
	u.Approval, u.Held, u.Index = &next, made, next.Index
}

func (b *Batch) decide(u *Work) {
	next, again, err := u.Decide.Apply(b.Now, b.approvals[u.Decide.ID])
	if err != nil {
		u.Err = err
		return
	}
	if !again {
		if u.Decide.Entry.Record != nil {
			next.Index = b.append(u.Decide.Entry)
		}
		b.keep(next)
	}
	u.Approval, u.Index = &next, next.Index
}

func (b *Batch) append(e audit.Entry) int64 {
	row := b.Edge.Append(e)
	b.Rows = append(b.Rows, row)
	return row.Index
}

// put takes over a new form of an operation.
func (b *Batch) put(op *effect.Operation, next effect.Operation) {
	isNew := op == nil
	if isNew {
		op = &effect.Operation{}
	}
	*op = next
	b.know(op)
	if _, changed := b.fresh[op]; !changed {
		b.fresh[op] = isNew
		b.changed = append(b.changed, op)
	}
}

func (b *Batch) remove(op *effect.Operation) {
	delete(b.byID, op.ID)
	delete(b.byScope, string(op.Scope))
	b.Removed = append(b.Removed, op.ID)
}

// Schema versions of engines. An engine opens what is one version older, and migrates it; it opens
// what is one version newer, because each version only adds to what the one before reads.
const (
	Schema   = 4
	Readable = Schema + 1
)

// CheckSchema says whether an engine may open what it found.
func CheckSchema(found int) error {
	if found > Readable {
		return fmt.Errorf("the state was written by a newer program (schema %d, this one reads up to %d); update this program", found, Readable)
	}
	return nil
}
