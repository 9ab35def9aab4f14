package main

import (
	"slices"
	"strings"

	"newel.dev/newel/internal/audit"
)

// Kinds of events of tasks and approvals.
const (
	handed    = "handed"    // the caller was given the handle of a task
	looked    = "looked"    // how a task stands, as its caller was told
	cancelled = "cancelled" // the caller was told that its task is cancelled
	guarded   = "guarded"   // a person has to approve this call
	pending   = "pending"   // the caller was told which approval it waits for; Until is when that runs out
	decided   = "decided"   // who decided was told that the decision counts
	viewed    = "viewed"    // how an approval stands, as somebody was told
)

// Further outcomes of an attempt. They end nothing.
const (
	working = "working" // the call is a task that has not ended
	waits   = "waits"   // a person is waited for
	denied  = "denied"  // a person said no, or nobody said yes in time
	stopped = "stopped" // the task is cancelled
)

// How tasks and approvals stand.
const (
	taskGone     = "none" // there is no such task
	taskAsks     = "input_required"
	taskCanceled = "cancelled"
	approved     = "approved"
	nobodyYet    = "pending"
)

// A Step is what the audit log says of a task or an approval.
type Step struct {
	Time    int64
	Act     string // task_made, task_ended or approval
	ID      string // of the task or the approval
	Outcome string
}

func stepOf(r *audit.Record, at int64) (Step, bool) {
	switch r.Act {
	case audit.TaskMade, audit.TaskEnded:
		return Step{at, r.Act, r.Operation, r.Outcome}, true
	case audit.Approval:
		return Step{at, r.Act, r.Approval, r.Outcome}, true
	}
	return Step{}, false
}

// ofTaskOrApproval is a point that is not one of a call by itself: T1 to T9, A1 to A5.
func ofTaskOrApproval(point string) bool {
	return len(point) > 1 && (point[0] == 'T' || point[0] == 'A') && point[1] >= '0' && point[1] <= '9'
}

// asACall is the point of a call that is broken within a task, after it was approved, or when it goes on with answers.
func asACall(point string) string {
	for _, way := range []string{"approved ", "answers ", "task "} {
		point = strings.TrimPrefix(point, way)
	}
	return point
}

// said reports whether the audit log says this of a task or an approval, at a time not after at; 0 is
// any time.
func said(steps []Step, act, id, outcome string, at int64) bool {
	return slices.ContainsFunc(steps, func(s Step) bool {
		return s.Act == act && s.ID == id && (outcome == "" || s.Outcome == outcome) && (at == 0 || s.Time <= at+slack)
	})
}

// ofTask checks a call that is a task.
func (v *Verdict) ofTask(h *history, steps []Step) {
	handle, end := "", ""
	for _, e := range h.events {
		switch e.Kind {
		case handed:
			if handle != "" && e.Subject != handle {
				v.add(h, "I4", "", "one key has two tasks")
			}
			handle = e.Subject
			if !said(steps, audit.TaskMade, handle, "", e.Time) {
				v.add(h, "I5", "", "its caller has the handle of a task whose making is not in the audit log")
			}
		case looked:
			if e.Status == taskGone {
				v.add(h, "I2", "", "its caller has the handle of a task that is not there")
			}
			if end != "" && e.Status != end {
				v.add(h, "I4", "", "its task was %s, and is %s", end, e.Status)
			}
			if e.Status == working || e.Status == taskAsks || e.Status == taskGone {
				continue
			}
			if end = e.Status; !said(steps, audit.TaskEnded, e.Subject, "", e.Time) {
				v.add(h, "I5", "", "its task has ended, and the audit log does not say so")
			}
		case cancelled:
			end = taskCanceled
			if slices.ContainsFunc(h.intents, func(i Intent) bool { return i.Act == audit.Intent && i.Time > e.Time+slack }) {
				v.add(h, "I3", "", "its caller was told that it is cancelled, and it was begun after that")
			}
		}
	}
}

// ofApproval checks a call that a person has to approve.
func (v *Verdict) ofApproval(h *history, steps []Step) {
	if !slices.ContainsFunc(h.events, func(e Event) bool { return e.Kind == guarded }) {
		return
	}
	over := map[string]int64{}      // by approval
	counts := map[string]string{}   // what was decided, as told
	usedBy := map[string][]string{} // operations
	for _, e := range h.events {
		switch e.Kind {
		case pending:
			over[e.Subject] = e.Until
		case decided:
			if counts[e.Subject] != "" {
				v.add(h, "I4", "", "one approval was decided twice")
			}
			counts[e.Subject] = e.Status
			if !said(steps, audit.Approval, e.Subject, e.Status, e.Time) {
				v.add(h, "I5", "", "a decision counts that is not in the audit log")
			}
		case viewed:
			if counts[e.Subject] != "" && e.Status == nobodyYet {
				v.add(h, "I2", "", "a decision counted, and it is gone")
			}
		}
	}
	undone := map[string]bool{} // operations that did nothing
	for _, i := range h.intents {
		if i.Act == audit.Outcome {
			undone[i.Operation] = i.State == notExecuted || i.State == taskAsks
		}
	}
	for _, i := range h.intents {
		if i.Act != audit.Intent {
			continue
		}
		switch {
		case !said(steps, audit.Approval, i.Approval, approved, i.Time):
			v.add(h, "I9", "", "it was begun, and nobody had approved it")
		case over[i.Approval] > 0 && i.Time > over[i.Approval]+slack && !slices.Contains(usedBy[i.Approval], i.Operation):
			v.add(h, "I9", "", "it was begun when the time of its approval was over")
		}
		if !slices.Contains(usedBy[i.Approval], i.Operation) && !undone[i.Operation] {
			usedBy[i.Approval] = append(usedBy[i.Approval], i.Operation)
		}
	}
	for _, ops := range usedBy {
		if len(ops) > 1 {
			v.add(h, "I1", "", "one approval was good for %d runs", len(ops))
		}
	}
}
