package clients

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/go-json-experiment/json"

	"newel.dev/newel/test/program"
)

// serveExample starts the configuration at the root, which asks who is calling, and returns its URL.
func serveExample(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"newel.yaml", "examples", "docs"} {
		if err := os.Symlink(filepath.Join(root, name), filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	addr := program.Address(t)
	cmd := exec.Command(program.Built(t, program.Newel), "serve", "--listen", addr)
	cmd.Dir = dir
	program.Serve(t, cmd, program.Ready("http://"+addr+"/ready"))
	return "http://" + addr + "/mcp"
}

// The official TypeScript client logs in by itself, and steps up when a call needs more.
func TestTypeScriptLogsInAndStepsUp(t *testing.T) {
	install(t)
	url := serveExample(t)
	for _, mode := range []string{"2026-07-28", "legacy"} {
		t.Run(mode, func(t *testing.T) {
			var got struct {
				Revision string   `json:"revision"`
				Asked    []string `json:"asked"`
				Scope    string   `json:"scope"`
				Read     bool     `json:"read"`
				Changed  string   `json:"changed"`
			}
			out := node(t, "auth.mjs", mode, url, "alice")
			if err := json.Unmarshal([]byte(out), &got); err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			if !got.Read || len(got.Asked) != 2 || got.Asked[0] != "orders:read kb:read" || !slices.Contains(strings.Fields(got.Asked[1]), "orders:write") {
				t.Errorf("%+v", got)
			}
			if !strings.Contains(got.Scope, "orders:write") || got.Changed == "" || strings.Contains(got.Changed, "scope") {
				t.Errorf("after the step up: %+v", got)
			}
		})
	}
}
