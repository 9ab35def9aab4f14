package artifact_test

import (
	"os"
	"path/filepath"
	"testing"

	"newel.dev/newel/internal/backend/artifact"
	"newel.dev/newel/internal/store/shelftest"
)

func TestDir(t *testing.T) {
	dir := t.TempDir()
	shelftest.Run(t, shelftest.Place{
		Open: func(t *testing.T) artifact.Shelf {
			s, err := artifact.Dir(dir)
			if err != nil {
				t.Fatal(err)
			}
			return s
		},
		Change: func(t *testing.T, name string, to func([]byte) []byte) {
			file := filepath.Join(dir, name)
			b, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(file, to(b), 0o600); err != nil {
				t.Fatal(err)
			}
		},
	})
	left, err := os.ReadDir(dir)
	if err != nil || len(left) != 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

func TestMemory(t *testing.T) {
	shelf := artifact.Memory()
	shelftest.Run(t, shelftest.Place{
		Open: func(*testing.T) artifact.Shelf { return shelf },
		Change: func(t *testing.T, name string, to func([]byte) []byte) {
			b, err := shelf.Get(t.Context(), name, 0, 1<<30)
			if err != nil {
				t.Fatal(err)
			}
			if err := shelf.Put(t.Context(), name, to(append([]byte(nil), b...))); err != nil {
				t.Fatal(err)
			}
		},
	})
}

// Nothing outside the folder is reached, through links neither, and nothing that is no artifact is
// touched.
func TestDirIsConfined(t *testing.T) {
	outside, dir := t.TempDir(), t.TempDir()
	secret := filepath.Join(outside, "secret")
	if err := os.WriteFile(secret, []byte("secret"), 0o600); err != nil {
		t.Fatal(err)
	}
	const id = "ABCDEFGHIJKLMNOPQRSTUVWXYZABCDEFGHIJKLMNOPQRSTUVWXYZ"
	if err := os.Symlink(secret, filepath.Join(dir, id)); err != nil {
		t.Fatal(err)
	}
	s, err := artifact.Dir(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}()
	for _, name := range []string{id, "../" + filepath.Base(outside) + "/secret", secret} {
		if b, err := s.Get(t.Context(), name, 0, 10); err == nil {
			t.Errorf("%s: %q", name, b)
		}
		if err := s.Put(t.Context(), name, []byte("changed")); err == nil && name != id {
			t.Errorf("%s was written", name)
		}
		if err := s.Delete(t.Context(), name); err == nil && name != id {
			t.Errorf("%s was deleted", name)
		}
	}
	if b, err := os.ReadFile(secret); err != nil || string(b) != "secret" {
		t.Errorf("%q, %v", b, err)
	}
}
