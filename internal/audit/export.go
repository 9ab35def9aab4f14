package audit

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

// An Event is a record with its place, for other systems. Exports are one way: what is checked is
// the copy in JSON lines.
type Event struct {
	Index  int64
	Record *Record
}

// severity is how much an event matters, from 0 to 10 as CEF counts.
func (r *Record) severity() int {
	switch {
	case r.Outcome == "outcome_unknown":
		return 8
	case r.Code != "":
		return 5
	case r.Effect == "destructive", r.Act == Erased:
		return 4
	}
	return 2
}

func (r *Record) title() string {
	switch r.Act {
	case Intent:
		return "call dispatched"
	case Outcome:
		return "call ended: " + r.Outcome
	case Reads:
		return "calls that read"
	case Denied:
		return "calls denied"
	case Approval:
		return "approval " + r.Outcome
	case Erased:
		return "values erased"
	case AuditRead:
		return "values read"
	}
	return r.Act
}

// AppendCEF appends the event as one line of CEF, version 0.
func AppendCEF(dst []byte, e Event) []byte {
	header := strings.NewReplacer(`\`, `\\`, `|`, `\|`, "\r", " ", "\n", " ")
	value := strings.NewReplacer(`\`, `\\`, `=`, `\=`, "\r", `\r`, "\n", `\n`)
	r := e.Record
	dst = fmt.Appendf(dst, "CEF:0|Newel|newel|%d|%s|%s|%d|", Version, header.Replace(r.Act), header.Replace(r.title()), r.severity())
	put := func(key, v string) {
		if v != "" {
			dst = append(append(append(dst, key...), '='), value.Replace(v)...)
			dst = append(dst, ' ')
		}
	}
	if t, err := time.Parse(time.RFC3339Nano, r.Time); err == nil {
		put("rt", strconv.FormatInt(t.UnixMilli(), 10))
	}
	put("duser", r.By)
	put("externalId", strconv.FormatInt(e.Index, 10))
	put("suser", r.Principal)
	put("act", r.Capability)
	put("outcome", r.Outcome)
	put("reason", r.Code+r.Reason) // a record has one of them
	put("msg", r.Records)
	if r.Count > 0 {
		put("cnt", strconv.FormatInt(r.Count, 10))
	}
	for i, p := range [...][2]string{{"tenant", r.Tenant}, {"operation", r.Operation}, {"rule", r.Rule}, {"server", r.Server}, {"correlation", r.Correlation}, {"effect", r.Effect}} {
		if p[1] != "" {
			n := strconv.Itoa(i + 1)
			put("cs"+n+"Label", p[0])
			put("cs"+n, p[1])
		}
	}
	return append(dst[:len(dst)-1], '\n')
}

// AppendOCSF appends the event as one line of JSON of the class API Activity (6003) of OCSF 1.3.
func AppendOCSF(dst []byte, e Event) ([]byte, error) {
	r := e.Record
	t, err := time.Parse(time.RFC3339Nano, r.Time)
	if err != nil {
		return nil, fmt.Errorf("audit: record %d has no time: %w", e.Index, err)
	}
	activity := map[string]int{"read": 2, "write": 3, "destructive": 4}[r.Effect] // read, update, delete
	if activity == 0 {
		activity = 99
	}
	status, statusID := "Unknown", 0
	switch {
	case r.Outcome == "completed" && r.Code == "" || r.Act == Reads && r.Code == "":
		status, statusID = "Success", 1
	case r.Outcome == "outcome_unknown":
	case r.Code != "":
		status, statusID = "Failure", 2
	}
	severity := 1
	if r.severity() >= 8 {
		severity = 4
	} else if r.severity() >= 4 {
		severity = 2
	}
	out := map[string]any{
		"class_uid": 6003, "class_name": "API Activity", "category_uid": 6, "category_name": "Application Activity",
		"activity_id": activity, "activity_name": r.Act, "type_uid": 600300 + activity, "severity_id": severity,
		"time": t.UnixMilli(), "message": r.title(), "status": status, "status_id": statusID, "count": max(r.Count, 1),
		"metadata": map[string]any{"version": "1.3.0", "uid": strconv.FormatInt(e.Index, 10), "correlation_uid": r.Correlation,
			"product": map[string]any{"name": "newel", "vendor_name": "Newel"}},
		"actor":        map[string]any{"user": map[string]any{"uid": r.Principal, "org": map[string]any{"uid": r.Tenant}}, "app_uid": r.Client},
		"api":          map[string]any{"operation": r.Capability, "service": map[string]any{"name": r.Server}, "request": map[string]any{"uid": r.Operation}, "response": map[string]any{"error": r.Code}},
		"src_endpoint": map[string]any{"type": "Unknown", "type_id": 0},
	}
	b, err := json.Marshal(out, json.Deterministic(true), jsontext.AllowInvalidUTF8(true))
	if err != nil {
		return nil, fmt.Errorf("audit: record %d cannot be encoded: %w", e.Index, err)
	}
	return append(append(dst, b...), '\n'), nil
}

// AppendSyslog appends the event as one message of RFC 5424, facility 13 (log audit), ended by a
// line feed. host is "-" if unknown. The structured data holds what the message is about.
func AppendSyslog(dst []byte, e Event, host string) []byte {
	r := e.Record
	level := 6 // informational
	switch s := r.severity(); {
	case s >= 8:
		level = 3
	case s >= 4:
		level = 5
	}
	const audit = 13
	dst = fmt.Appendf(dst, "<%d>1 %s %s newel - %s [newel@32473 index=\"%d\"", audit*8+level, token(r.Time, 64), token(host, 255), token(r.Act, 32), e.Index)
	value := strings.NewReplacer(`\`, `\\`, `"`, `\"`, `]`, `\]`, "\r", " ", "\n", " ")
	for _, p := range [...][2]string{{"operation", r.Operation}, {"tenant", r.Tenant}, {"principal", r.Principal}, {"server", r.Server}, {"capability", r.Capability},
		{"effect", r.Effect}, {"outcome", r.Outcome}, {"code", r.Code}, {"rule", r.Rule}, {"approval", r.Approval}, {"by", r.By}, {"records", r.Records}, {"why", r.Reason}, {"correlation", r.Correlation}} {
		if p[1] != "" {
			dst = append(dst, ' ')
			dst = append(append(append(append(dst, p[0]...), `="`...), value.Replace(p[1])...), '"')
		}
	}
	if r.Count > 0 {
		dst = fmt.Appendf(dst, ` count="%d"`, r.Count)
	}
	dst = append(dst, "] "...)
	return append(append(dst, strings.NewReplacer("\r", " ", "\n", " ").Replace(r.title())...), '\n')
}

// token makes a header field of syslog: printable ASCII without spaces.
func token(s string, most int) string {
	s = strings.Map(func(c rune) rune {
		if c <= ' ' || c > '~' {
			return -1
		}
		return c
	}, s)
	if s == "" {
		return "-"
	}
	return s[:min(len(s), most)]
}
