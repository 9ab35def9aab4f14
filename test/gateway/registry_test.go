package gateway

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/modelcontextprotocol/go-sdk/mcp"

	"newel.dev/newel/internal/backend/mcpupstream"
)

// installServers runs npm ci in servers, unless what is installed is what the lock file says.
func installServers(t *testing.T) string {
	t.Helper()
	dir, err := filepath.Abs("servers")
	if err != nil {
		t.Fatal(err)
	}
	lock, err := os.ReadFile(filepath.Join(dir, "package-lock.json"))
	if err != nil {
		t.Fatal(err)
	}
	stamp := filepath.Join(dir, "node_modules", ".installed-lock")
	if have, err := os.ReadFile(stamp); err == nil && bytes.Equal(have, lock) {
		return filepath.Join(dir, "node_modules", ".bin")
	}
	cmd := exec.CommandContext(t.Context(), "npm", "ci", "--no-fund", "--no-audit", "--loglevel=error")
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("npm ci: %v; these tests need npm, and the network once\n%s", err, out)
	}
	if err := os.WriteFile(stamp, lock, 0o644); err != nil {
		t.Fatal(err)
	}
	return filepath.Join(dir, "node_modules", ".bin")
}

// The servers that people run, from the registry, behind one gateway and for both eras of client.
func TestServersOfTheRegistry(t *testing.T) {
	bin := installServers(t)
	folder := t.TempDir()
	if err := os.WriteFile(filepath.Join(folder, "hello.txt"), []byte("hello from a file"), 0o600); err != nil {
		t.Fatal(err)
	}
	node := func(name string, args ...string) mcpupstream.Config {
		return mcpupstream.Config{
			Command: filepath.Join(bin, "node"), Args: append([]string{filepath.Join(bin, name)}, args...),
			ListTimeout: 30 * time.Second, Env: plain(map[string]string{"MEMORY_FILE_PATH": filepath.Join(t.TempDir(), "memory.json")}),
		}
	}
	files := node("mcp-server-filesystem", folder)
	files.Prefix = "files_"
	memory := node("mcp-server-memory")
	memory.Prefix = "memory_"
	url := serve(t, map[string]mcpupstream.Config{"everything": node("mcp-server-everything"), "files": files, "memory": memory})

	for _, revision := range []string{"2026-07-28", "2025-11-25"} {
		t.Run(revision, func(t *testing.T) {
			progress := make(chan float64, 100)
			s := client(t, url, revision, progress)
			list, err := s.ListTools(t.Context(), nil)
			if err != nil {
				t.Fatal(err)
			}
			var names []string
			for _, tool := range list.Tools {
				names = append(names, tool.Name)
			}
			for _, want := range []string{"echo", "files_read_text_file", "files_write_file", "memory_create_entities", "memory_read_graph"} {
				if !slices.Contains(names, want) {
					t.Errorf("no tool %s among %v", want, names)
				}
			}
			if !slices.IsSorted(names) {
				t.Errorf("the order is not that of the names: %v", names)
			}
			run := func(name string, args map[string]any) string {
				t.Helper()
				p := &mcp.CallToolParams{Name: name, Arguments: args}
				p.SetProgressToken("p")
				r, err := s.CallTool(t.Context(), p)
				if err != nil {
					t.Fatalf("%s: %v", name, err)
				}
				if r.IsError {
					t.Fatalf("%s: %s", name, text(r))
				}
				return text(r)
			}
			if got := run("echo", map[string]any{"message": "grüß"}); !strings.Contains(got, "grüß") {
				t.Errorf("echo: %s", got)
			}
			if got := run("files_read_text_file", map[string]any{"path": filepath.Join(folder, "hello.txt")}); !strings.Contains(got, "hello from a file") {
				t.Errorf("read: %s", got)
			}
			run("files_write_file", map[string]any{"path": filepath.Join(folder, revision), "content": "written"})
			if b, err := os.ReadFile(filepath.Join(folder, revision)); err != nil || string(b) != "written" {
				t.Errorf("write: %q, %v", b, err)
			}
			run("memory_create_entities", map[string]any{"entities": []any{map[string]any{"name": "Ada " + revision, "entityType": "person", "observations": []any{"wrote notes"}}}})
			if got := run("memory_read_graph", map[string]any{}); !strings.Contains(got, "Ada "+revision) {
				t.Errorf("graph: %s", got)
			}
			if slices.Contains(names, "trigger-sampling-request") {
				if got := run("trigger-sampling-request", map[string]any{"prompt": "Capital of France?", "maxTokens": 10}); !strings.Contains(got, "Paris") {
					t.Errorf("sampling: %s", got)
				}
			}
			if slices.Contains(names, "trigger-long-running-operation") {
				run("trigger-long-running-operation", map[string]any{"duration": 1, "steps": 2})
				select {
				case <-progress:
				case <-time.After(5 * time.Second):
					t.Error("no progress")
				}
			}
			resources, err := s.ListResources(t.Context(), nil)
			if err != nil || len(resources.Resources) == 0 {
				t.Fatalf("resources: %v", err)
			}
			prompts, err := s.ListPrompts(t.Context(), nil)
			if err != nil || len(prompts.Prompts) == 0 {
				t.Errorf("prompts: %v", err)
			}
		})
	}
}
