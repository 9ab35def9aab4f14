package call

import (
	"context"
	"time"

	"github.com/go-json-experiment/json/jsontext"
)

// Kind says what a call does. The zero Kind is invalid, so that a forgotten kind is refused.
type Kind uint8

// The kinds of calls. Every kind takes the same path.
const (
	Tool          Kind = iota + 1 // run a tool (tools/call)
	Resource                      // read a resource (resources/read)
	Prompt                        // render a prompt (prompts/get)
	Complete                      // suggest values for an argument (completion/complete)
	ListTools                     // tools/list
	ListResources                 // resources/list
	ListTemplates                 // resources/templates/list
	ListPrompts                   // prompts/list
	Discover                      // what is served at all (server/discover)
	Subscribe                     // follow changes until the context ends (subscriptions/listen, resources/subscribe)
	GetTask                       // look at a task (tasks/get)
	UpdateTask                    // answer what a task asks (tasks/update)
	CancelTask                    // end a task (tasks/cancel)
	TaskResult                    // wait for the end of a task (tasks/result)
	ListTasks                     // the caller's own tasks (tasks/list)
)

var kindNames = [...]string{"invalid", "tool", "resource", "prompt", "completion", "list_tools", "list_resources", "list_templates", "list_prompts", "discover", "subscribe", "get_task", "update_task", "cancel_task", "task_result", "list_tasks"}

// String returns the low-cardinality name used in logs and metric labels.
func (k Kind) String() string {
	if int(k) >= len(kindNames) {
		return kindNames[0]
	}
	return kindNames[k]
}

// IsList reports whether the call asks for a list of capabilities.
func (k Kind) IsList() bool { return k >= ListTools && k <= ListPrompts }

// OfTask reports whether the call is about one task that was made before; Name is its id.
func (k Kind) OfTask() bool { return k >= GetTask && k <= TaskResult }

// A Call is one request, whatever door it came through.
//
// Fields above the line are set by the door and never change. Fields below are set once, by
// the step named beside them. The steps of one call run on one goroutine; a handler that
// starts goroutines must not write to the Call.
type Call struct {
	Kind Kind

	// Name is what is called, as the caller wrote it: a tool or prompt name, a resource URI,
	// for completion the prompt name or template URI, the id of a task. Empty for lists and
	// subscriptions.
	Name string

	// Args is the arguments object: strict JSON (no duplicate names, valid UTF-8, bounded depth
	// and size), byte for byte as received. Nil means no arguments were sent.
	Args jsontext.Value

	Completion *Completion // for Complete only
	Filter     *Filter     // for Subscribe only
	Cursor     string      // for lists: where the page starts; "" is the first page

	Credential Credential // what the caller presented; nothing verified yet
	Key        string     // idempotency key, or ""
	Client     Client     // what the caller's side can do, as it declared for this call
	Progress   bool       // the caller wants progress
	LogLevel   string     // lowest level of log messages the caller wants, or "": none
	Resume     string     // what [InputRequired.State] held when this call asked last, or ""
	Asked      string     // names the question that this call, or an earlier round of it, answers first; unguessable; "": it answers none
	AsTask     TaskWish   // whether the caller takes, or wants, a task in place of the result
	// Responses are the answers to what a task asked, by key; for UpdateTask only.
	Responses map[string]jsontext.Value
	// Elsewhere is what Result.Elsewhere said of this call before, or "".
	Elsewhere string
	// TaskID is the task that this call is the work of, or "". No door sets it.
	TaskID string

	// Meta and Unknown are the members of _meta and of params that the house does not know, as
	// objects, or nil: what ends a call elsewhere passes them on.
	Meta, Unknown jsontext.Value

	Trace     Trace  // correlation and W3C trace context
	Door      string // "http", "stdio", "memory", "task": for records only, never for decisions
	Revision  string // protocol revision as the door knows it: for records only
	SessionID string // session of an older revision: for records only, or ""
	Size      int    // bytes of the message as received

	Sink  Sink  // progress and log messages to the caller; never nil
	Asker Asker // asks the caller's side for input; never nil

	// Restore opens what the caller brought of an earlier round of this call, which is sealed for
	// its principal: authenticate calls it as soon as Principal is known. It sets Resume, Asked and
	// what Asker knows. Nil: the caller brought nothing.
	Restore func(*Call) error

	// ---- set along the path ----

	Principal *Principal  // authenticate; nil while no identity is configured (loopback only)
	Visible   *Visible    // authorize: what of a list its caller may see; nil: all
	Target    *Capability // resolve; nil for lists and subscriptions; for a task the tool that it runs
	Task      *Task       // resolve; for calls about a task
	Followed  []*Task     // resolve; those that a subscription is about
	Approval  *Approval   // authorize: a person has to say yes first; approve sets its ID. nil: nobody has to
	// Once names this operation to what runs it (effect): the same for every attempt of it,
	// different for every other, of whatever caller. Servers that de-duplicate take it as their
	// key. "" for what has no effect.
	Once  string
	Event Event // any step; written once, by observe
}

// Visible is the part of a catalog that one caller may use. It does not change.
type Visible struct {
	// Key is the same for all callers who see the same, or "" if nobody else may be given what
	// this caller sees.
	Key string
	// Shows reports whether the caller may use c. It is safe for concurrent use.
	Shows func(c *Capability) bool
}

// Approval is what the policy wants of people before one call runs, and what they said.
type Approval struct {
	Rule      string        // of the policy, that wants it
	Policy    string        // version of the policy that said so
	Approvers []string      // roles, of which whoever decides needs one; empty: operators alone decide
	Count     int           // how many people have to say yes, at least 1
	Self      bool          // whether the caller may be one of them
	Expires   time.Duration // how long a decision is waited for, and how long it counts

	// ID names the approval that lets this call run, and Binding (32 bytes) what it is good for;
	// "" says that there is none. The call uses it up.
	ID      string
	Binding []byte
	Spent   bool // an earlier call used it up: it is good for the same operation tried again
}

// Completion is what a Complete call asks for. Ref kinds are Prompt and Resource (a template).
type Completion struct {
	Ref      Kind              // Prompt or Resource
	Argument string            // name of the argument or template variable
	Value    string            // what has been typed so far
	Context  map[string]string // values already chosen for other arguments
}

// Filter is what a Subscribe call wants to hear of.
type Filter struct {
	ToolsChanged     bool
	ResourcesChanged bool
	PromptsChanged   bool
	URIs             []string // resources whose updates are wanted
	Tasks            []string // tasks whose changes are wanted
}

// Lists reports whether changes of the list of a kind are wanted.
func (f *Filter) Lists(kind Kind) bool {
	switch kind {
	case ListTools:
		return f.ToolsChanged
	case ListPrompts:
		return f.PromptsChanged
	case ListResources, ListTemplates:
		return f.ResourcesChanged
	}
	return false
}

// Credential is what the caller presented, unverified. It prints as nothing.
type Credential struct {
	Bearer      string   // access token, or ""
	Proofs      []string // DPoP headers, if the token was presented with that scheme (RFC 9449)
	Method, URL string   // of the request, for the proof
	Certificate string   // SHA-256 of the client's TLS certificate, base64url (RFC 8705), or ""
	Peer        string   // remote address, or "stdio"
	// Known is who a door found out that this is, because it had to ask before the path could: a
	// proof is good for one time. Nil otherwise.
	Known *Principal
}

// String keeps tokens out of logs.
func (Credential) String() string { return "[redacted]" }

// GoString keeps tokens out of %#v.
func (Credential) GoString() string { return "[redacted]" }

// Principal is a verified caller.
type Principal struct {
	ID     string   // stable subject, unique within Tenant
	Tenant string   // exactly one
	Client string   // OAuth client id, or ""
	Scopes []string // granted scopes; "*" stands for all
	Roles  []string // as its issuer says
}

// Trace carries correlation in and out.
type Trace struct {
	Correlation string // X-Correlation-Id as received, or ""
	Parent      string // W3C traceparent as received, or ""
	State       string // W3C tracestate
	Baggage     string // W3C baggage
}

// Client is what the caller's side declared for this call.
type Client struct {
	Name, Version string // self-reported: for display and records, never for decisions
	ElicitForm    bool
	ElicitURL     bool
	Sampling      bool
	SamplingTools bool
	Roots         bool
	Extensions    []string       // ids of declared extensions
	Raw           jsontext.Value // the capabilities object as received, or nil
}

// Event is the record of one call. Every field has one writer; observe writes it out once.
type Event struct {
	Correlation string        // ties records of this call together, here and at backends: the caller's id if it was sane, else ours
	Step        string        // the step that refused the call, or ""
	Rule        string        // of the policy, that decided; "" before it was asked
	Outcome     string        // "ok", "tool_error", "input_required", "refused", "error"
	Code        Code          // of the error, or OK
	QueueTime   time.Duration // time spent waiting for admission
	ResultBytes int           // bytes of the result as sent
	Tokens      int           // estimated tokens of the result
	Cached      bool          // answered from what was answered before
	Paged       bool          // bound cut the result into pages or an artifact
	Attempts    int           // how often the backend was asked, if more than once
	Operation   string        // id of the durable operation, or ""
	Replayed    bool          // the answer is that of an earlier call with the same key
	Approval    string        // id of the approval that the call waits for or used up, or ""
}

// A Sink takes what a handler tells the caller while it works. Implementations are safe for
// concurrent use. After the call has ended they return an error and send nothing.
type Sink interface {
	// Progress reports progress; it does nothing if the caller did not ask for progress.
	Progress(ctx context.Context, p Progress) error
	// Log sends a log message; it does nothing below the level the caller asked for.
	Log(ctx context.Context, m LogMessage) error
	// Notify sends a change notification on a subscription; other calls refuse it.
	Notify(ctx context.Context, n Notification) error
}

// Progress is how far a call has come. Done must increase with every report.
type Progress struct {
	Done    float64
	Total   float64 // 0 means unknown
	Message string
}

// LogMessage is a log message to the caller. It must hold no secrets.
type LogMessage struct {
	Level  string // RFC 5424 level as MCP spells it: debug, info, notice, warning, error, critical, alert, emergency
	Logger string
	Data   jsontext.Value
}

// Notification tells a subscriber of a change.
type Notification struct {
	Method string // e.g. notifications/tools/list_changed
	URI    string // for notifications/resources/updated
	TaskID string // for TaskChanged
	Task   *Task  // for TaskChanged: as it stands, set on the way to the subscriber
	Anew   bool   // of lists: what they name is other things, although they may look the same
}

// A Handler ends a call or passes it on. It is safe for concurrent use. It returns either a
// result or an error; an error that is not (or does not wrap) an [*Error] or [*InputRequired]
// leaves the house as "internal error".
type Handler func(ctx context.Context, c *Call) (*Result, error)

// A Guard wraps a handler with one step of the path.
type Guard func(next Handler) Handler

// Discard is a Sink that sends nothing.
var Discard Sink = discard{}

type discard struct{}

func (discard) Progress(context.Context, Progress) error   { return nil }
func (discard) Log(context.Context, LogMessage) error      { return nil }
func (discard) Notify(context.Context, Notification) error { return nil }

// Acknowledged is the Method of the first notification on every subscription: from now on
// changes are delivered (MCP 2026-07-28, basic/patterns/subscriptions).
const Acknowledged = "notifications/subscriptions/acknowledged"

// TaskChanged is the Method of the notification that a task changed.
const TaskChanged = "notifications/tasks"

// A StreamCloser is a Sink that can end the caller's stream before the call ends: the caller
// comes back for the rest after retry (session revisions, SEP-1699). Long calls use it so that no
// connection stays open for them.
type StreamCloser interface {
	CloseStream(retry time.Duration)
}
