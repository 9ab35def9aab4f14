// Package faultpoint names the moments at which tests end the process, and does so in programs built
// with the tag faults. In all others On is false and Reached is empty: the compiler leaves nothing.
//
// Why a seam at all: that a crash loses nothing is only shown by crashing, and a kill from outside
// hits the moment between two system calls about once in a thousand times. Everything that can be
// hit from outside is (a request half sent, an answer half read): only moments that nobody outside
// can see have a name here. A point is one line without arguments of its own, so that it changes
// nothing of what it marks. Beside points there are Resolver, which asks a name server of the test,
// and Now, by which keys of issuers grow old: the system's belong to the system. on.go is the only code, test/faults the only user.
package faultpoint

// A Point is a moment of one call with an effect, or of the upkeep of what is stored. The numbers
// are those of docs/reliability.md.
type Point string

// The moments.
const (
	Allowed       Point = "K1"         // the policy has allowed it; nothing is written
	IntentCommit  Point = "K2 before"  // the intent is written and not committed
	Held          Point = "K3"         // it is reserved, and not dispatched
	Dispatched    Point = "K4"         // the intent is durable; the first byte comes next
	Answered      Point = "K8"         // the answer is read; nothing of it is written
	OutcomeCommit Point = "K9 before"  // the outcome is written and not committed
	Concluded     Point = "K10"        // the outcome is durable; nothing of the answer is sent
	Recovering    Point = "K13"        // it is being found out what became of a call
	Migrating     Point = "K14 schema" // a version of the schema is being written
	Pruning       Point = "K14 prune"  // answers past their retention are being deleted
	Publishing    Point = "K14 head"   // the signed head is written beside its file
)

// The moments of a task beside those of its call. Those that end in " before" have another after the
// commit, see [Point.After].
const (
	TaskMake   Point = "T1 before" // the task is written and not committed
	TaskTake   Point = "T2 before" // a worker takes it
	TaskDone   Point = "T3"        // its call has ended; nothing of that is in the task
	TaskEnd    Point = "T4 before" // how it ended
	TaskAsk    Point = "T5 before" // what it asks
	TaskAnswer Point = "T6 before" // the answers of its caller
	TaskCancel Point = "T7 before" // its caller ended it
)

// The moments of an approval.
const (
	ApprovalAsk    Point = "A1 before" // a person is to be asked
	ApprovalDecide Point = "A2 before" // somebody said yes or no
	ApprovalOver   Point = "A3 before" // its time was over
)

// After is the moment after the commit of one that ends in " before": nobody knows of it yet.
func (p Point) After() Point {
	const before = "before"
	return p[:len(p)-len(before)] + "after"
}

// Faults of the disk, for as long as they are armed.
const (
	DiskFull Point = "disk full" // writing fails, and says that there is no space
	SyncFail Point = "sync"      // syncing fails
)
