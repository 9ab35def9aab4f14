// Package policy decides who may call what: one decision function for calls of every kind, for
// lists and for search, from every door.
//
// Start reading at [Policy.Decide]. Rules are compiled once, see rule.go; their conditions are CEL.
// Deny overrides, then approval, then allow; what no rule allows is denied. A condition that fails,
// costs too much or takes too long denies. When arguments are not known yet, as in lists, a
// condition on them is neither true nor false and the answer says whether a call may be allowed.
//
// It refuses nothing itself, needs nothing but memory and is safe for concurrent use.
package policy

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
)

// A Verdict is the outcome of a decision. The zero Verdict is Deny.
type Verdict uint8

// The verdicts.
const (
	Deny    Verdict = iota
	Approve         // a person has to say yes first
	Allow
)

var verdictNames = [...]string{"deny", "require_approval", "allow"}

// String returns the name used in configurations and records.
func (v Verdict) String() string { return verdictNames[min(int(v), len(verdictNames)-1)] }

// Input is what a decision is about.
type Input struct {
	Principal  *call.Principal // nil: identities are not configured
	Capability *call.Capability
	Args       jsontext.Value // of a call; nil is {}
	Listing    bool           // arguments are not known yet
	Now        time.Time
}

// A Decision is what the policy says, and why.
type Decision struct {
	Verdict Verdict
	Rule    string   // that decided; one of the names below, or that of a rule
	Reason  string   // for the caller, or ""
	Missing []string // scopes that would help
	Terms   Terms    // of Approve
	cause   error    // for the operator
}

// Terms are what a rule wants of those who approve a call.
type Terms struct {
	Approvers []string      // roles, of which an approver needs one; empty: operators alone approve
	Count     int           // how many have to say yes
	Self      bool          // whether the caller may be one of them
	Expires   time.Duration // how long a decision is waited for, and how long it counts
}

// Defaults and bounds of terms. Deciders in other languages that want an approval have the defaults.
const (
	DefaultExpires = 15 * time.Minute
	MaxExpires     = 7 * 24 * time.Hour
	MaxCount       = 16
)

// Cause returns why a condition could not be evaluated, or nil.
func (d *Decision) Cause() error { return d.cause }

// Failed is the decision of a policy that could not be evaluated.
func Failed(rule string, cause error) Decision {
	return Decision{Rule: rule, Reason: "a condition of the policy could not be evaluated", cause: cause}
}

// Names of what decides beside the rules.
const (
	ByScopes   = "required scopes"
	ByReadOnly = "read-only mode"
	ByDefault  = "default"
)

// AllScopes is the scope that stands for all.
const AllScopes = "*"

// A Decider is a policy in another language. It can narrow what the rules allow, and no more. It is
// safe for concurrent use.
type Decider interface {
	// Decide says what becomes of a call. What cannot be evaluated is denied.
	Decide(ctx context.Context, in *Input) Decision
	// Visible returns which of all a caller may be allowed to use, whatever the arguments will be.
	Visible(ctx context.Context, p *call.Principal, all []*call.Capability, now time.Time) (map[*call.Capability]bool, error)
}

// A Policy is a compiled set of rules. It is immutable.
type Policy struct {
	environment string
	readOnly    bool
	rules       []*rule
	also        []Decider
	version     string
	sees        sight // of callers, in lists
}

// Decide returns what the policy says. When arguments are not known yet, deciders beside the rules
// are not asked: see [Policy.SeenByOthers].
func (p *Policy) Decide(ctx context.Context, in *Input) Decision {
	d := p.decide(ctx, in, nil)
	for _, other := range p.also {
		if d.Verdict == Deny || in.Listing {
			break
		}
		if o := other.Decide(ctx, in); overrides(&o, &d) {
			d = o
		}
	}
	return d
}

// overrides reports whether what another decider says counts. Of two that want an approval it is the
// rule: it says whose.
func overrides(o, d *Decision) bool {
	return o.Verdict < d.Verdict || o.Verdict == d.Verdict && d.Verdict != Approve
}

// Version changes when rules do, or policies beside them that are at hand. What an agent elsewhere
// decides is asked at every call.
func (p *Policy) Version() string { return p.version }

// AsksOthers reports whether there are deciders beside the rules.
func (p *Policy) AsksOthers() bool { return len(p.also) > 0 }

// SeenByOthers returns which of all a caller may be allowed to use as far as the deciders beside the
// rules are concerned.
func (p *Policy) SeenByOthers(ctx context.Context, who *call.Principal, all []*call.Capability, now time.Time) (map[*call.Capability]bool, error) {
	var by map[*call.Capability]bool
	for i, other := range p.also {
		seen, err := other.Visible(ctx, who, all, now)
		if err != nil {
			return nil, err
		}
		if i == 0 {
			by = seen
		}
		for c := range by {
			by[c] = by[c] && seen[c]
		}
	}
	return by, nil
}

// decide calls looked, if it is not nil, for each rule with how it matched.
func (p *Policy) decide(ctx context.Context, in *Input, looked func(r *rule, m match, why string)) Decision {
	c := in.Capability
	if missing := missingScopes(in.Principal, c.Scopes); len(missing) > 0 {
		return Decision{Rule: ByScopes, Missing: missing, Reason: "the access token lacks a scope that this needs"}
	}
	if p.readOnly && c.Kind == call.Tool && c.Effect != call.Read {
		return Decision{Rule: ByReadOnly, Reason: "the server is in read-only mode"}
	}
	if len(p.rules) == 0 && p.environment == Production && EffectOf(c) == call.Destructive.String() {
		return Decision{Rule: ByDefault, Reason: "in production a rule has to name a destructive tool to allow it"}
	}
	if len(p.rules) == 0 {
		return Decision{Verdict: Allow, Rule: ByDefault}
	}
	v := view{policy: p, in: in, name: NameOf(c)}
	for _, r := range p.rules { // deny first, then approval, then allow: the first that fits decides
		m, why, err := v.match(ctx, r)
		if looked != nil {
			looked(r, m, why)
		}
		if err != nil {
			return Failed(r.name, fmt.Errorf("rule %q: %w", r.name, err))
		}
		// What may be denied may also be allowed: the call itself will tell.
		if m == yes || m == maybe && r.verdict != Deny {
			d := Decision{Verdict: r.verdict, Rule: r.name, Terms: r.terms}
			if r.verdict == Deny {
				d.Reason = r.reason
			}
			return d
		}
	}
	return Decision{Rule: ByDefault, Reason: "no rule allows this"}
}

// missingScopes returns what a caller lacks. Without any identity (p is nil: authenticate lets that
// pass only where none is configured, on loopback) there are no scopes to have.
func missingScopes(p *call.Principal, needed []string) []string {
	if p == nil || len(needed) == 0 || slices.Contains(p.Scopes, AllScopes) {
		return nil
	}
	var missing []string
	for _, s := range needed {
		if !slices.Contains(p.Scopes, s) {
			missing = append(missing, s)
		}
	}
	return missing
}

// Visible reports whether a caller may be allowed to use a capability: what lists show.
func (p *Policy) Visible(ctx context.Context, principal *call.Principal, c *call.Capability, now time.Time) bool {
	d := p.Decide(ctx, &Input{Principal: principal, Capability: c, Listing: true, Now: now})
	return d.Verdict != Deny
}

// ViewKey returns a word that is the same for callers who are shown the same, made of what the rules
// read of them and nothing else; "" if what a caller is shown depends on more: the time, or deciders
// beside the rules.
func (p *Policy) ViewKey(who *call.Principal) string {
	if len(p.also) > 0 || p.sees&seesTime != 0 {
		return ""
	}
	if who == nil {
		return "-"
	}
	b := append(make([]byte, 0, 64), '+')
	add := func(read sight, texts ...string) {
		if p.sees&read == 0 {
			return
		}
		b = binary.AppendUvarint(append(b, byte(read)), uint64(len(texts)))
		for _, t := range texts {
			b = append(binary.AppendUvarint(b, uint64(len(t))), t...) // no text can be mistaken for parts of others
		}
	}
	add(seesID, who.ID)
	add(seesTenant, who.Tenant)
	add(seesClient, who.Client)
	add(seesScopes, who.Scopes...)
	add(seesRoles, who.Roles...)
	return string(b)
}

// sight is what rules look at of a caller, and the time.
type sight uint8

const (
	seesID sight = 1 << iota
	seesTenant
	seesClient
	seesScopes
	seesRoles
	seesTime
)

const seesAll = seesID | seesTenant | seesClient | seesScopes | seesRoles

// fields are the names under which conditions look at it.
var fields = map[string]sight{"id": seesID, "tenant": seesTenant, "client": seesClient, "scopes": seesScopes, "roles": seesRoles}

// A Look is how one rule met an input.
type Look struct {
	Rule    string `json:"rule"`
	Verdict string `json:"verdict"`
	Matched string `json:"matched"` // yes, no or maybe
	Why     string `json:"why,omitzero"`
}

// Explain decides and says how each rule that was asked met the input.
func (p *Policy) Explain(ctx context.Context, in *Input) (Decision, []Look) {
	var looks []Look
	d := p.decide(ctx, in, func(r *rule, m match, why string) {
		looks = append(looks, Look{Rule: r.name, Verdict: r.verdict.String(), Matched: m.String(), Why: why})
	})
	for _, other := range p.also {
		if d.Verdict == Deny || in.Listing {
			break
		}
		o := other.Decide(ctx, in)
		looks = append(looks, Look{Rule: o.Rule, Verdict: o.Verdict.String(), Matched: yes.String(), Why: o.Reason})
		if overrides(&o, &d) {
			d = o
		}
	}
	return d, looks
}

// A Test is a case that a policy must decide as it says.
type Test struct {
	Name    string   `yaml:"name" required:"true" doc:"What is tested."`
	Tenant  string   `yaml:"tenant" doc:"Tenant of the caller."`
	Subject string   `yaml:"subject" default:"somebody" doc:"The caller."`
	Roles   []string `yaml:"roles" doc:"Roles of the caller."`
	Scopes  []string `yaml:"scopes" doc:"Scopes of the caller; default: all."`
	Tool    string   `yaml:"tool" required:"true" doc:"Name of the tool (or prompt, or URI)."`
	Kind    string   `yaml:"kind" enum:"tool,resource,prompt" default:"tool" doc:"What it is."`
	Effect  string   `yaml:"effect" enum:"read,write,destructive" default:"read" doc:"What it does to the world."`
	Args    string   `yaml:"args" default:"{}" doc:"Arguments, as JSON."`
	Want    string   `yaml:"want" enum:"allow,deny,require_approval" required:"true" doc:"The verdict."`
	Rule    string   `yaml:"rule" doc:"The rule that decides, if that is tested."`
}

// Run runs one case. The error says what is different.
func (p *Policy) Run(ctx context.Context, t *Test, now time.Time) error {
	in, err := t.Input(now)
	if err != nil {
		return err
	}
	d := p.Decide(ctx, in)
	switch {
	case d.Verdict.String() != t.Want && d.cause != nil:
		return fmt.Errorf("want %s, got %s: %w", t.Want, d.Verdict, d.cause)
	case d.Verdict.String() != t.Want:
		return fmt.Errorf("want %s, got %s by %q", t.Want, d.Verdict, d.Rule)
	case t.Rule != "" && t.Rule != d.Rule:
		return fmt.Errorf("want the rule %q to decide, got %q", t.Rule, d.Rule)
	}
	return nil
}

// Input is what a case asks the policy.
func (t *Test) Input(now time.Time) (*Input, error) {
	args := jsontext.Value(t.Args)
	if !args.IsValid() || args.Kind() != '{' {
		return nil, errors.New("args are not a JSON object")
	}
	kind, known := kinds[t.Kind]
	if !known {
		return nil, fmt.Errorf("kinds are tool, resource and prompt, not %q", t.Kind)
	}
	effect, known := effects[t.Effect]
	if !known {
		return nil, fmt.Errorf("effects are read, write and destructive, not %q", t.Effect)
	}
	scopes := t.Scopes
	if scopes == nil {
		scopes = []string{AllScopes}
	}
	c := &call.Capability{Kind: kind, Name: t.Tool, Effect: effect}
	if kind == call.Resource {
		c.URI = t.Tool
	}
	return &Input{Principal: &call.Principal{ID: t.Subject, Tenant: t.Tenant, Roles: t.Roles, Scopes: scopes}, Capability: c, Args: args, Now: now}, nil
}

var kinds = map[string]call.Kind{"tool": call.Tool, "resource": call.Resource, "prompt": call.Prompt}

var effects = map[string]call.Effect{"read": call.Read, "write": call.Write, "destructive": call.Destructive}
