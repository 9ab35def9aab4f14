package mcpsession

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	stdjson "github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/internal/lane"
	"newel.dev/newel/internal/mcpwire"
	"newel.dev/newel/internal/strictjson"
)

// ServeHTTP serves one request of a session revision with the current generation. Host and Origin
// are checked by the caller.
func (d *Door) ServeHTTP(w http.ResponseWriter, r *http.Request) { d.serve(d.current.Load(), w, r) }

func (d *Door) serve(g *Generation, w http.ResponseWriter, r *http.Request) {
	message, f := g.read(r)
	if f != nil {
		refuse(w, f)
		return
	}
	session := r.Header.Get("Mcp-Session-Id")
	if session == "" && message.method == "initialize" {
		if f := g.full(ownerOf(r)); f != nil {
			f.ID = message.id
			w.Header().Set("Retry-After", "10")
			refuse(w, f)
			return
		}
	}
	if session != "" && !d.remember(r.Context(), session, nil) && d.elsewhere(w, r, session, &message, g.o.ForwardTimeout) {
		return
	}
	if session != "" {
		if !d.open(session, g.o.MaxStreamsPerSession) {
			refuse(w, &mcpwire.Failure{ID: message.id, Status: http.StatusTooManyRequests, Code: -31429, Message: "this session is at its limit of " + strconv.Itoa(g.o.MaxStreamsPerSession) + " open requests; finish some first"})
			return
		}
		if r.Method != http.MethodGet { // that ends with its stream
			defer d.done(session)
		}
	}
	key := ""
	if session != "" && message.id != nil && message.method != "" {
		key = session + " " + string(message.id)
		if !d.reserve(key) {
			refuse(w, &mcpwire.Failure{ID: message.id, Status: http.StatusBadRequest, Code: -32600, Message: "a request with this id is still running in this session; ids must be unique"})
			return
		}
		defer d.release(key)
	}
	if d.o.Identified {
		r.Header.Set("Authorization", "Bearer known") // the SDK wants to see one
	}
	r.Header.Set(headerGeneration, g.number)
	r.Header.Set(headerKey, key)
	r.Header.Set(headerPeer, r.RemoteAddr)
	r.Header.Set(headerSize, strconv.Itoa(message.size))
	r.Header.Del(headerArguments)
	if message.arguments != nil {
		r.Header.Set(headerArguments, string(message.arguments))
		r.Body, r.ContentLength = io.NopCloser(bytes.NewReader(message.rest)), int64(len(message.rest))
	}
	out := &writer{w: w, id: message.id, timeout: g.o.WriteTimeout}
	if r.Method == http.MethodGet && session != "" {
		d.stream(w, r, out, session)
		return
	}
	if message.method != "" {
		defer out.keepAlive(d.o.KeepAlive)()
	}
	d.handler.ServeHTTP(out, r)
	out.finish()
	if opened := w.Header().Get("Mcp-Session-Id"); session == "" && opened != "" {
		d.own(opened, ownerOf(r))
	}
}

// checked is for JSON that was checked before: to look for duplicate names again takes most of the time
// where there are many names.
var checked = jsontext.AllowDuplicateNames(true)

// message is what has to be known of a message before the SDK reads it.
type message struct {
	id     jsontext.Value
	method string
	size   int
	// arguments of a large call, which go around the SDK: it reads a message eight times over. rest is the
	// message without them. Nil: they go through it.
	arguments, rest []byte
}

// read reads and checks the body, strictly, and puts it back. Large ones wait for their turn.
func (g *Generation) read(r *http.Request) (message, *mcpwire.Failure) {
	if r.Method != http.MethodPost {
		return message{}, nil
	}
	var in bytes.Buffer
	in.Grow(int(min(max(r.ContentLength, 0), int64(g.o.MaxMessageBytes))) + bytes.MinRead) // it was read before: so much is there
	_, err := in.ReadFrom(io.LimitReader(r.Body, int64(g.o.MaxMessageBytes)+1))
	body := in.Bytes()
	if err != nil {
		return message{}, &mcpwire.Failure{Status: http.StatusBadRequest, Code: -32700, Message: "the body could not be read to its end"}
	}
	leave, err := lane.Enter(r.Context(), len(body))
	if err != nil {
		return message{}, &mcpwire.Failure{Status: http.StatusBadRequest, Code: -32600, Message: "the request was given up before its turn"}
	}
	defer leave()
	if err := strictjson.Check(body, strictjson.Limits{Bytes: g.o.MaxMessageBytes}); err != nil {
		f := &mcpwire.Failure{Status: http.StatusBadRequest, Code: -32700, Message: err.Error()}
		var e *strictjson.Error
		if errors.As(err, &e) && e.Limit {
			f.Status, f.Code = http.StatusRequestEntityTooLarge, -32600
		}
		return message{}, f
	}
	m := message{size: len(body)}
	var envelope struct {
		ID     jsontext.Value `json:"id"`
		Method string         `json:"method"`
	}
	switch jsontext.Value(body).Kind() {
	case '{':
		if stdjson.Unmarshal(body, &envelope, checked) != nil {
			return m, &mcpwire.Failure{Status: http.StatusBadRequest, Code: -32600, Message: "the message is not a JSON-RPC object"}
		}
		m.id, m.method = envelope.ID, envelope.Method
	case '[':
		if v := r.Header.Get("Mcp-Protocol-Version"); v != "" && v != "2025-03-26" {
			return m, &mcpwire.Failure{Status: http.StatusBadRequest, Code: -32600, Message: "batches are part of revision 2025-03-26 only; send one message per request"}
		}
		m.method = "batch"
	default:
		return m, &mcpwire.Failure{Status: http.StatusBadRequest, Code: -32600, Message: "the message is not a JSON-RPC object"}
	}
	if m.method == "tools/call" {
		body = lift(body)
		if len(body) >= lane.Large {
			m.arguments, m.rest = takeArguments(body)
		}
	}
	r.Body = io.NopCloser(bytes.NewReader(body))
	r.ContentLength = int64(len(body))
	return m, nil
}

// takeArguments takes the arguments, an object, out of a tools/call that was checked, and returns them and
// the message with {} in their place; or nil, if it does not have them.
func takeArguments(body []byte) (arguments, rest []byte) {
	d := jsontext.NewDecoder(bytes.NewBuffer(body), checked)
	for _, name := range []string{"params", "arguments"} {
		if t, err := d.ReadToken(); err != nil || t.Kind() != '{' {
			return nil, nil
		}
		for {
			t, err := d.ReadToken()
			if err != nil || t.Kind() != '"' {
				return nil, nil
			}
			if t.String() == name {
				break
			}
			if d.SkipValue() != nil {
				return nil, nil
			}
		}
	}
	v, err := d.ReadValue()
	if err != nil || v.Kind() != '{' {
		return nil, nil
	}
	end := int(d.InputOffset())
	return v, slices.Concat(body[:end-len(v)], []byte("{}"), body[end:])
}

// census is how many sessions there were, and whose.
type census struct {
	at    time.Time
	all   int
	owner map[string]int
}

// censusEvery bounds how often sessions are counted; those that are opened meanwhile are added.
const censusEvery = 250 * time.Millisecond

// full refuses one more session of owner if there are too many, of that one or in all.
func (g *Generation) full(owner string) *mcpwire.Failure {
	if g.o.Crowded != nil && g.o.Crowded() {
		return &mcpwire.Failure{Status: http.StatusServiceUnavailable, Code: -31503, Message: "the server runs out of memory and opens no more sessions; try again later"}
	}
	d := g.door
	d.mu.Lock()
	defer d.mu.Unlock()
	if time.Since(d.counted.at) >= censusEvery {
		d.takeCensus()
	}
	switch {
	case d.counted.all >= g.o.MaxSessions:
		return &mcpwire.Failure{Status: http.StatusServiceUnavailable, Code: -31503, Message: "the server is at its limit of sessions; try again later"}
	case d.counted.owner[owner] >= g.o.MaxSessionsPerPeer:
		return &mcpwire.Failure{Status: http.StatusTooManyRequests, Code: -31429, Message: "you are at your limit of " + strconv.Itoa(g.o.MaxSessionsPerPeer) + " sessions; end some first"}
	}
	return nil
}

// takeCensus counts sessions, and forgets whose those were that have ended. mu is held.
func (d *Door) takeCensus() {
	d.counted = census{time.Now(), 0, map[string]int{}}
	open := make(map[string]string, len(d.owners))
	for _, server := range d.servers {
		for s := range server.Sessions() {
			d.counted.all++
			if who, known := d.owners[s.ID()]; known {
				open[s.ID()] = who
				d.counted.owner[who]++
			}
		}
	}
	d.owners = open
}

// ownerOf returns who sends a request: the caller, or the address where nobody asks who is calling.
func ownerOf(r *http.Request) string {
	if p := mcpwire.PrincipalOf(r.Context()); p != nil {
		return strconv.Quote(p.Tenant) + strconv.Quote(p.ID)
	}
	if host, _, err := net.SplitHostPort(r.RemoteAddr); err == nil {
		return host
	}
	return r.RemoteAddr
}

// own remembers who opened a session.
func (d *Door) own(session, owner string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.owners[session] = owner
	if d.counted.owner != nil {
		d.counted.all++
		d.counted.owner[owner]++
	}
}

// open counts one more open request of a session, if it may have one more.
func (d *Door) open(session string, most int) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.streams[session] >= most {
		return false
	}
	d.streams[session]++
	return true
}

func (d *Door) done(session string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.streams[session]--; d.streams[session] == 0 {
		delete(d.streams, session)
	}
}

// reserve takes an id for a request, if no other of its session has it.
func (d *Door) reserve(key string) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.running[key] > 0 {
		return false
	}
	d.running[key] = 1
	return true
}

// hold keeps an id reserved: a call runs on when its client goes away.
func (d *Door) hold(key string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.running[key]++
}

func (d *Door) release(key string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.running[key]--; d.running[key] <= 0 {
		delete(d.running, key)
	}
}

func refuse(w http.ResponseWriter, f *mcpwire.Failure) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(f.Status)
	_, _ = w.Write(mcpwire.AppendFailure(nil, f)) // the caller is gone if this fails
}

// writer mends what the SDK writes: errors in plain text become JSON-RPC errors, event streams
// are kept alive and marked so that proxies do not hold them back.
type writer struct {
	w        http.ResponseWriter
	id       jsontext.Value
	timeout  time.Duration
	had      context.Context // ends when nothing may be said any more; nil: never
	mu       sync.Mutex      // one write at a time: events are never interleaved with comments
	status   int
	plain    *bytes.Buffer // a plain-text error, held back
	stream   bool
	written  time.Time
	finished bool
}

// Header implements http.ResponseWriter.
func (w *writer) Header() http.Header { return w.w.Header() }

// WriteHeader implements http.ResponseWriter.
func (w *writer) WriteHeader(status int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.begin(status)
}

// begin is WriteHeader with mu held.
func (w *writer) begin(status int) {
	if w.status != 0 {
		return
	}
	w.status = status
	h := w.w.Header()
	ct := h.Get("Content-Type")
	if status >= 400 && !strings.HasPrefix(ct, "application/json") {
		w.plain = &bytes.Buffer{}
		return
	}
	if strings.HasPrefix(ct, "text/event-stream") {
		w.stream = true
		w.written = time.Now()
		h.Set("X-Accel-Buffering", "no")
	}
	w.w.WriteHeader(status)
}

// Write implements http.ResponseWriter.
func (w *writer) Write(b []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.begin(http.StatusOK)
	if w.plain != nil {
		return w.plain.Write(b)
	}
	if w.had != nil && w.had.Err() != nil {
		return 0, context.Cause(w.had)
	}
	w.written = time.Now()
	if w.stream {
		w.extend()
	}
	return w.w.Write(b)
}

// extend gives what is written next its time: without, a client that does not read would hold up
// whoever writes, and the sessions of others with it. mu is held.
func (w *writer) extend() {
	_ = http.NewResponseController(w.w).SetWriteDeadline(time.Now().Add(w.timeout)) // what is in memory has none
}

// Flush implements http.Flusher.
func (w *writer) Flush() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.begin(http.StatusOK)
	if w.plain == nil {
		_ = http.NewResponseController(w.w).Flush() // best effort, as the SDK has it
	}
}

// Unwrap lets http.ResponseController find deadlines.
func (w *writer) Unwrap() http.ResponseWriter { return w.w }

// keepAlive writes a comment whenever a stream has been silent for a while, until the answer is
// finished. No goroutine waits for that: there are many streams.
func (w *writer) keepAlive(every time.Duration) (stop func()) {
	var again *time.Timer
	again = time.AfterFunc(math.MaxInt64, func() {
		if w.comment(every) {
			again.Reset(every)
		}
	})
	again.Reset(every)
	return func() {
		again.Stop()
		w.mu.Lock()
		defer w.mu.Unlock()
		w.finished = true // also where the handler panics
	}
}

// comment writes a comment if nothing was written for some time. It reports whether there is still
// something to be written to.
func (w *writer) comment(silence time.Duration) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.finished {
		return false
	}
	if w.stream && time.Since(w.written) >= silence {
		w.extend()
		if _, err := w.w.Write([]byte(": keep-alive\n\n")); err == nil {
			_ = http.NewResponseController(w.w).Flush()
		}
	}
	return true
}

// event writes a message beside those of the SDK, if the stream has begun: it cannot be resumed.
func (w *writer) event(message []byte) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.stream || w.finished {
		return
	}
	w.written = time.Now()
	w.extend()
	if _, err := w.w.Write([]byte("event: message\ndata: " + string(mcpwire.OneLine(message)) + "\n\n")); err == nil {
		_ = http.NewResponseController(w.w).Flush()
	}
}

// codes of HTTP statuses that the SDK answers in plain text.
func codeOf(status int) int {
	if status == http.StatusNotFound {
		return -32001 // session not found, as clients of these revisions know it
	}
	return -32600
}

// finish sends a held-back plain-text error as a JSON-RPC error.
func (w *writer) finish() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.finished = true
	if w.stream {
		_ = http.NewResponseController(w.w).SetWriteDeadline(time.Time{}) // the next request has its own
	}
	if w.plain == nil {
		return
	}
	text := strings.TrimSpace(w.plain.String())
	if text == "" {
		text = http.StatusText(w.status)
	}
	h := w.w.Header()
	h.Del("Content-Length")
	id := w.id
	if id != nil && id.Kind() != '"' && id.Kind() != '0' {
		id = nil
	}
	refuse(w.w, &mcpwire.Failure{ID: id, Status: w.status, Code: codeOf(w.status), Message: text})
}
