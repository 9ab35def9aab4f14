package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

const idleStreamCount = 10_000

// spareFiles are the descriptors of a process beside its streams.
const spareFiles = 100

// streams is what one open stream on which nothing happens takes, in KiB resident: what a session
// of revision 2025-11-25 listens on (with its session), and a subscription of 2026-07-28. Right after
// all were opened that has room for what the collector has not looked at yet in it; held has not.
type streams struct {
	count                         int // opened of each
	session, subscription         float64
	sessionHeld, subscriptionHeld float64
}

// idleStreams opens streams at Newel and asks what each took.
func (b *bench) idleStreams(ctx context.Context, quick bool) (*streams, error) {
	var files unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &files); err != nil {
		return nil, err
	}
	files.Cur = files.Max // for this process and the servers that it starts
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &files); err != nil {
		return nil, err
	}
	out := &streams{count: idleStreamCount}
	if quick {
		out.count /= 5
	}
	if files.Max < uint64(out.count+spareFiles) {
		return nil, fmt.Errorf("%d streams need as many open files, and the limit is %d: raise it (ulimit -Hn)", out.count, files.Max)
	}
	for _, as := range []struct {
		gogc                  string // of the server; "": as it is
		session, subscription *float64
	}{{"", &out.session, &out.subscription}, {"5", &out.sessionHeld, &out.subscriptionHeld}} {
		if as.gogc != "" {
			if err := os.Setenv("GOGC", as.gogc); err != nil {
				return nil, err
			}
			defer os.Unsetenv("GOGC")
		}
		var err error
		if *as.session, err = b.holding(ctx, out.count, "listening sessions", (*server).openListening); err != nil {
			return nil, err
		}
		if *as.subscription, err = b.holding(ctx, out.count, "subscriptions", (*server).openSubscription); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// holding opens n streams at a server and returns what each holds, in KiB.
func (b *bench) holding(ctx context.Context, n int, what string, open func(*server, context.Context) (io.Closer, error)) (float64, error) {
	defer b.stopAll()
	b.bar.step(fmt.Sprintf("%d idle %s", n, what))
	s, err := b.start(ctx, "newel")
	if err != nil {
		return 0, err
	}
	const first = 100 // what these set up is for all
	var before float64
	for i := range n {
		if i == first {
			before = s.memory("VmRSS")
		}
		c, err := open(s, ctx)
		if err != nil {
			return 0, fmt.Errorf("%s, number %d: %w", what, i+1, err)
		}
		defer c.Close()
	}
	if err := s.ask(ctx, echoRequest()); err != nil {
		return 0, fmt.Errorf("a call beside %d %s: %w", n, what, err)
	}
	return (s.memory("VmRSS") - before) * 1024 / float64(n-first), nil
}

// openListening begins a session and the stream on which the server may speak.
func (s *server) openListening(ctx context.Context) (io.Closer, error) {
	id, err := s.openSession(ctx)
	if err != nil {
		return nil, err
	}
	return s.stream(ctx, fmt.Appendf(nil, "GET /mcp HTTP/1.1\r\nHost: %s\r\nAccept: text/event-stream\r\n"+
		"MCP-Protocol-Version: 2025-11-25\r\nMcp-Session-Id: %s\r\n\r\n", s.addr, id), "")
}

// openSubscription opens a subscription and waits until it is acknowledged.
func (s *server) openSubscription(ctx context.Context) (io.Closer, error) {
	r := request{method: "subscriptions/listen", params: `"notifications":{"toolsListChanged":true}`}
	raw, _ := r.message(s, "")
	return s.stream(ctx, raw, "notifications/subscriptions/acknowledged")
}

// stream sends a request and returns once its answer is a stream, and said the word.
func (s *server) stream(ctx context.Context, raw []byte, word string) (io.Closer, error) {
	nc, err := dialer.DialContext(ctx, "tcp", s.addr)
	if err != nil {
		return nil, err
	}
	if err := nc.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return nc, err
	}
	if _, err := nc.Write(raw); err != nil {
		return nc, err
	}
	var said []byte
	buf := make([]byte, 4<<10)
	for !bytes.Contains(said, []byte("\r\n\r\n")) || !bytes.Contains(said, []byte(word)) {
		n, err := nc.Read(buf)
		if err != nil {
			return nc, fmt.Errorf("%w after %.300q", err, said)
		}
		said = append(said, buf[:n]...)
	}
	if !bytes.HasPrefix(said, []byte("HTTP/1.1 200 ")) || !bytes.Contains(said, []byte("text/event-stream")) {
		return nc, fmt.Errorf("no stream: %.300q", said)
	}
	return nc, nil
}
