package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

// A mutant is the program with one mistake in it. It shows that the suite would see that mistake:
// each must be caught.
type mutant struct {
	name        string
	engine      string
	cycles      int
	environment string
	edits       []edit
}

type edit struct{ file, old, new string }

// mutants are the mistakes that would cost somebody money.
func mutants() []mutant {
	const upstream, keys = "internal/backend/mcpupstream/", "internal/identity/verify/"
	const effect, store, lite, pg = "internal/guard/effect/", "internal/durable/batch.go", "internal/store/sqlite/", "internal/store/postgres/"
	const tasks = "internal/task/"
	return []mutant{
		{"nothing is synced (SQLite)", "sqlite", 60, "none", []edit{
			{lite + "sqlite.go", `"synchronous(FULL)"`, `"synchronous(OFF)"`},
			{lite + "sqlite.go", `{"wal", int64(2)}`, `{"wal", int64(0)}`},
		}},
		{"commits are not waited for (PostgreSQL)", "postgres", 0, "E1", []edit{
			{pg + "postgres.go", `params["synchronous_commit"] = "on"`, `params["synchronous_commit"] = "off"`},
		}},
		{"no fencing", "postgres", 0, "two", []edit{
			{effect + "store.go", `if op == nil || op.Fence != o.Fence {`, `if op == nil {`},
			{effect + "store.go", `if op.State.Ended() || op.State == Waiting && !o.Abandoned || o.Abandoned && op.Until > now {`, `if o.Abandoned && op.Until > now {`},
		}},
		{"the intent is not marked as dispatched", "sqlite", 60, "none", []edit{
			{store, "next.State = effect.Dispatched\n", "next.State = effect.Reserved\n"},
		}},
		{"the intent is not in the audit log", "sqlite", 30, "none", []edit{
			{store, "next.Index = b.append(u.Dispatch.Entry)\n", ""},
		}},
		{"answered before the outcome is committed", "sqlite", 60, "none", []edit{
			{effect + "keyed.go", "	if _, failed := o.end(ctx, op, state, a, nil, code); failed != nil {\n		return nil, o.unstored(ctx, op, failed)\n	}\n",
				"	go func() { time.Sleep(20 * time.Millisecond); _, _ = o.end(ctx, op, state, a, nil, code) }()\n"},
		}},
		{"done before the intent is committed", "sqlite", 60, "none", []edit{
			{effect + "effect.go", "	args := audit.NewValue", "	if o.find != nil && o.res.Expect == 0 {\n		_, _ = o.next(context.WithoutCancel(ctx), o.c)\n	}\n	args := audit.NewValue"},
		}},
		{"what is not known runs again", "sqlite", 60, "none", []edit{
			{effect + "keyed.go", "	case call.RecoverSafe, call.RecoverResend:\n", "	case call.RecoverSafe, call.RecoverResend, call.RecoverNone:\n"},
		}},
		{"what is looked up runs again", "sqlite", 60, "none", []edit{
			{effect + "keyed.go", "	if found {\n", "	if found && false {\n"},
		}},
		{"a lookup is believed at once", "sqlite", 0, "settle", []edit{
			{effect + "keyed.go", "	if left := o.settle(ctx) - mine.Since; left > 0 {", "	if left := o.settle(ctx) - mine.Since; false {"},
		}},
		{"looking begins the settle time anew", "sqlite", 0, "settle", []edit{
			{effect + "store.go", "		if next.Sent == 0 || next.Sent > now {", "		if true {"},
		}},
		{"who looks forgets that it may have run", "sqlite", 0, "lookup", []edit{
			{effect + "store.go", "	if next.State != Dispatched && next.State != Unknown {", "	if true {"},
		}},
		{"a failed sync is taken for a full disk", "sqlite", 0, "E2", []edit{
			{lite + "commit.go", "	case codePerm, codeBusy,", "	case 10, codePerm, codeBusy,"},
		}},
		{"without a store a call runs all the same", "sqlite", 0, "E2", []edit{
			{effect + "effect.go", "		return op, false, away(ctx, err)\n	}\n	return op, held, nil", "		return Operation{ID: o.res.ID, Fence: 1, State: Dispatched}, true, nil\n	}\n	return op, held, nil"},
		}},
		{"questions are not asked again", "sqlite", 0, "E10", []edit{
			{effect + "keyed.go", "	if len(op.Answer) > 0 {", "	if false {"},
		}},
		{"answers belong to no call", "sqlite", 0, "mrtr", []edit{
			{"internal/mcpwire/state.go", "	field(c.Key) // answers belong to one operation\n", ""},
		}},
		{"a clock that was set back is believed", "postgres", 0, "E9", []edit{
			{pg + "postgres.go", "WHERE seen > clock_timestamp()\"", "WHERE false\""},
		}},
		{"the breaker never opens", "sqlite", 0, "E3", []edit{
			{"internal/guard/resilience/breaker.go", "WithFailureThreshold(uint(failures)).", "WithFailureThreshold(uint(failures) + 1<<30)."},
		}},
		{"addresses are not checked when they are dialled", "sqlite", 0, "E14", []edit{
			{"internal/egress/egress.go", "Control: Control(o), Resolver", "Resolver"},
		}},
		{"an answer that is none is a failure", "sqlite", 0, "E14", []edit{
			{upstream + "run.go", "	case s.status < 300 && !t.read:", "	case false:"},
		}},
		{"old keys count for ever", "sqlite", 0, "E7", []edit{
			{keys + "keys.go", "staleAfter   = 24 * time.Hour", "staleAfter   = 1 << 62"},
		}},
		{"every unknown key has the issuer be asked", "sqlite", 0, "E8", []edit{
			{keys + "keys.go", "unknownEvery = 10 * time.Second", "unknownEvery = time.Nanosecond"},
		}},
		{"another key under an id that is known is not looked for", "sqlite", 0, "E8", []edit{
			{keys + "verify.go", "len(newer) > 0 {", "len(newer) > 1<<20 {"},
		}},
		{"a reload changes the policy before the backends", "sqlite", 0, "E15", []edit{
			{"internal/assembly/live.go", "	given := *o\n", "	given := *o\n	given.Backends = old.opts.Backends\n"},
		}},
		{"without Redis there is no quota", "postgres", 0, "E17", []edit{
			{"internal/guard/quota/quota.go", "	return l.local.Take(ctx, now, claims)\n", "	return Outcome{Refused: -1}, nil\n"},
		}},
		{"without Redis every node grants the whole quota", "postgres", 0, "E17", []edit{
			{"internal/guard/quota/quota.go", "	l := &Limiter{o: o,", "	o.Share = 1\n	l := &Limiter{o: o,"},
		}},
		{"an old head is vouched for", "sqlite", 0, "E16", []edit{
			{"internal/audit/publish.go", "		return fmt.Errorf(\"audit: the published head cannot be read: %w\", err)\n	}\n	if err == nil {", "		return nil\n	}\n	if err == nil {"},
		}},
		{"a handle is told before its task is durable", "sqlite", 0, "tasks", []edit{
			{tasks + "guard.go", "	r, made, err := t.store.PutTask(ctx, w)\n", "	r, made := w.Record, true\n	go func() { time.Sleep(20 * time.Millisecond); _, _, _ = t.store.PutTask(context.WithoutCancel(ctx), w) }()\n"},
		}},
		{"the call of a task has no key of its own", "sqlite", 0, "tasks", []edit{
			{effect + "effect.go", `	case c.TaskID != "":`, `	case c.TaskID == "x":`},
		}},
		{"a task that is run again is another call", "sqlite", 0, "tasks", []edit{
			{tasks + "run.go", "Key: req.Key, Client:", "Key: r.rec.Holder, Client:"},
		}},
		{"cancelling is told before it is durable", "sqlite", 0, "tasks", []edit{
			{tasks + "serve.go", "			done, err := s.change(ctx, w, &notes{Message: \"The task was cancelled.\"})\n			if err != nil {\n				return nil, err\n			}\n			if !done {\n				continue\n			}\n",
				"			go func() { time.Sleep(20 * time.Millisecond); _, _ = s.change(context.WithoutCancel(ctx), w, &notes{}) }()\n"},
		}},
		{"a cancelled task stays in the queue", "sqlite", 0, "tasks", []edit{
			{tasks + "task.go", "return s >= Completed", "return s == Completed || s == Failed"},
			{lite + "task.go", "WHERE state < 4 AND (state <> 3", "WHERE (state < 4 OR state = 6) AND (state <> 3"},
		}},
		{"a task may be changed by who had it before", "postgres", 0, "takeover", []edit{
			{tasks + "task.go", "old.Version != w.Version || old.ID != w.ID || old.State.Ended()", "old.ID != w.ID"},
			{tasks + "run.go", "		lost := versions[id] > r.rec.Version // our own writes hold the lock\n", "		lost := versions[id] < r.rec.Version\n"},
		}},
		{"nobody goes on with the tasks of a node that died", "postgres", 0, "takeover", []edit{
			{pg + "task.go", "	free := fmt.Sprintf(\"(t.until <= \"+clock+\" OR t.state = %d AND", "	free := fmt.Sprintf(\"(t.until <= \"+clock+\" OR t.state = -%d AND"},
		}},
		{"who slept sends all the same", "postgres", 0, "two", []edit{
			{effect + "keyed.go", "	if time.Since(o.claimed) > asleep {\n", "	if false {\n"},
		}},
		{"answers without a key are taken again", "sqlite", 0, "answers", []edit{
			{effect + "effect.go", "	case op.State != Waiting || op.Scope != nil || !bytes.Equal(op.Round, o.res.Resume) || !bytes", "	case !bytes"},
			{effect + "effect.go", "	o.res.ID, o.res.Expect = op.ID, op.Fence\n", "	o.asked, o.res.Resume = \"\", nil\n"},
		}},
		{"an approval is not used up", "sqlite", 0, "approvals", []edit{
			{store, "		spent.Index = b.Edge.Size\n		b.keep(spent)\n", "		_ = spent\n"},
		}},
		{"an approval is used up with the outcome", "sqlite", 0, "approvals", []edit{
			{store, "		spent.Index = b.Edge.Size\n		b.keep(spent)\n", "		_ = spent\n"},
			{store, "		if a, changed := b.approvals[u.Complete.Approval].Release(", "		if a := b.approvals[u.Complete.Approval]; a != nil {\n			spent := *a\n			spent.State, spent.Operation, spent.Ended = approve.Used, next.ID, b.Now\n			b.keep(spent)\n		}\n		if a, changed := b.approvals[u.Complete.Approval].Release("},
		}},
		{"a decision is told before it is durable", "sqlite", 0, "approvals", []edit{
			{"internal/guard/approve/approve.go", "	a, err = p.store.Decide(ctx, &Decision{ID: id, Vote: v, Now: time.Now(), Entry: e})\n",
				"	d := &Decision{ID: id, Vote: v, Now: time.Now(), Entry: e}\n	next, _, err := d.Apply(0, &a)\n	if err == nil {\n		go func() { time.Sleep(20 * time.Millisecond); _, _ = p.store.Decide(context.WithoutCancel(ctx), d) }()\n	}\n	a = next\n"},
		}},
		{"what is decided can be decided again", "sqlite", 0, "approvals", []edit{
			{"internal/guard/approve/store.go", "	if a.State != Pending || a.Over(now, d.Now) {\n", "	if a.Over(now, d.Now) {\n"},
			{"internal/guard/approve/store.go", "	if slices.ContainsFunc(a.Votes, func(o Vote) bool { return same(", "	if false && slices.ContainsFunc(a.Votes, func(o Vote) bool { return same("},
		}},
		{"a call runs while a person is waited for", "sqlite", 0, "approvals", []edit{
			{"internal/guard/approve/store.go", "	case a.State == Approved && !a.Over(now, wall):\n", "	case !a.Over(now, wall):\n"},
			{"internal/guard/approve/approve.go", "		case a.State == Approved, a.State == Used,", "		case a.State == Pending, a.State == Approved, a.State == Used,"},
			{"internal/guard/approve/approve.go", "	if a.State != Pending {\n		w.c.Approval.ID", "	if true {\n		w.c.Approval.ID"},
		}},
		{"an approval does not run out", "sqlite", 0, "expiry", []edit{
			{"internal/guard/approve/store.go", "	case a.State == Approved && !a.Over(now, wall):\n", "	case a.State == Approved:\n"},
			{"internal/guard/approve/approve.go", "		if a.Stands() && a.Over(0, time.Now()) {\n", "		if false {\n"},
		}},
	}
}

// mutantsAtOnce is how many are built and run side by side.
const mutantsAtOnce = 3

// runMutants builds each program with a mistake and runs the part of the suite that should see it.
func runMutants(ctx context.Context, o *options, out io.Writer) error {
	type outcome struct {
		Name    string `json:"mutant"`
		Caught  bool   `json:"caught"`
		By      string `json:"by,omitempty"`
		Seconds int    `json:"seconds"`
	}
	var chosen []mutant
	for part := range strings.SplitSeq(o.mutant, ",") {
		before := len(chosen)
		for _, m := range mutants() {
			if strings.Contains(m.name, part) {
				chosen = append(chosen, m)
			}
		}
		if len(chosen) == before {
			return fmt.Errorf("there is no mutant with %q in its name", part)
		}
	}
	all, failures := make([]outcome, len(chosen)), make([]error, len(chosen))
	room := make(chan struct{}, mutantsAtOnce)
	var mu sync.Mutex // of out and missed
	var running sync.WaitGroup
	missed := 0
	for i, m := range chosen {
		running.Go(func() {
			room <- struct{}{}
			defer func() { <-room }()
			begun := time.Now()
			by, err := m.run(ctx, o)
			if err != nil {
				failures[i] = fmt.Errorf("%s: %w", m.name, err)
				return
			}
			all[i] = outcome{m.name, by != "", by, int(time.Since(begun).Seconds())}
			mu.Lock()
			defer mu.Unlock()
			verdict := "caught by " + by
			if by == "" {
				missed++
				verdict = "NOT CAUGHT"
			}
			fmt.Fprintf(out, "%-42s %4ds  %s\n", m.name, all[i].Seconds, verdict)
		})
	}
	running.Wait()
	if err := errors.Join(failures...); err != nil {
		return err
	}
	b, err := json.Marshal(map[string]any{"mutants": all, "caught": len(all) - missed, "missed": missed})
	if err != nil {
		return err
	}
	fmt.Fprintln(out, string(b))
	if missed > 0 {
		return fmt.Errorf("%d mistakes were not found", missed)
	}
	return nil
}

// run says by which invariant a mutant was caught, or "".
func (m *mutant) run(ctx context.Context, o *options) (by string, err error) {
	mine := *o
	mine.cycles, mine.only, mine.engines, mine.first, mine.quiet = m.cycles, m.environment, []string{m.engine}, true, true
	if mine.dir, err = os.MkdirTemp("", "newel-mutant-"); err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(mine.dir)) }()
	overlay, err := m.overlay(mine.dir)
	if err != nil {
		return "", err
	}
	mine.binary = filepath.Join(mine.dir, "newel")
	if err := build(ctx, mine.binary, overlay); err != nil {
		return "", err
	}
	r, err := run(ctx, &mine)
	if ctx.Err() != nil {
		return "", ctx.Err()
	}
	if r != nil && len(r.found) > 0 {
		v := r.found[0]
		return strings.TrimSpace(v.Invariant + " " + v.What), nil
	}
	if err != nil { // such as a server that does not start because its log is not what it published
		return fmt.Sprintf("%.160s", oneLine([]byte(err.Error()))), nil
	}
	return "", nil
}

// overlay writes the changed files and what go build is to read instead of which.
func (m *mutant) overlay(dir string) (string, error) {
	files, contents := map[string]string{}, map[string]string{}
	for i, e := range m.edits {
		file, err := filepath.Abs(e.file)
		if err != nil {
			return "", err
		}
		text, ok := contents[file]
		if !ok {
			b, err := os.ReadFile(file)
			if err != nil {
				return "", err
			}
			text = string(b)
		}
		if strings.Count(text, e.old) != 1 {
			return "", fmt.Errorf("%s does not have %q once: the mutant has to be written anew", e.file, e.old)
		}
		contents[file] = strings.Replace(text, e.old, e.new, 1)
		files[file] = filepath.Join(dir, fmt.Sprintf("%d.go", i))
	}
	for file, to := range files {
		if err := os.WriteFile(to, []byte(contents[file]), 0o600); err != nil {
			return "", err
		}
	}
	b, err := json.Marshal(map[string]any{"Replace": files})
	if err != nil {
		return "", err
	}
	name := filepath.Join(dir, "overlay.json")
	return name, os.WriteFile(name, b, 0o600)
}
