package redis

import (
	"context"
	"crypto/rand"
	"errors"
	"time"

	"github.com/redis/go-redis/v9"

	"newel.dev/newel/internal/identity/dpop"
)

// Proofs remembers DPoP proofs. It is safe for concurrent use.
type Proofs struct{ db *DB }

var _ dpop.Store = (*Proofs)(nil)

// Proofs returns what remembers them. A server that evicts keys (maxmemory-policy) forgets them too
// early and does not know; one that was started again, filled or not, and one that took over from
// another, begins a new era. Who may not ask for INFO notices only that it is empty.
func (db *DB) Proofs() *Proofs { return &Proofs{db} }

// findEra puts the era of this run of the server into the variable era. One that has begun is forgotten
// after an hour in which nobody asks: nonces last for five minutes.
const findEra = `
local info = redis.pcall('INFO', 'server')
local run = type(info) == 'string' and string.match(info, 'run_id:(%x+)') or ''
local known = redis.call('HMGET', KEYS[1], 'run', 'era')
local era = known[2]
if known[1] ~= run or not era then
	era = ARGV[1]
	redis.call('HSET', KEYS[1], 'run', run, 'era', era)
end
redis.call('PEXPIRE', KEYS[1], 3600000)
`

var askEra = redis.NewScript(findEra + `return era`)

// takeProof answers with 1 if the proof was not there.
var takeProof = redis.NewScript(findEra + `
if era == ARGV[2] and redis.call('SET', KEYS[2], '', 'NX', 'PX', ARGV[3]) then return {1, era} end
return {0, era}
`)

// next is an era that nobody had.
func next() []byte {
	var e dpop.Era
	_, _ = rand.Read(e[:]) // never fails
	return e[:]
}

func era(text string) (dpop.Era, error) {
	if len(text) != len(dpop.Era{}) {
		return dpop.Era{}, errors.New("redis: what stands for the era of proofs is none")
	}
	return dpop.Era([]byte(text)), nil
}

// Era implements dpop.Store.
func (p *Proofs) Era(ctx context.Context) (dpop.Era, error) {
	text, err := askEra.Run(ctx, p.db.client, []string{p.db.prefix + "proofs"}, next()).Text()
	if err != nil {
		return dpop.Era{}, wrap(err)
	}
	return era(text)
}

// Take implements dpop.Store.
func (p *Proofs) Take(ctx context.Context, given dpop.Era, proof string, ttl time.Duration) (bool, dpop.Era, error) {
	out, err := takeProof.Run(ctx, p.db.client, []string{p.db.prefix + "proofs", p.db.prefix + "proof:" + proof}, next(), given[:], ttl.Milliseconds()).Slice()
	if err != nil {
		return false, dpop.Era{}, wrap(err)
	}
	if len(out) != 2 {
		return false, dpop.Era{}, errors.New("redis: an answer about a proof has two parts")
	}
	text, _ := out[1].(string) // checked with its length
	now, err := era(text)
	return out[0] == int64(1) && err == nil, now, err
}
