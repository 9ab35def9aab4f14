package catalog

import (
	"crypto/sha256"
	"encoding/binary"

	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
)

// Pin is the SHA-256 of what a caller could know of a capability when it called.
func Pin(t *call.Capability) []byte {
	return Digest(t.Name, t.Version, t.Description, string(t.Input), string(t.Output), string(t.Definition))
}

// Digest is the SHA-256 of parts, so that no other parts give the same.
func Digest(parts ...string) []byte {
	h := sha256.New()
	var n [8]byte
	for _, p := range parts {
		binary.BigEndian.PutUint64(n[:], uint64(len(p)))
		h.Write(n[:])
		h.Write([]byte(p))
	}
	return h.Sum(nil)
}

// Canonical returns arguments in canonical form (RFC 8785), except that integers keep all their
// digits: two that differ beyond 2⁵³ are two. No arguments are {}.
func Canonical(args jsontext.Value) (jsontext.Value, error) {
	if len(args) == 0 {
		return jsontext.Value("{}"), nil
	}
	c := args.Clone()
	if err := c.Canonicalize(jsontext.CanonicalizeRawInts(false)); err != nil {
		return nil, call.Errorf(call.Malformed, "the arguments are not valid JSON").Because(err)
	}
	return c, nil
}
