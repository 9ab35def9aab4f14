// Package login gets an access token for an MCP server the way its users do: authorization code
// with PKCE at the authorization server that the server names.
//
// Start reading at [Begin] and [Flow.Finish]. It refuses metadata that is not of the issuer it was
// asked of (RFC 8414), servers without PKCE S256, answers of another issuer (RFC 9207) or without
// the state it made, and everything that is not https, but on loopback.
package login

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/go-json-experiment/json"
)

const (
	maxDocument = 1 << 20
	timeout     = 15 * time.Second
)

// client follows no redirects: an address that moved is for its owner to say.
var client = &http.Client{Timeout: timeout, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}

// A Token is what a login gives.
type Token struct {
	Access   string    `json:"access_token"`
	Refresh  string    `json:"refresh_token,omitzero"`
	Scope    string    `json:"scope,omitzero"`
	Expires  time.Time `json:"expires"`
	Endpoint string    `json:"token_endpoint"` // where it is renewed
	ClientID string    `json:"client_id"`
	Resource string    `json:"resource"`
	Issuer   string    `json:"issuer"`
}

// Fresh reports whether the token is good for a while yet.
func (t *Token) Fresh(now time.Time) bool { return now.Add(30 * time.Second).Before(t.Expires) }

// A Flow is a login that has begun.
type Flow struct {
	URL string // for the person's browser

	issuer, endpoint, clientID, redirect, resource, state, verifier string
	issRequired                                                     bool
}

// metadata of an authorization server.
type metadata struct {
	Issuer    string   `json:"issuer"`
	Authorize string   `json:"authorization_endpoint"`
	Token     string   `json:"token_endpoint"`
	Register  string   `json:"registration_endpoint"`
	PKCE      []string `json:"code_challenge_methods_supported"`
	SaysIss   bool     `json:"authorization_response_iss_parameter_supported"`
}

// Options configure a login.
type Options struct {
	Server   string   // URL of the MCP server
	Redirect string   // where the browser comes back to, on loopback
	Scopes   []string // to ask for; default: those of the server's challenge
	ClientID string   // of a client that is registered; default: one is registered
}

// Begin finds the authorization server of an MCP server and registers a client there.
func Begin(ctx context.Context, o Options) (*Flow, error) {
	if !secure(o.Server) {
		return nil, fmt.Errorf("%q is not an https address, nor http on loopback", o.Server)
	}
	resource, servers, scopes, err := protected(ctx, o.Server)
	if err != nil {
		return nil, err
	}
	if len(o.Scopes) > 0 {
		scopes = o.Scopes
	}
	m, err := discover(ctx, servers[0])
	if err != nil {
		return nil, err
	}
	f := &Flow{issuer: m.Issuer, endpoint: m.Token, clientID: o.ClientID, redirect: o.Redirect, resource: resource, state: rand.Text(), verifier: rand.Text() + rand.Text(), issRequired: m.SaysIss}
	if f.clientID == "" {
		if m.Register == "" {
			return nil, fmt.Errorf("the authorization server %s registers no clients; give the id of one that is registered", m.Issuer)
		}
		if f.clientID, err = register(ctx, m.Register, o.Redirect); err != nil {
			return nil, err
		}
	}
	sum := sha256.Sum256([]byte(f.verifier))
	q := url.Values{
		"response_type": {"code"}, "client_id": {f.clientID}, "redirect_uri": {o.Redirect}, "state": {f.state}, "resource": {resource},
		"code_challenge": {base64.RawURLEncoding.EncodeToString(sum[:])}, "code_challenge_method": {"S256"},
	}
	if len(scopes) > 0 {
		q.Set("scope", strings.Join(scopes, " "))
	}
	to, err := url.Parse(m.Authorize)
	if err != nil {
		return nil, err
	}
	for k, v := range to.Query() {
		q[k] = v
	}
	to.RawQuery = q.Encode()
	f.URL = to.String()
	return f, nil
}

// protected reads the metadata of the resource: named by the server's challenge, or at its
// well-known place (RFC 9728).
func protected(ctx context.Context, server string) (resource string, servers, scopes []string, err error) {
	u, err := url.Parse(server)
	if err != nil {
		return "", nil, nil, err
	}
	challenge, err := challengeOf(ctx, server)
	if err != nil {
		return "", nil, nil, err
	}
	at := parameter(challenge, "resource_metadata")
	if at == "" {
		at = u.Scheme + "://" + u.Host + "/.well-known/oauth-protected-resource" + strings.TrimSuffix(u.Path, "/")
	}
	var doc struct {
		Resource string   `json:"resource"`
		Servers  []string `json:"authorization_servers"`
	}
	if err := get(ctx, at, &doc); err != nil {
		return "", nil, nil, fmt.Errorf("%s does not say how to log in: %w", server, err)
	}
	if strings.TrimSuffix(doc.Resource, "/") != strings.TrimSuffix(server, "/") || len(doc.Servers) == 0 {
		return "", nil, nil, fmt.Errorf("%s is the metadata of %q, not of %s", at, doc.Resource, server)
	}
	return doc.Resource, doc.Servers, strings.Fields(parameter(challenge, "scope")), nil
}

// challengeOf asks without a token and returns the WWW-Authenticate header, or "".
func challengeOf(ctx context.Context, server string) (string, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, server, nil)
	if err != nil {
		return "", err
	}
	r.Header.Set("Accept", "text/event-stream")
	resp, err := client.Do(r)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	return resp.Header.Get("WWW-Authenticate"), nil
}

// parameter returns a quoted parameter of a challenge, or "".
func parameter(challenge, name string) string {
	_, rest, found := strings.Cut(challenge, name+`="`)
	if !found {
		return ""
	}
	v, _, _ := strings.Cut(rest, `"`)
	return v
}

// discover reads the metadata of an authorization server.
func discover(ctx context.Context, issuer string) (*metadata, error) {
	if !secure(issuer) {
		return nil, fmt.Errorf("the authorization server %q is not https, nor http on loopback", issuer)
	}
	u, err := url.Parse(issuer)
	if err != nil {
		return nil, err
	}
	root, path := u.Scheme+"://"+u.Host, strings.TrimSuffix(u.Path, "/")
	places := []string{root + "/.well-known/oauth-authorization-server" + path, root + "/.well-known/openid-configuration" + path}
	if path != "" {
		places = append(places, root+path+"/.well-known/openid-configuration")
	}
	var problems []error
	for _, at := range places {
		m := &metadata{}
		if err := get(ctx, at, m); err != nil {
			problems = append(problems, err)
			continue
		}
		switch {
		case m.Issuer != issuer:
			return nil, fmt.Errorf("%s is of the issuer %q, not %q", at, m.Issuer, issuer)
		case !slices.Contains(m.PKCE, "S256"):
			return nil, fmt.Errorf("the authorization server %s does not support PKCE with S256", issuer)
		case !secure(m.Authorize) || !secure(m.Token) || m.Register != "" && !secure(m.Register):
			return nil, fmt.Errorf("the authorization server %s names addresses that are not https", issuer)
		}
		return m, nil
	}
	return nil, fmt.Errorf("the authorization server %s has no metadata: %w", issuer, errors.Join(problems...))
}

func register(ctx context.Context, endpoint, redirect string) (string, error) {
	body, err := json.Marshal(map[string]any{
		"client_name": "Newel command line", "redirect_uris": []string{redirect}, "token_endpoint_auth_method": "none",
		"grant_types": []string{"authorization_code", "refresh_token"}, "response_types": []string{"code"}, "application_type": "native",
	})
	if err != nil {
		return "", err
	}
	var out struct {
		ClientID string `json:"client_id"`
	}
	if err := post(ctx, endpoint, "application/json", string(body), &out); err != nil {
		return "", fmt.Errorf("registering a client: %w", err)
	}
	if out.ClientID == "" {
		return "", errors.New("the authorization server registered a client without an id")
	}
	return out.ClientID, nil
}

// Finish takes what the browser came back with.
func (f *Flow) Finish(ctx context.Context, q url.Values) (*Token, error) {
	switch iss := q.Get("iss"); { // before anything else of it is looked at
	case iss != "" && iss != f.issuer, iss == "" && f.issRequired:
		return nil, fmt.Errorf("the answer is of the issuer %q, not %q", iss, f.issuer)
	case q.Get("state") != f.state:
		return nil, errors.New("the answer does not belong to this login")
	case q.Get("error") != "":
		return nil, fmt.Errorf("the authorization server refused: %s %s", q.Get("error"), q.Get("error_description"))
	case q.Get("code") == "":
		return nil, errors.New("the answer holds no code")
	}
	return f.ask(ctx, url.Values{"grant_type": {"authorization_code"}, "code": {q.Get("code")}, "redirect_uri": {f.redirect}, "code_verifier": {f.verifier}})
}

// Renew returns a new token for one that has expired.
func Renew(ctx context.Context, t *Token) (*Token, error) {
	if t.Refresh == "" {
		return nil, errors.New("it cannot be renewed; log in again")
	}
	f := &Flow{issuer: t.Issuer, endpoint: t.Endpoint, clientID: t.ClientID, resource: t.Resource}
	next, err := f.ask(ctx, url.Values{"grant_type": {"refresh_token"}, "refresh_token": {t.Refresh}})
	if err == nil && next.Refresh == "" {
		next.Refresh = t.Refresh
	}
	return next, err
}

func (f *Flow) ask(ctx context.Context, form url.Values) (*Token, error) {
	form.Set("client_id", f.clientID)
	form.Set("resource", f.resource)
	var out struct {
		Access  string `json:"access_token"`
		Type    string `json:"token_type"`
		Expires int    `json:"expires_in"`
		Refresh string `json:"refresh_token"`
		Scope   string `json:"scope"`
	}
	if err := post(ctx, f.endpoint, "application/x-www-form-urlencoded", form.Encode(), &out); err != nil {
		return nil, err
	}
	if out.Access == "" || !strings.EqualFold(out.Type, "Bearer") {
		return nil, errors.New("the authorization server gave no bearer token")
	}
	if out.Expires <= 0 {
		out.Expires = 300
	}
	return &Token{
		Access: out.Access, Refresh: out.Refresh, Scope: out.Scope, Expires: time.Now().Add(time.Duration(out.Expires) * time.Second),
		Endpoint: f.endpoint, ClientID: f.clientID, Resource: f.resource, Issuer: f.issuer,
	}, nil
}

func get(ctx context.Context, at string, into any) error {
	if !secure(at) {
		return fmt.Errorf("%q is not https, nor http on loopback", at)
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, at, nil)
	if err != nil {
		return err
	}
	return do(r, into)
}

func post(ctx context.Context, at, kind, body string, into any) error {
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, at, strings.NewReader(body))
	if err != nil {
		return err
	}
	r.Header.Set("Content-Type", kind)
	return do(r, into)
}

func do(r *http.Request, into any) error {
	r.Header.Set("Accept", "application/json")
	resp, err := client.Do(r)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(io.LimitReader(resp.Body, maxDocument+1))
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK && resp.StatusCode != http.StatusCreated {
		var why struct {
			Error       string `json:"error"`
			Description string `json:"error_description"`
		}
		_ = json.Unmarshal(raw, &why) // if it says nothing the status has to do
		return fmt.Errorf("%s answers with status %d %s %s", r.URL.Redacted(), resp.StatusCode, why.Error, why.Description)
	}
	if len(raw) > maxDocument {
		return fmt.Errorf("%s answers with more than %d bytes", r.URL.Redacted(), maxDocument)
	}
	if err := json.Unmarshal(raw, into); err != nil {
		return fmt.Errorf("%s: %w", r.URL.Redacted(), err)
	}
	return nil
}

// secure reports whether an address is https, or http on loopback.
func secure(address string) bool {
	u, err := url.Parse(address)
	if err != nil || u.Host == "" || u.User != nil {
		return false
	}
	ip, err := netip.ParseAddr(u.Hostname())
	return u.Scheme == "https" || u.Scheme == "http" && (u.Hostname() == "localhost" || err == nil && ip.IsLoopback())
}
