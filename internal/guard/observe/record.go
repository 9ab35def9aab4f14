package observe

import (
	"context"
	"errors"
	"log/slog"
	"strconv"
	"time"
	"unicode/utf8"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/trace"

	"newel.dev/newel/call"
)

// A Refusal is a message that a door refused before it was a call.
type Refusal struct {
	Door   string
	Code   call.Code
	Status int // of HTTP, or 0
	Peer   string
	Size   int // bytes
	Reason string
}

// Refused records a refusal, so that nothing that arrives goes unseen.
func (o *Observer) Refused(ctx context.Context, r Refusal) {
	o.metrics.refused.Add(ctx, 1, metric.WithAttributes(attribute.String("newel.door", r.Door), attribute.String("error.type", r.Code.String())))
	if r.Code == call.Unauthenticated {
		o.metrics.logins.Add(ctx, 1)
	}
	if !o.log.Enabled(ctx, slog.LevelWarn) {
		return
	}
	rec := slog.NewRecord(time.Now(), slog.LevelWarn, "refused", 0)
	rec.AddAttrs(slog.String("door", r.Door), slog.String("code", r.Code.String()), slog.Int("status", r.Status),
		slog.String("peer", r.Peer), slog.Int("bytes_in", r.Size), slog.String("reason", clip(r.Reason, maxText)))
	_ = o.log.Handle(ctx, rec) // a log that cannot be written has nowhere to say so
}

// Bounds of what a record takes over, in bytes.
const (
	maxName = 128
	maxText = 2048
)

// record writes the one record of a call. It goes to the handler directly: the place in the
// source would always be this line.
func (o *Observer) record(ctx context.Context, l *series, c *call.Call, start time.Time, took time.Duration, err error) {
	level := levelOf(c)
	if !l.log.Enabled(ctx, level) {
		return
	}
	var buf [28]slog.Attr
	a := append(buf[:0],
		slog.String("door", c.Door),
		slog.String("correlation", c.Event.Correlation),
		slog.Int64("us", took.Microseconds()), // a number of its own kind: slog writes floats ten times as slowly
		slog.Int("bytes_in", c.Size),
		slog.Int("bytes_out", c.Event.ResultBytes))
	if c.Target == nil {
		a = optional(a, "name", nameOf(c))
	}
	if len(c.Args) > 0 {
		a = append(a, slog.String("args", sanitised(c.Args)))
	}
	a = optional(a, "revision", c.Revision)
	a = optional(a, "session", c.SessionID)
	a = optional(a, "client", clip(c.Client.Name, maxName))
	if c.Principal != nil {
		a = optional(a, "tenant", c.Principal.Tenant)
		a = optional(a, "principal", c.Principal.ID)
	}
	if sc := trace.SpanContextFromContext(ctx); sc.IsValid() {
		a = append(a, slog.String("trace_id", sc.TraceID().String()), slog.String("span_id", sc.SpanID().String()))
	}
	a = optional(a, "rule", c.Event.Rule)
	if c.Event.QueueTime > 0 {
		a = append(a, slog.Int64("queued_us", c.Event.QueueTime.Microseconds()))
	}
	if c.Event.Attempts > 0 {
		a = append(a, slog.Int("attempts", c.Event.Attempts))
	}
	a = optional(a, "operation", c.Event.Operation)
	a = optional(a, "approval", c.Event.Approval)
	if c.Event.Replayed {
		a = append(a, slog.Bool("replayed", true))
	}
	if c.Event.Cached {
		a = append(a, slog.Bool("cached", true))
	}
	if c.Event.Paged {
		a = append(a, slog.Bool("paged", true))
	}
	if c.Event.Code != call.OK {
		a = append(a, slog.String("code", c.Event.Code.String()))
		a = optional(a, "step", c.Event.Step)
		a = failure(a, c.Event.Code, err)
	}
	rec := slog.NewRecord(start.Add(took), level, "call", 0)
	rec.AddAttrs(a...)
	_ = l.log.Handle(ctx, rec) // a log that cannot be written has nowhere to say so
}

// levelOf says who has to do something about a call: nobody or the caller (info), the operator
// soon (warn), the operator now (error).
func levelOf(c *call.Call) slog.Level {
	switch c.Event.Code {
	case call.Internal, call.OutcomeUnknown:
		return slog.LevelError
	case call.Unauthenticated, call.Denied, call.Exhausted, call.TooLarge, call.Timeout, call.Unavailable:
		return slog.LevelWarn
	}
	return slog.LevelInfo
}

// quotes reports whether messages with this code answer the caller's own values and may repeat
// them: such messages are not recorded. Of Failed the private cause still is.
func quotes(c call.Code) bool {
	switch c {
	case call.Malformed, call.Invalid, call.NotFound, call.Conflict, call.Failed:
		return true
	}
	return false
}

// failure adds what an operator needs to know of an error.
func failure(a []slog.Attr, code call.Code, err error) []slog.Attr {
	if !quotes(code) {
		a = append(a, slog.String("error", clip(err.Error(), maxText)))
	} else if cause := errors.Unwrap(call.AsError(err)); cause != nil && code == call.Failed {
		a = append(a, slog.String("cause", clip(cause.Error(), maxText)))
	}
	var p *panicked
	if errors.As(err, &p) {
		a = append(a, slog.String("stack", string(p.stack)))
	}
	return a
}

// nameOf is what was called: the registered name, for templates the template. A name that is not
// registered is the only thing of a caller's making that is recorded, cut short: operators need
// to see what is asked for in vain.
func nameOf(c *call.Call) string {
	switch {
	case c.Target == nil:
		return clip(c.Name, maxName)
	case c.Target.Kind != call.Resource:
		return c.Target.Name
	case c.Target.URI != "":
		return c.Target.URI
	}
	return c.Target.Template
}

func optional(a []slog.Attr, key, v string) []slog.Attr {
	if v == "" {
		return a
	}
	return append(a, slog.String(key, v))
}

// clip cuts s to at most n bytes, between characters.
func clip(s string, n int) string {
	if len(s) <= n {
		return s
	}
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n]
}

// Bounds of the sanitised arguments.
const (
	maxArgs     = 16
	maxArgName  = 64
	maxArgBytes = 64 << 10 // larger arguments are not looked into
)

// sanitised says which arguments were sent, of which type and size, without their values:
// "id:string/8 limit:number/2". Sizes are bytes of JSON.
//
// It reads only the top level. Doors have checked that args is valid JSON, so a scan is enough,
// which takes a tenth of the time of a general decoder; on anything else it stops somewhere.
func sanitised(args []byte) string {
	if len(args) > maxArgBytes {
		return "object/" + strconv.Itoa(len(args))
	}
	var buf [512]byte
	out := buf[:0]
	i, n := skipSpace(args, 0), 0
	if i >= len(args) || args[i] != '{' {
		return "not an object/" + strconv.Itoa(len(args))
	}
	for i = skipSpace(args, i+1); i < len(args) && args[i] == '"'; i = skipSpace(args, i+1) {
		if n++; n > maxArgs {
			return string(append(out, " …"...))
		}
		if n > 1 {
			out = append(out, ' ')
		}
		end := skipValue(args, i)
		if end < i+2 {
			break
		}
		out = appendName(out, args[i+1:end-1])
		if end = skipSpace(args, end); end >= len(args) {
			break
		}
		from := skipSpace(args, end+1) // past the colon
		i = skipValue(args, from)
		if from >= len(args) {
			break
		}
		out = append(out, ':')
		out = append(out, typeOf(args[from])...)
		out = append(out, '/')
		out = strconv.AppendInt(out, int64(i-from), 10)
		if i = skipSpace(args, i); i < len(args) && args[i] != ',' {
			break
		}
	}
	return string(out)
}

// appendName appends a member's name so that it cannot be taken for something else.
func appendName(out, name []byte) []byte {
	for _, b := range name[:min(len(name), maxArgName)] {
		if b <= ' ' || b == ':' || b == '/' || b >= 0x7f {
			b = '_'
		}
		out = append(out, b)
	}
	return out
}

func typeOf(first byte) string {
	switch first {
	case '"':
		return "string"
	case '{':
		return "object"
	case '[':
		return "array"
	case 't', 'f':
		return "boolean"
	case 'n':
		return "null"
	}
	return "number"
}

func skipSpace(b []byte, i int) int {
	for i < len(b) && (b[i] == ' ' || b[i] == '\n' || b[i] == '\t' || b[i] == '\r') {
		i++
	}
	return i
}

// skipValue returns the index past the value that begins at i.
func skipValue(b []byte, i int) int {
	depth := 0
	for ; i < len(b); i++ {
		switch b[i] {
		case '"':
			for i++; i < len(b) && b[i] != '"'; i++ {
				if b[i] == '\\' {
					i++
				}
			}
			if depth == 0 {
				return min(i+1, len(b))
			}
		case '{', '[':
			depth++
		case '}', ']':
			if depth--; depth == 0 {
				return i + 1
			}
			if depth < 0 {
				return i // the end of what a number or literal stands in
			}
		case ',', ' ', '\n', '\t', '\r':
			if depth == 0 {
				return i
			}
		}
	}
	return len(b)
}
