package main

import (
	"fmt"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"newel.dev/newel/internal/assembly"
	"newel.dev/newel/internal/backend/mcpupstream"
)

// condition is how a running server is.
type condition struct {
	Version       string    `json:"version"`
	PID           int       `json:"pid"`
	Listen        string    `json:"listen"`
	Started       time.Time `json:"started"`
	Configuration struct {
		File    string    `json:"file"`
		Loaded  time.Time `json:"loaded"`
		Refused bool      `json:"last_reload_refused"`
	} `json:"configuration"`
	assembly.Status
	Upstreams []mcpupstream.Status `json:"upstreams,omitempty"`
}

// condition returns how the server is now.
func (s *serving) condition() *condition {
	c := &condition{Version: version(), PID: os.Getpid(), Listen: s.listener.Addr().String(), Started: s.started, Status: s.live.House().Status()}
	c.Configuration.File = s.path
	c.Configuration.Loaded = time.Unix(s.last.Load(), 0).UTC()
	c.Configuration.Refused = s.good.Load() == 0
	for _, b := range c.Backends {
		if u, ok := b.Of.(interface{ Status() mcpupstream.Status }); ok {
			c.Upstreams = append(c.Upstreams, u.Status())
		}
	}
	return c
}

func statusCommand(env *environment) *cobra.Command {
	var path, output string
	c := &cobra.Command{
		Use:   "status",
		Short: "Say how the running server is: calls, tasks, approvals, backends",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if output != "text" && output != "json" {
				return fmt.Errorf("--output must be text or json, not %q", output)
			}
			var now condition
			raw, err := tell(cmd.Context(), socketOf(path), "status", &now)
			if err != nil {
				return exit(exitConnection, err)
			}
			if output == "json" {
				_, err = fmt.Fprintf(env.out, "%s\n", raw)
				return err
			}
			return env.printStatus(&now)
		},
	}
	c.Flags().StringVarP(&path, "config", "c", defaultConfig, "configuration file that the server was started with")
	c.Flags().StringVarP(&output, "output", "o", "text", "text or json")
	return c
}

func (e *environment) printStatus(c *condition) error {
	w := tabwriter.NewWriter(e.out, 0, 4, 2, ' ', 0)
	fmt.Fprintf(w, "newel %s\tpid %d, on %s, for %s\n", c.Version, c.PID, c.Listen, time.Since(c.Started).Round(time.Second))
	loaded := "loaded " + c.Configuration.Loaded.Local().Format(time.DateTime)
	if c.Configuration.Refused {
		loaded += "; what came after was refused: newel reload says why"
	}
	fmt.Fprintf(w, "configuration\t%s, %s\n", c.Configuration.File, loaded)
	fmt.Fprintf(w, "calls\t%d running, %d waiting, %d subscriptions\n", c.Calls.Running, c.Calls.Queued, c.Calls.Subscriptions)
	if c.Calls.Overload != "" {
		fmt.Fprintf(w, "memory\truns out: refused are %s\n", c.Calls.Overload)
	}
	since := ""
	if c.Tasks.Queued > 0 {
		since = fmt.Sprintf(" (the first for %s)", time.Duration(c.Tasks.Oldest)*time.Second)
	}
	fmt.Fprintf(w, "tasks\t%d running, %d waiting for a worker%s, %d for answers\n", c.Tasks.Running, c.Tasks.Queued, since, c.Tasks.Waiting)
	fmt.Fprintf(w, "approvals\t%d wait for a person\n", c.Approvals)
	if err := w.Flush(); err != nil {
		return err
	}
	w = tabwriter.NewWriter(e.out, 0, 4, 2, ' ', 0)
	fmt.Fprint(w, "\nSERVER\tTOOLS\tRESOURCES\tPROMPTS\n")
	for _, s := range c.Servers {
		fmt.Fprintf(w, "%s\t%d\t%d\t%d\n", s.Address, s.Tools, s.Resources, s.Prompts)
	}
	fmt.Fprint(w, "\nBACKEND\tSTATE\tRUNNING\tWAITING\tAGAIN\tREFUSED\n")
	for _, b := range c.Backends {
		state := map[string]string{"closed": "good", "half-open": "is tried", "open": "failing"}[b.Breaker]
		for _, u := range c.Upstreams {
			if u.Name == b.Name && u.Problem != "" {
				state = "away: " + strings.Join(strings.Fields(u.Problem), " ")
			}
		}
		fmt.Fprintf(w, "%s\t%s\t%d\t%d\t%d\t%d\n", b.Name, state, b.Running, b.Queued, b.Retries, b.Full+b.Open)
	}
	return w.Flush()
}
