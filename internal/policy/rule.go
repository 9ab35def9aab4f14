package policy

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"path"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common/ast"
	"cel.dev/cel-go/common/cost"
	"cel.dev/cel-go/common/types"
	"cel.dev/cel-go/common/types/ref"
	"cel.dev/cel-go/ext"
	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
)

// A Rule says what it is about and what follows. Empty lists are about everything; all that is
// given has to fit.
type Rule struct {
	Name         string   `yaml:"name" required:"true" doc:"Name of the rule, as records and explanations show it."`
	Then         string   `yaml:"then" enum:"allow,deny,require_approval" required:"true" doc:"What follows when the rule fits. Deny overrides require_approval, which overrides allow."`
	Tools        []string `yaml:"tools" doc:"Names of tools and prompts, or URIs of resources; * stands for any text."`
	Kinds        []string `yaml:"kinds" doc:"tool, resource or prompt."`
	Effects      []string `yaml:"effects" doc:"read, write or destructive: what the tool does to the world."`
	Tenants      []string `yaml:"tenants" doc:"Tenants of the caller."`
	Roles        []string `yaml:"roles" doc:"Roles, of which the caller needs one."`
	Environments []string `yaml:"environments" doc:"Environments, such as production."`
	When         string   `yaml:"when" doc:"Condition in CEL over principal, capability, args, environment and now."`
	Reason       string   `yaml:"reason" doc:"What a caller who is denied is told."`

	Approvers []string      `yaml:"approvers" doc:"For require_approval: roles, of which whoever approves needs one. Without any, only operators approve: with newel approvals, or through the webhook."`
	Expires   time.Duration `yaml:"expires" doc:"For require_approval: how long a decision is waited for, and how long it counts; default: 15m, at most 168h. After that it is a no."`
	Self      bool          `yaml:"self" doc:"For require_approval: whether callers may approve their own calls; their client is asked, if it can be. Otherwise somebody else has to."`
	Count     int           `yaml:"count" doc:"For require_approval: how many people have to say yes; default: 1, at most 16. One who says no is enough."`
}

// A Set is rules and what they stand in.
type Set struct {
	Environment string
	ReadOnly    bool
	Rules       []Rule
	Also        []Decider // asked after the rules about what they do not deny; all have to allow
}

// Production is the environment in which destructive tools are denied unless a rule names them.
const Production = "production"

// Bounds of one condition.
const (
	maxCondition = 4 << 10 // bytes
	maxCost      = 20_000  // units of CEL; reading an argument is one
	shortCost    = 200     // at most: it is over before anybody could want it to end
)

type rule struct {
	Rule
	name, reason string
	verdict      Verdict
	terms        Terms
	patterns     []pattern       // of Tools
	condition    cel.Program     // nil: always
	short        bool            // the condition ends soon, whatever it looks at
	reads        map[string]bool // variables that the condition looks at
	sees         sight
}

// pattern is a name in which * stands for any text, slashes too.
type pattern struct {
	literal string // what stands before anything special
	exact   bool   // there is nothing else
	any     bool   // there is one * behind, and nothing else
	whole   string // for path.Match, to which a slash has a meaning
}

func newPattern(text string) (pattern, error) {
	if _, err := path.Match(text, ""); err != nil {
		return pattern{}, fmt.Errorf("%q is not a pattern", text)
	}
	i := strings.IndexAny(text, `*?[\`)
	if i < 0 {
		return pattern{literal: text, exact: true}, nil
	}
	return pattern{literal: text[:i], any: text[i:] == "*", whole: strings.ReplaceAll(text, "/", "\x00")}, nil
}

func (p *pattern) fits(name string) bool {
	switch {
	case p.exact:
		return p.literal == name
	case !strings.HasPrefix(name, p.literal):
		return false
	case p.any:
		return true
	}
	ok, _ := path.Match(p.whole, strings.ReplaceAll(name, "/", "\x00")) // checked when compiled
	return ok
}

// names reports whether the pattern says anything about the name.
func (p *pattern) names() bool { return p.exact || strings.Trim(p.whole, "*") != "" }

func (r *rule) fits(name string) bool {
	for i := range r.patterns {
		if r.patterns[i].fits(name) {
			return true
		}
	}
	return len(r.patterns) == 0
}

// namesTool reports whether a rule names a tool, and does not only mean all.
func (r *rule) namesTool(name string) bool {
	return slices.ContainsFunc(r.patterns, func(p pattern) bool { return p.fits(name) && p.names() })
}

// Principal and Capability are what conditions see.
type (
	principalView struct {
		ID     string   `cel:"id"`
		Tenant string   `cel:"tenant"`
		Client string   `cel:"client"`
		Scopes []string `cel:"scopes"`
		Roles  []string `cel:"roles"`
	}
	capabilityView struct {
		Name   string   `cel:"name"`
		Kind   string   `cel:"kind"`
		Effect string   `cel:"effect"`
		Owner  string   `cel:"owner"`
		Tags   []string `cel:"tags"`
	}
)

func environment() (*cel.Env, error) {
	return cel.NewEnv(
		ext.NativeTypes(ext.ParseStructTags(true), reflect.TypeFor[*principalView](), reflect.TypeFor[*capabilityView]()),
		cel.Variable("principal", cel.ObjectType("policy.principalView")),
		cel.Variable("capability", cel.ObjectType("policy.capabilityView")),
		cel.Variable("args", cel.MapType(cel.StringType, cel.DynType)),
		cel.Variable("environment", cel.StringType),
		cel.Variable("now", cel.TimestampType),
		cel.ParserExpressionSizeLimit(maxCondition),
	)
}

// Compile checks and compiles a set. The error joins all problems; each names its rule, and a
// condition's the place in it. problem, if not nil, is given the index of the rule instead.
func Compile(s Set) (*Policy, []error) {
	env := sync.OnceValues(environment) // most of the cost of a set without conditions
	p := &Policy{environment: s.Environment, readOnly: s.ReadOnly, also: s.Also, version: versionOf(&s), sees: seesScopes}
	var problems []error
	names := map[string]bool{ByScopes: true, ByReadOnly: true, ByDefault: true}
	for i, given := range s.Rules {
		r, err := compile(env, given)
		if err == nil && names[given.Name] {
			err = errors.New("the name is taken")
		}
		if err != nil {
			problems = append(problems, &Problem{Index: i, Rule: given.Name, Err: err})
			continue
		}
		names[given.Name] = true
		p.rules = append(p.rules, r)
		p.sees |= r.sees
	}
	slices.SortStableFunc(p.rules, func(a, b *rule) int { return cmp.Compare(a.verdict, b.verdict) })
	return p, problems
}

// A Problem is a rule that cannot be used.
type Problem struct {
	Index int
	Rule  string
	Err   error
}

// Error names the rule.
func (p *Problem) Error() string { return fmt.Sprintf("rule %q: %v", p.Rule, p.Err) }

// Unwrap returns what is wrong.
func (p *Problem) Unwrap() error { return p.Err }

func compile(environment func() (*cel.Env, error), given Rule) (*rule, error) {
	r := &rule{Rule: given, name: given.Name, reason: cmp.Or(given.Reason, "a rule of the policy denies this")}
	i := slices.Index(verdictNames[:], given.Then)
	if i < 0 {
		return nil, fmt.Errorf("then must be allow, deny or require_approval, not %q", given.Then)
	}
	r.verdict = Verdict(i) //nolint:gosec // an index of three
	var err error
	if r.terms, err = termsOf(&given, r.verdict); err != nil {
		return nil, err
	}
	for _, text := range given.Tools {
		p, err := newPattern(text)
		if err != nil {
			return nil, err
		}
		r.patterns = append(r.patterns, p)
	}
	for _, k := range given.Kinds {
		if _, ok := kinds[k]; !ok {
			return nil, fmt.Errorf("kinds are tool, resource and prompt, not %q", k)
		}
	}
	for _, e := range given.Effects {
		if _, ok := effects[e]; !ok {
			return nil, fmt.Errorf("effects are read, write and destructive, not %q", e)
		}
	}
	if len(given.Tenants) > 0 {
		r.sees |= seesTenant
	}
	if len(given.Roles) > 0 {
		r.sees |= seesRoles
	}
	if given.When == "" {
		return r, nil
	}
	env, err := environment()
	if err != nil {
		return nil, err
	}
	checked, issues := env.Compile(given.When)
	if issues.Err() != nil {
		var all []string
		for _, e := range issues.Errors() {
			all = append(all, fmt.Sprintf("when, line %d, column %d: %s", e.Location.Line(), e.Location.Column()+1, e.Message))
		}
		return nil, errors.New(strings.Join(all, "; "))
	}
	if !checked.OutputType().IsExactType(cel.BoolType) {
		return nil, fmt.Errorf("when must be true or false, not of type %v", checked.OutputType())
	}
	r.reads = map[string]bool{}
	for _, ref := range checked.NativeRep().ReferenceMap() {
		if len(ref.OverloadIDs) == 0 { // not a function
			r.reads[ref.Name] = true
		}
	}
	r.sees |= sightOf(checked)
	options := []cel.ProgramOption{cel.EvalOptions(cel.OptPartialEval, cel.OptOptimize), cel.InterruptCheckFrequency(100)}
	most, err := env.EstimateCost(checked, unknownSizes{})
	if err != nil || most.Max > maxCost {
		options = append(options, cel.CostLimit(maxCost)) // counting has its own cost
	}
	r.short = err == nil && most.Max <= shortCost
	r.condition, err = env.Program(checked, options...)
	return r, err
}

// sightOf returns what a condition looks at of a caller: the fields that it selects, or all of them
// where it does anything else with the caller.
func sightOf(a *cel.Ast) sight {
	var s sight
	whole, selected := 0, 0
	root := ast.NavigateAST(a.NativeRep())
	for _, e := range ast.MatchDescendants(root, ast.AllMatcher()) {
		switch e.Kind() {
		case ast.IdentKind:
			switch e.AsIdent() {
			case "principal":
				whole++
			case "now":
				s |= seesTime
			}
		case ast.SelectKind:
			of := e.AsSelect()
			if of.Operand().Kind() == ast.IdentKind && of.Operand().AsIdent() == "principal" && fields[of.FieldName()] != 0 {
				s |= fields[of.FieldName()]
				selected++
			}
		}
	}
	if whole != selected {
		s |= seesAll
	}
	return s
}

// termsOf are the terms of a rule, with what it leaves out.
func termsOf(given *Rule, v Verdict) (Terms, error) {
	t := Terms{Approvers: given.Approvers, Count: given.Count, Self: given.Self, Expires: given.Expires}
	switch {
	case v != Approve && (len(t.Approvers) > 0 || t.Count != 0 || t.Self || t.Expires != 0):
		return Terms{}, errors.New("approvers, expires, self and count belong to require_approval")
	case v != Approve:
		return Terms{}, nil
	case t.Expires < 0 || t.Expires > MaxExpires:
		return Terms{}, fmt.Errorf("expires must be above 0 and at most %v", MaxExpires)
	case t.Count < 0 || t.Count > MaxCount:
		return Terms{}, fmt.Errorf("count must be from 1 to %d", MaxCount)
	case slices.Contains(t.Approvers, ""):
		return Terms{}, errors.New("a role of approvers is empty")
	}
	t.Count, t.Expires = cmp.Or(t.Count, 1), cmp.Or(t.Expires, DefaultExpires)
	return t, nil
}

// versionOf is a digest of everything that decides.
func versionOf(s *Set) string {
	h := sha256.New()
	fmt.Fprintf(h, "%q %v %#v", s.Environment, s.ReadOnly, s.Rules) // values without pointers, all quoted
	for _, d := range s.Also {
		text := "asked at every call"
		if v, ok := d.(interface{ Version() string }); ok {
			text = v.Version()
		}
		fmt.Fprintf(h, " %q", text)
	}
	return hex.EncodeToString(h.Sum(nil)[:16])
}

// match is how a rule meets an input.
type match uint8

const (
	no match = iota
	maybe
	yes
)

func (m match) String() string { return [...]string{"no", "maybe", "yes"}[m] }

// view is an input as rules look at it.
type view struct {
	policy *Policy
	in     *Input
	name   string         // of the capability
	args   map[string]any // decoded when the first condition looks at them
}

// match holds a rule against the input. why says what did not fit.
func (v *view) match(ctx context.Context, r *rule) (m match, why string, err error) {
	c, p := v.in.Capability, v.in.Principal
	if p == nil {
		p = &call.Principal{}
	}
	switch {
	case !r.fits(v.name):
		return no, "the name does not fit", nil
	case len(r.Kinds) > 0 && !slices.ContainsFunc(r.Kinds, func(k string) bool { return kinds[k] == c.Kind }):
		return no, "the kind does not fit", nil
	case len(r.Effects) > 0 && !slices.Contains(r.Effects, EffectOf(c)):
		return no, "the effect is " + EffectOf(c), nil
	case len(r.Tenants) > 0 && !slices.Contains(r.Tenants, p.Tenant):
		return no, "the tenant is another", nil
	case len(r.Environments) > 0 && !slices.Contains(r.Environments, v.policy.environment):
		return no, "the environment is " + strconv.Quote(v.policy.environment), nil
	case len(r.Roles) > 0 && !slices.ContainsFunc(r.Roles, func(role string) bool { return slices.Contains(p.Roles, role) }):
		return no, "the caller has none of the roles", nil
	case r.verdict == Allow && v.policy.environment == Production && c.Kind == call.Tool && EffectOf(c) == "destructive" && !r.namesTool(v.name):
		return no, "in production a rule has to name a destructive tool to allow it", nil
	case r.condition == nil:
		return yes, "", nil
	}
	return v.evaluate(ctx, r)
}

// NameOf is the name by which rules know a capability: of resources the URI or template.
func NameOf(c *call.Capability) string {
	if c.Kind == call.Resource {
		return cmp.Or(c.URI, c.Template)
	}
	return c.Name
}

// EffectOf is the effect by which rules judge: what is not known is as bad as can be.
func EffectOf(c *call.Capability) string {
	if c.Kind != call.Tool {
		return "read"
	}
	if c.Effect == call.Unknown {
		return call.Destructive.String()
	}
	return c.Effect.String()
}

// evaluate asks a condition.
func (v *view) evaluate(ctx context.Context, r *rule) (match, string, error) {
	var vars any = cel.Activation(v)
	if v.in.Listing && r.reads["args"] {
		if len(r.reads) == 1 {
			return maybe, "it depends on the arguments", nil
		}
		partial, err := cel.PartialVars(vars, cel.AttributePattern("args"))
		if err != nil {
			return no, "", err
		}
		vars = partial
	}
	if r.reads["args"] && v.args == nil {
		if err := v.decode(); err != nil {
			return no, "", err
		}
	}
	var out ref.Val
	var err error
	if r.short {
		out, _, err = r.condition.Eval(vars)
	} else {
		out, _, err = r.condition.ContextEval(ctx, vars)
	}
	switch {
	case err != nil:
		return no, "", err
	case types.IsUnknown(out):
		return maybe, "it depends on the arguments", nil
	case out == types.True:
		return yes, "", nil
	case out == types.False:
		return no, "the condition is false", nil
	}
	return no, "", fmt.Errorf("the condition is of type %v", out.Type())
}

// Parent implements cel.Activation.
func (v *view) Parent() cel.Activation { return nil }

// ResolveName implements cel.Activation: what a condition sees under a name.
func (v *view) ResolveName(name string) (any, bool) {
	switch name {
	case "principal":
		p := v.in.Principal
		if p == nil {
			p = &call.Principal{}
		}
		return &principalView{ID: p.ID, Tenant: p.Tenant, Client: p.Client, Scopes: p.Scopes, Roles: p.Roles}, true
	case "capability":
		c := v.in.Capability
		return &capabilityView{Name: v.name, Kind: c.Kind.String(), Effect: EffectOf(c), Owner: c.Owner, Tags: c.Tags}, true
	case "environment":
		return v.policy.environment, true
	case "now":
		if v.in.Now.IsZero() {
			return time.Unix(0, 0), true
		}
		return v.in.Now, true
	case "args":
		return v.args, true
	}
	return nil, false
}

// decode makes values of the arguments.
func (v *view) decode() error {
	v.args = map[string]any{}
	if v.in.Args == nil || v.in.Listing {
		return nil
	}
	return json.Unmarshal(v.in.Args, &v.args, exactNumbers)
}

// exactNumbers decodes whole numbers of 64 bits exactly, others as floating point.
var exactNumbers = json.WithUnmarshalers(json.UnmarshalFromFunc(func(d *jsontext.Decoder, v *any) error {
	if d.PeekKind() != '0' {
		return errors.ErrUnsupported // as usual
	}
	raw, err := d.ReadValue()
	if err != nil {
		return err
	}
	if i, err := strconv.ParseInt(string(raw), 10, 64); err == nil {
		*v = i
		return nil
	}
	f, err := strconv.ParseFloat(string(raw), 64)
	*v = f
	return err
}))

// unknownSizes knows no sizes beforehand: whatever depends on them counts as without bound.
type unknownSizes struct{}

// EstimateSize implements the estimator of CEL.
func (unknownSizes) EstimateSize(cost.AstNode) *cost.SizeEstimate { return nil }

// EstimateCallCost implements the estimator of CEL.
func (unknownSizes) EstimateCallCost(string, string, *cost.AstNode, []cost.AstNode) *cost.CallEstimate {
	return nil
}
