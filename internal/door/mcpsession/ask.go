package mcpsession

import (
	"context"
	"encoding/json" // the SDK's types speak encoding/json
	"errors"
	"fmt"
	"maps"
	"net/http"
	"strconv"
	"sync"
	"time"

	"github.com/go-json-experiment/json/jsontext"
	"github.com/modelcontextprotocol/go-sdk/mcp"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/mcpwire"
)

// clientOf returns what the session's client declared when it started.
func clientOf(s *mcp.ServerSession) call.Client {
	p := s.InitializeParams()
	if p == nil {
		return call.Client{}
	}
	var c call.Client
	if p.ClientInfo != nil {
		c.Name, c.Version = p.ClientInfo.Name, p.ClientInfo.Version
	}
	caps := p.Capabilities
	if caps == nil {
		return c
	}
	if e := caps.Elicitation; e != nil {
		c.ElicitURL = e.URL != nil
		c.ElicitForm = e.Form != nil || e.URL == nil
	}
	if caps.Sampling != nil {
		c.Sampling, c.SamplingTools = true, caps.Sampling.Tools != nil
	}
	c.Roots = caps.RootsV2 != nil
	return c
}

// origin fills in what the HTTP headers of a request say.
func origin(c *call.Call, h http.Header) {
	c.Credential.Peer = h.Get(headerPeer)
	c.Size, _ = strconv.Atoi(h.Get(headerSize)) // set by ServeHTTP
	if large := h.Get(headerArguments); large != "" {
		c.Args = []byte(large)
	}
	c.Key = mcpwire.IdempotencyKey(h.Get("Idempotency-Key"))
	c.Trace = call.Trace{Correlation: h.Get("X-Correlation-Id"), Parent: h.Get("Traceparent"), State: h.Get("Tracestate"), Baggage: h.Get("Baggage")}
}

func progressToken(p mcp.Params) any {
	if r, ok := p.(mcp.RequestParams); ok {
		return r.GetProgressToken()
	}
	return nil
}

// onStream is the context under which the SDK finds the stream of a request: by a value in the
// request's own context. What works for a call may use another one (a gateway's call outlives its
// caller); its messages still belong on the caller's stream.
type onStream struct {
	context.Context
	request context.Context
}

// Value implements context.Context.
func (c onStream) Value(key any) any {
	if v := c.request.Value(key); v != nil {
		return v
	}
	return c.Context.Value(key)
}

// sink sends notifications on the stream of the request they belong to.
type sink struct {
	request context.Context
	session *mcp.ServerSession
	token   any
	extra   *mcp.RequestExtra

	mu      sync.Mutex // guards what is below
	started bool
	last    float64
}

// Progress implements call.Sink.
func (s *sink) Progress(ctx context.Context, p call.Progress) error {
	if s.token == nil {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.started && p.Done <= s.last {
		return nil // it must increase
	}
	s.started, s.last = true, p.Done
	return s.session.NotifyProgress(onStream{ctx, s.request}, &mcp.ProgressNotificationParams{ProgressToken: s.token, Progress: p.Done, Total: p.Total, Message: p.Message})
}

// Log implements call.Sink; the SDK holds the level that the session asked for.
func (s *sink) Log(ctx context.Context, m call.LogMessage) error {
	data := m.Data
	if data == nil {
		data = jsontext.Value("null")
	}
	return s.session.Log(onStream{ctx, s.request}, &mcp.LoggingMessageParams{Level: mcp.LoggingLevel(m.Level), Logger: m.Logger, Data: json.RawMessage(data)})
}

// Notify implements call.Sink: sessions hear of changes on their own stream.
func (s *sink) Notify(context.Context, call.Notification) error {
	return call.Errorf(call.Internal, "internal error").Because(errors.New("not a subscription"))
}

// CloseStream implements call.StreamCloser (SEP-1699).
func (s *sink) CloseStream(retry time.Duration) {
	if s.extra != nil && s.extra.CloseSSEStream != nil {
		s.extra.CloseSSEStream(mcp.CloseSSEStreamArgs{RetryAfter: retry})
	}
}

// asker sends questions to the client as requests of its session and waits for the answers.
type asker struct {
	request context.Context
	session *mcp.ServerSession
	client  *call.Client
}

// Ask implements call.Asker. All questions are checked before the first is sent.
func (a *asker) Ask(ctx context.Context, questions ...call.Question) (map[string]jsontext.Value, error) {
	for _, q := range questions {
		if err := a.client.Supports(q); err != nil {
			return nil, err
		}
	}
	answers := make(map[string]jsontext.Value, len(questions))
	for _, q := range questions {
		answer, err := a.one(onStream{ctx, a.request}, q)
		if err != nil {
			if ctx.Err() != nil {
				return nil, ctx.Err()
			}
			return nil, call.Errorf(call.Unavailable, "the client did not answer %s", q.Method).Because(err)
		}
		raw, err := json.Marshal(answer)
		if err != nil {
			return nil, call.Errorf(call.Internal, "internal error").Because(err)
		}
		answers[q.Key] = raw
	}
	return answers, nil
}

func (a *asker) one(ctx context.Context, q call.Question) (any, error) {
	params := q.Params
	if len(params) == 0 {
		params = jsontext.Value("{}")
	}
	// A gateway in front of this may speak a revision in which questions have keys.
	key := mcp.Meta{"dev.newel/key": q.Key}
	switch q.Method {
	case call.MethodElicit:
		var p mcp.ElicitParams
		if err := json.Unmarshal(params, &p); err != nil {
			return nil, err
		}
		p.Meta = merge(p.Meta, key)
		return a.session.Elicit(ctx, &p)
	case call.MethodSample:
		var p mcp.CreateMessageWithToolsParams
		if err := json.Unmarshal(params, &p); err != nil {
			return nil, err
		}
		p.Meta = merge(p.Meta, key)
		r, err := a.session.CreateMessageWithTools(ctx, &p)
		if err != nil {
			return nil, err
		}
		return r, nil
	case call.MethodRoots:
		var p mcp.ListRootsParams
		if err := json.Unmarshal(params, &p); err != nil {
			return nil, err
		}
		p.Meta = merge(p.Meta, key)
		return a.session.ListRoots(ctx, &p)
	}
	return nil, fmt.Errorf("unknown method %q", q.Method)
}

// merge adds members to what the handler itself put there.
func merge(meta, more mcp.Meta) mcp.Meta {
	out := maps.Clone(more)
	maps.Copy(out, meta)
	return out
}
