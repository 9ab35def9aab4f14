package assembly_test

import (
	"context"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/assembly"
	"newel.dev/newel/internal/guard/approve"
	"newel.dev/newel/internal/policy"
	"newel.dev/newel/internal/secret"
	"newel.dev/newel/internal/store/inmem"
)

// payments is a backend with one tool that may be a task, and waits.
type payments struct {
	version string
	began   chan struct{}
	release chan struct{}
}

// Name implements call.Backend.
func (*payments) Name() string { return "payments" }

// Capabilities implements call.Backend.
func (p *payments) Capabilities(context.Context) ([]*call.Capability, error) {
	return []*call.Capability{{
		Kind: call.Tool, Name: "pay", Description: "Pays.", Input: jsontext.Value(`{"type":"object"}`), Effect: call.Write, Tasks: call.TaskOptional,
		Run: func(ctx context.Context, _ *call.Call) (*call.Result, error) {
			p.began <- struct{}{}
			select {
			case <-p.release:
				return call.Text("paid by " + p.version), nil
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		},
	}}, nil
}

// serveTasks serves what o says until the test ends.
func serveTasks(t *testing.T, o *assembly.Options) (*house, *assembly.Live) {
	t.Helper()
	b, err := assembly.Build(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	l := assembly.NewLive(b)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- l.Serve(ctx, listener) }()
	t.Cleanup(func() {
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return &house{t: t, url: "http://" + listener.Addr().String() + "/mcp", sessions: map[string]string{}}, l
}

// TestApprovedTask is a call that needs an approval: it becomes a task once it is approved, whose run uses the approval up.
func TestApprovedTask(t *testing.T) {
	rules, problems := policy.Compile(policy.Set{Rules: []policy.Rule{{Name: "payments", Then: "require_approval", Tools: []string{"pay"}, Approvers: []string{"boss"}}}})
	if problems != nil {
		t.Fatal(problems)
	}
	store, key := inmem.New(), secret.RandomKey()
	p := &payments{version: "one", began: make(chan struct{}, 4), release: make(chan struct{})}
	h, _ := serveTasks(t, &assembly.Options{
		Backends: []call.Backend{p}, State: store, Key: key, Identity: everybody, Policy: rules,
		Access: &assembly.Access{Resource: "http://127.0.0.1/mcp", Nonce: func() string { return "" }},
	})
	waits := func(r *reply) string {
		t.Helper()
		var data struct {
			Approval struct{ ID, State string } `json:"approval"`
		}
		if err := json.Unmarshal(r.Error.Data, &data, json.MatchCaseInsensitiveNames(true)); err != nil || r.Error.Code != -31403 || data.Approval.State != "pending" {
			t.Fatalf("it does not wait for approval: %v, %s", err, r.raw)
		}
		return data.Approval.ID
	}
	id := waits(h.call("alice", "pay", "{}"))
	boss, err := approve.New(approve.Options{Store: store, Key: key})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := boss.Decide(t.Context(), id, approve.Person{Name: "root", How: approve.ByOperator, Operator: true}, true, ""); err != nil {
		t.Fatal(err)
	}
	first, second := h.call("alice", "pay", "{}").Result.TaskID, ""
	if first == "" {
		t.Fatal("no task was made of an approved call")
	}
	<-p.began
	if r := h.call("alice", "pay", "{}"); r.Result.TaskID != "" { // the approval is used up
		second = r.Result.TaskID
	} else if waits(r) == id {
		t.Error("a used approval is waited for")
	}
	close(p.release)
	if r := h.until("alice", first, "completed"); !strings.Contains(r.raw, "paid by one") {
		t.Errorf("the approved task: %s", r.raw)
	}
	if second != "" {
		t.Errorf("a second task was made of one approval: %s", second)
	}
	select {
	case <-p.began:
		t.Error("one approval let two tasks run")
	default:
	}
}

// TestTasksGoOver is another configuration while tasks run: they end where they began, and the next ones run in the new one.
func TestTasksGoOver(t *testing.T) {
	store, key := inmem.New(), secret.RandomKey()
	backends := map[string]*payments{}
	configuration := func(version string) *assembly.Options {
		p := &payments{version: version, began: make(chan struct{}, 4), release: make(chan struct{})}
		backends[version] = p
		return &assembly.Options{
			Backends: []call.Backend{p}, State: store, Key: key, Identity: everybody, Tasks: assembly.Tasks{Workers: 2},
			Access: &assembly.Access{Resource: "http://127.0.0.1/mcp", Nonce: func() string { return "" }},
		}
	}
	h, l := serveTasks(t, configuration("one"))
	before := h.call("alice", "pay", "{}").Result.TaskID
	<-backends["one"].began
	let := make(chan struct{})
	if err := l.Replace(t.Context(), configuration("two"), func() { close(let) }); err != nil {
		t.Fatal(err)
	}
	after := h.call("alice", "pay", "{}").Result.TaskID
	select {
	case <-backends["two"].began:
	case <-time.After(10 * time.Second):
		t.Fatal("a task does not run in the new configuration")
	}
	select {
	case <-let:
		t.Error("the old house was let go while a task ran in it")
	default:
	}
	for version, id := range map[string]string{"one": before, "two": after} {
		close(backends[version].release)
		if r := h.until("alice", id, "completed"); !strings.Contains(r.raw, "paid by "+version) {
			t.Errorf("the task of %s: %s", version, r.raw)
		}
	}
	select {
	case <-let:
	case <-time.After(10 * time.Second):
		t.Error("the old house stays")
	}
}
