package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"text/tabwriter"

	"golang.org/x/sys/unix"
)

// writes are calls with a key, with the full guarantee; the same calls without it; and what the engine
// itself can do: rows of the size that a call leaves behind, many in one commit, and, of an engine that
// syncs commits together, each in its own. All have 64 writers.
type writes struct {
	engine              string
	call, plain, row    work
	ratio, low, highest float64 // of calls and rows, over the rounds
	packed              float64 // the ratio, where commits of rows wait for more rows, as those of calls do
	own                 work    // rows that each writer commits by itself; nothing where one writes at a time
	overOwn             float64 // the ratio of calls and those
}

// work is how many a second, and the CPU time of one.
type work struct{ rate, cpu float64 } // cpu in microseconds

// engines are the stores that keep what is written.
var engines = []string{"sqlite", "postgres"}

// metric is one figure of a line of a Go benchmark.
var metric = regexp.MustCompile(`\s([0-9.e+]+) (\S+)`)

// durable measures writes. The benchmarks stand with the engines; they start a real PostgreSQL. In
// each of them calls and rows take turns.
func (b *bench) durable(ctx context.Context) ([]writes, error) {
	turns := "30x"
	if b.plan.rounds < 3 {
		turns = "3x"
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
		found := map[string][]float64{}
		for range b.plan.rounds {
			run := exec.CommandContext(ctx, test, "-test.run", "^$", "-test.bench", "^BenchmarkWrites$", "-test.benchtime", turns)
			run.Env = append(run.Environ(), "GOMAXPROCS=2")
			out, err := onBoth(run)
			if err != nil {
				return nil, fmt.Errorf("%s: %w\n%s", engine, err, out)
			}
			for _, m := range metric.FindAllStringSubmatch(string(out), -1) {
				v, err := strconv.ParseFloat(m[1], 64)
				if err != nil {
					return nil, err
				}
				found[m[2]] = append(found[m[2]], v)
			}
			if len(found["call-over-row"]) == 0 {
				return nil, fmt.Errorf("%s: the benchmark says something else\n%s", engine, out)
			}
		}
		of := func(name string) work {
			rate, _, _ := spread(found[name+"s/s"])
			cpu, _, _ := spread(found["cpu-µs/"+name])
			return work{rate, cpu}
		}
		w := writes{engine: engine, call: of("call"), plain: of("plain"), row: of("row")}
		w.ratio, w.low, w.highest = spread(found["call-over-row"])
		w.packed, _, _ = spread(found["call-over-packed"])
		if len(found["call-over-own"]) > 0 {
			w.own = of("own")
			w.overOwn, _, _ = spread(found["call-over-own"])
		}
		all = append(all, w)
	}
	return all, nil
}

// onBoth runs cmd, and what it starts, on the CPUs of server and load, and returns its output: an
// engine and who calls it are no server and load.
func onBoth(cmd *exec.Cmd) ([]byte, error) {
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	start := func() error {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		var set unix.CPUSet
		set.Set(serverCPU)
		set.Set(loadCPU)
		if err := unix.SchedSetaffinity(0, &set); err != nil {
			return err
		}
		err := cmd.Start() // a child has the affinity of the thread that starts it
		return errors.Join(err, setAffinity(loadCPU))
	}
	if err := start(); err != nil {
		return nil, err
	}
	err := cmd.Wait()
	return out.Bytes(), err
}

func writeRates(w *tabwriter.Writer, all []writes) {
	fmt.Fprintf(w, "\ncalls with a key, 64 writers; CPU is that of the process, PostgreSQL's own is not in it\n")
	fmt.Fprintln(w, "engine\twhat\ta second\tCPU µs each\tfull guarantee over it")
	for _, one := range all {
		fmt.Fprintf(w, "%s\tfull guarantee\t%.0f\t%.1f\t\n", one.engine, one.call.rate, one.call.cpu)
		fmt.Fprintf(w, "\twithout it\t%.0f\t%.1f\t%.3f\n", one.plain.rate, one.plain.cpu, one.call.rate/one.plain.rate)
		fmt.Fprintf(w, "\trows, many in one commit\t%.0f\t%.1f\t%.2f (%.2f to %.2f); %.2f where they wait for more rows\n",
			one.row.rate, one.row.cpu, one.ratio, one.low, one.highest, one.packed)
		if one.own.rate > 0 {
			fmt.Fprintf(w, "\trows, synced together by the engine\t%.0f\t%.1f\t%.2f\n", one.own.rate, one.own.cpu, one.overOwn)
		}
	}
}

// overEngine is the rate of calls over that of the engine's own group commit: of PostgreSQL, which has
// one, rows of 64 connections that each commit by themselves and are synced together; of SQLite, which
// has none, rows of 64 writers that we put into one commit.
func (w writes) overEngine() float64 {
	if w.own.rate > 0 {
		return w.overOwn
	}
	return w.ratio
}

func byEngine(all []writes, figure func(writes) float64) map[string]float64 {
	m := map[string]float64{}
	for _, w := range all {
		m[w.engine] = round(figure(w))
	}
	return m
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
