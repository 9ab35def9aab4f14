package postgres_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"newel.dev/newel"
	"newel.dev/newel/call"
	module "newel.dev/newel/modules/postgres"
	"newel.dev/newel/test/engines"
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
	dir := t.TempDir()
	o := module.Options{DSN: engines.Postgres(t), KeyFile: filepath.Join(dir, "key"), Heads: filepath.Join(dir, "head")}
	ran := 0
	for range 3 {
		state, err := module.Open(t.Context(), o)
		if err != nil {
			t.Fatal(err)
		}
		if result := pay(t, state, &ran); result == nil {
			t.Error("no answer")
		}
	}
	if ran != 1 {
		t.Errorf("it ran %d times", ran)
	}
	if head, err := os.ReadFile(o.Heads); err != nil || len(head) == 0 {
		t.Errorf("the head of the log was not published: %v", err)
	}
	o.KeyFile = filepath.Join(t.TempDir(), "key")
	if _, err := module.Open(t.Context(), o); err == nil {
		t.Error("opened with another key")
	}
}

func TestOpenRefuses(t *testing.T) {
	dir := t.TempDir()
	whole := module.Options{DSN: "postgres://u:secret@127.0.0.1:1/d", KeyFile: filepath.Join(dir, "key"), Heads: filepath.Join(dir, "head")}
	for name, spoil := range map[string]func(o *module.Options){
		"no database": func(o *module.Options) { o.DSN = "" }, "no key": func(o *module.Options) { o.KeyFile = "" },
		"no file for heads": func(o *module.Options) { o.Heads = "" }, "nobody there": func(*module.Options) {},
	} {
		o := whole
		spoil(&o)
		if _, err := module.Open(t.Context(), o); err == nil || strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: %v", name, err)
		}
	}
}
