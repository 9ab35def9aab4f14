package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"
	"time"
)

// limitsOfSlow are short, so that one can wait for them.
const (
	limitsOfSlow = ", header_timeout: 2s, body_timeout: 6s, idle_timeout: 3s, write_timeout: 2s, max_connections_per_peer: 300"
	perPeer      = 300
)

// slow is E4: nobody may hold a connection for longer than it takes, nor more of them than one may.
func slow(ctx context.Context, s *stage) error {
	modes := []string{"drip", "drip-events", "silent"}
	if err := s.open(ctx, setting{limits: limitsOfSlow, backends: modes, of: ", call_timeout: 2s"}); err != nil {
		return err
	}
	n := s.neighbour(ctx)
	return n.during(ctx, func() error {
		kinds := []string{"slow:header", "slow:body", "slow:chunks", "slow:idle", "deaf", "calls:" + strings.Join(modes, ",")}
		longest := map[string]float64{"slow:header": 2, "slow:body": 1, "slow:chunks": 1, "slow:idle": 3, "deaf": 2 + 5}
		watched, end := s.watch(ctx, "newel_connections")
		reports, err := s.attacks(kinds, 10*time.Second)
		end()
		if err != nil {
			return err
		}
		s.figure("connections, most held", <-watched, perPeer+2*neighbours+callers, "")
		for _, kind := range kinds[:len(kinds)-1] {
			r := reports[kind]
			if r["cut"] == 0 {
				s.wrong("%s: no connection was closed: %v", kind, r)
			}
			// A beat to see it, and the deadline may begin with the last byte that was taken.
			s.figure(kind+", longest hold", r["held"], longest[kind]+2, "s")
		}
		if r := reports["calls:"+strings.Join(modes, ",")]; r["calls"] == 0 || r["succeeded"]+r["internal"] > 0 {
			s.wrong("calls of slow tools: %v", r)
		}
		return nil
	})
}

// attacks runs several at once.
func (s *stage) attacks(kinds []string, most time.Duration) (map[string]map[string]float64, error) {
	var waits []func() (map[string]float64, error)
	for _, kind := range kinds {
		wait, err := s.attack(kind, most)
		if err != nil {
			return nil, err
		}
		waits = append(waits, wait)
	}
	out := map[string]map[string]float64{}
	for i, wait := range waits {
		r, err := wait()
		if err != nil {
			return nil, err
		}
		out[kinds[i]] = r
	}
	return out, nil
}

// garbage is E5: an answer that is none is an error of that call.
func garbage(ctx context.Context, s *stage) error {
	modes := slices.Sorted(maps.Keys(garbageTools))
	if err := s.open(ctx, setting{backends: modes, of: ", call_timeout: 2s"}); err != nil {
		return err
	}
	n := s.neighbour(ctx)
	return n.during(ctx, func() error {
		for _, mode := range modes {
			times := 4
			if mode == late {
				times = 1
			}
			for i := range times {
				nonce := fmt.Sprintf("mine-%s-%d", mode, i)
				status, body, err := call(ctx, plain, s.addr, mode, `{"nonce":"`+nonce+`"}`)
				if err != nil || status == 0 || !isError(status, body) || strings.Contains(body, "of another") || strings.Contains(body, "internal error") {
					s.wrong("%s: %d %v %.200s", mode, status, err, body)
				}
			}
		}
		r, err := s.attacks([]string{"often:" + strings.Join(modes, ",")}, 4*time.Second)
		if err != nil {
			return err
		}
		for _, r := range r {
			if r["succeeded"]+r["internal"]+r["no answer"] > 0 || r["calls"] == 0 {
				s.wrong("calls that are answered with garbage: %v", r)
			}
		}
		return nil
	})
}

// endless is E6.
func endless(ctx context.Context, s *stage) error {
	var modes []string
	for mode := range endlessTools {
		if !strings.HasPrefix(mode, "drip") && mode != "silent" {
			modes = append(modes, mode)
		}
	}
	slices.Sort(modes)
	if err := s.open(ctx, setting{backends: append([]string{"cursor", "endless-list"}, modes...), of: ", call_timeout: 5s, refresh_interval: 1s, list_timeout: 1s"}); err != nil {
		return err
	}
	n := s.neighbour(ctx)
	return n.during(ctx, func() error {
		for _, mode := range modes {
			before, err := s.cpu()
			if err != nil {
				return err
			}
			at := time.Now()
			status, body, err := call(ctx, plain, s.addr, mode, `{"nonce":"x"}`)
			if err != nil || !isError(status, body) && mode != "bodies" || strings.Contains(body, "internal error") {
				s.wrong("%s: %d %v %.200s", mode, status, err, body)
			}
			after, err := s.cpu()
			if err != nil {
				return err
			}
			s.figure(mode+", time to its end", milliseconds(time.Since(at)), 0, "ms")
			s.figure(mode+", processor (with the neighbour's calls)", milliseconds(after-before), 0, "ms")
		}
		r, err := s.attacks([]string{"calls:" + strings.Join(modes, ",")}, 6*time.Second)
		if err != nil {
			return err
		}
		for _, r := range r {
			if r["internal"]+r["no answer"] > 0 || r["calls"] == 0 {
				s.wrong("calls without end: %v", r)
			}
		}
		return nil
	})
}

// bombs is E12, from clients: what one costs alone, then all of them beside the neighbour.
func bombs(ctx context.Context, s *stage) error {
	if err := s.open(ctx, setting{}); err != nil {
		return err
	}
	const times = 10
	for _, b := range theBombs() {
		before, err := s.cpu()
		if err != nil {
			return err
		}
		for range times {
			status, body, err := b.send(ctx, s.addr)
			if status != 0 && !b.refused(status, body) || status == 0 && b.body == nil && !strings.HasPrefix(b.name, "header") {
				s.wrong("%s: it is not refused: %d %v %.200s", b.name, status, err, body)
				break
			}
		}
		after, err := s.cpu()
		if err != nil {
			return err
		}
		s.figure(b.name+", processor for one", milliseconds((after-before)/times), milliseconds(cpuPerRefusal), "ms")
	}
	n := s.neighbour(ctx)
	return n.during(ctx, func() error {
		r, err := s.attacks([]string{"bombs"}, 6*time.Second)
		for name, v := range r["bombs"] {
			if strings.HasPrefix(name, "taken") {
				s.wrong("%s %v times", name, v)
			}
		}
		s.figure("bombs sent", r["bombs"]["sent"], 0, "")
		return err
	})
}

// listed is E12, from a server behind: its lists are read again and again.
func listed(ctx context.Context, s *stage) error {
	modes := slices.Sorted(maps.Keys(definitions))
	if err := s.open(ctx, setting{backends: modes, of: ", refresh_interval: 2s, call_timeout: 2s"}); err != nil {
		return err
	}
	start, err := s.cpu()
	if err != nil {
		return err
	}
	s.figure("start with the lists, processor", milliseconds(start), 0, "ms")
	n := s.neighbour(ctx)
	return n.during(ctx, func() error {
		r, err := post(ctx, s.addr, "tools/list", "", "")
		if err != nil {
			return err
		}
		resp, err := plain.Do(r)
		if err != nil {
			return err
		}
		list, err := io.ReadAll(io.LimitReader(resp.Body, 64<<20))
		if err := errors.Join(err, resp.Body.Close()); err != nil || resp.StatusCode != http.StatusOK {
			s.wrong("tools/list: %d %v", resp.StatusCode, err)
		}
		for name, want := range map[string]bool{"echo": true, "doubling": true, "doubling-down": true, "tool1": false, "subschemas": false, "repeats": false, "remote": false} {
			if got := bytes.Contains(list, []byte(`"name":"`+name+`"`)); got != want {
				s.wrong("tools/list: %s is there: %v", name, got)
			}
		}
		for mode, arguments := range map[string]string{
			"doubling":      `{"nonce":"x"}`,
			"doubling-down": `{"nonce":` + strings.Repeat(`{"c":`, 50) + `{}` + strings.Repeat(`}`, 51),
		} {
			const times = 5
			before, err := s.cpu()
			if err != nil {
				return err
			}
			for range times {
				if status, body, err := call(ctx, plain, s.addr, mode, arguments); err != nil || !isError(status, body) {
					s.wrong("%s: %d %v %.200s", mode, status, err, body)
				}
			}
			after, err := s.cpu()
			if err != nil {
				return err
			}
			s.figure(mode+", processor for one", milliseconds((after-before)/times), 0, "ms")
		}
		<-time.After(3 * time.Second)
		return nil
	})
}
