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
	Sums       []int64 // of budgets, if nothing was refused; by claim
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
	base int64                // of sum: what another store knows of; the rest it has to be told
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
	sums := make([]int64, len(claims))
	for i := range claims {
		sums[i] = m.add(now, &claims[i])
	}
	return Outcome{Refused: -1, Sums: sums}, nil
}

// The following are for a Memory that stands in for another store while that is away.

// mirror remembers what the other store granted: budgets as they are there, and calls of this node
// that run.
func (m *Memory) mirror(now time.Time, claims []Claim, out *Outcome) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.sweep(now)
	for i := range claims {
		cl := &claims[i]
		switch {
		case len(m.counts) >= maxCounts: // the share of what is not known begins at nothing
		case cl.Kind == KindConcurrent && out.Refused < 0:
			m.add(now, cl)
		case cl.Kind == KindBudget && out.Refused < 0:
			m.saw(now, cl, out.Sums[i])
		case cl.Kind == KindBudget && out.Refused == i:
			m.saw(now, cl, cl.Limit)
		}
	}
}

// saw takes over the sum of a budget; what the other store has not been told is added.
func (m *Memory) saw(now time.Time, cl *Claim, sum int64) {
	c := m.counts[cl.Key]
	if c == nil || !now.Before(c.at) {
		c = &count{}
		m.counts[cl.Key] = c
	}
	c.at, c.sum, c.base = cl.Until, sum+c.sum-c.base, sum
}

// untold returns what was used of budgets that the other store has not been told, and takes it for
// told.
func (m *Memory) untold(now time.Time, claims []Claim) []Claim {
	m.mu.Lock()
	defer m.mu.Unlock()
	var out []Claim
	for i := range claims {
		c := m.counts[claims[i].Key]
		if claims[i].Kind != KindBudget || c == nil || !now.Before(c.at) || c.sum == c.base {
			continue
		}
		cl := claims[i]
		cl.Amount = c.sum - c.base
		c.base = c.sum
		out = append(out, cl)
	}
	return out
}

// keep has claims told again that could not be.
func (m *Memory) keep(claims []Claim) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for i := range claims {
		if c := m.counts[claims[i].Key]; c != nil {
			c.base -= claims[i].Amount
		}
	}
}

// share lowers limits to a share of what is left of them.
func (m *Memory) share(now time.Time, claims []Claim, share float64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for i := range claims {
		cl := &claims[i]
		cl.local = true
		base := int64(0)
		if c := m.counts[cl.Key]; c != nil && cl.Kind == KindBudget && now.Before(c.at) {
			base = c.base
		}
		if left := cl.Limit - base; left > 0 {
			cl.Limit = base + max(1, int64(float64(left)*share))
		}
		if cl.Kind == KindRate {
			cl.Every = time.Duration(float64(cl.Every) / share)
		}
	}
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
			c.sum, c.base = 0, 0
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
