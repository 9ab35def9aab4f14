package assembly

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"runtime"
	"strings"
	"testing"
	"time"
)

// guarding serves handler on a guarded listener and returns its address.
func guarding(t *testing.T, o Connections, proxies []netip.Prefix, handler http.HandlerFunc) (*guarded, string) {
	t.Helper()
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if o, err = o.withDefaults(); err != nil {
		t.Fatal(err)
	}
	g := newGuarded(l, o, proxies, slog.New(slog.DiscardHandler))
	srv := &http.Server{Handler: handler, ReadHeaderTimeout: o.Header}
	done := make(chan error, 1)
	go func() { done <- srv.Serve(g) }()
	t.Cleanup(func() {
		_ = srv.Close()
		if err := <-done; !errors.Is(err, http.ErrServerClosed) {
			t.Error(err)
		}
	})
	return g, l.Addr().String()
}

// from connects from an address of this machine.
func from(t *testing.T, ip, to string) net.Conn {
	t.Helper()
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(ip)}}
	c, err := d.DialContext(t.Context(), "tcp", to)
	switch {
	case err != nil && runtime.GOOS != "linux":
		t.Skipf("this machine has no address %s: %v", ip, err)
	case err != nil:
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// served reports whether a connection is served, as opposed to closed.
func served(t *testing.T, c net.Conn) bool {
	t.Helper()
	if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	fmt.Fprint(c, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	return err == nil && resp.Body.Close() == nil && resp.StatusCode == http.StatusOK
}

func ok(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "ok") }

func TestConnectionsOfOneClient(t *testing.T) {
	g, addr := guarding(t, Connections{Max: 4, PerPeer: 2}, nil, ok)
	first := from(t, "127.0.0.2", addr)
	if !served(t, first) || !served(t, from(t, "127.0.0.2", addr)) {
		t.Fatal("within the limit a connection is refused")
	}
	if served(t, from(t, "127.0.0.2", addr)) {
		t.Error("a third connection of one client is served")
	}
	for range 2 {
		if !served(t, from(t, "127.0.0.3", addr)) {
			t.Error("its neighbour is refused")
		}
	}
	if served(t, from(t, "127.0.0.4", addr)) {
		t.Error("a fifth connection is served")
	}
	if g.turned.Load() != 2 {
		t.Errorf("%d were counted", g.turned.Load())
	}
	_ = first.Close()
	until(t, "the place is free again", func() bool { return served(t, from(t, "127.0.0.2", addr)) })
}

// A proxy carries the connections of many clients.
func TestConnectionsOfAProxy(t *testing.T) {
	g, addr := guarding(t, Connections{PerPeer: 1}, []netip.Prefix{netip.MustParsePrefix("127.0.0.2/32")}, ok)
	for range 3 {
		if !served(t, from(t, "127.0.0.2", addr)) || !served(t, from(t, "127.0.0.1", addr)) {
			t.Fatal("the proxy, or this machine beside it, is refused")
		}
	}
	until(t, "all are counted", func() bool { g.mu.Lock(); defer g.mu.Unlock(); return g.open == 6 && len(g.perPeer) == 0 })
}

// Who asks and does not read is cut, however small each answer is.
func TestDeafClient(t *testing.T) {
	blocked := make(chan error, 1000)
	_, addr := guarding(t, Connections{Write: 200 * time.Millisecond}, nil, func(w http.ResponseWriter, _ *http.Request) {
		_, err := io.WriteString(w, strings.Repeat("x", 60_000))
		select {
		case blocked <- err:
		default:
		}
	})
	c := from(t, "127.0.0.1", addr)
	if err := c.(*net.TCPConn).SetReadBuffer(4 << 10); err != nil {
		t.Fatal(err)
	}
	go func() { _, _ = io.WriteString(c, strings.Repeat("GET / HTTP/1.1\r\nHost: x\r\n\r\n", 1000)) }() // until it is closed
	for limit := time.After(20 * time.Second); ; {
		select {
		case err := <-blocked:
			if err != nil {
				return
			}
		case <-limit:
			t.Fatal("the connection is held")
		}
	}
}

// A deadline of a handler's own counts, and the connection has its own again after it.
func TestOwnDeadline(t *testing.T) {
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	g := newGuarded(nil, Connections{Write: time.Hour}, nil, slog.New(slog.DiscardHandler))
	c := &guardedConn{Conn: a, g: g}
	if err := c.SetWriteDeadline(time.Now().Add(-time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Write([]byte("x")); err == nil {
		t.Error("the handler's deadline does not count")
	}
	if err := c.SetWriteDeadline(time.Time{}); err != nil {
		t.Fatal(err)
	}
	go func() { _, _ = io.Copy(io.Discard, b) }() // until it is closed
	if n, err := c.Write(make([]byte, 3*writeStep+1)); n != 3*writeStep+1 || err != nil {
		t.Errorf("%d written, %v", n, err)
	}
}

func TestConnectionsBelowZero(t *testing.T) {
	if _, err := (Connections{Write: -1}).withDefaults(); err == nil {
		t.Error("a limit below zero is taken")
	}
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	h, err := Build(t.Context(), &Options{Name: "x", Limits: Limits{Connections: Connections{PerPeer: -1}}})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := h.Serve(ctx, l); err == nil || !strings.Contains(err.Error(), "below zero") {
		t.Errorf("it serves with a limit below zero: %v", err)
	}
}
