// Package devserver is an OAuth 2.1 authorization server for development, in memory: a newcomer
// has the real flow, with login and consent, and no other program.
//
// Start reading at [New]. It is a login page in front of the issuer package, which says what is
// spoken and what is refused. Anybody who can reach it can log in as anybody: it must only be served
// on loopback, and never in production. It forgets everything when it ends, its keys included.
package devserver

import (
	"cmp"
	"errors"
	"html/template"
	"net/http"
	"slices"
	"time"

	"newel.dev/newel/internal/identity/issuer"
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
	DPoP      bool             // whether tokens must be bound to a key (RFC 9449)
	Fetch     *http.Client     // for client id metadata documents; default: public addresses only
	Now       func() time.Time // default: time.Now
}

// A Server is an authorization server. It is safe for concurrent use.
type Server struct {
	users  []User
	issuer *issuer.Server
}

// New returns a server with keys of its own.
func New(o Options) (*Server, error) {
	if o.Issuer == "" || len(o.Users) == 0 {
		return nil, errors.New("devserver: Issuer and Users are required")
	}
	keys, err := issuer.NewKeys()
	if err != nil {
		return nil, err
	}
	is, err := issuer.New(issuer.Options{
		URL: o.Issuer, Resources: o.Resources, Scopes: o.Scopes, Keys: keys, Register: true, DPoPRequired: o.DPoP, Fetch: o.Fetch, Now: o.Now,
	})
	if err != nil {
		return nil, err
	}
	return &Server{users: o.Users, issuer: is}, nil
}

// Handler serves everything below the issuer.
func (s *Server) Handler() http.Handler {
	return s.issuer.Handler(map[string]http.HandlerFunc{"GET /oauth/authorize": s.ask, "POST /oauth/authorize": s.login})
}

// read reads the request that the page is about; nil if it was answered.
func (s *Server) read(w http.ResponseWriter, r *http.Request) *issuer.Ask {
	a, refusal, err := s.issuer.Read(r.Context(), r.URL.Query())
	switch {
	case err != nil:
		http.Error(w, err.Error(), http.StatusBadRequest)
		return nil
	case refusal != nil:
		s.issuer.Back(w, r, a, refusal)
		return nil
	}
	return a
}

func (s *Server) ask(w http.ResponseWriter, r *http.Request) {
	a := s.read(w, r)
	if a == nil {
		return
	}
	issuer.Page(w)
	if err := page.Execute(w, map[string]any{"Ask": a, "Users": s.users, "Query": r.URL.RawQuery, "Host": issuer.HostOf(a.Redirect)}); err != nil {
		return // the browser is gone
	}
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

// login grants what was asked for to the user that was chosen.
func (s *Server) login(w http.ResponseWriter, r *http.Request) {
	if !s.issuer.OwnForm(r) {
		http.Error(w, "this form was not sent from its own page", http.StatusForbidden)
		return
	}
	a := s.read(w, r)
	if a == nil {
		return
	}
	if r.FormValue("deny") != "" {
		s.issuer.Back(w, r, a, &issuer.Refusal{Code: "access_denied"})
		return
	}
	i := slices.IndexFunc(s.users, func(u User) bool { return u.Name == r.FormValue("user") })
	if i < 0 {
		http.Error(w, "there is no such user", http.StatusBadRequest)
		return
	}
	u := &s.users[i]
	// A token names exactly one tenant.
	s.issuer.Grant(w, r, a, &issuer.Person{Subject: u.Name, Tenant: cmp.Or(u.Tenant, "default"), Scopes: u.Scopes, Roles: u.Roles})
}
