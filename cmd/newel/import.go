package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/spf13/cobra"

	"newel.dev/newel/internal/config"
)

func importCommand(env *environment) *cobra.Command {
	var output string
	c := &cobra.Command{
		Use:   "import FILE",
		Short: "Make a configuration of a client's file (Claude, Cursor, VS Code)",
		Long: `Prints a configuration that serves the MCP servers of a client's file through the gateway.
Secrets become references to environment variables, which are named on standard error.`,
		Example: "  newel import ~/.cursor/mcp.json > newel.yaml",
		Args:    cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			im, err := env.readClient(args[0])
			if err != nil {
				return err
			}
			switch output {
			case "json":
				return env.print(map[string]any{"yaml": string(im.YAML), "variables": im.Needed, "notes": im.Notes})
			case "text":
			default:
				return fmt.Errorf("--output must be text or json, not %q", output)
			}
			for _, name := range im.Needed {
				fmt.Fprintf(env.err, "%s set the environment variable %s before you serve this\n", env.style(bold, "note:"), name)
			}
			_, err = fmt.Fprintf(env.out, "# Made by newel import from %s. newel config reference lists all settings.\n%s", args[0], im.YAML)
			return err
		},
	}
	c.Flags().StringVarP(&output, "output", "o", "text", "text or json")
	return c
}

// readClient reads a client's file and says what of it is not taken over.
func (e *environment) readClient(path string) (*config.Imported, error) {
	src, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, exit(exitFailed, fmt.Errorf("there is no file %s", path))
	}
	if err != nil {
		return nil, exit(exitFailed, err)
	}
	im, err := config.Import(src)
	if err != nil {
		return nil, exit(exitFailed, fmt.Errorf("%s: %w", path, err))
	}
	for _, n := range im.Notes {
		fmt.Fprintf(e.err, "%s %s\n", e.style(bold, "note:"), n)
	}
	return im, nil
}

// loadClient is load for a client's file: its secrets stay where they are.
func (e *environment) loadClient(path string, outside config.Lookup) (*config.File, error) {
	im, err := e.readClient(path)
	if err != nil {
		return nil, err
	}
	f, err := config.Load(path, im.YAML, e.modules, func(kind, name string) (string, error) {
		if v, ok := im.Secrets[name]; ok && kind == "env" {
			return v, nil
		}
		return outside(kind, name)
	})
	if err != nil {
		return nil, exit(exitFailed, err)
	}
	return f, nil
}
