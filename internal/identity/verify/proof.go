package verify

import (
	"crypto"
	"crypto/hmac"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-json-experiment/json"

	"newel.dev/newel/call"
)

// Presented is a token and what came with it. A token that is bound to a key counts only with the
// proof that its presenter has that key.
type Presented struct {
	Token       string
	Proofs      []string // DPoP headers, with the scheme DPoP (RFC 9449); nil with the scheme Bearer
	Method, URL string   // of the request, for the proof; URL without query and fragment
	Certificate string   // SHA-256 of the client's certificate, base64url (RFC 8705), or ""
}

// ProofAlgorithms are what a DPoP proof may be signed with.
var ProofAlgorithms = []string{"ES256", "ES384", "PS256", "RS256", "EdDSA"}

// Bounds of a proof.
const (
	maxProof     = 8 << 10 // bytes
	maxProofID   = 256     // bytes of jti
	proofWindow  = time.Minute
	nonceLife    = 5 * time.Minute
	maxProofSeen = 100_000 // proofs remembered of each window
)

// UseNonce is the OAuth error that asks for a proof with the nonce that comes along (RFC 9449,
// section 9).
const UseNonce = "use_dpop_nonce"

// confirmed checks that who presents a token is whom it is bound to.
func (v *Verifier) confirmed(c *claims, p *Presented, now time.Time) error {
	var bound struct {
		Thumbprint  string `json:"jkt"`
		Certificate string `json:"x5t#S256"`
	}
	is := len(c.Bound) > 0 && c.Bound.Kind() != 'n'
	if is {
		if err := json.Unmarshal(c.Bound, &bound); err != nil {
			return fmt.Errorf("cnf: %w", err)
		}
	}
	switch {
	case is && bound.Thumbprint == "" && bound.Certificate == "":
		return errors.New("it is bound in a way that is not known")
	case bound.Certificate != "" && !same(bound.Certificate, p.Certificate):
		return errors.New("it is bound to another certificate (RFC 8705, section 3)")
	case bound.Thumbprint == "" && p.Proofs != nil:
		return errors.New("it is bound to no key, and was presented with one (RFC 9449, section 7.1)")
	case bound.Thumbprint == "" && v.dpopRequired:
		return errors.New("it is bound to no key, and this server takes no others")
	case bound.Thumbprint == "":
		return nil
	case p.Proofs == nil:
		return errors.New("it is bound to a key, and was presented without a proof (RFC 9449, section 7.2)")
	}
	return v.prove(p, bound.Thumbprint, now)
}

func same(a, b string) bool { return subtle.ConstantTimeCompare([]byte(a), []byte(b)) == 1 }

// prove checks a DPoP proof (RFC 9449, section 4.3).
func (v *Verifier) prove(p *Presented, thumbprint string, now time.Time) error {
	if len(p.Proofs) != 1 || len(p.Proofs[0]) > maxProof {
		return errors.New("there must be exactly one proof, of bounded length")
	}
	algorithms := make([]jose.SignatureAlgorithm, len(ProofAlgorithms))
	for i, a := range ProofAlgorithms {
		algorithms[i] = jose.SignatureAlgorithm(a)
	}
	jws, err := jose.ParseSignedCompact(p.Proofs[0], algorithms)
	if err != nil {
		return fmt.Errorf("the proof: %w", err)
	}
	head := jws.Signatures[0].Protected
	key := head.JSONWebKey
	if typ, _ := head.ExtraHeaders[jose.HeaderType].(string); typ != "dpop+jwt" || key == nil || !key.IsPublic() || !key.Valid() {
		return errors.New("the proof is not of type dpop+jwt with a public key in it")
	}
	if k, ok := key.Key.(*rsa.PublicKey); ok && k.N.BitLen() < 2048 {
		return errors.New("the proof's RSA key is too small")
	}
	if head.ExtraHeaders["crit"] != nil {
		return errors.New("the proof uses extensions")
	}
	payload, err := check(p.Proofs[0], strings.Split(p.Proofs[0], "."), head.Algorithm, []jose.JSONWebKey{*key})
	if err != nil {
		return fmt.Errorf("the proof: %w", err)
	}
	print, err := key.Thumbprint(crypto.SHA256)
	if err != nil {
		return fmt.Errorf("the proof's key: %w", err)
	}
	if !same(base64.RawURLEncoding.EncodeToString(print), thumbprint) {
		return errors.New("the proof is of another key than the token is bound to")
	}
	var said struct {
		ID     string   `json:"jti"`
		Method string   `json:"htm"`
		URL    string   `json:"htu"`
		Issued *float64 `json:"iat"`
		Token  string   `json:"ath"`
		Nonce  string   `json:"nonce"`
	}
	if err := json.Unmarshal(payload, &said); err != nil {
		return fmt.Errorf("the proof: %w", err)
	}
	hash := sha256.Sum256([]byte(p.Token))
	issued := at(said.Issued)
	switch {
	case said.ID == "" || len(said.ID) > maxProofID:
		return errors.New("the proof has no id, or one too long")
	case said.Method != p.Method || !sameURL(said.URL, p.URL):
		return fmt.Errorf("the proof is for %.10q %.200q", said.Method, said.URL)
	case !same(said.Token, base64.RawURLEncoding.EncodeToString(hash[:])):
		return errors.New("the proof is for another token")
	case issued.IsZero() || now.Sub(issued) > proofWindow || issued.Sub(now) > proofWindow:
		return errors.New("the proof is not of now")
	case !v.nonces.fresh(said.Nonce, now):
		e := call.Errorf(call.Unauthenticated, "the proof needs the nonce that comes with this answer")
		e.OAuth = UseNonce
		return e
	}
	return v.proofs.first(thumbprint+" "+said.ID, now)
}

// sameURL compares without query and fragment, by the rules that all URLs share (RFC 3986, section
// 6.2.2 and 6.2.3).
func sameURL(a, b string) bool {
	x, errX := url.Parse(a)
	y, errY := url.Parse(b)
	if errX != nil || errY != nil || x.Host == "" {
		return false
	}
	norm := func(u *url.URL) string {
		scheme, host := strings.ToLower(u.Scheme), strings.ToLower(u.Host)
		host = strings.TrimSuffix(host, map[string]string{"https": ":443", "http": ":80"}[scheme])
		path := u.EscapedPath()
		if path == "" {
			path = "/"
		}
		return scheme + "://" + host + path
	}
	return norm(x) == norm(y)
}

// nonces are values that a proof has to hold to be of now (RFC 9449, section 9). They say when they
// were made, sealed with a key, so that nothing is kept and every node that has the key takes them.
type nonces struct{ key []byte }

func (n *nonces) mint(now time.Time) string {
	b := binary.BigEndian.AppendUint64(nil, uint64(now.Unix())) //nolint:gosec // after 1970
	return base64.RawURLEncoding.EncodeToString(append(b, n.seal(b)...))
}

func (n *nonces) seal(b []byte) []byte {
	h := hmac.New(sha256.New, n.key)
	h.Write([]byte("dpop nonce"))
	h.Write(b)
	return h.Sum(nil)[:16]
}

func (n *nonces) fresh(nonce string, now time.Time) bool {
	b, err := base64.RawURLEncoding.Strict().DecodeString(nonce)
	if err != nil || len(b) != 24 || subtle.ConstantTimeCompare(b[8:], n.seal(b[:8])) != 1 {
		return false
	}
	age := now.Sub(time.Unix(int64(binary.BigEndian.Uint64(b)), 0)) //nolint:gosec // it is ours
	return age >= -proofWindow && age <= nonceLife
}

// seen remembers proofs for as long as they could be shown again, in two generations.
type seen struct {
	mu       sync.Mutex
	now, old map[string]struct{}
	turned   time.Time
}

// first fails if a proof was shown before, or if there is no room to remember it.
func (s *seen) first(id string, now time.Time) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if now.Sub(s.turned) > 2*proofWindow || s.now == nil {
		s.old, s.now, s.turned = s.now, map[string]struct{}{}, now
	}
	_, a := s.now[id]
	_, b := s.old[id]
	switch {
	case a || b:
		return errors.New("the proof was shown before")
	case len(s.now) >= maxProofSeen:
		return &unavailableError{errors.New("too many proofs at once")}
	}
	s.now[id] = struct{}{}
	return nil
}

// Nonce returns a nonce for the next proof of a client.
func (v *Verifier) Nonce() string { return v.nonces.mint(v.now()) }
