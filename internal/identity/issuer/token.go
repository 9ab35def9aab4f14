package issuer

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/go-json-experiment/json"

	"newel.dev/newel/internal/identity/dpop"
)

const grantAssertion = "urn:ietf:params:oauth:grant-type:jwt-bearer"

// code is an authorization code. It stays until it expires, so that a second use is seen.
type code struct {
	Ask     Ask       `json:"a"`
	Person  Person    `json:"p"`
	Scopes  []string  `json:"o,omitempty"`
	Expires time.Time `json:"e"`
	Login   string    `json:"l,omitzero"` // id of what came of it; "": it was not used
}

// session is one login of one person with one client. Its refresh token is its id and a secret that
// changes with every use.
type session struct {
	Client     string    `json:"c"`
	Resource   string    `json:"t"`
	Person     Person    `json:"p"`
	Scopes     []string  `json:"o,omitempty"`
	Thumbprint string    `json:"k,omitzero"` // of the key its refresh token is bound to, or ""
	Secret     string    `json:"s"`          // digest of the one that is good now
	Expires    time.Time `json:"e"`
}

// issue is an access token to be signed, and what comes with it.
type issue struct {
	client, resource, refresh string
	person                    *Person
	scopes                    []string
}

// presenter is who asks for tokens.
type presenter struct {
	client     string
	proved     bool   // with a secret
	thumbprint string // of the key it showed a proof of, or ""
}

// digest is what is kept of a code or token.
func digest(s string) string {
	sum := sha256.Sum256([]byte(s))
	return base64.RawURLEncoding.EncodeToString(sum[:])
}

func equal(a, b string) bool { return subtle.ConstantTimeCompare([]byte(a), []byte(b)) == 1 }

// end ends a login, or keeps it from beginning.
func (s *Server) end(ctx context.Context, id string, p *Person) error {
	return s.o.Store.End(ctx, Place{logins, id, p.key()}, endedFor)
}

// begin keeps a login and returns its refresh token. Of one person the oldest ends when there are too
// many. ok is false if it was ended already.
func (s *Server) begin(ctx context.Context, id string, l *session) (refresh string, ok bool, err error) {
	secret := rand.Text()
	l.Secret = digest(secret)
	ok, err = Keep(ctx, s.o.Store, Place{logins, id, l.Person.key()}, l, l.Expires.Sub(s.o.Now()))
	return id + "." + secret, ok, err
}

// key tells people apart.
func (p *Person) key() string { return p.Tenant + "\x00" + p.Subject }

func (s *Server) token(w http.ResponseWriter, r *http.Request) {
	i, p, problem := s.answer(r)
	w.Header().Set("DPoP-Nonce", s.proofs.Nonce(s.o.Now())) // RFC 9449, section 8.2
	if problem != nil {
		status := http.StatusBadRequest
		switch problem.Code {
		case "invalid_client":
			status = http.StatusUnauthorized
			w.Header().Set("WWW-Authenticate", "Basic")
		case "temporarily_unavailable":
			status = http.StatusServiceUnavailable
			w.Header().Set("Retry-After", "1")
		}
		refuse(w, status, problem)
		return
	}
	access, err := s.sign(r, i, p.thumbprint)
	if err != nil {
		s.log(r.Context(), "a token cannot be signed", err)
		refuse(w, http.StatusInternalServerError, &Refusal{Code: "server_error"})
		return
	}
	out := map[string]any{"access_token": access, "token_type": "Bearer", "expires_in": int(s.o.TokenLife.Seconds()), "scope": strings.Join(i.scopes, " ")}
	if p.thumbprint != "" {
		out["token_type"] = "DPoP"
	}
	if i.refresh != "" {
		out["refresh_token"] = i.refresh
	}
	reply(w, http.StatusOK, out)
}

// answer judges a token request.
func (s *Server) answer(r *http.Request) (*issue, *presenter, *Refusal) {
	if err := r.ParseForm(); err != nil {
		return nil, nil, &Refusal{"invalid_request", "the body is not a form"}
	}
	f := r.PostForm
	for name, values := range f {
		if len(values) > 1 {
			return nil, nil, &Refusal{"invalid_request", shown(name) + " is there twice"}
		}
	}
	id, proved, problem := s.clients.authenticate(r, f)
	if problem != nil {
		return nil, nil, problem
	}
	p := &presenter{client: id, proved: proved}
	var proof *dpop.Proof
	if proofs := r.Header.Values("DPoP"); proofs != nil || s.o.DPoPRequired {
		var err error
		proof, err = s.proofs.Judge(r.Context(), &dpop.Request{Proofs: proofs, Method: http.MethodPost, URL: s.o.URL + "/oauth/token"}, "", s.o.Now())
		if err != nil {
			return nil, nil, s.refuseProof(r, err)
		}
		p.thumbprint = proof.Thumbprint
	}
	var i *issue
	switch grant := f.Get("grant_type"); {
	case grant == "authorization_code":
		i, problem = s.redeem(r.Context(), f, p)
	case grant == "refresh_token":
		i, problem = s.renew(r.Context(), f, p)
	case grant == grantAssertion && s.o.Assertion != nil:
		i, problem = s.accept(r, f, p)
	default:
		problem = &Refusal{"unsupported_grant_type", "grant_type must be one of those in the metadata of this server"}
	}
	if proof != nil && problem == nil { // now it is no stranger who makes us remember it
		if err := s.proofs.Spend(r.Context(), proof, s.o.Now()); err != nil {
			return nil, nil, s.refuseProof(r, err)
		}
	}
	return i, p, problem
}

// refuseProof says what is wrong with a DPoP proof, as far as its client is told.
func (s *Server) refuseProof(r *http.Request, err error) *Refusal {
	if errors.Is(err, dpop.ErrNonce) {
		return &Refusal{dpop.UseNonce, "the proof needs the nonce that comes with this answer"}
	}
	s.log(r.Context(), "a DPoP proof is refused", err)
	if errors.Is(err, dpop.ErrBusy) {
		return &Refusal{"temporarily_unavailable", "the DPoP proof cannot be remembered now; try again in a moment"}
	}
	return &Refusal{"invalid_dpop_proof", "the DPoP proof is missing or not valid"}
}

func bad(why string) *Refusal { return &Refusal{"invalid_grant", why} }

// redeem takes a code, once: a second time everything that came of it ends.
func (s *Server) redeem(ctx context.Context, f url.Values, p *presenter) (*issue, *Refusal) {
	var c code
	id := rand.Text()
	found, err := Change(ctx, s.o.Store, Place{Kind: codes, Name: digest(f.Get("code"))}, func(kept *code) time.Duration {
		c = *kept
		if c.Login != "" {
			return 0
		}
		kept.Login = id // whatever happens now: a code is for one try
		return kept.Expires.Sub(s.o.Now())
	})
	switch {
	case err != nil:
		return nil, s.away(ctx, err)
	case !found || s.o.Now().After(c.Expires):
		return nil, bad("the code is not known, or has expired")
	case c.Login != "":
		if err := s.end(ctx, c.Login, &c.Person); err != nil {
			return nil, s.away(ctx, err)
		}
		return nil, errCodeUsed
	}
	switch verifier := f.Get("code_verifier"); {
	case p.client != c.Ask.ClientID:
		return nil, bad("the code is another client's")
	case f.Has("redirect_uri") && f.Get("redirect_uri") != c.Ask.Redirect:
		return nil, bad("the redirect_uri is not the one of the authorization request")
	case len(verifier) < 43 || len(verifier) > 128 || !equal(digest(verifier), c.Ask.Challenge):
		return nil, bad("the code_verifier does not fit")
	case f.Has("resource") && canonical(f.Get("resource")) != c.Ask.Resource:
		return nil, bad("the resource is not the one of the authorization request")
	case c.Ask.Thumbprint != "" && !equal(c.Ask.Thumbprint, p.thumbprint):
		return nil, bad("the code is bound to another key")
	}
	l := &session{Client: p.client, Resource: c.Ask.Resource, Person: c.Person, Scopes: c.Scopes, Expires: s.o.Now().Add(s.o.LoginLife)}
	if !p.proved {
		l.Thumbprint = p.thumbprint // RFC 9449, section 5: of public clients refresh tokens are bound too
	}
	refresh, ok, err := s.begin(ctx, id, l)
	switch {
	case err != nil:
		return nil, s.away(ctx, err)
	case !ok: // somebody came with the code meanwhile
		return nil, errCodeUsed
	}
	return &issue{client: l.Client, resource: l.Resource, person: &l.Person, scopes: l.Scopes, refresh: refresh}, nil
}

var errCodeUsed = bad("the code was used before")

// renew takes a refresh token, once: if it comes again somebody has a copy, and the login ends
// (OAuth 2.1, section 4.3.1).
func (s *Server) renew(ctx context.Context, f url.Values, p *presenter) (*issue, *Refusal) {
	id, secret, _ := strings.Cut(f.Get("refresh_token"), ".")
	next := rand.Text()
	var l session
	var problem *Refusal
	copied := false
	found, err := Change(ctx, s.o.Store, Place{Kind: logins, Name: id}, func(kept *session) time.Duration {
		l, problem, copied = *kept, nil, false
		switch {
		case s.o.Now().After(l.Expires) || l.Client != p.client:
			problem = errNoLogin
		case !equal(l.Secret, digest(secret)):
			problem, copied = bad("the refresh token was used before; log in again"), true
		case l.Thumbprint != "" && !equal(l.Thumbprint, p.thumbprint):
			problem = bad("the refresh token is bound to another key")
		case f.Has("resource") && canonical(f.Get("resource")) != l.Resource:
			problem = &Refusal{"invalid_target", "the login was for another resource"}
		default:
			kept.Secret = digest(next)
			return kept.Expires.Sub(s.o.Now())
		}
		return 0
	})
	if err == nil && copied {
		err = s.end(ctx, id, &l.Person)
	}
	switch {
	case err != nil:
		return nil, s.away(ctx, err)
	case !found:
		return nil, errNoLogin
	case problem != nil:
		return nil, problem
	}
	scopes := l.Scopes
	if asked := strings.Fields(f.Get("scope")); len(asked) > 0 { // less, never more
		scopes = slices.DeleteFunc(slices.Clone(scopes), func(have string) bool { return !slices.Contains(asked, have) })
	}
	return &issue{client: l.Client, resource: l.Resource, person: &l.Person, scopes: scopes, refresh: id + "." + next}, nil
}

var errNoLogin = bad("the refresh token is not known, or has expired; log in again")

// accept takes the assertion of somebody else (RFC 7523, section 2.1). No refresh token comes of it:
// whoever asserts is asked again.
func (s *Server) accept(r *http.Request, f url.Values, p *presenter) (*issue, *Refusal) {
	if !p.proved {
		return nil, &Refusal{"unauthorized_client", "this grant is for clients that prove who they are with a secret"}
	}
	a, err := s.o.Assertion(r.Context(), p.client, f.Get("assertion"))
	if err != nil {
		s.log(r.Context(), "an assertion is refused", err)
		var told *Refusal
		if errors.As(err, &told) {
			return nil, told
		}
		return nil, bad("the assertion is not valid")
	}
	switch {
	case !slices.Contains(s.o.Resources, canonical(a.Resource)) || f.Has("resource") && canonical(f.Get("resource")) != canonical(a.Resource):
		return nil, &Refusal{"invalid_target", "the assertion is for another resource"}
	case a.Thumbprint != "" && !equal(a.Thumbprint, p.thumbprint):
		return nil, bad("the assertion is bound to another key")
	}
	scopes := s.exist(a.Scope)
	if strings.TrimSpace(a.Scope) == "" {
		scopes = s.o.Default
	}
	if asked := strings.Fields(f.Get("scope")); len(asked) > 0 {
		scopes = slices.DeleteFunc(slices.Clone(scopes), func(have string) bool { return !slices.Contains(asked, have) })
	}
	return &issue{client: p.client, resource: canonical(a.Resource), person: a.Person, scopes: a.Person.Allowed(scopes)}, nil
}

// sign makes an access token (RFC 9068).
func (s *Server) sign(r *http.Request, i *issue, thumbprint string) (string, error) {
	now := s.o.Now()
	claims := map[string]any{
		"iss": s.o.URL, "sub": i.person.Subject, "aud": i.resource, "exp": now.Add(s.o.TokenLife).Unix(), "iat": now.Unix(), "jti": rand.Text(),
		"client_id": i.client, "scope": strings.Join(i.scopes, " "), "roles": i.person.Roles,
	}
	if i.person.Tenant != "" {
		claims["tenant"] = i.person.Tenant
	}
	if i.person.Roles == nil {
		claims["roles"] = []string{}
	}
	if thumbprint != "" {
		claims["cnf"] = map[string]string{"jkt": thumbprint}
	}
	payload, err := json.Marshal(claims)
	if err != nil {
		return "", err
	}
	if err := s.o.Keys.turn(); err != nil { // the keys that are there go on
		s.log(r.Context(), "the signing keys cannot be turned", err)
	}
	return s.o.Keys.sign(payload)
}
