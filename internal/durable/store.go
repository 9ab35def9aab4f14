package durable

import (
	"context"
	"fmt"

	"newel.dev/newel/internal/audit"
	"newel.dev/newel/internal/guard/approve"
	"newel.dev/newel/internal/guard/effect"
	"newel.dev/newel/internal/task"
)

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
