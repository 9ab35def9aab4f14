package assembly

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/audit"
	"newel.dev/newel/internal/catalog"
	"newel.dev/newel/internal/guard/approve"
	"newel.dev/newel/internal/guard/effect"
	"newel.dev/newel/internal/secret"
	"newel.dev/newel/internal/store/inmem"
	"newel.dev/newel/internal/task"
)

// A Store is what must be remembered of calls.
type Store interface {
	effect.Store
	approve.Store
	task.Store
}

// openEffects makes the durable line and the step before it, in which people approve. Without a store
// it only lasts as long as the process, and says so if there is something to lose.
func (h *House) openEffects(ctx context.Context, snapshot *catalog.Snapshot) error {
	o, k := &h.opts, h.kept
	if k.store == nil {
		k.store, k.key = o.State, o.Key
	}
	if k.store == nil {
		k.store, k.key = inmem.New(), secret.RandomKey()
		for _, t := range snapshot.Tools() {
			if t.Effect != call.Read {
				o.Logger.LogAttrs(ctx, slog.LevelWarn, "tools have effects, and what is known of their calls is kept in memory: after a restart a call that is tried again runs again",
					slog.String("tool", t.Name), slog.String("effect", t.Effect.String()))
				break
			}
		}
	}
	if o.StateKey == nil { // any node, and this one after a restart, goes on with calls that asked something
		state, err := k.key.Derive("newel request states")
		if err != nil {
			return err
		}
		o.StateKey = state
	}
	for _, t := range snapshot.Tools() {
		if err := effect.CheckUndo(t.Undo); err != nil {
			return fmt.Errorf("%s: the undo of the tool %q: %w", t.Origin, t.Name, err)
		}
		if err := effect.CheckSettle(t.Recovery, t.Settle); err != nil {
			return fmt.Errorf("%s: the tool %q: %w", t.Origin, t.Name, err)
		}
	}
	var err error
	if err := h.openTasks(); err != nil {
		return err
	}
	if o.Webhook != nil {
		if err := o.Webhook.Check(); err != nil {
			return err
		}
	}
	if h.approvals, err = approve.New(approve.Options{Store: k.store, Key: k.key, Webhook: o.Webhook, Ended: k.observer.Decided, Logger: o.Logger}); err != nil {
		return err
	}
	h.effects, err = effect.New(effect.Options{
		Store: k.store, Key: k.key, Wait: o.Effects.Wait, Retention: o.Effects.Retention, Deadline: o.Limits.CallTimeout, Confirm: o.Effects.Confirm, Rules: o.Effects.Rules, Redact: o.Effects.Redact, Breaker: h.resilience, Logger: o.Logger,
	})
	return err
}

// configured writes down which configuration a house has, and who gave it. Without that it does not
// serve.
func (h *House) configured(ctx context.Context) error {
	if h.opts.Configuration == "" {
		return nil
	}
	return h.effects.Note(ctx, &audit.Record{Act: audit.Configured, By: h.opts.By, Pin: h.opts.Configuration, Server: h.opts.Name, Time: audit.Time(time.Now())})
}

// A runner works, or watches itself, while a house is served.
type runner interface {
	Run(ctx context.Context) error
}

// runState runs the store until ctx ends. If it fails, what it holds can no longer be trusted, and
// stop ends the house.
func (k *kept) runState(ctx context.Context, stop context.CancelCauseFunc) {
	r, ok := k.store.(runner)
	if !ok {
		return
	}
	if err := r.Run(ctx); err != nil && ctx.Err() == nil {
		k.log.LogAttrs(ctx, slog.LevelError, "the server ends: its state can no longer be trusted", slog.String("error", err.Error()))
		stop(err)
	}
}
