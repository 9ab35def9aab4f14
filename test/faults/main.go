// Command faults crashes a real newel process in front of a real ledger, hundreds of times, at every
// moment of a call, and checks from outside that nothing was lost and nothing was done twice.
//
//	go run ./test/faults   # or: make faults
//
// Start reading at [check], which says from what was written down whether the invariants held;
// points.go is where calls are broken, environment.go what else goes wrong. docs/reliability.md
// tells the method. The last line is one JSON object; the exit code is 1 if an invariant did not
// hold. It needs Linux and the programs of PostgreSQL.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/term"

	"newel.dev/newel/test/engines"
	"newel.dev/newel/test/program"
)

type options struct {
	cycles  int
	seed    uint64
	engines []string
	dir     string // scratch
	binary  string
	only    string // environment: names of scenarios
	keep    bool
	first   bool // end at the first violation
	quiet   bool
	resume  string // file that remembers what was done
	mutant  string // parts of the names of mutants

	building *sync.Mutex // of the program before this one
}

// parts are the processes that this program is too; their arguments are an address and a file.
var parts = map[string]func(addr, file string) error{
	"ledger": serveLedger,
	"issuer": serveIssuer,
	"child":  serveChild,
}

func main() {
	if len(os.Args) == 4 {
		if serve := parts[os.Args[1]]; serve != nil {
			if err := serve(os.Args[2], os.Args[3]); err != nil {
				fmt.Fprintln(os.Stderr, os.Args[1]+":", err)
				os.Exit(1)
			}
			return
		}
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	o := options{building: &sync.Mutex{}}
	var engine string
	var mutants bool
	flag.IntVar(&o.cycles, "cycles", 500, "crashes")
	flag.Uint64Var(&o.seed, "seed", 1, "chooses tools, bytes and times; the same again")
	flag.StringVar(&engine, "engines", "sqlite,postgres", "engines of the state")
	flag.StringVar(&o.only, "environment", "all", "faults of the environment: all, none, or names with commas; with a - in front: all but those")
	flag.StringVar(&o.binary, "binary", "", "program to test, built with the tag faults; default: it is built")
	flag.BoolVar(&o.keep, "keep", false, "keep the files of a run that succeeds, too")
	flag.BoolVar(&mutants, "mutants", false, "build programs with a mistake each, and show that every mistake is found")
	flag.StringVar(&o.resume, "resume", "", "do the crashes in runs of 500, remember in this file what was done, and go on from there")
	flag.StringVar(&o.mutant, "mutant", "", "with -mutants: those with one of these in their name, with commas")
	flag.Parse()
	o.engines = strings.Split(engine, ",")
	do := suite
	switch {
	case mutants:
		do = runMutants
	case o.resume != "":
		do = long
	}
	if err := do(ctx, &o, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "faults:", err)
		os.Exit(1)
	}
}

// A result is one run.
type result struct {
	Cycles     int    `json:"cycles"`
	Calls      int    `json:"calls"`
	Violations int    `json:"violations"`
	Unknown    int    `json:"unknown"`
	Seed       uint64 `json:"seed"`
	Bound      string `json:"bound_95"`
	Seconds    int    `json:"seconds"`

	lines    map[string]map[string]*Line // by engine and point
	measures []string
	found    []Violation
}

// errInterrupted ends a run that was cut off: what it found says nothing about the program.
var errInterrupted = errors.New("interrupted")

// suite runs everything once and prints the table.
func suite(ctx context.Context, o *options, out io.Writer) error {
	if err := o.prepare(ctx); err != nil {
		return err
	}
	r, err := run(ctx, o)
	if ctx.Err() != nil {
		return errors.Join(errInterrupted, os.RemoveAll(o.dir))
	}
	if r != nil {
		r.print(out)
	}
	if err == nil && r.Violations > 0 {
		err = errViolated
	}
	if err != nil || o.keep {
		fmt.Fprintln(os.Stderr, "faults: what was written is in", o.dir)
		return err
	}
	return os.RemoveAll(o.dir)
}

// progress is what a long run remembers.
type progress struct {
	Total  result                      `json:"total"`
	Runs   int                         `json:"runs"`
	Commit string                      `json:"commit"` // of the sources; another one begins anew
	Lines  map[string]map[string]*Line `json:"lines"`
}

const atOnce = 500

// long does many crashes in runs of their own, each with its own seed, so that one that fails can be
// done again. It ends at the first violation.
func long(ctx context.Context, o *options, out io.Writer) error {
	commit, err := exec.CommandContext(ctx, "git", "describe", "--always", "--dirty", "--abbrev=40").Output()
	if err != nil {
		return fmt.Errorf("what is tested is not known: %w", err)
	}
	p := progress{Commit: strings.TrimSpace(string(commit))}
	b, err := os.ReadFile(o.resume)
	if err == nil {
		before := progress{}
		if err := json.Unmarshal(b, &before); err != nil {
			return fmt.Errorf("%s: %w", o.resume, err)
		}
		if before.Commit == p.Commit {
			p = before
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if p.Lines == nil {
		p.Lines = map[string]map[string]*Line{}
	}
	p.Total.lines = p.Lines
	for p.Total.Cycles < o.cycles {
		one := *o
		one.cycles, one.seed = min(atOnce, o.cycles-p.Total.Cycles), o.seed+uint64(p.Runs)
		if err := one.prepare(ctx); err != nil {
			return err
		}
		r, err := run(ctx, &one)
		if ctx.Err() != nil {
			fmt.Fprintf(os.Stderr, "faults: %d cycles without a violation so far; the run that was under way is done again\n", p.Total.Cycles)
			return errors.Join(errInterrupted, os.RemoveAll(one.dir))
		}
		if err != nil || r.Violations > 0 {
			r.print(out)
			fmt.Fprintf(os.Stderr, "faults: do it again with -cycles %d -seed %d; what was written is in %s\n", one.cycles, one.seed, one.dir)
			return errors.Join(err, errViolated)
		}
		p.Total.sum(r)
		p.Runs++
		if b, err = json.Marshal(&p); err != nil {
			return err
		}
		if err := errors.Join(os.WriteFile(o.resume, b, 0o600), os.RemoveAll(one.dir)); err != nil {
			return err
		}
		fmt.Fprintf(out, "%d of %d cycles, seed %d: no violation\n", p.Total.Cycles, o.cycles, one.seed)
	}
	p.Total.Seed = o.seed
	p.Total.print(out)
	return nil
}

// sum adds another run.
func (r *result) sum(other *result) {
	for engine, lines := range other.lines {
		r.add(engine, &Verdict{Lines: lines})
	}
	r.Calls += other.Calls
	r.Unknown += other.Unknown
	r.Violations += other.Violations
	r.Seconds += other.Seconds
	r.found = append(r.found, other.found...)
	r.measures = append(r.measures, other.measures...)
	r.bound()
}

func (r *result) bound() {
	r.Bound = "none"
	if r.Violations == 0 && r.Cycles > 0 {
		r.Bound = fmt.Sprintf("%.2g", 3/float64(r.Cycles))
	}
}

// prepare makes the scratch folder and builds the program.
func (o *options) prepare(ctx context.Context) (err error) {
	if o.dir, err = os.MkdirTemp("", "newel-faults-"); err != nil {
		return err
	}
	if o.binary != "" {
		o.binary, err = filepath.Abs(o.binary)
		return err
	}
	o.binary = filepath.Join(o.dir, "newel")
	return build(ctx, o.binary, "")
}

// build builds the program with the moments in it, and an overlay if there is one.
func build(ctx context.Context, to, overlay string) error {
	flags := []string{"-tags", "faults"}
	if overlay != "" {
		flags = append(flags, "-overlay", overlay)
	}
	return program.Build(ctx, to, program.Newel, flags...)
}

// A host runs the servers of one task.
type host struct {
	*engines.Host
	shared *engines.Server // PostgreSQL of all tasks; nil: without
}

// A task is one lane with what is done to it.
type task struct {
	name, engine string
	nodes        int
	extra        string // of effects, in the configuration
	dsn          string // added to that of the database
	own          bool   // needs a database server of its own
	long         bool   // it takes more than half a minute: it begins first
	do           func(l *lane) error
}

const (
	workers = 8  // tasks at once: they wait most of the time
	ofLane  = 80 // crashes of one task
)

// run runs all tasks, those that take long first.
func run(ctx context.Context, o *options) (_ *result, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	begun := time.Now()
	r := &result{Seed: o.seed, lines: map[string]map[string]*Line{}}
	bar := newBar(o.cycles, o.quiet)
	defer bar.done()
	work := o.tasks()
	var mu sync.Mutex
	do := func(shared *engines.Server, t task) error {
		return engines.Hosted(ctx, func(servers *engines.Host) error {
			v, err := t.run(ctx, o, &host{servers, shared}, bar)
			mu.Lock()
			defer mu.Unlock()
			if v != nil {
				r.add(t.engine, v)
			}
			if o.first && r.Violations > 0 {
				cancel()
			}
			return err
		})
	}
	err = engines.Hosted(ctx, func(servers *engines.Host) (failed error) {
		var shared *engines.Server
		if slices.Contains(o.engines, "postgres") {
			shared = engines.Start(servers)
		}
		next := make(chan task, len(work))
		for _, t := range work {
			next <- t
		}
		close(next)
		var all sync.WaitGroup
		for range workers {
			all.Go(func() {
				for t := range next {
					if err := do(shared, t); err != nil {
						mu.Lock()
						failed = errors.Join(failed, fmt.Errorf("%s on %s: %w", t.name, t.engine, err))
						mu.Unlock()
					}
					if ctx.Err() != nil {
						return
					}
				}
			})
		}
		all.Wait()
		return failed
	})
	r.Seconds = int(time.Since(begun).Seconds())
	r.bound()
	return r, err
}

// run runs one task and has it checked.
func (t *task) run(ctx context.Context, o *options, h *host, bar *bar) (*Verdict, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	var server *engines.Server
	dsn := ""
	if t.engine == "postgres" {
		server = h.server(t.own)
		dsn = server.Database(h) + t.dsn
	}
	l, err := newLane(o, h, t.engine, t.engine+"-"+t.name, t.nodes, server, dsn, t.extra)
	if err != nil {
		return nil, err
	}
	defer l.close()
	l.report = bar.add
	failed := t.do(l)
	for _, n := range l.nodes {
		if n.Process != nil {
			n.Kill()
		}
	}
	e, err := l.evidence(ctx)
	if err != nil {
		return nil, errors.Join(failed, err)
	}
	return check(e), failed
}

// server returns the database server that the tasks share, or one of its own.
func (h *host) server(own bool) *engines.Server {
	if own {
		return engines.Start(h)
	}
	return h.shared
}

// tasks are what is done: crashes, and what else goes wrong.
func (o *options) tasks() (all []task) {
	for i, engine := range o.engines {
		cycles := o.cycles / len(o.engines)
		if i == 0 {
			cycles += o.cycles % len(o.engines)
		}
		if cycles > 0 {
			upkeep := max(3, cycles/50)
			all = append(all, task{name: "upkeep", engine: engine, nodes: 1, extra: "  retention: 1ms\n", do: func(l *lane) error { return l.upkeep(upkeep) }})
			for from := 0; from < cycles-upkeep; from += ofLane {
				count := min(ofLane, cycles-upkeep-from)
				all = append(all, task{name: fmt.Sprintf("crash%d", from), engine: engine, nodes: 1, long: true, do: func(l *lane) error { return l.cycles(from, count) }})
			}
		}
		for _, t := range slices.Concat(scenarios(), variants()) {
			if o.wants(t.name) && (t.engine == "" || t.engine == engine) {
				t.engine = engine
				all = append(all, t)
			}
		}
	}
	isLong := func(t task) bool { return t.long }
	isShort := func(t task) bool { return !t.long }
	return slices.Concat(slices.DeleteFunc(slices.Clone(all), isShort), slices.DeleteFunc(all, isLong))
}

// wants reports whether a scenario was asked for.
func (o *options) wants(name string) bool {
	if without, ok := strings.CutPrefix(o.only, "-"); ok {
		return !slices.Contains(strings.Split(without, ","), name)
	}
	return o.only == "all" || slices.Contains(strings.Split(o.only, ","), name)
}

func (r *result) add(engine string, v *Verdict) {
	if r.lines[engine] == nil {
		r.lines[engine] = map[string]*Line{}
	}
	for p, l := range v.Lines {
		sum := r.lines[engine][p]
		if sum == nil {
			sum = &Line{}
			r.lines[engine][p] = sum
		}
		sum.Cycles += l.Cycles
		sum.Zero += l.Zero
		sum.One += l.One
		sum.Unknown += l.Unknown
		sum.Violations += l.Violations
		r.Cycles += l.Cycles
	}
	r.Calls += v.Calls
	r.Unknown += v.Unknown
	r.Violations += len(v.Violations)
	r.found = append(r.found, v.Violations...)
	r.measures = append(r.measures, v.Measures...)
}

// print prints the table, what was found, and the last line.
func (r *result) print(out io.Writer) {
	fmt.Fprintf(out, "%-24s %-9s %7s %9s %9s %8s %11s\n", "point", "engine", "cycles", "ledger 0", "ledger 1", "unknown", "violations")
	var names []string
	for _, lines := range r.lines {
		for p := range lines {
			if !slices.Contains(names, p) {
				names = append(names, p)
			}
		}
	}
	slices.SortFunc(names, byNumber)
	for _, p := range names {
		for _, engine := range []string{"sqlite", "postgres"} {
			if l := r.lines[engine][p]; l != nil {
				fmt.Fprintf(out, "%-24s %-9s %7d %9d %9d %8d %11d\n", p, engine, l.Cycles, l.Zero, l.One, l.Unknown, l.Violations)
			}
		}
	}
	slices.SortStableFunc(r.measures, byNumber)
	for _, m := range r.measures {
		fmt.Fprintln(out, "MEASURE", m)
	}
	for i, v := range r.found {
		if i == 30 {
			fmt.Fprintf(out, "and %d more\n", len(r.found)-i)
			break
		}
		fmt.Fprintf(out, "VIOLATION %s %s %s: %s\n", v.Invariant, v.Point, v.Op, v.What)
	}
	fmt.Fprintf(out, "%d violations in %d cycles", r.Violations, r.Cycles)
	if r.Violations == 0 && r.Cycles > 0 {
		fmt.Fprintf(out, ": with 95 %% confidence fewer than %s of such crashes violate an invariant (3/n)", r.Bound)
	}
	fmt.Fprintln(out)
	b, err := json.Marshal(r)
	if err != nil {
		panic(err) // numbers and text
	}
	fmt.Fprintln(out, string(b))
}

// byNumber sorts K2 before K10.
func byNumber(a, b string) int {
	number := func(s string) float64 {
		n, rest := 0, ""
		if _, err := fmt.Sscanf(s, "K%d %s", &n, &rest); n == 0 && err != nil && !strings.HasPrefix(s, "K0") {
			return math.MaxInt16
		}
		return float64(n)
	}
	if x, y := number(a), number(b); x != y {
		return int(x - y)
	}
	order := strings.NewReplacer("before", "1", "after", "2")
	return strings.Compare(order.Replace(a), order.Replace(b))
}

// bar shows progress on a terminal, and nothing elsewhere.
type bar struct {
	total int
	n     atomic.Int64
	shown bool
}

func newBar(total int, quiet bool) *bar {
	return &bar{total: total, shown: !quiet && term.IsTerminal(int(os.Stderr.Fd()))}
}

func (b *bar) add(n int) {
	at := int(b.n.Add(int64(n)))
	if b.shown && b.total > 0 {
		const width = 40
		full := min(width, at*width/b.total)
		fmt.Fprintf(os.Stderr, "\r[%s%s] %d of %d crashes", strings.Repeat("#", full), strings.Repeat(".", width-full), at, b.total)
	}
}

func (b *bar) done() {
	if b.shown {
		fmt.Fprint(os.Stderr, "\r\x1b[K")
	}
}
