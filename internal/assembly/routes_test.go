package assembly

import (
	"context"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/backend/artifact"
	"newel.dev/newel/internal/guard/approve"
	"newel.dev/newel/internal/identity/devserver"
	"newel.dev/newel/internal/identity/verify"
	"newel.dev/newel/internal/secret"
)

// public are the routes that answer whoever asks, and why. A new one needs its reason here and its
// place in the documentation.
var public = map[string]string{
	"GET /health": "probes have no token",
	"GET /ready":  "probes have no token",
	"GET /.well-known/oauth-protected-resource":     "tells clients where to get a token (RFC 9728)",
	"GET /.well-known/oauth-protected-resource/mcp": "tells clients where to get a token (RFC 9728)",
	"GET /.well-known/oauth-authorization-server":   "the metadata of the authorization server, where an operator wants it here too",
	"/oauth/": "the authorization servers, where tokens come from",
	"/.well-known/oauth-authorization-server": "its metadata (RFC 8414)",
	"/.well-known/openid-configuration":       "its metadata under the other name",
	"GET /artifacts/{id}":                     "stored results, to whoever has an address that this server signed a while ago",
	"GET /metrics":                            "served when the configuration asks for it, to whoever reaches the port",
}

// isPublic also takes the metadata of virtual servers.
func isPublic(pattern string) bool {
	_, listed := public[pattern]
	_, rest, host := strings.Cut(strings.TrimPrefix(pattern, "GET "), "/.well-known/oauth-protected-resource")
	return listed || host && strings.HasPrefix(pattern, "GET ") && (rest == "" || strings.HasPrefix(rest, "/mcp"))
}

type oneTool struct{ ran *int }

// Name implements call.Backend.
func (oneTool) Name() string { return "one" }

// Capabilities implements call.Backend.
func (b oneTool) Capabilities(context.Context) ([]*call.Capability, error) {
	return []*call.Capability{{
		Kind: call.Tool, Name: "secret_tool", Description: "D.", Effect: call.Read, Input: jsontext.Value(`{"type":"object"}`), Origin: "one",
		Run: func(context.Context, *call.Call) (*call.Result, error) { *b.ran++; return call.Text("ran"), nil },
	}}, nil
}

// Every route that is registered asks who is calling, or is on the list of those that need not.
func TestNoRouteWithoutAuthentication(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	base := "http://" + l.Addr().String()
	dev, err := devserver.New(devserver.Options{Issuer: base, Resources: []string{base + "/mcp"}, Users: []devserver.User{{Name: "alice"}}})
	if err != nil {
		t.Fatal(err)
	}
	tokens, err := verify.New(verify.Options{Resource: base + "/mcp", Issuers: []verify.Issuer{{URL: base}}})
	if err != nil {
		t.Fatal(err)
	}
	ran := 0
	h, err := Build(t.Context(), &Options{ // everything that adds a route
		Backends: []call.Backend{oneTool{&ran}}, Identity: &Identities{Tokens: tokens}, Login: dev.Handler(),
		Access:  &Access{Resource: base + "/mcp", Issuers: []string{base}, Nonce: tokens.Nonce},
		Metrics: http.NotFoundHandler(), Webhook: &approve.Webhook{URL: base, Secret: secret.New(strings.Repeat("s", 32)), HTTP: http.DefaultClient},
		Artifacts: artifact.Options{Key: make([]byte, 32), Links: artifact.Links{Base: base, Life: time.Minute}},
		Servers:   []Server{{Path: "/mcp/part"}, {Path: "/mcp/found", Search: "on"}, {Path: "/mcp/acme", Tenant: "acme"}, {Host: "other.example.com", Path: "/mcp", Tenant: "other"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- h.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil && !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
	patterns := h.routes().patterns
	other, err := Build(t.Context(), &Options{ // what stands where the authorization server does otherwise
		Backends: []call.Backend{oneTool{&ran}}, Identity: &Identities{Tokens: tokens},
		Access: &Access{Resource: base + "/mcp", Issuers: []string{base}, Describe: func(context.Context) ([]byte, error) { return nil, nil }},
	})
	if err != nil {
		t.Fatal(err)
	}
	all := append(other.routes().patterns, patterns...)
	for pattern := range public {
		if !slices.Contains(all, pattern) {
			t.Errorf("%s is on the list and is no route", pattern)
		}
	}
	asked := 0
	for _, pattern := range patterns {
		if isPublic(pattern) {
			continue
		}
		asked++
		method, address, ok := strings.Cut(pattern, " ")
		if !ok {
			method, address = "", pattern
		}
		host, path, _ := strings.Cut(address, "/")
		sent := requests(t, base+"/"+path, host)
		if method != "" {
			if sent = slices.DeleteFunc(sent, func(r *http.Request) bool { return r.Method != method }); len(sent) == 0 {
				t.Errorf("%s: this test sends no %s", pattern, method)
			}
		}
		for _, r := range sent {
			resp, err := http.DefaultClient.Do(r)
			if err != nil {
				t.Fatal(err)
			}
			resp.Body.Close()
			if resp.StatusCode != http.StatusUnauthorized || resp.Header.Get("WWW-Authenticate") == "" {
				t.Errorf("%s: %s with %v answers %s without a token", pattern, r.Method, r.Header, resp.Status)
			}
		}
	}
	if asked != 9 || ran != 0 {
		t.Errorf("%d routes were asked, and %d tools ran", asked, ran)
	}
}

// requests are what clients of each revision send, without a token and with what is none.
func requests(t *testing.T, at, host string) []*http.Request {
	t.Helper()
	const meta = `"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28","io.modelcontextprotocol/clientCapabilities":{}}`
	var out []*http.Request
	add := func(method, body string, headers ...string) {
		for _, authorization := range []string{"", "Bearer known", "Bearer e30.e30.e30", "DPoP e30.e30.e30", "Basic OjA="} {
			r, err := http.NewRequestWithContext(t.Context(), method, at, strings.NewReader(body))
			if err != nil {
				t.Fatal(err)
			}
			if host != "" {
				r.Host = host
			}
			for i := 0; i < len(headers); i += 2 {
				r.Header.Set(headers[i], headers[i+1])
			}
			if authorization != "" {
				r.Header.Set("Authorization", authorization)
			}
			r.Header.Set("Content-Type", "application/json")
			r.Header.Set("Accept", "application/json, text/event-stream")
			out = append(out, r)
		}
	}
	stateless := func(method, params string, more ...string) {
		add(http.MethodPost, fmt.Sprintf(`{"jsonrpc":"2.0","id":1,"method":%q,"params":{%s%s}}`, method, params, meta), append(more, "Mcp-Protocol-Version", "2026-07-28", "Mcp-Method", method)...)
	}
	stateless("server/discover", "")
	stateless("tools/list", "")
	stateless("resources/list", "")
	stateless("resources/templates/list", "")
	stateless("prompts/list", "")
	stateless("tools/call", `"name":"secret_tool","arguments":{},`, "Mcp-Name", "secret_tool")
	stateless("resources/read", `"uri":"artifact://x",`, "Mcp-Name", "artifact://x")
	stateless("prompts/get", `"name":"p",`, "Mcp-Name", "p")
	stateless("subscriptions/listen", `"notifications":{"toolsListChanged":true},`)
	for _, revision := range []string{"2025-03-26", "2025-06-18", "2025-11-25"} {
		initialize := fmt.Sprintf(`{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":%q,"capabilities":{},"clientInfo":{"name":"t","version":"1"}}}`, revision)
		add(http.MethodPost, initialize)
		for _, session := range []string{"", "guessed"} {
			in := []string{"Mcp-Protocol-Version", revision, "Mcp-Session-Id", session}
			for _, message := range []string{"initialize", "ping", "tools/list", "tools/call", "logging/setLevel", "resources/subscribe", "notifications/initialized"} {
				body := fmt.Sprintf(`{"jsonrpc":"2.0","id":2,"method":%q,"params":{"name":"secret_tool"}}`, message)
				add(http.MethodPost, body, in...)
				add(http.MethodPost, "["+body+"]", in...)
			}
			add(http.MethodPost, `{"jsonrpc":"2.0","id":2,"result":{}}`, in...)
			add(http.MethodGet, "", in...)
			add(http.MethodDelete, "", in...)
		}
	}
	return out
}

// The list above is complete only while nobody else serves HTTP.
func TestNobodyElseHasRoutes(t *testing.T) {
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	allowed := map[string]string{
		"internal/assembly/run.go":           "routes, asked above",
		"internal/identity/issuer/issuer.go": "all of it stands below /oauth/ and its metadata",
		"cmd/newel/login.go":                 "waits for the browser on loopback, during a login",
	}
	found := map[string]bool{}
	for _, dir := range []string{".", "internal", "cmd", "modules"} {
		err := filepath.WalkDir(filepath.Join(root, dir), func(p string, d fs.DirEntry, err error) error {
			switch {
			case err != nil:
				return err
			case d.IsDir() && (dir == "." && p != filepath.Join(root, ".") || d.Name() == "testdata"):
				return fs.SkipDir
			case d.IsDir() || !strings.HasSuffix(p, ".go") || strings.HasSuffix(p, "_test.go"):
				return nil
			}
			syntax, err := parser.ParseFile(token.NewFileSet(), p, nil, 0)
			if err != nil {
				return err
			}
			name, err := filepath.Rel(root, p)
			if err != nil {
				return err
			}
			ast.Inspect(syntax, func(n ast.Node) bool {
				s, ok := n.(*ast.SelectorExpr)
				if !ok {
					return true
				}
				if x, ok := s.X.(*ast.Ident); ok && x.Name == "http" && slices.Contains([]string{"NewServeMux", "ServeMux", "Handle", "HandleFunc", "Server", "Serve", "ListenAndServe", "ListenAndServeTLS", "DefaultServeMux"}, s.Sel.Name) {
					found[filepath.ToSlash(name)] = true
				}
				return true
			})
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	for name := range found {
		if allowed[name] == "" {
			t.Errorf("%s serves HTTP: its routes are asked by no test", name)
		}
	}
	for name := range allowed {
		if !found[name] {
			t.Errorf("%s serves no HTTP any more", name)
		}
	}
}
