package catalog

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
)

func run(context.Context, *call.Call) (*call.Result, error) { return call.Text("ok"), nil }

func tool(name, schema string) *call.Capability {
	return &call.Capability{Kind: call.Tool, Name: name, Input: jsontext.Value(schema), Run: run, Origin: name + ".go:1"}
}

func build(t *testing.T, caps ...*call.Capability) *Snapshot {
	t.Helper()
	s, err := Build([]Source{{Backend: "test", Capabilities: caps}})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestBuildRefuses(t *testing.T) {
	tests := []struct {
		name string
		c    *call.Capability
		want string
	}{
		{"no name", tool("", `{"type":"object"}`), "has no name"},
		{"bad name", tool("a b", `{"type":"object"}`), "may only hold"},
		{"long name", tool(strings.Repeat("a", 129), `{"type":"object"}`), "over the limit"},
		{"not an object schema", tool("x", `{"type":"string"}`), `"type": "object"`},
		{"schema is not JSON", tool("x", `{"type"`), "schema is refused"},
		{"duplicate names in the schema", tool("x", `{"type":"object","type":"object"}`), "duplicate"},
		{"wrong keyword", tool("x", `{"type":"object","properties":{"a":{"type":"strin"}}}`), "not valid"},
		{"remote $ref", tool("x", `{"type":"object","properties":{"a":{"$ref":"https://example.com/s"}}}`), "not followed"},
		{"file $ref", tool("x", `{"type":"object","properties":{"a":{"$ref":"file:///etc/passwd"}}}`), "not followed"},
		{"bad pattern", tool("x", `{"type":"object","properties":{"a":{"type":"string","pattern":"(a{1000}){1000}"}}}`), "not valid"},
		{"deep schema", tool("x", `{"type":"object","allOf":`+strings.Repeat("[", 40)+strings.Repeat("]", 40)+`}`), "nested deeper"},
		{"x-mcp-header under items", tool("x", `{"type":"object","properties":{"a":{"type":"array","items":{"type":"string","x-mcp-header":"A"}}}}`), "properties alone"},
		{"x-mcp-header under oneOf", tool("x", `{"type":"object","oneOf":[{"properties":{"a":{"type":"string","x-mcp-header":"A"}}}]}`), "properties alone"},
		{"x-mcp-header on a number", tool("x", `{"type":"object","properties":{"a":{"type":"number","x-mcp-header":"A"}}}`), "string, integer or boolean"},
		{"x-mcp-header twice", tool("x", `{"type":"object","properties":{"a":{"type":"string","x-mcp-header":"A"},"b":{"type":"string","x-mcp-header":"a"}}}`), "used twice"},
		{"x-mcp-header with space", tool("x", `{"type":"object","properties":{"a":{"type":"string","x-mcp-header":"A B"}}}`), "token"},
		{"no handler", &call.Capability{Kind: call.Tool, Name: "x"}, "no handler"},
		{"neither URI nor template", &call.Capability{Kind: call.Resource, Name: "x", Run: run}, "either a URI"},
		{"URI without scheme", &call.Capability{Kind: call.Resource, URI: "x", Run: run}, "no scheme"},
		{"bad template", &call.Capability{Kind: call.Resource, Template: "a://{", Run: run}, "RFC 6570"},
		{"bad icons", &call.Capability{Kind: call.Tool, Name: "x", Icons: jsontext.Value("{"), Run: run}, "not valid JSON"},
		{"bad kind", &call.Capability{Kind: call.ListTools, Name: "x", Run: run}, "kind"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := Build([]Source{{Backend: "test", Capabilities: []*call.Capability{tt.c}}})
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
}

func TestBuildNamesBothOwners(t *testing.T) {
	_, err := Build([]Source{
		{Backend: "one", Capabilities: []*call.Capability{tool("a", `{"type":"object"}`)}},
		{Backend: "two", Capabilities: []*call.Capability{{Kind: call.Tool, Name: "a", Run: run, Origin: "b.go:2"}}},
	})
	if err == nil || !strings.Contains(err.Error(), "a.go:1") || !strings.Contains(err.Error(), "b.go:2") {
		t.Errorf("got %v", err)
	}
}

func TestPages(t *testing.T) {
	var caps []*call.Capability
	for i := range 2*PageSize + 10 {
		caps = append(caps, tool(fmt.Sprintf("t%05d", i), `{"type":"object"}`))
	}
	s := build(t, caps...)
	seen, cursor, pages := 0, "", 0
	for {
		r, err := s.Page(call.ListTools, cursor)
		if err != nil {
			t.Fatal(err)
		}
		var defs []struct{ Name string }
		if err := json.Unmarshal(r.Content, &defs, json.MatchCaseInsensitiveNames(true)); err != nil {
			t.Fatal(err)
		}
		for _, d := range defs {
			if want := fmt.Sprintf("t%05d", seen); d.Name != want {
				t.Fatalf("tool %d is %q", seen, d.Name)
			}
			seen++
		}
		pages++
		if cursor = r.Next; cursor == "" {
			break
		}
	}
	if seen != len(caps) || pages != 3 {
		t.Errorf("%d tools on %d pages", seen, pages)
	}
	// A cursor of an older snapshot goes on after its last name.
	r, err := s.Page(call.ListTools, encodeCursor("t00004x"))
	if err != nil || !strings.HasPrefix(string(r.Content), `[{"name":"t00005"`) {
		t.Errorf("got %.40s, %v", r.Content, err)
	}
	for _, bad := range []string{"x", "!!", encodeCursor("")[:3], "bm9wZQ"} {
		if _, err := s.Page(call.ListTools, bad); call.AsError(err) == nil || call.AsError(err).Code != call.Malformed {
			t.Errorf("cursor %q: %v", bad, err)
		}
	}
}

func TestDefinitions(t *testing.T) {
	s := build(t,
		&call.Capability{Kind: call.Tool, Name: "del", Title: "T", Description: "D", Effect: call.Destructive, Owner: "o", Version: "2", Tags: []string{"x"}, Run: run},
		&call.Capability{Kind: call.Resource, URI: "kb://a", Name: "A", MIME: "text/plain", Size: 3, Run: run},
		&call.Capability{Kind: call.Resource, Template: "kb://{id}", Name: "T", Run: run},
		&call.Capability{Kind: call.Prompt, Name: "p", Arguments: []call.Argument{{Name: "q", Required: true}, {Name: "lang", Enum: []string{"en"}}}, Run: run},
	)
	for kind, want := range map[call.Kind]string{
		call.ListTools:     `[{"name":"del","title":"T","description":"D","inputSchema":{"type":"object","additionalProperties":false},"annotations":{"readOnlyHint":false,"destructiveHint":true},"_meta":{"dev.newel/owner":"o","dev.newel/version":"2","dev.newel/tags":["x"]}}]`,
		call.ListResources: `[{"uri":"kb://a","name":"A","mimeType":"text/plain","size":3}]`,
		call.ListTemplates: `[{"uriTemplate":"kb://{id}","name":"T"}]`,
		call.ListPrompts:   `[{"name":"p","arguments":[{"name":"q","required":true},{"name":"lang"}]}]`,
	} {
		r, err := s.Page(kind, "")
		if err != nil || string(r.Content) != want {
			t.Errorf("%v: got %s, %v\nwant %s", kind, r.Content, err, want)
		}
	}
	if s.Resource("kb://a").URI == "" || s.Resource("kb://b").Template == "" || s.Resource("other://b") != nil {
		t.Error("resources resolve wrongly")
	}
	p := s.Prompt("p")
	if err := p.Check(jsontext.Value(`{"q":"x","lang":"en"}`)); err != nil {
		t.Error(err)
	}
	for args, want := range map[string]string{`{}`: `"q" is required`, `{"q":1}`: "type string", `{"q":"x","lang":"de"}`: `"en"`, `{"q":"x","lan":"en"}`: `did you mean "lang"`} {
		if err := p.Check(jsontext.Value(args)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", args, err)
		}
	}
}

const orderSchema = `{"type":"object","additionalProperties":false,"required":["status"],"properties":{
 "status":{"type":"string","enum":["open","paid"]},"limit":{"type":"integer","minimum":1,"maximum":100},
 "name":{"type":"string","minLength":1,"maxLength":5,"pattern":"^[a-zé]+$"},"tags":{"type":"array","items":{"type":"string"},"maxItems":3},
 "deep":{"type":"object","properties":{"x":{"type":"number"}},"additionalProperties":false},"flag":{"type":"boolean"}}}`

func TestCheckExplains(t *testing.T) {
	c := build(t, tool("x", orderSchema)).Tool("x")
	tests := []struct{ args, want string }{
		{`{"status":"open","limit":5,"name":"é","tags":["a"],"deep":{"x":1.5},"flag":true}`, ""},
		{``, `"status" is required`},
		{`{"status":"opn"}`, `/status: must be one of "open", "paid"`},
		{`{"statu":"open"}`, `unknown member "statu"; did you mean "status"?`},
		{`{"status":"open","deep":{"y":1}}`, `/deep: unknown member "y"`},
		{`{"status":"open","limit":"5"}`, "/limit: must be of type integer, not string"},
		{`{"status":"open","limit":101}`, "/limit"},
		{`{"status":"open","limit":1e999999999}`, "out of range"},
		{`{"status":"open","name":"toolong"}`, "/name"},
		{`{"status":"open","tags":["a",1]}`, "/tags/1"},
	}
	for _, tt := range tests {
		var args jsontext.Value
		if tt.args != "" {
			args = jsontext.Value(tt.args)
		}
		err := c.Check(args)
		if tt.want == "" {
			if err != nil {
				t.Errorf("%s: %v", tt.args, err)
			}
			continue
		}
		if e := call.AsError(err); e == nil || e.Code != call.Invalid || !strings.Contains(e.Message, tt.want) {
			t.Errorf("%s: got %v, want %q", tt.args, err, tt.want)
		}
	}
}

// FuzzQuick holds the quick acceptor against the full validator: a quick yes must be a yes.
func FuzzQuick(f *testing.F) {
	schemas := []string{
		orderSchema,
		`{"type":"object","properties":{"a":{"type":"integer","minimum":-3},"b":{"type":"number","maximum":2}},"required":["a","z"]}`,
		`{"type":"object","properties":{"a":{"type":"array","items":{"type":"object","required":["k"],"properties":{"k":{"type":"string","maxLength":2}}},"minItems":1}}}`,
	}
	for i := range schemas {
		f.Add(i, []byte(`{"status":"open","limit":5,"a":1,"z":null,"b":1.5}`))
		f.Add(i, []byte(`{"a":[{"k":"é"}],"a":1}`))
		f.Add(i, []byte(`{"limit":1.0,"status":"\u006fpen"}`))
	}
	type both struct {
		quick *quick
		full  func(jsontext.Value) error
	}
	var compiled []both
	for _, s := range schemas {
		schema, doc, patterns, err := compile("input", jsontext.Value(s), &spending{})
		if err != nil {
			f.Fatal(err)
		}
		q := newQuick(doc, patterns)
		if q == nil {
			f.Fatalf("not simple: %s", s)
		}
		compiled = append(compiled, both{q, func(args jsontext.Value) error { return explain(schema, doc, args) }})
	}
	f.Fuzz(func(t *testing.T, i int, args []byte) {
		v := jsontext.Value(args)
		if !v.IsValid() {
			return
		}
		b := compiled[uint(i)%uint(len(compiled))]
		if b.quick.accepts(v) {
			if err := b.full(v); err != nil {
				t.Errorf("quick says yes, full says %v", err)
			}
		}
	})
}

func BenchmarkCheck(b *testing.B) {
	s, err := Build([]Source{{Backend: "test", Capabilities: []*call.Capability{tool("x", orderSchema)}}})
	if err != nil {
		b.Fatal(err)
	}
	args := jsontext.Value(`{"status":"open","limit":5,"name":"abc","tags":["a","b"]}`)
	check := s.Tool("x").Check
	b.ReportAllocs()
	for b.Loop() {
		if err := check(args); err != nil {
			b.Fatal(err)
		}
	}
}

func TestHubMergesForSlowListeners(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := NewHub()
		ctx, cancel := context.WithCancel(t.Context())
		var got []call.Notification
		release := make(chan struct{})
		done := make(chan error)
		go func() {
			done <- h.Listen(ctx, nil, &call.Filter{ToolsChanged: true, URIs: []string{"kb://a"}}, func(n call.Notification) error {
				got = append(got, n)
				<-release
				return nil
			})
		}()
		synctest.Wait()
		h.ListChanged(call.ListTools, false)
		synctest.Wait() // now it hangs in deliver
		for range 1000 {
			h.ListChanged(call.ListTools, false)
			h.ListChanged(call.ListPrompts, false)
			h.Updated("kb://a")
			h.Updated("kb://b")
		}
		close(release)
		synctest.Wait()
		cancel()
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		if len(got) != 3 || got[2].URI != "kb://a" {
			t.Errorf("got %v", got)
		}
		if len(h.listeners) != 0 {
			t.Error("a listener stayed")
		}
	})
}
