package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/go-json-experiment/json"

	"newel.dev/newel/test/program"
)

// authorization runs the suite's scenarios for authorization servers against the one for
// development, and stands in for the person at the browser; then those for clients.
func authorization(ctx context.Context, here, temp string, got Report) error {
	newel := filepath.Join(temp, "newel")
	if err := program.Build(ctx, newel, program.Newel); err != nil {
		return err
	}
	addr, err := program.FreeAddress()
	if err != nil {
		return err
	}
	config := filepath.Join(temp, "auth.yaml")
	text := "auth: {mode: dev, scopes: [\"a:read\"]}\nmcpServers:\n  none: {url: \"http://127.0.0.1:1/mcp\"}\n"
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		return err
	}
	base := "http://" + addr
	stop, err := startServer(ctx, newel, []string{"serve", "--config", config, "--listen", addr}, base+"/ready")
	if err != nil {
		return err
	}
	defer stop()
	back, err := program.FreeAddress()
	if err != nil {
		return err
	}
	_, port, err := net.SplitHostPort(back)
	if err != nil {
		return err
	}
	client, err := registerClient(ctx, base+"/oauth/register", "http://127.0.0.1:"+port+"/callback", "http://localhost:"+port+"/callback")
	if err != nil {
		return err
	}
	results := filepath.Join(temp, "authorization")
	bin := filepath.Join(here, "node_modules", ".bin")
	cmd := exec.CommandContext(ctx, filepath.Join(bin, "node"), filepath.Join(bin, "conformance"),
		"authorization", "--url", base, "--client-id", client, "--resource", base+"/mcp", "--port", port, "-o", results)
	cmd.Dir = here
	said, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	cmd.Stderr = cmd.Stdout
	if err := cmd.Start(); err != nil {
		return err
	}
	var log strings.Builder
	for lines := bufio.NewScanner(said); lines.Scan(); {
		line := strings.TrimSpace(lines.Text())
		fmt.Fprintln(&log, line)
		if strings.HasPrefix(line, base+"/oauth/authorize?") {
			if err := press(ctx, line); err != nil {
				return err
			}
		}
	}
	err = cmd.Wait()
	if _, failed := errors.AsType[*exec.ExitError](err); err != nil && !failed {
		return err
	}
	if os.Getenv("CONFORMANCE_LOG") != "" {
		fmt.Fprint(os.Stderr, log.String())
	}
	if err := got.Read("authorization-server", results); err != nil {
		return fmt.Errorf("%w; the suite said: %s", err, log.String())
	}
	return upstreams(ctx, here, temp, newel, got)
}

func registerClient(ctx context.Context, endpoint string, redirects ...string) (string, error) {
	body, err := json.Marshal(map[string]any{"client_name": "conformance", "redirect_uris": redirects})
	if err != nil {
		return "", err
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, endpoint, strings.NewReader(string(body)))
	if err != nil {
		return "", err
	}
	r.Header.Set("Content-Type", "application/json")
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	var out struct {
		ID string `json:"client_id"`
	}
	if err := json.UnmarshalRead(resp.Body, &out); err != nil || out.ID == "" {
		return "", fmt.Errorf("registering a client: status %d: %w", resp.StatusCode, err)
	}
	return out.ID, nil
}

// press logs alice in, as a person would. The suite prints the address before it listens for the
// browser that comes back: a person would not be that quick.
func press(ctx context.Context, page string) error {
	ctx, stop := context.WithTimeout(ctx, 10*time.Second)
	defer stop()
	again := time.NewTicker(100 * time.Millisecond)
	defer again.Stop()
	for {
		err := pressOnce(ctx, page)
		if !errors.Is(err, syscall.ECONNREFUSED) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-again.C:
		}
	}
}

// pressOnce sends the form and goes where the page sends the browser.
func pressOnce(ctx context.Context, page string) error {
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, page, strings.NewReader(url.Values{"user": {"alice"}}.Encode()))
	if err != nil {
		return err
	}
	r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	_, err = io.Copy(io.Discard, resp.Body)
	return err
}
