package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"

	"github.com/spf13/cobra"

	"newel.dev/newel/internal/assembly"
	"newel.dev/newel/internal/config"
)

const defaultConfig = "newel.yaml"

func serveCommand(env *environment) *cobra.Command {
	var path, listen, from string
	c := &cobra.Command{
		Use:   "serve",
		Short: "Serve over HTTP what the configuration names",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if from != "" && cmd.Flags().Changed("config") {
				return errors.New("--from and --config name one file each; choose one")
			}
			if from != "" {
				path = from
			}
			return env.serve(cmd.Context(), &source{environment: env, path: path, client: from != ""}, listen)
		},
	}
	c.Flags().StringVar(&from, "from", "", "serve the MCP servers of a client's file (Claude, Cursor, VS Code) instead")
	c.Flags().StringVarP(&path, "config", "c", defaultConfig, "configuration file")
	c.Flags().StringVarP(&listen, "listen", "l", "", "address to listen on (host:port), instead of the configuration's")
	return c
}

func stdioCommand(env *environment) *cobra.Command {
	var path string
	c := &cobra.Command{
		Use:   "stdio",
		Short: "Serve the same over standard input and output, for one local client",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx := cmd.Context()
			f, err := env.load(path, env.secrets(path))
			if err != nil {
				return err
			}
			house, err := env.open(ctx, f, nil)
			if err != nil {
				return err
			}
			err = house.ServeStdio(ctx, env.in, env.out)
			if err = errors.Join(err, house.close(ctx)); err != nil {
				return exit(exitFailed, err)
			}
			return nil
		},
	}
	c.Flags().StringVarP(&path, "config", "c", defaultConfig, "configuration file")
	return c
}

func (e *environment) secrets(path string) config.Lookup {
	return config.Secrets(e.getenv, filepath.Dir(path))
}

func (e *environment) serve(ctx context.Context, from *source, listen string) (err error) {
	relay, err := e.inherited()
	if err != nil {
		return exit(exitFailed, err)
	}
	defer func() { relay.failed(err) }()
	e.turn = relay.turn
	from.reloads, from.restarts = make(chan os.Signal, 1), make(chan os.Signal, 1)
	notify(from.reloads, from.restarts) // first of all: a signal that nobody waits for ends the process
	f, err := from.load()
	if err != nil {
		return err
	}
	if most := f.Config.Limits.MaxMemory; most > 0 { // the collector works harder before calls are refused
		debug.SetMemoryLimit(int64(float64(most) * 0.9))
	}
	// The port first: it tells soonest that something is wrong, and what connects waits.
	if err := errors.Join(production(f), checkTLS(f)); err != nil {
		return exit(exitFailed, err)
	}
	l, err := relay.listen(ctx, cmp.Or(listen, f.Config.Listen), exposure(&f.Config))
	if err != nil {
		return exit(exitFailed, err)
	}
	first, err := e.open(ctx, f, l.Addr())
	if err != nil {
		return errors.Join(err, l.Close())
	}
	s, err := e.newServing(from, l, first, relay.successor)
	if err != nil {
		return errors.Join(exit(exitFailed, err), first.close(ctx), l.Close())
	}
	e.announce(first.Summary(), address(&f.Config, l.Addr()), from.path)
	if err := s.run(ctx, relay); err != nil {
		return exit(exitFailed, err)
	}
	return nil
}

// announce tells a person what is served and how to connect.
func (e *environment) announce(s assembly.Summary, url, path string) {
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s\n\n", e.style(bold, "Serving MCP at"), e.style(green, url))
	list := func(what string, names []string) {
		const most = 8
		more := ""
		if len(names) > most {
			names, more = names[:most], fmt.Sprintf(", … (%d in all)", len(names))
		}
		if len(names) > 0 {
			fmt.Fprintf(&b, "  %-10s %s%s\n", what, strings.Join(names, ", "), more)
		}
	}
	list("tools", s.Tools)
	list("resources", s.Resources)
	list("templates", s.Templates)
	list("prompts", s.Prompts)
	abs, err := filepath.Abs(path)
	if err != nil {
		abs = path
	}
	program, err := os.Executable()
	if err != nil || strings.Contains(program, "go-build") {
		program = "newel" // go run: that program is gone when this one ends
	}
	fmt.Fprintf(&b, `
%s
  {"mcpServers": {"newel": {"url": %q}}}
%s
  {"mcpServers": {"newel": {"command": %q, "args": ["stdio", "--config", %q]}}}
%s
  newel tools --server %s
`, e.style(dim, "Paste into a client that speaks HTTP:"), url, e.style(dim, "or into one that starts programs:"), program, abs, e.style(dim, "or look from here:"), url)
	fmt.Fprintln(e.out, b.String())
}
