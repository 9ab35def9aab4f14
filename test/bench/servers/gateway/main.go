// Command gateway is Newel in front of MCP servers with every guard on: one JSON record per call
// to the null device, and metrics that Prometheus could read.
package main

import (
	"context"
	"flag"
	"fmt"
	"log/slog"
	"os"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	otelprom "go.opentelemetry.io/otel/exporters/prometheus"
	"go.opentelemetry.io/otel/sdk/metric"

	"newel.dev/newel"
	"newel.dev/newel/call"
	"newel.dev/newel/internal/backend/mcpupstream"
	"newel.dev/newel/internal/module"
)

func main() {
	addr := flag.String("addr", "127.0.0.1:8080", "address to serve on")
	upstream := flag.String("upstream", "", "URL of the server behind")
	times := flag.Int("times", 1, "how often it stands behind, each with a prefix of its own")
	flag.Parse()
	if err := run(*addr, *upstream, *times); err != nil {
		fmt.Fprintln(os.Stderr, "gateway:", err)
		os.Exit(1)
	}
}

func run(addr, upstream string, times int) error {
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
	logger := slog.New(slog.NewJSONHandler(records, nil))
	var backends []call.Backend
	for i := range times {
		c := mcpupstream.Config{URL: upstream}
		if times > 1 {
			c.Prefix = fmt.Sprintf("s%02d_", i)
		}
		u, err := mcpupstream.New(fmt.Sprintf("upstream%02d", i), c, module.Env{Logger: logger})
		if err != nil {
			return err
		}
		backends = append(backends, u)
	}
	return newel.New(&newel.Options{
		Name: "bench", Version: "1.0.0", Backends: backends, Logger: logger,
		Limits:  newel.Limits{SessionsPerPeer: 12_000}, // all are of one address
		Meter:   metric.NewMeterProvider(metric.WithReader(exporter)),
		Metrics: promhttp.HandlerFor(registry, promhttp.HandlerOpts{}),
	}).Serve(context.Background(), addr)
}
