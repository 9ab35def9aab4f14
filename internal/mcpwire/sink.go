package mcpwire

import (
	"context"
	"errors"
	"slices"
	"strconv"
	"sync"

	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
)

// sink sends notifications of one request on that request's own stream.
type sink struct {
	send     func([]byte) error
	id       jsontext.Value // of the request: the subscription id of a listen stream
	token    jsontext.Value // progress token, or nil
	level    int            // lowest log level wanted, or noLevel
	wanted   *notifications // of a listen request
	mu       sync.Mutex     // guards what is below, and keeps messages in order
	progress float64        // last one sent
	started  bool           // a progress was sent
	ended    bool           // nothing may be sent any more
}

// levels of RFC 5424 as MCP spells them, lowest first.
var levels = []string{"debug", "info", "notice", "warning", "error", "critical", "alert", "emergency"}

const noLevel = 1 << 10

func newSink(m *Message, send func([]byte) error) *sink {
	s := &sink{send: send, id: m.ID, token: m.Params.Meta.ProgressToken, level: noLevel, wanted: m.Params.Notifications}
	if i := slices.Index(levels, m.Params.Meta.LogLevel); i >= 0 {
		s.level = i
	}
	return s
}

var errEnded = errors.New("the call has ended")

// end makes the sink refuse everything: after the answer nothing follows.
func (s *sink) end() {
	s.mu.Lock()
	s.ended = true
	s.mu.Unlock()
}

// deliver sends one encoded message unless the call has ended.
func (s *sink) deliver(b []byte) error {
	if s.ended {
		return errEnded
	}
	return s.send(b)
}

// Progress implements call.Sink. Progress that does not increase is dropped (MCP: it MUST increase).
func (s *sink) Progress(_ context.Context, p call.Progress) error {
	if s.token == nil {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.started && p.Done <= s.progress {
		return nil
	}
	s.started, s.progress = true, p.Done
	b := append([]byte(`{"jsonrpc":"2.0","method":"notifications/progress","params":{"progressToken":`), s.token...)
	b = strconv.AppendFloat(append(b, `,"progress":`...), p.Done, 'g', -1, 64)
	if p.Total > 0 {
		b = strconv.AppendFloat(append(b, `,"total":`...), p.Total, 'g', -1, 64)
	}
	if p.Message != "" {
		b = call.AppendString(append(b, `,"message":`...), p.Message)
	}
	return s.deliver(append(b, "}}"...))
}

// Log implements call.Sink.
func (s *sink) Log(_ context.Context, m call.LogMessage) error {
	i := slices.Index(levels, m.Level)
	if i < 0 {
		return call.Errorf(call.Internal, "internal error").Because(errors.New("unknown log level " + m.Level))
	}
	if i < s.level {
		return nil
	}
	b := append([]byte(`{"jsonrpc":"2.0","method":"notifications/message","params":{"level":"`), m.Level...)
	b = append(b, '"')
	if m.Logger != "" {
		b = call.AppendString(append(b, `,"logger":`...), m.Logger)
	}
	data := m.Data
	if data == nil {
		data = jsontext.Value("null")
	}
	b = append(append(b, `,"data":`...), data...)
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.deliver(append(b, "}}"...))
}

// Notify implements call.Sink. Every message carries the subscription id.
func (s *sink) Notify(_ context.Context, n call.Notification) error {
	if s.wanted == nil {
		return call.Errorf(call.Internal, "internal error").Because(errors.New("not a subscription"))
	}
	b := append([]byte(`{"jsonrpc":"2.0","method":"`), n.Method...)
	b = append(append(b, `","params":{"_meta":{"io.modelcontextprotocol/subscriptionId":`...), s.id...)
	b = append(b, '}')
	switch {
	case n.Method == call.Acknowledged:
		b = append(b, `,"notifications":`...)
		b = s.wanted.appendTo(b)
	case n.Task != nil:
		b = appendTask(append(b, ','), n.Task, true)
	case n.URI != "":
		b = call.AppendString(append(b, `,"uri":`...), n.URI)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.deliver(append(b, "}}"...))
}

// appendTo appends what is honoured: everything that was asked for.
func (n *notifications) appendTo(b []byte) []byte {
	b = append(b, '{')
	first := true
	add := func(name string, on bool) {
		if !on {
			return
		}
		if !first {
			b = append(b, ',')
		}
		first = false
		b = append(append(append(b, '"'), name...), `":true`...)
	}
	add("toolsListChanged", n.Tools)
	add("promptsListChanged", n.Prompts)
	add("resourcesListChanged", n.Resources)
	list := func(name string, items []string) {
		if len(items) == 0 {
			return
		}
		if !first {
			b = append(b, ',')
		}
		first = false
		b = append(append(append(b, '"'), name...), `":[`...)
		for i, u := range items {
			if i > 0 {
				b = append(b, ',')
			}
			b = call.AppendString(b, u)
		}
		b = append(b, ']')
	}
	list("resourceSubscriptions", n.URIs)
	list("taskIds", n.Tasks)
	return append(b, '}')
}
