package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
)

// A runner loads one server over connections that stay open. The loop is closed: a connection
// sends its next request when it has the answer to the last one, so latencies at full load are
// mostly waiting in line.
type runner struct {
	server   *server
	requests []request
	conns    []*conn
	nextID   atomic.Int64
}

// A conn is one connection with its requests ready to send.
type conn struct {
	net.Conn
	in       *bufio.Reader
	body, id []byte
	messages []message
	took     []time.Duration
}

type message struct {
	raw []byte
	id  int // where in raw
}

// measurement is one server in one round.
type measurement struct {
	calls    int
	seconds  float64
	cpu      float64 // µs a call
	p50, p99 time.Duration
}

// newRunner connects, and learns the right answers from checked ones.
func newRunner(ctx context.Context, s *server, conns int, requests []request) (*runner, error) {
	r := &runner{server: s, requests: slices.Clone(requests)}
	r.nextID.Store(firstID)
	for i := range r.requests {
		if _, err := s.answer(ctx, &r.requests[i]); err != nil {
			return nil, err
		}
	}
	for range conns {
		c, err := dial(ctx, s.addr)
		if err != nil {
			return nil, err
		}
		session, err := s.session(ctx)
		if err != nil {
			return nil, err
		}
		for i := range r.requests {
			raw, id := r.requests[i].message(s, session)
			c.messages = append(c.messages, message{raw, id})
		}
		r.conns = append(r.conns, c)
	}
	return r, nil
}

var dialer net.Dialer

func dial(ctx context.Context, addr string) (*conn, error) {
	nc, err := dialer.DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	return &conn{Conn: nc, in: bufio.NewReaderSize(nc, 64<<10)}, nil
}

// ask sends one request on a connection of its own and checks the answer.
func (s *server) ask(ctx context.Context, r request) error {
	_, err := s.answer(ctx, &r)
	return err
}

func (s *server) answer(ctx context.Context, r *request) ([]byte, error) {
	c, err := dial(ctx, s.addr)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	session, err := s.session(ctx)
	if err != nil {
		return nil, err
	}
	raw, _ := r.message(s, session)
	if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return nil, err
	}
	if _, err := c.Write(raw); err != nil {
		return nil, err
	}
	if err := c.read(); err != nil {
		return nil, err
	}
	return c.body, r.learn(c.body, firstID)
}

// measure runs one round: warm-up, then the window that counts.
func (r *runner) measure(ctx context.Context, warmup, window time.Duration) (measurement, error) {
	if err := r.load(ctx, warmup); err != nil {
		return measurement{}, err
	}
	cpu0, err := r.server.cpu()
	if err != nil {
		return measurement{}, err
	}
	began := time.Now()
	if err := r.load(ctx, window); err != nil {
		return measurement{}, err
	}
	took := time.Since(began)
	cpu1, err := r.server.cpu()
	if err != nil {
		return measurement{}, err
	}
	var all []time.Duration
	for _, c := range r.conns {
		all = append(all, c.took...)
	}
	if len(all) == 0 {
		return measurement{}, errors.New("no call was answered in the window")
	}
	slices.Sort(all)
	return measurement{
		calls: len(all), seconds: took.Seconds(),
		cpu: float64((cpu1 - cpu0).Nanoseconds()) / 1e3 / float64(len(all)),
		p50: all[len(all)/2], p99: all[len(all)*99/100],
	}, nil
}

// load keeps every connection busy for d.
func (r *runner) load(ctx context.Context, d time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	var all sync.WaitGroup
	problems := make([]error, len(r.conns))
	for i, c := range r.conns {
		all.Go(func() {
			problems[i] = r.keepBusy(ctx, c)
		})
	}
	all.Wait()
	if err := context.Cause(ctx); errors.Is(err, context.Canceled) {
		return err
	}
	return errors.Join(problems...)
}

func (r *runner) keepBusy(ctx context.Context, c *conn) error {
	c.took = c.took[:0]
	if err := c.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
		return err
	}
	for n := 0; ctx.Err() == nil; n++ {
		began := time.Now()
		if err := r.exchange(c, n); err != nil {
			return err
		}
		c.took = append(c.took, time.Since(began))
	}
	return nil
}

// exchange sends the n-th request on a connection and checks the answer.
func (r *runner) exchange(c *conn, n int) error {
	at := n % len(c.messages)
	m := c.messages[at]
	c.id = strconv.AppendInt(c.id[:0], r.nextID.Add(1), 10)
	copy(m.raw[m.id:m.id+idWidth], c.id)
	if _, err := c.Write(m.raw); err != nil {
		return err
	}
	if err := c.read(); err != nil {
		return err
	}
	if !r.requests[at].right(c.body, c.id) {
		return fmt.Errorf("an answer differs from the checked one: %.300q", c.body)
	}
	return nil
}

// reopen connects again: servers close connections on which nothing happens for some seconds.
func (r *runner) reopen(ctx context.Context) error {
	r.close()
	for _, c := range r.conns {
		fresh, err := dial(ctx, r.server.addr)
		if err != nil {
			return err
		}
		c.Conn, c.in = fresh.Conn, fresh.in
	}
	return nil
}

func (r *runner) close() {
	for _, c := range r.conns {
		_ = c.Close() // nothing is in flight
	}
}

// read reads one answer into c.body. It understands what the measured servers send and no more.
func (c *conn) read() error {
	line, err := c.line()
	if err != nil {
		return err
	}
	status := string(line)
	length, chunked, stream := -1, false, false
	for {
		line, err := c.line()
		if err != nil {
			return err
		}
		if len(line) == 0 {
			break
		}
		name, value, _ := bytes.Cut(line, []byte(": "))
		switch {
		case bytes.EqualFold(name, []byte("Content-Length")):
			if length, err = strconv.Atoi(string(value)); err != nil {
				return err
			}
		case bytes.EqualFold(name, []byte("Transfer-Encoding")):
			chunked = true
		case bytes.EqualFold(name, []byte("Content-Type")):
			stream = bytes.HasPrefix(value, []byte("text/event-stream"))
		}
	}
	c.body = c.body[:0]
	switch {
	case chunked:
		err = c.chunks()
	case length >= 0:
		err = c.take(length)
	default:
		err = errors.New("an answer without a length")
	}
	if err != nil {
		return err
	}
	if status != "HTTP/1.1 200 OK" {
		return fmt.Errorf("%s: %.300s", status, c.body)
	}
	c.body = bytes.TrimRight(c.body, "\r\n")
	if i := bytes.LastIndex(c.body, []byte("\ndata: ")); stream && i >= 0 {
		c.body = append(c.body[:0], c.body[i+len("\ndata: "):]...) // the last event is the answer
	}
	return nil
}

func (c *conn) chunks() error {
	for {
		line, err := c.line()
		if err != nil {
			return err
		}
		size, err := strconv.ParseUint(string(line), 16, 31)
		if err != nil {
			return err
		}
		if err := c.take(int(size)); err != nil {
			return err
		}
		if _, err := c.in.Discard(2); err != nil {
			return err
		}
		if size == 0 {
			return nil
		}
	}
}

// take appends n bytes to the body.
func (c *conn) take(n int) error {
	have := len(c.body)
	c.body = slices.Grow(c.body, n)[:have+n]
	_, err := io.ReadFull(c.in, c.body[have:])
	return err
}

func (c *conn) line() ([]byte, error) {
	line, err := c.in.ReadSlice('\n')
	if err != nil {
		return nil, err
	}
	return bytes.TrimRight(line, "\r\n"), nil
}
