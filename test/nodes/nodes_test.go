// Package nodes holds tests of several nodes that serve one address, as processes with a real Redis.
package nodes

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"newel.dev/newel/test/engines"
	"newel.dev/newel/test/program"
)

func TestMain(m *testing.M) { os.Exit(program.Run(m)) }

// node is one process.
type node struct {
	t    *testing.T
	base string
	*program.Process
}

// start runs a node. All in dir share what is in it.
func start(t *testing.T, dir, name, redis string, more ...string) *node {
	t.Helper()
	addr := program.Address(t)
	config := filepath.Join(dir, name+".yaml")
	text := fmt.Sprintf(`
listen: %s
state: {path: %s.db, key_file: key, checkpoint: heads-%s}
redis:
  url: ${env:REDIS_URL}
  sessions: true
  advertise: http://%s
backends:
  - type: knowledge
    name: kb
    sources: [{name: docs, path: docs}]
%s`, addr, name, name, addr, strings.Join(more, ""))
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(program.Built(t, program.Newel), "serve", "--config", config)
	cmd.Dir, cmd.Env = dir, append(os.Environ(), "REDIS_URL="+redis)
	n := &node{t: t, base: "http://" + addr}
	n.Process = program.Serve(t, cmd, program.Ready(n.base+"/ready"))
	t.Cleanup(n.Kill)
	return n
}

// poll waits until it is so.
func poll(t *testing.T, limit time.Duration, what string, n *node, ok func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	if err := n.Until(ctx, what, ok); err != nil {
		t.Fatal(err)
	}
}

type answer struct {
	status  int
	session string
	retry   string
	body    string
	ids     []string // of events
}

var eventID = regexp.MustCompile(`(?m)^id: *(.+)$`)

func (n *node) send(session, body string, headers ...string) answer {
	n.t.Helper()
	r, err := http.NewRequestWithContext(n.t.Context(), http.MethodPost, n.base+"/mcp", strings.NewReader(body))
	if err != nil {
		n.t.Fatal(err)
	}
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set("Accept", "application/json, text/event-stream")
	if session != "" {
		r.Header.Set("Mcp-Session-Id", session)
		r.Header.Set("Mcp-Protocol-Version", "2025-11-25")
	}
	for i := 0; i < len(headers); i += 2 {
		r.Header.Set(headers[i], headers[i+1])
	}
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		return answer{body: err.Error()}
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(resp.Body)
	if err != nil {
		return answer{status: resp.StatusCode, body: err.Error()}
	}
	a := answer{status: resp.StatusCode, session: resp.Header.Get("Mcp-Session-Id"), retry: resp.Header.Get("Retry-After"), body: string(raw)}
	for _, m := range eventID.FindAllStringSubmatch(a.body, -1) {
		a.ids = append(a.ids, strings.TrimSpace(m[1]))
	}
	return a
}

const initialize = `{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":"2025-11-25","capabilities":{},"clientInfo":{"name":"t","version":"1"}}}`

func (n *node) open() string {
	n.t.Helper()
	a := n.send("", initialize)
	if a.status != http.StatusOK || a.session == "" {
		n.t.Fatalf("initialize: %+v", a)
	}
	n.send(a.session, `{"jsonrpc":"2.0","method":"notifications/initialized"}`)
	return a.session
}

func (n *node) search(session string, id int) answer {
	return n.send(session, fmt.Sprintf(`{"jsonrpc":"2.0","id":%d,"method":"tools/call","params":{"name":"search_kb","arguments":{"query":"refund"}}}`, id))
}

func (a answer) found() bool {
	return a.status == http.StatusOK && strings.Contains(a.body, "thirty days")
}

// world is a folder with documents, and a Redis.
func world(t *testing.T) (dir, redis string) {
	t.Helper()
	dir = t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "docs"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "docs", "refunds.md"), []byte("# Refunds\n\nA refund is paid within thirty days.\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return dir, engines.Redis(t).URL
}

// Any node answers any request of a session; when its node is killed another one goes on with it, and
// knows what was sent before.
func TestSessionsOutliveTheirNode(t *testing.T) {
	dir, redis := world(t)
	a, b := start(t, dir, "a", redis), start(t, dir, "b", redis)
	session := a.open()
	if r := b.search(session, 2); !r.found() {
		t.Fatalf("by way of another node: %+v", r)
	}
	before := a.search(session, 3)
	if !before.found() || len(before.ids) == 0 {
		t.Fatalf("%+v", before)
	}
	if r := b.send(session, `{"jsonrpc":"2.0","id":4,"method":"logging/setLevel","params":{"level":"error"}}`); r.status != http.StatusOK {
		t.Fatalf("%+v", r)
	}
	a.Kill()
	var r answer
	poll(t, 20*time.Second, "the session does not go on", b, func() bool {
		r = b.search(session, 5)
		if r.status != http.StatusOK && (r.status != http.StatusServiceUnavailable || r.retry == "") {
			t.Fatalf("after its node was killed: %+v", r)
		}
		return r.status == http.StatusOK
	})
	if !r.found() {
		t.Fatalf("%+v", r)
	}
	// What the dead node sent is still there.
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, b.base+"/mcp", nil)
	if err != nil {
		t.Fatal(err)
	}
	for k, v := range map[string]string{"Accept": "text/event-stream", "Mcp-Session-Id": session, "Mcp-Protocol-Version": "2025-11-25", "Last-Event-ID": before.ids[0]} {
		req.Header.Set(k, v)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	resp, err := http.DefaultClient.Do(req.WithContext(ctx))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	found := false
	for lines := bufio.NewScanner(resp.Body); lines.Scan(); {
		if strings.Contains(lines.Text(), "thirty days") {
			found = true
			break
		}
	}
	if resp.StatusCode != http.StatusOK || !found {
		t.Errorf("the stream of before: %d, found %v", resp.StatusCode, found)
	}
	// It ends where it went on.
	req, err = http.NewRequestWithContext(t.Context(), http.MethodDelete, b.base+"/mcp", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Mcp-Session-Id", session)
	resp, err = http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusNoContent {
		t.Errorf("DELETE: %d", resp.StatusCode)
	}
	poll(t, 30*time.Second, "the session does not end", b, func() bool { return b.search(session, 6).status == http.StatusNotFound })
}

// A node that is stopped takes requests for a session of its own, and says nothing: another one that they
// came to tells their clients so, and goes on with the session once it counts as gone.
func TestFrozenNode(t *testing.T) {
	dir, redis := world(t)
	const limits = "limits: {queue_timeout: 1s, call_timeout: 1s}\n"
	a, b := start(t, dir, "a", redis, limits), start(t, dir, "b", redis, limits)
	session := a.open()
	if r := b.search(session, 2); !r.found() {
		t.Fatalf("by way of another node: %+v", r)
	}
	if err := a.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	if r := b.search(session, 3); r.status != http.StatusGatewayTimeout || !strings.Contains(r.body, `"outcome_unknown"`) || !strings.Contains(r.body, `"id":3`) {
		t.Errorf("its node is stopped: %+v", r)
	}
	poll(t, 20*time.Second, "the session does not go on", b, func() bool { return b.search(session, 4).found() })
}

// A node that ends in order leaves its sessions to the others at once: no request fails.
func TestRollingRestart(t *testing.T) {
	dir, redis := world(t)
	a, b := start(t, dir, "a", redis), start(t, dir, "b", redis)
	var sessions []string
	for range 5 {
		sessions = append(sessions, a.open())
	}
	if err := a.End(time.Minute); err != nil {
		t.Error(err)
	}
	for i, s := range sessions {
		if r := b.search(s, 10+i); !r.found() {
			t.Errorf("%d: %+v", i, r)
		}
	}
	a = start(t, dir, "a2", redis)
	for i, s := range sessions {
		if r := a.search(s, 20+i); !r.found() {
			t.Errorf("by way of the new node, %d: %+v", i, r)
		}
	}
}

// Only a node can say who sent what it passes on.
func TestForgedForward(t *testing.T) {
	dir, redis := world(t)
	a := start(t, dir, "a", redis)
	session := a.open()
	for _, forged := range []string{"x", "e30.e30", "eyJwIjpudWxsfQ.AAAA"} {
		if r := a.send(session, `{"jsonrpc":"2.0","id":2,"method":"tools/list"}`, "X-Newel-Forward", forged); r.status != http.StatusForbidden || strings.Contains(r.body, "search_kb") {
			t.Errorf("%q: %+v", forged, r)
		}
	}
	if r := a.search("no-such-session", 3); r.status != http.StatusNotFound {
		t.Errorf("a session that is none: %+v", r)
	}
}

// While Redis is away a node serves its own sessions, and says of others that it cannot tell.
func TestRedisAway(t *testing.T) {
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "docs"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "docs", "refunds.md"), []byte("# Refunds\n\nA refund is paid within thirty days.\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	s := engines.Redis(t)
	a, b := start(t, dir, "a", s.URL), start(t, dir, "b", s.URL)
	session := a.open()
	s.Stop()
	if r := a.search(session, 2); !r.found() {
		t.Errorf("its own session: %+v", r)
	}
	if r := b.search(session, 3); r.status != http.StatusServiceUnavailable || r.retry == "" {
		t.Errorf("another node's session: %+v", r)
	}
	var m map[string]any
	stateless := `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"search_kb","arguments":{"query":"refund"},"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28","io.modelcontextprotocol/clientCapabilities":{}}}}`
	r := a.send("", stateless, "Mcp-Protocol-Version", "2026-07-28", "Mcp-Method", "tools/call", "Mcp-Name", "search_kb")
	if r.status != http.StatusOK || json.Unmarshal(bytes.TrimSpace([]byte(r.body)), &m) != nil || !strings.Contains(r.body, "thirty days") {
		t.Errorf("calls without a session: %+v", r)
	}
}
