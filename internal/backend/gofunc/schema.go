package gofunc

import (
	"cmp"
	"encoding"
	"errors"
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

// Schema derives the JSON Schema (2020-12) of the JSON that a value of type t is decoded from.
//
// Structs become closed objects. A member is required unless its field is a pointer, has a
// default, or says omitempty or omitzero. Struct tags: doc (or jsonschema) is the description;
// enum lists values, separated by commas, of the field or of the elements of a slice; minimum,
// maximum, minLength, maxLength, minItems, maxItems, pattern, format and title are the keywords of
// these names; default is the value of an absent member; header mirrors it in an Mcp-Param header.
// A tag that does not fit its field is an error that names the field. Types that encode themselves
// as text are strings. Recursive types and types that encode themselves as JSON are refused: write
// their schema by hand.
func Schema(t reflect.Type) (jsontext.Value, error) { return objectSchema(t, false) }

// OutputSchema is Schema for the JSON that a value of type t is encoded to: null where Go writes
// null, for pointers that are not omitted.
func OutputSchema(t reflect.Type) (jsontext.Value, error) { return objectSchema(t, true) }

func objectSchema(t reflect.Type, out bool) (jsontext.Value, error) {
	s, err := deriver{out}.derive(indirect(t), nil)
	if err != nil {
		return nil, err
	}
	if s.keyword("type") != `"object"` {
		return nil, fmt.Errorf("%v is no struct or map: the schema of arguments and results is that of an object", t)
	}
	return s.encode(), nil
}

func indirect(t reflect.Type) reflect.Type {
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	return t
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

// deriver derives the schema of what is decoded, or of what is encoded.
type deriver struct{ out bool }

var (
	timeType     = reflect.TypeFor[time.Time]()
	rawType      = reflect.TypeFor[jsontext.Value]()
	durationType = reflect.TypeFor[time.Duration]()
)

// derive returns the schema of t; path holds the structs being derived.
func (d deriver) derive(t reflect.Type, path []reflect.Type) (schema, error) {
	switch t {
	case timeType:
		return schema{{"type", `"string"`}, {"format", `"date-time"`}}, nil
	case rawType:
		return schema{}, nil
	case durationType:
		return nil, errors.New("a time.Duration has no agreed JSON form; use a number whose name tells the unit, such as timeout_seconds")
	}
	switch self, err := ownForm(t, d.out); {
	case err != nil:
		return nil, err
	case self:
		return ofType("string"), nil
	}
	switch t.Kind() {
	case reflect.Pointer:
		s, err := d.derive(t.Elem(), path)
		if err == nil && d.out {
			s.allowNull()
		}
		return s, err
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
		if t.Elem().Kind() == reflect.Uint8 {
			return schema{{"type", `"string"`}, {"contentEncoding", `"base64"`}}, nil
		}
		items, err := d.derive(t.Elem(), path)
		if err != nil {
			return nil, err
		}
		s := schema{{"type", `"array"`}, {"items", string(items.encode())}}
		if t.Kind() == reflect.Array {
			s.set("minItems", strconv.Itoa(t.Len()))
			s.set("maxItems", strconv.Itoa(t.Len()))
		}
		return s, nil
	case reflect.Map:
		if own, _ := ownForm(t.Key(), d.out); t.Key().Kind() != reflect.String || own {
			return nil, fmt.Errorf("%v: the keys of a map must be plain strings", t)
		}
		values, err := d.derive(t.Elem(), path)
		if err != nil {
			return nil, err
		}
		return schema{{"type", `"object"`}, {"additionalProperties", string(values.encode())}}, nil
	case reflect.Struct:
		return d.deriveStruct(t, path)
	}
	return nil, fmt.Errorf("%v has no JSON form", t)
}

// ownForm reports whether a type encodes itself as text. One that encodes itself as JSON is an
// error: what it writes cannot be known.
func ownForm(t reflect.Type, out bool) (text bool, err error) {
	if t.Kind() == reflect.Interface {
		return false, nil
	}
	p := reflect.PointerTo(t)
	is := func(i reflect.Type) bool { return t.Implements(i) || p.Implements(i) }
	if is(reflect.TypeFor[json.Marshaler]()) || is(reflect.TypeFor[json.MarshalerTo]()) ||
		is(reflect.TypeFor[json.Unmarshaler]()) || is(reflect.TypeFor[json.UnmarshalerFrom]()) {
		if t.Kind() == reflect.Pointer {
			return false, nil // the same is said of what it points to
		}
		return false, fmt.Errorf("%v encodes itself as JSON; write the schema by hand", t)
	}
	if t.Kind() == reflect.Pointer {
		return false, nil
	}
	if out {
		return is(reflect.TypeFor[encoding.TextMarshaler]()) || is(reflect.TypeFor[encoding.TextAppender]()), nil
	}
	return is(reflect.TypeFor[encoding.TextUnmarshaler]()), nil
}

func (d deriver) deriveStruct(t reflect.Type, path []reflect.Type) (schema, error) {
	if slices.Contains(path, t) {
		return nil, fmt.Errorf("%v contains itself; write its schema by hand", t)
	}
	path = append(path[:len(path):len(path)], t)
	// The library's own rules for json tags, found now rather than in the first call.
	if err := json.Unmarshal([]byte("{}"), reflect.New(t).Interface()); err != nil {
		return nil, fmt.Errorf("%v: %w", t, err)
	}
	var props schema
	var required []string
	err := eachField(t, func(f reflect.StructField, name string, optional bool) error {
		p, err := d.derive(f.Type, path)
		if err != nil {
			return fmt.Errorf("%v.%s: %w", t, f.Name, err)
		}
		if optional {
			p.forbidNull()
		}
		if err := p.tags(f); err != nil {
			return fmt.Errorf("%v.%s: %w", t, f.Name, err)
		}
		if props.keyword(name) != "" {
			return fmt.Errorf("%v.%s: the name %q is used twice", t, f.Name, name)
		}
		props.set(name, string(p.encode()))
		if !optional && f.Type.Kind() != reflect.Pointer && p.keyword("default") == "" {
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

// eachField calls f for the JSON members of a struct, embedded structs included. optional is what
// the json tag says: the member is left out when it is empty.
func eachField(t reflect.Type, f func(f reflect.StructField, name string, optional bool) error) error {
	for i := range t.NumField() {
		field := t.Field(i)
		tag := field.Tag.Get("json")
		if tag == "-" || !field.IsExported() && !field.Anonymous {
			continue
		}
		name, options, _ := strings.Cut(tag, ",")
		if strings.ContainsAny(name, "'`\"\\") {
			return fmt.Errorf("%v.%s: a quoted name in the json tag is not understood here; use a plain name", t, field.Name)
		}
		optional, embed := false, field.Anonymous && name == ""
		for option := range strings.SplitSeq(options, ",") {
			switch option {
			case "omitempty", "omitzero":
				optional = true
			case "embed":
				embed = true
			case "", "case:strict":
			default:
				return fmt.Errorf("%v.%s: the json option %q has no place in a schema; use the name, omitempty, omitzero and embed", t, field.Name, option)
			}
		}
		if embed {
			inner := indirect(field.Type)
			if inner.Kind() != reflect.Struct {
				return fmt.Errorf("%v.%s: only structs can be embedded: what else stands there would not be described", t, field.Name)
			}
			if inner == t {
				return fmt.Errorf("%v contains itself; write its schema by hand", t)
			}
			if err := eachField(inner, f); err != nil {
				return err
			}
			continue
		}
		if !field.IsExported() {
			continue
		}
		if err := f(field, cmp.Or(name, field.Name), optional); err != nil {
			return err
		}
	}
	return nil
}
