package sqlite_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"newel.dev/newel"
	"newel.dev/newel/call"
	"newel.dev/newel/internal/store/sqlite"
	module "newel.dev/newel/modules/sqlite"
)

// pay runs one call with a key at a server with a state, from its start to its end.
func pay(t *testing.T, state *newel.State, ran *int) *call.Result {
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
	if err != nil {
		t.Error(err)
	}
	stop()
	if err := <-ended; err != nil && !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if err := state.Close(); err != nil {
		t.Error(err)
	}
	return result
}

// A call with a key is done once, by whichever process it comes to.
func TestOpen(t *testing.T) {
	o := module.Options{File: filepath.Join(t.TempDir(), "of", "its", "own", "state.db")}
	ran := 0
	for range 3 {
		state, err := module.Open(t.Context(), o)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := module.Open(t.Context(), o); !errors.Is(err, sqlite.ErrInUse) {
			t.Errorf("opened twice: %v", err)
		}
		if result := pay(t, state, &ran); result == nil {
			t.Error("no answer")
		}
	}
	if ran != 1 {
		t.Errorf("it ran %d times", ran)
	}
	if head, err := os.ReadFile(o.File + ".head"); err != nil || len(head) == 0 {
		t.Errorf("the head of the log was not published: %v", err)
	}
	// Another key cannot read it, and does not write over it.
	o.KeyFile = filepath.Join(t.TempDir(), "key")
	if _, err := module.Open(t.Context(), o); err == nil {
		t.Error("opened with another key")
	}
}

func TestOpenRefuses(t *testing.T) {
	for name, o := range map[string]module.Options{
		"no file": {}, "a folder": {File: t.TempDir()}, "a name with spaces": {File: filepath.Join(t.TempDir(), "x"), Origin: "a b"},
	} {
		if s, err := module.Open(t.Context(), o); err == nil {
			t.Errorf("%s: opened", name)
			_ = s.Close()
		}
	}
	if _, err := os.Stat(".key"); err == nil {
		t.Error("a key was made for no file")
		_ = os.Remove(".key")
	}
}
