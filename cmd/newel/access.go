package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/user"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"time"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/assembly"
	"newel.dev/newel/internal/config"
	"newel.dev/newel/internal/egress"
	"newel.dev/newel/internal/identity/devserver"
	"newel.dev/newel/internal/identity/dpop"
	"newel.dev/newel/internal/identity/issuer"
	"newel.dev/newel/internal/identity/verify"
	"newel.dev/newel/internal/policy"
	"newel.dev/newel/internal/policy/cedar"
	"newel.dev/newel/internal/policy/opa"
	"newel.dev/newel/internal/secret"
	"newel.dev/newel/internal/store/redis"
)

// publicURL is the address of the server as clients write it, without path.
func publicURL(c *config.Config, listen net.Addr) string {
	switch {
	case c.Auth.PublicURL != "":
		return strings.TrimSuffix(c.Auth.PublicURL, "/")
	case listen != nil:
		return scheme(c) + "://" + listen.String()
	}
	return scheme(c) + "://" + c.Listen
}

// together is what nodes that serve one address know together of who calls.
type together struct {
	proofs *dpop.Shared
	logins issuer.Store // nil: this server has no logins of its own
	cookie []byte       // seals logins under way
}

// common opens that; what is nil each node knows by itself. Nodes need what only they can read: the same
// Redis, and the same key.
func common(f *config.File, base string, shared *redis.DB) (*together, error) {
	c := &f.Config
	if shared == nil || c.State.Engine == "memory" {
		return &together{}, nil
	}
	key, err := secret.OpenKey(from(f.Dir, c.State.KeyFile))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", f.Position("state.key_file"), err)
	}
	nonces, err := key.Derive("newel dpop nonces")
	if err != nil {
		return nil, err
	}
	known := &together{proofs: &dpop.Shared{Key: nonces, Store: shared.Proofs()}}
	if c.Auth.Mode != "broker" {
		return known, nil
	}
	if known.cookie, err = key.Derive("newel login cookie"); err != nil {
		return nil, err
	}
	known.logins, err = shared.Logins(key, base+" "+grants(c, base))
	return known, err
}

// grants stands for the settings that decide what people get who log in: with others they log in again.
// Nodes differ in the rest, such as their folders.
func grants(c *config.Config, base string) string {
	b := c.Auth.Broker
	b.StateDir, b.SigningKeys, b.Provider.ClientSecret = "", nil, secret.String{}
	h := sha256.New()
	for _, v := range []any{b, c.Auth.DPoP, c.Auth.Scopes, resourcesOf(c, base), tenantsOf(c, base+"/mcp")} {
		stamp(h, reflect.ValueOf(v))
	}
	return hex.EncodeToString(h.Sum(nil))
}

// identities makes what tells who is calling; nil means that nobody is asked. Positions of what is
// wrong come from f.
func identities(f *config.File, base string, fed *federation, proofs *dpop.Shared) (*assembly.Identities, *assembly.Access, error) {
	c := &f.Config
	a := &c.Auth
	if a.Mode == "none" {
		if len(a.Issuers) > 0 {
			return nil, nil, fmt.Errorf("%s: issuers are configured, and mode none asks nobody; write mode: tokens", f.Position("auth.issuers"))
		}
		return nil, nil, nil
	}
	local, err := localCaller(&a.Stdio)
	if err != nil {
		return nil, nil, err
	}
	resources := resourcesOf(c, base)
	var issuers []verify.Issuer
	var urls []string
	for _, is := range a.Issuers {
		one := verify.Issuer{
			URL: is.URL, Audiences: is.Audiences, Algorithms: is.Algorithms, Profile: is.Profile, JWKS: is.JWKS, TenantClaim: is.TenantClaim, Tenant: is.Tenant,
			RolesClaim: is.RolesClaim, Scopes: is.Scopes, Skew: is.Skew, Introspect: is.Introspect, ClientID: is.ClientID, ClientSecret: is.ClientSecret,
		}
		if len(one.Audiences) == 0 {
			one.Audiences = resources
		}
		issuers, urls = append(issuers, one), append(urls, is.URL)
	}
	if a.Mode == "dev" {
		if len(a.Issuers) > 0 {
			return nil, nil, fmt.Errorf("%s: mode dev has an issuer of its own; write mode: tokens for others", f.Position("auth.issuers"))
		}
		issuers = []verify.Issuer{{URL: base, Audiences: resources, JWKS: base + "/oauth/jwks", TenantClaim: "tenant"}}
		urls = []string{base}
	}
	if fed != nil {
		issuers, urls = []verify.Issuer{fed.own(f, base, resources)}, []string{base}
	}
	private, err := ranges(f, a.Private, "auth.private_ranges")
	if err != nil {
		return nil, nil, err
	}
	tokens, err := verify.New(verify.Options{Resource: resources[0], Tenants: tenantsOf(c, resources[0]), Issuers: issuers, Private: private, DPoPRequired: a.DPoP == "required", Proofs: proofs})
	if err != nil {
		return nil, nil, fmt.Errorf("%s: %w", f.Position("auth"), err)
	}
	who := &assembly.Identities{Tokens: tokens, Local: local}
	if fed != nil {
		who.Provider = fed.signatures
	}
	access := &assembly.Access{Resource: resources[0], Issuers: urls, Scopes: a.Scopes, Nonce: tokens.Nonce, DPoPRequired: a.DPoP == "required"}
	if a.Describe && a.Mode == "tokens" {
		first, err := tokens.Describe(urls[0])
		if err != nil {
			return nil, nil, fmt.Errorf("%s: %w", f.Position("auth.serve_metadata"), err)
		}
		access.Describe = first.Document
	}
	return who, access, nil
}

// ranges reads ranges of addresses; at is where they stand in the configuration.
func ranges(f *config.File, texts []string, at string) ([]netip.Prefix, error) {
	var all []netip.Prefix
	for i, text := range texts {
		p, err := netip.ParsePrefix(text)
		if err != nil {
			return nil, fmt.Errorf("%s: %q is not a range of addresses, such as 10.0.0.0/8", f.Position(fmt.Sprintf("%s[%d]", at, i)), text)
		}
		all = append(all, p)
	}
	return all, nil
}

// developers are who can log in when nobody else is configured.
var developers = []devserver.User{
	{Name: "alice", Scopes: []string{policy.AllScopes}, Roles: []string{"admin"}},
	{Name: "bob", Scopes: []string{"orders:read", "kb:read"}, Roles: []string{"reader"}},
}

// loginServer makes the authorization server, or nil. scopes are those that exist.
func loginServer(f *config.File, base string, scopes []string, fed *federation, known *together, logger *slog.Logger) (http.Handler, error) {
	c := &f.Config
	if fed != nil {
		return fed.server(f, base, scopes, known, logger)
	}
	if c.Auth.Mode != "dev" {
		return nil, nil
	}
	users := developers
	if len(c.Auth.Users) > 0 {
		users = nil
		for _, u := range c.Auth.Users {
			users = append(users, devserver.User{Name: u.Name, Tenant: u.Tenant, Scopes: u.Scopes, Roles: u.Roles})
		}
	}
	s, err := devserver.New(devserver.Options{Issuer: base, Resources: resourcesOf(c, base), Scopes: scopes, Users: users, DPoP: c.Auth.DPoP == "required"})
	if err != nil {
		return nil, err
	}
	return s.Handler(), nil
}

// resourcesOf are the addresses of all servers, which tokens are for.
func resourcesOf(c *config.Config, base string) []string {
	out := []string{base + "/mcp"}
	for _, s := range c.Servers {
		out = append(out, (&assembly.Server{Host: s.Host, Path: s.Path}).Resource(out[0]))
	}
	return out
}

// tenantsOf are the tenants that have servers of their own, by the address of the server.
func tenantsOf(c *config.Config, main string) map[string]string {
	out := map[string]string{}
	for _, s := range c.Servers {
		if s.Tenant != "" {
			out[(&assembly.Server{Host: s.Host, Path: s.Path}).Resource(main)] = s.Tenant
		}
	}
	return out
}

// localCaller is who started the program.
func localCaller(l *config.LocalCaller) (*call.Principal, error) {
	p := &call.Principal{ID: l.Subject, Tenant: l.Tenant, Scopes: l.Scopes, Roles: l.Roles}
	if p.ID == "" {
		u, err := user.Current()
		if err != nil {
			return nil, fmt.Errorf("the user of the operating system is not known (%w); write auth.stdio.subject", err)
		}
		p.ID = "os:" + u.Username
	}
	if p.Scopes == nil {
		p.Scopes = []string{policy.AllScopes}
	}
	return p, nil
}

// policies compiles the rules and runs their tests.
func policies(ctx context.Context, f *config.File) (rules, shadow *policy.Policy, err error) {
	c := &f.Config.Policy
	others, err := deciders(f)
	if err != nil {
		return nil, nil, err
	}
	compile := func(list []policy.Rule, at string, also ...policy.Decider) *policy.Policy {
		p, problems := policy.Compile(policy.Set{Environment: c.Environment, ReadOnly: c.ReadOnly, Rules: list, Also: also})
		for _, problem := range problems {
			var one *policy.Problem
			if errors.As(problem, &one) {
				problem = fmt.Errorf("%s: %w", f.Position(fmt.Sprintf("policy.%s[%d]", at, one.Index)), problem)
			}
			err = errors.Join(err, problem)
		}
		return p
	}
	rules = compile(c.Rules, "rules", others...)
	if len(c.Shadow) > 0 {
		shadow = compile(c.Shadow, "shadow")
	}
	if err != nil {
		return nil, nil, err
	}
	for i := range c.Tests {
		if failure := rules.Run(ctx, &c.Tests[i], time.Now()); failure != nil {
			err = errors.Join(err, fmt.Errorf("%s: the test %q of the policy: %w", f.Position(fmt.Sprintf("policy.tests[%d]", i)), c.Tests[i].Name, failure))
		}
	}
	return rules, shadow, err
}

// deciders are the policies in other languages.
func deciders(f *config.File) ([]policy.Decider, error) {
	c := &f.Config.Policy
	var all []policy.Decider
	var files []cedar.File
	for i, name := range c.Cedar {
		if !filepath.IsAbs(name) {
			name = filepath.Join(f.Dir, name)
		}
		text, err := os.ReadFile(name)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", f.Position(fmt.Sprintf("policy.cedar[%d]", i)), err)
		}
		files = append(files, cedar.File{Name: c.Cedar[i], Text: text})
	}
	if len(files) > 0 {
		p, err := cedar.Parse(c.Environment, files...)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", f.Position("policy.cedar"), err)
		}
		all = append(all, p)
	}
	if c.OPA.URL == "" {
		return all, nil
	}
	private, err := ranges(f, c.OPA.Private, "policy.opa.private_ranges")
	if err != nil {
		return nil, err
	}
	agent, err := opa.New(opa.Options{
		URL: c.OPA.URL, Document: c.OPA.Document, ListDocument: c.OPA.ListDocument, Token: c.OPA.Token, Timeout: c.OPA.Timeout,
		Environment: c.Environment, HTTP: egress.Client(egress.Options{Allow: private, Loopback: true, Timeout: c.OPA.Timeout}),
	})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", f.Position("policy.opa"), err)
	}
	return append(all, agent), nil
}

// production refuses what has no place there.
func production(f *config.File) error {
	if f.Config.Policy.Environment == policy.Production && slices.Contains([]string{"dev", "none"}, f.Config.Auth.Mode) {
		return fmt.Errorf("%s: in production everybody has to say who they are: write mode: tokens, or broker", f.Position("auth.mode"))
	}
	return nil
}

// scopesOf are all scopes that something published asks for, and those that clients are told of.
func scopesOf(ctx context.Context, c *config.Config, backends []call.Backend) ([]string, error) {
	all := slices.Clone(c.Auth.Scopes)
	if !slices.Contains([]string{"dev", "broker"}, c.Auth.Mode) {
		return all, nil
	}
	for _, b := range backends {
		caps, err := b.Capabilities(ctx)
		if err != nil {
			return nil, fmt.Errorf("backend %q: %w", b.Name(), err)
		}
		for _, one := range caps {
			all = append(all, one.Scopes...)
		}
	}
	slices.Sort(all)
	return slices.Compact(all), nil
}
