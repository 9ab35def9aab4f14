package observe

import (
	"context"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"

	"newel.dev/newel/call"
)

// maxBaggage bounds tracestate and baggage, each, in bytes; longer ones are not taken over. It is
// what the W3C recommendation has everybody carry.
const maxBaggage = 8192

// carrier hands what the caller sent to the propagators of OpenTelemetry.
type carrier call.Trace

// Get implements propagation.TextMapCarrier.
func (t *carrier) Get(key string) string {
	switch key {
	case "traceparent":
		return t.Parent
	case "tracestate":
		if len(t.State) <= maxBaggage {
			return t.State
		}
	case "baggage":
		if len(t.Baggage) <= maxBaggage {
			return t.Baggage
		}
	}
	return ""
}

// Set implements propagation.TextMapCarrier; nothing is written into a call.
func (t *carrier) Set(string, string) {}

// Keys implements propagation.TextMapCarrier.
func (t *carrier) Keys() []string { return []string{"traceparent", "tracestate", "baggage"} }

// startSpan makes the caller's span the parent of everything that happens here. The span is nil
// if nobody makes spans; what the caller sent still reaches backends through the context.
func (o *Observer) startSpan(ctx context.Context, c *call.Call) (context.Context, trace.Span) {
	var ambient trace.SpanContext // of the transport, when the program traces its HTTP server
	if c.Trace.Parent != "" {
		ambient = trace.SpanContextFromContext(ctx)
		ctx = propagation.TraceContext{}.Extract(ctx, (*carrier)(&c.Trace))
	}
	if c.Trace.Baggage != "" {
		ctx = propagation.Baggage{}.Extract(ctx, (*carrier)(&c.Trace))
	}
	if o.tracer == nil {
		return ctx, nil
	}
	kind := kindOf(c)
	options := [3]trace.SpanStartOption{trace.WithSpanKind(trace.SpanKindServer), trace.WithAttributes(method(kind))}
	n := 2
	if ambient.IsValid() && !ambient.Equal(trace.SpanContextFromContext(ctx)) {
		options[2] = trace.WithLinks(trace.Link{SpanContext: ambient})
		n = 3
	}
	return o.tracer.Start(ctx, methods[kind], options[:n]...)
}

// endSpan fills and ends a span; it fills only one that somebody will read.
func (o *Observer) endSpan(span trace.Span, c *call.Call, err error) {
	if span == nil {
		return
	}
	defer span.End()
	if !span.IsRecording() {
		return
	}
	attrs := append(make([]attribute.KeyValue, 0, 16), targetName(c)...)
	optional := func(key, v string) {
		if v != "" {
			attrs = append(attrs, attribute.String(key, v))
		}
	}
	if c.Target != nil {
		switch c.Target.Kind {
		case call.Tool:
			attrs = append(attrs, attribute.String("gen_ai.operation.name", "execute_tool"))
			fallthrough
		case call.Prompt:
			span.SetName(methods[kindOf(c)] + " " + c.Target.Name)
		default: // too many names for a span's
			optional("mcp.resource.uri", c.Target.URI)
			optional("newel.resource.template", c.Target.Template)
		}
	}
	optional("mcp.protocol.version", c.Revision)
	optional("mcp.session.id", c.SessionID)
	switch c.Door {
	case "http":
		attrs = append(attrs, attribute.String("network.transport", "tcp"), attribute.String("network.protocol.name", "http"))
	case "stdio":
		attrs = append(attrs, attribute.String("network.transport", "pipe"))
	}
	optional("newel.correlation", c.Event.Correlation)
	optional("newel.outcome", c.Event.Outcome)
	optional("newel.step", c.Event.Step)
	attrs = append(attrs, attribute.Int("newel.result.size", c.Event.ResultBytes))
	if c.Event.Attempts > 0 {
		attrs = append(attrs, attribute.Int("newel.attempts", c.Event.Attempts))
	}
	if how := o.failure(c); how != nil {
		attrs = append(attrs, how...)
		span.SetStatus(codes.Error, status(c, err))
	}
	span.SetAttributes(attrs...)
}

// status describes a failure without the caller's own values.
func status(c *call.Call, err error) string {
	if c.Event.Outcome == toolError {
		return "the tool reported an error"
	}
	if quotes(c.Event.Code) {
		return c.Event.Code.String()
	}
	return clip(call.AsError(err).Message, 256)
}
