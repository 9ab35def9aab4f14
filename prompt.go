package newel

import (
	"context"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
)

// A Prompt is a parameterised template. All arguments are strings.
type Prompt struct {
	Name        string
	Title       string
	Description string
	Icons       jsontext.Value
	Arguments   []call.Argument
	Scopes      []string
	Meta        jsontext.Value
	// Suggest completes an argument; nil: arguments with an Enum complete from it.
	Suggest func(ctx context.Context, argument, typed string) ([]string, error)
}

// A Message is one message of a prompt.
type Message struct {
	Role    string // "user" or "assistant"
	Content Block
}

// AddPrompt adds a prompt; f renders it.
func AddPrompt(s *Server, p Prompt, f func(ctx context.Context, req *Request, args map[string]string) ([]Message, error)) {
	s.add(&call.Capability{
		Kind: call.Prompt, Name: p.Name, Title: p.Title, Description: p.Description, Icons: p.Icons, Arguments: p.Arguments,
		Scopes: p.Scopes, Meta: p.Meta, Effect: call.Read, Origin: place(),
		Suggest: p.suggest(),
		Run: func(ctx context.Context, c *call.Call) (*call.Result, error) {
			args := map[string]string{}
			if c.Args != nil {
				if err := json.Unmarshal(c.Args, &args); err != nil {
					return nil, call.Errorf(call.Invalid, "the arguments of a prompt are strings").Because(err)
				}
			}
			messages, err := f(ctx, &Request{c}, args)
			if err != nil {
				return nil, err
			}
			b := jsontext.Value{'['}
			for i, m := range messages {
				if i > 0 {
					b = append(b, ',')
				}
				b = call.AppendString(append(b, `{"role":`...), m.Role)
				b = append(append(append(b, `,"content":`...), m.Content...), '}')
			}
			r := &call.Result{Content: append(b, ']')}
			if p.Description != "" {
				r.Extra = append(call.AppendString(jsontext.Value(`{"description":`), p.Description), '}')
			}
			return r, nil
		},
	}, nil)
}

func (p *Prompt) suggest() func(context.Context, *call.Completion) ([]string, int, error) {
	return func(ctx context.Context, q *call.Completion) ([]string, int, error) {
		if p.Suggest != nil {
			values, err := p.Suggest(ctx, q.Argument, q.Value)
			return values, len(values), err
		}
		var values []string
		for _, a := range p.Arguments {
			if a.Name != q.Argument {
				continue
			}
			for _, v := range a.Enum {
				if strings.HasPrefix(strings.ToLower(v), strings.ToLower(q.Value)) {
					values = append(values, v)
				}
			}
		}
		return values, len(values), nil
	}
}
