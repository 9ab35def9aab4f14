package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"time"
)

const idleSessionCount = 9_900 // below the 10,000 that a server keeps unless told otherwise

const (
	sessionRevision = "2025-11-25" // unless a server only speaks an older one
	initialize      = `{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":"%s","capabilities":{},"clientInfo":{"name":"newel-bench","version":"1.0.0"}}}`
)

// session begins one if the server is spoken to in sessions.
func (s *server) session(ctx context.Context) (string, error) {
	if !s.speaks.sessions {
		return "", nil
	}
	return s.openSession(ctx)
}

// idle is what one idle session of revision 2025-11-25 holds, in KiB.
type idle struct{ own, sdk float64 }

// idleSessions opens sessions that then do nothing, at a gateway and at the bare SDK, which keeps
// the sessions of both: the difference is what is Newel's own.
func (b *bench) idleSessions(ctx context.Context) (*idle, error) {
	// What is resident is then what is held, and not what was thrown away.
	if err := os.Setenv("GOGC", "5"); err != nil {
		return nil, err
	}
	defer os.Unsetenv("GOGC")
	defer b.stopAll()
	upstream, err := b.startOn(ctx, loadCPU, "newel")
	if err != nil {
		return nil, err
	}
	var out idle
	for _, one := range []struct {
		into *float64
		name string
		args []string
	}{{&out.sdk, "gosdk", []string{"-sessions"}}, {&out.own, "gateway", []string{"-upstream=http://" + upstream.addr + "/mcp"}}} {
		b.bar.step(fmt.Sprintf("%d idle sessions: %s", idleSessionCount, one.name))
		s, err := b.start(ctx, one.name, one.args...)
		if err != nil {
			return nil, err
		}
		for range 100 { // what the first sessions set up for all
			if _, err := s.openSession(ctx); err != nil {
				return nil, fmt.Errorf("%s: %w", one.name, err)
			}
		}
		before := s.memory("VmRSS")
		for range idleSessionCount - 100 {
			if _, err := s.openSession(ctx); err != nil {
				return nil, fmt.Errorf("%s: %w", one.name, err)
			}
		}
		*one.into = (s.memory("VmRSS") - before) * 1024 / (idleSessionCount - 100)
	}
	out.own -= out.sdk
	return &out, nil
}

// openSession begins a session, leaves it open and returns its id.
func (s *server) openSession(ctx context.Context) (string, error) {
	id, err := s.say(ctx, fmt.Sprintf(initialize, cmp.Or(s.speaks.older, sessionRevision)), "")
	if err != nil {
		return "", err
	}
	if id == "" {
		return "", errors.New("initialize began no session")
	}
	_, err = s.say(ctx, `{"jsonrpc":"2.0","method":"notifications/initialized"}`, id)
	return id, err
}

func (s *server) say(ctx context.Context, message, session string) (string, error) {
	ctx, stop := context.WithTimeout(ctx, 10*time.Second)
	defer stop()
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+s.addr+s.speaks.where(), bytes.NewReader([]byte(message)))
	if err != nil {
		return "", err
	}
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set("Accept", "application/json, text/event-stream")
	if session != "" {
		r.Header.Set("Mcp-Session-Id", session)
		r.Header.Set("MCP-Protocol-Version", cmp.Or(s.speaks.older, sessionRevision))
	}
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode/100 != 2 {
		err = fmt.Errorf("%s: %.300s", resp.Status, body)
	}
	return resp.Header.Get("Mcp-Session-Id"), err
}
