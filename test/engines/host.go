package engines

import (
	"context"
	"fmt"
	"os"
	"slices"
	"sync"
	"testing"
)

// A Host runs servers for a program, as a test would: what is handed to [Start] and [Redis] where
// there is no test. Its methods are safe for concurrent use.
type Host struct {
	testing.TB // nil: only the methods below may be called
	ctx        context.Context

	mu      sync.Mutex
	cleanup []func()
}

type fatal string

// Hosted calls f with a host and stops its servers when f has returned. What a server has to say
// that ends a test ends f, and is the error.
func Hosted(ctx context.Context, f func(h *Host) error) (err error) {
	h := &Host{ctx: ctx}
	defer h.end()
	defer func() {
		switch r := recover().(type) {
		case nil:
		case fatal:
			err = fmt.Errorf("%s", string(r))
		default:
			panic(r)
		}
	}()
	return f(h)
}

func (h *Host) end() {
	for _, f := range slices.Backward(h.cleanup) {
		f()
	}
}

// The methods of testing.TB that servers use.

// Helper does nothing.
func (h *Host) Helper() {}

// Context is that of Hosted.
func (h *Host) Context() context.Context { return h.ctx }

// Fatal ends what Hosted called.
func (h *Host) Fatal(args ...any) { panic(fatal(fmt.Sprint(args...))) }

// Fatalf ends what Hosted called.
func (h *Host) Fatalf(f string, args ...any) { panic(fatal(fmt.Sprintf(f, args...))) }

// Errorf prints.
func (h *Host) Errorf(f string, args ...any) { fmt.Fprintf(os.Stderr, f+"\n", args...) }

// Cleanup has f called when what Hosted called has returned.
func (h *Host) Cleanup(f func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.cleanup = append(h.cleanup, f)
}
