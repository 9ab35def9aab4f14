package mcpsession

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"runtime/debug"
	"strconv"
	"sync"
	"time"

	"newel.dev/newel/internal/mcpwire"
)

// Streams that clients listen on are many, and silent for most of their life. What an HTTP server
// holds for a request that runs (its buffers, and the stack of all that the request went through) is
// more than the rest of a session. So the answer takes its connection out of the server when it
// begins (http.Hijacker), and the handler returns: what stays is a goroutine that waits in the SDK for
// the end, and one that waits for the client to go away.

const (
	// partingTimeout is how long the last bytes of a stream may take, and how long Run waits for them.
	partingTimeout = 5 * time.Second
	// lingerTimeout is for the client to close a connection on which all was said.
	lingerTimeout = 500 * time.Millisecond
)

// stream serves a GET: what is said in a session beside the answers to its requests, or what was
// missed of one. It returns when w is not needed any more; the stream may go on.
func (d *Door) stream(w http.ResponseWriter, r *http.Request, out *writer, session string) {
	// Whoever wraps w and does not offer the connection itself may count on what is written through it.
	// HTTP/1.0 has no chunks, and in HTTP/2 a connection is not a stream's own.
	server, ok := w.(http.Hijacker)
	if !ok || r.ProtoMajor != 1 || r.ProtoMinor < 1 {
		ctx, cancel := context.WithCancel(r.Context())
		d.serveStream(ctx, cancel, out, r, session)
		return
	}
	ctx := context.Background() // that of the request ends with the handler
	if who := mcpwire.PrincipalOf(r.Context()); who != nil {
		ctx = mcpwire.WithPrincipal(ctx, who)
	}
	ctx, cancel := context.WithCancel(ctx)
	taken, served := make(chan struct{}), make(chan bool, 1)
	out.line = &line{server: server, taken: taken, gone: cancel}
	d.lines.begin()
	go d.serveLine(ctx, cancel, out, r, session, served)
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

// serveLine is serveStream for a stream that may take its connection. It says whether it ended well.
func (d *Door) serveLine(ctx context.Context, cancel context.CancelFunc, out *writer, r *http.Request, session string, served chan<- bool) {
	ok := false
	defer func() {
		if v := recover(); v != nil { // nobody else would
			d.o.Logger.LogAttrs(ctx, slog.LevelError, "a stream failed", slog.Any("panic", v), slog.String("stack", string(debug.Stack())))
		}
		out.line.part(ok)
		d.lines.end()
		served <- ok
		out.line.close()
	}()
	d.serveStream(ctx, cancel, out, r, session)
	ok = true
}

// serveStream has the SDK serve a GET until the stream ends or ctx does.
func (d *Door) serveStream(ctx context.Context, cancel context.CancelFunc, out *writer, r *http.Request, session string) {
	defer cancel()
	defer d.done(session)
	if d.o.Cluster != nil {
		out.had = d.had(session)
		defer context.AfterFunc(out.had, cancel)()
	}
	defer out.keepAlive(d.o.KeepAlive)()
	defer d.listen(session, out.event)()
	d.handler.ServeHTTP(out, r.WithContext(ctx))
	out.finish()
}

// A line is the connection of a stream, once it was taken out of its HTTP server: an
// http.ResponseWriter whose writes are chunks (RFC 9112, section 7.1) and sent at once. Only one
// goroutine at a time may use it.
type line struct {
	server   http.Hijacker      // has the connection until it is taken
	taken    chan struct{}      // closed then
	gone     context.CancelFunc // called when the client is
	conn     net.Conn           // nil until it is taken
	head     []byte             // of the answer, while it is to be sent
	broken   error              // why a write failed; what would follow makes no sense
	watching sync.WaitGroup
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

// Header implements http.ResponseWriter; the headers are sent.
func (l *line) Header() http.Header { return http.Header{} }

// WriteHeader implements http.ResponseWriter; the status is sent.
func (l *line) WriteHeader(int) {}

// Write implements http.ResponseWriter.
func (l *line) Write(p []byte) (int, error) {
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
	if l.head != nil {
		_ = l.send(nil) // what comes next fails as well
	}
}

// SetWriteDeadline is for http.ResponseController.
func (l *line) SetWriteDeadline(t time.Time) error { return l.conn.SetWriteDeadline(t) }

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

// lines counts streams that may have taken their connection: the HTTP server does not wait for those.
type lines struct {
	mu   sync.Mutex // guards what is below
	open int
	none chan struct{} // not nil while somebody waits; closed when none is open
}

func (l *lines) begin() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.open++
}

func (l *lines) end() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.open--; l.open == 0 && l.none != nil {
		close(l.none)
		l.none = nil
	}
}

// wait waits until none is open, or for partingTimeout.
func (l *lines) wait() {
	l.mu.Lock()
	none := l.none
	if none == nil {
		none = make(chan struct{})
		if l.open == 0 {
			close(none)
		} else {
			l.none = none
		}
	}
	l.mu.Unlock()
	limit := time.NewTimer(partingTimeout)
	defer limit.Stop()
	select {
	case <-none:
	case <-limit.C:
	}
}
