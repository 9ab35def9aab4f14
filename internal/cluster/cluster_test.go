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
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"newel.dev/newel/internal/egress"
)

// nowhere is the store of nodes that are told of each other otherwise.
type nowhere struct{ Store }

// longest is how long a test waits for what has to happen.
const longest = 20 * time.Second

// front returns the address of a node that passes everything on to another one.
func front(t *testing.T, to string, p Patience, failed func(w http.ResponseWriter, err error)) string {
	t.Helper()
	c, err := New(Options{Address: "http://127.0.0.1:1", Key: make([]byte, 32), Store: nowhere{}, Transport: egress.Transport(egress.Options{Loopback: true})})
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c.Forward(w, r, Node{Name: "other", Address: to}, "s", nil, p, func(err error) { failed(w, err) })
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
			to := front(t, c.to, Patience{100 * time.Millisecond, longest}, func(w http.ResponseWriter, err error) {
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
	limit := Patience{200 * time.Millisecond, longest}
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

// An answer of a node that says nothing any more breaks off, whatever it is: what came before is there, and
// its end is not.
func TestFrozenAnswer(t *testing.T) {
	for name, head := range map[string]string{
		"a stream":           "Content-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n",
		"within a chunk":     "Content-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n8\r\nhalf",
		"an answer":          "Content-Type: application/json\r\nContent-Length: 8\r\n\r\nhalf",
		"without its length": "Content-Type: application/json\r\n\r\nhalf",
	} {
		t.Run(name, func(t *testing.T) {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			left := make(chan error, 1) // how the other node finds that nobody reads any more
			go func() {
				c, err := l.Accept()
				if err != nil {
					left <- err
					return
				}
				defer c.Close()
				in := bufio.NewReader(c)
				r, err := http.ReadRequest(in)
				if err == nil {
					_, err = io.Copy(io.Discard, r.Body)
				}
				if err == nil {
					_, err = io.WriteString(c, "HTTP/1.1 200 OK\r\n"+head)
				}
				if err == nil {
					_, err = in.ReadByte()
				}
				left <- err
			}()
			to := front(t, "http://"+l.Addr().String(), Patience{longest, 100 * time.Millisecond}, func(_ http.ResponseWriter, err error) { t.Error(err) })
			resp := post(t, to, "{}")
			said, err := io.ReadAll(resp.Body)
			if string(said) != "half" || !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Errorf("it says %q, %v", said, err)
			}
			if err := <-left; !errors.Is(err, io.EOF) && !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("the other node was left with %v", err)
			}
		})
	}
}

// Any byte is a sign of life, and only a wait for the next counts: not what the client takes to read.
func TestSignsOfLife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const quiet = time.Minute
		body, node := io.Pipe()
		froze := make(chan time.Time, 1)
		w := watch(body, quiet, func() {
			froze <- time.Now()
			_ = node.CloseWithError(errFroze)
		})
		go func() {
			for range 100 {
				time.Sleep(quiet - 1)
				_, _ = node.Write([]byte{':'}) // it is read
			}
		}()
		var b [1]byte
		for i := range 100 {
			if _, err := w.Read(b[:]); err != nil {
				t.Fatalf("after %d: %v", i, err)
			}
		}
		time.Sleep(10 * quiet) // the client takes its time
		waits := time.Now()
		if _, err := w.Read(b[:]); !errors.Is(err, errFroze) {
			t.Errorf("it goes on: %v", err)
		}
		if at := <-froze; at.Sub(waits) != quiet {
			t.Errorf("given up after %v", at.Sub(waits))
		}
	})
}

// told is a store that nodes tell that they are there, and that may fail.
type told struct {
	Store
	alive, kept int
	err         error
}

// Alive implements Store.
func (s *told) Alive(context.Context, Node, time.Duration) error {
	s.alive++
	return s.err
}

// Keep implements Store.
func (s *told) Keep(context.Context, Session, time.Duration) (bool, error) {
	s.kept++
	return s.err == nil, s.err
}

// A node that may have counted as gone is in another term, and says that it is there before it is asked for
// that; while the store is away it does so once a second.
func TestTerms(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &told{}
		c, err := New(Options{Address: "http://127.0.0.1:1", Key: make([]byte, 32), Store: s, Transport: egress.Transport(egress.Options{})})
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		first := c.Term(t.Context())
		for range 10 {
			time.Sleep(aliveFor - 1)
			if err := c.Start(t.Context()); err != nil || c.Term(t.Context()) != first {
				t.Errorf("it was there all the time: %d, then %d, %v", first, c.Term(t.Context()), err)
			}
		}
		said := s.alive
		time.Sleep(aliveFor + 1)
		second := c.Term(t.Context())
		if second == first || s.alive != said+1 {
			t.Errorf("it was gone: %d, then %d; it said %d times that it is back", first, second, s.alive-said)
		}
		time.Sleep(aliveFor)
		if now := c.Term(t.Context()); now != second {
			t.Errorf("it is there again: %d, then %d", second, now)
		}
		time.Sleep(time.Nanosecond)
		if err := c.Start(t.Context()); err != nil || c.Term(t.Context()) == second {
			t.Errorf("it was gone, and said that it is there: still %d, %v", second, err)
		}

		s.err, s.alive = errors.New("the store is away"), 0
		time.Sleep(aliveFor + 1)
		third := c.Term(t.Context())
		for range 300 { // 3 s
			time.Sleep(10 * time.Millisecond)
			if _, err := c.Keep(t.Context(), Session{}, time.Minute); err == nil || c.Term(t.Context()) != third {
				t.Fatalf("the store is away: %d, then %d, %v", third, c.Term(t.Context()), err)
			}
		}
		if s.alive < 2 || s.alive > 4 || s.kept < 2 || s.kept > 4 {
			t.Errorf("in 3 s the store was told %d times that the node is there, and asked %d times to keep something", s.alive, s.kept)
		}
		s.err = nil
		time.Sleep(2 * storeTime)
		if mine, err := c.Keep(t.Context(), Session{}, time.Minute); !mine || err != nil || c.Term(t.Context()) == third {
			t.Errorf("the store is back: %d still, %v, %v", third, mine, err)
		}
	})
}
