// Package strictjson is the border for JSON that strangers sent: it refuses what two parsers
// could read differently (duplicate names, invalid UTF-8) and what costs more than it is worth
// (size, depth, number of elements), before anything is allocated for it.
//
// Start reading at [Check]. It promises constant memory beyond the set of names of one object
// at a time, and time linear in the input. It does not know what the JSON means.
package strictjson

import (
	"bytes"
	"fmt"
	"strings"

	"github.com/go-json-experiment/json/jsontext"
)

// Limits bound one document. The zero value means the defaults.
type Limits struct {
	Bytes    int // size of the document; default 4 MiB
	Depth    int // nesting of arrays and objects; default 64
	Elements int // members and array elements in all; default 100,000
}

func (l Limits) withDefaults() Limits {
	if l.Bytes <= 0 {
		l.Bytes = 4 << 20
	}
	if l.Depth <= 0 {
		l.Depth = 64
	}
	if l.Elements <= 0 {
		l.Elements = 100_000
	}
	return l
}

// An Error says what is wrong with a document. Its text is fit for the sender.
type Error struct {
	Problem string // what is wrong
	Limit   bool   // a limit was passed, as opposed to bad syntax
	cause   error
}

// Error returns the problem.
func (e *Error) Error() string { return e.Problem }

// Unwrap returns the parser's own error, if there is one.
func (e *Error) Unwrap() error { return e.cause }

// Check returns nil if b is one JSON value within the limits, with no duplicate names, no
// invalid UTF-8 and nothing after it. Otherwise it returns an [*Error].
func Check(b []byte, l Limits) error {
	if err := Bound(b, l); err != nil {
		return err
	}
	v := jsontext.Value(b)
	if v.IsValid() {
		return nil
	}
	return Explain(b)
}

// Explain returns the [*Error] for a document that a strict parser refused.
func Explain(b []byte) error {
	// Format reports the position; it works on a copy because it may write.
	c := jsontext.Value(b).Clone()
	if err := c.Compact(); err != nil {
		return &Error{Problem: "not valid JSON: " + plain(err), cause: err}
	}
	if err := c.Canonicalize(); err != nil {
		return &Error{Problem: "not strict JSON: " + plain(err), cause: err}
	}
	return &Error{Problem: "not strict JSON: duplicate names or invalid UTF-8"}
}

// plain drops the parser's name, which means nothing to the sender.
func plain(err error) string { return strings.TrimPrefix(err.Error(), "jsontext: ") }

// Bound checks only size, depth and number of elements, in one pass without allocation. It is
// for documents that a strict parser will read next.
func Bound(b []byte, l Limits) error {
	l = l.withDefaults()
	if len(b) > l.Bytes {
		return &Error{Problem: fmt.Sprintf("%d bytes of JSON, over the limit of %d", len(b), l.Bytes), Limit: true}
	}
	if bytes.Count(b, []byte{'{'})+bytes.Count(b, []byte{'['}) <= l.Depth && bytes.Count(b, []byte{','}) <= l.Elements {
		return nil // as most documents are, wherever these stand
	}
	depth, elements := 0, 0
	for i := 0; i < len(b); i++ {
		switch b[i] {
		case '"':
			for i++; i < len(b) && b[i] != '"'; i++ {
				if b[i] == '\\' {
					i++
				}
			}
		case '{', '[':
			if depth++; depth > l.Depth {
				return &Error{Problem: fmt.Sprintf("JSON nested deeper than %d", l.Depth), Limit: true}
			}
		case '}', ']':
			depth--
		case ',':
			if elements++; elements > l.Elements {
				return &Error{Problem: fmt.Sprintf("JSON with more than %d elements", l.Elements), Limit: true}
			}
		}
	}
	return nil
}
