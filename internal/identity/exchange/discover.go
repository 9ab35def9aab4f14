package exchange

import (
	"context"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"

	"github.com/go-json-experiment/json"
)

const (
	maxDocument = 1 << 20
	maxListed   = 64 // authorization servers of one resource
)

// place is where access is to be had: a resource and its authorization server.
type place struct {
	resource string   // for the resource parameter (RFC 8707)
	scopes   []string // scopes_supported of the resource
	dpop     bool     // the resource takes DPoP-bound tokens only
	as       *metadata
}

// metadata is that of an authorization server (RFC 8414).
type metadata struct {
	Issuer     string   `json:"issuer"`
	Authorize  string   `json:"authorization_endpoint"`
	Token      string   `json:"token_endpoint"`
	Register   string   `json:"registration_endpoint"`
	PKCE       []string `json:"code_challenge_methods_supported"`
	SaysIss    bool     `json:"authorization_response_iss_parameter_supported"`
	Scopes     []string `json:"scopes_supported"`
	Methods    []string `json:"token_endpoint_auth_methods_supported"`
	Algorithms []string `json:"token_endpoint_auth_signing_alg_values_supported"`
	Documents  bool     `json:"client_id_metadata_document_supported"`
	DPoP       []string `json:"dpop_signing_alg_values_supported"`
}

// discover finds the authorization server of the resource: what a challenge names, or its
// well-known places, that with the path first (MCP, authorization server discovery).
func (c *Client) discover(ctx context.Context, named string) (*place, error) {
	origin := c.url.Scheme + "://" + c.url.Host
	path := strings.TrimSuffix(c.url.EscapedPath(), "/")
	const wellKnown = "/.well-known/oauth-protected-resource"
	places := []string{named}
	if named == "" {
		places = []string{origin + wellKnown + path}
		if path != "" {
			places = append(places, origin+wellKnown)
		}
	}
	var problems []error
	for _, at := range places {
		var doc struct {
			Resource string   `json:"resource"`
			Servers  []string `json:"authorization_servers"`
			Scopes   []string `json:"scopes_supported"`
			DPoP     bool     `json:"dpop_bound_access_tokens_required"`
		}
		if err := c.get(ctx, at, &doc); err != nil {
			if !absent(err) {
				return nil, err
			}
			problems = append(problems, err)
			continue
		}
		if !c.isOf(doc.Resource) {
			return nil, fmt.Errorf("%s is the metadata of %.200q, not of %s", at, doc.Resource, c.o.Server)
		}
		issuer, err := c.choose(doc.Servers)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", at, err)
		}
		as, err := c.server(ctx, issuer)
		if err != nil {
			return nil, err
		}
		return &place{resource: doc.Resource, scopes: valid(doc.Scopes), dpop: doc.DPoP, as: as}, nil
	}
	if c.o.Legacy {
		return c.legacy(ctx, origin)
	}
	return nil, fmt.Errorf("%s does not say who gives access to it: %w", c.o.Server, errors.Join(problems...))
}

// isOf reports whether metadata of a resource is of our server: its own address or one above it
// (RFC 9728, section 3.3). A token for it goes nowhere else.
func (c *Client) isOf(resource string) bool {
	u, err := url.Parse(resource)
	if err != nil || u.Fragment != "" || u.RawQuery != c.url.RawQuery && u.RawQuery != "" || !sameOrigin(u, c.url) {
		return false
	}
	mine, its := strings.TrimSuffix(c.url.EscapedPath(), "/"), strings.TrimSuffix(u.EscapedPath(), "/")
	return mine == its || strings.HasPrefix(mine, its+"/")
}

// sameOrigin compares scheme, host and port.
func sameOrigin(a, b *url.URL) bool {
	port := func(u *url.URL) string {
		if p := u.Port(); p != "" {
			return p
		}
		return u.Scheme // stands for its default port
	}
	normal := func(p, scheme string) string {
		if p == "443" && scheme == "https" || p == "80" && scheme == "http" {
			return scheme
		}
		return p
	}
	return a.User == nil && a.Scheme == b.Scheme && strings.EqualFold(a.Hostname(), b.Hostname()) && normal(port(a), a.Scheme) == normal(port(b), b.Scheme)
}

// choose returns the authorization server to ask. Credentials go to the one they are of only.
func (c *Client) choose(servers []string) (string, error) {
	switch {
	case len(servers) == 0 || len(servers) > maxListed:
		return "", fmt.Errorf("it names %d authorization servers", len(servers))
	case c.o.Issuer == "":
		return servers[0], nil
	case !slices.Contains(servers, c.o.Issuer):
		return "", fmt.Errorf("it names the authorization server %.200q, and the configured client is of %q", servers[0], c.o.Issuer)
	}
	return c.o.Issuer, nil
}

// server reads the metadata of an authorization server. A document of another issuer is no reason
// to look further, but to stop (RFC 8414, section 3.3).
func (c *Client) server(ctx context.Context, issuer string) (*metadata, error) {
	if !c.secure(issuer) {
		return nil, fmt.Errorf("the authorization server %.200q is not https, nor http on loopback", issuer)
	}
	u, err := url.Parse(issuer)
	if err != nil || u.RawQuery != "" || u.Fragment != "" {
		return nil, fmt.Errorf("the authorization server %.200q has no valid address", issuer)
	}
	origin, path := u.Scheme+"://"+u.Host, strings.TrimSuffix(u.EscapedPath(), "/")
	places := []string{origin + "/.well-known/oauth-authorization-server" + path, origin + "/.well-known/openid-configuration" + path}
	if path != "" {
		places = append(places, origin+path+"/.well-known/openid-configuration")
	}
	var problems []error
	for _, at := range places {
		m := &metadata{}
		if err := c.get(ctx, at, m); err != nil {
			if !absent(err) {
				return nil, err
			}
			problems = append(problems, err)
			continue
		}
		return m, c.check(m, issuer)
	}
	return nil, fmt.Errorf("the authorization server %s has no metadata: %w", issuer, errors.Join(problems...))
}

// check refuses metadata that must not be used.
func (c *Client) check(m *metadata, issuer string) error {
	if m.Issuer != issuer {
		return fmt.Errorf("the metadata of the authorization server %s is of the issuer %.200q", issuer, m.Issuer)
	}
	if !c.secure(m.Token) {
		return fmt.Errorf("the authorization server %s has no token endpoint over https", issuer)
	}
	for _, at := range []string{m.Authorize, m.Register} {
		if at != "" && !c.secure(at) {
			return fmt.Errorf("the authorization server %s names addresses that are not https", issuer)
		}
	}
	m.Scopes = valid(m.Scopes)
	return nil
}

// legacy is a server of revision 2025-03-26: without metadata of its own, it is its own
// authorization server, and without metadata of that its endpoints are where that revision says.
func (c *Client) legacy(ctx context.Context, origin string) (*place, error) {
	m := &metadata{}
	err := c.get(ctx, origin+"/.well-known/oauth-authorization-server", m)
	switch {
	case err == nil:
		err = c.check(m, origin)
	case absent(err):
		*m = metadata{Issuer: origin, Authorize: origin + "/authorize", Token: origin + "/token", Register: origin + "/register", PKCE: []string{"S256"}}
		err = nil
	}
	if err != nil {
		return nil, err
	}
	if c.o.Issuer != "" && c.o.Issuer != m.Issuer {
		return nil, fmt.Errorf("%s is its own authorization server, and the configured client is of %q", origin, c.o.Issuer)
	}
	return &place{resource: c.o.Server, as: m}, nil
}

// statusError is an answer that says no. Its text comes from elsewhere and is for the log.
type statusError struct {
	at      string
	status  int
	code    string // error, as in RFC 6749, section 5.2; "" if it names none
	details string
	nonce   string // DPoP-Nonce
}

// Error says what came back.
func (e *statusError) Error() string {
	return strings.TrimSpace(fmt.Sprintf("%s answers with status %d %s %s", e.at, e.status, e.code, e.details))
}

// absent reports whether something is not there, so that another place may be tried.
func absent(err error) bool {
	var s *statusError
	return errors.As(err, &s) && s.status >= 400 && s.status < 500
}

func (c *Client) get(ctx context.Context, at string, into any) error {
	if !c.secure(at) {
		return fmt.Errorf("%.200q is not https, nor http on loopback", at)
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, at, nil)
	if err != nil {
		return err
	}
	return c.do(r, into)
}

// do sends a request and decodes the answer, bounded. Redirects are not followed: an address that
// moved is for its owner to say.
func (c *Client) do(r *http.Request, into any) error {
	r.Header.Set("Accept", "application/json")
	resp, err := c.o.HTTP.Do(r)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(io.LimitReader(resp.Body, maxDocument+1))
	switch {
	case err != nil:
		return err
	case len(raw) > maxDocument:
		return fmt.Errorf("%s answers with more than %d bytes", r.URL.Redacted(), maxDocument)
	case resp.StatusCode != http.StatusOK && resp.StatusCode != http.StatusCreated:
		var why struct {
			Error       string `json:"error"`
			Description string `json:"error_description"`
		}
		_ = json.Unmarshal(raw, &why) // if it says nothing the status has to do
		return &statusError{at: r.URL.Redacted(), status: resp.StatusCode, code: plain(why.Error, 64), details: plain(why.Description, 300), nonce: nonceOf(resp.Header)}
	}
	if kind, _, _ := mime.ParseMediaType(resp.Header.Get("Content-Type")); !strings.HasSuffix(kind, "json") { // what cannot be parsed is no JSON
		return &statusError{at: r.URL.Redacted(), status: http.StatusNotFound, details: "and what is no JSON"} // pages of websites come with any path
	}
	if err := json.Unmarshal(raw, into); err != nil {
		return fmt.Errorf("%s: %w", r.URL.Redacted(), err)
	}
	return nil
}

// plain makes text of somebody else fit for one line of a log or terminal.
func plain(s string, most int) string {
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return -1
		}
		return r
	}, s)
	return s[:min(len(s), most)]
}

// secure reports whether an address may be trusted with secrets: https, or http on loopback if
// that is where the server itself is.
func (c *Client) secure(address string) bool {
	u, err := url.Parse(address)
	return err == nil && Secure(address) && (u.Scheme == "https" || onLoopback(c.url))
}

func onLoopback(u *url.URL) bool {
	ip, err := netip.ParseAddr(u.Hostname())
	return u.Hostname() == "localhost" || err == nil && ip.IsLoopback()
}

// OnLoopback reports whether a server is on this machine, so that its authorization server may be too.
func OnLoopback(server string) bool {
	u, err := url.Parse(server)
	return err == nil && onLoopback(u)
}

// Secure reports whether a server may be given a token: over https, or http on this machine.
func Secure(server string) bool {
	u, err := url.Parse(server)
	return err == nil && u.Host != "" && u.User == nil && (u.Scheme == "https" || u.Scheme == "http" && onLoopback(u))
}
