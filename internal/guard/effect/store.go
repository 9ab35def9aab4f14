package effect

import (
	"bytes"
	"context"
	"errors"
	"time"

	"newel.dev/newel/internal/audit"
)

// State is where an operation stands.
type State uint8

// The states. A crash in Reserved: nothing ran, it may run again. A crash in Dispatched: it may or
// may not have run. A crash in Waiting: it waits for answers of its caller in the backend that asked.
const (
	Reserved    State = iota + 1 // one caller holds it; nothing was sent
	Dispatched                   // the intent is durable; bytes may have been sent
	Waiting                      // the backend asked its caller and goes on with the answers
	Completed                    // the answer is stored
	NotExecuted                  // failed_not_executed: nothing was done, it may run again
	Unknown                      // outcome_unknown: nobody can tell
)

var stateNames = [...]string{"invalid", "reserved", "dispatched", "input_required", "completed", "failed_not_executed", "outcome_unknown"}

// String returns the name used in records and answers.
func (s State) String() string {
	if int(s) >= len(stateNames) {
		return stateNames[0]
	}
	return stateNames[s]
}

// Ended reports whether nothing happens to the operation by itself any more.
func (s State) Ended() bool { return s >= Completed }

// An Operation is the durable line of one call with an effect. Times are those of the engine's
// clock, in microseconds: the database's, or one that only runs while the engine does.
type Operation struct {
	ID          string // unguessable
	Scope       []byte // who, where and which key, 32 bytes; nil for calls without a key
	Fingerprint []byte // what was asked, 32 bytes
	State       State
	Fence       int64  // counts who held it; who has an older number may not write
	Holder      string // who holds it: one attempt of one caller
	Until       int64  // end of the lease
	Sent        int64  // when its intent was last committed; 0: never, or by an older program
	Round       []byte // Waiting: SHA-256 of the state that continues it
	Ended       int64  // when it ended, or 0
	Retain      int64  // microseconds to keep it after that
	Index       int64  // of the audit record of its last step
	Answer      []byte // Completed: sealed; Waiting: what was asked, sealed
	Undo        []byte // Completed: the call that undoes it, sealed; nil: there is none

	Tenant, Principal, Server, Tool string

	// Lease is how long it is still held by somebody, 0 if it is not; set by the engine on reading.
	Lease time.Duration
	Past  bool // its retention is over; set by the engine on reading
	// Since is how long ago it was Sent, 0 if it never was; set by the engine on reading.
	Since time.Duration
}

// A Reservation claims an operation: a new one, or, with Expect, one that the caller has seen.
type Reservation struct {
	ID          string // of a new operation, or of the one seen
	Expect      int64  // fence of the one seen, or 0
	Holder      string // unguessable; the same in every attempt to make the same claim
	Scope       []byte
	Fingerprint []byte
	Lease       time.Duration
	Retain      time.Duration
	Recover     bool   // claims an operation even if it is not known whether it ran
	Forget      bool   // an operation that ended as Unknown counts for Retain only
	Resume      []byte // claims the operation that waits with this Round
	From        string // Holder of an earlier claim of the same caller, which this one goes on from

	Tenant, Principal, Server, Tool string
}

// An Intent is a reservation that is dispatched in the same transaction, with its audit record.
type Intent struct {
	Reservation
	Approval *Approval // that it uses up in the same transaction; nil: it needs none
	Entry    audit.Entry
}

// An Approval is what an intent uses up.
type Approval struct {
	ID      string // "": there is none, and the intent may not be dispatched
	Binding []byte // what is to be run
	Resume  []byte // what it goes on from (see Waiting), or nil
	Now     time.Time
}

// An Outcome ends an operation that its holder dispatched or reserved.
type Outcome struct {
	ID        string
	Fence     int64
	State     State // Waiting or an ended one
	Answer    []byte
	Undo      []byte
	Round     []byte
	Lease     time.Duration // Waiting: how long it waits
	Abandoned bool          // by somebody else, after the lease ended
	Approval  string        // that the operation used up, or "": it is given back if nothing was done
	Entry     audit.Entry
}

// ErrAway says that the store cannot be reached: more work would fail in the same way.
var ErrAway = errors.New("the store cannot be reached")

// ErrFenced says that an operation is not the caller's any more. Nothing was written.
var ErrFenced = errors.New("the operation was taken over by somebody else")

// A Store keeps operations and the audit log. Its methods are safe for concurrent use. What one
// method does is one transaction: it is durable when the method returns without an error. After
// any other error than ErrFenced it may or may not have happened; the same call made again does
// not do it twice.
type Store interface {
	// Reserve claims an operation; one that may have run is then Dispatched. held is false if it stands otherwise: then nothing is written
	// and op is how it stands, with an empty ID if there is none.
	Reserve(ctx context.Context, r *Reservation) (op Operation, held bool, err error)
	// Dispatch claims like Reserve, unless the holder has reserved it, and goes on to Dispatched
	// with the audit record of the intent. It returns [call.ErrUnapproved], and writes nothing, if
	// it would go on and the approval that it needs does not let it.
	Dispatch(ctx context.Context, i *Intent) (op Operation, held bool, err error)
	// Complete writes how an operation went on, with its audit record. It returns ErrFenced if
	// the fence is not that of the operation, or the operation has ended.
	Complete(ctx context.Context, o *Outcome) (op Operation, err error)
	// Find returns the operation of a scope as it stands; an empty ID says there is none.
	Find(ctx context.Context, scope []byte) (Operation, error)
	// Operation returns an operation as it stands; an empty ID says there is none.
	Operation(ctx context.Context, id string) (Operation, error)
	// Abandoned returns at most limit operations that nobody holds and that have not ended.
	Abandoned(ctx context.Context, limit int) ([]Operation, error)
	// Append adds audit records that change no operation. It returns the index of the first.
	Append(ctx context.Context, entries []audit.Entry) (int64, error)
}

// Claim is what Reserve does to the operation as it stands (nil: there is none) at time now. replace
// says that the old operation of the scope is past its retention and goes.
//
// It is pure, so that every engine has the same states.
func (r *Reservation) Claim(now int64, op *Operation) (next Operation, held, replace bool) {
	if op != nil && op.Expired(now, r.Forget) && op.Holder != r.Holder && r.Expect == 0 {
		op, replace = nil, true
	}
	switch {
	case op == nil && r.Expect != 0:
		return Operation{}, false, false
	case op == nil:
		next = Operation{ID: r.ID, Scope: r.Scope, Fingerprint: r.Fingerprint, Tenant: r.Tenant, Principal: r.Principal, Server: r.Server, Tool: r.Tool}
	case op.Holder == r.Holder: // our own claim, made again after an error
		return *op, op.State == Reserved || op.State == Dispatched, false
	case !r.may(now, op):
		return *op, false, false
	default:
		next = *op
		next.Answer, next.Undo, next.Round, next.Ended = nil, nil, nil, 0
	}
	// What may have run stays so while it is held to find that out: a crash now must not make it look
	// as if nothing had been sent.
	if next.State != Dispatched && next.State != Unknown {
		next.State = Reserved
	} else {
		next.State = Dispatched
		if next.Sent == 0 || next.Sent > now { // an older program sent it, or the clock was set back: it may have been just now
			next.Sent = now
		}
	}
	next.Holder = r.Holder
	next.Fence++
	next.Until, next.Retain = now+r.Lease.Microseconds(), r.Retain.Microseconds()
	return next, true, replace
}

// may reports whether the operation may be taken from where it stands.
func (r *Reservation) may(now int64, op *Operation) bool {
	if r.Expect != op.Fence || r.ID != op.ID || !bytes.Equal(r.Fingerprint, op.Fingerprint) {
		return false
	}
	held := op.Until > now && (r.From == "" || op.Holder != r.From)
	switch op.State {
	case Reserved:
		return !held
	case Dispatched:
		return !held && r.Recover
	case Waiting:
		return len(r.Resume) > 0 && bytes.Equal(r.Resume, op.Round)
	case NotExecuted:
		return true
	case Unknown:
		return r.Recover
	}
	return false
}

// Apply is what Complete does to the operation as it stands at time now. again says that it was
// done before, by the same caller.
func (o *Outcome) Apply(now int64, op *Operation) (next Operation, again bool, err error) {
	if op == nil || op.Fence != o.Fence {
		return Operation{}, false, ErrFenced
	}
	if op.State == o.State && bytes.Equal(op.Answer, o.Answer) && bytes.Equal(op.Round, o.Round) {
		return *op, true, nil
	}
	if op.State.Ended() || op.State == Waiting && !o.Abandoned || o.Abandoned && op.Until > now {
		return Operation{}, false, ErrFenced
	}
	next = *op
	next.State, next.Answer, next.Undo, next.Round, next.Until = o.State, o.Answer, o.Undo, o.Round, 0
	if o.State == Waiting {
		next.Until = now + o.Lease.Microseconds()
	} else {
		next.Ended = now
	}
	return next, false, nil
}

// Expired reports whether the operation is past its retention. One whose outcome is not known is
// kept until somebody resolves it, unless forget says otherwise.
func (op *Operation) Expired(now int64, forget bool) bool {
	return op.State.Ended() && (op.State != Unknown || forget || op.Scope == nil) && now-op.Ended > op.Retain
}

// At sets Lease, Past and Since for a reader at time now.
func (op *Operation) At(now int64) Operation {
	out := *op
	out.Lease = max(0, time.Duration(op.Until-now)*time.Microsecond)
	if op.State.Ended() {
		out.Lease = 0
	}
	out.Past = op.Expired(now, false)
	if op.Sent > 0 {
		out.Since = max(0, time.Duration(now-op.Sent)*time.Microsecond)
	}
	return out
}
