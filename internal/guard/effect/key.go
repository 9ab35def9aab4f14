package effect

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"hash"
	"unicode/utf8"

	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
)

// MaxKey bounds an idempotency key, in bytes.
const MaxKey = 255

// checkKey refuses keys that are too long or cannot be told apart by a person.
func checkKey(key string) error {
	if len(key) > MaxKey {
		return call.Errorf(call.Malformed, "the idempotency key is longer than %d bytes", MaxKey)
	}
	if !utf8.ValidString(key) {
		return call.Errorf(call.Malformed, "the idempotency key is not valid UTF-8")
	}
	for _, c := range key {
		if c < ' ' || c == 0x7f {
			return call.Errorf(call.Malformed, "the idempotency key has control characters")
		}
	}
	return nil
}

// put adds a part to a hash so that no other parts give the same bytes.
func put(h hash.Hash, parts ...string) {
	var n [8]byte
	for _, p := range parts {
		binary.BigEndian.PutUint64(n[:], uint64(len(p)))
		h.Write(n[:])
		h.Write([]byte(p))
	}
}

// scopeOf is who, where, what and which key. It goes through a hash so that all are as long, and
// the key itself is not stored.
func scopeOf(c *call.Call, server, key string) []byte {
	h := sha256.New()
	tenant, principal := whoIs(c)
	put(h, "newel scope 1", tenant, principal, server, c.Target.Name, key)
	return h.Sum(nil)
}

func whoIs(c *call.Call) (tenant, principal string) {
	if c.Principal == nil {
		return "", ""
	}
	return c.Principal.Tenant, c.Principal.ID
}

// pinOf is what the caller could know of the tool when it called.
func pinOf(t *call.Capability) []byte {
	h := sha256.New()
	put(h, t.Name, t.Version, t.Description, string(t.Input), string(t.Output), string(t.Definition))
	return h.Sum(nil)
}

// fingerprintOf is what is asked for: capability, pin and arguments in canonical form (RFC 8785).
// Integers keep all their digits: two that differ beyond 2⁵³ are two.
func fingerprintOf(c *call.Call, pin []byte) ([]byte, error) {
	args := c.Args
	if len(args) == 0 {
		args = jsontext.Value("{}")
	}
	canonical := args.Clone()
	if err := canonical.Canonicalize(jsontext.CanonicalizeRawInts(false)); err != nil {
		return nil, call.Errorf(call.Malformed, "the arguments are not valid JSON").Because(err)
	}
	h := sha256.New()
	put(h, "newel fingerprint 1", c.Target.Name, string(pin), string(canonical))
	return h.Sum(nil), nil
}

func hexOf(b []byte) string { return hex.EncodeToString(b) }
