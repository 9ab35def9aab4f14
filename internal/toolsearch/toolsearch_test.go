package toolsearch

import (
	"context"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
)

// labelled reads the labelled set.
func labelled(t testing.TB) (tools []*call.Capability, queries map[string][]string) {
	t.Helper()
	raw, err := os.ReadFile("testdata/labelled.txt")
	if err != nil {
		t.Fatal(err)
	}
	queries = map[string][]string{}
	for line := range strings.Lines(string(raw)) {
		line = strings.TrimSpace(line)
		if tool, ok := strings.CutPrefix(line, "tool "); ok {
			name, description, _ := strings.Cut(tool, ": ")
			tools = append(tools, &call.Capability{Kind: call.Tool, Name: name, Description: description})
		}
		if query, ok := strings.CutPrefix(line, "query "); ok {
			query, names, _ := strings.Cut(query, " => ")
			queries[query] = strings.Fields(names)
		}
	}
	return tools, queries
}

// minRecall guards what was reached, 0.81. Half of what is missed has no word in common with its
// tool ("will it rain"): no ranking by words finds that.
const minRecall = 0.80

// Recall@5: how often one of the right tools is among the first five.
func TestRecall(t *testing.T) {
	tools, queries := labelled(t)
	ix := New(tools)
	found, first := 0, 0
	for q, want := range queries {
		hits := ix.Search(q, 5)
		at := slices.IndexFunc(hits, func(h Hit) bool { return slices.Contains(want, h.Tool.Name) })
		switch {
		case at == 0:
			first++
			fallthrough
		case at > 0:
			found++
		default:
			var got []string
			for _, h := range hits {
				got = append(got, h.Tool.Name)
			}
			t.Logf("missed %q: want %v, got %v", q, want, got)
		}
	}
	recall := float64(found) / float64(len(queries))
	t.Logf("recall@5 %.3f, first %.3f, %d queries over %d tools", recall, float64(first)/float64(len(queries)), len(queries), len(tools))
	if recall < minRecall {
		t.Errorf("recall@5 is %.3f, was %.2f", recall, minRecall)
	}
}

func TestSearchIsStable(t *testing.T) {
	tools, _ := labelled(t)
	a, b := New(tools).Search("create a ticket", 10), New(tools).Search("create a ticket", 10)
	if !slices.Equal(a, b) || len(a) == 0 {
		t.Errorf("got %v and %v", a, b)
	}
	for _, q := range []string{"", "the of and", "ßßß", strings.Repeat("order ", 10_000), "\xff\xfe"} {
		if hits := New(tools).Search(q, 5); len(hits) > 5 {
			t.Errorf("%.20q: %d hits", q, len(hits))
		}
	}
}

// call_tool becomes the call it stands for, once, and nothing else does.
func TestUnwrap(t *testing.T) {
	var got *call.Call
	h := Unwrap(func(_ context.Context, c *call.Call) (*call.Result, error) {
		got = c
		c.Event.Outcome = "seen"
		return nil, nil
	})
	for args, want := range map[string]string{
		`{"name":"x","arguments":{"a":1.50}}`:           `x {"a":1.50}`,
		`{"name":"x"}`:                                  `x `,
		`{"name":"call_tool","arguments":{"name":"x"}}`: `call_tool {"name":"call_tool","arguments":{"name":"x"}}`,
		`{"name":"x","arguments":[]}`:                   `call_tool {"name":"x","arguments":[]}`,
		`{"name":"x","more":1}`:                         `call_tool {"name":"x","more":1}`,
		`{}`:                                            `call_tool {}`,
	} {
		c := &call.Call{Kind: call.Tool, Name: CallName, Args: jsontext.Value(args)}
		if _, err := h(t.Context(), c); err != nil {
			t.Fatal(err)
		}
		if have := got.Name + " " + string(got.Args); have != want || c.Event.Outcome != "seen" {
			t.Errorf("%s: got %s, want %s", args, have, want)
		}
	}
	for _, c := range []*call.Call{{Kind: call.Prompt, Name: CallName}, {Kind: call.Tool, Name: "x"}} {
		if _, err := h(t.Context(), c); err != nil || got != c {
			t.Errorf("%v was changed", c)
		}
	}
}

func BenchmarkSearch(b *testing.B) {
	tools, _ := labelled(b)
	ix := New(tools)
	for b.Loop() {
		ix.Search("tell the team in the channel that we are done", 5)
	}
}
