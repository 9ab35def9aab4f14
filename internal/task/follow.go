package task

import (
	"context"
	"sync"

	"newel.dev/newel/call"
)

// A Follower hears of changes of tasks: at once of those made here, within about a second of those
// made by other nodes. Changes that were not taken yet are merged. Its methods are safe for
// concurrent use.
type Follower struct {
	t       *Tasks
	woken   chan struct{}
	mu      sync.Mutex // guards pending
	pending map[string]struct{}
}

// NewFollower returns a follower of no task. It has to be closed.
func (t *Tasks) NewFollower() *Follower {
	return &Follower{t: t, woken: make(chan struct{}, 1), pending: map[string]struct{}{}}
}

// Woken receives after a change; Taken then says of what.
func (f *Follower) Woken() <-chan struct{} { return f.woken }

// Taken returns the tasks that changed since it was called last.
func (f *Follower) Taken() []string { return f.taken() }

func (f *Follower) taken() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	var ids []string
	for id := range f.pending {
		ids = append(ids, id)
	}
	clear(f.pending)
	return ids
}

func (f *Follower) hear(id string) {
	f.mu.Lock()
	f.pending[id] = struct{}{}
	f.mu.Unlock()
	select {
	case f.woken <- struct{}{}:
	default:
	}
}

// Add follows a task as well.
func (f *Follower) Add(id string) {
	f.t.mu.Lock()
	defer f.t.mu.Unlock()
	all := f.t.watchers[id]
	if all == nil {
		all = map[*Follower]struct{}{}
		f.t.watchers[id] = all
	}
	all[f] = struct{}{}
}

// Remove follows a task no more.
func (f *Follower) Remove(id string) {
	f.t.mu.Lock()
	defer f.t.mu.Unlock()
	f.remove(id)
}

// remove is Remove with the lock held.
func (f *Follower) remove(id string) {
	delete(f.t.watchers[id], f)
	if len(f.t.watchers[id]) == 0 {
		delete(f.t.watchers, id)
		delete(f.t.versions, id)
	}
}

// Close follows nothing any more.
func (f *Follower) Close() {
	f.t.mu.Lock()
	defer f.t.mu.Unlock()
	for id, all := range f.t.watchers {
		if _, ok := all[f]; ok {
			f.remove(id)
		}
	}
}

// changed tells followers that a task changed.
func (t *Tasks) changed(id string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for f := range t.watchers[id] {
		f.hear(id)
	}
}

// Follow tells deliver how tasks of one caller stand, first all, then each that changed, until ctx ends (it
// returns nil) or deliver fails (it returns that error). Tasks that are not the caller's, or not kept
// any more, are passed over.
func (s *Server) Follow(ctx context.Context, p *call.Principal, ids []string, deliver func(*call.Task) error) error {
	f := s.NewFollower()
	defer f.Close()
	for _, id := range ids {
		f.Add(id)
		f.hear(id)
	}
	told := map[string]glance{}
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-f.woken:
		}
		for _, id := range f.taken() {
			r, err := s.find(ctx, p, id)
			if err != nil {
				continue // gone; or the store is away, and the next change tells
			}
			v, err := s.view(&r)
			if err != nil {
				return err
			}
			if g := glanceAt(v); told[id] != g {
				told[id] = g
				if err := deliver(v); err != nil {
					return err
				}
			}
		}
	}
}

// glance is what a follower could tell of a task: a worker that takes it changes nothing of that.
type glance struct {
	status  call.TaskStatus
	message string
	asks    string
}

func glanceAt(v *call.Task) glance {
	g := glance{status: v.Status, message: v.Message}
	for _, q := range v.Questions {
		g.asks += q.Key + "\x00"
	}
	return g
}
