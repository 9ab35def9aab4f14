package mcpupstream

import (
	"context"
	"crypto/rand"
	"errors"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
)

// A flight is one call at a server with sessions. It goes on by itself: a caller rides along, and
// one who has to come back with an answer gets off while the call is parked.
type flight struct {
	t       *target
	s       *session
	release func()
	cancel  context.CancelFunc
	asks    chan *message // questions of the server, in order
	done    chan landing  // one, when the call has ended
	sink    atomic.Pointer[call.Sink]

	// Only who rides touches these.
	open  *message // the question that waits for its answer
	asked int      // questions so far: their keys are numbered
	timer *time.Timer
	since time.Time // parked at
}

type landing struct {
	m   *message
	err error
}

// maxOpenQuestions bounds how many questions one call may have open at once.
const maxOpenQuestions = 8

// fly starts a call. It ends with its answer, or when it is cancelled.
func (t *target) fly(c *call.Call, s *session, release func()) *flight {
	ctx, cancel := context.WithCancel(t.u.life)
	f := &flight{t: t, s: s, release: release, cancel: cancel, asks: make(chan *message, maxOpenQuestions), done: make(chan landing, 1)}
	f.sink.Store(&c.Sink)
	id := s.ids.Add(1)
	r := &request{id: id, method: t.method, name: t.subject(c), params: t.params(ctx, c, s, id).end()}
	t.u.background.Go(func() {
		m, err := s.request(ctx, r, func(m *message) { f.take(ctx, m) })
		f.done <- landing{m, err}
	})
	return f
}

// take takes what the server says meanwhile.
func (f *flight) take(ctx context.Context, m *message) {
	switch {
	case m.ID == nil:
		if sink := f.sink.Load(); sink != nil {
			notify(ctx, *sink, m)
		}
	case isQuestion(m.Method):
		select {
		case f.asks <- m:
		default:
			f.s.respond(ctx, m.ID, nil, &rpcError{Code: -32603, Message: "too many questions are open"})
		}
	default:
		f.s.respond(ctx, m.ID, nil, &rpcError{Code: -32601, Message: "the client does not serve this method"})
	}
}

// isQuestion reports whether a request of a server is for the caller to answer.
func isQuestion(method string) bool {
	return method == call.MethodElicit || method == call.MethodSample || method == call.MethodRoots
}

// finish gives the session back once the call is over.
func (f *flight) finish() {
	f.cancel()
	f.release()
}

// ride goes along until the call has ended, or its caller has to be asked and come back.
func (t *target) ride(ctx context.Context, c *call.Call, f *flight) (*call.Result, error) {
	f.sink.Store(&c.Sink)
	for {
		if f.open != nil {
			err := f.answer(ctx, c)
			var ask *call.InputRequired
			switch {
			case errors.As(err, &ask):
				f.sink.Store(nil)
				return nil, t.u.parked.park(f, ask)
			case err != nil:
				f.abandon()
				return nil, err
			}
		}
		select {
		case m := <-f.asks:
			f.open = m
			f.asked++
		case end := <-f.done:
			f.finish()
			switch {
			case end.err != nil:
				return nil, end.err
			case end.m.Error != nil:
				return nil, end.m.Error
			}
			return t.result(end.m.Result, false)
		case <-ctx.Done():
			f.abandon()
			return nil, ctx.Err()
		}
	}
}

// abandon cancels the call and waits for its end.
func (f *flight) abandon() {
	f.cancel()
	<-f.done
	f.finish()
}

// answer asks the caller what the server asked. What the caller's side cannot answer is told to
// the server, which decides what to do without.
func (f *flight) answer(ctx context.Context, c *call.Call) error {
	key := keyOf(f.open.Params)
	if key == "" {
		key = "q" + strconv.Itoa(f.asked)
	}
	answers, err := c.Asker.Ask(ctx, call.Question{Key: key, Method: f.open.Method, Params: f.open.Params})
	var ask *call.InputRequired
	var own *call.Error
	switch {
	case errors.As(err, &ask):
		return err
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.As(err, &own) && own.Code == call.Malformed:
		return err // the caller's answer is not of the form asked for: it is told
	case err != nil:
		f.s.respond(ctx, f.open.ID, nil, &rpcError{Code: -32603, Message: call.AsError(err).Message})
	default:
		f.s.respond(ctx, f.open.ID, answers[key], nil)
	}
	f.open = nil
	return nil
}

// keyOf returns the key that a Newel behind this gave its question, or "": session revisions have
// no keys of their own.
func keyOf(params jsontext.Value) string {
	var p struct {
		Meta struct {
			Key string `json:"dev.newel/key"`
		} `json:"_meta"`
	}
	if params == nil || json.Unmarshal(params, &p) != nil || len(p.Meta.Key) > 128 {
		return ""
	}
	return p.Meta.Key
}

// parking holds calls whose callers have to come back. Their number and time are bounded.
type parking struct {
	max     int
	timeout time.Duration
	mu      sync.Mutex
	calls   map[string]*flight
}

const parkedPrefix = "parked:"

// isParked tells the state of a parked call from that of a stateless server.
func isParked(state string) (id string, ok bool) { return strings.CutPrefix(state, parkedPrefix) }

// park keeps a call until its caller comes back, and returns what tells the caller to.
func (p *parking) park(f *flight, ask *call.InputRequired) error {
	id := rand.Text()
	p.mu.Lock()
	if len(p.calls) >= p.max {
		p.mu.Unlock()
		f.abandon()
		e := call.Errorf(call.Exhausted, "too many calls of this server wait for input; try again later")
		e.RetryAfter = 10 * time.Second
		return e
	}
	p.calls[id] = f
	f.since = time.Now()
	f.timer = time.AfterFunc(p.timeout, func() {
		if p.remove(id) == f {
			f.abandon()
		}
	})
	p.mu.Unlock()
	return &call.InputRequired{Questions: ask.Questions, State: parkedPrefix + id}
}

// take takes a parked call of this target out; nobody else can any more.
func (p *parking) take(id string, t *target) *flight {
	f := p.remove(id)
	if f == nil {
		return nil
	}
	f.timer.Stop()
	if f.t.name != t.name || f.t.kind != t.kind {
		f.abandon()
		return nil
	}
	return f
}

func (p *parking) remove(id string) *flight {
	p.mu.Lock()
	defer p.mu.Unlock()
	f := p.calls[id]
	delete(p.calls, id)
	return f
}

// evict gives up the call that has waited longest, if that is long enough, so that a process that
// it holds is free for others. Its caller is told when it comes back.
func (p *parking) evict() bool {
	p.mu.Lock()
	var oldest *flight
	var at string
	for id, f := range p.calls {
		if oldest == nil || f.since.Before(oldest.since) {
			oldest, at = f, id
		}
	}
	if oldest == nil || time.Since(oldest.since) < minParked {
		p.mu.Unlock()
		return false
	}
	delete(p.calls, at)
	p.mu.Unlock()
	oldest.timer.Stop()
	oldest.abandon()
	return true
}

// minParked is how long every parked call may wait, whoever else needs its process.
const minParked = 2 * time.Second

func (p *parking) len() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.calls)
}

// closeAll abandons all parked calls.
func (p *parking) closeAll() {
	p.mu.Lock()
	all := p.calls
	p.calls = map[string]*flight{}
	p.mu.Unlock()
	for _, f := range all {
		f.timer.Stop()
		f.abandon()
	}
}
