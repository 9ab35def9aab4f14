package config

import (
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"

	"newel.dev/newel/internal/nearest"
	"newel.dev/newel/internal/secret"
)

// decoder holds YAML against Go types and gathers what does not fit.
type decoder struct {
	file     *File
	lines    []string
	secrets  Lookup
	problems Problems
}

const maxProblems = 50

func (d *decoder) problem(at position, path, message, suggestion string) {
	if len(d.problems) >= maxProblems {
		return
	}
	p := Problem{File: d.file.name, Line: at.line, Column: at.column, Path: path, Message: message, Suggestion: suggestion}
	if at.line >= 1 && at.line <= len(d.lines) {
		p.Source = strings.TrimRight(d.lines[at.line-1], "\r")
	}
	d.problems = append(d.problems, p)
}

// syntax takes the position out of the parser's error.
func syntax(err error) (line, column int, text string) {
	var e yaml.Error
	if errors.As(err, &e) && e.GetToken() != nil && e.GetToken().Position != nil {
		p := e.GetToken().Position
		return p.Line, p.Column, e.GetMessage()
	}
	text, _, _ = strings.Cut(err.Error(), "\n")
	return 1, 1, text
}

func where(n ast.Node) position {
	if n == nil || n.GetToken() == nil || n.GetToken().Position == nil {
		return position{1, 1}
	}
	if m, ok := n.(*ast.MappingNode); ok && len(m.Values) > 0 && !m.IsFlowStyle {
		return where(m.Values[0].Key)
	}
	if m, ok := n.(*ast.MappingValueNode); ok {
		return where(m.Key)
	}
	p := n.GetToken().Position
	return position{p.Line, p.Column}
}

// members returns the members of a mapping; ok is false for anything else.
func members(n ast.Node) ([]*ast.MappingValueNode, bool) {
	switch m := n.(type) {
	case *ast.MappingNode:
		return m.Values, true
	case *ast.MappingValueNode: // a mapping of one member
		return []*ast.MappingValueNode{m}, true
	}
	return nil, false
}

func child(n ast.Node, key string) ast.Node {
	ms, _ := members(n)
	for _, m := range ms {
		if keyOf(m) == key {
			return m.Value
		}
	}
	return nil
}

func keyOf(m *ast.MappingValueNode) string {
	if s, ok := m.Key.(*ast.StringNode); ok {
		return s.Value
	}
	return m.Key.String()
}

func join(path, key string) string {
	if path == "" {
		return key
	}
	return path + "." + key
}

// field is one setting of a struct.
type field struct {
	index    int
	key      string
	required bool
	initial  string // default
	enum     []string
	doc      string
	above    bool // zero is refused too: what is not given is left open
	typ      reflect.Type
}

func fieldsOf(t reflect.Type) []field {
	var fs []field
	for i := range t.NumField() {
		f := t.Field(i)
		key := f.Tag.Get("yaml")
		if key == "" || key == "-" {
			continue
		}
		fl := field{index: i, key: key, required: f.Tag.Get("required") == "true", initial: f.Tag.Get("default"), doc: f.Tag.Get("doc"), above: f.Tag.Get("above") == "0", typ: f.Type}
		if e := f.Tag.Get("enum"); e != "" {
			fl.enum = strings.Split(e, ",")
		}
		fs = append(fs, fl)
	}
	return fs
}

// mapping decodes a mapping into a struct. elsewhere tells which further keys another type takes.
func (d *decoder) mapping(n ast.Node, into reflect.Value, path string, elsewhere func(key string) bool) {
	d.file.positions[path] = where(n)
	ms, ok := members(n)
	if !ok {
		d.problem(where(n), path, fmt.Sprintf("must be a mapping (key: value), not %s", kindOf(n)), "")
		return
	}
	fields := fieldsOf(into.Type())
	given := map[string]bool{}
	for _, m := range ms {
		key := keyOf(m)
		at := where(m.Key)
		if given[key] {
			d.problem(at, join(path, key), fmt.Sprintf("%q is given twice", key), "")
			continue
		}
		given[key] = true
		i := slices.IndexFunc(fields, func(f field) bool { return f.key == key })
		if i < 0 {
			if elsewhere(key) {
				continue
			}
			if into.Type() == reflect.TypeFor[Backend]() {
				continue // settings of the backend's module: decoded with its type
			}
			names := make([]string, len(fields))
			for i, f := range fields {
				names[i] = f.key
			}
			d.problem(at, join(path, key), fmt.Sprintf("there is no setting %q here", key), suggest(key, names))
			continue
		}
		f := fields[i]
		d.file.positions[join(path, key)] = where(m.Value)
		if _, null := m.Value.(*ast.NullNode); null || m.Value == nil {
			given[key] = false
			continue
		}
		d.value(m.Value, into.Field(f.index), join(path, key), f)
	}
	for _, f := range fields {
		if given[f.key] {
			continue
		}
		if f.required {
			d.problem(where(n), join(path, f.key), fmt.Sprintf("the setting %q is missing", f.key), f.doc)
			continue
		}
		d.defaults(into.Field(f.index), f)
	}
}

// defaults sets what is not given. The texts stand in our own struct tags; a test decodes them all.
func (d *decoder) defaults(v reflect.Value, f field) {
	if f.initial != "" {
		if err := scalar(v, f.initial); err != nil {
			d.problem(position{1, 1}, f.key, "the default is not valid: "+err.Error(), "")
		}
		return
	}
	if v.Kind() == reflect.Struct && v.Type() != reflect.TypeFor[secret.String]() {
		for _, inner := range fieldsOf(v.Type()) {
			if !inner.required {
				d.defaults(v.Field(inner.index), inner)
			}
		}
	}
}

func kindOf(n ast.Node) string {
	switch n.(type) {
	case *ast.MappingNode, *ast.MappingValueNode:
		return "a mapping"
	case *ast.SequenceNode:
		return "a list"
	case *ast.NullNode, nil:
		return "nothing"
	case *ast.IntegerNode, *ast.FloatNode, *ast.InfinityNode, *ast.NanNode:
		return "a number"
	case *ast.BoolNode:
		return "true or false"
	case *ast.AnchorNode, *ast.AliasNode, *ast.MergeKeyNode, *ast.TagNode:
		return "an anchor, alias or tag, which are not supported: write it out"
	}
	return "text"
}

// value decodes one setting.
func (d *decoder) value(n ast.Node, into reflect.Value, path string, f field) {
	at := where(n)
	wrong := func(want string) {
		d.problem(at, path, fmt.Sprintf("must be %s, not %s", want, kindOf(n)), "")
	}
	t := into.Type()
	if t == reflect.TypeFor[secret.String]() {
		d.secret(n, into, path)
		return
	}
	switch t.Kind() {
	case reflect.Struct:
		d.mapping(n, into, path, func(string) bool { return false })
		return
	case reflect.Slice:
		seq, ok := n.(*ast.SequenceNode)
		if !ok {
			wrong("a list")
			return
		}
		out := reflect.MakeSlice(t, len(seq.Values), len(seq.Values))
		for i, v := range seq.Values {
			p := fmt.Sprintf("%s[%d]", path, i)
			d.file.positions[p] = where(v)
			d.value(v, out.Index(i), p, field{enum: f.enum})
		}
		into.Set(out)
		return
	case reflect.Map:
		d.table(n, into, path)
		return
	case reflect.Pointer:
		into.Set(reflect.New(t.Elem()))
		d.value(n, into.Elem(), path, field{})
		return
	}
	text, isText, ok := scalarOf(n)
	if !ok {
		wrong(wanted(t))
		return
	}
	if t.Kind() == reflect.Interface {
		into.Set(reflect.ValueOf(literal(n, text)))
		return
	}
	if t.Kind() == reflect.String && !isText {
		// 007, yes and 1.0 mean something else to YAML than to people.
		if _, null := n.(*ast.NullNode); null {
			wrong("text")
			return
		}
	}
	if strings.HasPrefix(text, "${") && strings.HasSuffix(text, "}") {
		d.problem(at, path, "references are for secrets only", "write the value itself")
		return
	}
	if err := scalar(into, text); err != nil {
		d.problem(at, path, err.Error(), "")
		return
	}
	if f.above && into.IsZero() {
		d.problem(at, path, "must be above zero", "leave it out for the default")
	}
	if len(f.enum) > 0 && !slices.Contains(f.enum, text) {
		d.problem(at, path, fmt.Sprintf("must be one of %s, not %q", strings.Join(f.enum, ", "), text), suggest(text, f.enum))
	}
}

// table decodes a mapping whose keys are free. Secrets in it may be plain text, because most of it
// is none, unless their name says that they are.
func (d *decoder) table(n ast.Node, into reflect.Value, path string) {
	ms, ok := members(n)
	if !ok {
		d.problem(where(n), path, fmt.Sprintf("must be a mapping (name: value), not %s", kindOf(n)), "")
		return
	}
	out := reflect.MakeMap(into.Type())
	for _, m := range ms {
		key := keyOf(m)
		at := join(path, key)
		d.file.positions[at] = where(m.Value)
		if out.MapIndex(reflect.ValueOf(key)).IsValid() {
			d.problem(where(m.Key), at, fmt.Sprintf("%q is given twice", key), "")
			continue
		}
		v := reflect.New(into.Type().Elem()).Elem()
		if v.Type() == reflect.TypeFor[secret.String]() {
			d.plainOrSecret(key, m.Value, v, at)
		} else {
			d.value(m.Value, v, at, field{})
		}
		out.SetMapIndex(reflect.ValueOf(key), v)
	}
	into.Set(out)
}

// secretNames are parts of names whose values are secrets.
var secretNames = []string{"AUTHORIZATION", "TOKEN", "SECRET", "PASSWORD", "PASSWD", "API_KEY", "APIKEY", "API-KEY", "PRIVATE_KEY", "COOKIE", "CREDENTIAL"}

// plainOrSecret decodes text that may hold references to secrets, such as Bearer ${env:TOKEN}.
func (d *decoder) plainOrSecret(name string, n ast.Node, into reflect.Value, path string) {
	text, _, ok := scalarOf(n)
	if !ok {
		d.problem(where(n), path, fmt.Sprintf("must be text, not %s", kindOf(n)), "")
		return
	}
	out, refs, err := d.expand(text)
	if err != nil {
		d.problem(where(n), path, err.Error(), "")
		return
	}
	if refs == 0 && text != "" && isSecretName(name) {
		d.problem(where(n), path, fmt.Sprintf("the value of %q is a secret by its name, and must be a reference", name), "write ${env:NAME} or ${file:path}")
		if len(d.problems) > 0 {
			d.problems[len(d.problems)-1].Source = "" // the line may hold the secret: it is not shown
		}
		return
	}
	into.Set(reflect.ValueOf(secret.New(out)))
}

// expand replaces the references in a text and returns how many there were.
func (d *decoder) expand(text string) (out string, refs int, err error) {
	for {
		before, rest, found := strings.Cut(text, "${")
		out += before
		if !found {
			return out, refs, nil
		}
		ref, after, closed := strings.Cut(rest, "}")
		kind, name, hasKind := strings.Cut(ref, ":")
		if !closed || !hasKind || name == "" || kind != "env" && kind != "file" {
			return "", refs, errors.New("a reference is not of the form ${env:NAME} or ${file:path}")
		}
		v := "unresolved"
		if d.secrets != nil {
			if v, err = d.secrets(kind, name); err != nil {
				return "", refs, err
			}
		}
		out, text = out+v, after
		refs++
	}
}

// scalarOf returns a scalar as text, and whether it was written as text.
func scalarOf(n ast.Node) (text string, isText, ok bool) {
	switch v := n.(type) {
	case *ast.StringNode:
		return v.Value, true, true
	case *ast.LiteralNode:
		return v.Value.Value, true, true
	case *ast.IntegerNode, *ast.FloatNode, *ast.BoolNode:
		return n.GetToken().Value, false, true
	}
	return "", false, false
}

// literal returns a scalar as YAML means it.
func literal(n ast.Node, text string) any {
	switch v := n.(type) {
	case *ast.IntegerNode:
		if i, err := strconv.ParseInt(text, 10, 64); err == nil {
			return i
		}
	case *ast.FloatNode:
		return v.Value
	case *ast.BoolNode:
		return v.Value
	}
	return text
}

func wanted(t reflect.Type) string {
	switch {
	case t == reflect.TypeFor[time.Duration]():
		return "a duration such as 30s or 5m"
	case t == reflect.TypeFor[Size]():
		return "a size such as 64KiB or 4MiB"
	}
	switch t.Kind() {
	case reflect.Bool:
		return "true or false"
	case reflect.Int, reflect.Int64:
		return "a whole number"
	case reflect.Float64:
		return "a number"
	}
	return "text"
}

// scalar sets a value from its text.
func scalar(v reflect.Value, text string) error {
	wrong := fmt.Errorf("must be %s, not %q", wanted(v.Type()), text)
	switch v.Type() {
	case reflect.TypeFor[time.Duration]():
		dur, err := time.ParseDuration(text)
		if err != nil {
			return wrong
		}
		if dur < 0 {
			return fmt.Errorf("must not be below zero")
		}
		v.SetInt(int64(dur))
		return nil
	case reflect.TypeFor[Size]():
		n, err := parseSize(text)
		if err != nil {
			return wrong
		}
		v.SetInt(int64(n))
		return nil
	}
	switch v.Kind() {
	case reflect.String:
		v.SetString(text)
	case reflect.Bool:
		if text != "true" && text != "false" {
			return wrong
		}
		v.SetBool(text == "true")
	case reflect.Int, reflect.Int64:
		n, err := strconv.ParseInt(strings.ReplaceAll(text, "_", ""), 10, 64)
		if err != nil {
			return wrong
		}
		if n < 0 {
			return fmt.Errorf("must not be below zero")
		}
		v.SetInt(n)
	case reflect.Float64:
		f, err := strconv.ParseFloat(text, 64)
		if err != nil {
			return wrong
		}
		v.SetFloat(f)
	default:
		return fmt.Errorf("settings of type %v are not supported", v.Type())
	}
	return nil
}

func parseSize(text string) (Size, error) {
	unit := 1
	for suffix, n := range map[string]int{"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30} {
		if rest, ok := strings.CutSuffix(text, suffix); ok {
			text, unit = strings.TrimSpace(rest), n
			break
		}
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 0 || n > 1<<40/unit {
		return 0, errors.New("not a size")
	}
	return Size(n * unit), nil
}

// secret takes references only: a secret in a file that is shown, copied and committed is none.
func (d *decoder) secret(n ast.Node, into reflect.Value, path string) {
	text, _, ok := scalarOf(n)
	ref, isRef := strings.CutPrefix(text, "${")
	ref, ends := strings.CutSuffix(ref, "}")
	kind, name, hasKind := strings.Cut(ref, ":")
	if !ok || !isRef || !ends || !hasKind || name == "" || kind != "env" && kind != "file" {
		d.problem(where(n), path, "must be a reference to a secret, never the secret itself", "write ${env:NAME} or ${file:path}")
		// The line may hold the secret: it is not shown.
		if len(d.problems) > 0 {
			d.problems[len(d.problems)-1].Source = ""
		}
		return
	}
	if d.secrets == nil {
		into.Set(reflect.ValueOf(secret.New("unresolved")))
		return
	}
	v, err := d.secrets(kind, name)
	if err != nil {
		d.problem(where(n), path, err.Error(), "")
		return
	}
	into.Set(reflect.ValueOf(secret.New(v)))
}

// suggest returns what was probably meant.
func suggest(got string, known []string) string {
	if best := nearest.Name(got, known); best != "" {
		return fmt.Sprintf("did you mean %q?", best)
	}
	sorted := slices.Clone(known)
	slices.Sort(sorted)
	return "known here: " + strings.Join(sorted, ", ")
}
