package issuer

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/go-json-experiment/json"
)

// A Store keeps what a server has to remember of logins until it expires: of one node in its memory
// ([NewMemory]), or where all nodes that serve one address find it. It is safe for concurrent use, and
// what one call has done every later one sees, at whichever node. What it fails with means that nobody
// can tell now, but for [ErrFull].
type Store interface {
	// Add keeps a value for ttl, if there is none. ok is false if there is one.
	Add(ctx context.Context, at Place, value []byte, ttl time.Duration) (ok bool, err error)
	// Change replaces a value, for ttl, if change returns another one: nil leaves it. now is nil if
	// there is none. Nothing else happens to the value meanwhile: change may be called several times
	// for that, and only what came of the last time counts. It returns the error of change.
	Change(ctx context.Context, at Place, change func(now []byte) (next []byte, ttl time.Duration, err error)) error
	// End forgets a value, and keeps any other from being added there for ttl.
	End(ctx context.Context, at Place, ttl time.Duration) error
}

// ErrFull is of a value for which there is no room.
var ErrFull = errors.New("there is no room for more")

// A Kind is values of one meaning.
type Kind struct {
	Name   string
	Most   int  // at once
	Forget bool // what expires first when there are more; otherwise no more are added
	OfOne  int  // at once of one owner, of which then the first is forgotten; 0: nobody owns them
}

// A Place is where a value stands. Names and owners are of any length, and chosen by anybody.
type Place struct {
	Kind        *Kind
	Name, Owner string
}

// What is kept here.
var (
	codes         = &Kind{Name: "code", Most: 10_000}
	logins        = &Kind{Name: "login", Most: 100_000, Forget: true, OfOne: 100}
	registrations = &Kind{Name: "client", Most: 1000, Forget: true}
)

// Keep adds a value to a store: see [Store.Add].
func Keep(ctx context.Context, s Store, at Place, value any, ttl time.Duration) (ok bool, err error) {
	raw, err := json.Marshal(value)
	if err != nil {
		return false, err
	}
	return s.Add(ctx, at, raw, ttl)
}

// Change changes a value in a store: see [Store.Change]. A ttl of 0 leaves it. found is false if there is
// none.
func Change[T any](ctx context.Context, s Store, at Place, change func(*T) (ttl time.Duration)) (found bool, err error) {
	err = s.Change(ctx, at, func(now []byte) ([]byte, time.Duration, error) {
		if found = now != nil; !found {
			return nil, 0, nil
		}
		v := new(T)
		if err := json.Unmarshal(now, v); err != nil {
			return nil, 0, fmt.Errorf("a stored %s: %w", at.Kind.Name, err)
		}
		ttl := change(v)
		if ttl <= 0 {
			return nil, 0, nil
		}
		next, err := json.Marshal(v)
		return next, ttl, err
	})
	return found, err
}

// Memory is the Store of one node. It ends with the process.
type Memory struct {
	now func() time.Time

	mu     sync.Mutex // guards what is below
	kinds  map[*Kind]map[string]*kept
	owners map[Place][]string // names, the first added first; the place has none
	swept  time.Time
}

// kept is a value, or that there must be none.
type kept struct {
	value   []byte // nil: none
	owner   string
	expires time.Time
}

var _ Store = (*Memory)(nil)

// NewMemory returns an empty one. now is time.Now if nil.
func NewMemory(now func() time.Time) *Memory {
	if now == nil {
		now = time.Now
	}
	return &Memory{now: now, kinds: map[*Kind]map[string]*kept{}, owners: map[Place][]string{}}
}

// sweep drops what has expired, at most once in ten seconds. mu is held.
func (m *Memory) sweep(now time.Time) {
	if now.Sub(m.swept) < 10*time.Second && !now.Before(m.swept) { // clocks go back
		return
	}
	m.swept = now
	for kind, all := range m.kinds {
		for name, k := range all {
			if now.After(k.expires) {
				m.drop(kind, name)
			}
		}
	}
}

// drop forgets a value. mu is held.
func (m *Memory) drop(kind *Kind, name string) {
	k := m.kinds[kind][name]
	if k == nil {
		return
	}
	delete(m.kinds[kind], name)
	if kind.OfOne == 0 {
		return
	}
	of := Place{Kind: kind, Owner: k.owner}
	for i, one := range m.owners[of] {
		if one == name {
			m.owners[of] = append(m.owners[of][:i:i], m.owners[of][i+1:]...)
			break
		}
	}
	if len(m.owners[of]) == 0 {
		delete(m.owners, of)
	}
}

// find returns what stands at a place, or nil. mu is held.
func (m *Memory) find(at Place, now time.Time) *kept {
	k := m.kinds[at.Kind][at.Name]
	if k != nil && now.After(k.expires) {
		m.drop(at.Kind, at.Name)
		return nil
	}
	return k
}

// Add implements Store.
func (m *Memory) Add(_ context.Context, at Place, value []byte, ttl time.Duration) (bool, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	now := m.now()
	m.sweep(now)
	if m.find(at, now) != nil {
		return false, nil
	}
	if all := m.kinds[at.Kind]; len(all) >= at.Kind.Most {
		if !at.Kind.Forget {
			return false, ErrFull
		}
		first := ""
		for name, k := range all {
			if first == "" || k.expires.Before(all[first].expires) {
				first = name
			}
		}
		m.drop(at.Kind, first)
	}
	of := Place{Kind: at.Kind, Owner: at.Owner}
	if at.Kind.OfOne > 0 {
		if mine := m.owners[of]; len(mine) >= at.Kind.OfOne {
			m.drop(at.Kind, mine[0])
		}
		m.owners[of] = append(m.owners[of], at.Name)
	}
	m.put(at, &kept{value, at.Owner, now.Add(ttl)})
	return true, nil
}

// put writes a value. mu is held.
func (m *Memory) put(at Place, k *kept) {
	if m.kinds[at.Kind] == nil {
		m.kinds[at.Kind] = map[string]*kept{}
	}
	m.kinds[at.Kind][at.Name] = k
}

// Change implements Store.
func (m *Memory) Change(_ context.Context, at Place, change func([]byte) ([]byte, time.Duration, error)) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	now := m.now()
	k := m.find(at, now)
	if k == nil {
		k = &kept{}
	}
	next, ttl, err := change(k.value)
	if err == nil && next != nil && k.value != nil {
		k.value, k.expires = next, now.Add(ttl)
	}
	return err
}

// End implements Store.
func (m *Memory) End(_ context.Context, at Place, ttl time.Duration) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.drop(at.Kind, at.Name)
	m.put(at, &kept{expires: m.now().Add(ttl)})
	return nil
}
