package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

const revision = "2026-07-28"

const meta = `"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28","io.modelcontextprotocol/clientCapabilities":{}}`

// goodServer is a server behind newel that does what it should, a little later: a call takes 10 ms.
type goodServer struct {
	addr   string
	server *http.Server
}

const workTime = 10 * time.Millisecond

func startGood() (*goodServer, error) {
	l, err := (&net.ListenConfig{}).Listen(context.Background(), "tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	g := &goodServer{addr: l.Addr().String()}
	g.server = &http.Server{ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		m, ok := begin(w, r)
		if !ok {
			return
		}
		if m.Method != "tools/call" {
			protocol(w, m, `{"name":"echo","description":"Says it again.","inputSchema":{"type":"object","properties":{"nonce":{"type":"string"},"n":{"type":"number"},"p":{"type":"string","pattern":"^([a-z]+)*$"},"re":{"type":"string","format":"regex"}}}}`)
			return
		}
		<-time.After(workTime)
		text(w, m.ID, m.Params.Args.Nonce)
	})}
	go func() { _ = g.server.Serve(l) }() // until it is closed
	return g, nil
}

// A request is what servers behind newel look at.
type request struct {
	ID     json.RawMessage
	Method string
	Params struct {
		Name, Cursor string
		Args         struct{ Nonce string } `json:"arguments"`
	}
}

func begin(w http.ResponseWriter, r *http.Request) (m request, ok bool) {
	body, err := io.ReadAll(r.Body)
	if err != nil || json.Unmarshal(body, &m) != nil || m.ID == nil {
		return m, false
	}
	w.Header().Set("Content-Type", "application/json")
	return m, true
}

// protocol answers what is no call.
func protocol(w io.Writer, m request, tools string) {
	switch m.Method {
	case "server/discover":
		fmt.Fprintf(w, `{"jsonrpc":"2.0","id":%s,"result":{"resultType":"complete","supportedVersions":["2026-07-28"],"capabilities":{"tools":{}}}}`, m.ID)
	case "tools/list":
		fmt.Fprintf(w, `{"jsonrpc":"2.0","id":%s,"result":{"resultType":"complete","tools":[%s]}}`, m.ID, tools)
	default:
		fmt.Fprintf(w, `{"jsonrpc":"2.0","id":%s,"error":{"code":-32601,"message":"no"}}`, m.ID)
	}
}

func text(w io.Writer, id json.RawMessage, t string) {
	fmt.Fprintf(w, `{"jsonrpc":"2.0","id":%s,"result":{"resultType":"complete","content":[{"type":"text","text":%q}]}}`, id, t)
}

// post returns a request of the stateless revision.
func post(ctx context.Context, addr, method, name, params string) (*http.Request, error) {
	if params != "" {
		params += ","
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+addr+"/mcp", strings.NewReader(fmt.Sprintf(`{"jsonrpc":"2.0","id":1,"method":%q,"params":{%s`+meta+`}}`, method, params)))
	if err != nil {
		return nil, err
	}
	for k, v := range map[string]string{"Content-Type": "application/json", "Accept": "application/json, text/event-stream", "Mcp-Protocol-Version": revision, "Mcp-Method": method, "Mcp-Name": name} {
		if v != "" {
			r.Header.Set(k, v)
		}
	}
	return r, nil
}

// call makes one call and returns status and body.
func call(ctx context.Context, client *http.Client, addr, tool, arguments string, header ...string) (int, string, error) {
	r, err := post(ctx, addr, "tools/call", tool, fmt.Sprintf(`"name":%q,"arguments":%s`, tool, arguments))
	if err != nil {
		return 0, "", err
	}
	for i := 0; i+1 < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	resp, err := client.Do(r)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 32<<20))
	return resp.StatusCode, string(b), err
}

// A neighbour calls the good server all the time, from the address of this machine that attackers do
// not have. All its answers have to be right.
type neighbour struct {
	s      *stage
	header []string
	cancel context.CancelFunc
	rest   atomic.Bool // it does not call meanwhile
	done   sync.WaitGroup

	mu    sync.Mutex // guards what is below
	times []time.Duration
	calls int
}

const (
	neighbours = 4
	pause      = 10 * time.Millisecond
	window     = 1500 * time.Millisecond
)

func (s *stage) neighbour(ctx context.Context, header ...string) *neighbour {
	return s.neighbours(ctx, neighbours, header...)
}

// neighbours is a neighbour with so many clients.
func (s *stage) neighbours(ctx context.Context, clients int, header ...string) *neighbour {
	ctx, cancel := context.WithCancel(ctx)
	n := &neighbour{s: s, header: header, cancel: cancel}
	for i := range clients {
		n.done.Go(func() { n.work(ctx, rand.New(rand.NewPCG(1, uint64(i)))) })
	}
	return n
}

func (n *neighbour) work(ctx context.Context, r *rand.Rand) {
	client := &http.Client{Transport: &http.Transport{}, Timeout: 20 * time.Second}
	defer client.CloseIdleConnections()
	tick := time.NewTicker(pause)
	defer tick.Stop()
	for ctx.Err() == nil {
		if n.rest.Load() {
			<-tick.C
			continue
		}
		nonce := fmt.Sprintf("%016x", r.Uint64())
		at := time.Now()
		status, body, err := call(ctx, client, n.s.addr, "echo", `{"nonce":"`+nonce+`"}`, n.header...)
		took := time.Since(at)
		if ctx.Err() != nil {
			return
		}
		if err != nil || status != http.StatusOK || !strings.Contains(body, `"text":"`+nonce+`"`) {
			n.s.wrong("the neighbour's call failed: I10 or worse: %d %v %.300s", status, err, body)
		}
		n.mu.Lock()
		n.times = append(n.times, took)
		n.calls++
		n.mu.Unlock()
		select {
		case <-tick.C:
		case <-ctx.Done():
		}
	}
}

func (n *neighbour) count() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.calls
}

// windows waits for some windows and returns the median of their p99.
func (n *neighbour) windows(ctx context.Context, count int) time.Duration {
	var all []time.Duration
	for range count {
		n.mu.Lock()
		n.times = nil
		n.mu.Unlock()
		select {
		case <-time.After(window):
		case <-ctx.Done():
			return 0
		}
		n.mu.Lock()
		times := n.times
		n.times = nil
		n.mu.Unlock()
		if len(times) == 0 {
			all = append(all, window) // not one call came back
			continue
		}
		slices.Sort(times)
		all = append(all, times[len(times)*99/100])
	}
	slices.Sort(all)
	return all[len(all)/2]
}

// trials is how often an attack is done at most, until it leaves the neighbour its time: what the machine
// does beside this does not come each time, and what newel does wrong does.
const trials = 3

// held does an attack that measures the neighbour before and during it, and holds one against the other.
// The neighbour has ended afterwards.
func (n *neighbour) held(ctx context.Context, attack func() (before, during time.Duration, err error)) error {
	for trial := 1; ; trial++ {
		before, during, err := attack()
		if err != nil {
			return err
		}
		if during > 2*before { // it may be the machine that is slower now
			before = max(before, n.windows(ctx, 3))
		}
		if during > 2*before && trial < trials && ctx.Err() == nil {
			continue
		}
		n.cancel()
		n.done.Wait()
		n.s.figure("neighbour, calls", float64(n.calls), 0, "")
		n.s.figure("neighbour, p99 without", milliseconds(before), 0, "ms")
		n.s.figure(fmt.Sprintf("neighbour, p99 while attacked (trial %d)", trial), milliseconds(during), 2*milliseconds(before), "ms")
		return ctx.Err()
	}
}

// during holds the neighbour before attacks against it while they go on.
func (n *neighbour) during(ctx context.Context, attacks func() error) error {
	return n.held(ctx, func() (before, during time.Duration, err error) {
		before = n.windows(ctx, 3)
		during, err = n.beside(ctx, attacks)
		return before, during, err
	})
}

// beside measures the neighbour while attacks go on.
func (n *neighbour) beside(ctx context.Context, attacks func() error) (time.Duration, error) {
	done := make(chan error, 1)
	go func() { done <- attacks() }()
	for all := []time.Duration{}; ; {
		all = append(all, n.windows(ctx, 1))
		select {
		case err := <-done:
			slices.Sort(all)
			return all[len(all)/2], err
		default:
		}
	}
}

func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
