package main

import (
	"fmt"
	"slices"

	"github.com/spf13/cobra"

	"newel.dev/newel/internal/config"
	"newel.dev/newel/internal/slo"
)

func sloCommand(env *environment) *cobra.Command {
	c := &cobra.Command{Use: "slo", Short: "Service level objectives", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error { return c.Help() }}
	var path string
	rules := &cobra.Command{
		Use:     "rules",
		Short:   "Print rules for Prometheus that record what the objectives are about, and alert when their error budgets burn",
		Example: "  newel slo rules > /etc/prometheus/rules/newel-slo.yaml",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			f, err := env.load(path, nil)
			if err != nil {
				return err
			}
			all, err := objectives(f)
			if err != nil {
				return err
			}
			if len(all) == 0 {
				return exit(exitFailed, fmt.Errorf("%s has no slos; see docs/guides/monitoring.md", path))
			}
			_, err = env.out.Write(slo.Rules(all))
			return err
		},
	}
	rules.Flags().StringVarP(&path, "config", "c", defaultConfig, "configuration file")
	c.AddCommand(rules)
	return c
}

// objectives reads and checks the objectives of a configuration.
func objectives(f *config.File) ([]slo.Objective, error) {
	var all []slo.Objective
	var problems config.Problems
	for i, o := range f.Config.SLOs {
		one := slo.Objective{Name: o.Name, Tools: o.Tools, Success: o.Success, Latency: o.Latency, LatencySuccess: o.LatencyRate, Window: o.Window}
		at := fmt.Sprintf("slos[%d]", i)
		if err := one.Check(); err != nil {
			problems = append(problems, f.Problem(at, err.Error()))
		}
		if slices.ContainsFunc(all, func(other slo.Objective) bool { return other.Name == one.Name }) {
			problems = append(problems, f.Problem(at+".name", fmt.Sprintf("there is another objective called %q", one.Name)))
		}
		all = append(all, one)
	}
	if len(problems) > 0 {
		return nil, problems
	}
	return all, nil
}
