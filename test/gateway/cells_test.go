package gateway

import (
	"context"
	"log/slog"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/modelcontextprotocol/go-sdk/mcp"

	"newel.dev/newel/internal/backend/mcpupstream"
	"newel.dev/newel/test/program"
)

func logger(t *testing.T) *slog.Logger {
	t.Helper()
	if os.Getenv("NEWEL_TEST_LOG") == "" {
		return slog.New(slog.DiscardHandler)
	}
	return slog.New(slog.NewTextHandler(os.Stderr, nil))
}

// upstreams are the ways to reach the fixture, by era and transport.
func upstreams(t *testing.T) map[string]mcpupstream.Config {
	url, fixture := startFixture(t), program.Built(t, program.Fixture)
	return map[string]mcpupstream.Config{
		"stateless http":  {URL: url, Revision: "2026-07-28"},
		"sessions http":   {URL: url, Revision: "2025-11-25"},
		"stateless stdio": {Command: fixture, Revision: "2026-07-28"},
		"sessions stdio":  {Command: fixture, Revision: "2025-11-25"},
		"negotiated":      {URL: url},
	}
}

// client is the official SDK's client, of one era, that answers what it is asked.
func client(t *testing.T, url, revision string, progress chan<- float64) *mcp.ClientSession {
	t.Helper()
	c := mcp.NewClient(&mcp.Implementation{Name: "test", Version: "1"}, &mcp.ClientOptions{
		ElicitationHandler: func(_ context.Context, r *mcp.ElicitRequest) (*mcp.ElicitResult, error) {
			return &mcp.ElicitResult{Action: "accept", Content: map[string]any{"name": "Ada", "username": "ada", "email": "a@b.c", "response": "yes"}}, nil
		},
		//lint:ignore SA1019 sampling is served for as long as a revision has it
		CreateMessageHandler: func(context.Context, *mcp.CreateMessageRequest) (*mcp.CreateMessageResult, error) {
			//lint:ignore SA1019 as above
			return &mcp.CreateMessageResult{Role: "assistant", Model: "m", Content: &mcp.TextContent{Text: "Paris"}}, nil
		},
		ProgressNotificationHandler: func(_ context.Context, r *mcp.ProgressNotificationClientRequest) { progress <- r.Params.Progress },
	})
	s, err := c.Connect(t.Context(), &mcp.StreamableClientTransport{Endpoint: url}, &mcp.ClientSessionOptions{ProtocolVersion: revision})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func text(r *mcp.CallToolResult) string {
	var b strings.Builder
	for _, c := range r.Content {
		if t, ok := c.(*mcp.TextContent); ok {
			b.WriteString(t.Text)
		}
	}
	return b.String()
}

// Every era of client works with every era of server, features that ask back included.
func TestCells(t *testing.T) {
	for name, config := range upstreams(t) {
		t.Run(name, func(t *testing.T) {
			url := serve(t, map[string]mcpupstream.Config{"up": config})
			for _, revision := range []string{"2026-07-28", "2025-11-25"} {
				t.Run(revision, func(t *testing.T) {
					progress := make(chan float64, 100)
					s := client(t, url, revision, progress)
					tools, err := s.ListTools(t.Context(), nil)
					if err != nil || len(tools.Tools) < 10 {
						t.Fatalf("tools: %v", err)
					}
					callTool := func(name string, args map[string]any) *mcp.CallToolResult {
						t.Helper()
						if args == nil {
							args = map[string]any{}
						}
						p := &mcp.CallToolParams{Name: name, Arguments: args}
						p.SetProgressToken("p")
						r, err := s.CallTool(t.Context(), p)
						if err != nil {
							t.Fatalf("%s: %v", name, err)
						}
						return r
					}
					if r := callTool("test_simple_text", nil); r.IsError || text(r) == "" {
						t.Errorf("simple text: %v %q", r.IsError, text(r))
					}
					callTool("test_tool_with_progress", nil)
					for done := 0.0; done < 100; {
						select {
						case done = <-progress: // the client hands them out after the call, as it likes
						case <-time.After(5 * time.Second):
							t.Fatalf("progress stopped at %v", done)
						}
					}
					if r := callTool("test_elicitation", map[string]any{"message": "Who?"}); r.IsError || !strings.Contains(text(r), "accept") {
						t.Errorf("elicitation: %v %q", r.IsError, text(r))
					}
					if r := callTool("test_sampling", map[string]any{"prompt": "Capital of France?"}); r.IsError || !strings.Contains(text(r), "Paris") {
						t.Errorf("sampling: %v %q", r.IsError, text(r))
					}
					if r, err := s.ReadResource(t.Context(), &mcp.ReadResourceParams{URI: "test://static-text"}); err != nil || len(r.Contents) != 1 {
						t.Errorf("resource: %v", err)
					}
					if _, err := s.ReadResource(t.Context(), &mcp.ReadResourceParams{URI: "test://template/42/data"}); err != nil {
						t.Errorf("template: %v", err)
					}
					if r, err := s.GetPrompt(t.Context(), &mcp.GetPromptParams{Name: "test_prompt_with_arguments", Arguments: map[string]string{"arg1": "a", "arg2": "b"}}); err != nil || len(r.Messages) == 0 {
						t.Errorf("prompt: %v", err)
					}
					if r, err := s.Complete(t.Context(), &mcp.CompleteParams{Ref: &mcp.CompleteReference{Type: "ref/prompt", Name: "test_prompt_with_arguments"}, Argument: mcp.CompleteParamsArgument{Name: "arg1", Value: "p"}}); err != nil || r.Completion.Values == nil {
						t.Errorf("completion: %v", err)
					}
				})
			}
		})
	}
}
