package approve

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"slices"
	"time"

	"newel.dev/newel/internal/audit"
)

// State is where an approval stands.
type State uint8

// The states. Pending and Approved run out; the others are ends, but that a call of which it is
// certain that it did nothing gives its approval back.
const (
	Pending  State = iota + 1 // people are waited for
	Approved                  // one call may run
	Used                      // it did, or is doing so
	Denied                    // somebody said no
	Expired                   // its time was over first, which is a no
)

var stateNames = [...]string{"invalid", "pending", "approved", "used", "denied", "expired"}

// String returns the name used in records and answers.
func (s State) String() string {
	if int(s) >= len(stateNames) {
		return stateNames[0]
	}
	return stateNames[s]
}

// Retention is how long an approval is kept after its end. The audit log keeps what was decided.
const Retention = 7 * 24 * time.Hour

// An Approval is what people decide about: one call of one caller. Times are those of the engine's
// clock in microseconds, but for Deadline: the engine's may stand still while nothing runs, and that
// of the machine may be set back, so an approval runs out by whichever says so first.
type Approval struct {
	ID        string // unguessable
	Binding   []byte // 32 bytes: what it is good for; nil: nothing any more
	State     State
	Until     int64
	Deadline  int64  // by the clock of the machine, since 1970
	Ended     int64  // when it was used, denied or ran out, or 0
	Operation string // that used it up
	Round     []byte // of that operation, if it waits for its caller: what continues it may run
	Index     int64  // of the audit record of its last step
	Args      []byte // of the call, sealed

	Facts
}

// Facts are what is known of the call, and who said what.
type Facts struct {
	Tenant    string    `json:"tenant"`
	Principal string    `json:"principal"`
	Client    string    `json:"client"`
	Server    string    `json:"server"`
	Kind      string    `json:"kind"`
	Name      string    `json:"name"` // of the capability
	Effect    string    `json:"effect"`
	Pin       string    `json:"pin"`       // SHA-256 of its definition
	Arguments string    `json:"arguments"` // SHA-256 of their canonical form
	Rule      string    `json:"rule"`
	Policy    string    `json:"policy"` // version
	Approvers []string  `json:"approvers"`
	Count     int       `json:"count"`
	Self      bool      `json:"self"`
	Requested time.Time `json:"requested"`
	Votes     []Vote    `json:"votes"`
}

// A Vote is what one person said.
type Vote struct {
	ID     string    `json:"id"` // unguessable: the same when it is sent again
	By     string    `json:"by"`
	Tenant string    `json:"tenant"`
	How    string    `json:"how"` // elicitation, token, operator or webhook
	Yes    bool      `json:"yes"`
	Reason string    `json:"reason"`
	At     time.Time `json:"at"`

	roles []string
	all   bool // an operator, or whom one trusts: may decide for every tenant and role
}

// How somebody decides.
const (
	ByElicitation = "elicitation" // the caller was asked by its client
	ByToken       = "token"       // with an access token
	ByOperator    = "operator"    // who has the key file
	ByWebhook     = "webhook"     // whom the other system believes
)

// A Person is somebody who may decide.
type Person struct {
	Name     string
	Tenant   string
	Roles    []string
	How      string
	Operator bool // of all tenants, in all roles
}

// Votes is what the person says.
func (p Person) Votes(yes bool, reason string, now time.Time) *Vote {
	return &Vote{ID: rand.Text(), By: p.Name, Tenant: p.Tenant, How: p.How, Yes: yes, Reason: reason, At: now.UTC(), roles: p.Roles, all: p.Operator}
}

// Errors of decisions. Nothing was written.
var (
	ErrNone    = errors.New("there is no such approval")
	ErrEnded   = errors.New("the approval is decided already, or its time is over")
	ErrTwice   = errors.New("you have decided about this already")
	ErrOwn     = errors.New("this is your own call: somebody else has to decide")
	ErrNoVoter = errors.New("you may not decide about this")
)

// A Request asks for an approval.
type Request struct {
	Approval // its Until is set by the engine
	For      time.Duration
	Entry    audit.Entry
}

// A Decision is one step of an approval that stands: a vote, or its end without one.
type Decision struct {
	ID    string
	Vote  *Vote     // nil: its time is over
	Told  bool      // the caller hears that it ended: what it asks for next is new
	Now   time.Time // by the clock of the machine
	Entry audit.Entry
}

// A Query chooses approvals. Empty fields choose all.
type Query struct {
	Tenant    *string
	Principal *string
	State     State
	Limit     int
	Oldest    bool // first; otherwise the newest
}

// A Store keeps approvals. Its methods are safe for concurrent use, what one does is one
// transaction, and it is durable when the method returns without an error. After another error than
// those of this package it may or may not have happened; the same call again does not do it twice.
type Store interface {
	// Ask returns the approval that stands for the binding, or else makes the one given, and says
	// which.
	Ask(ctx context.Context, r *Request) (a Approval, made bool, err error)
	// Decide takes a step.
	Decide(ctx context.Context, d *Decision) (Approval, error)
	// Bound returns the approval of a binding, an empty ID says that there is none.
	Bound(ctx context.Context, binding []byte) (Approval, error)
	// Approval returns one, or ErrNone.
	Approval(ctx context.Context, id string) (Approval, error)
	// Approvals returns those that a query chooses.
	Approvals(ctx context.Context, q Query) ([]Approval, error)
}

// Over reports whether its time is over.
func (a *Approval) Over(now int64, wall time.Time) bool {
	return a.Until <= now || a.Deadline <= wall.UnixMicro()
}

// Late is called by an engine that hands an approval to a reader, which does not know its clock: if
// the time is over by that, Deadline says so too.
func (a *Approval) Late(now int64) {
	if a.Until <= now {
		a.Deadline = 0
	}
}

// Stands reports whether a call may still come of it, or a person was not heard yet.
func (a *Approval) Stands() bool { return a.State == Pending || a.State == Approved }

// Make is what Ask does to the approval of the binding as it stands (nil: there is none): it stays,
// or r takes its place. It is pure, so that every engine has the same states.
func (r *Request) Make(now int64, old *Approval) (next Approval, made bool) {
	if old != nil && (old.ID == r.ID || old.Stands() && !old.Over(now, r.Requested)) {
		return *old, false
	}
	next = r.Approval
	next.State, next.Until, next.Deadline = Pending, now+r.For.Microseconds(), r.Requested.Add(r.For).UnixMicro()
	return next, true
}

// Apply is what Decide does to an approval as it stands. again says that it was done before.
func (d *Decision) Apply(now int64, a *Approval) (next Approval, again bool, err error) {
	if a == nil {
		return Approval{}, false, ErrNone
	}
	next = *a
	if d.Vote == nil {
		return d.end(now, next)
	}
	v := d.Vote
	if slices.ContainsFunc(a.Votes, func(o Vote) bool { return o.ID == v.ID }) {
		return next, true, nil
	}
	if err := a.may(v); err != nil {
		return Approval{}, false, err
	}
	if a.State != Pending || a.Over(now, d.Now) {
		return Approval{}, false, ErrEnded
	}
	if slices.ContainsFunc(a.Votes, func(o Vote) bool { return same(o.By, o.Tenant, v) }) {
		return Approval{}, false, ErrTwice
	}
	next.Votes = append(slices.Clone(a.Votes), *v)
	switch {
	case !v.Yes:
		next.State, next.Ended = Denied, now
	case len(next.Votes) >= a.Count:
		next.State = Approved
	}
	return next, false, nil
}

// end is the end without a vote.
func (d *Decision) end(now int64, next Approval) (_ Approval, again bool, err error) {
	switch {
	case next.Stands() && !next.Over(now, d.Now):
		return Approval{}, false, ErrEnded // somebody's clock differs, or it is another one by now
	case next.Stands():
		next.State, next.Ended = Expired, now
	case !d.Told || next.Binding == nil:
		return next, true, nil
	}
	if d.Told {
		next.Binding = nil
	}
	return next, false, nil
}

// may reports whether somebody may decide at all.
func (a *Approval) may(v *Vote) error {
	switch {
	case !v.all && v.Tenant != a.Tenant:
		return ErrNone // what other tenants do is nobody's business
	case same(a.Principal, a.Tenant, v):
		if !a.Self {
			return ErrOwn
		}
		if len(a.Approvers) == 0 || v.all {
			return nil
		}
	case v.all:
		return nil
	}
	if !slices.ContainsFunc(a.Approvers, func(role string) bool { return slices.Contains(v.roles, role) }) {
		return ErrNoVoter
	}
	return nil
}

// same reports whether a person of a tenant is who votes. Operators have no tenant: of them the name
// decides.
func same(name, tenant string, v *Vote) bool {
	return name == v.By && (tenant == v.Tenant || v.all)
}

// Spend uses an approval up for an operation, at its dispatch. It returns false if it does not let
// the operation run. resume is what the operation goes on from, or nil.
func (a *Approval) Spend(now int64, wall time.Time, binding []byte, operation string, resume []byte) (next Approval, ok bool) {
	if a == nil || len(binding) == 0 || !bytes.Equal(a.Binding, binding) {
		return Approval{}, false
	}
	next = *a
	switch {
	case a.State == Approved && !a.Over(now, wall):
	case a.State == Used && a.Operation == operation:
	case a.State == Used && len(resume) > 0 && bytes.Equal(a.Round, resume):
	default:
		return Approval{}, false
	}
	next.State, next.Operation, next.Round, next.Ended = Used, operation, nil, now
	return next, true
}

// Release is what the end of the operation does to its approval: one that did nothing gives it back,
// one that waits for its caller goes on with it. changed is false for all others.
func (a *Approval) Release(operation string, nothingDone bool, round []byte) (next Approval, changed bool) {
	if a == nil || a.State != Used || a.Operation != operation || a.Binding == nil {
		return Approval{}, false
	}
	next = *a
	switch {
	case nothingDone:
		next.State, next.Operation, next.Round, next.Ended = Approved, "", nil, 0
	case len(round) > 0:
		next.Round = round
	default:
		return Approval{}, false
	}
	return next, true
}
