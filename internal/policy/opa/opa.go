// Package opa asks an Open Policy Agent, over its data API, who may call what.
//
// Start reading at [Agent.Decide]. The agent gets this as input, and answers with true or false, or
// with an object {"verdict": "allow|deny|require_approval", "rule": "…", "reason": "…"}:
//
//	{"principal": {"id", "tenant", "client", "scopes", "roles"},
//	 "capability": {"kind", "name", "effect", "owner", "tags"}, "args": {…}, "environment": "…", "now": "…"}
//
// For lists it gets "capabilities", all at once and without arguments, and answers with the names of
// those that the caller may be allowed to use.
// Without a document for lists they show what scopes and rules allow.
//
// An agent that is away, slow, answers nothing or something else denies. It costs a round trip.
package opa

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/policy"
	"newel.dev/newel/internal/secret"
)

// Options configure an Agent. URL, Document and HTTP are required.
type Options struct {
	URL          string        // of the agent, such as http://127.0.0.1:8181
	Document     string        // that decides a call, such as newel/decision
	ListDocument string        // that says what lists show; "": it is not asked
	Token        secret.String // bearer token for the agent, or none
	Timeout      time.Duration // of one question [1 s]
	Environment  string
	HTTP         *http.Client
}

// An Agent is an OPA. It is safe for concurrent use.
type Agent struct {
	o            Options
	decide, list string // addresses
}

var _ policy.Decider = (*Agent)(nil)

// maxAnswer bounds what is read of an answer, in bytes.
const maxAnswer = 1 << 20

// New checks the options.
func New(o Options) (*Agent, error) {
	u, err := url.Parse(o.URL)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return nil, fmt.Errorf("opa: %q is not the address of an agent, such as http://127.0.0.1:8181", o.URL)
	}
	if o.Document == "" || o.HTTP == nil {
		return nil, errors.New("opa: Document and HTTP are required")
	}
	if o.Timeout <= 0 {
		o.Timeout = time.Second
	}
	at := func(document string) string {
		return u.JoinPath("v1", "data", strings.ReplaceAll(strings.Trim(document, "/"), ".", "/")).String()
	}
	a := &Agent{o: o, decide: at(o.Document)}
	if o.ListDocument != "" {
		a.list = at(o.ListDocument)
	}
	return a, nil
}

type (
	principal struct {
		ID     string   `json:"id"`
		Tenant string   `json:"tenant"`
		Client string   `json:"client"`
		Scopes []string `json:"scopes"`
		Roles  []string `json:"roles"`
	}
	capability struct {
		Kind   string   `json:"kind"`
		Name   string   `json:"name"`
		Effect string   `json:"effect"`
		Owner  string   `json:"owner"`
		Tags   []string `json:"tags"`
	}
	question struct {
		Principal    principal      `json:"principal"`
		Capability   *capability    `json:"capability,omitzero"`
		Capabilities []capability   `json:"capabilities,omitzero"`
		Args         jsontext.Value `json:"args,omitzero"`
		Environment  string         `json:"environment"`
		Now          time.Time      `json:"now"`
	}
)

func (a *Agent) about(p *call.Principal, now time.Time) question {
	if p == nil { // identities are not configured
		p = &call.Principal{}
	}
	return question{Principal: principal(*p), Environment: a.o.Environment, Now: now}
}

func describe(c *call.Capability) capability {
	return capability{Kind: c.Kind.String(), Name: policy.NameOf(c), Effect: policy.EffectOf(c), Owner: c.Owner, Tags: c.Tags}
}

// Decide implements policy.Decider.
func (a *Agent) Decide(ctx context.Context, in *policy.Input) policy.Decision {
	q := a.about(in.Principal, in.Now)
	c := describe(in.Capability)
	q.Capability, q.Args = &c, in.Args
	if q.Args == nil {
		q.Args = jsontext.Value("{}")
	}
	result, err := a.ask(ctx, a.decide, q)
	if err != nil {
		return policy.Failed("opa", err)
	}
	var said struct {
		Verdict string `json:"verdict"`
		Rule    string `json:"rule"`
		Reason  string `json:"reason"`
	}
	switch result.Kind() {
	case 't':
		said.Verdict = policy.Allow.String()
	case 'f':
		said.Verdict = policy.Deny.String()
	case '{':
		if err := json.Unmarshal(result, &said); err != nil {
			return policy.Failed("opa", err)
		}
	}
	d := policy.Decision{Rule: "opa"}
	if said.Rule != "" {
		d.Rule = "opa: " + said.Rule
	}
	switch said.Verdict {
	case policy.Allow.String():
		d.Verdict = policy.Allow
	case policy.Approve.String():
		d.Verdict = policy.Approve
	case policy.Deny.String():
		if d.Reason = said.Reason; d.Reason == "" {
			d.Reason = "a policy denies this"
		}
	default:
		return policy.Failed("opa", fmt.Errorf("the document %s is neither true nor false, and its verdict is %q", a.o.Document, said.Verdict))
	}
	return d
}

// Visible implements policy.Decider.
func (a *Agent) Visible(ctx context.Context, who *call.Principal, all []*call.Capability, now time.Time) (map[*call.Capability]bool, error) {
	seen := make(map[*call.Capability]bool, len(all))
	if a.list == "" {
		for _, c := range all {
			seen[c] = true
		}
		return seen, nil
	}
	q := a.about(who, now)
	q.Capabilities = make([]capability, len(all))
	for i, c := range all {
		q.Capabilities[i] = describe(c)
	}
	result, err := a.ask(ctx, a.list, q)
	if err != nil {
		return nil, err
	}
	var names []string
	if err := json.Unmarshal(result, &names); err != nil {
		return nil, fmt.Errorf("opa: the document %s is not a list of names: %w", a.o.ListDocument, err)
	}
	shown := make(map[string]bool, len(names))
	for _, n := range names {
		shown[n] = true
	}
	for i, c := range all {
		if shown[q.Capabilities[i].Name] {
			seen[c] = true
		}
	}
	return seen, nil
}

// ask returns the document at an address for an input.
func (a *Agent) ask(ctx context.Context, address string, q question) (jsontext.Value, error) {
	body, err := json.Marshal(map[string]any{"input": q})
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, a.o.Timeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, address, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", "application/json")
	if t := a.o.Token.Reveal(); t != "" {
		req.Header.Set("Authorization", "Bearer "+t)
	}
	resp, err := a.o.HTTP.Do(req)
	if err != nil {
		return nil, fmt.Errorf("opa: %w", err)
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	switch {
	case err != nil:
		return nil, fmt.Errorf("opa: %w", err)
	case resp.StatusCode != http.StatusOK:
		return nil, fmt.Errorf("opa: %s answers with status %d", address, resp.StatusCode)
	case len(raw) > maxAnswer:
		return nil, fmt.Errorf("opa: the answer is larger than %d bytes", maxAnswer)
	}
	var answer struct {
		Result jsontext.Value `json:"result"`
	}
	if err := json.Unmarshal(raw, &answer); err != nil {
		return nil, fmt.Errorf("opa: %w", err)
	}
	if answer.Result == nil {
		return nil, fmt.Errorf("opa: %s is not defined for this input", address)
	}
	return answer.Result, nil
}
