package artifact

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"

	"github.com/go-json-experiment/json"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/backend/backendtest"
)

var (
	alice = &call.Principal{ID: "alice", Tenant: "acme"}
	bob   = &call.Principal{ID: "bob", Tenant: "acme"}
)

func open(t testing.TB, o Options) *Store {
	t.Helper()
	s, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// everywhere runs a test in memory and in a folder.
func everywhere(t *testing.T, test func(t *testing.T, dir string)) {
	t.Run("memory", func(t *testing.T) { test(t, "") })
	t.Run("folder", func(t *testing.T) { test(t, t.TempDir()) })
}

func put(t testing.TB, s *Store, owner *call.Principal, data string) call.Artifact {
	t.Helper()
	a, err := s.Put(context.Background(), owner, "text/plain", []byte(data))
	if err != nil {
		t.Fatal(err)
	}
	check(t, s)
	return a
}

// check holds the whole state of the store to what must always be true.
func check(t testing.TB, s *Store) {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	size, owners := int64(0), map[string]int64{}
	for e := s.used.Front(); e != nil; e = e.Next() {
		it := itemOf(e)
		size += it.size
		owners[it.owner] += it.size
		if s.items[it.id] != e {
			t.Errorf("%s is in the list but not in the map", it.id)
		}
	}
	if size != s.size || s.count != s.used.Len() || len(s.items) != s.used.Len() || size > s.o.MaxBytes || s.count > s.o.MaxCount {
		t.Errorf("%d bytes in %d artifacts, counted as %d in %d; %d in the map", size, s.used.Len(), s.size, s.count, len(s.items))
	}
	for owner, n := range s.owners {
		if owners[owner] != n {
			t.Errorf("%s has %d bytes, counted as %d", owner, owners[owner], n)
		}
	}
	if s.disk == nil {
		return
	}
	entries, err := fs.ReadDir(s.disk.root.FS(), ".")
	if err != nil {
		t.Error(err)
	}
	files := 0
	for _, e := range entries {
		if id, suffix := split(e.Name()); suffix != "" {
			files++
			if s.items[id] == nil {
				t.Errorf("%s belongs to nothing", e.Name())
			}
		}
	}
	if files != 2*len(s.items) {
		t.Errorf("%d files for %d artifacts", files, len(s.items))
	}
}

// A part is one content of a read.
type part struct {
	URI, MimeType string
	Text          *string
	Blob          []byte
	Meta          struct {
		Offset int    `json:"dev.newel/offset"`
		Total  int    `json:"dev.newel/total"`
		Next   int    `json:"dev.newel/next"`
		SHA256 string `json:"dev.newel/sha256"`
	} `json:"_meta"`
}

func read(t testing.TB, s *Store, who *call.Principal, uri string) (part, error) {
	t.Helper()
	r, err := s.run(context.Background(), &call.Call{Kind: call.Resource, Name: uri, Principal: who})
	if err != nil {
		return part{}, err
	}
	var parts []part
	if err := json.Unmarshal(r.Content, &parts, json.MatchCaseInsensitiveNames(true)); err != nil || len(parts) != 1 {
		t.Fatalf("%v in %s", err, r.Content)
	}
	return parts[0], nil
}

func codeOf(err error) call.Code {
	if err == nil {
		return call.OK
	}
	return call.AsError(err).Code
}

func TestSuite(t *testing.T) {
	everywhere(t, func(t *testing.T, dir string) {
		s := open(t, Options{Dir: dir})
		known := put(t, s, nil, "what a tool said").URI
		first := true
		backendtest.Run(t, func(t *testing.T) call.Backend {
			if first && dir != "" {
				first = false
				return open(t, Options{Dir: t.TempDir()}) // only its list is looked at
			}
			return struct{ call.Backend }{s} // the suite must not close what this test goes on with
		}, []backendtest.Sample{
			{Kind: call.Resource, Name: known},
			{Kind: call.Resource, Name: known + "?offset=5&length=3"},
			{Kind: call.Resource, Name: known + "?offset=-1", Want: call.Invalid},
			{Kind: call.Resource, Name: known + "?offset=99", Want: call.Invalid},
			{Kind: call.Resource, Name: known + "?length=0", Want: call.Invalid},
			{Kind: call.Resource, Name: known + "?length=x", Want: call.Invalid},
			{Kind: call.Resource, Name: "artifact://unknown", Want: call.NotFound},
		})
	})
}

func TestReadInParts(t *testing.T) {
	text := strings.Repeat("aé数😀\n", 500)
	binary := make([]byte, 5000)
	if _, err := rand.Read(binary); err != nil {
		t.Fatal(err)
	}
	binary[0] = 0xff // certainly not text
	everywhere(t, func(t *testing.T, dir string) {
		s := open(t, Options{Dir: dir, PartBytes: 1024})
		for _, data := range []string{text, string(binary), "", "x"} {
			a := put(t, s, alice, data)
			for _, length := range []int{1, 2, 3, 7, 1000, 1024, 5000} {
				var got []byte
				for offset, rounds := 0, 0; ; rounds++ {
					p, err := read(t, s, alice, fmt.Sprintf("%s?offset=%d&length=%d", a.URI, offset, length))
					if err != nil {
						t.Fatal(err)
					}
					if p.Meta.Offset != offset || p.Meta.Total != len(data) || p.Meta.SHA256 != a.SHA256 || p.MimeType != "text/plain" {
						t.Fatalf("offset %d: %+v", offset, p.Meta)
					}
					piece := p.Blob
					if utf8.ValidString(data) {
						if p.Text == nil || !utf8.ValidString(*p.Text) {
							t.Fatalf("offset %d: not text", offset)
						}
						piece = []byte(*p.Text)
					}
					if len(piece) > max(min(length, 1024), utf8.UTFMax) {
						t.Fatalf("%d bytes, asked for %d", len(piece), length)
					}
					got = append(got, piece...)
					if p.Meta.Next == 0 {
						break
					}
					if p.Meta.Next <= offset || rounds > len(data) {
						t.Fatalf("no way forward from %d", offset)
					}
					offset = p.Meta.Next
				}
				if string(got) != data {
					t.Errorf("in parts of %d: %d bytes, want %d", length, len(got), len(data))
				}
			}
		}
	})
}

// A reader that starts anywhere in a text gets the character it pointed into.
func TestOffsetWithinCharacter(t *testing.T) {
	s := open(t, Options{})
	a := put(t, s, alice, "ab😀cd") // the face has bytes 2 to 5
	for offset, want := range map[int]string{0: "ab😀cd", 2: "😀cd", 3: "😀cd", 5: "😀cd", 6: "cd", 8: ""} {
		p, err := read(t, s, alice, fmt.Sprintf("%s?offset=%d", a.URI, offset))
		if err != nil || *p.Text != want || p.Meta.Offset != 8-len(want) || p.Meta.Next != 0 {
			t.Errorf("from %d: %q at %d, %v; want %q", offset, *p.Text, p.Meta.Offset, err, want)
		}
	}
}

func TestOnlyTheOwnerReads(t *testing.T) {
	everywhere(t, func(t *testing.T, dir string) {
		s := open(t, Options{Dir: dir})
		for owner, others := range map[*call.Principal][]*call.Principal{
			alice: {nil, bob, {ID: "alice", Tenant: "other"}, {ID: "ALICE", Tenant: "acme"}},
			nil:   {alice, bob, {}, {ID: "local"}},
		} {
			a := put(t, s, owner, "secret")
			if p, err := read(t, s, owner, a.URI); err != nil || *p.Text != "secret" {
				t.Errorf("the owner got %v, %v", p, err)
			}
			_, unknown := read(t, s, owner, scheme+strings.Repeat("A", idLength))
			for _, other := range others {
				if _, err := read(t, s, other, a.URI); codeOf(err) != call.NotFound || err.Error() != unknown.Error() {
					t.Errorf("%+v got %v", other, err)
				}
			}
		}
	})
}

func TestNamesCannotBeGuessed(t *testing.T) {
	s := open(t, Options{})
	seen := map[string]bool{}
	for range 100 {
		id := strings.TrimPrefix(put(t, s, nil, "x").URI, scheme)
		if _, suffix := split(id + dataSuffix); suffix != dataSuffix || len(id)*5 < 256 || seen[id] {
			t.Fatalf("name %q", id)
		}
		seen[id] = true
	}
}

func TestExpiry(t *testing.T) {
	everywhere(t, func(t *testing.T, dir string) {
		synctest.Test(t, func(t *testing.T) {
			s := open(t, Options{Dir: dir, Retention: time.Hour})
			a := put(t, s, alice, "old")
			if got := a.Expires.Sub(a.Created); got != time.Hour {
				t.Errorf("kept for %v", got)
			}
			time.Sleep(59 * time.Minute)
			young := put(t, s, alice, "young")
			if _, err := read(t, s, alice, a.URI); err != nil {
				t.Errorf("a minute too early: %v", err)
			}
			time.Sleep(time.Minute)
			if _, err := read(t, s, alice, a.URI); codeOf(err) != call.NotFound {
				t.Errorf("expired: %v", err)
			}
			if _, err := read(t, s, alice, young.URI); err != nil {
				t.Errorf("the young one: %v", err)
			}
			check(t, s)
		})
	})
}

func TestRunDeletes(t *testing.T) {
	everywhere(t, func(t *testing.T, dir string) {
		synctest.Test(t, func(t *testing.T) {
			s := open(t, Options{Dir: dir, Retention: time.Hour})
			ctx, cancel := context.WithCancel(t.Context())
			var all sync.WaitGroup
			all.Go(func() {
				if err := s.Run(ctx, nil, nil); err != nil {
					t.Error(err)
				}
			})
			put(t, s, alice, "x")
			time.Sleep(time.Hour + time.Minute)
			synctest.Wait()
			if check(t, s); s.used.Len() != 0 {
				t.Errorf("%d left", s.used.Len())
			}
			cancel()
			all.Wait()
		})
	})
}

// What was not used for longest goes first, and who has most pays first.
func TestFull(t *testing.T) {
	everywhere(t, func(t *testing.T, dir string) {
		s := open(t, Options{Dir: dir, MaxBytes: 100})
		left := func() string {
			var items []*item // reading reorders the list
			for e := s.used.Front(); e != nil; e = e.Next() {
				items = append(items, itemOf(e))
			}
			var names []string
			for _, it := range items {
				who := alice
				if it.owner == ownerOf(bob) {
					who = bob
				}
				p, err := read(t, s, who, scheme+it.id)
				if err != nil {
					t.Fatal(err)
				}
				names = append(names, (*p.Text)[:2])
			}
			slices.Sort(names)
			return strings.Join(names, " ")
		}
		put(t, s, bob, "b1"+strings.Repeat(".", 18))
		a1 := put(t, s, alice, "a1"+strings.Repeat(".", 28))
		put(t, s, alice, "a2"+strings.Repeat(".", 28))
		if _, err := read(t, s, alice, a1.URI); err != nil {
			t.Fatal(err)
		}
		put(t, s, bob, "b2"+strings.Repeat(".", 28)) // alice has most; a2 was not used for longest
		if got := left(); got != "a1 b1 b2" {
			t.Errorf("left: %s", got)
		}
		if _, err := s.Put(t.Context(), bob, "text/plain", make([]byte, 101)); codeOf(err) != call.TooLarge {
			t.Errorf("larger than the store: %v", err)
		}
		put(t, s, bob, "b3"+strings.Repeat(".", 98))
		if got := left(); got != "b3" {
			t.Errorf("left: %s", got)
		}
	})
}

func TestCountIsBounded(t *testing.T) {
	s := open(t, Options{MaxCount: 3})
	for range 10 {
		put(t, s, alice, "")
	}
	if s.used.Len() != 3 {
		t.Errorf("%d artifacts", s.used.Len())
	}
}

func TestAnotherProcess(t *testing.T) {
	dir := t.TempDir()
	s := open(t, Options{Dir: dir})
	kept := put(t, s, alice, "kept")
	binary, err := s.Put(t.Context(), nil, "application/octet-stream", []byte{0xff, 0})
	if err != nil {
		t.Fatal(err)
	}
	truncated := put(t, s, alice, "truncated")
	broken := put(t, s, alice, "broken")
	id := func(a call.Artifact) string { return strings.TrimPrefix(a.URI, scheme) }
	for name, data := range map[string]string{
		id(truncated) + dataSuffix:                             "trunc",
		id(broken) + recordSuffix:                              `{"owner":`,
		strings.Repeat("A", idLength) + dataSuffix:             "data without a record",
		strings.Repeat("B", idLength) + dataSuffix + tmpSuffix: "half of the da",
		"notes.txt": "not ours",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(data), 0o600); err != nil {
			t.Fatal(err)
		}
	}

	next := open(t, Options{Dir: dir})
	check(t, next)
	if p, err := read(t, next, alice, kept.URI); err != nil || *p.Text != "kept" || p.Meta.SHA256 != kept.SHA256 {
		t.Errorf("what was kept: %+v, %v", p, err)
	}
	if p, err := read(t, next, nil, binary.URI); err != nil || !bytes.Equal(p.Blob, []byte{0xff, 0}) || p.MimeType != "application/octet-stream" {
		t.Errorf("what was binary: %+v, %v", p, err)
	}
	for _, a := range []call.Artifact{truncated, broken} {
		if _, err := read(t, next, alice, a.URI); codeOf(err) != call.NotFound {
			t.Errorf("what was damaged: %v", err)
		}
	}
	if _, err := os.Stat(filepath.Join(dir, "notes.txt")); err != nil {
		t.Errorf("a file that is not ours: %v", err)
	}

	small := open(t, Options{Dir: dir, MaxBytes: 3})
	check(t, small)
	if _, err := read(t, small, alice, kept.URI); codeOf(err) != call.NotFound {
		t.Errorf("over a bound that became smaller: %v", err)
	}
}

// short is a file on a disk that is full after so many bytes.
type short struct {
	target
	left *int
}

func (f short) Write(b []byte) (int, error) {
	n := min(len(b), *f.left)
	*f.left -= n
	n, err := f.target.Write(b[:n])
	if err == nil && n < len(b) {
		err = &fs.PathError{Op: "write", Path: "x", Err: syscall.ENOSPC}
	}
	return n, err
}

func TestDiskFull(t *testing.T) {
	for room := 0; ; room += 17 { // some in the data, some in the record
		s := open(t, Options{Dir: t.TempDir()})
		put(t, s, alice, "before")
		create, left := s.disk.create, room
		s.disk.create = func(name string) (target, error) {
			f, err := create(name)
			return short{f, &left}, err
		}
		a, err := s.Put(t.Context(), alice, "text/plain", []byte(strings.Repeat("x", 100)))
		check(t, s)
		if err == nil {
			if _, err := read(t, s, alice, a.URI); err != nil || room < 200 {
				t.Errorf("room for %d bytes: %v", room, err)
			}
			break
		}
		if codeOf(err) != call.Unavailable || !strings.Contains(call.AsError(err).Message, "disk is full") || !errors.Is(err, syscall.ENOSPC) {
			t.Fatalf("room for %d bytes: %v", room, err)
		}
		if s.used.Len() != 1 {
			t.Fatalf("room for %d bytes: %d artifacts", room, s.used.Len())
		}
	}
}

func TestFolderGone(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "artifacts")
	s := open(t, Options{Dir: dir})
	a := put(t, s, alice, "x")
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Put(t.Context(), alice, "text/plain", []byte("y")); codeOf(err) != call.Unavailable || strings.Contains(call.AsError(err).Message, dir) {
		t.Errorf("writing: %v", err)
	}
	if _, err := read(t, s, alice, a.URI); codeOf(err) != call.NotFound {
		t.Errorf("reading: %v", err)
	}

	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := New(Options{Dir: file}); err == nil {
		t.Error("a file was taken for a folder")
	}
}

func TestManyAtOnce(t *testing.T) {
	everywhere(t, func(t *testing.T, dir string) {
		s := open(t, Options{Dir: dir, MaxBytes: 1000, MaxCount: 20})
		var all sync.WaitGroup
		for i := range 8 {
			all.Go(func() {
				owner := []*call.Principal{alice, bob, nil}[i%3]
				for n := range 20 {
					data := strings.Repeat("x", 10*n)
					a, err := s.Put(t.Context(), owner, "text/plain", []byte(data))
					if codeOf(err) == call.Exhausted {
						continue
					}
					if err != nil {
						t.Error(err)
						continue
					}
					if p, err := read(t, s, owner, a.URI); codeOf(err) != call.NotFound && (err != nil || *p.Text != data) {
						t.Errorf("%v, %v", p, err)
					}
				}
			})
		}
		all.Wait()
		check(t, s)
	})
}

func TestNewRefuses(t *testing.T) {
	for _, o := range []Options{{MaxBytes: -1}, {MaxCount: -1}, {Retention: -1}, {PartBytes: -1}, {PartBytes: 100}} {
		if _, err := New(o); err == nil {
			t.Errorf("%+v was taken", o)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := open(t, Options{}).Put(ctx, alice, "text/plain", nil); codeOf(err) != call.Canceled {
		t.Errorf("a caller who is gone: %v", err)
	}
}

func BenchmarkPut(b *testing.B) {
	data := []byte(strings.Repeat("x", 512<<10))
	for name, dir := range map[string]string{"memory": "", "folder": b.TempDir()} {
		b.Run(name, func(b *testing.B) {
			s := open(b, Options{Dir: dir, MaxBytes: 16 << 20})
			b.SetBytes(int64(len(data)))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := s.Put(b.Context(), alice, "text/plain", data); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkRead(b *testing.B) {
	for name, dir := range map[string]string{"memory": "", "folder": b.TempDir()} {
		b.Run(name, func(b *testing.B) {
			s := open(b, Options{Dir: dir})
			c := &call.Call{Kind: call.Resource, Name: put(b, s, alice, strings.Repeat("x", 512<<10)).URI + "?offset=65536", Principal: alice}
			b.SetBytes(64 << 10)
			b.ReportAllocs()
			for b.Loop() {
				if _, err := s.run(b.Context(), c); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
