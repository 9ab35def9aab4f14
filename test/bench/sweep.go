package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// A sweep is one case at rising sizes: a table for each.
type sweep struct {
	name, axis string
	points     []point
}

type point struct {
	label string
	table *table
}

// Sizes of the sweeps.
var (
	risingConnections = []int{1, 4, 16, 64, 256, 512}
	resultSizes       = []int{1_000, 10_000, 100_000, 1_000_000} // bytes
	argumentSizes     = []int{1_000, 10_000, 100_000}
	toolCounts        = []int{10, 100, 1_000, 10_000}
)

// short is the plan for one point of a sweep: fewer rounds, because there are many points.
func (p plan) short() plan {
	p.rounds, p.warmup, p.window = min(p.rounds, 3), p.warmup/5, p.window/4
	return p
}

// rising is echo on more and more connections.
func (b *bench) rising(ctx context.Context) (*sweep, error) {
	defer b.stopAll()
	s := &sweep{name: "tools/call echo on rising connections", axis: "connections"}
	servers, err := b.startEach(ctx, "floor", "newel", "mcpgo", "gosdk")
	if err != nil {
		return nil, err
	}
	for _, n := range risingConnections {
		t := &table{name: fmt.Sprintf("echo, %d connections", n), floor: "floor"}
		if err := b.compare(ctx, t, servers, n, echoRequest()); err != nil {
			return nil, err
		}
		s.points = append(s.points, point{fmt.Sprint(n), t})
	}
	return s, nil
}

// arguments is echo of longer and longer texts.
func (b *bench) arguments(ctx context.Context) (*sweep, error) {
	defer b.stopAll()
	s := &sweep{name: fmt.Sprintf("tools/call echo, larger arguments, %d connections", largeConnections), axis: "arguments, KB"}
	servers, err := b.startEach(ctx, "floor", "newel", "mcpgo", "gosdk")
	if err != nil {
		return nil, err
	}
	for _, size := range argumentSizes {
		t := &table{name: fmt.Sprintf("arguments of %d KB", size/1000), floor: "floor"}
		text := strings.Repeat(echoText+" ", size/len(echoText)+1)[:size]
		if err := b.compare(ctx, t, servers, largeConnections, echoOf(text)); err != nil {
			return nil, err
		}
		s.points = append(s.points, point{fmt.Sprint(size / 1000), t})
	}
	return s, nil
}

// results is a result that grows, against the floor sending the same bytes.
func (b *bench) results(ctx context.Context) (*sweep, error) {
	s := &sweep{name: fmt.Sprintf("tools/call, larger results, %d connections", largeConnections), axis: "result, KB"}
	for _, size := range resultSizes {
		t := &table{name: fmt.Sprintf("result of %d KB", size/1000), floor: "floor"}
		if err := b.result(ctx, t, size); err != nil {
			return nil, err
		}
		s.points = append(s.points, point{fmt.Sprint(size / 1000), t})
	}
	return s, nil
}

func (b *bench) result(ctx context.Context, t *table, size int) error {
	defer b.stopAll()
	s, err := b.start(ctx, "newel", fmt.Sprintf("-large=%d", size))
	if err != nil {
		return err
	}
	return b.against(ctx, t, b.plan.short(), s, []request{largeRequest(size)}, largeConnections)
}

// tools is a call, and the first page of the list, of a server with more and more tools.
func (b *bench) tools(ctx context.Context) (calls, lists *table, err error) {
	defer b.stopAll()
	calls = &table{name: fmt.Sprintf("tools/call echo among many tools, %d connections", connections)}
	lists = &table{name: fmt.Sprintf("first page of tools/list (at most 1000 tools) among many tools, %d connections", connections)}
	var called, listed []*runner
	for _, n := range toolCounts {
		s, err := b.start(ctx, "newel", fmt.Sprintf("-tools=%d", n-1)) // and echo
		if err != nil {
			return nil, nil, err
		}
		s.name = fmt.Sprintf("newel, %d tools", n)
		for into, r := range map[*[]*runner]request{&called: echoRequest(), &listed: listRequest("")} {
			one, err := newRunner(ctx, s, connections, []request{r})
			if err != nil {
				return nil, nil, fmt.Errorf("%s: %w", s.name, err)
			}
			*into = append(*into, one)
		}
	}
	calls.floor, lists.floor = called[0].server.name, listed[0].server.name
	if err := b.rounds(ctx, calls, b.plan.short(), called); err != nil {
		return nil, nil, err
	}
	return calls, lists, b.rounds(ctx, lists, b.plan.short(), listed)
}

// startEach starts servers by name.
func (b *bench) startEach(ctx context.Context, names ...string) ([]*server, error) {
	var all []*server
	for _, name := range names {
		s, err := b.start(ctx, name)
		if err != nil {
			return nil, err
		}
		all = append(all, s)
	}
	return all, nil
}

// compare measures one request at servers that run, in a short plan.
func (b *bench) compare(ctx context.Context, t *table, servers []*server, conns int, q request) error {
	var runners []*runner
	for _, s := range servers {
		r, err := newRunner(ctx, s, conns, []request{q})
		if err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
		defer r.close()
		runners = append(runners, r)
	}
	return b.rounds(ctx, t, b.plan.short(), runners)
}

// A steady is one server in one round, at a rate that does not depend on how fast it answers.
type steady struct {
	peak, rate     float64 // calls a second: the most it did, and what it was then asked for
	p50, p99, p999 time.Duration
}

// steadily finds out what each server can do, and then asks each for 30 % of that.
func (b *bench) steadily(ctx context.Context) (map[string][]steady, error) {
	defer b.stopAll()
	names := []string{"floor", "newel", "mcpgo", "gosdk"}
	var runners []*runner
	for _, name := range names {
		s, err := b.start(ctx, name)
		if err != nil {
			return nil, err
		}
		r, err := newRunner(ctx, s, steadyConnections, []request{echoRequest()})
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		runners = append(runners, r)
	}
	out := map[string][]steady{}
	for round := range min(b.plan.rounds, 3) {
		for i := range runners {
			r := runners[(round+i)%len(runners)]
			b.bar.step("30 % of peak: " + r.server.name)
			m, err := r.measure(ctx, b.plan.warmup, b.plan.window/4)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", r.server.name, err)
			}
			s := steady{peak: float64(m.calls) / m.seconds}
			s.rate = 0.3 * s.peak
			if _, err := r.atRate(ctx, s.rate, b.plan.warmup); err != nil {
				return nil, fmt.Errorf("%s: %w", r.server.name, err)
			}
			took, err := r.atRate(ctx, s.rate, b.plan.window)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", r.server.name, err)
			}
			s.p50, s.p99, s.p999 = took[len(took)/2], took[len(took)*99/100], took[len(took)*999/1000]
			out[r.server.name] = append(out[r.server.name], s)
		}
	}
	return out, nil
}

// allocations is what one call allocates in the process of the server, from the handler of the URL
// to the written answer.
type allocations struct{ Allocs, Bytes int64 }

func (b *bench) allocations(ctx context.Context) (allocations, error) {
	b.bar.say("allocations of a call")
	var a allocations
	out, err := exec.CommandContext(ctx, filepath.Join(b.temp, "newel"), "-allocs").Output()
	if err == nil {
		err = json.Unmarshal(out, &a)
	}
	if err != nil {
		return a, fmt.Errorf("allocations of a call: %w", err)
	}
	return a, nil
}
