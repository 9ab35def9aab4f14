package gofunc

import (
	"cmp"
	"fmt"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
)

// Schema derives the JSON Schema (2020-12) of a type.
//
// Structs become closed objects. A member is required unless its field is a pointer, has a
// default, or says omitempty or omitzero. Struct tags: doc (or jsonschema) is the description;
// enum lists values, separated by commas; minimum, maximum, minLength, maxLength, minItems,
// maxItems, pattern and format are the keywords of these names; default is the value of an absent
// member; header mirrors it in an Mcp-Param header. A tag that does not fit its field is an error
// that names the field. Recursive types are refused: write their schema by hand.
func Schema(t reflect.Type) (jsontext.Value, error) {
	s, err := derive(t, nil)
	if err != nil {
		return nil, err
	}
	if s.keyword("type") != `"object"` {
		return nil, fmt.Errorf("%v is no struct or map: the schema of arguments and results is that of an object", t)
	}
	return s.encode(), nil
}

// schema is an object of keywords in order.
type schema []keyword

type keyword struct {
	name  string
	value string // JSON
}

func (s schema) keyword(name string) string {
	for _, k := range s {
		if k.name == name {
			return k.value
		}
	}
	return ""
}

func (s *schema) set(name, value string) { *s = append(*s, keyword{name, value}) }

func (s schema) encode() jsontext.Value {
	b := jsontext.Value{'{'}
	for i, k := range s {
		if i > 0 {
			b = append(b, ',')
		}
		b = append(append(call.AppendString(b, k.name), ':'), k.value...)
	}
	return append(b, '}')
}

func quote(s string) string { return string(call.AppendString(nil, s)) }

func ofType(name string) schema { return schema{{"type", quote(name)}} }

// derive returns the schema of t; path holds the structs being derived.
func derive(t reflect.Type, path []reflect.Type) (schema, error) {
	switch t {
	case reflect.TypeFor[time.Time]():
		return schema{{"type", `"string"`}, {"format", `"date-time"`}}, nil
	case reflect.TypeFor[jsontext.Value]():
		return schema{}, nil
	case reflect.TypeFor[[]byte]():
		return schema{{"type", `"string"`}, {"contentEncoding", `"base64"`}}, nil
	}
	switch t.Kind() {
	case reflect.Pointer:
		return derive(t.Elem(), path)
	case reflect.Interface:
		return schema{}, nil
	case reflect.String:
		return ofType("string"), nil
	case reflect.Bool:
		return ofType("boolean"), nil
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		return ofType("integer"), nil
	case reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		return schema{{"type", `"integer"`}, {"minimum", "0"}}, nil
	case reflect.Float32, reflect.Float64:
		return ofType("number"), nil
	case reflect.Slice, reflect.Array:
		items, err := derive(t.Elem(), path)
		if err != nil {
			return nil, err
		}
		return schema{{"type", `"array"`}, {"items", string(items.encode())}}, nil
	case reflect.Map:
		if t.Key().Kind() != reflect.String {
			return nil, fmt.Errorf("%v: the keys of a map must be strings", t)
		}
		values, err := derive(t.Elem(), path)
		if err != nil {
			return nil, err
		}
		return schema{{"type", `"object"`}, {"additionalProperties", string(values.encode())}}, nil
	case reflect.Struct:
		return deriveStruct(t, path)
	}
	return nil, fmt.Errorf("%v has no JSON form", t)
}

func deriveStruct(t reflect.Type, path []reflect.Type) (schema, error) {
	if slices.Contains(path, t) {
		return nil, fmt.Errorf("%v contains itself; write its schema by hand", t)
	}
	path = append(path[:len(path):len(path)], t)
	var props schema
	var required []string
	err := eachField(t, func(f reflect.StructField, name string, optional bool) error {
		p, err := derive(f.Type, path)
		if err != nil {
			return fmt.Errorf("%v.%s: %w", t, f.Name, err)
		}
		if err := p.tags(f); err != nil {
			return fmt.Errorf("%v.%s: %w", t, f.Name, err)
		}
		if props.keyword(name) != "" {
			return fmt.Errorf("%v.%s: the name %q is used twice", t, f.Name, name)
		}
		props.set(name, string(p.encode()))
		if !optional && p.keyword("default") == "" {
			required = append(required, quote(name))
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	s := ofType("object")
	s.set("properties", string(props.encode()))
	if len(required) > 0 {
		s.set("required", "["+strings.Join(required, ",")+"]")
	}
	s.set("additionalProperties", "false")
	return s, nil
}

// eachField calls f for the JSON members of a struct, embedded structs included.
func eachField(t reflect.Type, f func(f reflect.StructField, name string, optional bool) error) error {
	for i := range t.NumField() {
		field := t.Field(i)
		tag := field.Tag.Get("json")
		name, options, _ := strings.Cut(tag, ",")
		if tag == "-" || !field.IsExported() && !field.Anonymous {
			continue
		}
		if field.Anonymous && name == "" && field.Type.Kind() == reflect.Struct {
			if err := eachField(field.Type, f); err != nil {
				return err
			}
			continue
		}
		if !field.IsExported() {
			continue
		}
		optional := field.Type.Kind() == reflect.Pointer || strings.Contains(options, "omitempty") || strings.Contains(options, "omitzero")
		if err := f(field, cmp.Or(name, field.Name), optional); err != nil {
			return err
		}
	}
	return nil
}

// tagRules: which tags fit which types, and how their values become JSON.
var tagRules = []struct {
	tag, keyword string
	types        string // types it fits
	integer      bool   // a count; otherwise any number, or a string
	number       bool
}{
	{"minimum", "minimum", "integer number", false, true},
	{"maximum", "maximum", "integer number", false, true},
	{"minLength", "minLength", "string", true, false},
	{"maxLength", "maxLength", "string", true, false},
	{"minItems", "minItems", "array", true, false},
	{"maxItems", "maxItems", "array", true, false},
	{"pattern", "pattern", "string", false, false},
	{"format", "format", "string", false, false},
	{"header", "x-mcp-header", "string integer boolean", false, false},
	{"title", "title", "", false, false},
}

// tags adds the keywords of a field's struct tags.
func (s *schema) tags(f reflect.StructField) error {
	if d := cmp.Or(f.Tag.Get("doc"), f.Tag.Get("jsonschema")); d != "" {
		s.set("description", quote(d))
	}
	typ := strings.Trim(s.keyword("type"), `"`)
	for _, r := range tagRules {
		v, ok := f.Tag.Lookup(r.tag)
		if !ok {
			continue
		}
		if r.types != "" && !slices.Contains(strings.Fields(r.types), typ) {
			return fmt.Errorf("the tag %s does not fit a value of type %q", r.tag, typ)
		}
		switch {
		case r.integer:
			if _, err := strconv.ParseUint(v, 10, 31); err != nil {
				return fmt.Errorf("the tag %s must be a whole number, not %q", r.tag, v)
			}
		case r.number:
			if _, err := strconv.ParseFloat(v, 64); err != nil || !jsontext.Value(v).IsValid() {
				return fmt.Errorf("the tag %s must be a number, not %q", r.tag, v)
			}
		default:
			v = quote(v)
		}
		s.replace(r.keyword, v)
	}
	if v, ok := f.Tag.Lookup("enum"); ok {
		var vals []string
		for one := range strings.SplitSeq(v, ",") {
			j, err := literal(typ, strings.TrimSpace(one))
			if err != nil {
				return fmt.Errorf("the tag enum: %w", err)
			}
			vals = append(vals, j)
		}
		s.set("enum", "["+strings.Join(vals, ",")+"]")
	}
	if v, ok := f.Tag.Lookup("default"); ok {
		j, err := literal(typ, v)
		if err != nil {
			return fmt.Errorf("the tag default: %w", err)
		}
		if err := json.Unmarshal([]byte(j), reflect.New(f.Type).Interface()); err != nil {
			return fmt.Errorf("the tag default: %w", err)
		}
		s.set("default", j)
	}
	return nil
}

func (s *schema) replace(name, value string) {
	for i := range *s {
		if (*s)[i].name == name {
			(*s)[i].value = value
			return
		}
	}
	s.set(name, value)
}

// literal returns a tag's text as JSON of a type.
func literal(typ, v string) (string, error) {
	if typ == "string" {
		return quote(v), nil
	}
	if !jsontext.Value(v).IsValid() {
		return "", fmt.Errorf("%q is not a value of type %q", v, typ)
	}
	return v, nil
}

// defaults returns a function that sets the defaults of a struct, or nil if it has none.
func defaults(t reflect.Type) (func(reflect.Value), error) {
	if t.Kind() != reflect.Struct {
		return nil, nil
	}
	var setters []func(reflect.Value)
	for i := range t.NumField() {
		f := t.Field(i)
		if !f.IsExported() {
			continue
		}
		if f.Type.Kind() == reflect.Struct && f.Type != reflect.TypeFor[time.Time]() {
			inner, err := defaults(f.Type)
			if err != nil {
				return nil, err
			}
			if inner != nil {
				setters = append(setters, func(v reflect.Value) { inner(v.Field(i)) })
			}
			continue
		}
		text, ok := f.Tag.Lookup("default")
		if !ok {
			continue
		}
		s, err := derive(f.Type, nil)
		if err != nil {
			return nil, err
		}
		raw, err := literal(strings.Trim(s.keyword("type"), `"`), text)
		if err != nil {
			return nil, fmt.Errorf("%v.%s: the tag default: %w", t, f.Name, err)
		}
		setters = append(setters, func(v reflect.Value) {
			// A fresh value for every call: pointers and slices are not shared. It was
			// decoded once when the schema was derived, so it decodes now.
			_ = json.Unmarshal([]byte(raw), v.Field(i).Addr().Interface())
		})
	}
	if len(setters) == 0 {
		return nil, nil
	}
	return func(v reflect.Value) {
		for _, set := range setters {
			set(v)
		}
	}, nil
}
