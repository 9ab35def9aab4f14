package broker

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode"

	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/internal/identity/claim"
	"newel.dev/newel/internal/identity/issuer"
)

// claims are what a provider says of somebody, in ID tokens and ID-JAGs.
type claims struct {
	Issuer     string     `json:"iss"`
	Subject    string     `json:"sub"`
	Audience   claim.List `json:"aud"`
	Expires    *float64   `json:"exp"`
	Issued     *float64   `json:"iat"`
	NotYet     *float64   `json:"nbf"`
	Nonce      string     `json:"nonce"`
	Authorized string     `json:"azp"`
	Username   string     `json:"preferred_username"`
	FullName   string     `json:"name"`
	ID         string     `json:"jti"`
	Client     string     `json:"client_id"`
	Resource   claim.List `json:"resource"`
	Scope      string     `json:"scope"`
	Bound      struct {
		Thumbprint string `json:"jkt"`
	} `json:"cnf"`
	All jsontext.Value `json:"-"`
}

const (
	maxSubject = 255 // bytes (OpenID Connect Core, section 2)
	maxShown   = 100 // characters
)

// name is what somebody is called on a page that only they see.
func (c *claims) name() string {
	name := c.FullName
	if name == "" {
		name = c.Username
	}
	name = strings.Map(func(r rune) rune {
		if !unicode.IsGraphic(r) {
			return -1
		}
		return r
	}, name)
	if all := []rune(name); len(all) > maxShown {
		name = string(all[:maxShown])
	}
	return name
}

// person says what somebody may. A subject is unique at its issuer only, so ours names both.
func (o *Options) person(from string, c *claims) (*issuer.Person, error) {
	if c.Subject == "" || len(c.Subject) > maxSubject {
		return nil, errors.New("the provider names no subject, or one too long")
	}
	p := &issuer.Person{Subject: from + "#" + c.Subject}
	groups, err := claim.Texts(c.All, o.GroupsClaim)
	if err != nil {
		return nil, err
	}
	if o.TenantClaim != "" {
		tenants, err := claim.Texts(c.All, o.TenantClaim)
		if err != nil || len(tenants) != 1 || tenants[0] == "" {
			return nil, fmt.Errorf("the claim %q of %.300q does not name exactly one tenant", o.TenantClaim, p.Subject)
		}
		p.Tenant = tenants[0]
	}
	named := false
	for _, r := range o.Rules {
		if r.Group != "" && !slices.Contains(groups, r.Group) {
			continue
		}
		named = true
		p.Scopes, p.Roles = append(p.Scopes, r.Scopes...), append(p.Roles, r.Roles...)
		switch {
		case r.Tenant == "" || r.Tenant == p.Tenant:
		case p.Tenant != "":
			return nil, fmt.Errorf("%.300q is of two tenants, %.100q and %.100q", p.Subject, p.Tenant, r.Tenant)
		default:
			p.Tenant = r.Tenant
		}
	}
	if p.Tenant == "" && slices.ContainsFunc(o.Rules, func(r Rule) bool { return r.Tenant != "" }) {
		return nil, fmt.Errorf("%.300q is of no tenant, and others are of one", p.Subject)
	}
	if !named {
		return nil, fmt.Errorf("no rule names %.300q, who is in the groups %.500q", p.Subject, groups)
	}
	for _, list := range []*[]string{&p.Scopes, &p.Roles} {
		slices.Sort(*list)
		*list = slices.Compact(*list)
	}
	return p, nil
}
