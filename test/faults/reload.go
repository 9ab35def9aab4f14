package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// A version is one configuration of the scenario. Its policy lets calls through that name it, and
// its backend puts its mark on what is sent on: a row with the one and the other of two versions
// was decided by half of each.
func versioned(l *lane, version string, more string) string {
	return fmt.Sprintf(`backends:
  - type: mcp
    name: ledger
    url: http://%s/
    revision: "2026-07-28"
    tools:
      - {name: find, effect: read}
      - {name: "*", effect: write, fixed: {mark: %s}}
policy:
  rules:
    - {name: own, then: allow, tools: [plain, resend, lookup], when: "!has(args.version) || args.version == '%s'"}
    - {name: finds, then: allow, tools: [find]}
%s`, l.ledgers, version, version, more)
}

// broken are configurations that are wrong, each of which would let calls of "open" through.
func broken(l *lane) []string {
	open := versioned(l, "open", "")
	return []string{
		versioned(l, "open", "  tests:\n    - {name: wrong, tool: ask, want: allow}\n"), // what the rules must decide, they do not
		open + "polcy: {}\n",
		strings.Replace(open, "args.version ==", "args.version = =", 1),
		open[:len(open)-60], // half of a file
	}
}

// configurationChanges has a node go over to other configurations, valid and not, while calls run,
// and ends it in the middle of that.
func configurationChanges(l *lane) error {
	n := l.nodes[0]
	valid := []string{"a", "b"}
	set := func(text string) error { return l.rewrite(n, text) }
	if err := set(versioned(l, "a", "")); err != nil {
		return err
	}
	if err := l.restart(n, false); err != nil {
		return err
	}
	var done, denied, opened, gone, reloads, refusals, kills atomic.Int64
	r := rand.New(rand.NewPCG(l.rand.Uint64(), 15)) // the crowd has the lane's
	stop := make(chan struct{})
	wait := l.crowd(3, "E15", func() string { return n.addr }, stop)
	var all sync.WaitGroup
	for i := range 4 {
		all.Go(func() {
			for j := 0; ; j++ {
				select {
				case <-stop:
					return
				default:
				}
				version := []string{"a", "b", "open"}[j%3]
				o := ask(client, n.addr, "", "plain", map[string]any{"op": fmt.Sprintf("%d-%d of %s", i, j, version), "nonce": "", "version": version, "delay": j % 6})
				switch {
				case o.err != nil:
					gone.Add(1)
					<-time.After(10 * time.Millisecond)
				case o.code == "" && version == "open":
					opened.Add(1)
				case o.code == "":
					done.Add(1)
				case o.code == "not_found" || o.code == "denied":
					denied.Add(1)
				case o.code != "unavailable":
					l.expect("E15", "a call ended as %s: %s", o.code, o.detail)
				}
			}
		})
	}
	wrong := broken(l)
	failed := func() error {
		for i := range 40 {
			bad := i%2 == 1
			text := versioned(l, valid[i/2%2], "")
			if bad {
				text = wrong[i/2%len(wrong)]
			}
			if err := set(text); err != nil {
				return err
			}
			switch i % 4 {
			case 0, 1: // a signal says nothing: the next order tells
				if err := n.Signal(syscall.SIGHUP); err != nil {
					return err
				}
			}
			if i%10 == 8 { // in the middle of it
				order := n.reloadCommand(l.host.Context())
				if err := order.Start(); err != nil {
					return err
				}
				<-time.After(time.Duration(r.IntN(12)) * time.Millisecond)
				n.Kill()
				_ = order.Wait() // what it saw does not matter
				kills.Add(1)
				l.incident("E15")
				if err := l.restart(n, r.IntN(2) == 0); err != nil {
					return err
				}
				continue
			}
			out, err := n.reload(startTime)
			if err != nil {
				return err
			}
			reloads.Add(1)
			if bad {
				refusals.Add(1)
			}
			if bad != (out == "refused") {
				l.expect("E15", "a configuration that is valid: %v, was %s", !bad, out)
			}
			<-time.After(time.Duration(50+r.IntN(100)) * time.Millisecond)
		}
		return nil
	}()
	close(stop)
	all.Wait()
	wait()
	l.incident("E15")
	if failed != nil {
		return failed
	}
	// Half a file is no start either: it says so and serves nothing.
	n.Kill()
	if err := errors.Join(set(wrong[3]), n.launch()); err != nil {
		return err
	}
	if !n.Ended(deathTime) {
		l.expect("E15", "it starts with half a configuration")
		n.Kill()
	}
	if err := set(versioned(l, "a", "")); err != nil {
		return err
	}
	if err := l.restart(n, false); err != nil {
		return err
	}
	mixed, err := l.marks()
	if err != nil {
		return err
	}
	if mixed > 0 {
		l.expect("E15", "%d calls were decided by one configuration and run by another", mixed)
	}
	if o := opened.Load(); o > 0 {
		l.expect("E15", "I9: %d calls were let through by a configuration that is wrong", o)
	}
	if done.Load() == 0 || denied.Load() == 0 || reloads.Load() == refusals.Load() {
		return fmt.Errorf("%d calls were done and %d denied in %d reloads: this shows nothing", done.Load(), denied.Load(), reloads.Load())
	}
	l.measure("E15", "mixed-version decisions %d, let through by a wrong configuration %d; %d reloads of which %d refused, %d kills in one; %d calls done, %d denied, %d cut off",
		mixed, opened.Load(), reloads.Load(), refusals.Load(), kills.Load(), done.Load(), denied.Load(), gone.Load())
	l.settleAll(n.addr, true)
	return nil
}

// reloadCommand is newel reload of a node.
func (n *node) reloadCommand(ctx context.Context) *exec.Cmd {
	return exec.CommandContext(ctx, n.binary, "reload", "--output", "json", "-c", filepath.Join(n.dir, "newel.yaml"))
}

// reload has the node load its configuration, and returns the outcome.
func (n *node) reload(most time.Duration) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), most)
	defer cancel()
	raw, err := n.reloadCommand(ctx).Output()
	var out struct {
		Outcome string `json:"outcome"`
	}
	if jsonErr := json.Unmarshal(raw, &out); jsonErr != nil {
		return "", errors.Join(err, jsonErr)
	}
	return out.Outcome, nil // a refusal is an exit code too
}

// marks counts the rows whose mark is not that of the version that was let through.
func (l *lane) marks() (mixed int, err error) {
	f, err := os.Open(l.ledgerFile())
	if err != nil {
		return 0, err
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		var r Row
		if err := json.Unmarshal(lines.Bytes(), &r); err != nil {
			return 0, err
		}
		if r.Version != "" && r.Mark != r.Version {
			mixed++
		}
	}
	return mixed, nil
}
