package sqlite_test

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"newel.dev/newel/internal/store/sqlite"
	module "newel.dev/newel/modules/sqlite"
)

// A file is for one process at a time; its key and its head stand beside it.
func TestOpen(t *testing.T) {
	o := module.Options{File: filepath.Join(t.TempDir(), "state.db")}
	for range 2 {
		state, err := module.Open(t.Context(), o)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := module.Open(t.Context(), o); !errors.Is(err, sqlite.ErrInUse) {
			t.Errorf("opened twice: %v", err)
		}
		if err := state.Close(); err != nil {
			t.Error(err)
		}
	}
	for _, file := range []string{o.File + ".key", o.File + ".head"} {
		if b, err := os.ReadFile(file); err != nil || len(b) == 0 {
			t.Errorf("%s: %v", file, err)
		}
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
