// Package postgres keeps the state of [newel.Server]s in a PostgreSQL database: for many processes
// that serve the same.
package postgres

import (
	"context"
	"errors"

	"newel.dev/newel"
	"newel.dev/newel/internal/assembly"
	"newel.dev/newel/internal/audit"
	"newel.dev/newel/internal/secret"
	"newel.dev/newel/internal/store/postgres"
)

// Options say where a state is. Zero means the default in brackets.
type Options struct {
	// DSN is how to connect, such as postgres://user:password@host:5432/database. Tables begin with
	// newel_ and are in the first schema of the search path. Required.
	DSN string
	// KeyFile holds the key that seals what the database holds: the same for all processes. It is
	// made if it is not there. Without it what is stored cannot be read any more. Required.
	KeyFile string
	// Heads is where the newest signed head of the audit log is kept, for others to copy. Required.
	Heads string
	// Origin names the log in its heads: no spaces, no plus signs, the same for all processes [newel].
	Origin string
}

// Open opens a state. It fails if the database does not answer, if the key is another one than the
// first process had, and if the audit log is not the one whose head was published.
func Open(ctx context.Context, o Options) (*newel.State, error) {
	if o.DSN == "" || o.KeyFile == "" || o.Heads == "" {
		return nil, errors.New("the state needs a database, a file for its key and one for the heads of its log: Options.DSN, KeyFile and Heads")
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
	db, err := postgres.Open(ctx, secret.New(o.DSN), key)
	if err != nil {
		return nil, err
	}
	published, err := assembly.Publish(ctx, db, &audit.Publisher{Signer: signer, File: o.Heads})
	if err != nil {
		return nil, err
	}
	return newel.NewState(published, key), nil
}
