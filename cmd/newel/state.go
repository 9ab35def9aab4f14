package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strings"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/assembly"
	"newel.dev/newel/internal/config"
	"newel.dev/newel/internal/guard/effect"
	"newel.dev/newel/internal/secret"
	"newel.dev/newel/internal/store/postgres"
	"newel.dev/newel/internal/store/sqlite"
)

// state is what a house remembers with, opened.
type state struct {
	store effect.Store // nil: in memory
	key   secret.Key
	io.Closer
}

// maxLocal bounds how many processes may serve one configuration over stdio at once.
const maxLocal = 16

// openState opens what the configuration names. Over stdio every client starts a process of its
// own, so those take the first free file beside the server's.
func openState(ctx context.Context, f *config.File, local bool) (*state, error) {
	c := &f.Config.State
	if c.Engine == "memory" {
		return &state{Closer: io.NopCloser(nil)}, nil
	}
	key, err := secret.OpenKey(from(f.Dir, c.KeyFile))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", f.Position("state.key_file"), err)
	}
	if c.Engine == "postgres" {
		return openPostgres(ctx, f, key)
	}
	if !c.DSN.IsZero() {
		return nil, fmt.Errorf("%s: the dsn is for the engine postgres", f.Position("state.dsn"))
	}
	file := from(f.Dir, c.Path)
	db, err := sqlite.Open(ctx, file, key)
	for i := 1; local && errors.Is(err, sqlite.ErrInUse) && i < maxLocal; i++ {
		ext := filepath.Ext(file)
		db, err = sqlite.Open(ctx, fmt.Sprintf("%s-stdio%d%s", strings.TrimSuffix(file, ext), i, ext), key)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w; state.path names the file, state.engine: memory does without", f.Position("state"), err)
	}
	return &state{db, key, db}, nil
}

func openPostgres(ctx context.Context, f *config.File, key secret.Key) (*state, error) {
	if f.Config.State.DSN.IsZero() {
		return nil, fmt.Errorf("%s: the engine postgres needs a dsn: dsn: ${env:STATE_DSN}", f.Position("state"))
	}
	db, err := postgres.Open(ctx, f.Config.State.DSN, key)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", f.Position("state"), err)
	}
	return &state{db, key, db}, nil
}

func from(dir, file string) string {
	if filepath.IsAbs(file) {
		return file
	}
	return filepath.Join(dir, file)
}

var recoveries = map[string]call.Recovery{"none": call.RecoverNone, "safe": call.RecoverSafe, "resend_same_key": call.RecoverResend, "lookup": call.RecoverLookup}

// effects are what the configuration says of calls with effects.
func effects(c *config.Effects) assembly.Effects {
	e := assembly.Effects{Wait: c.Wait, Retention: c.Retention}
	for _, t := range c.Tools {
		e.Rules = append(e.Rules, effect.Rule{Tool: t.Tool, Recovery: recoveries[t.Recovery], Lookup: t.Lookup, Required: t.Key == "required", Once: t.Once})
	}
	return e
}
