package mcpsession

import (
	"bufio"
	"context"
	"encoding/json" // the SDK's types speak encoding/json
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-json-experiment/json/jsontext"
	"github.com/modelcontextprotocol/go-sdk/jsonrpc"
	"github.com/modelcontextprotocol/go-sdk/mcp"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/catalog"
	"newel.dev/newel/internal/lane"
	"newel.dev/newel/internal/mcpwire"
)

// world is a door in front of a path that the test writes itself.
type world struct {
	*Door
	hub *catalog.Hub
	url string
}

func newWorld(t *testing.T, path call.Handler, change ...func(*Options)) *world {
	t.Helper()
	o := Options{
		Name: "test", Version: "1", Path: path, Hub: catalog.NewHub(),
		Has: mcpwire.Has{Tools: true, Resources: true, Prompts: true, Completions: true},
		Readable: func(_ context.Context, uri string) error {
			if uri != "kb://a" {
				return call.Errorf(call.NotFound, "resource not found")
			}
			return nil
		},
	}
	for _, c := range change {
		c(&o)
	}
	d, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewServer(d)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- d.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		srv.Close()
	})
	return &world{d, o.Hub, srv.URL}
}

// connect connects the SDK's own client in a session revision.
func (w *world) connect(t *testing.T, o *mcp.ClientOptions) *mcp.ClientSession {
	t.Helper()
	s, err := mcp.NewClient(&mcp.Implementation{Name: "client", Version: "1"}, o).Connect(t.Context(), &mcp.StreamableClientTransport{Endpoint: w.url}, &mcp.ClientSessionOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() }) // the server may have ended it
	return s
}

func TestResultsAreNotTouched(t *testing.T) {
	var seen *call.Call
	w := newWorld(t, func(_ context.Context, c *call.Call) (*call.Result, error) {
		seen = c
		return &call.Result{
			Content:    jsontext.Value(`[{"type":"text","text":"x","vendor":1.50},{"type":"hologram","z":1,"a":2}]`),
			Structured: jsontext.Value(`{"big":9007199254740993,"z":1,"a":1.50}`),
			Extra:      jsontext.Value(`{"vendorTop":{"k":1},"content":"not this","_meta":{"m":9007199254740993}}`),
		}, nil
	})
	session := w.raw(t, "2025-11-25", `{"elicitation":{"url":{}},"sampling":{"tools":{}},"roots":{}}`)
	got := session.post(t, `{"jsonrpc":"2.0","id":5,"method":"tools/call","params":{"name":"x","arguments":{"n":9007199254740993,"b":1.50,"a":[]}}}`)
	want := `{"jsonrpc":"2.0","id":5,"result":{"content":[{"type":"text","text":"x","vendor":1.50},{"type":"hologram","z":1,"a":2}],"structuredContent":{"big":9007199254740993,"z":1,"a":1.50},"vendorTop":{"k":1},"_meta":{"m":9007199254740993}}}`
	if got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	if string(seen.Args) != `{"n":9007199254740993,"b":1.50,"a":[]}` {
		t.Errorf("arguments arrived as %s", seen.Args)
	}
	c := seen.Client
	if c.ElicitForm || !c.ElicitURL || !c.SamplingTools || !c.Roots || c.Name != "raw" || seen.Revision != "2025-11-25" || seen.SessionID == "" || seen.Credential.Peer == "" {
		t.Errorf("the call says %+v of its client, revision %s", c, seen.Revision)
	}
}

func TestErrors(t *testing.T) {
	for _, tt := range []struct {
		method, params string
		err            error
		want           string
	}{
		{"tools/call", `{"name":"x"}`, call.Errorf(call.Exhausted, "later"), `"result":{"content":[{"type":"text","text":"later"}],"isError":true,"_meta":{"dev.newel/error":{"code":"exhausted","retryable":true,"message":"later"}}}`},
		{"tools/call", `{"name":"x"}`, errors.New("a secret"), `"result":{"content":[{"type":"text","text":"internal error"}],"isError":true`},
		{"tools/call", `{"name":"x"}`, call.Errorf(call.NotFound, "unknown tool"), `"error":{"code":-32602,"message":"unknown tool"`},
		{"resources/read", `{"uri":"kb://x"}`, call.Errorf(call.NotFound, "resource not found"), `"error":{"code":-32002,"message":"resource not found"`},
		{"prompts/get", `{"name":"x"}`, errors.New("a secret"), `"error":{"code":-32603,"message":"internal error"`},
		{"prompts/list", `{"cursor":"x"}`, call.Errorf(call.Malformed, "bad cursor"), `"error":{"code":-32602,"message":"bad cursor"`},
		{"tools/call", `{"name":"x"}`, call.Errorf(call.Unsupported, "cannot ask"), `"error":{"code":-32602,"message":"cannot ask"`},
		{"tools/call", `{"name":"x"}`, &call.InputRequired{}, `internal error`},
	} {
		w := newWorld(t, func(context.Context, *call.Call) (*call.Result, error) { return nil, tt.err })
		got := w.raw(t, "2025-06-18", `{}`).post(t, `{"jsonrpc":"2.0","id":1,"method":"`+tt.method+`","params":`+tt.params+`}`)
		if !strings.Contains(got, tt.want) || strings.Contains(got, "secret") {
			t.Errorf("%s %v: got %s", tt.method, tt.err, got)
		}
	}
}

// A handler may ask several times, in every way (R8: no round is lost; R9: refusals have codes).
func TestQuestions(t *testing.T) {
	ask := func(ctx context.Context, c *call.Call, key, method, params string) (jsontext.Value, error) {
		a, err := c.Asker.Ask(ctx, call.Question{Key: key, Method: method, Params: jsontext.Value(params)})
		return a[key], err
	}
	w := newWorld(t, func(ctx context.Context, c *call.Call) (*call.Result, error) {
		var out []string
		for _, q := range [][3]string{
			{"form", call.MethodElicit, `{"message":"name?","requestedSchema":{"type":"object","properties":{"name":{"type":"string"}}}}`},
			{"form again", call.MethodElicit, `{"message":"again?","requestedSchema":{"type":"object","properties":{"name":{"type":"string"}}}}`},
			{"sample", call.MethodSample, `{"messages":[{"role":"user","content":{"type":"text","text":"hi"}}],"maxTokens":5}`},
			{"roots", call.MethodRoots, ``},
		} {
			a, err := ask(ctx, c, q[0], q[1], q[2])
			if err != nil {
				return nil, err
			}
			out = append(out, string(a))
		}
		return call.Text(strings.Join(out, "\n")), nil
	})
	client := mcp.NewClient(&mcp.Implementation{Name: "client", Version: "1"}, &mcp.ClientOptions{
		ElicitationHandler: func(_ context.Context, r *mcp.ElicitRequest) (*mcp.ElicitResult, error) {
			return &mcp.ElicitResult{Action: "accept", Content: map[string]any{"name": "answer to " + r.Params.Message}}, nil
		},
		CreateMessageHandler: func(context.Context, *mcp.CreateMessageRequest) (*mcp.CreateMessageResult, error) {
			return &mcp.CreateMessageResult{Role: "assistant", Model: "m", Content: &mcp.TextContent{Text: "sampled"}}, nil
		},
	})
	client.AddRoots(&mcp.Root{URI: "file:///r"})
	s, err := client.Connect(t.Context(), &mcp.StreamableClientTransport{Endpoint: w.url}, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	r, err := s.CallTool(t.Context(), &mcp.CallToolParams{Name: "x"})
	if err != nil {
		t.Fatal(err)
	}
	text := r.Content[0].(*mcp.TextContent).Text
	for _, want := range []string{"answer to name?", "answer to again?", "sampled", "file:///r"} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is missing in %s", want, text)
		}
	}
	// A client that declared nothing is not asked (M3, R6).
	got := w.raw(t, "2025-11-25", `{}`).post(t, `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"x"}}`)
	if !strings.Contains(got, `"code":-32602`) || !strings.Contains(got, `"requiredCapabilities":{"elicitation":{"form":{}}}`) {
		t.Errorf("got %s", got)
	}
}

func TestProgressAndLog(t *testing.T) {
	w := newWorld(t, func(ctx context.Context, c *call.Call) (*call.Result, error) {
		own := context.Background() // as in work that outlives its caller: still the caller's stream
		return call.Text("done"), errors.Join(
			c.Sink.Progress(own, call.Progress{Done: 1, Total: 4, Message: "a"}),
			c.Sink.Progress(ctx, call.Progress{Done: 1}),
			c.Sink.Progress(ctx, call.Progress{Done: 2, Total: 4}),
			c.Sink.Log(ctx, call.LogMessage{Level: "debug", Data: jsontext.Value(`"quiet"`)}),
			c.Sink.Log(own, call.LogMessage{Level: "error", Logger: "l", Data: jsontext.Value(`{"n":1}`)}))
	})
	s := w.raw(t, "2025-11-25", `{}`)
	s.post(t, `{"jsonrpc":"2.0","id":1,"method":"logging/setLevel","params":{"level":"warning"}}`)
	all := s.events(t, `{"jsonrpc":"2.0","id":2,"method":"tools/call","params":{"name":"x","_meta":{"progressToken":7}}}`)
	want := []string{
		`{"jsonrpc":"2.0","method":"notifications/progress","params":{"progressToken":7,"message":"a","progress":1,"total":4}}`,
		`{"jsonrpc":"2.0","method":"notifications/progress","params":{"progressToken":7,"progress":2,"total":4}}`,
		`{"jsonrpc":"2.0","method":"notifications/message","params":{"data":{"n":1},"level":"error","logger":"l"}}`,
	}
	if !slices.Equal(all[:len(all)-1], want) {
		t.Errorf("got\n%s", strings.Join(all, "\n"))
	}
}

// Subscriptions, their updates, and list changes, which the SDK sends only for features of its own.
func TestChanges(t *testing.T) {
	w := newWorld(t, func(context.Context, *call.Call) (*call.Result, error) {
		return &call.Result{Content: jsontext.Value(`[]`)}, nil
	})
	heard := make(chan string, 10)
	s := w.connect(t, &mcp.ClientOptions{
		ToolListChangedHandler:     func(context.Context, *mcp.ToolListChangedRequest) { heard <- "tools" },
		PromptListChangedHandler:   func(context.Context, *mcp.PromptListChangedRequest) { heard <- "prompts" },
		ResourceListChangedHandler: func(context.Context, *mcp.ResourceListChangedRequest) { heard <- "resources" },
		ResourceUpdatedHandler:     func(_ context.Context, r *mcp.ResourceUpdatedNotificationRequest) { heard <- r.Params.URI },
	})
	if err := s.Subscribe(t.Context(), &mcp.SubscribeParams{URI: "kb://a"}); err != nil {
		t.Fatal(err)
	}
	var we *jsonrpc.Error
	if err := s.Subscribe(t.Context(), &mcp.SubscribeParams{URI: "kb://b"}); !errors.As(err, &we) || we.Code != -32002 {
		t.Errorf("subscribing to what is not there: %v", err)
	}
	for want, change := range map[string]func(){
		"tools":     func() { w.hub.ListChanged(call.ListTools, false) },
		"prompts":   func() { w.hub.ListChanged(call.ListPrompts, false) },
		"resources": func() { w.hub.ListChanged(call.ListResources, false) },
		"kb://a":    func() { w.hub.Updated("kb://a") },
	} {
		// The client opens its stream in the background: repeat until it hears.
		tick := time.NewTicker(20 * time.Millisecond)
		change()
		for got := ""; got != want; {
			select {
			case got = <-heard:
			case <-tick.C:
				change()
			case <-t.Context().Done():
				t.Fatalf("never heard of %s", want)
			}
		}
		tick.Stop()
	}
	if tools, err := s.ListTools(t.Context(), nil); err != nil || len(tools.Tools) != 0 {
		t.Errorf("the hidden feature shows: %v %v", tools, err)
	}
}

// raw is a session driven by hand.
type raw struct {
	url, id, version string
}

func (w *world) raw(t *testing.T, version, capabilities string) *raw {
	t.Helper()
	s := &raw{url: w.url, version: version}
	resp := s.send(t, http.MethodPost, `{"jsonrpc":"2.0","id":0,"method":"initialize","params":{"protocolVersion":"`+version+`","capabilities":`+capabilities+`,"clientInfo":{"name":"raw","version":"1"}}}`)
	body, _ := io.ReadAll(resp.Body)
	resp.Body.Close()
	if s.id = resp.Header.Get("Mcp-Session-Id"); s.id == "" {
		t.Fatalf("no session: %d %s", resp.StatusCode, body)
	}
	resp = s.send(t, http.MethodPost, `{"jsonrpc":"2.0","method":"notifications/initialized"}`)
	resp.Body.Close()
	if resp.StatusCode != http.StatusAccepted {
		t.Fatalf("initialized: %d", resp.StatusCode)
	}
	return s
}

func (s *raw) send(t *testing.T, method, body string, headers ...string) *http.Response {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), method, s.url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set("Accept", "application/json, text/event-stream")
	if s.id != "" {
		r.Header.Set("Mcp-Session-Id", s.id)
		r.Header.Set("MCP-Protocol-Version", s.version)
	}
	for i := 0; i < len(headers); i += 2 {
		r.Header.Set(headers[i], headers[i+1])
	}
	resp, err := http.DefaultTransport.RoundTrip(r)
	if err != nil {
		t.Fatal(err)
	}
	return resp
}

// events sends a request and returns the messages of its stream.
func (s *raw) events(t *testing.T, body string) []string {
	t.Helper()
	resp := s.send(t, http.MethodPost, body)
	defer resp.Body.Close()
	if resp.Header.Get("X-Accel-Buffering") != "no" {
		t.Error("proxies may hold the stream back (R12)")
	}
	var out []string
	lines := bufio.NewScanner(resp.Body)
	for lines.Scan() {
		if data, ok := strings.CutPrefix(lines.Text(), "data: "); ok && data != "" {
			out = append(out, data)
		}
	}
	return out
}

// post sends a request and returns its answer.
func (s *raw) post(t *testing.T, body string) string {
	t.Helper()
	all := s.events(t, body)
	if len(all) == 0 {
		t.Fatalf("no answer to %s", body)
	}
	return all[len(all)-1]
}

// Every refusal has a JSON-RPC body (R10).
func TestRefusals(t *testing.T) {
	w := newWorld(t, func(context.Context, *call.Call) (*call.Result, error) { return call.Text("x"), nil }, func(o *Options) { o.MaxMessageBytes = 1000 })
	s := w.raw(t, "2025-11-25", `{}`)
	for _, tt := range []struct {
		name, method, body string
		headers            []string
		status             int
		want               string
	}{
		{"unknown session", "POST", `{"jsonrpc":"2.0","id":9,"method":"ping"}`, []string{"Mcp-Session-Id", "nope"}, 404, `"id":9`},
		{"unknown session of a stream", "GET", ``, []string{"Mcp-Session-Id", "nope"}, 404, `"code":-32001`},
		{"unknown session to end", "DELETE", ``, []string{"Mcp-Session-Id", "nope"}, 404, `"jsonrpc":"2.0"`},
		{"no session", "POST", `{"jsonrpc":"2.0","id":9,"method":"tools/list"}`, []string{"Mcp-Session-Id", ""}, 0, `"jsonrpc":"2.0"`},
		{"malformed", "POST", `{"jsonrpc`, nil, 400, `"code":-32700`},
		{"duplicate names", "POST", `{"jsonrpc":"2.0","id":1,"method":"ping","method":"tools/call"}`, nil, 400, "duplicate"},
		{"too large", "POST", `{"x":"` + strings.Repeat("x", 2000) + `"}`, nil, 413, "over the limit"},
		{"too deep", "POST", strings.Repeat("[", 100), nil, 413, "nested deeper"},
		{"batch", "POST", `[{"jsonrpc":"2.0","id":1,"method":"ping"}]`, nil, 400, "batches"},
		{"not an object", "POST", `7`, nil, 400, `"code":-32600`},
		{"wrong content type", "POST", `{"jsonrpc":"2.0","id":1,"method":"ping"}`, []string{"Content-Type", "text/plain"}, 415, `"jsonrpc":"2.0"`},
		{"nothing acceptable", "POST", `{"jsonrpc":"2.0","id":1,"method":"ping"}`, []string{"Accept", "text/html"}, 0, `"jsonrpc":"2.0"`},
		{"forged internal header", "POST", `{"jsonrpc":"2.0","id":1,"method":"ping"}`, []string{"X-Newel-Peer", "1.2.3.4"}, 200, ``},
	} {
		resp := s.send(t, tt.method, tt.body, tt.headers...)
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil {
			t.Fatal(err)
		}
		if tt.status != 0 && resp.StatusCode != tt.status || !strings.Contains(string(body), tt.want) {
			t.Errorf("%s: %d %s", tt.name, resp.StatusCode, body)
		}
		if resp.StatusCode >= 400 && !jsontext.Value(body).IsValid() {
			t.Errorf("%s: not JSON: %s", tt.name, body)
		}
	}
}

func TestQuotas(t *testing.T) {
	hold := make(chan struct{})
	started := make(chan struct{}, 10)
	w := newWorld(t, func(context.Context, *call.Call) (*call.Result, error) {
		started <- struct{}{}
		<-hold
		return call.Text("x"), nil
	}, func(o *Options) { o.MaxSessions, o.MaxStreamsPerSession = 2, 2 })
	s := w.raw(t, "2025-11-25", `{}`)
	w.raw(t, "2025-11-25", `{}`)
	third := (&raw{url: w.url}).send(t, "POST", `{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":"2025-11-25","capabilities":{},"clientInfo":{"name":"x","version":"1"}}}`)
	third.Body.Close()
	if third.StatusCode != 503 || third.Header.Get("Retry-After") == "" {
		t.Errorf("a third session: %d", third.StatusCode)
	}
	var calls sync.WaitGroup
	for i := range 2 {
		calls.Go(func() {
			s.post(t, fmt.Sprintf(`{"jsonrpc":"2.0","id":%d,"method":"tools/call","params":{"name":"x"}}`, i+1))
		})
		<-started
	}
	over := s.send(t, "POST", `{"jsonrpc":"2.0","id":3,"method":"tools/call","params":{"name":"x"}}`)
	over.Body.Close()
	if over.StatusCode != 429 {
		t.Errorf("a third open request: %d", over.StatusCode)
	}
	close(hold)
	calls.Wait()
	if w.streams[s.id] != 0 {
		t.Error("finished requests still count")
	}
}

// Short of memory, no session begins; those that are there go on.
func TestCrowded(t *testing.T) {
	var crowded atomic.Bool
	w := newWorld(t, func(context.Context, *call.Call) (*call.Result, error) { return call.Text("x"), nil }, func(o *Options) { o.Crowded = crowded.Load })
	s := w.raw(t, "2025-11-25", `{}`)
	crowded.Store(true)
	second := (&raw{url: w.url}).send(t, "POST", `{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":"2025-11-25","capabilities":{},"clientInfo":{"name":"x","version":"1"}}}`)
	second.Body.Close()
	if second.StatusCode != 503 || second.Header.Get("Retry-After") == "" {
		t.Errorf("a second session: %d", second.StatusCode)
	}
	still := s.send(t, "POST", `{"jsonrpc":"2.0","id":3,"method":"tools/call","params":{"name":"x"}}`)
	still.Body.Close()
	if still.StatusCode != 200 {
		t.Errorf("a call of the first session: %d", still.StatusCode)
	}
	crowded.Store(false)
	w.raw(t, "2025-11-25", `{}`)
}

// Two requests with one id in one session: the second is refused as long as the first runs, even
// when the first one's client has gone.
func TestOneIDTwice(t *testing.T) {
	hold, started := make(chan struct{}), make(chan struct{}, 2)
	w := newWorld(t, func(context.Context, *call.Call) (*call.Result, error) {
		started <- struct{}{}
		<-hold
		return call.Text("x"), nil
	})
	s := w.raw(t, "2025-11-25", `{}`)
	const body = `{"jsonrpc":"2.0","id":7,"method":"tools/call","params":{"name":"x"}}`
	ctx, leave := context.WithCancel(t.Context())
	first := make(chan struct{})
	go func() {
		defer close(first)
		r, err := http.NewRequestWithContext(ctx, http.MethodPost, w.url, strings.NewReader(body))
		if err != nil {
			t.Error(err)
			return
		}
		r.Header = http.Header{"Content-Type": {"application/json"}, "Accept": {"application/json, text/event-stream"}, "Mcp-Session-Id": {s.id}, "Mcp-Protocol-Version": {s.version}}
		if resp, err := http.DefaultTransport.RoundTrip(r); err == nil {
			_, _ = io.Copy(io.Discard, resp.Body)
			resp.Body.Close()
		}
	}()
	<-started
	refused := func() bool {
		resp := s.send(t, http.MethodPost, body)
		defer resp.Body.Close()
		text, _ := io.ReadAll(resp.Body)
		return resp.StatusCode == http.StatusBadRequest && strings.Contains(string(text), "ids must be unique") && strings.Contains(string(text), `"id":7`)
	}
	if !refused() {
		t.Error("the second request went through")
	}
	leave()
	<-first
	if !refused() {
		t.Error("the id was free while its call ran on")
	}
	close(hold)
	other := s.post(t, strings.Replace(body, `"id":7`, `"id":8`, 1))
	if !strings.Contains(other, `"id":8`) {
		t.Errorf("another id got %s", other)
	}
}

// A stream that the server ends early goes on where it was, with Last-Event-ID (SEP-1699).
func TestResume(t *testing.T) {
	back := make(chan struct{})
	w := newWorld(t, func(ctx context.Context, c *call.Call) (*call.Result, error) {
		c.Sink.(call.StreamCloser).CloseStream(time.Millisecond)
		select {
		case <-back:
		case <-ctx.Done():
		}
		return call.Text("late"), nil
	})
	s := w.raw(t, "2025-11-25", `{}`)
	resp := s.send(t, "POST", `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"x"}}`)
	text, err := io.ReadAll(resp.Body)
	resp.Body.Close()
	if err != nil || !strings.Contains(string(text), "retry: 1") || strings.Contains(string(text), "late") {
		t.Fatalf("the stream did not end early: %q %v", text, err)
	}
	id := ""
	for line := range strings.Lines(string(text)) {
		if v, ok := strings.CutPrefix(line, "id: "); ok {
			id = strings.TrimSpace(v)
		}
	}
	close(back)
	resp = s.send(t, "GET", "", "Last-Event-ID", id)
	defer resp.Body.Close()
	lines := bufio.NewScanner(resp.Body)
	for lines.Scan() {
		if strings.Contains(lines.Text(), `"text":"late"`) {
			return
		}
	}
	t.Error("the answer never came")
}

// An idle stream is kept alive, and its end is the end of the session.
func TestKeepAlive(t *testing.T) {
	w := newWorld(t, func(context.Context, *call.Call) (*call.Result, error) { return call.Text("x"), nil }, func(o *Options) { o.KeepAlive = 5 * time.Millisecond })
	s := w.raw(t, "2025-11-25", `{}`)
	resp := s.send(t, "GET", "")
	defer resp.Body.Close()
	lines := bufio.NewScanner(resp.Body)
	for lines.Scan() {
		if strings.HasPrefix(lines.Text(), ": ") {
			break
		}
	}
	w.Close()
	for lines.Scan() { // ends because the session does
	}
}

// One client cannot have all sessions; a place is free again when one has ended.
func TestSessionsOfOneClient(t *testing.T) {
	w := newWorld(t, func(context.Context, *call.Call) (*call.Result, error) { return call.Text("x"), nil }, func(o *Options) { o.MaxSessions, o.MaxSessionsPerPeer = 10, 2 })
	one := w.raw(t, "2025-11-25", `{}`)
	w.raw(t, "2025-11-25", `{}`)
	third := func() int {
		s := &raw{url: w.url, version: "2025-11-25"}
		resp := s.send(t, http.MethodPost, `{"jsonrpc":"2.0","id":0,"method":"initialize","params":{"protocolVersion":"2025-11-25","capabilities":{},"clientInfo":{"name":"raw","version":"1"}}}`)
		defer resp.Body.Close()
		return resp.StatusCode
	}
	if got := third(); got != http.StatusTooManyRequests {
		t.Errorf("a third session: %d", got)
	}
	if f := w.current.Load().full("another"); f != nil {
		t.Errorf("another client is refused: %v", f.Message)
	}
	one.send(t, http.MethodDelete, "").Body.Close()
	deadline, tick := time.After(10*time.Second), time.NewTicker(10*time.Millisecond)
	defer tick.Stop()
	for third() != http.StatusOK {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatal("its place is not free")
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.owners) > 2 {
		t.Errorf("%d owners are remembered of two sessions", len(w.owners))
	}
}

// Idle sessions end (R13), and nothing of them stays.
func TestIdleSessionsEnd(t *testing.T) {
	w := newWorld(t, func(context.Context, *call.Call) (*call.Result, error) { return call.Text("x"), nil }, func(o *Options) { o.IdleTimeout = 20 * time.Millisecond })
	s := w.raw(t, "2025-11-25", `{}`)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for range tick.C {
		if now := w.current.Load(); now.full("") == nil && len(slices.Collect(now.server.Sessions())) == 0 {
			break
		}
	}
	resp := s.send(t, "POST", `{"jsonrpc":"2.0","id":1,"method":"ping"}`)
	resp.Body.Close()
	if resp.StatusCode != 404 {
		t.Errorf("an ended session answers %d", resp.StatusCode)
	}
}

func TestStdio(t *testing.T) {
	w := newWorld(t, func(_ context.Context, c *call.Call) (*call.Result, error) {
		return call.Text(c.Door + " " + c.Name), nil
	})
	inR, inW := io.Pipe()
	outR, outW := io.Pipe()
	done := make(chan error)
	go func() { done <- w.ServeStdio(t.Context(), inR, outW) }()
	s, err := mcp.NewClient(&mcp.Implementation{Name: "client", Version: "1"}, nil).Connect(t.Context(), &mcp.IOTransport{Reader: outR, Writer: inW}, nil)
	if err != nil {
		t.Fatal(err)
	}
	r, err := s.CallTool(t.Context(), &mcp.CallToolParams{Name: "x"})
	if err != nil || r.Content[0].(*mcp.TextContent).Text != "stdio x" {
		t.Errorf("got %v, %v", r, err)
	}
	if err := errors.Join(inW.Close(), <-done); err != nil {
		t.Error(err)
	}
}

var _ json.Marshaler = (*result)(nil)

func TestLargeMessagesTakeTurns(t *testing.T) {
	w := newWorld(t, never)
	over, cancel := context.WithCancel(t.Context())
	cancel()
	answer := func(ctx context.Context, size int) string {
		r := httptest.NewRequestWithContext(ctx, http.MethodPost, "/", strings.NewReader("["+strings.Repeat(" ", size)))
		out := httptest.NewRecorder()
		w.ServeHTTP(out, r)
		return out.Body.String()
	}
	var leaves []func()
	for range max(1, runtime.GOMAXPROCS(0)-1) {
		leave, err := lane.Enter(t.Context(), lane.Large)
		if err != nil {
			t.Fatal(err)
		}
		leaves = append(leaves, leave)
	}
	if got := answer(over, lane.Large); !strings.Contains(got, "given up before its turn") {
		t.Errorf("a large message out of turn: %s", got)
	}
	if got := answer(over, 10); !strings.Contains(got, "not valid JSON") {
		t.Errorf("a small message has to wait: %s", got)
	}
	for _, leave := range leaves {
		leave()
	}
	for range 2 * len(leaves) {
		if got := answer(t.Context(), lane.Large); !strings.Contains(got, "not valid JSON") {
			t.Errorf("a large message: %s", got)
		}
	}
}

// What the SDK would read eight times over it does not get to see.
func TestLargeArgumentsGoAroundTheSDK(t *testing.T) {
	for message, want := range map[string][2]string{
		`{"id":1,"params":{"name":"n","arguments":{"a":[{}]},"_meta":{}},"method":"tools/call"}`: {`{"a":[{}]}`, `{"id":1,"params":{"name":"n","arguments":{},"_meta":{}},"method":"tools/call"}`},
		` { "params" : { "x":{"arguments":{"b":1}}, "arguments" : { "a":1 } } } `:                {`{ "a":1 }`, ` { "params" : { "x":{"arguments":{"b":1}}, "arguments" : {} } } `},
		`{"params":{"arguments":[1]}}`:             {},
		`{"params":{"name":"n"},"arguments":{}}`:   {},
		`{"params":[{"arguments":{}}]}`:            {},
		`{"method":"params"}`:                      {},
		`{"method":"params","params":"arguments"}`: {},
	} {
		arguments, rest := takeArguments([]byte(message))
		if string(arguments) != want[0] || string(rest) != want[1] {
			t.Errorf("%s: %s and %s", message, arguments, rest)
		}
	}

	var seen *call.Call
	w := newWorld(t, func(_ context.Context, c *call.Call) (*call.Result, error) { seen = c; return call.Text("ok"), nil })
	var passed []int64 // bytes of messages
	sdk := w.handler
	w.handler = http.HandlerFunc(func(out http.ResponseWriter, r *http.Request) {
		passed = append(passed, r.ContentLength)
		sdk.ServeHTTP(out, r)
	})
	session := w.raw(t, "2025-11-25", `{}`)
	passed = nil
	for _, args := range []string{`{"text":"` + strings.Repeat("a", lane.Large) + `","n":1.50}`, `{"text":"small"}`} {
		resp := session.send(t, http.MethodPost, `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"x","arguments":`+args+`,"_meta":{"progressToken":"p"}}}`, "X-Newel-Arguments", `{"of":"somebody else"}`)
		if body, err := io.ReadAll(resp.Body); err != nil || !strings.Contains(string(body), `"text":"ok"`) {
			t.Fatalf("%v %.300s", err, body)
		}
		resp.Body.Close()
		if string(seen.Args) != args || seen.Name != "x" || !seen.Progress || seen.Size < len(args) {
			t.Errorf("%.30s…: the call has %.60s of %d bytes, %+v", args, seen.Args, len(seen.Args), seen.Progress)
		}
	}
	if len(passed) != 2 || passed[0] > 200 || passed[1] > 200 {
		t.Errorf("the SDK was given messages of %d bytes", passed)
	}
}
