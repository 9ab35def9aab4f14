package mcpupstream

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"go.opentelemetry.io/otel/trace"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/catalog"
)

// A target is one capability at the upstream: where a call of it ends.
type target struct {
	u       *Upstream
	kind    call.Kind
	method  string
	name    string // at the upstream
	headers []catalog.ParamHeader
	fixed   jsontext.Value // arguments that callers do not send, as an object, or nil
	read    bool           // running it twice does no harm
	tasks   bool           // the server may answer with a task
}

// maxRounds bounds how often one call may ask its caller.
const maxRounds = 16

// run implements call.Handler.
func (t *target) run(ctx context.Context, c *call.Call) (*call.Result, error) {
	r, err := t.dispatch(ctx, c)
	return r, t.outcome(ctx, err)
}

// dispatch goes on with a call that asked before, or begins one.
func (t *target) dispatch(ctx context.Context, c *call.Call) (*call.Result, error) {
	id, parked := isParked(c.Resume)
	if parked {
		f := t.u.parked.take(id, t)
		if f == nil {
			return nil, call.Errorf(call.Conflict, "the call that this answers has waited too long, or was answered before; start it again without requestState")
		}
		return t.ride(ctx, c, f)
	}
	s, release, err := t.u.lease(ctx, c)
	if err != nil {
		return nil, unsentError{err}
	}
	if s.stateless {
		defer release()
		return t.stateless(ctx, c, s)
	}
	r, err := t.ride(ctx, c, t.fly(c, s, release))
	var status *statusError
	if errors.As(err, &status) && status.status == http.StatusNotFound && ctx.Err() == nil {
		// The session was gone before the call could run: once more, on a new one.
		if s, release, err = t.u.lease(ctx, c); err != nil {
			return nil, unsentError{err}
		}
		return t.ride(ctx, c, t.fly(c, s, release))
	}
	return r, err
}

// outcome turns what went wrong into what the caller is told.
func (t *target) outcome(ctx context.Context, err error) error {
	if err == nil {
		return nil
	}
	var own *call.Error
	var ask *call.InputRequired
	var rpc *rpcError
	var unsent unsentError
	var status *statusError
	name := t.u.name
	switch {
	case errors.As(err, &own), errors.As(err, &ask):
		return err
	case errors.As(err, &rpc) && !errors.As(err, &unsent):
		return t.refusal(rpc)
	case ctx.Err() != nil && (errors.Is(err, ctx.Err()) || errors.Is(err, context.DeadlineExceeded)):
		return ctx.Err()
	case errors.As(err, &status) && !errors.As(err, &unsent):
		return t.statusOutcome(name, status, err)
	case errors.As(err, &unsent):
		return call.Errorf(call.Unavailable, "the server %q behind this cannot be reached; nothing was done", name).Because(err)
	case errors.Is(err, errTooLarge):
		return call.Errorf(call.TooLarge, "the answer of the server %q is larger than the gateway takes", name).Because(err)
	case errors.Is(err, errFlood) && !t.read:
		return call.Errorf(call.OutcomeUnknown, "the server %q behind this sent more messages than the gateway takes; whether it did what was asked is not known", name).Because(err)
	case errors.Is(err, errFlood):
		return call.Errorf(call.Failed, "the server %q behind this sent more messages than the gateway takes", name).Because(err)
	case errors.Is(err, errGarbage) && !t.read:
		return call.Errorf(call.OutcomeUnknown, "the server %q behind this gave an answer that is not valid; whether it did what was asked is not known", name).Because(err)
	case errors.Is(err, errGarbage):
		return call.Errorf(call.Failed, "the server %q behind this gave an answer that is not valid", name).Because(err)
	}
	if t.read {
		return call.Errorf(call.Unavailable, "the connection to the server %q was lost before its answer came", name).Because(err)
	}
	return call.Errorf(call.OutcomeUnknown, "the connection to the server %q was lost before its answer came; whether it did what was asked is not known", name).Because(err)
}

func (t *target) statusOutcome(name string, s *statusError, err error) error {
	var e *call.Error
	switch {
	case s.status == http.StatusUnauthorized || s.status == http.StatusForbidden:
		e = call.Errorf(call.Unavailable, "the server %q behind this does not accept the gateway's credentials", name)
		e.Retryable = false
	case s.status == http.StatusTooManyRequests:
		e = call.Errorf(call.Exhausted, "the server %q behind this is at its limit", name)
	case s.status < 300 && !t.read: // somebody took it, and what came back is no answer
		e = call.Errorf(call.OutcomeUnknown, "the server %q behind this gave an answer that is not valid; whether it did what was asked is not known", name)
	case s.status < 300:
		e = call.Errorf(call.Failed, "the server %q behind this gave an answer that is not valid", name)
	case s.status >= 500 && !t.read: // whoever says so may have sent it on
		e = call.Errorf(call.OutcomeUnknown, "the server %q behind this failed with HTTP status %d; whether it did what was asked is not known", name, s.status)
	case s.status >= 500: // it only reads: nothing was done
		e = call.Errorf(call.Unavailable, "the server %q behind this failed with HTTP status %d", name, s.status)
	case s.status >= 300 && s.status < 400:
		e = call.Errorf(call.Unavailable, "the server %q behind this redirects; its final address has to be configured", name)
		e.Retryable = false
	default:
		e = call.Errorf(call.Failed, "the server %q behind this failed with HTTP status %d", name, s.status)
	}
	e.RetryAfter = s.after
	return e.Because(err)
}

// refusal passes an error of the server on, with its own code. Codes that only speak of the hop
// between gateway and server stay here.
func (t *target) refusal(e *rpcError) error {
	code := call.Failed
	out := &call.Error{Message: e.Message, Data: e.Data, RPC: e.Code}
	switch {
	case e.Code == -32021, e.Data.Kind() == '{' && bytes.Contains(e.Data, []byte(`"requiredCapabilities"`)):
		code, out.RPC = call.Unsupported, 0
	case e.Code == -32002, t.kind == call.Resource && e.Code == -32602:
		code, out.RPC = call.NotFound, 0 // each era has its own code for it
		if out.Data == nil {
			out.Data = jsontext.Value("{}")
		}
	case e.Code == -32602:
		code = call.Invalid
	case e.Code == -32020 || e.Code == -32022 || e.Code == -32700 || e.Code == -32600:
		return call.Errorf(call.Failed, "the server %q behind this and the gateway do not understand each other", t.u.name).Because(e)
	}
	out.Code = code
	return out.Because(e)
}

// meta returns the _meta of a request of the stateless revision. Without a call it is the
// gateway's own.
func (u *Upstream) meta(c *call.Call, caps jsontext.Value, token int64) jsontext.Value {
	o := newObject()
	o.str("io.modelcontextprotocol/protocolVersion", statelessRevision)
	o.raw("io.modelcontextprotocol/clientCapabilities", caps)
	o.raw("io.modelcontextprotocol/clientInfo", u.clientInfo)
	if c != nil && c.LogLevel != "" {
		o.str("io.modelcontextprotocol/logLevel", c.LogLevel)
	}
	o.progress(token)
	return o.end()
}

// progress asks for progress under a token, unless that is 0.
func (o *object) progress(token int64) {
	if token != 0 {
		o.raw("progressToken", strconv.AppendInt(nil, token, 10))
	}
}

// travel adds what goes on to every server: trace context (SEP-414) and what the house does not know.
func (o *object) travel(ctx context.Context, c *call.Call) {
	if sc := trace.SpanContextFromContext(ctx); sc.IsValid() {
		o.str("traceparent", "00-"+sc.TraceID().String()+"-"+sc.SpanID().String()+"-"+sc.TraceFlags().String())
	} else if c.Trace.Parent != "" {
		o.str("traceparent", c.Trace.Parent)
	}
	if c.Trace.State != "" {
		o.str("tracestate", c.Trace.State)
	}
	if c.Trace.Baggage != "" {
		o.str("baggage", c.Trace.Baggage)
	}
	if c.Once != "" {
		o.str("dev.newel/idempotencyKey", c.Once)
	}
	o.all(c.Meta, "progressToken", "traceparent", "tracestate", "baggage", "dev.newel/idempotencyKey")
}

// params builds the params of a call for one session.
func (t *target) params(ctx context.Context, c *call.Call, s *session, id int64) *object {
	token := int64(0)
	if c.Progress {
		token = id
	}
	o := newObject()
	switch t.kind {
	case call.Resource:
		o.str("uri", c.Name)
	default:
		o.str("name", t.name)
		if args := t.arguments(c.Args); args != nil {
			o.raw("arguments", args)
		}
	}
	o.all(c.Unknown, "name", "uri", "arguments", "task")
	meta := o.open("_meta")
	if s.stateless {
		o.str("io.modelcontextprotocol/protocolVersion", statelessRevision)
		o.raw("io.modelcontextprotocol/clientCapabilities", t.capabilities(c))
		o.raw("io.modelcontextprotocol/clientInfo", t.u.clientInfo)
		if c.LogLevel != "" {
			o.str("io.modelcontextprotocol/logLevel", c.LogLevel)
		}
	}
	o.travel(ctx, c)
	o.progress(token)
	o.close(meta)
	return o
}

// arguments adds the fixed arguments.
func (t *target) arguments(args jsontext.Value) jsontext.Value {
	if len(t.fixed) <= 2 {
		return args
	}
	o := newObject()
	o.all(args)
	o.all(t.fixed)
	return o.end()
}

// mirror returns the Mcp-Param headers of a call.
func (t *target) mirror(args jsontext.Value) [][2]string {
	var out [][2]string
	for _, h := range t.headers {
		v := args
		for _, name := range h.Path {
			var found jsontext.Value
			if v.Kind() == '{' {
				_ = call.EachMember(v, func(n string, m jsontext.Value) {
					if n == name {
						found = m.Clone()
					}
				})
			}
			v = found
		}
		switch {
		case v == nil || v.Kind() == 'n':
		case v.Kind() == '"':
			if s, err := jsontext.AppendUnquote(nil, v); err == nil {
				out = append(out, [2]string{h.Header, headerValue(string(s))})
			}
		default:
			out = append(out, [2]string{h.Header, string(v)})
		}
	}
	return out
}

// subject is what goes into Mcp-Name.
func (t *target) subject(c *call.Call) string {
	if t.kind == call.Resource {
		return c.Name
	}
	return t.name
}

// carried is the state of a call to a stateless server whose stateless caller has to be asked:
// the server's own state, untouched, and what it asked.
type carried struct {
	State     *string         `json:"state,omitempty"`
	Questions []call.Question `json:"questions"`
}

// stateless runs a call at a server of the stateless revision: each round is a request of its own.
func (t *target) stateless(ctx context.Context, c *call.Call, s *session) (*call.Result, error) {
	var before carried
	var answers map[string]jsontext.Value
	if c.Resume != "" {
		var err error
		if before, err = resumed(c.Resume); err != nil {
			return nil, err
		}
		if answers, err = t.ask(ctx, c, &before); err != nil {
			return nil, err
		}
	}
	for range maxRounds {
		id := s.ids.Add(1)
		p := t.params(ctx, c, s, id)
		if before.State != nil {
			p.str("requestState", *before.State)
		}
		if len(answers) > 0 {
			r := newObject()
			for _, q := range before.Questions {
				r.raw(q.Key, answers[q.Key])
			}
			p.raw("inputResponses", r.end())
		}
		m, err := s.request(ctx, &request{id: id, method: t.method, name: t.subject(c), params: p.end(), headers: t.mirror(t.arguments(c.Args))}, func(m *message) { notify(ctx, c.Sink, m) })
		switch {
		case err != nil:
			return nil, err
		case m.Error != nil && m.Error.Code == -32022:
			t.u.forget(s)
			return nil, unsentError{m.Error}
		case m.Error != nil:
			return nil, m.Error
		case m.Result.Type == "task" && t.takesTask(c):
			return elsewhere(m.Result)
		case m.Result.Type != "input_required":
			return t.result(m.Result, true)
		}
		if before, err = questions(m.Result); err != nil {
			return nil, err
		}
		if answers, err = t.ask(ctx, c, &before); err != nil {
			return nil, err
		}
	}
	return nil, call.Errorf(call.Failed, "the server %q asked %d times without coming to an end", t.u.name, maxRounds)
}

// resumed reads what a call carried.
func resumed(state string) (out carried, err error) {
	if err := json.Unmarshal([]byte(state), &out); err != nil {
		return out, call.Errorf(call.Conflict, "the server behind this was changed meanwhile; start the call again without requestState")
	}
	return out, nil
}

// questions reads what an input_required result asks.
func questions(r *result) (carried, error) {
	out := carried{State: r.RequestState}
	if r.InputRequests == nil {
		return out, nil
	}
	var failure error
	err := call.EachMember(r.InputRequests, func(key string, v jsontext.Value) {
		var q struct {
			Method string         `json:"method"`
			Params jsontext.Value `json:"params"`
		}
		if err := json.Unmarshal(v, &q); err != nil {
			failure = err
		}
		out.Questions = append(out.Questions, call.Question{Key: key, Method: q.Method, Params: q.Params})
	})
	if err = errors.Join(err, failure); err != nil {
		return out, fmt.Errorf("%w: inputRequests: %w", errGarbage, err)
	}
	return out, nil
}

// ask asks the caller. A stateless caller comes back: then the state says where to go on.
func (t *target) ask(ctx context.Context, c *call.Call, q *carried) (map[string]jsontext.Value, error) {
	if len(q.Questions) == 0 {
		return nil, nil
	}
	answers, err := c.Asker.Ask(ctx, q.Questions...)
	var ask *call.InputRequired
	if errors.As(err, &ask) {
		state, encErr := json.Marshal(q)
		if encErr != nil {
			return nil, encErr
		}
		return nil, &call.InputRequired{Questions: ask.Questions, State: string(state)}
	}
	return answers, err
}

// forget makes the next call find the era out anew.
func (u *Upstream) forget(s *session) {
	u.era.Store(nil)
	u.stateless.CompareAndSwap(s, nil)
	s.broken.Store(true)
}

// maxTTL bounds how long a server's word counts.
const maxTTL = 24 * time.Hour

// result passes a result on. Which member is its content depends on the method.
func (t *target) result(r *result, stateless bool) (*call.Result, error) {
	if r.Type != "" && r.Type != "complete" {
		return nil, fmt.Errorf("%w: a result of type %.40q was not negotiated", errGarbage, r.Type)
	}
	out := &call.Result{Structured: r.Structured, IsError: r.IsError, Next: r.Next, Public: r.Scope == "public"}
	switch t.kind {
	case call.Tool:
		out.Content = r.Content
	case call.Resource:
		if out.Content = r.Contents; out.Content == nil {
			return nil, fmt.Errorf("%w: contents is missing", errGarbage)
		}
		// Only the stateless revision has words for it: there what is not said is private (SEP-2549).
		out.Private = stateless && !out.Public
		if ms, err := strconv.ParseInt(string(r.TTL), 10, 64); err == nil {
			out.TTL = time.Duration(min(ms, maxTTL.Milliseconds())) * time.Millisecond
			if ms <= 0 {
				out.TTL = -1
			}
		}
	case call.Prompt:
		if out.Content = r.Messages; out.Content == nil {
			return nil, fmt.Errorf("%w: messages is missing", errGarbage)
		}
	}
	if out.Content != nil && out.Content.Kind() != '[' {
		return nil, fmt.Errorf("%w: the content is no array", errGarbage)
	}
	if r.Meta != nil || r.Unknown != nil {
		o := newObject()
		o.raw("_meta", r.Meta)
		o.all(r.Unknown)
		out.Extra = o.end()
	}
	return out, nil
}

// notify passes on what a server says while it works.
func notify(ctx context.Context, sink call.Sink, m *message) {
	var p struct {
		Progress float64        `json:"progress"`
		Total    float64        `json:"total"`
		Message  string         `json:"message"`
		Level    string         `json:"level"`
		Logger   string         `json:"logger"`
		Data     jsontext.Value `json:"data"`
	}
	if m.Params != nil && json.Unmarshal(m.Params, &p) != nil {
		return
	}
	switch m.Method { // that a caller cannot take it is no reason to stop the call
	case "notifications/progress":
		_ = sink.Progress(ctx, call.Progress{Done: p.Progress, Total: p.Total, Message: p.Message})
	case "notifications/message":
		_ = sink.Log(ctx, call.LogMessage{Level: p.Level, Logger: p.Logger, Data: p.Data})
	}
}

// suggester completes arguments of a prompt or variables of a template at the server.
func (t *target) suggester(refType, member string) func(context.Context, *call.Completion) ([]string, int, error) {
	return func(ctx context.Context, q *call.Completion) ([]string, int, error) {
		values, total, err := t.suggest(ctx, q, refType, member)
		return values, total, t.outcome(ctx, err)
	}
}

func (t *target) suggest(ctx context.Context, q *call.Completion, refType, member string) ([]string, int, error) {
	s, release, err := t.u.lease(ctx, nil)
	if err != nil {
		return nil, 0, unsentError{err}
	}
	defer release()
	ref, arg, p := newObject(), newObject(), newObject()
	ref.str("type", refType)
	ref.str(member, t.name)
	arg.str("name", q.Argument)
	arg.str("value", q.Value)
	p.raw("ref", ref.end())
	p.raw("argument", arg.end())
	if len(q.Context) > 0 {
		known, err := json.Marshal(map[string]any{"arguments": q.Context}, json.Deterministic(true))
		if err != nil {
			return nil, 0, err
		}
		p.raw("context", known)
	}
	if s.stateless {
		p.raw("_meta", t.u.meta(nil, noCapabilities, 0))
	}
	m, err := s.request(ctx, &request{id: s.ids.Add(1), method: "completion/complete", params: p.end()}, func(*message) {})
	switch {
	case err != nil:
		return nil, 0, err
	case m.Error != nil:
		return nil, 0, m.Error
	}
	var done struct {
		Values []string `json:"values"`
		Total  *int     `json:"total"`
	}
	if err := json.Unmarshal(m.Result.Completion, &done); err != nil {
		return nil, 0, fmt.Errorf("%w: completion: %w", errGarbage, err)
	}
	total := -1
	if done.Total != nil {
		total = *done.Total
	}
	return done.Values, total, nil
}
