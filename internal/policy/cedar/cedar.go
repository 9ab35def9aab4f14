// Package cedar decides with policies in the Cedar language.
//
// Start reading at [Policies.Decide]. A request looks like this to a policy:
//
//	principal  User::"https://idp.example.com#ada", in Role::"ops" and Tenant::"acme";
//	           attributes id, tenant, client, scopes, roles
//	action     Action::"call" of tools, Action::"read" of resources, Action::"get" of prompts
//	resource   Tool::"update_order_status", Resource::"kb://policy/refunds", Prompt::"brief";
//	           attributes name, effect, owner, tags
//	context    args, environment, now
//
// A policy that cannot be evaluated denies: Cedar itself would skip it, a forbid too. What is
// permitted by policies with the annotation @approval alone needs a person's yes. In lists the
// arguments are unknown, and what depends on them may be permitted. It needs nothing but memory.
package cedar

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/cedar-policy/cedar-go"
	"github.com/cedar-policy/cedar-go/types"
	"github.com/cedar-policy/cedar-go/x/exp/batch"
	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/policy"
)

// A File is a text with policies.
type File struct {
	Name string
	Text []byte
}

// Policies are what was read. They are immutable.
type Policies struct {
	environment string
	set         *cedar.PolicySet
	version     string
}

var _ policy.Decider = (*Policies)(nil)

// Annotations that mean something here.
const (
	nameOf   = "id"       // name of a policy in records
	approval = "approval" // a person has to say yes
	reasonOf = "reason"   // of a forbid, for the caller
)

// Parse reads policies. Errors name file, line and column.
func Parse(environment string, files ...File) (*Policies, error) {
	p := &Policies{environment: environment, set: cedar.NewPolicySet()}
	h := sha256.New()
	for _, f := range files {
		fmt.Fprintf(h, "%d:", len(f.Text)) // so that no other files give the same bytes
		h.Write(f.Text)
		list, err := cedar.NewPolicyListFromBytes(f.Name, f.Text)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", f.Name, err)
		}
		for _, one := range list {
			at := one.Position()
			id := fmt.Sprintf("%s:%d", f.Name, at.Line)
			if given, ok := one.Annotations()[nameOf]; ok {
				id = string(given)
			}
			if !p.set.Add(cedar.PolicyID(id), one) {
				return nil, fmt.Errorf("%s:%d: the name %q is taken", f.Name, at.Line, id)
			}
		}
	}
	p.version = hex.EncodeToString(h.Sum(nil))
	return p, nil
}

// Version is a digest of the files.
func (p *Policies) Version() string { return p.version }

// Decide implements policy.Decider.
func (p *Policies) Decide(_ context.Context, in *policy.Input) policy.Decision {
	args, err := record(in.Args)
	if err != nil {
		return policy.Failed("cedar", err)
	}
	entities := cedar.EntityMap{}
	request := cedar.Request{
		Principal: addPrincipal(entities, in.Principal), Action: actionOf(in.Capability), Resource: addResource(entities, in.Capability),
		Context: p.context(args, in.Now),
	}
	decision, why := cedar.Authorize(p.set, entities, request)
	if len(why.Errors) > 0 {
		e := why.Errors[0]
		return policy.Failed(string(e.PolicyID), fmt.Errorf("%s:%d: %s", e.Position.Filename, e.Position.Line, e.Message))
	}
	rule := policy.ByDefault
	approve := len(why.Reasons) > 0
	reason := "no policy permits this"
	slices.SortFunc(why.Reasons, func(a, b cedar.DiagnosticReason) int { return cmp.Compare(a.PolicyID, b.PolicyID) }) // they come from a map
	for _, r := range why.Reasons {
		annotations := p.set.Get(r.PolicyID).Annotations()
		_, asks := annotations[approval]
		if rule == policy.ByDefault || approve && !asks {
			rule = string(r.PolicyID)
			reason = cmp.Or(string(annotations[reasonOf]), "a policy forbids this")
		}
		approve = approve && asks
	}
	switch {
	case decision == cedar.Deny:
		return policy.Decision{Verdict: policy.Deny, Rule: rule, Reason: reason}
	case approve:
		return policy.Decision{Verdict: policy.Approve, Rule: rule}
	}
	return policy.Decision{Verdict: policy.Allow, Rule: rule}
}

// Visible implements policy.Decider.
func (p *Policies) Visible(ctx context.Context, who *call.Principal, all []*call.Capability, now time.Time) (map[*call.Capability]bool, error) {
	seen := map[*call.Capability]bool{}
	entities := cedar.EntityMap{}
	principal := addPrincipal(entities, who)
	byAction := map[cedar.EntityUID][]cedar.Value{}
	meant := map[cedar.EntityUID]*call.Capability{}
	for _, c := range all {
		uid := addResource(entities, c)
		byAction[actionOf(c)] = append(byAction[actionOf(c)], uid)
		meant[uid] = c
	}
	for action, resources := range byAction {
		request := batch.Request{
			Principal: principal, Action: action, Resource: batch.Variable("resource"), Context: p.context(batch.Ignore(), now),
			Variables: batch.Variables{"resource": resources},
		}
		err := batch.Authorize(ctx, p.set, entities, request, func(r batch.Result) error {
			if r.Decision == cedar.Allow && len(r.Diagnostic.Errors) == 0 {
				seen[meant[r.Request.Resource]] = true
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	return seen, nil
}

func (p *Policies) context(args cedar.Value, now time.Time) cedar.Record {
	return cedar.NewRecord(cedar.RecordMap{"args": args, "environment": cedar.String(p.environment), "now": cedar.NewDatetime(now)})
}

func actionOf(c *call.Capability) cedar.EntityUID {
	return cedar.NewEntityUID("Action", map[call.Kind]cedar.String{call.Tool: "call", call.Resource: "read", call.Prompt: "get"}[c.Kind])
}

func addPrincipal(entities cedar.EntityMap, p *call.Principal) cedar.EntityUID {
	if p == nil { // identities are not configured
		p = &call.Principal{}
	}
	parents := []cedar.EntityUID{}
	for _, role := range p.Roles {
		parents = append(parents, cedar.NewEntityUID("Role", cedar.String(role)))
	}
	if p.Tenant != "" {
		parents = append(parents, cedar.NewEntityUID("Tenant", cedar.String(p.Tenant)))
	}
	for _, parent := range parents {
		entities[parent] = cedar.Entity{UID: parent}
	}
	uid := cedar.NewEntityUID("User", cedar.String(p.ID))
	entities[uid] = cedar.Entity{UID: uid, Parents: cedar.NewEntityUIDSet(parents...), Attributes: cedar.NewRecord(cedar.RecordMap{
		"id": cedar.String(p.ID), "tenant": cedar.String(p.Tenant), "client": cedar.String(p.Client), "scopes": texts(p.Scopes), "roles": texts(p.Roles),
	})}
	return uid
}

func addResource(entities cedar.EntityMap, c *call.Capability) cedar.EntityUID {
	kind := map[call.Kind]cedar.EntityType{call.Tool: "Tool", call.Resource: "Resource", call.Prompt: "Prompt"}[c.Kind]
	uid := cedar.NewEntityUID(kind, cedar.String(policy.NameOf(c)))
	entities[uid] = cedar.Entity{UID: uid, Attributes: cedar.NewRecord(cedar.RecordMap{
		"name": uid.ID, "effect": cedar.String(policy.EffectOf(c)), "owner": cedar.String(c.Owner), "tags": texts(c.Tags),
	})}
	return uid
}

func texts(list []string) cedar.Set {
	values := make([]cedar.Value, len(list))
	for i, s := range list {
		values[i] = cedar.String(s)
	}
	return cedar.NewSet(values...)
}

// record makes a record of arguments.
func record(args jsontext.Value) (cedar.Value, error) {
	if args == nil {
		return cedar.NewRecord(nil), nil
	}
	v, err := value(jsontext.NewDecoder(bytes.NewReader(args)))
	if err != nil {
		return nil, err
	}
	if _, is := v.(cedar.Record); !is {
		return nil, errors.New("the arguments are not an object")
	}
	return v, nil
}

// value makes a value of what comes next. Cedar knows neither null nor numbers with a point: members
// that are null are left out, and numbers that are not whole become decimals of four digits, or
// the text of the number if it has more.
func value(d *jsontext.Decoder) (cedar.Value, error) {
	t, err := d.ReadToken()
	if err != nil {
		return nil, err
	}
	switch t.Kind() {
	case '"':
		return cedar.String(t.String()), nil
	case 't', 'f':
		return cedar.Boolean(t.Bool()), nil
	case '0':
		text := t.String()
		if i, err := strconv.ParseInt(text, 10, 64); err == nil {
			return cedar.Long(i), nil
		}
		if n, err := types.ParseDecimal(text); err == nil {
			return n, nil
		}
		return cedar.String(text), nil
	case '{':
		m := cedar.RecordMap{}
		for d.PeekKind() != '}' {
			name, err := d.ReadToken()
			if err != nil {
				return nil, err
			}
			key := cedar.String(name.String()) // the token is gone with the next one
			v, err := value(d)
			if err != nil {
				return nil, err
			}
			if v != nil {
				m[key] = v
			}
		}
		_, err := d.ReadToken()
		return cedar.NewRecord(m), err
	case '[':
		var list []cedar.Value
		for d.PeekKind() != ']' {
			v, err := value(d)
			if err != nil {
				return nil, err
			}
			if v != nil {
				list = append(list, v)
			}
		}
		_, err := d.ReadToken()
		return cedar.NewSet(list...), err
	}
	return nil, nil
}
