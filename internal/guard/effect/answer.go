package effect

import (
	"strconv"

	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/answer"
)

// again returns the answer once more, marked, with the place of its record in the audit log.
// Nothing else is different.
func again(a *answer.Answer, index int64) (*call.Result, error) {
	mark := append(jsontext.Value(`{"replayed":true,"auditIndex":`), strconv.FormatInt(index, 10)...)
	mark = append(mark, '}')
	switch {
	case a.Ask != nil:
		return nil, a.Ask // asked once more: the sealed state says which call it is
	case a.Lost:
		e := call.Errorf(call.TooLarge, "this call was done before; its answer was too large to be kept, and it is not done again")
		e.Data = jsontext.Value(`{"code":"too_large","retryable":false,"idempotency":` + string(mark) + `}`)
		return nil, e
	case a.Err != nil:
		e := *a.Err
		e.Data = withMember(facts(&e), "idempotency", mark)
		return nil, &e
	}
	r := *a.Result
	if r.Elsewhere != "" {
		return &r, nil
	}
	r.Extra = withMeta(r.Extra, mark)
	return &r, nil
}

// facts are the public facts of an error as an object.
func facts(e *call.Error) jsontext.Value {
	if e.Data.Kind() == '{' {
		return e.Data
	}
	out := jsontext.Value(`{"code":"` + e.Code.String() + `","retryable":` + strconv.FormatBool(e.Retryable) + `}`)
	if e.Data != nil {
		out = withMember(out, "data", e.Data)
	}
	return out
}

// withMember returns a copy of a JSON object with one more member.
func withMember(obj jsontext.Value, name string, v jsontext.Value) jsontext.Value {
	out := jsontext.Value("{")
	_ = call.EachMember(obj, func(n string, v jsontext.Value) { // it is an object
		if n != name {
			out = append(append(append(call.AppendString(out, n), ':'), v...), ',')
		}
	})
	return append(append(append(call.AppendString(out, name), ':'), v...), '}')
}

// metaMark is the member of _meta that marks a replay.
const metaMark = "dev.newel/idempotency"

// withMeta adds the mark to the _meta of a result's further members.
func withMeta(extra, mark jsontext.Value) jsontext.Value {
	if extra == nil {
		extra = jsontext.Value("{}")
	}
	meta := jsontext.Value("{}")
	_ = call.EachMember(extra, func(n string, v jsontext.Value) { // it is an object
		if n == "_meta" && v.Kind() == '{' {
			meta = v.Clone()
		}
	})
	return withMember(extra, "_meta", withMember(meta, metaMark, mark))
}
