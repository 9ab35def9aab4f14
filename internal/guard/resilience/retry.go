package resilience

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync/atomic"
	"time"

	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
)

// again reports whether a call that failed may be made again. Of Unavailable and Exhausted the
// durable line says that nothing was done, whatever the tool; of an outcome that is not known only
// those may try again whose second run does no harm. What goes on from an earlier round is not made
// again: what it goes on from may be used up.
func (r *Resilience) again(c *call.Call, err error) bool {
	var ask *call.InputRequired
	if c.Resume != "" || errors.As(err, &ask) {
		return false
	}
	switch e := call.AsError(err); e.Code {
	case call.Unavailable, call.Exhausted:
		return e.Retryable
	case call.OutcomeUnknown:
		return c.Kind != call.Tool || c.Target.Effect == call.Read || r.safe(c.Target)
	}
	return false
}

// Pauses before a call is made again grow from the first to the longest. A backend that wants a
// longer one is not asked again: the caller is told instead.
const (
	firstPause   = 100 * time.Millisecond
	longestPause = 2 * time.Second
)

// pause waits before a call is made for the time after n. It returns false, at once, if there is not
// time enough for another attempt as long as the last one, or no budget.
func (b *backend) pause(ctx context.Context, n int, took time.Duration, err error) bool {
	wait := backoff(n, rand.Float64()) //nolint:gosec // nobody gains from guessing it
	if after := call.AsError(err).RetryAfter; after > longestPause {
		return false
	} else if after > 0 {
		wait += after // not before, and not all at the same time
	}
	if deadline, ok := ctx.Deadline(); ok && time.Until(deadline) <= wait+took {
		return false
	}
	if !b.budget.spend() {
		return false
	}
	t := time.NewTimer(wait)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		b.counts.retries.Add(1)
		return true
	}
}

// backoff is a random time up to a bound that doubles (full jitter): callers that failed together do
// not come back together. at is in [0, 1).
func backoff(n int, at float64) time.Duration {
	most := min(firstPause<<min(n-1, 10), longestPause)
	return time.Duration(at * float64(most))
}

// budget bounds retries to a share of calls: when all fail, few come on top. It is a bucket that every
// call fills by the share and every retry empties by one.
type budget struct {
	share int64 // in thousandths of a retry
	left  atomic.Int64
}

// reserve is how many retries there may be at once, in thousandths: with few calls a share is nothing.
const reserve = 10_000

func newBudget(share float64) *budget {
	b := &budget{share: int64(share * 1000)}
	b.left.Store(reserve)
	return b
}

// earn counts a call. While the bucket is full it writes nothing.
func (b *budget) earn() {
	if left := b.left.Load(); left < reserve {
		b.left.CompareAndSwap(left, min(left+b.share, reserve)) // one of two at the same time may be lost
	}
}

func (b *budget) spend() bool {
	for {
		left := b.left.Load()
		if left < 1000 {
			return false
		}
		if b.left.CompareAndSwap(left, left-1000) {
			return true
		}
	}
}

// speaks reports whether anything can go out to a caller before the result.
func speaks(c *call.Call) bool {
	return c.Progress || c.LogLevel != "" || c.Client.ElicitForm || c.Client.ElicitURL || c.Client.Sampling || c.Client.Roots
}

// said is what went out to the caller of one call.
type said struct {
	sink         call.Sink
	asker        call.Asker
	told, asking atomic.Bool
}

func (s *said) anything() bool { return s != nil && (s.told.Load() || s.asking.Load()) }

func (s *said) asked() bool { return s != nil && s.asking.Load() }

// heard is attempts for callers to whom something can go out. Handlers get a copy of the call, whose
// sink and asker tell of that: they may keep it for longer than one attempt.
func (r *Resilience) heard(ctx context.Context, c *call.Call, b *backend, next call.Handler) (*call.Result, error) {
	s := &said{sink: c.Sink, asker: c.Asker}
	mine := *c
	mine.Sink, mine.Asker = s, s
	defer func() { c.Event = mine.Event }()
	return r.attempts(ctx, &mine, b, next, s)
}

// Progress implements call.Sink.
func (s *said) Progress(ctx context.Context, p call.Progress) error {
	s.told.Store(true)
	return s.sink.Progress(ctx, p)
}

// Log implements call.Sink.
func (s *said) Log(ctx context.Context, m call.LogMessage) error {
	s.told.Store(true)
	return s.sink.Log(ctx, m)
}

// Notify implements call.Sink.
func (s *said) Notify(ctx context.Context, n call.Notification) error {
	s.told.Store(true)
	return s.sink.Notify(ctx, n)
}

// CloseStream implements call.StreamCloser, if the caller's sink does.
func (s *said) CloseStream(retry time.Duration) {
	s.told.Store(true)
	if closer, ok := s.sink.(call.StreamCloser); ok {
		closer.CloseStream(retry)
	}
}

// Ask implements call.Asker.
func (s *said) Ask(ctx context.Context, questions ...call.Question) (map[string]jsontext.Value, error) {
	s.asking.Store(true)
	return s.asker.Ask(ctx, questions...)
}
