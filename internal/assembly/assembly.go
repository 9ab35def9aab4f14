// Package assembly turns values into a running house: backends, limits and telemetry become one
// path behind all doors.
//
// Start reading at [Build], which opens nothing but what it is given and fails with every
// registration problem named; then [Live.Serve] in run.go, the only place that starts long-lived
// goroutines and the place that spells the order of shutdown; live.go goes over from one house to
// the next while it serves.
package assembly

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel/metric"
	metricnoop "go.opentelemetry.io/otel/metric/noop"
	"go.opentelemetry.io/otel/trace"
	tracenoop "go.opentelemetry.io/otel/trace/noop"

	"github.com/modelcontextprotocol/go-sdk/mcp"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/audit"
	"newel.dev/newel/internal/backend/artifact"
	"newel.dev/newel/internal/catalog"
	"newel.dev/newel/internal/cluster"
	"newel.dev/newel/internal/door/approvals"
	"newel.dev/newel/internal/door/mcpstdio"
	"newel.dev/newel/internal/guard"
	"newel.dev/newel/internal/guard/admit"
	"newel.dev/newel/internal/guard/approve"
	"newel.dev/newel/internal/guard/authenticate"
	"newel.dev/newel/internal/guard/bound"
	"newel.dev/newel/internal/guard/cache"
	"newel.dev/newel/internal/guard/effect"
	"newel.dev/newel/internal/guard/quota"
	"newel.dev/newel/internal/guard/resilience"
	"newel.dev/newel/internal/guard/validate"
	"newel.dev/newel/internal/policy"
	"newel.dev/newel/internal/redact"
	"newel.dev/newel/internal/secret"
)

// Options say what the house is made of. The zero value of every field but Backends works.
type Options struct {
	Name         string // of the server; default "newel"
	Title        string // for people
	Version      string // of what is served; default "0.0.0"
	Instructions string // for models: how to use the server

	Backends []call.Backend
	Servers  []Server // virtual ones, on paths of their own beside /mcp
	Search   string   // tool search on /mcp: auto (from 50 tools on), on or off; default off
	Limits   Limits
	// Resilience is about each backend by itself.
	Resilience Resilience

	Identity authenticate.Verifier // who is calling; nil: nobody is known, and only loopback is served
	Access   *Access               // how callers get a token for this server; nil: not told
	Login    http.Handler          // authorization server, below /oauth/; nil: none is served
	// Compatibility names what is put up with of clients that do not keep to the protocol.
	Compatibility []string
	Cache         *cache.Cache     // nil: every call is made
	Cluster       *cluster.Cluster // nil: sessions are this node's alone
	Events        mcp.EventStore   // with Cluster: what was sent on streams of sessions, for all nodes
	Quota         *quota.Limiter   // nil: nothing is counted
	Policy        *policy.Policy   // nil: what is published needs its scopes and no more
	Shadow        *policy.Policy   // asked too, for the log alone; nil: none
	Explicit      bool             // say that something is denied although its caller may not see it

	State   Store      // what must be remembered of calls with effects, and tasks; nil: in memory, gone with the process
	Key     secret.Key // seals what State holds; with State nil it is not used
	Effects Effects
	Tasks   Tasks
	Webhook *approve.Webhook // hears of calls that wait for approval; nil: none

	Configuration string // SHA-256 of the file that this was made of, for the audit log; "": none was
	By            string // who gave it

	Logger  *slog.Logger         // one record per call; nil discards
	Tracer  trace.TracerProvider // nil: no spans
	Meter   metric.MeterProvider // nil: no metrics
	Metrics http.Handler         // serves /metrics; nil: 404

	TLS     Certificates   // what the listener shows its clients; nil: plain HTTP
	Proxies []netip.Prefix // of plain HTTP: other peers but this machine are refused; nil: none are

	StateKey       []byte           // 32 bytes that seal requestState; nil: random, states end with the process
	AllowedHosts   []string         // beside loopback names
	AllowedOrigins []string         // beside the server's own
	Artifacts      artifact.Options // where large results are kept, and for how long; its Logger is that of the house
}

// Effects say how calls with effects are treated. Zero means the default in brackets.
type Effects struct {
	Wait      time.Duration    // of a call for another one with its key [5 s]
	Retention time.Duration    // of answers [24 h]
	Confirm   []call.Effect    // classes of tools whose calls their caller confirms; safe ones are left out
	Rules     []effect.Rule    // what the operator says of tools; the first that fits counts
	Redact    *redact.Redactor // takes secrets out of what the audit log gets [names that always are secret, card and account numbers]
	Keep      audit.Retention  // how long the audit log keeps values [until somebody erases them]
}

// Tasks say which tools may be tasks, and bound them. Zero means the default in brackets.
type Tasks struct {
	Rules      []TaskRule    // what the operator says of tools; the first that fits counts
	Workers    int           // tasks that run at once on this node [16]
	MaxQueued  int           // tasks of all nodes that wait for a worker [10,000]
	MaxPerUser int           // tasks of one caller that have not ended [1,000]
	TTL        time.Duration // how long a task is kept whose caller does not say [24 h]
	MaxTTL     time.Duration // longest time a caller may ask for [7 days]
	Timeout    time.Duration // longest run [1 h]
	Poll       time.Duration // how often callers are told to ask [1 s]
}

// A TaskRule says whether calls of tools may go on as tasks.
type TaskRule struct {
	Tool    string // name; * stands for any text but /
	Support call.TaskSupport
}

// Access is what a client is told that has no token, or one that does not suffice.
type Access struct {
	Resource string   // canonical address of the server, the audience of tokens (RFC 8707)
	Issuers  []string // authorization servers
	Scopes   []string // that a client may ask for first

	// Describe returns the metadata of the authorization server, which is then served here too
	// (RFC 8414): for clients of revision 2025-03-26. Nil: it is not served.
	Describe     func(context.Context) ([]byte, error)
	Nonce        func() string // makes one for the next proof of a client (RFC 9449); nil: proofs are not taken
	DPoPRequired bool          // tokens that are bound to no key of their client are refused (RFC 9449)
}

// AbsentHeaders is for clients of revision 2026-07-28 that leave out headers which mirror the body.
const AbsentHeaders = "absent-headers"

// Limits bound what one server does at once. Zero means the default in brackets.
type Limits struct {
	MessageBytes    int           // one message [4 MiB]
	Depth           int           // nesting of JSON [64]
	Elements        int           // members and array elements of one message [100,000]
	ConcurrentCalls int           // calls running at once [256]
	QueuedCalls     int           // calls waiting to run [1,024]
	QueueTimeout    time.Duration // longest wait [5 s]
	CallTimeout     time.Duration // longest call [60 s]
	NotCritical     []string      // names of tools that are refused first
	Memory          int64         // bytes that the process may have; calls are refused near it [nobody looks]
	Streams         int           // open subscriptions [10,000]
	StreamsPerPeer  int           // open subscriptions of one client address [1,000]
	Sessions        int           // sessions of older revisions [10,000]
	SessionStreams  int           // streams per session [64]
	SessionIdle     time.Duration // a session ends after this long without a message [30 min]
	ResultBytes     int           // one result [256 KiB]
	ResultTokens    int           // estimated tokens of one result [64,000]
}

// A House is a built server. Its methods are safe for concurrent use.
type House struct {
	opts       Options
	faces      []*face // the first is the main one, /mcp
	backends   []call.Backend
	everything atomic.Pointer[catalog.Snapshot] // what all backends publish
	gate       *admit.Gate
	resilience *resilience.Resilience
	limits     admit.Options // of gate, as given
	unruled    bool          // no policy was given
	handler    http.Handler
	stdio      *mcpstdio.Door
	artifacts  *artifact.Store
	effects    *effect.Effects
	approvals  *approve.Approvals
	deciding   *approvals.Door
	kept       *kept
	drain      *drain
	users      users
	working    atomic.Int64 // tasks that run in it
	bound      func()       // has tasks keep to its bounds
}

// main is what stdio and callers in memory see.
func (h *House) main() *face { return h.faces[0] }

// Build makes a house. All registration happens here, before any door opens; the error joins
// every problem and names what is wrong and where it was declared.
func Build(ctx context.Context, given *Options) (*House, error) { return build(ctx, given, nil) }

// build makes a house that can follow another one; nil: it is the first.
func build(ctx context.Context, given *Options, before *House) (*House, error) {
	o := *given
	setDefaults(&o)
	if err := o.Tasks.check(); err != nil {
		return nil, err
	}
	h := &House{opts: o, drain: newDrain(), users: users{idle: make(chan struct{})}}
	h.users.n.Store(1)
	if err := h.keep(ctx, before); err != nil {
		return nil, err
	}
	h.backends = append(o.Backends[:len(o.Backends):len(o.Backends)], h.artifacts)
	snapshot, err := h.register(ctx)
	if err != nil {
		return nil, err
	}
	if err := h.openResilience(before); err != nil {
		return nil, err
	}
	bounds, err := bound.New(bound.Options{MaxBytes: o.Limits.ResultBytes, MaxTokens: o.Limits.ResultTokens, Store: h.artifacts, CheckOutput: catalog.CheckOutput})
	if err != nil {
		return nil, err
	}
	shared := guard.Set{Observe: h.kept.observer.Guard, Authenticate: authenticate.Nobody, Admit: h.gate.Guard, Validate: validate.Guard, Bound: bounds.Guard, Resilience: h.resilience.Guard}
	if err := h.rule(before); err != nil {
		return nil, err
	}
	if err := h.openEffects(ctx, snapshot); err != nil {
		return nil, err
	}
	main := Server{Path: "/mcp", Name: o.Name, Title: o.Title, Instructions: o.Instructions, Search: o.Search}
	for _, s := range append([]Server{main}, o.Servers...) {
		if h.faceAt(s.Host+s.Path) != nil {
			h.forget()
			return nil, fmt.Errorf("server %s: the address is taken by another server", s.Host+s.Path)
		}
		f, err := h.newFace(s, snapshot, shared, before)
		if err != nil {
			h.forget()
			return nil, fmt.Errorf("server %s: %w", s.Path, err)
		}
		h.faces = append(h.faces, f)
	}
	if err := h.openApprovals(); err != nil {
		h.forget()
		return nil, err
	}
	h.stdio, err = mcpstdio.New(mcpstdio.Options{
		Stateless: h.main().statelessLine, Sessions: h.main().place.sessions.ServeStdio,
		MaxMessageBytes: o.Limits.MessageBytes, MaxConcurrent: o.Limits.ConcurrentCalls, Logger: o.Logger,
	})
	if err != nil {
		h.forget()
		return nil, err
	}
	if err := h.configured(ctx); err != nil {
		h.forget()
		return nil, err
	}
	h.handler = h.Handler()
	if before == nil {
		h.kept.current.Store(h)
	}
	return h, nil
}

// rule makes the policy that counts when none is given.
func (h *House) rule(before *House) error {
	if h.opts.Policy != nil {
		return nil
	}
	h.unruled = true
	if before != nil && before.unruled {
		h.opts.Policy = before.opts.Policy
		return nil
	}
	var problems []error
	h.opts.Policy, problems = policy.Compile(policy.Set{})
	return errors.Join(problems...)
}

func setDefaults(o *Options) {
	if o.Name == "" {
		o.Name = "newel"
	}
	if o.Version == "" {
		o.Version = "0.0.0"
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Tracer == nil {
		o.Tracer = tracenoop.NewTracerProvider()
	}
	if o.Meter == nil {
		o.Meter = metricnoop.NewMeterProvider()
	}
}

// register asks every backend what it publishes and builds the snapshot.
func (h *House) register(ctx context.Context) (*catalog.Snapshot, error) {
	var sources []catalog.Source
	var problems []error
	seen := map[string]bool{}
	answers := make([]answer, len(h.backends))
	var all sync.WaitGroup
	for i, b := range h.backends { // side by side: some of them ask servers far away
		all.Go(func() { answers[i].caps, answers[i].err = b.Capabilities(ctx) })
	}
	all.Wait()
	for i, b := range h.backends {
		if seen[b.Name()] {
			problems = append(problems, fmt.Errorf("two backends are named %q", b.Name()))
			continue
		}
		seen[b.Name()] = true
		if err := answers[i].err; err != nil {
			problems = append(problems, fmt.Errorf("backend %q: %w", b.Name(), err))
			continue
		}
		sources = append(sources, catalog.Source{Backend: b.Name(), Capabilities: h.opts.Tasks.apply(answers[i].caps), Tolerant: isTolerant(b)})
	}
	snapshot, err := catalog.Build(sources)
	if err := errors.Join(append(problems, err)...); err != nil {
		return nil, err
	}
	h.everything.Store(snapshot)
	for _, err := range snapshot.Refused() {
		h.opts.Logger.LogAttrs(ctx, slog.LevelWarn, "a capability is left out", slog.String("error", err.Error()))
	}
	return snapshot, nil
}

// answer is what one backend publishes.
type answer struct {
	caps []*call.Capability
	err  error
}

// A tolerant backend publishes what others declare: what is wrong with one capability, or taken
// by a backend before it, is left out and logged.
type tolerant interface{ Tolerant() bool }

func isTolerant(b call.Backend) bool {
	t, ok := b.(tolerant)
	return ok && t.Tolerant()
}

// follow tells the backend of a resource that somebody subscribed to it.
func (h *House) follow(uri string) {
	owner := h.everything.Load().Owner(uri)
	for _, b := range h.backends {
		if f, ok := b.(call.Follower); ok && b.Name() == owner {
			f.Follow(uri)
		}
	}
}

// refreshTimeout bounds how long backends take to say what they publish, all together: meanwhile no
// other configuration is gone over to.
const refreshTimeout = time.Minute

// refresh registers everything anew and tells subscribers what changed. A failure keeps the
// snapshot that is served.
func (h *House) refresh(ctx context.Context, kinds ...call.Kind) error {
	limited, cancel := context.WithTimeout(ctx, refreshTimeout)
	defer cancel()
	snapshot, err := h.register(limited)
	if err != nil {
		return err
	}
	for _, f := range h.faces {
		changed, err := f.show(snapshot)
		if err != nil {
			return err
		}
		if h.kept.current.Load() != h {
			continue // it serves nobody yet
		}
		for _, kind := range changed {
			if !slices.Contains(kinds, kind) {
				f.place.hub.ListChanged(kind, false)
			}
		}
		for _, kind := range kinds { // their backend was told so, even if nothing is different any more
			f.place.hub.ListChanged(kind, true)
		}
	}
	return nil
}

// Do runs one call through the whole path, in memory.
func (h *House) Do(ctx context.Context, c *call.Call) (*call.Result, error) {
	if c.Sink == nil {
		c.Sink = call.Discard
	}
	if c.Asker == nil {
		c.Asker = call.NoAsker
	}
	if c.Door == "" {
		c.Door = "memory"
	}
	return h.main().path(ctx, c)
}

// Summary names what is served, for printing.
type Summary struct {
	Tools, Resources, Templates, Prompts []string
}

// Summary returns what is served now.
func (h *House) Summary() Summary {
	s := h.main().catalog.Load()
	return Summary{
		Tools:     s.Names(call.ListTools),
		Resources: s.Names(call.ListResources),
		Templates: s.Names(call.ListTemplates),
		Prompts:   s.Names(call.ListPrompts),
	}
}
