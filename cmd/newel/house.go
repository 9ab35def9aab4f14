package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"

	"github.com/modelcontextprotocol/go-sdk/mcp"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/assembly"
	"newel.dev/newel/internal/audit"
	"newel.dev/newel/internal/backend/artifact"
	"newel.dev/newel/internal/cluster"
	"newel.dev/newel/internal/config"
	"newel.dev/newel/internal/guard/authenticate"
	"newel.dev/newel/internal/module"
	"newel.dev/newel/internal/nearest"
	"newel.dev/newel/internal/policy"
	"newel.dev/newel/internal/redact"
	"newel.dev/newel/internal/store/redis"
)

// load reads and checks a configuration file.
func (e *environment) load(path string, secrets config.Lookup) (*config.File, error) {
	src, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, exit(exitFailed, fmt.Errorf("there is no configuration at %s; newel init writes one, or name another with --config", path))
	}
	if err != nil {
		return nil, exit(exitFailed, fmt.Errorf("the configuration cannot be read: %w", err))
	}
	f, err := config.Load(path, src, e.modules, secrets)
	if err != nil {
		return nil, exit(exitFailed, err)
	}
	return f, nil
}

// open opens everything a configuration names, and builds the first house of it.
func (e *environment) open(ctx context.Context, f *config.File, listen net.Addr) (*opened, error) {
	o, err := e.openParts(ctx, f, listen, nil)
	if err != nil {
		return nil, err
	}
	if o.House, err = assembly.Build(ctx, &o.options); err != nil {
		return nil, errors.Join(exit(exitFailed, err), o.close(ctx))
	}
	return o, nil
}

// openParts opens what a configuration names; what the one before it named in the same words stays
// as it is. before is nil for the first.
func (e *environment) openParts(ctx context.Context, f *config.File, listen net.Addr, before *opened) (_ *opened, err error) {
	c := &f.Config
	base := publicURL(c, listen)
	o := &opened{file: f, things: map[string]*thing{}}
	defer func() {
		if err != nil {
			err = errors.Join(err, o.close(ctx))
		}
	}()
	t, err := reuse(o, before, "telemetry", nil, func() (*telemetry, func(context.Context) error, error) {
		t, err := startTelemetry(ctx, c, e.err)
		if err != nil {
			return nil, nil, err
		}
		return t, t.stop, nil
	})
	if err != nil {
		return nil, exit(exitFailed, err)
	}
	o.telemetry = t
	shown, err := reuse(o, before, "certificates", nil, func() (assembly.Certificates, func(context.Context) error, error) {
		if listen == nil { // over stdio nobody sees them
			return nil, nil, nil
		}
		shown, err := certificates(f, t.logger)
		return shown, nil, err
	})
	if err != nil {
		return nil, exit(exitFailed, err)
	}
	shared, err := reuse(o, before, "redis", nil, func() (*redis.DB, func(context.Context) error, error) { return sharedStore(f) })
	if err != nil {
		return nil, exit(exitFailed, err)
	}
	known, err := reuse(o, before, "common", []any{c.Auth.Mode, grants(c, base)}, func() (*together, func(context.Context) error, error) {
		known, err := common(f, base, shared)
		return known, nil, err
	})
	if err != nil {
		return nil, exit(exitFailed, err)
	}
	// Who logged in stays so, and keys of issuers that cannot be asked now are still known.
	authSettings := []any{c.Auth, base, resourcesOf(c, base), tenantsOf(c, base+"/mcp"), digest(signingKeys(f)...)}
	door, err := reuse(o, before, "auth", authSettings, func() (*doorkeeper, func(context.Context) error, error) {
		fed, err := federated(f)
		if err != nil {
			return nil, nil, err
		}
		who, access, err := identities(f, base, fed, known.proofs)
		return &doorkeeper{who, access, fed}, nil, err
	})
	if err != nil {
		return nil, exit(exitFailed, err)
	}
	who, access := door.who, door.access
	ruled, err := reuse(o, before, "policy", []any{c.Policy, digest(cedarFiles(f)...)}, func() (*ruling, func(context.Context) error, error) {
		rules, shadow, err := policies(ctx, f)
		return &ruling{rules, shadow}, nil, err
	})
	if err != nil {
		return nil, exit(exitFailed, err)
	}
	proxies, err := ranges(f, c.TLS.Proxies, "tls.trusted_proxies")
	if err != nil {
		return nil, exit(exitFailed, err)
	}
	bar := newBar(e.err)
	defer bar.done()
	var backends []call.Backend
	var problems []error
	for i := range c.Backends {
		b := c.Backends[i] // a copy: what the configuration says is compared later
		backend, err := reuse(o, before, "backend "+b.Name, []any{b.Type, b.Settings, digest(keyFile(f, &b))}, func() (call.Backend, func(context.Context) error, error) {
			if _, err := e.giveAccess(f, &b); err != nil {
				return nil, nil, err
			}
			backend, err := b.Module.Open(ctx, b.Name, b.Settings, module.Env{
				Dir: f.Dir, Logger: t.logger, Progress: bar.report,
				Position: func(path string) string { return f.BackendPosition(&b, path) },
			})
			if closer, ok := backend.(io.Closer); ok && err == nil {
				return backend, func(context.Context) error { return closer.Close() }, nil
			}
			return backend, nil, err
		})
		if err != nil {
			problems = append(problems, err)
			continue
		}
		backends = append(backends, backend)
	}
	if err := errors.Join(problems...); err != nil {
		return nil, exit(exitFailed, err)
	}
	var servers []assembly.Server
	for i, v := range c.Servers {
		if v.Tenant != "" && who == nil {
			return nil, exit(exitFailed, fmt.Errorf("%s: callers have tenants only if they say who they are; write auth.mode", f.Position(fmt.Sprintf("servers[%d].tenant", i))))
		}
		for j, name := range v.Backends {
			if !slices.ContainsFunc(c.Backends, func(b config.Backend) bool { return b.Name == name }) {
				return nil, exit(exitFailed, fmt.Errorf("%s: there is no backend %q%s", f.Position(fmt.Sprintf("servers[%d].backends[%d]", i, j)), name, instead(c, name)))
			}
		}
		servers = append(servers, assembly.Server{
			Path: v.Path, Host: v.Host, Tenant: v.Tenant, Name: v.Name, Title: v.Title, Instructions: v.Instructions, Backends: v.Backends,
			Tools: v.Tools, Resources: v.Resources, Prompts: v.Prompts, Search: v.ToolSearch,
		})
	}
	hook, err := webhook(f)
	if err != nil {
		return nil, exit(exitFailed, err)
	}
	if hook != nil && listen != nil {
		hook.Callback = base
	}
	st, err := reuse(o, before, "state", nil, func() (*state, func(context.Context) error, error) {
		if c.State.Engine == "sqlite" && e.turn != nil {
			if err := e.turn(ctx); err != nil {
				return nil, nil, err
			}
		}
		st, err := openState(ctx, f, listen == nil)
		if err != nil {
			return nil, nil, err
		}
		return st, func(context.Context) error { return st.Close() }, nil
	})
	if err != nil {
		return nil, exit(exitFailed, err)
	}
	var store assembly.Store
	if st.store != nil {
		if before == nil {
			st.store.Failed = func(err error) {
				t.logger.LogAttrs(ctx, slog.LevelError, "the head of the audit log could not be published", slog.String("error", err.Error()))
			}
		}
		store = st.store
	}
	stored, err := reuse(o, before, "artifacts", nil, func() (artifact.Options, func(context.Context) error, error) {
		stored, err := artifacts(f, st.key, base, listen != nil)
		return stored, nil, err
	})
	if err != nil {
		return nil, exit(exitFailed, err)
	}
	counted, err := limiter(f, o, before, shared, t)
	if err != nil {
		return nil, exit(exitFailed, err)
	}
	others, err := reuse(o, before, "nodes", nil, func() (*cluster.Cluster, func(context.Context) error, error) {
		others, err := nodes(f, shared, st.key, t.logger)
		return others, nil, err
	})
	if err != nil {
		return nil, exit(exitFailed, err)
	}
	var events mcp.EventStore
	if others != nil {
		events = shared.Events(c.Limits.SessionIdleTimeout, t.logger)
	}
	if _, err := objectives(f); err != nil { // of no use here, but one that is wrong measures nothing
		return nil, exit(exitFailed, err)
	}
	results, err := resultCache(f, o, before, shared, st.key, t.logger)
	if err != nil {
		return nil, exit(exitFailed, err)
	}
	hide, err := reuse(o, before, "redact", []any{c.Audit.Redact}, func() (*redact.Redactor, func(context.Context) error, error) {
		hide, err := redactor(f)
		return hide, nil, err
	})
	if err != nil {
		return nil, exit(exitFailed, err)
	}
	effects := effects(&c.Effects)
	effects.Redact, effects.Keep = hide, audit.Retention(c.Audit.Retention)
	l := &c.Limits
	var identity authenticate.Verifier
	if who != nil {
		identity = who
	}
	scopes, err := scopesOf(ctx, c, backends)
	if err != nil {
		return nil, exit(exitFailed, err)
	}
	authorization, err := reuse(o, before, "login", []any{authSettings, scopes}, func() (http.Handler, func(context.Context) error, error) {
		h, err := loginServer(f, base, scopes, door.fed, known, t.logger)
		return h, nil, err
	})
	if err != nil {
		return nil, exit(exitFailed, err)
	}
	o.options = assembly.Options{
		Name: c.Server.Name, Title: c.Server.Title, Version: c.Server.Version, Instructions: c.Server.Instructions,
		Backends: backends, Servers: servers, Search: c.ToolSearch,
		Limits: assembly.Limits{
			MessageBytes: int(l.MaxMessageBytes), Depth: l.MaxDepth, Elements: l.MaxElements,
			ConcurrentCalls: l.MaxConcurrentCalls, QueuedCalls: l.MaxQueuedCalls, QueueTimeout: l.QueueTimeout, CallTimeout: l.CallTimeout,
			Memory: int64(l.MaxMemory), NotCritical: c.Quotas.NotCritical, Streams: l.MaxStreams, StreamsPerPeer: l.MaxStreamsPerPeer, Sessions: l.MaxSessions, SessionStreams: l.MaxSessionStreams, SessionIdle: l.SessionIdleTimeout,
			SessionsPerPeer: l.MaxSessionsPerPeer, Connections: connections(l),
			ResultBytes: int(l.MaxResultBytes), ResultTokens: l.MaxResultTokens,
		},
		Resilience: resilience(&c.Resilience), Cache: results, Cluster: others, Events: events, State: store, Key: st.key, Effects: effects, Tasks: tasks(&c.Tasks), Webhook: hook,
		Configuration: f.Digest, By: operatorName(),
		Identity: identity, Access: access, Login: authorization, Quota: counted, Policy: ruled.rules, Shadow: ruled.shadow, Explicit: c.Policy.Explicit,
		Logger: t.logger, Tracer: t.tracer, Meter: t.meter, Metrics: t.metrics,
		TLS: shown, Proxies: proxies,
		AllowedHosts: c.AllowedHosts, Compatibility: c.Compatibility, AllowedOrigins: c.AllowedOrigins, Artifacts: stored,
	}
	return o, nil
}

// instead says which backend was probably meant, or which there are.
func instead(c *config.Config, name string) string {
	var names []string
	for _, b := range c.Backends {
		names = append(names, b.Name)
	}
	if best := nearest.Name(name, names); best != "" {
		return fmt.Sprintf("; did you mean %q?", best)
	}
	return "; there are: " + strings.Join(names, ", ")
}

func connections(l *config.Limits) assembly.Connections {
	return assembly.Connections{Max: l.MaxConnections, PerPeer: l.MaxConnsPerPeer, Header: l.HeaderTimeout, Body: l.BodyTimeout, Idle: l.IdleTimeout, Write: l.WriteTimeout}
}

// doorkeeper is who tells callers apart.
type doorkeeper struct {
	who    *assembly.Identities
	access *assembly.Access
	fed    *federation // nil: people log in elsewhere
}

// ruling is the policy and the one that is tried beside it.
type ruling struct{ rules, shadow *policy.Policy }

// levels are the names of log levels in the configuration.
var levels = map[string]slog.Level{"debug": slog.LevelDebug, "info": slog.LevelInfo, "warn": slog.LevelWarn, "error": slog.LevelError}
