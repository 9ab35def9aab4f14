package effect

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/audit"
)

// UndoDoor is where calls come from that undo others.
const UndoDoor = "undo"

// CheckUndo returns what is wrong with an undo; nil is good.
func CheckUndo(u *call.Undo) error {
	if u == nil {
		return nil
	}
	if u.Tool == "" {
		return errors.New("it names no tool")
	}
	for name, from := range u.Args {
		root, rest, _ := strings.Cut(from, ".")
		if root != "args" && root != "result" || slices.Contains(strings.Split(rest, "."), "") {
			return fmt.Errorf("the argument %q comes from %q: write args.name or result.name", name, from)
		}
	}
	return nil
}

// A compensation is a call that undoes an operation, as it is stored.
type compensation struct {
	Tool string         `json:"tool"`
	Args jsontext.Value `json:"args"`
}

// undo is what undoes an operation that ended with a, sealed, or nil. What is missing in arguments
// or result leaves the operation without: it ran, and nothing may change that.
func (o *operation) undo(ctx context.Context, op *Operation, a *answer) []byte {
	u := o.rule.Undo
	if u == nil || a.result == nil || a.result.IsError {
		return nil
	}
	names := make([]string, 0, len(u.Args))
	for name := range u.Args {
		names = append(names, name)
	}
	slices.Sort(names)
	args := jsontext.Value("{}")
	for _, name := range names {
		root, path, _ := strings.Cut(u.Args[name], ".")
		v := o.c.Args
		if root == "result" {
			v = a.result.Structured
		}
		for _, member := range strings.Split(path, ".") {
			v = memberOf(v, member)
		}
		if v == nil {
			o.log.LogAttrs(ctx, slog.LevelWarn, "an operation cannot be undone: a value for that is missing",
				slog.String("operation", op.ID), slog.String("tool", o.c.Target.Name), slog.String("argument", name), slog.String("from", u.Args[name]))
			return nil
		}
		args = withMember(args, name, v)
	}
	raw, err := json.Marshal(compensation{u.Tool, args})
	if err != nil || len(raw) > o.o.MaxAnswer {
		o.log.LogAttrs(ctx, slog.LevelWarn, "an operation cannot be undone: what undoes it cannot be stored", slog.String("operation", op.ID))
		return nil
	}
	return o.box.Seal(raw, "undo of "+op.ID)
}

// memberOf returns a member of an object, or nil.
func memberOf(obj jsontext.Value, name string) (v jsontext.Value) {
	if obj.Kind() != '{' {
		return nil
	}
	_ = call.EachMember(obj, func(n string, m jsontext.Value) { // it is an object
		if n == name {
			v = m.Clone()
		}
	})
	return v
}

// Compensation returns the operation with an id and the call that undoes it, and writes down that by
// has it undone. The call has the name of the operation as its key: so it runs once, however often it
// is asked for.
func (e *Effects) Compensation(ctx context.Context, id, by string) (Operation, *call.Call, error) {
	op, err := e.store.Operation(ctx, id)
	switch {
	case err != nil:
		return op, nil, away(ctx, err)
	case op.ID == "":
		return op, nil, call.Errorf(call.NotFound, "there is no operation %q, or it is longer ago than its answer is kept", clip(id))
	case op.State == Unknown:
		return op, nil, call.Errorf(call.OutcomeUnknown, "it is not known whether this operation ran; look at what it should have changed")
	case op.State != Completed:
		return op, nil, call.Errorf(call.Conflict, "the operation is %s: there is nothing to undo", op.State)
	case op.Undo == nil:
		return op, nil, call.Errorf(call.Unsupported, "nothing undoes this operation: it failed, or no undo is declared for the tool %q", op.Tool)
	}
	raw, err := e.box.Open(op.Undo, "undo of "+op.ID)
	if err != nil {
		return op, nil, call.Errorf(call.Internal, "internal error").Because(err)
	}
	var u compensation
	if err := json.Unmarshal(raw, &u); err != nil {
		return op, nil, call.Errorf(call.Internal, "internal error").Because(err)
	}
	rec := audit.Record{Act: audit.Undo, By: clip(by), Capability: op.Tool, Door: UndoDoor, Operation: op.ID, Principal: clip(op.Principal), Server: op.Server, Tenant: clip(op.Tenant), Time: audit.Time(time.Now())}
	if err := e.Note(ctx, &rec); err != nil {
		return op, nil, err
	}
	return op, &call.Call{Kind: call.Tool, Name: u.Tool, Args: u.Args, Key: "undo " + op.ID, Door: UndoDoor, Trace: call.Trace{Correlation: op.ID}, Sink: call.Discard, Asker: call.NoAsker}, nil
}

// Note writes a record that belongs to no operation. What cannot be written down is not done.
func (e *Effects) Note(ctx context.Context, r *audit.Record) error {
	b, err := r.Encode()
	if err != nil {
		return call.Errorf(call.Internal, "internal error").Because(err)
	}
	if _, err := e.store.Append(ctx, []audit.Entry{{Record: b}}); err != nil {
		return away(ctx, err)
	}
	return nil
}
