package mcpsession

import (
	"container/list"
	"context"
	"fmt"
	"iter"
	"sync"

	"github.com/modelcontextprotocol/go-sdk/mcp"
)

// replay keeps what was sent on streams of sessions, so that a client that lost one can go on with it
// (Last-Event-ID). It is bounded: the oldest goes first, whosever it is, and a stream of which nothing
// is left is forgotten. The SDK's own store remembers every stream of a session until that ends, which
// is one for each request: a session that lives for long would grow without end.
//
// It is safe for concurrent use.
type replay struct {
	most int // bytes

	mu       sync.Mutex
	used     int
	order    list.List // of *replayed, the oldest first
	sessions map[string]map[string]*replayStream
}

var _ mcp.EventStore = (*replay)(nil)

// A replayStream is what is left of one stream.
type replayStream struct {
	session, id string
	opened      *list.Element   // nil when it was forgotten that it was opened
	events      []*list.Element // the oldest first
	first       int             // index of that, as the SDK counts
}

// replayed is one event, or, without an index of its own, that a stream was opened.
type replayed struct {
	of   *replayStream
	data []byte
}

// What an event and a stream take beside their data, about.
const (
	eventBytes  = 160
	streamBytes = 320
)

func newReplay(most int) *replay {
	return &replay{most: most, sessions: map[string]map[string]*replayStream{}}
}

// Open implements mcp.EventStore.
func (r *replay) Open(_ context.Context, session, id string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.open(session, id)
	return nil
}

func (r *replay) open(session, id string) *replayStream {
	of := r.sessions[session]
	if of == nil {
		of = map[string]*replayStream{}
		r.sessions[session] = of
	}
	s := of[id]
	if s == nil {
		s = &replayStream{session: session, id: id}
		of[id] = s
		s.opened = r.order.PushBack(&replayed{of: s})
		r.used += streamBytes
		r.shrink()
	}
	return s
}

// Append implements mcp.EventStore. What is sent on a stream that was forgotten is not kept: nobody
// could say any more which event it is.
func (r *replay) Append(_ context.Context, session, id string, data []byte) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.sessions[session][id]
	switch {
	case s == nil && id != "":
		return nil
	case s == nil: // the stream of the session itself, which never is
		s = r.open(session, id)
	}
	s.events = append(s.events, r.order.PushBack(&replayed{of: s, data: data}))
	r.used += eventBytes + len(data)
	r.shrink()
	return nil
}

// After implements mcp.EventStore.
func (r *replay) After(_ context.Context, session, id string, index int) iter.Seq2[[]byte, error] {
	return func(yield func([]byte, error) bool) {
		left, err := r.after(session, id, index+1)
		if err != nil {
			yield(nil, err)
			return
		}
		for _, data := range left {
			if !yield(data, nil) {
				return
			}
		}
	}
}

// after returns the events of a stream from an index on.
func (r *replay) after(session, id string, from int) ([][]byte, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.sessions[session][id]
	if s == nil || from < s.first {
		return nil, fmt.Errorf("what follows event %d of the stream is not kept any more: %w", from-1, mcp.ErrEventsPurged)
	}
	var left [][]byte
	for _, e := range s.events[min(from-s.first, len(s.events)):] {
		left = append(left, e.Value.(*replayed).data)
	}
	return left, nil
}

// SessionClosed implements mcp.EventStore.
func (r *replay) SessionClosed(_ context.Context, session string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, s := range r.sessions[session] {
		if s.opened != nil {
			r.remove(s.opened, streamBytes)
		}
		for _, e := range s.events {
			r.remove(e, eventBytes+len(e.Value.(*replayed).data))
		}
	}
	delete(r.sessions, session)
	return nil
}

// shrink forgets the oldest until the rest is within the bound. What was added last stays.
func (r *replay) shrink() {
	for r.used > r.most && r.order.Len() > 1 {
		e := r.order.Front()
		s := e.Value.(*replayed).of
		switch {
		case e != s.opened:
			r.remove(e, eventBytes+len(e.Value.(*replayed).data))
			s.events[0] = nil
			s.events, s.first = s.events[1:], s.first+1
		default:
			r.remove(e, streamBytes)
			s.opened = nil
		}
		if s.opened == nil && len(s.events) == 0 && s.id != "" {
			delete(r.sessions[s.session], s.id)
		}
	}
}

func (r *replay) remove(e *list.Element, bytes int) {
	r.order.Remove(e)
	r.used -= bytes
}
