package mcpsession

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"newel.dev/newel/call"
)

func never(context.Context, *call.Call) (*call.Result, error) { return call.Text("x"), nil }

// dial opens the stream of a session on a connection of its own, and returns that once it has begun,
// with what it said so far.
func (s *raw) dial(t *testing.T) (net.Conn, string) {
	t.Helper()
	conn, err := (&net.Dialer{}).DialContext(t.Context(), "tcp", strings.TrimPrefix(s.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() }) // it may be closed
	if err := conn.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Fprintf(conn, "GET / HTTP/1.1\r\nHost: x\r\nAccept: text/event-stream\r\nMcp-Session-Id: %s\r\nMcp-Protocol-Version: %s\r\n\r\n", s.id, s.version); err != nil {
		t.Fatal(err)
	}
	var said []byte
	for buf := make([]byte, 512); !strings.Contains(string(said), ": ok\n\n\r\n"); {
		n, err := conn.Read(buf)
		if err != nil {
			t.Fatalf("%v after %q", err, said)
		}
		said = append(said, buf[:n]...)
	}
	return conn, string(said)
}

// until waits for something that happens by itself.
func until(t *testing.T, what string, f func() bool) {
	t.Helper()
	deadline, tick := time.After(20*time.Second), time.NewTicker(5*time.Millisecond)
	defer tick.Stop()
	for !f() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("never: %s", what)
		}
	}
}

// streamsOpen are those that some goroutine still serves, and those that count against their session.
func (w *world) streamsOpen() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.o.Streams.Open() + len(w.streams)
}

// A stream is an answer as HTTP/1.1 has it, from its first byte to its last, though no server writes it.
func TestStreamIsHTTP(t *testing.T) {
	w := newWorld(t, never)
	s := w.raw(t, "2025-11-25", `{}`)
	conn, said := s.dial(t)
	s.send(t, http.MethodDelete, "").Body.Close()
	rest, err := io.ReadAll(conn)
	if err != nil {
		t.Fatalf("the connection did not end: %v", err)
	}
	resp, err := http.ReadResponse(bufio.NewReader(strings.NewReader(said+string(rest))), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body) // fails if the last chunk is missing
	if err != nil || string(body) != ": ok\n\n" {
		t.Errorf("it says %q, %v", body, err)
	}
	if resp.StatusCode != 200 || resp.Header.Get("Content-Type") != "text/event-stream" || resp.Header.Get("X-Accel-Buffering") != "no" || resp.Header.Get("Date") == "" || !resp.Close {
		t.Errorf("its head is %q", said)
	}
	until(t, "nothing of it is left", func() bool { return w.streamsOpen() == 0 })
}

// A client that goes away has its stream end, whether it said too much before or not; then it can listen
// again.
func TestStreamOfAClientThatIsGone(t *testing.T) {
	w := newWorld(t, never, func(o *Options) { o.KeepAlive = 5 * time.Millisecond })
	for _, ahead := range []string{"", "GET / HTTP/1.1\r\n"} {
		s := w.raw(t, "2025-11-25", `{}`)
		for range 2 {
			conn, _ := s.dial(t)
			if _, err := io.WriteString(conn, ahead); err != nil {
				t.Fatal(err)
			}
			if resp := s.send(t, http.MethodGet, ""); resp.StatusCode != http.StatusConflict {
				t.Errorf("a second stream beside it: %d", resp.StatusCode)
			}
			if err := conn.Close(); err != nil {
				t.Fatal(err)
			}
			until(t, "it ended", func() bool { return w.streamsOpen() == 0 })
		}
	}
}

// A client that does not read holds up nobody for longer than a write may take.
func TestStreamOfADeafClient(t *testing.T) {
	w := newWorld(t, never, func(o *Options) { o.WriteTimeout = 50 * time.Millisecond })
	s := w.raw(t, "2025-11-25", `{}`)
	s.dial(t)
	message := []byte(`"` + strings.Repeat("x", 1<<20) + `"`)
	until(t, "its stream ended", func() bool {
		w.tell(s.id, message)
		return w.streamsOpen() == 0
	})
}

// A server that stops has said the last word on its streams when Run returns.
func TestStreamsAtTheEnd(t *testing.T) {
	w := newWorld(t, never)
	var open []*bufio.Reader
	for range 20 {
		conn, said := w.raw(t, "2025-11-25", `{}`).dial(t)
		open = append(open, bufio.NewReader(io.MultiReader(strings.NewReader(said), conn)))
	}
	w.Close()
	w.o.Streams.Wait()
	if n := w.streamsOpen(); n != 0 {
		t.Errorf("%d streams are open", n)
	}
	for _, r := range open {
		resp, err := http.ReadResponse(r, nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadAll(resp.Body); err != nil {
			t.Error(err)
		}
		resp.Body.Close()
	}
}

// A stream stays with its server where the connection is not its own; it does not matter to clients.
func TestStreamsOfAllServers(t *testing.T) {
	w := newWorld(t, never)
	plain := func(h http.Handler) *httptest.Server { return httptest.NewServer(h) }
	type wrapped struct{ http.ResponseWriter }
	for name, start := range map[string]func(http.Handler) *httptest.Server{
		"HTTP/1.1": plain,
		"wrapped": func(h http.Handler) *httptest.Server {
			return plain(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				h.ServeHTTP(struct {
					wrapped
					http.Flusher
				}{wrapped{w}, w.(http.Flusher)}, r)
			}))
		},
		"HTTP/1.1 over TLS": func(h http.Handler) *httptest.Server { return httptest.NewTLSServer(h) },
		"HTTP/2": func(h http.Handler) *httptest.Server {
			srv := httptest.NewUnstartedServer(h)
			srv.EnableHTTP2 = true
			srv.StartTLS()
			return srv
		},
	} {
		t.Run(name, func(t *testing.T) {
			left := make(chan struct{})
			srv := start(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
				defer close(left)
				w.ServeHTTP(rw, r)
			}))
			defer srv.Close()
			s := w.raw(t, "2025-11-25", `{}`)
			r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, srv.URL, nil)
			if err != nil {
				t.Fatal(err)
			}
			r.Header = http.Header{"Accept": {"text/event-stream"}, "Mcp-Session-Id": {s.id}, "Mcp-Protocol-Version": {s.version}}
			resp, err := srv.Client().Do(r)
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			if n, err := io.ReadFull(resp.Body, make([]byte, len(": ok\n\n"))); (resp.ProtoMajor == 2) != (name == "HTTP/2") || err != nil {
				t.Fatalf("%s: %d bytes, %v", resp.Proto, n, err)
			}
			if strings.HasPrefix(name, "HTTP/1.1") {
				<-left // the handler returns while the stream goes on
			}
			w.tell(s.id, []byte(`{"a":1}`))
			s.send(t, http.MethodDelete, "").Body.Close()
			if rest, err := io.ReadAll(resp.Body); err != nil || string(rest) != "event: message\ndata: {\"a\":1}\n\n" {
				t.Errorf("%q, %v", rest, err)
			}
			until(t, "nothing of it is left", func() bool { return w.streamsOpen() == 0 })
		})
	}
}
