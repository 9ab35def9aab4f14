package catalog

import (
	"bytes"
	"encoding/json" // only for the type json.Number, which the validator understands
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/go-json-experiment/json/jsontext"
	"github.com/santhosh-tekuri/jsonschema/v6"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/strictjson"
)

// Limits of one schema, far above the largest real ones (99.9 % of 7,331 have at most 17 KB,
// depth 14 and 660 nodes).
const (
	maxSchemaBytes = 128 << 10
	maxSchemaDepth = 32
	maxSchemaNodes = 5000
)

// A ParamHeader is an argument that callers over HTTP mirror in the header Mcp-Param-{Header}.
type ParamHeader struct {
	Header string   // as declared by x-mcp-header
	Path   []string // member names from the arguments object down
	Type   string   // string, integer or boolean
}

var emptyObjectSchema = jsontext.Value(`{"type":"object","additionalProperties":false}`)

// compileTool checks the schemas of a tool and sets its Check.
func (e *entry) compileTool(spent *spending) error {
	c := e.capability
	if c.Input == nil {
		c.Input = emptyObjectSchema
	}
	in, doc, patterns, err := compile("input", c.Input, spent)
	if err != nil {
		return err
	}
	if obj, ok := doc.(map[string]any); !ok || obj["type"] != "object" {
		return errors.New(`the input schema must be an object with "type": "object"`)
	}
	if e.headers, err = paramHeaders(doc); err != nil {
		return err
	}
	if c.Output != nil {
		out, doc, patterns, err := compile("output", c.Output, spent)
		if err != nil {
			return err
		}
		if c.CheckOutput == nil {
			quick := newQuick(doc, patterns)
			c.CheckOutput = func(structured jsontext.Value) error {
				if quick != nil && quick.accepts(structured) {
					return nil
				}
				v, err := decode(structured)
				if err != nil {
					return err
				}
				if !affordable(out, v) {
					return errUnaffordable
				}
				return out.Validate(v)
			}
		}
	}
	if c.Check == nil {
		quick := newQuick(doc, patterns)
		c.Check = func(args jsontext.Value) error {
			if quick != nil && quick.accepts(args) {
				return nil
			}
			return explain(in, doc, args)
		}
	}
	return nil
}

// CheckOutput validates structuredContent against its tool's output schema.
func CheckOutput(tool *call.Capability, structured jsontext.Value) error {
	if tool.CheckOutput == nil {
		return nil
	}
	return tool.CheckOutput(structured)
}

// compilePrompt sets the Check of a prompt from its arguments: required ones must be there,
// others may; all values are strings.
func (e *entry) compilePrompt(spent *spending) {
	c := e.capability
	if c.Check != nil {
		return
	}
	w := writer{b: []byte{'{'}}
	w.str("type", "object")
	w.raw("additionalProperties", []byte("false"))
	w.name("properties")
	w.b = append(w.b, '{')
	var required []string
	props := writer{b: []byte{'{'}}
	for _, a := range c.Arguments {
		p := writer{b: []byte{'{'}}
		p.str("type", "string")
		if len(a.Enum) > 0 {
			p.raw("enum", stringArray(a.Enum))
		}
		props.raw(a.Name, append(p.b, '}'))
		if a.Required {
			required = append(required, a.Name)
		}
	}
	w.b = append(append(w.b, props.b[1:]...), '}')
	w.raw("required", stringArray(required))
	w.b = append(w.b, '}')
	schema, doc, _, err := compile("arguments", w.b, spent)
	if err != nil { // made here from names alone: too large, if anything, and then nothing may pass
		c.Check = func(jsontext.Value) error { return call.Errorf(call.Internal, "internal error").Because(err) }
		return
	}
	c.Check = func(args jsontext.Value) error { return explain(schema, doc, args) }
}

// refuse is the loader of schemas: a $ref never leads out of its own document.
type refuse struct{}

func (refuse) Load(url string) (any, error) {
	return nil, fmt.Errorf("$ref to %q: references to other documents are not followed", url)
}

const schemaURL = "urn:newel:schema"

// errUnaffordable is a value that would take too long to check.
var errUnaffordable = errors.New("it would take too long to hold this against the schema")

// compile checks a JSON Schema (2020-12 unless $schema says otherwise) and its size. patterns are its
// regular expressions, by text.
func compile(what string, raw jsontext.Value, spent *spending) (_ *jsonschema.Schema, doc any, patterns map[string]*expression, err error) {
	if err := spent.text(len(raw)); err != nil {
		return nil, nil, nil, err
	}
	if err := strictjson.Check(raw, strictjson.Limits{Bytes: maxSchemaBytes, Depth: maxSchemaDepth, Elements: maxSchemaNodes}); err != nil {
		return nil, nil, nil, fmt.Errorf("the %s schema is refused: %w", what, err)
	}
	if doc, err = decode(raw); err == nil {
		err = spent.values(valuesIn(doc))
	}
	if err != nil {
		return nil, nil, nil, fmt.Errorf("the %s schema is refused: %w", what, err)
	}
	c := jsonschema.NewCompiler()
	c.DefaultDraft(jsonschema.Draft2020)
	c.UseLoader(refuse{})
	c.AssertFormat()
	patterns = map[string]*expression{}
	compiled := false
	c.UseRegexpEngine(func(text string) (jsonschema.Regexp, error) {
		if re := patterns[text]; re != nil {
			return re, nil
		}
		if compiled { // a caller's text, for the format regex: nothing is kept of it
			_, err := (&spending{}).compile(text)
			return nil, err
		}
		re, err := spent.compile(text)
		if err != nil {
			return nil, err
		}
		patterns[text] = re
		return re, nil
	})
	if err := c.AddResource(schemaURL, doc); err != nil {
		return nil, nil, nil, fmt.Errorf("the %s schema is not valid: %s", what, tidy(err))
	}
	s, err := c.Compile(schemaURL)
	if err != nil {
		return nil, nil, nil, fmt.Errorf("the %s schema is not valid: %s", what, tidy(err))
	}
	compiled = true
	return s, doc, patterns, nil
}

func tidy(err error) string {
	return strings.ReplaceAll(strings.Join(strings.Fields(err.Error()), " "), schemaURL, "")
}

// decode returns a strict JSON value as Go values, with numbers that keep their precision.
func decode(raw jsontext.Value) (any, error) {
	d := jsontext.NewDecoder(bytes.NewBuffer(raw)) // which is read where it lies
	return decodeNext(d)
}

// unquote returns the text of a JSON string that a decoder has passed.
func unquote(v jsontext.Value) string {
	if bytes.IndexByte(v, '\\') < 0 {
		return string(v[1 : len(v)-1])
	}
	s, err := jsontext.AppendUnquote(nil, v)
	if err != nil {
		return "" // it was passed
	}
	return string(s)
}

func decodeNext(d *jsontext.Decoder) (any, error) {
	if k := d.PeekKind(); k == '"' || k == '0' {
		v, err := d.ReadValue()
		if err != nil {
			return nil, err
		}
		if k == '0' {
			return number(v)
		}
		return unquote(v), nil
	}
	t, err := d.ReadToken()
	if err != nil {
		return nil, err
	}
	switch t.Kind() {
	case 'n':
		return nil, nil
	case 't', 'f':
		return t.Bool(), nil
	case '[':
		arr := []any{}
		for d.PeekKind() != ']' {
			v, err := decodeNext(d)
			if err != nil {
				return nil, err
			}
			arr = append(arr, v)
		}
		_, err := d.ReadToken()
		return arr, err
	}
	obj := map[string]any{}
	for d.PeekKind() != '}' {
		name, err := d.ReadToken()
		if err != nil {
			return nil, err
		}
		key := name.String()
		if obj[key], err = decodeNext(d); err != nil {
			return nil, err
		}
	}
	_, err = d.ReadToken()
	return obj, err
}

// ParamHeaders returns the headers that an input schema asks callers over HTTP to send.
func ParamHeaders(schema jsontext.Value) ([]ParamHeader, error) {
	if !bytes.Contains(schema, []byte("x-mcp-header")) {
		return nil, nil
	}
	doc, err := decode(schema)
	if err != nil {
		return nil, err
	}
	return paramHeaders(doc)
}

// paramHeaders collects x-mcp-header annotations. They are valid only on string, integer and
// boolean properties that are reachable through properties alone, with unique token names
// (MCP 2026-07-28, basic/transports/streamable-http).
func paramHeaders(doc any) ([]ParamHeader, error) {
	var out []ParamHeader
	seen := map[string]bool{}
	var walk func(node any, path []string, reachable bool) error
	walk = func(node any, path []string, reachable bool) error {
		switch n := node.(type) {
		case []any:
			for _, v := range n {
				if err := walk(v, path, false); err != nil {
					return err
				}
			}
		case map[string]any:
			if h, ok := n["x-mcp-header"]; ok {
				name, isString := h.(string)
				typ, _ := n["type"].(string)
				switch {
				case !isString || !isToken(name):
					return fmt.Errorf("x-mcp-header at %q must be a header token", strings.Join(path, "."))
				case !reachable || len(path) == 0:
					return fmt.Errorf("x-mcp-header %q may only stand on a property reached through properties alone", name)
				case typ != "string" && typ != "integer" && typ != "boolean":
					return fmt.Errorf("x-mcp-header %q may only stand on a string, integer or boolean", name)
				case seen[strings.ToLower(name)]:
					return fmt.Errorf("x-mcp-header %q is used twice", name)
				}
				seen[strings.ToLower(name)] = true
				out = append(out, ParamHeader{Header: name, Path: append([]string(nil), path...), Type: typ})
			}
			for k, v := range n {
				props, isMap := v.(map[string]any)
				if k == "properties" && isMap {
					for name, p := range props {
						if err := walk(p, append(path[:len(path):len(path)], name), reachable); err != nil {
							return err
						}
					}
					continue
				}
				if k == "enum" || k == "const" || k == "default" || k == "examples" {
					continue // data, not schema
				}
				if err := walk(v, path, false); err != nil {
					return err
				}
			}
		}
		return nil
	}
	if err := walk(doc, nil, true); err != nil {
		return nil, err
	}
	return out, nil
}

func isToken(s string) bool {
	for i := range len(s) {
		b := s[i]
		if b <= ' ' || b >= 0x7f || strings.IndexByte(`"(),/:;<=>?@[\]{}`, b) >= 0 {
			return false
		}
	}
	return s != ""
}

// maxExponent bounds the exponent of a number: the validator expands numbers to exact fractions,
// so that 1e999999999 would take all memory.
const maxExponent = 400

// maxDigits bounds its length for the same reason: reading digits takes more than linear time.
const maxDigits = 1000

// number returns a JSON number with all its digits.
func number(v jsontext.Value) (json.Number, error) {
	if len(v) > maxDigits {
		return "", fmt.Errorf("the number %s… has more than %d digits", string(v[:20]), maxDigits)
	}
	s := string(v)
	if i := strings.IndexAny(s, "eE"); i >= 0 {
		if e, err := strconv.Atoi(s[i+1:]); err != nil || e > maxExponent || e < -maxExponent {
			return "", fmt.Errorf("the number %.20s is out of range", s)
		}
	}
	return json.Number(s), nil
}
