package newel

import (
	"log/slog"

	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/trace"

	"net/http"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/assembly"
	"newel.dev/newel/internal/backend/artifact"
)

// Limits bound what one server does at once; see the fields for units and defaults.
type Limits = assembly.Limits

// Tasks bound tasks, and say which tools may be some; see the fields for units and defaults.
type Tasks = assembly.Tasks

// Resilience bounds what backends get and how they may fail; see the fields for units and defaults.
type Resilience = assembly.Resilience

// Options configure a Server. The zero value works.
type Options struct {
	Name         string // of the server; default "newel"
	Title        string // for people
	Version      string // of what is served; default "0.0.0"
	Instructions string // for models: how to use the server

	Limits     Limits
	Resilience Resilience
	Tasks      Tasks

	Logger  *slog.Logger         // one record per call; nil discards
	Tracer  trace.TracerProvider // nil: no spans
	Meter   metric.MeterProvider // nil: no metrics
	Metrics http.Handler         // serves /metrics; nil: 404

	// StateKey is 32 random bytes that seal the state of calls that ask their caller something.
	// Servers behind one load balancer share it. Nil: random, such calls end with the process.
	StateKey []byte

	AllowedHosts   []string // Host names beside loopback ones
	AllowedOrigins []string // browser Origins beside the server's own
	ArtifactDir    string   // where results too large to send are kept; "": in memory

	Backends []call.Backend // beside the functions that are added
}

func (o *Options) assemble(own call.Backend) *assembly.Options {
	return &assembly.Options{
		Name: o.Name, Title: o.Title, Version: o.Version, Instructions: o.Instructions,
		Backends: append([]call.Backend{own}, o.Backends...),
		Limits:   o.Limits, Resilience: o.Resilience, Tasks: o.Tasks,
		Logger: o.Logger, Tracer: o.Tracer, Meter: o.Meter, Metrics: o.Metrics,
		StateKey: o.StateKey, AllowedHosts: o.AllowedHosts, AllowedOrigins: o.AllowedOrigins, Artifacts: artifact.Options{Dir: o.ArtifactDir},
	}
}
