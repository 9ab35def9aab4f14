package main

import (
	"context"
	"fmt"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/policy"
)

func policyCommand(env *environment) *cobra.Command {
	c := &cobra.Command{Use: "policy", Short: "Test and explain who may call what", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error { return c.Help() }}
	var path, output string
	test := &cobra.Command{
		Use:   "test",
		Short: "Run the tests that stand beside the rules",
		Args:  cobra.NoArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return env.policyTest(cmd.Context(), path, output) },
	}
	var who call.Principal
	var kind, effect, args string
	explain := &cobra.Command{
		Use:     "explain TOOL",
		Short:   "Say what the policy decides for a call, and how each rule met it",
		Example: `  newel policy explain update_order_status --role reader --effect write --args '{"status":"cancelled"}'`,
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, names []string) error {
			return env.policyExplain(cmd.Context(), path, output, &policy.Test{
				Tool: names[0], Kind: kind, Effect: effect, Args: args, Subject: who.ID, Tenant: who.Tenant, Roles: who.Roles, Scopes: who.Scopes,
			})
		},
	}
	for _, one := range []*cobra.Command{test, explain} {
		one.Flags().StringVarP(&path, "config", "c", defaultConfig, "configuration file")
		one.Flags().StringVarP(&output, "output", "o", "text", "text or json")
		c.AddCommand(one)
	}
	f := explain.Flags()
	f.StringVar(&who.ID, "subject", "somebody", "the caller")
	f.StringVar(&who.Tenant, "tenant", "", "tenant of the caller")
	f.StringSliceVar(&who.Roles, "role", nil, "roles of the caller")
	f.StringSliceVar(&who.Scopes, "scope", []string{policy.AllScopes}, "scopes of the caller")
	f.StringVar(&kind, "kind", "tool", "tool, resource or prompt")
	f.StringVar(&effect, "effect", "read", "read, write or destructive")
	f.StringVar(&args, "args", "{}", "arguments, as JSON")
	return c
}

// rules loads the policy of a configuration, without opening anything else it names.
func (e *environment) rules(ctx context.Context, path string) (*policy.Policy, []policy.Test, error) {
	f, err := e.load(path, nil)
	if err != nil {
		return nil, nil, err
	}
	tests := f.Config.Policy.Tests
	f.Config.Policy.Tests = nil // they are run one by one
	p, _, err := policies(ctx, f)
	if err != nil {
		return nil, nil, exit(exitFailed, err)
	}
	return p, tests, nil
}

func (e *environment) policyTest(ctx context.Context, path, output string) error {
	p, tests, err := e.rules(ctx, path)
	if err != nil {
		return err
	}
	type outcome struct {
		Name    string `json:"name"`
		Passed  bool   `json:"passed"`
		Problem string `json:"problem,omitempty"`
	}
	all, failed := []outcome{}, 0
	for i := range tests {
		o := outcome{Name: tests[i].Name, Passed: true}
		if err := p.Run(ctx, &tests[i], time.Now()); err != nil {
			o.Passed, o.Problem = false, err.Error()
			failed++
		}
		all = append(all, o)
	}
	if output == "json" {
		err = e.print(map[string]any{"tests": all, "failed": failed})
	} else {
		for _, o := range all {
			word := e.style(green, "ok  ")
			if !o.Passed {
				word = e.style(red, "FAIL")
			}
			fmt.Fprintf(e.out, "%s  %s", word, o.Name)
			if o.Problem != "" {
				fmt.Fprintf(e.out, ": %s", o.Problem)
			}
			fmt.Fprintln(e.out)
		}
		_, err = fmt.Fprintf(e.out, "policy: %d tests, %d failed\n", len(all), failed)
	}
	if err == nil && failed > 0 {
		err = exit(exitFailed, fmt.Errorf("%d tests of the policy failed", failed))
	}
	return err
}

func (e *environment) policyExplain(ctx context.Context, path, output string, t *policy.Test) error {
	p, _, err := e.rules(ctx, path)
	if err != nil {
		return err
	}
	in, err := t.Input(time.Now())
	if err != nil {
		return err
	}
	d, looks := p.Explain(ctx, in)
	if output == "json" {
		return e.print(map[string]any{"verdict": d.Verdict.String(), "rule": d.Rule, "reason": d.Reason, "missing_scopes": d.Missing, "rules": looks})
	}
	style := red
	if d.Verdict == policy.Allow {
		style = green
	}
	fmt.Fprintf(e.out, "%s by %q", e.style(style, d.Verdict.String()), d.Rule)
	if d.Reason != "" {
		fmt.Fprintf(e.out, ": %s", d.Reason)
	}
	if cause := d.Cause(); cause != nil {
		fmt.Fprintf(e.out, " (%v)", cause)
	}
	fmt.Fprintln(e.out)
	w := tabwriter.NewWriter(e.out, 0, 4, 2, ' ', 0)
	for _, l := range looks {
		fmt.Fprintf(w, "  %s\t%s\t%s\t%s\n", l.Rule, l.Verdict, l.Matched, l.Why)
	}
	return w.Flush()
}
