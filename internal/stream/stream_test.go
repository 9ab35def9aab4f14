package stream

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
)

// world is a server that answers with f, and says when the handlers of its requests return.
type world struct {
	lines Set
	left  chan struct{}
	srv   *httptest.Server
}

func newWorld(t *testing.T, f func(ctx context.Context, w http.ResponseWriter)) *world {
	t.Helper()
	w := &world{left: make(chan struct{}, 10)}
	w.srv = httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		defer func() { w.left <- struct{}{} }()
		w.lines.Serve(rw, r, slog.New(slog.DiscardHandler), f)
	}))
	t.Cleanup(w.srv.Close)
	return w
}

// dial sends n requests on one connection.
func (w *world) dial(t *testing.T, n int) (net.Conn, *bufio.Reader) {
	t.Helper()
	conn, err := (&net.Dialer{}).DialContext(t.Context(), "tcp", w.srv.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() }) // it may be closed
	if err := conn.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Fprint(conn, strings.Repeat("GET / HTTP/1.1\r\nHost: x\r\n\r\n", n)); err != nil {
		t.Fatal(err)
	}
	return conn, bufio.NewReader(conn)
}

func answer(t *testing.T, from *bufio.Reader) (*http.Response, string, error) {
	t.Helper()
	resp, err := http.ReadResponse(from, nil)
	if err != nil {
		return nil, "", err
	}
	defer resp.Body.Close()
	said, err := io.ReadAll(resp.Body)
	return resp, string(said), err
}

func event(w http.ResponseWriter, text string) {
	w.Header().Set("Content-Type", "text/event-stream")
	_, _ = io.WriteString(w, text) // the client sees what is missing
	w.(http.Flusher).Flush()
}

// What is no event stream is the server's own affair: the next request comes on the same connection.
func TestAnswerThatIsNoStream(t *testing.T) {
	w := newWorld(t, func(_ context.Context, w http.ResponseWriter) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusTeapot)
		_, _ = io.WriteString(w, "{}")
	})
	_, in := w.dial(t, 2)
	for range 2 {
		if resp, said, err := answer(t, in); err != nil || resp.StatusCode != http.StatusTeapot || said != "{}" || resp.Close {
			t.Errorf("%v, %q, %v", resp, said, err)
		}
	}
	w.lines.Wait()
	if n := w.lines.Open(); n != 0 {
		t.Errorf("%d are open", n)
	}
}

// A stream goes on when the handler of its request has returned, and has an end.
func TestStream(t *testing.T) {
	more := make(chan string)
	w := newWorld(t, func(_ context.Context, w http.ResponseWriter) {
		event(w, ": one\n\n")
		for text := range more {
			event(w, text)
		}
	})
	_, in := w.dial(t, 1)
	<-w.left
	if n := w.lines.Open(); n != 1 {
		t.Errorf("%d are open", n)
	}
	more <- ": two\n\n"
	close(more)
	resp, said, err := answer(t, in)
	if err != nil || resp.StatusCode != http.StatusOK || said != ": one\n\n: two\n\n" || !resp.Close || resp.Header.Get("Date") == "" {
		t.Errorf("%v, %q, %v", resp, said, err)
	}
	w.lines.Wait()
	if n := w.lines.Open(); n != 0 {
		t.Errorf("%d are open", n)
	}
}

// A client that goes away ends what is said to it, begun or not, and whatever it sent before.
func TestClientGone(t *testing.T) {
	for name, begin := range map[string]func(http.ResponseWriter){
		"before it began": func(http.ResponseWriter) {},
		"later":           func(w http.ResponseWriter) { event(w, ": one\n\n") },
	} {
		t.Run(name, func(t *testing.T) {
			begun, over := make(chan struct{}), make(chan struct{})
			w := newWorld(t, func(ctx context.Context, w http.ResponseWriter) {
				begin(w)
				close(begun)
				<-ctx.Done()
				close(over)
			})
			conn, _ := w.dial(t, 1)
			<-begun
			if err := conn.Close(); err != nil {
				t.Error(err)
			}
			<-over
			<-w.left
			w.lines.Wait()
		})
	}
}

// What breaks down has no end: the client sees that something is missing.
func TestBreakdown(t *testing.T) {
	for name, begin := range map[string]func(http.ResponseWriter){
		"before it began": func(http.ResponseWriter) {},
		"later":           func(w http.ResponseWriter) { event(w, ": one\n\n") },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, func(_ context.Context, w http.ResponseWriter) {
				begin(w)
				panic("broken")
			})
			_, in := w.dial(t, 1)
			if resp, said, err := answer(t, in); err == nil {
				t.Errorf("%s, %q, as if nothing was missing", resp.Status, said)
			}
			w.lines.Wait()
		})
	}
}
