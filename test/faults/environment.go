package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
)

// scenarios are faults of the environment, and two nodes.
func scenarios() []task {
	return []task{
		{name: "E1", engine: "postgres", nodes: 1, own: true, long: true, do: databaseGoes},
		{name: "E2", engine: "sqlite", nodes: 1, do: diskFails},
		{name: "E3", engine: "sqlite", nodes: 2, do: upstreamHangs},
		{name: "E7", engine: "sqlite", nodes: 1, do: providerGoes},
		{name: "E8", engine: "sqlite", nodes: 1, do: keysTurn},
		{name: "E9", engine: "postgres", nodes: 1, dsn: "&search_path=public,pg_catalog", long: true, do: clockJumps},
		{name: "E10", nodes: 1, do: callerGoes},
		{name: "E13", engine: "sqlite", nodes: 1, do: childMisbehaves},
		{name: "E14", engine: "sqlite", nodes: 1, long: true, do: networkBreaks},
		{name: "E15", engine: "sqlite", nodes: 1, do: configurationChanges},
		{name: "E16", engine: "sqlite", nodes: 1, do: headCannotBePublished},
		{name: "E17", engine: "postgres", nodes: 2, do: quotaStoreGoes},
		{name: "E18", engine: "sqlite", nodes: 1, long: true, do: programChanges},
		{name: "E18", engine: "postgres", nodes: 2, do: programChanges},
		{name: "E19", engine: "sqlite", nodes: 1, do: everythingAtOnce},
		{name: "E19", engine: "postgres", nodes: 2, own: true, do: everythingAtOnce},
		{name: "lookup", nodes: 1, long: true, do: finderDies},
		{name: "settle", nodes: 1, do: ledgerHolds},
		{name: "mrtr", nodes: 1, do: stateIsUsedAgain},
		{name: "two", engine: "postgres", nodes: 2, long: true, do: holderSleeps},
	}
}

// incident writes down a fault of the environment that counts as a cycle.
func (l *lane) incident(point string) {
	l.journal.add(Event{Kind: faulted, Point: point, Cycle: true})
	l.report(1)
}

// touched writes down that a call ran while something was broken.
func (l *lane) touched(o *operation, point string) {
	o.Broken = time.Now()
	l.journal.add(Event{Kind: faulted, Op: o.ID, Point: point, Tool: o.Tool})
}

// databaseGoes ends the database as a crash would: right after an answer, in the middle of commits,
// and before a call.
func databaseGoes(l *lane) error {
	n := l.nodes[0]
	if err := l.restart(n, false); err != nil {
		return err
	}
	db, err := pgx.Connect(l.host.Context(), l.dsn)
	if err != nil {
		return err
	}
	// The schema is not what this is about: on disk, it cannot be what is missing.
	_, err = db.Exec(l.host.Context(), "CHECKPOINT")
	if err := errors.Join(err, db.Close(l.host.Context())); err != nil {
		return err
	}
	for i := range 6 {
		told := l.operation("plain")
		l.touched(told, "E1")
		for l.try(told, n.addr, way{}).Outcome == notExecuted && time.Since(told.Broken) < l.patience() && !l.over(n.addr) {
			<-time.After(20 * time.Millisecond) // connections that the last crash broke
		}
		var wait func()
		stop := make(chan struct{})
		if i%2 == 1 {
			most := time.Duration(50+l.rand.IntN(100)) * time.Millisecond
			wait = l.crowd(6, "E1", func() string { return n.addr }, stop)
			<-time.After(most)
		}
		l.server.Stop()
		down := time.Now().UnixNano()
		if wait != nil {
			close(stop)
			wait()
		}
		o := l.operation("plain")
		l.touched(o, "E1")
		if e := l.try(o, n.addr, way{}); e.Outcome != notExecuted && e.Outcome != lost {
			l.expect("E1", "I9: without a database a call ended as %s: %s", e.Outcome, e.Detail)
		}
		up := time.Now().UnixNano()
		l.server.Restart(l.host)
		l.journal.add(Event{Kind: outage, Time: down, Until: up})
		l.incident("E1")
		l.settle(told, n.addr)
		l.settle(o, n.addr)
		for _, o := range l.pending { // the process lives: nothing is held by one that is gone
			for !l.settle(o, n.addr) {
				<-time.After(50 * time.Millisecond)
			}
		}
		l.pending = nil
		if l.stuck {
			return nil
		}
	}
	return nil
}

// diskFails has the disk refuse writes, then syncs.
func diskFails(l *lane) error {
	n := l.nodes[0]
	if err := l.restart(n, false); err != nil {
		return err
	}
	for range 5 {
		told := l.operation("plain")
		l.try(told, n.addr, way{})
		l.touched(told, "E2 full")
		if err := n.arm("disk full"); err != nil {
			return err
		}
		full := time.Now().UnixNano()
		o := l.operation("plain")
		l.touched(o, "E2 full")
		if e := l.try(o, n.addr, way{}); e.Outcome != notExecuted || !strings.Contains(e.Detail, "nothing was done") {
			l.expect("E2 full", "I9: with a full disk a call ended as %s: %s", e.Outcome, e.Detail)
		}
		if e := l.try(told, n.addr, way{}); e.Outcome != succeeded || !e.Replayed {
			l.expect("E2 full", "with a full disk an answer is not replayed, but %s: %s", e.Outcome, e.Detail)
		}
		l.journal.add(Event{Kind: outage, Time: full, Until: time.Now().UnixNano()})
		n.disarm()
		l.settle(o, n.addr)
		l.incident("E2 full")

		if err := n.arm("sync"); err != nil {
			return err
		}
		failing := time.Now().UnixNano()
		o = l.operation("plain")
		l.touched(o, "E2 sync")
		if e := l.try(o, n.addr, way{}); e.Outcome == succeeded {
			l.expect("E2 sync", "I9: a call was done that could not be synced")
		}
		if !n.Ended(deathTime) {
			l.expect("E2 sync", "the process goes on after a sync failed")
			n.Kill()
		}
		l.journal.add(Event{Kind: outage, Time: failing, Until: time.Now().UnixNano()})
		if err := l.restart(n, l.rand.IntN(2) == 0); err != nil {
			return err
		}
		l.settle(o, n.addr)
		l.settle(told, n.addr)
		l.incident("E2 sync")
	}
	return nil
}

// shadowClock has the database's clock jump, for everything that asks it by that name.
const shadowClock = `
CREATE TABLE IF NOT EXISTS clock_offset (by interval NOT NULL);
DELETE FROM clock_offset;
INSERT INTO clock_offset VALUES ('0');
CREATE OR REPLACE FUNCTION public.clock_timestamp() RETURNS timestamptz LANGUAGE sql VOLATILE AS
	'SELECT pg_catalog.clock_timestamp() + (SELECT by FROM public.clock_offset)';`

// clockJumps has the database's clock jump while a call is held by a process that is gone.
func clockJumps(l *lane) error {
	n := l.nodes[0]
	db, err := pgx.Connect(l.host.Context(), l.dsn)
	if err != nil {
		return err
	}
	defer db.Close(context.Background())
	if _, err := db.Exec(l.host.Context(), shadowClock); err != nil {
		return err
	}
	if err := l.restart(n, false); err != nil {
		return err
	}
	var kept []*operation
	for _, by := range []string{"5 minutes", "-5 minutes", "12 hours", "-1 day"} {
		told := l.operation("plain")
		l.try(told, n.addr, way{})
		kept = append(kept, told)
		tool := []string{"resend", "plain"}[l.rand.IntN(2)]
		if by[0] == '-' {
			tool = "lookup" // when it was sent is in the future now
		}
		held := l.operation(tool)
		if err := n.arm("K4"); err != nil {
			return err
		}
		l.try(held, n.addr, way{})
		if err := l.gone(n, "K4"); err != nil {
			return err
		}
		if _, err := db.Exec(l.host.Context(), "UPDATE clock_offset SET by = by + $1::text::interval", by); err != nil {
			return err
		}
		if err := l.restart(n, false); err != nil {
			return err
		}
		l.fault(held, "E9")
		for _, o := range kept { // nothing is forgotten too early
			l.try(o, n.addr, way{})
		}
		l.pending = append(l.pending, held)
		l.settleAll(n.addr, true)
		if l.stuck {
			return nil
		}
	}
	return nil
}

// callerGoes has callers go away at any byte of what they send and get, and come back.
func callerGoes(l *lane) error {
	n := l.nodes[0]
	if err := l.restart(n, false); err != nil {
		return err
	}
	for i := range 40 {
		o := l.operation([]string{"plain", "resend", "lookup", "ask"}[i%4])
		o.Args.Delay = l.rand.IntN(30)
		l.touched(o, "E10")
		request := len(o.message(n.addr, o.Key))
		cut := way{send: 1 + l.rand.IntN(request+200), interrupt: func() { <-time.After(time.Duration(l.rand.IntN(20)) * time.Millisecond) }}
		if i%3 == 0 {
			largeAnswer(l, o)
			cut.send, cut.receive = 0, 1+l.rand.IntN(100_000)
		}
		l.try(o, n.addr, cut)
		l.incident("E10")
		if l.settle(o, n.addr); l.stuck {
			return nil
		}
	}
	return nil
}

// headCannotBePublished has the folder of the published head go away.
func headCannotBePublished(l *lane) error {
	n := l.nodes[0]
	if err := l.restart(n, false); err != nil {
		return err
	}
	do := func(want string) {
		o := l.operation("plain")
		l.touched(o, "E16")
		if e := l.try(o, n.addr, way{}); e.Outcome != want {
			l.expect("E16", "a call ended as %s, not as %s: %s", e.Outcome, want, e.Detail)
		}
	}
	do(succeeded)
	heads := filepath.Join(n.dir, "heads")
	if err := errors.Join(os.Rename(heads, heads+".away"), os.WriteFile(heads, nil, 0o600)); err != nil {
		return err
	}
	do(succeeded) // the log itself goes on
	if err := n.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	if !n.Ended(deathTime) {
		return errors.New("it does not end")
	}
	if !strings.Contains(string(n.said()), "could not be published") {
		l.expect("E16", "it does not say that the head could not be published: %s", oneLine(n.said()))
	}
	l.incident("E16")
	if err := n.launch(); err != nil {
		return err
	}
	if !n.Ended(deathTime) {
		l.expect("E16", "I9: it serves without knowing what was published")
		n.Kill()
	}
	l.incident("E16")
	if err := errors.Join(os.Remove(heads), os.Rename(heads+".away", heads)); err != nil {
		return err
	}
	if err := l.restart(n, false); err != nil {
		return err
	}
	do(succeeded)
	return nil
}

// finderDies has a process die that is finding out what became of a call: when it knows and has not
// written it down, and when it is about to do it again.
func finderDies(l *lane) error {
	n := l.nodes[0]
	if err := l.restart(n, false); err != nil {
		return err
	}
	rounds := 4
	if l.lease() > 0 {
		rounds = 1
	}
	for i := range 2 * rounds {
		o := l.operation("lookup")
		first, then := plan{Step: "done", PID: n.PID(), Signal: syscall.SIGKILL}, "K9 before"
		if i%2 == 1 {
			first.Step, then = "request", "K3"
		}
		if err := l.plan(first); err != nil {
			return err
		}
		l.try(o, n.addr, way{})
		if err := l.gone(n, first.Step); err != nil {
			return err
		}
		o.Broken = time.Now()
		if err := l.restart(n, false); err != nil {
			return err
		}
		<-time.After(l.lease())
		if err := n.arm(then); err != nil {
			return err
		}
		for l.try(o, n.addr, way{}).Outcome == unknown && time.Since(o.Broken) < l.patience() {
			<-time.After(10 * time.Millisecond) // it was sent too short a while ago
		}
		if err := l.gone(n, then); err != nil {
			return err
		}
		l.fault(o, "K13")
		if err := l.restart(n, false); err != nil {
			return err
		}
		l.pending = append(l.pending, o)
		l.settleAll(n.addr, true)
	}
	return nil
}

// ledgerHolds has the ledger take calls and do them, or not, when nobody waits any more. What it does
// not find meanwhile may not be sent again before the settle time is over; what it never does has to
// be, then.
func ledgerHolds(l *lane) error {
	const settle, longest = 2 * time.Second, 200 * time.Millisecond
	n := l.nodes[0]
	l.settles = fmt.Sprintf(", settle: %s", settle)
	if err := l.rewrite(n, "resilience: {breaker: {failures: 1000}}\nbackends:\n"+backend("ledger", l.ledgers, fmt.Sprintf(", call_timeout: %s", longest))); err != nil {
		return err
	}
	if err := l.restart(n, false); err != nil {
		return err
	}
	early := 0
	for i := range 6 {
		o := l.operation("lookup")
		l.touched(o, "settle")
		begun := time.Now()
		held := true
		switch {
		case i%3 == 0:
			o.Args.Delay = int(settle.Milliseconds() / 2)
		case i%3 == 1: // it is never done
			held = false
			if err := l.plan(plan{Step: "request"}); err != nil {
				return err
			}
		default: // the process ends that waits for it
			o.Args.Delay = int(settle.Milliseconds() / 2)
			if err := l.plan(plan{Step: "request", PID: n.PID(), Signal: syscall.SIGKILL, Run: true}); err != nil {
				return err
			}
		}
		e := l.try(o, n.addr, way{})
		if i%3 == 2 {
			if err := l.gone(n, "request"); err != nil {
				return err
			}
			if err := l.restart(n, false); err != nil {
				return err
			}
		} else if e.Outcome != unknown {
			l.expect("settle", "a call that nobody answers ended as %s: %s", e.Outcome, e.Detail)
		}
		for e.Outcome != succeeded && time.Since(o.Broken) < l.patience() {
			<-time.After(20 * time.Millisecond)
			e = l.try(o, n.addr, way{})
			if e.Outcome == unknown && e.After > 0 {
				early++
			}
			if e.Outcome == unknown && (e.After <= 0 || e.After > settle.Seconds()) && !strings.Contains(e.Detail, "took longer") {
				l.expect("settle", "too early it says to come again in %v seconds: %s", e.After, e.Detail)
			}
		}
		if e.Outcome != succeeded {
			l.expect("settle", "I7: it did not come to an end: %s %s", e.Outcome, e.Detail)
		}
		if took := time.Since(begun); !held && took < settle {
			l.expect("settle", "I1: a call that may still have been done was sent again after %v", took)
		}
		l.try(o, n.addr, way{})
		l.incident("settle")
	}
	if early == 0 {
		l.expect("settle", "nothing was looked for too early")
	}
	l.measure("settle", "%d lookups found nothing while the ledger might still have done the call; settle time %v", early, settle)
	return nil
}

// stateIsUsedAgain sends answers once more, under another key: they belong to one call.
func stateIsUsedAgain(l *lane) error {
	n := l.nodes[0]
	if err := l.restart(n, false); err != nil {
		return err
	}
	for i := range 6 {
		o := l.operation("ask")
		l.touched(o, "MRTR")
		l.try(o, n.addr, way{})
		if i%2 == 1 { // another process goes on
			n.Kill()
			if err := l.restart(n, false); err != nil {
				return err
			}
		}
		l.settle(o, n.addr)
		for _, key := range []string{"another key of " + o.ID, ""} {
			stolen := *o
			stolen.Key, stolen.Attempts = key, o.Attempts+100
			status, body, err := l.exchange(n.addr, stolen.message(n.addr, key), way{})
			var e Event
			if err == nil {
				understand(&e, status, body, &stolen)
			}
			if err != nil || e.Outcome == succeeded {
				l.expect("MRTR", "I1: a requestState was taken again, with the key %q (%v)", key, err)
			}
		}
		l.incident("MRTR")
	}
	return nil
}

// holderSleeps stops a node in the middle of calls. The other one takes them over; when the first
// one wakes up, what it writes has to be refused.
func holderSleeps(l *lane) error {
	a, b := l.nodes[0], l.nodes[1]
	for _, n := range l.nodes {
		if err := l.restart(n, false); err != nil {
			return err
		}
	}
	for round := range 3 {
		point := []string{"K8", "K4", "K4"}[round]
		if err := a.arm(point + " stop"); err != nil {
			return err
		}
		type attempt struct {
			o    *operation
			back chan Event
		}
		var held []attempt
		tools := []string{"plain", "resend", "lookup", "plain", "resend", "lookup"}
		switch round {
		case 1:
			tools = slices.DeleteFunc(tools, func(tool string) bool { return tool == "lookup" }) // see docs/reliability.md: nobody can stop what is being sent
		case 2:
			tools = []string{"lookup"} // which is stopped just before
		}
		for _, tool := range tools {
			o := l.operation(tool)
			if point == "K8" {
				o.Args.Delay = 500 // all are sent before the first one is answered
			}
			at := attempt{o, make(chan Event, 1)}
			held = append(held, at)
			first := *o
			l.touched(o, "two nodes")
			go func() { at.back <- l.try(&first, a.addr, way{}) }()
			o.Attempts = 100
		}
		if err := a.Until(l.host.Context(), "the point "+point, func() bool { _, err := os.Stat(a.armed()); return errors.Is(err, os.ErrNotExist) }); err != nil {
			return err
		}
		<-time.After(l.lease())
		for _, h := range held {
			for !l.settle(h.o, b.addr) {
				<-time.After(50 * time.Millisecond)
			}
		}
		woken := time.Now().UnixNano()
		if err := a.Signal(syscall.SIGCONT); err != nil {
			return err
		}
		for _, h := range held {
			e := <-h.back
			if e.Outcome == succeeded && !e.Replayed && e.Time >= woken {
				l.expect("two nodes", "fencing: %s was taken over, and its first holder was not refused when it woke up", h.o.ID)
			}
		}
		for _, h := range held { // what was told stays
			l.try(h.o, b.addr, way{})
			l.try(h.o, a.addr, way{})
		}
		l.incident("two nodes")
	}
	return nil
}
