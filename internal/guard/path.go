// Package guard is the way of a call: which steps it takes, in which order, and where it ends.
//
// Start reading at [Path]; it is the order and nothing else. Each step lives in its own folder
// below this one. A step enters the path with its guard: there are no empty ones.
package guard

import (
	"fmt"
	"slices"

	"newel.dev/newel/call"
)

// A Set holds one guard per step.
type Set struct {
	Observe      call.Guard
	Authenticate call.Guard
	Admit        call.Guard
	Resolve      call.Guard
	Validate     call.Guard
	Authorize    call.Guard
	Approve      call.Guard
	Task         call.Guard
	Effect       call.Guard
	Cache        call.Guard
	Bound        call.Guard
	Resilience   call.Guard
}

// A Step is one named step of the path. Its name is the span, the metric label and the entry in
// the record of a refused call.
type Step struct {
	Name     string
	Guard    call.Guard
	Optional bool
}

// optional steps may be absent: approve, because effect refuses what needs an approval and has none; cache,
// because without it every call is made.
const optional = true

// required is written out at every step, so that an optional one stands out.
const required = false

// Path is what happens to every call, of every kind, from every door.
//
// Read down for the way in. Read up for the way out: a result is bounded, and only the bounded
// result is stored, replayed, recorded and sent. Nothing changes a call after the door.
func Path(g Set) []Step {
	return []Step{
		{"observe", g.Observe, required},           // one record, one span; panics become errors
		{"authenticate", g.Authenticate, required}, // who: sets Principal
		{"admit", g.Admit, required},               // concurrency, queue, streams, deadline
		{"resolve", g.Resolve, required},           // what, as the catalog has it: sets Target
		{"validate", g.Validate, required},         // arguments against Target's schema; never changes them
		{"authorize", g.Authorize, required},       // policy over principal, target and valid arguments
		{"approve", g.Approve, optional},           // waits for a person, where the policy wants one
		{"task", g.Task, required},                 // a call that takes long goes on later: made durably, run by workers
		{"effect", g.Effect, required},             // idempotency, intent and outcome: the durable line
		{"cache", g.Cache, optional},               // what only reads may be answered from before
		{"bound", g.Bound, required},               // size and shape of the result
		{"resilience", g.Resilience, required},     // the backend's share, its breaker, retries where they do no harm
	}
}

// Compile nests the steps around end. It fails if a required step has no guard: "if configured"
// is how gateways fail open.
func Compile(path []Step, end call.Handler) (call.Handler, error) {
	h := end
	for _, s := range slices.Backward(path) {
		switch {
		case s.Guard != nil:
			h = named(s.Name, s.Guard)(h)
		case !s.Optional:
			return nil, fmt.Errorf("the path has no guard for its required step %q", s.Name)
		}
	}
	return h, nil
}
