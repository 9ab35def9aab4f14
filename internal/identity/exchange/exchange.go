// Package exchange gets access tokens for an MCP server behind the gateway, or for one that a
// person talks to, and sends them along: Newel as an OAuth 2.1 client.
//
// Start reading at [Client.Transport]: it adds the token to requests, and when the server refuses
// it finds out from the refusal where access is to be had and how much (discover.go), gets a token
// without a person (grant.go) or says that a person has to log in ([Client.Begin], flow.go), and
// asks again. Tokens of logins are kept in a file for their owner alone (keep.go).
//
// It refuses metadata that is not of the resource or issuer it was asked of (RFC 9728, RFC 8414),
// authorization servers without PKCE S256, answers of another issuer (RFC 9207), and everything
// that is not https, but on loopback. A token goes to the origin of its resource and nowhere else;
// a client's credentials go to the authorization server they are of. What callers of the gateway
// present is never seen here, so it cannot be passed on.
package exchange

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync"
	"time"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/secret"
)

// Grants: how access is obtained.
const (
	AuthorizationCode = "authorization_code" // a person logs in
	ClientCredentials = "client_credentials" // the client has access of its own
	Enterprise        = "enterprise"         // an identity provider vouches, for this resource alone (ID-JAG)
	Workload          = "workload"           // the platform vouches (RFC 7523)
)

// Options configure a client. Server and HTTP are required.
type Options struct {
	Name         string // of the server as messages begin with it: the server "x" behind this
	Server       string // URL of the MCP server
	Grant        string // [AuthorizationCode]
	Issuer       string // authorization server; required with a secret. Default: what the server names
	ClientID     string // of a client that is registered there; default: Document, or one is registered
	ClientSecret secret.String
	Key          crypto.Signer                 // private key of the client (private_key_jwt)
	Document     string                        // https address of the client's metadata document, which is its id then
	Scopes       []string                      // to ask for, no others; default: those that the server asks for
	Assertion    func() (secret.String, error) // identity token of Enterprise, token of Workload; asked for every time
	Provider     Provider                      // of Enterprise
	Legacy       bool                          // a server without metadata is its own authorization server (revision 2025-03-26)
	File         string                        // where logins are kept; "" keeps them in memory
	Login        string                        // how a person logs in, for messages: newel login …
	HTTP         *http.Client                  // for metadata and tokens; follows no redirects
}

// Provider is an identity provider and what the client has there.
type Provider struct {
	Issuer       string
	ClientID     string
	ClientSecret secret.String
}

// A Client has access to one server. It is safe for concurrent use.
type Client struct {
	o    Options
	url  *url.URL
	turn chan struct{} // holds one token: who has it talks to authorization servers

	mu      sync.Mutex // guards what is below
	state   state
	written time.Time // of the file, when it was read
	looked  time.Time // when the file was looked at
	last    challenge // of the server's last refusal
	place   *place    // where the last token came from
	nonce   string    // of the server, for proofs
	failure error     // why there is no access
	until   time.Time // no sooner is it tried again
}

// lookEvery is how soon a login counts that somebody makes while another one is good.
const lookEvery = time.Second

// Pauses after a failure, so that a server that refuses does not make its authorization server busy.
const (
	pauseRefused = 30 * time.Second
	pauseAway    = 5 * time.Second
)

// New checks options and returns a client; nothing is asked for yet.
func New(o Options) (*Client, error) {
	u, err := url.Parse(o.Server)
	if err != nil {
		return nil, err
	}
	if o.Grant == "" {
		o.Grant = AuthorizationCode
	}
	c := &Client{o: o, url: u, turn: make(chan struct{}, 1)}
	document, err := url.Parse(o.Document)
	switch {
	case !c.secure(o.Server):
		return nil, fmt.Errorf("%q is not an https address, nor http on loopback: a token would be there for others to read", o.Server)
	case err != nil || o.Document != "" && (document.Scheme != "https" || document.Host == "" || strings.Trim(document.Path, "/") == ""):
		return nil, fmt.Errorf("%q is not the https address of a document", o.Document)
	case !o.ClientSecret.IsZero() && o.Issuer == "":
		return nil, errors.New("a secret is for one authorization server: write its issuer")
	case (!o.ClientSecret.IsZero() || o.Grant != AuthorizationCode) && o.ClientID == "":
		return nil, errors.New("the id of the client is missing")
	case o.Grant == ClientCredentials && o.ClientSecret.IsZero() && o.Key == nil:
		return nil, errors.New("client_credentials needs a secret or a private key")
	case (o.Grant == Enterprise || o.Grant == Workload) && (o.Assertion == nil || o.Issuer == ""):
		return nil, fmt.Errorf("%s needs an issuer, and a token that says who asks", o.Grant)
	case o.Grant == Enterprise && (!c.secure(o.Provider.Issuer) || o.Provider.ClientID == ""):
		return nil, errors.New("enterprise needs the issuer of an identity provider, and the id of the client there")
	case len(valid(o.Scopes)) != len(o.Scopes):
		return nil, errors.New("a scope must not hold spaces, quotes or backslashes")
	}
	s, written, err := read(o.File, o.Server)
	if err != nil {
		return nil, err
	}
	c.state, c.written = *s, written
	return c, nil
}

// Transport adds the token to requests to the server and sends them with next. What is refused it
// sends again, with more access, if that can be had. Where it needs a person the error is a
// [call.Error] that says so.
func (c *Client) Transport(next http.RoundTripper) http.RoundTripper { return &transport{c, next} }

type transport struct {
	c    *Client
	next http.RoundTripper
}

// RoundTrip implements http.RoundTripper.
func (t *transport) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.Body != nil && r.GetBody != nil {
		defer r.Body.Close() // each attempt has its own
	}
	if !sameOrigin(r.URL, t.c.url) {
		return nil, fmt.Errorf("%s is not of the server %s: it gets no token", r.URL.Redacted(), t.c.o.Server)
	}
	token, err := t.c.current(r.Context())
	if err != nil {
		return nil, err
	}
	var tried attempts
	for {
		resp, err := t.send(r, token)
		if err != nil || resp.StatusCode != http.StatusUnauthorized && resp.StatusCode != http.StatusForbidden {
			return resp, err
		}
		next, err := t.c.answer(r.Context(), resp, token, &tried)
		if err == nil && (next == nil || r.Body != nil && r.GetBody == nil) {
			return resp, nil
		}
		_, _ = io.CopyN(io.Discard, resp.Body, 4<<10) // so that the connection can be used again; no matter if not
		resp.Body.Close()
		if err != nil {
			return nil, err
		}
		token = next
	}
}

// attempts are what was tried for one request: each thing once.
type attempts struct{ nonce, token, scopes bool }

func (t *transport) send(r *http.Request, token *Token) (*http.Response, error) {
	r = r.WithContext(r.Context()) // a transport must not change what it was given
	r.Header = maps.Clone(r.Header)
	if r.Header == nil {
		r.Header = http.Header{}
	}
	r.Header.Del("Authorization") // there is one way to get in
	if r.GetBody != nil {
		body, err := r.GetBody()
		if err != nil {
			return nil, err
		}
		r.Body = body
	}
	if token != nil {
		if err := t.c.authorize(r, token); err != nil {
			return nil, err
		}
	}
	resp, err := t.next.RoundTrip(r)
	if err == nil && token != nil && token.Bound {
		if nonce := nonceOf(resp.Header); nonce != "" {
			t.c.mu.Lock()
			t.c.nonce = nonce
			t.c.mu.Unlock()
		}
	}
	return resp, err
}

// authorize adds a token to a request, with a proof if it is bound to a key (RFC 9449, section 7).
func (c *Client) authorize(r *http.Request, token *Token) error {
	if !token.Bound {
		r.Header["Authorization"] = []string{"Bearer " + token.Access.Reveal()}
		return nil
	}
	c.mu.Lock()
	key, nonce := c.state.key, c.nonce
	c.mu.Unlock()
	if key == nil {
		return c.noAccess(errors.New("the key that the token is bound to is lost; log in again"))
	}
	p, err := proof(key, r.Method, r.URL, token.Access.Reveal(), nonce)
	if err != nil {
		return err
	}
	r.Header["Authorization"] = []string{"DPoP " + token.Access.Reveal()}
	r.Header["Dpop"] = []string{p}
	return nil
}

// Token returns the token of a login, renewed if it has expired; nil: there is none.
func (c *Client) Token(ctx context.Context) (*Token, error) { return c.current(ctx) }

// Forget makes the next request go without a token, so that the server says what it wants. What is
// in the file stays.
func (c *Client) Forget() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.state.set(nil)
}

// current returns the token to send, or nil to see what the server says.
func (c *Client) current(ctx context.Context) (*Token, error) {
	now := time.Now()
	c.mu.Lock()
	var err error
	if now.Sub(c.looked) >= lookEvery {
		c.looked = now
		err = c.reread()
	}
	t, found := c.state.token(), c.place != nil
	c.mu.Unlock()
	switch {
	case err != nil:
		return nil, err
	case t != nil && t.fresh(now):
		return t, nil
	case t == nil && c.o.Grant == AuthorizationCode:
		return c.newer("")
	case t == nil && !found:
		return nil, nil // where access is to be had is not known yet
	}
	return c.obtain(ctx, nil, t)
}

// answer decides what to do about a refusal: send the token that it returns, or hand the refusal
// on if there is none.
func (c *Client) answer(ctx context.Context, resp *http.Response, used *Token, tried *attempts) (*Token, error) {
	ch := challengeOf(resp.Header)
	c.mu.Lock()
	c.last = ch
	c.mu.Unlock()
	switch {
	case resp.StatusCode == http.StatusUnauthorized && ch.problem == "use_dpop_nonce" && used != nil && used.Bound && !tried.nonce && nonceOf(resp.Header) != "":
		tried.nonce = true
		return used, nil // send has taken the nonce
	case resp.StatusCode == http.StatusUnauthorized && !tried.token:
		tried.token = true
		return c.obtain(ctx, &ch, used)
	case resp.StatusCode == http.StatusForbidden && ch.problem == "insufficient_scope" && !tried.scopes:
		tried.scopes = true
		return c.stepUp(ctx, &ch, used)
	}
	return nil, nil
}

// take waits for the turn to talk to authorization servers. What is begun then is ended, also when
// the caller goes away: a refresh token works once.
func (c *Client) take(ctx context.Context) (_ context.Context, done func(), err error) {
	select {
	case c.turn <- struct{}{}:
	case <-ctx.Done():
		return nil, nil, ctx.Err()
	}
	ctx, stop := context.WithTimeout(context.WithoutCancel(ctx), turnTimeout)
	return ctx, func() { stop(); <-c.turn }, nil
}

const turnTimeout = 30 * time.Second

// obtain gets a token in place of one that was refused (ch says how) or has expired (ch is nil).
func (c *Client) obtain(ctx context.Context, ch *challenge, used *Token) (*Token, error) {
	ctx, done, err := c.take(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	if t, err := c.newer(access(used)); t != nil || err != nil {
		return t, err // somebody was faster
	}
	c.mu.Lock()
	failure, until, known, p := c.failure, c.until, c.state, c.place
	c.mu.Unlock()
	if failure != nil && time.Now().Before(until) {
		return nil, failure
	}
	refused := ch != nil && used != nil && time.Since(used.Since) < pauseRefused // another one would fare no better
	switch {
	case c.o.Grant == AuthorizationCode && (known.Refresh == "" || refused):
		return nil, c.needsLogin(nil)
	case refused:
		return nil, c.failed(fmt.Errorf("%s refuses the token that %s has just given", c.o.Server, known.Issuer), pauseRefused)
	}
	if ch == nil {
		ch = &challenge{}
	} else {
		p = nil // the server may have moved to another authorization server
	}
	if p == nil {
		named := ch.metadata
		if named == "" && c.o.Grant == AuthorizationCode {
			named = known.Metadata
		}
		if p, err = c.discover(ctx, named); err != nil {
			return nil, c.failedBy(err)
		}
	}
	if c.o.Grant == AuthorizationCode {
		return c.renew(ctx, p, &known)
	}
	return c.grant(ctx, p, ch, &known)
}

func access(t *Token) string {
	if t == nil {
		return ""
	}
	return t.Access.Reveal()
}

// grant gets a token without a person and keeps it in memory.
func (c *Client) grant(ctx context.Context, p *place, ch *challenge, known *state) (*Token, error) {
	next := *known
	if next.Issuer != p.as.Issuer {
		next = state{Server: known.Server, Issuer: p.as.Issuer}
	}
	scopes := c.scopes(p, ch, &next)
	var key *ecdsa.PrivateKey
	if p.bound(ch) || known.Bound {
		if !p.as.proves() {
			return nil, c.failed(fmt.Errorf("%s wants tokens bound to a key, which the authorization server %s does not give", c.o.Server, p.as.Issuer), pauseRefused)
		}
		var err error
		if key, err = next.proofKey(); err != nil {
			return nil, err
		}
	}
	t, err := c.machine(ctx, p, scopes, key)
	if err != nil {
		return nil, c.failedBy(err)
	}
	next.Asked, next.Wanted = scopes, nil
	next.set(t)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.state, c.place, c.failure = next, p, nil
	return t, nil
}

// renew gets a token with the refresh token of a login (OAuth 2.1, section 4.3).
func (c *Client) renew(ctx context.Context, p *place, known *state) (*Token, error) {
	if p.as.Issuer != known.Issuer {
		return nil, c.needsLogin(fmt.Errorf("%s has another authorization server now, %s", c.o.Server, p.as.Issuer))
	}
	k := &credentials{id: known.ClientID, method: "none", key: c.o.Key}
	switch {
	case known.Client != nil:
		k = known.Client.credentials()
	case known.ClientID == c.o.ClientID:
		k = c.configured()
	case c.o.Key != nil:
		k.method = ""
	}
	var key *ecdsa.PrivateKey
	if known.Bound {
		key = known.key
	}
	t, err := c.ask(ctx, p, k, url.Values{"grant_type": {"refresh_token"}, "refresh_token": {known.Refresh}}, key)
	var said *statusError
	switch {
	case errors.As(err, &said) && said.status < 500:
		forgotten := c.keep(func(s *state) error {
			if s.Refresh == known.Refresh {
				s.set(nil) // a refresh token works once: asking again may end more than this login
			}
			return nil
		})
		return nil, c.needsLogin(errors.Join(err, forgotten))
	case err != nil:
		return nil, c.failedBy(err)
	}
	if t.Refresh.IsZero() {
		t.Refresh = secret.New(known.Refresh)
	}
	if t.Scope == "" {
		t.Scope = known.Scope
	}
	return t, c.keep(func(s *state) error {
		if s.Refresh == known.Refresh {
			s.set(t)
		} // else somebody has logged in meanwhile: that counts
		return nil
	})
}

// stepUp gets a token for more than the one that was not enough (MCP, scope challenge handling).
func (c *Client) stepUp(ctx context.Context, ch *challenge, used *Token) (*Token, error) {
	if used == nil || len(ch.scopes) == 0 {
		return nil, nil
	}
	ctx, done, err := c.take(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	if t, err := c.newer(access(used)); t != nil || err != nil {
		return t, err
	}
	c.mu.Lock()
	known, p := c.state, c.place
	c.mu.Unlock()
	wants := strings.Join(ch.scopes, " ")
	switch {
	case len(c.o.Scopes) > 0 && !within(ch.scopes, c.o.Scopes):
		return nil, c.refusal("needs the scopes %s, and its configuration here does not ask for them", wants)
	case len(union(known.Asked, ch.scopes)) == len(known.Asked): // nothing new, or too much already
		return nil, c.refusal("needs the scopes %s, which its authorization server was asked for and did not give", wants)
	case c.o.Grant != AuthorizationCode && p != nil:
		return c.grant(ctx, p, ch, &known)
	}
	if !within(ch.scopes, known.Wanted) {
		if err := c.keep(func(s *state) error {
			s.Wanted = union(s.Wanted, ch.scopes)
			return nil
		}); err != nil {
			return nil, err
		}
	}
	return nil, c.refusal("needs the scopes %s, which its login does not have: %s", wants, c.o.Login)
}

// newer returns a token that is not the one given, if there is one: of another request, or of a
// login that somebody made meanwhile.
func (c *Client) newer(than string) (*Token, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if t := c.state.token(); t != nil && c.state.Access != than && t.fresh(time.Now()) {
		return t, nil
	}
	if err := c.reread(); err != nil {
		return nil, err
	}
	if t := c.state.token(); t != nil && c.state.Access != than && t.fresh(time.Now()) {
		return t, nil
	}
	return nil, nil
}

// reread takes over what another process wrote to the file. It is called with the lock held.
func (c *Client) reread() error {
	if c.o.File == "" {
		return nil
	}
	info, err := os.Stat(c.o.File)
	if err != nil || info.ModTime().Equal(c.written) {
		return nil // none, or the one that is known
	}
	s, written, err := read(c.o.File, c.o.Server)
	if err != nil {
		return c.noAccess(err)
	}
	c.state, c.written, c.failure = *s, written, nil
	return nil
}

// keep changes the state, and the file if there is one: what another process wrote there is taken
// over first. What cannot be written counts until this process ends.
func (c *Client) keep(change func(*state) error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.reread(); err != nil {
		return err
	}
	next := c.state
	if err := change(&next); err != nil {
		return err
	}
	c.state, c.failure = next, nil
	if c.o.File == "" {
		return nil
	}
	written, err := next.write(c.o.File)
	if err != nil {
		return c.noAccess(fmt.Errorf("the login cannot be kept: %w", err))
	}
	c.written = written
	return nil
}

// needsLogin says that a person has to log in.
func (c *Client) needsLogin(because error) error {
	e := call.Errorf(call.Unavailable, "%s needs a login: %s", c.o.Name, c.o.Login)
	e.Retryable = false
	return e.Because(because)
}

func (c *Client) refusal(format string, args ...any) error {
	e := call.Errorf(call.Unavailable, "%s "+format, append([]any{c.o.Name}, args...)...)
	e.Retryable = false
	return e
}

// failedBy remembers a failure, longer if somebody said no.
func (c *Client) failedBy(err error) error {
	var said *statusError
	if errors.As(err, &said) && said.status < 500 {
		return c.failed(err, pauseRefused)
	}
	return c.failed(err, pauseAway)
}

// noAccess says so; the cause is for the log.
func (c *Client) noAccess(cause error) *call.Error {
	return call.Errorf(call.Unavailable, "%s gives no access", c.o.Name).Because(cause)
}

// failed says that there is no access and remembers it for a while.
func (c *Client) failed(cause error, pause time.Duration) error {
	e := c.noAccess(cause)
	e.RetryAfter = pause
	c.mu.Lock()
	defer c.mu.Unlock()
	c.failure, c.until = e, time.Now().Add(pause)
	return e
}
