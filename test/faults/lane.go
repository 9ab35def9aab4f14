package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/mod/sumdb/tlog"

	"newel.dev/newel/internal/audit"
	"newel.dev/newel/internal/guard/effect"
	"newel.dev/newel/internal/secret"
	"newel.dev/newel/internal/store/postgres"
	"newel.dev/newel/internal/store/sqlite"
	"newel.dev/newel/test/engines"
	"newel.dev/newel/test/program"
)

// A lane is one ledger with one state behind it, and the node or nodes in between.
type lane struct {
	options *options
	engine  string
	dir     string
	rand    *rand.Rand
	journal *journal
	nodes   []*node
	ledger  *program.Process
	ledgers string             // address
	others  []*program.Process // that scenarios started
	host    *host
	server  *engines.Server
	dsn     string
	longest string           // call, in configurations of scenarios; "": 20s
	settles string           // what configurations of scenarios say of how long the ledger may hold a call
	token   string           // that operations are called with, or ""
	report  func(cycles int) // progress

	count    int
	stuck    bool // a call did not come to an end: what follows says nothing more
	pending  []*operation
	finished []*operation
	later    []*errand   // that were broken
	seen     []tlog.Tree // checkpoints
}

// lease is how long a call is held by a process that was killed: on SQLite the next one to have
// the file knows, on PostgreSQL nobody has heard of it for 15 seconds.
func (l *lane) lease() time.Duration {
	if l.engine == "postgres" {
		return 16 * time.Second
	}
	return 0
}

// patience is how long a call may take to its end after the last fault.
func (l *lane) patience() time.Duration { return l.lease() + 30*time.Second }

// newLane starts a ledger and writes the configuration of nodes.
func newLane(o *options, h *host, engine, name string, nodes int, server *engines.Server, dsn, extra string) (*lane, error) {
	l := &lane{options: o, engine: engine, dir: filepath.Join(o.dir, name), rand: rand.New(rand.NewPCG(o.seed, hash(name))), host: h, server: server, dsn: dsn, settles: ", settle: 50ms", report: func(int) {}}
	if extra != "" {
		l.settles = "" // its retention is shorter
	}
	if err := os.MkdirAll(l.dir, 0o700); err != nil {
		return nil, err
	}
	file, err := os.OpenFile(filepath.Join(l.dir, "driver.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	l.journal = &journal{file: file}
	if l.ledgers, err = program.FreeAddress(); err != nil {
		return nil, err
	}
	if l.ledger, err = part("ledger", l.ledgers, l.ledgerFile()); err != nil {
		return nil, err
	}
	if err := l.ledger.Until(l.host.Context(), "the ledger", func() bool { return l.plan(plan{}) == nil }); err != nil {
		return nil, err
	}
	for i := range nodes {
		n, err := newNode(o.binary, filepath.Join(l.dir, fmt.Sprintf("node%d", i+1)), l.ledgers, l.state(), extra, l.settles)
		if err != nil {
			return nil, err
		}
		n.dsn = dsn
		l.nodes = append(l.nodes, n)
	}
	return l, nil
}

// state is that section of the configuration.
func (l *lane) state() string {
	if l.engine == "postgres" {
		return fmt.Sprintf("{engine: postgres, dsn: %q, key_file: ../key, checkpoint: heads/checkpoint}", "${env:NEWEL_FAULTS_DSN}")
	}
	return "{engine: sqlite, path: state.db, key_file: ../key, checkpoint: heads/checkpoint}"
}

func hash(s string) uint64 {
	h := uint64(14695981039346656037)
	for _, c := range []byte(s) {
		h = (h ^ uint64(c)) * 1099511628211
	}
	return h
}

func (l *lane) ledgerFile() string { return filepath.Join(l.dir, "ledger.log") }

// close ends everything of the lane.
func (l *lane) close() {
	for _, n := range l.nodes {
		if n.Process != nil {
			n.Kill()
		}
		_ = n.log.Close()
	}
	l.ledger.Kill()
	for _, p := range l.others {
		p.Kill()
	}
	_ = l.journal.file.Close()
}

// plan tells the ledger what to do in the next call.
func (l *lane) plan(p plan) error {
	b, err := json.Marshal(p)
	if err != nil {
		return err
	}
	resp, err := client.Post("http://"+l.ledgers+"/plan", "application/json", bytes.NewReader(b))
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("the ledger says %s", resp.Status)
	}
	return resp.Body.Close()
}

// operation makes a new call.
func (l *lane) operation(tool string) *operation {
	l.count++
	id := fmt.Sprintf("%s-%d-%x", filepath.Base(l.dir), l.count, l.rand.Uint32())
	o := &operation{ID: id, Token: l.token, Key: "key of " + id, Tool: tool, Nonce: fmt.Sprintf("%x", l.rand.Uint64())}
	o.Args = arguments{Op: id, Nonce: o.Nonce}
	return o
}

// fault writes down that a call was broken.
func (l *lane) fault(o *operation, point string) {
	o.Broken = time.Now()
	l.journal.add(Event{Kind: faulted, Op: o.ID, Point: point, Tool: o.Tool, Cycle: true})
	l.report(1)
}

// expect writes down that something else happened than what should have.
func (l *lane) expect(point, format string, args ...any) {
	l.journal.add(Event{Kind: expected, Point: point, Detail: fmt.Sprintf(format, args...)})
}

// breakerTime is longer than a breaker that opened in a fault stays open: until then nothing can be
// looked up.
const breakerTime = 10 * time.Second

// settle tries a call until it has ended, then once more: the answer stays. It reports false if the
// call is still held by a process that was killed.
func (l *lane) settle(o *operation, addr string) bool {
	deadline := o.Broken.Add(l.patience())
	unknowns := 0
	for pause := 2 * time.Millisecond; ; pause = min(2*pause, 500*time.Millisecond) {
		e := l.try(o, addr, way{})
		switch e.Outcome {
		case succeeded:
			l.try(o, addr, way{})
			o.Ended = true
			return true
		case unknown:
			if unknowns++; !recovers(o.Tool) && unknowns > 1 || unknowns > 10 && time.Since(o.Broken) > breakerTime {
				o.Ended = true
				return true
			}
		case refused:
			o.Ended = true
			return true
		case asked:
			pause = time.Millisecond
		}
		if time.Now().After(deadline) || e.Outcome == lost && l.over(addr) {
			l.journal.add(Event{Kind: gaveUp, Op: o.ID, Tool: o.Tool, Detail: e.Outcome + " " + e.Detail})
			o.Ended, l.stuck = true, true
			return true
		}
		if e.Outcome == busy && time.Since(o.Broken) < l.lease() {
			return false
		}
		<-time.After(pause)
	}
}

// over reports whether the process at an address has ended by itself: nobody will answer any more.
func (l *lane) over(addr string) bool {
	for _, n := range l.nodes {
		if n.addr == addr && n.Process != nil && n.Ended(0) {
			return true
		}
	}
	return false
}

// settleAll settles what is not held any more; with all it waits for the rest.
func (l *lane) settleAll(addr string, all bool) {
	var rest []*operation
	for _, o := range l.pending {
		if !all && time.Since(o.Broken) < l.lease() {
			rest = append(rest, o)
			continue
		}
		if wait := l.lease() - time.Since(o.Broken); wait > 0 {
			<-time.After(wait)
		}
		for !l.settle(o, addr) {
			if !all {
				rest = append(rest, o)
				break
			}
			<-time.After(50 * time.Millisecond)
		}
		if o.Ended {
			l.finished = append(l.finished, o)
		}
	}
	l.pending = rest
}

// restart brings a node back after it was killed. power says that what was not synced is lost.
func (l *lane) restart(n *node, power bool) error {
	n.disarm()
	if l.engine == "sqlite" {
		clean := n.forget
		if power {
			clean = n.powerFails
		}
		if err := clean(); err != nil {
			return err
		}
	}
	if err := n.up(); err != nil {
		return err
	}
	return l.note(n)
}

// note keeps the head that a node published.
func (l *lane) note(n *node) error {
	b, err := os.ReadFile(filepath.Join(n.dir, "heads", "checkpoint"))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	s, _, err := l.signer()
	if err != nil {
		return err
	}
	t, err := audit.OpenCheckpoint(b, s.VerifierKey())
	if err == nil && !slices.Contains(l.seen, t) {
		l.seen = append(l.seen, t)
	}
	return err
}

func (l *lane) signer() (*audit.Signer, secret.Key, error) {
	key, err := secret.OpenKey(filepath.Join(l.dir, "key"))
	if err != nil {
		return nil, key, err
	}
	seed, err := key.Derive("newel audit checkpoints")
	if err != nil {
		return nil, key, err
	}
	s, err := audit.NewSigner("newel", seed)
	return s, key, err
}

// evidence collects what is known when everything is over.
func (l *lane) evidence(ctx context.Context) (*Evidence, error) {
	b, err := os.ReadFile(l.ledgerFile())
	if err != nil {
		return nil, err
	}
	e := &Evidence{Events: l.journal.events}
	if e.Ledger, err = parseLines[Row](b); err != nil {
		return nil, err
	}
	for _, n := range l.nodes {
		if err := l.note(n); err != nil {
			return nil, err
		}
	}
	if err := l.readLog(ctx, e); err != nil {
		l.expect("", "I6: the audit log cannot be read: %v", err)
	}
	e.Events = l.journal.events
	return e, nil
}

// readLog reads the audit log where it is kept.
func (l *lane) readLog(ctx context.Context, e *Evidence) (err error) {
	var log interface {
		audit.Source
		Close() error
	}
	if l.engine == "postgres" {
		log, err = postgres.OpenLog(ctx, secret.New(l.dsn))
	} else {
		log, err = sqlite.OpenLog(filepath.Join(l.nodes[0].dir, "state.db"))
	}
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, log.Close()) }()
	_, key, err := l.signer()
	if err != nil {
		return err
	}
	if _, err := audit.Check(ctx, log); err != nil {
		return err
	}
	head, err := log.Head(ctx)
	if err != nil {
		return err
	}
	e.Checkpoints = append(slices.Clone(l.seen), head.Tree())
	ops := map[string]string{} // by name of the operation
	for from := int64(0); from < head.Size; {
		rows, err := log.Read(ctx, from, int(min(512, head.Size-from)))
		if err != nil || len(rows) == 0 {
			return errors.Join(fmt.Errorf("it ends at %d of %d", from, head.Size), err)
		}
		for _, r := range rows {
			if e.Log, err = audit.AppendLine(e.Log, &audit.Line{Index: r.Index, Record: r.Record}); err != nil {
				return err
			}
			i, name, err := intentOf(key, &r, e)
			if err != nil {
				return err
			}
			if i.Op != "" {
				ops[name] = i.Op
			}
			i.Op = ops[name]
			if name != "" {
				e.Audit = append(e.Audit, i)
			}
		}
		from += int64(len(rows))
	}
	return nil
}

// intentOf is what a record says of an operation. Steps of tasks and approvals go to the evidence.
func intentOf(key secret.Key, r *audit.Row, e *Evidence) (i Intent, operation string, err error) {
	rec, err := audit.Decode(r.Record)
	if err != nil {
		return i, "", err
	}
	at, err := time.Parse(time.RFC3339Nano, rec.Time)
	if err != nil {
		return i, "", err
	}
	if s, ok := stepOf(rec, at.UnixNano()); ok {
		e.Steps = append(e.Steps, s)
	}
	if rec.Act != audit.Intent && rec.Act != audit.Outcome {
		return i, "", nil
	}
	i = Intent{Time: at.UnixNano(), Act: rec.Act, State: rec.Outcome, Operation: rec.Operation, Approval: rec.Approval}
	if rec.Act == audit.Intent {
		values, err := effect.OpenValues(key, rec.Operation, r.Private)
		if err != nil {
			return i, "", err
		}
		for _, v := range values {
			var a arguments
			if v.Name == "arguments" && json.Unmarshal(v.Data, &a) == nil {
				i.Op = a.Op
			}
		}
	}
	return i, rec.Operation, nil
}

// crowd is many clients at once until stop is closed; each operation is tried until it has ended.
func (l *lane) crowd(clients int, point string, addr func() string, stop <-chan struct{}) (wait func()) {
	var all sync.WaitGroup
	var mu sync.Mutex
	tools := []string{"plain", "resend", "lookup"}
	for range clients {
		all.Go(func() {
			for n := 0; ; n++ {
				select {
				case <-stop:
					return
				default:
				}
				mu.Lock()
				o := l.operation(tools[l.rand.IntN(len(tools))])
				o.Args.Delay = l.rand.IntN(8)
				mu.Unlock()
				l.journal.add(Event{Kind: faulted, Op: o.ID, Point: point, Tool: o.Tool})
				for tries := 0; ; tries++ {
					e := l.try(o, addr(), way{})
					if e.Outcome == succeeded || e.Outcome == unknown && !recovers(o.Tool) || e.Outcome == refused {
						break
					}
					select {
					case <-stop:
						mu.Lock()
						o.Broken = time.Now()
						l.pending = append(l.pending, o)
						mu.Unlock()
						return
					case <-time.After(time.Duration(min(tries+1, 20)) * 5 * time.Millisecond):
					}
				}
			}
		})
	}
	return all.Wait
}

// isGone reports whether an error says that the process was killed, as it should have been.
func isGone(err error) bool {
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		return false
	}
	s, ok := exit.Sys().(syscall.WaitStatus)
	return ok && s.Signaled() && s.Signal() == syscall.SIGKILL
}

func oneLine(b []byte) string { return strings.Join(strings.Fields(string(b)), " ") }
