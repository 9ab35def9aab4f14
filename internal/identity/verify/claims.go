package verify

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/identity/claim"
)

// claims are what a token says, by RFC 7519 and RFC 9068 and what providers make of them.
type claims struct {
	Issuer   string         `json:"iss"`
	Subject  string         `json:"sub"`
	Audience claim.List     `json:"aud"`
	Expires  *float64       `json:"exp"`
	NotYet   *float64       `json:"nbf"`
	Issued   *float64       `json:"iat"`
	ID       string         `json:"jti"`
	ClientID string         `json:"client_id"`
	AZP      string         `json:"azp"`   // Keycloak, Entra v2
	CID      string         `json:"cid"`   // Okta
	AppID    string         `json:"appid"` // Entra v1
	Scope    string         `json:"scope"`
	SCP      claim.List     `json:"scp"` // Entra: text, Okta: list
	Nonce    string         `json:"nonce"`
	AtHash   string         `json:"at_hash"`
	Bound    jsontext.Value `json:"cnf"`
	Other    jsontext.Value `json:",embed"`

	typ    string // of the header
	opaque bool   // the issuer was asked: it has judged the form
}

// A profile is how access tokens of a kind of provider look.
type profile struct {
	strict bool // RFC 9068, all of it
	client func(*claims) string
}

var profiles = map[string]profile{
	"rfc9068":  {strict: true, client: func(c *claims) string { return c.ClientID }},
	"entra":    {client: func(c *claims) string { return first(c.AZP, c.AppID) }},
	"okta":     {client: func(c *claims) string { return first(c.CID, c.ClientID) }},
	"keycloak": {client: func(c *claims) string { return first(c.AZP, c.ClientID) }},
	"dex":      {client: func(c *claims) string { return first(c.AZP, slices.Concat(c.Audience, claim.List{""})[0]) }},
}

func first(all ...string) string {
	for _, s := range all {
		if s != "" {
			return s
		}
	}
	return ""
}

// current decides whether a token counts now. It is asked on every call.
func (is *issuer) current(c *claims, now time.Time) error {
	switch expires := claim.Time(c.Expires); {
	case expires.IsZero():
		return errors.New("it does not say when it expires")
	case !now.Before(expires.Add(is.Skew)):
		return fmt.Errorf("it expired at %v", expires.UTC())
	case c.NotYet != nil && now.Add(is.Skew).Before(claim.Time(c.NotYet)):
		return fmt.Errorf("it is not valid before %v", claim.Time(c.NotYet).UTC())
	case c.Issued != nil && now.Add(is.Skew).Before(claim.Time(c.Issued)):
		return errors.New("it was issued in the future")
	}
	return nil
}

// identify judges what of a token does not change with time, and says whom it names.
func (is *issuer) identify(c *claims) (*Identity, error) {
	p := profiles[is.Profile]
	switch {
	case c.Issuer != is.URL:
		return nil, fmt.Errorf("the issuer is %.100q", c.Issuer)
	case c.Subject == "":
		return nil, errors.New("it names no subject")
	case !slices.ContainsFunc(is.Audiences, func(a string) bool { return slices.Contains(c.Audience, a) }):
		return nil, fmt.Errorf("it is for %.200q", c.Audience)
	}
	if err := is.form(c, p); err != nil {
		return nil, err
	}
	id := &Identity{Issuer: c.Issuer, Subject: c.Subject, Expires: claim.Time(c.Expires)}
	// A subject is unique at its issuer only.
	id.Principal = call.Principal{ID: c.Issuer + "#" + c.Subject, Client: p.client(c), Scopes: strings.Fields(c.Scope)}
	for _, s := range c.SCP {
		id.Scopes = append(id.Scopes, strings.Fields(s)...)
	}
	if len(id.Scopes) == 0 && !p.strict {
		id.Scopes = is.Scopes
	}
	var err error
	if id.Roles, err = claim.Texts(c.Other, is.RolesClaim); err != nil {
		return nil, err
	}
	id.Tenant, err = is.tenantOf(c)
	return id, err
}

// tenantOf returns the one tenant that a token belongs to, or "" if nothing names one: a claim, the
// issuer, and the addresses it is for have to agree.
func (is *issuer) tenantOf(c *claims) (string, error) {
	tenant := is.Tenant
	if is.TenantClaim != "" {
		named, err := claim.Texts(c.Other, is.TenantClaim)
		if err != nil || len(named) != 1 || named[0] == "" {
			return "", fmt.Errorf("the claim %q does not name exactly one tenant", is.TenantClaim)
		}
		if tenant != "" && tenant != named[0] {
			return "", fmt.Errorf("the claim %q names the tenant %.100q, and the issuer is that of %q", is.TenantClaim, named[0], tenant)
		}
		tenant = named[0]
	}
	for _, a := range c.Audience {
		switch of := is.tenants[a]; {
		case of == "" || of == tenant:
		case tenant != "":
			return "", fmt.Errorf("it is for %.200q, which is that of another tenant than %.100q", a, tenant)
		default:
			tenant = of
		}
	}
	return tenant, nil
}

// form checks that a token is an access token, and not one made for something else.
func (is *issuer) form(c *claims, p profile) error {
	if c.opaque {
		return nil
	}
	typ := strings.TrimPrefix(strings.ToLower(c.typ), "application/")
	if p.strict {
		switch {
		case typ != "at+jwt":
			return fmt.Errorf("its type is %.40q, not at+jwt (RFC 9068)", c.typ)
		case c.ClientID == "" || c.Issued == nil || c.ID == "":
			return errors.New("it lacks client_id, iat or jti (RFC 9068)")
		}
		return nil
	}
	switch {
	case typ != "" && typ != "jwt" && typ != "at+jwt":
		return fmt.Errorf("its type is %.40q", c.typ)
	case c.Nonce != "" && is.Profile != "entra" || c.AtHash != "":
		return errors.New("it is an ID token")
	}
	return nil
}
