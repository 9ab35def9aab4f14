// Package bound keeps results within what a client and a model can take, and holds tool results
// to the shape their schema promises.
//
// Refuses: results past the bound that cannot be kept, and tool results without the
// structuredContent that their output schema promises. Needs: a store for large results; without
// one they are refused with advice. Fails: closed. Records: bytes, estimated tokens, whether the
// result was put aside. Costs: a pass over results above 4 KiB, nothing below. It never cuts
// silently: the whole result is kept as an artifact and linked.
package bound

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"unicode/utf8"

	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
)

// A Store keeps large results until they expire. Put is safe for concurrent use; what it
// returned can be read under its URI by the same principal. It may refuse what is too large.
type Store interface {
	Put(ctx context.Context, owner *call.Principal, mime string, data []byte) (call.Artifact, error)
}

// Options bound results. Zero means the default in brackets.
type Options struct {
	MaxBytes  int   // of content and structuredContent together [256 KiB]
	MaxTokens int   // estimated [64,000]
	Store     Store // nil: larger results are refused
}

// Bounds hold results to their limits.
type Bounds struct{ o Options }

// previewBytes is how much of a large result stands in the answer, labelled as a preview.
const previewBytes = 2 << 10

// New returns bounds, or an error that names the option that makes no sense.
func New(o Options) (*Bounds, error) {
	if o.MaxBytes < 0 || o.MaxTokens < 0 {
		return nil, errors.New("bound: a limit is below zero")
	}
	if o.MaxBytes == 0 {
		o.MaxBytes = 256 << 10
	}
	if o.MaxTokens == 0 {
		o.MaxTokens = 64_000
	}
	return &Bounds{o}, nil
}

// Guard is the guard of the bound step.
func (b *Bounds) Guard(next call.Handler) call.Handler {
	return func(ctx context.Context, c *call.Call) (*call.Result, error) {
		r, err := next(ctx, c)
		if err != nil {
			return nil, err
		}
		if r == nil {
			return nil, call.Errorf(call.Internal, "internal error").Because(errors.New("a handler returned neither a result nor an error"))
		}
		size := len(r.Content) + len(r.Structured) + len(r.Extra)
		c.Event.ResultBytes, c.Event.Tokens = size, size/4
		if c.Target == nil || c.Kind == call.Complete {
			return r, nil // lists have pages, completions a fixed bound
		}
		if c.Kind == call.Tool && c.Target.Output != nil && r.Structured == nil && !r.IsError {
			return nil, call.Errorf(call.Internal, "internal error").Because(errors.New("the tool has an output schema and returned no structured content"))
		}
		limit := b.o.MaxBytes
		if c.Target.MaxResultBytes > 0 {
			limit = c.Target.MaxResultBytes
		}
		if size > 4<<10 {
			c.Event.Tokens = Tokens(r.Content) + Tokens(r.Structured)
		}
		if size <= limit && c.Event.Tokens <= b.o.MaxTokens {
			return r, nil
		}
		return b.putAside(ctx, c, r, size, limit)
	}
}

// Tokens estimates the tokens of text: four bytes each for ASCII, one rune each beyond it. Real
// tokenizers differ by up to a third either way.
func Tokens(text []byte) int {
	ascii, beyond := 0, 0
	for i := 0; i < len(text); {
		if text[i] < utf8.RuneSelf {
			ascii++
			i++
			continue
		}
		_, n := utf8.DecodeRune(text[i:])
		beyond++
		i += n
	}
	return ascii/4 + beyond
}

// putAside keeps a result that is too large and answers with a link to it.
func (b *Bounds) putAside(ctx context.Context, c *call.Call, r *call.Result, size, limit int) (*call.Result, error) {
	tooLarge := call.Errorf(call.TooLarge, "the result has %d bytes (about %d tokens), over the limit of %d bytes or %d tokens; ask for less: a narrower filter, a smaller page, a part",
		size, c.Event.Tokens, limit, b.o.MaxTokens)
	if c.Kind != call.Tool || b.o.Store == nil {
		return nil, tooLarge
	}
	whole, mime := r.Structured, "application/json"
	if whole == nil {
		whole = r.Content
		if text, ok := onlyText(r.Content); ok {
			whole, mime = jsontext.Value(text), "text/plain; charset=utf-8"
		}
	}
	a, err := b.o.Store.Put(ctx, c.Principal, mime, whole)
	if err != nil {
		return nil, tooLarge.Because(err)
	}
	c.Event.Paged = true
	preview := whole[:min(previewBytes, len(whole))]
	for len(preview) > 0 && !utf8.Valid(preview) {
		preview = preview[:len(preview)-1]
	}
	note := fmt.Sprintf("The result has %d bytes (about %d tokens): too large to send at once. The whole is kept at %s until %s; read it in parts with resources/read (add ?offset=N). A preview of the first %d bytes follows.",
		size, c.Event.Tokens, a.URI, a.Expires.UTC().Format("2006-01-02T15:04:05Z"), len(preview))
	out := append(jsontext.Value(nil), `[{"type":"text","text":`...)
	out = call.AppendString(out, note)
	out = append(out, `},{"type":"resource_link","uri":`...)
	out = call.AppendString(out, a.URI)
	out = append(out, `,"name":`...)
	out = call.AppendString(out, "result of "+c.Name)
	out = append(out, `,"mimeType":`...)
	out = call.AppendString(out, mime)
	out = append(out, `,"size":`...)
	out = strconv.AppendInt(out, a.Size, 10)
	out = append(out, `,"_meta":{"dev.newel/sha256":`...)
	out = call.AppendString(out, a.SHA256)
	out = append(out, `}},{"type":"text","text":`...)
	out = call.AppendString(out, "Preview: "+string(preview))
	out = append(out, `}]`...)
	c.Event.ResultBytes, c.Event.Tokens = len(out), Tokens(out)
	// With an output schema, a result without structuredContent has to be an error result.
	return &call.Result{Content: out, IsError: c.Target.Output != nil || r.IsError}, nil
}

// onlyText returns the text of content that is one text block.
func onlyText(content jsontext.Value) (string, bool) {
	var text string
	blocks := 0
	err := call.EachElement(content, func(block jsontext.Value) {
		blocks++
		kind := ""
		_ = call.EachMember(block, func(name string, v jsontext.Value) {
			switch name {
			case "type":
				kind = string(v)
			case "text":
				if b, err := jsontext.AppendUnquote(nil, v); err == nil {
					text = string(b)
				}
			}
		})
		if kind != `"text"` {
			blocks = 2
		}
	})
	return text, err == nil && blocks == 1
}
