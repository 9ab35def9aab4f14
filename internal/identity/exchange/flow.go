package exchange

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/go-json-experiment/json"

	"newel.dev/newel/internal/secret"
)

// A Flow is a login that has begun. It ends with Finish, once.
type Flow struct {
	URL string // for the person's browser

	c        *Client
	place    *place
	client   *credentials
	made     *registration // or nil
	key      *ecdsa.PrivateKey
	named    string // where the server said it describes itself, or ""
	redirect string
	state    string
	verifier string
	scopes   []string
}

// Redirect returns where the browser came back to when the client was registered, or "": to come
// back there again spares a registration.
func (c *Client) Redirect() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.state.Client == nil {
		return ""
	}
	return c.state.Client.Redirect
}

// Begin begins a login of a person, who comes back to redirect, on loopback. What the server said
// it wants when it was asked before counts; what an earlier login asked for stays asked for.
func (c *Client) Begin(ctx context.Context, redirect string) (*Flow, error) {
	if c.o.Grant != AuthorizationCode {
		return nil, fmt.Errorf("access to %s needs no login: its grant is %s", c.o.Server, c.o.Grant)
	}
	c.mu.Lock()
	known, ch := c.state, c.last
	c.mu.Unlock()
	at := ch.metadata
	if at == "" {
		at = known.Metadata
	}
	p, err := c.discover(ctx, at)
	if err != nil {
		return nil, err
	}
	switch {
	case p.as.Authorize == "":
		return nil, fmt.Errorf("the authorization server %s logs nobody in", p.as.Issuer)
	case !slices.Contains(p.as.PKCE, "S256"):
		return nil, fmt.Errorf("the authorization server %s does not support PKCE with S256", p.as.Issuer)
	}
	f := &Flow{c: c, place: p, named: at, redirect: redirect, state: rand.Text(), verifier: rand.Text() + rand.Text(), scopes: c.scopes(p, &ch, &known)}
	if p.bound(&ch) || known.Bound && known.Issuer == p.as.Issuer {
		if !p.as.proves() {
			return nil, fmt.Errorf("%s wants tokens bound to a key, which the authorization server %s does not give", c.o.Server, p.as.Issuer)
		}
		if f.key, err = known.proofKey(); err != nil {
			return nil, err
		}
	}
	if err := f.identify(ctx, &known); err != nil {
		return nil, err
	}
	sum := sha256.Sum256([]byte(f.verifier))
	q := url.Values{
		"response_type": {"code"}, "client_id": {f.client.id}, "redirect_uri": {redirect}, "state": {f.state}, "resource": {p.resource},
		"code_challenge": {base64.RawURLEncoding.EncodeToString(sum[:])}, "code_challenge_method": {"S256"},
	}
	ask := f.scopes
	if slices.Contains(p.as.Scopes, offline) && len(c.o.Scopes) == 0 {
		ask = union(ask, []string{offline}) // a refresh token: nobody wants to log in every hour
		q.Set("prompt", "consent")          // without which OpenID Connect gives none (Core, section 11)
	}
	if len(ask) > 0 {
		q.Set("scope", strings.Join(ask, " "))
	}
	to, err := url.Parse(p.as.Authorize)
	if err != nil {
		return nil, err
	}
	for k, v := range to.Query() {
		if _, ours := q[k]; !ours {
			q[k] = v
		}
	}
	to.RawQuery, to.Fragment = q.Encode(), ""
	f.URL = to.String()
	return f, nil
}

const offline = "offline_access"

// scopes selects what to ask for: what the operator says, or what the server's challenge names, or
// what its metadata lists, with what was asked for and refused before.
func (c *Client) scopes(p *place, ch *challenge, known *state) []string {
	if len(c.o.Scopes) > 0 {
		return c.o.Scopes
	}
	out := ch.scopes
	if len(out) == 0 && len(known.Wanted) == 0 {
		out = p.scopes
	}
	if known.Issuer == "" || known.Issuer == p.as.Issuer {
		out = union(known.Asked, out)
	}
	return union(out, known.Wanted)
}

// identify finds out who the client is at the authorization server: the one the operator
// registered, the one that describes itself, the one of before, or a new one.
func (f *Flow) identify(ctx context.Context, known *state) error {
	c, m := f.c, f.place.as
	old := known.Client
	switch {
	case c.o.ClientID != "":
		f.client = c.configured()
		return nil
	case c.o.Document != "" && m.Documents:
		f.client = &credentials{id: c.o.Document, key: c.o.Key, method: map[bool]string{true: "none"}[c.o.Key == nil]}
		return nil
	case old != nil && known.Issuer == m.Issuer && old.Redirect == f.redirect && (old.Until.IsZero() || time.Now().Before(old.Until)):
		f.made = old
	case m.Register == "":
		return fmt.Errorf("the authorization server %s registers no clients; configure the id of one that is registered", m.Issuer)
	default:
		var err error
		if f.made, err = c.register(ctx, m, f.redirect); err != nil {
			return fmt.Errorf("registering a client at %s: %w", m.Issuer, err)
		}
	}
	f.client = f.made.credentials()
	return nil
}

func (r *registration) credentials() *credentials {
	return &credentials{id: r.ID, secret: secret.New(r.Secret), method: r.Method}
}

// register registers a client (RFC 7591): a public one if the server takes any.
func (c *Client) register(ctx context.Context, m *metadata, redirect string) (*registration, error) {
	method := "none"
	for _, other := range []string{"client_secret_basic", "client_secret_post"} {
		if len(m.Methods) > 0 && !slices.Contains(m.Methods, method) && slices.Contains(m.Methods, other) {
			method = other
		}
	}
	body, err := json.Marshal(map[string]any{
		"client_name": "Newel", "redirect_uris": []string{redirect}, "token_endpoint_auth_method": method,
		"grant_types": []string{"authorization_code", "refresh_token"}, "response_types": []string{"code"}, "application_type": "native",
	})
	if err != nil {
		return nil, err
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, m.Register, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	r.Header.Set("Content-Type", "application/json")
	var out struct {
		ID      string `json:"client_id"`
		Secret  string `json:"client_secret"`
		Method  string `json:"token_endpoint_auth_method"`
		Expires int64  `json:"client_secret_expires_at"`
	}
	if err := c.do(r, &out); err != nil {
		return nil, err
	}
	if out.ID == "" || len(out.ID) > 2048 || len(out.Secret) > 2048 {
		return nil, errors.New("the answer holds no id that can be used")
	}
	made := &registration{ID: out.ID, Secret: out.Secret, Method: out.Method, Redirect: redirect}
	if made.Method == "" {
		made.Method = method
	}
	if out.Expires > 0 {
		made.Until = time.Unix(out.Expires, 0)
	}
	return made, nil
}

// Finish takes what the browser came back with, and keeps the token.
func (f *Flow) Finish(ctx context.Context, q url.Values) (*Token, error) {
	m := f.place.as
	switch iss := q.Get("iss"); { // before anything else of it is looked at, errors too (RFC 9207)
	case q.Has("iss") && iss != m.Issuer, !q.Has("iss") && m.SaysIss:
		return nil, fmt.Errorf("the answer is of the issuer %.200q, not %q", iss, m.Issuer)
	case q.Get("state") != f.state:
		return nil, errors.New("the answer does not belong to this login")
	case q.Get("error") != "":
		return nil, fmt.Errorf("the authorization server refused: %s %s", plain(q.Get("error"), 64), plain(q.Get("error_description"), 300))
	case q.Get("code") == "":
		return nil, errors.New("the answer holds no code")
	}
	t, err := f.c.ask(ctx, f.place, f.client, url.Values{
		"grant_type": {"authorization_code"}, "code": {q.Get("code")}, "redirect_uri": {f.redirect}, "code_verifier": {f.verifier},
	}, f.key)
	if err != nil {
		return nil, err
	}
	return t, f.c.keep(func(s *state) error {
		*s = state{Server: s.Server, Issuer: m.Issuer, ClientID: f.client.id, Client: f.made, Asked: f.scopes, Metadata: f.named}
		s.set(t)
		return s.setKey(f.key)
	})
}
