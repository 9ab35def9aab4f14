package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"newel.dev/newel/internal/assembly"
	"newel.dev/newel/internal/door/approvals"
	"newel.dev/newel/internal/secret"
)

// A petition is a call that a person has to approve.
type petition struct {
	*operation
	approval string // that it waits for
	expires  time.Time
	decided  string // approval that somebody said yes to, or was about to
}

// petition makes a new call.
func (l *lane) petition(tool string, keyed bool) *petition {
	p := &petition{operation: l.operation(tool)}
	if !keyed {
		p.Key = ""
	}
	l.journal.add(Event{Kind: guarded, Op: p.ID, Tool: tool})
	return p
}

// propose makes the call once.
func (l *lane) propose(p *petition, addr string) Event {
	p.Attempts++
	e := Event{Kind: invoked, Op: p.ID, Tool: p.Tool, Nonce: p.Nonce, Attempt: p.Attempts}
	l.journal.add(e)
	e.Kind = returned
	status, body, err := l.exchange(addr, p.message(addr, p.Key), way{})
	if err != nil {
		e.Outcome, e.Detail = lost, err.Error()
	} else if understand(&e, status, body, p.operation); e.Outcome == refused {
		l.refusal(&e, p, body)
	}
	l.journal.add(e)
	return e
}

// refusal says what a refusal means for a call that a person has to approve.
func (l *lane) refusal(e *Event, p *petition, body []byte) {
	var said struct {
		Error struct {
			Data struct {
				Approval struct {
					ID      string    `json:"id"`
					State   string    `json:"state"`
					Expires time.Time `json:"expires"`
				} `json:"approval"`
			} `json:"data"`
		} `json:"error"`
	}
	if json.Unmarshal(body, &said) != nil {
		return
	}
	switch a := &said.Error.Data.Approval; a.State {
	case nobodyYet:
		e.Outcome, p.approval, p.expires = waits, a.ID, a.Expires.Add(time.Second) // it is told in whole seconds
		l.journal.add(Event{Kind: pending, Op: p.ID, Subject: a.ID, Until: p.expires.UnixNano()})
	case denied, "expired":
		e.Outcome = denied
	}
}

// asOperator sends a request of who has the key file. Its status is 0 if no answer came.
func (l *lane) asOperator(addr, method, uri string, body []byte, into any) (int, error) {
	key, err := secret.OpenKey(filepath.Join(l.dir, "key"))
	if err != nil {
		return 0, err
	}
	derived, err := key.Derive(assembly.OperatorKey)
	if err != nil {
		return 0, err
	}
	proof := approvals.Proof(derived, "grace", method, uri, body, time.Now())
	message := fmt.Appendf(nil, "%s %s HTTP/1.1\r\nHost: %s\r\nConnection: close\r\nAuthorization: %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", method, uri, addr, proof, len(body), body)
	status, answer, err := l.exchange(addr, message, way{})
	if err != nil {
		return 0, nil // the process is gone: that is what this is about
	}
	if status == http.StatusOK && into != nil {
		return status, json.Unmarshal(answer, into)
	}
	return status, nil
}

// decide says yes or no to what the call waits for, over HTTP or as people type it, and reports the
// status: 0 if nothing was heard, 409 if it was decided before.
func (l *lane) decide(p *petition, n *node, yes bool) (status int, err error) {
	verb, outcome := "deny", denied
	if yes {
		verb, outcome, p.decided = "approve", approved, p.approval
	}
	if l.rand.IntN(4) == 0 {
		cmd := exec.Command(n.binary, "approvals", verb, p.approval, "-c", filepath.Join(n.dir, "newel.yaml"))
		cmd.Env = append(os.Environ(), "NEWEL_FAULTS_DSN="+n.dsn)
		said, failed := cmd.CombinedOutput()
		var exit *exec.ExitError
		switch {
		case failed == nil:
			status = http.StatusOK
		case !errors.As(failed, &exit):
			return 0, failed
		case exit.ExitCode() == 1:
			status = http.StatusConflict
			l.journal.add(Event{Kind: "said", Op: p.ID, Detail: oneLine(said)})
		}
	} else if status, err = l.asOperator(n.addr, http.MethodPost, "/approvals/"+p.approval, fmt.Appendf(nil, `{"decision":%q}`, verb), nil); err != nil {
		return 0, err
	}
	if status == http.StatusOK {
		l.journal.add(Event{Kind: decided, Op: p.ID, Subject: p.approval, Status: outcome})
	}
	return status, nil
}

// view asks how the approval stands.
func (l *lane) view(p *petition, n *node) (state string, err error) {
	var a struct {
		State string `json:"state"`
	}
	status, err := l.asOperator(n.addr, http.MethodGet, "/approvals/"+p.approval, nil, &a)
	if err != nil || status != http.StatusOK {
		return "", errors.Join(fmt.Errorf("the approval %s cannot be looked at: %d", p.approval, status), err)
	}
	l.journal.add(Event{Kind: viewed, Op: p.ID, Subject: p.approval, Status: a.State})
	return a.State, nil
}

// conclude sees a petition through: it is approved once, and called until it has ended. A call without
// a key has ended when it needs another approval.
func (l *lane) conclude(p *petition, n *node) error {
	deadline, unknowns := time.Now().Add(l.patience()), 0
	for pause := 2 * time.Millisecond; ; pause = min(2*pause, 300*time.Millisecond) {
		e := l.propose(p, n.addr)
		switch e.Outcome {
		case succeeded:
			if e := l.propose(p, n.addr); p.Key == "" && e.Outcome != waits && e.Outcome != asked && e.Outcome != busy {
				l.expect("approvals", "I1: the same call again is %s, and does not wait for another approval: %s", e.Outcome, e.Detail)
			}
			return nil
		case denied:
			return nil
		case waits:
			if p.decided != "" && p.decided != p.approval {
				if p.Key != "" {
					l.expect("approvals", "%s: what was approved was not done, and another approval is wanted", p.ID)
				}
				return nil
			}
			status, err := l.decide(p, n, true)
			if err != nil {
				return err
			}
			if status != http.StatusOK {
				l.expect("approvals", "%s cannot be approved: %d", p.approval, status)
				return nil
			}
			pause = time.Millisecond
		case unknown:
			if unknowns++; !recovers(p.Tool) && unknowns > 1 || unknowns > 10 {
				return nil
			}
		case refused:
			return nil
		case asked:
			pause = time.Millisecond
		}
		if time.Now().After(deadline) || e.Outcome == lost && l.over(n.addr) {
			l.journal.add(Event{Kind: gaveUp, Op: p.ID, Tool: p.Tool, Detail: e.Outcome + " " + e.Detail})
			return nil
		}
		<-time.After(pause)
	}
}

// approvedFirst has the call approved.
func (l *lane) approvedFirst(p *petition, n *node, yes bool) error {
	if e := l.propose(p, n.addr); e.Outcome != waits {
		l.expect("approvals", "I9: a call that has to be approved is %s: %s", e.Outcome, e.Detail)
		return nil
	}
	status, err := l.decide(p, n, yes)
	if err == nil && status != http.StatusOK {
		err = fmt.Errorf("the decision about %s is answered with %d", p.approval, status)
	}
	return err
}

// An approvalPoint is how a call is broken that a person has to approve.
type approvalPoint struct {
	name  string
	crash func(l *lane, n *node, p *petition) error
	after string // how the approval stands then; "": whatever
}

// whileRun crashes a call that is approved.
func whileRun(point string, arm func(l *lane, n *node) error) approvalPoint {
	return approvalPoint{"approved " + point, func(l *lane, n *node, p *petition) error {
		if err := errors.Join(l.approvedFirst(p, n, true), arm(l, n)); err != nil {
			return err
		}
		l.propose(p, n.addr)
		return l.gone(n, point)
	}, ""}
}

func approvalPoints() []approvalPoint {
	all := []approvalPoint{}
	for _, point := range []string{"A1 before", "A1 after"} {
		all = append(all, approvalPoint{point, func(l *lane, n *node, p *petition) error {
			if err := n.arm(point); err != nil {
				return err
			}
			l.propose(p, n.addr)
			return l.gone(n, point)
		}, ""})
	}
	for _, point := range []string{"A2 before", "A2 after"} {
		after := nobodyYet
		if point == "A2 after" {
			after = approved
		}
		all = append(all, approvalPoint{point, func(l *lane, n *node, p *petition) error {
			l.propose(p, n.addr)
			if err := n.arm(point); err != nil {
				return err
			}
			if _, err := l.decide(p, n, true); err != nil {
				return err
			}
			return l.gone(n, point)
		}, after})
	}
	for _, after := range []string{approved, denied} {
		point := "A4 approved"
		if after == denied {
			point = "A5 denied"
		}
		all = append(all, approvalPoint{point, func(l *lane, n *node, p *petition) error {
			if err := l.approvedFirst(p, n, after == approved); err != nil {
				return err
			}
			n.Kill()
			return nil
		}, after})
	}
	for _, point := range []string{"K1", "K2 before", "K2 after", "K4", "K8", "K9 before", "K9 after", "K10"} {
		all = append(all, whileRun(point, func(_ *lane, n *node) error { return n.arm(point) }))
	}
	for _, step := range []string{"request", "done"} {
		point := "K6"
		if step == "done" {
			point = "K6 done"
		}
		all = append(all, whileRun(point, func(l *lane, n *node) error {
			return l.plan(plan{Step: step, PID: n.PID(), Signal: syscall.SIGKILL, Run: l.rand.IntN(2) == 0})
		}))
	}
	return all
}

const approvalSection = `policy:
  rules:
    - {name: people decide, then: require_approval, tools: [plain, resend, lookup, ask], expires: %s}
    - {name: the rest, then: allow}
`

// approvalsCrash breaks calls that people approve at every moment, twice: with a key and without one.
func approvalsCrash(l *lane) error {
	n := l.nodes[0]
	if err := errors.Join(l.configure(fmt.Sprintf(approvalSection+taskSection, "1h", 1)), l.restart(n, false)); err != nil {
		return err
	}
	var broken []*petition
	tools := []string{"plain", "resend", "lookup", "ask"}
	for round := range 2 {
		for _, point := range approvalPoints() {
			most := len(tools)
			if asACall(point.name) != point.name {
				most-- // what asks is broken in other ways, see answersComeAgain
			}
			p := l.petition(tools[l.rand.IntN(most)], round == 0)
			if err := point.crash(l, n, p); err != nil {
				return fmt.Errorf("%s: %w", point.name, err)
			}
			l.fault(p.operation, point.name)
			if err := l.restart(n, l.engine == "sqlite" && l.rand.IntN(2) == 0); err != nil {
				return err
			}
			if point.after != "" {
				if err := l.stands(p, n, point); err != nil {
					return err
				}
			}
			if broken = append(broken, p); l.lease() == 0 || p.Key == "" {
				broken = broken[:len(broken)-1]
				if err := l.conclude(p, n); err != nil {
					return err
				}
			}
		}
	}
	for _, p := range broken {
		if err := l.conclude(p, n); err != nil {
			return err
		}
	}
	return l.approvedTasks(n)
}

// approvedTasks breaks tasks of calls that were approved: their run uses the approval up.
func (l *lane) approvedTasks(n *node) error {
	for i, point := range []string{"T1 before", "T1 after", "T2 after", "K4", "K8", "T3"} {
		p := l.petition(effects[l.rand.IntN(len(effects))], i < 2 || i%2 == 0)
		e := &errand{operation: p.operation, petition: p}
		if ev := l.begin(e, n.addr); ev.Outcome != waits {
			l.expect("approvals", "I9: a task that has to be approved is %s: %s", ev.Outcome, ev.Detail)
			continue
		}
		if status, err := l.decide(p, n, true); err != nil || status != http.StatusOK {
			return errors.Join(fmt.Errorf("the decision about %s is answered with %d", p.approval, status), err)
		}
		if err := armed(point)(l, n, e); err != nil {
			return err
		}
		l.fault(p.operation, "approved task "+point)
		if err := l.restart(n, l.engine == "sqlite" && l.rand.IntN(2) == 0); err != nil {
			return err
		}
		if e.handle == "" && e.Key == "" {
			continue
		}
		l.finish(e, n.addr)
	}
	return nil
}

// stands looks at an approval after a crash. What is decided cannot be decided again.
func (l *lane) stands(p *petition, n *node, point approvalPoint) error {
	state, err := l.view(p, n)
	if err != nil {
		return err
	}
	if state != point.after {
		l.expect(point.name, "I2: an approval is %s, and not %s", state, point.after)
	}
	if state == nobodyYet {
		return nil
	}
	status, err := l.decide(p, n, point.after == denied)
	if err == nil && status != http.StatusConflict {
		l.expect(point.name, "I4: an approval that is %s is decided again: %d", state, status)
	}
	return err
}

// approvalsRunOut has approvals run out while the process is gone, and while it ends them.
func approvalsRunOut(l *lane) error {
	n := l.nodes[0]
	if err := errors.Join(l.configure(fmt.Sprintf(approvalSection, "1s")), l.restart(n, false)); err != nil {
		return err
	}
	for i, point := range []string{"A3 approved", "A3 pending", "A3 before", "A3 after"} {
		p := l.petition("plain", i%2 == 0)
		if e := l.propose(p, n.addr); e.Outcome != waits {
			l.expect(point, "I9: a call that has to be approved is %s: %s", e.Outcome, e.Detail)
			continue
		}
		if point != "A3 pending" {
			if _, err := l.decide(p, n, true); err != nil { // on a slow machine it may be too late
				return err
			}
		}
		if i < 2 {
			n.Kill()
		}
		<-time.After(time.Until(p.expires) + 50*time.Millisecond)
		if i >= 2 {
			if err := n.arm(point); err != nil {
				return err
			}
			l.propose(p, n.addr)
			if err := l.gone(n, point); err != nil {
				return err
			}
		}
		l.fault(p.operation, point)
		if err := l.restart(n, l.engine == "sqlite" && l.rand.IntN(2) == 0); err != nil {
			return err
		}
		if status, err := l.decide(p, n, true); err != nil {
			return err
		} else if status != http.StatusConflict {
			l.expect(point, "I9: an approval whose time was over is decided: %d", status)
		}
		if e := l.propose(p, n.addr); e.Outcome != denied && e.Outcome != waits {
			l.expect(point, "I9: a call whose approval ran out is %s: %s", e.Outcome, e.Detail)
		}
		if e := l.propose(p, n.addr); e.Outcome != waits {
			l.expect(point, "a call whose approval ran out asks anew, and is %s: %s", e.Outcome, e.Detail)
		}
	}
	return nil
}
