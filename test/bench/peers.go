package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

// A peer is another implementation, measured with the same load as Newel. What it needs comes from
// a package registry, in the versions that are written down beside it (see peers/*).
type peer struct {
	name     string
	gateway  bool   // measured in front of another server
	required bool   // the run fails without it
	source   string // where its version is written: a Go module, or a package of a registry
	// install makes it ready in a folder of its own, once; nil: it is built with the other servers.
	install func(ctx context.Context, in *installer) error
	// command starts it. upstream is "" for servers.
	command func(ctx context.Context, at *place) *exec.Cmd
	// ready makes the tool known to it, if it does not read that from its configuration.
	ready func(ctx context.Context, s *server, upstream string) error
	path  string // of its endpoint; "": /mcp
	tool  string // the name of echo there; "": echo
}

// place is where one run of a peer lives.
type place struct {
	host, port string
	upstream   string // URL of the server behind a gateway
	bin        string // the servers that are built here
	installed  string // what the peer's install made
	dir        string // for its files, gone after the run
}

// notRun are gateways that cannot be measured here, and why.
var notRun = map[string]string{
	"agentgateway": "in no registry that this installs from (crates, npm, PyPI): published as container images and release files",
	"MetaMCP":      "published as container images only",
	"mcp-hub":      "4.2.1 on npm: its endpoint is the HTTP+SSE transport of 2024-11-05, which the load does not speak",
	"supergateway": "4.0.0 on npm: stdio on one side, so no hop from HTTP to HTTP",
	"mcp-proxy":    "6.7.19 on npm: stdio on one side, so no hop from HTTP to HTTP",
	"toolhive":     "v0.62.0 as a Go module needs Go 1.27, which is newer than what this project is built with",
	"docker-mcp":   "github.com/docker/mcp-gateway: the Go module proxy has no version of it",
	"mcpproxy-go":  "github.com/smart-mcp-proxy/mcpproxy-go: the Go module proxy has no version of it",
	"tbxark-proxy": "github.com/TBXark/mcp-proxy: the Go module proxy has no version of it",
	"envoy-ai":     "needs the Envoy binary, which is in no package registry",
	"kuadrant":     "needs the Envoy binary, which is in no package registry",
}

// dialects, newest first: a peer is measured in the first one in which it answers right.
var dialects = []dialect{
	{},
	{older: "2025-11-25"}, {older: "2025-11-25", sessions: true},
	{older: "2025-06-18"}, {older: "2025-06-18", sessions: true},
}

const (
	peerPatience = 2 * time.Minute  // for a start
	settling     = 20 * time.Second // for the first right answer after it
)

// A standing is one peer as it was measured.
type standing struct {
	*peer
	version  string
	server   *server
	echo     request
	crowd    *runner // 16 connections
	single   *runner // one
	rounds   []measurement
	alone    []measurement
	starts   []float64 // ms
	idle     float64   // MiB
	peak     float64
	newel    *standing // Newel in the same revision and role
	upstream string
	at       *place
}

// comparePeers installs, starts, measures and prints.
func comparePeers(ctx context.Context, out io.Writer, p plan, cache string) error {
	cache, err := filepath.Abs(cache)
	if err != nil {
		return err
	}
	temp, err := os.MkdirTemp("", "newel-peers-")
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

	missing := map[string]string{}
	for name, why := range notRun {
		missing[name] = why
	}
	all, err := b.standings(ctx, cache, missing)
	if err != nil {
		return err
	}
	if all, err = b.measurePeers(ctx, all, missing); err != nil {
		return err
	}
	for _, s := range all {
		if err := b.startPeer(ctx, s, p.starts); err != nil {
			return fmt.Errorf("%s: start to first answer: %w", s.name, err)
		}
	}
	bar.clear()
	if err := reportPeers(out, p, all, missing); err != nil {
		return err
	}
	for _, peer := range peers() {
		if why, lacks := missing[peer.name]; lacks && peer.required {
			err = errors.Join(err, fmt.Errorf("%s did not run, and the comparison is nothing without it: %s", peer.name, why))
		}
	}
	return err
}

// standings starts every peer that can be had, and finds out how it is spoken to.
func (b *bench) standings(ctx context.Context, cache string, missing map[string]string) ([]*standing, error) {
	upstream, err := b.startOn(ctx, loadCPU, "newel")
	if err != nil {
		return nil, err
	}
	var all []*standing
	newels := map[string]*standing{}
	for _, p := range peers() {
		s := &standing{peer: p}
		if p.gateway {
			s.upstream = "http://" + upstream.addr + "/mcp"
		}
		if err := b.stand(ctx, s, cache, dialects); err != nil {
			if ctx.Err() != nil {
				return nil, err
			}
			missing[p.name] = firstLine(err)
			continue
		}
		// Newel beside it, in the same role and revision.
		key := fmt.Sprint(p.gateway, s.server.speaks.revision())
		if newels[key] == nil {
			n := &standing{peer: newelAs(p.gateway), upstream: s.upstream}
			if err := b.stand(ctx, n, cache, slices.DeleteFunc(slices.Clone(dialects), func(d dialect) bool { return d.older != s.server.speaks.older })); err != nil {
				return nil, fmt.Errorf("newel in %s: %w", s.server.speaks.revision(), err)
			}
			n.newel = n
			newels[key] = n
			all = append(all, n)
		}
		s.newel = newels[key]
		all = append(all, s)
	}
	return all, nil
}

// stand installs and starts one peer.
func (b *bench) stand(ctx context.Context, s *standing, cache string, try []dialect) error {
	s.at = &place{bin: b.temp, upstream: s.upstream}
	if s.install != nil {
		in := &installer{name: s.name, root: cache, progress: os.Stderr}
		if err := in.once(ctx, s.install); err != nil {
			return fmt.Errorf("cannot be installed: %w", err)
		}
		s.at.installed = in.folder
	}
	var err error
	if s.at.dir, err = os.MkdirTemp(b.temp, s.name+"-"); err != nil {
		return err
	}
	b.bar.say("starting " + s.name)
	if err := b.launch(ctx, s); err != nil {
		return err
	}
	if s.ready != nil {
		if err := s.ready(ctx, s.server, s.upstream); err != nil {
			return err
		}
	}
	if err := s.learn(ctx, try); err != nil {
		s.server.stop()
		return fmt.Errorf("answers wrong: %w", err)
	}
	s.version, s.idle = versionOf(s), s.server.memory("VmRSS")
	return nil
}

// learn finds the newest dialect in which the peer answers right.
func (s *standing) learn(ctx context.Context, try []dialect) error {
	ask := func(d dialect) error {
		d.path = s.path
		s.server.speaks = d
		s.echo = peerEcho(cmp.Or(s.tool, "echo"), d)
		if err := s.server.ask(ctx, s.echo); err != nil {
			return fmt.Errorf("%s: %w", &d, err)
		}
		return nil
	}
	for began := time.Now(); ; { // some know their tools only a while after they are up
		var problems []error
		for i, d := range try {
			err := ask(d)
			if err == nil {
				for _, newer := range try[:i] { // which may have been asked too early
					if ask(newer) == nil {
						return nil
					}
				}
				return ask(d)
			}
			problems = append(problems, err)
		}
		if time.Since(began) > settling || ctx.Err() != nil {
			return errors.Join(problems...)
		}
	}
}

// launch starts the process of a peer.
func (b *bench) launch(ctx context.Context, s *standing) error {
	addr, err := freeAddress()
	if err != nil {
		return err
	}
	s.at.host, s.at.port, _ = strings.Cut(addr, ":")
	speaks := dialect{}
	if s.server != nil {
		speaks = s.server.speaks
	}
	s.server = &server{name: s.name, addr: addr, group: true, speaks: speaks, cmd: s.command(ctx, s.at)}
	log, err := os.Create(filepath.Join(s.at.dir, "log"))
	if err != nil {
		return err
	}
	defer log.Close() // the process has its own
	s.server.cmd.Stdout, s.server.cmd.Stderr = log, log
	if s.server.cmd.Env == nil {
		s.server.cmd.Env = os.Environ()
	}
	if s.server.cmd.Dir == "" {
		s.server.cmd.Dir = s.at.dir
	}
	if err := s.server.run(ctx, serverCPU, peerPatience); err != nil {
		said, _ := os.ReadFile(log.Name()) // what there is of it
		return fmt.Errorf("does not start: %w: %.400q", err, said[max(0, len(said)-400):])
	}
	b.servers = append(b.servers, s.server)
	return nil
}

// askUntil asks until the answer is right, for so long.
func (s *server) askUntil(ctx context.Context, r request, patience time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	again := time.NewTicker(20 * time.Millisecond)
	defer again.Stop()
	for last := error(nil); ; {
		err := s.ask(ctx, r)
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return cmp.Or(last, err) // err says that time is up, last what was wrong
		}
		last = err
		select {
		case <-ctx.Done():
		case <-s.gone:
			return errors.Join(errors.New("ended"), err)
		case <-again.C:
		}
	}
}

// peerEcho is echo at a peer: what it says is checked, and in the newest revision that it says so.
func peerEcho(tool string, d dialect) request {
	r := echoRequest()
	r.key, r.params = tool, strings.Replace(r.params, `"echo"`, `"`+tool+`"`, 1)
	content := r.check
	r.check = func(result json.RawMessage) error {
		var is struct{ ResultType string }
		if err := json.Unmarshal(result, &is); err != nil {
			return err
		}
		if d.older == "" && is.ResultType != "complete" {
			return fmt.Errorf("not a result of 2026-07-28: %.300s", result)
		}
		return content(result)
	}
	return r
}

// measurePeers loads all that stand, in rounds.
func (b *bench) measurePeers(ctx context.Context, all []*standing, missing map[string]string) ([]*standing, error) {
	leave := func(s *standing, err error) {
		missing[s.name] = "under load: " + firstLine(err)
	}
	all = slices.DeleteFunc(all, func(s *standing) bool {
		var err error
		if s.crowd, err = newRunner(ctx, s.server, connections, []request{s.echo}); err == nil {
			s.single, err = newRunner(ctx, s.server, 1, []request{s.echo})
		}
		if err != nil {
			leave(s, err)
		}
		return err != nil
	})
	b.bar.total, b.bar.done = 2*b.plan.rounds*len(all), 0
	for round := range b.plan.rounds {
		var gone []*standing
		for i := range all {
			s := all[(round+i)%len(all)]
			b.bar.step(fmt.Sprintf("%s, %d connections", s.name, connections))
			m, err := s.crowd.again(ctx, b.plan.warmup, b.plan.window)
			if err == nil {
				b.bar.step(s.name + ", one connection")
				var one measurement
				one, err = s.single.again(ctx, b.plan.warmup/5, b.plan.window/2)
				s.alone = append(s.alone, one)
			}
			if err != nil {
				if ctx.Err() != nil || s.newel == s {
					return nil, fmt.Errorf("%s: %w", s.name, err)
				}
				leave(s, err)
				gone = append(gone, s)
				continue
			}
			s.rounds = append(s.rounds, m)
		}
		all = slices.DeleteFunc(all, func(s *standing) bool { return slices.Contains(gone, s) })
	}
	for _, s := range all {
		s.peak = s.server.memory("VmHWM")
	}
	return all, nil
}

// again is measure on fresh connections.
func (r *runner) again(ctx context.Context, warmup, window time.Duration) (measurement, error) {
	if err := r.reopen(ctx); err != nil {
		return measurement{}, err
	}
	return r.measure(ctx, warmup, window)
}

// startPeer measures start to first right answer, in a folder that knows what it needs already.
func (b *bench) startPeer(ctx context.Context, s *standing, times int) error {
	for range times {
		b.bar.say("start to first answer: " + s.name)
		s.server.stop()
		began := time.Now()
		if err := b.launch(ctx, s); err != nil {
			return err
		}
		if err := s.server.askUntil(ctx, s.echo, peerPatience); err != nil {
			return err
		}
		s.starts = append(s.starts, milliseconds(time.Since(began)))
	}
	s.server.stop()
	return nil
}

// overNewel returns how many times the CPU of Newel's call one of s costs, taken in each round.
func (s *standing) overNewel() (median, low, high float64) {
	var all []float64
	for i := range s.rounds {
		all = append(all, s.rounds[i].cpu/s.newel.rounds[i].cpu)
	}
	return spread(all)
}

// reportPeers prints the table, what did not run, and last a line of JSON.
func reportPeers(out io.Writer, p plan, all []*standing, missing map[string]string) error {
	type line struct {
		Version  string  `json:"version"`
		Revision string  `json:"revision"`
		CPU      float64 `json:"cpu_us_per_call"`
		Over     float64 `json:"cpu_over_newel"`
		Rate     float64 `json:"calls_per_second"`
		P99      float64 `json:"p99_16_connections_ms"`
		Single   float64 `json:"p50_one_connection_ms"`
		Idle     float64 `json:"rss_idle_mib"`
		Peak     float64 `json:"rss_peak_mib"`
		First    float64 `json:"first_answer_ms"`
	}
	last := struct {
		Servers  map[string]line   `json:"servers"`
		Gateways map[string]line   `json:"gateways"`
		NotRun   map[string]string `json:"not_run"`
	}{map[string]line{}, map[string]line{}, missing}
	fmt.Fprintf(out, "server on CPU %d, load on CPU %d; %d rounds of %v with %d connections and %v with one; medians (min to max)\n",
		serverCPU, loadCPU, p.rounds, p.window, connections, p.window/2)
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	for _, gateway := range []bool{false, true} {
		into := last.Servers
		if gateway {
			into = last.Gateways
			fmt.Fprintf(w, "\ntools/call echo through a gateway, in front of a Newel on the CPU of the load\n")
		} else {
			fmt.Fprintf(w, "\ntools/call echo\n")
		}
		fmt.Fprintln(w, "peer\tversion\trevision\tCPU µs/call\tx newel\tcalls/s\tp99 ms\t1 connection p50 ms\tRSS idle/peak MiB\tfirst answer ms")
		for _, s := range all {
			if s.gateway != gateway {
				continue
			}
			of := func(all []measurement, f func(measurement) float64) float64 {
				m, _, _ := spreadOf(all, f)
				return m
			}
			x, low, high := s.overNewel()
			first, _, _ := spread(s.starts)
			l := line{
				Version: s.version, Revision: s.server.speaks.String(),
				CPU: round(of(s.rounds, func(m measurement) float64 { return m.cpu })), Over: round(x),
				Rate: math.Round(of(s.rounds, func(m measurement) float64 { return float64(m.calls) / m.seconds })),
				P99:  round(of(s.rounds, func(m measurement) float64 { return milliseconds(m.p99) })), Single: round(of(s.alone, func(m measurement) float64 { return milliseconds(m.p50) })),
				Idle: round(s.idle), Peak: round(s.peak), First: round(first),
			}
			name := s.name
			if s.newel == s && s.server.speaks.older != "" {
				name += " " + s.server.speaks.older
			}
			into[name] = l
			fmt.Fprintf(w, "%s\t%s\t%s\t%.1f\t%.2f (%.2f to %.2f)\t%.0f\t%.2f\t%.2f\t%.0f / %.0f\t%.0f\n",
				s.name, l.Version, l.Revision, l.CPU, x, low, high, l.Rate, l.P99, l.Single, l.Idle, l.Peak, l.First)
		}
	}
	fmt.Fprintln(w, "\nNOT RUN\twhy")
	for _, name := range slices.Sorted(maps.Keys(missing)) {
		fmt.Fprintf(w, "%s\t%s\n", name, missing[name])
	}
	fmt.Fprintln(w)
	if err := w.Flush(); err != nil {
		return err
	}
	raw, err := json.Marshal(last)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(out, "%s\n", raw)
	return err
}

// firstLine is an error on one line of sane length.
func firstLine(err error) string {
	text := strings.Join(strings.Fields(err.Error()), " ")
	return text[:min(len(text), 400)]
}
