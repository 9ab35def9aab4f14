// Package quota bounds how much each tenant, caller, client and tool may use: calls in a time, calls
// at once, and budgets of calls, tokens of results and cost units.
//
// Start reading at [Limiter.Guard]. A [Rule] says what is counted together; a [Store] counts: in
// this process (see memory.go), or for all nodes. What one call takes of all its limits it takes
// in one step, or nothing.
//
// Refuses: calls over a limit, as Exhausted, with the time after which there is room. Needs: the
// store. Fails: while the store is away, to limits of its own that are a share of the real ones; never
// to none. Records: alerts, once for each limit and window. Costs: a map access and a lock for each
// limit, or one round trip to the store.
package quota

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/pattern"
)

// A Rule is a limit. All that is given of Rate, Concurrent and Budget has to hold.
type Rule struct {
	Name    string
	Per     []string // what is counted together: of one tenant, principal, client, tool; empty: all calls together
	Tools   []string // names of tools, prompts and resources it is about; * stands for any text; empty: all calls
	Tenants []string // empty: all

	Rate       Rate
	Burst      int // calls that may come at once [the calls of one second, at least 1]
	Concurrent int // calls that run at once; 0: no limit
	Budget     Budget

	AlertAt   float64 // share of a budget at which the operator is told, such as 0.8; 0: never
	DegradeAt float64 // share of a budget from which calls of tools that are not critical are refused; 0: never
}

// Rate is calls in a time. The zero Rate is no limit.
type Rate struct {
	Calls int
	In    time.Duration
}

// ParseRate reads a rate such as 20/s, 600/m or 1000/h.
func ParseRate(s string) (Rate, error) {
	calls, unit, _ := strings.Cut(s, "/")
	in := map[string]time.Duration{"s": time.Second, "m": time.Minute, "h": time.Hour}[unit]
	n, err := strconv.Atoi(calls)
	if err != nil || n <= 0 || n > 1_000_000 || in == 0 {
		return Rate{}, fmt.Errorf("%q is not a rate; write calls per second, minute or hour, such as 20/s, 600/m or 1000/h", s)
	}
	return Rate{Calls: n, In: in}, nil
}

// Budget is what may be used in a window. Zero is no limit.
type Budget struct {
	Calls  int64
	Tokens int64 // estimated, of results
	Cost   int64 // units, see Options.Costs
	Every  Window
}

func (b *Budget) empty() bool { return b.Calls == 0 && b.Tokens == 0 && b.Cost == 0 }

// A Window is how long a budget lasts; windows begin at full hours, days and months of UTC.
type Window string

// The windows.
const (
	Hour  Window = "hour"
	Day   Window = "day"
	Month Window = "month"
)

// of returns when the window that t is in begins and ends.
func (w Window) of(t time.Time) (from, to time.Time) {
	t = t.UTC()
	switch w {
	case Hour:
		from = t.Truncate(time.Hour)
		return from, from.Add(time.Hour)
	case Month:
		from = time.Date(t.Year(), t.Month(), 1, 0, 0, 0, 0, time.UTC)
		return from, from.AddDate(0, 1, 0)
	}
	from = time.Date(t.Year(), t.Month(), t.Day(), 0, 0, 0, 0, time.UTC)
	return from, from.AddDate(0, 0, 1)
}

// Cost is how many units a call of a tool costs. A call that no Cost is about costs one.
type Cost struct {
	Tools []string
	Units int64
}

// Options configure a Limiter. Store is required.
type Options struct {
	Rules       []Rule
	Costs       []Cost   // the first that fits counts
	NotCritical []string // names of tools that go first when a budget runs out
	Store       Store
	// Share is how much of each limit this node grants by itself while the store is away [0.5].
	Share float64
	// StoreTimeout bounds one question to the store [100 ms].
	StoreTimeout time.Duration
	Alert        func(ctx context.Context, a Alert) // nil: nobody is told
	Now          func() time.Time                   // default: time.Now
}

// An Alert says that a budget is used up to a share, or that the store is away or back.
type Alert struct {
	Rule  string
	Of    string // what is counted together, such as "principal=…"
	What  string // calls, tokens, cost, or store
	Used  int64
	Limit int64
	Err   error // of the store
}

// A Limiter holds calls to rules. It is safe for concurrent use.
type Limiter struct {
	o        Options
	rules    []rule
	shared   bool    // others count in the store, too
	local    *Memory // grants a share while the store is away; knows what was seen of it
	awayTill atomic.Int64
	alerted  *Memory // once a window
	ids      atomic.Uint64
}

type rule struct {
	Rule
	per   [4]bool // by the index in dimensions
	every time.Duration
	lease time.Duration
}

var dimensions = []string{"tenant", "principal", "client", "tool"}

// Bounds and times.
const (
	awayFor   = time.Second     // how long a store that failed is left alone
	holdLease = 5 * time.Minute // after which a call that nobody ended no longer counts
	maxKey    = 512             // bytes of what is counted together
)

// New checks the options.
func New(o Options) (*Limiter, error) {
	if o.Store == nil {
		return nil, errors.New("quota: Store is required")
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Alert == nil {
		o.Alert = func(context.Context, Alert) {}
	}
	if o.Share == 0 {
		o.Share = 0.5
	}
	if o.Share < 0 || o.Share > 1 {
		return nil, errors.New("quota: Share must be above 0 and at most 1")
	}
	if o.StoreTimeout <= 0 {
		o.StoreTimeout = 100 * time.Millisecond
	}
	_, own := o.Store.(*Memory)
	l := &Limiter{o: o, shared: !own, local: NewMemory(), alerted: NewMemory()}
	names := map[string]bool{}
	for i := range o.Rules {
		r := rule{Rule: o.Rules[i], lease: holdLease}
		if err := r.check(); err != nil {
			return nil, fmt.Errorf("quota %q: %w", r.Name, err)
		}
		if names[r.Name] {
			return nil, fmt.Errorf("quota %q: the name is taken", r.Name)
		}
		names[r.Name] = true
		l.rules = append(l.rules, r)
	}
	for _, c := range o.Costs {
		if c.Units < 0 {
			return nil, fmt.Errorf("the cost of %q is below zero", c.Tools)
		}
	}
	return l, nil
}

// Check reports what about a rule makes no sense.
func (r Rule) Check() error {
	one := rule{Rule: r}
	return one.check()
}

func (r *rule) check() error {
	switch {
	case r.Name == "":
		return errors.New("it needs a name")
	case r.Rate.Calls == 0 && r.Concurrent == 0 && r.Budget.empty():
		return errors.New("it limits nothing: write rate, concurrent or budget")
	case r.Rate.Calls < 0 || r.Concurrent < 0 || r.Burst < 0 || r.Budget.Calls < 0 || r.Budget.Tokens < 0 || r.Budget.Cost < 0:
		return errors.New("a limit cannot be below zero")
	case r.AlertAt < 0 || r.AlertAt > 1 || r.DegradeAt < 0 || r.DegradeAt > 1:
		return errors.New("alert_at and degrade_at are shares between 0 and 1")
	case (r.AlertAt > 0 || r.DegradeAt > 0) && r.Budget.empty():
		return errors.New("alert_at and degrade_at are about a budget, and there is none")
	}
	if err := pattern.Check(r.Tools...); err != nil {
		return err
	}
	for _, p := range r.Per {
		i := slices.Index(dimensions, p)
		if i < 0 {
			return fmt.Errorf("per knows %s, not %q", strings.Join(dimensions, ", "), p)
		}
		r.per[i] = true
	}
	if r.Rate.Calls > 0 {
		r.every = r.Rate.In / time.Duration(r.Rate.Calls)
		if r.Burst == 0 {
			r.Burst = max(1, int(time.Second/r.every))
		}
	}
	if r.Budget.Every == "" {
		r.Budget.Every = Day
	}
	if !slices.Contains([]Window{Hour, Day, Month}, r.Budget.Every) {
		return fmt.Errorf("a budget lasts an hour, a day or a month, not %q", r.Budget.Every)
	}
	return nil
}

// Guard returns the guard that holds calls to the limits. known says whether a name that a caller
// wrote is that of something: what is not shares one count.
func (l *Limiter) Guard(known func(kind call.Kind, name string) bool) call.Guard {
	return func(next call.Handler) call.Handler {
		return func(ctx context.Context, c *call.Call) (*call.Result, error) {
			if c.Kind == call.Discover || len(l.rules) == 0 {
				return next(ctx, c)
			}
			claims, of, err := l.admit(ctx, c, known(c.Kind, c.Name))
			if err != nil {
				return nil, err
			}
			defer l.settle(ctx, c, claims, of)
			return next(ctx, c)
		}
	}
}

// admit claims what a call needs of its limits. The claims that are returned have to be settled.
func (l *Limiter) admit(ctx context.Context, c *call.Call, known bool) ([]Claim, []*rule, error) {
	now := l.o.Now()
	claims, of := l.claims(c, known, now)
	if len(claims) == 0 {
		return nil, nil, nil
	}
	out, err := l.take(ctx, now, claims)
	if err != nil {
		return nil, nil, err
	}
	if out.Refused >= 0 {
		c.Event.Rule = of[out.Refused].Name
		return nil, nil, refusal(of[out.Refused], &claims[out.Refused], out.RetryAfter)
	}
	return claims, of, nil
}

func refusal(r *rule, cl *Claim, after time.Duration) error {
	why := map[Kind]string{KindRate: "too many calls in a short time", KindConcurrent: "too many calls at once", KindBudget: "the budget of " + cl.What + " is used up"}[cl.Kind]
	e := call.Errorf(call.Exhausted, "over the quota %q: %s; try again later", r.Name, why)
	e.RetryAfter = max(after, time.Millisecond)
	return e
}

// claims lists what a call takes, and of which rule each is.
func (l *Limiter) claims(c *call.Call, known bool, now time.Time) ([]Claim, []*rule) {
	var claims []Claim
	var of []*rule
	var id string
	for i := range l.rules {
		r := &l.rules[i]
		if !r.about(c) {
			continue
		}
		key := r.key(c, known)
		if r.every > 0 {
			claims, of = append(claims, Claim{Key: key + "\x00r", Kind: KindRate, Limit: int64(r.Burst), Every: r.every, Amount: 1}), append(of, r)
		}
		if r.Concurrent > 0 {
			if id == "" {
				id = strconv.FormatUint(l.ids.Add(1), 36) + "-" + c.Event.Correlation
			}
			claims, of = append(claims, Claim{Key: key + "\x00c", Kind: KindConcurrent, Limit: int64(r.Concurrent), Amount: 1, Every: r.lease, ID: id}), append(of, r)
		}
		if r.Budget.empty() {
			continue
		}
		from, to := r.Budget.Every.of(now)
		window := strconv.FormatInt(from.Unix(), 36)
		for _, b := range []struct {
			what   string
			limit  int64
			amount int64
		}{{"calls", r.Budget.Calls, 1}, {"tokens", r.Budget.Tokens, 0}, {"cost", r.Budget.Cost, l.cost(c)}} {
			if b.limit == 0 || b.what == "cost" && b.amount == 0 {
				continue
			}
			limit := b.limit
			if r.DegradeAt > 0 && pattern.Any(l.o.NotCritical, c.Name) {
				limit = int64(float64(limit) * r.DegradeAt)
			}
			claims = append(claims, Claim{Key: key + "\x00" + b.what + window, Kind: KindBudget, What: b.what, Limit: limit, whole: b.limit, Amount: b.amount, Until: to})
			of = append(of, r)
		}
	}
	return claims, of
}

func (r *rule) about(c *call.Call) bool {
	if len(r.Tools) > 0 && !pattern.Any(r.Tools, c.Name) {
		return false
	}
	return len(r.Tenants) == 0 || c.Principal != nil && slices.Contains(r.Tenants, c.Principal.Tenant)
}

// key is what a rule counts together. Parts cannot be mistaken for others.
func (r *rule) key(c *call.Call, known bool) string {
	p := c.Principal
	if p == nil {
		p = &call.Principal{}
	}
	name := c.Name
	if !known {
		name = ""
	}
	var b []byte
	b = append(b, r.Name...)
	for i, part := range [4]string{p.Tenant, p.ID, p.Client, name} {
		// An id is unique within its tenant only.
		if r.per[i] || i == 0 && r.per[1] {
			b = strconv.AppendQuote(append(b, 0), part)
		}
	}
	if len(b) > maxKey { // somebody else chose the parts
		b = append(b[:maxKey-32], hash(b)...)
	}
	return string(b)
}

func (l *Limiter) cost(c *call.Call) int64 {
	for _, one := range l.o.Costs {
		if pattern.Any(one.Tools, c.Name) {
			return one.Units
		}
	}
	return 1
}

// take asks the store, and while that is away the limits of this node: a share of what was left when
// the store was last seen.
func (l *Limiter) take(ctx context.Context, now time.Time, claims []Claim) (Outcome, error) {
	if !l.shared {
		return l.o.Store.Take(ctx, now, claims)
	}
	if now.UnixNano() >= l.awayTill.Load() {
		limited, cancel := context.WithTimeout(ctx, l.o.StoreTimeout)
		err := l.tell(limited, now, claims)
		var out Outcome
		if err == nil {
			out, err = l.o.Store.Take(limited, now, claims)
		}
		cancel()
		if err == nil {
			l.local.mirror(now, claims, &out)
			return out, nil
		}
		if ctx.Err() != nil {
			return out, err
		}
		l.awayTill.Store(now.Add(awayFor).UnixNano())
		l.o.Alert(ctx, Alert{What: "store", Err: err})
	}
	l.local.share(now, claims, l.o.Share)
	return l.local.Take(ctx, now, claims)
}

// tell tells the store what was used while it was away.
func (l *Limiter) tell(ctx context.Context, now time.Time, claims []Claim) error {
	untold := l.local.untold(now, claims)
	if len(untold) == 0 {
		return nil
	}
	_, err := l.o.Store.Settle(ctx, now, untold)
	if err != nil {
		l.local.keep(untold)
	}
	return err
}

// settle gives back what was held, counts what was used, and tells of budgets that run out.
func (l *Limiter) settle(ctx context.Context, c *call.Call, claims []Claim, of []*rule) {
	ctx = context.WithoutCancel(ctx)
	now := l.o.Now()
	var used []Claim
	var rules []*rule
	for i := range claims {
		cl := claims[i]
		switch {
		case cl.Kind == KindConcurrent:
		case cl.Kind == KindBudget && cl.What == "tokens":
			cl.Amount = int64(c.Event.Tokens)
		case cl.Kind == KindBudget:
			cl.Amount = 0 // it was taken before; what is asked for is the sum
		default:
			continue
		}
		if cl.Kind == KindBudget && cl.Amount == 0 && of[i].AlertAt == 0 {
			continue
		}
		used, rules = append(used, cl), append(rules, of[i])
	}
	if len(used) == 0 {
		return
	}
	store := l.o.Store
	if used[0].local {
		store = l.local
	}
	limited, cancel := context.WithTimeout(ctx, l.o.StoreTimeout)
	defer cancel()
	sums, err := store.Settle(limited, now, used)
	if l.shared && !used[0].local {
		l.settleLocal(ctx, now, used, sums)
	}
	if err != nil {
		l.awayTill.Store(now.Add(awayFor).UnixNano())
		l.o.Alert(ctx, Alert{What: "store", Err: err})
		return // held calls end with their lease, and the next call is counted by this node
	}
	for i := range used {
		cl := &used[i]
		if cl.Kind != KindBudget || rules[i].AlertAt == 0 || float64(sums[i]) < rules[i].AlertAt*float64(cl.whole) {
			continue
		}
		once := Claim{Key: cl.Key, Kind: KindBudget, Limit: 1, Amount: 1, Until: cl.Until}
		if out, err := l.alerted.Take(ctx, now, []Claim{once}); err == nil && out.Refused < 0 {
			l.o.Alert(ctx, Alert{Rule: rules[i].Name, Of: describe(cl.Key), What: cl.What, Used: sums[i], Limit: cl.whole})
		}
	}
}

// settleLocal has this node's own limits know what became of what the store granted. sums are nil if
// the store does not answer: then it is told later.
func (l *Limiter) settleLocal(ctx context.Context, now time.Time, used []Claim, sums []int64) {
	for i := range used {
		switch cl := &used[i]; {
		case cl.Kind == KindConcurrent || sums == nil:
			_, _ = l.local.Settle(ctx, now, used[i:i+1]) // memory does not fail
		case cl.Kind == KindBudget:
			l.local.mirror(now, used[i:i+1], &Outcome{Refused: -1, Sums: sums[i : i+1]})
		}
	}
}

// describe makes a key readable.
func describe(key string) string {
	parts := strings.Split(key, "\x00")
	return strings.Join(parts[1:len(parts)-1], " ")
}
