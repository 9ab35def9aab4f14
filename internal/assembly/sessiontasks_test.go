package assembly_test

import (
	"bufio"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/internal/assembly"
)

// begin starts a session of a revision.
func (h *house) begin(token, revision string) *reply {
	h.t.Helper()
	res := h.request(token, "initialize", `{"protocolVersion":"`+revision+`","capabilities":{"elicitation":{}},"clientInfo":{"name":"t","version":"1"}}`, http.Header{})
	h.sessions[token] = res.Header.Get("Mcp-Session-Id")
	r := h.read(res)
	h.read(h.notify(token, `{"jsonrpc":"2.0","method":"notifications/initialized"}`))
	return r
}

// notify sends a message that has no answer of its own.
func (h *house) notify(token, body string) *http.Response {
	h.t.Helper()
	req, err := http.NewRequestWithContext(h.t.Context(), http.MethodPost, h.url, strings.NewReader(body))
	if err != nil {
		h.t.Fatal(err)
	}
	req.Header = http.Header{"Content-Type": {"application/json"}, "Accept": {"application/json, text/event-stream"}, "Authorization": {"Bearer " + token}, "Mcp-Session-Id": {h.sessions[token]}, "Mcp-Protocol-Version": {"2025-11-25"}}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		h.t.Fatal(err)
	}
	return res
}

func (h *house) send(token, method, params string) *http.Response {
	h.t.Helper()
	return h.request(token, method, params, http.Header{"Mcp-Session-Id": {h.sessions[token]}})
}

func (h *house) session(token, method, params string) *reply {
	h.t.Helper()
	return h.read(h.send(token, method, params))
}

// sessionEarly asks for the result of a task that ends when early is closed.
func (h *house) sessionEarly(token, id string, early chan struct{}) *reply {
	h.t.Helper()
	if r := h.session(token, "tasks/get", `{"taskId":"`+id+`"}`); r.Result.Status != "working" {
		h.t.Errorf("before its end: %s", r.raw)
	}
	close(early) // the answer begins when there is one
	return h.session(token, "tasks/result", `{"taskId":"`+id+`"}`)
}

func (h *house) sessionUntil(token, id, status string) {
	h.t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(10 * time.Second); ; <-tick.C {
		r := h.session(token, "tasks/get", `{"taskId":"`+id+`"}`)
		if r.Result.Status == status {
			return
		}
		if time.Now().After(deadline) {
			h.t.Fatalf("the task does not become %s: %s", status, r.raw)
		}
	}
}

// TestSessionTasks is the experimental form of revision 2025-11-25.
func TestSessionTasks(t *testing.T) {
	h := open(t, assembly.Tasks{})
	if r := h.begin("alice", "2025-11-25"); string(r.Result.Capabilities["tasks"]) != `{"list":{},"cancel":{},"requests":{"tools":{"call":{}}}}` {
		t.Fatalf("announced: %s", r.raw)
	}
	if r := h.session("alice", "tools/list", "{}"); !strings.Contains(r.raw, `"execution":{"taskSupport":"required"}`) || !strings.Contains(r.raw, `"execution":{"taskSupport":"optional"}`) || strings.Count(r.raw, "execution") != 5 {
		t.Errorf("the list says %s", r.raw)
	}
	task := func(tool, more string) *reply {
		t.Helper()
		return h.session("alice", "tools/call", fmt.Sprintf(`{"name":%q,"arguments":{"n":9007199254740993},"task":{%s}}`, tool, more))
	}
	for name, r := range map[string]*reply{
		"a task of a tool that is none": task("never", ""),
		"no task of a tool that is one": h.session("alice", "tools/call", `{"name":"always","arguments":{}}`),
	} {
		if r.Error.Code != -32601 {
			t.Errorf("%s: %s", name, r.raw)
		}
	}
	const minute, most = 60_000, 7 * 24 * 3600 * 1000
	for ttl, want := range map[string]int64{`"ttl":0`: minute, `"ttl":0.5`: minute, `"ttl":120000`: 120_000, `"ttl":1e300`: most, ``: 24 * 3600 * 1000, `"ttl":null`: 24 * 3600 * 1000} {
		if r := task("always", ttl); r.Result.Task == nil || r.Result.Task.TTL != want || r.Result.Task.Status != "working" {
			t.Errorf("with %s: %s, want %d", ttl, r.raw, want)
		}
	}
	for _, ttl := range []string{`"ttl":-1`, `"ttl":"long"`} {
		if r := task("always", ttl); r.Error.Code != -32602 {
			t.Errorf("with %s: %s", ttl, r.raw)
		}
	}
	if r := h.session("alice", "tools/call", `{"name":"always","arguments":{},"task":7}`); r.Error.Code != -32602 {
		t.Errorf("a task that is no object: %s", r.raw)
	}

	// The result before the end: it is waited for. What the task did came through as it was.
	id := task("hold", "").Result.Task.TaskID
	h.sessionUntil("alice", id, "working")
	early := make(chan struct{})
	go func() {
		<-early
		h.release <- struct{}{}
	}()
	if r := h.sessionEarly("alice", id, early); !strings.Contains(string(r.Result.Content), "9007199254740993") || string(r.Result.Meta["io.modelcontextprotocol/related-task"]) != `{"taskId":"`+id+`"}` {
		t.Errorf("the result: %s", r.raw)
	}
	if r := h.session("alice", "tasks/result", `{"taskId":"`+id+`"}`); !strings.Contains(string(r.Result.Content), "held") {
		t.Errorf("the result again: %s", r.raw)
	}
	if r := h.session("alice", "tasks/cancel", `{"taskId":"`+id+`"}`); r.Error.Code != -32602 {
		t.Errorf("what has ended is cancelled: %s", r.raw)
	}

	// A failed tool is a failed task, and its result that of the call.
	id = task("fail", "").Result.Task.TaskID
	h.sessionUntil("alice", id, "failed")
	if r := h.session("alice", "tasks/result", `{"taskId":"`+id+`"}`); !r.Result.IsError || r.Error.Code != 0 {
		t.Errorf("of a tool that failed: %s", r.raw)
	}

	id = task("hold", "").Result.Task.TaskID
	if r := h.session("alice", "tasks/cancel", `{"taskId":"`+id+`"}`); r.Result.Status != "cancelled" {
		t.Errorf("cancelled: %s", r.raw)
	}
	if r := h.session("alice", "tasks/cancel", `{"taskId":"`+id+`"}`); r.Error.Code != -32602 {
		t.Errorf("cancelled twice: %s", r.raw)
	}
	if r := h.session("alice", "tasks/result", `{"taskId":"`+id+`"}`); !r.Result.IsError {
		t.Errorf("the result of what was cancelled: %s", r.raw)
	}

	// Others have none of it.
	h.begin("bob", "2025-11-25")
	for _, method := range []string{"tasks/get", "tasks/result", "tasks/cancel"} {
		if r := h.session("bob", method, `{"taskId":"`+id+`"}`); r.Error.Code != -32602 {
			t.Errorf("%s by another: %s", method, r.raw)
		}
	}
	if r := h.session("bob", "tasks/list", `{}`); r.Error.Code != 0 || len(r.Result.Tasks) != 0 {
		t.Errorf("the list of another: %s", r.raw)
	}

	// Sessions of older revisions have no tasks.
	h.begin("foreign", "2025-06-18")
	if r := h.session("foreign", "tasks/get", `{"taskId":"x"}`); r.Error.Code != -32601 {
		t.Errorf("in an older revision: %s", r.raw)
	}
	if r := h.session("foreign", "tools/call", `{"name":"fail","arguments":{},"task":{}}`); r.Result.Task != nil || !r.Result.IsError {
		t.Errorf("a task in an older revision: %s", r.raw)
	}
}

// TestSessionTaskPages is a list of several pages, and cursors that are none.
func TestSessionTaskPages(t *testing.T) {
	h := open(t, assembly.Tasks{})
	h.begin("alice", "2025-11-25")
	const many = 120
	made := map[string]bool{}
	for range many {
		made[h.session("alice", "tools/call", `{"name":"always","arguments":{},"task":{}}`).Result.Task.TaskID] = true
	}
	var seen []string
	for cursor := ""; ; {
		params := "{}"
		if cursor != "" {
			params = `{"cursor":"` + cursor + `"}`
		}
		r := h.session("alice", "tasks/list", params).Result
		for _, task := range r.Tasks {
			seen = append(seen, task.TaskID)
			delete(made, task.TaskID)
		}
		if cursor = r.NextCursor; cursor == "" {
			break
		}
	}
	slices.Sort(seen)
	if len(seen) != many || len(slices.Compact(seen)) != many || len(made) != 0 {
		t.Errorf("the pages have %d tasks, and lack %v", len(seen), made)
	}
	for _, cursor := range []string{"nothing", "PA", "!", strings.Repeat("A", 500)} {
		if r := h.session("alice", "tasks/list", `{"cursor":"`+cursor+`"}`); r.Error.Code != -32602 {
			t.Errorf("cursor %.20s: %s", cursor, r.raw)
		}
	}
}

// TestSessionTaskStreams is what a session hears without asking: changes of its tasks, and what they ask on
// the stream of tasks/result.
func TestSessionTaskStreams(t *testing.T) {
	h := open(t, assembly.Tasks{})
	h.begin("alice", "2025-11-25")
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, h.url, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header = http.Header{"Accept": {"text/event-stream"}, "Authorization": {"Bearer alice"}, "Mcp-Session-Id": {h.sessions["alice"]}, "Mcp-Protocol-Version": {"2025-11-25"}}
	own, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = own.Body.Close() }()
	type message struct {
		ID     jsontext.Value `json:"id"`
		Method string         `json:"method"`
		Params struct {
			TaskID string                    `json:"taskId"`
			Status string                    `json:"status"`
			Meta   map[string]jsontext.Value `json:"_meta"`
		} `json:"params"`
		Result struct {
			Content jsontext.Value `json:"content"`
		} `json:"result"`
	}
	next := func(s *bufio.Scanner) (m message) {
		t.Helper()
		for s.Scan() {
			if data, ok := strings.CutPrefix(s.Text(), "data: "); ok && data != "" {
				if err := json.Unmarshal([]byte(data), &m); err != nil {
					t.Fatalf("%v: %s", err, data)
				}
				return m
			}
		}
		t.Fatal("the stream ended", s.Err())
		return m
	}
	id := h.session("alice", "tools/call", `{"name":"ask","arguments":{},"task":{"ttl":60000}}`).Result.Task.TaskID
	heard := bufio.NewScanner(own.Body)
	for {
		m := next(heard)
		if m.Method != "notifications/tasks/status" || m.Params.TaskID != id || m.Params.Meta != nil {
			t.Fatalf("heard %+v", m)
		}
		if m.Params.Status == "input_required" {
			break
		}
	}
	res := h.send("alice", "tasks/result", `{"taskId":"`+id+`"}`)
	defer func() { _ = res.Body.Close() }()
	stream := bufio.NewScanner(res.Body)
	for range 2 {
		m := next(stream)
		if m.Method != "elicitation/create" || string(m.Params.Meta["io.modelcontextprotocol/related-task"]) != `{"taskId":"`+id+`"}` {
			t.Fatalf("asked %+v", m)
		}
		h.read(h.notify("alice", `{"jsonrpc":"2.0","id":`+string(m.ID)+`,"result":{"action":"accept","content":{"x":"y"}}}`))
	}
	if m := next(stream); !strings.Contains(string(m.Result.Content), "accept") {
		t.Errorf("the result: %+v", m)
	}
	for {
		if m := next(heard); m.Params.Status == "completed" {
			break
		} else if m.Params.Status != "working" {
			t.Fatalf("heard %+v", m)
		}
	}
}
