package newel

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"runtime"
	"slices"
	"sync"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/assembly"
)

// A Server is an MCP server. Tools, resources and prompts are added first; what is wrong with
// them surfaces when it starts, all at once, with names and places. It is safe for concurrent
// use once it has started; adding after that has no effect.
type Server struct {
	opts     Options
	own      functions
	problems []error
	build    func() (*assembly.House, error)
}

// New returns a server. It never fails and starts nothing; o may be nil and is copied.
func New(o *Options) *Server {
	s := &Server{}
	if o != nil {
		s.opts = *o
	}
	s.build = sync.OnceValues(func() (*assembly.House, error) {
		if err := errors.Join(s.problems...); err != nil {
			return nil, err
		}
		return assembly.Build(context.Background(), s.opts.assemble(&s.own))
	})
	return s
}

// functions is the backend that holds what was added.
type functions struct{ capabilities []*call.Capability }

// Name implements call.Backend.
func (f *functions) Name() string { return "functions" }

// Apart says that the functions have nothing in common: one that fails is no reason to leave the others.
func (f *functions) Apart() bool { return true }

// Capabilities implements call.Backend.
func (f *functions) Capabilities(context.Context) ([]*call.Capability, error) {
	return slices.Clone(f.capabilities), nil
}

// add registers a capability, or remembers why it cannot be.
func (s *Server) add(c *call.Capability, err error) {
	if err != nil {
		s.problems = append(s.problems, fmt.Errorf("%s: %s %q: %w", c.Origin, c.Kind, c.Name+c.URI+c.Template, err))
		return
	}
	s.own.capabilities = append(s.own.capabilities, c)
}

// place returns file and line of the code that called an exported function of this package.
func place() string {
	_, file, line, ok := runtime.Caller(2)
	if !ok {
		return ""
	}
	return fmt.Sprintf("%s:%d", file, line)
}

// Handler returns the server as an http.Handler: /mcp, /health, /ready and /metrics. The error
// joins everything that is wrong with what was added. Run should run beside it. A stream on which a
// client of a session listens takes its connection out of the http.Server (http.Hijacker), which does
// not wait for it then: Run does.
func (s *Server) Handler() (http.Handler, error) {
	h, err := s.build()
	if err != nil {
		return nil, err
	}
	return h.Handler(), nil
}

// Run watches backends for changes and expires sessions until ctx ends. Serve and ServeStdio do
// it themselves.
func (s *Server) Run(ctx context.Context) error {
	h, err := s.build()
	if err != nil {
		return err
	}
	return h.Run(ctx)
}

// Serve serves HTTP on addr (host:port) until ctx ends, then lets running calls finish. It
// refuses addresses that others can reach: nothing here asks who is calling.
func (s *Server) Serve(ctx context.Context, addr string) error {
	h, err := s.build()
	if err != nil {
		return err
	}
	l, err := assembly.Listen(ctx, addr, assembly.Exposure{})
	if err != nil {
		return err
	}
	return h.Serve(ctx, l)
}

// ServeListener is Serve on a listener of the caller's, who answers for who can reach it.
func (s *Server) ServeListener(ctx context.Context, l net.Listener) error {
	h, err := s.build()
	if err != nil {
		return err
	}
	return h.Serve(ctx, l)
}

// ServeStdio serves one client on standard input and output until input ends or ctx does. Nothing
// else may write to standard output.
func (s *Server) ServeStdio(ctx context.Context) error { return s.ServePipes(ctx, os.Stdin, os.Stdout) }

// ServePipes is ServeStdio on other pipes.
func (s *Server) ServePipes(ctx context.Context, in io.Reader, out io.Writer) error {
	h, err := s.build()
	if err != nil {
		return err
	}
	return h.ServeStdio(ctx, in, out)
}

// Do runs one call through the whole path in memory. Tests use package neweltest instead.
func (s *Server) Do(ctx context.Context, c *call.Call) (*call.Result, error) {
	h, err := s.build()
	if err != nil {
		return nil, err
	}
	return h.Do(ctx, c)
}

// Undo undoes an operation with the tool that [Tool.Undo] names: once, however often it is called,
// and through the whole path. Names of operations are in [call.Event] and in records. by is who has
// it undone, for the audit log. It fails with NotFound for an operation that is not remembered any
// more, and with OutcomeUnknown for one of which it is not known whether it ran.
func (s *Server) Undo(ctx context.Context, operation, by string) (*call.Result, error) {
	h, err := s.build()
	if err != nil {
		return nil, err
	}
	return h.Undo(ctx, operation, by)
}
