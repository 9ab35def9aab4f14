package mcpwire

import (
	"errors"
	"fmt"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/strictjson"
)

// Revision is the protocol revision this package speaks.
const Revision = "2026-07-28"

// A Message is one decoded JSON-RPC request or notification of the stateless revision.
type Message struct {
	ID     jsontext.Value `json:"id"` // raw, nil for a notification
	Method string         `json:"method"`
	Params Params         `json:"params"`
	Size   int            `json:"-"` // bytes as received

	JSONRPC string         `json:"jsonrpc"` // always 2.0
	Result  jsontext.Value `json:"result"`  // only of a response, which is refused
	Error   jsontext.Value `json:"error"`

	round int       // of a call that asked before
	first string    // name of its first state
	call  call.Call // that this becomes
	asker asker     // of the call, if it may ask
}

// Params is what the methods of the revision take, in one type, so that a message is decoded
// once. Members that a method does not know are ignored, as the revision asks.
type Params struct {
	Meta           Meta                      `json:"_meta"`
	Name           string                    `json:"name"`
	Arguments      jsontext.Value            `json:"arguments"`
	URI            string                    `json:"uri"`
	Cursor         string                    `json:"cursor"`
	Ref            *ref                      `json:"ref"`
	Argument       *argument                 `json:"argument"`
	Context        *completionContext        `json:"context"`
	Notifications  *notifications            `json:"notifications"`
	InputResponses map[string]jsontext.Value `json:"inputResponses"`
	RequestState   string                    `json:"requestState"`
	RequestID      jsontext.Value            `json:"requestId"` // notifications/cancelled
	TaskID         string                    `json:"taskId"`
	Unknown        jsontext.Value            `json:",embed"`
}

// Meta is the _meta of a request.
type Meta struct {
	Revision       string         `json:"io.modelcontextprotocol/protocolVersion"`
	Capabilities   jsontext.Value `json:"io.modelcontextprotocol/clientCapabilities"`
	ClientInfo     clientInfo     `json:"io.modelcontextprotocol/clientInfo"`
	LogLevel       string         `json:"io.modelcontextprotocol/logLevel"`
	ProgressToken  jsontext.Value `json:"progressToken"`
	Traceparent    string         `json:"traceparent"`
	Tracestate     string         `json:"tracestate"`
	Baggage        string         `json:"baggage"`
	IdempotencyKey string         `json:"dev.newel/idempotencyKey"`
	Unknown        jsontext.Value `json:",embed"`
}

type clientInfo struct {
	Name    string `json:"name"`
	Version string `json:"version"`
}

type ref struct {
	Type string `json:"type"`
	Name string `json:"name"`
	URI  string `json:"uri"`
}

type argument struct {
	Name  string `json:"name"`
	Value string `json:"value"`
}

type completionContext struct {
	Arguments map[string]string `json:"arguments"`
}

type notifications struct {
	Tools     bool     `json:"toolsListChanged,omitzero"`
	Prompts   bool     `json:"promptsListChanged,omitzero"`
	Resources bool     `json:"resourcesListChanged,omitzero"`
	URIs      []string `json:"resourceSubscriptions,omitempty"`
	Tasks     []string `json:"taskIds,omitempty"`
}

// clientCapabilities are the members of the declared capabilities that change what we may ask.
type clientCapabilities struct {
	Elicitation *struct {
		Form *struct{} `json:"form"`
		URL  *struct{} `json:"url"`
	} `json:"elicitation"`
	Sampling *struct {
		Tools *struct{} `json:"tools"`
	} `json:"sampling"`
	Roots      *struct{}                 `json:"roots"`
	Extensions map[string]jsontext.Value `json:"extensions"`
}

// Parse decodes one message. On failure it returns a [*Failure] that holds the id, if the
// message had a usable one.
func Parse(b []byte, l strictjson.Limits) (*Message, *Failure) {
	if err := strictjson.Bound(b, l); err != nil {
		return nil, &Failure{Status: 413, Code: codeInvalidRequest, Message: err.Error(), Cause: call.TooLarge}
	}
	m := &Message{Size: len(b)}
	if err := json.Unmarshal(b, m); err != nil {
		return nil, refusal(b, l, err)
	}
	switch {
	case m.JSONRPC != "2.0":
		return nil, invalid(m, `"jsonrpc" must be "2.0"`)
	case m.ID != nil && !validID(m.ID):
		m.ID = nil
		return nil, invalid(m, `"id" must be a string or an integer of at most 256 bytes`)
	case m.Method == "" && (m.Result != nil || m.Error != nil):
		return nil, invalid(m, "responses are not accepted: this revision asks through input_required results")
	case m.Method == "":
		return nil, invalid(m, `"method" is missing`)
	}
	return m, nil
}

func invalid(m *Message, text string) *Failure {
	return &Failure{ID: m.ID, Status: 400, Code: codeInvalidRequest, Message: text, Cause: call.Malformed}
}

// refusal tells bad syntax from JSON that does not have the form of a message.
func refusal(b []byte, l strictjson.Limits, cause error) *Failure {
	if err := strictjson.Check(b, l); err != nil {
		return &Failure{Status: 400, Code: codeParse, Message: err.Error(), Cause: call.Malformed}
	}
	f := &Failure{Status: 400, Code: codeInvalidRequest, Message: "the message is not a JSON-RPC request object", Cause: call.Malformed}
	switch jsontext.Value(b).Kind() {
	case '[':
		f.Message = "batches are not part of revision " + Revision + "; send one message per request"
		return f
	case '{':
	default:
		return f
	}
	var id struct {
		ID jsontext.Value `json:"id"`
	}
	if json.Unmarshal(b, &id) == nil && validID(id.ID) {
		f.ID = id.ID
	}
	var se *json.SemanticError
	if errors.As(cause, &se) {
		at := string(se.JSONPointer)
		f.Message = fmt.Sprintf("the member at %s is of the wrong type", at)
		if strings.HasPrefix(at, "/params") {
			f.Code = codeInvalidParams
		}
	}
	return f
}

// validID accepts strings and integers (JSON-RPC 2.0; MCP forbids null).
func validID(id jsontext.Value) bool {
	if len(id) == 0 || len(id) > 256 {
		return false
	}
	switch id.Kind() {
	case '"':
		return true
	case '0':
		return !strings.ContainsAny(string(id), ".eE")
	}
	return false
}

// IsNotification reports whether no answer is expected.
func (m *Message) IsNotification() bool { return m.ID == nil }

// Hears reports whether its sender wants to hear of the call while it runs.
func (m *Message) Hears() bool {
	meta := &m.Params.Meta
	return meta.ProgressToken != nil || meta.LogLevel != "" || kinds[m.Method] == call.Subscribe
}

// Subject is the name or URI that a caller over HTTP mirrors in Mcp-Name; ok is false for
// methods without one.
func (m *Message) Subject() (subject string, ok bool) {
	switch m.Method {
	case "tools/call", "prompts/get":
		return m.Params.Name, true
	case "resources/read":
		return m.Params.URI, true
	case "tasks/get", "tasks/update", "tasks/cancel":
		return m.Params.TaskID, true
	}
	return "", false
}

// checkMeta checks what every request of the revision must carry.
func (m *Message) checkMeta() *Failure {
	meta := &m.Params.Meta
	missing := ""
	switch {
	case meta.Revision == "":
		missing = "io.modelcontextprotocol/protocolVersion"
	case meta.Revision != Revision:
		data, err := json.Marshal(map[string]any{"supported": Supported(), "requested": meta.Revision}, json.Deterministic(true))
		if err != nil {
			data = nil
		}
		return &Failure{ID: m.ID, Status: 400, Code: codeUnsupportedVersion, Message: "unsupported protocol version", Data: data, Cause: call.Malformed}
	case meta.Capabilities == nil || meta.Capabilities.Kind() != '{':
		missing = "io.modelcontextprotocol/clientCapabilities"
	}
	if missing != "" {
		return &Failure{ID: m.ID, Status: 400, Code: codeInvalidParams, Message: fmt.Sprintf("params._meta[%q] is missing; every request of revision %s carries it", missing, Revision), Cause: call.Malformed}
	}
	return nil
}

// Supported lists the revisions one URL serves, newest first.
func Supported() []string {
	return []string{Revision, "2025-11-25", "2025-06-18", "2025-03-26"}
}

// client returns what the request declares about its sender.
func (m *Message) client() (call.Client, error) {
	meta := &m.Params.Meta
	c := call.Client{Raw: meta.Capabilities, Name: meta.ClientInfo.Name, Version: meta.ClientInfo.Version}
	if len(meta.Capabilities) <= 2 { // {}
		return c, nil
	}
	var caps clientCapabilities
	if err := json.Unmarshal(meta.Capabilities, &caps); err != nil {
		return c, err
	}
	if e := caps.Elicitation; e != nil {
		c.ElicitURL = e.URL != nil
		c.ElicitForm = e.Form != nil || e.URL == nil // an empty object means form
	}
	if caps.Sampling != nil {
		c.Sampling, c.SamplingTools = true, caps.Sampling.Tools != nil
	}
	c.Roots = caps.Roots != nil
	for id := range caps.Extensions {
		c.Extensions = append(c.Extensions, id)
	}
	return c, nil
}
