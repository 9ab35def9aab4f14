package catalog

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"github.com/santhosh-tekuri/jsonschema/v6"
	"github.com/santhosh-tekuri/jsonschema/v6/kind"
	"golang.org/x/text/language"
	"golang.org/x/text/message"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/nearest"
)

// maxProblems bounds what one error lists.
const maxProblems = 10

// longText is what is not repeated in errors.
const longText = 300

// problem is one way in which arguments do not fit, as the error's data lists it.
type problem struct {
	Path    string `json:"path"` // JSON pointer into the arguments
	Problem string `json:"problem"`
}

// explain validates args and returns nil, or an Invalid error that says what to send instead.
func explain(schema *jsonschema.Schema, doc any, args jsontext.Value) error {
	if args == nil {
		args = jsontext.Value("{}")
	}
	v, err := decode(args)
	if err != nil {
		return call.Errorf(call.Invalid, "the arguments are refused: %s", err)
	}
	if !affordable(schema, v) {
		return call.Errorf(call.Invalid, "the arguments are refused: %s; send fewer or simpler ones", errUnaffordable)
	}
	err = schema.Validate(v)
	if err == nil {
		return nil
	}
	var ve *jsonschema.ValidationError
	if !errors.As(err, &ve) {
		return call.Errorf(call.Invalid, "the arguments do not fit the schema").Because(err)
	}
	var problems []problem
	collect(ve, doc, &problems)
	if len(problems) == 0 {
		problems = []problem{{Path: "", Problem: "does not fit the schema"}}
	}
	texts := make([]string, len(problems))
	for i, p := range problems {
		texts[i] = p.Problem
		if p.Path != "" {
			texts[i] = p.Path + ": " + p.Problem
		}
	}
	e := call.Errorf(call.Invalid, "invalid arguments: %s", strings.Join(texts, "; "))
	if data, err := json.Marshal(map[string]any{"problems": problems}); err == nil {
		e.Data = data
	}
	return e
}

// collect turns the leaves of a validation error into problems.
func collect(e *jsonschema.ValidationError, doc any, out *[]problem) {
	if len(*out) >= maxProblems {
		return
	}
	path := pointer(e.InstanceLocation)
	switch k := e.ErrorKind.(type) {
	case *kind.AdditionalProperties:
		known := propertiesAt(doc, e.InstanceLocation)
		for _, name := range k.Properties {
			*out = append(*out, problem{path, unknown(name, known)})
		}
		return
	case *kind.Required:
		for _, name := range k.Missing {
			*out = append(*out, problem{path, fmt.Sprintf("%q is required and missing", name)})
		}
		return
	case *kind.Type:
		*out = append(*out, problem{path, fmt.Sprintf("must be of type %s, not %s", strings.Join(k.Want, " or "), k.Got)})
		return
	case *kind.Pattern:
		if len(k.Got) > longText {
			*out = append(*out, problem{path, fmt.Sprintf("the text of %d bytes does not match the pattern %.200s, or is too long for it", len(k.Got), k.Want)})
			return
		}
	case *kind.Enum:
		*out = append(*out, problem{path, fmt.Sprintf("must be one of %s", values(k.Want))})
		return
	}
	if len(e.Causes) == 0 {
		text := e.ErrorKind.LocalizedString(message.NewPrinter(language.English))
		*out = append(*out, problem{path, clip(text, 300)})
		return
	}
	for _, c := range e.Causes {
		collect(c, doc, out)
	}
}

func pointer(loc []string) string {
	var b strings.Builder
	for _, s := range loc {
		b.WriteByte('/')
		b.WriteString(strings.NewReplacer("~", "~0", "/", "~1").Replace(s))
	}
	return clip(b.String(), 200)
}

func values(want []any) string {
	var parts []string
	for i, v := range want {
		if i == 20 {
			parts = append(parts, "…")
			break
		}
		b, err := json.Marshal(v)
		if err != nil {
			continue
		}
		parts = append(parts, string(b))
	}
	return strings.Join(parts, ", ")
}

func clip(s string, n int) string {
	if len(s) <= n {
		return s
	}
	return strings.ToValidUTF8(s[:n], "") + "…"
}

// propertiesAt returns the property names that the schema declares at an instance location, as
// far as plain properties and items lead there.
func propertiesAt(doc any, loc []string) []string {
	node, _ := doc.(map[string]any)
	for _, step := range loc {
		props, _ := node["properties"].(map[string]any)
		if next, ok := props[step].(map[string]any); ok {
			node = next
			continue
		}
		node, _ = node["items"].(map[string]any)
	}
	props, _ := node["properties"].(map[string]any)
	names := make([]string, 0, len(props))
	for n := range props {
		names = append(names, n)
	}
	slices.Sort(names)
	return names
}

// unknown says that a member is not known, and which one was probably meant.
func unknown(name string, known []string) string {
	best := nearest.Name(name, known)
	switch {
	case best != "":
		return fmt.Sprintf("unknown member %q; did you mean %q?", clip(name, 80), best)
	case len(known) == 0:
		return fmt.Sprintf("unknown member %q; none are accepted here", clip(name, 80))
	}
	return fmt.Sprintf("unknown member %q; accepted: %s", clip(name, 80), clip(strings.Join(known, ", "), 300))
}
