package assembly_test

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/assembly"
	"newel.dev/newel/internal/secret"
	"newel.dev/newel/internal/store/inmem"
)

// people are callers by their token.
type people map[string]*call.Principal

// Verify implements authenticate.Verifier.
func (p people) Verify(_ context.Context, c call.Credential) (*call.Principal, error) {
	if c.Known != nil {
		return c.Known, nil
	}
	if who := p[c.Bearer]; who != nil {
		return who, nil
	}
	return nil, call.Errorf(call.Unauthenticated, "authentication is required")
}

var everybody = people{
	"alice":   {ID: "alice", Tenant: "acme", Scopes: []string{"*"}},
	"bob":     {ID: "bob", Tenant: "acme", Scopes: []string{"*"}},
	"foreign": {ID: "alice", Tenant: "other", Scopes: []string{"*"}},
	"weak":    {ID: "alice", Tenant: "acme"}, // alice with a token that may less
}

// jobs is a backend whose tools may be tasks.
type jobs struct {
	release chan struct{} // ends one call of hold
	mu      sync.Mutex
	ran     []string
}

// Name implements call.Backend.
func (*jobs) Name() string { return "jobs" }

// Capabilities implements call.Backend.
func (j *jobs) Capabilities(context.Context) ([]*call.Capability, error) {
	object := jsontext.Value(`{"type":"object"}`)
	tool := func(name string, support call.TaskSupport, run call.Handler) *call.Capability {
		return &call.Capability{Kind: call.Tool, Name: name, Description: name, Input: object, Effect: call.Read, Tasks: support, Run: run}
	}
	question := func(key string) call.Question {
		return call.Question{Key: key, Method: call.MethodElicit, Params: jsontext.Value(`{"mode":"form","message":"?","requestedSchema":{"type":"object","properties":{}}}`)}
	}
	guarded := tool("guarded", call.TaskOptional, func(context.Context, *call.Call) (*call.Result, error) { return call.Text("secret"), nil })
	guarded.Scopes = []string{"jobs:run"}
	return []*call.Capability{
		tool("never", call.TaskForbidden, func(context.Context, *call.Call) (*call.Result, error) { return call.Text("now"), nil }),
		tool("always", call.TaskRequired, func(context.Context, *call.Call) (*call.Result, error) { return call.Text("done"), nil }),
		guarded,
		tool("hold", call.TaskOptional, func(ctx context.Context, c *call.Call) (*call.Result, error) {
			if err := c.Sink.Progress(ctx, call.Progress{Done: 1, Total: 4, Message: "holding"}); err != nil {
				return nil, err
			}
			select {
			case <-j.release:
				j.mu.Lock()
				defer j.mu.Unlock()
				j.ran = append(j.ran, string(c.Args))
				return call.Text("held " + string(c.Args)), nil
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		}),
		tool("ask", call.TaskOptional, func(ctx context.Context, c *call.Call) (*call.Result, error) {
			a, err := c.Asker.Ask(ctx, question("one"), question("two"))
			if err != nil {
				return nil, err
			}
			return call.Text(string(a["one"]) + string(a["two"])), nil
		}),
		tool("fail", call.TaskOptional, func(context.Context, *call.Call) (*call.Result, error) {
			return nil, call.Errorf(call.Failed, "it cannot be done")
		}),
	}, nil
}

// house is a server with jobs that runs.
type house struct {
	t   *testing.T
	url string
	*jobs
	sessions map[string]string // by token
	id       int
}

func open(t *testing.T, limits assembly.Tasks) *house {
	t.Helper()
	h := &house{t: t, jobs: &jobs{release: make(chan struct{})}, sessions: map[string]string{}}
	b, err := assembly.Build(t.Context(), &assembly.Options{
		Backends: []call.Backend{h.jobs}, State: inmem.New(), Key: secret.RandomKey(), Identity: everybody, Tasks: limits,
		Access: &assembly.Access{Resource: "http://127.0.0.1/mcp", Nonce: func() string { return "" }},
	})
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewServer(b.Handler())
	h.url = srv.URL + "/mcp"
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- b.Run(ctx) }()
	t.Cleanup(func() {
		close(h.release)
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
		srv.CloseClientConnections()
		srv.Close()
	})
	for deadline := time.Now().Add(10 * time.Second); ; { // until tasks are run
		res, err := srv.Client().Get(srv.URL + "/ready")
		if err != nil {
			t.Fatal(err)
		}
		_ = res.Body.Close()
		if res.StatusCode == http.StatusOK {
			return h
		}
		if time.Now().After(deadline) {
			t.Fatal("it does not get ready")
		}
	}
}

type reply struct {
	Result struct {
		ResultType    string                    `json:"resultType"`
		TaskID        string                    `json:"taskId"`
		Status        string                    `json:"status"`
		StatusMessage string                    `json:"statusMessage"`
		TTL           int64                     `json:"ttlMs"`
		InputRequests map[string]jsontext.Value `json:"inputRequests"`
		Result        jsontext.Value            `json:"result"`
		Error         jsontext.Value            `json:"error"`
		NextCursor    string                    `json:"nextCursor"`
		Task          *sessionTask              `json:"task"`
		Tasks         []sessionTask             `json:"tasks"`
		Content       jsontext.Value            `json:"content"`
		IsError       bool                      `json:"isError"`
		Meta          map[string]jsontext.Value `json:"_meta"`
		Capabilities  map[string]jsontext.Value `json:"capabilities"`
		SessionTTL    int64                     `json:"ttl"`
	} `json:"result"`
	Error struct {
		Code    int            `json:"code"`
		Message string         `json:"message"`
		Data    jsontext.Value `json:"data"`
	} `json:"error"`
	raw string
}

type sessionTask struct {
	TaskID string `json:"taskId"`
	Status string `json:"status"`
	TTL    int64  `json:"ttl"`
}

func (h *house) request(token, method, params string, header http.Header) *http.Response {
	h.t.Helper()
	h.id++
	body := fmt.Sprintf(`{"jsonrpc":"2.0","id":%d,"method":%q,"params":%s}`, h.id, method, params)
	req, err := http.NewRequestWithContext(h.t.Context(), http.MethodPost, h.url, strings.NewReader(body))
	if err != nil {
		h.t.Fatal(err)
	}
	req.Header = header
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Accept", "application/json, text/event-stream")
	req.Header.Set("Authorization", "Bearer "+token)
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		h.t.Fatal(err)
	}
	return res
}

const declares = `"elicitation":{},"extensions":{"io.modelcontextprotocol/tasks":{}}`

// stateless sends a request of revision 2026-07-28; params are members.
func (h *house) stateless(token, method, subject, params string) *http.Response {
	if params != "" {
		params += ","
	}
	header := http.Header{"Mcp-Protocol-Version": {"2026-07-28"}, "Mcp-Method": {method}}
	if subject != "" {
		header.Set("Mcp-Name", subject)
	}
	return h.request(token, method, `{`+params+`"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28","io.modelcontextprotocol/clientCapabilities":{`+declares+`}}}`, header)
}

func (h *house) read(res *http.Response) *reply {
	h.t.Helper()
	defer func() { _ = res.Body.Close() }()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		h.t.Fatal(err)
	}
	if i := bytes.LastIndex(b, []byte("data: ")); i >= 0 {
		b = b[i+len("data: "):]
	}
	r := &reply{raw: string(b)}
	if len(b) > 0 {
		if err := json.Unmarshal(b, r); err != nil {
			h.t.Fatalf("%v: %s", err, b)
		}
	}
	return r
}

func (h *house) call(token, tool, args string) *reply {
	h.t.Helper()
	return h.read(h.stateless(token, "tools/call", tool, fmt.Sprintf(`"name":%q,"arguments":%s`, tool, args)))
}

func (h *house) about(token, method, id, more string) *reply {
	h.t.Helper()
	return h.read(h.stateless(token, method, id, fmt.Sprintf(`"taskId":%q%s`, id, more)))
}

// until asks for a task until it has a status.
func (h *house) until(token, id, status string) *reply {
	h.t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(10 * time.Second); ; <-tick.C {
		r := h.about(token, "tasks/get", id, "")
		if r.Result.Status == status {
			return r
		}
		if time.Now().After(deadline) {
			h.t.Fatalf("the task does not become %s: %s", status, r.raw)
		}
	}
}

// TestTaskNotifications is what the suite has only a stub for: every change of a task on a stream.
func TestTaskNotifications(t *testing.T) {
	h := open(t, assembly.Tasks{})
	made := h.call("alice", "ask", "{}").Result
	if made.ResultType != "task" || made.TaskID == "" {
		t.Fatalf("made %+v", made)
	}
	id := made.TaskID
	for name, r := range map[string]*reply{
		"of another":         h.read(h.stateless("bob", "subscriptions/listen", "", `"notifications":{"taskIds":["`+id+`"]}`)),
		"that is not there":  h.read(h.stateless("alice", "subscriptions/listen", "", `"notifications":{"taskIds":["nothing"]}`)),
		"too many":           h.read(h.stateless("alice", "subscriptions/listen", "", `"notifications":{"taskIds":[`+strings.Repeat(`"a",`, 100)+`"a"]}`)),
		"of the wrong shape": h.read(h.stateless("alice", "subscriptions/listen", "", `"notifications":{"taskIds":[1]}`)),
	} {
		if r.Error.Code != -32602 {
			t.Errorf("a subscription to a task %s: %s", name, r.raw)
		}
	}
	res := h.stateless("alice", "subscriptions/listen", "", `"notifications":{"taskIds":["`+id+`"],"toolsListChanged":true}`)
	defer func() { _ = res.Body.Close() }()
	stream := bufio.NewScanner(res.Body)
	event := func() (method string, params struct {
		Meta          map[string]jsontext.Value `json:"_meta"`
		Notifications jsontext.Value            `json:"notifications"`
		TaskID        string                    `json:"taskId"`
		Status        string                    `json:"status"`
		InputRequests map[string]jsontext.Value `json:"inputRequests"`
		Result        jsontext.Value            `json:"result"`
	}) {
		t.Helper()
		for stream.Scan() {
			data, ok := strings.CutPrefix(stream.Text(), "data: ")
			if !ok {
				continue
			}
			var m struct {
				Method string         `json:"method"`
				Params jsontext.Value `json:"params"`
			}
			if err := json.Unmarshal([]byte(data), &m); err != nil {
				t.Fatal(err)
			}
			if err := json.Unmarshal(m.Params, &params); err != nil {
				t.Fatal(err)
			}
			return m.Method, params
		}
		t.Fatal("the stream ended", stream.Err())
		return
	}
	if method, p := event(); method != "notifications/subscriptions/acknowledged" || string(p.Notifications) != `{"toolsListChanged":true,"taskIds":["`+id+`"]}` {
		t.Fatalf("acknowledged: %s %s", method, p.Notifications)
	}
	see := func(status string, questions int) jsontext.Value {
		t.Helper()
		for {
			method, p := event()
			if method != "notifications/tasks" || p.TaskID != id || p.Meta["io.modelcontextprotocol/subscriptionId"] == nil {
				t.Fatalf("heard %s %+v", method, p)
			}
			if p.Status == "working" && status != "working" {
				continue // it may be heard of on its way
			}
			if p.Status != status || len(p.InputRequests) != questions {
				t.Fatalf("heard %+v, want %s with %d questions", p, status, questions)
			}
			return p.Result
		}
	}
	see("input_required", 2)
	h.about("alice", "tasks/update", id, `,"inputResponses":{"one":{"action":"accept","content":{}},"stranger":{"x":1}}`)
	see("input_required", 1)
	h.about("alice", "tasks/update", id, `,"inputResponses":{"two":{"action":"decline"}}`)
	if r := see("completed", 0); !strings.Contains(string(r), "decline") {
		t.Errorf("completed with %s", r)
	}
}

// TestTasksOfOthers is every way to a task by somebody whose it is not: it looks as if it were not there.
func TestTasksOfOthers(t *testing.T) {
	h := open(t, assembly.Tasks{})
	id := h.call("alice", "ask", "{}").Result.TaskID
	h.until("alice", id, "input_required")
	for _, who := range []string{"bob", "foreign"} {
		for _, method := range []string{"tasks/get", "tasks/update", "tasks/cancel"} {
			theirs, nothing := h.about(who, method, id, `,"inputResponses":{"one":{"action":"accept"}}`), h.about(who, method, "nothing", `,"inputResponses":{}`)
			if theirs.Error.Code != -32602 || theirs.Error.Message != nothing.Error.Message {
				t.Errorf("%s by %s: %s, and of nothing: %s", method, who, theirs.raw, nothing.raw)
			}
		}
	}
	if r := h.about("nobody", "tasks/get", id, ""); r.Error.Code != -31401 {
		t.Errorf("without a token: %s", r.raw)
	}
	if r := h.until("alice", id, "input_required"); len(r.Result.InputRequests) != 2 {
		t.Errorf("somebody answered: %s", r.raw)
	}
	// The policy is asked again: a token of the same person that may less does not get what was made.
	guarded := h.call("alice", "guarded", "{}").Result.TaskID
	h.until("alice", guarded, "completed")
	for _, method := range []string{"tasks/get", "tasks/cancel"} {
		if r := h.about("weak", method, guarded, ""); r.Error.Code == 0 || strings.Contains(r.raw, "secret") {
			t.Errorf("%s with a token without the scope: %s", method, r.raw)
		}
	}
}

// TestTaskCalls is what callers of the stateless revision may get wrong, and what ends how.
func TestTaskCalls(t *testing.T) {
	h := open(t, assembly.Tasks{})
	if r := h.about("alice", "tasks/get", strings.Repeat("x", 5000), ""); r.Error.Code != -32602 {
		t.Errorf("a long id: %s", r.raw)
	}
	if r := h.about("alice", "tasks/update", "x", ""); r.Error.Code != -32602 {
		t.Errorf("no answers: %s", r.raw)
	}
	id := h.call("alice", "ask", "{}").Result.TaskID
	h.until("alice", id, "input_required")
	if r := h.about("alice", "tasks/update", id, `,"inputResponses":{"one":{"action":"perhaps"}}`); r.Error.Code != -32602 {
		t.Errorf("an answer of the wrong form: %s", r.raw)
	}
	for range 2 { // cancelling twice is the same as once
		if r := h.about("alice", "tasks/cancel", id, ""); r.Error.Code != 0 || r.Result.Status != "" || r.Result.ResultType != "complete" {
			t.Errorf("cancelled: %s", r.raw)
		}
	}
	if r := h.about("alice", "tasks/update", id, `,"inputResponses":{"one":{"action":"accept"}}`); r.Error.Code != 0 {
		t.Errorf("an answer too late: %s", r.raw)
	}
	if r := h.about("alice", "tasks/get", id, ""); r.Result.Status != "cancelled" || r.Result.Result != nil || r.Result.Error != nil {
		t.Errorf("after cancelling: %s", r.raw)
	}
	id = h.call("alice", "fail", "{}").Result.TaskID
	if r := h.until("alice", id, "completed"); !strings.Contains(string(r.Result.Result), `"isError":true`) {
		t.Errorf("a tool that failed: %s", r.raw)
	}
	// A call that is tried again with its key is one task.
	keyed := func(args string) *reply {
		return h.read(h.request("alice", "tools/call", `{"name":"always","arguments":`+args+`,"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28","io.modelcontextprotocol/clientCapabilities":{`+declares+`},"dev.newel/idempotencyKey":"k"}}`,
			http.Header{"Mcp-Protocol-Version": {"2026-07-28"}, "Mcp-Method": {"tools/call"}, "Mcp-Name": {"always"}}))
	}
	first := keyed(`{"a":1}`)
	h.until("alice", first.Result.TaskID, "completed")
	if again := keyed(`{"a":1}`); first.Result.TaskID == "" || again.Result.TaskID != first.Result.TaskID {
		t.Errorf("the same call again: %s, then %s", first.raw, again.raw)
	}
	if other := keyed(`{"a":2}`); !strings.Contains(other.raw, "key_reused") {
		t.Errorf("another call with its key: %s", other.raw)
	}
	// Progress is the message; a cancelled call is stopped.
	id = h.call("alice", "hold", "{}").Result.TaskID
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(10 * time.Second); h.about("alice", "tasks/get", id, "").Result.StatusMessage != "holding (25 %)"; <-tick.C {
		if time.Now().After(deadline) {
			t.Fatal("no progress")
		}
	}
	h.about("alice", "tasks/cancel", id, "")
	h.until("alice", id, "cancelled")
}

// TestTaskQueue is a queue that is full, of one caller and of all.
func TestTaskQueue(t *testing.T) {
	h := open(t, assembly.Tasks{Workers: 1, MaxQueued: 8, MaxPerUser: 4})
	made := map[string]int{}
	for range 5 {
		for _, who := range []string{"alice", "bob", "foreign"} {
			r := h.call(who, "hold", "{}")
			if r.Result.TaskID != "" {
				made[who]++
			} else if !strings.Contains(r.raw, `"exhausted"`) || !strings.Contains(r.raw, "retryAfterSeconds") {
				t.Errorf("refused with %s", r.raw)
			}
		}
	}
	if made["alice"] > 4 || made["bob"] > 4 || made["alice"]+made["bob"]+made["foreign"] > 9 || made["foreign"] == 0 {
		t.Errorf("made %v, want at most 4 each, and 8 and the one that runs in all", made)
	}
}
