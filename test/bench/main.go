// Command bench measures what a call costs, in CPU of the server process, against the least an
// honest net/http handler costs and against two other Go libraries.
//
//	go run .            # about nine minutes; -quick for a look
//
// Start reading at [run]. The servers are programs of their own (servers/*), pinned to one CPU with
// one Go processor; this program, pinned to another, is the load. Every case runs in rounds, all its
// servers in each round, in an order that rotates; a ratio is taken within a round, and
// the median over the rounds is printed with its spread. Every answer is compared with one that
// was checked, so a server that answers fast and wrong fails the run.
//
// Numbers of different runs or machines do not compare; ratios of one run do.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"syscall"
	"time"
)

// Where things run. The load is pinned by running this program again, see pin.
const (
	serverCPU = 0
	loadCPU   = 1
	pinned    = "NEWEL_BENCH_PINNED"
)

// Sizes of the cases.
const (
	connections      = 16
	largeConnections = 8
	listedTools      = 1000
	largeBytes       = 100_000
)

// A plan says how long to measure.
type plan struct {
	rounds         int
	warmup, window time.Duration
	starts         int // of each server, for the time to the first answer
	quick          bool
}

func main() {
	quick := flag.Bool("quick", false, "a short run: shows that it works, not what it costs")
	others := flag.Bool("peers", false, "measure other implementations instead, installed from package registries")
	cache := flag.String("cache", filepath.Join("..", "..", "dist", "peers"), "folder where those are kept between runs")
	flag.Parse()
	p := plan{rounds: 7, warmup: 500 * time.Millisecond, window: 2 * time.Second, starts: 9}
	if *quick {
		p = plan{rounds: 2, warmup: 100 * time.Millisecond, window: 500 * time.Millisecond, starts: 2, quick: true}
	}
	if err := pin(); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	do := run
	if *others {
		p.rounds, p.starts = min(p.rounds, 5), min(p.starts, 3)
		do = func(ctx context.Context, out io.Writer, p plan) error { return comparePeers(ctx, out, p, *cache) }
	}
	if err := do(ctx, os.Stdout, p); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		stop()
		os.Exit(1)
	}
}

// pin runs this program again on the CPU of the load, once.
func pin() error {
	if os.Getenv(pinned) != "" {
		return nil
	}
	if runtime.NumCPU() < 2 {
		return errors.New("needs two CPUs: one for the server, one for the load")
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	runtime.LockOSThread() // exec keeps the affinity of this thread
	if err := setAffinity(loadCPU); err != nil {
		return err
	}
	return syscall.Exec(self, os.Args, append(os.Environ(), pinned+"=1", "GOMAXPROCS=1"))
}

// run is the whole way: build, start, check, measure, print.
func run(ctx context.Context, out io.Writer, p plan) error {
	temp, err := os.MkdirTemp("", "newel-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(temp)
	bar := newBar(os.Stderr)
	defer bar.clear()

	bar.say("building servers")
	if err := build(ctx, temp); err != nil {
		return err
	}
	b := &bench{temp: temp, plan: p, bar: bar}
	defer b.stopAll()

	cases := []func(context.Context) (*table, error){b.echo, b.list, b.large, b.hop, b.manyLists, b.access}
	few := p.short().rounds
	b.bar.total = p.rounds*(4+2+2+3+1+2) + 4*p.starts + 2 + // as ever, then the sweeps
		few*(4*len(risingConnections)+4*len(argumentSizes)+2*len(resultSizes)+2*len(toolCounts)+4) + 4
	var tables []*table
	for _, c := range cases {
		t, err := c(ctx)
		if err != nil {
			return err
		}
		tables = append(tables, t)
	}
	starts, err := b.starts(ctx)
	if err != nil {
		return err
	}
	sessions, err := b.idleSessions(ctx)
	if err != nil {
		return err
	}
	costs, err := b.guardCosts(ctx)
	if err != nil {
		return err
	}
	written, err := b.durable(ctx)
	if err != nil {
		return err
	}
	f := &figures{tables: tables, starts: starts, sessions: sessions, costs: costs, writes: written}
	if err := b.sweeps(ctx, f); err != nil {
		return err
	}
	bar.clear()
	return report(out, p, f)
}

// sweeps are the cases at rising sizes, in fewer rounds.
func (b *bench) sweeps(ctx context.Context, f *figures) error {
	for _, c := range []func(context.Context) (*sweep, error){b.rising, b.arguments, b.results} {
		s, err := c(ctx)
		if err != nil {
			return err
		}
		f.sweeps = append(f.sweeps, s)
	}
	var err error
	if f.manyTools, f.manyLists, err = b.tools(ctx); err != nil {
		return err
	}
	if f.steady, err = b.steadily(ctx); err != nil {
		return err
	}
	if f.streams, err = b.idleStreams(ctx, b.plan.quick); err != nil {
		return err
	}
	f.allocations, err = b.allocations(ctx)
	return err
}

func build(ctx context.Context, dir string) error {
	cmd := exec.CommandContext(ctx, "go", "build", "-o", dir+string(filepath.Separator), "./servers/...")
	cmd.Stderr = os.Stderr
	cmd.Env = append(os.Environ(), fmt.Sprintf("GOMAXPROCS=%d", runtime.NumCPU()))
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("building the servers: %w; run this in test/bench", err)
	}
	return nil
}

// bench holds what the cases share.
type bench struct {
	temp    string
	plan    plan
	bar     *bar
	servers []*server
}

func (b *bench) stopAll() {
	for _, s := range b.servers {
		s.stop()
	}
	b.servers = nil
}

// start starts a server that runs until stopAll.
func (b *bench) start(ctx context.Context, name string, args ...string) (*server, error) {
	return b.startOn(ctx, serverCPU, name, args...)
}

// startOn is start on another CPU: what stands behind a measured server must not share its own.
func (b *bench) startOn(ctx context.Context, cpu int, name string, args ...string) (*server, error) {
	s, err := startServer(ctx, cpu, filepath.Join(b.temp, name), args...)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	b.servers = append(b.servers, s)
	return s, nil
}

// echo is the main case: a typed tool with one argument.
func (b *bench) echo(ctx context.Context) (*table, error) {
	defer b.stopAll()
	t := &table{name: fmt.Sprintf("tools/call echo, %d connections", connections), floor: "floor"}
	var runners []*runner
	for _, name := range []string{"floor", "newel", "mcpgo", "gosdk"} {
		s, err := b.start(ctx, name)
		if err != nil {
			return nil, err
		}
		r, err := newRunner(ctx, s, connections, []request{echoRequest()})
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		runners = append(runners, r)
	}
	return t, b.rounds(ctx, t, b.plan, runners)
}

// list is tools/list with many tools: every page in turn, against the floor sending the same bytes.
func (b *bench) list(ctx context.Context) (*table, error) {
	defer b.stopAll()
	s, err := b.start(ctx, "newel", fmt.Sprintf("-tools=%d", listedTools-1)) // and echo
	if err != nil {
		return nil, err
	}
	pages, tools, err := listPages(ctx, s)
	if err != nil {
		return nil, err
	}
	if tools < listedTools {
		return nil, fmt.Errorf("the list has %d tools, want %d", tools, listedTools)
	}
	t := &table{name: fmt.Sprintf("tools/list, %d tools on %d pages, per page, %d connections", tools, len(pages), connections), floor: "floor"}
	return t, b.against(ctx, t, b.plan, s, pages, connections)
}

// large is a tool result of 100 KB, against the floor sending the same bytes.
func (b *bench) large(ctx context.Context) (*table, error) {
	defer b.stopAll()
	s, err := b.start(ctx, "newel", fmt.Sprintf("-large=%d", largeBytes))
	if err != nil {
		return nil, err
	}
	t := &table{name: fmt.Sprintf("tools/call, result of %d KB, %d connections", largeBytes/1000, largeConnections), floor: "floor"}
	return t, b.against(ctx, t, b.plan, s, []request{largeRequest(largeBytes)}, largeConnections)
}

// against measures s beside a floor that answers requests with the bytes that s answers.
func (b *bench) against(ctx context.Context, t *table, p plan, s *server, requests []request, conns int) error {
	r, err := newRunner(ctx, s, conns, requests)
	if err != nil {
		return fmt.Errorf("newel: %w", err)
	}
	replay := filepath.Join(b.temp, "replay.json")
	if err := writeReplay(replay, r.requests); err != nil {
		return err
	}
	fs, err := b.start(ctx, "floor", "-replay="+replay)
	if err != nil {
		return err
	}
	fr, err := newRunner(ctx, fs, conns, requests)
	if err != nil {
		return fmt.Errorf("floor: %w", err)
	}
	return b.rounds(ctx, t, p, []*runner{fr, r})
}

// rounds runs all servers of a case in every round, in an order that rotates.
func (b *bench) rounds(ctx context.Context, t *table, p plan, runners []*runner) error {
	for _, r := range runners {
		t.rows = append(t.rows, &row{name: r.server.name, idle: r.server.memory("VmRSS")})
	}
	for round := range p.rounds {
		for i := range runners {
			at := (round + i) % len(runners)
			b.bar.step(t.name + ": " + runners[at].server.name)
			m, err := runners[at].measure(ctx, p.warmup, p.window)
			if err != nil {
				return fmt.Errorf("%s: %s: %w", t.name, runners[at].server.name, err)
			}
			t.rows[at].rounds = append(t.rows[at].rounds, m)
		}
	}
	for i, r := range runners {
		t.rows[i].peak = r.server.memory("VmHWM")
	}
	return nil
}

// A start is how long one server took from its start to its first answer, and what it then held.
type start struct {
	name  string
	times []time.Duration
	idle  []float64 // MiB resident after its first answer
}

func (b *bench) starts(ctx context.Context) ([]start, error) {
	var all []start
	for _, name := range []string{"floor", "newel", "mcpgo", "gosdk"} {
		st := start{name: name}
		for range b.plan.starts {
			b.bar.step("start to first answer: " + name)
			began := time.Now()
			s, err := b.start(ctx, name)
			if err != nil {
				return nil, err
			}
			if err := s.ask(ctx, echoRequest()); err != nil {
				return nil, fmt.Errorf("%s: %w", name, err)
			}
			st.times = append(st.times, time.Since(began))
			st.idle = append(st.idle, s.memory("VmRSS"))
			b.stopAll()
		}
		all = append(all, st)
	}
	return all, nil
}
