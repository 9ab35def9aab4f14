package call

import (
	"context"
	"slices"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

// An Asker asks the caller's side for input while a call runs. A handler is written once for
// every protocol revision:
//
//   - In session revisions Ask sends requests to the client and waits for the answers.
//   - In the stateless revision (2026-07-28) Ask returns [*InputRequired] the first time. The
//     door answers input_required with sealed state, and on the client's retry the handler runs
//     again from its start: then Ask returns the answers. So a handler asks before it has
//     effects, with keys and questions that do not change between runs.
//
// A handler returns the error of Ask unchanged.
type Asker interface {
	// Ask returns one answer per question, by key. It fails with Unsupported if the client did
	// not declare what a question needs.
	Ask(ctx context.Context, questions ...Question) (map[string]jsontext.Value, error)
}

// Methods a Question may use.
const (
	MethodElicit = "elicitation/create"
	MethodSample = "sampling/createMessage"
	MethodRoots  = "roots/list"
)

// A Question is one request for input.
type Question struct {
	Key    string         // unique within the call and stable between runs
	Method string         // one of the Method constants
	Params jsontext.Value // as MCP spells them; may be nil for MethodRoots
}

// CheckAnswer refuses answers that are not of the form the question asks for.
func (q *Question) CheckAnswer(answer jsontext.Value) error {
	var a struct {
		Action  *string        `json:"action"`
		Content jsontext.Value `json:"content"`
		Role    *string        `json:"role"`
		Roots   jsontext.Value `json:"roots"`
	}
	if answer.Kind() != '{' || json.Unmarshal(answer, &a) != nil {
		return Errorf(Malformed, "inputResponses[%q] is not a result of %s", q.Key, q.Method)
	}
	ok := false
	switch q.Method {
	case MethodElicit:
		ok = a.Action != nil && slices.Contains([]string{"accept", "decline", "cancel"}, *a.Action)
	case MethodSample:
		ok = a.Role != nil && a.Content != nil
	case MethodRoots:
		ok = a.Roots.Kind() == '['
	}
	if !ok {
		return Errorf(Malformed, "inputResponses[%q] is not a result of %s", q.Key, q.Method)
	}
	return nil
}

// InputRequired is returned through the path when a stateless caller has to be asked. It is not
// a failure: doors turn it into an input_required result.
type InputRequired struct {
	Questions []Question

	// State is what the handler goes on from, or "". With it the handler does not start over:
	// the retry has it in Call.Resume, and only the answers to these questions. It travels
	// sealed through the client, at most 64 KiB of it.
	State string
}

// Error makes InputRequired travel as an error.
func (r *InputRequired) Error() string {
	keys := make([]string, len(r.Questions))
	for i, q := range r.Questions {
		keys[i] = q.Key
	}
	return "input required: " + strings.Join(keys, ", ")
}

// Supports returns nil if the client declared what q needs, otherwise an Unsupported error whose
// Data names the missing capability (MCP 2026-07-28, error -32021).
func (c *Client) Supports(q Question) error {
	missing := ""
	switch q.Method {
	case MethodElicit:
		if isURLMode(q.Params) {
			if !c.ElicitURL {
				missing = `{"elicitation":{"url":{}}}`
			}
		} else if !c.ElicitForm {
			missing = `{"elicitation":{"form":{}}}`
		}
	case MethodSample:
		switch {
		case !c.Sampling:
			missing = `{"sampling":{}}`
		case !c.SamplingTools && hasMember(q.Params, "tools"):
			missing = `{"sampling":{"tools":{}}}`
		}
	case MethodRoots:
		if !c.Roots {
			missing = `{"roots":{}}`
		}
	default:
		return Errorf(Internal, "a question used the unknown method %q", q.Method)
	}
	if missing == "" {
		return nil
	}
	e := Errorf(Unsupported, "this call needs %s, and the client did not declare the capability", q.Method)
	e.Data = jsontext.Value(`{"requiredCapabilities":` + missing + `}`)
	return e
}

func isURLMode(params jsontext.Value) bool {
	url := false
	_ = EachMember(params, func(name string, v jsontext.Value) { // no object, no mode
		if name == "mode" {
			url = string(v) == `"url"`
		}
	})
	return url
}

func hasMember(params jsontext.Value, want string) bool {
	found := false
	_ = EachMember(params, func(name string, _ jsontext.Value) { found = found || name == want })
	return found
}

// NoAsker is the Asker of callers that cannot be asked.
var NoAsker Asker = noAsker{}

type noAsker struct{}

func (noAsker) Ask(context.Context, ...Question) (map[string]jsontext.Value, error) {
	return nil, Errorf(Unsupported, "this caller cannot be asked for input")
}
