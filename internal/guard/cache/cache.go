// Package cache answers calls that only read from what was answered before, where the operator says
// so.
//
// Start reading at [Cache.Guard]. It stands behind policy and audit: whoever asks is asked for anew,
// and every call is recorded. A result is kept for whom the rule says, by default for the caller who
// got it alone; callers who ask the same at the same time wait for one answer.
//
// Refuses: nothing. Needs: memory, of which it takes a bounded part; the least recently used goes
// first. Fails: never; an error of the first caller is that of all who wait with it. Records: that a
// call was answered from here. Costs: a hash of the arguments.
package cache

import (
	"container/list"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync"
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
	RefreshOn []string      // names of tools whose calls make what is kept old; * stands for any text
}

// Options configure a Cache. Zero means the default in brackets.
type Options struct {
	Rules    []Rule
	MaxBytes int              // of all results [64 MiB]
	MaxEntry int              // of one result; larger ones are not kept [1 MiB]
	Now      func() time.Time // default: time.Now
}

// A Cache keeps results. It is safe for concurrent use.
type Cache struct {
	o Options

	mu      sync.Mutex
	entries map[key]*list.Element
	used    *list.List // of *entry, the most recently used first
	bytes   int
	flights map[key]*flight
	old     []uint64 // by rule: how often its results were made old
}

type key [sha256.Size]byte

type entry struct {
	key    key
	rule   int
	round  uint64 // of old, when it was asked for
	result *call.Result
	tokens int
	bytes  int
	until  time.Time
}

// flight is one call that others wait for.
type flight struct {
	done   chan struct{}
	result *call.Result
	event  call.Event
	err    error
}

// overhead is what an entry takes beside its result, in bytes.
const overhead = 512

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
	return &Cache{o: o, entries: map[key]*list.Element{}, used: list.New(), flights: map[key]*flight{}, old: make([]uint64, len(o.Rules))}, nil
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

// Guard returns the guard for one server.
func (c *Cache) Guard(server string) call.Guard {
	return func(next call.Handler) call.Handler {
		return func(ctx context.Context, cl *call.Call) (*call.Result, error) {
			if len(c.o.Rules) == 0 || cl.Target == nil || cl.Kind != call.Tool && cl.Kind != call.Resource {
				return next(ctx, cl)
			}
			if cl.Kind == call.Tool && cl.Target.Effect != call.Read {
				defer c.refresh(cl.Name) // also if it fails: it may have done something
				return next(ctx, cl)
			}
			i := slices.IndexFunc(c.o.Rules, func(r Rule) bool { return pattern.Any(r.Names, cl.Name) })
			if i < 0 || cl.Resume != "" {
				return next(ctx, cl)
			}
			k, ok := c.key(server, i, cl)
			if !ok {
				return next(ctx, cl)
			}
			return c.answer(ctx, cl, k, i, next)
		}
	}
}

// key is what makes two calls the same. Parts cannot be mistaken for others.
func (c *Cache) key(server string, rule int, cl *call.Call) (key, bool) {
	args := jsontext.Value("{}")
	if len(cl.Args) > 0 {
		args = slices.Clone(cl.Args)
		if args.Canonicalize(jsontext.CanonicalizeRawInts(false), jsontext.CanonicalizeRawFloats(false)) != nil {
			return key{}, false
		}
	}
	p := cl.Principal
	if p == nil {
		p = &call.Principal{}
	}
	who := []string{p.Tenant, p.ID}
	switch c.o.Rules[rule].For {
	case Tenant:
		who = who[:1]
	case Everybody:
		who = nil
	}
	h := sha256.New()
	for _, part := range append([]string{server, cl.Kind.String(), cl.Name, string(args), string(cl.Target.Input)}, who...) {
		h.Write(binary.AppendUvarint(nil, uint64(len(part))))
		h.Write([]byte(part))
	}
	return key(h.Sum(nil)), true
}

// answer returns what is kept, waits for a call that is the same, or makes it.
func (c *Cache) answer(ctx context.Context, cl *call.Call, k key, rule int, next call.Handler) (*call.Result, error) {
	c.mu.Lock()
	if e := c.find(k); e != nil {
		r, tokens := *e.result, e.tokens
		if r.TTL > 0 {
			r.TTL = min(r.TTL, e.until.Sub(c.o.Now()))
		}
		c.mu.Unlock()
		cl.Event.Cached, cl.Event.ResultBytes, cl.Event.Tokens = true, size(&r), tokens
		return &r, nil
	}
	if f := c.flights[k]; f != nil {
		c.mu.Unlock()
		select {
		case <-f.done:
		case <-ctx.Done():
			return nil, call.AsError(ctx.Err())
		}
		if f.result == nil && f.err == nil { // who was first went away, or asked its caller something
			return next(ctx, cl)
		}
		cl.Event.Cached, cl.Event.ResultBytes, cl.Event.Tokens, cl.Event.Paged = true, f.event.ResultBytes, f.event.Tokens, f.event.Paged
		return f.result, f.err
	}
	f := &flight{done: make(chan struct{})}
	c.flights[k] = f
	round := c.old[rule]
	c.mu.Unlock()
	defer func() { // also if it panics: then the others ask themselves
		c.mu.Lock()
		delete(c.flights, k)
		c.mu.Unlock()
		close(f.done)
	}()
	r, err := next(ctx, cl)
	private := cl.Event.Paged && c.o.Rules[rule].For != Caller // it links to what only this caller may read
	if share(err) && !private {
		f.result, f.err, f.event = r, err, cl.Event
	}
	if err == nil && r != nil && !r.IsError && !private {
		c.keep(cl, k, rule, round, r)
	}
	return r, err
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

// find returns what is kept and still good. mu is held.
func (c *Cache) find(k key) *entry {
	el := c.entries[k]
	if el == nil {
		return nil
	}
	e, _ := el.Value.(*entry)
	if !c.o.Now().Before(e.until) || e.round != c.old[e.rule] {
		c.drop(el)
		return nil
	}
	c.used.MoveToFront(el)
	return e
}

func (c *Cache) drop(el *list.Element) {
	e, _ := c.used.Remove(el).(*entry)
	delete(c.entries, e.key)
	c.bytes -= e.bytes
}

func (c *Cache) keep(cl *call.Call, k key, rule int, round uint64, r *call.Result) {
	ttl := c.o.Rules[rule].TTL
	if r.TTL > 0 {
		ttl = min(ttl, r.TTL)
	}
	e := &entry{key: k, rule: rule, round: round, result: r, tokens: cl.Event.Tokens, bytes: size(r) + overhead, until: c.o.Now().Add(ttl)}
	if e.bytes > c.o.MaxEntry+overhead {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if round != c.old[rule] {
		return // something was written while it was read
	}
	if el := c.entries[k]; el != nil {
		c.drop(el)
	}
	c.entries[k] = c.used.PushFront(e)
	for c.bytes += e.bytes; c.bytes > c.o.MaxBytes; {
		c.drop(c.used.Back())
	}
}

// refresh makes old what a call of a tool may have changed.
func (c *Cache) refresh(tool string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i := range c.o.Rules {
		if pattern.Any(c.o.Rules[i].RefreshOn, tool) {
			c.old[i]++
		}
	}
}

// Size returns how many bytes are kept.
func (c *Cache) Size() int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return int64(c.bytes)
}

func size(r *call.Result) int { return len(r.Content) + len(r.Structured) + len(r.Extra) }
