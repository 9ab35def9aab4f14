package catalog

import (
	"bytes"
	"encoding/json" // only for the type json.Number
	"strconv"
	"sync"
	"unicode/utf8"

	"github.com/go-json-experiment/json/jsontext"
)

// quick accepts valid arguments of simple schemas straight from their bytes, several times
// cheaper than the full validator. It only ever says yes or "not sure": after anything but a
// yes the full validator decides and explains. A differential test holds the two together.
//
// Simple means: type, properties, required, additionalProperties (a boolean), enum of strings,
// minimum, maximum, minLength, maxLength, pattern, items, minItems, maxItems, and annotations.
type quick struct {
	kind       byte // of the JSON value: '{', '[', '"', '0', 't' (a boolean)
	integer    bool
	props      map[string]*quick
	closed     bool
	required   int             // how many members are required
	isRequired map[string]bool // which
	enum       map[string]bool
	minLen     int
	maxLen     int
	pattern    *expression
	minimum    *float64
	maximum    *float64
	items      *quick
	minItems   int
	maxItems   int
}

// newQuick returns nil if the schema is not simple. patterns are its regular expressions, by text.
func newQuick(doc any, patterns map[string]*expression) *quick {
	obj, ok := doc.(map[string]any)
	if !ok {
		return nil
	}
	q := &quick{maxLen: -1, maxItems: -1}
	switch obj["type"] {
	case "object":
		q.kind = '{'
	case "array":
		q.kind = '['
	case "string":
		q.kind = '"'
	case "integer":
		q.kind, q.integer = '0', true
	case "number":
		q.kind = '0'
	case "boolean":
		q.kind = 't'
	default:
		return nil
	}
	for k, v := range obj {
		if !q.keyword(k, v, patterns) {
			return nil
		}
	}
	return q
}

// keyword takes one keyword; false means the schema is not simple.
func (q *quick) keyword(k string, v any, patterns map[string]*expression) bool {
	switch k {
	case "type", "title", "description", "default", "examples", "x-mcp-header", "deprecated", "readOnly", "writeOnly", "$comment":
		return true
	case "$schema":
		return v == "https://json-schema.org/draft/2020-12/schema"
	case "properties":
		props, ok := v.(map[string]any)
		if !ok || q.kind != '{' {
			return false
		}
		q.props = make(map[string]*quick, len(props))
		for name, p := range props {
			sub := newQuick(p, patterns)
			if sub == nil {
				return false
			}
			q.props[name] = sub
		}
		return true
	case "additionalProperties":
		allowed, ok := v.(bool)
		q.closed = ok && !allowed
		return ok
	case "required":
		names, ok := v.([]any)
		if !ok {
			return false
		}
		q.isRequired = make(map[string]bool, len(names))
		for _, n := range names {
			name, ok := n.(string)
			if !ok {
				return false
			}
			q.isRequired[name] = true
		}
		q.required = len(q.isRequired)
		return true
	case "enum":
		vals, ok := v.([]any)
		if !ok || q.kind != '"' {
			return false
		}
		q.enum = make(map[string]bool, len(vals))
		for _, v := range vals {
			s, ok := v.(string)
			if !ok {
				return false
			}
			q.enum[s] = true
		}
		return true
	case "minLength":
		return count(v, &q.minLen)
	case "maxLength":
		return count(v, &q.maxLen)
	case "minItems":
		return count(v, &q.minItems)
	case "maxItems":
		return count(v, &q.maxItems)
	case "pattern":
		s, ok := v.(string)
		if !ok {
			return false
		}
		q.pattern = patterns[s]
		return q.pattern != nil
	case "minimum":
		return bound(v, &q.minimum)
	case "maximum":
		return bound(v, &q.maximum)
	case "items":
		q.items = newQuick(v, patterns)
		return q.items != nil
	}
	return false
}

func count(v any, into *int) bool {
	n, ok := v.(json.Number)
	if !ok {
		return false
	}
	i, err := strconv.Atoi(n.String())
	*into = i
	return err == nil
}

// bound takes limits that a float64 holds exactly, so that comparing is exact as well.
func bound(v any, into **float64) bool {
	n, ok := v.(json.Number)
	if !ok {
		return false
	}
	i, err := strconv.ParseInt(n.String(), 10, 64)
	if err != nil || i > 1<<50 || i < -1<<50 {
		return false
	}
	f := float64(i)
	*into = &f
	return true
}

// decoders are shared: making one costs more than reading typical arguments.
var decoders = sync.Pool{New: func() any { return &reader{} }}

// A reader reads arguments where they lie: a decoder copies from every source but a bytes.Buffer.
type reader struct {
	src bytes.Buffer
	dec jsontext.Decoder
}

// accepts reports whether args are certainly valid. nil stands for {}.
func (q *quick) accepts(args jsontext.Value) bool {
	if args == nil {
		return q.kind == '{' && q.required == 0
	}
	r := decoders.Get().(*reader)
	defer decoders.Put(r)
	r.src = *bytes.NewBuffer(args)
	r.dec.Reset(&r.src)
	return q.next(&r.dec)
}

func (q *quick) next(d *jsontext.Decoder) bool {
	k := d.PeekKind()
	if k == 'f' {
		k = 't'
	}
	if byte(k) != q.kind {
		return false
	}
	switch q.kind {
	case '{':
		return q.object(d)
	case '[':
		return q.array(d)
	}
	v, err := d.ReadValue()
	if err != nil {
		return false
	}
	switch q.kind {
	case '"':
		return q.text(v)
	case '0':
		return q.number(v)
	}
	return true
}

func (q *quick) object(d *jsontext.Decoder) bool {
	if _, err := d.ReadToken(); err != nil {
		return false
	}
	missing := q.required
	for d.PeekKind() == '"' {
		t, err := d.ReadToken()
		if err != nil {
			return false
		}
		name := t.String()
		if q.isRequired[name] {
			missing--
		}
		p := q.props[name]
		switch {
		case p != nil:
			if !p.next(d) {
				return false
			}
		case q.closed:
			return false
		default:
			if d.SkipValue() != nil {
				return false
			}
		}
	}
	_, err := d.ReadToken()
	return err == nil && missing == 0
}

func (q *quick) array(d *jsontext.Decoder) bool {
	if _, err := d.ReadToken(); err != nil {
		return false
	}
	n := 0
	for d.PeekKind() != ']' {
		n++
		if q.items == nil {
			if d.SkipValue() != nil {
				return false
			}
		} else if !q.items.next(d) {
			return false
		}
	}
	_, err := d.ReadToken()
	return err == nil && n >= q.minItems && (q.maxItems < 0 || n <= q.maxItems)
}

func (q *quick) text(v jsontext.Value) bool {
	if q.enum == nil && q.minLen <= 0 && q.maxLen < 0 && q.pattern == nil {
		return true
	}
	s := unquote(v)
	if q.enum != nil && !q.enum[s] {
		return false
	}
	if q.minLen > 0 || q.maxLen >= 0 {
		n := utf8.RuneCountInString(s)
		if n < q.minLen || q.maxLen >= 0 && n > q.maxLen {
			return false
		}
	}
	return q.pattern == nil || q.pattern.MatchString(s)
}

// number accepts plain decimal numbers that a float64 compares exactly; others are left to the
// full validator.
func (q *quick) number(v jsontext.Value) bool {
	if len(v) > 15 {
		return false
	}
	whole := true
	for i := range len(v) {
		switch v[i] {
		case 'e', 'E':
			return false
		case '.':
			whole = false
		}
	}
	if q.integer && !whole {
		return false
	}
	if q.minimum == nil && q.maximum == nil {
		return true
	}
	f, err := strconv.ParseFloat(string(v), 64)
	if err != nil {
		return false
	}
	return (q.minimum == nil || f >= *q.minimum) && (q.maximum == nil || f <= *q.maximum)
}
