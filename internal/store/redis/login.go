package redis

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"time"

	"github.com/redis/go-redis/v9"

	"newel.dev/newel/internal/identity/issuer"
	"newel.dev/newel/internal/secret"
)

// Logins keeps what an authorization server has to remember. Values are sealed, and names are not to be
// read: whoever reads Redis learns no more than how many there are, and whoever writes to it can take
// away or bring back, but not make. It is safe for concurrent use.
type Logins struct {
	db    *DB
	box   *secret.Box
	names []byte
	scope string
}

var _ issuer.Store = (*Logins)(nil)

// Logins returns those of the authorization server with this address. The key is one that its nodes
// share.
func (db *DB) Logins(key secret.Key, server string) (*Logins, error) {
	box, err := key.Box("newel logins")
	if err != nil {
		return nil, err
	}
	names, err := key.Derive("newel names of logins")
	if err != nil {
		return nil, err
	}
	l := &Logins{db: db, box: box, names: names}
	l.scope = l.name("server", server)
	return l, nil
}

// Bounds of what is asked of Redis.
const (
	loginTime    = time.Second // for one question
	maxLogin     = 64 << 10    // bytes of a value
	loginChanges = 10          // tries, when others change the same value
)

func (l *Logins) name(kind, of string) string {
	h := hmac.New(sha256.New, l.names)
	fmt.Fprintf(h, "%s %s %s", l.scope, kind, of)
	return base64.RawURLEncoding.EncodeToString(h.Sum(nil)[:18])
}

// Keys: all of a kind, those of an owner, and values.
func (l *Logins) all(k *issuer.Kind) string { return l.db.prefix + "logins:" + l.scope + ":" + k.Name }
func (l *Logins) values(k *issuer.Kind) string {
	return l.db.prefix + "login:" + l.scope + ":" + k.Name + ":"
}
func (l *Logins) owner(at issuer.Place) string {
	return l.all(at.Kind) + ":" + l.name(at.Kind.Name+" owner", at.Owner)
}

// lasting makes a set last as long as what is in it. Sets hold names by when they expire.
const lasting = `
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local function last(key, ttl)
	if redis.call('PTTL', key) < ttl then redis.call('PEXPIRE', key, ttl) end
end
`

// addLogin answers with 1, with 0 if there is something, and with 2 if there is no room. An empty value
// stands for one that ended.
var addLogin = redis.NewScript(lasting + `
local value, ttl, name, most, forget, ofOne, values = ARGV[1], tonumber(ARGV[2]), ARGV[3], tonumber(ARGV[4]), ARGV[5], tonumber(ARGV[6]), ARGV[7]
if redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now)
if redis.call('ZCARD', KEYS[2]) >= most then
	if forget ~= '1' then return 2 end
	redis.call('DEL', values .. redis.call('ZPOPMIN', KEYS[2])[1])
end
if ofOne > 0 then
	redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', now)
	if redis.call('ZCARD', KEYS[3]) >= ofOne then
		local first = redis.call('ZPOPMIN', KEYS[3])[1]
		redis.call('DEL', values .. first)
		redis.call('ZREM', KEYS[2], first)
	end
	redis.call('ZADD', KEYS[3], now + ttl, name)
	last(KEYS[3], ttl)
end
redis.call('SET', KEYS[1], value, 'PX', ttl)
redis.call('ZADD', KEYS[2], now + ttl, name)
last(KEYS[2], ttl)
return 1
`)

// changeLogin replaces a value that is still the one that was read.
var changeLogin = redis.NewScript(lasting + `
local ttl = tonumber(ARGV[3])
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2], 'PX', ttl)
redis.call('ZADD', KEYS[2], 'XX', now + ttl, ARGV[4])
last(KEYS[2], ttl)
return 1
`)

// endLogin forgets a value and leaves an empty one.
var endLogin = redis.NewScript(`
redis.call('SET', KEYS[1], '', 'PX', ARGV[1])
redis.call('ZREM', KEYS[2], ARGV[2])
redis.call('ZREM', KEYS[3], ARGV[2])
return 1
`)

func life(ttl time.Duration) int64 { return max(ttl.Milliseconds(), 1) }

// seal seals a value for its place.
func (l *Logins) seal(value []byte, key string) ([]byte, error) {
	if len(value) > maxLogin/2 {
		return nil, fmt.Errorf("redis: a value of %d bytes is too long", len(value))
	}
	return l.box.Seal(value, key), nil
}

// Add implements issuer.Store.
func (l *Logins) Add(ctx context.Context, at issuer.Place, value []byte, ttl time.Duration) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, loginTime)
	defer cancel()
	name := l.name(at.Kind.Name, at.Name)
	key := l.values(at.Kind) + name
	sealed, err := l.seal(value, key)
	if err != nil {
		return false, err
	}
	forget := 0
	if at.Kind.Forget {
		forget = 1
	}
	n, err := addLogin.Run(ctx, l.db.client, []string{key, l.all(at.Kind), l.owner(at)}, sealed, life(ttl), name, at.Kind.Most, forget, at.Kind.OfOne, l.values(at.Kind)).Int()
	if err != nil {
		return false, wrap(err)
	}
	if n == 2 {
		return false, issuer.ErrFull
	}
	return n == 1, nil
}

// Change implements issuer.Store.
func (l *Logins) Change(ctx context.Context, at issuer.Place, change func([]byte) ([]byte, time.Duration, error)) error {
	ctx, cancel := context.WithTimeout(ctx, loginTime)
	defer cancel()
	name := l.name(at.Kind.Name, at.Name)
	key := l.values(at.Kind) + name
	for range loginChanges {
		stored, err := l.db.client.GetRange(ctx, key, 0, maxLogin).Bytes()
		if err != nil {
			return wrap(err)
		}
		var now []byte
		switch {
		case len(stored) > maxLogin:
			return errors.New("redis: what is stored of a login is none of ours")
		case len(stored) > 0:
			if now, err = l.box.Open(stored, key); err != nil {
				return err
			}
		}
		next, ttl, err := change(now)
		if err != nil || next == nil || now == nil {
			return err
		}
		sealed, err := l.seal(next, key)
		if err != nil {
			return err
		}
		n, err := changeLogin.Run(ctx, l.db.client, []string{key, l.all(at.Kind)}, stored, sealed, life(ttl), name).Int()
		if n == 1 || err != nil {
			return wrap(err)
		}
	}
	return errors.New("redis: others change the same login all the time")
}

// End implements issuer.Store.
func (l *Logins) End(ctx context.Context, at issuer.Place, ttl time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, loginTime)
	defer cancel()
	name := l.name(at.Kind.Name, at.Name)
	return wrap(endLogin.Run(ctx, l.db.client, []string{l.values(at.Kind) + name, l.all(at.Kind), l.owner(at)}, life(ttl), name).Err())
}
