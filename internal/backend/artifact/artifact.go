// Package artifact keeps results that are too large to send, and gives them out in parts.
//
// Start reading at [Store.Put] and [Store.read]. Artifacts live in memory or in a folder, which
// is confined by os.Root; they are bound to the caller they were made for, their names cannot be
// guessed, and they expire. The store is bounded: when it is full the oldest go first.
package artifact

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
)

// Options configure a Store. Zero means the default in brackets.
type Options struct {
	Dir       string        // folder to keep artifacts in; "" keeps them in memory
	MaxBytes  int64         // of all artifacts [256 MiB]
	Retention time.Duration // [1 h]
	PartBytes int           // largest part of one read [64 KiB]
}

// A Store is a call.Backend that keeps artifacts. It is safe for concurrent use. What a process
// before this one left in Dir is deleted: nobody holds its names any more.
type Store struct {
	o    Options
	root *os.Root // nil: in memory

	mu    sync.Mutex // guards what is below
	items map[string]*item
	order []string // oldest first
	size  int64
}

type item struct {
	call.Artifact
	owner string
	data  []byte // in memory only
}

const scheme = "artifact://"

// New returns a store; it opens and empties the folder, if there is one.
func New(o Options) (*Store, error) {
	if o.MaxBytes == 0 {
		o.MaxBytes = 256 << 20
	}
	if o.Retention == 0 {
		o.Retention = time.Hour
	}
	if o.PartBytes == 0 {
		o.PartBytes = 64 << 10
	}
	s := &Store{o: o, items: map[string]*item{}}
	if o.Dir == "" {
		return s, nil
	}
	if err := os.MkdirAll(o.Dir, 0o700); err != nil {
		return nil, err
	}
	root, err := os.OpenRoot(o.Dir)
	if err != nil {
		return nil, err
	}
	s.root = root
	return s, s.empty()
}

// empty deletes what an earlier process left.
func (s *Store) empty() error {
	entries, err := fs.ReadDir(s.root.FS(), ".")
	if err != nil {
		return err
	}
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), suffix) {
			if err := s.root.Remove(e.Name()); err != nil {
				return err
			}
		}
	}
	return nil
}

const suffix = ".artifact"

// Name implements call.Backend.
func (s *Store) Name() string { return "artifacts" }

// Capabilities implements call.Backend: one template.
func (s *Store) Capabilities(context.Context) ([]*call.Capability, error) {
	return []*call.Capability{{
		Kind: call.Resource, Template: scheme + "{id}{?offset,length}", Name: "artifact", Title: "Stored result",
		Description:    "A result that was too large to send at once. Read it in parts: offset and length count bytes; _meta[\"dev.newel/next\"] is the offset of the next part.",
		Effect:         call.Read,
		MaxResultBytes: 8 * s.o.PartBytes,
		Run:            s.run,
	}}, nil
}

func ownerOf(p *call.Principal) string {
	if p == nil {
		return ""
	}
	return strconv.Quote(p.Tenant) + strconv.Quote(p.ID)
}

// Put keeps data for its owner. It fails if data alone is larger than the store, or cannot be written.
func (s *Store) Put(_ context.Context, owner *call.Principal, mime string, data []byte) (call.Artifact, error) {
	if int64(len(data)) > s.o.MaxBytes {
		return call.Artifact{}, fmt.Errorf("%d bytes are more than the store of artifacts holds", len(data))
	}
	id := rand.Text() + rand.Text()
	sum := sha256.Sum256(data)
	now := time.Now()
	it := &item{owner: ownerOf(owner), Artifact: call.Artifact{
		URI: scheme + id, MIME: mime, Size: int64(len(data)), SHA256: hex.EncodeToString(sum[:]), Created: now, Expires: now.Add(s.o.Retention),
	}}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.expire(now)
	for s.size+it.Size > s.o.MaxBytes {
		s.drop(s.order[0])
	}
	if s.root == nil {
		it.data = slices.Clone(data)
	} else if err := s.write(id, data); err != nil {
		return call.Artifact{}, err
	}
	s.items[id] = it
	s.order = append(s.order, id)
	s.size += it.Size
	return it.Artifact, nil
}

// write makes a file whole or not at all.
func (s *Store) write(id string, data []byte) error {
	tmp := id + ".part" + suffix
	f, err := s.root.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err = errors.Join(err, f.Close()); err == nil {
		err = s.root.Rename(tmp, id+suffix)
	}
	if err != nil {
		return errors.Join(err, s.root.Remove(tmp))
	}
	return nil
}

// expire drops what is past its time. mu is held.
func (s *Store) expire(now time.Time) {
	for len(s.order) > 0 && now.After(s.items[s.order[0]].Expires) {
		s.drop(s.order[0])
	}
}

// drop forgets one artifact; a file that cannot be removed now goes at the next start. mu is held.
func (s *Store) drop(id string) {
	it := s.items[id]
	delete(s.items, id)
	s.order = slices.DeleteFunc(s.order, func(o string) bool { return o == id })
	s.size -= it.Size
	if s.root != nil {
		_ = s.root.Remove(id + suffix)
	}
}

func (s *Store) run(_ context.Context, c *call.Call) (*call.Result, error) {
	u, err := url.Parse(c.Name)
	if err != nil {
		return nil, call.Errorf(call.NotFound, "no such artifact")
	}
	number := func(name string, otherwise int64) (int64, error) {
		v := u.Query().Get(name)
		if v == "" {
			return otherwise, nil
		}
		n, err := strconv.ParseInt(v, 10, 64)
		if err != nil || n < 0 {
			return 0, call.Errorf(call.Invalid, "%s must be a whole number from 0", name)
		}
		return n, nil
	}
	offset, err := number("offset", 0)
	if err != nil {
		return nil, err
	}
	length, err := number("length", int64(s.o.PartBytes))
	if err != nil {
		return nil, err
	}
	return s.read(c, u.Host, offset, min(length, int64(s.o.PartBytes)))
}

// read returns one part. Unknown, expired and other people's artifacts look alike.
func (s *Store) read(c *call.Call, id string, offset, length int64) (*call.Result, error) {
	s.mu.Lock()
	s.expire(time.Now())
	it := s.items[id]
	s.mu.Unlock()
	if it == nil || it.owner != ownerOf(c.Principal) {
		return nil, call.Errorf(call.NotFound, "no such artifact, or it has expired; make the call again that led to it")
	}
	if offset > it.Size {
		return nil, call.Errorf(call.Invalid, "offset %d is past the end: the artifact has %d bytes", offset, it.Size)
	}
	part := make([]byte, min(length, it.Size-offset))
	if err := s.fill(part, it, id, offset); err != nil {
		return nil, call.Errorf(call.Unavailable, "the artifact cannot be read now").Because(err)
	}
	b := append(jsontext.Value(nil), `[{"uri":`...)
	b = call.AppendString(b, c.Name)
	b = call.AppendString(append(b, `,"mimeType":`...), it.MIME)
	if text := wholeRunes(part); text != nil {
		part = text
		b = call.AppendString(append(b, `,"text":`...), string(part))
	} else {
		b = call.AppendString(append(b, `,"blob":`...), base64.StdEncoding.EncodeToString(part))
	}
	b = append(b, `,"_meta":{"dev.newel/offset":`...)
	b = strconv.AppendInt(b, offset, 10)
	b = strconv.AppendInt(append(b, `,"dev.newel/total":`...), it.Size, 10)
	b = call.AppendString(append(b, `,"dev.newel/sha256":`...), it.SHA256)
	if next := offset + int64(len(part)); next < it.Size && len(part) > 0 {
		b = strconv.AppendInt(append(b, `,"dev.newel/next":`...), next, 10)
	}
	return &call.Result{Content: append(b, "}}]"...)}, nil
}

func (s *Store) fill(part []byte, it *item, id string, offset int64) error {
	if s.root == nil {
		copy(part, it.data[offset:])
		return nil
	}
	f, err := s.root.Open(id + suffix)
	if err != nil {
		return err
	}
	_, err = io.ReadFull(io.NewSectionReader(f, offset, int64(len(part))), part)
	return errors.Join(err, f.Close())
}

// wholeRunes returns part without a rune that its end cuts, or nil if it is not text.
func wholeRunes(part []byte) []byte {
	for cut := range utf8.UTFMax {
		if cut > len(part) {
			break
		}
		if t := part[:len(part)-cut]; utf8.Valid(t) && (len(t) > 0 || len(part) == 0) {
			return t
		}
	}
	return nil
}
