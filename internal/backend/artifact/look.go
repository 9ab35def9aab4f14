package artifact

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"sync"
	"time"
)

// look compares what is known with what is on the shelf: what other processes put there is found,
// what they deleted is forgotten, and what cannot be read is deleted when it is older than anything
// is kept. Only one look is taken at a time.
func (s *Store) look(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, lookLimit)
	defer cancel()
	began := time.Now()
	s.mu.Lock()
	s.looking = true
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		s.looking = false
		clear(s.gone)
		s.mu.Unlock()
	}()
	listed := map[string]bool{}
	var unknown []Entry
	for e, err := range s.shelf.List(ctx) {
		if err != nil {
			return fmt.Errorf("stored results cannot be listed: %w", err)
		}
		if !isID(e.Name) {
			continue
		}
		if len(listed) == maxListed {
			return fmt.Errorf("there are more than %d stored results; delete some, or keep them elsewhere", maxListed)
		}
		listed[e.Name] = true
		s.mu.Lock()
		_, foreign := s.foreign[e.Name]
		known := s.items[e.Name] != nil || s.writing[e.Name] || s.doomed[e.Name] || s.gone[e.Name]
		s.mu.Unlock()
		if !foreign && !known {
			unknown = append(unknown, e)
		}
	}
	found, err := s.readAll(ctx, unknown)
	if err != nil {
		return fmt.Errorf("stored results cannot be read: %w", err)
	}
	s.takeStock(began, listed, unknown, found)
	return nil
}

// takeStock makes what is known what was found by a look.
func (s *Store) takeStock(began time.Time, listed map[string]bool, unknown []Entry, found []*item) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, e := range unknown {
		if found[i] == nil {
			s.foreign[e.Name] = e.Modified
		} else {
			s.takeOver(found[i])
		}
	}
	for id, it := range s.items {
		if !listed[id] && it.known.Before(began) {
			s.forget(it)
		}
	}
	for id, since := range s.foreign {
		if !listed[id] {
			delete(s.foreign, id)
		} else if began.Sub(since) > s.longest() {
			s.doomed[id] = true
			delete(s.foreign, id)
		}
	}
	s.enforce(began)
}

// enforce holds what is there to the bounds, which may have become smaller. mu is held.
func (s *Store) enforce(now time.Time) {
	s.expire(now)
	for name, t := range s.tenants {
		for class := range t.classes {
			if class != noClass {
				s.makeRoom(name, class, s.mostOf(class), 0, 0)
			}
		}
	}
	s.makeRoom("", noClass, 0, 0, 0)
}

// longest is how long anything is kept.
func (s *Store) longest() time.Duration {
	most := s.o.Retention
	for _, c := range s.o.Classes {
		most = max(most, c.Retention)
	}
	return most
}

// readAll reads the heads of blobs, several at a time; nil stands for what is none of ours or not
// whole.
func (s *Store) readAll(ctx context.Context, entries []Entry) ([]*item, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	found := make([]*item, len(entries))
	slots := make(chan struct{}, readers)
	var all sync.WaitGroup
	for i, e := range entries {
		slots <- struct{}{}
		if ctx.Err() != nil {
			break
		}
		all.Go(func() {
			defer func() { <-slots }()
			head, err := s.shelf.Get(ctx, e.Name, 0, maxHead)
			if err != nil {
				if !errors.Is(err, fs.ErrNotExist) {
					cancel(err)
				}
				return
			}
			if it := s.unpack(e.Name, head); it != nil && it.begin+it.size == e.Size {
				found[i] = it
			}
		})
	}
	all.Wait()
	return found, context.Cause(ctx)
}

// sweep deletes from the shelf what was dropped. What cannot be deleted stays to be deleted later.
func (s *Store) sweep(ctx context.Context) {
	s.mu.Lock()
	ids := make([]string, 0, len(s.doomed))
	for id := range s.doomed {
		ids = append(ids, id)
	}
	s.mu.Unlock()
	for _, id := range ids {
		if err := s.shelf.Delete(ctx, id); err != nil {
			if ctx.Err() == nil {
				s.o.Logger.LogAttrs(ctx, slog.LevelWarn, "a stored result cannot be deleted; it is tried again", slog.String("error", err.Error()))
			}
			return // the others would not be either
		}
		s.mu.Lock()
		delete(s.doomed, id)
		if s.looking {
			s.gone[id] = true
		}
		s.mu.Unlock()
	}
}
