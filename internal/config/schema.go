package config

import (
	"fmt"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/internal/module"
	"newel.dev/newel/internal/secret"
)

type object = map[string]any

// Schema returns the JSON Schema of a configuration with the given modules, for editors.
func Schema(modules []module.Module) ([]byte, error) {
	s := schemaOf(reflect.TypeFor[Config](), field{})
	s["$schema"] = "https://json-schema.org/draft/2020-12/schema"
	s["title"] = "Newel configuration"
	var kinds []any
	var names []string
	for _, m := range modules {
		k := schemaOf(m.Config, field{})
		props, _ := k["properties"].(object)
		props["type"] = object{"const": m.Name, "description": m.Doc}
		props["name"] = object{"type": "string", "description": "Name of the backend, unique in the file."}
		required, _ := k["required"].([]string)
		k["required"] = append([]string{"type", "name"}, required...)
		kinds = append(kinds, object{"if": object{"properties": object{"type": object{"const": m.Name}}, "required": []string{"type"}}, "then": k})
		names = append(names, m.Name)
	}
	props, _ := s["properties"].(object)
	props["backends"] = object{"type": "array", "description": "What is served.", "items": object{
		"type": "object", "required": []string{"type", "name"}, "properties": object{"type": object{"enum": names}}, "allOf": kinds}}
	if at := slices.IndexFunc(modules, func(m module.Module) bool { return m.Name == serversModule }); at >= 0 {
		one := schemaOf(modules[at].Config, field{})
		props, _ := one["properties"].(object)
		props["type"] = object{"enum": []string{"stdio", "http", "streamable-http"}}
		all, _ := s["properties"].(object)
		all[serversKey] = object{"type": "object", "description": serversDoc, "additionalProperties": one}
	}
	return json.Marshal(s, json.Deterministic(true), jsontext.WithIndent("  "))
}

const serversDoc = "MCP servers behind the gateway, in the form that clients use: a name and a backend of type mcp."

func schemaOf(t reflect.Type, f field) object {
	o := object{}
	switch {
	case t == reflect.TypeFor[secret.String]():
		o["type"], o["pattern"] = "string", `^\$\{(env|file):.+\}$`
	case t == reflect.TypeFor[time.Duration]():
		o["type"], o["pattern"] = "string", `^[0-9.]+(ns|us|µs|ms|s|m|h)([0-9.]+(ns|us|µs|ms|s|m|h))*$`
	case t == reflect.TypeFor[Size]():
		o["type"], o["pattern"] = []string{"string", "integer"}, `^[0-9]+ *(KiB|MiB|GiB)?$`
	default:
		switch t.Kind() {
		case reflect.Pointer:
			return schemaOf(t.Elem(), f)
		case reflect.Struct:
			props := object{}
			var required []string
			for _, inner := range fieldsOf(t) {
				props[inner.key] = schemaOf(inner.typ, inner)
				if inner.required {
					required = append(required, inner.key)
				}
			}
			o["type"], o["properties"], o["additionalProperties"] = "object", props, false
			if required != nil {
				o["required"] = required
			}
		case reflect.Slice:
			o["type"], o["items"] = "array", schemaOf(t.Elem(), field{enum: f.enum})
			f.enum = nil
		case reflect.Map:
			values := schemaOf(t.Elem(), field{})
			if t.Elem() == reflect.TypeFor[secret.String]() {
				values = object{"type": "string"}
			}
			o["type"], o["additionalProperties"] = "object", values
		case reflect.Bool:
			o["type"] = "boolean"
		case reflect.Int, reflect.Int64:
			o["type"], o["minimum"] = "integer", 0
		case reflect.Float64:
			o["type"] = "number"
		case reflect.Interface:
		default:
			o["type"] = "string"
		}
	}
	if f.doc != "" {
		o["description"] = f.doc
	}
	if len(f.enum) > 0 {
		o["enum"] = f.enum
	}
	if f.initial != "" {
		o["default"] = defaultOf(t, f.initial)
	}
	return o
}

func defaultOf(t reflect.Type, text string) any {
	v := reflect.New(t).Elem()
	if t == reflect.TypeFor[time.Duration]() || t == reflect.TypeFor[Size]() || scalar(v, text) != nil {
		return text
	}
	return v.Interface()
}

// Reference returns the reference page of a configuration, in Markdown.
func Reference(modules []module.Module) string {
	var b strings.Builder
	b.WriteString("# Configuration reference\n\nMade from the code by `newel config reference`. Durations are written like `30s` or `5m`, sizes like `64KiB` or `4MiB`, secrets as `${env:NAME}` or `${file:path}`. Unknown settings are errors.\n")
	section(&b, "The file", "", reflect.TypeFor[Config](), "")
	fmt.Fprintf(&b, "| `%s` | mapping | – | %s |\n", serversKey, serversDoc)
	for _, m := range modules {
		section(&b, fmt.Sprintf("Backend `type: %s`", m.Name), m.Doc, m.Config, "backends[].")
	}
	return b.String()
}

func section(b *strings.Builder, title, doc string, t reflect.Type, prefix string) {
	fmt.Fprintf(b, "\n## %s\n\n", title)
	if doc != "" {
		fmt.Fprintf(b, "%s\n\n", doc)
	}
	b.WriteString("| Setting | Type | Default | Meaning |\n|---|---|---|---|\n")
	rows(b, t, prefix)
}

func rows(b *strings.Builder, t reflect.Type, prefix string) {
	for _, f := range fieldsOf(t) {
		inner := f.typ
		suffix := ""
		if inner.Kind() == reflect.Slice {
			inner, suffix = inner.Elem(), "[]"
		}
		if inner.Kind() == reflect.Pointer {
			inner = inner.Elem() // a mapping that may be left out
		}
		initial := "–"
		switch {
		case f.required:
			initial = "required"
		case f.initial != "":
			initial = "`" + f.initial + "`"
		}
		doc := f.doc
		if len(f.enum) > 0 {
			doc += " One of `" + strings.Join(f.enum, "`, `") + "`."
		}
		fmt.Fprintf(b, "| `%s%s` | %s | %s | %s |\n", prefix, f.key, typeName(f.typ), initial, strings.ReplaceAll(doc, "|", `\|`))
		if inner.Kind() == reflect.Struct && inner != reflect.TypeFor[secret.String]() {
			if inner == reflect.TypeFor[Backend]() {
				fmt.Fprintf(b, "| `backends[].type` | text | required | Kind of backend; its settings stand beside it, see below. |\n| `backends[].name` | text | required | Name of the backend, unique in the file. |\n")
				continue
			}
			rows(b, inner, prefix+f.key+suffix+".")
		}
	}
}

func typeName(t reflect.Type) string {
	switch {
	case t == reflect.TypeFor[secret.String]():
		return "secret"
	case t == reflect.TypeFor[time.Duration]():
		return "duration"
	case t == reflect.TypeFor[Size]():
		return "size"
	}
	switch t.Kind() {
	case reflect.Pointer:
		return typeName(t.Elem())
	case reflect.Struct, reflect.Map:
		return "mapping"
	case reflect.Slice:
		return "list"
	case reflect.Bool:
		return "boolean"
	case reflect.Int:
		return "integer"
	case reflect.Float64:
		return "number"
	case reflect.Interface:
		return "any"
	}
	return "text"
}
