package task_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/secret"
	"newel.dev/newel/internal/store/inmem"
	"newel.dev/newel/internal/task"
)

// node is one worker's side of a store that several may share.
type node struct {
	*task.Tasks
	make call.Handler
	stop func()
}

// nodes returns a function that starts nodes on one store. run is what their tasks do.
func nodes(t *testing.T) func(o task.Options, run call.Handler) *node {
	store, key := inmem.New(), secret.RandomKey()
	return func(o task.Options, run call.Handler) *node {
		t.Helper()
		o.Store, o.Key, o.Path = store, key, func(string) call.Handler { return run }
		tasks, err := task.New(o)
		if err != nil {
			t.Fatal(err)
		}
		n := &node{Tasks: tasks, make: tasks.Guard("/mcp", func(*call.Call) error { return nil })(run)}
		ctx, cancel := context.WithCancel(context.Background())
		tasks.Accept()
		var done sync.WaitGroup
		done.Go(func() {
			if err := tasks.Run(ctx); err != nil {
				t.Error(err)
			}
		})
		n.stop = sync.OnceFunc(func() { cancel(); done.Wait() })
		t.Cleanup(n.stop)
		return n
	}
}

var tool = &call.Capability{Kind: call.Tool, Name: "job", Tasks: call.TaskOptional}

func (n *node) begin(t *testing.T, c *call.Call) *call.Task {
	t.Helper()
	c.Kind, c.Name, c.Target, c.AsTask.Accepts = call.Tool, "job", tool, true
	r, err := n.make(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	if r.Task == nil || r.Task.Status != call.TaskWorking {
		t.Fatalf("made %+v", r)
	}
	return r.Task
}

func (n *node) get(t *testing.T, id string) *call.Task {
	t.Helper()
	v, err := n.Server("/mcp").Find(t.Context(), &call.Call{}, id)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func (n *node) until(t *testing.T, id string, s call.TaskStatus) *call.Task {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(30 * time.Second); ; <-tick.C {
		if v := n.get(t, id); v.Status == s {
			return v
		} else if time.Now().After(deadline) {
			t.Fatalf("the task is %s and does not become %s", v.Status, s)
		}
	}
}

// TestTenThousand is as many tasks as may wait: all run, once, and one more is refused with advice.
func TestTenThousand(t *testing.T) {
	const many = 10_000
	gate := make(chan struct{})
	var ran atomic.Int64
	n := nodes(t)(task.Options{MaxPerUser: many + 100, Workers: 32}, func(ctx context.Context, _ *call.Call) (*call.Result, error) {
		select {
		case <-gate:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		ran.Add(1)
		return call.Text("ok"), nil
	})
	var refused *call.Error
	made := 0
	for refused == nil && made < 2*many {
		c := &call.Call{Kind: call.Tool, Name: "job", Target: tool, AsTask: call.TaskWish{Accepts: true}}
		if _, err := n.make(t.Context(), c); err != nil {
			refused = call.AsError(err)
		} else {
			made++
		}
	}
	if refused == nil || refused.Code != call.Exhausted || refused.RetryAfter < time.Second || made < many || made > many+64 {
		t.Fatalf("after %d tasks: %v", made, refused)
	}
	close(gate)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(60 * time.Second); ran.Load() < int64(made); <-tick.C {
		if time.Now().After(deadline) {
			t.Fatalf("%d of %d ran", ran.Load(), made)
		}
	}
	n.stop()
	if got := ran.Load(); got != int64(made) {
		t.Errorf("%d tasks ran %d times", made, got)
	}
}

// TestAgain is a run that did nothing, and then does it: its tool says so, or somebody else is at the same
// call. A conflict that stays is an end.
func TestAgain(t *testing.T) {
	running := call.Errorf(call.Conflict, "it is running")
	running.Retryable = true
	lost := call.Errorf(call.OutcomeUnknown, "it can be found out")
	lost.Retryable = true
	for _, first := range []error{call.Errorf(call.Unavailable, "not now"), running, lost} {
		synctest.Test(t, func(t *testing.T) { again(t, first) })
	}
	synctest.Test(t, func(t *testing.T) {
		n := nodes(t)(task.Options{}, func(context.Context, *call.Call) (*call.Result, error) {
			return nil, call.Errorf(call.Conflict, "it was done before")
		})
		if v := n.until(t, n.begin(t, &call.Call{}).ID, call.TaskFailed); call.AsError(v.Err).Code != call.Conflict {
			t.Errorf("it ended as %+v", v)
		}
		n.stop()
	})
}

func again(t *testing.T, first error) {
	var tries atomic.Int64
	n := nodes(t)(task.Options{}, func(context.Context, *call.Call) (*call.Result, error) {
		if tries.Add(1) == 1 {
			return nil, first
		}
		return call.Text("ok"), nil
	})
	id := n.begin(t, &call.Call{}).ID
	if v := n.until(t, id, call.TaskCompleted); tries.Load() != 2 || v.Result == nil || v.Message != "" {
		t.Errorf("after %d tries: %+v", tries.Load(), v)
	}
	n.stop()
}

// TestStoppedNode is a node that stops in the middle: the task goes back to the queue, and another node
// runs it.
func TestStoppedNode(t *testing.T) { synctest.Test(t, stoppedNode) }

func stoppedNode(t *testing.T) {
	open := nodes(t)
	began := make(chan struct{}, 1)
	first := open(task.Options{}, func(ctx context.Context, _ *call.Call) (*call.Result, error) {
		began <- struct{}{}
		<-ctx.Done()
		return nil, ctx.Err()
	})
	id := first.begin(t, &call.Call{}).ID
	<-began
	first.stop()
	if v := first.get(t, id); v.Status != call.TaskWorking {
		t.Errorf("after its node stopped the task is %s", v.Status)
	}
	second := open(task.Options{}, func(_ context.Context, c *call.Call) (*call.Result, error) { return call.Text(c.TaskID), nil })
	if v := second.until(t, id, call.TaskCompleted); !strings.Contains(string(v.Result.Content), id) {
		t.Errorf("the other node made %s", v.Result.Content)
	}
	second.stop()
}

// TestTimeIsOver is a task whose caller never answers: it fails, can be looked at for a while, and is gone.
func TestTimeIsOver(t *testing.T) { synctest.Test(t, timeIsOver) }

func timeIsOver(t *testing.T) {
	n := nodes(t)(task.Options{}, func(context.Context, *call.Call) (*call.Result, error) {
		return nil, &call.InputRequired{Questions: []call.Question{{Key: "q", Method: call.MethodRoots}}}
	})
	id := n.begin(t, &call.Call{AsTask: call.TaskWish{TTL: time.Second}}).ID // a minute is the least
	n.until(t, id, call.TaskInputRequired)
	time.Sleep(59 * time.Second)
	if v := n.get(t, id); v.Status != call.TaskInputRequired || v.TTL != time.Minute {
		t.Errorf("before its time was over: %+v", v)
	}
	time.Sleep(3 * time.Second)
	if v := n.get(t, id); v.Status != call.TaskFailed || v.Err == nil {
		t.Errorf("after its time: %+v", v)
	}
	time.Sleep(11 * time.Minute)
	if v, err := n.Server("/mcp").Find(t.Context(), &call.Call{}, id); err == nil {
		t.Errorf("long after: %+v", v)
	}
	n.stop()
}

// TestCancelElsewhere is a task that is cancelled through another node than the one that runs it.
func TestCancelElsewhere(t *testing.T) {
	open := nodes(t)
	began, ended := make(chan struct{}, 1), make(chan error, 1)
	runs := open(task.Options{}, func(ctx context.Context, _ *call.Call) (*call.Result, error) {
		began <- struct{}{}
		<-ctx.Done()
		ended <- context.Cause(ctx)
		return nil, ctx.Err()
	})
	id := runs.begin(t, &call.Call{}).ID
	<-began
	tells := open(task.Options{}, func(context.Context, *call.Call) (*call.Result, error) { return nil, errors.New("not here") })
	if _, err := tells.Server("/mcp").Handle(t.Context(), &call.Call{Kind: call.CancelTask, Name: id}); err != nil {
		t.Fatal(err)
	}
	select {
	case <-ended:
	case <-time.After(10 * time.Second):
		t.Fatal("it runs on")
	}
	if v := runs.until(t, id, call.TaskCancelled); v.Result != nil {
		t.Errorf("a cancelled task has a result: %+v", v)
	}
}

// TestQuestionsAgain is a handler that goes on where it was, and asks with the same key twice: its caller sees
// two keys, and each round has its own answers.
func TestQuestionsAgain(t *testing.T) {
	question := call.Question{Key: "q", Method: call.MethodElicit, Params: jsontext.Value(`{"message":"?"}`)}
	n := nodes(t)(task.Options{}, func(ctx context.Context, c *call.Call) (*call.Result, error) {
		round := len(c.Resume)
		if round > 0 {
			a, err := c.Asker.Ask(ctx, question)
			if err != nil {
				return nil, err
			}
			if !strings.Contains(string(a["q"]), fmt.Sprint("round", round)) {
				return nil, call.Errorf(call.Failed, "in round %d the answer is %s", round, a["q"])
			}
		}
		if round == 2 {
			return call.Text("ok"), nil
		}
		return nil, &call.InputRequired{Questions: []call.Question{question}, State: c.Resume + "."}
	})
	id := n.begin(t, &call.Call{Client: call.Client{ElicitForm: true}}).ID
	for round, shown := range []string{"q", "q-2"} {
		v := n.until(t, id, call.TaskInputRequired)
		if len(v.Questions) != 1 || v.Questions[0].Key != shown {
			t.Fatalf("round %d asks %+v", round, v.Questions)
		}
		answers := map[string]jsontext.Value{
			"q":   jsontext.Value(`{"action":"accept","content":{"x":"round1"}}`),
			"q-2": jsontext.Value(`{"action":"accept","content":{"x":"round2"}}`),
		}
		if _, err := n.Server("/mcp").Handle(t.Context(), &call.Call{Kind: call.UpdateTask, Name: id, Responses: answers}); err != nil {
			t.Fatal(err)
		}
		if round == 0 { // answered before it was asked: the next round waits for its own
			tick := time.NewTicker(5 * time.Millisecond)
			for v := n.get(t, id); v.Status != call.TaskInputRequired || v.Questions[0].Key != "q-2"; v = n.get(t, id) {
				<-tick.C
			}
			tick.Stop()
		}
	}
	if v := n.until(t, id, call.TaskCompleted); string(v.Result.Content) != string(call.TextContent("ok")) {
		t.Errorf("ended with %s", v.Result.Content)
	}
}

// TestPrepare is what is asked before a task is made: the task has the answers.
func TestPrepare(t *testing.T) {
	question := call.Question{Key: "who", Method: call.MethodElicit, Params: jsontext.Value(`{"message":"?"}`)}
	ask := func(ctx context.Context, c *call.Call) (*call.Result, error) {
		a, err := c.Asker.Ask(ctx, question)
		return &call.Result{Content: call.TextContent(string(a["who"]))}, err
	}
	n := nodes(t)(task.Options{}, ask)
	prepared := *tool
	prepared.Prepare = func(ctx context.Context, c *call.Call) error {
		_, err := ask(ctx, c)
		return err
	}
	c := &call.Call{Kind: call.Tool, Name: "job", Target: &prepared, AsTask: call.TaskWish{Accepts: true}, Client: call.Client{ElicitForm: true}, Asker: silent{}}
	var asked *call.InputRequired
	if _, err := n.make(t.Context(), c); !errors.As(err, &asked) {
		t.Fatalf("nothing was asked: %v", err)
	}
	c.Asker = says(`{"action":"accept","content":{"name":"Ada"}}`)
	r, err := n.make(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	if v := n.until(t, r.Task.ID, call.TaskCompleted); !strings.Contains(string(v.Result.Content), "Ada") {
		t.Errorf("the task answers %s", v.Result.Content)
	}
}

// silent has to ask its caller.
type silent struct{}

// Ask implements call.Asker.
func (silent) Ask(_ context.Context, q ...call.Question) (map[string]jsontext.Value, error) {
	return nil, &call.InputRequired{Questions: q}
}

// says answers every question.
type says string

// Ask implements call.Asker.
func (s says) Ask(_ context.Context, q ...call.Question) (map[string]jsontext.Value, error) {
	return map[string]jsontext.Value{q[0].Key: jsontext.Value(s)}, nil
}

// TestAnswersMakeOneTask is that answers to what was asked before there was a task make one, however often
// they are sent: the second time its handle comes again.
func TestAnswersMakeOneTask(t *testing.T) {
	n := nodes(t)(task.Options{}, func(context.Context, *call.Call) (*call.Result, error) { return call.Text("ok"), nil })
	one := n.begin(t, &call.Call{Asked: "a", AsTask: call.TaskWish{TTL: time.Minute}})
	n.until(t, one.ID, call.TaskCompleted)
	c := &call.Call{Kind: call.Tool, Name: "job", Target: tool, Asked: "a", AsTask: call.TaskWish{Accepts: true}}
	r, err := n.make(t.Context(), c)
	if err != nil || r.Task.ID != one.ID || !c.Event.Replayed {
		t.Errorf("the same answers: %+v, %v", r, err)
	}
	if one.TTL < 15*time.Minute {
		t.Errorf("the task is forgotten after %v, and the answers are taken for longer", one.TTL)
	}
	if other := n.begin(t, &call.Call{Asked: "b"}); other.ID == one.ID {
		t.Error("other answers get the same task")
	}
}
