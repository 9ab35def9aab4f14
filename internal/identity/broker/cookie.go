package broker

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"net/http"
	"time"

	"github.com/go-json-experiment/json"

	"newel.dev/newel/internal/identity/issuer"
)

// login is one login under way. It lives in a cookie, so that nothing is kept here for browsers that
// never come back, and so that no other browser can go on with it.
type login struct {
	ID       string         `json:"i"`
	State    string         `json:"s"`          // at the provider; then the token of the page
	Nonce    string         `json:"n,omitzero"` // of the ID token
	Verifier string         `json:"v,omitzero"` // PKCE, at the provider
	Ask      *issuer.Ask    `json:"a"`
	Person   *issuer.Person `json:"p,omitzero"` // who logged in; nil before
	Name     string         `json:"m,omitzero"` // of the person, for themselves
	Expires  time.Time      `json:"e"`
}

func newLogin(a *issuer.Ask, expires time.Time) *login {
	return &login{ID: rand.Text(), State: rand.Text(), Nonce: rand.Text(), Verifier: rand.Text() + rand.Text(), Ask: a, Expires: expires}
}

// agreed makes a login one whose person is known, and is to be asked.
func (l *login) agreed(p *issuer.Person, name string, expires time.Time) {
	l.State, l.Nonce, l.Verifier, l.Person, l.Name, l.Expires = rand.Text(), "", "", p, name, expires
}

// maxCookie is what every browser takes, with some room for name and attributes (RFC 6265, section
// 6.1, says 4096 bytes).
const maxCookie = 3900

// cookie seals logins.
type cookie struct {
	name   string
	secure bool
	aead   cipher.AEAD
}

func newCookie(secure bool, key []byte) (*cookie, error) {
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	aead, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		return nil, err
	}
	c := &cookie{name: "newel-login", secure: secure, aead: aead}
	if secure {
		c.name = "__Host-newel-login" // browsers take it from this host over TLS only
	}
	return c, nil
}

func (c *cookie) set(w http.ResponseWriter, l *login) error {
	raw, err := json.Marshal(l)
	if err != nil {
		return err
	}
	value := base64.RawURLEncoding.EncodeToString(c.aead.Seal(nil, nil, raw, []byte(c.name)))
	if len(value) > maxCookie {
		return errors.New("the request is too long: state and redirect_uri must be shorter")
	}
	c.write(w, value, int(loginLife.Seconds()))
	return nil
}

func (c *cookie) clear(w http.ResponseWriter) { c.write(w, "", -1) }

// write sets the cookie. Lax: the browser comes back from the provider by a link.
func (c *cookie) write(w http.ResponseWriter, value string, age int) {
	w.Header().Del("Set-Cookie")
	http.SetCookie(w, &http.Cookie{Name: c.name, Value: value, Path: "/", MaxAge: age, Secure: c.secure, HttpOnly: true, SameSite: http.SameSiteLaxMode}) //nolint:gosec // not secure on loopback only
}

// get returns the login of a browser, or nil.
func (c *cookie) get(r *http.Request) *login {
	all := r.CookiesNamed(c.name)
	if len(all) != 1 || len(all[0].Value) > maxCookie {
		return nil
	}
	sealed, err := base64.RawURLEncoding.Strict().DecodeString(all[0].Value)
	if err != nil {
		return nil
	}
	raw, err := c.aead.Open(nil, nil, sealed, []byte(c.name))
	if err != nil {
		return nil
	}
	l := &login{}
	if json.Unmarshal(raw, l) != nil || l.Ask == nil {
		return nil
	}
	return l
}
