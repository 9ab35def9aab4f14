package access

import (
	"context"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/assembly"
	"newel.dev/newel/internal/backend/mcpupstream"
	"newel.dev/newel/internal/egress"
	"newel.dev/newel/internal/identity/exchange"
	"newel.dev/newel/internal/module"
)

// gateway serves w's server, as "up", and a tool of its own, "mine".
func (w *world) gateway(file string) *world {
	t := w.t
	t.Helper()
	u, err := mcpupstream.New("up", mcpupstream.Config{URL: w.base + "/mcp", Auth: &mcpupstream.Auth{}, Access: w.access(file).Transport}, module.Env{Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	h, err := assembly.Build(t.Context(), &assembly.Options{Name: "gateway", Logger: slog.New(slog.DiscardHandler), Backends: []call.Backend{u, tools{tool("mine", call.Read)}}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := u.Close(); err != nil {
			t.Error(err)
		}
	})
	serve(t, l, h)
	return &world{t: t, base: "http://" + l.Addr().String()}
}

// access is what newel login and the gateway make of the same configuration.
func (w *world) access(file string) *exchange.Client {
	w.t.Helper()
	c, err := exchange.New(exchange.Options{
		Name: `the server "up" behind this`, Server: w.base + "/mcp", File: file, Login: "newel login --upstream up", HTTP: egress.Client(egress.Options{Loopback: true}),
	})
	if err != nil {
		w.t.Fatal(err)
	}
	return c
}

// operator logs in as somebody, as newel login --upstream does.
func (w *world) operator(file, user string) {
	w.t.Helper()
	c := w.access(file)
	c.Forget()
	r, err := http.NewRequestWithContext(w.t.Context(), http.MethodGet, w.base+"/mcp", nil)
	if err != nil {
		w.t.Fatal(err)
	}
	if resp, err := c.Transport(http.DefaultTransport).RoundTrip(r); err == nil {
		resp.Body.Close()
		w.t.Fatal("nobody asked who is calling")
	}
	login(w.t, c, user)
}

// answers calls a tool until its answer holds want.
func (w *world) answers(name, want string) {
	w.t.Helper()
	ctx, stop := context.WithTimeout(w.t.Context(), 20*time.Second)
	defer stop()
	again := time.NewTicker(20 * time.Millisecond)
	defer again.Stop()
	for {
		r := w.stateless("", "tools/call", name, "{}")
		if strings.Contains(r.body, want) {
			return
		}
		select {
		case <-ctx.Done():
			w.t.Fatalf("%s: want %q, the last answer is %+v", name, want, r)
		case <-again.C:
		}
	}
}

// A gateway in front of a server that asks for tokens: without a login its other tools work; with
// one its operator is who calls, whatever the caller sends; another login counts without a restart.
func TestGatewayAsClient(t *testing.T) {
	w := start(t)
	file := filepath.Join(t.TempDir(), "up.json")
	g := w.gateway(file)
	if r := g.stateless("", "tools/call", "mine", "{}"); r.status != http.StatusOK || !strings.Contains(r.body, "nobody") {
		t.Errorf("a tool of its own: %+v", r)
	}
	if r := g.stateless("", "tools/list", "", ""); !strings.Contains(r.body, "mine") || strings.Contains(r.body, "admin") {
		t.Errorf("the list: %s", r.body)
	}
	w.operator(file, "alice")
	g.answers("read", "alice")
	stranger := w.token("eve", "a:read")
	if r := g.stateless(stranger, "tools/call", "read", "{}"); !strings.Contains(r.body, "alice") || strings.Contains(r.body, "eve") {
		t.Errorf("the caller's token went through: %+v", r)
	}
	w.operator(file, "bob")
	g.answers("read", "bob")
}
