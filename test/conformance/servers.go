package main

import (
	"context"
	"fmt"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"newel.dev/newel/test/program"
)

// A subject is what the suite talks to: a server, or a gateway in front of one.
type subject struct {
	name    string   // "" for the fixture itself
	server  []string // command of the server over HTTP, its address left out; nil if the gateway starts it
	health  string   // path that answers once the server is ready
	gateway string   // configuration of the gateway, with %s for the server's address; "" for none
	newel   string   // binary of the gateway
}

// sdkServer is the official SDK's own conformance server.
const sdkServer = "github.com/modelcontextprotocol/go-sdk/conformance/everything-server"

// subjectsOf builds what the suite talks to.
func subjectsOf(ctx context.Context, temp string, gateway bool) ([]subject, error) {
	build := func(pkg, name string) (string, error) {
		binary := filepath.Join(temp, name)
		return binary, program.Build(ctx, binary, pkg)
	}
	fixture, err := build(program.Fixture, "fixture")
	if err != nil {
		return nil, err
	}
	direct := subject{server: []string{fixture, "-http="}, health: "/ready"}
	if !gateway {
		return []subject{direct}, nil
	}
	newel, err := build(program.Newel, "newel")
	if err != nil {
		return nil, err
	}
	sdk, err := build(sdkServer, "sdk-server")
	if err != nil {
		return nil, err
	}
	overHTTP := func(revision string) string {
		return "mcpServers:\n  upstream:\n    url: http://%s/mcp\n    revision: \"" + revision + "\"\n"
	}
	overStdio := func(revision string) string {
		return "mcpServers:\n  upstream:\n    command: " + fixture + "\n    revision: \"" + revision + "\"\n"
	}
	return []subject{
		{name: "fixture-stateless-http", server: direct.server, health: "/ready", gateway: overHTTP("2026-07-28"), newel: newel},
		{name: "fixture-sessions-http", server: direct.server, health: "/ready", gateway: overHTTP("2025-11-25"), newel: newel},
		{name: "fixture-stateless-stdio", gateway: overStdio("2026-07-28"), newel: newel},
		{name: "fixture-sessions-stdio", gateway: overStdio("2025-11-25"), newel: newel},
		{name: "sdk-stateless-http", server: []string{sdk, "-stateless=true", "-http="}, health: "/mcp", gateway: overHTTP("auto"), newel: newel},
		{name: "sdk-sessions-http", server: []string{sdk, "-stateless=false", "-http="}, health: "/mcp", gateway: overHTTP("auto"), newel: newel},
	}, nil
}

// leftOut are scenarios that a subject cannot pass whatever the gateway does, and why. Each was
// seen to fail, or to have nothing to test, against the server itself.
var leftOut = map[string]map[string]string{
	"sdk-stateless-http/2025-11-25": {
		"tools-call-sampling":          "the server asks through a session only",
		"tools-call-elicitation":       "the server asks through a session only",
		"elicitation-sep1034-defaults": "the server asks through a session only",
		"elicitation-sep1330-enums":    "the server asks through a session only",
		"server-sse-polling":           "only a server with sessions can close a stream in the middle of a call",
	},
	"fixture-stateless-http/2025-11-25":  {"server-sse-polling": "only a server with sessions can close a stream in the middle of a call"},
	"fixture-stateless-stdio/2025-11-25": {"server-sse-polling": "there is no stream to close"},
	"fixture-sessions-stdio/2025-11-25":  {"server-sse-polling": "there is no stream to close"},
	"fixture-sessions-http/2025-11-25":   {"server-sse-polling": "the gateway takes the server's stream up again and keeps that of its caller open"},
	"sdk-sessions-http/2025-11-25":       {"server-sse-polling": "the server keeps no events to come back for"},
	"fixture-sessions-http/2026-07-28": {
		"input-required-result-multiple-input-requests": "in sessions, questions come one after the other",
	},
	"fixture-sessions-stdio/2026-07-28": {
		"input-required-result-multiple-input-requests": "in sessions, questions come one after the other",
	},
	"sdk-sessions-http/2026-07-28": {
		"input-required-result-multiple-input-requests": "in sessions, questions come one after the other",
		"input-required-result-basic-elicitation":       "in sessions, questions have no keys",
		"input-required-result-ignore-extra-params":     "in sessions, questions have no keys",
		"input-required-result-multi-round":             "the server asks once at most in sessions",
	},
}

// ask runs both requirement sets against one subject.
func (s *subject) ask(ctx context.Context, here, temp string) error {
	url, stop, err := s.start(ctx, temp)
	if err != nil {
		return fmt.Errorf("%s: %w", s.name, err)
	}
	defer stop()
	for _, revision := range revisions {
		if err := suite(ctx, here, url, revision, s.results(temp, revision)); err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
	}
	return nil
}

func (s *subject) results(temp, revision string) string { return filepath.Join(temp, s.name+revision) }

// add adds what the suite found at a subject.
func (s *subject) add(got Report, temp string) error {
	for _, revision := range revisions {
		key := revision
		if s.name != "" {
			key = s.name + "/" + revision
		}
		if err := got.Read(key, s.results(temp, revision)); err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
		maps.DeleteFunc(got, func(k string, _ *Outcome) bool {
			// Of these six servers one has tasks; test/gateway has what becomes of them.
			return s.name != "" && strings.HasPrefix(k, key+" tasks-")
		})
		for scenario, why := range leftOut[key] {
			delete(got, key+" "+scenario)
			fmt.Printf("LEFT OUT  %s %s: %s\n", key, scenario, why)
		}
	}
	return nil
}

// start starts the server and, if there is one, the gateway, and returns the URL to talk to.
func (s *subject) start(ctx context.Context, temp string) (url string, stop func(), err error) {
	stop = func() {}
	addr := ""
	if s.server != nil {
		if addr, err = program.FreeAddress(); err != nil {
			return "", nil, err
		}
		last := len(s.server) - 1
		args := append(append([]string{}, s.server[1:last]...), s.server[last]+addr)
		if stop, err = startServer(ctx, s.server[0], args, "http://"+addr+s.health); err != nil {
			return "", nil, err
		}
	}
	if s.gateway == "" {
		return "http://" + addr + "/mcp", stop, nil
	}
	dir := filepath.Join(temp, s.name) // its own: a gateway keeps its state beside its configuration
	if err := os.Mkdir(dir, 0o700); err != nil {
		stop()
		return "", nil, err
	}
	config := filepath.Join(dir, "newel.yaml")
	text := s.gateway
	if addr != "" {
		text = fmt.Sprintf(text, addr)
	}
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		stop()
		return "", nil, err
	}
	front, err := program.FreeAddress()
	if err != nil {
		stop()
		return "", nil, err
	}
	stopGateway, err := startServer(ctx, s.newel, []string{"serve", "--config", config, "--listen", front}, "http://"+front+"/ready")
	if err != nil {
		stop()
		return "", nil, err
	}
	stopServer := stop
	return "http://" + front + "/mcp", func() { stopGateway(); stopServer() }, nil
}

// startServer starts a program and returns once its health address answers.
func startServer(ctx context.Context, binary string, args []string, health string) (stop func(), err error) {
	server := exec.Command(binary, args...)
	if os.Getenv("CONFORMANCE_LOG") != "" {
		server.Stderr = os.Stderr
	}
	p, err := program.Start(server)
	if err != nil {
		return nil, err
	}
	stop = func() { _ = p.End(10 * time.Second) } // CONFORMANCE_LOG shows what it had to say
	if err := p.Until(ctx, "the server", answers(ctx, health)); err != nil {
		stop()
		return nil, fmt.Errorf("%w; CONFORMANCE_LOG=1 shows what it says", err)
	}
	return stop, nil
}

// answers asks whether a server answers, whatever it says but that it is not there yet.
func answers(ctx context.Context, url string) func() bool {
	client := &http.Client{Timeout: time.Second}
	return func() bool {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			return false
		}
		resp, err := client.Do(req)
		return err == nil && resp.Body.Close() == nil && resp.StatusCode != http.StatusServiceUnavailable
	}
}
