package call

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/go-json-experiment/json/jsontext"
)

// Code is why a call failed. The set is closed: each door maps every code in one table.
type Code uint8

// The codes. OK is only used in records.
const (
	OK              Code = iota
	Malformed            // the message is not a valid request: syntax, missing or contradicting parts
	Invalid              // arguments do not fit the schema or a business rule
	NotFound             // no such capability or resource, or none that this caller may see
	Unauthenticated      // who is calling is not known
	Denied               // policy says no
	Unsupported          // the client lacks a capability the call needs
	Conflict             // the call contradicts another one
	Exhausted            // a limit, quota or budget is used up
	TooLarge             // a message or result is over its bound
	Timeout              // the deadline passed
	Canceled             // the caller went away or cancelled
	Unavailable          // a dependency is away; nothing was done
	Failed               // the tool could not do it; the message says why
	Internal             // our fault; the cause stays inside
	OutcomeUnknown       // it may or may not have been done, and nobody can tell: look before calling again
)

var codeNames = [...]string{"ok", "malformed", "invalid_arguments", "not_found", "unauthenticated", "denied", "unsupported", "conflict", "exhausted", "too_large", "timeout", "canceled", "unavailable", "failed", "internal", "outcome_unknown"}

// String returns the name used in results, records and metric labels.
func (c Code) String() string {
	if int(c) >= len(codeNames) {
		return "internal"
	}
	return codeNames[c]
}

// Codes lists all codes but OK, for tests that print the whole table.
func Codes() []Code {
	out := make([]Code, 0, len(codeNames)-1)
	for c := Malformed; c <= OutcomeUnknown; c++ {
		out = append(out, c)
	}
	return out
}

// An Error is a failure with two texts: Message is for the caller, the cause for the operator.
type Error struct {
	Code       Code
	Message    string         // public: says what to do next; holds no secrets
	Retryable  bool           // the same call may succeed later
	RetryAfter time.Duration  // when to try again; 0 means no advice
	Data       jsontext.Value // further public facts, or nil
	Scopes     []string       // what the access token would need: the caller may ask for more (step-up)
	OAuth      string         // error code of the challenge (RFC 6750, RFC 9449); "": that of the Code
	RPC        int            // JSON-RPC code of the server behind, sent on as it is; 0: the code's own
	cause      error
}

// Errorf returns an Error with a public message. Exhausted, Timeout and Unavailable are retryable.
func Errorf(code Code, format string, args ...any) *Error {
	return &Error{
		Code:      code,
		Message:   fmt.Sprintf(format, args...),
		Retryable: code == Exhausted || code == Timeout || code == Unavailable,
	}
}

// Because attaches the private cause and returns e.
func (e *Error) Because(cause error) *Error {
	e.cause = cause
	return e
}

// Error is for operators: it includes the cause.
func (e *Error) Error() string {
	if e.cause != nil {
		return e.Code.String() + ": " + e.Message + ": " + e.cause.Error()
	}
	return e.Code.String() + ": " + e.Message
}

// Unwrap returns the private cause.
func (e *Error) Unwrap() error { return e.cause }

// ErrUnapproved is the cause of an error that says: this call would run, and nobody approved it.
// Nothing was done.
var ErrUnapproved = errors.New("nobody approved this call")

// AsError returns err as an *Error. Context errors become Timeout and Canceled; anything foreign
// becomes Internal with err as its private cause. It returns nil for nil.
func AsError(err error) *Error {
	if err == nil {
		return nil
	}
	var e *Error
	if errors.As(err, &e) {
		return e
	}
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return Errorf(Timeout, "the call took longer than its deadline; try again, or ask for less").Because(err)
	case errors.Is(err, context.Canceled):
		return Errorf(Canceled, "the call was cancelled").Because(err)
	}
	return Errorf(Internal, "internal error").Because(err)
}
