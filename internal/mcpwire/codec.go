package mcpwire

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/strictjson"
	"newel.dev/newel/internal/task"
)

// Options configure a Codec.
type Options struct {
	Name, Title, Version string // of the server, as clients show it
	Instructions         string // how to use the server, for models; may be empty
	Path                 call.Handler
	// Has says what is served now; discover tells it. Called once per discover.
	Has func() Has
	// Retention is how long the answer of a call with an idempotency key is kept; discover tells it. 0:
	// nothing is told.
	Retention time.Duration
	StateKey  []byte            // 32 bytes that seal requestState; nil means random: states end with the process
	Limits    strictjson.Limits // of one message; zero means defaults
}

// Has says which features exist.
type Has struct {
	Tools, Resources, Prompts, Completions bool
	Tasks                                  bool // some tools may be tasks
	TaskList                               bool // and callers can be told apart, so that each may list its own
}

// A Codec serves the stateless revision. It is safe for concurrent use.
type Codec struct {
	opts             Options
	sealer           *sealer
	serverInfoMember []byte // "io.modelcontextprotocol/serverInfo":{…}
}

const metaServerInfo = "io.modelcontextprotocol/serverInfo"

// New returns a codec. It fails if the state key has the wrong size.
func New(o Options) (*Codec, error) {
	s, err := newSealer(o.StateKey)
	if err != nil {
		return nil, err
	}
	info := append(call.AppendString(nil, metaServerInfo), `:{"name":`...)
	info = call.AppendString(info, o.Name)
	if o.Title != "" {
		info = call.AppendString(append(info, `,"title":`...), o.Title)
	}
	info = append(call.AppendString(append(info, `,"version":`...), o.Version), '}')
	return &Codec{opts: o, sealer: s, serverInfoMember: info}, nil
}

// From says where a message came from, as far as its door knows.
type From struct {
	Door           string
	Credential     call.Credential
	Correlation    string
	Traceparent    string
	Tracestate     string
	Baggage        string
	IdempotencyKey string
}

// IdempotencyKey unquotes the Structured Field string (RFC 8941) of the Idempotency-Key header, as
// the IETF draft has it; a value without quotes is taken as it is.
func IdempotencyKey(header string) string {
	if len(header) < 2 || header[0] != '"' || header[len(header)-1] != '"' {
		return header
	}
	return strings.NewReplacer(`\\`, `\`, `\"`, `"`).Replace(header[1 : len(header)-1])
}

// Decode decodes one message.
func (c *Codec) Decode(b []byte) (*Message, *Failure) { return Parse(b, c.opts.Limits) }

// Call turns a request into a call. send takes encoded notifications for the caller while the
// call runs; nil means the caller cannot take any.
func (c *Codec) Call(m *Message, from From, send func([]byte) error) (*call.Call, *Failure) {
	kind, ok := kinds[m.Method]
	if !ok {
		return nil, &Failure{ID: m.ID, Status: 404, Code: codeMethodNotFound, Message: fmt.Sprintf("method %q is not part of revision %s, or not served here", clip(m.Method), Revision), Cause: call.NotFound}
	}
	if f := m.checkMeta(); f != nil {
		return nil, f
	}
	p := &m.Params
	client, err := m.client()
	if err != nil {
		return nil, badParams(m, "params._meta[\"io.modelcontextprotocol/clientCapabilities\"] is not of the right form")
	}
	cl := &m.call
	*cl = call.Call{
		Kind:       kind,
		Args:       p.Arguments,
		Cursor:     p.Cursor,
		Credential: from.Credential,
		Key:        p.Meta.IdempotencyKey,
		Client:     client,
		Trace: call.Trace{
			Correlation: from.Correlation,
			Parent:      or(p.Meta.Traceparent, from.Traceparent),
			State:       or(p.Meta.Tracestate, from.Tracestate),
			Baggage:     or(p.Meta.Baggage, from.Baggage),
		},
		Door:     from.Door,
		Revision: Revision,
		Size:     m.Size,
		LogLevel: p.Meta.LogLevel,
		Progress: p.Meta.ProgressToken != nil,
		Meta:     p.Meta.Unknown,
		Unknown:  p.Unknown,
		Sink:     call.Discard,
		Asker:    call.NoAsker,
		AsTask:   call.TaskWish{Accepts: slices.Contains(client.Extensions, task.Extension)},
	}
	if (kind.OfTask() || kind == call.Subscribe && p.Notifications != nil && len(p.Notifications.Tasks) > 0) && !cl.AsTask.Accepts {
		e := call.Errorf(call.Unsupported, "missing required client capability: the client did not declare the extension %s with this request", task.Extension)
		e.Data = jsontext.Value(`{"requiredCapabilities":{"extensions":{"` + task.Extension + `":{}}}}`)
		return nil, fail(m.ID, e)
	}
	switch {
	case cl.Key == "":
		cl.Key = from.IdempotencyKey
	case from.IdempotencyKey != "" && from.IdempotencyKey != cl.Key:
		return nil, badParams(m, "the Idempotency-Key header and params._meta differ")
	}
	if f := c.fill(cl, m); f != nil {
		return nil, f
	}
	if send != nil && m.Hears() {
		cl.Sink = newSink(m, send)
	}
	return cl, nil
}

// kinds maps the methods of the revision.
var kinds = map[string]call.Kind{
	"server/discover":          call.Discover,
	"tools/call":               call.Tool,
	"tools/list":               call.ListTools,
	"resources/read":           call.Resource,
	"resources/list":           call.ListResources,
	"resources/templates/list": call.ListTemplates,
	"prompts/get":              call.Prompt,
	"prompts/list":             call.ListPrompts,
	"completion/complete":      call.Complete,
	"subscriptions/listen":     call.Subscribe,
	"tasks/get":                call.GetTask,
	"tasks/update":             call.UpdateTask,
	"tasks/cancel":             call.CancelTask,
}

// fill sets what depends on the kind.
func (c *Codec) fill(cl *call.Call, m *Message) *Failure {
	p := &m.Params
	switch cl.Kind {
	case call.Tool, call.Prompt:
		if cl.Name = p.Name; cl.Name == "" {
			return badParams(m, "params.name is missing")
		}
	case call.Resource:
		if cl.Name = p.URI; cl.Name == "" {
			return badParams(m, "params.uri is missing")
		}
	case call.Complete:
		if p.Ref == nil || p.Argument == nil || p.Argument.Name == "" {
			return badParams(m, "params.ref and params.argument are required")
		}
		cl.Completion = &call.Completion{Argument: p.Argument.Name, Value: p.Argument.Value}
		if p.Context != nil {
			cl.Completion.Context = p.Context.Arguments
		}
		switch p.Ref.Type {
		case "ref/prompt":
			cl.Name, cl.Completion.Ref = p.Ref.Name, call.Prompt
		case "ref/resource":
			cl.Name, cl.Completion.Ref = p.Ref.URI, call.Resource
		default:
			return badParams(m, `params.ref.type must be "ref/prompt" or "ref/resource"`)
		}
		return nil
	case call.Subscribe:
		n := p.Notifications
		if n == nil {
			return badParams(m, "params.notifications is missing")
		}
		if len(n.URIs) > maxSubscriptions {
			return badParams(m, fmt.Sprintf("more than %d resource subscriptions on one stream", maxSubscriptions))
		}
		if len(n.Tasks) > maxTaskSubscriptions {
			return badParams(m, fmt.Sprintf("more than %d tasks on one stream", maxTaskSubscriptions))
		}
		cl.Filter = &call.Filter{ToolsChanged: n.Tools, ResourcesChanged: n.Resources, PromptsChanged: n.Prompts, URIs: n.URIs, Tasks: n.Tasks}
		return nil
	case call.GetTask, call.UpdateTask, call.CancelTask:
		if cl.Name = p.TaskID; cl.Name == "" {
			return badParams(m, "params.taskId is missing")
		}
		if cl.Responses = p.InputResponses; cl.Kind == call.UpdateTask && cl.Responses == nil {
			return badParams(m, "params.inputResponses is missing")
		}
		return nil
	default:
		return nil
	}
	a := &m.asker
	a.client, a.answers = &cl.Client, p.InputResponses
	cl.Asker = a
	if p.RequestState != "" {
		a.answers = nil // until it is known which questions were asked
		cl.Restore = func(known *call.Call) error { return c.restore(m, cl, a, known) }
	}
	return nil
}

// restore opens the state that came with cl, now that it is known who is calling. Another call may
// run in place of cl by then, with the same asker.
func (c *Codec) restore(m *Message, cl *call.Call, a *asker, known *call.Call) error {
	came := *cl
	came.Principal = known.Principal
	st, err := c.sealer.open(&came, m.Params.RequestState)
	if err != nil {
		return call.Errorf(call.Malformed, "requestState is not valid for this call, or has expired; start the call again without it").Because(err)
	}
	a.answers = map[string]jsontext.Value{}
	for k, v := range m.Params.InputResponses { // answers to questions that were not asked are ignored
		if slices.Contains(st.Pending, k) {
			a.answers[k] = v
		}
	}
	maps.Copy(a.answers, st.Answers)
	m.round, m.first = st.Round, st.First
	known.Resume, known.Asked = st.State, st.First
	return nil
}

const (
	maxSubscriptions     = 1000
	maxTaskSubscriptions = 100 // each is looked up when the stream begins
)

func badParams(m *Message, text string) *Failure {
	return &Failure{ID: m.ID, Status: 400, Code: codeInvalidParams, Message: text, Cause: call.Malformed}
}

func or(a, b string) string {
	if a != "" {
		return a
	}
	return b
}

func clip(s string) string {
	if len(s) > 100 {
		return s[:100]
	}
	return s
}

// Serve runs the path and encodes its outcome. buf is scratch space for the answer.
func (c *Codec) Serve(ctx context.Context, m *Message, cl *call.Call, buf []byte) (Frame, *Failure) {
	r, err := c.opts.Path(ctx, cl)
	if s, ok := cl.Sink.(*sink); ok {
		s.end()
	}
	if err == nil && r == nil {
		err = errors.New("the path returned neither a result nor an error")
	}
	if err != nil {
		var ask *call.InputRequired
		if errors.As(err, &ask) {
			f, err := c.askFrame(m, cl, ask)
			if err == nil {
				return f, nil
			}
			return Frame{}, fail(m.ID, err)
		}
		if cl.Event.Step == "authenticate" { // not about the call, but about whoever sends it
			return Frame{}, FailStranger(m.ID, err)
		}
		if cl.Kind == call.Tool {
			if r = ToolError(err); r != nil {
				return c.frame(buf, m.ID, cl.Kind, r), nil
			}
		}
		return Frame{}, fail(m.ID, err)
	}
	switch cl.Kind {
	case call.Discover:
		return c.discover(m)
	case call.Subscribe:
		b := append(append(buf, `{"jsonrpc":"2.0","id":`...), m.ID...)
		b = append(b, `,"result":{"resultType":"complete","_meta":{"io.modelcontextprotocol/subscriptionId":`...)
		b = append(append(append(b, m.ID...), ','), c.serverInfoMember...)
		return Frame{Head: append(b, "}}}"...)}, nil
	case call.UpdateTask, call.CancelTask: // an empty acknowledgement
		b := append(append(buf, `{"jsonrpc":"2.0","id":`...), m.ID...)
		return Frame{Head: append(c.appendExtra(append(b, `,"result":{"resultType":"complete"`...), nil), "}}"...)}, nil
	}
	if r.Task != nil {
		b := append(append(buf, `{"jsonrpc":"2.0","id":`...), m.ID...)
		if cl.Kind == call.Tool {
			b = appendTask(append(b, `,"result":{"resultType":"task",`...), r.Task, false)
		} else {
			b = appendTask(append(b, `,"result":{"resultType":"complete",`...), r.Task, true)
		}
		return Frame{Head: append(c.appendExtra(b, nil), "}}"...)}, nil
	}
	return c.frame(buf, m.ID, cl.Kind, r), nil
}

// askFrame encodes an input_required result with sealed state.
func (c *Codec) askFrame(m *Message, cl *call.Call, ask *call.InputRequired) (Frame, error) {
	a, ok := cl.Asker.(*asker)
	if !ok || len(ask.Questions) == 0 {
		return Frame{}, call.Errorf(call.Internal, "internal error").Because(ask)
	}
	if m.round >= MaxRounds {
		return Frame{}, call.Errorf(call.Exhausted, "the call asked %d times without coming to an end", MaxRounds)
	}
	st := &state{Expires: c.sealer.now().Add(StateTTL).Unix(), Round: m.round + 1, State: ask.State, First: m.first}
	if ask.State == "" {
		st.Answers = a.answers // the handler runs again from its start
	}
	b := append([]byte(nil), `{"jsonrpc":"2.0","id":`...)
	b = append(append(b, m.ID...), `,"result":{"resultType":"input_required","inputRequests":{`...)
	for i, q := range ask.Questions {
		if i > 0 {
			b = append(b, ',')
		}
		st.Pending = append(st.Pending, q.Key)
		b = appendQuestion(b, &q)
	}
	sealed, err := c.sealer.seal(cl, st)
	if err != nil {
		return Frame{}, err
	}
	b = call.AppendString(append(b, `},"requestState":`...), sealed)
	b = append(append(b, `,"_meta":{`...), c.serverInfoMember...)
	return Frame{Head: append(b, "}}}"...)}, nil
}

// discover answers server/discover.
func (c *Codec) discover(m *Message) (Frame, *Failure) {
	has := Has{}
	if c.opts.Has != nil {
		has = c.opts.Has()
	}
	caps := map[string]any{"logging": struct{}{}}
	if has.Tools {
		caps["tools"] = map[string]bool{"listChanged": true}
	}
	if has.Resources {
		caps["resources"] = map[string]bool{"listChanged": true, "subscribe": true}
	}
	if has.Prompts {
		caps["prompts"] = map[string]bool{"listChanged": true}
	}
	if has.Completions {
		caps["completions"] = struct{}{}
	}
	if has.Tasks {
		caps["extensions"] = map[string]any{task.Extension: struct{}{}}
	}
	raw, err := json.Marshal(caps, json.Deterministic(true))
	if err != nil {
		return Frame{}, fail(m.ID, err)
	}
	versions, err := json.Marshal(Supported())
	if err != nil {
		return Frame{}, fail(m.ID, err)
	}
	b := append(append([]byte(`{"jsonrpc":"2.0","id":`), m.ID...), `,"result":{"resultType":"complete","supportedVersions":`...)
	b = append(append(append(b, versions...), `,"capabilities":`...), raw...)
	if c.opts.Instructions != "" {
		b = call.AppendString(append(b, `,"instructions":`...), c.opts.Instructions)
	}
	b = append(appendCache(b, &call.Result{TTL: discoverTTL}), `,"_meta":{`...)
	b = append(b, c.serverInfoMember...)
	if c.opts.Retention > 0 {
		b = append(b, `,"dev.newel/idempotency":{"key":"dev.newel/idempotencyKey","retentionSeconds":`...)
		b = append(strconv.AppendInt(b, int64(c.opts.Retention.Seconds()), 10), '}')
	}
	return Frame{Head: append(b, "}}}"...)}, nil
}

// discoverTTL: what a server speaks changes with its configuration only.
const discoverTTL = time.Minute
