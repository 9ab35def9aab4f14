package gateway

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"newel.dev/newel/internal/backend/mcpupstream"
	"newel.dev/newel/internal/module"
	"newel.dev/newel/test/program"
)

// good is a server of the stateless revision with the tool ok.
func good(t *testing.T, tool func(w http.ResponseWriter, r *http.Request, id json.RawMessage)) *httptest.Server {
	t.Helper()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		var m struct {
			ID     json.RawMessage
			Method string
		}
		if json.Unmarshal(body, &m) != nil || m.ID == nil {
			w.WriteHeader(http.StatusBadRequest)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		switch m.Method {
		case "server/discover":
			fmt.Fprintf(w, `{"jsonrpc":"2.0","id":%s,"result":{"resultType":"complete","supportedVersions":["2026-07-28"],"capabilities":{"tools":{}}}}`, m.ID)
		case "tools/list":
			fmt.Fprintf(w, `{"jsonrpc":"2.0","id":%s,"result":{"resultType":"complete","tools":[{"name":"ok","inputSchema":{"type":"object"},"description":"d"}]}}`, m.ID)
		case "tools/call":
			tool(w, r, m.ID)
		default:
			fmt.Fprintf(w, `{"jsonrpc":"2.0","id":%s,"error":{"code":-32601,"message":"no"}}`, m.ID)
		}
	}))
	t.Cleanup(s.Close)
	return s
}

func answer(w http.ResponseWriter, id json.RawMessage, text string) {
	fmt.Fprintf(w, `{"jsonrpc":"2.0","id":%s,"result":{"resultType":"complete","content":[{"type":"text","text":%q}]}}`, id, text)
}

func callOK(t *testing.T, url, tool string) string {
	t.Helper()
	return exchange(t, url, "tools/call", tool, `{"name":"`+tool+`",`+clientMeta+`}`)
}

// Whatever one server does in a call, the call ends with an error that says what happened and the
// calls of its neighbour work.
func TestHostileAnswers(t *testing.T) {
	private := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { t.Error("the redirect was followed") }))
	t.Cleanup(private.Close)
	flood := strings.Repeat("x", 1<<16)
	for name, tt := range map[string]struct {
		tool func(w http.ResponseWriter, r *http.Request, id json.RawMessage)
		want string
	}{
		"HTML": {func(w http.ResponseWriter, _ *http.Request, _ json.RawMessage) {
			w.Header().Set("Content-Type", "text/html")
			io.WriteString(w, "<html>hello</html>")
		}, "whether it did what was asked is not known"},
		"not JSON": {func(w http.ResponseWriter, _ *http.Request, _ json.RawMessage) { io.WriteString(w, "{nope") }, "an answer that is not valid"},
		"another id": {func(w http.ResponseWriter, _ *http.Request, _ json.RawMessage) {
			answer(w, json.RawMessage("424242"), "x")
		}, "an answer that is not valid"},
		"a batch": {func(w http.ResponseWriter, _ *http.Request, id json.RawMessage) {
			fmt.Fprintf(w, `[{"jsonrpc":"2.0","id":%s,"result":{}}]`, id)
		}, "an answer that is not valid"},
		"twice a name": {func(w http.ResponseWriter, _ *http.Request, id json.RawMessage) {
			fmt.Fprintf(w, `{"jsonrpc":"2.0","id":%s,"result":{"content":[],"content":[]}}`, id)
		}, "an answer that is not valid"},
		"bad UTF-8": {func(w http.ResponseWriter, _ *http.Request, id json.RawMessage) {
			fmt.Fprintf(w, "{\"jsonrpc\":\"2.0\",\"id\":%s,\"result\":{\"content\":[{\"type\":\"text\",\"text\":\"\xff\"}]}}", id)
		}, "an answer that is not valid"},
		"content is no array": {func(w http.ResponseWriter, _ *http.Request, id json.RawMessage) {
			fmt.Fprintf(w, `{"jsonrpc":"2.0","id":%s,"result":{"content":7}}`, id)
		}, "an answer that is not valid"},
		"an unknown result type": {func(w http.ResponseWriter, _ *http.Request, id json.RawMessage) {
			fmt.Fprintf(w, `{"jsonrpc":"2.0","id":%s,"result":{"resultType":"task","taskId":"1"}}`, id)
		}, "an answer that is not valid"},
		"deep JSON": {func(w http.ResponseWriter, _ *http.Request, id json.RawMessage) {
			fmt.Fprintf(w, `{"jsonrpc":"2.0","id":%s,"result":{"x":%s}}`, id, strings.Repeat("[", 100_000))
		}, "an answer that is not valid"},
		"a redirect": {func(w http.ResponseWriter, r *http.Request, _ json.RawMessage) {
			http.Redirect(w, r, private.URL, http.StatusTemporaryRedirect)
		}, "final address"},
		"401": {func(w http.ResponseWriter, _ *http.Request, _ json.RawMessage) { w.WriteHeader(401) }, "credentials"},
		"429": {func(w http.ResponseWriter, _ *http.Request, _ json.RawMessage) {
			w.Header().Set("Retry-After", "7")
			w.WriteHeader(429)
		}, `"retryAfterSeconds":7`},
		"500":  {func(w http.ResponseWriter, _ *http.Request, _ json.RawMessage) { w.WriteHeader(500) }, "HTTP status 500"},
		"gone": {func(http.ResponseWriter, *http.Request, json.RawMessage) { panic(http.ErrAbortHandler) }, "whether it did what was asked is not known"},
		"an endless body": {func(w http.ResponseWriter, r *http.Request, _ json.RawMessage) {
			for r.Context().Err() == nil {
				if _, err := io.WriteString(w, flood); err != nil {
					return
				}
			}
		}, "larger than the gateway takes"},
		"an endless line": {func(w http.ResponseWriter, r *http.Request, _ json.RawMessage) {
			w.Header().Set("Content-Type", "text/event-stream")
			io.WriteString(w, "data: ")
			for r.Context().Err() == nil {
				if _, err := io.WriteString(w, flood); err != nil {
					return
				}
			}
		}, "larger than the gateway takes"},
		"an endless event": {func(w http.ResponseWriter, r *http.Request, _ json.RawMessage) {
			w.Header().Set("Content-Type", "text/event-stream")
			for r.Context().Err() == nil {
				if _, err := io.WriteString(w, "data: "+flood+"\n"); err != nil {
					return
				}
			}
		}, "larger than the gateway takes"},
		"endless progress": {func(w http.ResponseWriter, r *http.Request, _ json.RawMessage) {
			w.Header().Set("Content-Type", "text/event-stream")
			for r.Context().Err() == nil {
				if _, err := io.WriteString(w, strings.Repeat(`data: {"jsonrpc":"2.0","method":"notifications/progress","params":{"progressToken":1,"progress":1}}`+"\n\n", 100)); err != nil {
					return
				}
			}
		}, "more messages than the gateway takes"},
		"endless comments": {func(w http.ResponseWriter, r *http.Request, _ json.RawMessage) {
			w.Header().Set("Content-Type", "text/event-stream")
			for r.Context().Err() == nil {
				if _, err := io.WriteString(w, strings.Repeat(":\n", 1000)); err != nil {
					return
				}
			}
		}, "more messages than the gateway takes"},
		"a stream without an answer": {func(w http.ResponseWriter, _ *http.Request, _ json.RawMessage) {
			w.Header().Set("Content-Type", "text/event-stream")
			io.WriteString(w, ": nothing\n\n")
		}, "whether it did what was asked is not known"},
		"a hang": {func(_ http.ResponseWriter, r *http.Request, _ json.RawMessage) { <-r.Context().Done() }, "longer than its deadline"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			bad := good(t, tt.tool)
			neighbour := good(t, func(w http.ResponseWriter, _ *http.Request, id json.RawMessage) { answer(w, id, "fine") })
			url := serve(t, map[string]mcpupstream.Config{
				"bad":       {URL: bad.URL, Prefix: "bad_", MaxMessageBytes: 1 << 20, CallTimeout: time.Second},
				"neighbour": {URL: neighbour.URL, Prefix: "good_"},
			})
			got := callOK(t, url, "bad_ok")
			if !strings.Contains(got, tt.want) || strings.Contains(got, "internal error") {
				t.Errorf("got %s, want %q in it", got, tt.want)
			}
			if got := callOK(t, url, "good_ok"); !strings.Contains(got, `"text":"fine"`) {
				t.Errorf("the neighbour: %s", got)
			}
		})
	}
}

// A server that is away at the start is served without, and its calls fail at once once the
// breaker is open; it comes when it answers.
func TestServerThatComesLater(t *testing.T) {
	var up atomic.Bool
	inner := good(t, func(w http.ResponseWriter, _ *http.Request, id json.RawMessage) { answer(w, id, "fine") })
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !up.Load() {
			w.WriteHeader(http.StatusServiceUnavailable)
			return
		}
		inner.Config.Handler.ServeHTTP(w, r)
	}))
	t.Cleanup(s.Close)
	url := serve(t, map[string]mcpupstream.Config{"late": {URL: s.URL}})
	if got := exchange(t, url, "tools/list", "", `{`+clientMeta+`}`); !strings.Contains(got, `"tools":[]`) {
		t.Errorf("before it came: %s", got)
	}
	up.Store(true)
	deadline, again := time.After(10*time.Second), time.NewTicker(20*time.Millisecond)
	defer again.Stop()
	for !strings.Contains(exchange(t, url, "tools/list", "", `{`+clientMeta+`}`), `"name":"ok"`) {
		select {
		case <-deadline:
			t.Fatal("it never came")
		case <-again.C:
		}
	}
	up.Store(false)
	var last string
	for range 8 {
		last = callOK(t, url, "ok")
	}
	if !strings.Contains(last, "is failing") || !strings.Contains(last, "retryAfterSeconds") {
		t.Errorf("the breaker did not open: %s", last)
	}
}

// A list without end, and one with a cursor that comes back, are given up.
func TestEndlessLists(t *testing.T) {
	for _, same := range []bool{false, true} {
		n := 0
		s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			var m struct {
				ID     json.RawMessage
				Method string
			}
			_ = json.NewDecoder(r.Body).Decode(&m)
			w.Header().Set("Content-Type", "application/json")
			if m.Method == "server/discover" {
				fmt.Fprintf(w, `{"jsonrpc":"2.0","id":%s,"result":{"supportedVersions":["2026-07-28"],"capabilities":{"tools":{}}}}`, m.ID)
				return
			}
			if !same {
				n++
			}
			fmt.Fprintf(w, `{"jsonrpc":"2.0","id":%s,"result":{"tools":[],"nextCursor":"c%d"}}`, m.ID, n)
		}))
		t.Cleanup(s.Close)
		u, err := mcpupstream.New("endless", mcpupstream.Config{URL: s.URL}, module.Env{Logger: logger(t)})
		if err != nil {
			t.Fatal(err)
		}
		caps, err := u.Capabilities(t.Context())
		if err != nil || len(caps) != 0 || u.Status().Problem == "" {
			t.Errorf("%d capabilities, %v, %+v", len(caps), err, u.Status())
		}
		if err := u.Close(); err != nil {
			t.Error(err)
		}
	}
}

// Two servers with one tool: the first by name order of the configuration keeps it.
func TestCollision(t *testing.T) {
	a := good(t, func(w http.ResponseWriter, _ *http.Request, id json.RawMessage) { answer(w, id, "a") })
	b := good(t, func(w http.ResponseWriter, _ *http.Request, id json.RawMessage) { answer(w, id, "b") })
	var log program.Log
	url := serveOrdered(t, &log, upstream{"first", mcpupstream.Config{URL: a.URL}}, upstream{"second", mcpupstream.Config{URL: b.URL}})
	if got := callOK(t, url, "ok"); !strings.Contains(got, `"text":"a"`) {
		t.Errorf("got %s", got)
	}
	if got := log.String(); !strings.Contains(got, "server second") || !strings.Contains(got, "already taken by server first") {
		t.Errorf("the log does not name both: %s", got)
	}
}

// A tool that was taken away between list and call is told as the server tells it.
func TestToolThatWentAway(t *testing.T) {
	s := good(t, func(w http.ResponseWriter, _ *http.Request, id json.RawMessage) {
		fmt.Fprintf(w, `{"jsonrpc":"2.0","id":%s,"error":{"code":-32602,"message":"Unknown tool: ok"}}`, id)
	})
	url := serve(t, map[string]mcpupstream.Config{"up": {URL: s.URL}})
	if got := callOK(t, url, "ok"); !strings.Contains(got, `"code":-32602,"message":"Unknown tool: ok"`) {
		t.Errorf("got %s", got)
	}
}

// A caller that goes away cancels at the server, and nothing is left running.
func TestCancel(t *testing.T) {
	gone := make(chan struct{})
	started := make(chan struct{})
	s := good(t, func(_ http.ResponseWriter, r *http.Request, _ json.RawMessage) {
		close(started)
		<-r.Context().Done()
		close(gone)
	})
	url := serve(t, map[string]mcpupstream.Config{"up": {URL: s.URL}})
	ctx, cancel := context.WithCancel(t.Context())
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, url, strings.NewReader(`{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"ok",`+clientMeta+`}}`))
	if err != nil {
		t.Fatal(err)
	}
	for k, v := range map[string]string{"Content-Type": "application/json", "Mcp-Protocol-Version": "2026-07-28", "Mcp-Method": "tools/call", "Mcp-Name": "ok"} {
		r.Header.Set(k, v)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if resp, err := http.DefaultClient.Do(r); err == nil {
			resp.Body.Close()
		}
	}()
	<-started
	cancel()
	<-done
	select {
	case <-gone:
	case <-time.After(5 * time.Second):
		t.Fatal("the server was not told")
	}
}

// A parked call whose caller never comes back ends after its time, and its place is free again.
func TestParkedCallsEnd(t *testing.T) {
	url := startFixture(t)
	u, err := mcpupstream.New("up", mcpupstream.Config{URL: url, Revision: "2025-11-25", MaxParked: 2, ParkTimeout: 300 * time.Millisecond}, module.Env{Logger: logger(t)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = u.Close() })
	gateway := serveBackends(t, logger(t), u)
	elicit := `{"name":"test_elicitation","arguments":{"message":"Who?"},"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28","io.modelcontextprotocol/clientCapabilities":{"elicitation":{}}}}`
	ask := func() string { return exchange(t, gateway, "tools/call", "test_elicitation", elicit) }
	before := runtime.NumGoroutine()
	first := ask()
	state := member(t, first, "result", "requestState")
	if member(t, first, "result", "resultType") != `"input_required"` || strings.Contains(state, "parked") {
		t.Fatalf("got %s", first)
	}
	ask()
	if got := ask(); !strings.Contains(got, "too many calls") {
		t.Errorf("a third call was parked: %s", got)
	}
	deadline, again := time.After(10*time.Second), time.NewTicker(10*time.Millisecond)
	defer again.Stop()
	for u.Status().Parked > 0 || runtime.NumGoroutine() > before+20 {
		select {
		case <-deadline:
			t.Fatalf("%d are parked, %d goroutines, %d before", u.Status().Parked, runtime.NumGoroutine(), before)
		case <-again.C:
		}
	}
	key := ""
	for k := range mustObject(t, member(t, first, "result", "inputRequests")) {
		key = k
	}
	late := strings.TrimSuffix(elicit, "}") + fmt.Sprintf(`,"requestState":%s,"inputResponses":{%q:{"action":"accept","content":{}}}}`, state, key)
	if got := exchange(t, gateway, "tools/call", "test_elicitation", late); !strings.Contains(got, "waited too long") {
		t.Errorf("an answer that came too late: %s", got)
	}
}

func mustObject(t *testing.T, raw string) map[string]json.RawMessage {
	t.Helper()
	var obj map[string]json.RawMessage
	if err := json.Unmarshal([]byte(raw), &obj); err != nil {
		t.Fatal(err)
	}
	return obj
}

// Commands that are not there, end at once, or speak nonsense.
func TestHostileCommands(t *testing.T) {
	if _, err := mcpupstream.New("x", mcpupstream.Config{Command: "no-such-command"}, module.Env{}); err == nil || !strings.Contains(err.Error(), "no-such-command") {
		t.Errorf("a missing command: %v", err)
	}
	for name, c := range map[string]mcpupstream.Config{
		"ends at once": {Command: "true"},
		"crashes":      {Command: "false"},
		"nonsense":     {Command: "yes", StartTimeout: 500 * time.Millisecond},
		"silent":       {Command: "sleep", Args: []string{"60"}, StartTimeout: 500 * time.Millisecond},
		"endless line": {Command: "cat", Args: []string{"/dev/zero"}, MaxMessageBytes: 1 << 20, StartTimeout: 2 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			u, err := mcpupstream.New("x", c, module.Env{Logger: logger(t)})
			if err != nil {
				t.Fatal(err)
			}
			caps, err := u.Capabilities(t.Context())
			if err != nil || len(caps) != 0 || u.Status().Problem == "" {
				t.Errorf("%d capabilities, %v, %+v", len(caps), err, u.Status())
			}
			if err := u.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

// outOfTurn is a server over stdio that answers the call slow twice, late, after one of its own making.
func outOfTurn() {
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		var m struct {
			ID     json.RawMessage
			Method string
			Params struct{ Name string }
		}
		if json.Unmarshal(in.Bytes(), &m) != nil || m.ID == nil {
			continue
		}
		switch m.Method {
		case "server/discover":
			fmt.Printf(`{"jsonrpc":"2.0","id":%s,"result":{"supportedVersions":["2026-07-28"],"capabilities":{"tools":{}}}}`+"\n", m.ID)
		case "tools/list":
			fmt.Printf(`{"jsonrpc":"2.0","id":%s,"result":{"tools":[{"name":"ok","inputSchema":{"type":"object"}}]}}`+"\n", m.ID)
		case "tools/call":
			fmt.Println("some text that has no place here")
			fmt.Println(`{"jsonrpc":"2.0","id":99999,"result":{"content":[]}}`)
			fmt.Println(`{"jsonrpc":"2.0","id":"x","method":"sampling/createMessage","params":{}}`)
			for range 2 {
				fmt.Printf(`{"jsonrpc":"2.0","id":%s,"result":{"content":[{"type":"text","text":"mine"}]}}`+"\n", m.ID)
			}
		}
	}
}

// Answers to nobody, answers that come twice, text and questions out of place do no harm on a
// process that calls share.
func TestOutOfTurn(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	url := serve(t, map[string]mcpupstream.Config{"up": {Command: self, Env: plain(map[string]string{"GATEWAY_TEST_CHILD": "1"})}})
	for range 20 {
		if got := callOK(t, url, "ok"); !strings.Contains(got, `"text":"mine"`) {
			t.Fatalf("got %s", got)
		}
	}
}
