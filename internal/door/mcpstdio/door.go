// Package mcpstdio is the stdio door: newline-delimited messages of every revision on one pair
// of pipes.
//
// Start reading at [Door.Serve]. Each line is looked at once to decide its era: messages of the
// stateless revision are served here, side by side; all others go to the session door through a
// pipe. Nothing but messages is written, one line at a time.
package mcpstdio

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/internal/mcpwire"
	"newel.dev/newel/internal/strictjson"
)

// Options configure a Door. Stateless and Sessions are required; zero means the default in brackets.
type Options struct {
	// Stateless serves one message of the stateless revision; send writes one line.
	Stateless func(ctx context.Context, line []byte, send func([]byte) error)
	// Sessions serves the messages of session revisions until in ends or ctx does.
	Sessions        func(ctx context.Context, in io.Reader, out io.Writer) error
	MaxMessageBytes int          // of one line [4 MiB]
	MaxConcurrent   int          // stateless calls at once; more wait [256]
	Logger          *slog.Logger // nil discards
}

// A Door serves stdio.
type Door struct{ o Options }

// New returns a door.
func New(o Options) (*Door, error) {
	if o.Stateless == nil || o.Sessions == nil {
		return nil, errors.New("mcpstdio: Stateless and Sessions are required")
	}
	if o.MaxMessageBytes <= 0 {
		o.MaxMessageBytes = 4 << 20
	}
	if o.MaxConcurrent <= 0 {
		o.MaxConcurrent = 256
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return &Door{o}, nil
}

// connection is one client on one pair of pipes.
type connection struct {
	*Door
	out      lines
	slots    chan struct{}
	calls    sync.WaitGroup
	mu       sync.Mutex                    // guards what is below
	inFlight map[string]context.CancelFunc // stateless calls by raw id
	waiting  map[string]struct{}           // session requests without an answer yet, by raw id
	answered chan struct{}                 // signalled when waiting becomes empty
}

// answers watches what the sessions write for the answers to their requests.
type answers struct{ c *connection }

// Write takes one or more whole lines.
func (a answers) Write(b []byte) (int, error) {
	n, err := a.c.out.Write(b)
	for line := range bytes.Lines(b) {
		var h head
		if json.Unmarshal(line, &h) == nil && h.ID != nil && h.Method == "" {
			a.c.mu.Lock()
			delete(a.c.waiting, string(h.ID))
			empty := len(a.c.waiting) == 0
			a.c.mu.Unlock()
			if empty {
				select {
				case a.c.answered <- struct{}{}:
				default:
				}
			}
		}
	}
	return n, err
}

// drainTimeout bounds how long session calls may run on after input has ended: what they ask
// can no longer be answered.
const drainTimeout = 10 * time.Second

// drain waits until every session request has its answer.
func (c *connection) drain(ctx context.Context) {
	limit := time.NewTimer(drainTimeout)
	defer limit.Stop()
	for {
		c.mu.Lock()
		open := len(c.waiting)
		c.mu.Unlock()
		if open == 0 {
			return
		}
		select {
		case <-c.answered:
		case <-limit.C:
			return
		case <-ctx.Done():
			return
		}
	}
}

// lines writes whole lines, one at a time.
type lines struct {
	mu sync.Mutex
	w  io.Writer
}

// Write takes one or more whole lines.
func (l *lines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.w.Write(b)
}

func (l *lines) send(message []byte) error {
	message = mcpwire.OneLine(message)
	_, err := l.Write(append(message[:len(message):len(message)], '\n'))
	return err
}

// Serve serves one client until in ends (then running calls finish) or ctx does (then they are
// cancelled).
func (d *Door) Serve(ctx context.Context, in io.Reader, out io.Writer) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	c := &connection{Door: d, out: lines{w: out}, slots: make(chan struct{}, d.o.MaxConcurrent), inFlight: map[string]context.CancelFunc{}, waiting: map[string]struct{}{}, answered: make(chan struct{}, 1)}
	toSessions, fromDoor := io.Pipe()
	sessionsDone := make(chan error, 1)
	go func() {
		err := d.o.Sessions(ctx, toSessions, answers{c})
		toSessions.CloseWithError(io.ErrClosedPipe) // so that writing to it does not block
		sessionsDone <- err
	}()
	read := make(chan error, 1)
	go func() { read <- c.readLines(ctx, in, fromDoor) }()
	var err error
	select {
	case err = <-read:
		c.calls.Wait()
		c.drain(ctx)
	case <-ctx.Done(): // the reader may hang in a read that nothing ends; the process does
		cancel()
		c.calls.Wait()
	}
	closeErr := fromDoor.Close()
	return errors.Join(err, <-sessionsDone, closeErr)
}

// readLines reads until in ends. A line that is too long is answered and skipped.
func (c *connection) readLines(ctx context.Context, in io.Reader, sessions io.Writer) error {
	r := bufio.NewReaderSize(in, 64<<10)
	for {
		line, tooLong, err := c.line(r)
		switch {
		case tooLong:
			c.fail(nil, -32600, fmt.Sprintf("the message is longer than %d bytes", c.o.MaxMessageBytes))
		case len(bytes.TrimSpace(line)) > 0:
			if err := c.take(ctx, line, sessions); err != nil {
				return err
			}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return fmt.Errorf("reading from the client: %w", err)
		}
	}
}

// line reads up to the next newline, keeping at most MaxMessageBytes.
func (c *connection) line(r *bufio.Reader) (line []byte, tooLong bool, err error) {
	for {
		part, err := r.ReadSlice('\n')
		if !tooLong {
			line = append(line, part...)
			if len(bytes.TrimRight(line, "\r\n")) > c.o.MaxMessageBytes {
				line, tooLong = nil, true
			}
		}
		if !errors.Is(err, bufio.ErrBufferFull) {
			return bytes.TrimRight(line, "\r\n"), tooLong, err
		}
	}
}

// head is what decides where a message goes.
type head struct {
	ID     jsontext.Value `json:"id"`
	Method string         `json:"method"`
	Params struct {
		RequestID jsontext.Value `json:"requestId"`
		Meta      struct {
			Revision jsontext.Value `json:"io.modelcontextprotocol/protocolVersion"`
		} `json:"_meta"`
	} `json:"params"`
}

// take sends one message where it belongs.
func (c *connection) take(ctx context.Context, line []byte, sessions io.Writer) error {
	if err := strictjson.Check(line, strictjson.Limits{Bytes: c.o.MaxMessageBytes}); err != nil {
		c.fail(nil, -32700, err.Error())
		return nil
	}
	var h head
	undecodable := json.Unmarshal(line, &h) != nil
	switch {
	case h.Method == "notifications/cancelled" && c.cancel(h.Params.RequestID):
		return nil
	case h.Params.Meta.Revision != nil || h.Method == "server/discover":
		c.stateless(ctx, h.ID, line)
		return nil
	case undecodable && jsontext.Value(line).Kind() != '[':
		c.fail(nil, -32600, "the message is not a JSON-RPC object")
		return nil
	}
	if h.Method != "" && h.ID != nil {
		c.mu.Lock()
		c.waiting[string(h.ID)] = struct{}{}
		c.mu.Unlock()
	}
	if _, err := sessions.Write(append(line, '\n')); err != nil {
		c.mu.Lock()
		delete(c.waiting, string(h.ID))
		c.mu.Unlock()
		c.fail(h.ID, -32600, "the session has ended")
	}
	return nil
}

// stateless serves one call beside the others.
func (c *connection) stateless(ctx context.Context, id jsontext.Value, line []byte) {
	key := string(id)
	ctx, cancel := context.WithCancel(ctx)
	c.mu.Lock()
	_, taken := c.inFlight[key]
	if id != nil && !taken {
		c.inFlight[key] = cancel
	}
	c.mu.Unlock()
	if taken {
		cancel()
		c.fail(id, -32600, "a call with this id is still running; ids must be unique")
		return
	}
	c.slots <- struct{}{}
	c.calls.Go(func() {
		defer func() {
			c.mu.Lock()
			if id != nil {
				delete(c.inFlight, key)
			}
			c.mu.Unlock()
			cancel()
			<-c.slots
		}()
		c.o.Stateless(ctx, line, c.out.send)
	})
}

// cancel cancels a stateless call; false means the id is not one.
func (c *connection) cancel(id jsontext.Value) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	stop, ok := c.inFlight[string(id)]
	if ok {
		stop()
	}
	return ok
}

func (c *connection) fail(id jsontext.Value, code int, text string) {
	if id != nil && id.Kind() != '"' && id.Kind() != '0' {
		id = nil
	}
	if err := c.out.send(mcpwire.AppendFailure(nil, &mcpwire.Failure{ID: id, Code: code, Message: text})); err != nil {
		c.o.Logger.LogAttrs(context.Background(), slog.LevelWarn, "an error could not be sent", slog.String("error", err.Error()))
	}
}
