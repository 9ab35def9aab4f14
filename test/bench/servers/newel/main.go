// Command newel is Newel through its public library with every guard on: one JSON record per
// call to the null device, and metrics that Prometheus could read.
package main

import (
	"context"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"strings"

	"github.com/go-json-experiment/json/jsontext"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	otelprom "go.opentelemetry.io/otel/exporters/prometheus"
	"go.opentelemetry.io/otel/sdk/metric"

	"newel.dev/newel"
	"newel.dev/newel/call"
	"newel.dev/newel/internal/assembly"
)

type input struct {
	Text string `json:"text" doc:"what to say"`
}

func main() {
	addr := flag.String("addr", "127.0.0.1:8080", "address to serve on")
	tools := flag.Int("tools", 0, "number of further tools, for lists")
	large := flag.Int("large", 0, "bytes of text the tool large returns; 0 means no such tool")
	allocs := flag.Bool("allocs", false, "print what one call allocates, and end")
	flag.Parse()
	if err := run(*addr, *tools, *large, *allocs); err != nil {
		fmt.Fprintln(os.Stderr, "newel:", err)
		os.Exit(1)
	}
}

func run(addr string, tools, large int, allocs bool) error {
	records, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer records.Close()
	registry := prometheus.NewRegistry()
	exporter, err := otelprom.New(otelprom.WithRegisterer(registry))
	if err != nil {
		return err
	}
	s := newel.New(&newel.Options{
		Name: "bench", Version: "1.0.0",
		Logger:  slog.New(slog.NewJSONHandler(records, nil)),
		Meter:   metric.NewMeterProvider(metric.WithReader(exporter)),
		Metrics: promhttp.HandlerFor(registry, promhttp.HandlerOpts{}),
		// Room for the cases with more than the defaults allow one client; what is there costs nothing.
		Limits: newel.Limits{ResultBytes: 4 << 20, ResultTokens: 4 << 20, Streams: 12_000, StreamsPerPeer: 12_000, Sessions: 12_000, SessionsPerPeer: 12_000, Connections: assembly.Connections{PerPeer: 12_000}},
	})
	newel.AddTool(s, newel.Tool{Name: "echo", Description: "Says what it was told.", Effect: call.Read},
		func(_ context.Context, _ *newel.Request, in input) (string, error) { return in.Text, nil })
	for i := range tools {
		newel.AddRawTool(s, newel.Tool{
			Name: fmt.Sprintf("tool_%04d", i), Description: "Looks up orders of one customer within a range of days.", Effect: call.Read,
			InputSchema: jsontext.Value(`{"type":"object","properties":{"customer":{"type":"string","description":"Identifier of the customer."},` +
				`"from":{"type":"string","format":"date","description":"First day."},"limit":{"type":"integer","minimum":1,"maximum":100,"default":20}},` +
				`"required":["customer"],"additionalProperties":false}`),
		}, func(context.Context, *newel.Request) (*call.Result, error) { return call.Text("none"), nil })
	}
	if large > 0 {
		const line = "The order was \"shipped\" on the third day; nothing else is known about it.\n"
		result := call.Text(strings.Repeat(line, large/len(line)+1)[:large])
		newel.AddRawTool(s, newel.Tool{Name: "large", Description: "Says a lot.", Effect: call.Read},
			func(context.Context, *newel.Request) (*call.Result, error) { return result, nil })
	}
	if allocs {
		return printAllocs(s)
	}
	return s.Serve(context.Background(), addr)
}
