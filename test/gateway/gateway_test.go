// Package gateway holds tests that put Newel in front of real MCP servers of both eras.
package gateway

import (
	"context"
	"errors"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/assembly"
	"newel.dev/newel/internal/backend/mcpupstream"
	"newel.dev/newel/internal/module"
)

// fixture is the conformance fixture, built once.
var fixture string

func TestMain(m *testing.M) {
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

// serve starts a gateway in front of upstreams and returns its URL.
func serve(t *testing.T, upstreams map[string]mcpupstream.Config) string {
	t.Helper()
	var backends []call.Backend
	for name, c := range upstreams {
		u, err := mcpupstream.New(name, c, module.Env{Dir: ".", Logger: logger(t)})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = u.Close() })
		backends = append(backends, u)
	}
	h, err := assembly.Build(t.Context(), &assembly.Options{Name: "gateway", Backends: backends, Logger: logger(t)})
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
