package observe_test

import (
	"context"
	"io"
	"log/slog"
	"testing"

	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	tracenoop "go.opentelemetry.io/otel/trace/noop"

	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/guard/observe"
)

// BenchmarkGuard is what a successful call pays with metrics and records on and spans off, the
// default of the daemon.
func BenchmarkGuard(b *testing.B) {
	meter := sdkmetric.NewMeterProvider(sdkmetric.WithReader(sdkmetric.NewManualReader()))
	ob, err := observe.New(observe.Options{Server: "bench", Logger: slog.New(slog.NewJSONHandler(io.Discard, nil)), Tracer: tracenoop.NewTracerProvider(), Meter: meter})
	if err != nil {
		b.Fatal(err)
	}
	target := &call.Capability{Kind: call.Tool, Name: "get_order"}
	result := call.Text("ok")
	h := ob.Guard(func(_ context.Context, c *call.Call) (*call.Result, error) {
		c.Target = target
		c.Event.ResultBytes, c.Event.Tokens = 120, 30
		return result, nil
	})
	ctx := b.Context()
	b.ReportAllocs()
	for b.Loop() {
		c := call.Call{Kind: call.Tool, Name: "get_order", Args: jsontext.Value(`{"order_id":"A-100234","limit":10}`), Door: "http", Revision: "2026-07-28",
			Client: call.Client{Name: "bench", Version: "1"}, Sink: call.Discard, Asker: call.NoAsker, Size: 300}
		if _, err := h(ctx, &c); err != nil {
			b.Fatal(err)
		}
	}
}
