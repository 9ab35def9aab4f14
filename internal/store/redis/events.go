package redis

import (
	"context"
	"errors"
	"iter"
	"log/slog"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/modelcontextprotocol/go-sdk/mcp"
	"github.com/redis/go-redis/v9"
)

// Events keeps what was sent on streams of sessions, so that a client can go on with a stream at any
// node. Old events go first. While Redis is away events are sent all the same, and cannot be read
// again.
type Events struct {
	db   *DB
	ttl  time.Duration
	log  *slog.Logger
	away atomic.Int64 // until when Redis is left alone, in unix nanoseconds
}

var _ mcp.EventStore = (*Events)(nil)

// Bounds of one stream.
const (
	maxEvents     = 1000
	maxEventBytes = 1 << 20
	writeTime     = 500 * time.Millisecond
	awayFor       = time.Second
)

// Events returns a store of events that forgets a stream ttl after the last one.
func (db *DB) Events(ttl time.Duration, log *slog.Logger) *Events {
	return &Events{db: db, ttl: ttl, log: log}
}

// try writes, unless Redis has just failed.
func (e *Events) try(ctx context.Context, write func(context.Context) error) {
	if time.Now().UnixNano() < e.away.Load() {
		return
	}
	limited, cancel := context.WithTimeout(context.WithoutCancel(ctx), writeTime)
	defer cancel()
	if err := write(limited); err != nil {
		e.away.Store(time.Now().Add(awayFor).UnixNano())
		e.log.LogAttrs(ctx, slog.LevelWarn, "what is sent on streams cannot be kept; clients that lose one cannot go on with it", slog.String("error", err.Error()))
	}
}

// keys are those of the events of a stream, of what it is otherwise, and of the streams of its session
// with the time of the last event.
func (e *Events) keys(session, stream string) []string {
	at := e.db.prefix + "events:" + session
	return []string{at + ":" + stream, at + ":" + stream + ":m", e.db.prefix + "streams:" + session}
}

// Open implements mcp.EventStore.
func (e *Events) Open(ctx context.Context, session, stream string) error {
	e.try(ctx, func(ctx context.Context) error {
		keys := e.keys(session, stream)
		pipe := e.db.client.Pipeline()
		pipe.HSetNX(ctx, keys[1], "first", 0)
		pipe.PExpire(ctx, keys[1], e.ttl)
		now := time.Now()
		pipe.ZAdd(ctx, keys[2], redis.Z{Score: float64(now.UnixMilli()), Member: stream})
		pipe.ZRemRangeByScore(ctx, keys[2], "-inf", strconv.FormatInt(now.Add(-e.ttl).UnixMilli(), 10)) // they are forgotten
		pipe.PExpire(ctx, keys[2], e.ttl)
		_, err := pipe.Exec(ctx)
		return err
	})
	return nil
}

// appendEvent adds an event and drops old ones over the bounds, counting the first that is left.
var appendEvent = redis.NewScript(`
redis.call('RPUSH', KEYS[1], ARGV[1])
local bytes = redis.call('HINCRBY', KEYS[2], 'bytes', #ARGV[1])
while bytes > tonumber(ARGV[3]) or redis.call('LLEN', KEYS[1]) > tonumber(ARGV[2]) do
	local old = redis.call('LPOP', KEYS[1])
	if not old then break end
	bytes = redis.call('HINCRBY', KEYS[2], 'bytes', -#old)
	redis.call('HINCRBY', KEYS[2], 'first', 1)
end
redis.call('ZADD', KEYS[3], ARGV[5], ARGV[6])
for _, key in ipairs(KEYS) do redis.call('PEXPIRE', key, ARGV[4]) end
return 1
`)

// Append implements mcp.EventStore.
func (e *Events) Append(ctx context.Context, session, stream string, data []byte) error {
	e.try(ctx, func(ctx context.Context) error {
		return appendEvent.Run(ctx, e.db.client, e.keys(session, stream), data, maxEvents, maxEventBytes, e.ttl.Milliseconds(), time.Now().UnixMilli(), stream).Err()
	})
	return nil
}

// after returns the index of the first event that is left, and all from there on.
var after = redis.NewScript(`
local first = redis.call('HGET', KEYS[2], 'first')
if not first then return {'unknown'} end
local from = tonumber(ARGV[1]) - tonumber(first)
local out = redis.call('LRANGE', KEYS[1], math.max(from, 0), -1)
table.insert(out, 1, tostring(from))
return out
`)

// After implements mcp.EventStore.
func (e *Events) After(ctx context.Context, session, stream string, index int) iter.Seq2[[]byte, error] {
	return func(yield func([]byte, error) bool) {
		out, err := after.Run(ctx, e.db.client, e.keys(session, stream), index+1).StringSlice()
		switch {
		case err != nil:
			yield(nil, wrap(err))
			return
		case len(out) == 0 || out[0] == "unknown":
			yield(nil, errors.New("the stream is not known any more"))
			return
		case out[0][0] == '-':
			yield(nil, mcp.ErrEventsPurged)
			return
		}
		for _, data := range out[1:] {
			if !yield([]byte(data), nil) {
				return
			}
		}
	}
}

// SessionClosed implements mcp.EventStore.
func (e *Events) SessionClosed(ctx context.Context, session string) error {
	at := e.keys(session, "")[2]
	streams, err := e.db.client.ZRange(ctx, at, 0, -1).Result()
	if err != nil {
		return wrap(err)
	}
	keys := []string{at}
	for _, s := range streams {
		keys = append(keys, e.keys(session, s)[:2]...)
	}
	return wrap(e.db.client.Del(ctx, keys...).Err())
}
