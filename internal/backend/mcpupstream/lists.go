package mcpupstream

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/catalog"
)

// Bounds of what one server lists.
const (
	maxPages       = 200
	maxDefinitions = 10_000
)

// kinds of lists: their method, and which member of the result holds the definitions.
var listKinds = []struct {
	method string
	has    func(*features) bool
	items  func(*result) jsontext.Value
}{
	{"tools/list", func(f *features) bool { return f.Tools != nil }, func(r *result) jsontext.Value { return r.Tools }},
	{"resources/list", func(f *features) bool { return f.Resources != nil }, func(r *result) jsontext.Value { return r.Resources }},
	{"resources/templates/list", func(f *features) bool { return f.Resources != nil }, func(r *result) jsontext.Value { return r.Templates }},
	{"prompts/list", func(f *features) bool { return f.Prompts != nil }, func(r *result) jsontext.Value { return r.Prompts }},
}

// refresh reads all lists and publishes them. It reports whether anything is different.
func (u *Upstream) refresh(ctx context.Context) (different bool, err error) {
	caps, missing, err := u.list(ctx)
	u.mu.Lock()
	defer u.mu.Unlock()
	u.problem = ""
	if err != nil {
		u.problem = explain(err)
		if len(missing) == len(listKinds) {
			return false, err
		}
	}
	for _, c := range u.published { // of the lists that could not be read, the last ones stay
		if slices.Contains(missing, listOf(c)) {
			caps = append(caps, c)
		}
	}
	different = !u.listed || !slices.EqualFunc(caps, u.published, func(a, b *call.Capability) bool { return bytes.Equal(a.Definition, b.Definition) })
	u.listed = true
	if different {
		u.published = caps // otherwise the old ones stay: what was compiled for them still holds
	}
	return different, err
}

// listOf returns the method that lists a capability.
func listOf(c *call.Capability) string {
	switch {
	case c.Kind == call.Tool:
		return "tools/list"
	case c.Kind == call.Prompt:
		return "prompts/list"
	case c.Template != "":
		return "resources/templates/list"
	}
	return "resources/list"
}

// list reads all lists; missing names those that could not be read, err says why.
func (u *Upstream) list(ctx context.Context) (caps []*call.Capability, missing []string, err error) {
	for _, k := range listKinds {
		missing = append(missing, k.method)
	}
	s, done, err := u.lease(ctx, nil)
	if err != nil {
		return nil, missing, err
	}
	defer done()
	missing = missing[:0]
	var problems []error
	var fresh time.Duration
	for _, k := range listKinds {
		if !k.has(&s.server) {
			continue
		}
		var of []*call.Capability
		ttl, err := u.pages(ctx, s, k.method, k.items, func(def jsontext.Value) {
			c, err := u.capability(s, k.method, def)
			if err != nil {
				u.log.LogAttrs(ctx, slog.LevelWarn, "a definition is left out", slog.String("list", k.method), slog.String("error", err.Error()))
			} else if c != nil {
				of = append(of, c)
			}
		})
		var rpc *rpcError
		if errors.As(err, &rpc) && rpc.Code == -32601 && k.method == "resources/templates/list" {
			err = nil // many servers with resources have no such method
		}
		if err != nil {
			problems = append(problems, fmt.Errorf("%s: %w", k.method, err))
			missing = append(missing, k.method)
			continue
		}
		caps = append(caps, of...)
		if fresh == 0 || ttl != 0 && ttl < fresh {
			fresh = ttl
		}
	}
	u.mu.Lock()
	if u.fresh = 0; !tells(&s.server) {
		u.fresh = fresh
	}
	u.mu.Unlock()
	return caps, missing, errors.Join(problems...)
}

// leastFresh bounds how soon a server can have its lists read again.
const leastFresh = time.Second

// pages reads one list to its end, and returns for how long it is good; 0: the server says nothing. A
// list without end is an error, not an endless wait.
func (u *Upstream) pages(ctx context.Context, s *session, method string, items func(*result) jsontext.Value, add func(jsontext.Value)) (fresh time.Duration, err error) {
	cursor, total := "", 0
	seen := map[string]bool{}
	for range maxPages {
		p := newObject()
		if cursor != "" {
			p.str("cursor", cursor)
		}
		if s.stateless {
			p.raw("_meta", u.meta(nil, noCapabilities, 0))
		}
		m, err := s.request(ctx, &request{id: s.ids.Add(1), method: method, params: p.end()}, u.heard)
		switch {
		case err != nil:
			return 0, err
		case m.Error != nil:
			return 0, m.Error
		}
		if ms, err := strconv.ParseInt(string(m.Result.TTL), 10, 64); err == nil && ms > 0 {
			ttl := max(time.Duration(min(ms, maxTTL.Milliseconds()))*time.Millisecond, leastFresh)
			if fresh == 0 || ttl < fresh {
				fresh = ttl
			}
		}
		err = call.EachElement(items(m.Result), func(v jsontext.Value) {
			if total++; total <= maxDefinitions {
				add(v.Clone())
			}
		})
		switch {
		case err != nil:
			return 0, fmt.Errorf("%w: the list is missing or of the wrong form", errGarbage)
		case total > maxDefinitions:
			return 0, fmt.Errorf("more than %d definitions", maxDefinitions)
		case m.Result.Next == "":
			return fresh, nil
		case seen[m.Result.Next]:
			return 0, errors.New("the list has no end: a cursor came back")
		}
		cursor = m.Result.Next
		seen[cursor] = true
	}
	return 0, fmt.Errorf("the list has more than %d pages", maxPages)
}

// definition is what of a listed definition the gateway looks at.
type definition struct {
	Name        string         `json:"name"`
	Title       string         `json:"title"`
	Description string         `json:"description"`
	URI         string         `json:"uri"`
	Template    string         `json:"uriTemplate"`
	MIME        string         `json:"mimeType"`
	Input       jsontext.Value `json:"inputSchema"`
	Output      jsontext.Value `json:"outputSchema"`
	Annotations jsontext.Value `json:"annotations"`
	Execution   struct {
		Tasks string `json:"taskSupport"`
	} `json:"execution"`
	Arguments []struct {
		Name     string `json:"name"`
		Required bool   `json:"required"`
	} `json:"arguments"`
}

// capability makes a capability of a definition, or returns nil for what is not published.
func (u *Upstream) capability(s *session, method string, def jsontext.Value) (*call.Capability, error) {
	var d definition
	if err := json.Unmarshal(def, &d); err != nil {
		return nil, fmt.Errorf("%w: %w", errGarbage, err)
	}
	c := &call.Capability{
		Name: d.Name, Title: d.Title, Description: d.Description, MIME: d.MIME, Owner: u.name,
		Origin: "server " + u.name, Effect: call.Read, MaxResultBytes: 0,
	}
	if !u.config.PerUser {
		c.Depends = call.OnRequest // what the house does not know of a request is passed on
	}
	t := &target{u: u, name: d.Name, read: true}
	c.Run = t.run
	switch method {
	case "tools/list":
		return u.tool(s, c, t, &d, def)
	case "prompts/list":
		c.Kind, t.kind, t.method = call.Prompt, call.Prompt, "prompts/get"
		c.Name = u.config.Prefix + d.Name
		for _, a := range d.Arguments {
			c.Arguments = append(c.Arguments, call.Argument{Name: a.Name, Required: a.Required})
		}
		c.Definition = rewrite(def, map[string]jsontext.Value{"name": quoted(c.Name)})
		if s.server.Completions != nil {
			c.Suggest = t.suggester("ref/prompt", "name")
		}
		return c, nil
	}
	c.Kind, t.kind, t.method, c.URI, c.Template = call.Resource, call.Resource, "resources/read", d.URI, d.Template
	c.Definition = def
	if d.Template != "" && s.server.Completions != nil {
		t.name = d.Template
		c.Suggest = t.suggester("ref/resource", "uri")
	}
	return c, nil
}

func quoted(s string) jsontext.Value { return call.AppendString(nil, s) }

// tool makes the capability of a tool as its rule says.
func (u *Upstream) tool(s *session, c *call.Capability, t *target, d *definition, def jsontext.Value) (*call.Capability, error) {
	rule, publish := u.config.rule(d.Name)
	if !publish {
		return nil, nil
	}
	c.Kind, t.kind, t.method = call.Tool, call.Tool, "tools/call"
	c.Name = u.config.Prefix + d.Name
	if rule.As != "" {
		c.Name = rule.As
	}
	changes := map[string]jsontext.Value{"name": quoted(c.Name)}
	switch {
	case rule.Description != "":
		c.Description = rule.Description
		changes["description"] = quoted(c.Description)
	case d.Description == "":
		c.Description = fmt.Sprintf("The tool %s of %s.", d.Name, u.name) // clients and models need one
		changes["description"] = quoted(c.Description)
	}
	c.Input, c.Output, c.Scopes = d.Input, d.Output, rule.Scopes
	if len(rule.Fixed)+len(rule.Hidden) > 0 {
		var err error
		if c.Input, err = without(d.Input, rule); err != nil {
			return nil, fmt.Errorf("tool %q: %w", d.Name, err)
		}
		changes["inputSchema"] = c.Input
		if t.fixed, err = json.Marshal(rule.Fixed, json.Deterministic(true)); err != nil {
			return nil, fmt.Errorf("tool %q: fixed: %w", d.Name, err)
		}
	}
	headers, err := catalog.ParamHeaders(d.Input)
	if err != nil {
		return nil, fmt.Errorf("tool %q: %w", d.Name, err)
	}
	t.headers = headers
	c.Effect = effect(rule.Effect, d.Annotations)
	t.read = c.Effect == call.Read
	c.Annotations = d.Annotations
	if s.stateless && s.server.Extensions.Tasks != nil {
		c.Tasks, _ = call.ParseTaskSupport(d.Execution.Tasks) // another word means nothing
		t.tasks, c.Follow = true, t.follow
	}
	c.Definition = rewrite(def, changes)
	return c, nil
}

// effect is what the operator says, otherwise what the annotations say; they are hints, so what
// they do not say counts as destructive (MCP, server/tools, annotations).
func effect(said string, annotations jsontext.Value) call.Effect {
	for _, e := range []call.Effect{call.Read, call.Write, call.Destructive} {
		if said == e.String() {
			return e
		}
	}
	var a struct {
		ReadOnly    bool  `json:"readOnlyHint"`
		Destructive *bool `json:"destructiveHint"`
	}
	if annotations != nil && json.Unmarshal(annotations, &a) != nil {
		return call.Destructive
	}
	switch {
	case a.ReadOnly:
		return call.Read
	case a.Destructive != nil && !*a.Destructive:
		return call.Write
	}
	return call.Destructive
}

// rewrite returns a definition with some members changed in place; missing ones are added at its
// end. Every other byte stays.
func rewrite(def jsontext.Value, changes map[string]jsontext.Value) jsontext.Value {
	o := newObject()
	done := map[string]bool{}
	_ = call.EachMember(def, func(name string, v jsontext.Value) { // an object: it was decoded
		if c, ok := changes[name]; ok {
			v, done[name] = c, true
		}
		o.raw(name, v)
	})
	for _, name := range []string{"name", "description", "inputSchema"} {
		if c, ok := changes[name]; ok && !done[name] {
			o.raw(name, c)
		}
	}
	return o.end()
}

// without returns an input schema without the arguments that callers do not send.
func without(schema jsontext.Value, rule Tool) (jsontext.Value, error) {
	gone := slices.Clone(rule.Hidden)
	for name := range rule.Fixed {
		gone = append(gone, name)
	}
	known := map[string]bool{}
	o := newObject()
	var failure error
	err := call.EachMember(schema, func(name string, v jsontext.Value) {
		switch name {
		case "properties":
			props := newObject()
			_ = call.EachMember(v, func(name string, v jsontext.Value) {
				known[name] = true
				if !slices.Contains(gone, name) {
					props.raw(name, v)
				}
			})
			v = props.end()
		case "required":
			kept := []byte{'['}
			_ = call.EachElement(v, func(e jsontext.Value) {
				var n string
				if json.Unmarshal(e, &n) != nil || slices.Contains(gone, n) {
					if slices.Contains(rule.Hidden, n) {
						failure = fmt.Errorf("the argument %q is required and cannot be hidden; give it a fixed value", n)
					}
					return
				}
				if len(kept) > 1 {
					kept = append(kept, ',')
				}
				kept = append(kept, e...)
			})
			v = append(kept, ']')
		}
		o.raw(name, v)
	})
	if err != nil {
		return nil, err
	}
	for _, g := range gone {
		if !known[g] {
			return nil, fmt.Errorf("it has no argument %q to fix or hide", g)
		}
	}
	return o.end(), failure
}

// explain shortens an error for a status line.
func explain(err error) string {
	s := err.Error()
	if len(s) > 300 {
		s = strings.ToValidUTF8(s[:300], "") + "…"
	}
	return s
}
