// Package answer is the stored form of what a call was answered with: byte for byte, so that it can
// be given once more.
//
// Start reading at [Answer]. The form is our own: an encoder of JSON would write numbers and white
// space anew. It is pure; whoever stores it seals it.
package answer

import (
	"encoding/binary"
	"errors"
	"time"

	"newel.dev/newel/call"
)

// An Answer is what is stored of a call that ended: what went out. One of its members is set.
type Answer struct {
	Result *call.Result
	Err    *call.Error
	Ask    *call.InputRequired
	Lost   bool // it was over the bound: only its digest is recorded
}

const (
	formResult = 1
	formError  = 2
	formLost   = 3
	formAsk    = 4
	formAway   = 5 // a result that is not there yet
)

// Encode returns the stored form.
func (a *Answer) Encode() []byte {
	switch {
	case a.Lost:
		return []byte{formLost}
	case a.Err != nil:
		e := a.Err
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
	if a.Ask != nil {
		b := appendBytes([]byte{formAsk}, []byte(a.Ask.State))
		b = binary.AppendUvarint(b, uint64(len(a.Ask.Questions)))
		for _, q := range a.Ask.Questions {
			b = appendBytes(appendBytes(appendBytes(b, []byte(q.Key)), []byte(q.Method)), q.Params)
		}
		return b
	}
	r := a.Result
	if r.Elsewhere != "" {
		return appendBytes([]byte{formAway}, []byte(r.Elsewhere))
	}
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

// cutter reads what Encode wrote; the first mistake sticks.
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

// Decode is the way back. What is not of the form is an error.
func Decode(b []byte) (*Answer, error) {
	c := &cutter{b: b}
	a := &Answer{}
	switch c.byte() {
	case formLost:
		a.Lost = true
	case formAway:
		a.Result = &call.Result{Elsewhere: string(c.bytes())}
	case formError:
		e := &call.Error{Code: call.Code(c.byte()), Retryable: c.byte()&1 != 0, RetryAfter: time.Duration(c.int()), RPC: int(c.int())}
		e.Message, e.Data = string(c.bytes()), c.bytes()
		n := c.uint()
		for range min(n, uint64(len(c.b))) {
			e.Scopes = append(e.Scopes, string(c.bytes()))
		}
		a.Err = e
	case formAsk:
		a.Ask = &call.InputRequired{State: string(c.bytes())}
		for range min(c.uint(), uint64(len(c.b))) {
			a.Ask.Questions = append(a.Ask.Questions, call.Question{Key: string(c.bytes()), Method: string(c.bytes()), Params: c.bytes()})
		}
	case formResult:
		flags := c.byte()
		a.Result = &call.Result{IsError: flags&1 != 0, Public: flags&2 != 0, TTL: time.Duration(c.int()), Content: c.bytes(), Structured: c.bytes(), Extra: c.bytes(), Next: string(c.bytes())}
	default:
		return nil, errForm
	}
	if c.bad || len(c.b) > 0 {
		return nil, errForm
	}
	return a, nil
}
