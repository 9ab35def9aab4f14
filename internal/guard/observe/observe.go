// Package observe is the outermost step of the path: one log record, one span and a few
// measurements for every call, whatever becomes of it.
//
// Refuses: nothing. Needs: a logger, a tracer and a meter; each may be a no-op. Fails: never; a
// panic further down becomes an internal error, its stack goes to the log alone. Records: the
// call's Event. Costs: about a microsecond without a recording span. Values of arguments are
// never recorded: they may hold what must not be in logs.
//
// Names follow the OpenTelemetry semantic conventions for MCP.
package observe

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"sync"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"

	"newel.dev/newel/call"
)

// Options configure an Observer. All but Server are required; no-ops will do.
type Options struct {
	Server string // name of the server in records
	Logger *slog.Logger
	Tracer trace.TracerProvider
	Meter  metric.MeterProvider
}

// An Observer records calls. It is safe for concurrent use.
type Observer struct {
	server   string
	logger   *slog.Logger
	tracer   trace.Tracer
	duration metric.Float64Histogram
	active   metric.Int64UpDownCounter
	refused  metric.Int64Counter
	bytes    metric.Int64Histogram
	tokens   metric.Int64Counter
	labels   sync.Map // labelKey to metric.MeasurementOption; bounded by what is registered
}

const scope = "newel.dev/newel"

// New returns an observer; it fails if an instrument cannot be made.
func New(o Options) (*Observer, error) {
	if o.Logger == nil || o.Tracer == nil || o.Meter == nil {
		return nil, errors.New("observe: logger, tracer and meter are required")
	}
	m := o.Meter.Meter(scope)
	ob := &Observer{server: o.Server, logger: o.Logger, tracer: o.Tracer.Tracer(scope)}
	var errs [5]error
	ob.duration, errs[0] = m.Float64Histogram("mcp.server.operation.duration", metric.WithUnit("s"), metric.WithDescription("Duration of one call, from the door to its result."),
		metric.WithExplicitBucketBoundaries(0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300))
	ob.active, errs[1] = m.Int64UpDownCounter("newel.calls.active", metric.WithDescription("Calls and subscriptions that are running or waiting to run."))
	ob.refused, errs[2] = m.Int64Counter("newel.door.refused", metric.WithDescription("Messages refused before they were calls."))
	ob.bytes, errs[3] = m.Int64Histogram("newel.result.size", metric.WithUnit("By"), metric.WithDescription("Size of results."),
		metric.WithExplicitBucketBoundaries(256, 1<<10, 4<<10, 16<<10, 64<<10, 256<<10, 1<<20, 4<<20))
	ob.tokens, errs[4] = m.Int64Counter("newel.result.tokens", metric.WithDescription("Estimated tokens of results."))
	return ob, errors.Join(errs[:]...)
}

// A Refusal is a message that a door refused before it was a call.
type Refusal struct {
	Door   string
	Code   call.Code
	Status int // of HTTP, or 0
	Peer   string
	Size   int // bytes
	Reason string
}

// Refused records a refusal, so that nothing that arrives goes unseen.
func (o *Observer) Refused(ctx context.Context, r Refusal) {
	o.refused.Add(ctx, 1, metric.WithAttributes(attribute.String("door", r.Door), attribute.String("error.type", r.Code.String())))
	o.logger.LogAttrs(ctx, slog.LevelWarn, "refused", slog.String("server", o.server), slog.String("door", r.Door),
		slog.String("code", r.Code.String()), slog.Int("status", r.Status), slog.String("peer", r.Peer), slog.Int("bytes", r.Size), slog.String("reason", r.Reason))
}

// methods are the names of the protocol, which the conventions ask for.
var methods = map[call.Kind]string{
	call.Tool: "tools/call", call.Resource: "resources/read", call.Prompt: "prompts/get", call.Complete: "completion/complete",
	call.ListTools: "tools/list", call.ListResources: "resources/list", call.ListTemplates: "resources/templates/list",
	call.ListPrompts: "prompts/list", call.Discover: "server/discover", call.Subscribe: "subscriptions/listen",
}

type correlationKey struct{}

// Correlation returns the correlation id of the call that ctx belongs to, for backends to pass on.
func Correlation(ctx context.Context) string {
	id, _ := ctx.Value(correlationKey{}).(string)
	return id
}

// correlation takes the caller's id over if it is sane, otherwise makes one.
func correlation(given string) string {
	if given != "" && len(given) <= 128 {
		sane := true
		for i := range len(given) {
			sane = sane && given[i] > ' ' && given[i] < 0x7f
		}
		if sane {
			return given
		}
	}
	return rand.Text()
}

var propagator = propagation.NewCompositeTextMapPropagator(propagation.TraceContext{}, propagation.Baggage{})

// Guard is the guard of the observe step.
func (o *Observer) Guard(next call.Handler) call.Handler {
	return func(ctx context.Context, c *call.Call) (*call.Result, error) {
		start := time.Now()
		id := correlation(c.Trace.Correlation)
		ctx = context.WithValue(ctx, correlationKey{}, id)
		if c.Trace.Parent != "" {
			ctx = propagator.Extract(ctx, propagation.MapCarrier{"traceparent": c.Trace.Parent, "tracestate": c.Trace.State, "baggage": c.Trace.Baggage})
		}
		ctx, span := o.tracer.Start(ctx, methods[c.Kind], trace.WithSpanKind(trace.SpanKindServer))
		o.active.Add(ctx, 1)
		r, err := protect(ctx, next, c)
		o.active.Add(ctx, -1)
		o.conclude(c, r, err)
		o.measure(ctx, c, time.Since(start))
		if span.IsRecording() {
			describe(span, c, err)
		}
		span.End()
		o.record(ctx, c, id, time.Since(start), err)
		return r, err
	}
}

// panicked is the private cause of an internal error that was a panic.
type panicked struct {
	value any
	stack []byte
}

// Error names the panic; the stack is in the record.
func (p *panicked) Error() string { return fmt.Sprintf("panic: %v", p.value) }

func protect(ctx context.Context, next call.Handler, c *call.Call) (r *call.Result, err error) {
	defer func() {
		if v := recover(); v != nil {
			r, err = nil, call.Errorf(call.Internal, "internal error").Because(&panicked{v, debug.Stack()})
		}
	}()
	return next(ctx, c)
}

// conclude sets the outcome.
func (o *Observer) conclude(c *call.Call, r *call.Result, err error) {
	ev := &c.Event
	var ask *call.InputRequired
	switch {
	case err == nil && r != nil && r.IsError:
		ev.Outcome, ev.Step = "tool_error", ""
	case err == nil:
		ev.Outcome, ev.Step = "ok", ""
	case errors.As(err, &ask):
		ev.Outcome, ev.Step = "input_required", ""
	default:
		ev.Code = call.AsError(err).Code
		ev.Outcome = "error"
		if ev.Step != "" && ev.Step != "backend" && ev.Step != "observe" {
			ev.Outcome = "refused"
		}
	}
}

// labelKey is what distinguishes measurements: only names that resolved, never what a stranger sent.
type labelKey struct {
	kind    call.Kind
	name    string
	outcome string
	code    call.Code
}

func (o *Observer) measure(ctx context.Context, c *call.Call, took time.Duration) {
	key := labelKey{kind: c.Kind, outcome: c.Event.Outcome, code: c.Event.Code}
	if c.Target != nil && (c.Target.Kind == call.Tool || c.Target.Kind == call.Prompt) {
		key.name = c.Target.Name
	}
	var opt metric.MeasurementOption
	if v, ok := o.labels.Load(key); ok {
		opt, _ = v.(metric.MeasurementOption)
	} else {
		attrs := []attribute.KeyValue{attribute.String("mcp.method.name", methods[c.Kind]), attribute.String("outcome", key.outcome)}
		switch {
		case key.name == "":
		case c.Kind == call.Tool:
			attrs = append(attrs, attribute.String("gen_ai.tool.name", key.name))
		case c.Kind == call.Prompt:
			attrs = append(attrs, attribute.String("gen_ai.prompt.name", key.name))
		}
		if key.code != call.OK {
			attrs = append(attrs, attribute.String("error.type", key.code.String()))
		}
		opt = metric.WithAttributeSet(attribute.NewSet(attrs...))
		o.labels.Store(key, opt)
	}
	o.duration.Record(ctx, took.Seconds(), opt)
	if n := c.Event.ResultBytes; n > 0 {
		o.bytes.Record(ctx, int64(n), opt)
		o.tokens.Add(ctx, int64(c.Event.Tokens), opt)
	}
}

// describe fills a span that somebody will read.
func describe(span trace.Span, c *call.Call, err error) {
	attrs := []attribute.KeyValue{
		attribute.String("mcp.method.name", methods[c.Kind]),
		attribute.String("mcp.protocol.version", c.Revision),
		attribute.String("newel.outcome", c.Event.Outcome),
		attribute.Int("newel.result.size", c.Event.ResultBytes),
	}
	if c.SessionID != "" {
		attrs = append(attrs, attribute.String("mcp.session.id", c.SessionID))
	}
	if c.Target != nil {
		name := c.Target.Name
		switch c.Kind {
		case call.Tool:
			attrs = append(attrs, attribute.String("gen_ai.tool.name", name))
		case call.Prompt:
			attrs = append(attrs, attribute.String("gen_ai.prompt.name", name))
		case call.Resource:
			name = c.Name
			attrs = append(attrs, attribute.String("mcp.resource.uri", name))
		}
		span.SetName(methods[c.Kind] + " " + name)
	}
	if c.Event.Step != "" {
		attrs = append(attrs, attribute.String("newel.step", c.Event.Step))
	}
	if c.Event.Outcome == "error" || c.Event.Outcome == "refused" {
		e := call.AsError(err)
		attrs = append(attrs, attribute.String("error.type", e.Code.String()))
		span.SetStatus(codes.Error, e.Message)
	} else if c.Event.Outcome == "tool_error" {
		attrs = append(attrs, attribute.String("error.type", "tool_error"))
		span.SetStatus(codes.Error, "the tool reported an error")
	}
	span.SetAttributes(attrs...)
}

// record writes the one record of a call.
func (o *Observer) record(ctx context.Context, c *call.Call, id string, took time.Duration, err error) {
	level := slog.LevelInfo
	switch {
	case c.Event.Code == call.Internal:
		level = slog.LevelError
	case c.Event.Code != call.OK:
		level = slog.LevelWarn
	}
	if !o.logger.Enabled(ctx, level) {
		return
	}
	var buf [20]slog.Attr
	a := append(buf[:0],
		slog.String("server", o.server), slog.String("door", c.Door), slog.String("correlation", id),
		slog.String("method", methods[c.Kind]), slog.String("outcome", c.Event.Outcome),
		slog.Float64("ms", float64(took.Microseconds())/1000), slog.Int("bytes_in", c.Size), slog.Int("bytes_out", c.Event.ResultBytes))
	optional := func(key, v string) {
		if v != "" {
			a = append(a, slog.String(key, v))
		}
	}
	optional("name", clip(c.Name))
	optional("revision", c.Revision)
	optional("session", c.SessionID)
	optional("client", clip(c.Client.Name))
	optional("step", c.Event.Step)
	if c.Principal != nil {
		optional("tenant", c.Principal.Tenant)
		optional("principal", c.Principal.ID)
	}
	if sc := trace.SpanContextFromContext(ctx); sc.HasTraceID() {
		optional("trace_id", sc.TraceID().String())
	}
	if c.Event.QueueTime > 0 {
		a = append(a, slog.Float64("queued_ms", float64(c.Event.QueueTime.Microseconds())/1000))
	}
	if c.Event.Code != call.OK {
		optional("code", c.Event.Code.String())
		optional("error", call.AsError(err).Error())
		var p *panicked
		if errors.As(err, &p) {
			optional("stack", string(p.stack))
		}
	}
	o.logger.LogAttrs(ctx, level, "call", a...)
}

func clip(s string) string {
	if len(s) > 200 {
		return s[:200]
	}
	return s
}
