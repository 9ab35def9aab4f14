// Package shelftest is what every shelf of artifacts must do, and what a store of artifacts must do
// on each.
package shelftest

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-json-experiment/json"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/backend/artifact"
)

// A Place is where a shelf stands.
type Place struct {
	// Open opens it as another process would. It begins empty.
	Open func(t *testing.T) artifact.Shelf
	// Change lets somebody else change a blob, behind the back of the shelf.
	Change func(t *testing.T, name string, to func(blob []byte) []byte)
}

// Run tests a place that is empty, and leaves it empty.
func Run(t *testing.T, p Place) {
	s := suite{p}
	t.Run("blobs", s.blobs)
	t.Run("many at once", s.many)
	t.Run("gone caller", s.gone)
	for name, f := range map[string]func(*testing.T){
		"owners": s.owners, "processes": s.processes, "other key": s.otherKey, "damage": s.damage,
		"claims": s.claims, "download": s.download, "addresses": s.addresses, "bounds": s.bounds,
	} {
		t.Run(name, func(t *testing.T) {
			defer s.empty(t)
			f(t)
		})
	}
}

type suite struct{ Place }

func name() string { return rand.Text() + rand.Text() }

func names(t *testing.T, shelf artifact.Shelf) map[string]int64 {
	t.Helper()
	all := map[string]int64{}
	for e, err := range shelf.List(t.Context()) {
		if err != nil {
			t.Fatal(err)
		}
		if age := time.Since(e.Modified); age < -time.Minute || age > time.Hour {
			t.Errorf("%s was modified %v ago", e.Name, age)
		}
		all[e.Name] = e.Size
	}
	return all
}

// open opens the place until the test ends.
func (s suite) open(t *testing.T) artifact.Shelf {
	t.Helper()
	shelf := s.Open(t)
	t.Cleanup(func() {
		if err := shelf.Close(); err != nil {
			t.Error(err)
		}
	})
	return shelf
}

func (s suite) empty(t *testing.T) {
	shelf := s.open(t)
	for n := range names(t, shelf) {
		if err := shelf.Delete(t.Context(), n); err != nil {
			t.Error(err)
		}
	}
}

func (s suite) blobs(t *testing.T) {
	shelf := s.open(t)
	ctx := t.Context()
	want := map[string]int64{}
	for _, size := range []int{1, 5, 64 << 10, 3<<20 + 17} {
		n, blob := name(), make([]byte, size)
		_, _ = rand.Read(blob) // never fails
		if err := shelf.Put(ctx, n, blob); err != nil {
			t.Fatal(err)
		}
		kept := bytes.Clone(blob)
		clear(blob) // a shelf does not keep the slice
		want[n] = int64(size)
		for _, at := range [][2]int64{{0, int64(size)}, {0, 1}, {int64(size) - 1, 1}, {int64(size) / 2, int64(size)}, {0, int64(size) + 9}, {int64(size), 5}, {int64(size) + 5, 5}} {
			from, to := min(at[0], int64(size)), min(at[0]+at[1], int64(size))
			got, err := shelf.Get(ctx, n, at[0], at[1])
			if err != nil || !bytes.Equal(got, kept[from:to]) {
				t.Errorf("%d bytes, %d from %d: %d bytes, %v", size, at[1], at[0], len(got), err)
			}
		}
	}
	if got := names(t, s.open(t)); !maps.Equal(got, want) {
		t.Errorf("listed: %v, want %v", got, want)
	}
	if _, err := shelf.Get(ctx, name(), 0, 10); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("what is not there: %v", err)
	}
	for n := range want {
		for range 2 {
			if err := shelf.Delete(ctx, n); err != nil {
				t.Error(err)
			}
		}
		if _, err := shelf.Get(ctx, n, 0, 1); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("what was deleted: %v", err)
		}
	}
	if got := names(t, shelf); len(got) != 0 {
		t.Errorf("left: %v", got)
	}
}

func (s suite) many(t *testing.T) {
	shelf := s.open(t)
	var all sync.WaitGroup
	for i := range 8 {
		all.Go(func() {
			for j := range 5 {
				n, blob := name(), bytes.Repeat([]byte{byte(i), byte(j)}, 1000)
				if err := shelf.Put(t.Context(), n, blob); err != nil {
					t.Error(err)
				}
				if got, err := shelf.Get(t.Context(), n, 0, 2000); err != nil || !bytes.Equal(got, blob) {
					t.Errorf("%d bytes, %v", len(got), err)
				}
				if err := shelf.Delete(t.Context(), n); err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
}

func (s suite) gone(t *testing.T) {
	shelf := s.open(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := shelf.Put(ctx, name(), []byte("x")); err == nil {
		t.Error("written for a caller who is gone")
	}
	if got := names(t, shelf); len(got) != 0 {
		t.Errorf("left: %v", got)
	}
}

var (
	alice = &call.Principal{ID: "alice", Tenant: "acme"}
	key   = bytes.Repeat([]byte{7}, 32)
)

const base = "https://mcp.example.com"

func (s suite) store(t *testing.T, change func(*artifact.Options)) *artifact.Store {
	t.Helper()
	o := artifact.Options{Shelf: s.open(t), Key: key, Links: artifact.Links{Base: base, Life: time.Minute}}
	if change != nil {
		change(&o)
	}
	st, err := artifact.New(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	return st
}

func put(t *testing.T, st *artifact.Store, who *call.Principal, mime string, data []byte) call.Artifact {
	t.Helper()
	a, err := st.Put(t.Context(), who, "report", mime, data)
	if err != nil {
		t.Fatal(err)
	}
	if sum := sha256.Sum256(data); a.SHA256 != hex.EncodeToString(sum[:]) || a.Size != int64(len(data)) {
		t.Errorf("%+v", a)
	}
	return a
}

// read reads one part.
func read(t *testing.T, st *artifact.Store, who *call.Principal, uri string) (text, mime string, err error) {
	t.Helper()
	caps, err := st.Capabilities(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	r, err := caps[0].Run(t.Context(), &call.Call{Kind: call.Resource, Name: uri, Principal: who})
	if err != nil {
		return "", "", err
	}
	var parts []struct {
		Text     string `json:"text"`
		Blob     []byte `json:"blob"`
		MimeType string `json:"mimeType"`
	}
	if err := json.Unmarshal(r.Content, &parts); err != nil || len(parts) != 1 {
		t.Fatalf("%v in %s", err, r.Content)
	}
	return parts[0].Text + string(parts[0].Blob), parts[0].MimeType, nil
}

func codeOf(err error) call.Code {
	if err == nil {
		return call.OK
	}
	return call.AsError(err).Code
}

func idOf(a call.Artifact) string { return strings.TrimPrefix(a.URI, "artifact://") }

// Nobody but its owner reads an artifact, and nobody learns that it is there.
func (s suite) owners(t *testing.T) {
	st := s.store(t, nil)
	a := put(t, st, alice, "text/plain", []byte("secret"))
	if text, _, err := read(t, st, alice, a.URI); err != nil || text != "secret" {
		t.Errorf("the owner: %q, %v", text, err)
	}
	_, _, unknown := read(t, st, alice, "artifact://"+name())
	for _, who := range []*call.Principal{nil, {}, {ID: "bob", Tenant: "acme"}, {ID: "alice"}, {ID: "alice", Tenant: "other"}, {ID: "acmealice"}} {
		if _, _, err := read(t, st, who, a.URI); codeOf(err) != call.NotFound || err.Error() != unknown.Error() {
			t.Errorf("%+v: %v", who, err)
		}
	}
	id := idOf(a)
	for _, guess := range []string{"", ".", "..", "../" + id, id + "/", strings.ToLower(id), id[1:], id + "A", id[:51] + "\x00", "%2e%2e/" + id, strings.Repeat("A", 1<<20)} {
		if _, _, err := read(t, st, alice, "artifact://"+guess); codeOf(err) != call.NotFound {
			t.Errorf("%.80q: %v", guess, err)
		}
	}
}

// What one process puts there, others read at once and after a restart.
func (s suite) processes(t *testing.T) {
	one, two := s.store(t, nil), s.store(t, nil)
	a := put(t, one, alice, "text/plain", []byte("kept"))
	for i, st := range []*artifact.Store{two, s.store(t, nil), one} {
		if text, mime, err := read(t, st, alice, a.URI); err != nil || text != "kept" || mime != "text/plain" {
			t.Errorf("process %d: %q, %q, %v", i, text, mime, err)
		}
		if _, _, err := read(t, st, nil, a.URI); codeOf(err) != call.NotFound {
			t.Errorf("process %d, somebody else: %v", i, err)
		}
	}
	// Smaller bounds of a third make it delete, and the others find nothing any more.
	s.store(t, func(o *artifact.Options) { o.MaxBytes = 3 })
	for i, st := range []*artifact.Store{two, one, one} {
		if _, _, err := read(t, st, alice, a.URI); codeOf(err) != call.NotFound {
			t.Errorf("process %d, after it was deleted: %v", i, err)
		}
	}
}

// Without the key nothing is read, and nothing is deleted.
func (s suite) otherKey(t *testing.T) {
	st := s.store(t, nil)
	a := put(t, st, alice, "text/plain", []byte("kept"))
	other := s.store(t, func(o *artifact.Options) { o.Key = bytes.Repeat([]byte{8}, 32) })
	none := s.store(t, func(o *artifact.Options) { o.Key, o.Links = nil, artifact.Links{} })
	for _, st := range []*artifact.Store{other, none} {
		if _, _, err := read(t, st, alice, a.URI); codeOf(err) != call.NotFound {
			t.Errorf("with another key: %v", err)
		}
	}
	if text, _, err := read(t, s.store(t, nil), alice, a.URI); err != nil || text != "kept" {
		t.Errorf("with the key: %q, %v", text, err)
	}
}

// What is not what was kept is not given out, in part or whole.
func (s suite) damage(t *testing.T) {
	st := s.store(t, nil)
	data := bytes.Repeat([]byte("0123456789abcdef"), 16<<10) // four chunks
	flip := func(at int) func([]byte) []byte {
		return func(b []byte) []byte { b[(at+len(b))%len(b)] ^= 1; return b }
	}
	late := put(t, st, alice, "text/plain", data)
	s.Change(t, idOf(late), flip(-1))
	if text, _, err := read(t, st, alice, late.URI); err != nil || len(text) != 64<<10 {
		t.Errorf("a part that is whole: %d bytes, %v", len(text), err)
	}
	for _, part := range []string{"?offset=262143", "?offset=200000"} {
		if _, _, err := read(t, st, alice, late.URI+part); codeOf(err) != call.Internal {
			t.Errorf("%s: %v", part, err)
		}
	}
	func() {
		defer func() {
			if r := recover(); r != nil && r != http.ErrAbortHandler {
				panic(r)
			}
		}()
		if got := get(t, st, http.MethodGet, late.Link, ""); got.Code == http.StatusOK && got.Body.Len() >= len(data) {
			t.Errorf("a damaged file was sent: %d bytes", got.Body.Len())
		}
	}()
	early := put(t, st, alice, "text/plain", data)
	short := put(t, st, alice, "text/plain", data)
	s.Change(t, idOf(short), func(b []byte) []byte { return b[:len(b)-1] })
	s.Change(t, idOf(early), flip(-len(data)))
	if got := get(t, st, http.MethodGet, early.Link, ""); got.Code != http.StatusInternalServerError || strings.Contains(got.Body.String(), "0123") {
		t.Errorf("download: %d, %.80s", got.Code, got.Body)
	}
	if _, _, err := read(t, st, alice, short.URI+"?offset=262000"); codeOf(err) != call.Internal {
		t.Errorf("what was cut: %v", err)
	}
	// A process that starts now does not know what a record without its sum says.
	for _, at := range []int{0, 70, 100, 200} {
		a := put(t, st, alice, "text/plain", data)
		s.Change(t, idOf(a), flip(at))
		if _, _, err := read(t, s.store(t, nil), alice, a.URI); codeOf(err) != call.NotFound {
			t.Errorf("byte %d of the record: %v", at, err)
		}
	}
	// One artifact in the place of another.
	mine := put(t, st, alice, "text/plain", []byte("mine"))
	theirs := put(t, st, &call.Principal{ID: "eve"}, "text/plain", []byte("theirs"))
	var blob []byte
	s.Change(t, idOf(theirs), func(b []byte) []byte { blob = bytes.Clone(b); return b })
	s.Change(t, idOf(mine), func([]byte) []byte { return blob })
	for _, who := range []*call.Principal{alice, {ID: "eve"}} {
		if text, _, err := read(t, s.store(t, nil), who, mine.URI); codeOf(err) != call.NotFound {
			t.Errorf("exchanged: %q, %v", text, err)
		}
	}
}

// What a tool claims of its result gets neither into records nor into headers as it is.
func (s suite) claims(t *testing.T) {
	st := s.store(t, nil)
	for claimed, want := range map[string]string{
		"text/plain; charset=utf-8":            "text/plain; charset=utf-8",
		"IMAGE/png":                            "image/png",
		"":                                     "application/octet-stream",
		"text/html\r\nSet-Cookie: a=b":         "application/octet-stream",
		strings.Repeat("x", 2<<20) + "/y":      "application/octet-stream",
		"a/b; c=" + strings.Repeat("x", 2<<20): "application/octet-stream",
		"text/plain; x=\xff\xfe":               "application/octet-stream",
	} {
		a := put(t, st, alice, claimed, []byte("x"))
		if _, mime, err := read(t, s.store(t, nil), alice, a.URI); err != nil || mime != want || a.MIME != want {
			t.Errorf("%.60q became %q and %q, %v", claimed, a.MIME, mime, err)
		}
	}
	if _, err := st.Put(t.Context(), alice, strings.Repeat("x", 2<<20), "text/plain", nil); codeOf(err) != call.Internal {
		t.Errorf("a tool with a name of two megabytes: %v", err)
	}
	long := &call.Principal{ID: strings.Repeat("i", 2<<20), Tenant: strings.Repeat("t", 2<<20)}
	if text, _, err := read(t, st, long, put(t, st, long, "text/plain", []byte("x")).URI); err != nil || text != "x" {
		t.Errorf("a principal with a long name: %q, %v", text, err)
	}
}

// get asks for an address as a browser would.
func get(t *testing.T, st *artifact.Store, method, address, ranges string) *httptest.ResponseRecorder {
	t.Helper()
	w := httptest.NewRecorder()
	u, err := url.Parse(address)
	if err != nil {
		w.Code = http.StatusNotFound // no client can send it
		return w
	}
	r, err := http.NewRequestWithContext(t.Context(), method, address, nil)
	if err != nil {
		t.Fatal(err)
	}
	rest, ok := strings.CutPrefix(u.EscapedPath(), "/artifacts/")
	if !ok || u.Scheme+"://"+u.Host != base {
		w.Code = http.StatusNotFound // another route, or another server
		return w
	}
	r.SetPathValue("id", rest)
	if ranges != "" {
		r.Header.Set("Range", ranges)
	}
	st.Download().ServeHTTP(w, r)
	return w
}

func (s suite) download(t *testing.T) {
	st := s.store(t, nil)
	data := make([]byte, 200<<10)
	_, _ = rand.Read(data) // never fails
	a := put(t, st, alice, "image/png", data)
	for _, from := range []*artifact.Store{st, s.store(t, nil)} {
		for asked, want := range map[string]struct {
			code     int
			from, to int
		}{
			"":                      {200, 0, len(data)},
			"bytes=0-9":             {206, 0, 10},
			"bytes=65530-65545":     {206, 65530, 65546}, // from two chunks
			"bytes=-5":              {206, len(data) - 5, len(data)},
			"bytes=204799-":         {206, len(data) - 1, len(data)},
			"bytes=0-0,70000-70001": {200, 0, len(data)},
			"lines=1-2":             {416, 0, 0},
			"bytes=204800-":         {416, 0, 0},
		} {
			w := get(t, from, http.MethodGet, a.Link, asked)
			if w.Code != want.code || w.Code < 400 && !bytes.Equal(w.Body.Bytes(), data[want.from:want.to]) {
				t.Errorf("%q: %d, %d bytes", asked, w.Code, w.Body.Len())
			}
			sent := w.Header().Get("Content-Type") == "image/png" && strings.Contains(w.Header().Get("Cache-Control"), "no-store")
			if w.Code < 400 && !sent || w.Header().Get("X-Content-Type-Options") != "nosniff" || !strings.HasPrefix(w.Header().Get("Content-Disposition"), "attachment") {
				t.Errorf("%q: %v", asked, w.Header())
			}
		}
	}
	if w := get(t, st, http.MethodHead, a.Link, ""); w.Code != 200 || w.Body.Len() != 0 || w.Header().Get("Content-Length") != fmt.Sprint(len(data)) {
		t.Errorf("HEAD: %d, %v", w.Code, w.Header())
	}
	nothing := put(t, st, alice, "text/plain", nil)
	if w := get(t, st, http.MethodGet, nothing.Link, ""); w.Code != 200 || w.Body.Len() != 0 {
		t.Errorf("an empty file: %d, %q", w.Code, w.Body)
	}
}

// An address works as it was made, for its time, and in no other way.
func (s suite) addresses(t *testing.T) {
	st := s.store(t, nil)
	a := put(t, st, alice, "text/plain", []byte("0123"))
	if w := get(t, st, http.MethodGet, a.Link, ""); w.Code != 200 || w.Body.String() != "0123" {
		t.Fatalf("as it was made: %d", w.Code)
	}
	refused := func(what, address string) {
		t.Helper()
		if w := get(t, st, http.MethodGet, address, ""); w.Code != http.StatusNotFound && w.Code != http.StatusForbidden || strings.Contains(w.Body.String(), "0123") {
			t.Errorf("%s: %d, %q for %s", what, w.Code, w.Body, address)
		}
	}
	for i := range len(a.Link) {
		for _, c := range []byte{a.Link[i] ^ 1, a.Link[i] ^ 0x20, 'A', '0', '&', '%'} {
			if c != a.Link[i] && c > ' ' && c < 0x7f && !(i < len(base) && strings.EqualFold(string(c), string(a.Link[i]))) {
				refused("a byte changed", a.Link[:i]+string(c)+a.Link[i+1:])
			}
		}
		refused("a byte missing", a.Link[:i]+a.Link[i+1:])
	}
	refused("more", a.Link+"&x=y")
	refused("more", a.Link+"=")
	b := put(t, st, &call.Principal{ID: "eve"}, "text/plain", []byte("0123 of eve"))
	_, query, _ := strings.Cut(a.Link, "?")
	path, _, _ := strings.Cut(b.Link, "?")
	refused("the signature of another", path+"?"+query)
	other := s.store(t, func(o *artifact.Options) { o.Key = bytes.Repeat([]byte{9}, 32) })
	refused("of another key", put(t, other, alice, "text/plain", []byte("0123")).Link)

	if a.LinkUntil.After(time.Now().Add(time.Minute)) || a.LinkUntil.Before(time.Now().Add(50*time.Second)) {
		t.Errorf("it works until %v", a.LinkUntil)
	}
	brief := s.store(t, func(o *artifact.Options) { o.Links.Life = time.Nanosecond })
	old := put(t, brief, alice, "text/plain", []byte("0123"))
	if w := get(t, st, http.MethodGet, old.Link, ""); w.Code != http.StatusForbidden {
		t.Errorf("past its time: %d", w.Code)
	}
	if none := s.store(t, func(o *artifact.Options) { o.Links = artifact.Links{} }); none.Download() != nil || put(t, none, alice, "text/plain", nil).Link != "" {
		t.Error("addresses are made although nobody asked for them")
	}
}

// The store holds its bounds, and what it drops leaves the shelf.
func (s suite) bounds(t *testing.T) {
	st := s.store(t, func(o *artifact.Options) { o.MaxBytes, o.MaxCount = 1000, 4 })
	var last call.Artifact
	for i := range 10 {
		last = put(t, st, alice, "text/plain", bytes.Repeat([]byte{'0' + byte(i)}, 400))
	}
	got := slices.Collect(maps.Keys(names(t, s.open(t))))
	if len(got) != 2 || !slices.Contains(got, idOf(last)) {
		t.Errorf("%d are on the shelf", len(got))
	}
	for i := range 10 {
		put(t, st, alice, "text/plain", []byte{byte(i)})
	}
	if got := names(t, s.open(t)); len(got) != 4 {
		t.Errorf("%d are on the shelf", len(got))
	}
}
