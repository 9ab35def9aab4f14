package assembly

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"reflect"
	"sync"
	"sync/atomic"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/backend/artifact"
	"newel.dev/newel/internal/catalog"
	"newel.dev/newel/internal/door/mcpsession"
	"newel.dev/newel/internal/guard/admit"
	"newel.dev/newel/internal/guard/cache"
	"newel.dev/newel/internal/guard/observe"
	"newel.dev/newel/internal/mcpwire"
	"newel.dev/newel/internal/secret"
	"newel.dev/newel/internal/stream"
	"newel.dev/newel/internal/task"
)

// kept is what a house takes over from the one before it, beside what stands in its options:
// metrics, which can be made once only, what is known of calls, and who is served now.
type kept struct {
	log      *slog.Logger
	observer *observe.Observer
	store    Store // what is known of calls with effects
	key      secret.Key
	tasks    *task.Tasks           // and who works on them
	current  atomic.Pointer[House] // that serves
	running  atomic.Bool           // what /ready answers
}

// A place is an address at which a server stands. Who subscribed or has a session there does not
// lose it when another server takes the place.
type place struct {
	hub        *catalog.Hub
	identified bool
	streams    stream.Set // streams of all revisions

	mu       sync.Mutex       // guards what is below
	sessions *mcpsession.Door // nil until the first server is there
}

// next is what sessions at this place are served with by another server.
func (p *place) next(o mcpsession.Options) (*mcpsession.Generation, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.sessions == nil {
		var err error
		if p.sessions, err = mcpsession.New(o); err != nil {
			return nil, err
		}
		return p.sessions.First(), nil
	}
	return p.sessions.Next(o)
}

// keep takes over what outlives a configuration, or makes it.
func (h *House) keep(ctx context.Context, before *House) error {
	l := &h.opts.Limits
	limits := admit.Options{
		MaxConcurrent: l.ConcurrentCalls, MaxQueued: l.QueuedCalls, QueueTimeout: l.QueueTimeout,
		CallTimeout: l.CallTimeout, MaxStreams: l.Streams, MaxStreamsPerPeer: l.StreamsPerPeer, MaxMemory: l.Memory, NotCritical: l.NotCritical,
	}
	var err error
	if before != nil {
		h.kept, h.artifacts, h.gate, h.limits = before.kept, before.artifacts, before.gate, limits
		if !reflect.DeepEqual(limits, before.limits) { // calls of before are not counted by the new gate
			h.gate, err = admit.New(limits)
		}
		return err
	}
	h.limits = limits
	h.opts.Artifacts.Logger = h.opts.Logger
	if h.artifacts, err = artifact.New(ctx, h.opts.Artifacts); err != nil {
		return fmt.Errorf("artifacts: %w", err)
	}
	if h.gate, err = admit.New(limits); err != nil {
		return err
	}
	observer, err := observe.New(observe.Options{Logger: h.opts.Logger, Tracer: h.opts.Tracer, Meter: h.opts.Meter, Server: h.opts.Name, RPCCode: mcpwire.RPCCode})
	if err != nil {
		return err
	}
	k := &kept{log: h.opts.Logger, observer: observer}
	h.kept = k
	gate := func(read func(*admit.Gate) int64) func() int64 {
		return func() int64 {
			if now := k.current.Load(); now != nil {
				return read(now.gate)
			}
			return 0
		}
	}
	pending := func() int64 {
		if now := k.current.Load(); now != nil {
			return now.approvals.Pending()
		}
		return 0
	}
	return errors.Join(
		observer.Gauge("newel.approvals.pending", "Calls of all nodes that wait for a person, at most 256.", pending),
		observer.Gauge("newel.calls.queued", "Calls that wait for their turn.", gate((*admit.Gate).Queued)),
		observer.Gauge("newel.calls.running", "Calls that run.", gate((*admit.Gate).Running)),
		observer.Gauge("newel.overload", "What is refused to save memory: 0 nothing, 1 new streams and sessions, 2 tools that are not critical too, 3 all calls.", gate((*admit.Gate).Overload)),
		observer.Gauge("newel.streams.open", "Open subscriptions.", gate((*admit.Gate).Streams)),
		k.cacheMetrics(),
		backendMetrics(observer, k.current.Load),
		h.expiryMetric())
}

// cacheMetrics publishes what caches do, of one configuration after the other.
func (k *kept) cacheMetrics() error {
	var last atomic.Pointer[cache.Stats]
	count := func(read func(*cache.Stats) int64) func() int64 {
		return func() int64 {
			if now := k.current.Load(); now != nil && now.opts.Cache != nil {
				last.Store(now.opts.Cache.Stats())
			}
			if s := last.Load(); s != nil {
				return read(s)
			}
			return 0
		}
	}
	return errors.Join(
		k.observer.Counter("newel.cache.hits", "Calls that were answered from kept results.", count(func(s *cache.Stats) int64 { return s.Hits.Load() })),
		k.observer.Counter("newel.cache.misses", "Calls of which results may be kept, and of which none was.", count(func(s *cache.Stats) int64 { return s.Misses.Load() })),
		k.observer.Counter("newel.cache.evictions", "Kept results that went for room.", count(func(s *cache.Stats) int64 { return s.Evictions.Load() })),
		k.observer.Counter("newel.cache.refreshes", "How often kept results were made old.", count(func(s *cache.Stats) int64 { return s.Refreshes.Load() })),
		k.observer.Gauge("newel.cache.bytes", "Bytes of kept results on this node.", func() int64 {
			if now := k.current.Load(); now != nil && now.opts.Cache != nil {
				return now.opts.Cache.Size()
			}
			return 0
		}))
}

// placeFor is where a server stands: the place of the one that was at its address before, unless
// other people may be there now.
func (h *House) placeFor(s *Server, before *House) *place {
	identified := h.opts.Identity != nil
	if before != nil {
		old := before.faceAt(s.Host + s.Path)
		if old != nil && old.place.identified == identified && old.server.Tenant == s.Tenant {
			return old.place
		}
	}
	p := &place{hub: catalog.NewHub(), identified: identified}
	address := s.Host + s.Path
	p.hub.View = func(kind call.Kind, who *call.Principal) string {
		if now := h.kept.current.Load(); now != nil {
			if f := now.faceAt(address); f != nil {
				return f.shown(kind, who)
			}
		}
		return ""
	}
	p.hub.OnFollow = func(uri string) {
		if now := h.kept.current.Load(); now != nil {
			now.follow(uri)
		}
	}
	return p
}

// faceAt returns the server at an address, or nil.
func (h *House) faceAt(address string) *face {
	for _, f := range h.faces {
		if f.server.Host+f.server.Path == address {
			return f
		}
	}
	return nil
}

// forget gives back what a house has at places that others use too.
func (h *House) forget() {
	for _, f := range h.faces {
		f.sessions.End()
	}
}

// users counts the calls in a house, and one more while it is the one that serves.
type users struct {
	n    atomic.Int64
	idle chan struct{} // closed when there are none, and there will be none
}

// enter counts one more, unless the house is done.
func (u *users) enter() bool {
	for {
		n := u.n.Load()
		if n == 0 {
			return false
		}
		if u.n.CompareAndSwap(n, n+1) {
			return true
		}
	}
}

func (u *users) leave() {
	if u.n.Add(-1) == 0 {
		close(u.idle)
	}
}

// counted makes a house stay while a call is in it. A message that was on its way for so long that
// the house is done goes to the one that serves.
func (h *House) counted(address string, path call.Handler) call.Handler {
	return func(ctx context.Context, c *call.Call) (*call.Result, error) {
		if h.users.enter() {
			defer h.users.leave()
			return path(ctx, c)
		}
		if f := h.kept.current.Load().faceAt(address); f != nil {
			return f.path(ctx, c)
		}
		return nil, call.Errorf(call.Unavailable, "this server is not here any more")
	}
}

// worker is the way of tasks at an address: that of the house which serves when a run begins, to whose
// end the house stays. nil: no server is there.
func (k *kept) worker(address string) call.Handler {
	h := k.current.Load()
	if h == nil || h.faceAt(address) == nil {
		return nil
	}
	return func(ctx context.Context, c *call.Call) (*call.Result, error) {
		for {
			h := k.current.Load()
			if !h.users.enter() {
				if k.current.Load() == h {
					return nil, call.Errorf(call.Unavailable, "this server is stopping")
				}
				continue // another one serves since
			}
			defer h.users.leave()
			h.working.Add(1)
			defer h.working.Add(-1)
			f := h.faceAt(address)
			if f == nil {
				return nil, call.Errorf(call.Unavailable, "this server is not here any more")
			}
			return f.later(ctx, c)
		}
	}
}

// A job is what runs while something of a house is in use. Houses that have the same in use share it.
type job struct {
	key  any // what it is for, compared
	what string
	run  func(ctx context.Context) error
}
