package main

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/anishathalye/porcupine"
	"golang.org/x/mod/sumdb/tlog"

	"newel.dev/newel/internal/audit"
)

// Kinds of events.
const (
	invoked  = "invoked"
	returned = "returned"
	faulted  = "fault"    // something was broken while Op ran; Point says what
	outage   = "outage"   // from Time until Until nothing could be written down
	gaveUp   = "gave up"  // Op did not come to an end in time
	expected = "expected" // what should have happened did not: Detail says what
	measured = "measured" // Detail is a figure of the scenario at Point
)

// Outcomes of one attempt, as its caller saw them.
const (
	succeeded   = "success"
	unknown     = "outcome_unknown"
	notExecuted = "failed_not_executed"
	busy        = "busy"  // somebody else holds it
	asked       = "asked" // the call goes on with answers
	lost        = "lost"  // the connection ended
	refused     = "refused"
)

// An Event is one line of a driver's log.
type Event struct {
	Time     int64   `json:"time"` // nanoseconds of the machine's clock
	Until    int64   `json:"until,omitempty"`
	Kind     string  `json:"kind"`
	Op       string  `json:"op,omitempty"`
	Attempt  int     `json:"attempt,omitempty"`
	Tool     string  `json:"tool,omitempty"`
	Nonce    string  `json:"nonce,omitempty"` // of the request
	Point    string  `json:"point,omitempty"`
	Outcome  string  `json:"outcome,omitempty"`
	Got      string  `json:"got,omitempty"`    // nonce of the answer
	Answer   string  `json:"answer,omitempty"` // digest of the answer, without the mark of a replay
	Replayed bool    `json:"replayed,omitempty"`
	After    float64 `json:"after,omitempty"` // seconds until it is to be tried again
	Cycle    bool    `json:"cycle,omitempty"` // a fault that counts as one
	Detail   string  `json:"detail,omitempty"`
	Subject  string  `json:"subject,omitempty"` // id of a task or an approval
	Status   string  `json:"status,omitempty"`  // of it
}

// An Intent is what the audit log says of one operation's step.
type Intent struct {
	Time  int64  // of the record
	Act   string // intent or outcome
	Op    string // as in the arguments
	State string // outcome

	Operation, Approval string
}

// Evidence is all that is known of one lane when everything is over.
type Evidence struct {
	Ledger      []Row
	Events      []Event
	Audit       []Intent
	Steps       []Step      // of tasks and approvals, in the audit log
	Log         []byte      // copy of the audit log, in JSON lines
	Checkpoints []tlog.Tree // published while it ran, and the last head
}

// A Violation is an invariant that did not hold.
type Violation struct {
	Invariant string `json:"invariant"`
	Op        string `json:"op,omitempty"`
	Point     string `json:"point,omitempty"`
	What      string `json:"what"`
}

// A Line is one row of the table: what became of the calls that were broken at a point.
type Line struct {
	Cycles, Zero, One, Unknown, Violations int
}

// A Verdict is what the checker says.
type Verdict struct {
	Lines      map[string]*Line
	Violations []Violation
	Measures   []string // figures of scenarios, with their points
	Unknown    int      // calls that ended so
	Calls      int
}

// recovers reports whether what is known of a tool settles what became of a call.
func recovers(tool string) bool { return tool == "resend" || tool == "lookup" }

// mayBeUnknown reports whether a call may end as outcome_unknown after a fault at this point.
// Reserve and dispatch are one transaction, so after its commit it may.
func mayBeUnknown(point string) bool {
	if point = asACall(point); ofTaskOrApproval(point) {
		return false
	}
	switch point {
	case "K0", "K1", "K2 before", "K3", "K9 after", "K10", "K11", "K12", "K14 schema", "K14 prune", "K14 head", "E2 full", "E10", "E14 names", "E16", "MRTR":
		return false
	}
	return true
}

// slack is how far two clocks of one machine may seem to be apart: records have microseconds.
const slack = int64(time.Millisecond)

// history is one call.
type history struct {
	op, tool string
	events   []Event
	rows     []Row
	intents  []Intent
	points   []string
}

// check says whether the invariants held. It is a pure function of the evidence.
func check(e *Evidence) *Verdict {
	v := &Verdict{Lines: map[string]*Line{}}
	calls := map[string]*history{}
	var order []*history
	of := func(op string) *history {
		h := calls[op]
		if h == nil {
			h = &history{op: op}
			calls[op] = h
			order = append(order, h)
		}
		return h
	}
	var outages []Event
	for _, ev := range e.Events {
		switch ev.Kind {
		case outage:
			outages = append(outages, ev)
		case expected:
			v.add(nil, "", ev.Point, "%s", ev.Detail)
		case measured:
			v.Measures = append(v.Measures, fmt.Sprintf("%-12s %s", ev.Point, ev.Detail))
		case faulted:
			if ev.Cycle {
				v.line(ev.Point).Cycles++
			}
		}
		if ev.Op == "" {
			continue
		}
		h := of(ev.Op)
		h.events = append(h.events, ev)
		if ev.Tool != "" {
			h.tool = ev.Tool
		}
		if ev.Kind == faulted {
			h.points = append(h.points, ev.Point)
		}
	}
	for _, r := range e.Ledger {
		h := of(r.Op)
		h.rows = append(h.rows, r)
	}
	for _, i := range e.Audit {
		if h := calls[i.Op]; h != nil {
			h.intents = append(h.intents, i)
		}
	}
	for _, h := range order {
		v.Calls++
		v.call(h, outages)
		v.ofTask(h, e.Steps)
		v.ofApproval(h, e.Steps)
	}
	v.log(e)
	return v
}

func (v *Verdict) line(point string) *Line {
	if v.Lines[point] == nil {
		v.Lines[point] = &Line{}
	}
	return v.Lines[point]
}

func (v *Verdict) add(h *history, invariant, point, format string, args ...any) {
	w := Violation{Invariant: invariant, Point: point, What: fmt.Sprintf(format, args...)}
	if h != nil {
		w.Op = h.op
		if len(h.points) > 0 {
			w.Point = h.points[len(h.points)-1]
		}
	}
	if w.Point != "" {
		v.line(w.Point).Violations++
	}
	v.Violations = append(v.Violations, w)
}

// call checks one call.
func (v *Verdict) call(h *history, outages []Event) {
	if len(h.rows) > 1 {
		v.add(h, "I1", "", "it was done %d times", len(h.rows))
	}
	v.audited(h)
	last, answer := "", ""
	var first, doneAt, unknownAt int64
	began := map[int]int64{}
	for _, e := range h.events {
		switch e.Kind {
		case invoked:
			began[e.Attempt] = e.Time
			if first == 0 {
				first = e.Time
			}
		case gaveUp:
			v.add(h, "I7", "", "it did not come to an end: %s", e.Detail)
		case returned:
			switch e.Outcome {
			case succeeded:
				if len(h.rows) == 0 {
					v.add(h, "I2", "", "its caller was told that it is done, and it is not")
				}
				if unknownAt > 0 && began[e.Attempt] > unknownAt && !recovers(h.tool) {
					v.add(h, "I4", "", "it was done after its outcome had been unknown")
				}
				if answer != "" && answer != e.Answer {
					v.add(h, "I4", "", "two answers: %s and %s", answer, e.Answer)
				}
				if e.Got != e.Nonce {
					v.add(h, "I10", "", "the answer to %q is that to %q", e.Nonce, e.Got)
				}
				answer, last, doneAt = e.Answer, succeeded, e.Time
			case unknown:
				if doneAt > 0 && began[e.Attempt] > doneAt {
					v.add(h, "I4", "", "it was done, and then its outcome was unknown")
				}
				if unknownAt = e.Time; doneAt == 0 {
					last = unknown
				}
			case notExecuted:
				for _, r := range h.rows {
					if r.Time >= began[e.Attempt] && r.Time <= e.Time && !h.byAnother(e.Attempt, r.Time) {
						v.add(h, "I3", "", "its caller was told that nothing was done, and it was")
					}
				}
			case refused:
				v.add(h, "I7", "", "it was refused: %s", e.Detail)
			}
		}
	}
	for _, r := range h.rows {
		for _, o := range outages {
			if first > o.Time && r.Time > o.Time && r.Time < o.Until {
				v.add(h, "I9", "", "it was done while nothing could be written down")
			}
		}
	}
	if last == unknown {
		v.Unknown++
		if recovers(h.tool) {
			v.add(h, "I8", "", "its outcome stayed unknown, and the tool has a recovery")
		} else if len(h.points) > 0 && !slices.ContainsFunc(h.points, mayBeUnknown) {
			v.add(h, "I8", "", "its outcome is unknown after %v", h.points)
		} else if len(h.points) == 0 {
			v.add(h, "I8", "", "its outcome is unknown without a fault")
		}
	}
	if !h.linear() {
		v.add(h, "I4", "", "its history is not that of one call")
	}
	of := h.points
	if i := slices.IndexFunc(of, func(p string) bool { return p == "K3" || p == "K13" }); i >= 0 {
		of = of[len(of)-1:] // what became of it was decided later
	}
	for _, p := range of {
		l := v.line(p)
		if last == unknown {
			l.Unknown++
		}
		if len(h.rows) == 0 {
			l.Zero++
		} else {
			l.One++
		}
	}
}

// byAnother reports whether another attempt may have done it at a time: it was under way, or it ended
// without anybody knowing what became of what it had sent.
func (h *history) byAnother(attempt int, at int64) bool {
	from, to := map[int]int64{}, map[int]int64{}
	for _, e := range h.events {
		switch e.Kind {
		case invoked:
			from[e.Attempt], to[e.Attempt] = e.Time, math.MaxInt64
		case returned:
			if e.Outcome != unknown && e.Outcome != lost {
				to[e.Attempt] = e.Time
			}
		}
	}
	for other := range from {
		if other != attempt && from[other] <= at && at <= to[other] {
			return true
		}
	}
	return false
}

// audited checks that the intent of each execution was written down before it, and the outcome of
// each success at all.
func (v *Verdict) audited(h *history) {
	for _, r := range h.rows {
		if !slices.ContainsFunc(h.intents, func(i Intent) bool { return i.Act == audit.Intent && i.Time <= r.Time+slack }) {
			v.add(h, "I5", "", "it was done without an intent in the audit log")
		}
	}
	told := slices.ContainsFunc(h.events, func(e Event) bool { return e.Kind == returned && e.Outcome == succeeded })
	if told && !slices.ContainsFunc(h.intents, func(i Intent) bool { return i.Act == audit.Outcome && i.State == "completed" }) {
		v.add(h, "I5", "", "its caller was told that it is done, and the audit log does not say so")
	}
}

// log checks the audit log against everything that was published.
func (v *Verdict) log(e *Evidence) {
	if len(e.Checkpoints) == 0 {
		return
	}
	if _, err := audit.Verify(bytes.NewReader(e.Log), e.Checkpoints...); err != nil {
		v.add(nil, "I6", "", "%v", err)
	}
}

// state is what is known of a call with a key, for the linearizability checker: it is open, done
// with an answer, or nobody knows. anyAnswer is one that nobody has seen yet.
type state string

const (
	open      state = "open"
	nobody    state = "unknown"
	anyAnswer state = "done ?"
)

// linear asks porcupine whether the attempts of a call, some at once, have an order in which each saw
// what one call with five states would have shown it.
func (h *history) linear() bool {
	var ops []porcupine.Operation
	attempts := map[int]int{}
	for _, e := range h.events {
		switch e.Kind {
		case invoked:
			attempts[e.Attempt] = len(ops)
			ops = append(ops, porcupine.Operation{ClientId: e.Attempt, Input: h.tool, Call: e.Time, Output: Event{Outcome: lost}, Return: math.MaxInt64})
		case returned:
			if i, ok := attempts[e.Attempt]; ok && e.Outcome != lost {
				ops[i].Output, ops[i].Return = e, e.Time
			}
		}
	}
	model := porcupine.NondeterministicModel{
		Init: func() []any { return []any{open} },
		Step: func(s, in, out any) []any {
			before, e := s.(state), out.(Event)
			var next []any
			for _, to := range step(before, in.(string), &e) {
				next = append(next, to)
			}
			return next
		},
	}
	result := porcupine.CheckOperationsTimeout(model.ToModel(), ops, 5*time.Second)
	return result != porcupine.Illegal
}

// step returns where a call may stand after an attempt that saw e.
func step(s state, tool string, e *Event) []state {
	answered := state("done " + e.Answer)
	switch e.Outcome {
	case succeeded:
		if s == open || s == anyAnswer || s == answered || s == nobody && recovers(tool) {
			return []state{answered}
		}
		return nil
	case unknown:
		if s == open || s == nobody {
			return []state{nobody}
		}
		return nil
	case lost:
		switch {
		case s == open, s == nobody && recovers(tool):
			return []state{s, anyAnswer, nobody}
		}
		return []state{s}
	}
	return []state{s} // busy, asked, not executed: it stands where it stood
}

// errViolated says that an invariant did not hold.
var errViolated = errors.New("an invariant did not hold")
