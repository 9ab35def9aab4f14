package issuer

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"net/http"
	"net/url"
	"slices"
	"strings"
)

// An Ask is an authorization request that fits together.
type Ask struct {
	ClientID   string   `json:"c"`
	ClientName string   `json:"n"`          // for people
	Known      bool     `json:"w,omitzero"` // whether the client is one of the configuration
	Redirect   string   `json:"r"`          // is the client's
	State      string   `json:"s,omitzero"`
	Challenge  string   `json:"p"`           // PKCE, S256
	Resource   string   `json:"t"`           // is one of this server's
	Thumbprint string   `json:"k,omitzero"`  // of the key that the code is bound to (RFC 9449, section 10)
	Scopes     []string `json:"o,omitempty"` // exist; never empty if any does
}

// single are the parameters of an authorization request that count: none may be there twice
// (RFC 6749, section 3.1).
var single = []string{"client_id", "redirect_uri", "response_type", "state", "scope", "code_challenge", "code_challenge_method", "dpop_jkt"}

// Read checks an authorization request. Before the redirect is known to be the client's, errors
// stay here: err, which may be ErrAway. After that they go there, with [Server.Back]: refusal.
func (s *Server) Read(ctx context.Context, q url.Values) (a *Ask, refusal *Refusal, err error) {
	if i := slices.IndexFunc(single, func(p string) bool { return len(q[p]) > 1 }); i >= 0 {
		return nil, nil, errors.New("the parameter " + single[i] + " is there twice")
	}
	c, err := s.clients.find(ctx, q.Get("client_id"))
	if err != nil {
		if errors.Is(err, ErrAway) {
			s.away(ctx, err)
			return nil, nil, ErrAway
		}
		if errors.Is(err, errUnread) {
			s.log(ctx, "a client is not described at its id", err)
			err = errUnread // what the way there looks like is not told
		}
		return nil, nil, err
	}
	redirect := q.Get("redirect_uri")
	if redirect == "" && len(c.Redirects) == 1 {
		redirect = c.Redirects[0]
	}
	if len(redirect) > maxParam || !slices.ContainsFunc(c.Redirects, func(r string) bool { return sameRedirect(r, redirect) }) {
		return nil, nil, errors.New("the redirect_uri is none that the client registered")
	}
	a = &Ask{ClientID: c.ID, ClientName: c.Name, Known: s.clients.known[c.ID] != nil, Redirect: redirect, State: q.Get("state"), Challenge: q.Get("code_challenge"), Resource: canonical(q.Get("resource")), Thumbprint: q.Get("dpop_jkt")}
	switch {
	case len(a.State) > maxParam:
		a.State = ""
		return a, &Refusal{"invalid_request", "the state is too long"}, nil
	case q.Get("response_type") != "code":
		return a, &Refusal{"unsupported_response_type", "response_type must be code"}, nil
	case len(a.Challenge) != 43 || q.Get("code_challenge_method") != "S256":
		return a, &Refusal{"invalid_request", "PKCE with S256 is required"}, nil
	case a.Thumbprint != "" && len(a.Thumbprint) != 43:
		return a, &Refusal{"invalid_request", "dpop_jkt is no thumbprint"}, nil
	case len(q["resource"]) > 1 || a.Resource != "" && !slices.Contains(s.o.Resources, a.Resource):
		return a, &Refusal{"invalid_target", "the resource is none of this server's, or there are several"}, nil
	}
	if a.Resource == "" && len(s.o.Resources) > 0 {
		a.Resource = s.o.Resources[0]
	}
	if a.Scopes = s.exist(q.Get("scope")); len(a.Scopes) == 0 {
		a.Scopes = s.o.Default
	}
	return a, nil, nil
}

// exist is what of a scope parameter exists here; the rest is ignored.
func (s *Server) exist(scope string) []string {
	var out []string
	for _, one := range strings.Fields(scope) {
		if slices.Contains(s.o.Scopes, one) && !slices.Contains(out, one) {
			out = append(out, one)
		}
	}
	return out
}

// Allowed is what of some scopes may be given in a person's name.
func (p *Person) Allowed(scopes []string) []string {
	var out []string
	for _, one := range scopes {
		if slices.Contains(p.Scopes, "*") || slices.Contains(p.Scopes, one) {
			out = append(out, one)
		}
	}
	return out
}

// Grant sends the browser to the client with a code, in the name of a person who has agreed.
func (s *Server) Grant(w http.ResponseWriter, r *http.Request, a *Ask, p *Person) {
	id := rand.Text()
	c := &code{Ask: *a, Person: *p, Scopes: p.Allowed(a.Scopes), Expires: s.o.Now().Add(codeLife)}
	ok, err := Keep(r.Context(), s.o.Store, Place{Kind: codes, Name: digest(id)}, c, codeLife)
	switch {
	case errors.Is(err, ErrFull):
		s.Back(w, r, a, &Refusal{"temporarily_unavailable", "too many log in at once; try again in a minute"})
		return
	case err != nil || !ok: // it is nobody's
		s.Back(w, r, a, s.away(r.Context(), cmp.Or(err, ErrAway)))
		return
	}
	s.send(w, r, a, url.Values{"code": {id}})
}

// Back sends the browser to the client with an error.
func (s *Server) Back(w http.ResponseWriter, r *http.Request, a *Ask, refusal *Refusal) {
	params := url.Values{"error": {refusal.Code}}
	if refusal.Why != "" {
		params.Set("error_description", refusal.Why)
	}
	s.send(w, r, a, params)
}

func (s *Server) send(w http.ResponseWriter, r *http.Request, a *Ask, params url.Values) {
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
	q.Set("iss", s.o.URL)
	u.RawQuery = q.Encode()
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("Referrer-Policy", "no-referrer")
	http.Redirect(w, r, u.String(), http.StatusSeeOther)
}
