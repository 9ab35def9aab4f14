// Package logintest holds the tests that every store of an authorization server has to pass.
package logintest

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"newel.dev/newel/internal/identity/issuer"
)

// suite is two views of one store, as two nodes have them.
type suite struct {
	*testing.T
	a, b issuer.Store
}

// Run tests a store. a and b are views of the same one; of a store in memory they are equal.
func Run(t *testing.T, a, b issuer.Store) {
	t.Run("a value is added once", func(t *testing.T) { (&suite{t, a, b}).once() })
	t.Run("changes are whole", func(t *testing.T) { (&suite{t, a, b}).changes() })
	t.Run("what ended does not begin", func(t *testing.T) { (&suite{t, a, b}).ends() })
	t.Run("room", func(t *testing.T) { (&suite{t, a, b}).room() })
	t.Run("owners", func(t *testing.T) { (&suite{t, a, b}).owners() })
}

func (s *suite) add(at issuer.Place, value string, ttl time.Duration) bool {
	s.Helper()
	ok, err := s.a.Add(s.Context(), at, []byte(value), ttl)
	if err != nil {
		s.Fatal(err)
	}
	return ok
}

// get returns what the other node sees; "": nothing.
func (s *suite) get(at issuer.Place) (value string) {
	s.Helper()
	err := s.b.Change(s.Context(), at, func(now []byte) ([]byte, time.Duration, error) {
		value = string(now)
		return nil, 0, nil
	})
	if err != nil {
		s.Fatal(err)
	}
	return value
}

// until waits until it is so.
func (s *suite) until(what string, so func() bool) {
	s.Helper()
	ctx, cancel := context.WithTimeout(s.Context(), 20*time.Second)
	defer cancel()
	for tick := time.NewTicker(5 * time.Millisecond); !so(); {
		select {
		case <-tick.C:
		case <-ctx.Done():
			s.Fatal(what)
		}
	}
}

func (s *suite) once() {
	kind := &issuer.Kind{Name: "once", Most: 100}
	at := issuer.Place{Kind: kind, Name: "a" + strings.Repeat("\x00é", 5000)}
	if s.get(at) != "" || !s.add(at, "1", time.Minute) || s.get(at) != "1" {
		s.Fatalf("%q", s.get(at))
	}
	if ok, err := s.b.Add(s.Context(), at, []byte("2"), time.Minute); ok || err != nil || s.get(at) != "1" {
		s.Errorf("a second time: %v, %v, %q", ok, err, s.get(at))
	}
	other := issuer.Place{Kind: &issuer.Kind{Name: "twice", Most: 100}, Name: at.Name}
	if s.get(other) != "" || !s.add(other, "2", 20*time.Millisecond) {
		s.Error("another kind has the same names")
	}
	s.until("a value does not expire", func() bool { return s.get(other) == "" })
	if !s.add(other, "3", time.Minute) {
		s.Error("what has expired is in the way")
	}
	var added atomic.Int32
	var all sync.WaitGroup
	for i := range 16 {
		all.Go(func() {
			node := []issuer.Store{s.a, s.b}[i%2]
			if ok, err := node.Add(s.Context(), issuer.Place{Kind: kind, Name: "race"}, []byte(strconv.Itoa(i)), time.Minute); ok && err == nil {
				added.Add(1)
			}
		})
	}
	all.Wait()
	if added.Load() != 1 {
		s.Errorf("%d were first", added.Load())
	}
}

func (s *suite) changes() {
	at := issuer.Place{Kind: &issuer.Kind{Name: "changes", Most: 100}, Name: "n"}
	err := s.a.Change(s.Context(), at, func(now []byte) ([]byte, time.Duration, error) {
		if now != nil {
			s.Errorf("there is %q", now)
		}
		return []byte("made of nothing"), time.Minute, nil
	})
	if err != nil || s.get(at) != "" {
		s.Errorf("a change of nothing: %v, %q", err, s.get(at))
	}
	s.add(at, "0", time.Minute)
	told := errors.New("no")
	if err := s.a.Change(s.Context(), at, func([]byte) ([]byte, time.Duration, error) { return []byte("7"), time.Minute, told }); !errors.Is(err, told) || s.get(at) != "0" {
		s.Errorf("a change that fails: %v, %q", err, s.get(at))
	}
	var done atomic.Int64
	var all sync.WaitGroup
	for i := range 8 {
		node := []issuer.Store{s.a, s.b}[i%2]
		all.Go(func() {
			for range 10 {
				err := node.Change(s.Context(), at, func(now []byte) ([]byte, time.Duration, error) {
					n, err := strconv.Atoi(string(now))
					return []byte(strconv.Itoa(n + 1)), time.Minute, err
				})
				if err == nil { // one that lost too often says so
					done.Add(1)
				}
			}
		})
	}
	all.Wait()
	if got := s.get(at); got != fmt.Sprint(done.Load()) || done.Load() < 10 {
		s.Errorf("%d changes were done, and there is %s", done.Load(), got)
	}
	err = s.b.Change(s.Context(), at, func([]byte) ([]byte, time.Duration, error) { return []byte("last"), 20 * time.Millisecond, nil })
	if err != nil {
		s.Error(err)
	}
	s.until("a changed value does not expire", func() bool { return s.get(at) == "" })
}

func (s *suite) ends() {
	kind := &issuer.Kind{Name: "ends", Most: 2, OfOne: 2}
	at, never := issuer.Place{Kind: kind, Name: "n", Owner: "o"}, issuer.Place{Kind: kind, Name: "m", Owner: "o"}
	s.add(at, "1", time.Minute)
	if err := s.b.End(s.Context(), at, time.Minute); err != nil || s.get(at) != "" {
		s.Errorf("%v, %q", err, s.get(at))
	}
	if s.add(at, "2", time.Minute) || s.get(at) != "" {
		s.Error("what ended began again")
	}
	if err := s.b.End(s.Context(), never, 30*time.Millisecond); err != nil {
		s.Error(err)
	}
	if err := s.a.Change(s.Context(), at, func(now []byte) ([]byte, time.Duration, error) {
		if now != nil {
			s.Errorf("there is %q", now)
		}
		return []byte("3"), time.Minute, nil
	}); err != nil || s.get(at) != "" {
		s.Errorf("what ended was changed: %v, %q", err, s.get(at))
	}
	s.until("what ended is never forgotten", func() bool { return s.add(never, "1", time.Minute) })
}

func (s *suite) room() {
	place := func(k *issuer.Kind, name string) issuer.Place { return issuer.Place{Kind: k, Name: name} }
	full := &issuer.Kind{Name: "full", Most: 3}
	s.add(place(full, "a"), "1", time.Minute)
	s.add(place(full, "b"), "1", time.Minute)
	s.add(place(full, "c"), "1", 300*time.Millisecond)
	if ok, err := s.b.Add(s.Context(), place(full, "d"), []byte("1"), time.Minute); ok || !errors.Is(err, issuer.ErrFull) {
		s.Errorf("there is no bound: %v, %v", ok, err)
	}
	s.until("what expired takes room", func() bool {
		_ = s.get(place(full, "c"))
		ok, err := s.b.Add(s.Context(), place(full, "d"), []byte("1"), time.Minute)
		return ok && err == nil
	})
	forgets := &issuer.Kind{Name: "forgets", Most: 3, Forget: true}
	s.add(place(forgets, "a"), "1", 2*time.Minute)
	s.add(place(forgets, "b"), "1", time.Minute)
	s.add(place(forgets, "c"), "1", 3*time.Minute)
	// b lasts longest now, so it is a that goes.
	if err := s.b.Change(s.Context(), place(forgets, "b"), func([]byte) ([]byte, time.Duration, error) { return []byte("2"), 4 * time.Minute, nil }); err != nil {
		s.Error(err)
	}
	if !s.add(place(forgets, "d"), "1", time.Minute) || s.get(place(forgets, "a")) != "" {
		s.Error("the first to expire is still there")
	}
	for _, name := range []string{"b", "c", "d"} {
		if s.get(place(forgets, name)) == "" {
			s.Errorf("%s is gone", name)
		}
	}
}

func (s *suite) owners() {
	kind := &issuer.Kind{Name: "owned", Most: 10, Forget: true, OfOne: 2}
	place := func(owner, name string) issuer.Place { return issuer.Place{Kind: kind, Name: name, Owner: owner} }
	s.add(place("x", "x1"), "1", time.Minute)
	s.add(place("x", "x2"), "1", 2*time.Minute)
	s.add(place("y", "y1"), "1", time.Minute)
	s.add(place("x", "x3"), "1", 3*time.Minute)
	for name, want := range map[string]string{"x1": "", "x2": "1", "x3": "1", "y1": "1"} {
		if got := s.get(place(name[:1], name)); got != want {
			s.Errorf("%s: %q", name, got)
		}
	}
	if err := s.b.End(s.Context(), place("x", "x2"), time.Minute); err != nil {
		s.Error(err)
	}
	if s.add(place("x", "x4"), "1", 4*time.Minute); s.get(place("x", "x3")) == "" {
		s.Error("what ended counts")
	}
}
