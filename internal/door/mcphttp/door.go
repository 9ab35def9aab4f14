// Package mcphttp is the Streamable HTTP door: one URL for the stateless revision 2026-07-28,
// served here, and for the session revisions, which it hands on.
//
// Start reading at [Door.ServeHTTP]; [Door.stateless] is the way of one call and can be read
// beside internal/guard/path.go. The door bounds and decodes what arrives, checks Host, Origin
// and headers, and encodes the outcome. What it refuses by itself is recorded as well.
package mcphttp

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"math"
	"mime"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/catalog"
	"newel.dev/newel/internal/lane"
	"newel.dev/newel/internal/mcpwire"
	"newel.dev/newel/internal/stream"
)

// Options configure a Door. Codec and Sessions are required.
type Options struct {
	Codec    *mcpwire.Codec
	Sessions http.Handler // session revisions; Host and Origin are already checked
	// ParamHeaders returns what of a tool's arguments is mirrored in headers.
	ParamHeaders func(tool string) []catalog.ParamHeader
	// Refused records what is refused before it is a call; nil records nothing.
	Refused         func(ctx context.Context, code call.Code, status int, peer string, size int, reason string)
	MaxMessageBytes int           // default 4 MiB
	KeepAlive       time.Duration // between comments on an idle subscription; default 15 s
	WriteTimeout    time.Duration // for one event, or a large answer; default 30 s
	BodyTimeout     time.Duration // for a whole message; default 60 s. Each 64 KiB of it have a sixth of that
	AllowedHosts    []string      // Host names beside loopback ones; "*" allows any
	AllowedOrigins  []string      // Origins beside the server's own; never "*"
	// AbsentHeaders puts up with clients of revision 2026-07-28 that leave out headers which mirror the
	// body; those that are there have to agree with it.
	AbsentHeaders bool
	// Check says who presents a credential, and refuses what that one lacks a scope for, before a
	// session sees it; kind is 0 for what is no call. Nil: identities are not configured.
	Check func(ctx context.Context, c call.Credential, kind call.Kind, name string) (*call.Principal, error)
	// Forwarded returns who sent a request that another node passed on, and fails if somebody else says
	// so. Nil: there are no other nodes.
	Forwarded func(r *http.Request) (who *call.Principal, ok bool, err error)
	Access    *Access      // nil: clients are not told how to get a token
	Streams   *stream.Set  // subscriptions that have left the HTTP server; somebody waits for them. Nil: nobody does
	Logger    *slog.Logger // nil discards
	// Draining ends open subscriptions with a result when it ends; nil never does.
	Draining context.Context
}

// A Door serves one URL. It is safe for concurrent use.
type Door struct{ opts Options }

// New returns a door, or an error that names the missing or wrong option.
func New(o Options) (*Door, error) {
	if o.Codec == nil || o.Sessions == nil {
		return nil, errors.New("mcphttp: Codec and Sessions are required")
	}
	for _, origin := range o.AllowedOrigins {
		if origin == "*" {
			return nil, errors.New(`mcphttp: the allowed origin "*" would let any web page call this server; name the origins`)
		}
	}
	if o.MaxMessageBytes <= 0 {
		o.MaxMessageBytes = 4 << 20
	}
	if o.KeepAlive <= 0 {
		o.KeepAlive = 15 * time.Second
	}
	if o.WriteTimeout <= 0 {
		o.WriteTimeout = 30 * time.Second
	}
	if o.BodyTimeout <= 0 {
		o.BodyTimeout = time.Minute
	}
	if o.Streams == nil {
		o.Streams = &stream.Set{}
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.ParamHeaders == nil {
		o.ParamHeaders = func(string) []catalog.ParamHeader { return nil }
	}
	if o.Refused == nil {
		o.Refused = func(context.Context, call.Code, int, string, int, string) {}
	}
	return &Door{opts: o}, nil
}

// buffers hold messages until they are decoded; what a call keeps is copied out of them. Large ones have
// buffers of their own: to make room for 4 MiB, step by step, costs more than to read them, and small
// ones must not keep that much.
var (
	buffers = sync.Pool{New: func() any { return new(bytes.Buffer) }}
	large   = sync.Pool{New: func() any { return new(bytes.Buffer) }}
)

// maxPooled is the size of what is not large.
const maxPooled = 64 << 10

// bufferFor returns an empty buffer for a body of so many bytes, -1 if that is not known.
func bufferFor(size int64) *bytes.Buffer {
	pool := &buffers
	if size < 0 || size > maxPooled {
		pool = &large
	}
	buf := pool.Get().(*bytes.Buffer)
	buf.Reset()
	return buf
}

// release gives a buffer back.
func release(buf *bytes.Buffer) {
	if buf.Cap() <= maxPooled {
		buffers.Put(buf)
		return
	}
	large.Put(buf)
}

// ServeHTTP implements http.Handler.
func (d *Door) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if f := d.checkHost(r); f != nil {
		d.refuse(w, r, f, 0)
		return
	}
	if f := d.checkOrigin(w, r); f != nil {
		d.refuse(w, r, f, 0)
		return
	}
	switch r.Method {
	case http.MethodPost:
		d.post(w, r)
	case http.MethodOptions:
		d.preflight(w, r)
	case http.MethodGet, http.MethodDelete:
		if header(r, "Mcp-Protocol-Version") == mcpwire.Revision {
			d.methodNotAllowed(w, r, "POST")
			return
		}
		d.session(w, r, nil)
	default:
		d.methodNotAllowed(w, r, "GET, POST, DELETE, OPTIONS")
	}
}

func (d *Door) methodNotAllowed(w http.ResponseWriter, r *http.Request, allow string) {
	w.Header().Set("Allow", allow)
	d.refuse(w, r, &mcpwire.Failure{Status: http.StatusMethodNotAllowed, Code: -32600, Message: "this method is not served here; send " + allow, Cause: call.Malformed}, 0)
}

// post reads one message and decides which era it belongs to.
func (d *Door) post(w http.ResponseWriter, r *http.Request) {
	if f := checkContentType(r); f != nil {
		d.refuse(w, r, f, 0)
		return
	}
	buf := bufferFor(r.ContentLength)
	if f := d.read(w, r, buf); f != nil {
		d.refuse(w, r, f, buf.Len())
		release(buf)
		return
	}
	if m, f := d.decode(r, buf.Bytes()); m != nil || f != nil {
		size := buf.Len()
		release(buf)
		if f != nil {
			d.refuse(w, r, f, size)
			return
		}
		d.stateless(w, r, m)
		return
	}
	if f := unknownRevision(r, buf.Bytes()); f != nil {
		d.refuse(w, r, f, buf.Len())
		release(buf)
		return
	}
	r.Body = io.NopCloser(bytes.NewReader(buf.Bytes())) // who reads it has the buffer, for as long as that takes
	r.ContentLength = int64(buf.Len())
	d.session(w, r, buf.Bytes())
}

// decode decodes a message of revision 2026-07-28 and holds the headers against it, or returns neither a
// message nor a failure for one of the session revisions. Large ones wait for their turn.
func (d *Door) decode(r *http.Request, body []byte) (*mcpwire.Message, *mcpwire.Failure) {
	leave, err := lane.Enter(r.Context(), len(body))
	if err != nil {
		return nil, &mcpwire.Failure{Status: http.StatusBadRequest, Code: -32600, Message: "the request was given up before its turn", Cause: call.Canceled}
	}
	defer leave()
	if !stateless(r, body) {
		return nil, nil
	}
	m, f := d.opts.Codec.Decode(body)
	if f == nil && !m.IsNotification() {
		f = d.checkHeaders(r, m)
	}
	return m, f
}

// stateless serves one message of revision 2026-07-28.
func (d *Door) stateless(w http.ResponseWriter, r *http.Request, m *mcpwire.Message) {
	if m.IsNotification() {
		w.WriteHeader(http.StatusAccepted) // the revision defines none over HTTP
		return
	}
	out := d.reply(w, r)
	events := accepts(r, "text/event-stream")
	var send func([]byte) error
	if events && m.Hears() {
		send = out.event
	}
	if !events && !accepts(r, "application/json") {
		d.refuse(w, r, &mcpwire.Failure{ID: m.ID, Status: http.StatusNotAcceptable, Code: -32600, Message: "send Accept: application/json, text/event-stream", Cause: call.Malformed}, m.Size)
		return
	}
	c, f := d.opts.Codec.Call(m, d.from(r), send)
	if f != nil {
		d.refuse(w, r, f, m.Size)
		return
	}
	ctx := r.Context() // ends when the client goes away: that is how this revision cancels
	if c.Kind == call.Subscribe {
		if !events {
			d.refuse(w, r, &mcpwire.Failure{ID: m.ID, Status: http.StatusNotAcceptable, Code: -32600, Message: "a subscription needs Accept: text/event-stream", Cause: call.Malformed}, m.Size)
			return
		}
		d.opts.Streams.Serve(w, r, d.opts.Logger, func(ctx context.Context, w http.ResponseWriter) {
			out.w = w
			ctx, stop := d.follow(ctx, out)
			defer stop()
			d.answer(ctx, out, m, c)
		})
		return
	}
	d.answer(ctx, out, m, c)
}

// answer has a call served, and writes its answer.
func (d *Door) answer(ctx context.Context, out *reply, m *mcpwire.Message, c *call.Call) {
	scratch := buffers.Get().(*bytes.Buffer)
	scratch.Reset()
	frame, f := d.opts.Codec.Serve(ctx, m, c, scratch.AvailableBuffer())
	if c.Event.Correlation != "" {
		out.w.Header()["X-Correlation-Id"] = out.value(&out.correlation, c.Event.Correlation)
	}
	if f != nil {
		out.failure(f)
	} else {
		out.answer(&frame)
	}
	if scratch.Cap() <= maxPooled {
		scratch.Grow(512) // so that the next answer's frame fits
		buffers.Put(scratch)
	}
}

// follow keeps a subscription alive and ends it when the server drains. No goroutine waits for that:
// there are many subscriptions. Nothing is written after stop.
func (d *Door) follow(ctx context.Context, out *reply) (context.Context, func()) {
	ctx, cancel := context.WithCancel(ctx)
	var again *time.Timer
	again = time.AfterFunc(math.MaxInt64, func() {
		if out.comment() != nil {
			cancel()
			return
		}
		again.Reset(d.opts.KeepAlive)
	})
	again.Reset(d.opts.KeepAlive)
	stay := func() bool { return true }
	if d.opts.Draining != nil {
		stay = context.AfterFunc(d.opts.Draining, cancel)
	}
	return ctx, func() {
		stay()
		again.Stop()
		out.end()
		cancel()
	}
}

// refuse answers what did not become a call, with a JSON-RPC body, and has it recorded.
func (d *Door) refuse(w http.ResponseWriter, r *http.Request, f *mcpwire.Failure, size int) {
	d.opts.Refused(r.Context(), f.Cause, f.Status, r.RemoteAddr, size, f.Message)
	d.reply(w, r).failure(f)
}

// read reads the body into buf, at most MaxMessageBytes of it.
func (d *Door) read(w http.ResponseWriter, r *http.Request, buf *bytes.Buffer) *mcpwire.Failure {
	limit := int64(d.opts.MaxMessageBytes)
	if r.ContentLength > limit {
		w.Header().Set("Connection", "close")
		return tooLarge(limit)
	}
	body := r.Body
	if r.ContentLength < 0 {
		body = http.MaxBytesReader(w, body, limit) // otherwise net/http reads no more than it announces
	} else if r.ContentLength <= maxPooled {
		buf.Grow(int(r.ContentLength) + bytes.MinRead)
	}
	if _, err := buf.ReadFrom(d.paced(w, body, r.ContentLength)); err != nil {
		var over *http.MaxBytesError
		if errors.As(err, &over) {
			return tooLarge(limit)
		}
		return &mcpwire.Failure{Status: http.StatusBadRequest, Code: -32700, Message: "the body could not be read to its end", Cause: call.Canceled}
	}
	return nil
}

// What a sender has to manage at least: a piece in a share of the time for all of it.
const (
	pieceSize  = 64 << 10
	pieceShare = 6
)

// paced has a body fail whose sender is too slow; the server's own deadline is for the whole request.
func (d *Door) paced(w http.ResponseWriter, body io.Reader, size int64) io.Reader {
	piece := d.opts.BodyTimeout / pieceShare
	if size >= 0 && size <= pieceSize {
		_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(piece)) // what is in memory has none
		return body
	}
	return &pacedReader{body: body, control: http.NewResponseController(w), piece: piece, end: time.Now().Add(d.opts.BodyTimeout)}
}

// pacedReader moves the deadline of reading on with each piece, to the end of all time at most.
type pacedReader struct {
	body    io.Reader
	control *http.ResponseController
	piece   time.Duration
	end     time.Time
	left    int // until the deadline moves
}

// Read implements io.Reader.
func (p *pacedReader) Read(b []byte) (int, error) {
	if p.left <= 0 {
		p.left = pieceSize
		next := time.Now().Add(p.piece)
		if next.After(p.end) {
			next = p.end
		}
		_ = p.control.SetReadDeadline(next)
	}
	n, err := p.body.Read(b[:min(len(b), pieceSize)])
	p.left -= n
	return n, err
}

func tooLarge(limit int64) *mcpwire.Failure {
	return &mcpwire.Failure{Status: http.StatusRequestEntityTooLarge, Code: -32600, Cause: call.TooLarge,
		Message: "the message is larger than " + strconv.FormatInt(limit, 10) + " bytes"}
}

func checkContentType(r *http.Request) *mcpwire.Failure {
	ct := header(r, "Content-Type")
	if ct != "application/json" {
		mt, params, err := mime.ParseMediaType(ct)
		charset := strings.ToLower(params["charset"])
		if err != nil || mt != "application/json" || charset != "" && charset != "utf-8" {
			return &mcpwire.Failure{Status: http.StatusUnsupportedMediaType, Code: -32600, Message: "send Content-Type: application/json, in UTF-8", Cause: call.Malformed}
		}
	}
	if e := header(r, "Content-Encoding"); e != "" && e != "identity" {
		return &mcpwire.Failure{Status: http.StatusUnsupportedMediaType, Code: -32600, Message: "send the message without Content-Encoding", Cause: call.Malformed}
	}
	return nil
}

// accepts reports whether the client takes a media type; without Accept it takes all.
func accepts(r *http.Request, mediaType string) bool {
	values := r.Header["Accept"]
	if len(values) == 0 {
		return true
	}
	major, _, _ := strings.Cut(mediaType, "/")
	for _, v := range values {
		for v != "" {
			var part string
			part, v, _ = strings.Cut(v, ",")
			part, _, _ = strings.Cut(part, ";")
			part = strings.TrimSpace(part)
			if strings.EqualFold(part, mediaType) || part == "*/*" || strings.EqualFold(part, major+"/*") {
				return true
			}
		}
	}
	return false
}

// from collects what the headers say of the caller; nothing is verified here.
func (d *Door) from(r *http.Request) mcpwire.From {
	return mcpwire.From{
		Door:           "http",
		Credential:     d.Credential(r),
		Correlation:    header(r, "X-Correlation-Id"),
		Traceparent:    header(r, "Traceparent"),
		Tracestate:     header(r, "Tracestate"),
		Baggage:        header(r, "Baggage"),
		IdempotencyKey: mcpwire.IdempotencyKey(header(r, "Idempotency-Key")),
	}
}

// header returns the one value of a header given by its canonical name, or "".
func header(r *http.Request, canonical string) string {
	if v := r.Header[canonical]; len(v) == 1 {
		return v[0]
	}
	return ""
}
