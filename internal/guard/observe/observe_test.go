package observe_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/baggage"
	"go.opentelemetry.io/otel/codes"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.opentelemetry.io/otel/trace"
	tracenoop "go.opentelemetry.io/otel/trace/noop"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/guard/observe"
)

// A watch is an observer with everything it writes at hand.
type watch struct {
	*observe.Observer
	t      *testing.T
	log    *bytes.Buffer
	spans  *tracetest.SpanRecorder
	tracer trace.TracerProvider
	reader *sdkmetric.ManualReader
}

func newWatch(t *testing.T) *watch {
	t.Helper()
	w := &watch{t: t, log: &bytes.Buffer{}, spans: tracetest.NewSpanRecorder(), reader: sdkmetric.NewManualReader()}
	w.tracer = sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(w.spans))
	var err error
	w.Observer, err = observe.New(observe.Options{
		Server: "orders",
		Logger: slog.New(slog.NewJSONHandler(w.log, nil)),
		Tracer: w.tracer,
		Meter:  sdkmetric.NewMeterProvider(sdkmetric.WithReader(w.reader)),
		RPCCode: func(k call.Kind, c call.Code) int {
			if c == call.NotFound {
				return -32602
			}
			return 0
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	return w
}

// record returns the only record written since the last time.
func (w *watch) record() map[string]any {
	w.t.Helper()
	var m map[string]any
	if err := json.Unmarshal(w.log.Bytes(), &m); err != nil {
		w.t.Fatalf("not one JSON record: %v\n%s", err, w.log)
	}
	w.log.Reset()
	return m
}

// metric returns the data of one instrument, or nil if it measured nothing.
func (w *watch) metric(name string) metricdata.Aggregation {
	w.t.Helper()
	var all metricdata.ResourceMetrics
	if err := w.reader.Collect(w.t.Context(), &all); err != nil {
		w.t.Fatal(err)
	}
	for _, s := range all.ScopeMetrics {
		for _, m := range s.Metrics {
			if m.Name == name {
				return m.Data
			}
		}
	}
	return nil
}

func toolCall(args string) *call.Call {
	return &call.Call{
		Kind: call.Tool, Name: "get_order", Args: jsontext.Value(args), Door: "http", Revision: "2026-07-28", SessionID: "s-1",
		Client: call.Client{Name: "inspector"}, Size: 321, Sink: call.Discard, Asker: call.NoAsker,
	}
}

var getOrder = &call.Capability{Kind: call.Tool, Name: "get_order"}

func ending(target *call.Capability, r *call.Result, err error) call.Handler {
	return func(_ context.Context, c *call.Call) (*call.Result, error) {
		c.Target = target
		return r, err
	}
}

func expect(t *testing.T, got map[string]any, want map[string]any) {
	t.Helper()
	for k, v := range want {
		if v == nil {
			if g, there := got[k]; there {
				t.Errorf("%s = %v, want none", k, g)
			}
		} else if fmt.Sprint(got[k]) != fmt.Sprint(v) {
			t.Errorf("%s = %v, want %v", k, got[k], v)
		}
	}
}

func attributes(s sdktrace.ReadOnlySpan) map[string]any {
	m := map[string]any{}
	for _, a := range s.Attributes() {
		m[string(a.Key)] = a.Value.AsInterface()
	}
	return m
}

func TestSuccess(t *testing.T) {
	w := newWatch(t)
	c := toolCall(`{"id":"secret-4711","limit":10}`)
	c.Principal = &call.Principal{ID: "u-1", Tenant: "acme"}
	var seen string
	h := w.Guard(func(ctx context.Context, c *call.Call) (*call.Result, error) {
		c.Target = getOrder
		c.Event.ResultBytes, c.Event.Tokens = 500, 125
		seen = observe.Correlation(ctx)
		return call.Text("fine"), nil
	})
	if _, err := h(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	if seen == "" || seen != c.Event.Correlation {
		t.Errorf("the handler saw correlation %q, the event has %q", seen, c.Event.Correlation)
	}
	if strings.Contains(w.log.String(), "4711") {
		t.Errorf("the value of an argument is in the record: %s", w.log)
	}
	expect(t, w.record(), map[string]any{
		"level": "INFO", "msg": "call", "server": "orders", "door": "http", "correlation": seen, "method": "tools/call",
		"name": "get_order", "outcome": "ok", "args": "id:string/13 limit:number/2", "tenant": "acme", "principal": "u-1",
		"session": "s-1", "revision": "2026-07-28", "client": "inspector", "bytes_in": 321, "bytes_out": 500, "code": nil, "error": nil,
	})
	spans := w.spans.Ended()
	if len(spans) != 1 || spans[0].Name() != "tools/call get_order" || spans[0].SpanKind() != trace.SpanKindServer {
		t.Fatalf("spans: %v", spans)
	}
	expect(t, attributes(spans[0]), map[string]any{
		"mcp.method.name": "tools/call", "gen_ai.tool.name": "get_order", "gen_ai.operation.name": "execute_tool", "mcp.session.id": "s-1",
		"mcp.protocol.version": "2026-07-28", "network.transport": "tcp", "newel.outcome": "ok", "error.type": nil,
	})
	d, _ := w.metric("mcp.server.operation.duration").(metricdata.Histogram[float64])
	if len(d.DataPoints) != 1 || d.DataPoints[0].Count != 1 {
		t.Fatalf("durations: %+v", d)
	}
	if v, _ := d.DataPoints[0].Attributes.Value("gen_ai.tool.name"); v.AsString() != "get_order" {
		t.Errorf("labels: %v", d.DataPoints[0].Attributes)
	}
	tokens, _ := w.metric("newel.result.tokens").(metricdata.Sum[int64])
	if len(tokens.DataPoints) != 1 || tokens.DataPoints[0].Value != 125 {
		t.Errorf("tokens: %+v", tokens)
	}
}

func TestOutcomes(t *testing.T) {
	leak := errors.New("constraint: value secret-4711")
	tests := []struct {
		name    string
		step    string
		result  *call.Result
		err     error
		level   string
		outcome string
		code    call.Code
		error   string // in the record
		kind    string // error.type
	}{
		{name: "ok", result: &call.Result{}, level: "INFO", outcome: "ok"},
		{name: "tool error", result: &call.Result{IsError: true}, level: "INFO", outcome: "tool_error", kind: "tool_error"},
		{name: "input required", err: fmt.Errorf("wrapped: %w", &call.InputRequired{}), level: "INFO", outcome: "input_required"},
		{name: "refused", step: "validate", err: call.Errorf(call.Invalid, "id is secret-4711").Because(leak), level: "INFO", outcome: "refused", code: call.Invalid, kind: "invalid_arguments"},
		{name: "no room", step: "admit", err: call.Errorf(call.Exhausted, "full"), level: "WARN", outcome: "refused", code: call.Exhausted, error: "exhausted: full", kind: "exhausted"},
		{name: "unknown", step: "backend", err: errors.New("disk on fire"), level: "ERROR", outcome: "error", code: call.Internal, error: "disk on fire", kind: "internal"},
		{name: "failed", step: "backend", err: call.Errorf(call.Failed, "no order secret-4711"), level: "INFO", outcome: "error", code: call.Failed, kind: "failed"},
		{name: "deadline", step: "backend", err: fmt.Errorf("query: %w", context.DeadlineExceeded), level: "WARN", outcome: "error", code: call.Timeout, error: "query: context deadline exceeded", kind: "timeout"},
		{name: "bug of a step", step: "bound", err: call.Errorf(call.Internal, "internal error"), level: "ERROR", outcome: "error", code: call.Internal, error: "internal: internal error", kind: "internal"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			w := newWatch(t)
			c := toolCall(`{}`)
			h := w.Guard(func(_ context.Context, c *call.Call) (*call.Result, error) {
				c.Target, c.Event.Step = getOrder, tt.step
				return tt.result, tt.err
			})
			r, err := h(t.Context(), c)
			if tt.err == nil {
				if r != tt.result || err != nil {
					t.Errorf("got %v, %v", r, err)
				}
			} else if _, isError := err.(*call.Error); !isError { //nolint:errorlint // the guard promises the bare type
				if _, isAsk := err.(*call.InputRequired); !isAsk { //nolint:errorlint // the guard promises the bare type
					t.Errorf("%T left the house", err)
				}
			}
			if strings.Contains(w.log.String(), "4711") {
				t.Errorf("the caller's value is in the record: %s", w.log)
			}
			want := map[string]any{"level": tt.level, "outcome": tt.outcome, "code": nil, "error": nil}
			if tt.code != call.OK {
				want["code"] = tt.code
			}
			if tt.error != "" {
				want["error"] = tt.error
			}
			expect(t, w.record(), want)
			span := w.spans.Ended()[0]
			if tt.kind == "" {
				expect(t, attributes(span), map[string]any{"error.type": nil})
			} else {
				expect(t, attributes(span), map[string]any{"error.type": tt.kind})
				if span.Status().Code != codes.Error || strings.Contains(span.Status().Description, "4711") {
					t.Errorf("status of the span: %+v", span.Status())
				}
			}
		})
	}
}

func TestPanic(t *testing.T) {
	w := newWatch(t)
	h := w.Guard(func(context.Context, *call.Call) (*call.Result, error) { panic("boom") })
	_, err := h(t.Context(), toolCall(`{}`))
	if e := call.AsError(err); e == nil || e.Code != call.Internal || e.Message != "internal error" {
		t.Errorf("got %v", err)
	}
	r := w.record()
	expect(t, r, map[string]any{"level": "ERROR", "outcome": "error", "error": "internal: internal error: panic: boom"})
	if stack := fmt.Sprint(r["stack"]); !strings.Contains(stack, "TestPanic") {
		t.Errorf("no stack in the record: %s", stack)
	}
	active, _ := w.metric("newel.calls.active").(metricdata.Sum[int64])
	for _, p := range active.DataPoints {
		if p.Value != 0 {
			t.Errorf("still active after a panic: %+v", p)
		}
	}
}

func TestActiveAndGauge(t *testing.T) {
	w := newWatch(t)
	if err := w.Gauge("newel.calls.queued", "Calls that wait.", func() int64 { return 7 }); err != nil {
		t.Fatal(err)
	}
	h := w.Guard(func(context.Context, *call.Call) (*call.Result, error) {
		active, _ := w.metric("newel.calls.active").(metricdata.Sum[int64])
		total := int64(0)
		for _, p := range active.DataPoints {
			total += p.Value
		}
		if total != 1 {
			t.Errorf("%d active calls, want 1", total)
		}
		return &call.Result{}, nil
	})
	if _, err := h(t.Context(), toolCall(`{}`)); err != nil {
		t.Fatal(err)
	}
	queued, _ := w.metric("newel.calls.queued").(metricdata.Gauge[int64])
	if len(queued.DataPoints) != 1 || queued.DataPoints[0].Value != 7 {
		t.Errorf("queued: %+v", queued)
	}
}

// Names that strangers make up must not become labels or names of spans.
func TestUnknownNames(t *testing.T) {
	w := newWatch(t)
	for i := range 100 {
		c := toolCall(`{}`)
		c.Name = fmt.Sprintf("made-up-%d-%s", i, strings.Repeat("ü", 200))
		h := w.Guard(ending(nil, nil, call.Errorf(call.NotFound, "unknown tool")))
		if _, err := h(t.Context(), c); err == nil {
			t.Fatal("no error")
		}
		if name := fmt.Sprint(w.record()["name"]); len(name) > 128 || !strings.HasPrefix(name, "made-up-") {
			t.Errorf("name in the record: %q", name)
		}
	}
	d, _ := w.metric("mcp.server.operation.duration").(metricdata.Histogram[float64])
	if len(d.DataPoints) != 1 {
		t.Errorf("%d series, want 1", len(d.DataPoints))
	}
	if v, _ := d.DataPoints[0].Attributes.Value("rpc.response.status_code"); v.AsString() != "-32602" {
		t.Errorf("labels: %v", d.DataPoints[0].Attributes)
	}
	for _, s := range w.spans.Ended() {
		if s.Name() != "tools/call" {
			t.Errorf("span %q", s.Name())
		}
	}
}

func TestTemplatedResource(t *testing.T) {
	w := newWatch(t)
	target := &call.Capability{Kind: call.Resource, Template: "artifact://{id}"}
	h := w.Guard(ending(target, &call.Result{}, nil))
	if _, err := h(t.Context(), &call.Call{Kind: call.Resource, Name: "artifact://SECRET"}); err != nil {
		t.Fatal(err)
	}
	if strings.Contains(w.log.String(), "SECRET") {
		t.Errorf("the address is in the record: %s", w.log)
	}
	expect(t, w.record(), map[string]any{"name": "artifact://{id}", "method": "resources/read"})
	expect(t, attributes(w.spans.Ended()[0]), map[string]any{"newel.resource.template": "artifact://{id}", "mcp.resource.uri": nil})
}

func TestCorrelation(t *testing.T) {
	w := newWatch(t)
	seen := map[string]bool{}
	for given, kept := range map[string]bool{
		"abc-123": true, strings.Repeat("x", 128): true,
		"": false, strings.Repeat("x", 129): false, "with space": false, "tab\t": false, "ümlaut": false, "line\nbreak": false,
	} {
		c := toolCall(`{}`)
		c.Trace.Correlation = given
		h := w.Guard(func(ctx context.Context, c *call.Call) (*call.Result, error) {
			if id := observe.Correlation(ctx); (id == given) != kept || id == "" || seen[id] {
				t.Errorf("given %q, used %q", given, id)
			} else {
				seen[id] = true
			}
			return &call.Result{}, nil
		})
		if _, err := h(t.Context(), c); err != nil {
			t.Fatal(err)
		}
	}
	if id := observe.Correlation(t.Context()); id != "" {
		t.Errorf("outside of a call: %q", id)
	}
}

const parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"

func TestTraceContext(t *testing.T) {
	w := newWatch(t)
	ctx, transport := w.tracer.Tracer("http").Start(t.Context(), "POST")
	c := toolCall(`{}`)
	c.Trace.Parent, c.Trace.State, c.Trace.Baggage = parent, "rojo=1", "user=alice"
	h := w.Guard(func(ctx context.Context, _ *call.Call) (*call.Result, error) {
		sc := trace.SpanContextFromContext(ctx)
		if sc.TraceID().String() != "4bf92f3577b34da6a3ce929d0e0e4736" || sc.SpanID().String() == "00f067aa0ba902b7" || sc.TraceState().Get("rojo") != "1" {
			t.Errorf("span context for backends: %v", sc)
		}
		if v := baggage.FromContext(ctx).Member("user").Value(); v != "alice" {
			t.Errorf("baggage for backends: %q", v)
		}
		return &call.Result{}, nil
	})
	if _, err := h(ctx, c); err != nil {
		t.Fatal(err)
	}
	span := w.spans.Ended()[0]
	if !span.Parent().IsRemote() || span.Parent().SpanID().String() != "00f067aa0ba902b7" {
		t.Errorf("parent: %v", span.Parent())
	}
	if links := span.Links(); len(links) != 1 || !links[0].SpanContext.Equal(transport.SpanContext()) {
		t.Errorf("the span of the transport is not linked: %v", links)
	}
	expect(t, w.record(), map[string]any{"trace_id": "4bf92f3577b34da6a3ce929d0e0e4736"})
}

// Without a tracer the caller's trace context still reaches backends.
func TestTraceContextWithoutTracer(t *testing.T) {
	w := newWatch(t)
	ob, err := observe.New(observe.Options{Logger: slog.New(slog.DiscardHandler), Tracer: tracenoop.NewTracerProvider(), Meter: sdkmetric.NewMeterProvider()})
	if err != nil {
		t.Fatal(err)
	}
	for given, want := range map[string]string{parent: "00f067aa0ba902b7", "garbage": "0000000000000000"} {
		c := toolCall(`{}`)
		c.Trace.Parent, c.Trace.State = given, strings.Repeat("x", 1<<20)
		h := ob.Guard(func(ctx context.Context, _ *call.Call) (*call.Result, error) {
			if got := trace.SpanContextFromContext(ctx).SpanID().String(); got != want {
				t.Errorf("given %q: span %s for backends", given, got)
			}
			return &call.Result{}, nil
		})
		if _, err := h(t.Context(), c); err != nil {
			t.Fatal(err)
		}
	}
	_ = w
}

func TestRefused(t *testing.T) {
	w := newWatch(t)
	w.Refused(t.Context(), observe.Refusal{Door: "http", Code: call.Malformed, Status: 400, Peer: "192.0.2.7:999", Size: 12, Reason: "not JSON"})
	expect(t, w.record(), map[string]any{"level": "WARN", "msg": "refused", "server": "orders", "door": "http", "code": "malformed", "status": 400, "peer": "192.0.2.7:999", "bytes_in": 12, "reason": "not JSON"})
	n, _ := w.metric("newel.door.refused").(metricdata.Sum[int64])
	want := attribute.NewSet(attribute.String("newel.door", "http"), attribute.String("error.type", "malformed"))
	if len(n.DataPoints) != 1 || n.DataPoints[0].Value != 1 || !n.DataPoints[0].Attributes.Equals(&want) {
		t.Errorf("refused: %+v", n)
	}
}

// counting is a Sink that says what it sent.
type counting struct{ call.Sink }

func (counting) Reported() int64 { return 3 }

func TestProgress(t *testing.T) {
	w := newWatch(t)
	c := toolCall(`{}`)
	c.Sink = counting{call.Discard}
	if _, err := w.Guard(ending(getOrder, &call.Result{}, nil))(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	n, _ := w.metric("newel.progress.notifications").(metricdata.Sum[int64])
	if len(n.DataPoints) != 1 || n.DataPoints[0].Value != 3 {
		t.Errorf("progress: %+v", n)
	}
}

func TestInvalidKind(t *testing.T) {
	w := newWatch(t)
	h := w.Guard(ending(nil, nil, call.Errorf(call.Malformed, "no kind")))
	if _, err := h(t.Context(), &call.Call{Kind: 200}); err == nil {
		t.Fatal("no error")
	}
	expect(t, w.record(), map[string]any{"method": "invalid", "code": "malformed"})
}

func TestNewRefusesMissing(t *testing.T) {
	if _, err := observe.New(observe.Options{}); err == nil {
		t.Error("no error without a logger, a tracer and a meter")
	}
}

func TestDenials(t *testing.T) {
	w := newWatch(t)
	denied := w.Guard(func(_ context.Context, c *call.Call) (*call.Result, error) {
		c.Event.Rule, c.Event.Step = "no refunds", "authorize"
		return nil, call.Errorf(call.Denied, "not allowed")
	})
	if _, err := denied(t.Context(), toolCall(`{}`)); err == nil {
		t.Fatal("it is not denied")
	}
	expect(t, w.record(), map[string]any{"rule": "no refunds", "code": "denied", "step": "authorize"})
	sum, _ := w.metric("newel.policy.denials").(metricdata.Sum[int64])
	if len(sum.DataPoints) != 1 || sum.DataPoints[0].Value != 1 {
		t.Fatalf("denials: %+v", sum)
	}
	if rule, _ := sum.DataPoints[0].Attributes.Value("newel.policy.rule"); rule.AsString() != "no refunds" {
		t.Errorf("the rule is %q", rule.AsString())
	}
	stranger := w.Guard(func(context.Context, *call.Call) (*call.Result, error) {
		return nil, call.Errorf(call.Unauthenticated, "authentication is required")
	})
	if _, err := stranger(t.Context(), toolCall(`{}`)); err == nil {
		t.Fatal("a stranger may call")
	}
	w.Refused(t.Context(), observe.Refusal{Door: "http", Code: call.Unauthenticated, Status: 401})
	logins, _ := w.metric("newel.auth.failures").(metricdata.Sum[int64])
	n := int64(0)
	for _, p := range logins.DataPoints {
		n += p.Value
	}
	if n != 2 {
		t.Errorf("%d failed logins, want 2: %+v", n, logins)
	}
}

func TestDecided(t *testing.T) {
	w := newWatch(t)
	for _, outcome := range []string{"approved", "expired", "approved"} {
		w.Decided(t.Context(), outcome)
	}
	sum, _ := w.metric("newel.approvals.decisions").(metricdata.Sum[int64])
	if len(sum.DataPoints) != 2 {
		t.Fatalf("decisions: %+v", sum)
	}
	for _, p := range sum.DataPoints {
		v, _ := p.Attributes.Value("newel.outcome")
		if want := map[string]int64{"approved": 2, "expired": 1}[v.AsString()]; p.Value != want || want == 0 {
			t.Errorf("%s: %d", v.AsString(), p.Value)
		}
	}
}
