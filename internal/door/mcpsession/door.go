// Package mcpsession is the door for the session revisions of MCP: 2025-11-25, 2025-06-18 and
// 2025-03-26, over Streamable HTTP and stdio.
//
// Start reading at [Door.takeOver]: the official SDK keeps sessions, streams and resumption, and
// every feature method is taken over from it and sent down the path. Nothing is registered with
// the SDK. [Door.ServeHTTP] stands in front of it: bounds, strict JSON, quotas, keep-alive, and
// JSON-RPC bodies on every error.
//
// A client that disconnects does not cancel its call in these revisions: the call runs on and
// its stream can be resumed with Last-Event-ID.
//
// Sessions outlive what they are served with: [Door.Next] makes another [Generation], which has a
// path of its own, and the sessions stay.
package mcpsession

import (
	"bufio"
	"context"
	"encoding/json" // the SDK's types speak encoding/json
	"errors"
	"io"
	"log/slog"
	"net/http"
	"runtime/debug"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/modelcontextprotocol/go-sdk/auth"
	"github.com/modelcontextprotocol/go-sdk/jsonrpc"
	"github.com/modelcontextprotocol/go-sdk/mcp"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/catalog"
	"newel.dev/newel/internal/cluster"
	"newel.dev/newel/internal/mcpwire"
	"newel.dev/newel/internal/stream"
	"newel.dev/newel/internal/task"
)

// Options configure a Door. Path and Hub are required; zero means the default in brackets.
type Options struct {
	Name, Title, Version, Instructions string

	Path     call.Handler
	Hub      *catalog.Hub
	Has      mcpwire.Has                                 // what is served
	Tasks    *task.Server                                // nil: there are none
	Readable func(ctx context.Context, uri string) error // whether a resource may be subscribed to; nil: any
	// Shown returns a digest of what a caller is shown of a list; "": it is not told. Nil: all hear of all changes.
	Shown func(kind call.Kind, who *call.Principal) string

	// Identified says that the door in front knows whose request it is (mcpwire.PrincipalOf), and
	// that others are refused: a session is its user's alone (2025-11-25, security best practices).
	Identified bool

	// Cluster shares sessions with other nodes, and Events what was sent on their streams. Nil: they
	// are this node's alone. Scope keeps apart the sessions of servers that share a cluster.
	Cluster *cluster.Cluster
	Events  mcp.EventStore
	Scope   string
	// ForwardTimeout is how long the node that has a session may take until it begins to answer. A stream
	// that is resumed and has nothing to say for that long has to be asked for again. [66 s]
	ForwardTimeout time.Duration

	Streams *stream.Set // streams that have left the HTTP server: Run waits for them. Nil: its own

	Crowded func() bool // while it says so no session begins; nil: it never does

	MaxSessions          int           // [10,000]
	MaxSessionsPerPeer   int           // of one caller, or one address where nobody asks who is calling [1,000]
	MaxStreamsPerSession int           // open requests of one session [64]
	WriteTimeout         time.Duration // for one write on a stream [30 s]
	IdleTimeout          time.Duration // a session ends after this long without a message [30 min]
	KeepAlive            time.Duration // between comments on an idle stream [15 s]
	RetainBytes          int           // events kept for resumption, all sessions together [16 MiB]
	MaxMessageBytes      int           // [4 MiB]
	Logger               *slog.Logger  // nil discards
}

// A Door serves session revisions. It is safe for concurrent use.
type Door struct {
	o       Options // of the first generation: what Next names counts for all
	handler http.Handler
	current atomic.Pointer[Generation]
	tasks   *followed
	shown   shown

	mu          sync.Mutex        // guards what is below
	streams     map[string]int    // open requests per session
	owners      map[string]string // who opened a session; some may have ended
	counted     census
	running     map[string]int         // who holds the id of a request, by session and id
	generations map[string]*Generation // by number
	count       int
	servers     []*server
	kept        map[string]*kept
	adopted     map[string]*adopted
	lost        map[copyOf]struct{} // copies of sessions that other nodes have; some may have ended

	adopting sync.Mutex      // one at a time
	leaving  context.Context // ends when sessions are left to other nodes
	leave    context.CancelFunc
}

// A server is what the SDK tells a session when it starts; the session keeps to it.
type server struct {
	*mcp.Server
	about about
}

type about struct {
	name, title, version, instructions string
	has                                mcpwire.Has
}

// Revisions are the revisions this door speaks, newest first.
func Revisions() []string { return []string{"2025-11-25", "2025-06-18", "2025-03-26"} }

// New returns a door, with a first generation that is current.
func New(o Options) (*Door, error) {
	if o.Hub == nil {
		return nil, errors.New("mcpsession: Path and Hub are required")
	}
	setDefaults(&o)
	d := &Door{
		o: o, streams: map[string]int{}, owners: map[string]string{}, running: map[string]int{}, generations: map[string]*Generation{},
		kept: map[string]*kept{}, adopted: map[string]*adopted{}, lost: map[copyOf]struct{}{}, tasks: newFollowed(o.Tasks),
		shown: shown{sessions: map[*mcp.ServerSession]map[string]*view{}},
	}
	d.leaving, d.leave = context.WithCancel(context.Background())
	first, err := d.Next(o)
	if err != nil {
		return nil, err
	}
	first.Begin()
	if o.Events == nil {
		d.o.Events = newReplay(o.RetainBytes)
	}
	store := d.o.Events
	if o.Cluster != nil {
		store = &events{d.o.Events, d, nil}
	}
	d.handler = mcp.NewStreamableHTTPHandler(func(r *http.Request) *mcp.Server { return d.generation(r.Header).server.Server }, &mcp.StreamableHTTPOptions{
		EventStore:                 store,
		SessionTimeout:             o.IdleTimeout,
		MaxRequestBodyBytes:        -1,   // read has bounded it
		DisableLocalhostProtection: true, // the HTTP door has checked Host and Origin
	})
	if o.Cluster != nil {
		d.handler = d.serveAdopted(d.handler)
	}
	if o.Identified {
		// The SDK binds sessions to the user that this tells it of; the token itself was verified before.
		d.handler = auth.RequireBearerToken(func(ctx context.Context, _ string, _ *http.Request) (*auth.TokenInfo, error) {
			p := mcpwire.PrincipalOf(ctx)
			if p == nil {
				return nil, auth.ErrInvalidToken
			}
			return &auth.TokenInfo{UserID: strconv.Quote(p.Tenant) + strconv.Quote(p.ID), Expiration: time.Now().Add(time.Hour), Extra: map[string]any{known: p}}, nil
		}, nil)(d.handler)
	}
	return d, nil
}

func setDefaults(o *Options) {
	if o.MaxSessions == 0 {
		o.MaxSessions = 10_000
	}
	if o.MaxSessionsPerPeer == 0 {
		o.MaxSessionsPerPeer = 1000
	}
	if o.WriteTimeout == 0 {
		o.WriteTimeout = 30 * time.Second
	}
	if o.MaxStreamsPerSession == 0 {
		o.MaxStreamsPerSession = 64
	}
	if o.ForwardTimeout == 0 {
		o.ForwardTimeout = 66 * time.Second
	}
	if o.IdleTimeout == 0 {
		o.IdleTimeout = 30 * time.Minute
	}
	if o.KeepAlive == 0 {
		o.KeepAlive = 15 * time.Second
	}
	if o.RetainBytes == 0 {
		o.RetainBytes = 16 << 20
	}
	if o.MaxMessageBytes == 0 {
		o.MaxMessageBytes = 4 << 20
	}
	if o.Streams == nil {
		o.Streams = &stream.Set{}
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
}

// known is under what the SDK hands on who sends a request.
const known = "principal"

func capabilities(has mcpwire.Has) *mcp.ServerCapabilities {
	c := &mcp.ServerCapabilities{Logging: &mcp.LoggingCapabilities{}}
	if has.Tools {
		c.Tools = &mcp.ToolCapabilities{ListChanged: true}
	}
	if has.Resources {
		c.Resources = &mcp.ResourceCapabilities{ListChanged: true, Subscribe: true}
	}
	if has.Prompts {
		c.Prompts = &mcp.PromptCapabilities{ListChanged: true}
	}
	if has.Completions {
		c.Completions = &mcp.CompletionCapabilities{}
	}
	return c
}

// result is a result whose bytes the SDK does not touch.
type result struct {
	mcp.ResultBase
	raw []byte
}

// MarshalJSON implements json.Marshaler.
func (r *result) MarshalJSON() ([]byte, error) { return r.raw, nil }

func wireError(f *mcpwire.Failure) error {
	return &jsonrpc.Error{Code: int64(f.Code), Message: f.Message, Data: json.RawMessage(f.Data)}
}

// takeOver sends every feature method down the path. What it does not know (initialize, ping,
// logging/setLevel, subscriptions, notifications) stays with the SDK.
func (d *Door) takeOver(next mcp.MethodHandler) mcp.MethodHandler {
	return func(ctx context.Context, method string, req mcp.Request) (_ mcp.Result, err error) {
		defer func() { // the path has its own; a panic here would end the process
			if v := recover(); v != nil {
				d.o.Logger.LogAttrs(ctx, slog.LevelError, "a session request failed", slog.Any("panic", v), slog.String("stack", string(debug.Stack())))
				err = wireError(mcpwire.SessionError(0, call.Errorf(call.Internal, "internal error")))
			}
		}()
		c, err := d.decode(ctx, method, req)
		if c == nil {
			r, err := d.handOn(ctx, method, req, next)
			if answer, ok := r.(*mcp.InitializeResult); ok && err == nil {
				return d.announceTasks(d.of(req.GetExtra()).o.Has, answer)
			}
			return r, err
		}
		if err != nil {
			return nil, wireError(mcpwire.SessionError(c.Kind, err))
		}
		if extra := req.GetExtra(); extra != nil && extra.Header.Get(headerKey) != "" {
			d.hold(extra.Header.Get(headerKey))
			defer d.release(extra.Header.Get(headerKey))
		}
		d.shows(req, c)
		r, err := d.of(req.GetExtra()).o.Path(ctx, c)
		if err != nil {
			if c.Kind == call.Tool {
				r = mcpwire.ToolError(err)
			}
			if r == nil {
				return nil, wireError(mcpwire.SessionError(c.Kind, err))
			}
		}
		if r.Task != nil || c.Kind.OfTask() || c.Kind == call.ListTasks {
			return d.taskResult(req, c, r)
		}
		return &result{raw: mcpwire.AppendResult(nil, c.Kind, r)}, nil
	}
}

// handOn leaves a request to the SDK, and tells other nodes what changes with it.
func (d *Door) handOn(ctx context.Context, method string, req mcp.Request, next mcp.MethodHandler) (mcp.Result, error) {
	r, err := next(ctx, method, req)
	if err != nil || d.o.Cluster == nil {
		return r, err
	}
	switch p := req.(type) {
	case *mcp.ServerRequest[*mcp.InitializeParams]:
		d.began(ctx, p, r)
	case *mcp.ServerRequest[*mcp.SetLoggingLevelParams]:
		d.remember(ctx, p.Session.ID(), func(k *kept) { k.state.SDK.LogLevel = p.Params.Level })
	}
	return r, err
}

// decode turns a request of the SDK into a call, or returns nil for what is not ours. An error is
// the caller's: what it sent contradicts itself.
func (d *Door) decode(ctx context.Context, method string, req mcp.Request) (*call.Call, error) {
	c := &call.Call{Door: "http", LogLevel: "debug"} // the SDK knows the session's level, and keeps to it
	var params mcp.Params
	var session *mcp.ServerSession
	var extra *mcp.RequestExtra
	switch r := req.(type) { // the SDK refuses the first four without params
	case *mcp.CallToolRequest:
		c.Kind, c.Name, c.Args = call.Tool, r.Params.Name, []byte(r.Params.Arguments)
		params, session, extra = r.Params, r.Session, r.Extra
	case *mcp.ReadResourceRequest:
		c.Kind, c.Name = call.Resource, r.Params.URI
		params, session, extra = r.Params, r.Session, r.Extra
	case *mcp.GetPromptRequest:
		c.Kind, c.Name = call.Prompt, r.Params.Name
		if r.Params.Arguments != nil {
			c.Args, _ = json.Marshal(r.Params.Arguments) // strings to strings: cannot fail
		}
		params, session, extra = r.Params, r.Session, r.Extra
	case *mcp.CompleteRequest:
		c.Kind, c.Completion = call.Complete, &call.Completion{Argument: r.Params.Argument.Name, Value: r.Params.Argument.Value}
		if ref := r.Params.Ref; ref != nil && ref.Type == "ref/prompt" {
			c.Name, c.Completion.Ref = ref.Name, call.Prompt
		} else if ref != nil {
			c.Name, c.Completion.Ref = ref.URI, call.Resource
		}
		if r.Params.Context != nil {
			c.Completion.Context = r.Params.Context.Arguments
		}
		params, session, extra = r.Params, r.Session, r.Extra
	case *mcp.ListToolsRequest:
		c.Kind = call.ListTools
		if r.Params != nil { // lists may come without params
			c.Cursor, params = r.Params.Cursor, r.Params
		}
		session, extra = r.Session, r.Extra
	case *mcp.ListResourcesRequest:
		c.Kind = call.ListResources
		if r.Params != nil { // lists may come without params
			c.Cursor, params = r.Params.Cursor, r.Params
		}
		session, extra = r.Session, r.Extra
	case *mcp.ListResourceTemplatesRequest:
		c.Kind = call.ListTemplates
		if r.Params != nil { // lists may come without params
			c.Cursor, params = r.Params.Cursor, r.Params
		}
		session, extra = r.Session, r.Extra
	case *mcp.ListPromptsRequest:
		c.Kind = call.ListPrompts
		if r.Params != nil { // lists may come without params
			c.Cursor, params = r.Params.Cursor, r.Params
		}
		session, extra = r.Session, r.Extra
	case *mcp.ServerRequest[*taskParams]:
		c.Kind = taskKinds[method]
		if r.Params != nil {
			c.Name, c.Cursor, params = r.Params.TaskID, r.Params.Cursor, r.Params
		}
		session, extra = r.Session, r.Extra
	default:
		return nil, nil
	}
	c.SessionID = session.ID()
	c.Client = clientOf(session)
	if p := session.InitializeParams(); p != nil {
		c.Revision = p.ProtocolVersion
	}
	if extra != nil && extra.Header != nil {
		origin(c, extra.Header)
		if extra.TokenInfo != nil {
			c.Credential.Known, _ = extra.TokenInfo.Extra[known].(*call.Principal)
		}
	} else {
		c.Door, c.Credential.Peer = "stdio", "stdio"
	}
	out := &sink{request: ctx, session: session, extra: extra}
	if params != nil {
		if key, ok := params.GetMeta()["dev.newel/idempotencyKey"].(string); ok && key != "" {
			if c.Key != "" && c.Key != key {
				return c, call.Errorf(call.Malformed, "the Idempotency-Key header and params._meta differ")
			}
			c.Key = key
		}
		out.token = progressToken(params)
		c.Progress = out.token != nil
	}
	c.Sink = out
	c.Asker = &asker{request: ctx, session: session, client: &c.Client}
	return c, d.wish(d.of(extra).o.Has, c, params)
}

// Names under which ServeHTTP tells decode what only the request knows. They are set after the
// caller's own headers of these names are dropped.
const (
	headerPeer = "X-Newel-Peer"
	headerSize = "X-Newel-Size"
	headerKey  = "X-Newel-Key"
	// headerArguments has the arguments of a large call.
	headerArguments = "X-Newel-Arguments"
	// headerGeneration names the generation that a request came to.
	headerGeneration = "X-Newel-Generation"
)

// Close ends all sessions: their clients are told to start anew. Where other nodes can go on with
// them, only open streams end.
func (d *Door) Close() {
	if d.o.Cluster != nil {
		d.leave()
		return
	}
	for _, server := range d.all() {
		for s := range server.Sessions() {
			if err := s.Close(); err != nil {
				d.o.Logger.LogAttrs(context.Background(), slog.LevelDebug, "a session did not close cleanly", slog.String("error", err.Error()))
			}
		}
	}
}

// Run passes changes on to sessions until ctx ends, then ends all sessions and waits until their
// streams have said so.
func (d *Door) Run(ctx context.Context) error {
	defer d.o.Streams.Wait()
	defer d.Close()
	if d.o.Tasks != nil {
		var telling sync.WaitGroup
		telling.Go(func() { d.tellTasks(ctx) })
		defer telling.Wait()
	}
	if d.o.Cluster != nil {
		var swept sync.WaitGroup
		defer swept.Wait()
		swept.Go(func() {
			tick := time.NewTicker(sweepEvery)
			defer tick.Stop()
			for {
				select {
				case <-ctx.Done():
					return
				case <-tick.C:
					d.sweep(ctx)
				}
			}
		})
	}
	everything := &call.Filter{ToolsChanged: true, ResourcesChanged: true, PromptsChanged: true}
	return d.o.Hub.ListenAll(ctx, everything, func(n call.Notification) error {
		if n.Anew {
			d.shown.forget(n.Method)
		}
		for _, server := range d.all() {
			d.announce(ctx, server.Server, n)
		}
		return nil
	})
}

// hidden is a feature that comes and goes for the sake of the notification alone: the SDK sends
// list_changed only for features of its own, and lists never show them (takeOver).
const hidden = "newel-changed"

func (d *Door) announce(ctx context.Context, server *mcp.Server, n call.Notification) {
	switch n.Method {
	case "notifications/tools/list_changed":
		server.AddTool(&mcp.Tool{Name: hidden, InputSchema: map[string]any{"type": "object"}}, func(context.Context, *mcp.CallToolRequest) (*mcp.CallToolResult, error) {
			return nil, errors.ErrUnsupported
		})
		server.RemoveTools(hidden)
	case "notifications/prompts/list_changed":
		server.AddPrompt(&mcp.Prompt{Name: hidden}, func(context.Context, *mcp.GetPromptRequest) (*mcp.GetPromptResult, error) {
			return nil, errors.ErrUnsupported
		})
		server.RemovePrompts(hidden)
	case "notifications/resources/list_changed":
		server.AddResource(&mcp.Resource{Name: hidden, URI: "newel:changed"}, func(context.Context, *mcp.ReadResourceRequest) (*mcp.ReadResourceResult, error) {
			return nil, errors.ErrUnsupported
		})
		server.RemoveResources("newel:changed")
	case "notifications/resources/updated":
		if err := server.ResourceUpdated(ctx, &mcp.ResourceUpdatedNotificationParams{URI: n.URI}); err != nil {
			d.o.Logger.LogAttrs(ctx, slog.LevelDebug, "an update was not sent", slog.String("error", err.Error()))
		}
	}
}

// ServeStdio serves one client that speaks a session revision, until in ends or ctx does.
func (d *Door) ServeStdio(ctx context.Context, in io.Reader, out io.Writer) error {
	session, err := d.current.Load().server.Connect(ctx, &mcp.IOTransport{Reader: io.NopCloser(&lifter{in: bufio.NewReader(in)}), Writer: nopWriteCloser{out}}, nil)
	if err != nil {
		return err
	}
	defer d.listen(listenerOf(session), func(message []byte) { _, _ = out.Write(append(message, '\n')) })() // the client is gone if this fails
	stop := context.AfterFunc(ctx, func() { _ = session.Close() })
	defer stop()
	if err := session.Wait(); err != nil && ctx.Err() == nil && !errors.Is(err, io.EOF) {
		return err
	}
	return nil
}

type nopWriteCloser struct{ io.Writer }

// Close leaves the writer to its owner.
func (nopWriteCloser) Close() error { return nil }
