package main

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// attacker is the address that attacks come from: another one than the neighbour's. Callers have one of
// their own: attackers who take all connections that one address may have leave them none.
var (
	attacker = net.IPv4(127, 0, 0, 2)
	caller   = net.IPv4(127, 0, 0, 3)
)

// callers is how many call at once.
const callers = 16

// attack runs one kind of attack for some time and prints what it met, as JSON.
func attack(kind, addr string, most time.Duration) error {
	ctx, cancel := context.WithTimeout(context.Background(), most)
	defer cancel()
	report := &report{numbers: map[string]float64{}}
	kind, which, _ := strings.Cut(kind, ":")
	do, ok := map[string]func(){
		"slow": func() { crowd(200, func() { holdSlow(ctx, addr, which, report) }) },
		"deaf": func() { crowd(100, func() { holdDeaf(ctx, addr, report) }) },
		"calls": func() {
			crowd(callers, func() { callAll(ctx, addr, strings.Split(which, ","), 8*time.Second, report) })
		},
		"often":    func() { crowd(callers, func() { callAll(ctx, addr, strings.Split(which, ","), time.Second, report) }) },
		"bombs":    func() { crowd(2, func() { sendBombs(ctx, addr, report) }) },
		"streams":  func() { n, _ := strconv.Atoi(which); holdStreams(ctx, addr, n, report) },
		"listen":   func() { crowd(2, func() { openStreams(ctx, addr, which, report) }) },
		"sessions": func() { crowd(2, func() { openSessions(ctx, addr, which, report) }) },
		"keys":     func() { crowd(2, func() { sendTokens(ctx, addr, which, report) }) },
	}[kind]
	if !ok {
		return fmt.Errorf("there is no attack %q", kind)
	}
	do()
	return json.NewEncoder(os.Stdout).Encode(report.numbers)
}

func crowd(n int, f func()) {
	var all sync.WaitGroup
	for range n {
		all.Go(f)
	}
	all.Wait()
}

// report is what an attack met.
type report struct {
	mu      sync.Mutex
	numbers map[string]float64
}

func (r *report) add(name string, by float64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.numbers[name] += by
}

func (r *report) max(name string, v float64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.numbers[name] = max(r.numbers[name], v)
}

// dial connects from the attackers' address. A small buffer lets whoever does not read hold up the
// other side soon.
func dial(ctx context.Context, addr string) (net.Conn, error) { return dialFrom(ctx, attacker, addr) }

func dialFrom(ctx context.Context, from net.IP, addr string) (net.Conn, error) {
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: from}, Control: func(_, _ string, c syscall.RawConn) error {
		var failed error
		err := c.Control(func(fd uintptr) {
			failed = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF, 4<<10)
		})
		return errors.Join(err, failed)
	}}
	return d.DialContext(ctx, "tcp", addr)
}

// gone waits until a connection is closed by the other side or the context ends, and reports how long
// it was held, in seconds.
func (r *report) held(ctx context.Context, c net.Conn, at time.Time, beat func() error) {
	defer c.Close()
	r.add("opened", 1)
	r.add("open", 1)
	defer r.add("open", -1)
	r.mu.Lock()
	r.numbers["most open"] = max(r.numbers["most open"], r.numbers["open"])
	r.mu.Unlock()
	closed := make(chan struct{})
	if beat == nil { // nothing is read: that it is closed shows when something is sent
		beat = func() error { _, err := c.Write([]byte("x")); return err }
	} else {
		go func() { // ends when the connection is closed
			defer close(closed)
			_, _ = io.Copy(io.Discard, c)
		}()
	}
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			if beat() == nil {
				continue
			}
		case <-closed:
		case <-ctx.Done():
			r.max("held", time.Since(at).Seconds()) // it may have been longer
			return
		}
		r.add("cut", 1)
		r.max("held", time.Since(at).Seconds())
		return
	}
}

// every keeps an attack to a rate: what is asked is what a request costs, not how many a machine serves.
// About as long as that is waited, for attackers not to act at once.
func every(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d/2 + rand.N(d)):
	case <-ctx.Done():
	}
}

// again waits a little before the next connection.
func again(ctx context.Context) {
	select {
	case <-time.After(100 * time.Millisecond):
	case <-ctx.Done():
	}
}

const requestHead = "POST /mcp HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nAccept: application/json, text/event-stream\r\nMcp-Protocol-Version: 2026-07-28\r\n"

// holdSlow holds one connection after the other with a byte a second: of the header, of a body, of a
// body in chunks, or with nothing.
func holdSlow(ctx context.Context, addr, what string, r *report) {
	for ctx.Err() == nil {
		c, err := dial(ctx, addr)
		if err != nil {
			r.add("refused", 1)
			again(ctx)
			continue
		}
		at := time.Now()
		head, drop := "", "x"
		switch what {
		case "header":
			head = requestHead + "X-Slow: "
		case "body":
			head = requestHead + "Content-Length: 4000000\r\n\r\n"
		case "chunks":
			head, drop = requestHead+"Transfer-Encoding: chunked\r\n\r\n", "1\r\nx\r\n"
		case "idle":
			drop = ""
		}
		_, _ = io.WriteString(c, head) // that it is closed shows soon
		r.held(ctx, c, at, func() error { _, err := io.WriteString(c, drop); return err })
		again(ctx)
	}
}

// holdDeaf asks again and again on one connection and reads no answer.
func holdDeaf(ctx context.Context, addr string, r *report) {
	body := `{"jsonrpc":"2.0","id":1,"method":"tools/list","params":{` + meta + `}}`
	ask := fmt.Sprintf("%sMcp-Method: tools/list\r\nContent-Length: %d\r\n\r\n%s", requestHead, len(body), body)
	many := []byte(strings.Repeat(ask, 200))
	for ctx.Err() == nil {
		c, err := dial(ctx, addr)
		if err != nil {
			r.add("refused", 1)
			again(ctx)
			continue
		}
		at := time.Now()
		go func() { _, _ = c.Write(many); _, _ = c.Write(many) }() // ends when the connection is closed
		r.held(ctx, c, at, nil)
		again(ctx)
	}
}

// client is that of an attacker at an address.
func client(from net.IP) *http.Client {
	return &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, addr string) (net.Conn, error) {
		return dialFrom(ctx, from, addr)
	}}, Timeout: 30 * time.Second}
}

// callAll calls tools one after the other, about every pause: what they do is the hostile server's business.
func callAll(ctx context.Context, addr string, tools []string, pause time.Duration, r *report) {
	c := client(caller)
	for i := rand.IntN(len(tools)); ctx.Err() == nil; i++ {
		every(ctx, pause)
		nonce := fmt.Sprintf("attack-%d", i)
		status, body, err := call(ctx, c, addr, tools[i%len(tools)], `{"nonce":"`+nonce+`"}`)
		switch {
		case ctx.Err() != nil:
		case err != nil:
			r.add("no answer", 1)
		case strings.Contains(body, `"result":`) && !strings.Contains(body, `"isError":true`):
			r.add("succeeded", 1)
		case strings.Contains(body, "internal error"):
			r.add("internal", 1)
		default:
			r.add(fmt.Sprintf("refused %d", status), 1)
			r.add("calls", 1)
		}
	}
}

// A bomb is one request that is not worth its cost.
type bomb struct {
	name   string
	header string                          // beside requestHead
	body   func(w io.Writer) error         // nil: small
	small  string                          // the body, then
	old    bool                            // of a session revision
	answer func(status int, b string) bool // whether it was refused as it should be; nil: with a status of 4xx
}

func inCall(arguments string) string {
	return `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"echo","arguments":` + arguments + `,` + meta + `}}`
}

const toolHead = "Mcp-Method: tools/call\r\nMcp-Name: echo\r\n"

// isError takes an answer that refuses in JSON-RPC, or as the result of the tool.
func isError(status int, b string) bool {
	return status >= 400 || strings.Contains(b, `"error":`) || strings.Contains(b, `"isError":true`)
}

func theBombs() []bomb {
	deep := strings.Repeat("[", 1_000_000)
	var keys strings.Builder
	keys.WriteString("{")
	for i := range 1_000_000 {
		fmt.Fprintf(&keys, `"%d":0,`, i)
	}
	keys.WriteString(`"x":0}`)
	fewer := keys.String()[:3_500_000]
	fewer = fewer[:strings.LastIndexByte(fewer, ',')] + "}"
	var zipped bytes.Buffer
	z := gzip.NewWriter(&zipped)
	zeros := make([]byte, 1<<20)
	for range 100 {
		_, _ = z.Write(zeros) // to memory
	}
	_ = z.Close()
	long := strings.Repeat("a", 3_900_000)
	grown := strings.Repeat("\ufdfa", 300_000) // 18 letters each, when normalised
	endlessly := func(first, rest string) func(w io.Writer) error {
		return func(w io.Writer) error {
			out := bufio.NewWriterSize(w, 1<<20)
			if _, err := out.WriteString(first); err != nil {
				return err
			}
			for sent := 0; sent < 4<<30; sent += len(rest) {
				if _, err := out.WriteString(rest); err != nil {
					return err
				}
			}
			return out.Flush()
		}
	}
	return []bomb{
		{name: "JSON 10^6 deep", header: toolHead, small: inCall(deep)},
		{name: "JSON 10^6 deep, in a session", small: `{"jsonrpc":"2.0","id":1,"method":"initialize","params":` + deep, old: true},
		{name: "10^6 keys", header: toolHead, small: inCall(keys.String())},
		{name: "350,000 keys, under the limit of bytes", header: toolHead, small: inCall(fewer)},
		{name: "the number 1e999999999", header: toolHead, small: inCall(`{"n":1e999999999}`), answer: isError},
		{name: "a number of 3.9 MB", header: toolHead, small: inCall(`{"n":` + strings.Repeat("9", 3_900_000) + `}`), answer: isError},
		{name: "a string of 100 MB", header: toolHead + "Content-Length: 100000000\r\n", body: endlessly(`{"jsonrpc":"`, strings.Repeat("a", 1<<20))},
		{name: "4 GiB in chunks", header: toolHead + "Transfer-Encoding: chunked\r\n", body: endlessly("", fmt.Sprintf("%x\r\n%s\r\n", 1<<16, strings.Repeat("a", 1<<16)))},
		{name: "gzip", header: toolHead + "Content-Encoding: gzip\r\n", small: zipped.String()},
		{name: "a name of 1 MB", header: "Mcp-Method: tools/call\r\nMcp-Name: a\r\n", small: `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"` + strings.Repeat("a", 1_000_000) + `","arguments":{},` + meta + `}}`},
		{name: "U+FDFA as a name", header: "Mcp-Method: tools/call\r\nMcp-Name: =?base64?" + base64.StdEncoding.EncodeToString([]byte(grown[:30_000])) + "?=\r\n", small: `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"` + grown + `","arguments":{},` + meta + `}}`},
		{name: "U+FDFA as an argument", header: toolHead, small: inCall(`{"p":"` + grown + `"}`), answer: isError},
		{name: "a long text for a pattern", header: toolHead, small: inCall(`{"p":"` + long + `!"}`), answer: isError},
		{name: "a regular expression with large repeats", header: toolHead, small: inCall(`{"re":"` + strings.Repeat(`(x\\pL{30}){30}`, 3000) + `"}`), answer: isError},
		{name: "header of 1 MB", header: toolHead + "X-Large: " + strings.Repeat("a", 1<<20) + "\r\n", small: inCall("{}")},
		{name: "20,000 headers", header: toolHead + strings.Repeat("A: b\r\n", 20_000), small: inCall("{}")},
	}
}

// send sends a bomb on a connection of its own and returns the answer: status 0 if there was none.
func (b *bomb) send(ctx context.Context, addr string) (status int, body string, err error) {
	c, err := dial(ctx, addr)
	if err != nil {
		return 0, "", err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(15 * time.Second)); err != nil {
		return 0, "", err
	}
	head := requestHead
	if b.old {
		head = strings.ReplaceAll(head, "Mcp-Protocol-Version: 2026-07-28\r\n", "")
	}
	head += b.header
	if b.body == nil {
		head += fmt.Sprintf("Content-Length: %d\r\n", len(b.small))
	}
	sent := make(chan struct{})
	go func() { // ends when all is sent or the connection closed
		defer close(sent)
		if _, err := io.WriteString(c, head+"\r\n"+b.small); err == nil && b.body != nil {
			_ = b.body(c) // whether it is taken is what is asked
		}
	}()
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		return 0, "", err
	}
	raw, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	_ = c.Close()
	<-sent
	return resp.StatusCode, string(raw), err
}

func (b *bomb) refused(status int, body string) bool {
	if b.answer != nil {
		return b.answer(status, body)
	}
	return status >= 400 && status < 500
}

func sendBombs(ctx context.Context, addr string, r *report) {
	all := theBombs()
	for i := 0; ctx.Err() == nil; i++ {
		every(ctx, 40*time.Millisecond)
		b := &all[i%len(all)]
		status, body, _ := b.send(ctx, addr)
		switch {
		case ctx.Err() != nil:
		case status != 0 && !b.refused(status, body):
			r.add("taken: "+b.name, 1)
		default:
			r.add("sent", 1)
		}
	}
}
