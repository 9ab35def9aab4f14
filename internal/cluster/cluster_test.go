package cluster

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"newel.dev/newel/internal/egress"
)

// nowhere is the store of nodes that are told of each other otherwise.
type nowhere struct{ Store }

// longest is how long a test waits for what has to happen.
const longest = 20 * time.Second

// front returns the address of a node that passes everything on to another one.
func front(t *testing.T, to string, limit time.Duration, failed func(w http.ResponseWriter, err error)) string {
	t.Helper()
	c, err := New(Options{Address: "http://127.0.0.1:1", Key: make([]byte, 32), Store: nowhere{}, Transport: egress.Transport(egress.Options{Loopback: true})})
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c.Forward(w, r, Node{Name: "other", Address: to}, "s", nil, limit, func(err error) { failed(w, err) })
	}))
	t.Cleanup(srv.Close)
	return srv.URL
}

// silent listens and takes connections, and never says anything. With reads it reads what comes.
func silent(t *testing.T, reads bool) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			t.Cleanup(func() { _ = c.Close() })
			if reads {
				go func() { _, _ = io.Copy(io.Discard, c) }()
			}
		}
	}()
	return "http://" + l.Addr().String()
}

func post(t *testing.T, to, body string) *http.Response {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), longest)
	t.Cleanup(cancel)
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, to, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.DefaultTransport.RoundTrip(r)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = resp.Body.Close() })
	return resp
}

// A node that takes a request and never answers is given up, also one that does not even read it. One
// that nobody can reach is another matter.
func TestSilentNode(t *testing.T) {
	closed := silent(t, true)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	refuses := "http://" + l.Addr().String()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		to, body string
		silent   bool
	}{
		"reads":          {closed, "{}", true},
		"does not read":  {silent(t, false), strings.Repeat("x", 16<<20), true}, // more than kernels keep
		"is not there":   {refuses, "{}", false},
		"has no address": {"http://[", "{}", false},
	} {
		t.Run(name, func(t *testing.T) {
			why := make(chan error, 1)
			to := front(t, c.to, 100*time.Millisecond, func(w http.ResponseWriter, err error) {
				why <- err
				w.WriteHeader(http.StatusTeapot)
			})
			if resp := post(t, to, c.body); resp.StatusCode != http.StatusTeapot {
				t.Errorf("answered %s", resp.Status)
			}
			if err := <-why; errors.Is(err, ErrSilent) != c.silent {
				t.Errorf("it ended because of: %v", err)
			}
		})
	}
}

// A stream that has begun goes on for as long as it likes.
func TestOpenStream(t *testing.T) {
	more := make(chan string)
	other := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get(header) == "" {
			t.Error("it does not say who sent it")
		}
		w.Header().Set("Content-Type", "text/event-stream")
		_ = http.NewResponseController(w).Flush()
		for line := range more {
			_, _ = io.WriteString(w, line)
			_ = http.NewResponseController(w).Flush()
		}
	}))
	defer other.Close()
	const limit = 200 * time.Millisecond
	stream := post(t, front(t, other.URL, limit, func(_ http.ResponseWriter, err error) { t.Error(err) }), "{}")
	if stream.StatusCode != http.StatusOK {
		t.Fatal(stream.Status)
	}
	// Another request under the same limit, which began after it, is given up meanwhile: its time is over.
	over := make(chan struct{})
	post(t, front(t, silent(t, true), limit, func(w http.ResponseWriter, _ error) {
		close(over)
		w.WriteHeader(http.StatusGatewayTimeout)
	}), "{}")
	<-over
	lines := bufio.NewScanner(stream.Body)
	for _, want := range []string{"data: one", "data: two"} {
		more <- want + "\n"
		if !lines.Scan() || lines.Text() != want {
			t.Fatalf("the stream says %q, %v; want %q", lines.Text(), lines.Err(), want)
		}
	}
	close(more)
	if lines.Scan() || lines.Err() != nil {
		t.Errorf("after its end: %q, %v", lines.Text(), lines.Err())
	}
}
