// Package state holds tests of the library with a state on disk, the same for every module that keeps one.
package state

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"newel.dev/newel"
	"newel.dev/newel/call"
	"newel.dev/newel/modules/postgres"
	"newel.dev/newel/modules/sqlite"
	"newel.dev/newel/test/engines"
)

// A call with a key is done once, by whichever process it comes to; a state is for one key.
func TestOnce(t *testing.T) {
	for name, engine := range map[string]func(t *testing.T, heads string) func(key string) (*newel.State, error){
		"sqlite": func(t *testing.T, heads string) func(string) (*newel.State, error) {
			file := filepath.Join(t.TempDir(), "of", "its", "own", "state.db")
			return func(key string) (*newel.State, error) {
				return sqlite.Open(t.Context(), sqlite.Options{File: file, KeyFile: key, Heads: heads})
			}
		},
		"postgres": func(t *testing.T, heads string) func(string) (*newel.State, error) {
			dsn := engines.Postgres(t)
			return func(key string) (*newel.State, error) {
				return postgres.Open(t.Context(), postgres.Options{DSN: dsn, KeyFile: key, Heads: heads})
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			heads := filepath.Join(dir, "head")
			open, ran := engine(t, heads), 0
			for range 3 {
				state, err := open(filepath.Join(dir, "key"))
				if err != nil {
					t.Fatal(err)
				}
				pay(t, state, &ran)
			}
			if ran != 1 {
				t.Errorf("it ran %d times", ran)
			}
			if head, err := os.ReadFile(heads); err != nil || len(head) == 0 {
				t.Errorf("the head of the log was not published: %v", err)
			}
			// Another key cannot read it, and does not write over it.
			if _, err := open(filepath.Join(dir, "another key")); err == nil {
				t.Error("opened with another key")
			}
		})
	}
}

// pay runs one call with a key at a server with a state, from its start to its end.
func pay(t *testing.T, state *newel.State, ran *int) {
	t.Helper()
	s := newel.New(&newel.Options{State: state})
	newel.AddTool(s, newel.Tool{Name: "pay", Description: "Pays.", Effect: call.Write}, func(context.Context, *newel.Request, struct{}) (string, error) {
		*ran++
		return "paid", nil
	})
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	result, err := s.Do(ctx, &call.Call{Kind: call.Tool, Name: "pay", Args: []byte(`{}`), Key: "k"})
	if err != nil || result == nil {
		t.Errorf("the answer is %v, %v", result, err)
	}
	stop()
	if err := <-ended; err != nil && !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if err := state.Close(); err != nil {
		t.Error(err)
	}
}
