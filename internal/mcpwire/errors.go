package mcpwire

import (
	"math"
	"strconv"
	"time"

	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
)

// JSON-RPC error codes of MCP 2026-07-28. Codes of our own lie outside the reserved range.
const (
	codeParse              = -32700
	codeInvalidRequest     = -32600
	codeMethodNotFound     = -32601
	codeInvalidParams      = -32602
	codeInternal           = -32603
	codeHeaderMismatch     = -32020
	codeMissingCapability  = -32021
	codeUnsupportedVersion = -32022
	codeUnauthenticated    = -31401
	codeDenied             = -31403
	codeConflict           = -31409
	codeTooLarge           = -31413
	codeFailed             = -31422
	codeExhausted          = -31429
	codeCanceled           = -31499
	codeUnavailable        = -31503
	codeTimeout            = -31504
	codeOutcomeUnknown     = -31520
)

// A Failure is an error on its way out: what the sender sees.
type Failure struct {
	ID         jsontext.Value // raw, or nil: null
	Status     int            // HTTP status; stdio ignores it
	Code       int            // JSON-RPC code
	Message    string
	Data       jsontext.Value
	Cause      call.Code     // for the record
	Scopes     []string      // what the access token would need, with status 403
	RetryAfter time.Duration // for the header of that name; 0: none
	OAuth      string        // error code of the challenge, with status 401; "": that of the status
}

// Error makes a Failure an error for records.
func (f *Failure) Error() string { return f.Message }

// A Row says how one error code leaves the house.
type Row struct {
	Tool   bool // as an isError result when the call is of a tool: the model can act on it
	Code   int  // otherwise as this JSON-RPC code
	Status int  // and this HTTP status
}

// ErrorTable is the only place where error codes become protocol. Errors out of the path are
// HTTP 200: clients take most other statuses as a broken connection. The exceptions are those
// that the revision or HTTP itself defines.
func ErrorTable(c call.Code) Row {
	switch c {
	case call.Malformed:
		return Row{false, codeInvalidParams, 400}
	case call.Invalid:
		return Row{true, codeInvalidParams, 200}
	case call.NotFound:
		return Row{false, codeInvalidParams, 200}
	case call.Unauthenticated:
		return Row{false, codeUnauthenticated, 401}
	case call.Denied:
		return Row{false, codeDenied, 200}
	case call.Unsupported:
		return Row{false, codeMissingCapability, 400}
	case call.Conflict:
		return Row{true, codeConflict, 200}
	case call.Failed:
		return Row{true, codeFailed, 200}
	case call.Exhausted:
		return Row{true, codeExhausted, 200}
	case call.TooLarge:
		return Row{true, codeTooLarge, 200}
	case call.Timeout:
		return Row{true, codeTimeout, 200}
	case call.Canceled:
		return Row{true, codeCanceled, 200}
	case call.Unavailable:
		return Row{true, codeUnavailable, 200}
	case call.OutcomeUnknown:
		return Row{true, codeOutcomeUnknown, 200}
	}
	return Row{true, codeInternal, 200}
}

// RPCCode returns the JSON-RPC code that a failed call answers with, or 0 if it answers with a
// result.
func RPCCode(k call.Kind, c call.Code) int {
	row := ErrorTable(c)
	if k == call.Tool && row.Tool {
		return 0
	}
	return row.Code
}

// AppendFailure appends the JSON-RPC error response.
func AppendFailure(dst []byte, f *Failure) []byte {
	dst = append(dst, `{"jsonrpc":"2.0","id":`...)
	if f.ID == nil {
		dst = append(dst, "null"...)
	} else {
		dst = append(dst, f.ID...)
	}
	return append(appendError(append(dst, `,"error":`...), f), '}')
}

// appendError appends the error object.
func appendError(dst []byte, f *Failure) []byte {
	dst = append(dst, `{"code":`...)
	dst = strconv.AppendInt(dst, int64(f.Code), 10)
	dst = append(dst, `,"message":`...)
	dst = call.AppendString(dst, f.Message)
	if f.Data != nil {
		dst = append(append(dst, `,"data":`...), f.Data...)
	}
	return append(dst, '}')
}

// FailStranger returns the failure of a message from somebody of whom it is not known who they are.
// Unlike for calls, a client can only act on the HTTP status: 401, or 503 while nobody can tell.
func FailStranger(id jsontext.Value, err error) *Failure {
	f := fail(id, err)
	if f.Cause == call.Unavailable {
		f.Status, f.RetryAfter = 503, max(call.AsError(err).RetryAfter, time.Second)
	}
	return f
}

// fail turns an error out of the path into a Failure. For tools see [ToolError].
func fail(id jsontext.Value, err error) *Failure {
	e := call.AsError(err)
	row := ErrorTable(e.Code)
	f := &Failure{ID: id, Status: row.Status, Code: row.Code, Message: e.Message, Cause: e.Code, Data: e.Data, OAuth: e.OAuth}
	if e.Code == call.Denied && len(e.Scopes) > 0 {
		f.Status, f.Scopes = 403, e.Scopes // step-up: the one denial that is not HTTP 200
	}
	if e.RPC != 0 {
		f.Code = e.RPC // another server said so: its error goes on as it is
		return f
	}
	if f.Data == nil {
		f.Data = append(facts(e), '}')
	}
	return f
}

// ToolError returns the isError result for an error of a tool call, or nil if the table sends
// that code as a JSON-RPC error.
func ToolError(err error) *call.Result {
	e := call.AsError(err)
	if !ErrorTable(e.Code).Tool || e.RPC != 0 {
		return nil
	}
	extra := append(jsontext.Value(`{"_meta":{"dev.newel/error":`), facts(e)...)
	extra = call.AppendString(append(extra, `,"message":`...), e.Message)
	if e.Data != nil {
		extra = append(append(extra, `,"data":`...), e.Data...)
	}
	return &call.Result{IsError: true, Content: call.TextContent(e.Message), Extra: append(extra, "}}}"...)}
}

// facts begins an object with what programs act on: code, retryable, retryAfterSeconds.
func facts(e *call.Error) jsontext.Value {
	b := append(jsontext.Value(nil), `{"code":"`...)
	b = append(b, e.Code.String()...)
	b = append(b, `","retryable":`...)
	b = strconv.AppendBool(b, e.Retryable)
	if e.RetryAfter > 0 {
		b = append(b, `,"retryAfterSeconds":`...)
		b = strconv.AppendInt(b, int64(math.Ceil(e.RetryAfter.Seconds())), 10)
	}
	return b
}
