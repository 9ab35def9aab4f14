package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"slices"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/assembly"
	"newel.dev/newel/internal/config"
	"newel.dev/newel/internal/guard/authenticate"
	"newel.dev/newel/internal/guard/effect"
	"newel.dev/newel/internal/module"
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

// opened is a house and what has to be closed after it.
type opened struct {
	*assembly.House
	closers []io.Closer
	stop    func(context.Context) error // flushes telemetry
}

// close closes backends, then flushes telemetry: what they still say is not lost.
func (o *opened) close(ctx context.Context) error {
	var errs []error
	for _, c := range o.closers {
		errs = append(errs, c.Close())
	}
	return errors.Join(append(errs, o.stop(context.WithoutCancel(ctx)))...)
}

// open opens everything a configuration names.
func (e *environment) open(ctx context.Context, f *config.File, listen net.Addr) (_ *opened, err error) {
	c := &f.Config
	base := publicURL(c, listen)
	who, access, err := identities(f, base)
	if err != nil {
		return nil, exit(exitFailed, err)
	}
	rules, shadow, err := policies(ctx, f)
	if err != nil {
		return nil, exit(exitFailed, err)
	}
	t, err := startTelemetry(ctx, c, e.err)
	if err != nil {
		return nil, exit(exitFailed, err)
	}
	o := &opened{stop: t.stop}
	defer func() {
		if err != nil {
			err = errors.Join(err, o.close(ctx))
		}
	}()
	var shown assembly.Certificates
	if listen != nil { // over stdio nobody sees them
		if shown, err = certificates(f, t.logger); err != nil {
			return nil, exit(exitFailed, err)
		}
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
		b := &c.Backends[i]
		if _, err := e.giveAccess(f, b); err != nil {
			problems = append(problems, err)
			continue
		}
		backend, err := b.Module.Open(ctx, b.Name, b.Settings, module.Env{
			Dir: f.Dir, Logger: t.logger, Progress: bar.report,
			Position: func(path string) string { return f.BackendPosition(b, path) },
		})
		if err != nil {
			problems = append(problems, err)
			continue
		}
		if closer, ok := backend.(io.Closer); ok {
			o.closers = append(o.closers, closer)
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
				return nil, exit(exitFailed, fmt.Errorf("%s: there is no backend %q", f.Position(fmt.Sprintf("servers[%d].backends[%d]", i, j)), name))
			}
		}
		servers = append(servers, assembly.Server{
			Path: v.Path, Host: v.Host, Tenant: v.Tenant, Name: v.Name, Title: v.Title, Instructions: v.Instructions, Backends: v.Backends,
			Tools: v.Tools, Resources: v.Resources, Prompts: v.Prompts, Search: v.ToolSearch,
		})
	}
	st, err := openState(ctx, f, listen == nil)
	if err != nil {
		return nil, exit(exitFailed, err)
	}
	o.closers = append(o.closers, st)
	var store effect.Store
	var sealing []byte // of what travels through clients; random if nothing outlives the process anyway
	if st.store != nil {
		if sealing, err = st.key.Derive("newel requestState"); err != nil {
			return nil, exit(exitFailed, err)
		}
		st.store.failed = func(err error) {
			t.logger.LogAttrs(ctx, slog.LevelError, "the head of the audit log could not be published", slog.String("error", err.Error()))
		}
		store = st.store
	}
	counted, err := limiter(f, o, t.logger)
	if err != nil {
		return nil, exit(exitFailed, err)
	}
	l := &c.Limits
	var identity authenticate.Verifier
	if who != nil {
		identity = who
	}
	scopes, err := scopesOf(ctx, c, backends)
	if err != nil {
		return nil, exit(exitFailed, err)
	}
	authorization, err := loginServer(c, base, scopes)
	if err != nil {
		return nil, exit(exitFailed, err)
	}
	o.House, err = assembly.Build(ctx, &assembly.Options{
		Name: c.Server.Name, Title: c.Server.Title, Version: c.Server.Version, Instructions: c.Server.Instructions,
		Backends: backends, Servers: servers, Search: c.ToolSearch,
		Limits: assembly.Limits{
			MessageBytes: int(l.MaxMessageBytes), Depth: l.MaxDepth, Elements: l.MaxElements,
			ConcurrentCalls: l.MaxConcurrentCalls, QueuedCalls: l.MaxQueuedCalls, QueueTimeout: l.QueueTimeout, CallTimeout: l.CallTimeout,
			Streams: l.MaxStreams, StreamsPerPeer: l.MaxStreamsPerPeer, Sessions: l.MaxSessions, SessionStreams: l.MaxSessionStreams, SessionIdle: l.SessionIdleTimeout,
			ResultBytes: int(l.MaxResultBytes), ResultTokens: l.MaxResultTokens,
		},
		State: store, Key: st.key, StateKey: sealing, Effects: effects(&c.Effects),
		Identity: identity, Access: access, Login: authorization, Quota: counted, Policy: rules, Shadow: shadow, Explicit: c.Policy.Explicit,
		Logger: t.logger, Tracer: t.tracer, Meter: t.meter, Metrics: t.metrics,
		TLS: shown, Proxies: proxies,
		AllowedHosts: c.AllowedHosts, Compatibility: c.Compatibility, AllowedOrigins: c.AllowedOrigins, ArtifactDir: c.Artifacts.Dir,
	})
	if err != nil {
		return nil, exit(exitFailed, err)
	}
	return o, nil
}

// levels are the names of log levels in the configuration.
var levels = map[string]slog.Level{"debug": slog.LevelDebug, "info": slog.LevelInfo, "warn": slog.LevelWarn, "error": slog.LevelError}
