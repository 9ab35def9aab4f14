package assembly

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel/metric"
)

// Connections bound what one client, and all together, may hold of the HTTP server. Zero means the
// default in brackets; below zero is refused.
type Connections struct {
	Max     int           // open connections [20,000]
	PerPeer int           // of one address; the proxies in front and this machine's own are not counted [2,000]
	Header  time.Duration // until the headers of a request are there [10 s]
	Body    time.Duration // until the whole request is there [60 s]
	Idle    time.Duration // until the next request begins [120 s]
	Write   time.Duration // until 64 KiB of an answer are taken [30 s]
}

func (c Connections) withDefaults() (Connections, error) {
	if min(c.Max, c.PerPeer) < 0 || min(c.Header, c.Body, c.Idle, c.Write) < 0 {
		return c, errors.New("a limit of connections is below zero")
	}
	return Connections{
		Max: cmp.Or(c.Max, 20_000), PerPeer: cmp.Or(c.PerPeer, 2000),
		Header: cmp.Or(c.Header, 10*time.Second), Body: cmp.Or(c.Body, time.Minute), Idle: cmp.Or(c.Idle, 2*time.Minute), Write: cmp.Or(c.Write, 30*time.Second),
	}, nil
}

// guarded is a listener that accepts so many connections, so many of one address, and has each of them
// cut when its client does not read. What is over a bound is closed at once: it costs no goroutine.
type guarded struct {
	net.Listener
	o       Connections
	proxies []netip.Prefix
	log     *slog.Logger
	turned  atomic.Int64 // connections that were closed at once
	warned  atomic.Int64 // when that was last said, in unix nanoseconds

	mu      sync.Mutex // guards what is below
	open    int
	perPeer map[netip.Addr]int
}

func newGuarded(l net.Listener, o Connections, proxies []netip.Prefix, log *slog.Logger) *guarded {
	return &guarded{Listener: l, o: o, proxies: proxies, log: log, perPeer: map[netip.Addr]int{}}
}

// measure has metrics of it made.
func (g *guarded) measure(m metric.Meter) error {
	_, err := m.Int64ObservableUpDownCounter("newel.connections", metric.WithDescription("Open connections of the HTTP server."),
		metric.WithInt64Callback(func(_ context.Context, o metric.Int64Observer) error {
			g.mu.Lock()
			defer g.mu.Unlock()
			o.Observe(int64(g.open))
			return nil
		}))
	_, err2 := m.Int64ObservableCounter("newel.connections.refused", metric.WithDescription("Connections that were closed at once, over a limit of connections."),
		metric.WithInt64Callback(func(_ context.Context, o metric.Int64Observer) error {
			o.Observe(g.turned.Load())
			return nil
		}))
	return errors.Join(err, err2)
}

// Accept implements net.Listener.
func (g *guarded) Accept() (net.Conn, error) {
	for {
		c, err := g.Listener.Accept()
		if err != nil {
			return nil, err
		}
		peer, counted := g.peerOf(c)
		if why := g.enter(peer, counted); why != "" {
			_ = c.Close() // nobody was promised anything
			g.turned.Add(1)
			g.say(c, why)
			continue
		}
		return &guardedConn{Conn: c, g: g, peer: peer, counted: counted}, nil
	}
}

// peerOf returns the address of a client, and whether it stands for one client.
func (g *guarded) peerOf(c net.Conn) (netip.Addr, bool) {
	a, err := netip.ParseAddrPort(c.RemoteAddr().String())
	if err != nil {
		return netip.Addr{}, true
	}
	ip := a.Addr().Unmap().WithZone("")
	for _, p := range g.proxies {
		if p.Contains(ip) {
			return ip, false
		}
	}
	return ip, g.proxies == nil || !ip.IsLoopback()
}

func (g *guarded) enter(peer netip.Addr, counted bool) (why string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.open >= g.o.Max {
		return "limits.max_connections"
	}
	if counted {
		if g.perPeer[peer] >= g.o.PerPeer {
			return "limits.max_connections_per_peer"
		}
		g.perPeer[peer]++
	}
	g.open++
	return ""
}

func (g *guarded) leave(peer netip.Addr, counted bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.open--
	if counted {
		if g.perPeer[peer]--; g.perPeer[peer] == 0 {
			delete(g.perPeer, peer)
		}
	}
}

// say logs that connections are refused, at most every ten seconds.
func (g *guarded) say(c net.Conn, limit string) {
	now, last := time.Now().UnixNano(), g.warned.Load()
	if now-last < int64(10*time.Second) || !g.warned.CompareAndSwap(last, now) {
		return
	}
	g.log.LogAttrs(context.Background(), slog.LevelWarn, "connections are refused", slog.String("limit", limit), slog.String("peer", c.RemoteAddr().String()), slog.Int64("refused", g.turned.Load()))
}

// guardedConn is a connection with a deadline for everything that is written: also for what no handler
// thinks of, such as small answers that add up because nobody reads them.
type guardedConn struct {
	net.Conn
	g       *guarded
	peer    netip.Addr
	counted bool
	own     atomic.Bool // a deadline of the handler's own counts
	closed  atomic.Bool
}

// writeStep is what has to be taken within the time of one write: a slow reader of a large answer is
// no stuck one.
const writeStep = 64 << 10

// Write implements net.Conn.
func (c *guardedConn) Write(b []byte) (n int, err error) {
	for {
		if !c.own.Load() {
			if err := c.Conn.SetWriteDeadline(time.Now().Add(c.g.o.Write)); err != nil {
				return n, err
			}
		}
		m, err := c.Conn.Write(b[n:min(len(b), n+writeStep)])
		if n += m; err != nil || n == len(b) {
			return n, err
		}
	}
}

// SetWriteDeadline implements net.Conn. The zero time leaves the connection to its own deadline again.
func (c *guardedConn) SetWriteDeadline(t time.Time) error {
	c.own.Store(!t.IsZero())
	return c.Conn.SetWriteDeadline(t)
}

// SetDeadline implements net.Conn.
func (c *guardedConn) SetDeadline(t time.Time) error {
	c.own.Store(!t.IsZero())
	return c.Conn.SetDeadline(t)
}

// CloseWrite lets the server say that it has said all before it stops listening.
func (c *guardedConn) CloseWrite() error {
	if half, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return nil
}

// Close implements net.Conn.
func (c *guardedConn) Close() error {
	if c.closed.CompareAndSwap(false, true) {
		c.g.leave(c.peer, c.counted)
	}
	return c.Conn.Close()
}
