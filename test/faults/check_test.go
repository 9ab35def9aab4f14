package main

import (
	"slices"
	"testing"

	"golang.org/x/mod/sumdb/tlog"

	"newel.dev/newel/internal/audit"
)

const ms = int64(1_000_000)

// good is a call that was broken, tried again and answered twice.
func good(t *testing.T, point, tool string) *Evidence {
	e := &Evidence{
		Ledger: []Row{{Time: 20 * ms, Op: "a", Nonce: "n", Tool: tool}},
		Events: []Event{
			{Time: 10 * ms, Kind: invoked, Op: "a", Tool: tool, Nonce: "n", Attempt: 1},
			{Time: 30 * ms, Kind: returned, Op: "a", Tool: tool, Nonce: "n", Attempt: 1, Outcome: lost},
			{Time: 31 * ms, Kind: faulted, Op: "a", Point: point, Cycle: true},
			{Time: 40 * ms, Kind: invoked, Op: "a", Tool: tool, Nonce: "n", Attempt: 2},
			{Time: 50 * ms, Kind: returned, Op: "a", Tool: tool, Nonce: "n", Got: "n", Attempt: 2, Outcome: succeeded, Answer: "x"},
			{Time: 60 * ms, Kind: invoked, Op: "a", Tool: tool, Nonce: "n", Attempt: 3},
			{Time: 70 * ms, Kind: returned, Op: "a", Tool: tool, Nonce: "n", Got: "n", Attempt: 3, Outcome: succeeded, Answer: "x", Replayed: true},
		},
		Audit: []Intent{{Time: 15 * ms, Act: audit.Intent, Op: "a"}, {Time: 45 * ms, Act: audit.Outcome, Op: "a", State: "completed"}},
	}
	var edge audit.Edge
	for range 3 {
		rec := audit.Record{Act: audit.Started, Time: "2026-11-21T00:00:00.000000Z"}
		b, err := rec.Encode()
		if err != nil {
			t.Fatal(err)
		}
		row := edge.Append(audit.Entry{Record: b})
		if e.Log, err = audit.AppendLine(e.Log, &audit.Line{Index: row.Index, Record: row.Record}); err != nil {
			t.Fatal(err)
		}
		e.Checkpoints = append(e.Checkpoints, edge.Tree())
	}
	return e
}

// TestPlanted plants one violation at a time: the checker names it, and without one it is content.
func TestPlanted(t *testing.T) {
	// unknowns replaces what the last two attempts saw.
	unknowns := func(e *Evidence) {
		for _, i := range []int{4, 6} {
			e.Events[i].Outcome, e.Events[i].Answer, e.Events[i].Got = unknown, "", ""
		}
	}
	for _, c := range []struct {
		name, point, tool string
		plant             func(e *Evidence)
		want              []string // invariants
	}{
		{"nothing", "K10", "plain", func(*Evidence) {}, nil},
		{"unknown where it may be", "K6", "plain", unknowns, nil},
		{"unknown, then known by a recovery", "K6", "lookup", func(e *Evidence) { e.Events[4].Outcome, e.Events[4].Answer = unknown, "" }, nil},
		{"an attempt of another node that ends late", "two nodes", "resend", func(e *Evidence) {
			e.Events = append(e.Events, Event{Time: 80 * ms, Kind: returned, Op: "a", Attempt: 1, Outcome: unknown})
			e.Events = slices.Delete(e.Events, 1, 2)
		}, nil},
		{"done late, after an attempt that nobody knows of, while another is told no", "E19", "resend", func(e *Evidence) {
			e.Events = append([]Event{
				{Time: 1 * ms, Kind: invoked, Op: "a", Attempt: 9, Tool: "resend", Nonce: "n"},
				{Time: 5 * ms, Kind: returned, Op: "a", Attempt: 9, Tool: "resend", Outcome: unknown},
			}, e.Events...)
			e.Audit[0].Time = 1 * ms
			e.Events[3].Outcome = notExecuted
		}, nil},
		{"duplicate", "K6", "plain", func(e *Evidence) { e.Ledger = append(e.Ledger, Row{Time: 45 * ms, Op: "a"}) }, []string{"I1"}},
		{"lost", "K6", "plain", func(e *Evidence) { e.Ledger = nil }, []string{"I2", "I2"}},
		{"false failure", "K6", "plain", func(e *Evidence) { e.Events[1].Outcome = notExecuted }, []string{"I3"}},
		{"two answers", "K6", "plain", func(e *Evidence) { e.Events[6].Answer = "y" }, []string{"I4", "I4"}},
		{"known, then not", "K6", "plain", func(e *Evidence) { e.Events[6].Outcome = unknown }, []string{"I4", "I4"}},
		{"not known, then known", "K6", "plain", func(e *Evidence) { e.Events[4].Outcome, e.Events[4].Answer = unknown, "" }, []string{"I4", "I4"}},
		{"no intent", "K6", "plain", func(e *Evidence) { e.Audit = e.Audit[1:] }, []string{"I5"}},
		{"intent too late", "K6", "plain", func(e *Evidence) { e.Audit[0].Time = 25 * ms }, []string{"I5"}},
		{"no outcome", "K6", "plain", func(e *Evidence) { e.Audit = e.Audit[:1] }, []string{"I5"}},
		{"log cut off", "K6", "plain", func(e *Evidence) { e.Log = e.Log[:len(e.Log)/2] }, []string{"I6"}},
		{"another log", "K6", "plain", func(e *Evidence) { e.Checkpoints[1].Hash = tlog.Hash{} }, []string{"I6"}},
		{"stuck", "K6", "plain", func(e *Evidence) { e.Events = append(e.Events, Event{Kind: gaveUp, Op: "a"}) }, []string{"I7"}},
		{"refused", "K6", "plain", func(e *Evidence) { e.Events[1].Outcome = refused }, []string{"I7"}},
		{"unknown where it cannot be", "K10", "plain", unknowns, []string{"I8"}},
		{"unknown with a recovery", "K6", "resend", unknowns, []string{"I8"}},
		{"fail open", "E1", "plain", func(e *Evidence) {
			e.Events = append(e.Events, Event{Time: 5 * ms, Until: 25 * ms, Kind: outage})
		}, []string{"I9"}},
		{"cross-talk", "K6", "plain", func(e *Evidence) { e.Events[4].Got = "m" }, []string{"I10"}},
		{"an expectation", "E2", "plain", func(e *Evidence) { e.Events = append(e.Events, Event{Kind: expected, Point: "E2", Detail: "no"}) }, []string{""}},
	} {
		t.Run(c.name, func(t *testing.T) {
			e := good(t, c.point, c.tool)
			c.plant(e)
			v := check(e)
			var got []string
			for _, w := range v.Violations {
				got = append(got, w.Invariant)
			}
			if !slices.Equal(got, c.want) {
				t.Errorf("found %+v, want %q", v.Violations, c.want)
			}
			if l := v.Lines[c.point]; l == nil || l.Cycles != 1 || len(e.Ledger) == 1 && l.One != 1 {
				t.Errorf("the line of %s is %+v", c.point, l)
			}
		})
	}
}

// TestCountsUnknown counts calls, not attempts.
func TestCountsUnknown(t *testing.T) {
	e := good(t, "K6", "plain")
	for _, i := range []int{4, 6} {
		e.Events[i].Outcome = unknown
	}
	if v := check(e); v.Unknown != 1 || v.Lines["K6"].Unknown != 1 || v.Calls != 1 {
		t.Errorf("%+v", v)
	}
}

// TestMutantsApply is that every mistake can still be made in the sources as they are.
func TestMutantsApply(t *testing.T) {
	t.Chdir("../..")
	for _, m := range mutants() {
		if _, err := m.overlay(t.TempDir()); err != nil {
			t.Errorf("%s: %v", m.name, err)
		}
	}
}
