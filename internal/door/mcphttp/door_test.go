package mcphttp

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/go-json-experiment/json/jsontext"
	"golang.org/x/tools/txtar"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/catalog"
	"newel.dev/newel/internal/guard"
	"newel.dev/newel/internal/guard/authenticate"
	"newel.dev/newel/internal/guard/resolve"
	"newel.dev/newel/internal/guard/validate"
	"newel.dev/newel/internal/lane"
	"newel.dev/newel/internal/mcpwire"
)

var update = flag.Bool("update", false, "rewrite the expected halves of testdata/*.txtar")

// world is a door over a small catalog. The guards that have tests of their own are passed over.
type world struct {
	*Door
	hub      *catalog.Hub
	draining context.Context
	drain    func()
	running  chan struct{} // one value per started hang
	gone     chan error    // why hang ended
	refused  chan string
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{hub: catalog.NewHub(), running: make(chan struct{}, 8), gone: make(chan error, 8), refused: make(chan string, 100)}
	w.draining, w.drain = context.WithCancel(t.Context())
	tool := func(name, schema string, run call.Handler) *call.Capability {
		return &call.Capability{Kind: call.Tool, Name: name, Description: "d", Input: jsontext.Value(schema), Effect: call.Read, Run: run}
	}
	snapshot, err := catalog.Build([]catalog.Source{{Backend: "test", Capabilities: []*call.Capability{
		tool("echo", `{"type":"object","properties":{"text":{"type":"string"}},"required":["text"],"additionalProperties":false}`, func(_ context.Context, c *call.Call) (*call.Result, error) {
			return &call.Result{Content: call.TextContent(string(c.Args)), Structured: c.Args, Extra: jsontext.Value(`{"vendor":1.50,"_meta":{"a":1}}`)}, nil
		}),
		tool("region", `{"type":"object","properties":{"region":{"type":"string","x-mcp-header":"Region"},"n":{"type":"integer","x-mcp-header":"N"}}}`, func(_ context.Context, c *call.Call) (*call.Result, error) {
			return call.Text("ok"), nil
		}),
		tool("talk", `{"type":"object"}`, func(ctx context.Context, c *call.Call) (*call.Result, error) {
			if err := c.Sink.Progress(ctx, call.Progress{Done: 1, Total: 2, Message: "half"}); err != nil {
				return nil, err
			}
			if err := c.Sink.Progress(ctx, call.Progress{Done: 1}); err != nil { // does not increase: dropped
				return nil, err
			}
			err := c.Sink.Log(ctx, call.LogMessage{Level: "warning", Logger: "l", Data: jsontext.Value(`"careful"`)})
			return call.Text("done"), err
		}),
		tool("rounds", `{"type":"object"}`, rounds),
		tool("fail", `{"type":"object","properties":{"code":{"type":"integer"}}}`, func(_ context.Context, c *call.Call) (*call.Result, error) {
			return nil, (&call.Error{Code: call.Exhausted, Message: "try later", Retryable: true, RetryAfter: 1500 * time.Millisecond}).Because(errors.New("a secret"))
		}),
		tool("hang", `{"type":"object"}`, func(ctx context.Context, _ *call.Call) (*call.Result, error) {
			w.running <- struct{}{}
			<-ctx.Done()
			w.gone <- ctx.Err()
			return nil, ctx.Err()
		}),
		{Kind: call.Resource, URI: "kb://naïve", Name: "n", Run: func(context.Context, *call.Call) (*call.Result, error) {
			return &call.Result{Content: jsontext.Value(`[{"uri":"kb://naïve","text":"x"}]`), TTL: time.Second}, nil
		}},
		{Kind: call.Prompt, Name: "ask", Arguments: []call.Argument{{Name: "q", Required: true}}, Run: func(context.Context, *call.Call) (*call.Result, error) {
			return &call.Result{Content: jsontext.Value(`[]`), Extra: jsontext.Value(`{"description":"d"}`)}, nil
		}, Suggest: func(_ context.Context, q *call.Completion) ([]string, int, error) {
			return []string{q.Value + "1", q.Value + "2"}, 2, nil
		}},
	}}})
	if err != nil {
		t.Fatal(err)
	}
	cat := catalog.New(snapshot)
	pass := func(next call.Handler) call.Handler { return next }
	path, err := guard.Compile(guard.Path(guard.Set{Observe: pass, Authenticate: authenticate.Nobody, Admit: pass, Resolve: resolve.New(cat, nil, nil), Validate: validate.Guard, Authorize: pass, Task: pass, Effect: pass, Bound: pass, Resilience: pass}), guard.End(cat, w.hub, nil))
	if err != nil {
		t.Fatal(err)
	}
	codec, err := mcpwire.New(mcpwire.Options{Name: "test", Version: "1", Path: path, Instructions: "Be kind.",
		Has: func() mcpwire.Has { return mcpwire.Has{Tools: true, Resources: true, Prompts: true, Completions: true} }})
	if err != nil {
		t.Fatal(err)
	}
	w.Door, err = New(Options{
		Codec: codec,
		Sessions: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			b, _ := io.ReadAll(r.Body)
			fmt.Fprintf(w, "sessions got %s %s", r.Method, b)
		}),
		ParamHeaders: snapshot.ParamHeaders,
		Refused: func(_ context.Context, code call.Code, status int, _ string, _ int, _ string) {
			w.refused <- fmt.Sprint(code, " ", status)
		},
		MaxMessageBytes: 64 << 10,
		AllowedHosts:    []string{"mcp.example.com"},
		AllowedOrigins:  []string{"https://app.example.com"},
		Draining:        w.draining,
	})
	if err != nil {
		t.Fatal(err)
	}
	return w
}

// rounds asks twice, one question after the other.
func rounds(ctx context.Context, c *call.Call) (*call.Result, error) {
	ask := func(key string) (jsontext.Value, error) {
		a, err := c.Asker.Ask(ctx, call.Question{Key: key, Method: call.MethodElicit, Params: jsontext.Value(`{"mode":"form","message":"` + key + `?"}`)})
		return a[key], err
	}
	one, err := ask("one")
	if err != nil {
		return nil, err
	}
	two, err := ask("two")
	if err != nil {
		return nil, err
	}
	return call.Text(string(one) + string(two)), nil
}

// sealed hides requestState, which is different every time.
var sealed = regexp.MustCompile(`"requestState":"[^"]+"`)

// TestConversations sends the requests of testdata/*.txtar and compares the answers. A request
// is its line, headers and body, as in HTTP; the revision's headers are filled in with "@call".
func TestConversations(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatal("no conversations", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txtar"), func(t *testing.T) {
			a, err := txtar.ParseFile(file)
			if err != nil {
				t.Fatal(err)
			}
			var out txtar.Archive
			out.Comment = a.Comment
			for i := 0; i < len(a.Files); i++ {
				f := a.Files[i]
				if strings.HasSuffix(f.Name, "answer") {
					continue
				}
				got := exchange(t, newWorld(t).Door, f.Data)
				var want []byte
				if i+1 < len(a.Files) && a.Files[i+1].Name == f.Name+" answer" {
					want = a.Files[i+1].Data
				}
				if !*update && string(want) != got {
					t.Errorf("%s: got\n%s\nwant\n%s", f.Name, got, want)
				}
				out.Files = append(out.Files, f, txtar.File{Name: f.Name + " answer", Data: []byte(got)})
			}
			if *update {
				if err := os.WriteFile(file, txtar.Format(&out), 0o600); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

const metaJSON = `"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28","io.modelcontextprotocol/clientCapabilities":{},"io.modelcontextprotocol/clientInfo":{"name":"t","version":"1"}}`

func exchange(t *testing.T, d http.Handler, request []byte) string {
	t.Helper()
	head, body, _ := strings.Cut(string(request), "\n\n")
	body = strings.ReplaceAll(strings.TrimSuffix(body, "\n"), "@meta", metaJSON)
	lines := strings.Split(strings.TrimSpace(head), "\n")
	method, _, _ := strings.Cut(lines[0], " ")
	r := httptest.NewRequest(method, "http://127.0.0.1:8080/mcp", strings.NewReader(body))
	r.Host = "127.0.0.1:8080"
	if method == "POST" {
		r.Header.Set("Content-Type", "application/json")
		r.Header.Set("Accept", "application/json, text/event-stream")
	}
	for _, l := range lines[1:] {
		name, value, _ := strings.Cut(l, ":")
		value = strings.TrimSpace(value)
		switch {
		case name == "@call":
			r.Header.Set("MCP-Protocol-Version", "2026-07-28")
			m, subject, _ := strings.Cut(value, " ")
			r.Header.Set("Mcp-Method", m)
			if subject != "" {
				r.Header.Set("Mcp-Name", subject)
			}
		case name == "Host":
			r.Host = value
		case value == "-":
			r.Header.Del(name)
		default:
			r.Header.Add(name, value)
		}
	}
	w := httptest.NewRecorder()
	d.ServeHTTP(w, r)
	var b strings.Builder
	fmt.Fprintf(&b, "%d", w.Code)
	for _, h := range []string{"Content-Type", "Allow", "X-Accel-Buffering", "Access-Control-Allow-Origin"} {
		if v := w.Header().Get(h); v != "" {
			fmt.Fprintf(&b, "\n%s: %s", h, v)
		}
	}
	fmt.Fprintf(&b, "\n\n%s\n", sealed.ReplaceAllString(strings.TrimSpace(w.Body.String()), `"requestState":"(sealed)"`))
	return b.String()
}

// post sends one stateless call of a tool to a real server.
func post(ctx context.Context, t *testing.T, url, method, name, params string) *http.Response {
	t.Helper()
	body := `{"jsonrpc":"2.0","id":7,"method":"` + method + `","params":{` + params + metaJSON + `}}`
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	for k, v := range map[string]string{"Content-Type": "application/json", "Accept": "application/json, text/event-stream", "MCP-Protocol-Version": "2026-07-28", "Mcp-Method": method, "Mcp-Name": name} {
		if v != "" {
			r.Header.Set(k, v)
		}
	}
	resp, err := http.DefaultTransport.RoundTrip(r)
	if err != nil {
		if ctx.Err() != nil {
			return nil
		}
		t.Fatal(err)
	}
	return resp
}

// H6: the client going away cancels the call.
func TestDisconnectCancels(t *testing.T) {
	w := newWorld(t)
	srv := httptest.NewServer(w)
	defer srv.Close()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if resp := post(ctx, t, srv.URL, "tools/call", "hang", `"name":"hang",`); resp != nil {
			resp.Body.Close()
		}
	}()
	<-w.running
	cancel()
	if err := <-w.gone; !errors.Is(err, context.Canceled) {
		t.Errorf("the handler ended with %v", err)
	}
	<-done
}

// S1, S2, H16: acknowledgement first, then tagged changes, keep-alive, and a result when the
// server drains.
func TestListen(t *testing.T) {
	w := newWorld(t)
	w.opts.KeepAlive = 5 * time.Millisecond
	srv := httptest.NewServer(w)
	defer srv.Close()
	resp := post(t.Context(), t, srv.URL, "subscriptions/listen", "", `"notifications":{"toolsListChanged":true,"resourceSubscriptions":["kb://naïve"]},`)
	defer resp.Body.Close()
	if resp.Header.Get("X-Accel-Buffering") != "no" || resp.Header.Get("Content-Type") != "text/event-stream" {
		t.Errorf("headers %v", resp.Header)
	}
	lines := bufio.NewScanner(resp.Body)
	alive := 0
	next := func() string {
		for lines.Scan() {
			if data, ok := strings.CutPrefix(lines.Text(), "data: "); ok {
				return data
			}
			if strings.HasPrefix(lines.Text(), ": ") {
				alive++
			}
		}
		return ""
	}
	if got, want := next(), `{"jsonrpc":"2.0","method":"notifications/subscriptions/acknowledged","params":{"_meta":{"io.modelcontextprotocol/subscriptionId":7},"notifications":{"toolsListChanged":true,"resourceSubscriptions":["kb://naïve"]}}}`; got != want {
		t.Fatalf("got  %s\nwant %s", got, want)
	}
	// The subscription starts just after its acknowledgement: repeat until it hears.
	heard := make(chan string)
	go func() { heard <- next() }()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	var got string
	for got == "" {
		select {
		case <-tick.C:
			w.hub.ListChanged(call.ListPrompts, false) // not asked for
			w.hub.Updated("kb://naïve")
		case got = <-heard:
		}
	}
	if want := `{"jsonrpc":"2.0","method":"notifications/resources/updated","params":{"_meta":{"io.modelcontextprotocol/subscriptionId":7},"uri":"kb://naïve"}}`; got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	for alive == 0 && lines.Scan() {
		if strings.HasPrefix(lines.Text(), ": ") {
			alive++
		}
	}
	w.drain()
	last := ""
	for d := next(); d != ""; d = next() {
		last = d
	}
	if want := `{"jsonrpc":"2.0","id":7,"result":{"resultType":"complete","_meta":{"io.modelcontextprotocol/subscriptionId":7,"io.modelcontextprotocol/serverInfo":{"name":"test","version":"1"}}}}`; last != want {
		t.Errorf("got  %s\nwant %s", last, want)
	}
}

// Several rounds of questions, and every way in which requestState can be wrong.
func TestRounds(t *testing.T) {
	w := newWorld(t)
	ask := func(tool, extra string) string {
		body := `POST /mcp` + "\n@call: tools/call " + tool + "\n\n" + `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"` + tool + `",` + extra + strings.Replace(metaJSON, `Capabilities":{}`, `Capabilities":{"elicitation":{}}`, 1) + `}}`
		r := httptest.NewRecorder()
		req := body[strings.Index(body, "{"):]
		h := httptest.NewRequest("POST", "http://127.0.0.1/mcp", strings.NewReader(req))
		for k, v := range map[string]string{"Content-Type": "application/json", "MCP-Protocol-Version": "2026-07-28", "Mcp-Method": "tools/call", "Mcp-Name": tool} {
			h.Header.Set(k, v)
		}
		w.ServeHTTP(r, h)
		return r.Body.String()
	}
	state := func(answer string) string {
		m := sealed.FindString(answer)
		if m == "" {
			t.Fatalf("no requestState in %s", answer)
		}
		return m
	}
	first := ask("rounds", "")
	if !strings.Contains(first, `"inputRequests":{"one":{"method":"elicitation/create","params":{"mode":"form","message":"one?"}}}`) {
		t.Fatal(first)
	}
	second := ask("rounds", `"inputResponses":{"one":{"action":"accept","content":{"n":9007199254740993}},"two":{"action":"accept"}},`+state(first)+",")
	if !strings.Contains(second, `"inputRequests":{"two"`) {
		t.Fatalf("an answer to a question not yet asked was taken: %s", second)
	}
	if again := ask("rounds", `"inputResponses":{},`+state(first)+","); !strings.Contains(again, `"inputRequests":{"one"`) {
		t.Errorf("a missing answer is not asked for again: %s", again)
	}
	last := ask("rounds", `"inputResponses":{"two":{"action":"decline"}},`+state(second)+",")
	if !strings.Contains(last, `{\"action\":\"accept\",\"content\":{\"n\":9007199254740993}}{\"action\":\"decline\"}`) {
		t.Errorf("got %s", last)
	}
	good := state(first)
	value := strings.TrimSuffix(strings.TrimPrefix(good, `"requestState":"`), `"`)
	flipped := []byte(value)
	flipped[len(flipped)/2] ^= 1
	for name, bad := range map[string]string{
		"flipped":          ask("rounds", `"requestState":"`+string(flipped)+`",`),
		"truncated":        ask("rounds", `"requestState":"`+value[:len(value)-4]+`",`),
		"extended":         ask("rounds", `"requestState":"`+value+`-TAMPERED",`),
		"another tool":     ask("talk", good+","),
		"other arguments":  ask("rounds", good+`,"arguments":{"a":1},`),
		"another's secret": func() string { v := newWorld(t); w = v; return ask("rounds", good+",") }(),
	} {
		if !strings.Contains(bad, "-32602") || !strings.Contains(bad, "requestState is not valid") {
			t.Errorf("%s: %s", name, bad)
		}
	}
}

// Nothing larger than the bound is read into memory, chunked or not.
func TestOversize(t *testing.T) {
	w := newWorld(t)
	for _, length := range []int64{100 << 20, -1} {
		r := httptest.NewRequest("POST", "http://127.0.0.1/mcp", io.LimitReader(zeros{}, 100<<20))
		r.ContentLength = length
		r.Header.Set("Content-Type", "application/json")
		rec := httptest.NewRecorder()
		w.ServeHTTP(rec, r)
		if rec.Code != 413 || !strings.Contains(rec.Body.String(), "larger than 65536 bytes") {
			t.Errorf("length %d: %d %s", length, rec.Code, rec.Body)
		}
		if got := <-w.refused; got != "too_large 413" {
			t.Errorf("recorded %q", got)
		}
	}
}

// Who sends a byte now and then is not waited for, whether it says how long the message is or not.
// Large messages have room that is used again: to make it anew costs more than to read and refuse them.
func TestLargeMessagesUseRoomAgain(t *testing.T) {
	w := newWorld(t)
	w.opts.MaxMessageBytes = 4 << 20
	const size = 3_900_000
	request := func(body string, length int64) *http.Request {
		r := httptest.NewRequest(http.MethodPost, "http://localhost/mcp", strings.NewReader(body))
		r.ContentLength = length
		for k, v := range map[string]string{"Content-Type": "application/json", "Accept": "application/json, text/event-stream", "Mcp-Protocol-Version": mcpwire.Revision, "Mcp-Method": "tools/call", "Mcp-Name": "echo"} {
			r.Header.Set(k, v)
		}
		return r
	}
	number := `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"echo","arguments":{"text":` + strings.Repeat("9", size) + `},"_meta":{"io.modelcontextprotocol/protocolVersion":"` + mcpwire.Revision + `","io.modelcontextprotocol/clientCapabilities":{}}}}`
	for name, tt := range map[string]struct {
		body   string
		length int64
		want   string
		most   uint64 // bytes
	}{
		"its arguments are kept": {number, int64(len(number)), "more than 1000 digits", size + size/10},
		"nothing is kept":        {strings.Repeat("[", size), size, "nested deeper", 64 << 10},
		"it is too long":         {strings.Repeat("a", 5<<20), -1, "larger than", 64 << 10},
	} {
		least := uint64(1 << 62)
		for i := 0; i < 20 && least > tt.most; i++ { // what is to be used again may be collected
			in, out := request(tt.body, tt.length), httptest.NewRecorder()
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			w.ServeHTTP(out, in)
			runtime.ReadMemStats(&after)
			least = min(least, after.TotalAlloc-before.TotalAlloc)
			if !strings.Contains(out.Body.String(), tt.want) {
				t.Fatalf("%s: %d %.300s", name, out.Code, out.Body)
			}
		}
		if least > tt.most {
			t.Errorf("%s: %d bytes were allocated, more than %d", name, least, tt.most)
		}
	}
}

func TestLargeMessagesTakeTurns(t *testing.T) {
	w := newWorld(t)
	w.opts.MaxMessageBytes = 4 << 20
	over, cancel := context.WithCancel(t.Context())
	cancel()
	answer := func(ctx context.Context, text string) string {
		body := `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"echo","arguments":{"text":"` + text + `"},"_meta":{"io.modelcontextprotocol/protocolVersion":"` + mcpwire.Revision + `","io.modelcontextprotocol/clientCapabilities":{}}}}`
		r := httptest.NewRequestWithContext(ctx, http.MethodPost, "http://localhost/mcp", strings.NewReader(body))
		for k, v := range map[string]string{"Content-Type": "application/json", "Accept": "application/json, text/event-stream", "Mcp-Protocol-Version": mcpwire.Revision, "Mcp-Method": "tools/call", "Mcp-Name": "echo"} {
			r.Header.Set(k, v)
		}
		out := httptest.NewRecorder()
		w.ServeHTTP(out, r)
		return out.Body.String()
	}
	large := strings.Repeat("a", lane.Large)
	var leaves []func()
	for range max(1, runtime.GOMAXPROCS(0)-1) {
		leave, err := lane.Enter(t.Context(), lane.Large)
		if err != nil {
			t.Fatal(err)
		}
		leaves = append(leaves, leave)
	}
	if got := answer(over, large); !strings.Contains(got, "given up before its turn") {
		t.Errorf("a large message out of turn: %.200s", got)
	}
	if got := answer(over, "small"); !strings.Contains(got, `"structuredContent":{"text":"small"}`) {
		t.Errorf("a small message has to wait: %.200s", got)
	}
	for _, leave := range leaves {
		leave()
	}
	for range 2 * len(leaves) {
		if got := answer(t.Context(), large); !strings.Contains(got, large) {
			t.Errorf("a large message: %.200s", got)
		}
	}
}

func TestSlowBody(t *testing.T) {
	w := newWorld(t)
	w.opts.BodyTimeout = 300 * time.Millisecond // a sixth for each piece
	srv := httptest.NewServer(w)
	t.Cleanup(srv.Close)
	for _, head := range []string{"Content-Length: 1000\r\n\r\n", "Content-Length: 65536\r\n\r\n", "Transfer-Encoding: chunked\r\n\r\n"} {
		c, err := (&net.Dialer{}).DialContext(t.Context(), "tcp", srv.Listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		fmt.Fprint(c, "POST /mcp HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"+head+"1\r\n{\r\n")
		resp, err := http.ReadResponse(bufio.NewReader(c), nil)
		if w := <-w.refused; err != nil && resp == nil || w != "canceled 400" {
			t.Errorf("%q: %v, recorded %q", head, err, w)
		}
	}
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { clear(b); return len(b), nil }

func TestNewRefuses(t *testing.T) {
	if _, err := New(Options{}); err == nil {
		t.Error("a door without a codec")
	}
	w := newWorld(t)
	o := w.opts
	o.AllowedOrigins = []string{"*"}
	if _, err := New(o); err == nil {
		t.Error("any origin")
	}
}

// FuzzHeaders: whatever stands in headers and body, the answer is JSON or an event stream and no
// header that differs from the body gets through to the tool.
func FuzzHeaders(f *testing.F) {
	f.Add("2026-07-28", "tools/call", "echo", []byte(`{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"echo","arguments":{"text":"x"},`+metaJSON+`}}`))
	f.Add("2026-07-28", "tools/call", "=?base64?ZWNobw==?=", []byte(`{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"fail",`+metaJSON+`}}`))
	f.Add("1900-01-01", "", "", []byte(`{"id":"x"}`))
	f.Fuzz(func(t *testing.T, version, method, name string, body []byte) {
		w := newWorld(t)
		r := httptest.NewRequest("POST", "http://127.0.0.1/mcp", bytes.NewReader(body))
		r.Header["Content-Type"] = []string{"application/json"}
		r.Header["Mcp-Protocol-Version"] = []string{version}
		r.Header["Mcp-Method"] = []string{method}
		r.Header["Mcp-Name"] = []string{name}
		if bytes.Contains(body, []byte("hang")) || bytes.Contains(body, []byte("listen")) {
			return // these wait on purpose
		}
		rec := httptest.NewRecorder()
		w.ServeHTTP(rec, r)
		if rec.Code == http.StatusAccepted {
			return
		}
		if !jsontext.Value(rec.Body.Bytes()).IsValid() && rec.Header().Get("Content-Type") != "text/event-stream" {
			t.Fatalf("%d %q", rec.Code, rec.Body)
		}
	})
}

// Clients that leave out headers are put up with where an operator says so; headers that say
// something else than the body never are.
func TestAbsentHeaders(t *testing.T) {
	w := newWorld(t)
	body := `{"jsonrpc":"2.0","id":1,"method":"prompts/get","params":{"name":"ask","arguments":{"q":"x"},"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28","io.modelcontextprotocol/clientCapabilities":{}}}}`
	status := func(headers ...string) int {
		r := httptest.NewRequestWithContext(t.Context(), http.MethodPost, "http://mcp.example.com/mcp", strings.NewReader(body))
		r.Header.Set("Content-Type", "application/json")
		for i := 0; i < len(headers); i += 2 {
			r.Header.Set(headers[i], headers[i+1])
		}
		rec := httptest.NewRecorder()
		w.ServeHTTP(rec, r)
		if rec.Code != http.StatusOK {
			<-w.refused
		}
		return rec.Code
	}
	if got := status(); got != http.StatusBadRequest {
		t.Errorf("without being asked to: %d", got)
	}
	w.opts.AbsentHeaders = true
	if got := status(); got != http.StatusOK {
		t.Errorf("without headers: %d", got)
	}
	for _, headers := range [][]string{{"Mcp-Name", "other"}, {"Mcp-Method", "tools/call"}, {"Mcp-Protocol-Version", "2025-11-25"}, {"Mcp-Name", ""}} {
		if got := status(headers...); got != http.StatusBadRequest {
			t.Errorf("%q: %d", headers, got)
		}
	}
}
