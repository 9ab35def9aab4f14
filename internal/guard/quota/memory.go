package quota

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"sync"
	"time"

	"newel.dev/newel/call"
)

// Kind is how a claim is counted.
type Kind uint8

// The kinds.
const (
	KindRate       Kind = iota // by the generic cell rate algorithm: Limit at once, then one in Every
	KindConcurrent             // Limit at once; one that is not given back counts for Every
	KindBudget                 // Limit until Until
)

// A Claim is what one call wants of one limit.
type Claim struct {
	Key    string
	Kind   Kind
	Limit  int64
	Every  time.Duration // rate: between calls; concurrent: lease
	Amount int64         // 0: there only has to be something left
	Until  time.Time     // of a budget
	ID     string        // of a concurrent call
	What   string        // of a budget

	whole int64 // limit of a budget, for tools that are critical
	local bool  // taken from this node's own limits
}

// An Outcome says what became of claims.
type Outcome struct {
	Refused    int // index of the claim that there is no room for, or -1
	RetryAfter time.Duration
}

// A Store counts. It is safe for concurrent use. Its errors mean that nobody knows: they are not
// taken for a yes.
type Store interface {
	// Take takes all claims or none.
	Take(ctx context.Context, now time.Time, claims []Claim) (Outcome, error)
	// Settle gives concurrent calls back, and adds to budgets what was used, over their limit if
	// need be. It returns the sums of budgets.
	Settle(ctx context.Context, now time.Time, claims []Claim) ([]int64, error)
}

// A Memory is the Store of one process. It is exact and forgets with the process.
type Memory struct {
	mu     sync.Mutex
	counts map[string]*count
	swept  time.Time
}

// count is one limit's state.
type count struct {
	at   time.Time // rate: theoretical arrival; budget: end of the window
	sum  int64
	held map[string]time.Time // concurrent calls, until when
}

// Bounds of a Memory.
const (
	maxCounts  = 200_000
	sweepEvery = 10 * time.Second
)

var _ Store = (*Memory)(nil)

// NewMemory returns an empty store.
func NewMemory() *Memory { return &Memory{counts: map[string]*count{}} }

// Take implements Store.
func (m *Memory) Take(_ context.Context, now time.Time, claims []Claim) (Outcome, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.sweep(now)
	if len(m.counts)+len(claims) > maxCounts {
		return Outcome{}, call.Errorf(call.Exhausted, "too many callers at once are counted; try again in a moment")
	}
	for i := range claims {
		if wait, ok := m.room(now, &claims[i]); !ok {
			return Outcome{Refused: i, RetryAfter: wait}, nil
		}
	}
	for i := range claims {
		m.add(now, &claims[i])
	}
	return Outcome{Refused: -1}, nil
}

// room reports whether a claim fits, and if not, when to try again.
func (m *Memory) room(now time.Time, cl *Claim) (time.Duration, bool) {
	c := m.counts[cl.Key]
	switch cl.Kind {
	case KindRate:
		if c == nil {
			return 0, cl.Amount <= cl.Limit
		}
		// The bucket is as far ahead of now as calls were taken before their time.
		wait := c.at.Sub(now) - cl.Every*time.Duration(cl.Limit-cl.Amount)
		return wait, wait <= 0
	case KindConcurrent:
		if c == nil {
			return 0, true
		}
		for id, until := range c.held {
			if !now.Before(until) {
				delete(c.held, id)
			}
		}
		return time.Second, int64(len(c.held))+cl.Amount <= cl.Limit
	default:
		sum := int64(0)
		if c != nil && now.Before(c.at) {
			sum = c.sum
		}
		return cl.Until.Sub(now), sum+max(cl.Amount, 1) <= cl.Limit
	}
}

func (m *Memory) add(now time.Time, cl *Claim) int64 {
	c := m.counts[cl.Key]
	if c == nil {
		c = &count{}
		m.counts[cl.Key] = c
	}
	switch cl.Kind {
	case KindRate:
		if c.at.Before(now) {
			c.at = now
		}
		c.at = c.at.Add(cl.Every * time.Duration(cl.Amount))
	case KindConcurrent:
		if c.held == nil {
			c.held = map[string]time.Time{}
		}
		c.held[cl.ID] = now.Add(cl.Every)
	default:
		if !now.Before(c.at) {
			c.sum = 0
		}
		c.at = cl.Until
		c.sum += cl.Amount
	}
	return c.sum
}

// Settle implements Store.
func (m *Memory) Settle(_ context.Context, now time.Time, claims []Claim) ([]int64, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	sums := make([]int64, len(claims))
	for i := range claims {
		cl := &claims[i]
		if cl.Kind != KindConcurrent {
			sums[i] = m.add(now, cl)
		} else if c := m.counts[cl.Key]; c != nil {
			if delete(c.held, cl.ID); len(c.held) == 0 {
				delete(m.counts, cl.Key)
			}
		}
	}
	return sums, nil
}

// sweep forgets what no longer matters.
func (m *Memory) sweep(now time.Time) {
	if now.Sub(m.swept) < sweepEvery {
		return
	}
	m.swept = now
	for key, c := range m.counts {
		for id, until := range c.held {
			if !now.Before(until) {
				delete(c.held, id)
			}
		}
		if len(c.held) == 0 && !now.Before(c.at) {
			delete(m.counts, key)
		}
	}
}

func hash(b []byte) string {
	sum := sha256.Sum256(b)
	return base64.RawURLEncoding.EncodeToString(sum[:])[:32]
}
