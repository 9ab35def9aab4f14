// Package neweltest runs a server's whole path in memory: every guard, the real schemas, the real
// bounds, no socket and no protocol. A test calls tools, reads resources, renders prompts, and
// answers the questions that handlers ask.
//
// Start reading at [New]; what a call gave is a [Result]. By default a handler that asks is run
// as in the stateless revision: from its start again for each round of answers. [Sessions] runs
// it as in the session revisions: once, waiting for each answer. A handler should pass both ways.
//
// The package leaves protocols to the conformance suite, and does not import package testing, so
// that programs may use it too.
package neweltest

import (
	"context"
	"sync"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel"
	"newel.dev/newel/call"
	"newel.dev/newel/internal/strictjson"
)

// TB is what a Client needs of a test: *testing.T, *testing.B and *testing.F have it.
type TB interface {
	Helper()
	Fatalf(format string, args ...any)
	Cleanup(func())
	Context() context.Context
}

// A Client calls one server. Its methods belong on the goroutine of the test, because they may
// fail it.
type Client struct {
	t       TB
	server  *newel.Server
	client  call.Client
	answers map[string]any
	session bool
	stop    func()
}

// An Option changes what a Client is or how it answers.
type Option func(*Client)

// WithAnswers says what to answer to the questions of handlers, by key. Values are made by
// [Accept], [Decline], [Cancel], [Sampled] and [Roots]; anything else is encoded as the whole JSON
// result of the question. A question without an answer fails the test.
func WithAnswers(answers map[string]any) Option {
	return func(c *Client) {
		for k, v := range answers {
			c.answers[k] = v
		}
	}
}

// WithClient replaces what the caller's side declares. The default declares everything that a
// handler can ask for.
func WithClient(declared call.Client) Option { return func(c *Client) { c.client = declared } }

// Sessions makes handlers wait for their answers, as in the session revisions, instead of running
// again once the answers are there.
func Sessions() Option { return func(c *Client) { c.session = true } }

// New returns a client of s and runs the server's watchers beside it until the test ends. It
// fails the test if anything that was added to s is wrong.
//
// Outside of tests t may be nil, as in examples: then a failure panics, and the program calls
// [Client.Close].
func New(t TB, s *newel.Server, options ...Option) *Client {
	if t == nil {
		t = program{}
	}
	t.Helper()
	c := &Client{t: t, server: s, answers: map[string]any{},
		client: call.Client{Name: "neweltest", ElicitForm: true, ElicitURL: true, Sampling: true, SamplingTools: true, Roots: true}}
	for _, o := range options {
		o(c)
	}
	if _, err := s.Handler(); err != nil {
		t.Fatalf("the server does not start: %v", err)
	}
	// The test's own context ends before its cleanups do; the server has to outlive them.
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = s.Run(ctx) // it has started, and ends with its context
	}()
	c.stop = sync.OnceFunc(func() { cancel(); <-ended })
	t.Cleanup(c.stop)
	return c
}

// Close ends what New started. Tests need not call it; it may be called twice.
func (c *Client) Close() { c.stop() }

// Call runs a tool. args is a struct or map that becomes JSON, a [jsontext.Value] that is taken as
// it is, or nil for none.
func (c *Client) Call(tool string, args any) *Result {
	c.t.Helper()
	return c.do(call.Call{Kind: call.Tool, Name: tool, Args: c.encode(args)})
}

// Read reads a resource.
func (c *Client) Read(uri string) *Result {
	c.t.Helper()
	return c.do(call.Call{Kind: call.Resource, Name: uri})
}

// Prompt renders a prompt; args may be nil.
func (c *Client) Prompt(name string, args map[string]string) *Result {
	c.t.Helper()
	if args == nil {
		return c.do(call.Call{Kind: call.Prompt, Name: name})
	}
	return c.do(call.Call{Kind: call.Prompt, Name: name, Args: c.encode(args)})
}

// Complete returns the suggestions for an argument of a prompt, or for a variable of a template
// if ref is call.Resource and name its URI template. chosen are the values of other arguments, or nil.
func (c *Client) Complete(ref call.Kind, name, argument, typed string, chosen map[string]string) []string {
	c.t.Helper()
	r := c.do(call.Call{Kind: call.Complete, Name: name,
		Completion: &call.Completion{Ref: ref, Argument: argument, Value: typed, Context: chosen}})
	var done struct {
		Values []string `json:"values"`
	}
	c.decode(r.must("complete").Content, &done)
	return done.Values
}

// A Definition is one entry of a list, with the members that tests look at. JSON holds all of it.
type Definition struct {
	Name         string         `json:"name"`
	URI          string         `json:"uri"`
	URITemplate  string         `json:"uriTemplate"`
	Title        string         `json:"title"`
	Description  string         `json:"description"`
	MIME         string         `json:"mimeType"`
	InputSchema  jsontext.Value `json:"inputSchema"`
	OutputSchema jsontext.Value `json:"outputSchema"`
	Annotations  jsontext.Value `json:"annotations"`
	Arguments    jsontext.Value `json:"arguments"`
	JSON         jsontext.Value `json:"-"`
}

// List returns all pages of a list: kind is call.ListTools, ListResources, ListTemplates or ListPrompts.
func (c *Client) List(kind call.Kind) []Definition {
	c.t.Helper()
	var all []Definition
	for cursor := ""; ; {
		r := c.do(call.Call{Kind: kind, Cursor: cursor}).must("list")
		err := call.EachElement(r.Content, func(v jsontext.Value) {
			d := Definition{JSON: v.Clone()}
			c.decode(v, &d)
			all = append(all, d)
		})
		if err != nil {
			c.t.Fatalf("%s: not a list: %v", kind, err)
		}
		if cursor = r.Next; cursor == "" {
			return all
		}
	}
}

// Listen subscribes and returns once changes are delivered; they arrive on the channel until the
// test or the client ends. The channel holds 64 notifications; more are lost.
func (c *Client) Listen(f call.Filter) <-chan call.Notification {
	c.t.Helper()
	ctx, cancel := context.WithCancel(context.WithoutCancel(c.t.Context()))
	heard := &recorder{notes: make(chan call.Notification, 64), acknowledged: make(chan struct{})}
	ended := make(chan error, 1)
	go func() {
		_, err := c.server.Do(ctx, &call.Call{Kind: call.Subscribe, Filter: &f, Client: c.client, Sink: heard})
		ended <- err
		close(ended)
	}()
	stop := c.stop
	c.stop = sync.OnceFunc(func() { cancel(); <-ended; stop() })
	c.t.Cleanup(c.stop)
	select {
	case <-heard.acknowledged:
	case err := <-ended:
		c.t.Fatalf("the subscription was refused: %v", err)
	}
	return heard.notes
}

// encode returns arguments as the JSON that a door would have let in.
func (c *Client) encode(args any) jsontext.Value {
	c.t.Helper()
	raw, ok := args.(jsontext.Value)
	if args == nil || ok && raw == nil {
		return nil
	}
	if !ok {
		var err error
		if raw, err = json.Marshal(args); err != nil {
			c.t.Fatalf("the arguments have no JSON form: %v", err)
		}
	}
	if err := strictjson.Check(raw, strictjson.Limits{}); err != nil {
		c.t.Fatalf("no door lets these arguments in: %v", err)
	}
	return raw
}

func (c *Client) decode(raw jsontext.Value, v any) {
	c.t.Helper()
	if err := json.Unmarshal(raw, v); err != nil {
		c.t.Fatalf("%s is not what was expected: %v", raw, err)
	}
}

// program is the TB of programs that are no tests.
type program struct{}

func (program) Helper()                  {}
func (program) Cleanup(func())           {}
func (program) Context() context.Context { return context.Background() }

// Fatalf panics: there is nobody to report to.
func (program) Fatalf(format string, args ...any) {
	panic(call.Errorf(call.Failed, format, args...).Message)
}
