// Package effect is the durable line of the path: what was asked for is written down before it is
// done, how it ended before it is answered, and a call that comes again with its key is answered
// from what is written.
//
// Start reading at [Effects.Guard]; store.go is what an engine promises and the states of an
// operation, keyed.go the calls with a key, reads.go those without an effect.
//
// Refuses: a key that is used for something else (as 422 of the IETF draft), one whose call runs
// (409, retryable), one that is missing where it is required or not well-formed (400); every call
// with an effect whose intent cannot be written. Needs: a Store. Fails: closed; a store that does
// not answer means no. Reads are refused only when their records could not be written for long.
// Records: intent and outcome of every call with an effect, reads in groups, in the audit log.
// Costs: two grouped commits for a call with an effect; a map lookup for one that reads.
package effect

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"path"
	"strings"
	"sync"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/audit"
	"newel.dev/newel/internal/catalog"
	"newel.dev/newel/internal/faultpoint"
	"newel.dev/newel/internal/redact"
	"newel.dev/newel/internal/secret"
)

// Options configure the step. Zero means the default in brackets; below zero is refused.
type Options struct {
	Store Store         // required
	Key   secret.Key    // seals what is stored
	Wait  time.Duration // longest wait of a call for another one with its key [5 s]
	// Retention is how long an answer is kept after the call ended [24 h].
	Retention time.Duration
	// Deadline bounds what is still waited for when a caller with a key goes away, if the call has
	// no deadline of its own [60 s].
	Deadline time.Duration
	// MaxAnswer bounds a stored answer, and stored arguments, in bytes; of longer ones only the digest
	// is kept [1 MiB].
	MaxAnswer int
	// Confirm are the classes of tools whose calls their caller has to confirm. Tools whose recovery
	// is safe are not confirmed: running them again does no harm.
	Confirm []call.Effect
	Rules   []Rule // what the operator says of tools; the first that fits counts
	// Redact takes secrets out of arguments before the audit log gets them; nil: what always is one.
	Redact  *redact.Redactor
	Breaker Breaker // nil: nobody is asked
	Logger  *slog.Logger
}

// A Breaker knows what is away.
type Breaker interface {
	// Ready returns the error that the call would end with because what it goes to is known to be
	// away, or nil. It takes no place and returns at once.
	Ready(c *call.Call) error
}

// A Rule is what an operator says of tools.
type Rule struct {
	Tool     string        // name; * stands for any text but /
	Recovery call.Recovery // RecoverNone: what the tool itself says
	Lookup   string        // tool for RecoverLookup
	// Settle is how long after a call was last sent a lookup that does not find it is not believed: until
	// then the tool may still do it. 0: twice the longest time of the call. Not longer than Retention.
	Settle   time.Duration
	Required bool // calls without a key are refused
	// Once makes a key of who calls what with which arguments, for calls that bring none: the same
	// call within this time is answered from the first. 0: they are two calls.
	Once time.Duration
	Undo *call.Undo // nil: what the tool itself says
}

// Effects is the step's state. It is safe for concurrent use.
type Effects struct {
	o      Options
	store  Store
	box    *secret.Box
	secret string // derives Once
	reads  *reads
	log    *slog.Logger

	tools tools
}

// New returns the step, or an error that names the option that makes no sense.
func New(o Options) (*Effects, error) {
	if o.Store == nil {
		return nil, errors.New("effect: there is no store")
	}
	if o.Wait < 0 || o.Retention < 0 || o.Deadline < 0 || o.MaxAnswer < 0 {
		return nil, errors.New("effect: Wait, Retention, Deadline and MaxAnswer must not be below zero")
	}
	for _, r := range o.Rules {
		if _, err := path.Match(r.Tool, ""); err != nil {
			return nil, fmt.Errorf("effect: %q is not a pattern: %w", r.Tool, err)
		}
		if err := CheckUndo(r.Undo); err != nil {
			return nil, fmt.Errorf("effect: the undo of %q: %w", r.Tool, err)
		}
		if r.Once < 0 {
			return nil, fmt.Errorf("effect: the time for which calls of %q count once is below zero", r.Tool)
		}
		if (r.Recovery == call.RecoverLookup) != (r.Lookup != "") {
			return nil, fmt.Errorf("effect: the recovery of %q by lookup and the tool to look with go together", r.Tool)
		}
		if err := CheckSettle(r.Recovery, r.Settle); err != nil {
			return nil, fmt.Errorf("effect: %q: %w", r.Tool, err)
		}
		if r.Settle > or(o.Retention, retention) {
			return nil, fmt.Errorf("effect: the settle time of %q is longer than answers are kept, %s", r.Tool, or(o.Retention, retention))
		}
	}
	o.Wait = or(o.Wait, 5*time.Second)
	o.Retention = or(o.Retention, retention)
	o.Deadline = or(o.Deadline, time.Minute)
	o.MaxAnswer = or(o.MaxAnswer, 1<<20)
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Redact == nil {
		var err error
		if o.Redact, err = redact.New(redact.Options{}); err != nil {
			return nil, err
		}
	}
	box, err := o.Key.Box("newel stored values")
	if err != nil {
		return nil, err
	}
	once, err := o.Key.Derive("newel operation names")
	if err != nil {
		return nil, err
	}
	return &Effects{o: o, store: o.Store, box: box, secret: string(once), reads: newReads(o.Store, o.Logger), log: o.Logger}, nil
}

const retention = 24 * time.Hour // if nobody says otherwise

// CheckSettle returns what is wrong with the time after which a lookup is believed; nil is good.
func CheckSettle(r call.Recovery, settle time.Duration) error {
	switch {
	case settle < 0:
		return errors.New("the settle time is below zero")
	case settle > 0 && r != call.RecoverLookup:
		return errors.New("a settle time is for the recovery by lookup alone")
	}
	return nil
}

func or[T ~int | ~int64](v, otherwise T) T {
	if v == 0 {
		return otherwise
	}
	return v
}

// Retention is how long an answer is kept after its call ended.
func (e *Effects) Retention() time.Duration { return e.o.Retention }

// rule returns what counts for a tool.
func (e *Effects) rule(t *call.Capability) Rule {
	own := Rule{Recovery: t.Recovery, Lookup: t.Lookup, Settle: t.Settle, Undo: t.Undo}
	for _, r := range e.o.Rules {
		if ok, _ := path.Match(r.Tool, t.Name); ok { // checked by New
			if r.Recovery == call.RecoverNone {
				r.Recovery, r.Lookup, r.Settle = own.Recovery, own.Lookup, own.Settle
			}
			if r.Undo == nil {
				r.Undo = own.Undo
			}
			return r
		}
	}
	return own
}

// Safe reports whether running a tool twice does no harm.
func (e *Effects) Safe(t *call.Capability) bool {
	r := e.rule(t)
	return r.Recovery == call.RecoverSafe
}

// hasEffect reports whether a call goes through the store: tools of any class but read, and what a
// person has to approve. A class that nobody stated counts as the worst.
func hasEffect(c *call.Call) bool {
	return c.Target != nil && (c.Kind == call.Tool && c.Target.Effect != call.Read || c.Approval != nil) &&
		c.Elsewhere == "" // that was dispatched before
}

// Guard returns the guard for one server. find returns a tool of that server by name, or nil.
func (e *Effects) Guard(server string, find func(name string) *call.Capability) call.Guard {
	return func(next call.Handler) call.Handler {
		return func(ctx context.Context, c *call.Call) (*call.Result, error) {
			if c.Approval != nil && len(c.Approval.Binding) == 0 && c.Elsewhere == "" {
				return nil, call.Errorf(call.Denied, "a person has to approve this call, and this server has nobody to ask")
			}
			if !hasEffect(c) {
				return e.read(ctx, server, c, next)
			}
			o, err := e.begin(server, c)
			if err != nil {
				return nil, err
			}
			o.find, o.next = find, next
			if err := o.confirm(ctx); err != nil {
				return nil, err
			}
			if o.res.Scope == nil {
				return o.once(ctx)
			}
			return o.keyed(ctx)
		}
	}
}

// operation is one call on its way through the step.
type operation struct {
	*Effects
	c      *call.Call
	server string
	rule   Rule
	tool   *tool
	res    Reservation
	find   func(name string) *call.Capability
	next   call.Handler

	claimed  time.Time // just before its intent was committed
	answers  bool      // it has no key and answers what was asked: it is done once, and not replayed
	approval *Approval
	args     jsontext.Value // as the audit log has them; nil: not redacted yet
	asked    string         // the operation that asked, of a call without a key that goes on
	resume   string         // what the handler goes on from
}

// remembered is how long it is known that answers were used, at least: longer than a sealed state lives.
const remembered = 20 * time.Minute

// begin checks the key and says what is to be claimed.
func (e *Effects) begin(server string, c *call.Call) (*operation, error) {
	o := &operation{Effects: e, c: c, server: server, rule: e.rule(c.Target), tool: e.tools.of(c.Target)}
	if err := o.rule.check(c); err != nil {
		return nil, err
	}
	fingerprint, err := fingerprintOf(c, o.tool.pin)
	if err != nil {
		return nil, err
	}
	tenant, principal := whoIs(c)
	o.res = Reservation{
		ID: newID(), Holder: rand.Text(), Fingerprint: fingerprint, Retain: e.o.Retention,
		Tenant: tenant, Principal: principal, Server: server, Tool: nameOf(c.Target),
	}
	switch {
	case c.Kind != call.Tool || c.Target.Effect == call.Read: // nothing to be kept from happening twice
	case c.Key != "":
		o.res.Scope = scopeOf(c, server, "sent "+c.Key)
	case o.rule.Once > 0:
		o.res.Scope = scopeOf(c, server, "made "+hexOf(fingerprint))
		o.res.Retain, o.res.Forget = o.rule.Once, true
	case c.TaskID != "":
		o.res.Scope = scopeOf(c, server, "task "+c.TaskID)
	case c.Asked != "" && !namesAsked(c.Resume):
		// Whoever has the sealed state could send it as often as they like: what it leads to is done once.
		o.res.Scope, o.answers = scopeOf(c, server, "asked "+c.Asked), true
		o.res.Retain = max(remembered, e.o.Retention)
	}
	if o.res.Scope == nil {
		o.res.Retain = 0 // nobody can ask for it again; the audit log has it
		if o.rule.Undo != nil {
			o.res.Retain = e.o.Retention // but for an operator who has it undone
		}
	}
	if o.resume = c.Resume; o.resume != "" {
		if o.res.Scope == nil {
			o.asked, o.resume = parseAsked(o.resume)
		}
		o.res.Resume = roundOf(o.resume)
	}
	if a := c.Approval; a != nil {
		o.approval = &Approval{ID: a.ID, Binding: a.Binding, Resume: o.res.Resume}
	}
	return o, nil
}

// check refuses keys that are not well-formed, and calls without one where it is required.
func (r *Rule) check(c *call.Call) error {
	if err := checkKey(c.Key); err != nil {
		return err
	}
	if r.Required && r.Once == 0 && c.Key == "" {
		return call.Errorf(call.Malformed, "this tool is only called with an idempotency key: _meta[\"dev.newel/idempotencyKey\"] or the Idempotency-Key header; use the same one when you try again")
	}
	return nil
}

// Check refuses a call for its key alone, as the step would. It is for calls that run later.
func (e *Effects) Check(c *call.Call) error {
	if !hasEffect(c) {
		return nil
	}
	r := e.rule(c.Target)
	return r.check(c)
}

// newID returns an unguessable name that begins with the time, so that what is stored under it is
// stored side by side.
func newID() string {
	var ms [8]byte
	binary.BigEndian.PutUint64(ms[:], uint64(time.Now().UnixMilli()))
	return hex.EncodeToString(ms[2:]) + rand.Text()
}

// once runs a call without a key: written down before and after, and never recognised again but by the
// answers to what it asked.
func (o *operation) once(ctx context.Context) (*call.Result, error) {
	if o.asked == "" {
		o.res.Resume = nil
	} else if err := o.goOn(ctx); err != nil {
		return nil, err
	}
	if err := o.ready(); err != nil {
		return nil, err
	}
	op, held, err := o.dispatch(ctx)
	if err != nil {
		return nil, err
	}
	if !held && o.asked != "" {
		return nil, answered()
	}
	if !held {
		return nil, call.Errorf(call.Internal, "internal error").Because(errors.New("an operation with a random name was there before"))
	}
	return o.run(ctx, ctx, op)
}

// ready refuses what would only be written down twice: that it is sent, and that it could not be.
func (o *operation) ready() error {
	if o.o.Breaker == nil {
		return nil
	}
	return o.o.Breaker.Ready(o.c)
}

// goOn makes the reservation one of the operation that asked.
func (o *operation) goOn(ctx context.Context) error {
	op, err := o.store.Operation(ctx, o.asked)
	switch {
	case err != nil:
		return away(ctx, err)
	case op.State == Unknown:
		return o.unknown(nil)
	case op.State != Waiting || op.Scope != nil || !bytes.Equal(op.Round, o.res.Resume) || !bytes.Equal(op.Fingerprint, o.res.Fingerprint),
		op.Tenant != o.res.Tenant || op.Principal != o.res.Principal || op.Server != o.res.Server:
		return answered()
	}
	o.res.ID, o.res.Expect = op.ID, op.Fence
	return nil
}

// answered is what a caller gets whose answers come once more, or too late.
func answered() error {
	return call.Errorf(call.Conflict, "these answers came before, or come too late, or the tool has changed since it asked; look at what the call should have changed before you start it again")
}

// asking is a state that names the operation which asked, for calls that have no other name.
func asking(operation, state string) string { return operation + ":" + state }

// namesAsked reports whether a state does that: then its operation goes on, and says what was used.
func namesAsked(state string) bool {
	operation, _ := parseAsked(state)
	return operation != ""
}

func parseAsked(state string) (operation, rest string) {
	operation, rest, ok := strings.Cut(state, ":")
	if !ok || len(operation) != len(newID()) { // of an older program
		return "", state
	}
	return operation, rest
}

// leeway is how long a lease outlives the deadline of its call: for storing the outcome.
const leeway = 10 * time.Second

// limit is when a call has to end.
func (o *operation) limit(ctx context.Context) time.Duration {
	if deadline, ok := ctx.Deadline(); ok {
		return time.Until(deadline)
	}
	return o.o.Deadline
}

// dispatch commits the intent. A crash before: nothing was sent. A crash after: it may have been.
func (o *operation) dispatch(ctx context.Context) (op Operation, held bool, err error) {
	if ctx.Err() != nil {
		return op, false, call.AsError(ctx.Err()) // nothing was sent: it is simply cancelled
	}
	o.res.Lease = o.limit(ctx) + leeway
	faultpoint.Reached(faultpoint.Allowed)
	if o.args == nil {
		o.args = o.o.Redact.JSON(o.c.Args, o.tool.secret)
	}
	args := audit.NewValue("arguments", o.args)
	rec := o.record(audit.Intent, &Operation{ID: o.res.ID, Fence: o.res.Expect + 1})
	entry, err := o.entry(&rec, args)
	if err != nil {
		return op, false, err
	}
	if o.approval != nil {
		o.approval.Now = time.Now()
	}
	o.claimed = time.Now()
	op, held, err = o.store.Dispatch(ctx, &Intent{Reservation: o.res, Approval: o.approval, Entry: entry})
	if errors.Is(err, call.ErrUnapproved) {
		return op, false, call.Errorf(call.Denied, "a person has to approve this call first").Because(err)
	}
	if err != nil {
		return op, false, away(ctx, err)
	}
	return op, held, nil
}

// away says that the store does not answer. Nothing was sent.
func away(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return call.AsError(ctx.Err()).Because(err)
	}
	e := call.Errorf(call.Unavailable, "what is done cannot be written down right now, so nothing was done for this request; try again in a moment, with the same key").Because(err)
	e.RetryAfter = time.Second
	return e
}

// record is what intent and outcome have in common.
func (o *operation) record(act string, op *Operation) audit.Record {
	c := o.c
	r := audit.Record{
		Act: act, Capability: nameOf(c.Target), Correlation: c.Event.Correlation, Door: c.Door, Effect: c.Target.Effect.String(), Fence: op.Fence,
		Kind: c.Kind.String(), Operation: op.ID, Pin: o.tool.hex, Principal: o.res.Principal, Rule: c.Event.Rule, Server: o.server, Tenant: o.res.Tenant, Time: audit.Time(time.Now()),
	}
	if c.Principal != nil {
		r.Client = c.Principal.Client
	}
	if c.Approval != nil {
		r.Approval = c.Approval.ID
	}
	return r
}

// entry encodes a record. Values go in sealed, beside their digests; of some only the salt is kept.
func (o *operation) entry(r *audit.Record, values ...audit.Value) (audit.Entry, error) {
	for i := range values {
		r.Digests = append(r.Digests, values[i].Digest())
		if values[i].Name == answerValue || len(values[i].Data) > o.o.MaxAnswer {
			values[i].Data = nil // an answer is stored once, with the operation, and only as long as that
		}
	}
	b, err := r.Encode()
	if err != nil {
		return audit.Entry{}, call.Errorf(call.Internal, "internal error").Because(err)
	}
	if len(values) == 0 {
		return audit.Entry{Record: b}, nil
	}
	private, err := SealValues(o.box, r.Operation, values)
	if err != nil {
		return audit.Entry{}, call.Errorf(call.Internal, "internal error").Because(err)
	}
	return audit.Entry{Record: b, Private: private}, nil
}

// A tool is what follows from a capability, whoever calls it.
type tool struct {
	pin    []byte
	hex    string         // of the pin
	secret *redact.Secret // what its schema says is secret
}

// tools are those that were called. A capability does not change; one that is replaced is another one.
type tools struct {
	mu   sync.Mutex
	seen map[*call.Capability]*tool
}

const maxTools = 4096 // past that all are forgotten, and read again: catalogs come and go

func (s *tools) of(t *call.Capability) *tool {
	s.mu.Lock()
	defer s.mu.Unlock()
	found, ok := s.seen[t]
	if !ok {
		if s.seen == nil || len(s.seen) >= maxTools {
			s.seen = map[*call.Capability]*tool{}
		}
		pin := catalog.Pin(t)
		found = &tool{pin, hexOf(pin), redact.Of(t.Input)}
		s.seen[t] = found
	}
	return found
}

const answerValue = "answer"

// SealValues encrypts the values of a record of an operation.
func SealValues(box *secret.Box, operation string, values []audit.Value) ([]byte, error) {
	b, err := audit.EncodeValues(values)
	if err != nil {
		return nil, err
	}
	return box.Seal(b, "values of "+operation), nil
}

// OpenValues is the way back.
func OpenValues(key secret.Key, operation string, sealed []byte) ([]audit.Value, error) {
	if sealed == nil {
		return nil, nil
	}
	box, err := key.Box("newel stored values")
	if err != nil {
		return nil, err
	}
	b, err := box.Open(sealed, "values of "+operation)
	if err != nil {
		return nil, err
	}
	var values []audit.Value
	err = json.Unmarshal(b, &values)
	return values, err
}
