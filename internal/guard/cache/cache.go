// Package cache answers calls that only read from what was answered before, where the operator says
// so.
//
// Start reading at [Cache.Guard]; key.go says when two calls are the same, entries.go keeps what is
// good, shared.go is what nodes have in common. It stands behind policy and audit: whoever asks is
// asked for anew, and every call is recorded. A result is kept for whom the rule says, by default for
// the caller who got it alone, and never for more people than it can be good for: see
// [call.Dependence] and [call.Result.Private]. Callers who ask the same at the same time wait for one
// answer.
//
// Refuses: nothing. Needs: memory, of which it takes a bounded part; the least recently used goes
// first. Fails: never; an error of the first caller is that of all who wait with it, and without what
// nodes share a node goes by itself. Records: that a call was answered from here. Costs: a hash of the
// arguments, and one question to Redis where nodes share.
package cache

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/pattern"
)

// Who a result is kept for.
const (
	Caller    = "caller"
	Tenant    = "tenant"
	Everybody = "everybody"
)

// A Rule says of which tools and resources results are kept.
type Rule struct {
	Names     []string      // of tools, or URIs; * stands for any text
	TTL       time.Duration // for how long; a result that says less is kept for less
	For       string        // Caller, Tenant or Everybody [Caller]
	RefreshOn []string      // names of tools whose calls, and URIs of resources whose updates, make what is kept old; * stands for any text
}

// Options configure a Cache. Zero means the default in brackets.
type Options struct {
	Rules    []Rule
	MaxBytes int              // of all results [64 MiB]
	MaxEntry int              // of one result; larger ones are not kept [1 MiB]
	Shared   *Shared          // what nodes share; nil: nothing is
	Stats    *Stats           // what counts, for caches that follow each other; nil: one of its own
	Now      func() time.Time // default: time.Now
}

// Stats count what caches of one process did. The zero Stats is ready to use.
type Stats struct {
	Hits      atomic.Int64 // answered from here, or together with another call
	Misses    atomic.Int64 // asked the backend
	Evictions atomic.Int64 // results that went for room
	Refreshes atomic.Int64 // results of a rule, or of a resource, were made old
}

// A Cache keeps results. It is safe for concurrent use.
type Cache struct {
	o Options

	mu      sync.Mutex
	entries map[key]*list.Element
	named   map[string]map[key]struct{} // of entries: those of each resource
	used    *list.List                  // of *entry, the most recently used first
	bytes   int
	flights map[key]*flight
	old     []uint64           // by rule: how often its results were made old
	rounds  []string           // by rule: as of which round of all nodes they are
	sources map[string]*source // by prefix: resources of which answers of tools are made
}

// source is resources with one prefix.
type source struct {
	changes uint64
	rules   map[int]struct{} // that keep answers made of them
}

// flight is one call that others wait for.
type flight struct {
	done    chan struct{}
	name    string // of the resource
	stale   bool   // it was updated meanwhile; guarded by Cache.mu
	private bool   // the answer is for one caller alone
	result  *call.Result
	event   call.Event
	err     error
}

// maxFlights bounds how many answers are waited for at once; more calls are made for themselves.
const maxFlights = 4096

// New checks the options.
func New(o Options) (*Cache, error) {
	if o.MaxBytes == 0 {
		o.MaxBytes = 64 << 20
	}
	if o.MaxEntry == 0 {
		o.MaxEntry = 1 << 20
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Stats == nil {
		o.Stats = &Stats{}
	}
	if o.MaxBytes < 0 || o.MaxEntry < 0 {
		return nil, errors.New("cache: sizes must not be below zero")
	}
	for i := range o.Rules {
		r := &o.Rules[i]
		if r.For == "" {
			r.For = Caller
		}
		if err := r.Check(); err != nil {
			return nil, fmt.Errorf("cache: rule %d: %w", i+1, err)
		}
	}
	if err := o.Shared.begin(o.Rules); err != nil {
		return nil, err
	}
	return &Cache{
		o: o, entries: map[key]*list.Element{}, named: map[string]map[key]struct{}{}, used: list.New(),
		flights: map[key]*flight{}, old: make([]uint64, len(o.Rules)), rounds: make([]string, len(o.Rules)), sources: map[string]*source{},
	}, nil
}

// Check reports what about a rule makes no sense.
func (r *Rule) Check() error {
	switch {
	case len(r.Names) == 0:
		return errors.New("it names nothing")
	case r.TTL <= 0:
		return errors.New("the time for which results are kept must be above zero")
	case !slices.Contains([]string{"", Caller, Tenant, Everybody}, r.For):
		return fmt.Errorf("results are kept for the caller, the tenant or everybody, not %q", r.For)
	}
	return pattern.Check(slices.Concat(r.Names, r.RefreshOn)...)
}

// Stats returns what counts.
func (c *Cache) Stats() *Stats { return c.o.Stats }

// Guard returns the guard for one server.
func (c *Cache) Guard(server string) call.Guard {
	return func(next call.Handler) call.Handler {
		return func(ctx context.Context, cl *call.Call) (*call.Result, error) {
			if len(c.o.Rules) == 0 || cl.Target == nil || cl.Kind != call.Tool && cl.Kind != call.Resource {
				return next(ctx, cl)
			}
			if cl.Kind == call.Tool && cl.Target.Effect != call.Read {
				defer c.called(ctx, cl.Name) // also if it fails: it may have done something
				return next(ctx, cl)
			}
			i := slices.IndexFunc(c.o.Rules, func(r Rule) bool { return pattern.Any(r.Names, cl.Name) })
			if i < 0 || cl.Resume != "" || cl.TaskID != "" {
				return next(ctx, cl)
			}
			q, ok := c.question(server, i, cl)
			if !ok {
				return next(ctx, cl)
			}
			return c.answer(ctx, cl, q, next)
		}
	}
}

// answer returns what is kept, waits for a call that is the same, or makes it.
func (c *Cache) answer(ctx context.Context, cl *call.Call, q *question, next call.Handler) (*call.Result, error) {
	from, round := c.begin(ctx, q)
	k := q.wide
	for {
		c.mu.Lock()
		if e := c.find(k); e != nil {
			if e.result == nil { // what is asked is answered for each caller alone
				c.mu.Unlock()
				k = q.own
				continue
			}
			r, tokens := c.given(e)
			c.mu.Unlock()
			c.hit(cl, r, tokens)
			return r, nil
		}
		f := c.flights[k]
		if f == nil {
			break
		}
		c.mu.Unlock()
		select {
		case <-f.done:
		case <-ctx.Done():
			return nil, call.AsError(ctx.Err())
		}
		switch {
		case f.private && k != q.own:
			k = q.own
			continue
		case f.result == nil && f.err == nil: // who was first went away, or asked its caller something
			c.o.Stats.Misses.Add(1)
			return next(ctx, cl)
		}
		c.o.Stats.Hits.Add(1)
		cl.Event.Cached, cl.Event.ResultBytes, cl.Event.Tokens, cl.Event.Paged = true, f.event.ResultBytes, f.event.Tokens, f.event.Paged
		return f.result, f.err
	}
	if len(c.flights) >= maxFlights {
		c.mu.Unlock()
		c.o.Stats.Misses.Add(1)
		return next(ctx, cl)
	}
	f := &flight{done: make(chan struct{}), name: q.resource}
	c.flights[k] = f
	c.mu.Unlock()
	defer func() { // also if it panics: then the others ask themselves
		c.mu.Lock()
		if c.flights[k] == f {
			delete(c.flights, k)
		}
		c.mu.Unlock()
		close(f.done)
	}()
	if e := c.fetch(ctx, q.rule, k, round); e != nil {
		if e.from, e.resource, e.reads = from, q.resource, q.reads; c.keep(f, e) {
			r, tokens := c.given(e)
			c.hit(cl, r, tokens)
			f.result, f.event = r, cl.Event
			return r, nil
		}
	}
	c.o.Stats.Misses.Add(1)
	asker := &listener{Asker: cl.Asker}
	cl.Asker = asker
	defer func() { cl.Asker = asker.Asker }()
	r, err := next(ctx, cl)
	if asker.asked.Load() {
		return r, err // it is made of what this caller answered
	}
	// A paged one links to what only this caller may read.
	f.private = k != q.own && (cl.Event.Paged || r != nil && r.Private)
	if share(err) && !f.private {
		f.result, f.err, f.event = r, err, cl.Event
	}
	if err == nil && r != nil && !r.IsError {
		c.put(ctx, f, q, k, from, round, cl, r)
	}
	return r, err
}

// begin returns as of when the answer to a question is, here and for other nodes. What is made old
// after that makes the answer old.
func (c *Cache) begin(ctx context.Context, q *question) (from moment, round string) {
	other := false
	for range 3 { // what another node made old meanwhile is older than the question
		c.mu.Lock()
		from = c.since(q)
		c.mu.Unlock()
		if round, other = c.round(ctx, q.rule); !other {
			break
		}
	}
	return from, round
}

// hit records that a call was answered from here.
func (c *Cache) hit(cl *call.Call, r *call.Result, tokens int) {
	c.o.Stats.Hits.Add(1)
	cl.Event.Cached, cl.Event.ResultBytes, cl.Event.Tokens = true, size(r), tokens
}

// put keeps what was answered, here and for other nodes. What turned out to be for one caller alone
// is kept for that one, and a mark for all others that they have to ask for themselves.
func (c *Cache) put(ctx context.Context, f *flight, q *question, k key, from moment, round string, cl *call.Call, r *call.Result) {
	ttl := c.o.Rules[q.rule].TTL
	if r.TTL < 0 {
		return // good for this moment only
	}
	if r.TTL > 0 {
		ttl = min(ttl, r.TTL)
	}
	now := c.o.Now()
	e := &entry{key: k, from: from, resource: q.resource, reads: q.reads, result: r, tokens: cl.Event.Tokens, until: now.Add(ttl)}
	if size(r) > c.o.MaxEntry {
		return
	}
	if f.private {
		mark := *e
		mark.result, mark.tokens = nil, 0
		c.keep(f, &mark)
		e.key = q.own
	}
	if c.keep(f, e) {
		c.offer(ctx, e, round, ttl)
	}
}

// listener is an asker that knows whether anything was asked.
type listener struct {
	call.Asker
	asked atomic.Bool
}

// Ask implements call.Asker.
func (l *listener) Ask(ctx context.Context, questions ...call.Question) (map[string]jsontext.Value, error) {
	l.asked.Store(true)
	return l.Asker.Ask(ctx, questions...)
}

// share reports whether an outcome is that of all who ask the same: not if it is about who asked.
func share(err error) bool {
	if err == nil {
		return true
	}
	var ask *call.InputRequired
	if errors.As(err, &ask) {
		return false
	}
	code := call.AsError(err).Code
	return code != call.Canceled && code != call.Timeout && code != call.Internal
}
