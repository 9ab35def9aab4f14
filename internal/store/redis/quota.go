package redis

import (
	"context"
	"fmt"
	"time"

	"github.com/redis/go-redis/v9"

	"newel.dev/newel/internal/guard/quota"
)

var _ quota.Store = (*DB)(nil)

// take claims everything or nothing. Times are those of the server, in microseconds, so that the
// clocks of nodes do not matter. Each claim is four arguments: kind, limit, every or the end of the
// window, amount, and a fifth, the id of a concurrent call. It answers with the index of the claim
// that there is no room for and the time to wait, or with 0, 0 and the sums of budgets.
var take = redis.NewScript(`
local t = redis.call('TIME')
local now = t[1] * 1000000 + t[2]
for i, key in ipairs(KEYS) do
	local at = (i - 1) * 5
	local kind, limit, every, amount = ARGV[at+1], tonumber(ARGV[at+2]), tonumber(ARGV[at+3]), tonumber(ARGV[at+4])
	if kind == '0' then
		local tat = tonumber(redis.call('GET', key) or now)
		local wait = tat - now - every * (limit - amount)
		if wait > 0 or amount > limit then return {i, wait} end
	elseif kind == '1' then
		redis.call('ZREMRANGEBYSCORE', key, '-inf', now)
		if redis.call('ZCARD', key) + amount > limit then return {i, 1000000} end
	else
		local sum = tonumber(redis.call('GET', key) or 0)
		if sum + math.max(amount, 1) > limit then return {i, every - now} end
	end
end
local out = {0, 0}
for i, key in ipairs(KEYS) do
	local at = (i - 1) * 5
	local kind, every, amount = ARGV[at+1], tonumber(ARGV[at+3]), tonumber(ARGV[at+4])
	out[i+2] = 0
	if kind == '0' then
		local tat = math.max(tonumber(redis.call('GET', key) or now), now) + every * amount
		redis.call('SET', key, string.format('%.0f', tat), 'PX', math.ceil((tat - now) / 1000) + 1)
	elseif kind == '1' then
		redis.call('ZADD', key, now + every, ARGV[at+5])
		redis.call('PEXPIRE', key, math.ceil(every / 1000))
	else
		out[i+2] = redis.call('INCRBY', key, amount)
		redis.call('PEXPIREAT', key, math.ceil(every / 1000))
	end
end
return out
`)

// settle gives back and adds, with the same arguments, and answers with the sums.
var settle = redis.NewScript(`
local sums = {}
for i, key in ipairs(KEYS) do
	local at = (i - 1) * 5
	if ARGV[at+1] == '1' then
		redis.call('ZREM', key, ARGV[at+5])
		sums[i] = 0
	elseif ARGV[at+1] == '2' then
		sums[i] = redis.call('INCRBY', key, ARGV[at+4])
		redis.call('PEXPIREAT', key, math.ceil(tonumber(ARGV[at+3]) / 1000))
	else
		sums[i] = 0
	end
end
return sums
`)

func (db *DB) run(ctx context.Context, script *redis.Script, claims []quota.Claim) ([]int64, error) {
	keys := make([]string, len(claims))
	args := make([]any, 0, 5*len(claims))
	for i := range claims {
		c := &claims[i]
		keys[i] = db.prefix + "quota:" + c.Key
		every := c.Every.Microseconds()
		if c.Kind == quota.KindBudget {
			every = c.Until.UnixMicro()
		}
		args = append(args, int(c.Kind), c.Limit, every, c.Amount, c.ID)
	}
	out, err := script.Run(ctx, db.client, keys, args...).Int64Slice()
	if err != nil {
		return nil, fmt.Errorf("redis: %w", err)
	}
	return out, nil
}

// Take implements quota.Store.
func (db *DB) Take(ctx context.Context, _ time.Time, claims []quota.Claim) (quota.Outcome, error) {
	out, err := db.run(ctx, take, claims)
	if err != nil {
		return quota.Outcome{}, err
	}
	if len(out) != 2 && len(out) != 2+len(claims) {
		return quota.Outcome{}, fmt.Errorf("redis: an answer of %d numbers", len(out))
	}
	return quota.Outcome{Refused: int(out[0]) - 1, RetryAfter: time.Duration(out[1]) * time.Microsecond, Sums: out[2:]}, nil
}

// Settle implements quota.Store.
func (db *DB) Settle(ctx context.Context, _ time.Time, claims []quota.Claim) ([]int64, error) {
	out, err := db.run(ctx, settle, claims)
	if err == nil && len(out) != len(claims) {
		err = fmt.Errorf("redis: an answer of %d numbers", len(out))
	}
	return out, err
}
