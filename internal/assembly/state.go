package assembly

import (
	"context"
	"errors"

	"newel.dev/newel/internal/audit"
	"newel.dev/newel/internal/secret"
)

// An Engine is a store with its audit log.
type Engine interface {
	Store
	audit.Eraser
	// Run does what has to be done from time to time until ctx ends. An error means that the store can
	// no longer be trusted.
	Run(ctx context.Context) error
	Close() error
}

// A Published engine is one whose log is published while it runs.
type Published struct {
	Engine
	*audit.Publisher
	Failed func(error) // told why a head could not be published, and will be tried again; nil: nobody is
}

// Publish publishes the head of an engine's log. It fails, and closes the engine, if the log is not
// the one that was published before.
func Publish(ctx context.Context, e Engine, p *audit.Publisher) (*Published, error) {
	p.Source = e
	if err := p.Publish(ctx); err != nil {
		return nil, errors.Join(err, e.Close())
	}
	return &Published{Engine: e, Publisher: p}, nil
}

// Run implements Engine.
func (p *Published) Run(ctx context.Context) error {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	ended := make(chan error, 1)
	go func() { ended <- p.Engine.Run(ctx) }()
	published := make(chan error, 1)
	failed := p.Failed
	if failed == nil {
		failed = func(error) {}
	}
	go func() { published <- p.Publisher.Run(ctx, failed) }()
	select {
	case err := <-ended:
		stop()
		return errors.Join(err, <-published)
	case err := <-published:
		stop()
		return errors.Join(err, <-ended)
	}
}

// Signer returns what signs heads of a log: the same for the same name and key.
func Signer(origin string, key secret.Key) (*audit.Signer, error) {
	seed, err := key.Derive("newel audit checkpoints")
	if err != nil {
		return nil, err
	}
	return audit.NewSigner(origin, seed)
}
