// Package authorize asks the policy whether a call may be made, and what of a list its caller may
// see.
//
// Refuses: what the policy denies. What the caller could not even see looks as if it did not
// exist, unless the policy is explicit; a missing scope is named, so that the caller can ask for
// it. Needs: the policy and the catalog, both in memory. Fails closed: a condition that cannot be
// evaluated denies. Records: the rule that decided. Costs: a microsecond without conditions.
package authorize

import (
	"cmp"
	"context"
	"strings"
	"sync"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/catalog"
	"newel.dev/newel/internal/policy"
)

// Options configure the step. Policy and Catalog are required.
type Options struct {
	Policy   *policy.Policy
	Catalog  *catalog.Catalog
	Explicit bool // say that something is denied although its caller may not see it
	// Shadow is another policy that is asked too and changes nothing; Differs is told where it
	// would have decided otherwise.
	Shadow  *policy.Policy
	Differs func(ctx context.Context, c *call.Call, got, would policy.Decision)
	// Denied, if not nil, is told of every call that is refused here, or hidden in See.
	Denied func(ctx context.Context, c *call.Call, target *call.Capability, err error)
}

// An Authorizer is the step, and what resolve asks of it.
type Authorizer struct {
	o Options
	// nobody is what callers see who are not known, if that is always the same; nil otherwise.
	nobody *call.Visible
}

// New returns an authorizer.
func New(o Options) *Authorizer {
	g := &Authorizer{o: o}
	if shown := g.visible(context.Background(), nil, time.Now()); shown.Key != "" { // it depends on no time
		g.nobody = shown
	}
	return g
}

// Guard is the guard of the step.
func (g *Authorizer) Guard(next call.Handler) call.Handler {
	return func(ctx context.Context, c *call.Call) (*call.Result, error) {
		if err := g.refuse(ctx, c, c.Target, g.check(ctx, c)); err != nil {
			return nil, err
		}
		r, err := next(ctx, c)
		if err == nil && r != nil && r.Public && c.Principal != nil {
			mine := *r // whoever caches it on the way would not ask the policy about others
			mine.Public = false
			return &mine, nil
		}
		return r, err
	}
}

// See sets what the caller may see, and refuses a target that it may not: with the words for names
// that are not there, before anything else could tell the difference. A target that only lacks
// scopes is let through: the step names them.
func (g *Authorizer) See(ctx context.Context, c *call.Call, target *call.Capability) error {
	now := time.Now()
	c.Visible = g.visible(ctx, c.Principal, now)
	if target != nil && !g.o.Explicit {
		d := g.o.Policy.Decide(ctx, &policy.Input{Principal: c.Principal, Capability: target, Listing: true, Now: now})
		if len(d.Missing) > 0 {
			return nil
		}
		if d.Verdict == policy.Deny {
			c.Event.Rule = d.Rule
			return g.refuse(ctx, c, target, hidden(c))
		}
	}
	if !g.o.Policy.AsksOthers() {
		return nil
	}
	return g.refuse(ctx, c, target, g.narrow(ctx, c, target, now))
}

// refuse tells of a refusal, if it is one.
func (g *Authorizer) refuse(ctx context.Context, c *call.Call, target *call.Capability, err error) error {
	if err != nil && g.o.Denied != nil {
		g.o.Denied(ctx, c, target, err)
	}
	return err
}

// narrow takes from what the caller may see what the other policies do not show.
func (g *Authorizer) narrow(ctx context.Context, c *call.Call, target *call.Capability, now time.Time) error {
	unavailable := func(err error) error {
		return call.Errorf(call.Unavailable, "the policy cannot be asked now; try again in a moment").Because(err)
	}
	if target != nil && !g.o.Explicit {
		seen, err := g.o.Policy.SeenByOthers(ctx, c.Principal, []*call.Capability{target}, now)
		if err != nil {
			return unavailable(err)
		}
		if !seen[target] {
			return hidden(c)
		}
	}
	rules := c.Visible.Shows
	all := sync.OnceValues(func() (map[*call.Capability]bool, error) {
		return g.o.Policy.SeenByOthers(context.WithoutCancel(ctx), c.Principal, g.o.Catalog.Load().All(), now)
	})
	c.Visible = &call.Visible{Shows: func(t *call.Capability) bool {
		seen, err := all()
		return err == nil && seen[t] && rules(t)
	}}
	if c.Kind.IsList() { // an empty list would be taken for the truth
		if _, err := all(); err != nil {
			return unavailable(err)
		}
	}
	return nil
}

func (g *Authorizer) check(ctx context.Context, c *call.Call) error {
	now := time.Now()
	if c.Kind == call.Subscribe {
		for _, uri := range c.Filter.URIs {
			target := g.o.Catalog.Load().Resource(uri)
			if target == nil {
				return call.Errorf(call.NotFound, "resource not found: %q; it cannot be subscribed to", uri)
			}
			if err := g.decide(ctx, c, target, nil, now); err != nil {
				return err
			}
		}
		for _, t := range c.Followed {
			target := g.o.Catalog.Load().Tool(t.Tool)
			if target == nil || !g.o.Explicit && !c.Visible.Shows(target) {
				return hidden(c)
			}
			if err := g.decide(ctx, c, target, t.Args, now); err != nil {
				return err
			}
		}
		return nil
	}
	if c.Task != nil { // whoever may not call any more hears nothing of earlier calls
		return g.decide(ctx, c, c.Target, c.Task.Args, now)
	}
	if c.Target == nil {
		return nil // lists show what is visible; discover tells nothing of anybody
	}
	return g.decide(ctx, c, c.Target, c.Args, now)
}

// Shown is what a caller may see now.
func (g *Authorizer) Shown(ctx context.Context, p *call.Principal) *call.Visible {
	return g.visible(ctx, p, time.Now())
}

// visible is what the caller may see: the same for all of whom the policy reads the same.
func (g *Authorizer) visible(ctx context.Context, p *call.Principal, now time.Time) *call.Visible {
	if p == nil && g.nobody != nil {
		return g.nobody
	}
	return &call.Visible{
		Key:   g.o.Policy.ViewKey(p),
		Shows: func(t *call.Capability) bool { return g.o.Policy.Visible(context.WithoutCancel(ctx), p, t, now) },
	}
}

// decide asks the policy about one capability.
func (g *Authorizer) decide(ctx context.Context, c *call.Call, target *call.Capability, args jsontext.Value, now time.Time) error {
	in := &policy.Input{Principal: c.Principal, Capability: target, Args: args, Now: now}
	d := g.o.Policy.Decide(ctx, in)
	c.Event.Rule = d.Rule
	if g.o.Shadow != nil {
		if would := g.o.Shadow.Decide(ctx, in); would.Verdict != d.Verdict {
			g.o.Differs(ctx, c, d, would)
		}
	}
	switch d.Verdict {
	case policy.Allow:
		return nil
	case policy.Approve:
		if c.Kind.OfTask() || c.Kind == call.Subscribe && target.Kind == call.Tool {
			return nil // about a task: its own run is what people approve
		}
		if c.Kind == call.Subscribe || c.Kind == call.Complete {
			return denial(c, call.Errorf(call.Denied, "a person would have to approve this, and nobody can be asked about a call of this kind"), &d)
		}
		c.Approval = &call.Approval{
			Rule: d.Rule, Policy: g.o.Policy.Version(), Approvers: d.Terms.Approvers, Count: max(d.Terms.Count, 1), Self: d.Terms.Self,
			Expires: cmp.Or(d.Terms.Expires, policy.DefaultExpires),
		}
		return nil // effect refuses the call unless a step between finds the approval
	}
	if len(d.Missing) > 0 {
		e := call.Errorf(call.Denied, "the access token lacks the scope %s", strings.Join(d.Missing, ", "))
		e.Scopes = target.Scopes // all that the call needs at once: what is granted already may be left out of the next token
		return denial(c, e, &d)
	}
	if c.Kind == call.Subscribe && !g.o.Explicit && !c.Visible.Shows(target) {
		return call.Errorf(call.NotFound, "resource not found: %q; it cannot be subscribed to", target.URI)
	}
	e := call.Errorf(call.Denied, "not allowed: %s", d.Reason)
	if cause := d.Cause(); cause != nil {
		return denial(c, e.Because(cause), &d)
	}
	return denial(c, e, &d)
}

// hidden is what resolve says of names that are not there.
func hidden(c *call.Call) error {
	switch c.Kind {
	case call.Tool:
		return call.Errorf(call.NotFound, "unknown tool %q; tools/list names the tools", c.Name)
	case call.Prompt:
		return call.Errorf(call.NotFound, "unknown prompt %q; prompts/list names the prompts", c.Name)
	}
	if c.Kind.OfTask() || c.Kind == call.Subscribe {
		return call.Errorf(call.NotFound, "there is no such task, or it is not kept any more")
	}
	return call.Errorf(call.NotFound, "resource not found: %q; resources/list and resources/templates/list name what there is", c.Name)
}

// denial adds what programs act on: which decision it was, and what would help.
func denial(c *call.Call, e *call.Error, d *policy.Decision) error {
	data := struct {
		Code     string   `json:"code"`
		Decision string   `json:"decision"` // the correlation id: an operator finds the rule by it
		Verdict  string   `json:"verdict"`
		Scopes   []string `json:"requiredScopes,omitempty"`
	}{e.Code.String(), c.Event.Correlation, d.Verdict.String(), e.Scopes}
	raw, err := json.Marshal(data)
	if err != nil {
		return e // without facts; text and strings can be encoded
	}
	e.Data = raw
	return e
}
