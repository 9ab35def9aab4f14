package exchange

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"net/http"
	"net/url"
	"slices"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-json-experiment/json"
)

const maxNonce = 512 // bytes

// nonceOf returns the nonce that a server wants to see in proofs (RFC 9449, section 8).
func nonceOf(h http.Header) string {
	if n := h.Get("DPoP-Nonce"); len(n) <= maxNonce {
		return n
	}
	return ""
}

func newProofKey() (*ecdsa.PrivateKey, error) { return ecdsa.GenerateKey(elliptic.P256(), rand.Reader) }

// proof makes a DPoP proof for one request (RFC 9449, section 4.2). access is the token it goes
// with, or "" at a token endpoint.
func proof(key *ecdsa.PrivateKey, method string, to *url.URL, access, nonce string) (string, error) {
	claims := map[string]any{
		"jti": rand.Text(), "htm": method, "iat": time.Now().Unix(),
		"htu": (&url.URL{Scheme: to.Scheme, Host: to.Host, Path: to.Path, RawPath: to.RawPath}).String(),
	}
	if access != "" {
		sum := sha256.Sum256([]byte(access))
		claims["ath"] = base64.RawURLEncoding.EncodeToString(sum[:])
	}
	if nonce != "" {
		claims["nonce"] = nonce
	}
	return sign(jose.SigningKey{Algorithm: jose.ES256, Key: key}, (&jose.SignerOptions{EmbedJWK: true}).WithType("dpop+jwt"), claims)
}

// sign returns a signed JWT.
func sign(key jose.SigningKey, o *jose.SignerOptions, claims map[string]any) (string, error) {
	s, err := jose.NewSigner(key, o)
	if err != nil {
		return "", err
	}
	body, err := json.Marshal(claims, json.Deterministic(true))
	if err != nil {
		return "", err
	}
	signed, err := s.Sign(body)
	if err != nil {
		return "", err
	}
	return signed.CompactSerialize()
}

// bound decides whether tokens have to be bound to a key. What asks for that gets no other token.
func (p *place) bound(ch *challenge) bool { return p.dpop || ch.dpop }

// proves reports whether the authorization server takes proofs of ours.
func (m *metadata) proves() bool { return slices.Contains(m.DPoP, string(jose.ES256)) }
