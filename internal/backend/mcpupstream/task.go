package mcpupstream

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
)

// A server of the stateless revision may answer a call with a task of its own. If the call is the work
// of a task here, that is followed: callers know ours, bound to them, and never see the server's. The
// handle is stored before anything else happens, so whichever node goes on finds it.

// takesTask reports whether the server may answer a call with a task.
func (t *target) takesTask(c *call.Call) bool { return t.tasks && c.TaskID != "" }

// capabilities are those of the caller, and tasks where they are followed.
func (t *target) capabilities(c *call.Call) jsontext.Value {
	caps := capabilitiesOf(&c.Client)
	if !t.takesTask(c) {
		return caps
	}
	o, x := newObject(), newObject()
	x.raw(tasksExtension, []byte("{}"))
	_ = call.EachMember(caps, func(name string, v jsontext.Value) { // it is an object
		if name == "extensions" {
			x.all(v.Clone(), tasksExtension)
			return
		}
		o.raw(name, v.Clone())
	})
	o.raw("extensions", x.end())
	return o.end()
}

// maxHandle bounds the id of a task at a server.
const maxHandle = 1024

// upstreamTask is a task as a server tells of it.
type upstreamTask struct {
	ID      string         `json:"taskId"`
	Status  string         `json:"status"`
	Message string         `json:"statusMessage"`
	Poll    float64        `json:"pollIntervalMs"`
	Result  jsontext.Value `json:"result"`
	Error   *rpcError      `json:"error"`
}

func readTask(r *result) (*upstreamTask, error) {
	var v upstreamTask
	if err := json.Unmarshal(r.Unknown, &v); err != nil || v.ID == "" || len(v.ID) > maxHandle {
		return nil, fmt.Errorf("%w: it is no task: %w", errGarbage, errors.Join(err, errors.New("the id is missing or too long")))
	}
	return &v, nil
}

func elsewhere(r *result) (*call.Result, error) {
	v, err := readTask(r)
	if err != nil {
		return nil, err
	}
	return &call.Result{Elsewhere: v.ID}, nil
}

// Bounds of how often a server is asked.
const (
	leastPoll = 100 * time.Millisecond
	usualPoll = time.Second
	mostPoll  = time.Minute
	lostAfter = 10 // failures in a row
)

// follow implements call.Capability.Follow: it asks for the task until it ends, or asks something.
func (t *target) follow(ctx context.Context, c *call.Call) (*call.Result, error) {
	var refused *rpcError
	said, failures := "", 0
	for progress := 1.0; ; progress++ {
		m, err := t.about(ctx, c, "tasks/get", nil)
		pause := usualPoll
		switch {
		case ctx.Err() != nil:
			t.leave(ctx, c)
			return nil, ctx.Err()
		case errors.As(err, &refused) || err != nil && call.AsError(err).Code == call.Failed:
			return nil, t.outcome(ctx, err) // the server knows of no such task, or speaks another language now
		case err != nil && failures < lostAfter:
			failures++ // asking is a read: the server may come back
			pause = time.Second << min(failures, 5)
		case err != nil:
			return nil, t.outcome(ctx, err)
		default:
			failures = 0
			v, r, err := t.standing(ctx, c, m.Result)
			if v == nil {
				return r, t.outcome(ctx, err)
			}
			if v.Message != said {
				said = v.Message
				_ = c.Sink.Progress(ctx, call.Progress{Done: progress, Message: v.Message}) // the next one tells
			}
			if v.Poll > 0 {
				pause = min(max(time.Duration(v.Poll)*time.Millisecond, leastPoll), mostPoll)
			}
		}
		timer := time.NewTimer(pause)
		select {
		case <-ctx.Done():
			timer.Stop()
			t.leave(ctx, c)
			return nil, ctx.Err()
		case <-timer.C:
		}
	}
}

// standing deals with a task as it stands. v is nil if that is the end of it here.
func (t *target) standing(ctx context.Context, c *call.Call, m *result) (v *upstreamTask, _ *call.Result, _ error) {
	v, err := readTask(m)
	if err != nil {
		return nil, nil, err
	}
	switch v.Status {
	case "working":
		return v, nil, nil
	case "input_required":
		q, err := questions(m)
		if err != nil {
			return nil, nil, err
		}
		answers, err := c.Asker.Ask(ctx, q.Questions...)
		if err != nil {
			return nil, nil, err
		}
		all := newObject()
		for _, q := range q.Questions {
			all.raw(q.Key, answers[q.Key])
		}
		if _, err := t.about(ctx, c, "tasks/update", all.end()); err != nil {
			return nil, nil, err
		}
		return v, nil, nil
	case "completed":
		var r result
		if err := json.Unmarshal(v.Result, &r); err != nil {
			return nil, nil, fmt.Errorf("%w: the result of a task: %w", errGarbage, err)
		}
		out, err := t.result(&r, true)
		return nil, out, err
	case "cancelled":
		return nil, nil, call.Errorf(call.Failed, "the server %q behind this cancelled the task", t.u.name)
	case "failed":
		if v.Error == nil {
			return nil, nil, fmt.Errorf("%w: a task failed without an error", errGarbage)
		}
		return nil, nil, v.Error
	}
	return nil, nil, fmt.Errorf("%w: a task is %.40q", errGarbage, v.Status)
}

// about sends a request about the task that the call left at the server.
func (t *target) about(ctx context.Context, c *call.Call, method string, answers jsontext.Value) (*message, error) {
	ctx, cancel := context.WithTimeout(ctx, cmp.Or(t.u.config.CallTimeout, aboutTimeout))
	defer cancel()
	s, release, err := t.u.lease(ctx, c)
	if err != nil {
		return nil, unsentError{err}
	}
	defer release()
	if !s.stateless {
		return nil, call.Errorf(call.Failed, "the server %q behind this was changed meanwhile, and tells nothing of the task", t.u.name)
	}
	p := newObject()
	p.str("taskId", c.Elsewhere)
	if answers != nil {
		p.raw("inputResponses", answers)
	}
	p.raw("_meta", t.u.meta(nil, t.capabilities(c), 0))
	m, err := s.request(ctx, &request{id: s.ids.Add(1), method: method, name: c.Elsewhere, params: p.end()}, func(*message) {})
	switch {
	case err != nil:
		return nil, err
	case m.Error != nil:
		return nil, m.Error
	}
	return m, nil
}

// aboutTimeout bounds one request about a task: the task itself may take hours.
const aboutTimeout = 30 * time.Second

// leaveTime bounds how long a server is told that a task is not wanted.
const leaveTime = 5 * time.Second

// leave cancels the task at the server, if ours was: another node may go on with it otherwise.
func (t *target) leave(ctx context.Context, c *call.Call) {
	if why := context.Cause(ctx); !errors.Is(why, call.ErrTaskCancelled) && !errors.Is(why, context.DeadlineExceeded) {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), leaveTime)
	defer cancel()
	_, _ = t.about(ctx, c, "tasks/cancel", nil) // it ends by its own time otherwise
}
