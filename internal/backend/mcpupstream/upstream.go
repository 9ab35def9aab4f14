// Package mcpupstream puts existing MCP servers behind the path: over stdio or Streamable HTTP, of
// the stateless revision or one with sessions. What they publish becomes capabilities like any
// other, and what callers of either era can do works with servers of either era.
//
// Start reading at [Upstream.Capabilities] and [target.run]. wire.go and http.go and stdio.go move
// messages, session.go finds the era out and keeps conversations, lists.go makes capabilities of
// what is listed, run.go runs a call and park.go keeps one whose caller has to be asked first.
//
// It terminates the protocol on this side too, and changes nothing in between: arguments, results,
// definitions and errors are raw JSON from hop to hop, unknown members included. It refuses answers
// over their bound, to other requests, and to questions that the caller's side cannot answer. While a
// server is away its last known lists stay published; what becomes of calls is decided on the path.
package mcpupstream

import (
	"context"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/module"
	"newel.dev/newel/internal/process"
)

// An Upstream is one MCP server behind the gateway. It is safe for concurrent use.
type Upstream struct {
	name       string
	config     Config
	log        *slog.Logger
	where      func(string) string
	clientInfo jsontext.Value
	endpoint   *endpoint           // over HTTP
	processes  *process.Supervisor // over stdio
	era        atomic.Pointer[string]
	stateless  atomic.Pointer[session] // if the server is of that era: the one all calls share
	ids        atomic.Int64
	pool       pool
	parked     parking
	life       context.Context // ends with Close
	end        context.CancelFunc
	background sync.WaitGroup
	changed    chan struct{} // its lists may have changed: there is something in announced
	announced  atomic.Uint32 // kinds of lists that the server said have changed, as bits

	mu        sync.Mutex // guards what is below
	published []*call.Capability
	listed    bool          // its lists came at least once
	problem   string        // why they did not, last time
	fresh     time.Duration // how long the lists are good, as a server says that does not tell of changes; 0: it says nothing
	followed  map[string]struct{}
	refollow  chan struct{} // closed and replaced when followed grows
	updated   func(uri string)
}

// New checks the configuration and returns the upstream; nothing is dialled or started.
func New(name string, c Config, env module.Env) (*Upstream, error) {
	c.setDefaults()
	at := env.Position
	if at == nil {
		at = func(string) string { return "server " + name }
	}
	if err := c.check(at); err != nil {
		return nil, err
	}
	u := &Upstream{
		name: name, config: c, log: env.Logger, where: at,
		clientInfo: jsontext.Value(`{"name":"newel-gateway","version":"1"}`),
		changed:    make(chan struct{}, 1),
		followed:   map[string]struct{}{},
		refollow:   make(chan struct{}),
	}
	u.pool = pool{shared: map[string]*slot{}, free: map[string][]*session{}, all: map[*session]struct{}{}}
	u.parked = parking{calls: map[string]*flight{}, max: c.MaxParked, timeout: c.ParkTimeout}
	if u.log == nil {
		u.log = slog.New(slog.DiscardHandler)
	}
	u.log = u.log.With(slog.String("upstream", name))
	u.life, u.end = context.WithCancel(context.Background())
	if c.URL != "" {
		env.Logger = u.log
		var err error
		u.endpoint, err = newEndpoint(&c, env, at)
		return u, err
	}
	var err error
	u.processes, err = process.New(process.Options{
		Name: name, Command: c.Command, Args: c.Args, Env: environment(&c), Dir: folder(env.Dir, c.Cwd),
		MaxLine: c.MaxMessageBytes, MaxProcesses: c.MaxProcesses, StartTimeout: c.StartTimeout, IdleTimeout: c.IdleTimeout,
		MaxLifetime: c.MaxProcessLifetime, KillGrace: c.StopTimeout, MaxStderr: c.MaxStderrRate,
		MemoryBytes: c.MaxProcessMemory, CPUSeconds: int64(c.MaxProcessCPU / time.Second), Logger: u.log,
	})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", at("command"), err)
	}
	u.background.Go(func() { _ = u.processes.Run(u.life) }) // ends with Close
	return u, nil
}

func environment(c *Config) []string {
	var env []string
	for name, v := range c.Env {
		env = append(env, name+"="+v.Reveal())
	}
	slices.Sort(env)
	return env
}

func folder(base, cwd string) string {
	if cwd == "" || filepath.IsAbs(cwd) {
		if cwd == "" {
			return base
		}
		return cwd
	}
	return filepath.Join(base, cwd)
}

// single reports whether the server is spoken to over pipes: nothing on one says which call a
// question is for.
func (u *Upstream) single() bool { return u.endpoint == nil || u.config.Transport == "sse" }

// full reports whether no further pipe may be opened.
func (u *Upstream) full() bool {
	if u.processes != nil {
		return u.processes.Stats().Running >= u.config.MaxProcesses
	}
	u.pool.mu.Lock()
	defer u.pool.mu.Unlock()
	return len(u.pool.all) >= u.config.MaxProcesses
}

// start opens a pipe: it starts a process and takes its lines apart, or connects.
func (u *Upstream) start(ctx context.Context) (link, error) {
	if u.endpoint != nil {
		return u.openSSE(ctx)
	}
	p, err := u.processes.Acquire(ctx)
	if err != nil {
		return nil, unsentError{err}
	}
	return newPiped(p, u.config.MaxMessageBytes, u.heard), nil
}

// heard takes what a server says outside of a request.
func (u *Upstream) heard(m *message) {
	switch m.Method {
	case "notifications/tools/list_changed":
		u.announce(call.ListTools)
	case "notifications/prompts/list_changed":
		u.announce(call.ListPrompts)
	case "notifications/resources/list_changed":
		u.announce(call.ListResources)
	case "notifications/resources/updated":
		u.updatedURI(m)
	}
}

// announce has the lists read again. kind 0 means that changes may have been missed.
func (u *Upstream) announce(kind call.Kind) {
	if kind != 0 {
		u.announced.Or(1 << kind)
	}
	select {
	case u.changed <- struct{}{}:
	default: // one refresh is due already
	}
}

// Name implements call.Backend.
func (u *Upstream) Name() string { return u.name }

// Close ends all conversations and processes and waits for them.
func (u *Upstream) Close() error {
	u.parked.closeAll()
	u.closeAll(u.life)
	u.end()
	u.background.Wait()
	return nil
}

// Status is how an upstream is, for people and for readiness.
type Status struct {
	Name     string `json:"name"`
	Revision string `json:"revision,omitzero"` // "" until it was reached
	Listed   bool   `json:"listed"`            // its lists are published, maybe older ones
	Problem  string `json:"problem,omitzero"`  // why the last attempt to list failed
	Parked   int    `json:"parked"`
}

// Status returns how the upstream is now.
func (u *Upstream) Status() Status {
	u.mu.Lock()
	defer u.mu.Unlock()
	s := Status{Name: u.name, Listed: u.listed, Problem: u.problem, Parked: u.parked.len()}
	if era := u.era.Load(); era != nil {
		s.Revision = *era
	}
	return s
}

// Bounds are how many calls the server gets at once, and how long one may take; 0: as long as any.
func (u *Upstream) Bounds() (calls int, timeout time.Duration) {
	return u.config.MaxConcurrentCalls, u.config.CallTimeout
}

// Capabilities implements call.Backend. The first time it waits for the server's lists, at most
// list_timeout: a server that is away or slow is published when it answers (see Run), and does
// not hold up others.
func (u *Upstream) Capabilities(ctx context.Context) ([]*call.Capability, error) {
	u.mu.Lock()
	tried := u.listed || u.problem != ""
	u.mu.Unlock()
	if !tried {
		ctx, stop := context.WithTimeout(ctx, u.config.ListTimeout)
		defer stop()
		if _, err := u.refresh(ctx); err != nil {
			u.log.LogAttrs(ctx, slog.LevelWarn, "the server's lists could not be read; it is served without them and asked again", slog.String("error", err.Error()))
		}
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.published, nil
}

// Tolerant says that what is wrong with one capability is no reason to refuse the others.
func (u *Upstream) Tolerant() bool { return true }

// Run implements call.Watcher: it follows the server's lists and resources until ctx ends.
func (u *Upstream) Run(ctx context.Context, changed func(kinds ...call.Kind), updated func(uri string)) error {
	u.mu.Lock()
	u.onUpdated(updated)
	u.mu.Unlock()
	var all sync.WaitGroup
	all.Go(func() { u.keepListed(ctx, changed) })
	all.Go(func() { u.listen(ctx) })
	all.Go(func() {
		tick := time.NewTicker(max(u.config.IdleTimeout/4, 10*time.Millisecond))
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case now := <-tick.C:
				u.expire(now)
			}
		}
	})
	all.Wait()
	return nil
}

// keepListed asks for the lists again: after a change, after a failure with growing pauses, and
// now and then.
func (u *Upstream) keepListed(ctx context.Context, changed func(kinds ...call.Kind)) {
	pause := 500 * time.Millisecond
	for {
		u.mu.Lock()
		failed := u.problem != ""
		next := u.config.RefreshInterval
		if u.fresh != 0 {
			next = min(next, u.fresh)
		}
		u.mu.Unlock()
		if failed {
			next, pause = pause, min(pause*2, time.Minute)
		} else {
			pause = 500 * time.Millisecond
		}
		t := time.NewTimer(next)
		select {
		case <-ctx.Done():
			t.Stop()
			return
		case <-u.changed:
			t.Stop()
		case <-t.C:
		}
		limit, stop := context.WithTimeout(ctx, u.config.StartTimeout+u.config.ListTimeout)
		said := u.announced.Swap(0)
		different, err := u.refresh(limit)
		stop()
		var kinds []call.Kind
		for _, k := range []call.Kind{call.ListTools, call.ListPrompts, call.ListResources} {
			if said&(1<<k) != 0 {
				kinds = append(kinds, k)
			}
		}
		if err != nil && ctx.Err() == nil {
			u.announced.Or(said)
			kinds = nil // told of when they could be read
			u.log.LogAttrs(ctx, slog.LevelWarn, "the server's lists could not be read; the last ones stay", slog.String("error", err.Error()))
		}
		if different || len(kinds) > 0 {
			changed(kinds...)
		}
	}
}
