package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// variants are calls that take another way: as tasks, with an approval, with answers. On each engine they
// run beside everything else, since they mostly wait for leases.
func variants() []task {
	return []task{
		{name: "tasks", nodes: 1, do: tasksCrash},
		{name: "takeover", engine: "postgres", nodes: 2, long: true, do: workerDies},
		{name: "approvals", nodes: 1, long: true, do: approvalsCrash},
		{name: "expiry", nodes: 1, do: approvalsRunOut},
		{name: "answers", nodes: 1, do: answersComeAgain},
	}
}

// configure adds sections to the configuration of the nodes. They do not run.
func (l *lane) configure(sections string) error {
	for _, n := range l.nodes {
		name := filepath.Join(n.dir, "newel.yaml")
		b, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		if err := os.WriteFile(name, append(b, sections...), 0o600); err != nil {
			return err
		}
	}
	return nil
}

// request is one message of a client that takes tasks and can be asked.
func request(addr, method, subject, key string, id int, params map[string]any) []byte {
	params["_meta"] = map[string]any{
		"io.modelcontextprotocol/protocolVersion": revision,
		"io.modelcontextprotocol/clientCapabilities": map[string]any{
			"elicitation": map[string]any{"form": map[string]any{}}, "extensions": map[string]any{"io.modelcontextprotocol/tasks": map[string]any{}},
		},
	}
	body, err := json.Marshal(map[string]any{"jsonrpc": "2.0", "id": id, "method": method, "params": params})
	if err != nil {
		panic(err) // strings and numbers
	}
	var b bytes.Buffer
	fmt.Fprintf(&b, "POST /mcp HTTP/1.1\r\nHost: %s\r\nConnection: close\r\nContent-Type: application/json\r\nAccept: application/json\r\nMcp-Protocol-Version: %s\r\nMcp-Method: %s\r\nMcp-Name: %s\r\n", addr, revision, method, subject)
	if key != "" {
		fmt.Fprintf(&b, "Idempotency-Key: %s\r\n", strconv.Quote(key))
	}
	fmt.Fprintf(&b, "Content-Length: %d\r\n\r\n", len(body))
	b.Write(body)
	return b.Bytes()
}

// An errand is a call that its driver wants as a task.
type errand struct {
	*operation
	handle   string // once it was heard of
	asks     []string
	petition *petition // if a person has to approve it
}

func (l *lane) errand(tool string) *errand { return &errand{operation: l.operation(tool)} }

// told is what a server says of a task.
type told struct {
	Result struct {
		ID     string                     `json:"taskId"`
		Status string                     `json:"status"`
		Asks   map[string]json.RawMessage `json:"inputRequests"`
		Result json.RawMessage            `json:"result"`
		Error  json.RawMessage            `json:"error"`
	} `json:"result"`
	Error *struct {
		Message string `json:"message"`
		Data    struct {
			Code string `json:"code"`
		} `json:"data"`
	} `json:"error"`
}

// attempt sends one message about an errand and writes down what became of it. understood says what its
// answer means; nil stands for a call that ended at once.
func (l *lane) attempt(e *errand, addr, method, subject, key string, params map[string]any, understood func(*Event, *told)) Event {
	e.Attempts++
	ev := Event{Kind: invoked, Op: e.ID, Tool: e.Tool, Nonce: e.Nonce, Attempt: e.Attempts}
	l.journal.add(ev)
	ev.Kind = returned
	status, body, err := l.exchange(addr, request(addr, method, subject, key, e.Attempts, params), way{})
	var t told
	switch {
	case err != nil:
		ev.Outcome, ev.Detail = lost, err.Error()
	case json.Unmarshal(body, &t) != nil || t.Error != nil || t.Result.ID == "" && method != "tasks/update" && method != "tasks/cancel":
		understand(&ev, status, body, e.operation)
		if ev.Outcome == refused && e.petition != nil {
			l.refusal(&ev, e.petition, body)
		}
		if t.Error != nil && t.Error.Data.Code == "not_found" && method == "tasks/get" {
			ev.Outcome, t.Result.ID, t.Result.Status = working, subject, taskGone
			understood(&ev, &t)
		}
	default:
		ev.Outcome = working
		understood(&ev, &t)
	}
	l.journal.add(ev)
	return ev
}

// begin makes the task, or finds it by its key.
func (l *lane) begin(e *errand, addr string) Event {
	return l.attempt(e, addr, "tools/call", e.Tool, e.Key, map[string]any{"name": e.Tool, "arguments": e.Args}, func(_ *Event, t *told) {
		e.handle = t.Result.ID
		l.journal.add(Event{Kind: handed, Op: e.ID, Subject: e.handle})
	})
}

// look asks how the task stands.
func (l *lane) look(e *errand, addr string) Event {
	return l.attempt(e, addr, "tasks/get", e.handle, "", map[string]any{"taskId": e.handle}, func(ev *Event, t *told) {
		l.journal.add(Event{Kind: looked, Op: e.ID, Subject: e.handle, Status: t.Result.Status})
		ev.Detail, e.asks = t.Result.Status, nil
		switch t.Result.Status {
		case taskAsks:
			ev.Outcome = asked
			for key := range t.Result.Asks {
				e.asks = append(e.asks, key)
			}
		case taskCanceled:
			ev.Outcome = stopped
		case "completed", "failed":
			body := fmt.Appendf(nil, `{"result":%s}`, t.Result.Result)
			if t.Result.Error != nil {
				body = fmt.Appendf(nil, `{"error":%s}`, t.Result.Error)
			}
			understand(ev, 0, body, e.operation)
		}
	})
}

// answer answers what the task asked.
func (l *lane) answer(e *errand, addr string) Event {
	answers := map[string]any{}
	for _, key := range e.asks {
		answers[key] = map[string]any{"action": "accept", "content": map[string]any{"yes": true}}
	}
	return l.attempt(e, addr, "tasks/update", e.handle, "", map[string]any{"taskId": e.handle, "inputResponses": answers}, func(*Event, *told) {})
}

// cancel ends the task.
func (l *lane) cancel(e *errand, addr string) Event {
	return l.attempt(e, addr, "tasks/cancel", e.handle, "", map[string]any{"taskId": e.handle}, func(*Event, *told) {
		l.journal.add(Event{Kind: cancelled, Op: e.ID, Subject: e.handle})
	})
}

// until looks at a task until it stands as wanted.
func (l *lane) until(e *errand, addr, status string) error {
	for deadline := time.Now().Add(deathTime); time.Now().Before(deadline); <-time.After(10 * time.Millisecond) {
		if ev := l.look(e, addr); ev.Detail == status {
			return nil
		} else if ev.Outcome == lost && l.over(addr) {
			return errors.New("the node ended")
		}
	}
	return fmt.Errorf("the task of %s does not become %s", e.ID, status)
}

// finish sees an errand through to its end, and asks once more for its task and by its key.
func (l *lane) finish(e *errand, addr string) {
	deadline := time.Now().Add(l.patience())
	for pause := 2 * time.Millisecond; ; pause = min(2*pause, 200*time.Millisecond) {
		var ev Event
		if e.handle == "" {
			ev = l.begin(e, addr)
		} else {
			ev = l.look(e, addr)
		}
		switch ev.Outcome {
		case asked:
			l.answer(e, addr)
			pause = time.Millisecond
		case succeeded, unknown, stopped, refused:
			l.look(e, addr)
			if e.Key != "" {
				l.begin(e, addr)
			}
			return
		}
		if ev.Detail == taskGone {
			return
		}
		if time.Now().After(deadline) || ev.Outcome == lost && l.over(addr) {
			l.journal.add(Event{Kind: gaveUp, Op: e.ID, Tool: e.Tool, Detail: ev.Outcome + " " + ev.Detail})
			l.stuck = true
			return
		}
		<-time.After(pause)
	}
}

// taskSection has every tool that its caller may have as a task.
const taskSection = `tasks: {workers: %d, tools: [{tool: "*", support: optional}]}
`

// A taskPoint is how a task is broken. Its crash returns when the process is gone.
type taskPoint struct {
	name  string
	tools []string
	keyed bool // only with a key: its handle is lost
	held  bool // by the process that was killed
	crash func(l *lane, n *node, e *errand) error
}

var effects = []string{"plain", "resend", "lookup"}

// armed crashes at a point that the task reaches by itself.
func armed(p string) func(*lane, *node, *errand) error {
	return func(l *lane, n *node, e *errand) error {
		if err := n.arm(p); err != nil {
			return err
		}
		l.begin(e, n.addr)
		return l.gone(n, p)
	}
}

// whenAsked crashes at a point that the task reaches when its caller does something about its question;
// without a point it is ended while it waits.
func whenAsked(p string, do func(*lane, *errand, string) Event) func(*lane, *node, *errand) error {
	return func(l *lane, n *node, e *errand) error {
		l.begin(e, n.addr)
		if err := l.until(e, n.addr, taskAsks); err != nil {
			return err
		}
		if p == "" {
			n.Kill()
			return nil
		}
		if err := n.arm(p); err != nil {
			return err
		}
		do(l, e, n.addr)
		return l.gone(n, p)
	}
}

// behind ends the node while the task waits in the queue for one that runs. do happens before.
func behind(do func(*lane, *errand, string) Event) func(*lane, *node, *errand) error {
	return func(l *lane, n *node, e *errand) error {
		first := l.errand("resend")
		first.Args.Delay = 400
		l.begin(first, n.addr)
		l.begin(e, n.addr)
		if do != nil {
			do(l, e, n.addr)
		}
		<-time.After(time.Duration(l.rand.IntN(30)) * time.Millisecond)
		n.Kill()
		l.touchedBy(first, "task K6")
		l.later = append(l.later, first)
		return nil
	}
}

// touchedBy writes down that an errand was broken along with another.
func (l *lane) touchedBy(e *errand, point string) {
	e.Broken = time.Now()
	l.journal.add(Event{Kind: faulted, Op: e.ID, Point: point, Tool: e.Tool})
}

// atLedger crashes at a moment of the task's call that the ledger sees.
func atLedger(step string) func(*lane, *node, *errand) error {
	return func(l *lane, n *node, e *errand) error {
		if step == "answer" {
			largeAnswer(l, e.operation)
		}
		if err := l.plan(plan{Step: step, PID: n.PID(), Signal: syscall.SIGKILL, Run: l.rand.IntN(2) == 0}); err != nil {
			return err
		}
		l.begin(e, n.addr)
		return l.gone(n, step)
	}
}

// taskPoints are the moments at which tasks are broken.
func taskPoints() []taskPoint {
	every, asks := []string{"plain", "resend", "lookup", "ask"}, []string{"ask"}
	return []taskPoint{
		{"T1 before", every, true, false, armed("T1 before")},
		{"T1 after", every, true, false, armed("T1 after")},
		{"T2 before", every, true, false, armed("T2 before")},
		{"T2 after", every, true, true, armed("T2 after")},
		{"task K4", effects, false, true, armed("K4")},
		{"task K6", effects, false, true, atLedger("request")},
		{"task K6 done", effects, false, true, atLedger("done")},
		{"task K7", effects, false, true, atLedger("answer")},
		{"task K8", effects, false, true, armed("K8")},
		{"task K9 before", effects, false, true, armed("K9 before")},
		{"task K9 after", effects, false, true, armed("K9 after")},
		{"T3", effects, false, true, armed("T3")},
		{"T4 before", effects, false, true, armed("T4 before")},
		{"T4 after", effects, false, false, armed("T4 after")},
		{"T5 before", asks, false, true, armed("T5 before")},
		{"T5 after", asks, false, false, armed("T5 after")},
		{"T6 before", asks, false, false, whenAsked("T6 before", (*lane).answer)},
		{"T6 after", asks, false, false, whenAsked("T6 after", (*lane).answer)},
		{"T7 before", asks, false, false, whenAsked("T7 before", (*lane).cancel)},
		{"T7 after", asks, false, false, whenAsked("T7 after", (*lane).cancel)},
		{"T7 queued", every, false, false, behind((*lane).cancel)},
		{"T8 queued", every, false, false, behind(nil)},
		{"T9 asked", asks, false, false, whenAsked("", nil)},
	}
}

// tasksCrash breaks tasks at every moment, twice: with a key and without one.
func tasksCrash(l *lane) error {
	n := l.nodes[0]
	if err := errors.Join(l.configure(fmt.Sprintf(taskSection, 1)), l.restart(n, false)); err != nil {
		return err
	}
	for round := range 2 {
		for _, p := range taskPoints() {
			e := l.errand(p.tools[l.rand.IntN(len(p.tools))])
			if round == 1 && !p.keyed {
				e.Key = "" // the task has a key of its own
			}
			if err := p.crash(l, n, e); err != nil {
				return fmt.Errorf("%s: %w", p.name, err)
			}
			l.fault(e.operation, p.name)
			if err := l.restart(n, l.engine == "sqlite" && l.rand.IntN(2) == 0); err != nil {
				return err
			}
			switch {
			case e.handle == "" && e.Key == "": // nobody can ask for it; that it is not done twice is seen all the same
				<-time.After(time.Second)
				continue
			case e.handle != "":
				l.look(e, n.addr) // at once: its handle holds
			}
			if l.later = append(l.later, e); l.lease() == 0 {
				l.finishAll(n.addr)
				continue
			}
			if !p.held {
				l.later = l.later[:len(l.later)-1]
				l.finish(e, n.addr)
			}
			if len(l.later) > 0 && time.Since(l.later[0].Broken) > l.lease()/2 {
				l.finishAll(n.addr) // before what is held is free, and comes by a point that is meant for another one
			}
		}
	}
	l.finishAll(n.addr)
	return nil
}

// finishAll sees all errands through.
func (l *lane) finishAll(addr string) {
	for _, e := range l.later {
		if !l.stuck {
			l.finish(e, addr)
		}
	}
	l.later = nil
}

// workerDies ends a node that runs tasks, and has another one go on with all of them; then it is only
// stopped, and wakes up when they are done.
func workerDies(l *lane) error {
	a, b := l.nodes[0], l.nodes[1]
	if err := errors.Join(l.configure(fmt.Sprintf(taskSection, 4)), l.restart(b, false)); err != nil {
		return err
	}
	for _, p := range []string{"K8", "T3", "K8 stop"} {
		if err := l.restart(a, false); err != nil {
			return err
		}
		for i := range 8 { // more than it has workers, so that some wait
			e := l.errand(append(effects, "ask")[i%4])
			e.Args.Delay = 1500 // all are begun before the first one ends
			l.touchedBy(e, "takeover")
			l.later = append(l.later, e)
			l.begin(e, a.addr)
		}
		if err := a.arm(p); err != nil {
			return err
		}
		if p != "K8 stop" {
			if err := l.gone(a, p); err != nil {
				return err
			}
		} else if err := a.Until(l.host.Context(), "the point "+p, func() bool { _, err := os.Stat(a.armed()); return errors.Is(err, os.ErrNotExist) }); err != nil {
			return err
		}
		all := l.later
		l.finishAll(b.addr)
		l.incident("takeover")
		if p != "K8 stop" {
			continue
		}
		if err := a.Signal(syscall.SIGCONT); err != nil {
			return err
		}
		<-time.After(time.Second) // for what it had begun to be refused
		for _, e := range all {
			l.look(e, a.addr)
			l.look(e, b.addr)
		}
	}
	return nil
}

// answersComeAgain sends the answers to a question of a call without a key more than once.
func answersComeAgain(l *lane) error {
	n := l.nodes[0]
	if err := l.restart(n, false); err != nil {
		return err
	}
	for _, p := range []string{"K12", "K2 before", "K4", "K9 before", "K10"} {
		o := l.operation("ask")
		o.Key = ""
		l.try(o, n.addr, way{})
		if p != "K12" {
			if err := n.arm(p); err != nil {
				return err
			}
		}
		l.tryAt(o, n)
		if p == "K12" {
			n.Kill()
		} else if err := l.gone(n, p); err != nil {
			return err
		}
		l.fault(o, "answers "+p)
		if err := l.restart(n, l.engine == "sqlite" && l.rand.IntN(2) == 0); err != nil {
			return err
		}
		l.pending = append(l.pending, o)
	}
	<-time.After(l.lease())
	for _, o := range l.pending {
		again := 3
		for deadline := time.Now().Add(l.patience()); again > 0; {
			e := l.try(o, n.addr, way{})
			if e.Outcome == succeeded || e.Outcome == unknown || strings.Contains(e.Detail, "used already") || strings.Contains(e.Detail, "came before") {
				again--
			} else if <-time.After(20 * time.Millisecond); time.Now().After(deadline) {
				l.journal.add(Event{Kind: gaveUp, Op: o.ID, Tool: o.Tool, Detail: e.Outcome + " " + e.Detail})
				break
			}
		}
	}
	l.pending = nil
	return nil
}
