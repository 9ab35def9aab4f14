package issuer

import (
	"cmp"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

// How long keys live.
const (
	rotateEvery = 30 * 24 * time.Hour
	publishLead = time.Hour        // a new key is shown before it signs, so that who checks knows it by then
	keepAfter   = 2 * maxTokens    // and after it has stopped, until what it signed has expired
	lookEvery   = 10 * time.Second // in the directory: others may have turned the keys
	maxKeyFile  = 64 << 10         // bytes
	maxKeyFiles = 20
)

// Keys sign what a server issues. They are safe for concurrent use, and several processes may
// share a directory.
type Keys struct {
	dir string // "": they do not turn
	now func() time.Time

	mu     sync.Mutex // guards what is below
	all    []key      // oldest first; of files: the one that signs first
	looked time.Time
}

type key struct {
	signer  jose.Signer
	jwk     jose.JSONWebKey // public
	created time.Time
	file    string
}

// NewKeys makes keys that nobody has seen, and that end with the process.
func NewKeys() (*Keys, error) {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	k, err := newKey(private)
	if err != nil {
		return nil, err
	}
	return &Keys{now: time.Now, all: []key{k}}, nil
}

// LoadKeys reads private keys: PEM, of P-256, Ed25519, or RSA of at least 2048 bits. The first
// signs, all are shown.
func LoadKeys(files []string) (*Keys, error) {
	if len(files) == 0 || len(files) > maxKeyFiles {
		return nil, fmt.Errorf("there must be one to %d signing keys", maxKeyFiles)
	}
	ks := &Keys{now: time.Now}
	for _, file := range files {
		k, err := readKey(file)
		if err != nil {
			return nil, fmt.Errorf("the signing key %s: %w", file, err)
		}
		ks.all = append(ks.all, k)
	}
	return ks, nil
}

// OpenKeys keeps keys in a directory, which it makes if need be. It makes a new key every thirty
// days, shows it for an hour before it signs, and removes it when nothing it signed counts any more.
// now is time.Now if nil.
func OpenKeys(dir string, now func() time.Time) (*Keys, error) {
	if now == nil {
		now = time.Now
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("the directory of the signing keys: %w", err)
	}
	ks := &Keys{dir: dir, now: now}
	return ks, ks.turn()
}

func newKey(private crypto.Signer) (key, error) {
	var algorithm jose.SignatureAlgorithm
	switch k := private.(type) {
	case *ecdsa.PrivateKey:
		if algorithm = jose.ES256; k.Curve != elliptic.P256() {
			return key{}, errors.New("its curve is not P-256")
		}
	case ed25519.PrivateKey:
		algorithm = jose.EdDSA
	case *rsa.PrivateKey:
		if algorithm = jose.RS256; k.N.BitLen() < 2048 {
			return key{}, errors.New("an RSA key needs at least 2048 bits")
		}
	default:
		return key{}, errors.New("it is not of P-256, Ed25519 or RSA")
	}
	jwk := jose.JSONWebKey{Key: private, Algorithm: string(algorithm), Use: "sig"}
	print, err := jwk.Thumbprint(crypto.SHA256)
	if err != nil {
		return key{}, err
	}
	jwk.KeyID = base64.RawURLEncoding.EncodeToString(print)
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: algorithm, Key: jwk}, (&jose.SignerOptions{}).WithType("at+jwt"))
	if err != nil {
		return key{}, err
	}
	return key{signer: signer, jwk: jwk.Public()}, nil
}

// readKey reads a private key that nobody else can.
func readKey(file string) (key, error) {
	f, err := os.Open(file) //nolint:gosec // the operator names it
	if err != nil {
		return key{}, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return key{}, err
	}
	if runtime.GOOS != "windows" && info.Mode().Perm()&0o077 != 0 {
		return key{}, errors.New("others can read it; take that away with chmod 600")
	}
	raw, err := io.ReadAll(io.LimitReader(f, maxKeyFile))
	if err != nil {
		return key{}, err
	}
	block, _ := pem.Decode(raw)
	if block == nil {
		return key{}, errors.New("it is no PEM file")
	}
	var private any
	switch block.Type {
	case "PRIVATE KEY":
		private, err = x509.ParsePKCS8PrivateKey(block.Bytes)
	case "EC PRIVATE KEY":
		private, err = x509.ParseECPrivateKey(block.Bytes)
	case "RSA PRIVATE KEY":
		private, err = x509.ParsePKCS1PrivateKey(block.Bytes)
	default:
		err = fmt.Errorf("it holds a %.40q, and no private key that is not encrypted", block.Type)
	}
	if err != nil {
		return key{}, err
	}
	signer, ok := private.(crypto.Signer)
	if !ok {
		return key{}, errors.New("it cannot sign")
	}
	return newKey(signer)
}

const (
	keyPrefix = "signing-"
	keySuffix = ".pem"
)

// look reads the directory. Files with other names are nobody's business here.
func (ks *Keys) look() ([]key, error) {
	names, err := filepath.Glob(filepath.Join(ks.dir, keyPrefix+"*"+keySuffix))
	if err != nil {
		return nil, err
	}
	if len(names) > maxKeyFiles {
		return nil, fmt.Errorf("%s holds more than %d signing keys", ks.dir, maxKeyFiles)
	}
	var all []key
	for _, name := range names {
		at, _, _ := strings.Cut(strings.TrimPrefix(filepath.Base(name), keyPrefix), "-")
		seconds, err := strconv.ParseInt(at, 10, 64)
		if err != nil {
			return nil, fmt.Errorf("%s is not named like a signing key", name)
		}
		k, err := readKey(name)
		if errors.Is(err, os.ErrNotExist) {
			continue // another process has just removed it
		}
		if err != nil {
			return nil, fmt.Errorf("the signing key %s: %w", name, err)
		}
		k.created, k.file = time.Unix(seconds, 0), name
		all = append(all, k)
	}
	slices.SortFunc(all, func(a, b key) int { // by name where two processes made one in the same second
		return cmp.Or(a.created.Compare(b.created), strings.Compare(filepath.Base(a.file), filepath.Base(b.file)))
	})
	return all, nil
}

// make makes a new key in the directory.
func (ks *Keys) make(now time.Time) error {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	k, err := newKey(private)
	if err != nil {
		return err
	}
	der, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		return err
	}
	// CreateTemp makes it readable by us alone; whoever looks meanwhile sees all of it or nothing.
	f, err := os.CreateTemp(ks.dir, ".new-*")
	if err != nil {
		return err
	}
	file := filepath.Join(ks.dir, fmt.Sprintf("%s%d-%s%s", keyPrefix, now.Unix(), k.jwk.KeyID[:16], keySuffix))
	err = errors.Join(pem.Encode(f, &pem.Block{Type: "PRIVATE KEY", Bytes: der}), f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), file)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return nil
}

// turn makes a new key if it is time, and forgets those that nobody needs. What fails leaves the
// keys as they are.
func (ks *Keys) turn() error {
	ks.mu.Lock()
	defer ks.mu.Unlock()
	now := ks.now()
	if ks.dir == "" || now.Sub(ks.looked) < lookEvery && len(ks.all) > 0 {
		return nil
	}
	ks.looked = now
	all, err := ks.look()
	if err != nil {
		return err
	}
	if n := len(all); n == 0 || now.Sub(all[n-1].created) >= rotateEvery {
		if err := ks.make(now); err != nil {
			return fmt.Errorf("a new signing key: %w", err)
		}
		if all, err = ks.look(); err != nil { // others may have made one at the same time
			return err
		}
	}
	for len(all) > 1 && now.Sub(all[1].created) > publishLead+keepAfter {
		if err := os.Remove(all[0].file); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		all = all[1:]
	}
	ks.all = all
	return nil
}

// signing is the key that signs now: the newest that was shown for long enough. mu is held.
func (ks *Keys) signing() key {
	out := ks.all[0]
	if ks.dir == "" {
		return out
	}
	for _, k := range ks.all[1:] {
		if ks.now().Sub(k.created) >= publishLead {
			out = k
		}
	}
	return out
}

// sign makes an access token of a payload.
func (ks *Keys) sign(payload []byte) (string, error) {
	ks.mu.Lock()
	k := ks.signing()
	ks.mu.Unlock()
	jws, err := k.signer.Sign(payload)
	if err != nil {
		return "", fmt.Errorf("signing: %w", err)
	}
	return jws.CompactSerialize()
}

// JWKS returns the public keys, as JSON (RFC 7517).
func (ks *Keys) JWKS() ([]byte, error) {
	if err := ks.turn(); err != nil && len(ks.shown()) == 0 {
		return nil, err
	}
	var set struct {
		Keys []jsontext.Value `json:"keys"`
	}
	for _, k := range ks.shown() {
		raw, err := k.jwk.MarshalJSON() // by the rules of its own package
		if err != nil {
			return nil, err
		}
		set.Keys = append(set.Keys, raw)
	}
	return json.Marshal(set)
}

func (ks *Keys) shown() []key {
	ks.mu.Lock()
	defer ks.mu.Unlock()
	return ks.all
}
