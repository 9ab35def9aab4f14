package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	floodBytes   = 8 << 20 // that the child writes to its standard error in one call
	stderrRate   = 16 << 10
	crashMark    = "crash"  // a file of that name beside starts: the child ends at once
	startsFile   = "starts" // one byte per start
	grandchildIs = "grandchild"
)

// serveChild is an MCP server over stdio that does all that such a program should not: it does not end
// when it is told to, floods its standard error, starts processes of its own and ends in the middle
// of an answer.
func serveChild(kind, dir string) error {
	signal.Ignore(syscall.SIGTERM, syscall.SIGINT)
	if kind == grandchildIs {
		<-time.After(5 * time.Minute)
		return nil
	}
	starts, err := os.OpenFile(filepath.Join(dir, startsFile), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	if _, err := starts.WriteString("x"); err != nil {
		return err
	}
	if _, err := os.Stat(filepath.Join(dir, crashMark)); err == nil {
		return errors.New("it crashes")
	}
	lines := bufio.NewScanner(os.Stdin)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var m struct {
			ID     json.RawMessage `json:"id"`
			Method string          `json:"method"`
			Params struct {
				Name string `json:"name"`
			} `json:"params"`
		}
		if json.Unmarshal(lines.Bytes(), &m) != nil || m.ID == nil {
			continue
		}
		result := `{}`
		switch m.Method {
		case "initialize":
			result = `{"protocolVersion":"2025-11-25","capabilities":{"tools":{}},"serverInfo":{"name":"child","version":"1"}}`
		case "tools/list":
			var tools []string
			for _, name := range []string{"ok", "flood", "fork", "half"} {
				tools = append(tools, fmt.Sprintf(`{"name":%q,"description":"D.","inputSchema":{"type":"object"}}`, name))
			}
			result = `{"tools":[` + strings.Join(tools, ",") + `]}`
		case "tools/call":
			if err := misbehave(m.Params.Name, dir); err != nil {
				return err
			}
			result = `{"content":[{"type":"text","text":"done"}],"structuredContent":{"done":true}}`
		}
		answer := fmt.Sprintf(`{"jsonrpc":"2.0","id":%s,"result":%s}`+"\n", m.ID, result)
		if m.Params.Name == "half" {
			_, _ = io.WriteString(os.Stdout, answer[:len(answer)/2])
			os.Exit(3)
		}
		if _, err := io.WriteString(os.Stdout, answer); err != nil {
			return err
		}
	}
	<-time.After(5 * time.Minute) // the end of its input says nothing to it either
	return nil
}

func misbehave(tool, dir string) error {
	switch tool {
	case "flood":
		line := bytes.Repeat([]byte("noise "), 20)
		line[len(line)-1] = '\n'
		for n := 0; n < floodBytes; n += len(line) {
			if _, err := os.Stderr.Write(line); err != nil {
				return err
			}
		}
	case "fork":
		self, err := os.Executable()
		if err != nil {
			return err
		}
		for i := range 4 {
			c := exec.Command(self, "child", grandchildIs, dir)
			c.SysProcAttr = &syscall.SysProcAttr{Setsid: i%2 == 1} // half of them leave the group
			if err := c.Start(); err != nil {
				return err
			}
		}
	}
	return nil
}

// family returns how many processes there are of a scenario's children, and how many zombies of a
// parent.
func family(dir string, parent int) (alive, zombies int, err error) {
	all, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return 0, 0, err
	}
	for _, name := range all {
		stat, err := os.ReadFile(name)
		if err != nil {
			continue // it has ended
		}
		after := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
		if after[0] == "Z" && after[1] == strconv.Itoa(parent) {
			zombies++
			continue
		}
		line, err := os.ReadFile(filepath.Join(filepath.Dir(name), "cmdline"))
		if err == nil && bytes.Contains(line, []byte("\x00child\x00")) && bytes.HasSuffix(line, []byte("\x00"+dir+"\x00")) {
			alive++
		}
	}
	return alive, zombies, nil
}

// childMisbehaves puts such a program behind a node.
func childMisbehaves(l *lane) error {
	n := l.nodes[0]
	dir := filepath.Join(l.dir, "child")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	if err := l.rewrite(n, fmt.Sprintf(`backends:
%s  - type: mcp
    name: child
    command: %q
    args: [child, server, %q]
    revision: "2025-11-25"
    max_processes: 2
    stop_timeout: 200ms
    max_stderr_rate: %d
    call_timeout: 10s
    tools: [{name: ok, effect: read}, {name: "*", effect: write}]
`, backend("ledger", l.ledgers, ""), self, dir, stderrRate)); err != nil {
		return err
	}
	if err := l.restart(n, false); err != nil {
		return err
	}
	call := func(tool string) reply { return ask(kept, n.addr, "", tool, map[string]any{}) }
	must := func(tool, code string) {
		if r := call(tool); r.code != code || r.err != nil {
			l.expect("E13", "%s ended as %+v, not as %q", tool, r, code)
		}
	}
	settled := func(want int, what string) (alive, zombies int) {
		deadline := time.Now().Add(10 * time.Second)
		for {
			var err error
			alive, zombies, err = family(dir, n.pid())
			if err == nil && alive <= want && zombies == 0 || time.Now().After(deadline) {
				if err != nil || alive > want || zombies > 0 {
					l.expect("E13", "%s: %d processes are left, of %d, and %d zombies (%v)", what, alive, want, zombies, err)
				}
				return alive, zombies
			}
			<-time.After(20 * time.Millisecond)
		}
	}
	size := func() int64 {
		info, err := os.Stat(filepath.Join(n.dir, "newel.log"))
		if err != nil {
			return 0
		}
		return info.Size()
	}
	must("ok", "")
	// It floods its standard error.
	logged, begun := size(), time.Now()
	must("flood", "")
	grown, took := size()-logged, time.Since(begun)
	if most := int64(2*stderrRate) * int64(took/time.Second+2); grown > most { // a line in the log is longer than what it tells
		l.expect("E13", "%d bytes of standard error became %d of the log, which may be %d", floodBytes, grown, most)
	}
	l.incident("E13")
	// It ends while it writes, with processes of its own.
	unknowns := 0
	for range 5 {
		must("fork", "")
		if alive, _, err := family(dir, n.pid()); err != nil || alive < 5 {
			return fmt.Errorf("there are %d processes (%w): this shows nothing", alive, err)
		}
		if r := call("half"); r.code != unknown {
			l.expect("E13", "an effect whose server ended in its answer ended as %+v", r)
		} else {
			unknowns++
		}
		settled(1, "after it ended in an answer")
		l.incident("E13")
		again := time.Now()
		for call("ok").code != "" && time.Since(again) < 15*time.Second {
			<-time.After(20 * time.Millisecond)
		}
	}
	must("ok", "")
	o := l.operation("plain")
	l.touched(o, "E13")
	l.settle(o, n.addr) // the other server does not notice
	// It crashes as soon as it is started.
	if err := os.WriteFile(filepath.Join(dir, crashMark), nil, 0o600); err != nil {
		return err
	}
	call("half") // so that the next needs a new one
	before, err := os.ReadFile(filepath.Join(dir, startsFile))
	if err != nil {
		return err
	}
	stop := time.Now().Add(3 * time.Second)
	calls, failed := 0, 0
	var mu sync.Mutex
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			for time.Now().Before(stop) {
				r := call("ok")
				mu.Lock()
				if calls++; r.code != "" {
					failed++
				}
				if r.code != "unavailable" && r.code != "exhausted" {
					l.expect("E13", "a call of a program that crashes ended as %+v", r)
				}
				mu.Unlock()
				<-time.After(5 * time.Millisecond)
			}
		})
	}
	all.Wait()
	after, err := os.ReadFile(filepath.Join(dir, startsFile))
	if err != nil {
		return err
	}
	// It waits longer and longer between starts, and for its breaker: the first may come later.
	for late := time.Now().Add(15 * time.Second); len(after) == len(before) && time.Now().Before(late); {
		call("ok")
		<-time.After(50 * time.Millisecond)
		if after, err = os.ReadFile(filepath.Join(dir, startsFile)); err != nil {
			return err
		}
	}
	if starts := len(after) - len(before); starts < 1 || starts > 12 {
		l.expect("E13", "a program that crashes was started %d times in three seconds", starts)
	}
	settled(0, "after it crashed again and again")
	l.incident("E13")
	if err := os.Remove(filepath.Join(dir, crashMark)); err != nil {
		return err
	}
	back := time.Now()
	for call("ok").code != "" && time.Since(back) < l.patience() {
		<-time.After(20 * time.Millisecond)
	}
	recovered := time.Since(back)
	must("ok", "")
	// The server is told to end.
	must("fork", "")
	if err := n.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	if !n.ended(deathTime) {
		l.expect("E13", "it does not end, because of a child that does not")
		n.kill()
	}
	left, zombies := settled(0, "after the server ended")
	l.incident("E13")
	l.measure("E13", "zombies %d, processes left %d; %d MiB of standard error in %.1f s became %d KiB of the log; %d starts for %d calls in 3 s of crashes; %.1f s to recover; %d outcomes unknown",
		zombies, left, floodBytes>>20, took.Seconds(), grown>>10, len(after)-len(before), calls, recovered.Seconds(), unknowns)
	return l.restart(n, false)
}
