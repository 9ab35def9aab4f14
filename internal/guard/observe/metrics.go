package observe

import (
	"context"
	"errors"
	"strconv"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"

	"newel.dev/newel/call"
)

// Buckets are the bounds of the histogram of durations, in seconds: what an objective can ask for.
var Buckets = []float64{0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300}

// metrics are the instruments. The count of the duration histogram is the number of calls by
// method, name, outcome and error.
type metrics struct {
	meter    metric.Meter
	duration metric.Float64Histogram
	queued   metric.Float64Histogram
	size     metric.Int64Histogram
	tokens   metric.Int64Counter
	progress metric.Int64Counter
	refused  metric.Int64Counter
	logins   metric.Int64Counter // that failed
	denials  metric.Int64Counter
	decided  metric.Int64Counter
	limited  metric.Int64Counter

	// active is read when metrics are collected, so that a call pays two additions for it.
	active [len(methods)]paddedCounter
}

// A paddedCounter has a cache line of its own.
type paddedCounter struct {
	n atomic.Int64
	_ [56]byte
}

// open makes the instruments.
func (m *metrics) open(meter metric.Meter) error {
	m.meter = meter
	var errs [11]error
	m.duration, errs[0] = meter.Float64Histogram("mcp.server.operation.duration", metric.WithUnit("s"),
		metric.WithDescription("Duration of one call, from the door to its result."),
		metric.WithExplicitBucketBoundaries(Buckets...))
	m.queued, errs[1] = meter.Float64Histogram("newel.queue.duration", metric.WithUnit("s"),
		metric.WithDescription("Time that calls which had to wait spent in the queue."),
		metric.WithExplicitBucketBoundaries(0.001, 0.01, 0.05, 0.1, 0.5, 1, 2, 5, 10))
	m.size, errs[2] = meter.Int64Histogram("newel.result.size", metric.WithUnit("By"),
		metric.WithDescription("Size of results."),
		metric.WithExplicitBucketBoundaries(256, 1<<10, 4<<10, 16<<10, 64<<10, 256<<10, 1<<20, 4<<20))
	m.tokens, errs[3] = meter.Int64Counter("newel.result.tokens", metric.WithDescription("Estimated tokens of results."))
	m.progress, errs[4] = meter.Int64Counter("newel.progress.notifications", metric.WithDescription("Progress notifications sent to callers."))
	m.refused, errs[5] = meter.Int64Counter("newel.door.refused", metric.WithDescription("Messages refused before they were calls."))
	m.logins, errs[7] = meter.Int64Counter("newel.auth.failures", metric.WithDescription("Messages from callers who could not say who they are."))
	m.denials, errs[8] = meter.Int64Counter("newel.policy.denials", metric.WithDescription("Calls that the policy denied or hid, by the rule that decided."))
	m.decided, errs[10] = meter.Int64Counter("newel.approvals.decisions", metric.WithDescription("Approvals that were decided, by outcome: approved, denied or expired."))
	m.limited, errs[9] = meter.Int64Counter("newel.quota.refusals", metric.WithDescription("Calls over a quota, by the quota."))
	_, errs[6] = meter.Int64ObservableUpDownCounter("newel.calls.active",
		metric.WithDescription("Calls and subscriptions that are running or waiting to run."),
		metric.WithInt64Callback(func(_ context.Context, out metric.Int64Observer) error {
			for kind := call.Tool; int(kind) < len(methods); kind++ {
				out.Observe(m.active[kind].n.Load(), metric.WithAttributes(method(kind)))
			}
			return nil
		}))
	return errors.Join(errs[:]...)
}

// Gauge publishes a number that somebody else keeps, such as the depth of a queue. read is called
// whenever metrics are collected; it must be quick and safe for concurrent use.
func (o *Observer) Gauge(name, description string, read func() int64) error {
	_, err := o.metrics.meter.Int64ObservableGauge(name, metric.WithDescription(description),
		metric.WithInt64Callback(func(_ context.Context, out metric.Int64Observer) error {
			out.Observe(read())
			return nil
		}))
	return err
}

// Counter publishes a number that somebody else counts up. read is called whenever metrics are
// collected; it must be quick and safe for concurrent use.
func (o *Observer) Counter(name, description string, read func() int64) error {
	_, err := o.metrics.meter.Int64ObservableCounter(name, metric.WithDescription(description),
		metric.WithInt64Callback(func(_ context.Context, out metric.Int64Observer) error {
			out.Observe(read())
			return nil
		}))
	return err
}

// GaugeOf is Gauge for a number each of several things has: read yields the value of label, which is
// one of few, and the number.
func (o *Observer) GaugeOf(name, description, label string, read func(yield func(of string, n int64))) error {
	_, err := o.metrics.meter.Int64ObservableGauge(name, metric.WithDescription(description), metric.WithInt64Callback(observed(label, read)))
	return err
}

// CounterOf is GaugeOf for numbers that only grow.
func (o *Observer) CounterOf(name, description, label string, read func(yield func(of string, n int64))) error {
	_, err := o.metrics.meter.Int64ObservableCounter(name, metric.WithDescription(description), metric.WithInt64Callback(observed(label, read)))
	return err
}

func observed(label string, read func(yield func(of string, n int64))) metric.Int64Callback {
	return func(_ context.Context, out metric.Int64Observer) error {
		read(func(of string, n int64) { out.Observe(n, metric.WithAttributes(attribute.String(label, of))) })
		return nil
	}
}

// Decided counts an approval that was decided.
func (o *Observer) Decided(ctx context.Context, outcome string) {
	o.metrics.decided.Add(ctx, 1, metric.WithAttributes(attribute.String("newel.outcome", outcome)))
}

// A reporter is a Sink that counts what it sent.
type reporter interface {
	// Reported returns the number of progress notifications sent so far.
	Reported() int64
}

// measure takes the measurements of one call.
func (m *metrics) measure(ctx context.Context, l *series, c *call.Call, took time.Duration) {
	if !m.duration.Enabled(ctx) {
		return
	}
	m.duration.Record(ctx, took.Seconds(), l.full...)
	if c.Event.ResultBytes > 0 {
		m.size.Record(ctx, int64(c.Event.ResultBytes), l.plain...)
		m.tokens.Add(ctx, int64(c.Event.Tokens), l.plainAdd...)
	}
	switch {
	case c.Event.Code == call.Unauthenticated:
		m.logins.Add(ctx, 1, l.plainAdd...)
	case c.Event.Rule != "" && (c.Event.Step == "authorize" || c.Event.Step == "resolve"):
		m.denials.Add(ctx, 1, metric.WithAttributes(attribute.String("newel.policy.rule", c.Event.Rule)))
	}
	if c.Event.Rule != "" && c.Event.Code == call.Exhausted {
		m.limited.Add(ctx, 1, metric.WithAttributes(attribute.String("newel.quota.rule", c.Event.Rule)))
	}
	if c.Event.QueueTime > 0 {
		m.queued.Record(ctx, c.Event.QueueTime.Seconds(), l.plain...)
	}
	if r, counts := c.Sink.(reporter); counts {
		if n := r.Reported(); n > 0 {
			m.progress.Add(ctx, n, l.plainAdd...)
		}
	}
}

func method(k call.Kind) attribute.KeyValue { return attribute.String("mcp.method.name", methods[k]) }

// targetName names what resolved, for tools and prompts. Resources have too many names.
func targetName(c *call.Call) []attribute.KeyValue {
	switch {
	case c.Target == nil:
		return nil
	case c.Target.Kind == call.Tool:
		return []attribute.KeyValue{attribute.String("gen_ai.tool.name", c.Target.Name)}
	case c.Target.Kind == call.Prompt:
		return []attribute.KeyValue{attribute.String("gen_ai.prompt.name", c.Target.Name)}
	}
	return nil
}

// failure says how a call failed, in the words of the conventions.
func (o *Observer) failure(c *call.Call) []attribute.KeyValue {
	switch {
	case c.Event.Outcome == toolError:
		return []attribute.KeyValue{attribute.String("error.type", toolError)}
	case c.Event.Code == call.OK:
		return nil
	}
	attrs := []attribute.KeyValue{attribute.String("error.type", c.Event.Code.String())}
	if n := o.rpcCode(kindOf(c), c.Event.Code); n != 0 {
		attrs = append(attrs, attribute.String("rpc.response.status_code", strconv.Itoa(n)))
	}
	return attrs
}
