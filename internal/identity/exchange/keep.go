package exchange

import (
	"crypto/ecdsa"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"github.com/go-json-experiment/json"

	"newel.dev/newel/internal/secret"
)

// A Token is access to one resource.
type Token struct {
	Access  secret.String
	Refresh secret.String // or none
	Scope   string        // that was granted, separated by spaces; "" if the server did not say
	Expires time.Time     // zero: nobody said
	Bound   bool          // to the key of its client (DPoP)
	Since   time.Time     // when it was issued
}

// fresh reports whether a token is good for a while yet.
func (t *Token) fresh(now time.Time) bool {
	return t.Expires.IsZero() || now.Add(30*time.Second).Before(t.Expires)
}

// registration is a client that was registered (RFC 7591) at one authorization server: it is
// nobody anywhere else.
type registration struct {
	ID       string    `json:"client_id"`
	Secret   string    `json:"client_secret,omitzero"`
	Method   string    `json:"token_endpoint_auth_method,omitzero"`
	Redirect string    `json:"redirect_uri"`
	Until    time.Time `json:"until,omitzero"` // its secret expires
}

// state is what a client knows of its access. What is in the file of an interactive login.
type state struct {
	Server   string        `json:"server"`
	Issuer   string        `json:"issuer,omitzero"` // whose token it is, and whose registration
	ClientID string        `json:"client_id,omitzero"`
	Client   *registration `json:"registration,omitzero"`
	Access   string        `json:"access_token,omitzero"`
	Refresh  string        `json:"refresh_token,omitzero"`
	Scope    string        `json:"scope,omitzero"`
	Expires  time.Time     `json:"expires,omitzero"`
	Since    time.Time     `json:"since,omitzero"`
	Bound    bool          `json:"bound,omitzero"`
	Key      []byte        `json:"key,omitzero"` // PKCS #8, of DPoP
	Asked    []string      `json:"asked,omitzero"`
	Wanted   []string      `json:"wanted,omitzero"`   // scopes that the server asked for since
	Metadata string        `json:"metadata,omitzero"` // where the server said it describes itself
	key      *ecdsa.PrivateKey
}

// token returns the token of a state, or nil.
func (s *state) token() *Token {
	if s.Access == "" {
		return nil
	}
	return &Token{Access: secret.New(s.Access), Refresh: secret.New(s.Refresh), Scope: s.Scope, Expires: s.Expires, Bound: s.Bound, Since: s.Since}
}

// set takes a token; nil forgets it.
func (s *state) set(t *Token) {
	if t == nil {
		t = &Token{}
	}
	s.Access, s.Refresh, s.Scope, s.Expires, s.Bound, s.Since = t.Access.Reveal(), t.Refresh.Reveal(), t.Scope, t.Expires, t.Bound, t.Since
}

// proofKey returns the key that tokens are bound to, made when it is first needed.
func (s *state) proofKey() (*ecdsa.PrivateKey, error) {
	if s.key != nil {
		return s.key, nil
	}
	key, err := newProofKey()
	if err != nil {
		return nil, err
	}
	return key, s.setKey(key)
}

// setKey takes the key that tokens are bound to; nil is none.
func (s *state) setKey(key *ecdsa.PrivateKey) (err error) {
	s.key, s.Key = key, nil
	if key != nil {
		s.Key, err = x509.MarshalPKCS8PrivateKey(key)
	}
	return err
}

// read returns what is in a file, and when it was written; a file that is not there is empty.
func read(file, server string) (*state, time.Time, error) {
	s := &state{Server: server}
	if file == "" {
		return s, time.Time{}, nil
	}
	info, err := os.Stat(file)
	if errors.Is(err, fs.ErrNotExist) {
		return s, time.Time{}, nil
	}
	if err != nil {
		return nil, time.Time{}, err
	}
	if info.Mode().Perm()&0o077 != 0 && runtime.GOOS != "windows" { // where permissions are another matter
		return nil, time.Time{}, fmt.Errorf("%s holds tokens and others may read it; chmod 600 it, or remove it and log in again", file)
	}
	raw, err := os.ReadFile(file)
	if err != nil {
		return nil, time.Time{}, err
	}
	if err := json.Unmarshal(raw, s); err != nil {
		return nil, time.Time{}, fmt.Errorf("%s is damaged (%w); remove it and log in again", file, err)
	}
	if s.Server != server {
		return nil, time.Time{}, fmt.Errorf("%s is of the server %.200q, not %s; remove it and log in again", file, s.Server, server)
	}
	if s.Key != nil {
		key, err := x509.ParsePKCS8PrivateKey(s.Key)
		ec, ok := key.(*ecdsa.PrivateKey)
		if err != nil || !ok {
			return nil, time.Time{}, fmt.Errorf("%s is damaged: its key is none; remove it and log in again", file)
		}
		s.key = ec
	}
	return s, info.ModTime(), nil
}

// write writes a file whole, or not at all, for its owner alone.
func (s *state) write(file string) (time.Time, error) {
	raw, err := json.Marshal(s)
	if err != nil {
		return time.Time{}, err
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		return time.Time{}, err
	}
	part, err := os.CreateTemp(filepath.Dir(file), ".login-") // made for its owner alone
	if err != nil {
		return time.Time{}, err
	}
	_, err = part.Write(raw)
	if err = errors.Join(err, part.Sync(), part.Close()); err == nil {
		err = os.Rename(part.Name(), file)
	}
	if err != nil {
		return time.Time{}, errors.Join(err, os.Remove(part.Name()))
	}
	info, err := os.Stat(file)
	if err != nil {
		return time.Time{}, err
	}
	return info.ModTime(), nil
}
