// Package artifact keeps results that are too large to send, and gives them out in parts or, under
// an address that is signed, whole.
//
// Start reading at [Store.Put]; read.go gives parts out, download.go the whole, blob.go is what is
// kept of one artifact, and a [Shelf] is where: memory or a folder (shelf.go), or a bucket
// (internal/store/s3). Names cannot be guessed (256 random bits), artifacts are bound to the caller
// they were made for, and they expire. The store is bounded: when it is full, the oldest of the
// tenant with the most in it go first, so that nobody can flush what others keep.
//
// Several processes may share a shelf: each finds what the others put there. The package promises
// that an artifact is whole or not there, whenever a process ends, and that nothing is given out
// that is not what was kept. It leaves to others what becomes an artifact (internal/guard/bound).
package artifact

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"slices"
	"sync"
	"time"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/pattern"
)

// Options configure a Store. Zero means the default in brackets; below zero is refused.
type Options struct {
	Shelf     Shelf         // where artifacts are kept; nil: in Dir
	Dir       string        // folder that keeps them, made if it is not there; "": in memory
	MaxBytes  int64         // of all artifacts [256 MiB]
	MaxCount  int           // of artifacts [10,000]
	Retention time.Duration // [1 h]
	PartBytes int           // largest part of one read, at least 1 KiB [64 KiB]
	Classes   []Class       // what is different for results of some tools; the first that fits counts

	// Key is 32 secret bytes, the same for all that share a shelf: what was not kept with it is not
	// given out. Nil: artifacts are checked for damage only, and there are no links.
	Key   []byte
	Links Links
	// Logger hears of downloads, of damage and of what cannot be deleted; nil discards.
	Logger *slog.Logger
}

// A Class is results of some tools.
type Class struct {
	Tools     []string      // names; * stands for any text
	Retention time.Duration // 0: as for all
	MaxBytes  int64         // of one tenant's; the oldest go first. 0: as much as all may have
}

// A Store is a call.Backend that keeps artifacts. It is safe for concurrent use.
type Store struct {
	o     Options
	shelf Shelf
	links *links // nil: none are made

	mu      sync.Mutex           // guards what is below
	items   map[string]*item     // by id
	tenants map[string]*tenant   // what each has, with what is being written
	size    int64                // bytes, with those that are being written
	count   int                  // artifacts, with those that are being written
	writing map[string]bool      // ids that are on their way to the shelf
	doomed  map[string]bool      // ids that are to be deleted from the shelf
	looking bool                 // look goes through the shelf
	gone    map[string]bool      // ids that were dropped meanwhile
	foreign map[string]time.Time // what is on the shelf and cannot be read, and since when
}

// A tenant is what one has.
type tenant struct {
	size    int64
	classes map[int]int64
	owners  map[string]*owner
}

// An owner is what one principal has.
type owner struct {
	size    int64
	writing int     // how many are on their way to the shelf
	items   []*item // those that are whole, the oldest first
}

const scheme = "artifact://"

// Looking through a shelf.
const (
	lookEvery = time.Minute
	lookLimit = 10 * time.Minute // for a look
	readers   = 8                // that read at the same time
	maxListed = 100_000          // files on a shelf
)

var _ call.Watcher = (*Store)(nil)

// New returns a store. It takes over what it finds on its shelf, and fails if it cannot look
// there.
func New(ctx context.Context, o Options) (*Store, error) {
	if err := o.check(); err != nil {
		return nil, err
	}
	if o.MaxBytes == 0 {
		o.MaxBytes = 256 << 20
	}
	if o.MaxCount == 0 {
		o.MaxCount = 10_000
	}
	if o.Retention == 0 {
		o.Retention = time.Hour
	}
	if o.PartBytes == 0 {
		o.PartBytes = 64 << 10
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	s := &Store{
		o: o, shelf: o.Shelf, items: map[string]*item{}, tenants: map[string]*tenant{}, writing: map[string]bool{},
		doomed: map[string]bool{}, gone: map[string]bool{}, foreign: map[string]time.Time{},
	}
	var err error
	if s.links, err = newLinks(o.Links, o.Key); err != nil {
		return nil, err
	}
	switch {
	case s.shelf != nil:
	case o.Dir == "":
		s.shelf = Memory()
	default:
		if s.shelf, err = Dir(o.Dir); err != nil {
			return nil, err
		}
	}
	if err := s.look(ctx); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	s.sweep(ctx)
	return s, nil
}

func (o *Options) check() error {
	if o.MaxBytes < 0 || o.MaxCount < 0 || o.Retention < 0 || o.PartBytes < 0 {
		return errors.New("artifact: MaxBytes, MaxCount, Retention and PartBytes must not be below zero")
	}
	if o.PartBytes != 0 && o.PartBytes < 1<<10 {
		return errors.New("artifact: PartBytes must be at least 1,024")
	}
	if o.Shelf != nil && o.Dir != "" {
		return errors.New("artifact: Shelf and Dir are both given")
	}
	if o.Key != nil && len(o.Key) != keySize {
		return fmt.Errorf("artifact: Key must have %d bytes", keySize)
	}
	for i, c := range o.Classes {
		if len(c.Tools) == 0 || c.Retention < 0 || c.MaxBytes < 0 {
			return fmt.Errorf("class %d of artifacts needs tools, and its bounds must not be below zero", i+1)
		}
		if err := pattern.Check(c.Tools...); err != nil {
			return fmt.Errorf("class %d of artifacts: %w", i+1, err)
		}
	}
	return nil
}

// Close gives the shelf back; artifacts on it stay for the next process.
func (s *Store) Close() error { return s.shelf.Close() }

// Name implements call.Backend.
func (s *Store) Name() string { return "artifacts" }

// Capabilities implements call.Backend: one template.
func (s *Store) Capabilities(context.Context) ([]*call.Capability, error) {
	return []*call.Capability{{
		Kind: call.Resource, Template: scheme + "{id}{?offset,length}", Name: "artifact", Title: "Stored result",
		Description: "A result that was too large to send at once. Read it in parts: artifact://ID?offset=0&length=65536, in this order, in bytes; _meta[\"dev.newel/next\"] is the offset of the next part, and is missing on the last.",
		Effect:      call.Read,
		Origin:      "artifacts (built in)",
		// As JSON a byte takes at most six.
		MaxResultBytes: 8 * s.o.PartBytes,
		Run:            s.run,
	}}, nil
}

// noClass is the class of tools that no Class names.
const noClass = -1

// classOf returns the class of a tool, how long its results are kept and how many bytes of them a
// tenant may have.
func (s *Store) classOf(tool string) (class int, retention time.Duration, most int64) {
	class, retention = noClass, s.o.Retention
	for i, c := range s.o.Classes {
		if !pattern.Any(c.Tools, tool) {
			continue
		}
		if class = i; c.Retention > 0 {
			retention = c.Retention
		}
		break
	}
	return class, retention, s.mostOf(class)
}

// mostOf returns how many bytes of a class a tenant may have.
func (s *Store) mostOf(class int) int64 {
	if class != noClass && s.o.Classes[class].MaxBytes > 0 {
		return min(s.o.MaxBytes, s.o.Classes[class].MaxBytes)
	}
	return s.o.MaxBytes
}

// Put keeps a copy of what a tool returned to its caller until it expires. It fails with TooLarge
// if data alone is larger than all may be, with Exhausted if too much is being written at once,
// and with Unavailable if it cannot be written; then nothing of it is given out.
func (s *Store) Put(ctx context.Context, caller *call.Principal, tool, mime string, data []byte) (call.Artifact, error) {
	if err := ctx.Err(); err != nil {
		return call.Artifact{}, call.AsError(err)
	}
	class, retention, most := s.classOf(tool)
	if int64(len(data)) > most {
		return call.Artifact{}, call.Errorf(call.TooLarge, "%d bytes are more than all stored results of this kind together may have (%d)", len(data), most)
	}
	now := time.Now()
	it := &item{id: rand.Text() + rand.Text(), class: class, tool: tool, mime: cleanType(mime), created: now, expires: now.Add(retention)}
	it.tenant, it.owner = s.ownerOf(caller)
	blob, err := s.pack(it, data)
	if err != nil {
		return call.Artifact{}, call.Errorf(call.Internal, "internal error").Because(err)
	}
	s.mu.Lock()
	before := len(s.doomed)
	ok := s.makeRoom(it.tenant, class, most, it.size, 1)
	if ok {
		s.reserve(it)
		s.writing[it.id] = true
	}
	dropped := len(s.doomed) > before
	s.mu.Unlock()
	if dropped {
		s.sweep(ctx) // the disk needs the room too
	}
	if !ok {
		return call.Artifact{}, call.Errorf(call.Exhausted, "too many results are being stored at once; try again in a moment")
	}
	err = s.shelf.Put(ctx, it.id, blob)
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.writing, it.id)
	if err != nil {
		s.release(it)
		if len(s.doomed) < s.o.MaxCount {
			s.doomed[it.id] = true // it may have arrived all the same; nobody knows its name, and it expires
		}
		return call.Artifact{}, notWritten(err)
	}
	s.add(it)
	a := call.Artifact{URI: scheme + it.id, MIME: it.mime, Size: it.size, SHA256: it.sha256, Created: it.created, Expires: it.expires}
	if s.links != nil {
		a.Link, a.LinkUntil = s.links.make(it, now)
	}
	return a, nil
}

func notWritten(err error) error {
	if errors.Is(err, ErrFull) {
		return call.Errorf(call.Unavailable, "the result cannot be stored: the server's disk is full; ask its operator to make room").Because(err)
	}
	return call.Errorf(call.Unavailable, "the result cannot be stored at the moment; try again later").Because(err)
}

// reserve counts an item in, release counts it out. mu is held.
func (s *Store) reserve(it *item) {
	s.size += it.size
	s.count++
	t := s.tenants[it.tenant]
	if t == nil {
		t = &tenant{classes: map[int]int64{}, owners: map[string]*owner{}}
		s.tenants[it.tenant] = t
	}
	o := t.owners[it.owner]
	if o == nil {
		o = &owner{}
		t.owners[it.owner] = o
	}
	t.size += it.size
	t.classes[it.class] += it.size
	o.size += it.size
	o.writing++
}

func (s *Store) release(it *item) {
	s.size -= it.size
	s.count--
	t := s.tenants[it.tenant]
	o := t.owners[it.owner]
	t.size -= it.size
	t.classes[it.class] -= it.size
	o.size -= it.size
	o.writing--
	if o.writing == 0 && len(o.items) == 0 {
		delete(t.owners, it.owner)
	}
	if len(t.owners) == 0 {
		delete(s.tenants, it.tenant)
	}
}

// add makes a reserved item one that is whole. mu is held.
func (s *Store) add(it *item) {
	it.known = time.Now()
	s.items[it.id] = it
	o := s.tenants[it.tenant].owners[it.owner]
	o.writing--
	at, _ := slices.BinarySearchFunc(o.items, it, func(a, b *item) int { return a.created.Compare(b.created) })
	o.items = slices.Insert(o.items, at, it)
}

// forget takes an item out that is no more on the shelf. mu is held.
func (s *Store) forget(it *item) {
	if s.items[it.id] != it {
		return
	}
	delete(s.items, it.id)
	o := s.tenants[it.tenant].owners[it.owner]
	at := slices.Index(o.items, it)
	o.items = slices.Delete(o.items, at, at+1)
	o.writing++
	s.release(it)
	if s.looking {
		s.gone[it.id] = true
	}
}

// drop takes an item out, which sweep then deletes. mu is held.
func (s *Store) drop(it *item) {
	s.forget(it)
	s.doomed[it.id] = true
}

// makeRoom drops what has expired and then the oldest, until so many bytes and artifacts fit, and
// so many bytes into the class of a tenant. It reports false if what is being written at this
// moment takes all the room. mu is held.
func (s *Store) makeRoom(who string, class int, most, bytes int64, count int) bool {
	narrow := func() bool {
		t := s.tenants[who]
		return class != noClass && t != nil && t.classes[class]+bytes > most
	}
	full := func() bool { return s.size+bytes > s.o.MaxBytes || s.count+count > s.o.MaxCount }
	if narrow() || full() {
		s.expire(time.Now())
	}
	if narrow() {
		for _, it := range s.oldest(who, class) {
			if s.drop(it); !narrow() {
				break
			}
		}
	}
	for full() {
		it := s.victim()
		if it == nil {
			return false
		}
		s.drop(it)
	}
	return !narrow()
}

// oldest returns the artifacts of a class of a tenant, the oldest first.
func (s *Store) oldest(who string, class int) []*item {
	var all []*item
	for _, o := range s.tenants[who].owners {
		for _, it := range o.items {
			if it.class == class {
				all = append(all, it)
			}
		}
	}
	slices.SortFunc(all, func(a, b *item) int { return a.created.Compare(b.created) })
	return all
}

// victim returns what goes first: of the tenant that has most, of its principal who has most, the
// oldest. Those that have nothing whole cannot pay.
func (s *Store) victim() *item {
	var heaviest *item
	mostTenant, mostOwner := int64(-1), int64(-1)
	for _, t := range s.tenants {
		for _, o := range t.owners {
			if len(o.items) > 0 && (t.size > mostTenant || t.size == mostTenant && o.size > mostOwner) {
				heaviest, mostTenant, mostOwner = o.items[0], t.size, o.size
			}
		}
	}
	return heaviest
}

// expire drops what is past its time. mu is held.
func (s *Store) expire(now time.Time) {
	for _, it := range s.items {
		if !now.Before(it.expires) {
			s.drop(it)
		}
	}
}

// find returns an artifact of this owner. Unknown, expired and other people's look alike: nil.
func (s *Store) find(ctx context.Context, id, tenant, owner string) (*item, error) {
	if !isID(id) {
		return nil, nil
	}
	s.mu.Lock()
	_, foreign := s.foreign[id]
	it, no := s.items[id], foreign || s.doomed[id] || s.writing[id]
	s.mu.Unlock()
	if it == nil && !no {
		var err error
		if it, err = s.lookUp(ctx, id); err != nil || it == nil {
			return nil, err
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if it == nil || s.items[id] != it {
		return nil, nil
	}
	if !time.Now().Before(it.expires) {
		s.drop(it)
		return nil, nil
	}
	if it.tenant != tenant || it.owner != owner {
		return nil, nil
	}
	return it, nil
}

// lookUp finds what another process put on the shelf.
func (s *Store) lookUp(ctx context.Context, id string) (*item, error) {
	head, err := s.shelf.Get(ctx, id, 0, maxHead)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	it := s.unpack(id, head)
	if it == nil {
		return nil, nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.takeOver(it), nil
}

// takeOver adds what was found on the shelf, unless it is known. mu is held.
func (s *Store) takeOver(it *item) *item {
	switch {
	case s.items[it.id] != nil:
		return s.items[it.id]
	case s.gone[it.id] || s.doomed[it.id] || s.writing[it.id]:
		return nil
	}
	s.reserve(it)
	s.add(it)
	return it
}

// Run implements call.Watcher: it deletes what has expired, and finds what other processes put on
// the shelf, until ctx ends.
func (s *Store) Run(ctx context.Context, _ func(...call.Kind), _ func(uri string)) error {
	shortest := s.o.Retention
	for _, c := range s.o.Classes {
		if c.Retention > 0 {
			shortest = min(shortest, c.Retention)
		}
	}
	tick := time.NewTicker(max(time.Second, min(shortest/10, lookEvery)))
	defer tick.Stop()
	looked := time.Now()
	for {
		select {
		case <-ctx.Done():
			return nil
		case now := <-tick.C:
			s.mu.Lock()
			s.expire(now)
			s.mu.Unlock()
			s.sweep(ctx)
			if now.Sub(looked) < lookEvery {
				continue
			}
			looked = now
			if err := s.look(ctx); err != nil && ctx.Err() == nil {
				s.o.Logger.LogAttrs(ctx, slog.LevelError, "stored results cannot be looked through", slog.String("error", err.Error()))
			}
		}
	}
}
