// Package stream lets event streams leave the HTTP server that their request came to.
//
// Streams that clients listen on are many, and silent for most of their life. What an HTTP server
// holds for a request that runs (its buffers, and the stack of all that the request went through) is
// more than the rest of a stream. So the answer takes its connection out of the server when it
// begins (http.Hijacker), and the handler returns: what stays is a goroutine that waits for the end,
// and one that waits for the client to go away.
//
// Start reading at [Set.Serve]. An answer that is no event stream stays with the server, and so do
// streams where the connection is not their own.
package stream

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"time"
)

const (
	// partingTimeout is how long the last bytes of a stream may take, and how long Wait waits for them.
	partingTimeout = 5 * time.Second
	// lingerTimeout is for the client to close a connection on which all was said.
	lingerTimeout = 500 * time.Millisecond
)

// Serve calls f to answer r, and returns when w is not needed any more: f may go on then, with an event
// stream. Its context has what that of the request has, and ends when the client goes away. Only one
// goroutine at a time may use its writer; log is told of panics.
func (s *Set) Serve(w http.ResponseWriter, r *http.Request, log *slog.Logger, f func(ctx context.Context, w http.ResponseWriter)) {
	// Whoever wraps w and does not offer the connection itself may count on what is written through it.
	// HTTP/1.0 has no chunks, and in HTTP/2 a connection is not a stream's own.
	server, ok := w.(http.Hijacker)
	if !ok || r.ProtoMajor != 1 || r.ProtoMinor < 1 {
		f(r.Context(), w)
		return
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(r.Context())) // that ends with the handler
	taken, served := make(chan struct{}), make(chan bool, 1)
	out := &line{ResponseWriter: w, server: server, taken: taken, gone: cancel}
	s.begin()
	go s.serve(ctx, cancel, out, log, f, served)
	for gone := r.Context().Done(); ; gone = nil {
		select {
		case <-gone:
			cancel()
		case <-taken:
			return
		case ok := <-served:
			if !ok {
				panic(http.ErrAbortHandler) // it was logged
			}
			return
		}
	}
}

// serve calls f for an answer that may take its connection. It says whether it ended well.
func (s *Set) serve(ctx context.Context, cancel context.CancelFunc, out *line, log *slog.Logger, f func(context.Context, http.ResponseWriter), served chan<- bool) {
	ok := false
	defer cancel()
	defer func() {
		if v := recover(); v != nil { // nobody else would
			log.LogAttrs(ctx, slog.LevelError, "a stream failed", slog.Any("panic", v), slog.String("stack", string(debug.Stack())))
		}
		out.part(ok)
		s.end()
		served <- ok
		out.close()
	}()
	f(ctx, out)
	ok = true
}

// A line is an answer that takes its connection out of the HTTP server if it is an event stream: what is
// written then are chunks (RFC 9112, section 7.1), sent at once.
type line struct {
	http.ResponseWriter                    // of the server, until the connection is taken
	server              http.Hijacker      // has the connection until it is asked for
	taken               chan struct{}      // closed then
	gone                context.CancelFunc // called when the client is
	conn                net.Conn           // nil until it is taken
	head                []byte             // of the answer, while it is to be sent
	broken              error              // why a write failed; what would follow makes no sense
	watching            sync.WaitGroup
}

// take takes the connection from its server and begins the answer, which is sent with what
// is written first. It reports whether that was possible.
func (l *line) take(h http.Header, status int) bool {
	conn, ahead, err := l.server.Hijack()
	l.server = nil
	if err != nil {
		return false
	}
	l.conn = conn
	defer close(l.taken)
	l.ResponseWriter = nowhere{}
	if ahead.Reader.Buffered() == 0 { // else the next request is there already, and is not read
		l.watching.Go(l.watch)
	}
	h.Set("Date", time.Now().UTC().Format(http.TimeFormat))
	h.Set("Connection", "close")
	h.Set("Transfer-Encoding", "chunked")
	var b bytes.Buffer
	fmt.Fprintf(&b, "HTTP/1.1 %d %s\r\n", status, http.StatusText(status))
	_ = h.Write(&b) // memory
	b.WriteString("\r\n")
	l.head = b.Bytes()
	return true
}

// send writes all of b, and the head if it is to be sent, unless a write failed before.
func (l *line) send(b []byte) error {
	if l.broken != nil {
		return l.broken
	}
	if l.head != nil {
		b, l.head = append(l.head, b...), nil
	}
	if _, l.broken = l.conn.Write(b); l.broken != nil {
		l.gone()
	}
	return l.broken
}

// watch waits for the client to go away. Clients say nothing on a stream; one that does is not read
// from any further, and then seen to have gone when it is written to, as in net/http.
func (l *line) watch() {
	if _, err := l.conn.Read(make([]byte, 1)); err != nil {
		l.gone()
	}
}

// WriteHeader implements http.ResponseWriter.
func (l *line) WriteHeader(status int) {
	if l.server == nil { // it was asked for
		l.ResponseWriter.WriteHeader(status)
		return
	}
	if h := l.Header(); !strings.HasPrefix(h.Get("Content-Type"), "text/event-stream") || !l.take(h, status) {
		l.server = nil
		l.ResponseWriter.WriteHeader(status)
	}
}

// Write implements http.ResponseWriter.
func (l *line) Write(p []byte) (int, error) {
	if l.server != nil {
		l.WriteHeader(http.StatusOK)
	}
	if l.conn == nil {
		return l.ResponseWriter.Write(p)
	}
	if len(p) == 0 {
		return 0, nil // that would be the last one
	}
	b := strconv.AppendInt(make([]byte, 0, len(p)+20), int64(len(p)), 16)
	b = append(append(append(b, "\r\n"...), p...), "\r\n"...)
	if err := l.send(b); err != nil {
		return 0, err
	}
	return len(p), nil
}

// Flush implements http.Flusher: what was written is sent, the head may not be.
func (l *line) Flush() {
	switch {
	case l.conn == nil:
		_ = http.NewResponseController(l.ResponseWriter).Flush() // best effort
	case l.head != nil:
		_ = l.send(nil) // what comes next fails as well
	}
}

// SetWriteDeadline is for http.ResponseController.
func (l *line) SetWriteDeadline(t time.Time) error {
	if l.conn == nil {
		return http.NewResponseController(l.ResponseWriter).SetWriteDeadline(t)
	}
	return l.conn.SetWriteDeadline(t)
}

// nowhere is what is left to be said to a server that has let go of a connection.
type nowhere struct{}

// Header implements http.ResponseWriter; the headers are sent.
func (nowhere) Header() http.Header { return http.Header{} }

// WriteHeader implements http.ResponseWriter; the status is sent.
func (nowhere) WriteHeader(int) {}

// Write implements http.ResponseWriter.
func (nowhere) Write([]byte) (int, error) { return 0, http.ErrHijacked }

// part says the last word, unless something went wrong: then the client is to see that it is missing.
func (l *line) part(ok bool) {
	if l.conn == nil || !ok {
		return
	}
	_ = l.conn.SetWriteDeadline(time.Now().Add(partingTimeout))
	if l.send([]byte("0\r\n\r\n")) != nil {
		return
	}
	if half, ok := l.conn.(interface{ CloseWrite() error }); ok {
		_ = half.CloseWrite() // close does it otherwise
	}
}

// close closes the connection once the client has read everything: closed before, what is on its way
// might be lost.
func (l *line) close() {
	if l.conn == nil {
		return
	}
	if l.broken == nil {
		_ = l.conn.SetReadDeadline(time.Now().Add(lingerTimeout))
		l.watching.Wait()
	}
	_ = l.conn.Close() // nothing is lost
	l.watching.Wait()
}

// A Set counts streams that may have left their HTTP server, which does not wait for those. The zero
// value is ready. It is safe for concurrent use.
type Set struct {
	mu   sync.Mutex // guards what is below
	open int
	none chan struct{} // not nil while somebody waits; closed when none is open
}

func (s *Set) begin() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.open++
}

func (s *Set) end() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.open--; s.open == 0 && s.none != nil {
		close(s.none)
		s.none = nil
	}
}

// Open returns how many there are.
func (s *Set) Open() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.open
}

// Wait waits until none is open, or for five seconds: then they have been told that it ends.
func (s *Set) Wait() {
	s.mu.Lock()
	none := s.none
	if none == nil {
		none = make(chan struct{})
		if s.open == 0 {
			close(none)
		} else {
			s.none = none
		}
	}
	s.mu.Unlock()
	limit := time.NewTimer(partingTimeout)
	defer limit.Stop()
	select {
	case <-none:
	case <-limit.C:
	}
}
