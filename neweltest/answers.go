package neweltest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
)

// maxRounds is how often a door lets one call ask.
const maxRounds = 16

// Accept is the answer of a person who filled in a form with content, a struct or map; nil for a
// question that sends to a page.
func Accept(content any) any {
	if content == nil {
		return map[string]any{"action": "accept"}
	}
	return map[string]any{"action": "accept", "content": content}
}

// Decline is the answer of a person who said no.
func Decline() any { return map[string]any{"action": "decline"} }

// Cancel is the answer of a person who closed the question.
func Cancel() any { return map[string]any{"action": "cancel"} }

// Sampled is the answer of a model.
func Sampled(text string) any {
	return map[string]any{"role": "assistant", "model": "neweltest", "stopReason": "endTurn",
		"content": map[string]any{"type": "text", "text": text}}
}

// Roots is the answer of a client with these roots, file: URIs.
func Roots(uris ...string) any {
	roots := make([]any, len(uris))
	for i, u := range uris {
		roots[i] = map[string]any{"uri": u}
	}
	return map[string]any{"roots": roots}
}

// do runs one call, with as many rounds as its questions take.
func (c *Client) do(what call.Call) *Result {
	c.t.Helper()
	r := &Result{t: c.t}
	a := &asker{client: c, given: map[string]jsontext.Value{}}
	for r.Rounds < maxRounds {
		r.Rounds++
		sink := &recorder{}
		one := what
		one.Args, one.Client, one.Sink, one.Asker = what.Args.Clone(), c.client, sink, a
		got, err := c.server.Do(c.t.Context(), &one)
		r.Progress, r.Logs, r.Asked = append(r.Progress, sink.progress...), append(r.Logs, sink.logs...), a.asked
		if a.problem != nil {
			c.t.Fatalf("%s %q: %v", what.Kind, what.Name, a.problem)
		}
		var open *call.InputRequired
		if !errors.As(err, &open) {
			r.finish(what.Kind, got, err)
			return r
		}
		for _, q := range open.Questions {
			a.given[q.Key] = a.answer(q)
		}
		if a.problem != nil {
			c.t.Fatalf("%s %q: %v", what.Kind, what.Name, a.problem)
		}
	}
	c.t.Fatalf("%s %q asked in %d rounds and still has questions; no door goes on", what.Kind, what.Name, maxRounds)
	return r
}

// asker is the Asker of a call; it lives through all its rounds.
type asker struct {
	client *Client

	mu      sync.Mutex // handlers may ask from several goroutines
	asked   []call.Question
	given   map[string]jsontext.Value
	problem error
}

// Ask implements call.Asker, for both kinds of revisions.
func (a *asker) Ask(_ context.Context, questions ...call.Question) (map[string]jsontext.Value, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, q := range questions {
		if err := a.client.client.Supports(q); err != nil {
			return nil, err
		}
		if err := a.remember(q); err != nil {
			a.problem = err
			return nil, err
		}
	}
	out := make(map[string]jsontext.Value, len(questions))
	var open []call.Question
	for _, q := range questions {
		answer, ok := a.given[q.Key]
		if !ok && a.client.session {
			if answer = a.answer(q); a.problem != nil {
				return nil, a.problem
			}
			a.given[q.Key], ok = answer, true
		}
		if !ok {
			open = append(open, q)
			continue
		}
		out[q.Key] = answer
	}
	if len(open) > 0 {
		return nil, &call.InputRequired{Questions: open}
	}
	return out, nil
}

// remember notes a question, and finds keys that do not stand for one question.
func (a *asker) remember(q call.Question) error {
	if q.Key == "" {
		return fmt.Errorf("a question with method %s has no key", q.Method)
	}
	i := slices.IndexFunc(a.asked, func(o call.Question) bool { return o.Key == q.Key })
	if i < 0 {
		a.asked = append(a.asked, q)
		return nil
	}
	if o := a.asked[i]; o.Method != q.Method || string(o.Params) != string(q.Params) {
		return fmt.Errorf("the key %q stands for two questions, %s %s and %s %s: the stateless revision would answer the second with the answer to the first",
			q.Key, o.Method, o.Params, q.Method, q.Params)
	}
	return nil
}

// answer returns the scripted answer to q, or sets a.problem.
func (a *asker) answer(q call.Question) jsontext.Value {
	v, ok := a.client.answers[q.Key]
	if !ok {
		a.problem = fmt.Errorf("it asked %q (%s %s), and WithAnswers has no such key", q.Key, q.Method, q.Params)
		return nil
	}
	raw, err := json.Marshal(v)
	if err != nil {
		a.problem = fmt.Errorf("the answer to %q has no JSON form: %w", q.Key, err)
	}
	return raw
}
