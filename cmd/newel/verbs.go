package main

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"
	"text/tabwriter"

	"github.com/modelcontextprotocol/go-sdk/mcp"
	"github.com/spf13/cobra"
)

func listTools(ctx context.Context, s *mcp.ClientSession) ([]*mcp.Tool, error) {
	return each(ctx, func(ctx context.Context, cursor string) ([]*mcp.Tool, string, error) {
		r, err := s.ListTools(ctx, &mcp.ListToolsParams{Cursor: cursor})
		if err != nil {
			return nil, "", err
		}
		return r.Tools, r.NextCursor, nil
	})
}

func toolsCommand(env *environment) *cobra.Command {
	var t target
	c := &cobra.Command{
		Use:   "tools",
		Short: "List a server's tools",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return t.with(cmd.Context(), env, func(ctx context.Context, s *mcp.ClientSession) error {
				tools, err := listTools(ctx, s)
				if err != nil {
					return err
				}
				if t.output == "json" {
					return env.print(map[string]any{"tools": tools})
				}
				w := tabwriter.NewWriter(env.out, 0, 4, 2, ' ', 0)
				for _, tool := range tools {
					effect := ""
					if a := tool.Annotations; a != nil {
						switch {
						case a.ReadOnlyHint:
							effect = "read"
						case a.DestructiveHint != nil && *a.DestructiveHint:
							effect = "destructive"
						default:
							effect = "write"
						}
					}
					fmt.Fprintf(w, "%s\t%s\t%s\n", tool.Name, effect, firstLine(tool.Description))
				}
				return w.Flush()
			})
		},
	}
	t.flags(c)
	return c
}

func firstLine(s string) string {
	line, _, _ := strings.Cut(s, "\n")
	if len(line) > 100 {
		line = strings.ToValidUTF8(line[:100], "") + "…"
	}
	return line
}

func callCommand(env *environment) *cobra.Command {
	var t target
	var pairs []string
	var key string
	c := &cobra.Command{
		Use:   "call TOOL [JSON | @FILE | -]",
		Short: "Call a tool",
		Example: `  newel call search_orders --arg status=paid --arg limit=5
  newel call get_order '{"id": 10042}' --output json`,
		Args: cobra.RangeArgs(1, 2),
		ValidArgsFunction: func(cmd *cobra.Command, args []string, typed string) ([]string, cobra.ShellCompDirective) {
			if len(args) > 0 {
				return nil, cobra.ShellCompDirectiveDefault
			}
			var names []string
			err := t.with(cmd.Context(), env, func(ctx context.Context, s *mcp.ClientSession) error {
				tools, err := listTools(ctx, s)
				for _, tool := range tools {
					if strings.HasPrefix(tool.Name, typed) {
						names = append(names, tool.Name+"\t"+firstLine(tool.Description))
					}
				}
				return err
			})
			if err != nil {
				return nil, cobra.ShellCompDirectiveError
			}
			return names, cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(cmd *cobra.Command, given []string) error {
			args, err := arguments(env.in, given[1:], pairs)
			if err != nil {
				return err
			}
			return t.with(cmd.Context(), env, func(ctx context.Context, s *mcp.ClientSession) error {
				// Lists the tool first: the client mirrors arguments in headers as its schema says.
				if _, err := listTools(ctx, s); err != nil {
					return err
				}
				params := &mcp.CallToolParams{Name: given[0], Arguments: args}
				if key != "" {
					params.Meta = mcp.Meta{"dev.newel/idempotencyKey": key}
				}
				params.SetProgressToken("newel")
				r, err := s.CallTool(ctx, params)
				if err != nil {
					return exit(exitFailed, err)
				}
				return env.printResult(t.output, r)
			})
		},
	}
	t.flags(c)
	c.Flags().StringArrayVarP(&pairs, "arg", "a", nil, "one argument as name=value; values are JSON where they can be (repeatable)")
	c.Flags().StringVar(&key, "key", "", "idempotency key: a call that is made again with it is not done again")
	return c
}

func (e *environment) printResult(output string, r *mcp.CallToolResult) error {
	var err error
	if output == "json" {
		err = e.print(r)
	} else {
		for _, c := range r.Content {
			fmt.Fprintln(e.out, describe(c))
		}
	}
	if err == nil && r.IsError {
		return exit(exitFailed, nil)
	}
	return err
}

// describe shows a content block to a person.
func describe(c mcp.Content) string {
	switch c := c.(type) {
	case *mcp.TextContent:
		return c.Text
	case *mcp.ImageContent:
		return fmt.Sprintf("(image, %s, %d bytes)", c.MIMEType, len(c.Data))
	case *mcp.AudioContent:
		return fmt.Sprintf("(audio, %s, %d bytes)", c.MIMEType, len(c.Data))
	case *mcp.ResourceLink:
		return fmt.Sprintf("(link to %s: newel read %q)", c.Name, c.URI)
	case *mcp.EmbeddedResource:
		if c.Resource != nil {
			return contents(c.Resource)
		}
	}
	return "(content of another kind; see --output json)"
}

func contents(c *mcp.ResourceContents) string {
	if c.Blob != nil {
		return base64.StdEncoding.EncodeToString(c.Blob)
	}
	return c.Text
}

func readCommand(env *environment) *cobra.Command {
	var t target
	c := &cobra.Command{
		Use:     "read [URI]",
		Short:   "Read a resource, or list them",
		Example: "  newel read kb://policy/security",
		Args:    cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return t.with(cmd.Context(), env, func(ctx context.Context, s *mcp.ClientSession) error {
				if len(args) == 0 {
					return listResources(ctx, env, &t, s)
				}
				r, err := s.ReadResource(ctx, &mcp.ReadResourceParams{URI: args[0]})
				if err != nil {
					return exit(exitFailed, err)
				}
				if t.output == "json" {
					return env.print(r)
				}
				for _, c := range r.Contents {
					fmt.Fprintln(env.out, contents(c))
				}
				return nil
			})
		},
	}
	t.flags(c)
	return c
}

func listResources(ctx context.Context, env *environment, t *target, s *mcp.ClientSession) error {
	resources, err := each(ctx, func(ctx context.Context, cursor string) ([]*mcp.Resource, string, error) {
		r, err := s.ListResources(ctx, &mcp.ListResourcesParams{Cursor: cursor})
		if err != nil {
			return nil, "", err
		}
		return r.Resources, r.NextCursor, nil
	})
	if err != nil {
		return err
	}
	templates, err := each(ctx, func(ctx context.Context, cursor string) ([]*mcp.ResourceTemplate, string, error) {
		r, err := s.ListResourceTemplates(ctx, &mcp.ListResourceTemplatesParams{Cursor: cursor})
		if err != nil {
			return nil, "", err
		}
		return r.ResourceTemplates, r.NextCursor, nil
	})
	if err != nil {
		return err
	}
	if t.output == "json" {
		return env.print(map[string]any{"resources": resources, "resourceTemplates": templates})
	}
	w := tabwriter.NewWriter(env.out, 0, 4, 2, ' ', 0)
	for _, r := range resources {
		fmt.Fprintf(w, "%s\t%s\n", r.URI, r.Name)
	}
	for _, r := range templates {
		fmt.Fprintf(w, "%s\t%s\n", r.URITemplate, r.Name)
	}
	return w.Flush()
}

func promptsCommand(env *environment) *cobra.Command {
	var t target
	var pairs []string
	c := &cobra.Command{
		Use:     "prompts [NAME]",
		Short:   "List a server's prompts, or render one",
		Example: `  newel prompts answer_from_kb --arg question="How long are logs kept?"`,
		Args:    cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return t.with(cmd.Context(), env, func(ctx context.Context, s *mcp.ClientSession) error {
				if len(args) == 0 {
					return listPrompts(ctx, env, &t, s)
				}
				given := map[string]string{}
				for _, p := range pairs {
					k, v, ok := strings.Cut(p, "=")
					if !ok {
						return exit(exitUsage, errors.New("--arg must be name=value"))
					}
					given[k] = v
				}
				r, err := s.GetPrompt(ctx, &mcp.GetPromptParams{Name: args[0], Arguments: given})
				if err != nil {
					return exit(exitFailed, err)
				}
				if t.output == "json" {
					return env.print(r)
				}
				for _, m := range r.Messages {
					fmt.Fprintf(env.out, "%s: %s\n", m.Role, describe(m.Content))
				}
				return nil
			})
		},
	}
	t.flags(c)
	c.Flags().StringArrayVarP(&pairs, "arg", "a", nil, "one argument as name=value (repeatable)")
	return c
}

func listPrompts(ctx context.Context, env *environment, t *target, s *mcp.ClientSession) error {
	prompts, err := each(ctx, func(ctx context.Context, cursor string) ([]*mcp.Prompt, string, error) {
		r, err := s.ListPrompts(ctx, &mcp.ListPromptsParams{Cursor: cursor})
		if err != nil {
			return nil, "", err
		}
		return r.Prompts, r.NextCursor, nil
	})
	if err != nil {
		return err
	}
	if t.output == "json" {
		return env.print(map[string]any{"prompts": prompts})
	}
	w := tabwriter.NewWriter(env.out, 0, 4, 2, ' ', 0)
	for _, p := range prompts {
		var args []string
		for _, a := range p.Arguments {
			name := a.Name
			if !a.Required {
				name = "[" + name + "]"
			}
			args = append(args, name)
		}
		fmt.Fprintf(w, "%s\t%s\t%s\n", p.Name, strings.Join(args, " "), firstLine(p.Description))
	}
	return w.Flush()
}
