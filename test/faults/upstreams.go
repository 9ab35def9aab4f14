package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"

	"newel.dev/newel/test/program"
)

// rewrite writes another configuration for a node; sections are added to those that all have.
func (l *lane) rewrite(n *node, sections string) error {
	text := fmt.Sprintf(`server: {name: faults}
listen: %s
state: %s
effects:
  wait: 100ms
  tools:
    - {tool: resend, recovery: resend_same_key}
    - {tool: lookup, recovery: lookup, lookup: find%s}
limits: {call_timeout: %s, max_result_bytes: 4194304, max_result_tokens: 4194304}
%s`, n.addr, l.state(), l.settles, cmp.Or(l.longest, "20s"), sections)
	return n.write(text)
}

// write replaces the configuration, whole or not at all.
func (n *node) write(text string) error {
	name := filepath.Join(n.dir, "newel.yaml")
	if err := os.WriteFile(name+".new", []byte(text), 0o600); err != nil {
		return err
	}
	return os.Rename(name+".new", name)
}

// backend is one entry of backends for a ledger at an address; more are settings of it.
func backend(name, addr, more string) string {
	return fmt.Sprintf("  - {type: mcp, name: %s, url: \"http://%s/\", revision: \"2026-07-28\", tools: [{name: find, effect: read}, {name: \"*\", effect: write}]%s}\n", name, addr, more)
}

// ledgerAt starts another ledger and returns its address and file.
func (l *lane) ledgerAt(name string) (p *program.Process, addr, file string, err error) {
	if addr, err = program.FreeAddress(); err != nil {
		return nil, "", "", err
	}
	file = filepath.Join(l.dir, name+".log")
	if p, err = part("ledger", addr, file); err != nil {
		return nil, "", "", err
	}
	l.others = append(l.others, p)
	err = p.Until(l.host.Context(), "the ledger "+name, func() bool {
		resp, err := client.Get("http://" + addr + "/")
		return err == nil && resp.Body.Close() == nil
	})
	return p, addr, file, err
}

// measure writes a figure down.
func (l *lane) measure(point, format string, args ...any) {
	l.journal.add(Event{Kind: measured, Point: point, Detail: l.engine + ": " + fmt.Sprintf(format, args...)})
}

// A reply is what came of a call that no operation stands for.
type reply struct {
	status    int
	code      string // "" for a result
	detail    string
	after     time.Duration // Retry-After
	took      time.Duration
	result    json.RawMessage // structuredContent
	retryable bool
	err       error // of the connection
}

// kept is a client whose connections are used again.
var kept = &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 512}, Timeout: time.Minute}

// ask calls a tool without a key.
func ask(with *http.Client, addr, token, tool string, args any) (r reply) {
	params := map[string]any{"name": tool, "arguments": args, "_meta": map[string]any{
		"io.modelcontextprotocol/protocolVersion": revision, "io.modelcontextprotocol/clientCapabilities": map[string]any{},
	}}
	body, err := json.Marshal(map[string]any{"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params})
	if err != nil {
		panic(err) // strings and numbers
	}
	req, err := http.NewRequestWithContext(context.Background(), http.MethodPost, "http://"+addr+"/mcp", bytes.NewReader(body))
	if err != nil {
		return reply{err: err}
	}
	for name, v := range map[string]string{"Content-Type": "application/json", "Accept": "application/json", "Mcp-Protocol-Version": revision, "Mcp-Method": "tools/call", "Mcp-Name": tool} {
		req.Header.Set(name, v)
	}
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	begun := time.Now()
	defer func() { r.took = time.Since(begun) }()
	resp, err := with.Do(req)
	if err != nil {
		return reply{err: err}
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(resp.Body)
	if err != nil {
		return reply{err: err}
	}
	r.status = resp.StatusCode
	if s, err := strconv.Atoi(resp.Header.Get("Retry-After")); err == nil {
		r.after = time.Duration(s) * time.Second
	}
	type failure struct {
		Code      string  `json:"code"`
		Retryable bool    `json:"retryable"`
		After     float64 `json:"retryAfterSeconds"`
	}
	var m struct {
		Result *struct {
			Content    json.RawMessage `json:"content"`
			Structured json.RawMessage `json:"structuredContent"`
			IsError    bool            `json:"isError"`
			Meta       struct {
				Failure failure `json:"dev.newel/error"`
			} `json:"_meta"`
		} `json:"result"`
		Error *struct {
			Message string  `json:"message"`
			Data    failure `json:"data"`
		} `json:"error"`
	}
	if err := json.Unmarshal(raw, &m); err != nil {
		r.code, r.detail = fmt.Sprintf("HTTP %d", r.status), fmt.Sprintf("%.200s", raw)
		return r
	}
	var f failure
	switch {
	case m.Error != nil:
		f, r.detail = m.Error.Data, m.Error.Message
		f.Code = cmp.Or(f.Code, fmt.Sprintf("HTTP %d", r.status))
	case m.Result == nil:
		r.code, r.detail = "nothing", fmt.Sprintf("%.200s", raw)
		return r
	case m.Result.IsError:
		f, r.detail = m.Result.Meta.Failure, fmt.Sprintf("%.200s", m.Result.Content)
		f.Code = cmp.Or(f.Code, "error")
	default:
		r.result = m.Result.Structured
		return r
	}
	r.code, r.retryable = f.Code, f.Retryable
	if r.after == 0 {
		r.after = time.Duration(f.After * float64(time.Second))
	}
	return r
}

// quantile of samples, which are sorted.
func quantile(d []time.Duration, q float64) time.Duration {
	slices.Sort(d)
	return d[min(len(d)-1, int(q*float64(len(d))))]
}

// halt stops a process, and waits until none of its threads runs: a signal takes a moment.
func halt(pid int) error {
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		return err
	}
	deadline := time.Now().Add(startTime)
	for {
		threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
		if err != nil {
			return err
		}
		stopped := len(threads) > 0
		for _, name := range threads {
			stat, err := os.ReadFile(name)
			if i := bytes.LastIndexByte(stat, ')'); err == nil && i > 0 && !bytes.HasPrefix(stat[i:], []byte(") T")) {
				stopped = false
			}
		}
		switch {
		case stopped:
			return nil
		case time.Now().After(deadline):
			return fmt.Errorf("the process %d does not stop", pid)
		}
		<-time.After(time.Millisecond)
	}
}

// hangTime is the longest call of the upstream that hangs.
const hangTime = time.Second

// upstreamHangs has an upstream accept and never answer: it is stopped, and the kernel goes on taking
// connections for it. The first node has it and a calm one; the second has two calm ones, and the
// same load: what its calls take is the measure of the others', at the same time on the same machine.
func upstreamHangs(l *lane) error {
	l.settles = ", settle: 10s" // as long as it hangs, at least until nothing is sent to it any more
	hung, calm := l.nodes[0], l.nodes[1]
	l.nodes = l.nodes[:1] // the other has a log of its own, and reads
	defer func() {
		if calm.Process != nil {
			calm.Kill()
		}
	}()
	_, good, _, err := l.ledgerAt("calm")
	if err != nil {
		return err
	}
	_, third, _, err := l.ledgerAt("third")
	if err != nil {
		return err
	}
	bound := fmt.Sprintf(", call_timeout: %s", hangTime)
	for n, first := range map[*node]string{hung: l.ledgers, calm: third} {
		if err := l.rewrite(n, "backends:\n"+backend("ledger", first, bound)+backend("calm", good, ", prefix: calm_")); err != nil {
			return err
		}
		if err := n.up(); err != nil {
			return err
		}
	}
	find := func(addr, tool string) reply {
		return ask(kept, addr, "", tool, map[string]any{"operation": "none"})
	}
	if r := find(hung.addr, "find"); r.code != "" {
		return fmt.Errorf("before the fault: %+v", r)
	}
	if err := halt(l.ledger.PID()); err != nil {
		return err
	}
	stopped := true
	defer func() {
		if stopped {
			_ = syscall.Kill(l.ledger.PID(), syscall.SIGCONT) // the run has failed
		}
	}()
	// What was sent: a read times out, an effect is not known.
	var broken []*operation
	var all sync.WaitGroup
	all.Go(func() {
		if r := find(hung.addr, "find"); r.code != "timeout" || !r.retryable || r.took > hangTime+2*time.Second {
			l.expect("E3", "a read of an upstream that hangs: %+v", r)
		}
	})
	for _, tool := range []string{"plain", "plain", "resend", "lookup"} {
		o := l.operation(tool)
		l.touched(o, "E3")
		broken = append(broken, o)
		all.Go(func() {
			begun := time.Now()
			if e := l.try(o, hung.addr, way{}); e.Outcome != unknown {
				l.expect("E3", "an effect at an upstream that hangs ended as %s, not as outcome_unknown: %s", e.Outcome, e.Detail)
			} else if took := time.Since(begun); took > hangTime+2*time.Second {
				l.expect("E3", "it took %v to be told", took)
			}
		})
	}
	all.Wait()
	// The breaker opens: calls fail at once, and were not sent.
	slow, fast := 0, 0
	var unsent []*operation
	for fast < 10 && slow <= 10 {
		o := l.operation("plain")
		l.touched(o, "E3")
		begun := time.Now()
		e := l.try(o, hung.addr, way{})
		switch {
		case time.Since(begun) >= hangTime:
			slow++
			broken = append(broken, o)
		case e.Outcome != notExecuted:
			l.expect("E3", "with the breaker open an effect ended as %s: %s", e.Outcome, e.Detail)
		default:
			fast++
			unsent = append(unsent, o)
		}
	}
	if slow > 10 {
		l.expect("E3", "the breaker does not open: %d calls in a row had to time out", slow)
	} else if r := find(hung.addr, "find"); r.code != "unavailable" && r.code != "timeout" || r.after <= 0 && r.code == "unavailable" {
		l.expect("E3", "a read with the breaker open does not say when to come again: %+v", r)
	}
	l.neighbour(hung, calm, find)
	if err := syscall.Kill(l.ledger.PID(), syscall.SIGCONT); err != nil {
		return err
	}
	stopped = false
	back := time.Now()
	for find(hung.addr, "find").code != "" && time.Since(back) < l.patience() {
		<-time.After(20 * time.Millisecond)
	}
	recovered := time.Since(back)
	if recovered > 15*time.Second {
		l.expect("E3", "it takes %v until calls reach an upstream that is back", recovered)
	}
	// What the kernel had taken is read by now: nothing that was refused is among it.
	b, err := os.ReadFile(l.ledgerFile())
	if err != nil {
		return err
	}
	for _, o := range unsent {
		if bytes.Contains(b, []byte(`"op":"`+o.ID+`"`)) {
			l.expect("E3", "I3: %s was told that nothing was done, and it was", o.ID)
		}
	}
	for _, o := range slices.Concat(broken, unsent) {
		o.Broken = time.Now()
		for !l.settle(o, hung.addr) {
			<-time.After(50 * time.Millisecond)
		}
	}
	l.incident("E3")
	l.measure("E3", "the breaker opened after %d calls that hung, %d calls failed at once; %.1f s after its return calls succeeded", len(broken)+1, fast, recovered.Seconds())
	return nil
}

// neighbour compares what calls of a calm upstream take at two nodes, one of which has another
// upstream that hangs. Calls alternate, so that what else the machine does hits both; the p99 of
// windows are compared by their medians. A noisy machine may have several trials: the figure of the
// one that is printed holds.
func (l *lane) neighbour(hung, calm *node, find func(addr, tool string) reply) {
	const (
		most    = 1.2
		trials  = 6
		windows = 7
		size    = 150
		callers = 32
	)
	stop := make(chan struct{})
	var all sync.WaitGroup
	for _, addr := range []string{hung.addr, calm.addr} {
		for range callers {
			all.Go(func() {
				for {
					find(addr, "find")
					select {
					case <-stop:
						return
					case <-time.After(100 * time.Millisecond):
					}
				}
			})
		}
	}
	defer all.Wait()
	defer close(stop)
	p99 := func() (a, b time.Duration, failed string) {
		var ofA, ofB []time.Duration
		for range windows {
			var inA, inB []time.Duration
			for i := range size {
				one := func(n *node, to *[]time.Duration) {
					r := find(n.addr, "calm_find")
					*to = append(*to, r.took)
					if r.code != "" || r.err != nil {
						failed = fmt.Sprintf("%+v", r)
					}
				}
				if i%2 == 0 {
					one(hung, &inA)
					one(calm, &inB)
				} else {
					one(calm, &inB)
					one(hung, &inA)
				}
			}
			ofA, ofB = append(ofA, quantile(inA, 0.99)), append(ofB, quantile(inB, 0.99))
		}
		return quantile(ofA, 0.5), quantile(ofB, 0.5), failed
	}
	best := 1e9
	for trial := 1; trial <= trials; trial++ {
		a, b, failed := p99()
		if failed != "" {
			l.expect("E3", "a call of the other upstream failed: %s", failed)
			return
		}
		ratio := float64(a) / float64(b)
		if best = min(best, ratio); ratio <= most {
			l.measure("E3", "p99 of the other upstream %.2f ms, baseline %.2f ms: %.2fx (trial %d, medians of %d windows of %d calls)", millis(a), millis(b), ratio, trial, windows, size)
			return
		}
	}
	l.expect("E3", "p99 of the other upstream is %.2f times that without the fault, in the best of %d trials; it may be %.1f", best, trials, most)
}

func millis(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
