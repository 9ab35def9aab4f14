// Package gateway holds tests that put Newel in front of real MCP servers of both eras.
package gateway

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/assembly"
	"newel.dev/newel/internal/backend/mcpupstream"
	"newel.dev/newel/internal/module"
	"newel.dev/newel/internal/secret"
)

// fixture is the conformance fixture, built once.
var fixture string

func TestMain(m *testing.M) {
	if os.Getenv("GATEWAY_TEST_CHILD") != "" {
		outOfTurn() // this very program is a server over stdio
		return
	}
	dir, err := os.MkdirTemp("", "newel-gateway-")
	if err != nil {
		panic(err)
	}
	fixture = filepath.Join(dir, "fixture")
	build := exec.Command("go", "build", "-o", fixture, "../conformance/fixture")
	build.Stderr = os.Stderr
	if err := build.Run(); err != nil {
		panic(err)
	}
	code := m.Run()
	os.RemoveAll(dir)
	os.Exit(code)
}

// startFixture starts the fixture over HTTP and returns its URL.
func startFixture(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	l.Close()
	cmd := exec.Command(fixture, "-http="+addr)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	deadline, again := time.After(10*time.Second), time.NewTicker(10*time.Millisecond)
	defer again.Stop()
	for {
		resp, err := http.Get("http://" + addr + "/ready")
		if err == nil {
			resp.Body.Close()
			if resp.StatusCode == http.StatusOK {
				return "http://" + addr + "/mcp"
			}
		}
		select {
		case <-deadline:
			t.Fatal("the fixture is not ready: ", err)
		case <-again.C:
		}
	}
}

// upstream is one server behind, with its name.
type upstream struct {
	name   string
	config mcpupstream.Config
}

// serve starts a gateway in front of upstreams and returns its URL.
func serve(t *testing.T, upstreams map[string]mcpupstream.Config) string {
	t.Helper()
	var all []upstream
	for _, name := range slices.Sorted(maps.Keys(upstreams)) {
		all = append(all, upstream{name, upstreams[name]})
	}
	return serveOrdered(t, nil, all...)
}

// serveOrdered is serve with an order, and with the log in out if it is not nil.
func serveOrdered(t *testing.T, out io.Writer, upstreams ...upstream) string {
	t.Helper()
	log := logger(t)
	if out != nil {
		log = slog.New(slog.NewTextHandler(out, nil))
	}
	return serveWith(t, assembly.Options{Logger: log}, upstreams...)
}

// serveWith is serve with more options.
func serveWith(t *testing.T, o assembly.Options, upstreams ...upstream) string {
	t.Helper()
	if o.Logger == nil {
		o.Logger = logger(t)
	}
	for _, up := range upstreams {
		u, err := mcpupstream.New(up.name, up.config, module.Env{Dir: ".", Logger: o.Logger})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = u.Close() })
		o.Backends = append(o.Backends, u)
	}
	return serveHouse(t, o)
}

func serveBackends(t *testing.T, log *slog.Logger, backends ...call.Backend) string {
	t.Helper()
	return serveHouse(t, assembly.Options{Backends: backends, Logger: log})
}

func serveHouse(t *testing.T, o assembly.Options) string {
	t.Helper()
	o.Name = "gateway"
	h, err := assembly.Build(t.Context(), &o)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- h.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil && !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
	return "http://" + l.Addr().String() + "/mcp"
}

// plain makes settings of plain text.
func plain(m map[string]string) map[string]secret.String {
	out := map[string]secret.String{}
	for k, v := range m {
		out[k] = secret.New(v)
	}
	return out
}

// syncBuffer is a log that is written and read at once.
type syncBuffer struct {
	mu sync.Mutex
	b  strings.Builder
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}
