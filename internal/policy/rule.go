package policy

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"path"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common/types"
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
}

// A Set is rules and what they stand in.
type Set struct {
	Environment string
	ReadOnly    bool
	Rules       []Rule
}

// Production is the environment in which destructive tools are denied unless a rule names them.
const Production = "production"

// Bounds of one condition.
const (
	maxCondition = 4 << 10 // bytes
	maxCost      = 20_000  // units of CEL; reading an argument is one
)

type rule struct {
	Rule
	name, reason string
	verdict      Verdict
	condition    cel.Program // nil: always
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
	env, err := environment()
	if err != nil {
		return nil, []error{err}
	}
	p := &Policy{environment: s.Environment, readOnly: s.ReadOnly}
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

func compile(env *cel.Env, given Rule) (*rule, error) {
	r := &rule{Rule: given, name: given.Name, reason: cmp.Or(given.Reason, "a rule of the policy denies this")}
	i := slices.Index(verdictNames[:], given.Then)
	if i < 0 {
		return nil, fmt.Errorf("then must be allow, deny or require_approval, not %q", given.Then)
	}
	r.verdict = Verdict(i) //nolint:gosec // an index of three
	for _, pattern := range given.Tools {
		if _, err := path.Match(pattern, ""); err != nil {
			return nil, fmt.Errorf("%q is not a pattern", pattern)
		}
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
	if given.When == "" {
		return r, nil
	}
	ast, issues := env.Compile(given.When)
	if issues.Err() != nil {
		var all []string
		for _, e := range issues.Errors() {
			all = append(all, fmt.Sprintf("when, line %d, column %d: %s", e.Location.Line(), e.Location.Column()+1, e.Message))
		}
		return nil, errors.New(strings.Join(all, "; "))
	}
	if !ast.OutputType().IsExactType(cel.BoolType) {
		return nil, fmt.Errorf("when must be true or false, not of type %v", ast.OutputType())
	}
	var err error
	r.condition, err = env.Program(ast, cel.EvalOptions(cel.OptPartialEval, cel.OptOptimize), cel.CostLimit(maxCost), cel.InterruptCheckFrequency(100))
	return r, err
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
	vars   map[string]any // for conditions; made when the first is met
}

// match holds a rule against the input. why says what did not fit.
func (v *view) match(ctx context.Context, r *rule) (m match, why string, err error) {
	c, p := v.in.Capability, v.in.Principal
	if p == nil {
		p = &call.Principal{}
	}
	named := len(r.Tools) > 0 && slices.ContainsFunc(r.Tools, func(pattern string) bool { return fits(pattern, nameOf(c)) })
	switch {
	case len(r.Tools) > 0 && !named:
		return no, "the name does not fit", nil
	case len(r.Kinds) > 0 && !slices.ContainsFunc(r.Kinds, func(k string) bool { return kinds[k] == c.Kind }):
		return no, "the kind does not fit", nil
	case len(r.Effects) > 0 && !slices.Contains(r.Effects, effectOf(c)):
		return no, "the effect is " + effectOf(c), nil
	case len(r.Tenants) > 0 && !slices.Contains(r.Tenants, p.Tenant):
		return no, "the tenant is another", nil
	case len(r.Environments) > 0 && !slices.Contains(r.Environments, v.policy.environment):
		return no, "the environment is " + strconv.Quote(v.policy.environment), nil
	case len(r.Roles) > 0 && !slices.ContainsFunc(r.Roles, func(role string) bool { return slices.Contains(p.Roles, role) }):
		return no, "the caller has none of the roles", nil
	case r.verdict == Allow && v.policy.environment == Production && c.Kind == call.Tool && effectOf(c) == "destructive" && !slices.ContainsFunc(r.Tools, func(pattern string) bool { return fits(pattern, nameOf(c)) && strings.Trim(pattern, "*") != "" }):
		return no, "in production a rule has to name a destructive tool to allow it", nil
	case r.condition == nil:
		return yes, "", nil
	}
	return v.evaluate(ctx, r)
}

// fits holds a name against a pattern in which * stands for any text, slashes too.
func fits(pattern, name string) bool {
	i := strings.IndexAny(pattern, `*?[\\`)
	switch {
	case i < 0:
		return pattern == name
	case !strings.HasPrefix(name, pattern[:i]):
		return false
	case pattern[i:] == "*":
		return true
	}
	ok, _ := path.Match(strings.ReplaceAll(pattern, "/", "\x00"), strings.ReplaceAll(name, "/", "\x00")) // checked when compiled
	return ok
}

func nameOf(c *call.Capability) string {
	if c.Kind == call.Resource {
		return cmp.Or(c.URI, c.Template)
	}
	return c.Name
}

// effectOf is the effect by which rules judge: what is not known is as bad as can be.
func effectOf(c *call.Capability) string {
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
	if v.vars == nil {
		if err := v.bind(); err != nil {
			return no, "", err
		}
	}
	var vars any = v.vars
	if v.in.Listing {
		partial, err := cel.PartialVars(v.vars, cel.AttributePattern("args"))
		if err != nil {
			return no, "", err
		}
		vars = partial
	}
	out, _, err := r.condition.ContextEval(ctx, vars)
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

// bind makes what conditions see.
func (v *view) bind() error {
	p, c := v.in.Principal, v.in.Capability
	if p == nil {
		p = &call.Principal{}
	}
	v.vars = map[string]any{
		"principal":   &principalView{ID: p.ID, Tenant: p.Tenant, Client: p.Client, Scopes: p.Scopes, Roles: p.Roles},
		"capability":  &capabilityView{Name: nameOf(c), Kind: c.Kind.String(), Effect: effectOf(c), Owner: c.Owner, Tags: c.Tags},
		"environment": v.policy.environment,
		"now":         v.in.Now,
	}
	if v.in.Now.IsZero() {
		v.vars["now"] = time.Unix(0, 0)
	}
	args := map[string]any{}
	if v.in.Args != nil && !v.in.Listing {
		if err := json.Unmarshal(v.in.Args, &args, json.WithUnmarshalers(json.UnmarshalFromFunc(number))); err != nil {
			return err
		}
	}
	v.vars["args"] = args
	return nil
}

// number decodes whole numbers of 64 bits exactly, others as floating point.
func number(d *jsontext.Decoder, v *any) error {
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
}
