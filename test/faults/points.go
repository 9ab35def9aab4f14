package main

import (
	"fmt"
	"syscall"
	"time"
)

// A point is one row of the table: how a call is broken there.
type point struct {
	name  string
	what  string
	tools []string // of which one is called; nil: all
	// crash has a call broken: it returns when the process is gone, or an error if it does not go.
	crash func(l *lane, n *node, o *operation) error
}

// deathTime is how long a process may take to reach a point.
const deathTime = 20 * time.Second

// gone waits until the process is gone, or ends it and says that the point was not reached.
func (l *lane) gone(n *node, p string) error {
	if n.Ended(deathTime) {
		if !isGone(n.Err()) {
			return fmt.Errorf("at %s the process ended by itself: %w\n%s", p, n.Err(), n.said())
		}
		return nil
	}
	n.Kill()
	return fmt.Errorf("the point %s was not reached", p)
}

// tryAt tries until a call gets so far that it can be broken: on a slow machine it may be told to come
// again.
func (l *lane) tryAt(o *operation, n *node) {
	for range 50 {
		if e := l.try(o, n.addr, way{}); e.Outcome != busy && e.Outcome != notExecuted {
			return
		}
		<-time.After(20 * time.Millisecond)
	}
}

// inside crashes at a moment that only the process itself can see.
func inside(p string) func(*lane, *node, *operation) error {
	return func(l *lane, n *node, o *operation) error {
		if o.Tool == "ask" && l.rand.IntN(2) == 0 {
			l.try(o, n.addr, way{}) // in the round after the answers
		}
		if err := n.arm(p); err != nil {
			return err
		}
		l.tryAt(o, n)
		return l.gone(n, p)
	}
}

// outside crashes at a moment that the ledger sees.
func outside(step string, prepare func(*lane, *operation)) func(*lane, *node, *operation) error {
	return func(l *lane, n *node, o *operation) error {
		if prepare != nil {
			prepare(l, o)
		}
		if o.Tool == "ask" {
			l.try(o, n.addr, way{})
		}
		p := plan{Step: step, PID: n.PID(), Signal: syscall.SIGKILL, Run: l.rand.IntN(2) == 0}
		if err := l.plan(p); err != nil {
			return err
		}
		l.tryAt(o, n)
		return l.gone(n, step)
	}
}

// byDriver crashes at a moment that the caller sees.
func byDriver(prepare func(*lane, *operation), w func(l *lane, n *node, o *operation) way) func(*lane, *node, *operation) error {
	return func(l *lane, n *node, o *operation) error {
		if prepare != nil {
			prepare(l, o)
		}
		if o.Tool == "ask" {
			l.try(o, n.addr, way{})
		}
		cut := w(l, n, o)
		cut.interrupt = n.Kill
		l.try(o, n.addr, cut)
		n.Kill()
		return nil
	}
}

// large makes requests, or answers, larger than what kernels keep for a connection.
func largeRequest(_ *lane, o *operation) { o.Args.Pad = fmt.Sprintf("%*s", 3<<20, "") }
func largeAnswer(_ *lane, o *operation)  { o.Args.Size = 600 << 10 }

// points are the crash points of one call. K13 and K14 are further below: they are not of a first
// attempt.
func points() []point {
	every := []string{"plain", "resend", "lookup", "ask"}
	return []point{
		{"K0", "request partly read", every, byDriver(nil, func(l *lane, n *node, o *operation) way {
			return way{send: 200 + l.rand.IntN(200)}
		})},
		{"K1", "allowed, nothing written", every, inside("K1")},
		{"K2 before", "in the commit of the intent, before it is synced", every, inside("K2 before")},
		{"K2 after", "in the commit of the intent, after it is synced", every, inside("K2 after")},
		{"K4", "intent durable, before the first byte", every, inside("K4")},
		{"K5", "request partly sent on", every, outside("body", largeRequest)},
		{"K6", "request sent on, no answer", every, outside("request", nil)},
		{"K6 done", "done, no answer", every, outside("done", nil)},
		{"K7", "answer partly read", every, outside("answer", largeAnswer)},
		{"K8", "answer read, nothing of it written", every, inside("K8")},
		{"K9 before", "in the commit of the outcome, before it is synced", every, inside("K9 before")},
		{"K9 after", "in the commit of the outcome, after it is synced", every, inside("K9 after")},
		{"K10", "outcome durable, nothing sent", every, inside("K10")},
		{"K11", "answer half sent", []string{"plain", "resend", "lookup"}, byDriver(largeAnswer, func(l *lane, n *node, o *operation) way {
			return way{receive: 100 + l.rand.IntN(1000)}
		})},
		{"K12", "answered, head of the log not yet published", every, byDriver(nil, func(*lane, *node, *operation) way { return way{} })},
	}
}

// again are the points at which a later attempt crashes, while it is found out what became of the
// first one.
var again = []string{"K3", "K13", "K4", "K8", "K9 before", "K10"}

// crashAgain breaks a call that is being recovered. It reports whether it crashed: not every call
// comes by every point.
func (l *lane) crashAgain(n *node, o *operation, p string) (bool, error) {
	if err := n.arm(p); err != nil {
		return false, err
	}
	l.try(o, n.addr, way{})
	if n.disarm() { // it did not come by
		return false, nil
	}
	return true, l.gone(n, p)
}
