package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	otelprometheus "go.opentelemetry.io/otel/exporters/prometheus"
	"go.opentelemetry.io/otel/metric"
	metricnoop "go.opentelemetry.io/otel/metric/noop"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
	tracenoop "go.opentelemetry.io/otel/trace/noop"

	"newel.dev/newel/internal/config"
)

// telemetry is where logs, traces and metrics go.
type telemetry struct {
	logger  *slog.Logger
	level   *slog.LevelVar
	tracer  trace.TracerProvider
	meter   metric.MeterProvider
	metrics http.Handler // nil: not served
	stops   []func(context.Context) error
}

// flushTimeout bounds how long the end waits for a collector that does not answer.
const flushTimeout = 10 * time.Second

// stop flushes what is on its way.
func (t *telemetry) stop(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, flushTimeout)
	defer cancel()
	var errs []error
	for _, stop := range t.stops {
		errs = append(errs, stop(ctx))
	}
	return errors.Join(errs...)
}

func startTelemetry(ctx context.Context, c *config.Config, logs io.Writer) (*telemetry, error) {
	level := &slog.LevelVar{}
	level.Set(levels[c.Telemetry.LogLevel])
	t := &telemetry{
		logger: slog.New(slog.NewJSONHandler(logs, &slog.HandlerOptions{Level: level})),
		level:  level,
		tracer: tracenoop.NewTracerProvider(),
		meter:  metricnoop.NewMeterProvider(),
	}
	about := resource.NewSchemaless(attribute.String("service.name", c.Server.Name), attribute.String("service.version", c.Server.Version))
	if c.Telemetry.OTLPEndpoint != "" {
		exporter, err := otlptracehttp.New(ctx, otlptracehttp.WithEndpointURL(c.Telemetry.OTLPEndpoint))
		if err != nil {
			return nil, fmt.Errorf("telemetry.otlp_endpoint: %w", err)
		}
		p := sdktrace.NewTracerProvider(sdktrace.WithBatcher(exporter), sdktrace.WithResource(about))
		t.tracer, t.stops = p, append(t.stops, p.Shutdown)
	}
	if c.Telemetry.Prometheus {
		registry := prometheus.NewRegistry()
		registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
		exporter, err := otelprometheus.New(otelprometheus.WithRegisterer(registry))
		if err != nil {
			return nil, fmt.Errorf("telemetry.prometheus: %w", err)
		}
		p := sdkmetric.NewMeterProvider(sdkmetric.WithReader(exporter), sdkmetric.WithResource(about))
		t.meter, t.stops = p, append(t.stops, p.Shutdown)
		t.metrics = promhttp.HandlerFor(registry, promhttp.HandlerOpts{})
	}
	return t, nil
}
