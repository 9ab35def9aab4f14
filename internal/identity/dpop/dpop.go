// Package dpop checks that who sends a request has a key: DPoP proofs (RFC 9449).
//
// Start reading at [Checker.Judge]. A proof counts for one request, of the last minute, with a
// nonce that this server handed out, and once: what was shown is remembered for as long as it could
// be shown again, in bounded room; when there is none left nothing passes. Nodes that serve one address
// remember in one place: see [Shared]. While that does not answer nothing passes either.
package dpop

import (
	"cmp"
	"context"
	"crypto"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-json-experiment/json"

	"newel.dev/newel/internal/identity/jws"
)

// Algorithms are what a proof may be signed with.
var Algorithms = []string{"ES256", "ES384", "PS256", "RS256", "EdDSA"}

// Bounds of a proof.
const (
	MaxProof  = 8 << 10 // bytes
	MaxID     = 256     // bytes of jti
	Window    = time.Minute
	NonceLife = 5 * time.Minute
	maxSeen   = 100_000 // proofs remembered of each window
	storeTime = time.Second
	storeLife = 3 * Window // two minutes, and one for clocks that differ
)

// UseNonce is the OAuth error that asks for a proof with the nonce that comes along (RFC 9449,
// sections 8 and 9).
const UseNonce = "use_dpop_nonce"

var (
	// ErrNonce is of a proof that is good but for its nonce: the client is to try again with a new one.
	ErrNonce = errors.New("the proof has no nonce of this server, or an old one")
	// ErrBusy is of a proof that cannot be remembered now.
	ErrBusy = errors.New("the proof cannot be remembered now")
)

// An Era stands for what a [Store] remembers. The zero value is none.
type Era [8]byte

// A Store remembers proofs for all nodes. It is safe for concurrent use.
type Store interface {
	// Era returns the era. It is another one as soon as the store may have forgotten a proof before its time.
	Era(ctx context.Context) (Era, error)
	// Take notes for ttl that a proof was shown, and returns whether that is the first time. It notes
	// nothing if the era, which it returns, is another one than given.
	Take(ctx context.Context, given Era, proof string, ttl time.Duration) (first bool, era Era, err error)
}

// Shared is what nodes that serve one address have in common.
type Shared struct {
	Key   []byte // seals nonces
	Store Store
}

// A Request is what a proof was sent with.
type Request struct {
	Proofs      []string // the headers DPoP
	Method, URL string   // URL without query and fragment
	Token       string   // access token that is presented with it; "" at a token endpoint
}

// A Checker checks proofs and remembers them. It is safe for concurrent use.
type Checker struct {
	name   string
	nonces nonces
	proofs seen
	store  Store // nil: proofs

	mu  sync.Mutex // guards what is below
	era Era        // of the store, as far as is known
}

// New returns a Checker. The name is that of the place at which proofs are shown: they count once at
// each. shared is nil for one node: then proofs end with the process, because its nonces do.
func New(name string, shared *Shared) *Checker {
	if shared == nil {
		return &Checker{nonces: nonces{[]byte(rand.Text())}}
	}
	return &Checker{name: name, nonces: nonces{shared.Key}, store: shared.Store}
}

// Nonce returns a nonce for the next proof of a client.
func (c *Checker) Nonce(now time.Time) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.nonces.mint(c.era, now)
}

// learn asks the store for its era, so that the next nonce is a good one.
func (c *Checker) learn(ctx context.Context) error {
	if c.store == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, storeTime)
	defer cancel()
	era, err := c.store.Era(ctx)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrBusy, err)
	}
	c.know(era)
	return nil
}

func (c *Checker) know(era Era) {
	c.mu.Lock()
	c.era = era
	c.mu.Unlock()
}

// A Proof is one that is good, but for that it may have been shown before.
type Proof struct {
	Thumbprint string // of its key (RFC 7638, SHA-256, base64url)
	id         string
	era        Era
}

// Judge checks a proof (RFC 9449, section 4.3), but not whether it was shown before: see Spend. With
// want, its key must have that thumbprint. After ErrNonce, Nonce returns one that will do; it fails
// with ErrBusy if there can be none now.
func (c *Checker) Judge(ctx context.Context, r *Request, want string, now time.Time) (*Proof, error) {
	if len(r.Proofs) != 1 || len(r.Proofs[0]) > MaxProof {
		return nil, errors.New("there must be exactly one proof, of bounded length")
	}
	payload, thumbprint, err := open(r.Proofs[0])
	if err != nil {
		return nil, err
	}
	if want != "" && !same(thumbprint, want) {
		return nil, errors.New("the proof is of another key than the token is bound to")
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
		return nil, fmt.Errorf("the proof: %w", err)
	}
	hash := sha256.Sum256([]byte(r.Token))
	switch {
	case said.ID == "" || len(said.ID) > MaxID:
		return nil, errors.New("the proof has no id, or one too long")
	case said.Method != r.Method || !sameURL(said.URL, r.URL):
		return nil, fmt.Errorf("the proof is for %.10q %.200q", said.Method, said.URL)
	case r.Token != "" && !same(said.Token, base64.RawURLEncoding.EncodeToString(hash[:])):
		return nil, errors.New("the proof is for another token")
	case said.Issued == nil || !(math.Abs(*said.Issued-float64(now.UnixMilli())/1000) <= Window.Seconds()): // NaN is none either
		return nil, errors.New("the proof is not of now")
	}
	era, ok := c.nonces.fresh(said.Nonce, now)
	if !ok || c.store != nil && era == (Era{}) { // of a node that did not know the era yet
		return nil, cmp.Or(c.learn(ctx), ErrNonce)
	}
	return &Proof{thumbprint, said.ID, era}, nil
}

var errShown = errors.New("the proof was shown before")

// Spend remembers a proof; it fails if it was shown before, with ErrNonce if the store of all nodes may
// have forgotten that, or with ErrBusy. Whoever can make us remember can fill the room for it, so the
// caller asks last: when all else that came with the proof is good.
func (c *Checker) Spend(ctx context.Context, p *Proof, now time.Time) error {
	if c.store == nil {
		return c.proofs.first(p.Thumbprint+" "+p.id, now)
	}
	ctx, cancel := context.WithTimeout(ctx, storeTime)
	defer cancel()
	sum := sha256.Sum256([]byte(c.name + " " + p.Thumbprint + " " + p.id)) // ids are as their clients like
	first, era, err := c.store.Take(ctx, p.era, base64.RawURLEncoding.EncodeToString(sum[:]), storeLife)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrBusy, err)
	}
	c.know(era)
	switch {
	case era != p.era:
		return ErrNonce
	case !first:
		return errShown
	}
	return nil
}

// open checks the signature of a proof.
func open(proof string) (payload []byte, thumbprint string, err error) {
	algorithms := make([]jose.SignatureAlgorithm, len(Algorithms))
	for i, a := range Algorithms {
		algorithms[i] = jose.SignatureAlgorithm(a)
	}
	parsed, err := jose.ParseSignedCompact(proof, algorithms)
	if err != nil {
		return nil, "", fmt.Errorf("the proof: %w", err)
	}
	head := parsed.Signatures[0].Protected
	key := head.JSONWebKey
	if typ, _ := head.ExtraHeaders[jose.HeaderType].(string); typ != "dpop+jwt" || key == nil || !key.IsPublic() || !key.Valid() {
		return nil, "", errors.New("the proof is not of type dpop+jwt with a public key in it")
	}
	if k, ok := key.Key.(*rsa.PublicKey); ok && k.N.BitLen() < 2048 {
		return nil, "", errors.New("the proof's RSA key is too small")
	}
	if head.ExtraHeaders["crit"] != nil {
		return nil, "", errors.New("the proof uses extensions")
	}
	if payload, err = jws.Check(proof, head.Algorithm, []jose.JSONWebKey{*key}); err != nil {
		return nil, "", fmt.Errorf("the proof: %w", err)
	}
	print, err := key.Thumbprint(crypto.SHA256)
	if err != nil {
		return nil, "", fmt.Errorf("the proof's key: %w", err)
	}
	return payload, base64.RawURLEncoding.EncodeToString(print), nil
}

func same(a, b string) bool { return subtle.ConstantTimeCompare([]byte(a), []byte(b)) == 1 }

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

// nonces are values that a proof has to hold to be of now (RFC 9449, section 8). They say when they
// were made, and in which era, sealed with a key, so that nothing is kept and every node that has the
// key takes them.
type nonces struct{ key []byte }

func (n *nonces) mint(era Era, now time.Time) string {
	b := binary.BigEndian.AppendUint64(nil, uint64(now.Unix())) //nolint:gosec // after 1970
	b = append(b, era[:]...)
	return base64.RawURLEncoding.EncodeToString(append(b, n.seal(b)...))
}

func (n *nonces) seal(b []byte) []byte {
	h := hmac.New(sha256.New, n.key)
	h.Write([]byte("dpop nonce"))
	h.Write(b)
	return h.Sum(nil)[:16]
}

func (n *nonces) fresh(nonce string, now time.Time) (Era, bool) {
	b, err := base64.RawURLEncoding.Strict().DecodeString(nonce)
	if err != nil || len(b) != 32 || subtle.ConstantTimeCompare(b[16:], n.seal(b[:16])) != 1 {
		return Era{}, false
	}
	age := now.Sub(time.Unix(int64(binary.BigEndian.Uint64(b)), 0)) //nolint:gosec // it is ours
	return Era(b[8:16]), age >= -Window && age <= NonceLife
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
	if now.Sub(s.turned) > 2*Window || s.now == nil {
		s.old, s.now, s.turned = s.now, map[string]struct{}{}, now
	}
	_, a := s.now[id]
	_, b := s.old[id]
	switch {
	case a || b:
		return errShown
	case len(s.now) >= maxSeen:
		return ErrBusy
	}
	s.now[id] = struct{}{}
	return nil
}
