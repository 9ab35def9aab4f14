package main

import (
	"fmt"
	"time"
)

// cycles crashes the lane's node so many times, at every point in turn beginning with one, and settles
// every call.
func (l *lane) cycles(first, count int) error {
	n := l.nodes[0]
	if err := l.restart(n, false); err != nil {
		return err
	}
	all := points()
	for i := 0; i < count && !l.stuck; {
		done, err := l.recoverSome(n, count-i)
		if err != nil {
			return err
		}
		if i += done; i >= count {
			break
		}
		p := all[(first+i)%len(all)]
		o := l.operation(p.tools[l.rand.IntN(len(p.tools))])
		if err := p.crash(l, n, o); err != nil {
			return fmt.Errorf("%s, %s: %w", p.name, p.what, err)
		}
		l.fault(o, p.name)
		l.pending = append(l.pending, o)
		i++
		if err := l.restart(n, l.engine == "sqlite" && l.rand.IntN(2) == 0); err != nil {
			return err
		}
		if i%25 == 0 && i < count {
			if err := l.crowded(n); err != nil {
				return err
			}
			i++
		}
	}
	l.settleAll(n.addr, true)
	for _, o := range l.finished[max(0, len(l.finished)-50):] { // what was told stays
		if o.Ended {
			l.try(o, n.addr, way{})
		}
	}
	return nil
}

// recoverSome settles calls that were broken before, of which some are broken again meanwhile: up
// to ten times each. It returns how often.
func (l *lane) recoverSome(n *node, most int) (done int, err error) {
	var rest []*operation
	for _, o := range l.pending {
		crash := l.rand.IntN(4) == 0 && done < most && o.Recoveries < 10 && time.Since(o.Broken) >= l.lease()
		if !crash {
			rest = append(rest, o)
			continue
		}
		p := again[l.rand.IntN(len(again))]
		if p == "K3" && o.Tool != "lookup" {
			p = "K13"
		}
		o.Recoveries++
		crashed, err := l.crashAgain(n, o, p)
		if err != nil {
			return done, err
		}
		rest = append(rest, o)
		if !crashed {
			continue
		}
		if p != "K3" {
			p = "K13"
		}
		l.fault(o, p)
		done++
		if err := l.restart(n, l.engine == "sqlite" && l.rand.IntN(2) == 0); err != nil {
			return done, err
		}
	}
	l.pending = rest
	l.settleAll(n.addr, false)
	return done, nil
}

// crowded kills the node at any time while many clients call.
func (l *lane) crowded(n *node) error {
	stop := make(chan struct{})
	most := time.Duration(20+l.rand.IntN(150)) * time.Millisecond
	wait := l.crowd(8, "crowd", func() string { return n.addr }, stop)
	<-time.After(most)
	n.Kill()
	close(stop)
	wait()
	l.journal.add(Event{Kind: faulted, Point: "crowd", Cycle: true})
	l.report(1)
	return l.restart(n, l.engine == "sqlite" && l.rand.IntN(2) == 0)
}

// upkeep crashes a node while it keeps its state in order: while it makes the schema, forgets
// answers and publishes the head of its log.
func (l *lane) upkeep(count int) error {
	n := l.nodes[0]
	for i := range count {
		p := "K14 head"
		switch {
		case i == 0:
			p = "K14 schema" // it is made once
		case i%2 == 1:
			p = "K14 prune" // a node does it first of all
		}
		if i > 0 {
			if err := l.restart(n, false); err != nil {
				return err
			}
			for range 3 {
				o := l.operation("plain")
				o.Broken = time.Now()
				for l.try(o, n.addr, way{}).Outcome == notExecuted && time.Since(o.Broken) < l.patience() {
					<-time.After(5 * time.Millisecond)
				}
			}
			<-time.After(60 * time.Millisecond) // retention is shorter
			n.Kill()
			if err := n.forget(); err != nil {
				return err
			}
		}
		if err := n.arm(p); err != nil {
			return err
		}
		if err := n.launch(); err != nil {
			return err
		}
		if err := l.gone(n, p); err != nil {
			return err
		}
		l.journal.add(Event{Kind: faulted, Point: p, Cycle: true})
		l.report(1)
		if l.engine == "sqlite" && l.rand.IntN(2) == 0 {
			if err := n.powerFails(); err != nil {
				return err
			}
		}
	}
	return l.restart(n, false)
}
