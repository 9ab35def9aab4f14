package access

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"newel.dev/newel/test/engines"
	"newel.dev/newel/test/program"
)

// A balancer stands before several nodes and sends each request to another one than the last.
type balancer struct {
	t     *testing.T
	base  string
	redis *engines.RedisServer
	dir   string // has what all nodes share

	mu     sync.Mutex
	behind []*url.URL // their next is the first
	asked  map[string]int
}

func newBalancer(t *testing.T) *balancer {
	t.Helper()
	b := &balancer{t: t, redis: engines.Redis(t), dir: t.TempDir(), asked: map[string]int{}}
	proxy := &httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) {
		b.mu.Lock()
		defer b.mu.Unlock()
		next := b.behind[0]
		b.behind = append(b.behind[1:], next)
		b.asked[next.Host]++
		r.SetURL(next)
		r.Out.Host = r.In.Host
	}}
	web := httptest.NewServer(proxy)
	t.Cleanup(web.Close)
	b.base = web.URL
	return b
}

// world is all nodes together.
func (b *balancer) world() *world { return &world{t: b.t, base: b.base} }

// send sends everything to these nodes from now on, in turns.
func (b *balancer) send(nodes ...*world) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.behind = nil
	for _, n := range nodes {
		u, err := url.Parse(n.base)
		if err != nil {
			b.t.Fatal(err)
		}
		b.behind = append(b.behind, u)
	}
}

// node starts one more node, in a process of its own.
func (b *balancer) node(auth string) *world {
	b.t.Helper()
	dir, err := os.MkdirTemp(b.dir, "node-")
	if err != nil {
		b.t.Fatal(err)
	}
	address := program.Address(b.t)
	common := fmt.Sprintf("\nlisten: %s\nstate: {key_file: ../key}\nredis: {url: \"${env:REDIS_URL}\"}\n", address)
	for name, text := range map[string]string{"schema.sql": notesSchema, "newel.yaml": common + auth + notesConfig} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			b.t.Fatal(err)
		}
	}
	w := &world{t: b.t, base: "http://" + address}
	cmd := exec.Command(program.Built(b.t, program.Newel), "serve")
	cmd.Dir, cmd.Env = dir, append(os.Environ(), "REDIS_URL="+b.redis.URL, "NO_COLOR=1")
	w.process = program.Serve(b.t, cmd, program.Ready(w.base+"/ready"))
	return w
}

// A proof is good for one time, at whichever node it is shown; a nonce is good at all. While Redis is
// away no proof is, and tokens that need none go on.
func TestBoundTokensAtAllNodes(t *testing.T) {
	is := newBoundIssuer(t)
	b := newBalancer(t)
	auth := fmt.Sprintf("\nauth:\n  mode: tokens\n  public_url: %s\n  issuers: [{url: %q, jwks: %q}]\n", b.base, is.url, is.url+"/jwks")
	first, second := b.node(auth), b.node(auth)
	b.send(first, second)
	w := b.world()
	h := is.hold(w)
	ask := func(headers []string) response {
		t.Helper()
		message := `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"read_note","arguments":{"id":1},` + meta + `}}`
		return w.send("", message, append([]string{"Mcp-Protocol-Version", "2026-07-28", "Mcp-Method", "tools/call", "Mcp-Name", "read_note"}, headers...)...)
	}
	r := ask(h.headers("POST"))
	if r.status != http.StatusUnauthorized || r.nonce == "" || !strings.Contains(r.challenge, `error="use_dpop_nonce"`) {
		t.Fatalf("without a nonce: %+v", r)
	}
	h.nonce = r.nonce
	for i := range 4 {
		proof := h.headers("POST")
		if r := ask(proof); !r.reads() {
			t.Fatalf("%d: %+v", i, r)
		}
		for range 2 { // both nodes
			if r := ask(proof); r.status != http.StatusUnauthorized || !strings.Contains(r.challenge, `error="invalid_token"`) {
				t.Errorf("%d, again: %+v", i, r)
			}
		}
	}
	free := is.token("bob", b.base+"/mcp")
	b.redis.Stop()
	for range 2 {
		if r := ask(h.headers("POST")); r.status != http.StatusServiceUnavailable || r.retry == "" || !r.later() {
			t.Errorf("without Redis: %+v", r)
		}
		if r := w.read(free); !r.reads() {
			t.Errorf("without Redis, with a token that needs no proof: %+v", r)
		}
	}
	old := h.headers("POST")
	b.redis.Restart(t)
	for range 2 {
		r = ask(old)
		if r.status != http.StatusUnauthorized || !strings.Contains(r.challenge, `error="use_dpop_nonce"`) {
			t.Fatalf("Redis has forgotten: %+v", r)
		}
	}
	h.nonce = r.nonce
	for range 2 {
		if r := ask(h.headers("POST")); !r.reads() {
			t.Errorf("with Redis again: %+v", r)
		}
	}
	if b.asked[strings.TrimPrefix(first.base, "http://")] < 5 || b.asked[strings.TrimPrefix(second.base, "http://")] < 5 {
		t.Errorf("asked were %v", b.asked)
	}
}
