package assembly

import (
	"context"
	"errors"
	"testing"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/secret"
	"newel.dev/newel/internal/store/inmem"
)

// broken is a store that can no longer be trusted.
type broken struct {
	*inmem.DB
	err   error
	ended chan struct{}
}

func (b *broken) Run(ctx context.Context) error {
	if b.err == nil {
		<-ctx.Done()
	}
	close(b.ended)
	return b.err
}

type nothing struct{}

func (nothing) Name() string                                             { return "nothing" }
func (nothing) Capabilities(context.Context) ([]*call.Capability, error) { return nil, nil }

// TestBrokenStateEndsTheHouse is a disk that fails: the process has to end, and says why. A store
// that works runs as long as the house, and no longer.
func TestBrokenStateEndsTheHouse(t *testing.T) {
	for _, want := range []error{errors.New("fsync failed"), nil} {
		b := &broken{inmem.New(), want, make(chan struct{})}
		h, err := Build(t.Context(), &Options{Backends: []call.Backend{nothing{}}, State: b, Key: secret.RandomKey()})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		if want == nil {
			cancel()
		}
		if err := h.Run(ctx); !errors.Is(err, want) {
			t.Errorf("Run returned %v, want %v", err, want)
		}
		cancel()
		<-b.ended
	}
}
