// Package approve has people say yes before a call runs, where the policy wants that.
//
// Start reading at [Approvals.Guard]; store.go is what an engine promises and the states of an
// approval, webhook.go how other systems hear of one and decide.
//
// Refuses: calls that nobody approved yet (retryable: the same call later asks about the same
// approval), that somebody denied, or whose time was over first. Needs: a Store. Fails: closed; a
// store that does not answer means no, and so does every doubt about what was approved: an approval
// is good for one caller, capability, definition, canonical arguments and version of the policy, for
// one run, within its time. The effect step uses it up in the transaction in which it writes the
// intent down. Records: requests, decisions and ends, in the audit log. Costs: nothing for calls
// that need no approval; a read and a commit for those that do.
package approve

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/audit"
	"newel.dev/newel/internal/catalog"
	"newel.dev/newel/internal/secret"
)

// Options configure the step.
type Options struct {
	Store   Store      // required
	Key     secret.Key // seals arguments
	Webhook *Webhook   // hears of approvals and may decide; nil: none
	// Ended is told how approvals were decided: approved, denied or expired; nil: nobody is.
	Ended  func(ctx context.Context, outcome string)
	Logger *slog.Logger
}

// Approvals is the step's state. It is safe for concurrent use.
type Approvals struct {
	store   Store
	box     *secret.Box
	hook    *Webhook
	log     *slog.Logger
	kick    chan struct{} // something is to be announced
	digests []byte        // keys them
	ended   func(ctx context.Context, outcome string)
	open    atomic.Int64         // that wait, as of the last look
	told    map[string]time.Time // when the webhook is told next of an approval; only Run touches it
}

// Bounds.
const (
	maxPending = 100             // that one caller may wait for
	retryAfter = 5 * time.Second // what callers who wait are told
	maxArgs    = 256 << 10       // bytes of arguments
	maxName    = 4 << 10         // bytes of a name or URI
	maxShown   = 4 << 10         // bytes of arguments in a question
	maxReason  = 1 << 10         // bytes of what somebody says
	sweepEvery = 5 * time.Second // how often ends are looked for
	sweepMost  = 256             // approvals at once
	timeFormat = time.RFC3339    // in answers
)

// New returns the step.
func New(o Options) (*Approvals, error) {
	if o.Store == nil {
		return nil, errors.New("approve: there is no store")
	}
	box, err := o.Key.Box("newel approvals")
	if err != nil {
		return nil, err
	}
	digests, err := o.Key.Derive("newel approval digests")
	if err != nil {
		return nil, err
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Ended == nil {
		o.Ended = func(context.Context, string) {}
	}
	return &Approvals{store: o.Store, box: box, hook: o.Webhook, digests: digests, ended: o.Ended, log: o.Logger, kick: make(chan struct{}, 1)}, nil
}

// Guard returns the guard for one server.
func (p *Approvals) Guard(server string) call.Guard {
	return func(next call.Handler) call.Handler {
		return func(ctx context.Context, c *call.Call) (*call.Result, error) {
			if c.Approval == nil || c.Elsewhere != "" { // the run that left something elsewhere used one up
				return next(ctx, c)
			}
			w, err := p.begin(server, c)
			if err != nil {
				return nil, err
			}
			w.next = next
			return w.run(ctx)
		}
	}
}

// waiting is one call on its way through the step.
type waiting struct {
	*Approvals
	c     *call.Call
	facts Facts
	args  jsontext.Value // canonical
	next  call.Handler
}

// begin says what an approval of the call is good for.
func (p *Approvals) begin(server string, c *call.Call) (*waiting, error) {
	if c.Target == nil || c.Kind != call.Tool && c.Kind != call.Resource && c.Kind != call.Prompt {
		return nil, call.Errorf(call.Denied, "a person would have to approve this, and nobody can be asked about a call of this kind")
	}
	args, err := catalog.Canonical(c.Args)
	if err != nil {
		return nil, err
	}
	if len(args) > maxArgs || len(c.Name) > maxName {
		return nil, call.Errorf(call.TooLarge, "a person has to approve this call, and its arguments are longer than anybody reads (%d bytes); send less at once", maxArgs)
	}
	n := c.Approval
	f := Facts{
		Server: server, Kind: c.Kind.String(), Name: c.Name, Effect: c.Target.Effect.String(), Pin: hex.EncodeToString(catalog.Pin(c.Target)),
		Arguments: hex.EncodeToString(catalog.Digest(string(args))), Rule: n.Rule, Policy: n.Policy, Approvers: n.Approvers, Count: max(n.Count, 1), Self: n.Self,
	}
	if c.Principal != nil {
		f.Tenant, f.Principal, f.Client = c.Principal.Tenant, c.Principal.ID, c.Principal.Client
	}
	n.Binding = catalog.Digest("newel approval 1", f.Tenant, f.Principal, server, f.Kind, f.Name, c.Target.Template, f.Pin, string(args), f.Rule, f.Policy)
	return &waiting{Approvals: p, c: c, facts: f, args: args}, nil
}

// run lets the call go on with an approval, or says why not.
func (w *waiting) run(ctx context.Context) (*call.Result, error) {
	const attempts = 4 // others may decide, use up or end what was just seen
	for range attempts {
		a, err := w.store.Bound(ctx, w.c.Approval.Binding)
		if err != nil {
			return nil, away(ctx, err)
		}
		if a.Stands() && a.Over(0, time.Now()) {
			return nil, w.over(ctx, &a)
		}
		switch {
		case a.State == Approved, a.State == Used, a.State == Pending && w.c.Key != "", a.ID == "" && w.c.Key != "":
			// One that is used up is good for what it was used for: the same operation, tried again. And
			// what ended before is answered from what is stored, which runs nothing.
			r, err := w.with(ctx, &a)
			if !errors.Is(err, call.ErrUnapproved) {
				return r, err
			}
			if a.State == Approved {
				continue // somebody was faster
			}
		case a.State == Denied && !a.Over(0, time.Now()):
			return nil, w.denied(ctx, &a)
		case a.State == Expired:
			return nil, w.over(ctx, &a)
		}
		if a.State != Pending {
			if a, err = w.request(ctx); err != nil {
				return nil, err
			}
		}
		asked, err := w.ask(ctx, &a)
		if err != nil {
			return nil, err
		}
		if !asked {
			return nil, w.pending(&a)
		}
	}
	e := call.Errorf(call.Conflict, "the approval of this call changes while it is looked at; try again in a moment")
	e.Retryable, e.RetryAfter = true, time.Second
	return nil, e
}

// with runs the call with an approval, or without one: then only an answer that is stored comes back.
func (w *waiting) with(ctx context.Context, a *Approval) (*call.Result, error) {
	if a.State != Pending {
		w.c.Approval.ID, w.c.Approval.Spent = a.ID, a.State == Used
	}
	w.c.Event.Approval = a.ID
	r, err := w.next(ctx, w.c)
	if errors.Is(err, call.ErrUnapproved) {
		w.c.Approval.ID, w.c.Approval.Spent, w.c.Event.Step = "", false, ""
	}
	return r, err
}

// request asks for an approval, or finds the one that is asked for already.
func (w *waiting) request(ctx context.Context) (Approval, error) {
	now := time.Now()
	waiting, err := w.store.Approvals(ctx, Query{Tenant: &w.facts.Tenant, Principal: &w.facts.Principal, State: Pending, Limit: maxPending})
	if err != nil {
		return Approval{}, away(ctx, err)
	}
	if len(waiting) >= maxPending && !slices.ContainsFunc(waiting, func(a Approval) bool { return a.Over(0, now) }) {
		return Approval{}, call.Errorf(call.Exhausted, "%d calls of yours wait for approval; wait for those first", maxPending)
	}
	r := &Request{For: w.c.Approval.Expires}
	r.ID, r.Binding, r.Facts = newID(), w.c.Approval.Binding, w.facts
	r.Requested = time.Now().UTC()
	r.Args = w.box.Seal(w.args, "arguments of "+r.ID)
	if r.Entry, err = w.entry(&r.Approval, "requested", nil, w.c); err != nil {
		return Approval{}, err
	}
	a, made, err := w.store.Ask(ctx, r)
	if err != nil {
		return Approval{}, away(ctx, err)
	}
	if made {
		select {
		case w.kick <- struct{}{}:
		default:
		}
	}
	return a, nil
}

// newID returns an unguessable name that begins with the time.
func newID() string { return fmt.Sprintf("%012x", time.Now().UnixMilli()) + rand.Text() }

// ask asks the caller, if it may decide and its client can be asked. It reports whether it decided.
func (w *waiting) ask(ctx context.Context, a *Approval) (decided bool, _ error) {
	me := Person{Name: a.Principal, Tenant: a.Tenant, How: ByElicitation}
	if w.c.Principal != nil {
		me.Roles = w.c.Principal.Roles
	}
	if !a.Self || a.may(me.Votes(true, "", time.Now())) != nil || a.State != Pending ||
		slices.ContainsFunc(a.Votes, func(v Vote) bool { return v.By == me.Name && v.Tenant == me.Tenant }) {
		return false, nil
	}
	q := question(a, w.args)
	answers, err := w.c.Asker.Ask(ctx, q)
	var open *call.InputRequired
	if err != nil {
		w.c.Event.Approval = a.ID
		switch {
		case errors.As(err, &open), ctx.Err() != nil:
			return false, err
		}
		return false, nil // it cannot be asked, or does not answer: others may decide
	}
	var said struct {
		Action  string `json:"action"`
		Content struct {
			Approve bool `json:"approve"`
		} `json:"content"`
	}
	if json.Unmarshal(answers[q.Key], &said) != nil || said.Action == "cancel" {
		return false, nil
	}
	_, err = w.Decide(ctx, a.ID, me, said.Action == "accept" && said.Content.Approve, "")
	if err != nil && !errors.Is(err, ErrEnded) && !errors.Is(err, ErrTwice) {
		return false, away(ctx, err)
	}
	return true, nil
}

// question shows what is to be approved, whole or with the digest of what is left out.
func question(a *Approval, args jsontext.Value) call.Question {
	shown := string(args)
	if len(shown) > maxShown {
		shown = strings.ToValidUTF8(shown[:maxShown], "") + fmt.Sprintf("… (%d bytes, SHA-256 %s)", len(args), a.Arguments)
	}
	text := fmt.Sprintf("The policy (%s) wants a person to approve this call before it runs.\n\n%s %s\n%s", a.Rule, a.Kind, a.Name, shown)
	b := call.AppendString(jsontext.Value(`{"mode":"form","message":`), text)
	b = append(b, `,"requestedSchema":{"type":"object","properties":{"approve":{"type":"boolean","title":"Approve","description":"Run exactly this call, once"}},"required":["approve"]}}`...)
	return call.Question{Key: "newel-approval-" + a.ID, Method: call.MethodElicit, Params: b}
}

// Decide writes down what somebody says of an approval. Its errors are those of a Store.
func (p *Approvals) Decide(ctx context.Context, id string, by Person, yes bool, reason string) (Approval, error) {
	a, err := p.store.Approval(ctx, id)
	if err != nil {
		return Approval{}, err
	}
	v := by.Votes(yes, clip(reason), time.Now())
	outcome := "denied"
	if yes {
		outcome = "approved"
	}
	e, err := p.entry(&a, outcome, v, nil)
	if err != nil {
		return Approval{}, err
	}
	a, err = p.store.Decide(ctx, &Decision{ID: id, Vote: v, Now: time.Now(), Entry: e})
	if err == nil && (a.State == Approved || a.State == Denied) {
		p.ended(ctx, a.State.String())
	}
	return a, err
}

// Pending is how many approvals of all nodes wait, as of a few seconds ago, and at most 256.
func (p *Approvals) Pending() int64 { return p.open.Load() }

func clip(s string) string { return strings.ToValidUTF8(s[:min(len(s), maxReason)], "�") }

// over ends an approval whose time is over, and tells its caller, once.
func (w *waiting) over(ctx context.Context, a *Approval) error {
	e, err := w.entry(a, Expired.String(), nil, nil)
	if err != nil {
		return err
	}
	if a.State == Expired {
		e = audit.Entry{} // written down when it ended
	}
	_, err = w.store.Decide(ctx, &Decision{ID: a.ID, Told: true, Now: time.Now(), Entry: e})
	if err != nil && !errors.Is(err, ErrEnded) {
		return away(ctx, err)
	}
	if err == nil && e.Record != nil {
		w.ended(ctx, Expired.String())
	}
	a.State = Expired
	return w.refusal(a, call.Errorf(call.Denied, "nobody approved this call in time (approval %s), so it is denied; nothing was done. If it is still wanted, the same call asks anew", a.ID))
}

func (w *waiting) denied(_ context.Context, a *Approval) error {
	why := ""
	if n := len(a.Votes); n > 0 && a.Votes[n-1].Reason != "" {
		why = fmt.Sprintf(", saying %q", a.Votes[n-1].Reason)
	}
	return w.refusal(a, call.Errorf(call.Denied, "a person denied this call (approval %s)%s; nothing was done. Do not make it again", a.ID, why))
}

func (w *waiting) pending(a *Approval) error {
	e := call.Errorf(call.Denied, "this call waits for a person to approve it (approval %s, until %s); nothing was done yet. Make the same call again in a while: it runs once it is approved",
		a.ID, a.Expires().Format(timeFormat))
	e.Retryable, e.RetryAfter = true, retryAfter
	return w.refusal(a, e)
}

// Expires is when the time of the approval is over, as its caller's server saw it.
func (a *Approval) Expires() time.Time { return time.UnixMicro(a.Deadline).UTC() }

// refusal adds what programs act on.
func (w *waiting) refusal(a *Approval, e *call.Error) error {
	w.c.Event.Approval = a.ID
	type facts struct {
		ID      string `json:"id"`
		State   string `json:"state"`
		Rule    string `json:"rule"`
		Expires string `json:"expires,omitzero"`
		Given   int    `json:"approvals"`
		Needed  int    `json:"needed"`
		Then    string `json:"then"`
	}
	then := map[State]string{Pending: "call again with the same arguments", Denied: "do not call again", Expired: "call again to ask anew"}[a.State]
	data := struct {
		Code       string `json:"code"`
		Retryable  bool   `json:"retryable"`
		RetryAfter int    `json:"retryAfterSeconds,omitzero"`
		Decision   string `json:"decision"`
		Verdict    string `json:"verdict"`
		Approval   facts  `json:"approval"`
	}{e.Code.String(), e.Retryable, int(e.RetryAfter / time.Second), w.c.Event.Correlation, "require_approval",
		facts{ID: a.ID, State: a.State.String(), Rule: a.Rule, Given: yeses(a), Needed: a.Count, Then: then}}
	if a.State == Pending {
		data.Approval.Expires = a.Expires().Format(timeFormat)
	}
	raw, err := json.Marshal(data)
	if err != nil {
		return e // without facts
	}
	e.Data = raw
	return e
}

func yeses(a *Approval) int {
	n := 0
	for _, v := range a.Votes {
		if v.Yes {
			n++
		}
	}
	return n
}

// away says that the store does not answer. Nothing was done.
func away(ctx context.Context, err error) error {
	var said *call.Error
	if errors.As(err, &said) {
		return said
	}
	if ctx.Err() != nil {
		return call.AsError(ctx.Err()).Because(err)
	}
	e := call.Errorf(call.Unavailable, "a person has to approve this call, and approvals cannot be looked up right now; nothing was done, try again in a moment").Because(err)
	e.RetryAfter = time.Second
	return e
}

// keyed stands for the arguments in the audit log, which keeps it for ever: without the key nobody can
// try arguments against it.
func (p *Approvals) keyed(a *Approval) string {
	h := hmac.New(sha256.New, p.digests)
	h.Write([]byte(a.ID + " " + a.Arguments))
	return hex.EncodeToString(h.Sum(nil))
}

// entry is the audit record of a step of an approval. v is who decided, or nil.
func (p *Approvals) entry(a *Approval, outcome string, v *Vote, c *call.Call) (audit.Entry, error) {
	r := audit.Record{
		Act: audit.Approval, Approval: a.ID, Capability: clip(a.Name), Client: clip(a.Client), Effect: a.Effect, Kind: a.Kind, Outcome: outcome, Pin: a.Pin,
		Principal: clip(a.Principal), Rule: clip(a.Rule), Server: a.Server, Tenant: clip(a.Tenant), Time: audit.Time(time.Now()),
		Digests: []audit.Digest{{Name: "canonical arguments (keyed)", SHA256: p.keyed(a)}},
	}
	if v != nil {
		r.By, r.Door = clip(v.By), v.How
	}
	if c != nil {
		r.Correlation, r.Door = c.Event.Correlation, c.Door
	}
	b, err := r.Encode()
	return audit.Entry{Record: b}, err
}

// Run ends approvals whose time is over, and tells the webhook of those that wait, until ctx ends.
// The step works without it: then callers end them when they come back.
func (p *Approvals) Run(ctx context.Context) error {
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	for {
		p.sweep(ctx)
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		case <-p.kick:
		}
	}
}

func (p *Approvals) sweep(ctx context.Context) {
	now := time.Now()
	var wait []Approval
	for _, state := range []State{Pending, Approved} {
		list, err := p.store.Approvals(ctx, Query{State: state, Limit: sweepMost, Oldest: true})
		if err != nil {
			if ctx.Err() == nil {
				p.log.LogAttrs(ctx, slog.LevelWarn, "approvals cannot be looked at", slog.String("error", err.Error()))
			}
			return
		}
		for i := range list {
			a := &list[i]
			if !a.Over(0, now) {
				if state == Pending {
					wait = append(wait, *a)
				}
				continue
			}
			e, err := p.entry(a, Expired.String(), nil, nil)
			if err == nil {
				_, err = p.store.Decide(ctx, &Decision{ID: a.ID, Now: now, Entry: e})
			}
			if err == nil {
				p.ended(ctx, Expired.String())
			}
			if err != nil && !errors.Is(err, ErrEnded) && ctx.Err() == nil {
				p.log.LogAttrs(ctx, slog.LevelWarn, "an approval could not be ended", slog.String("approval", a.ID), slog.String("error", err.Error()))
			}
		}
	}
	p.open.Store(int64(len(wait)))
	if p.hook != nil {
		p.hook.tell(ctx, p, wait)
	}
}

// A View is an approval as people and programs read it.
type View struct {
	ID        string         `json:"id"`
	State     string         `json:"state"`
	Tenant    string         `json:"tenant,omitzero"`
	Principal string         `json:"principal"`
	Client    string         `json:"client,omitzero"`
	Server    string         `json:"server"`
	Kind      string         `json:"kind"`
	Name      string         `json:"name"`
	Effect    string         `json:"effect"`
	Pin       string         `json:"pin"`
	Arguments jsontext.Value `json:"arguments"`
	Digest    string         `json:"argumentsSha256"`
	Rule      string         `json:"rule"`
	Policy    string         `json:"policy"`
	Approvers []string       `json:"approvers"`
	Count     int            `json:"count"`
	Self      bool           `json:"self"`
	Requested time.Time      `json:"requested"`
	Expires   time.Time      `json:"expires"`
	Decisions []Said         `json:"decisions"`
	Operation string         `json:"operation,omitzero"`
	Index     int64          `json:"auditIndex"`
}

// Said is one decision of a View.
type Said struct {
	By       string    `json:"by"`
	How      string    `json:"how"`
	Decision string    `json:"decision"` // approve or deny
	Reason   string    `json:"reason,omitzero"`
	At       time.Time `json:"at"`
}

// View shows an approval.
func (p *Approvals) View(a *Approval) (*View, error) {
	args, err := p.box.Open(a.Args, "arguments of "+a.ID)
	if err != nil {
		return nil, err
	}
	if hex.EncodeToString(catalog.Digest(string(args))) != a.Arguments {
		return nil, errors.New("the stored arguments are not those that the approval is about")
	}
	state := a.State
	if a.Stands() && a.Over(0, time.Now()) {
		state = Expired // nobody has written it down yet
	}
	v := &View{
		ID: a.ID, State: state.String(), Tenant: a.Tenant, Principal: a.Principal, Client: a.Client, Server: a.Server, Kind: a.Kind, Name: a.Name, Effect: a.Effect,
		Pin: a.Pin, Arguments: args, Digest: a.Arguments, Rule: a.Rule, Policy: a.Policy, Approvers: a.Approvers, Count: a.Count, Self: a.Self,
		Requested: a.Requested, Expires: a.Expires(), Operation: a.Operation, Index: a.Index,
	}
	for _, vote := range a.Votes {
		s := Said{By: vote.By, How: vote.How, Decision: "deny", Reason: vote.Reason, At: vote.At}
		if vote.Yes {
			s.Decision = "approve"
		}
		v.Decisions = append(v.Decisions, s)
	}
	return v, nil
}

// Show returns one approval to somebody who may decide about it, or whose call it is. To others
// there is none.
func (p *Approvals) Show(ctx context.Context, id string, to Person) (*View, error) {
	a, err := p.store.Approval(ctx, id)
	if err != nil {
		return nil, err
	}
	if !a.concerns(to) {
		return nil, ErrNone
	}
	return p.View(&a)
}

// List returns what somebody may decide about, or has asked for, the newest first. Long arguments are
// left out.
func (p *Approvals) List(ctx context.Context, to Person, state State, limit int) ([]*View, error) {
	q := Query{State: state, Limit: limit}
	if !to.Operator {
		q.Tenant = &to.Tenant
	}
	list, err := p.store.Approvals(ctx, q)
	if err != nil {
		return nil, err
	}
	out := []*View{}
	for i := range list {
		if !list[i].concerns(to) {
			continue
		}
		v, err := p.View(&list[i])
		if err != nil {
			return nil, err
		}
		if len(v.Arguments) > maxShown {
			v.Arguments = jsontext.Value("null") // Show has them
		}
		out = append(out, v)
	}
	return out, nil
}

// concerns reports whether somebody may read an approval.
func (a *Approval) concerns(to Person) bool {
	v := to.Votes(true, "", time.Time{})
	return same(a.Principal, a.Tenant, v) || a.may(v) == nil
}
