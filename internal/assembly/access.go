package assembly

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"

	"github.com/go-json-experiment/json"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/door/mcphttp"
	"newel.dev/newel/internal/guard/authenticate"
	"newel.dev/newel/internal/identity/dpop"
	"newel.dev/newel/internal/identity/verify"
)

// Identities tells who is calling: over HTTP by access token, over stdio by who started the server.
type Identities struct {
	Tokens *verify.Verifier // nil: no token is accepted
	Local  *call.Principal  // of callers over stdio and in memory; nil: none may call
	// Provider knows the keys of the identity provider at which people log in; nil: there is none.
	// No token is checked with it here: it is only kept fresh.
	Provider *verify.Verifier
}

var _ authenticate.Verifier = (*Identities)(nil)

// Verify implements authenticate.Verifier.
func (i *Identities) Verify(ctx context.Context, c call.Credential) (*call.Principal, error) {
	if c.Peer == "stdio" || c.Peer == "" { // doors over the network always name a peer
		if i.Local == nil {
			return nil, call.Errorf(call.Unauthenticated, "authentication is required")
		}
		return i.Local, nil
	}
	if c.Known != nil {
		return c.Known, nil
	}
	if c.Bearer == "" || i.Tokens == nil {
		return nil, call.Errorf(call.Unauthenticated, "authentication is required")
	}
	id, err := i.Tokens.VerifyPresented(ctx, &verify.Presented{Token: c.Bearer, Proofs: c.Proofs, Method: c.Method, URL: c.URL, Certificate: c.Certificate})
	if err != nil {
		return nil, err
	}
	return &id.Principal, nil
}

// Run keeps the keys of issuers fresh until ctx ends.
func (i *Identities) Run(ctx context.Context) error {
	var all sync.WaitGroup
	var errs [2]error
	for n, v := range []*verify.Verifier{i.Tokens, i.Provider} {
		if v != nil {
			all.Go(func() { errs[n] = v.Run(ctx) })
		}
	}
	all.Wait()
	return errors.Join(errs[:]...)
}

// check is asked before a session sees a request: see mcphttp.Options.
func (f *face) check(o *Options) func(context.Context, call.Credential, call.Kind, string) (*call.Principal, error) {
	if o.Identity == nil {
		return nil
	}
	identity := f.identity(o)
	return func(ctx context.Context, c call.Credential, kind call.Kind, name string) (*call.Principal, error) {
		p, err := identity.Verify(ctx, c)
		if err != nil {
			return nil, err
		}
		var target *call.Capability
		switch s := f.catalog.Load(); kind {
		case call.Tool:
			target = s.Tool(name)
		case call.Prompt:
			target = s.Prompt(name)
		case call.Resource:
			target = s.Resource(name)
		}
		if target != nil && !slices.Contains(p.Scopes, "*") {
			for _, scope := range target.Scopes {
				if !slices.Contains(p.Scopes, scope) {
					e := call.Errorf(call.Denied, "the access token lacks the scope %s", scope)
					e.Scopes = target.Scopes
					return nil, e
				}
			}
		}
		return p, nil
	}
}

// identity is who tells who calls this server.
func (f *face) identity(o *Options) authenticate.Verifier {
	if f.server.Tenant == "" {
		return o.Identity
	}
	return ofTenant{o.Identity, f.server.Tenant}
}

// ofTenant knows the callers of one tenant. To all others the server is one that their token is not
// valid at.
type ofTenant struct {
	authenticate.Verifier
	tenant string
}

// Verify implements authenticate.Verifier.
func (v ofTenant) Verify(ctx context.Context, c call.Credential) (*call.Principal, error) {
	p, err := v.Verifier.Verify(ctx, c)
	if err != nil {
		return nil, err
	}
	if p == nil || p.Tenant != v.tenant {
		return nil, call.Errorf(call.Unauthenticated, "the access token is not valid")
	}
	return p, nil
}

// Resource is the canonical address of the server (RFC 8707), if that of the main one is given.
func (s *Server) Resource(main string) string {
	base := origin(main)
	if u, err := url.Parse(base); err == nil && s.Host != "" {
		base = u.Scheme + "://" + s.Host
		if u.Port() != "" {
			base += ":" + u.Port()
		}
	}
	return base + s.Path
}

// access is what this server tells clients without a token.
func (f *face) access(o *Options) *mcphttp.Access {
	if o.Access == nil {
		return nil
	}
	resource := f.server.Resource(o.Access.Resource)
	base := origin(resource)
	return &mcphttp.Access{
		Resource: resource, Metadata: base + wellKnown + f.server.Path, Scopes: o.Access.Scopes,
		ProofAlgorithms: dpop.Algorithms, Nonce: o.Access.Nonce,
	}
}

// wellKnown is where protected resource metadata stands (RFC 9728, section 3.1).
const wellKnown = "/.well-known/oauth-protected-resource"

// origin is scheme and host of an address.
func origin(address string) string {
	scheme, rest, _ := strings.Cut(address, "://")
	host, _, _ := strings.Cut(rest, "/")
	return scheme + "://" + host
}

// serveMetadata serves the protected resource metadata of every server, and at the root that of
// the main one.
func (h *House) serveMetadata(mux *routes) {
	a := h.opts.Access
	if a == nil {
		return
	}
	if a.Describe != nil && h.opts.Login == nil {
		mux.HandleFunc("GET /.well-known/oauth-authorization-server", func(w http.ResponseWriter, r *http.Request) {
			doc, err := a.Describe(r.Context())
			if err != nil {
				h.opts.Logger.LogAttrs(r.Context(), slog.LevelWarn, "the authorization server does not describe itself", slog.String("error", err.Error()))
				http.Error(w, "the authorization server cannot be asked now; try again in a moment", http.StatusBadGateway)
				return
			}
			writePublic(w, doc)
		})
	}
	for i, f := range h.faces {
		doc, err := json.Marshal(map[string]any{
			"resource": f.server.Resource(a.Resource), "resource_name": f.server.Name,
			"authorization_servers": a.Issuers, "scopes_supported": h.scopes(f), "bearer_methods_supported": []string{"header"},
			"dpop_signing_alg_values_supported": dpop.Algorithms, "dpop_bound_access_tokens_required": a.DPoPRequired,
		}, json.Deterministic(true))
		if err != nil {
			continue // text and lists of it can be encoded
		}
		serve := func(w http.ResponseWriter, _ *http.Request) { writePublic(w, doc) }
		mux.HandleFunc("GET "+f.server.Host+wellKnown+f.server.Path, serve)
		if i == 0 || f.server.Host != "" && f.server.Path == "/mcp" {
			mux.HandleFunc("GET "+f.server.Host+wellKnown, serve)
		}
	}
}

// writePublic answers with a document that is public by its nature: browsers' clients read it.
func writePublic(w http.ResponseWriter, doc []byte) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "max-age=300")
	w.Header().Set("Access-Control-Allow-Origin", "*")
	_, _ = w.Write(doc) // the client is gone if this fails
}

// scopes are all that the capabilities of a server ask for, and those to ask for first.
func (h *House) scopes(f *face) []string {
	all := slices.Clone(h.opts.Access.Scopes)
	s := f.catalog.Load()
	for _, c := range s.All() {
		all = append(all, c.Scopes...)
	}
	slices.Sort(all)
	return slices.Compact(all)
}
