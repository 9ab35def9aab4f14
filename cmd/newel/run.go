package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime/debug"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"newel.dev/newel/internal/module"
)

// Exit codes, the same for every verb.
const (
	exitOK         = 0
	exitFailed     = 1 // the tool, the configuration or the server said no
	exitUsage      = 2 // the command line makes no sense
	exitConnection = 3 // the server cannot be reached
)

// environment is everything a run touches, so that tests can hand it in.
type environment struct {
	in      io.Reader
	out     io.Writer
	err     io.Writer
	getenv  func(string) (string, bool)
	modules []module.Module
	program []string // command line of this process, for its successor
	// turn, if set, waits until this process may open what only one can have.
	turn func(context.Context) error
}

// exitError carries an exit code; a nil err prints nothing more.
type exitError struct {
	code int
	err  error
}

// Error implements error.
func (e *exitError) Error() string {
	if e.err == nil {
		return ""
	}
	return e.err.Error()
}

// Unwrap returns the cause.
func (e *exitError) Unwrap() error { return e.err }

func exit(code int, err error) error { return &exitError{code, err} }

// run runs one command line and returns the exit code.
func run(ctx context.Context, args []string, env environment) int {
	root := command(&env)
	root.SetArgs(args)
	root.SetIn(env.in)
	root.SetOut(env.out)
	root.SetErr(env.err)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return exitOK
	}
	code := exitUsage
	var e *exitError
	if errors.As(err, &e) {
		code = e.code
	}
	if text := err.Error(); text != "" {
		fmt.Fprintf(env.err, "%s %s\n", env.style(red, "newel:"), text)
	}
	return code
}

// command is the tree of verbs.
func command(env *environment) *cobra.Command {
	root := &cobra.Command{
		Use:           "newel",
		Short:         "The production runtime for MCP servers",
		Long:          "Newel serves databases, documents and Go functions to MCP clients on one guarded path, and talks to any MCP server.",
		SilenceErrors: true,
		SilenceUsage:  true,
		Version:       version(),
		Args:          cobra.NoArgs,
		RunE:          func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	root.AddGroup(&cobra.Group{ID: "serve", Title: "Serving:"}, &cobra.Group{ID: "client", Title: "Talking to a server:"}, &cobra.Group{ID: "config", Title: "Configuration:"}, &cobra.Group{ID: "audit", Title: "What was done:"})
	for group, verbs := range map[string][]*cobra.Command{
		"serve":  {serveCommand(env), reloadCommand(env), statusCommand(env), stdioCommand(env)},
		"client": {loginCommand(env), tokenCommand(env), toolsCommand(env), callCommand(env), readCommand(env), promptsCommand(env)},
		"audit":  {approvalsCommand(env), undoCommand(env), auditCommand(env)},
		"config": {configCommand(env), importCommand(env), policyCommand(env), sloCommand(env), initCommand(env)},
	} {
		for _, v := range verbs {
			v.GroupID = group
			root.AddCommand(v)
		}
	}
	return root
}

// version is that of the build.
func version() string {
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "(devel)"
}

type style string

const (
	red   style = "\x1b[31m"
	green style = "\x1b[32m"
	bold  style = "\x1b[1m"
	dim   style = "\x1b[2m"
)

// style colours text for people: on a terminal only, and not with NO_COLOR.
func (e *environment) style(s style, text string) string {
	if !isTerminal(e.err) || !isTerminal(e.out) {
		return text
	}
	if v, ok := e.getenv("NO_COLOR"); ok && v != "" {
		return text
	}
	return string(s) + text + "\x1b[0m"
}

func isTerminal(w any) bool {
	f, ok := w.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}
