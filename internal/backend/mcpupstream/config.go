package mcpupstream

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/netip"
	"net/url"
	"path"
	"slices"
	"strings"
	"time"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/module"
	"newel.dev/newel/internal/secret"
)

// Config is one MCP server behind the gateway: a command or a URL, in the form that clients use
// (mcpServers), and what is ours.
type Config struct {
	Command   string                   `yaml:"command" doc:"Program of a server that speaks over stdio; started without a shell, on demand."`
	Args      []string                 `yaml:"args" doc:"Its arguments."`
	Env       map[string]secret.String `yaml:"env" doc:"Its environment, beside PATH, HOME, LANG, TMPDIR and USER. Plain text, or a reference such as ${env:NAME}."`
	Cwd       string                   `yaml:"cwd" doc:"Its folder; default: that of the configuration."`
	URL       string                   `yaml:"url" doc:"Address of a server that speaks Streamable HTTP. Redirects are not followed."`
	Transport string                   `yaml:"transport" enum:"stdio,http,streamable-http,streamableHttp,sse" doc:"How it is spoken to, as some clients write it. Only sse needs to be said: the HTTP+SSE of revision 2024-11-05."`
	Headers   map[string]secret.String `yaml:"headers" doc:"Headers sent with every request. Plain text, or a reference such as ${env:NAME}."`
	Auth      *Auth                    `yaml:"auth" doc:"How the gateway gets access to a server that asks for access tokens."`
	// Access adds that to requests. It is needed where there is Auth: this package gets no tokens.
	Access func(next http.RoundTripper) http.RoundTripper `yaml:"-"`

	TLS     TLS      `yaml:"tls" doc:"What is shown to the server, and expected of it."`
	Private []string `yaml:"private_ranges" doc:"Private address ranges in which the server may be, such as 10.0.0.0/8. Not needed for localhost, nor for a private address that is written in url."`

	Revision string   `yaml:"revision" enum:"auto,2026-07-28,2025-11-25" default:"auto" doc:"Protocol revision to speak: the stateless one, one with sessions, or whatever the server speaks."`
	Prefix   string   `yaml:"prefix" doc:"Put before the names of its tools and prompts, such as files_."`
	Tools    []Tool   `yaml:"tools" doc:"Which tools are published, and how; empty publishes all."`
	Exclude  []string `yaml:"exclude" doc:"Tools that are not published; * stands for any text."`
	PerUser  bool     `yaml:"per_principal" doc:"Whether every caller has sessions (or processes) of its own."`

	ConnectTimeout     time.Duration `yaml:"connect_timeout" default:"5s" doc:"Longest wait for a connection."`
	StartTimeout       time.Duration `yaml:"start_timeout" default:"30s" doc:"Longest start of a process with its first handshake."`
	ListTimeout        time.Duration `yaml:"list_timeout" default:"5s" doc:"How long the start of the gateway waits for this server's lists; they come later then."`
	CallTimeout        time.Duration `yaml:"call_timeout" doc:"Longest call of this server; default: the gateway's own."`
	RefreshInterval    time.Duration `yaml:"refresh_interval" default:"5m" doc:"How often its lists are asked for; sooner if it does not tell of changes and its ttlMs is shorter."`
	MaxMessageBytes    int           `yaml:"max_message_bytes" default:"16777216" doc:"Largest message it may send, in bytes."`
	MaxConcurrentCalls int           `yaml:"max_concurrent_calls" doc:"Most calls it gets at once; default: as resilience says."`
	MaxProcesses       int           `yaml:"max_processes" default:"8" doc:"Most processes of a command, or streams of a server that speaks HTTP+SSE."`
	MaxProcessMemory   int64         `yaml:"max_process_memory" doc:"Most private memory of each process of a command, in bytes; default: no cap. Programs that reserve much and use little, such as Node.js, need room."`
	MaxProcessCPU      time.Duration `yaml:"max_process_cpu" doc:"Most processor time of each process over its life, at least 1s; default: no cap."`
	MaxProcessLifetime time.Duration `yaml:"max_process_lifetime" doc:"A process older than this ends when nobody uses it; default: none does for its age."`
	StopTimeout        time.Duration `yaml:"stop_timeout" default:"2s" doc:"How long a process may take to end after its input ends, and again after SIGTERM."`
	MaxStderrRate      int           `yaml:"max_stderr_rate" default:"16384" doc:"Most bytes a second of a process's standard error that reach the log."`
	IdleTimeout        time.Duration `yaml:"idle_timeout" default:"5m" doc:"A session or process that nobody uses ends after this long."`
	MaxParked          int           `yaml:"max_parked" default:"100" doc:"Most calls that wait for input of a caller who has to come back with it."`
	ParkTimeout        time.Duration `yaml:"park_timeout" default:"5m" doc:"How long such a call waits."`
}

// TLS is what is shown to a server over https, and expected of it.
type TLS struct {
	Certificate string   `yaml:"client_certificate" doc:"File of the certificate shown to the server, in PEM form; read again when it changes."`
	Key         string   `yaml:"client_key" doc:"File of its private key."`
	CA          string   `yaml:"ca" doc:"File of the authorities trusted instead of the system's, in PEM form."`
	ServerName  string   `yaml:"server_name" doc:"Name in the server's certificate; default: that in url."`
	Pins        []string `yaml:"pins" doc:"Keys of which the server's certificate, or an authority above it, must have one: sha256/ and the SHA-256 of the public key (SPKI) in base64. Several let keys rotate."`
}

func (t *TLS) empty() bool {
	return t.Certificate == "" && t.Key == "" && t.CA == "" && t.ServerName == "" && len(t.Pins) == 0
}

// Auth is how the gateway gets access tokens for a server.
type Auth struct {
	Grant          string        `yaml:"grant" enum:"authorization_code,client_credentials,enterprise,workload" default:"authorization_code" doc:"authorization_code: a person logs in, with newel login --upstream. client_credentials: the gateway has access of its own. enterprise: the company's identity provider vouches for this server (ID-JAG). workload: the platform's token is exchanged (RFC 7523)."`
	Issuer         string        `yaml:"issuer" doc:"Authorization server that the client is registered at; required with a secret, enterprise and workload. Default: what the server names."`
	ClientID       string        `yaml:"client_id" doc:"Id of the client there; default: client_metadata_url, or one is registered at login."`
	ClientSecret   secret.String `yaml:"client_secret" doc:"Its secret."`
	PrivateKeyFile string        `yaml:"private_key_file" doc:"Its private key (PEM) for private_key_jwt."`
	MetadataURL    string        `yaml:"client_metadata_url" doc:"Address of the client's metadata document, where authorization servers take one instead of a registration."`
	Scopes         []string      `yaml:"scopes" doc:"Scopes to ask for, and no others; default: what the server asks for."`
	AssertionFile  string        `yaml:"assertion_file" doc:"File with the identity token (enterprise) or the platform's token (workload); it is read every time."`
	Provider       Provider      `yaml:"identity_provider" doc:"Identity provider, with enterprise."`
	Private        []string      `yaml:"private_ranges" doc:"Private address ranges in which authorization servers, and the server's own metadata, may be, such as 10.0.0.0/8; others are not asked."`
	Legacy         bool          `yaml:"legacy" doc:"Whether a server of revision 2025-03-26, which describes no access, is its own authorization server."`
}

// Provider is an identity provider.
type Provider struct {
	Issuer       string        `yaml:"issuer" doc:"Its issuer."`
	ClientID     string        `yaml:"client_id" doc:"Id of the gateway there."`
	ClientSecret secret.String `yaml:"client_secret" doc:"Its secret there."`
}

// Tool is how one tool is published.
type Tool struct {
	Name        string         `yaml:"name" required:"true" doc:"Name of the tool at the server; * stands for any text."`
	As          string         `yaml:"as" doc:"Name to publish it under, instead of prefix and name."`
	Description string         `yaml:"description" doc:"Description to publish instead of the server's."`
	Effect      string         `yaml:"effect" enum:"read,write,destructive" doc:"What it does to the world; default: what the server's annotations say, which is destructive if they say nothing."`
	Scopes      []string       `yaml:"scopes" doc:"Scopes a caller needs."`
	Fixed       map[string]any `yaml:"fixed" doc:"Arguments that are always these; callers neither see nor send them."`
	Hidden      []string       `yaml:"hidden" doc:"Optional arguments that callers neither see nor send."`
}

// Module declares the backend for configurations.
func Module() module.Module {
	return module.Backend("mcp", "An MCP server behind the gateway, over stdio or Streamable HTTP, of any revision.",
		func(_ context.Context, name string, c Config, env module.Env) (call.Backend, error) {
			return New(name, c, env)
		})
}

// setDefaults fills in what a zero Config leaves open, for those who do not come from a file.
func (c *Config) setDefaults() {
	c.Revision = cmp.Or(c.Revision, "auto")
	c.ConnectTimeout = cmp.Or(c.ConnectTimeout, 5*time.Second)
	c.StartTimeout = cmp.Or(c.StartTimeout, 30*time.Second)
	c.ListTimeout = cmp.Or(c.ListTimeout, 5*time.Second)
	c.RefreshInterval = cmp.Or(c.RefreshInterval, 5*time.Minute)
	c.MaxMessageBytes = cmp.Or(c.MaxMessageBytes, 16<<20)
	c.MaxProcesses = cmp.Or(c.MaxProcesses, 8)
	c.IdleTimeout = cmp.Or(c.IdleTimeout, 5*time.Minute)
	c.StopTimeout = cmp.Or(c.StopTimeout, 2*time.Second)
	c.MaxStderrRate = cmp.Or(c.MaxStderrRate, 16<<10)
	c.MaxParked = cmp.Or(c.MaxParked, 100)
	c.ParkTimeout = cmp.Or(c.ParkTimeout, 5*time.Minute)
}

// check returns every problem, each with the place of its setting.
func (c *Config) check(at func(setting string) string) error {
	var problems []error
	bad := func(setting, format string, args ...any) {
		problems = append(problems, fmt.Errorf("%s: "+format, append([]any{at(setting)}, args...)...))
	}
	switch {
	case (c.Command == "") == (c.URL == ""):
		bad("", "a server needs either a command or a url")
	case c.Transport == "stdio" && c.Command == "", c.Transport != "" && c.Transport != "stdio" && c.URL == "":
		bad("transport", "%s needs a %s", c.Transport, map[bool]string{true: "command", false: "url"}[c.Transport == "stdio"])
	case c.Transport == "sse" && c.Revision == "2026-07-28":
		bad("revision", "HTTP+SSE is older than 2026-07-28; leave one of transport and revision out")
	case c.MaxProcessCPU != 0 && c.MaxProcessCPU < time.Second:
		bad("max_process_cpu", "must be at least 1s")
	}
	if c.Auth != nil {
		switch {
		case c.URL == "":
			bad("auth", "only a server with a url asks for access tokens")
		case c.Access == nil:
			bad("auth", "this program gets no access tokens")
		case slices.ContainsFunc(slices.Collect(maps.Keys(c.Headers)), func(name string) bool { return strings.EqualFold(name, "Authorization") }):
			bad("headers", "Authorization comes from auth here; leave one of the two out")
		}
	}
	if c.URL != "" {
		u, err := url.Parse(c.URL)
		switch {
		case err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https":
			bad("url", "must be an http or https address")
		case u.User != nil:
			bad("url", "must not hold a password; put it into headers, as a reference")
		case u.Scheme == "http" && !c.TLS.empty():
			bad("tls", "the address is http, where nothing is shown or expected; write https")
		}
	}
	if c.URL == "" && (!c.TLS.empty() || len(c.Private) > 0) {
		bad("tls", "tls and private_ranges are for servers with a url")
	}
	for i, p := range c.Private {
		if _, err := netip.ParsePrefix(p); err != nil {
			bad(fmt.Sprintf("private_ranges[%d]", i), "%q is not a range of addresses, such as 10.0.0.0/8", p)
		}
	}
	for name, v := range c.Headers {
		if !validHeader(name, v.Reveal()) {
			bad("headers", "%q is not a valid header, or one that the gateway sets itself", name)
		}
	}
	for name := range c.Env {
		if name == "" || strings.ContainsAny(name, "=\x00") {
			bad("env", "%q is not a valid name of a variable", name)
		}
	}
	seen := map[string]bool{}
	for i, t := range c.Tools {
		setting := fmt.Sprintf("tools[%d]", i)
		if _, err := path.Match(t.Name, ""); err != nil || t.Name == "" {
			bad(setting+".name", "%q is not a name or pattern", t.Name)
		}
		if t.As != "" && strings.Contains(t.Name, "*") {
			bad(setting+".as", "a pattern cannot have one name")
		}
		if seen[t.Name] {
			bad(setting+".name", "%q is there twice", t.Name)
		}
		seen[t.Name] = true
	}
	for i, p := range c.Exclude {
		if _, err := path.Match(p, ""); err != nil {
			bad(fmt.Sprintf("exclude[%d]", i), "%q is not a pattern", p)
		}
	}
	return errors.Join(problems...)
}

// validHeader refuses what would break a request and what the protocol itself sets.
func validHeader(name, value string) bool {
	canonical := http.CanonicalHeaderKey(name)
	if strings.HasPrefix(canonical, "Mcp-") || slices.Contains([]string{"Content-Type", "Content-Length", "Accept", "Host", "Connection", "Transfer-Encoding", "Last-Event-Id"}, canonical) {
		return false
	}
	return name != "" && !strings.ContainsAny(name, " :\r\n\t") && !strings.ContainsAny(value, "\r\n\x00")
}

// rule returns how a tool is published, and whether it is.
func (c *Config) rule(name string) (Tool, bool) {
	for _, p := range c.Exclude {
		if ok, _ := path.Match(p, name); ok { // checked at start
			return Tool{}, false
		}
	}
	var found *Tool
	for i, t := range c.Tools {
		if t.Name == name {
			return t, true
		}
		if ok, _ := path.Match(t.Name, name); ok && found == nil {
			found = &c.Tools[i]
		}
	}
	if found != nil {
		return *found, true
	}
	return Tool{}, len(c.Tools) == 0
}
