package mcphttp

import (
	"bytes"
	"encoding/base64"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/catalog"
	"newel.dev/newel/internal/mcpwire"
)

// metaRevision is what a message of the stateless revision carries in its body.
var metaRevision = []byte(`"io.modelcontextprotocol/protocolVersion"`)

// nearEnd is how far from either end of a body its _meta is looked for first.
const nearEnd = 4 << 10

// stateless decides the era of a POST: by what its body carries, which is the source of truth,
// then by its headers. It decides only who answers: either side checks the message whole.
func stateless(r *http.Request, body []byte) bool {
	if n := len(body); n > 2*nearEnd && (bytes.Contains(body[:nearEnd], metaRevision) || bytes.Contains(body[n-nearEnd:], metaRevision)) {
		return true // it is seldom in the middle, and to look through 4 MB takes as long as to serve many calls
	}
	if bytes.Contains(body, metaRevision) {
		return true
	}
	if bytes.Contains(body, []byte(`"initialize"`)) {
		return false // a client that offers the newest revision to a server of any era
	}
	return header(r, "Mcp-Protocol-Version") == mcpwire.Revision || len(r.Header["Mcp-Method"]) > 0 || bytes.Contains(body, []byte(`"server/discover"`))
}

// unknownRevision refuses a session request whose revision nobody here speaks, the way the
// newest revision asks, so that a client learns what to send.
func unknownRevision(r *http.Request, body []byte) *mcpwire.Failure {
	v := header(r, "Mcp-Protocol-Version")
	if v == "" || slices.Contains(mcpwire.Supported(), v) {
		return nil
	}
	data, err := json.Marshal(map[string]any{"supported": mcpwire.Supported(), "requested": v}, json.Deterministic(true))
	if err != nil {
		data = nil
	}
	var id struct {
		ID jsontext.Value `json:"id"`
	}
	if json.Unmarshal(body, &id) != nil || (id.ID.Kind() != '"' && id.ID.Kind() != '0') {
		id.ID = nil
	}
	return &mcpwire.Failure{ID: id.ID, Status: http.StatusBadRequest, Code: -32022, Message: "unsupported protocol version", Data: data, Cause: call.Malformed}
}

// checkHeaders holds the mirrored headers against the body, which is the source of truth
// (MCP 2026-07-28, basic/transports/streamable-http, "Server Validation").
func (d *Door) checkHeaders(r *http.Request, m *mcpwire.Message) *mcpwire.Failure {
	mismatch := func(format string, args ...any) *mcpwire.Failure {
		return &mcpwire.Failure{ID: m.ID, Status: http.StatusBadRequest, Code: -32020, Message: fmt.Sprintf(format, args...), Cause: call.Malformed}
	}
	if m.Params.Meta.Revision == "" {
		return nil // the codec refuses it with the better error
	}
	if v := strings.TrimSpace(header(r, "Mcp-Protocol-Version")); v != m.Params.Meta.Revision && !d.mayLack(r, "Mcp-Protocol-Version") {
		return mismatch("the MCP-Protocol-Version header must be present once and equal to params._meta[\"io.modelcontextprotocol/protocolVersion\"]")
	}
	if v := strings.TrimSpace(header(r, "Mcp-Method")); v != m.Method && !d.mayLack(r, "Mcp-Method") {
		return mismatch("the Mcp-Method header must be present once and equal to the method")
	}
	if subject, ok := m.Subject(); ok {
		v, ok := mirrored(r, "Mcp-Name")
		if (!ok || v != subject) && !d.mayLack(r, "Mcp-Name") {
			return mismatch("the Mcp-Name header must be present once and equal to params.name or params.uri (=?base64?…?= for values that are not plain ASCII)")
		}
	}
	if len(r.Header["Idempotency-Key"]) > 1 {
		return mismatch("the Idempotency-Key header must be present at most once")
	}
	if m.Method != "tools/call" {
		return nil
	}
	for _, h := range d.opts.ParamHeaders(m.Params.Name) {
		if why := checkParam(r, h, m.Params.Arguments); why != "" && !d.mayLack(r, http.CanonicalHeaderKey("Mcp-Param-"+h.Header)) {
			return mismatch("the Mcp-Param-%s header %s", h.Header, why)
		}
	}
	return nil
}

// mayLack reports whether a header is missing and that is put up with. What is decided here never
// rests on headers: those that are there still have to say what the body says.
func (d *Door) mayLack(r *http.Request, canonical string) bool {
	return d.opts.AbsentHeaders && len(r.Header[canonical]) == 0
}

// mirrored returns the decoded value of a header that mirrors a string.
func mirrored(r *http.Request, canonical string) (string, bool) {
	vs := r.Header[canonical]
	if len(vs) != 1 {
		return "", false
	}
	v := strings.TrimSpace(vs[0])
	if inner, ok := strings.CutPrefix(v, "=?base64?"); ok {
		if inner, ok = strings.CutSuffix(inner, "?="); ok {
			b, err := base64.StdEncoding.DecodeString(inner)
			if err != nil || !utf8.Valid(b) {
				return "", false
			}
			return string(b), true
		}
	}
	for i := range len(v) {
		if v[i] < ' ' || v[i] > '~' {
			return "", false // raw bytes beyond ASCII are read differently along the way
		}
	}
	return v, true
}

// checkParam returns why a parameter header does not fit the arguments, or "".
func checkParam(r *http.Request, h catalog.ParamHeader, args jsontext.Value) string {
	value := at(args, h.Path)
	name := http.CanonicalHeaderKey("Mcp-Param-" + h.Header)
	if value == nil || value.Kind() == 'n' {
		if len(r.Header[name]) > 0 {
			return "must be absent: the argument is absent or null"
		}
		return ""
	}
	got, ok := mirrored(r, name)
	if !ok {
		return "must be present once: the argument is present"
	}
	switch value.Kind() {
	case '"':
		want, err := jsontext.AppendUnquote(nil, value)
		if err != nil || got != string(want) {
			return "differs from the argument"
		}
	case '0':
		a, errA := strconv.ParseInt(got, 10, 64)
		b, errB := strconv.ParseInt(string(value), 10, 64)
		if errA != nil || errB != nil {
			if got != string(value) {
				return "differs from the argument"
			}
		} else if a != b {
			return "differs from the argument"
		}
	default:
		if got != string(value) {
			return "differs from the argument"
		}
	}
	return ""
}

// at returns the member at a path of names, or nil.
func at(v jsontext.Value, path []string) jsontext.Value {
	for _, name := range path {
		var obj map[string]jsontext.Value
		if v.Kind() != '{' || json.Unmarshal(v, &obj) != nil {
			return nil
		}
		v = obj[name]
	}
	return v
}
