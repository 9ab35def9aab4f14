package clients

import (
	"context"
	"os/exec"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/modelcontextprotocol/go-sdk/mcp"
)

func overHTTP(url string) mcp.Transport { return &mcp.StreamableClientTransport{Endpoint: url} }

func overPipes(cmd *exec.Cmd) mcp.Transport { return &mcp.CommandTransport{Command: cmd} }

// takeGo is the same way with the official Go client.
func takeGo(t *testing.T, revision string, transport mcp.Transport) *walk {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), clientTimeout)
	defer cancel()
	var w walk
	var mu sync.Mutex
	reported := make(chan struct{}, 8)
	client := mcp.NewClient(&mcp.Implementation{Name: "go", Version: "1.0.0"}, &mcp.ClientOptions{
		ElicitationHandler: func(_ context.Context, r *mcp.ElicitRequest) (*mcp.ElicitResult, error) {
			schema, _ := r.Params.RequestedSchema.(map[string]any)
			asked, _ := schema["properties"].(map[string]any)
			content := map[string]any{}
			for name := range asked {
				content[name] = map[string]string{"name": "Ada", "color": "blue"}[name]
			}
			return &mcp.ElicitResult{Action: "accept", Content: content}, nil
		},
		ProgressNotificationHandler: func(_ context.Context, r *mcp.ProgressNotificationClientRequest) {
			mu.Lock()
			defer mu.Unlock()
			w.Progress = append(w.Progress, r.Params.Progress)
			reported <- struct{}{}
		},
	})
	session, err := client.Connect(ctx, transport, &mcp.ClientSessionOptions{ProtocolVersion: revision})
	if err != nil {
		t.Fatalf("connect: %v", err)
	}
	defer session.Close()
	w.Revision = session.InitializeResult().ProtocolVersion

	tools, err := session.ListTools(ctx, nil)
	check(t, "tools/list", err)
	resources, err := session.ListResources(ctx, nil)
	check(t, "resources/list", err)
	prompts, err := session.ListPrompts(ctx, nil)
	check(t, "prompts/list", err)
	w.Listed = slices.ContainsFunc(tools.Tools, func(x *mcp.Tool) bool { return x.Name == "test_simple_text" }) &&
		slices.ContainsFunc(resources.Resources, func(x *mcp.Resource) bool { return x.URI == "test://static-text" }) &&
		slices.ContainsFunc(prompts.Prompts, func(x *mcp.Prompt) bool { return x.Name == "test_simple_prompt" })

	call := func(name string, token any) (string, bool) {
		t.Helper()
		params := &mcp.CallToolParams{Name: name, Arguments: map[string]any{}}
		if token != nil {
			params.SetProgressToken(token)
		}
		r, err := session.CallTool(ctx, params)
		check(t, name, err)
		return text(t, r.Content[0]), r.IsError
	}
	w.Called, _ = call("test_simple_text", nil)
	if said, isError := call("test_error_handling", nil); isError {
		w.Failed = said
	}
	read, err := session.ReadResource(ctx, &mcp.ReadResourceParams{URI: "test://template/42/data"})
	check(t, "resources/read", err)
	w.Read = read.Contents[0].Text
	prompt, err := session.GetPrompt(ctx, &mcp.GetPromptParams{Name: "test_prompt_with_arguments", Arguments: map[string]string{"arg1": "a", "arg2": "b"}})
	check(t, "prompts/get", err)
	w.Prompt = text(t, prompt.Messages[0].Content)
	w.Asked, _ = call("test_input_required_result_multi_round", nil)
	w.Long, _ = call("test_tool_with_progress", "token")
	for range 3 { // the handler may run after the answer is here
		select {
		case <-reported:
		case <-time.After(time.Second):
		}
	}
	mu.Lock()
	defer mu.Unlock()
	return &w
}

func text(t *testing.T, c mcp.Content) string {
	t.Helper()
	block, ok := c.(*mcp.TextContent)
	if !ok {
		t.Fatalf("got %T, want text", c)
	}
	return block.Text
}

func check(t *testing.T, what string, err error) {
	t.Helper()
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}
