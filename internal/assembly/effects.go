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
)

// A Store is what must be remembered of calls.
type Store interface {
	effect.Store
	approve.Store
}

// openEffects makes the durable line and the step before it, in which people approve. Without a store it only lasts as long as the process, and
// says so if there is something to lose.
func (h *House) openEffects(ctx context.Context, snapshot *catalog.Snapshot) error {
	o := &h.opts
	store, key := o.State, o.Key
	if store == nil {
		store, key = inmem.New(), secret.RandomKey()
		h.opts.Key = key
		for _, t := range snapshot.Tools() {
			if t.Effect != call.Read {
				o.Logger.LogAttrs(ctx, slog.LevelWarn, "tools have effects, and what is known of their calls is kept in memory: after a restart a call that is tried again runs again",
					slog.String("tool", t.Name), slog.String("effect", t.Effect.String()))
				break
			}
		}
	}
	if o.StateKey == nil { // any node, and this one after a restart, goes on with calls that asked something
		state, err := key.Derive("newel request states")
		if err != nil {
			return err
		}
		o.StateKey = state
	}
	for _, t := range snapshot.Tools() {
		if err := effect.CheckUndo(t.Undo); err != nil {
			return fmt.Errorf("%s: the undo of the tool %q: %w", t.Origin, t.Name, err)
		}
	}
	var err error
	if o.Webhook != nil {
		if err := o.Webhook.Check(); err != nil {
			return err
		}
	}
	if h.approvals, err = approve.New(approve.Options{Store: store, Key: key, Webhook: o.Webhook, Logger: o.Logger}); err != nil {
		return err
	}
	h.effects, err = effect.New(effect.Options{
		Store: store, Key: key, Wait: o.Effects.Wait, Retention: o.Effects.Retention, Deadline: o.Limits.CallTimeout, Confirm: o.Effects.Confirm, Rules: o.Effects.Rules, Logger: o.Logger,
	})
	return err
}

// Configured writes down that the house has the configuration with a digest, and who started it.
func (h *House) Configured(ctx context.Context, digest, by string) error {
	return h.effects.Note(ctx, &audit.Record{Act: audit.Configured, By: by, Pin: digest, Server: h.opts.Name, Time: audit.Time(time.Now())})
}

// A runner is a store that works, or watches itself, while the house runs.
type runner interface {
	Run(ctx context.Context) error
}

// runState runs the store until ctx ends. If it fails, what it holds can no longer be trusted, and
// stop ends the house.
func (h *House) runState(ctx context.Context, stop context.CancelCauseFunc) {
	r, ok := h.opts.State.(runner)
	if !ok {
		return
	}
	if err := r.Run(ctx); err != nil && ctx.Err() == nil {
		h.opts.Logger.LogAttrs(ctx, slog.LevelError, "the server ends: its state can no longer be trusted", slog.String("error", err.Error()))
		stop(err)
	}
}
