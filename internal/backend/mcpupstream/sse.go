package mcpupstream

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"time"
)

// events takes an event stream apart (HTML standard, server-sent events). Lines and events are
// bounded by max_message_bytes.
type events struct {
	ctx   context.Context // of the request
	e     *endpoint
	r     *bufio.Reader
	from  stream
	lines pace
	large bool // this event is one of the large ones
}

// What one stream or process may send: nobody has to read what a server can make up at will. Real
// ones tell of progress a few times a second; an answer may have been broken into many lines.
const (
	messagesAtOnce    = 20_000 // beside answers
	messagesPerSecond = 5000
	linesAtOnce       = 200_000
	linesPerSecond    = 10_000
)

// errFlood is a server that sends more than that.
var errFlood = errors.New("it sends more messages than the gateway takes")

// A pace counts what comes: at once so many, over time so many a second. It is not safe for
// concurrent use.
type pace struct {
	atOnce, perSecond int
	spent             int
	since             time.Time
}

func newPace(atOnce, perSecond int) pace {
	return pace{atOnce: atOnce, perSecond: perSecond, since: time.Now()}
}

// take reports whether one more may come.
func (p *pace) take() bool {
	if p.spent++; p.spent <= p.atOnce {
		return true // the clock is only asked when it matters
	}
	now := time.Now()
	if earned := int(min(now.Sub(p.since), time.Hour).Seconds() * float64(p.perSecond)); earned > 0 {
		p.spent, p.since = max(1, p.spent-earned), now
	}
	return p.spent <= p.atOnce
}

func newEvents(ctx context.Context, e *endpoint, body io.Reader) *events {
	return &events{ctx: ctx, e: e, r: bufio.NewReaderSize(body, 8<<10), lines: newPace(linesAtOnce, linesPerSecond)}
}

// end says that the last event is done with.
func (v *events) end() {
	if v.large {
		v.large = false
		v.e.endLarge()
	}
}

// next returns the next event that has data; the one before is done with. It fails with errCut when the
// stream ends. Who calls it calls end at last.
func (v *events) next() (name string, data []byte, err error) {
	v.end()
	for {
		line, err := v.line(len(data))
		if err != nil {
			if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
				err = errCut
			}
			return "", nil, err
		}
		if !v.lines.take() {
			return "", nil, errFlood
		}
		if len(line) == 0 {
			if len(data) > 0 {
				return name, data, nil
			}
			name, data = "", nil
			continue
		}
		v.field(line, &name, &data)
	}
}

// field takes one line of an event.
func (v *events) field(line []byte, name *string, data *[]byte) {
	field, value, _ := bytes.Cut(line, []byte{':'})
	value = bytes.TrimPrefix(value, []byte{' '})
	switch string(field) {
	case "event":
		*name = string(value)
	case "data":
		if *data != nil {
			*data = append(*data, '\n')
		}
		*data = append(*data, value...)
	case "id":
		if bytes.IndexByte(value, 0) < 0 && len(value) <= 1024 {
			v.from.lastID, v.from.some = string(value), true
		}
	case "retry":
		if ms, err := strconv.Atoi(string(value)); err == nil && ms >= 0 {
			v.from.retry = min(time.Duration(ms)*time.Millisecond, time.Minute)
		}
	}
}

// sseStream is one connection to a server of revision 2024-11-05 (HTTP+SSE): an event stream says
// where messages are posted, and carries what comes back. It is used like a process.
type sseStream struct {
	endpoint *endpoint
	post     *url.URL
	body     io.ReadCloser
	events   *events
	end      context.CancelFunc
}

// openSSE connects and waits for the address to post to, at most until ctx ends.
func (u *Upstream) openSSE(ctx context.Context) (link, error) {
	life, end := context.WithCancel(u.life)
	stop := context.AfterFunc(ctx, end) // until it is open, the caller's patience counts
	s, err := dialSSE(life, end, u.endpoint)
	if !stop() && err == nil {
		s.Kill()
		err = ctx.Err()
	}
	if err != nil {
		end()
		return nil, unsentError{err}
	}
	return newPiped(s, u.config.MaxMessageBytes, u.heard), nil
}

func dialSSE(ctx context.Context, end context.CancelFunc, e *endpoint) (*sseStream, error) {
	h := e.headers()
	h["Accept"] = []string{"text/event-stream"}
	resp, err := e.do(ctx, http.MethodGet, h, nil)
	if err != nil {
		return nil, err
	}
	s := &sseStream{endpoint: e, body: resp.Body, events: newEvents(ctx, e, resp.Body), end: end}
	if err := s.begin(resp); err != nil {
		resp.Body.Close()
		return nil, err
	}
	return s, nil
}

// begin reads the first event. Where it leads must be the server's own origin: what is posted there
// carries the configured headers.
func (s *sseStream) begin(resp *http.Response) error {
	if resp.StatusCode != http.StatusOK {
		return &statusError{resp.StatusCode, retryAfter(resp.Header), "no event stream"}
	}
	name, data, err := s.events.next()
	if err != nil {
		return err
	}
	to, err := s.endpoint.url.Parse(string(data))
	if name != "endpoint" || err != nil {
		return fmt.Errorf("%w: the first event is %.40q, not endpoint", errGarbage, name)
	}
	if to.Scheme != s.endpoint.url.Scheme || to.Host != s.endpoint.url.Host {
		return fmt.Errorf("%w: messages are to be posted to another server, %.100q", errGarbage, to.Redacted())
	}
	s.post = to
	return nil
}

// Send implements pipe.
func (s *sseStream) Send(ctx context.Context, body []byte) error {
	ctx, stop := context.WithTimeout(ctx, sseSendTimeout)
	defer stop()
	h := s.endpoint.headers()
	h["Content-Type"] = jsonType
	to := *s.endpoint
	to.url = s.post
	resp, err := to.do(ctx, http.MethodPost, h, body)
	if err != nil {
		return dialError(err)
	}
	defer resp.Body.Close()
	_, _ = io.CopyN(io.Discard, resp.Body, 4<<10) // so that the connection can be used again; no matter if not
	if resp.StatusCode/100 != 2 {
		return &statusError{resp.StatusCode, retryAfter(resp.Header), http.StatusText(resp.StatusCode)}
	}
	return nil
}

// sseSendTimeout bounds how long a server may take to accept a message; its answer comes on the stream.
const sseSendTimeout = 30 * time.Second

// Read implements pipe.
func (s *sseStream) Read() ([]byte, error) {
	for {
		name, data, err := s.events.next()
		if err != nil {
			s.events.end()
		}
		if err != nil || name == "" || name == "message" {
			return data, err
		}
	}
}

// Kill implements pipe.
func (s *sseStream) Kill() {
	s.end()
	s.body.Close()
}
