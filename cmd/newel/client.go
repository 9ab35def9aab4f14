package main

import (
	"bufio"
	"context"
	"encoding/json" // the SDK's types speak encoding/json
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"

	"github.com/modelcontextprotocol/go-sdk/mcp"
	"github.com/spf13/cobra"

	"newel.dev/newel/call"
)

// target is the server that a client verb talks to.
type target struct {
	url     string
	command string
	timeout time.Duration
	output  string
}

const defaultURL = "http://127.0.0.1:8080/mcp"

// flags adds what all client verbs take.
func (t *target) flags(c *cobra.Command) {
	c.Flags().StringVarP(&t.url, "server", "s", defaultURL, "URL of the server")
	c.Flags().StringVar(&t.command, "command", "", "start this program instead and talk over stdio, for example --command 'npx some-server'")
	c.Flags().DurationVar(&t.timeout, "timeout", time.Minute, "longest wait for an answer")
	c.Flags().StringVarP(&t.output, "output", "o", "text", "text or json")
	c.PreRunE = func(*cobra.Command, []string) error {
		if t.output != "text" && t.output != "json" {
			return fmt.Errorf("--output must be text or json, not %q", t.output)
		}
		return nil
	}
	_ = c.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"text", "json"}, cobra.ShellCompDirectiveNoFileComp)) // fails only for an unknown flag
}

// with connects, runs f and disconnects.
func (t *target) with(ctx context.Context, env *environment, f func(context.Context, *mcp.ClientSession) error) error {
	ctx, cancel := context.WithTimeout(ctx, t.timeout)
	defer cancel()
	progress := newBar(env.err)
	defer progress.done()
	client := mcp.NewClient(&mcp.Implementation{Name: "newel", Version: version()}, &mcp.ClientOptions{
		ElicitationHandler: env.answer,
		ProgressNotificationHandler: func(_ context.Context, r *mcp.ProgressNotificationClientRequest) {
			progress.draw(r.Params.Message, r.Params.Progress, r.Params.Total)
		},
	})
	transport, err := t.transport(ctx, env)
	if err != nil {
		return exit(exitFailed, err)
	}
	session, err := client.Connect(ctx, transport, nil)
	if err != nil && strings.Contains(err.Error(), "Unauthorized") {
		return exit(exitFailed, fmt.Errorf("%s asks who is calling; newel login --server %s logs in", t.name(), t.url))
	}
	if said, ok := errors.AsType[*call.Error](err); ok {
		return exit(exitFailed, said)
	}
	if err != nil {
		return exit(exitConnection, fmt.Errorf("%s cannot be reached: %w; newel serve starts a server here, --server names another", t.name(), err))
	}
	err = f(ctx, session)
	progress.done()
	if closing := session.Close(); err == nil && closing != nil && t.command == "" {
		err = exit(exitConnection, closing)
	}
	return err
}

func (t *target) name() string {
	if t.command != "" {
		return "the program " + t.command
	}
	return t.url
}

// transport reaches the server, with the token of a login to it if there is one.
func (t *target) transport(ctx context.Context, env *environment) (mcp.Transport, error) {
	if words := strings.Fields(t.command); len(words) > 0 {
		cmd := exec.Command(words[0], words[1:]...) //nolint:gosec // what to start is what the person typed
		cmd.Stderr = os.Stderr
		return &mcp.CommandTransport{Command: cmd}, nil
	}
	out := &mcp.StreamableClientTransport{Endpoint: t.url}
	client, token, err := env.token(ctx, t.url)
	if err != nil {
		return nil, err
	}
	if token != nil {
		out.HTTPClient = &http.Client{Transport: client.Transport(&http.Transport{Proxy: http.ProxyFromEnvironment})}
	}
	return out, nil
}

// answer puts a server's question to the person at the terminal; elsewhere it declines.
func (e *environment) answer(_ context.Context, r *mcp.ElicitRequest) (*mcp.ElicitResult, error) {
	if !isTerminal(e.in) || !isTerminal(e.err) || r.Params.Mode == "url" {
		return &mcp.ElicitResult{Action: "decline"}, nil
	}
	fmt.Fprintf(e.err, "\n%s %s\n", e.style(bold, "The server asks:"), r.Params.Message)
	raw, err := json.Marshal(r.Params.RequestedSchema)
	if err != nil {
		return nil, err
	}
	var schema struct {
		Properties map[string]struct {
			Type        string `json:"type"`
			Description string `json:"description"`
			Enum        []any  `json:"enum"`
		} `json:"properties"`
	}
	if err := json.Unmarshal(raw, &schema); err != nil {
		return nil, err
	}
	content := map[string]any{}
	lines := bufio.NewScanner(e.in)
	for _, name := range slices.Sorted(mapKeys(schema.Properties)) {
		p := schema.Properties[name]
		fmt.Fprintf(e.err, "  %s %s%v: ", name, p.Description, p.Enum)
		if !lines.Scan() {
			return &mcp.ElicitResult{Action: "cancel"}, nil
		}
		if text := strings.TrimSpace(lines.Text()); text != "" {
			content[name] = scalar(text, p.Type)
		}
	}
	return &mcp.ElicitResult{Action: "accept", Content: content}, nil
}

func mapKeys[V any](m map[string]V) func(func(string) bool) {
	return func(yield func(string) bool) {
		for k := range m {
			if !yield(k) {
				return
			}
		}
	}
}

// scalar reads text as JSON where the type says so.
func scalar(text, typ string) any {
	if typ == "string" {
		return text
	}
	var v any
	if json.Unmarshal([]byte(text), &v) != nil {
		return text
	}
	return v
}

// print writes a value as JSON.
func (e *environment) print(v any) error {
	enc := json.NewEncoder(e.out)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}

// arguments reads arguments: a JSON object, @file, - for standard input, and name=value pairs
// whose values are JSON where they can be.
func arguments(in io.Reader, given []string, pairs []string) (map[string]any, error) {
	args := map[string]any{}
	for _, g := range given {
		var src []byte
		var err error
		switch {
		case g == "-":
			src, err = io.ReadAll(in)
		case strings.HasPrefix(g, "@"):
			src, err = os.ReadFile(g[1:])
		default:
			src = []byte(g)
		}
		if err != nil {
			return nil, err
		}
		d := json.NewDecoder(strings.NewReader(string(src)))
		d.UseNumber()
		var m map[string]any
		if err := d.Decode(&m); err != nil {
			return nil, fmt.Errorf("arguments must be a JSON object, such as '{\"id\": 1}', or --arg id=1: %w", err)
		}
		for k, v := range m {
			args[k] = v
		}
	}
	for _, p := range pairs {
		k, v, ok := strings.Cut(p, "=")
		if !ok {
			return nil, fmt.Errorf("--arg must be name=value, not %q", p)
		}
		d := json.NewDecoder(strings.NewReader(v))
		d.UseNumber()
		var val any
		if d.Decode(&val) != nil || d.More() {
			val = v
		}
		args[k] = val
	}
	return args, nil
}

// each calls one list method until its last page.
func each[T any](ctx context.Context, list func(ctx context.Context, cursor string) ([]T, string, error)) ([]T, error) {
	all := []T{}
	const most = 1000 // pages: a server whose list never ends is not worth more
	cursor := ""
	for range most {
		items, next, err := list(ctx, cursor)
		if err != nil {
			return nil, exit(exitFailed, err)
		}
		all = append(all, items...)
		if next == "" {
			return all, nil
		}
		cursor = next
	}
	return nil, exit(exitFailed, errors.New("the server's list has no end"))
}
