package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/user"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"github.com/spf13/cobra"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/assembly"
	"newel.dev/newel/internal/config"
	"newel.dev/newel/internal/door/approvals"
	"newel.dev/newel/internal/egress"
	"newel.dev/newel/internal/guard/approve"
	"newel.dev/newel/internal/secret"
)

// webhook makes the other system that hears of approvals, or nil.
func webhook(f *config.File) (*approve.Webhook, error) {
	c := &f.Config.Approvals.Webhook
	if c.URL == "" {
		return nil, nil
	}
	u, err := url.Parse(c.URL)
	if err != nil || u.Host == "" || u.Scheme != "https" && u.Scheme != "http" {
		return nil, fmt.Errorf("%s: it must be an address such as https://chat.example.com/newel", f.Position("approvals.webhook.url"))
	}
	private, err := ranges(f, c.Private, "approvals.webhook.private_ranges")
	if err != nil {
		return nil, err
	}
	h := &approve.Webhook{URL: c.URL, Secret: c.Secret, HTTP: egress.Client(egress.Options{Allow: private, Loopback: true, Timeout: c.Timeout})}
	if err := h.Check(); err != nil {
		return nil, fmt.Errorf("%s: %w", f.Position("approvals.webhook"), err)
	}
	return h, nil
}

// operatorName is who types.
func operatorName() string {
	u, err := user.Current()
	if err != nil || u.Username == "" {
		return "somebody"
	}
	return u.Username
}

// office is where people decide: a running server. With the key file of its configuration one is an
// operator; without the configuration one is who one logged in as.
type office struct {
	config, server, output string
}

func (o *office) flags(c *cobra.Command) {
	c.Flags().StringVarP(&o.config, "config", "c", defaultConfig, "configuration file of the server: its key file makes you an operator")
	c.Flags().StringVarP(&o.server, "server", "s", "", "URL of the server; without --config you are who you logged in as")
	c.Flags().StringVarP(&o.output, "output", "o", "text", "text or json")
	c.PreRunE = func(*cobra.Command, []string) error {
		if o.output != "text" && o.output != "json" {
			return fmt.Errorf("--output must be text or json, not %q", o.output)
		}
		return nil
	}
}

const officeTimeout = 70 * time.Second // longer than a call runs

// ask sends one request and returns the answer.
func (o *office) ask(cmd *cobra.Command, env *environment, method, path string, body []byte) (jsontext.Value, error) {
	ctx, cancel := context.WithTimeout(cmd.Context(), officeTimeout)
	defer cancel()
	base, client, sign, err := o.reach(ctx, cmd, env)
	if err != nil {
		return nil, exit(exitFailed, err)
	}
	r, err := http.NewRequestWithContext(ctx, method, base+path, bytes.NewReader(body))
	if err != nil {
		return nil, exit(exitFailed, err)
	}
	sign(r, body)
	resp, err := client.Do(r)
	if err != nil {
		return nil, exit(exitConnection, fmt.Errorf("the server cannot be reached: %w; approvals are decided while it runs, --server names another address", err))
	}
	defer resp.Body.Close() //nolint:errcheck // it was read
	const most = 64 << 20
	raw, err := io.ReadAll(io.LimitReader(resp.Body, most))
	if err != nil {
		return nil, exit(exitConnection, err)
	}
	if resp.StatusCode != http.StatusOK {
		var said struct{ Error struct{ Message string } }
		if err := json.Unmarshal(raw, &said, json.MatchCaseInsensitiveNames(true)); err != nil || said.Error.Message == "" {
			said.Error.Message = "the server answers " + resp.Status
		}
		return nil, exit(exitFailed, errors.New(said.Error.Message))
	}
	return bytes.TrimSpace(raw), nil
}

// reach says where the server is and how to prove who is asking.
func (o *office) reach(ctx context.Context, cmd *cobra.Command, env *environment) (base string, _ *http.Client, sign func(*http.Request, []byte), _ error) {
	plain := &http.Transport{Proxy: http.ProxyFromEnvironment}
	if o.server != "" && !cmd.Flags().Changed("config") {
		u, err := url.Parse(o.server)
		if err != nil || u.Host == "" {
			return "", nil, nil, fmt.Errorf("%q is not the URL of a server", o.server)
		}
		client, token, err := env.token(ctx, o.server)
		if err != nil {
			return "", nil, nil, err
		}
		if token == nil {
			return "", nil, nil, fmt.Errorf("nobody is logged in to %s; newel login --server %s logs in, --config makes you an operator", o.server, o.server)
		}
		return u.Scheme + "://" + u.Host, &http.Client{Transport: client.Transport(plain)}, func(*http.Request, []byte) {}, nil
	}
	f, err := env.load(o.config, env.secrets(o.config))
	if err != nil {
		return "", nil, nil, err
	}
	key, err := operatorKey(f)
	if err != nil {
		return "", nil, nil, err
	}
	if base = strings.TrimSuffix(o.server, "/mcp"); base == "" {
		base = here(&f.Config)
		if c, err := (&net.Dialer{}).DialContext(ctx, "unix", socketOf(o.config)); err == nil { // whatever it listens on
			_ = c.Close()
			base, plain = "http://newel", throughSocket(socketOf(o.config))
		}
	}
	name := operatorName()
	return base, &http.Client{Transport: plain}, func(r *http.Request, body []byte) {
		r.Header.Set("Authorization", approvals.Proof(key, name, r.Method, r.URL.RequestURI(), body, time.Now()))
	}, nil
}

// here is the server of a configuration as this machine reaches it.
func here(c *config.Config) string {
	if c.Auth.PublicURL != "" && c.TLS.On() {
		return strings.TrimSuffix(c.Auth.PublicURL, "/") // certificates are for its name
	}
	host, port, err := net.SplitHostPort(c.Listen)
	if err != nil {
		return scheme(c) + "://" + c.Listen
	}
	if ip := net.ParseIP(host); host == "" || ip != nil && ip.IsUnspecified() {
		host = "127.0.0.1"
	}
	return scheme(c) + "://" + net.JoinHostPort(host, port)
}

func operatorKey(f *config.File) ([]byte, error) {
	if f.Config.State.Engine == "memory" {
		return nil, fmt.Errorf("%s: a server that keeps its state in memory has no operators; log in and use --server", f.Position("state.engine"))
	}
	file := from(f.Dir, f.Config.State.KeyFile)
	if _, err := os.Stat(file); err != nil {
		return nil, fmt.Errorf("there is no key, so no server ran with this configuration yet: %w", err)
	}
	key, err := secret.OpenKey(file)
	if err != nil {
		return nil, err
	}
	return key.Derive(assembly.OperatorKey)
}

func approvalsCommand(env *environment) *cobra.Command {
	c := &cobra.Command{Use: "approvals", Short: "Decide about calls that wait for a person", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error { return c.Help() }}
	c.AddCommand(approvalsList(env), approvalsShow(env), approvalsDecide(env, "approve"), approvalsDecide(env, "deny"))
	return c
}

func approvalsList(env *environment) *cobra.Command {
	var o office
	var state string
	var all bool
	c := &cobra.Command{
		Use:   "list",
		Short: "List the calls that wait, the newest first",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if all {
				state = ""
			}
			raw, err := o.ask(cmd, env, http.MethodGet, "/approvals?state="+url.QueryEscape(state), nil)
			if err != nil {
				return err
			}
			if o.output == "json" {
				return env.print(raw)
			}
			var list struct {
				Approvals []approve.View `json:"approvals"`
			}
			if err := json.Unmarshal(raw, &list); err != nil {
				return exit(exitFailed, err)
			}
			w := tabwriter.NewWriter(env.out, 0, 0, 2, ' ', 0)
			for i := range list.Approvals {
				a := &list.Approvals[i]
				fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\tuntil %s\n", a.ID, a.State, plain(a.Name), plain(a.Principal), plain(a.Rule), a.Expires.Format(time.RFC3339))
			}
			return w.Flush()
		},
	}
	o.flags(c)
	c.Flags().StringVar(&state, "state", "pending", "pending, approved, used, denied or expired")
	c.Flags().BoolVar(&all, "all", false, "in every state")
	return c
}

func approvalsShow(env *environment) *cobra.Command {
	var o office
	c := &cobra.Command{
		Use:   "show ID",
		Short: "Show a call that waits, with its arguments, and what was decided",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, ids []string) error {
			raw, err := o.ask(cmd, env, http.MethodGet, "/approvals/"+url.PathEscape(ids[0]), nil)
			if err != nil {
				return err
			}
			return o.view(env, raw)
		},
	}
	o.flags(c)
	return c
}

func approvalsDecide(env *environment, decision string) *cobra.Command {
	var o office
	var reason string
	c := &cobra.Command{
		Use:   decision + " ID",
		Short: map[string]string{"approve": "Let a call run, once, as it was asked for", "deny": "Refuse a call"}[decision],
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, ids []string) error {
			body, err := json.Marshal(map[string]string{"decision": decision, "reason": reason}, json.Deterministic(true))
			if err != nil {
				return err
			}
			raw, err := o.ask(cmd, env, http.MethodPost, "/approvals/"+url.PathEscape(ids[0]), body)
			if err != nil {
				return err
			}
			return o.view(env, raw)
		},
	}
	o.flags(c)
	c.Flags().StringVar(&reason, "reason", "", "why: the caller is told")
	return c
}

// view prints one approval.
func (o *office) view(env *environment, raw jsontext.Value) error {
	if o.output == "json" {
		return env.print(raw)
	}
	var a approve.View
	if err := json.Unmarshal(raw, &a); err != nil {
		return exit(exitFailed, err)
	}
	w := tabwriter.NewWriter(env.out, 0, 0, 2, ' ', 0)
	for _, line := range [][2]string{
		{"approval", a.ID}, {"state", a.State}, {"call", a.Kind + " " + a.Name + " (" + a.Effect + ") at " + a.Server}, {"arguments", string(a.Arguments)}, {"caller", a.Principal},
		{"tenant", a.Tenant}, {"rule", a.Rule}, {"approvers", fmt.Sprintf("%d of %s", a.Count, strings.Join(a.Approvers, ", "))}, {"expires", a.Expires.Format(time.RFC3339)}, {"operation", a.Operation},
	} {
		if line[1] != "" {
			fmt.Fprintf(w, "%s\t%s\n", line[0], plain(line[1]))
		}
	}
	for _, d := range a.Decisions {
		fmt.Fprintf(w, "%s\tby %s (%s) at %s %s\n", d.Decision, plain(d.By), d.How, d.At.Format(time.RFC3339), plain(d.Reason))
	}
	return w.Flush()
}

// plain keeps what others wrote from steering the terminal.
func plain(s string) string {
	return strings.Map(func(c rune) rune {
		if c < ' ' || c >= 0x7f && c < 0xa0 || c >= 0x202a && c <= 0x202e || c >= 0x2066 && c <= 0x2069 {
			return '?'
		}
		return c
	}, s)
}

func undoCommand(env *environment) *cobra.Command {
	var o office
	c := &cobra.Command{
		Use:   "undo OPERATION",
		Short: "Undo a call, with the tool that is declared for that",
		Long: `Undo runs the tool that effects.tools[].undo names for the tool of an operation, with arguments from its call and its result:
once, however often it is asked for, and through the whole path. newel audit search finds the names of operations.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, ids []string) error {
			raw, err := o.ask(cmd, env, http.MethodPost, "/operations/"+url.PathEscape(ids[0])+"/undo", nil)
			if err != nil {
				return err
			}
			var r struct {
				Content []struct{ Type, Text string } `json:"content"`
				IsError bool                          `json:"isError"`
			}
			if err := json.Unmarshal(raw, &r, json.MatchCaseInsensitiveNames(true)); err != nil {
				return exit(exitFailed, err)
			}
			if o.output == "json" {
				err = env.print(raw)
			} else {
				for _, block := range r.Content {
					fmt.Fprintln(env.out, block.Text)
				}
			}
			if err == nil && r.IsError {
				err = exit(exitFailed, call.Errorf(call.Failed, "the tool that undoes it failed; it is not run again"))
			}
			return err
		},
	}
	o.flags(c)
	return c
}
