package mcphttp

import (
	"errors"
	"math"
	"net/http"
	"strconv"
	"sync"
	"time"

	"newel.dev/newel/internal/mcpwire"
)

// reply writes the answer to one request: plain JSON, or an event stream from the moment the
// first notification is sent.
type reply struct {
	w       http.ResponseWriter
	timeout time.Duration
	access  *Access    // what a client without a sufficient token is told; nil: nothing
	given   []string   // Authorization headers: in which way a token was presented
	mu      sync.Mutex // one event at a time
	stream  bool       // guarded by mu: the event stream has begun
	ended   bool       // guarded by mu: no more comments
	shared  bool       // the connection (HTTP/2): what is written waits until the client makes room, however small

	correlation, length [1]string // header values, which live as long as the reply
}

func (d *Door) reply(w http.ResponseWriter, r *http.Request) *reply {
	return &reply{w: w, timeout: d.opts.WriteTimeout, access: d.opts.Access, given: r.Header["Authorization"], shared: r.ProtoMajor > 1}
}

// largeAnswer is what a kernel's socket buffer may not take at once: such writes get a deadline.
const largeAnswer = 64 << 10

// event sends one message on the event stream, beginning the stream if need be.
func (p *reply) event(message []byte) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.stream {
		p.stream = true
		h := p.w.Header()
		h.Set("Content-Type", "text/event-stream")
		h.Set("Cache-Control", "no-store")
		h.Set("X-Accel-Buffering", "no") // proxies must not hold events back
		p.w.WriteHeader(http.StatusOK)
	}
	return p.send(message)
}

// send writes one event. mu is held.
func (p *reply) send(message []byte) error {
	line := mcpwire.OneLine(message)
	b := make([]byte, 0, len(line)+32) // in one: whatever is written to a stream of its own is sent at once
	b = append(append(append(b, "event: message\ndata: "...), line...), "\n\n"...)
	return p.writeAndFlush(b)
}

// comment keeps an idle stream open; before the stream has begun it does nothing.
func (p *reply) comment() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ended {
		return errEnded
	}
	if !p.stream {
		return nil
	}
	return p.writeAndFlush([]byte(": keep-alive\n\n"))
}

var errEnded = errors.New("the stream has ended")

// end has comment do nothing from now on.
func (p *reply) end() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.ended = true
}

// writeAndFlush writes under a deadline. mu is held.
func (p *reply) writeAndFlush(b []byte) error {
	rc := http.NewResponseController(p.w)
	_ = rc.SetWriteDeadline(time.Now().Add(p.timeout)) // not every writer has deadlines: in-memory ones need none
	if _, err := p.w.Write(b); err != nil {
		return err
	}
	err := rc.Flush()
	_ = rc.SetWriteDeadline(time.Time{})
	return err
}

// answer sends the result: as the last event of a stream that has begun, otherwise as JSON. The
// caller is gone if writing fails; there is nobody left to tell.
func (p *reply) answer(f *mcpwire.Frame) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.stream {
		_ = p.send(f.AppendTo(nil))
		return
	}
	p.json(http.StatusOK, f.Len(), f.Head, f.Body, f.Tail)
}

// failure sends a JSON-RPC error.
func (p *reply) failure(f *mcpwire.Failure) {
	body := mcpwire.AppendFailure(nil, f)
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.stream {
		_ = p.send(body)
		return
	}
	if p.access != nil && (f.Status == http.StatusUnauthorized || len(f.Scopes) > 0) {
		p.access.challenge(p.w.Header(), f, p.given)
	}
	if f.RetryAfter > 0 {
		p.w.Header().Set("Retry-After", strconv.Itoa(int(math.Ceil(f.RetryAfter.Seconds()))))
	}
	p.json(f.Status, len(body), body)
}

// value makes a header value of s in room that is there.
func (p *reply) value(room *[1]string, s string) []string {
	room[0] = s
	return room[:]
}

func (p *reply) json(status, size int, parts ...[]byte) {
	h := p.w.Header()
	h["Content-Type"] = contentTypeJSON
	h["Content-Length"] = p.value(&p.length, strconv.Itoa(size))
	h["X-Content-Type-Options"] = noSniff
	if size > largeAnswer || p.shared {
		rc := http.NewResponseController(p.w)
		_ = rc.SetWriteDeadline(time.Now().Add(p.timeout))
		defer func() { _ = rc.SetWriteDeadline(time.Time{}) }()
	}
	p.w.WriteHeader(status)
	for _, b := range parts {
		if len(b) == 0 {
			continue
		}
		if _, err := p.w.Write(b); err != nil {
			return
		}
	}
}

// Shared header values: net/http only reads them.
var (
	contentTypeJSON = []string{"application/json"}
	noSniff         = []string{"nosniff"}
)
