package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// What a proxy does to a connection.
const (
	swallow   = "lost"       // bytes go nowhere, and nobody is told
	reset     = "reset"      // the connection ends as if a machine had crashed (RST)
	halfClose = "half close" // one direction ends in order, the other stays open
)

// A proxy stands between newel and an upstream. It breaks one connection at a time: the one that is
// the first to send its nth byte in a direction.
type proxy struct {
	listener net.Listener
	to       string

	mu    sync.Mutex // guards what is below
	what  string     // fault that is planned, or ""
	up    bool       // of what newel sends, not of the answer
	after int        // bytes that pass before
	hit   int        // faults that happened
	conns map[net.Conn]struct{}
	down  bool
}

// newProxy starts one; it ends with the lane.
func newProxy(addr, to string) (*proxy, error) {
	listener, err := (&net.ListenConfig{}).Listen(context.Background(), "tcp", addr)
	if err != nil {
		return nil, err
	}
	p := &proxy{listener: listener, to: to, conns: map[net.Conn]struct{}{}}
	go p.serve()
	return p, nil
}

func (p *proxy) addr() string { return p.listener.Addr().String() }

func (p *proxy) serve() {
	for {
		c, err := p.listener.Accept()
		if err != nil {
			return
		}
		go p.join(c)
	}
}

// close ends the proxy and its connections.
func (p *proxy) close() {
	_ = p.listener.Close()
	p.cut()
}

// cut ends all connections.
func (p *proxy) cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for c := range p.conns {
		_ = c.Close()
	}
	clear(p.conns)
}

// plan breaks the next connection after that many bytes in a direction; "" breaks none.
func (p *proxy) plan(what string, up bool, after int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.what, p.up, p.after = what, up, after
}

// happened reports whether the plan was carried out.
func (p *proxy) happened() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.what == ""
}

// refuse ends all connections and takes no others, or takes them again.
func (p *proxy) refuse(all bool) {
	p.mu.Lock()
	p.down = all
	p.mu.Unlock()
	if all {
		p.cut()
	}
}

func (p *proxy) join(c net.Conn) {
	p.mu.Lock()
	down := p.down
	p.mu.Unlock()
	if down {
		crash(c)
		return
	}
	to, err := net.Dial("tcp", p.to)
	if err != nil {
		crash(c)
		return
	}
	p.mu.Lock()
	p.conns[c], p.conns[to] = struct{}{}, struct{}{}
	p.mu.Unlock()
	var both sync.WaitGroup
	both.Go(func() { p.copy(to, c, true) })
	both.Go(func() { p.copy(c, to, false) })
	both.Wait()
	_, _ = c.Close(), to.Close()
	p.mu.Lock()
	delete(p.conns, c)
	delete(p.conns, to)
	p.mu.Unlock()
}

// crash ends a connection with RST.
func crash(c net.Conn) {
	if tcp, ok := c.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0)
	}
	_ = c.Close()
}

// copy passes bytes on in one direction, and breaks what is planned.
func (p *proxy) copy(to, from net.Conn, up bool) {
	buf := make([]byte, 2<<10)
	for {
		n, err := from.Read(buf)
		pass, what := p.due(up, n)
		if pass > 0 {
			if _, err := to.Write(buf[:pass]); err != nil {
				return
			}
		}
		switch what {
		case swallow:
			_, _ = io.Copy(io.Discard, from)
			return
		case reset:
			crash(to)
			crash(from)
			return
		}
		if what == halfClose || err != nil {
			if tcp, ok := to.(*net.TCPConn); ok {
				_ = tcp.CloseWrite()
			}
			if what == halfClose {
				_, _ = io.Copy(io.Discard, from)
			}
			return
		}
	}
}

// due says how many of n bytes pass, and what happens then.
func (p *proxy) due(up bool, n int) (pass int, what string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.what == "" || p.up != up {
		return n, ""
	}
	if n < p.after {
		p.after -= n
		return n, ""
	}
	pass, what = p.after, p.what
	p.what = ""
	p.hit++
	return pass, what
}

// names is a name server: it answers every question about addresses with what it is told to.
type names struct {
	conn    net.PacketConn
	answers atomic.Pointer[answers]
	asked   atomic.Int64
}

type answers struct {
	code  dnsmessage.RCode
	quiet bool // it does not answer
	turns [][]netip.Addr
	next  atomic.Int64
}

func newNames() (*names, error) {
	conn, err := (&net.ListenConfig{}).ListenPacket(context.Background(), "udp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	s := &names{conn: conn}
	go s.serve()
	return s, nil
}

// say sets what is answered from now on: one of turns after the other, and again.
func (s *names) say(code dnsmessage.RCode, turns ...[]netip.Addr) {
	s.answers.Store(&answers{code: code, turns: turns})
}

func (s *names) serve() {
	buf := make([]byte, 512)
	for {
		n, from, err := s.conn.ReadFrom(buf)
		if err != nil {
			return
		}
		var m dnsmessage.Message
		a := s.answers.Load()
		if m.Unpack(buf[:n]) != nil || len(m.Questions) != 1 || a == nil || a.quiet {
			continue
		}
		q := m.Questions[0]
		m.Response, m.RCode, m.Additionals = true, a.code, nil
		if q.Type == dnsmessage.TypeA && len(a.turns) > 0 {
			s.asked.Add(1)
			turn := a.turns[(a.next.Add(1)-1)%int64(len(a.turns))]
			for _, ip := range turn {
				h := dnsmessage.ResourceHeader{Name: q.Name, Class: dnsmessage.ClassINET, TTL: 0}
				if ip.Is4() {
					m.Answers = append(m.Answers, dnsmessage.Resource{Header: h, Body: &dnsmessage.AResource{A: ip.As4()}})
				}
			}
		}
		if q.Type == dnsmessage.TypeAAAA && len(a.turns) > 0 { // of the turn that A gets, as the two come together
			for _, ip := range a.turns[a.next.Load()%int64(len(a.turns))] {
				if ip.Is6() {
					m.Answers = append(m.Answers, dnsmessage.Resource{Header: dnsmessage.ResourceHeader{Name: q.Name, Class: dnsmessage.ClassINET}, Body: &dnsmessage.AAAAResource{AAAA: ip.As16()}})
				}
			}
		}
		if b, err := m.Pack(); err == nil {
			_, _ = s.conn.WriteTo(b, from)
		}
	}
}

// trap listens where nobody may connect, and counts who does.
func trap(addr string, count *atomic.Int64) (io.Closer, error) {
	listener, err := (&net.ListenConfig{}).Listen(context.Background(), "tcp", addr)
	if err != nil {
		return nil, err
	}
	go func() {
		for {
			c, err := listener.Accept()
			if err != nil {
				return
			}
			count.Add(1)
			_ = c.Close()
		}
	}()
	return listener, nil
}

// The network of the scenario: all of it is loopback, of which the configuration allows one address.
const (
	allowedHost = "127.0.0.2"
	hostileHost = "127.0.0.3"
)

// networkBreaks breaks connections to an upstream at any byte in both directions, and has its name
// resolve to nothing, to nobody and to somebody else.
func networkBreaks(l *lane) error {
	n := l.nodes[0]
	p, err := newProxy(allowedHost+":0", l.ledgers)
	if err != nil {
		return err
	}
	defer p.close()
	dns, err := newNames()
	if err != nil {
		return err
	}
	defer dns.conn.Close()
	_, port, err := net.SplitHostPort(p.addr())
	if err != nil {
		return err
	}
	var hostile atomic.Int64
	for _, host := range []string{hostileHost, "127.0.0.1", "::1"} {
		t, err := trap(net.JoinHostPort(host, port), &hostile)
		if err != nil {
			if host == "::1" {
				continue // a machine without IPv6
			}
			return err
		}
		defer t.Close()
	}
	good := []netip.Addr{netip.MustParseAddr(allowedHost)}
	dns.say(dnsmessage.RCodeSuccess, good)
	n.env = append(n.env, "NEWEL_FAULTS_DNS="+dns.conn.LocalAddr().String())
	if err := l.rewrite(n, "backends:\n"+backend("ledger", "ledger.test:"+port, ", private_ranges: ["+allowedHost+"/32], call_timeout: 700ms, connect_timeout: 2s")); err != nil {
		return err
	}
	if err := l.restart(n, false); err != nil {
		return err
	}
	if err := l.breaks(n, p); err != nil {
		return err
	}
	return l.flips(n, p, dns, &hostile)
}

// breaks breaks connections at any byte.
func (l *lane) breaks(n *node, p *proxy) error {
	seen := map[string]int{}
	for i := range 24 {
		what := []string{swallow, reset, halfClose}[i%3]
		up := i/3%2 == 0
		o := l.operation([]string{"plain", "resend", "lookup"}[i/6%3])
		length := 900
		if up {
			o.Args.Pad = strings.Repeat("p", 4000)
			length = 5000
		} else {
			largeAnswer(l, o)
			length = 100_000
		}
		l.touched(o, "E14")
		after := l.rand.IntN(length)
		if what == halfClose && up {
			after = 1500 + l.rand.IntN(3000) // in the body: of half a header the ledger would say that it is bad
		}
		p.plan(what, up, after)
		l.try(o, n.addr, way{})
		if p.happened() {
			seen[what]++
		}
		p.plan("", false, 0)
		p.cut() // what hangs, hangs no longer
		l.incident("E14")
		o.Broken = time.Now()
		for !l.settle(o, n.addr) {
			<-time.After(20 * time.Millisecond)
		}
		if l.stuck {
			return nil
		}
	}
	for _, what := range []string{swallow, reset, halfClose} {
		if seen[what] == 0 {
			return fmt.Errorf("no connection was broken (%s)", what)
		}
	}
	l.measure("E14", "connections broken at any byte: %d lost, %d reset, %d half closed", seen[swallow], seen[reset], seen[halfClose])
	return nil
}

// flips has the name of the upstream resolve to something else for each connection.
func (l *lane) flips(n *node, p *proxy, dns *names, hostile *atomic.Int64) error {
	addrs := func(texts ...string) (out []netip.Addr) {
		for _, t := range texts {
			out = append(out, netip.MustParseAddr(t))
		}
		return out
	}
	good := addrs(allowedHost)
	flips := []struct {
		what  string
		code  dnsmessage.RCode
		turns [][]netip.Addr
	}{
		{"no such name", dnsmessage.RCodeNameError, nil},
		{"the name server fails", dnsmessage.RCodeServerFailure, nil},
		{"private", dnsmessage.RCodeSuccess, [][]netip.Addr{addrs(hostileHost)}},
		{"allowed, then private", dnsmessage.RCodeSuccess, [][]netip.Addr{good, addrs(hostileHost)}},
		{"private, then allowed", dnsmessage.RCodeSuccess, [][]netip.Addr{addrs(hostileHost), good}},
		{"both at once", dnsmessage.RCodeSuccess, [][]netip.Addr{addrs(hostileHost, allowedHost, "127.0.0.1")}},
		{"IPv6", dnsmessage.RCodeSuccess, [][]netip.Addr{addrs("::1", "::ffff:127.0.0.3")}},
		{"metadata", dnsmessage.RCodeSuccess, [][]netip.Addr{addrs("169.254.169.254")}},
	}
	tried := 0
	for _, f := range flips {
		dns.say(f.code, f.turns...)
		before := dns.asked.Load()
		var ops []*operation
		for range 3 {
			p.cut() // every call needs a connection of its own
			o := l.operation("plain")
			l.touched(o, "E14 names")
			e := l.try(o, n.addr, way{})
			if e.Outcome != succeeded && e.Outcome != notExecuted {
				l.expect("E14 names", "%s: a call ended as %s: %s", f.what, e.Outcome, e.Detail)
			}
			ops = append(ops, o)
			tried++
		}
		if len(f.turns) > 0 && dns.asked.Load() == before {
			return errors.New("the name server of the test is not asked")
		}
		dns.say(dnsmessage.RCodeSuccess, good)
		l.incident("E14 names")
		for _, o := range ops {
			o.Broken = time.Now()
			for !l.settle(o, n.addr) {
				<-time.After(20 * time.Millisecond)
			}
		}
		if l.stuck {
			return nil
		}
	}
	if h := hostile.Load(); h > 0 {
		l.expect("E14 names", "an address that is not allowed was dialled %d times", h)
	}
	l.measure("E14", "hostile dials %d, in %d calls while the name of the upstream changed", hostile.Load(), tried)
	return nil
}
