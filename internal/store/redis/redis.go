// Package redis keeps in Redis or Valkey what all nodes share and may forget: counts of limits, sessions,
// results, logins, and DPoP proofs that were used.
//
// Start reading at [Open]; then there is a file for each of these. Nothing here is durable, and nothing
// rests on it: when Redis is away its users fall back to something stricter, and for logins and proofs that
// is to refuse. All keys begin with a prefix and hold a hash tag, so that one script finds them on one node
// of a cluster.
package redis

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"

	"newel.dev/newel/internal/secret"
)

// A DB is a connection pool. It is safe for concurrent use.
type DB struct {
	client *redis.Client
	prefix string
}

// Open checks the address, such as redis://:password@host:6379/0 or rediss:// for TLS. It does not
// connect yet.
func Open(address secret.String) (*DB, error) {
	o, err := redis.ParseURL(address.Reveal())
	if err != nil {
		return nil, errors.New("the address of Redis is not valid; write redis://:password@host:6379/0, or rediss:// for TLS") // the error would hold the password
	}
	quiet.Do(func() { redis.SetLogger(silence{}) })
	o.DialTimeout, o.ReadTimeout, o.WriteTimeout = time.Second, time.Second, time.Second
	o.MaxRetries = -1 // who waits for a count would wait longer
	o.DialerRetries = 1
	o.ContextTimeoutEnabled = true
	return &DB{client: redis.NewClient(o), prefix: "{newel}:"}, nil
}

// quiet: what goes wrong is returned, and logged by whoever asked. The library would write to standard
// error beside it.
var quiet sync.Once

type silence struct{}

// Printf implements the library's logger.
func (silence) Printf(context.Context, string, ...any) {}

// Ping reports whether the server answers.
func (db *DB) Ping(ctx context.Context) error {
	if err := db.client.Ping(ctx).Err(); err != nil {
		return fmt.Errorf("redis: %w", err)
	}
	return nil
}

// Close closes all connections.
func (db *DB) Close() error { return db.client.Close() }
