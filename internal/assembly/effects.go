package assembly

import (
	"context"
	"log/slog"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/catalog"
	"newel.dev/newel/internal/guard/effect"
	"newel.dev/newel/internal/secret"
	"newel.dev/newel/internal/store/inmem"
)

// openEffects makes the durable line. Without a store it only lasts as long as the process, and
// says so if there is something to lose.
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
	var err error
	h.effects, err = effect.New(effect.Options{
		Store: k.store, Key: k.key, Wait: o.Effects.Wait, Retention: o.Effects.Retention, Deadline: o.Limits.CallTimeout, Rules: o.Effects.Rules, Logger: o.Logger,
	})
	return err
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
