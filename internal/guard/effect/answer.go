package effect

import (
	"encoding/binary"
	"errors"
	"strconv"
	"time"

	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
)

// An answer is what is stored of a call that ended: what went out, byte for byte.
type answer struct {
	result *call.Result // or
	err    *call.Error
	ask    *call.InputRequired
	lost   bool // it was over the bound: only its digest is recorded
}

const (
	formResult = 1
	formError  = 2
	formLost   = 3
	formAsk    = 4
)

// encode is a form of our own: an encoder of JSON would write numbers and white space anew.
func (a *answer) encode() []byte {
	switch {
	case a.lost:
		return []byte{formLost}
	case a.err != nil:
		e := a.err
		b := append(make([]byte, 0, 64+len(e.Message)+len(e.Data)), formError, byte(e.Code), flag(e.Retryable, 1))
		b = binary.AppendVarint(b, int64(e.RetryAfter))
		b = binary.AppendVarint(b, int64(e.RPC))
		b = appendBytes(appendBytes(b, []byte(e.Message)), e.Data)
		b = binary.AppendUvarint(b, uint64(len(e.Scopes)))
		for _, s := range e.Scopes {
			b = appendBytes(b, []byte(s))
		}
		return b
	}
	if a.ask != nil {
		b := appendBytes([]byte{formAsk}, []byte(a.ask.State))
		b = binary.AppendUvarint(b, uint64(len(a.ask.Questions)))
		for _, q := range a.ask.Questions {
			b = appendBytes(appendBytes(appendBytes(b, []byte(q.Key)), []byte(q.Method)), q.Params)
		}
		return b
	}
	r := a.result
	b := append(make([]byte, 0, 64+len(r.Content)+len(r.Structured)+len(r.Extra)), formResult, flag(r.IsError, 1)|flag(r.Public, 2))
	b = binary.AppendVarint(b, int64(r.TTL))
	return appendBytes(appendBytes(appendBytes(appendBytes(b, r.Content), r.Structured), r.Extra), []byte(r.Next))
}

func flag(set bool, bit byte) byte {
	if set {
		return bit
	}
	return 0
}

// appendBytes tells nil from empty: a result without a member is not one with an empty member.
func appendBytes(dst, b []byte) []byte {
	if b == nil {
		return append(dst, 0)
	}
	return append(binary.AppendUvarint(dst, uint64(len(b))+1), b...)
}

// cutter reads what encode wrote; the first mistake sticks.
type cutter struct {
	b   []byte
	bad bool
}

func (c *cutter) byte() byte {
	if len(c.b) == 0 {
		c.bad = true
		return 0
	}
	v := c.b[0]
	c.b = c.b[1:]
	return v
}

func (c *cutter) int() int64 {
	v, n := binary.Varint(c.b)
	if n <= 0 {
		c.bad = true
		return 0
	}
	c.b = c.b[n:]
	return v
}

func (c *cutter) uint() uint64 {
	v, n := binary.Uvarint(c.b)
	if n <= 0 {
		c.bad = true
		return 0
	}
	c.b = c.b[n:]
	return v
}

func (c *cutter) bytes() []byte {
	n := c.uint()
	if n == 0 {
		return nil
	}
	if n--; n > uint64(len(c.b)) {
		c.bad = true
		return nil
	}
	v := c.b[:n:n]
	c.b = c.b[n:]
	return v
}

var errForm = errors.New("a stored answer is not of a form that this program knows")

func decodeAnswer(b []byte) (*answer, error) {
	c := &cutter{b: b}
	a := &answer{}
	switch c.byte() {
	case formLost:
		a.lost = true
	case formError:
		e := &call.Error{Code: call.Code(c.byte()), Retryable: c.byte()&1 != 0, RetryAfter: time.Duration(c.int()), RPC: int(c.int())}
		e.Message, e.Data = string(c.bytes()), c.bytes()
		n := c.uint()
		for range min(n, uint64(len(c.b))) {
			e.Scopes = append(e.Scopes, string(c.bytes()))
		}
		a.err = e
	case formAsk:
		a.ask = &call.InputRequired{State: string(c.bytes())}
		for range min(c.uint(), uint64(len(c.b))) {
			a.ask.Questions = append(a.ask.Questions, call.Question{Key: string(c.bytes()), Method: string(c.bytes()), Params: c.bytes()})
		}
	case formResult:
		flags := c.byte()
		a.result = &call.Result{IsError: flags&1 != 0, Public: flags&2 != 0, TTL: time.Duration(c.int()), Content: c.bytes(), Structured: c.bytes(), Extra: c.bytes(), Next: string(c.bytes())}
	default:
		return nil, errForm
	}
	if c.bad || len(c.b) > 0 {
		return nil, errForm
	}
	return a, nil
}

// replay returns the answer once more, marked, with the place of its record in the audit log.
// Nothing else is different.
func (a *answer) replay(index int64) (*call.Result, error) {
	mark := append(jsontext.Value(`{"replayed":true,"auditIndex":`), strconv.FormatInt(index, 10)...)
	mark = append(mark, '}')
	switch {
	case a.ask != nil:
		return nil, a.ask // asked once more: the sealed state says which call it is
	case a.lost:
		e := call.Errorf(call.TooLarge, "this call was done before; its answer was too large to be kept, and it is not done again")
		e.Data = jsontext.Value(`{"code":"too_large","retryable":false,"idempotency":` + string(mark) + `}`)
		return nil, e
	case a.err != nil:
		e := *a.err
		e.Data = withMember(facts(&e), "idempotency", mark)
		return nil, &e
	}
	r := *a.result
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
