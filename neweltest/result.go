package neweltest

import (
	"context"
	"strings"
	"sync"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/mcpwire"
)

// A Result is what came of one call.
type Result struct {
	// Result is what the caller gets. For a tool that failed in a way the model should hear of it
	// is the result that says so; after other failures it is empty.
	call.Result

	Err      *call.Error       // why the call failed, or nil; its cause is what the log would say
	Progress []call.Progress   // of all rounds
	Logs     []call.LogMessage // of all rounds and every level
	Asked    []call.Question   // in order, each once
	Rounds   int               // how often the handler ran

	t TB
}

// Text returns the texts of the result, joined by newlines: the text blocks of a tool, the
// contents of a resource, the messages of a prompt.
func (r *Result) Text() string {
	type text struct {
		Text     *string `json:"text"`
		Resource struct {
			Text *string `json:"text"`
		} `json:"resource"`
	}
	var items []struct {
		text
		Content text `json:"content"`
	}
	if r.Content == nil {
		return ""
	}
	if err := json.Unmarshal(r.Content, &items); err != nil {
		return "" // a completion: an object, no array
	}
	var lines []string
	for _, i := range items {
		for _, s := range []*string{i.Text, i.Resource.Text, i.Content.Text, i.Content.Resource.Text} {
			if s != nil {
				lines = append(lines, *s)
			}
		}
	}
	return strings.Join(lines, "\n")
}

// Decode stores the structured content of a tool in the value that v points to. It fails the test
// if the call failed or the value does not fit.
func (r *Result) Decode(v any) {
	r.t.Helper()
	r.must("call")
	if err := json.Unmarshal(r.Structured, v, json.RejectUnknownMembers(true)); err != nil {
		r.t.Fatalf("the structured content %s does not fit %T: %v", r.Structured, v, err)
	}
}

// Code returns why the call failed, or call.OK.
func (r *Result) Code() call.Code {
	if r.Err == nil {
		return call.OK
	}
	return r.Err.Code
}

// must fails the test if the call failed.
func (r *Result) must(what string) *Result {
	r.t.Helper()
	if r.Err != nil {
		r.t.Fatalf("%s: %v", what, r.Err)
	}
	return r
}

// finish turns the error of a call into what the caller gets.
func (r *Result) finish(kind call.Kind, got *call.Result, err error) {
	if err != nil {
		r.Err = call.AsError(err)
		if kind == call.Tool {
			got = mcpwire.ToolError(err)
		}
	}
	if got != nil {
		r.Result = *got
	}
}

// recorder is the Sink of a call.
type recorder struct {
	mu           sync.Mutex
	progress     []call.Progress
	logs         []call.LogMessage
	notes        chan call.Notification // of subscriptions, or nil
	acknowledged chan struct{}
}

// Progress implements call.Sink. As in every door, progress that does not increase is dropped.
func (r *recorder) Progress(_ context.Context, p call.Progress) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if n := len(r.progress); n == 0 || p.Done > r.progress[n-1].Done {
		r.progress = append(r.progress, p)
	}
	return nil
}

// Log implements call.Sink.
func (r *recorder) Log(_ context.Context, m call.LogMessage) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	m.Data = jsontext.Value(m.Data).Clone()
	r.logs = append(r.logs, m)
	return nil
}

// Notify implements call.Sink.
func (r *recorder) Notify(_ context.Context, n call.Notification) error {
	switch {
	case r.notes == nil:
		return call.Errorf(call.Internal, "only subscriptions may notify")
	case n.Method == call.Acknowledged:
		close(r.acknowledged)
		return nil
	}
	select {
	case r.notes <- n:
	default: // nobody reads: like a client that is too slow
	}
	return nil
}
