package task

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"slices"
	"time"

	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/answer"
	"newel.dev/newel/internal/audit"
)

// A Server answers what callers of one server ask about tasks. It is safe for concurrent use.
type Server struct {
	*Tasks
	name string
}

// Server returns what tells callers of one server about their tasks.
func (t *Tasks) Server(name string) *Server { return &Server{t, name} }

// maxID bounds what is looked for.
const maxID = 128

func unknown() error {
	return call.Errorf(call.NotFound, "there is no such task, or it is not kept any more")
}

// Find returns a task of the caller's own. Those of others are not there.
func (s *Server) Find(ctx context.Context, c *call.Call, id string) (*call.Task, error) {
	r, err := s.find(ctx, c.Principal, id)
	if err != nil {
		return nil, err
	}
	return s.view(&r)
}

func (s *Server) find(ctx context.Context, p *call.Principal, id string) (Record, error) {
	if id == "" || len(id) > maxID {
		return Record{}, unknown()
	}
	r, err := s.store.Task(ctx, id)
	if err != nil {
		return Record{}, away(ctx, err)
	}
	if r.ID != id || !slices.Equal(r.Owner, ownerOf(p, s.name)) {
		return Record{}, unknown()
	}
	return r, nil
}

// view is a task as callers see it.
func (t *Tasks) view(r *Record) (*call.Task, error) {
	var req request
	if err := t.open("request", r.ID, r.Request, &req); err != nil {
		return nil, err
	}
	var n notes
	if r.Notes != nil {
		if err := t.open("notes", r.ID, r.Notes, &n); err != nil {
			return nil, err
		}
	}
	v := &call.Task{
		ID: r.ID, Tool: r.Tool, Message: n.Message, Created: time.UnixMicro(r.Created), Updated: time.UnixMicro(r.Updated),
		TTL: time.Duration(req.TTL) * time.Millisecond, Poll: t.o.Load().Poll, Args: req.Args,
	}
	switch r.State {
	case Waiting:
		v.Status = call.TaskInputRequired
		for i := range n.Pending {
			v.Questions = append(v.Questions, n.Pending[i].question())
		}
	case Cancelled:
		v.Status = call.TaskCancelled
		v.Err = call.Errorf(call.Canceled, "the task was cancelled")
	case Failed:
		v.Status = call.TaskFailed
		v.Err = call.Errorf(call.Timeout, "the task did not end within its time")
	case Completed:
		return v, t.conclude(r, v)
	default:
		v.Status = call.TaskWorking
	}
	return v, nil
}

// conclude adds the answer.
func (t *Tasks) conclude(r *Record, v *call.Task) error {
	b, err := t.box.Open(r.Answer, "answer of "+r.ID)
	if err != nil {
		return call.Errorf(call.Internal, "internal error").Because(err)
	}
	a, err := answer.Decode(b)
	if err != nil {
		return call.Errorf(call.Internal, "internal error").Because(err)
	}
	v.Status, v.Result, v.Err = call.TaskCompleted, a.Result, a.Err
	if a.Lost {
		v.Err = call.Errorf(call.TooLarge, "the task is done; its answer was too large to be kept, and it is not done again")
	}
	if v.Err != nil {
		v.Status = call.TaskFailed
	}
	return nil
}

// Handle ends calls about tasks.
func (s *Server) Handle(ctx context.Context, c *call.Call) (*call.Result, error) {
	switch c.Kind {
	case call.GetTask:
		return &call.Result{Task: c.Task}, nil
	case call.UpdateTask:
		return s.update(ctx, c.Principal, c.Name, c.Responses)
	case call.CancelTask:
		return s.cancel(ctx, c)
	case call.TaskResult:
		return s.result(ctx, c)
	}
	return nil, call.Errorf(call.Internal, "internal error").Because(errors.New("not a call about a task"))
}

// tries bounds how often a change is tried that others make impossible.
const tries = 16

var errBusy = errors.New("a task was changed by others over and over")

// update takes answers to what a task asked. Those that nobody waits for are ignored.
func (s *Server) update(ctx context.Context, p *call.Principal, id string, responses map[string]jsontext.Value) (*call.Result, error) {
	for range tries {
		r, err := s.find(ctx, p, id)
		if err != nil {
			return nil, err
		}
		if r.State != Waiting {
			return &call.Result{}, nil
		}
		var n notes
		if err := s.open("notes", id, r.Notes, &n); err != nil {
			return nil, err
		}
		taken, err := n.take(responses)
		if err != nil || !taken {
			return &call.Result{}, err
		}
		w := &Write{Record: r}
		if len(n.Pending) == 0 {
			w.State, n.Message = Queued, ""
		}
		if done, err := s.change(ctx, w, &n); err != nil || done {
			return &call.Result{}, err
		}
	}
	return nil, away(ctx, errBusy)
}

// take moves answers from responses to where the handler finds them.
func (n *notes) take(responses map[string]jsontext.Value) (taken bool, err error) {
	left := n.Pending[:0:0]
	for _, p := range n.Pending {
		a, ok := responses[p.Shown]
		if !ok {
			left = append(left, p)
			continue
		}
		q := p.question()
		if err := q.CheckAnswer(a); err != nil {
			return false, err
		}
		if n.Answers == nil {
			n.Answers = map[string]jsontext.Value{}
		}
		n.Answers[p.Key], taken = a, true
	}
	n.Pending = left
	return taken, nil
}

// change writes a task anew. done is false if somebody else did so before.
func (t *Tasks) change(ctx context.Context, w *Write, n *notes) (done bool, err error) {
	if n != nil {
		if w.Notes, err = t.seal("notes", w.ID, n); err != nil {
			return false, err
		}
	}
	w.Holder, w.Updated = rand.Text(), time.Now().UnixMicro()
	_, done, err = t.store.PutTask(ctx, w)
	if err != nil {
		return false, away(ctx, err)
	}
	if done {
		t.changed(w.ID)
		if w.State == Queued {
			t.wake()
		}
	}
	return done, nil
}

// cancel ends a task at once. What it was doing is stopped; what that has done already is in the
// record of its operation. A task that has ended stays as it is.
func (s *Server) cancel(ctx context.Context, c *call.Call) (*call.Result, error) {
	for range tries {
		r, err := s.find(ctx, c.Principal, c.Name)
		if err != nil {
			return nil, err
		}
		if !r.State.Ended() {
			w := &Write{Record: r}
			w.State = Cancelled
			rec := w.audited(audit.TaskEnded)
			rec.Outcome, rec.Code, rec.Correlation, rec.Door = "cancelled", call.Canceled.String(), c.Event.Correlation, c.Door
			if w.Entry, err = entry(&rec); err != nil {
				return nil, err
			}
			done, err := s.change(ctx, w, &notes{Message: "The task was cancelled."})
			if err != nil {
				return nil, err
			}
			if !done {
				continue
			}
			s.stop(c.Name, errCancelled)
			if r, err = s.find(ctx, c.Principal, c.Name); err != nil {
				return nil, err
			}
		}
		v, err := s.view(&r)
		return &call.Result{Task: v}, err
	}
	return nil, away(ctx, errBusy)
}

// result waits for the end of a task, asking its caller what the task asks.
func (s *Server) result(ctx context.Context, c *call.Call) (*call.Result, error) {
	f := s.NewFollower()
	defer f.Close()
	f.Add(c.Name)
	for {
		v, err := s.Find(ctx, c, c.Name)
		if err != nil {
			return nil, err
		}
		switch v.Status {
		case call.TaskCompleted, call.TaskFailed, call.TaskCancelled:
			return &call.Result{Task: v}, nil
		case call.TaskInputRequired:
			answers, err := c.Asker.Ask(ctx, related(v)...)
			if err != nil {
				return nil, err
			}
			if _, err := s.update(ctx, c.Principal, c.Name, answers); err != nil {
				return nil, err
			}
			continue
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-f.woken:
			f.taken()
		}
	}
}

// RelatedTask is the member of _meta that says of which task a message is (MCP 2025-11-25).
const RelatedTask = "io.modelcontextprotocol/related-task"

// related are the questions of a task, marked as such.
func related(v *call.Task) []call.Question {
	mark := append(call.AppendString(jsontext.Value(`{"`+RelatedTask+`":{"taskId":`), v.ID), `}}`...)
	var out []call.Question
	for _, q := range v.Questions {
		params := q.Params
		if params == nil {
			params = jsontext.Value("{}")
		}
		b := jsontext.Value("{")
		_ = call.EachMember(params, func(name string, m jsontext.Value) { // it is an object
			if name != "_meta" {
				b = append(append(append(call.AppendString(b, name), ':'), m...), ',')
			}
		})
		q.Params = append(append(append(b, `"_meta":`...), mark...), '}')
		out = append(out, q)
	}
	return out
}

// pageSize is how many tasks a page of a list has.
const pageSize = 50

// List returns the caller's own tasks, newest first, and the cursor of the next page. shows says of
// which tools a caller may hear.
func (s *Server) List(ctx context.Context, c *call.Call, shows func(tool string) bool) (tasks []*call.Task, next string, err error) {
	before := ""
	if c.Cursor != "" {
		b, err := base64.RawURLEncoding.DecodeString(c.Cursor)
		if err != nil || len(b) < 2 || len(b) > maxID || b[0] != '<' {
			return nil, "", call.Errorf(call.Malformed, "the cursor is not one of this list; begin without one")
		}
		before = string(b[1:])
	}
	rs, err := s.store.TasksOf(ctx, ownerOf(c.Principal, s.name), before, pageSize+1)
	if err != nil {
		return nil, "", away(ctx, err)
	}
	if len(rs) > pageSize {
		rs = rs[:pageSize]
		next = base64.RawURLEncoding.EncodeToString([]byte("<" + rs[pageSize-1].ID))
	}
	for i := range rs {
		if !shows(rs[i].Tool) {
			continue
		}
		v, err := s.view(&rs[i])
		if err != nil {
			return nil, "", err
		}
		tasks = append(tasks, v)
	}
	return tasks, next, nil
}
