package gateway

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/assembly"
	"newel.dev/newel/internal/backend/mcpupstream"
)

// longJobs is a server whose tools are tasks.
type longJobs struct {
	release chan struct{}
	mu      sync.Mutex
	ids     []string // of the tasks at the server
	ended   []error
}

// Name implements call.Backend.
func (*longJobs) Name() string { return "jobs" }

// Capabilities implements call.Backend.
func (j *longJobs) Capabilities(context.Context) ([]*call.Capability, error) {
	tool := func(name string, run call.Handler) *call.Capability {
		return &call.Capability{Kind: call.Tool, Name: name, Description: name, Input: jsontext.Value(`{"type":"object"}`), Effect: call.Write, Tasks: call.TaskRequired, Run: run}
	}
	return []*call.Capability{
		tool("pay", func(ctx context.Context, c *call.Call) (*call.Result, error) {
			j.mu.Lock()
			j.ids = append(j.ids, c.TaskID)
			j.mu.Unlock()
			if err := c.Sink.Progress(ctx, call.Progress{Done: 1, Message: "paying"}); err != nil {
				return nil, err
			}
			var err error
			select {
			case <-j.release:
			case <-ctx.Done():
				err = ctx.Err()
			}
			j.mu.Lock()
			defer j.mu.Unlock()
			j.ended = append(j.ended, err)
			return &call.Result{Content: call.TextContent("paid"), Structured: jsontext.Value(`{"n":9007199254740993}`)}, err
		}),
		tool("confirm", func(ctx context.Context, c *call.Call) (*call.Result, error) {
			a, err := c.Asker.Ask(ctx, call.Question{Key: "sure", Method: call.MethodElicit, Params: jsontext.Value(`{"message":"?","requestedSchema":{"type":"object","properties":{}}}`)})
			return &call.Result{Content: call.TextContent(string(a["sure"]))}, err
		}),
		tool("refuse", func(context.Context, *call.Call) (*call.Result, error) {
			return nil, &call.Error{Code: call.Failed, Message: "no", RPC: -31000, Data: jsontext.Value(`{"why":"because"}`)}
		}),
	}, nil
}

func (j *longJobs) saw() (ids []string, ended []error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return append(ids, j.ids...), append(ended, j.ended...)
}

type taskReply struct {
	Result struct {
		TaskID        string                    `json:"taskId"`
		Status        string                    `json:"status"`
		StatusMessage string                    `json:"statusMessage"`
		InputRequests map[string]jsontext.Value `json:"inputRequests"`
		Result        jsontext.Value            `json:"result"`
		Error         jsontext.Value            `json:"error"`
	} `json:"result"`
	Error jsontext.Value `json:"error"`
}

func taskCall(t *testing.T, url, method, subject, params string) (r taskReply) {
	t.Helper()
	body := fmt.Sprintf(`{"jsonrpc":"2.0","id":1,"method":%q,"params":{%s,"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28","io.modelcontextprotocol/clientCapabilities":{"elicitation":{},"extensions":{"io.modelcontextprotocol/tasks":{}}}}}}`, method, params)
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header = http.Header{"Content-Type": {"application/json"}, "Mcp-Protocol-Version": {"2026-07-28"}, "Mcp-Method": {method}, "Mcp-Name": {subject}}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if err := json.UnmarshalRead(res.Body, &r); err != nil {
		t.Fatal(err)
	}
	return r
}

// TestTasksOfServers is a server whose tools are tasks, behind the gateway: its tasks are followed, callers
// know the gateway's, and what they do to those reaches the server.
func TestTasksOfServers(t *testing.T) {
	jobs := &longJobs{release: make(chan struct{})}
	behind := serveHouse(t, assembly.Options{Backends: []call.Backend{jobs}, Tasks: assembly.Tasks{Poll: 100 * time.Millisecond}})
	url := serve(t, map[string]mcpupstream.Config{"jobs": {URL: behind, Revision: "2026-07-28"}})
	begin := func(tool string) string {
		t.Helper()
		var r taskReply
		waitFor(t, tool+" is there", func() bool {
			r = taskCall(t, url, "tools/call", tool, fmt.Sprintf(`"name":%q,"arguments":{}`, tool))
			return r.Result.TaskID != ""
		})
		return r.Result.TaskID
	}
	about := func(method, id, more string) taskReply {
		t.Helper()
		return taskCall(t, url, method, id, fmt.Sprintf(`"taskId":%q%s`, id, more))
	}
	until := func(id, status string) (r taskReply) {
		t.Helper()
		waitFor(t, id+" is "+status, func() bool {
			r = about("tasks/get", id, "")
			return r.Result.Status == status
		})
		return r
	}

	id := begin("pay")
	waitFor(t, "it says how far it is", func() bool { return about("tasks/get", id, "").Result.StatusMessage == "paying" })
	theirs, _ := jobs.saw()
	if len(theirs) != 1 || theirs[0] == "" || theirs[0] == id {
		t.Fatalf("the server has %v, the caller %s", theirs, id)
	}
	if r := about("tasks/get", theirs[0], ""); r.Error == nil {
		t.Errorf("the server's id is one of the gateway: %+v", r)
	}
	jobs.release <- struct{}{}
	if r := until(id, "completed"); !strings.Contains(string(r.Result.Result), `{"n":9007199254740993}`) {
		t.Errorf("ended with %s", r.Result.Result)
	}

	id = begin("confirm")
	if r := until(id, "input_required"); r.Result.InputRequests["sure"] == nil {
		t.Errorf("it asks %+v", r)
	}
	if r := about("tasks/update", id, `,"inputResponses":{"sure":{"action":"decline"}}`); r.Error != nil {
		t.Errorf("answered: %s", r.Error)
	}
	if r := until(id, "completed"); !strings.Contains(string(r.Result.Result), "decline") {
		t.Errorf("ended with %s", r.Result.Result)
	}

	id = begin("refuse")
	if r := until(id, "failed"); !strings.Contains(string(r.Result.Error), `"code":-31000`) || !strings.Contains(string(r.Result.Error), "because") {
		t.Errorf("failed with %s", r.Result.Error)
	}

	id = begin("pay")
	waitFor(t, "it runs", func() bool { ids, _ := jobs.saw(); return len(ids) == 2 })
	about("tasks/cancel", id, "")
	waitFor(t, "the server stops as well", func() bool { _, ended := jobs.saw(); return len(ended) == 2 && ended[1] != nil })
	if r := about("tasks/get", id, ""); r.Result.Status != "cancelled" {
		t.Errorf("after cancelling: %+v", r)
	}
}

func waitFor(t *testing.T, what string, is func() bool) {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); <-tick.C {
		if is() {
			return
		}
	}
	t.Fatalf("it never happened: %s", what)
}
