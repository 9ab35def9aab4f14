package catalog

import (
	"bytes"
	"errors"
	"fmt"

	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
)

// encode returns the definition of a capability as lists show it. Member order is fixed, so
// that equal capabilities have equal bytes.
func encode(c *call.Capability) ([]byte, error) {
	if c.Definition != nil {
		return withExecution(c), nil
	}
	w := writer{b: []byte{'{'}}
	switch {
	case c.Kind == call.Resource && c.Template != "":
		w.str("uriTemplate", c.Template)
	case c.Kind == call.Resource:
		w.str("uri", c.URI)
	}
	w.str("name", nameOf(c))
	w.optional("title", c.Title)
	w.optional("description", c.Description)
	w.raw("icons", c.Icons)
	switch c.Kind {
	case call.Tool:
		w.raw("inputSchema", c.Input)
		w.raw("outputSchema", c.Output)
		w.raw("annotations", annotations(c))
		if c.Tasks != call.TaskForbidden {
			w.raw("execution", execution(c))
		}
	case call.Resource:
		w.optional("mimeType", c.MIME)
		if c.Size > 0 && c.Template == "" {
			w.raw("size", fmt.Append(nil, c.Size))
		}
		w.raw("annotations", c.Annotations)
	case call.Prompt:
		w.arguments(c.Arguments)
	}
	w.raw("_meta", meta(c))
	def := jsontext.Value(append(w.b, '}'))
	if !def.IsValid() {
		return nil, errors.New("icons, annotations or _meta are not valid JSON")
	}
	return def, def.Compact() // schemas are written over several lines; order and digits stay
}

// execution says whether a tool may be a task (MCP 2025-11-25, tool-level negotiation).
func execution(c *call.Capability) []byte {
	return []byte(`{"taskSupport":"` + c.Tasks.String() + `"}`)
}

// withExecution is a definition that others wrote, with the support for tasks that counts here. All else
// of it stays, byte for byte.
func withExecution(c *call.Capability) []byte {
	if c.Kind != call.Tool || c.Tasks == call.TaskForbidden && !bytes.Contains(c.Definition, []byte(`"taskSupport"`)) {
		return c.Definition
	}
	w, more := writer{b: []byte{'{'}}, writer{b: []byte{'{'}}
	_ = call.EachMember(c.Definition, func(name string, v jsontext.Value) { // it is an object
		if name != "execution" {
			w.raw(name, v)
			return
		}
		_ = call.EachMember(v, func(name string, v jsontext.Value) { // if it is none, it says nothing
			if name != "taskSupport" {
				more.raw(name, v)
			}
		})
	})
	if c.Tasks != call.TaskForbidden {
		more.str("taskSupport", c.Tasks.String())
	}
	if len(more.b) > 1 {
		w.raw("execution", append(more.b, '}'))
	}
	return append(w.b, '}')
}

func nameOf(c *call.Capability) string {
	switch {
	case c.Name != "":
		return c.Name
	case c.URI != "":
		return c.URI
	}
	return c.Template
}

// annotations returns the declared annotations of a tool, or those that follow from its effect.
func annotations(c *call.Capability) jsontext.Value {
	if c.Annotations != nil {
		return c.Annotations
	}
	switch c.Effect {
	case call.Read:
		return jsontext.Value(`{"readOnlyHint":true}`)
	case call.Write:
		return jsontext.Value(`{"readOnlyHint":false,"destructiveHint":false}`)
	case call.Destructive:
		return jsontext.Value(`{"readOnlyHint":false,"destructiveHint":true}`)
	}
	return nil
}

// meta returns the declared _meta, or one that carries owner, version and tags under our prefix.
func meta(c *call.Capability) jsontext.Value {
	if c.Meta != nil || c.Owner == "" && c.Version == "" && len(c.Tags) == 0 {
		return c.Meta
	}
	w := writer{b: []byte{'{'}}
	w.optional("dev.newel/owner", c.Owner)
	w.optional("dev.newel/version", c.Version)
	if len(c.Tags) > 0 {
		w.raw("dev.newel/tags", stringArray(c.Tags))
	}
	return append(w.b, '}')
}

func stringArray(ss []string) []byte {
	b := []byte{'['}
	for i, s := range ss {
		if i > 0 {
			b = append(b, ',')
		}
		b = call.AppendString(b, s)
	}
	return append(b, ']')
}

// writer appends the members of one object.
type writer struct{ b []byte }

func (w *writer) name(n string) {
	if len(w.b) > 1 {
		w.b = append(w.b, ',')
	}
	w.b = append(call.AppendString(w.b, n), ':')
}

func (w *writer) str(name, v string) {
	w.name(name)
	w.b = call.AppendString(w.b, v)
}

func (w *writer) optional(name, v string) {
	if v != "" {
		w.str(name, v)
	}
}

func (w *writer) raw(name string, v []byte) {
	if v != nil {
		w.name(name)
		w.b = append(w.b, v...)
	}
}

func (w *writer) arguments(args []call.Argument) {
	if len(args) == 0 {
		return
	}
	w.name("arguments")
	w.b = append(w.b, '[')
	for i, a := range args {
		if i > 0 {
			w.b = append(w.b, ',')
		}
		arg := writer{b: []byte{'{'}}
		arg.str("name", a.Name)
		arg.optional("title", a.Title)
		arg.optional("description", a.Description)
		if a.Required {
			arg.raw("required", []byte("true"))
		}
		w.b = append(append(w.b, arg.b...), '}')
	}
	w.b = append(w.b, ']')
}
