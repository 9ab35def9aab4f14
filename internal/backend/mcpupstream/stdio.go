package mcpupstream

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"time"

	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/internal/process"
)

// A pipe is one running process that speaks lines of JSON. Send is safe for concurrent use; Read
// is called by one goroutine and fails once the process has ended.
type pipe interface {
	Send(ctx context.Context, line []byte) error
	Read() ([]byte, error)
	Kill()
}

// piped is one process with several requests on their way at once.
type piped struct {
	pipe    pipe
	maxSize int
	unasked func(*message)
	ended   chan struct{}

	mu      sync.Mutex // guards what is below
	waiting map[int64]*waiter
	early   []*message // questions asked before the call that they are for
	err     error      // why it ended
}

type waiter struct {
	inbox  chan *message // what belongs to the request; bounded: a slow caller loses progress, not its answer
	answer chan *message
	call   bool // of a capability, as opposed to a list or a subscription
}

// inboxSize bounds what one slow caller holds back.
const inboxSize = 64

func newPiped(p pipe, maxSize int, unasked func(*message)) *piped {
	l := &piped{pipe: p, maxSize: maxSize, unasked: unasked, ended: make(chan struct{}), waiting: map[int64]*waiter{}}
	go l.read()
	return l
}

// read takes lines apart until the process ends. Lines that are no messages are skipped: many
// servers print to standard output what they should not.
func (l *piped) read() {
	messages := newPace(messagesAtOnce, messagesPerSecond)
	for {
		line, err := l.pipe.Read()
		if err == nil && !l.line(line) && !messages.take() {
			l.pipe.Kill()
			err = errFlood
		}
		if err != nil {
			l.mu.Lock()
			l.err = err
			l.mu.Unlock()
			close(l.ended)
			return
		}
	}
}

// line takes one line and reports whether it is an answer that somebody waits for.
func (l *piped) line(line []byte) bool {
	m, err := parse(line, l.maxSize)
	return err == nil && l.deliver(m)
}

// deliver passes a message on and reports whether it is an answer that somebody waits for.
func (l *piped) deliver(m *message) bool {
	l.mu.Lock()
	var w *waiter
	switch {
	case m.isResponse():
		if id, err := strconv.ParseInt(string(m.ID), 10, 64); err == nil {
			if w = l.waiting[id]; w != nil {
				delete(l.waiting, id)
			}
		}
		l.mu.Unlock()
		if w != nil {
			w.answer <- m // has room: it is sent once
		}
		return w != nil
	case m.Method == "notifications/progress":
		w = l.waiting[progressToken(m.Params)]
	case m.ID != nil || m.Method == "notifications/message":
		// Nothing says what it belongs to. Whoever may be asked has the process for itself.
		for _, one := range l.waiting {
			if one.call && w != nil {
				w = nil
				break
			}
			if one.call {
				w = one
			}
		}
	}
	l.mu.Unlock()
	if w != nil {
		select {
		case w.inbox <- m:
			return false
		default:
		}
	}
	switch {
	case m.ID == nil:
		l.unasked(m)
	case w == nil && l.hold(m):
	default:
		go l.refuse(m) // ends when it is written, at the latest after cancelTimeout
	}
	return false
}

// hold keeps a question that came before its call: some servers ask as soon as they are told that
// the client is ready.
func (l *piped) hold(m *message) bool {
	if !isQuestion(m.Method) {
		return false
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.early) >= maxOpenQuestions {
		return false
	}
	l.early = append(l.early, m)
	return true
}

// refuse answers a request that nobody can answer; ping is answered.
func (l *piped) refuse(m *message) {
	ctx, stop := context.WithTimeout(context.Background(), cancelTimeout)
	defer stop()
	rest := `"error":{"code":-32601,"message":"nobody can be asked now"}}`
	if m.Method == "ping" {
		rest = `"result":{}}`
	}
	_ = l.send(ctx, fmt.Appendf(nil, `{"jsonrpc":"2.0","id":%s,%s`, m.ID, rest)) // it may have ended
}

// exchange implements link.
func (l *piped) exchange(ctx context.Context, r *request, on func(*message)) (*message, error) {
	w := &waiter{inbox: make(chan *message, inboxSize), answer: make(chan *message, 1), call: r.name != ""}
	l.mu.Lock()
	l.waiting[r.id] = w
	if w.call {
		for _, m := range l.early {
			w.inbox <- m // has room: it is new
		}
		l.early = nil
	}
	l.mu.Unlock()
	defer func() {
		l.mu.Lock()
		delete(l.waiting, r.id)
		l.mu.Unlock()
	}()
	if err := l.pipe.Send(ctx, r.append(nil)); err != nil {
		if errors.Is(err, process.ErrNotSent) {
			err = unsentError{err}
		}
		return nil, err
	}
	for {
		select {
		case m := <-w.inbox:
			on(m)
		case m := <-w.answer:
			for len(w.inbox) > 0 { // what came before the answer goes out before it
				on(<-w.inbox)
			}
			return m, nil
		case <-l.ended:
			select {
			case m := <-w.answer: // it answered, then ended
				return m, nil
			default:
			}
			l.mu.Lock()
			defer l.mu.Unlock()
			switch {
			case errors.Is(l.err, process.ErrLineTooLong):
				return nil, errTooLarge
			case errors.Is(l.err, errFlood):
				return nil, errFlood
			}
			return nil, fmt.Errorf("%w: %w", errCut, l.err)
		case <-ctx.Done():
			l.cancel(ctx, r.id)
			return nil, ctx.Err()
		}
	}
}

// cancelTimeout bounds how long telling an upstream of a cancelled call may take.
const cancelTimeout = 2 * time.Second

// cancel tells the server that nobody waits any more (basic/patterns/cancellation).
func (l *piped) cancel(ctx context.Context, id int64) {
	ctx, stop := context.WithTimeout(context.WithoutCancel(ctx), cancelTimeout)
	defer stop()
	_ = l.send(ctx, cancelled(id)) // it may have ended: then there is nothing to cancel
}

func cancelled(id int64) []byte {
	return fmt.Appendf(nil, `{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":%d,"reason":"the caller went away"}}`, id)
}

// send implements link.
func (l *piped) send(ctx context.Context, body []byte) error { return l.pipe.Send(ctx, body) }

// close implements link.
func (l *piped) close(context.Context) { l.pipe.Kill() }

// alive implements link.
func (l *piped) alive() bool {
	select {
	case <-l.ended:
		return false
	default:
		return true
	}
}

// progressToken returns the token of a progress notification, which is the id of its request.
func progressToken(params jsontext.Value) int64 {
	var p struct {
		Token jsontext.Value `json:"progressToken"`
	}
	if unmarshal(params, &p) != nil {
		return 0
	}
	n, err := strconv.ParseInt(string(p.Token), 10, 64)
	if err != nil {
		return 0
	}
	return n
}
