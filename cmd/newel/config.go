package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"newel.dev/newel/internal/config"
)

func configCommand(env *environment) *cobra.Command {
	c := &cobra.Command{Use: "config", Short: "Check a configuration, print its schema", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error { return c.Help() }}
	var path, output string
	check := &cobra.Command{
		Use:   "check",
		Short: "Say everything that is wrong with a configuration, without opening anything it names",
		Args:  cobra.NoArgs,
		RunE:  func(*cobra.Command, []string) error { return env.check(path, output) },
	}
	check.Flags().StringVarP(&path, "config", "c", defaultConfig, "configuration file")
	check.Flags().StringVarP(&output, "output", "o", "text", "text or json")
	schema := &cobra.Command{
		Use:   "schema",
		Short: "Print the JSON Schema of configurations, for editors",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			s, err := config.Schema(env.modules)
			if err != nil {
				return exit(exitFailed, err)
			}
			_, err = fmt.Fprintf(env.out, "%s\n", s)
			return err
		},
	}
	reference := &cobra.Command{
		Use:   "reference",
		Short: "Print the reference of configurations, in Markdown",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			_, err := fmt.Fprint(env.out, config.Reference(env.modules))
			return err
		},
	}
	c.AddCommand(check, schema, reference)
	return c
}

func (e *environment) check(path, output string) error {
	if output != "text" && output != "json" {
		return fmt.Errorf("--output must be text or json, not %q", output)
	}
	f, err := e.load(path, nil)
	if err == nil {
		_, err = objectives(f)
	}
	var problems config.Problems
	if err != nil && !errors.As(err, &problems) {
		return err
	}
	if output == "json" {
		if problems == nil {
			problems = config.Problems{}
		}
		if err := e.print(map[string]any{"file": path, "problems": problems}); err != nil {
			return err
		}
	} else {
		for _, p := range problems {
			fmt.Fprintf(e.out, "%s:%d:%d: %s\n", p.File, p.Line, p.Column, e.style(red, p.Message))
			if p.Source != "" {
				fmt.Fprintf(e.out, "  %s\n  %s^\n", p.Source, strings.Repeat(" ", max(p.Column-1, 0)))
			}
			if p.Suggestion != "" {
				fmt.Fprintf(e.out, "  %s\n", e.style(dim, p.Suggestion))
			}
		}
		if len(problems) == 0 {
			fmt.Fprintf(e.out, "%s: %s\n", path, e.style(green, "no problems"))
		}
	}
	if len(problems) > 0 {
		return exit(exitFailed, nil)
	}
	return nil
}

// starter is what newel init writes.
const starter = `# A Newel configuration. Start it with: newel serve --config %[1]s
# Check it with: newel config check --config %[1]s
# Your editor's schema comes from: newel config schema

server:
  name: my-server
  title: My server
  instructions: Tell models here what this server is for.

listen: 127.0.0.1:8080

backends:
  # Documents in a folder, as search_kb, get_document and get_policy.
  - type: knowledge
    name: knowledge
    sources:
      - {name: docs, path: .}

  # A database: each tool is one SQL statement. Values travel as parameters, never as text.
  # - type: sql
  #   name: shop
  #   driver: postgres
  #   dsn: ${env:SHOP_DSN}
  #   tools:
  #     - name: get_customer
  #       description: One customer, by number.
  #       params:
  #         - {name: id, type: integer, required: true}
  #       result: row
  #       sql: SELECT id, name, email FROM customers WHERE id = :id
`

func initCommand(env *environment) *cobra.Command {
	return &cobra.Command{
		Use:   "init [FILE]",
		Short: "Write a configuration to start from",
		Args:  cobra.MaximumNArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			path := defaultConfig
			if len(args) > 0 {
				path = args[0]
			}
			f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644) //nolint:gosec // a configuration holds no secrets
			if errors.Is(err, fs.ErrExist) {
				return exit(exitFailed, fmt.Errorf("%s exists already; name another file", path))
			}
			if err != nil {
				return exit(exitFailed, err)
			}
			_, err = fmt.Fprintf(f, starter, path)
			if err = errors.Join(err, f.Close()); err != nil {
				return exit(exitFailed, err)
			}
			fmt.Fprintf(env.out, "wrote %s; now: newel serve --config %s\n", path, path)
			return nil
		},
	}
}
