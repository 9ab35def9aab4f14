// Package bound keeps results within what a client and a model can take, and holds tool results
// to the shape their schema promises.
//
// Start reading at [Bounds.Guard]; aside.go is what becomes of a result that is too large.
//
// Refuses: results past the bound that cannot be kept, and tool results without the
// structuredContent that their output schema promises. Needs: a store for large results; without
// one they are refused with advice. Fails: closed. Records: bytes, estimated tokens, whether the
// result was put aside. Costs: one pass over the result to estimate its tokens, some ten
// microseconds for 256 KiB. It never cuts silently: the whole result is kept as an artifact and
// linked. Lists have pages of their own and are only measured.
package bound

import (
	"context"
	"encoding/binary"
	"errors"
	"math/bits"

	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
)

// A Store keeps large results until they expire. Put is safe for concurrent use and keeps the
// data whole or not at all; what it returned can be read under its URI by the same principal. It
// may refuse what is too large, and fail when its disk is full.
type Store interface {
	Put(ctx context.Context, owner *call.Principal, tool, mime string, data []byte) (call.Artifact, error)
}

// Options bound results. Zero means the default in brackets; below zero is refused.
type Options struct {
	// MaxBytes bounds content, structuredContent and further members together, as JSON. A
	// capability's MaxResultBytes replaces it [256 KiB].
	MaxBytes int
	// MaxTokens bounds the estimated tokens of results whose capability has no bound of its own
	// [64,000].
	MaxTokens int
	// Store keeps tool results that are larger; nil: they are refused.
	Store Store
	// CheckOutput checks the structuredContent of a tool with an output schema; nil: only that it
	// is there. It is safe for concurrent use.
	CheckOutput func(target *call.Capability, structured jsontext.Value) error
}

// Bounds hold results to their limits. They are safe for concurrent use.
type Bounds struct{ o Options }

// New returns bounds, or an error that names the option that makes no sense.
func New(o Options) (*Bounds, error) {
	if o.MaxBytes < 0 || o.MaxTokens < 0 {
		return nil, errors.New("bound: MaxBytes and MaxTokens must not be below zero")
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
			return nil, broken("a handler returned neither a result nor an error")
		}
		if err := b.checkShape(c, r); err != nil {
			return nil, err
		}
		s := measure(r)
		c.Event.ResultBytes, c.Event.Tokens = s.bytes, s.tokens
		if c.Target == nil || c.Kind == call.Complete {
			return r, nil // lists have pages, completions a fixed bound
		}
		l := limit{b.o.MaxBytes, b.o.MaxTokens}
		if n := c.Target.MaxResultBytes; n > 0 {
			l = limit{n, n} // a token is a byte at least: no bound
		}
		if s.bytes <= l.bytes && s.tokens <= l.tokens {
			return r, nil
		}
		return b.putAside(ctx, c, r, s, l)
	}
}

func broken(why string) error {
	return call.Errorf(call.Internal, "internal error").Because(errors.New(why))
}

// checkShape holds a tool to its output schema.
func (b *Bounds) checkShape(c *call.Call, r *call.Result) error {
	if c.Kind != call.Tool || c.Target == nil || c.Target.Output == nil || r.IsError {
		return nil
	}
	if r.Structured == nil {
		return broken("the tool has an output schema and returned no structured content")
	}
	if b.o.CheckOutput == nil {
		return nil
	}
	if err := b.o.CheckOutput(c.Target, r.Structured); err != nil {
		return call.Errorf(call.Internal, "the tool ran, but its result does not fit its output schema").Because(err)
	}
	return nil
}

type size struct{ bytes, tokens int }

type limit struct{ bytes, tokens int }

func measure(r *call.Result) size {
	return size{
		bytes:  len(r.Content) + len(r.Structured) + len(r.Extra),
		tokens: Tokens(r.Content) + Tokens(r.Structured),
	}
}

// Tokens estimates the tokens of UTF-8 text: one for four bytes of ASCII, one for every character
// beyond it, as fits Chinese, Japanese and Korean. Real tokenizers differ by up to a third either
// way; for Latin letters with accents the estimate is too high, never too low by more.
func Tokens(text []byte) int {
	const (
		high = 0x8080808080808080 // the highest bit of eight bytes: set beyond ASCII
		word = 8
	)
	total := len(text)
	beyond, chars := 0, 0 // bytes beyond ASCII, and how many of them begin a character
	for ; len(text) >= 4*word; text = text[4*word:] {
		a, b := binary.LittleEndian.Uint64(text), binary.LittleEndian.Uint64(text[word:])
		c, d := binary.LittleEndian.Uint64(text[2*word:]), binary.LittleEndian.Uint64(text[3*word:])
		if (a|b|c|d)&high == 0 {
			continue
		}
		for _, w := range [...]uint64{a, b, c, d} {
			beyond += bits.OnesCount64(w & high)
			chars += bits.OnesCount64(w & (w << 1) & high) // bits 11 begin a character, 10 continue one
		}
	}
	for _, b := range text {
		if b >= 0x80 {
			beyond++
		}
		if b >= 0xc0 {
			chars++
		}
	}
	return (total-beyond)/4 + chars
}
