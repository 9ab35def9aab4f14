package mcphttp

import (
	"crypto/sha256"
	"encoding/base64"
	"net/http"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/mcpwire"
)

// Access is what a client is told that has no token, or one that does not suffice (MCP 2026-07-28,
// basic/authorization).
type Access struct {
	Resource        string        // address of this server, to which proofs are made out
	Metadata        string        // address of the protected resource metadata (RFC 9728)
	Scopes          []string      // to ask for first
	ProofAlgorithms []string      // that DPoP proofs may be signed with (RFC 9449)
	Nonce           func() string // makes one for the next proof; nil: proofs are not taken
}

// challenge sets the WWW-Authenticate header (RFC 6750, RFC 9449, RFC 9728), in the scheme that the
// client used. It never says why a token is not valid.
func (a *Access) challenge(h http.Header, f *mcpwire.Failure, given []string) {
	scheme := "Bearer "
	proof := len(given) > 0 && isScheme(given[0], "DPoP") && a.Nonce != nil
	if proof {
		scheme = `DPoP algs="` + strings.Join(a.ProofAlgorithms, " ") + `", `
		h.Set("DPoP-Nonce", a.Nonce())
	}
	b := scheme + `resource_metadata="` + a.Metadata + `"`
	scopes := a.Scopes
	switch {
	case len(f.Scopes) > 0:
		b += `, error="insufficient_scope"`
		scopes = f.Scopes
	case f.OAuth != "":
		b += `, error="` + f.OAuth + `"`
	case len(given) > 0:
		b += `, error="invalid_token"`
	}
	if len(scopes) > 0 {
		b += `, scope="` + strings.Join(scopes, " ") + `"`
	}
	h.Set("WWW-Authenticate", b)
}

// kinds are the methods of session revisions that are calls.
var kinds = map[string]call.Kind{"tools/call": call.Tool, "resources/read": call.Resource, "prompts/get": call.Prompt, "resources/subscribe": call.Resource}

// session asks who sends a request of a session revision, and whether a call in it lacks a scope,
// before the sessions answer it: then a status can still be set. The sessions learn who it is, and
// never see the token.
func (d *Door) session(w http.ResponseWriter, r *http.Request, body []byte) {
	if d.opts.Forwarded != nil {
		who, ok, err := d.opts.Forwarded(r)
		if err != nil {
			d.refuse(w, r, &mcpwire.Failure{Status: http.StatusForbidden, Code: -32600, Cause: call.Denied, Message: "what another node is said to have passed on is not taken: " + err.Error()}, len(body))
			return
		}
		if ok {
			d.opts.Sessions.ServeHTTP(w, r.WithContext(mcpwire.WithPrincipal(r.Context(), who)))
			return
		}
	}
	if d.opts.Check == nil {
		d.opts.Sessions.ServeHTTP(w, r)
		return
	}
	var m struct {
		ID     jsontext.Value `json:"id"`
		Method string         `json:"method"`
		Params struct {
			Name string `json:"name"`
			URI  string `json:"uri"`
		} `json:"params"`
	}
	if len(body) > 0 {
		_ = json.Unmarshal(body, &m) // what is not a message is refused by the sessions; who sent it is asked first
	}
	name := m.Params.Name
	if kinds[m.Method] == call.Resource {
		name = m.Params.URI
	}
	who, err := d.opts.Check(r.Context(), d.Credential(r), kinds[m.Method], name)
	if err != nil {
		d.refuse(w, r, mcpwire.FailStranger(m.ID, err), len(body))
		return
	}
	r.Header.Del("Authorization")
	r.Header.Del("DPoP")
	d.opts.Sessions.ServeHTTP(w, r.WithContext(mcpwire.WithPrincipal(r.Context(), who)))
}

// Credential collects what a request presents; nothing is verified here.
func (d *Door) Credential(r *http.Request) call.Credential {
	c := call.Credential{Peer: r.RemoteAddr}
	given := header(r, "Authorization")
	switch a := d.opts.Access; {
	case isScheme(given, "Bearer"):
		c.Bearer = strings.TrimSpace(given[len("Bearer"):])
	case isScheme(given, "DPoP") && a != nil:
		c.Bearer = strings.TrimSpace(given[len("DPoP"):])
		c.Proofs = append([]string{}, r.Header["Dpop"]...) // not nil: the scheme was used
		c.Method, c.URL = r.Method, a.Resource
	}
	if r.TLS != nil && len(r.TLS.PeerCertificates) > 0 {
		sum := sha256.Sum256(r.TLS.PeerCertificates[0].Raw)
		c.Certificate = base64.RawURLEncoding.EncodeToString(sum[:])
	}
	return c
}

// isScheme reports whether an Authorization header is of a scheme, whose case does not matter.
func isScheme(header, scheme string) bool {
	return len(header) > len(scheme) && header[len(scheme)] == ' ' && strings.EqualFold(header[:len(scheme)], scheme)
}
