package mcphttp

import (
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
	Metadata string   // address of the protected resource metadata (RFC 9728)
	Scopes   []string // to ask for first
}

// challenge is the WWW-Authenticate header (RFC 6750, RFC 9728). It never says why a token is not
// valid.
func (a *Access) challenge(f *mcpwire.Failure, token bool) string {
	b := `Bearer resource_metadata="` + a.Metadata + `"`
	scopes := a.Scopes
	switch {
	case len(f.Scopes) > 0:
		b += `, error="insufficient_scope"`
		scopes = f.Scopes
	case token:
		b += `, error="invalid_token"`
	}
	if len(scopes) > 0 {
		b += `, scope="` + strings.Join(scopes, " ") + `"`
	}
	return b
}

// UserHeader is how the sessions behind this door are told whose request it is. What a caller sends
// under this name is dropped.
const UserHeader = "X-Newel-User"

// kinds are the methods of session revisions that are calls.
var kinds = map[string]call.Kind{"tools/call": call.Tool, "resources/read": call.Resource, "prompts/get": call.Prompt, "resources/subscribe": call.Resource}

// admitSession asks who sends a request of a session revision, and whether a call in it lacks a
// scope, before the sessions answer it: then a status can still be set. It reports whether the
// request may go on.
func (d *Door) admitSession(w http.ResponseWriter, r *http.Request, body []byte) bool {
	r.Header.Del(UserHeader)
	if d.opts.Check == nil {
		return true
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
	user, err := d.opts.Check(r.Context(), credential(r), kinds[m.Method], name)
	if err == nil {
		r.Header.Set(UserHeader, user)
		return true
	}
	f := mcpwire.Fail(m.ID, err)
	if f.Cause == call.Unavailable {
		f.Status = http.StatusServiceUnavailable
	}
	d.refuse(w, r, f, len(body))
	return false
}

// credential collects what a request presents; nothing is verified here.
func credential(r *http.Request) call.Credential {
	c := call.Credential{Peer: r.RemoteAddr}
	if scheme, token, ok := strings.Cut(header(r, "Authorization"), " "); ok && strings.EqualFold(scheme, "Bearer") {
		c.Bearer = strings.TrimSpace(token)
	}
	return c
}
