package assembly

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/catalog"
	"newel.dev/newel/internal/door/mcphttp"
	"newel.dev/newel/internal/door/mcpsession"
	"newel.dev/newel/internal/guard"
	"newel.dev/newel/internal/guard/authenticate"
	"newel.dev/newel/internal/guard/authorize"
	"newel.dev/newel/internal/guard/observe"
	"newel.dev/newel/internal/guard/resolve"
	"newel.dev/newel/internal/mcpwire"
	"newel.dev/newel/internal/pattern"
	"newel.dev/newel/internal/policy"
	"newel.dev/newel/internal/strictjson"
	"newel.dev/newel/internal/task"
	"newel.dev/newel/internal/toolsearch"
)

// A Server is a virtual server: a path with a part of what the house publishes. What is not in
// the part cannot be called there either. Empty lists choose everything.
type Server struct {
	Path         string   // below /mcp/, such as /mcp/finance
	Host         string   // name that it is reached by, without port; default: any
	Tenant       string   // whose callers alone are served; default: those of all
	Name         string   // default: that of the house
	Title        string   // for people
	Instructions string   // for models
	Backends     []string // names of backends
	Tools        []string // names of tools; * stands for any text but /
	Resources    []string // URIs and templates; * stands for any text
	Prompts      []string // names of prompts
	Search       string   // tool search: auto, on or off; default off
}

// face is one server as callers see it: its catalog, the path over it, and the doors to that.
type face struct {
	server   Server
	place    *place
	catalog  *catalog.Catalog
	path     call.Handler
	codec    *mcpwire.Codec
	door     *mcphttp.Door
	sessions *mcpsession.Generation
	search   *toolsearch.Tools
	tasks    *task.Server
	later    call.Handler // the path of tasks that workers run
	rules    *authorize.Authorizer
	callers  bool // are known by name
	open     bool // what is published may come later: features are announced in any case
	log      *slog.Logger
}

// newFace makes one server over the guards that all share. It takes the place of the one that was at
// its address before.
func (h *House) newFace(s Server, snapshot *catalog.Snapshot, shared guard.Set, before *House) (*face, error) {
	if err := s.check(); err != nil {
		return nil, err
	}
	o := &h.opts
	f := &face{server: s, callers: o.Identity != nil, log: o.Logger, open: slices.ContainsFunc(h.backends, isTolerant)}
	f.place = h.placeFor(&s, before)
	f.search = toolsearch.NewTools(func(name string) jsontext.Value { return f.catalog.Load().Definition(name) })
	view, err := f.view(snapshot)
	if err != nil {
		return nil, err
	}
	f.catalog = catalog.New(view)
	f.rules = authorize.New(authorize.Options{
		Policy: o.Policy, Catalog: f.catalog, Explicit: o.Explicit, Shadow: o.Shadow,
		Differs: func(ctx context.Context, c *call.Call, got, would policy.Decision) {
			o.Logger.LogAttrs(ctx, slog.LevelInfo, "the shadow policy would decide otherwise",
				slog.String("correlation", c.Event.Correlation), slog.String("name", c.Name),
				slog.String("verdict", got.Verdict.String()), slog.String("rule", got.Rule),
				slog.String("shadow_verdict", would.Verdict.String()), slog.String("shadow_rule", would.Rule))
		},
		Denied: func(ctx context.Context, c *call.Call, target *call.Capability, err error) {
			h.effects.Denied(ctx, s.Path, c, target, err)
		},
	})
	if o.Identity != nil {
		shared.Authenticate = authenticate.New(f.identity(o))
	}
	if o.Cache != nil {
		shared.Cache = o.Cache.Guard(f.server.Host + f.server.Path)
	}
	if o.Quota != nil {
		gate := shared.Admit
		counted := o.Quota.Guard(f.knows)
		shared.Admit = func(next call.Handler) call.Handler { return counted(gate(next)) } // who is over a limit does not wait for a turn
	}
	name := s.Host + s.Path
	f.tasks = h.kept.tasks.Server(name)
	shared.Resolve, shared.Authorize = resolve.New(f.catalog, f.rules.See, f.tasks.Find), f.rules.Guard
	shared.Approve = h.approvals.Guard(s.Path)
	shared.Task = h.kept.tasks.Guard(name, h.effects.Check)
	shared.Effect = h.effects.Guard(s.Path, func(name string) *call.Capability {
		t := f.catalog.Load().Tool(name)
		if t == nil {
			return nil
		}
		mine := *t
		mine.Run = h.resilience.Guard(t.Run) // what is looked up is looked up at a backend too
		return &mine
	})
	end := guard.End(f.catalog, f.place.hub, f.tasks)
	path, err := guard.Compile(guard.Path(shared), end)
	if err != nil {
		return nil, err
	}
	if f.later, err = taskPath(shared, end, o.Identity != nil); err != nil {
		return nil, err
	}
	if s.Search == "on" || s.Search == "auto" {
		path = toolsearch.Unwrap(path)
	}
	f.path = h.counted(s.Host+s.Path, path)
	return f, f.openDoors(h)
}

func (s *Server) check() error {
	if s.Path != "/mcp" && !strings.HasPrefix(s.Path, "/mcp/") || strings.ContainsAny(s.Path, " ?#{}%") || path.Clean(s.Path) != s.Path {
		return errors.New("its path must be /mcp/ and a name")
	}
	if strings.ContainsAny(s.Host, "/:{} ") {
		return fmt.Errorf("its host must be a name such as acme.example.com, without port, not %q", s.Host)
	}
	if !slices.Contains([]string{"", "off", "on", "auto"}, s.Search) {
		return fmt.Errorf("tool search must be auto, on or off, not %q", s.Search)
	}
	return pattern.Check(slices.Concat(s.Tools, s.Resources, s.Prompts)...)
}

// keep reports whether a capability is of this server.
func (s *Server) keep(backend string, c *call.Capability) bool {
	if len(s.Backends) > 0 && !slices.Contains(s.Backends, backend) && backend != artifactBackend {
		return false
	}
	switch c.Kind {
	case call.Tool:
		return matches(s.Tools, c.Name)
	case call.Prompt:
		return matches(s.Prompts, c.Name)
	}
	return matches(s.Resources, cmp.Or(c.URI, c.Template)) || backend == artifactBackend
}

// knows reports whether a name is that of something published.
func (f *face) knows(kind call.Kind, name string) bool {
	s := f.catalog.Load()
	switch kind {
	case call.Tool:
		return s.Tool(name) != nil
	case call.Prompt:
		return s.Prompt(name) != nil
	case call.Resource:
		c := s.Resource(name)
		return c != nil && c.URI != "" // what fits a template has too many names
	}
	return false
}

// artifactBackend is where large results of any tool are read from.
const artifactBackend = "artifacts"

func matches(patterns []string, name string) bool {
	return len(patterns) == 0 || pattern.Any(patterns, name)
}

// view is the part of a snapshot that this server shows.
func (f *face) view(snapshot *catalog.Snapshot) (*catalog.Snapshot, error) {
	v, err := snapshot.View(f.server.keep)
	if err != nil {
		return nil, err
	}
	tools := v.Tools()
	if f.server.Search != "on" && (f.server.Search != "auto" || len(tools) < toolsearch.Threshold) {
		return v, nil
	}
	f.search.Use(tools)
	return snapshot.View(f.server.keep, f.search.Capabilities()...)
}

// show makes a new snapshot what callers see, and returns the lists that changed.
func (f *face) show(snapshot *catalog.Snapshot) ([]call.Kind, error) {
	v, err := f.view(snapshot)
	if err != nil {
		return nil, err
	}
	return f.catalog.Swap(v), nil
}

// shown is a digest of what a caller is shown of one list.
func (f *face) shown(kind call.Kind, who *call.Principal) string {
	return f.catalog.Load().Digest(kind, f.rules.Shown(context.Background(), who))
}

// openDoors makes the doors; they serve nothing until they are asked to.
func (f *face) openDoors(h *House) error {
	o := &h.opts
	name := cmp.Or(f.server.Name, o.Name)
	var err error
	defer func() {
		if err != nil && f.sessions != nil {
			f.sessions.End()
		}
	}()
	f.codec, err = mcpwire.New(mcpwire.Options{
		Name: name, Title: f.server.Title, Version: o.Version, Instructions: f.server.Instructions,
		Path: f.path, Has: f.has, StateKey: o.StateKey, Retention: h.effects.Retention(),
		Limits: strictjson.Limits{Bytes: o.Limits.MessageBytes, Depth: o.Limits.Depth, Elements: o.Limits.Elements},
	})
	if err != nil {
		return err
	}
	f.sessions, err = f.place.next(mcpsession.Options{
		Name: name, Title: f.server.Title, Version: o.Version, Instructions: f.server.Instructions,
		Path: f.path, Hub: f.place.hub, Has: f.has(), Tasks: f.tasks, Readable: f.readable, Shown: f.shown, Crowded: h.gate.Crowded,
		MaxSessions: o.Limits.Sessions, MaxSessionsPerPeer: o.Limits.SessionsPerPeer, WriteTimeout: o.Limits.Connections.Write, MaxStreamsPerSession: o.Limits.SessionStreams, IdleTimeout: o.Limits.SessionIdle,
		MaxMessageBytes: o.Limits.MessageBytes, Streams: &f.place.streams, Logger: o.Logger, Identified: f.place.identified,
		Cluster: o.Cluster, Events: o.Events, Scope: f.server.Host + f.server.Path,
		ForwardTimeout: h.gate.Longest() + time.Second, // after what the other node says itself when the time is over
	})
	if err != nil {
		return err
	}
	hosts := o.AllowedHosts
	if f.server.Host != "" {
		hosts = []string{f.server.Host}
	}
	var forwarded func(*http.Request) (*call.Principal, bool, error)
	if o.Cluster != nil {
		forwarded = o.Cluster.Accept
	}
	f.door, err = mcphttp.New(mcphttp.Options{
		Codec: f.codec, Sessions: f.sessions,
		ParamHeaders: func(tool string) []catalog.ParamHeader { return f.catalog.Load().ParamHeaders(tool) },
		Refused: func(ctx context.Context, code call.Code, status int, peer string, size int, reason string) {
			h.kept.observer.Refused(ctx, observe.Refusal{Door: "http", Code: code, Status: status, Peer: peer, Size: size, Reason: reason})
		},
		MaxMessageBytes: o.Limits.MessageBytes, BodyTimeout: o.Limits.Connections.Body, WriteTimeout: o.Limits.Connections.Write,
		AllowedHosts: hosts, AllowedOrigins: o.AllowedOrigins,
		Streams: &f.place.streams, Logger: o.Logger, Draining: h.drain.begun, AbsentHeaders: slices.Contains(o.Compatibility, AbsentHeaders),
		Check: f.check(o), Access: f.access(o), Forwarded: forwarded,
	})
	return err
}

// has says which features exist.
func (f *face) has() mcpwire.Has {
	s := f.catalog.Load()
	return mcpwire.Has{
		Tools:       f.open || len(s.Names(call.ListTools)) > 0,
		Resources:   f.open || len(s.Names(call.ListResources))+len(s.Names(call.ListTemplates)) > 0,
		Prompts:     f.open || len(s.Names(call.ListPrompts)) > 0,
		Completions: f.open || s.HasSuggestions(),
		Tasks:       f.open || slices.ContainsFunc(s.Tools(), func(t *call.Capability) bool { return t.Tasks != call.TaskForbidden }),
		TaskList:    f.callers,
	}
}

// readable reports whether a resource may be subscribed to.
func (f *face) readable(_ context.Context, uri string) error {
	if f.catalog.Load().Resource(uri) == nil {
		return call.Errorf(call.NotFound, "resource not found: %q; it cannot be subscribed to", uri)
	}
	return nil
}

// statelessLine serves one stateless message of the stdio door.
func (f *face) statelessLine(ctx context.Context, line []byte, send func([]byte) error) {
	m, failure := f.codec.Decode(line)
	if failure == nil && m.IsNotification() {
		return
	}
	var c *call.Call
	if failure == nil {
		c, failure = f.codec.Call(m, mcpwire.From{Door: "stdio", Credential: call.Credential{Peer: "stdio"}}, send)
	}
	var frame mcpwire.Frame
	if failure == nil {
		frame, failure = f.codec.Serve(ctx, m, c, nil)
	}
	var out []byte
	if failure != nil {
		out = mcpwire.AppendFailure(nil, failure)
	} else {
		out = frame.AppendTo(nil)
	}
	if err := send(out); err != nil {
		f.log.LogAttrs(ctx, slog.LevelWarn, "an answer could not be written", slog.String("error", err.Error()))
	}
}
