package sqldb

import (
	"cmp"
	"context"
	"crypto/sha256"
	"database/sql"
	"encoding/base64"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
)

// statement is one declared statement, ready to run.
type statement struct {
	backend *Backend
	tool    *Tool
	config  *Config
	write   bool
	text    string  // with numbered parameters
	args    []bound // one per number
}

// bound says where the value of one numbered parameter comes from.
type bound struct {
	param *Param // what the caller gives
	key   int    // else: index of the page key, plus one
	limit bool   // else: rows to read
}

const (
	afterPrefix      = "after_"
	defaultMaxLength = 1000
)

// bind finds the source of every parameter in the statement, and refuses undeclared and unused ones.
func (s *statement) bind(names []string) (where string, err error) {
	used := map[string]bool{}
	for _, name := range names {
		used[name] = true
		if i := slices.IndexFunc(s.tool.Params, func(p Param) bool { return p.Name == name }); i >= 0 {
			s.args = append(s.args, bound{param: &s.tool.Params[i]})
			continue
		}
		if key, ok := strings.CutPrefix(name, afterPrefix); ok && slices.Contains(s.tool.Page.Key, key) {
			s.args = append(s.args, bound{key: slices.Index(s.tool.Page.Key, key) + 1})
			continue
		}
		if name == "limit" && s.paged() {
			s.args = append(s.args, bound{limit: true})
			continue
		}
		return ".sql", fmt.Errorf("the parameter :%s is not declared under params", name)
	}
	for i, p := range s.tool.Params {
		where := fmt.Sprintf(".params[%d]", i)
		switch {
		case !used[p.Name]:
			return where, fmt.Errorf("the parameter %q is declared and not used", p.Name)
		case s.paged() && (p.Name == "limit" || p.Name == "cursor"):
			return where, fmt.Errorf("%q belongs to the page; choose another name", p.Name)
		case len(p.Enum) > 0 && cmp.Or(p.Type, "string") != "string":
			return where + ".enum", errors.New("enum is for strings")
		}
		if p.Default != nil {
			if _, err := s.value(&s.tool.Params[i], literal(p.Default)); err != nil {
				return where + ".default", err
			}
		}
	}
	if s.paged() {
		for _, key := range s.tool.Page.Key {
			if !used[afterPrefix+key] {
				return ".page.key", fmt.Errorf("the statement does not use :%s%s, so a next page would start anew", afterPrefix, key)
			}
		}
		if !used["limit"] {
			return ".page", errors.New("the statement does not use :limit")
		}
		if s.tool.Page.Size < 1 || s.tool.Page.Max < s.tool.Page.Size || s.tool.Page.Max > s.config.MaxRows {
			return ".page", errors.New("size must be at least 1 and at most max, which is at most max_rows")
		}
	}
	return "", nil
}

func (s *statement) paged() bool { return len(s.tool.Page.Key) > 0 }

// pgTypes are the PostgreSQL types that a declared type fits.
var pgTypes = map[string][]string{
	"string":    {"text", "varchar", "bpchar", "char", "name", "uuid", "json", "jsonb", "citext", "inet", "cidr", "unknown", ""},
	"integer":   {"int2", "int4", "int8", "numeric", "float4", "float8", "oid"},
	"number":    {"numeric", "float4", "float8"},
	"boolean":   {"bool"},
	"date":      {"date", "timestamp", "timestamptz", "text"},
	"timestamp": {"timestamp", "timestamptz", "text"},
}

// fits holds the declaration against what the database says.
func (s *statement) fits(d description) (where string, err error) {
	switch {
	case d.writes && !s.write:
		return ".effect", errors.New("the statement writes, but the tool is declared as read; declare effect: write or destructive")
	case s.tool.Result == "affected" && !s.write:
		return ".result", errors.New("a read changes nothing: use rows or row")
	}
	for i, t := range d.params {
		a := s.args[i]
		if a.param == nil || t == "" {
			continue
		}
		if typ := cmp.Or(a.param.Type, "string"); !slices.Contains(pgTypes[typ], t) {
			return ".params", fmt.Errorf("the parameter %q is declared as %s, but the statement uses it as %s", a.param.Name, typ, t)
		}
	}
	if d.columns == nil {
		return "", nil // a write whose columns only its run tells
	}
	for i, c := range d.columns {
		if slices.Contains(d.columns[:i], c) {
			return ".sql", fmt.Errorf("two columns are named %q; rename one with AS", c)
		}
	}
	for _, c := range slices.Concat(s.tool.Page.Key, s.tool.JSON) {
		if !slices.Contains(d.columns, c) {
			return ".sql", fmt.Errorf("the result has no column %q; it has %s", c, strings.Join(d.columns, ", "))
		}
	}
	return "", nil
}

// object builds schemas.
type object = map[string]any

func encode(v any) jsontext.Value {
	b, err := json.Marshal(v, json.Deterministic(true))
	if err != nil {
		return nil // maps of strings, numbers and booleans: cannot fail
	}
	return b
}

func (s *statement) inputSchema() jsontext.Value {
	props := object{}
	required := []string{}
	for _, p := range s.tool.Params {
		o := object{"type": cmp.Or(p.Type, "string")}
		switch p.Type {
		case "date":
			o["type"], o["format"] = "string", "date"
		case "timestamp":
			o["type"], o["format"] = "string", "date-time"
		case "", "string":
			o["maxLength"] = defaultMaxLength
		}
		set := func(name string, v any, given bool) {
			if given {
				o[name] = v
			}
		}
		set("description", p.Description, p.Description != "")
		set("enum", p.Enum, len(p.Enum) > 0)
		set("pattern", p.Pattern, p.Pattern != "")
		set("default", p.Default, p.Default != nil)
		if p.Minimum != nil {
			o["minimum"] = *p.Minimum
		}
		if p.Maximum != nil {
			o["maximum"] = *p.Maximum
		}
		if p.MinLength != nil {
			o["minLength"] = *p.MinLength
		}
		if p.MaxLength != nil {
			o["maxLength"] = *p.MaxLength
		}
		props[p.Name] = o
		if p.Required {
			required = append(required, p.Name)
		}
	}
	if s.paged() {
		props["limit"] = object{"type": "integer", "minimum": 1, "maximum": s.tool.Page.Max, "default": s.tool.Page.Size, "description": "Rows of the page."}
		props["cursor"] = object{"type": "string", "maxLength": 4096, "description": "next_cursor of the page before; leave out for the first page."}
	}
	o := object{"type": "object", "properties": props, "additionalProperties": false}
	if len(required) > 0 {
		o["required"] = required
	}
	return encode(o)
}

func (s *statement) outputSchema(d description) jsontext.Value {
	row := object{"type": "object"}
	if d.columns != nil {
		props := object{}
		for _, c := range d.columns {
			props[c] = object{}
		}
		row["properties"], row["required"] = props, d.columns
	}
	switch s.tool.Result {
	case "affected":
		return encode(object{"type": "object", "properties": object{"affected": object{"type": "integer"}}, "required": []string{"affected"}})
	case "row":
		return encode(object{"type": "object", "properties": object{"row": row}, "required": []string{"row"}})
	}
	props := object{"rows": object{"type": "array", "items": row}, "row_count": object{"type": "integer"}}
	if s.paged() {
		props["next_cursor"] = object{"type": "string", "description": "Give it as cursor for the next page; absent on the last."}
	}
	return encode(object{"type": "object", "properties": props, "required": []string{"rows", "row_count"}})
}

// literal is a default from the configuration as JSON.
func literal(v any) jsontext.Value { return encode(v) }

// value turns an argument into what the driver takes. Types were checked against the schema;
// ranges are checked here.
func (s *statement) value(p *Param, raw jsontext.Value) (any, error) {
	wrong := func() error {
		return call.Errorf(call.Invalid, "%q must be a %s", p.Name, cmp.Or(p.Type, "string"))
	}
	switch cmp.Or(p.Type, "string") {
	case "integer":
		n, err := strconv.ParseInt(string(raw), 10, 64)
		if err != nil {
			f, ferr := strconv.ParseFloat(string(raw), 64) // 1.0 and 1e3 are integers too
			if ferr != nil || f != math.Trunc(f) || math.Abs(f) > 1<<53 {
				return nil, call.Errorf(call.Invalid, "%q must be a whole number of at most 64 bits", p.Name)
			}
			n = int64(f)
		}
		return n, nil
	case "number":
		f, err := strconv.ParseFloat(string(raw), 64)
		if err != nil {
			return nil, wrong()
		}
		return f, nil
	case "boolean":
		if raw.Kind() != 't' && raw.Kind() != 'f' {
			return nil, wrong()
		}
		return raw.Kind() == 't', nil
	}
	if raw.Kind() != '"' {
		return nil, wrong()
	}
	b, err := jsontext.AppendUnquote(nil, raw)
	if err != nil {
		return nil, wrong()
	}
	text := string(b)
	if strings.ContainsRune(text, 0) {
		return nil, call.Errorf(call.Invalid, "%q must not hold the character NUL", p.Name)
	}
	switch p.Type {
	case "date":
		if _, err := time.Parse(time.DateOnly, text); err != nil {
			return nil, call.Errorf(call.Invalid, "%q must be a date such as 2026-07-28", p.Name)
		}
	case "timestamp":
		t, err := time.Parse(time.RFC3339, text)
		if err != nil {
			return nil, call.Errorf(call.Invalid, "%q must be a time such as 2026-07-28T12:00:00Z", p.Name)
		}
		if s.backend.engine.postgres {
			return t, nil
		}
	}
	return text, nil
}

// cursor is where a page starts. It belongs to one statement and its other arguments.
type cursor struct {
	Digest string `json:"d"`
	Keys   []any  `json:"k"`
}

var errCursor = call.Errorf(call.Invalid, "the cursor does not belong to this query; use next_cursor of the page before with the same arguments, or leave it out")

// input is a call's arguments, ready for the driver.
type input struct {
	args   []any
	limit  int
	digest string
}

func (s *statement) input(raw jsontext.Value) (*input, error) {
	members := map[string]jsontext.Value{}
	if raw != nil {
		if err := json.Unmarshal(raw, &members); err != nil {
			return nil, call.Errorf(call.Invalid, "arguments must be an object")
		}
	}
	in := &input{limit: s.config.MaxRows}
	var after cursor
	if s.paged() {
		in.limit = s.tool.Page.Size
		if v, ok := members["limit"]; ok {
			n, err := s.value(&Param{Name: "limit", Type: "integer"}, v)
			if err != nil {
				return nil, err
			}
			i, _ := n.(int64)
			in.limit = int(min(max(i, 1), int64(s.tool.Page.Max)))
		}
		given := members["cursor"]
		delete(members, "limit")
		delete(members, "cursor")
		sum := sha256.Sum256(append([]byte(s.text+"\x00"), encode(members)...))
		in.digest = base64.RawURLEncoding.EncodeToString(sum[:9])
		if given != nil {
			var text string
			if json.Unmarshal(given, &text) != nil {
				return nil, errCursor
			}
			b, err := base64.RawURLEncoding.DecodeString(text)
			if err != nil || json.Unmarshal(b, &after) != nil || after.Digest != in.digest || len(after.Keys) != len(s.tool.Page.Key) {
				return nil, errCursor
			}
		}
	}
	for _, a := range s.args {
		switch {
		case a.limit:
			in.args = append(in.args, int64(in.limit)+1) // one more tells whether there is a next page
		case a.key > 0 && after.Keys == nil:
			in.args = append(in.args, nil)
		case a.key > 0:
			in.args = append(in.args, keyValue(after.Keys[a.key-1]))
		default:
			raw, ok := members[a.param.Name]
			if !ok && a.param.Default != nil {
				raw, ok = literal(a.param.Default), true
			}
			if !ok {
				in.args = append(in.args, nil)
				continue
			}
			v, err := s.value(a.param, raw)
			if err != nil {
				return nil, err
			}
			in.args = append(in.args, v)
		}
	}
	return in, nil
}

// keyValue undoes how JSON holds numbers: whole ones are integers.
func keyValue(v any) any {
	if f, ok := v.(float64); ok && f == math.Trunc(f) && math.Abs(f) < 1<<53 {
		return int64(f)
	}
	return v
}

// run runs the statement for one call.
func (s *statement) run(ctx context.Context, c *call.Call) (*call.Result, error) {
	in, err := s.input(c.Args)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, s.config.Timeout)
	defer cancel()
	if s.tool.Result == "affected" {
		n, err := s.backend.engine.run(ctx, true, s.text, in.args, nil)
		if err != nil {
			return nil, translate(ctx, err, true)
		}
		if n == 0 {
			return nil, s.nothing("nothing was changed: no row fits the arguments")
		}
		return call.Structured(struct {
			Affected int64 `json:"affected"`
		}{n}, fmt.Sprintf("%d rows changed.", n))
	}
	out := &output{statement: s, in: in}
	if _, err := s.backend.engine.run(ctx, s.write, s.text, in.args, out.add); err != nil {
		return nil, translate(ctx, err, s.write)
	}
	return out.result()
}

func (s *statement) nothing(otherwise string) error {
	return call.Errorf(call.Failed, "%s", cmp.Or(s.tool.None, otherwise))
}

// output gathers rows as JSON.
type output struct {
	statement *statement
	in        *input
	rows      jsontext.Value
	count     int
	more      bool
	keys      []any // of the last row
}

// add takes one row, unless that would pass a bound.
func (o *output) add(columns []*sql.ColumnType, values []any) error {
	s := o.statement
	if o.count == o.in.limit {
		o.more = true
		if s.paged() {
			return errEnough
		}
		return call.Errorf(call.TooLarge, "the result has more than %d rows; ask for less with narrower arguments", o.in.limit)
	}
	row := jsontext.Value{'{'}
	for i, c := range columns {
		if i > 0 {
			row = append(row, ',')
		}
		row = append(call.AppendString(row, c.Name()), ':')
		row = s.appendValue(row, c, values[i])
	}
	row = append(row, '}')
	if len(o.rows)+len(row) > s.config.MaxBytes {
		if !s.paged() || o.count == 0 {
			return call.Errorf(call.TooLarge, "the result is larger than %d bytes; ask for less with narrower arguments", s.config.MaxBytes)
		}
		o.more = true
		return errEnough
	}
	if o.count > 0 {
		o.rows = append(o.rows, ',')
	}
	o.rows = append(o.rows, row...)
	o.count++
	if s.paged() {
		o.keys = make([]any, len(s.tool.Page.Key))
		for i, c := range columns {
			if k := slices.Index(s.tool.Page.Key, c.Name()); k >= 0 {
				o.keys[k] = keyOf(values[i])
			}
		}
	}
	if s.tool.Result == "row" && o.count > 1 {
		return call.Errorf(call.Failed, "more than one row fits; the tool gives exactly one")
	}
	return nil
}

// keyOf returns a key's value as a cursor holds it, so that it comes back as it was.
func keyOf(v any) any {
	switch v := v.(type) {
	case time.Time:
		return v.Format(time.RFC3339Nano)
	case []byte:
		return string(v)
	}
	return v
}

// appendValue appends one value: numbers keep their digits, times are RFC 3339, bytes base64.
func (s *statement) appendValue(b jsontext.Value, c *sql.ColumnType, v any) jsontext.Value {
	asJSON := slices.Contains(s.tool.JSON, c.Name())
	switch v := v.(type) {
	case nil:
		return append(b, "null"...)
	case int64:
		if c.DatabaseTypeName() == "BOOLEAN" { // SQLite has none of its own
			return strconv.AppendBool(b, v != 0)
		}
		return strconv.AppendInt(b, v, 10)
	case bool:
		return strconv.AppendBool(b, v)
	case float64:
		if math.IsNaN(v) || math.IsInf(v, 0) {
			return append(b, "null"...)
		}
		return append(b, encode(v)...)
	case time.Time:
		if c.DatabaseTypeName() == "DATE" {
			return call.AppendString(b, v.Format(time.DateOnly))
		}
		return call.AppendString(b, v.UTC().Format(time.RFC3339Nano))
	case []byte:
		if asJSON || isJSON(c) {
			return s.appendText(b, c, string(v), true)
		}
		return call.AppendString(b, base64.StdEncoding.EncodeToString(v))
	case string:
		return s.appendText(b, c, v, asJSON || isJSON(c))
	}
	return call.AppendString(b, fmt.Sprint(v))
}

func isJSON(c *sql.ColumnType) bool {
	return c.DatabaseTypeName() == "JSON" || c.DatabaseTypeName() == "JSONB"
}

func (s *statement) appendText(b jsontext.Value, c *sql.ColumnType, text string, asJSON bool) jsontext.Value {
	raw := jsontext.Value(text)
	if asJSON && raw.IsValid() || c.DatabaseTypeName() == "NUMERIC" && raw.Kind() == '0' && raw.IsValid() {
		return append(b, raw...)
	}
	return call.AppendString(b, text)
}

func (o *output) result() (*call.Result, error) {
	s := o.statement
	if s.tool.Result == "row" {
		if o.count == 0 {
			return nil, s.nothing("no row fits the arguments")
		}
		structured := append(append(jsontext.Value(`{"row":`), o.rows...), '}')
		return &call.Result{Content: call.TextContent(string(o.rows)), Structured: structured}, nil
	}
	b := append(append(jsontext.Value(`{"rows":[`), o.rows...), `],"row_count":`...)
	b = strconv.AppendInt(b, int64(o.count), 10)
	if o.more {
		b = call.AppendString(append(b, `,"next_cursor":`...), base64.RawURLEncoding.EncodeToString(encode(cursor{o.in.digest, o.keys})))
	}
	b = append(b, '}')
	return &call.Result{Content: call.TextContent(string(b)), Structured: b}, nil
}
