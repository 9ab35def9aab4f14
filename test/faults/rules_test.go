package main

import (
	"slices"
	"testing"

	"newel.dev/newel/internal/audit"
)

// goodTask is a task that was broken, looked at until it ended, and cancelled by nobody.
func goodTask(t *testing.T) *Evidence {
	e := good(t, "T3", "plain")
	e.Events = append(e.Events,
		Event{Time: 12 * ms, Kind: handed, Op: "a", Subject: "t"},
		Event{Time: 35 * ms, Kind: looked, Op: "a", Subject: "t", Status: working},
		Event{Time: 49 * ms, Kind: looked, Op: "a", Subject: "t", Status: "completed"},
		Event{Time: 69 * ms, Kind: looked, Op: "a", Subject: "t", Status: "completed"},
		Event{Time: 75 * ms, Kind: handed, Op: "a", Subject: "t"},
	)
	e.Steps = []Step{{11 * ms, audit.TaskMade, "t", ""}, {46 * ms, audit.TaskEnded, "t", "completed"}}
	return e
}

// goodApproval is a call that was approved and then broken.
func goodApproval(t *testing.T) *Evidence {
	e := good(t, "approved K6", "plain")
	e.Events = append(e.Events,
		Event{Time: 1 * ms, Kind: guarded, Op: "a"},
		Event{Time: 3 * ms, Kind: pending, Op: "a", Subject: "p", Until: 500 * ms},
		Event{Time: 6 * ms, Kind: decided, Op: "a", Subject: "p", Status: approved},
		Event{Time: 7 * ms, Kind: viewed, Op: "a", Subject: "p", Status: approved},
	)
	e.Audit[0].Operation, e.Audit[0].Approval = "o", "p"
	e.Audit[1].Operation, e.Audit[1].Approval = "o", "p"
	e.Steps = []Step{{2 * ms, audit.Approval, "p", "requested"}, {5 * ms, audit.Approval, "p", approved}}
	return e
}

// TestPlantedVariants plants what may not happen to tasks and approvals, one at a time.
func TestPlantedVariants(t *testing.T) {
	at := func(e *Evidence, kind string, n int) *Event {
		t.Helper()
		for i := range e.Events {
			if e.Events[i].Kind == kind {
				if n == 0 {
					return &e.Events[i]
				}
				n--
			}
		}
		t.Fatal("no such event")
		return nil
	}
	again := func(e *Evidence, state string) { // another run of the same call
		e.Audit = append(e.Audit, Intent{Time: 47 * ms, Act: audit.Intent, Op: "a", Operation: "o2", Approval: "p"})
		if state != "" {
			e.Audit = append(e.Audit, Intent{Time: 48 * ms, Act: audit.Outcome, Op: "a", State: state, Operation: "o2", Approval: "p"})
		}
	}
	for _, c := range []struct {
		name  string
		good  func(*testing.T) *Evidence
		plant func(e *Evidence)
		want  []string
	}{
		{"a task", goodTask, func(*Evidence) {}, nil},
		{"a task with two handles", goodTask, func(e *Evidence) {
			at(e, handed, 1).Subject = "u"
			e.Steps = append(e.Steps, Step{11 * ms, audit.TaskMade, "u", ""})
		}, []string{"I4"}},
		{"a task that is gone", goodTask, func(e *Evidence) { at(e, looked, 0).Status = taskGone }, []string{"I2"}},
		{"a task that ended and is gone", goodTask, func(e *Evidence) { at(e, looked, 2).Status = taskGone }, []string{"I2", "I4"}},
		{"a task that ended twice", goodTask, func(e *Evidence) { at(e, looked, 2).Status = working }, []string{"I4"}},
		{"a task whose making is not recorded", goodTask, func(e *Evidence) { e.Steps = e.Steps[1:] }, []string{"I5", "I5"}},
		{"a task that was recorded after its handle", goodTask, func(e *Evidence) { e.Steps[0].Time = 20 * ms }, []string{"I5"}},
		{"a task whose end is not recorded", goodTask, func(e *Evidence) { e.Steps = e.Steps[:1] }, []string{"I5", "I5"}},
		{"a cancelled task that was begun before", goodTask, func(e *Evidence) {
			*at(e, looked, 1) = Event{Time: 36 * ms, Kind: cancelled, Op: "a", Subject: "t"}
			at(e, looked, 1).Status = taskCanceled
		}, nil},
		{"a cancelled task that is begun", goodTask, func(e *Evidence) {
			*at(e, looked, 0) = Event{Time: 13 * ms, Kind: cancelled, Op: "a", Subject: "t"}
			at(e, looked, 0).Status, at(e, looked, 1).Status = taskCanceled, taskCanceled
		}, []string{"I3"}},
		{"a cancelled task that is not", goodTask, func(e *Evidence) {
			*at(e, looked, 1) = Event{Time: 36 * ms, Kind: cancelled, Op: "a", Subject: "t"}
		}, []string{"I4"}},
		{"unknown after a point that is not of the call", goodTask, func(e *Evidence) {
			for _, i := range []int{4, 6} {
				e.Events[i].Outcome, e.Events[i].Answer, e.Events[i].Got = unknown, "", ""
			}
		}, []string{"I8"}},

		{"an approval", goodApproval, func(*Evidence) {}, nil},
		{"an approval of a call that did nothing at first", goodApproval, func(e *Evidence) { again(e, notExecuted) }, nil},
		{"an approval of a call that asked at first", goodApproval, func(e *Evidence) { again(e, taskAsks) }, nil},
		{"an approval of two runs", goodApproval, func(e *Evidence) { again(e, "completed") }, []string{"I1"}},
		{"an approval of two runs, of which one never ended", goodApproval, func(e *Evidence) { again(e, "") }, []string{"I1"}},
		{"nobody approved it", goodApproval, func(e *Evidence) { e.Audit[0].Approval = "" }, []string{"I9"}},
		{"another approval", goodApproval, func(e *Evidence) { e.Audit[0].Approval = "q" }, []string{"I9"}},
		{"approved after it was begun", goodApproval, func(e *Evidence) { e.Steps[1].Time = 18 * ms; at(e, decided, 0).Time = 19 * ms }, []string{"I9"}},
		{"it was denied", goodApproval, func(e *Evidence) { e.Steps[1].Outcome, at(e, decided, 0).Status = denied, denied }, []string{"I9"}},
		{"its time was over", goodApproval, func(e *Evidence) { at(e, pending, 0).Until = 10 * ms }, []string{"I9"}},
		{"a decision is lost", goodApproval, func(e *Evidence) { at(e, viewed, 0).Status = nobodyYet }, []string{"I2"}},
		{"a decision is not recorded", goodApproval, func(e *Evidence) { at(e, decided, 0).Status = denied }, []string{"I5"}},
		{"a decision is recorded too late", goodApproval, func(e *Evidence) { e.Steps[1].Time = 9 * ms }, []string{"I5"}},
		{"two decisions", goodApproval, func(e *Evidence) {
			e.Events = append(e.Events, Event{Time: 8 * ms, Kind: decided, Op: "a", Subject: "p", Status: approved})
		}, []string{"I4"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			e := c.good(t)
			c.plant(e)
			v := check(e)
			var got []string
			for _, w := range v.Violations {
				got = append(got, w.Invariant)
			}
			if !slices.Equal(got, c.want) {
				t.Errorf("found %+v, want %q", v.Violations, c.want)
			}
		})
	}
}
