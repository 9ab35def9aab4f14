// Package backendtest is the suite that every backend must pass: its lists are complete and the
// same each time, it refuses what it does not know, cancelling a call ends it, results are valid
// JSON within their bounds and fit the schema that was published, failures carry codes and nothing
// private, calls run side by side, and nothing stays running once it is closed.
//
// Start reading at [Run]. The package leaves to each backend's own tests what its results mean.
package backendtest

import (
	"bytes"
	"cmp"
	"context"
	"io"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-json-experiment/json/jsontext"
	"github.com/santhosh-tekuri/jsonschema/v6"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/catalog"
	"newel.dev/newel/internal/strictjson"
)

// A Sample is one call, with what must come of it.
type Sample struct {
	Kind call.Kind // Tool (also when zero), Resource or Prompt
	Name string    // tool or prompt name, or resource URI
	Args string    // JSON object, or "" for none

	// Want is how the call must fail; OK: it must succeed. Invalid may also be the schema's answer.
	Want call.Code
	// Secret must not stand in the public part of any error: a statement, a path, a password.
	Secret string
	// Slow says that the call takes at least several seconds unless it is cancelled. Slow
	// samples are only run to be cancelled.
	Slow bool
}

const (
	maxResultBytes = 4 << 20         // of a backend that does not state a bound
	prompt         = 3 * time.Second // within which a cancelled call must return
	side           = 4               // calls at once
)

// Run runs the suite. open returns a fresh backend; if it is an io.Closer, the suite closes it.
// samples has at least one call that succeeds, one that fails, and one that is slow if the backend
// has anything slow.
func Run(t *testing.T, open func(t *testing.T) call.Backend, samples []Sample) {
	t.Helper()
	// One run before counting: drivers keep goroutines of their own for the whole process.
	suite := newSuite(t, open)
	suite.close(t)
	before := goroutines()

	s := newSuite(t, open)
	t.Run("lists", s.lists)
	for _, sample := range samples {
		name := cmp.Or(sample.Name, "unnamed") + " " + sample.Args
		if len(name) > 60 {
			name = name[:60]
		}
		if sample.Slow {
			t.Run("cancel "+name, func(t *testing.T) { s.cancelled(t, sample) })
			continue
		}
		t.Run(name, func(t *testing.T) { s.sample(t, sample) })
		t.Run("gone before "+name, func(t *testing.T) { s.gone(t, sample) })
	}
	t.Run("unknown", s.unknown)
	t.Run("side by side", func(t *testing.T) { s.together(t, samples) })
	s.close(t)
	noneLeft(t, before)
}

// suite is one open backend.
type suite struct {
	backend  call.Backend
	caps     []*call.Capability
	snapshot *catalog.Snapshot
	outputs  map[string]*jsonschema.Schema // by tool
}

func newSuite(t *testing.T, open func(t *testing.T) call.Backend) *suite {
	t.Helper()
	s := &suite{backend: open(t), outputs: map[string]*jsonschema.Schema{}}
	var err error
	if s.caps, err = s.backend.Capabilities(t.Context()); err != nil {
		t.Fatal(err)
	}
	if s.snapshot, err = catalog.Build([]catalog.Source{{Backend: s.backend.Name(), Capabilities: s.caps}}); err != nil {
		t.Fatalf("the catalog refuses what the backend publishes: %v", err)
	}
	for _, c := range s.caps {
		if c.Kind == call.Tool && c.Output != nil {
			s.outputs[c.Name] = compile(t, c.Output)
		}
	}
	return s
}

func (s *suite) close(t *testing.T) {
	t.Helper()
	if c, ok := s.backend.(io.Closer); ok {
		if err := c.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	}
}

func compile(t *testing.T, schema jsontext.Value) *jsonschema.Schema {
	t.Helper()
	doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(schema))
	if err != nil {
		t.Fatal(err)
	}
	c := jsonschema.NewCompiler()
	c.DefaultDraft(jsonschema.Draft2020)
	c.AssertFormat()
	if err := c.AddResource("urn:output", doc); err != nil {
		t.Fatal(err)
	}
	out, err := c.Compile("urn:output")
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// lists: complete, the same each time, and fit to be shown.
func (s *suite) lists(t *testing.T) {
	again, err := s.backend.Capabilities(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(again) != len(s.caps) {
		t.Fatalf("%d capabilities, then %d", len(s.caps), len(again))
	}
	if s.backend.Name() == "" {
		t.Error("the backend has no name")
	}
	for i, c := range s.caps {
		a := again[i]
		if id(a) != id(c) || !bytes.Equal(a.Input, c.Input) || !bytes.Equal(a.Output, c.Output) {
			t.Errorf("%s changed between two lists", id(c))
		}
		if c.Origin == "" {
			t.Errorf("%s does not say where it was declared", id(c))
		}
		if c.Kind == call.Tool && c.Effect == call.Unknown {
			t.Errorf("%s does not say its effect", id(c))
		}
	}
}

func id(c *call.Capability) string { return c.Kind.String() + " " + cmp.Or(c.URI, c.Template, c.Name) }

// do makes a call the way the path does: find it, check its arguments, run it.
func (s *suite) do(ctx context.Context, t *testing.T, sample Sample) (*call.Result, *call.Error) {
	t.Helper()
	c := &call.Call{Kind: cmp.Or(sample.Kind, call.Tool), Name: sample.Name, Door: "memory", Sink: call.Discard, Asker: call.NoAsker}
	if sample.Args != "" {
		c.Args = jsontext.Value(sample.Args)
	}
	switch c.Kind {
	case call.Tool:
		c.Target = s.snapshot.Tool(c.Name)
	case call.Prompt:
		c.Target = s.snapshot.Prompt(c.Name)
	case call.Resource:
		c.Target = s.snapshot.Resource(c.Name)
	default:
		t.Fatalf("samples cannot be of kind %s", c.Kind)
	}
	if c.Target == nil {
		return nil, call.Errorf(call.NotFound, "no %s %q", c.Kind, c.Name)
	}
	if c.Kind != call.Resource {
		if err := c.Target.Check(c.Args); err != nil {
			return nil, call.AsError(err)
		}
	}
	r, err := c.Target.Run(ctx, c)
	if err != nil {
		return nil, call.AsError(err)
	}
	return r, nil
}

func (s *suite) sample(t *testing.T, sample Sample) {
	r, e := s.do(t.Context(), t, sample)
	if e != nil {
		switch {
		case e.Code != sample.Want:
			t.Errorf("failed with %s (%v), want %s", e.Code, e, sample.Want)
		case strings.TrimSpace(e.Message) == "":
			t.Errorf("the error %s says nothing", e.Code)
		case sample.Secret != "" && (strings.Contains(e.Message, sample.Secret) || bytes.Contains(e.Data, []byte(sample.Secret))):
			t.Errorf("the error tells %q: %s", sample.Secret, e.Message)
		}
		return
	}
	if sample.Want != call.OK && !(r.IsError && sample.Want == call.Failed) {
		t.Errorf("went through, want %s: %s", sample.Want, r.Content)
	}
	s.fits(t, sample, r)
}

// fits holds a result against what was promised.
func (s *suite) fits(t *testing.T, sample Sample, r *call.Result) {
	t.Helper()
	bound := maxResultBytes
	if c := s.snapshot.Tool(sample.Name); c != nil && c.MaxResultBytes > 0 {
		bound = c.MaxResultBytes
	}
	if n := len(r.Structured); n > bound {
		t.Errorf("structured content of %d bytes, over the bound of %d", n, bound)
	}
	for what, v := range map[string]jsontext.Value{"content": r.Content, "structured content": r.Structured, "extra": r.Extra} {
		if v == nil {
			continue
		}
		if err := strictjson.Check(v, strictjson.Limits{Bytes: 2 * maxResultBytes, Elements: maxResultBytes}); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	if err := call.EachElement(r.Content, func(v jsontext.Value) {
		if v.Kind() != '{' {
			t.Errorf("a content block is %.50s", v)
		}
	}); err != nil && r.Content != nil {
		t.Errorf("content: %v", err)
	}
	schema := s.outputs[sample.Name]
	if cmp.Or(sample.Kind, call.Tool) != call.Tool || schema == nil || r.IsError {
		return
	}
	if r.Structured == nil {
		t.Fatal("a tool with an output schema gave no structured content")
	}
	doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(r.Structured))
	if err != nil {
		t.Fatal(err)
	}
	if err := schema.Validate(doc); err != nil {
		t.Errorf("the result does not fit its schema: %v", err)
	}
}

// gone: whoever cancelled before the call started gets no result, and no crash.
func (s *suite) gone(t *testing.T, sample Sample) {
	if sample.Want != call.OK {
		return // refused either way
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if r, e := s.do(ctx, t, sample); e != nil && e.Code != call.Canceled {
		t.Errorf("failed with %s (%v), want %s", e.Code, e, call.Canceled)
	} else if e == nil && s.effect(sample) != call.Read {
		t.Errorf("a cancelled call had its effect: %s", r.Content)
	}
}

func (s *suite) effect(sample Sample) call.Effect {
	if c := s.snapshot.Tool(sample.Name); cmp.Or(sample.Kind, call.Tool) == call.Tool && c != nil {
		return c.Effect
	}
	return call.Read
}

// cancelled: a call ends soon after it is cancelled, and soon after its deadline; each says so.
func (s *suite) cancelled(t *testing.T, sample Sample) {
	for _, want := range []call.Code{call.Canceled, call.Timeout} {
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		if want == call.Canceled {
			cancel()
			ctx, cancel = context.WithCancel(t.Context())
			time.AfterFunc(100*time.Millisecond, cancel)
		}
		start := time.Now()
		_, e := s.do(ctx, t, sample)
		cancel()
		if took := time.Since(start); took > prompt {
			t.Errorf("%s: returned after %v", want, took)
		}
		if e == nil || e.Code != want {
			t.Errorf("got %v, want %s", e, want)
		}
	}
}

// unknown: what was not declared is refused before the backend runs.
func (s *suite) unknown(t *testing.T) {
	const stranger = "backendtest-unknown"
	for _, k := range []call.Kind{call.Tool, call.Prompt} {
		if _, e := s.do(t.Context(), t, Sample{Kind: k, Name: stranger}); e == nil || e.Code != call.NotFound {
			t.Errorf("%s %s: got %v", k, stranger, e)
		}
	}
	for _, c := range s.caps {
		if c.Kind != call.Tool {
			continue
		}
		tool := s.snapshot.Tool(c.Name)
		for _, args := range []string{`{"` + stranger + `":1}`, `[]`, `null`, `"x"`} {
			if err := tool.Check(jsontext.Value(args)); err == nil {
				t.Errorf("tool %s takes %s", c.Name, args)
			} else if e := call.AsError(err); e.Code != call.Invalid {
				t.Errorf("tool %s, %s: refused with %s", c.Name, args, e.Code)
			}
		}
	}
}

// together: reads side by side answer as they do alone.
func (s *suite) together(t *testing.T, samples []Sample) {
	type answer struct {
		sample Sample
		want   *call.Result
	}
	var answers []answer
	for _, sample := range samples {
		if sample.Slow || sample.Want != call.OK || s.effect(sample) != call.Read {
			continue
		}
		if r, e := s.do(t.Context(), t, sample); e == nil {
			answers = append(answers, answer{sample, r})
		}
	}
	if len(answers) == 0 {
		t.Fatal("no sample is a read that succeeds")
	}
	failed := make(chan string, side)
	for range side {
		go func() {
			for range 10 {
				for _, a := range answers {
					r, e := s.do(t.Context(), t, a.sample)
					switch {
					case e != nil:
						failed <- a.sample.Name + ": " + e.Error()
						return
					case !bytes.Equal(r.Structured, a.want.Structured) || !bytes.Equal(r.Content, a.want.Content):
						failed <- a.sample.Name + ": another answer than alone"
						return
					}
				}
			}
			failed <- ""
		}()
	}
	for range side {
		if f := <-failed; f != "" {
			t.Error(f)
		}
	}
}

// goroutines returns what each goroutine was started by, sorted.
func goroutines() []string {
	buf := make([]byte, 1<<20)
	buf = buf[:runtime.Stack(buf, true)]
	var out []string
	for g := range strings.SplitSeq(string(buf), "\n\n") {
		if i := strings.LastIndex(g, "created by "); i >= 0 {
			origin, _, _ := strings.Cut(g[i:], " in goroutine")
			out = append(out, origin)
		}
	}
	slices.Sort(out)
	return out
}

// noneLeft waits until no more goroutines run than before.
func noneLeft(t *testing.T, before []string) {
	t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	late := time.After(prompt)
	for {
		left := goroutines()
		if len(left) <= len(before) {
			return
		}
		select {
		case <-tick.C:
		case <-late:
			t.Errorf("%d goroutines run after Close, %d before:\n%s", len(left), len(before), strings.Join(left, "\n"))
			return
		}
	}
}
