// Command soak runs the daemon under mixed load for an hour and holds what it takes against what it
// took at first: memory, goroutines and descriptors have to stay flat, and no good request may fail.
//
//	go run ./test/soak              # or: make soak
//	go run ./test/soak -for 2m      # a look
//	go run ./test/soak -nodes       # two nodes; or: make soak-nodes
//
// The load is seeded: calls of both eras, keyed writes, lists, sessions and subscriptions that come
// and go, clients that leave in the middle, requests that are no good, and a reload every half minute.
// The last line is one JSON object. It needs Linux.
package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/term"

	"newel.dev/newel/test/program"
)

const (
	workers     = 8
	sampleEvery = 5 * time.Second
	reloadEvery = 30 * time.Second
)

func main() {
	length := flag.Duration("for", 0, "how long [an hour; with -nodes ten minutes]")
	seed := flag.Uint64("seed", 1, "of the load")
	nodes := flag.Bool("nodes", false, "calls at a constant rate to two nodes, of which one is killed every minute, with a reload every second")
	rate := flag.Int("rate", 1000, "with -nodes: calls a second")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	var err error
	if *nodes {
		err = endure(ctx, cmp.Or(*length, 10*time.Minute), *rate, *seed)
	} else {
		err = run(ctx, cmp.Or(*length, time.Hour), *seed)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "soak:", err)
		stop()
		os.Exit(1)
	}
}

func run(ctx context.Context, length time.Duration, seed uint64) (err error) {
	dir, err := os.MkdirTemp("", "newel-soak-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	s, err := start(ctx, dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.stop()) }()
	load, cancel := context.WithTimeout(ctx, length)
	defer cancel()
	l := &loader{base: s.base, client: &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 4 * workers}}}
	var all sync.WaitGroup
	for i := range workers {
		all.Go(func() { l.work(load, rand.New(rand.NewPCG(seed, uint64(i)))) })
	}
	samples := s.watch(load, length, l)
	all.Wait()
	if ctx.Err() != nil {
		return errors.New("interrupted")
	}
	return judge(l, samples, length, seed)
}

// server is the daemon.
type server struct {
	base string
	*program.Process
}

// start builds and starts the daemon on the example's backends, with nobody to ask who is calling.
func start(ctx context.Context, dir string) (*server, error) {
	bin := filepath.Join(dir, "newel")
	if err := program.Build(ctx, bin, program.Newel); err != nil {
		return nil, err
	}
	example, err := os.ReadFile("newel.yaml")
	if err != nil {
		return nil, fmt.Errorf("%w; run this at the root of the project", err)
	}
	at := bytes.Index(example, []byte("\nbackends:"))
	if at < 0 {
		return nil, errors.New("newel.yaml has no backends")
	}
	for _, name := range []string{"examples", "docs"} {
		if err := os.CopyFS(filepath.Join(dir, name), os.DirFS(name)); err != nil {
			return nil, err
		}
	}
	addr, err := program.FreeAddress()
	if err != nil {
		return nil, err
	}
	head := "listen: " + addr + "\ncache:\n  rules:\n    - {names: [get_order], ttl: 1s, refresh_on: [update_order_status]}\n" +
		"quotas:\n  rules:\n    - {name: all, rate: 100000/s, concurrent: 1000}\n"
	if err := os.WriteFile(filepath.Join(dir, "newel.yaml"), append([]byte(head), example[at:]...), 0o600); err != nil {
		return nil, err
	}
	cmd := exec.Command(bin, "serve")
	cmd.Dir = dir
	return await(ctx, "http://"+addr, cmd)
}

// await starts a daemon and waits until it is ready. What it logs, a record for every call, is dropped.
func await(ctx context.Context, base string, cmd *exec.Cmd) (*server, error) {
	p, err := program.Start(cmd)
	if err != nil {
		return nil, err
	}
	if err := p.Until(ctx, "newel", program.Ready(base+"/ready")); err != nil {
		p.Kill()
		return nil, err
	}
	return &server{base, p}, nil
}

func (s *server) stop() error {
	if err := s.End(30 * time.Second); err != nil {
		return fmt.Errorf("newel: %w", err)
	}
	return nil
}

// sample is what the daemon takes at one moment.
type sample struct {
	rss, goroutines, fds float64
}

// watch samples, reloads and shows how far it is, until ctx ends.
func (s *server) watch(ctx context.Context, length time.Duration, l *loader) []sample {
	var all []sample
	tick := time.NewTicker(sampleEvery)
	defer tick.Stop()
	begun, reloaded := time.Now(), time.Now()
	for {
		select {
		case <-ctx.Done():
			clearBar()
			return all
		case <-tick.C:
		}
		one, err := s.sample(ctx)
		if ctx.Err() != nil {
			continue
		}
		if err != nil {
			l.fail("metrics", err.Error())
			continue
		}
		all = append(all, one)
		if time.Since(reloaded) >= reloadEvery {
			reloaded = time.Now()
			if err := s.Signal(syscall.SIGHUP); err != nil {
				l.fail("reload", err.Error())
			}
		}
		drawBar(time.Since(begun), length, "%d requests, %d failed, %.0f MiB, %.0f goroutines", l.sent.Load(), l.failed.Load(), one.rss/(1<<20), one.goroutines)
	}
}

// drawBar shows how far a run is, on a terminal.
func drawBar(done, length time.Duration, format string, args ...any) {
	if !term.IsTerminal(int(os.Stderr.Fd())) { //nolint:gosec // descriptors are small
		return
	}
	share := min(1, float64(done)/float64(length))
	fmt.Fprintf(os.Stderr, "\r\033[K%-30s %3.0f%%  %s", strings.Repeat("█", int(30*share)), 100*share, fmt.Sprintf(format, args...))
}

func clearBar() {
	if term.IsTerminal(int(os.Stderr.Fd())) { //nolint:gosec // descriptors are small
		fmt.Fprint(os.Stderr, "\r\033[K")
	}
}

func (s *server) sample(ctx context.Context) (sample, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.base+"/metrics", nil)
	if err != nil {
		return sample{}, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return sample{}, err
	}
	defer resp.Body.Close()
	got := map[string]float64{}
	for lines := bufio.NewScanner(resp.Body); lines.Scan(); {
		name, value, _ := strings.Cut(lines.Text(), " ")
		if v, err := strconv.ParseFloat(value, 64); err == nil {
			got[name] = v
		}
	}
	one := sample{got["process_resident_memory_bytes"], got["go_goroutines"], got["process_open_fds"]}
	if one.rss == 0 || one.goroutines == 0 || one.fds == 0 {
		return sample{}, errors.New("the metrics of the process are missing")
	}
	return one, nil
}

// judge prints what was measured and fails if something grows or failed. The first fifth of the time
// is warm-up.
func judge(l *loader, all []sample, length time.Duration, seed uint64) error {
	all = all[len(all)/5:]
	if len(all) < 6 {
		return fmt.Errorf("%d samples are too few; run it for longer", len(all))
	}
	third := len(all) / 3
	of := func(part []sample, what func(sample) float64) float64 {
		var v []float64
		for _, s := range part {
			v = append(v, what(s))
		}
		slices.Sort(v)
		return v[len(v)/2]
	}
	type flat struct {
		First float64 `json:"first"`
		Last  float64 `json:"last"`
	}
	over := func(what func(sample) float64) flat {
		return flat{of(all[:third], what), of(all[len(all)-third:], what)}
	}
	result := struct {
		Seconds    float64 `json:"seconds"`
		Seed       uint64  `json:"seed"`
		Requests   int64   `json:"requests"`
		Failed     int64   `json:"failed"`
		RSS        flat    `json:"rss_bytes"`
		Goroutines flat    `json:"goroutines"`
		FDs        flat    `json:"descriptors"`
	}{length.Seconds(), seed, l.sent.Load(), l.failed.Load(), over(func(s sample) float64 { return s.rss }), over(func(s sample) float64 { return s.goroutines }), over(func(s sample) float64 { return s.fds })}
	line, err := json.Marshal(result)
	if err != nil {
		return err
	}
	fmt.Printf("%s\n", line)
	var problems []error
	if result.Failed > 0 {
		problems = append(problems, fmt.Errorf("%d requests failed; the first: %s", result.Failed, l.why()))
	}
	for name, f := range map[string]struct {
		flat
		slack float64
	}{"memory": {result.RSS, 16 << 20}, "goroutines": {result.Goroutines, 40}, "descriptors": {result.FDs, 30}} {
		if f.Last > 1.1*f.First+f.slack {
			problems = append(problems, fmt.Errorf("%s grow from %.0f to %.0f", name, f.First, f.Last))
		}
	}
	return errors.Join(problems...)
}

// loader sends requests and counts them.
type loader struct {
	base         string
	client       *http.Client
	sent, failed atomic.Int64

	mu    sync.Mutex
	first string
}

func (l *loader) fail(what, why string) {
	l.failed.Add(1)
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.first == "" {
		l.first = what + ": " + why
	}
}

func (l *loader) why() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.first
}

func (l *loader) work(ctx context.Context, r *rand.Rand) {
	kinds := []func(context.Context, *rand.Rand){l.read, l.read, l.read, l.search, l.list, l.write, l.session, l.leave, l.garbage, l.listen}
	for ctx.Err() == nil {
		kinds[r.IntN(len(kinds))](ctx, r)
	}
}

const meta = `"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28","io.modelcontextprotocol/clientCapabilities":{}%s}`

// stateless sends one message of revision 2026-07-28 and returns the body of its answer.
func (l *loader) stateless(ctx context.Context, method, name, params, more string) (int, string, error) {
	body := fmt.Sprintf(`{"jsonrpc":"2.0","id":1,"method":%q,"params":{%s`+meta+`}}`, method, params, more)
	headers := []string{"Mcp-Protocol-Version", "2026-07-28", "Mcp-Method", method}
	if name != "" {
		headers = append(headers, "Mcp-Name", name)
	}
	status, _, answer, err := l.post(ctx, body, headers...)
	return status, answer, err
}

func (l *loader) post(ctx context.Context, body string, headers ...string) (int, http.Header, string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, l.base+"/mcp", strings.NewReader(body))
	if err != nil {
		return 0, nil, "", err
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Accept", "application/json, text/event-stream")
	for i := 0; i < len(headers); i += 2 {
		req.Header.Set(headers[i], headers[i+1])
	}
	l.sent.Add(1)
	resp, err := l.client.Do(req)
	if err != nil {
		return 0, nil, "", err
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(io.LimitReader(resp.Body, 8<<20))
	return resp.StatusCode, resp.Header, string(raw), err
}

// good sends a message that has to succeed.
func (l *loader) good(ctx context.Context, method, name, params, more, want string) {
	status, body, err := l.stateless(ctx, method, name, params, more)
	if ctx.Err() == nil && (err != nil || status != http.StatusOK || !strings.Contains(body, want)) {
		l.fail(method+" "+name, fmt.Sprintf("%d %v %.300s", status, err, body))
	}
}

func (l *loader) read(ctx context.Context, r *rand.Rand) {
	l.good(ctx, "tools/call", "get_order", fmt.Sprintf(`"name":"get_order","arguments":{"id":%d},`, 1+r.IntN(2000)), "", `"content"`)
}

func (l *loader) search(ctx context.Context, r *rand.Rand) {
	words := []string{"session", "policy", "token", "gateway", "limit", "audit"}
	l.good(ctx, "tools/call", "search_kb", fmt.Sprintf(`"name":"search_kb","arguments":{"query":%q},`, words[r.IntN(len(words))]), "", `"content"`)
}

func (l *loader) list(ctx context.Context, _ *rand.Rand) {
	l.good(ctx, "tools/list", "", "", "", `"search_orders"`)
}

// write changes an order, with a key; that the order may not change is an answer too.
func (l *loader) write(ctx context.Context, r *rand.Rand) {
	key := fmt.Sprintf(`,"dev.newel/idempotencyKey":"soak-%d-%d"`, time.Now().UnixNano(), r.Uint32())
	l.good(ctx, "tools/call", "update_order_status", fmt.Sprintf(`"name":"update_order_status","arguments":{"id":%d,"status":"paid"},`, 1+r.IntN(2000)), key, `"content"`)
}

// session opens a session, calls in it, and ends it or leaves it.
func (l *loader) session(ctx context.Context, r *rand.Rand) {
	status, header, body, err := l.post(ctx, `{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":"2025-11-25","capabilities":{},"clientInfo":{"name":"soak","version":"1"}}}`)
	if ctx.Err() != nil {
		return
	}
	if err != nil || status != http.StatusOK {
		l.fail("initialize", fmt.Sprintf("%d %v %.300s", status, err, body))
		return
	}
	in := []string{"Mcp-Session-Id", header.Get("Mcp-Session-Id"), "Mcp-Protocol-Version", "2025-11-25"}
	_, _, _, _ = l.post(ctx, `{"jsonrpc":"2.0","method":"notifications/initialized"}`, in...)
	for i := range 1 + r.IntN(3) {
		status, _, body, err := l.post(ctx, fmt.Sprintf(`{"jsonrpc":"2.0","id":%d,"method":"tools/call","params":{"name":"get_order","arguments":{"id":%d}}}`, i+2, 1+r.IntN(2000)), in...)
		if ctx.Err() == nil && (err != nil || status != http.StatusOK || !strings.Contains(body, `"content"`)) {
			l.fail("a call in a session", fmt.Sprintf("%d %v %.300s", status, err, body))
		}
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodDelete, l.base+"/mcp", nil)
	if err != nil {
		return
	}
	req.Header.Set("Mcp-Session-Id", in[1])
	if resp, err := l.client.Do(req); err == nil {
		resp.Body.Close()
	}
}

// leave goes away in the middle of a call.
func (l *loader) leave(ctx context.Context, r *rand.Rand) {
	short, cancel := context.WithTimeout(ctx, time.Duration(r.IntN(3000))*time.Microsecond)
	defer cancel()
	_, _, _ = l.stateless(short, "tools/call", "search_orders", `"name":"search_orders","arguments":{"customer":"a"},`, "")
}

// garbage sends what has to be refused.
func (l *loader) garbage(ctx context.Context, r *rand.Rand) {
	bodies := []string{"", "{", `{"jsonrpc":"2.0"}`, strings.Repeat("[", 5000), `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"x"}}`, strings.Repeat("x", 1+r.IntN(100_000))}
	status, _, body, err := l.post(ctx, bodies[r.IntN(len(bodies))], "Mcp-Protocol-Version", "2026-07-28", "Mcp-Method", "tools/call")
	if ctx.Err() == nil && (err != nil || status < 400 || status >= 500) {
		l.fail("garbage", fmt.Sprintf("%d %v %.300s", status, err, body))
	}
}

// listen subscribes for a moment.
func (l *loader) listen(ctx context.Context, r *rand.Rand) {
	short, cancel := context.WithTimeout(ctx, time.Duration(5+r.IntN(50))*time.Millisecond)
	defer cancel()
	_, _, _ = l.stateless(short, "subscriptions/listen", "", `"notifications":{"toolsListChanged":true},`, "")
}
