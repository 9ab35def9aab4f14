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
	s, err := New(t.Context(), o)
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
	a, err := s.Put(context.Background(), owner, "report", "text/plain", []byte(data))
	if err != nil {
		t.Fatal(err)
	}
	check(t, s)
	return a
}

// check holds the whole state of the store to what must always be true.
func check(t testing.TB, s *Store) {
	t.Helper()
	s.sweep(context.Background())
	s.mu.Lock()
	defer s.mu.Unlock()
	size, count := int64(0), 0
	for name, tn := range s.tenants {
		sum, classes := int64(0), map[int]int64{}
		for who, o := range tn.owners {
			mine := int64(0)
			for i, it := range o.items {
				if s.items[it.id] != it || it.tenant != name || it.owner != who {
					t.Errorf("%s is in the list of %s but not in the map", it.id, who)
				}
				if i > 0 && it.created.Before(o.items[i-1].created) {
					t.Errorf("%s is older than what stands before it", it.id)
				}
				mine += it.size
				classes[it.class] += it.size
				count++
			}
			if mine != o.size || o.writing != 0 || len(o.items) == 0 {
				t.Errorf("%s has %d bytes in %d artifacts, counted as %d; %d are being written", who, mine, len(o.items), o.size, o.writing)
			}
			sum += mine
		}
		if sum != tn.size {
			t.Errorf("%s has %d bytes, counted as %d", name, sum, tn.size)
		}
		for class, n := range tn.classes {
			if classes[class] != n || n > s.mostOf(class) {
				t.Errorf("%s has %d bytes of class %d, counted as %d", name, classes[class], class, n)
			}
		}
		size += sum
	}
	if size != s.size || count != s.count || count != len(s.items) || size > s.o.MaxBytes || count > s.o.MaxCount || len(s.writing)+len(s.gone) != 0 {
		t.Errorf("%d bytes in %d artifacts, counted as %d in %d; %d in the map", size, count, s.size, s.count, len(s.items))
	}
	kept := 0
	for e, err := range s.shelf.List(context.Background()) {
		if err != nil {
			t.Error(err)
		}
		if it := s.items[e.Name]; it == nil || it.begin+it.size != e.Size {
			if _, foreign := s.foreign[e.Name]; !foreign {
				t.Errorf("%s belongs to nothing", e.Name)
			}
			continue
		}
		kept++
	}
	if kept != len(s.items) {
		t.Errorf("%d blobs for %d artifacts", kept, len(s.items))
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
		if !isID(id) || len(id)*5 < 256 || seen[id] {
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
			if check(t, s); len(s.items) != 0 {
				t.Errorf("%d left", len(s.items))
			}
			cancel()
			all.Wait()
		})
	})
}

// left names what is there by the first two bytes of each, in order.
func left(t *testing.T, s *Store) string {
	t.Helper()
	var names []string
	for _, it := range s.items {
		head := make([]byte, 2)
		if err := s.fill(t.Context(), it, head, 0); err != nil {
			t.Fatal(err)
		}
		names = append(names, string(head))
	}
	slices.Sort(names)
	return strings.Join(names, " ")
}

// The oldest goes first: of the tenant that has most, and of its principal who has most.
func TestFull(t *testing.T) {
	everywhere(t, func(t *testing.T, dir string) {
		s := open(t, Options{Dir: dir, MaxBytes: 100})
		eve := &call.Principal{ID: "eve", Tenant: "other"}
		put(t, s, bob, "b1"+strings.Repeat(".", 18))
		put(t, s, alice, "a1"+strings.Repeat(".", 28))
		put(t, s, alice, "a2"+strings.Repeat(".", 18))
		put(t, s, eve, "e1"+strings.Repeat(".", 23))
		put(t, s, eve, "e2"+strings.Repeat(".", 13)) // 110: acme has most, and alice most of it
		if got := left(t, s); got != "a2 b1 e1 e2" {
			t.Errorf("left: %s", got)
		}
		for range 20 {
			put(t, s, eve, "e3"+strings.Repeat(".", 38)) // who puts much pays for it
		}
		if got := left(t, s); got != "a2 b1 e3" {
			t.Errorf("left: %s", got)
		}
		if _, err := s.Put(t.Context(), bob, "report", "text/plain", make([]byte, 101)); codeOf(err) != call.TooLarge {
			t.Errorf("larger than the store: %v", err)
		}
		put(t, s, bob, "b3"+strings.Repeat(".", 98))
		if got := left(t, s); got != "b3" {
			t.Errorf("left: %s", got)
		}
	})
}

// A tenant with many principals pays for all of them.
func TestTenantOfManyPaysForAll(t *testing.T) {
	s := open(t, Options{MaxBytes: 100})
	eve := &call.Principal{ID: "eve", Tenant: "other"}
	put(t, s, eve, "e1"+strings.Repeat(".", 28))
	for _, id := range []string{"a", "b", "c"} {
		put(t, s, &call.Principal{ID: id, Tenant: "acme"}, id+"1"+strings.Repeat(".", 18))
	}
	put(t, s, eve, "e2"+strings.Repeat(".", 18))
	if got := left(t, s); !strings.Contains(got, "e1 e2") || len(got) != len("a1 b1 e1 e2") {
		t.Errorf("left: %s", got)
	}
}

// A busy shelf lets something happen between what a look reads and what it makes of it, and loses
// the answers to what it did.
type busy struct {
	Shelf
	between func()
	lost    bool
}

func (b *busy) Get(ctx context.Context, name string, offset, length int64) ([]byte, error) {
	data, err := b.Shelf.Get(ctx, name, offset, length)
	if f := b.between; f != nil {
		b.between = nil
		f()
	}
	return data, err
}

func (b *busy) Put(ctx context.Context, name string, blob []byte) error {
	err := b.Shelf.Put(ctx, name, blob)
	if b.lost {
		return errors.New("the connection was cut")
	}
	return err
}

// What was found, dropped and deleted while a look was on its way does not come back with it.
func TestDroppedDuringLook(t *testing.T) {
	b := &busy{Shelf: Memory()}
	s := open(t, Options{Shelf: b})
	a := put(t, open(t, Options{Shelf: b}), alice, "of another process")
	b.between = func() {
		if _, err := read(t, s, alice, a.URI); err != nil {
			t.Error(err)
		}
		s.mu.Lock()
		s.drop(s.items[strings.TrimPrefix(a.URI, scheme)])
		s.mu.Unlock()
		s.sweep(t.Context())
	}
	if err := s.look(t.Context()); err != nil {
		t.Fatal(err)
	}
	check(t, s)
	if len(s.items) != 0 {
		t.Error("it is back")
	}
}

// What another process deleted is forgotten; what was put while the look was on its way is not.
func TestLook(t *testing.T) {
	b := &busy{Shelf: Memory()}
	s := open(t, Options{Shelf: b})
	if err := b.Delete(t.Context(), strings.TrimPrefix(put(t, s, alice, "a1").URI, scheme)); err != nil {
		t.Fatal(err)
	}
	put(t, open(t, Options{Shelf: b}), alice, "b1")
	b.between = func() {
		if _, err := s.Put(t.Context(), alice, "report", "text/plain", []byte("c1")); err != nil {
			t.Error(err)
		}
	}
	if err := s.look(t.Context()); err != nil {
		t.Fatal(err)
	}
	check(t, s)
	if got := left(t, s); got != "b1 c1" {
		t.Errorf("known: %s", got)
	}
}

// What arrived although its answer was lost is deleted.
func TestLostAnswer(t *testing.T) {
	b := &busy{Shelf: Memory(), lost: true}
	s := open(t, Options{Shelf: b})
	if _, err := s.Put(t.Context(), alice, "report", "text/plain", []byte("x")); codeOf(err) != call.Unavailable {
		t.Errorf("got %v", err)
	}
	if err := s.look(t.Context()); err != nil {
		t.Fatal(err)
	}
	check(t, s)
	for e := range b.List(t.Context()) {
		t.Errorf("%s is left", e.Name)
	}
}

func TestClasses(t *testing.T) {
	everywhere(t, func(t *testing.T, dir string) {
		synctest.Test(t, func(t *testing.T) {
			classes := []Class{{Tools: []string{"export/*"}, MaxBytes: 50, Retention: 10 * time.Minute}, {Tools: []string{"*"}, Retention: 2 * time.Hour}}
			s := open(t, Options{Dir: dir, MaxBytes: 1000, Classes: classes})
			other := &call.Principal{ID: "eve", Tenant: "other"}
			keep := func(who *call.Principal, tool, data string) call.Artifact {
				t.Helper()
				a, err := s.Put(t.Context(), who, tool, "text/plain", []byte(data))
				if err != nil {
					t.Fatal(err)
				}
				check(t, s)
				time.Sleep(time.Second)
				return a
			}
			keep(alice, "report", "r1"+strings.Repeat(".", 98))
			keep(other, "export/all", "x0"+strings.Repeat(".", 38))
			a := keep(alice, "export/all", "x1"+strings.Repeat(".", 18))
			if got := a.Expires.Sub(a.Created); got != 10*time.Minute {
				t.Errorf("an export is kept for %v", got)
			}
			keep(bob, "export/some/a", "x2"+strings.Repeat(".", 18))
			keep(alice, "export/all", "x3"+strings.Repeat(".", 18)) // 60 bytes of exports of acme: the oldest goes
			if got := left(t, s); got != "r1 x0 x2 x3" {
				t.Errorf("left: %s", got)
			}
			if _, err := s.Put(t.Context(), alice, "export/all", "text/plain", make([]byte, 51)); codeOf(err) != call.TooLarge {
				t.Errorf("larger than its class: %v", err)
			}
			if dir != "" { // what the operator says now holds for what is there
				classes[0].MaxBytes, classes[1].Retention = 30, time.Minute
				s = open(t, Options{Dir: dir, MaxBytes: 1000, Classes: classes})
				check(t, s)
				if got := left(t, s); got != "r1 x3" {
					t.Errorf("left with smaller bounds: %s", got)
				}
			}
			time.Sleep(11 * time.Minute)
			s.mu.Lock()
			s.expire(time.Now())
			s.mu.Unlock()
			check(t, s)
			if want := map[bool]string{true: "r1", false: ""}[dir == ""]; left(t, s) != want {
				t.Errorf("left after eleven minutes: %s", left(t, s))
			}
		})
	})
}

func TestCountIsBounded(t *testing.T) {
	s := open(t, Options{MaxCount: 3})
	for range 10 {
		put(t, s, alice, "")
	}
	if len(s.items) != 3 {
		t.Errorf("%d artifacts", len(s.items))
	}
}

func TestAnotherProcess(t *testing.T) {
	dir := t.TempDir()
	s := open(t, Options{Dir: dir})
	kept := put(t, s, alice, "kept")
	binary, err := s.Put(t.Context(), nil, "report", "application/octet-stream", []byte{0xff, 0})
	if err != nil {
		t.Fatal(err)
	}
	truncated := put(t, s, alice, "truncated")
	broken := put(t, s, alice, "broken")
	id := func(a call.Artifact) string { return strings.TrimPrefix(a.URI, scheme) }
	foreign, old, young := strings.Repeat("A", idLength), strings.Repeat("B", idLength)+tmpSuffix, strings.Repeat("C", idLength)+tmpSuffix
	cut, err := os.ReadFile(filepath.Join(dir, id(truncated)))
	if err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string]string{
		id(truncated): string(cut[:len(cut)-1]),
		id(broken):    strings.Repeat("0", 64) + "\n{\"owner\":",
		foreign:       "not made with this key",
		old:           "half of the da", // of a process that is gone
		young:         "half of the da", // of a process that writes it now
		"notes.txt":   "not ours",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(data), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	yesterday := time.Now().Add(-24 * time.Hour)
	if err := os.Chtimes(filepath.Join(dir, old), yesterday, yesterday); err != nil {
		t.Fatal(err)
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
	if err := os.Chtimes(filepath.Join(dir, foreign), yesterday, yesterday); err != nil {
		t.Fatal(err)
	}
	check(t, open(t, Options{Dir: dir}))
	for name, there := range map[string]bool{"notes.txt": true, young: true, old: false, id(broken): true, foreign: false} {
		if _, err := os.Stat(filepath.Join(dir, name)); (err == nil) != there {
			t.Errorf("%s: %v", name, err)
		}
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

// unsynced is a file whose data does not reach the disk.
type unsynced struct{ target }

func (f unsynced) Sync() error { return errors.New("input/output error") }

func TestSyncFails(t *testing.T) {
	s := open(t, Options{Dir: t.TempDir()})
	d := s.shelf.(*dir)
	create := d.create
	d.create = func(name string) (target, error) {
		f, err := create(name)
		return unsynced{f}, err
	}
	if _, err := s.Put(t.Context(), alice, "report", "text/plain", []byte("x")); codeOf(err) != call.Unavailable {
		t.Errorf("got %v", err)
	}
	check(t, s)
	entries, err := fs.ReadDir(d.root.FS(), ".")
	if err != nil || len(entries) != 0 {
		t.Errorf("left: %v, %v", entries, err)
	}
}

func TestDiskFull(t *testing.T) {
	for room := 0; ; room += 17 { // some in the data, some in the record
		s := open(t, Options{Dir: t.TempDir()})
		put(t, s, alice, "before")
		d := s.shelf.(*dir)
		create, left := d.create, room
		d.create = func(name string) (target, error) {
			f, err := create(name)
			return short{f, &left}, err
		}
		a, err := s.Put(t.Context(), alice, "report", "text/plain", []byte(strings.Repeat("x", 100)))
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
		if len(s.items) != 1 {
			t.Fatalf("room for %d bytes: %d artifacts", room, len(s.items))
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
	if _, err := s.Put(t.Context(), alice, "report", "text/plain", []byte("y")); codeOf(err) != call.Unavailable || strings.Contains(call.AsError(err).Message, dir) {
		t.Errorf("writing: %v", err)
	}
	if _, err := read(t, s, alice, a.URI); codeOf(err) != call.NotFound {
		t.Errorf("reading: %v", err)
	}

	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := New(t.Context(), Options{Dir: file}); err == nil {
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
					a, err := s.Put(t.Context(), owner, "report", "text/plain", []byte(data))
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
	for _, o := range []Options{{MaxBytes: -1}, {MaxCount: -1}, {Retention: -1}, {PartBytes: -1}, {PartBytes: 100}, {Key: []byte("short")}, {Shelf: Memory(), Dir: "x"},
		{Classes: []Class{{}}}, {Classes: []Class{{Tools: []string{"["}}}}, {Links: Links{Base: "https://x", Life: 1}}, {Key: make([]byte, 32), Links: Links{Base: "x", Life: 1}}} {
		if _, err := New(t.Context(), o); err == nil {
			t.Errorf("%+v was taken", o)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := open(t, Options{}).Put(ctx, alice, "report", "text/plain", nil); codeOf(err) != call.Canceled {
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
				if _, err := s.Put(b.Context(), alice, "report", "text/plain", data); err != nil {
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
