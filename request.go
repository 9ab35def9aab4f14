package newel

import (
	"context"
	"encoding/base64"
	"reflect"
	"strconv"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/backend/gofunc"
)

// A Request is what a handler can ask and tell while its call runs. It is safe for concurrent use
// until the handler returns.
type Request struct{ call *call.Call }

// Call returns the call itself; it must not be changed.
func (r *Request) Call() *call.Call { return r.call }

// Progress reports how far the call has come; total 0 means unknown. It does nothing if the
// caller did not ask for progress.
func (r *Request) Progress(ctx context.Context, done, total float64, message string) error {
	return r.call.Sink.Progress(ctx, call.Progress{Done: done, Total: total, Message: message})
}

// Log sends a log message to the caller, if it asked for that level: debug, info, notice,
// warning, error, critical, alert or emergency. data is encoded as JSON and must hold no secrets.
func (r *Request) Log(ctx context.Context, level, logger string, data any) error {
	raw, err := json.Marshal(data)
	if err != nil {
		return err
	}
	return r.call.Sink.Log(ctx, call.LogMessage{Level: level, Logger: logger, Data: raw})
}

// Ask puts questions to the caller's side and returns the answers by key. In the stateless
// revision the handler runs again from its start once the answers are there: ask before the
// first effect, with the same keys each time, and return the error unchanged.
func (r *Request) Ask(ctx context.Context, questions ...call.Question) (map[string]jsontext.Value, error) {
	return r.call.Asker.Ask(ctx, questions...)
}

// What a person did with a question.
const (
	Accepted  = "accept"
	Declined  = "decline"
	Cancelled = "cancel"
)

// Elicit asks the person at the caller's side to fill in a T: a struct of strings, numbers and
// booleans, with the struct tags of [AddTool]. The value is only meaningful if the action is
// Accepted. key tells the questions of one call apart. See [Request.Ask] for when to ask.
func Elicit[T any](ctx context.Context, r *Request, key, message string) (value T, action string, err error) {
	schema, err := gofunc.Schema(reflect.TypeFor[T]())
	if err != nil {
		return value, "", call.Errorf(call.Internal, "internal error").Because(err)
	}
	answers, err := r.Ask(ctx, ElicitQuestion(key, message, schema))
	if err != nil {
		return value, "", err
	}
	var a struct {
		Action  string         `json:"action"`
		Content jsontext.Value `json:"content"`
	}
	if err := json.Unmarshal(answers[key], &a); err != nil {
		return value, "", call.Errorf(call.Malformed, "the answer to %q cannot be used", key).Because(err)
	}
	if a.Action == Accepted && a.Content != nil {
		if err := json.Unmarshal(a.Content, &value); err != nil {
			return value, "", call.Errorf(call.Malformed, "the answer to %q does not have the form that was asked for", key).Because(err)
		}
	}
	return value, a.Action, nil
}

// ElicitQuestion returns the question for a form with the given schema, for [Request.Ask].
func ElicitQuestion(key, message string, schema jsontext.Value) call.Question {
	b := append(jsontext.Value(nil), `{"mode":"form","message":`...)
	b = call.AppendString(b, message)
	return call.Question{Key: key, Method: call.MethodElicit, Params: append(append(append(b, `,"requestedSchema":`...), schema...), '}')}
}

// URLQuestion returns the question that sends the person to a page, for what must not pass
// through the client: credentials, payments. id identifies it to session clients.
func URLQuestion(key, message, url, id string) call.Question {
	b := append(jsontext.Value(nil), `{"mode":"url","message":`...)
	b = call.AppendString(b, message)
	b = call.AppendString(append(b, `,"url":`...), url)
	b = call.AppendString(append(b, `,"elicitationId":`...), id)
	return call.Question{Key: key, Method: call.MethodElicit, Params: append(b, '}')}
}

// A Block is one content block, as JSON.
type Block jsontext.Value

// TextBlock is text.
func TextBlock(text string) Block {
	return append(call.AppendString(Block(`{"type":"text","text":`), text), '}')
}

func media(kind string, data []byte, mime string) Block {
	b := call.AppendString(Block(`{"type":"`+kind+`","data":`), base64.StdEncoding.EncodeToString(data))
	return append(call.AppendString(append(b, `,"mimeType":`...), mime), '}')
}

// ImageBlock is an image.
func ImageBlock(data []byte, mime string) Block { return media("image", data, mime) }

// AudioBlock is sound.
func AudioBlock(data []byte, mime string) Block { return media("audio", data, mime) }

// EmbeddedBlock is a resource with its contents.
func EmbeddedBlock(uri string, c Contents) Block {
	return append(append(Block(`{"type":"resource","resource":`), c.object(uri, "")...), '}')
}

// LinkBlock is a link to a resource; size 0 means unknown.
func LinkBlock(uri, name, mime string, size int64) Block {
	b := call.AppendString(Block(`{"type":"resource_link","uri":`), uri)
	b = call.AppendString(append(b, `,"name":`...), name)
	if mime != "" {
		b = call.AppendString(append(b, `,"mimeType":`...), mime)
	}
	if size > 0 {
		b = strconv.AppendInt(append(b, `,"size":`...), size, 10)
	}
	return append(b, '}')
}

// Content returns a tool result of several blocks.
func Content(blocks ...Block) *call.Result {
	b := jsontext.Value{'['}
	for i, block := range blocks {
		if i > 0 {
			b = append(b, ',')
		}
		b = append(b, block...)
	}
	return &call.Result{Content: append(b, ']')}
}
