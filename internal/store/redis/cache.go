package redis

import (
	"context"
	"time"

	"github.com/redis/go-redis/v9"

	"newel.dev/newel/internal/guard/cache"
)

var _ cache.Store = (*DB)(nil)

// maxRound is how much of a round is looked at.
const maxRound = 64

// round returns what stands under a name, or writes it.
var round = redis.NewScript(`
local now = redis.call('GETRANGE', KEYS[1], 0, ARGV[3] - 1)
if now ~= '' then return now end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return ARGV[1]
`)

func (db *DB) cached(name string) string { return db.prefix + "cache:" + name }

// Round implements cache.Store.
func (db *DB) Round(ctx context.Context, name, first string, ttl time.Duration) (string, error) {
	now, err := round.Run(ctx, db.client, []string{db.cached(name)}, first, ttl.Milliseconds(), maxRound).Text()
	return now, wrap(err)
}

// Turn implements cache.Store.
func (db *DB) Turn(ctx context.Context, name, to string, ttl time.Duration) error {
	return wrap(db.client.Set(ctx, db.cached(name), to, ttl).Err())
}

// Get implements cache.Store. No more than the bound is read, whatever somebody put there.
func (db *DB) Get(ctx context.Context, name string, most int) ([]byte, error) {
	value, err := db.client.GetRange(ctx, db.cached(name), 0, int64(most)).Bytes()
	if err != nil || len(value) == 0 || len(value) > most {
		return nil, wrap(err)
	}
	return value, nil
}

// Put implements cache.Store.
func (db *DB) Put(ctx context.Context, name string, value []byte, ttl time.Duration) error {
	return wrap(db.client.Set(ctx, db.cached(name), value, ttl).Err())
}
