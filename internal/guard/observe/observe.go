// Package observe is the outermost step of the path: one log record, one span and a few
// measurements for every call, whatever becomes of it.
//
// Start reading at [Observer.Guard]. record.go writes the log, span.go the span, metrics.go the
// measurements; series.go is what those of one target have in common; correlation.go ties them to the
// caller's and the backends' own.
//
// Refuses: nothing. Needs: a logger, a tracer and a meter; each may be a no-op. Fails: never; a
// panic further down becomes an internal error, its stack goes to the log alone. Records: the
// call's Event. Costs: about two microseconds with metrics and records and without a span.
//
// What a caller makes up is not recorded: of arguments only names, types and sizes, of a
// templated resource only the template, of an error that answers the caller's own values only
// its code. Metric labels come from what is registered, never from what was sent.
//
// Names follow the OpenTelemetry semantic conventions for MCP. Two choices of ours: error.type is
// the name of the code of Newel (a closed set that says more than the number of JSON-RPC, which
// stands in rpc.response.status_code), and the histogram has finer buckets below 10 ms.
package observe

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"time"

	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/trace"
	tracenoop "go.opentelemetry.io/otel/trace/noop"

	"newel.dev/newel/call"
)

// Options configure an Observer. Logger, Tracer and Meter are required; no-ops will do.
type Options struct {
	Server string // name of the server in records
	Logger *slog.Logger
	Tracer trace.TracerProvider
	Meter  metric.MeterProvider

	// RPCCode is the JSON-RPC error code that a call of kind k that failed with c answers with,
	// or 0 if it answers with a result. It must be a pure function. Nil leaves the code out.
	RPCCode func(k call.Kind, c call.Code) int
}

// An Observer records calls. It is safe for concurrent use.
type Observer struct {
	log     slog.Handler
	tracer  trace.Tracer // nil: nobody makes spans
	rpcCode func(call.Kind, call.Code) int
	ids     ids
	metrics metrics
	series  allSeries
}

const scope = "newel.dev/newel"

// New returns an observer; it fails if an instrument cannot be made.
func New(o Options) (*Observer, error) {
	if o.Logger == nil || o.Tracer == nil || o.Meter == nil {
		return nil, errors.New("observe: Logger, Tracer and Meter are required; no-ops will do")
	}
	if o.RPCCode == nil {
		o.RPCCode = func(call.Kind, call.Code) int { return 0 }
	}
	ob := &Observer{
		log:     o.Logger.Handler().WithAttrs([]slog.Attr{slog.String("server", o.Server)}),
		rpcCode: o.RPCCode,
		ids:     newIDs(),
	}
	if _, none := o.Tracer.(tracenoop.TracerProvider); !none {
		ob.tracer = o.Tracer.Tracer(scope)
	}
	return ob, ob.metrics.open(o.Meter.Meter(scope))
}

// methods are the names of the protocol, which the conventions ask for.
var methods = [...]string{
	"invalid",
	call.Tool: "tools/call", call.Resource: "resources/read", call.Prompt: "prompts/get", call.Complete: "completion/complete",
	call.ListTools: "tools/list", call.ListResources: "resources/list", call.ListTemplates: "resources/templates/list",
	call.ListPrompts: "prompts/list", call.Discover: "server/discover", call.Subscribe: "subscriptions/listen",
	call.GetTask: "tasks/get", call.UpdateTask: "tasks/update", call.CancelTask: "tasks/cancel", call.TaskResult: "tasks/result", call.ListTasks: "tasks/list",
}

// kindOf keeps an invalid kind out of tables.
func kindOf(c *call.Call) call.Kind {
	if int(c.Kind) >= len(methods) {
		return 0
	}
	return c.Kind
}

// Guard is the guard of the observe step. Every error that leaves it is a [*call.Error] or a
// [*call.InputRequired].
func (o *Observer) Guard(next call.Handler) call.Handler {
	return func(ctx context.Context, c *call.Call) (*call.Result, error) {
		start := time.Now()
		c.Event.Correlation = o.ids.correlation(c.Trace.Correlation)
		ctx = withCorrelation(ctx, &c.Event.Correlation)
		ctx, span := o.startSpan(ctx, c)
		r, err := o.run(ctx, next, c)
		public := conclude(c, r, err)
		took := time.Since(start)
		l := o.series.of(o, c)
		o.metrics.measure(ctx, l, c, took)
		o.endSpan(span, c, public)
		o.record(ctx, l, c, start, took, err)
		return r, public
	}
}

// run runs the rest of the path, counted as active. A panic becomes an internal error.
func (o *Observer) run(ctx context.Context, next call.Handler, c *call.Call) (r *call.Result, err error) {
	active := &o.metrics.active[kindOf(c)].n
	active.Add(1)
	defer func() {
		active.Add(-1)
		if v := recover(); v != nil {
			r, err = nil, call.Errorf(call.Internal, "internal error").Because(&panicked{v, debug.Stack()})
		}
	}()
	return next(ctx, c)
}

// panicked is the private cause of an internal error that was a panic.
type panicked struct {
	value any
	stack []byte
}

// Error names the panic; the stack is in the record.
func (p *panicked) Error() string { return fmt.Sprintf("panic: %v", p.value) }

// Outcomes of a call, as call.Event describes them.
const (
	ok            = "ok"
	toolError     = "tool_error"
	inputRequired = "input_required"
	refused       = "refused"
	failed        = "error"
)

// conclude sets the outcome and returns the error that leaves the house.
func conclude(c *call.Call, r *call.Result, err error) error {
	ev := &c.Event
	ev.Code = call.OK
	if err == nil {
		ev.Outcome, ev.Step = ok, ""
		if r != nil && r.IsError {
			ev.Outcome = toolError
		}
		return nil
	}
	var ask *call.InputRequired
	if errors.As(err, &ask) {
		ev.Outcome, ev.Step = inputRequired, ""
		return ask
	}
	e := call.AsError(err)
	ev.Code = e.Code
	ev.Outcome = failed
	if ev.Step != "" && ev.Step != "backend" && e.Code != call.Internal {
		ev.Outcome = refused // by a step of the path, on purpose
	}
	return e
}
