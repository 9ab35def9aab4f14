package redis

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/redis/go-redis/v9"

	"newel.dev/newel/internal/cluster"
)

var _ cluster.Store = (*DB)(nil)

func (db *DB) node(name string) string  { return db.prefix + "node:" + name }
func (db *DB) session(id string) string { return db.prefix + "session:" + id }

// Alive implements cluster.Store.
func (db *DB) Alive(ctx context.Context, n cluster.Node, ttl time.Duration) error {
	return wrap(db.client.Set(ctx, db.node(n.Name), n.Address, ttl).Err())
}

// Gone implements cluster.Store.
func (db *DB) Gone(ctx context.Context, name string) error {
	return wrap(db.client.Del(ctx, db.node(name)).Err())
}

// keep writes a session unless another node has it.
var keep = redis.NewScript(`
local owner = redis.call('HGET', KEYS[1], 'owner')
if owner and owner ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], 'owner', ARGV[1], 'user', ARGV[2], 'state', ARGV[3])
redis.call('PEXPIRE', KEYS[1], ARGV[4])
return 1
`)

// Keep implements cluster.Store.
func (db *DB) Keep(ctx context.Context, s cluster.Session, ttl time.Duration) (bool, error) {
	n, err := keep.Run(ctx, db.client, []string{db.session(s.ID)}, s.Owner, s.User, s.State, ttl.Milliseconds()).Int()
	return n == 1, wrap(err)
}

// Find implements cluster.Store.
func (db *DB) Find(ctx context.Context, id string) (cluster.Session, cluster.Node, bool, error) {
	m, err := db.client.HGetAll(ctx, db.session(id)).Result()
	if err != nil || len(m) == 0 {
		return cluster.Session{}, cluster.Node{}, false, wrap(err)
	}
	s := cluster.Session{ID: id, Owner: m["owner"], User: m["user"], State: []byte(m["state"])}
	address, err := db.client.Get(ctx, db.node(s.Owner)).Result()
	switch {
	case errors.Is(err, redis.Nil):
		return s, cluster.Node{}, true, nil
	case err != nil:
		return cluster.Session{}, cluster.Node{}, false, wrap(err)
	}
	return s, cluster.Node{Name: s.Owner, Address: address}, true, nil
}

// takeOver makes another node the owner, if the old one is gone.
var takeOver = redis.NewScript(`
if redis.call('HGET', KEYS[1], 'owner') ~= ARGV[1] or redis.call('EXISTS', KEYS[2]) == 1 then return 0 end
redis.call('HSET', KEYS[1], 'owner', ARGV[2])
return 1
`)

// TakeOver implements cluster.Store.
func (db *DB) TakeOver(ctx context.Context, id, from, to string) (bool, error) {
	n, err := takeOver.Run(ctx, db.client, []string{db.session(id), db.node(from)}, from, to).Int()
	return n == 1, wrap(err)
}

// forget ends a session unless another node has it.
var forget = redis.NewScript(`
if redis.call('HGET', KEYS[1], 'owner') == ARGV[1] then redis.call('DEL', KEYS[1]) end
return 1
`)

// Forget implements cluster.Store.
func (db *DB) Forget(ctx context.Context, id, owner string) error {
	return wrap(forget.Run(ctx, db.client, []string{db.session(id)}, owner).Err())
}

func wrap(err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("redis: %w", err)
}
