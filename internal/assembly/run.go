package assembly

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"newel.dev/newel/internal/backend/artifact"
)

const (
	maxHeaderBytes = 64 << 10
	drainTimeout   = 15 * time.Second // for calls that run when the server is told to stop
)

// drain tells doors that the server is stopping.
type drain struct {
	begun context.Context // ends then
	begin func()
}

func newDrain() *drain {
	ctx, begin := context.WithCancel(context.Background())
	return &drain{begun: ctx, begin: begin}
}

// Handler serves /mcp, /health, /ready and /metrics. It works without Run, but then watched
// backends do not notice changes and sessions do not expire.
func (h *House) Handler() http.Handler { return h.behindProxy(h.routes()) }

// routes is all that is served over HTTP. A test asks every pattern without a token.
func (h *House) routes() *routes {
	mux := newRoutes()
	for _, f := range h.faces {
		mux.Handle(f.server.Host+f.server.Path, f.door)
	}
	h.serveMetadata(mux)
	h.serveApprovals(mux)
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
		case <-h.drain.begun.Done():
			status(w, http.StatusServiceUnavailable, `{"status":"draining"}`)
			return
		default:
		}
		if !h.kept.running.Load() {
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

func newRoutes() *routes { return &routes{mux: http.NewServeMux()} }

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
// without large data has a heap of a few MiB. Making it makes the collector run once, for which a
// program that has just started has no time.
const (
	heapFloor      = 16 << 20
	heapFloorAfter = time.Second
)

// ErrHandedOver is the cause (context.Cause) of a context that ends because another process accepts
// connections on the same socket from now on.
var ErrHandedOver = errors.New("another process serves on")

// Serve serves HTTP on l until ctx ends; see [Live.Serve].
func (h *House) Serve(ctx context.Context, l net.Listener) error { return NewLive(h).Serve(ctx, l) }

// Serve serves HTTP on l until ctx ends. Then, in this order: /ready says no and open subscriptions
// end with their result; sessions close; no connection is accepted any more and running calls finish
// (at most 15 seconds, after that they are cut); watchers stop; the store is let go. If the socket
// was handed over, connections have a second to be given up by their clients. It is called once.
func (l *Live) Serve(ctx context.Context, listener net.Listener) error {
	var floor atomic.Pointer[[heapFloor]byte]
	later := time.AfterFunc(heapFloorAfter, func() { floor.Store(new([heapFloor]byte)) })
	defer runtime.KeepAlive(&floor)
	defer later.Stop()
	first := l.House()
	limits, err := first.opts.Limits.Connections.withDefaults()
	if err != nil {
		return err
	}
	accepted := newGuarded(listener, limits, first.opts.Proxies, first.opts.Logger)
	if err := accepted.measure(first.opts.Meter.Meter("newel.dev/newel")); err != nil {
		return err
	}
	return l.whileRunning(ctx, func(ctx context.Context) error {
		out := &leaving{Listener: accepted, done: make(chan struct{})}
		srv := &http.Server{
			Handler:           out.handler(first.kept),
			ConnState:         out.count,
			ReadHeaderTimeout: limits.Header,
			ReadTimeout:       limits.Body,
			IdleTimeout:       limits.Idle,
			MaxHeaderBytes:    maxHeaderBytes,
			ErrorLog:          slog.NewLogLogger(first.opts.Logger.Handler(), slog.LevelWarn),
		}
		stopped := make(chan error, 1)
		go func() {
			<-ctx.Done()
			leaving := errors.Is(context.Cause(ctx), ErrHandedOver)
			if leaving {
				out.leave()
			}
			l.drain()
			if leaving {
				out.linger()
			}
			limit, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainTimeout)
			defer cancel()
			out.release()
			err := srv.Shutdown(limit)
			if err != nil {
				err = errors.Join(fmt.Errorf("some calls were cut after %v", drainTimeout), srv.Close())
			}
			stopped <- err
		}()
		serve := srv.Serve
		if first.opts.TLS != nil {
			srv.TLSConfig = first.opts.TLS.Config()
			serve = func(l net.Listener) error { return srv.ServeTLS(l, "", "") }
		}
		if err := serve(out); !errors.Is(err, http.ErrServerClosed) {
			return fmt.Errorf("http: %w", err)
		}
		return <-stopped
	})
}

// Run watches backends and expires sessions until ctx ends. Serve and ServeStdio do it
// themselves; only users of Handler call it.
func (h *House) Run(ctx context.Context) error {
	l := NewLive(h)
	return l.whileRunning(ctx, func(ctx context.Context) error {
		<-ctx.Done()
		l.drain()
		return nil
	})
}

// ServeStdio serves one client on in and out until in ends or ctx does.
func (h *House) ServeStdio(ctx context.Context, in io.Reader, out io.Writer) error {
	return NewLive(h).whileRunning(ctx, func(ctx context.Context) error { return h.stdio.Serve(ctx, in, out) })
}

// drain tells those that wait for something that the server is stopping.
func (l *Live) drain() {
	l.mu.Lock()
	l.ended = true
	all := append([]*House{l.now}, l.draining...)
	l.mu.Unlock()
	for _, h := range all {
		h.drain.begin()
		for _, f := range h.faces {
			f.place.sessions.Close()
		}
	}
}

// whileRunning runs serve beside the long-lived goroutines and waits for all.
func (l *Live) whileRunning(ctx context.Context, serve func(context.Context) error) error {
	ctx, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	var state sync.WaitGroup
	store, release := context.WithCancel(context.WithoutCancel(ctx)) // the store outlives what writes to it
	defer release()
	l.mu.Lock()
	kept := l.now.kept
	state.Go(func() { kept.runState(store, fail) })
	l.begin(l.now)
	l.mu.Unlock()
	if c := l.House().opts.Cluster; c != nil {
		if err := c.Start(ctx); err != nil {
			kept.log.LogAttrs(ctx, slog.LevelWarn, "the other nodes do not know of this one yet", slog.String("error", err.Error()))
		}
	}
	kept.tasks.Accept() // Run may not have begun yet
	kept.running.Store(true)
	err := serve(ctx)
	kept.running.Store(false)
	l.mu.Lock()
	l.ended = true
	l.mu.Unlock()
	l.stop()
	l.all.Wait()
	release()
	state.Wait()
	switch cause := context.Cause(ctx); {
	case cause == nil, errors.Is(cause, context.Canceled), errors.Is(cause, context.DeadlineExceeded), errors.Is(cause, ErrHandedOver):
	default:
		err = errors.Join(cause, err)
	}
	return err
}
