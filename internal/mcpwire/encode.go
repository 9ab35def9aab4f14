package mcpwire

import (
	"bytes"
	"strconv"

	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
)

// members names the member of the result object that Content becomes.
func member(k call.Kind) string {
	switch k {
	case call.Resource:
		return "contents"
	case call.Prompt:
		return "messages"
	case call.Complete:
		return "completion"
	case call.ListTools:
		return "tools"
	case call.ListResources:
		return "resources"
	case call.ListTemplates:
		return "resourceTemplates"
	case call.ListPrompts:
		return "prompts"
	}
	return "content"
}

// cacheable reports whether results of a kind carry cache hints.
func cacheable(k call.Kind) bool { return k.IsList() || k == call.Resource }

// A Frame is an encoded response in parts, so that large content is written, not copied.
type Frame struct {
	Head, Body, Tail []byte
}

// Len is the number of bytes of the whole response.
func (f *Frame) Len() int { return len(f.Head) + len(f.Body) + len(f.Tail) }

// AppendTo appends the whole response.
func (f *Frame) AppendTo(dst []byte) []byte {
	return append(append(append(dst, f.Head...), f.Body...), f.Tail...)
}

// OneLine returns a message without line breaks, which would end an event or a line of stdio
// early: JSON that others wrote may hold them between its tokens. Nothing else is changed.
func OneLine(message []byte) []byte {
	if bytes.IndexByte(message, '\n') < 0 && bytes.IndexByte(message, '\r') < 0 {
		return message
	}
	v := jsontext.Value(message).Clone()
	if err := v.Compact(); err != nil {
		return bytes.Map(func(r rune) rune { // not JSON: then at least one line
			if r == '\n' || r == '\r' {
				return ' '
			}
			return r
		}, message)
	}
	return v
}

// frame encodes a complete result. buf is scratch space for head and tail.
func (c *Codec) frame(buf []byte, id jsontext.Value, k call.Kind, r *call.Result) Frame {
	b := append(buf, `{"jsonrpc":"2.0","id":`...)
	b = append(b, id...)
	b = append(b, `,"result":{"resultType":"complete","`...)
	b = append(b, member(k)...)
	b = append(b, `":`...)
	head := len(b)
	content := r.Content
	if content == nil {
		content = jsontext.Value("[]")
	}
	if r.Structured != nil {
		b = append(append(b, `,"structuredContent":`...), r.Structured...)
	}
	if r.IsError {
		b = append(b, `,"isError":true`...)
	}
	if r.Next != "" {
		b = call.AppendString(append(b, `,"nextCursor":`...), r.Next)
	}
	if cacheable(k) {
		b = appendCache(b, r)
	}
	b = c.appendExtra(b, r.Extra)
	b = append(b, "}}"...)
	return Frame{Head: b[:head:head], Body: content, Tail: b[head:]}
}

// appendCache appends the cache hints: private unless the result says otherwise.
func appendCache(b []byte, r *call.Result) []byte {
	b = append(b, `,"ttlMs":`...)
	b = strconv.AppendInt(b, max(r.TTL.Milliseconds(), 0), 10)
	if r.Public {
		return append(b, `,"cacheScope":"public"`...)
	}
	return append(b, `,"cacheScope":"private"`...)
}

// reserved are the members of a result object that the house itself writes.
func reserved(name string) bool {
	switch name {
	case "resultType", "content", "contents", "messages", "completion", "tools", "resources", "resourceTemplates", "prompts",
		"structuredContent", "isError", "nextCursor", "ttlMs", "cacheScope", "inputRequests", "requestState":
		return true
	}
	return false
}

// appendExtra appends the further members of a result, with our server info in _meta.
func (c *Codec) appendExtra(b []byte, extra jsontext.Value) []byte {
	if extra == nil {
		return append(append(append(b, `,"_meta":{`...), c.serverInfoMember...), '}')
	}
	metaDone := false
	_ = call.EachMember(extra, func(name string, v jsontext.Value) {
		switch {
		case reserved(name):
		case name == "_meta" && v.Kind() == '{':
			metaDone = true
			b = append(append(b, `,"_meta":{`...), c.serverInfoMember...)
			_ = call.EachMember(v, func(name string, v jsontext.Value) {
				if name == metaServerInfo {
					return
				}
				b = append(append(call.AppendString(append(b, ','), name), ':'), v...)
			})
			b = append(b, '}')
		default:
			b = append(append(call.AppendString(append(b, ','), name), ':'), v...)
		}
	})
	if !metaDone {
		b = append(append(append(b, `,"_meta":{`...), c.serverInfoMember...), '}')
	}
	return b
}

// AppendResult appends the result object as the session revisions (2025-11-25 and older) have
// it: no resultType, no cache hints; structuredContent only if it is an object.
func AppendResult(dst []byte, k call.Kind, r *call.Result) []byte {
	b := append(append(append(dst, `{"`...), member(k)...), `":`...)
	if r.Content == nil {
		b = append(b, "[]"...)
	} else {
		b = append(b, r.Content...)
	}
	if r.Structured != nil && r.Structured.Kind() == '{' {
		b = append(append(b, `,"structuredContent":`...), r.Structured...)
	}
	if r.IsError {
		b = append(b, `,"isError":true`...)
	}
	if r.Next != "" {
		b = call.AppendString(append(b, `,"nextCursor":`...), r.Next)
	}
	if r.Extra != nil {
		_ = call.EachMember(r.Extra, func(name string, v jsontext.Value) {
			if !reserved(name) {
				b = append(append(call.AppendString(append(b, ','), name), ':'), v...)
			}
		})
	}
	return append(b, '}')
}

// SessionError returns an error of the path as the session revisions have it: -32002 for
// resources that are not found, no codes that only the newest revision defines.
func SessionError(k call.Kind, err error) *Failure {
	f := fail(nil, err)
	switch {
	case f.Cause == call.NotFound && k == call.Resource:
		f.Code = -32002
	case f.Cause == call.Unsupported && call.AsError(err).RPC == 0:
		f.Code = codeInvalidParams
	}
	return f
}
