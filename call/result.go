package call

import (
	"crypto/sha256"
	"encoding/hex"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

// A Result is the answer to a call, as raw JSON from backend to door. It must not be changed
// once returned: results may be shared between callers.
type Result struct {
	// Content is a JSON array: content blocks of a tool, contents of a resource, messages of a
	// prompt, items of a list. For Complete it is the completion object. Nil means empty.
	Content jsontext.Value
	// Structured is a tool's structuredContent: any JSON value, or nil.
	Structured jsontext.Value
	// IsError marks a tool result that reports failure to the model.
	IsError bool
	// Extra holds further members of the result object (_meta, description, unknown fields of an
	// upstream) as one JSON object, or nil. Members named like the fields above are refused.
	Extra jsontext.Value
	// Next is the cursor of the next page of a list, or "".
	Next string
	// TTL says how long lists and resources may be cached. 0: nothing is said, and callers are told not
	// to. Below 0: nobody keeps it, the house included.
	TTL time.Duration
	// Public allows shared caches to serve the result to other callers. Default: private.
	Public bool
	// Private says that whoever answered meant it for one caller: the house gives it to nobody else
	// again, whatever the operator says of its capability.
	Private bool
	// Task is set if the call goes on as a task, and in answers about one: then it is the answer.
	Task *Task
	// Elsewhere names what the call left running where it was sent to, for the target's Follow: the
	// call was made, its result is not there yet. Only a call with a TaskID may say so.
	Elsewhere string
	// Tasks are the items of a list of tasks.
	Tasks []*Task
}

// Text returns a tool result with one text block.
func Text(s string) *Result {
	return &Result{Content: TextContent(s)}
}

// TextContent returns a content array with one text block. Invalid UTF-8 is replaced.
func TextContent(s string) jsontext.Value {
	b := append(make(jsontext.Value, 0, len(s)+32), `[{"type":"text","text":`...)
	b = AppendString(b, s)
	return append(b, "}]"...)
}

// AppendETag appends a member _meta to the contents of a resource, with a validator of what they hold: the
// same as long as that is, and no longer (strong, RFC 9110, section 8.8.3). It is what callers compare
// what they have with.
func AppendETag(dst jsontext.Value, content []byte) jsontext.Value {
	sum := sha256.Sum256(content)
	return append(hex.AppendEncode(append(dst, `,"_meta":{"dev.newel/etag":"`...), sum[:16]), `"}`...)
}

// AppendString appends s as a JSON string, replacing invalid UTF-8.
func AppendString(dst []byte, s string) []byte {
	out, err := jsontext.AppendQuote(dst, s)
	_ = err // AppendQuote reports invalid UTF-8 and has replaced it
	return out
}

// Structured returns a tool result for v: its JSON as structuredContent and text as the block
// for people; with an empty text the JSON itself is the block, as MCP asks for old clients.
func Structured(v any, text string) (*Result, error) {
	raw, err := json.Marshal(v, json.Deterministic(true))
	if err != nil {
		return nil, Errorf(Internal, "the result could not be encoded").Because(err)
	}
	if text == "" {
		text = string(raw)
	}
	return &Result{Content: TextContent(text), Structured: raw}, nil
}
