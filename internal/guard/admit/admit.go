// Package admit bounds how much runs at once and how long it may take.
//
// Refuses: calls over the bounds of concurrency, queue or streams, as Exhausted with advice when
// to retry. Needs: nothing. Fails: closed. Records: time in the queue. Costs: one channel
// operation while there is room; callers wait in order of arrival when there is none.
package admit

import (
	"context"
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"newel.dev/newel/call"
)

// Options bound what runs at once. Zero means the default in brackets; below zero is refused.
type Options struct {
	MaxConcurrent     int           // calls that run at once [256]
	MaxQueued         int           // calls that wait for it [1,024]
	QueueTimeout      time.Duration // longest wait [5 s]
	CallTimeout       time.Duration // longest call, subscriptions apart [60 s]
	MaxStreams        int           // open subscriptions [10,000]
	MaxStreamsPerPeer int           // open subscriptions of one client address [1,000]
}

// A Gate admits calls. It is safe for concurrent use.
type Gate struct {
	o       Options
	slots   chan struct{}
	queued  atomic.Int64
	mu      sync.Mutex // guards what is below
	streams int
	perPeer map[string]int
}

// New returns a gate, or an error that names the option that makes no sense.
func New(o Options) (*Gate, error) {
	for name, v := range map[string]int64{"MaxConcurrent": int64(o.MaxConcurrent), "MaxQueued": int64(o.MaxQueued), "QueueTimeout": int64(o.QueueTimeout),
		"CallTimeout": int64(o.CallTimeout), "MaxStreams": int64(o.MaxStreams), "MaxStreamsPerPeer": int64(o.MaxStreamsPerPeer)} {
		if v < 0 {
			return nil, errors.New("admit: " + name + " is below zero")
		}
	}
	o.MaxConcurrent = or(o.MaxConcurrent, 256)
	o.MaxQueued = or(o.MaxQueued, 1024)
	o.QueueTimeout = or(o.QueueTimeout, 5*time.Second)
	o.CallTimeout = or(o.CallTimeout, time.Minute)
	o.MaxStreams = or(o.MaxStreams, 10_000)
	o.MaxStreamsPerPeer = or(o.MaxStreamsPerPeer, 1000)
	return &Gate{o: o, slots: make(chan struct{}, o.MaxConcurrent), perPeer: map[string]int{}}, nil
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
		if c.Kind == call.Subscribe {
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
		defer func() { <-g.slots }()
		ctx, cancel := context.WithTimeout(ctx, g.o.CallTimeout)
		defer cancel()
		r, err := next(ctx, c)
		if err != nil && ctx.Err() != nil && errors.Is(err, ctx.Err()) {
			return nil, call.AsError(ctx.Err()) // what a driver makes of it says less
		}
		return r, err
	}
}

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
	timeout := time.NewTimer(g.o.QueueTimeout)
	defer timeout.Stop()
	defer func() { c.Event.QueueTime = time.Since(start) }()
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
	peer := c.Credential.Peer
	if host, _, err := net.SplitHostPort(peer); err == nil {
		peer = host
	}
	g.mu.Lock()
	defer g.mu.Unlock()
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
