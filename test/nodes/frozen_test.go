package nodes

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/modelcontextprotocol/go-sdk/mcp"
)

// stream is an event stream of a session.
type stream struct {
	status int
	lines  *bufio.Reader
	body   io.ReadCloser // under lines
}

// listen opens a stream of a session: the one for what is said beside answers, or what follows an event.
func (n *node) listen(session, after string) *stream {
	n.t.Helper()
	return n.stream(http.MethodGet, session, "", "Last-Event-ID", after)
}

func (n *node) stream(method, session, body string, headers ...string) *stream {
	n.t.Helper()
	r, err := http.NewRequestWithContext(n.t.Context(), method, n.base+"/mcp", strings.NewReader(body))
	if err != nil {
		n.t.Fatal(err)
	}
	headers = append(headers, "Content-Type", "application/json", "Accept", "application/json, text/event-stream", "Mcp-Session-Id", session, "Mcp-Protocol-Version", "2025-11-25")
	for i := 0; i < len(headers); i += 2 {
		if headers[i+1] != "" {
			r.Header.Set(headers[i], headers[i+1])
		}
	}
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { _ = resp.Body.Close() })
	return &stream{resp.StatusCode, bufio.NewReader(resp.Body), resp.Body}
}

// until reads up to a line that begins in some way, and returns what follows there.
func (s *stream) until(t *testing.T, begin string) string {
	t.Helper()
	for {
		line, err := s.lines.ReadString('\n')
		if err != nil {
			t.Fatalf("HTTP %d; no line %q: %v", s.status, begin, err)
		}
		if rest, ok := strings.CutPrefix(line, begin); ok {
			return strings.TrimSpace(rest)
		}
	}
}

// slow is a server whose tool pay says that it began, and waits.
func slow(t *testing.T) (url string, began <-chan struct{}, finish func()) {
	t.Helper()
	s := mcp.NewServer(&mcp.Implementation{Name: "slow", Version: "1"}, nil)
	runs, end := make(chan struct{}, 10), make(chan struct{})
	mcp.AddTool(s, &mcp.Tool{Name: "pay"}, func(ctx context.Context, _ *mcp.CallToolRequest, _ struct{}) (*mcp.CallToolResult, any, error) {
		runs <- struct{}{}
		select {
		case <-end:
		case <-ctx.Done():
		}
		return &mcp.CallToolResult{Content: []mcp.Content{&mcp.TextContent{Text: "it was paid"}}}, nil, nil
	})
	srv := httptest.NewServer(mcp.NewStreamableHTTPHandler(func(*http.Request) *mcp.Server { return s }, nil))
	t.Cleanup(srv.Close)
	return srv.URL, runs, func() { close(end) }
}

// Streams that have begun do not hang with a node that is stopped: the node that they came through breaks
// them off as if it had died, and goes on with the session. When the other one wakes up it has lost it:
// what it still does can be read, and takes nothing from the node that has it now.
func TestFrozenStreams(t *testing.T) {
	dir, redis := world(t)
	url, began, finish := slow(t)
	more := fmt.Sprintf("limits: {call_timeout: 5m}\nmcpServers: {slow: {url: %q}}\n", url)
	a, b := start(t, dir, "a", redis, more), start(t, dir, "b", redis, more)
	session := a.open()

	listens := b.listen(session, "")
	listens.until(t, ": ok")
	pays := b.stream(http.MethodPost, session, `{"jsonrpc":"2.0","id":7,"method":"tools/call","params":{"name":"pay","arguments":{}}}`)
	first := pays.until(t, "id: ")
	select {
	case <-began:
	case <-time.After(20 * time.Second):
		t.Fatal("the call does not begin")
	}
	if err := a.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	stopped := time.Now()
	broken := make(chan error, 2)
	for _, s := range []*stream{listens, pays} {
		go func() {
			said, err := io.ReadAll(s.lines)
			if rest := strings.ReplaceAll(string(said), ": keep-alive\n\n", ""); strings.TrimSpace(strings.TrimPrefix(rest, "data:")) != "" {
				err = fmt.Errorf("it says %q", rest)
			}
			broken <- err
		}()
	}
	for range 2 {
		select {
		case err := <-broken:
			if !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Errorf("a stream of the node that is stopped ended with %v", err)
			}
		case <-time.After(90 * time.Second):
			t.Fatal("a stream of the node that is stopped hangs")
		}
	}
	t.Logf("the streams broke off after %v", time.Since(stopped))
	if took := time.Since(stopped); took < 20*time.Second {
		t.Errorf("the streams broke off after %v, which is too soon", took)
	}

	// What the client does then: it asks for what follows, and goes on.
	if s := b.listen(session, first); s.status != http.StatusOK {
		t.Errorf("what follows the last event: HTTP %d", s.status)
	}
	listens = b.listen(session, "")
	listens.until(t, ": ok")
	if r := b.search(session, 8); !r.found() {
		t.Errorf("%+v", r)
	}

	if err := a.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	if err := listens.body.Close(); err != nil {
		t.Error(err)
	}
	poll(t, 20*time.Second, "the session cannot be listened to by way of the node that woke up", b, func() bool {
		listens = a.listen(session, "")
		return listens.status == http.StatusOK
	})
	listens.until(t, ": ok")
	if s := b.listen(session, ""); s.status != http.StatusConflict {
		t.Errorf("a second stream of it: HTTP %d; the node that woke up does not know that it lost the session", s.status)
	}
	finish()
	for _, n := range []*node{a, b} {
		poll(t, 20*time.Second, "what the call had to say cannot be read", n, func() bool {
			s := n.listen(session, first)
			said, err := io.ReadAll(s.body)
			return err == nil && s.status == http.StatusOK && strings.Contains(string(said), "it was paid") && strings.Contains(string(said), `"id":7`)
		})
	}
	if len(began) > 0 {
		t.Error("the call began once more")
	}
	r, err := http.NewRequestWithContext(t.Context(), http.MethodDelete, a.base+"/mcp", nil)
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Mcp-Session-Id", session)
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if _, err := io.ReadAll(listens.lines); resp.StatusCode != http.StatusNoContent || err != nil {
		t.Errorf("the session ends by way of the node that woke up: HTTP %d, its stream with %v", resp.StatusCode, err)
	}
}
