package call

import (
	"errors"
	"time"

	"github.com/go-json-experiment/json/jsontext"
)

// TaskSupport says whether calls of a tool may go on as tasks. The zero value is forbidden.
type TaskSupport uint8

// The kinds of support, as MCP 2025-11-25 spells them in execution.taskSupport.
const (
	TaskForbidden TaskSupport = iota // never
	TaskOptional                     // for callers that can take a handle in place of a result
	TaskRequired                     // always: callers that cannot are refused
)

var supportNames = [...]string{"forbidden", "optional", "required"}

// String returns the name used in definitions and configuration.
func (s TaskSupport) String() string {
	if int(s) >= len(supportNames) {
		return supportNames[0]
	}
	return supportNames[s]
}

// ParseTaskSupport is the way back; ok is false for other names.
func ParseTaskSupport(name string) (s TaskSupport, ok bool) {
	for i, n := range supportNames {
		if n == name {
			return TaskSupport(i), true
		}
	}
	return TaskForbidden, false
}

// A TaskWish is what the caller's side says of tasks with one call.
type TaskWish struct {
	Accepts bool          // it can take a handle in place of a result
	Asks    bool          // it wants a handle, and nothing else
	TTL     time.Duration // how long it wants the task kept, 0: as the server likes
	Refusal int           // JSON-RPC code of a call that may not be a task, or has to be one; 0: that of Unsupported
}

// TaskStatus is where a task stands, as callers see it.
type TaskStatus uint8

// The states of a task. The last three are final.
const (
	TaskWorking TaskStatus = iota + 1
	TaskInputRequired
	TaskCompleted
	TaskFailed
	TaskCancelled
)

var statusNames = [...]string{"invalid", "working", "input_required", "completed", "failed", "cancelled"}

// String returns the name that MCP uses.
func (s TaskStatus) String() string {
	if int(s) >= len(statusNames) {
		return statusNames[0]
	}
	return statusNames[s]
}

// Ended reports whether the status is final.
func (s TaskStatus) Ended() bool { return s >= TaskCompleted }

// ErrTaskCancelled is the cause of the end of a context whose task was cancelled: what the call left
// running elsewhere is not wanted any more.
var ErrTaskCancelled = errors.New("the task was cancelled")

// A Task is a call that goes on after its caller was answered.
type Task struct {
	ID      string // unguessable; nobody is let in by it alone
	Tool    string // what was called
	Status  TaskStatus
	Message string // how far it has come, or why it ended; may be empty
	Created time.Time
	Updated time.Time
	TTL     time.Duration // since Created; it may be gone after that
	Poll    time.Duration // how often to ask

	Questions []Question // TaskInputRequired: what is still open
	Result    *Result    // TaskCompleted
	Err       *Error     // TaskFailed, TaskCancelled

	Args jsontext.Value // of the call, for the policy
}
