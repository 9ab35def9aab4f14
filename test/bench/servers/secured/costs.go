package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"testing"
	"text/tabwriter"

	"github.com/go-json-experiment/json/jsontext"
	"github.com/prometheus/client_golang/prometheus"
	otelprom "go.opentelemetry.io/otel/exporters/prometheus"
	"go.opentelemetry.io/otel/sdk/metric"
	tracenoop "go.opentelemetry.io/otel/trace/noop"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/assembly"
	"newel.dev/newel/internal/catalog"
	"newel.dev/newel/internal/guard"
	"newel.dev/newel/internal/guard/admit"
	"newel.dev/newel/internal/guard/authenticate"
	"newel.dev/newel/internal/guard/authorize"
	"newel.dev/newel/internal/guard/bound"
	"newel.dev/newel/internal/guard/effect"
	"newel.dev/newel/internal/guard/observe"
	"newel.dev/newel/internal/guard/resilience"
	"newel.dev/newel/internal/guard/resolve"
	"newel.dev/newel/internal/guard/validate"
	"newel.dev/newel/internal/mcpwire"
	"newel.dev/newel/internal/policy"
	"newel.dev/newel/internal/secret"
	"newel.dev/newel/internal/store/inmem"
	"newel.dev/newel/internal/task"
)

// printCosts prints a line for each step of the path: what it costs alone, on a call as the steps
// before it leave it, with nothing behind it.
func printCosts(who *assembly.Identities, rules *policy.Policy, token string) error {
	set, err := guards(who, rules)
	if err != nil {
		return err
	}
	ctx := context.Background()
	done := &call.Result{Content: jsontext.Value(`[{"type":"text","text":"hello"}]`)}
	end := func(context.Context, *call.Call) (*call.Result, error) { return done, nil }
	at := call.Call{
		Kind: call.Tool, Name: "echo", Door: "http", Args: jsontext.Value(`{"text":"The quick brown fox jumps over the lazy dog."}`),
		Credential: call.Credential{Peer: "127.0.0.1:1", Bearer: token}, Sink: call.Discard, Asker: call.NoAsker,
	}
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "guard\tns\tbytes\tallocations")
	var ns, bytes, allocs int64
	for _, step := range guard.Path(set) {
		if step.Guard == nil {
			continue // an optional step that is not there costs nothing
		}
		one := step.Guard(end)
		var failed error
		r := testing.Benchmark(func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				c := at
				if _, err := one(ctx, &c); err != nil {
					failed = err
				}
			}
		})
		if failed != nil {
			return fmt.Errorf("%s: %w", step.Name, failed)
		}
		fmt.Fprintf(w, "%s\t%d\t%d\t%d\n", step.Name, r.NsPerOp(), r.AllocedBytesPerOp(), r.AllocsPerOp())
		ns, bytes, allocs = ns+r.NsPerOp(), bytes+r.AllocedBytesPerOp(), allocs+r.AllocsPerOp()
		// The next step sees what this one leaves.
		if _, err := step.Guard(func(_ context.Context, c *call.Call) (*call.Result, error) { at = *c; return done, nil })(ctx, &at); err != nil {
			return fmt.Errorf("%s: %w", step.Name, err)
		}
	}
	fmt.Fprintf(w, "all\t%d\t%d\t%d\n", ns, bytes, allocs)
	return w.Flush()
}

// guards are those of a house that serves one server.
func guards(who *assembly.Identities, rules *policy.Policy) (guard.Set, error) {
	caps, err := echo{}.Capabilities(context.Background())
	if err != nil {
		return guard.Set{}, err
	}
	snapshot, err := catalog.Build([]catalog.Source{{Backend: "bench", Capabilities: caps}})
	if err != nil {
		return guard.Set{}, err
	}
	exporter, err := otelprom.New(otelprom.WithRegisterer(prometheus.NewRegistry()))
	if err != nil {
		return guard.Set{}, err
	}
	records, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		return guard.Set{}, err
	}
	observer, err := observe.New(observe.Options{
		Logger: slog.New(slog.NewJSONHandler(records, nil)), Tracer: tracenoop.NewTracerProvider(),
		Meter: metric.NewMeterProvider(metric.WithReader(exporter)), Server: "bench", RPCCode: mcpwire.RPCCode,
	})
	if err != nil {
		return guard.Set{}, err
	}
	admission, err := admit.New(admit.Options{})
	if err != nil {
		return guard.Set{}, err
	}
	bounds, err := bound.New(bound.Options{CheckOutput: catalog.CheckOutput})
	if err != nil {
		return guard.Set{}, err
	}
	current := catalog.New(snapshot)
	access := authorize.New(authorize.Options{Policy: rules, Catalog: current})
	store := inmem.New()
	effects, err := effect.New(effect.Options{Store: store, Key: secret.RandomKey()})
	if err != nil {
		return guard.Set{}, err
	}
	backends, err := resilience.New(resilience.Options{Backends: []resilience.Backend{{Name: "bench"}}}, nil)
	if err != nil {
		return guard.Set{}, err
	}
	tasks, err := task.New(task.Options{Store: store, Key: secret.RandomKey(), Path: func(string) call.Handler { return nil }}) // nothing is worked on
	if err != nil {
		return guard.Set{}, err
	}
	return guard.Set{
		Observe: observer.Guard, Authenticate: authenticate.New(who), Admit: admission.Guard,
		Resolve: resolve.New(current, access.See, nil), Validate: validate.Guard, Authorize: access.Guard,
		Task: tasks.Guard("/mcp", effects.Check), Effect: effects.Guard("/mcp", nil), Bound: bounds.Guard, Resilience: backends.Guard,
	}, nil
}
