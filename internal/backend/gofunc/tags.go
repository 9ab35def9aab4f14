package gofunc

import (
	"cmp"
	"errors"
	"fmt"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"github.com/santhosh-tekuri/jsonschema/v6"
)

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
	typ := s.typeName()
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
		case r.tag == "pattern":
			if _, err := regexp.Compile(v); err != nil {
				return fmt.Errorf("the tag pattern: %w", err)
			}
			v = quote(v)
		default:
			v = quote(v)
		}
		s.replace(r.keyword, v)
	}
	for _, pair := range [][2]string{{"minimum", "maximum"}, {"minLength", "maxLength"}, {"minItems", "maxItems"}} {
		lowest, errLow := strconv.ParseFloat(s.keyword(pair[0]), 64)
		highest, errHigh := strconv.ParseFloat(s.keyword(pair[1]), 64)
		if errLow == nil && errHigh == nil && lowest > highest {
			return fmt.Errorf("the tag %s is above the tag %s: nothing fits", pair[0], pair[1])
		}
	}
	if v, ok := f.Tag.Lookup("enum"); ok {
		if err := s.enum(typ, v); err != nil {
			return fmt.Errorf("the tag enum: %w", err)
		}
	}
	if v, ok := f.Tag.Lookup("default"); ok {
		j, err := literal(typ, v)
		if err == nil {
			err = json.Unmarshal([]byte(j), reflect.New(f.Type).Interface())
		}
		if err == nil {
			err = s.fits(j)
		}
		if err != nil {
			return fmt.Errorf("the tag default: %w", err)
		}
		s.set("default", j)
	}
	return nil
}

// typeName is the type keyword, without null.
func (s schema) typeName() string {
	return strings.Trim(strings.TrimSuffix(strings.TrimPrefix(s.keyword("type"), "["), `,"null"]`), `"`)
}

// allowNull lets a value be null.
func (s *schema) allowNull() {
	if t := s.keyword("type"); t != "" && t[0] == '"' {
		s.replace("type", "["+t+`,"null"]`)
	}
}

// forbidNull takes allowNull back.
func (s *schema) forbidNull() {
	if s.keyword("type") != "" {
		s.replace("type", quote(s.typeName()))
	}
}

// enum lists the values of a field, or of the elements of a slice.
func (s *schema) enum(typ, list string) error {
	if typ == "array" {
		items := jsontext.Value(s.keyword("items"))
		var of struct {
			Type jsontext.Value `json:"type"`
		}
		if err := json.Unmarshal(items, &of); err != nil || of.Type.Kind() != '"' {
			return errors.New("does not fit the elements of this slice")
		}
		inner := ofType(strings.Trim(string(of.Type), `"`))
		if string(inner.encode()) != string(items) {
			return errors.New("does not fit the elements of this slice")
		}
		if err := inner.enum(inner.typeName(), list); err != nil {
			return err
		}
		s.replace("items", string(inner.encode()))
		return nil
	}
	if typ == "object" || typ == "" {
		return fmt.Errorf("does not fit a value of type %q", typ)
	}
	var values []string
	for one := range strings.SplitSeq(list, ",") {
		j, err := literal(typ, strings.TrimSpace(one))
		if err != nil {
			return err
		}
		if slices.Contains(values, j) {
			return fmt.Errorf("%s stands there twice", j)
		}
		values = append(values, j)
	}
	if strings.HasSuffix(s.keyword("type"), `"null"]`) {
		values = append(values, "null")
	}
	s.set("enum", "["+strings.Join(values, ",")+"]")
	return nil
}

// compile returns a validator of a schema that was derived here.
func compile(schema jsontext.Value) (*jsonschema.Schema, error) {
	doc, err := jsonschema.UnmarshalJSON(strings.NewReader(string(schema)))
	if err != nil {
		return nil, err
	}
	c := jsonschema.NewCompiler()
	c.DefaultDraft(jsonschema.Draft2020)
	c.AssertFormat()
	if err := c.AddResource("urn:newel:derived", doc); err != nil {
		return nil, err
	}
	return c.Compile("urn:newel:derived")
}

// fits checks a default against its own keywords.
func (s schema) fits(value string) error {
	compiled, err := compile(s.encode())
	if err != nil {
		return err
	}
	v, err := jsonschema.UnmarshalJSON(strings.NewReader(value))
	if err != nil {
		return err
	}
	if err := compiled.Validate(v); err != nil {
		return fmt.Errorf("%s does not fit the other tags of its field", value)
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
	if j := jsontext.Value(v); !j.IsValid() || !kindFits(typ, j.Kind()) {
		return "", fmt.Errorf("%q is not a value of type %q", v, typ)
	}
	return v, nil
}

// kindFits reports whether JSON of a kind can be of a type; "" is any type.
func kindFits(typ string, kind jsontext.Kind) bool {
	switch typ {
	case "integer", "number":
		return kind == '0'
	case "boolean":
		return kind == 't' || kind == 'f'
	case "array":
		return kind == '['
	case "object":
		return kind == '{'
	}
	return true
}
