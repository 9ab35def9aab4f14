package assembly

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/backend/artifact"
)

// Time-outs of the HTTP server: slow clients may not hold what others need.
const (
	readHeaderTimeout = 10 * time.Second
	readTimeout       = 60 * time.Second // of a whole message
	idleTimeout       = 120 * time.Second
	maxHeaderBytes    = 64 << 10
	drainTimeout      = 15 * time.Second // for calls that run when the server is told to stop
)

// drain tells doors that the server is stopping.
type drain struct {
	begun chan struct{}
	once  sync.Once
}

func newDrain() *drain { return &drain{begun: make(chan struct{})} }

func (d *drain) begin() { d.once.Do(func() { close(d.begun) }) }

// ready is what /ready answers.
type ready struct{ running atomic.Bool }

// Handler serves /mcp, /health, /ready and /metrics. It works without Run, but then watched
// backends do not notice changes and sessions do not expire.
func (h *House) Handler() http.Handler { return h.behindProxy(h.routes()) }

// routes is all that is served over HTTP. A test asks every pattern without a token.
func (h *House) routes() *routes {
	mux := &routes{mux: http.NewServeMux()}
	for _, f := range h.faces {
		mux.Handle(f.server.Host+f.server.Path, f.door)
	}
	h.serveMetadata(mux)
	if h.opts.Login != nil {
		mux.Handle("/oauth/", h.opts.Login)
		mux.Handle("/.well-known/oauth-authorization-server", h.opts.Login)
		mux.Handle("/.well-known/openid-configuration", h.opts.Login)
	}
	mux.HandleFunc("GET /health", func(w http.ResponseWriter, _ *http.Request) {
		status(w, http.StatusOK, `{"status":"ok"}`)
	})
	mux.HandleFunc("GET /ready", func(w http.ResponseWriter, _ *http.Request) {
		select {
		case <-h.drain.begun:
			status(w, http.StatusServiceUnavailable, `{"status":"draining"}`)
			return
		default:
		}
		if !h.ready.running.Load() {
			status(w, http.StatusServiceUnavailable, `{"status":"starting"}`)
			return
		}
		h.answerReady(w)
	})
	if h.opts.Metrics != nil {
		mux.Handle("GET /metrics", h.opts.Metrics)
	}
	if downloads := h.artifacts.Download(); downloads != nil {
		mux.Handle("GET "+artifact.DownloadPath, downloads)
	}
	return mux
}

// A routes is a mux that knows its patterns.
type routes struct {
	mux      *http.ServeMux
	patterns []string
}

// ServeHTTP implements http.Handler.
func (m *routes) ServeHTTP(w http.ResponseWriter, r *http.Request) { m.mux.ServeHTTP(w, r) }

// Handle adds a route, as http.ServeMux does.
func (m *routes) Handle(pattern string, h http.Handler) {
	m.patterns = append(m.patterns, pattern)
	m.mux.Handle(pattern, h)
}

// HandleFunc adds a route, as http.ServeMux does.
func (m *routes) HandleFunc(pattern string, h http.HandlerFunc) { m.Handle(pattern, h) }

func status(w http.ResponseWriter, code int, body string) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(code)
	_, _ = w.Write([]byte(body + "\n")) // the prober is gone if this fails
}

// heapFloor is memory that nobody touches, so that it costs no page. The collector runs whenever the
// heap has doubled; without a floor that is every few milliseconds under load, because a server
// without large data has a heap of a few MiB.
const heapFloor = 16 << 20

// Serve serves HTTP on l until ctx ends. Then, in this order: /ready says no and open
// subscriptions end with their result; no connection is accepted any more and running calls
// finish (at most 15 seconds, after that they are cut); sessions close; watchers stop.
func (h *House) Serve(ctx context.Context, l net.Listener) error {
	floor := make([]byte, heapFloor)
	defer runtime.KeepAlive(floor)
	return h.whileRunning(ctx, func(ctx context.Context) error {
		srv := &http.Server{
			Handler:           h.Handler(),
			ReadHeaderTimeout: readHeaderTimeout,
			ReadTimeout:       readTimeout,
			IdleTimeout:       idleTimeout,
			MaxHeaderBytes:    maxHeaderBytes,
			ErrorLog:          slog.NewLogLogger(h.opts.Logger.Handler(), slog.LevelWarn),
		}
		stopped := make(chan error, 1)
		go func() {
			<-ctx.Done()
			h.drain.begin()
			for _, f := range h.faces {
				f.sessions.Close()
			}
			limit, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainTimeout)
			defer cancel()
			err := srv.Shutdown(limit)
			if err != nil {
				err = errors.Join(fmt.Errorf("some calls were cut after %v", drainTimeout), srv.Close())
			}
			stopped <- err
		}()
		serve := srv.Serve
		if h.opts.TLS != nil {
			srv.TLSConfig = h.opts.TLS.Config()
			serve = func(l net.Listener) error { return srv.ServeTLS(l, "", "") }
		}
		if err := serve(l); !errors.Is(err, http.ErrServerClosed) {
			return fmt.Errorf("http: %w", err)
		}
		return <-stopped
	})
}

// Run watches backends and expires sessions until ctx ends. Serve and ServeStdio do it
// themselves; only users of Handler call it.
func (h *House) Run(ctx context.Context) error {
	return h.whileRunning(ctx, func(ctx context.Context) error {
		<-ctx.Done()
		h.drain.begin()
		return nil
	})
}

// whileRunning runs serve beside the long-lived goroutines of the house and waits for all.
func (h *House) whileRunning(ctx context.Context, serve func(context.Context) error) error {
	ctx, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	background, stop := context.WithCancel(context.WithoutCancel(ctx))
	var all, state sync.WaitGroup
	kept, release := context.WithCancel(context.WithoutCancel(ctx)) // the store outlives what writes to it
	state.Go(func() { h.runState(kept, fail) })
	all.Go(func() { _ = h.effects.Run(background) }) // it ends with its context
	for _, b := range h.backends {
		if w, ok := b.(call.Watcher); ok {
			all.Go(func() { h.watch(background, w) })
		}
	}
	if r, ok := h.opts.Identity.(interface{ Run(context.Context) error }); ok {
		all.Go(func() {
			if err := r.Run(background); err != nil {
				h.opts.Logger.LogAttrs(background, slog.LevelError, "the keys of issuers are not kept fresh any more", slog.String("error", err.Error()))
			}
		})
	}
	if h.opts.TLS != nil {
		all.Go(func() {
			if err := h.opts.TLS.Run(background); err != nil {
				h.opts.Logger.LogAttrs(background, slog.LevelError, "certificates are not kept fresh any more", slog.String("error", err.Error()))
			}
		})
	}
	if h.opts.Cluster != nil {
		if err := h.opts.Cluster.Start(ctx); err != nil {
			h.opts.Logger.LogAttrs(ctx, slog.LevelWarn, "the other nodes do not know of this one yet", slog.String("error", err.Error()))
		}
		all.Go(func() { _ = h.opts.Cluster.Run(background) }) // it ends with its context
	}
	for _, f := range h.faces {
		all.Go(func() {
			if err := f.sessions.Run(background); err != nil {
				h.opts.Logger.LogAttrs(background, slog.LevelError, "sessions ended", slog.String("error", err.Error()))
			}
		})
	}
	h.ready.running.Store(true)
	err := serve(ctx)
	h.ready.running.Store(false)
	stop()
	all.Wait()
	release()
	state.Wait()
	if cause := context.Cause(ctx); cause != nil && !errors.Is(cause, context.Canceled) && !errors.Is(cause, context.DeadlineExceeded) {
		err = errors.Join(cause, err)
	}
	return err
}

// updated tells subscribers of every server that a resource changed.
func (h *House) updated(uri string) {
	for _, f := range h.faces {
		f.hub.Updated(uri)
	}
}

// watch runs one backend's watcher. A watcher that fails is logged: what it published stays.
func (h *House) watch(ctx context.Context, w call.Watcher) {
	changed := func(kinds ...call.Kind) {
		if err := h.refresh(ctx, kinds...); err != nil && ctx.Err() == nil {
			h.opts.Logger.LogAttrs(ctx, slog.LevelError, "a change was not taken over; the previous catalog stays",
				slog.String("backend", w.Name()), slog.String("error", err.Error()))
		}
	}
	if err := w.Run(ctx, changed, h.updated); err != nil && ctx.Err() == nil {
		h.opts.Logger.LogAttrs(ctx, slog.LevelError, "a backend stopped watching for changes",
			slog.String("backend", w.Name()), slog.String("error", err.Error()))
	}
}
