package gofunc

import (
	"context"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
)

type base struct {
	Trace string `json:"trace,omitempty"`
}

type inner struct {
	Zip string `json:"zip" pattern:"^[0-9]+$"`
	N   int    `json:"n" default:"3"`
}

type everything struct {
	base
	Name    string            `json:"name" doc:"Who." minLength:"1" maxLength:"20"`
	Color   string            `json:"color" enum:"red,green" default:"red"`
	Age     int               `json:"age" minimum:"0" maximum:"150"`
	Count   uint8             `json:"count" minimum:"2"`
	Ratio   *float64          `json:"ratio"`
	Tags    []string          `json:"tags" maxItems:"3"`
	Labels  map[string]int    `json:"labels,omitzero"`
	When    time.Time         `json:"when"`
	Raw     jsontext.Value    `json:"raw,omitempty"`
	Blob    []byte            `json:"blob,omitempty"`
	Home    inner             `json:"home"`
	Region  string            `json:"region,omitempty" header:"Region"`
	Level   int               `json:"level" enum:"1,2,3"`
	Skipped string            `json:"-"`
	private string            //lint:ignore U1000 unexported fields must not appear
	Any     any               `json:"any,omitempty"`
	Deep    map[string][]bool `json:"deep,omitempty"`
}

func TestSchema(t *testing.T) {
	got, err := Schema(reflect.TypeFor[everything]())
	if err != nil {
		t.Fatal(err)
	}
	want := `{"type":"object","properties":{"trace":{"type":"string"},` +
		`"name":{"type":"string","description":"Who.","minLength":1,"maxLength":20},` +
		`"color":{"type":"string","enum":["red","green"],"default":"red"},` +
		`"age":{"type":"integer","minimum":0,"maximum":150},"count":{"type":"integer","minimum":2},"ratio":{"type":"number"},` +
		`"tags":{"type":"array","items":{"type":"string"},"maxItems":3},"labels":{"type":"object","additionalProperties":{"type":"integer"}},` +
		`"when":{"type":"string","format":"date-time"},"raw":{},"blob":{"type":"string","contentEncoding":"base64"},` +
		`"home":{"type":"object","properties":{"zip":{"type":"string","pattern":"^[0-9]+$"},"n":{"type":"integer","default":3}},"required":["zip"],"additionalProperties":false},` +
		`"region":{"type":"string","x-mcp-header":"Region"},"level":{"type":"integer","enum":[1,2,3]},"any":{},` +
		`"deep":{"type":"object","additionalProperties":{"type":"array","items":{"type":"boolean"}}}},` +
		`"required":["name","age","count","tags","when","home","level"],"additionalProperties":false}`
	if string(got) != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

type recursive struct {
	Next *recursive `json:"next"`
}

type (
	badMinimum struct {
		A string `minimum:"1"`
	}
	badMaxLength struct {
		A string `maxLength:"x"`
	}
	badMaximum struct {
		A int `maximum:"0x10"`
	}
	badEnum struct {
		A int `enum:"red"`
	}
	badDefault struct {
		A int8 `default:"1000"`
	}
)

func TestSchemaRefuses(t *testing.T) {
	for want, typ := range map[string]reflect.Type{
		"contains itself":          reflect.TypeFor[recursive](),
		"no struct or map":         reflect.TypeFor[string](),
		"no JSON form":             reflect.TypeFor[struct{ F func() }](),
		"keys of a map":            reflect.TypeFor[struct{ M map[int]string }](),
		"tag minimum does not fit": reflect.TypeFor[badMinimum](),
		"tag maxLength must be":    reflect.TypeFor[badMaxLength](),
		"tag maximum must be":      reflect.TypeFor[badMaximum](),
		"is not a value of type":   reflect.TypeFor[badEnum](),
		"the tag default":          reflect.TypeFor[badDefault](),
	} {
		if _, err := Schema(typ); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: got %v, want %q", typ, err, want)
		}
	}
}

func TestTool(t *testing.T) {
	type in struct {
		Color string `json:"color" default:"red"`
		N     *int   `json:"n" default:"5"`
		Home  struct {
			Zip string `json:"zip" default:"1"`
		} `json:"home,omitzero"`
		Tags  []string `json:"tags" default:"[\"a\"]"`
		Small int8     `json:"small,omitzero"`
	}
	type out struct {
		In in `json:"in"`
	}
	c := &call.Capability{Kind: call.Tool, Name: "x"}
	if err := Tool(c, func(_ context.Context, _ *call.Call, v in) (out, error) { return out{v}, nil }); err != nil {
		t.Fatal(err)
	}
	if c.Output == nil {
		t.Error("no output schema")
	}
	for args, want := range map[string]string{
		``: `{"in":{"color":"red","n":5,"home":{"zip":"1"},"tags":["a"]}}`,
		`{"color":"blue","n":1,"home":{"zip":"2"}}`: `{"in":{"color":"blue","n":1,"home":{"zip":"2"},"tags":["a"]}}`,
	} {
		r, err := c.Run(t.Context(), &call.Call{Args: jsontext.Value(args)[:len(args):len(args)]})
		if args == "" {
			r, err = c.Run(t.Context(), &call.Call{})
		}
		if err != nil || string(r.Structured) != want {
			t.Errorf("%s: got %s, %v", args, r.Structured, err)
		}
	}
	if _, err := c.Run(t.Context(), &call.Call{Args: jsontext.Value(`{"small":1000}`)}); call.AsError(err).Code != call.Invalid {
		t.Errorf("out of range: %v", err)
	}
	text := &call.Capability{}
	if err := Tool(text, func(context.Context, *call.Call, struct{}) (string, error) { return "hi", nil }); err != nil || text.Output != nil {
		t.Errorf("%v, output %s", err, text.Output)
	}
}

// Defaults hold at any depth, and only where a member is absent.
func TestDefaultsInside(t *testing.T) {
	type line struct {
		SKU string `json:"sku"`
		N   int    `json:"n" default:"1"`
	}
	type in struct {
		Lines []line          `json:"lines"`
		By    map[string]line `json:"by,omitempty"`
		Note  *string         `json:"note"`
	}
	var got in
	c := &call.Capability{}
	if err := Tool(c, func(_ context.Context, _ *call.Call, v in) (string, error) { got = v; return "", nil }); err != nil {
		t.Fatal(err)
	}
	args := jsontext.Value(`{"lines":[{"sku":"a"},{"sku":"b","n":0}],"by":{"x":{"sku":"c"}}}`)
	if _, err := c.Run(t.Context(), &call.Call{Args: args}); err != nil {
		t.Fatal(err)
	}
	want := in{Lines: []line{{"a", 1}, {"b", 0}}, By: map[string]line{"x": {"c", 1}}}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if s := string(args); s != `{"lines":[{"sku":"a"},{"sku":"b","n":0}],"by":{"x":{"sku":"c"}}}` {
		t.Errorf("the arguments were changed: %s", s)
	}
}

func TestOutputSchemaAllowsNullWhereGoWritesIt(t *testing.T) {
	type out struct {
		A *int `json:"a"`
		B *int `json:"b,omitempty"`
	}
	got, err := OutputSchema(reflect.TypeFor[out]())
	if want := `{"type":"object","properties":{"a":{"type":["integer","null"]},"b":{"type":"integer"}},"additionalProperties":false}`; err != nil || string(got) != want {
		t.Errorf("%v: got %s, want %s", err, got, want)
	}
}

// What a schema allows and the type cannot hold is told with its place and what to write instead.
func TestDecodeSaysWhere(t *testing.T) {
	type in struct {
		Home struct {
			N int8 `json:"n"`
		} `json:"home"`
	}
	c := &call.Capability{}
	if err := Tool(c, func(context.Context, *call.Call, in) (string, error) { return "", nil }); err != nil {
		t.Fatal(err)
	}
	for args, want := range map[string]string{
		`{"home":{"n":1000}}`: "/home/n: it is out of range",
		`{"home":{"n":1.0}}`:  "write it as a whole number",
		`{"home":{"m":1}}`:    "a member that the tool does not know",
	} {
		_, err := c.Run(t.Context(), &call.Call{Args: jsontext.Value(args)})
		if e := call.AsError(err); e.Code != call.Invalid || !strings.Contains(e.Error(), want) {
			t.Errorf("%s: got %v, want %q", args, err, want)
		}
	}
}
