package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"newel.dev/newel/test/program"
)

// A stage is where one scenario is played: a newel process, the servers behind it, and what was seen.
type stage struct {
	o    *options
	name string

	dir      string
	budget   int
	addr     string // of newel
	good     *goodServer
	upstream *child
	hostile  string // address of the hostile server
	newel    *child
	others   []*child
	stopped  bool // newel was told to

	mu      sync.Mutex // guards what is below
	seen    map[string]int
	found   []finding
	figures []figure
}

// wrong writes down that something did not hold.
func (s *stage) wrong(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.seen[format]++; s.seen[format] <= 3 { // one kind of mistake, three examples
		s.found = append(s.found, finding{s.name, fmt.Sprintf(format, args...)})
	}
}

// figure writes a number down, in place of one that another trial wrote, and that it is too large if it
// is; most 0: it may be anything.
func (s *stage) figure(name string, value, most float64, unit string) {
	f := figure{s.name, name, value, most, unit}
	s.mu.Lock()
	if i := slices.IndexFunc(s.figures, func(g figure) bool { return g.Name == name }); i >= 0 {
		s.figures[i] = f
	} else {
		s.figures = append(s.figures, f)
	}
	s.mu.Unlock()
	if most > 0 && value > most {
		s.wrong("%s is %.4g %s, more than %.4g", name, value, unit, most)
	}
}

// A child is a process that ends with this one.
type child struct {
	*program.Process
	out bytes.Buffer
}

// spawn starts a process; nice is added to its priority.
func spawn(log io.Writer, nice int, env []string, name string, args ...string) (*child, error) {
	c := &child{}
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), env...)
	cmd.Stdout, cmd.Stderr = &c.out, log
	var err error
	if c.Process, err = program.Start(cmd); err != nil {
		return nil, err
	}
	if nice > 0 {
		_ = syscall.Setpriority(syscall.PRIO_PROCESS, c.PID(), nice) // a courtesy
	}
	return c, nil
}

// setting is what the configuration of a scenario has beside the good server.
type setting struct {
	memory   int      // bytes that newel may have; 0: budget
	top      string   // lines at the top
	limits   string   // members of limits
	backends []string // modes of the hostile server, one backend each
	of       string   // lines of each backend
}

// open starts everything.
func (s *stage) open(ctx context.Context, c setting) (err error) {
	s.budget = cmp.Or(c.memory, budget)
	s.dir = filepath.Join(s.o.dir, strings.ReplaceAll(s.name, " ", "-"))
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return err
	}
	if s.good, err = startGood(); err != nil {
		return err
	}
	if s.addr, err = program.FreeAddress(); err != nil {
		return err
	}
	if s.hostile, err = program.FreeAddress(); err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	if s.upstream, err = spawn(os.Stderr, 19, nil, self, "upstream", s.hostile); err != nil {
		return err
	}
	if err := s.upstream.Until(ctx, "the hostile server", program.Ready("http://"+s.hostile+"/")); err != nil {
		return err
	}
	config := fmt.Sprintf("server: {name: hostile}\nlisten: %s\ntelemetry: {prometheus: true, log_level: error}\n%slimits: {max_memory: %d%s}\nbackends:\n", s.addr, c.top, s.budget, c.limits)
	config += fmt.Sprintf("  - {type: mcp, name: good, url: http://%s/, revision: \"2026-07-28\", tools: [{name: \"*\", effect: read}]}\n", s.good.addr)
	for _, mode := range c.backends {
		config += fmt.Sprintf("  - {type: mcp, name: %s, url: http://%s/%s, revision: \"2026-07-28\", tools: [{name: \"*\", effect: read}]%s}\n", mode, s.hostile, mode, c.of)
	}
	file := filepath.Join(s.dir, "newel.yaml")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		return err
	}
	log, err := os.Create(filepath.Join(s.dir, "newel.log"))
	if err != nil {
		return err
	}
	defer log.Close()
	if s.newel, err = spawn(log, 0, nil, s.o.binary, "serve", "-c", file); err != nil {
		return err
	}
	ready := program.Ready("http://" + s.addr + "/ready")
	return s.newel.Until(ctx, "newel", func() bool { return s.newel.Ended(0) || ready() })
}

// end ends everything. That newel is not there any more is a violation of every scenario.
func (s *stage) end() {
	if s.newel != nil && !s.stopped {
		if s.newel.Ended(0) {
			s.wrong("newel ended: %v", s.newel.Err())
		} else if peak, err := s.peak(); err == nil {
			s.figure("largest resident memory", float64(peak)/(1<<20), float64(s.budget>>20), "MiB")
		} else {
			s.wrong("its memory is not known: %v", err)
		}
	}
	if s.newel != nil {
		s.newel.Kill()
	}
	for _, c := range append(s.others, s.upstream) {
		if c != nil {
			c.Kill()
		}
	}
	if s.good != nil {
		_ = s.good.server.Close() // it has only been asked things
	}
}

// attack starts an attacker; its report is what it returns when it has ended.
func (s *stage) attack(kind string, most time.Duration) (func() (map[string]float64, error), error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	c, err := spawn(os.Stderr, 19, nil, self, "attack", kind, s.addr, most.String())
	if err != nil {
		return nil, err
	}
	s.others = append(s.others, c)
	return func() (map[string]float64, error) {
		if !c.Ended(most + 30*time.Second) {
			return nil, fmt.Errorf("the attack %.20s does not end", kind)
		}
		if c.Err() != nil {
			return nil, fmt.Errorf("the attack %.20s: %w", kind, c.Err())
		}
		report := map[string]float64{}
		return report, json.Unmarshal(c.out.Bytes(), &report)
	}, nil
}

// await asks until it is so.
func await(most time.Duration, what string, so func() bool) error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for limit := time.After(most); !so(); {
		select {
		case <-tick.C:
		case <-limit:
			return fmt.Errorf("%s: not within %v", what, most)
		}
	}
	return nil
}

// plain is a client whose requests stand for themselves.
var plain = &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 10 * time.Second}

// peak is the most memory that newel had at any time.
func (s *stage) peak() (int64, error) { return s.memory("VmHWM:") }

func (s *stage) memory(line string) (int64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.newel.PID()))
	if err != nil {
		return 0, err
	}
	for l := range strings.Lines(string(b)) {
		if f := strings.Fields(l); len(f) == 3 && f[0] == line {
			kib, err := strconv.ParseInt(f[1], 10, 64)
			return kib << 10, err
		}
	}
	return 0, errors.New("/proc says nothing of " + line)
}

// cpu is the processor time that newel has had.
func (s *stage) cpu() (time.Duration, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", s.newel.PID()))
	if err != nil {
		return 0, err
	}
	f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	if len(f) < 13 {
		return 0, errors.New("/proc says nothing of time")
	}
	user, err := strconv.ParseInt(f[11], 10, 64)
	system, err2 := strconv.ParseInt(f[12], 10, 64)
	const tick = 10 * time.Millisecond // USER_HZ is 100 wherever Go runs
	return time.Duration(user+system) * tick, errors.Join(err, err2)
}

// watch returns the largest value that a metric has until end is called.
func (s *stage) watch(ctx context.Context, name string) (most <-chan float64, end func()) {
	ctx, end = context.WithCancel(ctx)
	out := make(chan float64, 1)
	go func() {
		tick := time.NewTicker(200 * time.Millisecond)
		defer tick.Stop()
		seen := 0.0
		for ctx.Err() == nil {
			if m, err := s.metrics(); err != nil {
				s.wrong("metrics: %v", err)
			} else {
				seen = max(seen, m[name])
			}
			select {
			case <-tick.C:
			case <-ctx.Done():
			}
		}
		out <- seen
	}()
	return out, end
}

// metrics are those of newel without labels, and the sums of those with them.
func (s *stage) metrics() (map[string]float64, error) {
	resp, err := plain.Get("http://" + s.addr + "/metrics")
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	out := map[string]float64{}
	lines := bufio.NewScanner(resp.Body)
	for lines.Scan() {
		at := strings.LastIndexByte(lines.Text(), ' ')
		if at < 0 || strings.HasPrefix(lines.Text(), "#") {
			continue
		}
		name, _, _ := strings.Cut(lines.Text()[:at], "{")
		if v, err := strconv.ParseFloat(lines.Text()[at+1:], 64); err == nil {
			out[name] += v
		}
	}
	return out, lines.Err()
}
