// Package gateway holds tests that put Newel in front of real MCP servers of both eras.
package gateway

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"maps"
	"net"
	"os"
	"os/exec"
	"slices"
	"testing"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/assembly"
	"newel.dev/newel/internal/backend/mcpupstream"
	"newel.dev/newel/internal/module"
	"newel.dev/newel/internal/secret"
	"newel.dev/newel/test/program"
)

func TestMain(m *testing.M) {
	if os.Getenv("GATEWAY_TEST_CHILD") != "" {
		outOfTurn() // this very program is a server over stdio
		return
	}
	os.Exit(program.Run(m))
}

// startFixture starts the fixture over HTTP and returns its URL.
func startFixture(t *testing.T) string {
	t.Helper()
	addr := program.Address(t)
	p := program.Serve(t, exec.Command(program.Built(t, program.Fixture), "-http="+addr), program.Ready("http://"+addr+"/ready"))
	t.Cleanup(p.Kill)
	return "http://" + addr + "/mcp"
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
