// Package jws checks signatures of tokens in compact form (RFC 7515).
//
// Start reading at [Check]. It knows no issuer and no claim: who a key belongs to, and which
// algorithms are allowed, was decided before.
package jws

import (
	"crypto"
	"crypto/ed25519"
	"crypto/rsa"
	_ "crypto/sha256" // saltHash
	_ "crypto/sha512" // saltHash
	"encoding/base64"
	"errors"
	"strings"

	"github.com/go-jose/go-jose/v4"
)

// Check returns the payload of a token that one of the public keys signed with this algorithm. The
// caller has allowed the algorithm, and has read the header: extensions (crit) are refused there.
func Check(token, algorithm string, keys []jose.JSONWebKey) ([]byte, error) {
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return nil, errors.New("no token of three parts")
	}
	// Strictly: one signature is written in one way.
	sig, err := base64.RawURLEncoding.Strict().DecodeString(parts[2])
	if err != nil {
		return nil, err
	}
	for _, k := range keys {
		if k.Algorithm != "" && k.Algorithm != algorithm && !(isEd(k.Algorithm) && isEd(algorithm)) {
			continue // a key that says what it is for is for nothing else
		}
		hash, pss := saltHash[algorithm]
		ed, isEdKey := k.Key.(ed25519.PublicKey)
		switch pub, isRSA := k.Key.(*rsa.PublicKey); {
		case isEdKey || isEd(algorithm):
			// go-jose does not know the name of RFC 9864.
			if isEdKey && isEd(algorithm) && ed25519.Verify(ed, []byte(parts[0]+"."+parts[1]), sig) {
				return base64.RawURLEncoding.Strict().DecodeString(parts[1])
			}
		case isRSA && pss:
			// go-jose takes a salt of any length. It is as long as the hash (RFC 7518, section 3.5).
			h := hash.New()
			h.Write([]byte(parts[0] + "." + parts[1]))
			if rsa.VerifyPSS(pub, hash, h.Sum(nil), sig, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash}) == nil {
				return base64.RawURLEncoding.Strict().DecodeString(parts[1])
			}
		default:
			signed, err := jose.ParseSignedCompact(token, []jose.SignatureAlgorithm{jose.SignatureAlgorithm(algorithm)})
			if err != nil {
				return nil, err
			}
			if payload, err := signed.Verify(k.Key); err == nil {
				return payload, nil
			}
		}
	}
	return nil, errors.New("the signature is of none of these keys")
}

// saltHash is the hash of each algorithm with a salt.
var saltHash = map[string]crypto.Hash{"PS256": crypto.SHA256, "PS384": crypto.SHA384, "PS512": crypto.SHA512}

func isEd(algorithm string) bool { return algorithm == "EdDSA" || algorithm == "Ed25519" }
