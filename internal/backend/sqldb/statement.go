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
	"regexp"
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

// settings refuses contradictions that no database would find.
func (s *statement) settings() (where string, err error) {
	t := s.tool
	switch {
	case !slices.Contains([]string{"", "rows", "row", "affected"}, t.Result):
		return ".result", fmt.Errorf("%q is not a result; use rows, row or affected", t.Result)
	case s.paged() && s.write:
		return ".page", errors.New("only a read has pages")
	case s.paged() && !slices.Contains([]string{"", "rows"}, t.Result):
		return ".page", fmt.Errorf("pages are for result: rows, not %s", t.Result)
	}
	for i := range t.Params {
		if field, err := s.param(i); err != nil {
			return fmt.Sprintf(".params[%d].%s", i, field), err
		}
	}
	return "", nil
}

func (s *statement) param(i int) (field string, err error) {
	p := &s.tool.Params[i]
	typ := cmp.Or(p.Type, "string")
	number := typ == "integer" || typ == "number"
	switch {
	case p.Name == "" || !isNameStart(p.Name[0]) || strings.ContainsFunc(p.Name, func(r rune) bool { return r > 0x7e || !isName(byte(r)) }):
		return "name", fmt.Errorf("%q is not a name; use letters, digits and _", p.Name)
	case slices.ContainsFunc(s.tool.Params[:i], func(o Param) bool { return o.Name == p.Name }):
		return "name", fmt.Errorf("the parameter %q is declared twice", p.Name)
	case pgTypes[typ] == nil:
		return "type", fmt.Errorf("%q is not a type; use string, integer, number, boolean, date, timestamp or uuid", typ)
	case p.Minimum != nil && !number:
		return "minimum", errors.New("minimum is for numbers")
	case p.Maximum != nil && !number:
		return "maximum", errors.New("maximum is for numbers")
	case p.Minimum != nil && p.Maximum != nil && *p.Minimum > *p.Maximum:
		return "minimum", errors.New("minimum is over maximum")
	case p.MinLength != nil && typ != "string":
		return "min_length", errors.New("min_length is for strings")
	case p.MaxLength != nil && typ != "string":
		return "max_length", errors.New("max_length is for strings")
	case p.MinLength != nil && (*p.MinLength < 0 || *p.MinLength > *cmp.Or(p.MaxLength, ptr(defaultMaxLength))):
		return "min_length", errors.New("min_length is below zero or over max_length")
	case p.MaxLength != nil && *p.MaxLength < 0:
		return "max_length", errors.New("max_length is below zero")
	case p.Pattern != "" && typ != "string":
		return "pattern", errors.New("pattern is for strings")
	case len(p.Enum) > 0 && typ != "string":
		return "enum", errors.New("enum is for strings")
	}
	pattern, err := regexp.Compile(p.Pattern)
	if err != nil {
		return "pattern", err
	}
	if p.Default == nil {
		return "", nil
	}
	v, err := s.value(p, encode(p.Default))
	if err != nil {
		return "default", err
	}
	if text, ok := v.(string); ok && typ == "string" && (len(p.Enum) > 0 && !slices.Contains(p.Enum, text) || !pattern.MatchString(text)) {
		return "default", fmt.Errorf("%q does not fit enum or pattern", text)
	}
	return "", nil
}

func ptr[T any](v T) *T { return &v }

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
	"uuid":      {"uuid", "text"},
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
	switch {
	case s.tool.Result == "affected":
		return "", nil
	case len(d.columns) == 0 && s.write:
		return ".result", errors.New("the statement gives no rows: add RETURNING, or declare result: affected")
	case len(d.columns) == 0:
		return ".sql", errors.New("the statement gives no columns")
	}
	for i, c := range d.columns {
		if slices.Contains(d.columns[:i], c) {
			return ".sql", fmt.Errorf("two columns are named %q; rename one with AS", c)
		}
	}
	named := slices.Concat(s.tool.Page.Key, s.tool.JSON)
	for _, c := range s.tool.Columns {
		named = append(named, c.Name)
	}
	for _, c := range named {
		if !slices.Contains(d.columns, c) {
			return ".sql", fmt.Errorf("the result has no column %q; it has %s", c, strings.Join(d.columns, ", "))
		}
	}
	for i, c := range d.columns {
		if slices.Contains(s.tool.Page.Key, c) && !s.backend.engine.postgres && isSQLiteTime(d.types[i]) {
			return ".page.key", fmt.Errorf("the key %q is a %s, whose text is not kept as it is stored; select CAST(%s AS TEXT) AS %s", c, d.types[i], c, c)
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
		case "uuid":
			o["type"], o["format"] = "string", "uuid"
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

// jsonTypes are what the values of a column look like; NULL beside. Types that are not listed
// travel as strings. Numbers that JSON does not have (NaN, infinite ones) are strings.
var jsonTypes = map[string][]string{
	"int2": {"integer"}, "int4": {"integer"}, "int8": {"integer"},
	"float4": {"number", "string"}, "float8": {"number", "string"}, "numeric": {"number", "string"},
	"bool": {"boolean"}, "json": nil, "jsonb": nil,
	"INT": {"integer"}, "INTEGER": {"integer"}, "REAL": {"number", "string"}, "": nil, "ANY": nil,
	"DATE": nil, "DATETIME": nil, "TIMESTAMP": nil,
}

// columnSchema is the schema of one value.
func (s *statement) columnSchema(name, typ string) object {
	o := object{}
	types, listed := jsonTypes[typ]
	if !listed {
		types = []string{"string"}
	}
	if types != nil && !slices.Contains(s.tool.JSON, name) {
		o["type"] = append(slices.Clone(types), "null")
	}
	for _, c := range s.tool.Columns {
		if c.Name == name {
			o["description"] = c.Description
		}
	}
	return o
}

func (s *statement) outputSchema(d description) jsontext.Value {
	props := object{}
	for i, c := range d.columns {
		props[c] = s.columnSchema(c, d.types[i])
	}
	row := object{"type": "object", "properties": props, "required": d.columns}
	switch s.tool.Result {
	case "affected":
		return encode(object{"type": "object", "properties": object{"affected": object{"type": "integer"}}, "required": []string{"affected"}})
	case "row":
		return encode(object{"type": "object", "properties": object{"row": row}, "required": []string{"row"}})
	}
	result := object{"rows": object{"type": "array", "items": row}, "row_count": object{"type": "integer"}}
	if s.paged() {
		result["next_cursor"] = object{"type": "string", "description": "Give it as cursor for the next page; absent on the last."}
	}
	return encode(object{"type": "object", "properties": result, "required": []string{"rows", "row_count"}})
}

// value turns an argument into what the driver takes. Types were checked against the schema;
// ranges are checked here. PostgreSQL gets text, so that it checks the range of its own types and
// numbers keep their digits.
func (s *statement) value(p *Param, raw jsontext.Value) (any, error) {
	v, err := s.typed(p, raw)
	if err != nil || !s.backend.engine.postgres {
		return v, err
	}
	switch v := v.(type) {
	case int64:
		return strconv.FormatInt(v, 10), nil
	case bool:
		return strconv.FormatBool(v), nil
	case float64:
		return string(raw), nil
	}
	return v, nil
}

func (s *statement) typed(p *Param, raw jsontext.Value) (any, error) {
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
		return t.UTC().Format(time.RFC3339Nano), nil
	case "uuid":
		if !uuidForm.MatchString(text) {
			return nil, call.Errorf(call.Invalid, "%q must be a UUID such as 123e4567-e89b-12d3-a456-426614174000", p.Name)
		}
	}
	return text, nil
}

var uuidForm = regexp.MustCompile(`^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$`)

// cursor is where a page starts. It belongs to one statement and its other arguments.
type cursor struct {
	Digest string           `json:"d"`
	Keys   []jsontext.Value `json:"k"`
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
			n, err := s.typed(&Param{Name: "limit", Type: "integer"}, v)
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
			v, err := s.keyValue(after.Keys[a.key-1])
			if err != nil {
				return nil, err
			}
			in.args = append(in.args, v)
		default:
			raw, ok := members[a.param.Name]
			if !ok && a.param.Default != nil {
				raw, ok = encode(a.param.Default), true
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

// keyValue is a key of a cursor as an argument. Callers can forge cursors: that gives them no
// more than another place to start at.
func (s *statement) keyValue(raw jsontext.Value) (any, error) {
	types := map[jsontext.Kind]string{'"': "string", 't': "boolean", 'f': "boolean", '0': "number"}
	p := Param{Name: "cursor", Type: types[raw.Kind()]}
	if p.Type == "number" && !strings.ContainsAny(string(raw), ".eE") {
		p.Type = "integer"
	}
	if p.Type == "" {
		return nil, errCursor
	}
	v, err := s.value(&p, raw)
	if err != nil {
		return nil, errCursor
	}
	return v, nil
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
	keys      []jsontext.Value // of the last row
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
		o.keys = make([]jsontext.Value, len(s.tool.Page.Key))
		for i, c := range columns {
			k := slices.Index(s.tool.Page.Key, c.Name())
			if k < 0 {
				continue
			}
			if o.keys[k] = keyOf(values[i]); o.keys[k] == nil {
				// NULL as a key would start anew for ever.
				return fmt.Errorf("the page key %q is NULL or bytes in a row", c.Name())
			}
		}
	}
	if s.tool.Result == "row" && o.count > 1 {
		return call.Errorf(call.Failed, "more than one row fits; the tool gives exactly one")
	}
	return nil
}

// keyOf returns a key's value as a cursor holds it, so that it comes back as it was; nil if it cannot.
func keyOf(v any) jsontext.Value {
	switch v := v.(type) {
	case time.Time:
		return call.AppendString(nil, v.UTC().Format(time.RFC3339Nano))
	case string:
		return call.AppendString(nil, v)
	case int64, float64, bool:
		return encode(v)
	}
	return nil
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
		switch {
		case math.IsNaN(v):
			return append(b, `"NaN"`...)
		case math.IsInf(v, 0):
			return call.AppendString(b, strings.TrimPrefix(strconv.FormatFloat(v, 'f', -1, 64), "+")+"inity")
		case c.DatabaseTypeName() == "FLOAT4":
			return append(b, encode(float32(v))...) // the shortest digits of what is stored
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
