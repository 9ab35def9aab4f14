package resilience

import (
	"cmp"
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"github.com/failsafe-go/failsafe-go/circuitbreaker"

	"newel.dev/newel/call"
)

// breaker opens after some failures in a row. After a while one call is let through: if that goes
// well it closes, otherwise it opens again.
type breaker struct {
	circuit circuitbreaker.CircuitBreaker[any]
	// troubled says that there was a failure since the last success. While there was none the circuit
	// is closed, and need not be asked nor told.
	troubled atomic.Bool
	mu       sync.Mutex // held while troubled changes
}

func newBreaker(failures int, delay time.Duration) *breaker {
	return &breaker{circuit: circuitbreaker.NewBuilder[any]().
		WithFailureThreshold(uint(failures)). //nolint:gosec // checked: above zero
		WithSuccessThreshold(1).
		WithDelay(delay).Build()}
}

// resting returns for how long no call is let through, or 0.
func (b *breaker) resting() time.Duration {
	if !b.troubled.Load() {
		return 0
	}
	return b.circuit.RemainingDelay()
}

// enter reports whether a call is let through; then record is called when it has ended.
func (b *breaker) enter() bool { return !b.troubled.Load() || b.circuit.TryAcquirePermit() }

// How an attempt went, as far as the backend is concerned.
type went uint8

const (
	nothing went = iota // it says nothing of the backend
	good
	bad
)

func (b *breaker) record(w went) {
	if w != bad && !b.troubled.Load() {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case w == good:
		b.circuit.RecordSuccess()
	case w == bad, b.circuit.IsHalfOpen(): // who tried and found nothing out leaves it to somebody later
		b.circuit.RecordFailure()
	}
	b.troubled.Store(w == bad || w == nothing || !b.circuit.IsClosed())
}

// verdict says what an error means. The backend is at fault if it cannot be reached, does not answer
// in time, or breaks off; not if it says no, nor if the caller goes away.
func verdict(ctx context.Context, err error, said *said) went {
	var ask *call.InputRequired
	if errors.As(err, &ask) {
		return good // it wants to know something: it is there
	}
	late := errors.Is(ctx.Err(), context.DeadlineExceeded) || errors.Is(err, context.DeadlineExceeded)
	e := call.AsError(err)
	switch e.Code {
	case call.Unavailable:
		if e.Retryable {
			return bad
		}
		return good // it is there, and does not want us: that does not pass
	case call.OutcomeUnknown:
		return bad
	case call.Timeout, call.Internal: // a driver may have its own words for a time that is over
		switch {
		case late && !said.asked():
			return bad
		case late || e.Code == call.Internal:
			return nothing // people take their time; a bug is ours
		}
		return good // it gave up by itself
	case call.Canceled, call.Exhausted:
		return nothing
	}
	return good
}

// breakers are those of a backend: one, or one for each capability.
type breakers struct {
	apart    bool
	failures int
	delay    time.Duration
	one      *breaker

	mu   sync.RWMutex // guards what is below
	each map[string]*breaker
}

func newBreakers(failures int, delay time.Duration, apart bool) *breakers {
	return &breakers{apart: apart, failures: failures, delay: delay, one: newBreaker(failures, delay), each: map[string]*breaker{}}
}

// of returns the breaker of a capability. Their number is that of what was published.
func (s *breakers) of(t *call.Capability) *breaker {
	if !s.apart {
		return s.one
	}
	name := cmp.Or(t.URI, t.Template, t.Name) // a name has no colon or brace
	s.mu.RLock()
	b := s.each[name]
	s.mu.RUnlock()
	if b != nil {
		return b
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if b = s.each[name]; b == nil {
		b = newBreaker(s.failures, s.delay)
		s.each[name] = b
	}
	return b
}

var stateNames = [...]string{"closed", "half-open", "open"}

// worst returns the state of the breaker that is least closed, as an index of stateNames.
func (s *breakers) worst() int64 {
	worst := s.one.state()
	s.mu.RLock()
	defer s.mu.RUnlock()
	for _, b := range s.each {
		worst = max(worst, b.state())
	}
	return worst
}

func (b *breaker) state() int64 {
	switch b.circuit.State() {
	case circuitbreaker.OpenState:
		return 2
	case circuitbreaker.HalfOpenState:
		return 1
	case circuitbreaker.ClosedState:
	}
	return 0
}
