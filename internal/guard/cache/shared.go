package cache

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"log/slog"
	"slices"
	"strconv"
	"sync"
	"time"

	"newel.dev/newel/internal/answer"
	"newel.dev/newel/internal/secret"
)

// A Store is what nodes have in common. Nothing rests on it: it may forget, and whoever can write to
// it can make nodes ask their backends, and no more. It is safe for concurrent use.
type Store interface {
	// Round returns what stands under a name; first if nothing does, which stands there from then on.
	// It returns at most 64 bytes.
	Round(ctx context.Context, name, first string, ttl time.Duration) (string, error)
	// Turn puts another round under a name.
	Turn(ctx context.Context, name, round string, ttl time.Duration) error
	// Get returns what was put under a name; nil: nothing, or more than most bytes.
	Get(ctx context.Context, name string, most int) ([]byte, error)
	// Put puts a value under a name, for ttl.
	Put(ctx context.Context, name string, value []byte, ttl time.Duration) error
}

// Shared lets nodes give each other's results again. Results are sealed for the question, and for the
// round of their rule: a random word that every refresh replaces. A result of another round opens
// nowhere, so one question to the store tells a node whether what it keeps is still good. What only
// this node knows to be old, because the store was away when it was written, is not taken from the
// store until the others were told. Caches of one scope that follow each other have one Shared.
type Shared struct {
	store Store
	key   secret.Key
	names []byte
	scope string
	log   *slog.Logger

	turning sync.Mutex // one tells the others at a time

	mu    sync.Mutex // guards what is below
	rules []sharedRule
	away  time.Time // until when the store is left alone
}

// sharedRule is what a node knows of the results of one rule.
type sharedRule struct {
	last string   // round that counts
	dead []string // rounds that do not count any more, the last ones
	owed int      // refreshes that the others were not told of
	ttl  time.Duration
}

// Bounds of what is asked of the store.
const (
	storeTime = 250 * time.Millisecond // for one question
	awayFor   = time.Second            // the store is left alone after it failed
	maxDead   = 16
	roundTTL  = time.Hour // beside that of the rule
	sealing   = 4 << 10   // most that is stored beside a result, in bytes
)

// NewShared returns what nodes with this key and scope share. The scope stands for their
// configuration: nodes that have another one might answer otherwise.
func NewShared(store Store, k secret.Key, scope string, log *slog.Logger) (*Shared, error) {
	if store == nil || log == nil {
		return nil, errors.New("cache: Store and Logger are required")
	}
	names, err := k.Derive("newel cache names")
	if err != nil {
		return nil, err
	}
	return &Shared{store: store, key: k, names: names, scope: scope, log: log}, nil
}

// begin prepares for rules. Nil shares nothing.
func (s *Shared) begin(rules []Rule) error {
	if s == nil {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.rules == nil {
		s.rules = make([]sharedRule, len(rules))
		for i, r := range rules {
			s.rules[i].ttl = r.TTL + roundTTL
		}
	}
	if len(s.rules) != len(rules) {
		return errors.New("cache: caches of one scope have the same rules")
	}
	return nil
}

// owe notes that the others have to be told of a refresh.
func (s *Shared) owe(rule int) {
	if s == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.rules[rule].owed++
}

// name is where something stands. Whoever reads the store does not learn what was asked.
func (s *Shared) name(kind string, of []byte) string {
	h := hmac.New(sha256.New, s.names)
	h.Write(binary.AppendUvarint(nil, uint64(len(s.scope))))
	h.Write([]byte(s.scope))
	h.Write(of)
	return kind + ":" + hex.EncodeToString(h.Sum(nil))
}

func (s *Shared) roundName(rule int) string {
	return s.name("round", strconv.AppendInt(nil, int64(rule), 10))
}

// ask asks the store, unless it has just failed.
func (s *Shared) ask(ctx context.Context, question func(context.Context) error) bool {
	s.mu.Lock()
	away := time.Now().Before(s.away)
	s.mu.Unlock()
	if away {
		return false
	}
	limited, cancel := context.WithTimeout(context.WithoutCancel(ctx), storeTime)
	defer cancel()
	err := question(limited)
	if err == nil {
		return true
	}
	s.mu.Lock()
	s.away = time.Now().Add(awayFor)
	s.mu.Unlock()
	s.log.LogAttrs(ctx, slog.LevelWarn, "cached results are not shared for a moment; this node goes by its own", slog.String("error", err.Error()))
	return false
}

// round returns the round of a rule; "" if this node goes by its own results for now. other says that
// it is not the one of before: another node told of a refresh.
func (c *Cache) round(ctx context.Context, rule int) (got string, other bool) {
	s := c.o.Shared
	if s == nil || !c.settle(ctx, rule) {
		return "", false
	}
	ok := s.ask(ctx, func(ctx context.Context) (err error) {
		got, err = s.store.Round(ctx, s.roundName(rule), rand.Text(), s.rules[rule].ttl)
		return err
	})
	if !ok || got == "" {
		return "", false
	}
	s.mu.Lock()
	r := &s.rules[rule]
	if r.owed > 0 || slices.Contains(r.dead, got) {
		s.mu.Unlock()
		return "", false
	}
	r.begin(got)
	s.mu.Unlock()
	c.mu.Lock()
	defer c.mu.Unlock()
	if other = c.rounds[rule] != got; other {
		c.rounds[rule] = got
		c.old[rule]++
	}
	return got, other
}

// begin makes a round the one that counts.
func (r *sharedRule) begin(round string) {
	if r.last == round {
		return
	}
	if r.last != "" {
		r.dead = append(r.dead, r.last)
		r.dead = r.dead[max(0, len(r.dead)-maxDead):]
	}
	r.last = round
}

// tell tells other nodes of refreshes of rules. What they cannot be told of now stays owed.
func (c *Cache) tell(ctx context.Context, rules []int) {
	if c.o.Shared == nil {
		return
	}
	for _, i := range rules {
		c.settle(ctx, i)
	}
}

// settle tells the others what is owed of a rule, and reports whether nothing is any more.
func (c *Cache) settle(ctx context.Context, rule int) bool {
	s := c.o.Shared
	s.mu.Lock()
	owed := s.rules[rule].owed
	s.mu.Unlock()
	if owed == 0 {
		return true
	}
	s.turning.Lock()
	defer s.turning.Unlock()
	s.mu.Lock()
	owed = s.rules[rule].owed
	s.mu.Unlock()
	if owed == 0 {
		return true // somebody else did it
	}
	round := rand.Text()
	if !s.ask(ctx, func(ctx context.Context) error { return s.store.Turn(ctx, s.roundName(rule), round, s.rules[rule].ttl) }) {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.rules[rule].begin(round)
	s.rules[rule].owed -= owed
	return s.rules[rule].owed == 0
}

// fetch returns what a node put there in this round, or nil.
func (c *Cache) fetch(ctx context.Context, rule int, k key, round string) *entry {
	s := c.o.Shared
	if s == nil || round == "" {
		return nil
	}
	name := s.name("result", k[:])
	var sealed []byte
	if !s.ask(ctx, func(ctx context.Context) (err error) {
		sealed, err = s.store.Get(ctx, name, c.o.MaxEntry+sealing)
		return err
	}) || sealed == nil {
		return nil
	}
	box, err := s.key.Box("newel cache " + name) // one of its own: random nonces are good for so many values under one
	if err != nil {
		return nil
	}
	b, err := box.Open(sealed, round)
	if err != nil {
		return nil // of another round, or not of a node
	}
	until, n := binary.Varint(b)
	tokens, m := binary.Varint(b[max(n, 0):])
	if n <= 0 || m <= 0 {
		return nil
	}
	a, err := answer.Decode(b[n+m:])
	now := c.o.Now()
	most := now.Add(c.o.Rules[rule].TTL) // clocks of nodes differ
	e := &entry{key: k, tokens: int(tokens), until: time.UnixMilli(until)}
	if err != nil || a.Result == nil || !now.Before(e.until) {
		return nil
	}
	if e.until.After(most) {
		e.until = most
	}
	e.result = a.Result
	return e
}

// offer gives what was answered to the other nodes.
func (c *Cache) offer(ctx context.Context, e *entry, round string, ttl time.Duration) {
	s := c.o.Shared
	if s == nil || round == "" {
		return
	}
	name := s.name("result", e.key[:])
	box, err := s.key.Box("newel cache " + name)
	if err != nil {
		return
	}
	b := binary.AppendVarint(nil, e.until.UnixMilli())
	b = binary.AppendVarint(b, int64(e.tokens))
	b = append(b, (&answer.Answer{Result: e.result}).Encode()...)
	sealed := box.Seal(b, round)
	s.ask(ctx, func(ctx context.Context) error { return s.store.Put(ctx, name, sealed, max(ttl, time.Millisecond)) })
}
