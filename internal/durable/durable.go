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

	"newel.dev/newel/internal/faultpoint"
	"newel.dev/newel/internal/guard/effect"
)

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

// Stage is how much work is worth a stage while more is about to come: less, and what each statement
// costs by itself counts; more, and the engine waits for callers that could be at work meanwhile.
const Stage = 24

// NewWriter returns a writer over commit, which gets all of its work at once.
func NewWriter(commit Commit) *Writer {
	w := NewStaged(func(ctx context.Context, work []*Work, _ func() []*Work) error { return commit(ctx, work) })
	w.stage = maxBatch
	return w
}

// NewStaged returns a writer over commit.
func NewStaged(commit Staged) *Writer {
	return &Writer{commit: commit, most: maxBatch, stage: Stage, failed: make(chan struct{})}
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
