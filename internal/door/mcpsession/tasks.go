package mcpsession

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json" // the SDK's types speak encoding/json
	"fmt"
	"math"
	"sync"
	"time"

	"github.com/go-json-experiment/json/jsontext"
	"github.com/modelcontextprotocol/go-sdk/mcp"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/mcpwire"
	"newel.dev/newel/internal/task"
)

// tasksRevision is the one revision of sessions that has tasks; there they are experimental.
const tasksRevision = "2025-11-25"

// codeMethodNotFound is what that revision says of tools that may not be a task, or have to be one.
const codeMethodNotFound = -32601

// taskParams are what the methods about tasks take.
type taskParams struct {
	mcp.ParamsBase
	TaskID string `json:"taskId"`
	Cursor string `json:"cursor"`
}

// taskKinds are the methods of the revision.
var taskKinds = map[string]call.Kind{
	"tasks/get": call.GetTask, "tasks/result": call.TaskResult, "tasks/cancel": call.CancelTask, "tasks/list": call.ListTasks,
}

// addTasks has the SDK let the methods through; takeOver answers them.
func (d *Door) addTasks(s *server) error {
	if d.o.Tasks == nil {
		return nil
	}
	for method, kind := range taskKinds {
		if kind == call.ListTasks && !s.about.has.TaskList {
			continue // callers that cannot be told apart would see each other's
		}
		err := mcp.AddReceivingCustomMethod(s.Server, method, func(context.Context, *mcp.ServerSession, *taskParams) (*result, error) {
			return nil, wireError(&mcpwire.Failure{Code: codeMethodNotFound, Message: "not served"})
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// announceTasks adds to an initialize result that tools may be tasks: the SDK knows no such capability.
func (d *Door) announceTasks(has mcpwire.Has, r *mcp.InitializeResult) (mcp.Result, error) {
	if d.o.Tasks == nil || !has.Tasks || r.ProtocolVersion != tasksRevision {
		return r, nil
	}
	raw, err := json.Marshal(r)
	if err != nil {
		return r, nil
	}
	var members map[string]json.RawMessage
	var capabilities map[string]json.RawMessage
	if json.Unmarshal(raw, &members) != nil || json.Unmarshal(members["capabilities"], &capabilities) != nil {
		return r, nil
	}
	capabilities["tasks"] = json.RawMessage(`{"cancel":{},"requests":{"tools":{"call":{}}}}`)
	if has.TaskList {
		capabilities["tasks"] = json.RawMessage(`{"list":{},"cancel":{},"requests":{"tools":{"call":{}}}}`)
	}
	if members["capabilities"], err = json.Marshal(capabilities); err != nil {
		return nil, err
	}
	if raw, err = json.Marshal(members); err != nil {
		return nil, err
	}
	return &result{raw: raw}, nil
}

// lifted is where the task member of tools/call travels through the SDK, which knows none.
const lifted = "dev.newel/task"

// wish reads what a call wants of tasks, and refuses sessions of revisions without them.
func (d *Door) wish(has mcpwire.Has, c *call.Call, params mcp.Params) error {
	if d.o.Tasks == nil {
		return nil
	}
	if c.Kind.OfTask() || c.Kind == call.ListTasks {
		if c.Revision != tasksRevision {
			e := call.Errorf(call.NotFound, "tasks are part of revision %s; this session has another one", tasksRevision)
			e.RPC = codeMethodNotFound
			return e
		}
		if c.Name == "" && c.Kind != call.ListTasks {
			return call.Errorf(call.Malformed, "params.taskId is missing")
		}
		return nil
	}
	if c.Kind != call.Tool {
		return nil
	}
	c.AsTask.Refusal = codeMethodNotFound
	want, asks := params.GetMeta()[lifted]
	if !asks || c.Revision != tasksRevision || !has.Tasks {
		return nil // a receiver without the capability ignores it
	}
	c.AsTask.Asks = true
	members, ok := want.(map[string]any)
	if !ok {
		return call.Errorf(call.Malformed, "params.task must be an object")
	}
	ttl, given := members["ttl"]
	if !given || ttl == nil {
		return nil
	}
	ms, ok := ttl.(float64)
	if !ok || ms < 0 || math.IsNaN(ms) {
		return call.Errorf(call.Malformed, "params.task.ttl must be a number of milliseconds, not below zero")
	}
	const most = float64(math.MaxInt64 / int64(time.Millisecond))
	c.AsTask.TTL = time.Duration(min(ms, most/2)) * time.Millisecond
	c.AsTask.TTL = max(c.AsTask.TTL, 1) // none at all is the shortest there is
	return nil
}

// lift moves the task member of a tools/call into _meta. Anything else is returned as it is.
func lift(message []byte) []byte {
	if !bytes.Contains(message, []byte(`"task"`)) {
		return message
	}
	var params, wanted, meta jsontext.Value
	b := jsontext.Value("{")
	member := func(b []byte, name string, v jsontext.Value) []byte {
		return append(append(append(call.AppendString(b, name), ':'), v...), ',')
	}
	method := ""
	err := call.EachMember(message, func(name string, v jsontext.Value) {
		switch name {
		case "params":
			params = v.Clone()
			return
		case "method":
			method = string(v)
		}
		b = member(b, name, v)
	})
	if err != nil || method != `"tools/call"` || params.Kind() != '{' {
		return message
	}
	p := jsontext.Value("{")
	_ = call.EachMember(params, func(name string, v jsontext.Value) { // it is an object
		switch name {
		case "task":
			wanted = v.Clone()
		case "_meta":
			meta = v.Clone()
		default:
			p = member(p, name, v)
		}
	})
	if wanted == nil || meta != nil && meta.Kind() != '{' {
		return message
	}
	m := jsontext.Value("{")
	if meta != nil {
		_ = call.EachMember(meta, func(name string, v jsontext.Value) { // it is an object
			if name != lifted {
				m = member(m, name, v)
			}
		})
	}
	m = append(append(append(call.AppendString(m, lifted), ':'), wanted...), '}')
	p = append(append(append(p, `"_meta":`...), m...), '}')
	return append(append(append(b, `"params":`...), p...), '}')
}

// lifter lifts in every line.
type lifter struct {
	in   *bufio.Reader
	rest []byte
}

// Read implements io.Reader.
func (l *lifter) Read(p []byte) (int, error) {
	if len(l.rest) == 0 {
		line, err := l.in.ReadBytes('\n')
		if len(line) == 0 {
			return 0, err
		}
		l.rest = line
		if bytes.Contains(line, []byte(`"tools/call"`)) {
			l.rest = append(lift(bytes.TrimRight(line, "\r\n")), '\n')
		}
	}
	n := copy(p, l.rest)
	l.rest = l.rest[n:]
	return n, nil
}

// taskResult encodes what calls about tasks, and calls that became one, answer.
func (d *Door) taskResult(req mcp.Request, c *call.Call, r *call.Result) (mcp.Result, error) {
	switch {
	case c.Kind == call.Tool:
		if s, ok := req.GetSession().(*mcp.ServerSession); ok {
			d.tasks.add(r.Task.ID, &owner{session: s, principal: c.Principal})
		}
		return &result{raw: append(mcpwire.AppendSessionTask([]byte(`{"task":`), r.Task), '}')}, nil
	case c.Kind == call.TaskResult:
		answer, f := mcpwire.TaskAnswer(r.Task)
		if f != nil {
			return nil, wireError(f)
		}
		return &result{raw: mcpwire.AppendResult(nil, call.Tool, mcpwire.WithRelatedTask(answer, c.Name))}, nil
	case c.Kind == call.CancelTask && c.Task.Status.Ended():
		return nil, wireError(mcpwire.SessionError(c.Kind, call.Errorf(call.Malformed, "the task has ended already: it is %s", c.Task.Status)))
	case c.Kind == call.ListTasks:
		b := []byte(`{"tasks":[`)
		for i, t := range r.Tasks {
			if i > 0 {
				b = append(b, ',')
			}
			b = mcpwire.AppendSessionTask(b, t)
		}
		b = append(b, ']')
		if r.Next != "" {
			b = call.AppendString(append(b, `,"nextCursor":`...), r.Next)
		}
		return &result{raw: append(b, '}')}, nil
	}
	return &result{raw: mcpwire.AppendSessionTask(nil, r.Task)}, nil
}

// owner is the session that made a task, and as whom.
type owner struct {
	session   *mcp.ServerSession
	principal *call.Principal
	told      call.TaskStatus
}

// followed are the tasks that sessions of this door made: they hear of their changes.
type followed struct {
	*task.Follower // nil: there are no tasks
	mu             sync.Mutex
	owners         map[string]*owner
	listeners      map[string]map[*func([]byte)]struct{} // streams to clients
}

// maxTold bounds the tasks whose sessions hear of them; of others clients have to ask.
const maxTold = 10_000

func newFollowed(tasks *task.Server) *followed {
	f := &followed{owners: map[string]*owner{}, listeners: map[string]map[*func([]byte)]struct{}{}}
	if tasks != nil {
		f.Follower = tasks.NewFollower()
	}
	return f
}

func (f *followed) add(id string, o *owner) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.owners) < maxTold {
		f.owners[id] = o
		f.Add(id)
	}
}

func (f *followed) remove(id string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.owners, id)
	f.Remove(id)
}

// listenerOf names a session: those over stdio have no id.
func listenerOf(s *mcp.ServerSession) string {
	if id := s.ID(); id != "" {
		return id
	}
	return fmt.Sprintf("%p", s)
}

// listen sends what is told to a session to f as well, until the returned function is called.
func (d *Door) listen(session string, f func(message []byte)) (stop func()) {
	d.tasks.mu.Lock()
	defer d.tasks.mu.Unlock()
	all := d.tasks.listeners[session]
	if all == nil {
		all = map[*func([]byte)]struct{}{}
		d.tasks.listeners[session] = all
	}
	all[&f] = struct{}{}
	return func() {
		d.tasks.mu.Lock()
		defer d.tasks.mu.Unlock()
		delete(all, &f)
		if len(all) == 0 {
			delete(d.tasks.listeners, session)
		}
	}
}

// lostEvery is how often tasks of sessions that are gone are looked for.
const lostEvery = time.Minute

// tellTasks tells sessions of changes of the tasks that they made, until ctx ends.
func (d *Door) tellTasks(ctx context.Context) {
	defer d.tasks.Close()
	sweep := time.NewTicker(lostEvery)
	defer sweep.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-sweep.C:
			d.dropLost()
			continue
		case <-d.tasks.Woken():
		}
		for _, id := range d.tasks.Taken() {
			d.tasks.mu.Lock()
			o := d.tasks.owners[id]
			d.tasks.mu.Unlock()
			if o == nil {
				continue
			}
			t, err := d.o.Tasks.Find(ctx, &call.Call{Principal: o.principal}, id)
			if err != nil || o.told == t.Status {
				continue
			}
			o.told = t.Status // only here
			d.tell(listenerOf(o.session), append(mcpwire.AppendSessionTask([]byte(`{"jsonrpc":"2.0","method":"notifications/tasks/status","params":`), t), '}'))
			if t.Status.Ended() {
				d.tasks.remove(id)
			}
		}
	}
}

// tell sends a message on one stream of a session.
func (d *Door) tell(session string, message []byte) {
	d.tasks.mu.Lock()
	var send func([]byte)
	for f := range d.tasks.listeners[session] {
		send = *f
		break
	}
	d.tasks.mu.Unlock()
	if send != nil {
		send(message)
	}
}

// dropLost forgets tasks of sessions that are gone, and what those were shown.
func (d *Door) dropLost() {
	there := map[*mcp.ServerSession]bool{}
	for _, server := range d.all() {
		for s := range server.Sessions() {
			there[s] = true
		}
	}
	d.shown.drop(there)
	d.tasks.mu.Lock()
	defer d.tasks.mu.Unlock()
	for id, o := range d.tasks.owners {
		if !there[o.session] {
			delete(d.tasks.owners, id)
			d.tasks.Remove(id)
		}
	}
}
