package config

import (
	"fmt"
	"net/url"
	"slices"
	"time"

	"github.com/goccy/go-yaml/ast"

	"newel.dev/newel/internal/identity/issuer"
	"newel.dev/newel/internal/secret"
)

// Broker is the authorization server of mode broker.
type Broker struct {
	Provider     Provider       `yaml:"provider" doc:"The company's identity provider, which logs people in by OpenID Connect."`
	Access       []BrokerAccess `yaml:"access" doc:"What people may. All entries that fit somebody count; whom none fits cannot log in."`
	TenantClaim  string         `yaml:"tenant_claim" doc:"Claim of the provider that names the tenant; dots lead into objects. Default: that of the entries of access."`
	GroupsClaim  string         `yaml:"groups_claim" default:"groups" doc:"Claim of the provider that lists groups; dots lead into objects."`
	Clients      []BrokerClient `yaml:"clients" doc:"Clients that are known. Others are described by the document at their id (client id metadata documents)."`
	Registration bool           `yaml:"registration" doc:"Whether anybody may register a client (RFC 7591); at most 60 in a minute. They are kept in Redis, with redis.url, or in memory."`
	StateDir     string         `yaml:"state_dir" doc:"Folder in which it makes and turns its signing keys; relative to this file. Nobody else may read what is in it. All nodes need the same folder, or signing_keys."`
	SigningKeys  []string       `yaml:"signing_keys" doc:"PEM files of private keys instead (P-256, Ed25519, RSA): the first signs, all are published."`
	TokenLife    time.Duration  `yaml:"token_life" default:"5m" doc:"How long an access token counts, at most 1h."`
	LoginLife    time.Duration  `yaml:"login_life" default:"24h" doc:"After this long people log in again, however often tokens were refreshed: what the provider has changed about them counts from then on."`
	Assertions   []Assertions   `yaml:"assertions" doc:"Issuers whose identity assertions (ID-JAG) clients with a secret may exchange for access tokens."`
}

// Provider is an OpenID provider.
type Provider struct {
	URL          string        `yaml:"url" required:"true" doc:"Its issuer identifier, exactly as in its ID tokens."`
	ClientID     string        `yaml:"client_id" required:"true" doc:"Name of this server there. Its redirect address there is public_url with /oauth/callback."`
	ClientSecret secret.String `yaml:"client_secret" doc:"Its secret there."`
	Scopes       []string      `yaml:"scopes" doc:"What is asked for beside openid, such as groups."`
	Algorithms   []string      `yaml:"algorithms" doc:"Signature algorithms of its ID tokens; default: RS256, PS256, ES256, ES384, EdDSA, Ed25519."`
}

// BrokerAccess is what some people may.
type BrokerAccess struct {
	Group  string   `yaml:"group" doc:"Whose members these are; default: everybody who can log in at the provider."`
	Tenant string   `yaml:"tenant" doc:"Their tenant."`
	Scopes []string `yaml:"scopes" doc:"Scopes that they may give to clients; * stands for all."`
	Roles  []string `yaml:"roles" doc:"Their roles."`
}

// BrokerClient is a client that is known.
type BrokerClient struct {
	ID        string        `yaml:"id" required:"true" doc:"Its client_id."`
	Name      string        `yaml:"name" doc:"Name for people; default: its id."`
	Secret    secret.String `yaml:"secret" doc:"Its secret; without one it is public."`
	Redirects []string      `yaml:"redirects" doc:"Addresses to which people may come back; on loopback with any port. Without one it logs nobody in."`
}

// Assertions are an issuer of identity assertions.
type Assertions struct {
	URL        string   `yaml:"url" required:"true" doc:"Exactly as in the iss claim."`
	JWKS       string   `yaml:"jwks" doc:"Address of its keys; default: found in its metadata."`
	Algorithms []string `yaml:"algorithms" doc:"Signature algorithms; default: RS256, PS256, ES256, ES384, EdDSA, Ed25519."`
}

// broker checks what the types of auth.broker cannot say.
func (d *decoder) broker(root ast.Node) {
	a := &d.file.Config.Auth
	node := child(child(root, "auth"), "broker")
	at := func(path string) position {
		for p := path; ; p = parent(p) {
			if pos, ok := d.file.positions[p]; ok || p == "" {
				return pos
			}
		}
	}
	problem := func(path, message, suggestion string) { d.problem(at(path), path, message, suggestion) }
	switch {
	case a.Mode != "broker" && node != nil && slices.Contains([]string{"none", "tokens", "dev"}, a.Mode):
		problem("auth.broker", fmt.Sprintf("the mode is %s, which has no broker", a.Mode), "write mode: broker")
		return
	case a.Mode != "broker":
		return
	case node == nil:
		problem("auth.mode", `the setting "broker" is missing: mode broker needs an identity provider`, "write auth.broker.provider and auth.broker.access")
		return
	}
	b := &a.Broker
	if u, err := url.Parse(a.PublicURL); err != nil || !httpsOrLoopback(a.PublicURL) || u.Path != "" && u.Path != "/" {
		problem("auth.public_url", "mode broker needs the address of this server as clients write it: https (http only on loopback), without path", "write public_url: https://mcp.example.com")
	}
	if child(node, "provider") == nil {
		problem("auth.broker", `the setting "provider" is missing`, "")
	} else if b.Provider.URL != "" && !httpsOrLoopback(b.Provider.URL) {
		problem("auth.broker.provider.url", "must be https (http only on loopback)", "")
	}
	if len(b.Access) == 0 {
		problem("auth.broker", `the setting "access" is missing: nobody could log in`, `write access: [{scopes: ["*"]}] for everybody`)
	}
	if (b.StateDir == "") == (len(b.SigningKeys) == 0) {
		problem("auth.broker", "it needs signing keys: state_dir or signing_keys, and not both", "")
	}
	if len(a.Issuers) > 0 {
		problem("auth.issuers", "mode broker has an issuer of its own", "write mode: tokens for others")
	}
	if b.TokenLife <= 0 || b.TokenLife > time.Hour {
		problem("auth.broker.token_life", "must be more than 0 and at most 1h", "")
	}
	if b.LoginLife <= 0 {
		problem("auth.broker.login_life", "must be more than 0", "")
	}
	for i := range b.Assertions {
		if path := fmt.Sprintf("auth.broker.assertions[%d].url", i); b.Assertions[i].URL != "" && !httpsOrLoopback(b.Assertions[i].URL) {
			problem(path, "must be https (http only on loopback)", "")
		}
	}
	seen := map[string]bool{}
	for i, c := range b.Clients {
		path := fmt.Sprintf("auth.broker.clients[%d]", i)
		if c.ID != "" && seen[c.ID] {
			problem(path+".id", fmt.Sprintf("two clients have the id %q", c.ID), "")
		}
		seen[c.ID] = true
		if j := slices.IndexFunc(c.Redirects, func(u string) bool { return !issuer.ValidRedirect(u) }); j >= 0 {
			problem(fmt.Sprintf("%s.redirects[%d]", path, j), "must be https, http on loopback, or a scheme of the app's own; without fragment", "")
		}
	}
}

// httpsOrLoopback reports whether an address is one for secrets.
func httpsOrLoopback(address string) bool {
	u, err := url.Parse(address)
	return err == nil && u.Host != "" && u.User == nil && u.Fragment == "" && u.RawQuery == "" &&
		(u.Scheme == "https" || u.Scheme == "http" && issuer.Loopback(u.Hostname()))
}
