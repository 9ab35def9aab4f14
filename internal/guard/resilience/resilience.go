// Package resilience is the last step of the path: it keeps what a call goes to from harming others
// when it is slow, full or away, and tries again where that does no harm.
//
// Start reading at [Resilience.Guard]; retry.go says what may be tried again, breaker.go what counts
// as a failure of a backend. Every backend has a share of the places for calls, with a short queue,
// a breaker and a budget of retries; nothing of one is another's.
//
// Refuses: calls of a backend whose breaker is open, as Unavailable, and those for which it has no
// place, as Exhausted; both with the time to wait. Needs: nothing. Fails: closed. Records: how often
// the backend was asked, if that was more than once. Costs: two uncontended locks and no memory
// while the breaker is closed and there is room; callers who want progress, or can be asked
// something, pay for a copy of their call as well.
//
// No call is ever made twice at the same time.
package resilience

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/failsafe-go/failsafe-go/bulkhead"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/pattern"
)

// Bounds are those of one backend. Zero means the default in brackets; below zero is refused.
type Bounds struct {
	Concurrent   int           // calls that it gets at once [64]
	Queued       int           // calls that wait for it [half of Concurrent]
	QueueTimeout time.Duration // longest wait [1 s]
	Timeout      time.Duration // longest attempt; 0: as long as the call may take
	Failures     int           // in a row, after which the breaker opens [5]
	Delay        time.Duration // for which it stays open before one call tries [5 s]
	Attempts     int           // of one call, the first included; 1: none is made again [3]
	Budget       float64       // retries as a share of calls, at most 1 [0.1]
}

// Or returns b with the values of d where b has none.
func (b Bounds) Or(d Bounds) Bounds {
	return Bounds{
		Concurrent: or(b.Concurrent, d.Concurrent), Queued: or(b.Queued, d.Queued), QueueTimeout: or(b.QueueTimeout, d.QueueTimeout), Timeout: or(b.Timeout, d.Timeout),
		Failures: or(b.Failures, d.Failures), Delay: or(b.Delay, d.Delay), Attempts: or(b.Attempts, d.Attempts), Budget: or(b.Budget, d.Budget),
	}
}

func or[T int | time.Duration | float64](v, otherwise T) T {
	if v == 0 {
		return otherwise
	}
	return v
}

// Check returns what makes no sense; nil is good.
func (b *Bounds) Check() error {
	for _, f := range []struct {
		name string
		bad  bool
	}{
		{"Concurrent", b.Concurrent < 0}, {"Queued", b.Queued < 0}, {"QueueTimeout", b.QueueTimeout < 0}, {"Timeout", b.Timeout < 0},
		{"Failures", b.Failures < 0}, {"Delay", b.Delay < 0}, {"Attempts", b.Attempts < 0}, {"Budget", !(b.Budget >= 0 && b.Budget <= 1)},
	} {
		if f.bad {
			return fmt.Errorf("%s makes no sense", f.name)
		}
	}
	return nil
}

// A Backend is one that calls go to.
type Backend struct {
	Name   string
	Bounds Bounds
	// Apart says that its capabilities fail by themselves: each has a breaker of its own.
	Apart bool
	// Same says that it is the very one that had the name before: what is known of it stays known.
	Same bool
}

// Options are what the step is made of.
type Options struct {
	Backends []Backend
	// Safe reports whether running a capability twice does no harm although it does not only read.
	// Nil: none is.
	Safe func(*call.Capability) bool
	// NotCritical are names of tools whose calls do not wait for a backend whose queue is half full; *
	// stands for any text.
	NotCritical []string
}

// Resilience is the step's state. It is safe for concurrent use.
type Resilience struct {
	backends map[string]*backend
	names    []string // in order
	safe     func(*call.Capability) bool
}

// New returns the step. What before (nil: nothing) knows of backends that are the same is kept, as
// far as their bounds are: calls in both count together. The error names the bound that makes no sense.
func New(o Options, before *Resilience) (*Resilience, error) {
	r := &Resilience{backends: map[string]*backend{}, safe: o.Safe}
	if r.safe == nil {
		r.safe = func(*call.Capability) bool { return false }
	}
	for _, one := range o.Backends {
		if err := one.Bounds.Check(); err != nil {
			return nil, fmt.Errorf("resilience: backend %q: %w", one.Name, err)
		}
		bounds := one.Bounds.Or(Bounds{Concurrent: 64, QueueTimeout: time.Second, Failures: 5, Delay: 5 * time.Second, Attempts: 3, Budget: 0.1})
		bounds.Queued = or(bounds.Queued, max(1, bounds.Concurrent/2))
		var old *backend
		if one.Same && before != nil {
			old = before.backends[one.Name]
		}
		r.backends[one.Name] = newBackend(one.Name, bounds, one.Apart, old)
		r.backends[one.Name].notCritical = o.NotCritical
		r.names = append(r.names, one.Name)
	}
	return r, nil
}

// backend is what is known of one.
type backend struct {
	name     string
	bounds   Bounds
	room     *room
	breakers *breakers
	budget   *budget
	counts   *counts

	notCritical []string
}

// room is the places for calls.
type room struct {
	bulkhead.Bulkhead[any]
	running, queued atomic.Int64
}

// counts only grow.
type counts struct{ retries, full, open atomic.Int64 }

func newBackend(name string, b Bounds, apart bool, old *backend) *backend {
	n := &backend{name: name, bounds: b, counts: &counts{}}
	if old != nil {
		n.counts = old.counts
		if b.Concurrent == old.bounds.Concurrent {
			n.room = old.room
		}
		if b.Failures == old.bounds.Failures && b.Delay == old.bounds.Delay && apart == old.breakers.apart {
			n.breakers = old.breakers
		}
		if b.Budget == old.bounds.Budget {
			n.budget = old.budget
		}
	}
	if n.room == nil {
		n.room = &room{Bulkhead: bulkhead.New[any](uint(b.Concurrent))} //nolint:gosec // checked: above zero
	}
	if n.breakers == nil {
		n.breakers = newBreakers(b.Failures, b.Delay, apart)
	}
	if n.budget == nil {
		n.budget = newBudget(b.Budget)
	}
	return n
}

// of returns the backend that a call goes to; nil: it ends in the house, or only waits there.
func (r *Resilience) of(c *call.Call) *backend {
	if c.Target == nil || c.Elsewhere != "" { // what runs elsewhere is asked for now and then, for hours
		return nil
	}
	switch c.Kind {
	case call.Tool, call.Resource, call.Prompt, call.Complete:
		return r.backends[c.Target.Backend]
	}
	return nil
}

// Ready returns the error that a call would be refused with because its backend is known to be away;
// nil says that it may go on, not that it will succeed.
func (r *Resilience) Ready(c *call.Call) error {
	b := r.of(c)
	if b == nil {
		return nil
	}
	if wait := b.breakers.of(c.Target).resting(); wait > 0 {
		b.counts.open.Add(1)
		return b.away(wait)
	}
	return nil
}

// Guard is the guard of the step.
func (r *Resilience) Guard(next call.Handler) call.Handler {
	return func(ctx context.Context, c *call.Call) (*call.Result, error) {
		b := r.of(c)
		if b == nil {
			return next(ctx, c)
		}
		b.budget.earn()
		if speaks(c) {
			return r.heard(ctx, c, b, next)
		}
		return r.attempts(ctx, c, b, next, nil)
	}
}

// attempts makes a call, and makes it again where that does no harm. said is what went out to its
// caller; nil: nothing can.
func (r *Resilience) attempts(ctx context.Context, c *call.Call, b *backend, next call.Handler, said *said) (*call.Result, error) {
	for n := 1; ; n++ {
		began := time.Now()
		res, asked, err := b.attempt(ctx, c, next, said)
		if err == nil || !asked {
			return res, err
		}
		if n >= b.bounds.Attempts || said.anything() || !r.again(c, err) {
			return nil, err
		}
		if !b.pause(ctx, n, time.Since(began), err) {
			return nil, err
		}
		c.Event.Attempts, c.Event.Step = n+1, ""
	}
}

// attempt asks the backend once. asked is false if it was not: then err is a refusal.
func (b *backend) attempt(ctx context.Context, c *call.Call, next call.Handler, said *said) (r *call.Result, asked bool, err error) {
	breaker := b.breakers.of(c.Target)
	if err := b.enter(ctx, c, breaker); err != nil {
		return nil, false, err
	}
	defer b.room.running.Add(-1)
	defer b.room.ReleasePermit()
	if !breaker.enter() {
		b.counts.open.Add(1)
		return nil, false, b.away(breaker.resting())
	}
	went := nothing // if it panics: that is a bug, here or there
	defer func() { breaker.record(went) }()
	if b.bounds.Timeout > 0 {
		var stop context.CancelFunc
		ctx, stop = context.WithTimeout(ctx, b.bounds.Timeout)
		defer stop()
	}
	r, err = next(ctx, c)
	if err == nil {
		went = good
		return r, true, nil
	}
	if b.bounds.Timeout > 0 && ctx.Err() != nil {
		err = ended(ctx, err)
	}
	went = verdict(ctx, err, said)
	return r, true, err
}

// ended says why an attempt that failed after its time was over did so: what a driver or a remote
// server makes of that says less. What a handler says itself stands.
func ended(ctx context.Context, err error) error {
	var own *call.Error
	var ask *call.InputRequired
	if !errors.Is(err, ctx.Err()) && (errors.As(err, &own) && own.Code != call.Internal || errors.As(err, &ask)) {
		return err
	}
	return call.AsError(ctx.Err()).Because(err)
}

// enter takes a place, waiting in the queue if there is none.
func (b *backend) enter(ctx context.Context, c *call.Call, breaker *breaker) error {
	if b.room.TryAcquirePermit() {
		b.room.running.Add(1)
		return nil
	}
	if wait := breaker.resting(); wait > 0 {
		b.counts.open.Add(1)
		return b.away(wait)
	}
	defer b.room.queued.Add(-1)
	waiting := b.room.queued.Add(1)
	if waiting > (int64(b.bounds.Queued)+1)/2 && c.Kind == call.Tool && pattern.Any(b.notCritical, c.Target.Name) {
		return b.full("has many calls that wait, and does what is more important first")
	}
	if waiting > int64(b.bounds.Queued) {
		return b.full("has as many calls as it may have, running and waiting")
	}
	start := time.Now()
	defer func() { c.Event.QueueTime += time.Since(start) }()
	if err := b.room.AcquirePermitWithMaxWait(ctx, b.bounds.QueueTimeout); err != nil {
		if errors.Is(err, bulkhead.ErrFull) {
			return b.full("has as many calls as it may have, and none ended in time")
		}
		return call.AsError(err)
	}
	b.room.running.Add(1)
	return nil
}

func (b *backend) full(why string) error {
	b.counts.full.Add(1)
	e := call.Errorf(call.Exhausted, "the backend %q behind this %s; try again in a moment", b.name, why)
	e.RetryAfter = time.Second
	return e
}

func (b *backend) away(wait time.Duration) error {
	e := call.Errorf(call.Unavailable, "the backend %q behind this is failing; it is tried again in a moment", b.name)
	e.RetryAfter = max(wait, time.Second)
	return e
}

// Status is how a backend is.
type Status struct {
	Name    string `json:"name"`
	Breaker string `json:"breaker"` // closed, half-open or open; the worst if there are several
	Running int64  `json:"running"` // calls
	Queued  int64  `json:"queued"`
	Retries int64  `json:"retries"` // attempts after the first, so far
	Full    int64  `json:"refused_full"`
	Open    int64  `json:"refused_open"`

	State int64 `json:"-"` // of the breaker: 0 closed, 1 half-open, 2 open
}

// Status returns how every backend is now, in the order in which they were given.
func (r *Resilience) Status() []Status {
	all := make([]Status, 0, len(r.names))
	for _, name := range r.names {
		b := r.backends[name]
		state := b.breakers.worst()
		all = append(all, Status{
			Name: name, Breaker: stateNames[state], State: state, Running: b.room.running.Load(), Queued: b.room.queued.Load(),
			Retries: b.counts.retries.Load(), Full: b.counts.full.Load(), Open: b.counts.open.Load(),
		})
	}
	return all
}
