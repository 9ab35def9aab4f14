package call

import (
	"context"
	"time"

	"github.com/go-json-experiment/json/jsontext"
)

// Effect is what running a tool does to the world.
type Effect uint8

// The side-effect classes. The zero Effect is Unknown and is treated like Destructive.
const (
	Unknown     Effect = iota
	Read               // changes nothing
	Write              // changes something; can be undone or repeated by a person
	Destructive        // deletes or overwrites, or cannot be undone
)

// String returns the name used in configuration and records.
func (e Effect) String() string {
	switch e {
	case Read:
		return "read"
	case Write:
		return "write"
	case Destructive:
		return "destructive"
	}
	return "unknown"
}

// Recovery is what may be done, without asking a person, when a call was sent and its answer is
// lost. The zero Recovery is none: the outcome stays unknown, and the call is never run again.
type Recovery uint8

// The ways to recover.
const (
	RecoverNone   Recovery = iota
	RecoverSafe            // running it again does no harm
	RecoverResend          // what runs it de-duplicates by Call.Once
	RecoverLookup          // a tool that reads tells whether it ran
)

// String returns the name used in configuration and records.
func (r Recovery) String() string {
	switch r {
	case RecoverSafe:
		return "safe"
	case RecoverResend:
		return "resend_same_key"
	case RecoverLookup:
		return "lookup"
	}
	return "none"
}

// Dependence is what an answer depends on beside the world: results are never given again to callers for
// whom they could differ. The zero Dependence is OnCaller.
type Dependence uint8

// What answers depend on.
const (
	OnCaller    Dependence = iota // on who is calling, with which rights
	OnRequest                     // on everything that the client sent, whoever it is of
	OnArguments                   // on name and arguments alone
)

// A Capability is one thing a server publishes: a tool, a resource, a resource template or a
// prompt. It is immutable once registered.
type Capability struct {
	Kind Kind // Tool, Resource or Prompt

	// Name identifies a tool or prompt. For resources and templates it is the display name.
	Name string
	// URI identifies a resource. Exactly one of URI and Template is set for Kind Resource.
	URI string
	// Template is an RFC 6570 URI template; a read of any matching URI resolves to it.
	Template string

	Title       string
	Description string
	Icons       jsontext.Value // JSON array, or nil
	MIME        string         // resources and templates
	Size        int64          // bytes, for resources; 0 means unknown

	Input       jsontext.Value // JSON Schema 2020-12 of the arguments (tools); nil means no arguments
	Output      jsontext.Value // JSON Schema 2020-12 of structuredContent, or nil
	Annotations jsontext.Value // as MCP spells them, or nil: derived from Effect for tools
	Meta        jsontext.Value // _meta of the listed definition, or nil
	Arguments   []Argument     // prompts

	// Definition is what lists show, byte for byte, or nil: then it is made of the fields above.
	// Its name (or URI, or template) must be that of the fields.
	Definition jsontext.Value

	Effect Effect
	// Recovery says what may be done when it is not known whether a call of the tool ran. Lookup
	// names the tool that finds out, for RecoverLookup; Settle is how long after a call was sent that
	// is not believed to find nothing, because the tool may still do it. 0: twice the longest time of
	// the call.
	Recovery Recovery
	Lookup   string
	Settle   time.Duration

	// Depends says what the answers of what reads depend on. Reads is a prefix of the URIs of
	// other resources that answers are made of, or "": when one is updated, earlier answers are old.
	Depends Dependence
	Reads   string

	// Undo is the tool that undoes a call of this one, if there is one.
	Undo *Undo

	// Tasks says whether calls of the tool may go on as tasks. Prepare, if not nil, runs before one
	// is made and may ask the caller; Run then gets the same answers. It has no effects.
	Tasks   TaskSupport
	Prepare func(ctx context.Context, c *Call) error
	// Follow goes on with what a call left running elsewhere: it waits for the end of Call.Elsewhere.
	// It may be run again, by any node. Nil if Run leaves nothing.
	Follow Handler

	Backend string   // name of the backend that publishes it; the catalog sets it
	Scopes  []string // scopes a caller needs
	Owner   string
	Version string
	Tags    []string

	// Origin says where this was declared (file:line, or the Go function): registration errors name it.
	Origin string

	// MaxResultBytes bounds the result; 0 means the house's default.
	MaxResultBytes int

	// Run ends a call of this capability. Required.
	Run Handler
	// Suggest completes an argument or template variable; nil means no suggestions. At most 100
	// values are sent. total is the number of all matches, or -1 if unknown.
	Suggest func(ctx context.Context, q *Completion) (values []string, total int, err error)

	// Check validates arguments against Input. The catalog compiles it at registration.
	Check func(args jsontext.Value) error
	// CheckOutput validates structuredContent against Output. The catalog compiles it; nil if
	// there is no Output.
	CheckOutput func(structured jsontext.Value) error
}

// Argument is one argument of a prompt. All values are strings.
type Argument struct {
	Name        string
	Title       string
	Description string
	Required    bool
	Enum        []string // allowed values, or nil for any; also its completion
}

// Undo is a call that undoes another one.
type Undo struct {
	Tool string
	// Args says where each argument comes from: args.name or result.name, from the arguments or the
	// structuredContent of the call that is undone; further names lead into objects, as in
	// result.order.id.
	Args map[string]string
}

// A Backend publishes capabilities. Methods are safe for concurrent use.
type Backend interface {
	// Name identifies the backend in errors and records; unique in one server.
	Name() string
	// Capabilities returns what the backend publishes now. It is called at start, before any
	// door opens, and again after each change it announced. It must not return partial lists.
	Capabilities(ctx context.Context) ([]*Capability, error)
}

// A Follower is a Backend that has to be told which resources callers want to hear of.
type Follower interface {
	Backend
	// Follow says that somebody subscribed to the resource at uri. It may be called again for
	// the same one, and returns quickly.
	Follow(uri string)
}

// A Watcher is a Backend whose capabilities or resources change while it runs.
type Watcher interface {
	Backend
	// Run blocks until ctx ends. It calls changed after its capabilities changed, and updated
	// when the content of the resource at uri changed. Both return quickly. Callers hear of lists
	// that are different, and of those kinds (ListTools and so on) that changed names although
	// they look the same.
	Run(ctx context.Context, changed func(kinds ...Kind), updated func(uri string)) error
}
