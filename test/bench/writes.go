package main

import (
	"context"
	"fmt"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
)

// writes are calls with a key, with the full guarantee, against what the engine itself can do: rows of
// the size that a call leaves behind, in grouped commits. Both have 64 writers.
type writes struct {
	engine       string
	calls, bare  float64 // a second
	low, highest float64 // of the ratio, over the rounds
	ratio        float64
}

// engines are the stores that keep what is written.
var engines = []string{"sqlite", "postgres"}

// rate is a line of a Go benchmark that reports calls a second.
var rate = regexp.MustCompile(`^Benchmark(KeyedWrites|GroupCommit)\S*\s.*\s([0-9.e+]+) calls/s`)

// durable measures writes. The benchmarks stand with the engines; they start a real PostgreSQL.
func (b *bench) durable(ctx context.Context) ([]writes, error) {
	times := "1s"
	if b.plan.rounds < 3 {
		times = "100ms"
	}
	var all []writes
	for _, engine := range engines {
		b.bar.say("writes: " + engine)
		test := filepath.Join(b.temp, engine+".test")
		build := exec.CommandContext(ctx, "go", "test", "-c", "-o", test, "newel.dev/newel/internal/store/"+engine)
		build.Dir = filepath.Join("..", "..") // they are another module's
		if out, err := build.CombinedOutput(); err != nil {
			return nil, fmt.Errorf("building the benchmark of %s: %w\n%s", engine, err, out)
		}
		w := writes{engine: engine}
		var calls, bare, ratios []float64
		for range b.plan.rounds {
			// One after the other in each round: what else the machine does changes with time.
			run := exec.CommandContext(ctx, test, "-test.run", "^$", "-test.bench", "KeyedWrites|GroupCommit", "-test.benchtime", times)
			run.Env = append(run.Environ(), "GOMAXPROCS=2")
			out, err := run.CombinedOutput()
			if err != nil {
				return nil, fmt.Errorf("%s: %w\n%s", engine, err, out)
			}
			got := map[string]float64{}
			for line := range strings.Lines(string(out)) {
				if m := rate.FindStringSubmatch(line); m != nil {
					if got[m[1]], err = strconv.ParseFloat(m[2], 64); err != nil {
						return nil, err
					}
				}
			}
			if len(got) != 2 || got["GroupCommit"] == 0 {
				return nil, fmt.Errorf("%s: the benchmark says something else\n%s", engine, out)
			}
			calls, bare = append(calls, got["KeyedWrites"]), append(bare, got["GroupCommit"])
			ratios = append(ratios, got["KeyedWrites"]/got["GroupCommit"])
		}
		w.calls, _, _ = spread(calls)
		w.bare, _, _ = spread(bare)
		w.ratio, w.low, w.highest = spread(ratios)
		all = append(all, w)
	}
	return all, nil
}

func writeRates(w *tabwriter.Writer, all []writes) {
	fmt.Fprintf(w, "\ncalls with a key, full guarantee, 64 writers\nengine\tcalls/s\town grouped commits/s\tratio\n")
	for _, one := range all {
		fmt.Fprintf(w, "%s\t%.0f\t%.0f\t%.2f (%.2f to %.2f)\n", one.engine, one.calls, one.bare, one.ratio, one.low, one.highest)
	}
}

// rateOf returns the ratio of an engine.
func rateOf(all []writes, engine string) float64 {
	return all[slices.IndexFunc(all, func(w writes) bool { return w.engine == engine })].ratio
}

// costOf returns what a guard costs, in nanoseconds, of a table of costs.
func costOf(costs, guard string) (float64, error) {
	for line := range strings.Lines(costs) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == guard {
			return strconv.ParseFloat(f[1], 64)
		}
	}
	return 0, fmt.Errorf("there is no guard %q in the costs", guard)
}
