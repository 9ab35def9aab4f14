// Package devserver is an OAuth 2.1 authorization server for development, in memory: a newcomer
// has the real flow, with login and consent, and no other program.
//
// Start reading at [Server.Handler], which names every endpoint. It does authorization code with
// PKCE (S256 only), resource indicators (RFC 8707), dynamic client registration (RFC 7591),
// client id metadata documents, metadata (RFC 8414), the iss parameter (RFC 9207), short-lived access tokens (RFC 9068) and
// rotating refresh tokens whose reuse ends the whole family. Anybody who can reach it can log in as
// anybody: it must only be served on loopback, and never in production.
//
// It refuses redirects that a client did not register, plain PKCE, codes that were used, and asks
// that do not fit together. It forgets everything when it ends, its keys included.
package devserver

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"fmt"
	"html/template"
	"io"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-json-experiment/json"

	"newel.dev/newel/internal/egress"
)

// A User is somebody who can log in.
type User struct {
	Name   string
	Tenant string
	Scopes []string // that may be granted to clients; "*" stands for all
	Roles  []string
}

// Options configure a Server. Issuer and Users are required.
type Options struct {
	Issuer    string   // address under which it is reached
	Resources []string // that tokens may be for
	Scopes    []string // that exist
	Users     []User
	Fetch     *http.Client     // for client id metadata documents; default: public addresses only
	Now       func() time.Time // default: time.Now
}

// How long things last, and how many there may be.
const (
	codeLife    = time.Minute
	tokenLife   = 5 * time.Minute
	refreshLife = 24 * time.Hour
	maxClients  = 1000
	maxGrants   = 10_000
	maxBody     = 64 << 10
)

// A Server is an authorization server. It is safe for concurrent use.
type Server struct {
	o      Options
	key    jose.JSONWebKey
	signer jose.Signer

	mu      sync.Mutex // guards what is below
	clients map[string]*client
	cards   map[string]card // client id metadata documents, by address
	codes   map[string]*grant
	refresh map[string]*grant
}

type client struct {
	name      string
	redirects []string
}

// card is a client that is described by the document at its id.
type card struct {
	client  *client
	expires time.Time
}

// grant is what a user allowed a client.
type grant struct {
	client, redirect, challenge, resource string
	user                                  *User
	scopes                                []string
	expires                               time.Time
	used                                  bool
	family                                *family
}

// family is all tokens that come of one login.
type family struct{ revoked bool }

// New returns a server with keys of its own.
func New(o Options) (*Server, error) {
	if o.Issuer == "" || len(o.Users) == 0 {
		return nil, errors.New("devserver: Issuer and Users are required")
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Fetch == nil {
		o.Fetch = egress.Client(egress.Options{Timeout: 5 * time.Second})
	}
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	key := jose.JSONWebKey{Key: private, KeyID: rand.Text(), Algorithm: string(jose.ES256), Use: "sig"}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: key}, (&jose.SignerOptions{}).WithType("at+jwt"))
	if err != nil {
		return nil, err
	}
	return &Server{o: o, key: key, signer: signer, clients: map[string]*client{}, cards: map[string]card{}, codes: map[string]*grant{}, refresh: map[string]*grant{}}, nil
}

// Handler serves everything below the issuer.
func (s *Server) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /.well-known/oauth-authorization-server", s.metadata)
	mux.HandleFunc("GET /.well-known/openid-configuration", s.metadata)
	mux.HandleFunc("GET /oauth/jwks", s.keys)
	mux.HandleFunc("POST /oauth/register", s.register)
	mux.HandleFunc("GET /oauth/authorize", s.authorize)
	mux.HandleFunc("POST /oauth/authorize", s.login)
	mux.HandleFunc("POST /oauth/token", s.token)
	bounded := http.MaxBytesHandler(mux, maxBody)
	own := hostOf(s.o.Issuer)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Host != own { // a name that somebody else made point here (DNS rebinding)
			http.Error(w, "this server is reached as "+own+" only", http.StatusForbidden)
			return
		}
		bounded.ServeHTTP(w, r)
	})
}

func reply(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("Access-Control-Allow-Origin", "*") // clients in browsers; nothing here rests on cookies
	w.WriteHeader(status)
	if err := json.MarshalWrite(w, v, json.Deterministic(true)); err != nil {
		return // the client is gone
	}
}

// refuse answers as RFC 6749, section 5.2 says.
func refuse(w http.ResponseWriter, code, why string) {
	reply(w, http.StatusBadRequest, map[string]string{"error": code, "error_description": why})
}

func (s *Server) metadata(w http.ResponseWriter, _ *http.Request) {
	reply(w, http.StatusOK, map[string]any{
		"issuer": s.o.Issuer, "authorization_endpoint": s.o.Issuer + "/oauth/authorize", "token_endpoint": s.o.Issuer + "/oauth/token",
		"registration_endpoint": s.o.Issuer + "/oauth/register", "jwks_uri": s.o.Issuer + "/oauth/jwks",
		"response_types_supported": []string{"code"}, "grant_types_supported": []string{"authorization_code", "refresh_token"},
		"code_challenge_methods_supported": []string{"S256"}, "token_endpoint_auth_methods_supported": []string{"none"},
		"client_id_metadata_document_supported": true,
		"scopes_supported":                      s.o.Scopes, "authorization_response_iss_parameter_supported": true,
		"subject_types_supported": []string{"public"}, "id_token_signing_alg_values_supported": []string{"ES256"},
	})
}

func (s *Server) keys(w http.ResponseWriter, _ *http.Request) {
	reply(w, http.StatusOK, map[string]any{"keys": []any{rawKey{s.key.Public()}}})
}

// rawKey encodes a key by the rules of its own package.
type rawKey struct{ k jose.JSONWebKey }

// MarshalJSON implements json.Marshaler.
func (r rawKey) MarshalJSON() ([]byte, error) { return r.k.MarshalJSON() }

// register registers a public client (RFC 7591). The scope it names is no ceiling: clients put
// there what they happened to be challenged for.
func (s *Server) register(w http.ResponseWriter, r *http.Request) {
	var in struct {
		Name      string   `json:"client_name"`
		Redirects []string `json:"redirect_uris"`
	}
	if err := json.UnmarshalRead(r.Body, &in); err != nil {
		refuse(w, "invalid_client_metadata", "the body is not a JSON object of client metadata")
		return
	}
	if len(in.Redirects) == 0 || len(in.Redirects) > 10 || slices.ContainsFunc(in.Redirects, func(u string) bool { return !validRedirect(u) }) {
		refuse(w, "invalid_redirect_uri", "redirect_uris must be one to ten addresses: https, http on loopback, or a scheme of the app's own; without fragment")
		return
	}
	id := "dev-" + rand.Text()
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.clients) >= maxClients {
		for old := range s.clients { // any: this is for development
			delete(s.clients, old)
			break
		}
	}
	s.clients[id] = &client{name: in.Name, redirects: in.Redirects}
	reply(w, http.StatusCreated, map[string]any{
		"client_id": id, "client_name": in.Name, "redirect_uris": in.Redirects, "token_endpoint_auth_method": "none",
		"grant_types": []string{"authorization_code", "refresh_token"}, "response_types": []string{"code"}, "client_id_issued_at": s.o.Now().Unix(),
	})
}

func validRedirect(address string) bool {
	u, err := url.Parse(address)
	if err != nil || u.Fragment != "" || u.Scheme == "" {
		return false
	}
	switch u.Scheme {
	case "https":
		return u.Host != ""
	case "http":
		return loopback(u.Hostname())
	case "javascript", "data", "file", "vbscript", "blob", "about":
		return false
	}
	return true
}

func loopback(host string) bool {
	ip, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && ip.IsLoopback()
}

// sameRedirect compares exactly, but for the port of loopback addresses (RFC 8252, section 7.3).
func sameRedirect(registered, given string) bool {
	if registered == given {
		return true
	}
	a, errA := url.Parse(registered)
	b, errB := url.Parse(given)
	return errA == nil && errB == nil && a.Scheme == "http" && b.Scheme == "http" && a.Hostname() == b.Hostname() && loopback(a.Hostname()) &&
		a.Path == b.Path && a.RawQuery == b.RawQuery && b.Fragment == "" && b.User == nil
}

// cardLife is how long a client id metadata document holds.
const cardLife = 5 * time.Minute

// clientOf returns a client that registered, or the one that the document at its id describes
// (client id metadata documents: the id is an https address with a path).
func (s *Server) clientOf(ctx context.Context, id string) (*client, error) {
	s.mu.Lock()
	c, known := s.clients[id], s.cards[id]
	s.mu.Unlock()
	switch {
	case c != nil:
		return c, nil
	case known.client != nil && s.o.Now().Before(known.expires):
		return known.client, nil
	case !strings.HasPrefix(id, "https://"):
		return nil, errors.New("the client is not known; it has to register again, for this server forgets when it ends")
	}
	u, err := url.Parse(id)
	if err != nil || u.User != nil || u.Fragment != "" || u.Path == "" || u.Path == "/" || strings.Contains(u.Path, "/.") {
		return nil, errors.New("the client id is an address, but none of a client id metadata document")
	}
	if c, err = s.fetch(ctx, id); err != nil {
		return nil, fmt.Errorf("the client is described at its id, and that could not be read: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.cards) >= maxClients {
		clear(s.cards)
	}
	s.cards[id] = card{c, s.o.Now().Add(cardLife)}
	return c, nil
}

// fetch reads a client id metadata document.
func (s *Server) fetch(ctx context.Context, id string) (*client, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, id, nil)
	if err != nil {
		return nil, err
	}
	r.Header.Set("Accept", "application/json")
	resp, err := s.o.Fetch.Do(r)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("status %d", resp.StatusCode)
	}
	raw, err := io.ReadAll(io.LimitReader(resp.Body, maxBody+1))
	if err != nil || len(raw) > maxBody {
		return nil, errors.Join(errors.New("the document is too long"), err)
	}
	var doc struct {
		ID        string   `json:"client_id"`
		Name      string   `json:"client_name"`
		Redirects []string `json:"redirect_uris"`
	}
	switch err := json.Unmarshal(raw, &doc); {
	case err != nil:
		return nil, err
	case doc.ID != id:
		return nil, fmt.Errorf("the document is of the client %q", doc.ID)
	case doc.Name == "" || len(doc.Redirects) == 0 || len(doc.Redirects) > 10 || slices.ContainsFunc(doc.Redirects, func(u string) bool { return !validRedirect(u) }):
		return nil, errors.New("the document lacks a name or valid redirect_uris")
	}
	return &client{name: doc.Name + " (" + hostOf(id) + ")", redirects: doc.Redirects}, nil
}

// ask is an authorization request that fits together.
type ask struct {
	ClientID, ClientName, Redirect, State, Challenge, Resource string
	Scopes                                                     []string
}

// read checks an authorization request. Before the redirect is known to be the client's, errors
// stay here: err. After that they go there: refusal.
func (s *Server) read(ctx context.Context, q url.Values) (a *ask, refusal string, err error) {
	c, err := s.clientOf(ctx, q.Get("client_id"))
	if err != nil {
		return nil, "", err
	}
	redirect := q.Get("redirect_uri")
	if redirect == "" && len(c.redirects) == 1 {
		redirect = c.redirects[0]
	}
	if !slices.ContainsFunc(c.redirects, func(r string) bool { return sameRedirect(r, redirect) }) {
		return nil, "", errors.New("the redirect_uri is none that the client registered")
	}
	a = &ask{ClientID: q.Get("client_id"), ClientName: c.name, Redirect: redirect, State: q.Get("state"), Challenge: q.Get("code_challenge"), Resource: q.Get("resource")}
	if a.ClientName == "" {
		a.ClientName = a.ClientID
	}
	switch {
	case q.Get("response_type") != "code":
		return a, "unsupported_response_type", nil
	case len(a.Challenge) != 43 || q.Get("code_challenge_method") != "S256":
		return a, "invalid_request", nil // PKCE with S256 is not optional
	case len(q["resource"]) > 1 || a.Resource != "" && !slices.Contains(s.o.Resources, strings.TrimSuffix(a.Resource, "/")):
		return a, "invalid_target", nil
	}
	if a.Resource = strings.TrimSuffix(a.Resource, "/"); a.Resource == "" && len(s.o.Resources) > 0 {
		a.Resource = s.o.Resources[0]
	}
	for _, scope := range strings.Fields(q.Get("scope")) {
		if slices.Contains(s.o.Scopes, scope) && !slices.Contains(a.Scopes, scope) { // others do not exist here
			a.Scopes = append(a.Scopes, scope)
		}
	}
	return a, "", nil
}

// back sends the browser to the client.
func (s *Server) back(w http.ResponseWriter, r *http.Request, a *ask, params url.Values) {
	u, err := url.Parse(a.Redirect)
	if err != nil { // it was checked
		http.Error(w, "the redirect_uri is not valid", http.StatusBadRequest)
		return
	}
	q := u.Query()
	for k, v := range params {
		q[k] = v
	}
	if a.State != "" {
		q.Set("state", a.State)
	}
	q.Set("iss", s.o.Issuer)
	u.RawQuery = q.Encode()
	http.Redirect(w, r, u.String(), http.StatusSeeOther)
}

func (s *Server) authorize(w http.ResponseWriter, r *http.Request) {
	a, refusal, err := s.read(r.Context(), r.URL.Query())
	switch {
	case err != nil:
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	case refusal != "":
		s.back(w, r, a, url.Values{"error": {refusal}})
		return
	}
	h := w.Header()
	h.Set("Content-Type", "text/html; charset=utf-8")
	h.Set("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'")
	h.Set("Referrer-Policy", "no-referrer")
	h.Set("Cache-Control", "no-store")
	if err := page.Execute(w, map[string]any{"Ask": a, "Users": s.o.Users, "Query": r.URL.RawQuery, "Host": hostOf(a.Redirect)}); err != nil {
		return // the browser is gone
	}
}

func hostOf(address string) string {
	u, err := url.Parse(address)
	if err != nil || u.Host == "" {
		return address
	}
	return u.Host
}

var page = template.Must(template.New("login").Parse(`<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Log in</title>
<style>body{font:16px/1.5 system-ui,sans-serif;max-width:32rem;margin:3rem auto;padding:0 1rem}button{font:inherit;padding:.4rem 1rem;margin:.2rem 0}
.note{color:#555}</style></head><body>
<h1>Log in for development</h1>
<p><strong>{{.Ask.ClientName}}</strong> (comes back to {{.Host}}) asks to use {{.Ask.Resource}}{{if .Ask.Scopes}} with:</p>
<ul>{{range .Ask.Scopes}}<li><code>{{.}}</code></li>{{end}}</ul>{{else}}.</p>{{end}}
<p>As whom?</p>
{{$query := .Query}}{{range .Users}}<form method="post" action="?{{$query}}"><input type="hidden" name="user" value="{{.Name}}"><button>{{.Name}}</button>
<span class="note">{{range .Roles}}{{.}} {{end}}</span></form>{{end}}
<form method="post" action="?{{.Query}}"><button name="deny" value="1">Deny</button></form>
<p class="note">This authorization server is built in for development: there are no passwords.</p>
</body></html>
`))

// login grants what was asked for to the user that was chosen. A page of another origin cannot
// send the form: browsers say where it comes from.
func (s *Server) login(w http.ResponseWriter, r *http.Request) {
	if site := r.Header.Get("Sec-Fetch-Site"); site != "" && site != "same-origin" && site != "none" {
		http.Error(w, "this form was not sent from its own page", http.StatusForbidden)
		return
	}
	if o := r.Header.Get("Origin"); o != "" && o != "null" && o != s.o.Issuer {
		http.Error(w, "this form was not sent from its own page", http.StatusForbidden)
		return
	}
	a, refusal, err := s.read(r.Context(), r.URL.Query())
	switch {
	case err != nil:
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	case refusal != "":
		s.back(w, r, a, url.Values{"error": {refusal}})
		return
	case r.FormValue("deny") != "":
		s.back(w, r, a, url.Values{"error": {"access_denied"}})
		return
	}
	i := slices.IndexFunc(s.o.Users, func(u User) bool { return u.Name == r.FormValue("user") })
	if i < 0 {
		http.Error(w, "there is no such user", http.StatusBadRequest)
		return
	}
	u := &s.o.Users[i]
	code := rand.Text()
	s.mu.Lock()
	s.sweep()
	s.codes[code] = &grant{
		client: a.ClientID, redirect: a.Redirect, challenge: a.Challenge, resource: a.Resource, user: u,
		scopes: granted(u, a.Scopes, s.o.Scopes), expires: s.o.Now().Add(codeLife), family: &family{},
	}
	s.mu.Unlock()
	s.back(w, r, a, url.Values{"code": {code}})
}

// granted is what of a request a user may give. Who asks for nothing gets all the user may read.
func granted(u *User, asked, exist []string) []string {
	if len(asked) == 0 {
		asked = exist
	}
	var out []string
	for _, scope := range asked {
		if slices.Contains(u.Scopes, "*") || slices.Contains(u.Scopes, scope) {
			out = append(out, scope)
		}
	}
	return out
}

// sweep drops what has expired. mu is held.
func (s *Server) sweep() {
	now := s.o.Now()
	for _, m := range []map[string]*grant{s.codes, s.refresh} {
		for k, g := range m {
			if now.After(g.expires) || len(m) > maxGrants {
				delete(m, k)
			}
		}
	}
}

func (s *Server) token(w http.ResponseWriter, r *http.Request) {
	if err := r.ParseForm(); err != nil {
		refuse(w, "invalid_request", "the body is not a form")
		return
	}
	f := r.PostForm
	var g *grant
	var why string
	s.mu.Lock()
	switch f.Get("grant_type") {
	case "authorization_code":
		g, why = s.redeem(f)
	case "refresh_token":
		g, why = s.renew(f)
	default:
		s.mu.Unlock()
		refuse(w, "unsupported_grant_type", "grant_type must be authorization_code or refresh_token")
		return
	}
	if g == nil {
		s.mu.Unlock()
		refuse(w, "invalid_grant", why)
		return
	}
	next := rand.Text() + rand.Text()
	again := *g
	again.expires, again.used = s.o.Now().Add(refreshLife), false
	s.refresh[next] = &again
	s.mu.Unlock()
	access, err := s.sign(g)
	if err != nil {
		http.Error(w, "the token could not be signed", http.StatusInternalServerError)
		return
	}
	reply(w, http.StatusOK, map[string]any{
		"access_token": access, "token_type": "Bearer", "expires_in": int(tokenLife.Seconds()), "scope": strings.Join(g.scopes, " "), "refresh_token": next,
	})
}

// redeem takes a code, once: a second time everything that came of it ends. mu is held.
func (s *Server) redeem(f url.Values) (*grant, string) {
	g := s.codes[f.Get("code")]
	sum := sha256.Sum256([]byte(f.Get("code_verifier")))
	switch {
	case g == nil || s.o.Now().After(g.expires):
		return nil, "the code is not known, or has expired"
	case g.used:
		g.family.revoked = true
		return nil, "the code was used before"
	}
	g.used = true // whatever happens now: a code is for one try
	switch {
	case f.Get("client_id") != g.client:
		return nil, "the code is another client's"
	case f.Get("redirect_uri") != g.redirect && f.Get("redirect_uri") != "":
		return nil, "the redirect_uri is not the one of the authorization request"
	case subtle.ConstantTimeCompare([]byte(base64.RawURLEncoding.EncodeToString(sum[:])), []byte(g.challenge)) != 1:
		return nil, "the code_verifier does not fit"
	case f.Get("resource") != "" && strings.TrimSuffix(f.Get("resource"), "/") != g.resource:
		return nil, "the resource is not the one of the authorization request"
	}
	return g, ""
}

// renew takes a refresh token, once: if it comes again somebody has a copy, and all of its family
// end (OAuth 2.1, section 4.3.1). mu is held.
func (s *Server) renew(f url.Values) (*grant, string) {
	g := s.refresh[f.Get("refresh_token")]
	switch {
	case g == nil || s.o.Now().After(g.expires) || g.client != f.Get("client_id"):
		return nil, "the refresh token is not known, or has expired"
	case g.used:
		g.family.revoked = true
		return nil, "the refresh token was used before; log in again"
	case g.family.revoked:
		return nil, "this login has ended; log in again"
	}
	g.used = true
	out := *g
	if asked := strings.Fields(f.Get("scope")); len(asked) > 0 { // less, never more
		out.scopes = slices.DeleteFunc(slices.Clone(g.scopes), func(have string) bool { return !slices.Contains(asked, have) })
	}
	return &out, ""
}

// sign makes an access token (RFC 9068).
func (s *Server) sign(g *grant) (string, error) {
	now := s.o.Now().Unix()
	payload, err := json.Marshal(map[string]any{
		"iss": s.o.Issuer, "sub": g.user.Name, "aud": g.resource, "exp": now + int64(tokenLife.Seconds()), "iat": now, "jti": rand.Text(),
		"client_id": g.client, "scope": strings.Join(g.scopes, " "), "roles": g.user.Roles, "tenant": tenantOf(g.user),
	})
	if err != nil {
		return "", err
	}
	jws, err := s.signer.Sign(payload)
	if err != nil {
		return "", fmt.Errorf("signing: %w", err)
	}
	return jws.CompactSerialize()
}

// tenantOf is never empty: a token names exactly one tenant.
func tenantOf(u *User) string {
	if u.Tenant == "" {
		return "default"
	}
	return u.Tenant
}
