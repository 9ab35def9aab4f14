package main

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/goccy/go-yaml"
	"github.com/modelcontextprotocol/go-sdk/mcp"

	"newel.dev/newel/test/program"
)

// drive is what the suite starts as the client under test: it puts the gateway in front of the
// suite's server, calls the server's tool through it, and is the person who logs in when the
// gateway says that one has to.
func drive(ctx context.Context, newel, url string) error {
	ctx, stop := context.WithTimeout(ctx, 25*time.Second)
	defer stop()
	dir, err := os.MkdirTemp("", "newel-drive-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	config, env, err := settings(ctx, dir, url)
	if err != nil {
		return err
	}
	addr, err := program.FreeAddress()
	if err != nil {
		return err
	}
	gateway := exec.Command(newel, "serve", "--config", config, "--listen", addr)
	gateway.Env = env
	heard := &ears{}
	gateway.Stderr = io.MultiWriter(heard, os.Stderr)
	p, err := program.Start(gateway)
	if err != nil {
		return err
	}
	defer func() { _ = p.End(10 * time.Second) }() // its standard error is that of the driver
	if err := p.Until(ctx, "the gateway", program.Ready("http://"+addr+"/ready")); err != nil {
		return err
	}
	for logins := 0; ; logins++ {
		from := heard.len()
		if logins == 0 {
			from = 0 // the gateway reads lists when it starts
		}
		err := through(ctx, "http://"+addr+"/mcp", heard, from)
		var needed errLogin
		if !errors.As(err, &needed) {
			return err
		}
		const most = 4 // more than the suite asks for: the gateway has to give up sooner
		if logins == most {
			return fmt.Errorf("it still needs a login after %d: %w", logins, err)
		}
		if err := logIn(ctx, newel, config, env); err != nil {
			return fmt.Errorf("newel login: %w", err)
		}
	}
}

// errLogin is what the gateway says when a person has to log in.
type errLogin struct{ error }

// through lists and calls through the gateway. The list is complete when the gateway has the
// server's; it says in its log what keeps it from that.
func through(ctx context.Context, url string, heard *ears, from int) error {
	client := mcp.NewClient(&mcp.Implementation{Name: "driver", Version: "1"}, nil)
	session, err := client.Connect(ctx, &mcp.StreamableClientTransport{Endpoint: url}, nil)
	if err != nil {
		return err
	}
	defer session.Close()
	again := time.NewTicker(50 * time.Millisecond)
	defer again.Stop()
	for {
		list, err := session.ListTools(ctx, nil)
		if err != nil {
			return err
		}
		if slices.ContainsFunc(list.Tools, func(t *mcp.Tool) bool { return t.Name == "test-tool" }) {
			break
		}
		if said := verdict(heard.since(from)); said != nil {
			return said
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-again.C:
		}
	}
	r, err := session.CallTool(ctx, &mcp.CallToolParams{Name: "test-tool"})
	if err != nil {
		return cmp.Or(verdict(err.Error()), err)
	}
	text := ""
	for _, c := range r.Content {
		if t, ok := c.(*mcp.TextContent); ok {
			text += t.Text
		}
	}
	if r.IsError || text != "test" {
		return cmp.Or(verdict(text), fmt.Errorf("the tool answers %q", text))
	}
	return nil
}

// verdict returns what a text of the gateway says about its access, or nil.
func verdict(text string) error {
	for line := range strings.Lines(text) {
		switch {
		case strings.Contains(line, "newel login --upstream"):
			return errLogin{errors.New(strings.TrimSpace(line))}
		case strings.Contains(line, "did not give"), strings.Contains(line, "gives no access"):
			return errors.New(strings.TrimSpace(line))
		}
	}
	return nil
}

// logIn runs newel login and is the browser: the suite's pages ask nobody.
func logIn(ctx context.Context, newel, config string, env []string) error {
	login := exec.CommandContext(ctx, newel, "login", "--config", config, "--upstream", "upstream")
	login.Env = env
	said, err := login.StderrPipe()
	if err != nil {
		return err
	}
	if err := login.Start(); err != nil {
		return err
	}
	var browser error
	for lines := bufio.NewScanner(said); lines.Scan(); {
		line := lines.Text()
		fmt.Fprintln(os.Stderr, line)
		if page := strings.TrimSpace(line); strings.HasPrefix(page, "http") {
			browser = visit(ctx, page)
		}
	}
	return errors.Join(login.Wait(), browser)
}

// visit goes where a page leads.
func visit(ctx context.Context, page string) error {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, page, nil)
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	_, err = io.Copy(io.Discard, resp.Body)
	return err
}

// given is what the suite tells a client about one scenario, beside the address.
type given struct {
	ClientID    string `json:"client_id"`
	Secret      string `json:"client_secret"`
	Key         string `json:"private_key_pem"`
	IDPClientID string `json:"idp_client_id"`
	IDToken     string `json:"idp_id_token"`
	IDP         string `json:"idp_issuer"`
	Workload    string `json:"valid_jwt"`
}

// settings writes the configuration that an operator would write for a scenario.
func settings(ctx context.Context, dir, url string) (config string, env []string, err error) {
	var g given
	if text := os.Getenv("MCP_CONFORMANCE_CONTEXT"); text != "" {
		if err := json.Unmarshal([]byte(text), &g); err != nil {
			return "", nil, err
		}
	}
	auth := map[string]any{}
	if g.ClientID != "" {
		auth["client_id"] = g.ClientID
		if auth["issuer"], err = issuerOf(ctx, url); err != nil {
			return "", nil, err
		}
	}
	if g.Secret != "" {
		auth["client_secret"] = "${env:UPSTREAM_SECRET}"
	}
	files := map[string]string{}
	scenario := os.Getenv("MCP_CONFORMANCE_SCENARIO")
	switch {
	case strings.HasPrefix(scenario, "auth/client-credentials-"):
		auth["grant"] = "client_credentials"
		if g.Key != "" {
			auth["private_key_file"], files["key.pem"] = "key.pem", g.Key
		}
	case scenario == "auth/enterprise-managed-authorization":
		auth["grant"] = "enterprise"
		auth["identity_provider"] = map[string]any{"issuer": g.IDP, "client_id": g.IDPClientID}
		auth["assertion_file"], files["token"] = "token", g.IDToken
	case scenario == "auth/wif-jwt-bearer":
		auth["grant"] = "workload"
		auth["assertion_file"], files["token"] = "token", g.Workload
	case scenario == "auth/basic-cimd":
		auth["client_metadata_url"] = "https://conformance-test.local/client-metadata.json" // the suite expects this one
	case strings.HasPrefix(scenario, "auth/2025-03-26-"):
		auth["legacy"] = true
	}
	server := map[string]any{"url": url, "auth": auth}
	if os.Getenv("MCP_CONFORMANCE_PROTOCOL_VERSION") != "2026-07-28" {
		server["revision"] = "2025-11-25" // the suite's servers of sessions know no server/discover
	}
	text, err := yaml.Marshal(map[string]any{"mcpServers": map[string]any{"upstream": server}})
	if err != nil {
		return "", nil, err
	}
	files["newel.yaml"] = string(text)
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			return "", nil, err
		}
	}
	return filepath.Join(dir, "newel.yaml"), []string{"NEWEL_CONFIG_DIR=" + dir, "UPSTREAM_SECRET=" + g.Secret, "HOME=" + dir}, nil
}

// issuerOf is what an operator knows who has registered a client: the suite does not say it.
func issuerOf(ctx context.Context, url string) (string, error) {
	origin := strings.TrimSuffix(url, "/mcp")
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, origin+"/.well-known/oauth-protected-resource/mcp", nil)
	if err != nil {
		return "", err
	}
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	var doc struct {
		Servers []string `json:"authorization_servers"`
	}
	if err := json.UnmarshalRead(resp.Body, &doc); err != nil || len(doc.Servers) == 0 {
		return "", fmt.Errorf("the server names no authorization server: %w", err)
	}
	return doc.Servers[0], nil
}

// ears collect what a program says.
type ears struct {
	mu   sync.Mutex
	said strings.Builder
}

// Write implements io.Writer.
func (e *ears) Write(p []byte) (int, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.said.Write(p)
}

func (e *ears) len() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.said.Len()
}

func (e *ears) since(from int) string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.said.String()[from:]
}
