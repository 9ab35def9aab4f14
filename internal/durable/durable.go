// Package durable is what all engines have in common: many callers' work in one transaction.
//
// Start reading at [Writer], which collects work and has an engine commit it; [Batch] is what the
// work does to the rows that the engine loaded, as a pure computation, so that states and tree are
// the same everywhere.
//
// It promises: work is acknowledged after its commit, and no two commits of one Writer run at once.
// It starts no goroutine: one of the waiting callers commits for all.
package durable

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"time"

	"newel.dev/newel/call"
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

// A Commit does all the work in one transaction, or nothing of it. It fills the results of each
// unit through a [Batch]. Work that was committed although an earlier call said otherwise must be
// recognised: Batch does.
type Commit func(ctx context.Context, work []*Work) error

// A Staged is a Commit that takes its work in stages: more returns what came meanwhile, or, once
// nobody is to be waited for, nothing. So callers are at work while the engine is. All of it is one
// transaction, which begins with work and ends after more returned nothing.
type Staged func(ctx context.Context, work []*Work, more func() []*Work) error

// ErrFatal marks errors after which nothing may be written any more: the process has to end, and
// what is on disk is read anew.
var ErrFatal = errors.New("the store can no longer be trusted")

// A Writer implements the writing half of effect.Store on a Commit. It is safe for concurrent use.
type Writer struct {
	commit  Staged
	most    int // units of one commit
	stage   int // of one stage, while more are about to come
	mu      sync.Mutex
	pending []*Work
	leading bool
	fatal   error
	failed  chan struct{} // closed when fatal is set
	likely  int           // how many may come at once: who was in the last commit, or came meanwhile
	enough  chan struct{} // closed when wanted are there; nil: nobody waits for them
	wanted  int

	took time.Duration // by the last commit, without waiting; of who leads
}

// maxBatch bounds the work of one transaction, so that nobody waits for too many others.
const maxBatch = 256

// stage is how much work is worth a stage while more is about to come: less, and what each statement
// costs by itself counts; more, and the engine waits for callers that could be at work meanwhile.
const stage = 16

// NewWriter returns a writer over commit, which gets all of its work at once.
func NewWriter(commit Commit) *Writer {
	w := NewStaged(func(ctx context.Context, work []*Work, _ func() []*Work) error { return commit(ctx, work) })
	w.stage = maxBatch
	return w
}

// NewStaged returns a writer over commit.
func NewStaged(commit Staged) *Writer {
	return &Writer{commit: commit, most: maxBatch, stage: stage, failed: make(chan struct{})}
}

// Failed is closed when the store can no longer be trusted; Fatal then says why.
func (w *Writer) Failed() <-chan struct{} { return w.failed }

// Fatal returns why the store can no longer be trusted, or nil.
func (w *Writer) Fatal() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.fatal
}

// Do has one unit of work committed, together with others. When ctx ends while the work waits, it
// is taken back; while it is being committed, the result is waited for.
func (w *Writer) Do(ctx context.Context, u *Work) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	u.wake, u.done = make(chan bool, 1), false
	w.mu.Lock()
	if w.fatal != nil {
		defer w.mu.Unlock()
		return w.fatal
	}
	w.pending = append(w.pending, u)
	if w.enough != nil && len(w.pending) >= w.wanted {
		close(w.enough)
		w.enough = nil
	}
	lead := !w.leading
	w.leading = true
	w.mu.Unlock()
	if lead {
		w.lead(u)
		return u.Err
	}
	select {
	case leads := <-u.wake:
		if leads {
			w.lead(u)
		}
	case <-ctx.Done():
		if w.takeBack(u) {
			return ctx.Err()
		}
		<-u.wake
	}
	return u.Err
}

// takeBack removes work that nobody has begun.
func (w *Writer) takeBack(u *Work) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	i := slices.Index(w.pending, u)
	if i < 0 {
		return false
	}
	w.pending = slices.Delete(w.pending, i, i+1)
	select {
	case <-u.wake: // nobody has done it: it was to lead
		w.handOver()
	default:
	}
	return true
}

// handOver makes somebody who waits lead, or nobody. The lock is held.
func (w *Writer) handOver() {
	if len(w.pending) == 0 {
		w.leading = false
		return
	}
	w.pending[0].wake <- true // it has room: there is one leader at a time
}

// lead commits what waits until its own work is done. Then somebody who came meanwhile leads, so
// that no caller works for the others without end.
func (w *Writer) lead(own *Work) {
	for !own.done {
		w.run(own)
	}
	w.mu.Lock()
	w.handOver()
	w.mu.Unlock()
}

// next returns the next stage of a batch that has taken units, or nothing if it is complete. Callers
// that are about to come get the processor first. If there were more of them the last time, they are
// waited for while they keep coming: a commit takes longer than that. The last of them, or of those who
// are enough for a stage, ends the wait. Nobody waits who is alone.
func (w *Writer) next(taken int) []*Work {
	w.mu.Lock()
	defer w.mu.Unlock()
	if taken == 0 && (w.stage >= w.most || w.likely <= w.stage) {
		w.giveWay()
	}
	wanted := min(w.stage, min(w.likely, w.most)-taken)
	for n := -1; n < len(w.pending) && len(w.pending) < wanted; {
		n = len(w.pending)
		w.await(wanted)
		if n == len(w.pending) {
			w.giveWay()
		}
	}
	n := min(len(w.pending), w.most-taken)
	if n == 0 {
		return nil
	}
	batch := w.pending[:n:n]
	w.pending = append([]*Work(nil), w.pending[n:]...)
	return batch
}

// giveWay lets callers come that have nothing to wait for but the processor. The lock is held, but not
// meanwhile.
func (w *Writer) giveWay() {
	for last := -1; last < len(w.pending) && len(w.pending) < w.most; {
		last = len(w.pending)
		w.mu.Unlock()
		runtime.Gosched()
		w.mu.Lock()
	}
}

// await waits until as many wait as are wanted, or for a while. The lock is held, but not meanwhile.
func (w *Writer) await(wanted int) {
	enough := make(chan struct{})
	w.enough, w.wanted = enough, wanted
	w.mu.Unlock()
	t := time.NewTimer(min(w.took/patience, longestPause))
	select {
	case <-enough:
	case <-t.C:
	}
	t.Stop()
	w.mu.Lock()
	w.enough = nil
}

// A pause for callers that may come is a fraction of what a commit takes.
const (
	patience     = 16
	longestPause = time.Millisecond
)

// run commits a batch. If it fails as a whole, each unit is tried alone: one that cannot be written
// does not take the others with it.
func (w *Writer) run(own *Work) {
	batch := w.next(0)
	start := time.Now()
	err := w.try(&batch, func() []*Work {
		waiting := time.Now()
		more := w.next(len(batch))
		batch = append(batch, more...)
		start = start.Add(time.Since(waiting))
		return more
	})
	w.took = time.Since(start)
	if err != nil && len(batch) > 1 && !hopeless(err) {
		err = w.oneByOne(batch)
	}
	w.mu.Lock()
	w.likely = len(batch) + len(w.pending)
	w.mu.Unlock()
	for _, u := range batch {
		if err != nil && !u.tried {
			u.Err = err
		}
		if u == own {
			u.done = true
		} else {
			u.wake <- false // it has room: who was to lead has begun to
		}
	}
}

// hopeless reports whether every other unit would fail in the same way.
func hopeless(err error) bool { return errors.Is(err, ErrFatal) || errors.Is(err, effect.ErrAway) }

// oneByOne returns the error of the units that it did not come to.
func (w *Writer) oneByOne(batch []*Work) error {
	for i, u := range batch {
		one := batch[i : i+1]
		err := w.try(&one, func() []*Work { return nil })
		if err == nil {
			u.tried = true
			continue
		}
		if hopeless(err) {
			return err
		}
		u.Err, u.tried = err, true
	}
	return nil
}

// try commits a batch, which grows by what more returns.
func (w *Writer) try(batch *[]*Work, more func() []*Work) error {
	Again(*batch)
	if err := w.Fatal(); err != nil {
		return err
	}
	err := w.safely(batch, more)
	if err != nil {
		Again(*batch) // nobody is told what was not committed
	}
	if errors.Is(err, ErrFatal) {
		w.mu.Lock()
		if w.fatal == nil {
			w.fatal = err
			close(w.failed)
		}
		w.mu.Unlock()
	}
	return err
}

// Again forgets how work went that is tried again.
func Again(work []*Work) {
	for _, u := range work {
		u.Op, u.Kept, u.Approval, u.Held, u.Index, u.Err = effect.Operation{}, nil, nil, false, 0, nil
	}
}

// safely commits; a panic is an error, or the others would wait for ever.
func (w *Writer) safely(batch *[]*Work, more func() []*Work) (err error) {
	defer func() {
		if v := recover(); v != nil {
			err = fmt.Errorf("%w: panic: %v", ErrFatal, v)
		}
	}()
	err = w.commit(context.Background(), *batch, more) // callers may go; what is being written is written
	if err == nil {
		reached(*batch, true)
	}
	return err
}

// Committing marks for tests that the engine commits next.
func Committing(work []*Work) { reached(work, false) }

func reached(work []*Work, committed bool) {
	if !faultpoint.On {
		return
	}
	for _, u := range work {
		p := u.point()
		switch {
		case p == "":
		case committed && p != faultpoint.Pruning:
			faultpoint.Reached(p.After())
		default:
			faultpoint.Reached(p)
		}
	}
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

// Reserve implements effect.Store.
func (w *Writer) Reserve(ctx context.Context, r *effect.Reservation) (effect.Operation, bool, error) {
	u := &Work{Reserve: r}
	err := w.Do(ctx, u)
	return u.Op, u.Held, err
}

// Dispatch implements effect.Store.
func (w *Writer) Dispatch(ctx context.Context, i *effect.Intent) (effect.Operation, bool, error) {
	u := &Work{Dispatch: i}
	err := w.Do(ctx, u)
	return u.Op, u.Held, err
}

// Complete implements effect.Store.
func (w *Writer) Complete(ctx context.Context, o *effect.Outcome) (effect.Operation, error) {
	u := &Work{Complete: o}
	err := w.Do(ctx, u)
	return u.Op, err
}

// Append implements effect.Store.
func (w *Writer) Append(ctx context.Context, entries []audit.Entry) (int64, error) {
	if len(entries) == 0 {
		return 0, nil
	}
	u := &Work{Append: entries}
	err := w.Do(ctx, u)
	return u.Index, err
}

// Erase implements audit.Eraser.
func (w *Writer) Erase(ctx context.Context, records []int64, entry audit.Entry) (int64, error) {
	if len(records) > audit.MaxErase {
		return 0, fmt.Errorf("durable: %d records cannot be erased at once", len(records))
	}
	u := &Work{Erase: &Erasure{Records: records, Entry: entry}}
	err := w.Do(ctx, u)
	return u.Index, err
}

// PutTask implements task.Store.
func (w *Writer) PutTask(ctx context.Context, t *task.Write) (task.Record, bool, error) {
	u := &Work{Task: t}
	err := w.Do(ctx, u)
	return or(u.Kept), u.Held, err
}

// Ask implements approve.Store.
func (w *Writer) Ask(ctx context.Context, r *approve.Request) (approve.Approval, bool, error) {
	u := &Work{Ask: r}
	err := w.Do(ctx, u)
	return or(u.Approval), u.Held, err
}

// Decide implements approve.Store.
func (w *Writer) Decide(ctx context.Context, d *approve.Decision) (approve.Approval, error) {
	u := &Work{Decide: d}
	err := w.Do(ctx, u)
	return or(u.Approval), err
}

// or returns what p points at, or the zero value.
func or[T any](p *T) (v T) {
	if p != nil {
		v = *p
	}
	return v
}

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
