package newel

import (
	"context"
	"time"

	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/backend/gofunc"
)

// A Tool says what a tool is. Name, Description and Effect should be set; the rest is optional.
type Tool struct {
	Name        string // letters, digits and _ - . / ; at most 128
	Title       string // for people
	Description string // for models: what it does and when to use it
	Icons       jsontext.Value
	Effect      call.Effect   // what running it does to the world; annotations follow from it
	Recovery    call.Recovery // what may be done when it is not known whether a call ran
	Lookup      string        // for call.RecoverLookup: the tool that tells
	Settle      time.Duration // for call.RecoverLookup: how long a call that is not found may still be done; 0: twice its time-out
	Undo        *call.Undo    // the tool that undoes a call of this one, for newel undo
	Scopes      []string      // scopes a caller needs
	Owner       string
	Version     string
	Tags        []string

	Annotations  jsontext.Value // as MCP spells them; nil: from Effect
	Meta         jsontext.Value // _meta of the definition
	InputSchema  jsontext.Value // nil: derived from the input type
	OutputSchema jsontext.Value // nil: derived from the output type, if that is a struct or map

	MaxResultBytes int // 0: the server's limit

	// Tasks says whether calls may go on as tasks: callers that can take a handle then get one in place
	// of the result, and ask for that later. What the tool asks, it asks while it runs; Prepare, if
	// not nil, runs before the task is made, and may ask first. The tool then gets the same answers to
	// the same questions. Tasks are only run while Serve, ServeStdio or Run is.
	Tasks   call.TaskSupport
	Prepare func(ctx context.Context, req *Request) error
}

func (t *Tool) capability(origin string) *call.Capability {
	c := &call.Capability{
		Kind: call.Tool, Name: t.Name, Title: t.Title, Description: t.Description, Icons: t.Icons,
		Input: t.InputSchema, Output: t.OutputSchema, Annotations: t.Annotations, Meta: t.Meta,
		Effect: t.Effect, Recovery: t.Recovery, Lookup: t.Lookup, Settle: t.Settle, Undo: t.Undo, Scopes: t.Scopes, Owner: t.Owner, Version: t.Version, Tags: t.Tags,
		MaxResultBytes: t.MaxResultBytes, Origin: origin, Tasks: t.Tasks,
	}
	if prepare := t.Prepare; prepare != nil {
		c.Prepare = func(ctx context.Context, cl *call.Call) error { return prepare(ctx, &Request{cl}) }
	}
	return c
}

// AddTool adds a tool whose schemas come from its types. Struct tags of In and Out:
//
//	json       name; a member is required unless its field is a pointer, has a default, or says omitempty or omitzero
//	doc        description
//	enum       allowed values, separated by commas
//	default    value of an absent member
//	minimum, maximum, minLength, maxLength, minItems, maxItems, pattern, format: the keywords of these names
//	header     mirror the member in the Mcp-Param header of this name
//
// In is a struct or a map. Out decides the result: a struct or map becomes structuredContent with
// an output schema, and JSON text for clients that read only text; a string becomes text; a
// [*call.Result] (see [Content]) goes out as it is.
//
// f returns an error of [Errorf] to tell the model what to do; any other error leaves as
// "internal error", its text in the log alone.
func AddTool[In, Out any](s *Server, t Tool, f func(ctx context.Context, req *Request, in In) (Out, error)) {
	c := t.capability(place())
	err := gofunc.Tool(c, func(ctx context.Context, cl *call.Call, in In) (Out, error) { return f(ctx, &Request{cl}, in) })
	s.add(c, err)
}

// AddRawTool adds a tool that takes its arguments and gives its result as JSON. InputSchema is
// what the arguments are validated against; nil means none are taken.
func AddRawTool(s *Server, t Tool, f func(ctx context.Context, req *Request) (*call.Result, error)) {
	c := t.capability(place())
	c.Run = func(ctx context.Context, cl *call.Call) (*call.Result, error) { return f(ctx, &Request{cl}) }
	s.add(c, nil)
}

// Errorf returns an error whose text reaches the model, as a result that says the tool failed.
// The text should say what to do next and hold no secrets; attach the cause with Because.
func Errorf(format string, args ...any) *call.Error { return call.Errorf(call.Failed, format, args...) }
