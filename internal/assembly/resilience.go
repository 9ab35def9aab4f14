package assembly

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/guard/admit"
	"newel.dev/newel/internal/guard/observe"
	"newel.dev/newel/internal/guard/resilience"
)

// Bounds are those of one backend; see the fields for units and defaults.
type Bounds = resilience.Bounds

// Resilience bounds what backends get and how they may fail. Zero means the default.
type Resilience struct {
	Bounds                     // of every backend; Concurrent by default a quarter of Limits.ConcurrentCalls, or all for an only backend
	Backends map[string]Bounds // of some, by name: what they leave open is as for every backend
}

// bounded is a backend with bounds of its own, which the operator's go before.
type bounded interface {
	Bounds() (calls int, timeout time.Duration)
}

// apart is a backend whose capabilities have nothing in common: one that fails says nothing of others.
type apart interface{ Apart() bool }

// openResilience makes the last step of the path. What is known of a backend that before has too
// stays known.
func (h *House) openResilience(before *House) error {
	o := &h.opts
	named := func(name string) bool {
		return slices.ContainsFunc(h.backends, func(b call.Backend) bool { return b.Name() == name })
	}
	for name := range o.Resilience.Backends {
		if !named(name) {
			return fmt.Errorf("resilience: there is no backend %q", name)
		}
	}
	share := Bounds{Concurrent: o.Limits.ConcurrentCalls}
	if share.Concurrent == 0 {
		share.Concurrent = admit.DefaultConcurrent
	}
	if len(o.Backends) > 1 { // one that hangs leaves places for the others
		share.Concurrent = max(1, share.Concurrent/4)
	}
	var all []resilience.Backend
	for _, b := range h.backends {
		bounds := o.Resilience.Backends[b.Name()]
		if own, ok := b.(bounded); ok {
			calls, timeout := own.Bounds()
			bounds = bounds.Or(Bounds{Concurrent: calls, Timeout: timeout})
		}
		one := resilience.Backend{Name: b.Name(), Bounds: bounds.Or(o.Resilience.Bounds).Or(share)}
		if a, ok := b.(apart); ok {
			one.Apart = a.Apart()
		}
		one.Same = before != nil && slices.ContainsFunc(before.backends, func(old call.Backend) bool { return same(old, b) })
		all = append(all, one)
	}
	var known *resilience.Resilience
	if before != nil {
		known = before.resilience
	}
	var err error
	h.resilience, err = resilience.New(resilience.Options{Backends: all, NotCritical: o.Limits.NotCritical, Safe: func(t *call.Capability) bool { return h.effects.Safe(t) }}, known)
	return err
}

// Backends returns how every backend is now.
func (h *House) Backends() []resilience.Status { return h.resilience.Status() }

// backendMetrics publishes how backends are, by their names.
func backendMetrics(o *observe.Observer, current func() *House) error {
	each := func(read func(*resilience.Status) int64) func(func(string, int64)) {
		return func(yield func(string, int64)) {
			h := current()
			if h == nil {
				return
			}
			for _, s := range h.Backends() {
				yield(s.Name, read(&s))
			}
		}
	}
	const label = "newel.backend"
	return errors.Join(
		o.GaugeOf("newel.backend.breaker", "State of the breaker of a backend: 0 closed, 1 half-open, 2 open.", label, each(func(s *resilience.Status) int64 { return s.State })),
		o.GaugeOf("newel.backend.running", "Calls that a backend has.", label, each(func(s *resilience.Status) int64 { return s.Running })),
		o.GaugeOf("newel.backend.queued", "Calls that wait for a place at a backend.", label, each(func(s *resilience.Status) int64 { return s.Queued })),
		o.CounterOf("newel.backend.retries", "Attempts after the first.", label, each(func(s *resilience.Status) int64 { return s.Retries })),
		o.CounterOf("newel.backend.full", "Calls refused because a backend had no place for them.", label, each(func(s *resilience.Status) int64 { return s.Full })),
		o.CounterOf("newel.backend.open", "Calls refused because the breaker of a backend was open.", label, each(func(s *resilience.Status) int64 { return s.Open })))
}
