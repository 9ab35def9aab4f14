package assembly

import (
	"context"
	"errors"
	"log/slog"
	"reflect"
	"slices"
	"sync"
	"time"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/audit"
)

// A Live serves one house, and can go over to the next while it serves. Calls end in the house
// in which they began, so each is decided by one configuration; subscribers and sessions stay. Its
// methods are safe for concurrent use.
//
// The old house is done when its last call has ended. Subscriptions of the stateless revision are
// ended with their result after 15 seconds, so that their clients come again and are asked anew
// what they may see; calls have as long as they may run anyway.
type Live struct {
	background context.Context // of what runs beside calls; it ends after them
	stop       context.CancelFunc
	all        sync.WaitGroup
	replacing  sync.Mutex // one at a time

	mu        sync.Mutex // guards what is below; a refresh of lists, or going over, at a time
	now       *House
	draining  []*House
	running   []*running
	refreshed int // how often lists were read anew
	ended     bool
}

// running is a job that runs.
type running struct {
	job
	stop context.CancelFunc
	done chan struct{}
}

// NewLive returns what serves h first. Nothing runs yet.
func NewLive(h *House) *Live {
	l := &Live{now: h}
	l.background, l.stop = context.WithCancel(context.Background())
	return l
}

// House returns the one that is served.
func (l *Live) House() *House {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.now
}

// Replace builds a house from o beside the one that serves, and goes over to it. What o shares with
// the options of that one (backends, identities) goes on as it is; Logger, Tracer, Meter, Metrics,
// TLS, State, Key, StateKey, Cluster, Events and Artifacts stay what they were. After an error everything is as it was. done is
// called once, when nothing of the old house is used any more.
func (l *Live) Replace(ctx context.Context, o *Options, done func()) error {
	l.replacing.Lock()
	defer l.replacing.Unlock()
	l.mu.Lock()
	old, seen := l.now, l.refreshed
	l.mu.Unlock()
	given := *o
	given.Logger, given.Tracer, given.Meter, given.Metrics = old.opts.Logger, old.opts.Tracer, old.opts.Meter, old.opts.Metrics
	given.TLS, given.StateKey, given.Artifacts = old.opts.TLS, old.opts.StateKey, old.opts.Artifacts
	given.Cluster, given.Events = old.opts.Cluster, old.opts.Events
	next, err := build(ctx, &given, old)
	if err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ended {
		next.forget()
		return errors.New("the server is stopping")
	}
	if l.refreshed != seen { // meanwhile lists changed, of which next may know the old ones
		if err := next.refresh(ctx); err != nil {
			next.forget()
			return err
		}
	}
	l.takeOver(old, next)
	l.draining = append(l.draining, old)
	l.all.Go(func() { l.retire(old, done) })
	return nil
}

// takeOver makes next the one that serves, and tells subscribers whose lists are different; l.mu is held.
func (l *Live) takeOver(old, next *House) {
	for _, f := range next.faces {
		f.sessions.Begin()
	}
	l.now = next
	next.kept.current.Store(next)
	next.bound()
	next.kept.observer.Forget()
	l.begin(next)
	for _, f := range next.faces {
		before := old.faceAt(f.server.Host + f.server.Path)
		if before == nil || before.place != f.place {
			continue
		}
		is, was := f.catalog.Load(), before.catalog.Load()
		kinds := is.Differs(was)
		if next.opts.Policy != old.opts.Policy { // then what somebody sees of a list may be different
			for _, k := range []call.Kind{call.ListTools, call.ListResources, call.ListTemplates, call.ListPrompts} {
				if !slices.Contains(kinds, k) && len(is.Names(k)) > 0 {
					kinds = append(kinds, k)
				}
			}
		}
		for _, k := range kinds {
			f.place.hub.ListChanged(k, false)
		}
		f.place.hub.FollowAgain()
	}
}

// retire waits until nobody uses a house any more, and ends what only that one had.
func (l *Live) retire(old *House, done func()) {
	old.users.leave() // it was held for being the one that serves
	streams := time.NewTimer(drainTimeout)
	defer streams.Stop()
	calls := time.NewTimer(drainTimeout + old.gate.Longest())
	defer calls.Stop()
	for waiting, longer := true, false; waiting; {
		select {
		case <-streams.C:
			old.drain.begin()
		case <-old.users.idle:
			waiting = false
		case <-calls.C:
			if !longer && old.working.Load() > 0 {
				longer = true // tasks may run for longer than calls
				calls.Reset(old.kept.tasks.Timeout())
				continue
			}
			waiting = false // what runs on does not look at its context
		case <-l.background.Done():
			waiting = false
		}
	}
	old.drain.begin()
	old.forget()
	l.mu.Lock()
	l.draining = slices.DeleteFunc(l.draining, func(h *House) bool { return h == old })
	var unused []*running
	l.running = slices.DeleteFunc(l.running, func(r *running) bool {
		used := slices.ContainsFunc(append(l.draining, l.now), func(h *House) bool { return h.has(r.key) })
		if !used {
			unused = append(unused, r)
		}
		return !used
	})
	l.mu.Unlock()
	for _, r := range unused {
		r.stop()
		<-r.done
	}
	if done != nil {
		done()
	}
}

// begin starts what a house needs and does not run yet; l.mu is held.
func (l *Live) begin(h *House) {
	for _, j := range h.jobs(l) {
		if slices.ContainsFunc(l.running, func(r *running) bool { return same(r.key, j.key) }) {
			continue
		}
		ctx, stop := context.WithCancel(l.background)
		r := &running{job: j, stop: stop, done: make(chan struct{})}
		l.running = append(l.running, r)
		l.all.Go(func() {
			defer close(r.done)
			defer stop()
			if err := j.run(ctx); err != nil && ctx.Err() == nil {
				h.opts.Logger.LogAttrs(ctx, slog.LevelError, j.what, slog.String("error", err.Error()))
			}
		})
	}
}

// jobs are what runs beside calls.
func (h *House) jobs(l *Live) []job {
	var all []job
	for _, b := range h.backends {
		if w, ok := b.(call.Watcher); ok {
			all = append(all, job{b, "the backend " + b.Name() + " stopped watching for changes", func(ctx context.Context) error { return l.watch(ctx, w) }})
		}
	}
	if r, ok := h.opts.Identity.(runner); ok {
		all = append(all, job{h.opts.Identity, "the keys of issuers are not kept fresh any more", r.Run})
	}
	if t := h.opts.TLS; t != nil {
		all = append(all, job{t, "certificates are not kept fresh any more", t.Run})
	}
	if c := h.opts.Cluster; c != nil {
		all = append(all, job{c, "the other nodes do not know of this one any more", c.Run})
	}
	all = append(all, job{h.effects, "calls with effects are not settled any more", h.effects.Run})
	if log, ok := h.kept.store.(audit.Eraser); ok && !h.opts.Effects.Keep.Forever() {
		keep := h.opts.Effects.Keep
		all = append(all, job{keep, "values in the audit log are not erased by age any more", func(ctx context.Context) error {
			keep.Run(ctx, log, func(err error) {
				h.kept.log.LogAttrs(ctx, slog.LevelWarn, "values in the audit log could not be erased by age; it is tried again", slog.String("error", err.Error()))
			})
			return nil
		}})
	}
	all = append(all, job{h.approvals, "approvals whose time is over are not ended any more", h.approvals.Run})
	all = append(all, job{h.kept.tasks, "tasks are not run any more", h.kept.tasks.Run})
	for _, f := range h.faces {
		all = append(all, job{f.place, "sessions ended", f.place.sessions.Run})
	}
	return all
}

// has reports whether a house uses what a job is for.
func (h *House) has(key any) bool {
	return slices.ContainsFunc(h.jobs(nil), func(j job) bool { return same(j.key, key) })
}

// same compares values that need not be comparable: those are never the same.
func same(a, b any) bool {
	t := reflect.TypeOf(a)
	return t == reflect.TypeOf(b) && t.Comparable() && a == b
}

// watch runs one backend's watcher.
func (l *Live) watch(ctx context.Context, w call.Watcher) error {
	changed := func(kinds ...call.Kind) {
		l.mu.Lock()
		defer l.mu.Unlock()
		h := l.now
		if !slices.ContainsFunc(h.backends, func(b call.Backend) bool { return same(b, w) }) {
			return // only calls that began before are still there
		}
		l.refreshed++
		if err := h.refresh(ctx, kinds...); err != nil && ctx.Err() == nil {
			h.opts.Logger.LogAttrs(ctx, slog.LevelError, "a change was not taken over; the previous catalog stays",
				slog.String("backend", w.Name()), slog.String("error", err.Error()))
		}
	}
	updated := func(uri string) {
		l.mu.Lock()
		now, all := l.now, append(l.draining[:len(l.draining):len(l.draining)], l.now)
		l.mu.Unlock()
		for _, h := range all { // before anybody hears of it and reads again
			if c := h.opts.Cache; c != nil {
				c.Updated(ctx, uri)
			}
		}
		for _, f := range now.faces {
			f.place.hub.Updated(uri)
		}
	}
	return w.Run(ctx, changed, updated)
}
