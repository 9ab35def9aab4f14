package artifact_test

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"newel.dev/newel/call"
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

// TestWriter is the process that TestKilled kills.
func TestWriter(t *testing.T) {
	dir := os.Getenv("NEWEL_TEST_ARTIFACTS")
	if dir == "" {
		t.Skip("it runs as a child of TestKilled")
	}
	s, err := artifact.New(t.Context(), artifact.Options{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; ; i++ {
		a, err := s.Put(t.Context(), nil, "report", "text/plain", bytes.Repeat([]byte{byte('a' + i%26)}, 300<<10))
		if err != nil {
			t.Fatal(err)
		}
		fmt.Println(a.URI)
	}
}

// A process that is killed at any moment leaves what it had promised, whole, and nothing that is half.
func TestKilled(t *testing.T) {
	dir := t.TempDir()
	promised := 0
	for round := range 8 {
		cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestWriter$", "-test.count=1")
		cmd.Env = append(os.Environ(), "NEWEL_TEST_ARTIFACTS="+dir)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		var uris []string
		lines := bufio.NewScanner(out)
		for lines.Scan() {
			if strings.HasPrefix(lines.Text(), "artifact://") {
				if uris = append(uris, lines.Text()); len(uris) == 2+round {
					if err := cmd.Process.Kill(); err != nil {
						t.Fatal(err)
					}
				}
			}
		}
		_ = cmd.Wait() // it was killed
		if len(uris) < 2+round {
			t.Fatalf("it ended by itself after %d", len(uris))
		}
		s, err := artifact.New(t.Context(), artifact.Options{Dir: dir})
		if err != nil {
			t.Fatal(err)
		}
		caps, err := s.Capabilities(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, uri := range uris {
			for _, part := range []string{"", "?offset=300000"} { // the first chunk and the last
				if _, err := caps[0].Run(t.Context(), &call.Call{Kind: call.Resource, Name: uri + part}); err != nil {
					t.Errorf("round %d: %s%s was promised: %v", round, uri, part, err)
				}
			}
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		promised += len(uris)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	sizes, half := map[int64]int{}, 0
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), ".tmp") {
			half++ // deleted when they are old
			continue
		}
		info, err := e.Info()
		if err != nil {
			t.Fatal(err)
		}
		sizes[info.Size()>>10]++
	}
	if len(sizes) != 1 || len(entries)-half < promised || half > 8 {
		t.Errorf("%d promised, %d there; KiB: %v; %d half", promised, len(entries)-half, sizes, half)
	}
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
