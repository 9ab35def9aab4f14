package audit

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"newel.dev/newel/internal/faultpoint"
)

// A Publisher keeps the newest signed head of a log in a file, for others to keep a copy of. What
// was published before has to be a part of what comes after: a log that was put back to an earlier
// state, or replaced, is not vouched for.
type Publisher struct {
	Source Source
	Signer *Signer
	File   string
	// Witness gives a new head to somebody else, who keeps it; nil: nobody. One that fails is given
	// again, or the next one: heads follow from each other.
	Witness func(ctx context.Context, head []byte) error

	given []byte // the head that the witness has
}

const publishEvery = time.Minute

// Run publishes every minute, and once more when ctx ends. It returns an error that wraps
// [ErrTampered] if the log is not the one that was published. A file that cannot be written is
// tried again; failed is told why.
func (p *Publisher) Run(ctx context.Context, failed func(error)) error {
	tick := time.NewTicker(publishEvery)
	defer tick.Stop()
	for {
		err := p.Publish(ctx)
		if errors.Is(err, ErrTampered) {
			return err
		}
		if err == nil {
			err = p.witness(ctx)
		}
		if err != nil && ctx.Err() == nil {
			failed(err)
		}
		select {
		case <-ctx.Done():
			last, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
			defer cancel()
			if err := p.Publish(last); err != nil {
				failed(err)
			} else if err := p.witness(last); err != nil {
				failed(err)
			}
			return nil
		case <-tick.C:
		}
	}
}

// witness gives what is published to the witness, if that does not have it.
func (p *Publisher) witness(ctx context.Context) error {
	if p.Witness == nil {
		return nil
	}
	head, err := os.ReadFile(p.File)
	if err != nil {
		return fmt.Errorf("audit: the published head cannot be read: %w", err)
	}
	if bytes.Equal(head, p.given) {
		return nil
	}
	if err := p.Witness(ctx, head); err != nil {
		return fmt.Errorf("audit: the head is not witnessed: %w", err)
	}
	p.given = head
	return nil
}

// Publish publishes the head as it is now, if it is a new one.
func (p *Publisher) Publish(ctx context.Context) error {
	edge, err := p.Source.Head(ctx)
	if err != nil {
		return fmt.Errorf("audit: the head cannot be read: %w", err)
	}
	tree := edge.Tree()
	before, err := os.ReadFile(p.File)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("audit: the published head cannot be read: %w", err)
	}
	if err == nil {
		earlier, err := OpenCheckpoint(before, p.Signer.VerifierKey())
		if err != nil {
			return fmt.Errorf("the file %s: %w", p.File, err)
		}
		if earlier == tree {
			return nil
		}
		if earlier.N > tree.N {
			return fmt.Errorf("%w: %d records were published in %s, and the log has %d", ErrTampered, earlier.N, p.File, tree.N)
		}
		if earlier.N > 0 {
			proof, err := ProveConsistency(tree.N, earlier.N, RowsOf(ctx, p.Source))
			if err != nil {
				return err
			}
			if err := Consistent(proof, tree, earlier); err != nil {
				return err
			}
		}
	}
	signed, err := p.Signer.Sign(tree)
	if err != nil {
		return err
	}
	return replace(p.File, signed)
}

// replace writes a file whole or not at all.
func replace(file string, b []byte) (err error) {
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		return fmt.Errorf("audit: the head cannot be published: %w", err)
	}
	f, err := os.CreateTemp(filepath.Dir(file), ".checkpoint-*")
	if err != nil {
		return fmt.Errorf("audit: the head cannot be published: %w", err)
	}
	_, err = f.Write(b)
	if err = errors.Join(err, f.Sync(), f.Close()); err == nil {
		faultpoint.Reached(faultpoint.Publishing)
		err = os.Rename(f.Name(), file)
	}
	if err != nil {
		return fmt.Errorf("audit: the head cannot be published: %w", errors.Join(err, os.Remove(f.Name())))
	}
	return nil
}
