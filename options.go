package newel

import (
	"log/slog"

	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/trace"

	"net/http"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/assembly"
	"newel.dev/newel/internal/backend/artifact"
	"newel.dev/newel/internal/secret"
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

	// State is what calls with effects and tasks are remembered with, on disk; modules/sqlite and
	// modules/postgres open one. Nil: in memory, and gone with the process.
	State *State

	AllowedHosts   []string // Host names beside loopback ones
	AllowedOrigins []string // browser Origins beside the server's own
	ArtifactDir    string   // where results too large to send are kept; "": in memory

	Backends []call.Backend // beside the functions that are added
}

func (o *Options) assemble(own call.Backend) *assembly.Options {
	out := &assembly.Options{
		Name: o.Name, Title: o.Title, Version: o.Version, Instructions: o.Instructions,
		Backends: append([]call.Backend{own}, o.Backends...),
		Limits:   o.Limits, Resilience: o.Resilience, Tasks: o.Tasks,
		Logger: o.Logger, Tracer: o.Tracer, Meter: o.Meter, Metrics: o.Metrics,
		StateKey: o.StateKey, AllowedHosts: o.AllowedHosts, AllowedOrigins: o.AllowedOrigins, Artifacts: artifact.Options{Dir: o.ArtifactDir},
	}
	if o.State != nil {
		out.State, out.Key = o.State.store, o.State.key
	}
	return out
}

// A State remembers calls with effects, their audit log, approvals and tasks, on disk. It is for one
// Server. It is closed after what runs the server (Serve, ServeStdio, Run) has returned.
type State struct {
	store assembly.Engine
	key   secret.Key
}

// NewState is for the packages below modules: they open engines.
func NewState(store assembly.Engine, key secret.Key) *State { return &State{store, key} }

// Close lets go of the file or of the connections.
func (s *State) Close() error { return s.store.Close() }
