package redact

import (
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

// Secret is what a schema says is secret: members that are writeOnly, or whose format is password
// (JSON Schema 2020-12, Validation 9.4). A member counts wherever its name appears in the value: more
// is redacted then, never less.
type Secret struct {
	all   bool // nobody can tell what not
	names map[string]bool
}

const maxRefs = 16 // that lead to one another

// Of reads a schema. It returns nil if nothing in it is secret. What it does not understand of a
// schema (references to elsewhere, dynamic ones) says nothing.
func Of(schema jsontext.Value) *Secret {
	var root any
	if len(schema) == 0 || json.Unmarshal(schema, &root) != nil {
		return nil
	}
	s := &reader{root: root, out: Secret{names: map[string]bool{}}, left: maxNodes}
	if s.secret(root, 0) {
		s.out.all = true
	}
	s.collect(root)
	if s.left <= 0 { // larger than anybody writes: rather too much
		s.out.all = true
	}
	if !s.out.all && len(s.out.names) == 0 {
		return nil
	}
	return &s.out
}

// maxNodes bounds the work on one schema: definitions that refer to each other could be walked for ever.
const maxNodes = 100_000

type reader struct {
	root any
	out  Secret
	left int
}

// collect looks for properties in all there is, whatever part of a schema it is.
func (s *reader) collect(v any) {
	if s.left--; s.left <= 0 {
		return
	}
	switch v := v.(type) {
	case map[string]any:
		for key, inner := range v {
			if properties, ok := inner.(map[string]any); ok && key == "properties" {
				for name, sub := range properties {
					if s.secret(sub, 0) {
						s.out.names[normal(name)] = true
					}
				}
			}
			s.collect(inner)
		}
	case []any:
		for _, inner := range v {
			s.collect(inner)
		}
	}
}

// secret reports whether what a schema describes is secret as a whole.
func (s *reader) secret(v any, refs int) bool {
	if s.left--; s.left <= 0 || refs > maxRefs {
		return false
	}
	m, ok := v.(map[string]any)
	if !ok {
		return false
	}
	if m["writeOnly"] == true || m["format"] == "password" {
		return true
	}
	if ref, ok := m["$ref"].(string); ok && s.secret(s.at(ref), refs+1) {
		return true
	}
	for _, key := range [...]string{"allOf", "anyOf", "oneOf", "prefixItems"} {
		list, _ := m[key].([]any)
		for _, sub := range list {
			if s.secret(sub, refs) {
				return true
			}
		}
	}
	for _, key := range [...]string{"items", "additionalProperties", "unevaluatedProperties", "then", "else"} {
		if s.secret(m[key], refs) {
			return true // its names are not known: all of it
		}
	}
	patterns, _ := m["patternProperties"].(map[string]any)
	for _, sub := range patterns {
		if s.secret(sub, refs) {
			return true
		}
	}
	return false
}

// at returns what a reference within the schema leads to, or nil.
func (s *reader) at(ref string) any {
	pointer, ok := strings.CutPrefix(ref, "#")
	if !ok {
		return nil
	}
	v := s.root
	if pointer == "" {
		return v
	}
	for _, part := range strings.Split(strings.TrimPrefix(pointer, "/"), "/") {
		m, ok := v.(map[string]any)
		if !ok {
			return nil
		}
		v = m[strings.NewReplacer("~1", "/", "~0", "~").Replace(part)]
	}
	return v
}
