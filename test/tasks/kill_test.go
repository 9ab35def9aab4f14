package tasks

import (
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/test/engines"
	"newel.dev/newel/test/program"
)

// start starts a node and returns its address and how to kill it.
func start(t *testing.T, dsn, dir string, workers int) (url string, kill func()) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), envDSN+"="+dsn, envDir+"="+dir, fmt.Sprint(envWorkers, "=", workers))
	var out program.Log
	cmd.Stdout = &out
	p := program.Serve(t, cmd, func() bool {
		line, _, ok := strings.Cut(out.String(), "\n")
		url = "http://" + line
		return ok && program.Ready(url+"/ready")()
	})
	t.Cleanup(p.Kill)
	return url + "/mcp", p.Kill
}

func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(90 * time.Second); time.Now().Before(deadline); <-tick.C {
		if is() {
			return
		}
	}
	t.Fatalf("it never happened: %s", what)
}

type status struct {
	Result struct {
		TaskID string         `json:"taskId"`
		Status string         `json:"status"`
		Result jsontext.Value `json:"result"`
	} `json:"result"`
	Error jsontext.Value `json:"error"`
}

func post(t *testing.T, url, method, subject, params string) (s status) {
	t.Helper()
	body := fmt.Sprintf(`{"jsonrpc":"2.0","id":1,"method":%q,"params":{%s,"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28","io.modelcontextprotocol/clientCapabilities":{"extensions":{"io.modelcontextprotocol/tasks":{}}}}}}`, method, params)
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header = http.Header{"Content-Type": {"application/json"}, "Mcp-Protocol-Version": {"2026-07-28"}, "Mcp-Method": {method}, "Mcp-Name": {subject}}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = res.Body.Close() }()
	if err := json.UnmarshalRead(res.Body, &s); err != nil {
		t.Fatal(err)
	}
	return s
}

func begin(t *testing.T, url, tool string) string {
	t.Helper()
	s := post(t, url, "tools/call", tool, fmt.Sprintf(`"name":%q,"arguments":{}`, tool))
	if s.Result.TaskID == "" {
		t.Fatalf("%s: %s", tool, s.Error)
	}
	return s.Result.TaskID
}

func get(t *testing.T, url, id string) status {
	t.Helper()
	return post(t, url, "tasks/get", id, fmt.Sprintf(`"taskId":%q`, id))
}

// TestKilledNode is a node that is killed while it runs tasks and others wait: another one goes on with
// all of them. What had an effect is not done again, unless its tool says that it may be.
func TestKilledNode(t *testing.T) {
	dsn, dir := engines.Postgres(t), t.TempDir()
	const workers = 3
	one, kill := start(t, dsn, dir, workers)
	tasks := map[string]string{} // by id, the tool
	var running, queued []string
	for _, tool := range []string{"pay", "set", "read"} {
		id := begin(t, one, tool)
		tasks[id], running = tool, append(running, id)
	}
	lines := func() map[string]int {
		b, _ := os.ReadFile(filepath.Join(dir, "ledger")) // not there: nothing ran
		n := map[string]int{}
		for line := range strings.Lines(string(b)) {
			n[strings.TrimSpace(line)]++
		}
		return n
	}
	eventually(t, "three run", func() bool { return len(lines()) == workers })
	for range 5 {
		for _, tool := range []string{"pay", "set", "read"} {
			id := begin(t, one, tool)
			tasks[id], queued = tool, append(queued, id)
		}
	}
	if n := lines(); len(n) != workers {
		t.Fatalf("the ledger has %v before the node is killed", n)
	}
	kill()
	two, _ := start(t, dsn, dir, workers)
	for id := range tasks { // the handles hold on another node, at once
		if s := get(t, two, id); s.Result.Status != "working" {
			t.Errorf("%s %s on the other node: %+v", tasks[id], id, s)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "go"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for id := range tasks {
		eventually(t, tasks[id]+" "+id+" ends", func() bool { return get(t, two, id).Result.Status == "completed" })
	}
	n := lines()
	for _, id := range running {
		tool := tasks[id]
		s := get(t, two, id)
		unknown, did := strings.Contains(string(s.Result.Result), "outcome_unknown"), n[tool+" "+id]
		if tool == "pay" && (!unknown || did != 1) {
			t.Errorf("pay ran %d times, and its task says %s; want once, and that nobody knows", did, s.Result.Result)
		}
		if tool != "pay" && (unknown || did != 2) {
			t.Errorf("%s ran %d times, and its task says %s; want twice", tool, did, s.Result.Result)
		}
	}
	for _, id := range queued {
		if did := n[tasks[id]+" "+id]; did != 1 {
			t.Errorf("%s, which had not begun, ran %d times", tasks[id], did)
		}
	}
}

// TestTwoNodes is many tasks on two nodes: each runs once, on one of them. One is cancelled through the
// node that does not run it.
func TestTwoNodes(t *testing.T) {
	dsn, dir := engines.Postgres(t), t.TempDir()
	one, _ := start(t, dsn, dir, 2)
	two, _ := start(t, dsn, dir, 0) // it makes and tells, and runs with the default number
	victim := begin(t, one, "read")
	eventually(t, "it runs", func() bool {
		_, err := os.Stat(filepath.Join(dir, "ledger"))
		return err == nil
	})
	for _, url := range []string{one, two} {
		if s := post(t, url, "tasks/cancel", victim, fmt.Sprintf(`"taskId":%q`, victim)); s.Error != nil {
			t.Fatalf("cancelled: %s", s.Error)
		}
		if s := get(t, one, victim); s.Result.Status != "cancelled" {
			t.Errorf("after cancelling: %+v", s)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "go"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	var ids []string
	for i := range 40 {
		ids = append(ids, begin(t, []string{one, two}[i%2], "pay"))
	}
	for i, id := range ids {
		eventually(t, id+" ends", func() bool { return get(t, []string{two, one}[i%2], id).Result.Status == "completed" })
	}
	b, err := os.ReadFile(filepath.Join(dir, "ledger"))
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range ids {
		if n := strings.Count(string(b), "pay "+id); n != 1 {
			t.Errorf("a task ran %d times", n)
		}
	}
	if strings.Count(string(b), "\n") != len(ids)+1 {
		t.Errorf("the ledger has\n%s", b)
	}
}
