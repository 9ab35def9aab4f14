package effect

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"log/slog"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/answer"
	"newel.dev/newel/internal/audit"
	"newel.dev/newel/internal/catalog"
	"newel.dev/newel/internal/faultpoint"
)

// keyed runs a call with a key: once, however often it comes.
func (o *operation) keyed(ctx context.Context) (*call.Result, error) {
	patience := time.Now().Add(o.o.Wait)
	pause := firstPause
	for {
		if err := o.ready(); err != nil {
			return o.meanwhile(ctx, err)
		}
		// The first attempt claims a new operation. The others claim the one that stands, by the
		// number that was seen: whoever comes between wins.
		op, held, err := o.dispatch(ctx)
		if err != nil {
			return nil, err
		}
		if held {
			return o.runToEnd(ctx, op)
		}
		if op.ID == "" { // gone since we saw it
			o.fresh()
			continue
		}
		r, err, decided := o.standing(ctx, &op)
		if decided {
			return r, err
		}
		if o.res.Expect != 0 {
			continue // it may be claimed: at once, however long that took
		}
		if time.Now().After(patience) {
			return nil, busy()
		}
		if err := sleep(ctx, pause); err != nil {
			return nil, call.AsError(err)
		}
		pause = min(2*pause, longestPause)
		if err := o.await(ctx, patience, &pause); err != nil {
			return nil, err
		}
	}
}

// meanwhile answers a call whose backend is away (refused says so): with what is stored, if that is
// its answer. It writes nothing.
func (o *operation) meanwhile(ctx context.Context, refused error) (*call.Result, error) {
	op, err := o.store.Find(ctx, o.res.Scope)
	if err != nil {
		return nil, away(ctx, err)
	}
	switch {
	case op.ID == "", op.Past:
		return nil, refused
	case op.State == Completed, op.State == Waiting, op.State == Unknown && o.rule.Recovery == call.RecoverNone && !o.res.Forget, !bytes.Equal(op.Fingerprint, o.res.Fingerprint):
		if r, err, decided := o.standing(ctx, &op); decided {
			return r, err
		}
	}
	return nil, refused
}

// Pauses between two looks at an operation that somebody else holds.
const (
	firstPause   = 5 * time.Millisecond
	longestPause = 250 * time.Millisecond
)

// await looks until the operation is not held any more, or patience ends. Looking is a read.
func (o *operation) await(ctx context.Context, patience time.Time, pause *time.Duration) error {
	for time.Now().Before(patience) {
		op, err := o.store.Find(ctx, o.res.Scope)
		if err != nil {
			return away(ctx, err)
		}
		if op.ID == "" || op.Lease == 0 || op.State == Waiting {
			return nil
		}
		if err := sleep(ctx, *pause); err != nil {
			return call.AsError(err)
		}
		*pause = min(2**pause, longestPause)
	}
	return nil
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}

func (o *operation) fresh() { o.res.ID, o.res.Expect, o.res.Recover = newID(), 0, false }

// standing decides about an operation that is not ours. If it decides nothing, it has either made
// the reservation one that may claim it, or somebody else holds it.
func (o *operation) standing(ctx context.Context, op *Operation) (_ *call.Result, _ error, decided bool) {
	o.fresh()
	if !bytes.Equal(op.Fingerprint, o.res.Fingerprint) {
		e := call.Errorf(call.Failed, "this idempotency key was used for a call with other arguments, or of another version of the tool; use a new key for a new call")
		e.Data = jsontext.Value(`{"code":"failed","retryable":false,"idempotency":{"reason":"key_reused"}}`)
		return nil, e, true
	}
	o.c.Event.Operation = op.ID
	claim := func(takeOver bool) (*call.Result, error, bool) {
		o.res.ID, o.res.Expect, o.res.Recover = op.ID, op.Fence, takeOver
		return nil, nil, false
	}
	switch op.State {
	case Completed:
		if o.answers {
			return nil, used(), true
		}
		r, err := o.replay(op)
		return r, err, true
	case NotExecuted:
		return claim(false)
	case Waiting:
		if bytes.Equal(o.res.Resume, op.Round) {
			return claim(false)
		}
		r, err := o.askAgain(op)
		return r, err, true
	case Unknown:
		return o.recover(ctx, op, claim)
	}
	if op.Lease > 0 {
		return nil, nil, false
	}
	if op.State == Reserved {
		return claim(false)
	}
	return o.recover(ctx, op, claim)
}

// busy is what a second caller gets while the first one runs.
func busy() error {
	e := call.Errorf(call.Conflict, "a call with this idempotency key, or with these answers, is running; try again in a moment, with the same key")
	e.Retryable, e.RetryAfter = true, time.Second
	return e
}

// used is what a caller gets that sends answers again without a key, after what they led to was done.
func used() error {
	e := call.Errorf(call.Conflict, "this requestState was used already, and the call that it belongs to was done; it is not done again. Start a new call without requestState if you mean one; with an idempotency key a call that is sent again gets its answer")
	e.Data = jsontext.Value(`{"code":"conflict","retryable":false,"idempotency":{"reason":"state_used"}}`)
	return e
}

// recover deals with an operation of which nobody knows whether it ran.
func (o *operation) recover(ctx context.Context, op *Operation, claim func(bool) (*call.Result, error, bool)) (*call.Result, error, bool) {
	faultpoint.Reached(faultpoint.Recovering)
	switch o.rule.Recovery {
	case call.RecoverSafe, call.RecoverResend:
		return claim(true) // with the same Once: what runs it knows it again, or does not mind
	case call.RecoverLookup:
		r, err := o.lookup(ctx, op)
		return r, err, true
	}
	if op.State == Dispatched {
		if err := o.abandon(ctx, op); err != nil && !errors.Is(err, ErrFenced) {
			return nil, away(ctx, err), true
		}
	}
	return nil, o.unknown(nil), true
}

// unknown is what a caller gets whose call may or may not have run.
func (o *operation) unknown(cause error) error {
	why := "it is not known whether this call was done"
	if cause != nil {
		switch e := call.AsError(cause); e.Code {
		case call.OutcomeUnknown:
			why = e.Message
		case call.Timeout:
			why = "the call took longer than its deadline, and it is not known whether it was done"
		case call.Canceled:
			why = "the call was cancelled, and it is not known whether it was done"
		}
	}
	e := call.Errorf(call.OutcomeUnknown, "%s; it is not done again: look at what it should have changed before you call again, with a new key", why)
	if o.res.Scope != nil && !o.answers && o.rule.Recovery != call.RecoverNone {
		e = call.Errorf(call.OutcomeUnknown, "%s; try again with the same key: the tool has a way to find out, or to do it once", why)
		e.Retryable = true
	}
	if cause != nil {
		e = e.Because(errors.New(cause.Error())) // not the error itself: a deadline behind it would look like a plain time-out
	}
	return e
}

// abandon writes down that nobody knows how the operation ended.
func (o *operation) abandon(ctx context.Context, op *Operation) error {
	rec := o.record(audit.Outcome, op)
	rec.Outcome, rec.Code = Unknown.String(), call.OutcomeUnknown.String()
	entry, err := o.entry(&rec)
	if err != nil {
		return err
	}
	_, err = o.store.Complete(ctx, &Outcome{ID: op.ID, Fence: op.Fence, State: Unknown, Abandoned: true, Entry: entry})
	return err
}

// replay answers from what is stored.
func (o *operation) replay(op *Operation) (*call.Result, error) {
	raw, err := o.box.Open(op.Answer, "answer of "+op.ID)
	if err != nil {
		return nil, call.Errorf(call.Internal, "internal error").Because(err)
	}
	a, err := answer.Decode(raw)
	if err != nil {
		return nil, call.Errorf(call.Internal, "internal error").Because(err)
	}
	o.c.Event.Replayed = true
	return again(a, op.Index)
}

// askAgain tells a caller what its call waits for: the questions may not have arrived.
func (o *operation) askAgain(op *Operation) (*call.Result, error) {
	if len(op.Answer) > 0 { // an older program did not keep them
		if r, err := o.replay(op); call.AsError(err).Code != call.TooLarge {
			return r, err
		}
	}
	return nil, call.Errorf(call.Conflict, "the call with this idempotency key waits for answers to what it asked; send them, with the requestState that came with the questions")
}

// runToEnd runs a dispatched call with a key. It does not stop when its caller goes away: what is
// done is stored, and told when the caller comes back.
func (o *operation) runToEnd(ctx context.Context, op Operation) (*call.Result, error) {
	if o.c.TaskID != "" || o.answers {
		// Its worker waits for it, and ends it when the task is cancelled; without a key nobody hears of it later.
		return o.run(ctx, ctx, op)
	}
	run, cancel := context.WithTimeout(context.WithoutCancel(ctx), o.limit(ctx))
	defer cancel()
	return o.run(ctx, run, op)
}

// run does what was dispatched, under the context run, and stores how it ended. The steps:
//
//  1. the handler runs. A crash, or a panic: it may or may not have had its effect.
//  2. the outcome is committed. A crash before: as above. After: the answer is the stored one.
func (o *operation) run(ctx, run context.Context, op Operation) (*call.Result, error) {
	o.c.Event.Operation = op.ID
	o.c.Once, o.c.Resume = o.name(&op), o.resume
	returned := false
	defer func() {
		if !returned { // it panics: observe makes an error of that
			if _, err := o.end(ctx, &op, Unknown, nil, nil, "panic"); err != nil {
				o.log.LogAttrs(ctx, slog.LevelError, "an outcome could not be stored", slog.String("operation", op.ID), slog.String("error", err.Error()))
			}
		}
	}()
	faultpoint.Reached(faultpoint.Dispatched)
	if time.Since(o.claimed) > asleep {
		returned = true
		return nil, o.late(ctx, &op)
	}
	r, err := o.next(run, o.c)
	returned = true
	faultpoint.Reached(faultpoint.Answered)
	return o.conclude(ctx, &op, r, err)
}

// asleep is how long after its intent a call may begin. It is shorter than any lease, and than the silence
// after which other nodes take over.
const asleep = 9 * time.Second

// late gives back a call that was held up between its intent and its first byte: the process slept, and
// somebody else may have taken it over. Nothing was sent.
func (o *operation) late(ctx context.Context, op *Operation) error {
	_, err := o.end(ctx, op, NotExecuted, nil, nil, call.Unavailable.String())
	if errors.Is(err, ErrFenced) {
		return busy()
	}
	if err != nil {
		return away(ctx, err)
	}
	e := call.Errorf(call.Unavailable, "this server was held up, and another one may have taken over; nothing was done here, try again in a moment, with the same key")
	e.RetryAfter = time.Second
	return e
}

// conclude stores how a call ended, and returns what its caller is told: nothing else than what is
// stored.
func (o *operation) conclude(ctx context.Context, op *Operation, r *call.Result, err error) (*call.Result, error) {
	var ask *call.InputRequired
	if errors.As(err, &ask) {
		state, round, kept := NotExecuted, []byte(nil), (*answer.Answer)(nil) // a handler asks before its first effect, and starts over
		if ask.State != "" {
			state, round, kept = Waiting, roundOf(ask.State), &answer.Answer{Ask: ask}
		}
		if _, failed := o.end(ctx, op, state, kept, round, "input_required"); failed != nil {
			return nil, o.unstored(ctx, op, failed)
		}
		faultpoint.Reached(faultpoint.Concluded)
		if o.res.Scope == nil && ask.State != "" {
			named := *ask
			named.State = asking(op.ID, ask.State)
			return nil, &named
		}
		return nil, ask
	}
	a := &answer.Answer{Result: r}
	state, code := Completed, ""
	if err != nil {
		a = &answer.Answer{Err: call.AsError(err)}
		state, code = stateOf(a.Err.Code), a.Err.Code.String()
	}
	if state != Completed {
		a = nil
	}
	if _, failed := o.end(ctx, op, state, a, nil, code); failed != nil {
		return nil, o.unstored(ctx, op, failed)
	}
	faultpoint.Reached(faultpoint.Concluded)
	if state == Unknown {
		return nil, o.unknown(err)
	}
	return r, err
}

// stateOf says what an error of a handler means. What another server or a tool says is an answer
// like any other.
func stateOf(c call.Code) State {
	switch c {
	case call.Unavailable, call.Exhausted, call.Unauthenticated, call.Unsupported:
		return NotExecuted // by their definitions nothing was done
	case call.Timeout, call.Canceled, call.OutcomeUnknown:
		return Unknown
	}
	return Completed
}

// storing bounds how long the outcome of a call is tried to be stored.
const storing = leeway / 2

// end commits the outcome. It is not the caller's to cancel.
func (o *operation) end(ctx context.Context, op *Operation, state State, a *answer.Answer, round []byte, code string) (Operation, error) {
	rec := o.record(audit.Outcome, op)
	rec.Outcome, rec.Code = state.String(), code
	out := &Outcome{ID: op.ID, Fence: op.Fence, State: state, Round: round, Lease: waiting}
	if o.c.TaskID != "" {
		out.Lease = taskWaiting
	}
	if o.approval != nil {
		out.Approval = o.approval.ID
	}
	var values []audit.Value
	if a != nil {
		raw := a.Encode()
		values = append(values, audit.NewValue(answerValue, raw))
		if len(raw) > o.o.MaxAnswer {
			raw = (&answer.Answer{Lost: true}).Encode()
		}
		out.Answer = o.box.Seal(raw, "answer of "+op.ID)
		out.Undo = o.undo(ctx, op, a)
	}
	entry, err := o.entry(&rec, values...)
	if err != nil {
		return Operation{}, err
	}
	out.Entry = entry
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), storing)
	defer cancel()
	return o.store.Complete(ctx, out)
}

// waiting is how long an operation waits for the answers of its caller: as long as sealed states live.
const waiting = 15 * time.Minute

// taskWaiting is the same for tasks, which wait as long as they are kept: a week by default.
const taskWaiting = 8 * 24 * time.Hour

// unstored says that the call ran and nobody will know how: telling the answer now and something
// else later would be worse.
func (o *operation) unstored(ctx context.Context, op *Operation, cause error) error {
	o.log.LogAttrs(ctx, slog.LevelError, "an outcome could not be stored", slog.String("operation", op.ID), slog.String("error", cause.Error()))
	return o.unknown(cause)
}

// name is what the operation is called behind this server. It says nothing of caller or key.
func (o *operation) name(op *Operation) string {
	return hexOf(catalog.Digest("newel once 1", o.secret, string(op.Scope), op.ID)[:16])
}

func roundOf(state string) []byte {
	h := sha256.Sum256([]byte(state))
	return h[:]
}

// A Finding is what a lookup tool returns as structuredContent.
type Finding struct {
	Found *bool `json:"found"`
	// Result is the answer of the call that was found: content and structuredContent as MCP has
	// them. Without it the content of the lookup itself is the answer.
	Result *struct {
		Content    jsontext.Value `json:"content"`
		Structured jsontext.Value `json:"structuredContent"`
		IsError    bool           `json:"isError"`
	} `json:"result"`
}

// lookup asks a tool that reads whether the operation took place. The tool gets the name of the
// operation and the arguments of the call. It holds the operation meanwhile. A tool that finds it is
// believed at once, one that does not only if it was asked long enough after the call was sent.
func (o *operation) lookup(ctx context.Context, op *Operation) (*call.Result, error) {
	tool := o.find(o.rule.Lookup)
	if tool == nil || tool.Kind != call.Tool || tool.Effect != call.Read {
		return nil, o.unknown(errors.New("the lookup tool " + o.rule.Lookup + " is not there, or does not only read"))
	}
	o.res.ID, o.res.Expect, o.res.Recover, o.res.Lease = op.ID, op.Fence, true, o.limit(ctx)+leeway
	mine, held, err := o.store.Reserve(ctx, &o.res)
	if err != nil {
		return nil, away(ctx, err)
	}
	if !held {
		return nil, busy()
	}
	found, looked, err := o.look(ctx, tool, &mine)
	if err != nil {
		if _, failed := o.end(ctx, &mine, Unknown, nil, nil, call.OutcomeUnknown.String()); failed != nil {
			return nil, o.unstored(ctx, op, failed)
		}
		return nil, o.unknown(err)
	}
	if found {
		return o.conclude(ctx, &mine, looked, nil)
	}
	if left := o.settle(ctx) - mine.Since; left > 0 {
		if _, failed := o.end(ctx, &mine, Unknown, nil, nil, call.OutcomeUnknown.String()); failed != nil {
			return nil, o.unstored(ctx, op, failed)
		}
		return nil, o.unsettled(left)
	}
	faultpoint.Reached(faultpoint.Held)
	o.res.Expect, o.res.From, o.res.Holder = mine.Fence, mine.Holder, rand.Text()
	mine, held, err = o.dispatch(ctx)
	if err != nil {
		return nil, err
	}
	if !held {
		return nil, busy()
	}
	return o.runToEnd(ctx, mine)
}

// settle is how long a lookup that finds nothing is not believed: what was sent may wait in a queue of
// the tool, and be done long after nobody waits for its answer. Without a word of the operator that is
// the longest time of the call, and once more as long for a tool that took it at its very end.
func (o *operation) settle(ctx context.Context) time.Duration {
	if o.rule.Settle > 0 {
		return o.rule.Settle
	}
	return 2 * max(o.o.Deadline, o.limit(ctx)) // a run of a task may take longer than a call
}

// unsettled is what a caller gets whose call was not found while it may still be done.
func (o *operation) unsettled(left time.Duration) error {
	e := call.AsError(o.unknown(call.Errorf(call.OutcomeUnknown, "this call is not found, but the tool may still do what was sent to it")))
	if e.Retryable {
		e.RetryAfter = left
	}
	return e
}

// look runs the lookup tool.
func (o *operation) look(ctx context.Context, tool *call.Capability, op *Operation) (found bool, _ *call.Result, _ error) {
	args := o.c.Args
	if len(args) == 0 {
		args = jsontext.Value("{}")
	}
	in := withMember(jsontext.Value(`{"operation":"`+o.name(op)+`"}`), "arguments", args)
	if tool.Check != nil {
		if err := tool.Check(in); err != nil {
			return false, nil, errors.New("the lookup tool does not take {operation, arguments}: " + err.Error())
		}
	}
	ask := *o.c
	ask.Name, ask.Target, ask.Args, ask.Key, ask.Once, ask.Resume, ask.Sink, ask.Asker = tool.Name, tool, in, "", "", "", call.Discard, call.NoAsker
	r, err := tool.Run(ctx, &ask)
	if err != nil {
		return false, nil, err
	}
	var f Finding
	if r == nil || r.IsError || r.Structured == nil || json.Unmarshal(r.Structured, &f) != nil || f.Found == nil {
		return false, nil, errors.New("the lookup tool did not return {found: true or false}")
	}
	if !*f.Found || f.Result == nil {
		return *f.Found, &call.Result{Content: r.Content}, nil
	}
	return true, &call.Result{Content: f.Result.Content, Structured: f.Result.Structured, IsError: f.Result.IsError}, nil
}
