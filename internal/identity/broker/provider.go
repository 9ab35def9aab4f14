package broker

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/go-json-experiment/json"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/identity/claim"
	"newel.dev/newel/internal/identity/issuer"
)

// Bounds of what a provider may answer, and how often it is asked about itself.
const (
	maxAnswer     = 1 << 20 // bytes
	metadataLife  = time.Hour
	metadataRetry = 5 * time.Second // after a failure
	maxIssued     = 10 * time.Minute
)

// provider is the other side of a login. It is safe for concurrent use.
type provider struct {
	Provider
	redirect   string
	http       *http.Client
	now        func() time.Time
	signatures Signatures

	mu      sync.Mutex // guards what is below; held while the provider is asked, because all who wait need the answer
	known   *metadata
	problem error
	until   time.Time
}

// metadata is what a provider says of itself (OpenID Connect Discovery, section 3).
type metadata struct {
	Issuer        string   `json:"issuer"`
	Authorization string   `json:"authorization_endpoint"`
	Token         string   `json:"token_endpoint"`
	Methods       []string `json:"token_endpoint_auth_methods_supported"`
	NamesItself   bool     `json:"authorization_response_iss_parameter_supported"`
}

// refusedError is a provider that logs nobody in, and says so.
type refusedError struct{ code, why string }

// Error implements error.
func (e *refusedError) Error() string { return fmt.Sprintf("%.100q: %.300q", e.code, e.why) }

// unreachableError is a provider that cannot be asked.
type unreachableError struct{ error }

// Unwrap returns the cause.
func (e *unreachableError) Unwrap() error { return e.error }

func isUnavailable(err error) bool {
	var u *unreachableError
	var c *call.Error
	return errors.As(err, &u) || errors.As(err, &c) && c.Code == call.Unavailable
}

// about returns what the provider says of itself.
func (p *provider) about(ctx context.Context) (*metadata, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if now := p.now(); now.Before(p.until) {
		return p.known, p.problem
	}
	// Who asked may go away; what is learned is for all. The client of HTTP has a time limit.
	p.known, p.problem = p.discover(context.WithoutCancel(ctx))
	p.until = p.now().Add(metadataLife)
	if p.problem != nil {
		p.problem = &unreachableError{p.problem}
		p.until = p.now().Add(metadataRetry)
	}
	return p.known, p.problem
}

func (p *provider) discover(ctx context.Context) (*metadata, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, strings.TrimSuffix(p.URL, "/")+"/.well-known/openid-configuration", nil)
	if err != nil {
		return nil, err
	}
	m := &metadata{}
	switch err := p.ask(r, m); {
	case err != nil:
		return nil, err
	case m.Issuer != p.URL: // exactly, or it is somebody else's
		return nil, fmt.Errorf("the metadata at %s is of the issuer %.200q", p.URL, m.Issuer)
	case !secure(m.Authorization) || !secure(m.Token):
		return nil, errors.New("an endpoint of the provider is not https (http only on loopback)")
	}
	return m, nil
}

func secure(address string) bool {
	u, err := url.Parse(address)
	return err == nil && u.Host != "" && u.User == nil && u.Fragment == "" && (u.Scheme == "https" || u.Scheme == "http" && issuer.Loopback(u.Hostname()))
}

// ask reads a bounded JSON answer; errors of OAuth are of type *refusedError.
func (p *provider) ask(r *http.Request, into any) error {
	r.Header.Set("Accept", "application/json")
	resp, err := p.http.Do(r)
	if err != nil {
		return &unreachableError{err}
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	switch {
	case err != nil:
		return &unreachableError{err}
	case len(raw) > maxAnswer:
		return fmt.Errorf("%s answers with more than %d bytes", r.URL.Redacted(), maxAnswer)
	case resp.StatusCode >= http.StatusInternalServerError:
		return &unreachableError{fmt.Errorf("%s answers with status %d", r.URL.Redacted(), resp.StatusCode)}
	case resp.StatusCode != http.StatusOK:
		var e struct {
			Code string `json:"error"`
			Why  string `json:"error_description"`
		}
		_ = json.Unmarshal(raw, &e) // the status says enough
		return fmt.Errorf("%s answers with status %d, %.100q: %.300q", r.URL.Redacted(), resp.StatusCode, e.Code, e.Why)
	}
	return json.Unmarshal(raw, into)
}

// begin returns where a browser logs in.
func (p *provider) begin(ctx context.Context, l *login) (string, error) {
	m, err := p.about(ctx)
	if err != nil {
		return "", err
	}
	u, err := url.Parse(m.Authorization)
	if err != nil {
		return "", err
	}
	scopes := []string{"openid"}
	for _, s := range p.Scopes {
		if !slices.Contains(scopes, s) {
			scopes = append(scopes, s)
		}
	}
	q := u.Query()
	for k, v := range map[string]string{
		"response_type": "code", "client_id": p.ClientID, "redirect_uri": p.redirect, "scope": strings.Join(scopes, " "), "state": l.State, "nonce": l.Nonce,
		"code_challenge": hash(l.Verifier), "code_challenge_method": "S256",
	} {
		q.Set(k, v)
	}
	u.RawQuery = q.Encode()
	return u.String(), nil
}

// finish returns what the provider says of who logged in.
func (p *provider) finish(ctx context.Context, l *login, q url.Values) (*claims, error) {
	m, err := p.about(ctx)
	if err != nil {
		return nil, err
	}
	// Another provider could answer in the name of ours (RFC 9207): one that names itself always does.
	if got := q["iss"]; m.NamesItself && len(got) != 1 || len(got) > 1 || len(got) == 1 && got[0] != p.URL {
		return nil, fmt.Errorf("the answer is of the issuer %.200q", got)
	}
	if q.Has("error") {
		return nil, &refusedError{q.Get("error"), q.Get("error_description")}
	}
	if len(q["code"]) != 1 || q.Get("code") == "" {
		return nil, errors.New("the answer holds no code")
	}
	form := url.Values{"grant_type": {"authorization_code"}, "code": q["code"], "redirect_uri": {p.redirect}, "code_verifier": {l.Verifier}}
	secret := p.Secret.Reveal()
	// Basic is what all have to support (OpenID Connect Core, section 9), unless they say otherwise.
	basic := secret != "" && (len(m.Methods) == 0 || slices.Contains(m.Methods, "client_secret_basic"))
	if !basic {
		form.Set("client_id", p.ClientID)
		if secret != "" {
			form.Set("client_secret", secret)
		}
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, m.Token, strings.NewReader(form.Encode()))
	if err != nil {
		return nil, err
	}
	r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	if basic {
		r.SetBasicAuth(url.QueryEscape(p.ClientID), url.QueryEscape(secret))
	}
	var out struct {
		IDToken string `json:"id_token"`
	}
	if err := p.ask(r, &out); err != nil {
		return nil, err
	}
	return p.identify(ctx, out.IDToken, l.Nonce)
}

// identify checks an ID token (OpenID Connect Core, section 3.1.3.7).
func (p *provider) identify(ctx context.Context, token, nonce string) (*claims, error) {
	typ, payload, err := p.signatures.VerifySignature(ctx, token)
	if err != nil {
		return nil, err
	}
	c := &claims{All: payload}
	if err := json.Unmarshal(payload, c); err != nil {
		return nil, fmt.Errorf("the ID token: %w", err)
	}
	now, expires, issued := p.now(), claim.Time(c.Expires), claim.Time(c.Issued)
	switch {
	case typ != "" && !strings.EqualFold(typ, "JWT"):
		return nil, fmt.Errorf("the ID token has the type %.40q", typ)
	case c.Issuer != p.URL:
		return nil, fmt.Errorf("the ID token is of the issuer %.200q", c.Issuer)
	case !slices.Contains(c.Audience, p.ClientID):
		return nil, fmt.Errorf("the ID token is for %.200q", c.Audience)
	case c.Authorized != "" && c.Authorized != p.ClientID || len(c.Audience) > 1 && c.Authorized == "":
		return nil, fmt.Errorf("the ID token is for %.200q, and its party is %.200q", c.Audience, c.Authorized)
	case expires.IsZero() || !now.Before(expires.Add(skew)):
		return nil, errors.New("the ID token has expired, or does not say when")
	case issued.IsZero() || now.Add(skew).Before(issued) || now.Sub(issued) > maxIssued:
		return nil, errors.New("the ID token was not issued now")
	case c.NotYet != nil && now.Add(skew).Before(claim.Time(c.NotYet)):
		return nil, errors.New("the ID token is not valid yet")
	case !same(c.Nonce, nonce) || nonce == "":
		return nil, errors.New("the ID token is of another login")
	}
	return c, nil
}
