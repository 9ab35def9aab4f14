package gofunc

import (
	"fmt"
	"reflect"

	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
)

// A filler adds the members that are absent and have a default. It makes the JSON that a value is
// decoded from; what the caller sent stays as it is. A nil filler adds nothing.
type filler struct {
	members []filled // of a struct
	each    *filler  // of the elements of an array, or of the values of a map
}

// filled is one member of a struct.
type filled struct {
	name  string
	value jsontext.Value // when absent; nil: stays absent
	inner *filler        // when present
}

// newFiller returns the filler of a type, or nil if nothing in it has a default. Tags have been
// checked when the schema was derived; those of a type with a schema of its own are checked here.
func newFiller(t reflect.Type) (*filler, error) {
	if !hasDefaults(t, map[reflect.Type]bool{}) {
		return nil, nil
	}
	return makeFiller(t, map[reflect.Type]*filler{})
}

// plain returns what t holds if it is decoded member by member, otherwise nil.
func plain(t reflect.Type) reflect.Type {
	t = indirect(t)
	if text, err := ownForm(t, false); t == timeType || t == rawType || text || err != nil {
		return nil
	}
	return t
}

// hasDefaults reports whether anything in t has a default.
func hasDefaults(t reflect.Type, seen map[reflect.Type]bool) bool {
	if t = plain(t); t == nil || seen[t] {
		return false
	}
	seen[t] = true
	switch t.Kind() {
	case reflect.Slice, reflect.Array, reflect.Map:
		return hasDefaults(t.Elem(), seen)
	case reflect.Struct:
		for i := range t.NumField() {
			f := t.Field(i)
			if _, ok := f.Tag.Lookup("default"); ok || hasDefaults(f.Type, seen) {
				return true
			}
		}
	}
	return false
}

// makeFiller builds the filler of t; made holds those of structs, because types may be recursive.
func makeFiller(t reflect.Type, made map[reflect.Type]*filler) (*filler, error) {
	if t = plain(t); t == nil {
		return nil, nil
	}
	if f, ok := made[t]; ok {
		return f, nil
	}
	out := &filler{}
	switch t.Kind() {
	case reflect.Slice, reflect.Array, reflect.Map:
		made[t] = out
		var err error
		out.each, err = makeFiller(t.Elem(), made)
		return out, err
	case reflect.Struct:
		made[t] = out
	default:
		return nil, nil
	}
	err := eachField(t, func(f reflect.StructField, name string, _ bool) error {
		inner, err := makeFiller(f.Type, made)
		if err != nil {
			return err
		}
		one := filled{name: name, inner: inner}
		if _, ok := f.Tag.Lookup("default"); ok {
			s, err := deriver{}.derive(f.Type, nil)
			if err == nil {
				err = s.tags(f)
			}
			if err != nil {
				return fmt.Errorf("%v.%s: %w", t, f.Name, err)
			}
			one.value = inner.fill(nil, jsontext.Value(s.keyword("default")))
		} else if f.Type.Kind() == reflect.Struct && hasDefaults(f.Type, map[reflect.Type]bool{}) {
			one.value = inner.fill(nil, jsontext.Value("{}"))
		}
		out.members = append(out.members, one)
		return nil
	})
	return out, err
}

// fill appends v with its defaults to dst. v is valid JSON.
func (f *filler) fill(dst, v jsontext.Value) jsontext.Value {
	switch {
	case f == nil || v.Kind() != '{' && v.Kind() != '[' || len(f.members) == 0 && f.each == nil:
		return append(dst, v...)
	case v.Kind() == '[':
		dst = append(dst, '[')
		first := true
		// The value was checked at the door: an error cannot happen, and what is missing would
		// fail to decode.
		_ = call.EachElement(v, func(e jsontext.Value) {
			dst = comma(dst, &first)
			dst = f.each.fill(dst, e)
		})
		return append(dst, ']')
	}
	dst = append(dst, '{')
	first := true
	present := make([]bool, len(f.members))
	_ = call.EachMember(v, func(name string, e jsontext.Value) {
		dst = comma(dst, &first)
		dst = append(call.AppendString(dst, name), ':')
		inner := f.each
		for i, m := range f.members {
			if m.name == name {
				present[i], inner = true, m.inner
			}
		}
		dst = inner.fill(dst, e)
	})
	for i, m := range f.members {
		if !present[i] && m.value != nil {
			dst = comma(dst, &first)
			dst = append(append(call.AppendString(dst, m.name), ':'), m.value...)
		}
	}
	return append(dst, '}')
}

func comma(dst jsontext.Value, first *bool) jsontext.Value {
	if *first {
		*first = false
		return dst
	}
	return append(dst, ',')
}
