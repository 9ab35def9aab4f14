package catalog

import (
	"fmt"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
)

// What a server lists may not choose how much memory its patterns take.
func TestPatternsAreBounded(t *testing.T) {
	withPattern := func(p string) string {
		return fmt.Sprintf(`{"type":"object","properties":{"a":{"type":"string","pattern":%q}}}`, p)
	}
	for name, tt := range map[string]struct {
		pattern string
		want    string
	}{
		"as real ones are": {`^[A-Za-z0-9_.-]{1,255}$`, ""},
		"nested repeats":   {`(a{1000}){1000}`, "invalid repeat"},
		"many repeats":     {strings.Repeat(`a{1000}`, 11), "repeats that are too large"},
		"open repeats":     {strings.Repeat(`(ab){900,}`, 11), "repeats that are too large"},
		"classes":          {strings.Repeat(`\pL`, 200), "repeats that are too large"},
		"long":             {strings.Repeat("a", maxPatternBytes+1), "over the limit"},
	} {
		schema := withPattern(tt.pattern)
		_, err := Build([]Source{{Backend: "b", Capabilities: []*call.Capability{tool("x", schema)}}})
		if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("%s: %v, want %q", name, err, tt.want)
		}
	}
}

// What one backend cannot have in one schema it cannot have in many.
func TestBackendsAreBounded(t *testing.T) {
	for name, tt := range map[string]struct {
		schema string
		most   int
	}{
		"patterns": {`{"type":"object","properties":{"a":{"type":"string","pattern":"a{1000}b{1000}"}}}`, maxPatternSizes / 2000},
		"bytes":    {`{"type":"object","description":"` + strings.Repeat("x", 100_000) + `"}`, maxDefinitionBytes / 100_000},
		"nodes":    {`{"type":"object","allOf":[` + strings.Repeat("{},", 4000) + `{}]}`, maxNodes / 4000},
	} {
		var caps []*call.Capability
		for i := range tt.most + 20 {
			caps = append(caps, tool(fmt.Sprintf("t%d", i), tt.schema))
		}
		s, err := Build([]Source{{Backend: "theirs", Capabilities: caps, Tolerant: true}, {Backend: "ours", Capabilities: []*call.Capability{tool("ours", orderSchema)}}})
		if err != nil {
			t.Fatal(err)
		}
		if n := len(s.Tools()); n > tt.most+1 || n < tt.most*8/10 || s.tools["ours"] == nil {
			t.Errorf("%s: %d tools are taken, want about %d", name, n, tt.most)
		}
		if _, err := Build([]Source{{Backend: "ours", Capabilities: caps}}); err != nil {
			t.Errorf("%s: what is ours is bounded: %.200v", name, err)
		}
		if len(s.Refused()) < 20 || !strings.Contains(s.Refused()[0].Error(), "of this backend") {
			t.Errorf("%s: %d are refused: %.200v", name, len(s.Refused()), s.Refused())
		}
	}
}

// Neither schemas nor callers choose how long a check takes: each of these took minutes, or for ever.
func TestChecksAreBounded(t *testing.T) {
	var doubling strings.Builder
	for i := range 40 {
		fmt.Fprintf(&doubling, `"d%d":{"anyOf":[{"$ref":"#/$defs/d%d"},{"$ref":"#/$defs/d%d"}]},`, i, i+1, i+1)
	}
	for name, tt := range map[string]struct{ schema, args string }{
		"one value, ever more schemas": {
			`{"type":"object","properties":{"a":{"$ref":"#/$defs/d0"}},"$defs":{` + doubling.String() + `"d40":{"type":"integer"}}}`, `{"a":"x"}`,
		},
		"ever more with each level": {
			`{"type":"object","properties":{"a":{"$ref":"#/$defs/n"}},"$defs":{"n":{"anyOf":[{"properties":{"c":{"$ref":"#/$defs/n"}},"required":["x"]},{"properties":{"c":{"$ref":"#/$defs/n"}},"required":["y"]}]}}}`,
			`{"a":` + strings.Repeat(`{"c":`, 50) + `1` + strings.Repeat(`}`, 51),
		},
		"by dependent schemas": {
			`{"type":"object","$defs":{"n":{"type":"object","dependentSchemas":{"c":{"properties":{"c":{"$ref":"#/$defs/n"}}},"d":{"properties":{"c":{"$ref":"#/$defs/n"}}}}}},"properties":{"a":{"not":{"$ref":"#/$defs/n"}}}}`,
			`{"a":` + strings.Repeat(`{"d":1,"c":`, 50) + `1` + strings.Repeat(`}`, 51),
		},
		"a long text for a pattern": {
			`{"type":"object","properties":{"a":{"type":"string","pattern":"^(([a-z])+.)+[A-Z]([a-z])+$"}}}`, `{"a":"` + strings.Repeat("a", 3<<20) + `"}`,
		},
		"a long number": {
			`{"type":"object","properties":{"a":{"type":"number","multipleOf":0.01}}}`, `{"a":` + strings.Repeat("9", 3<<20) + `}`,
		},
		"a caller's own expression": {
			`{"type":"object","properties":{"a":{"type":"string","format":"regex"}}}`, `{"a":"` + strings.Repeat(`(x\\pL{30}){30}`, 1000) + `"}`,
		},
	} {
		done := make(chan error, 1)
		c := build(t, tool("x", tt.schema)).tools["x"].capability
		go func() { done <- c.Check(jsontext.Value(tt.args)) }()
		select {
		case err := <-done:
			if err == nil {
				t.Errorf("%s: it is taken", name)
			} else if len(err.Error()) > 2000 {
				t.Errorf("%s: the error has %d bytes", name, len(err.Error()))
			}
		case <-time.After(10 * time.Second):
			t.Fatalf("%s: the check does not end", name)
		}
	}
}

// Schemas that refer to themselves, as those of filters do, take what they should.
func TestRecursiveSchemasAreTaken(t *testing.T) {
	schema := `{"type":"object","properties":{"f":{"$ref":"#/$defs/f"}},"$defs":{"f":{"anyOf":[
		{"type":"object","properties":{"and":{"type":"array","items":{"$ref":"#/$defs/f"}}},"required":["and"],"additionalProperties":false},
		{"type":"object","properties":{"or":{"type":"array","items":{"$ref":"#/$defs/f"}}},"required":["or"],"additionalProperties":false},
		{"type":"object","properties":{"not":{"$ref":"#/$defs/f"}},"required":["not"],"additionalProperties":false},
		{"type":"object","properties":{"field":{"type":"string","pattern":"^[a-z.]+$"},"is":{}},"required":["field","is"],"additionalProperties":false}]}}}`
	leaf := `{"field":"a.b","is":1}`
	args := `{"f":` + strings.Repeat(`{"and":[`+leaf+`,{"or":[{"not":`, 12) + leaf + strings.Repeat(`},`+leaf+`]}]}`, 12) + `}`
	if err := build(t, tool("x", schema)).tools["x"].capability.Check(jsontext.Value(args)); err != nil {
		t.Error(err)
	}
	many := `{"f":{"and":[` + strings.Repeat(leaf+",", 20_000) + leaf + `]}}`
	if err := build(t, tool("x", schema)).tools["x"].capability.Check(jsontext.Value(many)); err != nil {
		t.Error(err)
	}
}

// What is too large for its schema is refused without copies of it, which cost more than the look.
func TestRefusalsCopyLittle(t *testing.T) {
	const size = 3_900_000
	snapshot, err := Build([]Source{{Backend: "b", Capabilities: []*call.Capability{
		tool("simple", `{"type":"object","properties":{"n":{"type":"number"},"p":{"type":"string"}}}`),
		tool("other", `{"type":"object","properties":{"n":{"type":"number"},"p":{"type":"string","pattern":"^([a-z]+)*$"},"re":{"format":"regex"}}}`),
	}}})
	if err != nil {
		t.Fatal(err)
	}
	number := jsontext.Value(`{"n":` + strings.Repeat("9", size) + `}`)
	text := jsontext.Value(`{"p":"` + strings.Repeat("a", size) + `!"}`)
	for name, tt := range map[string]struct {
		tool string
		args jsontext.Value
		most uint64 // bytes
	}{
		"a number":                  {"other", number, 16 << 10},
		"a number, simply":          {"simple", number, 16 << 10},
		"a text that is taken":      {"simple", text, 16 << 10},
		"a text, for the validator": {"other", text, 2*size + size/10}, // and for its error
	} {
		check := snapshot.Tool(tt.tool).Check
		least := uint64(1 << 62)
		for i := 0; i < 5 && least > tt.most; i++ { // the first one makes what is kept
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			err := check(tt.args)
			runtime.ReadMemStats(&after)
			least = min(least, after.TotalAlloc-before.TotalAlloc)
			if (err == nil) != strings.Contains(name, "taken") {
				t.Fatalf("%s: %v", name, err)
			}
		}
		if least > tt.most {
			t.Errorf("%s: %d bytes were allocated, more than %d", name, least, tt.most)
		}
	}
}
