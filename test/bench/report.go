package main

import (
	"encoding/json"
	"fmt"
	"io"
	"math"
	"os"
	"slices"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"
)

// A table is one case: a row for every server.
type table struct {
	name  string
	floor string
	rows  []*row
}

type row struct {
	name       string
	rounds     []measurement
	idle, peak float64 // MiB resident
}

func (t *table) row(name string) *row {
	for _, r := range t.rows {
		if r.name == name {
			return r
		}
	}
	return nil
}

// ratio returns how much more CPU a call of a costs than one of b: taken in each round.
func (t *table) ratio(a, b string) (median, low, high float64) {
	ra, rb := t.row(a), t.row(b)
	var all []float64
	for i := range ra.rounds {
		all = append(all, ra.rounds[i].cpu/rb.rounds[i].cpu)
	}
	return spread(all)
}

func (r *row) spread(f func(measurement) float64) (median, low, high float64) {
	var all []float64
	for _, m := range r.rounds {
		all = append(all, f(m))
	}
	return spread(all)
}

func spread(all []float64) (median, low, high float64) {
	s := slices.Sorted(slices.Values(all))
	if len(s) == 0 {
		return math.NaN(), math.NaN(), math.NaN()
	}
	median = s[len(s)/2]
	if len(s)%2 == 0 {
		median = (s[len(s)/2-1] + median) / 2
	}
	return median, s[0], s[len(s)-1]
}

// figures is all that was measured.
type figures struct {
	tables   []*table // in the order of the cases
	starts   []start
	sessions *idle
	costs    string // of each guard, as a table
	writes   []writes

	sweeps               []*sweep // connections, arguments, results
	manyTools, manyLists *table   // by number of tools
	steady               map[string][]steady
	streams              *streams
	allocations          allocations
}

// report prints a table for every case, and last a line of JSON for programs.
func report(out io.Writer, p plan, f *figures) error {
	tables, starts := f.tables, f.starts
	fmt.Fprintf(out, "server on CPU %d, load on CPU %d; %d rounds of %v after %v of warm-up; medians (min to max)\n",
		serverCPU, loadCPU, p.rounds, p.window, p.warmup)
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	for _, t := range tables {
		fmt.Fprintf(w, "\n%s\n", t.name)
		fmt.Fprintln(w, "server\tCPU µs/call\tx floor\tcalls/s\tp50 µs\tp99 µs\tRSS idle/peak MiB")
		for _, r := range t.rows {
			cpu, cpuLow, cpuHigh := r.spread(func(m measurement) float64 { return m.cpu })
			rate, rateLow, rateHigh := r.spread(func(m measurement) float64 { return float64(m.calls) / m.seconds })
			p50, _, _ := r.spread(func(m measurement) float64 { return float64(m.p50.Microseconds()) })
			p99, _, _ := r.spread(func(m measurement) float64 { return float64(m.p99.Microseconds()) })
			x, low, high := t.ratio(r.name, t.floor)
			fmt.Fprintf(w, "%s\t%.1f (%.1f to %.1f)\t%.2f (%.2f to %.2f)\t%.0f (%.0f to %.0f)\t%.0f\t%.0f\t%.1f / %.1f\n",
				r.name, cpu, cpuLow, cpuHigh, x, low, high, rate, rateLow, rateHigh, p50, p99, r.idle, r.peak)
		}
	}
	fmt.Fprintf(w, "\nstart to first answer, %d starts\n", p.starts)
	fmt.Fprintln(w, "server\tms\tRSS after it, MiB")
	var first, idle float64
	for _, s := range starts {
		var ms []float64
		for _, d := range s.times {
			ms = append(ms, float64(d)/float64(time.Millisecond))
		}
		m, low, high := spread(ms)
		rss, _, _ := spread(s.idle)
		fmt.Fprintf(w, "%s\t%.1f (%.1f to %.1f)\t%.1f\n", s.name, m, low, high, rss)
		if s.name == "newel" {
			first, idle = m, rss
		}
	}
	fmt.Fprintf(w, "\n%d idle sessions of revision 2025-11-25, KiB each\n", idleSessionCount)
	fmt.Fprintf(w, "gosdk\t%.1f\ngateway, beyond the SDK's\t%.1f\n", f.sessions.sdk, f.sessions.own)
	fmt.Fprintf(w, "\nwhat each guard costs, with an access token and 50 rules\n")
	if err := w.Flush(); err != nil {
		return err
	}
	fmt.Fprint(out, f.costs)
	writeRates(w, f.writes)
	writeSweeps(w, f)
	echo, list, large := tables[0], tables[1], tables[2]
	path, _, _ := echo.ratio("newel", "floor")
	sdk, _, _ := echo.ratio("gosdk", "newel")
	mcpgo, _, _ := echo.ratio("mcpgo", "newel")
	listRatio, _, _ := list.ratio("newel", "floor")
	largeRatio, _, _ := large.ratio("newel", "floor")
	hop, lists := tables[3], tables[4]
	hopRatio, _, _ := hop.ratio("gateway", "reverseproxy")
	sdkHop, _, _ := hop.ratio("sdkproxy", "gateway")
	slowest, _, _ := lists.row("gateway").spread(func(m measurement) float64 { return float64(m.p99) / float64(time.Millisecond) })
	access, _, _ := tables[5].ratio("secured", "floor")
	cpu, _, _ := echo.row("newel").spread(func(m measurement) float64 { return m.cpu })
	effect, err := costOf(f.costs, "effect")
	if err != nil {
		return err
	}
	last, err := json.Marshal(struct {
		Path   float64            `json:"path_cpu_over_floor"`
		SDK    float64            `json:"sdk_cpu_over_path"`
		MCPGo  float64            `json:"mcpgo_cpu_over_path"`
		List   float64            `json:"list_cpu_over_floor"`
		Large  float64            `json:"large_cpu_over_floor"`
		Idle   float64            `json:"idle_rss_mib"`
		First  float64            `json:"first_answer_ms"`
		Hop    float64            `json:"hop_cpu_over_reverseproxy"`
		SDKHop float64            `json:"sdkproxy_cpu_over_hop"`
		Lists  float64            `json:"warm_list_20_upstreams_p99_ms"`
		Access float64            `json:"auth_policy_cpu_over_floor"`
		Idles  float64            `json:"idle_session_own_kib"`
		Writes map[string]float64 `json:"write_over_engine_group_commit"`
		Rows   map[string]float64 `json:"write_over_rows_in_one_commit"`
		Reads  float64            `json:"read_slowdown"`
		growing
	}{round(path), round(sdk), round(mcpgo), round(listRatio), round(largeRatio), round(idle), round(first),
		round(hopRatio), round(sdkHop), round(slowest), round(access), round(f.sessions.own),
		byEngine(f.writes, writes.overEngine), byEngine(f.writes, func(w writes) float64 { return w.ratio }), round(1 + effect/(1000*(cpu-effect/1000))), grow(f)})
	if err != nil {
		return err
	}
	fmt.Fprintln(w)
	if err := w.Flush(); err != nil {
		return err
	}
	_, err = fmt.Fprintf(out, "%s\n", last)
	return err
}

func round(f float64) float64 { return math.Round(f*100) / 100 }

// A bar shows progress on a terminal, and nothing elsewhere.
type bar struct {
	out         *os.File
	terminal    bool
	done, total int
}

func newBar(out *os.File) *bar {
	_, err := unix.IoctlGetTermios(int(out.Fd()), unix.TCGETS)
	return &bar{out: out, terminal: err == nil}
}

func (b *bar) step(what string) {
	b.done++
	b.say(what)
}

func (b *bar) say(what string) {
	if !b.terminal {
		return
	}
	const width = 30
	full := 0
	if b.total > 0 {
		full = width * b.done / b.total
	}
	fmt.Fprintf(b.out, "\r\x1b[K[%-*s] %s", width, "##############################"[:min(full, width)], what)
}

func (b *bar) clear() {
	if b.terminal {
		fmt.Fprint(b.out, "\r\x1b[K")
	}
}
