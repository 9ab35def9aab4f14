package clients

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-json-experiment/json"

	"newel.dev/newel/test/program"
)

// clientTimeout bounds one client: some wait a minute for an answer that does not come.
const clientTimeout = 20 * time.Second

// A walk is what a client found on its way through the fixture.
type walk struct {
	Revision string    `json:"revision"`
	Listed   bool      `json:"listed"` // a tool, a resource and a prompt were where they belong
	Called   string    `json:"called"`
	Failed   string    `json:"failed"`
	Read     string    `json:"read"`
	Prompt   string    `json:"prompt"`
	Asked    string    `json:"asked"` // after two questions to the client's side
	Progress []float64 `json:"progress"`
	Long     string    `json:"long"`
}

func wanted(revision string) walk {
	return walk{
		Revision: revision, Listed: true,
		Called:   "This is a simple text response for testing.",
		Failed:   "This tool intentionally returns an error for testing",
		Read:     `{"id":"42","templateTest":true,"data":"Data for ID: 42"}`,
		Prompt:   "Prompt with arguments: arg1='a', arg2='b'",
		Asked:    "Multi-round complete: Ada likes blue",
		Progress: []float64{0, 50, 100},
		Long:     "done",
	}
}

func (w *walk) compare(t *testing.T, want walk) {
	t.Helper()
	for _, f := range []struct {
		what      string
		got, want any
	}{
		{"revision", w.Revision, want.Revision}, {"listed", w.Listed, want.Listed}, {"called", w.Called, want.Called},
		{"failed", w.Failed, want.Failed}, {"read", w.Read, want.Read}, {"prompt", w.Prompt, want.Prompt},
		{"asked", w.Asked, want.Asked}, {"long", w.Long, want.Long},
	} {
		if f.got != f.want {
			t.Errorf("%s: got %v, want %v", f.what, f.got, f.want)
		}
	}
	if !slices.Equal(w.Progress, want.Progress) {
		t.Errorf("progress: got %v, want %v", w.Progress, want.Progress)
	}
}

func TestWalk(t *testing.T) {
	install(t)
	for _, tt := range []struct {
		name     string
		script   []string
		revision string
	}{
		{"TypeScript v1", []string{"v1.mjs"}, "2025-11-25"},
		{"TypeScript v2, session", []string{"v2.mjs", "legacy"}, "2025-11-25"},
		{"TypeScript v2, asking first", []string{"v2.mjs", "auto"}, "2026-07-28"},
		{"TypeScript v2, stateless", []string{"v2.mjs", "2026-07-28"}, "2026-07-28"},
	} {
		t.Run(tt.name+" over HTTP", func(t *testing.T) {
			w := take(t, append(tt.script, "http", serve(t))...)
			w.compare(t, wanted(tt.revision))
		})
		t.Run(tt.name+" over stdio", func(t *testing.T) {
			w := take(t, append(tt.script, "stdio", program.Built(t, program.Fixture))...)
			want := wanted(tt.revision)
			// These clients handle notifications a tick later than answers, and on a pipe both
			// come in one piece: which reports they see says nothing about the server.
			want.Progress = w.Progress
			w.compare(t, want)
		})
	}
	for _, revision := range []string{"2026-07-28", "2025-11-25", "2025-06-18", "2025-03-26"} {
		t.Run("Go, "+revision+" over HTTP", func(t *testing.T) {
			w := takeGo(t, revision, overHTTP(serve(t)))
			w.compare(t, wanted(revision))
		})
		t.Run("Go, "+revision+" over stdio", func(t *testing.T) {
			w := takeGo(t, revision, overPipes(exec.Command(program.Built(t, program.Fixture))))
			w.compare(t, wanted(revision))
		})
	}
}

func TestInspector(t *testing.T) {
	install(t)
	for _, tt := range []struct {
		args []string
		want string
	}{
		{[]string{"--method", "tools/list"}, "test_simple_text"},
		{[]string{"--method", "tools/call", "--tool-name", "test_simple_text"}, "This is a simple text response for testing."},
		{[]string{"--method", "resources/list"}, "test://static-text"},
		{[]string{"--method", "resources/templates/list"}, "test://template/{id}/data"},
		{[]string{"--method", "resources/read", "--uri", "test://static-text"}, "This is the content of the static text resource."},
		{[]string{"--method", "prompts/list"}, "test_simple_prompt"},
		{[]string{"--method", "prompts/get", "--prompt-name", "test_prompt_with_arguments", "--prompt-args", "arg1=a", "arg2=b"}, "arg1='a', arg2='b'"},
	} {
		name := tt.args[1]
		ask := func(t *testing.T, target string) {
			out := node(t, append([]string{filepath.Join("node_modules", ".bin", "mcp-inspector"), "--cli", target}, tt.args...)...)
			if !strings.Contains(out, tt.want) {
				t.Errorf("%s does not say %q:\n%s", name, tt.want, out)
			}
		}
		t.Run(name+" over HTTP", func(t *testing.T) { ask(t, serve(t)) })
		t.Run(name+" over stdio", func(t *testing.T) { ask(t, program.Built(t, program.Fixture)) })
	}
}

// take runs a script and reads what it found.
func take(t *testing.T, script ...string) *walk {
	t.Helper()
	out := node(t, script...)
	var w walk
	if err := json.Unmarshal([]byte(out), &w); err != nil {
		t.Fatalf("the client said no JSON: %v\n%s", err, out)
	}
	return &w
}

// node runs a program with the pinned Node and returns its standard output.
func node(t *testing.T, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), clientTimeout)
	defer cancel()
	var out, complaints bytes.Buffer
	cmd := exec.CommandContext(ctx, filepath.Join("node_modules", ".bin", "node"), args...)
	cmd.Env = append(os.Environ(), "HOME="+t.TempDir()) // the Inspector keeps files there
	cmd.Stdout, cmd.Stderr = &out, &complaints
	cmd.WaitDelay = time.Second
	if err := cmd.Run(); err != nil {
		t.Fatalf("%s: %v\n%s%s", args[0], errors.Join(err, ctx.Err()), complaints.Bytes(), out.Bytes())
	}
	return out.String()
}

// install runs npm ci, unless what is installed already is what the lock file says.
func install(t *testing.T) {
	t.Helper()
	lock, err := os.ReadFile("package-lock.json")
	if err != nil {
		t.Fatal(err)
	}
	stamp := filepath.Join("node_modules", ".installed-lock")
	if have, err := os.ReadFile(stamp); err == nil && bytes.Equal(have, lock) {
		return
	}
	out, err := exec.CommandContext(t.Context(), "npm", "ci", "--no-fund", "--no-audit", "--loglevel=error").CombinedOutput()
	if err != nil {
		t.Fatalf("npm ci: %v; these tests need npm, and the network once\n%s", err, out)
	}
	if err := os.WriteFile(stamp, lock, 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestMain(m *testing.M) { os.Exit(program.Run(m)) }

// serve starts the fixture on HTTP for one test and returns its URL. A server that ended by
// itself fails the test, whatever the client made of it.
func serve(t *testing.T) string {
	t.Helper()
	addr := program.Address(t)
	program.Serve(t, exec.Command(program.Built(t, program.Fixture), "-http="+addr), program.Ready("http://"+addr+"/ready"))
	return "http://" + addr + "/mcp"
}
