package effect

import (
	"encoding/hex"
	"unicode/utf8"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/catalog"
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

// scopeOf is who, where, what and which key. It goes through a hash so that all are as long, and
// the key itself is not stored.
func scopeOf(c *call.Call, server, key string) []byte {
	tenant, principal := whoIs(c)
	return catalog.Digest("newel scope 1", tenant, principal, server, c.Target.Name, key)
}

func whoIs(c *call.Call) (tenant, principal string) {
	if c.Principal == nil {
		return "", ""
	}
	return c.Principal.Tenant, c.Principal.ID
}

// fingerprintOf is what is asked for: capability, pin and arguments.
func fingerprintOf(c *call.Call, pin []byte) ([]byte, error) {
	args, err := catalog.Canonical(c.Args)
	if err != nil {
		return nil, err
	}
	return catalog.Digest("newel fingerprint 1", c.Target.Name, string(pin), string(args)), nil
}

func hexOf(b []byte) string { return hex.EncodeToString(b) }
