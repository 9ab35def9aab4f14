// Package toolsearch lets models find tools in a large catalog instead of reading it whole: two
// tools beside the full list, search_tools and call_tool.
//
// Start reading at [Tools]; index.go ranks (BM25). What search_tools finds is what the same caller
// could list. call_tool is no way around the path: [Unwrap] turns it into the call it stands for
// before the path begins, so the tool itself is resolved, validated and recorded.
package toolsearch

import (
	"context"
	"strconv"
	"sync/atomic"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
)

// Names of the two tools.
const (
	SearchName = "search_tools"
	CallName   = "call_tool"
)

// Threshold is the number of tools from which on search is worth its place.
const Threshold = 50

// Bounds of one search.
const (
	maxHits     = 20
	defaultHits = 5
	maxQuery    = 500 // bytes
	maxRanked   = 200 // of which the caller may see the best
)

// Tools are the two tools over a catalog that changes. Their methods are safe for concurrent use.
type Tools struct {
	definition func(name string) jsontext.Value
	index      atomic.Pointer[Index]
}

// NewTools returns the tools over nothing; see [Tools.Use]. definition returns what lists show of
// a tool.
func NewTools(definition func(name string) jsontext.Value) *Tools {
	t := &Tools{definition: definition}
	t.index.Store(New(nil))
	return t
}

// Use makes tools what is searched from now on.
func (t *Tools) Use(tools []*call.Capability) { t.index.Store(New(tools)) }

// Capabilities returns the two tools.
func (t *Tools) Capabilities() []*call.Capability {
	return []*call.Capability{
		{
			Kind: call.Tool, Name: SearchName, Title: "Search tools", Effect: call.Read, Origin: "tool search (built in)",
			Description: "Finds the tools that fit a task best, with their schemas. Search here first when you do not know which tool to use, then call what you found by its name, or through call_tool.",
			Input: jsontext.Value(`{"type":"object","properties":{"query":{"type":"string","description":"The task, in words.","minLength":1,"maxLength":` + strconv.Itoa(maxQuery) +
				`},"limit":{"type":"integer","description":"Most tools to return.","minimum":1,"maximum":` + strconv.Itoa(maxHits) + `,"default":` + strconv.Itoa(defaultHits) + `}},"required":["query"],"additionalProperties":false}`),
			Run: t.search,
		},
		{
			Kind: call.Tool, Name: CallName, Title: "Call a tool", Effect: call.Unknown, Origin: "tool search (built in)",
			Description: "Calls a tool that search_tools found, for clients that cannot call tools they have not listed.",
			Input:       jsontext.Value(`{"type":"object","properties":{"name":{"type":"string","description":"Name of the tool.","minLength":1},"arguments":{"type":"object","description":"Its arguments, as its schema says."}},"required":["name"],"additionalProperties":false}`),
			Run: func(context.Context, *call.Call) (*call.Result, error) {
				// Unwrap has let it pass: its arguments are not of the form above, and validate says so before this.
				return nil, call.Errorf(call.Invalid, "call_tool needs the name of a tool and its arguments")
			},
		},
	}
}

func (t *Tools) search(_ context.Context, c *call.Call) (*call.Result, error) {
	q := struct {
		Query string `json:"query"`
		Limit int    `json:"limit"`
	}{Limit: defaultHits}
	if err := json.Unmarshal(c.Args, &q); err != nil {
		return nil, call.Errorf(call.Invalid, "the arguments cannot be used").Because(err)
	}
	b := jsontext.Value(`{"tools":[`)
	n := 0
	for _, hit := range t.index.Load().Search(q.Query, maxRanked) {
		def := t.definition(hit.Tool.Name)
		if def == nil || c.Visible != nil && !c.Visible.Shows(hit.Tool) {
			continue // it went away meanwhile, or is not for this caller
		}
		if n++; n > q.Limit {
			break
		}
		if n > 1 {
			b = append(b, ',')
		}
		b = append(b, def...)
	}
	b = append(b, "]}"...)
	return &call.Result{Structured: b, Content: call.TextContent(string(b))}, nil
}

// Unwrap returns a handler that turns a call of call_tool into the call it stands for and hands it
// to next. What is not of the right form goes on as it is and is refused like any other.
func Unwrap(next call.Handler) call.Handler {
	return func(ctx context.Context, c *call.Call) (*call.Result, error) {
		if c.Kind != call.Tool || c.Name != CallName {
			return next(ctx, c)
		}
		var in struct {
			Name string         `json:"name"`
			Args jsontext.Value `json:"arguments"`
		}
		if err := json.Unmarshal(c.Args, &in, json.RejectUnknownMembers(true)); err != nil || in.Name == "" || in.Name == CallName || in.Args != nil && in.Args.Kind() != '{' {
			return next(ctx, c)
		}
		inner := *c
		inner.Name, inner.Args = in.Name, in.Args
		r, err := next(ctx, &inner)
		c.Event, c.Principal, c.Target = inner.Event, inner.Principal, inner.Target
		return r, err
	}
}
