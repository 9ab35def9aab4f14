package main

import (
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"path/filepath"
	"slices"
	"time"

	"newel.dev/newel/internal/config"
	"newel.dev/newel/internal/egress"
	"newel.dev/newel/internal/identity/broker"
	"newel.dev/newel/internal/identity/issuer"
	"newel.dev/newel/internal/identity/verify"
	"newel.dev/newel/internal/policy"
)

// federation is what the authorization server of mode broker and those who check its tokens share.
type federation struct {
	keys       *issuer.Keys
	signatures *verify.Verifier // of the identity provider, and of issuers of assertions
	http       *http.Client     // to the identity provider
}

// federated opens the signing keys of mode broker; nil means that the mode is another.
func federated(f *config.File) (*federation, error) {
	a := &f.Config.Auth
	if a.Mode != "broker" {
		return nil, nil
	}
	b := &a.Broker
	path := func(p string) string {
		if filepath.IsAbs(p) {
			return p
		}
		return filepath.Join(f.Dir, p)
	}
	fed := &federation{}
	var err error
	if b.StateDir != "" {
		if fed.keys, err = issuer.OpenKeys(path(b.StateDir), nil); err != nil {
			return nil, fmt.Errorf("%s: %w", f.Position("auth.broker.state_dir"), err)
		}
	} else {
		var files []string
		for _, k := range b.SigningKeys {
			files = append(files, path(k))
		}
		if fed.keys, err = issuer.LoadKeys(files); err != nil {
			return nil, fmt.Errorf("%s: %w", f.Position("auth.broker.signing_keys"), err)
		}
	}
	private, err := ranges(f, a.Private, "auth.private_ranges")
	if err != nil {
		return nil, err
	}
	// Who is the audience is judged by the broker: it depends on what a token is.
	issuers := []verify.Issuer{{URL: b.Provider.URL, Audiences: []string{b.Provider.ClientID}, Algorithms: b.Provider.Algorithms}}
	for i, one := range b.Assertions {
		if one.URL == b.Provider.URL {
			if one.JWKS != "" || one.Algorithms != nil {
				return nil, fmt.Errorf("%s: this is the provider: its keys and algorithms are the same for assertions", f.Position(fmt.Sprintf("auth.broker.assertions[%d]", i)))
			}
			continue
		}
		issuers = append(issuers, verify.Issuer{URL: one.URL, Audiences: []string{b.Provider.ClientID}, Algorithms: one.Algorithms, JWKS: one.JWKS})
	}
	if fed.signatures, err = verify.New(verify.Options{Issuers: issuers, Private: private}); err != nil {
		return nil, fmt.Errorf("%s: %w", f.Position("auth.broker"), err)
	}
	u, err := url.Parse(b.Provider.URL)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", f.Position("auth.broker.provider.url"), err)
	}
	fed.http = egress.Client(egress.Options{Allow: private, Loopback: issuer.Loopback(u.Hostname()), Timeout: 10 * time.Second})
	return fed, nil
}

// own is the issuer whose tokens are accepted here: our own. Its keys are not fetched.
func (fed *federation) own(f *config.File, base string, resources []string) verify.Issuer {
	b := &f.Config.Auth.Broker
	is := verify.Issuer{URL: base, Audiences: resources, Keys: fed.keys.JWKS, Skew: time.Second} // the clock is the same
	if b.TenantClaim != "" || slices.ContainsFunc(b.Access, func(a config.BrokerAccess) bool { return a.Tenant != "" }) {
		is.TenantClaim = "tenant" // then every token must name one
	}
	return is
}

// server makes the authorization server. scopes are those that exist.
func (fed *federation) server(f *config.File, base string, scopes []string, known *together, logger *slog.Logger) (http.Handler, error) {
	a := &f.Config.Auth
	c := &a.Broker
	o := broker.Options{
		Issuer: issuer.Options{
			URL: base, Resources: resourcesOf(&f.Config, base), Scopes: scopes, Keys: fed.keys, Register: c.Registration,
			TokenLife: c.TokenLife, LoginLife: c.LoginLife, DPoPRequired: a.DPoP == "required", Proofs: known.proofs, Store: known.logins, Logger: logger,
		},
		Provider:    broker.Provider{URL: c.Provider.URL, ClientID: c.Provider.ClientID, Secret: c.Provider.ClientSecret, Scopes: c.Provider.Scopes},
		TenantClaim: c.TenantClaim, GroupsClaim: c.GroupsClaim, Signatures: fed.signatures, CookieKey: known.cookie, HTTP: fed.http,
	}
	if len(a.Scopes) > 0 {
		o.Issuer.Default = a.Scopes
	}
	for _, one := range c.Clients {
		o.Issuer.Clients = append(o.Issuer.Clients, issuer.Client{ID: one.ID, Name: one.Name, Secret: one.Secret, Redirects: one.Redirects})
	}
	for _, r := range c.Access {
		for _, scope := range r.Scopes { // a rule of the policy may ask for one that nothing published names
			if scope != policy.AllScopes && !slices.Contains(o.Issuer.Scopes, scope) {
				o.Issuer.Scopes = append(slices.Clone(o.Issuer.Scopes), scope)
			}
		}
		o.Rules = append(o.Rules, broker.Rule{Group: r.Group, Tenant: r.Tenant, Scopes: r.Scopes, Roles: r.Roles})
	}
	for _, one := range c.Assertions {
		o.Assertions = append(o.Assertions, one.URL)
	}
	b, err := broker.New(o)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", f.Position("auth.broker"), err)
	}
	return b.Handler(), nil
}
