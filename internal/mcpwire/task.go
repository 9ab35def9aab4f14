package mcpwire

import (
	"strconv"
	"time"

	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/task"
)

// TaskAnswer is how a task ended, as the answer of its call would have been: a result, be it one that
// says that the tool failed, or else a JSON-RPC error.
func TaskAnswer(t *call.Task) (*call.Result, *Failure) {
	if t.Result != nil {
		return t.Result, nil
	}
	err := t.Err
	if err == nil {
		err = call.Errorf(call.Internal, "internal error")
	}
	if r := ToolError(err); r != nil {
		return r, nil
	}
	return nil, fail(nil, err)
}

// appendTask appends the members of a task as the extension for 2026-07-28 has it. detailed adds what
// belongs to its status.
func appendTask(b []byte, t *call.Task, detailed bool) []byte {
	status := t.Status
	var r *call.Result
	var f *Failure
	if status == call.TaskCompleted || status == call.TaskFailed {
		if r, f = TaskAnswer(t); r != nil {
			status = call.TaskCompleted // only JSON-RPC errors are failures
		}
	}
	b = appendCommon(b, t, status)
	b = strconv.AppendInt(append(b, `,"ttlMs":`...), t.TTL.Milliseconds(), 10)
	b = strconv.AppendInt(append(b, `,"pollIntervalMs":`...), t.Poll.Milliseconds(), 10)
	if !detailed {
		return b
	}
	switch {
	case status == call.TaskInputRequired:
		b = append(b, `,"inputRequests":{`...)
		for i, q := range t.Questions {
			if i > 0 {
				b = append(b, ',')
			}
			b = appendQuestion(b, &q)
		}
		b = append(b, '}')
	case r != nil:
		b = AppendResult(append(b, `,"result":`...), call.Tool, r)
	case f != nil:
		b = appendError(append(b, `,"error":`...), f)
	}
	return b
}

// appendCommon appends what both eras have.
func appendCommon(b []byte, t *call.Task, status call.TaskStatus) []byte {
	b = call.AppendString(append(b, `"taskId":`...), t.ID)
	b = append(append(append(b, `,"status":"`...), status.String()...), '"')
	if t.Message != "" {
		b = call.AppendString(append(b, `,"statusMessage":`...), t.Message)
	}
	b = appendTime(append(b, `,"createdAt":`...), t.Created)
	return appendTime(append(b, `,"lastUpdatedAt":`...), t.Updated)
}

func appendTime(b []byte, t time.Time) []byte {
	return append(t.UTC().AppendFormat(append(b, '"'), "2006-01-02T15:04:05.000Z"), '"')
}

func appendQuestion(b []byte, q *call.Question) []byte {
	b = append(call.AppendString(b, q.Key), `:{"method":`...)
	b = call.AppendString(b, q.Method)
	params := q.Params
	if params == nil {
		params = jsontext.Value("{}")
	}
	return append(append(append(b, `,"params":`...), params...), '}')
}

// AppendSessionTask appends a task as an object of revision 2025-11-25.
func AppendSessionTask(b []byte, t *call.Task) []byte {
	status := t.Status
	if status == call.TaskCompleted && t.Result != nil && t.Result.IsError {
		status = call.TaskFailed // that revision counts it so
	}
	b = appendCommon(append(b, '{'), t, status)
	b = strconv.AppendInt(append(b, `,"ttl":`...), t.TTL.Milliseconds(), 10)
	return append(strconv.AppendInt(append(b, `,"pollInterval":`...), t.Poll.Milliseconds(), 10), '}')
}

// WithRelatedTask returns a result marked as that of a task (MCP 2025-11-25).
func WithRelatedTask(r *call.Result, id string) *call.Result {
	out := *r
	b := append(jsontext.Value(nil), '{')
	meta := append(call.AppendString(append(call.AppendString(jsontext.Value("{"), task.RelatedTask), `:{"taskId":`...), id), '}')
	if r.Extra != nil {
		_ = call.EachMember(r.Extra, func(name string, v jsontext.Value) { // it is an object
			if name != "_meta" {
				b = append(append(append(call.AppendString(b, name), ':'), v...), ',')
				return
			}
			_ = call.EachMember(v, func(name string, v jsontext.Value) {
				if name != task.RelatedTask {
					meta = append(append(call.AppendString(append(meta, ','), name), ':'), v...)
				}
			})
		})
	}
	out.Extra = append(append(append(b, `"_meta":`...), meta...), "}}"...)
	return &out
}
