package cache

import (
	"container/list"
	"context"
	"strings"
	"time"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/pattern"
)

// entry is one result, or a mark that there is none for all (result is nil).
type entry struct {
	key      key
	from     moment
	resource string // URI, or ""
	reads    string // prefix of resources, or ""
	result   *call.Result
	tokens   int
	until    time.Time
}

// A moment is as of when something was asked.
type moment struct {
	rule    int
	round   uint64 // of Cache.old
	changes uint64 // of the source
}

// overhead is what an entry takes beside its result, in bytes.
const overhead = 768

func (e *entry) bytes() int {
	n := overhead + len(e.resource)
	if e.result != nil {
		n += size(e.result)
	}
	return n
}

func size(r *call.Result) int { return len(r.Content) + len(r.Structured) + len(r.Extra) }

// since returns the moment that is now. mu is held.
func (c *Cache) since(q *question) moment {
	m := moment{rule: q.rule, round: c.old[q.rule]}
	if q.reads != "" {
		s := c.sources[q.reads]
		if s == nil { // as many as tools say, and those come from the configuration
			s = &source{rules: map[int]struct{}{}}
			c.sources[q.reads] = s
		}
		s.rules[q.rule] = struct{}{}
		m.changes = s.changes
	}
	return m
}

// fresh reports whether nothing was made old since it was asked. mu is held.
func (c *Cache) fresh(e *entry) bool {
	if e.reads != "" && c.sources[e.reads].changes != e.from.changes {
		return false
	}
	return e.from.round == c.old[e.from.rule]
}

// find returns what is kept and still good. mu is held.
func (c *Cache) find(k key) *entry {
	el := c.entries[k]
	if el == nil {
		return nil
	}
	e, _ := el.Value.(*entry)
	if !c.o.Now().Before(e.until) || !c.fresh(e) {
		c.drop(el)
		return nil
	}
	c.used.MoveToFront(el)
	return e
}

// given is a kept result as a caller gets it: what is left of its time is less than it was.
func (c *Cache) given(e *entry) (*call.Result, int) {
	r := *e.result
	if r.TTL > 0 {
		r.TTL = max(min(r.TTL, e.until.Sub(c.o.Now())), -1)
	}
	return &r, e.tokens
}

func (c *Cache) drop(el *list.Element) {
	e, _ := c.used.Remove(el).(*entry)
	delete(c.entries, e.key)
	if of := c.named[e.resource]; of != nil {
		if delete(of, e.key); len(of) == 0 {
			delete(c.named, e.resource)
		}
	}
	c.bytes -= e.bytes()
}

// keep keeps an entry, unless something was written while it was read.
func (c *Cache) keep(f *flight, e *entry) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if f.stale || !c.fresh(e) {
		return false
	}
	if el := c.entries[e.key]; el != nil {
		c.drop(el)
	}
	c.entries[e.key] = c.used.PushFront(e)
	if e.resource != "" {
		of := c.named[e.resource]
		if of == nil {
			of = map[key]struct{}{}
			c.named[e.resource] = of
		}
		of[e.key] = struct{}{}
	}
	for c.bytes += e.bytes(); c.bytes > c.o.MaxBytes; {
		c.drop(c.used.Back())
		c.o.Stats.Evictions.Add(1)
	}
	return true
}

// called makes old what a call of a tool may have changed.
func (c *Cache) called(ctx context.Context, tool string) {
	var rules []int
	for i := range c.o.Rules {
		if pattern.Any(c.o.Rules[i].RefreshOn, tool) {
			rules = append(rules, i)
		}
	}
	c.age(rules)
	c.tell(ctx, rules)
}

// age makes results of rules old, here.
func (c *Cache) age(rules []int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, i := range rules {
		c.old[i]++
		c.o.Shared.owe(i)
		c.o.Stats.Refreshes.Add(1)
	}
}

// Updated says that the content of the resource at uri changed: what is kept of it is dropped, and so
// are answers that are made of it.
func (c *Cache) Updated(ctx context.Context, uri string) {
	var rules, others []int
	for i, r := range c.o.Rules {
		switch {
		case pattern.Any(r.RefreshOn, uri):
			rules = append(rules, i)
		case pattern.Any(r.Names, uri):
			others = append(others, i)
		}
	}
	c.mu.Lock()
	for k := range c.named[uri] {
		c.drop(c.entries[k])
		c.o.Stats.Refreshes.Add(1)
	}
	for k, f := range c.flights {
		if f.name == uri {
			f.stale = true
			delete(c.flights, k) // who comes from now on does not wait for it
		}
	}
	for prefix, s := range c.sources {
		if strings.HasPrefix(uri, prefix) {
			s.changes++
			for i := range s.rules {
				others = append(others, i)
			}
			c.o.Stats.Refreshes.Add(1)
		}
	}
	for _, i := range others {
		c.o.Shared.owe(i)
	}
	c.mu.Unlock()
	c.age(rules)
	c.tell(ctx, append(rules, others...))
}

// Size returns how many bytes are kept.
func (c *Cache) Size() int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return int64(c.bytes)
}
