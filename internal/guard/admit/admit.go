// Package admit bounds how much runs at once and how long it may take.
//
// Refuses: calls over the bounds of concurrency, queue, streams or memory, as Exhausted with advice
// when to retry; those of tools that are not critical first. Needs: nothing. Fails: closed. Records: time in the queue. Costs: two channel
// operations and a context, a fifth of a microsecond, while there is room, and the timer of the
// deadline for calls that wait for something; callers wait in order of arrival when there is none. It
// starts no goroutine.
//
// A deadline is a context's: a handler that does not look at its context cannot be stopped, and
// keeps its slot for as long as it runs. That is on purpose: what still runs still counts.
package admit

import (
	"context"
	"errors"
	"net"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/pattern"
)

// Options bound what runs at once. Zero means the default in brackets; below zero is refused.
type Options struct {
	MaxConcurrent     int           // calls that run at once [256]
	MaxQueued         int           // calls that wait for it [1,024]
	QueueTimeout      time.Duration // longest wait [5 s]
	CallTimeout       time.Duration // longest call, without its wait; subscriptions have none [60 s]
	MaxStreams        int           // open subscriptions [10,000]
	MaxStreamsPerPeer int           // open subscriptions of one caller, or of one address where nobody asks who is calling [1,000]

	// MaxMemory is what the process may have, in bytes; near it streams are refused, then calls.
	// 0: nobody looks.
	MaxMemory   int64
	NotCritical []string      // names of tools that are refused first when memory or the queue runs out
	Memory      func() uint64 // what the process has; default: as the Go runtime says
}

// DefaultConcurrent is how many calls run at once if nobody says otherwise.
const DefaultConcurrent = 256

// A Gate admits calls. It is safe for concurrent use.
type Gate struct {
	o      Options
	memory *usage
	slots  chan struct{} // one element per running call; blocked senders are served in order
	queued atomic.Int64

	mu      sync.Mutex // guards what is below
	streams int
	perPeer map[string]int
}

// New returns a gate, or an error that names the options that make no sense.
func New(o Options) (*Gate, error) {
	var problems []error
	check := func(name string, negative bool) {
		if negative {
			problems = append(problems, errors.New("admit: "+name+" is below zero"))
		}
	}
	check("MaxConcurrent", o.MaxConcurrent < 0)
	check("MaxQueued", o.MaxQueued < 0)
	check("QueueTimeout", o.QueueTimeout < 0)
	check("CallTimeout", o.CallTimeout < 0)
	check("MaxStreams", o.MaxStreams < 0)
	check("MaxStreamsPerPeer", o.MaxStreamsPerPeer < 0)
	check("MaxMemory", o.MaxMemory < 0)
	if problems != nil {
		return nil, errors.Join(problems...)
	}
	o.MaxConcurrent = or(o.MaxConcurrent, DefaultConcurrent)
	o.MaxQueued = or(o.MaxQueued, 1024)
	o.QueueTimeout = or(o.QueueTimeout, 5*time.Second)
	o.CallTimeout = or(o.CallTimeout, time.Minute)
	o.MaxStreams = or(o.MaxStreams, 10_000)
	o.MaxStreamsPerPeer = or(o.MaxStreamsPerPeer, 1000)
	if o.Memory == nil {
		o.Memory = taken
	}
	return &Gate{o: o, memory: &usage{read: o.Memory}, slots: make(chan struct{}, o.MaxConcurrent), perPeer: map[string]int{}}, nil
}

func or[T ~int | ~int64](v, otherwise T) T {
	if v == 0 {
		return otherwise
	}
	return v
}

// Guard is the guard of the admit step.
func (g *Gate) Guard(next call.Handler) call.Handler {
	return func(ctx context.Context, c *call.Call) (*call.Result, error) {
		if err := g.shed(c); err != nil {
			return nil, err
		}
		if c.Kind == call.Subscribe || c.Kind == call.TaskResult { // both wait for what others do
			leave, err := g.openStream(c)
			if err != nil {
				return nil, err
			}
			defer leave()
			return next(ctx, c)
		}
		if err := g.enter(ctx, c); err != nil {
			return nil, err
		}
		defer g.leave()
		limited := within(ctx, g.o.CallTimeout)
		defer limited.end()
		r, err := next(limited, c)
		if err != nil && limited.Err() != nil {
			return nil, ended(limited, err)
		}
		return r, err
	}
}

// shed refuses what there may be no room for: doing less in time is better than doing all too late.
func (g *Gate) shed(c *call.Call) error {
	share := g.share()
	if share >= shedAll && c.Kind != call.Discover {
		return busy("the server is near its limit of memory")
	}
	full := share >= shedSome || float64(g.queued.Load()) >= shedQueue*float64(g.o.MaxQueued)
	if full && len(g.o.NotCritical) > 0 && c.Kind == call.Tool && pattern.Any(g.o.NotCritical, c.Name) {
		return busy("the server is busy and does what is more important first")
	}
	return nil
}

// share is how much of the memory is used.
func (g *Gate) share() float64 {
	if g.o.MaxMemory <= 0 {
		return 0
	}
	return float64(g.memory.now()) / float64(g.o.MaxMemory)
}

// Crowded reports whether nothing new may come that stays for long: streams are refused, and doors
// open no sessions.
func (g *Gate) Crowded() bool { return g.share() >= shedNew }

// Overload is how much is refused to save memory: 0 nothing, 1 what would stay for long, 2 tools
// that are not critical too, 3 all calls.
func (g *Gate) Overload() int64 {
	switch share := g.share(); {
	case share >= shedAll:
		return 3
	case share >= shedSome:
		return 2
	case share >= shedNew:
		return 1
	}
	return 0
}

// ended says why a call that failed after its context had ended did so. What a driver or a remote
// server makes of it says less ("interrupted", "i/o timeout"); what a handler says itself stands.
func ended(ctx context.Context, err error) error {
	var own *call.Error
	var ask *call.InputRequired
	if !errors.Is(err, ctx.Err()) && (errors.As(err, &own) && own.Code != call.Internal || errors.As(err, &ask)) {
		return err
	}
	return call.AsError(ctx.Err()).Because(err)
}

// leave gives a slot back; who waits longest has it at once, so nobody can overtake.
func (g *Gate) leave() { <-g.slots }

// enter takes a slot, waiting in the queue if there is none.
func (g *Gate) enter(ctx context.Context, c *call.Call) error {
	select {
	case g.slots <- struct{}{}:
		return nil
	default:
	}
	if g.queued.Add(1) > int64(g.o.MaxQueued) {
		g.queued.Add(-1)
		return busy("the server is at its limit of calls, running and waiting")
	}
	defer g.queued.Add(-1)
	start := time.Now()
	defer func() { c.Event.QueueTime = time.Since(start) }()
	timeout := time.NewTimer(g.o.QueueTimeout)
	defer timeout.Stop()
	select {
	case g.slots <- struct{}{}:
		return nil
	case <-timeout.C:
		return busy("the call waited too long for its turn")
	case <-ctx.Done():
		return call.AsError(ctx.Err())
	}
}

func busy(why string) error {
	e := call.Errorf(call.Exhausted, "%s; try again in a moment", why)
	e.RetryAfter = time.Second
	return e
}

func (g *Gate) openStream(c *call.Call) (leave func(), err error) {
	peer := callerOf(c)
	crowded := g.Crowded()
	g.mu.Lock()
	defer g.mu.Unlock()
	if crowded {
		return nil, busy("the server runs out of memory and opens no more subscriptions")
	}
	if g.streams >= g.o.MaxStreams {
		return nil, busy("the server is at its limit of subscriptions")
	}
	if g.perPeer[peer] >= g.o.MaxStreamsPerPeer {
		return nil, busy("this client is at its limit of subscriptions; close some")
	}
	g.streams++
	g.perPeer[peer]++
	return func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		g.streams--
		if g.perPeer[peer]--; g.perPeer[peer] == 0 {
			delete(g.perPeer, peer)
		}
	}, nil
}

// callerOf returns whose stream a call is: the caller's, or the address's where nobody asks who is
// calling.
func callerOf(c *call.Call) string {
	if p := c.Principal; p != nil && p.ID != "" {
		return strconv.Quote(p.Tenant) + strconv.Quote(p.ID)
	}
	if host, _, err := net.SplitHostPort(c.Credential.Peer); err == nil {
		return host
	}
	return c.Credential.Peer
}

// Longest returns how long a call takes at most, with its wait.
func (g *Gate) Longest() time.Duration { return g.o.QueueTimeout + g.o.CallTimeout }

// Running returns the number of calls that run now, subscriptions apart.
func (g *Gate) Running() int64 { return int64(len(g.slots)) }

// Queued returns the number of calls that wait for a slot now.
func (g *Gate) Queued() int64 { return max(0, min(g.queued.Load(), int64(g.o.MaxQueued))) }

// Streams returns the number of open subscriptions.
func (g *Gate) Streams() int64 {
	g.mu.Lock()
	defer g.mu.Unlock()
	return int64(g.streams)
}
