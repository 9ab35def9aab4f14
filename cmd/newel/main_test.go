package main

import (
	"bufio"
	"bytes"
	"context"
	"flag"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"newel.dev/newel/internal/config"
	"newel.dev/newel/modules/standard"
)

var update = flag.Bool("update", false, "rewrite docs/reference")

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"newel": main})
}

// TestScripts runs testdata/script/*.txtar: what people type, and what they see. The command
// "server" starts newel serve on a free port and sets URL, "stop" stops it; "taken" takes a port and sets ADDR.
func TestScripts(t *testing.T) {
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Setup: func(e *testscript.Env) error {
			e.Setenv("ROOT", root)
			e.Values["stop"] = new(func())
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"server": startServer,
			"stop": func(ts *testscript.TestScript, _ bool, _ []string) {
				stop, _ := ts.Value("stop").(*func())
				(*stop)()
			},
			"taken": func(ts *testscript.TestScript, _ bool, _ []string) {
				l, err := net.Listen("tcp", "127.0.0.1:0") //nolint:noctx // ends with the script
				ts.Check(err)
				ts.Defer(func() { _ = l.Close() })
				ts.Setenv("ADDR", l.Addr().String())
			},
		},
	})
}

// startServer starts newel serve with more arguments, waits for its URL and stops it with the script.
func startServer(ts *testscript.TestScript, _ bool, args []string) {
	ctx, cancel := context.WithCancel(context.Background())
	exe, err := exec.LookPath("newel")
	ts.Check(err)
	cmd := exec.CommandContext(ctx, exe, append([]string{"serve", "--listen", "127.0.0.1:0"}, args...)...)
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.Dir = ts.MkAbs(".")
	var logs bytes.Buffer
	cmd.Stderr = &logs
	out, err := cmd.StdoutPipe()
	ts.Check(err)
	ts.Check(cmd.Start())
	stop := sync.OnceFunc(func() {
		cancel()
		if err := cmd.Wait(); err != nil {
			ts.Logf("newel serve: %v\n%s", err, &logs)
		}
	})
	ts.Defer(stop)
	now, _ := ts.Value("stop").(*func())
	*now = stop
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		if url, ok := strings.CutPrefix(lines.Text(), "Serving MCP at "); ok {
			ts.Setenv("URL", strings.TrimSpace(url))
			go func() { // what follows is read, so that the server does not wait
				for lines.Scan() {
				}
			}()
			return
		}
	}
	ts.Fatalf("the server did not start: %s", &logs)
}

func TestReferenceIsCurrent(t *testing.T) {
	const page = "../../docs/reference/configuration.md"
	want := config.Reference(standard.Modules())
	if *update {
		if err := os.WriteFile(page, []byte(want), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(page)
	if err != nil || string(got) != want {
		t.Errorf("%s is stale (%v); run go test ./cmd/newel -update", page, err)
	}
}

func TestExampleConfigurationIsGood(t *testing.T) {
	src, err := os.ReadFile("../../newel.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := config.Load("newel.yaml", src, standard.Modules(), nil); err != nil {
		t.Error(err)
	}
}
