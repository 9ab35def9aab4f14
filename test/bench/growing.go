package main

import (
	"fmt"
	"io"
	"text/tabwriter"
	"time"
)

// growing is what the last line says of the sweeps.
type growing struct {
	Rising      float64 `json:"path_cpu_over_floor_512_connections"`
	RisingP99   float64 `json:"p99_512_connections_ms"`
	Arguments   float64 `json:"arguments_100kb_cpu_over_floor"`
	Result      float64 `json:"result_1mb_cpu_over_floor"`
	Tools       float64 `json:"call_10000_tools_over_10"`
	Page        float64 `json:"first_page_10000_tools_over_1000"`
	Steady      float64 `json:"p99_at_30_percent_ms"`
	SteadyFloor float64 `json:"floor_p99_at_30_percent_ms"`
	Stream      float64 `json:"idle_stream_kib"`
	StreamHeld  float64 `json:"idle_stream_held_kib"`
	Session     float64 `json:"idle_listening_session_kib"`
	SessionHeld float64 `json:"idle_listening_session_held_kib"`
	Allocs      int64   `json:"allocs_per_call"`
	Bytes       int64   `json:"bytes_per_call"`
}

func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

func grow(f *figures) growing {
	last := func(s *sweep) *table { return s.points[len(s.points)-1].table }
	over := func(t *table, a, b string) float64 {
		x, _, _ := t.ratio(a, b)
		return round(x)
	}
	p99, _, _ := last(f.sweeps[0]).row("newel").spread(func(m measurement) float64 { return milliseconds(m.p99) })
	steadily := func(name string) float64 {
		m, _, _ := spreadOf(f.steady[name], func(s steady) float64 { return milliseconds(s.p99) })
		return round(m)
	}
	return growing{
		Rising: over(last(f.sweeps[0]), "newel", "floor"), RisingP99: round(p99),
		Arguments: over(last(f.sweeps[1]), "newel", "floor"), Result: over(last(f.sweeps[2]), "newel", "floor"),
		Tools: over(f.manyTools, "newel, 10000 tools", "newel, 10 tools"), Page: over(f.manyLists, "newel, 10000 tools", "newel, 1000 tools"),
		Steady: steadily("newel"), SteadyFloor: steadily("floor"),
		Stream: round(f.streams.subscription), StreamHeld: round(f.streams.subscriptionHeld),
		Session: round(f.streams.session), SessionHeld: round(f.streams.sessionHeld),
		Allocs: f.allocations.Allocs, Bytes: f.allocations.Bytes,
	}
}

func spreadOf[T any](all []T, f func(T) float64) (median, low, high float64) {
	var values []float64
	for _, v := range all {
		values = append(values, f(v))
	}
	return spread(values)
}

// writeSweeps prints the sweeps: a line for every server at every size.
func writeSweeps(w *tabwriter.Writer, f *figures) {
	for _, s := range f.sweeps {
		fmt.Fprintf(w, "\n%s\n", s.name)
		fmt.Fprintf(w, "%s\tserver\tcalls/s\tCPU µs/call\tx floor\tp50 µs\tp99 µs\n", s.axis)
		for _, p := range s.points {
			for _, r := range p.table.rows {
				fmt.Fprintf(w, "%s\t", p.label)
				writeRow(w, p.table, r)
			}
		}
	}
	for _, t := range []*table{f.manyTools, f.manyLists} {
		fmt.Fprintf(w, "\n%s\nserver\tcalls/s\tCPU µs/call\tx the first\tp50 µs\tp99 µs\n", t.name)
		for _, r := range t.rows {
			writeRow(w, t, r)
		}
	}
	fmt.Fprintf(w, "\ntools/call echo at 30 %% of the most that each server did, %d connections, from when a call was due\n", steadyConnections)
	fmt.Fprintln(w, "server\tmost calls/s\tasked for\tp50 µs\tp99 µs (min to max)\tp99.9 µs")
	for _, name := range []string{"floor", "newel", "mcpgo", "gosdk"} {
		all := f.steady[name]
		of := func(f func(s steady) float64) float64 { m, _, _ := spreadOf(all, f); return m }
		p99, low, high := spreadOf(all, func(s steady) float64 { return float64(s.p99.Microseconds()) })
		fmt.Fprintf(w, "%s\t%.0f\t%.0f\t%.0f\t%.0f (%.0f to %.0f)\t%.0f\n", name, of(func(s steady) float64 { return s.peak }), of(func(s steady) float64 { return s.rate }),
			of(func(s steady) float64 { return float64(s.p50.Microseconds()) }), p99, low, high, of(func(s steady) float64 { return float64(s.p999.Microseconds()) }))
	}
	fmt.Fprintf(w, "\n%d open streams on which nothing happens, KiB resident each\n\tas served\theld\n", f.streams.count)
	fmt.Fprintf(w, "subscription of 2026-07-28\t%.1f\t%.1f\nsession of 2025-11-25 that listens\t%.1f\t%.1f\n",
		f.streams.subscription, f.streams.subscriptionHeld, f.streams.session, f.streams.sessionHeld)
	fmt.Fprintf(w, "\na call allocates\n%d times\t%d bytes\n", f.allocations.Allocs, f.allocations.Bytes)
}

// writeRow prints one server of a sweep, from the rate on.
func writeRow(w io.Writer, t *table, r *row) {
	rate, _, _ := r.spread(func(m measurement) float64 { return float64(m.calls) / m.seconds })
	cpu, _, _ := r.spread(func(m measurement) float64 { return m.cpu })
	p50, _, _ := r.spread(func(m measurement) float64 { return float64(m.p50.Microseconds()) })
	p99, _, _ := r.spread(func(m measurement) float64 { return float64(m.p99.Microseconds()) })
	x, low, high := t.ratio(r.name, t.floor)
	fmt.Fprintf(w, "%s\t%.0f\t%.1f\t%.2f (%.2f to %.2f)\t%.0f\t%.0f\n", r.name, rate, cpu, x, low, high, p50, p99)
}
