package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel/metric"

	"newel.dev/newel/internal/assembly"
	"newel.dev/newel/internal/config"
)

// watchEvery is how often files are looked at.
const watchEvery = time.Second

// source is where the configuration of a server comes from.
type source struct {
	*environment
	path   string
	client bool // it is a client's file

	files []string // that were read, or would have been, the last time

	reloads, restarts chan os.Signal // ask for another configuration, and for another process
}

// load reads and checks the configuration.
func (s *source) load() (*config.File, error) {
	s.files = []string{s.path}
	known := s.secrets(s.path)
	lookup := func(kind, name string) (string, error) {
		if kind == "file" {
			s.files = append(s.files, from(filepath.Dir(s.path), name))
		}
		return known(kind, name)
	}
	var f *config.File
	var err error
	if s.client {
		f, err = s.loadClient(s.path, lookup)
	} else {
		f, err = s.environment.load(s.path, lookup)
	}
	if err == nil {
		s.files = append(s.files, named(f)...)
	}
	return f, err
}

// serving is a server that runs.
type serving struct {
	*source
	listener net.Listener
	live     *assembly.Live
	log      *slog.Logger
	admin    *admin // nil: newel reload does not reach it
	started  time.Time
	alive    *os.File // held while this process is there, for the one that it handed over to

	// What one goroutine has, that of keep.
	now  *opened
	seen [sha256.Size]byte // digest of the files of the last attempt

	asked chan struct{}
	mu    sync.Mutex // guards next
	next  *attempt   // that has not begun; who asks meanwhile shares it

	good atomic.Int64 // whether the last attempt succeeded: 1 or 0
	last atomic.Int64 // when one succeeded last, in seconds since 1970
}

// An attempt is one reload.
type attempt struct {
	done chan struct{}
	*outcome
}

// outcome is what became of a reload.
type outcome struct {
	Outcome  string           `json:"outcome"`            // applied, unchanged or refused
	Changed  []string         `json:"changed"`            // what is different now
	Restart  []string         `json:"restart,omitempty"`  // what is different in the file, and counts after a restart
	Error    string           `json:"error,omitempty"`    // why nothing changed
	Problems []config.Problem `json:"problems,omitempty"` // the same, where each has a place in the file
	Millis   int64            `json:"milliseconds"`
}

// newServing makes a server of what was opened. successor says that another process hands over to
// this one.
func (e *environment) newServing(from *source, l net.Listener, first *opened, successor bool) (*serving, error) {
	s := &serving{
		source: from, listener: l, live: assembly.NewLive(first.House), log: first.telemetry.logger, now: first,
		started: time.Now().UTC(), seen: digest(from.files...), asked: make(chan struct{}, 1),
	}
	var err error
	if s.admin, err = newAdmin(socketOf(s.path), s, successor); err != nil { // before anybody is told that the server is there
		s.log.LogAttrs(context.Background(), slog.LevelWarn, "newel reload does not reach this server", slog.String("error", err.Error()))
	}
	s.good.Store(1)
	s.last.Store(time.Now().Unix())
	meter := first.telemetry.meter.Meter("newel.dev/newel")
	gauge := func(name, unit, description string, n *atomic.Int64) error {
		_, err := meter.Int64ObservableGauge(name, metric.WithUnit(unit), metric.WithDescription(description),
			metric.WithInt64Callback(func(_ context.Context, out metric.Int64Observer) error {
				out.Observe(n.Load())
				return nil
			}))
		return err
	}
	return s, errors.Join(
		gauge("newel.config.last_reload.successful", "", "Whether the last attempt to load the configuration succeeded.", &s.good),
		gauge("newel.config.last_reload.success.timestamp", "s", "When the configuration was loaded last, in seconds since 1970.", &s.last))
}

// run serves until ctx ends, or until another process serves on.
func (s *serving) run(ctx context.Context, relay *relay) error {
	ctx, leave := context.WithCancelCause(ctx)
	defer leave(nil)
	background, stop := context.WithCancel(ctx)
	var all sync.WaitGroup
	if s.admin != nil {
		all.Go(func() { s.admin.run(background) })
	}
	all.Go(func() { s.keep(background) })
	all.Go(func() { s.signals(background, leave) })
	relay.ready()
	err := s.live.Serve(ctx, s.listener)
	stop()
	all.Wait()
	return errors.Join(err, s.now.close(ctx))
}

// signals waits for those that ask for another configuration, or another process.
func (s *serving) signals(ctx context.Context, leave context.CancelCauseFunc) {
	defer signal.Stop(s.reloads)
	defer signal.Stop(s.restarts)
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.reloads:
			s.ask()
		case <-s.restarts:
			s.log.LogAttrs(ctx, slog.LevelInfo, "another process is started to serve on")
			if err := s.handOver(ctx); err != nil {
				s.log.LogAttrs(ctx, slog.LevelError, "no other process took over; this one serves on", slog.String("error", err.Error()))
				continue
			}
			leave(assembly.ErrHandedOver)
			return
		}
	}
}

// ask asks for a reload. If one runs, another will follow it: what it has read may be old.
func (s *serving) ask() *attempt {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.next == nil {
		s.next = &attempt{done: make(chan struct{})}
		s.asked <- struct{}{} // there is room: the one before was taken out of next after this
	}
	return s.next
}

// keep reloads when somebody asks or a file changes, one at a time.
func (s *serving) keep(ctx context.Context) {
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	changing := s.seen
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.asked:
			s.mu.Lock()
			a := s.next
			s.next = nil
			s.mu.Unlock()
			a.outcome = s.reload(ctx)
			close(a.done)
		case <-tick.C:
			// A file that is being written is left alone until it stays as it is.
			d := digest(s.files...)
			if d != s.seen && d == changing {
				s.reload(ctx)
			}
			changing = d
		}
	}
}

// reload reads the configuration and goes over to it. Whatever is wrong with it, what is served
// stays.
func (s *serving) reload(ctx context.Context) *outcome {
	start := time.Now()
	files := s.files
	s.seen = digest(files...) // what changes from now on is seen
	out, err := s.attempt(ctx)
	if !slices.Equal(files, s.files) {
		s.seen = digest(s.files...)
	}
	if err != nil {
		out = &outcome{Outcome: "refused", Error: err.Error()}
		var problems config.Problems
		if errors.As(err, &problems) {
			out.Problems = problems
		}
		s.good.Store(0)
		s.log.LogAttrs(ctx, slog.LevelError, "the configuration was not loaded; what was served stays", slog.String("error", out.Error))
	} else {
		s.good.Store(1)
		s.last.Store(time.Now().Unix())
	}
	if out.Changed == nil {
		out.Changed = []string{}
	}
	out.Millis = time.Since(start).Milliseconds()
	if err == nil && (out.Outcome == "applied" || len(out.Restart) > 0) {
		s.log.LogAttrs(ctx, slog.LevelInfo, "the configuration was loaded", slog.String("outcome", out.Outcome),
			slog.Any("changed", out.Changed), slog.Any("after_a_restart", out.Restart), slog.Int64("milliseconds", out.Millis))
	}
	return out
}

func (s *serving) attempt(ctx context.Context) (*outcome, error) {
	f, err := s.source.load()
	if err != nil {
		return nil, err
	}
	out := &outcome{Outcome: "applied", Restart: restart(&s.now.file.Config, &f.Config)}
	if err := errors.Join(production(f), checkTLS(f), exposure(&f.Config).Check(s.listener.Addr().String())); err != nil {
		return nil, err
	}
	next, err := s.openParts(ctx, f, s.listener.Addr(), s.now)
	if err != nil {
		return nil, err
	}
	if out.Changed = changes(s.now, next); len(out.Changed) == 0 {
		out.Outcome = "unchanged"
		return out, next.close(ctx)
	}
	old := s.now
	err = s.live.Replace(ctx, &next.options, func() {
		if err := old.close(ctx); err != nil {
			s.log.LogAttrs(ctx, slog.LevelWarn, "what is not configured any more did not close cleanly", slog.String("error", err.Error()))
		}
	})
	if err != nil {
		return nil, errors.Join(err, next.close(ctx))
	}
	s.now = next
	s.now.telemetry.level.Set(levels[f.Config.Telemetry.LogLevel])
	return out, nil
}

// restart puts back what a running server cannot change, and names it.
func restart(now, next *config.Config) []string {
	var names []string
	for _, one := range []struct {
		name      string
		now, next any
	}{
		{"listen", &now.Listen, &next.Listen},
		{"tls", &now.TLS, &next.TLS},
		{"telemetry.prometheus", &now.Telemetry.Prometheus, &next.Telemetry.Prometheus},
		{"telemetry.otlp_endpoint", &now.Telemetry.OTLPEndpoint, &next.Telemetry.OTLPEndpoint},
		{"redis", &now.Redis, &next.Redis},
		{"state", &now.State, &next.State},
		{"artifacts", &now.Artifacts, &next.Artifacts},
		{"limits.max_connections", &now.Limits.MaxConnections, &next.Limits.MaxConnections},
		{"limits.max_connections_per_peer", &now.Limits.MaxConnsPerPeer, &next.Limits.MaxConnsPerPeer},
		{"limits.header_timeout", &now.Limits.HeaderTimeout, &next.Limits.HeaderTimeout},
		{"limits.body_timeout", &now.Limits.BodyTimeout, &next.Limits.BodyTimeout},
		{"limits.idle_timeout", &now.Limits.IdleTimeout, &next.Limits.IdleTimeout},
		{"limits.write_timeout", &now.Limits.WriteTimeout, &next.Limits.WriteTimeout},
		{"limits.session_idle_timeout", &now.Limits.SessionIdleTimeout, &next.Limits.SessionIdleTimeout},
	} {
		a, b := reflect.ValueOf(one.now).Elem(), reflect.ValueOf(one.next).Elem()
		if !reflect.DeepEqual(a.Interface(), b.Interface()) {
			names = append(names, one.name)
			b.Set(a)
		}
	}
	return names
}

// changes names what is different: sections of the file, files that it names, and backends.
func changes(now, next *opened) []string {
	var names []string
	a, b := reflect.ValueOf(now.file.Config), reflect.ValueOf(next.file.Config)
	for i := range a.NumField() {
		name := a.Type().Field(i).Tag.Get("yaml")
		if name != "backends" && !reflect.DeepEqual(a.Field(i).Interface(), b.Field(i).Interface()) {
			names = append(names, name)
		}
	}
	for _, name := range []string{"auth", "policy"} { // which name files
		if !next.has(name, now.things[name]) && !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	for _, bk := range next.file.Config.Backends {
		switch before := now.things["backend "+bk.Name]; {
		case before == nil:
			names = append(names, "backend "+bk.Name+" added")
		case !next.has("backend "+bk.Name, before):
			names = append(names, "backend "+bk.Name+" opened anew")
		}
	}
	for _, bk := range now.file.Config.Backends {
		if next.things["backend "+bk.Name] == nil {
			names = append(names, "backend "+bk.Name+" removed")
		}
	}
	return names
}

// String says it to a person.
func (o *outcome) String() string {
	var b strings.Builder
	switch o.Outcome {
	case "refused":
		fmt.Fprintf(&b, "The configuration was not loaded; what was served stays:\n%s\n", o.Error)
	case "unchanged":
		fmt.Fprintln(&b, "Nothing is different.")
	default:
		fmt.Fprintf(&b, "The configuration was loaded in %d ms. Different now: %s.\n", o.Millis, strings.Join(o.Changed, ", "))
	}
	if len(o.Restart) > 0 {
		fmt.Fprintf(&b, "After a restart: %s.\n", strings.Join(o.Restart, ", "))
	}
	return b.String()
}
