package artifact

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"newel.dev/newel/call"
)

// Links are addresses under which whoever has them can download an artifact for a while: for what
// people open with a browser, which has no token.
type Links struct {
	Base string        // address of this server, such as https://mcp.example.com
	Life time.Duration // of an address, at most that of the artifact; 0: none are made
}

// DownloadPath is the route that Download serves.
const DownloadPath = "/artifacts/{id}"

// Downloads.
const (
	maxDownloads = 64               // at the same time
	writeTimeout = 30 * time.Second // for a reader to take a piece
	slowest      = 32 << 10         // bytes a second, after the first minute: who is slower is cut
)

type links struct {
	base string
	life time.Duration
	key  []byte
	room chan struct{}
}

func newLinks(o Links, key []byte) (*links, error) {
	switch {
	case o.Life < 0:
		return nil, errors.New("artifact: Links.Life must not be below zero")
	case o.Life == 0:
		return nil, nil
	case key == nil:
		return nil, errors.New("links to artifacts need a key that signs them")
	}
	u, err := url.Parse(o.Base)
	if err != nil || u.Scheme != "https" && u.Scheme != "http" || u.Host == "" {
		return nil, fmt.Errorf("links to artifacts need the address of this server, not %q", o.Base)
	}
	return &links{base: strings.TrimSuffix(o.Base, "/"), life: o.Life, key: key, room: make(chan struct{}, maxDownloads)}, nil
}

// make returns an address for an artifact, and until when it works.
func (l *links) make(it *item, now time.Time) (address string, until time.Time) {
	until = now.Add(l.life)
	if it.expires.Before(until) {
		until = it.expires
	}
	until = until.Truncate(time.Second)
	return l.base + strings.Replace(DownloadPath, "{id}", it.id, 1) + "?" + l.query(it.id, it.tenant, it.owner, until.Unix()), until
}

// query is what stands behind the question mark. It is compared as a whole, so that there is one way
// to write an address, and the signature covers all of it.
func (l *links) query(id, tenant, owner string, until int64) string {
	h := hmac.New(sha256.New, l.key)
	fmt.Fprintf(h, "link\n%s\n%s\n%s\n%d", id, tenant, owner, until)
	return "of=" + tenant + "." + owner + "&until=" + strconv.FormatInt(until, 10) + "&signature=" + base64.RawURLEncoding.EncodeToString(h.Sum(nil))
}

// check reports whether this server made the address, before anything is looked up.
func (l *links) check(id, query string) (tenant, owner string, until time.Time, ok bool) {
	v, err := url.ParseQuery(query)
	if err != nil {
		return "", "", time.Time{}, false
	}
	seconds, err := strconv.ParseInt(v.Get("until"), 10, 64)
	tenant, owner, _ = strings.Cut(v.Get("of"), ".")
	if err != nil || !hmac.Equal([]byte(query), []byte(l.query(id, tenant, owner, seconds))) {
		return "", "", time.Time{}, false
	}
	return tenant, owner, time.Unix(seconds, 0), true
}

// Download serves artifacts to whoever has their signed address; nil if no such addresses are made.
// Anything but an address that this server made is not found.
func (s *Store) Download() http.Handler {
	if s.links == nil {
		return nil
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("Cache-Control", "private, no-store")
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("Referrer-Policy", "no-referrer") // the address is the permission
		h.Set("Content-Security-Policy", "default-src 'none'; sandbox")
		h.Set("Cross-Origin-Resource-Policy", "same-origin")
		id := r.PathValue("id")
		tenant, owner, until, ok := s.links.check(id, r.URL.RawQuery)
		if !ok || !isID(id) {
			http.Error(w, "not found", http.StatusNotFound)
			return
		}
		if !time.Now().Before(until) {
			http.Error(w, "this address does not work any more; ask for the result again", http.StatusForbidden)
			return
		}
		select {
		case s.links.room <- struct{}{}:
			defer func() { <-s.links.room }()
		default:
			h.Set("Retry-After", "5")
			http.Error(w, "too many downloads at the same time; try again in a moment", http.StatusServiceUnavailable)
			return
		}
		s.send(w, r, id, tenant, owner)
	})
}

// send answers with an artifact, or the part of it that Range asks for (RFC 9110, section 14).
func (s *Store) send(w http.ResponseWriter, r *http.Request, id, tenant, owner string) {
	ctx := r.Context()
	it, err := s.find(ctx, id, tenant, owner)
	if err != nil {
		s.cannot(w, s.notRead(ctx, it, err))
		return
	}
	if it == nil {
		http.Error(w, "not found", http.StatusNotFound)
		return
	}
	end := time.Now().Add(time.Minute + time.Duration(it.size/slowest)*time.Second)
	control := http.NewResponseController(w)
	body := &reader{ctx: ctx, s: s, it: it, before: func() {
		piece := time.Now().Add(writeTimeout)
		if end.Before(piece) {
			piece = end
		}
		_ = control.SetWriteDeadline(piece) // what cannot have one is in memory
	}}
	if it.size > 0 {
		if _, err := body.Read(make([]byte, 1)); err != nil { // while a status can still say so
			s.cannot(w, s.notRead(ctx, it, err))
			return
		}
	}
	h := w.Header()
	h.Set("Content-Type", it.mime)
	h.Set("Content-Disposition", `attachment; filename="result"`)
	h.Set("ETag", `"`+it.sha256+`"`)
	if sum, err := hex.DecodeString(it.sha256); err == nil {
		h.Set("Repr-Digest", "sha-256=:"+base64.StdEncoding.EncodeToString(sum)+":") // RFC 9530
	}
	if strings.Contains(r.Header.Get("Range"), ",") {
		r.Header.Del("Range") // many small parts would cost far more to read than they bring
	}
	http.ServeContent(w, r, "", time.Time{}, body)
	level, attrs := slog.LevelInfo, []slog.Attr{slog.String("tool", it.tool), slog.Int64("size", it.size), slog.String("peer", r.RemoteAddr)}
	if body.err != nil && ctx.Err() == nil {
		level, attrs = slog.LevelError, append(attrs, slog.String("error", body.err.Error()))
	}
	s.o.Logger.LogAttrs(ctx, level, "a stored result was downloaded", attrs...)
}

// cannot answers when an artifact cannot be read.
func (s *Store) cannot(w http.ResponseWriter, err error) {
	e := call.AsError(err)
	switch e.Code {
	case call.NotFound:
		http.Error(w, "not found", http.StatusNotFound)
	case call.Internal:
		http.Error(w, "the result is damaged and is not given out", http.StatusInternalServerError)
	default:
		w.Header().Set("Retry-After", "5")
		http.Error(w, "the result cannot be read at the moment; try again later", http.StatusServiceUnavailable)
	}
}

// A reader reads an artifact as a whole, chunk by chunk, each checked.
type reader struct {
	ctx    context.Context
	s      *Store
	it     *item
	before func() // a piece is sent
	offset int64
	chunk  []byte
	from   int64 // where chunk begins
	err    error // the first
}

// Read implements io.Reader.
func (r *reader) Read(p []byte) (int, error) {
	if r.offset >= r.it.size {
		return 0, io.EOF
	}
	if r.chunk == nil || r.offset < r.from || r.offset >= r.from+int64(len(r.chunk)) {
		if r.chunk, r.from, r.err = r.s.read(r.ctx, r.it, r.offset); r.err != nil {
			return 0, r.err
		}
	}
	r.before()
	n := copy(p, r.chunk[r.offset-r.from:])
	r.offset += int64(n)
	return n, nil
}

// Seek implements io.Seeker.
func (r *reader) Seek(offset int64, whence int) (int64, error) {
	switch whence {
	case io.SeekCurrent:
		offset += r.offset
	case io.SeekEnd:
		offset += r.it.size
	}
	if offset < 0 {
		return 0, errors.New("before the beginning")
	}
	r.offset = offset
	return offset, nil
}
