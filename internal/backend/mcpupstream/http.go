package mcpupstream

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"mime"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"sync"
	"time"

	"newel.dev/newel/internal/certs"
	"newel.dev/newel/internal/egress"
	"newel.dev/newel/internal/module"
)

// endpoint is an upstream over Streamable HTTP. It is safe for concurrent use.
type endpoint struct {
	url     *url.URL
	header  http.Header       // as configured
	trip    http.RoundTripper // follows no redirects: where an address leads is for the operator to say
	maxSize int               // bytes of one message
}

// newEndpoint checks the address and reads the files of TLS. Relative paths start at env.Dir.
func newEndpoint(o *Config, env module.Env, where func(string) string) (*endpoint, error) {
	to, err := url.Parse(o.URL)
	if err != nil {
		return nil, err
	}
	header := http.Header{}
	for k, v := range o.Headers {
		header.Set(k, v.Reveal())
	}
	in := func(path string) string {
		if path == "" {
			return ""
		}
		return folder(env.Dir, path)
	}
	shown, err := certs.Client(certs.ClientOptions{
		Pair: certs.Pair{Certificate: in(o.TLS.Certificate), Key: in(o.TLS.Key)}, CA: in(o.TLS.CA), ServerName: o.TLS.ServerName,
		Pins: o.TLS.Pins, Logger: env.Logger, Where: func(setting string) string { return where("tls." + setting) },
	})
	if err != nil {
		return nil, err
	}
	allow := egress.Named(to.Hostname())
	for _, p := range o.Private {
		prefix, err := netip.ParsePrefix(p)
		if err != nil {
			return nil, err // checked before
		}
		allow = append(allow[:len(allow):len(allow)], prefix)
	}
	transport := egress.Transport(egress.Options{Allow: allow, Timeout: o.ConnectTimeout, TLS: shown})
	idle := cmp.Or(o.MaxConcurrentCalls, 64)
	transport.MaxIdleConns, transport.MaxIdleConnsPerHost, transport.IdleConnTimeout = idle, idle, 90*time.Second
	var trip http.RoundTripper = transport
	if o.Access != nil {
		trip = o.Access(trip)
	}
	return &endpoint{url: to, header: header, maxSize: o.MaxMessageBytes, trip: trip}, nil
}

// do sends one request. Nothing is followed, nothing stored: a transport is all that is needed.
func (e *endpoint) do(ctx context.Context, method string, header http.Header, body []byte) (*http.Response, error) {
	r := &http.Request{Method: method, URL: e.url, Host: e.url.Host, Header: header, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1}
	if body != nil {
		r.Body, r.ContentLength = io.NopCloser(bytes.NewReader(body)), int64(len(body))
		r.GetBody = func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(body)), nil }
	}
	return e.trip.RoundTrip(r.WithContext(ctx))
}

// statusError is an answer without a JSON-RPC message in it.
type statusError struct {
	status int
	after  time.Duration // Retry-After, or 0
	what   string
}

// Error says what came back.
func (e *statusError) Error() string { return fmt.Sprintf("HTTP status %d: %s", e.status, e.what) }

// errUnsent is an error before the upstream can have seen the request: nothing was done.
type unsentError struct{ error }

// Unwrap returns the cause.
func (e unsentError) Unwrap() error { return e.error }

// dialError marks an error before there was a connection that could carry a request.
func dialError(err error) error {
	var op *net.OpError
	var pin *certs.PinError
	var untrusted *tls.CertificateVerificationError
	var refused *egress.Refused
	if errors.As(err, &op) && op.Op == "dial" || errors.As(err, &pin) || errors.As(err, &untrusted) || errors.As(err, &refused) {
		return unsentError{err}
	}
	return err
}

// errCut is a stream that ended before the answer. What the upstream did is not known.
var errCut = errors.New("the connection ended before the answer came")

// bodies hold JSON answers while they are decoded.
var bodies = sync.Pool{New: func() any { return new(bytes.Buffer) }}

const maxPooled = 256 << 10

// stream tells where an interrupted event stream can be taken up again.
type stream struct {
	lastID string
	retry  time.Duration
	some   bool // an event came
}

// post sends one message and returns the answer to the request id in it. Everything else that
// arrives goes to on, in order. For notifications and responses (id 0) the answer is nil.
func (e *endpoint) post(ctx context.Context, header http.Header, body []byte, id int64, on func(*message)) (*message, http.Header, *stream, error) {
	header["Content-Type"] = jsonType
	header["Accept"] = acceptBoth
	resp, err := e.do(ctx, http.MethodPost, header, body)
	if err != nil {
		return nil, nil, nil, dialError(err)
	}
	defer resp.Body.Close()
	m, s, err := e.read(resp, id, on)
	return m, resp.Header, s, err
}

var (
	jsonType   = []string{"application/json"}
	acceptBoth = []string{"application/json, text/event-stream"}
)

// get opens an event stream: one that was interrupted (last is its last event id) or that of
// what the upstream says unasked. It returns when the answer to id comes or the stream ends.
func (e *endpoint) get(ctx context.Context, header http.Header, last string, id int64, on func(*message)) (*message, *stream, error) {
	header["Accept"] = []string{"text/event-stream"}
	if last != "" {
		header.Set("Last-Event-ID", last)
	}
	resp, err := e.do(ctx, http.MethodGet, header, nil)
	if err != nil {
		return nil, nil, err
	}
	defer resp.Body.Close()
	return e.read(resp, id, on)
}

// read reads an answer, bounded.
func (e *endpoint) read(resp *http.Response, id int64, on func(*message)) (*message, *stream, error) {
	kind := resp.Header.Get("Content-Type")
	if kind != "application/json" {
		kind, _, _ = mime.ParseMediaType(kind) // what it cannot parse is no type we take
	}
	redirect := resp.StatusCode >= 300 && resp.StatusCode < 400
	switch {
	case resp.StatusCode == http.StatusOK && kind == "text/event-stream":
		return e.events(resp.Body, id, on)
	case resp.StatusCode == http.StatusAccepted, resp.StatusCode == http.StatusNoContent:
		if id != 0 {
			return nil, nil, fmt.Errorf("%w: status %d", errCut, resp.StatusCode)
		}
		return nil, nil, nil
	case kind == "application/json" && !redirect:
		return e.body(resp, id)
	}
	what := "the answer is of type " + strconv.Quote(kind)
	if redirect {
		what = fmt.Sprintf("a redirect to %.200q, which is not followed: configure the final address", resp.Header.Get("Location"))
	}
	_, _ = io.CopyN(io.Discard, resp.Body, 4<<10) // so that the connection can be used again; no matter if not
	return nil, nil, &statusError{resp.StatusCode, retryAfter(resp.Header), what}
}

func retryAfter(h http.Header) time.Duration {
	n, err := strconv.Atoi(h.Get("Retry-After"))
	if err != nil || n < 0 {
		return 0
	}
	return min(time.Duration(n)*time.Second, time.Hour)
}

func (e *endpoint) body(resp *http.Response, id int64) (*message, *stream, error) {
	buf := bodies.Get().(*bytes.Buffer)
	buf.Reset()
	defer func() {
		if buf.Cap() <= maxPooled {
			bodies.Put(buf)
		}
	}()
	if n := resp.ContentLength; n > 0 && n <= maxPooled {
		buf.Grow(int(n) + bytes.MinRead)
	}
	if _, err := buf.ReadFrom(io.LimitReader(resp.Body, int64(e.maxSize)+1)); err != nil {
		return nil, nil, fmt.Errorf("%w: %w", errCut, err)
	}
	if buf.Len() > e.maxSize {
		return nil, nil, errTooLarge
	}
	m, err := parse(buf.Bytes(), e.maxSize)
	if resp.StatusCode >= 400 && (err != nil || m.Error == nil) {
		return nil, nil, &statusError{resp.StatusCode, retryAfter(resp.Header), http.StatusText(resp.StatusCode)}
	}
	if err != nil {
		return nil, nil, err
	}
	if id == 0 {
		return nil, nil, nil
	}
	if resp.StatusCode >= 400 && m.ID == nil {
		return m, nil, nil // it could not read the id, or did not care to repeat it
	}
	if !m.answers(id) {
		return nil, nil, fmt.Errorf("%w: it answers id %.40s, not %d", errGarbage, m.ID, id)
	}
	return m, nil, nil
}

// answers reports whether m is the response to the request with this id.
func (m *message) answers(id int64) bool {
	return m.isResponse() && string(m.ID) == strconv.FormatInt(id, 10)
}

// errTooLarge is a message over the bound.
var errTooLarge = errors.New("the message is larger than max_message_bytes")

// events reads an event stream until the answer to id.
func (e *endpoint) events(body io.Reader, id int64, on func(*message)) (*message, *stream, error) {
	v := &events{e: e, r: bufio.NewReaderSize(body, 8<<10)}
	for {
		_, data, err := v.next()
		if err != nil {
			return nil, &v.from, err
		}
		if len(bytes.TrimSpace(data)) == 0 {
			continue
		}
		m, err := parse(data, e.maxSize)
		if err != nil {
			return nil, &v.from, err
		}
		switch {
		case id != 0 && m.answers(id):
			return m, &v.from, nil
		case m.Method != "":
			on(m)
		}
	}
}

// line reads one line without its end; have bytes of the event are there already.
func (e *endpoint) line(r *bufio.Reader, have int) ([]byte, error) {
	var long []byte
	for {
		part, err := r.ReadSlice('\n')
		if have+len(long)+len(part) > e.maxSize+64 {
			return nil, errTooLarge
		}
		if err == nil && long == nil {
			return bytes.TrimRight(part, "\r\n"), nil
		}
		long = append(long, part...)
		switch {
		case err == nil:
			return bytes.TrimRight(long, "\r\n"), nil
		case !errors.Is(err, bufio.ErrBufferFull):
			return nil, err
		}
	}
}

// headers returns the configured headers with room for more.
func (e *endpoint) headers() http.Header {
	h := make(http.Header, len(e.header)+8)
	for k, v := range e.header {
		h[k] = v
	}
	return h
}

// wait sleeps for d or until ctx ends.
func wait(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}
