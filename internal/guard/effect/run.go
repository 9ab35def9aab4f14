package effect

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/audit"
	"newel.dev/newel/internal/faultpoint"
)

const (
	sweepEvery = 5 * time.Second
	sweepMost  = 256 // operations at once
)

// Run writes down what was read, and settles operations whose holder is gone, until ctx ends. The
// step works without it: then callers write, and operations are settled when their caller returns.
func (e *Effects) Run(ctx context.Context) error {
	e.reads.mu.Lock()
	e.reads.running = true
	e.reads.mu.Unlock()
	defer func() {
		e.reads.mu.Lock()
		e.reads.running = false
		e.reads.mu.Unlock()
		e.reads.flush(context.WithoutCancel(ctx))
	}()
	flush := time.NewTicker(flushEvery)
	defer flush.Stop()
	sweep := time.NewTicker(sweepEvery)
	defer sweep.Stop()
	e.sweep(ctx)
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-flush.C:
			e.reads.flush(ctx)
		case <-e.reads.kick:
			e.reads.flush(ctx)
		case <-sweep.C:
			e.sweep(ctx)
		}
	}
}

// sweep settles what crashed: reserved operations did not run, of the others nobody knows.
func (e *Effects) sweep(ctx context.Context) {
	ops, err := e.store.Abandoned(ctx, sweepMost)
	if err != nil {
		if ctx.Err() == nil {
			e.log.LogAttrs(ctx, slog.LevelWarn, "operations that nobody holds cannot be looked for", slog.String("error", err.Error()))
		}
		return
	}
	for i := range ops {
		if err := e.settle(ctx, &ops[i]); err != nil && !errors.Is(err, ErrFenced) && ctx.Err() == nil {
			e.log.LogAttrs(ctx, slog.LevelWarn, "an operation could not be settled", slog.String("operation", ops[i].ID), slog.String("error", err.Error()))
			return
		}
	}
}

func (e *Effects) settle(ctx context.Context, op *Operation) error {
	faultpoint.Reached(faultpoint.Recovering)
	state, code := Unknown, call.OutcomeUnknown.String()
	if op.State == Reserved {
		state, code = NotExecuted, call.Canceled.String()
	}
	rec := audit.Record{
		Act: audit.Outcome, Capability: op.Tool, Code: code, Fence: op.Fence, Kind: call.Tool.String(), Operation: op.ID, Outcome: state.String(),
		Principal: op.Principal, Server: op.Server, Tenant: op.Tenant, Time: audit.Time(time.Now()),
	}
	b, err := rec.Encode()
	if err != nil {
		return err
	}
	_, err = e.store.Complete(ctx, &Outcome{ID: op.ID, Fence: op.Fence, State: state, Abandoned: true, Entry: audit.Entry{Record: b}})
	if err == nil {
		e.log.LogAttrs(ctx, slog.LevelWarn, "an operation was settled whose process is gone", slog.String("operation", op.ID), slog.String("tool", op.Tool), slog.String("outcome", state.String()))
	}
	return err
}
