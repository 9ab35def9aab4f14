package catalog

import (
	"encoding/json" // only for the type json.Number
	"fmt"
	"math"
	"regexp"
	"regexp/syntax"

	"github.com/santhosh-tekuri/jsonschema/v6"
)

// Bounds of what schemas may cost. Servers behind the gateway write schemas, and callers what is held
// against them: neither may choose how much memory or time that takes.
const (
	// maxPatternBytes and maxPatternSize bound one regular expression: its text, and the instructions of
	// its program, where x{1000} is a thousand. A program takes about 40 bytes for each.
	maxPatternBytes = 4 << 10
	maxPatternSize  = 10_000
	// maxPatternSizes bounds all of one backend that is not ours together.
	maxPatternSizes = 200_000
	// maxDefinitionBytes and maxNodes bound the schemas of one such backend together: a compiled node takes
	// about a kilobyte. A server of 1,000 tools like the largest 1 % has 110,000.
	maxDefinitionBytes = 8 << 20
	maxNodes           = 150_000
	// maxMatchCost bounds what holding a text against an expression may take: bytes of the text times
	// instructions, the worst case of a matcher that never goes back. About 30 ms.
	maxMatchCost = 4 << 20
	// maxLooks bounds how often schemas are held against values in one check, beside four times for each
	// value: schemas that refer to each other can make it exponential. About a microsecond each.
	maxLooks = 20_000
)

// A spending is what the schemas of one backend cost together. It is not safe for concurrent use.
type spending struct {
	bytes, nodes, patterns int
	own                    bool // they are the operator's or the program's, who may have as many as there is memory for
}

// text takes a schema, before it is read, or says that the backend has spent what it may.
func (s *spending) text(bytes int) error {
	if s.bytes += bytes; s.bytes > maxDefinitionBytes && !s.own {
		return fmt.Errorf("the schemas of this backend are larger than %d bytes together", maxDefinitionBytes)
	}
	return nil
}

// values takes a schema, before it is compiled.
func (s *spending) values(count int) error {
	if s.nodes += count; s.nodes > maxNodes && !s.own {
		return fmt.Errorf("the schemas of this backend have more than %d nodes together", maxNodes)
	}
	return nil
}

// compile compiles a regular expression within the bounds of one, and of its backend.
func (s *spending) compile(text string) (*expression, error) {
	if len(text) > maxPatternBytes {
		return nil, fmt.Errorf("a pattern of %d bytes, over the limit of %d", len(text), maxPatternBytes)
	}
	tree, err := syntax.Parse(text, syntax.Perl)
	if err != nil {
		return nil, err
	}
	size := sizeOf(tree)
	if size > maxPatternSize {
		return nil, fmt.Errorf("the pattern %.60q has repeats that are too large", text)
	}
	if s.patterns += size; s.patterns > maxPatternSizes && !s.own {
		return nil, fmt.Errorf("the patterns of this backend are too large together")
	}
	re, err := regexp.Compile(text)
	if err != nil {
		return nil, err
	}
	return &expression{re, size}, nil
}

// sizeOf estimates the instructions of a program, before anything is allocated for them.
func sizeOf(re *syntax.Regexp) int {
	size := 1
	switch re.Op {
	case syntax.OpLiteral:
		size = len(re.Rune)
	case syntax.OpCharClass:
		size += len(re.Rune) / 4
	}
	for _, sub := range re.Sub {
		size = min(size+sizeOf(sub), math.MaxInt32)
	}
	if re.Op == syntax.OpRepeat {
		size = (size - 1) * max(re.Min+1, re.Max)
	}
	return max(1, min(size, math.MaxInt32))
}

// An expression is a compiled pattern that knows what it costs.
type expression struct {
	*regexp.Regexp
	size int
}

// affordable reports whether a text may be held against it.
func (e *expression) affordable(text string) bool { return len(text) <= maxMatchCost/e.size }

// MatchString implements jsonschema.Regexp. A text that is too long for the pattern does not match.
func (e *expression) MatchString(text string) bool {
	return e.affordable(text) && e.Regexp.MatchString(text)
}

// looks counts how often schemas would be held against parts of a value, at most: no branch is taken
// to be decided by another.
type looks struct{ left int }

// affordable reports whether v may be held against s.
func affordable(s *jsonschema.Schema, v any) bool {
	l := &looks{left: maxLooks + 4*valuesIn(v)}
	return l.take(s, v)
}

// valuesIn counts values.
func valuesIn(v any) int {
	n := 1
	switch v := v.(type) {
	case map[string]any:
		for _, m := range v {
			n += valuesIn(m)
		}
	case []any:
		for _, e := range v {
			n += valuesIn(e)
		}
	}
	return n
}

// take pays for holding v against s.
func (l *looks) take(s *jsonschema.Schema, v any) bool {
	if s == nil {
		return true
	}
	if l.left--; l.left < 0 {
		return false
	}
	if s.Bool != nil || !fits(s.Types, v) {
		return true // nothing else is looked at
	}
	return l.here(s, v) && l.below(s, v)
}

// here pays for the schemas that are held against the same value.
func (l *looks) here(s *jsonschema.Schema, v any) bool {
	for _, one := range []*jsonschema.Schema{s.Ref, s.RecursiveRef, s.Not, s.If, s.Then, s.Else, s.ContentSchema} {
		if !l.take(one, v) {
			return false
		}
	}
	if s.DynamicRef != nil && !l.take(s.DynamicRef.Ref, v) {
		return false
	}
	for _, some := range [][]*jsonschema.Schema{s.AllOf, s.AnyOf, s.OneOf} {
		for _, one := range some {
			if !l.take(one, v) {
				return false
			}
		}
	}
	for _, one := range s.DependentSchemas {
		if !l.take(one, v) {
			return false
		}
	}
	for _, d := range s.Dependencies {
		if one, ok := d.(*jsonschema.Schema); ok && !l.take(one, v) {
			return false
		}
	}
	return true
}

// below pays for those that are held against its members or elements.
func (l *looks) below(s *jsonschema.Schema, v any) bool {
	switch v := v.(type) {
	case map[string]any:
		more, _ := s.AdditionalProperties.(*jsonschema.Schema)
		for name, m := range v {
			if !l.take(s.PropertyNames, name) || !l.take(s.Properties[name], m) || !l.take(more, m) || !l.take(s.UnevaluatedProperties, m) {
				return false
			}
			for re, one := range s.PatternProperties {
				if l.left--; l.left < 0 || re.MatchString(name) && !l.take(one, m) {
					return false
				}
			}
		}
	case []any:
		more, _ := s.AdditionalItems.(*jsonschema.Schema)
		all, _ := s.Items.(*jsonschema.Schema)
		first, _ := s.Items.([]*jsonschema.Schema)
		first = append(first[:len(first):len(first)], s.PrefixItems...)
		for i, e := range v {
			for _, one := range []*jsonschema.Schema{all, more, s.Items2020, s.Contains, s.UnevaluatedItems} {
				if !l.take(one, e) {
					return false
				}
			}
			if i < len(first) && !l.take(first[i], e) {
				return false
			}
		}
	}
	return true
}

// fits reports whether a value may be of one of the types.
func fits(t *jsonschema.Types, v any) bool {
	if t == nil || t.IsEmpty() {
		return true
	}
	for _, name := range t.ToStrings() {
		ok := false
		switch v.(type) {
		case map[string]any:
			ok = name == "object"
		case []any:
			ok = name == "array"
		case string:
			ok = name == "string"
		case json.Number:
			ok = name == "number" || name == "integer"
		case bool:
			ok = name == "boolean"
		case nil:
			ok = name == "null"
		}
		if ok {
			return true
		}
	}
	return false
}
