// Package config turns a YAML file into checked values with positions. It is pure: it opens
// nothing and dials nothing, so that a configuration can be checked anywhere.
//
// Start reading at [Load]; decode.go holds YAML against Go types, schema.go makes the JSON Schema
// and the reference page of the same types. Everything wrong is reported at once, each problem
// with line, column and, where one can be guessed, a suggestion. Secrets are only accepted as
// references.
package config

import (
	"cmp"
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/parser"

	"newel.dev/newel/internal/module"
	"newel.dev/newel/internal/policy"
	"newel.dev/newel/internal/secret"
)

// MaxBytes bounds a configuration file.
const MaxBytes = 1 << 20

// Config is a configuration.
type Config struct {
	Server         Server    `yaml:"server" doc:"What clients see of the server."`
	Listen         string    `yaml:"listen" default:"127.0.0.1:8080" doc:"Address to serve HTTP on, as host:port. Without authentication only loopback addresses are accepted."`
	AllowedHosts   []string  `yaml:"allowed_hosts" doc:"Host names that clients may use, beside loopback ones."`
	AllowedOrigins []string  `yaml:"allowed_origins" doc:"Origins of web pages that may call the server, such as https://app.example.com."`
	Compatibility  []string  `yaml:"compatibility" enum:"absent-headers" doc:"What is put up with of clients that do not keep to the protocol. absent-headers: clients of revision 2026-07-28 may leave out headers that mirror the body; those that are there have to agree with it."`
	TLS            TLS       `yaml:"tls" doc:"Encryption of what is served over HTTP."`
	Auth           Auth      `yaml:"auth" doc:"Who may call."`
	Policy         Policy    `yaml:"policy" doc:"Who may call what."`
	Limits         Limits    `yaml:"limits" doc:"Bounds of what is served at once."`
	Quotas         Quotas    `yaml:"quotas" doc:"How much each tenant, caller, client and tool may use."`
	Cache          Cache     `yaml:"cache" doc:"Results that are kept and given again."`
	Redis          Redis     `yaml:"redis" doc:"What nodes share."`
	Telemetry      Telemetry `yaml:"telemetry" doc:"Logs, traces and metrics."`
	SLOs           []SLO     `yaml:"slos" doc:"Service level objectives: what calls of tools are to be like. newel slo rules makes recording rules and alerts of them for Prometheus."`
	State          State     `yaml:"state" doc:"What is remembered of calls, and the audit log."`
	Audit          Audit     `yaml:"audit" doc:"What the audit log keeps of calls."`
	Effects        Effects   `yaml:"effects" doc:"Calls that change something."`
	Tasks          Tasks     `yaml:"tasks" doc:"Calls that go on after their caller was answered."`
	Approvals      Approvals `yaml:"approvals" doc:"Who hears of calls that wait for a person, beside newel approvals."`
	Artifacts      Artifacts `yaml:"artifacts" doc:"Results that are too large to send."`
	ToolSearch     string    `yaml:"tool_search" enum:"auto,on,off" default:"auto" doc:"Whether /mcp has search_tools and call_tool beside its tools; auto: from 50 tools on."`
	Servers        []Virtual `yaml:"servers" doc:"Virtual servers: paths that show a part of what is served."`
	Backends       []Backend `yaml:"backends" doc:"What is served, beside mcpServers."`

	Resilience Resilience `yaml:"resilience" doc:"How much of the server one backend may take, and what happens while it fails."`
}

// Server is what clients see.
type Server struct {
	Name         string `yaml:"name" default:"newel" doc:"Name of the server."`
	Title        string `yaml:"title" doc:"Name for people."`
	Version      string `yaml:"version" default:"0.0.0" doc:"Version of what is served."`
	Instructions string `yaml:"instructions" doc:"How to use the server: models read this."`
}

// TLS is the encryption of what is served over HTTP.
type TLS struct {
	Certificates []KeyPair `yaml:"certificates" doc:"Certificates, one for each name or group of names; the first is for clients that ask for another name or none. Files are read again when they change."`
	MinVersion   string    `yaml:"min_version" enum:"1.2,1.3" default:"1.2" doc:"Oldest version of TLS."`
	Clients      string    `yaml:"client_certificates" enum:"none,optional,required,optional_any" default:"none" doc:"Whether clients show a certificate. optional: one that is shown must be of client_ca. required: every client shows one of client_ca. optional_any: any may be shown, for access tokens bound to certificates (RFC 8705)."`
	ClientCA     string    `yaml:"client_ca" doc:"File of the authorities of clients' certificates, in PEM form."`
	ACME         ACME      `yaml:"acme" doc:"An authority that is asked for certificates (RFC 8555, challenge tls-alpn-01); it has to reach this server on port 443."`
	Terminated   bool      `yaml:"terminated_by_proxy" doc:"Whether a proxy in front speaks TLS with clients, and plain HTTP with this server; trusted_proxies names it."`
	Proxies      []string  `yaml:"trusted_proxies" doc:"Addresses of that proxy, such as 10.0.3.0/24. From others but this machine only /health, /ready and /metrics are answered."`
}

// On reports whether TLS is spoken here.
func (t *TLS) On() bool { return len(t.Certificates) > 0 || len(t.ACME.Domains) > 0 }

// KeyPair names the files of a certificate and its key.
type KeyPair struct {
	Certificate string `yaml:"certificate" required:"true" doc:"File of the certificate, followed by those between it and its authority, in PEM form."`
	Key         string `yaml:"key" required:"true" doc:"File of its private key, in PEM form."`
}

// ACME is an authority that is asked for certificates.
type ACME struct {
	Directory string   `yaml:"directory" default:"https://acme-v02.api.letsencrypt.org/directory" doc:"Address of its directory."`
	Domains   []string `yaml:"domains" doc:"Names that certificates are asked for, without wildcards."`
	Email     string   `yaml:"email" doc:"Where the authority may write to."`
	Cache     string   `yaml:"cache" doc:"Folder for the account, certificates and keys; needed. Several servers may share it."`
	Terms     bool     `yaml:"accept_terms" doc:"Whether you accept the terms of the authority; it issues nothing otherwise."`
	CA        string   `yaml:"ca" doc:"File of the authorities trusted for the address of a private ACME server; default: the system's."`
	Private   []string `yaml:"private_ranges" doc:"Private address ranges in which that server may be, such as 10.0.0.0/8."`
}

// Auth is who may call.
type Auth struct {
	Mode      string      `yaml:"mode" enum:"none,tokens,broker,dev" default:"none" doc:"none: everybody who can reach the server, which is why it listens on loopback only. tokens: access tokens of the issuers. broker: those of the built-in authorization server, which logs people in at the company's identity provider. dev: those of the built-in authorization server for development, on loopback only."`
	PublicURL string      `yaml:"public_url" doc:"Address of the server as clients write it, such as https://mcp.example.com; default: http and the address it listens on. With /mcp behind it, it is the audience of tokens."`
	Scopes    []string    `yaml:"scopes" doc:"Scopes that clients are told to ask for first."`
	Issuers   []Issuer    `yaml:"issuers" doc:"Authorization servers whose tokens are accepted."`
	Describe  bool        `yaml:"serve_metadata" doc:"Whether the metadata of the first issuer is served at /.well-known/oauth-authorization-server too: for clients of revision 2025-03-26, which look for it there."`
	DPoP      string      `yaml:"dpop" enum:"optional,required" default:"optional" doc:"Whether access tokens must be bound to a key of their client (RFC 9449). Bound ones always need its proof."`
	Private   []string    `yaml:"private_ranges" doc:"Private address ranges in which issuers may be, such as 10.0.0.0/8; others are not asked."`
	Broker    Broker      `yaml:"broker" doc:"The authorization server of mode broker."`
	Stdio     LocalCaller `yaml:"stdio" doc:"Who calls over stdio: whoever started the program."`
	Users     []User      `yaml:"users" doc:"People who can log in to the authorization server for development; default: alice, who may everything, and bob, who may read."`
}

// Issuer is an authorization server.
type Issuer struct {
	URL          string        `yaml:"url" required:"true" doc:"Exactly as in the iss claim of its tokens."`
	Audiences    []string      `yaml:"audiences" doc:"What the aud claim may name; default: the addresses of this server."`
	Profile      string        `yaml:"profile" enum:"rfc9068,entra,okta,keycloak,dex" default:"rfc9068" doc:"How its access tokens look."`
	Algorithms   []string      `yaml:"algorithms" doc:"Signature algorithms; default: RS256, PS256, ES256, ES384, EdDSA, Ed25519."`
	JWKS         string        `yaml:"jwks" doc:"Address of its keys; default: found in its metadata."`
	TenantClaim  string        `yaml:"tenant_claim" doc:"Claim that names the tenant; dots lead into objects."`
	Tenant       string        `yaml:"tenant" doc:"Tenant of all its tokens; default: what tenant_claim or the address that a token is for says."`
	RolesClaim   string        `yaml:"roles_claim" default:"roles" doc:"Claim that lists roles; dots lead into objects."`
	Scopes       []string      `yaml:"scopes" doc:"Scopes of tokens that name none; not with the profile rfc9068."`
	Skew         time.Duration `yaml:"skew" default:"30s" doc:"Tolerated difference of clocks, at most 2m."`
	Introspect   string        `yaml:"introspection" doc:"Address to ask about opaque tokens (RFC 7662)."`
	ClientID     string        `yaml:"client_id" doc:"Name of this server there."`
	ClientSecret secret.String `yaml:"client_secret" doc:"Its secret there."`
}

// LocalCaller is who calls over stdio.
type LocalCaller struct {
	Subject string   `yaml:"subject" doc:"Name; default: the user of the operating system."`
	Tenant  string   `yaml:"tenant" doc:"Tenant."`
	Scopes  []string `yaml:"scopes" doc:"Scopes; default: all."`
	Roles   []string `yaml:"roles" doc:"Roles."`
}

// User is a person who can log in for development.
type User struct {
	Name   string   `yaml:"name" required:"true" doc:"Name to log in with."`
	Tenant string   `yaml:"tenant" doc:"Tenant."`
	Scopes []string `yaml:"scopes" doc:"Scopes that may be granted to clients of this user; * stands for all."`
	Roles  []string `yaml:"roles" doc:"Roles."`
}

// Policy is who may call what.
type Policy struct {
	Environment string        `yaml:"environment" default:"development" doc:"Where this runs. In production, destructive tools are denied unless a rule names them."`
	ReadOnly    bool          `yaml:"read_only" doc:"Whether only tools that read may be called."`
	Explicit    bool          `yaml:"explicit" doc:"Whether callers are told that something is denied although they may not see it; otherwise it looks as if it did not exist."`
	Cedar       []string      `yaml:"cedar" doc:"Files with policies in the Cedar language, which have to permit what the rules allow."`
	OPA         OPA           `yaml:"opa" doc:"An Open Policy Agent, which has to allow what the rules allow."`
	Rules       []policy.Rule `yaml:"rules" doc:"Rules. Without any, what is published needs its scopes and no more; with some, what none allows is denied."`
	Shadow      []policy.Rule `yaml:"shadow" doc:"Rules that are tried beside the others: the log says where they would decide otherwise."`
	Tests       []policy.Test `yaml:"tests" doc:"Cases that the rules must decide as they say: checked before anything is served."`
}

// OPA is an Open Policy Agent.
type OPA struct {
	URL          string        `yaml:"url" doc:"Its address, such as http://127.0.0.1:8181; without one no agent is asked."`
	Document     string        `yaml:"document" default:"newel/decision" doc:"The document that decides a call: true or false, or an object with verdict, rule and reason."`
	ListDocument string        `yaml:"list_document" doc:"The document that lists names of what a caller may see; without one, lists show what scopes and rules allow."`
	Token        secret.String `yaml:"token" doc:"Bearer token for the agent."`
	Timeout      time.Duration `yaml:"timeout" default:"1s" doc:"Longest wait for an answer; after it, the call is denied."`
	Private      []string      `yaml:"private_ranges" doc:"Private address ranges in which the agent may be, besides this machine."`
}

// Virtual is a virtual server.
type Virtual struct {
	Path         string   `yaml:"path" required:"true" doc:"Its path, such as /mcp/finance."`
	Host         string   `yaml:"host" doc:"Name that it is reached by, such as acme.example.com, without port; default: any. A host may have a /mcp of its own."`
	Tenant       string   `yaml:"tenant" doc:"Tenant whose callers alone are served. Access tokens for the address of this server are of this tenant."`
	Name         string   `yaml:"name" doc:"Name of the server; default: server.name."`
	Title        string   `yaml:"title" doc:"Name for people."`
	Instructions string   `yaml:"instructions" doc:"How to use the server: models read this."`
	Backends     []string `yaml:"backends" doc:"Names of the backends it shows; empty shows all."`
	Tools        []string `yaml:"tools" doc:"Names of tools; * stands for any text. Empty shows all."`
	Resources    []string `yaml:"resources" doc:"URIs and templates of resources; * stands for any text. Empty shows all."`
	Prompts      []string `yaml:"prompts" doc:"Names of prompts; * stands for any text. Empty shows all."`
	ToolSearch   string   `yaml:"tool_search" enum:"auto,on,off" default:"auto" doc:"Whether it has search_tools and call_tool; auto: from 50 tools on."`
}

// Limits bound what is served at once.
type Limits struct {
	MaxMessageBytes    Size          `yaml:"max_message_bytes" default:"4MiB" doc:"Largest message."`
	MaxDepth           int           `yaml:"max_depth" default:"64" doc:"Deepest nesting of JSON."`
	MaxElements        int           `yaml:"max_elements" default:"100000" doc:"Most members and elements of one message."`
	MaxConcurrentCalls int           `yaml:"max_concurrent_calls" default:"256" doc:"Most calls that run at once."`
	MaxQueuedCalls     int           `yaml:"max_queued_calls" default:"1024" doc:"Most calls that wait."`
	QueueTimeout       time.Duration `yaml:"queue_timeout" default:"5s" doc:"Longest wait of a call."`
	CallTimeout        time.Duration `yaml:"call_timeout" default:"60s" doc:"Longest run of a call."`
	MaxMemory          Size          `yaml:"max_memory" doc:"Memory that the process may have, such as 512MiB; default: nobody looks. From 85 % on no subscription or session begins, from 90 % on tools in quotas.not_critical are refused, from 95 % on all calls."`
	MaxStreams         int           `yaml:"max_streams" default:"10000" doc:"Most open subscriptions."`
	MaxStreamsPerPeer  int           `yaml:"max_streams_per_peer" default:"1000" doc:"Most open subscriptions of one caller, or of one client address where nobody asks who is calling."`
	MaxConnections     int           `yaml:"max_connections" default:"20000" doc:"Most open connections. Each needs a descriptor (ulimit -n)."`
	MaxConnsPerPeer    int           `yaml:"max_connections_per_peer" default:"2000" doc:"Most open connections of one client address. Behind a proxy that speaks TLS (tls.terminated_by_proxy) it does not count for the proxy."`
	HeaderTimeout      time.Duration `yaml:"header_timeout" default:"10s" doc:"Until the headers of a request are there."`
	BodyTimeout        time.Duration `yaml:"body_timeout" default:"60s" doc:"Until the whole request is there; every 64 KiB of it have a sixth of that."`
	IdleTimeout        time.Duration `yaml:"idle_timeout" default:"120s" doc:"A connection without a request is closed after this long."`
	WriteTimeout       time.Duration `yaml:"write_timeout" default:"30s" doc:"Until a client has taken the next 64 KiB of an answer, or an event; after it the connection is closed."`
	MaxSessions        int           `yaml:"max_sessions" default:"10000" doc:"Most sessions of older protocol revisions."`
	MaxSessionsPerPeer int           `yaml:"max_sessions_per_peer" default:"1000" doc:"Most sessions of one caller, or of one client address where nobody asks who is calling."`
	MaxSessionStreams  int           `yaml:"max_session_streams" default:"64" doc:"Most open requests of one session."`
	SessionIdleTimeout time.Duration `yaml:"session_idle_timeout" default:"30m" doc:"A session ends after this long without a message."`
	MaxResultBytes     Size          `yaml:"max_result_bytes" default:"256KiB" doc:"Largest result; larger ones are kept as artifacts and linked."`
	MaxResultTokens    int           `yaml:"max_result_tokens" default:"64000" doc:"Most estimated tokens of a result."`
}

// Quotas are how much each may use.
type Quotas struct {
	Rules       []Quota     `yaml:"rules" doc:"Limits. A call has to be within all that are about it."`
	Costs       []QuotaCost `yaml:"costs" doc:"Units that calls of tools cost; the first that fits counts, others cost one."`
	NotCritical []string    `yaml:"not_critical" doc:"Names of tools that are refused first when a budget runs out; * stands for any text."`
	Share       float64     `yaml:"share_without_redis" default:"0.5" doc:"Share of each limit that a node grants by itself while Redis is away, above 0 and at most 1."`
}

// Quota is one limit.
type Quota struct {
	Name       string   `yaml:"name" required:"true" doc:"Name of the limit, as those who are over it are told."`
	Per        []string `yaml:"per" enum:"tenant,principal,client,tool" doc:"What is counted together: of one tenant, principal, client or tool. Empty counts all calls together."`
	Tools      []string `yaml:"tools" doc:"Names of the tools, prompts and resources it is about; * stands for any text. Empty is about all."`
	Tenants    []string `yaml:"tenants" doc:"Tenants it is about; empty is about all."`
	Rate       string   `yaml:"rate" doc:"Calls per second, minute or hour, such as 20/s, 600/m, 1000/h."`
	Burst      int      `yaml:"burst" doc:"Calls that may come at once; default: those of one second."`
	Concurrent int      `yaml:"concurrent" doc:"Calls that run at once."`
	Budget     Budget   `yaml:"budget" doc:"What may be used in an hour, a day or a month."`
	AlertAt    float64  `yaml:"alert_at" doc:"Share of the budget at which the log warns, such as 0.8."`
	DegradeAt  float64  `yaml:"degrade_at" doc:"Share of the budget from which tools that are not critical are refused, such as 0.9."`
}

// Budget is what may be used in a window.
type Budget struct {
	Calls  int64  `yaml:"calls" doc:"Calls."`
	Tokens int64  `yaml:"tokens" doc:"Estimated tokens of results."`
	Cost   int64  `yaml:"cost" doc:"Units of cost."`
	Every  string `yaml:"every" enum:"hour,day,month" default:"day" doc:"How long it lasts; windows begin at full hours, days and months of UTC."`
}

// QuotaCost is what calls of some tools cost.
type QuotaCost struct {
	Tools []string `yaml:"tools" required:"true" doc:"Names of the tools; * stands for any text."`
	Units int64    `yaml:"units" doc:"Units that one call costs."`
}

// Cache is which results are kept.
type Cache struct {
	Rules    []CacheRule `yaml:"rules" doc:"Results of which tools and resources; the first rule that fits counts. Only what reads is kept."`
	MaxBytes Size        `yaml:"max_bytes" default:"64MiB" doc:"Most that is kept; the least recently used goes first."`
	MaxEntry Size        `yaml:"max_entry_bytes" default:"1MiB" doc:"Largest result that is kept."`
	Shared   bool        `yaml:"shared" doc:"Whether nodes give each other's results again, sealed in Redis; a refresh counts for all at once then. The nodes need redis.url and the same state.key_file."`
}

// CacheRule says how results are kept.
type CacheRule struct {
	Names     []string      `yaml:"names" required:"true" doc:"Names of tools, or URIs of resources; * stands for any text."`
	TTL       time.Duration `yaml:"ttl" required:"true" doc:"For how long. A result that says less is kept for less."`
	For       string        `yaml:"for" enum:"caller,tenant,everybody" default:"caller" doc:"Who is given a result again. Results that depend on who is calling, or that a server calls private, are kept for their caller alone whatever is written here."`
	RefreshOn []string      `yaml:"refresh_on" doc:"Names of tools whose calls, and URIs of resources whose updates, make what is kept old; * stands for any text."`
}

// Redis is what nodes share.
type Redis struct {
	Sessions  bool          `yaml:"sessions" doc:"Whether nodes share the sessions of older protocol revisions: a request goes to the node that has its session, and a session whose node is gone goes on at another. The nodes need the same state.key_file."`
	Advertise string        `yaml:"advertise" doc:"With sessions: address at which other nodes reach this one, such as http://10.0.3.7:8080."`
	Private   []string      `yaml:"private_ranges" doc:"With sessions: private address ranges in which the other nodes are, such as 10.0.3.0/24."`
	URL       secret.String `yaml:"url" doc:"Address of a Redis or Valkey server that nodes share, such as redis://:password@host:6379/0, or rediss:// for TLS. Without one, every node counts by itself, takes DPoP proofs of its own nonces, and has its own logins (auth.mode broker). Proofs and logins need the same state.key_file too."`
}

// Telemetry is logs, traces and metrics.
type Telemetry struct {
	LogLevel     string `yaml:"log_level" enum:"debug,info,warn,error" default:"info" doc:"Lowest level of logs, which go to standard error as JSON lines."`
	Prometheus   bool   `yaml:"prometheus" default:"true" doc:"Whether /metrics is served."`
	OTLPEndpoint string `yaml:"otlp_endpoint" doc:"URL of an OpenTelemetry collector for traces, such as http://127.0.0.1:4318; empty sends none."`
}

// SLO is a service level objective.
type SLO struct {
	Name        string        `yaml:"name" required:"true" doc:"Name of the objective: lower-case letters, digits, - and _."`
	Tools       []string      `yaml:"tools" doc:"Names of the tools whose calls count; * stands for any text. Empty: all."`
	Success     float64       `yaml:"success" default:"0.995" doc:"Share of calls that must not fail for a reason of the server's, above 0 and below 1. Errors of callers, and results that tell of an error, are no failures."`
	Latency     time.Duration `yaml:"latency" doc:"Time within which calls are to be answered; one of 1ms, 2ms, 5ms, 10ms, 20ms, 50ms, 100ms, 200ms, 500ms, 1s, 2s, 5s, 10s, 30s, 1m, 2m, 5m. Default: no objective."`
	LatencyRate float64       `yaml:"latency_success" default:"0.95" doc:"Share of calls that must be answered within it, above 0 and below 1."`
	Window      time.Duration `yaml:"window" default:"720h" doc:"Time over which shares are counted, in whole days from 24h to 2160h."`
}

// State is what is remembered.
type State struct {
	Engine  string        `yaml:"engine" enum:"sqlite,postgres,memory" default:"sqlite" doc:"sqlite: a file, for one node. postgres: a database, for any number of nodes. memory: nothing outlives the process, so a call that is tried again after a restart runs again."`
	Path    string        `yaml:"path" default:".newel/state.db" doc:"File of sqlite, from the folder of the configuration on. One process has it at a time; newel stdio takes one of its own beside it."`
	DSN     secret.String `yaml:"dsn" doc:"How to connect to postgres, such as postgres://newel@db.internal/newel."`
	KeyFile string        `yaml:"key_file" default:".newel/key" doc:"Key that seals what is stored and signs the audit log; made if it is missing. All nodes of one database need the same. Keep a copy: without it answers cannot be replayed, and stored results cannot be read."`
	Heads   string        `yaml:"checkpoint" default:".newel/checkpoint" doc:"File that gets the newest signed head of the audit log, every minute. Keep copies elsewhere: the log is checked against them. A log that does not continue the head in the file is not served."`
	Witness string        `yaml:"witness" doc:"Address that every new head is posted to, as the signed text it is, so that somebody else has a copy."`
	Private []string      `yaml:"private_ranges" doc:"Private address ranges in which the witness may be, besides this machine."`
	Origin  string        `yaml:"origin" default:"newel" doc:"Name of the audit log in its signed heads, such as newel.example.com/audit."`
}

// Audit is what the audit log keeps of calls.
type Audit struct {
	Retention AuditRetention `yaml:"retention" doc:"How long arguments of calls are kept in the log, by the class of the tool; 0: until newel audit erase. Records stay, so the log stays provable."`
	Redact    Redact         `yaml:"redact" doc:"What is taken out of arguments before they are written, beside members such as password, token and api_key, what schemas call writeOnly or format password, payment cards and IBANs."`
}

// AuditRetention is how long values are kept.
type AuditRetention struct {
	Read        time.Duration `yaml:"read" doc:"Of calls that read and that somebody had to approve; others leave no values."`
	Write       time.Duration `yaml:"write" doc:"Of tools that write."`
	Destructive time.Duration `yaml:"destructive" doc:"Of tools that destroy, and of those that do not say what they do."`
}

// Redact is what is secret in arguments.
type Redact struct {
	Members  []string        `yaml:"members" doc:"Names of members, at any depth: pin. With dots the end of a path, * stands for any text: *.birth_date, customer.name. Case, - and _ do not matter."`
	Patterns []RedactPattern `yaml:"patterns" doc:"Texts that are secret."`
	Secrets  bool            `yaml:"secrets" default:"true" doc:"Whether keys and tokens of known services are looked for, by the rules of gitleaks."`
}

// RedactPattern is a text that is secret.
type RedactPattern struct {
	Name    string `yaml:"name" required:"true" doc:"What is shown in place of the text: [redacted:name]."`
	Pattern string `yaml:"pattern" required:"true" doc:"Regular expression (RE2); its first group, if it has one, is what is taken out."`
}

// Effects is how calls that change something are treated.
type Effects struct {
	Wait      time.Duration `yaml:"wait" default:"5s" doc:"How long a call waits for another one with its idempotency key, before it is told to try again."`
	Retention time.Duration `yaml:"retention" default:"24h" doc:"How long an answer is kept for calls that come again with its key."`
	Confirm   []string      `yaml:"confirm" enum:"write,destructive" doc:"Classes of tools whose calls the person at the client has to confirm; clients that cannot ask are refused. Tools whose recovery is safe are not confirmed, nor calls that somebody approved."`
	Tools     []EffectTool  `yaml:"tools" doc:"What you know of tools; the first that fits counts."`
}

// EffectTool is what the operator says of tools.
type EffectTool struct {
	Tool     string        `yaml:"tool" required:"true" doc:"Name of the tool; * stands for any text but /."`
	Recovery string        `yaml:"recovery" enum:"none,safe,resend_same_key,lookup" default:"none" doc:"What may be done when it is not known whether a call ran. none: it is never run again. safe: running it again does no harm. resend_same_key: what runs it takes dev.newel/idempotencyKey and does it once. lookup: another tool tells."`
	Lookup   string        `yaml:"lookup" doc:"For lookup: a tool that reads, takes {operation, arguments} and returns {found: true or false}, and the result if it has it."`
	Settle   time.Duration `yaml:"settle" above:"0" doc:"For lookup: how long a call that is not found may still be done, counted from when it was last sent. Until then it is not sent again; callers are told when to come back. Longer than the tool may hold what was sent to it, hangs and queues included, and at most effects.retention; default: twice limits.call_timeout, of a task twice what its run may still take."`
	Key      string        `yaml:"key" enum:"optional,required" default:"optional" doc:"Whether calls without an idempotency key are refused."`
	Undo     EffectUndo    `yaml:"undo" doc:"What undoes a call, for newel undo."`
	Once     time.Duration `yaml:"once" doc:"Calls without a key, by the same caller with the same arguments within this time, are one call. 0: they are two."`
}

// EffectUndo is the tool that undoes a call of another one.
type EffectUndo struct {
	Tool string            `yaml:"tool" doc:"Name of the tool that undoes a call; without one nothing does."`
	Args map[string]string `yaml:"args" doc:"Its arguments, by name: args.name or result.name, from the arguments or the structured result of the call that is undone; further names lead into objects, as in result.order.id."`
}

// Approvals is who hears of calls that wait for a person.
type Approvals struct {
	Webhook Webhook `yaml:"webhook" doc:"Another system that hears of them and may decide."`
}

// Webhook is another system.
type Webhook struct {
	URL     string        `yaml:"url" doc:"Its address; without one none hears of anything."`
	Secret  secret.String `yaml:"secret" doc:"What both sides sign with (HMAC-SHA256), at least 32 bytes."`
	Timeout time.Duration `yaml:"timeout" default:"5s" doc:"Longest wait for its answer."`
	Private []string      `yaml:"private_ranges" doc:"Private address ranges in which it may be, besides this machine."`
}

// Tasks is how calls go on after their caller was answered.
type Tasks struct {
	Tools        []TaskTool    `yaml:"tools" doc:"Which tools may be tasks; the first that fits counts, others are as they say themselves."`
	Workers      int           `yaml:"workers" default:"16" doc:"Most tasks that run at once on this node."`
	MaxQueued    int           `yaml:"max_queued" default:"10000" doc:"Most tasks that wait for a worker, on all nodes; further ones are refused for a while."`
	MaxPerCaller int           `yaml:"max_per_caller" default:"1000" doc:"Most tasks of one caller that have not ended."`
	TTL          time.Duration `yaml:"ttl" default:"24h" doc:"How long a task and its result are kept, from its making on, if its caller does not say; at least 1m."`
	MaxTTL       time.Duration `yaml:"max_ttl" default:"168h" doc:"Longest time that a caller may ask for."`
	Timeout      time.Duration `yaml:"timeout" default:"1h" doc:"Longest run of a task."`
	Poll         time.Duration `yaml:"poll" default:"1s" doc:"How often callers are told to ask."`
}

// TaskTool says whether calls of a tool may go on as tasks.
type TaskTool struct {
	Tool    string `yaml:"tool" required:"true" doc:"Name of the tool; * stands for any text but /."`
	Support string `yaml:"support" enum:"forbidden,optional,required" default:"optional" doc:"optional: for callers that can take a handle in place of the result. required: for them alone."`
}

// Artifacts is where large results are kept, and for how long.
type Artifacts struct {
	Dir      string          `yaml:"dir" doc:"Folder, from the folder of the configuration on. Without it and s3 they are kept in memory."`
	S3       S3              `yaml:"s3" doc:"Bucket instead, which nodes may share; all need the same state.key_file."`
	KeepFor  time.Duration   `yaml:"keep_for" default:"1h" doc:"How long they are kept."`
	MaxBytes Size            `yaml:"max_bytes" default:"256MiB" doc:"Most bytes of all together. When it is full, the oldest of the tenant with the most go first."`
	MaxCount int             `yaml:"max_count" default:"10000" doc:"How many there may be."`
	LinksFor time.Duration   `yaml:"links_for" doc:"How long an address works with which people can download a result, such as 10m; whoever has the address can. 0: none are made."`
	Classes  []ArtifactClass `yaml:"classes" doc:"Results of some tools; the first that fits counts."`
}

// ArtifactClass is results of some tools.
type ArtifactClass struct {
	Tools    []string      `yaml:"tools" required:"true" doc:"Names of the tools; * stands for any text."`
	KeepFor  time.Duration `yaml:"keep_for" doc:"How long they are kept; default: artifacts.keep_for. A shorter time holds for those that are there too."`
	MaxBytes Size          `yaml:"max_bytes" doc:"Most bytes that one tenant may have of them; the oldest go first. 0: as all together."`
}

// S3 is a bucket.
type S3 struct {
	Endpoint     string        `yaml:"endpoint" doc:"Address of the server, such as https://s3.eu-central-1.amazonaws.com."`
	Bucket       string        `yaml:"bucket" doc:"Name of the bucket; it has to be there."`
	Prefix       string        `yaml:"prefix" default:"newel/" doc:"What the names of objects begin with. Nothing else may be there."`
	Region       string        `yaml:"region" default:"us-east-1" doc:"Region of the bucket."`
	Style        string        `yaml:"style" enum:"path,host" default:"path" doc:"Where the name of the bucket stands in addresses."`
	AccessKey    secret.String `yaml:"access_key" doc:"Name of the credentials."`
	SecretKey    secret.String `yaml:"secret_key" doc:"Their secret."`
	SessionToken secret.String `yaml:"session_token" doc:"Token of credentials that end."`
	Encryption   string        `yaml:"encryption" enum:"none,s3,kms" default:"none" doc:"Encryption that is asked for: s3 with keys of the server, kms with the key kms_key; none: as the bucket says."`
	KMSKey       string        `yaml:"kms_key" doc:"Name of the key, for kms."`
	CA           string        `yaml:"ca" doc:"File of the authorities that are trusted for the endpoint, in PEM form; default: the system's."`
	Timeout      time.Duration `yaml:"timeout" default:"10s" doc:"Longest wait for a request; a second more for each MiB."`
	Private      []string      `yaml:"private_ranges" doc:"Private address ranges in which the server may be, such as 10.0.0.0/8."`
}

// Backend is one backend; its settings depend on its type.
type Backend struct {
	Type     string         `yaml:"type" required:"true" doc:"Kind of backend."`
	Name     string         `yaml:"name" required:"true" doc:"Name of the backend, unique in the file."`
	Settings any            `yaml:"-"` // value of the module's Config type
	Module   *module.Module `yaml:"-"`

	path string // of its node, for positions
}

// Size is a number of bytes, written as 4MiB, 64KiB or a plain number.
type Size int

// A Problem is one thing wrong with a configuration.
type Problem struct {
	File       string `json:"file"`
	Line       int    `json:"line"`
	Column     int    `json:"column"`
	Path       string `json:"path,omitzero"` // of the setting, such as backends[0].tools[2].sql
	Message    string `json:"message"`
	Suggestion string `json:"suggestion,omitzero"`
	Source     string `json:"source,omitzero"` // the line itself
}

// String is one line: file:line:column: message; suggestion.
func (p Problem) String() string {
	s := fmt.Sprintf("%s:%d:%d: %s", p.File, p.Line, p.Column, p.Message)
	if p.Suggestion != "" {
		s += "; " + p.Suggestion
	}
	return s
}

// Problems is an error that lists problems.
type Problems []Problem

// Error lists one problem a line.
func (ps Problems) Error() string {
	lines := make([]string, len(ps))
	for i, p := range ps {
		lines[i] = p.String()
	}
	return strings.Join(lines, "\n")
}

// A File is a loaded configuration and where its settings stand.
type File struct {
	Config    Config
	Dir       string // folder of the file
	Digest    string // SHA-256 of the file, in hexadecimal
	name      string
	positions map[string]position
}

type position struct{ line, column int }

// Position returns where a setting stands, as file:line:column; a setting that is not there has
// the place of the nearest one above it.
func (f *File) Position(path string) string {
	for ; path != ""; path = parent(path) {
		if p, ok := f.positions[path]; ok {
			return fmt.Sprintf("%s:%d:%d", f.name, p.line, p.column)
		}
	}
	return f.name
}

// Problem returns what is wrong with a setting, for what only shows when settings are put to use.
func (f *File) Problem(path, message string) Problem {
	p := Problem{File: f.name, Path: path, Message: message}
	for ; path != ""; path = parent(path) {
		if at, ok := f.positions[path]; ok {
			p.Line, p.Column = at.line, at.column
			break
		}
	}
	return p
}

// parent is the setting above another, or "".
func parent(path string) string { return path[:max(strings.LastIndexAny(path, ".["), 0)] }

// BackendPosition returns where a setting of a backend stands.
func (f *File) BackendPosition(b *Backend, path string) string {
	if path == "" {
		return f.Position(b.path)
	}
	return f.Position(b.path + "." + path)
}

// Lookup returns the value of a secret reference: kind is "env" or "file".
type Lookup func(kind, name string) (string, error)

// Secrets looks references up in the environment and in files; paths start at dir.
func Secrets(getenv func(string) (string, bool), dir string) Lookup {
	return func(kind, name string) (string, error) {
		if kind == "env" {
			v, ok := getenv(name)
			if !ok || v == "" {
				return "", fmt.Errorf("the environment variable %s is not set", name)
			}
			return v, nil
		}
		if !filepath.IsAbs(name) {
			name = filepath.Join(dir, name)
		}
		b, err := os.ReadFile(name)
		if err != nil {
			return "", fmt.Errorf("the file of a secret cannot be read: %w", err)
		}
		v := strings.TrimRight(string(b), "\r\n")
		if v == "" {
			return "", fmt.Errorf("the file %s of a secret is empty", name)
		}
		return v, nil
	}
}

// Load checks a configuration. name is its path as problems show it; secrets looks references up,
// nil leaves them unresolved (config check on another machine). The error is of type [Problems].
func Load(name string, src []byte, modules []module.Module, secrets Lookup) (*File, error) {
	f := &File{Dir: filepath.Dir(name), Digest: fmt.Sprintf("%x", sha256.Sum256(src)), name: name, positions: map[string]position{}}
	d := &decoder{file: f, lines: strings.Split(string(src), "\n"), secrets: secrets}
	if len(src) > MaxBytes {
		d.problem(position{1, 1}, "", fmt.Sprintf("the file has %d bytes, over the limit of %d", len(src), MaxBytes), "")
		return nil, d.problems
	}
	if !utf8.Valid(src) {
		d.problem(position{1, 1}, "", "the file is not UTF-8", "save it as UTF-8")
		return nil, d.problems
	}
	root := d.parse(src)
	if root == nil {
		return nil, d.problems
	}
	d.mapping(root, reflect.ValueOf(&f.Config).Elem(), "", func(key string) bool { return key == serversKey })
	d.backends(root, modules)
	d.servers(root, modules)
	d.broker(root)
	d.resilience(root)
	d.effects(root)
	if len(f.Config.Backends) == 0 && len(d.problems) == 0 {
		d.problem(where(root), "backends", "nothing is served: both backends and mcpServers are missing or empty", "newel init writes a file to start from")
	}
	if len(d.problems) > 0 {
		slices.SortStableFunc(d.problems, func(a, b Problem) int { return cmp.Or(cmp.Compare(a.Line, b.Line), cmp.Compare(a.Column, b.Column)) })
		return nil, d.problems
	}
	return f, nil
}

// parse returns the mapping at the top of a file.
func (d *decoder) parse(src []byte) ast.Node {
	file, err := parser.ParseBytes(src, 0)
	if err != nil {
		line, column, text := syntax(err)
		d.problem(position{line, column}, "", "not valid YAML: "+text, "")
		return nil
	}
	if len(file.Docs) != 1 || file.Docs[0].Body == nil {
		if len(file.Docs) > 1 {
			d.problem(position{1, 1}, "", "the file holds more than one document", "remove the lines with ---")
		} else {
			d.problem(position{1, 1}, "", "the file is empty", "newel init writes one to start from")
		}
		return nil
	}
	return file.Docs[0].Body
}

// backends decodes the settings of each backend into the type of its module.
func (d *decoder) backends(root ast.Node, modules []module.Module) {
	list := child(root, "backends")
	seq, ok := list.(*ast.SequenceNode)
	if !ok {
		return // missing or of the wrong type: already a problem
	}
	seen := map[string]bool{}
	for i := range d.file.Config.Backends {
		b := &d.file.Config.Backends[i]
		b.path = fmt.Sprintf("backends[%d]", i)
		node := seq.Values[i]
		if b.Name != "" && seen[b.Name] {
			d.problem(where(child(node, "name")), b.path+".name", fmt.Sprintf("two backends are named %q", b.Name), "")
		}
		seen[b.Name] = true
		if b.Type == "" {
			continue
		}
		at := slices.IndexFunc(modules, func(m module.Module) bool { return m.Name == b.Type })
		if at < 0 {
			names := make([]string, len(modules))
			for i, m := range modules {
				names[i] = m.Name
			}
			d.problem(where(child(node, "type")), b.path+".type", fmt.Sprintf("there is no kind of backend %q", b.Type), suggest(b.Type, names))
			continue
		}
		b.Module = &modules[at]
		v := reflect.New(b.Module.Config).Elem()
		d.mapping(node, v, b.path, func(key string) bool { return key == "type" || key == "name" })
		b.Settings = v.Interface()
	}
}

// serversKey is where MCP servers stand in the form that clients use: each entry is a backend of
// type mcp.
const (
	serversKey    = "mcpServers"
	serversModule = "mcp"
)

// servers decodes mcpServers.
func (d *decoder) servers(root ast.Node, modules []module.Module) {
	node := child(root, serversKey)
	if node == nil {
		return
	}
	ms, ok := members(node)
	at := slices.IndexFunc(modules, func(m module.Module) bool { return m.Name == serversModule })
	switch {
	case !ok:
		d.problem(where(node), serversKey, fmt.Sprintf("must be a mapping (name: server), not %s", kindOf(node)), "")
		return
	case at < 0:
		d.problem(where(node), serversKey, "this program cannot serve MCP servers", "")
		return
	}
	for _, m := range ms {
		b := Backend{Type: serversModule, Name: keyOf(m), Module: &modules[at], path: join(serversKey, keyOf(m))}
		d.file.positions[b.path] = where(m.Value)
		if slices.ContainsFunc(d.file.Config.Backends, func(other Backend) bool { return other.Name == b.Name }) {
			d.problem(where(m.Key), b.path, fmt.Sprintf("two backends are named %q", b.Name), "")
		}
		v := reflect.New(b.Module.Config).Elem()
		d.mapping(m.Value, v, b.path, func(key string) bool { return key == transportAlias })
		d.transport(m.Value, v, b.path)
		b.Settings = v.Interface()
		d.file.Config.Backends = append(d.file.Config.Backends, b)
	}
}

// transportAlias is what clients call the transport of a server.
const transportAlias = "type"

func (d *decoder) transport(n ast.Node, settings reflect.Value, path string) {
	said := child(n, transportAlias)
	at := slices.IndexFunc(fieldsOf(settings.Type()), func(f field) bool { return f.key == "transport" })
	if said == nil || at < 0 {
		return
	}
	if child(n, "transport") != nil {
		d.problem(where(said), join(path, transportAlias), "type and transport are the same setting", "leave one out")
		return
	}
	f := fieldsOf(settings.Type())[at]
	d.value(said, settings.Field(f.index), join(path, transportAlias), f)
}
