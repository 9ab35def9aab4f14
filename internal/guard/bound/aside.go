package bound

import (
	"context"
	"encoding/base64"
	"fmt"
	"strconv"
	"time"
	"unicode/utf8"

	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
)

// previewBytes is how much of a large result stands in the answer, labelled as a preview.
const previewBytes = 2 << 10

// maxExtra bounds the further members (_meta and what an upstream added) that stay in the answer
// when the result is put aside; larger ones are kept with it.
const maxExtra = 2 << 10

// putAside keeps a result that is too large and answers with a link to it.
func (b *Bounds) putAside(ctx context.Context, c *call.Call, r *call.Result, s size, l limit) (*call.Result, error) {
	if c.Kind != call.Tool {
		return nil, call.Errorf(call.TooLarge, "%s has %s, over the limit of %s; read it in parts if its address takes a page, an offset or a narrower selection, otherwise its publisher has to split it or raise its bound", what(c.Kind), s, l)
	}
	if b.o.Store == nil {
		return nil, tooLarge(c, s, l)
	}
	whole, mime := document(r)
	a, err := b.o.Store.Put(ctx, c.Principal, c.Target.Name, mime, whole)
	if err != nil {
		if c.Target.Effect == call.Read {
			return nil, call.Errorf(call.Unavailable, "the result has %s, over the limit of %s, and cannot be kept for reading in parts at the moment; try again later, or ask for less", s, l).Because(err)
		}
		return nil, tooLarge(c, s, l).Because(err)
	}
	out := &call.Result{Content: linked(c, r, s, a, whole)}
	// Without structuredContent, a result of a tool with an output schema has to be an error.
	out.IsError = r.IsError || c.Target.Output != nil
	if len(r.Extra) <= maxExtra {
		out.Extra = r.Extra
	}
	after := measure(out)
	c.Event.ResultBytes, c.Event.Tokens, c.Event.Paged = after.bytes, after.tokens, true
	return out, nil
}

func what(k call.Kind) string {
	if k == call.Prompt {
		return "the prompt"
	}
	return "the resource"
}

// tooLarge is not retryable: the tool has run, and would return the same again.
func tooLarge(c *call.Call, s size, l limit) *call.Error {
	ran := ""
	if c.Target.Effect != call.Read {
		ran = "the tool ran, do not repeat it for its effects; "
	}
	return call.Errorf(call.TooLarge, "%sits result has %s, over the limit of %s; ask for less: a narrower filter, a smaller page, fewer fields", ran, s, l)
}

func (s size) String() string { return fmt.Sprintf("%d bytes (about %d tokens)", s.bytes, s.tokens) }

func (l limit) String() string {
	if l.tokens >= l.bytes {
		return fmt.Sprintf("%d bytes", l.bytes)
	}
	return fmt.Sprintf("%d bytes or %d tokens", l.bytes, l.tokens)
}

// linked is the content that stands for a result put aside: what happened, the link, a preview.
func linked(c *call.Call, r *call.Result, s size, a call.Artifact, whole []byte) jsontext.Value {
	head := preview(whole)
	note := fmt.Sprintf("The tool ran; there is no need to run it again. Its result has %s: too large to send at once. The whole (%s, %d bytes) is kept at %s until %s; read it in parts with resources/read: %s?offset=0, then the offset that each part names as the next.",
		s, a.MIME, a.Size, a.URI, a.Expires.UTC().Format(time.RFC3339), a.URI)
	if r.IsError {
		note = "The tool reported an error. " + note
	} else if c.Target.Output != nil {
		note += " This answer is marked as an error only because it cannot carry the structured content that the tool's output schema promises."
	}
	b := append(make(jsontext.Value, 0, len(note)+len(head)+len(head)/4+512), `[{"type":"text","text":`...)
	b = call.AppendString(b, note)
	b = append(b, `},{"type":"resource_link","uri":`...)
	b = call.AppendString(b, a.URI)
	b = append(b, `,"name":`...)
	b = call.AppendString(b, "result of "+c.Target.Name)
	b = append(b, `,"mimeType":`...)
	b = call.AppendString(b, a.MIME)
	b = append(b, `,"size":`...)
	b = strconv.AppendInt(b, a.Size, 10)
	b = append(b, `,"_meta":{"dev.newel/sha256":`...)
	b = call.AppendString(b, a.SHA256)
	b = append(b, `,"dev.newel/created":`...)
	b = call.AppendString(b, a.Created.UTC().Format(time.RFC3339))
	b = append(b, `,"dev.newel/expires":`...)
	b = call.AppendString(b, a.Expires.UTC().Format(time.RFC3339))
	if a.Link != "" { // for the client, to show to a person; a model has no use for it
		b = append(b, `,"dev.newel/download":`...)
		b = call.AppendString(b, a.Link)
		b = append(b, `,"dev.newel/downloadUntil":`...)
		b = call.AppendString(b, a.LinkUntil.UTC().Format(time.RFC3339))
	}
	b = append(b, `}}`...)
	if len(head) > 0 {
		b = append(b, `,{"type":"text","text":`...)
		b = call.AppendString(b, fmt.Sprintf("Preview, the first %d of %d bytes:\n%s", len(head), len(whole), head))
		b = append(b, '}')
	}
	return append(b, ']')
}

// preview returns the first whole characters of text, nothing of anything else.
func preview(whole []byte) []byte {
	head := whole[:min(previewBytes, len(whole))]
	for range utf8.UTFMax {
		if len(head) == 0 || utf8.Valid(head) {
			return head
		}
		head = head[:len(head)-1]
	}
	return nil
}

// document returns what is kept of a result, all of it, in the form that is most use to a
// reader: the text or the file itself if there is nothing else, otherwise JSON.
func document(r *call.Result) (whole []byte, mime string) {
	b := single(r.Content)
	small := len(r.Extra) <= maxExtra // stays in the answer
	switch {
	case !small:
	case r.Structured == nil && b.kind == "text":
		return []byte(b.text), "text/plain; charset=utf-8"
	case r.Structured == nil && b.data != nil:
		return b.data, b.mime
	case r.Structured == nil:
		return r.Content, "application/json"
	case len(r.Content) == 0 || string(r.Content) == "[]" || b.kind == "text" && b.text == string(r.Structured):
		return r.Structured, "application/json" // the text only repeats it
	}
	out := append(make([]byte, 0, len(r.Content)+len(r.Structured)+len(r.Extra)+64), `{"content":`...)
	if len(r.Content) == 0 {
		out = append(out, "[]"...)
	}
	out = append(out, r.Content...)
	if r.Structured != nil {
		out = append(append(out, `,"structuredContent":`...), r.Structured...)
	}
	if !small {
		out = append(append(out, `,"further":`...), r.Extra...)
	}
	return append(out, '}'), "application/json"
}

// A block is the only block of a content array; its kind is empty if there are none or several,
// or if the block says more than a text or a file by itself does.
type block struct {
	kind, text, mime string
	data             []byte // of an image or a sound, decoded
}

func single(content jsontext.Value) block {
	var b block
	n := 0
	if err := call.EachElement(content, func(v jsontext.Value) {
		if n++; n == 1 {
			b = readBlock(v)
		}
	}); err != nil || n != 1 {
		return block{}
	}
	return b
}

func readBlock(v jsontext.Value) block {
	var b block
	var data string
	more := false
	if err := call.EachMember(v, func(name string, v jsontext.Value) {
		var to *string
		switch name {
		case "type":
			to = &b.kind
		case "text":
			to = &b.text
		case "mimeType":
			to = &b.mime
		case "data":
			to = &data
		default:
			more = true
			return
		}
		raw, err := jsontext.AppendUnquote(nil, v)
		more = more || err != nil
		*to = string(raw)
	}); err != nil || more {
		return block{}
	}
	switch b.kind {
	case "text":
		return b
	case "image", "audio":
		raw, err := base64.StdEncoding.DecodeString(data)
		if err != nil || len(raw) == 0 || b.mime == "" {
			return block{}
		}
		b.data = raw
		return b
	}
	return block{}
}
