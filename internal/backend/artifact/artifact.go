// Package artifact keeps results that are too large to send, and gives them out in parts.
//
// Start reading at [Store.Put]; read.go gives parts out, disk.go is the folder. Artifacts live in
// memory or in a folder. Their names cannot be guessed (256 random bits), they are bound to the
// caller they were made for, and they expire. The store is bounded: when it is full, what the
// caller with the most in it has not read for longest goes first, so that nobody can flush what
// others keep.
//
// The package promises that an artifact is whole or not there, whenever the process ends. It
// leaves to others what becomes an artifact (internal/guard/bound).
package artifact

import (
	"container/list"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"slices"
	"strconv"
	"sync"
	"time"
	"unicode/utf8"

	"newel.dev/newel/call"
)

// Options configure a Store. Zero means the default in brackets; below zero is refused.
type Options struct {
	// Dir is the folder that keeps artifacts, for one process at a time; it is made if it is not
	// there. Artifacts in it outlive the process. "" keeps them in memory.
	Dir       string
	MaxBytes  int64         // of all artifacts [256 MiB]
	MaxCount  int           // of artifacts [10,000]
	Retention time.Duration // [1 h]
	PartBytes int           // largest part of one read, at least 1 KiB [64 KiB]
}

// A Store is a call.Backend that keeps artifacts. It is safe for concurrent use.
type Store struct {
	o    Options
	disk *disk // nil: in memory

	mu     sync.Mutex               // guards what is below
	items  map[string]*list.Element // by id
	used   *list.List               // of *item, the one that was not used for longest first
	size   int64                    // bytes, with those that are being written
	count  int                      // artifacts, with those that are being written
	owners map[string]int64         // bytes by owner, with those that are being written
}

// An item is one artifact. It does not change.
type item struct {
	id      string
	owner   string
	mime    string
	size    int64
	sha256  string
	text    bool // valid UTF-8: parts are text
	created time.Time
	expires time.Time
	data    []byte // in memory only
}

const scheme = "artifact://"

var _ call.Watcher = (*Store)(nil)

// New returns a store. With a folder it takes over what an earlier process left there and deletes
// what has expired or is not whole.
func New(o Options) (*Store, error) {
	if o.MaxBytes < 0 || o.MaxCount < 0 || o.Retention < 0 || o.PartBytes < 0 {
		return nil, errors.New("artifact: MaxBytes, MaxCount, Retention and PartBytes must not be below zero")
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
	if o.PartBytes < 1<<10 {
		return nil, errors.New("artifact: PartBytes must be at least 1,024")
	}
	s := &Store{o: o, items: map[string]*list.Element{}, used: list.New(), owners: map[string]int64{}}
	if o.Dir == "" {
		return s, nil
	}
	d, found, err := openDisk(o.Dir, time.Now())
	if err != nil {
		return nil, err
	}
	s.disk = d
	slices.SortFunc(found, func(a, b *item) int { return a.created.Compare(b.created) })
	for _, it := range found {
		s.reserve(it)
		s.items[it.id] = s.used.PushBack(it)
	}
	s.makeRoom(0, 0) // the bounds may have become smaller
	return s, nil
}

// Close gives the folder back; artifacts in it stay for the next process. Reads fail after it.
func (s *Store) Close() error {
	if s.disk == nil {
		return nil
	}
	return s.disk.root.Close()
}

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

// ownerOf identifies a principal; nil is the local caller of a server without identity.
func ownerOf(p *call.Principal) string {
	if p == nil {
		return "local"
	}
	return strconv.Quote(p.Tenant) + strconv.Quote(p.ID)
}

// Put keeps a copy of data for its owner until it expires. It fails with TooLarge if data alone
// is larger than the store, with Exhausted if too much is being written at once, and with
// Unavailable if it cannot be written; then nothing is left behind.
func (s *Store) Put(ctx context.Context, owner *call.Principal, mime string, data []byte) (call.Artifact, error) {
	if err := ctx.Err(); err != nil {
		return call.Artifact{}, call.AsError(err)
	}
	if int64(len(data)) > s.o.MaxBytes {
		return call.Artifact{}, call.Errorf(call.TooLarge, "%d bytes are more than all stored results together may have (%d)", len(data), s.o.MaxBytes)
	}
	sum := sha256.Sum256(data)
	now := time.Now()
	it := &item{
		id: rand.Text() + rand.Text(), owner: ownerOf(owner), mime: mime,
		size: int64(len(data)), sha256: hex.EncodeToString(sum[:]), text: utf8.Valid(data),
		created: now, expires: now.Add(s.o.Retention),
	}
	s.mu.Lock()
	ok := s.makeRoom(it.size, 1)
	if ok {
		s.reserve(it)
	}
	s.mu.Unlock()
	if !ok {
		return call.Artifact{}, call.Errorf(call.Exhausted, "too many results are being stored at once; try again in a moment")
	}
	var err error
	if s.disk == nil {
		it.data = slices.Clone(data)
	} else {
		err = s.disk.write(it, data)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil {
		s.release(it)
		return call.Artifact{}, err
	}
	s.items[it.id] = s.used.PushBack(it)
	return call.Artifact{URI: scheme + it.id, MIME: it.mime, Size: it.size, SHA256: it.sha256, Created: it.created, Expires: it.expires}, nil
}

// reserve counts an item in, release counts it out. mu is held.
func (s *Store) reserve(it *item) {
	s.size += it.size
	s.count++
	s.owners[it.owner] += it.size
}

func (s *Store) release(it *item) {
	s.size -= it.size
	s.count--
	if s.owners[it.owner] -= it.size; s.owners[it.owner] <= 0 {
		delete(s.owners, it.owner)
	}
}

// makeRoom drops what has expired and then what is least missed, until so many bytes and
// artifacts fit. It reports false if what is being written at this moment takes all the room. mu
// is held, or nobody else has the store yet.
func (s *Store) makeRoom(bytes int64, count int) bool {
	full := func() bool { return s.size+bytes > s.o.MaxBytes || s.count+count > s.o.MaxCount }
	if full() {
		s.expire(time.Now())
	}
	for full() {
		e := s.victim()
		if e == nil {
			return false
		}
		s.drop(e)
	}
	return true
}

// victim returns what goes first: of the owner who has most, what was not used for longest.
func (s *Store) victim() *list.Element {
	heaviest, most := "", int64(-1)
	for owner, size := range s.owners {
		if size > most {
			heaviest, most = owner, size
		}
	}
	for e := s.used.Front(); e != nil; e = e.Next() {
		if itemOf(e).owner == heaviest {
			return e
		}
	}
	return s.used.Front()
}

func itemOf(e *list.Element) *item {
	it, _ := e.Value.(*item)
	return it
}

// expire drops what is past its time. mu is held.
func (s *Store) expire(now time.Time) {
	for e := s.used.Front(); e != nil; {
		next := e.Next()
		if !now.Before(itemOf(e).expires) {
			s.drop(e)
		}
		e = next
	}
}

// drop forgets one artifact. mu is held.
func (s *Store) drop(e *list.Element) {
	it := itemOf(e)
	s.used.Remove(e)
	delete(s.items, it.id)
	s.release(it)
	if s.disk != nil {
		s.disk.remove(it.id)
	}
}

// find returns an artifact of this owner, or nil. Unknown, expired and other people's look alike.
func (s *Store) find(id, owner string) *item {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.items[id]
	if e == nil {
		return nil
	}
	it := itemOf(e)
	if !time.Now().Before(it.expires) {
		s.drop(e)
		return nil
	}
	if it.owner != owner {
		return nil
	}
	s.used.MoveToBack(e)
	return it
}

// Run implements call.Watcher: it deletes what has expired until ctx ends.
func (s *Store) Run(ctx context.Context, _ func(...call.Kind), _ func(uri string)) error {
	tick := time.NewTicker(max(time.Second, min(s.o.Retention/10, time.Minute)))
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			s.mu.Lock()
			s.expire(time.Now())
			s.mu.Unlock()
		}
	}
}
