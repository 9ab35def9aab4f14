package artifact

import (
	"context"
	"encoding/base64"
	"errors"
	"io/fs"
	"log/slog"
	"net/url"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
)

func notFound() error {
	return call.Errorf(call.NotFound, "no such artifact, or it has expired; make the call again that led to it")
}

// run answers a read of artifact://{id}{?offset,length}.
func (s *Store) run(ctx context.Context, c *call.Call) (*call.Result, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	rest, ours := strings.CutPrefix(c.Name, scheme)
	id, query, _ := strings.Cut(rest, "?")
	if !ours {
		return nil, notFound()
	}
	values, err := url.ParseQuery(query)
	if err != nil {
		return nil, call.Errorf(call.Invalid, "the part of the address after ? must be offset=N&length=N").Because(err)
	}
	offset, err := number(values, "offset", 0, 0)
	if err != nil {
		return nil, err
	}
	length, err := number(values, "length", 1, int64(s.o.PartBytes))
	if err != nil {
		return nil, err
	}
	tenant, owner := s.ownerOf(c.Principal)
	it, err := s.find(ctx, id, tenant, owner)
	if err != nil {
		return nil, s.notRead(ctx, nil, err)
	}
	if it == nil {
		return nil, notFound()
	}
	if offset > it.size {
		return nil, call.Errorf(call.Invalid, "offset %d is past the end: the artifact has %d bytes", offset, it.size)
	}
	return s.part(ctx, c.Name, it, offset, min(length, int64(s.o.PartBytes)))
}

// notRead says what becomes of an artifact that cannot be read.
func (s *Store) notRead(ctx context.Context, it *item, err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist): // another process deleted it
		s.mu.Lock()
		defer s.mu.Unlock()
		s.forget(it)
		return notFound()
	case errors.Is(err, errDamaged):
		s.o.Logger.LogAttrs(ctx, slog.LevelError, "a stored result is damaged and is not given out", slog.String("tool", it.tool), slog.Time("created", it.created))
		return call.Errorf(call.Internal, "the artifact is damaged and is not given out; make the call again that led to it").Because(err)
	case ctx.Err() != nil:
		return ctx.Err()
	}
	return call.Errorf(call.Unavailable, "the artifact cannot be read at the moment; try again later").Because(err)
}

func number(values url.Values, name string, least, otherwise int64) (int64, error) {
	v := values.Get(name)
	if v == "" {
		return otherwise, nil
	}
	n, err := strconv.ParseInt(v, 10, 64)
	if err != nil || n < least {
		return 0, call.Errorf(call.Invalid, "%s must be a whole number from %d", name, least)
	}
	return n, nil
}

// part returns about length bytes from offset: text between characters, anything else exactly.
func (s *Store) part(ctx context.Context, uri string, it *item, offset, length int64) (*call.Result, error) {
	from, to := offset, min(offset+length, it.size)
	if it.text { // look a character's length further, on both sides
		from, to = max(0, offset-utf8.UTFMax), min(to+utf8.UTFMax, it.size)
	}
	part := make([]byte, to-from)
	if err := s.fill(ctx, it, part, from); err != nil {
		return nil, s.notRead(ctx, it, err)
	}
	if it.text {
		begin, end := characters(part, int(offset-from), int(min(offset+length, it.size)-from), to == it.size)
		part, from, to = part[begin:end], from+int64(begin), from+int64(end)
	}
	b := append(make(jsontext.Value, 0, len(part)+len(part)/2+512), `[{"uri":`...)
	b = call.AppendString(b, uri)
	b = call.AppendString(append(b, `,"mimeType":`...), it.mime)
	if it.text {
		b = call.AppendString(append(b, `,"text":`...), string(part))
	} else {
		b = append(base64.StdEncoding.AppendEncode(append(b, `,"blob":"`...), part), '"')
	}
	b = append(b, `,"_meta":{"dev.newel/offset":`...)
	b = strconv.AppendInt(b, from, 10)
	b = strconv.AppendInt(append(b, `,"dev.newel/total":`...), it.size, 10)
	b = call.AppendString(append(b, `,"dev.newel/sha256":`...), it.sha256)
	if to < it.size {
		b = strconv.AppendInt(append(b, `,"dev.newel/next":`...), to, 10)
	}
	return &call.Result{Content: append(b, "}}]"...)}, nil
}

// characters moves begin and end back to where characters of text begin; if nothing is left, end
// moves on to the next one instead, so that whoever reads on gets on. last says that nothing
// follows text.
func characters(text []byte, begin, end int, last bool) (int, int) {
	starts := func(i int) bool { return i == 0 || i < len(text) && utf8.RuneStart(text[i]) || i == len(text) && last }
	for begin > 0 && !starts(begin) {
		begin--
	}
	wanted := end
	for end > begin && !starts(end) {
		end--
	}
	if end == begin {
		for end = wanted; end < len(text) && !starts(end); end++ {
		}
	}
	return begin, end
}
