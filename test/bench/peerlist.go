package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"debug/buildinfo"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// peers are those that can be installed from a registry.
func peers() []*peer {
	return []*peer{
		{name: "gosdk", required: true, source: "github.com/modelcontextprotocol/go-sdk", command: builtHere},
		{name: "mcpgo", required: true, source: "github.com/mark3labs/mcp-go", command: builtHere},
		{name: "typescript", required: true, source: "@modelcontextprotocol/server", install: fromNPM("typescript", "server.mjs"),
			command: func(ctx context.Context, at *place) *exec.Cmd {
				return exec.CommandContext(ctx, "node", filepath.Join(at.installed, "server.mjs"), at.address())
			}},
		{name: "fastmcp", required: true, source: "fastmcp", install: fromPyPI("fastmcp", "server.py"),
			command: func(ctx context.Context, at *place) *exec.Cmd {
				return exec.CommandContext(ctx, at.python(), filepath.Join(at.installed, "server.py"), at.address())
			}},
		{name: "reverseproxy", gateway: true, command: builtHere},
		{name: "sdkproxy", gateway: true, source: "github.com/modelcontextprotocol/go-sdk", command: builtHere},
		{name: "fastmcp-proxy", gateway: true, source: "fastmcp", install: fromPyPI("fastmcp", "server.py"),
			command: func(ctx context.Context, at *place) *exec.Cmd {
				return exec.CommandContext(ctx, at.python(), filepath.Join(at.installed, "server.py"), at.address(), at.upstream)
			}},
		{name: "contextforge", gateway: true, source: "mcp-contextforge-gateway", install: fromPyPI("contextforge"), command: contextForge,
			ready: registerUpstream, path: "/mcp/", tool: "bench-echo"},
		{name: "litellm", gateway: true, source: "litellm", install: fromPyPI("litellm"), command: liteLLM, path: "/mcp/", tool: "bench-echo"},
	}
}

// newelAs is Newel in the role of a peer.
func newelAs(gateway bool) *peer {
	if gateway {
		return &peer{name: "gateway", gateway: true, command: builtHere}
	}
	return &peer{name: "newel", command: builtHere}
}

func (at *place) address() string { return at.host + ":" + at.port }
func (at *place) python() string  { return filepath.Join(at.installed, "venv", "bin", "python") }

// builtHere is one of servers/*; launch gives the folder of the peer its name.
func builtHere(ctx context.Context, at *place) *exec.Cmd {
	name, _, _ := strings.Cut(filepath.Base(at.dir), "-")
	args := []string{"-addr=" + at.address()}
	if at.upstream != "" {
		args = append(args, "-upstream="+at.upstream)
	}
	return exec.CommandContext(ctx, filepath.Join(at.bin, name), args...)
}

// contextForge runs with a database file, without authentication and limits: as little as it can be
// told to do for a call. Its secrets are made up for the run.
func contextForge(ctx context.Context, at *place) *exec.Cmd {
	cmd := exec.CommandContext(ctx, filepath.Join(at.installed, "venv", "bin", "mcpgateway"), "--host", at.host, "--port", at.port)
	key, word := secretWord(at.dir, "key"), secretWord(at.dir, "word")
	cmd.Env = append(os.Environ(), "HOST="+at.host, "DATABASE_URL=sqlite:///mcp.db", "LOG_LEVEL=ERROR",
		"AUTH_REQUIRED=false", "MCP_REQUIRE_AUTH=false", "ALLOW_UNAUTHENTICATED_ADMIN=true", "RATE_LIMITING_ENABLED=false",
		"SSRF_ALLOW_LOCALHOST=true", "SSRF_ALLOW_PRIVATE_NETWORKS=true",
		"JWT_SECRET_KEY="+key, "AUTH_ENCRYPTION_SECRET="+word, "BASIC_AUTH_PASSWORD="+word, "PLATFORM_ADMIN_PASSWORD=Aa1!"+word)
	return cmd
}

// secretWord is the same for every start in one folder, and of no use elsewhere.
func secretWord(dir, name string) string {
	path := filepath.Join(dir, name)
	if raw, err := os.ReadFile(path); err == nil {
		return string(raw)
	}
	word := rand.Text() + rand.Text()
	_ = os.WriteFile(path, []byte(word), 0o600) // without it the next start fails, and says so
	return word
}

// registerUpstream tells ContextForge of the server behind it.
func registerUpstream(ctx context.Context, s *server, upstream string) error {
	ctx, cancel := context.WithTimeout(ctx, peerPatience)
	defer cancel()
	body, err := json.Marshal(map[string]string{"name": "bench", "url": upstream, "transport": "STREAMABLEHTTP"})
	if err != nil {
		return err
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+s.addr+"/gateways", bytes.NewReader(body))
	if err != nil {
		return err
	}
	r.Header.Set("Content-Type", "application/json")
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	said, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err == nil && resp.StatusCode/100 != 2 {
		err = fmt.Errorf("registering the server behind: %s: %.300s", resp.Status, said)
	}
	return err
}

// liteLLM runs without a database and without keys, as a gateway for tools only.
func liteLLM(ctx context.Context, at *place) *exec.Cmd {
	config := filepath.Join(at.dir, "config.yaml")
	text := "model_list: []\nmcp_servers:\n  bench:\n    url: " + at.upstream + "\n    transport: http\n    allow_all_keys: true\n"
	_ = os.WriteFile(config, []byte(text), 0o600) // without it the start fails, and says so
	cmd := exec.CommandContext(ctx, filepath.Join(at.installed, "venv", "bin", "litellm"), "--config", config, "--host", at.host, "--port", at.port)
	cmd.Env = append(os.Environ(), "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY=true", "LITELLM_TELEMETRY=False", "LITELLM_LOCAL_MODEL_COST_MAP=True", "LITELLM_LOG=ERROR")
	return cmd
}

// An installer makes one peer ready in a folder that is kept between runs.
type installer struct {
	name     string
	root     string // of all of them
	folder   string // of this one, set by install
	progress io.Writer
}

// sources is where what the peers are made of is written down.
const sources = "peers"

// once installs unless the folder has what its sources ask for.
func (in *installer) once(ctx context.Context, install func(context.Context, *installer) error) error {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Minute)
	defer cancel()
	began := time.Now()
	fmt.Fprintf(in.progress, "%s: installing\n", in.name)
	if err := install(ctx, in); err != nil {
		return err
	}
	fmt.Fprintf(in.progress, "%s: there after %v\n", in.name, time.Since(began).Round(time.Millisecond))
	return nil
}

// make copies files of a source folder, and runs commands beside them unless they ran with the same
// files before.
func (in *installer) make(ctx context.Context, from string, files []string, commands ...[]string) error {
	in.folder = filepath.Join(in.root, from)
	if err := os.MkdirAll(in.folder, 0o755); err != nil {
		return err
	}
	sum := sha256.New()
	for _, file := range files {
		raw, err := os.ReadFile(filepath.Join(sources, from, file))
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(in.folder, file), raw, 0o600); err != nil {
			return err
		}
		fmt.Fprintf(sum, "%s %d\n%s", file, len(raw), raw)
	}
	stamp, want := filepath.Join(in.folder, "installed"), hex.EncodeToString(sum.Sum(nil))
	if have, err := os.ReadFile(stamp); err == nil && string(have) == want {
		return nil
	}
	for _, args := range commands {
		fmt.Fprintf(in.progress, "%s: %s\n", in.name, strings.Join(args, " "))
		cmd := exec.CommandContext(ctx, args[0], args[1:]...)
		cmd.Dir = in.folder
		if said, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w: %s", args[0], err, said[max(0, len(said)-600):])
		}
	}
	return os.WriteFile(stamp, []byte(want), 0o600)
}

// fromNPM installs what the lock file says, and runs no scripts of packages.
func fromNPM(from string, files ...string) func(context.Context, *installer) error {
	return func(ctx context.Context, in *installer) error {
		return in.make(ctx, from, append(files, "package.json", "package-lock.json"), []string{"npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"})
	}
}

// fromPyPI installs exactly the versions of requirements.txt, which names everything that is needed.
func fromPyPI(from string, files ...string) func(context.Context, *installer) error {
	return func(ctx context.Context, in *installer) error {
		return in.make(ctx, from, append(files, "requirements.txt"),
			[]string{"python3", "-m", "venv", "venv"},
			[]string{filepath.Join("venv", "bin", "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--requirement", "requirements.txt"})
	}
}

// versionOf reads the version of a peer from what it is made of.
func versionOf(s *standing) string {
	switch {
	case s.source == "":
		return "-"
	case s.install == nil:
		info, err := buildinfo.ReadFile(s.server.cmd.Path)
		if err != nil {
			return "?"
		}
		for _, m := range info.Deps {
			if m.Path == s.source {
				return m.Version
			}
		}
	}
	if raw, err := os.ReadFile(filepath.Join(s.at.installed, "requirements.txt")); err == nil {
		for line := range strings.Lines(string(raw)) {
			if name, version, _ := strings.Cut(strings.TrimSpace(line), "=="); name == s.source {
				return version
			}
		}
	}
	var lock struct {
		Dependencies map[string]string
	}
	if raw, err := os.ReadFile(filepath.Join(s.at.installed, "package.json")); err == nil && json.Unmarshal(raw, &lock) == nil {
		return lock.Dependencies[s.source]
	}
	return "?"
}
