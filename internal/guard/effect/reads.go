package effect

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"time"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/audit"
)

// Bounds of the records of reads that wait to be written.
const (
	flushEvery = time.Second
	maxGroups  = 4096             // different ones
	maxDelay   = 30 * time.Second // of the oldest: after that nothing more is read
	flushTime  = 10 * time.Second
)

// group is what counts together.
type group struct {
	act, tenant, principal, client, server, kind, name, door, rule, effect string
	code                                                                   call.Code
}

type count struct {
	calls int64
	first time.Time
}

// reads counts calls without an effect and writes the counts down. Without Run, the callers do it.
type reads struct {
	store Store
	log   *slog.Logger

	mu      sync.Mutex
	groups  map[group]*count
	oldest  time.Time // of what waits; zero if nothing does
	writing bool
	kick    chan struct{}
	running bool
}

func newReads(s Store, l *slog.Logger) *reads {
	return &reads{store: s, log: l, groups: map[group]*count{}, kick: make(chan struct{}, 1)}
}

// read runs a call without an effect.
func (e *Effects) read(ctx context.Context, server string, c *call.Call, next call.Handler) (*call.Result, error) {
	if c.Target == nil || c.Kind == call.Complete {
		return next(ctx, c) // lists, subscriptions, suggestions: nothing is read behind them
	}
	if !e.reads.room() {
		err := call.Errorf(call.Unavailable, "what is read cannot be written down right now, so nothing is read; try again in a moment")
		err.RetryAfter = time.Second
		return nil, err
	}
	r, err := next(ctx, c)
	g := group{act: audit.Reads, effect: call.Read.String(), server: server, kind: c.Kind.String(), name: nameOf(c.Target), door: c.Door, rule: c.Event.Rule}
	if p := c.Principal; p != nil {
		g.tenant, g.principal, g.client = p.Tenant, p.ID, p.Client
	}
	if err != nil {
		g.code = codeOf(err)
	}
	e.reads.add(ctx, g)
	return r, err
}

// Denied counts a call that the policy refused. It does not wait for the log: what cannot be written
// down stops reads, not refusals.
func (e *Effects) Denied(ctx context.Context, server string, c *call.Call, target *call.Capability, err error) {
	g := group{act: audit.Denied, server: server, kind: c.Kind.String(), door: c.Door, rule: c.Event.Rule, code: codeOf(err)}
	if target != nil { // the registered name: what callers wrote could be anything
		g.name, g.effect = nameOf(target), target.Effect.String()
	}
	if p := c.Principal; p != nil {
		g.tenant, g.principal, g.client = p.Tenant, p.ID, p.Client
	}
	if e.reads.room() {
		e.reads.add(ctx, g)
	}
}

// codeOf is the code of an error; a question is none.
func codeOf(err error) call.Code {
	var ask *call.InputRequired
	if errors.As(err, &ask) {
		return call.OK
	}
	return call.AsError(err).Code
}

// nameOf is the registered name: what callers wrote could be anything.
func nameOf(t *call.Capability) string {
	switch {
	case t.Kind != call.Resource:
		return t.Name
	case t.URI != "":
		return t.URI
	}
	return t.Template
}

// room reports whether one more may be counted: not if what waits could not be written for long.
func (r *reads) room() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.groups) < maxGroups && (r.oldest.IsZero() || time.Since(r.oldest) < maxDelay)
}

func (r *reads) add(ctx context.Context, g group) {
	now := time.Now()
	r.mu.Lock()
	n := r.groups[g]
	if n == nil {
		n = &count{first: now}
		r.groups[g] = n
	}
	n.calls++
	if r.oldest.IsZero() {
		r.oldest = now
	}
	due := len(r.groups) >= maxGroups/2 || now.Sub(r.oldest) >= flushEvery
	running := r.running
	r.mu.Unlock()
	switch {
	case !due:
	case running:
		select {
		case r.kick <- struct{}{}:
		default:
		}
	default:
		r.flush(context.WithoutCancel(ctx))
	}
}

// flush writes what waits. What cannot be written waits on.
func (r *reads) flush(ctx context.Context) {
	r.mu.Lock()
	if r.writing || len(r.groups) == 0 {
		r.mu.Unlock()
		return
	}
	r.writing = true
	groups, oldest := r.groups, r.oldest
	r.groups, r.oldest = map[group]*count{}, time.Time{}
	r.mu.Unlock()

	ctx, cancel := context.WithTimeout(ctx, flushTime)
	defer cancel()
	err := r.write(ctx, groups)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.writing = false
	if err == nil {
		return
	}
	r.log.LogAttrs(ctx, slog.LevelError, "reads could not be written down; they are refused if this lasts", slog.String("error", err.Error()))
	r.oldest = oldest
	for g, n := range groups {
		if m := r.groups[g]; m != nil {
			n.calls += m.calls
		}
		r.groups[g] = n
	}
}

func (r *reads) write(ctx context.Context, groups map[group]*count) error {
	entries := make([]audit.Entry, 0, len(groups))
	now := audit.Time(time.Now())
	for g, n := range groups {
		rec := audit.Record{
			Act: g.act, Capability: clip(g.name), Client: clip(g.client), Count: n.calls, Door: g.door, Effect: g.effect, From: audit.Time(n.first), Kind: g.kind,
			Principal: clip(g.principal), Rule: clip(g.rule), Server: g.server, Tenant: clip(g.tenant), Time: now,
		}
		if g.code != call.OK {
			rec.Code = g.code.String()
		}
		b, err := rec.Encode()
		if err != nil {
			return err
		}
		entries = append(entries, audit.Entry{Record: b})
	}
	_, err := r.store.Append(ctx, entries)
	return err
}

// clip makes text fit a record: not too long, and UTF-8. One that cannot be encoded would keep all
// others from being written.
func clip(s string) string {
	const most = 1024
	return strings.ToValidUTF8(s[:min(len(s), most)], "�")
}
