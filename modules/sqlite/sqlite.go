// Package sqlite keeps the state of a [newel.Server] in a file: for one process, with no other
// program. What a server acknowledges is synced to disk before.
package sqlite

import (
	"context"
	"errors"
	"time"

	"newel.dev/newel"
	"newel.dev/newel/internal/assembly"
	"newel.dev/newel/internal/audit"
	"newel.dev/newel/internal/secret"
	"newel.dev/newel/internal/store/sqlite"
)

// Options say where a state is. Zero means the default in brackets.
type Options struct {
	// File is made, with its folder, if it is not there. Required.
	File string
	// KeyFile holds the key that seals what File holds; it is made with it. Without it what is stored
	// cannot be read any more: keep a copy somewhere else [File and .key].
	KeyFile string
	// Heads is where the newest signed head of the audit log is kept, for others to copy [File and .head].
	Heads string
	// Origin names the log in its heads: no spaces, no plus signs [newel].
	Origin string
	// Wait is how long to wait for another process to let go of the file [not at all].
	Wait time.Duration
}

// Open opens a state. It fails if another process has the file, if the key is another one, and if the
// audit log is not the one whose head was published.
func Open(ctx context.Context, o Options) (*newel.State, error) {
	if o.File == "" {
		return nil, errors.New("the state needs a file: Options.File")
	}
	if o.KeyFile == "" {
		o.KeyFile = o.File + ".key"
	}
	if o.Heads == "" {
		o.Heads = o.File + ".head"
	}
	if o.Origin == "" {
		o.Origin = "newel"
	}
	key, err := secret.OpenKey(o.KeyFile)
	if err != nil {
		return nil, err
	}
	signer, err := assembly.Signer(o.Origin, key)
	if err != nil {
		return nil, err
	}
	db, err := sqlite.Open(ctx, o.File, key, o.Wait)
	if err != nil {
		return nil, err
	}
	published, err := assembly.Publish(ctx, db, &audit.Publisher{Signer: signer, File: o.Heads})
	if err != nil {
		return nil, err
	}
	return newel.NewState(published, key), nil
}
