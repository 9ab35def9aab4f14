package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/redis/go-redis/v9"

	"newel.dev/newel/test/engines"
)

// The quota of the scenario.
const (
	quotaRate  = 40 // a second
	quotaBurst = 8
)

// An admission is a call that was let through.
type admission struct{ from, to time.Time }

// quotaStoreGoes has the Redis that two nodes count in go away, hang, and come and go. Both nodes are
// asked for far more than the quota, all the time, by clients that do not wait as they are told.
func quotaStoreGoes(l *lane) error {
	a, b := l.nodes[0], l.nodes[1]
	server := engines.Redis(l.host)
	pid, err := processOf(l.host.Context(), server.URL)
	if err != nil {
		return err
	}
	for _, n := range []*node{a, b} {
		n.env = append(n.env, "NEWEL_FAULTS_REDIS="+server.URL)
		if err := l.rewrite(n, fmt.Sprintf(`redis: {url: "${env:NEWEL_FAULTS_REDIS}"}
quotas:
  share_without_redis: 0.5
  rules:
    - {name: all, tools: [find], rate: %d/s, burst: %d}
backends:
%s`, quotaRate, quotaBurst, backend("ledger", l.ledgers, ""))); err != nil {
			return err
		}
		if err := n.up(); err != nil {
			return err
		}
	}
	var mu sync.Mutex
	var admitted []admission
	asked, refusals := 0, 0
	stop := make(chan struct{})
	var all sync.WaitGroup
	for _, n := range []*node{a, b} {
		for range 6 {
			all.Go(func() {
				for {
					select {
					case <-stop:
						return
					case <-time.After(8 * time.Millisecond):
					}
					from := time.Now()
					r := ask(kept, n.addr, "", "find", map[string]any{"operation": "x"})
					mu.Lock()
					asked++
					switch {
					case r.code == "" && r.err == nil:
						admitted = append(admitted, admission{from, time.Now()})
					case r.code == "exhausted" && r.retryable && r.after > 0:
						refusals++
					default:
						l.expect("E17", "a call over the quota ended as %+v", r)
					}
					mu.Unlock()
				}
			})
		}
	}
	over, worst, late := 0, 0.0, 0
	// phase lets d pass and counts the calls that were let through within it. changes are how often the
	// store came or went: what a node grants by itself and what all grant together have a burst each.
	// While it is there, a loaded machine may have it answer too late: that is a change too, and logged.
	phase := func(what string, changes int, there bool, f func() error) error {
		fell, err := fallbacks(a, b)
		if err != nil {
			return err
		}
		from := time.Now()
		if err := f(); err != nil {
			return err
		}
		to := time.Now()
		<-time.After(50 * time.Millisecond) // for those that are under way to be counted or not
		if now, err := fallbacks(a, b); err != nil {
			return err
		} else if there {
			changes += now - fell
			late += now - fell
		}
		mu.Lock()
		defer mu.Unlock()
		n := 0
		for _, c := range admitted {
			if c.from.After(from) && c.to.Before(to) {
				n++
			}
		}
		most := quotaBurst*(1+changes) + int(quotaRate*to.Sub(from).Seconds()) + 1
		worst = max(worst, float64(n)/float64(most))
		if n > most {
			over += n - most
			l.expect("E17", "%s: %d calls were let through in %v, and %d may be", what, n, to.Sub(from).Round(time.Millisecond), most)
		}
		if least := int(quotaRate * to.Sub(from).Seconds() / 4); n < least {
			l.expect("E17", "%s: only %d calls were let through in %v: a quota is not a wall", what, n, to.Sub(from).Round(time.Millisecond))
		}
		l.incident("E17")
		return nil
	}
	pass := func(d time.Duration) func() error { return func() error { <-time.After(d); return nil } }
	failed := func() error {
		if err := phase("with Redis", 0, true, pass(1500*time.Millisecond)); err != nil {
			return err
		}
		server.Stop()
		if err := phase("without Redis", 0, false, pass(2500*time.Millisecond)); err != nil {
			return err
		}
		server.Restart(l.host)
		if pid, err = processOf(l.host.Context(), server.URL); err != nil {
			return err
		}
		if err := phase("as Redis comes back", 1, true, pass(1500*time.Millisecond)); err != nil {
			return err
		}
		if err := phase("with Redis again", 0, true, pass(1500*time.Millisecond)); err != nil {
			return err
		}
		if err := halt(pid); err != nil {
			return err
		}
		defer func() { _ = syscall.Kill(pid, syscall.SIGCONT) }() // it may run
		if err := phase("while Redis hangs", 0, false, pass(2500*time.Millisecond)); err != nil {
			return err
		}
		const flaps = 6
		return phase("while Redis comes and goes", flaps, false, func() error {
			for i := range flaps {
				sig := []syscall.Signal{syscall.SIGCONT, syscall.SIGSTOP}[i%2]
				if err := syscall.Kill(pid, sig); err != nil {
					return err
				}
				<-time.After(time.Duration(200+l.rand.IntN(1000)) * time.Millisecond)
			}
			return nil
		})
	}()
	close(stop)
	all.Wait()
	if failed != nil {
		return failed
	}
	if refusals < asked/4 {
		return fmt.Errorf("%d of %d calls were refused: this shows nothing", refusals, asked)
	}
	l.measure("E17", "requests over quota %d; %d calls of two nodes, %d let through; the fullest phase had %.0f %% of what it may; a node fell back %d times while Redis was there", over, asked, asked-refusals, 100*worst, late)
	return nil
}

// fallbacks returns how often nodes have granted their share because the store did not answer.
func fallbacks(nodes ...*node) (n int, err error) {
	for _, one := range nodes {
		b, err := os.ReadFile(one.log.Name())
		if err != nil {
			return 0, err
		}
		n += bytes.Count(b, []byte("quotas cannot be counted for all nodes"))
	}
	return n, nil
}

// processOf returns the id of the process of a Redis server.
func processOf(ctx context.Context, url string) (int, error) {
	o, err := redis.ParseURL(url)
	if err != nil {
		return 0, err
	}
	c := redis.NewClient(o)
	defer c.Close()
	info, err := c.Info(ctx, "server").Result()
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(info) {
		if id, ok := strings.CutPrefix(line, "process_id:"); ok {
			return strconv.Atoi(strings.TrimSpace(id))
		}
	}
	return 0, fmt.Errorf("the server at %s does not say which process it is", o.Addr)
}
