package mcpupstream

import (
	"encoding/base64"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/strictjson"
)

// The revisions spoken to upstreams. An upstream of a session revision may answer with an older
// one of its own.
const (
	statelessRevision = "2026-07-28"
	sessionRevision   = "2025-11-25"
)

// A message is one JSON-RPC message of an upstream.
type message struct {
	ID     jsontext.Value `json:"id"`
	Method string         `json:"method"`
	Params jsontext.Value `json:"params"`
	Result *result        `json:"result"`
	Error  *rpcError      `json:"error"`
}

// result is any result object, decoded once. Which members are there depends on the method.
type result struct {
	Type          string         `json:"resultType"` // "" in session revisions: complete
	Content       jsontext.Value `json:"content"`
	Contents      jsontext.Value `json:"contents"`
	Messages      jsontext.Value `json:"messages"`
	Completion    jsontext.Value `json:"completion"`
	Tools         jsontext.Value `json:"tools"`
	Resources     jsontext.Value `json:"resources"`
	Templates     jsontext.Value `json:"resourceTemplates"`
	Prompts       jsontext.Value `json:"prompts"`
	Structured    jsontext.Value `json:"structuredContent"`
	IsError       bool           `json:"isError"`
	Next          string         `json:"nextCursor"`
	TTL           jsontext.Value `json:"ttlMs"`
	Scope         string         `json:"cacheScope"`
	InputRequests jsontext.Value `json:"inputRequests"`
	RequestState  *string        `json:"requestState"`
	Meta          jsontext.Value `json:"_meta"`
	Unknown       jsontext.Value `json:",embed"`
}

type rpcError struct {
	Code    int            `json:"code"`
	Message string         `json:"message"`
	Data    jsontext.Value `json:"data"`
}

// Error makes it an error for the log.
func (e *rpcError) Error() string { return fmt.Sprintf("JSON-RPC error %d: %.200s", e.Code, e.Message) }

// errGarbage is an answer that is no JSON-RPC message.
var errGarbage = errors.New("the answer is not a JSON-RPC message")

// parse decodes one message strictly: no duplicate names, valid UTF-8, bounded depth.
func parse(b []byte, maxBytes int) (*message, error) {
	if err := strictjson.Bound(b, strictjson.Limits{Bytes: maxBytes, Depth: 256, Elements: 2_000_000}); err != nil {
		return nil, fmt.Errorf("%w: %w", errGarbage, err)
	}
	m := &message{}
	if err := json.Unmarshal(b, m); err != nil {
		return nil, fmt.Errorf("%w: %w", errGarbage, err)
	}
	return m, nil
}

// isResponse reports whether the message answers a request.
func (m *message) isResponse() bool { return m.Method == "" && (m.Result != nil || m.Error != nil) }

// A request is one request on its way to an upstream.
type request struct {
	id      int64
	method  string
	name    string         // tool, prompt or URI: mirrored in Mcp-Name; "" if the method has none
	params  jsontext.Value // object
	headers [][2]string    // Mcp-Param headers, encoded
}

func (r *request) append(dst []byte) []byte {
	dst = strconv.AppendInt(append(dst, `{"jsonrpc":"2.0","id":`...), r.id, 10)
	dst = call.AppendString(append(dst, `,"method":`...), r.method)
	if r.params != nil {
		dst = append(append(dst, `,"params":`...), r.params...)
	}
	return append(dst, '}')
}

// object appends the members of one JSON object.
type object struct{ b []byte }

func newObject() *object { return &object{b: append(make([]byte, 0, 512), '{')} }

func (o *object) name(n string) {
	if o.b[len(o.b)-1] != '{' {
		o.b = append(o.b, ',')
	}
	o.b = append(call.AppendString(o.b, n), ':')
}

func (o *object) str(n, v string) {
	o.name(n)
	o.b = call.AppendString(o.b, v)
}

func (o *object) raw(n string, v []byte) {
	if v != nil {
		o.name(n)
		o.b = append(o.b, v...)
	}
}

// open begins an object as a member, to which everything is added until close has what it returns.
func (o *object) open(n string) (at int) {
	at = len(o.b)
	o.name(n)
	o.b = append(o.b, '{')
	return at
}

// close ends what open began. With nothing in it the member is not there.
func (o *object) close(at int) {
	if o.b[len(o.b)-1] == '{' {
		o.b = o.b[:at]
		return
	}
	o.b = append(o.b, '}')
}

// all adds the members of another object, except those the house sets itself.
func (o *object) all(v jsontext.Value, except ...string) {
	if v == nil {
		return
	}
	_ = call.EachMember(v, func(name string, v jsontext.Value) { // an object, or there is nothing to add
		for _, e := range except {
			if e == name {
				return
			}
		}
		o.raw(name, v)
	})
}

// end closes the object. With nothing in it the result is {}.
func (o *object) end() jsontext.Value { return append(o.b, '}') }

// empty reports whether nothing was added.
func (o *object) empty() bool { return len(o.b) == 1 }

// headerValue encodes a value for a mirrored header: as it is if it is plain visible ASCII, in
// base64 otherwise (MCP 2026-07-28, streamable HTTP, SEP-2243).
func headerValue(v string) string {
	plain := v == strings.TrimSpace(v) && !strings.HasPrefix(v, "=?base64?")
	for i := 0; plain && i < len(v); i++ {
		plain = v[i] >= ' ' && v[i] <= '~'
	}
	if plain {
		return v
	}
	return "=?base64?" + base64.StdEncoding.EncodeToString([]byte(v)) + "?="
}

// capabilitiesOf encodes what the caller's side can do, so that an upstream never asks what
// nobody can answer. Extensions go on as declared, except those that change what results look
// like and that the house does not carry.
func capabilitiesOf(c *call.Client) jsontext.Value {
	if !c.ElicitForm && !c.ElicitURL && !c.Sampling && !c.Roots && len(c.Extensions) == 0 {
		return noCapabilities
	}
	o := newObject()
	if c.ElicitForm || c.ElicitURL {
		modes := newObject()
		if c.ElicitForm {
			modes.raw("form", []byte("{}"))
		}
		if c.ElicitURL {
			modes.raw("url", []byte("{}"))
		}
		o.raw("elicitation", modes.end())
	}
	if c.Sampling {
		if c.SamplingTools {
			o.raw("sampling", []byte(`{"tools":{}}`))
		} else {
			o.raw("sampling", []byte(`{}`))
		}
	}
	if c.Roots {
		o.raw("roots", []byte("{}"))
	}
	if len(c.Extensions) > 0 {
		declared := struct {
			Extensions jsontext.Value `json:"extensions"`
		}{}
		if json.Unmarshal(c.Raw, &declared) == nil && declared.Extensions != nil {
			x := newObject()
			x.all(declared.Extensions, tasksExtension)
			if !x.empty() {
				o.raw("extensions", x.end())
			}
		}
	}
	return o.end()
}

const tasksExtension = "io.modelcontextprotocol/tasks"
